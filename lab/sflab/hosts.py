# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Lab hosts: raising them, reaching them, removing them."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import socket
import subprocess
import tarfile
import time
from pathlib import Path
from typing import Any

from .build import PROXY_WORDS, cgroup_version
from .catalogue import INFRA_OCTET, LABEL, LOCAL, Host, LabError, container_name, host_of, network_name, volume_name
from .common import STATE, Step, docker_inspect, image_info, output, say, tree_hash, write_if_changed

SSH = STATE / "ssh"
USER = "ops"
USER_ID = 1000
# What the kernel grants and labs need more of. Each systemd and each dockerd takes an inotify instance. And all hosts together weigh as much
# as one process outside of them (cgroups v1 and v2), so that the workers of one ansible-playbook take nearly all cores from what it deploys.
RAISED = (
    (Path("/proc/sys/fs/inotify/max_user_instances"), 1024), (Path("/sys/fs/cgroup/cpu/docker/cpu.shares"), 262144),
    (Path("/sys/fs/cgroup/docker/cpu.weight"), 10000),
)  # fmt: skip
# Outside the checkout: the settings are the machine's, and end with its uptime as this file does.
RAISED_BEFORE = Path("/run/selfhosted-fastgpt-lab.json")
CA_BUNDLE = Path("/etc/ssl/certs/ca-certificates.crt")
CAPABILITIES = ("SYS_ADMIN", "NET_ADMIN", "SYS_PTRACE", "DAC_READ_SEARCH", "SYSLOG", "SYS_NICE", "MKNOD", "IPC_LOCK", "SYS_CHROOT",
                "LINUX_IMMUTABLE", "AUDIT_WRITE", "SETFCAP")


def lab_containers(lab: str | None = None) -> list[dict[str, Any]]:
    """The containers of one lab, or of all."""
    wanted = f"label={LABEL}={lab}" if lab else f"label={LABEL}"
    ids = output(["docker", "ps", "-aq", "--no-trunc", "--filter", wanted]).split()
    return docker_inspect("container", *ids)


def ensure_network(lab: str, net: str) -> None:
    """The lab's network; refuses one of another shape."""
    name = network_name(lab)
    found = docker_inspect("network", name)
    subnet = f"{net}.0/24"
    if found:
        has = [entry.get("Subnet") for entry in found[0]["IPAM"]["Config"]]
        if has != [subnet]:
            raise LabError(f"lab {lab} stands on {', '.join(map(str, has))}, not on {subnet}: `lab.py down --name {lab}` first, or give its --net")
        return
    device = re.search(r"\bdev (\S+)", output(["ip", "-4", "route", "show", "default"], check=False))
    mtu_file = Path("/sys/class/net") / (device.group(1) if device else "lo") / "mtu"
    mtu = mtu_file.read_text().strip() if device and mtu_file.exists() else "1500"
    output(["docker", "network", "create", "--subnet", subnet, "--gateway", f"{net}.1", "--label", f"{LABEL}={lab}",
            "--opt", f"com.docker.network.driver.mtu={mtu}", name])


def raise_limits() -> None:
    """Of this machine, restored when the last lab goes."""
    before = json.loads(RAISED_BEFORE.read_text()) if RAISED_BEFORE.exists() else {}
    for path, wanted in RAISED:
        now = int(path.read_text()) if path.exists() else wanted
        if now < wanted:
            write_if_changed(RAISED_BEFORE, json.dumps(before := {str(path): now, **before}))
            path.write_text(f"{wanted}\n")


def restore_limits() -> None:
    """Only after the last lab."""
    if RAISED_BEFORE.exists() and not lab_containers():
        for path, value in json.loads(RAISED_BEFORE.read_text()).items():
            if Path(path).exists():
                Path(path).write_text(f"{value}\n")
        RAISED_BEFORE.unlink()


