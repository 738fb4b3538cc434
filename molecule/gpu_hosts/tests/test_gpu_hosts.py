# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What stands on hosts that pretend to have GPUs, and what the roles do where something is wrong with them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from machines import host

HOSTS = ("gpu-12", "gpu-13")
every_host = pytest.mark.parametrize("name", HOSTS)


def flat(text: str) -> str:
    """What was said, without colours and line ends."""
    return re.sub(r"\s+", " ", re.sub(r"\x1b\[[0-9;]*m", "", text))


def installed(machine: Any) -> dict[str, str]:
    out = machine.check_output("dpkg-query -W -f '${db:Status-Status} ${Package} ${Version}\\n'")
    return dict(line.split()[1:3] for line in out.splitlines() if line.startswith("installed "))


# ---- what stands


@every_host
def test_the_driver_is_the_open_one_of_the_branch_and_is_loaded(name: str) -> None:
    machine = host(name)
    there = installed(machine)
    assert there["nvidia-open"] == there["nvidia-kernel-open-dkms"] == "580.173.02-1"
    assert "cuda-drivers" not in there and "nvidia-kernel-dkms" not in there
    assert machine.check_output("cat /sys/module/nvidia/version") == "580.173.02"
    assert machine.check_output("nvidia-smi -L").count("GPU ") >= 2
    assert machine.service("nvidia-persistenced").is_enabled and machine.service("nvidia-persistenced").is_running


@every_host
def test_the_branch_is_pinned_before_the_driver_comes(name: str) -> None:
    machine = host(name)
    assert "nvidia-driver-pinning-580" in installed(machine)
    # the log has them in the order in which they came
    log = machine.check_output("grep -hE ' install (nvidia-driver-pinning|nvidia-open|linux-headers)' /var/log/dpkg.log")
    came = [line.split()[3].partition(":")[0] for line in log.splitlines()]
    assert came.index("nvidia-driver-pinning-580") < came.index("nvidia-open")
    assert max(number for number, package in enumerate(came) if package.startswith("linux-headers")) < came.index("nvidia-open")
    assert "Candidate: 580.173.02-1" in machine.check_output("apt-cache policy nvidia-open")
    assert "595.91.07-1" in machine.check_output("apt-cache policy nvidia-open"), "a newer branch is on offer"


@every_host
def test_an_upgrade_of_the_system_leaves_the_driver_alone(name: str) -> None:
    machine = host(name)
    held = set(machine.check_output("apt-mark showhold").split())
    assert held == {"nvidia-open", "nvidia-kernel-open-dkms", "nvidia-driver-cuda", "nvidia-persistenced"}
    # even where the pin is gone
    plan = machine.check_output("apt-get -s -o Dir::Etc::preferencesparts=/nonexistent dist-upgrade")
    assert not re.search(r"^Inst nvidia-", plan, re.MULTILINE)


@every_host
def test_unattended_upgrades_know_of_it(name: str) -> None:
    dump = host(name).check_output("apt-config dump Unattended-Upgrade::Package-Blacklist")
    assert {"nvidia-", "libnvidia-", "cuda-"} <= set(re.findall(r'Blacklist:: "([^"]+)"', dump))


@every_host
def test_nouveau_is_kept_out_of_the_initramfs(name: str) -> None:
    machine = host(name)
    image = f"/boot/initrd.img-{machine.check_output('cat /etc/stub-kernel')}"
    machine.check_output(f"rm -rf /tmp/image && unmkinitramfs {image} /tmp/image")
    found = machine.check_output("find /tmp/image -name blacklist-nouveau.conf -exec cat {} +")
    assert "blacklist nouveau" in found and "options nouveau modeset=0" in found


@every_host
def test_lists_of_older_guides_are_set_aside(name: str) -> None:
    machine = host(name)
    folder = "/etc/apt/sources.list.d"
    there = machine.check_output(f"ls {folder}").split()
    assert "libnvidia-container.list" not in there and "libnvidia-container.list.disabled-by-selfhosted-fastgpt" in there
    # lines of somebody's own stay
    text = machine.check_output(f"cat {folder}/cuda-debian.list")
    assert text.startswith("# somebody's own\n") and text.count("# disabled by selfhosted.fastgpt: deb") == 2 and "\ndeb" not in text
    assert machine.run("apt-get update").rc == 0
    key = {"gpu-12": "/srv/stub/key.asc", "gpu-13": "/usr/share/keyrings/selfhosted-fastgpt-cuda.asc"}[name]
    assert f"Signed-By: {key}\n" in machine.check_output(f"cat {folder}/selfhosted-fastgpt-cuda.sources")


