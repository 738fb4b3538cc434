# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import json
import threading
import typing as t
import urllib.error
import urllib.request

import pytest

RESULTS = {"results": [{"index": 1, "relevance_score": 0.9}, {"index": 0, "relevance_score": 0.1}]}


@pytest.fixture
def adapter(script: t.Any, fake_engine: t.Any) -> t.Iterator[t.Any]:
    fake_engine.answer = lambda path, body: (200, RESULTS)
    server = script("rerank_adapter").make(0, f"http://127.0.0.1:{fake_engine.port}/v1/rerank", "bge")
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server.server_address[1]
    server.shutdown()
    server.server_close()


def post(port: int, body: t.Any, path: str = "/v1/rerank") -> tuple[int, t.Any]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(f"http://127.0.0.1:{port}{path}", data), timeout=10) as reply:
            return reply.status, json.loads(reply.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


OLD = {"query": "q", "inputs": [{"id": "x", "text": "one"}, {"id": "y", "text": "two"}]}


def test_old_shape_is_converted_both_ways(adapter: int, fake_engine: t.Any) -> None:
    assert post(adapter, OLD) == (200, {"code": 200, "msg": "ok", "data": [{"id": "y", "score": 0.9}, {"id": "x", "score": 0.1}]})
    assert fake_engine.asked == [{"model": "bge", "query": "q", "documents": ["one", "two"]}]


def test_new_shape_is_passed_on(adapter: int, fake_engine: t.Any) -> None:
    body = {"model": "bge", "query": "q", "documents": ["one", "two"]}
    assert post(adapter, body) == (200, RESULTS)
    assert fake_engine.asked == [body]
    fake_engine.answer = lambda path, body: (400, {"error": {"message": "no such model"}})
    assert post(adapter, body) == (400, {"error": {"message": "no such model"}})


def test_no_inputs_need_no_engine(adapter: int, fake_engine: t.Any) -> None:
    assert post(adapter, {"query": "q", "inputs": []}) == (200, {"code": 200, "msg": "ok", "data": []})
    assert fake_engine.asked == []


@pytest.mark.parametrize(
    "body", [{"inputs": [{"id": 1, "text": "a"}]}, {"query": "q", "inputs": "a"}, {"query": "q", "inputs": [1]}, {"query": "q", "inputs": [{"id": 1}]}]
)
def test_faults_of_an_old_request_come_in_its_envelope(adapter: int, body: t.Any) -> None:
    status, answer = post(adapter, body)
    assert status == 422 and answer["code"] == 422 and answer["message"]


def test_faults_of_other_requests_come_in_openais_shape(adapter: int) -> None:
    for body, path, expected in ((b"{", "/v1/rerank", 400), (b"[]", "/v1/rerank", 422), (b"{}", "/rerank", 404)):
        status, answer = post(adapter, body, path)
        assert status == expected and answer["error"]["type"] == "invalid_request_error"


def test_a_failing_engine_is_an_error_that_fastgpt_sees(adapter: int, fake_engine: t.Any) -> None:
    # FastGPT 4.6 takes every code from 200 to 399 for success
    fake_engine.answer = lambda path, body: (500, {})
    assert post(adapter, OLD)[0] == 500
    fake_engine.answer = lambda path, body: (422, {})
    assert post(adapter, OLD)[1]["code"] == 502
    fake_engine.answer = lambda path, body: (200, {"results": [{"index": 7, "relevance_score": 1}]})
    assert post(adapter, OLD)[1]["code"] == 502
    fake_engine.stop()
    assert post(adapter, OLD)[1]["code"] == 503
    assert post(adapter, {"documents": []})[1]["error"]["type"] == "server_error"


def test_health(adapter: int) -> None:
    with urllib.request.urlopen(f"http://127.0.0.1:{adapter}/health", timeout=5) as reply:
        assert reply.status == 200
