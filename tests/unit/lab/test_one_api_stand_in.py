# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The One-API stand-in over HTTP: its manners are what the modules are tested against, so they are pinned here."""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from ports import free_port

pytest.importorskip("aiohttp")

PROGRAM = Path(__file__).resolve().parents[3] / "lab" / "stand_ins" / "one_api" / "one_api.py"
ACCESS = "0123456789abcdef0123456789abcdef"
BPE = ("9b5ad71b2ce5302211f9c61530b329a4922fc6a4", "fb374d419588a4632f3f557e76b4b70aebbca790")


class Answer:
    def __init__(self, status, headers, body):
        self.status, self.headers, self.body = status, headers, body

    @property
    def json(self):
        return json.loads(self.body)

    @property
    def text(self):
        return self.body.decode()


class OneApi:
    """One running stand-in."""

    def __init__(self, directory, **env):
        self.directory = Path(directory)
        self.directory.mkdir(exist_ok=True)
        self.port = free_port()
        self.env = {"ONE_API_STANDIN_NO_TIKTOKEN": "1", "INITIAL_ROOT_ACCESS_TOKEN": ACCESS, "GLOBAL_API_RATE_LIMIT": "0", "SESSION_SECRET": "s", **env}
        self.start()

    def start(self):
        command = [sys.executable, str(PROGRAM), "--port", str(self.port), "--log-dir", "logs"]
        with (self.directory / "out").open("a") as out:
            self.process = subprocess.Popen(command, cwd=self.directory, env={**os.environ, **self.env}, stdout=out, stderr=out)
        # a busy machine needs seconds for an interpreter
        for _attempt in range(600):
            try:
                with socket.create_connection(("127.0.0.1", self.port), 0.2):
                    return
            except OSError:
                time.sleep(0.05)
        raise AssertionError((self.directory / "out").read_text())

    def restart(self):
        self.stop()
        self.start()

    def stop(self):
        self.process.terminate()
        assert self.process.wait(30) == 0

    def __call__(self, method, path, body=None, headers=None, auth=ACCESS):
        head = {"Content-Type": "application/json", **({"Authorization": auth} if auth else {}), **(headers or {})}
        link = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            link.request(method, path, body if isinstance(body, (str, bytes, type(None))) else json.dumps(body), head)
            answer = link.getresponse()
            return Answer(answer.status, answer.headers, answer.read())
        finally:
            link.close()

    def data(self, method, path, body=None):
        answer = self(method, path, body).json
        assert answer["success"], answer
        return answer.get("data")

    def refused(self, method, path, body=None, **more):
        answer = self(method, path, body, **more)
        assert answer.status == 200 and answer.json["success"] is False, answer.text
        assert set(answer.json) == {"message", "success"}
        return answer.json["message"]


@pytest.fixture(scope="module")
def api(tmp_path_factory):
    server = OneApi(tmp_path_factory.mktemp("one-api"))
    yield server
    server.stop()


@pytest.fixture
def fresh(tmp_path):
    servers = []

    def make(**env):
        servers.append(OneApi(tmp_path / f"data{len(servers)}", **env))
        return servers[-1]

    yield make
    for server in servers:
        if server.process.poll() is None:
            server.stop()


class Upstream(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    seen: list = []

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.do_POST()

    def do_POST(self):
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.requestline.split()[1]  # self.path has a leading // squeezed
        self.seen.append({"path": path, "auth": self.headers.get("Authorization"), "body": raw.decode()})
        body = json.loads(raw or b"{}")
        kind, status, out = "application/json", 200, json.dumps({"choices": [{"message": {"content": "hi"}}], "usage": {"prompt_tokens": 3, "total_tokens": 3}})
        model = body.get("model")
        if body.get("stream"):
            kind, out = "text/event-stream", ': note\ndata:{"tight": 1}\ndata: {"choices": [{"delta": {"content": "h"}}]}\n\n'
        elif model == "denied":
            status, out = 401, json.dumps({"error": {"message": "bad key", "type": "invalid_request_error", "param": None, "code": "invalid_api_key"}})
        elif model == "detail":
            status, out = 422, json.dumps({"detail": "no"})
        elif model == "text":
            status, kind, out = 500, "text/plain", "broken"
        elif model == "busy":
            status, out = 429, json.dumps({"error": {"message": "slow down", "type": "x"}})
        elif model == "notjson":
            out = "<html>"
        data = out.encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture(scope="module")
def upstream():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Upstream)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


