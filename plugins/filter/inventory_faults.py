# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
name: inventory_faults
short_description: What is wrong with an inventory as a whole
version_added: 1.0.0
author:
  - selfhosted.fastgpt contributors (@selfhosted)
description:
  - Finds all faults that concern groups, addresses, ports between services, and versions, at once and without asking a host.
  - Faults within one list of model servers are those of P(selfhosted.fastgpt.model_server_faults#filter).
options:
  _input:
    description:
      - A dictionary with C(groups), group names and their lists of hosts; C(hosts), host names and dictionaries with C(node_address), C(model_servers),
        C(ports) (names of the services on that host and their ports; without it C(oneapi_port) and the like count) and C(ansible_connection);
        C(cards), the model cards; C(oneapi_database); C(own_database) and C(own_cache), whether the gateway has a database or cache that is not
        deployed here; C(fastgpt_version); C(public_url), the value of C(fastgpt_public_url); C(urls), names of variables
        and their URLs; C(registries), the value of C(image_registries).
      - What is absent is not checked, except groups, hosts and models.
    type: dict
    required: true
"""

EXAMPLES = r"""
- name: Check one host that does everything
  ansible.builtin.debug:
    msg: "{{ inventory | selfhosted.fastgpt.inventory_faults }}"
  vars:
    inventory:
      groups: {gpu: [box], gateway: [box], mongodb: [box], pgvector: [box], fastgpt: [box]}
      hosts:
        box:
          node_address: 10.0.0.5
          model_servers: "{{ model_servers }}"
          fastgpt_port: 8088
      cards: "{{ model_cards_catalogue }}"
      fastgpt_version: v4.8.9
"""

RETURN = r"""
_value:
  description: One sentence for each fault, in the form host or group, variable, value, rule, remedy.
  type: list
  elements: str
"""

import ipaddress
import re
import typing as t
from collections.abc import Mapping
from urllib.parse import urlsplit

from ansible.errors import AnsibleFilterError
from ansible_collections.selfhosted.fastgpt.plugins.plugin_utils._models import (
    ENGINE_OFFSET,
    PORT_MAX,
    PORT_MIN,
    door_ports,
    fault,
    index_cards,
    is_int,
    is_list,
    served_models,
    shown,
    version_fault,
)

_GROUPS = {
    "gpu": "the model servers",
    "gateway": "One-API",
    "mongodb": "MongoDB",
    "pgvector": "PostgreSQL with pgvector",
    "fastgpt": "FastGPT",
}
# Where an inventory leaves a port unset.
_PORTS = {"gateway": ("oneapi", 8000), "mongodb": ("mongodb", 27017), "pgvector": ("pgvector", 5432), "fastgpt": ("fastgpt", 8080)}
# Behind these doors a container listens on loopback, 10000 above the door.
_DOORS = ("oneapi", "fastgpt")
_DATABASES = ("sqlite", "mysql", "postgresql")
_NAME = re.compile(r"(?=.{1,253}$)(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?)(?:\.[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?)*")
_REGISTRY = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]*(?::[0-9]{1,5})?(?:/[a-z0-9._-]+)*/?")


def _is_loopback(host: str) -> bool:
    name = host.strip("[]").rstrip(".").casefold()
    if name in ("localhost", "localhost.localdomain", "ip6-localhost", "ip6-loopback") or name.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


def _address_fault(address: t.Any) -> tuple[str, str] | None:
    """Rule and remedy for a node address that other hosts cannot use."""
    use = "Use the IP address or DNS name under which the other hosts reach this one"
    if not isinstance(address, str) or not address.strip():
        return "must be an IP address or a DNS name as text", use
    if address != address.strip() or any(char.isspace() for char in address):
        return "has white space in it", "Remove it"
    if _is_loopback(address):
        return "is this host itself wherever it is used, also inside a container", use
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        if re.fullmatch(r"[0-9.]+", address):
            return "is not a valid IP address", use
        return None if _NAME.fullmatch(address) else ("must be a bare IP address or DNS name, without scheme, port or path", use)
    if parsed.version == 6:
        return "is an IPv6 address, which this release does not serve", "Use the host's IPv4 address or a DNS name"
    if parsed.is_multicast or parsed.is_link_local or parsed.is_reserved:
        return "is not an address that other hosts can reach", use
    return None


def _url_fault(url: t.Any) -> tuple[str, str] | None:
    if not isinstance(url, str):
        return "must be a URL as text", "Write it as http://host:port"
    if any(char.isspace() for char in url):
        return "has white space in it", "Remove it"
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018 - raises on a bad port
    except ValueError:
        return "is not a URL", "Write it as http://host:port"
    if parts.scheme not in ("http", "https") or not parts.hostname:
        return "must be an absolute http:// or https:// URL", "Write it as http://host:port"
    return None


class _Inventory:
    def __init__(self, data: Mapping[str, t.Any]) -> None:
        self.data = data
        self.found: list[str] = []
        self.groups = {name: self.members(name) for name in _GROUPS}
        hosts = data.get("hosts")
        self.hosts = {str(name): values if isinstance(values, Mapping) else {} for name, values in hosts.items()} if isinstance(hosts, Mapping) else {}
        self.used = list(dict.fromkeys(host for members in self.groups.values() for host in members))
        self.cards = index_cards(data.get("cards"))

    def members(self, group: str) -> list[str]:
        groups = self.data.get("groups")
        hosts = groups.get(group) if isinstance(groups, Mapping) else None
        return list(dict.fromkeys(str(host) for host in hosts)) if is_list(hosts) else []

    def add(self, where: str, variable: str, value: t.Any, rule: str, remedy: str) -> None:
        self.found.append(fault(variable, shown(value), rule, remedy, where))

    def check(self) -> list[str]:
        self.check_groups()
        self.check_addresses()
        self.check_models()
        self.check_what_is_common()
        self.check_ports()
        self.check_version()
        self.check_urls()
        return self.found

    def check_groups(self) -> None:
        for group, purpose in _GROUPS.items():
            if not self.groups[group]:
                rule = f"has no host, but {purpose} must run somewhere"
                self.add(group, "group", [], rule, f"Put a host in the group {group}; one host may be in all groups")
        if len(self.groups["pgvector"]) > 1:
            self.add("pgvector", "group", self.groups["pgvector"], "must have exactly one host", "Leave one in it; PostgreSQL is not replicated here")
        members = self.groups["mongodb"]
        if len(members) > 1 and len(members) % 2 == 0:
            rule = "has an even number of members, which cannot keep a majority when half of them are away"
            self.add("mongodb", "group", members, rule, f"Use 1, 3, 5 or 7 hosts, e.g. one {'more' if len(members) < 7 else 'less'}")
        elif len(members) > 7:
            self.add("mongodb", "group", members, "has more than the 7 members that can vote", "Use 1, 3, 5 or 7 hosts")
        database = self.data.get("oneapi_database", "sqlite")
        if database not in _DATABASES:
            self.add("gateway", "oneapi_database", database, f"must be one of {', '.join(_DATABASES)}", "Correct it")
        elif database == "sqlite" and len(self.groups["gateway"]) > 1:
            rule = f"is a file of one host, and the group gateway has {len(self.groups['gateway'])} ({', '.join(self.groups['gateway'])})"
            self.add("gateway", "oneapi_database", database, rule, "Set it to mysql or postgresql, or leave one host in the group")

    def check_addresses(self) -> None:
        owners: dict[str, str] = {}
        local: list[str] = []
        for host in self.used:
            values = self.hosts.get(host, {})
            if values.get("ansible_connection") in ("local", "ansible.builtin.local"):
                local.append(host)
            address = values.get("node_address")
            if address is None:
                if len(self.used) > 1:
                    rule = "is required with more than one host, since every URL and every bind uses it"
                    self.add(host, "node_address", None, rule, "Set it to the IP address or DNS name under which the other hosts reach this one")
                continue
            broken = _address_fault(address)
            if broken:
                self.add(host, "node_address", address, *broken)
                continue
            name = str(address).casefold().rstrip(".")
            if name in owners:
                self.add(host, "node_address", address, f"is the node address of {owners[name]} too", "Give every host its own")
            else:
                owners[name] = host
        if len(local) > 1:
            rule = "are all the machine that Ansible runs on, under different names"
            self.add(", ".join(local), "ansible_connection", "local", rule, "Keep one of these names and put it in all the groups")

    def check_models(self) -> None:
        kinds: set[t.Any] = set()
        unknown = False
        for host in self.groups["gpu"]:
            servers = self.hosts.get(host, {}).get("model_servers")
            # no list at all is a fault of its own, as an unknown name is
            unknown = unknown or (servers is not None and not is_list(servers))
            for item in servers if is_list(servers) else []:
                model = item.get("model") if isinstance(item, Mapping) else None
                card = self.cards.get(model) if isinstance(model, str) else None
                unknown = unknown or card is None
                kinds.add(card.get("kind") if card else None)
        for kind, purpose in (("chat", "answers"), ("embedding", "finds passages")):
            # Behind an unknown name there may be the missing kind; its own fault is enough then.
            if kind not in kinds and not unknown and self.groups["gpu"]:
                rule = f"no host serves a model of the kind {kind}, so nothing {purpose}"
                examples = ", ".join(served_models(self.cards, kind)[:3]) or "a card of your own"
                self.add("gpu", "model_servers", sorted(map(str, kinds)), rule, f"Add one, e.g. {examples}")

    def check_what_is_common(self) -> None:
        for group, variable, default in (("gateway", "oneapi_port", 8000), ("fastgpt", "fastgpt_peer_port", 8089), ("mongodb", "mongodb_tls_mode", "")):
            values = [self.hosts.get(host, {}).get(variable, default) for host in self.groups[group]]
            if len(set(map(str, values))) > 1:
                rule = f"must be the same on all hosts of the group {group}, which ask each other there"
                self.add(group, variable, values, rule, "Set it once for the group")

    def check_ports(self) -> None:
        for host in self.used:
            values = self.hosts.get(host, {})
            owners: dict[int, tuple[str, bool]] = {}
            services = values.get("ports", self.default_ports(host, values))
            for service, port in (services if isinstance(services, Mapping) else {}).items():
                door = service in _DOORS
                most = 65535 - ENGINE_OFFSET if door else 65535
                # As the roles' argument specs do: a number given on the command line arrives as text.
                if isinstance(port, str) and re.fullmatch(r"[0-9]{1,6}", port, re.ASCII):
                    port = int(port)
                if not is_int(port) or not 1 <= port <= most:
                    behind = ", since its container listens 10000 above it" if door else ""
                    self.add(host, f"{service}_port", port, f"must be a number from 1 to {most}{behind}", "Choose another")
                    continue
                taken = {port: f"{service}_port"}
                if door:
                    taken[port + ENGINE_OFFSET] = f"the container behind {service}_port"
                self.claim(host, f"{service}_port", port, taken, owners, True)
            servers = values.get("model_servers") if host in self.groups["gpu"] else None
            for index, item in enumerate(servers if is_list(servers) else []):
                port = item.get("port") if isinstance(item, Mapping) else None
                if not is_int(port) or not PORT_MIN <= port <= PORT_MAX:
                    continue
                model = item.get("model")
                card = self.cards.get(model) if isinstance(model, str) else None
                variable = f"model_servers[{index}].port"
                taken = {number: f"the {part} of model_servers[{index}]" for number, part in door_ports(port, card.get("kind") if card else None).items()}
                self.claim(host, variable, port, taken, owners, False)

    def default_ports(self, host: str, values: Mapping[str, t.Any]) -> dict[str, t.Any]:
        found = {service: values.get(f"{service}_port", port) for group, (service, port) in _PORTS.items() if host in self.groups[group]}
        gateways = self.groups["gateway"]
        # what the nodes of a gateway share stands on the first, unless it is somebody else's
        if host in gateways[:1]:
            if self.data.get("oneapi_database") == "mysql" and not self.data.get("own_database"):
                found["oneapi_database"] = values.get("oneapi_database_port", 3306)
            if len(gateways) > 1 and not self.data.get("own_cache"):
                found["oneapi_cache"] = values.get("oneapi_cache_port", 6379)
        if "fastgpt" in found:
            if len(gateways) > 1 or len(self.groups["fastgpt"]) > 1:
                found["fastgpt_gateway"] = values.get("fastgpt_gateway_port", 8088)
            if len(self.groups["fastgpt"]) > 1:
                found["fastgpt_peer"] = values.get("fastgpt_peer_port", 8089)
            if values.get("fastgpt_http_redirect_port") not in (None, 0):
                found["fastgpt_http_redirect"] = values["fastgpt_http_redirect_port"]
            first = values.get("fastgpt_rerank_port", 8090)
            found |= {"fastgpt_rerank" + "+" * number: first + number if is_int(first) else first for number in range(self.joint_rerankers())}
        return found

    def joint_rerankers(self) -> int:
        """How many models have several rerankers, before which FastGPT's door stands."""
        hosts: dict[str, int] = {}
        for host in self.groups["gpu"]:
            servers = self.hosts.get(host, {}).get("model_servers")
            for item in servers if is_list(servers) else []:
                model = item.get("model") if isinstance(item, Mapping) else None
                if isinstance(model, str) and self.cards.get(model, {}).get("kind") == "rerank":
                    hosts[model] = hosts.get(model, 0) + 1
        return sum(count > 1 for count in hosts.values())

    def claim(self, host: str, variable: str, port: int, taken: Mapping[int, str], owners: dict[int, tuple[str, bool]], service: bool) -> None:
        for number, what in taken.items():
            if number in owners:
                other, other_is_service = owners[number]
                # Two model servers against each other are a fault of their list.
                if service or other_is_service:
                    self.add(host, variable, port, f"port {number} would be taken by {what} and by {other}", "Choose another port for one of them")
                    break
            owners.setdefault(number, (what, service))

    def check_version(self) -> None:
        if self.data.get("fastgpt_version") is not None:
            unfit = version_fault(self.data["fastgpt_version"])
            if unfit:
                self.found.append(f"fastgpt: {unfit}")

    def check_urls(self) -> None:
        public = self.data.get("public_url")
        if public is not None:
            broken = _url_fault(public)
            if broken:
                self.add("fastgpt", "fastgpt_public_url", public, *broken)
            elif public.endswith("/"):
                self.add("fastgpt", "fastgpt_public_url", public, "must not end in a slash", "Remove it")
            elif urlsplit(public).query or urlsplit(public).fragment or "@" in urlsplit(public).netloc:
                self.add("fastgpt", "fastgpt_public_url", public, "must have neither a user nor a query", "Write it as http://host:port")
            elif _is_loopback(urlsplit(public).hostname or ""):
                self.add("fastgpt", "fastgpt_public_url", public, "is each visitor's own machine", "Use the name under which people open FastGPT")
        urls = self.data.get("urls")
        for variable, url in (urls if isinstance(urls, Mapping) else {}).items():
            broken = _url_fault(url) if url not in (None, "") else None
            if broken:
                self.add("", str(variable), url, *broken)
        registries = self.data.get("registries")
        if registries is not None and not isinstance(registries, Mapping):
            self.add("", "image_registries", registries, "must be a dictionary", "Write it as {docker.io: harbor.example/hub}")
        for source, target in (registries if isinstance(registries, Mapping) else {}).items():
            if not isinstance(target, str) or not _REGISTRY.fullmatch(target):
                rule = "must be host[:port][/path] without a scheme"
                self.add("", f"image_registries.{source}", target, rule, "Write it as harbor.example/hub")


def inventory_faults(data: t.Any) -> list[str]:
    if not isinstance(data, Mapping):
        raise AnsibleFilterError("inventory_faults: the input must be a dictionary with groups and hosts.")
    return _Inventory(data).check()


class FilterModule:
    """Filter of the same name."""

    def filters(self) -> dict[str, t.Callable[..., t.Any]]:
        return {"inventory_faults": inventory_faults}
