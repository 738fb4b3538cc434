# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""`make killed-runs`: kill site.yml after each of its tasks in turn, and see that what follows makes everything right.

One cold deployment is killed again and again: as soon as a task ends that no run has died after yet, ansible-playbook and all its workers get
SIGKILL, either at once or in the middle of what comes next, and the next run goes on from there. In the end site.yml runs through, verify.yml
included, a further run must change nothing, and the hosts are searched for what a crash leaves: temporary files, foreign or unhealthy
containers, channels that stand twice.

Only a task that changes something makes a new state of the hosts. A kill after it therefore counts for the tasks that only looked or reckoned
since, which the report tells apart. The runs are those of the single roles (--tags), so that not each of them has to go through everything.

What is covered adds up in .bench/killed_runs.json; docs/killed-runs.md is written from it.

    killed_sweep.py [--kills N] [--minutes N] [--seed N] [--keep] [--go-on]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import random
import subprocess
import sys
import threading
import time
from typing import Any

os.environ.setdefault("LAB_NAME", "killed")
os.environ.setdefault("LAB_NET", "172.31.79")

import lab_hosts  # noqa: E402 - it reads the names above
from killed_runs import kill_playbook  # noqa: E402
from lab_hosts import DEFAULT_FASTGPT, DEFAULT_HOSTS, NAME, NET, ROOT, SSH, run_playbook, vault, vault_environment  # noqa: E402
from sflab.runs import has_changed  # noqa: E402

REPORT = ROOT / ".bench" / "killed_runs.json"
DOCUMENT = ROOT / "docs" / "killed-runs.md"
# Tags in the order of the deployment, none for a whole run, and the most kills in each: with the first, only the data directory is new.
STAGES: tuple[tuple[str, int], ...] = (
    ("services", 1), ("container_engine", 1000), ("model_server", 1000), ("mongodb", 1000), ("pgvector", 1000), ("oneapi", 1000), ("fastgpt", 1000), ("", 1000),
)  # fmt: skip
HOSTS = {"app-1": f"{NET}.11", "gpu-1": f"{NET}.12"}
DONE = ("runner_on_ok", "runner_on_failed", "runner_item_on_ok")
PLACES = "/etc/selfhosted-fastgpt /var/lib/selfhosted-fastgpt /opt/selfhosted-fastgpt /etc/nginx /etc/docker /etc/systemd/system"
LEFT = ("( -name .ansible_tmp* -o -name *.ansible_tmp* -o -name *.new -o -name *.part -o -name *.tmp -o -name .*.swp )").replace("(", r"\(").replace(
    ")", r"\)"
).replace("*", r"\*")  # fmt: skip


