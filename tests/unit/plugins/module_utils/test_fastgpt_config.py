# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""config.json as data: eras, checks, canonical text, the reader of JSON5."""

from __future__ import annotations

import json
import math
import typing as t

import pytest
from ansible_collections.selfhosted.fastgpt.plugins.module_utils import _fastgpt_config as fc

LLM = {"model": "Baichuan2-7B-Chat", "maxContext": 4096, "maxResponse": 1024, "quoteMaxToken": 2000}
VECTOR = {"model": "M3E-large"}
RERANK = {"model": "bge-reranker-base", "requestUrl": "http://192.0.2.1:8003/v1/rerank", "requestAuth": "sk-secret"}

# The file that ran on the real 4.6.8, 4.7.1 and 4.8.9 (reference/fastgpt.md B).
RAN = {
    "systemEnv": {"openapiPrefix": "fastgpt", "vectorMaxProcess": 15, "qaMaxProcess": 15, "pgHNSWEfSearch": 100},
    "llmModels": [
        {
            "model": "Baichuan2-7B-Chat", "name": "Baichuan2-7B-Chat",
            "maxContext": 4096, "maxResponse": 1024, "quoteMaxToken": 2000, "maxTemperature": 1.2,
            "inputPrice": 0, "outputPrice": 0, "charsPointsPrice": 0, "censor": False, "vision": False,
            "datasetProcess": True, "usedInClassify": True, "usedInExtractFields": True,
            "usedInToolCall": True, "usedInQueryExtension": True, "toolChoice": False, "functionCall": False,
            "customCQPrompt": "", "customExtractPrompt": "", "defaultSystemChatPrompt": "", "defaultConfig": {},
        }
    ],
    "vectorModels": [
        {
            "model": "M3E-large", "name": "M3E-large", "inputPrice": 0, "outputPrice": 0, "charsPointsPrice": 0,
            "defaultToken": 500, "maxToken": 1800, "weight": 100,
        }
    ],
    "reRankModels": [
        {
            "model": "bge-reranker-base", "name": "bge-reranker-base", "charsPointsPrice": 0, "inputPrice": 0,
            "requestUrl": "http://192.0.2.1:8003/v1/rerank", "requestAuth": "sk-secret",
        }
    ],
    "audioSpeechModels": [],
    "whisperModel": {"model": "whisper-1", "name": "Whisper1", "inputPrice": 0, "outputPrice": 0, "charsPointsPrice": 0},
}  # fmt: skip


def build(version: str = "v4.8.9", **changes: t.Any) -> fc.Built:
    given: dict[str, t.Any] = {"llm_models": [LLM], "vector_models": [VECTOR], "rerank_models": [RERANK], **changes}
    return fc.build(version, **given)


def covers(built: t.Any, wanted: t.Any) -> bool:
    if isinstance(wanted, dict):
        return isinstance(built, dict) and all(k in built and covers(built[k], v) for k, v in wanted.items())
    if isinstance(wanted, list):
        return isinstance(built, list) and len(built) == len(wanted) and all(map(covers, built, wanted))
    return fc.same(built, wanted)


# versions


@pytest.mark.parametrize(
    ("tag", "version", "era"),
    [
        ("v4.6.8", (4, 6, 8), "A"),
        ("4.6.9", (4, 6, 9), "A"),
        ("v4.7", (4, 7, 0), "A"),
        ("v4.8.3", (4, 8, 3), "A"),
        ("v4.8.4", (4, 8, 4), "B"),
        ("4.8.9", (4, 8, 9), "B"),
        ("v4.8.12-fix", (4, 8, 12), "B"),
        ("v4.8.17-fix-title", (4, 8, 17), "B"),
        ("v4.8.19-beta", (4, 8, 19), "B"),
        ("v4.8.20", (4, 8, 20), "C"),
        ("v4.8.20-fix2", (4, 8, 20), "C"),
        ("v4.9.7-fix2", (4, 9, 7), "C"),
        ("v4.14.2", (4, 14, 2), "C"),
        ("v4.14.10", (4, 14, 10), "C"),
        ("v4.15.0", (4, 15, 0), "D"),
        ("v4.17.0", (4, 17, 0), "E"),
        ("v5.0.0", (5, 0, 0), "E"),
        ("v4.6.7", (4, 6, 7), ""),
        ("v3.9.9", (3, 9, 9), ""),
    ],
)
def test_versions_and_eras(tag: str, version: tuple[int, int, int], era: str) -> None:
    assert fc.parse_version(tag) == version
    assert fc.era_of(version) == era
    assert (fc.refusal(tag) == "") is (era in ("A", "B"))


