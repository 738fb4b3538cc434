# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The built tarball: what is in it, and that it works installed, far from the checkout."""

from __future__ import annotations

import os
import pathlib
import re
import shutil
import subprocess
import tarfile

import pytest
from conftest import Inventory
from sflab.runs import ROOT

BIN = ROOT / ".venv" / "bin"
NEEDED = ("meta/runtime.yml", "playbooks/site.yml", "playbooks/plan.yml", "playbooks/verify.yml", "playbooks/secrets.yml", "roles/plan/tasks/main.yml",
          "roles/model_server/files/model_server.py", "plugins/modules/oneapi_token.py", "plugins/filter/image_ref.py", "LICENSE", "README.md")  # fmt: skip
UNWANTED = re.compile(
    r"^\.|(^|/)(lab|tests|molecule|bench|__pycache__|build)(/|$)|\.pyc$|(^|/)vault[^/]*\.ya?ml|vault-password|\.tar\.gz$|\.log$|\.retry$|~$"
)


def _run(command: list[str], directory: pathlib.Path, **environment: str) -> str:
    # no ansible.cfg and no variable of the checkout reaches the installed collection
    env = {name: value for name, value in os.environ.items() if not name.startswith(("ANSIBLE_", "PYTHONPATH"))}
    env.update({"HOME": str(directory), "ANSIBLE_NOCOLOR": "1", "ANSIBLE_LOCAL_TEMP": str(directory / "tmp"), **environment})
    result = subprocess.run([str(BIN / command[0]), *command[1:]], cwd=directory, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


# What lies about in a checkout that was worked in.
PLANTED = (".venv/bin/python", ".lab/vault-password", ".demo/report.json", ".cache/x", ".ansible/x", "tests/output/x",
           "inventories/prod/group_vars/all/vault.yml", "inventories/prod/host_vars/app-1/vault.yaml", "inventories/prod/vault-password",
           "plugins/filter/__pycache__/image_ref.pyc", "apt.log",
           "inventories/prod/group_vars/all/vault.yml.4711.2026-01-01@00:00:00~")  # fmt: skip


@pytest.fixture(scope="module")
def tarball(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    directory = tmp_path_factory.mktemp("build")
    source = directory / "checkout"
    listed = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, check=True, capture_output=True, text=True)
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).exists():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, source / name, follow_symlinks=False)
    for name in PLANTED:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text("not for others\n", encoding="utf-8")
    _run(["ansible-galaxy", "collection", "build", "--output-path", str(directory), str(source)], directory)
    (built,) = directory.glob("selfhosted-fastgpt-*.tar.gz")
    return built


@pytest.fixture(scope="module")
def installed(tarball: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A directory that holds nothing but the collection."""
    directory = tmp_path_factory.mktemp("installed")
    _run(["ansible-galaxy", "collection", "install", "--offline", "--no-deps", "-p", str(directory), str(tarball)], directory)
    assert (directory / "ansible_collections" / "selfhosted" / "fastgpt" / "MANIFEST.json").is_file()
    return directory


def test_the_tarball_holds_what_it_should(tarball: pathlib.Path) -> None:
    with tarfile.open(tarball) as archive:
        members = archive.getmembers()
    names = [member.name for member in members]
    assert [name for name in names if UNWANTED.search(name)] == []
    assert [name for name in NEEDED if name not in names] == []
    assert sum(member.size for member in members) < 4 * 1024 * 1024
    # no link that leads out of it
    assert [member.name for member in members if member.issym() or member.islnk()] == []


@pytest.mark.parametrize("command", ["--syntax-check", "--list-tasks"])
def test_the_installed_playbook_can_be_read(command: str, installed: pathlib.Path, tmp_path: pathlib.Path) -> None:
    inventory = Inventory().write(tmp_path / "hosts.yml")
    text = _run(["ansible-playbook", "selfhosted.fastgpt.site", "-i", str(inventory), command], tmp_path, ANSIBLE_COLLECTIONS_PATH=str(installed))
    assert str(ROOT) + "/roles" not in text
    if command == "--list-tasks":
        assert "Serve the models" in text
        assert "Set up FastGPT" in text


def test_the_installed_plan_accepts_and_refuses(installed: pathlib.Path, tmp_path: pathlib.Path) -> None:
    inventory = Inventory()
    command = ["ansible-playbook", "selfhosted.fastgpt.plan", "-i", str(inventory.write(tmp_path / "hosts.yml")), "--tags", "plan_inventory"]
    text = _run(command, tmp_path, ANSIBLE_COLLECTIONS_PATH=str(installed))
    assert "failed=0" in text
    # its roles are those of the tarball
    assert str(installed) in text
    assert str(ROOT / "roles") not in text
    assert str(ROOT / ".collections") not in text

    inventory.servers[1]["model"] = "M3E-bas"
    inventory.write(tmp_path / "hosts.yml")
    with pytest.raises(AssertionError, match="did you mean M3E-base"):
        _run(command, tmp_path, ANSIBLE_COLLECTIONS_PATH=str(installed))
