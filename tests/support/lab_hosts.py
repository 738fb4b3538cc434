# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The lab of a molecule scenario, and playbook runs on it: LAB_NAME and LAB_NET say which."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "lab"))

import demo  # noqa: E402 - it lies beside the path that was just added
from sflab.catalogue import DEFAULT_FASTGPT, DEFAULT_HOSTS, parse_hosts  # noqa: E402
from sflab.common import VAULT, VAULT_PASSWORD  # noqa: E402
from sflab.runs import Run, run_playbook, vault_environment  # noqa: E402

SCENARIO = os.environ.get("LAB_SCENARIO", "default")
NAME, NET = os.environ.get("LAB_NAME", "mol"), os.environ.get("LAB_NET", "172.31.78")
# What `lab.py up` is asked for. default: the demo's hosts, the first of which pretends to have two GPUs, and one more model host.
# cluster: databases with a data disk of 2 GB each, and from gpu-3 on what the cluster grows by.
RAISED = {
    "default": (f"{DEFAULT_HOSTS[0]}=2", *DEFAULT_HOSTS[1:], "gpu-2=bookworm=13"),
    "cluster": (
        "db-1=trixie=11=0=2", "db-2=trixie=12=0=2", "db-3=trixie=13=0=2", "gw-1=trixie=21", "gw-2=bookworm=22", "gpu-1=bookworm=31",
        "gpu-2=bookworm=32", "app-1=trixie=41", "app-2=bookworm=42", "gpu-3=bookworm=33", "db-4=bookworm=14=0=2", "db-5=bookworm=15=0=2",
    ),
}[SCENARIO]  # fmt: skip
HOSTS = {host.name: f"{NET}.{host.octet}" for host in parse_hosts(list(RAISED))}
_INVENTORIES = ROOT / "inventories"
INVENTORY = {
    "default": [str(_INVENTORIES / "lab"), str(_INVENTORIES / "lab-models")],
    "cluster": [str(_INVENTORIES / "lab-cluster")],
}[SCENARIO]
GROWN = [str(_INVENTORIES / "lab-cluster"), str(_INVENTORIES / "lab-cluster-grown")]
SSH = ["ssh", "-o", "BatchMode=yes", "-i", str(ROOT / ".lab" / "ssh" / "id_ed25519"), "-o", f"UserKnownHostsFile={ROOT / '.lab' / 'ssh' / 'known_hosts'}"]


def site(directory: str, **options: Any) -> Run:
    """site.yml on the scenario's hosts."""
    return play(ROOT / "playbooks" / "site.yml", directory, **options)


def play(playbook: pathlib.Path, directory: str, **options: Any) -> Run:
    """A playbook on the scenario's hosts."""
    environment = {**vault_environment(), "LAB_NET": NET, **options.pop("environment", {})}
    inventory = options.pop("inventory", INVENTORY)
    return run_playbook(playbook, inventory, ROOT / ".lab" / NAME / directory, environment=environment, quiet=True, **options)


def vault() -> dict[str, str]:
    """The secrets of the lab."""
    command = [ROOT / ".venv" / "bin" / "ansible-vault", "view", "--vault-password-file", VAULT_PASSWORD, VAULT]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {name: value.strip("'\"") for name, _colon, value in (line.partition(": ") for line in text.splitlines()) if value}


def main() -> None:
    if sys.argv[1] == "up":
        demo.raise_lab(DEFAULT_FASTGPT, NAME, NET, RAISED)
        demo.make_secrets()
    else:
        subprocess.run([sys.executable, str(ROOT / "lab" / "lab.py"), "down", "--name", NAME], check=True)


if __name__ == "__main__":
    main()
