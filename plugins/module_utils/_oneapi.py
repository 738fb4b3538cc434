# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# PRIVATE: for the modules of this collection only; it may change in any release.
"""Client of One-API's management API (`/api/*`), written for v0.6.8 to v0.6.11.

The server answers nearly every failure with status 200 and `success: false`, gives no id for a new channel, knows no
unique names and limits the rate without a Retry-After. Nothing here looks at message texts: they differ by version and
language.
"""

from __future__ import annotations

import email.utils
import json
import re
import time
import typing as t
from urllib.parse import quote, urlsplit

from ansible_collections.selfhosted.fastgpt.plugins.module_utils import _http

if t.TYPE_CHECKING:
    from ansible.module_utils.basic import AnsibleModule

Row = t.Dict[str, t.Any]

MINIMUM_VERSION = (0, 6, 8)
MINIMUM_VERSION_TEXT = "v0.6.8"
# Login, registration and password reset share 20 requests in 1200 s per client address.
LOGIN_LIMIT_TEXT = "20 log-ins and registrations in 20 minutes per client address"
_RETRIES = 4
_LOGIN_RETRIES = 1
_PAGE_SIZE = 10
_MAX_PAGES = 100000
# What new-api tells in /api/status and One-API does not; some of these are in each of its generations.
_FORK_KEYS = frozenset(("setup", "self_use_mode_enabled", "mj_notify_enabled", "enable_data_export", "default_collapse_sidebar"))
# What the modules do sums and comparisons with. A row that has it otherwise is from another product.
_ROW_TYPES: dict[str, type] = {
    **dict.fromkeys(("id", "type", "status", "priority", "role", "created_time", "expired_time", "remain_quota"), int),
    **dict.fromkeys(("name", "username", "key", "models", "subnet", "group", "base_url", "model_mapping", "config", "system_prompt"), str),
    "access_token": str,
    "unlimited_quota": bool,
}


class OneApiError(Exception):
    """A failure to report to the user as it stands."""


class Refused(OneApiError):
    """The server answered and said no; it did not (wholly) do what was asked."""


class NotFound(OneApiError):
    """The server has no such path."""


class LostAnswer(OneApiError):
    """A request that must not simply be repeated got no usable answer: it may or may not have been carried out."""


class RateLimited(OneApiError):
    """The server still answers 429 after all the patience that was granted."""


def connection_argument_spec() -> dict[str, t.Any]:
    return {
        "url": {"type": "str", "required": True},
        "access_token": {"type": "str", "no_log": True},
        "validate_certs": {"type": "bool", "default": True},
        "ca_path": {"type": "path"},
        "client_cert": {"type": "path"},
        "client_key": {"type": "path", "no_log": False},
        "timeout": {"type": "int", "default": 30},
        "rate_limit_wait": {"type": "int", "default": 200},
        "use_proxy": {"type": "bool", "default": False},
    }


def argument_spec() -> dict[str, t.Any]:
    return {
        **connection_argument_spec(),
        "username": {"type": "str", "default": "root"},
        "password": {"type": "str", "no_log": True},
    }


def parse_version(text: str) -> tuple[int, int, int] | None:
    """(0, 6, 10) from "v0.6.10" or "v0.6.11-preview.7"; None where the build carries no version ("", "v0.0.0")."""
    match = re.match(r"v?(\d{1,9})\.(\d{1,9})(?:\.(\d{1,9}))?", text or "")
    if match is None:
        return None
    version = (int(match.group(1)), int(match.group(2)), int(match.group(3) or 0))
    return None if version == (0, 0, 0) else version


