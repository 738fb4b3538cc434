# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
name: oneapi_channels
short_description: One-API channels for model endpoints
version_added: 1.0.0
author:
  - selfhosted.fastgpt contributors (@selfhosted)
description:
  - One channel for every chat and embedding endpoint, named C(model@host), so that a model on two hosts is balanced by the gateway.
  - Rerankers get none, since One-API relays no rerank.
options:
  _input:
    description: Endpoints as P(selfhosted.fastgpt.model_endpoints#filter) gives them, with keys.
    type: list
    elements: dict
    required: true
"""

EXAMPLES = r"""
- name: Reconcile the channels
  selfhosted.fastgpt.oneapi_channel:
    url: http://127.0.0.1:18000
    access_token: "{{ oneapi_root_access_token }}"
    channels: "{{ endpoints | selfhosted.fastgpt.oneapi_channels }}"
"""

RETURN = r"""
_value:
  description: Channels as the module M(selfhosted.fastgpt.oneapi_channel) takes them. They hold keys.
  type: list
  elements: dict
"""

import typing as t
from collections.abc import Mapping

from ansible.errors import AnsibleFilterError
from ansible_collections.selfhosted.fastgpt.plugins.plugin_utils._models import is_list, shown

# "Custom": the base URL and the client's path joined as they are, in every version of One-API.
_CUSTOM = 8


def oneapi_channels(endpoints: t.Any) -> list[dict[str, t.Any]]:
    if not is_list(endpoints):
        raise AnsibleFilterError(f"oneapi_channels: {shown(endpoints)}: must be a list of endpoints.")
    channels: list[dict[str, t.Any]] = []
    for endpoint in endpoints:
        if not isinstance(endpoint, Mapping) or "kind" not in endpoint:
            raise AnsibleFilterError("oneapi_channels: every item must be an endpoint of selfhosted.fastgpt.model_endpoints.")
        if endpoint["kind"] == "rerank":
            continue
        if not endpoint.get("keys"):
            raise AnsibleFilterError(f"oneapi_channels: {endpoint.get('name')}: has no key. Give model_endpoints a master_key.")
        channels.append(
            {
                "name": endpoint["name"],
                "type": _CUSTOM,
                "base_url": str(endpoint["url"]).rstrip("/"),
                "key": endpoint["keys"][0],
                "models": [endpoint["model"]],
                "priority": 0,
                "group": "default",
            }
        )
    return channels


class FilterModule:
    """Filter of the same name."""

    def filters(self) -> dict[str, t.Callable[..., t.Any]]:
        return {"oneapi_channels": oneapi_channels}
