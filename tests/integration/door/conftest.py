# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A real nginx with the role's own templates, in a directory of its own, before servers that do as they are told."""

from __future__ import annotations

import datetime
import http.client
import http.server
import ipaddress
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
import typing as t
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "support"))

from ports import free_port  # noqa: E402

NGINX = "/usr/sbin/nginx"
MAIN = """
daemon off;
{user}
worker_processes 2;
pid {root}/nginx.pid;
error_log {root}/error.log;
worker_shutdown_timeout 60s;
events {{ worker_connections 256; }}
http {{
    client_body_temp_path {root}/temp/body; proxy_temp_path {root}/temp/proxy; fastcgi_temp_path {root}/temp/fastcgi;
    uwsgi_temp_path {root}/temp/uwsgi; scgi_temp_path {root}/temp/scgi;
    access_log {root}/other.log;
    gzip on;
    include {root}/etc/conf.d/*.conf;
}}
"""


def wait_for(what: t.Callable[[], t.Any], seconds: float = 10) -> t.Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = what()
        if found:
            return found
        time.sleep(0.02)
    raise AssertionError(f"{what} did not come true in {seconds} s")


def list_of(directory: str) -> list[str]:
    try:
        return os.listdir(directory)
    except OSError:
        return []


# Certificates


class Certificate(t.NamedTuple):
    pem: str
    key_pem: str
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey


def make_certificate(name: str, signer: Certificate | None = None, days: tuple[int, int] = (-1, 30), ca: bool = False, dns: str = "") -> Certificate:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.timezone.utc)
    issuer_key = signer.key if signer else key
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(signer.certificate.subject if signer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + datetime.timedelta(days=days[0]))
        .not_valid_after(now + datetime.timedelta(days=days[1]))
        .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
    )
    if ca:
        usage = {name: False for name in ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement")}
        builder = builder.add_extension(x509.KeyUsage(**usage, key_cert_sign=True, crl_sign=True, encipher_only=False, decipher_only=False), critical=True)
    else:
        names: list[x509.GeneralName] = [x509.IPAddress(ipaddress.ip_address("127.0.0.1")), x509.DNSName(dns or "127.0.0.1")]
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    certificate = builder.sign(issuer_key, hashes.SHA256())
    pem = certificate.public_bytes(serialization.Encoding.PEM).decode()
    key_pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()).decode()
    return Certificate(pem, key_pem, certificate, key)


class Pki(t.NamedTuple):
    ca: Certificate
    other_ca: Certificate
    server: Certificate


@pytest.fixture(scope="session")
def pki() -> Pki:
    ca = make_certificate("test ca", ca=True)
    return Pki(ca, make_certificate("other ca", ca=True), make_certificate("server", ca))


def trusting(*cas: Certificate) -> ssl.SSLContext:
    return ssl.create_default_context(cadata="".join(ca.pem for ca in cas))


# Servers behind the door


