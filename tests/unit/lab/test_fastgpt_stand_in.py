# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The parts of the FastGPT stand-in that need no database, and how it starts and dies."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from ports import free_port

pytest.importorskip("aiohttp")
pytest.importorskip("json5")

STAND_IN = Path(__file__).resolve().parents[3] / "lab" / "stand_ins" / "fastgpt"
sys.path.insert(0, str(STAND_IN))

import fastgpt_graph as graph  # noqa: E402
import fastgpt_rules as rules  # noqa: E402

COMMENTED = '{\n  // a comment\n  "llmModels": [{"model": "m",}]\n}'


def of(version):
    return rules.Rules(rules.parse_version(version))


# -- versions ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["v4.6.7", "v4.8.20", "v4.9.0", "latest", ""])
def test_other_versions_are_refused(text):
    with pytest.raises(ValueError):
        rules.parse_version(text)


def test_versions_with_and_without_a_suffix():
    assert rules.parse_version("v4.8.9") == rules.parse_version("4.8.9") == (4, 8, 9)
    assert rules.parse_version("v4.8.15-fix3") == (4, 8, 15)
    assert rules.parse_version("v4.7") == (4, 7, 0)


@pytest.mark.parametrize(
    "version, json5, new_rerank, workflow, kills, status, cookie",
    [
        ("v4.6.8", False, False, False, True, 200, "token"),
        ("v4.7.1", False, True, False, False, 200, "token"),
        ("v4.8.3", False, True, True, True, 200, "token"),
        ("v4.8.9", True, True, True, True, 200, "fastgpt_token"),
        ("v4.8.17", True, True, True, True, 200, "fastgpt_token"),
        ("v4.8.19", True, True, True, True, 500, "fastgpt_token"),
    ],
)
def test_habits(version, json5, new_rerank, workflow, kills, status, cookie):
    r = of(version)
    assert (r.json5, r.new_rerank, r.workflow, r.race_kills, r.error_status, r.cookie) == (json5, new_rerank, workflow, kills, status, cookie)


def test_collections_were_renamed():
    assert of("v4.7.1").collection("dataset.datas") == "dataset.datas"
    assert of("v4.8.9").collection("dataset.datas") == "dataset_datas"


# -- config.json -------------------------------------------------------------------------------------------------------


def test_comments_kill_strict_versions_only():
    with pytest.raises(rules.ConfigError, match=r"SyntaxError: Expected double-quoted property name in JSON at position 4"):
        rules.parse_config(COMMENTED, of("v4.6.8"))
    assert rules.parse_config(COMMENTED, of("v4.8.9"))["llmModels"] == [{"model": "m"}]


@pytest.mark.parametrize("version", ["v4.6.8", "v4.8.9"])
@pytest.mark.parametrize("text", ["", "{", '{"a": tru}', "nonsense["])
def test_nonsense_is_refused_everywhere(version, text):
    with pytest.raises(rules.ConfigError, match="SyntaxError"):
        rules.parse_config(text, of(version))


def test_an_empty_object_and_unknown_keys_are_accepted():
    config = rules.parse_config('{"x": 1, "llmModels": null}', of("v4.6.8"))
    assert config["x"] == 1
    assert config["llmModels"] == config["vectorModels"] == config["reRankModels"] == []


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(rules.ConfigError, match=f"ENOENT: no such file or directory, open '{tmp_path}/config.json'"):
        rules.load_config(str(tmp_path / "config.json"), of("v4.6.8"))
    with pytest.raises(rules.ConfigError, match="EISDIR"):
        rules.load_config(str(tmp_path), of("v4.6.8"))


def test_reranker_address_and_key_are_blanked():
    config = rules.normalise({"reRankModels": [{"model": "r", "requestUrl": "http://x", "requestAuth": "secret"}]})
    assert rules.public_models(config, of("v4.8.9"))["reRankModels"] == [{"model": "r", "requestUrl": "", "requestAuth": ""}]
    assert rules.public_models(config, of("v4.6.8"))["reRankModels"] == [{"model": "r"}]


def test_models_are_found_by_model_or_name_else_the_first():
    models = [{"model": "a", "name": "A"}, {"model": "b", "name": "B"}]
    assert rules.find_model(models, "B") is models[1]
    assert rules.find_model(models, "nobody") is rules.find_model(models, None) is models[0]
    assert rules.find_model([], "a") is None


# -- small things --------------------------------------------------------------------------------------------------------


def test_vectors_are_padded_and_cut():
    assert rules.pad_vector([1.0, 2.0])[:3] == [1.0, 2.0, 0.0]
    assert len(rules.pad_vector([1.0])) == len(rules.pad_vector([1.0] * 2000)) == 1536


def test_indexes_of_one_item():
    assert [item["text"] for item in rules.default_indexes(of("v4.6.8"), "q", "a", None)] == ["q\na"]
    assert [item["text"] for item in rules.default_indexes(of("v4.8.9"), "q", "a", None)] == ["q\na", "q"]
    assert [item["text"] for item in rules.default_indexes(of("v4.8.9"), "q", "", None)] == ["q"]


