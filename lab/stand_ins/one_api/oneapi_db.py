# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The databases of the One-API stand-in: SQLite, MySQL and PostgreSQL, told apart by SQL_DSN exactly as the real server does.

Statements are written once, with ? for values and `name` for names; here they become what each database reads. A statement
runs in the event loop: what a lost database costs is one time-out, and the connection is then made anew.
"""

from __future__ import annotations

import contextlib
import os
import re
import sqlite3
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import unquote

import psycopg
import pymysql
from psycopg.rows import dict_row

CONNECT_SECONDS, STATEMENT_SECONDS = 5, 10
Row = dict[str, Any]
DatabaseFault = (sqlite3.Error, pymysql.MySQLError, psycopg.Error)
_MYSQL_DSN = re.compile(
    r"(?:(?P<user>[^:@]*)(?::(?P<password>.*))?@)?"
    r"(?:(?P<net>[a-z0-9]+)(?:\((?P<address>[^)]*)\))?)?/(?P<name>[^/?]*)(?:\?(?P<options>.*))?"
)


def fault_text(exc: Exception) -> str:
    """An error as the real server's driver words it."""
    if isinstance(exc, pymysql.MySQLError) and len(exc.args) > 1:
        if isinstance(exc, (pymysql.OperationalError, pymysql.InterfaceError)) and exc.args[0] in (0, 2003, 2006, 2013):
            return f"dial tcp: {exc.args[1]}" if exc.args[0] == 2003 else "invalid connection"
        return f"Error {exc.args[0]} ({'23000' if exc.args[0] in (1062, 1048) else '42000' if exc.args[0] == 1064 else 'HY000'}): {exc.args[1]}"
    if isinstance(exc, psycopg.Error) and exc.diag.message_primary:
        return f"{exc.diag.severity}: {exc.diag.message_primary} (SQLSTATE {exc.diag.sqlstate})"
    return str(exc).strip()


class Sqlite:
    name = "sqlite"
    random = "RANDOM()"
    types = {"serial": "integer PRIMARY KEY AUTOINCREMENT", "bool": "numeric", "text": "text", "name": "text", "key": "char(48)", "access": "char(32)"}

    def __init__(self, path: str) -> None:
        self.link = sqlite3.connect(path, isolation_level=None)
        self.link.row_factory = sqlite3.Row
        self.link.executescript("PRAGMA synchronous=OFF; PRAGMA busy_timeout=3000;")

    @staticmethod
    def read(sql: str) -> str:
        return sql

    def run(self, sql: str, args: tuple[Any, ...]) -> tuple[list[Row], int, int]:
        cursor = self.link.execute(sql, args)
        rows = [dict(row) for row in cursor.fetchall()] if cursor.description else []
        return rows, cursor.rowcount, int(cursor.lastrowid or 0)

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        self.link.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self.link.execute("ROLLBACK")
            raise
        self.link.execute("COMMIT")


class Server:
    """What MySQL and PostgreSQL have in common: a connection that comes and goes."""

    link: Any = None
    lost: tuple[type[Exception], ...] = ()
    open: Callable[[], Any]

    def __init__(self) -> None:
        self.inside = False  # a transaction: a statement of it is not tried again
        self.connection()

    def connection(self) -> Any:
        if self.link is None:
            self.link = self.open()
        return self.link

    def drop(self) -> None:
        if self.link is not None:
            with contextlib.suppress(Exception):
                self.link.close()
        self.link = None

    def gone(self, exc: Exception) -> bool:
        """Whether the connection, and not the statement, is at fault."""
        raise NotImplementedError

    def attempt(self, sql: str, args: tuple[Any, ...]) -> tuple[list[Row], int, int]:
        raise NotImplementedError

    def run(self, sql: str, args: tuple[Any, ...]) -> tuple[list[Row], int, int]:
        """A pooled connection that the server closed meanwhile is replaced once, as database/sql does; an unanswered one is not."""
        fresh = self.link is None
        try:
            return self.attempt(sql, args)
        except DatabaseFault as exc:
            if not self.gone(exc):
                raise
            self.drop()
            if fresh or self.inside or "timed out" in str(exc):
                raise
        try:
            return self.attempt(sql, args)
        except DatabaseFault as exc:
            if self.gone(exc):
                self.drop()
            raise

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        self.run("SELECT 1", ())  # so that a connection lost while it was idle is replaced before anything depends on it
        self.inside = True
        try:
            self.run("BEGIN", ())
            try:
                yield
            except BaseException:
                with contextlib.suppress(*DatabaseFault):
                    self.run("ROLLBACK", ())
                raise
            self.run("COMMIT", ())
        finally:
            self.inside = False


