# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Two instances of FastGPT's stand-in on one replica set of three and one PostgreSQL: no state of their own, and an election is waited out."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import pathlib
import subprocess
import sys
import time
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pymongo
import pytest
from ports import free_port
from services import Service, docker
from test_one_api_stand_in import PROGRAM

SUPPORT = PROGRAM.parents[3] / "tests" / "support"
FASTGPT = PROGRAM.parents[1] / "fastgpt" / "fastgpt.py"
CONFIG = {"llmModels": [{"model": "chat", "maxContext": 4096, "maxResponse": 500, "quoteMaxToken": 2000, "maxTemperature": 1.2}],
          "vectorModels": [{"model": "embed"}]}  # fmt: skip


class Models(BaseHTTPRequestHandler):
    """An embedding that is the same for everything, ranks in the order of the question, one word as an answer."""

    def log_message(self, *args):
        pass

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        ranks = [{"index": index, "relevance_score": 0.5} for index in range(len(asked.get("documents") or []))]
        body = json.dumps({"data": [{"embedding": [1.0] * 8}], "choices": [{"message": {"content": "hello"}}], "results": ranks}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


class FastGpt:
    def __init__(self, directory, **env):
        directory.mkdir()
        (directory / "config.json").write_text(json.dumps({**CONFIG, "reRankModels": [{"model": "rank", "requestUrl": env["OPENAI_BASE_URL"] + "/rerank"}]}))
        self.port = free_port()
        self.env = {**os.environ, "HOSTNAME": "127.0.0.1", "PORT": str(self.port), "FASTGPT_STANDIN_CONFIG": str(directory / "config.json"),
                    "FASTGPT_VERSION": "v4.8.9", "TOKEN_KEY": "any", "DEFAULT_ROOT_PSW": "secret", **env}  # fmt: skip
        self.log = (directory / "out").open("ab")
        self.start()

    def stop(self):
        self.process.kill()
        self.process.wait()

    def start(self):
        self.begin = os.fstat(self.log.fileno()).st_size
        self.process = subprocess.Popen([sys.executable, str(FASTGPT)], env=self.env, stdout=self.log, stderr=self.log)

    def call(self, path, body=None, token="", method="POST"):
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/api/{path}", method=method, data=None if body is None else json.dumps(body).encode(),
                                         headers={"Content-Type": "application/json", "token": token})  # fmt: skip
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as exc:
            return json.loads(exc.read())

    def initialised(self):
        """Whether it has made its root user: until then it may still lose the race of the first start and end."""
        return b"root user init:" in pathlib.Path(self.log.name).read_bytes()[self.begin :]

    def ready(self):
        """As its supervisor does it: an instance that lost the race of the first start is started again."""
        deadline = time.monotonic() + 60
        body = {"username": "root", "password": hashlib.sha256(b"secret").hexdigest()}
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                self.start()
            try:
                answer = self.call("support/user/account/loginByPassword", body)
                if answer["code"] == 200 and self.initialised():
                    return answer["data"]["token"]
            except OSError:
                pass
            time.sleep(0.3)
        raise AssertionError("it never became ready")


@pytest.fixture(scope="module")
def members():
    ready = ("python3", "-c", "import pymongo; pymongo.MongoClient(directConnection=True, serverSelectionTimeoutMS=500).admin.command('ping')")
    made = [Service("mongo:6.0.5", 27017, ready, command=("mongod", "--replSet", "rs0", "--bind_ip_all")) for _member in range(3)]
    try:
        addresses = [docker("inspect", "-f", "{{.NetworkSettings.IPAddress}}", service.name) for service in made]
        link = pymongo.MongoClient(addresses[0], directConnection=True, serverSelectionTimeoutMS=20000)
        link.admin.command("replSetInitiate", {"_id": "rs0", "members": [{"_id": n, "host": f"{a}:27017"} for n, a in enumerate(addresses)]})
        uri = f"mongodb://{','.join(f'{address}:27017' for address in addresses)}/fastgpt?replicaSet=rs0"
        client = pymongo.MongoClient(uri, serverSelectionTimeoutMS=30000)
        client.admin.command("ping")
        yield uri, client, dict(zip(addresses, made, strict=True))
    finally:
        for service in made:
            service.remove()


