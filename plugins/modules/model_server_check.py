#!/usr/bin/python

# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: model_server_check
short_description: Prove that model servers answer, and only to those who have the key
version_added: 1.0.0
description:
  - Asks every endpoint for its real work, one embedding, one rerank or a few words, since a health route says C(200) on an engine that fails every request.
  - Looks whether the door refuses a request without a key, with a wrong key, and with the right key in another case, and whether other routes are closed.
extends_documentation_fragment:
  - selfhosted.fastgpt._attributes
  - selfhosted.fastgpt._attributes.action_group
  - selfhosted.fastgpt._checks
attributes:
  check_mode:
    support: full
    details:
      - Changes nothing in any mode, so it asks in check mode too.
options:
  endpoints:
    description: The servers to ask.
    type: list
    elements: dict
    required: true
    suboptions:
      name:
        description: Name that the checks get, usually C(model@host).
        type: str
        required: true
      kind:
        description: What the model does.
        type: str
        required: true
        choices: [chat, embedding, rerank]
      model:
        description: Name of the model in requests.
        type: str
        required: true
      url:
        description: URL of the door without a path.
        type: str
        required: true
      key:
        description: Key that the door accepts.
        type: str
        required: true
      dimensions:
        description: Length that the vectors of an embedding model must have. If left out, any length is right.
        type: int
      adapter:
        description: Whether a reranker also answers the form that FastGPT before v4.7 speaks, C(inputs) instead of C(documents).
        type: bool
        default: false
author:
  - selfhosted.fastgpt contributors (@selfhosted)
"""

EXAMPLES = r"""
- name: Ask an embedding server
  selfhosted.fastgpt.model_server_check:
    endpoints:
      - name: M3E-large@gpu-1
        kind: embedding
        model: M3E-large
        url: http://10.0.0.5:8002
        key: "{{ m3e_key }}"
        dimensions: 1024
  register: asked
  failed_when: not asked.ok

- name: Look at two servers without failing, and show what is red
  selfhosted.fastgpt.model_server_check:
    endpoints:
      - {name: chat, kind: chat, model: Qwen2.5-7B-Instruct, url: "https://gpu-1.example.org:8001", key: "{{ chat_key }}"}
      - {name: rerank, kind: rerank, model: bge-reranker-base, url: "https://gpu-1.example.org:8003", key: "{{ rerank_key }}"}
    ca_path: /etc/ssl/certs/site-ca.pem
  register: asked

- name: Show it
  ansible.builtin.debug:
    msg: "{{ asked.checks | rejectattr('ok') }}"
"""

RETURN = r"""
checks:
  description: What was asked, in order.
  returned: always
  type: list
  elements: dict
  contains:
    name:
      description: Name of the endpoint and what was asked.
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
  sample: [{"name": "M3E-large@gpu-1 answers", "ok": true, "seconds": 0.21, "detail": "1024 dimensions."}]
ok:
  description: Whether all checks are green.
  returned: always
  type: bool
