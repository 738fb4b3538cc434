# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Inventories that cannot work: each is refused in one report that names every fault, before a host is contacted.

They stand in bad_inventories.yml, as changes of the good inventory of conftest.py.
"""

from __future__ import annotations

import pathlib
import sys
import textwrap
from typing import Any

import pytest
import yaml
from conftest import CLUMSY, GROUPS, SECRETS, Inventory, plain, report, secrets_in

FIRST = {"node_address": "192.0.2.1"}
SECOND = {"node_address": "192.0.2.2"}
TABLE = yaml.safe_load(pathlib.Path(__file__).with_name("bad_inventories.yml").read_text(encoding="utf-8"))
# The plan refuses these, or Ansible does when it cannot read the files.
CASES: dict[str, dict[str, Any]] = {case["name"]: case for case in TABLE["refused by the plan"]}
UNREAD: dict[str, dict[str, Any]] = {case["name"]: case for case in TABLE["refused by Ansible"]}
HOSTS: dict[str, dict[str, Any]] = {case["name"]: case for case in TABLE["refused by the look at the host"]}


# Cases of one host in a run, and GPU hosts beside it that stand for a case each.
PER_RUN = 6
PER_RUN_HOSTS = 9
SERVERS = {f"model_servers[{number}]" for number in range(3)}


def changed(case: dict[str, Any]) -> set[str]:
    """The variables, groups and model servers that a case changes."""
    names = set(case.get("vars") or {}) | set(yaml.safe_load(case["typed"]) if "typed" in case and "file" not in case else ())
    servers: dict[int, Any] = case.get("servers") or {}
    if "groups" in case:
        names |= {"groups", "node_address"}
    # without one of them the others have other numbers
    if "groups" in case or "model_servers" in names or None in servers.values() or set(servers) - {0, 1, 2}:
        names |= SERVERS
    return (names - {"model_servers"}) | {f"model_servers[{number}]" for number in servers}


def of_one_host(case: dict[str, Any]) -> bool:
    """Whether the case is about the models of a host and nothing else, so that a host of its own can stand for it."""
    servers = case.get("servers") or {}
    return set(case) <= {"name", "servers", "faults", "lines"} and set(servers) <= {0, 1, 2} and None not in servers.values()


def runs() -> list[list[dict[str, Any]]]:
    """Cases that can share a run: a line of the report is a refusal, whatever else stands in it."""
    own = [case for case in CASES.values() if of_one_host(case)]
    starts = range(0, len(own), PER_RUN_HOSTS)
    beside = [[{**case, "host": f"gpu-{number}"} for number, case in enumerate(own[start : start + PER_RUN_HOSTS])] for start in starts]
    together: dict[int, list[dict[str, Any]]] = {}
    packed: list[list[dict[str, Any]]] = []
    for case in CASES.values():
        if of_one_host(case):
            continue
        if "run" in case:
            together.setdefault(case["run"], []).append(case)
            continue
        for run in packed:
            if len(run) < PER_RUN and all(changed(case).isdisjoint(changed(other)) for other in run):
                run.append(case)
                break
        else:
            packed.append([case])
    return [*beside, *together.values(), *packed]


def spoil(cases: list[dict[str, Any]]) -> Inventory:
    """The good inventory with the changes of some cases."""
    inventory = Inventory()
    for case in cases:
        if "host" in case:
            servers = [{**server, **case["servers"].get(index, {})} for index, server in enumerate(inventory.servers)]
            gpus = inventory.data["all"]["children"]["gpu"]["hosts"]
            # with several hosts each has to say its own
            gpus["box"]["node_address"] = "192.0.2.1"
            gpus[case["host"]] = {"node_address": f"192.0.2.{len(gpus) + 1}", "model_servers": servers}
            continue
        for index, values in sorted((case.get("servers") or {}).items(), reverse=True):
            if values is None:
                inventory.servers.pop(index)
            else:
                inventory.servers[index].update(values)
        for name, value in (case.get("vars") or {}).items():
            if value is None:
                inventory.vars.pop(name, None)
            else:
                inventory.vars[name] = value
        for group, hosts in (case.get("groups") or {}).items():
            if hosts is None:
                inventory.data["all"]["children"].pop(group)
            else:
                inventory.data["all"]["children"][group] = {"hosts": hosts}
    return inventory


def sources(cases: list[dict[str, Any]], directory: pathlib.Path) -> list[str]:
    """The files of an inventory: the good one with its changes, and one with what somebody typed."""
    files = [spoil(cases).write(directory / "hosts.yml")]
    typed = "".join(textwrap.indent(case["typed"], "    ") for case in cases if "typed" in case)
    text = "all:\n  vars:\n" + typed if typed else next((case["file"] for case in cases if "file" in case), None)
    if text is not None:
        files.append(directory / "typed.yml")
        files[1].write_text(text, encoding="utf-8")
    return [str(path) for path in files]


def refused(play: Any, cases: list[dict[str, Any]], directory: pathlib.Path, playbook: str = "plan.yml", cmdline: str = "--tags plan_inventory") -> list[str]:
    """The lines of the report, which must hold the wanted ones and nothing else about secrets or Ansible's insides."""
    inventory = spoil(cases)
    run = play(playbook, sources(cases, directory), cmdline=cmdline)
    text = plain(run.stdout)
    lines = report(run)
    assert run.rc != 0, text
    assert lines, text
    for case in cases:
        for parts in case["faults"]:
            parts = [*parts, *([f"[{case['host']}]"] if "host" in case else [])]
            assert any(all(part in line for part in parts) for line in lines), (case["name"], parts, lines)
    for secret in secrets_in(Inventory().vars) | secrets_in(inventory.vars):
        assert secret not in text
    for word in CLUMSY:
        assert word not in "\n".join(lines)
    for line in lines[1:]:
        # number, host, role, variable, value and rule, then what to do
        assert line.count(": ") >= 3, line
        assert line.endswith((".", "?")), line
    assert "Traceback" not in text
    assert run.stats["changed"] == {}
    # Ansible prints the message of a failure twice
    assert text.count("Nothing was changed. ") == 2, "more than one report"
    if "plan_inventory" in cmdline:
        assert run.stats["dark"] == {}
        assert run.round_trips == {}, "a host was contacted"
    return lines


