# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
name: door_plan
short_description: What nginx is told of the services behind a door
version_added: 1.0.0
author:
  - selfhosted.fastgpt contributors (@selfhosted)
description:
  - Turns C(door_services) of the role C(selfhosted.fastgpt.door) into what its templates write, one item for each service, all shorthands written out.
  - nginx chooses a server of an upstream block after it has built the request, so it cannot give each server a key of its own. Where the members of one
    upstream differ in key or TLS, each becomes a I(hop), a server of nginx's own on a Unix socket that adds both, and the upstream balances over those.
  - A door that balances over doors on other hosts needs to know whether a request that failed may be sent to the next one. A service that is C(pooled)
    says 502 only while nothing of the request has reached what stands behind it, also while it drains, and a server that is C(pooled) is believed so.
  - Expects services in which P(selfhosted.fastgpt.door_faults#filter) finds nothing wrong.
positional: name, prefix, sockets
options:
  _input:
    description: The services.
    type: list
    elements: dict
    required: true
  name:
    description: Name of the caller's file, C(door_name).
    type: str
    required: true
  prefix:
    description: What the paths of certificates and keys begin with.
    type: str
    required: true
  sockets:
    description: Directory of the Unix sockets.
    type: str
    required: true
"""

EXAMPLES = r"""
- name: Show the locations of every service
  ansible.builtin.debug:
    msg: "{{ door_services | selfhosted.fastgpt.door_plan('gateway', '/etc/nginx/selfhosted-fastgpt', '/var/lib/nginx/selfhosted-fastgpt')
             | map(attribute='locations') }}"
  vars:
    door_services:
      - {name: gateway, port: 8000, upstream: ["192.0.2.10:8000", "192.0.2.11:8000"], open: true}
"""

RETURN = r"""
_value:
  description:
    - For each service its C(id), C(name), C(port), C(drain), C(pooled), C(peer_key), C(tls) (paths), C(pools) (upstream blocks), C(hops), C(locations) and
      C(limits);
      C(files) and C(links), which are written for it; C(secrets), values of the Authorization header and keys of peers by the variable that holds them.
  type: list
  elements: dict
