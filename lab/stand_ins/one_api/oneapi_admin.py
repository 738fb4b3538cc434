# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""/api/* of the One-API stand-in: status, users, tokens, channels, options. Written from the recorded contract."""

from __future__ import annotations

import contextlib
import ipaddress
import random
import re
import time
import uuid
from typing import Any

from aiohttp import web
from oneapi_db import DatabaseFault, Row
from oneapi_http import ADMIN, COMMON, ROOT, App, Context, Route, failure, json_answer, make_session, set_session, success
from oneapi_json import GoError, bind, decode
from oneapi_relay import BUILT_IN_MODELS, built_in_model, test_channel
from oneapi_store import CHANNEL, NOT_FOUND, PAGE, TOKEN, USER, Refused, bind_body, go_atoi, password_matches, random_key

BAD_PARAMETER = "无效的参数"
UNCHANGED_PASSWORD = "$I_LOVE_U"
BAD_LOGIN = "用户名或密码错误，或用户已被封禁"
OPTION_NEEDS = {
    "GitHubOAuthEnabled": ("GitHubClientId", "无法启用 GitHub OAuth，请先填入 GitHub Client Id 以及 GitHub Client Secret！"),
    "WeChatAuthEnabled": ("WeChatServerAddress", "无法启用微信登录，请先填入微信登录相关配置信息！"),
    "TurnstileCheckEnabled": ("TurnstileSiteKey", "无法启用 Turnstile 校验，请先填入 Turnstile 校验相关配置信息！"),
}


def parse_id(text: str) -> int:
    if not re.fullmatch(r"[+-]?[0-9]{1,18}", text):
        raise Refused(f'strconv.Atoi: parsing "{text}": invalid syntax')
    return int(text)


def offset(ctx: Context) -> int:
    return max(go_atoi(ctx.query("p")), 0) * PAGE


def check_user(user: dict[str, Any]) -> None:
    """Lengths in characters, faults in the order of the struct's fields."""
    faults = []
    for field, name, low, high in (
        ("username", "Username", 0, 12),
        ("password", "Password", 8, 20),
        ("display_name", "DisplayName", 0, 20),
        ("email", "Email", 0, 50),
    ):
        length = len(user[field])
        tag = "min" if length < low else "max" if length > high else ""
        if tag:
            faults.append(f"Key: 'User.{name}' Error:Field validation for '{name}' failed on the '{tag}' tag")
    if faults:
        raise Refused("输入不合法 " + "\n".join(faults))


def user_body(ctx: Context) -> dict[str, Any]:
    try:
        return bind(decode(ctx.body), USER, "User")
    except GoError as exc:
        raise Refused(BAD_PARAMETER) from exc


def like(keyword: str) -> str:
    return keyword + "%"


# -- status ------------------------------------------------------------------------------------------------------------


async def status(ctx: Context) -> web.Response:
    option = ctx.store.options
    data = {
        "version": ctx.app.version, "start_time": ctx.app.start_time, "email_verification": ctx.store.enabled("EmailVerificationEnabled"),
        "github_oauth": ctx.store.enabled("GitHubOAuthEnabled"), "github_client_id": option["GitHubClientId"],
        "lark_client_id": option.get("LarkClientId", ""), "system_name": option["SystemName"], "logo": option["Logo"],
        "footer_html": option["Footer"], "wechat_qrcode": option["WeChatAccountQRCodeImageURL"],
        "wechat_login": ctx.store.enabled("WeChatAuthEnabled"), "server_address": option["ServerAddress"] or "http://localhost:3000",
        "turnstile_check": ctx.store.enabled("TurnstileCheckEnabled"), "turnstile_site_key": option["TurnstileSiteKey"],
        "top_up_link": option["TopUpLink"], "chat_link": option["ChatLink"], "quota_per_unit": go_atoi(option["QuotaPerUnit"]),
        "display_in_currency": ctx.store.enabled("DisplayInCurrencyEnabled"), "oidc": ctx.store.enabled("OidcEnabled"),
        "oidc_client_id": option.get("OidcClientId", ""), "oidc_well_known": option.get("OidcWellKnown", ""),
        "oidc_authorization_endpoint": option.get("OidcAuthorizationEndpoint", ""),
        "oidc_token_endpoint": option.get("OidcTokenEndpoint", ""), "oidc_userinfo_endpoint": option.get("OidcUserinfoEndpoint", ""),
    }  # fmt: skip
    return success(dict(sorted(data.items())))


