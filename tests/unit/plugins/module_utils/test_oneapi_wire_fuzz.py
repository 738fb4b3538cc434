# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Whatever bytes come over the wire, the HTTP client gives an answer or its one error."""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
import typing as t

import pytest
from ansible_collections.selfhosted.fastgpt.plugins.module_utils import _http

pytest.importorskip("hypothesis")
from hypothesis import given
from hypothesis import strategies as st

lines = st.one_of(
    st.sampled_from(
        [
            b"Content-Length: 5",
            b"Content-Length: 5000",
            b"Content-Length: -1",
            b"Content-Length: many",
            b"Transfer-Encoding: chunked",
            b"Content-Encoding: gzip",
            b"Connection: close",
            b"Location: http://[::1",
            b"Set-Cookie: a=b",
            b"no colon",
            b": no name",
            b"X: \xff\xfe",
            b"X: " + b"y" * 70000,
        ]
    ),
    st.binary(max_size=12),
)
starts = st.one_of(
    st.sampled_from(
        [b"HTTP/1.1 200 OK", b"HTTP/1.0 204", b"HTTP/1.1 100 Continue", b"HTTP/1.1 302 Found", b"HTTP/1.1 401 No", b"HTTP/1.1 429 x", b"HTTP/1.1 500 x"]
    ),
    st.sampled_from([b"HTTP/1.1 abc", b"HTTP/9.9 200 OK", b"SSH-2.0-x", b"", b"HTTP/1.1 99999 x"]),
    st.binary(max_size=20),
)
bodies = st.one_of(st.binary(max_size=20), st.sampled_from([b"5\r\nhello\r\n0\r\n\r\n", b"zz\r\n", b"5\r\nhel", b"-5\r\n", b'{"success":true}']))
replies = st.builds(lambda start, head, body: b"\r\n".join([start, *head, b"", body]), starts, st.lists(lines, max_size=4), bodies)


@pytest.fixture(scope="module")
def server() -> t.Iterator[tuple[str, queue.Queue[bytes]]]:
    """Answers each connection with the next bytes of the queue, then closes it."""
    waiting: queue.Queue[bytes] = queue.Queue()
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                link, _address = listener.accept()
            except OSError:
                return
            with link, contextlib.suppress(OSError):
                link.settimeout(2)
                link.recv(65536)
                link.sendall(waiting.get(timeout=2))
                link.shutdown(socket.SHUT_WR)

    threading.Thread(target=serve, daemon=True).start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}/", waiting
    listener.close()


@given(reply=replies, streamed=st.booleans())
def test_whatever_comes_over_the_wire(server: tuple[str, queue.Queue[bytes]], reply: bytes, streamed: bool) -> None:
    url, waiting = server
    waiting.put(reply)
    try:
        if streamed:
            with _http.stream("GET", url, timeout=3) as stream:
                assert all(isinstance(line, bytes) for line in stream)
            return
        response = _http.request("GET", url, timeout=3)
    except _http.TransportError as exc:
        assert exc.sent
        assert not exc.lasting
        assert str(exc).startswith(url)
        return
    assert isinstance(response.status, int)
    assert isinstance(response.text(), str)
    with contextlib.suppress(ValueError):
        response.json()
