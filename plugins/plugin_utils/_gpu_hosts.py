# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# PRIVATE: for the filters of this collection only; it may change in any release.
"""What a GPU host needs from where: tables of distributions, driver branches and mirrors, and pure functions over them.

docs/gpu-hosts.md is rendered from these tables.
"""

from __future__ import annotations

import re
import typing as t
from collections.abc import Mapping, Sequence

from ansible_collections.selfhosted.fastgpt.plugins.module_utils._gpus import NAMES, capability_of
from ansible_collections.selfhosted.fastgpt.plugins.plugin_utils._models import fault, shown

# How far a row can be trusted. No row has seen a real GPU yet; the module gpu_facts has.
LAB = "lab"  # run in the lab, without a GPU and with stub packages
UNRUN = "not run"  # after the vendor's documentation
BEST_EFFORT = "best effort"  # the vendor has stopped
EXPERIMENTAL = "experimental"  # there is no repository of NVIDIA's, or nobody has told how it goes

# Distributions. `versions` are matched by their first part on all but Ubuntu, since Ansible says 12.11 where Debian 12 is meant.
#   cuda        folder of NVIDIA's repository, None where there is none
#   pin         how a branch is kept: a pinning package, a module stream, dnf's versionlock, or apt preferences of our own
#   archive     the distribution's own driver by flavour: packages, branch, components; {branch} is filled in
#   docker      path below the base URL of Docker's repository, and the release's name there where it is fixed
#   distro_docker   the distribution's own Docker
#   kernels     kernel of the release; other kernels are those of hardware enablement, with headers of another name
PLATFORMS: dict[str, dict[str, t.Any]] = {
    "debian12": {
        "title": "Debian 12", "distributions": ("Debian",), "version": "12", "manager": "apt", "support": LAB, "cuda": "debian12", "pin": "package",
        "docker": "debian", "distro_docker": ("docker.io",), "suite": "bookworm",
        # nvidia-open-kernel-dkms is of another version than the driver there, and cannot be installed beside it
        "archive": {"proprietary": {"branch": "535", "packages": ("nvidia-kernel-dkms", "nvidia-driver", "nvidia-smi", "nvidia-persistenced"),
                                    "components": "contrib non-free non-free-firmware"}},
    },
    "debian13": {
        "title": "Debian 13", "distributions": ("Debian",), "version": "13", "manager": "apt", "support": LAB, "cuda": "debian13", "pin": "package",
        "docker": "debian", "distro_docker": ("docker.io", "docker-cli"), "suite": "trixie",
        "archive": {
            "open": {"branch": "550", "packages": ("nvidia-open-kernel-dkms", "nvidia-driver", "nvidia-smi", "nvidia-persistenced"),
                     "components": "contrib non-free non-free-firmware"},
            "proprietary": {"branch": "550", "packages": ("nvidia-kernel-dkms", "nvidia-driver", "nvidia-smi", "nvidia-persistenced"),
                            "components": "contrib non-free non-free-firmware"},
        },
    },
    "ubuntu2004": {
        # the repository is frozen: no newer branch, and no pinning packages
        "title": "Ubuntu 20.04", "distributions": ("Ubuntu",), "version": "20.04", "manager": "apt", "support": BEST_EFFORT, "cuda": "ubuntu2004",
        "pin": "preferences", "newest": "575", "docker": "ubuntu", "distro_docker": ("docker.io",), "suite": "focal", "kernel": "5.4", "archive": "canonical",
    },
    "ubuntu2204": {
        "title": "Ubuntu 22.04", "distributions": ("Ubuntu",), "version": "22.04", "manager": "apt", "support": UNRUN, "cuda": "ubuntu2204",
        "pin": "package", "docker": "ubuntu", "distro_docker": ("docker.io",), "suite": "jammy", "kernel": "5.15", "archive": "canonical",
    },
    "ubuntu2404": {
        "title": "Ubuntu 24.04", "distributions": ("Ubuntu",), "version": "24.04", "manager": "apt", "support": UNRUN, "cuda": "ubuntu2404",
        "pin": "package", "docker": "ubuntu", "distro_docker": ("docker.io",), "suite": "noble", "kernel": "6.8", "archive": "canonical",
    },
    "ubuntu2604": {
        "title": "Ubuntu 26.04", "distributions": ("Ubuntu",), "version": "26.04", "manager": "apt", "support": UNRUN, "cuda": "ubuntu2604",
        # the repository begins with 595
        "pin": "package", "oldest": "595", "docker": "ubuntu", "distro_docker": ("docker.io",), "suite": "resolute", "archive": "canonical",
    },
    "rhel8": {
        "title": "RHEL family 8", "distributions": ("RedHat", "CentOS", "Rocky", "AlmaLinux", "OracleLinux"), "version": "8", "manager": "dnf",
        "support": UNRUN, "cuda": "rhel8", "pin": "stream", "docker": "rhel", "docker_release": "8", "extra_repository": "powertools",
    },
    "rhel9": {
        "title": "RHEL family 9", "distributions": ("RedHat", "CentOS", "Rocky", "AlmaLinux", "OracleLinux"), "version": "9", "manager": "dnf",
        "support": UNRUN, "cuda": "rhel9", "pin": "stream", "docker": "rhel", "docker_release": "9", "extra_repository": "crb",
    },
    "rhel10": {
        # there are no modules on 10: the module commands end with "filtered out by modular filtering"
        "title": "RHEL family 10", "distributions": ("RedHat", "CentOS", "Rocky", "AlmaLinux", "OracleLinux"), "version": "10", "manager": "dnf",
        "support": UNRUN, "cuda": "rhel10", "pin": "versionlock", "docker": "rhel", "docker_release": "10", "extra_repository": "crb",
    },
    "amzn2023": {
        "title": "Amazon Linux 2023", "distributions": ("Amazon",), "version": "2023", "manager": "dnf", "support": UNRUN, "cuda": "amzn2023",
        "pin": "stream", "distro_docker": ("docker",),
    },
    "kylin10": {
        "title": "Kylin V10", "distributions": ("Kylin Linux Advanced Server", "Kylin"), "version": "10", "manager": "dnf", "support": EXPERIMENTAL,
        "cuda": "kylin10", "pin": "stream", "docker": "centos", "docker_release": "8",
    },
    "openeuler": {
        "title": "openEuler", "distributions": ("openEuler",), "version": "", "manager": "dnf", "support": EXPERIMENTAL, "cuda": None, "pin": "none",
        "docker": "centos", "docker_release": "9",
    },
    "anolis": {
        "title": "Anolis OS", "distributions": ("Anolis", "Anolis OS", "OpenAnolis"), "version": "", "manager": "dnf", "support": EXPERIMENTAL, "cuda": None,
        "pin": "none", "docker": "centos", "docker_release": "8",
    },
}  # fmt: skip