def text_option(key: str) -> Any:
    async def handler(ctx: Context) -> web.Response:
        return success(ctx.store.options[key])

    return handler


# -- users -------------------------------------------------------------------------------------------------------------


async def login(ctx: Context) -> web.Response:
    if not ctx.store.enabled("PasswordLoginEnabled"):
        raise Refused("管理员关闭了密码登录")
    try:
        body = bind(decode(ctx.body), {"username": "string", "password": "string"}, "LoginRequest", "controller")
    except GoError as exc:
        raise Refused(BAD_PARAMETER) from exc
    if not body["username"] or not body["password"]:
        raise Refused(BAD_PARAMETER)
    row = None
    with contextlib.suppress(DatabaseFault):  # a database that does not answer reads like a wrong password
        row = ctx.store.row("SELECT * FROM users WHERE username = ?", body["username"]) or ctx.store.row(
            "SELECT * FROM users WHERE email = ?", body["username"]
        )
    if row is None or not password_matches(body["password"], row["password"]) or row["status"] != 1:
        raise Refused(BAD_LOGIN)
    user: dict[str, Any] = {name: "" if kind == "string" else 0 for name, kind in USER.items()}
    for name in ("id", "username", "display_name", "role", "status"):
        user[name] = row[name]
    response = success(user)
    set_session(response, make_session(ctx.app.session_key, {name: row[name] for name in ("id", "username", "role", "status")}))
    return response


async def logout(ctx: Context) -> web.Response:
    response = success()
    set_session(response, "")
    return response


async def register(ctx: Context) -> web.Response:
    if not ctx.store.enabled("RegisterEnabled"):
        raise Refused("管理员关闭了新用户注册")
    if not ctx.store.enabled("PasswordRegisterEnabled"):
        raise Refused("管理员关闭了通过密码进行注册，请使用第三方账户验证的形式进行注册")
    user = user_body(ctx)
    check_user(user)
    if ctx.store.enabled("EmailVerificationEnabled"):
        raise Refused("管理员开启了邮箱验证，请输入邮箱地址和验证码")
    ctx.store.add_user(user["username"], user["password"], user["username"])
    return success()


async def self_get(ctx: Context) -> web.Response:
    return success(ctx.store.user(ctx.store.user_by_id(ctx.user_id)))


async def self_put(ctx: Context) -> web.Response:
    user = user_body(ctx)
    if not user["password"]:
        user["password"] = UNCHANGED_PASSWORD
    check_user(user)
    values = {name: user[name] for name in ("username", "password", "display_name")}
    if values["password"] == UNCHANGED_PASSWORD:
        values["password"] = ""
    ctx.store.change_user(ctx.user_id, values)
    return success()


async def self_delete(ctx: Context) -> web.Response:
    if ctx.store.user_by_id(ctx.user_id)["role"] == ROOT:
        raise Refused("不能删除超级管理员账户")
    soft_delete(ctx, ctx.user_id)
    return success()


def soft_delete(ctx: Context, user_id: int) -> None:
    ctx.store.banned.add(user_id)
    ctx.store.update("users", user_id, {"username": f"deleted_{uuid.uuid4().hex}", "status": 3})


async def new_access_token(ctx: Context) -> web.Response:
    """A GET with a side effect: the old token is dead at once."""
    token = uuid.uuid4().hex
    ctx.store.update("users", ctx.user_id, {"access_token": token})
    return success(token)


async def aff(ctx: Context) -> web.Response:
    row = ctx.store.user_by_id(ctx.user_id)
    code = row["aff_code"] or random_key()[:4]
    ctx.store.update("users", ctx.user_id, {"aff_code": code})
    return success(code)


