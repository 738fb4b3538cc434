# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The plan looks at the GPUs of the hosts, places their models and says how, or why not. nvidia-smi is a script; nothing is changed."""

from __future__ import annotations

import os
import pathlib
import re
import sys
from typing import Any

import pytest
import yaml
from conftest import SECRETS, plain

# The part of plan.yml that a host without Docker and systemd can go through too.
PLAY = """
- hosts: gpu
  gather_facts: false
  roles:
    - role: selfhosted.fastgpt.plan
  tasks:
    - ansible.builtin.setup: {gather_subset: [min, network, hardware]}
    - ansible.builtin.set_fact: {plan__faults: [], plan__refused: []}
    - ansible.builtin.include_role: {name: selfhosted.fastgpt.plan, tasks_from: collect}
      vars: {plan__role: model_server, plan__entry: preflight_host}
    - ansible.builtin.debug: {msg: "{{ {'faults': plan__faults, 'roles': plan__roles} }}"}
    - ansible.builtin.set_fact: {plan__faults: []}
    - ansible.builtin.include_role: {name: selfhosted.fastgpt.plan, tasks_from: report}
"""
ROWS = """0, NVIDIA GeForce RTX 3090, GPU-1, 00000000:3B:00.0, 24576, {used}, {driver}, 8.6, [N/A]
1, NVIDIA GeForce RTX 3090, GPU-2, 00000000:AF:00.0, 24576, 1, {driver}, 8.6, [N/A]
"""


@pytest.fixture
def look(tmp_path: pathlib.Path, play: Any) -> Any:
    def run(
        servers: dict[str, list[dict[str, Any]]], driver: str = "580.173.02", used: int = 1, there: str = "none", **variables: Any
    ) -> tuple[Any, dict[str, Any]]:
        tools = tmp_path / "bin"
        tools.mkdir()
        (tools / "rows").write_text(ROWS.format(driver=driver, used=used))
        (tools / "nvidia-smi").write_text(f'#!/bin/sh\ncase "$1" in -q) echo "CUDA Version : 13.0";; *) cat {tools}/rows;; esac\n')
        (tools / "docker").write_text(f'#!/bin/sh\ncase "$1" in info) echo {tools}/docker-root;; image) echo "$3" | grep -q "{there}";; esac\n')
        for tool in ("nvidia-smi", "docker"):
            (tools / tool).chmod(0o755)
        shared = {"ansible_connection": "local", "ansible_become": False, "ansible_python_interpreter": sys.executable, **SECRETS, **variables}
        hosts = {name: {"node_address": f"192.0.2.{number}", "model_servers": items} for number, (name, items) in enumerate(servers.items(), 1)}
        inventory = tmp_path / "inventory.yml"
        inventory.write_text(yaml.safe_dump({"all": {"vars": shared, "children": {"gpu": {"hosts": hosts}}}}))
        playbook = tmp_path / "placement.yml"
        playbook.write_text(PLAY)
        told: dict[str, Any] = {}

        def keep(event: dict[str, Any]) -> None:
            result = (event.get("event_data") or {}).get("res") or {}
            if event["event"] == "runner_on_ok" and isinstance(result.get("msg"), dict):
                told[event["event_data"]["host"]] = result["msg"]

        return play(str(playbook), inventory, on_event=keep, environment={"PATH": f"{tools}:{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"}), told

    return run


def test_models_are_placed_and_what_cannot_be_is_told(look: Any, tmp_path: pathlib.Path) -> None:
    report = tmp_path / "report.md"
    run, told = look(
        {
            "gpu-1": [{"model": "Baichuan2-13B-Chat", "port": 8001}, {"model": "M3E-large", "port": 8002, "gpus": []}],
            "gpu-2": [{"model": "ChatGLM2-6B", "port": 8001}, {"model": "M3E-large", "port": 8002, "gpus": [7]}],
            "gpu-3": [{"model": "Qwen2.5-1.5B-Instruct", "port": 8001, "gpus": []}],
        },
        plan_report_path=str(report),
    )
    assert run.rc == 0, run.stdout
    assert run.stats["changed"] == {}
    assert [line for line in told["gpu-1"]["faults"] if "gpus" in line] == []
    assert any("model_servers[1].gpus: [7]: the host has the GPUs 0, 1" in line for line in told["gpu-2"]["faults"]), told
    assert told["gpu-1"]["roles"] == ["nvidia_driver", "container_engine", "nvidia_container_toolkit", "model_server"], "vllm is a container"
    assert told["gpu-2"]["roles"] == ["nvidia_driver", "model_server"]
    text = report.read_text()
    assert "| gpu-1 | Baichuan2-13B-Chat | 8001 | vllm | 16 | GPU 0, 1 | 18.1 GB each |  |\n" in text
    assert "| gpu-1 | M3E-large | 8002 | infinity | 16 | CPU | 8.0 GB |  |\n" in text
    assert "| gpu-3 | Qwen2.5-1.5B-Instruct | 8001 | transformers | 16 | CPU | 8.0 GB |  |\n" in text
    assert "gpu-3: Look at the GPUs" not in run.stdout and told["gpu-3"]["roles"] == ["model_server"]
    assert "gpu-2" not in text, "a host that was refused is placed nowhere"
    assert re.search(r"gpu-1 +Baichuan2-13B-Chat +8001 +vllm +16 +GPU 0, 1 +18\.1 GB each", plain(run.stdout))
    assert "WARNING" not in run.stdout


