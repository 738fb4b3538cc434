# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The filters that derive things from the model lists, against the catalogue that is shipped."""

from __future__ import annotations

import hashlib
import hmac
import json
from pathlib import Path

import pytest
import yaml
from ansible.errors import AnsibleFilterError
from ansible_collections.selfhosted.fastgpt.plugins.filter.fastgpt_models import fastgpt_models
from ansible_collections.selfhosted.fastgpt.plugins.filter.image_ref import image_ref
from ansible_collections.selfhosted.fastgpt.plugins.filter.model_containers import model_containers
from ansible_collections.selfhosted.fastgpt.plugins.filter.model_endpoints import model_endpoints
from ansible_collections.selfhosted.fastgpt.plugins.filter.model_server_faults import model_server_faults
from ansible_collections.selfhosted.fastgpt.plugins.filter.oneapi_channels import oneapi_channels
from ansible_collections.selfhosted.fastgpt.plugins.plugin_utils._models import shown
from hypothesis import given
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[4]
CARDS = yaml.safe_load((ROOT / "roles/model_cards/vars/main.yml").read_text())["model_cards_catalogue"]
BY_NAME = {card["name"]: card for card in CARDS}
MASTER = "m" * 40

# ---- the catalogue


def test_catalogue_has_the_models_of_the_tutorial():
    assert {
        "Baichuan2-13B-Chat",
        "Baichuan2-7B-Chat",
        "ChatGLM2-6B",
        "M3E-small",
        "M3E-base",
        "M3E-large",
        "bge-reranker-base",
        "bge-reranker-large",
        "Qwen2.5-1.5B-Instruct",
        "Qwen3-4B-Instruct-2507",
    } == set(BY_NAME)


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card["name"])
def test_card_is_whole(card):
    assert card["kind"] in ("chat", "embedding", "rerank")
    assert isinstance(card["context"], int) and card["context"] > 0
    assert set(card["weights"]) == {"modelscope", "huggingface"}
    assert all(source["id"].count("/") == 1 and source["revision"] for source in card["weights"].values())
    widths = {width for engine in card["engines"] for width in engine["quantize_bits"]}
    assert widths == set(card["memory"]), "every width that an engine serves has its memory"
    assert all(set(size) == {"ram_gb", "vram_gb"} for size in card["memory"].values())
    assert card["disk_gb"] > 0 and card["parameters_billion"] > 0 and card["provider"]
    assert ("dimensions" in card) == (card["kind"] == "embedding")
    if card["kind"] == "chat":
        assert card["kv_bytes_per_token"] > 0 and card["max_response"] < card["context"]
    assert 0 <= card.get("parameters_unquantized_billion", 0) < card["parameters_billion"]
    assert (min(widths) < 16) == ("parameters_unquantized_billion" in card)


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card["name"])
@pytest.mark.parametrize("source", ["modelscope", "huggingface"])
def test_every_combination_of_the_catalogue_is_accepted(card, source):
    for engine in card["engines"]:
        assert set(engine) <= {
            "name", "device", "quantize_bits", "image", "quantization", "gpus_max", "reserve_gb", "compute_capability_min", "driver_min", "on_request",
            "chat_template", "mend_tokenizer", "image_gb",
        }  # fmt: skip
        for width in engine["quantize_bits"]:
            for gpus in ([], ["auto"]) if engine["device"] == "cpu" else ([0], ["auto"]):
                server = {"model": card["name"], "port": 8001, "quantize_bit": width, "gpus": gpus if gpus != ["auto"] else "auto", "engine": engine["name"]}
                if gpus == ["auto"] and engine.get("on_request"):
                    continue
                assert model_server_faults([server], CARDS, weights_source=source) == []


def test_the_readme_has_the_catalogue():
    """The README's table is what the cards say."""
    text = (ROOT / "roles/model_cards/README.md").read_text()
    for card in CARDS:
        ways: dict[tuple[str, str], list[int]] = {}
        for engine in card["engines"]:
            ways.setdefault((engine["name"], engine["device"].upper()), []).extend(engine["quantize_bits"])
        bits = {way: ", ".join(str(width) for width in sorted(set(widths), reverse=True)) for way, widths in ways.items()}
        served = "; ".join(f"{name} on {device}, {widths} bit" for (name, device), widths in bits.items())
        assert f"| {card['name']} | {card['kind']} | {card['context']} | {card.get('dimensions', '')} | {served} |".replace("|  |", "| |") in text


