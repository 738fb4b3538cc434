# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# PRIVATE: for the modules of this collection only; it may change in any release.
"""Typed access to single MongoDB servers over pymongo (3.11 and later), always by a direct connection."""

from __future__ import annotations

import dataclasses
import re
import socket
import ssl
import struct
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


class ArbiterFault(MongoFault):
    """An arbiter knows no users; `hosts` are the data members of its set."""

    def __init__(self, message: str, hosts: t.Sequence[str]) -> None:
        super().__init__(message)
        self.hosts = hosts


class Unreachable(Exception):
    """`final` says that waiting does not help: the server is there, and it will not talk to us like this."""

    def __init__(self, address: str, reason: str, final: bool = False) -> None:
        super().__init__(f"{address}: {reason}")
        self.address = address
        self.reason = reason
        self.final = final


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
    certificate_key_password: str | None = dataclasses.field(default=None, repr=False)
    validate_certs: bool = True
    timeout: int = 120

    @property
    def connect_seconds(self) -> float:
        return min(CONNECT_SECONDS, float(self.timeout))

    @property
    def command_seconds(self) -> float:
        """A server that freezes must not hold a run for much longer than its time-out."""
        return min(60.0, self.timeout + 5.0)


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
        tls_certificate_key_password=dict(type="str", no_log=True),
        validate_certs=dict(type="bool", default=True),
        timeout=dict(type="int", default=120),
    )


CONNECTION_REQUIRED_TOGETHER = [("login_user", "login_password")]
CONNECTION_REQUIRED_BY = {
    "login_password_previous": "login_password",
    "tls_certificate_key_password": "tls_certificate_key_file",
}


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
    settings = Settings(
        address=address,
        user=params["login_user"],
        password=params["login_password"],
        previous=params["login_password_previous"],
        auth_source=params["login_database"],
        tls=params["tls"],
        ca_file=params["tls_ca_file"],
        certificate_key_file=params["tls_certificate_key_file"],
        certificate_key_password=params["tls_certificate_key_password"],
        validate_certs=params["validate_certs"],
        timeout=params["timeout"],
    )
    if not settings.tls:
        for name in ("tls_ca_file", "tls_certificate_key_file"):
            if params[name]:
                module.fail_json(msg=f"{name}: {params[name]}: is of no use without TLS. Set tls: true, or leave it out.")
        return settings
    try:
        tls_context(settings)
    except MongoFault as exc:
        module.fail_json(msg=str(exc))
    return settings


def tls_context(settings: Settings) -> ssl.SSLContext:
    """What the driver is told by its own options, for the probe; raises MongoFault naming the file that is wrong."""
    try:
        context = ssl.create_default_context(cafile=settings.ca_file or None)
    except ssl.SSLError:
        raise MongoFault(f"tls_ca_file: {settings.ca_file}: holds no certificate. Give the PEM file of the authority that signed the server's.") from None
    except OSError as exc:
        raise MongoFault(f"tls_ca_file: {settings.ca_file}: {exc.strerror}. It must be a readable file on the target.") from None
    if not settings.validate_certs:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if settings.certificate_key_file:
        name = f"tls_certificate_key_file: {settings.certificate_key_file}"
        try:
            # Never None: the library would ask on the terminal.
            context.load_cert_chain(settings.certificate_key_file, password=settings.certificate_key_password or "")
        except ssl.SSLError as exc:
            if exc.reason == "KEY_VALUES_MISMATCH":
                raise MongoFault(f"{name}: the key does not belong to the certificate. Put both of one pair into the file.") from None
            raise MongoFault(
                f"{name}: certificate or key cannot be read. It must be one PEM file with the client's certificate and its"
                " private key; an encrypted key needs the right tls_certificate_key_password."
            ) from None
        except OSError as exc:
            raise MongoFault(f"{name}: {exc.strerror}. It must be a readable file on the target.") from None
    return context


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
            "serverSelectionTimeoutMS": int(settings.connect_seconds * 1000),
            "connectTimeoutMS": int(settings.connect_seconds * 1000),
            "socketTimeoutMS": int(settings.command_seconds * 1000),
            "maxPoolSize": 2,
            "appname": "selfhosted.fastgpt",
        }
        if settings.tls:
            options["tls"] = True
            if settings.ca_file:
                options["tlsCAFile"] = settings.ca_file
            if settings.certificate_key_file:
                options["tlsCertificateKeyFile"] = settings.certificate_key_file
            if settings.certificate_key_password:
                options["tlsCertificateKeyFilePassword"] = settings.certificate_key_password
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
        except pymongo.errors.ConfigurationError as exc:
            # Above all: a driver that is too new or too old for the server.
            raise MongoFault(f"pymongo {pymongo.version} cannot talk to {self.address}: {_brief(exc)}. Install a pymongo that fits this server.") from None
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

    def user_collections(self) -> int | None:
        """Collections outside MongoDB's own; also told by a server that is not initiated, from MongoDB 5.0 on."""
        found = (self.command("serverStatus").get("catalogStats") or {}).get("collections")
        return None if found is None else int(found)

    def majority_write(self, seconds: float) -> int:
        """Write an oplog note that a majority must acknowledge: milliseconds. No collection is touched."""
        start = time.monotonic()
        self.command(
            "appendOplogNote",
            data={"by": "selfhosted.fastgpt"},
            writeConcern={"w": "majority", "wtimeout": max(1000, int(seconds * 1000))},
        )
        return round((time.monotonic() - start) * 1000)


