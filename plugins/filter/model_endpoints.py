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
  - URL, keys, name and kind need no facts of a host. Engine and GPUs follow from its GPUs, so only the host itself can know them for sure.
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
  gpus:
    description:
      - Host names as keys, their GPUs as M(selfhosted.fastgpt.gpu_facts) returns them as values. Their servers are placed as
        P(selfhosted.fastgpt.gpu_placement#filter) does, and a host whose servers do not fit fails.
      - Of a host that is not in it, the engines are those that need no GPU, else the first of the card.
    type: dict
    default: {}
  torch_index:
    description: Index that torch for GPUs comes from, as in P(selfhosted.fastgpt.gpu_placement#filter).
    type: str
    default: ''
  check_resources:
    description: Whether models that do not fit on the GPUs are refused.
    type: bool
    default: true
  tls_hosts:
    description: Hosts whose doors speak TLS, so that their URLs begin with C(https).
    type: list
    elements: str
    default: []
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
      description: Engine that serves the model, empty where none can.
      type: str
    engine_entry:
      description: The engine's entry in the card, with what it says of image, quantization and needs; empty where no engine fits.
      type: dict
    environment:
      description:
        - Name of the Python environment that the engine lives in, which is the engine's, and C(-gpu) behind it where its torch is one for GPUs.
        - Empty for an engine that lives in a container.
      type: str
    container:
      description: Name of the container that the engine lives in, empty for one in an environment.
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
    gpu_memory_gb:
      description: What the engine may take of each of its GPUs, in GB. 0 on a CPU and where the GPUs are not known.
      type: float
    gpu_memory_fraction:
      description: The same as a part of the GPU's memory.
      type: float
    cache_gb:
      description: What that leaves for the KV cache on all of its GPUs together, on a CPU the cache of one whole context. 0 where the GPUs are not known.
      type: float
    need_gb:
      description: Least memory that it needs on each of its GPUs, or of the host on a CPU, in GB. 0 where the GPUs are not known.
      type: float
    ram_gb:
      description: Memory of the host that it needs, in GB.
      type: float
    note:
      description: Why it runs on the CPU although it could use a GPU, else empty.
      type: str
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
    container_of,
    index_cards,
    is_int,
    is_list,
    nearest,
    shown,
)
from ansible_collections.selfhosted.fastgpt.plugins.plugin_utils._placement import place, ram_gb


def _key(secret: str, host: str, model: str, port: int) -> str:
    return "sk-" + hmac.new(secret.encode(), f"{host}/{model}/{port}".encode(), hashlib.sha256).hexdigest()[:48]


def _unplaced(item: Mapping[t.Any, t.Any], card: Mapping[str, t.Any], width: t.Any) -> dict[str, t.Any]:
    """What is known of a server before anybody looked at the host's GPUs."""
    gpus = item.get("gpus", "auto")
    engine = choose_engine(card, width, gpus, item.get("engine"))
    device = str(engine["device"]) if engine else ""
    return {
        "engine": str(engine["name"]) if engine else "",
        "entry": dict(engine or {}),
        "device": device,
        "gpus": list(gpus) if device == "gpu" and is_list(gpus) else [],
        "ram_gb": round(ram_gb(card, width, engine), 1) if engine and is_int(width) else 0.0,
    }


def _endpoint(
    host: str, item: t.Any, known: Mapping[str, Mapping[str, t.Any]], address: str, secrets: list[str], placement: Mapping[t.Any, Mapping[str, t.Any]]
) -> dict[str, t.Any]:
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
    width = item.get("quantize_bit", 16)
    placed = placement.get(port) or _unplaced(item, card, width)
    container = container_of(placed["engine"], port)
    return {
        "name": f"{model}@{host}",
        "host": host,
        "model": model,
        "kind": card["kind"],
        "engine": placed["engine"],
        "engine_entry": placed["entry"],
        "environment": "" if container else placed["engine"] + ("-gpu" if placed["device"] == "gpu" else ""),
        "container": container,
        "device": placed["device"],
        "port": port,
        "engine_port": port + ENGINE_OFFSET,
        "adapter_port": port + ADAPTER_OFFSET if card["kind"] == "rerank" else None,
        "url": f"{address}:{port}",
        "keys": [_key(secret, host, model, port) for secret in secrets],
        "dimensions": card.get("dimensions") if card["kind"] == "embedding" else None,
        "context": card.get("context"),
        "quantize_bit": width,
        "gpus": placed["gpus"],
        "gpu_memory_gb": placed.get("memory_gb", 0.0),
        "cache_gb": placed.get("cache_gb", 0.0),
        "gpu_memory_fraction": placed.get("fraction", 0.0),
        "need_gb": placed.get("need_gb", 0.0),
        "ram_gb": placed["ram_gb"],
        "note": placed.get("reason", ""),
        "weights": dict(item.get("weights") or {}),
        "card": dict(card),
    }


def model_endpoints(
    servers_by_host: t.Any,
    cards: t.Any,
    addresses: t.Any,
    master_key: t.Any = "",
    previous_key: t.Any = "",
    gpus: t.Any = None,
    torch_index: t.Any = "",
    check_resources: t.Any = True,
    tls_hosts: t.Any = (),
) -> list[dict[str, t.Any]]:
    if not isinstance(servers_by_host, Mapping):
        raise AnsibleFilterError(f"model_endpoints: {shown(servers_by_host)}: must be a dictionary of host names and model_servers lists.")
    if not isinstance(addresses, Mapping):
        raise AnsibleFilterError(f"model_endpoints: addresses: {shown(addresses)}: must be a dictionary of host names and node addresses.")
    gpus = {} if gpus is None else gpus
    if not isinstance(gpus, Mapping):
        raise AnsibleFilterError(f"model_endpoints: gpus: {shown(gpus)}: must be a dictionary of host names and lists of GPUs.")
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
        placement, faults = place(servers, cards, gpus[host], torch_index, bool(check_resources)) if host in gpus else ({}, [])
        if faults:
            raise AnsibleFilterError("model_endpoints: " + "\n".join(f"{host}: {fault}" for fault in faults))
        scheme = "https" if host in tls_hosts else "http"
        endpoints += [_endpoint(str(host), item, known, f"{scheme}://{address}", secrets, placement) for item in servers]
    return sorted(endpoints, key=lambda endpoint: (endpoint["host"], endpoint["port"]))


class FilterModule:
    """Filter of the same name."""

    def filters(self) -> dict[str, t.Callable[..., t.Any]]:
        return {"model_endpoints": model_endpoints}
