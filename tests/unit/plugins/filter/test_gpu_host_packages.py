# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which packages from where, for every distribution of the table, also those that nothing here has run on."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from ansible.errors import AnsibleFilterError
from ansible_collections.selfhosted.fastgpt.plugins.filter.gpu_host_packages import gpu_host_packages
from ansible_collections.selfhosted.fastgpt.plugins.plugin_utils import _gpu_hosts as table
from hypothesis import given
from hypothesis import strategies as st

T4, V100, P40, L20, H100, GH200, B200, RTX5090, K80 = 0x1EB8, 0x1DB6, 0x1B38, 0x26BA, 0x2330, 0x2342, 0x2901, 0x2B85, 0x102D
KERNELS = {"apt": {"Debian": "6.1.0-56-amd64", "Ubuntu": "6.8.0-60-generic"}, "dnf": {}}


def host(distribution: str = "Debian", version: str = "12.11", architecture: str = "x86_64", **more: Any) -> dict[str, Any]:
    return {"distribution": distribution, "version": version, "architecture": architecture, **more}


def driver(given_host: dict[str, Any], devices: Any = (T4,), **options: Any) -> dict[str, Any]:
    found = gpu_host_packages(given_host, "driver", list(devices), options)
    assert found["fault"] == "", found["fault"]
    return found


def refused(given_host: dict[str, Any], devices: Any = (T4,), what: str = "driver", **options: Any) -> str:
    found = gpu_host_packages(given_host, what, list(devices), options)
    assert set(found) == {"fault"} and found["fault"], found
    # variable: value: rule. Remedy.
    assert re.fullmatch(r"[a-z0-9_]+: .+: .+\. .+\.", found["fault"]), found["fault"]
    return str(found["fault"])


# ---- the traps


def test_debian_says_12_11_where_12_is_meant() -> None:
    found = driver(host("Debian", "12.11"))
    assert found["platform"] == "debian12"
    assert found["repositories"][0]["url"] == "https://developer.download.nvidia.com/compute/cuda/repos/debian12/x86_64"
    assert driver(host("Debian", "13"))["platform"] == "debian13"
    assert driver(host("Ubuntu", "24.04"))["platform"] == "ubuntu2404"


@pytest.mark.parametrize(("version", "platform"), [("8.10", "rhel8"), ("9.7", "rhel9"), ("10.1", "rhel10"), ("10", "rhel10")])
def test_release_10_is_not_less_than_8(version: str, platform: str) -> None:
    for distribution in ("RedHat", "Rocky", "AlmaLinux", "OracleLinux", "CentOS"):
        assert driver(host(distribution, version))["platform"] == platform


def test_release_10_gets_no_module_commands() -> None:
    found = driver(host("Rocky", "10.1"))
    assert found["pin"] == {"kind": "versionlock", "branch": "580", "pattern": "*nvidia*580*", "package": "python3-dnf-plugin-versionlock"}
    assert "stream" not in json.dumps(found["pin"])


def test_arm_servers_are_called_sbsa() -> None:
    found = driver(host("Ubuntu", "22.04", "aarch64"))
    assert found["repositories"][0]["url"].endswith("/ubuntu2204/sbsa")
    toolkit = gpu_host_packages(host("Ubuntu", "22.04", "aarch64"), "toolkit", options={"version": "1.20.0-1"})
    assert toolkit["repositories"][0]["url"].endswith("/stable/deb/arm64")
    assert "ppc64le" in refused(host(architecture="ppc64le"))


def test_names_lose_their_branch_with_590() -> None:
    jammy = host("Ubuntu", "22.04")
    assert driver(jammy, branch="580", variant="compute")["packages"] == ["libnvidia-compute-580", "nvidia-utils-580", "nvidia-dkms-580-open"]
    assert driver(jammy, branch="595", variant="compute")["packages"] == ["libnvidia-compute", "nvidia-dkms-open"]
    for branch in table.BRANCHES:
        if branch not in ("535", "550"):
            assert driver(jammy, branch=branch)["packages"] == ["nvidia-open"]
    assert driver(jammy, (V100,))["packages"] == ["cuda-drivers"]


def test_620_has_no_proprietary_module() -> None:
    assert driver(host(), branch="620")["flavour"] == "open"
    assert "branch 620 has no proprietary module" in refused(host(), branch="620", module="proprietary")
    assert "nvidia_driver_branch: 580" in refused(host(), (V100,), branch="620")


