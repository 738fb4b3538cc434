# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Callable

DOCUMENTATION = r"""
name: flatten_checks
short_description: The checks of all hosts as one list
version_added: 1.0.0
author: selfhosted.fastgpt contributors (@selfhosted)
description:
  - Puts the checks of the hosts into one list. A host that was lost on the way, or that has no check at all, is a red check
    of its own, so that a verification cannot pass by looking at nothing.
positional: _input
options:
  _input:
    description: Host names and the list of each one's checks.
    type: dict
    required: true
  lost:
    description: Hosts that failed or did not answer.
    type: list
    elements: str
    default: []
"""

EXAMPLES = r"""
- ansible.builtin.debug:
    msg: "{{ {'app-1': verify__checks} | selfhosted.fastgpt.flatten_checks }}"
"""

RETURN = r"""
_value:
  description: The checks, each with C(host), C(name), C(ok), C(seconds) and C(detail).
  type: list
  elements: dict
"""


def flatten_checks(checks: Mapping[str, Sequence[Mapping[str, Any]]], lost: Sequence[str] = ()) -> list[dict[str, Any]]:
    out = []
    for host, own in checks.items():
        for check in own:
            out.append(
                {
                    "host": host,
                    "name": str(check["name"]),
                    "ok": bool(check["ok"]),
                    "seconds": round(float(check.get("seconds") or 0), 2),
                    "detail": str(check.get("detail") or ""),
                }
            )
        if host in lost or not own:
            detail = "The host failed or did not answer while it was being verified: see its error above."
            out.append({"host": host, "name": "host answers", "ok": False, "seconds": 0.0, "detail": detail})
    return out


class FilterModule:
    def filters(self) -> dict[str, Callable[..., Any]]:
        return {"flatten_checks": flatten_checks}
