# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Callable

from ansible.errors import AnsibleFilterError

DOCUMENTATION = r"""
name: env_strings
short_description: The values of an environment as the strings that a container gets
version_added: 1.0.0
author: selfhosted.fastgpt contributors (@selfhosted)
description:
  - Booleans become C(true) and C(false), numbers their decimal text, and a variable whose value is none is left out.
positional: _input
options:
  _input:
    description: Names and values.
    type: dict
    required: true
"""

EXAMPLES = r"""
- ansible.builtin.debug:
    msg: "{{ {'PORT': 3000, 'DEBUG': false, 'UNSET': none} | selfhosted.fastgpt.env_strings }}"
"""

RETURN = r"""
_value:
  description: Names and strings.
  type: dict
"""


def env_strings(env: Mapping[str, Any]) -> dict[str, str]:
    if not isinstance(env, Mapping):
        raise AnsibleFilterError("env_strings: expected a dictionary, got %s" % type(env).__name__)
    out = {}
    for name, value in env.items():
        if value is None:
            continue
        if isinstance(value, (Mapping, list)):
            raise AnsibleFilterError("env_strings: the value of %s is a %s, not a text or a number" % (name, type(value).__name__))
        out[str(name)] = str(value).lower() if isinstance(value, bool) else str(value)
    return out


class FilterModule:
    def filters(self) -> dict[str, Callable[..., Any]]:
        return {"env_strings": env_strings}
