# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the engine legacy_chat does without torch: bodies, prompts, text. The rest is tests/engines/legacy_chat."""

from __future__ import annotations

import json
import random
import sys
import typing as t
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parents[4] / "roles" / "model_server" / "files"))

from legacy_chat.prompts import GAP, Baichuan2, ChatGLM2, Defuser, PlainEncoder, PromptError, Template, flattened, folded
from legacy_chat.requests import ChatRequest, Message, Refusal, parse
from legacy_chat.text import Detokenizer, StopStrings

# ---------------------------------------------------------------- text


@given(st.text(max_size=40), st.integers(0, 2**16))
def test_pieces_of_bytes_come_out_as_whole_characters(text: str, seed: int) -> None:
    text = text.replace("\ufffd", "")
    raw, draw, pieces = text.encode(), random.Random(seed), []
    while raw:
        size = draw.choice([1, 1, 2, 3, 5])
        pieces.append(raw[:size])
        raw = raw[size:]

    def decode(ids: list[int]) -> str:
        return b"".join(pieces[one] for one in ids).decode("utf-8", "replace")

    detokenizer = Detokenizer(decode)
    said = [detokenizer.add(one) for one in range(len(pieces))]
    assert "\ufffd" not in "".join(said)
    assert "".join(said) + detokenizer.rest() == text


def test_a_space_that_the_first_token_loses_is_kept_later() -> None:
    """sentencepiece drops the space before the first of the pieces that it is given."""
    pieces = ["▁to", "▁be", "▁or", "not"]

    def decode(ids: list[int]) -> str:
        return "".join(pieces[one] for one in ids).replace("▁", " ").removeprefix(" ")

    detokenizer = Detokenizer(decode)
    assert "".join(detokenizer.add(one) for one in range(4)) + detokenizer.rest() == "to be ornot"


def test_what_never_becomes_a_character_does_not_hold_the_stream() -> None:
    detokenizer = Detokenizer(lambda ids: "a" + "\ufffd" * len(ids))
    said = [detokenizer.add(one) for one in range(40)]
    assert sum(map(bool, said)) > 4


@given(st.text("ab<", max_size=30), st.lists(st.text("ab<", min_size=1, max_size=4), min_size=1, max_size=3), st.integers(0, 2**16))
def test_stop_strings_as_if_all_text_were_there(text: str, stops: list[str], seed: int) -> None:
    draw, at, out, stopped = random.Random(seed), 0, "", False
    matcher = StopStrings(stops)
    while at < len(text) and not stopped:
        size = draw.randint(1, 4)
        piece, stopped = matcher.add(text[at : at + size])
        out, at = out + piece, at + size
    seen = text[:at]
    found = [seen.find(stop) for stop in stops if stop in seen]
    assert stopped == bool(found)
    assert (out if stopped else out + matcher.rest()) == (seen[: min(found)] if found else seen)


# ---------------------------------------------------------------- bodies


def body(**more: t.Any) -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": "hi"}], **more}).encode()


def refused(raw: bytes, chat: bool = True) -> Refusal:
    with pytest.raises(Refusal) as caught:
        parse(raw, "served", chat=chat)
    assert caught.value.body()["error"]["message"] == caught.value.message
    return caught.value


def test_values_arrive() -> None:
    got = parse(body(model="served", max_tokens=5, max_completion_tokens=7, temperature=0, top_k=-1, stop=["a", "", "a", "b"], stream=True,
                     stream_options={"include_usage": True}, seed=3.0, n=1, logprobs=False, tools=[], response_format={"type": "text"}), "served", chat=True)
    assert got.params.max_tokens == 7 and got.params.temperature == 0.0 and got.params.top_k == 0 and got.params.stop == ("a", "b")
    assert got.stream and got.include_usage and got.params.seed == 3 and got.params.top_p is None
    assert parse(b'{"prompt": ["x"]}', "served", chat=False) == ChatRequest(got.params.__class__(), prompt="x", chat=False)


@pytest.mark.parametrize(("change", "status", "param"), [
    ({"model": "other"}, 404, "model"), ({"model": 5}, 404, "model"), ({"temperature": float("nan")}, 400, "temperature"),
    ({"max_tokens": 1e400}, 400, "max_tokens"), ({"n": 3}, 400, "n"), ({"best_of": 2}, 400, "best_of"), ({"top_logprobs": 2}, 400, "top_logprobs"),
    ({"stop": "x" * 9 and list("abcdefghijklmnopq")}, 400, "stop"), ({"tools": [1]}, 400, "tools"), ({"functions": [1]}, 400, "functions"),
    ({"stream_options": 1}, 400, "stream_options"), ({"messages": [1]}, 400, "messages[0]"), ({"messages": None}, 400, "messages"),
    ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, 400, "messages[0].tool_calls"),
    ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, 400, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, 400, "messages[0].content"),
])
def test_refusals(change: dict[str, t.Any], status: int, param: str) -> None:
    refusal = refused(body(**change))
    assert (refusal.status, refusal.param) == (status, param)


