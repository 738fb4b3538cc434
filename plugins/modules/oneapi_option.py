#!/usr/bin/python

# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: oneapi_option
short_description: Set options of One-API
version_added: 1.0.0
description:
  - Sets options of the management API (C(/api/option/)) that differ from what is wanted. Options that are not named stay as they are.
  - Values are compared by their meaning, so that V(500), V("500") and V(500.0) are the same, as are mappings in any order.
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
      - Secret values are masked.
  idempotent:
    support: partial
    details:
      - One-API never shows options whose name ends in C(Token) or C(Secret), so they are written in each run unless O(hidden_policy=never).
options:
  options:
    description:
      - Option names with their values. Truth values, numbers, strings, mappings and lists are accepted and sent as the strings that One-API takes.
      - C(ModelRatio), C(GroupRatio) and C(CompletionRatio) are mappings of names to numbers. Given names are merged over what is stored;
        names that are left out stay.
      - Values of options whose name ends in C(Token), C(Secret) or C(SecretKey) are kept out of all output.
    type: dict
    required: true
  hidden_policy:
    description: Whether options that One-API never shows (see above) are written in each run or left alone.
    type: str
    choices: [always, never]
    default: always
  allow_unknown:
    description: Whether an option that One-API does not list may be set. It would store a misspelt one all the same, without effect.
    type: bool
    default: false
notes:
  - After a change the options are read once more, since One-API replaces mappings whole and a run at the same time may have undone it.
  - The credentials must be those of a root user.
  - With several One-API nodes and no memory cache, the other nodes read options only when they start.
author:
  - selfhosted.fastgpt contributors (@selfhosted)
"""

EXAMPLES = r"""
- name: Close the registration, which is open by default
  selfhosted.fastgpt.oneapi_option:
    url: http://127.0.0.1:3000
    access_token: "{{ oneapi_root_access_token }}"
    options:
      RegisterEnabled: false
      PasswordRegisterEnabled: false

- name: Retry once on another channel, and price two models
  selfhosted.fastgpt.oneapi_option:
    url: http://127.0.0.1:3000
    username: root
    password: "{{ oneapi_root_password }}"
    options:
      RetryTimes: 1
      ModelRatio:
        chatglm2-6b: 1
        m3e-large: 0.1
"""

RETURN = r"""
set:
  description: Names of the options that were set.
  returned: always
  type: list
  elements: str
  sample: [RegisterEnabled]
requests:
  description: Number of HTTP requests that the task made.
  returned: always
  type: int
  sample: 2
"""

import typing as t

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.selfhosted.fastgpt.plugins.module_utils import _oneapi, _oneapi_plan

_ROUNDS = 4


def _shown(key: str, text: str | None) -> t.Any:
    if _oneapi_plan.option_secret(key):
        return "not readable" if _oneapi_plan.option_hidden(key) and text is None else _oneapi_plan.MASK
    if text is not None and key in _oneapi_plan.RATIO_KEYS:
        return _oneapi_plan.parsed(text)
    return text


def _reconcile(module: AnsibleModule, client: _oneapi.Client, result: dict[str, t.Any]) -> None:
    wanted = {str(key): _oneapi_plan.option_wanted(str(key), value) for key, value in module.params["options"].items()}
    for attempt in range(_ROUNDS):
        stored = client.options()
        if not module.params["allow_unknown"]:
            faults = [remark for remark in (_oneapi_plan.unknown_option(key, list(stored)) for key in wanted) if remark]
            if faults:
                raise _oneapi_plan.Fault("; ".join(faults) + ". Correct the name, or set allow_unknown")
        # What is hidden cannot be looked at, so it is written in the first round only.
        hidden_too = attempt == 0 and module.params["hidden_policy"] == "always"
        todo = [
            (key, _oneapi_plan.option_text(value, stored.get(key)))
            for key, value in sorted(wanted.items(), key=_oneapi_plan.option_order)
            if (hidden_too if _oneapi_plan.option_hidden(key) else not _oneapi_plan.option_matches(value, stored.get(key)))
        ]
        if attempt == 0:
            result["diff"] = {"before": {key: _shown(key, stored.get(key)) for key, _text in todo}, "after": {key: _shown(key, text) for key, text in todo}}
            if module.check_mode:
                if todo:
                    client.make_sure()
                result["set"] = [key for key, _text in todo]
                return
        if not todo:
            return
        for key, text in todo:
            try:
                client.put("/api/option/", {"key": key, "value": text})
            except _oneapi.Refused as exc:
                raise _oneapi.OneApiError(f"option {key}: {exc}") from exc
            if key not in result["set"]:
                result["set"].append(key)
    # A mapping is replaced whole, so a run at the same time can undo what this one merged.
    raise _oneapi.OneApiError(f"options {', '.join(key for key, _text in todo)}: do not stay as they were set. Does another run change them?")


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            **_oneapi.argument_spec(),
            "options": {"type": "dict", "required": True},
            "hidden_policy": {"type": "str", "choices": ["always", "never"], "default": "always"},
            "allow_unknown": {"type": "bool", "default": False},
        },
        required_one_of=[("access_token", "password")],
        supports_check_mode=True,
    )
    for key, value in module.params["options"].items():
        if _oneapi_plan.option_secret(str(key)) and isinstance(value, str) and value:
            module.no_log_values.add(value)
    result: dict[str, t.Any] = {"set": []}
    client = None
    try:
        client = _oneapi.Client.from_module(module)
        _reconcile(module, client, result)
    except (_oneapi.OneApiError, _oneapi_plan.Fault) as exc:
        module.fail_json(msg=str(exc), changed=bool(result["set"]), set=result["set"], requests=client.requests if client else 0)
    if not module._diff:
        result.pop("diff", None)
    module.exit_json(changed=bool(result["set"]), requests=client.requests, **result)


if __name__ == "__main__":
    main()