def test_chinese_becomes_characters_and_pairs():
    assert rules.search_words("Hi 知识库") == "hi 知 识 库 知识 识库"


def test_ranks_are_fused_and_a_single_list_is_not():
    first = [{"id": "1", "q": "a", "score": [{"type": "embedding", "value": 0.5, "index": 0}]}]
    both = first + [{"id": "2", "q": "b", "score": [{"type": "embedding", "value": 0.4, "index": 1}]}]
    ranked = [{"id": "2", "q": "b", "score": [{"type": "reRank", "value": 0.9, "index": 0}]}]
    assert rules.fuse([(60, first), (60, []), (58, [])]) is first
    fused = rules.fuse([(60, both), (60, []), (58, ranked)])
    assert [item["id"] for item in fused] == ["2", "1"]
    assert [score["type"] for score in fused[0]["score"]] == ["embedding", "reRank", "rrf"]


def test_same_texts_count_once_and_tokens_are_limited():
    items = [{"q": "Hello, world", "a": ""}, {"q": "hello", "a": ""}, {"q": "Hello world!", "a": ""}]
    assert len(rules.drop_same(items)) == 2
    long = [{"q": "x" * 4000, "a": ""}] * 3
    assert len(rules.fit_tokens(long, 1200)) == 1
    assert len(rules.fit_tokens(long, 10)) == 1


# -- graphs --------------------------------------------------------------------------------------------------------------


class Recorder:
    def __init__(self):
        self.calls = []

    def steps(self):
        async def search(params):
            self.calls.append(("search", params["userChatInput"], params["datasets"]))
            return [{"q": "cat", "a": "Flower"}]

        async def chat(params):
            self.calls.append(("chat", params["userChatInput"], params.get("quoteQA")))
            return "it is Flower"

        async def say(text):
            self.calls.append(("say", text))

        async def announce(name):
            self.calls.append(("announce", name))

        return graph.Steps(search, chat, say, announce)


def v1(with_search):
    targets = [{"moduleId": "ai", "key": "userChatInput"}]
    ai = [{"key": "model", "value": "m", "valueType": "string"}, {"key": "userChatInput", "type": "target", "connected": True, "valueType": "string"},
          {"key": "unused", "type": "target"}]  # fmt: skip
    modules = []
    if with_search:
        targets.insert(0, {"moduleId": "search", "key": "userChatInput"})
        ai.append({"key": "quoteQA", "type": "target", "connected": True, "valueType": "datasetQuote"})
        inputs = [{"key": "datasets", "value": [{"datasetId": "1"}], "valueType": "selectDataset"}, {"key": "userChatInput", "connected": True}]
        outputs = [{"key": "quoteQA", "targets": [{"moduleId": "ai", "key": "quoteQA"}]}]
        modules.append({"moduleId": "search", "name": "s", "flowType": "datasetSearchNode", "inputs": inputs, "outputs": outputs})
    modules.append({"moduleId": "ai", "name": "ai", "flowType": "chatNode", "showStatus": True, "inputs": ai, "outputs": []})
    start = {"moduleId": "in", "name": "in", "flowType": "questionInput", "inputs": [{"key": "userChatInput", "type": "systemInput"}]}
    return [*modules, {**start, "outputs": [{"key": "userChatInput", "targets": targets}]}]


def v2(with_search):
    nodes = [{"nodeId": "start", "name": "start", "flowNodeType": "workflowStart", "inputs": [{"key": "userChatInput", "valueType": "string"}],
              "outputs": [{"id": "userChatInput", "key": "userChatInput"}]}]  # fmt: skip
    ai = [{"key": "userChatInput", "value": ["start", "userChatInput"], "valueType": "string"}]
    edges = [{"source": "start", "target": "ai"}]
    if with_search:
        inputs = [
            {"key": "datasets", "value": [{"datasetId": "1"}], "valueType": "selectDataset"},
            {"key": "userChatInput", "value": ["start", "userChatInput"]},
        ]
        nodes.append({"nodeId": "s", "name": "s", "flowNodeType": "datasetSearchNode", "inputs": inputs, "outputs": [{"id": "quoteQA", "key": "quoteQA"}]})
        ai.append({"key": "quoteQA", "value": ["s", "quoteQA"], "valueType": "datasetQuote"})
        edges = [{"source": "start", "target": "s"}, {"source": "s", "target": "ai"}, {"source": "start", "target": "ai"}]
    nodes.append({"nodeId": "ai", "name": "ai", "flowNodeType": "chatNode", "showStatus": True, "inputs": ai, "outputs": []})
    return nodes, edges


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("with_search", [False, True])
def test_a_graph_answers_once_with_what_was_found(version, with_search):
    recorder = Recorder()
    if version == 1:
        outcome = asyncio.run(graph.run_v1(v1(with_search), "who?", {}, recorder.steps()))
    else:
        outcome = asyncio.run(graph.run_v2(*v2(with_search), "who?", {}, recorder.steps()))
    assert outcome.answer == "it is Flower"
    chats = [call for call in recorder.calls if call[0] == "chat"]
    assert chats == [("chat", "who?", [{"q": "cat", "a": "Flower"}] if with_search else None)]
    assert ("announce", "ai") in recorder.calls
    assert any(call[0] == "search" for call in recorder.calls) is with_search


