#!/usr/bin/python

# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: oneapi_channel
short_description: Reconcile the channels of One-API
version_added: 1.0.0
description:
  - Brings a list of channels, which are the upstream model servers of One-API, to the wanted state in one task.
  - One-API itself knows no unique names. This module does. Of several channels with one name the oldest stays, the others are deleted.
  - It reads all channels in one request and writes only those that differ, so a converged run costs three requests for any number of channels.
  - A channel that was created without its routes (One-API writes them in a second step, which may fail) is mended.
extends_documentation_fragment:
  - selfhosted.fastgpt._attributes
  - selfhosted.fastgpt._attributes.action_group
  - selfhosted.fastgpt._oneapi
  - selfhosted.fastgpt._oneapi.login
attributes:
  check_mode:
    support: full
    details:
      - Keys are not compared in check mode, since One-API shows a key only in the answer to a write.
  diff_mode:
    support: full
    details:
      - Shows the channels that change, without keys.
  idempotent:
    support: full
options:
  channels:
    description:
      - The wanted channels. An option that is left out of an existing channel stays as it is there, unless it has a default.
    type: list
    elements: dict
    required: true
    suboptions:
      name:
        description: Name, unique in this list and on the server.
        type: str
        required: true
      state:
        description: V(absent) deletes all channels of this name.
        type: str
        choices: [present, absent]
        default: present
      type:
        description:
          - Channel type as One-API numbers them.
          - V(8) (custom) is right for every OpenAI-compatible server in the site, in each version.
        type: int
        default: 8
      base_url:
        description:
          - Root of the upstream as the One-API process reaches it. In a container V(localhost) is the container.
          - For types 1 and 8 without C(/v1), since One-API adds the whole path of the client's request. Trailing slashes are removed.
        type: str
      key:
        description:
          - Key that One-API sends to the upstream. Needed to create a channel; give any text, such as V(no-key-needed), where the upstream
            asks for none.
          - See O(key_policy) for when it is written.
        type: str
      models:
        description: Model names that clients may ask for. Blanks around them and repetitions are removed. Needed unless O(channels[].state=absent).
        type: list
        elements: str
      group:
        description: User groups that may use it, separated by commas, 32 characters in all.
        type: str
        default: default
      priority:
        description: Channels of higher priority are used first.
        type: int
        default: 0
      enabled:
        description:
          - Whether it serves requests.
          - With V(true) a channel that One-API itself switched off after errors is switched on again.
        type: bool
        default: true
      model_mapping:
        description: Model names of clients, each with the name that is sent upstream. V({}) removes it.
        type: dict
      config:
        description: Settings of special channel types, such as C(region) or C(api_version).
        type: dict
      system_prompt:
        description: A system message to put before each conversation (One-API v0.6.9 or newer). An empty string removes it.
        type: str
  purge:
    description: Whether channels that O(purge_pattern) matches and O(channels) does not name are deleted.
    type: bool
    default: false
  purge_pattern:
    description:
      - Regular expression that a channel's whole name must match to be ours to delete.
      - By default names with an C(@) in them, as the filter P(selfhosted.fastgpt.oneapi_channels#filter) makes them (V(model@host)).
    type: str
    default: .+@.+
  key_policy:
    description:
      - V(on_create) writes keys of new channels only.
      - V(always) also compares the key of each existing channel and writes it where it differs. One-API shows a key only in the answer to an
        update, so this costs a request per channel, each of which rebuilds the channel's routes.
    type: str
    choices: [on_create, always]
    default: on_create
notes:
  - With a memory cache or Redis One-API routes to new and changed channels after its next synchronisation (E(SYNC_FREQUENCY), 600 seconds
    by default). With Redis its list of routed models is as old, so that a channel that changed its models may be mended once more by the
    next run within that time.
author:
  - selfhosted.fastgpt contributors (@selfhosted)
seealso:
  - module: selfhosted.fastgpt.oneapi_token
"""

EXAMPLES = r"""
- name: Route two local models
  selfhosted.fastgpt.oneapi_channel:
    url: http://127.0.0.1:3000
    access_token: "{{ oneapi_root_access_token }}"
    channels:
      - name: chatglm2-6b@gpu-1
        base_url: http://gpu-1:8000
        key: "{{ chatglm_key }}"
        models: [chatglm2-6b, gpt-3.5-turbo]
        model_mapping:
          gpt-3.5-turbo: chatglm2-6b
      - name: m3e-large@gpu-1
        base_url: http://gpu-1:6200
        key: "{{ m3e_key }}"
        models: [m3e-large]

- name: Make the channels of this site exactly those of the inventory, and bring changed keys up to date
  selfhosted.fastgpt.oneapi_channel:
    url: https://oneapi.example.com
    ca_path: /etc/ssl/certs/site-ca.pem
    username: root
    password: "{{ oneapi_root_password }}"
    channels: "{{ endpoints | selfhosted.fastgpt.oneapi_channels }}"
    purge: true
    key_policy: always

- name: Remove a channel by its name
  selfhosted.fastgpt.oneapi_channel:
    url: http://127.0.0.1:3000
    access_token: "{{ oneapi_root_access_token }}"
    channels:
      - name: old-upstream
        state: absent
"""

RETURN = r"""
created:
  description: Names of the channels that were created.
  returned: always
  type: list
  elements: str
  sample: [m3e-large@gpu-1]
updated:
  description: Names of the channels that were changed or mended.
  returned: always
  type: list
  elements: str
  sample: []
deleted:
  description: Names and ids of the channels that were deleted.
  returned: always
  type: list
  elements: dict
  sample:
    - {id: 7, name: old@gpu-1}
  contains:
    id:
      description: Id of the channel.
      type: int
    name:
      description: Name of the channel.
      type: str
channels:
  description: Id of each wanted channel by name; a channel that check mode only foresees is missing.
  returned: success
  type: dict
  sample: {m3e-large@gpu-1: 3}
requests:
  description: Number of HTTP requests that the task made.
  returned: always
  type: int
  sample: 3
"""

import re
import typing as t

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.selfhosted.fastgpt.plugins.module_utils import _oneapi, _oneapi_plan

_ROUNDS = 4
_ERRORS_PER_ROUND = 10


class Channels:
    """Reads, plans, carries out, and does so again while an answer was lost, refused, or another run interfered."""

    def __init__(self, module: AnsibleModule, client: _oneapi.Client) -> None:
        self.module = module
        self.client = client
        self.always = module.params["key_policy"] == "always"
        self.created: list[str] = []
        self.updated: list[str] = []
        self.deleted: list[dict[str, t.Any]] = []
        self.ids: dict[str, int] = {}
        self.diff: dict[str, t.Any] = {"before": {}, "after": {}}

    def result(self) -> dict[str, t.Any]:
        return {
            "changed": bool(self.created or self.updated or self.deleted),
            "created": sorted(set(self.created)),
            "updated": sorted(set(self.updated)),
            "deleted": self.deleted,
            "requests": self.client.requests,
        }

    def run(self) -> None:
        self.client.identify()
        wanted = _oneapi_plan.normalise_channels(self.module.params["channels"], self.client.version)
        rewrite: set[str] = set()
        errors: dict[str, str] = {}
        for round_number in range(_ROUNDS):
            rows = self.client.channels()
            routeless = self._routeless(rows, wanted) if round_number == 0 else set()
            plan = self._plan(rows, wanted, rewrite, routeless)
            self.ids = {name: int(row["id"]) for name, row in plan.kept.items()}
            self._check_keys(plan)
            if round_number == 0:
                self.diff = plan.diff()
                if self.module.check_mode:
                    self._foresee(plan)
                    return
            if not plan and not (self.always and round_number == 0):
                return
            errors = {}
            self._apply(plan, rewrite, errors)
            if self.always and round_number == 0:
                self._compare_keys(plan, wanted, errors)
            # A creation tells no id, and a run at the same time may have made the same channel: look again.
            if not errors and not plan.creates:
                return
        if errors:
            raise _oneapi.OneApiError("; ".join(f"channel {name}: {text}" for name, text in sorted(errors.items())))

    def _plan(self, rows: list[dict[str, t.Any]], wanted: list[dict[str, t.Any]], rewrite: set[str], routeless: set[str]) -> _oneapi_plan.ChannelPlan:
        return _oneapi_plan.plan_channels(
            rows,
            wanted,
            purge=self.module.params["purge"],
            purge_pattern=self.module.params["purge_pattern"],
            rewrite=rewrite,
            routeless=routeless,
        )

    @staticmethod
    def _check_keys(plan: _oneapi_plan.ChannelPlan) -> None:
        for channel in plan.creates:
            if not channel["key"]:
                raise _oneapi_plan.Fault(f"channel {channel['name']}: key: is needed to create it. Give the upstream's key, or any text where it asks for none")

    def _foresee(self, plan: _oneapi_plan.ChannelPlan) -> None:
        if plan:
            self.client.make_sure()
        self.created = [channel["name"] for channel in plan.creates]
        self.updated = [row["name"] for row, _changes in plan.updates]
        self.deleted = [{"id": row["id"], "name": row.get("name")} for row in plan.deletes]

    def _routeless(self, rows: list[dict[str, t.Any]], wanted: list[dict[str, t.Any]]) -> set[str]:
        """Channels that are enabled but for which the server routes nothing: their routes were never written."""
        rows_by_name = {row.get("name"): row for row in reversed(rows)}
        candidates = []
        for channel in wanted:
            row = rows_by_name.get(channel["name"])
            if row is None or channel["state"] == "absent" or channel["status"] != _oneapi_plan.ENABLED:
                continue
            if not _oneapi_plan.channel_changes(row, channel):
                candidates.append(channel)
        if not candidates:
            return set()
        served = self.client.available_models()
        if served is None:
            return set()
        suspects = [channel for channel in candidates if not served.issuperset(channel["models"])]
        if not suspects:
            return set()
        # The list is for the group of the asking user.
        group = str((self.client.get("/api/user/self") or {}).get("group") or "default")
        return {channel["name"] for channel in suspects if group in channel["group"].split(",")}

    def _apply(self, plan: _oneapi_plan.ChannelPlan, rewrite: set[str], errors: dict[str, str]) -> None:
        for row, changes in plan.updates:
            if len(errors) >= _ERRORS_PER_ROUND:
                return
            if self._update(row, changes, rewrite, errors) is not None:
                rewrite.discard(row["name"])
        for channel in plan.creates:
            if len(errors) >= _ERRORS_PER_ROUND:
                return
            name = channel["name"]
            try:
                self.client.post("/api/channel/", _oneapi_plan.channel_body(channel))
                rewrite.discard(name)
                self.created.append(name)
            except (_oneapi.LostAnswer, _oneapi.Refused) as exc:
                # The row may be there, with or without routes: the next round finds out and writes it whole.
                errors[name] = str(exc)
                rewrite.add(name)
                self.created.append(name)
                if isinstance(exc, _oneapi.LostAnswer):
                    self.client.settle()
        for row in plan.deletes:
            if len(errors) >= _ERRORS_PER_ROUND:
                return
            try:
                self.client.delete(f"/api/channel/{int(row['id'])}")
                self.deleted.append({"id": row["id"], "name": row.get("name")})
            except _oneapi.Refused as exc:
                errors[str(row.get("name"))] = str(exc)

    def _update(
        self, row: dict[str, t.Any], changes: dict[str, t.Any], rewrite: set[str], errors: dict[str, str], count: bool = True
    ) -> dict[str, t.Any] | None:
        name = row["name"]
        try:
            answer = self.client.put("/api/channel/", {"id": row["id"], **changes})
        except _oneapi.Refused as exc:
            errors[name] = str(exc)
            rewrite.add(name)
            return None
        if not isinstance(answer, dict):
            answer = {}
        if row.get("created_time") and not answer.get("created_time"):
            # The channel is gone. One-API says yes all the same, echoes the body and writes routes that lead nowhere.
            self.client.delete(f"/api/channel/{int(row['id'])}")
            errors[name] = f"was deleted by someone else while it was updated (id {row['id']})"
            return None
        if count:
            self.updated.append(name)
        return answer

    def _compare_keys(self, plan: _oneapi_plan.ChannelPlan, wanted: list[dict[str, t.Any]], errors: dict[str, str]) -> None:
        keys = {channel["name"]: channel["key"] for channel in wanted if channel["state"] == "present" and channel["key"]}
        written = {row["name"] for row, changes in plan.updates if "key" in changes}
        unused: set[str] = set()
        for name, row in plan.kept.items():
            if name not in keys or name in written or name in errors:
                continue
            answer = self._update(row, {}, unused, errors, count=False)
            if answer is not None and answer.get("key") != keys[name]:
                self._update(row, {"key": keys[name]}, unused, errors)
                for side, text in (("before", "another"), ("after", _oneapi_plan.MASK)):
                    self.diff[side].setdefault(name, _oneapi_plan.channel_shown(row))["key"] = text


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            **_oneapi.argument_spec(),
            "channels": {
                "type": "list",
                "elements": "dict",
                "required": True,
                "options": {
                    "name": {"type": "str", "required": True},
                    "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
                    "type": {"type": "int", "default": 8},
                    "base_url": {"type": "str"},
                    "key": {"type": "str", "no_log": True},
                    "models": {"type": "list", "elements": "str"},
                    "group": {"type": "str", "default": "default"},
                    "priority": {"type": "int", "default": 0},
                    "enabled": {"type": "bool", "default": True},
                    "model_mapping": {"type": "dict"},
                    "config": {"type": "dict", "no_log": True},
                    "system_prompt": {"type": "str"},
                },
                "required_if": [("state", "present", ["models"])],
            },
            "purge": {"type": "bool", "default": False},
            "purge_pattern": {"type": "str", "default": ".+@.+"},
            "key_policy": {"type": "str", "choices": ["on_create", "always"], "default": "on_create", "no_log": False},
        },
        required_one_of=[("access_token", "password")],
        supports_check_mode=True,
    )
    channels = None
    try:
        try:
            re.compile(module.params["purge_pattern"])
        except re.error as exc:
            raise _oneapi_plan.Fault(f"purge_pattern: is not a regular expression ({exc})") from exc
        channels = Channels(module, _oneapi.Client.from_module(module))
        channels.run()
    except (_oneapi.OneApiError, _oneapi_plan.Fault) as exc:
        module.fail_json(msg=str(exc), **(channels.result() if channels else {}))
    result = channels.result()
    result["channels"] = channels.ids
    if module._diff:
        result["diff"] = channels.diff
    module.exit_json(**result)


if __name__ == "__main__":
    main()
