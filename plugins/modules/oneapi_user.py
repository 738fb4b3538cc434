#!/usr/bin/python

# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: oneapi_user
short_description: Manage a user of One-API and rotate the root password
version_added: 1.0.0
description:
  - Gives a user of One-API the wanted password, which is root's default V(123456) on a fresh server, and tells root's access token on request.
  - Whether the password is right can only be seen by logging in, so a run that changes nothing costs one log-in of the 20 that One-API allows
    in 20 minutes, unless O(password_policy=on_create). If it is not right, it is changed by O(access_token), or else after a log-in with one
    of O(password_previous).
  - Creates and deletes other users too. That takes the O(access_token) of an administrator.
extends_documentation_fragment:
  - selfhosted.fastgpt._attributes
  - selfhosted.fastgpt._attributes.action_group
  - selfhosted.fastgpt._oneapi
attributes:
  check_mode:
    support: full
    details:
      - Logs in all the same to see whether the password is right, unless O(password_policy=on_create).
  diff_mode:
    support: full
    details:
      - Shows that the password changes, not the password.
  idempotent:
    support: full
options:
  name:
    description: User name, up to 12 characters.
    type: str
    default: root
    aliases: [username]
  state:
    description: V(absent) deletes the user. Root cannot be deleted.
    type: str
    choices: [present, absent]
    default: present
  password:
    description: The wanted password, 8 to 20 characters. Needed unless O(state=absent).
    type: str
  password_policy:
    description:
      - V(always) sees to it that O(password) is the one in force.
      - V(on_create) gives it to a user that is created and leaves that of an existing one alone. O(access_token) shows whether the user exists,
        so no log-in is made. Root always exists, so the default password of a fresh server stays with this.
    type: str
    choices: [always, on_create]
    default: always
  password_previous:
    description:
      - Passwords that may still be in force, tried in this order where O(password) is refused and O(access_token) is not given.
      - Left out, it is the one that a fresh server has, V(123456).
      - One-API allows 20 log-ins in 20 minutes per client address, and each try counts.
    type: list
    elements: str
  return_access_token:
    description:
      - Whether the user's access token is returned. It is read, not renewed, so that an existing one stays valid.
      - Needs the rights of an administrator.
    type: bool
    default: false
notes:
  - A change of the password ends neither open sessions nor the access token.
  - Where the password of another user is changed, One-API's log names a change of that user's quota to 0, which does not take place.
author:
  - selfhosted.fastgpt contributors (@selfhosted)
"""

EXAMPLES = r"""
- name: Replace the default root password of a fresh server
  selfhosted.fastgpt.oneapi_user:
    url: http://127.0.0.1:3000
    name: root
    password: "{{ oneapi_root_password }}"

- name: Rotate the root password
  selfhosted.fastgpt.oneapi_user:
    url: http://127.0.0.1:3000
    password: "{{ oneapi_root_password }}"
    password_previous:
      - "{{ oneapi_root_password_previous }}"
      - "123456"

- name: Set the root password by the access token and without knowing the old one
  selfhosted.fastgpt.oneapi_user:
    url: http://127.0.0.1:3000
    access_token: "{{ oneapi_root_access_token }}"
    password: "{{ oneapi_root_password }}"

- name: Make a user once, without a log-in in this or any later run
  selfhosted.fastgpt.oneapi_user:
    url: http://127.0.0.1:3000
    access_token: "{{ oneapi_root_access_token }}"
    name: guest
    password: "{{ oneapi_guest_password }}"
    password_policy: on_create

- name: Read root's access token
  selfhosted.fastgpt.oneapi_user:
    url: http://127.0.0.1:3000
    password: "{{ oneapi_root_password }}"
    return_access_token: true
  register: oneapi_root
  no_log: true

- name: Remove a user
  selfhosted.fastgpt.oneapi_user:
    url: http://127.0.0.1:3000
    access_token: "{{ oneapi_root_access_token }}"
    name: guest
    state: absent
"""

RETURN = r"""
access_token:
  description:
    - The user's access token, a secret, so set C(no_log) on the task.
    - Ansible masks it where it is the O(access_token) that was given.
  returned: O(return_access_token=true) and the user exists
  type: str
  sample: VALUE
verified:
  description:
    - Whether the server was seen to accept the password, or accepted it as the new one.
    - V(false) where it lets nobody log in by password, or not this user, and where O(password_policy=on_create) left it alone.
  returned: O(state=present)
  type: bool
  sample: true
requests:
  description: Number of HTTP requests that the task made.
  returned: always
  type: int
  sample: 2