def _keygen(path: Path, comment: str) -> None:
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        output(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", comment, "-f", path])


def ssh_key() -> Path:
    """The key for user ops on every lab host."""
    SSH.mkdir(parents=True, exist_ok=True)
    SSH.chmod(0o700)
    _keygen(SSH / "id_ed25519", "selfhosted-fastgpt-lab")
    return SSH / "id_ed25519"


def own_ca() -> Path:
    """The certificate of a CA for scenarios with TLS between hosts; its key lies beside it."""
    certificate = STATE / "ca" / "ca.pem"
    if not certificate.exists():
        certificate.parent.mkdir(parents=True, exist_ok=True)
        coming = certificate.with_suffix(".new")
        output(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "3650",
                "-subj", "/CN=CA of the lab", "-addext", "keyUsage=critical,keyCertSign,cRLSign",
                "-keyout", certificate.with_suffix(".key"), "-out", coming])
        coming.rename(certificate)
    return certificate


def host_key(lab: str, host: Host) -> Path:
    """Kept over down and up, so that nobody learns to ignore a changed host key."""
    path = SSH / "hostkeys" / lab / host.name
    _keygen(path, f"{host.name}.{lab}")
    return path


def write_known_hosts(addresses: dict[str, Path]) -> None:
    """Our hosts' lines replace older ones of the same address."""
    path = SSH / "known_hosts"
    lines = [line for line in (path.read_text().splitlines() if path.exists() else []) if line and line.split()[0] not in addresses]
    for address, key in addresses.items():
        lines.append(f"{address} {' '.join(key.with_suffix('.pub').read_text().split()[:2])}")
    write_if_changed(path, "\n".join(sorted(lines)) + "\n", 0o600)


GPU_NAME, GPU_MEMORY_MB, GPU_RESERVED_MB, GPU_DRIVER = "NVIDIA GeForce RTX 4090", 24564, 480, "580.95.05"
NVIDIA_SMI = """#!/usr/bin/python3
# Pretends to be nvidia-smi of a host with {gpus} GPUs: the queries that the collection sends, as the real one (580.159.04) answers them.
import sys, time
GPUS = {gpus}
KNOWN = {{"index": "{{i}}", "name": "{name}", "uuid": "GPU-00000000-0000-0000-0000-00000000000{{i}}", "pci.bus_id": "00000000:0{{i}}:00.0",
         "memory.total": "{memory}", "memory.used": "0", "memory.reserved": "{reserved}", "memory.free": "{free}",
         "compute_cap": "8.9", "driver_version": "{driver}", "mig.mode.current": "[N/A]", "utilization.gpu": "0", "persistence_mode": "Enabled"}}
if "-i" in sys.argv and not set(sys.argv[sys.argv.index("-i") + 1].split(",")) <= {{str(i) for i in range(GPUS)}}:
    print("No devices were found")
    sys.exit(6)
query = next((word.split("=", 1)[1] for word in sys.argv if word.startswith("--query-gpu=")), None)
if query:
    columns = query.split(",")
    unknown = [column for column in columns if column.strip() not in KNOWN]
    if unknown:
        print('Field "%s" is not a valid field to query.\\n' % unknown[0])
        sys.exit(2)
    for i in range(GPUS):
        print(", ".join(KNOWN[column.strip()].format(i=i) for column in columns))
elif any(word.startswith("--query-compute-apps") for word in sys.argv):
    pass
elif "-L" in sys.argv:
    for i in range(GPUS):
        print("GPU %d: {name} (UUID: GPU-00000000-0000-0000-0000-00000000000%d)" % (i, i))
elif "-q" in sys.argv:
    print("\\n==============NVSMI LOG==============\\n")
    for name, value in ("Timestamp", time.strftime("%a %b %e %H:%M:%S %Y")), ("Driver Version", "{driver}"), ("CUDA Version", "13.0"):
        print("%-54s : %s" % (name, value))
    print("\\n%-54s : %d" % ("Attached GPUs", GPUS))
    for i in range(GPUS):
        print("GPU 00000000:0%d:00.0\\n    FB Memory Usage" % i)
        for name, value in ("Total", "{memory}"), ("Reserved", "{reserved}"), ("Used", "0"), ("Free", "{free}"):
            print("        %-46s : %s MiB" % (name, value))
    print()
else:
    print("| NVIDIA-SMI %-22s Driver Version: %-14s CUDA Version: %-9s|" % ("{driver}", "{driver}", "13.0"))
"""


