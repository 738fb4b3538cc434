# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The report of `make bench-models`, without an engine."""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
from pathlib import Path

import pytest

if sys.version_info < (3, 11):
    pytest.skip("the benches run on Python 3.11", allow_module_level=True)
for module in ("aiohttp", "ansible_runner", "yaml"):
    pytest.importorskip(module)

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "bench"))

import bench_models as bench  # noqa: E402
from bench_models import BenchError, Cost, Figures, Start  # noqa: E402

RATES = {
    "embeddings_1x64": (120.0, 40.0),
    "embeddings_8x64": (130.0, 40.0),
    "embeddings_1x64_long": (5.0, 4.0),
    "rerank_1x30": (20.0, 20.0),
    "rerank_8x30": (26.0, 20.0),
    "chat_1": (300.0, 300.0),
    "chat_8": (1200.0, 300.0),
    "chat_32": (1300.0, 310.0),
}


def figures(**changes):
    """Two rounds of each, the second half as fast; `changes` are other rates."""
    costs = {}
    for name, rates in {**RATES, **changes}.items():
        firsts = ((0.02, 0.2), (0.1, 2.0)) if name.startswith("chat") else ((), ())
        costs[name] = {
            way: [Cost(rate, 4.0, first), Cost(rate / 2, 3.0, tuple(2 * one for one in first))]
            for way, rate, first in zip(("ours", "baseline"), rates, firsts, strict=True)
        }
    return Figures(costs, {"chat": {"ours": Start(3.456, 400.4, 512.6)}})


def test_shape_of_the_file(tmp_path):
    made = figures()
    made.costs["chat_8"]["transformers_serve"] = [Cost(900.0, 1.0, (0.1, 0.3)), Cost(800.0, 2.0, (0.1, 0.2))]
    made.costs["rerank_1x30"]["tried"] = [Cost(30.0, 1.0)]
    path = tmp_path / ".bench" / "models.json"
    bench.write(path, bench.report(made))
    result = json.loads(path.read_text())
    assert result["embeddings_1x64"] == {"ours": 120.0, "baseline": 40.0, "ratio": 3.0}
    assert result["last_ttft_8"] == {"ours": 0.2, "baseline": 2.0, "ratio": 10.0}
    assert result["without_goal"] == {"embeddings_1x64_long": {"ours": 5.0, "baseline": 4.0, "ratio": 1.25}}
    assert result["tried"] == {"rerank_1x30": 30.0}
    assert result["transformers_serve"] == {"chat_8": {"rate": 900.0, "last_ttft": 0.2}}
    assert result["cpu_ms_per_item"]["chat_1"] == {"ours": 3.0, "baseline": 3.0}
    assert result["first_token_s"]["chat_8"]["baseline"] == {"median": 1.05, "last": 2.0}
    assert result["start_s"] == {"chat": {"ours": 3.46}}
    assert result["memory_mb"] == {"chat": {"ours": {"after": 400, "peak": 513}}}
    assert set(bench.HEADLINES) < set(result)
    assert "tried" not in bench.report(figures())


def test_goals_that_are_reached():
    assert [text for reached, text in bench.goals(bench.report(figures())) if not reached] == []


@pytest.mark.parametrize(
    "name, rates, words",
    [
        ("embeddings_1x64", (119.9, 40.0), "embeddings_1x64: 3.00 times the baseline's, at least 3"),
        ("embeddings_8x64", (100.0, 40.0), "embeddings_8x64: 2.50 times"),
        ("rerank_8x30", (25.9, 20.0), "rerank_8x30: 1.29 times"),
        ("chat_1", (299.0, 300.0), "chat_1: 1.00 times the baseline's, at least 1"),
        ("chat_8", (1199.0, 300.0), "chat_8: 4.00 times the baseline's, at least 4"),
    ],
)
def test_goals_that_are_missed(name, rates, words):
    [miss] = [text for reached, text in bench.goals(bench.report(figures(**{name: rates}))) if not reached]
    assert words in miss


