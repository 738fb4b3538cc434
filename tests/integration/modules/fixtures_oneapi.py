# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""One-API servers for the module tests: the stand-in of the lab, or the real one where ONE_API_BINARY names it.

With the real binary TIKTOKEN_CACHE_DIR must hold its two files; tests that inject faults are skipped then.
"""

from __future__ import annotations

import contextlib
import http.client
import http.server
import importlib
import io
import json
import os
import pathlib
import ssl
import subprocess
import sys
import threading
import time
import typing as t
import urllib.error
import urllib.request
from unittest import mock

import pytest
from ansible.module_utils import _internal, basic
from ports import free_port

REPO = pathlib.Path(__file__).resolve().parents[3]
STAND_IN = REPO / "lab" / "stand_ins" / "one_api" / "one_api.py"
MODULES = "ansible_collections.selfhosted.fastgpt.plugins.modules"
ACCESS_TOKEN = "0123456789abcdef0123456789abcdef"
ROOT_PASSWORD = "rotated-pass-1"

Result = t.Dict[str, t.Any]


class OneApi:
    """A running server with its data in a directory of its own."""

    def __init__(self, directory: pathlib.Path, **environment: str) -> None:
        self.directory = directory
        self.real = os.environ.get("ONE_API_BINARY")
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.faults_file = directory / "faults.json"
        self.requests_file = directory / "requests.log"
        self.environment = {
            **os.environ,
            "PORT": str(self.port),
            "SQLITE_PATH": str(directory / "one-api.db"),
            "INITIAL_ROOT_ACCESS_TOKEN": ACCESS_TOKEN,
            "GLOBAL_API_RATE_LIMIT": "0",
            "GLOBAL_WEB_RATE_LIMIT": "0",
            "ONE_API_STANDIN_NO_TIKTOKEN": "1",
            "ONE_API_STANDIN_FAULTS": str(self.faults_file),
            "ONE_API_STANDIN_REQUESTS": str(self.requests_file),
            **environment,
        }
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [self.real] if self.real else [sys.executable, str(STAND_IN)]
        with open(self.directory / "output.log", "ab") as output:
            self.process = subprocess.Popen(command, cwd=self.directory, env=self.environment, stdout=output, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                if self.api("GET", "/api/status")["success"]:
                    return
            if self.process.poll() is not None:
                break
            time.sleep(0.1)
        raise AssertionError("One-API does not start:\n" + (self.directory / "output.log").read_text(errors="replace")[-2000:])

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(20)

    def api(self, method: str, path: str, body: t.Any = None, token: str = ACCESS_TOKEN) -> t.Any:
        """The way round the modules, to set the scene and to look at what they did."""
        request = urllib.request.Request(
            self.url + path,
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Authorization": token, "Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=30) as response:
                return json.loads(response.read() or b"{}")
        except urllib.error.HTTPError as exc:
            return {"success": False, "status": exc.code, "text": exc.read().decode()}

    def channels(self) -> list[Result]:
        rows = self.api("GET", "/api/channel/search?keyword=")["data"] or []
        return sorted(rows, key=lambda row: row["id"])

    def tokens(self) -> list[Result]:
        rows = self.api("GET", "/api/token/search?keyword=")["data"] or []
        return sorted(rows, key=lambda row: row["id"])

    def options(self) -> dict[str, str]:
        return {row["key"]: row["value"] for row in self.api("GET", "/api/option/")["data"]}

    def served(self) -> set[str]:
        return set(self.api("GET", "/api/user/available_models")["data"] or [])

    def login(self, password: str, username: str = "root") -> bool:
        return bool(self.api("POST", "/api/user/login", {"username": username, "password": password})["success"])

    def faults(self, *rules: Result) -> None:
        if self.real:
            pytest.skip("the real One-API injects no faults")
        self.faults_file.write_text(json.dumps(rules), encoding="utf-8")

    def take_requests(self) -> list[str]:
        """What was asked since the last call; empty with the real server."""
        lines = self.requests_file.read_text(encoding="utf-8").splitlines() if self.requests_file.exists() else []
        self.requests_file.write_text("", encoding="utf-8")
        return lines

    def args(self, **arguments: t.Any) -> Result:
        return {"url": self.url, "access_token": ACCESS_TOKEN, **arguments}


def _payload(arguments: Result, check: bool, diff: bool) -> bytes:
    internal = {"_ansible_check_mode": check, "_ansible_diff": diff, "_ansible_remote_tmp": "/tmp", "_ansible_keep_remote_files": False}
    return json.dumps({"ANSIBLE_MODULE_ARGS": {**arguments, **internal}}).encode()


def run_module(name: str, arguments: Result, *, check: bool = False, diff: bool = True) -> Result:
    """Run a module in this process, as Ansible's wrapper does, and return its result; `output` is all that it printed."""
    basic._ANSIBLE_ARGS = _payload(arguments, check, diff)  # type: ignore[attr-defined]
    basic._ANSIBLE_PROFILE = "legacy"  # type: ignore[attr-defined]
    module = importlib.import_module(f"{MODULES}.{name}")
    output = io.StringIO()
    code: t.Any = 0
    # Any test that loads a part of Ansible's controller makes this process one, and a controller shows warnings instead of returning them.
    controller = mock.patch.object(_internal, "is_controller", False)
    with contextlib.redirect_stdout(output), controller:
        try:
            module.main()
        except SystemExit as exc:
            code = exc.code
    text = output.getvalue()
    result: Result = json.loads(text.strip().splitlines()[-1])
    result.setdefault("failed", bool(code))
    result["output"] = text
    return result


