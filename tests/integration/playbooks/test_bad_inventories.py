# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Inventories that cannot work: each is refused in one report that names every fault, before a host is contacted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from conftest import CLUMSY, GROUPS, SECRETS, Inventory, plain, report, secrets_in

FIRST = {"node_address": "192.0.2.1"}
SECOND = {"node_address": "192.0.2.2"}
MAKE = "playbooks/secrets.yml"


def _vars(**values: Any) -> Callable[[Inventory], None]:
    """Set variables of all hosts; None takes one away."""

    def change(inventory: Inventory) -> None:
        for name, value in values.items():
            if value is None:
                inventory.vars.pop(name, None)
            else:
                inventory.vars[name] = value

    return change


def _server(index: int, **values: Any) -> Callable[[Inventory], None]:
    return lambda inventory: inventory.servers[index].update(values)


def _hosts(group: str, **hosts: dict[str, Any]) -> Callable[[Inventory], None]:
    return lambda inventory: inventory.hosts(group, **hosts)


def _without_server(index: int) -> Callable[[Inventory], None]:
    def change(inventory: Inventory) -> None:
        inventory.servers.pop(index)

    return change


def _without_group(group: str) -> Callable[[Inventory], None]:
    def change(inventory: Inventory) -> None:
        inventory.data["all"]["children"].pop(group)

    return change


def _all(*changes: Callable[[Inventory], None]) -> Callable[[Inventory], None]:
    def change(inventory: Inventory) -> None:
        for one in changes:
            one(inventory)

    return change


