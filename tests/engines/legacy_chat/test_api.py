# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a client sees: answers, streams, parameters, errors, disconnects."""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from conftest import TEXTS_LONG, Served, joined
from hypothesis import given
from hypothesis import strategies as st
from legacy_chat.requests import Message


def test_whole_answer(tiny: Served) -> None:
    answer = tiny.ask("你好")
    body = answer.json()
    assert answer.status_code == 200 and body["object"] == "chat.completion" and body["model"] == "tiny" and body["id"].startswith("chatcmpl-")
    choice = body["choices"][0]
    assert choice["message"]["role"] == "assistant" and choice["message"]["content"] and choice["finish_reason"] == "length"
    usage = body["usage"]
    assert usage["completion_tokens"] == 12 and usage["total_tokens"] == usage["prompt_tokens"] + 12 and usage["prompt_tokens"] > 5


def test_stream_says_the_same_as_the_whole(tiny: Served) -> None:
    for text in TEXTS_LONG:
        whole = tiny.ask(text, max_tokens=60)
        chunks, _unused = tiny.stream(text, max_tokens=60, stream_options={"include_usage": True})
        assert joined(chunks) == whole.json()["choices"][0]["message"]["content"]
        assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        assert chunks[-1]["choices"] == [] and chunks[-1]["usage"] == whole.json()["usage"]
        assert chunks[-2]["choices"][0]["finish_reason"] == "length" and len({one["id"] for one in chunks}) == 1
    assert all("usage" not in one for one in tiny.stream()[0])


def test_characters_are_never_cut(tiny: Served) -> None:
    """A random byte-level model says much that is half a character; what it says whole must come whole."""
    wide = 0
    for seed in range(6):
        chunks, _unused = tiny.stream(f"世界 {seed}", max_tokens=80, temperature=1, seed=seed)
        whole = tiny.said(f"世界 {seed}", max_tokens=80, temperature=1, seed=seed)
        assert joined(chunks) == whole
        wide += sum(ord(one) > 127 and one != "\ufffd" for one in whole)
    assert wide > 10


def test_stop_strings_even_across_tokens(tiny: Served) -> None:
    whole = tiny.said("stop", max_tokens=60)
    assert len(whole) > 12
    for at, size in ((0, 1), (3, 2), (5, 4), (7, 5)):
        stop = whole[at : at + size]
        wanted = whole[: whole.find(stop)]
        answer = tiny.ask("stop", max_tokens=60, stop=["never said", stop]).json()
        assert answer["choices"][0]["message"]["content"] == wanted and answer["choices"][0]["finish_reason"] == "stop"
        chunks, _unused = tiny.stream("stop", max_tokens=60, stop=stop)
        assert joined(chunks) == wanted and chunks[-1]["choices"][0]["finish_reason"] == "stop"
    # the beginning of a stop string at the very end is text after all
    assert tiny.said("stop", max_tokens=60, stop=whole[-3:] + "x") == whole


def test_end_token_ends_the_answer(tiny: Served) -> None:
    scheduler = tiny.scheduler
    tokens = scheduler.engine._alone(scheduler.form.chat([Message("user", "end")]), 5)[1]
    before, scheduler.ends = scheduler.ends, {tokens[4]}
    try:
        answer = tiny.ask("end", max_tokens=30).json()
    finally:
        scheduler.ends = before
    assert answer["choices"][0]["finish_reason"] == "stop" and answer["usage"]["completion_tokens"] <= 5
    assert answer["choices"][0]["message"]["content"] == scheduler.decode(tokens[: tokens.index(tokens[4])]).rstrip("\ufffd")


def test_sampling(tiny: Served) -> None:
    greedy = tiny.said("sample", max_tokens=30)
    assert tiny.said("sample", max_tokens=30, temperature=1.5, top_k=1) == greedy == tiny.said("sample", max_tokens=30, temperature=1.5, top_p=1e-6)
    hot = [tiny.said("sample", max_tokens=30, temperature=1.5, seed=seed) for seed in (1, 1, 2, 3)]
    assert hot[0] == hot[1] and len(set(hot)) == 3 and greedy not in hot
    assert len({tiny.said("sample", max_tokens=30, temperature=1.5) for _unused in range(3)}) == 3, "no seed, no repetition"
    assert tiny.said("sample", max_tokens=30, presence_penalty=2, frequency_penalty=2) != greedy
    assert tiny.said("sample", max_tokens=30, repetition_penalty=5) != greedy