def test_the_last_stream_has_to_begin_soon():
    made = figures()
    made.costs["chat_8"]["ours"] = [Cost(1200.0, 1.0, (0.01, 0.21))]
    [miss] = [text for reached, text in bench.goals(bench.report(made)) if not reached]
    assert miss.startswith("first token of the last of 8 streams: 9.5 times sooner")


def test_vectors_are_counted_and_measured():
    body = {"input": ["a", "b"]}
    row = {"embedding": [0.0] * 384}
    bench.embedded(body, {"data": [row, row]}, 384)
    with pytest.raises(BenchError, match="1 vectors of 384 numbers for 2 texts"):
        bench.embedded(body, {"data": [row]}, 384)
    with pytest.raises(BenchError, match="expected 1536"):
        bench.embedded(body, {"data": [row, row]}, 1536)


def test_texts_have_the_lengths_asked_for():
    texts = bench.embedding_body(random.Random(1), 64, (8, 10))["input"]
    assert len(set(texts)) == 64 and {len(one) for one in texts} == {8, 9, 10}


def test_only_the_baseline_gets_the_old_rerank_shape():
    body = {"model": "rerank", "query": "q", "documents": ["x", "y"]}
    assert bench.adapted("ours", body) is body
    assert bench.adapted("baseline", body) == {"query": "q", "inputs": [{"id": "0", "text": "x"}, {"id": "1", "text": "y"}]}


def test_a_setting_to_try_is_one_of_the_engine():
    assert bench.setting("INFINITY_BATCH_SIZE=8;") == ("INFINITY_BATCH_SIZE", "8;")
    for wrong in ("INFINITY_BATCH_SIZE", "PATH=/"):
        with pytest.raises(bench.argparse.ArgumentTypeError, match="INFINITY_NAME=VALUE"):
            bench.setting(wrong)


def test_servers_are_started_as_the_role_writes_it(tmp_path):
    servers = bench.rendered(tmp_path, {name: tmp_path / name for name in ("infinity", "legacy_chat", "transformers")})
    assert set(servers) == set(bench.OURS)
    embedding, chat = servers["embedding"], servers["chat"]
    assert embedding["argv"] == [str(tmp_path / "infinity" / "bin" / "infinity_emb"), "v2"]
    assert embedding["env"]["INFINITY_MODEL_ID"] == f"{bench.MODELS / 'embedding'};"
    assert {server["env"]["OMP_NUM_THREADS"] for server in servers.values()} == {"1"}
    assert not {"CUDA_VISIBLE_DEVICES", "TORCH_CUDNN_SDPA_DEPRIORITIZED"} & set(embedding["env"])
    assert chat["argv"][2] == str(bench.ROLE / "files" / "legacy_chat")
    assert chat["argv"][chat["argv"].index("--port") + 1] == str(chat["port"])
    assert servers["chat, transformers serve"]["argv"][1] == "serve"


def server(tmp_path, source: str) -> bench.Server:
    return bench.Server("it", 9, "/", {}, [sys.executable, "-c", source], dict(os.environ), tmp_path / "log")


def test_a_server_that_ends_is_told_with_its_last_words(tmp_path):
    with pytest.raises(BenchError, match="(?s)it: does not answer.*no such weights"):
        asyncio.run(server(tmp_path, "raise SystemExit('no such weights')").wait())


def test_memory_and_time_are_those_of_the_server(tmp_path):
    one = server(tmp_path, "data = bytearray(200 << 20); data = None\nwhile True: pass")
    try:
        until = bench.time.monotonic() + 10
        # until it has let go of what it took
        while (one.cpu() < 0.3 or not one.start().peak_mb > 200 > one.start().rss_mb) and bench.time.monotonic() < until:
            bench.time.sleep(0.02)
        assert one.cpu() >= 0.3
        start = one.start()
        assert start.peak_mb > 200 > start.rss_mb
        one.pause(True)
        bench.time.sleep(0.05)
        before = one.cpu()
        bench.time.sleep(0.2)
        assert one.cpu() == before
    finally:
        one.stop()
    assert one.process.poll() is not None