# Driver branches: flavours of the kernel module, the compute capabilities from and to which a branch drives GPUs, and its standing in November 2026.
BRANCHES: dict[str, dict[str, t.Any]] = {
    "535": {"flavours": ("open", "proprietary"), "first": (5, 0), "last": (9, 0), "standing": "long-term, at its end"},
    "550": {"flavours": ("open", "proprietary"), "first": (5, 0), "last": (9, 0), "standing": "Debian 13's own"},
    "570": {"flavours": ("open", "proprietary"), "first": (5, 0), "last": (12, 1), "standing": "ended in February 2026"},
    "575": {"flavours": ("open", "proprietary"), "first": (5, 0), "last": (12, 1), "standing": "superseded"},
    "580": {"flavours": ("open", "proprietary"), "first": (5, 0), "last": (12, 1), "standing": "long-term, the default; the last for Maxwell, Pascal, Volta"},
    "590": {"flavours": ("open", "proprietary"), "first": (7, 5), "last": (12, 1), "standing": "superseded by 595"},
    "595": {"flavours": ("open", "proprietary"), "first": (7, 5), "last": (12, 1), "standing": "production"},
    "610": {"flavours": ("open", "proprietary"), "first": (7, 5), "last": (12, 1), "standing": "new"},
    "615": {"flavours": ("open", "proprietary"), "first": (7, 5), "last": (12, 1), "standing": "new"},
    "620": {"flavours": ("open",), "first": (7, 5), "last": (12, 1), "standing": "new; there is no proprietary module any more"},
}
DEFAULT_BRANCH = "580"
SOURCES = ("nvidia", "distro", "runfile")
FLAVOURS = ("open", "proprietary")

TURING = (7, 5)
FIRST_TURING_ID = 0x1E00
BLACKWELL = (10, 0)
# Grace Hopper: these need the open module, other Hopper GPUs take both
GRACE_HOPPER_IDS = (0x2342, 0x2345, 0x2348)
# GPUs that exist on boards with NVSwitch only, which the bus does not show
FABRIC_IDS = {0x2901: "B200", 0x2920: "B100", 0x3182: "B300"}
GRACE_BLACKWELL_IDS = {0x2941: "GB200", 0x31C2: "GB300"}

# kernel flavour -> meta package of its headers
DEBIAN_KERNELS = ("amd64", "cloud-amd64", "rt-amd64", "arm64", "cloud-arm64", "rt-arm64")
UBUNTU_KERNELS = ("generic", "lowlatency", "aws", "azure", "gcp", "oracle", "kvm", "ibm", "nvidia", "virtual", "generic-64k", "nvidia-64k")