def test_seed_holds_in_a_crowd(tiny: Served) -> None:
    alone = tiny.said("crowd", max_tokens=30, temperature=1, seed=42)
    found: dict[int, str] = {}

    def one(at: int) -> None:
        found[at] = tiny.said("crowd" if at == 3 else f"other {at}", max_tokens=30, temperature=1, seed=42)

    threads = [threading.Thread(target=one, args=(at,)) for at in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[3] == alone and len(set(found.values())) == 8


def test_messages_of_every_shape(tiny: Served) -> None:
    talk: list[dict[str, Any]] = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two \ud800"}], "name": "x"},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}]},
        {"role": "tool", "tool_call_id": "c1", "content": "result"},
        {"role": "user", "content": "go"},
    ]
    answer = tiny.client.post("/v1/chat/completions", content=json.dumps({"messages": talk, "max_tokens": 3, "model": "tiny", "user": "me"}))
    assert answer.status_code == 200, answer.text
    assert tiny.ask(tools=[{"type": "function", "function": {"name": "f"}}], tool_choice="none").status_code == 200
    assert tiny.client.post("/v1/completions", json={"prompt": "问题", "max_tokens": 4}).json()["choices"][0]["text"]
    with tiny.client.stream("POST", "/v1/completions", json={"prompt": "问题", "max_tokens": 4, "stream": True}) as stream:
        assert stream.read().decode().endswith("data: [DONE]\n\n")


BAD: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1/x"}}]}]}, "messages[0].content"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": 2.1}, "temperature"),
    ({"top_p": -0.1}, "top_p"),
    ({"n": 2}, "n"),
    ({"logprobs": True}, "logprobs"),
    ({"seed": 1.5}, "seed"),
    ({"stop": [1]}, "stop"),
    ({"stream": "yes"}, "stream"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"logit_bias": {"1": 5}}, "logit_bias"),
]


@pytest.mark.parametrize(("change", "param"), BAD, ids=[one[1] for one in BAD])
def test_bad_requests_are_named(change: dict[str, Any], param: str, tiny: Served) -> None:
    answer = tiny.ask(**change)
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["param"]) == (400, "invalid_request_error", param) and error["message"].startswith(param)


def test_other_errors_have_the_shape_too(tiny: Served) -> None:
    assert tiny.ask(model="gpt-4").json()["error"]["code"] == "model_not_found" and tiny.ask(model="gpt-4").status_code == 404
    long = tiny.ask("很长的问题 " * 400)
    assert long.status_code == 400 and long.json()["error"]["code"] == "context_length_exceeded" and "512 tokens" in long.json()["error"]["message"]
    stream = tiny.ask("很长的问题 " * 400, stream=True)
    assert stream.status_code == 400, "refused before a stream begins"
    for method, path, status in (("GET", "/nothing", 404), ("GET", "/v1/chat/completions", 405), ("GET", "/v1/models/other", 404)):
        answer = tiny.client.request(method, path)
        assert answer.status_code == status and answer.json()["error"]["message"]
    assert tiny.client.post("/v1/chat/completions", content=b"{nope").json()["error"]["code"] == "invalid_json"
    assert tiny.client.post("/v1/chat/completions", content=b"[" * 100000).status_code == 400
    assert tiny.client.post("/v1/chat/completions", content=b"x" * (17 << 20)).status_code == 413


def test_answers_stay_within_context_and_response(tiny: Served) -> None:
    room = tiny.ask("room " * 60, max_tokens=100000).json()
    assert room["usage"]["total_tokens"] <= 512 and room["choices"][0]["finish_reason"] == "length"
    assert tiny.ask("room", max_tokens=100000).json()["usage"]["completion_tokens"] == 256, "--max-response"


def test_models_health_and_metrics(tiny: Served) -> None:
    assert tiny.client.get("/v1/models").json()["data"][0]["id"] == "tiny" and tiny.client.get("/v1/models/tiny").json()["max_model_len"] == 512
    assert tiny.client.get("/health").status_code == 200
    before = tiny.metric("generated_tokens_total"), tiny.metric('requests_total{outcome="length"}')
    tiny.ask(max_tokens=7)
    assert (tiny.metric("generated_tokens_total") - before[0], tiny.metric('requests_total{outcome="length"}') - before[1]) == (7, 1)
    text = tiny.client.get("/metrics").text
    for name in ("time_to_first_token_seconds_bucket", "step_seconds_count", "running", "waiting", "cache_tokens_limit", "scheduler_up 1.0"):
        assert f"legacy_chat_{name}" in text, name


def test_key(monkeypatch: pytest.MonkeyPatch, own: Callable[..., Served]) -> None:
    monkeypatch.setenv("LEGACY_CHAT_API_KEY", "sk-geheim")
    server = own()
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic sk-geheim"}, {"Authorization": "Bearer \u00e9".encode("latin-1")}):
        for path in ("/v1/models", "/v1/chat/completions"):
            answer = server.client.request("GET" if path.endswith("models") else "POST", path, headers=headers, content=b"{}")
            assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
    assert server.client.get("/v1/models", headers={"Authorization": "Bearer sk-geheim"}).status_code == 200
    assert server.client.get("/health").status_code == 200


