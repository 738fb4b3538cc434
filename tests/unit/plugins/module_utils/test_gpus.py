# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""GPUs from the bus and from nvidia-smi. The outputs are written by hand after the forms in which nvidia-smi is known to answer;
test_gpus_recorded.py has those of a real GPU."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import pytest
from ansible_collections.selfhosted.fastgpt.plugins.module_utils import _gpus
from hypothesis import given
from hypothesis import strategies as st

ROOT = pathlib.Path(__file__).resolve().parents[4]
NO_DRIVER = (
    "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. "
    "Make sure that the latest NVIDIA driver is installed and running.\n"
)
MISMATCH = "Failed to initialize NVML: Driver/library version mismatch\nNVML library version: 580.173\n"
LOG = "==============NVSMI LOG==============\n\nDriver Version                            : 580.173.02\nCUDA Version                              : 13.0\n"
L20 = "0, NVIDIA L20, GPU-11111111-2222-3333-4444-555555555555, 00000000:3B:00.0, 46068, 1, 580.173.02, 8.9, [N/A]\n"
L20_1 = "1, NVIDIA L20, GPU-66666666-2222-3333-4444-555555555555, 00000000:AF:00.0, 46068, 20480, 580.173.02, 8.9, [N/A]\n"


def device(bus: str = "0000:3b:00.0", device_id: int | None = 0x26BA, bound: str = "nvidia") -> dict[str, Any]:
    return {"pci_bus": bus, "device_id": device_id, "bound": bound}


class Smi:
    """Answers as a branch of nvidia-smi does that knows these fields."""

    def __init__(self, rows: str, unknown: tuple[str, ...] = (), rc: int = 0, log: str = LOG) -> None:
        self.rows, self.unknown, self.rc, self.log = rows, unknown, rc, log
        self.asked: list[list[str]] = []

    def __call__(self, args: list[str]) -> tuple[int, str]:
        self.asked.append(args)
        if args[0] == "-q":
            return 0, self.log
        fields = args[0].split("=", 1)[1].split(",")
        bad = next((field for field in fields if field in self.unknown), None)
        if bad:
            return 2, f'Field "{bad}" is not a valid field to query.\n\n'
        if self.rc:
            return self.rc, self.rows
        known = _gpus.BASE_FIELDS + tuple(field for field in _gpus.LATER_FIELDS if field not in self.unknown)
        out = []
        for line in self.rows.splitlines():
            cells = dict(zip(known, (cell.strip() for cell in line.split(","))))
            out.append(", ".join(cells[field] for field in fields) if len(cells) > 1 else line)
        return 0, "\n".join(out) + "\n"


def test_one_gpu_with_a_driver():
    smi = Smi(L20)
    assert _gpus.gather([device()], "580.173.02", smi) == {
        "gpus": [
            {
                "index": 0,
                "name": "NVIDIA L20",
                "uuid": "GPU-11111111-2222-3333-4444-555555555555",
                "pci_bus": "0000:3b:00.0",
                "device_id": "26ba",
                "kernel_driver": "nvidia",
                "memory_mb": 46068,
                "memory_used_mb": 1,
                "memory_foreign_mb": 1,
                "compute_capability": "8.9",
                "driver_version": "580.173.02",
                "mig": None,
                "problem": "",
            }
        ],
        "driver_version": "580.173.02",
        "loaded_version": "580.173.02",
        "cuda_version": "13.0",
        "nvswitches": 0,
        "problem": "",
    }
    assert len(smi.asked) == 2, "one query and one report"


def test_several_gpus_in_the_order_of_their_index():
    found = _gpus.gather([device("0000:af:00.0"), device()], "580.173.02", Smi(L20_1 + L20))
    assert [(gpu["index"], gpu["pci_bus"], gpu["memory_used_mb"]) for gpu in found["gpus"]] == [(0, "0000:3b:00.0", 1), (1, "0000:af:00.0", 20480)]
    assert found["problem"] == ""


