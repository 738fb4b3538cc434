# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The lab's registry and file server: what they serve, and filling them."""

from __future__ import annotations

import json
import ssl
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from .catalogue import INFRA_OCTET, LABEL, LOCAL, Image, LabError, container_name, images_for, network_name, volume_name
from .common import FILES, Step, docker_inspect, image_info, output, say, tree_hash

PROBE_SECONDS = 4
MANIFESTS = "application/vnd.docker.distribution.manifest.v2+json, application/vnd.oci.image.manifest.v1+json"
HUBS = {"docker.io": "https://registry-1.docker.io/v2/", "ghcr.io": "https://ghcr.io/v2/"}


@dataclass
class Served:
    """A public name, the local image behind it, and what that really is."""

    image: Image
    local: str
    kind: str  # real | local | stand-in
    real_version: str


def cpu_has_avx() -> bool:
    """MongoDB from 5.0 on needs it; the roles take 4.4 where it is missing."""
    return " avx " in Path("/proc/cpuinfo").read_text().replace("\n", " \n")


def hub_answers(registry: str) -> bool:
    """Whether an image registry can be reached from here."""
    try:
        with urllib.request.urlopen(HUBS[registry], timeout=PROBE_SECONDS, context=ssl.create_default_context()) as answer:
            headers = answer.headers
    except urllib.error.HTTPError as exc:
        headers = exc.headers
    except OSError:
        return False
    return "docker-distribution-api-version" in {name.lower() for name in headers}


def choose(version: str, chosen: dict[str, str]) -> list[Served]:
    """For each image: the local one that LAB_IMAGES names, else the real one, else the stand-in."""
    served: list[Served] = []
    reachable: dict[str, bool] = {}
    avx = cpu_has_avx()
    for image in images_for(version):
        if image.key in chosen:
            local = chosen[image.key]
            if not image_info(local):
                raise LabError(f"LAB_IMAGES: {image.key}={local}: the local Docker has no such image")
            served.append(Served(image, local, "local", f"{local} of the local Docker, unchanged"))
            continue
        if image.pulled and image.registry not in reachable:
            reachable[image.registry] = hub_answers(image.registry)
        if image.pulled and reachable[image.registry]:
            if image.needs_avx not in (None, avx):
                continue  # the roles never ask for it on this CPU
            if image_info(image.public):
                served.append(Served(image, image.public, "real", image.public))
                continue
            try:
                with Step(f"pull {image.public}") as step:
                    step.run(["docker", "pull", image.public])
                served.append(Served(image, image.public, "real", image.public))
                continue
            except LabError as exc:
                say(f"!! {image.public} cannot be pulled though its registry answers: {str(exc).splitlines()[-1].strip()}")
        if image_info(image.stand_in):
            served.append(Served(image, image.stand_in, "stand-in", image.real_version))
        else:
            say(f"!! {image.public}: neither the real image nor a stand-in is here; the lab does not serve it")
    return served


def announce(served: list[Served]) -> None:
    """Nobody may take a stand-in for the real thing."""
    for item in served:
        if item.kind == "stand-in":
            say(f"STAND-IN: {item.image.public} is really: {item.real_version}")
        else:
            say(f"{item.kind} image: {item.image.public} is {item.real_version}")


def up_infra(lab: str, net: str, chosen: dict[str, str]) -> str:
    """The container with the registry and the file server; returns where this machine pushes to."""
    name = container_name(lab, "infra")
    image = f"{LOCAL}/infra:latest"
    info = image_info(image)
    if not info:
        raise LabError(f"{image} is missing: run `lab.py prepare` first")
    wanted = tree_hash(str(info["Id"]), net, volume_name(lab, own=bool(chosen)), str(FILES))
    found = docker_inspect("container", name)
    if found and (found[0]["Config"]["Labels"].get(f"{LABEL}.config") != wanted or not found[0]["State"]["Running"]):
        output(["docker", "rm", "-fv", name])
        found = []
    if not found:
        with Step("registry and file server") as step:
            step.run(["docker", "run", "-d", "--name", name, "--hostname", "infra", "--network", network_name(lab), "--ip", f"{net}.{INFRA_OCTET}",
                      "--label", f"{LABEL}={lab}", "--label", f"{LABEL}.config={wanted}", "-p", "127.0.0.1::5000",
                      "-v", f"{volume_name(lab, own=bool(chosen))}:/var/lib/registry", "-v", f"{FILES}:/srv/files:ro", image])
        found = docker_inspect("container", name)
    port = found[0]["NetworkSettings"]["Ports"]["5000/tcp"][0]["HostPort"]
    push_to = f"127.0.0.1:{port}"
    deadline = time.monotonic() + 30
    while True:
        try:
            with urllib.request.urlopen(f"http://{push_to}/v2/", timeout=3):
                break
        except OSError as exc:
            if time.monotonic() > deadline:
                raise LabError(f"the lab's registry does not answer: {exc}; see docker logs {name}") from exc
            time.sleep(0.1)
    return push_to


def config_digest(push_to: str, path: str, tag: str) -> str:
    """The image id behind a tag in the lab's registry; empty where it has none."""
    request = urllib.request.Request(f"http://{push_to}/v2/{path}/manifests/{tag}", headers={"Accept": MANIFESTS})
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return str(json.load(answer).get("config", {}).get("digest", ""))
    except (urllib.error.HTTPError, ValueError):
        return ""


def fill(push_to: str, served: list[Served]) -> None:
    """Push what the registry does not have in this very form."""
    for item in served:
        info = image_info(item.local)
        path = f"{item.image.registry}/{item.image.repository}"
        if info and config_digest(push_to, path, item.image.tag) == info["Id"]:
            continue
        target = f"{push_to}/{path}:{item.image.tag}"
        with Step(f"push {item.image.public}") as step:
            step.run(["docker", "tag", item.local, target])
            try:
                step.run(["docker", "push", target])
            finally:
                output(["docker", "image", "rm", target], check=False)


def state_entry(item: Served) -> dict[str, str]:
    """For state.json and the demo's report."""
    return {"image": item.image.public, "stand_in" if item.kind == "stand-in" else "local": item.local, "real_version": item.real_version}
