# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import datetime
from collections.abc import Mapping
from pathlib import Path

import pytest
import yaml
from ansible.errors import AnsibleError, AnsibleFilterError, AnsibleUndefinedVariable
from ansible_collections.selfhosted.fastgpt.plugins.filter.variable_faults import variable_faults

OPTIONS = {
    "oneapi_port": {"type": "int"},
    "share": {"type": "float"},
    "mongodb_replica_set": {"type": "str"},
    "data_root": {"type": "path"},
    "oneapi_root_password": {"type": "str", "no_log": True},
    "own_ca": {"type": "bool"},
    "names": {"type": "list", "elements": "str"},
    "model_servers": {"type": "list", "elements": "dict"},
    "image_registries": {"type": "dict"},
}
SPECIFICATIONS = [{"argument_specs": {"main": {"options": OPTIONS}, "verify": {}}}]


def look(values):
    return variable_faults({"box": values}, SPECIFICATIONS)["box"]


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("oneapi_port", False, "false: is a boolean"),
        ("oneapi_port", 8000.0, "8000.0: has a decimal point"),
        ("oneapi_port", "08000", '"08000": has a leading zero'),
        ("oneapi_port", "８０００", "has digits of another script"),
        ("oneapi_port", "٨٠٠٠", "has digits of another script"),
        ("oneapi_port", None, "null: has no value"),
        ("share", True, "true: is a boolean"),
        ("mongodb_replica_set", False, "false: is a boolean"),
        ("mongodb_replica_set", 1.1, "1.1: is a number to YAML, which drops zeros"),
        ("data_root", datetime.date(2026, 1, 1), '"2026-01-01": is a date to YAML'),
        ("data_root", None, "null: has no value"),
        ("own_ca", "maybe", '"maybe": is neither true nor false'),
        ("names", ["a", False], '["a", false]: is a boolean'),
    ],
)
def test_a_value_that_means_something_else(name, value, words):
    found = look({name: value})
    assert len(found["faults"]) == 1
    assert found["faults"][0].startswith(f"{name}: ") and words in found["faults"][0], found
    assert found["unusable"] == []


@pytest.mark.parametrize(
    "values",
    [
        {"oneapi_port": 8000, "share": 0.5, "mongodb_replica_set": "rs0", "data_root": "/srv/数据", "own_ca": "yes"},
        {"oneapi_port": "8000", "share": 1, "mongodb_replica_set": 0, "names": ["a", 1], "own_ca": True},
        {"oneapi_port": "abc", "names": "a, b", "model_servers": [{"model": "x"}], "image_registries": {"docker.io": None}},
        {"oneapi_port": "0", "share": "0.5"},
        {"oneapi_root_password": True},
    ],
)
def test_what_is_left_to_the_specifications(values):
    assert look(values) == {"faults": [], "unusable": []}


@pytest.mark.parametrize(
    ("name", "meant"),
    [("oneapi_prot", "oneapi_port"), ("model_server", "model_servers"), ("image_registeries", "image_registries"), ("data-root", "data_root")],
)
def test_a_name_that_is_nearly_one_of_ours(name, meant):
    found = look({name: "secret of somebody"})["faults"]
    assert found == [f"{name}: (not shown): is no variable of this collection, so nothing reads it. Write {meant} if that is meant, else rename it."]
    # somebody who sets both knows what they do
    assert look({name: "x", meant: [] if meant == "model_servers" else "1"})["faults"] == []


@pytest.mark.parametrize("name", ["oneapi_port_old", "vault_oneapi_root_password", "my_port", "ansible_port", "plan__share", "oneapi__port", "mongodb_dir"])
def test_names_of_others_are_left_alone(name):
    assert look({name: False}) == {"faults": [], "unusable": []}


class Templates(Mapping):
    """Variables whose lookup fails, as hostvars do; a nested one fails when it is looked at."""

    def __init__(self, **errors):
        self.errors = errors

    def __getitem__(self, name):
        raise self.errors[name]

    def __iter__(self):
        return iter(self.errors)

    def __len__(self):
        return len(self.errors)


class TemplateSyntaxError(AnsibleError):
    pass


class AnsibleVaultError(AnsibleError):
    pass


def caused(cause):
    error = AnsibleError("Error while resolving value: SECRET")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (AnsibleUndefinedVariable("'x' is undefined"), "(undefined): uses a variable that is not defined"),
        (caused(AnsibleUndefinedVariable("'x' is undefined")), "(undefined): uses a variable that is not defined"),
        (caused(TemplateSyntaxError("unexpected '}'")), "(template): has an error of syntax"),
        (RecursionError("maximum recursion depth exceeded"), "(template): its template needs its own value"),
        (AnsibleError("Recursive loop detected in template"), "(template): its template needs its own value"),
        (caused(AnsibleVaultError("no vault secrets")), "(vault): cannot be decrypted"),
        (ValueError("SECRET"), "(template): its template cannot be resolved"),
    ],
)
def test_a_template_that_cannot_be_resolved(error, words):
    for values in (Templates(oneapi_root_password=error), {"model_servers": [{"weights": Templates(id=error)}]}):
        name = next(iter(values))
        found = look(values)
        assert found["unusable"] == [name]
        assert len(found["faults"]) == 1 and found["faults"][0].startswith(f"{name}: {words}")
        assert "SECRET" not in found["faults"][0]


def test_the_defaults_of_every_role_are_accepted():
    roles = Path(__file__).resolve().parents[4] / "roles"
    specifications = [yaml.safe_load(path.read_text()) for path in roles.glob("*/meta/argument_specs.yml")]
    values = {}
    for specification in specifications:
        for entry in specification["argument_specs"].values():
            values.update({name: option["default"] for name, option in (entry.get("options") or {}).items() if "default" in option})
    assert len(values) > 100
    texts = [path.read_text() for path in roles.glob("*/meta/argument_specs.yml")]
    assert variable_faults({"box": values}, texts) == variable_faults({"box": values}, specifications) == {"box": {"faults": [], "unusable": []}}


@pytest.mark.parametrize("given", [([], []), ({}, {})])
def test_wrong_use(given):
    with pytest.raises(AnsibleFilterError, match="variable_faults"):
        variable_faults(*given)
