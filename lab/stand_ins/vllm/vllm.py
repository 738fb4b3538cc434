# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A stand-in for vLLM's OpenAI server: its command line, its refusals at start, its routes and its half-guarded keys. It computes nothing.

Like vLLM it ends on an unknown flag, without a GPU, with fewer GPUs than the tensor-parallel size, on a model directory without config.json, on
remote code that was not allowed, and on an architecture that its version has dropped.
"""

from __future__ import annotations

import argparse
import asyncio
import glob
import json
import os
import sys
import time
import uuid
from pathlib import Path
from typing import Any

from aiohttp import web

VERSION = os.environ.get("VLLM_VERSION", "v0.33.0")
# As vLLM does: what does not begin so answers without a key.
GUARDED = ("/v1", "/v2", "/inference", "/cohere")
SENTENCE = ["I", "am", "the", "stand-in", "of", "a", "GPU", "engine", ":", "I", "compute", "nothing", ",", "but", "I", "answer", "as", "it", "would", "."]
LAST_BAICHUAN = (0, 23, 0)


def arguments(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="vllm serve", allow_abbrev=False)
    parser.add_argument("model_tag")
    parser.add_argument("--host", default="0.0.0.0")  # noqa: S104 - the real default
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--served-model-name", nargs="+")
    parser.add_argument("--max-model-len", type=int, default=4096)
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.9)
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--dtype", choices=["auto", "half", "float16", "bfloat16", "float", "float32"], default="auto")
    parser.add_argument("--quantization", choices=["awq", "gptq", "bitsandbytes", "compressed-tensors", "fp8"])
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--chat-template")
    parser.add_argument("--trust-remote-code", action="store_true")
    parser.add_argument("--api-key", nargs="+")
    parser.add_argument("--enforce-eager", action="store_true")
    return parser.parse_args(words)


def refuse(message: str) -> None:
    print(f"ERROR {message}", file=sys.stderr, flush=True)
    raise SystemExit(1)


def check(given: argparse.Namespace) -> None:
    config = Path(given.model_tag) / "config.json"
    if not config.is_file():
        refuse(f"OSError: {given.model_tag} does not appear to have a file named config.json.")
    model = json.loads(config.read_text(encoding="utf-8"))
    gpus = glob.glob("/dev/nvidia[0-9]*")
    if not gpus:
        refuse("RuntimeError: Failed to infer device type: no GPU is visible")
    if len(gpus) < given.tensor_parallel_size:
        refuse(f"ValueError: World size ({given.tensor_parallel_size}) is larger than the number of available GPUs ({len(gpus)}) in this node.")
    if not 0 < given.gpu_memory_utilization <= 1:
        refuse("ValueError: GPU memory utilization must be greater than 0 and not more than 1.")
    if model.get("auto_map") and not given.trust_remote_code:
        refuse("ValueError: The repository contains custom code which must be executed: pass --trust-remote-code.")
    version = tuple(int(part) for part in VERSION.lstrip("v").split(".")[:3])
    if any("Baichuan" in name for name in model.get("architectures", [])) and version > LAST_BAICHUAN:
        refuse("ValueError: Model architectures ['BaichuanForCausalLM'] are not supported any more; 0.23.0 was the last.")
    if given.chat_template and not Path(given.chat_template).is_file():
        refuse(f"ValueError: The supplied chat template ({given.chat_template}) was a path, but it does not exist.")


def error(status: int, message: str, kind: str = "BadRequestError") -> web.Response:
    return web.json_response({"error": {"message": message, "type": kind, "param": None, "code": status}}, status=status)


class Server:
    def __init__(self, given: argparse.Namespace) -> None:
        self.given = given
        self.names = given.served_model_name or [given.model_tag]
        self.keys = given.api_key or ([os.environ["VLLM_API_KEY"]] if os.environ.get("VLLM_API_KEY") else [])
        self.running = 0

    @web.middleware
    async def guard(self, request: web.Request, handler: Any) -> web.StreamResponse:
        if self.keys and request.path.startswith(GUARDED) and request.headers.get("Authorization") not in [f"Bearer {key}" for key in self.keys]:
            return web.json_response({"error": "Unauthorized"}, status=401)
        answer: web.StreamResponse = await handler(request)
        return answer

    async def health(self, _request: web.Request) -> web.Response:
        return web.Response()

    async def metrics(self, _request: web.Request) -> web.Response:
        return web.Response(text=f'vllm:num_requests_running{{model_name="{self.names[0]}"}} {self.running}\n')

    async def models(self, _request: web.Request) -> web.Response:
        entry = {"object": "model", "created": int(time.time()), "owned_by": "vllm", "max_model_len": self.given.max_model_len}
        return web.json_response({"object": "list", "data": [{"id": name, **entry} for name in self.names]})

    async def chat(self, request: web.Request) -> web.StreamResponse:
        try:
            body = await request.json()
        except ValueError:
            return error(400, "Invalid JSON")
        if body.get("model", self.names[0]) not in self.names:
            return error(404, f"The model `{body.get('model')}` does not exist.", "NotFoundError")
        if not isinstance(body.get("messages"), list) or not body["messages"]:
            return error(400, "messages: at least one message is needed")
        prompt = max(1, len(json.dumps(body["messages"], ensure_ascii=False)) // 4)
        room = self.given.max_model_len - prompt
        wanted = body.get("max_completion_tokens") or body.get("max_tokens") or room
        if prompt + wanted > self.given.max_model_len:
            return error(400, f"This model's maximum context length is {self.given.max_model_len} tokens. However, you requested {prompt + wanted} tokens.")
        words = SENTENCE[:wanted]
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": body.get("model", self.names[0])}
        finish = "stop" if len(words) == len(SENTENCE) else "length"
        usage = {"prompt_tokens": prompt, "completion_tokens": len(words), "total_tokens": prompt + len(words)}
        self.running += 1
        try:
            if not body.get("stream"):
                message = {"role": "assistant", "content": " ".join(words), "tool_calls": []}
                choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish}
                return web.json_response({**head, "object": "chat.completion", "choices": [choice], "usage": usage})
            return await self.stream(request, body, head, words, finish, usage)
        finally:
            self.running -= 1

    async def stream(self, request: web.Request, body: Any, head: Any, words: list[str], finish: str, usage: Any) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        deltas: list[tuple[Any, str | None]] = [({"role": "assistant", "content": ""}, None)]
        deltas += [({"content": word if index == 0 else f" {word}"}, None) for index, word in enumerate(words)] + [({"content": ""}, finish)]
        for delta, reason in deltas:
            choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
            await response.write(b"data: " + json.dumps({**head, "object": "chat.completion.chunk", "choices": [choice]}).encode() + b"\n\n")
            await asyncio.sleep(0.01)
        if (body.get("stream_options") or {}).get("include_usage"):
            await response.write(b"data: " + json.dumps({**head, "object": "chat.completion.chunk", "choices": [], "usage": usage}).encode() + b"\n\n")
        await response.write(b"data: [DONE]\n\n")
        return response


def main() -> None:
    words = sys.argv[1:]
    if words[:1] == ["serve"]:
        words = words[1:]
    given = arguments(words)
    check(given)
    # the real one loads weights for minutes; long enough here that a healthcheck without a start period would fail
    time.sleep(3)
    server = Server(given)
    app = web.Application(middlewares=[server.guard])
    for method, path, handler in (
        ("GET", "/health", server.health),
        ("GET", "/metrics", server.metrics),
        ("GET", "/v1/models", server.models),
        ("POST", "/v1/chat/completions", server.chat),
    ):
        app.router.add_route(method, path, handler)
    web.run_app(app, host=given.host, port=given.port, print=None)


if __name__ == "__main__":
    main()