class Mysql(Server):
    name = "mysql"
    random = "RAND()"
    types = {"serial": "bigint AUTO_INCREMENT PRIMARY KEY", "bool": "tinyint(1)", "text": "longtext", "name": "varchar(191)", "key": "char(48)",
             "access": "char(32)"}

    def __init__(self, dsn: str) -> None:
        found = _MYSQL_DSN.fullmatch(dsn)
        if not found or found["net"] not in (None, "", "tcp") or found["address"] is None and "@" in dsn and found["net"]:
            raise pymysql.OperationalError(0, "invalid DSN: missing the slash separating the database name")
        host, _colon, port = (found["address"] or "127.0.0.1:3306").rpartition(":")
        self.words = {"host": host or port, "port": int(port) if host else 3306, "user": found["user"] or "", "password": found["password"] or "",
                      "database": unquote(found["name"])}
        super().__init__()

    def open(self) -> Any:  # type: ignore[override]
        # FOUND_ROWS is not asked for, as the real driver does not: an UPDATE that changes nothing counts 0 rows.
        return pymysql.connect(**self.words, charset="utf8mb4", autocommit=True, connect_timeout=CONNECT_SECONDS, read_timeout=STATEMENT_SECONDS,
                               write_timeout=STATEMENT_SECONDS, cursorclass=pymysql.cursors.DictCursor)

    def gone(self, exc: Exception) -> bool:
        return isinstance(exc, (pymysql.OperationalError, pymysql.InterfaceError)) and exc.args[:1] and exc.args[0] in (0, 2003, 2006, 2013, 1053, 1927)

    @staticmethod
    def read(sql: str) -> str:
        return sql.replace("%", "%%").replace("?", "%s")

    def attempt(self, sql: str, args: tuple[Any, ...]) -> tuple[list[Row], int, int]:
        with self.connection().cursor() as cursor:
            count = cursor.execute(sql, args or None) if args else cursor.execute(sql.replace("%%", "%"))
            return [dict(row) for row in cursor.fetchall()] if cursor.description else [], int(count), int(cursor.lastrowid or 0)


class Postgres(Server):
    name = "postgres"
    random = "RANDOM()"
    types = {"serial": "bigserial PRIMARY KEY", "bool": "boolean", "text": "text", "name": "text", "key": "char(48)", "access": "char(32)"}

    def __init__(self, dsn: str) -> None:
        self.dsn = dsn
        super().__init__()

    def open(self) -> Any:  # type: ignore[override]
        # Idle connections are kept alive briskly, else one to a host that vanished would be waited for until the kernel gives up.
        return psycopg.connect(self.dsn, autocommit=True, connect_timeout=CONNECT_SECONDS, row_factory=dict_row, prepare_threshold=None,
                               options=f"-c statement_timeout={STATEMENT_SECONDS * 1000}", tcp_user_timeout=STATEMENT_SECONDS * 1000)

    def gone(self, exc: Exception) -> bool:
        return self.link is None or self.link.closed or self.link.broken

    @staticmethod
    def read(sql: str) -> str:
        return sql.replace("%", "%%").replace("?", "%s").replace("`", '"')

    def attempt(self, sql: str, args: tuple[Any, ...]) -> tuple[list[Row], int, int]:
        wants_id = sql.startswith("INSERT INTO ") and '"id"' not in sql and not sql.startswith(("INSERT INTO abilities", "INSERT INTO options"))
        with self.connection().cursor() as cursor:
            cursor.execute((sql + " RETURNING id" if wants_id else sql) if args else sql.replace("%%", "%"), args or None)
            rows = [dict(row) for row in cursor.fetchall()] if cursor.description else []
            count = cursor.rowcount
        # char(n) comes back filled up with blanks, which the real schema's clients never see either
        rows = [{name: value.rstrip(" ") if name in ("key", "access_token") and isinstance(value, str) else value for name, value in row.items()}
                for row in rows]
        return rows, count, int(rows[0]["id"]) if wants_id and rows else 0


def open_database(log: Callable[[str], None]) -> Sqlite | Mysql | Postgres:
    """Only the exact prefix postgres:// means PostgreSQL; any other text is MySQL's."""
    dsn = os.environ.get("SQL_DSN") or ""
    if not dsn:
        log("SQL_DSN not set, using SQLite as database")
        return Sqlite((os.environ.get("SQLITE_PATH") or "one-api.db").partition("?")[0])
    if dsn.startswith("postgres://"):
        log("using PostgreSQL as database")
        return Postgres(dsn)
    log("using MySQL as database")
    return Mysql(dsn)
