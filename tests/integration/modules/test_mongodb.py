# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""mongodb_replica_set, mongodb_replica_set_info and mongodb_user against real mongod processes."""

from __future__ import annotations

import pathlib
import signal
import socket
import struct
import threading
import time
import typing as t
from types import SimpleNamespace

import pytest
from ansible_collections.selfhosted.fastgpt.plugins.module_utils._mongodb import Access, Settings
from ansible_collections.selfhosted.fastgpt.plugins.module_utils._mongodb_plan import Member
from ansible_collections.selfhosted.fastgpt.plugins.modules.mongodb_replica_set import Peer, ReplicaSet
from fixtures_mongodb import VERSION, Authority, Lab, LosingProxy, Node, Port, run_mongo_module, start_mongo_module
from ports import free_port

PASSWORD = "root-password-1"


def login(node: Node, **more: t.Any) -> dict[str, t.Any]:
    return {
        "login_host": "127.0.0.1", "login_port": node.port, "login_user": "root", "login_password": PASSWORD, "timeout": 60,
        **more,
    }  # fmt: skip


def replica_set(node: Node, members: list[t.Any], *, check: bool = False, **more: t.Any) -> dict[str, t.Any]:
    wanted = [m if isinstance(m, dict) else {"host": m.host if isinstance(m, Node) else m} for m in members]
    return run_mongo_module("mongodb_replica_set", {**login(node), "members": wanted, **more}, check=check)


def info(node: Node, **more: t.Any) -> dict[str, t.Any]:
    return run_mongo_module("mongodb_replica_set_info", {**login(node), **more})


def failed(result: dict[str, t.Any]) -> str:
    assert result.get("failed"), result
    assert not result.get("changed")
    assert PASSWORD not in result["_raw"]
    assert "exception" not in result
    return str(result["msg"])


def done(result: dict[str, t.Any], changed: bool) -> dict[str, t.Any]:
    assert not result.get("failed"), result.get("msg")
    assert result["changed"] is changed, result
    assert PASSWORD not in result["_raw"]
    return result


def config(node: Node, password: str = PASSWORD) -> dict[str, t.Any]:
    with node.client("root", password) as client:
        found: dict[str, t.Any] = client.admin.command("replSetGetConfig")["config"]
        return found


@pytest.fixture
def single(mongo_lab: Lab) -> Node:
    node = mongo_lab.node_with_root()
    done(replica_set(node, [node]), True)
    return node


@pytest.fixture
def three(mongo_lab: Lab) -> list[Node]:
    """A set with short elections, made without the module, so that the tests do not wait for MongoDB's ten seconds."""
    nodes = [mongo_lab.node_with_root() for _node in range(3)]
    document = {
        "_id": "rs0",
        "members": [{"_id": i, "host": n.host} for i, n in enumerate(nodes)],
        "settings": {"electionTimeoutMillis": 2000, "heartbeatIntervalMillis": 500},
    }
    with nodes[0].client("root", PASSWORD) as client:
        client.admin.command("replSetInitiate", document)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if [m["state"] in ("PRIMARY", "SECONDARY") for m in info(nodes[0])["members"]] == [True] * 3:
            break
    return nodes


def test_initiate_one_member_with_root_user(mongo_lab: Lab) -> None:
    node = mongo_lab.node_with_root()
    predicted = done(replica_set(node, [node], check=True), True)
    assert predicted["steps"] == [f"initiate rs0 with {node.host}"]
    assert predicted["diff"]["before"] == {}
    assert predicted["diff"]["after"]["members"][0]["host"] == node.host
    state = info(node)
    assert (state["initiated"], state["state"]) == (False, "UNINITIATED")

    made = done(replica_set(node, [node]), True)
    assert made["steps"] == predicted["steps"]
    assert made["initiated"] and made["primary"] == node.host
    assert isinstance(made["majority_write_ms"], int)
    assert made["diff"] == predicted["diff"]

    again = done(replica_set(node, [node]), False)
    assert again["steps"] == [] and again["diff"]["before"] == again["diff"]["after"]
    done(replica_set(node, [node], check=True), False)
    assert info(node, members=[{"host": node.host}], name="rs0", probe_write=True)["matches"] is True


