# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the One-API stand-in keeps in its database: users, tokens, channels with their abilities, options.

Written from the recorded contract. Column and constraint names are those of the real schema, because databases put them
into error texts that reach the client.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import os
import random
import re
import string
import time
import uuid
from collections.abc import Callable
from typing import Any

from oneapi_cache import Copies
from oneapi_db import DatabaseFault, Mysql, Postgres, Row, Sqlite
from oneapi_json import GoError, bind, decode, encode

NOT_FOUND = "record not found"
PAGE = 10

USER = {
    "id": "int", "username": "string", "password": "string", "display_name": "string", "role": "int", "status": "int",
    "email": "string", "github_id": "string", "wechat_id": "string", "lark_id": "string", "oidc_id": "string",
    "verification_code": "string", "access_token": "string", "quota": "int64", "used_quota": "int64",
    "request_count": "int", "group": "string", "aff_code": "string", "inviter_id": "int",
}  # fmt: skip
TOKEN = {
    "id": "int", "user_id": "int", "key": "string", "status": "int", "name": "string", "created_time": "int64",
    "accessed_time": "int64", "expired_time": "int64", "remain_quota": "int64", "unlimited_quota": "bool",
    "used_quota": "int64", "models": "*string", "subnet": "*string",
}  # fmt: skip
CHANNEL = {
    "id": "int", "type": "int", "key": "string", "status": "int", "name": "string", "weight": "*uint",
    "created_time": "int64", "test_time": "int64", "response_time": "int", "base_url": "*string", "other": "*string",
    "balance": "float64", "balance_updated_time": "int64", "models": "string", "group": "string", "used_quota": "int64",
    "model_mapping": "*string", "priority": "*int64", "config": "string", "system_prompt": "*string",
}  # fmt: skip
CHANNEL_DEFAULTS: dict[str, Any] = {"status": 1, "weight": 0, "base_url": "", "group": "default", "model_mapping": "", "priority": 0}

# {words}: what each database calls it (oneapi_db). Names with a default are short for MySQL, which indexes them.
SCHEMA = (
    """users (id {serial}, username {name}, password {text} NOT NULL,
  display_name {name}, role bigint DEFAULT 1, status bigint DEFAULT 1, email {name}, github_id {name}, wechat_id {name}, lark_id {name},
  oidc_id {name}, access_token {access}, quota bigint DEFAULT 0, used_quota bigint DEFAULT 0, request_count bigint DEFAULT 0,
  `group` varchar(32) DEFAULT 'default', aff_code varchar(32), inviter_id bigint, {users_unique})""",
    """tokens (id {serial}, user_id bigint, `key` {key}, status bigint DEFAULT 1,
  name {name}, created_time bigint, accessed_time bigint, expired_time bigint DEFAULT -1, remain_quota bigint DEFAULT 0,
  unlimited_quota {bool} DEFAULT false, used_quota bigint DEFAULT 0, models {text}, subnet varchar(191) DEFAULT '')""",
    """channels (id {serial}, type bigint DEFAULT 0, `key` {text}, status bigint DEFAULT 1,
  name {name}, weight bigint DEFAULT 0, created_time bigint, test_time bigint, response_time bigint, base_url varchar(191) DEFAULT '',
  other {text}, balance double precision, balance_updated_time bigint, models {text}, `group` varchar(32) DEFAULT 'default',
  used_quota bigint DEFAULT 0, model_mapping varchar(1024) DEFAULT '', priority bigint DEFAULT 0, config {text}, system_prompt {text})""",
    """abilities (`group` varchar(32), model {name}, channel_id bigint, enabled {bool}, priority bigint DEFAULT 0,
  PRIMARY KEY (`group`, model, channel_id))""",
    """options (`key` {name} PRIMARY KEY, value {text})""",
)
INDEXES = (
    ("UNIQUE INDEX", "idx_users_access_token", "users (access_token)"),
    ("UNIQUE INDEX", "idx_users_aff_code", "users (aff_code)"),
    ("UNIQUE INDEX", "idx_tokens_key", "tokens (`key`)"),
    ("INDEX", "idx_abilities_channel_id", "abilities (channel_id)"),
)
USERS_UNIQUE = {"sqlite": "UNIQUE (username)", "mysql": "CONSTRAINT uni_users_username UNIQUE (username)",
                "postgres": "CONSTRAINT uni_users_username UNIQUE (username)"}

