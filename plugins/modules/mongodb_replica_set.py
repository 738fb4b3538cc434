#!/usr/bin/python

# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: mongodb_replica_set
short_description: Initiate a MongoDB replica set and keep its members as declared
version_added: 1.0.0
author:
  - selfhosted.fastgpt contributors (@selfhosted)
description:
  - Initiates a replica set of one or more members, by a root user that exists already or through the localhost exception.
  - Brings an existing set to the declared members, hosts, priorities, votes, hidden members and arbiters. Each step is one
    C(replSetReconfig) in which at most one member gains or loses its vote; between two steps the set must be healthy and
    take a majority write. Data members join without a vote and get it when they have synchronised.
  - A member whose address changed is recognised as the same server, and only its host is changed.
  - Returns when a primary takes writes that a majority acknowledges.
  - A run that was broken off is started again; it continues from where the set stands.
extends_documentation_fragment:
  - selfhosted.fastgpt._mongodb
  - selfhosted.fastgpt._attributes
  - selfhosted.fastgpt._attributes.action_group
attributes:
  check_mode:
    support: full
    details:
      - The steps are predicted. Nothing is written, so the majority write is left out. Nothing is waited for longer than 10
        seconds.
  diff_mode:
    support: full
  idempotent:
    support: full
options:
  name:
    description:
      - Name of the replica set, the same as the servers' C(--replSet).
    type: str
    default: rs0
  members:
    description:
      - All members that the set should have. A member that is not listed is removed.
    type: list
    elements: dict
    required: true
    suboptions:
      host:
        description:
          - Name or address and port under which B(all) members and all clients reach this member. Port 27017 if left out.
        type: str
        required: true
      priority:
        description:
          - 0 to 1000; a member with 0 never becomes primary.
          - V(1), or V(0) for an arbiter, a hidden member or a member without a vote, if left out.
        type: float
      votes:
        description:
          - Votes in elections. A set has at most seven voting members.
        type: int
        choices: [0, 1]
        default: 1
      hidden:
        description:
          - Hide the member from clients.
        type: bool
        default: false
      arbiter:
        description:
          - The member votes and holds no data. With one data member down, a set of two data members and an arbiter
            acknowledges no majority writes. Prefer three data members.
        type: bool
        default: false
  force_recovery:
    description:
      - Allow a B(forced) reconfiguration, and only where it is the one way out - the server that the module connects to no
        longer finds itself in its own configuration (state C(REMOVED), since its address changed while the old name did not
        resolve any more), and no other member of the set has a primary.
      - On a set of several members it may roll back writes that a majority had acknowledged.
    type: bool
    default: false
  default_write_concern:
    description:
      - Adding or removing an arbiter can change the default write concern that MongoDB 5.0 and later imply, which the server
        refuses as long as none is set. This is the one to set just before such a step.
      - With V(auto) it is what the server would imply after the step - V(1) or V(majority).
      - It is not touched otherwise, and never when the cluster has one set.
    type: str
    choices: [auto, '1', majority]
    default: auto
notes:
  - With O(login_password_previous) given, a server that still has the previous password gets the new one on the primary. This
    is the rotation of the password and counts as a change.
seealso:
  - module: selfhosted.fastgpt.mongodb_replica_set_info
  - module: selfhosted.fastgpt.mongodb_user
"""

EXAMPLES = r"""
- name: Make a set of one member, whose root user the image has made
  selfhosted.fastgpt.mongodb_replica_set:
    login_host: 192.0.2.11
    login_user: root
    login_password: "{{ mongodb_root_password }}"
    name: rs0
    members:
      - host: 192.0.2.11:27017

- name: Make three members of it, and rotate the root password
  selfhosted.fastgpt.mongodb_replica_set:
    login_host: 192.0.2.11
    login_user: root
    login_password: "{{ mongodb_root_password }}"
    login_password_previous: "{{ mongodb_root_password_previous }}"
    members:
      - host: db1.example.org:27017
        priority: 2
      - host: db2.example.org:27017
      - host: db3.example.org:27017
    timeout: 600
  run_once: true

- name: Two data members and an arbiter, which ask for TLS and a client certificate
  selfhosted.fastgpt.mongodb_replica_set:
    login_host: db1.example.org
    login_user: root
    login_password: "{{ mongodb_root_password }}"
    tls: true
    tls_ca_file: /etc/ssl/mongodb/ca.pem
    tls_certificate_key_file: /etc/ssl/mongodb/operator.pem
    members:
      - host: db1.example.org:27017
      - host: db2.example.org:27017
      - host: witness.example.org:27017
        arbiter: true
    default_write_concern: "1"

- name: Bring back a single server whose host name changed
  selfhosted.fastgpt.mongodb_replica_set:
    login_user: root
    login_password: "{{ mongodb_root_password }}"
    members:
      - host: new-name.example.org:27017
    force_recovery: true
