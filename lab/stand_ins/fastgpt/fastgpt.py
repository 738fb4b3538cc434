# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A stand-in for FastGPT 4.6.8 to 4.8.19, written from the recorded contract of this project, for labs without a registry.

It really stores (MongoDB, PostgreSQL with pgvector), embeds and chats through the gateway and asks the reranker itself, with
the habits of the version in FASTGPT_VERSION: lazy start, first-boot race, strict JSON or JSON5, odd status codes. Settings
are the real server's environment variables; data in config.json at /app/data/config.json.

For tests only: FASTGPT_STANDIN_CONFIG=<path of config.json>, FASTGPT_STANDIN_NO_RACE=1,
FASTGPT_STANDIN_SELECTION_SECONDS=<seconds instead of 30>.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web

sys.path.insert(0, str(Path(__file__).resolve().parent))

from fastgpt_api import NAMED, Api, Named, Reply, Unhandled, envelope  # noqa: E402
from fastgpt_gateway import Gateway, GatewayError  # noqa: E402
from fastgpt_rules import ConfigError, Rules, load_config, normalise, parse_version  # noqa: E402
from fastgpt_store import Fault, Mongo, Vectors, die, log, seconds_to_cron  # noqa: E402
from pymongo.errors import PyMongoError  # noqa: E402

