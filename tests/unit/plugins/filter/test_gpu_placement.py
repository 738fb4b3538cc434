# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Models on GPUs: what fits where, what is refused and in which words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible.errors import AnsibleFilterError
from ansible_collections.selfhosted.fastgpt.plugins.filter.gpu_placement import gpu_placement
from ansible_collections.selfhosted.fastgpt.plugins.filter.model_endpoints import model_endpoints
from ansible_collections.selfhosted.fastgpt.plugins.filter.placement_table import placement_table
from ansible_collections.selfhosted.fastgpt.plugins.plugin_utils import _placement
from hypothesis import assume, given
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[4]
CARDS = yaml.safe_load((ROOT / "roles/model_cards/vars/main.yml").read_text())["model_cards_catalogue"]
BY_NAME = {card["name"]: card for card in CARDS}
# MiB as nvidia-smi says them
MEMORY = {"T4": 15360, "L4": 23034, "3090": 24576, "A100-40": 40960, "L20": 46068, "A100-80": 81920}
CAPABILITY = {"T4": "7.5", "L4": "8.9", "3090": "8.6", "A100-40": "8.0", "L20": "8.9", "A100-80": "8.0"}


def gpu(index: int, name: str = "L20", **more: Any) -> dict[str, Any]:
    found = {"index": index, "name": name, "memory_mb": MEMORY.get(name, 0), "compute_capability": CAPABILITY.get(name, "8.0"), "driver_version": "580.173.02"}
    return {**found, "mig": None, "problem": "", **more}


def server(model: str, port: int = 8001, **more: Any) -> dict[str, Any]:
    return {"model": model, "port": port, **more}


def places(servers: list[dict[str, Any]], gpus: list[dict[str, Any]], **more: Any) -> dict[int, tuple[str, list[int]]]:
    return {port: (one["engine"], one["gpus"]) for port, one in gpu_placement(servers, CARDS, gpus, **more).items()}


def refusal(servers: list[dict[str, Any]], gpus: list[dict[str, Any]], cards: Any = CARDS, **more: Any) -> str:
    with pytest.raises(AnsibleFilterError) as raised:
        gpu_placement(servers, cards, gpus, **more)
    return str(raised.value)


# ---- memory


@pytest.mark.parametrize(
    ("model", "width", "weights"),
    [
        ("Baichuan2-13B-Chat", 16, 27.8), ("Baichuan2-7B-Chat", 16, 15.0), ("ChatGLM2-6B", 16, 12.4),
        # embeddings and output layer stay as they are
        ("Baichuan2-7B-Chat", 8, 1.03 * 2 + 6.47), ("Baichuan2-7B-Chat", 4, 1.03 * 2 + 6.47 / 2),
    ],
)  # fmt: skip
def test_weights(model: str, width: int, weights: float):
    assert _placement.weights_gb(BY_NAME[model], width) == pytest.approx(weights)


@pytest.mark.parametrize(("model", "cache"), [("Baichuan2-13B-Chat", 3.36), ("Baichuan2-7B-Chat", 2.15), ("ChatGLM2-6B", 0.23), ("M3E-large", 0.0)])
def test_cache_of_the_whole_context(model: str, cache: float):
    assert _placement.cache_gb(BY_NAME[model]) == pytest.approx(cache, abs=0.01)


@pytest.mark.parametrize(("width", "measured"), [(16, 18.5), (8, 12.75), (4, 9.19)])
def test_what_an_h100_showed_is_foreseen(width: int, measured: float):
    """Most that the GPU held with legacy_chat and a model of this shape, after one whole context and 32 streams; see bench/README.md."""
    card = BY_NAME["Baichuan2-7B-Chat"]
    found = list(gpu_placement([server(card["name"], quantize_bit=width, engine="legacy_chat")], CARDS, [gpu(0)]).values())[0]
    foreseen = _placement.weights_gb(card, width) + _placement.cache_gb(card) + found["entry"]["reserve_gb"]
    assert measured <= foreseen <= measured + 1 and found["need_gb"] >= measured


