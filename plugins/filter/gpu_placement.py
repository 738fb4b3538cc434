# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
name: gpu_placement
short_description: Which engine and which GPUs each model server of a host gets
version_added: 1.0.0
author:
  - selfhosted.fastgpt contributors (@selfhosted)
description:
  - Fits the model servers of one host onto its GPUs by memory, and answers with engine, GPUs and memory of each.
  - What other programs use of a GPU (C(memory_foreign_mb)) is not there for models, in whole GB and from 1 GB on.
  - A model needs its weights, the KV cache of one request as long as its context, and what its engine reserves, but never less than the
    memory table of its card says.
  - What C(gpus) names in a list is kept. C(auto) takes the fullest GPU that still has room, with as few GPUs as will do. Servers are placed
    in the order of the list, so that one more at its end moves the others only where it cannot fit otherwise.
  - A model that has an engine for the CPU too goes there when no GPU can take it, and the answer says why. A host whose other models
    do not fit is refused as a whole, with the numbers.
  - GPUs whose driver does not answer are refused too, since a quiet move to the CPU would hide the fault.
positional: cards, gpus
options:
  _input:
    description: The host's C(model_servers) list, without faults of its own.
    type: list
    elements: dict
    required: true
  cards:
    description: Model cards, the catalogue followed by cards of your own.
    type: list
    elements: dict
    required: true
  gpus:
    description: GPUs of the host as M(selfhosted.fastgpt.gpu_facts) returns them.
    type: list
    elements: dict
    default: []
  torch_index:
    description:
      - Index that torch for GPUs comes from. Its last part, such as C(cu130), says which GPUs and drivers the engines built on torch can use.
    type: str
    default: ''
  check_resources:
    description: Whether models that do not fit are refused. If V(false), they share what there is.
    type: bool
    default: true
"""

EXAMPLES = r"""
- name: Look at the GPUs of this host
  selfhosted.fastgpt.gpu_facts:
  register: host

- name: Place its models
  ansible.builtin.debug:
    msg: "{{ model_servers | selfhosted.fastgpt.gpu_placement(model_cards_catalogue, host.gpus) }}"
  # {8001: {engine: vllm, device: gpu, gpus: [0], need_gb: 19.7, memory_gb: 22.6, cache_gb: 5, fraction: 0.88, ram_gb: 16, reason: '', entry: {...}}}
"""

RETURN = r"""
_value:
  description:
    - Ports of the doors as keys, dictionaries as values.
    - C(engine) is the engine's name, C(entry) its whole entry in the card, C(device) is C(gpu) or C(cpu), C(gpus) lists indexes of GPUs.
    - C(need_gb) is the least memory that the server needs on each of its GPUs, or of the host where it runs on the CPU.
    - C(memory_gb) is what it may take of each of its GPUs, in which chat engines share what is left, and C(fraction) the same as a part of
      the GPU's memory. The fractions of one GPU add up to less than 1.
    - C(cache_gb) is what that leaves for the KV cache, on all of its GPUs together.
    - C(ram_gb) is what it needs of the host's memory, C(reason) says why it runs on the CPU although it could use a GPU.
  type: dict
"""

import typing as t
from collections.abc import Mapping

from ansible.errors import AnsibleFilterError
from ansible_collections.selfhosted.fastgpt.plugins.plugin_utils._models import index_cards, is_int, is_list, nearest, shown
from ansible_collections.selfhosted.fastgpt.plugins.plugin_utils._placement import place


def gpu_placement(servers: t.Any, cards: t.Any, gpus: t.Any = None, torch_index: t.Any = "", check_resources: t.Any = True) -> dict[int, dict[str, t.Any]]:
    if not is_list(servers):
        raise AnsibleFilterError(f"gpu_placement: {shown(servers)}: must be a model_servers list.")
    known = index_cards(cards)
    for server in servers:
        if not isinstance(server, Mapping) or not isinstance(server.get("model"), str) or not is_int(server.get("port")):
            raise AnsibleFilterError(f"gpu_placement: {shown(server)}: every item must be a dictionary with model and port.")
        if server["model"] not in known:
            raise AnsibleFilterError(f"gpu_placement: {server['model']}: no such model card; {nearest(server['model'], known)}")
    placement, faults = place(servers, cards, gpus, torch_index, bool(check_resources))
    if faults:
        raise AnsibleFilterError("gpu_placement: " + "\n".join(faults))
    return placement


class FilterModule:
    """Filter of the same name."""

    def filters(self) -> dict[str, t.Callable[..., t.Any]]:
        return {"gpu_placement": gpu_placement}
