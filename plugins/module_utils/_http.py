# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# PRIVATE: for the modules of this collection only; it may change in any release.
"""A small HTTP client over ansible.module_utils.urls: any status is an answer, only a missing answer is an error."""

from __future__ import annotations

import errno
import functools
import http.client
import json as jsonlib
import socket
import ssl
import time
import typing as t
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit

from ansible.module_utils.urls import Request, make_context

_CHUNK = 65536
_NEVER_SENT_ERRNO = (errno.ECONNREFUSED, errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EADDRNOTAVAIL)


class TransportError(Exception):
    """No usable answer: refused, time-out, TLS, broken off.

    `sent` is False only where the server surely never saw the request, so that repeating it is safe for any method.
    """

    def __init__(self, message: str, sent: bool = True) -> None:
        super().__init__(message)
        self.sent = sent


class Response:
    """A whole answer; header names are lower-case, several Set-Cookie lines are joined by a line feed."""

    def __init__(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.status = status
        self.headers = headers
        self.body = body

    def text(self) -> str:
        return self.body.decode("utf-8", errors="replace")

    def json(self) -> t.Any:
        """Raise ValueError where the body is not JSON."""
        return jsonlib.loads(self.body.decode("utf-8"))


class Stream:
    """An answer read line by line as it arrives; line ends are stripped. Iterating raises TransportError if it breaks off."""

    def __init__(self, raw: t.Any, url: str, deadline: float) -> None:
        self.status: int = raw.status
        self.headers: dict[str, str] = _headers(raw)
        self._raw = raw
        self._url = url
        self._deadline = deadline

    def __iter__(self) -> t.Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        _check_deadline(self._deadline, self._url)
        try:
            line: bytes = self._raw.readline()
        except (OSError, http.client.HTTPException, ValueError) as exc:
            raise _transport_error(self._url, exc) from exc
        if not line:
            self.close()
            raise StopIteration
        return line.rstrip(b"\r\n")

    def read(self) -> bytes:
        """All that is left, e.g. the JSON error body of an answer that is no stream."""
        return b"\n".join(self)

    def close(self) -> None:
        try:
            self._raw.close()
        except (OSError, http.client.HTTPException):
            pass

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *unused: t.Any) -> None:
        self.close()


def request(
    method: str,
    url: str,
    *,
    headers: dict[str, str] | None = None,
    json: t.Any = None,
    data: bytes | str | None = None,
    timeout: float = 30.0,
    validate_certs: bool = True,
    ca_path: str | None = None,
    client_cert: str | None = None,
    client_key: str | None = None,
    use_proxy: bool = False,
) -> Response:
    """Send one request; `timeout` bounds the whole exchange. Redirects are not followed: a 3xx is an answer.

    Proxies of the environment are left alone by default, since the servers asked here are inside the site.
    """
    deadline = time.monotonic() + timeout
    raw = _open(method, url, headers, json, data, timeout, validate_certs, ca_path, client_cert, client_key, use_proxy)
    try:
        body = _read(raw, url, deadline)
        return Response(raw.status, _headers(raw), body)
    finally:
        raw.close()


def stream(
    method: str,
    url: str,
    *,
    headers: dict[str, str] | None = None,
    json: t.Any = None,
    data: bytes | str | None = None,
    timeout: float = 30.0,
    validate_certs: bool = True,
    ca_path: str | None = None,
    client_cert: str | None = None,
    client_key: str | None = None,
    use_proxy: bool = False,
) -> Stream:
    """Like request(), for server-sent events."""
    deadline = time.monotonic() + timeout
    raw = _open(method, url, headers, json, data, timeout, validate_certs, ca_path, client_cert, client_key, use_proxy)
    return Stream(raw, url, deadline)


@functools.lru_cache(maxsize=8)
def _context(scheme: str, validate_certs: bool, ca_path: str | None, client_cert: str | None, client_key: str | None) -> t.Any:
    """Reading the system's certificates takes 20 ms, which open_url spends on each request, plain HTTP included."""
    if scheme == "http":
        return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    return make_context(cafile=ca_path, validate_certs=validate_certs, client_cert=client_cert, client_key=client_key)