@pytest.fixture(scope="module")
def two(members, postgres, tmp_path_factory):
    models = ThreadingHTTPServer(("127.0.0.1", 0), Models)
    Thread(target=models.serve_forever, daemon=True).start()
    env = {"MONGODB_URI": members[0], "PG_URL": f"postgresql://postgres:secret@127.0.0.1:{postgres.port}/postgres",
           "OPENAI_BASE_URL": f"http://127.0.0.1:{models.server_port}/v1", "CHAT_API_KEY": "k"}  # fmt: skip
    made = [FastGpt(tmp_path_factory.mktemp("fastgpt") / "data", **env) for _instance in range(2)]
    yield made
    models.shutdown()
    for each in made:
        each.stop()


def test_a_first_start_of_two_at_once_makes_one_root(two, members):
    for each in two:
        each.ready()
    database = members[1]["fastgpt"]
    assert database["users"].count_documents({"username": "root"}) == 1
    assert database["team_members"].count_documents({}) == 1


def test_tokens_keys_and_data_of_one_are_those_of_the_other(two):
    one, other = two
    token = one.ready()
    other.ready()
    assert other.call("support/user/account/tokenLogin", token=token, method="GET")["data"]["username"] == "root"
    dataset = one.call("core/dataset/create", {"name": "d", "type": "dataset"}, token)["data"]
    collection = other.call("core/dataset/collection/create", {"datasetId": dataset, "name": "c", "type": "virtual"}, token)["data"]
    assert one.call("core/dataset/data/insertData", {"collectionId": collection, "q": "a heron", "a": ""}, token)["code"] == 200
    search = {"datasetId": dataset, "text": "heron", "limit": 500, "similarity": 0, "searchMode": "embedding", "datasetSearchUsingExtensionQuery": False}
    assert [item["q"] for item in other.call("core/dataset/searchTest", search, token)["data"]["list"]] == ["a heron"]


def test_an_election_is_waited_out(two, members):
    """The driver tries a read and a write again with the new primary, as Node's does: slow, and no failure."""
    one, other = two
    token = one.ready()
    other.ready()
    primary = members[1].admin.command("hello")["primary"].partition(":")[0]
    docker("kill", members[2][primary].name)
    begin = time.monotonic()
    for number in range(6):
        made = (one, other)[number % 2].call("core/dataset/create", {"name": f"during {number}", "type": "dataset"}, token)
        assert made["code"] == 200, made
    assert time.monotonic() - begin < 40
    docker("start", members[2][primary].name)


@pytest.fixture
def harness(two, tmp_path, monkeypatch):
    """The scenario's own client, with two instances of this machine as its doors."""
    monkeypatch.setenv("LAB_SCENARIO", "cluster")
    monkeypatch.syspath_prepend(str(SUPPORT))
    for name in ("lab_hosts", "probe", "cluster"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    cluster = importlib.import_module("cluster")
    ports = dict(zip(cluster.APPS, two, strict=True))
    monkeypatch.setattr(cluster, "HOSTS", dict.fromkeys(cluster.APPS, "127.0.0.1"))
    monkeypatch.setattr(cluster, "door", lambda host: ("127.0.0.1", ports[host].port))
    monkeypatch.setattr(cluster, "vault", lambda: {"fastgpt_root_password": "secret"})
    monkeypatch.setattr(cluster, "SEED", tmp_path / "seed.json")
    monkeypatch.setattr(cluster, "CHAT", "chat")
    monkeypatch.setattr(cluster, "EMBEDDING", "embed")
    for each in two:
        each.ready()
    return cluster


def test_the_scenario_s_client_finds_and_misses(harness, two, members):
    made = harness.seed()
    assert harness.seed() == made
    harness.still_there()
    with harness.Probe([harness.door(host) for host in harness.APPS], harness.ask, every=0.2) as probe:
        begin = time.monotonic()
        time.sleep(1.5)
        probe.settle()
        assert probe.since(begin).failed == 0 and probe.since(begin).asked >= 5, probe.since(begin)
        two[1].stop()
        begin = time.monotonic()
        time.sleep(1.5)
        probe.settle()
        found = probe.since(begin)
        assert found.moved >= 2 and set(found.faults) <= {"no answer: RemoteDisconnected", "no answer: ConnectionResetError"}, found
    two[1].start()
    two[1].ready()
    # the document without its vector is no answer, and said to be missing
    members[1]["fastgpt"]["dataset_datas"].delete_many({"q": harness.PASSAGE})
    with pytest.raises(harness.Wrong, match="not found any more"):
        harness.still_there()
