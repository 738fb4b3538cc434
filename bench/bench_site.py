# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""`make bench-site`: what a run of site.yml costs. See README.md beside this file.

    bench_site.py [--hosts 1,2,4,8,16] [--rounds N] [--no-cold]
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import time
from typing import Any

import yaml

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "lab"))

import demo  # noqa: E402
from sflab.catalogue import DEFAULT_FASTGPT  # noqa: E402
from sflab.runs import LOCAL, Run, run_playbook, vault_environment  # noqa: E402

REPORT = ROOT / ".bench" / "site.json"
WORK = ROOT / ".bench" / "site"
BY_HAND = ROOT / "bench" / "by_hand.sh"
NAME, NET = "benchsite", os.environ.get("BENCH_NET", "172.31.82")
COUNTS = (1, 2, 4, 8, 16)
MOST_COLD_RATIO, MOST_CONVERGED_RATIO, MOST_ROUND_TRIPS, SLOWEST = 1.3, 1.3, 80, 10
GROUPS = ("gpu", "gateway", "mongodb", "pgvector", "fastgpt")


class BenchError(Exception):
    """A run did something else than what was to be measured."""


# -- the hosts ---------------------------------------------------------------------------------------------------------


def topology(count: int) -> dict[str, list[str]]:
    """Groups of so many hosts: one that does everything, or the demo's two, and then more hosts of FastGPT."""
    if count == 1:
        return {group: ["app-1"] for group in GROUPS}
    return {group: ["gpu-1"] if group == "gpu" else ["app-1"] for group in GROUPS} | {"fastgpt": ["app-1", *(f"app-{n}" for n in range(2, count))]}


def octet(host: str) -> int:
    """app-1 and gpu-1 as in the demo, the others after them."""
    return {"app-1": 11, "gpu-1": 12}.get(host) or 18 + int(host.rpartition("-")[2])


def inventory(count: int, net: str) -> dict[str, Any]:
    groups = topology(count)
    names = list(dict.fromkeys(host for hosts in groups.values() for host in hosts))
    shared = yaml.safe_load((ROOT / "inventories" / "lab" / "hosts.yml").read_text(encoding="utf-8"))["all"]["children"]["lab"]["vars"]
    # the lab's home is told, since this file lies elsewhere
    shared |= {"lab_net": net, "lab_home": str(ROOT / ".lab")}
    lab = {"vars": shared, "hosts": {name: {"ansible_host": f"{net}.{octet(name)}", "node_address": f"{net}.{octet(name)}"} for name in names}}
    return {"all": {"children": {"lab": lab, **{group: {"hosts": dict.fromkeys(hosts, {})} for group, hosts in groups.items()}}}}


def write_inventory(count: int, net: str) -> pathlib.Path:
    directory = WORK / f"hosts-{count}"
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "hosts.yml").write_text(yaml.safe_dump(inventory(count, net), sort_keys=False), encoding="utf-8")
    link = directory / "group_vars"
    if not link.is_symlink():
        link.symlink_to(ROOT / "inventories" / "lab" / "group_vars")
    return directory


def raise_hosts(count: int, name: str, net: str) -> None:
    hosts = dict.fromkeys(host for members in topology(count).values() for host in members)
    demo.raise_lab(DEFAULT_FASTGPT, name, net, [f"{host}={'bookworm' if host in topology(count)['gpu'] else 'trixie'}={octet(host)}" for host in hosts])
    demo.make_secrets()


def remove_hosts(name: str) -> None:
    subprocess.run([sys.executable, str(ROOT / "lab" / "lab.py"), "down", "--name", name], check=True, stdout=subprocess.DEVNULL)


# -- runs --------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Tasks:
    """What one run spent on what, by ansible-runner's events."""

    seconds: dict[str, float] = dataclasses.field(default_factory=lambda: collections.defaultdict(float))
    local: dict[str, int] = dataclasses.field(default_factory=lambda: collections.defaultdict(int))
    modules: dict[str, int] = dataclasses.field(default_factory=lambda: collections.defaultdict(int))
    skipped: dict[str, int] = dataclasses.field(default_factory=lambda: collections.defaultdict(int))

    def __call__(self, event: dict[str, Any]) -> None:
        data, kind = event.get("event_data") or {}, event["event"]
        if kind not in ("runner_on_ok", "runner_on_skipped"):
            return
        host = str(data.get("host"))
        if kind == "runner_on_skipped":
            self.skipped[host] += 1
            return
        is_local = str(data.get("task_action", "")).rpartition(".")[2] in LOCAL
        (self.local if is_local else self.modules)[host] += 1
        name = str(data.get("task")).rpartition(" : ")[2]
        self.seconds[f"{data['role']}: {name}" if data.get("role") else name] += float(data.get("duration") or 0)

    def slowest(self) -> list[dict[str, Any]]:
        ranked = sorted(self.seconds.items(), key=lambda item: -item[1])[:SLOWEST]
        return [{"task": name, "seconds": round(seconds, 2)} for name, seconds in ranked]