# Base URLs by region. Each is also a variable of its own.
MIRRORS: dict[str, dict[str, t.Any]] = {
    "": {
        "cuda": "https://developer.download.nvidia.com/compute/cuda/repos",
        "toolkit": "https://nvidia.github.io/libnvidia-container",
        "docker": "https://download.docker.com/linux",
        "debian": "http://deb.debian.org",
        "registry_mirrors": [],
    },
    "cn": {
        "cuda": "https://developer.download.nvidia.cn/compute/cuda/repos",
        "toolkit": "https://mirrors.ustc.edu.cn/libnvidia-container",
        "docker": "https://mirrors.aliyun.com/docker-ce/linux",
        "debian": "https://mirrors.aliyun.com",
        "registry_mirrors": ["https://docker.m.daocloud.io"],
    },
}
CUDA_KEYS = {"apt": "3bf863cc.pub", "dnf": "D42D0685.pub"}
# Names of lists that older guides and packages have left behind
OBSOLETE_TOOLKIT = ("libnvidia-container.list", "nvidia-docker.list", "nvidia-container-runtime.list", "nvidia-container-toolkit.list")
TOOLKIT_PACKAGES = ("nvidia-container-toolkit", "nvidia-container-toolkit-base", "libnvidia-container-tools", "libnvidia-container1")
DOCKER_PACKAGES = ("docker-ce", "docker-ce-cli", "containerd.io")

# What a hold or a pin of ours is about. The toolkit shares the prefix and has versions of its own.
DRIVER_NAMES = ("nvidia-*", "libnvidia-*", "cuda-drivers*", "cuda-compat*", "libcuda1*", "libcudadebugger1*", "xserver-xorg-video-nvidia*",
                "firmware-nvidia-gsp*", "libnvcuvid1*", "libnvoptix1*", "kmod-nvidia-*")  # fmt: skip
UNATTENDED = ("nvidia-", "libnvidia-", "cuda-", "linux-modules-nvidia-")


class Refusal(Exception):
    """A fault line in the house's form."""


def _refuse(variable: str, value: t.Any, rule: str, remedy: str) -> t.NoReturn:
    raise Refusal(fault(variable, value if isinstance(value, str) and value.startswith("(") else shown(value), rule, remedy))


# ---- the host


def platform_of(distribution: str, version: str) -> str | None:
    """The row of a host, as Ansible's facts name it. A version is compared by its numbers, never as text: '10' is less than '8' there."""
    digits = re.findall(r"\d+", version)
    for name, row in PLATFORMS.items():
        if distribution not in row["distributions"]:
            continue
        wanted = re.findall(r"\d+", row["version"])
        if [int(part) for part in digits[: len(wanted)]] == [int(part) for part in wanted] and (digits or not wanted):
            return name
    return None


def _platform(host: Mapping[str, t.Any]) -> tuple[str, dict[str, t.Any]]:
    distribution, version = str(host.get("distribution") or ""), str(host.get("version") or "")
    name = platform_of(distribution, version)
    if name is None:
        known = ", ".join(row["title"] for row in PLATFORMS.values())
        _refuse(
            "ansible_distribution",
            f"({distribution or 'unknown'} {version})".replace(" )", ")"),
            f"is none of {known}",
            "Use one of these, or install by hand: a driver, a toolkit or a Docker that works is used as it is",
        )
    row = PLATFORMS[name]
    architecture = str(host.get("architecture") or "")
    if architecture not in ("x86_64", "aarch64"):
        _refuse("ansible_architecture", architecture, "there are packages for x86_64 and aarch64 only", "Use another host")
    python = [int(part) for part in re.findall(r"\d+", str(host.get("python") or ""))[:2]]
    if python and python < [3, 8]:
        _refuse(
            "ansible_python_version",
            str(host.get("python")),
            "is too old for this release of Ansible, which asks for Python 3.8 or newer on the host",
            "Install one and name it: ansible -m raw -b -a 'dnf -y install python3.11', then ansible_python_interpreter: /usr/bin/python3.11",
        )
    return name, row


def _deb_architecture(architecture: str) -> str:
    return {"x86_64": "amd64", "aarch64": "arm64"}[architecture]


def _base(given: str, what: str, region: str) -> str:
    if region not in MIRRORS:
        _refuse("mirror_region", region, "there is no such preset", f"Leave it empty, or choose from: {', '.join(name for name in MIRRORS if name)}")
    return (given or str(MIRRORS[region][what])).rstrip("/")


# ---- GPUs


def _capability(device_id: int) -> tuple[int, int]:
    text = capability_of(device_id)
    if text is None:
        # newer than the table, or unheard of: what is sure is the side of the line on which it lies
        return TURING if device_id >= FIRST_TURING_ID else (5, 0)
    major, _dot, minor = text.partition(".")
    return int(major), int(minor)