# -- manners -------------------------------------------------------------------------------------------------------------


def test_status(api):
    answer = api("GET", "/api/status", auth="")
    assert answer.status == 200 and answer.headers["Content-Type"] == "application/json; charset=utf-8"
    assert answer.headers["X-Oneapi-Request-Id"].isdigit()
    data = answer.json["data"]
    assert data["version"] == "v0.6.10" and data["server_address"] == "http://localhost:3000" and abs(data["start_time"] - time.time()) < 120
    assert answer.text.startswith('{"data":{"chat_link":"",') and answer.text.endswith('"message":"","success":true}')


def test_credentials(api):
    assert api("GET", "/api/token/", auth="").status == 401
    assert api.refused("GET", "/api/token/", auth="wrong") == "无权进行此操作，access token 无效"
    for header in (ACCESS, "Bearer " + ACCESS):
        assert api("GET", "/api/token/", auth=header).json["success"]


@pytest.mark.parametrize(
    "method, path, status, location",
    [
        ("GET", "/api/token?p=1", 301, "/api/token/?p=1"),
        ("POST", "/api/channel", 307, "/api/channel/"),
        ("PUT", "/api/option", 307, "/api/option/"),
        ("GET", "/api/status/", 301, "/api/status"),
    ],
)
def test_trailing_slashes(api, method, path, status, location):
    answer = api(method, path)
    assert (answer.status, answer.headers["Location"]) == (status, location)


@pytest.mark.parametrize("method, path", [("GET", "/api/setup"), ("DELETE", "/api/token"), ("PATCH", "/api/channel/"), ("POST", "/v1/rerank")])
def test_unknown_paths_and_methods(api, method, path):
    answer = api(method, path)
    assert answer.status == 404
    assert answer.json == {"error": {"message": f"Invalid URL ({method} {path})", "type": "invalid_request_error", "param": "", "code": ""}}


def test_web_page(api):
    answer = api("GET", "/panel/whatever")
    assert answer.status == 200 and "stand-in" in answer.text


def test_critical_bucket(fresh):
    api = fresh()
    answers = [api("POST", "/api/user/login", {"username": "root", "password": "wrong"}, auth="") for _attempt in range(21)]
    assert [answer.status for answer in answers] == [200] * 20 + [429]
    assert answers[20].body == b"" and "Retry-After" not in answers[20].headers
    other = {"X-Forwarded-For": "10.1.2.3, 127.0.0.1"}
    assert api("POST", "/api/user/register", {"username": "x", "password": "12345678"}, other, auth="").json["success"]


def test_global_bucket(fresh):
    api = fresh(GLOBAL_API_RATE_LIMIT="3")
    assert [api("GET", "/api/status").status for _attempt in range(4)] == [200, 200, 200, 429]
    assert api("GET", "/v1/models").status == 401  # relay routes have no limit


# -- users ---------------------------------------------------------------------------------------------------------------


