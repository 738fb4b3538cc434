# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import fnmatch
import http.client
import re
import ssl
import subprocess
import threading
import typing as t
from pathlib import Path

import pytest
import yaml
from conftest import Certificate, Door, Pki, Upstream, make_certificate, trusting, wait_for
from ports import free_port

ROLE = Path(__file__).resolve().parents[3] / "roles" / "door"
KEY = "sk-Right"


def service(*upstreams: t.Any, **fields: t.Any) -> dict[str, t.Any]:
    """A model server's service; several upstreams become one list."""
    given = [item.address if isinstance(item, Upstream) else item for item in upstreams]
    base: dict[str, t.Any] = {"port": free_port(), "upstream": given if len(given) > 1 else given[0], "api_keys": [KEY], "pass": ["/v1/"], "health": "/health"}
    return {**base, **fields}


def member(upstream: Upstream, **fields: t.Any) -> dict[str, t.Any]:
    return {"address": upstream.address, **fields}


# What is passed


@pytest.mark.parametrize(
    "sent",
    [
        None,
        "Bearer sk-right",
        "Bearer SK-RIGHT",
        "Bearer sk-Righ",
        "Bearer sk-Right2",
        "Bearer sk-Right ",
        "bearer sk-Right",
        "sk-Right",
        "Basic sk-Right",
        "Bearer ",
    ],
)
def test_other_keys_are_refused(door: Door, upstream: Upstream, sent: str | None) -> None:
    port = door.open(service(upstream, models=["m"]))
    # a client's library strips a trailing space, and so does nginx: what is left is the key
    expected = 200 if sent == "Bearer sk-Right " else 401
    for path in ("/v1/echo", "/v1/models"):
        answer = door.ask(port, path, None, headers={"Authorization": sent} if sent else {})
        assert answer.status == expected
        if expected == 401:
            assert answer.code == "invalid_api_key" and answer.headers["www-authenticate"] == "Bearer"
    assert len(upstream.requests) == (1 if expected == 200 else 0)


def test_the_right_key_passes_and_stays_at_the_door(door: Door, upstream: Upstream) -> None:
    port = door.open(service(upstream, models=["m"]))
    assert door.ask(port, body=b"{}").status == 200
    assert door.ask(port, "/v1/models").json()["data"][0]["id"] == "m"
    assert upstream.authorizations() == {None}


def test_only_what_is_named_is_passed(door: Door, upstream: Upstream, upstreams: t.Callable[..., Upstream]) -> None:
    adapter = upstreams()
    port = door.open(service(upstream, routes={"/v1/rerank": adapter.address}))
    assert door.ask(port, "/health", None).json()["server"] == upstream.port
    assert door.ask(port, "/v1/rerank").json()["server"] == adapter.port
    assert door.ask(port, "/v1/rerank", None).status == 401
    for path in ("/", "/metrics", "/v1x", "/v1/../metrics", "/v1/%2e%2e/metrics", "/health/x"):
        answer = door.ask(port, path)
        assert answer.status == 404 and answer.code == "unknown_url", path
    assert [request["path"] for request in upstream.requests] == ["/health"]


def test_a_service_that_guards_itself_gets_everything(door: Door, upstream: Upstream) -> None:
    port = door.open({"port": free_port(), "upstream": upstream.address, "open": True})
    seen = door.ask(port, "/api/x?y=1", "users-own", headers={"X-Forwarded-For": "6.6.6.6", "X-Real-IP": "6.6.6.6"}).json()
    assert seen["path"] == "/api/x?y=1"
    assert seen["headers"]["Authorization"] == "Bearer users-own"
    assert seen["headers"]["Host"] == f"127.0.0.1:{port}"
    assert seen["headers"]["X-Forwarded-For"] == seen["headers"]["X-Real-IP"] == "127.0.0.1"