"""

RETURN = r"""
name:
  description: Name of the set.
  returned: success
  type: str
  sample: rs0
primary:
  description: Host of the primary. Empty in check mode where there is none yet.
  returned: success
  type: str
  sample: 192.0.2.11:27017
members:
  description: The managed settings of all members after the run; in check mode those that a run would make.
  returned: success
  type: list
  elements: dict
  sample: [{"host": "192.0.2.11:27017", "priority": 1, "votes": 1, "hidden": false, "arbiter": false}]
steps:
  description: What was done, or in check mode would be done, in order. Empty if nothing.
  returned: always
  type: list
  elements: str
  sample: ["add 192.0.2.12:27017 as member 1 without a vote", "give 192.0.2.12:27017 its vote, priority 1"]
initiated:
  description: Whether this run initiated the set.
  returned: success
  type: bool
password_rotated:
  description: Whether the password of O(login_user) was changed from the previous one.
  returned: success
  type: bool
majority_write_ms:
  description: Milliseconds that the closing majority write took. Absent in check mode and before the first user exists.
  returned: when written
  type: int
"""

import time
import typing as t

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.selfhosted.fastgpt.plugins.module_utils import _mongodb as m
from ansible_collections.selfhosted.fastgpt.plugins.module_utils import _mongodb_plan as planning

# Readings that a converged set never needs more than once; a change replans after each step.
MAX_STEPS = 400
# What a server says of another one that has a different keyFile.
SAME_KEY = "Authentication failed"


class InTheMaking(m.MongoFault):
    """The very set that is wanted stands in the configuration of `host`, which is not in it yet."""

    def __init__(self, message: str, host: str) -> None:
        super().__init__(message)
        self.host = host


class ReplicaSet:
    def __init__(self, module: AnsibleModule, settings: m.Settings, wanted: list[planning.Member]) -> None:
        self.module = module
        self.settings = settings
        self.wanted = wanted
        self.hosts = [member.host for member in wanted]
        self.name: str = module.params["name"]
        self.check: bool = module.check_mode
        self.patience = min(10.0, float(settings.timeout)) if self.check else float(settings.timeout)
        self.steps: list[str] = []
        self.changed = False
        self.initiated = False
        self.rotated = False
        self.before: list[dict[str, t.Any]] | None = None
        self.after: list[dict[str, t.Any]] = [member.as_dict() for member in wanted]
        self.primary_host = ""
        self.write_ms: int | None = None
        self.opened: list[m.Node] = []
        # A step whose answer was lost: the next reading of the configuration tells whether it was taken.
        self.unsure: planning.Step | None = None

    # the way through

    def did(self, text: str) -> None:
        self.steps.append(text)
        self.changed = True

    def run(self) -> None:
        try:
            access = self.keep(m.open_login(self.settings, self.patience))
            if access.hello.get("arbiterOnly"):
                access = self.away_from_arbiter(access.hello.get("hosts", []))
        except m.ArbiterFault as exc:
            access = self.away_from_arbiter(exc.hosts)
        self.check_kind(access)
        if access.by == "open" and self.settings.user is not None:
            self.module.warn(f"MongoDB at {self.settings.address} does not ask for a log-in: start it with a keyFile or with --auth.")
        try:
            state = access.node.status()
        except m.Refused as exc:
            if exc.code == m.NOT_YET_INITIALIZED:
                self.on_fresh(access)
            elif exc.code == m.INVALID_CONFIG:
                self.on_removed(access)
            elif exc.code == m.NO_REPLICATION_ENABLED:
                raise m.MongoFault(self.no_replset()) from None
            else:
                raise
            return
        if state["set"] != self.name:
            raise m.MongoFault(
                f"MongoDB at {self.settings.address} belongs to the replica set {state['set']!r}, not {self.name!r}."
                f" The name of a set cannot be changed: set name to {state['set']}, or connect to another server."
            )
        self.converge(access)

    def keep(self, access: m.Access) -> m.Access:
        self.opened.append(access.node)
        return access

    def no_replset(self) -> str:
        return f"MongoDB at {self.settings.address} runs without replication: start it with --replSet {self.name} (its data stays), then run again."

    def running_name(self, node: m.Node) -> str:
        """The set's name on the server's command line; empty where we may not ask."""
        try:
            options = node.command("getCmdLineOpts")["parsed"].get("replication", {})
        except m.Refused:
            return ""
        return str(options.get("replSetName") or options.get("replSet") or "").split("/", maxsplit=1)[0]

    def check_kind(self, access: m.Access) -> None:
        if access.hello.get("msg") == "isdbgrid":
            raise m.MongoFault(f"{self.settings.address} is a mongos router: connect to a mongod of the replica set instead.")
        if "setName" not in access.hello and not access.hello.get("isreplicaset"):
            raise m.MongoFault(self.no_replset())

    def away_from_arbiter(self, hosts: t.Iterable[str]) -> m.Access:
        for host in hosts:
            try:
                return self.keep(m.open_node(self.settings, host))
            except (m.Unreachable, m.Refused):
                continue
        raise m.MongoFault(
            f"{self.settings.address} is an arbiter, which knows no users, and no data member of its set answers from here: connect to a data member."
        )

    # not initiated

    def on_fresh(self, access: m.Access) -> None:
        """No configuration on the server that we connect to: initiate, unless its set lives on the other members."""
        peers = self.peers(access, self.hosts)
        living = [p for p in peers if p.set_name]
        for peer in living:
            if peer.set_name != self.name:
                raise m.MongoFault(
                    f"members: {peer.host} belongs to the replica set {peer.set_name!r}, not {self.name!r}: take it out"
                    " of the list, or remove it from that set and empty its data directory first."
                )
        if living:
            self.join(access, living[0], peers)
            return
        self.refuse_unreachable(peers)
        own = next((p.host for p in peers if p.own), None)
        try:
            self.refuse_data([p for p in peers if not p.own], None)
        except InTheMaking as exc:
            # Another run initiates the set at this very moment: its server has the configuration, but does not name the set yet.
            if not self.set_appears([exc.host], self.patience):
                raise
            self.on_fresh(access)
            return
        running = self.running_name(access.node)
        if running and running != self.name:
            raise m.MongoFault(f"MongoDB at {self.settings.address} was started with --replSet {running}, but name is {self.name!r}: make both alike.")
        if not planning.implicit_majority([{"_id": i, **w.as_dict(), "arbiterOnly": w.arbiter} for i, w in enumerate(self.wanted)]):
            self.module.warn(
                f"{self.name} is initiated with an arbiter and so few data members that w:1 becomes the default write"
                " concern: writes that only the primary has are lost when it fails. Three data members avoid this."
            )
        if not self.check and own and self.others_go_first(self.hosts[: self.hosts.index(own)]):
            self.on_fresh(access)
            return
        self.before = []
        if not self.check and not self.initiate(access, own):
            # Another run was faster; what it made is compared as any existing set is.
            self.before = None
            self.converge(access)
            return
        self.did(f"initiate {self.name} with " + ", ".join(self.hosts))
        self.initiated = True
        if not self.check:
            self.converge(access)
        elif access.by == "previous":
            self.rotate(access)

    def others_go_first(self, before: list[str]) -> bool:
        """Whether a server that is listed before this one got into a set while we waited.

        Two runs on two servers of one list would make two sets of one name, which MongoDB itself does not always notice.
        """
        return self.set_appears(before, min(2.5 * len(before), 10.0))

    def set_appears(self, hosts: t.Iterable[str], seconds: float) -> bool:
        """Whether one of these servers says within the time that it is in a set."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            time.sleep(0.5)
            for host in hosts:
                try:
                    if m.peek(self.settings, host).get("setName"):
                        return True
                except (m.Unreachable, m.Refused):
                    continue
        return False

    def initiate(self, access: m.Access, own: str | None) -> bool:
        try:
            access.node.command("replSetInitiate", planning.initial_config(self.name, self.wanted))
        except m.Refused as exc:
            if exc.code == m.ALREADY_INITIALIZED:
                return False
            raise m.MongoFault(self.explain_initiate(exc, own)) from None
        except m.Unreachable:
            # The answer is lost; the server knows whether the work was done.
            if not m.peek(self.settings, access.node.address).get("setName"):
                raise
        return True

    def explain_initiate(self, exc: m.Refused, own: str | None) -> str:
        text = f"MongoDB at {self.settings.address} refuses to initiate {self.name}: {exc.message} (code {exc.code})."
        if exc.code == m.NODE_NOT_FOUND and SAME_KEY in exc.message:
            return text + " All members must be started with the same keyFile."
        if exc.code == m.NODE_NOT_FOUND:
            return text + " Every member must answer under its listed host from inside the other members' hosts or containers."
        if exc.code == m.INVALID_CONFIG and "maps to this node" in exc.message:
            if own:
                return (
                    text + f" {own} is this server as seen from here, but the server does not reach itself under that"
                    " address: allow this (published ports, firewall, name resolution inside the container)."
                )
            return text + " One of the listed hosts must be this server, reachable from inside it under that name or address."
        if exc.code == m.INVALID_CONFIG and "set name" in exc.message:
            return text + " Set name to what the server's --replSet says."
        if exc.code == m.UNAUTHORIZED:
            return text + " The user needs the role root or clusterAdmin."
        return text

    def join(self, access: m.Access, peer: Peer, peers: list[Peer]) -> None:
        """We were sent to a server that is yet to become a member of a set that runs elsewhere."""
        if not any(p.own for p in peers):
            raise m.MongoFault(
                f"{self.settings.address} is in no replica set and is none of the listed members, while {peer.host} is"
                f" in {self.name!r}: connect to one of the listed members."
            )
        other = self.keep(self.open_member(peer.host))
        members = [str(x["name"]) for x in other.node.status()["members"]]
        strangers = sorted(set(map(planning.normalise_host, members)) - set(self.hosts))
        if strangers:
            raise m.MongoFault(
                f"{self.settings.address} is not a member of any set, while {peer.host} is in a replica set"
                f" {self.name!r} with members that are not listed ({', '.join(strangers)}): if this is the set meant,"
                f" connect to one of its members; if not, take {peer.host} out of the list."
            )
        # the set's configuration may have reached this server since it was asked
        self.refuse_data([p for p in peers if p.own and not p.set_name], other.node.config())
        self.converge(other)

    # removed

    def on_removed(self, access: m.Access) -> None:
        if access.by == "exception":
            raise m.MongoFault(
                f"MongoDB at {self.settings.address} is not in its own replica set configuration and has no users: its configuration cannot be read."
            )
        config = access.node.config()
        if config["_id"] != self.name:
            raise m.MongoFault(
                f"MongoDB at {self.settings.address} holds data of the replica set {config['_id']!r}, but name is"
                f" {self.name!r}. The name of a set cannot be changed: start it with --replSet {config['_id']} and set"
                " name to it."
            )
        running = self.running_name(access.node)
        if running and running != self.name:
            raise m.MongoFault(
                f"MongoDB at {self.settings.address} holds data of the replica set {self.name!r} but was started with"
                f" --replSet {running}: start it with --replSet {self.name}."
            )
        peers = self.peers(access, [*self.hosts, *(planning.normalise_host(d["host"]) for d in config["members"])])
        for peer in peers:
            if peer.set_name == self.name and not peer.own:
                other = self.keep(self.open_member(peer.host))
                same = other.node.config().get("settings", {}).get("replicaSetId") == config["settings"].get("replicaSetId")
                if same and m.find_primary(self.settings, other) is not None:
                    self.converge(other)
                    return
        own = next((p.host for p in peers if p.own and p.host in self.hosts), None)
        before = [planning.member_of(d).host for d in config["members"]]
        text = (
            f"MongoDB at {self.settings.address} does not find itself in its own configuration of {self.name} "
            f"(members there: {', '.join(before)}) and no other member has a primary: the state REMOVED."
        )
        if own is None:
            raise m.MongoFault(text + f" None of the listed hosts is this server ({', '.join(self.hosts)}): correct members first.")
        if not self.module.params["force_recovery"]:
            raise m.MongoFault(
                text + f" If {', '.join(before)} can be made to resolve and answer again, do that. Else run once with"
                " force_recovery: true, which forces the listed hosts into the configuration (writes that only"
                " others had may be rolled back)."
            )
        same_set = [p.host for p in peers if p.host in self.hosts and not p.own and self.same_data(p, config)]
        docs = planning.recovery_members(config["members"], self.wanted, own, same_set)
        if len(docs) <= len(config["members"]) // 2:
            self.module.warn(
                f"Only {len(docs)} of {len(config['members'])} members of {self.name} take part in the forced"
                " reconfiguration: writes that only the others have are lost."
            )
        self.before = m.compact(config["members"], self.wanted)
        forced = "force the hosts " + ", ".join(planning.member_of(d).host for d in docs) + " into the configuration"
        if self.check:
            self.did(forced)
            self.steps += [step.text for step in planning.plan(docs, self.wanted)]
            return
        fresh = {**config, "members": docs, "version": int(config["version"]) + 1}
        try:
            access.node.command("replSetReconfig", fresh, force=True)
        except m.Refused as exc:
            raise m.MongoFault(f"The forced reconfiguration is refused: {exc.message} (code {exc.code}).") from None
        self.did(forced)
        self.converge(access)

    def same_data(self, peer: Peer, config: dict[str, t.Any]) -> bool:
        """Whether the server holds data of the very set that `config` describes."""
        try:
            with self.open_member(peer.host).node as node:
                stored = node.stored_config()
        except (m.MongoFault, m.Unreachable, m.Refused):
            return False
        wanted_id = config.get("settings", {}).get("replicaSetId")
        return bool(stored) and (stored or {}).get("settings", {}).get("replicaSetId") == wanted_id

    # members as seen from here

    def peers(self, access: m.Access, hosts: t.Iterable[str]) -> list[Peer]:
        own = m.process_of(access.hello)
        found = []
        for host in dict.fromkeys(hosts):
            try:
                hello = m.peek(self.settings, host)
            except (m.Unreachable, m.Refused) as exc:
                found.append(Peer(host, {}, str(exc), host == access.node.address))
                continue
            same = m.process_of(hello) == own if own else host == access.node.address
            found.append(Peer(host, hello, "", same))
        return found

    def open_member(self, host: str) -> m.Access:
        try:
            return m.open_node(self.settings, host)
        except m.Unreachable as exc:
            raise m.MongoFault(f"Member {host} does not answer: {exc.reason}.") from None
        except m.Refused as exc:
            raise m.MongoFault(f"Member {host} refuses to answer: {exc.message} (code {exc.code}).") from None

    def refuse_unreachable(self, peers: t.Iterable[Peer]) -> None:
        lost = [p for p in peers if p.error]
        if lost:
            raise m.MongoFault(
                "members that do not answer: " + "; ".join(p.error for p in lost) + ". Start MongoDB there and open its port to all "
                "members and to this host, or correct the list. Nothing was changed."
            )
        seen: dict[str, str] = {}
        for peer in peers:
            process = m.process_of(peer.hello)
            if process and process in seen:
                raise m.MongoFault(f"members: {seen[process]} and {peer.host} are the same server: list it once, under the address that all members reach.")
            seen[process] = peer.host

    def refuse_data(self, peers: t.Iterable[Peer], config: dict[str, t.Any] | None) -> None:
        """A new member is emptied by its first synchronisation: refuse one that holds anything of its own."""
        blind = [peer.host for peer in peers if not self.examined(peer, config)]
        if blind:
            self.module.warn(
                f"{', '.join(blind)}: whether it holds data cannot be found out (it takes no log-in of ours, or is older than MongoDB"
                f" 5.0). Joining {self.name} deletes what it holds."
            )

    def examined(self, peer: Peer, config: dict[str, t.Any] | None) -> bool:
        """False where the server does not let us look."""
        where = f"members: {peer.host}"
        if peer.set_name and peer.set_name != self.name:
            raise m.MongoFault(
                f"{where} belongs to the replica set {peer.set_name!r}, not {self.name!r}: take it out of the list, or"
                " remove it from that set and empty its data directory first."
            )
        if peer.set_name:
            raise m.MongoFault(
                f"{where} belongs to another replica set that is called {self.name!r} too (members there:"
                f" {', '.join(peer.hello.get('hosts', []))}): take it out of the list, or remove it from that set and"
                " empty its data directory first."
            )
        if not peer.hello.get("isreplicaset"):
            raise m.MongoFault(f"{where} runs without replication: start it with --replSet {self.name}.")
        try:
            access = m.open_node(self.settings, peer.host)
        except m.MongoFault:
            return False
        except (m.Unreachable, m.Refused) as exc:
            raise m.MongoFault(f"{where} cannot be examined: {exc}.") from None
        with access.node as node:
            if access.by == "exception":
                # No user, on the server's own host: it is new.
                return True
            try:
                stored = node.stored_config()
                collections = node.user_collections()
            except m.Refused:
                return False
        if stored:
            wanted_id = (config or {}).get("settings", {}).get("replicaSetId")
            if wanted_id is not None and stored.get("settings", {}).get("replicaSetId") == wanted_id:
                return True
            text = (
                f"{where} holds data of another replica set ({stored.get('_id')!r}, members there:"
                f" {', '.join(str(d['host']) for d in stored.get('members', []))}). Empty its data directory if that"
                " data may go, or take it out of the list."
            )
            there = {planning.normalise_host(str(d["host"])) for d in stored.get("members", [])}
            if config is None and stored.get("_id") == self.name and there == set(self.hosts):
                raise InTheMaking(text, peer.host)
            raise m.MongoFault(text)
        if collections:
            raise m.MongoFault(
                f"{where} holds data of its own (collections: {collections}), which joining the set would delete: make"
                " it the server that the module connects to (the first member keeps its data), or empty its data"
                " directory."
            )
        return collections is not None

    # a primary

    def wait_primary(self, access: m.Access, not_this: str = "") -> m.Access:
        deadline = time.monotonic() + self.patience
        while True:
            try:
                primary = m.find_primary(self.settings, access, self.hosts if access.by != "exception" else ())
                if primary is not None and primary.hello.get("setName", self.name) == self.name:
                    host = str(primary.node.hello().get("me", primary.node.address))
                    if primary is not access:
                        self.keep(primary)
                    if host != not_this:
                        self.primary_host = host
                        return primary
            except (m.Unreachable, m.Refused):
                pass
            if time.monotonic() >= deadline:
                raise m.MongoFault(self.no_primary(access))
            time.sleep(0.2)

    def no_primary(self, access: m.Access) -> str:
        text = f"The replica set {self.name} has no primary that can be reached from here, after {self.patience:g} s"
        try:
            states = m.member_states(access.node.status())
        except (m.Unreachable, m.Refused) as exc:
            return f"{text}: {exc}."
        seen = "; ".join(f"{s['host']} {s['state']}{': ' + s['message'] if s['message'] else ''}" for s in states)
        return (
            f"{text} (seen from {access.node.address}: {seen}). A majority of the voting members must run and reach"
            " each other, and this host must reach them under these names."
        )

    def majority_write(self, primary: m.Access) -> None:
        """Evidence that the set takes writes; the server's own answer, not its state, counts."""
        if self.check or primary.by == "exception":
            return
        deadline = time.monotonic() + self.patience
        while True:
            try:
                self.write_ms = primary.node.majority_write(min(10.0, self.patience))
                return
            except (m.Unreachable, m.Refused) as exc:
                if isinstance(exc, m.Refused) and exc.code in (m.UNAUTHORIZED, m.COMMAND_NOT_FOUND):
                    self.module.warn(f"The majority write was left out: {exc.message}. Give {self.settings.user} the role clusterAdmin.")
                    return
                if time.monotonic() >= deadline:
                    raise m.MongoFault(
                        f"The primary {self.primary_host} of {self.name} takes no write that a majority acknowledges"
                        f" within {self.patience:g} s: {exc}. " + self.no_primary(primary)
                    ) from None
                primary = self.wait_primary(primary)

    # convergence

    def converge(self, access: m.Access) -> None:
        primary = self.wait_primary(access)
        if access.by == "exception" or primary.by == "exception":
            self.compare_hosts(primary)
            return
        if primary.by == "previous":
            primary = self.rotate(primary)
        if not self.check:
            self.majority_write(primary)
        deadline = time.monotonic() + self.patience
        for _round in range(MAX_STEPS):
            try:
                config = primary.node.config()
                if self.before is None:
                    self.before = m.compact(config["members"], self.wanted)
                if self.unsure is not None and m.compact(config["members"]) == m.compact(self.unsure.members):
                    self.did(self.unsure.text)
                self.unsure = None
                if not planning.differences(config["members"], self.wanted):
                    break
                steps = self.plan(primary, config)
                if self.check:
                    self.steps += self.foreseen(primary, config, steps)
                    self.changed = True
                    return
                primary = self.take(primary, config, steps[0])
                deadline = time.monotonic() + self.patience
            except (m.Unreachable, m.Refused) as exc:
                stale = isinstance(exc, m.Refused) and exc.code == 103 and "version" in exc.message
                known = isinstance(exc, m.Unreachable) or exc.code in m.RETRY_CODES or stale
                if isinstance(exc, m.Refused) and "replica set ID" in exc.message:
                    raise m.MongoFault(
                        f"Two replica sets are called {self.name}, made by two runs at once: {exc}. Empty the data directory of the server whose"
                        " data may go, and run again."
                    ) from None
                if not known or time.monotonic() >= deadline:
                    raise m.MongoFault(f"The replica set {self.name} refuses the change: {exc}.") from None
                time.sleep(0.5)
                primary = self.wait_primary(access)
        else:
            raise m.MongoFault(f"{self.name} does not come to rest after {MAX_STEPS} steps: does another program change it as well?")
        if self.changed and not self.check:
            primary = self.wait_primary(primary)
            self.majority_write(primary)

    def foreseen(self, primary: m.Access, config: dict[str, t.Any], steps: list[planning.Step]) -> list[str]:
        """The steps, with what take() does on the way to them."""
        texts = []
        docs = config["members"]
        own = next((d["_id"] for d in docs if planning.member_of(d).host == self.primary_host), None)
        unpinned = True
        for step in steps:
            if own is not None and not _may_lead(step, next((d for d in step.members if d["_id"] == own), None)):
                texts.append(f"let {self.primary_host} step down as primary")
                own = None
            choice = self.write_concern_to_pin(primary, docs, step.members) if unpinned else ""
            if choice:
                texts.append(f"set the default write concern to {choice}")
                unpinned = False
            texts.append(step.text)
            docs = step.members
        return texts

    def plan(self, primary: m.Access, config: dict[str, t.Any]) -> list[planning.Step]:
        """Look at what the change concerns, refuse what must not be, plan the rest."""
        current = {planning.member_of(d).host for d in config["members"]}
        states = {planning.normalise_host(s["host"]): s for s in m.member_states(primary.node.status())}
        dead = frozenset(h for h, s in states.items() if not s["healthy"])
        renames: dict[str, str] = {}
        fresh = [h for h in self.hosts if h not in current]
        if fresh:
            peers = self.peers(primary, fresh)
            self.refuse_unreachable(peers)
            strangers = []
            for peer in peers:
                old = planning.normalise_host(str(peer.hello["me"])) if peer.hello.get("me") else ""
                if peer.set_name == self.name and old in current and self.is_member(peer, old):
                    if old in self.hosts:
                        raise m.MongoFault(f"members: {old} and {peer.host} are the same server: list it once, under the address that all members reach.")
                    renames[peer.host] = old
                else:
                    strangers.append(peer)
            if not renames and not current & set(self.hosts):
                raise m.MongoFault(
                    f"{self.settings.address} is in {self.name!r} with the members {', '.join(sorted(current))}, and none of them is listed: connect"
                    " to a server of the set meant. To move a set to other servers, list old and new ones first, then the new ones alone."
                )
            self.refuse_data(strangers, config)
        return planning.plan(
            config["members"],
            self.wanted,
            renames=renames,
            dead=dead - set(self.hosts),
            primary=self.primary_host or None,
        )

    def is_member(self, peer: Peer, old: str) -> bool:
        """Whether the server under the new address is the one that the set knows as `old`, not one of a namesake set."""
        if peer.own:
            return True
        try:
            return m.process_of(m.peek(self.settings, old)) == m.process_of(peer.hello)
        except (m.Unreachable, m.Refused):
            # The old name answers no more: the members that the server itself sees tell.
            return self.primary_host in peer.hello.get("hosts", [])

    def take(self, primary: m.Access, config: dict[str, t.Any], step: planning.Step) -> m.Access:
        if step.kind in ("add", "vote", "unvote", "remove"):
            self.wait_healthy(primary, {planning.member_of(d).host for d in step.members} & set(self.hosts), step)
        own = next((d for d in step.members if planning.member_of(d).host == self.primary_host), None)
        if not _may_lead(step, own):
            self.step_down(primary)
            return self.wait_primary(primary, not_this=self.primary_host)
        choice = self.write_concern_to_pin(primary, config["members"], step.members)
        if choice:
            self.pin_write_concern(primary, choice)
        document = {**config, "members": step.members, "version": int(config["version"]) + 1}
        try:
            primary.node.command("replSetReconfig", document)
        except m.Refused as exc:
            if exc.code == m.NODE_NOT_FOUND:
                raise m.MongoFault(
                    f"{self.name}: the step '{step.text}' is refused: {exc.message} (code {exc.code}). The members must"
                    " reach each other, and each itself, under the listed hosts from inside their hosts or containers."
                ) from None
            raise
        except m.Unreachable:
            self.unsure = step
            raise
        self.did(step.text)
        primary = self.wait_primary(primary)
        self.majority_write(primary)
        return primary

    def wait_healthy(self, primary: m.Access, hosts: set[str], step: planning.Step) -> None:
        """All members that stay must work; the one that gets its vote must have its data."""
        deadline = time.monotonic() + self.patience
        while True:
            states = {planning.normalise_host(s["host"]): s for s in m.member_states(primary.node.status())}
            sick = [s for h, s in states.items() if h in hosts and not s["healthy"]]
            if not sick:
                return
            if time.monotonic() >= deadline:
                seen = "; ".join(f"{s['host']} is {s['state']}{': ' + s['message'] if s['message'] else ''}" for s in sick)
                raise m.MongoFault(
                    f"{self.name}: the step '{step.text}' waits for all members to be healthy, but after"
                    f" {self.patience:g} s {seen}. {SAME_KEY}: all members need the same keyFile."
                    " STARTUP2 or RECOVERING: it still synchronises, run again later or raise timeout."
                    " Not reachable: start it, let the members reach each other under the listed hosts,"
                    " or take it out of the list."
                )
            time.sleep(0.3)

    def step_down(self, primary: m.Access) -> None:
        try:
            primary.node.command("replSetStepDown", 60, secondaryCatchUpPeriodSecs=10)
        except m.Unreachable:
            # Before 4.2 the server drops the connection.
            pass
        self.did(f"let {self.primary_host} step down as primary")

    def write_concern_to_pin(self, primary: m.Access, docs: list[planning.MemberDoc], becoming: list[planning.MemberDoc]) -> str:
        """The default write concern to set before this step; empty where none has to be."""
        implied = planning.implicit_majority(becoming)
        if planning.implicit_majority(docs) == implied:
            return ""
        try:
            present = primary.node.command("getDefaultRWConcern")
        except m.Refused:
            return ""
        if present.get("defaultWriteConcernSource", "global") != "implicit":
            return ""
        choice = str(self.module.params["default_write_concern"])
        return ("majority" if implied else "1") if choice == "auto" else choice

    def pin_write_concern(self, primary: m.Access, choice: str) -> None:
        value: int | str = 1 if choice == "1" else choice
        primary.node.command("setDefaultRWConcern", defaultWriteConcern={"w": value}, writeConcern={"w": "majority"})
        self.did(f"set the default write concern to {choice}")
        if choice == "1":
            self.module.warn(
                f"The default write concern of {self.name} is now w:1, as an arbiter leaves too few data members for"
                " w:majority: writes that only the primary has are lost when it fails. Three data members avoid this."
            )

    def compare_hosts(self, primary: m.Access) -> None:
        """Before the first user exists only names can be read; the rest is compared by the next run."""
        try:
            hosts = {planning.normalise_host(str(x["name"])) for x in primary.node.status()["members"]}
        except m.Refused:
            hello = primary.node.hello()
            names = [h for key in ("hosts", "passives", "arbiters") for h in hello.get(key, [])]
            hosts = {planning.normalise_host(h) for h in names}
        visible = {w.host for w in self.wanted}
        if self.before is None:
            self.before = self.after
        if hosts != visible:
            raise m.MongoFault(
                f"The replica set {self.name} has the members {', '.join(sorted(hosts))}, and no user exists yet, so"
                " that its configuration cannot be read: make the first user (selfhosted.fastgpt.mongodb_user), then"
                " run again with its log-in."
            )

    # password

    def rotate(self, primary: m.Access) -> m.Access:
        text = f"change the password of {self.settings.user}"
        if self.check:
            self.did(text)
            self.rotated = True
            return primary
        try:
            primary.node.command(
                "updateUser",
                self.settings.user,
                database=self.settings.auth_source,
                pwd=self.settings.password,
                writeConcern={"w": "majority", "wtimeout": int(self.patience * 1000)},
            )
        except m.Refused as exc:
            raise m.MongoFault(
                f"The password of {self.settings.user} could not be changed on {primary.node.address}: {exc.message} (code {exc.code})."
            ) from None
        self.did(text)
        self.rotated = True
        return self.keep(self.open_member(primary.node.address))


