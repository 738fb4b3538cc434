# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Any JSON survives the canonical form, and the JSON5 reader agrees with the library json5 and with json."""

from __future__ import annotations

import json
import math
import typing as t

import pytest

pytest.importorskip("hypothesis")

from ansible_collections.selfhosted.fastgpt.plugins.module_utils import _fastgpt_config as fc  # noqa: E402
from hypothesis import assume, given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

SCALARS = st.none() | st.booleans() | st.integers(-(10**12), 10**12) | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=12)
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4), max_leaves=12)


def shuffled(value: t.Any) -> t.Any:
    if isinstance(value, dict):
        return {k: shuffled(value[k]) for k in reversed(list(value))}
    return [shuffled(v) for v in value] if isinstance(value, list) else value


@given(st.dictionaries(st.text(max_size=6), VALUES, max_size=5))
def test_canonical_text_is_strict_and_reads_back(value: dict[str, t.Any]) -> None:
    text = fc.canonical(value)
    found = fc.read_existing(text.encode("utf-8", "surrogatepass")) if text.isprintable() else fc.Existing(json.loads(text), True, "")
    assert found.strict and fc.same(found.value, value)
    assert fc.same(shuffled(value), value)
    assert fc.same(fc.in_order(shuffled(value), value), value)
    assert fc.canonical(fc.in_order(shuffled(value), value)) == text


@given(VALUES)
def test_json_is_json5(value: t.Any) -> None:
    for text in (json.dumps(value), json.dumps(value, ensure_ascii=False, indent=1)):
        assert fc.same(fc.read_json5(text), value)


@given(VALUES)
def test_agrees_with_the_library(value: t.Any) -> None:
    json5 = pytest.importorskip("json5")
    text = json5.dumps(value, trailing_commas=True, indent=2, ensure_ascii=False)
    # The library writes NUL before a digit as an escape that JSON5 does not allow.
    assume("\\0" not in text)
    assert fc.same(fc.read_json5("// head\n" + text + "/* tail */"), json5.loads(text))


@given(st.text(alphabet=list("{}[],:'\"\\/*abc019.-+eExu \n_$NI"), max_size=30))
def test_no_text_breaks_the_reader(text: str) -> None:
    try:
        fc.read_json5(text)
    except fc.Json5Error as exc:
        assert "line " in str(exc)


@given(
    st.integers(0, 10**6) | st.floats() | st.text(max_size=8) | st.booleans() | st.none() | st.lists(st.integers(), max_size=2),
    st.sampled_from(["maxContext", "model", "vision", "defaultConfig", "maxTemperature"]),
)
def test_no_value_breaks_the_checks(value: t.Any, field: str) -> None:
    entry: dict[str, t.Any] = {"model": "m", "maxContext": 4096, "maxResponse": 1, "quoteMaxToken": 1, field: value}
    built = fc.build("v4.8.9", llm_models=[entry], vector_models=[{"model": "v"}])
    if not built.faults:
        assert json.loads(fc.canonical(built.config)) == built.config
    elif isinstance(value, float) and not math.isfinite(value):
        assert built.faults