def play(playbook: pathlib.Path, hosts: pathlib.Path, tasks: Tasks | None = None) -> Run:
    run = run_playbook(playbook, hosts, WORK / "runner", quiet=True, environment=vault_environment(), on_event=tasks)
    if run.rc != 0:
        raise BenchError(f"{playbook.name} failed:\n{run.stdout[-3000:]}")
    return run


def floor_play(round_trips: dict[str, int]) -> pathlib.Path:
    """On each host as many tasks of the cheapest module as site.yml makes round trips there."""
    path = WORK / "floor.yml"
    tasks: list[dict[str, Any]] = []
    for number in range(max(round_trips.values())):
        # decided without a process of its own, so it costs the others nothing
        tasks += [
            {"name": "Leave", "ansible.builtin.meta": "end_host", "when": f"inventory_hostname == '{host}'"}
            for host, trips in round_trips.items()
            if trips == number
        ]
        tasks.append({"name": "Look at a file", "ansible.builtin.stat": {"path": "/etc/hostname", "get_checksum": False}})
    header = {"name": "Floor", "hosts": "all", "strategy": "ansible.builtin.free", "gather_facts": False, "become": True}
    path.write_text(yaml.safe_dump([{**header, "tasks": tasks}], sort_keys=False), encoding="utf-8")
    return path


def facts_play() -> pathlib.Path:
    path = WORK / "facts.yml"
    path.write_text(yaml.safe_dump([{"name": "Facts", "hosts": "all", "gather_facts": True, "become": True, "tasks": []}]), encoding="utf-8")
    return path


@dataclasses.dataclass(frozen=True)
class Converged:
    hosts: int
    seconds: float
    facts_only: float
    stat_floor: float
    round_trips: dict[str, int]
    tasks: dict[str, dict[str, int]]
    slowest: list[dict[str, Any]]


def converged(count: int, hosts: pathlib.Path, rounds: int) -> Converged:
    """The quickest of some rounds, the three plays in turns."""
    times: dict[str, list[float]] = {"site": [], "facts": [], "floor": []}
    best: tuple[Run, Tasks] | None = None
    for _round in range(rounds):
        tasks = Tasks()
        run = play(ROOT / "playbooks" / "site.yml", hosts, tasks)
        if run.total("changed"):
            raise BenchError(f"a converged run changed {run.changed_tasks}")
        if best is None or run.seconds < best[0].seconds:
            best = run, tasks
        times["site"].append(run.seconds)
        times["facts"].append(play(facts_play(), hosts).seconds)
        floor = play(floor_play(run.round_trips), hosts)
        if floor.round_trips != run.round_trips:
            raise BenchError(f"the floor made other round trips than site.yml: {floor.round_trips}, {run.round_trips}")
        times["floor"].append(floor.seconds)
    assert best is not None
    run, tasks = best
    counts = {host: {"modules": tasks.modules[host], "local": tasks.local[host], "skipped": tasks.skipped[host]} for host in run.round_trips}
    return Converged(count, min(times["site"]), min(times["facts"]), min(times["floor"]), run.round_trips, counts, tasks.slowest())


def cold() -> dict[str, float]:
    """The demo's hosts from bare to an answered question, by hand and by site.yml, whose hosts stay."""
    figures: dict[str, float] = {}
    for way in ("by_hand", "ours"):
        remove_hosts(NAME)
        raise_hosts(2, NAME, NET)
        hosts = write_inventory(2, NET)
        if way == "ours":
            figures[way] = play(ROOT / "playbooks" / "site.yml", hosts).seconds
        else:
            started = time.monotonic()
            subprocess.run([str(BY_HAND), NET], check=True)
            figures[way] = round(time.monotonic() - started, 1)
    return figures


# -- the report --------------------------------------------------------------------------------------------------------


def per_added_host(rows: list[Converged]) -> list[dict[str, Any]]:
    """Between neighbouring sizes, since the first hosts do other things than the later ones."""
    return [
        {
            "from": smaller.hosts,
            "to": larger.hosts,
            "seconds": round((larger.seconds - smaller.seconds) / (larger.hosts - smaller.hosts), 2),
            "stat_floor": round((larger.stat_floor - smaller.stat_floor) / (larger.hosts - smaller.hosts), 2),
        }
        for smaller, larger in zip(rows, rows[1:], strict=False)
    ]


