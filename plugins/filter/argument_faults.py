# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

DOCUMENTATION = r"""
name: argument_faults
short_description: The errors of an argument specification, as lines of the plan's report
version_added: 1.0.0
author: selfhosted.fastgpt contributors (@selfhosted)
description:
  - Turns the errors of M(ansible.builtin.validate_argument_spec) into the form variable, value, rule, remedy.
  - An error about a variable that the rules of the same role report too is left out, since they say more.
positional: _input, rules
options:
  _input:
    description: The errors, as RV(ansible.builtin.validate_argument_spec#module:argument_errors) holds them.
    type: list
    elements: str
    required: true
  rules:
    description: Faults that the rules of the role found with the same variables.
    type: list
    elements: str
    default: []
"""

EXAMPLES = r"""
- name: Show what is wrong
  ansible.builtin.debug:
    msg: "{{ ['missing required arguments: mongodb_keyfile'] | selfhosted.fastgpt.argument_faults }}"
"""

RETURN = r"""
_value:
  description: The remaining errors as sentences, then the faults of O(rules).
  type: list
  elements: str
"""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ansible_collections.selfhosted.fastgpt.plugins.plugin_utils._models import fault

_TYPES = {
    "bool": "true or false",
    "dict": "a dictionary",
    "float": "a number",
    "int": "a whole number",
    "list": "a list",
    "path": "a path",
    "str": "text",
}
_MISSING = re.compile(r"missing required arguments: (?P<names>.+?)(?: found in (?P<parent>.+))?")
_TYPE = re.compile(
    r"(?P<element>argument|Elements value for option) '(?P<name>[^']+)'.* is of type (?P<given>.+?)"
    r" and we were unable to convert to (?P<type>\w+)(?P<rest>.*)"
)
_CHOICE = re.compile(r"value of (?P<name>\S+) must be one of: (?P<choices>.*), got(?: no match for)?: (?P<value>.*)")
_WITHIN = re.compile(r" found in '?(?P<parent>\w+(?: -> \w+)*)'?\.?")
_UNKNOWN = re.compile(r"(?P<names>\S.*?)\. Supported parameters include: (?P<known>.+?)\.?")
_NUMBER = re.compile(r"\"(?P<value>.*)\" cannot be converted to an? \w+")


def _one(error: str) -> Iterable[tuple[str, str]]:
    """Each variable that an error is about, and the sentence."""
    missing = _MISSING.fullmatch(error)
    if missing:
        parent = missing["parent"]
        for name in missing["names"].split(", "):
            variable = f"{parent.replace(' -> ', '.')}.{name}" if parent else name
            yield variable, fault(variable, "(unset)", "is required", "Set it; playbooks/secrets.yml generates every secret")
        return
    within = _WITHIN.search(error)
    inside = f"{within['parent'].replace(' -> ', '.')}." if within else ""
    error = _WITHIN.sub("", error)
    kind = _TYPE.fullmatch(error)
    if kind:
        given = re.sub(r"<class '(?:ansible\.\S*\.)?_?(\w+)'>", r"\1", kind["given"]).removeprefix("_AnsibleTagged").lower()
        # Only numbers are shown; no secret is one.
        number = _NUMBER.search(kind["rest"]) if kind["type"] in ("int", "float") else None
        value = number["value"].strip("'") if number else f"({given})"
        each = "each item " if kind["element"].startswith("Elements") else ""
        rule = f"{each}must be {_TYPES.get(kind['type'], kind['type'])}"
        yield inside + kind["name"], fault(inside + kind["name"], value, rule, "Correct its type")
        return
    choice = _CHOICE.fullmatch(error)
    if choice:
        yield inside + choice["name"], fault(inside + choice["name"], choice["value"], f"must be one of {choice['choices']}", "Choose one of them")
        return
    unknown = _UNKNOWN.fullmatch(error)
    if unknown:
        for name in unknown["names"].split(", "):
            yield name, fault(name, "(not shown)", "is no key of it", f"Remove it, or write one of {unknown['known']}")
        return
    if error.startswith("dictionary requested, could not parse"):
        # does not say of what; the variable's own line does
        return
    yield error.split(".")[0].split(":")[0], error


def argument_faults(errors: Sequence[str], rules: Sequence[str] = ()) -> list[str]:
    found: list[str] = []
    for error in errors:
        for variable, line in _one(" ".join(str(error).split())):
            if not any(re.search(rf"(^|: ){re.escape(variable)}(: |\[|\.)", re.sub(r"\[\d+\]\.", ".", rule)) for rule in rules):
                found.append(line)
    return list(dict.fromkeys([*found, *(str(rule) for rule in rules)]))


class FilterModule:
    """Filter of the same name."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        return {"argument_faults": argument_faults}
