# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The state of each member of a replica set, as one member tells it: one JSON object.

Run in the network namespace of a host that MongoDB lets in, with root's password on standard input: replica_status.py <host> <file of the CA> [step-down].
"""

from __future__ import annotations

import json
import sys

import pymongo

client: pymongo.MongoClient[dict[str, object]] = pymongo.MongoClient(
    sys.argv[1], 27017, username="root", password=sys.stdin.read().strip(), directConnection=True, serverSelectionTimeoutMS=3000,
    connectTimeoutMS=3000, socketTimeoutMS=5000, tls=True, tlsCAFile=sys.argv[2],
)  # fmt: skip
if "step-down" in sys.argv:
    client.admin.command("replSetStepDown", 30, secondaryCatchUpPeriodSecs=10)
status = client.admin.command("replSetGetStatus")
members = {str(member["name"]).partition(":")[0]: str(member["stateStr"]) for member in status["members"]}
print(json.dumps(members))