async def users_list(ctx: Context) -> web.Response:
    order = {"quota": "quota DESC", "used_quota": "used_quota DESC", "request_count": "request_count DESC"}.get(ctx.query("order"), "id DESC")
    rows = ctx.store.rows(f"SELECT * FROM users WHERE status != 3 ORDER BY {order} LIMIT ? OFFSET ?", PAGE, offset(ctx))
    return success([ctx.store.user(row) for row in rows])


async def users_search(ctx: Context) -> web.Response:
    word = ctx.query("keyword")
    where, words = "username LIKE ? OR email LIKE ? OR display_name LIKE ?", [like(word)] * 3
    if ctx.store.db.name != "postgres":  # which does not compare a number with a word
        where, words = f"id = ? OR {where}", [word, *words]
    rows = ctx.store.rows(f"SELECT * FROM users WHERE {where}", *words)
    return success([ctx.store.user(row) for row in rows])


async def user_get(ctx: Context) -> web.Response:
    row = ctx.store.user_by_id(parse_id(ctx.params["id"]))
    if ctx.role <= row["role"] and ctx.role != ROOT:
        raise Refused("无权获取同级或更高等级用户的信息")
    return success(ctx.store.user(row))


async def user_post(ctx: Context) -> web.Response:
    user = user_body(ctx)
    if not user["username"] or not user["password"]:
        raise Refused(BAD_PARAMETER)
    check_user(user)
    if user["role"] >= ctx.role:
        raise Refused("无法创建权限大于等于自己的用户")
    ctx.store.add_user(user["username"], user["password"], user["display_name"] or user["username"])
    return success()


async def user_put(ctx: Context) -> web.Response:
    user = user_body(ctx)
    if not user["id"]:
        raise Refused(BAD_PARAMETER)
    user["password"] = user["password"] or UNCHANGED_PASSWORD
    check_user(user)
    row = ctx.store.user_by_id(user["id"])
    if ctx.role != ROOT and (ctx.role <= row["role"] or ctx.role <= user["role"]):
        raise Refused("无权更新同权限等级或更高权限等级的用户信息")
    if user["password"] == UNCHANGED_PASSWORD:
        user["password"] = ""
    ctx.store.change_user(user["id"], user)
    return success()


async def user_manage(ctx: Context) -> web.Response:
    try:
        body = bind(decode(ctx.body), {"username": "string", "action": "string"}, "ManageRequest", "controller")
    except GoError as exc:
        raise Refused(BAD_PARAMETER) from exc
    row = ctx.store.row("SELECT * FROM users WHERE username = ?", body["username"]) if body["username"] else None
    if row is None:
        raise Refused("用户不存在")
    if ctx.role <= row["role"] and ctx.role != ROOT:
        raise Refused("无权更新同权限等级或更高权限等级的用户信息")
    role, state, action = row["role"], row["status"], body["action"]
    if role == ROOT and action in ("disable", "delete", "demote"):
        raise Refused({"disable": "无法禁用超级管理员用户", "delete": "无法删除超级管理员用户", "demote": "无法降级超级管理员用户"}[action])
    if action == "delete":
        soft_delete(ctx, row["id"])
        state = 3
    elif action in ("disable", "enable"):
        state = 2 if action == "disable" else 1
    elif action == "promote":
        if ctx.role != ROOT:
            raise Refused("普通管理员用户无法提升其他用户为管理员")
        if role >= ADMIN:
            raise Refused("该用户已经是管理员")
        role = ADMIN
    elif action == "demote":
        if role == COMMON:
            raise Refused("该用户已经是普通用户")
        role = COMMON
    ctx.store.change_user(row["id"], {"role": role, "status": state})
    user: dict[str, Any] = {name: "" if kind == "string" else 0 for name, kind in USER.items()}
    return success({**user, "role": role, "status": state})


