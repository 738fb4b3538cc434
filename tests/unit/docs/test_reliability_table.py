# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""docs/reliability.md says what the recorded run measured, and nothing that it did not."""

from __future__ import annotations

import copy
import importlib.util
import json
import pathlib
import typing as t

import pytest
from test_traps import ROOT

PAGE, FIGURES = ROOT / "docs" / "reliability.md", ROOT / "docs" / "reliability.json"


@pytest.fixture
def generator() -> t.Any:
    spec = importlib.util.spec_from_file_location("reliability_table", ROOT / "docs" / "reliability_table.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SAMPLE: dict[str, t.Any] = {
    "where": {"date": "2026-01-02", "cores": 2, "memory_gb": 24, "kernel": "6.1", "hosts": 9, "stand_ins": ["docker.io/x:1"]},
    "steps": {"planned": {"grow": "it grows"}, "faults": {"kill": "it dies", "stop": "it stops", "reboot-a": "a is rebooted"}},
    "runs": {
        "cold": {
            "seconds": 100.5, "picture": ["a mongodb  ####"],
            "plays": {"services": {"sum": 120, "longest": 90, "wall": 95.5}, "short": {"sum": 2, "longest": 2, "wall": 4.9}},
        },
        "again": {"seconds": 50, "round_trips": {"a": 70, "b": 12}, "changed": 0},
    },
    "planned": {"grow": {"title": "it grows", "asked": 200, "failed": 0, "slowest_seconds": 2.5, "seconds": 120, "changed": 33}},
    "faults": {
        "kill": {
            "title": "it dies", "victim": "a", "mended_by": "itself", "held_seconds": 5, "asked": 50, "failed": 2, "other_door": 0, "slowest_seconds": 9.1,
            "answers_seconds": 4.2, "whole_seconds": 12, "run_changed": [], "faults": {"HTTP 500: a | b": 2},
        },
        "stop": {
            "title": "it stops", "victim": "b", "mended_by": "site.yml", "held_seconds": 20, "asked": 70, "failed": 0, "other_door": 0, "slowest_seconds": 2,
            "answers_seconds": 0, "whole_seconds": 80, "run_changed": ["b: Run the container one-api"], "faults": {},
        },
        "reboot-a": {
            "title": "a is rebooted", "victim": "a", "mended_by": "itself", "held_seconds": 0, "asked": 40, "failed": 0, "other_door": 7, "slowest_seconds": 3,
            "answers_seconds": 0, "whole_seconds": 21.5, "run_seconds": 51, "run_changed": [], "faults": {},
        },
    },
}  # fmt: skip


def test_every_figure_is_in_its_row(generator: t.Any) -> None:
    text = generator.section(SAMPLE)
    assert "| it grows | 200 | 0 | 2.5 | 120 | 33 |" in text
    assert "| it dies (a) | itself | 50 | 2 | 4.2 | 12 | 9.1 | nothing |" in text
    assert "| it stops (b) | site.yml, after 20 s | 70 | 0 | 0 | 80 | 2 | b: Run the container one-api |" in text
    assert "| a | 40 | 0 | 7 | 0 | 21.5 | 3 |" in text and "after all of them took 51 s and changed nothing" in text
    assert "* 2 × HTTP 500: a / b" in text  # no cell of a table
    assert "took 100.5 s" in text and "| services | 120 | 90 | 95.5 |" in text and "| short |" not in text
    assert "```text\na mongodb  ####\n```" in text
    assert "at most 70 module round trips on a host, and changed nothing" in text
    assert "`docker.io/x:1`" in text


def test_steps_without_figures_are_named(generator: t.Any) -> None:
    assert "Not measured" not in generator.section(SAMPLE)
    cut = copy.deepcopy(SAMPLE)
    cut["steps"]["planned"]["shrink"] = "it shrinks"
    del cut["faults"]["stop"]
    assert "did not come to its end. Not measured: it shrinks; it stops." in generator.section(cut)