@pytest.mark.parametrize("version", [1, 2])
def test_a_search_without_datasets_is_an_error(version):
    if version == 1:
        modules = v1(True)
        modules[0]["inputs"][0]["value"] = []
        work = graph.run_v1(modules, "who?", {}, Recorder().steps())
    else:
        nodes, edges = v2(True)
        nodes[1]["inputs"][0]["value"] = []
        work = graph.run_v2(nodes, edges, "who?", {}, Recorder().steps())
    with pytest.raises(ValueError, match="Select dataset empty"):
        asyncio.run(work)


def test_an_unconnected_chat_input_never_runs():
    modules = v1(True)
    modules[-1]["outputs"][0]["targets"] = []
    assert asyncio.run(graph.run_v1(modules, "who?", {}, Recorder().steps())).answer == ""


# -- the process ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def stand_in(tmp_path):
    pytest.importorskip("pymongo")
    pytest.importorskip("psycopg")
    running = []

    def start(version, config, **env):
        port = free_port()
        (tmp_path / "config.json").write_text(config)
        settings = {
            "FASTGPT_VERSION": version, "PORT": str(port), "HOSTNAME": "127.0.0.1", "FASTGPT_STANDIN_CONFIG": str(tmp_path / "config.json"),
            "MONGODB_URI": "mongodb://127.0.0.1:9/fastgpt", "PG_URL": "postgresql://127.0.0.1:9/postgres", "FASTGPT_STANDIN_SELECTION_SECONDS": "0.3",
        }  # fmt: skip
        command = [sys.executable, str(STAND_IN / "fastgpt.py")]
        process = subprocess.Popen(command, env={**os.environ, **settings, **env}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        running.append(process)
        url = f"http://127.0.0.1:{port}"
        for _attempt in range(100):
            try:
                fetch(url + "/login")
                break
            except OSError:
                time.sleep(0.1)
        return process, url

    yield start
    for process in running:
        process.kill()
        process.communicate()


def fetch(url, timeout=20):
    try:
        with urllib.request.urlopen(url, timeout=timeout) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as exc:
        return exc.code, exc.read().decode()


def test_pages_answer_without_anything_behind_and_a_bad_config_kills_at_the_first_request(stand_in):
    process, url = stand_in("v4.6.8", COMMENTED)
    assert fetch(url + "/")[0] == fetch(url + "/login")[0] == 200
    assert fetch(url + "/api/admin/initv468")[0] == 404
    assert "<html" in fetch(url + "/api/nothing")[1]
    with pytest.raises(OSError):
        fetch(url + "/api/common/system/getInitData")
    assert process.wait(10) == 1
    assert "Load init config error SyntaxError: Expected double-quoted property name" in process.stdout.read()


def test_no_database_leaves_the_models_readable_and_it_stays_up(stand_in):
    process, url = stand_in("v4.8.9", COMMENTED)
    status, text = fetch(url + "/api/common/system/getInitData")
    data = json.loads(text)
    assert status == 200 and data["code"] == 200 and data["data"]["llmModels"] == [{"model": "m"}] and data["data"]["systemVersion"] == "4.8.9"
    status, text = fetch(url + "/api/core/app/list")
    assert status == 200 and json.loads(text)["code"] == 403 and json.loads(text)["statusText"] == "unAuthorization"
    assert process.poll() is None
    process.terminate()
    assert process.wait(5) == 0


@pytest.mark.parametrize("version, answers", [("v4.8.17", {200}), ("v4.8.18", {200, 429})])
def test_log_ins_are_limited_by_address_since_4_8_18(version, answers):
    pytest.importorskip("pymongo")
    pytest.importorskip("psycopg")
    import fastgpt_api

    api = fastgpt_api.Api(of(version), None, None, None, {})
    found = []
    for address in ["10.0.0.1"] * 12 + ["10.0.0.2"]:
        request = type("Request", (), {"headers": {"X-Forwarded-For": f"{address}, 127.0.0.1"}, "remote": "127.0.0.1"})()
        try:
            api.limit_logins(request)
            found.append(200)
        except fastgpt_api.Named as exc:
            found.append(fastgpt_api.NAMED[str(exc)][0])
    assert set(found) == answers and found[:10] == [200] * 10 and found[12] == 200
    assert found.count(429) == (2 if 429 in answers else 0)


def test_a_version_of_another_era_is_refused():
    command = [sys.executable, str(STAND_IN / "fastgpt.py")]
    done = subprocess.run(command, env={**os.environ, "FASTGPT_VERSION": "v4.9.0"}, capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 1 and "covers v4.6.8 to v4.8.19" in done.stderr