@every_host
def test_the_toolkit_has_one_version(name: str) -> None:
    there = installed(host(name))
    four = ("nvidia-container-toolkit", "nvidia-container-toolkit-base", "libnvidia-container-tools", "libnvidia-container1")
    assert {there[package] for package in four} == {"1.20.0-1"}


@every_host
def test_cuda_came_without_a_driver(name: str) -> None:
    machine = host(name)
    there = installed(machine)
    assert "cuda-toolkit-12-8" in there and "cuda" not in there and "cuda-drivers" not in there
    assert machine.check_output("sh -lc 'nvcc; echo $LD_LIBRARY_PATH'").splitlines() == ["release 12.8", "/usr/local/cuda-12.8/lib64"]


@every_host
def test_keys_of_others_stay_in_daemon_json(name: str) -> None:
    found = json.loads(host(name).check_output("cat /etc/docker/daemon.json"))
    assert found["debug"] is True and found["runtimes"]["kata"] == {"path": "kata-runtime"}
    assert found["runtimes"]["nvidia"] == {"args": [], "path": "nvidia-container-runtime"} and found["live-restore"] is True
    assert found["log-opts"] == {"max-file": "3", "max-size": "20m"}


@every_host
def test_docker_gives_gpus_in_a_way_that_survives_a_reload(name: str) -> None:
    machine = host(name)
    info = json.loads(machine.check_output("docker info --format '{{json .}}'"))
    assert "nvidia" in info["Runtimes"]
    daemon = json.loads(machine.check_output("cat /etc/docker/daemon.json"))
    if int(info["ServerVersion"].partition(".")[0]) >= 25:
        assert daemon["features"] == {"cdi": True} and "exec-opts" not in daemon
    else:
        assert daemon["exec-opts"] == ["native.cgroupdriver=cgroupfs"] and info["CgroupDriver"] == "cgroupfs"


@every_host
def test_the_specification_is_of_the_loaded_driver(name: str) -> None:
    machine = host(name)
    assert "580.173.02" in machine.check_output("cat /var/run/cdi/nvidia.yaml")
    assert machine.service("nvidia-cdi-refresh.path").is_enabled


# ---- what the roles do where something is wrong; the host is mended after each


@pytest.fixture
def probe(machine: Any) -> Iterator[str]:
    """An image with a shell, and a running container."""
    machine.check_output(
        "docker image inspect probe:1 >/dev/null 2>&1 || { rm -rf /tmp/probe && mkdir -p /tmp/probe/bin /tmp/probe/usr/bin"
        " && cp /bin/busybox /tmp/probe/bin/ && for name in sh cat printf sleep echo; do ln -s busybox /tmp/probe/bin/$name; done"
        " && tar -C /tmp/probe -c . | docker import - probe:1; }"
    )
    machine.check_output("docker rm -f probe 2>/dev/null; docker run -d --name probe --network none probe:1 sleep 3600")
    yield "probe"
    machine.check_output("docker rm -f probe")


def test_a_container_sees_the_gpus(machine: Any, probe: str, run: Any) -> None:
    out = machine.check_output(
        "docker run --rm --network none --device nvidia.com/gpu=all probe:1 sh -c 'nvidia-smi -L; ls /dev/nvidia0 2>/dev/null || echo /dev/nvidia*'"
    )
    assert out.count("STUB GPU") == 2 and "/dev/nvidia0" in out
    found = run("nvidia_container_toolkit", "verify")
    assert found.rc == 0 and "2 of 2 GPUs in a container" in flat(found.stdout), found.stdout[-3000:]


def test_docker_is_not_restarted_for_nothing(machine: Any, run: Any) -> None:
    before = machine.check_output("systemctl show -p InvocationID --value docker")
    found = run("nvidia_container_toolkit")
    assert found.rc == 0 and found.total("changed") == 0, found.changed_tasks
    assert machine.check_output("systemctl show -p InvocationID --value docker") == before


