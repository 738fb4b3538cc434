# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What follows from a look at a host: what is missing, whether a module was built, whether and when to reboot. The looks are written by hand."""

from __future__ import annotations

import os
import pathlib
import subprocess
from typing import Any

import pytest
from ansible_collections.selfhosted.fastgpt.plugins.filter.gpu_host_packages import gpu_host_packages
from ansible_collections.selfhosted.fastgpt.plugins.plugin_utils._gpu_driver import driver_state
from hypothesis import given
from hypothesis import strategies as st

SCRIPT = pathlib.Path(__file__).resolve().parents[4] / "roles/nvidia_driver/files/look.sh"
KERNEL = "6.1.0-56-amd64"
HOST = {"distribution": "Debian", "version": "12.11", "architecture": "x86_64", "kernel": KERNEL}
PLAN = gpu_host_packages(HOST, "driver", ["26ba"])
GOOD = f"""kernel {KERNEL}
managed 580 open nvidia
loaded 580.173.02
module nvidia 580.173.02
dkms nvidia/580.173.02, {KERNEL}, x86_64: installed
package nvidia-open 580.173.02-1 hold installed
package nvidia-kernel-open-dkms 3:580.173.02-1 hold installed
package nvidia-container-toolkit 1.20.0-1 install installed
package nvidia-driver-pinning-580 1-1 install installed
package linux-headers-{KERNEL} 6.1.192-2 install installed
package linux-headers-amd64 6.1.192-2 install installed
package nvidia-settings 470.1-1 deinstall config-files
persistenced yes
initramfs fresh
"""


def state(look: str = GOOD, plan: dict[str, Any] = PLAN, **options: Any) -> dict[str, Any]:
    return driver_state(look, plan, options)


def without(*starts: str) -> str:
    return "".join(line + "\n" for line in GOOD.splitlines() if not line.startswith(starts))


def test_a_host_as_it_should_be() -> None:
    found = state()
    assert found["managed"] and found["built"] == found["loaded"] == "580.173.02" and found["persistenced"]
    assert [found[key] for key in ("missing", "wrong", "unheld", "reboot_reasons", "build_problem", "secure_boot_fault")] == [[], [], [], [], "", ""]
    assert not found["initramfs_stale"]
    # what is removed with its settings kept is not there
    assert "nvidia-settings" not in found["installed"]


def test_a_bare_host() -> None:
    found = state(f"kernel {KERNEL}\n")
    assert found["missing"] == ["nvidia-open", f"linux-headers-{KERNEL}", "linux-headers-amd64"] and not found["managed"]


# ---- pain point 1: no headers, and apt is content


def test_a_module_that_was_never_built_is_no_success() -> None:
    """apt ends with 0, and dkms says `added`."""
    look = without("module", "loaded", "dkms") + "dkms nvidia/580.173.02: added\n"
    found = state(look)
    assert "has no module for the running kernel 6.1.0-56-amd64 (nvidia/580.173.02: added)" in found["build_problem"]
    assert f"linux-headers-{KERNEL}" in found["build_problem"] and "make.log" in found["build_problem"]


def test_a_module_for_another_kernel_is_no_success() -> None:
    look = without("module", "loaded", "dkms") + "dkms nvidia/580.173.02, 6.1.0-55-amd64, x86_64: installed\n"
    assert "no module for the running kernel 6.1.0-56-amd64" in state(look)["build_problem"]
    longer = without("module", "loaded", "dkms") + "dkms nvidia/580.173.02, 6.1.0-56-amd64-own, x86_64: installed\n"
    assert "no module for the running kernel" in state(longer)["build_problem"]


@pytest.mark.parametrize(
    ("line", "word"),
    [
        (f"nvidia/580.173.02, {KERNEL}, x86_64: built", "did not install it"),
        (f"nvidia/580.173.02, {KERNEL}, x86_64: installed", "depmod"),
        ("", "dkms knows no module of NVIDIA's"),
    ],
)
def test_what_dkms_says_is_told(line: str, word: str) -> None:
    assert word in state(without("module", "dkms") + (f"dkms {line}\n" if line else ""))["build_problem"]