def gpu_files(gpus: int) -> dict[str, tuple[str, int]]:
    """What makes a host look as if it had GPUs, a driver and NVIDIA's toolkit. Nothing computes on them."""
    if not gpus:
        return {}
    nodes = [f"/dev/nvidia{index}" for index in range(gpus)]
    devices = [{"name": str(index), "containerEdits": {"deviceNodes": [{"path": node}]}} for index, node in enumerate(nodes)]
    devices.append({"name": "all", "containerEdits": {"deviceNodes": [{"path": node} for node in nodes]}})
    specification = {"cdiVersion": "0.5.0", "kind": "nvidia.com/gpu", "devices": devices, "containerEdits": {"env": ["NVIDIA_VISIBLE_DEVICES=void"]}}
    smi = NVIDIA_SMI.format(gpus=gpus, name=GPU_NAME, memory=GPU_MEMORY_MB, reserved=GPU_RESERVED_MB, free=GPU_MEMORY_MB - GPU_RESERVED_MB, driver=GPU_DRIVER)
    return {
        "usr/bin/nvidia-smi": (smi, 0o755),
        "etc/cdi/nvidia.yaml": (json.dumps(specification, indent=2) + "\n", 0o644),
        "etc/lab-devices": ("".join(f"{node}=195:{index}\n" for index, node in enumerate(nodes)), 0o644),
    }


def _host_files(lab: str, host: Host) -> bytes:
    """What a host gets before its first boot, as a tar with owners and modes."""
    key = host_key(lab, host)
    files: list[tuple[str, bytes, int, int]] = [
        ("etc/ssh/ssh_host_ed25519_key", key.read_bytes(), 0o600, 0),
        ("etc/ssh/ssh_host_ed25519_key.pub", key.with_suffix(".pub").read_bytes(), 0o644, 0),
        (f"home/{USER}/.ssh/authorized_keys", ssh_key().with_suffix(".pub").read_bytes(), 0o600, USER_ID),
    ]
    if CA_BUNDLE.exists():  # this machine may trust more than Debian's own: a proxy's certificate
        files.append((str(CA_BUNDLE).lstrip("/"), CA_BUNDLE.read_bytes(), 0o644, 0))
    proxies = {name: os.environ[name] for name in PROXY_WORDS if os.environ.get(name)}
    if proxies:
        files.append(("etc/environment", "".join(f"{k}={v}\n" for k, v in proxies.items()).encode(), 0o644, 0))
        apt = "".join(f'Acquire::{k.split("_")[0]}::Proxy "{v}";\n' for k, v in proxies.items() if k in ("http_proxy", "https_proxy"))
        files.append(("etc/apt/apt.conf.d/80lab-proxy", apt.encode(), 0o644, 0))
    files += [(path, content.encode(), mode, 0) for path, (content, mode) in gpu_files(host.gpus).items()]
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        directory = tarfile.TarInfo(f"home/{USER}/.ssh")
        directory.type, directory.mode, directory.uid, directory.gid = tarfile.DIRTYPE, 0o700, USER_ID, USER_ID
        archive.addfile(directory)
        for path, content, mode, owner in files:
            entry = tarfile.TarInfo(path)
            entry.size, entry.mode, entry.uid, entry.gid, entry.mtime = len(content), mode, owner, owner, int(time.time())
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


DATA_ROOT = "/var/lib/selfhosted-fastgpt"  # where the roles put their data unless told otherwise


def data_disk(lab: str, host: Host) -> list[str]:
    """Options of docker create: a file system of its own at the data directory, in a sparse file of this machine."""
    if not host.disk_gb:
        return []
    image = STATE / lab / "disks" / f"{host.name}.img"
    mounted = image.with_suffix("")
    if not image.exists():
        mounted.mkdir(parents=True, exist_ok=True)
        coming = image.with_suffix(".new")
        with coming.open("wb") as file:
            file.truncate(host.disk_gb << 30)
        output(["mkfs.ext4", "-q", "-m", "0", coming])
        coming.rename(image)
    if not os.path.ismount(mounted):
        output(["mount", "-o", "loop", image, mounted])
    return ["-v", f"{mounted}:{DATA_ROOT}"]