def _device(device_id: int) -> str:
    return f"{NAMES.get(device_id, 'NVIDIA GPU')} ({device_id:04x})"


def flavour_of(device_ids: Sequence[int], branch: str, wanted: str = "auto") -> str:
    """Open or proprietary kernel module. Raises where no module of the branch drives all of these GPUs."""
    if branch not in BRANCHES:
        first_number = re.match(r"(\d{3})\b", branch)
        hint = (
            f"write the branch alone: {first_number.group(1)}" if first_number and first_number.group(1) in BRANCHES else f"choose from: {', '.join(BRANCHES)}"
        )
        _refuse(
            "nvidia_driver_branch", branch, "is no driver branch that this release knows; a branch is the first number of a version", f"Leave it out, or {hint}"
        )
    row = BRANCHES[branch]
    if wanted not in ("auto", *FLAVOURS):
        _refuse("nvidia_driver_module", wanted, "must be auto, open or proprietary", "Leave it out for auto")
    capabilities = {device_id: _capability(device_id) for device_id in device_ids}
    too_old = [device_id for device_id, has in capabilities.items() if has < row["first"]]
    too_new = [device_id for device_id, has in capabilities.items() if has > row["last"]]
    if too_old:
        works = [name for name, other in BRANCHES.items() if all(has >= other["first"] for has in capabilities.values()) and not too_new]
        remedy = (
            f"Set nvidia_driver_branch: {DEFAULT_BRANCH if DEFAULT_BRANCH in works else works[-1]}"
            if works
            else "Take the GPU out: no branch that is kept drives it"
        )
        _refuse("nvidia_driver_branch", branch, f"does not drive {', '.join(map(_device, too_old))}", remedy)
    if too_new:
        _refuse("nvidia_driver_branch", branch, f"is older than {', '.join(map(_device, too_new))}", f"Set nvidia_driver_branch: {DEFAULT_BRANCH}")
    closed_only = [device_id for device_id, has in capabilities.items() if has < TURING]
    open_only = [device_id for device_id, has in capabilities.items() if has >= BLACKWELL or device_id in GRACE_HOPPER_IDS]
    if closed_only and open_only:
        _refuse(
            "nvidia_driver_module",
            wanted,
            f"{', '.join(map(_device, closed_only))} need the proprietary kernel module, {', '.join(map(_device, open_only))} the open one, and a host has one",
            "Move one of them to another host",
        )
    if wanted == "open" and closed_only:
        _refuse("nvidia_driver_module", wanted, f"the open module drives Turing and newer, not {', '.join(map(_device, closed_only))}", "Leave it out for auto")
    if wanted == "proprietary" and open_only:
        _refuse("nvidia_driver_module", wanted, f"{', '.join(map(_device, open_only))} need the open module", "Leave it out for auto")
    flavour = wanted if wanted != "auto" else "proprietary" if closed_only else "open"
    if flavour not in row["flavours"]:
        last = [name for name, other in BRANCHES.items() if flavour in other["flavours"]][-1]
        _refuse(
            "nvidia_driver_module", wanted, f"branch {branch} has no {flavour} module", f"Leave it out for auto, or set nvidia_driver_branch to {last} or older"
        )
    return flavour


# ---- kernels


def headers_of(platform: str, kernel: str) -> list[str]:
    """Headers of the running kernel, and the meta package that brings those of the next one."""
    row = PLATFORMS[platform]
    if row["manager"] == "dnf":
        if platform in ("rhel9", "rhel10"):
            return ["kernel-devel-matched", "kernel-headers"]
        return [f"kernel-devel-{kernel}", "kernel-headers"]
    names = [f"linux-headers-{kernel}"]
    kinds = DEBIAN_KERNELS if platform.startswith("debian") else UBUNTU_KERNELS
    kind = max((kind for kind in kinds if kernel.endswith("-" + kind)), key=len, default=None)
    if kind:
        # a kernel of hardware enablement has headers of another name
        enabled = row.get("kernel") and kind in ("generic", "lowlatency") and not kernel.startswith(row["kernel"] + ".")
        names.append(f"linux-headers-{kind}" + (f"-hwe-{row['version']}" if enabled else ""))
    return names


# ---- the driver


def _nvidia_apt(platform: str, branch: str, flavour: str, variant: str) -> list[str]:
    is_open = flavour == "open"
    if variant == "full":
        return ["nvidia-open" if is_open else "cuda-drivers"]
    if platform.startswith("debian"):
        return ["nvidia-driver-cuda", "nvidia-kernel-open-dkms" if is_open else "nvidia-kernel-dkms"]
    # from 590 on the names have no branch in them
    if int(branch) >= 590:
        return ["libnvidia-compute", "nvidia-dkms-open" if is_open else "nvidia-dkms"]
    return [f"libnvidia-compute-{branch}", f"nvidia-utils-{branch}", f"nvidia-dkms-{branch}" + ("-open" if is_open else "")]