def test_root_and_its_password(fresh):
    api = fresh()
    answer = api("POST", "/api/user/login", {"username": "root", "password": "123456"}, auth="")
    assert answer.json["data"]["role"] == 100 and answer.json["data"]["access_token"] == ""
    cookie = answer.headers["Set-Cookie"]
    assert "Path=/" in cookie and "Max-Age=2592000" in cookie and "HttpOnly" not in cookie
    session = {"Cookie": cookie.split(";")[0]}
    assert api("GET", "/api/user/self", headers=session, auth="wrong").json["success"]  # the cookie wins
    assert "'min' tag" in api.refused("PUT", "/api/user/self", {"password": "short"})
    assert "'max' tag" in api.refused("PUT", "/api/user/self", {"password": "x" * 21})
    assert api.data("PUT", "/api/user/self", {"password": "密码密码密码密码"}) is None
    assert api.refused("POST", "/api/user/login", {"username": "root", "password": "123456"}, auth="").startswith("用户名或密码错误")
    assert api("POST", "/api/user/login", {"username": "root", "password": "密码密码密码密码"}, auth="").json["success"]
    assert api("GET", "/api/user/self", headers=session, auth="").json["success"]  # old sessions live on
    assert api.data("GET", "/api/user/self")["access_token"] == ACCESS
    assert api.data("GET", "/api/user/search?keyword=roo")[0]["access_token"] == ACCESS
    api.restart()
    assert api("GET", "/api/user/self", headers=session, auth="").json["success"]  # SESSION_SECRET is set
    token = api.data("GET", "/api/user/token")
    assert len(token) == 32 and api.refused("GET", "/api/user/self") == "无权进行此操作，access token 无效"
    assert api("GET", "/api/user/self", auth=token).json["data"]["password"] == ""


def test_bad_logins(api):
    for body in ("", "{", {"username": "root"}, {"username": 1, "password": "x"}, "[]"):
        assert api.refused("POST", "/api/user/login", body, headers={"X-Forwarded-For": "10.9.9.9"}, auth="") == "无效的参数"


def test_other_users(fresh):
    api = fresh(INITIAL_ROOT_TOKEN="fastgpt")
    assert api.data("GET", "/api/token/")[0]["key"] == "fastgpt"
    assert api("POST", "/api/user/register", {"username": "eve", "password": "12345678"}, auth="").json["success"]
    assert api.refused("POST", "/api/user/", {"username": "eve", "password": "12345678"}) == "UNIQUE constraint failed: users.username"
    eve = {"Authorization": api.data("GET", "/api/user/search?keyword=eve")[0]["access_token"]}
    assert [token["name"] for token in api("GET", "/api/token/", headers=eve).json["data"]] == ["default"]
    assert api("GET", "/api/channel/", headers=eve).json["message"] == "无权进行此操作，权限不足"
    api.data("PUT", "/api/option/", {"key": "RegisterEnabled", "value": "false"})
    assert "关闭了新用户注册" in api.refused("POST", "/api/user/register", {"username": "mal", "password": "12345678"}, auth="")
    deleted = api("DELETE", f"/api/user/{api.data('GET', '/api/user/search?keyword=eve')[0]['id']}")
    assert (deleted.status, deleted.body) == (200, b"")
    assert api.refused("POST", "/api/user/manage", {"username": "root", "action": "disable"}) == "无法禁用超级管理员用户"


# -- tokens --------------------------------------------------------------------------------------------------------------


