# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What fastgpt_models makes of a card, and whether fastgpt_config takes it."""

from __future__ import annotations

import typing as t

import pytest

pytest.importorskip("hypothesis")

from ansible.errors import AnsibleFilterError  # noqa: E402
from ansible_collections.selfhosted.fastgpt.plugins.filter.fastgpt_models import fastgpt_models  # noqa: E402
from ansible_collections.selfhosted.fastgpt.plugins.module_utils import _fastgpt_config as fc  # noqa: E402
from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402


def entries_of(card: dict[str, t.Any], overrides: dict[str, t.Any] | None = None) -> dict[str, list[dict[str, t.Any]]]:
    """What the filter makes of one card, beside an embedding model, whole enough for a config.json."""
    whole = {"context": 512, "dimensions": 8, "provider": "p"}
    endpoints = [
        {"model": card["name"], "kind": card["kind"], "url": "http://10.0.0.1:8001", "keys": ["sk-1"], "card": card},
        {"model": "other-chat", "kind": "chat", "url": "http://10.0.0.1:8002", "keys": ["sk-1"], "card": {**whole, "context": 4096}},
        {"model": "other-vector", "kind": "embedding", "url": "http://10.0.0.1:8003", "keys": ["sk-1"], "card": whole},
    ]
    return fastgpt_models(endpoints, "v4.8.9", {card["name"]: overrides} if overrides is not None else {})


@given(st.integers(16, 2_000_000), st.none() | st.integers(1, 2_000_000), st.booleans())
def test_entries_of_any_card_are_accepted_by_the_module(context: int, response: int | None, tools: bool) -> None:
    card = {"name": "m", "kind": "chat", "context": context, "tool_choice": tools, **({} if response is None else {"max_response": response})}
    built = fc.build("v4.8.9", **entries_of(card))
    assert built.faults == [] and built.warnings == []


@given(st.integers(16, 4096), st.integers(1, 4095))
def test_overridden_tokens_still_fit(context: int, response: int) -> None:
    card = {"name": "m", "kind": "chat", "context": 4096, "max_response": 1024}
    assert fc.build("v4.8.9", **entries_of(card, {"maxContext": context})).faults == []
    assert fc.build("v4.8.9", **entries_of(card, {"maxResponse": response})).faults == []


@pytest.mark.parametrize(
    ("kind", "fields"), [("chat", fc.LLM_FIELDS), ("embedding", fc.VECTOR_FIELDS), ("rerank", fc.RERANK_FIELDS)], ids=["chat", "embedding", "rerank"]
)
def test_every_field_of_a_model_can_be_overridden(kind: str, fields: dict[str, fc.Field]) -> None:
    where = {"chat": "llm_models", "embedding": "vector_models", "rerank": "rerank_models"}[kind]
    key = {"chat": "llmModels", "embedding": "vectorModels", "rerank": "reRankModels"}[kind]
    usual = entries_of({"name": "m", "kind": kind, "context": 4096})[where][0]
    for name, field in fields.items():
        values = {"str": "http://10.0.0.9/other", "int": 77, "number": 0.25, "bool": not usual.get(name), "dict": {"k": 1}, "list": [1]}
        value: t.Any = values[field.kind]
        assert usual.get(name) != value
        models = entries_of({"name": "m", "kind": kind, "context": 4096}, {name: value})
        built = fc.build("v4.8.9", **models)
        assert built.faults == [], name
        assert built.config[key][0][name] == value


def test_overrides_that_the_model_cannot_keep_are_refused_by_the_module() -> None:
    wide = fc.build("v4.8.9", **entries_of({"name": "m", "kind": "chat", "context": 4096}, {"maxContext": 16000}))
    assert any("the model's own context is 4096" in fault for fault in wide.faults)
    long = fc.build("v4.8.9", **entries_of({"name": "m", "kind": "embedding", "context": 512, "dimensions": 3072}))
    assert any("dimensions: 3072" in fault for fault in long.faults)
    first = fc.build("v4.8.9", **entries_of({"name": "m", "kind": "chat"}, {"isDefault": False}))
    assert first.config["llmModels"][0]["model"] == "m"


def test_an_overridden_default_comes_first() -> None:
    models = fastgpt_models(
        [{"model": name, "kind": "chat", "url": "http://h:1", "card": {"context": 4096}} for name in ("a", "b", "c")], "v4.8.9", {"c": {"isDefault": True}}
    )
    built = fc.build("v4.8.9", llm_models=models["llm_models"], vector_models=[{"model": "v"}])
    assert [entry["model"] for entry in built.config["llmModels"]] == ["c", "a", "b"]


@pytest.mark.parametrize("endpoint", [{"kind": "chat"}, {"kind": "chat", "model": "m"}, {"kind": "speech", "model": "m", "url": "u"}, None])
def test_what_is_no_endpoint_is_refused(endpoint: t.Any) -> None:
    with pytest.raises(AnsibleFilterError, match="must be an endpoint"):
        fastgpt_models([endpoint], "v4.8.9")
