# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""MongoDB and PostgreSQL of the FastGPT stand-in: lazy connection, first boot with its race, vectors.

Written from the recorded contract. Collections, table and index are those of the real one, so that checks from outside
(replica set, extension, HNSW index) mean something.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import sys
import time
from collections.abc import Awaitable, Callable
from datetime import datetime, timezone
from typing import Any, TypeVar

import psycopg
from bson import ObjectId
from fastgpt_rules import Rules
from pymongo import ASCENDING, TEXT, AsyncMongoClient
from pymongo.asynchronous.client_session import AsyncClientSession
from pymongo.asynchronous.collection import AsyncCollection
from pymongo.asynchronous.database import AsyncDatabase
from pymongo.errors import ConnectionFailure, OperationFailure, PyMongoError

SELECTION_SECONDS = 30
BUFFER_SECONDS = 10
TABLE = "modeldata"
WRITE_CONFLICT = "WriteConflict error: this operation conflicted with another operation. Please retry your operation or multi-document transaction."

Result = TypeVar("Result")
Document = dict[str, Any]


class Fault(Exception):
    """An ordinary error: HTTP 500 with this text."""


def log(*words: object) -> None:
    print(*words, flush=True)


def die(*words: object) -> None:
    """process.exit(1): no answer goes out any more."""
    log(*words)
    sys.stdout.flush()
    os._exit(1)


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def now() -> datetime:
    return datetime.now(timezone.utc)


def object_id(text: Any, model: str) -> ObjectId:
    try:
        return ObjectId(str(text))
    except Exception as exc:
        raise Fault(f'Cast to ObjectId failed for value "{text}" (type string) at path "_id" for model "{model}"') from exc