def test_tokens(fresh):
    api = fresh()
    made = api.data("POST", "/api/token/", {"name": "a", "key": "mine", "id": 99, "status": 2, "models": "m", "unlimited_quota": True})
    assert len(made["key"]) == 48 and made["key"].isalnum() and made["id"] == 1 and made["status"] == 1
    assert (made["expired_time"], made["subnet"], made["remain_quota"]) == (-1, "", 0)
    for number in range(11):
        api.data("POST", "/api/token/", {"name": f"b{number}"})
    api.data("POST", "/api/token/", {"name": "a"})  # names need not be unique
    assert [token["id"] for token in api.data("GET", "/api/token/?p=0")] == list(range(13, 3, -1))
    assert [token["id"] for token in api.data("GET", "/api/token/?p=1")] == [3, 2, 1]
    assert api.data("GET", "/api/token/?p=2") == []
    assert len(api.data("GET", "/api/token/search?keyword=")) == 13
    assert {token["name"] for token in api.data("GET", "/api/token/search?keyword=B1")} == {"b1", "b10"}
    assert len(api.data("GET", "/api/token/search?keyword=%25")) == 13
    changed = api.data("PUT", "/api/token/", {"id": 1, "name": "c"})
    assert (changed["expired_time"], changed["unlimited_quota"], changed["models"], changed["subnet"]) == (0, False, None, None)
    assert changed["key"] == made["key"] and changed["status"] == 1
    assert api.data("PUT", "/api/token/?status_only=true", {"id": 2, "status": 2, "name": "ignored"})["name"] == "b0"
    assert api.data("GET", "/api/token/2")["status"] == 2
    assert api.refused("GET", "/api/token/99") == api.refused("DELETE", "/api/token/99") == "record not found"
    assert api.refused("PUT", "/api/token/", {"id": 99, "name": "x"}) == "record not found"
    assert api.refused("GET", "/api/token/abc") == 'strconv.Atoi: parsing "abc": invalid syntax'
    assert api.refused("GET", "/api/token/0") == "id 或 userId 为空！"
    assert api.refused("POST", "/api/token/", {"name": "字" * 11}) == "参数错误：令牌名称过长"
    assert "无效的网段" in api.refused("POST", "/api/token/", {"name": "n", "subnet": "10.0.0.1"})
    assert api.data("POST", "/api/token/", {"name": "n", "subnet": "10.0.0.0/8, 192.168.0.0/16"})
    assert api.data("DELETE", "/api/token/1") is None
    relay = {"Authorization": f"Bearer sk-{api.data('GET', '/api/token/3')['key']}"}
    api.data("PUT", "/api/token/", {"id": 3, "name": "old"})
    assert "该令牌已过期" in api("GET", "/v1/models", headers=relay).json["error"]["message"]
    assert "无法启用" in api.refused("PUT", "/api/token/?status_only=1", {"id": 3, "status": 1})


@pytest.mark.parametrize(
    "body, message",
    [
        ("", "EOF"),
        ("[]", "json: cannot unmarshal array into Go value of type model.Token"),
        ({"name": 5}, "json: cannot unmarshal number into Go struct field Token.name of type string"),
        ({"remain_quota": 1.5}, "json: cannot unmarshal number 1.5 into Go struct field Token.remain_quota of type int64"),
        ({"unlimited_quota": "true"}, "json: cannot unmarshal string into Go struct field Token.unlimited_quota of type bool"),
        ({"models": ["a"]}, "json: cannot unmarshal array into Go struct field Token.models of type string"),
        ("nope", "invalid character 'n' looking for beginning of value"),
    ],
)
def test_strict_typing(api, body, message):
    assert api.refused("POST", "/api/token/", body) == message


def test_keys_match_ignoring_case_and_what_follows_is_ignored(api):
    assert api.data("POST", "/api/token/", '{"NAME": "folded"} trailing')["name"] == "folded"


# -- channels ------------------------------------------------------------------------------------------------------------


def test_channels(fresh):
    api = fresh()
    body = {"name": "c", "type": 8, "key": "k1\n\nk2", "models": "m1,m2", "base_url": "http://h", "priority": 5, "model_mapping": '{"a":"b"}'}
    answer = api("POST", "/api/channel/", body).json
    assert answer == {"message": "", "success": True}
    first, second = sorted(api.data("GET", "/api/channel/"), key=lambda item: item["id"])
    assert first["name"] == second["name"] == "c" and first["key"] == "" and first["status"] == 1 and first["group"] == "default"
    assert (first["weight"], first["other"], first["system_prompt"], first["config"]) == (0, None, None, "")
    changed = api.data("PUT", "/api/channel/", {"id": 1})
    assert changed["key"] == "k1" and changed["models"] == "m1,m2"
    changed = api.data("PUT", "/api/channel/", {"id": 1, "name": "", "key": "", "status": 0, "priority": 0, "base_url": "", "model_mapping": None})
    assert (changed["name"], changed["key"], changed["status"], changed["priority"], changed["base_url"]) == ("c", "k1", 1, 0, "")
    assert changed["model_mapping"] == '{"a":"b"}'
    assert api.data("PUT", "/api/channel/", {"id": 1, "key": "x\ny"})["key"] == "x\ny"
    assert api.data("GET", "/api/channel/search?keyword=2")[0]["id"] == 2
    assert len(api.data("GET", "/api/channel/search?keyword=")) == 2
    assert api.refused("POST", "/api/channel/", {"name": "n"}) == "empty slice found"
    assert api.refused("PUT", "/api/channel/", {"name": "n"}) == "WHERE conditions required"
    assert api.refused("DELETE", "/api/channel/abc") == "WHERE conditions required"
    assert api.refused("GET", "/api/channel/77") == "record not found"
    assert "of type int64" in api.refused("POST", "/api/channel/", {"key": "k", "priority": "1"})
    assert "unmarshal object" in api.refused("POST", "/api/channel/", {"key": "k", "model_mapping": {}})
    assert "number -1" in api.refused("POST", "/api/channel/", {"key": "k", "weight": -1})
    assert "UNIQUE constraint failed: abilities" in api.refused("POST", "/api/channel/", {"name": "half", "key": "k", "models": "a,b,a"})
    assert [item["name"] for item in api.data("GET", "/api/channel/search?keyword=half")] == ["half"]  # the row stays, without abilities
    assert api.data("DELETE", "/api/channel/99") is None
    api.data("PUT", "/api/channel/", {"id": 2, "status": 2})
    assert api.data("DELETE", "/api/channel/disabled") == 1