async def user_delete(ctx: Context) -> web.Response:
    row = ctx.store.user_by_id(parse_id(ctx.params["id"]))
    if ctx.role <= row["role"]:
        raise Refused("无权删除同权限等级或更高权限等级的用户")
    soft_delete(ctx, row["id"])
    return web.Response(status=200)  # the real one answers success with an empty body


async def top_up(ctx: Context) -> web.Response:
    body = bind_body(ctx.body, {"user_id": "int", "quota": "int", "remark": "string"}, "adminTopUpRequest", "controller")
    ctx.store.execute("UPDATE users SET quota = quota + ? WHERE id = ?", body["quota"], body["user_id"])
    return success()


async def available_models(ctx: Context) -> web.Response:
    return success(ctx.store.group_models(ctx.store.user_by_id(ctx.user_id)["group"]))


# -- options -----------------------------------------------------------------------------------------------------------


async def options_get(ctx: Context) -> web.Response:
    items = [{"key": key, "value": value} for key, value in ctx.store.options.items() if not key.endswith(("Token", "Secret"))]
    random.shuffle(items)
    return success(items)


async def options_put(ctx: Context) -> web.Response:
    try:
        option = bind(decode(ctx.body), {"key": "string", "value": "string"}, "Option")
    except GoError:
        return failure(BAD_PARAMETER, 400)
    key, value = option["key"], option["value"]
    if key == "Theme" and value not in ("default", "berry", "air"):
        raise Refused("无效的主题")
    if key in OPTION_NEEDS and value == "true" and not ctx.store.options[OPTION_NEEDS[key][0]]:
        raise Refused(OPTION_NEEDS[key][1])
    try:
        ctx.store.set_option(key, value)
    except GoError as exc:
        raise Refused(str(exc)) from exc
    return success()


# -- tokens ------------------------------------------------------------------------------------------------------------


def check_token(token: dict[str, Any]) -> None:
    if len(token["name"].encode()) > 30:
        raise Refused("参数错误：令牌名称过长")
    for subnet in (token["subnet"] or "").split(",") if token["subnet"] else []:
        text = subnet.strip()
        try:
            if not re.fullmatch(r"[^/]+/[0-9]+", text):
                raise ValueError(text)
            ipaddress.ip_network(text, strict=False)
        except ValueError as exc:
            raise Refused(f"参数错误：无效的网段：failed to parse subnet: invalid CIDR address: {text}") from exc


def own_token(ctx: Context, token_id: int) -> Row:
    if token_id == 0:
        raise Refused("id 或 userId 为空！")
    row = ctx.store.row("SELECT * FROM tokens WHERE id = ? AND user_id = ?", token_id, ctx.user_id)
    if row is None:
        raise Refused(NOT_FOUND)
    return row


async def tokens_list(ctx: Context) -> web.Response:
    order = {"remain_quota": "unlimited_quota DESC, remain_quota DESC", "used_quota": "used_quota DESC"}.get(ctx.query("order"), "id DESC")
    rows = ctx.store.rows(f"SELECT * FROM tokens WHERE user_id = ? ORDER BY {order} LIMIT ? OFFSET ?", ctx.user_id, PAGE, offset(ctx))
    return success([ctx.store.token(row) for row in rows])


async def tokens_search(ctx: Context) -> web.Response:
    rows = ctx.store.rows("SELECT * FROM tokens WHERE user_id = ? AND name LIKE ?", ctx.user_id, like(ctx.query("keyword")))
    return success([ctx.store.token(row) for row in rows])


async def token_get(ctx: Context) -> web.Response:
    return success(ctx.store.token(own_token(ctx, parse_id(ctx.params["id"]))))


async def token_post(ctx: Context) -> web.Response:
    body = bind_body(ctx.body, TOKEN, "Token")
    check_token(body)
    now = int(time.time())
    values = {
        "user_id": ctx.user_id, "key": random_key(), "status": 1, "name": body["name"], "created_time": now, "accessed_time": now,
        "expired_time": body["expired_time"] or -1, "remain_quota": body["remain_quota"], "unlimited_quota": body["unlimited_quota"],
        "used_quota": 0, "models": body["models"], "subnet": body["subnet"] or "",
    }  # fmt: skip
    token_id = ctx.store.insert("tokens", values)
    return success(ctx.store.token(own_token(ctx, token_id)))