class Mongo:
    """The driver follows the set's own member names and keeps trying for ever."""

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.client: AsyncMongoClient[Document] | None = None
        self.connected = asyncio.Event()
        self.member = False  # of a replica set; a standalone server refuses the transactions
        self.selection_seconds = float(os.environ.get("FASTGPT_STANDIN_SELECTION_SECONDS") or SELECTION_SECONDS)

    @property
    def db(self) -> AsyncDatabase[Document]:
        assert self.client is not None
        return self.client.get_default_database("test")

    async def ready(self, operation: str) -> None:
        """Operations are buffered for ten seconds while there is no connection."""
        try:
            await asyncio.wait_for(self.connected.wait(), BUFFER_SECONDS)
        except TimeoutError as exc:
            raise Fault(f"Operation `{operation}()` buffering timed out after {BUFFER_SECONDS * 1000}ms") from exc

    def collection(self, name: str) -> AsyncCollection[Document]:
        return self.db[self.rules.collection(name)]

    async def connect_once(self) -> None:
        uri = os.environ.get("MONGODB_URI", "")
        links = max(30, int(os.environ.get("DB_MAX_LINK") or 20))
        if self.client is not None:
            await self.client.close()
        self.client = AsyncMongoClient(
            uri, serverSelectionTimeoutMS=int(self.selection_seconds * 1000), connectTimeoutMS=60000, socketTimeoutMS=60000, maxPoolSize=links
        )
        await self.client.admin.command("ping")
        hello = await self.client.admin.command("hello")
        if not hello.get("isWritablePrimary") and not hello.get("setName"):
            raise ConnectionFailure("topology type Unknown")
        self.member = bool(hello.get("setName"))
        self.connected.set()

    async def connect(self, first_try: Callable[[], None]) -> None:
        """Until it works; `first_try` is told when the first attempt is over, well or not."""
        while True:
            log("mongo start connect")
            try:
                await self.connect_once()
                log("mongo connected")
                return
            except OperationFailure as exc:
                log(f"error-> mongo connect error MongoServerError: {exc.details.get('errmsg', exc) if exc.details else exc}")
            except (PyMongoError, ValueError) as exc:
                log(
                    f"error-> mongo connect error MongooseServerSelectionError: Server selection timed out after "
                    f"{int(self.selection_seconds * 1000)} ms",
                    f"(ReplicaSetNoPrimary or Unknown: {str(exc).partition(', Timeout:')[0]})",
                )
            finally:
                first_try()
            await asyncio.sleep(1)

    async def transaction(self, work: Callable[[AsyncClientSession], Awaitable[Result]]) -> Result:
        assert self.client is not None
        async with self.client.start_session() as session, await session.start_transaction():
            return await work(session)

    async def make_indexes(self) -> None:
        """What syncIndexes() of the models makes; on an empty database it is this that the root user's creation collides with."""
        single = [("users", "username"), ("teams", "ownerId"), ("team.members", "teamId"), ("openapis", "apiKey"), ("openapis", "teamId")]
        single += [("datasets", "teamId"), ("dataset.collections", "datasetId"), ("dataset.datas", "updateTime"), ("apps", "teamId"), ("chat", "chatId")]
        for name, key in single:
            await self.collection(name).create_index([(key, ASCENDING)], unique=name == "users")
        datas = self.collection("dataset.datas")
        await datas.create_index([("teamId", ASCENDING), ("datasetId", ASCENDING), ("fullTextToken", TEXT)], default_language="none")
        await datas.create_index([("teamId", ASCENDING), ("datasetId", ASCENDING), ("indexes.dataId", ASCENDING)])

    async def init_root(self) -> None:
        """DEFAULT_ROOT_PSW becomes the root user's password at every start."""
        empty = not await self.db.list_collection_names()
        await self.make_indexes()
        if empty and self.member and os.environ.get("FASTGPT_STANDIN_NO_RACE") != "1":
            for _attempt in range(self.rules.race_retries):
                await asyncio.sleep(0.2)
                log("retry init root user")
            if self.rules.race_kills:
                die(f"init root user error MongoServerError: {WRITE_CONFLICT}")
        password = os.environ.get("DEFAULT_ROOT_PSW") or "123456"
        stored = sha256(sha256(password))

        async def work(session: AsyncClientSession) -> None:
            users, teams, members = (self.collection(name) for name in ("users", "teams", "team.members"))
            root = await users.find_one({"username": "root"}, session=session)
            if root:
                await users.update_one({"_id": root["_id"]}, {"$set": {"password": stored}}, session=session)
                root_id = root["_id"]
            else:
                made = await users.insert_one(
                    {"username": "root", "password": stored, "status": "active", "timezone": "Asia/Shanghai", "createTime": now()}, session=session
                )
                root_id = made.inserted_id
            if not await members.find_one({"userId": root_id}, session=session):
                log(f"create default team {root_id}")
                team = await teams.insert_one({"name": "My Team", "ownerId": root_id, "createTime": now()}, session=session)
                await members.insert_one(
                    {"teamId": team.inserted_id, "userId": root_id, "name": "Owner", "role": "owner", "status": "active", "defaultTeam": True},
                    session=session,
                )

        try:
            await self.transaction(work)
        except PyMongoError as exc:
            text = (exc.details or {}).get("errmsg", str(exc)) if isinstance(exc, OperationFailure) else str(exc)
            die(f"init root user error MongoServerError: {text}")
        log(f"root user init: {{ username: 'root', password: '{password}' }}")


