# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The programs that stand in for nvidia-smi in the lab and in molecule answer in the form in which a real one was recorded."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

if sys.version_info < (3, 11):
    pytest.skip("the lab runs on Python 3.11", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "lab"))

import stub_repository  # noqa: E402
from sflab import hosts  # noqa: E402

RECORDED = ROOT / "tests/unit/plugins/module_utils/recorded/h100_580"
FIELDS = "index,name,uuid,pci.bus_id,memory.total,memory.used,driver_version,compute_cap,mig.mode.current"
CSV = "--format=csv,noheader,nounits"


@pytest.fixture(params=["lab", "stub"])
def ask(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    tool = tmp_path / "nvidia-smi"
    if request.param == "lab":
        tool.write_text(hosts.gpu_files(2)["usr/bin/nvidia-smi"][0])
        command = [sys.executable, str(tool)]
    else:
        (tmp_path / "loaded").write_text("580.173.02\n")
        tool.write_text(stub_repository.NVIDIA_SMI.format(version="580.173.02", state=tmp_path))
        command = ["sh", str(tool)]

    def run(*arguments: str) -> tuple[int, str]:
        found = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False, timeout=20)
        assert found.stderr == ""
        return found.returncode, found.stdout

    run.kind = request.param  # type: ignore[attr-defined]
    return run


def form(text: str) -> str:
    """A line without what differs from GPU to GPU: names, numbers, what a GPU without MIG says of it."""
    text = re.sub(r"NVIDIA [A-Za-z0-9 ]+?(?=,| \()|STUB GPU", "NAME", text.splitlines()[0])
    text = re.sub(r"\[N/A\]|Disabled", "OFF", text)
    text = re.sub(r"(?<=GPU-)[0-9a-f-]{36}", "UUID", text)
    return re.sub(r"\d+", "0", text)


def test_rows_of_a_query(ask: Any) -> None:
    rc, text = ask(f"--query-gpu={FIELDS}", CSV)
    lines = text.splitlines()
    assert (rc, len(lines)) == (0, 2) and {form(line) for line in lines} == {form((RECORDED / "idle/query_gpu.out").read_text())}


def test_list(ask: Any) -> None:
    rc, text = ask("-L")
    lines = text.splitlines()
    assert (rc, len(lines)) == (0, 2) and {form(line) for line in lines} == {form((RECORDED / "list.out").read_text())}


def test_report(ask: Any) -> None:
    rc, text = ask("-q", "-d", "MEMORY")
    there = (RECORDED / "idle/memory.out").read_text()
    assert rc == 0 and {line for line in there.splitlines() if line.startswith("CUDA Version")} <= set(text.splitlines())
    if ask.kind == "lab":
        names = [line.partition(":")[0] for line in there.partition("    BAR1")[0].splitlines()]
        assert [line.partition(":")[0] for line in text.splitlines()][: len(names)] == names


def test_what_the_lab_s_also_answers(ask: Any) -> None:
    if ask.kind == "lab":
        for name, arguments in (("query_gpu_unknown", ("--query-gpu=index,no.such.field", CSV)), ("no_such_gpu", ("-i", "99"))):
            assert ask(*arguments) == (int((RECORDED / f"{name}.rc").read_text()), (RECORDED / f"{name}.out").read_text())
        assert ask("--query-compute-apps=pid,gpu_uuid,used_gpu_memory", CSV) == (0, (RECORDED / "idle/query_compute_apps.out").read_text())
        (head,) = (line for line in (RECORDED / "idle/nvidia_smi.out").read_text().splitlines() if "NVIDIA-SMI" in line)
        assert ask() == (0, re.sub(r"580\.159\.04", f"{hosts.GPU_DRIVER:10}", head) + "\n")
