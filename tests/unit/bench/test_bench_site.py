# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The arithmetic of `make bench-site`, without hosts."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
import yaml

if sys.version_info < (3, 11):
    pytest.skip("the benches run on Python 3.11", allow_module_level=True)
pytest.importorskip("ansible_runner")

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "bench"))

import bench_site as bench  # noqa: E402

ROW = bench.Converged(2, 40.0, 3.0, 32.0, {"app-1": 70, "gpu-1": 31}, {}, [{"task": "a", "seconds": 1.0}])


def rows(*changes):
    return [dataclasses.replace(ROW, **change) for change in changes]


def test_the_report():
    found = bench.report({"ours": 130.0, "by_hand": 100.0}, rows({"hosts": 4, "seconds": 50.0, "stat_floor": 42.0}, {}))
    assert found["cold"] == {"ours": 130.0, "by_hand": 100.0, "ratio": 1.3}
    assert [row["hosts"] for row in found["converged"]] == [2, 4]
    assert found["converged"][0] == {"hosts": 2, "seconds": 40.0, "facts_only": 3.0, "stat_floor": 32.0, "ratio": 1.25}
    assert found["per_added_host"] == [{"from": 2, "to": 4, "seconds": 5.0, "stat_floor": 5.0}]
    assert found["round_trips_per_host"] == 70
    assert bench.misses(found) == []


@pytest.mark.parametrize(
    ("cold", "changes", "words"),
    [
        ({"ours": 131.0, "by_hand": 100.0}, [{}], "cold: 1.31 times"),
        ({"ours": 131.0}, [{"seconds": 42.0}], "converged, 2 hosts: 1.31 times"),
        ({}, [{"round_trips": {"app-1": 81, "gpu-1": 2}}], "round trips: 81 on one host"),
        ({}, [{}, {"hosts": 4, "seconds": 51.0, "stat_floor": 42.0}], "growth from 2 to 4 hosts: 5.5 s each, the floor's is 5.0 s"),
    ],
)
def test_goals_that_are_missed(cold, changes, words):
    missed = bench.misses(bench.report(cold, rows(*changes)))
    assert len(missed) == 1 and missed[0].startswith(words), missed


def test_one_host_is_another_deployment_than_two():
    found = bench.report({}, rows({"hosts": 1, "seconds": 10.0, "stat_floor": 9.0}, {}))
    assert bench.misses(found) == []


@pytest.mark.parametrize(("count", "names"), [(1, ["app-1"]), (2, ["gpu-1", "app-1"]), (4, ["gpu-1", "app-1", "app-2", "app-3"])])
def test_the_hosts(count, names):
    data = bench.inventory(count, "192.0.2")["all"]["children"]
    assert list(data["lab"]["hosts"]) == names
    addresses = [host["ansible_host"] for host in data["lab"]["hosts"].values()]
    assert len(set(addresses)) == count
    assert all(data[group]["hosts"] for group in bench.GROUPS)
    assert len(data["fastgpt"]["hosts"]) == max(1, count - 1)


def test_what_a_run_spent():
    tasks = bench.Tasks()
    for kind, action, seconds in (
        ("runner_on_ok", "ansible.builtin.stat", 0.5),
        ("runner_on_ok", "ansible.builtin.stat", 0.25),
        ("runner_on_ok", "ansible.builtin.set_fact", 0.1),
        ("runner_on_skipped", "ansible.builtin.apt", 0.1),
        ("runner_on_start", "ansible.builtin.apt", 0.0),
    ):
        tasks({"event": kind, "event_data": {"host": "app-1", "role": "plan", "task": f"plan : {action}", "task_action": action, "duration": seconds}})
    assert (tasks.modules["app-1"], tasks.local["app-1"], tasks.skipped["app-1"]) == (2, 1, 1)
    assert tasks.slowest() == [{"task": "plan: ansible.builtin.stat", "seconds": 0.75}, {"task": "plan: ansible.builtin.set_fact", "seconds": 0.1}]


def test_the_floor_play(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "WORK", tmp_path)
    (play,) = yaml.safe_load(bench.floor_play({"app-1": 7, "gpu-1": 3}).read_text())
    assert sum("ansible.builtin.stat" in task for task in play["tasks"]) == 7
    (leave,) = (number for number, task in enumerate(play["tasks"]) if "ansible.builtin.meta" in task)
    assert leave == 3 and play["tasks"][leave]["when"] == "inventory_hostname == 'gpu-1'"
