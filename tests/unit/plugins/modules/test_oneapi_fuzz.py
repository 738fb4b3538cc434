# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The oneapi_* modules against a server that answers anything at all: a result or an error that says something, no traceback."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import typing as t
from unittest import mock

import pytest
from ansible.module_utils import basic
from ansible_collections.selfhosted.fastgpt.plugins.module_utils import _http, _oneapi

pytest.importorskip("hypothesis")
from hypothesis import given
from hypothesis import strategies as st

MODULES = "ansible_collections.selfhosted.fastgpt.plugins.modules"
SECRETS = ("access-token-of-root", "password-of-1", "key-of-upstream")
CHANNEL = {"name": "a@x", "models": ["m1"], "base_url": "http://x", "key": SECRETS[2]}
CASES: list[tuple[str, dict[str, t.Any]]] = [
    ("oneapi_channel", {"channels": [CHANNEL, {"name": "b@x", "state": "absent"}], "purge": True}),
    ("oneapi_channel", {"channels": [CHANNEL], "key_policy": "always"}),
    ("oneapi_token", {"name": "t", "models": ["m1"]}),
    ("oneapi_token", {"name": "t", "unlimited_quota": False, "remain_quota": 5, "quota_policy": "always"}),
    ("oneapi_token", {"name": "t", "state": "absent"}),
    ("oneapi_option", {"options": {"RetryTimes": 1, "RegisterEnabled": False, "ModelRatio": {"m": 1}, "SMTPToken": "x"}, "allow_unknown": True}),
    ("oneapi_user", {"name": "root", "password": SECRETS[1], "return_access_token": True}),
    ("oneapi_user", {"name": "guest", "password": SECRETS[1], "password_policy": "on_create"}),
    ("oneapi_user", {"name": "guest", "state": "absent"}),
]

scalars = st.one_of(st.none(), st.booleans(), st.integers(-3, 5), st.sampled_from([10**12, 2**70, -1.5, float("nan"), float("inf")]), st.text(max_size=5))
values = st.recursive(scalars, lambda inner: st.one_of(st.lists(inner, max_size=2), st.dictionaries(st.text(max_size=4), inner, max_size=2)), max_leaves=4)


def nearly(right: t.Any) -> st.SearchStrategy[t.Any]:
    """What belongs there, mostly."""
    return st.one_of(st.just(right), st.just(right), st.just(right), values)


rows = st.fixed_dictionaries(
    {"id": st.one_of(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), values)},
    optional={
        "name": st.one_of(st.sampled_from(["a@x", "b@x", "t"]), values),
        "username": st.one_of(st.sampled_from(["root", "guest"]), values),
        **{name: nearly("x") for name in ("key", "access_token", "base_url", "subnet", "group", "value")},
        **{name: nearly(1) for name in ("type", "status", "priority", "role", "created_time", "expired_time", "remain_quota")},
        "models": nearly("m1,m2"),
        "model_mapping": st.one_of(st.sampled_from(["", "{}", '{"a":"b"}', "{", "["]), values),
        "unlimited_quota": nearly(True),
    },
)
data = st.one_of(st.lists(rows, max_size=3), st.lists(rows, max_size=3), rows, values)
envelopes = st.fixed_dictionaries({"success": nearly(True)}, optional={"message": values, "data": data})
headers = st.fixed_dictionaries(
    {},
    optional={
        "set-cookie": st.sampled_from(["session=abc; Path=/", "session=", "x=1\nsession=a|b", "\x00"]),
        "retry-after": st.sampled_from(["1", "-5", "nan", "inf", "soon", "Wed, 21 Oct 2015 07:28:00 GMT", "Wed, 99 Foo 99999 99:99:99 GMT"]),
        "location": st.sampled_from(["/login", "https://sso.example.com/?next=x", "::", "https://[::1"]),
        "content-type": st.sampled_from(["text/html", "application/json"]),
    },
)
BODIES = {"page": b"<html>Sign in</html>", "deep": b"[" * 100000, "long": b"9" * 5000, "odd": b'{"error":["x"]}'}
whole = st.builds(lambda value, head: _http.Response(200, head, json.dumps(value).encode()), envelopes, headers)
answers = st.one_of(
    whole,
    whole,
    whole,
    st.builds(
        _http.Response,
        st.sampled_from([200, 201, 204, 301, 302, 400, 401, 403, 404, 418, 429, 500, 502, 503]),
        headers,
        st.one_of(st.binary(max_size=20), st.sampled_from(list(BODIES)).map(BODIES.__getitem__), envelopes.map(lambda value: json.dumps(value).encode())),
    ),
    st.sampled_from([_http.TransportError("cut"), _http.TransportError("refused", sent=False), _http.TransportError("no trust", sent=False, lasting=True)]),
)


class Wire:
    """Takes the place of _http.request: the same answers over and over, behind a sane greeting or not."""

    def __init__(self, replies: list[t.Any], greeting: bool) -> None:
        self.replies, self.greeting, self.asked = replies, greeting, 0

    def __call__(self, method: str, url: str, **unused: t.Any) -> _http.Response:
        self.asked += 1
        if self.greeting and url.endswith("/api/status"):
            return _http.Response(200, {}, b'{"success":true,"data":{"version":"v0.6.10"}}')
        if self.greeting and url.endswith("/api/setup"):
            return _http.Response(404, {}, b"{}")
        reply = self.replies[self.asked % len(self.replies)]
        if isinstance(reply, Exception):
            raise reply
        return t.cast(_http.Response, reply)


def run(name: str, arguments: dict[str, t.Any], check: bool, wire: Wire) -> tuple[dict[str, t.Any], str]:
    internal = {"_ansible_check_mode": check, "_ansible_diff": True, "_ansible_remote_tmp": "/tmp", "_ansible_keep_remote_files": False}
    payload = json.dumps({"ANSIBLE_MODULE_ARGS": {"url": "http://gateway", "rate_limit_wait": 2, **arguments, **internal}}).encode()
    module = importlib.import_module(f"{MODULES}.{name}")
    output = io.StringIO()
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(basic, "_ANSIBLE_ARGS", payload))
        stack.enter_context(mock.patch.object(basic, "_ANSIBLE_PROFILE", "legacy", create=True))
        stack.enter_context(mock.patch.object(_oneapi._http, "request", wire))
        stack.enter_context(mock.patch.dict(_oneapi.Client.__init__.__kwdefaults__, {"sleep": lambda seconds: None}))
        stack.enter_context(contextlib.redirect_stdout(output))
        stack.enter_context(pytest.raises(SystemExit))
        module.main()
    text = output.getvalue()
    return json.loads(text.strip().splitlines()[-1]), text


@pytest.mark.parametrize(("name", "arguments"), CASES, ids=[f"{number}-{case[0]}" for number, case in enumerate(CASES)])
@given(
    replies=st.lists(answers, min_size=1, max_size=5),
    greeting=st.sampled_from([True, True, True, False]),
    check=st.booleans(),
    by_password=st.booleans(),
)
def test_whatever_the_server_says(name: str, arguments: dict[str, t.Any], replies: list[t.Any], greeting: bool, check: bool, by_password: bool) -> None:
    if by_password and name != "oneapi_user":
        arguments = {**arguments, "password": SECRETS[1]}
    else:
        arguments = {**arguments, "access_token": SECRETS[0]}
    wire = Wire(replies, greeting)
    result, output = run(name, arguments, check, wire)
    assert result.get("msg") or not result.get("failed")
    assert "Traceback" not in output
    assert not [secret for secret in SECRETS if secret in json.dumps({key: value for key, value in result.items() if key != "invocation"})]
    assert wire.asked < 1500