def test_the_table_of_the_tutorial_is_the_floor():
    (embedding,) = list(gpu_placement([server("M3E-large")], CARDS, [gpu(0)]).values())
    assert embedding["need_gb"] == 6, "the table, not the 0.66 GB of the weights"
    (chat,) = list(gpu_placement([server("Baichuan2-13B-Chat")], CARDS, [gpu(0)]).values())
    assert chat["need_gb"] == pytest.approx(27.8 + 3.36 + 2.5, abs=0.1), "more than the table's 28, which leave nothing for the cache"


def test_a_card_that_the_table_says_is_enough_is_enough():
    assert places([server("ChatGLM2-6B")], [gpu(0, "T4")]) == {8001: ("legacy_chat", [0])}


def test_memory_of_the_host():
    (slow,) = list(gpu_placement([server("Baichuan2-7B-Chat", gpus=[])], CARDS).values())
    assert slow["device"] == "cpu" and slow["ram_gb"] == slow["need_gb"] == pytest.approx((15 + 2.15) * 2 + 1, abs=0.1), "it computes in 32 bit"
    (small,) = list(gpu_placement([server("Baichuan2-7B-Chat", gpus=[], quantize_bit=4)], CARDS).values())
    assert small["ram_gb"] == 16, "the table: all 16-bit weights go through the memory once"
    (modern,) = list(gpu_placement([server("Qwen3-4B-Instruct-2507", gpus=[])], CARDS).values())
    assert modern["ram_gb"] == 16
    (quick,) = list(gpu_placement([server("Baichuan2-7B-Chat")], CARDS, [gpu(0)]).values())
    assert quick["ram_gb"] == 16


def test_cache_is_what_weights_and_reserve_leave():
    for servers, gpus in (([server("ChatGLM2-6B")], [gpu(0, "T4")]), ([server("Baichuan2-13B-Chat")], [gpu(0, "3090"), gpu(1, "3090")])):
        (found,) = list(gpu_placement(servers, CARDS, gpus).values())
        card = BY_NAME[servers[0]["model"]]
        left = (found["memory_gb"] - found["entry"]["reserve_gb"]) * len(found["gpus"]) - _placement.weights_gb(card, 16)
        assert found["cache_gb"] == pytest.approx(left, abs=0.03) and found["cache_gb"] >= _placement.cache_gb(card)


def test_what_other_programs_use_is_not_there():
    one = [server("ChatGLM2-6B")]
    free, used = gpu_placement(one, CARDS, [gpu(0)]), gpu_placement(one, CARDS, [gpu(0, memory_foreign_mb=15000)])
    assert free[8001]["memory_gb"] - used[8001]["memory_gb"] == pytest.approx(16, abs=0.02), "whole GB"
    assert used[8001]["cache_gb"] < free[8001]["cache_gb"]
    # for a few MB more or less nothing is started again
    assert gpu_placement(one, CARDS, [gpu(0, memory_foreign_mb=15200)]) == used
    for little in (None, 0, 900, "x"):
        assert gpu_placement(one, CARDS, [gpu(0, memory_foreign_mb=little)]) == free
    assert places(one, [gpu(0, memory_foreign_mb=40000), gpu(1)]) == {8001: ("legacy_chat", [1])}
    told = refusal(one, [gpu(0, memory_foreign_mb=40000)])
    assert "48.3 GB, 42 GB of it used by other programs, 2.4 GB free then" in told
    forced = gpu_placement(one, CARDS, [gpu(0, memory_foreign_mb=40000)], check_resources=False)
    assert forced[8001]["gpus"] == [0] and forced[8001]["memory_gb"] > 10


# ---- engines


@pytest.mark.parametrize(
    ("model", "width", "engine"),
    [
        ("Baichuan2-7B-Chat", 16, "vllm"), ("Baichuan2-7B-Chat", 8, "legacy_chat"), ("Baichuan2-7B-Chat", 4, "legacy_chat"),
        ("Baichuan2-13B-Chat", 16, "vllm"), ("Baichuan2-13B-Chat", 8, "legacy_chat"), ("ChatGLM2-6B", 16, "legacy_chat"), ("ChatGLM2-6B", 8, "legacy_chat"),
        ("ChatGLM2-6B", 4, "legacy_chat"), ("Qwen2.5-1.5B-Instruct", 16, "vllm"), ("Qwen3-4B-Instruct-2507", 16, "vllm"), ("M3E-large", 16, "infinity"),
        ("bge-reranker-base", 16, "infinity"),
    ],
)  # fmt: skip
def test_engine_on_a_gpu(model: str, width: int, engine: str):
    found = gpu_placement([server(model, quantize_bit=width)], CARDS, [gpu(0, "A100-80")])[8001]
    assert (found["engine"], found["device"], found["gpus"]) == (engine, "gpu", [0])