def test_there_are_enough() -> None:
    assert len(TABLE["refused by the plan"]) == len(CASES), "a name stands twice"
    assert len(CASES) + len(UNREAD) + len(HOSTS) >= 120
    assert {group for case in CASES.values() for group, hosts in (case.get("groups") or {}).items() if hosts is None} == set(GROUPS)


def test_the_good_inventory_is_accepted(play: Any) -> None:
    run = play("plan.yml", Inventory(), cmdline="--tags plan_inventory", verbosity=3)
    assert run.rc == 0, run.stdout
    assert run.stats["changed"] == {}
    assert run.stats["dark"] == {}
    assert run.round_trips == {}
    for name, secret in SECRETS.items():
        assert secret not in run.stdout, f"{name} is in the output of -vvv"


@pytest.mark.parametrize("cases", runs(), ids=lambda cases: "; ".join(case["name"] for case in cases))
def test_a_bad_inventory_is_refused(cases: list[dict[str, Any]], play: Any, tmp_path: pathlib.Path) -> None:
    lines = refused(play, cases, tmp_path)
    # the wanted faults, and no wild consequences of them
    assert len(lines) - 1 <= sum(case.get("lines", len(case["faults"])) for case in cases), lines


def test_all_faults_are_in_one_report(play: Any, tmp_path: pathlib.Path) -> None:
    case = TABLE["everything that one person gets wrong on one day"]
    assert len(refused(play, [case], tmp_path)) > len(case["faults"])


# What Ansible cannot read never comes to the plan; ansible.cfg makes an error of what would be a warning.
@pytest.mark.parametrize("name", UNREAD)
def test_a_file_that_cannot_be_read_is_refused(name: str, play: Any, tmp_path: pathlib.Path) -> None:
    case = UNREAD[name]
    files = sources([case], tmp_path)
    options: dict[str, Any] = {}
    if "vault" in case:
        group_vars = tmp_path / "group_vars" / "all"
        group_vars.mkdir(parents=True)
        (group_vars / "vault.yml").write_text(case["vault"], encoding="utf-8")
        (tmp_path / "password").write_text("not the password\n", encoding="utf-8")
        options["environment"] = {"ANSIBLE_VAULT_PASSWORD_FILE": str(tmp_path / "password")}
    run = play("site.yml", files, **options)
    text = plain(run.stdout)
    assert run.rc != 0, text
    for part in case["output"]:
        assert part in text, text
    assert "Traceback" not in text
    assert run.total("changed") == 0
    assert run.round_trips == {}


# Without the tag the plan reads the hosts too, so that what is wrong there stands in the same report.
def test_site_refuses_it_too(play: Any, tmp_path: pathlib.Path) -> None:
    silent = {"name": "host", "faults": [["[box]", "ansible_host: 127.0.0.1", "does not answer"]]}
    cases = [*(CASES[name] for name in ("unknown model", "no secrets", "FastGPT v4.8.20")), silent]
    lines = refused(play, cases, tmp_path, "site.yml", "")
    assert len(lines) - 1 <= sum(len(case["faults"]) for case in cases) + 1, lines


def test_site_names_every_host_that_does_not_answer(play: Any) -> None:
    inventory = Inventory()
    inventory.hosts("gpu", box=FIRST, gpu_2={**SECOND, "ansible_host": "127.0.0.2"})
    run = play("site.yml", inventory)
    lines = report(run)
    assert run.rc != 0
    assert len(lines) == 3, run.stdout
    for host, address in (("[box]", "127.0.0.1"), ("[gpu-2]", "127.0.0.2")):
        assert any(all(part in line for part in (host, f"ansible_host: {address}:", "does not answer", "Check its address")) for line in lines), lines
    assert run.stats["changed"] == {}


# This machine stands for the host. Only one run: all of its faults come in one report.
def test_a_host_that_cannot_bear_it_is_refused(play: Any) -> None:
    inventory = Inventory()
    inventory.vars.update(ansible_connection="local", ansible_python_interpreter=sys.executable, ansible_become=False)
    inventory.vars.pop("ansible_port")
    for case in HOSTS.values():
        inventory.vars.update(case["vars"])
    run = play("plan.yml", inventory)
    text, lines = plain(run.stdout), report(run)
    assert run.rc != 0, text
    for case in HOSTS.values():
        for parts in case["faults"]:
            assert any(all(part in line for part in parts) for line in lines), (parts, lines)
    assert "Traceback" not in text
    assert run.stats["changed"] == {}
