# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Several nodes of One-API's stand-in on one database: MariaDB, PostgreSQL and Redis are real here."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest
from services import Service, docker
from test_one_api_stand_in import ACCESS, PROGRAM


def until(what, seconds=10):
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it did not become true"
        time.sleep(0.1)


def relay(api, key, model="m"):
    return api("POST", "/v1/embeddings", {"model": model, "input": "x"}, {"Authorization": f"Bearer sk-{key}"}, auth="")


def options(api):
    return {item["key"]: item["value"] for item in api.data("GET", "/api/option/")}


def start_alone(tmp_path, **env):
    """A start that is expected to end by itself."""
    env = {**os.environ, "ONE_API_STANDIN_NO_TIKTOKEN": "1", "PORT": "1", **env}
    return subprocess.run([sys.executable, str(PROGRAM)], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60, check=False)


def test_the_admin_api_is_the_same_on_every_database(node, database, upstream):
    kind, dsn = database
    api = node(SQL_DSN=dsn)
    key = api.data("POST", "/api/token/", {"name": "中文", "unlimited_quota": True, "models": "m,密"})["key"]
    assert api.data("GET", "/api/token/search?keyword=")[0] == {**api.data("GET", "/api/token/1"), "name": "中文", "models": "m,密", "unlimited_quota": True}
    api.data("POST", "/api/channel/", {"name": "up@h", "type": 8, "key": "k", "base_url": upstream, "models": "m,密"})
    assert relay(api, key).status == relay(api, key, "密").status == 200
    assert api.data("GET", "/api/user/self")["used_quota"] == 180
    changed = api.data("PUT", "/api/channel/", {"id": 1, "priority": 0, "model_mapping": ""})
    assert (changed["key"], changed["base_url"], changed["other"], changed["weight"]) == ("k", upstream, None, 0)
    text = {"mysql": "Error 1062 (23000): Duplicate entry", "postgres": "ERROR: duplicate key value violates unique constraint"}[kind]
    assert text in api.refused("POST", "/api/channel/", {"name": "half", "key": "k", "models": "a,a"})
    assert [item["name"] for item in api.data("GET", "/api/channel/")] == ["half", "up@h"]  # the row stays, without abilities
    assert len(api.data("GET", "/api/channel/search?keyword=")) == 2
    # the case of a keyword counts in PostgreSQL alone
    assert len(api.data("GET", "/api/channel/search?keyword=UP")) == (1 if kind == "mysql" else 0)
    assert api.data("GET", "/api/user/search?keyword=root")[0]["access_token"] == ACCESS
    api.data("PUT", "/api/option/", {"key": "RegisterEnabled", "value": "false"})
    api.data("PUT", "/api/option/", {"key": "RegisterEnabled", "value": "false"})
    api.data("PUT", "/api/channel/", {"id": 2, "status": 2, "models": "a"})
    assert api.data("DELETE", "/api/channel/disabled") == 1
    api.restart()
    assert options(api)["RegisterEnabled"] == "false" and relay(api, key).status == 200


@pytest.mark.parametrize("dsn, text", [
    ("postgresql://postgres:secret@127.0.0.1:5432/x", "using MySQL as database"),  # only the exact prefix is PostgreSQL's
    ("oneapi:x@127.0.0.1:3306/x", "failed to initialize database"),
    ("oneapi:x@tcp(127.0.0.1:1)/x", "failed to initialize database: dial tcp"),
    ("postgres://postgres:secret@127.0.0.1:1/x", "failed to initialize database"),
])  # fmt: skip
def test_a_database_that_cannot_be_reached_ends_the_start(tmp_path, dsn, text):
    done = start_alone(tmp_path, SQL_DSN=dsn)
    assert done.returncode == 1 and text in done.stdout and "[FATAL]" in done.stdout