@pytest.mark.parametrize(("said", "mig"), [("Enabled", True), ("Disabled", False), ("[N/A]", None), ("[Not Supported]", None)])
def test_mig(said: str, mig: bool | None):
    row = f"0, NVIDIA A100-SXM4-80GB, GPU-1, 00000000:07:00.0, 81920, [N/A], 535.309.01, 8.0, {said}\n"
    (gpu,) = _gpus.gather([device("0000:07:00.0", 0x20B2)], "", Smi(row))["gpus"]
    assert gpu["mig"] is mig and gpu["memory_used_mb"] is None and gpu["memory_mb"] == 81920


def test_a_branch_that_does_not_know_compute_cap():
    row = "0, Tesla V100-PCIE-32GB, GPU-1, 00000000:3B:00.0, 32510, 0, 450.248.02, [N/A]\n"
    smi = Smi(row, unknown=("compute_cap",), log="Driver Version : 450.248.02\nCUDA Version : 11.0\n")
    found = _gpus.gather([device(device_id=0x1DB6)], "450.248.02", smi)
    (gpu,) = found["gpus"]
    assert gpu["compute_capability"] == "7.0" and gpu["memory_mb"] == 32510 and gpu["mig"] is None
    assert found["cuda_version"] == "11.0" and found["driver_version"] == "450.248.02" and found["problem"] == ""


def test_each_field_that_a_branch_does_know_is_asked_for():
    row = "0, Tesla T4, GPU-1, 00000000:3B:00.0, 15360, 0, 470.256.02, Disabled\n"
    (gpu,) = _gpus.gather([device(device_id=0x1EB8)], "", Smi(row, unknown=("compute_cap",)))["gpus"]
    assert gpu["mig"] is False and gpu["compute_capability"] == "7.5"


def test_a_gpu_that_says_nothing_of_its_memory():
    row = "0, NVIDIA GH200, GPU-1, 00000009:01:00.0, [N/A], [Unknown Error], 580.173.02, 9.0, [N/A]\n"
    (gpu,) = _gpus.gather([], "", Smi(row))["gpus"]
    assert gpu["memory_mb"] is None and gpu["memory_used_mb"] is None and "memory" in gpu["problem"] and gpu["pci_bus"] == "0009:01:00.0"


@pytest.mark.parametrize(
    ("rc", "text", "words"),
    [
        (9, NO_DRIVER, "no NVIDIA driver is loaded"),
        (18, MISMATCH, "module of another version is still loaded. Reboot"),
        (6, "No devices were found\n", "finds no GPU that it can use"),
        (0, "No devices were found\n", "finds no GPU that it can use"),
        (255, "Failed to initialize NVML: Insufficient Permissions\n", "may not open"),
        (124, "", "did not answer in time"),
        (137, "", "did not answer in time"),
        (126, "/usr/bin/nvidia-smi cannot be run: [Errno 8] Exec format error", "code 126"),
        (15, "Unable to determine the device handle for GPU0000:3B:00.0: Unknown Error\n", "fallen off the bus"),
        (1, "something\nnobody   has seen", "failed with code 1: something nobody has seen"),
        (0, "", "it answered with nothing"),
    ],
)
def test_a_driver_that_fails(rc: int, text: str, words: str):
    found = _gpus.gather([device(), device("0000:af:00.0", 0x1EB8)], "", lambda args: (rc, text))
    assert words in found["problem"] and "\n" not in found["problem"]
    seen = [(gpu["index"], gpu["name"], gpu["compute_capability"], gpu["memory_mb"]) for gpu in found["gpus"]]
    assert seen == [(0, "L20", "8.9", None), (1, "Tesla T4", "7.5", None)]
    assert all(gpu["problem"] == found["problem"] for gpu in found["gpus"])


