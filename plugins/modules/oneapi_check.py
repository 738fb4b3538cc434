#!/usr/bin/python

# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: oneapi_check
short_description: Prove that One-API relays to every model
version_added: 1.0.0
description:
  - Asks One-API with a client's token, as FastGPT does, for the list of models, one embedding of each embedding model, and an answer of each chat model,
    as a whole and as a stream. A stream is read to its end, since errors come inside streams of status C(200).
  - Looks whether a wrong token and the password of a fresh One-API are refused.
extends_documentation_fragment:
  - selfhosted.fastgpt._attributes
  - selfhosted.fastgpt._attributes.action_group
  - selfhosted.fastgpt._checks
  - selfhosted.fastgpt._checks.service
attributes:
  check_mode:
    support: full
    details:
      - Changes nothing in any mode, so it asks in check mode too.
options:
  key:
    description: Token of a client (C(sk-...)).
    type: str
    required: true
  models:
    description: The models that the token must reach, and no others.
    type: list
    elements: dict
    required: true
    suboptions:
      model:
        description: Name of the model.
        type: str
        required: true
      kind:
        description: What the model does.
        type: str
        required: true
        choices: [chat, embedding]
      dimensions:
        description: Length that the vectors of an embedding model must have. If left out, any length is right.
        type: int
  default_login:
    description:
      - Whether to try the password of a fresh One-API, which must be refused.
      - One-API allows 20 log-ins in 20 minutes per client address; this takes one of them.
    type: bool
    default: true
  label:
    default: gateway
author:
  - selfhosted.fastgpt contributors (@selfhosted)
"""

EXAMPLES = r"""
- name: Ask the gateway with the token that FastGPT has
  selfhosted.fastgpt.oneapi_check:
    url: http://10.0.0.4:8000
    key: "{{ fastgpt_gateway_key }}"
    models:
      - {model: Qwen2.5-1.5B-Instruct, kind: chat}
      - {model: M3E-large, kind: embedding, dimensions: 1024}
  register: asked
  failed_when: not asked.ok
"""

RETURN = r"""
checks:
  description: What was asked, in order.
  returned: always
  type: list
  elements: dict
  contains:
    name:
      description: What was asked.
      type: str
    ok:
      description: Whether it is as it should be.
      type: bool
    seconds:
      description: Time that it took.
      type: float
    detail:
      description: What was found, with the remedy where it is red.
      type: str
  sample: [{"name": "gateway embeds with M3E-large", "ok": true, "seconds": 0.31, "detail": "1024 dimensions."}]
ok:
  description: Whether all checks are green.
  returned: always
  type: bool
