# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""`make bench-modules`: what oneapi_channel costs, beside one uri task per channel. See README.md beside this file."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import pathlib
import shlex
import sys
import tempfile
from collections.abc import Iterable, Iterator
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "lab"), str(ROOT / "tests" / "integration" / "modules"), str(ROOT / "tests" / "support")]

from fixtures_oneapi import ACCESS_TOKEN, OneApi  # noqa: E402
from sflab.runs import run_playbook  # noqa: E402

REPORT = ROOT / ".bench" / "modules.json"
MODULE = ROOT / "bench" / "oneapi_channels.yml"
LOOP = ROOT / "bench" / "oneapi_channels_loop.yml"
TELL = "Tell what was done"  # last task of both
CHANNELS = 1000
LOOPED = 100
CHANGED = 10
SIZES = (100, 1000, 5000)
ROUNDS = 3
MOST_REQUESTS = 3
LEAST_RATIO = 50

Channel = dict[str, Any]


class BenchError(Exception):
    """A run did something else than what was to be measured."""


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one playbook run cost: HTTP requests that the server saw, and seconds of its tasks."""

    requests: int
    seconds: float

    def shown(self) -> dict[str, Any]:
        return {"requests": self.requests, "seconds": round(self.seconds, 3)}


@dataclasses.dataclass(frozen=True)
class Figures:
    loop: Cost  # of LOOPED channels that are there
    loop_fresh: Cost  # of LOOPED channels that are missing
    fresh: Cost
    converged: Cost
    changed: Cost
    purge: Cost
    by_size: dict[int, Cost]


# -- the report --------------------------------------------------------------------------------------------------------


def best(costs: Iterable[Cost]) -> Cost:
    """The quickest; the number of requests must not vary."""
    costs = list(costs)
    if len({cost.requests for cost in costs}) != 1:
        raise BenchError(f"equal runs made different numbers of requests: {[cost.requests for cost in costs]}")
    return min(costs, key=lambda cost: cost.seconds)


def per_1000(loop: Cost) -> float:
    return loop.seconds * 1000 / LOOPED


def report(figures: Figures) -> dict[str, Any]:
    return {
        "loop": {"seconds_per_1000": round(per_1000(figures.loop), 3)},
        "loop_fresh": {"seconds_per_1000": round(per_1000(figures.loop_fresh), 3)},
        "fresh": figures.fresh.shown(),
        "converged": figures.converged.shown(),
        "changed_10": figures.changed.shown(),
        "purge": figures.purge.shown(),
        "converged_by_size": {str(size): cost.shown() for size, cost in sorted(figures.by_size.items())},
        "ratio_converged_vs_loop": round(per_1000(figures.loop) / figures.converged.seconds, 1),
    }


def misses(result: dict[str, Any]) -> list[str]:
    """The goals that were not reached."""
    found = []
    if result["converged"]["requests"] > MOST_REQUESTS:
        found.append(f"a converged run makes {result['converged']['requests']} requests, more than {MOST_REQUESTS}")
    if result["ratio_converged_vs_loop"] < LEAST_RATIO:
        found.append(f"a converged run is {result['ratio_converged_vs_loop']} times as fast as the loop, less than {LEAST_RATIO}")
    # One-API gives all channels in one answer, so the number of pages is 1 for each size.
    by_size = {size: cost["requests"] for size, cost in result["converged_by_size"].items()}
    if len(set(by_size.values())) != 1:
        found.append(f"the requests of a converged run grow with the number of channels: {by_size}")
    seconds = {int(size): float(cost["seconds"]) for size, cost in result["converged_by_size"].items()}
    most = max(seconds)
    if seconds[most] > seconds[CHANNELS] * most / CHANNELS:
        found.append(f"the seconds of a converged run grow faster than the number of channels: {seconds}")
    return found


def write(path: pathlib.Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def show(name: str, channels: int, cost: Cost, remark: str = "") -> None:
    print(f"{name:<14}{channels:>6} channels {cost.requests:>6} requests {cost.seconds:>9.2f} s  {remark}".rstrip(), flush=True)


# -- the runs ----------------------------------------------------------------------------------------------------------


def make_channels(count: int) -> list[Channel]:
    """Distinct keys and 40 models on as many hosts as it takes, like a large site has."""
    channels = []
    for number in range(count):
        host, model = divmod(number, 40)
        name = f"model-{model:02d}@gpu-{host:03d}"
        channels.append(
            {
                "name": name,
                "type": 8,
                "base_url": f"http://gpu-{host:03d}.site.internal:{8000 + model}",
                "key": f"sk-{hashlib.sha256(name.encode()).hexdigest()[:48]}",
                "models": [f"model-{model:02d}"],
                "group": "default",
                "priority": 0,
            }
        )
    return channels


def changed_channels(channels: list[Channel], count: int) -> list[Channel]:
    """The same, of which some, spread over the list, have another base_url."""
    every = len(channels) // count
    return [{**channel, "base_url": channel["base_url"] + "/moved"} if number % every == 0 else channel for number, channel in enumerate(channels)]


class Gateway:
    """One-API with what is needed to run playbooks against it."""

    def __init__(self, directory: pathlib.Path) -> None:
        self.directory = directory
        self.server = OneApi(directory)
        if self.server.real:
            raise BenchError("ONE_API_BINARY is set, but only the stand-in counts its requests. Unset it")

    def run(self, playbook: pathlib.Path, channels: list[Channel], purge: bool = False) -> tuple[Cost, dict[str, int]]:
        """What the run's tasks cost, and what the last of them, which is not counted, says that they did."""
        variables = self.directory / "variables.json"
        values = {"bench_url": self.server.url, "bench_access_token": ACCESS_TOKEN, "bench_channels": channels, "bench_purge": purge}
        variables.write_text(json.dumps(values), encoding="utf-8")
        told: dict[str, int] = {}

        def listen(event: dict[str, Any]) -> None:
            # ansible-runner drops the result of a task that is as long as the module's; this one is short.
            if event["event"] == "runner_on_ok" and event["event_data"]["task"] == TELL:
                told.update({name: int(value) for name, value in event["event_data"]["res"]["msg"].items()})

        self.server.take_requests()
        run = run_playbook(
            playbook,
            {"all": {"hosts": {"localhost": {"ansible_connection": "local", "ansible_python_interpreter": sys.executable}}}},
            self.directory / "runner",
            # Without pipelining each item of the loop would also be copied to a file: leave the plain way its best.
            environment={"ANSIBLE_PIPELINING": "true"},
            cmdline=f"--extra-vars @{shlex.quote(str(variables))}",
            quiet=True,
            on_event=listen,
        )
        if run.rc != 0:
            raise BenchError(f"{playbook.name} fails (rc {run.rc}):\n{run.stdout[-3000:]}")
        return Cost(len(self.server.take_requests()), sum(seconds for task, seconds in run.tasks.items() if task != TELL)), told

    def module(self, channels: list[Channel], purge: bool = False, **expected: int) -> Cost:
        """A run of the module; `expected` is how many channels it must have created, updated and deleted."""
        cost, told = self.run(MODULE, channels, purge)
        wanted = {"created": 0, "updated": 0, "deleted": 0, "requests": cost.requests, **expected}
        if told != wanted:
            raise BenchError(f"the module says that it did {told}; expected {wanted}, with the requests that the server counted")
        return cost

    def loop(self, channels: list[Channel], created: int) -> Cost:
        cost, told = self.run(LOOP, channels)
        if told != {"created": created} or cost.requests != len(channels) + created:
            raise BenchError(f"the loop says that it did {told} with {cost.requests} requests; expected {created} and {len(channels) + created}")
        return cost