def test_initiate_through_the_localhost_exception_then_first_user(mongo_lab: Lab) -> None:
    node = mongo_lab.node()
    anonymous = {"login_user": None, "login_password": None}
    # Once without and once with credentials of a user that is yet to be made.
    done(replica_set(node, [node], **anonymous, check=True), True)
    made = done(replica_set(node, [node]), True)
    assert made["initiated"] and "majority_write_ms" not in made
    done(replica_set(node, [node], **anonymous), False)
    assert "first user" in failed(replica_set(node, [node, f"127.0.0.1:{free_port()}"]))

    user = {**login(node), "name": "root", "password": PASSWORD, "roles": ["root"]}
    done(run_mongo_module("mongodb_user", user, check=True), True)
    done(run_mongo_module("mongodb_user", user), True)
    done(run_mongo_module("mongodb_user", user), False)
    assert "majority_write_ms" in done(replica_set(node, [node]), False)
    assert "asks for a log-in" in failed(replica_set(node, [node], **anonymous))


def test_without_access_control(mongo_lab: Lab) -> None:
    node = mongo_lab.node(auth=False)
    result = done(replica_set(node, [node]), True)
    assert "does not ask for a log-in" in result["warnings"][0]
    done(replica_set(node, [node], login_user=None, login_password=None), False)


def test_initiate_three_members(mongo_lab: Lab) -> None:
    nodes = [mongo_lab.node_with_root(), mongo_lab.node_with_root(), mongo_lab.node()]
    done(replica_set(nodes[0], nodes), True)
    done(replica_set(nodes[2], nodes), False)


def test_converged_set_and_a_minority_down(three: list[Node]) -> None:
    again = done(replica_set(three[1], three), False)
    assert again["primary"] in [n.host for n in three]
    state = info(three[2], members=[{"host": n.host} for n in three], probe_write=True)
    assert state["matches"] and state["majority_write_ms"] is not None
    assert sorted(m["state"] for m in state["members"]) == ["PRIMARY", "SECONDARY", "SECONDARY"]
    assert all(m["healthy"] and m["lag_seconds"] is not None for m in state["members"])
    # A converged set is not touched because a minority is down.
    three[0].stop(signal.SIGTERM)
    done(replica_set(three[1], three), False)
    assert info(three[1], probe_write=True)["majority_write_ms"] is not None


def test_grow_to_three_then_change_then_shrink(mongo_lab: Lab, single: Node) -> None:
    with single.client("root", PASSWORD) as client:
        client.app.notes.insert_one({"_id": 1, "text": "stays"})
    nodes = [single, mongo_lab.node(), mongo_lab.node_with_root()]
    predicted = done(replica_set(single, nodes, check=True), True)
    assert len(config(single)["members"]) == 1
    grown = done(replica_set(single, nodes), True)
    assert grown["steps"] == predicted["steps"] == [
        f"add {nodes[1].host} as member 1 without a vote",
        f"add {nodes[2].host} as member 2 without a vote",
        f"give {nodes[1].host} its vote, priority 1",
        f"give {nodes[2].host} its vote, priority 1",
    ]  # fmt: skip
    done(replica_set(nodes[1], nodes), False)
    with nodes[1].client("root", PASSWORD, readPreference="secondaryPreferred") as client:
        assert client.app.notes.find_one()["text"] == "stays"

    tuned = [
        {"host": nodes[0].host, "priority": 2},
        {"host": nodes[1].host, "priority": 0, "hidden": True},
        {"host": nodes[2].host, "priority": 1.5},
    ]
    changed = done(replica_set(single, tuned), True)
    assert len(changed["steps"]) == 1
    done(replica_set(single, tuned), False)
    assert config(single)["members"][1]["hidden"] is True

    # The primary itself leaves: it steps down first.
    smaller = [{"host": nodes[2].host}]
    predicted = done(replica_set(nodes[2], smaller, check=True), True)
    assert len(config(single)["members"]) == 3
    shrunk = done(replica_set(nodes[2], smaller), True)
    assert shrunk["steps"] == predicted["steps"]
    assert any("step down" in step for step in shrunk["steps"])
    assert shrunk["primary"] == nodes[2].host
    done(replica_set(nodes[2], smaller), False)
    with nodes[2].client("root", PASSWORD) as client:
        assert client.app.notes.find_one()["text"] == "stays"

    # One that was removed has this set's data, and may come back.
    done(replica_set(nodes[2], [nodes[2], nodes[0]]), True)


