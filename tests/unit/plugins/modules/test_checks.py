# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The three check modules against small servers that can be made to misbehave."""

from __future__ import annotations

import hashlib
import http.server
import json
import math
import pathlib
import threading
import typing as t
from urllib.parse import parse_qs, urlsplit

import pytest
from ansible.module_utils.testing import patch_module_args
from ansible_collections.selfhosted.fastgpt.plugins.module_utils import _checks, _fastgpt_graphs
from ansible_collections.selfhosted.fastgpt.plugins.modules import fastgpt_check, model_server_check, oneapi_check

KEY = "sk-" + "ab12" * 12
PASSWORD = "dk3-Kq0s_Lw9zT"
Reply = tuple[int, str, bytes]


def as_json(body: t.Any, status: int = 200) -> Reply:
    return status, "application/json", json.dumps(body, ensure_ascii=False).encode()


def as_events(*lines: str) -> Reply:
    return 200, "text/event-stream", "".join(f"{line}\n\n" for line in lines).encode()


def chunk(text: str, finish: str | None = None) -> str:
    return "data: " + json.dumps({"choices": [{"delta": {"content": text}, "finish_reason": finish}]})


class Fake:
    """A server whose subclass answers; `twist` names the ways in which it is to misbehave."""

    def __init__(self, *twist: str) -> None:
        self.twist = set(twist)
        self.seen: list[tuple[str, str, t.Any]] = []
        fake = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *unused: t.Any) -> None:
                pass

            def answer(self) -> None:
                raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                parts = urlsplit(self.path)
                body = json.loads(raw) if raw else None
                fake.seen.append((self.command, self.path, body))
                query = {name: values[0] for name, values in parse_qs(parts.query).items()}
                status, kind, answer = fake.answer(self.command, parts.path, query, body, self.headers)
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            do_GET = do_POST = do_DELETE = answer

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def answer(self, method: str, path: str, query: dict[str, str], body: t.Any, headers: t.Any) -> Reply:
        raise NotImplementedError

    def __enter__(self) -> t.Any:
        return self

    def __exit__(self, *unused: t.Any) -> None:
        self.server.shutdown()
        self.server.server_close()


def run(module: t.Any, capsys: pytest.CaptureFixture[str], check_mode: bool = False, **arguments: t.Any) -> dict[str, t.Any]:
    with patch_module_args({**arguments, "_ansible_check_mode": check_mode, "_ansible_remote_tmp": "/tmp"}):
        with pytest.raises(SystemExit):
            module.main()
    result: dict[str, t.Any] = json.loads(capsys.readouterr().out)
    assert "checks" in result, result
    assert result["changed"] is False and result["ok"] == all(check["ok"] for check in result["checks"])
    for check in result["checks"]:
        assert set(check) == {"name", "ok", "seconds", "detail"} and check["detail"] and "\n" not in check["detail"]
    assert KEY not in str(result["checks"]) and PASSWORD not in str(result["checks"])
    return result


def reds(result: dict[str, t.Any]) -> dict[str, str]:
    return {check["name"]: check["detail"] for check in result["checks"] if not check["ok"]}


# ---- the runner


def test_a_crash_is_a_red_check_and_secrets_are_hidden():
    checks = _checks.Checks(["s3cret", None, ""])
    assert checks.run("good", lambda: "fine") is True
    assert checks.run("crash", lambda: str(1 // 0)) is False
    assert checks.run("told", lambda: "the s3cret is out") is True

    def fails() -> str:
        raise _checks.CheckError("it s3cret\nbroke", "Mend it")

    assert checks.run("fails", fails) is False
    checks.skip("later", "no time")
    details = {result["name"]: result["detail"] for result in checks.results}
    assert "ZeroDivisionError" in details["crash"] and details["fails"] == "it ******** broke. Mend it."
    assert details["told"] == "the ******** is out" and details["later"] == "Not tried: no time."
    assert not checks.ok and all(result["seconds"] >= 0 for result in checks.results)
    checks.run("long", lambda: "x" * 5000)
    assert len(checks.results[-1]["detail"]) <= 400


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"error": {"message": "a"}}, "a"),
        ({"error": {"code": 1}}, "{'code': 1}"),
        ({"error": "b"}, "b"),
        ({"message": "c"}, "c"),
        ({"detail": "d"}, "d"),
        ({"code": 500, "statusText": "e", "message": ""}, "e"),
        ([], ""),
        (None, ""),
    ],
)
def test_message_of(body, message):
    assert _checks.message_of(body) == message