def test_orphan_abilities_break_the_relay(fresh):
    api = fresh()
    key = api.data("POST", "/api/token/", {"name": "t", "unlimited_quota": True})["key"]
    body = {"id": 55, "name": "ghost", "models": "ghost", "group": "default", "status": 1}
    assert api.data("PUT", "/api/channel/", body)["name"] == "ghost"
    assert api.data("GET", "/api/channel/") == []
    relay = {"Authorization": f"Bearer sk-{key}"}
    assert [item["id"] for item in api("GET", "/v1/models", headers=relay).json["data"]] == ["ghost"]
    answer = api("POST", "/v1/embeddings", {"model": "ghost", "input": "x"}, relay)
    assert answer.status == 503 and answer.json["error"]["message"].startswith("数据库一致性已被破坏")
    api.data("DELETE", "/api/channel/55")
    assert api("GET", "/v1/models", headers=relay).json["data"] == []


# -- options -------------------------------------------------------------------------------------------------------------


def test_options(fresh):
    api = fresh()
    for value in (True, 1, ["x"]):
        answer = api("PUT", "/api/option/", {"key": "RegisterEnabled", "value": value})
        assert (answer.status, answer.json["message"]) == (400, "无效的参数")

    def options():
        return {item["key"]: item["value"] for item in api.data("GET", "/api/option/")}

    found = options()
    assert found["RegisterEnabled"] == "true" and "TurnstileSecretKey" in found
    assert not [key for key in found if key.endswith(("Token", "Secret"))]
    assert len({tuple(item["key"] for item in api.data("GET", "/api/option/")) for _attempt in range(3)}) > 1
    assert api.refused("PUT", "/api/option/", {"key": "Theme", "value": "blue"}) == "无效的主题"
    assert "Turnstile" in api.refused("PUT", "/api/option/", {"key": "TurnstileCheckEnabled", "value": "true"})
    api.data("PUT", "/api/option/", {"key": "Typo", "value": "kept"})
    api.data("PUT", "/api/option/", {"key": "ModelRatio", "value": '{"m": 0}'})
    assert json.loads(options()["ModelRatio"]) == {"m": 0}
    assert "invalid character" in api.refused("PUT", "/api/option/", {"key": "GroupRatio", "value": "nope"})
    assert options()["GroupRatio"] == "nope"
    api.restart()
    again = options()
    assert again["Typo"] == "kept" and again["GroupRatio"] == "nope"
    assert json.loads(again["ModelRatio"])["m"] == 0 and "gpt-4" in json.loads(again["ModelRatio"])


# -- relay ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def relay(fresh, upstream):
    Upstream.seen.clear()
    api = fresh()
    models = "m,denied,detail,text,busy,notjson"
    api.data("POST", "/api/channel/", {"name": "up", "type": 8, "key": "upkey", "base_url": upstream, "models": models})
    token = api.data("POST", "/api/token/", {"name": "t", "unlimited_quota": True})

    def ask(path, body, method="POST", suffix="", key=token["key"], **headers):
        return api(method, path, body, {"Authorization": f"Bearer sk-{key}{suffix}", **headers})

    ask.api, ask.token, ask.upstream = api, token, upstream
    return ask


