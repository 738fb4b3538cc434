# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# PRIVATE: for the modules of this collection only; it may change in any release.
"""From the members that a replica set has to those that it should have: pure functions, no server is asked."""

from __future__ import annotations

import dataclasses
import typing as t

MAX_MEMBERS = 50
MAX_VOTERS = 7
DEFAULT_PORT = 27017

MemberDoc = dict[str, t.Any]


class PlanError(Exception):
    """The wanted members cannot be reached from the present ones by safe steps."""


@dataclasses.dataclass(frozen=True)
class Member:
    """What is managed of a member. All other fields of its document (tags, delay, horizons) are kept as they are."""

    host: str
    priority: float = 1.0
    votes: int = 1
    hidden: bool = False
    arbiter: bool = False

    def as_dict(self) -> dict[str, t.Any]:
        result = dataclasses.asdict(self)
        result["priority"] = int(self.priority) if self.priority == int(self.priority) else self.priority
        return result


@dataclasses.dataclass(frozen=True)
class Step:
    """One replSetReconfig: `members` is the whole list after it. At most one member gains or loses its vote."""

    kind: str  # rename, raise, add, vote, unvote, remove, settings
    host: str
    text: str
    members: list[MemberDoc]


def normalise_host(host: str) -> str:
    """Return host:port with a lower-case name; raise ValueError with the rule that is broken."""
    text = host.strip()
    if not text or any(c.isspace() for c in text) or "/" in text or "@" in text or "," in text:
        raise ValueError("must be one <name or address>:<port>")
    if text.startswith("["):
        name, closed, rest = text.partition("]")
        name = name + closed
        if not closed or (rest and not rest.startswith(":")):
            raise ValueError("must be [<IPv6 address>]:<port>")
        port_text = rest[1:] if rest else str(DEFAULT_PORT)
    elif text.count(":") > 1:
        raise ValueError("an IPv6 address must stand in brackets: [<address>]:<port>")
    else:
        name, _colon, port_text = text.partition(":")
        port_text = port_text if _colon else str(DEFAULT_PORT)
    if not name or not port_text.isdigit() or not 0 < int(port_text) < 65536:
        raise ValueError("must be <name or address>:<port> with a port from 1 to 65535")
    return f"{name.lower()}:{int(port_text)}"


def is_loopback(host: str) -> bool:
    name = host.rpartition(":")[0].strip("[]")
    return name == "localhost" or name.startswith("127.") or name == "::1"


def wanted_members(items: t.Sequence[t.Mapping[str, t.Any]]) -> tuple[list[Member], list[str]]:
    """Read the `members` option. Returns the members and all faults found."""
    faults: list[str] = []
    members: list[Member] = []
    for index, item in enumerate(items):
        label = f"members[{index}]"
        try:
            host = normalise_host(str(item.get("host") or ""))
        except ValueError as exc:
            faults.append(f"{label}.host: {item.get('host')!r}: {exc}.")
            continue
        label = f"{label} ({host})"
        arbiter = bool(item.get("arbiter"))
        hidden = bool(item.get("hidden"))
        votes = 1 if item.get("votes") is None else int(item["votes"])
        idle = arbiter or hidden or votes == 0
        priority = (0.0 if idle else 1.0) if item.get("priority") is None else float(item["priority"])
        if votes not in (0, 1):
            faults.append(f"{label}: votes is {votes}: a member has 0 or 1 vote.")
        if not 0 <= priority <= 1000:
            faults.append(f"{label}: priority is {priority:g}: it must be 0 to 1000.")
        if arbiter and (hidden or votes == 0):
            faults.append(f"{label}: an arbiter has one vote and cannot be hidden.")
        if priority > 0 and idle:
            what = "an arbiter" if arbiter else "a hidden member" if hidden else "a member without a vote"
            faults.append(f"{label}: priority is {priority:g}: {what} must have priority 0 (or leave priority out).")
        if any(host == other.host for other in members):
            faults.append(f"{label}: the host is listed twice.")
        members.append(Member(host, priority, votes, hidden, arbiter))
    if faults:
        return members, faults
    if not members:
        faults.append("members: the list is empty: name at least one member as <name or address>:<port>.")
        return members, faults
    voters = sum(m.votes for m in members)
    if len(members) > MAX_MEMBERS:
        faults.append(f"members: {len(members)} members: MongoDB allows {MAX_MEMBERS}.")
    if voters > MAX_VOTERS:
        faults.append(f"members: {voters} voting members: MongoDB allows {MAX_VOTERS}; give the others votes 0.")
    if not any(m.priority > 0 and m.votes and not m.arbiter for m in members):
        faults.append("members: none can become primary: at least one data member needs a vote and a priority above 0.")
    if len({is_loopback(m.host) for m in members}) == 2:
        faults.append(
            "members: some hosts are loopback addresses and some are not: MongoDB takes all or none; use the addresses "
            "under which the members reach each other."
        )
    return members, faults