def remove_disks(lab: str) -> None:
    for mounted in sorted((STATE / lab / "disks").glob("*")):
        if os.path.ismount(mounted):
            output(["umount", mounted])


def up_host(lab: str, net: str, host: Host) -> bool:
    """One systemd container with room for a container engine of its own; True when it is new."""
    name, image = container_name(lab, host.name), f"{LOCAL}/debian:{host.suite}"
    info = image_info(image)
    if not info:
        raise LabError(f"{image} is missing: run `lab.py prepare` first")
    disk = [str(host.disk_gb)] if host.disk_gb else []
    wanted = tree_hash(host.suite, f"{net}.{host.octet}", "1", *disk, *sorted(content for content, _mode in gpu_files(host.gpus).values()))
    found = docker_inspect("container", name)
    if found and found[0]["State"]["Status"] == "created":  # a killed run: it has no keys yet
        output(["docker", "rm", "-fv", name])
        found = []
    if found:
        if found[0]["Config"]["Labels"].get(f"{LABEL}.config") != wanted:
            raise LabError(f"lab host {host.name} stands already, with another suite or address: `lab.py down --name {lab}` first")
        if found[0]["Image"] != info["Id"]:
            say(f"note: {host.name} stands on an older base image; `down` and `up` renew it")
        if not found[0]["State"]["Running"]:
            data_disk(lab, host)
            output(["docker", "start", name])
        return False
    cgroups = (["--cgroupns", "host", "-v", "/sys/fs/cgroup:/sys/fs/cgroup:rw"] if cgroup_version() == 1 else ["--cgroupns", "private"])
    output(["docker", "create", "--name", name, "--hostname", host.name, "--network", network_name(lab), "--ip", f"{net}.{host.octet}",
            "--label", f"{LABEL}={lab}", "--label", f"{LABEL}.config={wanted}", "--stop-signal", "SIGRTMIN+3", *cgroups,
            *(word for cap in CAPABILITIES for word in ("--cap-add", cap)),
            "--security-opt", "seccomp=unconfined", "--security-opt", "apparmor=unconfined",
            "--tmpfs", "/run", "--tmpfs", "/run/lock", "--tmpfs", "/tmp:exec",
            *data_disk(lab, host), "-v", "/var/lib/docker",  # a volume of its own: overlay2 cannot sit on overlayfs
            image])
    copied = subprocess.run(["docker", "cp", "-", f"{name}:/"], input=_host_files(lab, host), capture_output=True, check=False)
    if copied.returncode:
        raise LabError(f"docker cp to {name}: {copied.stderr.decode(errors='replace').strip()}")
    output(["docker", "start", name])
    return True


def wait_host(lab: str, net: str, host: Host, seconds: float = 60) -> None:
    """Booted, and sshd greets."""
    deadline = time.monotonic() + seconds
    address = f"{net}.{host.octet}"
    problem = ""
    while time.monotonic() < deadline:
        try:
            with socket.create_connection((address, 22), timeout=2) as connection:
                connection.settimeout(2)
                if connection.recv(64).startswith(b"SSH-"):
                    break
        except OSError as exc:
            problem = str(exc)
        time.sleep(0.1)
    else:
        raise LabError(f"{host.name} ({address}): sshd does not answer ({problem}); see docker logs {container_name(lab, host.name)}")
    state = ""
    while time.monotonic() < deadline:
        done = subprocess.run(["docker", "exec", container_name(lab, host.name), "systemctl", "is-system-running", "--wait"],
                              capture_output=True, text=True, check=False, timeout=max(1.0, deadline - time.monotonic()))
        state = done.stdout.strip()
        if state in ("running", "degraded"):
            break
        time.sleep(0.2)
    if state == "degraded":
        failed = output(["docker", "exec", container_name(lab, host.name), "systemctl", "--failed", "--plain", "--no-legend"], check=False)
        say(f"!! {host.name} came up with failed units:\n{failed.rstrip()}")
    elif state != "running":
        raise LabError(f"{host.name} does not finish booting: systemd says {state or 'nothing'}")


