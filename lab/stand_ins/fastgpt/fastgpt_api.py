# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""/api/* of the FastGPT stand-in. Written from the recorded contract; routes and bodies are those of the real server."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import os
import random
import string
import time
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web
from bson import ObjectId
from fastgpt_gateway import Gateway, GatewayError
from fastgpt_graph import Outcome, Steps, run_v1, run_v2
from fastgpt_rules import (
    Rules,
    count_tokens,
    default_indexes,
    drop_same,
    find_model,
    fit_tokens,
    fuse,
    public_models,
    score_of,
    search_words,
    simple_text,
)
from fastgpt_store import WRITE_CONFLICT, Document, Fault, Mongo, Vectors, log, now, object_id, plain, sha256
from pymongo.errors import PyMongoError

TOKEN_SECONDS = 604800
QUOTE_PROMPT = "Answer from this knowledge only:\n<Data>\n{{quote}}\n</Data>\n\nQuestion: {{question}}"
NAMED = {
    "unAuthorization": (403, "凭证错误"),
    "tooManyRequest": (429, "common:error.too_many_request"),
    "insufficientQuota": (510, "账号余额不足"),
    "unAuthModel": (511, "无权操作该模型"),
    "unAuthFile": (513, "无权阅读该文件"),
    "unAuthApiKey": (514, "Api Key 不合法"),
    "unExistDataset": (501000, "core.dataset.error.unExistDataset"),
    "unAuthDataset": (501001, "core.dataset.error.unAuthDataset"),
    "unAuthDatasetCollection": (501003, "core.dataset.error.unAuthDatasetCollection"),
    "invalidVectorModelOrQAModel": (501007, "core.dataset.error.invalidVectorModelOrQAModel"),
    "appUnExist": (502000, "code_error.app_error.not_exist"),
    "unAuthApp": (502001, "code_error.app_error.un_auth_app"),
    "openapiUnExist": (506000, "code_error.openapi_error.api_key_not_exist"),
    "openapiUnAuth": (506001, "code_error.openapi_error.un_auth"),
    "openapiExceedLimit": (506002, "code_error.openapi_error.exceed_limit"),
    "account_psw_error": (503000, "common:code_error.account_error"),
    "missingParams": (507002, "error.missingParams"),
    "inheritPermissionError": (507003, "error.inheritPermissionError"),
}


class Named(Exception):
    """An error with a code of its own in the body."""


class Unhandled(Exception):
    """A rejection that the real handler does not catch: a bare 500 of the framework."""


class Caller:
    def __init__(self, team: ObjectId, member: ObjectId, kind: str, app_id: str = "") -> None:
        self.team, self.member, self.kind, self.app_id = team, member, kind, app_id


Reply = web.StreamResponse | dict[str, Any] | list[Any] | str | None
Handler = Callable[[web.Request, dict[str, Any]], Awaitable[Reply]]


def dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def envelope(code: int, data: Any = None, message: str = "", status_text: str = "", http: int | None = None) -> web.Response:
    body = {"code": code, "statusText": status_text, "message": message, "data": data}
    return web.json_response(body, status=code if http is None else http, dumps=dumps)


def _b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def make_jwt(claims: dict[str, Any], key: str) -> str:
    if not key:
        raise Fault("secretOrPrivateKey must have a value")
    head = _b64(b'{"alg":"HS256","typ":"JWT"}')
    body = _b64(json.dumps(claims).encode())
    return f"{head}.{body}.{_b64(hmac.new(key.encode(), f'{head}.{body}'.encode(), hashlib.sha256).digest())}"


def read_jwt(token: str, key: str) -> dict[str, Any]:
    head, _dot, rest = token.partition(".")
    body, _dot, signature = rest.partition(".")
    expected = _b64(hmac.new(key.encode(), f"{head}.{body}".encode(), hashlib.sha256).digest())
    if not key or not hmac.compare_digest(expected, signature):
        raise Named("unAuthorization")
    claims: dict[str, Any] = json.loads(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)))
    if claims.get("exp", 0) < time.time():
        raise Named("unAuthorization")
    return claims