"""

import json
import re
import typing as t
from collections.abc import Mapping

from ansible.errors import AnsibleFilterError
from ansible_collections.selfhosted.fastgpt.plugins.plugin_utils._models import is_list

SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "SAMEORIGIN",
    "Referrer-Policy": "strict-origin-when-cross-origin",
}
_HSTS = {"Strict-Transport-Security": "max-age=31536000"}


def _members(service: Mapping[str, t.Any]) -> list[dict[str, t.Any]]:
    given = service["upstream"]
    items = list(given) if is_list(given) else [given]
    members = [dict(item) if isinstance(item, Mapping) else {"address": str(item)} for item in items]
    common = service.get("upstream_tls") or {}
    return [{**member, "tls": dict(t.cast(Mapping[str, t.Any], member.get("tls") or common))} for member in members]


def _error(message: str, kind: str, code: str) -> str:
    return json.dumps({"error": {"message": message, "type": kind, "param": None, "code": code}}, ensure_ascii=False, separators=(",", ":"))


class _Service:
    """One service on its way to nginx."""

    def __init__(self, service: Mapping[str, t.Any], name: str, prefix: str, sockets: str) -> None:
        self.service, self.sockets, self.label = service, sockets, f"{name}-{service['port']}"
        self.id, self.files_at = f"{name}_{service['port']}", f"{prefix}-{name}-{service['port']}"
        self.open = bool(service.get("open"))
        self.files: list[dict[str, str]] = []
        self.links: list[dict[str, str]] = []
        self.secrets: dict[str, str] = {}
        # who bears the key of a peer is one
        self.peer_key = str(service.get("peer_key") or "")
        self.pooled = bool(service.get("pooled") or self.peer_key)

    def _upstream(self, index: int, member: Mapping[str, t.Any]) -> dict[str, t.Any]:
        """How a request is handed to one server: scheme, key and TLS."""
        peer = str(member.get("peer_key") or "")
        found: dict[str, t.Any] = {"scheme": "http", "tls": None, "authorization": "", "host": "", "pooled": bool(member.get("pooled") or peer), "peer": ""}
        if peer:
            found["peer"] = f"$sfg_{self.id}_peer_{index}"
            self.secrets[found["peer"]] = peer
        if member.get("api_key"):
            found["authorization"] = f"$sfg_{self.id}_key_{index}"
            self.secrets[found["authorization"]] = f"Bearer {member['api_key']}"
        elif not self.service.get("api_keys"):
            found["authorization"] = "$http_authorization"
        tls = member["tls"]
        if tls:
            name = str(tls.get("name") or member["address"].rsplit(":", 1)[0].strip("[]"))
            ca = str(tls.get("ca_file") or "")
            if tls.get("ca"):
                content = str(tls["ca"]).strip() + "\n"
                ca = next((file["path"] for file in self.files if file["content"] == content), f"{self.files_at}-{index}.ca")
                if not any(file["path"] == ca for file in self.files):
                    self.files.append({"path": ca, "content": content, "mode": "0644"})
            found.update(scheme="https", tls={"name": name, "ca": ca})
            found["host"] = "" if self.open else name
        return found

    def _socket(self, index: int, address: str) -> str:
        # the access log shows the path; one of more than 107 bytes is none
        return f"unix:{self.sockets}/{self.label}-{index}-{re.sub('[^A-Za-z0-9.-]', '_', address)[-24:]}.sock"

    def _pools(self) -> tuple[list[dict[str, t.Any]], list[dict[str, t.Any]], list[dict[str, t.Any]]]:
        """Upstream blocks, the way into each, and hops."""
        members = _members(self.service)
        balanced = len(members) > 1
        ways = [self._upstream(index, member) for index, member in enumerate(members)]
        # what the members have in common needs no hop
        keys = {str(member.get("api_key") or "") for member in members}
        retry = bool(self.service.get("retry"))
        pooled = any(way["pooled"] for way in ways)
        differ = len(keys) > 1 or any(way["tls"] != ways[0]["tls"] or way["peer"] for way in ways)
        # what may not be repeated once it was sent needs hops too: nginx itself would repeat it on any error, or not on a 502 either
        own = balanced and (differ or (pooled and not retry))
        hops = [
            {**way, "id": f"sfg_{self.id}_hop_{index}", "address": member["address"], "socket": self._socket(index, member["address"])}
            for index, (member, way) in enumerate(zip(members, ways))
            if own
        ]
        servers = [
            {
                "address": hops[index]["socket"] if own else member["address"],
                "weight": int(member.get("weight") or 1),
                "backup": bool(member.get("backup")),
                "down": bool(member.get("drain")),
            }
            for index, member in enumerate(members)
        ]
        if not balanced:
            next_upstream = "off"
        elif retry and pooled:
            # 503 is such a door's own word on a request that has been worked on
            next_upstream = "error timeout http_502 non_idempotent"
        elif retry:
            next_upstream = "error timeout http_502 http_503 http_504 non_idempotent"
        else:
            # a hop says 502 only when nothing of the request has been sent to the server behind it
            next_upstream = "http_502 non_idempotent" if own else "error timeout"
        way = {"scheme": "http", "tls": None, "authorization": ways[0]["authorization"], "host": "", "peer": ""} if own else ways[0]
        if own:
            way["authorization"] = "$http_authorization" if not self.service.get("api_keys") else ""
        pools = [{"id": f"sfg_{self.id}_0", "servers": servers, "balanced": balanced, "sockets": own}]
        into = [{**way, "pool": pools[0]["id"], "next_upstream": next_upstream, "intercept": own}]
        plain = {"scheme": "http", "tls": None, "authorization": "" if self.service.get("api_keys") else "$http_authorization", "host": "", "peer": ""}
        for index, address in enumerate((self.service.get("routes") or {}).values(), 1):
            pool = f"sfg_{self.id}_{index}"
            pools.append({"id": pool, "servers": [{"address": address, "weight": 1, "backup": False, "down": False}], "balanced": False, "sockets": False})
            into.append({**plain, "pool": pool, "next_upstream": "off", "intercept": False})
        return pools, into, hops

    def _locations(self, into: list[dict[str, t.Any]]) -> list[dict[str, t.Any]]:
        service = self.service
        found: dict[str, dict[str, t.Any]] = {}
        if service.get("health"):
            found["= /health"] = {"guard": False, "proxy": into[0], "uri": service["health"]}
        if service.get("models"):
            models = [{"id": str(model), "object": "model", "created": 0, "owned_by": "local"} for model in service["models"]]
            body = json.dumps({"object": "list", "data": models}, ensure_ascii=False, separators=(",", ":"))
            found["= /v1/models"] = {"guard": True, "answer": body}
        for index, path in enumerate(service.get("routes") or {}, 1):
            found[f"= {path}"] = {"guard": True, "proxy": into[index]}
        for prefix in ["/"] if self.open else service.get("pass") or []:
            found[str(prefix)] = {"guard": True, "proxy": into[0]}
        for index, limit in enumerate(service.get("rate_limits") or []):
            place = found.setdefault(f"= {limit['path']}", {"guard": True, "proxy": into[0]})
            place["limit"] = {"zone": f"sfg_{self.id}_limit_{index}", "burst": int(limit.get("burst") or 0)}
        return [{"match": match, **place, "guard": place["guard"] and bool(service.get("api_keys"))} for match, place in found.items()]

    def _tls(self, prefix: str) -> dict[str, str] | None:
        tls = self.service.get("tls") or {}
        if tls.get("own_ca"):
            return {"certificate": f"{prefix}-own.pem", "key": f"{prefix}-own.key"}
        if tls.get("certificate_file"):
            # a link, so that a renewed file counts as a changed one of ours
            paths = {"certificate": f"{self.files_at}.crt", "key": f"{self.files_at}.key"}
            self.links += [{"path": path, "to": str(tls[f"{part}_file"])} for part, path in paths.items()]
            return paths
        if tls.get("certificate"):
            path = f"{self.files_at}.pem"
            self.files.append({"path": path, "content": f"{str(tls['certificate']).strip()}\n{str(tls['key']).strip()}\n", "mode": "0600"})
            return {"certificate": path, "key": path}
        return None

    def plan(self, prefix: str) -> dict[str, t.Any]:
        service = self.service
        tls = self._tls(prefix)
        pools, into, hops = self._pools()
        headers = {**SECURITY_HEADERS, **(_HSTS if tls else {})} if service.get("security_headers") else {}
        headers.update(service.get("headers") or {})
        name, size = str(service["name"]), str(service.get("max_body") or "8m")
        most = f"{size} bytes" if size.isdigit() else size
        return {
            "id": self.id,
            "name": name,
            "port": int(service["port"]),
            "open": self.open,
            "pooled": self.pooled,
            "peer_key": self.peer_key,
            # a service of which every server is drained is drained
            "drain": bool(service.get("drain")) or all(server["down"] for server in pools[0]["servers"]),
            "tls": tls,
            "redirect_from": int(service.get("redirect_from") or 0),
            "api_keys": [str(key) for key in service.get("api_keys") or []],
            "pools": pools,
            "hops": hops,
            "locations": self._locations(into),
            "limits": [{"zone": f"sfg_{self.id}_limit_{index}", "rate": str(limit["rate"])} for index, limit in enumerate(service.get("rate_limits") or [])],
            "headers": {key: str(value) for key, value in headers.items() if value},
            "trusted_proxies": [str(item) for item in service.get("trusted_proxies") or []],
            "max_body": size,
            "read_timeout": int(service.get("read_timeout") or 600),
            "errors": {
                "key": _error("Incorrect API key provided.", "invalid_request_error", "invalid_api_key"),
                "large": _error(f"The request is larger than {most}, which is what {name} takes.", "invalid_request_error", "request_too_large"),
                "down": _error(f"{name} is not answering.", "server_error", "upstream_down"),
                "path": _error("Unknown path.", "invalid_request_error", "unknown_url"),
                "draining": _error(f"{name} is draining and takes no new requests.", "server_error", "draining"),
                "peer": _error("This port is for the other hosts of this service.", "invalid_request_error", "not_a_peer"),
                "limit": _error("Too many requests of this kind from your address. Wait and try again.", "requests", "rate_limit_exceeded"),
                "plain": _error("This port speaks HTTPS.", "invalid_request_error", "https_required"),
            },
            "files": self.files,
            "links": self.links,
            "secrets": self.secrets,
        }


def door_plan(services: t.Any, name: str, prefix: str, sockets: str) -> list[dict[str, t.Any]]:
    try:
        return [_Service(service, name, prefix, sockets).plan(prefix) for service in services]
    except (AttributeError, KeyError, TypeError, ValueError) as exc:
        raise AnsibleFilterError(f"door_plan: door_services: {type(exc).__name__}: must be services that door_faults accepts.") from exc


class FilterModule:
    def filters(self) -> dict[str, t.Callable[..., t.Any]]:
        return {"door_plan": door_plan}
