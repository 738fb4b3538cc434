# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
name: fastgpt_models
short_description: FastGPT model entries for model endpoints
version_added: 1.0.0
author:
  - selfhosted.fastgpt contributors (@selfhosted)
description:
  - One entry of C(config.json) per model name, whatever the number of hosts that serve it. The first entry of a kind is FastGPT's default.
  - The entries hold every field that a version from v4.6.8 to v4.8.19 reads; FastGPT ignores those that it does not know.
  - They also hold what the model card says of the model (C(context), C(dimensions), C(tools)), which
    M(selfhosted.fastgpt.fastgpt_config) checks the other fields against and does not write.
positional: version, overrides
options:
  _input:
    description: Endpoints as P(selfhosted.fastgpt.model_endpoints#filter) gives them, with keys.
    type: list
    elements: dict
    required: true
  version:
    description: FastGPT's version such as V(v4.8.9).
    type: str
    required: true
  overrides:
    description:
      - Model names as keys, dictionaries of fields to set or replace as values. Every field can be set; C(isDefault) puts a model first.
      - Where C(maxContext), C(maxResponse), C(defaultToken) or C(maxToken) is set, the other token figures are made to fit.
    type: dict
    default: {}
"""

EXAMPLES = r"""
- name: Derive the models of config.json
  ansible.builtin.set_fact:
    models: "{{ endpoints | selfhosted.fastgpt.fastgpt_models('v4.8.9', {'M3E-large': {'defaultToken': 400}}) }}"

- name: Write config.json with them
  selfhosted.fastgpt.fastgpt_config:
    path: /etc/selfhosted-fastgpt/fastgpt/config.json
    version: v4.8.9
    llm_models: "{{ models.llm_models }}"
    vector_models: "{{ models.vector_models }}"
    rerank_models: "{{ models.rerank_models }}"
"""

RETURN = r"""
_value:
  description: Entries by kind. Those of rerankers hold a key.
  type: dict
  contains:
    llm_models:
      description: Entries of C(llmModels).
      type: list
      elements: dict
    vector_models:
      description: Entries of C(vectorModels).
      type: list
      elements: dict
    rerank_models:
      description: Entries of C(reRankModels), of which FastGPT uses the first.
      type: list
      elements: dict
"""

import typing as t
from collections.abc import Mapping

from ansible.errors import AnsibleFilterError
from ansible_collections.selfhosted.fastgpt.plugins.plugin_utils._models import is_int, is_list, nearest, shown, version_fault

# The price has two names; both are 0 here, and both are there, so that one entry fits every version.
_FREE = {"inputPrice": 0, "outputPrice": 0, "charsPointsPrice": 0}


Fields = Mapping[str, t.Any]


def _llm(endpoint: Fields, card: Fields, given: Fields) -> dict[str, t.Any]:
    window = card["context"] if is_int(card.get("context")) else 4096
    context = given["maxContext"] if is_int(given.get("maxContext")) else window
    response = card["max_response"] if is_int(card.get("max_response")) else min(context // 4, 4096)
    # An answer gets half of the context at most, passages what is left by half of it and a few tokens for the question.
    response = given["maxResponse"] if is_int(given.get("maxResponse")) else max(1, min(response, context // 2))
    quote = min(max(context // 2 - 48, context // 4), context - response)
    return {
        "context": window,
        "tools": bool(card.get("tool_choice", False)),
        "maxContext": context,
        "maxResponse": response,
        "quoteMaxToken": max(1, quote),
        "maxTemperature": card.get("max_temperature", 1.2),
        "censor": False,
        "vision": False,
        "datasetProcess": True,
        "usedInClassify": True,
        "usedInExtractFields": True,
        "usedInToolCall": True,
        "usedInQueryExtension": True,
        # Where the engine offers no tools, FastGPT asks by prompt.
        "toolChoice": bool(card.get("tool_choice", False)),
        "functionCall": False,
        "customCQPrompt": "",
        "customExtractPrompt": "",
        "defaultSystemChatPrompt": "",
        "defaultConfig": {},
    }


def _vector(endpoint: Fields, card: Fields, given: Fields) -> dict[str, t.Any]:
    context = card["context"] if is_int(card.get("context")) else 512
    chunk = given["defaultToken"] if is_int(given.get("defaultToken")) else min(500, context)
    # FastGPT refuses longer texts. Its own documentation gives 1800 for M3E, whose engine cuts what is over 512 tokens.
    most = given["maxToken"] if is_int(given.get("maxToken")) else max(1800, min(context, 8000), chunk)
    return {
        "context": context,
        **({"dimensions": card["dimensions"]} if is_int(card.get("dimensions")) else {}),
        "defaultToken": max(1, min(chunk, most)),
        "maxToken": most,
        "weight": 100,
        "defaultConfig": {},
        "dbConfig": {},
        "queryConfig": {},
    }


def _rerank(endpoint: Fields, card: Fields, given: Fields) -> dict[str, t.Any]:
    if not endpoint.get("keys"):
        raise AnsibleFilterError(f"fastgpt_models: {endpoint.get('name')}: has no key. Give model_endpoints a master_key.")
    return {"requestUrl": f"{str(endpoint['url']).rstrip('/')}/v1/rerank", "requestAuth": endpoint["keys"][0]}


_MAKERS: dict[str, tuple[str, t.Callable[[Fields, Fields, Fields], dict[str, t.Any]]]] = {
    "chat": ("llm_models", _llm),
    "embedding": ("vector_models", _vector),
    "rerank": ("rerank_models", _rerank),
}


def fastgpt_models(endpoints: t.Any, version: t.Any, overrides: t.Any = None) -> dict[str, list[dict[str, t.Any]]]:
    if not is_list(endpoints):
        raise AnsibleFilterError(f"fastgpt_models: {shown(endpoints)}: must be a list of endpoints.")
    unfit = version_fault(version, "version")
    if unfit:
        raise AnsibleFilterError(f"fastgpt_models: {unfit}")
    overrides = {} if overrides is None else overrides
    if not isinstance(overrides, Mapping) or not all(isinstance(fields, Mapping) for fields in overrides.values()):
        raise AnsibleFilterError("fastgpt_models: overrides: must be a dictionary of model names and dictionaries of fields.")
    result: dict[str, list[dict[str, t.Any]]] = {"llm_models": [], "vector_models": [], "rerank_models": []}
    seen: set[str] = set()
    for endpoint in endpoints:
        if not isinstance(endpoint, Mapping) or endpoint.get("kind") not in _MAKERS or not {"model", "url"} <= endpoint.keys():
            raise AnsibleFilterError("fastgpt_models: every item must be an endpoint of selfhosted.fastgpt.model_endpoints.")
        model = str(endpoint["model"])
        if model in seen:
            continue
        seen.add(model)
        card = endpoint.get("card") or {}
        where, make = _MAKERS[endpoint["kind"]]
        given = overrides.get(model, {})
        entry = {"model": model, "name": model, "provider": card.get("provider") or "Other", **_FREE, **make(endpoint, card, given), **given}
        result[where].append(entry)
    unknown = [name for name in overrides if name not in seen]
    if unknown:
        raise AnsibleFilterError(f"fastgpt_models: overrides: {shown(unknown[0])}: no model server has this model; {nearest(unknown[0], seen)}")
    return result


class FilterModule:
    """Filter of the same name."""

    def filters(self) -> dict[str, t.Callable[..., t.Any]]:
        return {"fastgpt_models": fastgpt_models}
