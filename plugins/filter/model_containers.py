# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
name: model_containers
short_description: Containers that a list of model servers could need
version_added: 1.0.0
author:
  - selfhosted.fastgpt contributors (@selfhosted)
description:
  - Answers with the name of each server's container where one of the engines that could serve it lives in one, whatever GPUs the host turns out to have.
  - Any YAML value is accepted. What is no model server with a card has no container, and its fault is for
    P(selfhosted.fastgpt.model_server_faults#filter) to tell.
positional: cards
options:
  _input:
    description: A host's C(model_servers) list.
    type: raw
    required: true
  cards:
    description: Model cards, the catalogue followed by cards of your own.
    type: list
    elements: dict
    required: true
"""

EXAMPLES = r"""
- name: See whether Docker may be needed
  ansible.builtin.debug:
    msg: "{{ model_servers | selfhosted.fastgpt.model_containers(model_cards_catalogue) | length > 0 }}"
"""

RETURN = r"""
_value:
  description: Names of containers in the order of the list.
  type: list
  elements: str
"""

import typing as t
from collections.abc import Mapping

from ansible_collections.selfhosted.fastgpt.plugins.plugin_utils._models import container_of, engines_for, index_cards, is_int, is_list


def model_containers(servers: t.Any, cards: t.Any) -> list[str]:
    known = index_cards(cards)
    found: list[str] = []
    for item in servers if is_list(servers) else []:
        model, port = (item.get("model"), item.get("port")) if isinstance(item, Mapping) else (None, None)
        if not isinstance(model, str) or model not in known or not is_int(port):
            continue
        engines = engines_for(known[model], item.get("quantize_bit", 16), item.get("gpus", "auto"), item.get("engine"))
        found += {container_of(str(engine["name"]), port) for engine in engines} - {"", *found}
    return found


class FilterModule:
    """Filter of the same name."""

    def filters(self) -> dict[str, t.Callable[..., t.Any]]:
        return {"model_containers": model_containers}
