# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""docs/models.md has every way to serve a model of the catalogue, and each is either placed as it says or refused with what works."""

from __future__ import annotations

import importlib.util
import pathlib
import re
import sys
import typing as t

import pytest
import yaml
from ansible_collections.selfhosted.fastgpt.plugins.filter.gpu_placement import gpu_placement
from ansible_collections.selfhosted.fastgpt.plugins.filter.model_server_faults import model_server_faults
from ansible_collections.selfhosted.fastgpt.plugins.plugin_utils._models import ENGINES, WIDTHS
from test_traps import ROOT, names_in

PAGE = ROOT / "docs" / "models.md"
CARDS: list[dict[str, t.Any]] = yaml.safe_load((ROOT / "roles/model_cards/vars/main.yml").read_text(encoding="utf-8"))["model_cards_catalogue"]
# Room for anything, so that only the cards decide.
GPU = {"index": 0, "name": "NVIDIA H200", "memory_mb": 143771, "compute_capability": "9.0", "driver_version": "580.173.02"}
Way = tuple[str, str, str, int]


def _generator() -> t.Any:
    spec = importlib.util.spec_from_file_location("model_table", ROOT / "docs" / "model_table.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # dataclasses look their module up by name
    sys.modules["model_table"] = module
    spec.loader.exec_module(module)
    return module


def rows_of(text: str) -> dict[Way, list[str]]:
    """Cells behind bits, engine and device, by (model, engine, device, bits)."""
    found: dict[Way, list[str]] = {}
    model = ""
    for line in text.splitlines():
        if line.startswith("### "):
            model = line.removeprefix("### ")
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if len(cells) != 10 or not re.fullmatch(r"[\d, ]+", cells[0]):
            continue
        for bits in cells[0].split(","):
            way = (model, cells[1], cells[2].lower(), int(bits))
            assert way not in found, f"{way} is there twice"
            found[way] = cells[3:]
    return found


ROWS = rows_of(PAGE.read_text(encoding="utf-8"))
OFFERED = sorted(way for way, cells in ROWS.items() if cells[0] != "refused")
REFUSED = sorted(way for way, cells in ROWS.items() if cells[0] == "refused")


def _server(way: Way) -> dict[str, t.Any]:
    model, engine, device, width = way
    return {"model": model, "port": 8001, "engine": engine, "gpus": [0] if device == "gpu" else [], "quantize_bit": width}


def _written(cell: str) -> dict[str, t.Any]:
    return {key: value for part in re.findall(r"`([^`]+)`", cell) for key, value in yaml.safe_load(f"{{{part}}}").items()}


def test_every_combination_is_in_the_table() -> None:
    every = {
        (card["name"], engine, device, width)
        for card in CARDS
        for engine, can in ENGINES.items()
        if card["kind"] in can["kinds"]
        for device in can["devices"]
        for width in WIDTHS
    }
    assert set(ROWS) == every
    # and no card has an engine or a width beyond those
    own = {(card["name"], entry["name"], entry["device"], width) for card in CARDS for entry in card["engines"] for width in entry["quantize_bits"]}
    assert own == set(OFFERED)


@pytest.mark.parametrize("way", OFFERED, ids=lambda way: "-".join(map(str, way)))
def test_every_way_that_is_offered_is_placed_so(way: Way) -> None:
    written, gpu_memory, _spread, host_memory, *_rest = ROWS[way]
    model, engine, device, width = way
    for server in (_server(way), {"model": model, "port": 8001, **_written(written)}):
        assert model_server_faults([server], CARDS) == []
        found = gpu_placement([server], CARDS, [GPU])[8001]
        assert (found["engine"], found["device"]) == (engine, device)
        assert server.get("quantize_bit", 16) == width
        assert host_memory == f"{found['ram_gb']} GB"
        if device == "gpu":
            assert gpu_memory == f"{found['need_gb']} GB"


@pytest.mark.parametrize("way", REFUSED, ids=lambda way: "-".join(map(str, way)))
def test_every_refusal_names_what_works(way: Way) -> None:
    (found,) = model_server_faults([_server(way)], CARDS, "gpu-1")
    # what it names is what works
    model = way[0]
    engines = {engine for other, engine, _device, _width in OFFERED if other == model}
    if way[1] not in engines:
        assert found.startswith("gpu-1: model_servers[0].engine: ")
        assert set(re.findall(r"\w+", found.partition("choose from: ")[2])) == engines
        return
    named = re.findall(r"quantize_bit: (\d+) with gpus: (\[\]|auto or \[0\]) \((\w+) on (CPU|GPU)(?:, slow)?\)", found.partition("What works: ")[2])
    assert {(model, engine, device.lower(), int(width)) for width, _gpus, engine, device in named} == {each for each in OFFERED if each[0] == model}
    for width, gpus, engine, _device in named:
        server = {"model": model, "port": 8001, "quantize_bit": int(width), "gpus": [] if gpus == "[]" else "auto", "engine": engine}
        assert model_server_faults([server], CARDS) == []


def test_the_table_is_what_the_cards_say() -> None:
    text = PAGE.read_text(encoding="utf-8")
    generator = _generator()
    assert generator.page(text) == text
    # what is written by hand stays
    other = text.replace("# Every way", "# By hand\n\n# Every way", 1)
    assert generator.page(other) == other


def test_every_test_that_is_named_exists() -> None:
    text = PAGE.read_text(encoding="utf-8")
    named = re.findall(r"^\* `([^`]*::[^`]*)`$", text, re.MULTILINE)
    assert len(named) >= 20
    for node in named:
        path, _colons, test = node.partition("::")
        assert test in names_in(ROOT / path), node
    # every way leads to a list of tests that is there
    places = {re.sub(r"[^\w-]", "", head.lower().replace(" ", "-")) for head in re.findall(r"^### (.*)$", text, re.MULTILINE)}
    assert {cells[-1].partition("(#")[2].rstrip(")") for cells in ROWS.values()} <= places


def test_a_wrong_page_is_found(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    generator = _generator()
    page = tmp_path / "models.md"
    page.write_text(PAGE.read_text(encoding="utf-8").replace("19.7 GB", "14 GB", 1), encoding="utf-8")
    monkeypatch.setattr(generator, "PAGE", page)
    monkeypatch.setattr(sys, "argv", ["model_table.py", "--check"])
    assert generator.main() == 1
    assert "docs/model_table.py" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["model_table.py"])
    assert generator.main() == 0
    assert page.read_text(encoding="utf-8") == PAGE.read_text(encoding="utf-8")