def test_a_daemon_json_that_is_no_json_restarts_nothing(machine: Any, run: Any) -> None:
    before = machine.check_output("systemctl show -p InvocationID --value docker")
    machine.check_output("cp /etc/docker/daemon.json /root/daemon.json && echo '{\"debug\": true,' >/etc/docker/daemon.json")
    try:
        found = run("container_engine")
        assert found.rc != 0 and "is not a JSON object" in flat(found.stdout) and found.total("changed") == 0
        assert machine.check_output("cat /etc/docker/daemon.json") == '{"debug": true,'
        assert machine.check_output("systemctl show -p InvocationID --value docker") == before
    finally:
        machine.check_output("mv /root/daemon.json /etc/docker/daemon.json")


def test_a_flag_of_the_daemon_is_no_key_of_the_file(machine: Any, run: Any) -> None:
    drop = "/etc/systemd/system/docker.service.d/own.conf"
    before = machine.check_output("systemctl show -p InvocationID --value docker")
    machine.check_output(
        f"mkdir -p $(dirname {drop})"
        f" && printf '[Service]\\nExecStart=\\nExecStart=/usr/sbin/dockerd -H fd:// --log-driver=journald\\n' >{drop} && systemctl daemon-reload"
    )
    try:
        found = run("container_engine")
        assert found.rc != 0 and "--log-driver" in found.stdout and "Take the flag out" in flat(found.stdout)
        assert machine.check_output("systemctl show -p InvocationID --value docker") == before
    finally:
        machine.check_output(f"rm {drop} && systemctl daemon-reload")


def test_the_specification_follows_the_driver(machine: Any, run: Any) -> None:
    """It is made anew where it names the libraries of another version."""
    machine.check_output("sed -i s/580.173.02/580.95.05/ /var/run/cdi/nvidia.yaml")
    found = run("nvidia_container_toolkit")
    assert found.rc == 0 and found.total("changed") == 1, found.changed_tasks
    assert "580.173.02" in machine.check_output("cat /var/run/cdi/nvidia.yaml")


def test_a_killed_run_still_owes_the_initramfs(machine: Any, run: Any) -> None:
    machine.check_output("touch -d '+1 minute' /etc/modprobe.d/blacklist-nouveau.conf")
    found = run("nvidia_driver")
    machine.check_output("touch -d '-1 day' /etc/modprobe.d/blacklist-nouveau.conf")
    assert found.rc == 0 and any("initramfs" in task for task in found.changed_tasks), found.changed_tasks


def test_missing_headers_are_refused_before_the_driver_comes(machine: Any, run: Any) -> None:
    kernel = machine.check_output("cat /etc/stub-kernel")
    machine.check_output("echo 6.1.0-777-cloud-amd64 >/etc/stub-kernel")
    try:
        found = run("nvidia_driver")
        said = flat(found.stdout)
        assert found.rc != 0 and "have no linux-headers-6.1.0-777-cloud-amd64" in said, said[-2000:]
        assert "or no module is built" in said and "upgrade the kernel" in said and "linux-headers-cloud-amd64" in said
    finally:
        machine.check_output(f"echo {kernel} >/etc/stub-kernel")


def test_a_branch_that_nobody_offers_is_refused_with_what_is(run: Any, machine: Any) -> None:
    found = run("nvidia_driver", nvidia_driver_branch="610")
    said = flat(found.stdout)
    assert found.rc != 0 and "have no nvidia-driver-pinning-610" in said and "595.91.07-1" in said, said[-2000:]
    assert installed(machine)["nvidia-open"] == "580.173.02-1"


def test_secure_boot_is_refused_before_anything_is_installed(machine: Any, run: Any) -> None:
    machine.check_output("printf '#!/bin/sh\\necho SecureBoot enabled\\n' >/usr/local/bin/mokutil && chmod +x /usr/local/bin/mokutil")
    try:
        found = run("nvidia_driver")
        assert found.rc != 0 and found.total("changed") == 0 and "Three ways out" in flat(found.stdout)
        mok = run("nvidia_driver", nvidia_driver_secure_boot="mok")
        assert mok.rc == 0, mok.stdout[-2000:]
    finally:
        machine.check_output("rm /usr/local/bin/mokutil")