def test_no_driver_at_all():
    found = _gpus.gather([device(bound="nouveau")], "", None)
    assert "not installed" in found["problem"] and "branch 580" in found["problem"] and "nouveau" in found["problem"]
    assert found["driver_version"] == "" and found["cuda_version"] == "" and found["gpus"][0]["driver_version"] is None
    assert "nouveau" not in _gpus.gather([device(bound="")], "", None)["problem"]


def test_a_module_without_its_utilities():
    assert "nvidia-smi is missing" in _gpus.gather([device()], "580.173.02", None)["problem"]


def test_a_host_without_gpus_has_no_problem():
    nothing = {"gpus": [], "driver_version": "", "loaded_version": "", "cuda_version": "", "nvswitches": 0, "problem": ""}
    assert _gpus.gather([], "", None) == nothing
    assert _gpus.gather([], "", lambda args: (9, NO_DRIVER)) == nothing


def test_a_gpu_that_the_driver_does_not_show():
    found = _gpus.gather([device(), device("0000:af:00.0")], "580.173.02", Smi(L20))
    assert [gpu["memory_mb"] for gpu in found["gpus"]] == [46068, None] and found["gpus"][1]["index"] == 1
    assert "0000:af:00.0" in found["problem"] and found["gpus"][0]["problem"] == ""


def test_a_gpu_of_a_virtual_machine():
    found = _gpus.gather([device(), device("0000:af:00.0", bound="vfio-pci")], "580.173.02", Smi(L20))
    assert "vfio-pci" in found["gpus"][1]["problem"] and found["problem"] == found["gpus"][1]["problem"]


def test_rows_beside_a_failure_are_kept():
    text = L20 + "Unable to determine the device handle for GPU0000:AF:00.0: GPU is lost.  Reboot the system to recover this GPU\n"
    found = _gpus.gather([device(), device("0000:af:00.0")], "580.173.02", lambda args: (15, text) if args[0] != "-q" else (0, LOG))
    assert [gpu["memory_mb"] for gpu in found["gpus"]] == [46068, None]
    assert "fallen off the bus" in found["problem"] and found["gpus"][1]["problem"] == found["problem"]


@pytest.mark.parametrize(
    ("device_id", "capability"),
    [
        (0x102D, "3.7"), (0x15F8, "6.0"), (0x17FD, "5.2"), (0x1B38, "6.1"), (0x1BB3, "6.1"), (0x1DB6, "7.0"), (0x1E02, "7.5"), (0x1E04, "7.5"),
        (0x1EB8, "7.5"), (0x20B0, "8.0"), (0x20B2, "8.0"), (0x20B5, "8.0"), (0x20F1, "8.0"), (0x20F3, "8.0"), (0x20F5, "8.0"), (0x20B7, "8.0"),
        (0x2236, "8.6"), (0x2204, "8.6"), (0x2330, "9.0"), (0x2331, "9.0"), (0x2322, "9.0"), (0x2324, "9.0"), (0x2329, "9.0"), (0x2335, "9.0"),
        (0x2684, "8.9"), (0x2685, "8.9"), (0x27B8, "8.9"), (0x26B9, "8.9"), (0x26BA, "8.9"), (0x2901, "10.0"), (0x2B85, "12.0"), (0x2B87, "12.0"),
        (0x0001, None), (None, None),
    ],
)  # fmt: skip
def test_capability_by_device(device_id: int | None, capability: str | None):
    assert _gpus.capability_of(device_id) == capability


def test_the_table_is_in_order_and_names_are_in_it():
    flat = [bound for first, last, dummy in _gpus.CAPABILITIES for bound in (first, last)]
    assert flat == sorted(flat) and len(set(flat)) == len(flat)
    assert all(_gpus.capability_of(device_id) for device_id in _gpus.NAMES)


@pytest.mark.parametrize(
    ("text", "version"),
    [(LOG, "13.0"), ("NVIDIA-SMI 535.309.01   Driver Version: 535.309.01   CUDA Version: 12.2  |", "12.2"), ("CUDA Version : N/A", ""), ("", "")],
)
def test_cuda_version(text: str, version: str):
    assert _gpus.cuda_version(text) == version