CONFIG_PATH = "/app/data/config.json"
MAX_BODY = 20 * 2**20
PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>FastGPT (stand-in)</title></head>
<body><h1>FastGPT - stand-in</h1><p>This is a lab stand-in for FastGPT {version}: it has the API, but no web interface.</p></body></html>
"""
PAGE_404 = '<!doctype html><html><head><meta charset="utf-8"><title>404: This page could not be found</title></head><body>404</body></html>'


class Server:
    def __init__(self, rules: Rules, http: aiohttp.ClientSession) -> None:
        self.rules = rules
        self.config: dict[str, Any] = {}
        self.mongo, self.vectors = Mongo(rules), Vectors(rules)
        self.gateway = Gateway(rules, http)
        self.api = Api(rules, self.mongo, self.vectors, self.gateway, self.config)
        self.started: asyncio.Task[None] | None = None
        self.first_stage = asyncio.Event()
        self.side: set[asyncio.Task[None]] = set()

    # -- start -------------------------------------------------------------------------------------------------------

    def wake(self) -> None:
        """What the real server does at its first API request (from 4.8.14 on: at its start)."""
        if self.started is None:
            self.started = asyncio.create_task(self.start())

    async def start(self) -> None:
        config_read = asyncio.Event()

        def after_first_try() -> None:
            if not config_read.is_set():
                config_read.set()
                self.read_config(first=True)
                self.first_stage.set()

        await self.mongo.connect(after_first_try)
        vectors = asyncio.create_task(self.vectors.init())
        self.side.add(vectors)
        try:
            await self.mongo.init_root()
        except PyMongoError as exc:
            die(f"init root user error {exc}")
        if self.rules.rereads_config:
            self.side.add(asyncio.create_task(self.cron()))
        if self.rules.init_at_start:
            log("Init system success")

    def read_config(self, first: bool) -> None:
        path = os.environ.get("FASTGPT_STANDIN_CONFIG") or CONFIG_PATH
        try:
            config = load_config(path, self.rules)
        except ConfigError as exc:
            if first:
                die(f"{'Init system error' if self.rules.init_at_start else 'Load init config error'} {exc}")
            log(f"Load init config error {exc}")  # a running server keeps what it had
            return
        self.config.clear()
        self.config.update(config)
        self.gateway.system_env = config["systemEnv"]
        log(json.dumps(config, ensure_ascii=False))  # keys and all, as the real one does
        log(f"System Version: {self.rules.text}")

    async def cron(self) -> None:
        while True:
            await asyncio.sleep(seconds_to_cron(5))
            log("refresh system config")
            self.read_config(first=False)

    # -- requests ----------------------------------------------------------------------------------------------------

    async def handle(self, request: web.Request) -> web.StreamResponse:
        path = request.path
        if path in ("/", "/login", "/login/"):
            return web.Response(text=PAGE.format(version=self.rules.text), content_type="text/html")
        if not path.startswith("/api/"):
            return web.Response(text=PAGE_404, status=404, content_type="text/html")
        name = path.removeprefix("/api/").rstrip("/")
        admin = name.removeprefix("admin/") if name.startswith("admin/") else ""
        if name not in self.api.routes and admin not in self.rules.admin_calls:
            return web.Response(text=PAGE_404, status=404, content_type="text/html")
        if request.method == "OPTIONS":
            return web.Response(status=200)
        try:
            body = await self.body(request)
        except ValueError:
            return web.Response(text="Invalid JSON", status=400)
        self.wake()
        await self.first_stage.wait()
        if not self.config:
            self.config.update(normalise({}))
        return await self.guarded(name, request, body, admin)

    @staticmethod
    async def body(request: web.Request) -> dict[str, Any]:
        raw = await request.read()
        if not raw or "json" not in request.headers.get("Content-Type", ""):
            return {}
        value = json.loads(raw)
        return value if isinstance(value, dict) else {}

    async def guarded(self, name: str, request: web.Request, body: dict[str, Any], admin: str) -> web.StreamResponse:
        try:
            reply: Reply = await (self.admin(admin, request) if admin else self.api.routes[name](request, body))
        except Named as exc:
            code, message = NAMED.get(str(exc), (500, str(exc)))
            answer = envelope(code, None, message, str(exc), http=429 if code == 429 else self.rules.error_status)
            if str(exc) == "unAuthorization":
                answer.headers.add("Set-Cookie", f"{self.rules.cookie}=; Path=/; Max-Age=0")
            return answer
        except Unhandled:
            return web.Response(text="Internal Server Error", status=500)
        except (Fault, GatewayError, PyMongoError, ValueError) as exc:
            log(f"response error: {name} {exc}")
            return envelope(500, None, exc.plain if isinstance(exc, GatewayError) else str(exc))
        return reply if isinstance(reply, web.StreamResponse) else envelope(200, reply)

    async def admin(self, name: str, request: web.Request) -> Reply:
        key = os.environ.get("ROOT_KEY", "")
        if not key or request.headers.get("rootkey") != key:
            raise Named("unAuthorization")
        if name == "initv467":
            raise Fault('column "tmb_id" does not exist')  # what a fresh database says
        return {"message": "success"}


async def serve(rules: Rules) -> None:
    # Inside a container HOSTNAME is the container's id: it then listens on that address only, not on 127.0.0.1.
    name, port = os.environ.get("HOSTNAME") or "0.0.0.0", int(os.environ.get("PORT") or 3000)  # noqa: S104
    try:
        address = socket.gethostbyname(name)
    except OSError:
        die(f"Failed to start server\nError: getaddrinfo ENOTFOUND {name}")
        return
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), read_bufsize=2**20) as http:
        server = Server(rules, http)
        app = web.Application(client_max_size=MAX_BODY)
        app.router.add_route("*", "/{tail:.*}", server.handle)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, address, port, shutdown_timeout=1, reuse_address=True).start()
        log(f"   FastGPT {rules.text} (stand-in, not the real one)\n   - Local: http://{name}:{port}\n   Ready in 20ms")
        if rules.init_at_start:
            server.wake()
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        await stop.wait()
        await asyncio.wait_for(runner.cleanup(), 3)
    os._exit(0)


def main() -> None:
    try:
        rules = Rules(parse_version(os.environ.get("FASTGPT_VERSION") or "v4.8.9"))
    except ValueError as exc:
        sys.exit(str(exc))
    asyncio.run(serve(rules))


if __name__ == "__main__":
    main()