def _nvidia_dnf(flavour: str, variant: str) -> list[str]:
    if variant == "full":
        return ["nvidia-open" if flavour == "open" else "cuda-drivers"]
    return ["nvidia-driver-cuda", "kmod-nvidia-open-dkms" if flavour == "open" else "kmod-nvidia-latest-dkms"]


def _repository(
    name: str, manager: str, url: str, key: str, suites: str = "/", components: str = "", conflicts: t.Sequence[str] = (), **more: t.Any
) -> dict[str, t.Any]:
    """`conflicts` are parts of URLs: the same repository in somebody else's list, with another key, stops apt altogether."""
    shared = more.get("same_signature", False)
    return {
        "name": f"selfhosted-fastgpt-{name}",
        "manager": manager,
        "url": url,
        "suites": suites,
        "components": components,
        "key": key,
        "conflicts": [] if shared else [*conflicts, url.partition("://")[2].rstrip("/")],
        "obsolete": [],
        "same_signature": False,
        **more,
    }


def cuda_repository(host: Mapping[str, t.Any], base: str = "", key: str = "", region: str = "") -> dict[str, t.Any]:
    """NVIDIA's repository of driver and CUDA for this host."""
    name, row = _platform(host)
    if not row["cuda"]:
        _refuse("ansible_distribution", f"({row['title']})", "NVIDIA has no package repository for it", "Use nvidia_driver_source: runfile")
    architecture = {"x86_64": "x86_64", "aarch64": "sbsa"}[str(host["architecture"])]
    # a base may be the repository itself, as a local mirror usually is
    folder = f"{row['cuda']}/{architecture}"
    base = _base(base, "cuda", region)
    url = base if base.startswith("file:") else f"{base}/{folder}"
    return _repository(
        "cuda",
        row["manager"],
        url,
        key or f"{url}/{CUDA_KEYS[row['manager']]}",
        conflicts=[f"/compute/cuda/repos/{row['cuda']}/", "/nvidia-cuda/", "/var/cuda-repo-", "/var/nvidia-driver-local-repo-"],
    )


def toolkit_repository(host: Mapping[str, t.Any], base: str = "", key: str = "", region: str = "") -> dict[str, t.Any]:
    """The container toolkit's repository; one for all distributions."""
    _name, row = _platform(host)
    base = _base(base, "toolkit", region)
    architecture = str(host["architecture"])
    if row["manager"] == "apt":
        url = base if base.startswith("file:") else f"{base}/stable/deb/{_deb_architecture(architecture)}"
    else:
        url = base if base.startswith("file:") else f"{base}/stable/rpm/{architecture}"
    return _repository(
        "nvidia-container-toolkit",
        row["manager"],
        url,
        key or f"{base}/gpgkey",
        obsolete=list(OBSOLETE_TOOLKIT),
        conflicts=["/libnvidia-container/", "/nvidia-docker/", "/nvidia-container-runtime/"],
        repo_gpgcheck=True,
        gpgcheck=False,
    )


def _source(name: str, row: Mapping[str, t.Any], source: str) -> str:
    if source not in ("auto", *SOURCES):
        _refuse("nvidia_driver_source", source, "must be auto, nvidia, distro or runfile", "Leave it out for auto")
    if source == "auto":
        return "nvidia" if row["cuda"] else "runfile"
    if source == "nvidia" and not row["cuda"]:
        _refuse("nvidia_driver_source", source, f"NVIDIA has no package repository for {row['title']}", "Use runfile")
    if source == "distro" and not row.get("archive"):
        _refuse("nvidia_driver_source", source, f"{row['title']} has no driver of NVIDIA of its own", "Use nvidia" if row["cuda"] else "Use runfile")
    return source