def chat(model="m", **more):
    return {"model": model, "messages": [{"role": "user", "content": "hi"}], **more}


def test_relay_passes_the_body_on(relay):
    answer = relay("/v1/chat/completions?x=1", chat(odd={"kept": True}))
    assert answer.status == 200 and answer.json["choices"][0]["message"]["content"] == "hi"
    seen = Upstream.seen[-1]
    assert seen["path"] == "/v1/chat/completions?x=1" and seen["auth"] == "Bearer upkey" and json.loads(seen["body"])["odd"] == {"kept": True}
    assert relay("/v1/embeddings", {"model": "m", "input": "x"}).status == 200


def test_relay_stream(relay):
    answer = relay("/v1/chat/completions", chat(stream=True))
    assert answer.headers["Content-Type"].startswith("text/event-stream")
    assert answer.text == 'data: {"choices": [{"delta": {"content": "h"}}]}\n\ndata: [DONE]\n\n'


def test_relay_refusals(relay):
    api = relay.api
    for key, text in (("", "未提供令牌"), ("x" * 48, "无效的令牌")):
        answer = relay("/v1/models", None, "GET", key=key)
        assert answer.status == 401 and set(answer.json["error"]) == {"message", "type"} and answer.json["error"]["message"].startswith(text + " (request id: ")
    assert api("GET", "/v1/models").status == 401  # the access token is no relay key
    answer = relay("/v1/chat/completions", chat("none"))
    assert answer.status == 503 and "当前分组 default 下对于模型 none 无可用渠道" in answer.json["error"]["message"]
    assert relay("/v1/chat/completions", "{").status == 400
    assert relay("/v1/embeddings", "{").status == 503
    answer = relay("/v1/chat/completions", {"model": "m"})
    assert answer.status == 400 and answer.json["error"]["code"] == "invalid_text_request"
    assert relay("/v1/chat/completions", chat(), suffix="-1").status == 200
    assert relay("/v1/chat/completions", chat(), suffix="-9").status == 400
    assert relay("/v1/files", None, "GET").status == 503  # no channel for ""
    limited = api.data("POST", "/api/token/", {"name": "l", "unlimited_quota": True, "models": "m, x"})
    assert [item["id"] for item in relay("/v1/models", None, "GET", key=limited["key"]).json["data"]] in (["m", " x"], [" x", "m"])
    answer = relay("/v1/chat/completions", chat("x"), key=limited["key"])
    assert answer.status == 403 and "该令牌无权使用模型：x" in answer.json["error"]["message"]
    fenced = api.data("POST", "/api/token/", {"name": "s", "unlimited_quota": True, "subnet": "10.0.0.0/8"})
    assert relay("/v1/models", None, "GET", key=fenced["key"]).status == 403
    assert relay("/v1/models", None, "GET", key=fenced["key"], **{"X-Forwarded-For": "10.2.3.4"}).status == 200


@pytest.mark.parametrize(
    "field, text",
    [
        ({"max_tokens": 1.5}, "json: cannot unmarshal number 1.5 into Go struct field GeneralOpenAIRequest.max_tokens of type int"),
        ({"temperature": "0.1"}, "json: cannot unmarshal string into Go struct field GeneralOpenAIRequest.temperature of type float64"),
        ({"max_tokens": -1}, "max_tokens is invalid"),
    ],
)
def test_relay_reads_typed_fields(relay, field, text):
    answer = relay("/v1/chat/completions", {**chat(), **field})
    assert answer.status == 400 and answer.json["error"]["code"] == "invalid_text_request" and answer.json["error"]["message"].startswith(text)
    assert relay("/v1/chat/completions", {**chat(), "max_tokens": None, "temperature": 0, "unknown": {}}).status == 200