def test_more_refusals() -> None:
    assert refused(b"nope").code == refused(b"[]").code == "invalid_json"
    assert refused(b'{"prompt": ""}', chat=False).param == "prompt" and refused(b'{"prompt": "x", "echo": true}', chat=False).param == "echo"


anything = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
                        max_leaves=8)
NAMES = ["messages", "model", "max_tokens", "temperature", "top_k", "stop", "n", "stream", "stream_options", "tools", "tool_choice", "seed", "logit_bias",
         "response_format", "prompt", "suffix", "role", "content", "type", "text", "tool_calls", "function", "name"]
bodies = st.dictionaries(st.sampled_from(NAMES), anything | st.lists(st.dictionaries(st.sampled_from(NAMES), anything)))


@given(bodies, st.booleans())
def test_any_body_is_taken_or_refused(given_body: dict[str, t.Any], chat: bool) -> None:
    try:
        got = parse(json.dumps(given_body).encode(), "served", chat=chat)
    except Refusal as refusal:
        assert refusal.status in (400, 404) and refusal.message.isprintable() is not None
    else:
        "".join(one.content for one in got.messages).encode()


def test_content_is_text_whatever_its_shape() -> None:
    talk = [{"role": "developer", "content": "d"}, {"role": "user", "content": [{"type": "text", "text": "a\ud83d"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}}, {"role": "function", "name": "f", "content": "r"}]
    got = parse(json.dumps({"messages": talk}).encode(), "served", chat=True).messages
    assert [one.role for one in got] == ["system", "user", "assistant", "tool"]
    assert got[1].content == "a?\nb" and got[2].content == "" and got[2].tool_calls[0]["name"] == "f" and got[3].name == "f"


# ---------------------------------------------------------------- prompts


def encoder(*literals: str) -> PlainEncoder:
    return PlainEncoder(lambda text: [ord(one) for one in text], literals, {1, 2})


def test_flattened_and_folded() -> None:
    talk = [Message("user", "1"), Message("user", "2"), Message("system", "A"), Message("assistant", "", ({"name": "f", "arguments": "{}", "id": "i"},)),
            Message("tool", "r", name="f"), Message("system", "B")]
    flat = flattened(talk)
    assert [(one.role, one.content) for one in flat] == [
        ("system", "A\nB"), ("user", "1\n2"), ("assistant", "Tool call: f({})"), ("user", "Tool result of f: r")]
    assert folded(talk)[0] == Message("user", "A\nB\n\n1\n2")
    assert folded([Message("system", "A")]) == [Message("user", "A")]
    assert folded([Message("system", "A"), Message("assistant", "x")]) == [Message("user", "A"), Message("assistant", "x")]


def test_baichuan2() -> None:
    form = Baichuan2(encoder(), -1, -2)
    assert form.chat([Message("system", "s"), Message("user", "u"), Message("assistant", "a"), Message("user", "v")]) == [
        115, -1, 117, -2, 97, -1, 118, -2]
    assert form.chat([Message("user", "u"), Message("assistant", "a")]) == [-1, 117, -2, 97], "the beginning of the answer is given"
    assert form.chat([Message("system", "")]) == [-2]


def test_chatglm2() -> None:
    form = ChatGLM2(encoder(), [-1, -2])
    ids = form.chat([Message("user", "u"), Message("assistant", "a"), Message("user", "v")])
    assert ids[:2] == [-1, -2] and "".join(map(chr, ids[2:])) == "[Round 1]\n\n问：u\n\n答：a\n\n[Round 2]\n\n问：v\n\n答："
    ids = form.chat([Message("assistant", "a"), Message("user", "v")])
    assert "".join(map(chr, ids[2:])) == "[Round 1]\n\n问：\n\n答：a\n\n[Round 2]\n\n问：v\n\n答："


@given(st.text("<|ab>/s", max_size=30))
def test_no_control_token_survives(text: str) -> None:
    literals = ["<|a|>", "</s>", "<|a|>b", "<s>"]
    safe = Defuser(literals)(text)
    assert not any(one in safe for one in literals)
    assert safe.replace(GAP, "") == text
    assert not {1, 2}.intersection(encoder(*literals)("\x01\x02" + text))


class FakeTokenizer:
    """Knows one control token, <x>, which it also makes of its full-width spelling, as a normaliser would."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        out = text.replace("＜x＞", "<x>").replace("<x>", "\0")
        return [ord(one) for one in out]

    def apply_chat_template(self, talk: list[dict[str, t.Any]], **_: t.Any) -> str:
        if any(one["role"] == "system" for one in talk):
            raise ValueError("no system role")
        return "".join(f"<x>{one['role']}:{one['content']}" for one in talk) + "<x>"


def test_template() -> None:
    form = Template(FakeTokenizer(), None, ["<x>"], {0})
    ids = form.chat([Message("system", "s"), Message("user", "<x>u")])
    assert ids.count(0) == 2 and "".join(map(chr, ids)) == f"\0user:s\n\n<{GAP}x>u\0"
    with pytest.raises(PromptError, match="control token"):
        form.chat([Message("user", "＜x＞")])
    assert form.plain("<x>").count(0) == 0