def driver_plan(host: Mapping[str, t.Any], device_ids: Sequence[int] = (), options: Mapping[str, t.Any] | None = None) -> dict[str, t.Any]:
    """Everything that follows for the driver of a host. Raises Refusal."""
    wanted = {
        "source": "auto",
        "branch": DEFAULT_BRANCH,
        "module": "auto",
        "variant": "full",
        "secure_boot": "refuse",
        "repository": "",
        "repository_key": "",
        "region": "",
        "runfile": "",
        "runfile_sha256": "",
        "debian_mirror": "",
        "nvswitch": False,
        **(options or {}),
    }
    name, row = _platform(host)
    source = _source(name, row, str(wanted["source"]))
    branch = str(wanted["branch"])
    if wanted["variant"] not in ("full", "compute"):
        _refuse("nvidia_driver_variant", wanted["variant"], "must be full or compute", "Leave it out for full")
    archive = row.get("archive") if source == "distro" else None
    if isinstance(archive, Mapping):
        own = next(iter(archive.values()))["branch"]
        if branch != own:
            _refuse(
                "nvidia_driver_branch",
                branch,
                f"{row['title']}'s own archive has branch {own} only",
                f"Set nvidia_driver_branch: {own}, or nvidia_driver_source: nvidia",
            )
    flavour = flavour_of(device_ids, branch, str(wanted["module"]))
    if isinstance(archive, Mapping) and flavour not in archive:
        if wanted["module"] != "auto" or any(_capability(device_id) >= BLACKWELL for device_id in device_ids):
            _refuse(
                "nvidia_driver_module",
                wanted["module"],
                f"{row['title']}'s own archive has no {flavour} module that can be installed beside its driver",
                "Set nvidia_driver_module: proprietary, or nvidia_driver_source: nvidia",
            )
        flavour = flavour_of(device_ids, branch, next(iter(archive)))
    architecture = str(host["architecture"])
    if source == "nvidia":
        for bound, wrong, word in (
            ("newest", int(branch) > int(row.get("newest", branch)), "ends"),
            ("oldest", int(branch) < int(row.get("oldest", branch)), "begins"),
        ):
            if wrong:
                other = f", or nvidia_driver_source: distro for {branch}" if row.get("archive") else ""
                _refuse(
                    "nvidia_driver_branch",
                    branch,
                    f"NVIDIA's repository for {row['title']} {word} with {row[bound]}",
                    f"Set nvidia_driver_branch: {row[bound] if bound == 'oldest' else '570'}{other}",
                )

    warnings = []
    if row["support"] not in (LAB,):
        warnings.append(f"{row['title']}: {row['support']}, see docs/gpu-hosts.md")
    if "end" in BRANCHES[branch]["standing"] and "default" not in BRANCHES[branch]["standing"]:
        warnings.append(f"branch {branch}: {BRANCHES[branch]['standing']}")

    plan: dict[str, t.Any] = {
        "platform": name,
        "support": row["support"],
        "manager": row["manager"],
        "source": source,
        "branch": branch,
        "flavour": flavour,
        "repositories": [],
        "prerequisites": [],
        "extra_repository": "",
        "packages": [],
        "headers": [],
        "pin": {"kind": "none"},
        "signed": False,
        "dkms": True,
        "module_names": ["nvidia"],
        "version_glob": f"{branch}.*",
        "holds": list(DRIVER_NAMES),
        "unattended": list(UNATTENDED),
        "fabric": [],
        "warnings": warnings,
        "runfile": {},
    }
    plan["headers"] = headers_of(name, str(host.get("kernel") or "")) if host.get("kernel") else []

    if source == "runfile":
        plan["runfile"] = _runfile(architecture, branch, flavour, str(wanted["runfile"]), str(wanted["runfile_sha256"]))
        plan["packages"] = ["gcc", "make", "dkms"]
        plan["holds"], plan["unattended"] = [], []
    elif source == "distro" and archive == "canonical":
        suffix = "-open" if flavour == "open" else ""
        kind = next((kind for kind in sorted(UBUNTU_KERNELS, key=len, reverse=True) if str(host.get("kernel") or "").endswith("-" + kind)), "generic")
        hwe = str(host.get("kernel") or "") and row.get("kernel") and kind == "generic" and not str(host["kernel"]).startswith(row["kernel"] + ".")
        plan["packages"] = [
            f"nvidia-headless-no-dkms-{branch}-server{suffix}",
            f"nvidia-utils-{branch}-server",
            f"linux-modules-nvidia-{branch}-server{suffix}-{kind}" + (f"-hwe-{row['version']}" if hwe else ""),
        ]
        # built and signed by Canonical: no compiler, no headers, and Secure Boot takes them
        plan |= {"signed": True, "dkms": False, "headers": [], "pin": {"kind": "name", "branch": branch}}
    elif source == "distro":
        own_row = archive[flavour]  # type: ignore[index]
        plan["packages"] = list(own_row["packages"])
        plan["module_names"] = ["nvidia-current", "nvidia"]
        mirror = _base(str(wanted["debian_mirror"]), "debian", str(wanted["region"]))
        common = {"components": own_row["components"], "same_signature": True}
        plan["repositories"] = [
            _repository("nonfree", "apt", f"{mirror}/debian", "", f"{row['suite']} {row['suite']}-updates", **common),
            _repository("nonfree-security", "apt", f"{mirror}/debian-security", "", f"{row['suite']}-security", **common),
        ]
        plan["pin"] = {"kind": "preferences", "branch": branch, "packages": list(DRIVER_NAMES), "version": f"{branch}.*"}
    else:
        plan["repositories"] = [cuda_repository(host, str(wanted["repository"]), str(wanted["repository_key"]), str(wanted["region"]))]
        if row["manager"] == "apt":
            plan["packages"] = _nvidia_apt(name, branch, flavour, str(wanted["variant"]))
        else:
            plan["packages"] = _nvidia_dnf(flavour, str(wanted["variant"]))
            plan["extra_repository"] = row.get("extra_repository", "")
            plan["prerequisites"] = _epel(str(host["distribution"]), name)
        plan["pin"] = _pin(row["pin"], branch, flavour)
    plan["fabric"] = _fabric(row["manager"], branch, device_ids, bool(wanted["nvswitch"]))
    return plan


