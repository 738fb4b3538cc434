# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The two READMEs say the same and name all that there is; what the pages name and link to exists."""

from __future__ import annotations

import pathlib
import re

import pytest
import yaml
from test_traps import ROOT, names_in

READMES = (ROOT / "README.md", ROOT / "README.zh-CN.md")
PAGES = (*READMES, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "roles").glob("*/README.md")), ROOT / "bench/README.md")
NAMES = {
    "roles": sorted(path.name for path in (ROOT / "roles").iterdir() if (path / "meta").is_dir()),
    "modules": sorted(path.stem for path in (ROOT / "plugins/modules").glob("*.py")),
    "filters": sorted(path.stem for path in (ROOT / "plugins/filter").glob("*.py")),
}
ROLE_VARIABLE = re.compile(rf"(?:{'|'.join(sorted(NAMES['roles'], key=len, reverse=True))})_[a-z0-9_]+")


def words(text: str) -> set[str]:
    """What stands in backticks, outside of blocks."""
    return set(re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL)))


def shape(text: str) -> dict[str, object]:
    """What two languages have in common."""
    return {
        "headings": re.findall(r"^(#+) ", text, re.MULTILINE),
        "rows of each table": [len(block.splitlines()) for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)],
        "blocks": re.findall(r"^ *```(\w*)$", text, re.MULTILINE),
        "links": sorted(link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not link.startswith("README.")),
        "names": sorted(word for word in words(text) if re.fullmatch(r"[a-z0-9]+(?:[_./-][a-z0-9]+)+", word)),
    }


def links(text: str) -> list[str]:
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]


def anchors(text: str) -> set[str]:
    return {re.sub(r"[^\w-]", "", head.lower().replace(" ", "-")) for head in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}


def test_both_languages_have_the_same() -> None:
    english, chinese = (shape(path.read_text(encoding="utf-8")) for path in READMES)
    for part, expected in english.items():
        assert chinese[part] == expected, part


@pytest.mark.parametrize("page", READMES, ids=lambda path: path.name)
@pytest.mark.parametrize("kind", sorted(NAMES))
def test_everything_is_listed(page: pathlib.Path, kind: str) -> None:
    rows = "\n".join(line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("|"))
    form = "[{}](" if kind == "roles" else "`{}`"
    assert [name for name in NAMES[kind] if form.format(name) not in rows] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(page: pathlib.Path) -> None:
    text = page.read_text(encoding="utf-8")
    for link in links(text):
        path, _hash, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), link


@pytest.mark.parametrize("page", [path for path in PAGES if path.parent.name != "bench"], ids=lambda path: str(path.relative_to(ROOT)))
def test_variables_exist(page: pathlib.Path) -> None:
    known = set()
    for spec in (ROOT / "roles").glob("*/meta/argument_specs.yml"):
        for entry in yaml.safe_load(spec.read_text(encoding="utf-8"))["argument_specs"].values():
            known |= set(entry.get("options") or {})
    # what the plan takes from the inventory without an option of its own
    known |= set(ROLE_VARIABLE.findall((ROOT / "roles/plan/defaults/main.yml").read_text(encoding="utf-8")))
    known |= {*NAMES["modules"], *NAMES["filters"], *NAMES["roles"]}
    named = {word for word in words(page.read_text(encoding="utf-8")) if ROLE_VARIABLE.fullmatch(word) and "__" not in word}
    assert sorted(named - known) == []


@pytest.mark.parametrize("name", ["pitfalls.md", "troubleshooting.md"])
def test_tests_that_pages_name_exist(name: str) -> None:
    known = {test for path in (*(ROOT / "tests").rglob("test_*.py"), *(ROOT / "molecule").rglob("test_*.py")) for test in names_in(path)}
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs" / name).read_text(encoding="utf-8")))
    assert sorted(test for test in named if test not in known) == []
