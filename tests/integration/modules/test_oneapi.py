# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The oneapi_* modules against a server that behaves like One-API v0.6.10."""

from __future__ import annotations

import json
import os
import pathlib
import ssl
import subprocess
import sys
import time
import typing as t

import pytest
import yaml
from ansible_collections.selfhosted.fastgpt.plugins.modules import oneapi_token
from fixtures_oneapi import ACCESS_TOKEN, REPO, ROOT_PASSWORD, Certificates, OneApi, run_module, run_together, tls_front

KEY = "sk-" + "a1b2c3d4" * 6
KEY2 = "sk-" + "ffff0000" * 6


def channel(name: str = "m3e-large@gpu-1", **fields: t.Any) -> dict[str, t.Any]:
    return {"name": name, "base_url": "http://gpu-1:6200", "key": KEY, "models": ["m3e-large"], **fields}


def without_times(rows: list[dict[str, t.Any]]) -> list[dict[str, t.Any]]:
    return [{key: value for key, value in row.items() if not key.endswith("_time")} for row in rows]


# -- the client ----------------------------------------------------------------------------------------------------------


class TestClient:
    def test_absent_server_fails_clearly_in_check_mode_too(self, quick_retries: None) -> None:
        args = {"url": "http://127.0.0.1:9", "access_token": ACCESS_TOKEN, "channels": []}
        for check in (False, True):
            result = run_module("oneapi_channel", args, check=check)
            assert result["failed"]
            assert "127.0.0.1:9" in result["msg"]
            assert "Is One-API running" in result["msg"]

    @pytest.mark.parametrize("url", ["gpu-1:3000", "", "ftp://x", "http://[::1", "http://a:99999", "http://a b"])
    def test_url_must_be_one(self, url: str) -> None:
        result = run_module("oneapi_option", {"url": url, "access_token": "x", "options": {}})
        assert result["failed"]
        assert result["msg"].startswith("url: ")

    def test_credentials_are_needed(self, oneapi: OneApi) -> None:
        result = run_module("oneapi_token", {"url": oneapi.url, "name": "x"})
        assert "one of the following is required: access_token, password" in result["msg"]

    def test_new_api_is_refused_before_the_first_write(self, oneapi_factory: t.Callable[..., OneApi]) -> None:
        server = oneapi_factory(ONE_API_STANDIN_FLAVOUR="new-api")
        if server.real:
            pytest.skip("needs the stand-in")
        for name, more in (
            ("oneapi_channel", {"channels": [channel()]}),
            ("oneapi_token", {"name": "fastgpt"}),
            ("oneapi_option", {"options": {"RegisterEnabled": False}}),
            ("oneapi_user", {"password": ROOT_PASSWORD}),
        ):
            for check in (True, False):
                result = run_module(name, server.args(**more), check=check)
                assert result["failed"], name
                assert "is new-api" in result["msg"]
        assert not [line for line in server.take_requests() if not line.startswith("GET ")]

    @pytest.mark.parametrize("version", ["v0.6.7", "v0.5.4"])
    def test_old_versions_are_refused(self, oneapi_factory: t.Callable[..., OneApi], version: str) -> None:
        server = oneapi_factory(ONE_API_STANDIN_VERSION=version)
        if server.real:
            pytest.skip("needs the stand-in")
        result = run_module("oneapi_token", server.args(name="fastgpt"))
        assert result["failed"]
        assert f"is One-API {version}; at least v0.6.8 is needed" in result["msg"]

    def test_a_build_without_version_is_taken_with_a_warning(self, oneapi_factory: t.Callable[..., OneApi]) -> None:
        server = oneapi_factory(ONE_API_STANDIN_VERSION="v0.0.0")
        result = run_module("oneapi_token", server.args(name="fastgpt"))
        assert not result["failed"]
        assert server.real or result["warnings"]

    def test_a_wrong_access_token_is_told(self, oneapi: OneApi) -> None:
        result = run_module("oneapi_channel", {**oneapi.args(channels=[]), "access_token": "f" * 32})
        assert result["failed"]
        assert "Give root's current access token" in result["msg"]
        assert "f" * 32 not in result["output"]

    def test_password_stands_in_for_a_wrong_access_token_with_one_login(self, oneapi: OneApi) -> None:
        oneapi.take_requests()
        result = run_module("oneapi_token", {**oneapi.args(name="x"), "access_token": "f" * 32, "password": "123456"})
        assert not result["failed"]
        if not oneapi.real:
            assert len([line for line in oneapi.take_requests() if "/api/user/login" in line]) == 1

    def test_a_wrong_password_is_told(self, oneapi: OneApi) -> None:
        result = run_module("oneapi_token", {"url": oneapi.url, "password": "not-this-one", "name": "x"})
        assert result["failed"]
        assert "refuses the password of root" in result["msg"]
        assert "not-this-one" not in result["output"]

    def test_login_limit_is_named(self, oneapi: OneApi, quick_retries: None) -> None:
        for _attempt in range(20):
            oneapi.login("wrong-password")
        result = run_module("oneapi_token", {"url": oneapi.url, "password": "123456", "name": "x", "rate_limit_wait": 1})
        assert result["failed"]
        assert "20 log-ins" in result["msg"]
        assert "access_token" in result["msg"]

    def test_general_limit_is_waited_for(self, oneapi: OneApi, quick_retries: None) -> None:
        oneapi.faults({"kind": "429", "times": 2})
        result = run_module("oneapi_channel", oneapi.args(channels=[channel()], rate_limit_wait=10))
        assert not result["failed"]
        assert len(oneapi.channels()) == 1

    def test_general_limit_has_an_end(self, oneapi: OneApi) -> None:
        oneapi.faults({"kind": "429", "times": 100})
        result = run_module("oneapi_channel", oneapi.args(channels=[], rate_limit_wait=1))
        assert result["failed"]
        assert "rate_limit_wait" in result["msg"]

    def test_a_path_in_the_url_is_told(self, oneapi: OneApi, quick_retries: None) -> None:
        result = run_module("oneapi_channel", oneapi.args(url=oneapi.url + "/v1", channels=[]))
        assert result["failed"]
        assert "root of One-API" in result["msg"]

    @pytest.mark.parametrize(
        ("kind", "words"),
        [
            ("html", ["web page", "proxy"]),
            ("bad_gateway", ["HTTP 502", "5 times"]),
            ("redirect", ["redirect to sso.example.com/login", "proxy"]),
            ("500", ["HTTP 500"]),
            ("refuse", ["database is locked"]),
            ("truncate", ["bytes are missing"]),
            ("drop_before", ["tries"]),
        ],
    )
    def test_what_a_broken_proxy_says_is_told_by_each_module(self, oneapi_shared: OneApi, quick_retries: None, kind: str, words: list[str]) -> None:
        for name, more in (
            ("oneapi_channel", {"channels": [channel()]}),
            ("oneapi_token", {"name": "fastgpt"}),
            ("oneapi_option", {"options": {"RegisterEnabled": False}}),
            ("oneapi_user", {"password": ROOT_PASSWORD}),
        ):
            oneapi_shared.faults({"kind": kind, "times": 1000})
            result = run_module(name, oneapi_shared.args(**more))
            assert result["failed"], name
            assert oneapi_shared.url in result["msg"]
            assert [word for word in words if word in result["msg"]] == words, result["msg"]
            assert "next=secret" not in result["output"]

    def test_a_proxy_that_stumbles_is_waited_for(self, oneapi_shared: OneApi, quick_retries: None) -> None:
        oneapi_shared.faults({"kind": "bad_gateway", "times": 3})
        result = run_module("oneapi_channel", oneapi_shared.args(channels=[channel()]))
        assert not result["failed"], result
        assert len(oneapi_shared.channels()) == 1

    def test_a_slow_read(self, oneapi_shared: OneApi, quick_retries: None) -> None:
        oneapi_shared.faults({"method": "GET", "path_regex": "search", "kind": "slow", "seconds": 1.5, "times": 1})
        assert not run_module("oneapi_channel", oneapi_shared.args(channels=[channel()], timeout=1))["failed"]

    @pytest.mark.parametrize("wrong", [{"timeout": 0}, {"rate_limit_wait": -1}, {"client_key": "k"}])
    def test_settings_that_cannot_be(self, wrong: dict[str, t.Any]) -> None:
        result = run_module("oneapi_token", {"url": "http://127.0.0.1:9", "access_token": "x", "name": "x", **wrong})
        assert result["failed"]
        assert result["msg"].startswith(next(iter(wrong)))

    def test_the_real_way_through_ansible(self, oneapi: OneApi) -> None:
        """Packed and sent by Ansible itself, so that the module_utils are found and nothing secret is printed."""
        command = [os.path.join(os.path.dirname(sys.executable), "ansible"), "localhost", "-c", "local", "-vvv", "-D"]
        command += ["-e", f"ansible_python_interpreter={sys.executable}", "-m", "selfhosted.fastgpt.oneapi_channel"]
        command += ["-a", json.dumps(oneapi.args(channels=[channel()]))]
        done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "CHANGED" in done.stdout
        result = done.stdout[done.stdout.index("CHANGED") :]
        assert KEY not in result
        assert ACCESS_TOKEN not in result


