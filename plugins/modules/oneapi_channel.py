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
  - One-API writes a channel first and the routes to it in a second step, which may fail. A channel that is enabled and of which One-API serves
    some model nowhere is therefore mended, as are routes that lead to a channel that is gone.
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
  removals_only:
    description:
      - Whether channels are only deleted, as O(purge) and O(channels[].state=absent) say, and none is created, changed or mended.
      - For the time before model servers are taken out of service, which is before the new ones stand.
    type: bool
    default: false
  key_policy:
    description:
      - V(on_create) writes keys of new channels only.
      - V(always) also compares the key of each existing channel and writes it where it differs. One-API shows a key only in the answer to an
        update, so this costs a request per channel, each of which rebuilds the channel's routes.
    type: str
    choices: [on_create, always]
    default: on_create
notes:
  - One-API tells only which models it can serve, not by which channels. So a channel without routes goes unseen where other channels serve all
    its models. This module leaves none behind unless it is killed or loses the server, since it switches off what it could not finish, which
    the next run sees. Where a server was killed between its two steps, run once with O(key_policy=always), which writes the routes of all wanted
    channels anew. To have such a channel found in each run, list one model in it that no other channel has, such as the channel's name.
  - Only routes for the group of the asking user can be looked at, which is C(default) for root.
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
orphans:
  description: Models that were routed to a channel that does not exist, which has been put right.
  returned: always
  type: list
  elements: str
  sample: []
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

import dataclasses
import itertools
import re
import typing as t

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.selfhosted.fastgpt.plugins.module_utils import _oneapi, _oneapi_plan

_ROUNDS = 4
_ERRORS_PER_ROUND = 10
_MOST_GAPS = 60