@pytest.mark.parametrize("tag", ["", "latest", "v4", "4.8.x", "v4.8.9 fix", "v4.8.9-", "v-4.8.9", "v4.8.9.1", "v4.8.9\n-x"])
def test_no_versions(tag: str) -> None:
    with pytest.raises(fc.VersionError, match="image tag"):
        fc.parse_version(tag)


def test_refusals_name_what_to_use() -> None:
    assert "model API" in fc.refusal("v4.8.20") and "v4.8.19" in fc.refusal("v4.8.20")
    assert "reads no config.json" in fc.refusal("v4.15.0")
    assert "use v4.6.8" in fc.refusal("v4.6.7")
    assert build("v4.9.0").config == {} and len(build("v4.9.0").faults) == 1


# the file


@pytest.mark.parametrize("version", ["v4.6.8", "v4.7.1", "v4.8.9", "v4.8.19-beta"])
def test_the_file_that_ran_is_what_a_few_fields_give(version: str) -> None:
    built = build(version)
    assert built.faults == [] and built.warnings == []
    assert covers(built.config, RAN)
    assert json.loads(fc.canonical(built.config)) == built.config


def test_a_full_entry_goes_through_unchanged() -> None:
    built = fc.build(
        "v4.8.9", llm_models=RAN["llmModels"], vector_models=RAN["vectorModels"], rerank_models=RAN["reRankModels"],
        system_env=RAN["systemEnv"], whisper_model=RAN["whisperModel"],
    )  # fmt: skip
    assert built.faults == [] and covers(built.config, RAN)


def test_order_of_given_keys_does_not_matter() -> None:
    first = build(llm_models=[{**LLM, "defaultConfig": {"b": 1, "a": 2}}])
    second = build(llm_models=[{"defaultConfig": {"a": 2, "b": 1}, **dict(reversed(LLM.items()))}])
    assert fc.canonical(first.config) == fc.canonical(second.config)


def test_order_of_models_matters_and_default_comes_first() -> None:
    other = {**LLM, "model": "other"}
    assert not fc.same(build(llm_models=[LLM, other]).config, build(llm_models=[other, LLM]).config)
    chosen = build(llm_models=[LLM, {**other, "isDefault": True}])
    assert [m["model"] for m in chosen.config["llmModels"]] == ["other", LLM["model"]]
    assert "isDefault" not in chosen.config["llmModels"][0]
    # A variable that was given with -e is text.
    chosen = build(llm_models=[{**LLM, "isDefault": "no"}, {**other, "isDefault": "yes"}])
    assert [m["model"] for m in chosen.config["llmModels"]] == ["other", LLM["model"]]
    both = build(llm_models=[{**LLM, "isDefault": True}, {**other, "isDefault": "true"}])
    assert "one model of a kind" in both.faults[0]


def test_text_from_variables_becomes_numbers_and_bools() -> None:
    built = build(llm_models=[{**LLM, "maxContext": "4096", "vision": "yes", "maxTemperature": "0.9"}])
    entry = built.config["llmModels"][0]
    assert (entry["maxContext"], entry["vision"], entry["maxTemperature"]) == (4096, True, 0.9)
    assert built.faults == []


def test_unknown_fields_are_written_with_a_warning() -> None:
    built = build(llm_models=[{**LLM, "maxcontext": 1}])
    assert built.config["llmModels"][0]["maxcontext"] == 1
    assert "knows no such field" in built.warnings[0]