ONE_API = {"url": "http://127.0.0.1:9", "key": KEY, "models": []}
FASTGPT = {"url": "http://127.0.0.1:9", "version": "v4.8.9", "password": PASSWORD, "chat_model": "chat", "vector_model": "embed"}


@pytest.mark.parametrize(
    ("module", "given", "words"),
    [
        (model_server_check, {"endpoints": [], "timeout": 0}, "timeout: 0: must be at least 1"),
        (model_server_check, {"endpoints": [], "ca_path": "/no/such.pem"}, "ca_path: /no/such.pem: there is no such file"),
        (oneapi_check, {**ONE_API, "client_cert": "/no/such.pem"}, "client_cert: /no/such.pem"),
        (oneapi_check, {**ONE_API, "client_key": "/etc/hostname"}, "client_cert"),
        (oneapi_check, {**ONE_API, "url": "http://127.0.0.1:9/v1"}, "without a path"),
        (oneapi_check, {**ONE_API, "url": "127.0.0.1:9"}, "must be http://"),
        (fastgpt_check, {**FASTGPT, "url": "http://me:s3cret-word@127.0.0.1:9"}, "without a user"),
        (fastgpt_check, {**FASTGPT, "version": "latest"}, "version: 'latest': must be FastGPT's image tag"),
        (fastgpt_check, {**FASTGPT, "version": "v4.8.20"}, "v4.6.8 to v4.8.19"),
        (fastgpt_check, {**FASTGPT, "version": "v4.6.7"}, "v4.6.8 to v4.8.19"),
    ],
)
def test_what_cannot_work_fails_before_anything_is_asked(capsys, monkeypatch, module, given, words):
    monkeypatch.setattr(_checks._http, "request", lambda *unused, **more: pytest.fail("asked"))
    with patch_module_args({**given, "_ansible_remote_tmp": "/tmp"}), pytest.raises(SystemExit):
        module.main()
    result = json.loads(capsys.readouterr().out)
    assert result["failed"] and words in result["msg"] and "s3cret-word" not in result["msg"]


def test_certificates_reach_every_request(capsys, monkeypatch, tmp_path):
    """TLS itself is tested with the client; here only that no request goes without these options."""
    files = {name: str(tmp_path / name) for name in ("ca_path", "client_cert", "client_key")}
    for path in files.values():
        pathlib.Path(path).touch()
    seen = []

    def refuse(method, url, **options):
        seen.append({name: options.get(name) for name in (*files, "validate_certs", "timeout")})
        raise _checks._http.TransportError(f"{url}: refused")

    monkeypatch.setattr(_checks._http, "request", refuse)
    monkeypatch.setattr(_checks._http, "stream", refuse)
    endpoint = {"name": "m@h", "kind": "rerank", "model": "m", "url": "https://h", "key": KEY, "adapter": True}
    models = [{"model": "chat", "kind": "chat"}, {"model": "embed", "kind": "embedding"}]
    for module, given in (
        (model_server_check, {"endpoints": [endpoint]}),
        (oneapi_check, {**ONE_API, "models": models}),
        (fastgpt_check, FASTGPT),
    ):
        seen.clear()
        result = run(module, capsys, **given, **files, validate_certs=False, timeout=7)
        assert not result["ok"] and seen and all(options == {**files, "validate_certs": False, "timeout": 7.0} for options in seen)


# ---- model_server_check


