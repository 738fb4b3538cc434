# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
name: door_faults
short_description: What is wrong with the services of a door
version_added: 1.0.0
author:
  - selfhosted.fastgpt contributors (@selfhosted)
description:
  - Finds what an argument specification cannot express in C(door_services) of the role C(selfhosted.fastgpt.door), before anything is written. That is
    ports and names used twice, addresses, paths and sizes that nginx would misread, TLS given by half, certificates that are expired or do not belong to
    their key, and services that would pass everything or nothing.
  - No key and no part of one is ever in the answer.
positional: tls_ca
options:
  _input:
    description: The services.
    type: list
    elements: dict
    required: true
  tls_ca:
    description: The own CA, if there is one. C(certificate) and C(key) in PEM, C(passphrase) if the key has one, C(names) that certificates are made for.
    type: dict
    default: {}
"""

EXAMPLES = r"""
- name: Refuse what cannot work
  ansible.builtin.assert:
    that: faults == []
    fail_msg: "{{ faults | join('\n') }}"
  vars:
    faults: "{{ door_services | selfhosted.fastgpt.door_faults }}"
"""

RETURN = r"""
_value:
  description: One sentence for each fault, in the form C(variable), C(value), rule, remedy.
  type: list
  elements: str
"""

import datetime
import ipaddress
import re
import typing as t
from collections.abc import Mapping

from ansible_collections.selfhosted.fastgpt.plugins.plugin_utils._models import fault, is_list, nearest, shown

try:
    from cryptography import x509
    from cryptography.hazmat.primitives import serialization
except ImportError:  # ansible-core itself needs it; only a broken controller lacks it
    x509 = None  # type: ignore[assignment]

_HOST = r"(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?)(?:\.[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?)*"
_ADDRESS = re.compile(rf"(?P<host>\[[0-9A-Fa-f:.]+\]|{_HOST}):(?P<port>[0-9]{{1,5}})")
_NAME = re.compile(_HOST)
_PATH = re.compile(r"/[A-Za-z0-9._~/%@:+-]*")
_FILE = re.compile(r"/[A-Za-z0-9._~/@:+-]+")
_SIZE = re.compile(r"[0-9]+[kKmMgG]?")
_RATE = re.compile(r"[1-9][0-9]*r/[sm]")
_API_KEY = re.compile(r"[A-Za-z0-9_-]+")
_TOKEN = re.compile(r"[A-Za-z0-9._~+/=-]+")
_HEADER = re.compile(r"[A-Za-z0-9-]+")
# what would end a quoted string of nginx's, or begin a variable
_UNQUOTABLE = re.compile(r"""["'\\$\x00-\x1f\x7f]""")
_MODEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@-]*")
_HIDDEN = "(hidden)"


def _number(value: t.Any) -> int | None:
    """A whole number, also one that a template made a string of."""
    if isinstance(value, bool):
        return None
    text = str(value).strip()
    return int(text) if re.fullmatch(r"[0-9]{1,9}", text) else None


def _items(value: t.Any) -> list[t.Any]:
    return list(value) if is_list(value) else [] if value is None or value == "" else [value]


