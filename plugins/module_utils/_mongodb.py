# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# PRIVATE: for the modules of this collection only; it may change in any release.
"""Typed access to single MongoDB servers over pymongo (3.11 and later), always by a direct connection."""

from __future__ import annotations

import dataclasses
import re
import socket
import time
import traceback
import typing as t

from ansible.module_utils.basic import AnsibleModule, missing_required_lib

from ._mongodb_plan import Member, MemberDoc, member_of, normalise_host

try:
    import pymongo
    import pymongo.errors

    PYMONGO_ERROR: str | None = None
    if int(pymongo.version_tuple[0]) < 4 and hasattr(pymongo, "helpers"):
        # The background thread of old drivers prints a traceback for every server that goes away.
        pymongo.helpers._handle_exception = lambda: None
except ImportError:
    PYMONGO_ERROR = traceback.format_exc()

CONNECT_SECONDS = 5.0
# Server error codes that the modules act on.
UNAUTHORIZED = 13
AUTHENTICATION_FAILED = 18
ALREADY_INITIALIZED = 23
COMMAND_NOT_FOUND = 59
WRITE_CONCERN_FAILED = 64
NODE_NOT_FOUND = 74
NO_REPLICATION_ENABLED = 76
INVALID_CONFIG = 93
NOT_YET_INITIALIZED = 94
CONFIG_IN_PROGRESS = 109
# The primary changed under us, or a former change is not yet on a majority: read again, try again.
RETRY_CODES = frozenset({91, CONFIG_IN_PROGRESS, 189, 262, 308, 10058, 10107, 11600, 11602, 13435, 13436})


class MongoFault(Exception):
    """Ends the module with this message: what, the server's answer, the remedy."""


class Unreachable(Exception):
    def __init__(self, address: str, reason: str) -> None:
        super().__init__(f"{address}: {reason}")
        self.address = address
        self.reason = reason


class Refused(Exception):
    """The server answered with an error."""

    def __init__(self, address: str, code: int, message: str) -> None:
        super().__init__(f"{address}: {message} (code {code})")
        self.address = address
        self.code = code
        self.message = message


@dataclasses.dataclass(frozen=True)
class Settings:
    address: str
    user: str | None = None
    password: str | None = dataclasses.field(default=None, repr=False)
    previous: str | None = dataclasses.field(default=None, repr=False)
    auth_source: str = "admin"
    tls: bool = False
    ca_file: str | None = None
    certificate_key_file: str | None = None
    validate_certs: bool = True
    timeout: int = 120


def connection_argument_spec() -> dict[str, t.Any]:
    return dict(
        login_host=dict(type="str", default="127.0.0.1"),
        login_port=dict(type="int", default=27017),
        login_user=dict(type="str"),
        login_password=dict(type="str", no_log=True),
        login_password_previous=dict(type="str", no_log=True),
        login_database=dict(type="str", default="admin"),
        tls=dict(type="bool", default=False),
        tls_ca_file=dict(type="path"),
        tls_certificate_key_file=dict(type="path"),
        validate_certs=dict(type="bool", default=True),
        timeout=dict(type="int", default=120),
    )


CONNECTION_REQUIRED_TOGETHER = [("login_user", "login_password")]
CONNECTION_REQUIRED_BY = {"login_password_previous": "login_password"}


def settings_of(module: AnsibleModule) -> Settings:
    """Read the connection options; ends the module where pymongo is missing or an option is wrong."""
    if PYMONGO_ERROR is not None:
        module.fail_json(
            msg=missing_required_lib("pymongo", reason="(3.11 or later; Debian and Ubuntu: python3-pymongo)"),
            exception=PYMONGO_ERROR,
        )
    params = module.params
    host = params["login_host"].strip()
    if ":" in host and not host.startswith("["):
        host = f"[{host}]"
    try:
        address = normalise_host(f"{host}:{params['login_port']}")
    except ValueError as exc:
        module.fail_json(msg=f"login_host, login_port: {host}:{params['login_port']}: {exc}.")
    if params["timeout"] < 1:
        module.fail_json(msg=f"timeout: {params['timeout']}: must be at least 1 second.")
    return Settings(
        address=address,
        user=params["login_user"],
        password=params["login_password"],
        previous=params["login_password_previous"],
        auth_source=params["login_database"],
        tls=params["tls"],
        ca_file=params["tls_ca_file"],
        certificate_key_file=params["tls_certificate_key_file"],
        validate_certs=params["validate_certs"],
        timeout=params["timeout"],
    )


def _brief(exc: Exception) -> str:
    """The driver appends its settings and a topology dump; neither helps."""
    text = str(exc).partition(", Timeout:")[0].partition(", full error:")[0]
    return re.sub(r" \(configured timeouts:[^)]*\)", "", text).strip().rstrip(".")


