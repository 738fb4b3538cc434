# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
name: rerank_upstreams
short_description: One address for several rerankers of one model
version_added: 1.0.0
author:
  - selfhosted.fastgpt contributors (@selfhosted)
description:
  - FastGPT asks a reranker itself, by one URL with one key, and trusts no certificate of an own CA. Where a model has several servers, or servers that
    speak TLS, a service of the door on FastGPT's host stands before them. It knows each server's key and certificate, balances, and asks the next
    server where one fails.
  - A model with one plain server is asked directly and stays as it is.
positional: address, port, ca
options:
  _input:
    description: Endpoints as P(selfhosted.fastgpt.model_endpoints#filter) gives them, of all kinds.
    type: list
    elements: dict
    required: true
  address:
    description: Address of FastGPT's host under which its container reaches the door.
    type: str
    required: true
  port:
    description: Port of the first such service, the next ones follow.
    type: int
    default: 8090
  ca:
    description: Certificates, as PEM text, that the servers' own are checked against. Empty for the host's own trust.
    type: str
    default: ''
"""

EXAMPLES = r"""
- name: Let FastGPT ask two rerankers as one
  ansible.builtin.include_role:
    name: selfhosted.fastgpt.fastgpt
  vars:
    joint: "{{ endpoints | selfhosted.fastgpt.rerank_upstreams('192.0.2.10') }}"
    fastgpt_models: "{{ joint.endpoints | selfhosted.fastgpt.fastgpt_models('v4.8.9') }}"
    fastgpt_door_services: "{{ joint.services }}"
"""

RETURN = r"""
_value:
  description:
    - C(services) are items for C(door_services) of the role P(selfhosted.fastgpt.door#role).
    - C(endpoints) are the endpoints as FastGPT is to see them, with the service's URL and key in place of those of its servers.
  type: dict
"""

import hashlib
import typing as t
from collections.abc import Mapping
from urllib.parse import urlsplit

from ansible.errors import AnsibleFilterError
from ansible_collections.selfhosted.fastgpt.plugins.plugin_utils._models import is_int, is_list, shown

# Where Debian keeps what it trusts.
_SYSTEM_CA = "/etc/ssl/certs/ca-certificates.crt"


def _server(endpoint: Mapping[str, t.Any], ca: str) -> dict[str, t.Any]:
    parts = urlsplit(str(endpoint["url"]))
    server: dict[str, t.Any] = {"address": parts.netloc, "api_key": endpoint["keys"][0]}
    if parts.scheme == "https":
        server["tls"] = {"ca": ca} if ca else {"ca_file": _SYSTEM_CA}
    return server


def rerank_upstreams(endpoints: t.Any, address: t.Any, port: t.Any = 8090, ca: t.Any = "") -> dict[str, list[dict[str, t.Any]]]:
    if not is_list(endpoints) or not all(isinstance(endpoint, Mapping) for endpoint in endpoints):
        raise AnsibleFilterError(f"rerank_upstreams: {shown(endpoints)}: must be a list of endpoints of selfhosted.fastgpt.model_endpoints.")
    if isinstance(port, str) and port.isascii() and port.isdigit():
        port = int(port)
    if not is_int(port):
        raise AnsibleFilterError(f"rerank_upstreams: port: {shown(port)}: must be a number.")
    by_model: dict[str, list[Mapping[str, t.Any]]] = {}
    for endpoint in endpoints:
        if endpoint.get("kind") == "rerank":
            if not endpoint.get("keys"):
                raise AnsibleFilterError(f"rerank_upstreams: {endpoint.get('name')}: has no key. Give model_endpoints a master_key.")
            by_model.setdefault(str(endpoint["model"]), []).append(endpoint)
    joined = {model: found for model, found in sorted(by_model.items()) if len(found) > 1 or str(found[0]["url"]).startswith("https:")}
    services: list[dict[str, t.Any]] = []
    seen_as: dict[str, dict[str, t.Any]] = {}
    for number, (model, found) in enumerate(joined.items(), port):
        key = "sk-" + hashlib.sha256("/".join(["rerank", *(str(one["keys"][0]) for one in found)]).encode()).hexdigest()[:48]
        # a list even for one, so that a server that is busy or down is told as such
        servers = [_server(one, ca) for one in found]
        services.append({"name": f"{model} (rerank)", "port": number, "upstream": servers, "retry": True, "api_keys": [key], "pass": ["/v1/"]})
        seen_as[model] = {"url": f"http://{address}:{number}", "keys": [key]}
    return {"services": services, "endpoints": [{**endpoint, **seen_as.get(str(endpoint.get("model")), {})} for endpoint in endpoints]}


class FilterModule:
    """Filter of the same name."""

    def filters(self) -> dict[str, t.Callable[..., t.Any]]:
        return {"rerank_upstreams": rerank_upstreams}
