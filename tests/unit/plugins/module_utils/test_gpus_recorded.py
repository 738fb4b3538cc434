# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The module gpu_facts on what a real NVIDIA H100 80GB HBM3 with driver 580.159.04 answered, idle and with a model on it.

recorded/h100_580 was written by tests/support/record_gpu.sh. Of what it keeps, the answers that are read here; of `fields` the names only."""

from __future__ import annotations

import json
import os
import pathlib
import re
import stat
import subprocess
import sys
from typing import Any
from xml.etree import ElementTree

import pytest
from ansible_collections.selfhosted.fastgpt.plugins.module_utils import _gpus

RECORDED = pathlib.Path(__file__).parent / "recorded" / "h100_580"
STATES = ("idle", "busy")
# by their first argument; the query for GPUs asks for all fields at once
ANSWERS = {"-q": "memory", "--query-gpu": "query_gpu", "--query-compute-apps": "query_compute_apps"}
PID = "2586"


def answer(state: str, name: str) -> tuple[int, str]:
    folder = RECORDED / state
    return int((folder / f"{name}.rc").read_text()), (folder / f"{name}.out").read_text()


def answers(state: str) -> Any:
    return lambda args: answer(state, ANSWERS[args[0].partition("=")[0]])


def said(state: str, name: str = "module") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RECORDED / state / f"{name}.out").read_text())
    assert found.pop("ansible_facts")["nvidia"]["gpus"] == found["gpus"] and found.pop("changed") is False
    found.pop("invocation")
    return found


@pytest.fixture
def sysfs(tmp_path: pathlib.Path) -> pathlib.Path:
    root = tmp_path / "sys"
    for line in (RECORDED / "sysfs.txt").read_text().splitlines():
        path, value = line.split()
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        if path.endswith("/driver"):
            driver = root / "bus/pci/drivers" / value
            driver.mkdir(parents=True, exist_ok=True)
            (root / path).symlink_to(driver)
        else:
            (root / path).write_text(value + "\n")
    return root


def gathered(state: str, root: pathlib.Path) -> dict[str, Any]:
    return _gpus.gather(_gpus.scan_bus(str(root)), _gpus.loaded_driver(str(root)), answers(state), _gpus.count_nvswitches(str(root)))


@pytest.mark.parametrize("state", STATES)
def test_the_module_says_what_it_said_there(state: str, sysfs: pathlib.Path):
    tool = sysfs.parent / "nvidia-smi"
    cases = "".join(f'{first}*) cat "{RECORDED}/{state}/{name}.out";;\n' for first, name in ANSWERS.items())
    tool.write_text(f'#!/bin/sh\ncase "$1" in\n{cases}*) exit 2;;\nesac\n')
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    run = subprocess.run(
        [sys.executable, "-m", "ansible_collections.selfhosted.fastgpt.plugins.modules.gpu_facts"],
        input=json.dumps({"ANSIBLE_MODULE_ARGS": {"sysfs_path": str(sysfs)}}),
        env={**os.environ, "PATH": f"{tool.parent}:/usr/bin:/bin", "PYTHONPATH": os.pathsep.join(sys.path), "HOME": str(tool.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    found = json.loads(run.stdout)
    assert {name: value for name, value in found.items() if name in said(state)} == said(state)


@pytest.mark.parametrize(("state", "used"), [("idle", 0), ("busy", 15229)])
def test_facts(state: str, used: int, sysfs: pathlib.Path):
    facts = gathered(state, sysfs)
    assert facts == said(state)
    (gpu,) = facts["gpus"]
    assert (gpu["memory_mb"], gpu["memory_used_mb"], gpu["memory_foreign_mb"]) == (81559, used, used)
    assert (gpu["kernel_driver"], gpu["device_id"], gpu["compute_capability"], gpu["mig"], facts["cuda_version"]) == ("nvidia", "2330", "9.0", False, "13.0")
    assert _gpus.capability_of(int(gpu["device_id"], 16)) == gpu["compute_capability"] and _gpus.NAMES[0x2330] in gpu["name"]


@pytest.mark.parametrize(
    ("cgroup", "foreign"),
    [
        # as it was there: a process of somebody else
        ("0::/\n", 15229),
        # the driver's own 9 MiB are nobody's
        ("0::/system.slice/system-selfhosted\\x2dmodel.slice/selfhosted-model@8001.service\n", 9),
    ],
)
def test_memory_of_a_real_process(cgroup: str, foreign: int, sysfs: pathlib.Path):
    process = sysfs.parent / "proc" / PID
    process.mkdir(parents=True)
    (process / "cgroup").write_text(cgroup)
    facts = gathered("busy", sysfs)
    _gpus.subtract_own(facts, answers("busy"), ["selfhosted-model@*.service"], str(process.parent))
    assert (facts["gpus"][0]["memory_used_mb"], facts["gpus"][0]["memory_foreign_mb"]) == (15229, foreign)
    if foreign == 15229:
        # it was asked some seconds later, and had grown by 2 MiB
        (there,) = said("busy", "module_own")["gpus"]
        assert there["memory_foreign_mb"] == there["memory_used_mb"] == 15231


def test_an_idle_gpu_has_no_processes():
    assert answer("idle", "query_compute_apps") == (0, "")
    assert said("idle", "module_own") == said("idle")


def test_the_full_report_says_the_same():
    report = ElementTree.parse(RECORDED / "busy" / "full_xml.out").getroot()
    (gpu,) = report.findall("gpu")
    (facts,) = said("busy")["gpus"]

    def text(path: str, of: Any = gpu) -> str:
        return str(of.findtext(path))

    assert text("driver_version", report) == facts["driver_version"] and text("cuda_version", report) == said("busy")["cuda_version"]
    assert (text("product_name"), text("uuid"), text("mig_mode/current_mig")) == (facts["name"], facts["uuid"], "Disabled")
    assert _gpus.bus_id(text("pci/pci_bus_id")) == facts["pci_bus"] and text("pci/pci_device_id") == facts["device_id"] + "10DE"
    assert _gpus._whole(text("fb_memory_usage/total")) == facts["memory_mb"] and _gpus._whole(text("fb_memory_usage/used")) == facts["memory_used_mb"]
    (process,) = gpu.findall("processes/process_info")
    (row,) = _gpus.parse_csv(answer("busy", "query_compute_apps")[1], ("pid", "gpu_uuid", "used_gpu_memory"))
    assert (text("pid", process), text("used_memory", process)) == (row["pid"], f"{row['used_gpu_memory']} MiB") and row["pid"] == PID


def test_every_field_that_is_asked_for_is_known():
    known = {name for line in (RECORDED / "fields.out").read_text().splitlines() for name in re.findall(r'"([^"]+)"', line)}
    assert set(_gpus.BASE_FIELDS + _gpus.LATER_FIELDS) <= known


def test_answers_to_what_is_not_there():
    rc, text = answer(".", "query_gpu_unknown")
    assert rc == 2 and _gpus.unknown_field(text)
    rc, text = answer(".", "no_such_gpu")
    assert rc == 6 and "finds no GPU that it can use" in _gpus.failure(rc, text)


@pytest.mark.parametrize("state", STATES)
def test_cuda_in_every_report(state: str):
    assert _gpus.cuda_version(answer(state, "memory")[1]) == "13.0"
    assert _gpus.cuda_version((RECORDED / "idle" / "nvidia_smi.out").read_text()) == "13.0"


def test_nothing_tells_the_machine():
    for path in RECORDED.rglob("*.*"):
        text = path.read_text()
        assert set(re.findall(r"GPU-[0-9a-f-]{36}", text)) <= {"GPU-00000000-0000-0000-0000-000000000000"}, path
        assert not re.search(r"<(serial|pdi|chassis_serial_number)>(?!0<)", text) and not re.search(r"/(tmp|home|root|dev/shm|srv)/", text), path