@contextlib.contextmanager
def gateway() -> Iterator[Gateway]:
    """A fresh one, without rate limits, which would only measure the waiting."""
    with tempfile.TemporaryDirectory(prefix="bench-modules-") as directory:
        gate = Gateway(pathlib.Path(directory))
        try:
            gate.server.start()
            yield gate
        finally:
            gate.server.stop()


def measure() -> Figures:
    channels = make_channels(max(SIZES))
    few, many = channels[:LOOPED], channels[:CHANNELS]
    remark = f"(best of {ROUNDS})"
    by_size: dict[int, Cost] = {}

    with gateway() as gate:
        fresh = gate.module(many, created=CHANNELS)
        show("fresh", CHANNELS, fresh)
        # In turns, so that whatever else this machine does meets both.
        pairs = [(gate.module(many), gate.loop(few, created=0)) for _round in range(ROUNDS)]
        converged, loop = best(pair[0] for pair in pairs), best(pair[1] for pair in pairs)
        show("converged", CHANNELS, converged, remark)
        changed = gate.module(changed_channels(many, CHANGED), updated=CHANGED)
        show("changed_10", CHANNELS, changed)
        purge = gate.module([], purge=True, deleted=CHANNELS)
        show("purge", CHANNELS, purge)
        by_size[CHANNELS] = converged

    with gateway() as gate:
        loop_fresh = gate.loop(few, created=LOOPED)
        show("loop", LOOPED, loop, f"{remark}, {per_1000(loop):.1f} s per 1000")
        show("loop, fresh", LOOPED, loop_fresh, f"{per_1000(loop_fresh):.1f} s per 1000")
        # That this changes nothing also proves that the loop made what the module makes.
        by_size[LOOPED] = best(gate.module(few) for _round in range(ROUNDS))

    for size in SIZES:
        if size not in by_size:
            with gateway() as gate:
                gate.module(channels[:size], created=size)
                by_size[size] = best(gate.module(channels[:size]) for _round in range(ROUNDS))
        show("converged", size, by_size[size], remark)
    return Figures(loop, loop_fresh, fresh, converged, changed, purge, by_size)


def main() -> int:
    try:
        figures = measure()
    except BenchError as exc:
        print(f"bench-modules: {exc}", file=sys.stderr)
        return 2
    result = report(figures)
    write(REPORT, result)
    print(f"{'ratio':<14}a converged run is {result['ratio_converged_vs_loop']} times as fast as the loop")
    missed = misses(result)
    for miss in missed:
        print(f"{'goal missed':<14}{miss}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
