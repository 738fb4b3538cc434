#!/usr/bin/python

# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: mongodb_user
short_description: MongoDB user with password and roles, on the primary
version_added: 1.0.0
author:
  - selfhosted.fastgpt contributors (@selfhosted)
description:
  - Makes, changes or removes a user of MongoDB. The primary is found from the server that the module connects to.
  - Whether the password is right is found out by a log-in, so that a second run changes nothing and a changed password is set.
  - Where no user exists yet, the first one is made through the localhost exception.
  - Unlike C(community.mongodb.mongodb_user) it works with pymongo 3.11 (Debian 12), compares the password, and shows a diff.
extends_documentation_fragment:
  - selfhosted.fastgpt._mongodb
  - selfhosted.fastgpt._attributes
  - selfhosted.fastgpt._attributes.action_group
attributes:
  check_mode:
    support: full
    details:
      - The password is checked by a log-in, in check mode too. Nothing is waited for longer than 10 seconds.
      - On a server whose replica set is yet to be initiated, which the same run would have done before, a new user is foreseen.
  diff_mode:
    support: full
    details:
      - Passwords are not shown, only that they differ.
  idempotent:
    support: full
options:
  name:
    description:
      - Name of the user.
    type: str
    required: true
  database:
    description:
      - Database that the user belongs to, its authentication database.
    type: str
    default: admin
  password:
    description:
      - Password of the user. Needed to make one.
    type: str
  update_password:
    description:
      - V(always) sets O(password) where a log-in with it is refused; V(on_create) leaves an existing user's password alone.
    type: str
    choices: [always, on_create]
    default: always
  roles:
    description:
      - All roles that the user should have, each a name (of a role of O(database)) or a dictionary with C(role) and C(db).
      - If left out, an existing user's roles are not touched, and a new user has none.
    type: list
    elements: raw
  state:
    description:
      - Whether the user should exist.
    type: str
    choices: [present, absent]
    default: present
seealso:
  - module: selfhosted.fastgpt.mongodb_replica_set
"""

EXAMPLES = r"""
- name: Make FastGPT's user
  selfhosted.fastgpt.mongodb_user:
    login_host: 192.0.2.11
    login_user: root
    login_password: "{{ mongodb_root_password }}"
    name: fastgpt
    password: "{{ mongodb_fastgpt_password }}"
    roles:
      - role: readWrite
        db: fastgpt
      - role: dbAdmin
        db: fastgpt

- name: Make the first user of a new set, on the server's own host
  selfhosted.fastgpt.mongodb_user:
    name: root
    password: "{{ mongodb_root_password }}"
    roles: [root]
"""

RETURN = r"""
user:
  description: Name of the user.
  returned: success
  type: str
database:
  description: Its database.
  returned: success
  type: str
roles:
  description: Its roles after the run; in check mode those that a run would give.
  returned: when present
  type: list
  elements: dict
  sample: [{"role": "readWrite", "db": "fastgpt"}]
password_changed:
  description: Whether the password was set, for a new user too.
  returned: success
  type: bool