class Engine(Fake):
    def answer(self, method, path, query, body, headers):
        if path == "/metrics":
            return as_json({}, 200 if "open metrics" in self.twist else 404)
        if path == "/docs":
            return as_json({}, 404)
        given = headers.get("Authorization", "")
        if "case" in self.twist:
            right = given.lower() == f"Bearer {KEY}".lower()
        else:
            right = given == f"Bearer {KEY}"
        if "open" in self.twist or ("open models" in self.twist and path == "/v1/models"):
            right = True
        if not right:
            return as_json({"error": {"message": "Incorrect API key provided.", "code": "invalid_api_key"}}, 403 if "403" in self.twist else 401)
        if "down" in self.twist:
            return as_json({"error": {"message": "The model server is not answering.", "code": "upstream_down"}}, 503)
        if "html" in self.twist:
            return 200, "text/html", b"<html>hello</html>"
        if path == "/v1/models":
            return as_json({"data": [{"id": "other" if "other" in self.twist else body_model(self)}]})
        if path == "/v1/embeddings":
            size = 3 if "short" in self.twist else 4
            value = 1.0 if "long" in self.twist else 1 / math.sqrt(size)
            return as_json({"data": [{"embedding": [value] * size} for _text in body["input"]]})
        if path == "/v1/rerank" and "inputs" in body:
            if "no adapter" in self.twist:
                return as_json({"detail": "documents missing"}, 422)
            return as_json({"code": 200, "data": [{"id": item["id"], "score": 0.5} for item in body["inputs"]]})
        if path == "/v1/rerank":
            scores = [0.1 * number for number in range(len(body["documents"]))]
            results = [{"index": number, "relevance_score": score} for number, score in enumerate(scores)]
            if "unordered" not in self.twist:
                results.reverse()
            if "no score" in self.twist:
                results = [{"index": result["index"]} for result in results]
            if "nan" in self.twist:
                results[0]["relevance_score"] = float("nan")
            return as_json({"results": results})
        if "error in 200" in self.twist:
            return as_json({"error": {"message": "cache is dead"}})
        content = "本接口不支持非stream模式" if "stream only" in self.twist else "" if "silent" in self.twist else "hello"
        return as_json({"choices": [{"message": {"role": "assistant", "content": content}}]})


def body_model(fake: Fake) -> str:
    return "m"


def ask_engine(capsys, kind, *twist, **more):
    with Engine(*twist) as engine:
        endpoint = {"name": "m@h", "kind": kind, "model": "m", "url": engine.url, "key": KEY, **more}
        return reds(run(model_server_check, capsys, endpoints=[endpoint], timeout=5))


@pytest.mark.parametrize("kind", ["chat", "embedding", "rerank"])
def test_good_model_server(capsys, kind):
    more = {"dimensions": 4} if kind == "embedding" else {"adapter": True} if kind == "rerank" else {}
    assert ask_engine(capsys, kind, **more) == {}


@pytest.mark.parametrize(
    ("kind", "twist", "check", "words"),
    [
        ("embedding", "open models", "m@h refuses other keys", "GET /v1/models without a key gave HTTP 200"),
        ("embedding", "open", "m@h refuses other keys", "not 401"),
        ("embedding", "case", "m@h refuses other keys", "in the wrong case"),
        ("chat", "403", "m@h refuses other keys", "HTTP 403"),
        ("chat", "open metrics", "m@h refuses other keys", "GET /metrics is open to anybody"),
        ("embedding", "short", "m@h answers", "3 dimensions, not 4"),
        ("embedding", "long", "m@h answers", "not normalised"),
        ("chat", "other", "m@h is listed", "lists other"),
        ("chat", "error in 200", "m@h answers", "HTTP 200 with an error inside: cache is dead"),
        ("chat", "stream only", "m@h answers", "only streams"),
        ("chat", "silent", "m@h answers", "no text"),
        ("rerank", "unordered", "m@h answers", "not ordered"),
        ("rerank", "no score", "m@h answers", "no relevance_score"),
        ("rerank", "nan", "m@h answers", "no relevance_score"),
        ("rerank", "no adapter", "m@h answers FastGPT before v4.7", "documents missing|HTTP 422"),
    ],
)
def test_bad_model_server(capsys, kind, twist, check, words):
    more = {"dimensions": 4} if kind == "embedding" else {"adapter": True} if kind == "rerank" else {}
    found = ask_engine(capsys, kind, twist, **more)
    assert list(found) == [check], found
    assert any(word in found[check] for word in words.split("|")), found