def test_a_slave_on_an_empty_database_is_silently_of_no_use(node, database):
    _kind, dsn = database
    slave = node(SQL_DSN=dsn, NODE_TYPE="slave")
    assert slave("GET", "/api/status").json["success"]
    assert slave.refused("GET", "/api/channel/") == "无权进行此操作，access token 无效"
    assert slave.refused("POST", "/api/user/login", {"username": "root", "password": "123456"}) == "用户名或密码错误，或用户已被封禁"
    node(SQL_DSN=dsn)
    assert slave.data("GET", "/api/channel/") == []  # once a master has been there


def test_an_initial_token_desyncs_the_sequence_of_postgresql(node, postgres):
    postgres.run("createdb", "-U", "postgres", "sequence")
    api = node(SQL_DSN=f"postgres://postgres:secret@127.0.0.1:{postgres.port}/sequence?sslmode=disable", INITIAL_ROOT_TOKEN="initial")
    assert "tokens_pkey" in api.refused("POST", "/api/token/", {"name": "first"})
    assert api.data("POST", "/api/token/", {"name": "second"})["id"] == 2
    api.data("POST", "/api/channel/", {"id": 1, "name": "numbered", "key": "k", "models": "m"})
    assert "channels_pkey" in api.refused("POST", "/api/channel/", {"name": "c", "key": "k", "models": "m"})


def test_an_access_token_that_mysql_cannot_hold_leaves_no_root(node, mariadb):
    docker("exec", "--user", "0", mariadb.name, "mariadb", "-e", "CREATE DATABASE long_token; GRANT ALL ON long_token.* TO oneapi@'%'")
    dsn = f"oneapi:p@ss:w/ord?@tcp(127.0.0.1:{mariadb.port})/long_token"
    api = node(SQL_DSN=dsn, INITIAL_ROOT_ACCESS_TOKEN="x" * 33)
    assert api.refused("POST", "/api/user/login", {"username": "root", "password": "123456"}, auth="").startswith("用户名或密码错误")


@pytest.fixture
def pair(node, database, cache):
    """A master and a slave with Redis between them, synchronised every two seconds."""
    cache.run("redis-cli", "-a", "secret", "flushall")
    words = {"SQL_DSN": database[1], "SYNC_FREQUENCY": "2", "REDIS_CONN_STRING": f"redis://:secret@127.0.0.1:{cache.port}/0"}
    return node(**words), node(NODE_TYPE="slave", **words)


def test_channels_and_options_reach_the_other_node_with_the_next_sync(pair, upstream):
    master, slave = pair
    key = master.data("POST", "/api/token/", {"name": "t", "unlimited_quota": True})["key"]
    master.data("POST", "/api/channel/", {"name": "up", "type": 8, "key": "k", "base_url": upstream, "models": "m"})
    master.data("PUT", "/api/option/", {"key": "RegisterEnabled", "value": "false"})
    assert [item["name"] for item in slave.data("GET", "/api/channel/")] == ["up"]  # shown at once
    assert relay(slave, key).status == relay(master, key).status == 503  # and routed by neither
    assert options(slave)["RegisterEnabled"] == "true" and options(master)["RegisterEnabled"] == "false"
    until(lambda: relay(slave, key).status == relay(master, key).status == 200)
    until(lambda: options(slave)["RegisterEnabled"] == "false")
    master.data("DELETE", "/api/channel/1")
    assert relay(slave, key).status == 200  # gone, and still asked
    until(lambda: relay(slave, key).status == 503)


def test_access_tokens_are_immediate_and_tokens_live_on_in_redis(pair, upstream):
    master, slave = pair
    master.data("POST", "/api/channel/", {"name": "up", "type": 8, "key": "k", "base_url": upstream, "models": "m"})
    made = master.data("POST", "/api/token/", {"name": "t", "unlimited_quota": True})
    until(lambda: relay(slave, made["key"]).status == 200)
    made = master.data("POST", "/api/token/", {"name": "u", "unlimited_quota": True})
    assert relay(slave, made["key"]).status == 200  # a new token is known everywhere at once
    master.data("PUT", "/api/token/?status_only=1", {"id": made["id"], "status": 2})
    assert relay(slave, made["key"]).status == 200
    until(lambda: relay(slave, made["key"]).status == 401)
    fresh = master.data("GET", "/api/user/token")
    assert slave.refused("GET", "/api/channel/") == "无权进行此操作，access token 无效"
    assert slave("GET", "/api/channel/", auth=fresh).json["success"]


