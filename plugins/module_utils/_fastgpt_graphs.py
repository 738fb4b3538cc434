# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# PRIVATE: for the modules of this collection only; it may change in any release.
"""The smallest FastGPT apps: a question goes to the chat model, with or without passages of a dataset."""

from __future__ import annotations

import typing as t

_AI_SETTINGS: tuple[tuple[str, str, t.Any], ...] = (
    ("temperature", "number", 0),
    ("maxToken", "number", 200),
    ("isResponseAnswerText", "boolean", True),
    ("systemPrompt", "string", ""),
    ("history", "chatHistory", 6),
)


def _search_settings(dataset_id: str, vector_model: str, rerank: bool) -> tuple[tuple[str, str, t.Any], ...]:
    return (
        ("datasets", "selectDataset", [{"datasetId": dataset_id, "vectorModel": {"model": vector_model}}]),
        ("similarity", "number", 0),
        ("limit", "number", 1500),
        ("searchMode", "string", "embedding"),
        ("usingReRank", "boolean", rerank),
        ("datasetSearchUsingExtensionQuery", "boolean", False),
    )


def app_body(name: str, version: tuple[int, int, int], chat_model: str, dataset_id: str = "", vector_model: str = "", rerank: bool = False) -> dict[str, t.Any]:
    """Body of core/app/create. Graphs were rebuilt in v4.8.0; both forms are sent under `modules`."""
    search = _search_settings(dataset_id, vector_model, rerank) if dataset_id else ()
    graph = _v2(chat_model, search) if version >= (4, 8, 0) else _v1(chat_model, search)
    return {"name": name, "type": "advanced", **graph}


# The kinds of input that the page shows for a key; FastGPT itself only asks whether one is connected.
_V1_TYPES = {
    "temperature": "hidden",
    "maxToken": "hidden",
    "isResponseAnswerText": "hidden",
    "systemPrompt": "textarea",
    "history": "numberInput",
    "datasets": "selectDataset",
    "similarity": "selectDatasetParamsModal",
}


def _v1_input(key: str, value_type: str, value: t.Any) -> dict[str, t.Any]:
    return {"key": key, "type": _V1_TYPES.get(key, "hidden"), "valueType": value_type, "label": key, "value": value}


def _v1_target(key: str, value_type: str, kind: str = "target") -> dict[str, t.Any]:
    # Without connected an input without value is dropped, and the node would run too early.
    return {"key": key, "type": kind, "valueType": value_type, "label": key, "connected": True}


def _v1_output(key: str, value_type: str, *targets: tuple[str, str]) -> dict[str, t.Any]:
    return {"key": key, "type": "source", "valueType": value_type, "label": key, "targets": [{"moduleId": node, "key": name} for node, name in targets]}


def _v1(chat_model: str, search: tuple[tuple[str, str, t.Any], ...]) -> dict[str, t.Any]:
    question_to = (("search", "userChatInput"), ("ai", "userChatInput")) if search else (("ai", "userChatInput"),)
    start = {
        "moduleId": "in",
        "name": "in",
        "flowType": "questionInput",
        "inputs": [{"key": "userChatInput", "type": "systemInput", "valueType": "string", "label": "userChatInput"}],
        "outputs": [_v1_output("userChatInput", "string", *question_to)],
    }
    chat = {
        "moduleId": "ai",
        "name": "ai",
        "flowType": "chatNode",
        "showStatus": True,
        "inputs": [
            {"key": "model", "type": "selectChatModel", "valueType": "string", "label": "model", "value": chat_model},
            *(_v1_input(*setting) for setting in _AI_SETTINGS),
            *([_v1_target("quoteQA", "datasetQuote")] if search else []),
            _v1_target("userChatInput", "string"),
        ],
        "outputs": [_v1_output("answerText", "string"), _v1_output("finish", "boolean")],
    }
    if not search:
        return {"modules": [start, chat]}
    retrieve = {
        "moduleId": "search",
        "name": "search",
        "flowType": "datasetSearchNode",
        "showStatus": True,
        "inputs": [*(_v1_input(*setting) for setting in search), _v1_target("userChatInput", "string", "custom")],
        "outputs": [_v1_output("quoteQA", "datasetQuote", ("ai", "quoteQA"))],
    }
    return {"modules": [start, retrieve, chat]}


_V2_TYPES = {
    "model": "selectLLMModel",
    "systemPrompt": "textarea",
    "history": "numberInput",
    "datasets": "selectDataset",
    "similarity": "selectDatasetParamsModal",
    "quoteQA": "settingDatasetQuotePrompt",
    "userChatInput": "reference",
}


def _v2_input(key: str, value_type: str, value: t.Any) -> dict[str, t.Any]:
    return {"key": key, "renderTypeList": [_V2_TYPES.get(key, "hidden")], "valueType": value_type, "label": "", "value": value}


def _v2_output(key: str, value_type: str) -> dict[str, t.Any]:
    return {"id": key, "key": key, "type": "static", "valueType": value_type, "label": ""}


def _v2(chat_model: str, search: tuple[tuple[str, str, t.Any], ...]) -> dict[str, t.Any]:
    question = _v2_input("userChatInput", "string", ["start", "userChatInput"])
    nodes: list[dict[str, t.Any]] = [
        {
            "nodeId": "start",
            "name": "start",
            "flowNodeType": "workflowStart",
            "inputs": [{"key": "userChatInput", "renderTypeList": ["reference"], "valueType": "string", "label": ""}],
            "outputs": [_v2_output("userChatInput", "string")],
        }
    ]
    if search:
        nodes.append(
            {
                "nodeId": "search",
                "name": "search",
                "flowNodeType": "datasetSearchNode",
                "inputs": [*(_v2_input(*setting) for setting in search), question],
                "outputs": [_v2_output("quoteQA", "datasetQuote")],
            }
        )
    nodes.append(
        {
            "nodeId": "ai",
            "name": "ai",
            "flowNodeType": "chatNode",
            "inputs": [
                _v2_input("model", "string", chat_model),
                *(_v2_input(*setting) for setting in _AI_SETTINGS),
                *([_v2_input("quoteQA", "datasetQuote", ["search", "quoteQA"])] if search else []),
                question,
            ],
            "outputs": [_v2_output("answerText", "string")],
        }
    )
    names = [node["nodeId"] for node in nodes]
    edges = [
        {"source": first, "target": second, "sourceHandle": f"{first}-source-right", "targetHandle": f"{second}-target-left"}
        for first, second in zip(names, names[1:])
    ]
    return {"modules": nodes, "edges": edges}