@pytest.mark.parametrize("twist", ["down", "html"])
def test_dead_model_server(capsys, twist):
    found = ask_engine(capsys, "chat", twist)
    assert list(found) == ["m@h is listed", "m@h answers"] and "role model_server" in found["m@h answers"]


def test_unreachable_model_server(capsys):
    with Engine() as engine:
        url = engine.url
    endpoint = {"name": "m@h", "kind": "chat", "model": "m", "url": url, "key": KEY}
    found = reds(run(model_server_check, capsys, endpoints=[endpoint], timeout=5))
    assert len(found) == 3 and all("refused" in detail for detail in found.values())


# ---- oneapi_check


class Gateway(Fake):
    def answer(self, method, path, query, body, headers):
        if path == "/api/user/login":
            if "limit" in self.twist:
                return 429, "text/plain", b""
            return as_json({"message": "用户名或密码错误", "success": "default" in self.twist})
        if headers.get("Authorization") != f"Bearer {KEY}" and "open" not in self.twist:
            return as_json({"error": {"message": "无效的令牌", "type": "one_api_error"}}, 401)
        if path == "/v1/models":
            names = ["chat", "embed"] + (["gpt-4"] if "extra" in self.twist else [])
            return as_json({"data": [{"id": name} for name in names if not ("missing" in self.twist and name == "chat")]})
        if path == "/v1/embeddings":
            if "no channel" in self.twist:
                return as_json({"error": {"message": "当前分组 default 下对于模型 embed 无可用渠道", "type": "one_api_error"}}, 503)
            size = 5 if "size" in self.twist else 4
            return as_json({"data": [{"embedding": [1 / math.sqrt(size)] * size} for _text in body["input"]]})
        if not body["stream"]:
            if "upstream key" in self.twist:
                return as_json({"error": {"message": "Incorrect API key provided.", "type": "invalid_request_error"}}, 401)
            return as_json({"choices": [{"message": {"content": "hello"}}]})
        if "stream error" in self.twist:
            return as_events('data: {"message":"invalid_api_key Incorrect API key provided."}', "data: [DONE]")
        if "stream error object" in self.twist:
            return as_events(chunk("he"), 'data: {"error":{"message":"boom"}}')
        if "stream cut" in self.twist:
            return as_events(chunk("he"))
        if "stream empty" in self.twist:
            return as_events("data: [DONE]")
        if "stream json" in self.twist:
            return as_json({"choices": [{"message": {"content": "hello"}}]})
        if "stream garbage" in self.twist:
            return as_events("data: {oops")
        if "stream 500" in self.twist:
            return as_json({"error": {"message": "do request failed"}}, 500)
        if "no done" in self.twist:
            return as_events(chunk("he"), chunk("llo", "stop"))
        return as_events(": comment", chunk("he"), chunk("llo"), "data: [DONE]")


def ask_gateway(capsys, *twist):
    with Gateway(*twist) as gateway:
        models = [
            {"model": "chat", "kind": "chat"},
            {"model": "embed", "kind": "embedding", "dimensions": 4},
            {"model": "embed", "kind": "embedding", "dimensions": 4},
        ]
        result = run(oneapi_check, capsys, url=gateway.url + "/", key=KEY, models=models, timeout=5)
        assert [check["name"] for check in result["checks"]] == [
            "gateway refuses other tokens",
            "gateway refuses the default password",
            "gateway lists the models",
            "gateway chats with chat",
            "gateway streams from chat",
            "gateway embeds with embed",
        ]
        return reds(result)


@pytest.mark.parametrize("twist", ["", "limit", "no done"])
def test_good_gateway(capsys, twist):
    assert ask_gateway(capsys, twist) == {}