def test_relay_uses_a_system_prompt_only_where_the_model_is_mapped(relay):
    channel = {"name": "p", "type": 8, "key": "k", "base_url": relay.upstream, "models": "plain,alias", "system_prompt": "Be brief."}
    relay.api.data("POST", "/api/channel/", {**channel, "model_mapping": json.dumps({"alias": "m"})})
    for model, prompted in (("plain", False), ("alias", True)):
        assert relay("/v1/chat/completions", chat(model)).status == 200
        assert ("Be brief." in Upstream.seen[-1]["body"]) == prompted


UPSTREAM_ERRORS = [
    ("denied", 401, "invalid_request_error", "invalid_api_key", "bad key"),
    ("detail", 422, "upstream_error", "bad_response_status_code", "bad response status code 422"),
    ("text", 500, "upstream_error", "bad_response_status_code", ""),
    ("busy", 429, "x", None, "当前分组上游负载已饱和，请稍后再试"),
    ("notjson", 500, "one_api_error", "unmarshal_response_body_failed", "invalid character '<' looking for beginning of value"),
]


def test_relay_upstream_errors(relay):
    for model, status, kind, code, message in UPSTREAM_ERRORS:
        answer = relay("/v1/chat/completions", chat(model))
        error = answer.json["error"]
        assert (answer.status, error["type"], error["code"]) == (status, kind, code)
        assert error["message"].startswith(message + " (request id: ")


def test_relay_down_and_retry(relay):
    api = relay.api
    api.data("POST", "/api/channel/", {"name": "dead", "type": 8, "key": "k", "base_url": "http://127.0.0.1:9", "models": "d,r", "priority": 9})
    answer = relay("/v1/chat/completions", chat("d"))
    assert answer.status == 500 and answer.json["error"]["code"] == "do_request_failed"
    text = 'do request failed: Post "http://127.0.0.1:9/v1/chat/completions": dial tcp 127.0.0.1:9: connect: connection refused'
    assert answer.json["error"]["message"].startswith(text)
    api.data("POST", "/api/channel/", {"name": "low", "type": 8, "key": "k", "base_url": relay.upstream, "models": "r"})
    assert relay("/v1/chat/completions", chat("r")).status == 500
    api.data("PUT", "/api/option/", {"key": "RetryTimes", "value": "20"})
    assert relay("/v1/chat/completions", chat("r")).status == 200


def test_relay_urls_by_type(relay):
    api = relay.api
    for number, base, model in ((1, relay.upstream, "t1"), (50, relay.upstream + "/v1", "t50"), (8, relay.upstream + "/", "t8")):
        api.data("POST", "/api/channel/", {"name": model, "type": number, "key": "k", "base_url": base, "models": model})
        relay("/v1/embeddings", {"model": model, "input": "x"})
    assert [seen["path"] for seen in Upstream.seen] == ["/v1/embeddings", "/v1/v1/embeddings", "//v1/embeddings"]
    api.data("POST", "/api/channel/", {"name": "proxy", "type": 43, "key": "Bearer secret", "base_url": relay.upstream, "models": "p"})
    number = api.data("GET", "/api/channel/search?keyword=proxy")[0]["id"]
    assert relay(f"/v1/oneapi/proxy/{number}/v1/rerank?q=1", {"model": "any"}).status == 200
    assert Upstream.seen[-1]["path"] == "/v1/rerank?q=1" and Upstream.seen[-1]["auth"] == "Bearer secret"


def test_relay_mapping_and_quota(relay):
    api = relay.api
    mapping = json.dumps({"alias": "m"})
    api.data("POST", "/api/channel/", {"name": "map", "type": 8, "key": "k", "base_url": relay.upstream, "models": "alias", "model_mapping": mapping})
    assert relay("/v1/embeddings", {"model": "alias", "input": "x"}).status == 200 and json.loads(Upstream.seen[-1]["body"])["model"] == "m"
    used = api.data("GET", "/api/user/self")["used_quota"]
    assert used == 3 * 30  # an unknown model costs thirty
    api("POST", "/api/user/register", {"username": "poor", "password": "12345678"}, auth="")
    access = api.data("GET", "/api/user/search?keyword=poor")[0]["access_token"]
    key = api("GET", "/api/token/", auth=access).json["data"][0]["key"]
    answer = relay("/v1/chat/completions", chat(), key=key)
    assert answer.status == 403 and answer.json["error"]["code"] == "insufficient_user_quota"
    assert relay("/v1/chat/completions", chat(), key=key, suffix="-1").status == 403
    api.data("PUT", "/api/option/", {"key": "ModelRatio", "value": '{"m": 0}'})
    assert relay("/v1/chat/completions", chat(), key=key).status == 200  # free: quota 0 is enough


