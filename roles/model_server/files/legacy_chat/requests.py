# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The body of a request as checked values, or a Refusal in OpenAI's words. Knows no model."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Any

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
MAX_STOPS = 16


class Refusal(Exception):
    """An answer in OpenAI's error shape."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry_after = status, message, param, code, retry_after

    def body(self) -> dict[str, Any]:
        kind = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}.get(
            self.status, "invalid_request_error" if self.status < 500 else "server_error"
        )
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def refuse(param: str, value: Any, rule: str) -> Refusal:
    shown = json.dumps(value, ensure_ascii=True, default=str)
    return Refusal(400, f"{param}: {shown if len(shown) <= 60 else shown[:57] + '...'}: {rule}", param=param, code="invalid_value")


@dataclass(frozen=True)
class Message:
    role: str
    content: str
    tool_calls: tuple[dict[str, Any], ...] = ()
    name: str = ""
    tool_call_id: str = ""


@dataclass(frozen=True)
class Params:
    """None means: as the model's own generation_config says."""

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class ChatRequest:
    params: Params
    messages: tuple[Message, ...] = ()
    prompt: str | None = None
    stream: bool = False
    include_usage: bool = False
    chat: bool = field(default=True)


def clean(text: str) -> str:
    """JSON can hold half a surrogate pair, which no tokenizer takes."""
    return text.encode("utf-8", "replace").decode("utf-8") if not text.isascii() else text


def number(body: dict[str, Any], name: str, low: float, high: float, *, whole: bool = False) -> Any:
    value = body.get(name)
    if value is None:
        return None
    kinds = (int,) if whole else (int, float)
    if isinstance(value, float) and whole and math.isfinite(value) and value.is_integer():
        value = int(value)
    good = isinstance(value, kinds) and not isinstance(value, bool) and low <= value <= high
    if not good:
        raise refuse(name, value, f"must be {'a whole number' if whole else 'a number'} from {low:g} to {high:g}")
    return value if whole else float(value)


def flag(body: dict[str, Any], name: str) -> bool:
    value = body.get(name)
    if value is None:
        return False
    if not isinstance(value, bool):
        raise refuse(name, value, "must be true or false")
    return value


