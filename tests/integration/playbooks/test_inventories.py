# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The inventories of this collection pass the plan, with secrets made as the README says."""

from __future__ import annotations

import pathlib
import shutil
from typing import Any

import pytest
from conftest import report
from sflab.runs import ROOT


@pytest.mark.parametrize("name", ["quickstart", "prod", "cluster", "lab"])
def test_the_inventory_passes_the_plan(name: str, tmp_path: pathlib.Path, play: Any) -> None:
    password = tmp_path / "password"
    password.write_text("the password of a vault\n", encoding="utf-8")
    vault = tmp_path / "vault.yml"
    made = play("secrets.yml", "localhost,", extravars={"secrets_file": str(vault), "secrets_password_file": str(password)})
    assert made.rc == 0, made.stdout
    # a copy, without a vault file that its owner may have put beside it
    inventory = tmp_path / "copy" / "inventories" / name
    shutil.copytree(ROOT / "inventories" / name, inventory, ignore=shutil.ignore_patterns("vault*.yml*"))
    run = play(
        "plan.yml", inventory, cmdline=f"--tags plan_inventory -e @{vault}", environment={"ANSIBLE_VAULT_PASSWORD_FILE": str(password)}
    )  # fmt: skip
    assert run.rc == 0, report(run) or run.stdout
    assert run.stats["changed"] == {}
    assert run.round_trips == {}, "a host was contacted"


def test_without_secrets_the_report_says_how_to_make_them(tmp_path: pathlib.Path, play: Any) -> None:
    inventory = tmp_path / "quickstart"
    shutil.copytree(ROOT / "inventories" / "quickstart", inventory, ignore=shutil.ignore_patterns("vault*.yml*"))
    run = play("plan.yml", inventory, cmdline="--tags plan_inventory")
    assert run.rc != 0
    lines = report(run)
    assert any("oneapi_root_password: (unset): is required. Let playbooks/secrets.yml generate it" in line for line in lines), lines
    assert len(lines) == 13, lines