# name: what is changed in the good inventory, and for each fault the parts that its one line must hold
CASES: dict[str, tuple[Callable[[Inventory], None], list[tuple[str, ...]]]] = {
    # models
    "unknown model": (_server(1, model="M3E-bas"), [("model_servers[1].model", "M3E-bas", "did you mean M3E-base")]),
    "unknown key": (_server(0, colour="red"), [("model_servers[0].colour", "red", "Remove it", "quantize_bit")]),
    "width not served": (_server(0, quantize_bit=8), [("model_servers[0].quantize_bit", "8", "What works: quantize_bit: 16")]),
    "engine of no CPU": (_server(0, engine="vllm"), [("model_servers[0].engine", "vllm", "What works", "gpus: auto or [0] (vllm on GPU)")]),
    "width of another engine": (
        _server(0, model="Baichuan2-7B-Chat", quantize_bit=8, engine="vllm", gpus=[0]),
        [("model_servers[0].quantize_bit", "8", "What works", "quantize_bit: 8 with gpus: auto or [0] (legacy_chat on GPU)")],
    ),
    "code that moves": (
        _server(0, model="ChatGLM2-6B", weights={"source": "modelscope", "id": "ZhipuAI/chatglm2-6b", "revision": "master"}),
        [("model_servers[0].weights.revision", "master", "runs code of its repository", "Name the commit")],
    ),
    "code of an archive": (
        _server(0, model="ChatGLM2-6B", weights={"source": "url", "url": "http://192.0.2.9/chatglm2.tar"}),
        [("model_servers[0].weights.sha256", "must be pinned", "Add its sha256")],
    ),
    "certificate without a key": (_vars(model_server_tls_certificate="cert"), [("model_server_tls_certificate", "both a certificate and its key"), ("PEM",)]),
    "own CA that is not there": (_vars(model_server_tls_own_ca=True), [("model_server_tls_own_ca", "true", "need a CA", "Set door_tls_ca_certificate")]),
    "gpus of a wrong type": (_server(0, gpus="yes"), [("model_servers[0].gpus", "yes", "auto")]),
    "no chat model": (_without_server(0), [("model_servers", "kind chat", "Qwen2.5-1.5B-Instruct")]),
    "no embedding model": (_without_server(1), [("model_servers", "kind embedding", "M3E-")]),
    "no model server": (_vars(model_servers=None), [("model_servers", "kind chat"), ("model_servers", "kind embedding")]),
    "models as text": (_vars(model_servers="Qwen2.5-1.5B-Instruct"), [("model_servers", "Qwen2.5-1.5B-Instruct", "must be a list")]),
    "model server as text": (_vars(model_servers=["M3E-base"]), [("model_servers[0]", "M3E-base", "{model: M3E-large, port: 8002}")]),
    # GPU hosts
    "version as branch": (
        _all(_server(1, gpus="auto"), _vars(nvidia_driver_branch="580.173.02")), [("nvidia_driver_branch", "580.173.02", "first number", 'Write "580"')]
    ),
    "runfile without a file": (
        _all(_server(1, gpus="auto"), _vars(nvidia_driver_source="runfile")), [("nvidia_driver_runfile", "is needed", "nvidia_driver_runfile_sha256")]
    ),
    "region that is none": (
        _vars(mirror_region="mars"),
        [("mirror_region", "mars", "one of"), ("container_engine_mirror_region", "mars", "no such preset", "set cn")],
    ),
    # ports
    "ports of two models": (_server(1, port=8001), [("model_servers[1].port", "8001", "model_servers[0]", "Choose another port")]),
    "port of the gateway": (_server(1, port=8000), [("model_servers[1].port", "8000", "oneapi_port", "Choose another port")]),
    "door and engine": (_all(_server(0, port=18002), _server(1, port=8002)), [("model_servers[1].port", "18002", "model_servers[0]")]),
    "door and container": (_server(0, port=18000), [("model_servers[0].port", "18000", "container behind oneapi_port")]),
    "port as text": (_server(0, port="abc"), [("model_servers[0].port", "abc", "must be a number")]),
    "oneapi_port as text": (_vars(oneapi_port="abc"), [("oneapi_port", "abc", "number")]),
    "fastgpt_port with no room above": (_vars(fastgpt_port=60000), [("fastgpt_port", "60000", "55535")]),
    # groups and addresses
    **{f"no {group}": (_without_group(group), [(f"{group}: group", "has no host", f"Put a host in the group {group}")]) for group in GROUPS},
    "two MongoDB members": (_hosts("mongodb", box=FIRST, db_1=SECOND), [("mongodb: group", '["box", "db-1"]', "1, 3, 5 or 7")]),
    "two PostgreSQL hosts": (_hosts("pgvector", box=FIRST, db_1=SECOND), [("pgvector: group", '["box", "db-1"]', "exactly one host")]),
    "two gateways with SQLite": (_hosts("gateway", box=FIRST, gate_1=SECOND), [("gateway: group", '["box", "gate-1"]', "SQLite", "Leave one host")]),
    "loopback address": (_vars(node_address="127.0.0.1"), [("box: node_address", "127.0.0.1", "inside a container", "Use the IP address")]),
    "localhost": (_vars(node_address="localhost"), [("box: node_address", "localhost", "inside a container")]),
    "address missing": (_hosts("pgvector", db_1=SECOND), [("box: node_address", "null", "required with more than one host", "Set it")]),
    "address twice": (_hosts("pgvector", box=FIRST, db_1=FIRST), [("db-1: node_address", "192.0.2.1", "of box too", "its own"), ("pgvector: group",)]),
    # secrets
    "default password": (_vars(oneapi_root_password="123456"), [("oneapi_root_password", "(hidden)", "publicly known default", MAKE)]),
    "default keys": (
        _vars(fastgpt_root_key="root_key", fastgpt_token_key="any", fastgpt_root_password="1234", pgvector_password="password"),
        [(name, "(hidden)", "publicly known default") for name in ("fastgpt_root_key", "fastgpt_token_key", "fastgpt_root_password", "pgvector_password")],
    ),
    "short password": (_vars(oneapi_root_password="Rk7Tq2X"), [("oneapi_root_password", "(hidden)", "shorter than 8 characters", MAKE)]),
    "long password": (_vars(oneapi_root_password="Rk7Tq2Xw9Lm4PzVbHs6Yd"), [("oneapi_root_password", "(hidden)", "longer than 20 characters", MAKE)]),
    "secret used twice": (
        _vars(pgvector_password=SECRETS["mongodb_fastgpt_password"]),
        [("mongodb_fastgpt_password and pgvector_password", "(hidden)", "hold the same value", "Give each its own")],
    ),
    "empty secret": (_vars(pgvector_password=""), [("pgvector_password", "(unset)", "is required", MAKE)]),
    "no secrets": (_vars(**dict.fromkeys(SECRETS)), [(name, "(unset)", "is required", MAKE) for name in SECRETS]),
    "password as number": (_vars(fastgpt_root_password=4711471147114711), [("fastgpt_root_password", "(hidden)", "not text", "Quote it")]),
    "model of an undefined variable": (_server(0, model="{{ chat_model }}"), [("model_servers", "(undefined)", "Define that one")]),
    "secret of an undefined variable": (_vars(pgvector_password="{{ vault_pgvector }}"), [("pgvector_password", "(undefined)", "Define that one")]),
    # versions, URLs, images
    **{
        f"FastGPT {version}": (_vars(fastgpt_version=version), [("fastgpt_version", str(version), words, "v4.8.9")])
        for version, words in (
            ("v4.8.20", "v4.8.20"), ("v4.15.0", "AI Proxy"), ("v4.6.7", "older than v4.6.8"), ("latest", "form v4.8.9"), (4.8, "quoted text"),
        )
    },
    "public URL with a slash": (_vars(fastgpt_public_url="https://chat.example/"), [("fastgpt_public_url", "https://chat.example/", "slash", "Remove it")]),
    "public URL of localhost": (_vars(fastgpt_public_url="http://localhost:8080"), [("fastgpt_public_url", "http://localhost:8080", "Use the name")]),
    "image latest": (_vars(oneapi_image="justsong/one-api:latest"), [("oneapi_image", "justsong/one-api:latest", "fixed tag", "justsong/one-api:v0.6.10")]),
    "image without a tag": (_vars(pgvector_image="pgvector/pgvector"), [("pgvector_image", "pgvector/pgvector", "tag or a digest")]),
    "registries as a list": (_vars(image_registries=["harbor.example"]), [("image_registries", "dictionary")]),
    "data root that is relative": (_vars(data_root="srv/fastgpt"), [("data", "srv/fastgpt", "absolute path")]),
}  # fmt: skip