def test_debians_own_module_has_another_name() -> None:
    plan = gpu_host_packages(HOST, "driver", ["26ba"], {"source": "distro", "branch": "535"})
    look = f"kernel {KERNEL}\nmodule nvidia-current 535.309.01\ndkms nvidia-current/535.309.01, {KERNEL}, x86_64: installed\n"
    assert state(look, plan)["built"] == "535.309.01" and state(look, plan)["build_problem"] == ""


def test_a_module_of_canonicals_for_another_kernel() -> None:
    plan = gpu_host_packages(
        {"distribution": "Ubuntu", "version": "24.04", "architecture": "x86_64", "kernel": "6.8.0-60-generic"}, "driver", ["26ba"], {"source": "distro"}
    )
    found = state("kernel 6.8.0-60-generic\n" + "".join(f"package {name} 6.8.0-60.63+1 install installed\n" for name in plan["packages"]), plan)
    assert found["missing"] == [] == found["wrong"]
    assert "no module for the running kernel 6.8.0-60-generic" in found["build_problem"]


# ---- pain point 4: hold, and the reboot after an upgrade


def test_everything_of_the_driver_is_held_and_the_toolkit_is_not() -> None:
    found = state(GOOD.replace("hold", "install"))
    assert found["unheld"] == ["nvidia-kernel-open-dkms", "nvidia-open"] and found["held"] == []
    assert state()["held"] == ["nvidia-kernel-open-dkms", "nvidia-open"]
    assert state(GOOD.replace("hold", "install"), hold=False)["unheld"] == []


def test_another_branch_is_replaced() -> None:
    found = state(GOOD.replace("580.173.02-1", "595.91.07-1"))
    assert found["wrong"] == ["nvidia-open 595.91.07-1"] and found["missing"] == []
    # 5801 is no version of 580
    assert state(GOOD.replace("580.173.02-1", "5801.1-1"))["wrong"] == ["nvidia-open 5801.1-1"]


@pytest.mark.parametrize(
    ("look", "reason"),
    [
        (GOOD.replace("loaded 580.173.02", "loaded 580.95.05"), "version 580.95.05 is loaded and 580.173.02 installed"),
        (without("loaded"), "the module is installed and not loaded"),
        (without("loaded") + "nouveau loaded\n", "nouveau has the GPU"),
    ],
)
def test_reboot_reasons(look: str, reason: str) -> None:
    found = state(look)
    assert reason in found["reboot_reasons"] and found["reboot_blocked"] == ""


# ---- pain point 5: no reboot of the control node, none over containers, none without a permit

OWED = GOOD.replace("loaded 580.173.02", "loaded 580.95.05")


@pytest.mark.parametrize("connection", ["local", "ansible.builtin.local"])
def test_a_local_connection_ends_before_the_reboot(connection: str) -> None:
    assert "runs on this very host" in state(OWED, connection=connection)["reboot_blocked"]
    assert state(GOOD, connection=connection)["reboot_blocked"] == "", "where nothing is owed nothing is said"


def test_running_containers_are_named_and_not_rebooted() -> None:
    found = state(OWED + "container vllm\ncontainer model-8001\n")
    assert "containers run here: model-8001, vllm" in found["reboot_blocked"] and "nvidia_driver_reboot_over_containers: true" in found["reboot_blocked"]
    assert state(OWED + "container vllm\n", over_containers=True)["reboot_blocked"] == ""


def test_a_reboot_has_to_be_allowed() -> None:
    assert "nvidia_driver_reboot is false" in state(OWED, reboot=False)["reboot_blocked"]


# ---- Secure Boot


def test_secure_boot_has_three_ways_out() -> None:
    look = GOOD + "secure_boot enabled\n"
    found = state(look)["secure_boot_fault"]
    assert all(word in found for word in ("Three ways out", "in the firmware", "nvidia_driver_secure_boot: mok", "nvidia_driver_secure_boot: ignore"))
    assert state(look, secure_boot="mok")["secure_boot_fault"] == "" and state(look, secure_boot="mok")["mok_hint"] == "mokutil --import /var/lib/dkms/mok.pub"
    assert state(look, secure_boot="ignore")["secure_boot_fault"] == ""
    assert state(GOOD + "secure_boot disabled\n")["secure_boot_fault"] == ""