def test_nodes_share_sessions_and_rate_limits(pair):
    master, slave = pair
    answer = master("POST", "/api/user/login", {"username": "root", "password": "123456"}, auth="")
    cookie = {"Cookie": answer.headers["Set-Cookie"].split(";")[0]}
    assert slave("GET", "/api/user/self", headers=cookie, auth="").json["success"]
    wrong = {"username": "root", "password": "wrong"}
    statuses = [(master if number % 2 else slave)("POST", "/api/user/login", wrong, auth="").status for number in range(20)]
    assert statuses == [200] * 19 + [429]


def test_redis_without_sync_frequency_is_not_used(node, cache, tmp_path):
    cache.run("redis-cli", "-a", "secret", "flushall")
    url = f"redis://:secret@127.0.0.1:{cache.port}/0"
    node(REDIS_CONN_STRING=url)("POST", "/api/user/login", {"username": "root", "password": "wrong"}, auth="")
    assert cache.run("redis-cli", "-a", "secret", "keys", "*") == ""
    # with both, one that refuses the password ends the start
    done = start_alone(tmp_path, REDIS_CONN_STRING=url.replace("secret", "wrong"), SYNC_FREQUENCY="2")
    assert done.returncode == 1 and "Redis ping test failed" in done.stdout


def test_a_lost_database_is_missed_late_and_found_again(node, cache, upstream):
    own = Service("pgvector:pg17", 5432, ("pg_isready", "-h", "127.0.0.1"), "-e", "POSTGRES_PASSWORD=secret")
    try:
        words = {"SYNC_FREQUENCY": "8", "REDIS_CONN_STRING": f"redis://:secret@127.0.0.1:{cache.port}/0"}
        api = node(SQL_DSN=f"postgres://postgres:secret@127.0.0.1:{own.port}/postgres?sslmode=disable", **words)
        api.data("POST", "/api/channel/", {"name": "up", "type": 8, "key": "k", "base_url": upstream, "models": "m"})
        key = api.data("POST", "/api/token/", {"name": "t", "unlimited_quota": True})["key"]
        until(lambda: relay(api, key).status == 200, 20)
        own.run("psql", "-U", "postgres", "-c", "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND usename = 'postgres'")
        assert api.data("GET", "/api/channel/")[0]["name"] == "up"  # a closed connection is replaced without a word
        cache.run("redis-cli", "-a", "secret", "flushall")
        assert relay(api, key).status == 200
        docker("kill", own.name)
        assert relay(api, key).status == 200  # what it needs is in Redis and in memory
        assert api.refused("GET", "/api/channel/") == "无权进行此操作，access token 无效"  # no fault of the token
        until(lambda: relay(api, key).status in (401, 503), 30)
        assert api("GET", "/api/status").json["success"]
    finally:
        own.remove()


def test_redis_that_goes_away_breaks_the_admin_api_and_not_the_relay(node, upstream):
    own = Service("redis:7.0", 6379, ("redis-cli", "ping"))
    try:
        api = node(SYNC_FREQUENCY="2", REDIS_CONN_STRING=f"redis://127.0.0.1:{own.port}", GLOBAL_API_RATE_LIMIT="100")
        api.data("POST", "/api/channel/", {"name": "up", "type": 8, "key": "k", "base_url": upstream, "models": "m"})
        key = api.data("POST", "/api/token/", {"name": "t", "unlimited_quota": True})["key"]
        until(lambda: relay(api, key).status == 200)
        own.remove()
        answer = api("GET", "/api/channel/")
        assert (answer.status, answer.body) == (500, b"")
        assert relay(api, key).status == 200
    finally:
        own.remove()
