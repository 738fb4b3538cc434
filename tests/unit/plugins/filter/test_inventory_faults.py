# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import yaml
from ansible.errors import AnsibleFilterError
from ansible_collections.selfhosted.fastgpt.plugins.filter.inventory_faults import inventory_faults
from hypothesis import example, given
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[4]
CARDS = yaml.safe_load((ROOT / "roles/model_cards/vars/main.yml").read_text())["model_cards_catalogue"]
MODELS = [
    {"model": "Qwen2.5-1.5B-Instruct", "port": 8001},
    {"model": "M3E-large", "port": 8002},
    {"model": "bge-reranker-base", "port": 8003},
]
GOOD = {
    "groups": {"gpu": ["gpu-1"], "gateway": ["app-1"], "mongodb": ["app-1"], "pgvector": ["app-1"], "fastgpt": ["app-1"]},
    "hosts": {"gpu-1": {"node_address": "10.0.0.1", "model_servers": MODELS}, "app-1": {"node_address": "app-1.example"}},
    "cards": CARDS,
    "oneapi_database": "sqlite",
    "fastgpt_version": "v4.8.9",
    "public_url": "https://fastgpt.example",
    "urls": {"pip_index_url": "http://pip.example/simple", "apt_mirror": None},
    "registries": {"docker.io": "10.0.0.9:5000/docker.io"},
}
QUICKSTART = {
    "groups": dict.fromkeys(("gpu", "gateway", "mongodb", "pgvector", "fastgpt"), ["box"]),
    "hosts": {"box": {"model_servers": MODELS, "ansible_connection": "local"}},
    "cards": CARDS,
}


def test_good_inventories():
    assert inventory_faults(GOOD) == []
    assert inventory_faults(QUICKSTART) == [], "one host needs no node_address"


def change(path, value, base=None):
    data = copy.deepcopy(GOOD if base is None else base)
    *parents, last = path.split("/")
    at = data
    for name in parents:
        at = at[name]
    at[last] = value
    return data


def cluster(more=None, **fields):
    """Two hosts that are both a node of the gateway and a host of FastGPT."""
    data = change("oneapi_database", "mysql") | fields
    data["groups"] |= {"gateway": ["app-1", "app-2"], "fastgpt": ["app-1", "app-2"]}
    data["hosts"]["app-2"] = {"node_address": "app-2.example"}
    for host, values in (more or {}).items():
        data["hosts"][host] |= values
    return data


def members(**one):
    """A replica set of three, one of which has variables of its own."""
    data = cluster()
    data["groups"]["mongodb"] = ["app-1", "app-2", "db-3"]
    data["hosts"]["db-3"] = {"node_address": "db-3.example", **one}
    return data


def test_several_members():
    assert inventory_faults(members()) == []


def test_several_nodes():
    assert inventory_faults(cluster()) == []
    assert inventory_faults(cluster(oneapi_database="postgresql")) == []
    # what is somebody else's takes no port here
    assert inventory_faults(cluster({"app-1": {"pgvector_port": 3306, "mongodb_port": 6379}}, own_database=True, own_cache=True)) == []


def models(*items):
    return change("hosts/gpu-1/model_servers", list(items))


