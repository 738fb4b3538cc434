# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Playbooks of docs/examples, run as they stand, and again."""

from __future__ import annotations

import http.server
import importlib.util
import json
import math
import os
import pathlib
import re
import subprocess
import sys
import threading
import typing as t

import pytest
import yaml
from fixtures_mongodb import REPO, Lab
from fixtures_oneapi import OneApi

EXAMPLES = REPO / "docs" / "examples"
BIN = pathlib.Path(sys.executable).parent
VAULT_PASSWORD = "the vault's own password"
UPSTREAM_KEY = "sk-upstream-0123456789"


class Run(t.NamedTuple):
    rc: int
    text: str
    counts: dict[str, int]


def play(directory: pathlib.Path, example: str, group: str, variables: dict[str, t.Any], *options: str) -> Run:
    """An example on this machine as the one host of its group."""
    inventory = {"all": {"vars": {"ansible_connection": "local", "ansible_python_interpreter": sys.executable}, "children": {group: {"hosts": {"target": {}}}}}}
    (directory / "hosts.yml").write_text(json.dumps(inventory), encoding="utf-8")
    (directory / "variables.json").write_text(json.dumps(variables), encoding="utf-8")
    (directory / "vault-password").write_text(VAULT_PASSWORD, encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ANSIBLE_")}
    environment |= {
        "PATH": f"{directory / 'bin'}:{os.environ['PATH']}",
        "ANSIBLE_COLLECTIONS_PATH": str(REPO / ".collections"),
        "ANSIBLE_VAULT_PASSWORD_FILE": str(directory / "vault-password"),
        "ANSIBLE_HOME": str(directory / "home"),
        "ANSIBLE_NOCOLOR": "1",
        "ANSIBLE_LOCALHOST_WARNING": "0",
        "ANSIBLE_RETRY_FILES_ENABLED": "0",
    }
    command = [str(BIN / "ansible-playbook"), str(EXAMPLES / example), "-i", str(directory / "hosts.yml"), "-e", f"@{directory / 'variables.json'}", *options]
    done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, timeout=280, check=False)
    text = done.stdout + done.stderr
    recap = re.search(r"^target\s+: (.*)$", text, re.MULTILINE)
    counts = {name: int(number) for name, number in re.findall(r"(\w+)=(\d+)", recap[1])} if recap else {}
    return Run(done.returncode, text, counts)