def test_a_version_is_no_branch() -> None:
    """What a module stream named nvidia-driver:525.125.06 came from."""
    assert "write the branch alone: 580" in refused(host("Rocky", "9.7"), branch="580.173.02")
    for branch in ("latest", "515", "", "580-open", "nvidia-driver:580"):
        assert refused(host(), branch=branch).startswith("nvidia_driver_branch: ")


def test_bookworms_own_open_module_cannot_be_installed_beside_its_driver() -> None:
    assert driver(host(), source="distro", branch="535")["packages"][0] == "nvidia-kernel-dkms"
    assert driver(host(), source="distro", branch="535")["flavour"] == "proprietary"
    assert "nvidia_driver_source: nvidia" in refused(host(), source="distro", branch="535", module="open")
    assert driver(host(version="13.2"), source="distro", branch="550")["packages"][0] == "nvidia-open-kernel-dkms"


def test_an_archive_has_one_branch() -> None:
    assert "branch 535 only" in refused(host(), source="distro")
    assert "branch 550 only" in refused(host(version="13"), source="distro", branch="535")


def test_ubuntu_2004_is_frozen() -> None:
    focal = host("Ubuntu", "20.04")
    assert "ends with 575" in refused(focal) and "nvidia_driver_source: distro" in refused(focal)
    found = driver(focal, branch="570")
    assert found["pin"]["kind"] == "preferences" and found["pin"]["version"] == "570.*" and found["support"] == "best effort"


def test_canonicals_modules_are_signed_and_need_no_compiler() -> None:
    found = driver(host("Ubuntu", "24.04", kernel="6.8.0-60-generic"), source="distro")
    assert found["packages"] == ["nvidia-headless-no-dkms-580-server-open", "nvidia-utils-580-server", "linux-modules-nvidia-580-server-open-generic"]
    assert found["signed"] and not found["dkms"] and found["headers"] == [] and found["repositories"] == []
    assert driver(host("Ubuntu", "24.04", kernel="6.8.0-60-generic"), (P40,), source="distro")["packages"][2] == "linux-modules-nvidia-580-server-generic"
    assert driver(host("Ubuntu", "22.04", kernel="6.8.0-1010-aws"), source="distro")["packages"][2].endswith("-open-aws")
    assert driver(host("Ubuntu", "22.04", kernel="6.8.0-60-generic"), source="distro")["packages"][2].endswith("-generic-hwe-22.04")


@pytest.mark.parametrize("distribution", ["openEuler", "Anolis"])
def test_where_nvidia_has_no_repository_a_runfile_is_asked_for(distribution: str) -> None:
    version = {"openEuler": "22.03", "Anolis": "8.9"}[distribution]
    assert "nvidia_driver_runfile" in refused(host(distribution, version))
    assert "Use runfile" in refused(host(distribution, version), source="nvidia")
    found = driver(host(distribution, version, kernel="5.10.0-60.18.0.50.oe2203.x86_64"), source="runfile",
                   runfile="https://mirror.example/NVIDIA-Linux-x86_64-580.173.02.run", runfile_sha256="0" * 64)  # fmt: skip
    assert found["runfile"]["version"] == "580.173.02" and found["runfile"]["arguments"] == ["--silent", "--dkms", "--kernel-module-type=open"]
    assert found["headers"] == ["kernel-devel-5.10.0-60.18.0.50.oe2203.x86_64", "kernel-headers"] and found["support"] == "experimental"


@pytest.mark.parametrize(
    ("where", "digest", "word"),
    [
        ("NVIDIA-Linux-x86_64-580.173.02.run", "", "SHA-256"),
        ("NVIDIA-Linux-x86_64-580.173.02.run", "A" * 64, "SHA-256"),
        ("NVIDIA-Linux-aarch64-580.173.02.run", "0" * 64, "another machine"),
        ("NVIDIA-Linux-x86_64-535.309.01.run", "0" * 64, "not of the branch 580"),
        ("cuda_12.8_linux.run", "0" * 64, "must be the URL"),
    ],
)
def test_a_runfile_is_what_was_meant_or_refused(where: str, digest: str, word: str) -> None:
    assert word in refused(host(), source="runfile", runfile=f"/srv/{where}", runfile_sha256=digest)


def test_python_of_release_8_is_too_old() -> None:
    found = refused(host("Rocky", "8.10", python="3.6.8"))
    assert found.startswith("ansible_python_version: ") and "dnf -y install python3.11" in found
    assert driver(host("Rocky", "8.10", python="3.11.9"))["platform"] == "rhel8"


