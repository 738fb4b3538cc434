# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Routes. Every answer that is not 200 has OpenAI's error shape."""

from __future__ import annotations

import asyncio
import hmac
import json
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from .metrics import Metrics
from .requests import ChatRequest, Refusal, parse
from .scheduler import Event, Job, Scheduler

MAX_BODY = 16 * 1024 * 1024

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class Gone(Exception):
    """The client went away."""


def refusal_response(refusal: Refusal) -> JSONResponse:
    headers = {"Retry-After": str(refusal.retry_after)} if refusal.retry_after else {}
    if refusal.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(refusal.body(), refusal.status, headers)


class Answer:
    """The bodies of one answer, whole or in chunks."""

    def __init__(self, request: ChatRequest, model: str) -> None:
        self.request, self.model = request, model
        self.id = ("chatcmpl-" if request.chat else "cmpl-") + uuid.uuid4().hex
        self.created = int(time.time())

    def _body(self, kind: str, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices, **more}

    @staticmethod
    def usage(prompt: int, said: int) -> dict[str, int]:
        return {"prompt_tokens": prompt, "completion_tokens": said, "total_tokens": prompt + said}

    def whole(self, text: str, reason: str, prompt: int, said: int) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": reason}
        choice |= {"message": {"role": "assistant", "content": text}} if self.request.chat else {"text": text}
        return self._body("chat.completion" if self.request.chat else "text_completion", [choice], usage=self.usage(prompt, said))

    def chunk(self, text: str | None, reason: str | None = None, *, first: bool = False, usage: dict[str, int] | None = None) -> bytes:
        choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": reason}
        if self.request.chat:
            delta: dict[str, str] = {"role": "assistant"} if first else {}
            choice["delta"] = delta if text is None else delta | {"content": text}
        else:
            choice["text"] = text or ""
        more: dict[str, Any] = {"usage": usage} if self.request.include_usage else {}
        body = self._body("chat.completion.chunk" if self.request.chat else "text_completion", [] if usage else [choice], **more)
        return event(body)


def event(body: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


class Completions:
    def __init__(self, api: Api, chat: bool) -> None:
        self.api, self.chat = api, chat

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        try:
            self.api.authorise(request)
            wanted = parse(await self._body(request), self.api.model, chat=self.chat)
            job = Job(wanted, asyncio.get_running_loop())
            self.api.scheduler.submit(job)
        except Refusal as refusal:
            await refusal_response(refusal)(scope, receive, send)
            return
        except ClientDisconnect:
            return
        watch = asyncio.ensure_future(self._watch(receive, job))
        try:
            kind, value = await self._next(job)
            if kind == "fail":
                await refusal_response(value)(scope, receive, send)
            elif wanted.stream:
                await self._stream(job, value, send)
            else:
                await self._whole(job, value, scope, receive, send)
        except Gone:
            pass
        finally:
            job.cancelled = True  # whatever still runs of it ends with the next step
            watch.cancel()

    @staticmethod
    async def _body(request: Request) -> bytes:
        parts, size = [], 0
        async for part in request.stream():
            size += len(part)
            if size > MAX_BODY:
                raise Refusal(413, f"the body has more than {MAX_BODY} bytes; shorten the messages", code="body_too_large")
            parts.append(part)
        return b"".join(parts)

    @staticmethod
    async def _watch(receive: Receive, job: Job) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        job.events.put_nowait(("gone", None))

    @staticmethod
    async def _next(job: Job) -> Event:
        event = await job.events.get()
        if event[0] == "gone":
            raise Gone
        return event

    async def _whole(self, job: Job, prompt: int, scope: Scope, receive: Receive, send: Send) -> None:
        texts: list[str] = []
        while True:
            kind, value = await self._next(job)
            if kind == "text":
                texts.append(value)
            elif kind == "end":
                body = Answer(job.request, self.api.model).whole("".join(texts), value[0], prompt, value[1])
                await JSONResponse(body)(scope, receive, send)
                return
            else:
                await refusal_response(value)(scope, receive, send)
                return

    async def _stream(self, job: Job, prompt: int, send: Send) -> None:
        answer = Answer(job.request, self.api.model)
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})

        async def put(data: bytes, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": data, "more_body": more})

        if job.request.chat:
            await put(answer.chunk("", first=True))
        while True:
            kind, value = await self._next(job)
            if kind == "text":
                # what came meanwhile goes out together
                held: Event | None = None
                while not job.events.empty() and held is None:
                    other = job.events.get_nowait()
                    if other[0] == "text":
                        value += other[1]
                    else:
                        held = other
                await put(answer.chunk(value))
                if held is None:
                    continue
                kind, value = held
            if kind == "gone":
                raise Gone
            if kind == "end":
                out = answer.chunk(None, value[0])
                if job.request.include_usage:
                    out += answer.chunk(None, usage=answer.usage(prompt, value[1]))
            else:
                out = event(value.body())
            await put(out + b"data: [DONE]\n\n", more=False)
            return


class Api:
    def __init__(self, scheduler: Scheduler, metrics: Metrics, model: str, key: str) -> None:
        self.scheduler, self.metrics, self.model = scheduler, metrics, model
        self._key = key.encode()
        self._created = int(time.time())
        self.app = Starlette(
            routes=[
                Route("/v1/chat/completions", Completions(self, True), methods=["POST"]),
                Route("/v1/completions", Completions(self, False), methods=["POST"]),
                Route("/v1/models", self.models),
                Route("/v1/models/{name:path}", self.models),
                Route("/health", self.health),
                Route("/metrics", self.prometheus),
            ],
            exception_handlers={HTTPException: self.refused, Refusal: self.refused, Exception: self.failed},
        )

    def authorise(self, request: Request) -> None:
        if not self._key:
            return
        scheme, _unused, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode("utf-8", "surrogateescape"), self._key):
            raise Refusal(401, "Incorrect API key provided; send the header Authorization: Bearer KEY", code="invalid_api_key")

    async def models(self, request: Request) -> Response:
        self.authorise(request)
        card = {"id": self.model, "object": "model", "created": self._created, "owned_by": "legacy_chat",
                "max_model_len": self.scheduler.limits.context}
        name = request.path_params.get("name")
        if name is None:
            return JSONResponse({"object": "list", "data": [card]})
        if name != self.model:
            raise Refusal(404, f"The model `{name[:200]}` does not exist; this server serves `{self.model}`", param="model", code="model_not_found")
        return JSONResponse(card)

    async def health(self, _unused: Request) -> Response:
        trouble = self.scheduler.trouble()
        return JSONResponse({"status": trouble or "ok"}, 503 if trouble else 200)

    async def prometheus(self, _unused: Request) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def refused(self, _unused: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException):
            texts = {404: "There is no such path; /v1/chat/completions, /v1/completions and /v1/models are served", 405: "This path takes another method"}
            error = Refusal(error.status_code, texts.get(error.status_code, error.detail), code="unknown_path" if error.status_code == 404 else None)
        assert isinstance(error, Refusal)
        return refusal_response(error)

    async def failed(self, _unused: Request, error: Exception) -> Response:
        return refusal_response(Refusal(500, f"this server failed: {type(error).__name__}", code="internal_error"))
