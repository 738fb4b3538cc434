# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Kill site.yml in the middle of five tasks, each run continuing from where the last one died.

The runs are as verbose as -vvv, and the processes of the hosts are watched meanwhile: no secret may show in either. They are about the demo's hosts;
converge.yml then goes on with all hosts of the scenario, as an inventory grows.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import signal
import sys
import threading
import time
from typing import Any

from lab_hosts import INVENTORY, site, vault

# A task, and how long after its start the run dies.
POINTS = (
    ("Let Docker run what is written", 0.3),
    ("Wait for engines and weights", 2.0),
    ("Run the container mongodb", 4.0),
    ("Make the channels what they should be", 0.2),
    ("Run the container fastgpt", 1.5),
)


def descendants(pid: int) -> list[int]:
    """All processes below one, the deepest last."""
    parents: dict[int, list[int]] = {}
    for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        parents.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found, todo = [], [pid]
    while todo:
        children = parents.get(todo.pop(), [])
        found += children
        todo += children
    return found


def kill_playbook() -> int:
    """SIGKILL ansible-playbook and its workers, as a crash of the controller would; says how many there were."""
    killed = 0
    for pid in descendants(os.getpid()):
        try:
            name = pathlib.Path(f"/proc/{pid}/cmdline").read_bytes()
            if b"ansible-playbook" in name:
                os.kill(pid, signal.SIGKILL)
                killed += 1
        except OSError:
            continue
    return killed


class Watch:
    """The command lines of the hosts' processes, taken all the time: hosts are containers, so theirs are among those of this machine."""

    def __enter__(self) -> Watch:
        self.lines: set[str] = set()
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.look, daemon=True)
        self.thread.start()
        return self

    def look(self) -> None:
        ours = os.readlink("/proc/self/ns/pid")
        while not self.over.wait(0.3):
            for entry in os.scandir("/proc"):
                if entry.name.isdigit():
                    try:
                        if os.readlink(f"/proc/{entry.name}/ns/pid") != ours:
                            with open(f"/proc/{entry.name}/cmdline", "rb") as file:  # noqa: PTH123 - hundreds of them, all the time
                                self.lines.add(file.read().replace(b"\0", b" ").decode(errors="replace"))
                    except OSError:
                        continue

    def __exit__(self, *_: Any) -> None:
        self.over.set()
        self.thread.join()


def leaks(text: str, secrets: dict[str, str]) -> list[str]:
    """Names of the secrets in a text, and of keys that derive from them."""
    found = [name for name, value in secrets.items() if value in text]
    return found + (["a key sk-..."] if re.search(r"sk-[0-9A-Za-z]{40,}", text) else [])


def killed_run(number: int, task: str, delay: float, verbosity: int) -> str:
    """One run that dies in a task; gives what it printed."""
    seen = threading.Event()

    def on_event(event: dict[str, Any]) -> None:
        data = event.get("event_data") or {}
        if event["event"] == "runner_on_start" and str(data.get("task", "")).endswith(task) and not seen.is_set():
            seen.set()
            threading.Timer(delay, kill_playbook).start()

    run = site(f"killed-{number}", on_event=on_event, verbosity=verbosity, cmdline="--skip-tags verify", inventory=INVENTORY[:1])
    if not seen.is_set():
        print(run.stdout[-5000:])
        sys.exit(f"kill point {number}: the run ended with {run.rc} and never came to the task {task!r}")
    if run.rc == 0:
        sys.exit(f"kill point {number}: the run was not killed in {task!r}")
    print(f"killed {number}: {delay} s into {task!r}, after {run.seconds} s, {len(run.changed_tasks)} tasks had changed something", flush=True)
    return run.stdout


def main() -> None:
    secrets, started = vault(), time.monotonic()
    printed = ""
    with Watch() as watch:
        for number, (task, delay) in enumerate(POINTS, 1):
            printed += killed_run(number, task, delay, 3)
    if not any(line.startswith("mongod ") for line in watch.lines):
        sys.exit("the processes of the hosts were not seen")
    shown = leaks(printed, secrets)
    if shown:
        sys.exit(f"the output of -vvv shows {', '.join(shown)}")
    shown = leaks("".join(watch.lines), secrets)
    if shown:
        sys.exit(f"the process list of a host shows {', '.join(shown)}")
    report = {"killed": len(POINTS), "seconds": round(time.monotonic() - started, 1), "process_lines": len(watch.lines), "output_bytes": len(printed)}
    (pathlib.Path(os.environ["MOLECULE_EPHEMERAL_DIRECTORY"]) / "killed-runs.json").write_text(json.dumps(report), encoding="utf-8")
    print(report)


if __name__ == "__main__":
    main()
