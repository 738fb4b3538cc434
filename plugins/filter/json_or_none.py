# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

import json
from typing import Any, Callable

DOCUMENTATION = r"""
name: json_or_none
short_description: Parse JSON, or none where the text is not JSON
version_added: 1.0.0
author: selfhosted.fastgpt contributors (@selfhosted)
description:
  - The tests of Ansible cannot ask whether a text is JSON without failing. This filter can.
positional: _input
options:
  _input:
    description: The text.
    type: str
    required: true
"""

EXAMPLES = r"""
- ansible.builtin.assert:
    that: text | selfhosted.fastgpt.json_or_none is mapping
"""

RETURN = r"""
_value:
  description: What the text holds, none where it is not JSON.
  type: raw
"""


def json_or_none(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


class FilterModule:
    def filters(self) -> dict[str, Callable[..., Any]]:
        return {"json_or_none": json_or_none}
