# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Steps of a reconfiguration: whatever is asked, every step on the way is one that the set survives."""

from __future__ import annotations

import typing as t

import pytest
from ansible_collections.selfhosted.fastgpt.plugins.module_utils import _mongodb_plan as planning
from ansible_collections.selfhosted.fastgpt.plugins.module_utils._mongodb_plan import Member

Doc = t.Dict[str, t.Any]


def docs(*members: Member) -> list[Doc]:
    return [{"_id": i, "tags": {"n": str(i)}, **_fields(m)} for i, m in enumerate(members)]


def _fields(member: Member) -> Doc:
    return {
        "host": member.host,
        "priority": member.priority,
        "votes": member.votes,
        "hidden": member.hidden,
        "arbiterOnly": member.arbiter,
        "secondaryDelaySecs": 0,
    }


def member(name: str, **fields: t.Any) -> Member:
    return Member(f"{name}:27017", **fields)


def texts(steps: list[planning.Step]) -> list[str]:
    return [step.text for step in steps]


def test_nothing_to_do_whatever_the_order() -> None:
    a, b = member("a"), member("b", priority=0.0, hidden=True)
    assert planning.plan(docs(a, b), [b, a]) == []
    assert not planning.differences(docs(a, b), [b, a])


def test_growth_gives_votes_one_by_one_after_all_have_joined() -> None:
    a, b, c = member("a"), member("b"), member("c", priority=2.0)
    steps = planning.plan(docs(a), [a, b, c])
    assert [s.kind for s in steps] == ["add", "add", "vote", "vote"]
    assert [m["votes"] for m in steps[1].members] == [1, 0, 0]
    assert steps[-1].members[2]["priority"] == 2.0


def test_ids_are_not_used_again() -> None:
    current = docs(member("a"), member("b"))
    current[1]["_id"] = 7
    steps = planning.plan(current, [member("a"), member("c")])
    assert steps[0].members[-1]["_id"] == 8


def test_rename_changes_the_host_only() -> None:
    current = docs(member("old"), member("b"))
    steps = planning.plan(current, [member("new"), member("b")], renames={"new:27017": "old:27017"})
    assert texts(steps) == ["change the host of member 0 from old:27017 to new:27017"]
    assert steps[0].members == [{**current[0], "host": "new:27017"}, current[1]]


def test_rename_of_a_host_that_stays_is_no_rename() -> None:
    current = docs(member("a"))
    steps = planning.plan(current, [member("a"), member("b")], renames={"b:27017": "a:27017"})
    assert [s.kind for s in steps] == ["add", "vote"]


def test_dead_member_is_removed_before_others_join() -> None:
    a, b, c, d = (member(n) for n in "abcd")
    steps = planning.plan(docs(a, b, c), [a, b, d], dead={"c:27017"})
    assert texts(steps) == [
        "add d:27017 as member 3 without a vote",
        "remove c:27017",
        "give d:27017 its vote, priority 1",
    ]


def test_primary_leaves_last() -> None:
    a, b, c = (member(n) for n in "abc")
    steps = planning.plan(docs(a, b, c), [member("d")], primary="a:27017")
    assert texts(steps)[-1] == "remove a:27017"


def test_a_new_primary_is_possible_before_the_old_one_is_demoted() -> None:
    a, b = member("a"), member("b", priority=0.0)
    steps = planning.plan(docs(a, b), [member("a", priority=0.0), member("b", priority=1.0)])
    assert texts(steps) == ["set priority of b:27017 from 0 to 1", "set priority of a:27017 from 1 to 0"]


def test_other_fields_of_a_member_are_kept() -> None:
    current = docs(member("a"), member("b"))
    steps = planning.plan(current, [member("a", priority=5.0), member("b")])
    assert steps[0].members[0] == {**current[0], "priority": 5.0}