class Upstream:
    """An HTTP server that counts, answers with what it got, and fails or waits on request."""

    def __init__(self, port: int = 0, tls: Certificate | None = None, directory: Path | None = None) -> None:
        self.requests: list[dict[str, t.Any]] = []
        self.status, self.hang_up, self.delay = 200, False, 0.0
        self.go_on = threading.Event()
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = 0

            def log_message(self, *args: t.Any) -> None:
                pass

            def do_GET(self) -> None:
                self.answer()

            def do_POST(self) -> None:
                self.answer()

            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                outer.requests.append({"path": self.path, "headers": dict(self.headers), "body": len(body)})
                if outer.hang_up:
                    self.close_connection = True
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return
                time.sleep(outer.delay)
                if "stream" in self.path:
                    self.send_response(200)
                    self.send_header("Content-Type", "text/event-stream")
                    self.send_header("Transfer-Encoding", "chunked")
                    self.end_headers()
                    for text in ("first\n", "last\n"):
                        self.wfile.write(f"{len(text):x}\r\n{text}\r\n".encode())
                        if text == "first\n":
                            outer.go_on.wait(20)
                    self.wfile.write(b"0\r\n\r\n")
                    return
                answer = json.dumps({"server": outer.port, "path": self.path, "headers": dict(self.headers), "body": len(body)}).encode()
                self.send_response(outer.status)
                self.send_header("Content-Type", "application/json")
                self.send_header("X-Frame-Options", "DENY")
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

        class Server(http.server.ThreadingHTTPServer):
            daemon_threads = True

            def __init__(self, *args: t.Any) -> None:
                self.connections: list[socket.socket] = []
                super().__init__(*args)

            def get_request(self) -> t.Any:
                connection, address = super().get_request()
                self.connections.append(connection)
                return connection, address

            def handle_error(self, *args: t.Any) -> None:
                pass

        # one of its own: the port of a server that is gone must not become another test's
        self.server = Server(("127.0.0.1", port or free_port()), Handler)
        if tls:
            assert directory
            path = directory / f"{self.server.server_address[1]}.pem"
            path.write_text(tls.pem + tls.key_pem)
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(path)
            self.server.socket = context.wrap_socket(self.server.socket, server_side=True, do_handshake_on_connect=False)
        self.port: int = self.server.server_address[1]
        self.address = f"127.0.0.1:{self.port}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self.thread.start()

    def authorizations(self) -> set[str | None]:
        return {request["headers"].get("Authorization") for request in self.requests}

    def stop(self) -> None:
        """As a killed server stops: it listens no more, and its connections are gone."""
        self.server.shutdown()
        self.server.server_close()
        for connection in self.server.connections:
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass


# The door


class Renderer:
    def __init__(self) -> None:
        command = [sys.executable, str(Path(__file__).with_name("render.py"))]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(self, variables: dict[str, t.Any]) -> dict[str, t.Any]:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(variables) + "\n")
        self.process.stdin.flush()
        answer: dict[str, t.Any] = json.loads(self.process.stdout.readline())
        return answer


@pytest.fixture(scope="session")
def renderer() -> t.Iterator[Renderer]:
    found = Renderer()
    yield found
    assert found.process.stdin
    found.process.stdin.close()
    found.process.wait(10)


