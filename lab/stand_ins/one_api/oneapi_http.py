# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The HTTP manners of the One-API stand-in: routes with gin's redirects, sessions, rate limits, faults for tests.

Written from the recorded contract.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import hashlib
import hmac
import ipaddress
import json
import os
import re
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web
from oneapi_db import DatabaseFault, Row
from oneapi_json import encode, encode_map
from oneapi_store import Store

COMMON, ADMIN, ROOT = 1, 10, 100
SESSION_SECONDS = 2592000
CRITICAL_LIMIT, CRITICAL_SECONDS = 20, 1200
GLOBAL_SECONDS = 180


class Answer(Exception):
    """Ends a request with this answer."""

    def __init__(self, response: web.StreamResponse) -> None:
        super().__init__(response.status)
        self.response = response


@dataclasses.dataclass
class Context:
    """One request."""

    app: App
    request: web.Request
    body: bytes
    params: dict[str, str]
    request_id: str
    client_ip: str
    user_id: int = 0
    username: str = ""
    role: int = 0
    token: dict[str, Any] = dataclasses.field(default_factory=dict)
    group: str = ""
    model: str = ""
    pinned_channel: str | None = None

    @property
    def store(self) -> Store:
        return self.app.store

    def query(self, name: str) -> str:
        return self.request.query.get(name, "")


@dataclasses.dataclass
class App:
    store: Store
    log: Callable[[str, str], None]
    version: str
    start_time: int
    session_key: bytes
    http: aiohttp.ClientSession | None = None
    flavour: str = ""
    cache: dict[tuple[str, str], list[dict[str, Any]]] | None = None
    testing_all: bool = False
    background: set[asyncio.Task[None]] = dataclasses.field(default_factory=set)

    def spawn(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self.background.add(task)
        task.add_done_callback(self.background.discard)


Handler = Callable[[Context], Awaitable[web.StreamResponse]]


def json_answer(value: dict[str, Any], status: int = 200, *, is_map: bool = True) -> web.Response:
    body = encode_map(value) if is_map else encode(value)
    return web.Response(body=body, status=status, headers={"Content-Type": "application/json; charset=utf-8"})


_NO_DATA = object()


def success(data: Any = _NO_DATA) -> web.Response:
    value: dict[str, Any] = {"message": "", "success": True}
    if data is not _NO_DATA:
        value["data"] = data
    return json_answer(value)


def failure(message: str, status: int = 200) -> web.Response:
    return json_answer({"message": message, "success": False}, status)


def not_found(request: web.Request) -> web.Response:
    error = {"message": f"Invalid URL ({request.method} {request.path})", "type": "invalid_request_error", "param": "", "code": ""}
    return json_answer({"error": error}, 404)


def client_ip(request: web.Request) -> str:
    """X-Forwarded-For is believed from anybody: every proxy is trusted, so its leftmost address counts."""
    for header in ("X-Forwarded-For", "X-Real-IP"):
        parts = [part.strip() for part in request.headers.get(header, "").split(",") if part.strip()]
        try:
            if parts and all(ipaddress.ip_address(part) for part in parts):
                return parts[0]
        except ValueError:
            continue
    return request.remote or ""


# -- sessions: stateless, so what the cookie says about role and status stays true until it expires -----------------------


def make_session(key: bytes, value: dict[str, Any]) -> str:
    payload = base64.urlsafe_b64encode(json.dumps({**value, "t": int(time.time())}).encode()).decode()
    return f"{payload}|{hmac.new(key, payload.encode(), hashlib.sha256).hexdigest()}"


def read_session(key: bytes, cookie: str | None) -> dict[str, Any]:
    payload, _bar, signature = (cookie or "").partition("|")
    if not payload or not hmac.compare_digest(hmac.new(key, payload.encode(), hashlib.sha256).hexdigest(), signature):
        return {}
    value: dict[str, Any] = json.loads(base64.urlsafe_b64decode(payload))
    return value if value.get("t", 0) + SESSION_SECONDS > time.time() else {}


def set_session(response: web.StreamResponse, cookie: str) -> None:
    age = SESSION_SECONDS if cookie else -1
    expires = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + age))
    max_age = age if cookie else 0
    response.headers.add("Set-Cookie", f"session={cookie}; Path=/; Expires={expires}; Max-Age={max_age}")


def authenticate(ctx: Context, role: int) -> None:
    """The session cookie wins; 401 only where there is no credential at all."""
    session = read_session(ctx.app.session_key, ctx.request.cookies.get("session"))
    if not session:
        header = ctx.request.headers.get("Authorization", "")
        if not header:
            raise Answer(failure("无权进行此操作，未登录且未提供 access token", 401))
        row: Row | None = None
        with contextlib.suppress(DatabaseFault):  # a database that does not answer reads like a wrong token
            row = ctx.store.row("SELECT * FROM users WHERE access_token = ?", header.replace("Bearer ", "", 1))
        if row is None or not row["username"]:
            raise Answer(failure("无权进行此操作，access token 无效"))
        session = {"id": row["id"], "username": row["username"], "role": row["role"], "status": row["status"]}
    if session["status"] == 2 or session["id"] in ctx.store.banned:
        response = failure("用户已被封禁")
        set_session(response, "")
        raise Answer(response)
    if session["role"] < role:
        raise Answer(failure("无权进行此操作，权限不足"))
    ctx.user_id, ctx.username, ctx.role = session["id"], session["username"], session["role"]