# What several roles derive from one variable, each refuses in its own words.
ECHOES = {"models as text": 2, "model server as text": 2, "loopback address": 3, "localhost": 3, "data root that is relative": 5, "registries as a list": 6}

# Everything that one person gets wrong on one day, each in its own line.
MANY = (
    _all(
        _server(0, quantise_bit=8), _server(1, model="M3E-bas", port="abc"), _without_group("pgvector"), _hosts("mongodb", box=FIRST, db_1=SECOND),
        _vars(fastgpt_version=4.8, fastgpt_port="abc", oneapi_port=99999, oneapi_root_password="123456", mongodb_root_password=None, fastgpt_root_key="",
              fastgpt_public_url="http://localhost:8080/", oneapi_image="justsong/one-api:latest", fastgpt_log_level="loud"),
    ),
    [
        ("model_servers[0].quantise_bit",), ("model_servers[1].model", "M3E-base"), ("model_servers[1].port", "abc"), ("pgvector: group",),
        ("mongodb: group",), ("fastgpt_version", "4.8"), ("fastgpt_port", "abc"), ("oneapi_port", "99999"), ("oneapi_root_password", "(hidden)"),
        ("mongodb_root_password", "(unset)"), ("fastgpt_root_key", "(unset)"), ("fastgpt_public_url", "localhost"), ("oneapi_image", "latest"),
        ("fastgpt_log_level", "loud"),
    ],
)  # fmt: skip


def _is_refused(play: Any, change: Callable[[Inventory], None], faults: list[tuple[str, ...]], playbook: str, cmdline: str) -> list[str]:
    inventory = Inventory()
    secrets = secrets_in(inventory.vars)
    change(inventory)
    run = play(playbook, inventory, cmdline=cmdline)
    text = plain(run.stdout)
    lines = report(run)
    assert run.rc != 0, text
    assert lines, text
    for parts in faults:
        assert any(all(part in line for part in parts) for line in lines), (parts, lines)
    for secret in secrets | secrets_in(inventory.vars):
        assert secret not in text
    for word in CLUMSY:
        assert word not in "\n".join(lines)
    assert "Traceback" not in text
    assert run.stats["changed"] == {}
    # Ansible prints the message of a failure twice
    assert text.count("Nothing was changed. ") == 2, "more than one report"
    if "plan_inventory" in cmdline:
        assert run.stats["dark"] == {}
        assert run.round_trips == {}, "a host was contacted"
    return lines


def test_there_are_enough() -> None:
    assert len(CASES) >= 30


def test_the_good_inventory_is_accepted(play: Any) -> None:
    run = play("plan.yml", Inventory(), cmdline="--tags plan_inventory", verbosity=3)
    assert run.rc == 0, run.stdout
    assert run.stats["changed"] == {}
    assert run.stats["dark"] == {}
    assert run.round_trips == {}
    for name, secret in SECRETS.items():
        assert secret not in run.stdout, f"{name} is in the output of -vvv"


@pytest.mark.parametrize("name", CASES)
def test_a_bad_inventory_is_refused(name: str, play: Any) -> None:
    change, faults = CASES[name]
    lines = _is_refused(play, change, faults, "plan.yml", "--tags plan_inventory")
    # the wanted faults, and no wild consequences of them
    assert len(lines) - 1 <= ECHOES.get(name, len(faults) + 1), lines


def test_all_faults_are_in_one_report(play: Any) -> None:
    lines = _is_refused(play, *MANY, "plan.yml", "--tags plan_inventory")
    assert len(lines) > len(MANY[1])


# Without the tag the plan reads the hosts too, so that what is wrong there stands in the same report.
@pytest.mark.parametrize("name", ["unknown model", "no secrets", "FastGPT v4.8.20"])
def test_site_refuses_it_too(name: str, play: Any) -> None:
    change, faults = CASES[name]
    lines = _is_refused(play, change, [*faults, ("[box]", "ansible_host: 127.0.0.1", "does not answer")], "site.yml", "")
    assert len(lines) - 1 <= len(faults) + 2, lines


def test_site_names_a_host_that_does_not_answer(play: Any) -> None:
    run = play("site.yml", Inventory())
    lines = report(run)
    assert run.rc != 0
    assert len(lines) == 2, run.stdout
    for part in ("[box]", "ansible_host: 127.0.0.1", "does not answer", "Check its address"):
        assert part in lines[1]
    assert run.stats["changed"] == {}


def test_site_reports_all_hosts_that_do_not_answer(play: Any) -> None:
    inventory = Inventory()
    inventory.hosts("gpu", box=FIRST, gpu_2=SECOND)
    run = play("site.yml", inventory)
    lines = report(run)
    assert run.rc != 0
    assert any("[box]" in line and "does not answer" in line for line in lines) or any("[all hosts]" in line for line in lines), lines
    assert any("gpu-2" in line or "[all hosts]" in line for line in lines), lines
    assert run.stats["changed"] == {}