@pytest.mark.parametrize(
    ("distribution", "version"), [("Fedora", "44"), ("Debian", "11.9"), ("Ubuntu", "18.04"), ("SLES", "15"), ("", ""), ("Rocky", "7.9"), ("Uos", "20")]
)
def test_unknown_distributions_are_named(distribution: str, version: str) -> None:
    assert "is none of Debian 12, " in refused(host(distribution, version))


# ---- modules and branches by GPU


@pytest.mark.parametrize(
    ("devices", "flavour"),
    [
        ((T4,), "open"),
        ((V100,), "proprietary"),
        ((P40, T4), "proprietary"),
        ((0x1E02,), "open"),
        ((H100, L20), "open"),
        ((B200,), "open"),
        ((0x3FFF,), "open"),
        ((), "open"),
    ],
)
def test_flavour_by_gpu(devices: tuple[int, ...], flavour: str) -> None:
    assert driver(host(), devices)["flavour"] == flavour
    assert driver(host(), [f"{device:04x}" for device in devices])["flavour"] == flavour


@pytest.mark.parametrize(
    ("devices", "options", "words"),
    [
        ((V100,), {"branch": "590"}, ("does not drive Tesla V100 (1db6)", "nvidia_driver_branch: 580")),
        ((V100,), {"module": "open"}, ("drives Turing and newer",)),
        ((GH200,), {"module": "proprietary"}, ("need the open module",)),
        ((RTX5090,), {"module": "proprietary"}, ("need the open module",)),
        ((RTX5090,), {"branch": "535"}, ("is older than GeForce RTX 5090 (2b85)",)),
        ((V100, RTX5090), {}, ("a host has one", "Move one of them")),
        ((V100, B200), {"branch": "595"}, ("does not drive Tesla V100", "580")),
        ((K80,), {}, ("no branch that is kept drives it",)),
        ((T4,), {"module": "nouveau"}, ("must be auto, open or proprietary",)),
        ((T4,), {"variant": "desktop"}, ("must be full or compute",)),
        ((T4,), {"source": "snap"}, ("must be auto, nvidia, distro or runfile",)),
        ((T4,), {"region": "mars"}, ("there is no such preset",)),
    ],
)
def test_what_does_not_go_together(devices: tuple[int, ...], options: dict[str, Any], words: tuple[str, ...]) -> None:
    found = refused(host(), devices, **options)
    assert all(word in found for word in words), found


@pytest.mark.parametrize(
    ("distribution", "version", "flavour", "pin"),
    [
        ("Debian", "12.11", "open", {"kind": "package", "package": "nvidia-driver-pinning-580"}),
        ("Ubuntu", "22.04", "proprietary", {"kind": "package", "package": "nvidia-driver-pinning-580"}),
        ("Rocky", "9.7", "open", {"kind": "stream", "stream": "nvidia-driver:580-open"}),
        ("Rocky", "8.10", "proprietary", {"kind": "stream", "stream": "nvidia-driver:580-dkms"}),
        ("Amazon", "2023", "open", {"kind": "stream", "stream": "nvidia-driver:580-open"}),
        ("Kylin Linux Advanced Server", "V10", "open", {"kind": "stream", "stream": "nvidia-driver:580-open"}),
    ],
)
def test_how_a_branch_is_kept(distribution: str, version: str, flavour: str, pin: dict[str, str]) -> None:
    found = driver(host(distribution, version), (V100,) if flavour == "proprietary" else (T4,))
    assert found["pin"] == {**pin, "branch": "580"} and found["flavour"] == flavour


def test_the_toolkit_is_not_held_with_the_driver() -> None:
    """A hold goes by name and version, since the names begin alike."""
    found = driver(host())
    assert found["version_glob"] == "580.*" and "nvidia-*" in found["holds"] and set(found["unattended"]) >= {"nvidia-", "libnvidia-", "cuda-"}


# ---- headers