# isMaster in the oldest form of the protocol (OP_QUERY, request 7), which every server answers to this day.
_HELLO_BODY = struct.pack("<i", 0) + b"admin.$cmd\0" + struct.pack("<ii", 0, -1) + b"\x13\0\0\0\x10isMaster\0\x01\0\0\0\0"
_HELLO = struct.pack("<iiii", 16 + len(_HELLO_BODY), 7, 0, 2004) + _HELLO_BODY


def _exchange(link: socket.socket) -> bytes:
    """The head of the answer to hello; shorter where the server closes the connection."""
    head = b""
    try:
        link.sendall(_HELLO)
        while len(head) < 16:
            part = link.recv(16 - len(head))
            if not part:
                break
            head += part
    except (ConnectionError, ssl.SSLEOFError):
        pass
    return head


def _is_mongodb(head: bytes) -> bool:
    return len(head) == 16 and struct.unpack("<iiii", head)[2:] == (7, 1)


def _connect(settings: Settings, address: str) -> tuple[socket.socket, str]:
    name, _colon, port = address.rpartition(":")
    host = name.strip("[]")
    try:
        return socket.create_connection((host, int(port)), timeout=settings.connect_seconds), host
    except (OSError, UnicodeError) as exc:
        raise Unreachable(address, getattr(exc, "strerror", None) or str(exc) or type(exc).__name__) from None


def _speaks_tls(settings: Settings, address: str) -> bool:
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    link, host = _connect(settings, address)
    try:
        with link, context.wrap_socket(link, server_hostname=host):
            return True
    except OSError:
        return False


def _speaks_plainly(settings: Settings, address: str) -> bool:
    link, _host = _connect(settings, address)
    try:
        with link:
            return _is_mongodb(_exchange(link))
    except OSError:
        return False


def probe(settings: Settings, address: str) -> None:
    """One connection by hand. It tells a closed port, a fault of TLS and another program's port at once and apart.

    The driver hides all of them behind its own time-out and one text.
    """
    link, host = _connect(settings, address)
    try:
        with link:
            head = _exchange_tls(settings, address, link, host) if settings.tls else _exchange(link)
    except socket.timeout:
        raise Unreachable(address, f"takes the connection, but does not answer within {settings.connect_seconds:g} s") from None
    except OSError as exc:
        raise Unreachable(address, exc.strerror or str(exc) or type(exc).__name__) from None
    if _is_mongodb(head):
        return
    if head:
        raise Unreachable(address, f"is not MongoDB, it answers {head!r}. Correct the port", final=True)
    if not settings.tls and _speaks_tls(settings, address):
        raise Unreachable(address, "asks for TLS. Set tls: true, with tls_ca_file where its authority is not one of the system's", final=True)
    raise Unreachable(address, "closes the connection without an answer")


def _exchange_tls(settings: Settings, address: str, link: socket.socket, host: str) -> bytes:
    try:
        secured = tls_context(settings).wrap_socket(link, server_hostname=host)
    except socket.timeout:
        raise
    except ssl.SSLCertVerificationError as exc:
        if exc.verify_code in (62, 64):
            remedy = "Connect under a name or an address that the certificate has, or give the server one with this name"
        else:
            remedy = "Give the certificate of the authority that signed it as tls_ca_file, or renew the server's"
        raise Unreachable(address, f"its certificate is refused: {exc.verify_message.rstrip('.')}. {remedy}", final=True) from None
    except (ssl.SSLError, ConnectionError) as exc:
        if isinstance(exc, (ssl.SSLEOFError, ConnectionError)) and not _speaks_plainly(settings, address):
            raise Unreachable(address, "closes the connection during the TLS handshake") from None
        if isinstance(exc, (ssl.SSLEOFError, ConnectionError)):
            raise Unreachable(address, "speaks no TLS. Set tls: false, or start it with --tlsMode requireTLS", final=True) from None
        raise Unreachable(address, f"the TLS handshake fails: {exc.reason}. Is the port MongoDB's, and does it take TLS 1.2?", final=True) from None
    with secured:
        try:
            head = _exchange(secured)
        except ssl.SSLError:
            # The alert of a server that asks for a client certificate; mongod itself sends none and closes.
            head = b""
    if not head:
        if settings.certificate_key_file:
            text = f"refuses the client certificate {settings.certificate_key_file}. Its authority must be in the server's --tlsCAFile"
        else:
            text = "asks for a client certificate. Set tls_certificate_key_file to a PEM file with certificate and key"
        raise Unreachable(address, text, final=True)
    return head


def process_of(hello: t.Mapping[str, t.Any]) -> str:
    """Identifies the running server whatever its address ('' before 4.4)."""
    return str((hello.get("topologyVersion") or {}).get("processId", ""))


def peek(settings: Settings, address: str) -> dict[str, t.Any]:
    """hello without a log-in."""
    probe(settings, address)
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
    if hello.get("arbiterOnly"):
        raise ArbiterFault(f"{address} is an arbiter, which knows no users: connect to a data member of its set.", list(hello.get("hosts", [])))
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
            if isinstance(exc, Unreachable) and exc.final:
                raise MongoFault(f"MongoDB at {settings.address}: {exc.reason}.") from None
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
    if access.by != "exception":
        known = [*known, *hello.get("hosts", [])]
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