def test_a_reboot_is_owed_and_said(machine: Any, run: Any, probe: str) -> None:
    """Up to another branch while a container runs, and down again."""
    up = run("nvidia_driver", nvidia_driver_branch="595", nvidia_driver_reboot=True)
    said = flat(up.stdout)
    assert up.rc == 0, up.stdout[-3000:]
    assert installed(machine)["nvidia-open"] == "595.91.07-1" and "nvidia-driver-pinning-580" not in installed(machine)
    assert "version 580.173.02 is loaded and 595.91.07 installed" in said and "containers run here: probe" in said
    assert "pending: true" in said.lower() or "'pending': True" in said
    assert machine.run("nvidia-smi -L").rc == 18
    assert "nvidia-open" in machine.check_output("apt-mark showhold").split()
    assert machine.check_output("uptime -s"), "nobody rebooted it"

    again = run("nvidia_driver", nvidia_driver_branch="595")
    assert again.rc == 0 and again.total("changed") == 0, again.changed_tasks
    assert "nvidia_driver_reboot is false" in flat(again.stdout)

    down = run("nvidia_driver")
    assert down.rc == 0, down.stdout[-3000:]
    assert installed(machine)["nvidia-open"] == "580.173.02-1" and machine.check_output("nvidia-smi -L").count("STUB GPU") == 2
    assert set(machine.check_output("apt-mark showhold").split()) >= {"nvidia-open", "nvidia-kernel-open-dkms"}


def test_the_kernel_module_is_changed(machine: Any, run: Any) -> None:
    found = run("nvidia_driver", nvidia_driver_module="proprietary")
    assert found.rc == 0, found.stdout[-3000:]
    there = installed(machine)
    assert "cuda-drivers" in there and "nvidia-kernel-dkms" in there and "nvidia-open" not in there and "nvidia-kernel-open-dkms" not in there
    back = run("nvidia_driver")
    assert back.rc == 0 and "nvidia-open" in installed(machine) and "nvidia-kernel-dkms" not in installed(machine)


def test_a_driver_of_somebody_else_is_used_as_it_is(machine: Any, run: Any) -> None:
    machine.check_output("mv /etc/selfhosted-fastgpt/nvidia_driver /root/mark")
    try:
        found = run("nvidia_driver", nvidia_driver_branch="595")
        assert found.rc == 0 and found.total("changed") == 0 and "it is used as it is" in flat(found.stdout)
        # one that does not work is neither used nor replaced
        machine.check_output("mv /var/lib/stub-nvidia/loaded /root/loaded")
        broken = run("nvidia_driver")
        assert broken.rc != 0 and broken.total("changed") == 0 and "nvidia_driver_takeover: true" in flat(broken.stdout)
    finally:
        machine.check_output("mv /root/mark /etc/selfhosted-fastgpt/nvidia_driver; [ ! -e /root/loaded ] || mv /root/loaded /var/lib/stub-nvidia/loaded")


def test_without_a_gpu_nothing_is_changed(machine: Any, run: Any) -> None:
    machine.check_output("umount /sys/bus/pci/devices && mv /usr/bin/nvidia-smi /root/")
    try:
        for role in ("nvidia_driver", "nvidia_container_toolkit"):
            found = run(role)
            assert found.rc == 0 and found.total("changed") == 0, found.stdout[-2000:]
            assert "No NVIDIA GPU is seen" in flat(found.stdout)
    finally:
        machine.check_output("mv /root/nvidia-smi /usr/bin/ && sh /root/pretend.sh")


def test_it_can_be_removed(machine: Any, run: Any) -> None:
    """Last, since nothing is left after it."""
    found = run("nvidia_container_toolkit", "uninstall")
    assert found.rc == 0, found.stdout[-3000:]
    daemon = json.loads(machine.check_output("cat /etc/docker/daemon.json"))
    assert daemon["runtimes"] == {"kata": {"path": "kata-runtime"}} and "nvidia-container-toolkit" not in installed(machine)
    found = run("nvidia_driver", "uninstall")
    assert found.rc == 0, found.stdout[-3000:]
    there = installed(machine)
    assert not [name for name in there if name.startswith(("nvidia", "cuda-drivers"))]
    assert machine.run("ls /etc/modprobe.d/blacklist-nouveau.conf /etc/apt/sources.list.d/selfhosted-fastgpt-cuda.sources").rc != 0


