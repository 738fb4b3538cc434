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
from sflab.catalogue import DEFAULT_FASTGPT, DEFAULT_HOSTS  # noqa: E402
from sflab.common import VAULT, VAULT_PASSWORD  # noqa: E402
from sflab.runs import Run, run_playbook, vault_environment  # noqa: E402

NAME, NET = os.environ.get("LAB_NAME", "mol"), os.environ.get("LAB_NET", "172.31.78")
HOSTS = {"app-1": f"{NET}.11", "gpu-1": f"{NET}.12", "gpu-2": f"{NET}.13", "gpu-3": f"{NET}.14"}
# What `lab.py up` is asked for: the demo's hosts, two more model hosts, the last of which pretends to have two GPUs.
RAISED = (*DEFAULT_HOSTS, "gpu-2=bookworm=13", "gpu-3=trixie=14=2")
INVENTORY = [str(ROOT / "inventories" / "lab"), str(ROOT / "inventories" / "lab-models")]
SSH = ["ssh", "-o", "BatchMode=yes", "-i", str(ROOT / ".lab" / "ssh" / "id_ed25519"), "-o", f"UserKnownHostsFile={ROOT / '.lab' / 'ssh' / 'known_hosts'}"]


def site(directory: str, **options: Any) -> Run:
    """site.yml on the scenario's hosts."""
    return play(ROOT / "playbooks" / "site.yml", directory, **options)


def play(playbook: pathlib.Path, directory: str, **options: Any) -> Run:
    """A playbook on the scenario's hosts."""
    environment = {**vault_environment(), "LAB_NET": NET, **options.pop("environment", {})}
    return run_playbook(playbook, INVENTORY, ROOT / ".lab" / NAME / directory, environment=environment, quiet=True, **options)


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
