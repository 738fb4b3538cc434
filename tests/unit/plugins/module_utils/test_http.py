# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

import http.server
import socket
import subprocess
import threading
import time
import typing as t

import pytest
from ansible_collections.selfhosted.fastgpt.plugins.module_utils import _http


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *unused: t.Any) -> None:
        pass

    def _reply(self, status: int, body: bytes, length: int | None = None, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        if self.path == "/short":
            self._reply(200, b"abc", length=100)
            self.close_connection = True
        elif self.path == "/redirect":
            self._reply(301, b"", Location="/ok")
        elif self.path == "/cut":
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
        elif self.path == "/drip":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            try:
                for _number in range(100):
                    self.wfile.write(b"x")
                    self.wfile.flush()
                    time.sleep(0.1)
            except OSError:
                pass
        elif self.path == "/events":
            self.send_response(200)
            self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(b"data: 1\r\n\r\ndata: [DONE]\n\n")
            self.close_connection = True
        elif self.path == "/error":
            self._reply(429, b'{"error": "slow down"}', Set_Cookie="a=b; Expires=Mon, 1")
        else:
            self._reply(200, repr((self.headers.get("Authorization"), self.headers.get("X-Key"))).encode())

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self._reply(200, body, X_Type=self.headers.get("Content-Type", ""))


@pytest.fixture(scope="module")
def base() -> t.Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_json_both_ways(base: str) -> None:
    response = _http.request("POST", f"{base}/x", json={"name": "模型"})
    assert (response.status, response.json(), response.headers["x-type"]) == (200, {"name": "模型"}, "application/json")


def test_any_status_is_an_answer(base: str) -> None:
    response = _http.request("GET", f"{base}/error")
    assert (response.status, response.json()) == (429, {"error": "slow down"})
    assert response.headers["set-cookie"].startswith("a=b;")


def test_redirects_are_answers(base: str) -> None:
    response = _http.request("GET", f"{base}/redirect")
    assert (response.status, response.headers["location"], response.body) == (301, "/ok", b"")


@pytest.mark.parametrize(("path", "word"), [("/short", "97 bytes are missing"), ("/cut", "closed the connection")])
def test_broken_answers_may_have_been_carried_out(base: str, path: str, word: str) -> None:
    with pytest.raises(_http.TransportError, match=word) as caught:
        _http.request("GET", base + path)
    assert caught.value.sent


def test_the_time_limit_holds_for_an_answer_that_drips(base: str) -> None:
    started = time.monotonic()
    with pytest.raises(_http.TransportError, match="in time"):
        _http.request("GET", f"{base}/drip", timeout=1)
    assert time.monotonic() - started < 4


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/", "http://no-such-host.invalid/", "gpu-1:8000", "file:///etc/passwd", ""])
def test_what_was_never_sent(url: str) -> None:
    with pytest.raises(_http.TransportError) as caught:
        _http.request("POST", url, timeout=5)
    assert not caught.value.sent


@pytest.mark.parametrize("value", ["key\nX-Other: 1", "密钥"])
def test_a_bad_header_is_refused_without_showing_it(base: str, value: str) -> None:
    with pytest.raises(_http.TransportError) as caught:
        _http.request("GET", base, headers={"Authorization": value})
    assert value not in str(caught.value)


def test_messages_leave_out_query_and_user() -> None:
    with pytest.raises(_http.TransportError) as caught:
        _http.request("GET", "http://me:secret@127.0.0.1:9/a?key=secret")
    assert "secret" not in str(caught.value)


def test_netrc_and_proxies_are_left_alone(base: str, monkeypatch: pytest.MonkeyPatch, tmp_path: t.Any) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login a password b\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    assert _http.request("GET", base, headers={"Authorization": "Bearer x"}).text() == "('Bearer x', None)"


def test_events_come_line_by_line(base: str) -> None:
    with _http.stream("GET", f"{base}/events") as stream:
        assert stream.status == 200
        assert [line for line in stream if line] == [b"data: 1", b"data: [DONE]"]


def test_an_error_in_place_of_a_stream(base: str) -> None:
    with _http.stream("GET", f"{base}/error") as stream:
        assert (stream.status, stream.read()) == (429, b'{"error": "slow down"}')


def test_tls(tmp_path: t.Any) -> None:
    import ssl

    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs openssl")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"https://127.0.0.1:{server.server_port}/"
    try:
        assert _http.request("GET", url, ca_path=str(certificate)).status == 200
        assert _http.request("GET", url, validate_certs=False).status == 200
        with pytest.raises(_http.TransportError, match="(?i)certificate") as caught:
            _http.request("GET", url)
        assert not caught.value.sent
        with pytest.raises(_http.TransportError, match="No such file"):
            _http.request("GET", url, ca_path="/nonexistent.pem")
    finally:
        server.shutdown()