class Client:
    """One module run's view of a server. Logs in at most once, and only when a request needs it."""

    def __init__(
        self,
        url: str,
        *,
        access_token: str | None = None,
        username: str = "root",
        password: str | None = None,
        validate_certs: bool = True,
        ca_path: str | None = None,
        client_cert: str | None = None,
        client_key: str | None = None,
        timeout: float = 30,
        rate_limit_wait: float = 200,
        use_proxy: bool = False,
        warn: t.Callable[[str], t.Any] | None = None,
        sleep: t.Callable[[float], t.Any] = time.sleep,
    ) -> None:
        self.url = url.strip().rstrip("/")
        self.username = username
        self.requests = 0
        self.version: tuple[int, int, int] | None = None
        self.version_text = ""
        self._access_token = (access_token or "").strip() or None
        self._password = password or None
        self._cookie: str | None = None
        self._logged_in = False
        self._known = False
        self._sure = False
        self._rate_limit_wait = rate_limit_wait
        self._warn = warn or (lambda text: None)
        self._sleep = sleep
        self._transport: dict[str, t.Any] = {
            "timeout": timeout,
            "validate_certs": validate_certs,
            "ca_path": ca_path,
            "client_cert": client_cert,
            "client_key": client_key,
            "use_proxy": use_proxy,
        }

    @classmethod
    def from_module(cls, module: AnsibleModule, username: str | None = None, password: str | None = None) -> Client:
        params = module.params
        if not re.match(r"https?://[^/]", params["url"]):
            raise OneApiError(f"url: {params['url']!r} is not an http:// or https:// URL. Give the root of One-API, e.g. http://127.0.0.1:3000")
        if bool(params["client_key"]) and not params["client_cert"]:
            raise OneApiError("client_key: needs client_cert as well")
        if params["timeout"] < 1:
            raise OneApiError(f"timeout: {params['timeout']} is no time. Give 1 second or more")
        if params["rate_limit_wait"] < 0:
            raise OneApiError(f"rate_limit_wait: {params['rate_limit_wait']} is negative. Give 0 seconds or more")
        return cls(
            params["url"],
            access_token=params["access_token"],
            username=username or params.get("username") or "root",
            password=password if password is not None else params.get("password"),
            validate_certs=params["validate_certs"],
            ca_path=params["ca_path"],
            client_cert=params["client_cert"],
            client_key=params["client_key"],
            timeout=params["timeout"],
            rate_limit_wait=params["rate_limit_wait"],
            use_proxy=params["use_proxy"],
            warn=module.warn,
        )

    # ---- what the modules call -------------------------------------------------------------------------------------

    def identify(self) -> None:
        """Read the version and refuse what is not a One-API that these modules know."""
        if self._known:
            return
        data = self._data(self._exchange("GET", "/api/status"), "/api/status")
        if not isinstance(data, dict):
            raise OneApiError(f"{self.url}/api/status answers, but not like One-API. Is url right? It must be the root of One-API")
        if not _FORK_KEYS.isdisjoint(data):
            raise self._new_api()
        self.version_text = str(data.get("version") or "")
        self.version = parse_version(self.version_text)
        self._known = True
        if self.version is None:
            # Built from source without a version: only the shape of the API can tell.
            self.make_sure()
            self._warn(f"{self.url} does not tell its One-API version; the modules expect at least {MINIMUM_VERSION_TEXT}")
        elif self.version < MINIMUM_VERSION:
            raise OneApiError(
                f"{self.url} is One-API {self.version_text}; at least {MINIMUM_VERSION_TEXT} is needed. Upgrade it, e.g. to justsong/one-api:v0.6.10"
            )

    def make_sure(self) -> None:
        """Refuse new-api, whose API looks alike and means other things. Done once, before the first write."""
        if self._sure:
            return
        try:
            response = self._send("GET", "/api/setup", None, {}, repeatable=True, limit_wait=0 if self.version else None)
        except RateLimited:
            # Unknown paths fall under the limit for web pages. The version has been read, and new-api asks for a header
            # of its own on every read, so going on writes nothing there.
            return
        if response.status == 200 and _json_object(response) is not None:
            raise self._new_api()
        self._sure = True

    def login(self, username: str, password: str) -> bool:
        """True and a session, or False where the server refuses these credentials."""
        self.identify()
        try:
            response = self._ask_login(username, password)
        except RateLimited:
            # The general limit may be meant, which passes in minutes: wait for that one only.
            self._exchange("GET", "/api/status")
            try:
                response = self._ask_login(username, password)
            except RateLimited as exc:
                raise OneApiError(
                    f"{self.url}: log-in as {username} is refused by the rate limit ({LOGIN_LIMIT_TEXT}). "
                    "Wait, restart One-API, or spare the log-in: access_token needs none, nor does password_policy=on_create of oneapi_user"
                ) from exc
        answer = _json_object(response) or {}
        if not answer.get("success"):
            return False
        data = answer.get("data")
        if not isinstance(data, dict) or data.get("require_2fa"):
            self._sure = False
            self.make_sure()
            raise OneApiError(f"{self.url}: the log-in as {username} was not answered like One-API does")
        match = re.search(r"(?:^|\n)\s*session=([^;\n]+)", response.headers.get("set-cookie", ""))
        if match is None:
            raise OneApiError(f"{self.url}: the log-in as {username} was accepted but no session cookie came back")
        self._cookie = f"session={match.group(1)}"
        self._logged_in = True
        return True

    def _ask_login(self, username: str, password: str) -> _http.Response:
        body = {"username": username, "password": password}
        # Each one that arrives counts, so a lost answer is worth one more try and not four.
        return self._exchange("POST", "/api/user/login", body, limit_wait=0, retries=_LOGIN_RETRIES)

    def get(self, path: str) -> t.Any:
        return self._data(self._exchange("GET", path, authenticate=True), path)

    def row(self, path: str) -> Row:
        return self._rows([self.get(path)], path)[0]

    def post(self, path: str, body: Row) -> t.Any:
        """Not repeated after a lost answer: the caller reads what became of it first."""
        self.make_sure()
        return self._data(self._exchange("POST", path, body, authenticate=True, repeatable=False), path)

    def put(self, path: str, body: Row) -> t.Any:
        self.make_sure()
        return self._data(self._exchange("PUT", path, body, authenticate=True), path)

    def delete(self, path: str) -> None:
        self.make_sure()
        response = self._exchange("DELETE", path, authenticate=True, empty_ok=True)
        if response.body.strip():
            self._data(response, path)

    def channels(self) -> list[Row]:
        return self._all("/api/channel/")

    def tokens(self) -> list[Row]:
        return self._all("/api/token/")

    def user(self, name: str) -> Row | None:
        """The user's row, access token included: reading it does not rotate it, unlike GET /api/user/token."""
        rows = self._rows(self.get(f"/api/user/search?keyword={quote(name, safe='')}"), "/api/user/search")
        for row in rows:
            if row.get("username") == name:
                return row
        return None

    def options(self) -> dict[str, str]:
        rows = self._rows(self.get("/api/option/"), "/api/option/", numbered=False)
        return {str(row.get("key")): str(row.get("value")) for row in rows}

    def available_models(self) -> set[str] | None:
        """The models that the caller's group can be served now, or None where the server cannot tell."""
        try:
            data = self.get("/api/user/available_models")
        except (Refused, NotFound):
            return None
        if data is None:
            return set()
        return {str(item) for item in data} if isinstance(data, list) else None

    # ---- below: one exchange ---------------------------------------------------------------------------------------

    def _all(self, path: str) -> list[Row]:
        """Every row. A search with an empty keyword is not paged; pages of ten are the way round if that ever fails."""
        try:
            return self._by_id(self._rows(self.get(f"{path}search?keyword="), path))
        except Refused:
            pass
        seen: dict[int, Row] = {}
        for page in range(_MAX_PAGES):
            rows = self._rows(self.get(f"{path}?p={page}"), path)
            fresh = [row for row in rows if row["id"] not in seen]
            seen.update((row["id"], row) for row in fresh)
            if len(rows) < _PAGE_SIZE or not fresh:
                break
        return self._by_id(list(seen.values()))

    @staticmethod
    def _by_id(rows: list[Row]) -> list[Row]:
        return sorted(rows, key=lambda row: t.cast(int, row["id"]))

    def _rows(self, data: t.Any, path: str, numbered: bool = True) -> list[Row]:
        if data is None:
            return []
        where = f"{self.url}{path.partition('?')[0]}"
        if not isinstance(data, list):
            self.make_sure()
            raise OneApiError(f"{where} does not answer with a list, so this is no One-API that the modules know")
        for row in data:
            fault = _row_fault(row, numbered)
            if fault:
                self.make_sure()
                raise OneApiError(f"{where} lists something that {fault}, so this is no One-API that the modules know")
        return data

    def _data(self, response: _http.Response, path: str) -> t.Any:
        answer = _json_object(response) or {}
        if answer.get("success") is True:
            return answer.get("data")
        message = str(answer.get("message") or "").strip()[:500] or "no reason given"
        raise Refused(f"{self.url}{path.partition('?')[0]}: One-API refuses: {message}")

    def _exchange(
        self,
        method: str,
        path: str,
        body: Row | None = None,
        *,
        authenticate: bool = False,
        repeatable: bool = True,
        empty_ok: bool = False,
        limit_wait: float | None = None,
        retries: int = _RETRIES,
    ) -> _http.Response:
        if not authenticate:
            return self._answer(method, path, body, {}, repeatable, empty_ok, limit_wait, retries)
        self.identify()
        response = self._answer(method, path, body, self._credentials(), repeatable, empty_ok, limit_wait)
        if response.status == 401 or (method == "GET" and not _succeeded(response, empty_ok)):
            # A read fails like this for a wrong credential, too low a role, or because the server is a new-api.
            self.make_sure()
            if self._access_token and not self._logged_in and self._password:
                self._access_token = None
                self._warn(f"{self.url} does not accept access_token; logged in as {self.username} instead")
                response = self._answer(method, path, body, self._credentials(), repeatable, empty_ok, limit_wait)
            if response.status == 401 or not _succeeded(response, empty_ok):
                message = str((_json_object(response) or {}).get("message") or "").strip()[:500]
                who = f"the session of {self.username}" if self._logged_in else "access_token"
                remedy = (
                    "The user needs the role that this call asks for (root for options, admin for channels and users)"
                    if self._logged_in
                    else "Give root's current access token, or password instead"
                )
                raise Refused(f"{self.url}{path.partition('?')[0]}: One-API refuses {who}: {message or response.status}. {remedy}")
        return response

    def _credentials(self) -> dict[str, str]:
        if self._cookie is None and self._access_token is None:
            if self._password is None:
                raise OneApiError(f"{self.url}: neither access_token nor password is given")
            if not self.login(self.username, self._password):
                raise OneApiError(
                    f"{self.url}: One-API refuses the password of {self.username}. "
                    "Give the current one, or access_token; selfhosted.fastgpt.oneapi_user changes it"
                )
        # The server prefers the cookie over the header, so never send both.
        if self._cookie is not None:
            return {"Cookie": self._cookie}
        return {"Authorization": f"Bearer {self._access_token}"}

    def forget_session(self) -> None:
        """Go back to the access token after a log-in that was only a check."""
        if self._access_token is not None:
            self._cookie = None
            self._logged_in = False

    def has_access_token(self) -> bool:
        return self._access_token is not None

    def drop_access_token(self) -> None:
        self._access_token = None

    def settle(self) -> None:
        """A breath between a lost answer and the look at what became of the request, which may still be under way."""
        self._sleep(1)

    def _answer(
        self,
        method: str,
        path: str,
        body: Row | None,
        headers: dict[str, str],
        repeatable: bool,
        empty_ok: bool = False,
        limit_wait: float | None = None,
        retries: int = _RETRIES,
    ) -> _http.Response:
        """A JSON answer with `success` in it; statuses that One-API uses for something else become errors."""
        where = f"{self.url}{path.partition('?')[0]}"
        for attempt in range(retries + 1):
            response = self._send(method, path, body, headers, repeatable, limit_wait, retries)
            if response.status in (200, 400, 401) and (_json_object(response) is not None or (empty_ok and not response.body.strip())):
                return response
            if 300 <= response.status < 400:
                raise OneApiError(
                    f"{where} answers with a redirect{_target(response)} (HTTP {response.status}). url must be the root of One-API, without a path, "
                    "and a proxy before it must let /api/ through without a log-in page of its own"
                )
            if 400 <= response.status < 500:
                kind = NotFound if response.status == 404 else OneApiError
                raise kind(f"{where}: HTTP {response.status}{_plain(response)}. Is url the root of One-API, and does a proxy before it let /api/ through?")
            if response.status == 200 and repeatable and "html" in response.headers.get("content-type", ""):
                raise OneApiError(
                    f"{where} answers with a web page in place of One-API's JSON. url must be the root of One-API, without a path, "
                    "and a proxy before it must let /api/ through without a page of its own"
                )
            # A 5xx, or a 2xx whose body is not whole: the server may have done it.
            problem = f"HTTP {response.status}{_plain(response)}" if response.status >= 500 else "the answer is not whole or not One-API's JSON"
            if not repeatable:
                raise LostAnswer(f"{where}: {problem}")
            if attempt < retries:
                self._sleep(_backoff(attempt))
                continue
            raise OneApiError(f"{where}: {problem}, {retries + 1} times. Look into One-API's log, and into that of a proxy before it")
        raise AssertionError("unreachable")

    def _send(
        self,
        method: str,
        path: str,
        body: Row | None,
        headers: dict[str, str],
        repeatable: bool,
        limit_wait: float | None = None,
        retries: int = _RETRIES,
    ) -> _http.Response:
        failures = 0
        waited = 0.0
        patience = self._rate_limit_wait if limit_wait is None else limit_wait
        pauses = 0
        while True:
            self.requests += 1
            try:
                response = _http.request(method, f"{self.url}{path}", headers=headers, json=body, **self._transport)
            except _http.TransportError as exc:
                if exc.lasting:
                    raise OneApiError(str(exc)) from exc
                if exc.sent and not repeatable:
                    raise LostAnswer(str(exc)) from exc
                if failures >= (retries if exc.sent else _RETRIES):
                    # A server that wants a client certificate may just hang up.
                    tls = ", and does it ask for a client certificate (client_cert)" if self.url.startswith("https:") else ""
                    raise OneApiError(f"{exc} ({failures + 1} tries). Is One-API running, is url right{tls}?") from exc
                self._sleep(_backoff(failures))
                failures += 1
                continue
            if response.status != 429:
                return response
            # Refused before the request was looked at, so any method may be repeated. Refused ones are not counted.
            if waited >= patience:
                raise RateLimited(
                    f"{self.url}{path.partition('?')[0]}: One-API's rate limit (HTTP 429) did not pass within {patience:.0f} s. "
                    "Raise rate_limit_wait, or start One-API with GLOBAL_API_RATE_LIMIT=0"
                )
            # One-API tells no time, a proxy before it may.
            told = _retry_after(response.headers.get("retry-after", ""))
            pause = min(15.0, 0.5 * 2**pauses) if told is None else max(0.5, told)
            pause = min(pause, patience - waited)
            self._sleep(pause)
            waited += pause
            pauses += 1

    def _new_api(self) -> OneApiError:
        return OneApiError(
            f"{self.url} is new-api, a fork of One-API with another management API, which these modules do not know. "
            "Use One-API itself (justsong/one-api:v0.6.10)"
        )


