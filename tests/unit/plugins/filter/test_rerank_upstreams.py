# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import typing as t

import pytest
from ansible.errors import AnsibleFilterError
from ansible_collections.selfhosted.fastgpt.plugins.filter.door_faults import door_faults
from ansible_collections.selfhosted.fastgpt.plugins.filter.rerank_upstreams import rerank_upstreams


def endpoint(model: str, host: str, kind: str = "rerank", scheme: str = "http", **values: t.Any) -> dict[str, t.Any]:
    return {"name": f"{model}@{host}", "model": model, "kind": kind, "url": f"{scheme}://{host}:8003", "keys": [f"sk-{model}{host}"], **values}


def test_one_plain_server_is_asked_directly() -> None:
    endpoints = [endpoint("r", "a"), endpoint("c", "a", "chat"), endpoint("c", "b", "chat")]
    assert rerank_upstreams(endpoints, "192.0.2.1") == {"services": [], "endpoints": endpoints}


def test_two_servers_become_one() -> None:
    endpoints = [endpoint("r", "a"), endpoint("r", "b"), endpoint("c", "a", "chat")]
    found = rerank_upstreams(endpoints, "192.0.2.1", "8095")
    (service,) = found["services"]
    assert service["port"] == 8095 and service["retry"] is True
    assert service["upstream"] == [{"address": "a:8003", "api_key": "sk-ra"}, {"address": "b:8003", "api_key": "sk-rb"}]
    (key,) = service["api_keys"]
    assert key not in ("sk-ra", "sk-rb") and len(key) == 51
    assert [(one["url"], one["keys"]) for one in found["endpoints"][:2]] == [("http://192.0.2.1:8095", [key])] * 2
    assert found["endpoints"][2] == endpoints[2]
    assert rerank_upstreams(list(reversed(endpoints[:2])), "192.0.2.1", 8095)["services"][0]["port"] == 8095


def test_tls_needs_the_door_too() -> None:
    (service,) = rerank_upstreams([endpoint("r", "a", scheme="https")], "192.0.2.1", 8090, "PEM")["services"]
    assert service["upstream"] == [{"address": "a:8003", "api_key": "sk-ra", "tls": {"ca": "PEM"}}]
    (service,) = rerank_upstreams([endpoint("r", "a", scheme="https")], "192.0.2.1")["services"]
    assert service["upstream"][0]["tls"] == {"ca_file": "/etc/ssl/certs/ca-certificates.crt"}


def test_models_get_one_port_after_the_other_and_the_door_takes_them() -> None:
    endpoints = [endpoint(model, host) for model in ("s", "r") for host in ("192.0.2.2", "192.0.2.3")]
    services = rerank_upstreams(endpoints, "192.0.2.1")["services"]
    assert [(service["name"], service["port"]) for service in services] == [("r (rerank)", 8090), ("s (rerank)", 8091)]
    assert door_faults(services) == []


@pytest.mark.parametrize("endpoints, port, says", [
    ({}, 8090, "list of endpoints"), ([1], 8090, "list of endpoints"),
    ([endpoint("r", "a", keys=[])], 8090, "has no key"), ([], "x", "number"), ([], True, "number"),
])  # fmt: skip
def test_refusals(endpoints: t.Any, port: t.Any, says: str) -> None:
    with pytest.raises(AnsibleFilterError, match=says):
        rerank_upstreams(endpoints, "192.0.2.1", port)