"""

import functools
import typing as t

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.selfhosted.fastgpt.plugins.module_utils import _checks, _http

_TEXTS = ["什么是副本集？", "A replica set keeps the same data on several hosts."]


class _Gateway:
    def __init__(self, params: dict[str, t.Any], options: _checks.HttpOptions) -> None:
        self.url: str = params["url"]
        self.key: str = params["key"]
        self.models: list[dict[str, t.Any]] = params["models"]
        self.options = options

    def ask(self, method: str, path: str, key: str | None, body: t.Any = None) -> _http.Response:
        return _http.request(method, _checks.join_url(self.url, path), headers=_checks.bearer(key), json=body, **self.options)

    def remedy(self, response: _http.Response, model: str) -> str:
        if response.status == 401 and "one_api_error" not in response.text():
            return f"The model server refuses the key that the channel of {model} holds: run site.yml with oneapi_channels_key_policy=always"
        if response.status == 401:
            return "The token is not the one that One-API holds: run site.yml with --tags oneapi"
        if response.status == 403:
            return "Look at the token's models and quota: run site.yml with --tags oneapi"
        if response.status == 503:
            return f"No channel serves {model}, or its server is down: look at the checks of the model server, then run site.yml with --tags oneapi"
        return f"Look at the checks of the model servers of {model}, then at the log of the container one-api"

    def refuses(self) -> str:
        remedy = "Relay routes must ask for a token: see what stands at this URL (role oneapi)"
        for key, words in ((None, "without a token"), ("sk-" + "0" * 48, "with a wrong token")):
            response = self.ask("GET", "/v1/models", key)
            if response.status != 401:
                raise _checks.CheckError(f"GET /v1/models {words} gave {_checks.answer_of(response)}, not 401", remedy)
        return "Refused with 401."

    def lists(self) -> str:
        response = self.ask("GET", "/v1/models", self.key)
        body = _checks.expect_ok(response, self.remedy(response, "the token"))
        listed = {str(item.get("id")) for item in body.get("data") or [] if isinstance(item, dict)}
        wanted = {model["model"] for model in self.models}
        parts = [
            f"{words}: {', '.join(sorted(names))}" for words, names in (("missing", wanted - listed), ("not in the inventory", listed - wanted)) if names
        ]
        if parts:
            raise _checks.CheckError("; ".join(parts), "Run site.yml with --tags oneapi: channels and token follow from model_servers (role oneapi)")
        return ", ".join(sorted(listed)) + "."

    def default_password(self) -> str:
        response = self.ask("POST", "/api/user/login", None, {"username": "root", "password": "123456"})
        if response.status == 429:
            return "Could not be tried: the limit of log-ins is reached, so nobody can log in from here for some minutes."
        body = _checks.json_object(response, "See what stands at this URL (role oneapi)")
        if body.get("success"):
            raise _checks.CheckError(
                "root can log in with the password of a fresh One-API", "Change it at once: run site.yml with --tags oneapi (oneapi_root_password)"
            )
        return "Refused."

    def embeds(self, model: dict[str, t.Any]) -> str:
        response = self.ask("POST", "/v1/embeddings", self.key, {"model": model["model"], "input": _TEXTS})
        body = _checks.expect_ok(response, self.remedy(response, model["model"]))
        return _checks.check_embeddings(body, len(_TEXTS), model["dimensions"], "Compare the weights with the model's card (role model_server)") + "."

    def question(self, model: str, stream: bool) -> dict[str, t.Any]:
        return {"model": model, "messages": [{"role": "user", "content": "你好"}], "max_tokens": 16, "temperature": 0.01, "stream": stream}

    def answers(self, model: str) -> str:
        response = self.ask("POST", "/v1/chat/completions", self.key, self.question(model, False))
        body = _checks.expect_ok(response, self.remedy(response, model))
        return f"{len(_checks.check_completion(body, self.remedy(response, model)))} characters."

    def streams(self, model: str) -> str:
        remedy = f"Look at the checks of the model servers of {model}, then at the log of the container one-api"
        url = _checks.join_url(self.url, "/v1/chat/completions")
        headers = {**_checks.bearer(self.key), "Accept": "text/event-stream"}
        text, chunks = _checks.read_stream(_http.stream("POST", url, headers=headers, json=self.question(model, True), **self.options), remedy)
        return f"{len(text)} characters in {chunks} chunks."


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "url": {"type": "str", "required": True},
            "key": {"type": "str", "required": True, "no_log": True},
            "models": {
                "type": "list",
                "elements": "dict",
                "required": True,
                "options": {
                    "model": {"type": "str", "required": True},
                    "kind": {"type": "str", "required": True, "choices": ["chat", "embedding"]},
                    "dimensions": {"type": "int"},
                },
            },
            "default_login": {"type": "bool", "default": True},
            "label": {"type": "str", "default": "gateway"},
            **_checks.HTTP_ARGUMENTS,
        },
        required_by={"client_key": "client_cert"},
        supports_check_mode=True,
    )
    gateway, label = _Gateway(module.params, _checks.http_options(module)), module.params["label"]
    checks = _checks.Checks([module.params["key"]])
    checks.run(f"{label} refuses other tokens", gateway.refuses)
    if module.params["default_login"]:
        checks.run(f"{label} refuses the default password", gateway.default_password)
    checks.run(f"{label} lists the models", gateway.lists)
    # The same model on several hosts is one model here.
    for model in {model["model"]: model for model in module.params["models"]}.values():
        name = model["model"]
        if model["kind"] == "embedding":
            checks.run(f"{label} embeds with {name}", functools.partial(gateway.embeds, model))
        else:
            checks.run(f"{label} chats with {name}", functools.partial(gateway.answers, name))
            checks.run(f"{label} streams from {name}", functools.partial(gateway.streams, name))
    module.exit_json(changed=False, ok=checks.ok, checks=checks.results)


if __name__ == "__main__":
    main()