def test_arbiter_is_one_step_and_cannot_be_converted() -> None:
    a, b, c = member("a"), member("b"), member("c", priority=0.0, arbiter=True)
    steps = planning.plan(docs(a, b), [a, b, c])
    assert texts(steps) == ["add arbiter c:27017 as member 2"]
    assert not planning.differences(steps[0].members, [a, b, c])
    with pytest.raises(planning.PlanError, match="cannot become a data member in place"):
        planning.plan(docs(a, b, c), [a, b, member("c")])


def test_old_priority_of_an_arbiter_is_no_difference() -> None:
    current = docs(member("a"), member("c", arbiter=True, priority=1.0))
    assert not planning.differences(current, [member("a"), member("c", arbiter=True, priority=0.0)])


def test_a_full_set_of_voters_changes_one_for_one() -> None:
    current = [member(n) for n in "abcdefg"]
    steps = planning.plan(docs(*current), [*current[:6], member("h")])
    assert [s.kind for s in steps] == ["add", "remove", "vote"]


@pytest.mark.parametrize(
    ("views", "majority"),
    [
        ([member("a")], True),
        ([member("a"), member("b"), member("c")], True),
        ([member("a"), member("b"), member("x", arbiter=True, priority=0.0)], False),
        ([member("a"), member("b"), member("c"), member("d"), member("x", arbiter=True, priority=0.0)], True),
        ([member("a"), member("b"), member("c"), member("x", arbiter=True, priority=0.0)], False),
    ],
)
def test_implied_write_concern(views: list[Member], majority: bool) -> None:
    assert planning.implicit_majority(docs(*views)) is majority


@pytest.mark.parametrize(
    ("given", "host"),
    [("A", "a:27017"), ("db.example.org:1", "db.example.org:1"), ("[::1]:27018", "[::1]:27018"), ("[fe80::1]", "[fe80::1]:27017")],
)
def test_hosts(given: str, host: str) -> None:
    assert planning.normalise_host(given) == host


@pytest.mark.parametrize("bad", ["", " ", "a b", "a:", "a:0", "a:70000", "a:x", "::1", "[::1", "mongodb://a", "a,b", ":27017"])
def test_bad_hosts(bad: str) -> None:
    with pytest.raises(ValueError, match="must be|must stand"):
        planning.normalise_host(bad)


def test_all_faults_of_the_list_at_once() -> None:
    items = [
        {"host": "a"},
        {"host": "A:27017"},
        {"host": "no good"},
        {"host": "b", "priority": 2000},
        {"host": "c", "arbiter": True, "hidden": True},
        {"host": "d", "votes": 0, "priority": 1},
    ]
    _members, faults = planning.wanted_members(items)
    assert len(faults) == 5
    assert planning.wanted_members([])[1]
    assert "seven" not in "".join(planning.wanted_members([{"host": f"m{i}"} for i in range(8)])[1])
    assert "8 voting members" in planning.wanted_members([{"host": f"m{i}"} for i in range(8)])[1][0]
    assert "none can become primary" in planning.wanted_members([{"host": "a", "priority": 0}])[1][0]
    assert "loopback" in planning.wanted_members([{"host": "localhost"}, {"host": "a"}])[1][0]
    assert planning.wanted_members([{"host": "a"}, {"host": "b", "hidden": True}]) == (
        [member("a"), member("b", priority=0.0, hidden=True)],
        [],
    )


def test_recovery_of_a_single_member() -> None:
    assert [d["host"] for d in planning.recovery_members(docs(member("old")), [member("new")], "new:27017", [])] == ["new:27017"]


def test_recovery_takes_known_servers_only_and_stays_electable() -> None:
    current = docs(member("a", priority=0.0), member("b"), member("c"))
    wanted = [member("x"), member("y"), member("z")]
    found = planning.recovery_members(current, wanted, "x:27017", ["z:27017"])
    assert {d["host"] for d in found} == {"x:27017", "z:27017"}
    own = next(d for d in found if d["host"] == "x:27017")
    assert own["priority"] > 0 and own["votes"] == 1
    alone = planning.recovery_members(docs(member("a", priority=0.0)), [member("x")], "x:27017", [])
    assert alone[0]["priority"] == 1
