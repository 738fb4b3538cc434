# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
name: model_endpoints
short_description: Everything that follows from the lists of model servers
version_added: 1.0.0
author:
  - selfhosted.fastgpt contributors (@selfhosted)
description:
  - Turns the C(model_servers) lists of all hosts into endpoints with engine, ports, URL and keys, ordered by host and port.
  - The key of a server is C(sk-) and the first 48 hexadecimal digits of HMAC-SHA256 over C(host/model/port), so a new server needs no new secret.
  - It expects lists without faults; P(selfhosted.fastgpt.model_server_faults#filter) finds all faults of a list at once.
positional: cards, addresses
options:
  _input:
    description: Host names as keys, their C(model_servers) lists as values.
    type: dict
    required: true
  cards:
    description: Model cards, the catalogue followed by cards of your own.
    type: list
    elements: dict
    required: true
  addresses:
    description: Host names as keys, node addresses as values.
    type: dict
    required: true
  master_key:
    description: Secret that the servers' keys are derived from. Without it O(master_key) the endpoints have no keys.
    type: str
    default: ''
  previous_key:
    description: Earlier O(master_key), whose keys stay valid during a rotation.
    type: str
    default: ''
"""

EXAMPLES = r"""
- name: Derive the endpoints
  ansible.builtin.set_fact:
    endpoints: >-
      {{ {'gpu-1': [{'model': 'M3E-large', 'port': 8002}]}
         | selfhosted.fastgpt.model_endpoints(model_cards_catalogue, {'gpu-1': '10.0.0.5'}, master_key=model_server_master_key) }}
"""

RETURN = r"""
_value:
  description: Endpoints ordered by host and port.
  type: list
  elements: dict
  contains:
    name:
      description: Model and host as C(model@host).
      type: str
    host:
      description: Inventory name of the host.
      type: str
    model:
      description: Name of the model.
      type: str
    kind:
      description: C(chat), C(embedding) or C(rerank).
      type: str
    engine:
      description: Engine that serves the model, empty where none of this release can.
      type: str
    device:
      description: C(cpu) or C(gpu), empty where no engine fits.
      type: str
    port:
      description: Port of the door.
      type: int
    engine_port:
      description: Loopback port of the engine.
      type: int
    adapter_port:
      description: Loopback port of a reranker's adapter, else null.
      type: int
    url:
      description: URL of the door without a path.
      type: str
    keys:
      description: Keys that the door accepts, the current one first.
      type: list
      elements: str
    dimensions:
      description: Length of the vectors, null for other kinds.
      type: int
    context:
      description: Tokens that fit in one request.
      type: int
    quantize_bit:
      description: Width of the weights.
      type: int
    gpus:
      description: GPUs of the host that the engine uses, empty on a CPU.
      type: list
      elements: int
    weights:
      description: Where the weights come from if the list says so, else empty.
      type: dict
    card:
      description: The whole card.
      type: dict
"""

import hashlib
import hmac
import typing as t
from collections.abc import Mapping

from ansible.errors import AnsibleFilterError
from ansible_collections.selfhosted.fastgpt.plugins.plugin_utils._models import (
    ADAPTER_OFFSET,
    ENGINE_OFFSET,
    KINDS,
    choose_engine,
    index_cards,
    is_int,
    is_list,
    nearest,
    shown,
)


def _key(secret: str, host: str, model: str, port: int) -> str:
    return "sk-" + hmac.new(secret.encode(), f"{host}/{model}/{port}".encode(), hashlib.sha256).hexdigest()[:48]


def _endpoint(host: str, item: t.Any, known: Mapping[str, Mapping[str, t.Any]], address: str, secrets: list[str]) -> dict[str, t.Any]:
    if not isinstance(item, Mapping):
        raise AnsibleFilterError(f"model_endpoints: {host}: model_servers: {shown(item)}: every item must be a dictionary with model and port.")
    model, port = item.get("model"), item.get("port")
    card = known.get(model) if isinstance(model, str) else None
    if not isinstance(model, str) or card is None:
        raise AnsibleFilterError(f"model_endpoints: {host}: model_servers: model: {shown(model)}: no such model card; {nearest(model, known)}")
    if not isinstance(port, int) or not is_int(port):
        raise AnsibleFilterError(f"model_endpoints: {host}: model_servers: {model}: port: {shown(port)}: must be a number.")
    if card.get("kind") not in KINDS:
        raise AnsibleFilterError(f"model_endpoints: card {model}: kind: {shown(card.get('kind'))}: must be one of {', '.join(KINDS)}.")
    width, gpus, wanted = item.get("quantize_bit", 16), item.get("gpus", "auto"), item.get("engine")
    engine = choose_engine(card, width, gpus, wanted)
    device = str(engine["device"]) if engine else ""
    return {
        "name": f"{model}@{host}",
        "host": host,
        "model": model,
        "kind": card["kind"],
        "engine": str(engine["name"]) if engine else "",
        "device": device,
        "port": port,
        "engine_port": port + ENGINE_OFFSET,
        "adapter_port": port + ADAPTER_OFFSET if card["kind"] == "rerank" else None,
        "url": f"http://{address}:{port}",
        "keys": [_key(secret, host, model, port) for secret in secrets],
        "dimensions": card.get("dimensions") if card["kind"] == "embedding" else None,
        "context": card.get("context"),
        "quantize_bit": width,
        "gpus": list(gpus) if device == "gpu" and is_list(gpus) else [],
        "weights": dict(item.get("weights") or {}),
        "card": dict(card),
    }


def model_endpoints(
    servers_by_host: t.Any,
    cards: t.Any,
    addresses: t.Any,
    master_key: t.Any = "",
    previous_key: t.Any = "",
) -> list[dict[str, t.Any]]:
    if not isinstance(servers_by_host, Mapping):
        raise AnsibleFilterError(f"model_endpoints: {shown(servers_by_host)}: must be a dictionary of host names and model_servers lists.")
    if not isinstance(addresses, Mapping):
        raise AnsibleFilterError(f"model_endpoints: addresses: {shown(addresses)}: must be a dictionary of host names and node addresses.")
    secrets = [str(secret) for secret in (master_key, previous_key) if secret]
    known = index_cards(cards)
    endpoints: list[dict[str, t.Any]] = []
    for host, servers in servers_by_host.items():
        if not servers:
            continue
        if not is_list(servers):
            raise AnsibleFilterError(f"model_endpoints: {host}: model_servers: {shown(servers)}: must be a list.")
        address = addresses.get(host)
        if not isinstance(address, str) or not address:
            raise AnsibleFilterError(f"model_endpoints: {host}: addresses: no node address is given for this host.")
        endpoints += [_endpoint(str(host), item, known, address, secrets) for item in servers]
    return sorted(endpoints, key=lambda endpoint: (endpoint["host"], endpoint["port"]))


class FilterModule:
    """Filter of the same name."""

    def filters(self) -> dict[str, t.Callable[..., t.Any]]:
        return {"model_endpoints": model_endpoints}
