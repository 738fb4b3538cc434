# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What `make bench-gpu` does without a GPU: its steps, its figures and the command lines for a GPU that is not there."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

if sys.version_info < (3, 11):
    pytest.skip("the benches run on Python 3.11", allow_module_level=True)
for module in ("aiohttp", "yaml"):
    pytest.importorskip(module)

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "bench"))

import bench_gpu as bench  # noqa: E402
from bench_models import Cost, written  # noqa: E402

H100 = {
    "index": 0, "name": "NVIDIA H100 80GB HBM3", "uuid": "GPU-0", "pci_bus": "0000:3b:00.0", "device_id": "2330", "kernel_driver": "nvidia",
    "memory_mb": 81559, "memory_used_mb": 1, "memory_foreign_mb": 1, "compute_capability": "9.0", "driver_version": "580.159.04", "mig": False,
    "problem": "",
}  # fmt: skip


@pytest.fixture
def tried(tmp_path):
    def made(*more):
        given = bench.arguments(["--device", "cpu", "--tiny", "--out", str(tmp_path / "out" / "gpu.json"), *more])
        return bench.GpuBench(given, tmp_path)

    return made


def test_all_servers_are_placed_and_started_on_one_gpu(tmp_path):
    listed = bench.servers(tmp_path / "models", [0])
    engines = {name: tmp_path / name for name in ("infinity-gpu", "legacy_chat-gpu")}
    found = written(tmp_path, engines, listed, model_cards_catalogue=bench.catalogue(), model_cards_extra=[], model_server_threads=8, model_server__gpus=[H100])
    assert set(found) == {"chat_16", "chat_8", "chat_4", bench.EMBEDDING, *bench.RERANKS}
    told = bench.predicted(listed, [H100])
    for bits in bench.WIDTHS:
        argv = found[f"chat_{bits}"]["argv"]
        options = dict(zip(argv[3:-1:2], argv[4::2], strict=False))
        assert options["--device"] == "cuda" and options["--quantize-bit"] == str(bits) and options["--context"] == "4096"
        assert float(options["--cache-gb"]) == told[f"chat_{bits}"]["given_to_cache"]
        assert found[f"chat_{bits}"]["env"]["CUDA_VISIBLE_DEVICES"] == "0"
    assert found[bench.EMBEDDING]["env"]["INFINITY_DEVICE"] == "cuda;"
    assert {name for name, one in found.items() if "TORCH_CUDNN_SDPA_DEPRIORITIZED" in one["env"]} == {bench.EMBEDDING, *bench.RERANKS}
    assert sum(one["given"] for one in told.values()) <= H100["memory_mb"] * 1.048576 / 1000


def test_what_the_card_says_of_memory(tmp_path):
    told = bench.predicted(bench.servers(tmp_path, [0]), [H100])
    assert told["chat_16"]["weights"] == 15.0 and told["chat_16"]["cache_of_one_context"] == 2.15 and told["chat_16"]["table"] == 16
    assert told["chat_16"]["sum"] == 19.25
    assert told["chat_4"]["weights"] < told["chat_8"]["weights"] < told["chat_16"]["weights"]
    assert told[bench.EMBEDDING]["reserve"] == 1


def test_a_step_that_fails_does_not_stop_the_next(tried):
    one, done = tried(), []

    def fail():
        raise ValueError("no such thing")

    assert not one.step("first", 5, fail)
    assert one.step("second", 5, lambda: done.append(1))
    one.end()
    written = json.loads(one.given.out.read_text())
    assert [step["name"] for step in written["steps"]] == ["first", "second"] and done == [1]
    assert written["steps"][0]["error"] == "ValueError: no such thing" and written["complete"] is False


def test_what_does_not_fit_into_the_budget_is_left_out(tried):
    one, done = tried("--budget", "3"), []
    assert not one.step("long", 50, lambda: done.append(1), least=10)
    assert one.step("short", 50, lambda: done.append(2))
    assert done == [2] and one.left() <= 3 and "of the budget" in one.result["steps"][0]["skipped"]
    one.ends -= 10
    one.fault("of a server", bench.BenchError("no weights"))
    assert one.result["steps"][-1]["error"] == "BenchError: no weights"


def test_the_best_round_counts_and_both_ways_are_compared():
    ours = bench.rated([Cost(100.0, 2.0, (0.1, 0.3)), Cost(200.0, 1.0, (0.2, 0.4))])
    assert ours == {"per_second": 200.0, "cpu_ms_each": 1.0, "rounds": 2, "first_token_median_s": 0.3, "first_token_last_s": 0.3}
    rates = {"chat_16_8": {"ours": ours, "baseline": bench.rated([Cost(50.0, 2.0)])}, "chat_8_8": {"ours": ours}}
    told = bench.with_ratios(rates)
    assert told["chat_16_8"]["ratio"] == 4.0 and "ratio" not in told["chat_8_8"]


def test_memory_is_told_by_process_and_at_most(monkeypatch):
    answers = iter(["7, 1000\n8, [N/A]\n", "5000\n", "7, 3000\n", "4000\n", "7, 2000\n", "4500\n"])
    monkeypatch.setattr(bench, "smi", lambda *_unused: (0, next(answers)))
    memory = bench.Memory(None)
    for _unused in range(3):
        memory.look()
    assert memory.of(7) == {"now": 2.1, "most": 3.15, "gpu_now": 4.72, "gpu_most": 5.24}
    assert memory.of(8) == {"gpu_now": 4.72, "gpu_most": 5.24}
    memory.forget()
    assert "most" not in memory.of(7)