"""

import time
import typing as t

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.selfhosted.fastgpt.plugins.module_utils import _mongodb as m

# Another run was faster.
ALREADY_EXISTS = 51003
NOT_FOUND = 11


def wanted_roles(items: t.Iterable[t.Any] | None, database: str) -> list[dict[str, str]] | None:
    if items is None:
        return None
    roles = []
    for index, item in enumerate(items):
        if isinstance(item, str) and item:
            roles.append({"role": item, "db": database})
        elif isinstance(item, dict) and set(item) == {"role", "db"} and all(isinstance(v, str) and v for v in item.values()):
            roles.append({"role": item["role"], "db": item["db"]})
        else:
            raise m.MongoFault(f"roles[{index}]: {item!r}: must be the name of a role, or a dictionary with role and db.")
    return sorted_roles(roles)


def sorted_roles(roles: t.Iterable[t.Mapping[str, t.Any]]) -> list[dict[str, str]]:
    pairs = sorted({(str(r["db"]), str(r["role"])) for r in roles})
    return [{"role": role, "db": db} for db, role in pairs]


class User:
    def __init__(self, module: AnsibleModule, settings: m.Settings) -> None:
        self.module = module
        self.settings = settings
        self.name: str = module.params["name"]
        self.database: str = module.params["database"]
        self.password: str | None = module.params["password"]
        self.roles = wanted_roles(module.params["roles"], self.database)
        self.opened: list[m.Node] = []
        self.writing = False
        self.foreseen = False
        self.result: dict[str, t.Any] = {"user": self.name, "database": self.database, "password_changed": False}
        self.before: dict[str, t.Any] = {}
        self.after: dict[str, t.Any] = {}

    def run(self) -> bool:
        """Elections, lost answers and other runs are met by looking again; a user is never made or changed twice by that."""
        patience = float(self.settings.timeout)
        if self.module.check_mode:
            patience = min(10.0, patience)
        deadline = time.monotonic() + patience
        lost: list[dict[str, t.Any]] = []
        while True:
            self.writing = False
            try:
                primary = self.primary(max(1.0, deadline - time.monotonic()))
                found = self.find(primary)
                changed = (self.absent if self.module.params["state"] == "absent" else self.present)(primary, found)
                if lost and not changed:
                    # The write whose answer was lost had been done.
                    self.before, self.after = lost
                return changed or bool(lost)
            except (m.Unreachable, m.Refused) as exc:
                if isinstance(exc, m.Refused) and exc.code not in (m.RETRY_CODES | {ALREADY_EXISTS, NOT_FOUND}):
                    raise
                if not self.opened or time.monotonic() >= deadline:
                    raise
                if self.writing and not (isinstance(exc, m.Refused) and exc.code in (ALREADY_EXISTS, NOT_FOUND)):
                    lost = [self.before, self.after]
                time.sleep(0.3)

    def write(self, primary: m.Access, name: str, **fields: t.Any) -> None:
        if self.module.check_mode:
            return
        self.writing = True
        # A bit less than the connection waits, so that the server's own reason arrives.
        wait = {"w": "majority", "wtimeout": int(self.settings.command_seconds * 1000) - 2000}
        primary.node.command(name, self.name, database=self.database, writeConcern=wait, **fields)

    def primary(self, patience: float) -> m.Access:
        deadline = time.monotonic() + patience
        access = m.open_login(self.settings, patience)
        self.opened.append(access.node)
        self.foreseen = self.module.check_mode and self.not_initiated(access)
        if self.foreseen:
            return access
        while True:
            primary = m.find_primary(self.settings, access)
            if primary is not None:
                if primary is not access:
                    self.opened.append(primary.node)
                return primary
            if time.monotonic() >= deadline:
                raise m.MongoFault(
                    f"No primary can be reached from {self.settings.address} within {patience:g} s: a user can only be"
                    " changed there. Initiate the replica set (selfhosted.fastgpt.mongodb_replica_set), or see why it"
                    " has no primary."
                )
            time.sleep(0.3)

    @staticmethod
    def not_initiated(access: m.Access) -> bool:
        try:
            access.node.status()
        except m.Refused as exc:
            return exc.code == m.NOT_YET_INITIALIZED
        return False

    def find(self, primary: m.Access) -> dict[str, t.Any] | None:
        if self.foreseen:
            # Users cannot be read there yet; the one that we are exists.
            ourselves = primary.by == "user" and (self.name, self.database) == (self.settings.user, self.settings.auth_source)
            return {"roles": self.roles or []} if ourselves else None
        if primary.by == "exception":
            # No user exists, else the exception would be closed; usersInfo is not allowed by it.
            return None
        users = primary.node.command("usersInfo", {"user": self.name, "db": self.database})["users"]
        return dict(users[0]) if users else None

    def password_works(self, primary: m.Access) -> bool:
        with m.Node(self.settings, primary.node.address, self.name, self.password, self.database) as node:
            try:
                node.command("ping")
                return True
            except m.Refused as exc:
                if exc.code != m.AUTHENTICATION_FAILED:
                    raise
                return False

    def absent(self, primary: m.Access, found: dict[str, t.Any] | None) -> bool:
        if found is None:
            return False
        self.before = {"user": self.name, "database": self.database, "roles": sorted_roles(found.get("roles", []))}
        self.write(primary, "dropUser")
        return True

    def present(self, primary: m.Access, found: dict[str, t.Any] | None) -> bool:
        self.after = {"user": self.name, "database": self.database}
        if found is None:
            if self.password is None:
                raise m.MongoFault(f"User {self.name} does not exist in {self.database}: give a password to make it.")
            roles = self.roles or []
            self.after.update(roles=roles, password="(set)")
            self.result.update(roles=roles, password_changed=True)
            self.write(primary, "createUser", pwd=self.password, roles=roles)
            return True
        present = sorted_roles(found.get("roles", []))
        roles = present if self.roles is None else self.roles
        self.before = {"user": self.name, "database": self.database, "roles": present}
        self.after["roles"] = roles
        self.result["roles"] = roles
        changes: dict[str, t.Any] = {}
        if roles != present:
            changes["roles"] = roles
        check_password = self.password is not None and self.module.params["update_password"] == "always"
        if check_password and not self.password_works(primary):
            changes["pwd"] = self.password
            self.before["password"] = "(another one)"
            self.after["password"] = "(set)"
            self.result["password_changed"] = True
        if changes:
            self.write(primary, "updateUser", **changes)
        return bool(changes)


def main() -> None:
    spec = m.connection_argument_spec()
    spec.update(
        name=dict(type="str", required=True),
        database=dict(type="str", default="admin"),
        password=dict(type="str", no_log=True),
        update_password=dict(type="str", default="always", choices=["always", "on_create"], no_log=False),
        roles=dict(type="list", elements="raw"),
        state=dict(type="str", default="present", choices=["present", "absent"]),
    )
    module = AnsibleModule(
        argument_spec=spec,
        required_together=m.CONNECTION_REQUIRED_TOGETHER,
        required_by=m.CONNECTION_REQUIRED_BY,
        supports_check_mode=True,
    )
    settings = m.settings_of(module)
    try:
        work = User(module, settings)
    except m.MongoFault as exc:
        module.fail_json(msg=str(exc))
    failure = ""
    changed = False
    try:
        changed = work.run()
    except m.MongoFault as exc:
        failure = str(exc)
    except m.Unreachable as exc:
        failure = f"MongoDB at {exc.address} stopped answering: {exc.reason}. Run again."
    except m.Refused as exc:
        name = module.params["name"]
        failure = f"User {name}: MongoDB at {exc.address} answers: {exc.message} (code {exc.code})."
    finally:
        for node in work.opened:
            node.close()
    if failure:
        module.fail_json(msg=failure)
    result: dict[str, t.Any] = {"changed": changed, **work.result}
    if module._diff:
        result["diff"] = {"before": work.before, "after": work.after}
    module.exit_json(**result)


if __name__ == "__main__":
    main()
