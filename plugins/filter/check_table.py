# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Callable

DOCUMENTATION = r"""
name: check_table
short_description: Checks as the lines of a table
version_added: 1.0.0
author: selfhosted.fastgpt contributors (@selfhosted)
description:
  - One line for each check, with host, name, result, seconds and detail in columns.
positional: _input
options:
  _input:
    description: Checks as M(selfhosted.fastgpt.fastgpt_check) and its siblings return them, each with its C(host).
    type: list
    elements: dict
    required: true
"""

EXAMPLES = r"""
- ansible.builtin.debug:
    msg: "{{ checks | selfhosted.fastgpt.check_table }}"
"""

RETURN = r"""
_value:
  description: Lines of text.
  type: list
  elements: str
"""


def check_table(checks: Sequence[Mapping[str, Any]]) -> list[str]:
    if not checks:
        return ["no checks"]
    rows = [("host", "check", "ok", "seconds", "detail")]
    for check in checks:
        rows.append(
            (str(check.get("host", "")), str(check["name"]), "ok" if check["ok"] else "RED", "%.2f" % float(check["seconds"]), str(check["detail"]))
        )
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = []
    for row in rows:
        seconds = row[3].rjust(widths[3])
        lines.append("  ".join([row[0].ljust(widths[0]), row[1].ljust(widths[1]), row[2].ljust(widths[2]), seconds, row[4]]).rstrip())
    green = sum(1 for check in checks if check["ok"])
    return lines + ["%d of %d checks ok" % (green, len(checks))]


class FilterModule:
    def filters(self) -> dict[str, Callable[..., Any]]:
        return {"check_table": check_table}