def test_fe_configs() -> None:
    assert "feConfigs" not in build().config
    assert build(fe_configs={"lafEnv": "x"}).config["feConfigs"] == {"lafEnv": "x"}
    assert "do not" not in str(build(fe_configs={"a": 1}).warnings)
    assert "does not read" in build("v4.6.8", fe_configs={"a": 1}).warnings[0]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"llm_models": []}, "llm_models: the list is empty"),
        ({"vector_models": []}, "vector_models: the list is empty"),
        ({"llm_models": [{**LLM, "maxContext": None}]}, "maxContext: is missing"),
        ({"llm_models": [{**LLM, "model": ""}]}, "model: is empty"),
        ({"llm_models": [{**LLM, "maxContext": "much"}]}, "must be a whole number"),
        ({"llm_models": [{**LLM, "maxContext": True}]}, "must be a whole number"),
        ({"llm_models": [{**LLM, "maxContext": 4096.5}]}, "must be a whole number"),
        ({"llm_models": [{**LLM, "toolChoice": 3}]}, "must be true or false"),
        ({"llm_models": [{**LLM, "defaultConfig": []}]}, "must be a dictionary"),
        ({"llm_models": [{**LLM, "defaultConfig": {"x": math.nan}}]}, "JSON has no such number"),
        # The seed's own figures for a model of 4096 tokens.
        ({"llm_models": [{**LLM, "quoteMaxToken": 13000}]}, "quoteMaxToken: 13000"),
        ({"llm_models": [{**LLM, "maxResponse": 4096}]}, "maxResponse: 4096: must be less"),
        ({"llm_models": [{**LLM, "maxResponse": 0}]}, "at least 1"),
        ({"llm_models": [{**LLM, "maxTemperature": 9}]}, "maxTemperature"),
        ({"llm_models": [LLM, LLM]}, "stands there twice"),
        ({"llm_models": [LLM, {**LLM, "model": "b", "name": LLM["model"]}]}, "name 'Baichuan2-7B-Chat' stands there twice"),
        # FastGPT finds a model by either, so that a question for one would go to the other.
        ({"llm_models": [{**LLM, "name": "b"}, {**LLM, "model": "b", "name": "c"}]}, "is another entry's model"),
        ({"vector_models": [{"model": "b", "name": "c"}, {"model": "a", "name": "b"}]}, "is another entry's model"),
        ({"llm_models": [{**LLM, "model": "Baichuan2 "}]}, "as the gateway has it"),
        ({"vector_models": [{"model": "a,b"}]}, "as the gateway has it"),
        # The seed's maxContext for a model with a window of 4096 tokens.
        ({"llm_models": [{**LLM, "maxContext": 16000, "context": 4096}]}, "maxContext: 16000: the model's own context is 4096"),
        ({"llm_models": [{**LLM, "context": "wide"}]}, "must be a whole number"),
        ({"llm_models": [{**LLM, "defaultSystemChatPrompt": "a\ud800b"}]}, "half of a character"),
        ({"llm_models": [{**LLM, "defaultConfig": {"\udc00": 1}}]}, "half of a character"),
        ({"llm_models": [{**LLM, "datasetProcess": False}]}, "no model has datasetProcess"),
        ({"llm_models": [{**LLM, "usedInToolCall": False}]}, "no model has usedInToolCall"),
        ({"vector_models": [{**VECTOR, "dimensions": 3072}]}, "dimensions: 3072"),
        ({"vector_models": [{**VECTOR, "defaultToken": 2000}]}, "must not be more than maxToken"),
        ({"rerank_models": [{**RERANK, "requestUrl": "/v1/rerank"}]}, "must be absolute"),
        ({"rerank_models": [{**RERANK, "requestUrl": "{{host}}/api/v1/rerank"}]}, "placeholders"),
        ({"rerank_models": [{**RERANK, "requestUrl": "http://localhost:6006/v1/rerank"}]}, "FastGPT container itself"),
        ({"rerank_models": [{**RERANK, "requestUrl": "http://127.0.0.1:6006/v1/rerank"}]}, "FastGPT container itself"),
        ({"rerank_models": [{**RERANK, "requestUrl": "http://[::1]:6006/v1/rerank"}]}, "FastGPT container itself"),
        ({"rerank_models": [{**RERANK, "requestUrl": "http://localhost.:6006/v1/rerank"}]}, "FastGPT container itself"),
        ({"rerank_models": [{**RERANK, "requestUrl": "http://0.0.0.0:6006/v1/rerank"}]}, "FastGPT container itself"),
        ({"rerank_models": [{**RERANK, "requestUrl": "ftp://192.0.2.1/v1/rerank"}]}, "must be absolute"),
        ({"rerank_models": [{**RERANK, "requestUrl": "http://192.0.2.1:99999/v1/rerank"}]}, "is no URL"),
        ({"rerank_models": [{**RERANK, "requestUrl": "http://192.0.2.1:8003"}]}, "whole endpoint"),
        ({"rerank_models": [{**RERANK, "requestUrl": None}]}, "requestUrl: is missing"),
        ({"rerank_models": [{**RERANK, "requestAuth": "Bearer sk-secret"}]}, "leave 'Bearer ' out"),
        ({"system_env": {"chatApiKey": "sk-secret"}}, "CHAT_API_KEY"),
        ({"system_env": {"oneapiUrl": "http://x"}}, "OPENAI_BASE_URL"),
        ({"system_env": {"qaMaxProcess": "many"}}, "must be a whole number"),
        ({"system_env": {"vectorMaxProcess": 0}}, "at least 1"),
        ({"system_env": {"pgHNSWEfSearch": 1001}}, "pgvector refuses every search"),
    ],
)
def test_faults(changes: dict[str, t.Any], text: str) -> None:
    built = build(**changes)
    assert any(text in f for f in built.faults), built.faults
    assert "sk-secret" not in "".join(built.faults + built.warnings)