def test_memory_tables_of_the_tutorial():
    assert {width: (size["ram_gb"], size["vram_gb"]) for width, size in BY_NAME["Baichuan2-13B-Chat"]["memory"].items()} == {
        16: (32, 28),
        8: (32, 17),
        4: (32, 9),
    }
    for name in ("Baichuan2-7B-Chat", "ChatGLM2-6B"):
        assert {width: (size["ram_gb"], size["vram_gb"]) for width, size in BY_NAME[name]["memory"].items()} == {16: (16, 16), 8: (16, 9), 4: (16, 6)}
    assert BY_NAME["M3E-large"]["memory"][16] == {"ram_gb": 8, "vram_gb": 6} and BY_NAME["M3E-large"]["dimensions"] == 1024
    assert BY_NAME["bge-reranker-base"]["memory"][16] == {"ram_gb": 4, "vram_gb": 3}


# ---- image_ref

HUB = {"docker.io": "r.example:5000/hub", "ghcr.io": "r.example:5000/ghcr/"}


@pytest.mark.parametrize(
    ("name", "registries", "expected"),
    [
        ("mongo:5.0.32", HUB, "r.example:5000/hub/library/mongo:5.0.32"),
        ("mongo", HUB, "r.example:5000/hub/library/mongo"),
        ("justsong/one-api:v0.6.10", HUB, "r.example:5000/hub/justsong/one-api:v0.6.10"),
        ("docker.io/library/mongo:5", HUB, "r.example:5000/hub/library/mongo:5"),
        ("docker.io/mongo:5", HUB, "r.example:5000/hub/library/mongo:5"),
        ("index.docker.io/mongo:5", HUB, "r.example:5000/hub/library/mongo:5"),
        ("mongo:5", {"index.docker.io": "r.example"}, "r.example/library/mongo:5"),
        ("ghcr.io/labring/fastgpt:v4.8.9", HUB, "r.example:5000/ghcr/labring/fastgpt:v4.8.9"),
        ("quay.io/a/b:1", HUB, "quay.io/a/b:1"),
        ("localhost/x:1", HUB, "localhost/x:1"),
        ("localhost:5000/x:1", {"localhost:5000": "r.example"}, "r.example/x:1"),
        ("mongo@sha256:" + "a" * 64, HUB, "r.example:5000/hub/library/mongo@sha256:" + "a" * 64),
        ("mongo:5@sha256:" + "a" * 64, HUB, "r.example:5000/hub/library/mongo:5@sha256:" + "a" * 64),
        ("mongo:5", {}, "mongo:5"),
        ("mongo:5", None, "mongo:5"),
        ("pgvector/pgvector:0.8.6-pg17", {"docker.io": "10.0.0.2:5000/docker.io"}, "10.0.0.2:5000/docker.io/pgvector/pgvector:0.8.6-pg17"),
    ],
)
def test_image_ref(name, registries, expected):
    assert image_ref(name, registries) == expected


@pytest.mark.parametrize(
    "name", ["", "Mongo:5", "mongo:", "mongo: 5", " mongo", "http://r/mongo", "mongo:5@sha256:short", "a//b", "/mongo", "mongo\n", None, 5, ["mongo"]]
)
def test_image_ref_refuses_what_is_no_name(name):
    with pytest.raises(AnsibleFilterError, match="image_ref: "):
        image_ref(name, HUB)


@pytest.mark.parametrize(
    "registries", ["x", [], {"docker.io": "https://r.example"}, {"docker.io": ""}, {"docker.io": None}, {"a b": "r"}, {"docker.io": "r example"}]
)
def test_image_ref_refuses_a_bad_map(registries):
    if registries == []:
        with pytest.raises(AnsibleFilterError):
            image_ref("mongo:5", registries)
        return
    with pytest.raises(AnsibleFilterError, match="registries"):
        image_ref("mongo:5", registries)


