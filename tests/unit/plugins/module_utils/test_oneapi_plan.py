# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

import typing as t

import pytest
from ansible_collections.selfhosted.fastgpt.plugins.module_utils import _oneapi_plan as plan

WANTED: dict[str, t.Any] = {"name": "a@x", "base_url": "http://a:1", "key": "k", "models": ["m"]}


def one(**fields: t.Any) -> dict[str, t.Any]:
    return plan.normalise_channels([{**WANTED, **fields}], (0, 6, 10))[0]


def test_defaults_of_a_channel() -> None:
    assert plan.channel_body(one()) == {
        "name": "a@x",
        "type": 8,
        "key": "k",
        "models": "m",
        "group": "default",
        "priority": 0,
        "status": 1,
        "base_url": "http://a:1",
    }


@pytest.mark.parametrize(
    ("given", "kept"),
    [(["a", " a", "b", ""], ["a", "b"]), ([" x y "], ["x y"]), ([], []), ([1, "1"], ["1"])],
)
def test_lists_are_cleaned(given: list[t.Any], kept: list[str]) -> None:
    assert plan.clean_list(given, "models") == kept


@pytest.mark.parametrize(
    ("stored", "wanted", "same"),
    [
        ("a,b", ["b", "a"], True),
        ("a, b", ["a", "b"], False),
        ("a,a", ["a"], False),
        ("", [], True),
        (None, [], True),
        ("", ["a"], False),
        ("a", [], False),
    ],
)
def test_same_members(stored: str | None, wanted: list[str], same: bool) -> None:
    assert plan.same_members(stored, wanted) is same


def test_a_type_that_an_old_server_does_not_know() -> None:
    channel = [{**WANTED, "type": 50}]
    assert plan.normalise_channels(channel, (0, 6, 11))[0]["type"] == 50
    assert plan.normalise_channels(channel, None)[0]["type"] == 50
    with pytest.raises(plan.Fault, match="type"):
        plan.normalise_channels(channel, (0, 6, 10))


def test_type_50_has_its_v1() -> None:
    assert plan.normalise_channels([{**WANTED, "type": 50, "base_url": "http://a:1/v1"}], (0, 6, 11))[0]["base_url"] == "http://a:1/v1"


def test_nothing_of_a_channel_can_be_blanked_by_an_empty_text() -> None:
    row = {"id": 1, **plan.channel_body(one(config={"region": "r"})), "config": '{"region":"r"}'}
    assert plan.channel_changes(row, one(config={})) == {"config": "{}"}
    assert plan.channel_changes({**row, "config": "{}"}, one(config={})) == {}
    assert plan.channel_changes({**row, "model_mapping": '{"a":"b"}'}, one(model_mapping={}))["model_mapping"] == ""


def test_null_fields_of_the_server_are_empty() -> None:
    row = {"id": 1, **plan.channel_body(one()), "model_mapping": None, "priority": None, "system_prompt": None, "config": ""}
    assert plan.channel_changes(row, one(model_mapping={}, config={}, system_prompt="")) == {}


def test_a_model_that_moves_is_never_without_a_channel() -> None:
    """The steps are carried out in this order: updates, creations, deletions."""
    made = plan.plan_channels([{"id": 4, **plan.channel_body(one(name="old@x"))}], [one()], purge=True)
    assert [channel["name"] for channel in made.creates] == ["a@x"]
    assert [row["id"] for row in made.deletes] == [4]


def test_routeless_channels_get_an_update_that_changes_nothing() -> None:
    row = {"id": 4, **plan.channel_body(one())}
    made = plan.plan_channels([row], [one()], routeless={"a@x"})
    assert made.updates == [(row, {})]
    assert made.diff()["before"] != made.diff()["after"]


def test_purge_needs_the_whole_name() -> None:
    rows = [{"id": 1, "name": "@"}, {"id": 2, "name": "x@"}, {"id": 3, "name": "x@y"}, {"id": 4, "name": ""}]
    assert [row["id"] for row in plan.plan_channels(rows, [], purge=True).deletes] == [3]
    assert not plan.plan_channels(rows, [])


@pytest.mark.parametrize(("name", "fits"), [("x" * 30, True), ("x" * 31, False), ("字" * 10, True), ("字" * 11, False)])
def test_token_names_are_measured_in_bytes(name: str, fits: bool) -> None:
    if fits:
        assert plan.normalise_token({"name": name})["name"] == name
    else:
        with pytest.raises(plan.Fault, match="30 bytes"):
            plan.normalise_token({"name": name})


@pytest.mark.parametrize(
    ("wanted", "stored", "same"),
    [
        (False, "false", True),
        (False, "False", True),  # the server takes anything but "true" for false
        (True, "True", False),
        (True, "true", True),
        ("500", "500.0", True),
        ("500", "501", False),
        ("abc", "abc", True),
        ("", "", True),
        ("x", None, False),
        ({"a": 1}, '{"a":1.0,"b":2}', True),
        ({"a": 1}, '{"b":2}', False),
        ({"a": 1}, "broken", False),
        ([1, 2], "[1, 2]", True),
    ],
)
def test_option_matches(wanted: t.Any, stored: str | None, same: bool) -> None:
    assert plan.option_matches(wanted, stored) is same


