# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The built tarball: what is in it, and that it works installed, far from the checkout."""

from __future__ import annotations

import json
import os
import pathlib
import re
import shutil
import subprocess
import tarfile
import typing as t

import pytest
import yaml
from conftest import Inventory
from sflab.runs import ROOT

BIN = ROOT / ".venv" / "bin"
NEEDED = ("meta/runtime.yml", "playbooks/site.yml", "playbooks/plan.yml", "playbooks/facts.yml", "playbooks/verify.yml", "playbooks/secrets.yml",
          "roles/plan/tasks/report.yml", "roles/model_server/files/model_server.py", "plugins/modules/oneapi_token.py", "plugins/filter/image_ref.py",
          "LICENSE", "README.md")  # fmt: skip
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


# -- docs/examples

MODULES = sorted(path.stem for path in (ROOT / "plugins" / "modules").glob("*.py"))
EXAMPLES = sorted((ROOT / "docs" / "examples").glob("*.yml"))
PREFIX = "selfhosted.fastgpt."


@pytest.fixture(scope="module")
def documented() -> dict[str, dict[str, t.Any]]:
    """The options of every module, as ansible-doc tells them."""
    environment = {**os.environ, "ANSIBLE_COLLECTIONS_PATH": str(ROOT / ".collections"), "ANSIBLE_NOCOLOR": "1"}
    command = [str(BIN / "ansible-doc"), "-t", "module", "-j", *(PREFIX + name for name in MODULES)]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=True)
    return {name: data["doc"]["options"] for name, data in json.loads(result.stdout).items()}


def tasks_of(item: t.Any, defaults: dict[str, t.Any]) -> t.Iterator[tuple[str, dict[str, t.Any], dict[str, t.Any]]]:
    """Every task that uses a module of ours: its name, its arguments, and the module_defaults that it gets."""
    if isinstance(item, list):
        for each in item:
            yield from tasks_of(each, defaults)
    elif isinstance(item, dict):
        own = {**defaults, **(item.get("module_defaults") or {}).get(f"group/{PREFIX}all", {})}
        for key, value in item.items():
            if key.startswith(PREFIX) and key.removeprefix(PREFIX) in MODULES:
                yield key, value or {}, own
            elif key in ("tasks", "pre_tasks", "post_tasks", "handlers", "block", "rescue", "always"):
                yield from tasks_of(value, own)


def faults_in(arguments: dict[str, t.Any], options: dict[str, t.Any], where: str, defaults: t.Collection[str] = ()) -> list[str]:
    """What the options of a module, or of a dictionary inside one, do not allow."""
    names = {alias: name for name, option in options.items() for alias in (name, *option.get("aliases", []))}
    found = [f"{where}.{key}: there is no such option" for key in arguments if key not in names]
    there = {names.get(key, key) for key in (*arguments, *defaults)}
    found += [f"{where}.{name}: is required" for name, option in options.items() if option.get("required") and name not in there]
    for key, value in arguments.items():
        option = options.get(names.get(key, ""))
        if option is None or isinstance(value, str) and "{{" in value:
            continue
        if "choices" in option and value not in option["choices"]:
            found.append(f"{where}.{key}: {value!r} is none of {option['choices']}")
        if (option.get("type") == "list") != isinstance(value, list) or (option.get("type") == "dict") != isinstance(value, dict):
            found.append(f"{where}.{key}: {value!r} is no {option.get('type')}")
        elif option.get("suboptions"):
            for index, each in enumerate(value if isinstance(value, list) else [value]):
                found += faults_in(each, option["suboptions"], f"{where}.{key}[{index}]")
    return found


def test_every_module_is_shown_in_an_example() -> None:
    shown = {name for path in EXAMPLES for name, _arguments, _defaults in tasks_of(yaml.safe_load(path.read_text(encoding="utf-8")), {})}
    assert [name for name in MODULES if PREFIX + name not in shown] == []


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_give_options_that_exist(path: pathlib.Path, documented: dict[str, dict[str, t.Any]]) -> None:
    found = []
    for name, arguments, defaults in tasks_of(yaml.safe_load(path.read_text(encoding="utf-8")), {}):
        found += faults_in(arguments, documented[name], name, defaults)
        # a default that one of the group's modules does not know fails its task
        known = {alias for option, spec in documented[name].items() for alias in (option, *spec.get("aliases", []))}
        found += [f"{name}: module_defaults.{key}: there is no such option" for key in defaults if key not in known]
    assert found == []


def test_examples_with_faults_are_found(documented: dict[str, dict[str, t.Any]]) -> None:
    play = [{"block": [{f"{PREFIX}oneapi_channel": {"url": "u", "chanels": [], "channels": [{"nme": "x"}], "key_policy": "never", "purge": ["x"]}}]}]
    ((name, arguments, _defaults),) = tasks_of(play, {})
    assert sorted(faults_in(arguments, documented[name], "m")) == [
        "m.chanels: there is no such option",
        "m.channels[0].name: is required",
        "m.channels[0].nme: there is no such option",
        "m.key_policy: 'never' is none of ['on_create', 'always']",
        "m.purge: ['x'] is no bool",
    ]


def test_examples_can_be_read(tmp_path: pathlib.Path) -> None:
    command = ["ansible-playbook", "--syntax-check", "-i", "localhost,", *map(str, EXAMPLES)]
    text = _run(command, tmp_path, ANSIBLE_COLLECTIONS_PATH=str(ROOT / ".collections"))
    assert text.count("playbook: ") == len(EXAMPLES)
