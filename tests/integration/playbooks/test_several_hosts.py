# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the roles derive where a service has several hosts, on each of them, and what drain.yml and reset.yml refuse."""

from __future__ import annotations

import json
import pathlib
import sys
from typing import Any

import pytest
import yaml
from conftest import GOOD, SECRETS, report

HOSTS = {name: f"192.0.2.{number}" for number, name in enumerate(("gpu-1", "gpu-2", "gate-1", "gate-2", "db-1", "db-2", "db-3", "app-1", "app-2"), 11)}
GROUPS = {
    "gpu": ["gpu-1", "gpu-2"], "gateway": ["gate-1", "gate-2"], "mongodb": ["db-1", "db-2", "db-3"], "pgvector": ["db-1"], "fastgpt": ["app-1", "app-2"],
}  # fmt: skip
STORES = {"oneapi_database_password": "dB5wXcVbNmQwErTy8u", "oneapi_cache_password": "cA7wLkJhGfDsAqWe3r"}
# A member that Docker lists with some mode of TLS, and what this inventory wants of it.
MEMBER = """
- hosts: all
  connection: local
  gather_facts: true
  vars:
    mongodb_root_password: aPasswordOfMine
    mongodb_keyfile: abcdefgh
    mongodb_address: 192.0.2.1
    mongodb_members: [{host: "192.0.2.1:27017"}, {host: "192.0.2.2:27017"}, {host: "192.0.2.3:27017"}]
    mongodb_minimum_disk_gb: 0
    container__containers: [{State: running, Names: [/mongodb], Command: "docker-entrypoint.sh mongod --replSet rs0 {{ arguments }}"}]
  tasks:
    - ansible.builtin.include_role:
        name: selfhosted.fastgpt.mongodb
        tasks_from: preflight_host
        rolespec_validate: false
"""
# As site.yml hands them over.
DERIVE = """
- hosts: all
  gather_facts: false
  roles:
    - role: selfhosted.fastgpt.plan
  tasks:
    - ansible.builtin.include_role:
        name: selfhosted.fastgpt.oneapi
        tasks_from: preflight
        public: true
      vars: &oneapi
        oneapi_nodes: "{{ plan_gateway_nodes }}"
        oneapi_database_address: "{{ plan_gateway_database_address }}"
      when: "'gateway' in group_names"
    - ansible.builtin.copy:
        content: "{{ {'env': oneapi__whole_env, 'database': oneapi__deploys_database, 'cache': oneapi__deploys_cache,
                      'door': oneapi__door | combine(oneapi__door_pooled)} | to_json }}"
        dest: "{{ answers }}/{{ inventory_hostname }}.json"
      vars: *oneapi
      delegate_to: localhost
      connection: local
      when: "'gateway' in group_names"
    - ansible.builtin.include_role:
        name: selfhosted.fastgpt.fastgpt
        tasks_from: preflight
        public: true
      vars: &fastgpt
        fastgpt_nodes: "{{ plan_fastgpt_nodes }}"
        fastgpt_gateway_url: "{{ plan_gateway_url }}"
        fastgpt_mongodb_uri: "{{ plan_mongodb_uri }}"
        fastgpt_pgvector_url: "{{ plan_pgvector_url }}"
        fastgpt_door_services: "{{ plan_gateway_services + plan_rerank.services }}"
      when: "'fastgpt' in group_names"
    - ansible.builtin.copy:
        content: "{{ {'env': fastgpt__env, 'services': fastgpt__door_services, 'consumers': plan_database_consumers, 'uri': plan_mongodb_uri} | to_json }}"
        dest: "{{ answers }}/{{ inventory_hostname }}.json"
      vars: *fastgpt
      delegate_to: localhost
      connection: local
      when: "'fastgpt' in group_names"
"""


# two nodes of the gateway, and one host of all else
FEW = {"gpu": ["gpu-1"], "gateway": ["gate-1", "gate-2"], "mongodb": ["db-1"], "pgvector": ["db-1"], "fastgpt": ["db-1"]}


def inventory(few: bool = False, **variables: Any) -> dict[str, Any]:
    placed = FEW if few else GROUPS
    groups = {group: {"hosts": {host: {"ansible_host": "127.0.0.1", "node_address": HOSTS[host]} for host in hosts}} for group, hosts in placed.items()}
    known = {key: value for key, value in GOOD["all"]["vars"].items() if key != "ansible_host"}
    return {
        "all": {
            "vars": {**known, **SECRETS, **STORES, "oneapi_database": "mysql", "oneapi_tiktoken_source": "http://192.0.2.9/tiktoken", **variables},
            "children": groups,
        }
    }


