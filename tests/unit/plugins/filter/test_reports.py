# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import pytest
from ansible.module_utils.common.arg_spec import ArgumentSpecValidator
from ansible_collections.selfhosted.fastgpt.plugins.filter.argument_faults import argument_faults
from ansible_collections.selfhosted.fastgpt.plugins.filter.fault_report import fault_report

SPEC = {
    "port": {"type": "int"},
    "share": {"type": "float"},
    "password": {"type": "str", "required": True, "no_log": True},
    "level": {"type": "str", "choices": ["info", "warn"]},
    "registries": {"type": "dict"},
    "enabled": {"type": "bool"},
    "users": {"type": "list", "elements": "dict", "options": {"name": {"type": "str", "required": True}, "share": {"type": "float"}}},
}


def errors(**values: object) -> list[str]:
    """What Ansible itself says, so that another release's words show here."""
    return list(ArgumentSpecValidator(SPEC).validate(values).error_messages)


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"password": "x", "port": "abc"}, "port: abc: must be a whole number. Correct its type."),
        ({"password": "x", "share": "half"}, "share: (str): must be a number. Correct its type."),
        ({"password": "x", "registries": ["harbor"]}, "registries: (list): must be a dictionary. Correct its type."),
        ({"password": "x", "enabled": "perhaps"}, "enabled: (str): must be true or false. Correct its type."),
        ({"password": "x", "level": "loud"}, "level: loud: must be one of info, warn. Choose one of them."),
        ({}, "password: (unset): is required. Set it; playbooks/secrets.yml generates every secret."),
        ({"password": "x", "users": [{}]}, "users.name: (unset): is required. Set it; playbooks/secrets.yml generates every secret."),
        (
            {"password": "x", "users": [{"name": "a", "colour": 1}]},
            "users.colour: (not shown): is no key of it. Remove it, or write one of name, share.",
        ),
        ({"password": "x", "users": [{"name": "a", "share": "half"}]}, "users.share: (str): must be a number. Correct its type."),
    ],
)
def test_an_error_becomes_a_line(values, line):
    assert argument_faults(errors(**values)) == [line]


def test_the_words_of_the_rules_come_before_those_of_the_specification():
    rule = "port: abc: is no TCP port. Choose one."
    assert argument_faults(errors(password="x", port="abc"), [rule]) == [rule]
    assert argument_faults(errors(password="x", port="abc"), [f"box: {rule}"]) == [f"box: {rule}"]
    inside = "users[3].share: half: is no share. Choose one."
    assert argument_faults(errors(password="x", users=[{"name": "a", "share": "half"}]), [inside]) == [inside]
    other = "port_range: abc: is no range. Choose one."
    assert len(argument_faults(errors(password="x", port="abc"), [other])) == 2


def test_an_item_of_another_type_shows_no_value():
    found = argument_faults(errors(password="x", users=["the-secret-of-root"]))
    assert found
    assert "the-secret-of-root" not in " ".join(found)


def test_an_error_of_an_unknown_form_is_kept():
    assert argument_faults(["something new"]) == ["something new"]


def test_no_fault_is_no_report():
    assert fault_report({"a": [], "b": []}) == []


def test_a_fault_that_hosts_share_is_told_once():
    shared, own = "plan: fastgpt_version: 4.8: is wrong. Change it.", "oneapi: oneapi_port: 0: is wrong. Change it."
    assert fault_report({"a": [shared], "b": [shared, own], "c": [shared]}) == [
        "Nothing was changed. 2 faults in this inventory:",
        f"1. [all hosts] {shared}",
        f"2. [b] {own}",
    ]


def test_what_two_roles_say_about_one_value_is_told_once():
    plan = 'plan: box: fastgpt_port: "abc": must be a number. Choose another.'
    role = "fastgpt: fastgpt_port: abc: is no TCP port. Choose one."
    assert fault_report({"box": [plan, role]}) == ["Nothing was changed. 1 fault in this inventory:", f"1. [box] {plan}"]
    assert len(fault_report({"box": [role, plan]})) == 2
    # JSON here, Python's words there
    for json_value, word in (("false", "False"), ("null", "None")):
        assert len(fault_report({"box": [plan.replace('"abc"', json_value), role.replace("abc", word)]})) == 2
    # another value is another fault, and so is a second one of the same role
    assert len(fault_report({"box": [plan, "fastgpt: fastgpt_port: 70000: is no TCP port. Choose one."]})) == 3
    assert len(fault_report({"box": [role, "fastgpt: fastgpt_port: abc: is taken. Choose one."]})) == 3


def test_hidden_values_are_not_taken_for_the_same():
    known = "plan: oneapi_root_password: (hidden): is a publicly known default. Change it."
    short = "oneapi: oneapi_root_password: (hidden): is shorter than 8 characters. Change it."
    assert len(fault_report({"box": [known, short]})) == 3
    assert len(fault_report({"box": [known, known.replace("plan", "oneapi")]})) == 2