def test_a_host_that_is_too_small_or_too_old_is_refused_with_the_numbers(look: Any) -> None:
    run, told = look(
        {
            "gpu-1": [{"model": "Baichuan2-13B-Chat", "port": 8001}, {"model": "Baichuan2-7B-Chat", "port": 8002}],
            "gpu-2": [{"model": "ChatGLM2-6B", "port": 8001}],
        },
        driver="535.309.01",
        model_server_gpu_torch_index="https://download.pytorch.org/whl/cu126",
    )
    assert run.rc == 0 and run.stats["changed"] == {}, run.stdout
    text = "\n".join(told["gpu-1"]["faults"])
    # too old for vllm, so that legacy_chat has to serve both
    for part in ("these models do not fit on the GPUs of this host", "Baichuan2-13B-Chat in 16 bit (auto)",
                 "Baichuan2-7B-Chat in 16 bit (auto): 19.3 GB with legacy_chat", "GPU 0 (NVIDIA GeForce RTX 3090) 25.8 GB"):  # fmt: skip
        assert part in text, text
    assert "vllm" not in text
    assert [line for line in told["gpu-2"]["faults"] if "gpus" in line or "driver" in line] == [], "CUDA 12.6 runs on this driver"


def test_memory_that_other_programs_use_is_not_there(look: Any, tmp_path: pathlib.Path) -> None:
    report = tmp_path / "report.md"
    servers = {
        "gpu-1": [{"model": "ChatGLM2-6B", "port": 8001}],
        "gpu-2": [{"model": "Baichuan2-13B-Chat", "port": 8001}],
    }
    run, told = look(servers, used=20000, plan_report_path=str(report))
    assert run.rc == 0, run.stdout
    assert [line for line in told["gpu-1"]["faults"] if "gpus" in line] == []
    assert "| gpu-1 | ChatGLM2-6B | 8001 | legacy_chat | 16 | GPU 1 |" in report.read_text()
    assert any("25.8 GB, 21 GB of it used by other programs" in line for line in told["gpu-2"]["faults"]), told


@pytest.mark.parametrize("there", ["none", "v0.77.0"])
def test_dockers_disk_has_room_for_the_images(look: Any, there: str) -> None:
    card = {
        "name": "large-image", "kind": "chat", "parameters_billion": 1, "context": 1024, "max_response": 512, "kv_bytes_per_token": 1024,
        "weights": {"modelscope": {"id": "a/b", "revision": "v1"}}, "memory": {16: {"ram_gb": 1, "vram_gb": 1}},
        "engines": [{"name": "vllm", "device": "gpu", "quantize_bits": [16], "image": "v0.77.0", "image_gb": 999999}],
    }  # fmt: skip
    registries = {"docker.io": "harbor.example/hub"}
    _unused, told = look({"gpu-1": [{"model": "large-image", "port": 8001}]}, there=there, model_cards_extra=[card], image_registries=registries)
    found = [line for line in told["gpu-1"]["faults"] if "container_engine_data_root" in line]
    if there == "none":
        (line,) = found
        assert re.search(r": /\S+: the images to pull \(harbor.example/hub/vllm/vllm-openai:v0.77.0\) take about 999999 GB, [0-9.]+ GB are free", line)
    else:
        assert found == []


def test_what_no_driver_shows_yet_is_not_refused(look: Any) -> None:
    run, told = look({"gpu-1": [{"model": "M3E-large", "port": 8002, "gpus": [7]}]}, nvidia_driver_awaited=True)
    assert run.rc == 0 and run.stats["changed"] == {}, run.stdout
    assert [line for line in told["gpu-1"]["faults"] if "gpus" in line] == []
    assert "GPU 7" not in plain(run.stdout), "what nobody has looked at is not shown as placed"