class Vectors:
    """PostgreSQL. A lost connection is made again without a word."""

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.url = os.environ.get("PG_URL", "")
        self.link: psycopg.AsyncConnection[tuple[Any, ...]] | None = None
        self.lock = asyncio.Lock()

    async def connection(self) -> psycopg.AsyncConnection[tuple[Any, ...]]:
        if self.link is None or self.link.closed or self.link.broken:
            self.link = await psycopg.AsyncConnection.connect(self.url, autocommit=True, connect_timeout=10)
        return self.link

    async def run(self, work: Callable[[psycopg.AsyncConnection[tuple[Any, ...]]], Awaitable[Result]], retries: int = 2) -> Result:
        """One caller at a time on one connection; a broken one is replaced and the work tried again."""
        async with self.lock:
            for left in range(retries, -1, -1):
                try:
                    return await work(await self.connection())
                except psycopg.OperationalError as exc:
                    if self.link is not None:
                        await self.link.close()
                    self.link = None
                    if not left:
                        raise Fault(str(exc).strip().splitlines()[0]) from exc
                    await asyncio.sleep(0.5)
                except psycopg.Error as exc:
                    raise Fault((exc.diag.message_primary or str(exc)).strip()) from exc
        raise AssertionError("unreachable")

    async def init(self) -> None:
        """Tried until the server is there; only what SQL refuses is logged."""
        build = self.rules.hnsw_build

        async def work(link: psycopg.AsyncConnection[tuple[Any, ...]]) -> None:
            await link.execute("CREATE EXTENSION IF NOT EXISTS vector")
            await link.execute(
                f"CREATE TABLE IF NOT EXISTS {TABLE} (id BIGSERIAL PRIMARY KEY, vector VECTOR(1536) NOT NULL, team_id VARCHAR(50) NOT NULL,"
                " dataset_id VARCHAR(50) NOT NULL, collection_id VARCHAR(50) NOT NULL, createtime TIMESTAMP DEFAULT CURRENT_TIMESTAMP)"
            )
            await link.execute(
                f"CREATE INDEX CONCURRENTLY IF NOT EXISTS vector_index ON {TABLE} USING hnsw (vector vector_ip_ops)"
                f" WITH (m = 32, ef_construction = {build})"
            )
            if self.rules.workflow:
                await link.execute(
                    f"CREATE INDEX CONCURRENTLY IF NOT EXISTS team_dataset_collection_index ON {TABLE} USING btree (team_id, dataset_id, collection_id)"
                )
                await link.execute(f"CREATE INDEX CONCURRENTLY IF NOT EXISTS create_time_index ON {TABLE} USING btree (createtime)")

        while True:
            try:
                await self.run(work, retries=0)
                log("pg connected")
                log("[Info] init pg successful" if self.rules.version >= (4, 8, 4) else "init pg successful")
                return
            except Fault as exc:
                if isinstance(exc.__cause__, psycopg.OperationalError):
                    await asyncio.sleep(1)
                    continue
                log(f"init pg error {exc}")
                return

    async def insert(self, vector: list[float], team: str, dataset: str, collection: str) -> str:
        text = "[" + ",".join(repr(number) for number in vector) + "]"

        async def work(link: psycopg.AsyncConnection[tuple[Any, ...]]) -> str:
            cursor = await link.execute(
                f"INSERT INTO {TABLE} (vector, team_id, dataset_id, collection_id) VALUES (%s, %s, %s, %s) RETURNING id",
                (text, team, dataset, collection),
            )
            row = await cursor.fetchone()
            return str(row[0]) if row else ""

        return await self.run(work)

    async def search(self, vector: list[float], team: str, datasets: list[str], limit: int, ef_search: int) -> list[tuple[str, float]]:
        """(id, inner product), best first."""
        text = "[" + ",".join(repr(number) for number in vector) + "]"

        async def work(link: psycopg.AsyncConnection[tuple[Any, ...]]) -> list[tuple[str, float]]:
            async with link.transaction():
                await link.execute(f"SET LOCAL hnsw.ef_search = {int(ef_search)}")
                cursor = await link.execute(
                    f"SELECT id, vector <#> %s::vector AS score FROM {TABLE} WHERE team_id = %s AND dataset_id = ANY(%s) ORDER BY score LIMIT %s",
                    (text, team, datasets, limit),
                )
                return [(str(row[0]), -float(row[1])) for row in await cursor.fetchall()]

        return await self.run(work)

    async def delete(self, column: str, team: str, values: list[str]) -> None:
        assert column in ("dataset_id", "collection_id", "id")

        async def work(link: psycopg.AsyncConnection[tuple[Any, ...]]) -> None:
            await link.execute(f"DELETE FROM {TABLE} WHERE team_id = %s AND {column}::text = ANY(%s)", (team, values))

        await self.run(work)


def plain(value: Any) -> Any:
    """Documents as JSON: ids as text, times as Node writes them."""
    if isinstance(value, ObjectId):
        return str(value)
    if isinstance(value, datetime):
        return value.strftime("%Y-%m-%dT%H:%M:%S.") + f"{value.microsecond // 1000:03d}Z"
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def seconds_to_cron(minutes: int) -> float:
    """Until the next multiple of so many minutes on the clock."""
    step = minutes * 60
    return step - time.time() % step