@pytest.fixture
def derive(tmp_path: pathlib.Path, play: Any) -> Any:
    def run(**variables: Any) -> dict[str, Any]:
        playbook, answers = tmp_path / "derive.yml", tmp_path / "answers"
        playbook.write_text(DERIVE, encoding="utf-8")
        answers.mkdir()
        path = tmp_path / "hosts.yml"
        path.write_text(yaml.safe_dump(inventory(**variables)), encoding="utf-8")
        done = play(str(playbook), path, extravars={"answers": str(answers)})
        assert done.rc == 0, done.stdout
        return {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in answers.iterdir()}

    return run


def test_a_gateway_on_mysql(derive: Any) -> None:
    found = derive()
    master, slave = found["gate-1"], found["gate-2"]
    dsn = f"oneapi:{STORES['oneapi_database_password']}@tcp({HOSTS['gate-1']}:3306)/oneapi"
    shared = {
        "SQL_DSN": dsn, "REDIS_CONN_STRING": f"redis://:{STORES['oneapi_cache_password']}@{HOSTS['gate-1']}:6379/0",
        "MEMORY_CACHE_ENABLED": "true", "SESSION_SECRET": SECRETS["oneapi_session_secret"],
    }  # fmt: skip
    assert master["env"].items() >= shared.items() and slave["env"].items() >= shared.items()
    assert int(master["env"]["SYNC_FREQUENCY"]) == 5 and int(master["env"]["SQL_MAX_OPEN_CONNS"]) == 20
    assert "NODE_TYPE" not in master["env"] and slave["env"]["NODE_TYPE"] == "slave"
    assert (master["database"], master["cache"], slave["database"], slave["cache"]) == (True, True, False, False)
    assert slave["door"]["pooled"] is True


def test_fastgpt_goes_through_its_own_door(derive: Any) -> None:
    found = derive()
    for host, other in (("app-1", "app-2"), ("app-2", "app-1")):
        answer = found[host]
        assert answer["env"]["OPENAI_BASE_URL"] == f"http://{HOSTS[host]}:8088/v1"
        public, peers, gateway, rerank = answer["services"]
        assert public["port"] == 8080 and public["upstream"][0] == {"address": "127.0.0.1:18080", "drain": False}
        assert [item["address"] for item in public["upstream"][1:]] == [f"{HOSTS[other]}:8089"]
        assert peers["port"] == 8089 and peers["peer_key"] == public["upstream"][1]["peer_key"] and len(peers["peer_key"]) >= 32
        assert [item["address"] for item in gateway["upstream"]] == [f"{HOSTS['gate-1']}:8000", f"{HOSTS['gate-2']}:8000"]
        assert gateway["retry"] is True and all(item["pooled"] for item in gateway["upstream"])
        assert len(rerank["upstream"]) == 2
        assert answer["uri"].split("@")[1].split("/")[0] == ",".join(f"{HOSTS[name]}:27017" for name in GROUPS["mongodb"])
        assert answer["consumers"] == [HOSTS["app-1"], HOSTS["app-2"]]
    assert found["app-1"]["services"][1]["peer_key"] == found["app-2"]["services"][1]["peer_key"]


def test_a_gateway_on_postgresql(derive: Any) -> None:
    found = derive(oneapi_database="postgresql")
    dsn = f"postgres://oneapi:{STORES['oneapi_database_password']}@{HOSTS['db-1']}:5432/oneapi?sslmode=disable"
    assert found["gate-1"]["env"]["SQL_DSN"] == found["gate-2"]["env"]["SQL_DSN"] == dsn
    assert (found["gate-1"]["database"], found["gate-1"]["cache"]) == (False, True)
    assert found["app-1"]["consumers"] == [HOSTS[name] for name in ("app-1", "app-2", "gate-1", "gate-2")]


def test_servers_of_ones_own(derive: Any) -> None:
    mine = {"oneapi_sql_dsn": "me:S3cretOfTheDatabase@tcp(db.example:3306)/gate", "oneapi_redis_url": "redis://:S3cretOfTheCache@cache.example:6379/1"}
    found = derive(**mine, oneapi_database_password="", oneapi_cache_password="")
    for node in ("gate-1", "gate-2"):
        assert (found[node]["env"]["SQL_DSN"], found[node]["env"]["REDIS_CONN_STRING"]) == tuple(mine.values())
        assert not found[node]["database"] and not found[node]["cache"]


