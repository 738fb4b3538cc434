# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""docs/traps.md and docs/gpu-pitfalls.md name a test for each trap; a test that was renamed or removed is found here."""

from __future__ import annotations

import ast
import functools
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[3]
PAGES = {"traps.md": 50, "gpu-pitfalls.md": 30}
NODE = re.compile(r"`((?:tests|molecule)/[\w/.-]+\.py)::(\w+(?:::\w+)?)`")
HEAD = ["topic", "trap", "test"]


def cells(line: str) -> list[str]:
    return [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def rows_of(text: str) -> list[tuple[int, list[str]]]:
    """Rows of the tables, with the number of their line."""
    found = [(number, cells(line)) for number, line in enumerate(text.splitlines(), 1) if line.startswith("|")]
    return [(number, row) for number, row in found if row != HEAD and not all(re.fullmatch(r":?-+:?", cell) for cell in row)]


@functools.cache
def names_in(path: pathlib.Path) -> frozenset[str]:
    """Names of the test functions of a file, those of classes as Class::name."""
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, functions):
            names.add(node.name)
        elif isinstance(node, ast.ClassDef):
            names |= {f"{node.name}::{method.name}" for method in node.body if isinstance(method, functions)}
    return frozenset(name for name in names if name.rpartition("::")[2].startswith("test_"))


def faults_of(text: str) -> list[str]:
    found = []
    seen: dict[tuple[str, str], int] = {}
    for number, row in rows_of(text):
        if len(row) != len(HEAD) or not all(row):
            found.append(f"line {number}: needs a topic, a trap and a test")
            continue
        topic, trap, tests = row
        first = seen.setdefault((topic, trap), number)
        if first != number:
            found.append(f"line {number}: stands in line {first} already")
        nodes = NODE.findall(tests)
        if not nodes or NODE.sub("", tests).replace("<br>", "").strip(" ,"):
            found.append(f"line {number}: {tests}: must be `path::test` without parameters, several with <br> between them")
        for name, test in nodes:
            path = ROOT / name
            if not path.is_file():
                found.append(f"line {number}: there is no {name}")
            elif test not in names_in(path):
                found.append(f"line {number}: {name} has no {test}")
    return found


@pytest.mark.parametrize("page", PAGES)
def test_every_test_that_is_named_exists(page: str) -> None:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    assert faults_of(text) == []
    assert len(rows_of(text)) >= PAGES[page]


def test_a_wrong_row_is_found() -> None:
    here = pathlib.Path(__file__).relative_to(ROOT)
    good = f"| a | b | `{here}::test_a_wrong_row_is_found` |"
    assert faults_of(f"| topic | trap | test |\n|---|---|---|\n{good}") == []
    wrong = (f"| a | b | `{here}::test_renamed` |", "| a | b | `tests/unit/none.py::test_x` |", "| a | b | test_x |", "| a | | `x` |", f"{good}\n{good}",
             f"| a | b | `{here}::rows_of` |", f"| a | b | `{here}::test_a_wrong_row_is_found[x]` |")  # fmt: skip
    for text in wrong:
        assert len(faults_of(text)) == 1, text
