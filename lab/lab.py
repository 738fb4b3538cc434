# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Raise and remove the lab: see README.md beside this file.

    lab.py prepare                       what can be done once: packages, dockerd, images, wheels, models
    lab.py up --name demo                hosts, registry, files; what stands already is kept
    lab.py down --name demo              removes what `up` made, nothing else
    lab.py restart-host --name demo app-1
    lab.py exec --name demo app-1 -- systemctl status docker
    lab.py clean                         also images, warm registry and .lab
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

from sflab import build, files, hosts, serve
from sflab.catalogue import (
    DEFAULT_FASTGPT,
    DEFAULT_HOSTS,
    LABEL,
    LOCAL,
    LabError,
    check_name,
    check_net,
    container_name,
    parse_hosts,
    parse_lab_images,
    version_tuple,
)
from sflab.common import FILES, STATE, locked, make_vault_password, output, say


def prepare(version: str) -> None:
    """Idempotent; when nothing changed it takes about a second."""
    build.ready_machine()
    make_vault_password()

    def fetch() -> None:
        build.fetch_for_images()
        files.fetch_tiktoken()
        files.make_models()
        files.fetch_wheels()

    build.together(lambda: build.build_bookworm(version), build.build_trixie, fetch)


def up(arguments: argparse.Namespace) -> None:
    """Hosts, registry and files of one lab."""
    name, net, version = check_name(arguments.name), check_net(arguments.net), arguments.fastgpt_version
    wanted = parse_hosts(arguments.host or list(DEFAULT_HOSTS))
    chosen = parse_lab_images(os.environ.get("LAB_IMAGES", ""))
    version_tuple(version)
    with locked():
        prepare(version)
        served = serve.choose(version, chosen)
        serve.announce(served)
        hosts.ensure_network(name, net)
        push_to = serve.up_infra(name, net, chosen)
        with ThreadPoolExecutor(max_workers=2) as pool:
            filling = pool.submit(serve.fill, push_to, served)
            raising = pool.submit(hosts.up_hosts, name, net, wanted)
        raising.result()
        filling.result()
        stand_ins = [serve.state_entry(item) for item in served if item.kind == "stand-in"]
        others = [serve.state_entry(item) for item in served if item.kind != "stand-in"]
        path = hosts.write_state(name, net, wanted, stand_ins, others, version)
    say(f"lab {name} stands: {path}")


def bare(arguments: argparse.Namespace) -> None:
    """Hosts and nothing else: no registry, no files, no service images."""
    name, net = check_name(arguments.name), check_net(arguments.net)
    wanted = parse_hosts(arguments.host or list(DEFAULT_HOSTS))
    with locked():
        build.ready_machine()
        build.build_hosts({host.suite for host in wanted})
        hosts.ensure_network(name, net)
        hosts.up_hosts(name, net, wanted)


def clean() -> None:
    """Everything of the lab, of all names."""
    with locked():
        names = sorted({c["Config"]["Labels"][LABEL] for c in hosts.lab_containers()})
        for name in names:
            hosts.down(name)
        volumes = [v for v in output(["docker", "volume", "ls", "-q"]).split() if v == "sflab-registry" or v.startswith("sflab-registry-")]
        if volumes:
            output(["docker", "volume", "rm", *volumes])
        # Not by force: an image that somebody else's container runs stays.
        tags = output(["docker", "image", "ls", "--format", "{{.Repository}}:{{.Tag}}", f"{LOCAL}/*"]).split()
        for tag in sorted(tags, key=lambda name: "/debian:" in name):
            output(["docker", "image", "rm", tag], check=False)
        for image in output(["docker", "image", "ls", "-q", "--filter", f"label={LABEL}.image", "--filter", "dangling=true"]).split():
            output(["docker", "image", "rm", image], check=False)
    shutil.rmtree(STATE)
    stopped = build.stop_engine()
    say(f"images, registry and .lab are gone; {'dockerd is stopped' if stopped else 'dockerd keeps running'}; Debian packages stay")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    whole = argparse.ArgumentParser(prog="lab.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = whole.add_subparsers(dest="command", required=True)

    def add(name: str, text: str, named: bool = True) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text)
        if named:
            command.add_argument("--name", default="demo", help="the lab's name, part of every container's")
        return command

    for command in (add("prepare", "packages, dockerd, images, wheels, models", named=False), add("up", "raise a lab")):
        command.add_argument("--fastgpt-version", default=DEFAULT_FASTGPT)
    command.add_argument("--net", default="172.31.77", help="first three octets of its /24")
    command.add_argument("--host", action="append", metavar="NAME=SUITE=OCTET[=GPUS[=DISK_GB]]", help=f"default: {' '.join(DEFAULT_HOSTS)}")
    command.add_argument("--bare", action="store_true", help="hosts alone, without registry and files")
    add("down", "remove a lab")
    add("restart-host", "kill a host and boot it again").add_argument("host")
    execute = add("exec", "run a command as root on a host")
    execute.add_argument("host")
    execute.add_argument("words", nargs="+")
    add("clean", "remove every lab, the images and .lab", named=False)
    return whole


def main() -> int:
    """One command."""
    arguments = parser().parse_args()
    try:
        if arguments.command == "prepare":
            with locked():
                prepare(arguments.fastgpt_version)
            say(f"ready; files for the lab are in {FILES}")
        elif arguments.command == "up":
            (bare if arguments.bare else up)(arguments)
        elif arguments.command == "down":
            with locked():
                hosts.down(check_name(arguments.name))
        elif arguments.command == "restart-host":
            hosts.restart_host(check_name(arguments.name), arguments.host)
        elif arguments.command == "exec":
            name = container_name(check_name(arguments.name), arguments.host)
            return subprocess.run(["docker", "exec", name, *arguments.words], check=False).returncode
        else:
            clean()
    except LabError as exc:
        print(f"lab: {exc}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