@pytest.mark.parametrize(
    ("twist", "check", "words"),
    [
        ("default", "gateway refuses the default password", "oneapi_root_password"),
        ("open", "gateway refuses other tokens", "not 401"),
        ("extra", "gateway lists the models", "not in the inventory: gpt-4"),
        ("missing", "gateway lists the models", "missing: chat"),
        ("size", "gateway embeds with embed", "5 dimensions, not 4"),
        ("no channel", "gateway embeds with embed", "No channel serves embed"),
        ("upstream key", "gateway chats with chat", "oneapi_channels_key_policy"),
        ("stream error", "gateway streams from chat", "an error inside a stream of status 200: invalid_api_key"),
        ("stream error object", "gateway streams from chat", "an error inside a stream of status 200: boom"),
        ("stream cut", "gateway streams from chat", "broke off"),
        ("stream empty", "gateway streams from chat", "without any text"),
        ("stream json", "gateway streams from chat", "asked for a stream"),
        ("stream garbage", "gateway streams from chat", "no JSON"),
        ("stream 500", "gateway streams from chat", "HTTP 500, do request failed"),
    ],
)
def test_bad_gateway(capsys, twist, check, words):
    found = ask_gateway(capsys, twist)
    assert list(found) == [check] and words in found[check], found


# ---- fastgpt_check


class FastGPT(Fake):
    def __init__(self, *twist: str, version: str = "v4.8.9") -> None:
        self.version = version
        self.things: dict[str, dict[str, str]] = {"app": {}, "dataset": {}, "key": {}}
        self.key_apps: dict[str, str] = {}
        self.count = self.logins = self.app_creates = 0
        super().__init__(*twist)

    def make(self, kind: str, name: str) -> str:
        self.count += 1
        made = f"{kind}{self.count:020d}"
        self.things[kind][made] = name
        return made

    @staticmethod
    def envelope(data: t.Any = None, code: int = 200, message: str = "", status: int = 200, name: str = "") -> Reply:
        return as_json({"code": code, "statusText": name, "message": message, "data": data}, status)

    def answer(self, method, path, query, body, headers):
        if not path.startswith("/api/"):
            return 200, "text/html", b"<html>"
        path = path[5:]
        if path == "support/user/account/loginByPassword":
            return self.login(body)
        if path == "common/system/getInitData":
            rerank = [] if "no rerank model" in self.twist else [{"model": "rerank"}]
            models = {"llmModels": [{"model": "chat"}], "vectorModels": [{"model": "embed"}], "reRankModels": rerank, "systemVersion": "4.8.9"}
            return self.envelope(models)
        if path == "v1/chat/completions":
            return self.chat(body, headers)
        if headers.get("token") != "jwt-token":
            return self.envelope(code=403, message="unAuthorization")
        return self.work(method, path, query, body)

    def login(self, body: t.Any) -> Reply:
        self.logins += 1
        if "html" in self.twist:
            return 502, "text/html", b"<html>bad gateway</html>"
        if "too many" in self.twist:
            return self.envelope(code=429, message="common:error.too_many_request", status=429, name="tooManyRequest")
        if "slow start" in self.twist and self.logins < 3:
            return self.envelope(code=500, message="用户未注册", status=500)
        if "mongo" in self.twist:
            return self.envelope(code=500, message="Operation `users.findOne()` buffering timed out after 10000ms", status=500)
        if body["password"] != hashlib.sha256(PASSWORD.encode()).hexdigest() or "wrong password" in self.twist:
            if self.version >= "v4.8.18":
                return self.envelope(code=503000, message="common:code_error.account_error", status=500, name="account_psw_error")
            return self.envelope(code=500, message="密码错误", status=500)
        return self.envelope({"user": {}, "token": "jwt-token"})

    def work(self, method: str, path: str, query: dict[str, str], body: t.Any) -> Reply:
        if path == "core/dataset/create":
            return self.envelope(self.make("dataset", body["name"]))
        if path == "core/dataset/collection/create":
            return self.envelope("collection")
        if path == "core/dataset/data/insertData":
            if "insert" in self.twist:
                return self.envelope(code=500, message="Connection error.", status=500)
            return self.envelope("data1")
        if path == "core/dataset/searchTest":
            return self.search(body)
        if path == "core/app/create":
            self.app_creates += 1
            if "conflict" in self.twist and self.app_creates == 1:
                return self.envelope(code=500, message="WriteConflict error: this operation conflicted with another operation.", status=500)
            v2 = "edges" in body
            if v2 != (self.version != "v4.6.8") or ("nodeId" in body["modules"][0]) != v2:
                return self.envelope(code=500, message="wrong form", status=500)
            self.last_app = body
            return self.envelope(self.make("app", body["name"]))
        if path == "support/openapi/create":
            key = self.make("key", body["name"])
            self.key_apps[key] = body["appId"]
            return self.envelope("fastgpt-" + key)
        lists = {"core/app/list": "app", "core/dataset/list": "dataset"}
        if path in lists:
            return self.envelope([{"_id": made, "name": name} for made, name in self.things[lists[path]].items()])
        if path == "support/openapi/list":
            return self.envelope([{"_id": key} for key in self.things["key"] if self.key_apps[key] == query["appId"]])
        deletes = {"core/app/del": ("app", "appId"), "core/dataset/delete": ("dataset", "id"), "support/openapi/delete": ("key", "id")}
        if path in deletes and method == "DELETE":
            kind, parameter = deletes[path]
            if "sticky" in self.twist and kind == "dataset":
                return self.envelope(code=500, message="cannot", status=500)
            self.things[kind].pop(query[parameter])
            return self.envelope()
        return self.envelope(code=404, message=path, status=404)

    def search(self, body: t.Any) -> Reply:
        if "empty search" in self.twist:
            return self.envelope({"list": []})
        assert body["datasetSearchUsingExtensionQuery"] is False
        scores = [{"type": "embedding", "value": 0.8, "index": 0}]
        if body["usingReRank"] and "no rerank" not in self.twist and not ("no mixed rerank" in self.twist and body["searchMode"] == "mixedRecall"):
            scores.append({"type": "reRank", "value": 0.9, "index": 0})
        return self.envelope({"list": [{"id": "data1", "q": "What does the door of a host do?", "a": "", "score": scores}], "usingReRank": True})

    def chat(self, body: t.Any, headers: t.Any) -> Reply:
        key = headers.get("Authorization", "").removeprefix("Bearer fastgpt-")
        if key not in self.things["key"]:
            return self.envelope(code=514, message="unAuthApiKey")
        if "no chat" in self.twist:
            return self.envelope(code=500, message="404 status code (no body)", status=500)
        if body["stream"]:
            if "stream error" in self.twist:
                return as_events('event: error\ndata: {"message":"Connection error.","statusText":""}')
            return as_events(chunk("he"), chunk("llo", "stop"), "data: [DONE]")
        answer: dict[str, t.Any] = {"choices": [{"message": {"role": "assistant", "content": "hello"}}]}
        if body["detail"]:
            answer["responseData"] = [{"moduleType": "chatNode", "quoteList": [] if "no quotes" in self.twist else [{"q": "x"}]}]
        return as_json(answer)


