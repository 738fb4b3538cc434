# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Family roles share a host with other servers: they come, change nothing the second time, and go without a trace.

On the way the master key is rotated: while both are given, the keys of both open every door of the host.
"""

from __future__ import annotations

import sys
from typing import Any

from asking import ask
from lab_hosts import HOSTS, ROOT, play, vault
from rotation import key_of, rotated

SERVERS = [("embedding", "M3E-small", 8012), ("rerank", "bge-reranker-base", 8013), ("embedding", "all-MiniLM-L6-v2", 8002)]


def step(number: int, state: str, changes: bool, **variables: Any) -> None:
    run = play(ROOT / "molecule" / "default" / "family_roles.yml", f"family-{number}", extravars={"family_state": state, **variables})
    if run.rc != 0 or bool(run.total("changed")) != changes:
        print(run.stdout[-6000:])
        sys.exit(f"family roles, {state}, run {number}: rc {run.rc}, changed {run.changed_tasks}")
    print(f"family roles {state}: changed {run.total('changed')}, {run.seconds} s", flush=True)


def statuses(master: str) -> list[int]:
    return [ask(f"https://{HOSTS['gpu-2']}:{port}", key_of(master, "gpu-2", model, port), kind, model)[0] for kind, model, port in SERVERS]


old = vault()["model_server_master_key"]
new = rotated(vault())
step(0, "present", True)
step(1, "present", False, family_roles=["m3e_embedding"])
assert (statuses(old), statuses(new)) == ([200] * 3, [401] * 3), (statuses(old), statuses(new))
step(2, "present", True, model_server_master_key=new, model_server_master_key_previous=old)
assert (statuses(old), statuses(new)) == ([200] * 3, [200] * 3), (statuses(old), statuses(new))
step(3, "absent", True)
step(4, "absent", False, family_roles=["bge_reranker"])
print("two keys during a rotation, one after it", flush=True)
