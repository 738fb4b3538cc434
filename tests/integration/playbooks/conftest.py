# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the playbook tests share: a good inventory, and a way to run a playbook on it as AWX does."""

from __future__ import annotations

import copy
import pathlib
import re
from collections.abc import Callable
from typing import Any

import pytest
import yaml
from sflab.runs import ROOT, Run, run_playbook

GROUPS = ("gpu", "gateway", "mongodb", "pgvector", "fastgpt")
# Long, all different, and easy to look for in an output.
SECRETS = {
    "model_server_master_key": "Qm4xZ7KpQm2vB9TnWc6dRf3HsQm8yLgEjU5aXi1o",
    "oneapi_root_password": "Rk7Tq2Xw9Lm4PzVb",
    "oneapi_root_access_token": "90f1c2d3e4b5a6978869504132fedcba",
    "oneapi_session_secret": "sEss10nTqWvPzR8kLmN2bYcF4gHjD6xU",
    "mongodb_root_password": "mR9vTz4Qk8WnLpXc",
    "mongodb_keyfile": "UXdlcnR5VWlPcEFzRGZHaEprTHpYY1ZiTm0xMjM0NTY3",
    "mongodb_fastgpt_password": "fG5hJk2LzXcVbNm8",
    "pgvector_password": "pV6tRw3QzXnMk9Lb",
    "fastgpt_root_password": "uH4jKd7WqZxC2vBn",
    "fastgpt_token_key": "tK3yNbVcXzLkJhGfDsAp8",
    "fastgpt_root_key": "rK5oQwErTyUiOpAsDfGh7",
    "fastgpt_file_token_key": "fT8kZxCvBnMqWeRtYuIo2",
}
# Nothing listens on port 1: whatever contacts a host shows as unreachable.
GOOD: dict[str, Any] = {
    "all": {
        "vars": {
            "ansible_host": "127.0.0.1",
            "ansible_port": 1,
            "ansible_connection": "ssh",
            "fastgpt_version": "v4.8.9",
            "model_servers": [
                {"model": "Qwen2.5-1.5B-Instruct", "port": 8001, "gpus": []},
                {"model": "M3E-base", "port": 8002, "gpus": []},
                {"model": "bge-reranker-base", "port": 8003, "gpus": []},
            ],
            **SECRETS,
        },
        "children": {group: {"hosts": {"box": {}}} for group in GROUPS},
    }
}
# What a user must never read. Only one of them is about a secret; the others are faults of the plan itself.
CLUMSY = ("Traceback", "Error while evaluating", "Error rendering", "Error while resolving", "ecursi", "Finalization of task args", "is undefined")


class Inventory:
    """A good inventory to spoil."""

    def __init__(self) -> None:
        self.data = copy.deepcopy(GOOD)

    @property
    def vars(self) -> dict[str, Any]:
        values: dict[str, Any] = self.data["all"]["vars"]
        return values

    @property
    def servers(self) -> list[dict[str, Any]]:
        values: list[dict[str, Any]] = self.vars["model_servers"]
        return values

    def hosts(self, group: str, **hosts: dict[str, Any]) -> None:
        """Give a group other hosts; a dash in a name is written as an underscore."""
        self.data["all"]["children"][group] = {"hosts": {name.replace("_", "-"): values for name, values in hosts.items()}}

    def write(self, path: pathlib.Path) -> pathlib.Path:
        path.write_text(yaml.safe_dump(self.data, sort_keys=False), encoding="utf-8")
        return path


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def report(run: Run) -> list[str]:
    """The lines of the plan's one report."""
    for failure in run.failed:
        message = str((failure["res"] or {}).get("msg", ""))
        if message.startswith("Nothing was changed."):
            return message.splitlines()
    return []


def secrets_in(values: Any) -> set[str]:
    """Every secret of an inventory as it is now, that is long enough to be told from a word."""
    return {str(value) for name, value in values.items() if name in SECRETS and isinstance(value, str) and len(value) >= 12}


@pytest.fixture
def play(tmp_path: pathlib.Path) -> Callable[..., Run]:
    """Run a playbook; `inventory` is an Inventory, or what ansible-runner takes."""

    def run(playbook: str, inventory: Any, **options: Any) -> Run:
        if isinstance(inventory, Inventory):
            inventory = inventory.write(tmp_path / "hosts.yml")
        path: str | pathlib.Path = ROOT / "playbooks" / playbook if playbook.endswith(".yml") else playbook
        return run_playbook(path, inventory, tmp_path / "runner", quiet=True, **options)

    return run