"""

import typing as t

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.selfhosted.fastgpt.plugins.module_utils import _oneapi, _oneapi_plan

_USER_ENABLED = 1
_FRESH = "123456"


class User:
    def __init__(self, module: AnsibleModule, client: _oneapi.Client) -> None:
        self.module = module
        self.client = client
        self.name: str = module.params["name"]
        self.password: str = module.params["password"] or ""
        self.changed = False
        self.verified = True
        self.diff: dict[str, t.Any] = {"before": {}, "after": {}}

    def present(self) -> None:
        self.client.identify()
        if self.module.params["password_policy"] == "on_create":
            if self.client.row("/api/user/self").get("username") != self.name and self.client.user(self.name) is None:
                self._create()
            else:
                self.verified = False
            return
        # A new-api takes logins and password changes alike, so look before the first.
        self.client.make_sure()
        right = self.client.login(self.name, self.password)
        self.client.forget_session()
        if right:
            return
        if self.client.has_access_token():
            try:
                me = self.client.row("/api/user/self")
            except _oneapi.Refused as exc:
                # E.g. renewed in the web interface since: the previous passwords may still help.
                self.module.warn(str(exc))
                self.client.drop_access_token()
            else:
                self._by_access_token(me)
                return
        self._by_previous_password()

    def absent(self) -> None:
        row = self.client.user(self.name)
        if row is None:
            return
        if self.name == "root" or row.get("role") == 100:
            raise _oneapi_plan.Fault(f"user {self.name}: is a root user, which One-API does not delete")
        self._announce({"name": self.name, "status": row.get("status")}, {})
        if self.module.check_mode:
            return
        self.client.delete(f"/api/user/{int(row['id'])}")
        if self.client.user(self.name) is not None:
            raise _oneapi.OneApiError(f"user {self.name}: One-API says it deleted the user, but still lists it. Look into its log")

    def access_token(self) -> str | None:
        row = self.client.user(self.name)
        if row is None:
            return None
        token = str(row.get("access_token") or "").strip()
        if not token:
            raise _oneapi.OneApiError(f"user {self.name}: One-API does not tell its access token. Create one in the web interface")
        return token

    def _by_access_token(self, me: dict[str, t.Any]) -> None:
        if me.get("username") == self.name:
            if self._cannot_log_in():
                return
            self._announce_password()
            if not self.module.check_mode:
                # Only this user is meant, so the narrowest call: it needs no role.
                self.client.put("/api/user/self", {"password": self.password})
            return
        row = self.client.user(self.name)
        if row is None:
            self._create()
            return
        if row.get("status") != _USER_ENABLED:
            self.module.warn(f"user {self.name} is disabled, so whether its password is right cannot be seen; it is left as it is")
            self.verified = False
            return
        if self._cannot_log_in():
            return
        self._announce_password()
        if not self.module.check_mode:
            self.client.put("/api/user/", {"id": row["id"], "password": self.password})

    def _create(self) -> None:
        if self.name == "root":
            raise _oneapi_plan.Fault("user root: does not exist on this server. Give the name that its root user has now")
        self._announce({}, {"name": self.name, "password": _oneapi_plan.MASK})
        if self.module.check_mode:
            return
        body = {"username": self.name, "password": self.password, "display_name": self.name}
        try:
            self.client.post("/api/user/", body)
        except (_oneapi.LostAnswer, _oneapi.Refused) as exc:
            # Names are unique here: either it was created by the request whose answer was lost, or by another run.
            row = self.client.user(self.name)
            if row is None and isinstance(exc, _oneapi.LostAnswer):
                self.client.post("/api/user/", body)
            elif row is None:
                raise
            else:
                self.client.put("/api/user/", {"id": row["id"], "password": self.password})

    def _by_previous_password(self) -> None:
        previous_ones = self.module.params["password_previous"]
        # No default in the argument spec: Ansible cannot take a list there for an option that is not logged.
        tried = [item for item in ([_FRESH] if previous_ones is None else previous_ones) if item and item != self.password]
        for previous in tried:
            if self.client.login(self.name, previous):
                self._announce_password()
                if not self.module.check_mode:
                    self.client.put("/api/user/self", {"password": self.password})
                return
        # Another run at the same time may have changed it between our first look and the last.
        if tried and self.client.login(self.name, self.password):
            return
        raise _oneapi.OneApiError(
            f"user {self.name}: One-API at {self.client.url} accepts neither password nor any of the {len(tried)} in password_previous. "
            "Add the one that is in force to password_previous, or give root's access_token (a fresh server has the one of INITIAL_ROOT_ACCESS_TOKEN)"
        )

    def _cannot_log_in(self) -> bool:
        try:
            off = self.client.options().get("PasswordLoginEnabled") == "false"
        except _oneapi.Refused:
            return False
        if off:
            self.module.warn("PasswordLoginEnabled is false, so whether the password is right cannot be seen; it is left as it is")
            self.verified = False
        return off

    def _announce_password(self) -> None:
        self._announce({"name": self.name, "password": "another"}, {"name": self.name, "password": _oneapi_plan.MASK})

    def _announce(self, before: dict[str, t.Any], after: dict[str, t.Any]) -> None:
        self.changed = True
        self.diff = {"before": before, "after": after}


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            **_oneapi.connection_argument_spec(),
            "name": {"type": "str", "default": "root", "aliases": ["username"]},
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
            "password": {"type": "str", "no_log": True},
            "password_policy": {"type": "str", "choices": ["always", "on_create"], "default": "always", "no_log": False},
            "password_previous": {"type": "list", "elements": "str", "no_log": True},
            "return_access_token": {"type": "bool", "default": False, "no_log": False},
        },
        required_if=[("state", "present", ["password"]), ("state", "absent", ["access_token"]), ("password_policy", "on_create", ["access_token"])],
        supports_check_mode=True,
    )
    # the whole world knows it, and masking it would blank out any value that happens to hold these digits
    module.no_log_values.discard(_FRESH)
    result: dict[str, t.Any] = {}
    user = None
    try:
        _oneapi_plan.check_user(module.params["name"], module.params["password"])
        user = User(module, _oneapi.Client.from_module(module, username=module.params["name"], password=""))
        if module.params["state"] == "absent":
            user.absent()
        else:
            user.present()
            result["verified"] = user.verified
            if module.params["return_access_token"]:
                token = user.access_token()
                if token:
                    result["access_token"] = token
    except (_oneapi.OneApiError, _oneapi_plan.Fault) as exc:
        module.fail_json(msg=str(exc))
    if module._diff:
        result["diff"] = user.diff
    module.exit_json(changed=user.changed, requests=user.client.requests, **result)


if __name__ == "__main__":
    main()