def report(cold_figures: dict[str, float], rows: list[Converged]) -> dict[str, Any]:
    rows = sorted(rows, key=lambda row: row.hosts)
    found: dict[str, Any] = {"cold": dict(cold_figures)}
    if {"ours", "by_hand"} <= cold_figures.keys():
        found["cold"]["ratio"] = round(cold_figures["ours"] / cold_figures["by_hand"], 2)
    found["converged"] = [
        {
            "hosts": row.hosts,
            "seconds": row.seconds,
            "facts_only": row.facts_only,
            "stat_floor": row.stat_floor,
            "ratio": round(row.seconds / row.stat_floor, 2),
        }
        for row in rows
    ]
    found["per_added_host"] = per_added_host(rows)
    found["round_trips_per_host"] = max((trips for row in rows for trips in row.round_trips.values()), default=0)
    found["round_trips"] = {str(row.hosts): row.round_trips for row in rows}
    found["tasks"] = {str(row.hosts): row.tasks for row in rows}
    found["slowest"] = {str(row.hosts): row.slowest for row in rows}
    return found


def misses(found: dict[str, Any]) -> list[str]:
    """The goals that were not reached."""
    missed = []
    if found["cold"].get("ratio", 0) > MOST_COLD_RATIO:
        missed.append(f"cold: {found['cold']['ratio']} times the plain script, the goal is {MOST_COLD_RATIO}")
    for row in found["converged"]:
        if row["ratio"] > MOST_CONVERGED_RATIO:
            missed.append(f"converged, {row['hosts']} hosts: {row['ratio']} times the floor, the goal is {MOST_CONVERGED_RATIO}")
    if found["round_trips_per_host"] > MOST_ROUND_TRIPS:
        missed.append(f"round trips: {found['round_trips_per_host']} on one host, the goal is {MOST_ROUND_TRIPS}")
    missed += [
        f"growth from {step['from']} to {step['to']} hosts: {step['seconds']} s each, the floor's is {step['stat_floor']} s"
        for step in found["per_added_host"]
        if step["from"] > 1 and step["seconds"] > step["stat_floor"]
    ]
    return missed


def show(found: dict[str, Any]) -> None:
    for way, figure in found["cold"].items():
        print(f"cold, {way}: {figure}")
    print("hosts  seconds  facts only  stat floor  ratio")
    for row in found["converged"]:
        print(f"{row['hosts']:5}  {row['seconds']:7.1f}  {row['facts_only']:10.1f}  {row['stat_floor']:10.1f}  {row['ratio']:5.2f}")
    for step in found["per_added_host"]:
        print(f"each host from {step['from']} to {step['to']}: {step['seconds']} s, floor {step['stat_floor']} s")
    for count, hosts in found["round_trips"].items():
        print(f"round trips, {count} hosts: {', '.join(f'{host} {trips}' for host, trips in hosts.items())}")
    for entry in next(iter(reversed(found["slowest"].values())), []):
        print(f"{entry['seconds']:6.2f} s  {entry['task']}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", default=",".join(map(str, COUNTS)))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--no-cold", action="store_true")
    arguments = parser.parse_args()
    counts = sorted({int(word) for word in arguments.hosts.split(",") if word})
    WORK.mkdir(parents=True, exist_ok=True)
    rows: list[Converged] = []
    try:
        figures = {} if arguments.no_cold else cold()
        # one host does everything, so it is another deployment than the others, which grow
        if 1 in counts:
            remove_hosts(NAME)
        for count in counts:
            raise_hosts(count, NAME, NET)
            hosts = write_inventory(count, NET)
            play(ROOT / "playbooks" / "site.yml", hosts)
            rows.append(converged(count, hosts, arguments.rounds))
            print(f"{count} hosts: {rows[-1].seconds} s, floor {rows[-1].stat_floor} s", flush=True)
            REPORT.write_text(json.dumps(report(figures, rows), indent=2) + "\n", encoding="utf-8")
            if count == 1:
                remove_hosts(NAME)
    except (BenchError, subprocess.CalledProcessError) as exc:
        print(exc, file=sys.stderr)
        return 2
    finally:
        remove_hosts(NAME)
    found = report(figures, rows)
    show(found)
    missed = misses(found)
    for line in missed:
        print(f"MISSED  {line}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
