# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Check mode on a converged deployment reports no change, also where only some of its hosts are asked."""

from __future__ import annotations

import sys

from lab_hosts import site

run = site("check-again", cmdline="--check --diff --limit '!gpu-2'")
if run.rc != 0 or run.total("changed"):
    print(run.stdout[-6000:])
    sys.exit(f"check mode on what stands: rc {run.rc}, changed {run.changed_tasks}")
print(f"check mode on what stands: changed 0, {run.seconds} s, round trips {run.round_trips}")