def test_rename_host_of_a_live_single_member(single: Node) -> None:
    # The same server under another address of the loop-back network.
    renamed = f"localhost:{single.port}"
    predicted = done(replica_set(single, [renamed], check=True), True)
    changed = done(replica_set(single, [renamed]), True)
    assert changed["steps"] == predicted["steps"] == [f"change the host of member 0 from {single.host} to {renamed}"]
    assert changed["diff"]["before"]["members"][0]["host"] == single.host
    assert changed["primary"] == renamed
    done(replica_set(single, [renamed]), False)


def test_rename_all_hosts_of_three(three: list[Node]) -> None:
    renamed = [f"localhost:{n.port}" for n in three]
    # MongoDB takes all or no loop-back names, and both forms are such; one step for each.
    changed = done(replica_set(three[0], renamed), True)
    assert len(changed["steps"]) == 3 and all("change the host" in s for s in changed["steps"])
    done(replica_set(three[2], renamed), False)
    assert [m["_id"] for m in config(three[0])["members"]] == [0, 1, 2]


def test_removed_member_needs_force(single: Node) -> None:
    with single.client("root", PASSWORD) as client:
        client.app.notes.insert_one({"_id": 1})
    old = single.host
    single.stop(signal.SIGTERM)
    single.port = free_port()
    single.start()
    assert info(single)["state"] == "REMOVED"
    text = failed(replica_set(single, [single]))
    assert "REMOVED" in text and "force_recovery" in text and old in text
    assert "None of the listed hosts is this server" in failed(replica_set(single, [old], force_recovery=True))
    predicted = done(replica_set(single, [single], force_recovery=True, check=True), True)
    assert info(single)["state"] == "REMOVED"
    recovered = done(replica_set(single, [single], force_recovery=True), True)
    assert recovered["steps"] == predicted["steps"] and recovered["primary"] == single.host
    done(replica_set(single, [single], force_recovery=True), False)
    with single.client("root", PASSWORD) as client:
        assert client.app.notes.count_documents({}) == 1


def test_removed_set_of_three(three: list[Node]) -> None:
    with three[0].client("root", PASSWORD) as client:
        assert client is not None
    for node in three:
        node.stop(signal.SIGTERM)
        node.port = free_port()
    for node in three:
        node.start()
    assert "force_recovery" in failed(replica_set(three[1], three))
    done(replica_set(three[1], three, force_recovery=True), True)
    done(replica_set(three[0], three), False)


def test_one_of_three_moved_is_not_forced(three: list[Node]) -> None:
    three[2].stop(signal.SIGTERM)
    three[2].port = free_port()
    three[2].start()
    # Sent to the member that lost itself; its set lives, so the ordinary way is taken.
    done(replica_set(three[2], three), True)
    done(replica_set(three[2], three), False)


def test_refusals(mongo_lab: Lab, single: Node) -> None:
    before = config(single)
    assert "belongs to the replica set 'rs0', not 'rs9'" in failed(replica_set(single, [single], name="rs9"))
    assert "refuses the log-in of user root" in failed(replica_set(single, [single], login_password="wrong-wrong"))
    closed = f"127.0.0.1:{free_port()}"
    text = failed(replica_set(single, [single.host, closed]))
    assert "do not answer" in text and closed in text
    text = failed(replica_set(single, [single], login_port=free_port(), timeout=1))
    assert "No MongoDB answers" in text and "Connection refused" in text
    assert "same server" in failed(replica_set(single, [single.host, f"localhost:{single.port}"]))
    text = failed(replica_set(single, [{"host": "a b"}, {"host": "x", "votes": 0, "priority": 3}, {"host": "x"}]))
    assert len(text.splitlines()) == 3

    foreign = mongo_lab.node_with_root(set_name="other")
    done(replica_set(foreign, [foreign], name="other"), True)
    assert "belongs to the replica set 'other'" in failed(replica_set(single, [single, foreign]))
    namesake = mongo_lab.node_with_root()
    done(replica_set(namesake, [namesake]), True)
    assert "another replica set that is called 'rs0' too" in failed(replica_set(single, [single, namesake]))
    with_data = mongo_lab.node_with_root()
    with_data.stop(signal.SIGTERM)
    with_data.set_name = None
    with_data.start()
    with with_data.client("root", PASSWORD) as client:
        client.precious.things.insert_one({})
    assert "runs without replication" in failed(replica_set(with_data, [with_data]))
    with_data.stop(signal.SIGTERM)
    with_data.set_name = "rs0"
    with_data.start()
    if VERSION < "5":
        blind = done(replica_set(single, [single, with_data], check=True), True)
        assert "whether it holds data cannot be found out" in blind["warnings"][0]
    else:
        assert "holds data of its own (collections: 1)" in failed(replica_set(single, [single, with_data]))
    # A server of some set that was never meant: its members are not silently moved to the listed ones.
    text = failed(replica_set(single, [mongo_lab.node_with_root()]))
    assert "none of them is listed" in text and single.host in text
    # From the side of the server that is not a member.
    assert "none of the listed members" in failed(replica_set(mongo_lab.node_with_root(), [namesake]))
    assert config(single) == before


