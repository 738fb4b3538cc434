# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Messages to token ids. What a message says never becomes a control token."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from .requests import Message

# Breaks a control token's spelling and is not seen.
GAP = "\u200b"


class PromptError(ValueError):
    """Messages that this model's format cannot express."""


class PromptFormat(Protocol):
    def chat(self, messages: Sequence[Message]) -> list[int]: ...

    def plain(self, text: str) -> list[int]: ...


class Defuser:
    """Text in which no control token is spelled out any more."""

    def __init__(self, literals: Iterable[str]) -> None:
        names = sorted({one for one in literals if len(one) > 1}, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, names))) if names else None

    def __call__(self, text: str) -> str:
        return self._pattern.sub(lambda found: found[0][0] + GAP + found[0][1:], text) if self._pattern else text


class PlainEncoder:
    """Text to ids by a sentencepiece model itself, around what a tokenizer class makes of special tokens."""

    def __init__(self, encode: Callable[[str], list[int]], literals: Iterable[str], control: Iterable[int]) -> None:
        self._encode, self._defuse, self._control = encode, Defuser(literals), frozenset(control)

    def __call__(self, text: str) -> list[int]:
        return [one for one in self._encode(self._defuse(text)) if one not in self._control]


def called(message: Message) -> str:
    lines = [message.content] if message.content else []
    lines += [f"Tool call: {call['name']}({call['arguments']})" for call in message.tool_calls]
    return "\n".join(lines)


def flattened(messages: Sequence[Message]) -> list[Message]:
    """System texts joined in front, tool traffic as text, neighbours of one role joined."""
    system = "\n".join(one.content for one in messages if one.role == "system" and one.content)
    out: list[Message] = [Message("system", system)] if system else []
    for one in messages:
        if one.role == "system":
            continue
        role, text = one.role, called(one)
        if role == "tool":
            label = one.name or one.tool_call_id
            role, text = "user", f"Tool result{f' of {label}' if label else ''}: {one.content}"
        if out and out[-1].role == role:
            out[-1] = Message(role, f"{out[-1].content}\n{text}")
        else:
            out.append(Message(role, text))
    return out


def folded(messages: Sequence[Message]) -> list[Message]:
    """For a format without a system role: its text opens the first question."""
    flat = flattened(messages)
    if not flat or flat[0].role != "system":
        return flat
    system, rest = flat[0].content, flat[1:]
    if rest and rest[0].role == "user":
        return [Message("user", f"{system}\n\n{rest[0].content}"), *rest[1:]]
    return [Message("user", system), *rest]


class Baichuan2:
    """System text, then each turn behind the id of its role; the answer follows the assistant's id."""

    def __init__(self, encode: PlainEncoder, user: int, assistant: int) -> None:
        self._encode, self._roles = encode, {"user": user, "assistant": assistant}

    def plain(self, text: str) -> list[int]:
        return self._encode(text)

    def chat(self, messages: Sequence[Message]) -> list[int]:
        ids: list[int] = []
        flat = flattened(messages)
        for one in flat:
            if one.role != "system":
                ids.append(self._roles[one.role])
            ids += self._encode(one.content)
        # A last message of the assistant is the beginning of the answer.
        if not flat or flat[-1].role != "assistant":
            ids.append(self._roles["assistant"])
        return ids


class ChatGLM2:
    """Numbered rounds of a question and an answer behind two control tokens."""

    def __init__(self, encode: PlainEncoder, prefix: Sequence[int]) -> None:
        self._encode, self._prefix = encode, list(prefix)

    def plain(self, text: str) -> list[int]:
        return self._prefix + self._encode(text)

    def chat(self, messages: Sequence[Message]) -> list[int]:
        rounds: list[list[str]] = []
        for one in folded(messages):
            if one.role == "user":
                rounds.append([one.content])
            elif rounds and len(rounds[-1]) == 1:
                rounds[-1].append(one.content)
            else:
                rounds.append(["", one.content])
        texts = [f"[Round {number}]\n\n问：{turn[0]}\n\n答：{turn[1] if len(turn) > 1 else ''}" for number, turn in enumerate(rounds, 1)]
        return self._prefix + self._encode("\n\n".join(texts))


class Template:
    """A chat template of the tokenizer's or of the operator's."""

    def __init__(self, tokenizer: Any, template: str | None, literals: Iterable[str], control: Iterable[int]) -> None:
        self._tokenizer, self._template = tokenizer, template
        self._defuse, self._control = Defuser(literals), frozenset(control)

    def _checked(self, text: str) -> str:
        text = self._defuse(text)
        # A normaliser may still turn another spelling into a control token.
        if self._control.intersection(self._tokenizer.encode(text, add_special_tokens=False)):
            raise PromptError("a message spells out a control token of this model; remove it")
        return text

    def _as_dict(self, message: Message) -> dict[str, Any]:
        one: dict[str, Any] = {"role": message.role, "content": self._checked(message.content)}
        if message.tool_calls:
            one["tool_calls"] = [{"type": "function", "id": self._checked(call["id"]), "function": {
                "name": self._checked(call["name"]), "arguments": self._arguments(call["arguments"])}} for call in message.tool_calls]
        if message.role == "tool":
            one |= {"name": self._checked(message.name), "tool_call_id": self._checked(message.tool_call_id)}
        return one

    def _arguments(self, text: str) -> Any:
        try:
            return self._deep(json.loads(text))
        except (ValueError, RecursionError):
            return self._checked(text)

    def _deep(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._checked(value)
        if isinstance(value, list):
            return [self._deep(one) for one in value]
        if isinstance(value, dict):
            return {self._checked(key): self._deep(one) for key, one in value.items()}
        return value

    def plain(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(self._checked(text)))

    def chat(self, messages: Sequence[Message]) -> list[int]:
        trouble: Exception | None = None
        for shape in (list(messages), flattened(messages), folded(messages)):
            listed = [self._as_dict(one) for one in shape]
            try:
                text = self._tokenizer.apply_chat_template(
                    listed, chat_template=self._template, tokenize=False, add_generation_prompt=True)
            except Exception as error:  # a template raises what it likes
                trouble = trouble or error
                continue
            return list(self._tokenizer.encode(text, add_special_tokens=False))
        raise PromptError(f"the model's chat template refuses these messages: {trouble}")