def test_engine_by_name():
    found = gpu_placement([server("Baichuan2-7B-Chat", quantize_bit=4, engine="vllm")], CARDS, [gpu(0)])[8001]
    assert found["entry"]["quantization"] == {4: "bitsandbytes"} and found["entry"]["image"] == "v0.23.0"
    assert places([server("Baichuan2-7B-Chat", engine="legacy_chat")], [gpu(0)]) == {8001: ("legacy_chat", [0])}


def test_without_gpus():
    servers = [server("Qwen2.5-1.5B-Instruct"), server("M3E-large", 8002), server("bge-reranker-base", 8003, gpus=[])]
    found = gpu_placement(servers, CARDS)
    assert [(one["engine"], one["gpus"]) for one in found.values()] == [("transformers", []), ("infinity", []), ("infinity", [])]
    assert [one["reason"] for one in found.values()] == ["the host has no GPU", "the host has no GPU", ""]
    assert "no NVIDIA GPU" in refusal([server("ChatGLM2-6B")], [])
    assert "quantize_bit: 4 with gpus: [] (legacy_chat on CPU, slow)" in refusal([server("ChatGLM2-6B")], [])


def test_empty_gpus_ask_for_the_cpu_on_any_host():
    assert places([server("ChatGLM2-6B", gpus=[]), server("M3E-large", 8002, gpus=[])], [gpu(0)]) == {8001: ("legacy_chat", []), 8002: ("infinity", [])}


def test_too_old_for_vllm():
    old = [gpu(0, "V100", memory_mb=32510, compute_capability="7.0")]
    assert "compute capability 7.0, vllm v0.33.0 needs 7.5" in refusal([server("Qwen2.5-1.5B-Instruct", gpus=[0])], old)
    found = gpu_placement([server("Qwen2.5-1.5B-Instruct")], CARDS, old)[8001]
    assert found["engine"] == "transformers" and "compute capability 7.0" in found["reason"]
    # torch's build for CUDA 13 does not know it either, the one for 12.6 does
    assert "legacy_chat needs 7.5 or more" in refusal([server("Baichuan2-7B-Chat")], old)
    index = "https://download.pytorch.org/whl/cu126"
    assert places([server("Baichuan2-7B-Chat")], old, torch_index=index) == {8001: ("legacy_chat", [0])}


def test_too_new_for_an_old_build_of_torch():
    new = [gpu(0, "B200", memory_mb=183359, compute_capability="10.0")]
    assert "at most 9.0" in refusal([server("ChatGLM2-6B")], new, torch_index="https://mirror.example/whl/cu126/")
    assert places([server("ChatGLM2-6B")], new) == {8001: ("legacy_chat", [0])}


def test_old_driver():
    old = [gpu(0, driver_version="550.163.01")]
    text = refusal([server("Baichuan2-13B-Chat", engine="vllm")], old)
    assert "GPU 0 (L20): has the driver 550.163.01, vllm v0.23.0 needs 580 or newer" in text and "Update the driver" in text
    assert places([server("ChatGLM2-6B")], old, torch_index="/srv/whl/cu126") == {8001: ("legacy_chat", [0])}
    assert "needs 525.60" in refusal([server("ChatGLM2-6B")], [gpu(0, driver_version="470.256.02")], torch_index="/srv/whl/cu126")


def test_a_capability_that_nobody_knows_is_no_reason():
    assert places([server("ChatGLM2-6B")], [gpu(0, compute_capability=None)]) == {8001: ("legacy_chat", [0])}


# ---- GPUs that cannot be used


