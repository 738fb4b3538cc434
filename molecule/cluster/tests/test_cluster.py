# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What stands after site.yml on many hosts, seen from the hosts and from each other."""

from __future__ import annotations

import json

import pytest
from cluster import APPS, BASE, CHAT, EMBEDDING, GATEWAYS, MEMBERS, MODEL_HOSTS, call, channels, log_in, replica_set
from lab_hosts import HOSTS
from machines import host, listening, status

PUBLISHED = {"db-1": {27017}, "db-2": {27017}, "db-3": {27017, 5432}, "gw-1": {3306, 6379, 8000}, "gw-2": {8000}, "gpu-1": {8001, 8002, 8003},
             "gpu-2": {8001, 8002, 8003}, "app-1": {8080, 8088, 8089, 8090}, "app-2": {8080, 8088, 8089, 8090}}  # fmt: skip
# who is let in, and one host that is not
FENCED = [("db-1", 27017, ["db-2", "db-3", "app-1", "app-2"], "gpu-1"), ("db-3", 5432, ["app-1", "app-2"], "gw-2"), ("gw-1", 3306, ["gw-2"], "app-1"),
          ("gw-1", 6379, ["gw-2"], "app-1")]  # fmt: skip


@pytest.mark.parametrize("name", BASE)
def test_nothing_but_doors_and_databases_listens_on_the_node_address(name):
    open_ports = {int(port) for address, port in listening(host(name)) if not address.startswith(("127.", "[::1]"))}
    assert open_ports - {22} == PUBLISHED[name]


@pytest.mark.parametrize("name, port, friends, stranger", FENCED)
def test_databases_answer_their_consumers_and_nobody_else(name, port, friends, stranger):
    probe = f"timeout 4 bash -c 'exec 3<>/dev/tcp/{HOSTS[name]}/{port}'"
    assert [friend for friend in friends if host(friend).run(probe).rc != 0] == []
    assert host(stranger).run(probe).rc != 0


def test_the_replica_set_has_three_members_with_one_key():
    states = replica_set()
    assert sorted(states) == MEMBERS and sorted(states.values()) == ["PRIMARY", "SECONDARY", "SECONDARY"]
    keys = {host(name).check_output("sha256sum /etc/selfhosted-fastgpt/mongodb/keyfile").split()[0] for name in MEMBERS}
    assert len(keys) == 1


def test_fastgpt_knows_every_member(environment):
    for name in APPS:
        uri = environment(name, "fastgpt")["MONGODB_URI"]
        assert all(f"{HOSTS[member]}:27017" in uri for member in MEMBERS) and "replicaSet=" in uri and "tls=true" in uri


def test_the_nodes_of_the_gateway_are_one(environment, secrets):
    first, second = environment("gw-1", "one-api"), environment("gw-2", "one-api")
    assert "NODE_TYPE" not in first and second["NODE_TYPE"] == "slave"
    for key in ("SQL_DSN", "SESSION_SECRET", "REDIS_CONN_STRING", "SYNC_FREQUENCY"):
        assert first[key] == second[key], key
    assert f"@tcp({HOSTS['gw-1']}:3306)/" in first["SQL_DSN"]
    seen = []
    for name in GATEWAYS:
        code, body = status(host("app-1"), f"http://{HOSTS[name]}:8000/api/option/", "-H", f"Authorization: {secrets['oneapi_root_access_token']}")
        assert code == 200
        options = {item["key"]: item["value"] for item in json.loads(body)["data"]}
        assert options["RegisterEnabled"] == "false"
        seen.append(options)
    assert seen[0] == seen[1]