class Api:
    def __init__(self, rules: Rules, mongo: Mongo, vectors: Vectors, gateway: Gateway, config: dict[str, Any]) -> None:
        self.rules, self.mongo, self.vectors, self.gateway = rules, mongo, vectors, gateway
        self.config = config  # filled in place when config.json has been read
        self.token_key = os.environ.get("TOKEN_KEY", "")
        self.tasks: set[asyncio.Task[None]] = set()
        self.logins: dict[str, tuple[float, int]] = {}  # address -> end of its window, log-ins in it
        self.routes: dict[str, Handler] = {
            "common/system/getInitData": self.init_data,
            "support/user/account/loginByPassword": self.login,
            "support/user/account/tokenLogin": self.token_login,
            "support/user/account/loginout": self.logout,
            "support/openapi/create": self.key_create,
            "support/openapi/list": self.key_list,
            "support/openapi/delete": self.key_delete,
            "core/dataset/create": self.dataset_create,
            "core/dataset/list": self.dataset_list,
            "core/dataset/detail": self.dataset_detail,
            "core/dataset/delete": self.dataset_delete,
            "core/dataset/collection/create": self.collection_create,
            "core/dataset/collection/list": self.collection_list,
            "core/dataset/collection/delete": self.collection_delete,
            "core/dataset/data/insertData": self.insert_data,
            "core/dataset/data/pushData": self.push_data,
            "core/dataset/data/list": self.data_list,
            "core/dataset/searchTest": self.search_test,
            "core/app/create": self.app_create,
            "core/app/list": self.app_list,
            "core/app/detail": self.app_detail,
            "core/app/del": self.app_delete,
            "v1/embeddings": self.embeddings,
            "v1/chat/completions": self.completions,
        }
        if not rules.new_rerank:
            self.routes["v1/rerank"] = self.rerank

    # -- who asks --------------------------------------------------------------------------------------------------------

    async def caller(self, request: web.Request, *, key: bool = False, token: bool = True) -> Caller:
        """An Authorization header is looked at only where keys are accepted, and then wins over the token."""
        header = request.headers.get("Authorization", "")
        if key and header:
            return await self._key_caller(header)
        cookie = request.cookies.get(self.rules.cookie, "")
        jwt = request.headers.get("token") or cookie
        if not token or not jwt:
            raise Named("unAuthorization")
        claims = read_jwt(jwt, self.token_key)
        return Caller(ObjectId(claims["teamId"]), ObjectId(claims["tmbId"]), "token")

    async def _key_caller(self, header: str) -> Caller:
        parts = (header.split(" ") + [""])[1].split("-")
        if len(parts) not in (2, 3):
            raise Named("unAuthorization")
        await self.mongo.ready("openapis.findOne")
        row = await self.mongo.collection("openapis").find_one({"apiKey": "-".join(parts[:2]).strip()})
        if row is None:
            raise Named("unAuthApiKey")
        await self.mongo.collection("openapis").update_one({"_id": row["_id"]}, {"$set": {"lastUsedTime": now()}})
        return Caller(row["teamId"], row["tmbId"], "apikey", row.get("appId") or (parts[2] if len(parts) == 3 else ""))

    def text_error(self, text: str, name: str) -> Exception:
        """Older versions say it in words, 4.8 by name."""
        return Named(name) if self.rules.workflow else Fault(text)

    def missing(self) -> Exception:
        return self.text_error("缺少参数", "missingParams")

    # -- system and users ------------------------------------------------------------------------------------------------

    async def init_data(self, request: web.Request, body: dict[str, Any]) -> Reply:
        data: dict[str, Any] = {
            "feConfigs": {"show_emptyChat": True, "show_git": True, "systemTitle": os.environ.get("SYSTEM_NAME") or "FastGPT", "isPlus": False},
            "systemVersion": self.rules.text,
        }
        if self.config:
            data.update(public_models(self.config, self.rules))
        return data

    def limit_logins(self, request: web.Request) -> None:
        if self.rules.login_limit is None:
            return
        most, seconds = self.rules.login_limit
        address = request.headers.get("X-Forwarded-For", "").split(",")[0].strip() or request.remote or ""
        end, count = self.logins.get(address, (0.0, 0))
        if end < time.time():
            end, count = time.time() + seconds, 0
        self.logins[address] = (end, count + 1)
        if count >= most:
            raise Named("tooManyRequest")

    async def login(self, request: web.Request, body: dict[str, Any]) -> Reply:
        self.limit_logins(request)
        username, password = body.get("username"), body.get("password")
        if not username or not password:
            raise Fault("缺少参数")
        await self.mongo.ready("users.findOne")
        users = self.mongo.collection("users")
        user = await users.find_one({"username": str(username)})
        if user is None:
            raise self.login_error("用户未注册")
        if user.get("status") == "forbidden":
            raise Fault("Invalid account!" if self.rules.login_limit else "账号已停用，无法登录")
        if user["password"] != sha256(str(password)):
            raise self.login_error("密码错误")
        detail = await self.user_detail(user)
        claims = {"userId": str(user["_id"]), "teamId": detail["team"]["teamId"], "tmbId": detail["team"]["tmbId"]}
        token = make_jwt({**claims, "exp": int(time.time()) + TOKEN_SECONDS}, self.token_key)
        response = envelope(200, {"user": detail, "token": token})
        secure = " Secure;" if self.rules.secure_cookie else ""
        response.headers.add(
            "Set-Cookie", f"{self.rules.cookie}={token}; Path=/; HttpOnly; Max-Age={TOKEN_SECONDS}; Samesite=Strict;{secure}"
        )
        return response

    def login_error(self, text: str) -> Exception:
        return Named("account_psw_error") if self.rules.login_limit else Fault(text)

    async def user_detail(self, user: Document) -> dict[str, Any]:
        member = await self.mongo.collection("team.members").find_one({"userId": user["_id"]})
        if member is None:
            raise Fault("member not exist")
        team = {
            "teamId": member["teamId"], "teamName": "My Team", "avatar": "/icon/logo.svg", "balance": 999900000, "tmbId": member["_id"],
            "teamDomain": None, "memberName": member["name"], "role": member["role"], "status": member["status"], "defaultTeam": True,
        }  # fmt: skip
        found: dict[str, Any] = plain(
            {"_id": user["_id"], "username": user["username"], "avatar": "/icon/human.svg", "timezone": user.get("timezone"), "promotionRate": 15, "team": team}
        )
        return found

    async def token_login(self, request: web.Request, body: dict[str, Any]) -> Reply:
        caller = await self.caller(request)
        member = await self.mongo.collection("team.members").find_one({"_id": caller.member})
        user = await self.mongo.collection("users").find_one({"_id": member["userId"]}) if member else None
        if user is None:
            raise Named("unAuthorization")
        return await self.user_detail(user)

    async def logout(self, request: web.Request, body: dict[str, Any]) -> Reply:
        response = envelope(200)
        response.headers.add("Set-Cookie", f"{self.rules.cookie}=; Path=/; Max-Age=0")
        return response

    # -- keys ------------------------------------------------------------------------------------------------------------

    async def key_create(self, request: web.Request, body: dict[str, Any]) -> Reply:
        caller = await self.caller(request)
        app_id = body.get("appId") or None
        if app_id and self.rules.workflow:
            await self.find_app(caller, app_id)
        keys = self.mongo.collection("openapis")
        if await keys.count_documents({"tmbId": caller.member, "appId": app_id}) >= 10:
            raise self.text_error("最多 10 组 API 秘钥", "openapiExceedLimit")
        prefix = (self.config.get("systemEnv") or {}).get("openapiPrefix") or "fastgpt"
        key = f"{prefix}-" + "".join(random.choices(string.ascii_letters + string.digits, k=random.randint(52, 65)))
        row: Document = {"teamId": caller.team, "tmbId": caller.member, "apiKey": key, "name": body.get("name") or "Api Key", "createTime": now()}
        if app_id:
            row["appId"] = str(app_id)
        await keys.insert_one({**row, "limit": {"maxUsagePoints": -1, **(body.get("limit") or {})}})
        return key

    async def key_list(self, request: web.Request, body: dict[str, Any]) -> Reply:
        caller = await self.caller(request)
        app_id = request.query.get("appId") or None
        if app_id:
            await self.find_app(caller, app_id)
        rows = self.mongo.collection("openapis").find({"teamId": caller.team, "appId": app_id}).sort("_id", -1)
        return [{**plain(row), "apiKey": "******" + row["apiKey"][-4:]} async for row in rows]

    async def key_delete(self, request: web.Request, body: dict[str, Any]) -> Reply:
        caller = await self.caller(request)
        if not request.query.get("id"):
            raise self.missing()
        where = {"_id": object_id(request.query["id"], "openapi"), "teamId": caller.team}
        if await self.mongo.collection("openapis").find_one(where) is None:
            raise Named("openapiUnExist")
        await self.mongo.collection("openapis").delete_one(where)
        return {} if self.rules.workflow else None

    # -- datasets --------------------------------------------------------------------------------------------------------

    async def find_dataset(self, caller: Caller, dataset_id: Any) -> Document:
        await self.mongo.ready("datasets.findOne")
        row = await self.mongo.collection("datasets").find_one({"_id": object_id(dataset_id, "datasets"), "teamId": caller.team})
        if row is None:
            raise Named("unExistDataset" if self.rules.workflow else "unAuthDataset")
        return row

    def default_model(self, kind: str) -> Any:
        models = self.config.get(kind) or []
        if not models:
            raise Fault("Cannot read properties of undefined (reading 'model')")
        return models[0].get("model")

    async def dataset_create(self, request: web.Request, body: dict[str, Any]) -> Reply:
        vector_model = body.get("vectorModel") or self.default_model("vectorModels")
        agent_model = body.get("agentModel") or self.default_model("llmModels")
        caller = await self.caller(request, key=True)
        if not find_model(self.config["vectorModels"], vector_model) or not find_model(self.config["llmModels"], agent_model):
            raise self.text_error("vectorModel or qaModel is invalid", "invalidVectorModelOrQAModel")
        if not body.get("name"):
            raise Fault("datasets validation failed: name: Path `name` is required.")
        kind = body.get("type") or "dataset"
        datasets = self.mongo.collection("datasets")
        if not self.rules.new_rerank and await datasets.count_documents({"teamId": caller.team, "type": "dataset"}) >= 50:
            raise Fault("每个团队上限 50 个知识库")
        parent = body.get("parentId")
        row = {
            "name": body["name"], "teamId": caller.team, "tmbId": caller.member, "vectorModel": vector_model, "agentModel": agent_model,
            "avatar": body.get("avatar") or "/icon/logo.svg", "parentId": object_id(parent, "datasets") if parent else None, "type": kind,
            "intro": "", "permission": "private", "status": "active", "updateTime": now(), "createTime": now(),
        }  # fmt: skip
        made = await datasets.insert_one(row)
        if kind == "dataset" and not self.rules.workflow:
            await self._add_collection(caller, made.inserted_id, {"name": "手动录入", "type": "virtual"})
        return str(made.inserted_id)

    async def dataset_list(self, request: web.Request, body: dict[str, Any]) -> Reply:
        caller = await self.caller(request, key=True)
        where: Document = {"teamId": caller.team}
        asked: Any = body if self.rules.workflow else request.query
        if self.rules.workflow and asked.get("searchKey"):
            where["name"] = {"$regex": str(asked["searchKey"]), "$options": "i"}
        elif "parentId" in asked:
            where["parentId"] = object_id(asked["parentId"], "datasets") if asked["parentId"] else None
        if asked.get("type"):
            where["type"] = asked["type"]
        rows = self.mongo.collection("datasets").find(where).sort("updateTime", -1)
        shown = ("_id", "parentId", "avatar", "name", "intro", "type", "permission")
        models = self.config["vectorModels"]
        return [
            {**plain({key: row.get(key) for key in shown}), "canWrite": True, "isOwner": True, "vectorModel": find_model(models, row["vectorModel"])}
            async for row in rows
        ]

    async def dataset_detail(self, request: web.Request, body: dict[str, Any]) -> Reply:
        caller = await self.caller(request, key=True)
        if not request.query.get("id"):
            raise self.missing()
        row = await self.find_dataset(caller, request.query["id"])
        vector_model = find_model(self.config["vectorModels"], row["vectorModel"])
        return {**plain(row), "vectorModel": vector_model, "agentModel": find_model(self.config["llmModels"], row["agentModel"])}

    async def dataset_delete(self, request: web.Request, body: dict[str, Any]) -> Reply:
        if not request.query.get("id"):
            raise self.missing()
        caller = await self.caller(request, key=True)
        found = [await self.find_dataset(caller, request.query["id"])]
        for row in found:
            found.extend([child async for child in self.mongo.collection("datasets").find({"teamId": caller.team, "parentId": row["_id"]})])
        ids = [row["_id"] for row in found]
        where = {"teamId": caller.team, "datasetId": {"$in": ids}}
        await self.vectors.delete("dataset_id", str(caller.team), [str(item) for item in ids])
        await self.mongo.collection("dataset.datas").delete_many(where)
        await self.mongo.collection("dataset.collections").delete_many(where)
        await self.mongo.collection("datasets").delete_many({"_id": {"$in": ids}})
        return None

    async def _add_collection(self, caller: Caller, dataset_id: ObjectId, body: dict[str, Any]) -> ObjectId:
        row = {
            "teamId": caller.team, "tmbId": caller.member, "datasetId": dataset_id, "parentId": body.get("parentId") or None,
            "name": body.get("name"), "type": body.get("type"), "trainingType": body.get("trainingType") or "chunk",
            "chunkSize": body.get("chunkSize") or 512, "createTime": now(), "updateTime": now(),
        }  # fmt: skip
        made = await self.mongo.collection("dataset.collections").insert_one(row)
        found: ObjectId = made.inserted_id
        return found

    async def collection_create(self, request: web.Request, body: dict[str, Any]) -> Reply:
        caller = await self.caller(request, key=True)
        dataset = await self.find_dataset(caller, body.get("datasetId"))
        for name in ("name", "type"):
            if not body.get(name):
                raise Fault(f"{self.rules.collection('dataset.collections')} validation failed: {name}: Path `{name}` is required.")
        return str(await self._add_collection(caller, dataset["_id"], body))

    async def collection_list(self, request: web.Request, body: dict[str, Any]) -> Reply:
        caller = await self.caller(request, key=True)
        dataset = await self.find_dataset(caller, body.get("datasetId"))
        number, size = int(body.get("pageNum") or 1), min(int(body.get("pageSize") or 10), 30)
        where: Document = {"teamId": caller.team, "datasetId": dataset["_id"], "parentId": body.get("parentId") or None}
        if body.get("searchText"):
            where["name"] = {"$regex": str(body["searchText"]), "$options": "i"}
        collections = self.mongo.collection("dataset.collections")
        rows = []
        async for row in collections.find(where).sort("updateTime", -1).skip((number - 1) * size).limit(size):
            amount = await self.mongo.collection("dataset.datas").count_documents({"collectionId": row["_id"]})
            rows.append({**plain(row), "dataAmount": amount, "trainingAmount": 0, "canWrite": True})
        return {"pageNum": number, "pageSize": size, "data": rows, "total": await collections.count_documents(where)}

    async def collection_delete(self, request: web.Request, body: dict[str, Any]) -> Reply:
        caller = await self.caller(request, key=True)
        row = await self.find_collection(caller, request.query.get("id"))
        await self.vectors.delete("collection_id", str(caller.team), [str(row["_id"])])
        await self.mongo.collection("dataset.datas").delete_many({"collectionId": row["_id"]})
        await self.mongo.collection("dataset.collections").delete_one({"_id": row["_id"]})
        return None

    async def find_collection(self, caller: Caller, collection_id: Any) -> Document:
        await self.mongo.ready("dataset.collections.findOne")
        where = {"_id": object_id(collection_id, self.rules.collection("dataset.collections")), "teamId": caller.team}
        row = await self.mongo.collection("dataset.collections").find_one(where)
        if row is None:
            raise Named("unAuthDatasetCollection")
        return row

    # -- data ------------------------------------------------------------------------------------------------------------

    async def insert_data(self, request: web.Request, body: dict[str, Any]) -> Reply:
        for name in ("q", "collectionId"):
            if not body.get(name):
                if not self.rules.new_rerank:
                    raise Unhandled
                raise Fault("q, datasetId, collectionId, model is required" if self.rules.workflow else f"{name} is required")
        caller = await self.caller(request, key=True)
        collection = await self.find_collection(caller, body["collectionId"])
        dataset = await self.find_dataset(caller, collection["datasetId"])
        q, a = simple_text(str(body["q"])), simple_text(str(body.get("a") or ""))
        model = find_model(self.config["vectorModels"], dataset["vectorModel"])
        if model is None:
            raise Fault("Cannot read properties of undefined (reading 'maxToken')")
        limit = model.get("maxToken")
        if isinstance(limit, (int, float)) and count_tokens(q + a if self.rules.workflow else q) > limit:
            if not self.rules.workflow:
                raise Unhandled
            raise Fault("Q Over Tokens")
        if await self.mongo.collection("dataset.datas").count_documents({"teamId": caller.team, "collectionId": collection["_id"], "q": q, "a": a}):
            raise Fault("已经存在完全一致的数据")
        return await self.store(caller, collection, model, q, a, body.get("indexes"))

    async def store(self, caller: Caller, collection: Document, model: dict[str, Any], q: str, a: str, given: Any) -> str:
        indexes = default_indexes(self.rules, q, a, given)

        async def one(text: str) -> str:
            vector = await self.gateway.embed(model, text, "db")
            return await self.vectors.insert(vector, str(caller.team), str(collection["datasetId"]), str(collection["_id"]))

        ids = await asyncio.gather(*(one(item["text"]) for item in indexes))
        row = {
            "teamId": caller.team, "tmbId": caller.member, "datasetId": collection["datasetId"], "collectionId": collection["_id"],
            "q": q, "a": a, "fullTextToken": search_words(f"{q}\n{a}"), "chunkIndex": 0, "updateTime": now(),
            "indexes": [{**item, "dataId": data_id} for item, data_id in zip(indexes, ids, strict=True)],
        }  # fmt: skip
        made = await self.mongo.collection("dataset.datas").insert_one(row)
        return str(made.inserted_id)

    async def push_data(self, request: web.Request, body: dict[str, Any]) -> Reply:
        """Only queued: worked off at once from 4.6.9 on, by a job every minute before."""
        caller = await self.caller(request, key=True)
        collection = await self.find_collection(caller, body.get("collectionId"))
        dataset = await self.find_dataset(caller, collection["datasetId"])
        model = find_model(self.config["vectorModels"], dataset["vectorModel"]) or {}
        result: dict[str, Any] = {"insertLen": 0, "overToken": [], "repeat": [], "error": []}
        queue: list[tuple[str, str, Any]] = []
        for item in body.get("data") or []:
            q, a = simple_text(str(item.get("q") or "")), simple_text(str(item.get("a") or ""))
            if not q:
                result["error"].append(item)
            elif count_tokens(q + a) > (model.get("maxToken") or 3000):
                result["overToken"].append(item)
            elif any((q, a) == (old[0], old[1]) for old in queue):
                result["repeat"].append(item)
            else:
                queue.append((q, a, item.get("indexes")))
        result["insertLen"] = len(queue)

        async def work() -> None:
            await asyncio.sleep(0 if self.rules.version >= (4, 6, 9) else 60)
            for q, a, indexes in queue:
                try:
                    await self.store(caller, collection, model, q, a, indexes)
                except (Fault, GatewayError) as exc:
                    log(f"vector training error {exc}")

        task = asyncio.create_task(work())
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return result

    async def data_list(self, request: web.Request, body: dict[str, Any]) -> Reply:
        caller = await self.caller(request, key=True)
        collection = await self.find_collection(caller, body.get("collectionId"))
        number, size = int(body.get("pageNum") or 1), min(int(body.get("pageSize") or 10), 30)
        datas = self.mongo.collection("dataset.datas")
        where = {"collectionId": collection["_id"]}
        rows = [plain(row) async for row in datas.find(where, {"fullTextToken": 0}).skip((number - 1) * size).limit(size)]
        return {"pageNum": number, "pageSize": size, "data": rows, "total": await datas.count_documents(where)}

    # -- search ----------------------------------------------------------------------------------------------------------

    async def search_test(self, request: web.Request, body: dict[str, Any]) -> Reply:
        if not body.get("datasetId") or not body.get("text"):
            raise self.missing()
        started = time.monotonic()
        caller = await self.caller(request, key=True)
        dataset = await self.find_dataset(caller, body["datasetId"])
        found = await self.search(
            caller, [dataset["_id"]], dataset["vectorModel"], str(body["text"]), min(body.get("limit") or 1500, 20000),
            body.get("similarity") or 0, body.get("searchMode"), bool(body.get("usingReRank")),
        )  # fmt: skip
        extension: dict[str, Any] = {} if self.rules.workflow else {"usingQueryExtension": False}
        return {"list": found.pop("items"), "duration": f"{time.monotonic() - started:.3f}s", **extension, **found}

    async def search(
        self, caller: Caller, dataset_ids: list[ObjectId], vector_model: str, text: str, limit: float, similarity: float, mode: str | None, using_rerank: bool
    ) -> dict[str, Any]:
        limits = self.rules.recall_limits
        mode = mode if mode in limits else "embedding"
        by_vector, by_words = limits[mode]
        rerank_models = self.config["reRankModels"]
        using_rerank = using_rerank and bool(rerank_models)
        vector_hits, word_hits = await asyncio.gather(
            self.recall_vectors(caller, dataset_ids, vector_model, text, by_vector), self.recall_words(caller, dataset_ids, text, by_words)
        )
        ranked: list[dict[str, Any]] = []
        if using_rerank:
            known = {item["id"] for item in vector_hits}
            candidates = drop_same(vector_hits + [item for item in word_hits if item["id"] not in known])
            pairs = [(item["id"], f"{item['q']}\n{item['a']}") for item in candidates]
            scores = await self.gateway.rerank(rerank_models[0], text, pairs) if rerank_models[0].get("requestUrl") else []
            by_id = {item["id"]: item for item in candidates}
            ranked = [
                {**by_id[key], "score": [{"type": "reRank", "value": value, "index": index}]}
                for index, (key, value) in enumerate(scores)
                if key in by_id
            ]
            if not scores and self.rules.new_rerank:
                using_rerank = False  # 4.6.8 goes on saying that it reranked
        k_vector, k_words, k_rerank = self.rules.rank_constants
        items = drop_same(fuse([(k_vector, vector_hits), (k_words, word_hits), (k_rerank, ranked)]))
        kind = "reRank" if using_rerank else "embedding" if mode == "embedding" else ""
        if kind:
            items = [item for item in items if (score := score_of(item, kind)) is None or score >= similarity]
        return {
            "items": fit_tokens(items, limit), "searchMode": mode, "limit": limit, "similarity": similarity,
            "usingReRank": using_rerank, "usingSimilarityFilter": bool(kind),
        }  # fmt: skip

    async def shape(self, row: Document, kind: str, value: float, index: int) -> dict[str, Any]:
        collection = await self.mongo.collection("dataset.collections").find_one({"_id": row["collectionId"]}, {"name": 1})
        return {
            "id": str(row["_id"]), "q": row["q"], "a": row["a"], "chunkIndex": row["chunkIndex"], "datasetId": str(row["datasetId"]),
            "collectionId": str(row["collectionId"]), "sourceName": (collection or {}).get("name", ""), "sourceId": None,
            "score": [{"type": kind, "value": value, "index": index}],
        }  # fmt: skip

    async def recall_vectors(self, caller: Caller, dataset_ids: list[ObjectId], vector_model: str, text: str, limit: int) -> list[dict[str, Any]]:
        """The question is embedded in every mode, as the real server does it."""
        vector = await self.gateway.embed(find_model(self.config["vectorModels"], vector_model), text, "query")
        if not limit:
            return []
        ef_search = (self.config.get("systemEnv") or {}).get("pgHNSWEfSearch") or 100
        hits = dict(await self.vectors.search(vector, str(caller.team), [str(item) for item in dataset_ids], limit, ef_search))
        where = {"teamId": caller.team, "datasetId": {"$in": dataset_ids}, "indexes.dataId": {"$in": list(hits)}}
        rows = [(max(hits.get(item["dataId"], -1e9) for item in row["indexes"]), row) async for row in self.mongo.collection("dataset.datas").find(where)]
        rows.sort(key=lambda pair: -pair[0])
        return [await self.shape(row, "embedding", score, index) for index, (score, row) in enumerate(rows)]

    async def recall_words(self, caller: Caller, dataset_ids: list[ObjectId], text: str, limit: int) -> list[dict[str, Any]]:
        words = search_words(text)
        if not limit or not words:
            return []
        rows: list[Document] = []
        for dataset_id in dataset_ids:
            where = {"teamId": caller.team, "datasetId": dataset_id, "$text": {"$search": words}}
            cursor = self.mongo.collection("dataset.datas").find(where, {"score": {"$meta": "textScore"}, "indexes": 0, "fullTextToken": 0})
            rows += [row async for row in cursor.sort([("score", {"$meta": "textScore"})]).limit(limit)]
        rows.sort(key=lambda row: -row["score"])
        return [await self.shape(row, "fullText", row["score"], index) for index, row in enumerate(rows[:limit])]

    # -- apps ------------------------------------------------------------------------------------------------------------

    async def find_app(self, caller: Caller, app_id: Any) -> Document:
        await self.mongo.ready("apps.findOne")
        row = await self.mongo.collection("apps").find_one({"_id": object_id(app_id, "apps"), "teamId": caller.team})
        if row is None:
            raise Named("appUnExist" if self.rules.workflow else "unAuthApp")
        return row

    async def app_create(self, request: web.Request, body: dict[str, Any]) -> Reply:
        modules = body.get("modules")
        if self.rules.workflow:
            if not body.get("name") or not body.get("type") or not isinstance(modules, list):
                raise Named("inheritPermissionError")
        elif not body.get("name", "APP") or not isinstance(modules, list):
            raise Fault("缺少参数")
        caller = await self.caller(request)
        apps = self.mongo.collection("apps")
        if not self.rules.new_rerank and await apps.count_documents({"teamId": caller.team}) >= 50:
            raise Fault("每个团队上限 50 个应用")
        if self.rules.workflow and "app_versions" not in await self.mongo.db.list_collection_names():
            # On a virgin database the transaction makes this collection and collides with its index: the first app fails.
            await self.mongo.db["app_versions"].create_index([("appId", 1)])
            if os.environ.get("FASTGPT_STANDIN_NO_RACE") != "1":
                raise Fault(WRITE_CONFLICT)
        row = {
            "name": body.get("name", "APP"), "type": body.get("type") or "advanced", "avatar": body.get("avatar") or "/icon/logo.svg",
            "intro": body.get("intro") or "", "teamId": caller.team, "tmbId": caller.member, "modules": modules, "edges": body.get("edges") or [],
            "parentId": None, "version": "v2" if self.rules.workflow else "v1", "permission": "private", "updateTime": now(),
        }  # fmt: skip
        made = await apps.insert_one(row)
        if self.rules.workflow:
            await self.mongo.db["app_versions"].insert_one({"appId": str(made.inserted_id), "nodes": modules, "edges": row["edges"], "time": now()})
        return str(made.inserted_id)

    async def app_list(self, request: web.Request, body: dict[str, Any]) -> Reply:
        caller = await self.caller(request)
        where: Document = {"teamId": caller.team}
        if self.rules.workflow and body.get("searchKey"):
            where["name"] = {"$regex": str(body["searchKey"]), "$options": "i"}
        rows = self.mongo.collection("apps").find(where, {"modules": 0, "edges": 0}).sort("updateTime", -1)
        return [{**plain(row), "isOwner": True} async for row in rows]

    async def app_detail(self, request: web.Request, body: dict[str, Any]) -> Reply:
        caller = await self.caller(request)
        return dict(plain(await self.find_app(caller, request.query.get("appId") or request.query.get("id"))))

    async def app_delete(self, request: web.Request, body: dict[str, Any]) -> Reply:
        if not request.query.get("appId"):
            raise Fault("参数错误")
        caller = await self.caller(request)
        row = await self.find_app(caller, request.query["appId"])
        for name in ("chatitems", "chat"):
            await self.mongo.collection(name).delete_many({"appId": row["_id"]})
        await self.mongo.db["app_versions"].delete_many({"appId": str(row["_id"])})
        await self.mongo.collection("apps").delete_one({"_id": row["_id"]})
        return None

    # -- OpenAI-like routes ----------------------------------------------------------------------------------------------

    async def embeddings(self, request: web.Request, body: dict[str, Any]) -> Reply:
        text = body.get("input")
        if not isinstance(text, (list, str)):
            raise Fault("input is nor array or string")
        await self.caller(request, key=True)
        first = (text[0] if text else "") if isinstance(text, list) else text
        vector = await self.gateway.embed(find_model(self.config["vectorModels"], body.get("model")), str(first), str(body.get("type") or ""))
        used = count_tokens(str(first))
        return web.json_response(
            {
                "object": "list", "data": [{"object": "embedding", "index": 0, "embedding": vector}], "model": body.get("model"),
                "usage": {"prompt_tokens": used, "total_tokens": used},
            }
        )  # fmt: skip

    async def rerank(self, request: web.Request, body: dict[str, Any]) -> Reply:
        await self.caller(request, key=True, token=False)
        pairs = [(str(item["id"]), str(item["text"])) for item in (body.get("inputs") or [])[:150]]
        models = self.config["reRankModels"]
        scores = await self.gateway.rerank(models[0] if models else None, str(body.get("query") or ""), pairs)
        return [{"id": key, "score": score} for key, score in scores]

    async def completions(self, request: web.Request, body: dict[str, Any]) -> Reply:
        stream, detail = bool(body.get("stream")), bool(body.get("detail"))
        if not stream:
            return await self.answer(request, body, detail, None)
        out = web.StreamResponse(
            headers={
                "Content-Type": "text/event-stream;charset=utf-8", "Access-Control-Allow-Origin": "*", "X-Accel-Buffering": "no",
                "Cache-Control": "no-cache, no-transform",
            }
        )  # fmt: skip
        await out.prepare(request)
        try:
            await self.answer(request, body, detail, out)
        except (Named, Fault, GatewayError, PyMongoError, ValueError) as exc:
            # HTTP 200 is out already: the fault goes into the stream.
            log(f"sse error: {exc}")
            name = str(exc)
            if isinstance(exc, Named) and name in NAMED:
                fault: dict[str, Any] = {"code": NAMED[name][0], "statusText": name, "message": NAMED[name][1], "data": None}
            else:
                fault = {"message": exc.streamed if isinstance(exc, GatewayError) else name}
            await out.write(f"event: error\ndata: {dumps(fault)}\n\n".encode())
        await out.write_eof()
        return out

    async def app_of(self, request: web.Request, body: dict[str, Any]) -> tuple[Caller, Document]:
        caller = await self.caller(request, key=True)
        if caller.kind == "apikey" and not caller.app_id:
            raise Fault("Key is error. You need to use the app key rather than the account key.")
        app_id = caller.app_id if caller.kind == "apikey" else body.get("appId")
        if not app_id:
            raise Fault("appId is empty")
        if caller.kind != "apikey":
            return caller, await self.find_app(caller, app_id)
        row = await self.mongo.collection("apps").find_one({"_id": object_id(app_id, "apps")})
        if row is None:
            raise Fault("app is empty")
        return caller, row

    async def answer(self, request: web.Request, body: dict[str, Any], detail: bool, out: web.StreamResponse | None) -> Reply:
        messages = body.get("messages", [])
        if not isinstance(messages, list):
            raise Fault("messages is not array")
        caller, app = await self.app_of(request, body)
        if not messages:
            raise Fault("messages is empty")
        asked = list(messages)
        if asked[-1].get("role") != "user":
            asked.pop()
        if not asked:
            raise Fault("Question is empty")
        question = text_of(asked.pop().get("content"))
        chat_id = body.get("chatId")
        history = await self.history(app, chat_id) + [{"role": item.get("role"), "content": text_of(item.get("content"))} for item in asked]
        sink = Sink(out, detail, self.rules.workflow)
        steps = self.steps(caller, history, sink)
        variables = {**(body.get("variables") or {}), "cTime": time.strftime("%Y-%m-%d %H:%M:%S")}
        if app.get("version") == "v2":
            outcome = await run_v2(app["modules"], app.get("edges") or [], question, variables, steps)
        else:
            outcome = await run_v1(app["modules"], question, variables, steps)
        if chat_id:
            await self.save_chat(caller, app, str(chat_id), question, outcome)
        if out is not None:
            await sink.text(None, "stop")
            await sink.send("[DONE]", "answer")
            if detail:
                await sink.send(dumps(outcome.responses), "flowResponses" if self.rules.workflow else "appStreamResponse")
            return out
        extra: dict[str, Any] = {"responseData": outcome.responses} if detail else {}
        if detail and self.rules.workflow:
            extra["newVariables"] = body.get("variables") or {}
        choice = {"message": {"role": "assistant", "content": outcome.answer}, "finish_reason": "stop", "index": 0}
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 1}
        return web.json_response({**extra, "id": chat_id or "", "model": "", "usage": usage, "choices": [choice]}, dumps=dumps)

    async def history(self, app: Document, chat_id: Any) -> list[dict[str, Any]]:
        if not chat_id:
            return []
        rows = [row async for row in self.mongo.collection("chatitems").find({"appId": app["_id"], "chatId": str(chat_id)}).sort("_id", -1).limit(30)]
        return [{"role": "user" if row["obj"] == "Human" else "assistant", "content": row["value"]} for row in reversed(rows)]

    async def save_chat(self, caller: Caller, app: Document, chat_id: str, question: str, outcome: Outcome) -> None:
        common = {"appId": app["_id"], "chatId": chat_id, "teamId": caller.team, "tmbId": caller.member, "time": now()}
        rows: list[Document] = [{**common, "obj": "Human", "value": question}, {**common, "obj": "AI", "value": outcome.answer}]
        await self.mongo.collection("chatitems").insert_many(rows)
        await self.mongo.collection("chat").update_one(
            {"appId": app["_id"], "chatId": chat_id},
            {"$set": {"title": question[:20], "updateTime": now(), "teamId": caller.team, "tmbId": caller.member}},
            upsert=True,
        )

    def steps(self, caller: Caller, history: list[dict[str, Any]], sink: Sink) -> Steps:
        async def search(params: dict[str, Any]) -> list[dict[str, Any]]:
            ids = [object_id(item.get("datasetId"), "datasets") for item in params["datasets"]]
            first = await self.mongo.collection("datasets").find_one({"_id": ids[0]}, {"vectorModel": 1})
            named = (params["datasets"][0].get("vectorModel") or {}).get("model")
            model = (first or {}).get("vectorModel") if self.rules.workflow else named
            found = await self.search(
                caller, ids, model or "", params["userChatInput"], params.get("limit") or 1500, params.get("similarity") or 0,
                params.get("searchMode"), bool(params.get("usingReRank")),
            )  # fmt: skip
            items: list[dict[str, Any]] = found["items"]
            return items

        async def chat(params: dict[str, Any]) -> str:
            model = find_model(self.config["llmModels"], params.get("model"))
            if model is None:
                raise Fault("The chat model is undefined, you need to select a chat model.")
            request_messages = chat_messages(self.rules, model, params, history)
            limit = max_tokens(self.rules, model, params, request_messages)
            streaming = sink.out is not None and params.get("isResponseAnswerText") is not False
            request_body = self.gateway.chat_body(model, params, request_messages, limit, streaming)
            if not streaming:
                return await self.gateway.chat(request_body)
            answer = ""
            async for piece in self.gateway.chat_stream(request_body):
                answer += piece
                await sink.text(piece)
            if not answer:
                raise Fault("LLM model response empty" if self.rules.workflow else "core.chat.Chat API is error or undefined")
            return answer

        async def say(text: str) -> None:
            if sink.out is not None:
                await sink.text(text)

        async def announce(name: str) -> None:
            if sink.out is not None and sink.detail:
                await sink.send(dumps({"status": "running", "name": name}), "flowNodeStatus" if self.rules.workflow else "moduleStatus")

        return Steps(search, chat, say, announce)