_part = st.from_regex(r"[a-z0-9]+(?:[._-][a-z0-9]+)*", fullmatch=True)
_tag = st.one_of(st.just(""), st.from_regex(r":[A-Za-z0-9_][A-Za-z0-9_.-]{0,20}", fullmatch=True))


@given(st.lists(_part, min_size=1, max_size=3), _tag)
def test_image_ref_on_the_hub_and_spelt_out_are_one(parts, tag):
    rest = "/".join(parts) + tag
    first = parts[0]
    short = rest if len(parts) == 1 or ("." not in first and first != "localhost") else f"docker.io/{rest}"
    assert image_ref(short, HUB) == image_ref(f"docker.io/{rest}" if short == rest else short, HUB)
    assert image_ref(short, HUB).startswith("r.example:5000/hub/") and image_ref(short, HUB).endswith(tag)


@given(st.one_of(st.text(), st.integers(), st.none(), st.lists(st.text())))
def test_image_ref_never_crashes(name):
    try:
        assert isinstance(image_ref(name, HUB), str)
    except AnsibleFilterError:
        pass


# ---- model_endpoints

SERVERS = {
    "gpu-2": [{"model": "M3E-large", "port": 8002}],
    "gpu-1": [
        {"model": "bge-reranker-base", "port": 8003, "gpus": []},
        {"model": "Qwen2.5-1.5B-Instruct", "port": 8001},
        {"model": "M3E-large", "port": 8002, "weights": {"source": "path", "path": "/srv/m3e"}},
    ],
    "gpu-3": [],
}
ADDRESSES = {"gpu-1": "10.0.0.1", "gpu-2": "10.0.0.2", "gpu-3": "10.0.0.3"}


def endpoints(**more):
    return model_endpoints(SERVERS, CARDS, ADDRESSES, master_key=MASTER, **more)


def test_endpoints():
    found = endpoints()
    assert [endpoint["name"] for endpoint in found] == ["Qwen2.5-1.5B-Instruct@gpu-1", "M3E-large@gpu-1", "bge-reranker-base@gpu-1", "M3E-large@gpu-2"]
    chat, embedding, rerank, other = found
    assert (chat["kind"], chat["engine"], chat["device"], chat["port"], chat["engine_port"]) == ("chat", "transformers", "cpu", 8001, 18001)
    assert (embedding["engine"], embedding["dimensions"], embedding["url"]) == ("infinity", 1024, "http://10.0.0.1:8002")
    assert embedding["weights"] == {"source": "path", "path": "/srv/m3e"} and other["weights"] == {}
    assert rerank["adapter_port"] == 28003 and chat["adapter_port"] is None and rerank["dimensions"] is None
    assert all(endpoint["gpus"] == [] and endpoint["quantize_bit"] == 16 and endpoint["card"]["name"] == endpoint["model"] for endpoint in found)
    expected = "sk-" + hmac.new(MASTER.encode(), b"gpu-1/Qwen2.5-1.5B-Instruct/8001", hashlib.sha256).hexdigest()[:48]
    assert chat["keys"] == [expected] and len(expected) == 51
    assert len({endpoint["keys"][0] for endpoint in found}) == 4


def test_endpoint_keys_during_a_rotation_and_without_a_master():
    rotated = endpoints(previous_key="p" * 40)
    assert all(len(endpoint["keys"]) == 2 and endpoint["keys"][0] == plain["keys"][0] for endpoint, plain in zip(rotated, endpoints()))
    assert all(endpoint["keys"] == [] for endpoint in model_endpoints(SERVERS, CARDS, ADDRESSES))