@pytest.mark.parametrize(
    ("distribution", "version", "kernel", "names"),
    [
        ("Debian", "12.11", "6.1.0-56-amd64", ["linux-headers-6.1.0-56-amd64", "linux-headers-amd64"]),
        ("Debian", "12.11", "6.1.0-56-cloud-amd64", ["linux-headers-6.1.0-56-cloud-amd64", "linux-headers-cloud-amd64"]),
        ("Debian", "13", "6.12.43+deb13-arm64", ["linux-headers-6.12.43+deb13-arm64", "linux-headers-arm64"]),
        ("Debian", "13", "6.18.44-home-made", ["linux-headers-6.18.44-home-made"]),
        ("Ubuntu", "24.04", "6.8.0-60-generic", ["linux-headers-6.8.0-60-generic", "linux-headers-generic"]),
        ("Ubuntu", "22.04", "6.8.0-60-generic", ["linux-headers-6.8.0-60-generic", "linux-headers-generic-hwe-22.04"]),
        ("Ubuntu", "22.04", "6.8.0-1010-aws", ["linux-headers-6.8.0-1010-aws", "linux-headers-aws"]),
        ("Ubuntu", "26.04", "7.0.0-1-generic", ["linux-headers-7.0.0-1-generic", "linux-headers-generic"]),
        ("Rocky", "8.10", "4.18.0-553.el8_10.x86_64", ["kernel-devel-4.18.0-553.el8_10.x86_64", "kernel-headers"]),
        ("Rocky", "9.7", "5.14.0-611.el9.x86_64", ["kernel-devel-matched", "kernel-headers"]),
        ("Rocky", "10.1", "6.12.0-124.el10.x86_64", ["kernel-devel-matched", "kernel-headers"]),
    ],
)
def test_headers_of_this_kernel_and_of_the_next(distribution: str, version: str, kernel: str, names: list[str]) -> None:
    options = {"branch": "595"} if version == "26.04" else {}
    assert driver(host(distribution, version, kernel=kernel), **options)["headers"] == names


# ---- fabric manager


@pytest.mark.parametrize(
    ("given_host", "devices", "options", "packages"),
    [
        (host(), (H100,), {}, []),
        (host(), (H100,), {"nvswitch": True}, ["nvidia-fabricmanager={version}*"]),
        (host("Ubuntu", "22.04"), (H100,), {"nvswitch": True, "branch": "570"}, ["nvidia-fabricmanager-570={version}*"]),
        (host("Rocky", "9.7"), (H100,), {"nvswitch": True}, ["nvidia-fabric-manager-{version}"]),
        (host(), (B200,), {}, ["nvidia-fabricmanager={version}*", "nvlsm", "libnvsdm"]),
        (host("Ubuntu", "24.04", "aarch64"), (0x2941,), {"nvswitch": True}, ["nvidia-imex={version}*"]),
    ],
)
def test_fabric_manager_is_of_the_drivers_version(given_host: dict[str, Any], devices: tuple[int, ...], options: dict[str, Any], packages: list[str]) -> None:
    assert driver(given_host, devices, **options)["fabric"] == packages


# ---- mirrors


def test_mirrors() -> None:
    assert driver(host(), region="cn")["repositories"][0]["url"] == "https://developer.download.nvidia.cn/compute/cuda/repos/debian12/x86_64"
    own = driver(host(), repository="https://mirror.example/cuda/", region="cn")["repositories"][0]
    assert (own["url"], own["key"]) == ("https://mirror.example/cuda/debian12/x86_64", "https://mirror.example/cuda/debian12/x86_64/3bf863cc.pub")
    local = driver(host(), repository="file:///srv/cuda", repository_key="/srv/cuda/key.asc")["repositories"][0]
    assert (local["url"], local["key"]) == ("file:///srv/cuda", "/srv/cuda/key.asc")
    # the same place in somebody else's list, with another key or none, stops apt
    assert "/srv/cuda" in local["conflicts"] and "mirror.example/cuda/debian12/x86_64" in own["conflicts"]
    assert driver(host("Rocky", "9.7"))["repositories"][0]["key"].endswith("/rhel9/x86_64/D42D0685.pub")
    own_archive = driver(host(), source="distro", branch="535", debian_mirror="http://mirror.example")["repositories"]
    assert [(one["url"], one["suites"]) for one in own_archive] == [
        ("http://mirror.example/debian", "bookworm bookworm-updates"),
        ("http://mirror.example/debian-security", "bookworm-security"),
    ]
    assert [one["conflicts"] for one in own_archive] == [[], []], "the host's own lists stay"


# ---- toolkit, CUDA, Docker