class Node:
    """One server. A connection is opened with the first command and needs close()."""

    def __init__(
        self,
        settings: Settings,
        address: str,
        user: str | None = None,
        password: str | None = None,
        auth_source: str | None = None,
    ) -> None:
        self.address = address
        self.authenticated = user is not None
        options: dict[str, t.Any] = {
            "directConnection": True,
            "serverSelectionTimeoutMS": int(CONNECT_SECONDS * 1000),
            "connectTimeoutMS": int(CONNECT_SECONDS * 1000),
            "socketTimeoutMS": 60000,
            "maxPoolSize": 2,
            "appname": "selfhosted.fastgpt",
        }
        if settings.tls:
            options["tls"] = True
            if settings.ca_file:
                options["tlsCAFile"] = settings.ca_file
            if settings.certificate_key_file:
                options["tlsCertificateKeyFile"] = settings.certificate_key_file
            if not settings.validate_certs:
                options["tlsAllowInvalidCertificates"] = True
                options["tlsAllowInvalidHostnames"] = True
        if user is not None:
            options.update(username=user, password=password or "", authSource=auth_source or settings.auth_source)
        try:
            self._client: t.Any = pymongo.MongoClient(address, **options)
        except (pymongo.errors.PyMongoError, OSError, ValueError) as exc:
            raise MongoFault(f"The connection options for {address} are refused: {_brief(exc)}.") from None

    def close(self) -> None:
        self._client.close()

    def __enter__(self) -> Node:
        return self

    def __exit__(self, *_unused: object) -> None:
        self.close()

    def command(self, name: str, value: t.Any = 1, database: str = "admin", **fields: t.Any) -> dict[str, t.Any]:
        try:
            answer = self._client[database].command(name, value, **fields)
        except pymongo.errors.OperationFailure as exc:
            raise Refused(self.address, int(exc.code or 0), _brief(exc)) from None
        except pymongo.errors.PyMongoError as exc:
            # "Not primary" counts as a lost connection in the driver, but the server has answered.
            details = getattr(exc, "details", None)
            if isinstance(details, dict) and details.get("code"):
                raise Refused(self.address, int(details["code"]), str(details.get("errmsg", _brief(exc)))) from None
            raise Unreachable(self.address, _brief(exc)) from None
        result = dict(answer)
        failed = result.get("writeConcernError")
        if failed:
            raise Refused(self.address, int(failed.get("code", WRITE_CONCERN_FAILED)), str(failed.get("errmsg", failed)))
        return result

    def hello(self) -> dict[str, t.Any]:
        try:
            return self.command("hello")
        except Refused as exc:
            if exc.code != COMMAND_NOT_FOUND:
                raise
            # Before 4.4.2.
            answer = self.command("isMaster")
            answer["isWritablePrimary"] = answer.get("ismaster", False)
            return answer

    def status(self) -> dict[str, t.Any]:
        return self.command("replSetGetStatus")

    def config(self) -> dict[str, t.Any]:
        return dict(self.command("replSetGetConfig")["config"])

    def stored_config(self) -> dict[str, t.Any] | None:
        """The configuration on disk, also of a server that is not a member by it."""
        answer = self.command("find", "system.replset", database="local", limit=1, singleBatch=True)
        batch = answer["cursor"]["firstBatch"]
        return dict(batch[0]) if batch else None

    def user_collections(self) -> int:
        """Collections outside MongoDB's own; also told by a server that is not initiated (0 where it cannot be known)."""
        return int((self.command("serverStatus").get("catalogStats") or {}).get("collections", 0))

    def majority_write(self, seconds: float) -> int:
        """Write an oplog note that a majority must acknowledge: milliseconds. No collection is touched."""
        start = time.monotonic()
        self.command(
            "appendOplogNote",
            data={"by": "selfhosted.fastgpt"},
            writeConcern={"w": "majority", "wtimeout": max(1000, int(seconds * 1000))},
        )
        return round((time.monotonic() - start) * 1000)


def probe_tcp(address: str, seconds: float = CONNECT_SECONDS) -> None:
    """A refused port is known at once this way; the driver would keep trying until its time-out."""
    name, _colon, port = address.rpartition(":")
    try:
        socket.create_connection((name.strip("[]"), int(port)), timeout=seconds).close()
    except OSError as exc:
        raise Unreachable(address, exc.strerror or str(exc) or type(exc).__name__) from None


def process_of(hello: t.Mapping[str, t.Any]) -> str:
    """Identifies the running server whatever its address ('' before 4.4)."""
    return str((hello.get("topologyVersion") or {}).get("processId", ""))


def peek(settings: Settings, address: str) -> dict[str, t.Any]:
    """hello without a log-in."""
    probe_tcp(address)
    with Node(settings, address) as node:
        return node.hello()


@dataclasses.dataclass
class Access:
    """An opened server and by which right."""

    node: Node
    # user: logged in; previous: logged in by the previous password; exception: localhost exception; open: no access control
    by: str
    hello: dict[str, t.Any]


