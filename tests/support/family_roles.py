# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Family roles share a host with other servers: they come, change nothing the second time, and go without a trace."""

from __future__ import annotations

import sys

from lab_hosts import ROOT, play

for number, (state, changes) in enumerate((("present", True), ("present", False), ("absent", True), ("absent", False))):
    run = play(ROOT / "molecule" / "default" / "family_roles.yml", f"family-{number}", extravars={"family_state": state})
    if run.rc != 0 or bool(run.total("changed")) != changes:
        print(run.stdout[-6000:])
        sys.exit(f"family roles, {state}, run {number}: rc {run.rc}, changed {run.changed_tasks}")
    print(f"family roles {state}: changed {run.total('changed')}, {run.seconds} s", flush=True)
