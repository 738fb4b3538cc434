# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the client of MongoDB decides without a server: which primary counts, which fault is final, how long it waits."""

from __future__ import annotations

import typing as t

import pytest
from ansible_collections.selfhosted.fastgpt.plugins.module_utils import _mongodb as m


class FakeNode:
    def __init__(self, address: str, hello: dict[str, t.Any]) -> None:
        self.address = address
        self._hello = hello

    def hello(self) -> dict[str, t.Any]:
        return self._hello

    def close(self) -> None:
        pass


def hello(me: str, primary: bool, election: int = 0, name: str = "rs0", **more: t.Any) -> dict[str, t.Any]:
    return {
        "setName": name,
        "me": me,
        "hosts": ["a:1", "b:1", "c:1"],
        "isWritablePrimary": primary,
        "electionId": f"7fffffff{election:016x}",
        "topologyVersion": {"processId": me},
        **more,
    }


def find(monkeypatch: pytest.MonkeyPatch, own: dict[str, t.Any], others: dict[str, dict[str, t.Any]], by: str = "user") -> str | None:
    def peek(_settings: m.Settings, address: str) -> dict[str, t.Any]:
        if address not in others:
            raise m.Unreachable(address, "timed out")
        return others[address]

    monkeypatch.setattr(m, "peek", peek)
    monkeypatch.setattr(m, "open_node", lambda _s, address: m.Access(t.cast(m.Node, FakeNode(address, others[address])), "user", others[address]))
    settings = m.Settings("a:1", "root", "x")
    found = m.find_primary(settings, m.Access(t.cast(m.Node, FakeNode("a:1", own)), by, own))
    return found.node.address if found else None


def test_the_later_elected_of_two_primaries_counts_whichever_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = hello("a:1", True, 3), hello("b:1", True, 11)
    assert find(monkeypatch, old, {"b:1": new}) == "b:1"
    assert find(monkeypatch, new, {"b:1": old}) == "a:1"


def test_a_primary_of_a_namesake_or_of_another_set_is_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    assert find(monkeypatch, hello("a:1", False), {"b:1": hello("b:1", True, 9, name="rs9")}) is None
    assert find(monkeypatch, hello("a:1", False), {}) is None


def test_through_the_localhost_exception_no_other_server_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    assert find(monkeypatch, hello("a:1", True, 3), {"b:1": hello("b:1", True, 11)}, by="exception") == "a:1"


def test_final_faults_end_the_wait_at_once_others_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[bool] = []

    def refuse(final: bool) -> t.Callable[..., t.NoReturn]:
        def open_node(_settings: m.Settings, address: str) -> t.NoReturn:
            calls.append(final)
            raise m.Unreachable(address, "the reason", final)

        return open_node

    monkeypatch.setattr(m.time, "sleep", lambda _seconds: None)
    settings = m.Settings("a:1")
    monkeypatch.setattr(m, "open_node", refuse(True))
    with pytest.raises(m.MongoFault, match="a:1: the reason"):
        m.open_login(settings, 60)
    assert calls == [True]
    monkeypatch.setattr(m, "open_node", refuse(False))
    with pytest.raises(m.MongoFault, match=r"within 0\.05 s: the reason"):
        m.open_login(settings, 0.05)
    assert len(calls) > 2


def test_a_driver_that_does_not_fit_the_server_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pymongo = pytest.importorskip("pymongo")

    class Client:
        def __getitem__(self, _name: str) -> t.Any:
            return self

        def command(self, *_args: t.Any, **_fields: t.Any) -> t.NoReturn:
            raise pymongo.errors.ConfigurationError("Server at a:1 reports wire version 4, but this driver requires at least 8 (MongoDB 4.2).")

        def close(self) -> None:
            pass

    with m.Node(m.Settings("a:1"), "a:1") as node:
        node._client.close()
        node._client = Client()
        with pytest.raises(m.MongoFault, match=r"pymongo .* wire version 4.*Install a pymongo that fits"):
            node.command("hello")


@pytest.mark.parametrize(("timeout", "connect", "command"), [(1, 1, 6), (30, 5, 35), (600, 5, 60)])
def test_a_connection_never_waits_far_beyond_the_time_out(timeout: int, connect: float, command: float) -> None:
    settings = m.Settings("a:1", timeout=timeout)
    assert (settings.connect_seconds, settings.command_seconds) == (connect, command)


def test_the_greeting_is_one_well_formed_message() -> None:
    assert int.from_bytes(m._HELLO[:4], "little") == len(m._HELLO)
    body = m._HELLO[-19:]
    assert int.from_bytes(body[:4], "little") == len(body) == 19
    assert not m._is_mongodb(b"HTTP/1.1 400 Bad")
    assert not m._is_mongodb(b"")


def test_settings_hide_secrets() -> None:
    text = repr(m.Settings("a:1", "root", "secret-1", "secret-2", certificate_key_password="secret-3"))
    assert "secret" not in text