def test_endpoint_before_and_after_a_look_at_the_gpus():
    servers = {"g": [{"model": "Qwen3-4B-Instruct-2507", "port": 8001}, {"model": "M3E-large", "port": 8002}]}
    gpu = {"index": 0, "name": "NVIDIA L4", "memory_mb": 23034, "compute_capability": "8.9", "driver_version": "580.173.02"}
    before = model_endpoints(servers, CARDS, {"g": "10.0.0.1"}, MASTER)
    after = model_endpoints(servers, CARDS, {"g": "10.0.0.1"}, MASTER, gpus={"g": [gpu]})
    none = model_endpoints(servers, CARDS, {"g": "10.0.0.1"}, MASTER, gpus={"g": []})
    assert [(one["engine"], one["environment"], one["device"], one["gpus"]) for one in before] == [
        ("transformers", "transformers", "cpu", []),
        ("infinity", "infinity", "cpu", []),
    ]
    assert [(one["engine"], one["environment"], one["device"], one["gpus"]) for one in after] == [
        ("vllm", "", "gpu", [0]),
        ("infinity", "infinity-gpu", "gpu", [0]),
    ]
    assert after[0]["engine_entry"]["image"] == "v0.33.0" and 0.3 < after[0]["gpu_memory_fraction"] < 0.92
    assert after[0]["gpu_memory_gb"] > after[0]["need_gb"] > 0 and after[1]["note"] == ""
    assert [one["note"] for one in none] == ["the host has no GPU"] * 2 and [one["device"] for one in none] == ["cpu", "cpu"]
    changing = {"container", "engine", "engine_entry", "environment", "device", "gpus",
                "gpu_memory_gb", "cache_gb", "gpu_memory_fraction", "need_gb", "ram_gb", "note"}
    for other in (after, none):
        assert [{key: one[key] for key in one if key not in changing} for one in before] == [
            {key: one[key] for key in one if key not in changing} for one in other
        ], "what the gateway and FastGPT are told needs no facts"


def test_endpoints_of_a_host_whose_models_do_not_fit():
    small = {"index": 0, "name": "NVIDIA T4", "memory_mb": 15360, "compute_capability": "7.5", "driver_version": "580.173.02"}
    with pytest.raises(AnsibleFilterError, match="g: model_servers: gpus: these models do not fit"):
        model_endpoints({"g": [{"model": "Baichuan2-13B-Chat", "port": 8001}]}, CARDS, {"g": "10.0.0.1"}, gpus={"g": [small]})
    with pytest.raises(AnsibleFilterError, match="gpus: "):
        model_endpoints({}, CARDS, {}, gpus=[small])


def test_endpoint_behind_a_door_with_tls():
    found = model_endpoints(SERVERS, CARDS, ADDRESSES, tls_hosts=["gpu-2"])
    assert [one["url"] for one in found if one["host"] == "gpu-2"] == ["https://10.0.0.2:8002"]
    assert all(one["url"].startswith("http://") for one in found if one["host"] == "gpu-1")


@pytest.mark.parametrize(
    ("servers", "containers"),
    [
        ([{"model": "Qwen2.5-1.5B-Instruct", "port": 1, "gpus": []}], []),
        ([{"model": "Qwen2.5-1.5B-Instruct", "port": 1}], ["model-1"]),
        ([{"model": "ChatGLM2-6B", "port": 1}, {"model": "M3E-large", "port": 2}, {"model": "Baichuan2-7B-Chat", "port": 3}], ["model-3"]),
        ([{"model": "Baichuan2-7B-Chat", "port": 1, "quantize_bit": 8}], []),
        ([{"model": "Baichuan2-7B-Chat", "port": 1, "engine": "legacy_chat"}], []),
        ([{"model": "Baichuan2-7B-Chat", "port": 1}, {"model": "Qwen2.5-1.5B-Instruct", "port": 1}], ["model-1"]),
        ([{"model": ["x"]}, 5, {"model": "no such"}, {}, {"model": "Baichuan2-7B-Chat", "port": "x"}], []),
        ("Qwen2.5-1.5B-Instruct", []),
        (None, []),
    ],
)
def test_containers_that_a_host_could_need(servers, containers):
    assert model_containers(servers, CARDS) == containers


def test_later_cards_win():
    mine = {**BY_NAME["M3E-large"], "dimensions": 1000}
    (found,) = model_endpoints({"g": [{"model": "M3E-large", "port": 8001}]}, [*CARDS, mine], {"g": "10.0.0.1"})
    assert found["dimensions"] == 1000