ALL = [
    "fastgpt logs in",
    "fastgpt lists the models",
    "fastgpt stores passages",
    "fastgpt searches by embedding and reranks",
    "fastgpt searches mixed and reranks",
    "fastgpt answers",
    "fastgpt streams",
    "fastgpt answers from a dataset",
    "fastgpt leaves nothing behind",
]


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch):
    monkeypatch.setattr(fastgpt_check, "_PAUSE", 0.05)
    monkeypatch.setattr(fastgpt_check, "_LIMITED_PAUSE", 1.0)


def arguments(fake: FastGPT, **more: t.Any) -> dict[str, t.Any]:
    base = {
        "url": fake.url,
        "version": fake.version,
        "password": PASSWORD,
        "chat_model": "chat",
        "vector_model": "embed",
        "rerank_model": "rerank",
        "checks": ["login", "models", "dataset", "chat", "dataset_chat"],
        "timeout": 5,
    }
    return {**base, **more}


def test_the_dataset_app_is_asked_only_where_it_is_wanted(capsys):
    with FastGPT() as fake:
        options = arguments(fake)
        del options["checks"]
        result = run(fastgpt_check, capsys, **options)
        assert reds(result) == {} and [check["name"] for check in result["checks"]] == [name for name in ALL if "from a dataset" not in name]


@pytest.mark.parametrize("version", ["v4.6.8", "v4.8.9"])
def test_good_fastgpt(capsys, version):
    with FastGPT("conflict", version=version) as fake:
        result = run(fastgpt_check, capsys, **arguments(fake))
        assert reds(result) == {} and [check["name"] for check in result["checks"]] == ALL
        assert fake.things == {"app": {}, "dataset": {}, "key": {}}