class _Faults:
    def __init__(self) -> None:
        self.found: list[str] = []

    def add(self, variable: str, value: t.Any, rule: str, remedy: str, secret: bool = False) -> None:
        self.found.append(fault(variable, _HIDDEN if secret else shown(value), rule, remedy))

    def check(self, pattern: re.Pattern[str], variable: str, value: t.Any, rule: str, remedy: str, secret: bool = False) -> bool:
        # a vaulted text is no str on ansible-core 2.18
        text = isinstance(value, (str, int)) and not isinstance(value, bool) or type(value).__name__ == "AnsibleVaultEncryptedUnicode"
        if text and pattern.fullmatch(str(value)):
            return True
        self.add(variable, value, rule, remedy, secret)
        return False

    def port(self, variable: str, value: t.Any) -> int | None:
        number = _number(value)
        if number is None or not 1 <= number <= 65535:
            self.add(variable, value, "is no TCP port", "Choose one from 1 to 65535")
            return None
        return number

    # PEM

    def certificates(self, variable: str, pem: t.Any) -> list[t.Any]:
        try:
            chain: list[t.Any] = list(x509.load_pem_x509_certificates(str(pem).encode()))
        except ValueError:
            self.add(variable, "(PEM)", "is no certificate in PEM", "Give the text from BEGIN CERTIFICATE to END CERTIFICATE, in YAML as a block with |")
            return []
        now = datetime.datetime.now(datetime.timezone.utc).replace(tzinfo=None)
        for item in chain:
            # not_valid_after_utc is newer than what Debian 12's controller has
            if _utc(item, "not_valid_after") < now:
                self.add(variable, item.subject.rfc4514_string(), f"expired on {_utc(item, 'not_valid_after'):%Y-%m-%d}", "Renew it")
            elif _utc(item, "not_valid_before") > now:
                self.add(variable, item.subject.rfc4514_string(), f"is valid only from {_utc(item, 'not_valid_before'):%Y-%m-%d}", "Correct the clock, or wait")
        return chain

    def private_key(self, variable: str, pem: t.Any, passphrase: str = "") -> t.Any:
        try:
            return serialization.load_pem_private_key(str(pem).strip().encode(), passphrase.encode() or None)
        except TypeError:
            if passphrase:
                self.add(variable, "", "has no passphrase, and one is given", "Leave the passphrase out", True)
            else:
                self.add(variable, "", "is encrypted", "Decrypt it and keep it in the vault; nobody types a passphrase when nginx starts", True)
        except ValueError:
            self.add(variable, "", "is no private key in PEM, or its passphrase is wrong", "Give the text from BEGIN to END, in YAML as a block with |", True)
        return None

    def pair(self, prefix: str, certificate: t.Any, key: t.Any, passphrase: str = "") -> list[t.Any]:
        """Certificate chain and key that belong together."""
        chain, private = self.certificates(f"{prefix}certificate", certificate), self.private_key(f"{prefix}key", key, passphrase)
        if not chain or private is None:
            return []
        public = _public(private)
        if _public(chain[0]) != public:
            later = any(_public(item) == public for item in chain[1:])
            rule = "does not come first in the chain" if later else "does not belong to the key"
            remedy = "Put the server's certificate first, then who signed it" if later else "Give the key that the certificate was made with"
            self.add(f"{prefix}certificate", chain[0].subject.rfc4514_string(), rule, remedy)
        for one, signer in zip(chain, chain[1:]):
            if one.issuer != signer.subject:
                self.add(f"{prefix}certificate", one.subject.rfc4514_string(), "is not signed by the one after it", "Order the chain: server first, root last")
                break
        return chain


def _utc(certificate: t.Any, field: str) -> datetime.datetime:
    value = getattr(certificate, f"{field}_utc", None)
    naive: datetime.datetime = value.replace(tzinfo=None) if value is not None else getattr(certificate, field)
    return naive


def _public(item: t.Any) -> bytes:
    raw: bytes = item.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return raw


def _given(tls: Mapping[str, t.Any], *names: str) -> list[str]:
    return [name for name in names if tls.get(name)]