def open_node(settings: Settings, address: str) -> Access:
    """Log in as the options say, else take the localhost exception if it is open.

    Raises Unreachable, Refused, or MongoFault where the credentials are wrong or missing.
    """
    hello = peek(settings, address)
    if settings.user is not None:
        for by, password in (("user", settings.password), ("previous", settings.previous)):
            if password is None:
                continue
            node = Node(settings, address, settings.user, password)
            try:
                node.command("ping")
                return Access(node, by, hello)
            except Refused as exc:
                node.close()
                if exc.code != AUTHENTICATION_FAILED:
                    raise
            except BaseException:
                node.close()
                raise
    node = Node(settings, address)
    by = _right_without_login(node)
    if by:
        return Access(node, by, hello)
    node.close()
    if settings.user is None:
        raise MongoFault(
            f"{address} asks for a log-in: set login_user and login_password (the localhost exception is closed once a"
            " user exists, and is open only to connections from the server itself)."
        )
    tried = "neither login_password nor login_password_previous is" if settings.previous else "login_password is not"
    raise MongoFault(
        f"{address} refuses the log-in of user {settings.user} (authentication database {settings.auth_source}):"
        f" {tried} right, or the user does not exist there. A password in the container's environment counts only on an"
        " empty data directory: give the one that is in force as login_password_previous to change it."
    )


def _right_without_login(node: Node) -> str:
    try:
        node.command("getCmdLineOpts")
        return "open"
    except Refused:
        pass
    try:
        node.status()
    except Refused as exc:
        return "" if exc.code == UNAUTHORIZED else "exception"
    return "exception"


def open_login(settings: Settings, patience: float) -> Access:
    """open_node() on the login address; waits for a server that is still starting."""
    deadline = time.monotonic() + patience
    while True:
        try:
            return open_node(settings, settings.address)
        except (Unreachable, Refused) as exc:
            if time.monotonic() >= deadline:
                if isinstance(exc, Refused):
                    raise MongoFault(f"MongoDB at {settings.address} refuses to answer: {exc.message} (code {exc.code}).") from None
                raise MongoFault(
                    f"No MongoDB answers at {settings.address} within {patience:g} s: {exc.reason}. Check that it runs"
                    " (its log names the reason if it does not), listens on this address, and that TLS is set alike on"
                    " both sides."
                ) from None
        time.sleep(min(1.0, max(0.05, deadline - time.monotonic())))


def find_primary(settings: Settings, access: Access, known: t.Iterable[str] = ()) -> Access | None:
    """Open the primary as the set names it; None where there is none now.

    Of two that call themselves primary (an old one that is cut off does for a while), the later elected one counts.
    """
    hello = access.node.hello()
    own_process = process_of(hello)
    found: dict[str, dict[str, t.Any]] = {}
    if hello.get("isWritablePrimary"):
        found[access.node.address] = hello
    others = [hello.get("primary"), *known] if not found else list(known)
    for host in dict.fromkeys(h for h in others if h):
        if host == hello.get("me"):
            continue
        try:
            other = peek(settings, host)
        except (Unreachable, Refused):
            continue
        if process_of(other) == own_process and own_process:
            continue
        if other.get("isWritablePrimary") and other.get("setName") == hello.get("setName"):
            found[host] = other
    if not found:
        return None
    best = max(found, key=lambda a: str(found[a].get("electionId", "")))
    if best == access.node.address:
        return access
    try:
        return open_node(settings, best)
    except (Unreachable, Refused):
        return None


def compact(docs: t.Iterable[MemberDoc], order: t.Sequence[Member] = ()) -> list[dict[str, t.Any]]:
    """Members for diff and return values: in the wanted order, then the others by id."""
    rank = {m.host: i for i, m in enumerate(order)}
    views = sorted(docs, key=lambda d: (rank.get(member_of(d).host, len(rank)), int(d["_id"])))
    return [member_of(d).as_dict() for d in views]


def member_states(status: t.Mapping[str, t.Any]) -> list[dict[str, t.Any]]:
    """State, health and lag of each member, as the asked server sees them."""
    members = list(status.get("members", []))
    newest = max((m["optimeDate"] for m in members if m.get("state") == 1 and m.get("optimeDate")), default=None)
    result = []
    for m in members:
        lag: float | None = None
        if newest is not None and m.get("state") in (1, 2) and m.get("optimeDate"):
            lag = max(0.0, round((newest - m["optimeDate"]).total_seconds(), 3))
        result.append(
            {
                "host": m["name"],
                "state": str(m.get("stateStr", "UNKNOWN")),
                "healthy": bool(m.get("health", 0)) and m.get("state") in (1, 2, 7),
                "lag_seconds": lag,
                "message": str(m.get("lastHeartbeatMessage") or m.get("infoMessage") or ""),
            }
        )
    return result