def _may_lead(step: planning.Step, own: planning.MemberDoc | None) -> bool:
    """Whether the primary, whose document after the step is `own`, may stay primary through it."""
    view = planning.member_of(own) if own else None
    return step.kind == "rename" or (view is not None and bool(view.votes) and view.priority > 0)


class Peer:
    """A listed host as it answers without a log-in."""

    def __init__(self, host: str, hello: dict[str, t.Any], error: str, own: bool) -> None:
        self.host = host
        self.hello = hello
        self.error = error
        self.own = own

    @property
    def set_name(self) -> str:
        return str(self.hello.get("setName", ""))


def main() -> None:
    spec = m.connection_argument_spec()
    spec.update(
        name=dict(type="str", default="rs0"),
        members=dict(
            type="list",
            elements="dict",
            required=True,
            options=dict(
                host=dict(type="str", required=True),
                priority=dict(type="float"),
                votes=dict(type="int", default=1, choices=[0, 1]),
                hidden=dict(type="bool", default=False),
                arbiter=dict(type="bool", default=False),
            ),
        ),
        force_recovery=dict(type="bool", default=False),
        default_write_concern=dict(type="str", default="auto", choices=["auto", "1", "majority"]),
    )
    module = AnsibleModule(
        argument_spec=spec,
        required_together=m.CONNECTION_REQUIRED_TOGETHER,
        required_by=m.CONNECTION_REQUIRED_BY,
        supports_check_mode=True,
    )
    settings = m.settings_of(module)
    wanted, faults = planning.wanted_members(module.params["members"])
    if faults:
        module.fail_json(msg="\n".join(faults), steps=[])
    work = ReplicaSet(module, settings, wanted)
    failure = ""
    try:
        work.run()
    except (m.MongoFault, planning.PlanError) as exc:
        failure = str(exc)
    except m.Unreachable as exc:
        failure = f"MongoDB at {exc.address} stopped answering: {exc.reason}. Run again; it continues from where the set stands."
    except m.Refused as exc:
        failure = f"MongoDB at {exc.address} answers: {exc.message} (code {exc.code})."
    finally:
        for node in work.opened:
            node.close()
    result: dict[str, t.Any] = {"changed": work.changed, "name": work.name, "steps": work.steps}
    if failure:
        result["changed"] = work.changed and not module.check_mode
        module.fail_json(msg=failure, **result)
    result.update(primary=work.primary_host, members=work.after, initiated=work.initiated, password_rotated=work.rotated)
    if work.write_ms is not None:
        result["majority_write_ms"] = work.write_ms
    before: dict[str, t.Any] = {"name": work.name, "members": work.before} if work.before else {}
    after: dict[str, t.Any] = {"name": work.name, "members": work.after}
    if work.rotated:
        before[f"password of {settings.user}"] = "(previous)"
        after[f"password of {settings.user}"] = "(new)"
    if module._diff:
        result["diff"] = {"before": before, "after": after}
    module.exit_json(**result)


if __name__ == "__main__":
    main()