@pytest.mark.parametrize(
    ("text", "passes"),
    [
        ("WriteConflict error: this operation conflicted with another operation. Please retry your operation or multi-document transaction.", True),
        ("Unable to read from a snapshot due to pending collection catalog changes; please retry the operation.", True),
        ("Unable to acquire IX lock on '{123: Collection, 456}' within 5ms.", True),
        ("Transaction 3 has been aborted.", True),
        ("Given transaction number 1 does not match any in-progress transactions. The active transaction number is -1", True),
        ("Transaction numbers are only allowed on a replica set member or mongos", False),
        ("Connection error.", False),
    ],
)
def test_what_mongodb_refuses_once_is_tried_again(text, passes):
    assert bool(fastgpt_check._CONFLICT.search(text)) == passes


def test_litter_of_an_interrupted_run_goes_and_nothing_else(capsys):
    with FastGPT() as fake:
        mine = fastgpt_check._Walk(arguments(fake, label="x"), _checks.Checks(), (4, 8, 9), {})
        app = fake.make("app", mine.prefix + "old")
        fake.key_apps[fake.make("key", "old")] = app
        fake.make("dataset", mine.prefix + "old")
        kept = fake.make("dataset", "handbook"), fake.make("dataset", "ansible-verify-of-somebody-else")
        assert reds(run(fastgpt_check, capsys, **arguments(fake))) == {}
        assert set(fake.things["dataset"]) == set(kept) and not fake.things["app"] and not fake.things["key"]


@pytest.mark.parametrize(
    ("twist", "checks", "words"),
    [
        ("wrong password", ALL[:-1], "fastgpt_root_password"),
        ("mongo", ALL[:-1], "does not reach MongoDB"),
        ("html", ALL[:-1], "HTTP 502 and no JSON"),
        ("too many", ALL[:-1], "10 log-ins in 2 minutes"),
        ("no rerank model", [ALL[1]], "reRankModels of config.json has nothing, not rerank"),
        ("insert", [*ALL[2:5], ALL[7]], "Connection error."),
        ("empty search", ALL[3:5], "none of the stored passages"),
        ("no rerank", ALL[3:5], "no passage has a score of the type reRank"),
        ("no mixed rerank", [ALL[4]], "no passage has a score of the type reRank"),
        ("no chat", ALL[5:8], "404 status code"),
        ("stream error", [ALL[6]], "an error inside a stream of status 200: Connection error."),
        ("no quotes", [ALL[7]], "without a passage"),
        ("sticky", [ALL[8]], "could not be deleted"),
    ],
)
def test_bad_fastgpt(capsys, monkeypatch, twist, checks, words):
    monkeypatch.setattr(fastgpt_check.time, "sleep", lambda seconds: None)
    with FastGPT(twist) as fake:
        found = reds(run(fastgpt_check, capsys, **arguments(fake)))
        assert list(found) == checks, found
        assert words in found[checks[0]], found
        assert twist == "sticky" or fake.things == {"app": {}, "dataset": {}, "key": {}}


def test_without_rerank_none_is_asked_for(capsys):
    with FastGPT("no rerank", "no rerank model") as fake:
        result = run(fastgpt_check, capsys, **arguments(fake, rerank_model=None))
        assert reds(result) == {} and "fastgpt searches by embedding" in [check["name"] for check in result["checks"]]


def test_choice_of_checks_and_check_mode(capsys):
    with FastGPT() as fake:
        names = [check["name"] for check in run(fastgpt_check, capsys, **arguments(fake, checks=["login"], label="app-1"))["checks"]]
        assert names == ["app-1 logs in"]
        names = [check["name"] for check in run(fastgpt_check, capsys, **arguments(fake, checks=["login", "dataset"]))["checks"]]
        assert names == [ALL[0], *ALL[2:5], ALL[8]]
        fake.seen.clear()
        names = [check["name"] for check in run(fastgpt_check, capsys, check_mode=True, **arguments(fake))["checks"]]
        assert names == ALL[:2] and all("create" not in path for _method, path, _body in fake.seen)


