# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""From any valid set to any valid list of members: at most one vote per step, a majority and a possible primary all the way."""

from __future__ import annotations

import typing as t

import pytest

pytest.importorskip("hypothesis")

from ansible_collections.selfhosted.fastgpt.plugins.module_utils import _mongodb_plan as planning  # noqa: E402
from ansible_collections.selfhosted.fastgpt.plugins.module_utils._mongodb_plan import Member  # noqa: E402
from hypothesis import assume, given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

HOSTS = [f"m{i}:27017" for i in range(11)]
Doc = t.Dict[str, t.Any]


def electable(member: Member) -> bool:
    return member.votes == 1 and member.priority > 0 and not member.arbiter


@st.composite
def members(draw: st.DrawFn) -> list[Member]:
    result = []
    for host in draw(st.lists(st.sampled_from(HOSTS), unique=True, min_size=1, max_size=9)):
        kind = draw(st.sampled_from(["plain", "plain", "plain", "passive", "hidden", "voteless", "arbiter"]))
        if kind == "plain":
            result.append(Member(host, draw(st.sampled_from([0.5, 1.0, 2.0]))))
        else:
            result.append(Member(host, 0.0, 0 if kind == "voteless" else 1, kind == "hidden", kind == "arbiter"))
    assume(any(map(electable, result)) and sum(m.votes for m in result) <= planning.MAX_VOTERS)
    return result


def as_docs(views: list[Member]) -> list[Doc]:
    return [{"_id": i, "host": m.host, "priority": m.priority, "votes": m.votes, "hidden": m.hidden, "arbiterOnly": m.arbiter} for i, m in enumerate(views)]


@st.composite
def situations(draw: st.DrawFn) -> tuple[list[Doc], list[Member], dict[str, str], frozenset[str], str]:
    current, wanted = draw(members()), draw(members())
    kinds = {m.host: m.arbiter for m in current}
    assume(all(kinds.get(m.host, m.arbiter) == m.arbiter for m in wanted))
    targets = {m.host for m in wanted}
    old = [m for m in current if m.host not in targets]
    new = [m for m in wanted if m.host not in kinds]
    renames = {n.host: o.host for o, n in zip(old, new) if o.arbiter == n.arbiter and draw(st.booleans())}
    alive_primary = draw(st.sampled_from([m.host for m in current if electable(m)]))
    voters = [m for m in current if m.votes]
    mortal = [m.host for m in old if m.host != alive_primary and m.host not in renames.values()]
    dead = frozenset(draw(st.lists(st.sampled_from(mortal), unique=True))) if mortal else frozenset()
    assume(sum(m.host not in dead for m in voters) >= len(voters) // 2 + 1)
    return as_docs(current), wanted, renames, dead, alive_primary


def votes(docs: t.Iterable[Doc]) -> dict[int, int]:
    return {int(d["_id"]): int(d["votes"]) for d in docs if d["votes"]}


@given(situations())
def test_every_step_is_safe_and_the_last_one_is_what_was_asked_for(
    situation: tuple[list[Doc], list[Member], dict[str, str], frozenset[str], str],
) -> None:
    current, wanted, renames, dead, primary = situation
    try:
        steps = planning.plan(current, wanted, renames=renames, dead=dead, primary=primary)
    except planning.PlanError:
        # Only where the last possible primary would have to go from a set that is full.
        assert sum(m["votes"] for m in current) == planning.MAX_VOTERS
        return
    before = current
    for step in steps:
        views = [planning.member_of(d) for d in step.members]
        changed_votes = votes(before).items() ^ votes(step.members).items()
        assert len(changed_votes) <= 1, "two voting changes in one step"
        voters = [m for m in views if m.votes]
        alive = [m for m in voters if m.host not in dead]
        assert len(voters) <= planning.MAX_VOTERS
        assert len(alive) >= len(voters) // 2 + 1, "majority lost"
        assert any(map(electable, alive)), "nobody can be primary"
        assert len({m.host for m in views}) == len(views)
        assert len({d["_id"] for d in step.members}) == len(views)
        assert all(m.priority == 0 for m in views if m.hidden or not m.votes)
        arbiters = {d["_id"]: d.get("arbiterOnly", False) for d in before}
        assert all(arbiters.get(d["_id"], d.get("arbiterOnly", False)) == d.get("arbiterOnly", False) for d in step.members)
        before = step.members
    assert not planning.differences(before, wanted)
    assert planning.plan(before, wanted, primary=primary) == []


@given(situations())
def test_planning_again_after_each_step_arrives_too(
    situation: tuple[list[Doc], list[Member], dict[str, str], frozenset[str], str],
) -> None:
    """As the module does it: after each step it reads the set and plans anew."""
    docs, wanted, renames, dead, primary = situation
    try:
        for _round in range(60):
            steps = planning.plan(docs, wanted, renames=renames, dead=dead, primary=primary)
            if not steps:
                break
            docs = steps[0].members
    except planning.PlanError:
        return
    assert not planning.differences(docs, wanted)