_CHILD = f"""
import importlib, sys
from ansible.module_utils import basic
basic._ANSIBLE_ARGS, basic._ANSIBLE_PROFILE = sys.stdin.buffer.read(), "legacy"
importlib.import_module("{MODULES}." + sys.argv[1]).main()
"""


def run_together(name: str, *arguments: Result) -> list[Result]:
    """Run a module several times at once, in processes of their own."""
    environment = {**os.environ, "PYTHONPATH": str(REPO / ".collections")}
    children = [
        subprocess.Popen([sys.executable, "-c", _CHILD, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
        for _item in arguments
    ]
    for child, item in zip(children, arguments):
        assert child.stdin is not None
        child.stdin.write(_payload(item, False, False))
        child.stdin.close()
        child.stdin = None
    results = []
    for child in children:
        output, errors = child.communicate(timeout=120)
        assert output.strip(), errors.decode()
        result = json.loads(output.decode().strip().splitlines()[-1])
        result.setdefault("failed", bool(child.returncode))
        results.append(result)
    return results


@pytest.fixture
def oneapi_factory(tmp_path: pathlib.Path) -> t.Iterator[t.Callable[..., OneApi]]:
    servers: list[OneApi] = []

    def make(**environment: str) -> OneApi:
        directory = tmp_path / f"one-api-{len(servers)}"
        directory.mkdir()
        servers.append(OneApi(directory, **environment))
        servers[-1].start()
        return servers[-1]

    yield make
    for server in servers:
        server.stop()


@pytest.fixture
def oneapi(oneapi_factory: t.Callable[..., OneApi]) -> OneApi:
    """A fresh server: root/123456, and the access token of INITIAL_ROOT_ACCESS_TOKEN."""
    return oneapi_factory()


@pytest.fixture(scope="session")
def _oneapi_session(tmp_path_factory: pytest.TempPathFactory) -> t.Iterator[OneApi]:
    server = OneApi(tmp_path_factory.mktemp("one-api"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def oneapi_shared(_oneapi_session: OneApi) -> OneApi:
    """One server for many tests, without channels and tokens; for tests that leave users and options alone."""
    _oneapi_session.faults_file.unlink(missing_ok=True)
    for kind, rows in (("channel", _oneapi_session.channels()), ("token", _oneapi_session.tokens())):
        for row in rows:
            _oneapi_session.api("DELETE", f"/api/{kind}/{row['id']}")
    _oneapi_session.take_requests()
    return _oneapi_session


class Certificates:
    """An authority with a server and a client certificate of its own, and another authority with a client certificate."""

    def __init__(self, directory: pathlib.Path) -> None:
        self.directory = directory
        for name in ("ca", "other_ca"):
            self._make(name, "-subj", f"/CN={name}", "-addext", "keyUsage=critical,keyCertSign,digitalSignature")
        for name, authority, more in (("server", "ca", ("-addext", "subjectAltName=IP:127.0.0.1")), ("client", "ca", ()), ("stranger", "other_ca", ())):
            self._make(name, "-subj", f"/CN={name}", "-CA", self[authority], "-CAkey", self[f"{authority}_key"], *more)
        both = pathlib.Path(self["client"]).read_text() + pathlib.Path(self["client_key"]).read_text()
        (directory / "client_both.pem").write_text(both)
        self._openssl("pkcs8", "-topk8", "-in", self["client_key"], "-passout", "pass:x", "-out", self["client_locked"])

    def __getitem__(self, name: str) -> str:
        return str(self.directory / f"{name}.pem")

    def _make(self, name: str, *more: str) -> None:
        kind = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2")
        self._openssl("req", "-x509", *kind, "-keyout", self[f"{name}_key"], "-out", self[name], *more)

    @staticmethod
    def _openssl(*command: str) -> None:
        subprocess.run(["openssl", *command], check=True, capture_output=True)


class _Forward(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    target = 0

    def log_message(self, *unused: t.Any) -> None:
        pass

    def do_GET(self) -> None:
        link = http.client.HTTPConnection("127.0.0.1", self.target, timeout=20)
        try:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            passed = {name: self.headers[name] for name in ("Authorization", "Cookie", "Content-Type") if name in self.headers}
            link.request(self.command, self.path, body, passed)
            answer = link.getresponse()
            body = answer.read()
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name in ("Content-Type", "Set-Cookie"):
                    self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
        finally:
            link.close()

    do_POST = do_PUT = do_DELETE = do_GET


class _Quiet(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *unused: t.Any) -> None:
        """Clients that do not trust the certificate are what is tested."""


@contextlib.contextmanager
def tls_front(server: OneApi, certificates: Certificates, *, ask_client: bool = False, latest: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> t.Iterator[str]:
    """A proxy that speaks TLS, as operators put one before One-API; gives its URL."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates["server"], certificates["server_key"])
    context.maximum_version = latest
    if ask_client:
        context.load_verify_locations(certificates["ca"])
        context.verify_mode = ssl.CERT_REQUIRED
    front = _Quiet(("127.0.0.1", 0), type("Forward", (_Forward,), {"target": server.port}))
    # The handshake belongs into the thread of the connection: a client that breaks it off must not stop the others.
    front.socket = context.wrap_socket(front.socket, server_side=True, do_handshake_on_connect=False)
    threading.Thread(target=front.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield f"https://127.0.0.1:{front.server_port}"
    finally:
        front.shutdown()
        front.server_close()


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries without their pauses, for what runs in this process."""
    from ansible_collections.selfhosted.fastgpt.plugins.module_utils import _oneapi

    defaults: dict[str, t.Any] = _oneapi.Client.__init__.__kwdefaults__
    monkeypatch.setitem(defaults, "sleep", lambda seconds: time.sleep(0.01))
