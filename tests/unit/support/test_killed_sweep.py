# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What `make killed-runs` counts as covered, without hosts."""

from __future__ import annotations

import random
import sys
import time
from pathlib import Path

import pytest

if sys.version_info < (3, 11):
    pytest.skip("the harness runs on Python 3.11", allow_module_level=True)
pytest.importorskip("ansible_runner")

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "lab"))

import killed_sweep  # noqa: E402
from killed_sweep import Coverage, Killer, looked_only  # noqa: E402


class AtOnce(random.Random):
    def random(self):
        return 0.0


def ended(task, changed=False, kind="runner_on_ok", host="app-1"):
    return {"event": kind, "event_data": {"host": host, "role": "mongodb", "task": f"mongodb : {task}", "res": {"changed": changed}}}


def follow(coverage, *events, armed=True, kill=lambda: 1):
    killer = Killer(coverage, AtOnce(1), armed, kill)
    for event in events:
        killer(event)
        time.sleep(0.05)
    return killer


def test_the_first_change_that_no_run_died_after_ends_this_one():
    coverage = Coverage()
    killer = follow(coverage, ended("look"), ended("write", True), ended("start", True))
    assert killer.after == "mongodb: write"
    assert coverage.killed_after == {"mongodb: write"}
    # what came after the kill was decided is not known to have run in this state
    assert coverage.seen == {"mongodb: look", "mongodb: write"}
    killer = follow(coverage, ended("write", True), ended("start", True))
    assert killer.after == "mongodb: start"


def test_a_change_whose_result_is_censored_is_seen_by_its_line():
    coverage = Coverage()
    event = ended("write a secret")
    event["event_data"]["res"] = {"censored": "the output has been hidden"}
    assert follow(coverage, event).after is None
    event["stdout"] = "\x1b[0;33mchanged: [app-1]\x1b[0m"
    assert follow(coverage, event).after == "mongodb: write a secret"


def test_what_runs_meanwhile_is_recorded():
    coverage = Coverage()
    follow(coverage, ended("pull", kind="runner_on_start", host="gpu-1"), ended("write", True))
    assert coverage.killed_within == {"mongodb: pull"}


def test_a_run_that_was_quicker_counts_for_nothing():
    coverage = Coverage()
    assert follow(coverage, ended("write", True), kill=lambda: 0).after is None
    assert coverage.killed_after == set()
    assert follow(coverage, ended("write", True), armed=False).after is None
    assert follow(coverage, ended("look", kind="runner_on_skipped")).after is None
    assert coverage.seen == {"mongodb: write"}


class Late(random.Random):
    def random(self):
        return 0.9

    def uniform(self, a, b):
        return max(a, b)


def test_a_kill_that_is_still_to_come_does_not_hit_the_next_run():
    kills = []
    killer = Killer(coverage := Coverage(), Late(1), True, lambda: kills.append(1) or 1)
    killer(ended("write", True))
    assert killer.after == "mongodb: write"
    killer.let_go()
    time.sleep(2.2)
    assert (kills, killer.after, coverage.killed_after) == ([], None, set())
    killer = follow(Coverage(), ended("write", True))
    killer.let_go()
    assert killer.after == "mongodb: write"


def test_tasks_that_only_look_share_the_state_before_them():
    coverage = Coverage(seen={"a", "write", "b", "start", "c"}, changing={"write", "start"}, killed_after={"write"})
    looked_only(coverage, ["a", "write", "b", "start", "c"])
    assert coverage.covered == {"a", "write", "b"}
    assert coverage.report()["missing"] == ["c", "start"]


def test_coverage_adds_up_in_the_file(tmp_path):
    path = tmp_path / "bench" / "killed.json"
    coverage = Coverage(seen={"a", "b"}, changing={"a"}, killed_after={"a"}, rounds=[{"seed": 1, "kills": 1, "seconds": 9.5, "verified": True, "faults": []}])
    coverage.save(path)
    again = Coverage.load(path)
    assert again == coverage
    assert Coverage.load(tmp_path / "none") == Coverage()
    text = killed_sweep.document(again.report())
    assert "got SIGKILL 1 times in 1 deployments" in text and "* b" in text and "| 1 | 1 | 1 | 10 | yes |" in text