# A small part of the built-in price list; only its presence matters (it comes back merged after a restart).
MODEL_RATIO: dict[str, float] = {
    "gpt-3.5-turbo": 0.25, "gpt-4": 15, "gpt-4o": 2.5, "gpt-4o-mini": 0.075, "text-embedding-ada-002": 0.05,
    "text-embedding-3-small": 0.01, "text-embedding-3-large": 0.065,
}  # fmt: skip
UNKNOWN_RATIO = 30.0

OPTIONS: dict[str, str] = {
    "PasswordLoginEnabled": "true", "PasswordRegisterEnabled": "true", "EmailVerificationEnabled": "false",
    "GitHubOAuthEnabled": "false", "OidcEnabled": "false", "WeChatAuthEnabled": "false", "TurnstileCheckEnabled": "false",
    "RegisterEnabled": "true", "AutomaticDisableChannelEnabled": "false", "AutomaticEnableChannelEnabled": "false",
    "ApproximateTokenEnabled": "false", "LogConsumeEnabled": "true", "DisplayInCurrencyEnabled": "true",
    "DisplayTokenStatEnabled": "true", "ChannelDisableThreshold": "5", "EmailDomainRestrictionEnabled": "false",
    "EmailDomainWhitelist": "gmail.com,163.com,126.com,qq.com,outlook.com,hotmail.com,icloud.com,yahoo.com,foxmail.com",
    "SMTPServer": "", "SMTPFrom": "", "SMTPPort": "587", "SMTPAccount": "", "SMTPToken": "", "Notice": "", "About": "",
    "HomePageContent": "", "Footer": "", "SystemName": "One API", "Logo": "", "ServerAddress": "", "GitHubClientId": "",
    "GitHubClientSecret": "", "WeChatServerAddress": "", "WeChatServerToken": "", "WeChatAccountQRCodeImageURL": "",
    "MessagePusherAddress": "", "MessagePusherToken": "", "TurnstileSiteKey": "", "TurnstileSecretKey": "",
    "QuotaForNewUser": "0", "QuotaForInviter": "0", "QuotaForInvitee": "0", "QuotaRemindThreshold": "1000",
    "PreConsumedQuota": "500", "GroupRatio": '{"default":1,"svip":1,"vip":1}',
    "CompletionRatio": '{"llama3-8b-8192(33)":2}', "TopUpLink": "", "ChatLink": "", "QuotaPerUnit": "500000",
    "RetryTimes": "0", "Theme": "default",
}  # fmt: skip


class Refused(Exception):
    """Becomes HTTP 200 with success:false and this text."""


def random_key() -> str:
    """48 characters: 16 random ones and a uuid in which every second letter is upper case."""
    head = "".join(random.choices(string.digits + string.ascii_letters, k=16))
    return head + "".join(c.upper() if i % 2 == 0 else c for i, c in enumerate(uuid.uuid4().hex))


def hash_password(password: str) -> str:
    salt = os.urandom(8).hex()
    return f"{salt}${hashlib.pbkdf2_hmac('sha256', password.encode(), salt.encode(), 1000).hex()}"


def password_matches(password: str, stored: str) -> bool:
    salt = stored.partition("$")[0]
    digest = hashlib.pbkdf2_hmac("sha256", password.encode(), salt.encode(), 1000).hex()
    return hmac.compare_digest(f"{salt}${digest}", stored)


def go_atoi(text: str) -> int:
    return int(text) if re.fullmatch(r"[+-]?[0-9]{1,18}", text) else 0