def _row_fault(row: t.Any, numbered: bool) -> str:
    if not isinstance(row, dict):
        return "is not an object"
    if numbered and row.get("id") is None:
        return "has no id"
    for name, kind in _ROW_TYPES.items():
        value = row.get(name)
        # bool is an int in Python, not in JSON.
        if value is not None and (not isinstance(value, kind) or (kind is int and isinstance(value, bool))):
            return f"has another kind of {name}"
    return ""


def _target(response: _http.Response) -> str:
    """Where a redirect leads, without the query, which may hold secrets."""
    try:
        parts = urlsplit(response.headers.get("location", ""))
    except ValueError:
        return ""
    return f" to {parts.netloc.rpartition('@')[2]}{parts.path}" if parts.netloc or parts.path else ""


def _retry_after(text: str) -> float | None:
    """Seconds of a Retry-After header, in either of its two forms; None where there is none."""
    try:
        return min(max(0.0, float(text)), 3600.0)
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (TypeError, ValueError, IndexError, OverflowError):
        return None


def _backoff(attempt: int) -> float:
    return min(4.0, 0.5 * 2.0**attempt)


def _json_object(response: _http.Response) -> Row | None:
    try:
        value = response.json()
    except ValueError:
        return None
    return value if isinstance(value, dict) and "success" in value else None


def _succeeded(response: _http.Response, empty_ok: bool) -> bool:
    answer = _json_object(response)
    return bool(answer.get("success")) if answer is not None else empty_ok


def _plain(response: _http.Response) -> str:
    """What the server says in the body of an error, shortened, for a message."""
    try:
        value = json.loads(response.body.decode("utf-8"))
        error = value.get("error", value)
        text = str(error.get("message", "")) if isinstance(error, dict) else str(error)
    except (ValueError, AttributeError, RecursionError):
        text = ""
    return f": {text[:200]}" if text else ""