def test_a_broken_driver_is_no_reason_for_the_cpu():
    broken = [gpu(0, memory_mb=None, driver_version=None, problem="The NVIDIA driver is not installed. Install it and reboot.")]
    text = refusal([server("M3E-large")], broken)
    assert "GPU 0 (L20): The NVIDIA driver is not installed. Install it and reboot, or serve M3E-large with gpus: []." in text
    assert places([server("M3E-large", gpus=[])], broken) == {8001: ("infinity", [])}


def test_mig():
    assert "MIG is on" in refusal([server("ChatGLM2-6B")], [gpu(0, mig=True)])
    assert places([server("ChatGLM2-6B")], [gpu(0, mig=True), gpu(1)]) == {8001: ("legacy_chat", [1])}


def test_gpus_that_are_not_there():
    assert "the host has the GPUs 0, 1. Name those" in refusal([server("ChatGLM2-6B", gpus=[2])], [gpu(0), gpu(1)])
    assert "no NVIDIA GPU" in refusal([server("ChatGLM2-6B", gpus=[0])], [])


# ---- fitting


def test_best_fit():
    both = [gpu(0, "A100-80"), gpu(1, "T4")]
    assert places([server("ChatGLM2-6B", quantize_bit=4)], both) == {8001: ("legacy_chat", [1])}, "the small one, as long as it will do"
    assert places([server("Baichuan2-7B-Chat")], both) == {8001: ("vllm", [0])}


def test_explicit_lists_are_kept():
    found = places([server("ChatGLM2-6B"), server("Baichuan2-7B-Chat", 8002, gpus=[0])], [gpu(0, "L4"), gpu(1, "L4")])
    assert found == {8001: ("legacy_chat", [1]), 8002: ("vllm", [0])}
    text = refusal([server("ChatGLM2-6B", gpus=[0]), server("Baichuan2-7B-Chat", 8002, gpus=[0])], [gpu(0, "L4"), gpu(1, "L4")])
    assert "ChatGLM2-6B in 16 bit (on 0): 16.0 GB with legacy_chat" in text and "Baichuan2-7B-Chat in 16 bit (on 0)" in text


def test_tensor_parallel():
    two = [gpu(0, "3090"), gpu(1, "3090")]
    found = gpu_placement([server("Baichuan2-13B-Chat")], CARDS, two)[8001]
    assert (found["engine"], found["gpus"]) == ("vllm", [0, 1]) and found["need_gb"] == pytest.approx((27.8 + 3.36) / 2 + 2.5, abs=0.1)
    four = [gpu(index, "T4") for index in range(4)]
    assert places([server("Baichuan2-13B-Chat")], four) == {8001: ("vllm", [0, 1, 2, 3])}, "two are too small, and three are no power of two"
    assert "runs on 1, 2, 4, 8 GPUs at once" in refusal([server("Baichuan2-13B-Chat", gpus=[0, 1, 2], engine="vllm")], four)
    assert places([server("Baichuan2-13B-Chat", gpus=[0, 1, 2])], four) == {8001: ("legacy_chat", [0, 1, 2])}
    assert "runs on 1 GPUs at once" in refusal([server("M3E-large", gpus=[0, 1])], four)


def test_gpus_of_one_model_are_alike():
    mixed = [gpu(0, "3090"), gpu(1, "L4"), gpu(2, "L4")]
    assert places([server("Baichuan2-13B-Chat")], mixed) == {8001: ("vllm", [1, 2])}


def test_a_search_where_the_best_fit_alone_fails():
    cards = [*CARDS, *({**BY_NAME["ChatGLM2-6B"], "name": name, "kv_bytes_per_token": 0, "parameters_billion": size, "memory": {}} for name, size in
                       (("a", 2.7), ("b", 2.7), ("c", 3.7), ("d", 3.7), ("e", 3.7)))]  # fmt: skip
    servers = [server(name, 8001 + position) for position, name in enumerate("abcde")]
    # 7.5 + 7.5 + 9.5 + 9.5 + 9.5 GB into 17.1 and 26.6; the two small ones side by side would waste what a third large one needs
    gpus = [gpu(0, "x", memory_mb=17750), gpu(1, "x", memory_mb=27600)]
    found = gpu_placement(servers, cards, gpus)
    assert sorted(len([one for one in found.values() if one["gpus"] == [index]]) for index in (0, 1)) == [2, 3]


