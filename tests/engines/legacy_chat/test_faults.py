# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What goes wrong: passes that fail, memory that runs out, a scheduler that dies or hangs, a full queue, SIGTERM."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from conftest import FILES, Served
from legacy_chat.__main__ import main
from ports import free_port


def crowd(server: Served, count: int, **more: Any) -> list[Any]:
    found: list[Any] = [None] * count

    def one(at: int) -> None:
        found[at] = server.ask(f"crowd {at}", **more)

    threads = [threading.Thread(target=one, args=(at,)) for at in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return found


def test_a_failing_pass_loses_its_own_requests_only(own: Callable[..., Served]) -> None:
    server = own()
    step, calls = server.scheduler.engine.step, []

    def once(*given: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise ValueError("secret detail")
        return step(*given)

    server.scheduler.engine.step = once  # type: ignore[method-assign]
    answer = server.ask()
    assert answer.status_code == 500 and answer.json()["error"]["type"] == "server_error" and "secret" not in answer.text
    assert server.ask().status_code == 200 and server.client.get("/health").status_code == 200 and server.metric("model_failures_total") == 1


def test_a_failure_within_a_stream_is_an_event(own: Callable[..., Served]) -> None:
    server = own()
    step = server.scheduler.engine.step
    calls: list[int] = []

    def third(*given: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise ValueError
        return step(*given)

    server.scheduler.engine.step = third  # type: ignore[method-assign]
    chunks, _unused = server.stream(max_tokens=30)
    assert chunks[-1]["error"]["code"] == "model_failed" and len(chunks) >= 2


def test_a_dead_scheduler_is_seen(own: Callable[..., Served]) -> None:
    server = own()

    def always(*given: Any) -> Any:
        raise RuntimeError("CUDA error: device-side assert")

    server.scheduler.engine.prefill = always  # type: ignore[method-assign]
    assert [server.ask().status_code for _unused in range(3)] == [500] * 3
    server.scheduler.join(5)
    health = server.client.get("/health")
    assert health.status_code == 503 and "passes in a row failed" in health.json()["status"]
    refused = server.ask()
    assert refused.status_code == 503 and refused.headers["retry-after"] and server.metric("scheduler_up") == 0


def test_a_scheduler_that_hangs_is_seen(own: Callable[..., Served]) -> None:
    server = own("--stall-seconds", "0.3")
    step, free = server.scheduler.engine.step, threading.Event()
    server.scheduler.engine.step = lambda *given: (free.wait(20), step(*given))[1]  # type: ignore[method-assign]
    asking = threading.Thread(target=server.ask)
    asking.start()
    time.sleep(0.8)
    assert server.client.get("/health").status_code == 503
    free.set()
    asking.join(10)
    assert server.client.get("/health").status_code == 200


def test_numbers_that_overflow_end_one_request(own: Callable[..., Served]) -> None:
    server = own()
    prefill = server.scheduler.engine.prefill

    def broken(prompts: Any) -> Any:
        logits, batch = prefill(prompts)
        return torch.full_like(logits, float("nan")), batch

    server.scheduler.engine.prefill = broken  # type: ignore[method-assign]
    assert server.ask(temperature=1).json()["error"]["code"] == "not_a_number"
    server.scheduler.engine.prefill = prefill  # type: ignore[method-assign]
    assert server.ask().status_code == 200


def test_a_full_cache_sets_requests_back_and_changes_no_answer(own: Callable[..., Served]) -> None:
    server = own("--max-batch", "6")
    alone = [server.said(f"crowd {at}", max_tokens=60) for at in range(6)]
    server.scheduler.budget = 300  # six rows of 80 do not fit
    answers = crowd(server, 6, max_tokens=60)
    assert [one.json()["choices"][0]["message"]["content"] for one in answers] == alone
    assert server.metric("preemptions_total") > 0


def test_out_of_memory_starts_again_with_less(own: Callable[..., Served]) -> None:
    server = own("--max-batch", "6")
    alone = [server.said(f"crowd {at}", max_tokens=40) for at in range(6)]
    step = server.scheduler.engine.step

    def tight(batch: Any, tokens: list[int]) -> Any:
        if len(tokens) > 3:
            raise torch.OutOfMemoryError("no room")
        return step(batch, tokens)

    server.scheduler.engine.step = tight  # type: ignore[method-assign]
    answers = crowd(server, 6, max_tokens=40)
    assert [one.status_code for one in answers] == [200] * 6, [one.text for one in answers]
    assert [one.json()["choices"][0]["message"]["content"] for one in answers] == alone and server.scheduler.most == 3
    server.scheduler.calm = 10**6
    server.said("again", max_tokens=4)
    assert server.scheduler.most > 3, "and tries more again after a while"


def test_metrics_may_be_asked_while_the_batch_ends(own: Callable[..., Served]) -> None:
    server = own()

    class Ending:
        width = 40

        def __bool__(self) -> bool:
            server.scheduler.batch = None
            return True

    server.scheduler.batch = Ending()  # type: ignore[assignment]
    assert server.client.get("/metrics").status_code == 200


def test_what_a_failed_pass_held_is_free_before_memory_is_given_back(own: Callable[..., Served], monkeypatch: Any) -> None:
    server = own("--max-batch", "4")
    forward, held, left = server.scheduler.engine._forward, [], []

    def tight(tokens: Any, *given: Any) -> Any:
        if len(tokens) > 2 and len(tokens[0]) == 1:
            caches = torch.zeros(4)
            held.append(weakref.ref(caches))
            raise torch.OutOfMemoryError("no room")
        return forward(tokens, *given)

    monkeypatch.setattr(server.scheduler.engine, "_forward", tight)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: left.extend(one() for one in held))
    assert [one.status_code for one in crowd(server, 4, max_tokens=40)] == [200] * 4
    assert held and left == [None] * len(left) and left


def test_a_full_queue_says_when_to_come_again(own: Callable[..., Served]) -> None:
    server = own("--max-batch", "1", "--max-queue", "2")
    step, go = server.scheduler.engine.step, threading.Event()
    server.scheduler.engine.step = lambda *given: (go.wait(30), step(*given))[1]  # type: ignore[method-assign]
    with ThreadPoolExecutor(10) as pool:
        asked = [pool.submit(server.ask, "first", max_tokens=20)]
        until = time.monotonic() + 30
        while not server.scheduler.running and time.monotonic() < until:
            time.sleep(0.005)
        # one is at work and two wait, until all others have been refused
        asked += [pool.submit(server.ask, f"crowd {at}", max_tokens=20) for at in range(9)]
        try:
            list(islice(as_completed(asked, timeout=20), 7))
        finally:
            go.set()
    answers = [one.result() for one in asked]
    assert sorted(one.status_code for one in answers) == [200] * 3 + [429] * 7
    refused = next(one for one in answers if one.status_code == 429)
    assert refused.json()["error"]["type"] == "rate_limit_error" and int(refused.headers["retry-after"]) > 0


def start(path: str, *more: str, **env: str) -> tuple[subprocess.Popen[str], int]:
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-IB", str(FILES / "legacy_chat"), "--model", path, "--served-model-name", "tiny", "--port", str(port), *more],
        stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", **env})
    return process, port


def ready(process: subprocess.Popen[str], port: int) -> None:
    until = time.monotonic() + 60
    while time.monotonic() < until and process.poll() is None:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
            return
        except (OSError, urllib.error.URLError):
            time.sleep(0.05)
    raise AssertionError(process.communicate(timeout=5)[1])


def test_sigterm_ends_it_in_seconds_under_load(model_path: Callable[..., str]) -> None:
    process, port = start(model_path("qwen"), "--grace", "1", "--max-batch", "4")
    try:
        ready(process, port)
        tails: list[str] = []
        # 250 tokens of each of 40 are far more than the grace has time for
        body = json.dumps({"messages": [{"role": "user", "content": "x"}], "max_tokens": 250, "stream": True, "temperature": 0}).encode()

        def one() -> None:
            request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/chat/completions", body, {"Content-Type": "application/json"})
            try:
                with urllib.request.urlopen(request, timeout=30) as answer:
                    tails.append(answer.read().decode())
            except urllib.error.HTTPError as error:
                tails.append(f"{error.code} {error.read().decode()}")

        threads = [threading.Thread(target=one) for _unused in range(40)]
        for thread in threads:
            thread.start()
        time.sleep(1.0)
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        process.wait(8)
        took = time.monotonic() - began
        for thread in threads:
            thread.join(5)
    finally:
        process.kill()
    assert took < 5, took
    cut = [one for one in tails if "before the answer was complete" in one]
    assert len(tails) >= 36 and cut, "what could not end says so"
    assert all(one.endswith("data: [DONE]\n\n") or one.startswith(("503", "429")) for one in tails)


def test_idle_it_ends_at_once(own: Callable[..., Served]) -> None:
    server = own()
    server.said(max_tokens=2)
    server.scheduler.drain(60)
    began = time.monotonic()
    server.scheduler.join(10)
    assert time.monotonic() - began < 2 and server.ask().status_code == 503


def test_a_refusal_is_one_line(tmp_path: Path, monkeypatch: Any, caplog: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["legacy_chat", "--model", str(tmp_path), "--served-model-name", "x", "--port", "1"])
    assert main() == 2
    assert len(caplog.records) == 1 and str(tmp_path) in caplog.text and "Traceback" not in caplog.text
