# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# PRIVATE: for the filters of this collection only; it may change in any release.
"""What roles/nvidia_driver/files/look.sh says of a host, and what follows from it. Pure."""

from __future__ import annotations

import fnmatch
import re
import typing as t
from collections.abc import Mapping, Sequence

from ansible_collections.selfhosted.fastgpt.plugins.plugin_utils._models import fault

# A local connection and a host without a permit end a run before the reboot, with a message.
NO_CONNECTION = ("local", "ansible.builtin.local", "community.docker.nsenter")


def parse(text: str) -> dict[str, list[str]]:
    """Lines `key value`; a key may come several times."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        key, _space, value = line.strip().partition(" ")
        if key:
            found.setdefault(key, []).append(value.strip())
    return found


def _without_epoch(version: str) -> str:
    return re.sub(r"^\d+:", "", version)


def packages_of(lines: Sequence[str]) -> dict[str, tuple[str, bool]]:
    """name: version and whether it is held, of installed packages."""
    found = {}
    for line in lines:
        parts = line.split()
        if len(parts) >= 4 and parts[3] == "installed":
            found[parts[0].partition(":")[0]] = (_without_epoch(parts[1]), parts[2] == "hold")
    return found


def _build_problem(plan: Mapping[str, t.Any], kernel: str, dkms: Sequence[str]) -> str:
    """Why there is no module for the running kernel, although apt or dnf were content."""
    own = [line for line in dkms if line.startswith("nvidia")]
    here = [line for line in own if re.search(rf"[,/] ?{re.escape(kernel)}[,/:]", line)]
    headers = " ".join(plan["headers"])
    if any("installed" in line.rpartition(":")[2] for line in here):
        # dkms is content and modinfo finds nothing: the module lies where depmod has not looked
        return f"dkms says installed for {kernel}, and modinfo finds no module. Run depmod -a {kernel} on the host, then run again"
    logs = "/var/lib/dkms/nvidia*/*/build/make.log"
    if any("built" in line or "BAD" in line or "rror" in line for line in here):
        return f"dkms built it for {kernel} and did not install it ({here[0]}). See {logs}, then run: dkms autoinstall -k {kernel}"
    if own:
        return (
            f"dkms knows the source and has no module for the running kernel {kernel} ({own[0]}). Either its headers are missing ({headers}), which is no "
            "fault "
            f"for apt and dnf, or the compiler failed ({logs}). Install the headers, or upgrade the kernel and reboot, then run: dkms autoinstall -k {kernel}"
        )
    return f"dkms knows no module of NVIDIA's. Look at the output of the installation, install {headers or 'the headers'}, then run again"


def driver_state(text: str, plan: Mapping[str, t.Any], options: Mapping[str, t.Any] | None = None) -> dict[str, t.Any]:
    """What stands, what is missing, and whether and when the host has to be rebooted."""
    wanted = {"connection": "ssh", "reboot": True, "over_containers": False, "secure_boot": "refuse", "hold": True, "upgrade": False, **(options or {})}
    look = parse(text)
    first = {key: values[0] for key, values in look.items()}
    kernel, loaded = first.get("kernel", ""), first.get("loaded", "")
    installed = packages_of(look.get("package", []))
    containers = sorted(set(look.get("container", [])))
    modules = dict(line.split()[:2] for line in look.get("module", []) if len(line.split()) >= 2)
    built = next((modules[name] for name in plan.get("module_names", ["nvidia", "nvidia-current"]) if name in modules), "")
    mark = first.get("managed", "")

    checked = plan.get("pin", {}).get("kind") not in ("name", "none", None)
    glob = plan.get("version_glob", "*")
    missing, wrong = [], []
    for name in [*plan.get("packages", []), *plan.get("headers", [])]:
        if name not in installed:
            missing.append(name)
        elif checked and name in plan["packages"] and not fnmatch.fnmatch(installed[name][0], glob):
            wrong.append(f"{name} {installed[name][0]}")
    runfile = plan.get("runfile") or {}
    if runfile and built != runfile["version"]:
        missing.append(f"NVIDIA-Linux {runfile['version']}")
    # the toolkit's names begin as the driver's do; its version is another
    ours = [
        name
        for name, (version, _held) in installed.items()
        if any(fnmatch.fnmatch(name, pattern) for pattern in plan.get("holds", [])) and (fnmatch.fnmatch(version, glob) or not checked)
    ]
    unheld = sorted(name for name in ours if not installed[name][1]) if wanted["hold"] else []
    foreign = sorted(
        name for name in installed if re.match(r"(nvidia-(driver|kernel|dkms|open|headless|utils)|cuda-drivers|kmod-nvidia|linux-modules-nvidia)", name)
    )
    if look.get("uninstaller") and not runfile:
        foreign.append(look["uninstaller"][0])

    reasons = []
    if "nouveau" in first:
        reasons.append("nouveau has the GPU")
    if loaded and built and loaded != built:
        reasons.append(f"version {loaded} is loaded and {built} installed")
    if built and not loaded:
        reasons.append("the module is installed and not loaded")
    blocked = ""
    if reasons:
        if wanted["connection"] in NO_CONNECTION:
            blocked = "Ansible runs on this very host and would end with it. Reboot it by hand, then run again"
        elif not wanted["reboot"]:
            blocked = "nvidia_driver_reboot is false. Reboot the host, then run again"
        elif containers and not wanted["over_containers"]:
            blocked = (
                f"containers run here: {', '.join(containers[:8])}. Stop them or move them away, or accept their restart with "
                "nvidia_driver_reboot_over_containers: true, then run again"
            )

    secure_boot_fault = ""
    if first.get("secure_boot") == "enabled" and wanted["secure_boot"] == "refuse" and not plan.get("signed", False):
        signed = (
            "nvidia_driver_source: distro, whose modules Canonical signs"
            if str(plan.get("platform", "")).startswith("ubuntu")
            else ("nvidia_driver_secure_boot: ignore, where the kernel loads unsigned modules all the same")
        )
        secure_boot_fault = fault(
            "nvidia_driver_secure_boot",
            "refuse",
            "Secure Boot is on, so that the kernel refuses a module which this host builds itself",
            "Three ways out: switch Secure Boot off in the firmware; nvidia_driver_secure_boot: mok, then enrol the key at the console as the run "
            f"says; or {signed}",
        )
    mok_key = "/var/lib/shim-signed/mok/MOK.der" if str(plan.get("platform", "")).startswith("ubuntu") else "/var/lib/dkms/mok.pub"
    return {
        "kernel": kernel,
        "managed": bool(mark),
        "mark": mark,
        "loaded": loaded,
        "built": built,
        "installed": {name: version for name, (version, _held) in installed.items()},
        "missing": missing,
        "wrong": wrong,
        "unheld": unheld,
        "held": sorted(name for name in installed if installed[name][1]),
        "foreign": foreign,
        "containers": containers,
        "nouveau": "nouveau" in first,
        "build_problem": ""
        if built or not plan.get("packages")
        else _build_problem(plan, kernel, look.get("dkms", []))
        if plan.get("dkms", True)
        else f"modinfo finds no module for the running kernel {kernel}: the distribution's are for {', '.join(plan['packages'][-1:])}. "
        "Boot such a kernel, then run again",
        "initramfs_stale": first.get("initramfs") == "stale",
        "reboot_reasons": reasons,
        "reboot_blocked": blocked,
        "secure_boot": first.get("secure_boot", "none"),
        "secure_boot_fault": secure_boot_fault,
        "mok_hint": f"mokutil --import {mok_key}" if first.get("secure_boot") == "enabled" and wanted["secure_boot"] == "mok" else "",
        "persistenced": "persistenced" in first,
        "nvswitch": "nvswitch" in first,
    }
