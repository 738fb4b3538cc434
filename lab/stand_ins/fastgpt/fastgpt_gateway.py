# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the FastGPT stand-in asks of others: embeddings and chat from the gateway, ranks from the reranker.

Written from the recorded contract: bodies and headers as they were seen on the wire, errors as the OpenAI SDK words them,
two retries as it makes them, and a failing reranker that nobody hears of.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
from fastgpt_rules import Rules, pad_vector

RETRIES = 2
RETRY_STATUS = (408, 409, 429)


class GatewayError(Exception):
    """`plain` is what a normal answer tells, `streamed` what goes into a stream."""

    def __init__(self, plain: str, streamed: str | None = None) -> None:
        super().__init__(plain)
        self.plain, self.streamed = plain, streamed or plain


def sdk_error(status: int, body: bytes) -> GatewayError:
    try:
        value = json.loads(body)
    except ValueError:
        text = body.decode("utf-8", "replace").strip()
        return GatewayError(f"{status} {text or 'status code (no body)'}")
    error = value.get("error") if isinstance(value, dict) else None
    if isinstance(error, dict) and error.get("message"):
        code = "undefined" if "code" not in error else "null" if error["code"] is None else error["code"]
        return GatewayError(str(error["message"]), f"{code} {error['message']}")
    if error:
        return GatewayError(f"{status} {error if isinstance(error, str) else json.dumps(error)}")
    return GatewayError(f"{status} status code (no body)")


class Gateway:
    def __init__(self, rules: Rules, http: aiohttp.ClientSession) -> None:
        self.rules, self.http = rules, http
        self.system_env: dict[str, Any] = {}

    @property
    def base(self) -> str:
        env = os.environ
        own = self.system_env.get("oneapiUrl") if self.rules.workflow else None
        return str(own or env.get("ONEAPI_URL") or env.get("OPENAI_BASE_URL") or "https://api.openai.com/v1").rstrip("/")

    @property
    def headers(self) -> dict[str, str]:
        own = self.system_env.get("chatApiKey") if self.rules.workflow else None
        return {"Authorization": f"Bearer {own or os.environ.get('CHAT_API_KEY', '')}", "Accept": "application/json, text/plain, */*"}

    async def _post(self, path: str, body: dict[str, Any], timeout: float) -> aiohttp.ClientResponse:
        for left in range(RETRIES, -1, -1):
            try:
                response = await self.http.post(
                    self.base + path, json=body, headers=self.headers, timeout=aiohttp.ClientTimeout(total=timeout, sock_connect=30)
                )
            except TimeoutError as exc:
                if not left:
                    raise GatewayError("Request timed out.") from exc
            except (aiohttp.ClientError, OSError) as exc:
                if not left:
                    raise GatewayError("Connection error.") from exc
            else:
                if response.status < 300:
                    return response
                fault = sdk_error(response.status, await response.read())
                if not left or (response.status < 500 and response.status not in RETRY_STATUS):
                    raise fault
            await asyncio.sleep(0.5 * 2 ** (RETRIES - left))
        raise AssertionError("unreachable")

    async def embed(self, model: dict[str, Any] | None, text: str, purpose: str = "") -> list[float]:
        """One text per request, as a list of one; the answer is cut or padded with zeros to 1536."""
        if not text:
            raise GatewayError("input is empty")
        if model is None:
            raise GatewayError("Cannot read properties of undefined (reading 'defaultConfig')")
        extra = model.get(f"{purpose}Config") or {} if purpose and self.rules.new_rerank else {}
        body = {**(model.get("defaultConfig") or {}), **extra, "model": model.get("model"), "input": [text]}
        response = await self._post("/embeddings", body, 600)
        try:
            value = json.loads(await response.read())
            vector = value["data"][0]["embedding"]
        except (ValueError, LookupError, TypeError) as exc:
            raise GatewayError("Embedding API Error") from exc
        if not isinstance(vector, list):
            raise GatewayError("Embedding API Error")
        return pad_vector([float(number) for number in vector])

    def chat_body(self, model: dict[str, Any], params: dict[str, Any], messages: list[dict[str, Any]], max_tokens: int, stream: bool) -> dict[str, Any]:
        penalties = {} if self.rules.workflow else {"presence_penalty": 0, "frequency_penalty": 0}
        top = model.get("maxTemperature")
        temperature = None if not isinstance(top, (int, float)) else max(round(top * ((params.get("temperature") or 0) / 10), 2), 0.01)
        return {
            **penalties, **(model.get("defaultConfig") or {}), "model": model.get("model"), "temperature": temperature,
            "max_tokens": max_tokens, "stream": stream, "messages": messages,
        }  # fmt: skip

    async def chat(self, body: dict[str, Any]) -> str:
        response = await self._post("/chat/completions", body, 480)
        try:
            value = json.loads(await response.read())
            return str(value["choices"][0]["message"]["content"] or "")
        except (ValueError, LookupError, TypeError):
            return ""

    async def chat_stream(self, body: dict[str, Any]) -> AsyncIterator[str]:
        response = await self._post("/chat/completions", body, 480)
        async with response:
            async for raw in response.content:
                line = raw.decode("utf-8", "replace").strip()
                if not line.startswith("data:"):
                    continue
                data = line[5:].strip()
                if data == "[DONE]":
                    return
                try:
                    chunk = json.loads(data)
                except ValueError as exc:
                    raise GatewayError(f"Could not parse message into JSON: {data}") from exc
                if isinstance(chunk, dict) and chunk.get("error"):
                    raise sdk_error(500, data.encode())
                choices = chunk.get("choices") or [{}]
                yield (choices[0].get("delta") or {}).get("content") or ""

    async def rerank(self, model: dict[str, Any] | None, query: str, documents: list[tuple[str, str]]) -> list[tuple[str, float]]:
        """(id, score) in the answer's order. Any failure is only logged and gives an empty list."""
        if not model or not model.get("requestUrl"):
            raise GatewayError("no rerank model")
        if self.rules.new_rerank:
            body: dict[str, Any] = {"model": model.get("model"), "query": query, "documents": [text for _id, text in documents]}
        else:
            body = {"query": query, "inputs": [{"id": key, "text": text} for key, text in documents]}
        timeout = aiohttp.ClientTimeout(total=30 if self.rules.new_rerank else 120)
        try:
            headers = {"Authorization": f"Bearer {model.get('requestAuth')}"}
            async with self.http.post(str(model["requestUrl"]), json=body, headers=headers, timeout=timeout) as response:
                text = await response.read()
                if response.status >= 300:
                    raise ValueError(f"Request failed with status code {response.status}")
                value = json.loads(text)
            if self.rules.new_rerank:
                return [(documents[item["index"]][0], item["relevance_score"] or 0) for item in value["results"]]
            if value.get("code") and not 200 <= value["code"] < 400:
                raise ValueError(str(value))
            return [(item["id"], item.get("score") or 0) for item in value["data"]]
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError, LookupError, TypeError) as exc:
            print(f"rerank error {type(exc).__name__}: {exc}", flush=True)
            return []