def stops(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    listed = [value] if isinstance(value, str) else value
    if not isinstance(listed, list) or not all(isinstance(one, str) for one in listed) or len(listed) > MAX_STOPS:
        raise refuse("stop", value, f"must be a string or a list of at most {MAX_STOPS} strings")
    return tuple(dict.fromkeys(clean(one) for one in listed if one))


def params(body: dict[str, Any]) -> Params:
    several = number(body, "n", 1, 128, whole=True)
    if several not in (None, 1):
        raise refuse("n", several, "only 1 answer per request is served; send the request several times")
    if body.get("best_of") not in (None, 1):
        raise refuse("best_of", body["best_of"], "only 1 is served")
    for name in ("logprobs", "top_logprobs"):
        if body.get(name) not in (None, False, 0):
            raise refuse(name, body[name], "log probabilities are not served; leave it out")
    if body.get("logit_bias"):
        raise refuse("logit_bias", body["logit_bias"], "is not served; leave it out")
    form = body.get("response_format")
    if form is not None and not (isinstance(form, dict) and form.get("type") == "text"):
        raise refuse("response_format", form, 'only {"type": "text"} is served')
    wanted = number(body, "max_completion_tokens", 1, 2**31, whole=True)
    top_k = number(body, "top_k", -1, 2**31, whole=True)
    return Params(
        max_tokens=number(body, "max_tokens", 1, 2**31, whole=True) if wanted is None else wanted,
        temperature=number(body, "temperature", 0, 2),
        top_p=number(body, "top_p", 0, 1),
        top_k=None if top_k is None else max(top_k, 0),
        repetition_penalty=number(body, "repetition_penalty", 0.01, 10),
        presence_penalty=number(body, "presence_penalty", -2, 2) or 0.0,
        frequency_penalty=number(body, "frequency_penalty", -2, 2) or 0.0,
        seed=number(body, "seed", -(2**63), 2**63 - 1, whole=True),
        stop=stops(body.get("stop")),
    )


def content_of(value: Any, where: str) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return clean(value)
    if not isinstance(value, list):
        raise refuse(where, value, "must be a string, null or a list of text parts")
    texts = []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in ("text", "refusal") and isinstance(part.get(kind), str):
            texts.append(clean(part[kind]))
        elif isinstance(kind, str) and kind not in ("text", "refusal"):
            raise refuse(where, kind, "this model reads text only; send parts of type text")
        else:
            raise refuse(where, part, 'each part must be {"type": "text", "text": "..."}')
    return "\n".join(texts)


def calls_of(value: Any, where: str) -> tuple[dict[str, Any], ...]:
    """Past calls of tools as plain {name, arguments, id}."""
    if value is None:
        return ()
    if not isinstance(value, list):
        raise refuse(where, value, "must be a list")
    calls = []
    for call in value:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise refuse(where, call, "each call needs function.name")
        arguments = function.get("arguments")
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        calls.append({"name": clean(function["name"]), "arguments": clean(text), "id": clean(str(call.get("id") or ""))})
    return tuple(calls)


def messages_of(value: Any) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise refuse("messages", value, "must be a list with at least one message")
    found = []
    for index, one in enumerate(value):
        where = f"messages[{index}]"
        if not isinstance(one, dict):
            raise refuse(where, one, "must be an object")
        role = one.get("role")
        if not isinstance(role, str) or role not in ROLES:
            raise refuse(f"{where}.role", role, f"must be one of {', '.join(ROLES)}")
        calls = one.get("tool_calls")
        if calls is None and isinstance(one.get("function_call"), dict):
            calls = [{"function": one["function_call"]}]
        found.append(
            Message(
                role={"developer": "system", "function": "tool"}.get(role, role),
                content=content_of(one.get("content"), f"{where}.content"),
                tool_calls=calls_of(calls, f"{where}.tool_calls") if role == "assistant" else (),
                name=clean(one["name"]) if isinstance(one.get("name"), str) else "",
                tool_call_id=clean(one["tool_call_id"]) if isinstance(one.get("tool_call_id"), str) else "",
            )
        )
    return tuple(found)


def parse(raw: bytes, served: str, *, chat: bool) -> ChatRequest:
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise Refusal(400, f"the body is not JSON: {error}", code="invalid_json") from error
    if not isinstance(body, dict):
        raise Refusal(400, "the body must be a JSON object", code="invalid_json")
    model = body.get("model")
    if model is not None and model != served:
        shown = model if isinstance(model, str) else json.dumps(model, default=str)
        raise Refusal(404, f"The model `{clean(shown)[:200]}` does not exist; this server serves `{served}`", param="model", code="model_not_found")
    for name in ("tools", "functions"):
        # What is not asked for cannot be missed; what is asked for and never comes would be.
        if body.get(name) and body.get("tool_choice", body.get("function_call")) != "none":
            raise refuse(name, f"{len(body[name]) if isinstance(body[name], list) else '?'} given",
                         'this model calls no tools; leave them out or set tool_choice to "none" (FastGPT: toolChoice false)')
    stream = flag(body, "stream")
    options = body.get("stream_options")
    if options is not None and not isinstance(options, dict):
        raise refuse("stream_options", options, "must be an object")
    usage = flag(options or {}, "include_usage")
    found = params(body)
    if chat:
        return ChatRequest(found, messages=messages_of(body.get("messages")), stream=stream, include_usage=usage)
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]
    if not isinstance(prompt, str) or not prompt:
        raise refuse("prompt", prompt, "must be one non-empty string")
    for name in ("suffix", "echo"):
        if body.get(name):
            raise refuse(name, body[name], "is not served; leave it out")
    return ChatRequest(found, prompt=clean(prompt), stream=stream, include_usage=usage, chat=False)
