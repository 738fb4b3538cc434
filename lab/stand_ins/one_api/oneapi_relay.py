# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""/v1/* of the One-API stand-in: tokens, channel choice, quota, and the real passing on of requests.

Written from the recorded contract.
"""

from __future__ import annotations

import errno
import ipaddress
import json
import math
import os
import random
import time
from typing import Any

import aiohttp
from aiohttp import web
from oneapi_db import DatabaseFault, Row, fault_text
from oneapi_http import Answer, App, Context, Route, json_answer
from oneapi_json import GoError, bind, decode, encode
from oneapi_store import model_mapping

BUILT_IN_MODELS = ("gpt-3.5-turbo", "gpt-4", "gpt-4o", "gpt-4o-mini", "text-embedding-ada-002", "text-embedding-3-small", "text-embedding-3-large")
PROXY_TYPE, KNOWN_TYPES = 43, 47
DEFAULT_URLS = {1: "https://api.openai.com", 30: "http://localhost:11434"}
CHECKED_PREFIXES = ("/v1/completions", "/v1/chat/completions", "/v1/images", "/v1/audio")
# What the relay reads of a request, which is refused where a type is another one; the rest is passed on unseen.
TEXT_REQUEST = {
    **dict.fromkeys(("model", "user", "encoding_format", "size", "instruction"), "string"),
    **dict.fromkeys(("max_tokens", "n", "top_k", "dimensions", "num_ctx"), "int"),
    **dict.fromkeys(("max_completion_tokens", "top_logprobs"), "*int"),
    **dict.fromkeys(("temperature", "top_p", "frequency_penalty", "presence_penalty"), "*float64"),
    **dict.fromkeys(("store", "logprobs", "parallel_tool_calls"), "*bool"),
    **dict.fromkeys(("service_tier", "quality", "style"), "*string"),
    "seed": "float64",
    "stream": "bool",
}
REQUEST_ERRORS = (aiohttp.ClientError, OSError, TimeoutError)


class UpstreamFault(Exception):
    def __init__(self, status: int, error: dict[str, Any]) -> None:
        super().__init__(error["message"])
        self.status, self.error = status, error


def own_fault(message: str, code: str, status: int) -> UpstreamFault:
    return UpstreamFault(status, {"message": message, "type": "one_api_error", "param": "", "code": code})


def built_in_model(name: str, custom: bool = False) -> dict[str, Any]:
    permission = {
        "id": "modelperm-LwHkVFn8AcMItP432fKKDIKJ", "object": "model_permission", "created": 1626777600, "allow_create_engine": True,
        "allow_sampling": True, "allow_logprobs": True, "allow_search_indices": False, "allow_view": True, "allow_fine_tuning": False,
        "organization": "*", "group": None, "is_blocking": False,
    }  # fmt: skip
    return {
        "id": name, "object": "model", "created": 1626777600, "owned_by": "custom" if custom else "openai",
        "permission": None if custom else [permission], "root": name, "parent": None,
    }  # fmt: skip


def abort(ctx: Context, status: int, message: str) -> Answer:
    ctx.app.log("ERR", message)
    return Answer(json_answer({"error": {"message": f"{message} (request id: {ctx.request_id})", "type": "one_api_error"}}, status))


# -- who may ask for what ------------------------------------------------------------------------------------------------


def check_token(ctx: Context) -> None:
    header = ctx.request.headers.get("Authorization", "").removeprefix("Bearer ").removeprefix("sk-")
    parts = header.split("-")
    if not parts[0]:
        raise abort(ctx, 401, "未提供令牌")
    key = parts[0]
    try:
        row = ctx.store.copies.get(f"token:{key}", lambda: ctx.store.row("SELECT * FROM tokens WHERE `key` = ?", key))
    except DatabaseFault as exc:
        ctx.app.log("ERR", fault_text(exc))
        raise abort(ctx, 401, "令牌验证失败") from exc
    if row is None:
        raise abort(ctx, 401, "无效的令牌")
    fault = token_fault(ctx, row)
    if fault:
        raise abort(ctx, 401, fault)
    if row["subnet"] and not in_subnets(ctx.client_ip, row["subnet"]):
        raise abort(ctx, 403, f"该令牌只能在指定网段使用：{row['subnet']}，当前 ip：{ctx.client_ip}")
    try:
        user = user_of(ctx, row["user_id"])
    except DatabaseFault as exc:
        raise abort(ctx, 500, fault_text(exc)) from exc
    if not user or user["status"] != 1 or row["user_id"] in ctx.store.banned:
        raise abort(ctx, 403, "用户已被封禁")
    ctx.model = request_model(ctx)
    if row["models"] and ctx.model and ctx.model not in row["models"].split(","):
        raise abort(ctx, 403, f"该令牌无权使用模型：{ctx.model}")
    if len(parts) > 1:
        if (ctx.store.row("SELECT role FROM users WHERE id = ?", row["user_id"]) or {"role": 0})["role"] < 10:
            raise abort(ctx, 403, "普通用户不支持指定渠道")
        ctx.pinned_channel = parts[1]
    if "channelid" in ctx.params:
        ctx.pinned_channel = ctx.params["channelid"]
    ctx.token, ctx.user_id, ctx.group = dict(row), row["user_id"], user["group"]


def user_of(ctx: Context, user_id: int) -> dict[str, Any]:
    """Whether enabled, and the group: each a copy of its own in Redis. The role is always asked of the database."""
    def read(name: str) -> Any:
        found = ctx.store.row("SELECT * FROM users WHERE id = ?", user_id)
        return found[name] if found else 0

    user = {name: ctx.store.copies.get(f"{key}:{user_id}", lambda name=name: read(name)) for name, key in (("status", "user_enabled"), ("group", "user_group"))}
    return user if user["group"] else {}


def token_fault(ctx: Context, row: Row) -> str:
    if row["status"] == 4:
        return f"令牌 {row['name']}（#{row['id']}）额度已用尽"
    if row["status"] == 3:
        return "该令牌已过期"
    if row["status"] != 1:
        return "该令牌状态不可用"
    if row["expired_time"] != -1 and row["expired_time"] < int(time.time()):
        if ctx.store.copies.link is None:
            ctx.store.update("tokens", row["id"], {"status": 3})
        return "该令牌已过期"
    if not row["unlimited_quota"] and row["remain_quota"] <= 0:
        if ctx.store.copies.link is None:
            ctx.store.update("tokens", row["id"], {"status": 4})
        return "该令牌额度已用尽"
    return ""


def in_subnets(address: str, subnets: str) -> bool:
    try:
        ip = ipaddress.ip_address(address)
        return any(ip in ipaddress.ip_network(part.strip(), strict=False) for part in subnets.split(","))
    except ValueError:
        return False


def request_model(ctx: Context) -> str:
    """Only a JSON content type is read as JSON; a broken body counts only on some paths."""
    if not ctx.request.headers.get("Content-Type", "").startswith("application/json"):
        return ""
    try:
        value = decode(ctx.body, whole=True)
        model = value.get("model") if isinstance(value, dict) else ""
        if model is not None and not isinstance(model, str):
            raise GoError("json: cannot unmarshal number into Go struct field ModelRequest.model of type string")
        return model or ""
    except GoError as exc:
        if ctx.request.path.startswith(CHECKED_PREFIXES):
            raise abort(ctx, 400, f"common.UnmarshalBodyReusable failed: {exc}") from exc
        return ""


# -- which channel -------------------------------------------------------------------------------------------------------


def refresh_cache(app: App) -> None:
    """MEMORY_CACHE_ENABLED, or Redis: routing follows this copy, so a new channel is used only after the next sync.

    A database that does not answer empties it, as it does the real one: until the next sync no model has a channel.
    """
    cache: dict[tuple[str, str], list[dict[str, Any]]] = {}
    found: list[Row] = []
    try:
        found = app.store.rows("SELECT * FROM channels WHERE status = 1")
    except DatabaseFault as exc:
        app.log("ERR", fault_text(exc))
    for row in found:
        for group in row["group"].split(","):
            for model in row["models"].split(","):
                cache.setdefault((group, model), []).append(dict(row))
    for channels in cache.values():
        channels.sort(key=lambda channel: -(channel["priority"] or 0))
    app.cache = cache


def pick_cached(channels: list[dict[str, Any]], lower: bool) -> dict[str, Any]:
    top = channels[0]["priority"] or 0
    first = [c for c in channels if (c["priority"] or 0) == top] if top > 0 else channels
    rest = channels[len(first) :]
    return random.choice(rest if lower and rest else first)


def choose(ctx: Context, any_priority: bool = False) -> tuple[int, dict[str, Any] | None]:
    if ctx.app.cache is not None:
        channels = ctx.app.cache.get((ctx.group, ctx.model), [])
        channel = pick_cached(channels, any_priority) if channels else None
        return (channel["id"], channel) if channel else (0, None)
    try:
        return ctx.store.pick_channel(ctx.group, ctx.model, any_priority)
    except DatabaseFault as exc:
        ctx.app.log("ERR", fault_text(exc))
        return 0, None


def first_channel(ctx: Context) -> dict[str, Any]:
    if ctx.pinned_channel is not None:
        row = ctx.store.row("SELECT * FROM channels WHERE id = ?", int(ctx.pinned_channel)) if ctx.pinned_channel.isdigit() else None
        if row is None:
            raise abort(ctx, 400, "无效的渠道 Id")
        if row["status"] != 1:
            raise abort(ctx, 403, "该渠道已被禁用")
        return dict(row)
    found, channel = choose(ctx)
    if channel is None:
        text = "数据库一致性已被破坏，请联系管理员" if found else f"当前分组 {ctx.group} 下对于模型 {ctx.model} 无可用渠道"
        raise abort(ctx, 503, text)
    return channel


# -- passing on ----------------------------------------------------------------------------------------------------------


def base_url(channel: dict[str, Any]) -> str:
    url: str = channel["base_url"] or ""
    if not url and not 0 <= channel["type"] < KNOWN_TYPES:
        raise IndexError(f"runtime error: index out of range [{channel['type']}] with length {KNOWN_TYPES}")
    return url or DEFAULT_URLS.get(channel["type"], "")


def tokens_of(text: str) -> int:
    return len(text) // 4 + 1


def connect_text(method: str, url: str, exc: BaseException) -> str:
    if isinstance(exc, aiohttp.ClientConnectorDNSError):
        text = f"dial tcp: lookup {exc.host}: no such host"
    elif isinstance(exc, aiohttp.ClientConnectorError):
        text = f"dial tcp {exc.host}:{exc.port}: connect: {os.strerror(exc.os_error.errno or errno.ECONNREFUSED).lower()}"
    elif isinstance(exc, TimeoutError):
        text = "dial tcp: i/o timeout"
    elif isinstance(exc, aiohttp.InvalidURL):
        text = "unsupported protocol scheme" + ' ""'
    else:
        text = "EOF"
    return f'do request failed: {method.capitalize()} "{url}": {text}'


async def send(ctx_app: App, method: str, url: str, headers: dict[str, str], body: bytes) -> aiohttp.ClientResponse:
    assert ctx_app.http is not None
    try:
        return await ctx_app.http.request(method, url, data=body, headers=headers, allow_redirects=method == "GET")
    except REQUEST_ERRORS as exc:
        raise own_fault(connect_text(method, url, exc), "do_request_failed", 500) from exc


async def upstream_fault(response: aiohttp.ClientResponse) -> UpstreamFault:
    """OpenAI-shaped errors pass through; others get their message from the usual fields; no JSON means no message."""
    error = {"message": "", "type": "upstream_error", "param": str(response.status), "code": "bad_response_status_code"}
    try:
        value = decode(await response.read(), whole=True)
    except (GoError, *REQUEST_ERRORS):
        return UpstreamFault(response.status, error)
    value = value if isinstance(value, dict) else {}
    inner = value.get("error")
    strings = [value.get(name) for name in ("message", "msg", "err", "error_msg")]
    if (inner is not None and not isinstance(inner, dict)) or any(item is not None and not isinstance(item, str) for item in strings):
        return UpstreamFault(response.status, error)  # a field of another type than expected: the decoder gives up
    if inner and inner.get("message"):
        error = {name: inner.get(name) or "" for name in ("message", "type", "param")}
        error["code"] = inner.get("code")  # type: ignore[assignment]
    else:
        error["message"] = next((item for item in strings if item), f"bad response status code {response.status}")
    return UpstreamFault(response.status, error)


def copy_headers(source: aiohttp.ClientResponse) -> dict[str, str]:
    hop = {"connection", "transfer-encoding", "content-encoding", "content-length", "keep-alive"}
    return {name: source.headers[name] for name in source.headers if name.lower() not in hop}


async def relay_text(ctx: Context, channel: dict[str, Any]) -> web.StreamResponse:
    raw = ctx.body
    try:
        value = decode(raw, whole=True) if raw else {}
        if bind(value, TEXT_REQUEST, "GeneralOpenAIRequest")["max_tokens"] not in range(2**30):  # half of what an int32 holds
            raise GoError("max_tokens is invalid")
    except GoError as exc:
        raise own_fault(str(exc), "invalid_text_request", 400) from exc
    if not ctx.model:
        raise own_fault("model is required", "invalid_text_request", 400)
    is_chat = ctx.request.path.endswith("/chat/completions")
    if is_chat and not value.get("messages"):
        raise own_fault("field messages is required", "invalid_text_request", 400)
    mapped = model_mapping(channel["model_mapping"]).get(ctx.model) or ctx.model
    if mapped != ctx.model:  # only then the body is written anew
        value["model"] = mapped
        if channel["system_prompt"] and value.get("messages"):
            rest = value["messages"][1:] if value["messages"][0].get("role") == "system" else value["messages"]
            value["messages"] = [{"role": "system", "content": channel["system_prompt"]}, *rest]
        if value.get("stream"):
            value["stream_options"] = {"include_usage": True}
        raw = encode(value)
    stream = bool(value.get("stream"))
    ratio = ctx.store.ratio(mapped, channel["type"]) * ctx.store.group_ratio.get(ctx.group, 1)
    prompt = tokens_of(json.dumps(value.get("messages", ""), ensure_ascii=False)) if is_chat else 0
    check_quota(ctx, prompt, value.get("max_tokens") or 0, ratio)

    url = base_url(channel) + ctx.request.path_qs
    headers = {"Content-Type": ctx.request.headers.get("Content-Type", ""), "Authorization": f"Bearer {channel['key']}"}
    accept = ctx.request.headers.get("Accept", "")
    headers["Accept"] = accept or ("text/event-stream" if stream else "")
    async with await send(ctx.app, ctx.request.method, url, headers, raw) as response:
        kind = response.headers.get("Content-Type", "")
        if response.status not in (200, 201) or (stream and kind.startswith("application/json")):
            raise await upstream_fault(response)
        if stream:
            return await relay_stream(ctx, response, is_chat, channel, prompt, ratio)
        body = await response.read()
        try:
            answer = decode(body, whole=True)
        except GoError as exc:
            raise own_fault(str(exc), "unmarshal_response_body_failed", 500) from exc
        answer = answer if isinstance(answer, dict) else {}
        error = answer.get("error")
        if isinstance(error, dict) and error.get("type"):
            raise UpstreamFault(response.status, {name: error.get(name) or "" for name in ("message", "type", "param", "code")})
        usage = answer.get("usage") or {}
        charge(ctx, channel, usage.get("prompt_tokens") or prompt, usage.get("completion_tokens") or 0, ratio)
        return web.Response(body=body, status=response.status, headers=copy_headers(response))


async def relay_stream(
    ctx: Context, source: aiohttp.ClientResponse, is_chat: bool, channel: dict[str, Any], prompt: int, ratio: float
) -> web.StreamResponse:
    """Only lines that begin with "data: " go through; a missing [DONE] is added."""
    response = web.StreamResponse(
        headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache", "X-Accel-Buffering": "no", "X-Oneapi-Request-Id": ctx.request_id}
    )
    await response.prepare(ctx.request)
    done, text = False, ""
    usage: dict[str, Any] = {}
    try:
        async for line in source.content:
            data = line.decode("utf-8", "replace").rstrip("\r\n")
            if not data.startswith("data: "):
                continue
            payload = data[6:]
            if payload.startswith("[DONE]"):
                done = True
            elif is_chat:
                try:
                    chunk = json.loads(payload)
                    if not chunk.get("choices") and not chunk.get("usage"):
                        continue
                    usage = chunk.get("usage") or usage
                    text += "".join((choice.get("delta") or {}).get("content") or "" for choice in chunk.get("choices") or [])
                except (ValueError, AttributeError):
                    pass  # what is not JSON is passed on as it is
            await response.write(f"data: {payload}\n\n".encode())
    except REQUEST_ERRORS as exc:
        ctx.app.log("SYS", f"error reading stream: {exc}")
    if not done:
        await response.write(b"data: [DONE]\n\n")
    charge(ctx, channel, usage.get("prompt_tokens") or prompt, usage.get("completion_tokens") or tokens_of(text), ratio)
    await response.write_eof()
    return response


async def relay_proxy(ctx: Context, channel: dict[str, Any]) -> web.StreamResponse:
    """Type 43: everything but the credential is passed on; the key goes out as it is stored, without "Bearer"."""
    path = ctx.request.path_qs
    if channel["type"] == PROXY_TYPE:
        path = path.removeprefix(f"/v1/oneapi/proxy/{channel['id']}")
    dropped = {"host", "content-length", "accept-encoding", "connection", "authorization"}
    headers = {name: value for name, value in ctx.request.headers.items() if name.lower() not in dropped}
    headers["Authorization"] = channel["key"] if channel["type"] == PROXY_TYPE else f"Bearer {channel['key']}"
    async with await send(ctx.app, ctx.request.method, base_url(channel) + path, headers, ctx.body) as response:
        return web.Response(body=await response.read(), status=response.status, headers=copy_headers(response))


# -- quota ---------------------------------------------------------------------------------------------------------------


def check_quota(ctx: Context, prompt: int, max_tokens: int, ratio: float) -> None:
    needed = int((ctx.store.number("PreConsumedQuota") + prompt + max_tokens) * ratio)
    try:
        quota = ctx.store.copies.get(f"user_quota:{ctx.user_id}", lambda: ctx.store.user_by_id(ctx.user_id)["quota"])
    except DatabaseFault as exc:
        raise own_fault(fault_text(exc), "get_user_quota_failed", 500) from exc
    if quota - needed < 0:
        raise own_fault("user quota is not enough", "insufficient_user_quota", 403)
    if quota <= 100 * needed and not ctx.token["unlimited_quota"] and ctx.token["remain_quota"] < needed:
        raise own_fault("令牌额度不足", "pre_consume_token_quota_failed", 403)


def charge(ctx: Context, channel: dict[str, Any], prompt: int, completion: int, ratio: float) -> None:
    completion_ratio = ctx.store.completion_ratio.get(ctx.model, 1)
    cost = math.ceil((prompt + completion * completion_ratio) * ratio)
    if ratio and cost <= 0:
        cost = 1
    try:
        ctx.store.execute(
            "UPDATE users SET quota = quota - ?, used_quota = used_quota + ?, request_count = request_count + 1 WHERE id = ?",
            cost, cost, ctx.user_id,
        )  # fmt: skip
        ctx.store.execute("UPDATE channels SET used_quota = used_quota + ? WHERE id = ?", cost, channel["id"])
        if not ctx.token["unlimited_quota"]:
            ctx.store.execute(
                "UPDATE tokens SET remain_quota = remain_quota - ?, used_quota = used_quota + ?, accessed_time = ? WHERE id = ?",
                cost, cost, int(time.time()), ctx.token["id"],
            )  # fmt: skip
        if ctx.store.copies.link is not None:
            ctx.store.copies.put(f"user_quota:{ctx.user_id}", ctx.store.user_by_id(ctx.user_id)["quota"])
    except DatabaseFault as exc:
        ctx.app.log("ERR", f"error consuming token remain quota: {fault_text(exc)}")  # the answer goes out all the same


# -- handlers ------------------------------------------------------------------------------------------------------------


async def relay(ctx: Context) -> web.StreamResponse:
    check_token(ctx)
    channel = first_channel(ctx)
    work = relay_proxy if "/oneapi/proxy/" in ctx.request.path else relay_text
    retries = ctx.store.number("RetryTimes")
    last = channel["id"]
    try:
        try:
            return await work(ctx, channel)
        except UpstreamFault as exc:
            fault = exc
        note_fault(ctx, last, fault)
        if ctx.pinned_channel is not None or fault.status == 400 or fault.status // 100 == 2:
            retries = 0
        for left in range(retries, 0, -1):
            _found, again = choose(ctx, any_priority=left != retries)
            if again is None:
                break
            if again["id"] == last:
                continue  # a drawn failure wastes the try
            last = again["id"]
            try:
                return await work(ctx, again)
            except UpstreamFault as exc:
                fault = exc
                note_fault(ctx, last, fault)
    except IndexError as exc:
        text = f"Panic detected, error: {exc}. Please submit an issue with the related log here: https://github.com/songquanpeng/one-api"
        return json_answer({"error": {"message": text, "type": "one_api_panic"}}, 500)
    error = dict(fault.error)
    if fault.status == 429:
        error["message"] = "当前分组上游负载已饱和，请稍后再试"
    error["message"] = f"{error['message']} (request id: {ctx.request_id})"
    return json_answer({"error": error}, fault.status)


def note_fault(ctx: Context, channel_id: int, fault: UpstreamFault) -> None:
    """Log it, and switch the channel off where the option says so."""
    ctx.app.log("ERR", f"relay error (channel id {channel_id}, user id: {ctx.user_id}): {fault.error['message']}")
    if not ctx.store.enabled("AutomaticDisableChannelEnabled"):
        return
    kinds = ("insufficient_quota", "authentication_error", "permission_error", "forbidden")
    if fault.status == 401 or fault.error["type"] in kinds or fault.error["code"] in ("invalid_api_key", "account_deactivated"):
        ctx.store.update("channels", channel_id, {"status": 3})
        ctx.store.execute("UPDATE abilities SET enabled = ? WHERE channel_id = ?", False, channel_id)


def copied_models(ctx: Context) -> list[str]:
    names: list[str] = ctx.store.copies.get(f"group_models:{ctx.group}", lambda: ctx.store.group_models(ctx.group))
    return names


async def models(ctx: Context) -> web.Response:
    check_token(ctx)
    names = ctx.token["models"].split(",") if ctx.token["models"] else copied_models(ctx)
    names = list(dict.fromkeys(names))
    custom = [name for name in names if name not in BUILT_IN_MODELS]
    random.shuffle(custom)
    data = [built_in_model(name) for name in BUILT_IN_MODELS if name in names] + [built_in_model(name, custom=True) for name in custom]
    return json_answer({"object": "list", "data": data})


async def one_model(ctx: Context) -> web.Response:
    check_token(ctx)
    name = ctx.params["model"]
    if name in BUILT_IN_MODELS:
        return json_answer(built_in_model(name), is_map=False)
    error = {"message": f"The model '{name}' does not exist", "type": "invalid_request_error", "param": "model", "code": "model_not_found"}
    return json_answer({"error": error})


async def not_implemented(ctx: Context) -> web.Response:
    check_token(ctx)
    first_channel(ctx)
    return json_answer({"error": {"message": "API not implemented", "type": "one_api_error", "param": "", "code": "api_not_implemented"}}, 501)


async def subscription(ctx: Context) -> web.Response:
    check_token(ctx)
    limit = 100000000.0 if ctx.token["unlimited_quota"] else ctx.token["remain_quota"] / 500000
    value = {
        "object": "billing_subscription", "has_payment_method": True, "soft_limit_usd": limit, "hard_limit_usd": limit,
        "system_hard_limit_usd": limit, "access_until": 0,
    }  # fmt: skip
    return json_answer(value, is_map=False)


async def usage(ctx: Context) -> web.Response:
    check_token(ctx)
    return json_answer({"object": "list", "total_usage": ctx.token["used_quota"] / 5000}, is_map=False)


async def test_channel(app: App, channel: dict[str, Any], model: str) -> str:
    """One real question to this very channel; "" or the fault."""
    names = channel["models"].split(",")
    chosen = model if model in channel["models"] else names[0]
    chosen = model_mapping(channel["model_mapping"]).get(chosen) or chosen
    body = encode({"messages": [{"role": "user", "content": "hi"}], "model": chosen, "max_tokens": 2})
    headers = {"Content-Type": "application/json", "Accept": "", "Authorization": f"Bearer {channel['key']}"}
    try:
        async with await send(app, "POST", base_url(channel) + "/v1/chat/completions", headers, body) as response:
            if response.status != 200:
                fault = await upstream_fault(response)
                return f"status code {response.status}: {fault.error['message']}"
            try:
                answer = decode(await response.read(), whole=True)
            except GoError as exc:
                return str(exc)
            error = answer.get("error") if isinstance(answer, dict) else None
            return str(error.get("message")) if isinstance(error, dict) and error.get("type") else ""
    except UpstreamFault as fault:
        return str(fault.error["message"])
    except IndexError as exc:
        return str(exc)


def routes() -> list[Route]:
    texts = ("completions", "chat/completions", "edits", "images/generations", "embeddings", "moderations", "audio/transcriptions",
             "audio/translations", "audio/speech")  # fmt: skip
    missing = [("POST", "images/edits"), ("POST", "images/variations"), ("DELETE", "models/:model")]
    missing += [(method, "files") for method in ("GET", "POST")] + [(method, "files/:id") for method in ("GET", "DELETE")]
    missing += [(method, path) for path in ("fine_tuning/jobs", "assistants") for method in ("GET", "POST")] + [("POST", "threads")]
    table = [Route("POST", f"/v1/{path}", relay, relay=True) for path in texts]
    table += [Route(method, f"/v1/{path}", not_implemented, relay=True) for method, path in missing]
    return [
        *table,
        Route("POST", "/v1/engines/:model/embeddings", relay, relay=True),
        Route("ANY", "/v1/oneapi/proxy/:channelid/*target", relay, relay=True),
        Route("GET", "/v1/models", models, relay=True),
        Route("GET", "/v1/models/:model", one_model, relay=True),
        Route("GET", "/dashboard/billing/subscription", subscription, relay=True),
        Route("GET", "/v1/dashboard/billing/subscription", subscription, relay=True),
        Route("GET", "/dashboard/billing/usage", usage, relay=True),
        Route("GET", "/v1/dashboard/billing/usage", usage, relay=True),
    ]
