# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""FastGPT before 4.7 asks a reranker in a shape of its own; this serves both shapes on one path, on 127.0.0.1, behind the door.

{query, inputs: [{id, text}]}      -> {code, msg, data: [{id, score}]}    converted
{model, query, documents: [text]}  -> the engine's own answer             passed on as it is

ADAPTER_PORT, ADAPTER_UPSTREAM (URL of the engine's /v1/rerank) and ADAPTER_MODEL come from the environment.
"""

from __future__ import annotations

import json
import os
import sys
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

LARGEST_BODY = 64 << 20
TIMEOUT = 110.0  # FastGPT 4.6 gives up after 120 s


class Refused(Exception):
    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def parse(body: bytes) -> dict[str, Any]:
    try:
        request = json.loads(body)
    except ValueError as error:
        raise Refused(400, f"The body is not JSON: {error}") from error
    if not isinstance(request, dict):
        raise Refused(422, "The body must be a JSON object.")
    return request


def convert(request: dict[str, Any], model: str) -> tuple[list[Any], dict[str, Any]]:
    """The ids in their order, and the engine's request."""
    inputs, query = request["inputs"], request.get("query")
    if not isinstance(query, str):
        raise Refused(422, "query: must be a text.")
    if not isinstance(inputs, list) or not all(isinstance(one, dict) and "id" in one and isinstance(one.get("text"), str) for one in inputs):
        raise Refused(422, "inputs: must be a list of objects with id and text.")
    return [one["id"] for one in inputs], {"model": model, "query": query, "documents": [one["text"] for one in inputs]}


def convert_back(ids: list[Any], answer: Any) -> dict[str, Any]:
    try:
        data = [{"id": ids[result["index"]], "score": result["relevance_score"]} for result in answer["results"]]
    except (KeyError, IndexError, TypeError) as error:
        raise Refused(502, "The model server answered in an unknown shape.") from error
    return {"code": 200, "msg": "ok", "data": data}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    upstream = ""
    model = ""

    def log_message(self, *arguments: Any) -> None:
        """Queries are nobody's business."""

    def answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def refuse(self, old: bool, status: int, message: str) -> None:
        if old:
            shape: dict[str, Any] = {"code": status, "message": message, "msg": message, "data": None}
        else:
            kind = "server_error" if status >= 500 else "invalid_request_error"
            shape = {"error": {"message": message, "type": kind, "param": None, "code": None}}
        self.answer(status, json.dumps(shape).encode())

    def ask(self, body: bytes) -> tuple[int, bytes]:
        call = urllib.request.Request(self.upstream, body, {"Content-Type": "application/json"})
        try:
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(call, timeout=TIMEOUT) as reply:
                return reply.status, reply.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()
        except OSError as error:
            raise Refused(503, "The model server is not answering.") from error

    def do_GET(self) -> None:
        if self.path == "/health":
            self.answer(200, b'{"status":"ok"}')
        else:
            self.refuse(False, 404, "Unknown path.")

    def do_POST(self) -> None:
        old = False
        try:
            length = int(self.headers.get("Content-Length") or 0)
            if length > LARGEST_BODY:
                self.close_connection = True
                raise Refused(413, "The body is too large.")
            body = self.rfile.read(length)
            if self.path != "/v1/rerank":
                raise Refused(404, "Unknown path.")
            request = parse(body)
            old = "inputs" in request
            if not old:
                self.answer(*self.ask(body))
                return
            ids, converted = convert(request, self.model)
            if not ids:
                self.answer(200, json.dumps(convert_back([], {"results": []})).encode())
                return
            status, reply = self.ask(json.dumps(converted).encode())
            if status != 200:
                raise Refused(status if status >= 500 else 502, f"The model server answered {status}: {reply[:300].decode(errors='replace')}")
            self.answer(200, json.dumps(convert_back(ids, parse(reply))).encode())
        except Refused as error:
            self.refuse(old, error.status, str(error))


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64


def make(port: int, upstream: str, model: str) -> Server:
    handler = type("Bound", (Handler,), {"upstream": upstream, "model": model})
    return Server(("127.0.0.1", port), handler)


def main() -> int:
    try:
        port, upstream, model = int(os.environ["ADAPTER_PORT"]), os.environ["ADAPTER_UPSTREAM"], os.environ["ADAPTER_MODEL"]
    except (KeyError, ValueError) as error:
        print(f"ADAPTER_PORT, ADAPTER_UPSTREAM and ADAPTER_MODEL must be set: {error}", file=sys.stderr)
        return 2
    make(port, upstream, model).serve_forever()
    return 0


if __name__ == "__main__":
    sys.exit(main())
