# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""docs/gpu-hosts.md is what the table of distributions says."""

from __future__ import annotations

import importlib.util
import pathlib
import sys
import typing as t

import pytest
from ansible_collections.selfhosted.fastgpt.plugins.plugin_utils import _gpu_hosts as table
from test_traps import ROOT

PAGE = ROOT / "docs" / "gpu-hosts.md"


def _generator() -> t.Any:
    spec = importlib.util.spec_from_file_location("gpu_hosts_table", ROOT / "docs" / "gpu_hosts_table.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_current_and_names_every_row() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert _generator().page(text) == text
    for row in table.PLATFORMS.values():
        assert text.count(f"| {row['title']} | ") >= 2
    assert all(f"| {branch} | " in text for branch in table.BRANCHES)
    # what is written by hand stays
    other = text.replace("# GPU hosts", "# By hand\n\n# GPU hosts", 1)
    assert _generator().page(other) == other


def test_a_wrong_page_is_found(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    generator = _generator()
    page = tmp_path / "gpu-hosts.md"
    page.write_text(PAGE.read_text(encoding="utf-8").replace("nvidia-driver-pinning-580", "nvidia-driver-pinning-595", 1), encoding="utf-8")
    monkeypatch.setattr(generator, "PAGE", page)
    monkeypatch.setattr(sys, "argv", ["gpu_hosts_table.py", "--check"])
    assert generator.main() == 1
    assert "docs/gpu_hosts_table.py" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["gpu_hosts_table.py"])
    assert generator.main() == 0 and page.read_text(encoding="utf-8") == PAGE.read_text(encoding="utf-8")


def test_no_row_claims_real_hardware() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert "**No role and no row here has been run on a host with a real GPU.**" in text
    assert {row["support"] for row in table.PLATFORMS.values()} <= {table.LAB, table.UNRUN, table.BEST_EFFORT, table.EXPERIMENTAL}