@pytest.mark.parametrize(("value", "text"), [(0.1, "0.1"), (1e-7, "0.0000001"), (500000.0, "500000"), (3, "3"), (1e16, "10000000000000000")])
def test_numbers_as_the_server_writes_them(value: float, text: str) -> None:
    assert plan.option_text(plan.option_wanted("QuotaPerUnit", value), None) == text


@pytest.mark.parametrize(("value", "text"), [(True, "true"), ("True", "true"), (" false ", "false"), (False, "false")])
def test_switches(value: t.Any, text: str) -> None:
    assert plan.option_text(plan.option_wanted("RegisterEnabled", value), None) == text


def test_a_switch_that_is_neither() -> None:
    with pytest.raises(plan.Fault, match="neither true nor false"):
        plan.option_wanted("RegisterEnabled", "no such")


@pytest.mark.parametrize("value", ["{broken", "[1]", [1], {"m": "a"}, {"m": -1}, {"m": True}, {"m": None}, '{"m": NaN}', '{"m": 1e999}'])
def test_ratios_that_cannot_be(value: t.Any) -> None:
    with pytest.raises(plan.Fault, match="ModelRatio"):
        plan.option_wanted("ModelRatio", value)


def test_ratios_as_text_or_mapping() -> None:
    assert plan.option_wanted("ModelRatio", '{"m": 1}') == plan.option_wanted("ModelRatio", {"m": "1"}) == {"m": 1}


def test_the_mail_domains_are_a_comma_list() -> None:
    assert plan.option_text(plan.option_wanted("EmailDomainWhitelist", ["a.com", " b.com"]), None) == "a.com,b.com"


def test_a_system_prompt_needs_its_version() -> None:
    with pytest.raises(plan.Fault, match="v0.6.9"):
        plan.normalise_channels([{**WANTED, "system_prompt": "x"}], (0, 6, 8))


@pytest.mark.parametrize(
    ("version", "given", "named"),
    [
        ((0, 6, 10), {"system_prompt": "x"}, True),
        ((0, 6, 10), {"system_prompt": "x", "model_mapping": {"m": "m"}}, True),
        ((0, 6, 10), {"system_prompt": "x", "model_mapping": {"m": "upstream"}}, False),
        ((0, 6, 10), {"system_prompt": "x", "type": 30}, False),
        ((0, 6, 10), {"system_prompt": ""}, False),
        ((0, 6, 11), {"system_prompt": "x"}, False),
        (None, {"system_prompt": "x"}, False),
    ],
)
def test_a_system_prompt_that_the_server_leaves_out_is_named(version: t.Any, given: dict[str, t.Any], named: bool) -> None:
    channels = plan.normalise_channels([{**WANTED, "models": ["m"], **given}, {"name": "gone", "state": "absent"}], version)
    assert plan.unused_prompts(channels, version) == (["a@x"] if named else [])


def test_order_of_options() -> None:
    items = [("GitHubOAuthEnabled", True), ("RegisterEnabled", False), ("GitHubClientId", "x")]
    assert [key for key, _value in sorted(items, key=plan.option_order)] == ["RegisterEnabled", "GitHubClientId", "GitHubOAuthEnabled"]


@pytest.mark.parametrize(
    ("name", "password", "fits"),
    [
        ("root", "12345678", True),
        ("root", "密码密码密码密码", True),
        ("root", "1234567", False),
        ("root", "x" * 21, False),
        ("x" * 13, "12345678", False),
        ("", None, False),
        ("root", None, True),
        ("root", "$I_LOVE_U", False),
    ],
)
def test_users(name: str, password: str | None, fits: bool) -> None:
    if fits:
        plan.check_user(name, password)
    else:
        with pytest.raises(plan.Fault):
            plan.check_user(name, password)


@pytest.mark.parametrize(
    ("subnet", "fits"),
    [
        ("10.0.0.0/8", True),
        ("10.1.2.3/8", True),
        ("fd00::/8", True),
        ("10.0.0.0/255.0.0.0", False),  # Python takes it, Go does not
        ("10.0.0.0/", False),
        ("10.0.0.0/-1", False),
        ("10.0.0.0/33", False),
        ("010.0.0.0/8", False),
        ("10.0.0.1", False),
    ],
)
def test_subnets_that_the_server_reads(subnet: str, fits: bool) -> None:
    params = {"name": "t", "subnets": [subnet]}
    if fits:
        assert plan.normalise_token(params)["subnets"] == [subnet]
    else:
        with pytest.raises(plan.Fault, match="subnets"):
            plan.normalise_token(params)


@pytest.mark.parametrize("text", ["[" * 100000, "{", None, "", 5])
def test_any_stored_text_can_be_looked_at(text: t.Any) -> None:
    assert plan.parsed(text) == (text or {})


def test_models_are_taken_as_the_server_spells_them() -> None:
    assert plan.all_models([{"models": "a, b"}, {"models": None}, {}]) == {"a", " b", ""}


def test_a_wanted_channel_goes_with_the_oldest_of_its_name() -> None:
    rows = [{"id": 3, "name": "a"}, {"id": 1, "name": "a"}, {"id": 2, "name": "b"}]
    wanted = [{"name": "a", "state": "present"}, {"name": "b", "state": "absent"}, {"name": "c", "state": "present"}]
    assert plan.pairs(rows, wanted) == [(rows[1], wanted[0])]
