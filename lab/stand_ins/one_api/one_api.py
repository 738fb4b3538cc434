# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A stand-in for One-API v0.6.10, written from the recorded contract of this project, for labs without a registry.

It answers the admin API with the manners of the real server, keeps its state in SQLite, MySQL or PostgreSQL (SQL_DSN), shares
what several nodes share through Redis, and really relays /v1. It needs the two tiktoken files as the real one does and dies
without them. Start: one_api.py [--port 3000] [--log-dir ./logs], data in the current directory, settings in the real server's
environment variables.

For tests only: ONE_API_STANDIN_NO_TIKTOKEN=1 leaves the tiktoken check out, ONE_API_STANDIN_FAULTS=<file> injects faults
(oneapi_http.Faults), ONE_API_STANDIN_REQUESTS=<file> gets one line per request, ONE_API_STANDIN_VERSION changes the version
told, ONE_API_STANDIN_FLAVOUR=new-api answers GET /api/setup.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import secrets
import signal
import ssl
import sys
import time
from pathlib import Path

import aiohttp
from aiohttp import web

sys.path.insert(0, str(Path(__file__).resolve().parent))

import oneapi_admin  # noqa: E402
import oneapi_relay  # noqa: E402
import redis  # noqa: E402
from oneapi_cache import Copies, RateLimiter, SharedRateLimiter, open_redis  # noqa: E402
from oneapi_db import DatabaseFault, fault_text, open_database  # noqa: E402
from oneapi_http import (  # noqa: E402
    CRITICAL_LIMIT,
    CRITICAL_SECONDS,
    GLOBAL_SECONDS,
    Answer,
    App,
    Context,
    Faults,
    Router,
    apply_fault,
    authenticate,
    client_ip,
    env_int,
    failure,
    not_found,
)
from oneapi_store import Refused, Store  # noqa: E402

VERSION = "v0.6.10"
BPE_URL = "https://openaipublic.blob.core.windows.net/encodings"
BPE_FILES = {
    "gpt-3.5-turbo": ("cl100k_base.tiktoken", "9b5ad71b2ce5302211f9c61530b329a4922fc6a4"),
    "gpt-4o": ("o200k_base.tiktoken", "fb374d419588a4632f3f557e76b4b70aebbca790"),
}
PAGE_TEXT = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>One API (stand-in)</title></head>
<body><h1>One API - stand-in</h1><p>This is a lab stand-in for One-API {version}: it relays and has the admin API, but no web console.</p>
</body></html>
"""
MAX_BODY = 64 * 2**20
CONNECT_SECONDS = 30  # of Go's default transport; an answer is waited for without end


class Log:
    def __init__(self, directory: str) -> None:
        self.file = None
        if directory:
            Path(directory).mkdir(exist_ok=True)  # the parent must exist
            self.file = (Path(directory) / time.strftime("oneapi-%Y%m%d.log")).open("a", encoding="utf-8")

    def __call__(self, level: str, text: str) -> None:
        line = f"[{level}] {time.strftime('%Y/%m/%d - %H:%M:%S')} | {text} "
        print(line, flush=True)
        if self.file:
            print(line, file=self.file, flush=True)

    def fatal(self, text: str) -> None:
        self("FATAL", f"[{text}]")
        sys.exit(1)


def check_tiktoken(log: Log) -> None:
    """The offline trap: both files under their sha1 names in the cache directory, else a download without a time-out."""
    if os.environ.get("ONE_API_STANDIN_NO_TIKTOKEN") == "1":
        return
    log("SYS", "initializing token encoders")
    directory = os.environ.get("TIKTOKEN_CACHE_DIR") or os.environ.get("DATA_GYM_CACHE_DIR") or "/tmp/data-gym-cache"  # noqa: S108
    for model, (name, sha1) in BPE_FILES.items():
        try:
            with (Path(directory) / sha1).open("rb") as file:
                parts = file.readline().split()
        except OSError:
            time.sleep(1)  # the real one hangs here until the network gives up
            text = f'Get "{BPE_URL}/{name}": dial tcp: lookup openaipublic.blob.core.windows.net: no such host'
            log.fatal(f"failed to get {model} token encoder: {text}")
        if len(parts) != 2 or not parts[1].isdigit():
            log.fatal(f"failed to get {model} token encoder: illegal base64 data at input byte 0")
    log("SYS", "token encoders initialized")


class Server:
    def __init__(self, app: App) -> None:
        self.app = app
        self.router = Router(oneapi_admin.routes(app) + oneapi_relay.routes())
        link = app.store.copies.link
        self.limiter = RateLimiter() if link is None else SharedRateLimiter(link)
        self.api_limit = env_int("GLOBAL_API_RATE_LIMIT", 240)
        self.web_limit = env_int("GLOBAL_WEB_RATE_LIMIT", 120)
        self.faults = Faults(os.environ.get("ONE_API_STANDIN_FAULTS"))
        self.record = os.environ.get("ONE_API_STANDIN_REQUESTS")

    async def handle(self, request: web.Request) -> web.StreamResponse:
        rule = self.faults.match(request)
        response = await (apply_fault(rule, self.app, request, lambda: self.answer(request)) if rule else self.answer(request))
        if self.record:
            with open(self.record, "a", encoding="utf-8") as file:
                print(request.method, request.path_qs, response.status, file=file)
        return response

    async def answer(self, request: web.Request) -> web.StreamResponse:
        found = self.router.find(request.method, request.path)
        if found is None:
            redirect = self.router.redirect(request)
            if redirect is not None:
                return redirect
        request_id = time.strftime("%Y%m%d%H%M%S") + f"{time.time_ns() % 10**9}{secrets.randbelow(10**8):08d}"
        address = client_ip(request)
        try:
            response = self.page(request, address) if found is None else await self.run(request, address, request_id, *found)
        except redis.RedisError as exc:
            self.app.log("ERR", f"Redis: {exc}")
            response = web.Response(status=500)
        if not response.prepared:
            response.headers["X-Oneapi-Request-Id"] = request_id
            if request.path.startswith(("/api", "/dashboard")) and "gzip" in request.headers.get("Accept-Encoding", ""):
                response.enable_compression(web.ContentCoding.gzip)
        self.app.log("GIN", f"{request_id} | {response.status} | {address} | {request.method} {request.path_qs}")
        return response

    def page(self, request: web.Request, address: str) -> web.Response:
        """What no route wants: 404 below /api and /v1, the web page everywhere else."""
        if not self.limiter.allow("GW", address, self.web_limit, GLOBAL_SECONDS):
            return web.Response(status=429)
        if request.path.startswith(("/v1", "/api")):
            return not_found(request)
        return web.Response(text=PAGE_TEXT.format(version=self.app.version), content_type="text/html", headers={"Cache-Control": "no-cache"})

    async def run(self, request: web.Request, address: str, request_id: str, route: oneapi_admin.Route, params: dict[str, str]) -> web.StreamResponse:
        if not route.relay and not self.limiter.allow("GA", address, self.api_limit, GLOBAL_SECONDS):
            return web.Response(status=429)
        if route.critical and not self.limiter.allow("CT", address, CRITICAL_LIMIT, CRITICAL_SECONDS):
            return web.Response(status=429)
        ctx = Context(self.app, request, await request.read(), params, request_id, address)
        try:
            if route.role:
                authenticate(ctx, route.role)
            return await route.handler(ctx)
        except Answer as exc:
            return exc.response
        except Refused as exc:
            return failure(str(exc))
        except DatabaseFault as exc:
            return failure(fault_text(exc))


async def sync(app: App, seconds: int) -> None:
    while True:
        await asyncio.sleep(seconds)
        app.store.reload_options()
        oneapi_relay.refresh_cache(app)


def trust() -> ssl.SSLContext:
    """As Go does: the system's bundle, and every file beside it."""
    context = ssl.create_default_context()
    for path in Path("/etc/ssl/certs").glob("*.pem"):
        with contextlib.suppress(OSError, ssl.SSLError):
            context.load_verify_locations(path)
    return context