@pytest.mark.parametrize(
    ("data", "start", "words"),
    [
        (change("groups/gpu", []), "gpu: group: ", "the model servers must run somewhere"),
        (change("groups/gateway", []), "gateway: group: ", "has no host"),
        (change("groups/mongodb", None), "mongodb: group: ", "has no host"),
        (change("groups/pgvector", []), "pgvector: group: ", "has no host"),
        (change("groups/fastgpt", []), "fastgpt: group: ", "has no host"),
        (change("groups/pgvector", ["app-1", "gpu-1"]), "pgvector: group: ", "exactly one host"),
        (change("groups/mongodb", ["app-1", "gpu-1"]), "mongodb: group: ", "even number"),
        (change("groups/gateway", ["app-1", "gpu-1"]), "gateway: oneapi_database: ", "is a file of one host"),
        (change("oneapi_database", "oracle"), "gateway: oneapi_database: ", "must be one of sqlite, mysql, postgresql"),
        (cluster({"app-1": {"oneapi_port": 8100}}), "gateway: oneapi_port: ", "must be the same on all hosts"),
        (cluster({"app-2": {"fastgpt_peer_port": 9000}}), "fastgpt: fastgpt_peer_port: ", "must be the same on all hosts"),
        (members(mongodb_tls_mode="requireTLS"), "mongodb: mongodb_tls_mode: ", "must be the same on all hosts"),
        (cluster({"app-1": {"pgvector_port": 3306}}), "app-1: oneapi_database_port: ", "port 3306 would be taken"),
        (cluster({"app-1": {"mongodb_port": 6379}}), "app-1: oneapi_cache_port: ", "port 6379 would be taken"),
        (cluster({"app-2": {"fastgpt_gateway_port": 8000}}), "app-2: fastgpt_gateway_port: ", "port 8000 would be taken"),
        (cluster({"app-2": {"fastgpt_port": 8089}}), "app-2: fastgpt_peer_port: ", "port 8089 would be taken"),
        (change("hosts/app-1/fastgpt_http_redirect_port", 5432), "app-1: fastgpt_http_redirect_port: ", "port 5432 would be taken"),
        (change("hosts/gpu-1/node_address", None), "gpu-1: node_address: ", "is required with more than one host"),
        (change("hosts/gpu-1", {"model_servers": MODELS}), "gpu-1: node_address: ", "is required"),
        (change("hosts/gpu-1/node_address", "app-1.example"), "app-1: node_address: ", "of gpu-1 too"),
        (change("hosts/gpu-1/node_address", "127.0.0.1"), "gpu-1: node_address: ", "this host itself"),
        (change("hosts/gpu-1/node_address", "127.1.2.3"), "gpu-1: node_address: ", "this host itself"),
        (change("hosts/gpu-1/node_address", "localhost"), "gpu-1: node_address: ", "this host itself"),
        (change("hosts/gpu-1/node_address", "0.0.0.0"), "gpu-1: node_address: ", "this host itself"),
        (change("hosts/gpu-1/node_address", "::1"), "gpu-1: node_address: ", "this host itself"),
        (change("hosts/gpu-1/node_address", "fd00::1"), "gpu-1: node_address: ", "IPv6"),
        (change("hosts/gpu-1/node_address", "10.0.0.256"), "gpu-1: node_address: ", "not a valid IP"),
        (change("hosts/gpu-1/node_address", "10.0.0.1:8080"), "gpu-1: node_address: ", "without scheme"),
        (change("hosts/gpu-1/node_address", "http://10.0.0.1"), "gpu-1: node_address: ", "without scheme"),
        (change("hosts/gpu-1/node_address", "10.0.0.1 "), "gpu-1: node_address: ", "white space"),
        (change("hosts/gpu-1/node_address", "169.254.1.1"), "gpu-1: node_address: ", "cannot reach|can reach"),
        (change("hosts/gpu-1/node_address", 10), "gpu-1: node_address: ", "as text"),
        (models(MODELS[1]), "gpu: model_servers: ", "kind chat"),
        (models(MODELS[0]), "gpu: model_servers: ", "kind embedding"),
        (change("hosts/app-1/oneapi_port", 0), "app-1: oneapi_port: ", "1 to 55535"),
        (change("hosts/app-1/fastgpt_port", 60000), "app-1: fastgpt_port: ", "1 to 55535"),
        (change("hosts/app-1/mongodb_port", "x"), "app-1: mongodb_port: ", "must be a number"),
        (change("hosts/app-1/oneapi_port", 8080), "app-1: fastgpt_port: ", "port 8080 would be taken by"),
        (change("hosts/app-1/mongodb_port", 18080), "app-1: fastgpt_port: ", "the container behind fastgpt_port"),
        (change("hosts/app-1/pgvector_port", 27017), "app-1: pgvector_port: ", "port 27017"),
        (change("hosts/box/fastgpt_port", 8002, QUICKSTART), "box: model_servers[1].port: ", "port 8002"),
        (change("hosts/box/mongodb_port", 18003, QUICKSTART), "box: model_servers[2].port: ", "port 18003"),
        (change("hosts/box/pgvector_port", 28003, QUICKSTART), "box: model_servers[2].port: ", "port 28003"),
        (change("fastgpt_version", "v4.8.20"), "fastgpt: fastgpt_version: ", "model API"),
        (change("fastgpt_version", "v4.14.1"), "fastgpt: fastgpt_version: ", "model API"),
        (change("fastgpt_version", "v4.15.0"), "fastgpt: fastgpt_version: ", "AI Proxy"),
        (change("fastgpt_version", "v4.17.0"), "fastgpt: fastgpt_version: ", "AI Proxy"),
        (change("fastgpt_version", "v4.6.7"), "fastgpt: fastgpt_version: ", "older than v4.6.8"),
        (change("fastgpt_version", "latest"), "fastgpt: fastgpt_version: ", "not an image tag"),
        (change("fastgpt_version", "4.8.9"), "fastgpt: fastgpt_version: ", "not an image tag"),
        (change("fastgpt_version", 4.8), "fastgpt: fastgpt_version: ", "not an image tag"),
        (change("public_url", "https://fastgpt.example/"), "fastgpt: fastgpt_public_url: ", "slash"),
        (change("public_url", "fastgpt.example"), "fastgpt: fastgpt_public_url: ", "absolute"),
        (change("public_url", "http://localhost:8080"), "fastgpt: fastgpt_public_url: ", "visitor's own"),
        (change("public_url", "http://a b"), "fastgpt: fastgpt_public_url: ", "white space"),
        (change("public_url", "http://a:99999"), "fastgpt: fastgpt_public_url: ", "not a URL"),
        (change("public_url", "http://me:pw@a"), "fastgpt: fastgpt_public_url: ", "neither a user"),
        (change("public_url", 8080), "fastgpt: fastgpt_public_url: ", "as text"),
        (change("urls/pip_index_url", "pip.example"), "pip_index_url: ", "absolute"),
        (change("registries", {"docker.io": "https://r"}), "image_registries.docker.io: ", "without a scheme"),
        (change("registries", "r"), "image_registries: ", "dictionary"),
    ],
)
def test_faults(data, start, words):
    found = inventory_faults(data)
    assert len(found) == 1, found
    assert found[0].startswith(start) and any(word in found[0] for word in words.split("|")) and found[0].endswith("."), found[0]