def test_only_a_trusted_proxy_may_name_the_client(door: Door, upstream: Upstream) -> None:
    base = {"port": free_port(), "upstream": upstream.address, "open": True}
    for proxies, seen in ((["127.0.0.0/8"], "6.6.6.6"), (["192.0.2.1"], "127.0.0.1")):
        port = door.open({**base, "trusted_proxies": proxies})
        assert door.ask(port, headers={"X-Forwarded-For": "6.6.6.6"}).json()["headers"]["X-Forwarded-For"] == seen


@pytest.mark.parametrize("hop", [False, True])
def test_a_stream_is_not_held_back(door: Door, upstreams: t.Callable[..., Upstream], hop: bool) -> None:
    one, two = upstreams(), upstreams()
    port = door.open(service(member(one, api_key="k1"), member(two, api_key="k2")) if hop else service(one))
    stream = door.stream(port)
    # the server writes the rest only now
    assert stream.first == b"first\n"
    one.go_on.set()
    two.go_on.set()
    assert stream.rest() == b"last\n"


def test_too_large_a_request(door: Door, upstream: Upstream) -> None:
    port = door.open(service(upstream, max_body="2k"))
    assert door.ask(port, body=b"x" * 2048).json()["body"] == 2048
    answer = door.ask(port, body=b"x" * 2049)
    assert answer.status == 413 and answer.code == "request_too_large" and answer.json()["error"]["type"] == "invalid_request_error"
    assert len(upstream.requests) == 1


def test_a_large_request_and_answer_come_whole(door: Door, upstream: Upstream) -> None:
    port = door.open(service(upstream))
    answer = door.ask(port, body=b"x" * 3_000_000, headers={"X-Long": "y" * 6000})
    assert answer.json()["body"] == 3_000_000 and len(answer.json()["headers"]["X-Long"]) == 6000


def test_nothing_behind_the_door(door: Door, upstream: Upstream) -> None:
    port = door.open(service(upstream))
    upstream.stop()
    for path in ("/v1/echo", "/health"):
        answer = door.ask(port, path)
        assert answer.status == 503 and answer.code == "upstream_down" and "a model" in answer.json()["error"]["message"]


def test_a_servers_own_error_is_passed_on(door: Door, upstream: Upstream) -> None:
    port = door.open(service(upstream))
    for status in (400, 404, 429, 500, 503):
        upstream.status = status
        answer = door.ask(port)
        assert answer.status == status and answer.json()["server"] == upstream.port


def test_the_address_may_be_ipv6(door: Door, upstream: Upstream) -> None:
    door.write(service(upstream), door_address="::1")
    assert door.nginx("-t").returncode == 0
    assert re.search(r"listen \[::1\]:\d+;", (door.root / "etc/conf.d/test.conf").read_text())


# Several servers


