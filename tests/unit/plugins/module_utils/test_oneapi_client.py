# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The One-API client against scripted answers."""

from __future__ import annotations

import json
import typing as t

import pytest
from ansible_collections.selfhosted.fastgpt.plugins.module_utils import _http, _oneapi

STATUS = {"version": "v0.6.10"}


def answer(data: t.Any = None, success: bool = True, status: int = 200, message: str = "", **headers: str) -> _http.Response:
    body = json.dumps({"success": success, "message": message, "data": data}).encode()
    return _http.Response(status, headers, body)


class Wire:
    """Takes the place of _http.request: a queue of answers per "METHOD path", the last of which stays."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str, t.Any, dict[str, str]]] = []
        self.answers: dict[str, list[t.Any]] = {
            "GET /api/status": [answer(STATUS)],
            "GET /api/setup": [_http.Response(404, {}, b'{"error":{"message":"Invalid URL (GET /api/setup)"}}')],
        }

    def say(self, request: str, *answers: t.Any) -> None:
        self.answers[request] = list(answers)

    def __call__(self, method: str, url: str, *, headers: t.Any = None, json: t.Any = None, **unused: t.Any) -> _http.Response:
        path = url.removeprefix("http://gateway")
        self.asked.append((method, path, json, dict(headers or {})))
        queue = self.answers[f"{method} {path}"]
        item = queue.pop(0) if len(queue) > 1 else queue[0]
        if isinstance(item, Exception):
            raise item
        assert isinstance(item, _http.Response)
        return item

    def count(self, method: str, path: str = "") -> int:
        return len([1 for asked in self.asked if asked[0] == method and asked[1].startswith(path)])


@pytest.fixture
def wire(monkeypatch: pytest.MonkeyPatch) -> Wire:
    result = Wire()
    monkeypatch.setattr(_oneapi._http, "request", result)
    return result


def client(**more: t.Any) -> _oneapi.Client:
    more.setdefault("access_token", "f" * 32)
    return _oneapi.Client("http://gateway/", sleep=lambda seconds: None, **more)


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("v0.6.10", (0, 6, 10)),
        ("v0.6.11-preview.7", (0, 6, 11)),
        ("0.6.8", (0, 6, 8)),
        ("v1.0", (1, 0, 0)),
        ("v0.0.0", None),
        ("", None),
        ("latest", None),
        ("v" + "9" * 5000 + ".1", None),
    ],
)
def test_versions(text: str, version: t.Any) -> None:
    assert _oneapi.parse_version(text) == version


def test_a_converged_read_costs_two_requests(wire: Wire) -> None:
    wire.say("GET /api/token/search?keyword=", answer([{"id": 2}, {"id": 1}]))
    assert [row["id"] for row in client().tokens()] == [1, 2]
    assert len(wire.asked) == 2
    assert wire.asked[1][3] == {"Authorization": "Bearer " + "f" * 32}


def test_a_creation_is_not_repeated_after_a_lost_answer(wire: Wire) -> None:
    for lost in (_http.TransportError("cut", sent=True), _http.Response(500, {}, b""), _http.Response(200, {}, b'{"succ')):
        wire.asked.clear()
        wire.say("POST /api/token/", lost)
        with pytest.raises(_oneapi.LostAnswer):
            client().post("/api/token/", {})
        assert wire.count("POST") == 1


def test_a_creation_is_repeated_where_it_never_arrived(wire: Wire) -> None:
    wire.say("POST /api/token/", _http.TransportError("refused", sent=False), _http.Response(429, {}, b""), answer({"id": 1}))
    assert client().post("/api/token/", {}) == {"id": 1}
    assert wire.count("POST") == 3


@pytest.mark.parametrize("lost", [_http.TransportError("cut", sent=True), _http.Response(502, {}, b""), _http.Response(200, {}, b"{")])
def test_all_else_is_repeated_but_not_for_ever(wire: Wire, lost: t.Any) -> None:
    wire.say("PUT /api/token/", lost, lost, answer())
    client().put("/api/token/", {})
    wire.asked.clear()
    wire.say("PUT /api/token/", lost)
    with pytest.raises(_oneapi.OneApiError):
        client().put("/api/token/", {})
    assert wire.count("PUT") == 5


def test_patience_with_the_rate_limit_is_bounded(wire: Wire) -> None:
    slept: list[float] = []
    wire.say("GET /api/status", _http.Response(429, {}, b""))
    with pytest.raises(_oneapi.RateLimited, match="rate_limit_wait"):
        _oneapi.Client("http://gateway", access_token="x", rate_limit_wait=60, sleep=slept.append).identify()
    assert sum(slept) == 60
    assert max(slept) <= 15


@pytest.mark.parametrize(
    ("header", "pauses"),
    [
        ("", [0.5, 1.0]),
        ("7", [7, 7]),
        ("0", [0.5, 0.5]),
        ("100", [60]),
        ("soon", [0.5, 1.0]),
        ("Wed, 21 Oct 2015 07:28:00 GMT", [0.5, 0.5]),
        ("Wed, 21 Oct 2099 07:28:00 GMT", [60]),
    ],
)
def test_a_proxy_that_tells_when_is_believed_within_the_patience(wire: Wire, header: str, pauses: list[float]) -> None:
    slept: list[float] = []
    limited = _http.Response(429, {"retry-after": header} if header else {}, b"")
    wire.say("GET /api/status", *[limited] * len(pauses), answer(STATUS))
    _oneapi.Client("http://gateway", access_token="x", rate_limit_wait=60, sleep=slept.append).identify()
    assert slept == pauses


def test_what_another_try_cannot_mend_is_not_tried_again(wire: Wire) -> None:
    wire.say("GET /api/status", _http.TransportError("certificate verify failed", sent=False, lasting=True))
    with pytest.raises(_oneapi.OneApiError, match="verify failed"):
        client().identify()
    assert len(wire.asked) == 1


@pytest.mark.parametrize("lost", [_http.TransportError("cut"), _http.Response(500, {}, b""), _http.Response(200, {}, b'{"succ')])
def test_a_login_that_may_have_counted_is_tried_once_more(wire: Wire, lost: t.Any) -> None:
    wire.say("POST /api/user/login", lost)
    with pytest.raises(_oneapi.OneApiError):
        client(access_token=None, password="x" * 8).tokens()
    assert wire.count("POST") == 2


def test_a_web_page_in_place_of_an_answer(wire: Wire) -> None:
    page = _http.Response(200, {"content-type": "text/html; charset=utf-8"}, b"<html>Sign in</html>")
    wire.say("GET /api/token/search?keyword=", page)
    with pytest.raises(_oneapi.OneApiError, match="web page"):
        client().tokens()
    assert wire.count("GET", "/api/token") == 1
    # What became of a creation has to be looked at all the same.
    wire.say("POST /api/token/", page)
    with pytest.raises(_oneapi.LostAnswer):
        client().post("/api/token/", {})


@pytest.mark.parametrize(
    "row",
    [
        {},
        {"id": None},
        {"id": "1"},
        {"id": True},
        {"id": 1.5},
        {"id": 1, "name": 5},
        {"id": 1, "expired_time": "never"},
        {"id": 1, "models": ["a"]},
        {"id": 1, "key": {"masked": True}},
        {"id": 1, "unlimited_quota": 1},
    ],
)
def test_rows_of_another_shape(wire: Wire, row: t.Any) -> None:
    wire.say("GET /api/token/search?keyword=", answer([{"id": 7, "name": None}, row]))
    with pytest.raises(_oneapi.OneApiError, match="no One-API that the modules know"):
        client().tokens()


@pytest.mark.parametrize("key", ["setup", "self_use_mode_enabled", "mj_notify_enabled", "enable_data_export", "default_collapse_sidebar"])
def test_a_fork_is_known_by_its_greeting(wire: Wire, key: str) -> None:
    """Older generations serve plain lists, so a run that changes nothing would not notice."""
    wire.say("GET /api/status", answer({"version": "v0.6.10", key: False}))
    with pytest.raises(_oneapi.OneApiError, match="is new-api"):
        client().tokens()
    assert len(wire.asked) == 1


@pytest.mark.parametrize(("data", "models"), [(None, set()), ([], set()), (["a", 1], {"a", "1"}), ({"a": 1}, None), ("a", None)])
def test_models_that_are_served(wire: Wire, data: t.Any, models: t.Any) -> None:
    wire.say("GET /api/user/available_models", answer(data))
    assert client().available_models() == models


@pytest.mark.parametrize("status", [404, 200])
def test_a_server_that_does_not_tell_what_it_serves(wire: Wire, status: int) -> None:
    wire.say("GET /api/user/available_models", answer(success=False, status=status))
    assert client().available_models() is None
    wire.say("GET /api/user/available_models", _http.Response(502, {}, b""))
    with pytest.raises(_oneapi.OneApiError):
        client().available_models()


@pytest.mark.parametrize("location", ["/login?next=secret", "https://user:secret@sso.example.com/in?x=secret", "https://[::1", ""])
def test_a_redirect_tells_where_to(wire: Wire, location: str) -> None:
    wire.say("GET /api/status", _http.Response(302, {"location": location}, b""))
    with pytest.raises(_oneapi.OneApiError, match="redirect") as caught:
        client().identify()
    assert "secret" not in str(caught.value)
    assert ("login" in str(caught.value)) == location.startswith("/login")


def test_a_long_reason_is_cut(wire: Wire) -> None:
    wire.say("PUT /api/token/", answer(success=False, message="x" * 100000))
    with pytest.raises(_oneapi.Refused) as caught:
        client().put("/api/token/", {})
    assert len(str(caught.value)) < 1000


def test_one_login_serves_a_whole_task(wire: Wire) -> None:
    wire.say("POST /api/user/login", answer({"id": 1}, **{"set-cookie": "other=1\nsession=abc=; Path=/; Expires=Mon, 01 Jan 2029 00:00:00 GMT"}))
    wire.say("GET /api/token/search?keyword=", answer([]))
    wire.say("POST /api/token/", answer({"id": 1}))
    one = client(access_token=None, password="secret-1")
    one.tokens()
    one.post("/api/token/", {})
    one.tokens()
    assert wire.count("POST", "/api/user/login") == 1
    assert wire.asked[-1][3] == {"Cookie": "session=abc="}


def test_login_limit_is_told_apart_from_the_general_one(wire: Wire) -> None:
    limited = _http.Response(429, {}, b"")
    wire.say("POST /api/user/login", limited, answer({"id": 1}, **{"set-cookie": "session=abc"}))
    assert client(access_token=None).login("root", "x" * 8)
    wire.say("POST /api/user/login", limited)
    with pytest.raises(_oneapi.OneApiError, match="20 log-ins"):
        client(access_token=None).login("root", "x" * 8)


def test_a_refused_access_token_gives_way_to_the_password(wire: Wire) -> None:
    wire.say("GET /api/token/search?keyword=", answer(success=False, message="access token 无效"), answer([]))
    wire.say("POST /api/user/login", answer({"id": 1}, **{"set-cookie": "session=abc"}))
    warnings: list[str] = []
    assert client(password="secret-1", warn=warnings.append).tokens() == []
    assert len(warnings) == 1


def test_a_fork_that_asks_for_more_is_recognised(wire: Wire) -> None:
    """new-api refuses every read without a header of its own."""
    wire.say("GET /api/token/search?keyword=", answer(success=False, status=401, message="New-Api-User"))
    wire.say("GET /api/setup", answer({"status": True}))
    with pytest.raises(_oneapi.OneApiError, match="is new-api"):
        client().tokens()


@pytest.mark.parametrize("data", [{"items": [], "total": 0}, "text", [1]])
def test_lists_of_another_shape(wire: Wire, data: t.Any) -> None:
    wire.say("GET /api/channel/search?keyword=", answer(data))
    with pytest.raises(_oneapi.OneApiError, match="list"):
        client().channels()


def test_status_tells_a_fork(wire: Wire) -> None:
    wire.say("GET /api/status", answer({"version": "v0.6.10", "setup": True}))
    with pytest.raises(_oneapi.OneApiError, match="is new-api"):
        client().identify()


def test_pages_are_read_where_the_search_fails(wire: Wire) -> None:
    wire.say("GET /api/token/search?keyword=", answer(success=False, message="no such function"))
    for page, size in ((0, 10), (1, 10), (2, 3)):
        wire.say(f"GET /api/token/?p={page}", answer([{"id": 100 - 10 * page - number} for number in range(size)]))
    rows = client().tokens()
    assert len(rows) == 23
    assert rows == sorted(rows, key=lambda row: t.cast(int, row["id"]))


def test_the_user_is_matched_whole(wire: Wire) -> None:
    wire.say("GET /api/user/search?keyword=root", answer([{"id": 2, "username": "root2"}, {"id": 1, "username": "root", "access_token": "t"}]))
    assert client().user("root") == {"id": 1, "username": "root", "access_token": "t"}
    wire.say("GET /api/user/search?keyword=a%26b", answer(None))
    assert client().user("a&b") is None


@pytest.mark.parametrize("status", [301, 307])
def test_a_redirect_is_explained(wire: Wire, status: int) -> None:
    wire.say("GET /api/status", _http.Response(status, {}, b""))
    with pytest.raises(_oneapi.OneApiError, match="root of One-API"):
        client().identify()


def test_an_error_body_is_told(wire: Wire) -> None:
    wire.say("PUT /api/token/", _http.Response(404, {}, b'{"error":{"message":"Invalid URL (PUT /api/token/)"}}'))
    with pytest.raises(_oneapi.OneApiError, match="Invalid URL"):
        client().put("/api/token/", {})


def test_deleting_a_user_answers_nothing(wire: Wire) -> None:
    wire.say("DELETE /api/user/3", _http.Response(200, {}, b""))
    client().delete("/api/user/3")


def test_the_probe_gives_way_to_the_limit_for_pages(wire: Wire) -> None:
    wire.say("GET /api/setup", _http.Response(429, {}, b""))
    wire.say("PUT /api/token/", answer())
    client().put("/api/token/", {})
