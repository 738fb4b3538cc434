#!/usr/bin/python

# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: oneapi_token
short_description: Manage a relay token of One-API
version_added: 1.0.0
description:
  - Creates, changes or deletes one relay token (C(sk-...)), with which clients such as FastGPT ask One-API for models.
  - One-API itself knows no unique names. This module does. Of several tokens with one name the oldest stays, whose key it returns,
    and the others are deleted.
  - Tokens belong to the user whose credentials are given.
extends_documentation_fragment:
  - selfhosted.fastgpt._attributes
  - selfhosted.fastgpt._attributes.action_group
  - selfhosted.fastgpt._oneapi
  - selfhosted.fastgpt._oneapi.login
attributes:
  check_mode:
    support: full
  diff_mode:
    support: full
    details:
      - Shows the token without its key.
  idempotent:
    support: full
options:
  name:
    description: Name of the token, up to 30 bytes in UTF-8.
    type: str
    required: true
  state:
    description: V(absent) deletes all tokens of this name.
    type: str
    choices: [present, absent]
    default: present
  models:
    description:
      - Exactly the models that the token may use. An empty list allows all.
      - Left out, an existing token keeps what it has and a new one may use all.
    type: list
    elements: str
  unlimited_quota:
    description: Whether the token has no limit of its own. The quota of its user still counts.
    type: bool
    default: true
  remain_quota:
    description: Quota left, in One-API's units, for a token that is not unlimited. See O(quota_policy) for when it is written.
    type: int
  quota_policy:
    description:
      - V(on_create) writes O(remain_quota) to a new token and to one that was unlimited until now, since requests use it up.
      - V(always) fills it up to that figure in each run.
    type: str
    choices: [on_create, always]
    default: on_create
  expired_time:
    description: When it expires, in seconds since 1970. V(-1) is never.
    type: int
    default: -1
  subnets:
    description:
      - Networks in CIDR notation from which it may be used. An empty list allows all. Left out, it stays as it is.
      - One-API believes the header C(X-Forwarded-For), so this protects only behind a proxy that sets it.
    type: list
    elements: str
  enabled:
    description:
      - Whether it may be used.
      - A token that One-API marked as used up or expired is enabled only where its quota or time allow it by now.
    type: bool
    default: true
author:
  - selfhosted.fastgpt contributors (@selfhosted)
seealso:
  - module: selfhosted.fastgpt.oneapi_channel
"""

EXAMPLES = r"""
- name: Let FastGPT use its two models and nothing else
  selfhosted.fastgpt.oneapi_token:
    url: http://127.0.0.1:3000
    access_token: "{{ oneapi_root_access_token }}"
    name: fastgpt
    models: [chatglm2-6b, m3e-large]
  register: fastgpt_token
  # The result holds the key.
  no_log: true

- name: Write the key where the client reads it
  ansible.builtin.copy:
    content: "CHAT_API_KEY={{ fastgpt_token.key }}\n"
    dest: /etc/fastgpt.env
    mode: "0600"

- name: Keep the key in a vault file beside the inventory, written only where it is another
  ansible.builtin.copy:
    content: "{{ {'vault_fastgpt_key': fastgpt_token.key} | ansible.builtin.to_json | ansible.builtin.vault(vault_password) }}"
    dest: "{{ inventory_dir }}/group_vars/all/vault_fastgpt_key.yml"
    mode: "0600"
    # Else the copy would hold the key in clear.
    decrypt: false
  delegate_to: localhost
  become: false
  no_log: true
  when: fastgpt_token.key != vault_fastgpt_key | default('')

- name: Give a colleague a limited token until the end of 2026
  selfhosted.fastgpt.oneapi_token:
    url: http://127.0.0.1:3000
    username: root
    password: "{{ oneapi_root_password }}"
    name: trial
    unlimited_quota: false
    remain_quota: 500000
    expired_time: 1798761600
    subnets: [10.0.0.0/8]
  no_log: true

- name: Remove it
  selfhosted.fastgpt.oneapi_token:
    url: http://127.0.0.1:3000
    access_token: "{{ oneapi_root_access_token }}"
    name: trial
    state: absent
"""

RETURN = r"""
key:
  description:
    - The key that clients send, C(sk-) included. It is a secret, so set C(no_log) on the task. It stands nowhere else in the result.
    - Missing where check mode only foresees the token.
  returned: O(state=present) and the token exists
  type: str
  sample: sk-VALUE
id:
  description: Id of the token.
  returned: O(state=present) and the token exists
  type: int
  sample: 3
token:
  description: The token as One-API has it after the task, or would have it in check mode, without its key.
  returned: O(state=present)
  type: dict
  sample: {expired_time: -1, models: [m3e-large], name: fastgpt, remain_quota: 0, status: 1, subnets: [], unlimited_quota: true}
requests:
  description: Number of HTTP requests that the task made.
  returned: always
  type: int
  sample: 2