@dataclasses.dataclass
class Coverage:
    """Which tasks have been seen to run, which of them changed something, and after which a run was killed."""

    seen: set[str] = dataclasses.field(default_factory=set)
    changing: set[str] = dataclasses.field(default_factory=set)
    killed_after: set[str] = dataclasses.field(default_factory=set)
    same_state: set[str] = dataclasses.field(default_factory=set)
    killed_within: set[str] = dataclasses.field(default_factory=set)
    rounds: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    @classmethod
    def load(cls, path: pathlib.Path) -> Coverage:
        if not path.exists():
            return cls()
        data = json.loads(path.read_text(encoding="utf-8"))
        names = {field.name for field in dataclasses.fields(cls)} - {"rounds"}
        return cls(**{name: set(data["names"][name]) for name in names}, rounds=data["rounds"])

    @property
    def covered(self) -> set[str]:
        return (self.killed_after | self.same_state) & self.seen

    def report(self) -> dict[str, Any]:
        return {
            "tasks": len(self.seen),
            "changing": len(self.changing),
            "covered": len(self.covered),
            "killed_after_changing": len(self.killed_after & self.changing),
            "killed_within": len(self.killed_within),
            "missing": sorted(self.seen - self.covered),
            "rounds": self.rounds,
            "names": {
                field.name: sorted(getattr(self, field.name)) for field in dataclasses.fields(self) if field.name != "rounds"
            },
        }  # fmt: skip

    def save(self, path: pathlib.Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.report(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def task_name(data: dict[str, Any]) -> str:
    """A task as the report names it."""
    name = str(data.get("task") or "").rpartition(" : ")[2]
    return f"{data['role']}: {name}" if data.get("role") else name


class Killer:
    """Follows the events of one run and ends it after the first task that changes something and has not been killed after."""

    def __init__(self, coverage: Coverage, chance: random.Random, armed: bool, kill: Any = kill_playbook) -> None:
        self.coverage, self.chance, self.armed, self.kill = coverage, chance, armed, kill
        # host: tasks that have ended since its last change, and the one that runs
        self.since: dict[str, list[str]] = {}
        self.running: dict[str, str] = {}
        self.after: str | None = None
        self.timer: threading.Timer | None = None
        self.killed = False
        self.at = 0.0
        self.lock = threading.Lock()

    def __call__(self, event: dict[str, Any]) -> None:
        data = event.get("event_data") or {}
        host = data.get("host")
        if not host or not data.get("task"):
            return
        with self.lock:
            if event["event"] == "runner_on_start":
                self.running[host] = task_name(data)
            elif event["event"] in ("runner_on_ok", "runner_on_skipped", "runner_on_failed", "runner_on_unreachable"):
                self.ended(host, event)

    def ended(self, host: str, event: dict[str, Any]) -> None:
        data, kind = event["event_data"], event["event"]
        name = task_name(data)
        self.running.pop(host, None)
        if kind == "runner_on_skipped" or self.after is not None:
            return
        changed = kind == "runner_on_ok" and has_changed(event)
        self.coverage.seen.add(name)
        if not changed:
            self.since.setdefault(host, []).append(name)
            return
        self.coverage.changing.add(name)
        self.since[host] = []
        if self.armed and name not in self.coverage.killed_after:
            self.after = name
            # half of them at once, half in the middle of whatever comes next
            delay = 0.0 if self.chance.random() < 0.5 else self.chance.uniform(0.05, 2.0)
            self.timer = threading.Timer(delay, self.end, args=(delay,))
            self.timer.start()

    def let_go(self) -> None:
        """The run has ended by itself: a kill that is still to come would hit the next one."""
        if self.timer:
            self.timer.cancel()
            self.timer.join()
        if not self.killed:
            self.after = None

    def end(self, delay: float) -> None:
        """Kill, and record what it counts for."""
        with self.lock:
            assert self.after is not None
            if not self.kill():
                # the run was quicker
                self.after = None
                return
            self.killed = True
            self.coverage.killed_after.add(self.after)
            self.coverage.killed_within |= set(self.running.values())
            self.at = delay


def looked_only(coverage: Coverage, order: list[str]) -> None:
    """Tasks that never change anything share the state of the last change before them, in any run; those before the first one share the bare host's."""
    last: str | None = None
    for name in order:
        if name in coverage.changing:
            last = name
        elif last is None or last in coverage.killed_after:
            coverage.same_state.add(name)


class Order:
    """The order in which a host went through its tasks."""

    def __init__(self) -> None:
        self.hosts: dict[str, list[str]] = {}

    def __call__(self, event: dict[str, Any]) -> None:
        data = event.get("event_data") or {}
        if event["event"] in ("runner_on_ok", "runner_on_failed") and data.get("host") and data.get("task"):
            self.hosts.setdefault(data["host"], []).append(task_name(data))


def play(name: str, directory: str, cmdline: str, on_event: Any = None) -> Any:
    return run_playbook(
        ROOT / "playbooks" / name, ROOT / "inventories" / "lab", ROOT / ".lab" / NAME / directory, quiet=True, cmdline=cmdline, on_event=on_event,
        environment={**vault_environment(), "LAB_NET": NET},
    )  # fmt: skip


def on_host(ip: str, command: str) -> str:
    return subprocess.run([*SSH, f"ops@{ip}", command], check=True, capture_output=True, text=True).stdout


def remains() -> list[str]:
    """What a crash must not leave on the hosts."""
    found = []
    for host, ip in HOSTS.items():
        for line in on_host(ip, f"sudo find {PLACES} {LEFT} 2>/dev/null || true").splitlines():
            found.append(f"{host}: temporary file {line}")
        containers = "sudo docker ps -a --format '{{.Names}}|{{.State}}|{{.Status}}|{{.Label \"selfhosted.fastgpt.role\"}}' 2>/dev/null || true"
        for line in on_host(ip, containers).splitlines():
            name, state, status, role = line.split("|")
            if not role or state != "running" or "unhealthy" in status:
                found.append(f"{host}: container {name} is {state} ({status}), role {role or 'none'}")
    token = vault()["oneapi_root_access_token"]
    answer = on_host(HOSTS["app-1"], f"curl -sf -H 'Authorization: {token}' 'http://127.0.0.1:18000/api/channel/search?keyword='")
    names = [channel["name"] for channel in json.loads(answer)["data"]]
    found += [f"channel {name} stands {names.count(name)} times" for name in sorted(set(names)) if names.count(name) > 1]
    if len(names) != 2:
        found.append(f"One-API has the channels {names}, not one for each of the two models")
    return found


def sweep(kills: int, seed: int, minutes: float) -> int:
    coverage, chance = Coverage.load(REPORT), random.Random(seed)
    started, killed, faults = time.monotonic(), 0, []
    order = Order()
    for stage, most in STAGES:
        here = 0
        while True:
            armed = here < most and killed < kills and time.monotonic() - started < minutes * 60
            if here == most and stage:
                break
            killer = Killer(coverage, chance, armed)

            def follow(event: dict[str, Any], killer: Killer = killer) -> None:
                killer(event)
                order(event)

            run = play("site.yml", "sweep", f"--tags {stage}" if stage else "--skip-tags verify", follow)
            killer.let_go()
            if killer.after is None or run.rc == 0:
                break
            killed, here = killed + 1, here + 1
            print(f"kill {killed}: {run.seconds:5.1f} s, {killer.at:.2f} s after {killer.after!r}", flush=True)
            for names in order.hosts.values():
                looked_only(coverage, names)
            coverage.save(REPORT)
        if run.rc != 0 and here < most:
            print(run.stdout[-6000:])
            faults.append(f"the run of {stage or 'everything'} failed after {killed} kills")
            break
    if not faults:
        again = play("site.yml", "sweep-again", "", order)
        if again.rc != 0:
            print(again.stdout[-6000:])
            faults.append("site.yml with its verification failed")
        if again.changed_tasks:
            faults.append(f"a further run changed {again.changed_tasks}")
        faults += remains()
    for names in order.hosts.values():
        looked_only(coverage, names)
        coverage.seen |= set(names)
    coverage.rounds.append(
        {"seed": seed, "kills": killed, "seconds": round(time.monotonic() - started, 1), "verified": not faults, "faults": faults}
    )  # fmt: skip
    coverage.save(REPORT)
    DOCUMENT.write_text(document(coverage.report()), encoding="utf-8")
    report = coverage.report()
    print(f"{killed} kills, {report['covered']} of {report['tasks']} tasks covered, {len(report['missing'])} missing, faults: {faults or 'none'}")
    return 1 if faults else 0


def document(report: dict[str, Any]) -> str:
    """docs/killed-runs.md"""
    kills = sum(entry["kills"] for entry in report["rounds"])
    good = sum(entry["verified"] for entry in report["rounds"])
    missing = "\n".join(f"* {name}" for name in report["missing"]) or "none"
    rows = "\n".join(
        f"| {number} | {entry['seed']} | {entry['kills']} | {entry['seconds']:.0f} | {'yes' if entry['verified'] else '; '.join(entry['faults'])} |"
        for number, entry in enumerate(report["rounds"], 1)
    )
    return f"""# Killed runs

Written by `make killed-runs` from what it measured; do not edit.

`ansible-playbook` and its workers got SIGKILL {kills} times in {len(report["rounds"])} deployments of the demo's hosts, {good} of which ended
converged, verified, and with nothing left behind. Each of {report["tasks"]} tasks that ran was covered except those below: {report["covered"]}.
{report["changing"]} of them change something at some time, and a run was killed right after {report["killed_after_changing"]} of these. The others only
look or reckon, so they leave the hosts as the change before them did. {report["killed_within"]} different tasks were in the middle of their work on some
host when their run died.

| deployment | seed | kills | seconds | converged, verified, nothing left behind |
|---|---|---|---|---|
{rows}

## Tasks that no kill has covered

{missing}
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=int(os.environ.get("KILLS") or 1000), help="at most so many, then the run goes to its end")
    parser.add_argument("--seed", type=int, default=int(os.environ.get("SEED") or time.time_ns() % 100000))
    parser.add_argument("--minutes", type=float, default=float(os.environ.get("MINUTES") or 1000), help="after these, too")
    parser.add_argument("--keep", action="store_true", help="keep the hosts afterwards")
    parser.add_argument("--go-on", action="store_true", help="take the hosts that stand, as an earlier run with --keep left them")
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}", flush=True)
    if not arguments.go_on:
        subprocess.run([sys.executable, str(ROOT / "lab" / "lab.py"), "down", "--name", NAME], check=True)
    lab_hosts.demo.raise_lab(DEFAULT_FASTGPT, NAME, NET, DEFAULT_HOSTS)
    lab_hosts.demo.make_secrets()
    try:
        return sweep(arguments.kills, arguments.seed, arguments.minutes)
    finally:
        if not arguments.keep:
            subprocess.run([sys.executable, str(ROOT / "lab" / "lab.py"), "down", "--name", NAME], check=True)


if __name__ == "__main__":
    sys.exit(main())
