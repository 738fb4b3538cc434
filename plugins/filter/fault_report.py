# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Callable

DOCUMENTATION = r"""
name: fault_report
short_description: One report of the faults of all hosts
version_added: 1.0.0
author: selfhosted.fastgpt contributors (@selfhosted)
description:
  - A fault that several hosts share is told once, with their names.
  - What several roles say about one value of one variable is told once too, in the words of the first.
positional: _input
options:
  _input:
    description: Host names and the list of each one's faults.
    type: dict
    required: true
"""

EXAMPLES = r"""
- ansible.builtin.fail:
    msg: "{{ {'app-1': ['oneapi_port: 99999: not a port']} | selfhosted.fastgpt.fault_report }}"
"""

RETURN = r"""
_value:
  description: Lines of text, empty where there is no fault.
  type: list
  elements: str
"""


def _value(text: str) -> str:
    """A value as it is compared: a filter writes it as JSON, a template as Python."""
    plain = re.sub(r" \(with U\+[0-9A-F]+, [^)]*\)$", "", text).strip('"')
    return {"True": "true", "False": "false", "None": "null"}.get(plain, plain)


def _named(text: str) -> set[tuple[str, str]]:
    """The variable and its value, with or without the place before them."""
    parts = text.split(": ", 3)
    return {(name, _value(value)) for name, value in zip(parts, parts[1:], strict=False) if re.fullmatch(r"[A-Za-z_][\w.\[\]-]*", name)}


def _told(fault: str, others: Sequence[str]) -> bool:
    """Whether another role of the same host has named this variable with this value already."""
    role, dummy, text = fault.partition(": ")
    # one name stands for all hidden values, of which more may be wrong
    named = {(name, value) for name, value in _named(text) if value != "(hidden)"}
    for other in others:
        other_role, dummy, other_text = other.partition(": ")
        if other_text == text or (role != other_role and named & _named(other_text)):
            return True
    return False


def fault_report(faults: Mapping[str, Sequence[str]]) -> list[str]:
    hosts: dict[str, list[str]] = {}
    for host, own in faults.items():
        for index, fault in enumerate(own):
            if _told(fault, own[:index]):
                continue
            hosts.setdefault(fault, []).append(host)
    if not hosts:
        return []
    lines = ["Nothing was changed. %d fault%s in this inventory:" % (len(hosts), "" if len(hosts) == 1 else "s")]
    for number, (fault, where) in enumerate(hosts.items(), 1):
        names = ", ".join(where) if len(where) < len(faults) or len(faults) == 1 else "all hosts"
        lines.append("%d. [%s] %s" % (number, names, fault))
    return lines


class FilterModule:
    def filters(self) -> dict[str, Callable[..., Any]]:
        return {"fault_report": fault_report}