def test_the_refusal_has_the_numbers():
    text = refusal([server("Baichuan2-13B-Chat"), server("Baichuan2-7B-Chat", 8002)], [gpu(0, "A100-40")])
    for part in ("Baichuan2-13B-Chat in 16 bit (auto): 33.7 GB with vllm", "Baichuan2-7B-Chat in 16 bit (auto): 19.7 GB with vllm",
                 "GPU 0 (A100-40) 42.9 GB, 5.", "check_resources: false"):  # fmt: skip
        assert part in text, text
    assert "\n" not in text


def test_resources_that_nobody_wants_checked():
    found = gpu_placement([server("Baichuan2-13B-Chat"), server("ChatGLM2-6B", 8002)], CARDS, [gpu(0, "3090")], check_resources=False)
    assert [one["gpus"] for one in found.values()] == [[0], [0]]
    assert sum(one["fraction"] for one in found.values()) < 1
    assert "compute capability" in refusal([server("ChatGLM2-6B")], [gpu(0, compute_capability="6.1")], check_resources=False)


def test_models_with_a_cpu_engine_make_room():
    servers = [server("M3E-large", 8002), server("bge-reranker-base", 8003), server("Baichuan2-7B-Chat", 8001)]
    found = gpu_placement(servers, CARDS, [gpu(0, "3090")])
    assert {port: (one["device"], one["gpus"]) for port, one in found.items()} == {8002: ("gpu", [0]), 8003: ("cpu", []), 8001: ("gpu", [0])}
    assert "not enough GPU memory left: needs: M3E-large in 16 bit (auto): 6.0 GB with infinity" in found[8003]["reason"]


def test_one_model_more_moves_no_other():
    servers = [server("M3E-large", 8002), server("ChatGLM2-6B", 8003, quantize_bit=8), server("Baichuan2-7B-Chat", 8004)]
    gpus = [gpu(0, "L4"), gpu(1, "L20"), gpu(2, "L4")]
    for length in range(1, 4):
        before, after = places(servers[: length - 1], gpus), places(servers[:length], gpus)
        assert {port: after[port] for port in before} == before


def test_the_example_inventory_fits_its_gpus():
    hosts = yaml.safe_load((ROOT / "inventories/prod/hosts.yml").read_text())["all"]["children"]["gpu"]["hosts"]
    assert {item["model"] for host in hosts.values() for item in host["model_servers"]} == {
        "Baichuan2-13B-Chat", "Baichuan2-7B-Chat", "ChatGLM2-6B", "M3E-large", "bge-reranker-base",
    }  # fmt: skip
    assert places(hosts["gpu-1"]["model_servers"], [gpu(0, "L20")]) == {8001: ("vllm", [0]), 8003: ("infinity", [0])}
    on_two = places(hosts["gpu-2"]["model_servers"], [gpu(0, "3090"), gpu(1, "3090")])
    assert all(gpus for dummy, gpus in on_two.values()) and {gpus[0] for dummy, gpus in on_two.values()} == {0, 1}


def test_table():
    servers = {"gpu-1": [server("Baichuan2-13B-Chat", 8001), server("M3E-large", 8002, gpus=[])]}
    gpus = {"gpu-1": [gpu(0, "3090"), gpu(1, "3090"), gpu(2, "T4")]}
    endpoints = model_endpoints(servers, CARDS, {"gpu-1": "10.0.0.1"}, gpus=gpus)
    assert placement_table(endpoints, gpus) == [
        "host   model               port  engine    bits  runs on   needs         note",
        "gpu-1  Baichuan2-13B-Chat  8001  vllm      16    GPU 0, 1  18.1 GB each",
        "gpu-1  M3E-large           8002  infinity  16    CPU       8.0 GB",
        "",
        "host   GPU  name  memory   needed   models",
        "gpu-1  0    3090  25.8 GB  18.1 GB  Baichuan2-13B-Chat",
        "gpu-1  1    3090  25.8 GB  18.1 GB  Baichuan2-13B-Chat",
        "gpu-1  2    T4    16.1 GB  0 GB     -",
    ]
    assert placement_table(endpoints, gpus, markdown=True)[:3] == [
        "| host | model | port | engine | bits | runs on | needs | note |",
        "|---|---|---|---|---|---|---|---|",
        "| gpu-1 | Baichuan2-13B-Chat | 8001 | vllm | 16 | GPU 0, 1 | 18.1 GB each |  |",
    ]
    assert placement_table([]) == ["host  model  port  engine  bits  runs on  needs  note"]


