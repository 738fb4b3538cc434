# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Debian's own driver after a real build; the module cannot be loaded here, and the role says so."""

from __future__ import annotations

import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[3] / "tests" / "support"))
from machines import host  # noqa: E402 - its path was just added


@pytest.fixture(scope="module")
def gpu():
    return host("gpu-12")


def test_the_module_is_really_built_for_the_running_kernel(gpu):
    kernel = gpu.check_output("uname -r")
    assert f", {kernel}, x86_64: installed" in gpu.check_output("dkms status")
    version = gpu.check_output(f"modinfo -k {kernel} -F version nvidia-current")
    assert version.startswith("535.")
    assert kernel in gpu.check_output(f"modinfo -k {kernel} -F vermagic nvidia-current")


def test_branch_and_hold(gpu):
    assert "Pin: version 535.*" in gpu.check_output("cat /etc/apt/preferences.d/selfhosted-fastgpt-nvidia")
    held = gpu.check_output("apt-mark showhold").split()
    assert {"nvidia-driver", "nvidia-kernel-dkms", "nvidia-smi"} <= set(held)
    assert gpu.run("apt-get update").rc == 0


def test_only_the_proprietary_module_is_there(gpu):
    assert gpu.run("dpkg-query -W -f '${db:Status-Status}' nvidia-open-kernel-dkms").stdout != "installed"