def _open(
    method: str,
    url: str,
    headers: dict[str, str] | None,
    json: t.Any,
    data: bytes | str | None,
    timeout: float,
    validate_certs: bool,
    ca_path: str | None,
    client_cert: str | None,
    client_key: str | None,
    use_proxy: bool,
) -> t.Any:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise TransportError(f"{_shown(url)}: not an http:// or https:// URL", sent=False)
    sent_headers = {"Accept": "application/json", **(headers or {})}
    if json is not None:
        data = jsonlib.dumps(json, ensure_ascii=False).encode("utf-8")
        sent_headers.setdefault("Content-Type", "application/json")
    for name, value in sent_headers.items():
        # http.client's own refusal would print the value, which may be a key.
        if any(ord(char) < 32 or ord(char) > 255 for char in value):
            raise TransportError(f"{_shown(url)}: the value for header {name} holds a character that HTTP does not allow", sent=False)
    try:
        return Request().open(
            method,
            url,
            data=data.encode("utf-8") if isinstance(data, str) else data,
            headers=sent_headers,
            timeout=timeout,
            context=_context(parts.scheme, validate_certs, ca_path, client_cert, client_key),
            use_proxy=use_proxy,
            follow_redirects="none",
            decompress=False,
            # A ~/.netrc entry for the host would silently replace the Authorization header.
            use_netrc=False,
        )
    except HTTPError as exc:
        return exc
    except Exception as exc:  # Request has several error classes of its own besides OSError and HTTPException
        raise _transport_error(url, exc) from exc


def _read(raw: t.Any, url: str, deadline: float) -> bytes:
    chunks: list[bytes] = []
    # An HTTPError holds the real answer in fp.
    source = raw.fp if isinstance(raw, HTTPError) else raw
    if source is None:
        return b""
    read = getattr(source, "read1", source.read)
    try:
        while True:
            _check_deadline(deadline, url)
            chunk = read(_CHUNK)
            if not chunk:
                break
            chunks.append(chunk)
    except (OSError, http.client.HTTPException, ValueError) as exc:
        raise _transport_error(url, exc) from exc
    # read1 does not complain when the peer closes before Content-Length bytes have come.
    missing = getattr(source, "length", None)
    if isinstance(missing, int) and missing > 0:
        raise TransportError(f"{_shown(url)}: the answer broke off, {missing} bytes are missing")
    return b"".join(chunks)


def _check_deadline(deadline: float, url: str) -> None:
    if time.monotonic() > deadline:
        raise TransportError(f"{_shown(url)}: the answer was not complete in time")


def _headers(raw: t.Any) -> dict[str, str]:
    result: dict[str, str] = {}
    for name, value in raw.headers.items():
        name = name.lower()
        result[name] = f"{result[name]}\n{value}" if name in result and name == "set-cookie" else value
    return result


def _shown(url: str) -> str:
    """The URL for messages, without user info and query, which may hold secrets."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _transport_error(url: str, exc: Exception) -> TransportError:
    if isinstance(exc, TransportError):
        return exc
    reason: t.Any = exc.reason if isinstance(exc, URLError) and not isinstance(exc, HTTPError) else exc
    sent = True
    never = (socket.gaierror, ssl.SSLCertVerificationError, FileNotFoundError, PermissionError)
    if isinstance(reason, never) or getattr(reason, "errno", None) in _NEVER_SENT_ERRNO:
        sent = False
    if isinstance(reason, (socket.timeout, TimeoutError)):
        text = "no answer in time"
    elif isinstance(reason, http.client.RemoteDisconnected):
        text = "the server closed the connection without an answer"
    elif isinstance(reason, http.client.IncompleteRead):
        text = "the answer broke off"
    elif isinstance(reason, OSError) and reason.strerror:
        text = reason.strerror
    else:
        text = str(reason) or type(reason).__name__
    return TransportError(f"{_shown(url)}: {text}", sent=sent)