class Answer(t.NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> t.Any:
        return json.loads(self.body)

    @property
    def code(self) -> str:
        return str(self.json()["error"]["code"])


class Stream:
    """An answer of which the beginning has been read."""

    def __init__(self, connection: http.client.HTTPConnection) -> None:
        self.connection, self.response = connection, connection.getresponse()
        self.first = self.response.readline()

    def rest(self) -> bytes:
        rest = self.response.read()
        self.connection.close()
        return rest


class Door:
    def __init__(self, root: Path, renderer: Renderer) -> None:
        self.root, self.renderer = root, renderer
        self.process: subprocess.Popen[bytes] | None = None
        self.log = root / "log" / "selfhosted-fastgpt-test.log"
        for path in ("etc/conf.d", "temp", "log", "sockets"):
            (root / path).mkdir(parents=True)
        user = ""
        if os.geteuid() == 0:
            user = "user www-data;"
            shutil.chown(root / "sockets", "root", "www-data")
            (root / "sockets").chmod(0o750)
        (root / "nginx.conf").write_text(MAIN.format(root=root, user=user))

    def write(self, *services: dict[str, t.Any], **variables: t.Any) -> None:
        texts = self.renderer(
            {
                "door_name": "test",
                "door_address": "127.0.0.1",
                "door_services": [{"name": "a model", **service} for service in services],
                "door__nginx_dir": str(self.root / "etc"),
                "door__log_dir": str(self.root / "log"),
                "door__socket_dir": str(self.root / "sockets"),
                "door_connect_timeout": 2,
                **variables,
            }
        )
        for file in texts["door__files"]:
            Path(file["path"]).write_text(file["content"])
        (self.root / "etc/conf.d/test.conf").write_text(texts["door.conf.j2"])
        (self.root / "etc/conf.d/test.keys.conf").write_text(texts["keys.conf.j2"])

    def nginx(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([NGINX, "-c", str(self.root / "nginx.conf"), "-q", *arguments], capture_output=True, text=True, check=False, timeout=30)

    def start(self) -> None:
        test = self.nginx("-t")
        assert test.returncode == 0, test.stderr
        self.process = subprocess.Popen([NGINX, "-c", str(self.root / "nginx.conf")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_for(lambda: len(self.workers()) == 2)

    def open(self, *services: dict[str, t.Any], **variables: t.Any) -> int:
        """Write and run, or reload what runs already; the first service's port."""
        self.write(*services, **variables)
        if not self.process:
            self.start()
        else:
            self.reload()
        return int(services[0]["port"])

    def workers(self) -> set[int]:
        assert self.process and self.process.poll() is None, (self.root / "error.log").read_text()
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        found = set()
        for child in children:
            try:
                title = Path(f"/proc/{child}/cmdline").read_bytes()
            except OSError:  # an old one that has just ended
                continue
            if b"worker process" in title and b"shutting down" not in title:
                found.add(int(child))
        return found

    def reload(self) -> None:
        assert self.process
        test = self.nginx("-t")
        assert test.returncode == 0, test.stderr
        before = self.workers()
        self.process.send_signal(signal.SIGHUP)
        wait_for(lambda: len(self.workers() - before) == 2 and not self.workers() & before)

    def kill(self) -> None:
        """As the kernel kills: no time for the socket files."""
        assert self.process
        workers = self.workers()
        # the master first: it would replace its workers
        self.process.kill()
        self.process.wait(10)
        for worker in workers:
            os.kill(worker, signal.SIGKILL)
        wait_for(lambda: not any(list_of(f"/proc/{worker}/fd") for worker in workers))
        self.process = None

    def stop(self) -> None:
        if self.process and self.process.poll() is None:
            self.process.terminate()
            self.process.wait(10)

    def connect(self, port: int, context: ssl.SSLContext | None) -> http.client.HTTPConnection:
        if context:
            return http.client.HTTPSConnection("127.0.0.1", port, timeout=20, context=context)
        return http.client.HTTPConnection("127.0.0.1", port, timeout=20)

    def ask(
        self,
        port: int,
        path: str = "/v1/echo",
        key: str | None = "sk-Right",
        *,
        method: str = "GET",
        body: bytes | None = None,
        headers: dict[str, str] | None = None,
        context: ssl.SSLContext | None = None,
    ) -> Answer:
        connection = self.connect(port, context)
        sent = {**({} if key is None else {"Authorization": f"Bearer {key}"}), **(headers or {})}
        connection.request("POST" if body is not None else method, path, body, sent)
        response = connection.getresponse()
        answer = Answer(response.status, {name.lower(): value for name, value in response.getheaders()}, response.read())
        connection.close()
        return answer

    def stream(self, port: int, path: str = "/v1/stream", key: str = "sk-Right") -> Stream:
        connection = self.connect(port, None)
        connection.request("POST", path, b"{}", {"Authorization": f"Bearer {key}"})
        return Stream(connection)

    def lines(self) -> list[dict[str, t.Any]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()]


@pytest.fixture
def directory() -> t.Iterator[Path]:
    # pytest's own directories are closed to nginx's unprivileged workers
    path = Path(tempfile.mkdtemp(prefix="door-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.fixture
def door(directory: Path, renderer: Renderer) -> t.Iterator[Door]:
    assert Path(NGINX).exists(), "nginx is missing: apt-get install nginx-light (lab/packages.txt has it)"
    found = Door(directory / "door", renderer)
    yield found
    found.stop()


@pytest.fixture
def upstreams(directory: Path) -> t.Iterator[t.Callable[..., Upstream]]:
    made: list[Upstream] = []

    def make(**options: t.Any) -> Upstream:
        made.append(Upstream(directory=directory, **options))
        return made[-1]

    yield make
    for upstream in made:
        upstream.go_on.set()
        upstream.stop()


@pytest.fixture
def upstream(upstreams: t.Callable[..., Upstream]) -> Upstream:
    return upstreams()