async def token_put(ctx: Context) -> web.Response:
    body = bind_body(ctx.body, TOKEN, "Token")
    check_token(body)
    row = own_token(ctx, body["id"])
    if body["status"] == 1:
        if row["status"] == 3 and row["expired_time"] != -1 and row["expired_time"] <= time.time():
            raise Refused("令牌已过期，无法启用，请先修改令牌过期时间，或者设置为永不过期")
        if row["status"] == 4 and row["remain_quota"] <= 0 and not row["unlimited_quota"]:
            raise Refused("令牌可用额度已用尽，无法启用，请先修改令牌剩余额度，或者设置为无限额度")
    if ctx.query("status_only"):
        values: dict[str, Any] = {"status": body["status"]}
    else:
        values = {name: body[name] for name in ("name", "expired_time", "remain_quota", "unlimited_quota", "models", "subnet")}
    ctx.store.update("tokens", row["id"], values)
    return success(ctx.store.token(own_token(ctx, row["id"])))


async def token_delete(ctx: Context) -> web.Response:
    row = own_token(ctx, go_atoi(ctx.params["id"]))
    ctx.store.execute("DELETE FROM tokens WHERE id = ?", row["id"])
    return success()


# -- channels ----------------------------------------------------------------------------------------------------------


async def channels_list(ctx: Context) -> web.Response:
    rows = ctx.store.rows("SELECT * FROM channels ORDER BY id DESC LIMIT ? OFFSET ?", PAGE, offset(ctx))
    return success([ctx.store.channel(row) for row in rows])


async def channels_search(ctx: Context) -> web.Response:
    word = ctx.query("keyword")
    rows = ctx.store.rows("SELECT * FROM channels WHERE id = ? OR name LIKE ?", go_atoi(word), like(word))
    return success([ctx.store.channel(row) for row in rows])


async def channel_get(ctx: Context) -> web.Response:
    row = ctx.store.row("SELECT * FROM channels WHERE id = ?", parse_id(ctx.params["id"]))
    if row is None:
        raise Refused(NOT_FOUND)
    return success(ctx.store.channel(row))


async def channel_post(ctx: Context) -> web.Response:
    ctx.store.add_channels(bind_body(ctx.body, CHANNEL, "Channel"))
    return success()


async def channel_put(ctx: Context) -> web.Response:
    return success(ctx.store.change_channel(bind_body(ctx.body, CHANNEL, "Channel")))


async def channel_delete(ctx: Context) -> web.Response:
    ctx.store.delete_channel(go_atoi(ctx.params["id"]))
    return success()


async def channels_delete_disabled(ctx: Context) -> web.Response:
    return success(ctx.store.execute("DELETE FROM channels WHERE status IN (2, 3)"))


async def channel_test(ctx: Context) -> web.Response:
    row = ctx.store.row("SELECT * FROM channels WHERE id = ?", parse_id(ctx.params["id"]))
    if row is None:
        raise Refused(NOT_FOUND)
    model = ctx.query("model")
    started = time.monotonic()
    fault = await test_channel(ctx.app, dict(row), model or "gpt-3.5-turbo")
    milliseconds = 0 if fault else int((time.monotonic() - started) * 1000)
    ctx.store.update("channels", row["id"], {"response_time": milliseconds, "test_time": int(time.time())})
    return json_answer({"success": not fault, "message": fault, "time": milliseconds / 1000, "model": model})


async def channels_test(ctx: Context) -> web.Response:
    if ctx.app.testing_all:
        raise Refused("测试已在运行中")
    ctx.app.testing_all = True

    async def run() -> None:
        try:
            where = " WHERE status IN (2, 3)" if ctx.query("scope") == "disabled" else ""
            for row in ctx.store.rows(f"SELECT * FROM channels{where} ORDER BY id DESC"):
                await test_channel(ctx.app, dict(row), "gpt-3.5-turbo")
        finally:
            ctx.app.testing_all = False

    ctx.app.spawn(run())
    return success()