"""

import typing as t

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.selfhosted.fastgpt.plugins.module_utils import _checks, _http

_TEXTS = ["什么是副本集？", "A replica set keeps the same data on several hosts."]
_DOCUMENTS = ["The door checks the key of every request.", "巴黎是法国的首都。", "A reranker orders passages by how well they answer a question."]
_ROUTES = {"chat": "/v1/chat/completions", "embedding": "/v1/embeddings", "rerank": "/v1/rerank"}


class _Endpoint:
    def __init__(self, endpoint: dict[str, t.Any], options: _checks.HttpOptions) -> None:
        self.kind: str = endpoint["kind"]
        self.model: str = endpoint["model"]
        self.url: str = endpoint["url"]
        self.key: str = endpoint["key"]
        self.dimensions: int | None = endpoint["dimensions"]
        self.options = options
        self.where = f"role model_server, server {endpoint['name']}"

    def ask(self, method: str, path: str, key: str | None, body: t.Any = None) -> _http.Response:
        return _http.request(method, _checks.join_url(self.url, path), headers=_checks.bearer(key), json=body, **self.options)

    def request(self) -> dict[str, t.Any]:
        if self.kind == "embedding":
            return {"model": self.model, "input": _TEXTS}
        if self.kind == "rerank":
            return {"model": self.model, "query": "What does a reranker do?", "documents": _DOCUMENTS}
        return {"model": self.model, "messages": [{"role": "user", "content": "你好"}], "max_tokens": 8, "temperature": 0.01, "stream": False}

    def guarded(self) -> str:
        """No key, a wrong key and a right key in the wrong case must all be refused, with 401."""
        remedy = f"Run site.yml with --tags model_server: the door must ask for the key on every route ({self.where})"
        swapped = self.key.swapcase()
        wrong = "sk-" + "0" * 48
        tries = [
            ("GET", "/v1/models", None, "without a key"),
            ("GET", "/v1/models", wrong, "with a wrong key"),
            ("POST", _ROUTES[self.kind], None, "without a key"),
            ("POST", _ROUTES[self.kind], wrong, "with a wrong key"),
        ]
        if swapped != self.key:
            tries.append(("POST", _ROUTES[self.kind], swapped, "with the key in the wrong case"))
        for method, path, key, words in tries:
            response = self.ask(method, path, key, self.request() if method == "POST" else None)
            if response.status != 401:
                raise _checks.CheckError(f"{method} {path} {words} gave {_checks.answer_of(response)}, not 401", remedy)
        for path in ("/metrics", "/docs"):
            response = self.ask("GET", path, None)
            if response.status == 200:
                raise _checks.CheckError(f"GET {path} is open to anybody", remedy)
        return f"{len(tries)} requests refused with 401."

    def listed(self) -> str:
        response = self.ask("GET", "/v1/models", self.key)
        remedy = f"Compare model_server_master_key with the one that the door was made with: run site.yml ({self.where})"
        body = _checks.expect_ok(response, remedy)
        names = [item.get("id") for item in body.get("data") or [] if isinstance(item, dict)]
        if self.model not in names:
            raise _checks.CheckError(f"/v1/models lists {', '.join(map(str, names)) or 'nothing'}", f"The server must serve {self.model} ({self.where})")
        return f"{self.model} is listed."

    def answers(self) -> str:
        response = self.ask("POST", _ROUTES[self.kind], self.key, self.request())
        remedy = f"See systemctl status and journalctl of the unit of this model on its host ({self.where})"
        if response.status == 401:
            remedy = f"The door has another key: run site.yml, or correct model_server_master_key ({self.where})"
        body = _checks.expect_ok(response, remedy)
        if self.kind == "embedding":
            return _checks.check_embeddings(body, len(_TEXTS), self.dimensions, f"Compare the weights with the model's card ({self.where})") + "."
        if self.kind == "rerank":
            return _checks.check_rerank(body, len(_DOCUMENTS), remedy) + "."
        return f"{len(_checks.check_completion(body, remedy))} characters."

    def adapted(self) -> str:
        """The form of FastGPT v4.6.8 and v4.6.9, on the same route."""
        remedy = f"See journalctl of the rerank adapter on its host ({self.where})"
        inputs = [{"id": f"id-{index}", "text": text} for index, text in enumerate(_DOCUMENTS)]
        body = _checks.expect_ok(self.ask("POST", _ROUTES["rerank"], self.key, {"query": "What does a reranker do?", "inputs": inputs}), remedy)
        data = body.get("data")
        if not isinstance(data, list) or {item.get("id") for item in data if isinstance(item, dict)} != {item["id"] for item in inputs}:
            raise _checks.CheckError(f"the old form did not give each input a score ({_checks.message_of(body) or 'no data'})", remedy)
        return "inputs and scores in the form of FastGPT before v4.7."


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "endpoints": {
                "type": "list",
                "elements": "dict",
                "required": True,
                "options": {
                    "name": {"type": "str", "required": True},
                    "kind": {"type": "str", "required": True, "choices": ["chat", "embedding", "rerank"]},
                    "model": {"type": "str", "required": True},
                    "url": {"type": "str", "required": True},
                    "key": {"type": "str", "required": True, "no_log": True},
                    "dimensions": {"type": "int"},
                    "adapter": {"type": "bool", "default": False},
                },
            },
            **_checks.HTTP_ARGUMENTS,
        },
        required_by={"client_key": "client_cert"},
        supports_check_mode=True,
    )
    options = _checks.http_options(module)
    checks = _checks.Checks([endpoint["key"] for endpoint in module.params["endpoints"]])
    for item in module.params["endpoints"]:
        endpoint = _Endpoint(item, options)
        checks.run(f"{item['name']} refuses other keys", endpoint.guarded)
        checks.run(f"{item['name']} is listed", endpoint.listed)
        checks.run(f"{item['name']} answers", endpoint.answers)
        if item["adapter"] and item["kind"] == "rerank":
            checks.run(f"{item['name']} answers FastGPT before v4.7", endpoint.adapted)
    module.exit_json(changed=False, ok=checks.ok, checks=checks.results)


if __name__ == "__main__":
    main()