def test_what_is_written_by_hand_stays(generator: t.Any) -> None:
    text = f"# Mine\n\n{generator.BEGIN}\nold\n{generator.END}\n\nand mine\n"
    page = generator.page(text, SAMPLE)
    assert page.startswith(f"# Mine\n\n{generator.BEGIN}\n") and page.endswith(f"{generator.END}\n\nand mine\n") and "old" not in page
    assert generator.page(page, SAMPLE) == page


def test_a_record_with_a_hole_is_refused(generator: t.Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert generator.incomplete(SAMPLE) == []
    hole = copy.deepcopy(SAMPLE)
    del hole["faults"]["kill"]["failed"], hole["runs"]
    hole["planned"]["grow"]["failed"] = 201
    assert generator.incomplete(hole) == ["runs: missing", "planned.grow: more questions failed than were asked", "faults.kill.failed: missing"]
    record, figures = tmp_path / "record.json", tmp_path / "reliability.json"
    record.write_text(json.dumps(hole), encoding="utf-8")
    monkeypatch.setattr(generator, "FIGURES", figures)
    monkeypatch.setattr("sys.argv", ["reliability_table.py", "--record", str(record)])
    assert generator.main() == 1 and "faults.kill.failed" in capsys.readouterr().out and not figures.exists()


def test_a_page_that_was_changed_by_hand_is_found(generator: t.Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page, figures = tmp_path / "reliability.md", tmp_path / "reliability.json"
    page.write_text(f"# Mine\n\n{generator.BEGIN}\n{generator.END}\n", encoding="utf-8")
    figures.write_text(json.dumps(SAMPLE), encoding="utf-8")
    monkeypatch.setattr(generator, "PAGE", page)
    monkeypatch.setattr(generator, "FIGURES", figures)
    monkeypatch.setattr("sys.argv", ["reliability_table.py"])
    assert generator.main() == 0
    monkeypatch.setattr("sys.argv", ["reliability_table.py", "--check"])
    assert generator.main() == 0
    page.write_text(page.read_text(encoding="utf-8").replace("| 50 | 2 |", "| 50 | 0 |"), encoding="utf-8")
    assert generator.main() == 1


def test_the_page_is_what_was_recorded(generator: t.Any) -> None:
    figures = generator.recorded()
    assert not figures or generator.incomplete(figures) == []
    text = PAGE.read_text(encoding="utf-8")
    assert generator.page(text, figures) == text


def test_a_page_without_a_record_says_so(generator: t.Any) -> None:
    text = generator.page(f"# Mine\n{generator.BEGIN}\n| 1 | 2 |\n{generator.END}\n", {})
    assert "No whole run of the scenario has been recorded yet" in text and "|" not in text


@pytest.mark.skipif(not FIGURES.exists(), reason="no whole run has been recorded yet, as the page says")
def test_the_page_tells_of_every_step_of_the_scenario() -> None:
    """Each planned change, each fault and each reboot of the harness has its figures, or the page names it as not measured."""
    figures, page = json.loads(FIGURES.read_text(encoding="utf-8")), PAGE.read_text(encoding="utf-8")
    source = (ROOT / "tests" / "support" / "cluster.py").read_text(encoding="utf-8")
    steps = figures["steps"]["planned"] | figures["steps"]["faults"]
    for name in (name for name in steps if not name.startswith("reboot-")):
        assert f'    "{name}": ' in source, name
    assert {f"reboot-{host}" for host in ("db-1", "db-2", "db-3", "gw-1", "gw-2", "gpu-1", "gpu-2", "app-1", "app-2")} <= set(steps)
    assert {"grow", "shrink", "drain"} <= set(steps)
    gaps = page.partition("Not measured: ")[2].partition(".\n")[0].split("; ")
    assert [title for name, title in steps.items() if name not in figures["planned"] | figures["faults"]] == [gap for gap in gaps if gap]
    assert all(entry["failed"] == 0 for entry in figures["planned"].values())
