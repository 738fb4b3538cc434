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
import re
import socket
import ssl
import time
import typing as t
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit

from ansible.module_utils.urls import Request, make_context

if t.TYPE_CHECKING:
    from typing_extensions import Unpack

_CHUNK = 65536
_NEVER_SENT_ERRNO = (errno.ECONNREFUSED, errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EADDRNOTAVAIL)


class Options(t.TypedDict, total=False):
    """What request() and stream() take besides method, URL and time limit; all of it has a default."""

    headers: t.Optional[t.Dict[str, str]]
    json: t.Any
    data: t.Union[bytes, str, None]
    validate_certs: bool
    ca_path: t.Optional[str]
    client_cert: t.Optional[str]
    client_key: t.Optional[str]
    use_proxy: bool


class TransportError(Exception):
    """No usable answer: refused, time-out, TLS, broken off.

    `sent` is False only where the server surely never saw the request, so that repeating it is safe for any method.
    `lasting` is True where repeating it is useless, since only another setting helps.
    """

    def __init__(self, message: str, sent: bool = True, lasting: bool = False) -> None:
        super().__init__(message)
        self.sent = sent
        self.lasting = lasting


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
        try:
            return jsonlib.loads(self.body.decode("utf-8"))
        except RecursionError as exc:
            raise ValueError("nested too deeply") from exc


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


def request(method: str, url: str, *, timeout: float = 30.0, **options: Unpack[Options]) -> Response:
    """Send one request; `timeout` bounds the whole exchange. Redirects are not followed: a 3xx is an answer.

    Proxies of the environment are left alone by default, since the servers asked here are inside the site.
    """
    deadline = time.monotonic() + timeout
    raw = _open(method, url, timeout, **options)
    try:
        body = _read(raw, url, deadline)
        return Response(raw.status, _headers(raw), body)
    finally:
        raw.close()


def stream(method: str, url: str, *, timeout: float = 30.0, **options: Unpack[Options]) -> Stream:
    """Like request(), for server-sent events."""
    deadline = time.monotonic() + timeout
    return Stream(_open(method, url, timeout, **options), url, deadline)


@functools.lru_cache(maxsize=8)
def _context(scheme: str, validate_certs: bool, ca_path: str | None, client_cert: str | None, client_key: str | None) -> t.Any:
    """Reading the system's certificates takes 20 ms, which open_url spends on each request, plain HTTP included."""
    if scheme == "http":
        return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    for option, path in (("ca_path", ca_path), ("client_cert", client_cert), ("client_key", client_key)):
        if path is None:
            continue
        try:
            with open(path, "rb") as file:
                text = file.read()
        except OSError as exc:
            raise TransportError(f"{option}: {path}: {exc.strerror}", sent=False, lasting=True) from exc
        if option != "ca_path" and b"ENCRYPTED" in text:
            # The TLS library would ask for the passphrase on the terminal, and wait.
            raise TransportError(f"{option}: {path}: its key is protected by a passphrase. Give one without", sent=False, lasting=True)
    try:
        return make_context(cafile=ca_path, validate_certs=validate_certs, client_cert=client_cert, client_key=client_key)
    except (OSError, ValueError) as exc:
        files = ", ".join(path for path in (ca_path, client_cert, client_key) if path)
        raise TransportError(f"{files}: not usable for TLS ({exc}). Give PEM files, and the key of that certificate", sent=False, lasting=True) from exc


def _open(
    method: str,
    url: str,
    timeout: float,
    *,
    headers: dict[str, str] | None = None,
    json: t.Any = None,
    data: bytes | str | None = None,
    validate_certs: bool = True,
    ca_path: str | None = None,
    client_cert: str | None = None,
    client_key: str | None = None,
    use_proxy: bool = False,
) -> t.Any:
    try:
        parts = urlsplit(url)
        # Asking for the port checks it.
        if parts.port == 0 or re.search(r"[\x00-\x20\x7f]", url):
            raise ValueError("port 0, or a blank in it")
    except ValueError as exc:
        raise TransportError(f"url: not a usable URL ({exc})", sent=False, lasting=True) from exc
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise TransportError(f"{_shown(url)}: not an http:// or https:// URL", sent=False, lasting=True)
    sent_headers = {"Accept": "application/json", **(headers or {})}
    if json is not None:
        data = jsonlib.dumps(json, ensure_ascii=False).encode("utf-8")
        sent_headers.setdefault("Content-Type", "application/json")
    for name, value in sent_headers.items():
        # http.client's own refusal would print the value, which may be a key.
        if any(ord(char) < 32 or ord(char) > 255 for char in value):
            text = f"{_shown(url)}: the value for header {name} holds a character that HTTP does not allow"
            raise TransportError(text, sent=False, lasting=True)
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
    # Trust that one side refuses the other, or no TLS at all: nothing has been asked yet, and nothing changes by itself.
    broken = (ssl.SSLEOFError, ssl.SSLZeroReturnError, ssl.SSLSyscallError)
    refused = isinstance(reason, ssl.SSLError) and not isinstance(reason, broken) and (reason is not exc or "ALERT" in str(reason.reason))
    never = refused or isinstance(reason, (socket.gaierror, FileNotFoundError, PermissionError))
    sent = not never and getattr(reason, "errno", None) not in _NEVER_SENT_ERRNO
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
    if refused:
        text += _tls_remedy(text)
    return TransportError(f"{_shown(url)}: {text}", sent=sent, lasting=refused)


def _tls_remedy(text: str) -> str:
    lower = text.lower()
    if "alert" in lower and ("certificate" in lower or "handshake" in lower or "unknown ca" in lower):
        return ". The server asks for a client certificate that it trusts: see client_cert and client_key"
    if "verify failed" in lower:
        return ". Give its authority as ca_path, and use the host name that the certificate is for"
    return ". Does the server speak https there?"
