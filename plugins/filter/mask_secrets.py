# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Callable
from urllib.parse import quote

DOCUMENTATION = r"""
name: mask_secrets
short_description: Take known secrets out of a text
version_added: 1.0.0
author: selfhosted.fastgpt contributors (@selfhosted)
description:
  - A task under C(no_log) says nothing when it fails. With its message stripped of the secrets that it was given, the
    error stays readable. Each secret is also found in its percent-encoded form.
positional: _input
options:
  _input:
    description: The text.
    type: str
    required: true
  secrets:
    description: What must not be shown. Texts of fewer than 4 characters are left alone, since they say nothing and would garble the message.
    type: list
    elements: str
    default: []
"""

EXAMPLES = r"""
- ansible.builtin.fail:
    msg: "{{ ansible_failed_result.msg | selfhosted.fastgpt.mask_secrets([mongodb_root_password]) }}"
"""

RETURN = r"""
_value:
  description: The text without the secrets.
  type: str
"""


def mask_secrets(text: Any, secrets: Iterable[Any] = ()) -> str:
    out = str(text)
    forms = {form for secret in secrets for form in (str(secret), quote(str(secret), safe=""))}
    for form in sorted(forms, key=len, reverse=True):
        if len(form) >= 4:
            out = out.replace(form, "********")
    return out


class FilterModule:
    def filters(self) -> dict[str, Callable[..., Any]]:
        return {"mask_secrets": mask_secrets}