def test_all_faults_at_once() -> None:
    built = build(llm_models=[], vector_models=[], rerank_models=[{**RERANK, "requestUrl": "x"}], system_env={"chatApiKey": "a"})
    assert len(built.faults) == 4


def test_flags_that_4_6_8_does_not_know_are_not_asked_for_there() -> None:
    models = [{**LLM, "usedInToolCall": False}]
    assert build("v4.6.8", llm_models=models).faults == []
    assert build("v4.7", llm_models=models).faults


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"llm_models": [{**LLM, "toolChoice": True}]}, "speaks tools"),
        ({"llm_models": [{**LLM, "functionCall": True, "tools": False}]}, "speaks tools"),
        ({"vector_models": [{**VECTOR, "defaultToken": 800, "context": 512}]}, "reads 512 tokens"),
        ({"rerank_models": [RERANK, {**RERANK, "model": "second"}]}, "uses the first only"),
        ({"vector_models": [{"model": LLM["model"]}]}, "share one list of names"),
    ],
)
def test_warnings(changes: dict[str, t.Any], text: str) -> None:
    built = build(**changes)
    assert built.faults == [] and text in built.warnings[0]


def test_what_is_known_of_a_model_is_checked_and_not_written() -> None:
    built = build(
        llm_models=[{**LLM, "context": 4096, "tools": True, "toolChoice": True}],
        vector_models=[{**VECTOR, "context": 512, "dimensions": 1024}],
    )
    assert built.faults == [] and built.warnings == []
    assert not {"context", "tools", "dimensions"} & {key for kind in ("llmModels", "vectorModels") for key in built.config[kind][0]}


@pytest.mark.parametrize("version", ["v4.6.8", "v4.7.1", "v4.8.3", "v4.8.4", "v4.8.19"])
def test_every_version_gets_the_same_file(version: str) -> None:
    models: dict[str, t.Any] = {
        "llm_models": [{**LLM, "provider": "Baichuan", "fieldMap": {"max_tokens": "max_completion_tokens"}}],
        "vector_models": [{**VECTOR, "dbConfig": {"a": 1}, "queryConfig": {}}],
    }
    assert fc.canonical(build(version, **models).config) == fc.canonical(build("v4.8.9", **models).config)


@pytest.mark.parametrize(
    ("option", "fields"),
    [("llm_models", fc.LLM_FIELDS), ("vector_models", fc.VECTOR_FIELDS), ("rerank_models", fc.RERANK_FIELDS), ("audio_speech_models", fc.SPEECH_FIELDS)],
)
def test_every_field_can_be_given(option: str, fields: dict[str, fc.Field]) -> None:
    values: dict[str, t.Any] = {"str": "text", "int": 7, "number": 0.5, "bool": False, "dict": {"k": 1}, "list": [{"label": "a"}]}
    given = {key: values[field.kind] for key, field in fields.items()}
    first = {"llm_models": [LLM], "vector_models": [VECTOR]}.get(option, [])
    key = {"llm_models": "llmModels", "vector_models": "vectorModels", "rerank_models": "reRankModels", "audio_speech_models": "audioSpeechModels"}[option]
    built = build(**{option: [*first, given]})
    assert built.config[key][-1] == given and list(given) == list(fields)


