# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""docs/seed-models.md can be copied: its variables exist and make the servers that it names, and its figures are the plan's."""

from __future__ import annotations

import re
import typing as t

import pytest
import yaml
from ansible_collections.selfhosted.fastgpt.plugins.filter.gpu_placement import gpu_placement
from ansible_collections.selfhosted.fastgpt.plugins.filter.model_server_faults import model_server_faults
from test_traps import ROOT, cells

TEXT = (ROOT / "docs" / "seed-models.md").read_text(encoding="utf-8")
CARDS: list[dict[str, t.Any]] = yaml.safe_load((ROOT / "roles/model_cards/vars/main.yml").read_text(encoding="utf-8"))["model_cards_catalogue"]
BY_NAME = {card["name"]: card for card in CARDS}
SEED = {"Baichuan2-13B-Chat", "Baichuan2-7B-Chat", "ChatGLM2-6B", "M3E-large", "bge-reranker-base"}
GPU = {"index": 0, "name": "NVIDIA H200", "memory_mb": 143771, "compute_capability": "9.0", "driver_version": "580.173.02"}


def _sections() -> dict[str, str]:
    return {head: body for head, body in re.findall(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", TEXT, re.MULTILINE | re.DOTALL) if head in BY_NAME}


def _rows() -> list[tuple[str, list[str]]]:
    return [(model, cells(line)) for model, body in _sections().items() for line in body.splitlines() if line.startswith("| `{")]


def _role_server(role: str, variables: dict[str, t.Any]) -> dict[str, t.Any]:
    """The item that the role makes of its variables, as its vars say."""
    defaults = yaml.safe_load((ROOT / "roles" / role / "defaults/main.yml").read_text(encoding="utf-8"))
    assert set(variables) <= set(defaults), f"{role} has no such variable"
    options = yaml.safe_load((ROOT / "roles" / role / "meta/argument_specs.yml").read_text(encoding="utf-8"))["argument_specs"]["main"]["options"]
    for name, value in variables.items():
        assert value in options[name].get("choices", [value])
    values = {**defaults, **variables}
    models = yaml.safe_load((ROOT / "roles" / role / "vars/main.yml").read_text(encoding="utf-8"))[f"{role}__models"]
    server = {"model": models[values[f"{role}_size"]], "port": values[f"{role}_port"], "gpus": values[f"{role}_gpus"]}
    return {**server, "quantize_bit": values.get(f"{role}_quantize_bit", 16)}


def test_the_five_models_are_there_in_every_width() -> None:
    assert set(_sections()) == SEED
    shown = {(model, bits) for model, row in _rows() for bits in [yaml.safe_load(row[0].strip("`")).get("quantize_bit", 16)]}
    assert shown == {(model, bits) for model in SEED for bits in BY_NAME[model]["memory"]}


@pytest.mark.parametrize(("model", "row"), _rows(), ids=lambda value: value if isinstance(value, str) else value[0].strip("`"))
def test_variables_and_figures(model: str, row: list[str]) -> None:
    item, variables, engine, gpu_memory, host_memory = row
    server = yaml.safe_load(item.strip("`"))
    assert server["model"] == model
    assert model_server_faults([server], CARDS) == []
    found = gpu_placement([server], CARDS, [GPU])[server["port"]]
    assert engine == f"{found['engine']} on {found['device'].upper()}"
    assert host_memory == f"{found['ram_gb']} GB"
    assert gpu_memory == (f"{found['need_gb']} GB" if found["device"] == "gpu" else "")

    (role,) = set(re.findall(r"\]\(\.\./roles/(\w+)/README\.md\)", _sections()[model]))
    alone = {key: value for part in re.findall(r"`([^`]+)`", variables) for key, value in yaml.safe_load(part).items()}
    assert _role_server(role, alone) == {"gpus": "auto", "quantize_bit": 16, **server}


def test_heads_say_what_the_cards_say() -> None:
    for model, body in _sections().items():
        card = BY_NAME[model]
        size = f", {card['dimensions']} dimensions" if "dimensions" in card else ""
        assert f"{card['kind'].capitalize()}, {card['context']} tokens{size}, {card['disk_gb']} GB of disk." in body


def test_blocks_can_be_read() -> None:
    hosts, play = (yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL))
    servers = hosts["gpu-1"]["model_servers"]
    assert model_server_faults(servers, CARDS) == []
    # on the GPU that the comment names
    assert all(one["device"] == "gpu" for one in gpu_placement(servers, CARDS, [{**GPU, "memory_mb": 46068}]).values())
    variables = {key: value for key, value in play[0]["vars"].items() if key != "model_server_master_key"}
    assert _role_server(play[0]["roles"][0].removeprefix("selfhosted.fastgpt."), variables)["quantize_bit"] == 8


def test_the_example_inventory_has_all_five() -> None:
    hosts = yaml.safe_load((ROOT / "inventories/prod/hosts.yml").read_text(encoding="utf-8"))["all"]["children"]["gpu"]["hosts"]
    assert {server["model"] for host in hosts.values() for server in host["model_servers"]} == SEED