@pytest.mark.parametrize("servers", ["x", [5], [{"model": "M3E-large"}], [{"port": 1}], [{"model": "M3E-larg", "port": 1}]])
def test_lists_with_faults(servers: Any):
    with pytest.raises(AnsibleFilterError, match="gpu_placement: "):
        gpu_placement(servers, CARDS)


# ---- for all hosts

_gpus = st.lists(st.sampled_from(list(MEMORY)), min_size=0, max_size=4).map(lambda names: [gpu(index, name) for index, name in enumerate(names)])


@st.composite
def _servers(draw: st.DrawFn) -> list[dict[str, Any]]:
    names = draw(st.lists(st.sampled_from(list(BY_NAME)), min_size=1, max_size=5, unique=True))
    found = []
    for position, name in enumerate(names):
        widths = sorted({width for engine in BY_NAME[name]["engines"] for width in engine["quantize_bits"]})
        gpus = draw(st.sampled_from(["auto", "auto", "auto", [0], [1], []]))
        found.append(server(name, 8001 + position, quantize_bit=draw(st.sampled_from(widths)), gpus=gpus))
    return found


def try_to(servers: list[dict[str, Any]], gpus: list[dict[str, Any]], **more: Any) -> dict[int, dict[str, Any]] | None:
    try:
        return gpu_placement(servers, CARDS, gpus, **more)
    except AnsibleFilterError:
        return None


@given(_servers(), _gpus, st.booleans())
def test_no_gpu_is_promised_twice(servers: list[dict[str, Any]], gpus: list[dict[str, Any]], check: bool):
    placed = try_to(servers, gpus, check_resources=check)
    assume(placed is not None and any(one["gpus"] for one in placed.values()))
    assert placed is not None and set(placed) == {item["port"] for item in servers}
    for one in gpus:
        total = one["memory_mb"] * 1.048576 / 1000
        here = [found for found in placed.values() if one["index"] in found["gpus"]]
        assert sum(found["memory_gb"] for found in here) <= total * _placement.USABLE + 0.01
        assert sum(found["fraction"] for found in here) <= _placement.USABLE + 0.001
        if check:
            assert sum(found["need_gb"] for found in here) <= total + 0.1 * len(here)
    for item in servers:
        found = placed[item["port"]]
        assert (found["device"] == "gpu") == bool(found["gpus"])
        assert found["device"] == "cpu" or 0 < found["fraction"] < 1
        if item["gpus"] != "auto":
            assert found["gpus"] == item["gpus"]
        assert item["quantize_bit"] in found["entry"]["quantize_bits"]


@given(_servers(), _gpus, st.randoms(use_true_random=False))
def test_the_order_of_the_gpus_does_not_matter(servers: list[dict[str, Any]], gpus: list[dict[str, Any]], random: Any):
    shuffled = list(gpus)
    random.shuffle(shuffled)
    assert try_to(servers, gpus) == try_to(servers, shuffled)


@given(_servers(), _gpus)
def test_what_fits_on_one_gpu_is_not_refused(servers: list[dict[str, Any]], gpus: list[dict[str, Any]]):
    free = [{**item, "gpus": "auto"} for item in servers]
    for one in gpus:
        alone = try_to(free, [one])
        if alone is not None and all(found["gpus"] for found in alone.values()):
            placed = try_to(free, gpus)
            assert placed is not None and all(found["gpus"] for found in placed.values())
            break


@given(_servers(), _gpus)
def test_one_more_with_a_cpu_engine_never_refuses_a_host(servers: list[dict[str, Any]], gpus: list[dict[str, Any]]):
    assume(all(item["model"] != "M3E-small" for item in servers))
    before = try_to(servers, gpus)
    assume(before is not None)
    after = try_to([*servers, server("M3E-small", 8100)], gpus)
    assert before is not None and after is not None
    assert {port: after[port]["gpus"] for port in before} == {port: found["gpus"] for port, found in before.items()} or after[8100]["gpus"]