async def serve(app: App, port: int) -> None:
    timeout = aiohttp.ClientTimeout(total=env_int("RELAY_TIMEOUT", 0) or None, sock_connect=CONNECT_SECONDS)
    connector = aiohttp.TCPConnector(limit=0, ssl=trust())
    async with aiohttp.ClientSession(timeout=timeout, connector=connector, read_bufsize=2**20, skip_auto_headers=["User-Agent"]) as client:
        app.http = client
        server = Server(app)
        if os.environ.get("MEMORY_CACHE_ENABLED") == "true" or app.store.copies.link is not None:
            app.log("SYS", "memory cache enabled")
            oneapi_relay.refresh_cache(app)
            app.spawn(sync(app, env_int("SYNC_FREQUENCY", 600)))
        web_app = web.Application(client_max_size=MAX_BODY)
        web_app.router.add_route("*", "/{tail:.*}", server.handle)
        runner = web.AppRunner(web_app, access_log=None)
        await runner.setup()
        try:
            await web.TCPSite(runner, None, port, shutdown_timeout=2, reuse_address=True).start()
        except OSError as exc:
            app.log("FATAL", f"[failed to start HTTP server: listen tcp :{port}: {exc.strerror}]")
            sys.exit(1)
        app.log("SYS", f"server started on http://localhost:{port}")
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        await stop.wait()
        await runner.cleanup()


def main() -> None:
    parser = argparse.ArgumentParser(prog="one-api", description=__doc__)
    parser.add_argument("--port", type=int, default=3000)
    parser.add_argument("--log-dir", default="./logs")
    parser.add_argument("--version", action="store_true")
    arguments = parser.parse_args()
    version = os.environ.get("ONE_API_STANDIN_VERSION") or VERSION
    if arguments.version:
        print(version)
        return
    log = Log(arguments.log_dir)
    log("SYS", f"One API {version} started")
    log("SYS", "this is a stand-in for lab use, not the real One API")
    master = os.environ.get("NODE_TYPE") != "slave"
    log("SYS", f"running in {'master' if master else 'slave'} mode")

    def note(text: str) -> None:
        log("SYS", text)

    try:
        database = open_database(note)
        link = open_redis(note, log.fatal)
        store = Store(database, note, Copies(link, env_int("SYNC_FREQUENCY", 600), note), master=master)
    except DatabaseFault as exc:
        log.fatal(f"failed to initialize database: {fault_text(exc)}")
        return
    check_tiktoken(log)
    secret = os.environ.get("SESSION_SECRET") or ""
    key = secrets.token_bytes(32) if secret in ("", "random_string") else secret.encode()
    app = App(store, log, version, int(time.time()), key, flavour=os.environ.get("ONE_API_STANDIN_FLAVOUR", ""))
    asyncio.run(serve(app, env_int("PORT", arguments.port)))


if __name__ == "__main__":
    main()
