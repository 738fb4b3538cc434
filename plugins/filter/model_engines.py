# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
name: model_engines
short_description: Engines that a list of model servers could use
version_added: 1.0.0
author:
  - selfhosted.fastgpt contributors (@selfhosted)
description:
  - Answers with the names of all engines that could serve one of the models, whatever GPUs the host turns out to have.
  - Any YAML value is accepted. What is no model server with a card has no engine, and its fault is for
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
- name: See whether containers may be needed
  ansible.builtin.debug:
    msg: "{{ 'vllm' in model_servers | selfhosted.fastgpt.model_engines(model_cards_catalogue) }}"
"""

RETURN = r"""
_value:
  description: Names of engines, sorted.
  type: list
  elements: str
"""

import typing as t
from collections.abc import Mapping

from ansible_collections.selfhosted.fastgpt.plugins.plugin_utils._models import engines_for, index_cards, is_list


def model_engines(servers: t.Any, cards: t.Any) -> list[str]:
    known = index_cards(cards)
    found: set[str] = set()
    for item in servers if is_list(servers) else []:
        model = item.get("model") if isinstance(item, Mapping) else None
        if isinstance(model, str) and model in known:
            found |= {str(engine["name"]) for engine in engines_for(known[model], item.get("quantize_bit", 16), item.get("gpus", "auto"), item.get("engine"))}
    return sorted(found)


class FilterModule:
    """Filter of the same name."""

    def filters(self) -> dict[str, t.Callable[..., t.Any]]:
        return {"model_engines": model_engines}