@pytest.mark.parametrize(
    ("servers", "addresses", "words"),
    [
        ([], {}, "dictionary"),
        ({"g": "x"}, {"g": "a"}, "must be a list"),
        ({"g": [{"model": "M3E-lrge", "port": 1}]}, {"g": "a"}, "did you mean M3E-large"),
        ({"g": [{"model": "M3E-large", "port": "8002"}]}, {"g": "a"}, "must be a number"),
        ({"g": [{"model": "M3E-large", "port": 8002}]}, {}, "no node address"),
        ({"g": ["M3E-large"]}, {"g": "a"}, "dictionary"),
        ({"g": []}, "x", "addresses"),
    ],
)
def test_endpoints_refuse(servers, addresses, words):
    with pytest.raises(AnsibleFilterError, match=words):
        model_endpoints(servers, CARDS, addresses)


# ---- oneapi_channels


def test_channels():
    channels = oneapi_channels(endpoints())
    assert [channel["name"] for channel in channels] == ["Qwen2.5-1.5B-Instruct@gpu-1", "M3E-large@gpu-1", "M3E-large@gpu-2"]
    assert all(channel["type"] == 8 and not channel["base_url"].endswith(("/", "/v1")) and channel["group"] == "default" for channel in channels)
    assert channels[1]["models"] == ["M3E-large"] and channels[1]["priority"] == 0 and channels[1]["key"].startswith("sk-")
    with pytest.raises(AnsibleFilterError, match="master_key"):
        oneapi_channels(model_endpoints(SERVERS, CARDS, ADDRESSES))
    with pytest.raises(AnsibleFilterError):
        oneapi_channels("x")
    with pytest.raises(AnsibleFilterError):
        oneapi_channels([{}])


# ---- fastgpt_models


def test_fastgpt_models():
    found = fastgpt_models(endpoints(), "v4.8.9")
    (llm,), (vector,), (rerank,) = found["llm_models"], found["vector_models"], found["rerank_models"]
    assert llm["model"] == llm["name"] == "Qwen2.5-1.5B-Instruct" and llm["provider"] == "Qwen"
    assert llm["maxContext"] == 32768 and llm["maxResponse"] == 4096 and llm["datasetProcess"] and llm["usedInQueryExtension"]
    assert llm["toolChoice"] is False and llm["functionCall"] is False
    assert vector["model"] == "M3E-large" and vector["defaultToken"] == 500 and vector["maxToken"] == 1800 and vector["weight"] == 100
    assert rerank["requestUrl"] == "http://10.0.0.1:8003/v1/rerank" and rerank["requestAuth"].startswith("sk-")
    for entry in (llm, vector, rerank):
        assert entry["inputPrice"] == 0 and entry["charsPointsPrice"] == 0
    json.dumps(found)


def test_fastgpt_models_of_the_tutorial_fit_their_window():
    servers = {"g": [{"model": "Baichuan2-7B-Chat", "port": 8001}, {"model": "M3E-large", "port": 8002}]}
    (llm,) = fastgpt_models(model_endpoints(servers, CARDS, {"g": "10.0.0.1"}), "v4.6.8")["llm_models"]
    assert llm["maxContext"] == 4096 and llm["maxResponse"] == 1024 and llm["quoteMaxToken"] == 2000
    assert llm["quoteMaxToken"] + llm["maxResponse"] < llm["maxContext"]


def test_fastgpt_overrides():
    found = fastgpt_models(endpoints(), "v4.8.9", {"M3E-large": {"defaultToken": 400, "hidden": True}})
    assert found["vector_models"][0]["defaultToken"] == 400 and found["vector_models"][0]["hidden"] is True
    with pytest.raises(AnsibleFilterError, match="did you mean M3E-large"):
        fastgpt_models(endpoints(), "v4.8.9", {"M3E-larg": {"weight": 1}})
    with pytest.raises(AnsibleFilterError, match="overrides"):
        fastgpt_models(endpoints(), "v4.8.9", {"M3E-large": 1})
    for version in ("v4.8.20", "v4.17.0", "latest", 4.8):
        with pytest.raises(AnsibleFilterError, match="version"):
            fastgpt_models(endpoints(), version)


# ---- model_server_faults

GOOD = [
    {"model": "Qwen2.5-1.5B-Instruct", "port": 8001, "quantize_bit": 16, "gpus": []},
    {"model": "M3E-large", "port": 8002, "weights": {"source": "huggingface", "id": "moka-ai/m3e-large", "revision": "abc", "sha256": "a" * 64}},
    {"model": "bge-reranker-base", "port": 8003, "gpus": "auto", "engine": "infinity"},
]


