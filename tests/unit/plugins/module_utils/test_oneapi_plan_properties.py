# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Whatever the server holds, one pass of the plan by the server's rules of writing reaches the wanted state, and a second is empty."""

from __future__ import annotations

import typing as t

import pytest

pytest.importorskip("hypothesis")

from ansible_collections.selfhosted.fastgpt.plugins.module_utils import _oneapi_plan as plan  # noqa: E402
from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

Row = t.Dict[str, t.Any]
POINTERS = ("base_url", "model_mapping", "priority", "system_prompt", "weight", "other")

names = st.sampled_from(["a@x", "b@x", "c@y", "by-hand", "chat", "网关@x"])
models = st.lists(st.sampled_from(["m1", "m2", " m1", "m 3", "模型"]), min_size=1, max_size=4)
texts = st.sampled_from([None, "", "x", "{}", '{"a":"b"}', '{ "a": "b" }', "{broken"])

rows_strategy = st.lists(
    st.fixed_dictionaries(
        {
            "name": names,
            "type": st.sampled_from([1, 3, 8]),
            "status": st.sampled_from([1, 2, 3]),
            "base_url": st.sampled_from([None, "", "http://a:1", "http://a:1/", "http://b:2/v1"]),
            "models": models.map(",".join),
            "group": st.sampled_from(["default", "vip", "default,vip", "default,default"]),
            "priority": st.sampled_from([None, 0, 1, -1]),
            "model_mapping": texts,
            "config": texts.map(lambda text: text or ""),
            "system_prompt": texts,
            "key": st.sampled_from(["k1", "k2"]),
        }
    ),
    max_size=8,
).map(lambda rows: [{**row, "id": number} for number, row in enumerate(rows, 1)])

wanted_strategy = st.lists(
    st.fixed_dictionaries(
        {
            "name": names,
            "state": st.sampled_from(["present", "present", "present", "absent"]),
            "type": st.sampled_from([1, 8]),
            "base_url": st.sampled_from(["http://a:1", "http://a:1/", "http://b:2"]),
            "models": models,
            "group": st.sampled_from(["default", "vip", "vip, default"]),
            "priority": st.sampled_from([0, 1, -1]),
            "enabled": st.booleans(),
            "model_mapping": st.sampled_from([None, {}, {"a": "b"}]),
            "config": st.sampled_from([None, {}, {"a": "b"}]),
            "system_prompt": st.sampled_from([None, "", "x"]),
            "key": st.just("wanted"),
        }
    ),
    max_size=5,
    unique_by=lambda item: item["name"],
)


def write(row: Row, changes: Row) -> Row:
    """A PUT as One-API does it: zero values are skipped, except in pointer fields; null is skipped in all."""
    result = dict(row)
    for key, value in changes.items():
        if value is None or (key not in POINTERS and value in ("", 0)):
            continue
        result[key] = value
    return result


def carry_out(rows: list[Row], done: plan.ChannelPlan) -> list[Row]:
    state = {row["id"]: dict(row) for row in rows}
    for row, changes in done.updates:
        state[row["id"]] = write(state[row["id"]], changes)
    top = max(state, default=0)
    for number, channel in enumerate(done.creates, top + 1):
        body = plan.channel_body(channel)
        empty = {"config": "", "model_mapping": "", "system_prompt": None, "priority": 0}
        state[number] = {**empty, **body, "id": number, "status": body["status"] or 1}
    for row in done.deletes:
        del state[row["id"]]
    return list(state.values())


@given(rows=rows_strategy, wanted=wanted_strategy, purge=st.booleans(), rewrite=st.sets(names, max_size=2))
def test_one_pass_converges(rows: list[Row], wanted: list[Row], purge: bool, rewrite: set[str]) -> None:
    channels = plan.normalise_channels(wanted, (0, 6, 10))
    first = plan.plan_channels(rows, channels, purge=purge, rewrite=rewrite)
    after = carry_out(rows, first)
    second = plan.plan_channels(after, channels, purge=purge)
    assert not second, second

    by_name: dict[str, list[Row]] = {}
    for row in after:
        by_name.setdefault(row["name"], []).append(row)
    for channel in channels:
        found = by_name.pop(channel["name"], [])
        if channel["state"] == "absent":
            assert not found
            continue
        (row,) = found
        oldest = [item["id"] for item in rows if item["name"] == channel["name"]]
        assert not oldest or row["id"] == min(oldest)
        assert row["models"].split(",") == channel["models"] or sorted(row["models"].split(",")) == sorted(channel["models"])
        assert len(set(row["models"].split(","))) == len(row["models"].split(","))
        assert (row["status"] == 1) == (channel["status"] == 1)
        assert not row["base_url"].endswith("/")
        if channel["name"] in rewrite or not oldest:
            assert row["key"] == "wanted"
        elif len(oldest) == 1:
            assert row["key"] == next(item["key"] for item in rows if item["id"] == row["id"])
    # What is not ours is as it was.
    kept = [row for row in rows if row["name"] in by_name]
    assert [row for name in by_name for row in by_name[name]] == [row for name in by_name for row in kept if row["name"] == name]
    gone = {row["name"] for row in rows} - {row["name"] for row in after} - {item["name"] for item in wanted}
    assert all("@" in name for name in gone)
    assert purge or not gone


