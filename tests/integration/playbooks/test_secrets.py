# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""playbooks/secrets.yml: a complete vault file, made once, with nothing of it to be seen."""

from __future__ import annotations

import pathlib
import stat
import subprocess
from typing import Any

import pytest
import yaml
from conftest import SECRETS
from sflab.runs import ROOT


class Vault:
    """A vault file to be, and its password."""

    def __init__(self, directory: pathlib.Path) -> None:
        self.password = directory / "password"
        self.password.write_text("the password of a vault\n", encoding="utf-8")
        self.path = directory / "group_vars" / "all" / "vault.yml"
        self.extravars = {"secrets_file": str(self.path), "secrets_password_file": str(self.password)}

    def _vault(self, *arguments: str, text: str | None = None) -> str:
        command = [str(ROOT / ".venv" / "bin" / "ansible-vault"), arguments[0], "--vault-password-file", str(self.password), *arguments[1:]]
        return subprocess.run(command, input=text, check=True, capture_output=True, text=True).stdout

    def read(self) -> dict[str, Any]:
        values: dict[str, Any] = yaml.safe_load(self._vault("view", str(self.path)))
        return values

    def write(self, values: dict[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._vault("encrypt", "--output", str(self.path), "-", text=yaml.safe_dump(values))

    @property
    def environment(self) -> dict[str, str]:
        return {"ANSIBLE_VAULT_PASSWORD_FILE": str(self.password)}


@pytest.fixture
def vault(tmp_path: pathlib.Path) -> Vault:
    return Vault(tmp_path)


def _is_silent(output: str, values: dict[str, Any]) -> None:
    for name, value in values.items():
        assert str(value) not in output, f"{name} is in the output"


def test_the_file_is_complete_encrypted_and_written_once(vault: Vault, play: Any) -> None:
    first = play("secrets.yml", "localhost,", extravars=vault.extravars, environment=vault.environment, verbosity=3)
    assert first.rc == 0, first.stdout
    values = vault.read()
    # every secret that the plan asks for, and all of them different
    assert set(SECRETS) <= set(values)
    assert len(set(values.values())) == len(values)
    text = vault.path.read_text(encoding="ascii")
    assert text.startswith("$ANSIBLE_VAULT;")
    assert stat.S_IMODE(vault.path.stat().st_mode) == 0o600
    _is_silent(text, values)
    _is_silent(first.stdout, values)

    second = play("secrets.yml", "localhost,", extravars=vault.extravars, environment=vault.environment, verbosity=3)
    assert second.rc == 0, second.stdout
    assert second.stats["changed"] == {}
    assert vault.path.read_text(encoding="ascii") == text
    _is_silent(second.stdout, values)


def test_what_is_there_is_kept_and_what_is_missing_added(vault: Vault, play: Any) -> None:
    own = {"oneapi_root_password": "my-own-9pass-word", "a_value_of_mine": "kept-as-it-is-42", "mongodb_keyfile": "UXdlcnR5VWlPcEFzRGZHaEprTHpYY1Zi"}
    vault.write(own)
    run = play("secrets.yml", "localhost,", extravars=vault.extravars, environment=vault.environment, verbosity=3)
    assert run.rc == 0, run.stdout
    values = vault.read()
    assert {name: values[name] for name in own} == own
    assert set(SECRETS) <= set(values)
    assert stat.S_IMODE(vault.path.stat().st_mode) == 0o600
    _is_silent(run.stdout, values)
    # the file before is kept beside it, encrypted as it was
    for backup in vault.path.parent.glob("vault.yml.*"):
        assert backup.read_text(encoding="ascii").startswith("$ANSIBLE_VAULT;")
        assert stat.S_IMODE(backup.stat().st_mode) == 0o600


def test_check_mode_writes_nothing(vault: Vault, play: Any) -> None:
    run = play("secrets.yml", "localhost,", extravars=vault.extravars, environment=vault.environment, cmdline="--check --diff")
    assert run.rc == 0, run.stdout
    assert not vault.path.exists()
    assert "+oneapi_root_password" not in run.stdout


@pytest.mark.parametrize("missing", ["secrets_file", "secrets_password_file"])
def test_it_says_what_it_needs(missing: str, vault: Vault, play: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ANSIBLE_VAULT_PASSWORD_FILE", raising=False)
    extravars = {name: value for name, value in vault.extravars.items() if name != missing}
    run = play("secrets.yml", "localhost,", extravars=extravars)
    assert run.rc != 0
    message = str(run.failed[0]["res"]["msg"])
    assert f"{missing}: unset" in message
    assert f"-e {missing}=" in message
    assert not vault.path.exists()