def test_the_four_packages_of_the_toolkit_have_one_version() -> None:
    found = gpu_host_packages(host(), "toolkit", options={"version": "1.20.0-1"})
    assert found["packages"] == [f"{name}=1.20.0-1" for name in table.TOOLKIT_PACKAGES]
    assert set(found["repositories"][0]["obsolete"]) >= {"libnvidia-container.list", "nvidia-docker.list", "nvidia-container-runtime.list"}
    rpm = gpu_host_packages(host("Rocky", "9.7"), "toolkit", options={"version": "1.20.0-1", "region": "cn"})
    assert rpm["packages"][0] == "nvidia-container-toolkit-1.20.0-1"
    assert rpm["repositories"][0]["url"] == "https://mirrors.ustc.edu.cn/libnvidia-container/stable/rpm/x86_64" and rpm["repositories"][0]["repo_gpgcheck"]
    assert "begins with 1.18" in refused(host(), what="toolkit", version="1.17.8-1")
    assert "1.20.0-1" in refused(host(), what="toolkit", version="latest")
    # also where NVIDIA has no repository of the driver
    assert gpu_host_packages(host("openEuler", "22.03"), "toolkit", options={"version": "1.20.0-1"})["packages"]


def test_cuda_never_brings_a_driver() -> None:
    found = gpu_host_packages(host(), "cuda", options={"version": "12.8"})
    assert found["packages"] == ["cuda-toolkit-12-8"] and found["library_path"] == "/usr/local/cuda-12.8/lib64"
    assert "12.8" in refused(host(), what="cuda", version="12")
    assert "compiles nothing for the compute capability 7.0" in refused(host(), what="cuda", version="13.0", capabilities=["7.0", "8.9"])
    assert gpu_host_packages(host(), "cuda", options={"version": "13.0", "capabilities": ["8.9"]})["packages"] == ["cuda-toolkit-13-0"]


@pytest.mark.parametrize(
    ("distribution", "version", "source", "first", "url"),
    [
        ("Debian", "12.11", "distro", "docker.io", ""),
        ("Debian", "13", "docker", "docker-ce", "https://download.docker.com/linux/debian"),
        ("Ubuntu", "24.04", "docker", "docker-ce", "https://download.docker.com/linux/ubuntu"),
        ("Rocky", "9.7", "docker", "docker-ce", "https://download.docker.com/linux/rhel/9/x86_64/stable"),
        ("Kylin Linux Advanced Server", "V10", "docker", "docker-ce", "https://download.docker.com/linux/centos/8/x86_64/stable"),
        ("openEuler", "22.03", "docker", "docker-ce", "https://download.docker.com/linux/centos/9/x86_64/stable"),
        ("Amazon", "2023", "distro", "docker", ""),
    ],
)
def test_docker(distribution: str, version: str, source: str, first: str, url: str) -> None:
    found = gpu_host_packages(host(distribution, version), "docker", options={"source": source})
    assert found["packages"][0] == first and [one["url"] for one in found["repositories"]] == ([url] if url else [])
    assert not set(found["packages"]) & set(found["conflicts"])


def test_docker_refusals_and_mirrors() -> None:
    assert "Set container_engine_source: docker" in refused(host("Rocky", "9.7"), what="docker")
    assert "Set container_engine_source: distro" in refused(host("Amazon", "2023"), what="docker", source="docker")
    assert "must be distro or docker" in refused(host(), what="docker", source="snap")
    assert (
        gpu_host_packages(host(), "docker", options={"source": "docker", "region": "cn"})["repositories"][0]["url"]
        == "https://mirrors.aliyun.com/docker-ce/linux/debian"
    )


def test_what_else_is_asked_for_is_an_error() -> None:
    with pytest.raises(AnsibleFilterError, match="must be one of driver, toolkit, cuda, docker"):
        gpu_host_packages(host(), "drivers")


# ---- properties