def test_waits_for_a_slow_start(capsys):
    with FastGPT("slow start") as fake:
        result = run(fastgpt_check, capsys, **arguments(fake, wait=20, checks=["login", "dataset"]))
        assert reds(result) == {} and "after 3 tries" in result["checks"][0]["detail"]


@pytest.mark.parametrize("version", ["v4.8.9", "v4.8.19"])
def test_does_not_wait_with_a_wrong_password(capsys, version):
    with FastGPT("wrong password", version=version) as fake:
        result = run(fastgpt_check, capsys, **arguments(fake, wait=30, checks=["login"]))
        assert len(reds(result)) == 1 and fake.logins == 4 and result["checks"][0]["seconds"] < 10


@pytest.mark.parametrize(
    ("version", "twist", "words", "often"),
    [
        ("v4.8.9", "mongo", "does not reach MongoDB", True),
        ("v4.8.19", "mongo", "does not reach MongoDB", False),
        ("v4.8.19", "too many", "10 log-ins in 2 minutes", False),
        ("v4.8.19", "html", "HTTP 502 and no JSON", True),  # a door before a FastGPT that is not up yet
    ],
)
def test_tries_less_often_where_log_ins_are_limited(capsys, version, twist, words, often):
    with FastGPT(twist, version=version) as fake:
        found = reds(run(fastgpt_check, capsys, **arguments(fake, wait=3, checks=["login"])))
        assert words in found["fastgpt logs in"]
        assert fake.logins > 10 if often else 1 < fake.logins <= 8


def test_waits_for_what_comes_after_the_login(capsys):
    with FastGPT("insert") as fake:
        threading.Timer(0.6, fake.twist.clear).start()
        assert reds(run(fastgpt_check, capsys, **arguments(fake, wait=20, checks=["login", "dataset"]))) == {}
        assert fake.things["dataset"] == {}
        # Rounds share a session, since newer versions limit log-ins.
        assert fake.logins == 1


def test_unreachable_fastgpt(capsys):
    with FastGPT() as fake:
        stopped = arguments(fake, wait=1, checks=["login"])
    found = reds(run(fastgpt_check, capsys, **stopped))
    assert "refused" in found["fastgpt logs in"] and "config.json" in found["fastgpt logs in"]


# ---- graphs


@pytest.mark.parametrize("version", [(4, 6, 8), (4, 7, 1)])
@pytest.mark.parametrize("dataset", ["", "d1"])
def test_graphs_of_the_first_form_hang_together(version, dataset):
    modules = _fastgpt_graphs.app_body("n", version, "chat", dataset, "embed", True)["modules"]
    inputs = {(module["moduleId"], entry["key"]): entry for module in modules for entry in module["inputs"]}
    targets = {(target["moduleId"], target["key"]) for module in modules for output in module["outputs"] for target in output["targets"]}
    assert targets and targets <= set(inputs)
    # What is fed must be connected, or it is dropped; all else must have a value, or its node never runs.
    for place, entry in inputs.items():
        assert entry.get("connected", False) == (place in targets)
        assert "value" in entry or place in targets or entry["type"] == "systemInput"
    assert len(modules) == (3 if dataset else 2)


@pytest.mark.parametrize("dataset", ["", "d1"])
def test_graphs_of_the_second_form_hang_together(dataset):
    body = _fastgpt_graphs.app_body("n", (4, 8, 0), "chat", dataset, "embed", False)
    outputs = {(node["nodeId"], output["id"]) for node in body["modules"] for output in node["outputs"]}
    for node in body["modules"]:
        for entry in node["inputs"]:
            value = entry.get("value")
            if isinstance(value, list) and value and isinstance(value[0], str):
                assert tuple(value) in outputs
    assert [(edge["source"], edge["target"]) for edge in body["edges"]] == ([("start", "search"), ("search", "ai")] if dataset else [("start", "ai")])
    assert all(edge["sourceHandle"] == f"{edge['source']}-source-right" and edge["targetHandle"] == f"{edge['target']}-target-left" for edge in body["edges"])