class TestTls:
    @pytest.fixture
    def wanted(self, oneapi_shared: OneApi) -> dict[str, t.Any]:
        return oneapi_shared.args(channels=[channel()])

    def test_the_right_authority(self, oneapi_shared: OneApi, certificates: Certificates, wanted: dict[str, t.Any]) -> None:
        with tls_front(oneapi_shared, certificates) as url:
            for name, more in (
                ("oneapi_channel", {"channels": [channel()]}),
                ("oneapi_token", {"name": "fastgpt"}),
                ("oneapi_option", {"options": {"RetryTimes": 0}}),
            ):
                args = {"url": url, "username": "root", "password": "123456", "ca_path": certificates["ca"], **more}
                assert not run_module(name, args)["failed"]
            assert run_module("oneapi_user", {"url": url, "password": "wrong-pass", "password_previous": [], "ca_path": certificates["ca"]})["failed"]
        assert len(oneapi_shared.channels()) == len(oneapi_shared.tokens()) == 1

    @pytest.mark.parametrize("authority", ["other_ca", None])
    def test_a_wrong_authority(self, oneapi_shared: OneApi, certificates: Certificates, wanted: dict[str, t.Any], authority: str | None) -> None:
        oneapi_shared.take_requests()
        with tls_front(oneapi_shared, certificates) as url:
            more = {"ca_path": certificates[authority]} if authority else {}
            result = run_module("oneapi_channel", {**wanted, "url": url, **more})
            assert result["failed"]
            assert "ca_path" in result["msg"]
            assert oneapi_shared.take_requests() == []
            assert not run_module("oneapi_channel", {**wanted, "url": url, "validate_certs": False, **more})["failed"]

    def test_another_host_name(self, oneapi_shared: OneApi, certificates: Certificates, wanted: dict[str, t.Any]) -> None:
        with tls_front(oneapi_shared, certificates) as url:
            result = run_module("oneapi_channel", {**wanted, "url": url.replace("127.0.0.1", "localhost"), "ca_path": certificates["ca"]})
        assert result["failed"]
        assert "host name" in result["msg"]

    @pytest.mark.parametrize("latest", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
    def test_a_client_certificate(
        self, oneapi_shared: OneApi, certificates: Certificates, quick_retries: None, wanted: dict[str, t.Any], latest: ssl.TLSVersion
    ) -> None:
        oneapi_shared.take_requests()
        with tls_front(oneapi_shared, certificates, ask_client=True, latest=latest) as url:
            args = {**wanted, "url": url, "ca_path": certificates["ca"]}
            for more in ({}, {"client_cert": certificates["stranger"], "client_key": certificates["stranger_key"]}):
                result = run_module("oneapi_channel", {**args, **more})
                assert result["failed"]
                assert "client_cert" in result["msg"], result["msg"]
            assert oneapi_shared.take_requests() == []
            assert run_module("oneapi_channel", {**args, "client_cert": certificates["client"], "client_key": certificates["client_key"]})["changed"]
            assert not run_module("oneapi_channel", {**args, "client_cert": certificates["client_both"]})["failed"]

    @pytest.mark.parametrize(
        ("files", "words"),
        [
            ({"ca_path": "absent"}, "No such file"),
            ({"ca_path": "client_key"}, "not usable for TLS"),
            ({"client_cert": "client", "client_key": "absent"}, "client_key: "),
            ({"client_cert": "client", "client_key": "stranger_key"}, "not usable for TLS"),
            ({"client_cert": "client", "client_key": "client_locked"}, "passphrase"),
        ],
    )
    def test_files_that_do_not_fit(self, certificates: Certificates, files: dict[str, str], words: str) -> None:
        started = time.monotonic()
        args = {"url": "https://127.0.0.1:9", "access_token": "x", "name": "x", **{option: certificates[name] for option, name in files.items()}}
        result = run_module("oneapi_token", args)
        assert result["failed"]
        assert words in result["msg"]
        assert str(certificates.directory) in result["msg"]
        assert time.monotonic() - started < 2

    def test_plain_http_where_https_is_meant_and_the_other_way_round(self, oneapi_shared: OneApi, certificates: Certificates, quick_retries: None) -> None:
        with tls_front(oneapi_shared, certificates) as url:
            assert run_module("oneapi_token", oneapi_shared.args(url=url.replace("https", "http"), name="x"))["failed"]
        result = run_module("oneapi_token", oneapi_shared.args(url=oneapi_shared.url.replace("http", "https"), name="x"))
        assert "speak https" in result["msg"]


# -- oneapi_user -----------------------------------------------------------------------------------------------------------


def logins(server: OneApi) -> int:
    return len([line for line in server.take_requests() if "/api/user/login" in line])


class TestUser:
    def test_rotation_by_the_default_password(self, oneapi: OneApi) -> None:
        args = {"url": oneapi.url, "password": ROOT_PASSWORD}
        before = run_module("oneapi_user", args, check=True)
        assert before["changed"]
        assert oneapi.login("123456")
        first = run_module("oneapi_user", args)
        assert first["changed"]
        assert first["diff"] == before["diff"]
        assert oneapi.login(ROOT_PASSWORD)
        assert not oneapi.login("123456")
        for check in (True, False):
            assert not run_module("oneapi_user", args, check=check)["changed"]
        assert ROOT_PASSWORD not in first["output"]

    def test_rotation_by_access_token_costs_one_login(self, oneapi: OneApi) -> None:
        oneapi.take_requests()
        result = run_module("oneapi_user", oneapi.args(password=ROOT_PASSWORD))
        assert result["changed"]
        if not oneapi.real:
            assert len([line for line in oneapi.take_requests() if "/api/user/login" in line]) == 1
        assert oneapi.login(ROOT_PASSWORD)
        assert not run_module("oneapi_user", oneapi.args(password=ROOT_PASSWORD))["changed"]

    def test_rotation_by_a_named_previous_password(self, oneapi: OneApi) -> None:
        run_module("oneapi_user", {"url": oneapi.url, "password": ROOT_PASSWORD})
        args = {"url": oneapi.url, "password": "another-pass-2", "password_previous": ["no-such-pass", ROOT_PASSWORD]}
        assert run_module("oneapi_user", args)["changed"]
        assert oneapi.login("another-pass-2")

    def test_no_password_fits(self, oneapi: OneApi) -> None:
        run_module("oneapi_user", {"url": oneapi.url, "password": ROOT_PASSWORD})
        result = run_module("oneapi_user", {"url": oneapi.url, "password": "another-pass-2"})
        assert result["failed"]
        assert "password_previous" in result["msg"]
        assert "another-pass-2" not in result["output"]

    def test_a_stale_access_token_does_not_stop_the_rotation(self, oneapi: OneApi) -> None:
        result = run_module("oneapi_user", {**oneapi.args(password=ROOT_PASSWORD), "access_token": "f" * 32})
        assert result["changed"]
        assert oneapi.login(ROOT_PASSWORD)

    @pytest.mark.parametrize("password", ["123456", "seven77", "x" * 21, "$I_LOVE_U"])
    def test_passwords_that_one_api_would_not_take(self, oneapi: OneApi, password: str) -> None:
        result = run_module("oneapi_user", {"url": oneapi.url, "password": password})
        assert result["failed"]
        assert result["msg"].startswith("password: ")
        assert oneapi.login("123456")

    def test_access_token_is_read_not_renewed(self, oneapi: OneApi) -> None:
        for _time in range(2):
            result = run_module("oneapi_user", {"url": oneapi.url, "password": ROOT_PASSWORD, "return_access_token": True})
            assert result["access_token"] == ACCESS_TOKEN
        assert oneapi.api("GET", "/api/user/self")["success"]

    def test_a_lost_answer_to_the_change(self, oneapi: OneApi, quick_retries: None) -> None:
        oneapi.faults({"method": "PUT", "path_regex": "^/api/user/self", "kind": "drop_after_write", "times": 1})
        result = run_module("oneapi_user", {"url": oneapi.url, "password": ROOT_PASSWORD})
        assert result["changed"]
        assert oneapi.login(ROOT_PASSWORD)

    def test_password_login_switched_off(self, oneapi: OneApi) -> None:
        oneapi.api("PUT", "/api/option/", {"key": "PasswordLoginEnabled", "value": "false"})
        result = run_module("oneapi_user", oneapi.args(password=ROOT_PASSWORD))
        assert not result["failed"]
        assert not result["changed"]
        assert result["verified"] is False
        assert result["warnings"]

    def test_other_users(self, oneapi: OneApi) -> None:
        args = oneapi.args(name="guest", password="guest-pass-1")
        assert run_module("oneapi_user", args, check=True)["changed"]
        assert not oneapi.login("guest-pass-1", "guest")
        assert run_module("oneapi_user", args)["changed"]
        assert oneapi.login("guest-pass-1", "guest")
        assert not run_module("oneapi_user", args)["changed"]
        assert run_module("oneapi_user", {**args, "password": "guest-pass-2"})["changed"]
        assert oneapi.login("guest-pass-2", "guest")
        gone = oneapi.args(name="guest", state="absent")
        assert run_module("oneapi_user", gone, check=True)["changed"]
        assert oneapi.login("guest-pass-2", "guest")
        assert run_module("oneapi_user", gone)["changed"]
        assert not oneapi.login("guest-pass-2", "guest")
        assert not run_module("oneapi_user", gone)["changed"]

    def test_no_login_where_the_password_is_not_looked_at(self, oneapi: OneApi) -> None:
        oneapi.take_requests()
        for check, changed in ((True, True), (False, True), (False, False), (True, False)):
            result = run_module("oneapi_user", oneapi.args(name="guest", password="guest-pass-1", password_policy="on_create"), check=check)
            assert result["changed"] == changed, result
        root = run_module("oneapi_user", oneapi.args(password=ROOT_PASSWORD, password_policy="on_create", return_access_token=True))
        assert (root["changed"], root["verified"], root["access_token"]) == (False, False, "VALUE_SPECIFIED_IN_NO_LOG_PARAMETER")
        assert root["requests"] <= 3
        if not oneapi.real:
            assert logins(oneapi) == 0
        assert oneapi.login("guest-pass-1", "guest")
        assert oneapi.login("123456")
        result = run_module("oneapi_user", {"url": oneapi.url, "password": ROOT_PASSWORD, "password_policy": "on_create"})
        assert result["failed"]
        assert "access_token" in result["msg"]

    @pytest.mark.parametrize("kind", ["drop_after_write", "500", "truncate"])
    def test_a_lost_answer_to_the_login_costs_one_more_at_most(self, oneapi: OneApi, quick_retries: None, kind: str) -> None:
        oneapi.take_requests()
        oneapi.faults({"path_regex": "^/api/user/login", "kind": kind, "times": 1})
        result = run_module("oneapi_token", {"url": oneapi.url, "password": "123456", "name": "x"})
        assert not result["failed"], result
        oneapi.faults({"path_regex": "^/api/user/login", "kind": kind, "times": 100})
        assert run_module("oneapi_token", {"url": oneapi.url, "password": "123456", "name": "x"})["failed"]
        assert logins(oneapi) <= 4

    def test_two_rotations_at_once_end_in_one_state(self, oneapi: OneApi) -> None:
        args = {"url": oneapi.url, "password": ROOT_PASSWORD}
        results = run_together("oneapi_user", args, args, args)
        assert not [result for result in results if result["failed"]], results
        assert oneapi.login(ROOT_PASSWORD)

    def test_two_creations_at_once_end_in_one_state(self, oneapi: OneApi) -> None:
        args = oneapi.args(name="guest", password="guest-pass-1")
        results = run_together("oneapi_user", args, args)
        assert not [result for result in results if result["failed"]], results
        assert oneapi.login("guest-pass-1", "guest")

    @pytest.mark.parametrize("kind", ["drop_before", "drop_after_write", "500", "truncate", "refuse"])
    def test_a_lost_answer_to_the_creation(self, oneapi: OneApi, quick_retries: None, kind: str) -> None:
        oneapi.faults({"method": "POST", "path_regex": "^/api/user/$", "kind": kind, "times": 1})
        args = oneapi.args(name="guest", password="guest-pass-1")
        result = run_module("oneapi_user", args)
        assert result["failed"] == (kind == "refuse"), result
        assert not run_module("oneapi_user", args)["failed"]
        assert oneapi.login("guest-pass-1", "guest")

    def test_root_is_not_deleted(self, oneapi: OneApi) -> None:
        result = run_module("oneapi_user", oneapi.args(state="absent"))
        assert result["failed"]
        assert "root" in result["msg"]


# -- oneapi_option ---------------------------------------------------------------------------------------------------------


class TestOption:
    CLOSED: t.ClassVar[dict[str, t.Any]] = {"RegisterEnabled": False, "PasswordRegisterEnabled": "False"}

    def test_close_the_registration(self, oneapi: OneApi) -> None:
        args = oneapi.args(options=self.CLOSED)
        foreseen = run_module("oneapi_option", args, check=True)
        assert foreseen["changed"]
        assert oneapi.options()["RegisterEnabled"] == "true"
        done = run_module("oneapi_option", args)
        assert done["set"] == foreseen["set"] == ["PasswordRegisterEnabled", "RegisterEnabled"]
        assert done["diff"] == foreseen["diff"]
        assert oneapi.options()["RegisterEnabled"] == oneapi.options()["PasswordRegisterEnabled"] == "false"
        assert not oneapi.api("POST", "/api/user/register", {"username": "eve", "password": "12345678"})["success"]
        for check in (True, False):
            assert not run_module("oneapi_option", args, check=check)["changed"]

    @pytest.mark.parametrize(
        ("options", "stored"),
        [
            ({"RetryTimes": 2}, {"RetryTimes": "2"}),
            ({"QuotaPerUnit": 500000.0}, {"QuotaPerUnit": "500000"}),
            ({"ChannelDisableThreshold": 7.5}, {"ChannelDisableThreshold": "7.5"}),
            ({"SystemName": "Gateway 网关"}, {"SystemName": "Gateway 网关"}),
            ({"SystemName": ""}, {"SystemName": ""}),
            ({"Theme": "berry"}, {"Theme": "berry"}),
        ],
    )
    def test_values(self, oneapi: OneApi, options: dict[str, t.Any], stored: dict[str, str]) -> None:
        result = run_module("oneapi_option", oneapi.args(options=options))
        assert not result["failed"], result
        assert stored.items() <= oneapi.options().items()
        assert not run_module("oneapi_option", oneapi.args(options=options))["changed"]

    def test_ratios_are_merged_and_survive_a_restart(self, oneapi: OneApi) -> None:
        before = json.loads(oneapi.options()["ModelRatio"])
        args = oneapi.args(options={"ModelRatio": {"m3e-large": 0, "chatglm2-6b": 1.5}})
        result = run_module("oneapi_option", args)
        assert result["changed"]
        assert json.loads(oneapi.options()["ModelRatio"]) == {**before, "m3e-large": 0, "chatglm2-6b": 1.5}
        assert not run_module("oneapi_option", args)["changed"]
        oneapi.stop()
        oneapi.start()
        assert not run_module("oneapi_option", args)["changed"]

    @pytest.mark.parametrize("value", ["{broken", [1], {"m": "a"}, {"m": -1}, {"m": True}])
    def test_ratios_that_would_be_stored_broken(self, oneapi: OneApi, value: t.Any) -> None:
        before = oneapi.options()["ModelRatio"]
        result = run_module("oneapi_option", oneapi.args(options={"ModelRatio": value}))
        assert result["failed"]
        assert "ModelRatio" in result["msg"]
        assert json.loads(oneapi.options()["ModelRatio"]) == json.loads(before)

    def test_misspelt_names_are_not_stored(self, oneapi: OneApi) -> None:
        result = run_module("oneapi_option", oneapi.args(options={"RegisterEnable": False, "RetryTimes": 3}))
        assert result["failed"]
        assert "Did you mean RegisterEnabled?" in result["msg"]
        assert "RegisterEnable" not in oneapi.options()
        assert oneapi.options()["RetryTimes"] == "0"

    def test_late_options(self, oneapi: OneApi) -> None:
        args = oneapi.args(options={"LarkClientId": "abc"})
        assert run_module("oneapi_option", args)["changed"]
        assert not run_module("oneapi_option", args)["changed"]

    def test_hidden_options(self, oneapi: OneApi) -> None:
        args = oneapi.args(options={"SMTPToken": "smtp-secret-9", "TurnstileSecretKey": "turn-secret-9"})
        for _time in range(2):
            result = run_module("oneapi_option", args)
            assert "SMTPToken" in result["set"]
            assert "secret-9" not in result["output"]
        assert result["set"] == ["SMTPToken"]
        assert not run_module("oneapi_option", {**args, "hidden_policy": "never"})["changed"]

    def test_a_switch_comes_after_the_value_that_it_needs(self, oneapi: OneApi) -> None:
        options = {"GitHubOAuthEnabled": True, "GitHubClientId": "id", "GitHubClientSecret": "hidden-one"}
        result = run_module("oneapi_option", oneapi.args(options=options))
        assert not result["failed"], result
        assert result["set"][-1] == "GitHubOAuthEnabled"

    def test_what_the_server_refuses_is_told(self, oneapi: OneApi) -> None:
        result = run_module("oneapi_option", oneapi.args(options={"Theme": "none-such"}))
        assert result["failed"]
        assert "option Theme" in result["msg"]

    @pytest.mark.parametrize("kind", ["drop_before", "drop_after_write", "500", "truncate"])
    def test_answers_lost(self, oneapi: OneApi, quick_retries: None, kind: str) -> None:
        oneapi.faults({"method": "PUT", "kind": kind, "times": 2}, {"method": "GET", "kind": kind, "times": 2})
        result = run_module("oneapi_option", oneapi.args(options={"RetryTimes": 4, "SystemName": "x"}))
        assert not result["failed"], result
        assert (oneapi.options()["RetryTimes"], oneapi.options()["SystemName"]) == ("4", "x")

    def test_two_runs_at_once_lose_no_price(self, oneapi: OneApi) -> None:
        """The server replaces the whole mapping, so each run undoes what the other merged in between."""
        results = run_together("oneapi_option", *[oneapi.args(options={"ModelRatio": {f"m{number}": number}}) for number in range(3)])
        assert not [result for result in results if result["failed"]], results
        stored = json.loads(oneapi.options()["ModelRatio"])
        again = [run_module("oneapi_option", oneapi.args(options={"ModelRatio": {f"m{number}": number}})) for number in range(3)]
        assert not [result for result in again if result["failed"]]
        assert {"m0": 0, "m1": 1, "m2": 2}.items() <= json.loads(oneapi.options()["ModelRatio"]).items()
        assert len(stored) > 3

    def test_null_is_refused(self, oneapi: OneApi) -> None:
        assert "has no value" in run_module("oneapi_option", oneapi.args(options={"SystemName": None}))["msg"]


# -- oneapi_channel --------------------------------------------------------------------------------------------------------


class TestChannel:
    @pytest.fixture
    def oneapi(self, oneapi_shared: OneApi) -> OneApi:
        return oneapi_shared

    def test_life_of_a_channel(self, oneapi: OneApi) -> None:
        args = oneapi.args(channels=[channel()])
        foreseen = run_module("oneapi_channel", args, check=True)
        assert foreseen["changed"]
        assert foreseen["created"] == ["m3e-large@gpu-1"]
        assert oneapi.channels() == []
        done = run_module("oneapi_channel", args)
        assert done["created"] == foreseen["created"]
        assert done["diff"] == foreseen["diff"]
        (row,) = oneapi.channels()
        assert row["type"] == 8
        assert row["base_url"] == "http://gpu-1:6200"
        assert row["models"] == "m3e-large"
        assert row["status"] == 1
        assert done["channels"] == {"m3e-large@gpu-1": row["id"]}
        assert oneapi.served() == {"m3e-large"}
        for check in (True, False):
            again = run_module("oneapi_channel", args, check=check)
            assert not again["changed"]
            assert again["requests"] <= 3
        assert run_module("oneapi_channel", oneapi.args(channels=[{"name": "m3e-large@gpu-1", "state": "absent"}]))["changed"]
        assert oneapi.channels() == []
        assert oneapi.served() == set()

    def test_no_secret_in_any_output(self, oneapi: OneApi) -> None:
        for policy in ("on_create", "always"):
            for check in (True, False):
                result = run_module("oneapi_channel", oneapi.args(channels=[channel()], key_policy=policy), check=check)
                assert KEY not in result["output"]
                assert ACCESS_TOKEN not in result["output"]

    @pytest.mark.parametrize(
        "change",
        [
            {"models": ["m3e-large", "m3e-base"]},
            {"base_url": "http://gpu-2:6200"},
            {"priority": 5},
            {"priority": -1},
            {"type": 1},
            {"enabled": False},
            {"group": "default,vip"},
            {"model_mapping": {"text-embedding-ada-002": "m3e-large"}},
            {"config": {"region": "r1"}},
            {"system_prompt": "Be brief."},
        ],
    )
    def test_each_field_and_back_again(self, oneapi: OneApi, change: dict[str, t.Any]) -> None:
        plain = channel(model_mapping={}, config={}, system_prompt="")
        run_module("oneapi_channel", oneapi.args(channels=[plain]))
        (first,) = oneapi.channels()
        for wanted in ({**plain, **change}, plain):
            args = oneapi.args(channels=[wanted])
            foreseen = run_module("oneapi_channel", args, check=True)
            done = run_module("oneapi_channel", args)
            assert done["updated"] == foreseen["updated"] == ["m3e-large@gpu-1"], done
            assert done["diff"] == foreseen["diff"]
            assert not run_module("oneapi_channel", args)["changed"]
            assert oneapi.served() == (set(wanted["models"]) if wanted.get("enabled", True) else set())
        (last,) = oneapi.channels()
        assert last["id"] == first["id"]
        same = ("name", "type", "base_url", "models", "group", "priority", "status")
        assert {key: last[key] for key in same} == {key: first[key] for key in same}

    def test_what_is_not_named_stays(self, oneapi: OneApi) -> None:
        run_module("oneapi_channel", oneapi.args(channels=[channel(model_mapping={"a": "b"}, system_prompt="Be brief.")]))
        args = oneapi.args(channels=[channel(priority=3)])
        assert run_module("oneapi_channel", args)["changed"]
        (row,) = oneapi.channels()
        assert json.loads(row["model_mapping"]) == {"a": "b"}
        assert row["system_prompt"] == "Be brief."

    def test_names_models_and_urls_are_tidied(self, oneapi: OneApi) -> None:
        wanted = channel(models=[" m3e-large ", "m3e-large", "m3e-base", ""], base_url="http://gpu-1:6200//", key=f" {KEY}\n")
        assert run_module("oneapi_channel", oneapi.args(channels=[wanted]))["changed"]
        (row,) = oneapi.channels()
        assert (row["models"], row["base_url"]) == ("m3e-large,m3e-base", "http://gpu-1:6200")
        assert not run_module("oneapi_channel", oneapi.args(channels=[{**wanted, "models": ["m3e-base", "m3e-large"]}]))["changed"]

    @pytest.mark.parametrize(
        ("wrong", "word"),
        [
            ({"base_url": "http://gpu-1:6200/v1"}, "/v1"),
            ({"base_url": "gpu-1:6200"}, "http://"),
            ({"base_url": None}, "base_url"),
            ({"models": []}, "models"),
            ({"models": ["a,b"]}, "comma"),
            ({"name": " "}, "name"),
            ({"key": "one\ntwo"}, "one line"),
            ({"key": None}, "key"),
            ({"type": 50}, "type"),
            ({"group": "g" * 33}, "32"),
            ({"model_mapping": {"a": "b" * 1024}}, "1024"),
        ],
    )
    def test_what_cannot_work_is_refused(self, oneapi: OneApi, wrong: dict[str, t.Any], word: str) -> None:
        for check in (True, False):
            result = run_module("oneapi_channel", oneapi.args(channels=[{**channel(), **wrong}]), check=check)
            assert result["failed"]
            assert word in result["msg"]
        assert oneapi.channels() == []

    def test_a_name_twice_is_refused(self, oneapi: OneApi) -> None:
        result = run_module("oneapi_channel", oneapi.args(channels=[channel(), channel()]))
        assert "listed twice" in result["msg"]

    def test_purge_takes_only_its_own(self, oneapi: OneApi) -> None:
        names = ["m3e-large@gpu-1", "old@gpu-1", "by-hand"]
        run_module("oneapi_channel", oneapi.args(channels=[channel(name) for name in names]))
        args = oneapi.args(channels=[channel()], purge=True)
        foreseen = run_module("oneapi_channel", args, check=True)
        done = run_module("oneapi_channel", args)
        assert [item["name"] for item in done["deleted"]] == ["old@gpu-1"]
        assert foreseen["deleted"] == done["deleted"]
        assert sorted(row["name"] for row in oneapi.channels()) == ["by-hand", "m3e-large@gpu-1"]
        assert not run_module("oneapi_channel", args)["changed"]

    def test_removals_only(self, oneapi: OneApi) -> None:
        run_module("oneapi_channel", oneapi.args(channels=[channel("m3e-large@gpu-1"), channel("old@gpu-1")]))
        before = next(row for row in oneapi.channels() if row["name"] == "m3e-large@gpu-1")
        wanted = [channel("m3e-large@gpu-1", base_url="http://elsewhere:1"), channel("new@gpu-2")]
        args = oneapi.args(channels=wanted, purge=True, removals_only=True)
        foreseen = run_module("oneapi_channel", args, check=True)
        done = run_module("oneapi_channel", args)
        assert foreseen["deleted"] == done["deleted"] and [item["name"] for item in done["deleted"]] == ["old@gpu-1"]
        assert done["created"] == done["updated"] == []
        # what stays is as it was, and what is not there yet is not made
        assert oneapi.channels() == [before]
        again = run_module("oneapi_channel", args)
        assert not again["changed"] and again["requests"] <= 3

    def test_purge_pattern(self, oneapi: OneApi) -> None:
        run_module("oneapi_channel", oneapi.args(channels=[channel(name) for name in ("site/a", "site/b", "a@b")]))
        done = run_module("oneapi_channel", oneapi.args(channels=[], purge=True, purge_pattern="site/.*"))
        assert [item["name"] for item in done["deleted"]] == ["site/a", "site/b"]
        assert "purge_pattern" in run_module("oneapi_channel", oneapi.args(channels=[], purge_pattern="("))["msg"]

    def test_duplicates_leave_the_oldest(self, oneapi: OneApi) -> None:
        for url in ("http://gpu-1:6200", "http://other:1", "http://gpu-1:6200"):
            oneapi.api("POST", "/api/channel/", {"type": 8, "name": "m3e-large@gpu-1", "key": "k", "models": "m3e-large", "base_url": url})
        oldest = oneapi.channels()[0]["id"]
        args = oneapi.args(channels=[channel()])
        done = run_module("oneapi_channel", args)
        assert len(done["deleted"]) == 2
        assert [row["id"] for row in oneapi.channels()] == [oldest]
        assert not run_module("oneapi_channel", args)["changed"]
        # Which key was right is not known, so it was written.
        assert oneapi.api("PUT", "/api/channel/", {"id": oldest})["data"]["key"] == KEY

    def test_auto_disabled_comes_back(self, oneapi: OneApi) -> None:
        run_module("oneapi_channel", oneapi.args(channels=[channel()]))
        oneapi.api("PUT", "/api/channel/", {"id": oneapi.channels()[0]["id"], "status": 3})
        assert run_module("oneapi_channel", oneapi.args(channels=[channel()]))["updated"]
        assert oneapi.served() == {"m3e-large"}

    def test_key_policy(self, oneapi: OneApi) -> None:
        run_module("oneapi_channel", oneapi.args(channels=[channel()]))
        ident = oneapi.channels()[0]["id"]

        def stored() -> str:
            return str(oneapi.api("PUT", "/api/channel/", {"id": ident})["data"]["key"])

        other = [channel(key=KEY2)]
        assert not run_module("oneapi_channel", oneapi.args(channels=other))["changed"]
        assert stored() == KEY
        assert not run_module("oneapi_channel", oneapi.args(channels=other, key_policy="always"), check=True)["changed"]
        changed = run_module("oneapi_channel", oneapi.args(channels=other, key_policy="always"))
        assert changed["updated"] == ["m3e-large@gpu-1"]
        assert changed["diff"]["after"]
        assert stored() == KEY2
        assert not run_module("oneapi_channel", oneapi.args(channels=other, key_policy="always"))["changed"]
        assert oneapi.served() == {"m3e-large"}

    def test_half_created_by_someone_else_is_mended(self, oneapi: OneApi) -> None:
        """v0.6.10 writes the row, then fails at the routes where a model is named twice."""
        answer = oneapi.api(
            "POST", "/api/channel/", {"type": 8, "name": "m3e-large@gpu-1", "key": "k", "models": "m3e-large,m3e-large", "base_url": "http://gpu-1:6200"}
        )
        assert not answer["success"]
        assert oneapi.served() == set()
        assert run_module("oneapi_channel", oneapi.args(channels=[channel()]))["updated"]
        assert len(oneapi.channels()) == 1
        assert oneapi.served() == {"m3e-large"}

    def test_routes_that_were_never_written_are_mended(self, oneapi: OneApi) -> None:
        """A server killed between its two writes leaves a row that looks right and serves nothing."""
        run_module("oneapi_channel", oneapi.args(channels=[channel()]))
        ident = oneapi.channels()[0]["id"]
        # An update to a duplicate model deletes the routes and fails to make new ones; the second puts the row right again.
        oneapi.api("PUT", "/api/channel/", {"id": ident, "models": "m3e-large,m3e-large"})
        oneapi.stop()
        import sqlite3

        with sqlite3.connect(oneapi.environment["SQLITE_PATH"]) as database:
            database.execute("update channels set models = 'm3e-large' where id = ?", (ident,))
        database.close()
        oneapi.start()
        assert oneapi.served() == set()
        assert run_module("oneapi_channel", oneapi.args(channels=[channel()]), check=True)["updated"]
        assert run_module("oneapi_channel", oneapi.args(channels=[channel()]))["updated"] == ["m3e-large@gpu-1"]
        assert oneapi.served() == {"m3e-large"}
        assert not run_module("oneapi_channel", oneapi.args(channels=[channel()]))["changed"]

    SHADOW: t.ClassVar[dict[str, t.Any]] = {"base_url": "http://gpu-2:6200"}

    def half(self, server: OneApi, method: str, **more: t.Any) -> None:
        server.faults({"method": method, "path_regex": "^/api/channel/", "kind": "half", **more})

    def routes(self, server: OneApi, name: str = "m3e-large@gpu-1") -> bool:
        """Whether this very channel is routed to, by switching the others off for a moment."""
        others = [row for row in server.channels() if row["name"] != name and row["status"] == 1]
        for row in others:
            server.api("PUT", "/api/channel/", {"id": row["id"], "status": 2})
        served = "m3e-large" in server.served()
        for row in others:
            server.api("PUT", "/api/channel/", {"id": row["id"], "status": 1})
        return served

    @pytest.mark.parametrize("drop", [False, True])
    @pytest.mark.parametrize("times", [1, 2])
    def test_half_created_in_this_run_is_mended(self, oneapi: OneApi, quick_retries: None, drop: bool, times: int) -> None:
        """The server writes the row, not the routes, and another channel serves the model, so nobody would see it later."""
        run_module("oneapi_channel", oneapi.args(channels=[channel("m3e-large@gpu-2", **self.SHADOW)]))
        wanted = [channel("m3e-large@gpu-2", **self.SHADOW), channel()]
        self.half(oneapi, "POST", times=1, drop=drop)
        if times == 2:
            rules: list[dict[str, t.Any]] = [{"method": method, "path_regex": "^/api/channel/", "kind": "half", "drop": drop} for method in ("POST", "PUT")]
            oneapi.faults(*rules)
        result = run_module("oneapi_channel", oneapi.args(channels=wanted))
        assert not result["failed"], result
        assert len(oneapi.channels()) == 2
        assert self.routes(oneapi)
        assert not run_module("oneapi_channel", oneapi.args(channels=wanted))["changed"]

    @pytest.mark.parametrize("change", [{}, {"priority": 3}])
    def test_what_could_not_be_finished_is_seen_by_the_next_run(self, oneapi: OneApi, quick_retries: None, change: dict[str, t.Any]) -> None:
        other = channel("m3e-large@gpu-2", **self.SHADOW)
        run_module("oneapi_channel", oneapi.args(channels=[other, channel()] if change else [other]))
        oneapi.faults(*[{"method": method, "path_regex": "^/api/channel/", "kind": "half", "times": 100} for method in ("POST", "PUT")])
        wanted = [other, channel(**change)]
        first = run_module("oneapi_channel", oneapi.args(channels=wanted))
        assert first["failed"]
        assert "Left switched off until a run succeeds: m3e-large@gpu-1" in first["msg"]
        oneapi.faults()
        assert not self.routes(oneapi)
        assert run_module("oneapi_channel", oneapi.args(channels=wanted))["updated"] == ["m3e-large@gpu-1"]
        assert self.routes(oneapi)
        assert not run_module("oneapi_channel", oneapi.args(channels=wanted))["changed"]

    def test_a_refusal_that_wrote_nothing_switches_nothing_off(self, oneapi: OneApi, quick_retries: None) -> None:
        run_module("oneapi_channel", oneapi.args(channels=[channel()]))
        oneapi.faults({"method": "PUT", "path_regex": "^/api/channel/", "kind": "refuse", "times": 100})
        result = run_module("oneapi_channel", oneapi.args(channels=[channel(priority=3)]))
        assert result["failed"]
        assert "database is locked" in result["msg"]
        assert oneapi.served() == {"m3e-large"}

    def test_half_created_long_ago_and_hidden_by_another(self, oneapi: OneApi) -> None:
        """No answer of the server tells routes by channel: seen by a model of its own, or mended by key_policy=always."""
        other = channel("m3e-large@gpu-2", **self.SHADOW)
        run_module("oneapi_channel", oneapi.args(channels=[other]))
        body = {"type": 8, "name": "m3e-large@gpu-1", "key": KEY, "models": "m3e-large", "base_url": "http://gpu-1:6200", "group": "default", "status": 1}
        self.half(oneapi, "POST")
        assert not oneapi.api("POST", "/api/channel/", body)["success"]
        assert not run_module("oneapi_channel", oneapi.args(channels=[other, channel()]))["changed"]
        assert not self.routes(oneapi)
        run_module("oneapi_channel", oneapi.args(channels=[other, channel()], key_policy="always"))
        assert self.routes(oneapi)

        marked = channel(models=["m3e-large", "m3e-large@gpu-1"])
        oneapi.api("DELETE", f"/api/channel/{oneapi.channels()[-1]['id']}")
        self.half(oneapi, "POST")
        oneapi.api("POST", "/api/channel/", {**body, "models": "m3e-large,m3e-large@gpu-1"})
        assert run_module("oneapi_channel", oneapi.args(channels=[other, marked]))["updated"] == ["m3e-large@gpu-1"]
        assert self.routes(oneapi)
        assert not run_module("oneapi_channel", oneapi.args(channels=[other, marked]))["changed"]

    @pytest.mark.parametrize("drop", [False, True])
    def test_a_deletion_that_leaves_its_routes_is_finished(self, oneapi: OneApi, quick_retries: None, drop: bool) -> None:
        run_module("oneapi_channel", oneapi.args(channels=[channel(), channel("old@gpu-1", models=["old"])]))
        self.half(oneapi, "DELETE", drop=drop)
        result = run_module("oneapi_channel", oneapi.args(channels=[channel()], purge=True))
        assert not result["failed"], result
        assert [item["name"] for item in result["deleted"]] == ["old@gpu-1"]
        assert oneapi.served() == {"m3e-large"}

    def test_routes_to_no_channel_are_removed(self, oneapi: OneApi) -> None:
        """Left by a deletion that stopped half-way, or by an update to an id that does not exist."""
        wanted = [channel("a@x", models=["a"]), channel("old@x", models=["old"]), channel("b@x", models=["b"])]
        run_module("oneapi_channel", oneapi.args(channels=wanted))
        ident = next(row["id"] for row in oneapi.channels() if row["name"] == "old@x")
        oneapi.api("DELETE", f"/api/channel/{ident}")
        assert oneapi.api("PUT", "/api/channel/", {"id": ident, "status": 1, "group": "default", "models": "old,a"})["success"]
        assert oneapi.served() == {"a", "b", "old"}
        left = [wanted[0], wanted[2]]
        foreseen = run_module("oneapi_channel", oneapi.args(channels=left), check=True)
        assert (foreseen["changed"], foreseen["orphans"]) == (True, ["old"])
        assert oneapi.served() == {"a", "b", "old"}
        done = run_module("oneapi_channel", oneapi.args(channels=left))
        assert (done["changed"], done["orphans"], done["diff"]) == (True, ["old"], foreseen["diff"])
        assert oneapi.served() == {"a", "b"}
        again = run_module("oneapi_channel", oneapi.args(channels=left))
        assert not again["changed"]
        assert again["requests"] <= 3

    def test_routes_that_cannot_be_removed_safely_are_told(self, oneapi: OneApi) -> None:
        """An id above the highest may be one that another run is creating at this moment."""
        run_module("oneapi_channel", oneapi.args(channels=[channel()]))
        oneapi.api("PUT", "/api/channel/", {"id": 999999, "status": 1, "group": "default", "models": "ghost"})
        result = run_module("oneapi_channel", oneapi.args(channels=[channel()]))
        oneapi.api("DELETE", "/api/channel/999999")
        assert not result["changed"]
        assert "ghost" in str(result["warnings"])

    def test_a_creation_that_lands_late(self, oneapi: OneApi, quick_retries: None) -> None:
        """The answer is lost and the write still on its way while the module looks for it: the next run clears up."""
        oneapi.faults({"method": "POST", "path_regex": "^/api/channel/", "kind": "late", "seconds": 1})
        result = run_module("oneapi_channel", oneapi.args(channels=[channel()]))
        assert not result["failed"], result
        time.sleep(1.2)
        assert not run_module("oneapi_channel", oneapi.args(channels=[channel()]))["failed"]
        (row,) = oneapi.channels()
        assert oneapi.served() == {"m3e-large"}
        assert not run_module("oneapi_channel", oneapi.args(channels=[channel()]))["changed"]

    @pytest.mark.parametrize("kind", ["half", "refuse"])
    def test_a_refusal_while_keys_are_compared(self, oneapi: OneApi, quick_retries: None, kind: str) -> None:
        run_module("oneapi_channel", oneapi.args(channels=[channel(), channel("m3e-large@gpu-2", **self.SHADOW)]))
        oneapi.faults({"method": "PUT", "path_regex": "^/api/channel/", "kind": kind})
        wanted = [channel(key=KEY2), channel("m3e-large@gpu-2", **self.SHADOW)]
        result = run_module("oneapi_channel", oneapi.args(channels=wanted, key_policy="always"))
        assert not result["failed"], result
        ident = oneapi.channels()[0]["id"]
        assert self.routes(oneapi)
        assert oneapi.api("PUT", "/api/channel/", {"id": ident})["data"]["key"] == KEY2

    @pytest.mark.parametrize("kind", ["drop_before", "drop_after_write", "500", "truncate", "429"])
    @pytest.mark.parametrize("times", [1, 2])
    def test_no_duplicate_whatever_becomes_of_the_answer(self, oneapi: OneApi, quick_retries: None, kind: str, times: int) -> None:
        oneapi.faults({"method": "POST", "path_regex": "^/api/channel/", "kind": kind, "times": times})
        wanted = [channel("a@x", models=["a"]), channel("b@x", models=["b"]), channel("c@x", models=["c"])]
        result = run_module("oneapi_channel", oneapi.args(channels=wanted))
        assert not result["failed"], result
        assert sorted(row["name"] for row in oneapi.channels()) == ["a@x", "b@x", "c@x"]
        assert oneapi.served() == {"a", "b", "c"}
        assert not run_module("oneapi_channel", oneapi.args(channels=wanted))["changed"]

    @pytest.mark.parametrize("kind", ["drop_before", "drop_after_write", "500", "truncate", "429"])
    @pytest.mark.parametrize("method", ["GET", "PUT", "DELETE"])
    def test_other_answers_lost(self, oneapi: OneApi, quick_retries: None, kind: str, method: str) -> None:
        run_module("oneapi_channel", oneapi.args(channels=[channel("a@x", models=["a"]), channel("b@x", models=["b"])]))
        oneapi.faults({"method": method, "kind": kind, "times": 2})
        args = oneapi.args(channels=[channel("a@x", models=["a2"])], purge=True)
        result = run_module("oneapi_channel", args)
        assert not result["failed"], result
        assert [row["models"] for row in oneapi.channels()] == ["a2"]
        assert oneapi.served() == {"a2"}
        assert not run_module("oneapi_channel", args)["changed"]

    def test_a_slow_creation(self, oneapi: OneApi, quick_retries: None) -> None:
        oneapi.faults({"method": "POST", "path_regex": "^/api/channel/", "kind": "slow", "seconds": 3, "times": 1})
        result = run_module("oneapi_channel", oneapi.args(channels=[channel()], timeout=1))
        assert not result["failed"], result
        assert len(oneapi.channels()) == 1

    def test_a_failure_that_stays_is_told_and_the_rest_is_done(self, oneapi: OneApi, quick_retries: None) -> None:
        oneapi.faults({"method": "POST", "path_regex": "^/api/channel/", "kind": "500", "times": 100})
        run = run_module("oneapi_channel", oneapi.args(channels=[channel()]))
        assert run["failed"]
        assert "channel m3e-large@gpu-1" in run["msg"]
        assert "500" in run["msg"]

    def test_two_runs_at_once_end_in_one_state(self, oneapi: OneApi) -> None:
        args = oneapi.args(channels=[channel(f"m{number}@x", models=[f"m{number}"]) for number in range(15)], purge=True)
        results = run_together("oneapi_channel", args, args, args)
        assert not [result for result in results if result["failed"]], results
        assert sorted(row["name"] for row in oneapi.channels()) == sorted(f"m{number}@x" for number in range(15))
        assert not run_module("oneapi_channel", args)["changed"]
        assert oneapi.served() == {f"m{number}" for number in range(15)}

    def test_a_thousand_channels(self, oneapi: OneApi) -> None:
        wanted = [channel(f"m{number}@x", models=[f"m{number}"], key=f"sk-{number:048d}") for number in range(1000)]
        assert len(run_module("oneapi_channel", oneapi.args(channels=wanted), diff=False)["created"]) == 1000
        again = run_module("oneapi_channel", oneapi.args(channels=wanted), diff=False)
        assert not again["changed"]
        assert again["requests"] <= 3
        for item in wanted[:10]:
            item["priority"] = 1
        ten = run_module("oneapi_channel", oneapi.args(channels=wanted), diff=False)
        assert len(ten["updated"]) == 10
        assert ten["requests"] <= 15


# -- oneapi_token ----------------------------------------------------------------------------------------------------------


class TestToken:
    @pytest.fixture
    def oneapi(self, oneapi_shared: OneApi) -> OneApi:
        return oneapi_shared

    def test_life_of_a_token(self, oneapi: OneApi) -> None:
        args = oneapi.args(name="fastgpt", models=["m3e-large", "chatglm2-6b"])
        foreseen = run_module("oneapi_token", args, check=True)
        assert foreseen["changed"]
        assert "key" not in foreseen
        assert oneapi.tokens() == []
        done = run_module("oneapi_token", args)
        assert done["changed"]
        assert done["diff"] == foreseen["diff"]
        (row,) = oneapi.tokens()
        assert done["key"] == "sk-" + row["key"]
        assert len(row["key"]) == 48
        assert row["models"] == "chatglm2-6b,m3e-large"
        assert (row["expired_time"], row["unlimited_quota"], row["status"]) == (-1, True, 1)
        for check in (True, False):
            again = run_module("oneapi_token", args, check=check)
            assert not again["changed"]
            assert again["key"] == done["key"]
        assert row["key"] not in json.dumps(done["diff"])
        gone = oneapi.args(name="fastgpt", state="absent")
        assert run_module("oneapi_token", gone, check=True)["changed"]
        assert len(oneapi.tokens()) == 1
        assert run_module("oneapi_token", gone)["changed"]
        assert oneapi.tokens() == []
        assert not run_module("oneapi_token", gone)["changed"]

    def test_by_password(self, oneapi: OneApi) -> None:
        args = {"url": oneapi.url, "password": "123456", "name": "fastgpt"}
        assert run_module("oneapi_token", args)["changed"]
        assert not run_module("oneapi_token", args)["changed"]

    def test_the_token_works_on_the_relay(self, oneapi: OneApi) -> None:
        run_module("oneapi_channel", oneapi.args(channels=[channel()]))
        key = run_module("oneapi_token", oneapi.args(name="fastgpt", models=["m3e-large"]))["key"]
        assert [item["id"] for item in oneapi.api("GET", "/v1/models", token=f"Bearer {key}")["data"]] == ["m3e-large"]

    @pytest.mark.parametrize(
        "change",
        [
            {"models": ["a"]},
            {"models": []},
            {"subnets": ["10.0.0.0/8", "fd00::/8"]},
            {"expired_time": 4102444800},
            {"unlimited_quota": False, "remain_quota": 1000},
            {"enabled": False},
        ],
    )
    def test_each_field_and_back_again(self, oneapi: OneApi, change: dict[str, t.Any]) -> None:
        plain = {"name": "fastgpt", "models": ["m1", "m2"], "subnets": []}
        key = run_module("oneapi_token", oneapi.args(**plain))["key"]
        for wanted in ({**plain, **change}, plain):
            args = oneapi.args(**wanted)
            foreseen = run_module("oneapi_token", args, check=True)
            assert foreseen["changed"], foreseen
            done = run_module("oneapi_token", args)
            assert done["changed"]
            assert done["diff"] == foreseen["diff"]
            assert done["key"] == key
            again = run_module("oneapi_token", args)
            assert not again["changed"]
            assert again["token"]["models"] == sorted(wanted["models"])
            assert again["token"]["status"] == (2 if wanted.get("enabled") is False else 1)
            assert again["token"]["expired_time"] == wanted.get("expired_time", -1)
            assert again["token"]["subnets"] == wanted["subnets"]
        assert len(oneapi.tokens()) == 1

    def test_a_change_keeps_all_the_rest(self, oneapi: OneApi) -> None:
        """A PUT replaces every field, so what was left out would be blanked, and an expiry of 0 is 1970."""
        run_module("oneapi_token", oneapi.args(name="t", models=["a"], subnets=["10.0.0.0/8"], unlimited_quota=False, remain_quota=70))
        run_module("oneapi_token", oneapi.args(name="t", models=["b"], unlimited_quota=False))
        (row,) = oneapi.tokens()
        assert (row["models"], row["subnet"], row["remain_quota"], row["expired_time"]) == ("b", "10.0.0.0/8", 70, -1)

    def test_used_quota_is_no_difference(self, oneapi: OneApi) -> None:
        args = oneapi.args(name="t", unlimited_quota=False, remain_quota=100)
        run_module("oneapi_token", args)
        (row,) = oneapi.tokens()
        oneapi.api("PUT", "/api/token/", {**row, "remain_quota": 40})
        assert not run_module("oneapi_token", args)["changed"]
        assert run_module("oneapi_token", {**args, "quota_policy": "always"})["changed"]
        assert oneapi.tokens()[0]["remain_quota"] == 100

    def test_used_up_and_expired(self, oneapi: OneApi) -> None:
        args = oneapi.args(name="t", unlimited_quota=False, remain_quota=0)
        run_module("oneapi_token", args)
        (row,) = oneapi.tokens()
        oneapi.api("PUT", "/api/token/?status_only=true", {"id": row["id"], "status": 4})
        still = run_module("oneapi_token", args)
        assert not still["changed"]
        assert still["warnings"]
        filled = run_module("oneapi_token", {**args, "remain_quota": 9, "quota_policy": "always"})
        assert filled["changed"]
        assert filled["token"]["status"] == 1
        oneapi.api("PUT", "/api/token/", {**row, "expired_time": 1000000000})
        oneapi.api("PUT", "/api/token/?status_only=true", {"id": row["id"], "status": 3})
        assert run_module("oneapi_token", args)["token"]["expired_time"] == -1
        assert oneapi.tokens()[0]["status"] == 1

    def test_created_disabled(self, oneapi: OneApi) -> None:
        args = oneapi.args(name="t", enabled=False)
        assert run_module("oneapi_token", args)["token"]["status"] == 2
        assert not run_module("oneapi_token", args)["changed"]

    def test_duplicates_leave_the_oldest(self, oneapi: OneApi) -> None:
        for name in ("fastgpt", "fastgpt", "fastgpt-2", "FastGPT", "fastgpt"):
            oneapi.api("POST", "/api/token/", {"name": name, "unlimited_quota": True})
        oldest = oneapi.tokens()[0]
        foreseen = run_module("oneapi_token", oneapi.args(name="fastgpt"), check=True)
        assert foreseen["changed"]
        done = run_module("oneapi_token", oneapi.args(name="fastgpt"))
        assert done["changed"]
        assert done["key"] == foreseen["key"] == "sk-" + oldest["key"]
        assert [row["name"] for row in oneapi.tokens()] == ["fastgpt", "fastgpt-2", "FastGPT"]
        assert not run_module("oneapi_token", oneapi.args(name="fastgpt"))["changed"]

    def test_names_with_wildcards_and_more_than_a_page(self, oneapi: OneApi) -> None:
        for number in range(25):
            oneapi.api("POST", "/api/token/", {"name": f"other{number}", "unlimited_quota": True})
        for name in ("a%", "a_", "网关令牌"):
            assert run_module("oneapi_token", oneapi.args(name=name))["changed"]
            assert not run_module("oneapi_token", oneapi.args(name=name))["changed"]
        assert len(oneapi.tokens()) == 28

    @pytest.mark.parametrize(
        ("wrong", "word"),
        [
            ({"name": "十一个字的名字太长了吧呀"}, "30 bytes"),
            ({"name": " "}, "name"),
            ({"expired_time": 0}, "expired_time"),
            ({"subnets": ["10.0.0.1"]}, "prefix"),
            ({"subnets": ["10.0.0.0/33"]}, "CIDR"),
            ({"models": ["a,b"]}, "comma"),
            ({"remain_quota": -5}, "remain_quota"),
        ],
    )
    def test_what_cannot_work_is_refused(self, oneapi: OneApi, wrong: dict[str, t.Any], word: str) -> None:
        result = run_module("oneapi_token", {**oneapi.args(name="x"), **wrong})
        assert result["failed"]
        assert word in result["msg"]
        assert oneapi.tokens() == []

    @pytest.mark.parametrize("kind", ["drop_before", "drop_after_write", "500", "truncate", "429"])
    @pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE"])
    def test_no_duplicate_whatever_becomes_of_an_answer(self, oneapi: OneApi, quick_retries: None, method: str, kind: str) -> None:
        for name in ("fastgpt", "fastgpt", "old", "old"):
            oneapi.api("POST", "/api/token/", {"name": name, "unlimited_quota": True})
        oneapi.faults({"method": method, "path_regex": "^/api/token/", "kind": kind, "times": 2})
        result = run_module("oneapi_token", oneapi.args(name="fastgpt", models=["a"]))
        assert not result["failed"], result
        result = run_module("oneapi_token", oneapi.args(name="new", models=["a"]))
        assert not result["failed"], result
        result = run_module("oneapi_token", oneapi.args(name="old", state="absent"))
        assert not result["failed"], result
        assert [row["name"] for row in oneapi.tokens()] == ["fastgpt", "new"]
        assert [row["models"] for row in oneapi.tokens()] == ["a", "a"]

    def test_a_refusal_that_passes(self, oneapi: OneApi, quick_retries: None) -> None:
        """On PostgreSQL the first creation after INITIAL_ROOT_TOKEN is refused, the second is not."""
        oneapi.faults({"method": "POST", "path_regex": "^/api/token/", "kind": "refuse", "times": 1})
        assert run_module("oneapi_token", oneapi.args(name="fastgpt"))["key"] == "sk-" + oneapi.tokens()[0]["key"]
        oneapi.faults({"method": "POST", "path_regex": "^/api/token/", "kind": "refuse", "times": 100})
        result = run_module("oneapi_token", oneapi.args(name="other"))
        assert result["failed"]
        assert "token other" in result["msg"]
        assert "database is locked" in result["msg"]

    def test_a_creation_that_lands_late(self, oneapi: OneApi, quick_retries: None) -> None:
        """The key that was told stays the one in use: the late row has the higher id."""
        oneapi.faults({"method": "POST", "path_regex": "^/api/token/", "kind": "late", "seconds": 1})
        first = run_module("oneapi_token", oneapi.args(name="fastgpt"))
        time.sleep(1.2)
        assert run_module("oneapi_token", oneapi.args(name="fastgpt"))["key"] == first["key"]
        (row,) = oneapi.tokens()
        assert first["key"] == "sk-" + row["key"]

    def test_the_example_keeps_the_key_in_a_vault_file(self, oneapi: OneApi, tmp_path: pathlib.Path) -> None:
        """The documented tasks as they stand, run twice by ansible-playbook; the second run changes nothing."""
        tasks = yaml.safe_load(oneapi_token.EXAMPLES)
        tasks = [task for task in tasks if task.get("register") == "fastgpt_token" or "vault file" in task["name"]]
        assert len(tasks) == 2
        tasks[0]["selfhosted.fastgpt.oneapi_token"]["url"] = oneapi.url
        target = tmp_path / "group_vars" / "all" / "vault_fastgpt_key.yml"
        target.parent.mkdir(parents=True)
        (tmp_path / "hosts").write_text("localhost ansible_connection=local\n")
        (tmp_path / "password").write_text("vault-pass-1")
        (tmp_path / "play.yml").write_text(yaml.safe_dump([{"hosts": "localhost", "gather_facts": False, "tasks": tasks}]))
        command = [os.path.join(os.path.dirname(sys.executable), "ansible-playbook"), "-i", str(tmp_path / "hosts"), str(tmp_path / "play.yml")]
        command += ["--vault-password-file", str(tmp_path / "password"), "-e", f"ansible_python_interpreter={sys.executable}"]
        command += ["-e", f"oneapi_root_access_token={ACCESS_TOKEN} vault_password=vault-pass-1", "-vv", "-D"]
        for changed in (2, 0):
            done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=120, check=False)
            assert done.returncode == 0, done.stdout + done.stderr
            assert f"changed={changed} " in done.stdout
            assert oneapi.tokens()[0]["key"] not in done.stdout
        assert target.read_text().startswith("$ANSIBLE_VAULT;")
        assert target.stat().st_mode & 0o777 == 0o600

    def test_two_runs_at_once_tell_the_same_key(self, oneapi: OneApi) -> None:
        args = oneapi.args(name="fastgpt", models=["a"])
        results = run_together("oneapi_token", args, args, args)
        assert not [result for result in results if result["failed"]], results
        (row,) = oneapi.tokens()
        assert {result["key"] for result in results} == {"sk-" + row["key"]}


def test_the_way_of_the_site_playbook(oneapi: OneApi) -> None:
    """A fresh server: password, options, channels, token; then all of it again, and none of it changes anything."""
    steps = [
        ("oneapi_user", {"password": ROOT_PASSWORD, "password_previous": ["123456"]}),
        ("oneapi_option", {"options": {"RegisterEnabled": False, "PasswordRegisterEnabled": False}}),
        ("oneapi_channel", {"channels": [channel(), channel("chat@gpu-1", models=["chat"], base_url="http://gpu-1:8000")], "purge": True}),
        ("oneapi_token", {"name": "fastgpt", "models": ["m3e-large", "chat"], "unlimited_quota": True}),
    ]
    assert all(run_module(name, oneapi.args(**more), check=True)["changed"] for name, more in steps)
    before = (without_times(oneapi.channels()), oneapi.tokens(), oneapi.options())
    assert before[0] == before[1] == []
    assert all(run_module(name, oneapi.args(**more))["changed"] for name, more in steps)
    for check in (True, False):
        results = [run_module(name, oneapi.args(**more), check=check) for name, more in steps]
        assert not [result for result in results if result["changed"] or result["failed"]]
        assert all(result["requests"] <= 3 for result in results)