def test_wrong_name_on_a_fresh_server(mongo_lab: Lab) -> None:
    node = mongo_lab.node_with_root()
    assert "--replSet rs0" in failed(replica_set(node, [node], name="rs9"))
    assert "--replSet rs0" in failed(replica_set(node, [node], name="rs9", check=True))
    other = mongo_lab.node_with_root(set_name="rs9")
    done(replica_set(other, [other], name="rs9"), True)
    other.stop(signal.SIGTERM)
    other.set_name = "rs0"
    other.start()
    assert "holds data of the replica set 'rs9'" in failed(replica_set(other, [other], force_recovery=True))


def test_initiate_with_a_host_that_is_not_this_server(mongo_lab: Lab) -> None:
    one, two = mongo_lab.node_with_root(), mongo_lab.node_with_root()
    text = failed(replica_set(one, [two]))
    assert "maps to this node" in text
    assert info(one)["state"] == "UNINITIATED"


def test_fresh_server_joins_the_living_set(mongo_lab: Lab, single: Node) -> None:
    fresh = mongo_lab.node_with_root()
    # Sent to the server that is not yet a member.
    done(replica_set(fresh, [single, fresh]), True)
    done(replica_set(fresh, [single, fresh]), False)
    late = mongo_lab.node_with_root()
    assert "members that are not listed" in failed(replica_set(late, [late, single]))


def test_password_rotation(three: list[Node]) -> None:
    new = {"login_password": "root-password-2", "login_password_previous": PASSWORD}
    predicted = done(replica_set(three[1], three, **new, check=True), True)
    assert predicted["password_rotated"] and predicted["steps"] == ["change the password of root"]
    done(replica_set(three[1], three), False)
    rotated = done(replica_set(three[1], three, **new), True)
    assert rotated["password_rotated"] and rotated["diff"]["after"]["password of root"] == "(new)"
    assert "root-password" not in rotated["_raw"]
    done(replica_set(three[2], three, **new), False)
    assert "refuses the log-in" in failed(replica_set(three[1], three))
    both_wrong = {"login_password": "root-password-3", "login_password_previous": "root-password-4"}
    assert "neither login_password nor login_password_previous" in failed(replica_set(three[1], three, **both_wrong))


def test_arbiter_and_the_default_write_concern(mongo_lab: Lab, single: Node) -> None:
    second = mongo_lab.node_with_root()
    # An arbiter knows no users; without the exception it takes no log-in at all, as from another host.
    arbiter = mongo_lab.node(extra=["--setParameter", "enableLocalhostAuthBypass=0"])
    members = [{"host": single.host}, {"host": second.host}, {"host": arbiter.host, "arbiter": True}]
    predicted = done(replica_set(single, members, check=True), True)
    made = done(replica_set(single, members), True)
    assert made["steps"] == predicted["steps"]
    assert any(arbiter.host in w and "whether it holds data cannot be found out" in w for w in made["warnings"])
    # Before 5.0 nothing but w:1 is implied.
    assert ("set the default write concern to 1" in made["steps"]) is (VERSION >= "5")
    assert any("w:1" in w for w in made["warnings"]) is (VERSION >= "5")
    done(replica_set(single, members), False)
    done(replica_set(arbiter, members), False)
    assert "is an arbiter, which knows no users" in failed(info(arbiter))
    text = failed(replica_set(single, [single, second, arbiter]))
    assert "cannot become a data member in place" in text
    done(replica_set(single, [single, second]), True)