"""

import time
import typing as t

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.selfhosted.fastgpt.plugins.module_utils import _oneapi, _oneapi_plan

_ROUNDS = 5


class Token:
    """Reads, compares, writes, and looks again while an answer was lost, refused, or another run interfered."""

    def __init__(self, module: AnsibleModule, client: _oneapi.Client) -> None:
        self.module = module
        self.client = client
        self.changed = False
        self.diff: dict[str, t.Any] = {"before": {}, "after": {}}
        self.row: dict[str, t.Any] | None = None

    def rows(self, name: str) -> list[dict[str, t.Any]]:
        return [row for row in self.client.tokens() if row.get("name") == name]

    def absent(self, name: str) -> None:
        error = ""
        for round_number in range(_ROUNDS):
            found = self.rows(name)
            if round_number == 0:
                self.diff = {"before": self._shown(found), "after": {}}
                self.changed = bool(found)
                if found and self.module.check_mode:
                    self.client.make_sure()
                    return
            if not found:
                return
            error = self._delete(found)
        raise _oneapi.OneApiError(f"token {name}: {error}")

    def present(self, wanted: dict[str, t.Any]) -> None:
        error = ""
        for round_number in range(_ROUNDS):
            found = self.rows(wanted["name"])
            row = found[0] if found else None
            changes = _oneapi_plan.token_changes(row, wanted) if row else {}
            status = _oneapi_plan.token_status(row, changes, wanted, time.time()) if row else None
            if row and status is None and wanted["enabled"] and row.get("status") != _oneapi_plan.ENABLED and round_number == 0:
                self.module.warn(
                    f"token {wanted['name']} stays out of use: its quota is used up or its time is over. "
                    "Give remain_quota with quota_policy=always, or another expired_time"
                )
            todo = row is None or bool(changes) or status is not None or len(found) > 1
            if round_number == 0:
                self.changed = todo
                self._set_diff(found, changes, status, wanted)
                if self.module.check_mode:
                    if todo:
                        self.client.make_sure()
                    self.row = {**row, **changes, **({} if status is None else {"status": status})} if row else None
                    return
            if not todo:
                self.row = row
                return
            self.changed = True
            error = self._write(row, found[1:], changes, status, wanted)
        raise _oneapi.OneApiError(f"token {wanted['name']}: {error or 'does not come to rest, does another run change it?'}")

    def _write(
        self,
        row: dict[str, t.Any] | None,
        surplus: list[dict[str, t.Any]],
        changes: dict[str, t.Any],
        status: int | None,
        wanted: dict[str, t.Any],
    ) -> str:
        """One attempt; returns what went wrong. The caller reads again in any case, so nothing is repeated blindly."""
        try:
            if row is None:
                self.client.post("/api/token/", _oneapi_plan.token_body(wanted))
                return ""
            if changes:
                if not row.get("unlimited_quota") and "remain_quota" not in changes:
                    # Requests use the quota up, and the PUT writes it back: read it as late as possible.
                    row = next((item for item in self.rows(wanted["name"]) if item["id"] == row["id"]), None)
                    if row is None:
                        return "was deleted by someone else while it was changed"
                self.client.put("/api/token/", _oneapi_plan.token_replacement(row, changes))
            if status is not None:
                self.client.put("/api/token/?status_only=true", {"id": row["id"], "status": status})
        except (_oneapi.LostAnswer, _oneapi.Refused) as exc:
            if isinstance(exc, _oneapi.LostAnswer):
                self.client.settle()
            return str(exc)
        return self._delete(surplus)

    def _delete(self, rows: list[dict[str, t.Any]]) -> str:
        error = ""
        for row in rows:
            try:
                self.client.delete(f"/api/token/{int(row['id'])}")
            except _oneapi.Refused as exc:
                # Another run, or an attempt of ours whose answer was lost, may have been first.
                error = str(exc)
        return error

    def _set_diff(self, found: list[dict[str, t.Any]], changes: dict[str, t.Any], status: int | None, wanted: dict[str, t.Any]) -> None:
        if found:
            after = {**found[0], **changes, **({} if status is None else {"status": status})}
        else:
            after = {**_oneapi_plan.token_body(wanted), "status": _oneapi_plan.ENABLED if wanted["enabled"] else _oneapi_plan.DISABLED}
        self.diff = {"before": self._shown(found), "after": self._shown([after])}

    @staticmethod
    def _shown(rows: list[dict[str, t.Any]]) -> dict[str, t.Any]:
        if not rows:
            return {}
        shown = _oneapi_plan.token_shown(rows[0])
        if len(rows) > 1:
            shown["duplicates"] = [row["id"] for row in rows[1:]]
        return shown


def _key(client: _oneapi.Client, row: dict[str, t.Any]) -> str:
    key = row.get("key")
    if not key or "*" in key:
        raise _oneapi.OneApiError(f"token {row.get('name')}: {client.url} does not tell its key, so this is no One-API that the modules know")
    return f"sk-{key}"


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            **_oneapi.argument_spec(),
            "name": {"type": "str", "required": True},
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
            "models": {"type": "list", "elements": "str"},
            "unlimited_quota": {"type": "bool", "default": True},
            "remain_quota": {"type": "int"},
            "quota_policy": {"type": "str", "choices": ["on_create", "always"], "default": "on_create"},
            "expired_time": {"type": "int", "default": -1},
            "subnets": {"type": "list", "elements": "str"},
            "enabled": {"type": "bool", "default": True},
        },
        required_one_of=[("access_token", "password")],
        supports_check_mode=True,
    )
    result: dict[str, t.Any] = {}
    token = None
    try:
        wanted = _oneapi_plan.normalise_token(module.params)
        client = _oneapi.Client.from_module(module)
        token = Token(module, client)
        if module.params["state"] == "absent":
            token.absent(wanted["name"])
        else:
            token.present(wanted)
            result["token"] = token.diff["after"]
            if token.row:
                result["key"] = _key(client, token.row)
                result["id"] = token.row["id"]
                result["token"] = _oneapi_plan.token_shown(token.row)
    except (_oneapi.OneApiError, _oneapi_plan.Fault) as exc:
        module.fail_json(msg=str(exc), changed=bool(token and token.changed))
    if module._diff:
        result["diff"] = token.diff
    module.exit_json(changed=token.changed, requests=token.client.requests, **result)


if __name__ == "__main__":
    main()