def test_eight_streams_run_side_by_side(tiny: Served) -> None:
    """The last of eight hears its first word long before the first one is done, and all together take far less than one after another."""
    # the time of this process alone, since the machine may do other things as well
    began = time.process_time()
    for at in range(8):
        tiny.stream(f"stream {at}", max_tokens=100)
    apart = time.process_time() - began
    firsts: list[float] = []
    ends: list[float] = []
    barrier = threading.Barrier(8)

    def one(at: int) -> None:
        barrier.wait()
        start = time.monotonic()
        chunks, first = tiny.stream(f"stream {at}", max_tokens=100)
        firsts.append(start + first)
        ends.append(time.monotonic())
        assert chunks[-1]["choices"][0]["finish_reason"] == "length"

    threads = [threading.Thread(target=one, args=(at,)) for at in range(8)]
    began = time.process_time()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    together = time.process_time() - began
    print(f"\n8 streams: {apart:.2f} s apart, {together:.2f} s together: {apart / together:.1f}x")
    assert len(ends) == 8 and max(firsts) < min(ends)
    assert together < apart / 1.5


def raw(server: Served, **more: Any) -> socket.socket:
    body = json.dumps({"messages": [{"role": "user", "content": "leave"}], "max_tokens": 256, "temperature": 0, **more}).encode()
    sock = socket.create_connection(("127.0.0.1", server.port))
    sock.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
    return sock


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_slot(stream: bool, own: Callable[..., Served]) -> None:
    server = own("--max-batch", "2")
    step, slow = server.scheduler.engine.step, 0.02
    server.scheduler.engine.step = lambda *given: (time.sleep(slow), step(*given))[1]  # type: ignore[method-assign]
    before = server.metric('requests_total{outcome="cancelled"}')
    leavers = [raw(server, stream=stream) for _unused in range(3)]  # two run, one waits
    until = time.monotonic() + 5
    counts = (0, 0)
    while counts != (2, 1) and time.monotonic() < until:
        time.sleep(0.005)
        counts = len(server.scheduler.running), len(server.scheduler.waiting)
    assert counts == (2, 1)
    for one in leavers:
        one.close()
    began = time.monotonic()
    assert server.quiet() and time.monotonic() - began < 0.5, "a few steps at most, not the 5 s of the whole answers"
    assert server.metric('requests_total{outcome="cancelled"}') - before == 3
    slow = 0
    assert server.said("next", max_tokens=3)


def test_a_client_that_leaves_while_it_sends_is_no_fault_of_the_server(tiny: Served) -> None:
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("uvicorn.error")
    logger.addHandler(handler)
    before = tiny.metric("requests_total")
    try:
        with socket.create_connection(("127.0.0.1", tiny.port)) as sock:
            sock.sendall(b'POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{"messages"')
            time.sleep(0.1)
        time.sleep(0.2)
        assert tiny.said(max_tokens=2)
    finally:
        logger.removeHandler(handler)
    assert lines == [] and tiny.metric("requests_total") == before + 1


words = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5))
anything = st.recursive(words, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=6)
FIELDS = ["messages", "model", "max_tokens", "temperature", "top_p", "top_k", "stop", "seed", "n", "stream", "stream_options", "tools", "logprobs",
          "presence_penalty", "frequency_penalty", "repetition_penalty", "response_format", "max_completion_tokens", "logit_bias", "tool_choice"]
message = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system", "tool"])}, optional={
    "content": anything | st.text(max_size=30), "tool_calls": anything, "name": anything, "tool_call_id": anything})


@given(change=st.dictionaries(st.sampled_from(FIELDS), anything, max_size=4), talk=st.none() | st.lists(message, max_size=3))
def test_no_body_makes_it_fail(change: dict[str, Any], talk: list[Any] | None, tiny: Served) -> None:
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2, **({"messages": talk} if talk is not None else {}), **change}
    if not isinstance(body.get("max_tokens"), int) or body["max_tokens"] > 5:
        body["max_completion_tokens"] = 2
    answer = tiny.client.post("/v1/chat/completions", content=json.dumps(body))
    assert answer.status_code in (200, 400, 404), (answer.status_code, answer.text, body)
    if answer.status_code != 200:
        assert answer.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_the_client_library_would_see_one_json_line_per_event(stream: bool, tiny: Served) -> None:
    body = {"messages": [{"role": "user", "content": "line\nbreak"}], "max_tokens": 40, "stream": stream}
    answer = tiny.client.post("/v1/chat/completions", json=body)
    if stream:
        events = answer.text.split("\n\n")
        assert events[-1] == "" and all(one.startswith("data: ") and "\n" not in one for one in events[:-1])
    assert answer.headers["content-type"].startswith("text/event-stream" if stream else "application/json")