def up_hosts(lab: str, net: str, hosts: list[Host]) -> None:
    """All hosts, started one after the other, awaited together."""
    raise_limits()
    keys = {f"{net}.{host.octet}": host_key(lab, host) for host in hosts}
    ssh_key()
    own_ca()
    write_known_hosts(keys)
    with Step("lab hosts " + " ".join(host.name for host in hosts)):
        fresh = [host.name for host in hosts if up_host(lab, net, host)]
        for host in hosts:
            wait_host(lab, net, host)
    for host in hosts:
        say(f"{'new' if host.name in fresh else 'standing'}: {host.name} (Debian {host.suite}) ssh -i .lab/ssh/id_ed25519 "
            f"-o UserKnownHostsFile=.lab/ssh/known_hosts {USER}@{net}.{host.octet}")


def write_state(lab: str, net: str, hosts: list[Host], stand_ins: list[dict[str, str]], others: list[dict[str, str]], version: str) -> Path:
    """What the demo and the tests read."""
    path = STATE / lab / "state.json"
    state = {
        "name": lab, "net": net, "hosts": {host.name: f"{net}.{host.octet}" for host in hosts}, "user": USER,
        "fastgpt_version": version, "stand_ins": stand_ins, "images": others,
        "ssh_key": str(SSH / "id_ed25519"), "known_hosts": str(SSH / "known_hosts"),
        "files_url": f"http://{net}.{INFRA_OCTET}:8080", "registry": f"{net}.{INFRA_OCTET}:5000",
    }
    write_if_changed(path, json.dumps(state, indent=2) + "\n")
    return path


def remove_orphan_cgroups() -> None:
    """A killed engine inside a lab host leaves empty v1 groups beside those of this machine's containers."""
    live = set(output(["docker", "ps", "-q", "--no-trunc"]).split())
    for top in Path("/sys/fs/cgroup").glob("*/docker"):
        for group in top.iterdir() if top.is_dir() else ():
            if not re.fullmatch(r"[0-9a-f]{64}", group.name) or group.name in live:
                continue
            try:
                if time.time() - group.stat().st_mtime < 2:  # another lab's container may just be starting in it
                    continue
                inside = [Path(base) for base, _dirs, _files in os.walk(group, topdown=False)]
                if any((path / "cgroup.procs").read_text().strip() for path in inside):
                    continue
                for path in inside:
                    path.rmdir()
            except OSError:
                continue


def down(lab: str) -> None:
    """Remove what up made: containers with their anonymous volumes, the network, the state, the sysctl."""
    mine = [c for c in lab_containers(lab) if host_of(lab, c["Name"].lstrip("/"))]
    if mine:
        with Step(f"remove {len(mine)} containers of lab {lab}") as step:
            step.run(["docker", "rm", "-fv", *(c["Name"].lstrip("/") for c in mine)])
    found = docker_inspect("network", network_name(lab))
    if found and (found[0].get("Labels") or {}).get(LABEL) == lab:
        output(["docker", "network", "rm", network_name(lab)])
    own_volume = volume_name(lab, own=True)
    if output(["docker", "volume", "ls", "-q", "--filter", f"name=^{own_volume}$"]).strip():
        output(["docker", "volume", "rm", own_volume])
    time.sleep(0.2)
    remove_orphan_cgroups()
    remove_disks(lab)
    shutil.rmtree(STATE / lab, ignore_errors=True)
    restore_limits()
    say(f"lab {lab} is gone" if mine else f"lab {lab}: nothing stood")


def restart_host(lab: str, host: str) -> None:
    """A power cut: the host is killed and boots again."""
    name = container_name(lab, host)
    found = docker_inspect("container", name)
    if not found:
        raise LabError(f"lab {lab} has no host {host}")
    with Step(f"restart {host}") as step:
        step.run(["docker", "kill", name])
        step.run(["docker", "start", name])
        network = docker_inspect("container", name)[0]["NetworkSettings"]["Networks"][network_name(lab)]
        address = str(network["IPAddress"])
        wait_host(lab, address.rpartition(".")[0], Host(host, "bookworm", int(address.rpartition(".")[2])))
