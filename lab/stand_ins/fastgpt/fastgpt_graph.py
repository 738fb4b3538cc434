# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Runs an app's graph in the FastGPT stand-in: v1 (modules with targets) and v2 (nodes and edges). Needs no database.

Written from the recorded contract. Known steps: question input / workflow start, dataset search, chat, fixed answer.
Anything else runs as a step without a result, as an unknown one does in the real server.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Awaitable, Callable
from typing import Any

MAX_STEPS = 200
_UNSET = object()


@dataclasses.dataclass
class Steps:
    """What a graph can do. Each takes the step's parameters."""

    search: Callable[[dict[str, Any]], Awaitable[list[dict[str, Any]]]]
    chat: Callable[[dict[str, Any]], Awaitable[str]]
    say: Callable[[str], Awaitable[None]]
    announce: Callable[[str], Awaitable[None]]


@dataclasses.dataclass
class Outcome:
    answer: str = ""
    responses: list[dict[str, Any]] = dataclasses.field(default_factory=list)


def fill(value: Any, variables: dict[str, Any]) -> Any:
    if not isinstance(value, str):
        return value
    return re.sub(r"\{\{(\w+)\}\}", lambda match: str(variables.get(match[1], match[0])), value)


def to_type(value: Any, kind: str | None) -> Any:
    if value is None or value is _UNSET:
        return None
    if kind == "string" and not isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if kind == "number" and not isinstance(value, bool):
        try:
            return float(value) if not isinstance(value, (int, float)) else value
        except (TypeError, ValueError):
            return None
    if kind == "boolean" and isinstance(value, str):
        return value == "true"
    if kind in ("datasetQuote", "selectDataset", "chatHistory") and isinstance(value, str):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


async def run_step(kind: str, name: str, params: dict[str, Any], steps: Steps, outcome: Outcome) -> dict[str, Any]:
    if kind == "datasetSearchNode":
        datasets = params.get("datasets") or []
        if not isinstance(datasets, list):
            raise ValueError("Quote type error")
        if not datasets:
            raise ValueError("core.chat.error.Select dataset empty")
        if not params.get("userChatInput"):
            raise ValueError("core.chat.error.User input empty")
        found = await steps.search(params)
        outcome.responses.append({"moduleName": name, "moduleType": kind, "query": params["userChatInput"], "quoteList": found})
        return {"quoteQA": found, "isEmpty": True if not found else None, "unEmpty": True if found else None}
    if kind == "chatNode":
        if not params.get("userChatInput"):
            raise ValueError("Question is empty")
        answer = await steps.chat(params)
        outcome.responses.append(
            {"moduleName": name, "moduleType": kind, "query": params["userChatInput"], "quoteList": params.get("quoteQA") or []}
        )
        if params.get("isResponseAnswerText") is not False:
            outcome.answer += answer
        return {"answerText": answer}
    if kind == "answerNode":
        text = str(params.get("text") or "")
        await steps.say(text)
        outcome.answer += text
        return {"answerText": text}
    if kind in ("questionInput", "workflowStart"):
        return {"userChatInput": params.get("userChatInput")}
    return {}


# -- v1 ------------------------------------------------------------------------------------------------------------------

V1_ENTRIES = ("questionInput", "historyNode", "pluginInput")


def load_v1(modules: list[dict[str, Any]], variables: dict[str, Any]) -> list[dict[str, Any]]:
    """An input counts if it is a system input, connected, or has a value; the rest is dropped."""
    loaded = []
    for module in modules:
        inputs = {
            item["key"]: {"value": fill(item.get("value", _UNSET), variables), "type": item.get("valueType")}
            for item in module.get("inputs", [])
            if item.get("type") == "systemInput" or item.get("connected") or "value" in item
        }
        outputs = sorted(module.get("outputs", []), key=lambda item: item.get("key") == "finish")
        loaded.append(
            {
                "id": module.get("moduleId"), "name": module.get("name", ""), "kind": module.get("flowType", ""),
                "shown": bool(module.get("showStatus")), "inputs": inputs, "outputs": outputs,
            }
        )  # fmt: skip
    return loaded