def test_secrets_are_found_wherever_they_stand() -> None:
    value = {"customPdfParse": {"key": "k1", "doc2xKey": "k2"}, "list": [{"requestAuth": "k3", "x": {"chatApiKey": ""}}], "name": "n", "token": 3}
    assert fc.secrets_in(value) == {"k1", "k2", "k3"}


def test_equality_is_that_of_json() -> None:
    assert fc.same({"a": 1, "b": [1.0]}, {"b": [1], "a": 1.0})
    assert not fc.same(True, 1) and not fc.same(0, False) and not fc.same([1, 2], [2, 1])
    assert not fc.same({"a": None}, {}) and not fc.same("1", 1) and fc.same(None, None)


def test_secrets_are_hidden_but_a_change_shows() -> None:
    old = {"reRankModels": [{"model": "m", "requestAuth": "old-secret"}], "other": {"chatApiKey": "k1"}}
    new = {"reRankModels": [{"model": "m", "requestAuth": "new-secret"}], "other": {"chatApiKey": "k1"}}
    shown = json.dumps([fc.masked(old), fc.masked(new, old)])
    assert "secret" not in shown and "k1" not in shown
    assert fc.masked(new, old)["reRankModels"][0]["requestAuth"] == "******** (differs)"
    assert fc.masked(old, old)["reRankModels"][0]["requestAuth"] == "********"


# JSON5

SEED = """\
// 已使用 json5 解析，会自动去掉注释
{
  "systemEnv": {
    "vectorMaxProcess": 15, // how many
    /* and
       this */ 'qaMaxProcess': 15,
  },
  llmModels: [{model: "Baichuan2", maxContext: 16e3, "name": 'it\\'s "x"',},],
}
"""


def test_reads_a_file_with_comments() -> None:
    found = fc.read_existing(SEED.encode())
    assert not found.strict and found.error == ""
    assert found.value == {
        "systemEnv": {"vectorMaxProcess": 15, "qaMaxProcess": 15},
        "llmModels": [{"model": "Baichuan2", "maxContext": 16000.0, "name": 'it\'s "x"'}],
    }


def test_plain_json_is_strict_and_a_key_twice_is_not() -> None:
    assert fc.read_existing(b'{"a": 1}').strict
    assert not fc.read_existing(b'{"a": 1, "a": 2}').strict
    assert not fc.read_existing(b'{"a": NaN}').strict
    # JSON.parse stops at a byte-order mark.
    assert not fc.read_existing(b'\xef\xbb\xbf{"a": 1}').strict and fc.read_existing(b'\xef\xbb\xbf{"a": 1}').value == {"a": 1}


@pytest.mark.parametrize("data", [b"", b"<html>", b"\xff\xfe", b"{", b"[1 2]", b"{a 1}", b'"x', b"/* x", b"[01]", b"{} x", b"[" * 5000, b"['\\1']"])
def test_unreadable(data: bytes) -> None:
    found = fc.read_existing(data)
    assert found.error and found.value is None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0x1F", 31), ("-.5", -0.5), ("5.", 5.0), ("+1", 1), ("1e3", 1000.0), ("-Infinity", -math.inf), ("0", 0),
        ("'\\x41\\u0042\\\n\\v\\0'", "AB\v\0"), ("'\\ud83d\\ude00'", "\U0001f600"), ("{$a_1: 1, ünï: 2}", {"$a_1": 1, "ünï": 2}),
        ("\ufeff[null,true,false,]", [None, True, False]), ("[]// end", []), ("{'a':{}}", {"a": {}}), ("'a\u2028b'", "a\u2028b"),
        ("{name : 1, A\u0300b /* x */ : 2}", {"name": 1, "A\u0300b": 2}),
    ],
)  # fmt: skip
def test_json5_values(text: str, value: t.Any) -> None:
    assert fc.read_json5(text) == value