def test_two_names_of_this_machine():
    data = change("hosts/gpu-1/ansible_connection", "local")
    data["hosts"]["app-1"]["ansible_connection"] = "local"
    (found,) = inventory_faults(data)
    assert found.startswith("gpu-1, app-1: ansible_connection: ")


def test_what_is_allowed():
    assert inventory_faults(change("groups/mongodb", ["app-1", "gpu-1", "app-3"]) | {"hosts": {**GOOD["hosts"], "app-3": {"node_address": "10.0.0.3"}}}) == []
    assert inventory_faults(change("hosts/app-1/model_servers", MODELS)) == [], "a list for all hosts only counts in the group gpu"
    assert inventory_faults(change("hosts/app-1/oneapi_port", "8000")) == [], "as given on the command line"
    for version in ("v4.6.8", "v4.7", "v4.8.15-fix3", "4.8.12-fix", "v4.8.19-beta"):
        assert inventory_faults(change("fastgpt_version", version)) == [], version
    two = [["gpu-1", "app-1", "app-3", "app-4"], 4]
    assert any("even" in line for line in inventory_faults(change("groups/mongodb", two[0])))


def test_all_faults_come_at_once():
    data = change("groups/fastgpt", []) | {"fastgpt_version": "v5", "oneapi_database": "maria"}
    data["hosts"] = {"gpu-1": {"node_address": "localhost", "model_servers": []}, "app-1": {}}
    found = inventory_faults(data)
    assert len(found) == 7, found


_any = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=6)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=10,
)


@given(
    st.fixed_dictionaries({}, optional={key: _any for key in GOOD}),
    st.fixed_dictionaries({}, optional={key: _any for key in ("node_address", "model_servers", "ports", "mongodb_port")}),
)
@example({"registries": {"\n": None}}, {"ports": {"\n": None}})
def test_any_yaml_is_borne(data, host):
    assert all(isinstance(line, str) and "\n" not in line for line in inventory_faults(data))
    data["hosts"] = {"a": host}
    data["groups"] = dict.fromkeys(("gpu", "mongodb", "fastgpt"), ["a"])
    assert all(isinstance(line, str) and "\n" not in line for line in inventory_faults(data))


def test_the_port_before_several_rerankers_is_taken():
    data = change("hosts/app-1/fastgpt_port", 8090)
    rerankers = [server for server in data["hosts"]["gpu-1"]["model_servers"] if server["model"].startswith("bge")]
    assert rerankers
    assert inventory_faults(data) == [], "one server of the model is asked directly"
    data["groups"]["gpu"] = ["gpu-1", "gpu-2"]
    data["hosts"]["gpu-2"] = {"node_address": "10.0.0.9", "model_servers": rerankers}
    (found,) = inventory_faults(data)
    assert "8090" in found and "fastgpt_rerank_port" in found


def test_no_dictionary():
    with pytest.raises(AnsibleFilterError):
        inventory_faults([])