# Each is refused by a line of its own; those that stand in one dictionary share a run.
@pytest.mark.parametrize(
    ("variables", "refusals"),
    [
        (
            {
                "oneapi_database": "sqlite", "fastgpt_http_redirect_port": 80, "fastgpt_login_rate": "20 per minute", "fastgpt_max_body": "512 MB",
                "oneapi_sql_dsn": "u:pppppppp@tcp(127.0.0.1:3306)/x", "oneapi_database_password": "with@strange/signs:inside",
            },
            [
                ["gateway: oneapi_database", "sqlite", "is a file of one host"],
                ["fastgpt_http_redirect_port: 80", "needs a certificate"],
                ["fastgpt_login_rate: 20 per minute", "must be a rate such as 20r/m"],
                ["fastgpt_max_body: 512 MB", "is no size as nginx writes them"],
                ["oneapi_sql_dsn, oneapi_redis_url: (hidden)", "names the machine that asks"],
                ["oneapi_database_password: (hidden)", "letters, digits, dash and underscore"],
            ],
        ),
        (
            {
                "oneapi_database": "postgresql", "oneapi_sql_dsn": "postgresql://u:pppppppp@db.example/x", "oneapi_redis_url": "cache.example:6379",
                "oneapi_cache_password": STORES["oneapi_database_password"],
            },
            [
                ["oneapi_sql_dsn: (hidden)", "postgres:// alone"],
                ["oneapi_redis_url: (hidden)", "is no URL of a Redis"],
                ["oneapi_database_password and oneapi_cache_password", "hold the same value"],
            ],
        ),
        (
            {"oneapi_sql_dsn": "mysql://u:pppppppp@db.example/x", "oneapi_cache_password": ""},
            [["oneapi_sql_dsn: (hidden)", "is not of the form that One-API gives to MySQL"], ["oneapi_cache_password: (unset)", "is required"]],
        ),
    ],
)  # fmt: skip
def test_refused_in_the_plan(variables: dict[str, Any], refusals: list[list[str]], tmp_path: pathlib.Path, play: Any) -> None:
    path = tmp_path / "hosts.yml"
    path.write_text(yaml.safe_dump(inventory(few=True, **variables)), encoding="utf-8")
    run = play("plan.yml", path, cmdline="--tags plan_inventory")
    assert run.rc != 0 and run.round_trips == {}
    for words in refusals:
        assert any(all(word in line for word in words) for line in report(run)), (words, run.stdout)
    assert "pppppppp" not in run.stdout and "strange" not in run.stdout


@pytest.mark.parametrize(
    ("playbook", "extra", "words"),
    [
        ("drain.yml", {}, "drain_host: (unset): is no host of the groups gpu, gateway and fastgpt"),
        ("drain.yml", {"drain_host": "db-1"}, "drain_host: db-1: is no host"),
        ("reset.yml", {}, "reset_confirm: (unset): must name exactly the hosts that this run is about"),
        ("reset.yml", {"reset_confirm": "app-1"}, "add -e reset_confirm=app-1,app-2,db-1"),
        ("reset.yml", {"reset_confirm": ",".join(sorted(HOSTS)), "reset_data": "db-1"}, "reset_data: db-1: must name exactly"),
    ],
)
def test_nothing_is_taken_down_by_mistake(playbook: str, extra: dict[str, str], words: str, tmp_path: pathlib.Path, play: Any) -> None:
    path = tmp_path / "hosts.yml"
    path.write_text(yaml.safe_dump(inventory()), encoding="utf-8")
    run = play(playbook, path, extravars=extra)
    assert run.rc != 0 and run.round_trips == {}
    assert words in " ".join(run.stdout.split()), run.stdout


def test_members_change_their_mode_of_tls_by_one_step(tmp_path: pathlib.Path, play: Any) -> None:
    steps = {
        "none-to-allow": ("", "allowTLS", None),
        "prefer-to-require": ("--tlsMode preferTLS", "requireTLS", None),
        "allow-to-none": ("--tlsMode allowTLS", "", None),
        "none-to-require": ("", "requireTLS", "Set allowTLS first"),
        "require-to-none": ("--tlsMode requireTLS", "", "Set preferTLS first"),
    }
    playbook, path = tmp_path / "member.yml", tmp_path / "hosts.yml"
    playbook.write_text(MEMBER, encoding="utf-8")
    hosts = {name: {"arguments": now, "mongodb_tls_mode": wanted} for name, (now, wanted, _first) in steps.items()}
    path.write_text(yaml.safe_dump({"all": {"hosts": hosts}}), encoding="utf-8")
    run = play(str(playbook), path, extravars={"mongodb_tls_own_ca": True, "ansible_python_interpreter": sys.executable})
    assert run.stats["dark"] == {}, run.stdout
    refused = {failure["host"]: str(failure["res"]["msg"]) for failure in run.failed}
    assert sorted(refused) == sorted(name for name, (_now, _wanted, first) in steps.items() if first), run.stdout
    for name, message in refused.items():
        assert str(steps[name][2]) in message, run.stdout