def test_good_servers_have_no_fault():
    assert model_server_faults(GOOD, CARDS, "gpu-1") == []
    assert model_server_faults([], CARDS) == [] and model_server_faults(None, CARDS) == []


def one(item, **more):
    return [{"model": "M3E-large", "port": 8002, **item, **more}]


@pytest.mark.parametrize(
    ("servers", "variable", "words"),
    [
        ("M3E-large", "model_servers", "must be a list"),
        ({"model": "M3E-large"}, "model_servers", "must be a list"),
        (["M3E-large"], "model_servers[0]", "must be a dictionary"),
        (one({"model": "m3e-large"}), "model_servers[0].model", "did you mean M3E-large"),
        (one({"model": None}), "model_servers[0].model", "must be the name"),
        (one({"model": 7}), "model_servers[0].model", "must be the name"),
        (one({"port": 80}), "model_servers[0].port", "from 1024 to 45535"),
        (one({"port": 45536}), "model_servers[0].port", "from 1024 to 45535"),
        (one({"port": True}), "model_servers[0].port", "must be a number"),
        (one({"port": "8002"}), "model_servers[0].port", "must be a number"),
        ([{"model": "M3E-large"}], "model_servers[0].port", "must be a number"),
        (one({"quantize_bit": 5}), "model_servers[0].quantize_bit", "16, 8 or 4"),
        (one({"quantize_bit": "16"}), "model_servers[0].quantize_bit", "16, 8 or 4"),
        (one({"quantize_bit": True}), "model_servers[0].quantize_bit", "16, 8 or 4"),
        (one({"quantize_bit": 8}), "model_servers[0].quantize_bit", "quantize_bit: 16 with gpus: [] (infinity on CPU)"),
        (one({"gpus": 0}), "model_servers[0].gpus", "must be auto"),
        (one({"gpus": "all"}), "model_servers[0].gpus", "must be auto"),
        (one({"gpus": [0, 0]}), "model_servers[0].gpus", "different"),
        (one({"gpus": [-1]}), "model_servers[0].gpus", "must be auto"),
        (one({"gpus": [True]}), "model_servers[0].gpus", "must be auto"),
        (one({"gpus": {}}), "model_servers[0].gpus", "must be auto"),
        (one({"engine": "vllm"}), "model_servers[0].engine", "no such engine"),
        (one({"engine": 1}), "model_servers[0].engine", "name of an engine"),
        (one({"prot": 8002}), "model_servers[0].prot", "did you mean port"),
        (one({"weights": "x"}), "model_servers[0].weights", "dictionary"),
        (one({"weights": {"id": "a/b"}}), "model_servers[0].weights.source", "modelscope, huggingface, url, path"),
        (one({"weights": {"source": "modelscope"}}), "model_servers[0].weights.id", "needs it"),
        (one({"weights": {"source": "path", "path": "models"}}), "model_servers[0].weights.path", "absolute"),
        (one({"weights": {"source": "url", "url": "ftp://x"}}), "model_servers[0].weights.url", "http"),
        (one({"weights": {"source": "huggingface", "id": "m3e"}}), "model_servers[0].weights.id", "owner/name"),
        (one({"weights": {"source": "path", "path": "/x", "sha256": "abc"}}), "model_servers[0].weights.sha256", "64"),
        (one({"weights": {"source": "path", "path": "/x", "rev": "abc"}}), "model_servers[0].weights.rev", "is no key"),
        (one({}) + [{"model": "bge-reranker-base", "port": 8002}], "model_servers[1].port", "port 8002"),
        (one({}) + [{"model": "bge-reranker-base", "port": 18002}], "model_servers[1].port", "engine's of model_servers[0]"),
        ([{"model": "bge-reranker-base", "port": 8003}, {"model": "M3E-large", "port": 28003}], "model_servers[1].port", "rerank adapter's"),
        ([{"model": "bge-reranker-base", "port": 8003}, {"model": "M3E-large", "port": 18003}], "model_servers[1].port", "port 18003"),
        (one({}) + one({"port": 8005}), "model_servers[1].model", "on this host already"),
        (
            [{"model": "Qwen2.5-1.5B-Instruct", "port": 8001, "quantize_bit": 4}],
            "model_servers[0].quantize_bit",
            "What works: quantize_bit: 16 with gpus: [] (transformers on CPU); quantize_bit: 16 with gpus: auto or [0] (vllm on GPU).",
        ),
        ([{"model": "Qwen2.5-1.5B-Instruct", "port": 8001, "engine": "vllm", "gpus": []}], "model_servers[0].engine", "on this placement"),
        (
            [{"model": "Baichuan2-7B-Chat", "port": 8001, "quantize_bit": 8, "engine": "vllm"}],
            "model_servers[0].quantize_bit",
            "8 with gpus: auto or [0] (legacy_chat",
        ),
        ([{"model": "ChatGLM2-6B", "port": 8001, "gpus": [], "engine": "vllm"}], "model_servers[0].engine", "no such engine"),
        (
            [{"model": "ChatGLM2-6B", "port": 8001, "weights": {"source": "modelscope", "id": "ZhipuAI/chatglm2-6b", "revision": "master"}}],
            "model_servers[0].weights.revision",
            "runs code of its repository on modelscope, and this revision moves",
        ),
        (
            [{"model": "ChatGLM2-6B", "port": 8001, "weights": {"source": "huggingface", "id": "example/fork"}}],
            "model_servers[0].weights.revision",
            "Name the commit",
        ),
        ([{"model": "ChatGLM2-6B", "port": 8001, "weights": {"source": "url", "url": "http://h/x.tar"}}], "model_servers[0].weights.sha256", "must be pinned"),
    ],
)
def test_server_faults(servers, variable, words):
    found = model_server_faults(servers, CARDS, "gpu-1")
    assert len(found) == 1, found
    assert found[0].startswith(f"gpu-1: {variable}: ") and words in found[0] and found[0].endswith((".", "?")), found[0]