class Store:
    """One database, which may have other nodes' hands in it too. Statements run in the event loop, as they are short."""

    def __init__(self, db: Sqlite | Mysql | Postgres, log: Callable[[str], None], copies: Copies, *, master: bool = True) -> None:
        self.log, self.db, self.copies = log, db, copies
        self.banned: set[int] = set()
        self.routes_fail = False  # for tests: the second of a channel's two writes is refused
        self.options: dict[str, str] = {}
        self.model_ratio: dict[str, float] = {}
        self.group_ratio: dict[str, float] = {}
        self.completion_ratio: dict[str, float] = {}
        if master:
            self.log("database migration started")
            self._migrate()
            self.log("database migrated")
        # A node that is no master takes the tables as it finds them, and says nothing where there are none.
        with contextlib.suppress(DatabaseFault) if not master else contextlib.nullcontext():
            self._create_root()
        self._load_options()

    def _migrate(self) -> None:
        for table in SCHEMA:
            text = table.format(**self.db.types, users_unique=USERS_UNIQUE[self.db.name])
            self.execute(f"CREATE TABLE IF NOT EXISTS {text}")
        for kind, name, what in INDEXES:
            if self.db.name != "mysql":
                self.execute(f"CREATE {kind} IF NOT EXISTS {name} ON {what}")
                continue
            table = what.partition(" ")[0]
            there = "SELECT 1 AS found FROM information_schema.statistics WHERE table_schema = DATABASE() AND table_name = ? AND index_name = ?"
            if not self.rows(there, table, name):
                self.execute(f"CREATE {kind} {name} ON {what}")

    def transaction(self) -> contextlib.AbstractContextManager[None]:
        return self.db.transaction()

    def execute(self, sql: str, *args: Any) -> int:
        """How many rows it concerned."""
        return self.db.run(self.db.read(sql), args)[1]

    def rows(self, sql: str, *args: Any) -> list[Row]:
        return self.db.run(self.db.read(sql), args)[0]

    def row(self, sql: str, *args: Any) -> Row | None:
        found = self.rows(sql, *args)
        return found[0] if found else None

    def insert(self, table: str, values: dict[str, Any]) -> int:
        names = ", ".join(f"`{name}`" for name in values)
        marks = ", ".join("?" * len(values))
        return self.db.run(self.db.read(f"INSERT INTO {table} ({names}) VALUES ({marks})"), tuple(values.values()))[2] or int(values.get("id") or 0)

    def update(self, table: str, row_id: int, values: dict[str, Any]) -> None:
        if values:
            sets = ", ".join(f"`{name}` = ?" for name in values)
            self.execute(f"UPDATE {table} SET {sets} WHERE id = ?", *values.values(), row_id)

    def _create_root(self) -> None:
        if self.row("SELECT id FROM users LIMIT 1"):
            return
        self.log("no user exists, creating a root user for you: username is root, password is 123456")
        now = int(time.time())
        root = 0
        # What the database refuses here, such as an access token that is too long, is lost without a word.
        with contextlib.suppress(DatabaseFault):
            root = self.insert(
                "users",
                {
                    "username": "root", "password": hash_password("123456"), "role": 100, "status": 1, "display_name": "Root User",
                    "access_token": os.environ.get("INITIAL_ROOT_ACCESS_TOKEN") or uuid.uuid4().hex, "quota": 500000000000000,
                    "email": "", "github_id": "", "wechat_id": "", "lark_id": "", "oidc_id": "", "aff_code": "", "inviter_id": 0,
                },
            )  # fmt: skip
        key = os.environ.get("INITIAL_ROOT_TOKEN")
        if key:
            self.log("creating initial root token as requested")
            with contextlib.suppress(DatabaseFault):
                # With its id in the statement: PostgreSQL's sequence does not move, and the next token collides with this one.
                self.insert(
                    "tokens",
                    {
                        "id": 1, "user_id": root, "key": key, "status": 1, "name": "Initial Root Token", "created_time": now,
                        "accessed_time": now, "expired_time": -1, "remain_quota": 500000000000000, "unlimited_quota": True,
                    },
                )  # fmt: skip

    # -- options -----------------------------------------------------------------------------------------------------

    def _load_options(self) -> None:
        self.options = dict(OPTIONS, ModelRatio=encode(dict(sorted(MODEL_RATIO.items()))).decode())
        for name in ("ModelRatio", "GroupRatio", "CompletionRatio"):
            self._apply_option(name, self.options[name])
        self.reload_options()

    def reload_options(self) -> None:
        """At start and at each sync: stored values win; ModelRatio comes back with the built-in entries merged in.

        A database that does not answer leaves them as they are.
        """
        found: list[Row] = []
        with contextlib.suppress(DatabaseFault):
            found = self.rows("SELECT `key`, value FROM options")
        for row in found:
            value = row["value"]
            if row["key"] == "ModelRatio":
                with contextlib.suppress(GoError):
                    own = self._ratios(value)
                    value = encode(dict(sorted({**MODEL_RATIO, **own}.items()))).decode()
            self.options[row["key"]] = value
            with contextlib.suppress(GoError):
                self._apply_option(row["key"], value)

    def set_option(self, key: str, value: str) -> None:
        """Stored first, judged afterwards: a bad map is refused but stays."""
        if self.row("SELECT `key` FROM options WHERE `key` = ?", key):
            self.execute("UPDATE options SET value = ? WHERE `key` = ?", value, key)
        else:
            self.execute("INSERT INTO options (`key`, value) VALUES (?, ?)", key, value)
        self.options[key] = value
        self._apply_option(key, value)

    @staticmethod
    def _ratios(text: str) -> dict[str, float]:
        value = decode(text.encode(), whole=True)
        if not isinstance(value, dict):
            raise GoError("json: cannot unmarshal value into Go value of type map[string]float64")
        for item in value.values():
            if isinstance(item, bool) or not isinstance(item, (int, float)):
                raise GoError("json: cannot unmarshal string into Go value of type float64")
        return value

    def _apply_option(self, key: str, value: str) -> None:
        attribute = {"ModelRatio": "model_ratio", "GroupRatio": "group_ratio", "CompletionRatio": "completion_ratio"}.get(key)
        if attribute:
            setattr(self, attribute, {})
            setattr(self, attribute, self._ratios(value))

    def enabled(self, key: str) -> bool:
        return self.options.get(key) == "true"

    def number(self, key: str) -> int:
        return go_atoi(self.options.get(key, "0"))

    def ratio(self, model: str, channel_type: int) -> float:
        for name in (f"{model}({channel_type})", model):
            for table in (self.model_ratio, MODEL_RATIO):
                if name in table:
                    return table[name]
        self.log(f"model ratio not found: {model}")
        return UNKNOWN_RATIO

    # -- users -------------------------------------------------------------------------------------------------------

    @staticmethod
    def user(row: Row, *, password: bool = False) -> dict[str, Any]:
        names = set(row.keys())
        result = {name: row[name] if name in names else "" for name in USER}
        if not password:
            result["password"] = ""
        return {name: ("" if value is None and USER[name] == "string" else 0 if value is None else value) for name, value in result.items()}

    def user_by_id(self, user_id: int) -> Row:
        if user_id == 0:
            raise Refused("id 为空！")
        row = self.row("SELECT * FROM users WHERE id = ?", user_id)
        if row is None:
            raise Refused(NOT_FOUND)
        return row

    def add_user(self, username: str, password: str, display_name: str, email: str = "") -> int:
        user_id = self.insert(
            "users",
            {
                "username": username, "password": hash_password(password), "display_name": display_name, "role": 1, "status": 1,
                "email": email, "github_id": "", "wechat_id": "", "lark_id": "", "oidc_id": "", "inviter_id": 0,
                "access_token": uuid.uuid4().hex, "quota": self.number("QuotaForNewUser"), "aff_code": random_key()[:4],
            },
        )  # fmt: skip
        now = int(time.time())
        self.insert(
            "tokens",
            {
                "user_id": user_id, "name": "default", "key": random_key(), "status": 1, "created_time": now, "accessed_time": now,
                "expired_time": -1, "remain_quota": -1, "unlimited_quota": True, "subnet": "",
            },
        )  # fmt: skip
        return user_id

    def change_user(self, user_id: int, values: dict[str, Any]) -> None:
        """Zero values mean unchanged."""
        values = {name: value for name, value in values.items() if value and name not in ("id", "verification_code")}
        if "password" in values:
            values["password"] = hash_password(values["password"])
        if values.get("status") == 2:
            self.banned.add(user_id)
        elif values.get("status") == 1:
            self.banned.discard(user_id)
        self.update("users", user_id, values)

    # -- tokens ------------------------------------------------------------------------------------------------------

    @staticmethod
    def token(row: Row) -> dict[str, Any]:
        return {name: bool(row[name]) if kind == "bool" else row[name] for name, kind in TOKEN.items()}

    # -- channels ----------------------------------------------------------------------------------------------------

    @staticmethod
    def channel(row: Row, *, key: bool = False) -> dict[str, Any]:
        result = {name: row[name] if row[name] is not None or CHANNEL[name].startswith("*") else 0 for name in CHANNEL}
        if not key:
            result["key"] = ""
        return result

    def add_channels(self, body: dict[str, Any]) -> None:
        """One channel per line of the key, in one statement; the abilities follow outside of it, so they can be missing."""
        body = {**body, "created_time": int(time.time())}
        for name, value in CHANNEL_DEFAULTS.items():
            if not body[name] and body[name] != value:
                body[name] = value
        keys = [key for key in body["key"].split("\n") if key]
        if not keys:
            raise Refused("empty slice found")
        made: list[int] = []
        with self.transaction():
            for key in keys:
                values = {**body, "key": key}
                if not values["id"]:
                    del values["id"]
                made.append(self.insert("channels", values))
        for channel_id in made:
            self.add_abilities({**body, "id": channel_id})

    def _check_routes(self) -> None:
        if self.routes_fail:
            raise Refused("database is locked")

    def delete_channel(self, channel_id: int) -> None:
        """The row, then its abilities; no error where neither exists."""
        if not channel_id:
            raise Refused("WHERE conditions required")
        self.execute("DELETE FROM channels WHERE id = ?", channel_id)
        self._check_routes()
        self.execute("DELETE FROM abilities WHERE channel_id = ?", channel_id)

    def add_abilities(self, channel: dict[str, Any]) -> None:
        self._check_routes()
        rows = [
            (group, model, channel["id"], channel["status"] == 1, 0 if channel["priority"] is None else channel["priority"])
            for model in channel["models"].split(",")
            for group in channel["group"].split(",")
        ]
        with self.transaction():
            for row in rows:
                self.execute("INSERT INTO abilities (`group`, model, channel_id, enabled, priority) VALUES (?, ?, ?, ?, ?)", *row)

    def change_channel(self, body: dict[str, Any]) -> dict[str, Any]:
        """Plain zero values and null pointers mean unchanged. An unknown id is no error and leaves abilities behind."""
        if not body["id"]:
            raise Refused("WHERE conditions required")
        values = {
            name: value
            for name, value in body.items()
            if name != "id" and (value is not None if CHANNEL[name].startswith("*") else value)
        }
        self.update("channels", body["id"], values)
        row = self.row("SELECT * FROM channels WHERE id = ?", body["id"])
        channel = self.channel(row, key=True) if row else body
        self.execute("DELETE FROM abilities WHERE channel_id = ?", body["id"])
        self.add_abilities(channel)
        return channel

    def pick_channel(self, group: str, model: str, any_priority: bool = False) -> tuple[int, Row | None]:
        """(0, None): no ability; (id, None): an ability whose channel is gone."""
        where = "`group` = ? AND model = ? AND enabled = ?"
        args: tuple[Any, ...] = (group, model, True)
        if not any_priority:
            where += f" AND priority = (SELECT MAX(priority) FROM abilities WHERE {where})"
            args *= 2
        found = self.row(f"SELECT channel_id FROM abilities WHERE {where} ORDER BY {self.db.random} LIMIT 1", *args)
        if found is None:
            return 0, None
        return found["channel_id"], self.row("SELECT * FROM channels WHERE id = ?", found["channel_id"])

    def group_models(self, group: str) -> list[str]:
        rows = self.rows("SELECT DISTINCT model FROM abilities WHERE `group` = ? AND enabled = ?", group, True)
        return sorted(row["model"] for row in rows)


def bind_body(body: bytes, fields: dict[str, str], struct: str, package: str = "model") -> dict[str, Any]:
    """Read a request body into a struct; a fault becomes a refusal with Go's text."""
    try:
        return bind(decode(body), fields, struct, package)
    except GoError as exc:
        raise Refused(str(exc)) from exc


def model_mapping(text: str | None) -> dict[str, str]:
    """Invalid text is ignored at relay time."""
    try:
        value = json.loads(text or "{}")
    except ValueError:
        return {}
    return value if isinstance(value, dict) and all(isinstance(item, str) for item in value.values()) else {}