# -- routes ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Route:
    method: str
    pattern: str
    handler: Handler
    role: int = 0
    critical: bool = False
    relay: bool = False
    regex: re.Pattern[str] = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        regex = re.sub(r":(\w+)", r"(?P<\1>[^/]+)", self.pattern)
        regex = re.sub(r"\*(\w+)", r"(?P<\1>.*)", regex)
        object.__setattr__(self, "regex", re.compile(f"^{regex}$"))


class Router:
    def __init__(self, routes: list[Route]) -> None:
        # Fixed paths win over parameters, as in gin's tree.
        self.routes = sorted(routes, key=lambda route: (":" in route.pattern) + 2 * ("*" in route.pattern))

    def find(self, method: str, path: str) -> tuple[Route, dict[str, str]] | None:
        for route in self.routes:
            if route.method in (method, "ANY"):
                match = route.regex.match(path)
                if match:
                    return route, match.groupdict()
        return None

    def redirect(self, request: web.Request) -> web.Response | None:
        """A path that exists only with (or without) the trailing slash: 301 for GET, 307 for the rest."""
        path = request.path
        other = path[:-1] if path.endswith("/") else path + "/"
        if len(path) < 2 or self.find(request.method, other) is None:
            return None
        location = other + (f"?{request.query_string}" if request.query_string else "")
        if request.method == "GET":
            text = f'<a href="{location}">Moved Permanently</a>.\n\n'
            return web.Response(text=text, status=301, headers={"Location": location, "Content-Type": "text/html; charset=utf-8"})
        return web.Response(status=307, headers={"Location": location})


# -- faults, for tests only -----------------------------------------------------------------------------------------------


class Faults:
    """Rules of the file named by ONE_API_STANDIN_FAULTS, read again at each request; absent by default.

    [{"method": "POST", "path_regex": "^/api/channel/", "kind": "drop_after_write", "times": 1, "seconds": 5}]
    Kinds in which nothing is done: 429, 500 (empty body; `retry_after` adds that header), refuse (success:false), drop_before
    (connection cut). Kinds in which it is done: drop_after_write (then cut), slow (answered after `seconds`), truncate (half of
    the body, then cut), late (cut at once, done after `seconds`). half: the row of a channel is written, its routes are not; the
    answer says so, or is cut with `drop`. What a proxy before the server may say in its place: html (a page, status 200),
    bad_gateway (a page, status 502), redirect (to a log-in page elsewhere).
    `skip` lets that many matching requests pass first. Writing the file anew starts the counts again.
    """

    def __init__(self, path: str | None) -> None:
        self.path = Path(path) if path else None
        self.stamp: tuple[int, int] = (0, 0)
        self.rules: list[dict[str, Any]] = []

    def match(self, request: web.Request) -> dict[str, Any]:
        if self.path is None or not self.path.exists():
            return {}
        stat = self.path.stat()
        if (stat.st_mtime_ns, stat.st_ino) != self.stamp:
            self.stamp = (stat.st_mtime_ns, stat.st_ino)
            self.rules = json.loads(self.path.read_text(encoding="utf-8") or "[]")
        for rule in self.rules:
            if rule.get("method", request.method) != request.method or not re.search(rule.get("path_regex", ""), request.path_qs):
                continue
            if rule.get("skip", 0) > 0:
                rule["skip"] -= 1
                continue
            if rule.setdefault("times", 1) > 0:
                rule["times"] -= 1
                return rule
        return {}


def cut(request: web.Request) -> asyncio.CancelledError:
    if request.transport is not None:
        request.transport.abort()
    return asyncio.CancelledError()


async def apply_fault(rule: dict[str, Any], app: App, request: web.Request, work: Callable[[], Awaitable[web.StreamResponse]]) -> web.StreamResponse:
    kind, seconds = str(rule.get("kind", "")), float(rule.get("seconds", 5))
    if kind in ("429", "500"):
        return web.Response(status=int(kind), headers={"Retry-After": str(rule["retry_after"])} if "retry_after" in rule else {})
    if kind == "refuse":
        return failure("database is locked")
    if kind in ("html", "bad_gateway"):
        return web.Response(text="<html><body>Sign in</body></html>", status=200 if kind == "html" else 502, content_type="text/html")
    if kind == "redirect":
        return web.Response(status=302, headers={"Location": "https://sso.example.com/login?next=secret"})
    if kind == "drop_before":
        raise cut(request)
    if kind == "late":
        await request.read()

        async def later() -> None:
            await asyncio.sleep(seconds)
            await work()

        app.spawn(later())
        raise cut(request)
    if kind == "half":
        await request.read()
        app.store.routes_fail = True
    try:
        response = await work()
    finally:
        app.store.routes_fail = False
    if kind == "slow":
        await asyncio.sleep(seconds)
    elif kind == "drop_after_write" or rule.get("drop"):
        raise cut(request)
    elif kind == "truncate" and isinstance(response, web.Response):
        body = bytes(response.body or b"")  # type: ignore[arg-type]
        part = web.StreamResponse(status=response.status, headers={"Content-Type": response.headers.get("Content-Type", "")})
        part.content_length = len(body)
        await part.prepare(request)
        await part.write(body[: len(body) // 2])
        await asyncio.sleep(0.05)
        raise cut(request)
    return response


def env_int(name: str, default: int) -> int:
    try:
        return int(os.environ.get(name, ""))
    except ValueError:
        return default
