# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
name: gpu_placement
short_description: Which GPUs each model server of a host gets
version_added: 1.0.0
author:
  - selfhosted.fastgpt contributors (@selfhosted)
description:
  - Answers with the GPUs of every model server of one host, an empty list where it runs on the CPU.
  - The engines of this release run on CPUs. A model that only a GPU engine serves is refused with a message that says so.
positional: cards, gpus
options:
  _input:
    description: The host's C(model_servers) list.
    type: list
    elements: dict
    required: true
  cards:
    description: Model cards, the catalogue followed by cards of your own.
    type: list
    elements: dict
    required: true
  gpus:
    description: GPUs of the host, each with an C(index).
    type: list
    elements: dict
    default: []
"""

EXAMPLES = r"""
- name: Place the models of this host
  ansible.builtin.debug:
    msg: "{{ model_servers | selfhosted.fastgpt.gpu_placement(model_cards_catalogue) }}"
  # {8002: []}
"""

RETURN = r"""
_value:
  description: Ports of the doors as keys, lists of GPU indexes as values.
  type: dict
"""

import typing as t
from collections.abc import Mapping

from ansible.errors import AnsibleFilterError
from ansible_collections.selfhosted.fastgpt.plugins.plugin_utils._models import choose_engine, combinations_of, index_cards, is_int, is_list, nearest, shown


def gpu_placement(servers: t.Any, cards: t.Any, gpus: t.Any = None) -> dict[int, list[int]]:
    if not is_list(servers):
        raise AnsibleFilterError(f"gpu_placement: {shown(servers)}: must be a model_servers list.")
    known = index_cards(cards)
    present = [gpu["index"] for gpu in gpus or [] if isinstance(gpu, Mapping) and is_int(gpu.get("index"))]
    placement: dict[int, list[int]] = {}
    for server in servers:
        if not isinstance(server, Mapping) or not isinstance(server.get("model"), str) or not is_int(server.get("port")):
            raise AnsibleFilterError(f"gpu_placement: {shown(server)}: every item must be a dictionary with model and port.")
        model = server["model"]
        if model not in known:
            raise AnsibleFilterError(f"gpu_placement: {model}: no such model card; {nearest(model, known)}")
        wanted = server.get("gpus", "auto")
        engine = choose_engine(known[model], server.get("quantize_bit", 16), wanted, server.get("engine"))
        if engine is None:
            working = "; ".join(combinations_of(known[model])) or "nothing in this release, whose engines run on CPUs"
            raise AnsibleFilterError(f"gpu_placement: {model}: gpus: {shown(wanted)}: no available engine serves it there. What works: {working}.")
        if engine["device"] == "cpu":
            placement[server["port"]] = []
            continue
        chosen = list(wanted) if is_list(wanted) else present[:1]
        missing = [index for index in chosen if index not in present]
        if missing or not chosen:
            raise AnsibleFilterError(f"gpu_placement: {model}: gpus: {shown(wanted)}: the host has the GPUs {shown(present)}.")
        placement[server["port"]] = chosen
    return placement


class FilterModule:
    """Filter of the same name."""

    def filters(self) -> dict[str, t.Callable[..., t.Any]]:
        return {"gpu_placement": gpu_placement}