class Channels:
    """Reads, plans, carries out, and does so again while an answer was lost, refused, or another run interfered."""

    def __init__(self, module: AnsibleModule, client: _oneapi.Client) -> None:
        self.module = module
        self.client = client
        self.only_removals = module.params["removals_only"]
        self.always = module.params["key_policy"] == "always" and not self.only_removals
        self.created: list[str] = []
        self.updated: list[str] = []
        self.deleted: list[dict[str, t.Any]] = []
        self.orphans: list[str] = []
        # Rows whose deletion was refused half-way: their routes may be left.
        self.unfinished: dict[int, str] = {}
        self.ids: dict[str, int] = {}
        self.diff: dict[str, t.Any] = {"before": {}, "after": {}}

    def result(self) -> dict[str, t.Any]:
        return {
            "changed": bool(self.created or self.updated or self.deleted or self.orphans),
            "created": sorted(set(self.created)),
            "updated": sorted(set(self.updated)),
            "deleted": self.deleted,
            "orphans": self.orphans,
            "requests": self.client.requests,
        }

    def run(self) -> None:
        self.client.identify()
        wanted = _oneapi_plan.normalise_channels(self.module.params["channels"], self.client.version)
        rewrite: set[str] = set()
        errors: dict[str, str] = {}
        for round_number in range(_ROUNDS + 1):
            first = round_number == 0
            rows = self.client.channels()
            served = self.client.available_models() if first and not self.only_removals else None
            routeless = set() if served is None else self._routeless(rows, wanted, served)
            # An empty list comes back from Redis as one empty name.
            orphans = set() if served is None else served - _oneapi_plan.all_models(rows) - {""}
            plan = self._plan(rows, wanted, rewrite, routeless)
            if self.only_removals:
                plan = dataclasses.replace(plan, creates=[], updates=[])
            self.ids = {name: int(row["id"]) for name, row in plan.kept.items()}
            self._check_keys(plan)
            if first:
                self.diff = plan.diff()
                self._drop_orphans(orphans)
                if self.module.check_mode:
                    self._foresee(plan)
                    return
            if not plan and not self.unfinished and not (self.always and first):
                return
            if round_number == _ROUNDS:
                break
            errors = {}
            self._apply(plan, rewrite, errors)
            if self.always and first:
                self._compare_keys(plan, wanted, rewrite, errors)
            # A creation tells no id, and a run at the same time may have made the same channel: look again.
            if not errors and not plan.creates:
                return
        left_off = self._switch_off(wanted, rewrite)
        text = "; ".join(f"channel {name}: {text}" for name, text in sorted(errors.items()))
        raise _oneapi.OneApiError((text or "channels: do not come to rest. Does another run change them?") + left_off)

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
        self.deleted = [{"id": row["id"], "name": row.get("name")} for row in sorted(plan.deletes, key=lambda row: int(row["id"]))]

    def _routeless(self, rows: list[dict[str, t.Any]], wanted: list[dict[str, t.Any]], served: set[str]) -> set[str]:
        """Channels that are enabled but for which the server routes nothing: their routes were never written."""
        suspects = [
            channel
            for row, channel in _oneapi_plan.pairs(rows, wanted)
            if channel["status"] == _oneapi_plan.ENABLED and not served.issuperset(channel["models"]) and not _oneapi_plan.channel_changes(row, channel)
        ]
        if not suspects:
            return set()
        # The list is for the group of the asking user.
        group = str(self.client.row("/api/user/self").get("group") or "default")
        return {channel["name"] for channel in suspects if group in channel["group"].split(",")}

    def _drop_orphans(self, orphans: set[str]) -> None:
        """Routes that lead to no channel, of which a client gets 503. Deleting a missing id removes its routes.

        Ids above the highest are left alone: a run at the same time may be creating one of them.
        """
        if not orphans:
            return
        rows = self.client.channels()
        orphans = orphans - _oneapi_plan.all_models(rows)
        ids = {int(row["id"]) for row in rows}
        gaps = list(itertools.islice((number for number in range(max(ids, default=0), 0, -1) if number not in ids), _MOST_GAPS))
        left = orphans
        if gaps and not self.module.check_mode:
            for number in gaps:
                try:
                    self.client.delete(f"/api/channel/{number}")
                except _oneapi.Refused:
                    pass  # then they are still listed below
            left = orphans & (self.client.available_models() or set())
        elif gaps:
            left = set()
        self.orphans = sorted(orphans - left)
        if self.orphans:
            self.diff["before"]["routes to no channel"] = self.orphans
        if left:
            self.module.warn(
                f"One-API routes {', '.join(sorted(left))} to a channel that does not exist. With Redis this list is up to SYNC_FREQUENCY old and "
                "mends itself; else delete the rows of the table abilities whose channel_id is not in channels"
            )

    def _switch_off(self, wanted: list[dict[str, t.Any]], unsure: set[str]) -> str:
        """Before giving up: a channel whose row is right and whose routes were refused would look finished to the next run.

        Its row is written as switched off, which is what it is, so that everybody sees it and the next run takes it up.
        """
        left_off = []
        try:
            for row, channel in _oneapi_plan.pairs(self.client.channels(), wanted):
                if channel["name"] not in unsure or channel["status"] != _oneapi_plan.ENABLED or _oneapi_plan.channel_changes(row, channel):
                    continue
                try:
                    self.client.put("/api/channel/", {"id": row["id"], "status": _oneapi_plan.DISABLED})
                except _oneapi.Refused:
                    pass  # the routes again; the row comes first
                left_off.append(channel["name"])
        except _oneapi.OneApiError:
            pass  # what went wrong before is what counts
        return f". Left switched off until a run succeeds: {', '.join(left_off)}" if left_off else ""

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
        self.unfinished.update((int(row["id"]), str(row.get("name"))) for row in plan.deletes)
        for number, name in sorted(self.unfinished.items()):
            if len(errors) >= _ERRORS_PER_ROUND:
                return
            try:
                self.client.delete(f"/api/channel/{number}")
            except _oneapi.Refused as exc:
                errors[name] = str(exc)
                continue
            del self.unfinished[number]
            self.deleted.append({"id": number, "name": name})

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
        if row.get("created_time") and not answer.get("created_time") and row["id"] not in [item["id"] for item in self.client.channels()]:
            # The channel is gone. One-API says yes all the same, echoes the body and writes routes that lead nowhere.
            self.client.delete(f"/api/channel/{int(row['id'])}")
            errors[name] = f"was deleted by someone else while it was updated (id {row['id']})"
            return None
        if count:
            self.updated.append(name)
        return answer

    def _compare_keys(self, plan: _oneapi_plan.ChannelPlan, wanted: list[dict[str, t.Any]], rewrite: set[str], errors: dict[str, str]) -> None:
        keys = {channel["name"]: channel["key"] for channel in wanted if channel["state"] == "present" and channel["key"]}
        written = {row["name"] for row, changes in plan.updates if "key" in changes}
        for name, row in plan.kept.items():
            if name not in keys or name in written or name in errors:
                continue
            answer = self._update(row, {}, rewrite, errors, count=False)
            if answer is not None and answer.get("key") != keys[name]:
                self._update(row, {"key": keys[name]}, rewrite, errors)
                for side, text in (("before", "another"), ("after", _oneapi_plan.MASK)):
                    self.diff[side].setdefault(name, _oneapi_plan.channel_shown(row))["key"] = text


def _strings(value: t.Any) -> t.Iterator[str]:
    if isinstance(value, dict):
        value = [*value, *value.values()]
    if isinstance(value, list):
        for item in value:
            yield from _strings(item)
    else:
        yield str(value)


def _forget_absent_secrets(module: AnsibleModule, result: dict[str, t.Any]) -> None:
    """Ansible looks for each secret in each string that it returns, arguments included: quadratic, 8 s for 5000 channels.

    Keys of the arguments are masked here, and what then occurs nowhere needs no search.
    """
    for channel in module.params["channels"]:
        if channel["key"]:
            channel["key"] = _oneapi_plan.MASK
    text = "\n".join(_strings([result, module.params]))
    module.no_log_values = {secret for secret in module.no_log_values if secret in text}


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
            "removals_only": {"type": "bool", "default": False},
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
    _forget_absent_secrets(module, result)
    module.exit_json(**result)


if __name__ == "__main__":
    main()