def test_channel_test(relay):
    api = relay.api
    good = api("GET", "/api/channel/test/1?model=m").json
    assert good["success"] and good["model"] == "m" and good["message"] == "" and good["time"] >= 0
    bad = api("GET", "/api/channel/test/1?model=denied").json
    assert not bad["success"] and bad["message"] == "status code 401: bad key" and bad["time"] == 0


def test_memory_cache_delays_new_channels(fresh, upstream):
    api = fresh(MEMORY_CACHE_ENABLED="true", SYNC_FREQUENCY="1")
    key = {"Authorization": "Bearer sk-" + api.data("POST", "/api/token/", {"name": "t", "unlimited_quota": True})["key"]}
    api.data("POST", "/api/channel/", {"name": "up", "type": 8, "key": "k", "base_url": upstream, "models": "m"})
    statuses = []
    for _attempt in range(30):
        statuses.append(api("POST", "/v1/embeddings", {"model": "m", "input": "x"}, key).status)
        if statuses[-1] == 200:
            break
        time.sleep(0.1)
    assert statuses[0] == 503 and statuses[-1] == 200


# -- start and faults ----------------------------------------------------------------------------------------------------


def test_tiktoken_trap(tmp_path, fresh):
    env = {**os.environ, "TIKTOKEN_CACHE_DIR": str(tmp_path)}
    (tmp_path / BPE[0]).write_text("IQ== 0\n")
    done = subprocess.run([sys.executable, str(PROGRAM)], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 1 and "[FATAL]" in done.stdout and "failed to get gpt-4o token encoder" in done.stdout
    (tmp_path / BPE[1]).write_text("IQ== 0\n")
    assert fresh(ONE_API_STANDIN_NO_TIKTOKEN="", TIKTOKEN_CACHE_DIR=str(tmp_path))("GET", "/api/status").status == 200


def test_version_flag():
    done = subprocess.run([sys.executable, str(PROGRAM), "--version"], capture_output=True, text=True, timeout=20, check=False)
    assert done.stdout == "v0.6.10\n"


def test_faults(tmp_path, fresh):
    rules, record = tmp_path / "faults.json", tmp_path / "requests"
    api = fresh(ONE_API_STANDIN_FAULTS=str(rules), ONE_API_STANDIN_REQUESTS=str(record))

    def fault(kind, **more):
        rules.write_text(json.dumps([{"method": "POST", "path_regex": "^/api/token/", "kind": kind, **more}]))

    def post(name):
        return api("POST", "/api/token/", {"name": name})

    def names():
        return [token["name"] for token in api.data("GET", "/api/token/search?keyword=")]

    assert post("plain").json["success"]
    fault("429", times=2)
    assert [post("limited").status for _attempt in range(3)] == [429, 429, 200]
    fault("500")
    assert post("broken").status == 500
    fault("drop_before")
    with pytest.raises((http.client.HTTPException, OSError)):
        post("unseen")
    fault("drop_after_write")
    with pytest.raises((http.client.HTTPException, OSError)):
        post("written")
    fault("truncate")
    with pytest.raises((http.client.HTTPException, OSError)):
        post("half")
    fault("slow", seconds=0.3)
    started = time.monotonic()
    assert post("late").json["success"] and time.monotonic() - started > 0.3
    fault("500", skip=1)
    assert [post("after").status, post("after").status] == [200, 500]
    assert names() == ["plain", "limited", "written", "half", "late", "after"]
    assert record.read_text().splitlines()[0] == "POST /api/token/ 200"