class _Service:
    def __init__(self, faults: _Faults, variable: str, service: Mapping[str, t.Any]) -> None:
        self.faults, self.variable, self.service = faults, variable, service
        self.own_ca = False

    def at(self, field: str) -> str:
        return f"{self.variable}.{field}"

    def check(self) -> None:
        service, faults = self.service, self.faults
        name = service.get("name")
        if not isinstance(name, str) or not name.strip() or _UNQUOTABLE.search(name):
            faults.add(self.at("name"), name, "must be a text without quotes, backslash, dollar sign and line break", "Give the service a plain name")
        self.upstream()
        self.keys()
        self.paths()
        self.tls()
        self.answers()
        size = service.get("max_body")
        if size is not None:
            faults.check(_SIZE, self.at("max_body"), size, "is no size as nginx writes them", "Write a number of bytes, or one with k, m or g, such as 8m")
        pause = service.get("read_timeout")
        if pause is not None and not _number(pause):
            faults.add(self.at("read_timeout"), pause, "must be a number of seconds of 1 or more", "Write it as 600")

    def upstream(self) -> None:
        faults, given = self.faults, self.service.get("upstream")
        members = _items(given)
        if not members:
            faults.add(self.at("upstream"), given, "names no server", "Give an address and port, such as 127.0.0.1:18000, or a list of them")
        seen: set[str] = set()
        for index, item in enumerate(members):
            where = self.at(f"upstream[{index}]" if is_list(given) else "upstream")
            member = item if isinstance(item, Mapping) else {"address": item}
            self.known(where, member, "address", "weight", "backup", "drain", "api_key", "tls", "pooled", "peer_key")
            address = member.get("address")
            at = f"{where}.address" if isinstance(item, Mapping) else where
            self.address(at, address)
            if str(address) in seen:
                faults.add(at, address, "is listed twice", "Remove one, or give the server a weight")
            seen.add(str(address))
            weight = member.get("weight")
            if weight is not None and not 1 <= (_number(weight) or 0) <= 1000:
                faults.add(f"{where}.weight", weight, "must be a whole number from 1 to 1000", "Correct it or leave it out")
            if member.get("api_key"):
                faults.check(_TOKEN, f"{where}.api_key", member["api_key"], "has characters that no Bearer key has", "Check it in the vault", True)
                if self.service.get("open") and not self.service.get("api_keys"):
                    faults.add(f"{where}.api_key", "", "would serve whoever comes, since the service is open and asks for no key", "Set api_keys too", True)
            if member.get("peer_key"):
                rule = "has other characters than letters, digits, dash and underscore"
                faults.check(_API_KEY, f"{where}.peer_key", member["peer_key"], rule, "Generate it anew", True)
            if member.get("tls"):
                self.upstream_tls(f"{where}.tls", member["tls"])
        if len(members) == 1 and isinstance(members[0], Mapping) and (members[0].get("backup") or members[0].get("weight")):
            faults.add(self.at("upstream"), members[0].get("address"), "is alone, so it is nobody's backup and needs no weight", "Leave both out")
        elif len(members) > 1 and all(isinstance(item, Mapping) and item.get("backup") for item in members):
            faults.add(self.at("upstream"), len(members), "are all a backup", "Leave backup out for one at least")
        if self.service.get("retry") and len(members) < 2:
            faults.add(self.at("retry"), True, "needs a second server to try", "List several servers in upstream, or leave retry out")
        if self.service.get("upstream_tls"):
            self.upstream_tls(self.at("upstream_tls"), self.service["upstream_tls"])

    def known(self, variable: str, given: Mapping[str, t.Any], *fields: str) -> None:
        for field in sorted(map(str, set(given) - set(fields))):
            self.faults.add(f"{variable}.{field}", "", "is no field", nearest(field, fields).capitalize().rstrip("?"), True)

    def address(self, variable: str, address: t.Any) -> None:
        match = _ADDRESS.fullmatch(address) if isinstance(address, str) else None
        good = match is not None and 1 <= int(match["port"]) <= 65535
        if good and match is not None and (match["host"].startswith("[") or re.fullmatch(r"[0-9.]+", match["host"])):
            try:
                ipaddress.ip_address(match["host"].strip("[]"))
            except ValueError:
                good = False
        if not good:
            rule = "is no address and port"
            self.faults.add(variable, address, rule, "Write it as 127.0.0.1:18000, gpu1.example:8001 or '[2001:db8::1]:8001', without http:// and path")

    def upstream_tls(self, variable: str, tls: t.Any) -> None:
        if isinstance(tls, Mapping):
            self.known(variable, tls, "ca", "ca_file", "name")
        given = _given(tls, "ca", "ca_file") if isinstance(tls, Mapping) else []
        if len(given) != 1:
            rule = "needs either ca or ca_file"
            self.faults.add(variable, given, rule, "Give the CA of the server's certificate; /etc/ssl/certs/ca-certificates.crt has the public ones")
            return
        if "ca" in given:
            self.faults.certificates(f"{variable}.ca", tls["ca"])
        else:
            self.faults.check(_FILE, f"{variable}.ca_file", tls["ca_file"], "is no absolute path of the host", "Write it as /etc/ssl/certs/ca-certificates.crt")
        if tls.get("name"):
            self.faults.check(_NAME, f"{variable}.name", tls["name"], "is no host name", "Give a DNS name of the server's certificate")

    def keys(self) -> None:
        for index, key in enumerate(_items(self.service.get("api_keys"))):
            rule = "has other characters than letters, digits, dash and underscore, or none"
            self.faults.check(_API_KEY, self.at(f"api_keys[{index}]"), key, rule, "Generate it anew", True)

    def paths(self) -> None:
        service, faults = self.service, self.faults
        routes = service.get("routes") or {}
        passed = [str(item) for item in _items(service.get("pass"))]
        exact = [str(path) for path in routes] if isinstance(routes, Mapping) else []
        remedy = "Write it as /v1/, without spaces, braces and regular expressions"
        for field, paths in (("pass", passed), ("routes", exact), ("health", _items(service.get("health")))):
            for path in paths:
                faults.check(_PATH, self.at(field), path, "is no path", remedy)
        for path in sorted({path for path in passed if passed.count(path) > 1}):
            faults.add(self.at("pass"), path, "is listed twice", "Remove one")
        for path in exact:
            self.address(self.at(f"routes[{path}]"), routes[path])
        for path, field in (("/health", "health"), ("/v1/models", "models")):
            if path in exact and service.get(field):
                faults.add(self.at(f"routes[{path}]"), routes[path], f"is what {field} answers", f"Leave out the route, or {field}")
        if service.get("open") and passed:
            faults.add(self.at("pass"), passed, "says nothing beside open, which passes everything", "Leave out one of both")
        if not service.get("open") and not passed and not exact and not service.get("drain"):
            faults.add(self.at("pass"), passed, "passes nothing", "List path prefixes such as /v1/, or set open: true for a service that guards itself")
        for index, model in enumerate(_items(service.get("models"))):
            faults.check(_MODEL, self.at(f"models[{index}]"), model, "is no model name", "Use letters, digits, dots, dashes and underscores")
        limits = _items(service.get("rate_limits"))
        for index, limit in enumerate(limits):
            where = self.at(f"rate_limits[{index}]")
            limit = limit if isinstance(limit, Mapping) else {}
            path = str(limit.get("path"))
            if faults.check(_PATH, f"{where}.path", limit.get("path"), "is no path", "Write it as /api/support/user/account/loginByPassword"):
                reached = service.get("open") or path in exact or any(path.startswith(prefix) for prefix in passed)
                if not reached and not (path == "/v1/models" and service.get("models")):
                    faults.add(f"{where}.path", path, "is not passed", "Limit a path that is, or add it to pass")
                if [item.get("path") for item in limits if isinstance(item, Mapping)].count(path) > 1:
                    faults.add(f"{where}.path", path, "is limited twice", "Remove one limit")
            faults.check(_RATE, f"{where}.rate", limit.get("rate"), "is no rate", "Write it as 10r/m, or 2r/s")
            if limit.get("burst") is not None and _number(limit["burst"]) is None:
                faults.add(f"{where}.burst", limit["burst"], "must be a whole number of requests", "Write it as 5")

    def tls(self) -> None:
        faults, tls = self.faults, self.service.get("tls")
        if not tls:
            if self.service.get("redirect_from"):
                faults.add(self.at("redirect_from"), self.service["redirect_from"], "leads to HTTPS, which the service does not speak", "Set tls too")
            return
        if not isinstance(tls, Mapping):
            faults.add(self.at("tls"), "(hidden)", "must be a dictionary", "Give certificate and key")
            return
        self.own_ca = bool(tls.get("own_ca"))
        pem, files = _given(tls, "certificate", "key"), _given(tls, "certificate_file", "key_file")
        if bool(pem) + bool(files) + self.own_ca != 1:
            rule = "must be one of: certificate and key, certificate_file and key_file, own_ca"
            faults.add(self.at("tls"), [*pem, *files, *(["own_ca"] if self.own_ca else [])], rule, "Leave the others out")
        elif pem and len(pem) == 1 or files and len(files) == 1:
            faults.add(self.at("tls"), [*pem, *files], "is given by half", "Give certificate and key, or certificate_file and key_file")
        elif pem:
            faults.pair(f"{self.at('tls')}.", tls["certificate"], tls["key"])
        for field in files:
            faults.check(_FILE, self.at(f"tls.{field}"), tls[field], "is no absolute path of the host", "Write it as /etc/ssl/private/door.key")

    def answers(self) -> None:
        headers = self.service.get("headers") or {}
        for name, value in headers.items() if isinstance(headers, Mapping) else []:
            self.faults.check(_HEADER, self.at("headers"), name, "is no name of a header", "Use letters, digits and dashes")
            if _UNQUOTABLE.search(str(value)):
                self.faults.add(self.at(f"headers[{name}]"), value, "has a quote, backslash, dollar sign or line break in it", "Write the value without")
        for index, proxy in enumerate(_items(self.service.get("trusted_proxies"))):
            try:
                ipaddress.ip_network(str(proxy), strict=False)
            except ValueError:
                variable = self.at(f"trusted_proxies[{index}]")
                self.faults.add(variable, proxy, "is no address and no network", "Write it as 192.0.2.10 or 192.0.2.0/24")