class Sink:
    """Server-sent events; without detail they carry no event names."""

    def __init__(self, out: web.StreamResponse | None, detail: bool, workflow: bool) -> None:
        self.out, self.detail, self.workflow = out, detail, workflow

    async def send(self, data: str, event: str) -> None:
        assert self.out is not None
        await self.out.write((f"event: {event}\n" if self.detail else "").encode() + f"data: {data}\n\n".encode())

    async def text(self, text: str | None, finish: str | None = None) -> None:
        delta: dict[str, Any] = {} if text is None else {"role": "assistant", "content": text}
        chunk = {"id": "", "object": "", "created": 0, "model": "", "choices": [{"delta": delta, "index": 0, "finish_reason": finish}]}
        await self.send(dumps(chunk), "answer")


def text_of(content: Any) -> str:
    if isinstance(content, list):
        return "\n".join(str(part.get("text") or "") for part in content if isinstance(part, dict) and part.get("type") == "text")
    return "" if content is None else str(content)


def chat_messages(rules: Rules, model: dict[str, Any], params: dict[str, Any], history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """System prompt if there is one, history, and the question inside the retrieved passages where the graph has a search."""
    quotes = fit_tokens(params.get("quoteQA") or [], model.get("quoteMaxToken") or 1e9) if params.get("quoteQA") else []
    template = params.get("quoteTemplate") or "{{q}}\n{{a}}"
    text = "\n------\n".join(
        template.replace("{{q}}", item["q"]).replace("{{a}}", item.get("a") or "").replace("{{source}}", item.get("sourceName") or "").strip()
        for item in quotes
    )
    question = params["userChatInput"]
    if text or (rules.workflow and params.get("quoteQA") is not None):
        prompt = params.get("quotePrompt") or QUOTE_PROMPT
        question = prompt.replace("{{quote}}", text).replace("{{question}}", question)
    keep = params.get("history")
    rounds = int(keep) if isinstance(keep, (int, float)) else 6
    past = history[-rounds * 2 :] if rounds else []
    system = [model.get("defaultSystemChatPrompt"), params.get("systemPrompt")]
    return [*({"role": "system", "content": item} for item in system if item), *past, {"role": "user", "content": question}]


def max_tokens(rules: Rules, model: dict[str, Any], params: dict[str, Any], messages: list[dict[str, Any]]) -> int:
    wanted = int(min(params.get("maxToken") or 4000, model.get("maxResponse") or 4000))
    used = sum(count_tokens(item["content"]) + 4 for item in messages)
    context = model.get("maxContext") or 4096
    limit = context - used if used + wanted > context else wanted
    return 200 if limit <= 0 and rules.workflow else int(limit)
