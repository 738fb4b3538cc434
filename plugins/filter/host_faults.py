# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator, Mapping
from typing import Any, Callable

DOCUMENTATION = r"""
name: host_faults
short_description: What on a host stands in the way of a deployment
version_added: 1.0.0
author: selfhosted.fastgpt contributors (@selfhosted)
description:
  - A host that already runs somebody's stack is not taken over silently. Containers, ports and a data directory that do not
    belong to this collection are faults, and so is an address that the host does not have.
positional: _input
options:
  _input:
    description:
      - What is known of the host. C(address) and C(door_address) are what it is to listen on, C(own_addresses) what it has,
        C(ports) the wanted ports by role, C(model_ports) those of the model servers, C(listening) the lines of
        C(ss -Hltnp), C(containers) what Docker's API lists, C(container_names) the wanted names by role, C(data_root) the
        data directory and C(foreign_files) what lies in it where it is not ours.
    type: dict
    required: true
"""

EXAMPLES = r"""
- ansible.builtin.debug:
    msg: "{{ {'ports': {'oneapi': 8000}, 'listening': lines} | selfhosted.fastgpt.host_faults }}"
"""

RETURN = r"""
_value:
  description: The faults, each with its remedy.
  type: list
  elements: str
"""

LABEL = "selfhosted.fastgpt.role"
PUBLISHED = ("mongodb", "pgvector", "oneapi_database", "oneapi_cache")


def listeners(lines: list[str]) -> dict[int, set[str]]:
    """Port to the names of the programs that listen on it."""
    found: dict[int, set[str]] = {}
    for line in lines:
        columns = line.split()
        if len(columns) >= 4 and columns[3].rpartition(":")[2].isdigit():
            names = set(re.findall(r'\(\("([^"]+)"', line)) | set(re.findall(r'\),\("([^"]+)"', line))
            found.setdefault(int(columns[3].rpartition(":")[2]), set()).update(names or {"?"})
    return found


def faults(host: Mapping[str, Any]) -> Iterator[str]:
    containers = host.get("containers") or []
    ours, published = set(), {}
    for container in containers:
        names = {str(name).lstrip("/") for name in container.get("Names") or []}
        labels = container.get("Labels") or {}
        if LABEL in labels:
            ours |= names
        for role, wanted in (host.get("container_names") or {}).items():
            for name in sorted(names & set(wanted)):
                if role in (host.get("ports") or {}) and labels.get(LABEL) != role:
                    yield (
                        "%s_container_name: %s: a container of this name stands that this collection did not make (image %s). "
                        "Rename it (docker rename), remove it (docker rm -f), or set %s_container_name to another name."
                        % (role, name, container.get("Image", "?"), role)
                    )
        for port in container.get("Ports") or []:
            if port.get("PublicPort"):
                published[int(port["PublicPort"])] = names
    listening = listeners(host.get("listening") or [])

    wanted_ports = [("%s_port" % role, int(port), role in PUBLISHED) for role, port in (host.get("ports") or {}).items()]
    wanted_ports += [("model_servers", int(port), False) for port in host.get("model_ports") or [] if str(port).isdigit()]
    for variable, port, by_docker in wanted_ports:
        names = listening.get(port, set())
        if published.get(port) and published[port] <= ours and by_docker:
            continue
        foreign = names - ({"docker-proxy"} if by_docker and port not in published else {"nginx"} if not by_docker else set())
        if foreign:
            holder = "container " + ", ".join(sorted(published[port])) if port in published else ", ".join(sorted(foreign))
            yield "%s: %d: %s already listens on this port. Stop it or choose another port." % (variable, port, holder)

    own = set(host.get("own_addresses") or [])
    address = str(host.get("door_address") or host.get("address") or "")
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        parsed = None
    if parsed is not None and own and not parsed.is_unspecified and address not in own:
        yield (
            "node_address: %s: this host has no such address (it has %s), so nothing could listen on it. Correct node_address, "
            "or where the address is translated on its way set door_address: 0.0.0.0." % (address, ", ".join(sorted(own)))
        )
    if host.get("foreign_files"):
        yield (
            "data_root: %s: the directory is not empty (%s ...) and not one of this collection. Choose another data_root, or adopt it: "
            "touch %s/.selfhosted-fastgpt"
            % (host.get("data_root"), ", ".join(str(name) for name in host["foreign_files"][:3]), host.get("data_root"))
        )


def host_faults(host: Mapping[str, Any]) -> list[str]:
    return list(faults(host))


class FilterModule:
    def filters(self) -> dict[str, Callable[..., Any]]:
        return {"host_faults": host_faults}