@given(st.integers(0, 255), st.text(max_size=200), st.lists(st.builds(device, st.text(max_size=12), st.none() | st.integers(0, 0xFFFF)), max_size=3))
def test_any_answer_is_survived(rc: int, text: str, devices: list[dict[str, Any]]):
    found = _gpus.gather(devices, "", lambda args: (rc, text))
    assert set(found) == {"gpus", "driver_version", "loaded_version", "cuda_version", "nvswitches", "problem"}
    assert len({gpu["index"] for gpu in found["gpus"]}) == len(found["gpus"]) >= len({d["pci_bus"] for d in devices})
    assert not found["gpus"] or found["problem"] or any(gpu["memory_mb"] for gpu in found["gpus"])


# ---- the module itself


def bus(root: pathlib.Path, name: str, vendor: str, kind: str, device_id: str) -> None:
    folder = root / "bus/pci/devices" / name
    folder.mkdir(parents=True)
    for file, text in (("vendor", vendor), ("class", kind), ("device", device_id)):
        (folder / file).write_text(text + "\n")


@pytest.fixture
def host(tmp_path: pathlib.Path) -> pathlib.Path:
    """A host with one GPU, its audio function, and somebody else's graphics card."""
    root = tmp_path / "sys"
    bus(root, "0000:3b:00.0", "0x10de", "0x030200", "0x26ba")
    bus(root, "0000:3b:00.1", "0x10de", "0x040300", "0x22ba")
    bus(root, "0000:04:00.0", "0x1a03", "0x030000", "0x2000")
    return tmp_path