def test_member_that_never_gets_healthy_is_named(mongo_lab: Lab, single: Node) -> None:
    second = mongo_lab.node_with_root()
    done(replica_set(single, [single, second]), True)
    third = mongo_lab.node_with_root()
    down = mongo_lab.node_with_root()
    done(replica_set(single, [single, second, third]), True)
    third.stop()
    result = replica_set(single, [single, second, third, down], timeout=5)
    assert result["failed"] and third.host in result["msg"] and "healthy" in result["msg"]
    # A dead member can be replaced.
    replaced = done(replica_set(single, [single, second, down]), True)
    assert any(s == f"remove {third.host}" for s in replaced["steps"])


def test_no_majority_is_reported(three: list[Node]) -> None:
    primary = info(three[0])["primary"]
    for node in three:
        if node.host != primary:
            node.stop()
    alive = next(n for n in three if n.host == primary)
    result = replica_set(alive, three, timeout=5)
    assert result["failed"]
    assert "no write that a majority acknowledges" in result["msg"] or "no primary" in result["msg"]


def until(ready: t.Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline, "it does not come to pass"
        time.sleep(0.02)


def test_primary_and_run_killed_during_reconfiguration(mongo_lab: Lab, three: list[Node]) -> None:
    extra = mongo_lab.node_with_root()
    primary = next(n for n in three if n.host == info(three[0])["primary"])
    start = next(n for n in three if n is not primary)
    wanted = [*({"host": n.host} for n in three), {"host": extra.host, "priority": 0.5}]
    arguments = {**login(start), "members": wanted}

    def joined(votes: int) -> bool:
        return [m["votes"] for m in config(start)["members"][3:]] == [votes]

    # Killed by -9 between the step that adds the member and the one that gives it its vote: first the module ...
    first = start_mongo_module("mongodb_replica_set", arguments)
    until(lambda: joined(0))
    first.kill()
    first.communicate()
    # ... then the primary, while the next run waits for the new member.
    assert joined(0), "the module was not killed in between"
    extra.pause()
    results: list[dict[str, t.Any]] = []
    worker = threading.Thread(target=lambda: results.append(run_mongo_module("mongodb_replica_set", arguments)))
    worker.start()
    time.sleep(1)
    primary.stop()
    extra.resume()
    time.sleep(1)
    primary.start()
    worker.join()
    assert not results[0].get("failed") or "run again" in results[0]["msg"].lower(), results[0]
    final = replica_set(start, wanted)
    assert not final.get("failed"), final["msg"]
    assert joined(1)
    done(replica_set(start, wanted), False)


def test_stale_primary_is_not_believed(three: list[Node]) -> None:
    old = next(n for n in three if n.host == info(three[0])["primary"])
    others = [n for n in three if n is not old]
    old.pause()
    until(lambda: any(n.client().admin.command("hello")["isWritablePrimary"] for n in others))
    # It still calls itself primary until it has heard of the later election.
    old.resume()
    weighted = [{"host": n.host, "priority": 1 if n is old else 2} for n in three]
    changed = done(replica_set(old, weighted), True)
    assert changed["primary"] != old.host and changed["steps"][-1].startswith("set priority")
    assert {m["host"]: m["priority"] for m in config(others[0])["members"]} == {w["host"]: w["priority"] for w in weighted}


def test_two_runs_at_once_end_in_one_state(mongo_lab: Lab) -> None:
    nodes = [mongo_lab.node_with_root() for _node in range(3)]
    results: list[dict[str, t.Any]] = []
    workers = [threading.Thread(target=lambda n=n: results.append(replica_set(n, nodes))) for n in nodes[:2]]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [r["msg"] for r in results if r.get("failed")] == []
    assert sorted(r["initiated"] for r in results) == [False, True]
    done(replica_set(nodes[2], nodes), False)
    assert len({str(config(n)["settings"]["replicaSetId"]) for n in nodes}) == 1
    # Both change the running set: neither fails, and what is declared stands.
    weighted = [{"host": n.host, "priority": 3 - i, "hidden": False} for i, n in enumerate(nodes)]
    results.clear()
    workers = [threading.Thread(target=lambda n=n: results.append(replica_set(n, weighted))) for n in nodes[:2]]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [r.get("msg") for r in results if r.get("failed")] == []
    assert [m["priority"] for m in config(nodes[0])["members"]] == [3, 2, 1]
    done(replica_set(nodes[2], weighted), False)


@pytest.mark.parametrize("sees_first", [False, True])
def test_set_that_another_run_makes_while_we_look(mongo_lab: Lab, monkeypatch: pytest.MonkeyPatch, sees_first: bool) -> None:
    """What the members said before the other run, or between its two halves, is compared with what they hold after it."""
    nodes = [mongo_lab.node_with_root() for _node in range(3)]
    seen = ReplicaSet.peers
    looks: list[int] = []

    def stale(self: ReplicaSet, access: Access, hosts: t.Iterable[str]) -> list[Peer]:
        peers = seen(self, access, hosts)
        if not looks:
            done(replica_set(nodes[0], nodes), True)
            if sees_first:
                later = seen(self, access, hosts)
                peers = [new if new.host == nodes[0].host else old for old, new in zip(peers, later, strict=True)]
        looks.append(1)
        return peers

    monkeypatch.setattr(ReplicaSet, "peers", stale)
    module = SimpleNamespace(params={"name": "rs0", "force_recovery": False, "default_write_concern": "auto"}, check_mode=False, warn=print)
    settings = Settings(nodes[1].host, "root", PASSWORD, timeout=60)
    work = ReplicaSet(t.cast(t.Any, module), settings, [Member(n.host) for n in nodes])
    try:
        work.run()
    finally:
        for node in work.opened:
            node.close()
    assert not work.changed and not work.initiated and looks
    done(replica_set(nodes[2], nodes), False)


def test_five_members(mongo_lab: Lab) -> None:
    nodes = [mongo_lab.node() for _node in range(5)]
    done(replica_set(nodes[0], nodes), True)
    user = {**login(nodes[1]), "name": "root", "password": PASSWORD, "roles": ["root"]}
    # The exception makes the first user on the primary only; sent elsewhere the primary refuses from outside, so ask there.
    primary = next(n for n in nodes if n.client().admin.command("hello")["isWritablePrimary"])
    done(run_mongo_module("mongodb_user", {**user, "login_port": primary.port}), True)
    weighted = [{"host": n.host, "priority": 5 - i} for i, n in enumerate(nodes)]
    done(replica_set(nodes[4], weighted), True)
    done(replica_set(nodes[4], weighted[:3]), True)
    done(replica_set(nodes[0], weighted[:3]), False)


def test_user(three: list[Node]) -> None:
    primary = next(n for n in three if n.host == info(three[0])["primary"])
    other = next(n for n in three if n is not primary)
    base = {
        **login(other),
        "name": "fastgpt",
        "password": "app-password-1",
        "roles": [{"role": "readWrite", "db": "fastgpt"}],
    }
    done(run_mongo_module("mongodb_user", base, check=True), True)
    made = done(run_mongo_module("mongodb_user", base), True)
    assert made["password_changed"] and "app-password" not in made["_raw"]
    done(run_mongo_module("mongodb_user", base), False)
    done(run_mongo_module("mongodb_user", base, check=True), False)
    with primary.client("fastgpt", "app-password-1") as client:
        client.fastgpt.x.insert_one({})

    more = {**base, "roles": [{"role": "dbAdmin", "db": "fastgpt"}, {"role": "readWrite", "db": "fastgpt"}]}
    changed = done(run_mongo_module("mongodb_user", more), True)
    assert not changed["password_changed"] and len(changed["diff"]["after"]["roles"]) == 2
    done(run_mongo_module("mongodb_user", {**more, "roles": list(reversed(more["roles"]))}), False)
    rotated = done(run_mongo_module("mongodb_user", {**more, "password": "app-password-2"}), True)
    assert rotated["password_changed"] and rotated["diff"]["after"]["password"] == "(set)"
    done(run_mongo_module("mongodb_user", {**more, "update_password": "on_create"}), False)
    assert "roles[0]" in failed(run_mongo_module("mongodb_user", {**more, "roles": [{"role": "x"}]}))
    assert "no-such-role" in failed(run_mongo_module("mongodb_user", {**more, "roles": ["no-such-role"]}))
    absent = {**login(other), "name": "fastgpt", "state": "absent"}
    done(run_mongo_module("mongodb_user", absent, check=True), True)
    done(run_mongo_module("mongodb_user", absent), True)
    done(run_mongo_module("mongodb_user", absent), False)


def test_user_of_a_set_that_check_mode_only_foresees(mongo_lab: Lab) -> None:
    node = mongo_lab.node_with_root()
    user = {**login(node), "name": "fastgpt", "password": "app-password-1", "roles": [{"role": "readWrite", "db": "fastgpt"}]}
    predicted = done(run_mongo_module("mongodb_user", user, check=True), True)
    done(run_mongo_module("mongodb_user", {**user, "name": "root", "password": PASSWORD, "roles": ["root"]}, check=True), False)
    done(run_mongo_module("mongodb_user", {**login(node), "name": "fastgpt", "state": "absent"}, check=True), False)
    assert "give a password" in failed(run_mongo_module("mongodb_user", {**login(node), "name": "fastgpt"}, check=True))
    # Only foreseen in check mode: in earnest there must be a primary.
    assert "Initiate the replica set" in failed(run_mongo_module("mongodb_user", {**user, "timeout": 2}))

    done(replica_set(node, [node]), True)
    made = done(run_mongo_module("mongodb_user", user), True)
    assert made["diff"] == predicted["diff"] and made["password_changed"] and predicted["password_changed"]


def test_missing_pymongo_is_named(tmp_path: t.Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pymongo.py").write_text("raise ImportError('gone')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    result = run_mongo_module("mongodb_replica_set", {"members": [{"host": "x"}]})
    assert result["failed"] and "pymongo" in result["msg"]


def test_tls(mongo_lab: Lab, tmp_path: pathlib.Path) -> None:
    ours, foreign = Authority(tmp_path, "ours"), Authority(tmp_path, "foreign")
    server = ours.issue("server", "IP:127.0.0.1")
    client = ours.issue("client", "DNS:operator", password="key-password")
    stranger = foreign.issue("stranger", "DNS:operator")
    options = ["--tlsMode", "requireTLS", "--tlsCertificateKeyFile", str(server), "--tlsCAFile", str(ours.certificate)]
    node = mongo_lab.node(extra=options)
    good = {
        "tls": True,
        "tls_ca_file": str(ours.certificate),
        "tls_certificate_key_file": str(client),
        "tls_certificate_key_password": "key-password",
    }
    not_pem = tmp_path / "not.pem"
    not_pem.write_text("nothing")
    for wrong, *texts in (
        ({"tls": False, "tls_ca_file": None, **dict.fromkeys(list(good)[2:])}, "asks for TLS", "Set tls: true"),
        ({"tls": False}, "tls_ca_file", "no use without TLS"),
        ({"tls_ca_file": None}, "certificate is refused", "tls_ca_file"),
        ({"tls_ca_file": str(foreign.certificate)}, "certificate is refused", "tls_ca_file"),
        ({"login_host": "localhost"}, "certificate is refused", "'localhost'", "Connect under a name"),
        (dict.fromkeys(list(good)[2:]), "asks for a client certificate", "tls_certificate_key_file"),
        ({"tls_certificate_key_file": str(stranger)}, "refuses the client certificate", "--tlsCAFile"),
        ({"tls_certificate_key_password": "wrong"}, "tls_certificate_key_password"),
        ({"tls_certificate_key_password": None}, "tls_certificate_key_password"),
        ({"tls_certificate_key_file": str(ours.certificate)}, "tls_certificate_key_file", "private key"),
        ({"tls_ca_file": str(not_pem)}, "holds no certificate"),
        ({"tls_ca_file": str(tmp_path / "missing.pem")}, "No such file", "on the target"),
    ):  # fmt: skip
        start = time.monotonic()
        text = failed(info(node, **{**good, **wrong}))
        # None of them waits for the time-out of 60 s: time does not heal them.
        assert time.monotonic() - start < 10
        assert all(part in text for part in texts), (wrong, text)
        assert "key-password" not in text
    members = [node, mongo_lab.node(extra=options)]
    made = done(replica_set(node, members[:1], **good), True)
    assert made["initiated"] and "key-password" not in made["_raw"]
    user = {**login(node), **good, "name": "root", "password": PASSWORD, "roles": ["root"]}
    done(run_mongo_module("mongodb_user", user), True)
    done(run_mongo_module("mongodb_user", user), False)
    done(replica_set(node, members, **good), True)
    done(replica_set(members[1], members, **good), False)
    state = info(node, **{**good, "login_host": "localhost", "tls_ca_file": str(foreign.certificate)}, validate_certs=False)
    assert state["state"] == "PRIMARY"

    plain = mongo_lab.node()
    text = failed(info(plain, **good))
    assert "speaks no TLS" in text and "tls: false" in text
    assert "speaks no TLS" in failed(replica_set(node, [*members, plain], **good))


def test_port_that_is_not_a_healthy_mongod(single: Node) -> None:
    def silent(link: socket.socket) -> None:
        link.recv(1)
        time.sleep(60)

    def web(link: socket.socket) -> None:
        link.recv(1000)
        link.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        link.close()

    def banner(link: socket.socket) -> None:
        link.sendall(b"SSH-2.0-x\r\n")
        time.sleep(60)

    def liar(link: socket.socket) -> None:
        # The head of an answer as MongoDB gives it, and rubbish for the rest.
        link.recv(1000)
        link.sendall(struct.pack("<iiii", 60, 1, 7, 1) + b"\xff" * 44)
        link.recv(1000)
        link.sendall(b"\xff" * 64)

    members = {"members": [{"host": "x"}]}
    for serve, name, more, *texts in (
        (silent, "mongodb_replica_set", members, "takes the connection, but does not answer within 1 s"),
        (web, "mongodb_replica_set_info", {}, "is not MongoDB", "HTTP/1.1 400", "Correct the port"),
        (banner, "mongodb_user", {"name": "x"}, "does not answer within 1 s"),
        (socket.socket.close, "mongodb_replica_set", members, "closes the connection without an answer"),
        (liar, "mongodb_user", {"name": "x"}, "No MongoDB answers"),
    ):  # fmt: skip
        with Port(serve) as port:
            start = time.monotonic()
            text = failed(run_mongo_module(name, {**login(single), "login_port": port.port, "timeout": 1, **more}))
            assert all(part in text for part in texts), (serve, text)
            assert time.monotonic() - start < 8, serve
    with Port(web) as port:
        assert "is not MongoDB" in failed(replica_set(single, [single, f"127.0.0.1:{port.port}"]))
    # A mongod that is frozen: the system takes the connection for it.
    single.pause()
    assert "does not answer within 1 s" in failed(info(single, timeout=1))


def test_lost_answers(mongo_lab: Lab) -> None:
    node = mongo_lab.node()

    def through(command: str, module: str, hang: bool = False, **params: t.Any) -> dict[str, t.Any]:
        with LosingProxy(node, command, hang) as proxy:
            result = run_mongo_module(module, {**login(node), "login_port": proxy.port, **params})
            assert proxy.lost, "the command was not sent"
            return result

    made = done(through("replSetInitiate", "mongodb_replica_set", members=[{"host": node.host}]), True)
    assert made["initiated"] and len(made["steps"]) == 1
    root = {"name": "root", "password": PASSWORD, "roles": ["root"]}
    done(through("createUser", "mongodb_user", **root), True)
    done(run_mongo_module("mongodb_user", {**login(node), **root}), False)
    done(replica_set(node, [node]), False)

    weighted = [{"host": node.host, "priority": 2}]
    version = config(node)["version"]
    changed = done(through("replSetReconfig", "mongodb_replica_set", members=weighted), True)
    assert changed["steps"] == [f"set priority of {node.host} from 1 to 2"]
    assert config(node)["version"] == version + 1
    done(replica_set(node, weighted), False)

    user = {"name": "app", "password": "app-password-1", "roles": ["read"]}
    made = done(through("createUser", "mongodb_user", **user), True)
    assert made["password_changed"] and made["diff"]["before"] == {} and made["diff"]["after"]["user"] == "app"
    changed = done(through("updateUser", "mongodb_user", **{**user, "roles": ["readWrite"]}), True)
    assert changed["diff"]["before"]["roles"] != changed["diff"]["after"]["roles"]
    done(through("dropUser", "mongodb_user", name="app", state="absent"), True)
    # An answer that never comes holds a run for little longer than its time-out.
    start = time.monotonic()
    text = failed(through("replSetGetConfig", "mongodb_replica_set_info", hang=True, timeout=2))
    assert "stopped answering" in text and time.monotonic() - start < 15


def test_member_with_another_keyfile(mongo_lab: Lab, single: Node) -> None:
    key = mongo_lab.root / "another-key"
    key.write_text("another" * 10)
    key.chmod(0o400)
    stranger = mongo_lab.node(start=False)
    stranger.keyfile = key
    stranger.start()
    result = replica_set(single, [single, stranger], timeout=4)
    assert result["failed"] and "same keyFile" in result["msg"] and "Authentication failed" in result["msg"], result
    done(replica_set(single, [single]), True)
    fresh = mongo_lab.node()
    assert "same keyFile" in failed(replica_set(fresh, [fresh, stranger], login_user=None, login_password=None))
    assert info(fresh)["state"] == "UNINITIATED"
