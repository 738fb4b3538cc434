# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import datetime
import typing as t

import pytest
from ansible.errors import AnsibleFilterError
from ansible_collections.selfhosted.fastgpt.plugins.filter.door_faults import door_faults
from ansible_collections.selfhosted.fastgpt.plugins.filter.door_plan import door_plan
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

GOOD: dict[str, t.Any] = {"name": "a model", "port": 8001, "upstream": "127.0.0.1:18001", "api_keys": ["sk-a_B-1"], "pass": ["/v1/"]}


def make(name: str = "x", ca: bool = False, days: tuple[int, int] = (-1, 30), passphrase: bytes = b"", ski: bool = True) -> tuple[str, str]:
    """A self-signed certificate and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.timezone.utc)
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(subject).public_key(key.public_key()).serial_number(1)
    builder = builder.not_valid_before(now + datetime.timedelta(days=days[0])).not_valid_after(now + datetime.timedelta(days=days[1]))
    builder = builder.add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
    if ski:
        builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    protection = serialization.BestAvailableEncryption(passphrase) if passphrase else serialization.NoEncryption()
    pem = builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode()
    return pem, key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, protection).decode()


CERTIFICATE, KEY = make()
OTHER, OTHER_KEY = make("other")
CA, CA_KEY = make("ca", ca=True)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"port": "8001", "max_body": "1048576", "read_timeout": "600"},
        {"upstream": ["[2001:db8::1]:80", {"address": "gpu1.example:8001", "weight": 3}, {"address": "10.0.0.1:1", "backup": True}], "retry": True},
        {"pass": None, "routes": {"/v1/rerank": "127.0.0.1:2"}},
        {"pass": None, "drain": True},
        {
            "pass": None,
            "open": True,
            "api_keys": [],
            "rate_limits": [{"path": "/api/login", "rate": "5r/m", "burst": 3}],
            "trusted_proxies": ["10.0.0.0/8", "::1"],
        },
        {"rate_limits": [{"path": "/v1/x", "rate": "1r/s"}], "headers": {"X-A": "b c", "Referrer-Policy": ""}},
        {"tls": {"certificate": CERTIFICATE, "key": KEY}, "redirect_from": 80},
        {"tls": {"certificate_file": "/a/b.pem", "key_file": "/a/b.key"}},
        {"upstream_tls": {"ca": CA, "name": "gpu1.example"}},
        {"upstream_tls": {"ca_file": "/etc/ssl/certs/ca-certificates.crt"}},
    ],
)
def test_what_is_right_has_no_fault(fields: dict[str, t.Any]) -> None:
    assert door_faults([{**GOOD, **fields}]) == []
    assert len(door_plan([{**GOOD, **fields}], "x", "/p", "/s")) == 1


@pytest.mark.parametrize(
    ("fields", "variable", "rule"),
    [
        ({"port": 0}, "port", "is no TCP port"),
        ({"port": 65536}, "port", "is no TCP port"),
        ({"port": True}, "port", "is no TCP port"),
        ({"name": "a'b"}, "name", "without quotes"),
        ({"name": "a$b"}, "name", "without quotes"),
        ({"name": ""}, "name", "must be a text"),
        ({"upstream": "127.0.0.1"}, "upstream", "is no address and port"),
        ({"upstream": "http://127.0.0.1:1"}, "upstream", "is no address and port"),
        ({"upstream": "127.0.0.1:1/v1"}, "upstream", "is no address and port"),
        ({"upstream": "127.0.0.1:99999"}, "upstream", "is no address and port"),
        ({"upstream": "300.0.0.1:1"}, "upstream", "is no address and port"),
        ({"upstream": "[::zz]:1"}, "upstream", "is no address and port"),
        ({"upstream": "a b:1"}, "upstream", "is no address and port"),
        ({"upstream": "a;b:1"}, "upstream", "is no address and port"),
        ({"upstream": []}, "upstream", "names no server"),
        ({"upstream": ["a:1", "a:1"]}, "upstream[1]", "is listed twice"),
        ({"upstream": ["a:1", {"address": "b:1", "weight": 0}]}, "upstream[1].weight", "must be a whole number"),
        ({"upstream": ["a:1", {"address": "b:1", "wieght": 2}]}, "upstream[1].wieght", "is no field"),
        ({"upstream": ["a:1", {"address": "b:1", "api_key": "a b"}]}, "upstream[1].api_key", "no Bearer key"),
        ({"upstream": [{"address": "a:1", "backup": True}, {"address": "b:1", "backup": True}]}, "upstream", "all a backup"),
        ({"upstream": [{"address": "a:1", "backup": True}]}, "upstream", "is alone"),
        ({"upstream": [{"address": "a:1", "api_key": "k"}], "pass": None, "open": True, "api_keys": []}, "upstream[0].api_key", "whoever comes"),
        ({"retry": True}, "retry", "needs a second server"),
        ({"upstream_tls": {}, "upstream": [{"address": "a:1", "tls": {"name": "x"}}]}, "upstream[0].tls", "needs either ca or ca_file"),
        ({"upstream_tls": {"ca": CA, "ca_file": "/x"}}, "upstream_tls", "needs either ca or ca_file"),
        ({"upstream_tls": {"ca": "nonsense"}}, "upstream_tls.ca", "is no certificate in PEM"),
        ({"upstream_tls": {"ca": CA, "name": "a b"}}, "upstream_tls.name", "is no host name"),
        ({"api_keys": ["sk-secret$1"]}, "api_keys[0]", "other characters"),
        ({"api_keys": [""]}, "api_keys[0]", "other characters"),
        ({"pass": ["v1/"]}, "pass", "is no path"),
        ({"pass": ["~ /v1"]}, "pass", "is no path"),
        ({"pass": ["/v1/", "/v1/"]}, "pass", "is listed twice"),
        ({"pass": []}, "pass", "passes nothing"),
        ({"open": True}, "pass", "says nothing beside open"),
        ({"health": "/h {"}, "health", "is no path"),
        ({"routes": {"/v1/rerank": "nowhere"}}, "routes[/v1/rerank]", "is no address and port"),
        ({"routes": {"/health": "a:1"}, "health": "/health"}, "routes[/health]", "is what health answers"),
        ({"routes": {"/v1/models": "a:1"}, "models": ["m"]}, "routes[/v1/models]", "is what models answers"),
        ({"models": ['m"']}, "models[0]", "is no model name"),
        ({"max_body": "8 MB"}, "max_body", "is no size"),
        ({"read_timeout": 0}, "read_timeout", "must be a number of seconds"),
        ({"rate_limits": [{"path": "/api/login", "rate": "1r/s"}]}, "rate_limits[0].path", "is not passed"),
        ({"rate_limits": [{"path": "/v1/a", "rate": "fast"}]}, "rate_limits[0].rate", "is no rate"),
        ({"rate_limits": [{"path": "/v1/a", "rate": "0r/s"}]}, "rate_limits[0].rate", "is no rate"),
        ({"rate_limits": [{"path": "/v1/a", "rate": "1r/s", "burst": -1}]}, "rate_limits[0].burst", "whole number"),
        ({"rate_limits": [{"path": "/v1/a", "rate": "1r/s"}] * 2}, "rate_limits[1].path", "is limited twice"),
        ({"headers": {"X A": "b"}}, "headers", "is no name of a header"),
        ({"headers": {"X-A": 'b"'}}, "headers[X-A]", "has a quote"),
        ({"trusted_proxies": ["proxy.example"]}, "trusted_proxies[0]", "is no address"),
        ({"redirect_from": 80}, "redirect_from", "does not speak"),
        ({"tls": {"certificate": CERTIFICATE}}, "tls", "is given by half"),
        ({"tls": {"key": KEY}}, "tls", "is given by half"),
        ({"tls": {"certificate_file": "/x"}}, "tls", "is given by half"),
        ({"tls": {"certificate": CERTIFICATE, "key": KEY, "own_ca": True}}, "tls", "must be one of"),
        ({"tls": {"certificate_file": "x.pem", "key_file": "/x"}}, "tls.certificate_file", "is no absolute path"),
        ({"tls": {"certificate": "x", "key": KEY}}, "tls.certificate", "is no certificate in PEM"),
        ({"tls": {"certificate": CERTIFICATE, "key": "x"}}, "tls.key", "is no private key in PEM"),
        ({"tls": {"certificate": CERTIFICATE, "key": OTHER_KEY}}, "tls.certificate", "does not belong to the key"),
        ({"tls": {"certificate": OTHER + CERTIFICATE, "key": KEY}}, "tls.certificate", "does not come first"),
        ({"tls": {"certificate": CERTIFICATE + OTHER, "key": KEY}}, "tls.certificate", "is not signed by the one after it"),
        ({"tls": dict(zip(("certificate", "key"), make(days=(-9, -1))))}, "tls.certificate", "expired on"),
        ({"tls": dict(zip(("certificate", "key"), make(days=(1, 9))))}, "tls.certificate", "is valid only from"),
        ({"tls": dict(zip(("certificate", "key"), make(passphrase=b"p")))}, "tls.key", "is encrypted"),
        ({"tls": {"own_ca": True}}, "door_tls_ca_certificate", "is empty"),
    ],
)
def test_what_is_wrong_is_named(fields: dict[str, t.Any], variable: str, rule: str) -> None:
    found = door_faults([{**GOOD, **fields}])
    where = variable if variable.startswith("door_") else f"door_services[0].{variable}"
    assert any(line.startswith(f"{where}: ") and rule in line for line in found), found
    text = "\n".join(found)
    assert "secret" not in text and "PRIVATE" not in text and "\n".join(found).count("\n") == len(found) - 1


def test_a_port_is_taken_once() -> None:
    tls = {"certificate": CERTIFICATE, "key": KEY}
    second = {**GOOD, "port": 8002, "tls": tls, "redirect_from": 8001}
    assert door_faults([GOOD, second]) == ["door_services[1].redirect_from: 8001: is also door_services[0].port. Give each its own port."]
    # two servers of one model share its name
    assert door_faults([GOOD, {**GOOD, "port": 8002}]) == []
    assert "is also" in door_faults([GOOD, GOOD])[0]


@pytest.mark.parametrize(
    ("given", "variable", "rule"),
    [
        ({"certificate": CA}, "door_tls_ca_key", "is empty"),
        ({"certificate": CERTIFICATE, "key": KEY}, "door_tls_ca_certificate", "is no CA"),
        (dict(zip(("certificate", "key"), make(ca=True, ski=False))), "door_tls_ca_certificate", "is no CA"),
        ({"certificate": CA, "key": OTHER_KEY}, "door_tls_ca_certificate", "does not belong to the key"),
        ({"certificate": CA, "key": CA_KEY, "passphrase": "p"}, "door_tls_ca_key", "has no passphrase"),
        (dict(zip(("certificate", "key"), make(ca=True, passphrase=b"p"))) | {"passphrase": "q"}, "door_tls_ca_key", "passphrase is wrong"),
        ({"certificate": CA, "key": CA_KEY, "names": ["a b"]}, "door_tls_names[0]", "is no host name"),
        ({"certificate": CA, "key": CA_KEY, "names": ["0.0.0.0"]}, "door_tls_names[0]", "is no address that a client asks for"),
        ({"certificate": CA, "key": CA_KEY, "names": []}, "door_tls_names", "is empty"),
    ],
)
def test_the_own_ca(given: dict[str, t.Any], variable: str, rule: str) -> None:
    found = door_faults([{**GOOD, "tls": {"own_ca": True}}], {"names": ["192.0.2.1"], **given})
    assert any(line.startswith(f"{variable}: ") and rule in line for line in found), found


def test_an_own_ca_that_is_right() -> None:
    certificate, key = make(ca=True, passphrase=b"p")
    assert (
        door_faults([{**GOOD, "tls": {"own_ca": True}}], {"certificate": certificate, "key": key, "passphrase": "p", "names": ["192.0.2.1", "a.example"]}) == []
    )


@pytest.mark.parametrize("services", [None, "x", {"a": 1}, ["x"], [None]])
def test_no_services_at_all(services: t.Any) -> None:
    assert len(door_faults(services)) == 1
    with pytest.raises(AnsibleFilterError):
        door_plan(services or [None], "x", "/p", "/s")


def _plan(**fields: t.Any) -> dict[str, t.Any]:
    return door_plan([{**GOOD, **fields}], "x", "/p", "/s")[0]


def test_hops_are_made_only_where_servers_differ() -> None:
    two = ["a:1", "b:1"]
    assert not _plan()["hops"] and not _plan(upstream=two)["hops"]
    assert not _plan(upstream=two, upstream_tls={"ca": CA, "name": "x"})["hops"]
    # each has the name of its own address
    assert len(_plan(upstream=two, upstream_tls={"ca": CA})["hops"]) == 2
    assert not _plan(upstream=[{"address": "a:1", "api_key": "k"}])["hops"]
    assert len(_plan(upstream=[{"address": "a:1", "api_key": "k"}, "b:1"])["hops"]) == 2


def test_one_ca_is_one_file() -> None:
    assert [file["path"] for file in _plan(upstream=["a:1", "b:1"], upstream_tls={"ca": CA})["files"]] == ["/p-x-8001-0.ca"]


def test_a_sockets_path_fits_into_an_address() -> None:
    longest = "a" * 60 + "." + "b" * 60 + ".example:65535"
    items = [{"address": longest, "api_key": "k"}, {"address": f"c.{longest}", "api_key": "l"}]
    found = door_plan([{**GOOD, "port": 65535, "upstream": items}], "n" * 31, "/p", "/var/lib/nginx/selfhosted-fastgpt")[0]["hops"]
    sockets = [hop["socket"].removeprefix("unix:") for hop in found]
    assert max(map(len, sockets)) <= 107 and len(set(sockets)) == 2


def test_a_service_whose_servers_are_all_drained_is_drained() -> None:
    items = [{"address": "a:1", "drain": True}, {"address": "b:1", "drain": True}]
    assert _plan(upstream=items)["drain"] and not _plan(upstream=[*items, "c:1"])["drain"]