FAKE_RPM = """#!/bin/sh
case "$1" in -qa) cat /root/fake/installed 2>/dev/null;; -q) exit 1;; esac
exit 0
"""
FAKE_DNF = """#!/bin/sh
echo "dnf $*" >>/root/fake/calls
names='nvidia-open kernel-devel-matched kernel-headers'
case "$*" in
  '-q list'*) for name in $names; do echo "$name.x86_64 580.173.02-1.el9 cuda"; done;;
  *'module list'*) cat /root/fake/stream 2>/dev/null;;
  *'module enable'*) echo 'nvidia-driver 580-open [e] all' >/root/fake/stream;;
  *'install --allowerasing'*)
    for name in $names; do echo "$name 580.173.02-1.el9 580.173.02-1.el9.x86_64"; done >/root/fake/installed
    mkdir -p /var/lib/stub-nvidia/$(uname -r) && echo 580.173.02 >/var/lib/stub-nvidia/$(uname -r)/nvidia
    install -m 0755 /root/fake/nvidia-smi /usr/bin/nvidia-smi;;
esac
exit 0
"""


@pytest.mark.parametrize(
    ("version", "lock"),
    [
        ("9.7", ["dnf -q module list --enabled nvidia-driver", "dnf -y module enable nvidia-driver:580-open"]),
        (
            "10.1",
            [
                "dnf -y install python3-dnf-plugin-versionlock",
                "dnf versionlock delete *nvidia*",
                "dnf versionlock add *nvidia*580*",
            ],
        ),
    ],
)
def test_the_commands_of_dnf_are_those_of_the_vendor(machine: Any, run: Any, version: str, lock: list[str]) -> None:
    """dnf and rpm are fakes on a Debian that says it is another: what is proved is which commands are sent, in which order, and once."""
    machine.check_output(
        "rm -rf /root/fake /var/lib/stub-nvidia /sys/module/nvidia /etc/selfhosted-fastgpt/nvidia_driver /usr/bin/nvidia-smi"
        " && mkdir -p /root/fake /etc/yum.repos.d"
        " && dpkg-deb --fsys-tarfile /srv/stub/cuda/nvidia-driver-cuda_580.173.02-1_all.deb"
        " | tar -xO ./usr/bin/nvidia-smi >/root/fake/nvidia-smi"
    )
    for name, text in (("rpm", FAKE_RPM), ("dnf", FAKE_DNF)):
        machine.check_output(f"cat >/usr/local/bin/{name} <<'END'\n{text}END\nchmod +x /usr/local/bin/{name}")
    machine.check_output("mv /usr/bin/dpkg-query /usr/bin/dpkg-query.real")
    elsewhere = {
        "nvidia_driver__host": {"distribution": "Rocky", "version": version, "architecture": "x86_64", "kernel": "5.14.0-611.el9.x86_64"},
        "nvidia_driver_repository": "",
        "nvidia_driver_repository_key": "",
        "nvidia_driver_persistence": False,
    }
    try:
        found = run("nvidia_driver", **elsewhere)
        assert found.rc == 0, found.stdout[-3000:]
        again = run("nvidia_driver", **elsewhere)
        assert again.rc == 0 and again.total("changed") == 0, again.changed_tasks
    finally:
        machine.check_output("mv /usr/bin/dpkg-query.real /usr/bin/dpkg-query; rm /usr/local/bin/rpm /usr/local/bin/dnf")
    assert machine.check_output("cat /root/fake/calls").splitlines() == [
        "dnf -y install dnf-plugins-core",
        "dnf config-manager --set-enabled crb",
        "dnf -y install epel-release",
        "dnf -y install dkms",
        *lock,
        "dnf -q list nvidia-open kernel-devel-matched kernel-headers",
        "dnf -y install --allowerasing kernel-devel-matched kernel-headers nvidia-open",
    ]
    repository = machine.check_output("cat /etc/yum.repos.d/selfhosted-fastgpt-cuda.repo")
    assert f"/repos/rhel{version.partition('.')[0]}/x86_64\n" in repository and "D42D0685.pub" in repository
    machine.check_output("rm /etc/yum.repos.d/selfhosted-fastgpt-cuda.repo")