def fakes() -> t.Any:
    """The FastGPT of the checks' unit tests."""
    spec = importlib.util.spec_from_file_location("checks_fakes", REPO / "tests" / "unit" / "plugins" / "modules" / "test_checks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def ok(run: Run) -> Run:
    assert run.rc == 0 and run.counts["failed"] == run.counts["unreachable"] == 0, run.text
    assert "Traceback" not in run.text, run.text
    return run


@pytest.fixture
def embeddings() -> t.Iterator[str]:
    """An embedding server with a key."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *unused: t.Any) -> None:
            pass

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            right = self.headers.get("Authorization") == f"Bearer {UPSTREAM_KEY}" and self.path == "/v1/embeddings"
            texts = body["input"] if isinstance(body["input"], list) else [body["input"]]
            vector = [1 / math.sqrt(768)] * 768
            data = [{"object": "embedding", "index": index, "embedding": vector} for index, _text in enumerate(texts)]
            answer = {"object": "list", "model": body["model"], "data": data, "usage": {"prompt_tokens": 1, "total_tokens": 1}}
            raw = json.dumps(answer if right else {"error": {"message": "no"}}).encode()
            self.send_response(200 if right else 401)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def kept_key(path: pathlib.Path) -> str:
    vault = pytest.importorskip("ansible.parsing.vault")
    text = path.read_text(encoding="utf-8")
    assert text.startswith("$ANSIBLE_VAULT;")
    lib = vault.VaultLib([("default", vault.VaultSecret(VAULT_PASSWORD.encode()))])
    return str(yaml.safe_load(lib.decrypt(text))["indexer_key"])


def test_a_token_is_made_once_and_kept_in_a_vault_file(tmp_path: pathlib.Path, oneapi_factory: t.Callable[..., OneApi], embeddings: str) -> None:
    gateway = oneapi_factory()
    token_file = tmp_path / "indexer-token.yml"
    variables = {
        "gateway_url": gateway.url,
        "gateway_root_password": "a-good-password",
        "embedding_url": embeddings,
        "embedding_key": UPSTREAM_KEY,
        "token_file": str(token_file),
    }

    first = ok(play(tmp_path, "modules_oneapi.yml", "gateway", variables))
    assert first.counts["changed"] >= 4
    ((token_id, key),) = [(row["id"], row["key"]) for row in gateway.tokens() if row["name"] == "indexer"]
    assert kept_key(token_file).removeprefix("sk-") == key and token_file.stat().st_mode & 0o777 == 0o600
    assert key not in first.text and "a-good-password" not in first.text and UPSTREAM_KEY not in first.text
    before = token_file.read_bytes()

    second = ok(play(tmp_path, "modules_oneapi.yml", "gateway", variables))
    assert second.counts["changed"] == 0, second.text
    assert token_file.read_bytes() == before
    assert [(row["id"], row["key"]) for row in gateway.tokens() if row["name"] == "indexer"] == [(token_id, key)]

    # The file is lost: the same key is written again.
    token_file.unlink()
    assert ok(play(tmp_path, "modules_oneapi.yml", "gateway", variables)).counts["changed"] == 1
    assert kept_key(token_file).removeprefix("sk-") == key


def test_a_replica_set_and_a_user(tmp_path: pathlib.Path, mongo_lab: Lab) -> None:
    node = mongo_lab.node_with_root()
    variables = {
        "mongodb_address": "127.0.0.1",
        "mongodb_port": node.port,
        "mongodb_members": [{"host": node.host, "priority": 2}],
        "mongodb_root_password": "root-password-1",
        "mongodb_library_password": "library-password-1",
    }
    foreseen = ok(play(tmp_path, "modules_mongodb.yml", "mongodb", variables, "--check"))
    assert foreseen.counts["changed"] == 1 and foreseen.counts["skipped"] == 1
    first = ok(play(tmp_path, "modules_mongodb.yml", "mongodb", variables))
    assert first.counts["changed"] == 2 and "library-password-1" not in first.text
    assert ok(play(tmp_path, "modules_mongodb.yml", "mongodb", variables)).counts["changed"] == 0
    with node.client("library", "library-password-1") as client:
        client.library.books.insert_one({"a": 1})


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a file away")
def test_config_json_is_written_and_the_container_restarted(tmp_path: pathlib.Path) -> None:
    """The container sees the new file after the restart only, as with a single mounted file."""
    fake = fakes()
    path, seen = tmp_path / "config.json", tmp_path / "seen.json"
    docker = tmp_path / "bin" / "docker"
    docker.parent.mkdir()
    docker.write_text(f'#!/bin/sh\ntest "$*" = "restart fastgpt" && cp {path} {seen} && echo "$*" >> {tmp_path}/restarts\n', encoding="utf-8")
    docker.chmod(0o755)

    class Container(fake.FastGPT):  # type: ignore[misc, name-defined]
        def answer(self, method: str, path: str, query: t.Any, body: t.Any, headers: t.Any) -> t.Any:
            if path == "/api/common/system/getInitData":
                return self.envelope(json.loads(seen.read_text(encoding="utf-8")))
            return super().answer(method, path, query, body, headers)

    def restarts() -> int:
        return len((tmp_path / "restarts").read_text().splitlines())

    with Container() as server:
        variables = {
            "ansible_become": False,
            "fastgpt_url": server.url,
            "fastgpt_config_path": str(path),
            "vault_reranker_key": UPSTREAM_KEY,
            "vault_fastgpt_root_password": fake.PASSWORD,
        }
        first = ok(play(tmp_path, "modules_fastgpt.yml", "fastgpt", variables))
        assert first.counts["changed"] == 2 and restarts() == 1 and UPSTREAM_KEY not in first.text
        assert (path.stat().st_uid, path.stat().st_gid, path.stat().st_mode & 0o777) == (1001, 1001, 0o640)
        second = ok(play(tmp_path, "modules_fastgpt.yml", "fastgpt", variables))
        assert second.counts["changed"] == 0 and restarts() == 1
        other = {**variables, "reranker_url": "http://192.0.2.99:8003/v1/rerank"}
        third = ok(play(tmp_path, "modules_fastgpt.yml", "fastgpt", other, "--diff"))
        assert restarts() == 2 and "192.0.2.99" in seen.read_text() and "192.0.2.99" in third.text and UPSTREAM_KEY not in third.text
        assert not server.things["dataset"] and not server.things["app"]