@pytest.mark.parametrize(
    "weights",
    [
        None,
        {"source": "modelscope", "id": "ZhipuAI/chatglm2-6b"},
        {"source": "huggingface", "id": "example/fork", "revision": "0" * 40},
        {"source": "path", "path": "/srv/chatglm2"},
        {"source": "url", "url": "http://h/x.tar", "sha256": "a" * 64},
    ],
)
def test_pinned_code_is_accepted(weights):
    assert model_server_faults([{"model": "ChatGLM2-6B", "port": 8001, "weights": weights}], CARDS) == []


def test_code_of_a_card_that_names_a_branch():
    card = {**BY_NAME["ChatGLM2-6B"], "name": "mine", "weights": {"modelscope": {"id": "a/b", "revision": "master"}, "huggingface": {"id": "a/b"}}}
    servers = [{"model": "mine", "port": 8001}]
    for source in ("modelscope", "huggingface"):
        (found,) = model_server_faults(servers, [*CARDS, card], weights_source=source)
        assert "model_servers[0].weights.revision" in found and source in found
    assert model_server_faults(servers, [*CARDS, card], weights_source="") == [], "an archive of one's own"
    assert model_server_faults([{"model": "mine", "port": 8001}], [{**card, "trust_remote_code": False}]) == []


def test_placement_is_among_the_faults_when_the_gpus_are_known():
    servers = [{"model": "Baichuan2-7B-Chat", "port": 8001}]
    assert model_server_faults(servers, CARDS, "gpu-1") == []
    (found,) = model_server_faults(servers, CARDS, "gpu-1", gpus=[])
    assert found.startswith("gpu-1: model_servers[0].gpus: ") and "no NVIDIA GPU" in found and "gpus: [] (legacy_chat on CPU, slow)" in found
    assert len(model_server_faults([{**servers[0], "port": 1}], CARDS, gpus=[])) == 1, "a list with faults is not placed"