async def channel_models(ctx: Context) -> web.Response:
    return json_answer({"object": "list", "data": [built_in_model(name) for name in BUILT_IN_MODELS]})


async def dashboard_models(ctx: Context) -> web.Response:
    return success({str(number): list(BUILT_IN_MODELS) if number in (1, 3) else [] for number in range(1, 47)})


async def groups(ctx: Context) -> web.Response:
    names = list(ctx.store.group_ratio)
    random.shuffle(names)
    return success(names)


async def empty_list(ctx: Context) -> web.Response:
    return success([])


async def setup_of_new_api(ctx: Context) -> web.Response:
    """Only when a test asks for the other product (ONE_API_STANDIN_FLAVOUR=new-api)."""
    return success({"status": True, "root_init": True, "database_type": "sqlite"})


def routes(app: App) -> list[Route]:
    table = [
        Route("GET", "/api/status", status),
        Route("GET", "/api/notice", text_option("Notice")),
        Route("GET", "/api/about", text_option("About")),
        Route("GET", "/api/home_page_content", text_option("HomePageContent")),
        Route("GET", "/api/models", dashboard_models, COMMON),
        Route("POST", "/api/topup", top_up, ADMIN),
        Route("POST", "/api/user/register", register, critical=True),
        Route("POST", "/api/user/login", login, critical=True),
        Route("GET", "/api/user/logout", logout),
        Route("GET", "/api/user/self", self_get, COMMON),
        Route("PUT", "/api/user/self", self_put, COMMON),
        Route("DELETE", "/api/user/self", self_delete, COMMON),
        Route("GET", "/api/user/token", new_access_token, COMMON),
        Route("GET", "/api/user/aff", aff, COMMON),
        Route("GET", "/api/user/dashboard", empty_list, COMMON),
        Route("GET", "/api/user/available_models", available_models, COMMON),
        Route("GET", "/api/user/", users_list, ADMIN),
        Route("GET", "/api/user/search", users_search, ADMIN),
        Route("GET", "/api/user/:id", user_get, ADMIN),
        Route("POST", "/api/user/", user_post, ADMIN),
        Route("POST", "/api/user/manage", user_manage, ADMIN),
        Route("PUT", "/api/user/", user_put, ADMIN),
        Route("DELETE", "/api/user/:id", user_delete, ADMIN),
        Route("GET", "/api/option/", options_get, ROOT),
        Route("PUT", "/api/option/", options_put, ROOT),
        Route("GET", "/api/channel/", channels_list, ADMIN),
        Route("GET", "/api/channel/search", channels_search, ADMIN),
        Route("GET", "/api/channel/models", channel_models, ADMIN),
        Route("GET", "/api/channel/test", channels_test, ADMIN),
        Route("GET", "/api/channel/test/:id", channel_test, ADMIN),
        Route("GET", "/api/channel/:id", channel_get, ADMIN),
        Route("POST", "/api/channel/", channel_post, ADMIN),
        Route("PUT", "/api/channel/", channel_put, ADMIN),
        Route("DELETE", "/api/channel/disabled", channels_delete_disabled, ADMIN),
        Route("DELETE", "/api/channel/:id", channel_delete, ADMIN),
        Route("GET", "/api/token/", tokens_list, COMMON),
        Route("GET", "/api/token/search", tokens_search, COMMON),
        Route("GET", "/api/token/:id", token_get, COMMON),
        Route("POST", "/api/token/", token_post, COMMON),
        Route("PUT", "/api/token/", token_put, COMMON),
        Route("DELETE", "/api/token/:id", token_delete, COMMON),
        Route("GET", "/api/redemption/", empty_list, ADMIN),
        Route("GET", "/api/log/", empty_list, ADMIN),
        Route("GET", "/api/log/self", empty_list, COMMON),
        Route("GET", "/api/group/", groups, ADMIN),
    ]
    if app.flavour == "new-api":
        table.append(Route("GET", "/api/setup", setup_of_new_api))
    return table