def _epel(distribution: str, platform: str) -> list[str]:
    """dkms comes from EPEL."""
    major = platform.removeprefix("rhel")
    if not platform.startswith("rhel"):
        return ["dkms"]
    if distribution == "OracleLinux":
        return [f"oracle-epel-release-el{major}", "dkms"]
    if distribution == "RedHat":
        return [f"https://dl.fedoraproject.org/pub/epel/epel-release-latest-{major}.noarch.rpm", "dkms"]
    return ["epel-release", "dkms"]


def _pin(kind: str, branch: str, flavour: str) -> dict[str, t.Any]:
    pin: dict[str, t.Any] = {"kind": kind, "branch": branch}
    if kind == "package":
        pin["package"] = f"nvidia-driver-pinning-{branch}"
    elif kind == "stream":
        pin["stream"] = f"nvidia-driver:{branch}-{'open' if flavour == 'open' else 'dkms'}"
    elif kind == "versionlock":
        pin |= {"pattern": f"*nvidia*{branch}*", "package": "python3-dnf-plugin-versionlock"}
    elif kind == "preferences":
        pin |= {"packages": list(DRIVER_NAMES), "version": f"{branch}.*"}
    return pin


def _runfile(architecture: str, branch: str, flavour: str, where: str, digest: str) -> dict[str, t.Any]:
    found = re.search(r"NVIDIA-Linux-(x86_64|aarch64)-(\d{3}(?:\.\d+){1,2})\.run$", where)
    if not found:
        _refuse(
            "nvidia_driver_runfile",
            where,
            "must be the URL, or the path on the host, of NVIDIA-Linux-<architecture>-<version>.run",
            "Name it, such as https://us.download.nvidia.com/tesla/580.173.02/NVIDIA-Linux-x86_64-580.173.02.run, with nvidia_driver_runfile_sha256",
        )
    if found.group(1) != architecture:
        _refuse("nvidia_driver_runfile", where, f"is for another machine than this one, {architecture}", "Name the one for this architecture")
    if found.group(2).partition(".")[0] != branch:
        _refuse(
            "nvidia_driver_runfile",
            where,
            f"is not of the branch {branch}",
            f"Set nvidia_driver_branch: {shown(found.group(2).partition('.')[0])}, or name another file",
        )
    if not re.fullmatch(r"[0-9a-f]{64}", digest):
        _refuse(
            "nvidia_driver_runfile_sha256",
            digest,
            "must be the SHA-256 of the file, 64 small hexadecimal digits",
            "Set it: what runs as root has to be what was meant",
        )
    return {"where": where, "sha256": digest, "version": found.group(2), "arguments": ["--silent", "--dkms", f"--kernel-module-type={flavour}"]}


def _fabric(manager: str, branch: str, device_ids: Sequence[int], nvswitch: bool) -> list[str]:
    """Packages of the fabric manager; {version} is the driver's, which it must equal."""
    if any(device_id in GRACE_BLACKWELL_IDS for device_id in device_ids):
        return ["nvidia-imex={version}*"] if manager == "apt" else ["nvidia-imex-{version}"]
    new = [device_id for device_id in device_ids if device_id in FABRIC_IDS]
    if not nvswitch and not new:
        return []
    more = ["nvlsm", "libnvsdm"] if new else []
    if manager == "dnf":
        return ["nvidia-fabric-manager-{version}", *more]
    if int(branch) < 580:
        return [f"nvidia-fabricmanager-{branch}={{version}}*", *more]
    return ["nvidia-fabricmanager={version}*", *more]


# ---- container toolkit, CUDA, Docker