hosts = st.builds(
    host,
    st.sampled_from(sorted({name for row in table.PLATFORMS.values() for name in row["distributions"]})) | st.text(max_size=8),
    st.sampled_from(["12.11", "13", "20.04", "22.04", "24.04", "26.04", "8.10", "9.7", "10.1", "2023", "V10", "22.03"]) | st.text(max_size=6),
    st.sampled_from(["x86_64", "aarch64"]) | st.text(max_size=6),
    kernel=st.sampled_from(["6.1.0-56-amd64", "6.8.0-60-generic", "5.14.0-611.el9.x86_64", ""]) | st.text(max_size=12),
)
devices_of_any_kind = st.lists(st.integers(0x0FC0, 0x3FFF) | st.sampled_from([T4, V100, P40, L20, H100, GH200, B200, RTX5090]), max_size=4)
options_of_any_kind = st.fixed_dictionaries(
    {},
    optional={
        "source": st.sampled_from(["auto", *table.SOURCES]) | st.text(max_size=6),
        "branch": st.sampled_from(sorted(table.BRANCHES)) | st.text(max_size=12),
        "module": st.sampled_from(["auto", *table.FLAVOURS]) | st.text(max_size=6),
        "variant": st.sampled_from(["full", "compute"]),
        "region": st.sampled_from(["", "cn"]) | st.text(max_size=4),
        "repository": st.sampled_from(["", "https://mirror.example/cuda", "file:///srv/x"]),
        "nvswitch": st.booleans(),
        "runfile": st.sampled_from(["", "/srv/NVIDIA-Linux-x86_64-580.173.02.run", "/srv/NVIDIA-Linux-x86_64-595.91.07.run"]),
        "runfile_sha256": st.sampled_from(["", "0" * 64]),
    },
)


@given(hosts, devices_of_any_kind, options_of_any_kind)
def test_a_decision_is_whole_or_a_refusal(given_host: dict[str, Any], devices: list[int], options: dict[str, Any]) -> None:
    found = gpu_host_packages(given_host, "driver", devices, options)
    if found["fault"]:
        assert set(found) == {"fault"} and "\n" not in found["fault"] and found["fault"].endswith(".")
        return
    text = json.dumps(found)
    packages = found["packages"]
    assert packages and len(set(packages)) == len(packages)
    # never both flavours
    opened = [name for name in packages if "open" in name]
    closed = [name for name in packages if name in ("cuda-drivers", "nvidia-kernel-dkms", "nvidia-dkms", "kmod-nvidia-latest-dkms")
              or re.fullmatch(r"nvidia-dkms-\d+|linux-modules-nvidia-\d+-server-(?!open).*", name)]  # fmt: skip
    assert not (opened and closed)
    assert not closed if found["flavour"] == "open" else not opened
    assert found["flavour"] in table.BRANCHES[found["branch"]]["flavours"]
    # the pin matches the branch, and no other branch is named anywhere
    pin = found["pin"]
    if pin["kind"] != "none":
        assert pin["branch"] == found["branch"]
        assert all(
            found["branch"] in pin[key]
            for key in ("package", "stream", "pattern", "version")
            if key in pin and pin["kind"] != "versionlock" or key == "pattern" and key in pin
        )
    assert not [other for other in table.BRANCHES if other != found["branch"] and re.search(rf"(?<!\d){other}(?!\d)", " ".join(packages))]
    # every GPU is driven by what is installed
    for device in devices:
        capability = table._capability(device)
        assert table.BRANCHES[found["branch"]]["first"] <= capability <= table.BRANCHES[found["branch"]]["last"]
        assert capability >= table.TURING or found["flavour"] == "proprietary"
    # packages come from a repository, the host's own archive, or a file with a checksum
    assert found["repositories"] or found["signed"] or found["runfile"]["sha256"]
    assert "{" not in " ".join(packages) and "None" not in text


@given(hosts, st.sampled_from(["toolkit", "cuda", "docker"]),
       st.fixed_dictionaries({}, optional={"version": st.sampled_from(["1.20.0-1", "12.8", ""]) | st.text(max_size=8),
                                           "source": st.sampled_from(["distro", "docker"]),
                                           "region": st.sampled_from(["", "cn"])}))  # fmt: skip
def test_the_other_decisions_are_whole_too(given_host: dict[str, Any], what: str, options: dict[str, Any]) -> None:
    found = gpu_host_packages(given_host, what, options=options)
    assert (set(found) == {"fault"}) if found["fault"] else found["packages"]


def test_every_row_of_the_table_is_decided() -> None:
    """A row that no test above names cannot be added unseen."""
    for name, row in table.PLATFORMS.items():
        given_host = host(row["distributions"][0], row["version"] or "22.03")
        for source in ("nvidia", "distro"):
            has = row["cuda"] if source == "nvidia" else row.get("archive")
            own = next(iter(row["archive"].values()))["branch"] if source == "distro" and isinstance(row.get("archive"), dict) else row.get("oldest", "580")
            branch = "570" if "newest" in row and source == "nvidia" else own
            found = gpu_host_packages(given_host, "driver", [T4], {"source": source, "branch": branch})
            assert bool(has) == (not found["fault"]), (name, source, found)
            if has:
                assert found["platform"] == name
