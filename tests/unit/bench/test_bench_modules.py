# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The report of `make bench-modules`, without a server."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

if sys.version_info < (3, 11):
    pytest.skip("the benches run on Python 3.11", allow_module_level=True)
pytest.importorskip("ansible_runner")

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "bench"))

import bench_modules as bench  # noqa: E402
from bench_modules import Cost  # noqa: E402

FIGURES = bench.Figures(
    loop=Cost(100, 40.0),
    loop_fresh=Cost(200, 90.0),
    fresh=Cost(1004, 3.25),
    converged=Cost(3, 1.25),
    changed=Cost(14, 1.5),
    purge=Cost(1003, 2.0),
    by_size={5000: Cost(3, 3.0), 1000: Cost(3, 1.25), 100: Cost(3, 0.75)},
)


def report(**changes):
    return bench.report(bench.dataclasses.replace(FIGURES, **changes))


def test_shape_of_the_file(tmp_path):
    path = tmp_path / ".bench" / "modules.json"
    bench.write(path, bench.report(FIGURES))
    assert json.loads(path.read_text()) == {
        "loop": {"seconds_per_1000": 400.0},
        "loop_fresh": {"seconds_per_1000": 900.0},
        "fresh": {"requests": 1004, "seconds": 3.25},
        "converged": {"requests": 3, "seconds": 1.25},
        "changed_10": {"requests": 14, "seconds": 1.5},
        "purge": {"requests": 1003, "seconds": 2.0},
        "converged_by_size": {
            "100": {"requests": 3, "seconds": 0.75},
            "1000": {"requests": 3, "seconds": 1.25},
            "5000": {"requests": 3, "seconds": 3.0},
        },
        "ratio_converged_vs_loop": 320.0,
    }


def test_goals_that_are_reached():
    assert bench.misses(report()) == []
    assert bench.misses(report(converged=Cost(3, 8.0))) == []


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"converged": Cost(4, 1.25)}, "makes 4 requests, more than 3"),
        ({"converged": Cost(3, 8.1)}, "49.4 times as fast as the loop, less than 50"),
        ({"by_size": {**FIGURES.by_size, 5000: Cost(503, 3.0)}}, "requests of a converged run grow"),
        ({"by_size": {**FIGURES.by_size, 5000: Cost(3, 6.3)}}, "seconds of a converged run grow"),
    ],
)
def test_goals_that_are_missed(changes, words):
    [miss] = bench.misses(report(**changes))
    assert words in miss


def test_best_is_the_quickest_and_refuses_runs_that_differ():
    assert bench.best([Cost(3, 2.0), Cost(3, 1.0), Cost(3, 3.0)]) == Cost(3, 1.0)
    with pytest.raises(bench.BenchError, match=r"\[3, 4\]"):
        bench.best([Cost(3, 2.0), Cost(4, 1.0)])


def test_channels_are_distinct_and_ours_to_purge():
    channels = bench.make_channels(1000)
    for field in ("name", "base_url", "key"):
        assert len({channel[field] for channel in channels}) == 1000
    assert all("@" in channel["name"] for channel in channels)
    changed = bench.changed_channels(channels, 10)
    assert sum(before != after for before, after in zip(channels, changed)) == 10
