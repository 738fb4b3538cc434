# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Run a playbook as AWX does, through ansible-runner, and say what it did."""

from __future__ import annotations

import collections
import dataclasses
import os
import pathlib
import re
import shutil
import time
from collections.abc import Callable
from typing import Any

import ansible_runner

from .common import VAULT_PASSWORD
from .timeline import Timeline

ROOT = pathlib.Path(__file__).resolve().parents[2]

# Actions that stay on the controller. A template or a copy asks for the file's state first and counts twice.
LOCAL = {"set_fact", "debug", "assert", "fail", "include_tasks", "import_tasks", "include_role", "import_role", "meta", "include_vars",
         "validate_argument_spec", "add_host", "group_by", "pause"}  # fmt: skip
TWICE = {"template", "copy"}


@dataclasses.dataclass
class Run:
    """What one playbook run did."""

    rc: int
    status: str
    seconds: float
    stats: dict[str, dict[str, int]]
    stdout: str
    changed_tasks: list[str]
    failed: list[dict[str, Any]]
    round_trips: dict[str, int]
    tasks: dict[str, float]
    timeline: Timeline = dataclasses.field(default_factory=Timeline)

    def total(self, kind: str) -> int:
        return sum((self.stats.get(kind) or {}).values())


def has_changed(event: dict[str, Any]) -> bool:
    """Whether a task that ended well changed something. Of one whose result is censored only a line says so, below a banner or warnings."""
    result = (event.get("event_data") or {}).get("res")
    printed = re.sub(r"\x1b\[[0-9;]*m", "", str(event.get("stdout") or ""))
    return bool(isinstance(result, dict) and result.get("changed")) or re.search(r"^changed: \[", printed, re.MULTILINE) is not None


def vault_environment() -> dict[str, str]:
    """The environment that a lab's inventory needs."""
    return {"ANSIBLE_VAULT_PASSWORD_FILE": str(VAULT_PASSWORD)}


def run_playbook(
    playbook: str | pathlib.Path,
    inventory: str | pathlib.Path | list[str] | dict[str, Any],
    directory: pathlib.Path,
    *,
    extravars: dict[str, Any] | None = None,
    environment: dict[str, str] | None = None,
    cmdline: str = "",
    quiet: bool = False,
    on_event: Callable[[dict[str, Any]], None] | None = None,
    cancel: Callable[[], bool] | None = None,
    verbosity: int = 0,
) -> Run:
    """Run a playbook of this checkout, or of an installed collection by its name."""
    shutil.rmtree(directory, ignore_errors=True)
    (directory / "project").mkdir(parents=True)
    started = time.monotonic()
    changed: list[str] = []
    failed: list[dict[str, Any]] = []
    trips: collections.Counter[str] = collections.Counter()
    seconds: collections.defaultdict[str, float] = collections.defaultdict(float)
    timeline = Timeline()

    def handle(event: dict[str, Any]) -> bool:
        data = event.get("event_data") or {}
        kind = event["event"]
        timeline.feed(event)
        if kind in ("runner_on_ok", "runner_on_failed", "runner_on_unreachable", "runner_item_on_ok", "runner_item_on_failed"):
            action = str(data.get("task_action", "")).rpartition(".")[2]
            result = data.get("res") or {}
            looped = isinstance(result, dict) and "results" in result and kind in ("runner_on_ok", "runner_on_failed")
            if action not in LOCAL and not looped and not (isinstance(result, dict) and result.get("skipped")):
                trips[data.get("host", "?")] += 2 if action in TWICE else 1
            if kind == "runner_on_ok":
                seconds[str(data.get("task"))] += float(data.get("duration") or 0)
                if has_changed(event):
                    changed.append(f"{data.get('host')}: {data.get('task')}")
            if kind in ("runner_on_failed", "runner_on_unreachable") and not data.get("ignore_errors"):
                failed.append({"host": data.get("host"), "task": data.get("task"), "res": result})
        if on_event is not None:
            on_event(event)
        return True

    # stdout's own colours and the runner's events want a quiet environment of their own
    env = {
        "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"),
        "PATH": f"{ROOT / '.venv' / 'bin'}:{os.environ['PATH']}",
        "ANSIBLE_HOST_KEY_CHECKING": "True",
        **(environment or {}),
    }
    result = ansible_runner.run(
        private_data_dir=str(directory),
        playbook=str(playbook),
        inventory=inventory if isinstance(inventory, (dict, list)) else str(inventory),
        extravars=extravars or {},
        envvars=env,
        cmdline=cmdline or None,
        quiet=quiet,
        event_handler=handle,
        cancel_callback=cancel,
        verbosity=verbosity or None,
        settings={"suppress_env_files": True, "pexpect_timeout": 10},
    )
    stdout = pathlib.Path(result.config.artifact_dir, "stdout")
    return Run(
        rc=int(result.rc if result.rc is not None else -1),
        status=str(result.status),
        seconds=round(time.monotonic() - started, 1),
        stats=dict(result.stats or {}),
        stdout=stdout.read_text(encoding="utf-8", errors="replace") if stdout.exists() else "",
        changed_tasks=changed,
        failed=failed,
        round_trips=dict(trips),
        tasks=dict(seconds),
        timeline=timeline,
    )