@pytest.mark.parametrize("name", GATEWAYS)
def test_each_node_routes_to_both_model_hosts(name, secrets):
    """By its own door and by the channel's number, so that no other node and no chance helps."""
    assert channels() == sorted(f"{model}@{where}" for model in (CHAT, EMBEDDING) for where in MODEL_HOSTS)
    access = ("-H", f"Authorization: {secrets['oneapi_root_access_token']}")
    base = f"http://{HOSTS[name]}:8000"
    rows = json.loads(status(host("app-1"), f"{base}/api/channel/search?keyword=", *access)[1])["data"]
    (token,) = json.loads(status(host("app-1"), f"{base}/api/token/search?keyword=", *access)[1])["data"]
    body = json.dumps({"model": EMBEDDING, "input": "x"})
    for row in (row for row in rows if row["name"].startswith(EMBEDDING)):
        key = f"Authorization: Bearer sk-{token['key']}-{row['id']}"
        code, answer = status(host("app-1"), f"{base}/v1/embeddings", "-H", key, "-H", "Content-Type: application/json", "-d", body)
        assert (code, len(json.loads(answer)["data"][0]["embedding"])) == (200, 384), row["name"]


def test_no_default_password_is_left(secrets):
    for name in GATEWAYS:
        body = json.dumps({"username": "root", "password": "123456"})
        answer = json.loads(status(host("app-1"), f"http://{HOSTS[name]}:8000/api/user/login", "-H", "Content-Type: application/json", "-d", body)[1])
        assert answer["success"] is False


def test_fastgpt_asks_its_own_door_which_balances(environment):
    for name in APPS:
        assert environment(name, "fastgpt")["OPENAI_BASE_URL"] == f"http://{HOSTS[name]}:8088/v1"
    configs = {host(name).check_output("sha256sum /etc/selfhosted-fastgpt/fastgpt/config.json").split()[0] for name in APPS}
    # each names its own door for the rerankers, and nothing else differs
    assert len(configs) == len(APPS)


def test_a_session_of_one_door_is_one_of_the_other():
    token = log_in("app-1")
    assert call("app-2", "GET", "support/user/account/tokenLogin", token=token)["username"] == "root"


def test_one_door_uses_both_fastgpt_hosts():
    """By the peers' doors, which log what other doors passed on, and by the questions that FastGPT answers itself."""
    log = "/var/log/nginx/selfhosted-fastgpt-fastgpt.log"

    def served(name: str) -> int:
        lines = [json.loads(line) for line in host(name).check_output(f"cat {log}").splitlines()]
        return sum(1 for line in lines if line["port"] == 8089 and line["path"] == "/api/common/system/getInitData" and line["status"] == 200)

    before = {name: served(name) for name in APPS}
    for _time in range(12):
        call("app-1", "GET", "common/system/getInitData")
    after = {name: served(name) - before[name] for name in APPS}
    assert after["app-2"] >= 3, after


@pytest.mark.parametrize("name", APPS)
def test_headers_and_the_limit_on_log_ins(name):
    headers = host("gpu-1").check_output(f"curl -s -D - -o /dev/null http://{HOSTS[name]}:8080/").lower()
    for header in ("x-content-type-options", "x-frame-options", "referrer-policy"):
        assert header in headers
    assert "nginx/" not in headers
    body = json.dumps({"username": "nobody", "password": "x"})
    loop = f"for i in $(seq 60); do curl -s -o /dev/null -w '%{{http_code}} ' -H 'Content-Type: application/json' -d '{body}' " \
           f"http://{HOSTS[name]}:8080/api/support/user/account/loginByPassword & done; wait"  # fmt: skip
    codes = host("gpu-2").check_output(loop).split()
    assert codes.count("429") >= 20 and set(codes) <= {"200", "429", "500", "510"}


def test_no_container_was_made_twice_or_left_over():
    wanted = {**dict.fromkeys(["db-1", "db-2"], ["mongodb"]), "db-3": ["mongodb", "pgvector"], "gw-1": ["one-api", "one-api-cache", "one-api-db"],
              "gw-2": ["one-api"], **dict.fromkeys(APPS, ["fastgpt", "fastgpt-sandbox"])}  # fmt: skip
    for name, containers in wanted.items():
        assert sorted(host(name).check_output("docker ps -a --format '{{.Names}}'").split()) == containers