@given(rows=rows_strategy, wanted=wanted_strategy)
def test_a_diff_holds_no_key_and_both_sides_differ(rows: list[Row], wanted: list[Row]) -> None:
    channels = plan.normalise_channels(wanted, (0, 6, 10))
    made = plan.plan_channels(rows, channels, purge=True)
    diff = made.diff()
    assert bool(made) == (diff["before"] != diff["after"])
    text = repr(diff)
    assert "'k1'" not in text and "'k2'" not in text and "'wanted'" not in text


@given(
    row=st.fixed_dictionaries(
        {
            "id": st.just(1),
            "name": st.just("t"),
            "status": st.sampled_from([1, 2, 3, 4]),
            "expired_time": st.sampled_from([-1, 0, 1000, 5000]),
            "remain_quota": st.sampled_from([0, 5, -1]),
            "unlimited_quota": st.booleans(),
            "models": st.sampled_from([None, "", "a", "b,a", "a,a", " a"]),
            "subnet": st.sampled_from([None, "", "10.0.0.0/8"]),
        }
    ),
    params=st.fixed_dictionaries(
        {
            "name": st.just("t"),
            "models": st.sampled_from([None, [], ["a"], ["a", "b"], [" b", "a", "a"]]),
            "subnets": st.sampled_from([None, [], ["10.0.0.0/8"]]),
            "unlimited_quota": st.booleans(),
            "remain_quota": st.sampled_from([None, 0, 9]),
            "quota_policy": st.sampled_from(["on_create", "always"]),
            "expired_time": st.sampled_from([-1, 5000]),
            "enabled": st.booleans(),
        }
    ),
)
def test_a_token_converges_in_one_write(row: Row, params: Row) -> None:
    wanted = plan.normalise_token(params)
    changes = plan.token_changes(row, wanted)
    status = plan.token_status(row, changes, wanted, 2000)
    body = plan.token_replacement(row, changes)
    assert set(body) == {"id", "name", "expired_time", "remain_quota", "unlimited_quota", "models", "subnet"}
    after = {**row, **body, **({} if status is None else {"status": status})}
    again = plan.token_changes(after, wanted)
    assert not again
    assert plan.token_status(after, again, wanted, 2000) is None
    assert after["expired_time"] == params["expired_time"]
    if params["models"] is not None:
        assert sorted(part for part in (after["models"] or "").split(",") if part) == wanted["models"]
    else:
        assert after["models"] == row["models"]
    usable = after["expired_time"] in (-1, 5000) and (after["unlimited_quota"] or after["remain_quota"] > 0)
    if params["enabled"] and usable:
        assert after["status"] == 1
    if not params["enabled"]:
        assert after["status"] != 1


scalars = st.one_of(st.booleans(), st.integers(-(10**9), 10**9), st.floats(allow_nan=False, allow_infinity=False, width=32), st.text(max_size=12))


@given(
    key=st.sampled_from(["SystemName", "RetryTimes", "Notice", "QuotaPerUnit"]),
    value=st.one_of(scalars, st.lists(scalars, max_size=3), st.dictionaries(st.text(max_size=5), scalars, max_size=3)),
    stored=st.one_of(st.none(), st.text(max_size=10)),
)
def test_an_option_is_right_once_it_is_set(key: str, value: t.Any, stored: str | None) -> None:
    wanted = plan.option_wanted(key, value)
    text = plan.option_text(wanted, stored)
    assert isinstance(text, str)
    assert plan.option_matches(wanted, text)
    assert plan.option_text(wanted, text) == text or isinstance(wanted, dict)


@given(
    stored=st.dictionaries(st.sampled_from(["m1", "m2", "m3"]), st.floats(0, 100)),
    wanted=st.dictionaries(st.sampled_from(["m2", "m3", "m4"]), st.one_of(st.integers(0, 100), st.floats(0, 100))),
)
def test_ratios_merge_over_what_is_there(stored: dict[str, float], wanted: dict[str, float]) -> None:
    value = plan.option_wanted("ModelRatio", wanted)
    text = plan.option_text(value, plan.json_text(stored))
    assert plan.parsed(text) == {**stored, **wanted}
    assert plan.option_matches(value, text)
