# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import pytest
from ansible.errors import AnsibleFilterError
from ansible_collections.selfhosted.fastgpt.plugins.filter.secret_faults import secret_faults
from hypothesis import given
from hypothesis import strategies as st

RULES = {
    "oneapi_root_password": {"min": 8, "max": 20},
    "oneapi_root_access_token": {"pattern": "[0-9a-f]{32}", "hint": "must be 32 hexadecimal digits"},
    "mongodb_keyfile": {"min": 6, "max": 1024, "pattern": "[A-Za-z0-9+/=\\s]+", "whitespace": True},
    "model_server_master_key": {"min": 32},
}
GOOD = {
    "oneapi_root_password": "dk3-Kq0s_Lw9zT",
    "oneapi_root_access_token": "0123456789abcdef0123456789abcdef",
    "mongodb_keyfile": "QUJDREVGR0hJSktM\nTU5PUFFSU1RVVldY\n",
    "model_server_master_key": "4tHk2Pq9xVb7Lm3Zs8Wd1Rf6Yc5Jn0Gu",
}


def test_good_secrets():
    assert secret_faults(GOOD, RULES) == []


@pytest.mark.parametrize(
    "value",
    [
        "123456",
        "1234",
        "password",
        "mypassword",
        "myusername",
        "myname",
        "any",
        "Any",
        "root_key",
        "filetoken",
        "fastgpt",
        "ACCESS_TOKEN",
        "access_token",
        "sk-abc",
        "sk-abcdefghijklmn",
        "sk-xxxx",
        "sk-xxxxxxxxxxxx",
        "sk-aaabbbcccdddeeefffggghhhiiijjjkkk",
        "sk-fastgpt",
        "sk-your-key",
        "oneapimmysql",
        "oneapikey",
        "random_string",
        "$I_LOVE_U",
        "minioadmin",
        "changeme",
    ],
)
def test_known_defaults(value):
    (found,) = secret_faults({"fastgpt_token_key": value})
    assert found.startswith("fastgpt_token_key: (hidden): is a publicly known default. ") and "secrets.yml" in found


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("oneapi_root_password", "short12", "shorter than 8"),
        ("oneapi_root_password", "abcdefghij0123456789x", "longer than 20"),
        ("oneapi_root_password", "has space 12", "white space in it"),
        ("oneapi_root_password", "trailing12\n", "ends with white space"),
        ("oneapi_root_password", "contr\x07ol12", "control characters"),
        ("oneapi_root_password", "aaaaaaaaaa", "repeats"),
        ("oneapi_root_password", None, "is required"),
        ("oneapi_root_password", "", "is required"),
        ("oneapi_root_password", 12345678, "not text"),
        ("oneapi_root_password", True, "not text"),
        ("oneapi_root_password", ["x"], "not text"),
        ("oneapi_root_access_token", "0123456789ABCDEF0123456789ABCDEF", "must be 32 hexadecimal digits"),
        ("mongodb_keyfile", "!!!!not-base64!!!!", "does not match"),
        ("mongodb_keyfile", "QUJD\x00REVG", "control"),
        ("model_server_master_key", "tooshort1", "shorter than 32"),
    ],
)
def test_faults(name, value, words):
    found = secret_faults({**GOOD, name: value}, RULES)
    assert any(line.startswith(f"{name}: ") and words in line for line in found), found
    assert len(found) <= 2


def test_missing_and_optional():
    (found,) = secret_faults({}, {"a": {}, "b": {"required": False}, "c_previous": {}})
    assert found.startswith("a: (unset): is required.")


def test_reuse_names_both():
    found = secret_faults({"a": "k8Hq2xVb7L", "b": "k8Hq2xVb7L", "c": "Zs8Wd1Rf6Y"})
    assert len(found) == 1 and found[0].startswith("a and b: (hidden): hold the same value.")


def test_previous_values_may_be_defaults_but_not_another_secret():
    assert secret_faults({"a": "k8Hq2xVb7L", "a_previous": "123456"}) == []
    assert secret_faults({"a": "k8Hq2xVb7L", "a_previous": "k8Hq2xVb7L"}) == []
    assert secret_faults({"a": "k8Hq2xVb7L", "a_previous": ["123456", "old-one-77"]}) == []
    assert len(secret_faults({"a": "k8Hq2xVb7L", "b_previous": "k8Hq2xVb7L"})) == 1


def test_wrong_calls():
    for call in (
        lambda: secret_faults("x"),
        lambda: secret_faults({}, "x"),
        lambda: secret_faults({}, {"a": 1}),
        lambda: secret_faults({"a": "k8Hq2xVb7L"}, {"a": {"min": "8"}}),
    ):
        with pytest.raises(AnsibleFilterError):
            call()
    with pytest.raises(AnsibleFilterError, match="pattern"):
        secret_faults({"a": "k8Hq2xVb7L"}, {"a": {"pattern": "["}})


# Drawn from characters that no message has, so that a hit is a leak.
_foreign = st.text(alphabet="ЖЩЮДЯЭ鑫龘靐\x00\x1b", min_size=1, max_size=30)


@given(st.dictionaries(st.sampled_from(["a", "b", "oneapi_root_password", "mongodb_keyfile", "c_previous"]), _foreign))
def test_a_value_is_never_shown(secrets):
    for line in secret_faults(secrets, RULES):
        assert not set(line) & set("ЖЩЮДЯЭ鑫龘靐\x00\x1b")
        assert "\n" not in line


@given(st.dictionaries(st.text(alphabet="abc_", min_size=1), st.one_of(st.none(), st.integers(), st.floats(), st.text(), st.lists(st.text()), st.binary())))
def test_any_value_is_borne(secrets):
    assert all(isinstance(line, str) for line in secret_faults(secrets, RULES))