def _ca_faults(faults: _Faults, tls_ca: Mapping[str, t.Any]) -> None:
    certificate, key = tls_ca.get("certificate"), tls_ca.get("key")
    if not certificate or not key:
        variable = "door_tls_ca_key" if certificate else "door_tls_ca_certificate"
        faults.add(variable, "", "is empty, and a service is to have a certificate of the own CA", "Give CA certificate and key in PEM", True)
        return
    chain = faults.pair("door_tls_ca_", certificate, key, str(tls_ca.get("passphrase") or ""))
    if chain:
        try:
            signs = chain[0].extensions.get_extension_for_class(x509.BasicConstraints).value.ca
            chain[0].extensions.get_extension_for_class(x509.SubjectKeyIdentifier)
        except x509.ExtensionNotFound:
            signs = False
        if not signs:
            rule = "is no CA: it needs the extensions basicConstraints CA:TRUE and subjectKeyIdentifier"
            faults.add("door_tls_ca_certificate", chain[0].subject.rfc4514_string(), rule, "Make it anew as a CA, for example with openssl req -x509")
    names = _items(tls_ca.get("names"))
    if not names:
        faults.add("door_tls_names", names, "is empty", "Give the names and addresses under which clients know this host")
    for index, name in enumerate(names):
        try:
            if ipaddress.ip_address(str(name)).is_unspecified:
                faults.add(f"door_tls_names[{index}]", name, "is no address that a client asks for", "Set node_address, or name the host's own addresses")
        except ValueError:
            faults.check(_NAME, f"door_tls_names[{index}]", name, "is no host name and no address", "Write it as 192.0.2.10 or gpu1.example")


def door_faults(services: t.Any, tls_ca: t.Any = None) -> list[str]:
    faults = _Faults()
    if not is_list(services) or not all(isinstance(service, Mapping) for service in services):
        faults.add("door_services", services if not is_list(services) else "(list)", "must be a list of dictionaries", "See the role's README")
        return faults.found
    own_ca = False
    ports: dict[int, str] = {}
    for index, service in enumerate(services):
        variable = f"door_services[{index}]"
        one = _Service(faults, variable, service)
        one.check()
        own_ca = own_ca or one.own_ca
        wanted = ["port"] + (["redirect_from"] if service.get("redirect_from") else [])
        for field in wanted:
            port = faults.port(f"{variable}.{field}", service.get(field))
            if port is not None and port in ports:
                faults.add(f"{variable}.{field}", port, f"is also {ports[port]}", "Give each its own port")
            elif port is not None:
                ports[port] = f"{variable}.{field}"
    ca = tls_ca if isinstance(tls_ca, Mapping) else {}
    if own_ca or ca.get("certificate"):
        _ca_faults(faults, ca)
    return faults.found


class FilterModule:
    def filters(self) -> dict[str, t.Callable[..., t.Any]]:
        return {"door_faults": door_faults}