def toolkit_plan(host: Mapping[str, t.Any], options: Mapping[str, t.Any] | None = None) -> dict[str, t.Any]:
    """The container toolkit: four packages at one version, since each wants exactly the others'."""
    wanted = {"version": "", "repository": "", "repository_key": "", "region": "", **(options or {})}
    name, row = _platform(host)
    version = str(wanted["version"])
    if not re.fullmatch(r"\d+\.\d+\.\d+-\d+", version):
        _refuse("nvidia_container_toolkit_version", version, "must be a whole version of the packages", "Write it as 1.20.0-1")
    if [int(part) for part in re.findall(r"\d+", version)[:2]] < [1, 18]:
        _refuse(
            "nvidia_container_toolkit_version",
            version,
            "does not keep its CDI specification up to date by itself, which begins with 1.18",
            "Set 1.18.0-1 or newer",
        )
    joint = "=" if row["manager"] == "apt" else "-"
    return {
        "platform": name,
        "manager": row["manager"],
        "version": version,
        "names": list(TOOLKIT_PACKAGES),
        "packages": [f"{package}{joint}{version}" for package in TOOLKIT_PACKAGES],
        "repositories": [toolkit_repository(host, str(wanted["repository"]), str(wanted["repository_key"]), str(wanted["region"]))],
    }


def cuda_plan(host: Mapping[str, t.Any], options: Mapping[str, t.Any] | None = None) -> dict[str, t.Any]:
    """A pinned CUDA toolkit. Never the package `cuda`, which brings a driver."""
    wanted = {"version": "", "repository": "", "repository_key": "", "region": "", "capabilities": [], **(options or {})}
    name, row = _platform(host)
    found = re.fullmatch(r"(\d+)\.(\d+)", str(wanted["version"]))
    if not found:
        _refuse("cuda_toolkit_version", wanted["version"], "must be a release of CUDA with two numbers", 'Write it as "12.8"')
    if int(found.group(1)) >= 13:
        old = [text for text in wanted["capabilities"] if tuple(map(int, str(text).split("."))) < TURING]
        if old:
            _refuse(
                "cuda_toolkit_version",
                wanted["version"],
                f"CUDA 13 compiles nothing for the compute capability {', '.join(map(str, old))} of this host",
                'Set "12.8"',
            )
    return {
        "platform": name,
        "manager": row["manager"],
        "packages": [f"cuda-toolkit-{found.group(1)}-{found.group(2)}"],
        "path": f"/usr/local/cuda-{found.group(0)}",
        "library_path": f"/usr/local/cuda-{found.group(0)}/lib64",
        "repositories": [cuda_repository(host, str(wanted["repository"]), str(wanted["repository_key"]), str(wanted["region"]))],
    }


def docker_plan(host: Mapping[str, t.Any], options: Mapping[str, t.Any] | None = None) -> dict[str, t.Any]:
    """Docker from the distribution, or from Docker's own repository or a mirror of it."""
    wanted = {"source": "distro", "repository": "", "repository_key": "", "region": "", **(options or {})}
    name, row = _platform(host)
    source = str(wanted["source"])
    if source not in ("distro", "docker"):
        _refuse("container_engine_source", source, "must be distro or docker", "Leave it out for distro")
    common = ["iptables"] + (["python3-requests"] if row["manager"] == "apt" else [])
    plan = {"platform": name, "manager": row["manager"], "support": row["support"], "source": source, "repositories": [], "conflicts": []}
    base = _base(str(wanted["repository"]), "docker", str(wanted["region"]))
    plan["registry_mirrors"] = list(MIRRORS[str(wanted["region"])]["registry_mirrors"])
    if source == "distro":
        if not row.get("distro_docker"):
            _refuse("container_engine_source", source, f"{row['title']} has no Docker of its own", "Set container_engine_source: docker")
        return plan | {"packages": [*row["distro_docker"], *common]}
    if not row.get("docker"):
        _refuse("container_engine_source", source, f"Docker has no repository for {row['title']}", "Set container_engine_source: distro")
    url = f"{base}/{row['docker']}"
    if row["manager"] == "apt":
        repository = _repository(
            "docker",
            "apt",
            url,
            str(wanted["repository_key"]) or f"{url}/gpg",
            row["suite"],
            "stable",
            conflicts=[f"download.docker.com/linux/{row['docker']}"],
        )
        conflicts = ["docker.io", "docker-doc", "docker-compose", "docker-compose-v2", "podman-docker", "containerd", "runc", "docker-cli"]
    else:
        folder = f"{url}/{row['docker_release']}/{host['architecture']}/stable"
        repository = _repository("docker", "dnf", folder, str(wanted["repository_key"]) or f"{url}/gpg", repo_gpgcheck=False, gpgcheck=True)
        conflicts = ["docker", "docker-client", "docker-common", "docker-engine", "podman-docker", "runc"]
    return plan | {"packages": [*DOCKER_PACKAGES, *common], "repositories": [repository], "conflicts": conflicts}


PLANS: dict[str, t.Callable[..., dict[str, t.Any]]] = {"driver": driver_plan, "toolkit": toolkit_plan, "cuda": cuda_plan, "docker": docker_plan}