def member_of(doc: t.Mapping[str, t.Any]) -> Member:
    """The managed view of a member's document from the server."""
    arbiter = bool(doc.get("arbiterOnly", False))
    return Member(
        host=normalise_host(str(doc["host"])),
        # Old servers store priority 1 for an arbiter; it means nothing.
        priority=0.0 if arbiter else float(doc.get("priority", 1)),
        votes=int(doc.get("votes", 1)),
        hidden=bool(doc.get("hidden", False)),
        arbiter=arbiter,
    )


def differences(current: t.Sequence[MemberDoc], wanted: t.Sequence[Member]) -> bool:
    return {m.host: m for m in map(member_of, current)} != {m.host: m for m in wanted}


def implicit_majority(members: t.Sequence[MemberDoc]) -> bool:
    """Whether MongoDB 5.0 and later takes w:majority as implicit default write concern (else w:1)."""
    views = [member_of(m) for m in members]
    voters = sum(m.votes for m in views)
    data_voters = sum(m.votes for m in views if not m.arbiter)
    return not any(m.arbiter for m in views) or data_voters > voters // 2 + 1


def initial_config(name: str, wanted: t.Sequence[Member]) -> dict[str, t.Any]:
    return {"_id": name, "members": [_document(index, member) for index, member in enumerate(wanted)]}


def plan(
    current: t.Sequence[MemberDoc],
    wanted: t.Sequence[Member],
    *,
    renames: t.Mapping[str, str] | None = None,
    dead: t.Collection[str] = (),
    primary: str | None = None,
) -> list[Step]:
    """Steps from `current` to `wanted`.

    `renames` says which new host is which old one (the same server under a new address). `dead` are hosts that do not
    answer. `primary` is taken out last. Planning again after each step continues the same way, so a run that was
    broken off is simply started again.
    """
    planner = _Planner(current, wanted, renames or {}, frozenset(dead), primary)
    planner.run()
    return planner.steps


def _document(member_id: int, member: Member) -> MemberDoc:
    doc: MemberDoc = {"_id": member_id, "host": member.host, "priority": member.priority, "votes": member.votes}
    if member.hidden:
        doc["hidden"] = True
    if member.arbiter:
        doc["arbiterOnly"] = True
    return doc


def _number(value: float) -> str:
    return f"{value:g}"