def complete(module: dict[str, Any]) -> bool:
    return all(item["value"] is not _UNSET for item in module["inputs"].values())


async def run_v1(modules: list[dict[str, Any]], question: str, variables: dict[str, Any], steps: Steps) -> Outcome:
    """A module runs as soon as none of its inputs lacks a value; its results go to the targets of its outputs."""
    running = load_v1(modules, variables)
    by_id = {module["id"]: module for module in running}
    outcome = Outcome()
    queue = [module for module in running if module["kind"] in V1_ENTRIES]
    for module in queue:
        given: dict[str, Any] = {"userChatInput": question, "history": []}
        for key in given.keys() & module["inputs"].keys():
            module["inputs"][key]["value"] = given[key]
    ran = 0
    queue = [module for module in queue if complete(module)]
    while queue and ran < MAX_STEPS:
        module = queue.pop(0)
        ran += 1
        if module["shown"]:
            await steps.announce(module["name"])
        params = {key: to_type(item["value"], item["type"]) for key, item in module["inputs"].items()}
        module["inputs"].pop("switch", None)
        result: dict[str, Any] = {"finish": True, "userChatInput": params.get("userChatInput")}
        result.update(await run_step(module["kind"], module["name"], params, steps, outcome))
        following: list[dict[str, Any]] = []
        for output in module["outputs"]:
            value = result.get(output.get("key", ""))
            if value is None:
                continue
            for target in output.get("targets") or []:
                next_module = by_id.get(target.get("moduleId"))
                if next_module is None:
                    continue
                if target.get("key") in next_module["inputs"]:
                    next_module["inputs"][target["key"]]["value"] = value
                if next_module not in following:
                    following.append(next_module)
        # Looked at now, not when its turn comes: a module that still waits for another is run by that other one.
        queue.extend(module for module in following if complete(module))
    return outcome


# -- v2 ------------------------------------------------------------------------------------------------------------------

V2_ENTRIES = ("systemConfig", "workflowStart", "pluginInput")


def is_reference(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(part, str) for part in value)


async def run_v2(nodes: list[dict[str, Any]], edges: list[dict[str, Any]], question: str, variables: dict[str, Any], steps: Steps) -> Outcome:
    """A node runs when every edge that leads to it is done; inputs refer to outputs of other nodes as [node, output]."""
    by_id = {node.get("nodeId"): node for node in nodes}
    values: dict[tuple[str, str], Any] = {}
    done: set[int] = set()
    outcome = Outcome()

    def value_of(item: dict[str, Any], node: dict[str, Any]) -> Any:
        value = fill(item.get("value"), variables)
        if node.get("flowNodeType") in V2_ENTRIES and item.get("key") == "userChatInput":
            value = question
        elif is_reference(value):
            value = variables.get(value[1]) if value[0] == "VARIABLE_NODE_ID" else values.get((value[0], value[1]))
        return to_type(value, item.get("valueType"))

    queue = [node for node in nodes if node.get("flowNodeType") in V2_ENTRIES]
    ran = 0
    while queue and ran < MAX_STEPS:
        node = queue.pop(0)
        ran += 1
        name, kind, node_id = node.get("name", ""), node.get("flowNodeType", ""), node.get("nodeId", "")
        if node.get("showStatus"):
            await steps.announce(name)
        params = {item["key"]: value_of(item, node) for item in node.get("inputs", [])}
        if kind == "workflowStart":
            params["userChatInput"] = question
        params = {key: value for key, value in params.items() if value is not None}
        result = await run_step(kind, name, params, steps, outcome)
        for output in node.get("outputs", []):
            if result.get(output.get("key", "")) is not None:
                values[(node_id, output.get("id", ""))] = result[output["key"]]
        for index, edge in enumerate(edges):
            if edge.get("source") != node_id or index in done:
                continue
            done.add(index)
            following = by_id.get(edge.get("target"))
            waiting = [i for i, item in enumerate(edges) if item.get("target") == edge.get("target") and i not in done]
            if following is not None and not waiting and following not in queue:
                queue.append(following)
    return outcome