def test_signed_modules_need_no_way_out() -> None:
    ubuntu = {"distribution": "Ubuntu", "version": "24.04", "architecture": "x86_64", "kernel": "6.8.0-60-generic"}
    built = gpu_host_packages(ubuntu, "driver", ["26ba"])
    assert "nvidia_driver_source: distro, whose modules Canonical signs" in state("secure_boot enabled\n", built)["secure_boot_fault"]
    assert state("secure_boot enabled\n", gpu_host_packages(ubuntu, "driver", ["26ba"], {"source": "distro"}))["secure_boot_fault"] == ""
    assert state("secure_boot enabled\n", built, secure_boot="mok")["mok_hint"].endswith("/MOK.der")


# ---- others


def test_a_runfile_is_known_by_its_module() -> None:
    plan = gpu_host_packages(HOST, "driver", ["26ba"], {"source": "runfile", "runfile": "/srv/NVIDIA-Linux-x86_64-580.173.02.run", "runfile_sha256": "0" * 64})
    tools = "package gcc 4:12.2 install installed\npackage make 4.3 install installed\npackage dkms 3.0.10 install installed\n"
    headers = f"package linux-headers-{KERNEL} 6 install installed\npackage linux-headers-amd64 6 install installed\n"
    assert state(f"kernel {KERNEL}\n" + tools + headers, plan)["missing"] == ["NVIDIA-Linux 580.173.02"]
    there = state(f"kernel {KERNEL}\nmodule nvidia 580.173.02\nuninstaller /usr/bin/nvidia-uninstall\n" + tools + headers, plan)
    assert there["missing"] == [] and there["foreign"] == [] and there["unheld"] == []


def test_somebody_elses_driver_is_named() -> None:
    assert state(f"kernel {KERNEL}\nuninstaller /usr/bin/nvidia-uninstall\n")["foreign"] == ["/usr/bin/nvidia-uninstall"]
    assert "nvidia-open" in state()["foreign"] and "nvidia-container-toolkit" not in state()["foreign"]


@given(st.text(max_size=300), st.booleans())
def test_any_look_is_survived(text: str, planned: bool) -> None:
    found = driver_state(text, PLAN if planned else {})
    assert isinstance(found["reboot_reasons"], list) and "\n" not in found["secure_boot_fault"]


# ---- the look itself, with fakes on PATH


def look(tmp_path: pathlib.Path, **tools: str) -> dict[str, list[str]]:
    for name, text in tools.items():
        path = tmp_path / name.replace("_", "-")
        path.write_text("#!/bin/sh\n" + text + "\n")
        path.chmod(0o755)
    done = subprocess.run(["sh", str(SCRIPT)], env={**os.environ, "PATH": f"{tmp_path}:/usr/bin:/bin"}, capture_output=True, text=True, check=True)
    found: dict[str, list[str]] = {}
    for line in done.stdout.splitlines():
        key, _space, value = line.partition(" ")
        found.setdefault(key, []).append(value)
    return found


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("echo 'SecureBoot enabled'", ["enabled"]),
        ("echo 'SecureBoot disabled'", ["disabled"]),
        ("echo 'EFI variables are not supported on this system' >&2; exit 1", None),
    ],
)
def test_look_asks_mokutil(tmp_path: pathlib.Path, answer: str, expected: list[str] | None) -> None:
    assert look(tmp_path, mokutil=answer).get("secure_boot") == expected


def test_look_asks_modinfo_for_the_running_kernel(tmp_path: pathlib.Path) -> None:
    found = look(
        tmp_path,
        uname="echo 6.1.0-56-amd64",
        modinfo='[ "$2 $5" = "6.1.0-56-amd64 nvidia-current" ] && echo 535.309.01',
        dkms="echo nvidia-current/535.309.01: added",
    )
    assert found["kernel"] == ["6.1.0-56-amd64"] and found["module"] == ["nvidia-current 535.309.01"] and found["dkms"] == ["nvidia-current/535.309.01: added"]


def test_look_names_packages_and_containers(tmp_path: pathlib.Path) -> None:
    found = look(tmp_path, dpkg_query="echo 'package nvidia-open 580.173.02-1 hold installed'", docker="echo 'container vllm'")
    assert found["package"] == ["nvidia-open 580.173.02-1 hold installed"] and found["container"] == ["vllm"]
    assert found["kernel"] == [os.uname().release]