class _Planner:
    def __init__(
        self,
        current: t.Sequence[MemberDoc],
        wanted: t.Sequence[Member],
        renames: t.Mapping[str, str],
        dead: frozenset[str],
        primary: str | None,
    ) -> None:
        self.docs: list[MemberDoc] = [dict(doc) for doc in current]
        self.wanted = list(wanted)
        self.target = {m.host: m for m in wanted}
        self.renames = renames
        self.dead = dead
        self.primary = primary
        self.steps: list[Step] = []

    # the state so far

    def views(self) -> list[Member]:
        return [member_of(doc) for doc in self.docs]

    def doc_of(self, host: str) -> MemberDoc | None:
        return next((doc for doc in self.docs if member_of(doc).host == host), None)

    def voters(self) -> int:
        return sum(m.votes for m in self.views())

    def emit(self, kind: str, host: str, text: str) -> None:
        self.steps.append(Step(kind, host, text, [dict(doc) for doc in self.docs]))

    def new_id(self) -> int:
        used = {int(doc["_id"]) for doc in self.docs}
        candidate = max(used, default=-1) + 1
        return candidate if candidate <= 255 else next(i for i in range(256) if i not in used)

    # the order of the steps

    def run(self) -> None:
        self.rename()
        for view in self.views():
            wanted = self.target.get(view.host)
            if wanted is not None and wanted.arbiter != view.arbiter:
                was, becomes = ("an arbiter", "a data member") if view.arbiter else ("a data member", "an arbiter")
                raise PlanError(
                    f"{view.host} is {was} and cannot become {becomes} in place: take it out of the list, run, empty its data directory, then add it again."
                )
        self.raise_priorities()
        self.votes()
        self.drop_idle()
        self.settings()

    def rename(self) -> None:
        for new, old in self.renames.items():
            doc = self.doc_of(old)
            if doc is None or old in self.target or new not in self.target or self.doc_of(new) is not None:
                continue
            doc["host"] = new
            if self.primary == old:
                self.primary = new
            self.emit("rename", new, f"change the host of member {doc['_id']} from {old} to {new}")

    def raise_priorities(self) -> None:
        """Whoever may become primary from now on gets it before somebody else loses it."""
        changed: list[str] = []
        for view in self.views():
            wanted = self.target.get(view.host)
            if wanted and view.votes == 1 and wanted.votes == 1 and view.priority == 0 and wanted.priority > 0:
                self.apply(wanted)
                changed.append(f"priority of {view.host} from 0 to {_number(wanted.priority)}")
        if changed:
            self.emit("raise", "", "set " + ", ".join(changed))

    def apply(self, wanted: Member) -> None:
        doc = self.doc_of(wanted.host)
        if doc is None:
            raise PlanError(f"{wanted.host} is not in the configuration that was to be changed. Run again; report it if it comes again.")
        doc["votes"] = wanted.votes
        doc["hidden"] = wanted.hidden
        if not wanted.arbiter:
            doc["priority"] = wanted.priority

    def votes(self) -> None:
        """Add before removing, except for members that are dead and where the set is full."""
        self.add_members()
        while True:
            views = {m.host: m for m in self.views()}
            up = [m for m in self.wanted if m.votes == 1 and (m.host not in views or views[m.host].votes == 0)]
            down = [m for m in views.values() if m.votes == 1 and (m.host not in self.target or self.target[m.host].votes == 0)]
            if not up and not down:
                return
            dead_down = [m for m in down if m.host in self.dead]
            if dead_down and self.try_down(dead_down):
                continue
            if up and self.voters() < MAX_VOTERS:
                self.give_vote(up[0], up[0].host not in views)
                continue
            if down and self.try_down(down):
                continue
            raise PlanError(
                "the set cannot be changed step by step without losing its only possible primary: give another member"
                " that stays a priority above 0 first, then run again."
            )

    def add_members(self) -> None:
        """Data members join without a vote, so that the first synchronisation never counts against the majority."""
        hosts = {m.host for m in self.views()}
        for member in self.wanted:
            if member.host in hosts or member.arbiter:
                continue
            if len(self.docs) >= MAX_MEMBERS:
                gone = next((m for m in self.views() if m.votes == 0 and m.host not in self.target), None)
                if gone is None:
                    raise PlanError(f"the set has {MAX_MEMBERS} members: remove some in a run of its own before others are added.")
                self.remove(gone)
            doc = _document(self.new_id(), dataclasses.replace(member, votes=0, priority=0.0))
            self.docs.append(doc)
            self.emit("add", member.host, f"add {member.host} as member {doc['_id']} without a vote")

    def give_vote(self, member: Member, new: bool) -> None:
        if new:
            doc = _document(self.new_id(), member)
            self.docs.append(doc)
            self.emit("vote", member.host, f"add arbiter {member.host} as member {doc['_id']}")
            return
        self.apply(member)
        self.emit("vote", member.host, f"give {member.host} its vote, priority {_number(member.priority)}")

    def try_down(self, candidates: list[Member]) -> bool:
        """Take the vote of the first candidate without which the set still works; the primary comes last."""
        order = sorted(
            candidates,
            key=lambda m: (m.host not in self.dead, m.host == self.primary, not m.arbiter, m.priority > 0, m.host),
        )
        for member in order:
            rest = [m for m in self.views() if m.host != member.host and m.votes == 1]
            alive = [m for m in rest if m.host not in self.dead]
            if len(alive) >= len(rest) // 2 + 1 and any(m.priority > 0 and not m.arbiter for m in alive):
                if member.host in self.target:
                    self.apply(self.target[member.host])
                    self.emit("unvote", member.host, f"take the vote of {member.host}")
                else:
                    self.remove(member)
                return True
        return False

    def remove(self, member: Member) -> None:
        self.docs = [doc for doc in self.docs if member_of(doc).host != member.host]
        self.emit("remove", member.host, f"remove {'arbiter ' if member.arbiter else ''}{member.host}")

    def drop_idle(self) -> None:
        for view in self.views():
            if view.host not in self.target:
                self.remove(view)

    def settings(self) -> None:
        changed: list[str] = []
        for view in self.views():
            wanted = self.target[view.host]
            if view == wanted:
                continue
            if view.priority != wanted.priority:
                changed.append(f"priority of {view.host} from {_number(view.priority)} to {_number(wanted.priority)}")
            if view.hidden != wanted.hidden:
                changed.append(f"hidden of {view.host} to {str(wanted.hidden).lower()}")
            self.apply(wanted)
        if changed:
            self.emit("settings", "", "set " + ", ".join(changed))


def recovery_members(current: t.Sequence[MemberDoc], wanted: t.Sequence[Member], own_host: str, same_set: t.Collection[str]) -> list[MemberDoc]:
    """Members for a forced reconfiguration of servers that no longer find themselves in their own configuration.

    Only servers known to hold this set's data take part: `own_host`, those of `same_set`, and members whose host still
    stands. Documents keep their ids; what else differs is converged afterwards by ordinary steps.
    """
    docs = [dict(doc) for doc in current]
    target = {m.host: m for m in wanted}
    known = {own_host, *same_set}
    kept = [doc for doc in docs if member_of(doc).host in target and member_of(doc).host in known]
    free = [doc for doc in docs if not any(doc is k for k in kept) and not member_of(doc).arbiter]
    # An electable document for ourselves, so that the set has a primary again.
    free.sort(key=lambda doc: (member_of(doc).priority == 0 or member_of(doc).votes == 0, int(doc["_id"])))
    taken = {member_of(doc).host for doc in kept}
    for host in [own_host, *(m.host for m in wanted if m.host in known and m.host != own_host)]:
        if host in taken or (host in target and target[host].arbiter):
            continue
        if not free:
            break
        doc = free.pop(0)
        doc["host"] = host
        kept.append(doc)
        taken.add(host)
    if not any(member_of(d).priority > 0 and member_of(d).votes for d in kept):
        for doc in kept:
            if member_of(doc).host == own_host:
                doc.update(priority=1, votes=1, hidden=False)
    return sorted(kept, key=lambda doc: int(doc["_id"]))