def _load(door: Door, port: int, requests: int = 40, clients: int = 4, body: bytes | None = b"{}") -> list[int]:
    statuses: list[int] = []

    def work() -> None:
        for _unused in range(requests // clients):
            statuses.append(door.ask(port, body=body).status)

    threads = [threading.Thread(target=work) for _unused in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return statuses


@pytest.mark.parametrize("hop", [False, True])
def test_load_is_shared_and_a_dead_server_costs_no_request(door: Door, upstreams: t.Callable[..., Upstream], hop: bool) -> None:
    one, two = upstreams(), upstreams()
    for upstream in (one, two):
        upstream.delay = 0.01
    items: list[t.Any] = [member(one, api_key="key-1"), member(two, api_key="key-2")] if hop else [one, two]
    port = door.open(service(*items))
    assert _load(door, port) == [200] * 40
    assert min(len(one.requests), len(two.requests)) >= 10
    # nothing of the requests has been sent, so even without retry another server gets them
    one.stop()
    assert _load(door, port) == [200] * 40


@pytest.mark.parametrize("hop", [False, True])
@pytest.mark.parametrize("retry", [False, True])
def test_a_request_that_a_server_has_begun(door: Door, upstreams: t.Callable[..., Upstream], hop: bool, retry: bool) -> None:
    bad, good = upstreams(), upstreams()
    bad.hang_up = True
    keys = [{"api_key": "key-1"}, {"api_key": "key-2"}] if hop else [{}, {}]
    port = door.open(service(member(bad, **keys[0]), member(good, backup=True, **keys[1]), retry=retry))
    answer = door.ask(port, body=b"{}")
    assert len(bad.requests) == 1
    if retry:
        assert answer.status == 200 and answer.json()["server"] == good.port
    else:
        assert answer.status == 503 and answer.code == "upstream_down" and not good.requests
    # from now on the other one has it all
    assert door.ask(port, body=b"{}").json()["server"] == good.port
    assert len(bad.requests) == 1


@pytest.mark.parametrize("hop", [False, True])
@pytest.mark.parametrize("status", [502, 503, 504])
def test_a_busy_server_is_passed_over_on_retry(door: Door, upstreams: t.Callable[..., Upstream], hop: bool, status: int) -> None:
    busy, good = upstreams(), upstreams()
    busy.status = status
    keys = [{"api_key": "key-1"}, {"api_key": "key-2"}] if hop else [{}, {}]
    port = door.open(service(member(busy, **keys[0]), member(good, backup=True, **keys[1]), retry=True))
    assert door.ask(port, body=b"x" * 300_000).json() | {"headers": None} == {"server": good.port, "path": "/v1/echo", "headers": None, "body": 300_000}
    assert len(busy.requests) == 1


@pytest.mark.parametrize("hop", [False, True])
def test_a_servers_own_502_is_no_reason_to_ask_another(door: Door, upstreams: t.Callable[..., Upstream], hop: bool) -> None:
    bad, good = upstreams(), upstreams()
    bad.status = 502
    keys = [{"api_key": "key-1"}, {"api_key": "key-2"}] if hop else [{}, {}]
    port = door.open(service(member(bad, **keys[0]), member(good, backup=True, **keys[1])))
    assert [door.ask(port, body=b"{}").status for _unused in range(3)] == [503 if hop else 502] * 3
    assert (len(bad.requests), len(good.requests)) == (3, 0)


@pytest.mark.parametrize("hop", [False, True])
def test_all_servers_dead(door: Door, upstreams: t.Callable[..., Upstream], hop: bool) -> None:
    one, two = upstreams(), upstreams()
    port = door.open(service(*([member(one, api_key="k1"), member(two)] if hop else [one, two]), retry=True))
    one.stop()
    two.stop()
    for _unused in range(3):
        answer = door.ask(port, body=b"{}")
        assert answer.status == 503 and answer.code == "upstream_down"


def test_every_server_gets_its_own_key(door: Door, upstreams: t.Callable[..., Upstream]) -> None:
    one, two, bare = upstreams(), upstreams(), upstreams()
    port = door.open(service(member(one, api_key="key-1"), member(two, api_key="key-2"), bare))
    assert _load(door, port, 60) == [200] * 60
    assert (one.authorizations(), two.authorizations(), bare.authorizations()) == ({"Bearer key-1"}, {"Bearer key-2"}, {None})
    assert "key-1" not in (door.root / "etc/conf.d/test.conf").read_text()
    single = door.open(service(member(one, api_key="key-1")))
    one.requests.clear()
    assert door.ask(single).status == 200 and one.authorizations() == {"Bearer key-1"}


def test_a_common_key_needs_no_hop(door: Door, upstreams: t.Callable[..., Upstream]) -> None:
    one, two = upstreams(), upstreams()
    port = door.open(service(member(one, api_key="key-1"), member(two, api_key="key-1")))
    assert _load(door, port, 12) == [200] * 12
    assert one.authorizations() == two.authorizations() == {"Bearer key-1"}
    assert "unix:" not in (door.root / "etc/conf.d/test.conf").read_text()


def test_a_joint_upstream_of_a_service_that_guards_itself(door: Door, upstreams: t.Callable[..., Upstream], pki: Pki) -> None:
    one, two = upstreams(tls=pki.server), upstreams(tls=pki.server)
    port = door.open({"port": free_port(), "upstream": [one.address, two.address], "open": True, "upstream_tls": {"ca": pki.ca.pem, "name": "127.0.0.1"}})
    seen = door.ask(port, "/api/x?y=1", "users-own", headers={"X-Forwarded-For": "6.6.6.6"}).json()
    assert (seen["headers"]["Authorization"], seen["headers"]["X-Forwarded-For"], seen["path"]) == ("Bearer users-own", "127.0.0.1", "/api/x?y=1")
    assert seen["headers"]["Host"] == f"127.0.0.1:{port}"


def test_weights(door: Door, upstreams: t.Callable[..., Upstream]) -> None:
    heavy, light = upstreams(), upstreams()
    port = door.open(service(member(heavy, weight=3), light))
    assert _load(door, port, 40, clients=1) == [200] * 40
    assert 22 <= len(heavy.requests) <= 38 and heavy.requests and light.requests


def test_sockets_left_by_a_killed_nginx(door: Door, upstreams: t.Callable[..., Upstream]) -> None:
    one, two = upstreams(), upstreams()
    wanted = service(member(one, api_key="k1"), member(two, api_key="k2"))
    door.open(wanted)
    door.kill()
    assert len(list((door.root / "sockets").iterdir())) == 2
    unit = next(
        task for task in yaml.safe_load((ROLE / "tasks/install.yml").read_text())[2]["block"] if "drop-in" not in task["name"] and "network" in task["name"]
    )
    command = re.search(r"ExecStartPre=(.*)", unit["ansible.builtin.copy"]["content"])
    assert command
    subprocess.run(command[1].replace("{{ door__socket_dir }}", str(door.root / "sockets")), shell=True, check=True)
    door.start()
    assert door.ask(wanted["port"]).status == 200


def test_only_nginx_gets_at_the_sockets(door: Door, upstreams: t.Callable[..., Upstream]) -> None:
    door.open(service(member(upstreams(), api_key="k1"), member(upstreams(), api_key="k2")))
    probe = "import socket, sys; socket.socket(socket.AF_UNIX).connect(sys.argv[1])"
    path = str(next((door.root / "sockets").iterdir()))
    done = subprocess.run(["/usr/bin/python3", "-c", probe, path], user="nobody", group="nogroup", extra_groups=[], capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "PermissionError" in done.stderr


# TLS


def test_tls_with_a_certificate_of_a_ca(door: Door, upstream: Upstream, pki: Pki) -> None:
    plain = free_port()
    wanted = service(upstream, tls={"certificate": pki.server.pem, "key": pki.server.key_pem}, redirect_from=plain)
    port = door.open(wanted)
    assert door.ask(port, context=trusting(pki.ca)).json()["headers"]["X-Forwarded-Proto"] == "https"
    with pytest.raises(ssl.SSLCertVerificationError):
        door.ask(port, context=trusting(pki.other_ca))
    old = trusting(pki.ca)
    old.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning):
        old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_1
    with pytest.raises(OSError):
        door.ask(port, context=old)
    for asked in (plain, port):
        answer = door.ask(asked, "/v1/echo?a=b")
        assert answer.status == 308 and answer.headers["location"] == f"https://127.0.0.1:{port}/v1/echo?a=b"
    door.open({**wanted, "redirect_from": 0})
    assert door.ask(port).code == "https_required"
    with pytest.raises(OSError):
        door.ask(plain)


def test_tls_with_files_of_the_host(door: Door, upstream: Upstream, pki: Pki) -> None:
    wanted = service(upstream, tls={"certificate_file": "/x.pem", "key_file": "/x.key"})
    for suffix, text in (("crt", pki.server.pem), ("key", pki.server.key_pem)):
        target = door.root / f"given.{suffix}"
        target.write_text(text)
        (door.root / f"etc/selfhosted-fastgpt-test-{wanted['port']}.{suffix}").symlink_to(target)
    assert door.ask(door.open(wanted), context=trusting(pki.ca)).status == 200


def _https(upstreams: t.Callable[..., Upstream], signer: Certificate, dns: str = "") -> Upstream:
    return upstreams(tls=make_certificate("engine", signer, dns=dns))


def test_tls_to_the_server_is_verified(door: Door, upstreams: t.Callable[..., Upstream], pki: Pki) -> None:
    good, foreign, named = _https(upstreams, pki.ca), _https(upstreams, pki.other_ca), _https(upstreams, pki.ca, "gpu1.example")
    ca = {"ca": pki.ca.pem}
    wanted = [
        service(good, upstream_tls=ca),
        service(foreign, upstream_tls=ca),
        service(named, upstream_tls=ca),
        service(named, upstream_tls={**ca, "name": "gpu1.example"}),
    ]
    door.open(*wanted)
    assert [door.ask(item["port"]).status for item in wanted] == [200, 503, 503, 200]
    assert not foreign.requests
    assert named.requests[0]["headers"]["Host"] == "gpu1.example"


def test_servers_with_cas_and_keys_of_their_own(door: Door, upstreams: t.Callable[..., Upstream], pki: Pki) -> None:
    one, two, plain = _https(upstreams, pki.ca), _https(upstreams, pki.other_ca), upstreams()
    items = [member(one, tls={"ca": pki.ca.pem}, api_key="k1"), member(two, tls={"ca": pki.other_ca.pem}, api_key="k2"), member(plain)]
    port = door.open(service(*items))
    assert _load(door, port, 24) == [200] * 24
    assert (one.authorizations(), two.authorizations(), plain.authorizations()) == ({"Bearer k1"}, {"Bearer k2"}, {None})
    # one that has another certificate than it should gets nothing, and costs nothing
    items[0]["tls"] = {"ca": pki.other_ca.pem}
    seen = len(one.requests)
    door.open({**service(*items), "port": port})
    assert _load(door, port, 24) == [200] * 24
    assert len(one.requests) == seen


# Changes under load


def test_a_drained_service_finishes_what_it_has(door: Door, upstream: Upstream) -> None:
    wanted = service(upstream, models=["m"])
    port = door.open(wanted)
    stream = door.stream(port)
    door.open({**wanted, "drain": True})
    for path in ("/v1/echo", "/v1/models", "/health"):
        answer = door.ask(port, path)
        assert answer.status == 503 and answer.code == "draining" and answer.headers["connection"] == "close"
    upstream.go_on.set()
    assert stream.rest() == b"last\n"
    assert len(upstream.requests) == 1
    door.open(wanted)
    assert door.ask(port).status == 200


@pytest.mark.parametrize("hop", [False, True])
def test_a_drained_server_finishes_what_it_has(door: Door, upstreams: t.Callable[..., Upstream], hop: bool) -> None:
    leaving, staying = upstreams(), upstreams()
    keys = [{"api_key": "k1"}, {"api_key": "k2"}] if hop else [{}, {}]
    items = [member(leaving, **keys[0]), member(staying, backup=True, **keys[1])]
    wanted = service(*items)
    port = door.open(wanted)
    stream = door.stream(port)
    assert len(leaving.requests) == 1
    items = [{**items[0], "drain": True}, {**items[1], "backup": False}]
    door.open({**wanted, "upstream": items})
    assert _load(door, port, 12) == [200] * 12
    leaving.go_on.set()
    assert stream.rest() == b"last\n"
    assert len(leaving.requests) == 1 and len(staying.requests) == 12
    # the last one too: then there is nobody left
    door.open({**wanted, "upstream": [{**item, "drain": True} for item in items]})
    assert door.ask(port, "/health").code == "draining"


def test_a_rotation_of_keys(door: Door, upstream: Upstream) -> None:
    wanted = service(upstream, api_keys=["sk-Old"])
    port = door.open(wanted)
    stream = door.stream(port, key="sk-Old")
    accepted = {}
    for name, keys in (("both", ["sk-New", "sk-Old"]), ("new", ["sk-New"])):
        door.open({**wanted, "api_keys": keys})
        accepted[name] = [door.ask(port, key=key).status for key in ("sk-New", "sk-Old", "sk-old", "sk-new")]
    assert accepted == {"both": [200, 200, 401, 401], "new": [200, 401, 401, 401]}
    upstream.go_on.set()
    assert stream.rest() == b"last\n"


def test_a_reload_under_load_loses_nothing(door: Door, upstreams: t.Callable[..., Upstream]) -> None:
    one, two = upstreams(), upstreams()
    one.delay = two.delay = 0.02
    wanted = service(member(one, api_key="k1"), member(two, api_key="k2"))
    port = door.open(wanted)
    statuses: list[int] = []
    thread = threading.Thread(target=lambda: statuses.extend(_load(door, port, 120)))
    thread.start()
    for index in range(3):
        door.open({**wanted, "max_body": f"{index + 1}m"})
    thread.join(30)
    assert statuses == [200] * 120


# Doors behind doors

PEER_KEY = "peer-key-of-the-hosts"


def _pool(door: Door, one: Upstream, two: Upstream, **fields: t.Any) -> list[dict[str, t.Any]]:
    """A public service that balances over its own instance and that of another door, which stands on the same nginx here."""
    peer = {"port": free_port(), "name": "peer", "upstream": two.address, "open": True, "peer_key": PEER_KEY, **fields}
    own = {"address": one.address}
    return [{"port": free_port(), "upstream": [own, {"address": f"127.0.0.1:{peer['port']}", "peer_key": PEER_KEY}], "open": True}, peer]


def test_a_peers_door_is_for_peers(door: Door, upstreams: t.Callable[..., Upstream]) -> None:
    one, two = upstreams(), upstreams()
    services = _pool(door, one, two)
    door.open(*services)
    for sent in ({}, {"X-Selfhosted-Peer": "other"}, {"X-Selfhosted-Peer": PEER_KEY + "x"}):
        answer = door.ask(services[1]["port"], key=None, headers=sent)
        assert answer.status == 403 and answer.code == "not_a_peer"
    assert not two.requests
    # not even by the public way can a client name another address
    forged = {"X-Forwarded-For": "198.51.100.7", "X-Selfhosted-Peer": PEER_KEY}
    for _unused in range(6):
        assert door.ask(services[0]["port"], key=None, headers=forged).status == 200
    assert one.requests and two.requests
    for request in one.requests + two.requests:
        assert request["headers"]["X-Forwarded-For"] == "127.0.0.1"
        assert PEER_KEY not in str(request)


def test_a_draining_peer_costs_no_request(door: Door, upstreams: t.Callable[..., Upstream]) -> None:
    one, two = upstreams(), upstreams()
    services = _pool(door, one, two)
    port = door.open(*services)
    assert _load(door, port) == [200] * 40
    assert min(len(one.requests), len(two.requests)) >= 5
    before = len(two.requests)
    door.open(services[0], {**services[1], "drain": True})
    assert door.ask(services[1]["port"], key=None, headers={"X-Selfhosted-Peer": PEER_KEY}).status == 502
    # with a body, which is not sent twice by a rule of nginx's
    assert _load(door, port) == [200] * 40
    assert len(two.requests) == before
    # nor does one cost anything whose server is gone
    two.stop()
    door.open(*services)
    assert _load(door, port) == [200] * 40


def test_what_a_peer_has_begun_is_not_repeated(door: Door, upstreams: t.Callable[..., Upstream]) -> None:
    one, two = upstreams(), upstreams()
    services = _pool(door, one, two)
    services[0]["upstream"][0]["backup"] = True
    port = door.open(*services)
    two.hang_up = True
    answer = door.ask(port, body=b"{}", key=None)
    assert answer.status == 503 and len(two.requests) == 1 and not one.requests


def test_a_pool_of_doors_that_may_be_asked_again(door: Door, upstreams: t.Callable[..., Upstream]) -> None:
    one, two = upstreams(), upstreams()
    doors = [{"port": free_port(), "name": server.address, "upstream": server.address, "open": True, "pooled": True} for server in (one, two)]
    pool = [{"address": f"127.0.0.1:{item['port']}", "pooled": True} for item in doors]
    public = {"port": free_port(), "upstream": pool, "open": True, "retry": True}
    port = door.open(public, *doors)
    assert _load(door, port) == [200] * 40
    door.open(public, {**doors[0], "drain": True}, doors[1])
    assert _load(door, port) == [200] * 40
    # a refusal of its own is passed on, and is no reason to think the node dead
    door.open(public, *doors)
    one.status = two.status = 503
    assert [door.ask(port, body=b"{}", key=None).status for _unused in range(4)] == [503] * 4
    one.status = two.status = 200
    assert _load(door, port) == [200] * 40


# The rest


def test_the_log_has_figures_and_no_secret(door: Door, upstreams: t.Callable[..., Upstream], pki: Pki) -> None:
    upstream, other = upstreams(), upstreams()
    wanted = service(member(upstream, api_key="sk-Behind"), member(other, backup=True))
    port = door.open(wanted)
    door.ask(port, '/v1/a"b%0a?token=sk-Query', body=b"sk-Body", headers={"Cookie": "sk-Cookie", "User-Agent": "sk-Agent", "Referer": "http://x/?sk-Referer"})
    wait_for(lambda: door.log.exists() and door.log.read_text())
    door.ask(port, key="sk-Wrong")
    text = wait_for(lambda: door.log.exists() and door.log.read_text().count("\n") == 2 and door.log.read_text())
    assert "sk-" not in text and "token" not in text
    first, second = door.lines()
    assert (first["path"], first["method"], first["status"], first["port"]) == ('/v1/a"b\n', "POST", 200, port)
    assert first["client"] == "127.0.0.1" and first["bytes"] > 0 and first["bytes_in"] > 0 and first["seconds"] >= 0
    # which of several servers it was
    assert f"127.0.0.1_{upstream.port}" in first["upstream"] and first["upstream_status"] == "200" and float(first["upstream_seconds"]) >= 0
    assert second["status"] == 401 and second["upstream"] == ""
    assert not (door.root / "other.log").read_text()
    pattern = Path("/etc/logrotate.d/nginx").read_text().split()[0]
    assert fnmatch.fnmatch("/var/log/nginx/selfhosted-fastgpt-test.log", pattern)
    before = door.log.read_text()
    door.open(wanted, door_access_log=False)
    door.ask(port)
    assert door.log.read_text() == before and not (door.root / "other.log").read_text()


@pytest.mark.parametrize("hop", [False, True])
def test_the_error_log_quotes_no_query(door: Door, upstreams: t.Callable[..., Upstream], pki: Pki, hop: bool) -> None:
    """Whatever way a request fails: nobody there, hung up, too large, too often, a certificate that is not trusted, a socket of a hop."""
    gone, rude, untrusted = upstreams(), upstreams(), upstreams(tls=pki.server)
    gone.stop()
    rude.hang_up = True
    keys = [{"api_key": "sk-One"}, {"api_key": "sk-Two"}] if hop else [{}, {}]
    limit = [{"path": "/v1/limited", "rate": "1r/m"}]
    wanted = [
        service(member(gone, **keys[0]), member(gone, backup=True, **keys[1]), max_body="1k", rate_limits=limit),
        service(member(rude, **keys[0]), member(rude, backup=True, **keys[1])),
        service(untrusted, upstream_tls={"ca": pki.other_ca.pem, "name": "127.0.0.1"}),
    ]
    errors = [door.root / "error.log", door.root / "log" / "error.log"]

    def fail() -> str:
        ports = [one["port"] for one in wanted]
        statuses = [door.ask(port, "/v1/echo?token=sk-Query", body=b"{}").status for port in ports]
        statuses.append(door.ask(ports[0], "/v1/echo?token=sk-Query", body=b"x" * 2000).status)
        statuses += [door.ask(ports[0], "/v1/limited?token=sk-Query").status for _unused in range(2)]
        # the limit counts on over a reload
        assert statuses[:4] == [503, 503, 503, 413] and statuses[5] == 429
        for socket in (door.root / "sockets").iterdir():
            socket.unlink()
        assert not hop or door.ask(ports[0], "/v1/echo?token=sk-Query").status == 503
        wait_for(lambda: door.log.read_text().count("\n") >= len(statuses) + hop)
        return "".join(path.read_text() for path in errors if path.exists())

    door.open(*wanted)
    assert "sk-" not in fail() and "token" not in door.log.read_text()
    # the same failures are written where one asks for it, so the test above has looked at the right files
    door.log.write_text("")
    door.open(*wanted, door_error_log=True)
    told = fail()
    assert told.count("token=sk-Query") >= 6 and "certificate verify" in told


def test_a_rate_limit(door: Door, upstream: Upstream) -> None:
    login = "/api/login"
    port = door.open(
        {"port": free_port(), "upstream": upstream.address, "open": True, "rate_limits": [{"path": login, "rate": "1r/m", "burst": 2}]},
        service(upstream, rate_limits=[{"path": "/v1/models", "rate": "1r/m"}, {"path": "/v1/echo", "rate": "1r/m"}], models=["m"]),
    )
    statuses = [door.ask(port, path, body=b"{}").status for path in (login, login, login, login, "/api//login", "/api/%6cogin", login + "?x=1")]
    assert statuses == [200] * 3 + [429] * 4
    limited = door.ask(port, login)
    assert limited.code == "rate_limit_exceeded" and "application/json" in limited.headers["content-type"]
    assert [door.ask(port, "/api/other").status for _unused in range(5)] == [200] * 5


def test_a_limit_on_a_guarded_path(door: Door, upstream: Upstream) -> None:
    port = door.open(service(upstream, rate_limits=[{"path": "/v1/echo", "rate": "1r/m"}]))
    assert [door.ask(port, key=key).status for key in (None, KEY, KEY)] == [401, 200, 429]


def test_security_headers(door: Door, upstream: Upstream, pki: Pki) -> None:
    tls = {"certificate": pki.server.pem, "key": pki.server.key_pem}
    wanted = service(upstream, security_headers=True, headers={"X-Robots-Tag": "noindex", "Referrer-Policy": ""}, tls=tls)
    port = door.open(wanted)
    for path in ("/v1/echo", "/nowhere"):
        connection = http.client.HTTPSConnection("127.0.0.1", port, context=trusting(pki.ca), timeout=10)
        connection.request("GET", path, headers={"Authorization": f"Bearer {KEY}"})
        found = connection.getresponse().headers
        # once, though the server behind sends one of them itself
        assert found.get_all("X-Frame-Options") == ["SAMEORIGIN"] and found["X-Content-Type-Options"] == "nosniff"
        assert found["Strict-Transport-Security"] and found["X-Robots-Tag"] == "noindex" and not found["Referrer-Policy"]
        connection.close()
    port = door.open(service(upstream, security_headers=True))
    assert "strict-transport-security" not in door.ask(port).headers


def test_two_callers_do_not_meet(door: Door, upstream: Upstream) -> None:
    wanted = service(upstream, rate_limits=[{"path": "/v1/x", "rate": "1r/s"}])
    port = door.open(wanted)
    texts = {path.name: path.read_text() for path in (door.root / "etc/conf.d").iterdir()}
    door.write(service(upstream), door_name="other")
    for name, text in list(texts.items()):
        (door.root / "etc/conf.d" / f"first.{name}").write_text(text)
    door.reload()
    assert door.ask(port).status == 200