@pytest.mark.parametrize(
    ("engines", "words"),
    [
        ([{"name": "tgi", "device": "gpu", "quantize_bits": [16]}], "not one of transformers, vllm, legacy_chat, infinity"),
        ([{"name": "vllm", "device": "cpu", "quantize_bits": [16], "image": "v1"}], "runs on gpu only"),
        ([{"name": "vllm", "device": "gpu", "quantize_bits": [16]}], "vllm without an image"),
        ([{"name": "vllm", "device": "gpu", "quantize_bits": [16, 8], "image": "v1", "quantization": {4: "awq"}}], "8 bit and no quantization"),
        ([{"name": "transformers", "device": "cpu", "quantize_bits": [4]}], "of which it can do 16"),
        ([{"name": "transformers", "device": "cpu", "quantize_bits": []}], "of which it can do 16"),
        ([{"name": "infinity", "device": "cpu", "quantize_bits": [16]}], "serves embedding and rerank only"),
    ],
)
def test_engines_of_an_own_card(engines, words):
    card = {"name": "mine", "kind": "chat", "context": 4096, "engines": engines}
    found = model_server_faults([{"model": "mine", "port": 8001, "gpus": "auto"}], [card])
    assert len([line for line in found if words in line]) == 1, found
    good = {"name": "vllm", "device": "gpu", "quantize_bits": [4], "image": "v0.33.0", "quantization": {4: "awq"}}
    assert model_server_faults([{"model": "mine", "port": 8001, "quantize_bit": 4}], [{**card, "engines": [good]}]) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dimensions": 2048}, "FastGPT would silently keep 1536"),
        ({"dimensions": "x"}, "not a positive number"),
        ({"kind": "embed"}, "not one of chat"),
        ({"engines": "infinity"}, "no engines"),
        ({"context": None}, "tokens"),
        ({"name": "a/b"}, "letters, digits"),
    ],
)
def test_own_cards_are_checked_where_they_are_used(change, words):
    card = {**BY_NAME["M3E-large"], "name": "mine", **change}
    found = model_server_faults([{"model": card["name"], "port": 8002}], [*CARDS, card])
    assert len(found) == 1 and words in found[0], found


def test_all_faults_come_at_once():
    servers = [{"model": "x", "port": 1, "quantize_bit": 3, "gpus": "y", "z": 1, "weights": 1}, 5, {"model": "M3E-large", "port": 8002, "quantize_bit": 4}]
    assert len(model_server_faults(servers, CARDS, "h")) == 8


def test_urls_lose_their_user():
    (found,) = model_server_faults(one({"weights": {"source": "url", "url": "ftp://me:s3cret@host/x"}}), CARDS)
    assert "s3cret" not in found


_scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.binary(max_size=4), st.dates(), st.just("auto"))
_keys = st.one_of(
    st.sampled_from(["model", "port", "quantize_bit", "gpus", "engine", "weights", "source", "id"]), st.text(max_size=5), st.integers(), st.none()
)
_yaml = st.recursive(_scalars, lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(_keys, inner, max_size=5)), max_leaves=25)
_item = st.fixed_dictionaries({}, optional={key: _yaml for key in ("model", "port", "quantize_bit", "gpus", "engine", "weights")})


@given(st.one_of(_yaml, st.lists(_item, max_size=4)), st.one_of(st.just(CARDS), _yaml), _scalars, _yaml)
def test_faults_of_any_yaml_are_lines(servers, cards, host, gpus):
    for line in model_server_faults(servers, cards, host, gpus=gpus):
        assert isinstance(line, str) and "\n" not in line and line.endswith((".", "?"))


def test_faults_of_a_list_that_holds_itself():
    servers: list = [{"model": "M3E-large", "port": 8002}]
    servers.append(servers)
    servers[0]["weights"] = servers
    assert len(model_server_faults(servers, CARDS)) == 2


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("М3E", '"М3E" (with U+041C, CYRILLIC CAPITAL LETTER EM)'),
        ("８000", '"８000" (with U+FF18, FULLWIDTH DIGIT EIGHT)'),
        ("８０００", '"８０００" (with U+FF18, FULLWIDTH DIGIT EIGHT)'),
        ("M3E\u200b", '"M3E?" (with U+200B, ZERO WIDTH SPACE)'),
        ("数据", '"数据"'),
        ("模型 M3E", '"模型 M3E"'),
        ("модель", '"модель"'),
    ],
)
def test_characters_that_pass_for_others_are_named(value, text):
    assert shown(value) == text