def facts(host: pathlib.Path, smi: str | None, **more: Any) -> dict[str, Any]:
    tools = host / "bin"
    tools.mkdir(exist_ok=True)
    if smi is not None:
        (tools / "nvidia-smi").write_text(smi)
        (tools / "nvidia-smi").chmod(0o755)
    arguments = {"ANSIBLE_MODULE_ARGS": {"sysfs_path": str(host / "sys"), "_ansible_check_mode": True, **more}}
    run = subprocess.run(
        [sys.executable, "-m", "ansible_collections.selfhosted.fastgpt.plugins.modules.gpu_facts"],
        input=json.dumps(arguments),
        env={**os.environ, "PATH": f"{tools}:/usr/bin:/bin", "PYTHONPATH": os.pathsep.join(sys.path), "HOME": str(host)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    result: dict[str, Any] = json.loads(run.stdout)
    assert result["changed"] is False and result["ansible_facts"]["nvidia"]["gpus"] == result["gpus"]
    return result


def test_module_without_a_driver(host: pathlib.Path):
    found = facts(host, None)
    assert [gpu["pci_bus"] for gpu in found["gpus"]] == ["0000:3b:00.0"] and found["gpus"][0]["compute_capability"] == "8.9"
    assert "not installed" in found["problem"]


def test_module_with_a_driver(host: pathlib.Path):
    (host / "sys/module/nvidia").mkdir(parents=True)
    (host / "sys/module/nvidia/version").write_text("580.173.02\n")
    found = facts(host, f'#!/bin/sh\ncase "$1" in -q) printf "CUDA Version : 13.0\\n";; *) echo "{L20.strip()}";; esac\n')
    assert found["gpus"][0]["memory_mb"] == 46068 and found["cuda_version"] == "13.0" and found["problem"] == ""


def test_module_with_a_broken_driver(host: pathlib.Path):
    assert "no NVIDIA driver is loaded" in facts(host, f'#!/bin/sh\necho "{NO_DRIVER.strip()}"\nexit 9\n')["problem"]


def test_module_with_a_driver_that_hangs(host: pathlib.Path):
    assert "did not answer in time" in facts(host, "#!/bin/sh\nexec sleep 30\n", timeout=1)["problem"]


def test_module_with_a_file_that_is_no_program(host: pathlib.Path):
    assert "nvidia-smi" in facts(host, "\x7fELF nonsense")["problem"]


def test_module_counts_nvswitches(host: pathlib.Path):
    for number in range(4):
        bus(host / "sys", f"0000:c{number}:00.0", "0x10de", "0x068000", "0x22a3")
    bus(host / "sys", "0000:00:07.0", "0x8086", "0x068000", "0x7113")
    found = facts(host, None)
    assert found["nvswitches"] == 4 and len(found["gpus"]) == 1


def test_module_names_the_kernels_driver(host: pathlib.Path):
    driver = host / "sys/bus/pci/drivers/nouveau"
    driver.mkdir(parents=True)
    (host / "sys/bus/pci/devices/0000:3b:00.0/driver").symlink_to(driver)
    found = facts(host, None)
    assert found["gpus"][0]["kernel_driver"] == "nouveau" and found["gpus"][0]["device_id"] == "26ba" and "nouveau" in found["problem"]


def test_module_with_an_updated_driver_before_the_reboot(host: pathlib.Path):
    (host / "sys/module/nvidia").mkdir(parents=True)
    (host / "sys/module/nvidia/version").write_text("575.57.08\n")
    found = facts(host, f'#!/bin/sh\necho "{MISMATCH.splitlines()[0]}"\nexit 18\n')
    assert found["loaded_version"] == "575.57.08" and "Reboot" in found["problem"] and found["gpus"][0]["memory_mb"] is None


def test_module_without_a_bus(tmp_path: pathlib.Path):
    assert facts(tmp_path, None) == {**facts(tmp_path, None), "gpus": [], "problem": ""}


CONTAINER = "ab" * 32
CGROUPS = {
    "11": "0::/system.slice/system-selfhosted\\x2dmodel.slice/selfhosted-model@8001.service\n",
    "12": f"0::/system.slice/docker-{CONTAINER}.scope\n",
    # cgroup v1, with Docker's own driver
    "13": f"12:memory:/docker/{CONTAINER}\n1:name=systemd:/docker/{CONTAINER}\n",
    "14": "0::/user.slice/user-1000.slice/user@1000.service/app.slice/train.service\n",
    "15": "0::/system.slice/docker-" + "cd" * 32 + ".scope\n",
}


@pytest.mark.parametrize(
    ("rows", "foreign"),
    [
        ("", 20480),
        ("11, GPU-1, 8000\n", 12480),
        ("11, GPU-1, 8000\n12, GPU-1, 5000\n14, GPU-1, 7000\n15, GPU-1, 400\n", 7480),
        ("13, GPU-1, 20480\n", 0),
        ("11, GPU-1, 30000\n", 0),
        ("11, GPU-2, 8000\n", 20480),
        ("14, GPU-1, [N/A]\n", 20480),
        ("11, GPU-1, [N/A]\n12, GPU-1, 5\n", None),
        ("99, GPU-1, 8000\n", 20480),
        ("what, is, this\nno row\n", 20480),
    ],
)
def test_memory_of_others(rows: str, foreign: int | None, tmp_path: pathlib.Path):
    for pid, text in CGROUPS.items():
        (tmp_path / pid).mkdir()
        (tmp_path / pid / "cgroup").write_text(text)
    smi = Smi("0, NVIDIA L20, GPU-1, 00000000:3B:00.0, 46068, 20480, 580.173.02, 8.9, [N/A]\n")
    facts = _gpus.gather([device()], "580.173.02", smi)
    assert facts["gpus"][0]["memory_foreign_mb"] == 20480
    _gpus.subtract_own(facts, lambda args: (0, rows), ["selfhosted-model@*.service", CONTAINER], str(tmp_path))
    assert (facts["gpus"][0]["memory_foreign_mb"], facts["gpus"][0]["memory_used_mb"]) == (foreign, 20480)
    _gpus.subtract_own(facts, lambda args: (6, "failed"), ["*"], str(tmp_path))
    assert facts["gpus"][0]["memory_foreign_mb"] == foreign
