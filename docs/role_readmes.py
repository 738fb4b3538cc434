# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Write the variables of each role into its README, out of its argument specification. With --check, say what is out of date.

The text around the generated part is written by hand and stays.
"""

from __future__ import annotations

import json
import pathlib
import re
import sys
from typing import Any

import yaml

ROLES = pathlib.Path(__file__).resolve().parents[1] / "roles"
BEGIN = "<!-- begin variables, written by docs/role_readmes.py -->"
END = "<!-- end variables -->"


def plain(text: Any) -> str:
    """A description as Markdown."""
    joined = " ".join(text) if isinstance(text, list) else str(text)
    return re.sub(r"\b[A-Z]\(([^)#]*)(?:#[a-z]+)?\)", r"`\1`", joined).replace("\n", " ").replace("|", "\\|").strip()


def rows(options: dict[str, Any], prefix: str = "") -> list[str]:
    out = []
    for name, option in options.items():
        kind = option.get("type", "str") + (f" of {option['elements']}" if "elements" in option else "")
        default = "required" if option.get("required") else f"`{json.dumps(option['default'], ensure_ascii=False)}`" if "default" in option else ""
        choices = f" One of {', '.join(f'`{choice}`' for choice in option['choices'])}." if "choices" in option else ""
        secret = " Secret." if option.get("no_log") else ""
        out.append(f"| {prefix}`{name}` | {kind} | {default} | {plain(option['description'])}{choices}{secret} |")
        out += rows(option.get("options") or {}, prefix + "· ")
    return out


def section(specs: dict[str, Any]) -> str:
    lines = [BEGIN, ""]
    seen: list[Any] = []
    for entry, spec in specs.items():
        lines += [f"### Entry point `{entry}`", "", plain(spec.get("short_description", "")) + ".", ""]
        if spec.get("description"):
            lines += [plain(spec["description"]), ""]
        options = spec.get("options") or {}
        if not options:
            lines += ["No variables.", ""]
        elif options in seen:
            lines += ["The same variables as above.", ""]
        else:
            seen.append(options)
            lines += ["| variable | type | default | what it is |", "|---|---|---|---|", *rows(options), ""]
    return "\n".join([*lines, END])


def readme(role: pathlib.Path) -> str:
    specs = yaml.safe_load((role / "meta" / "argument_specs.yml").read_text(encoding="utf-8"))["argument_specs"]
    path = role / "README.md"
    if not specs:
        return path.read_text(encoding="utf-8")
    first = next(iter(specs.values()))
    title = f"# selfhosted.fastgpt.{role.name}\n\n{plain(first.get('description', first['short_description']))}\n"
    text = path.read_text(encoding="utf-8") if path.exists() else title
    if BEGIN in text:
        return text[: text.index(BEGIN)] + section(specs) + text[text.index(END) + len(END) :]
    return text.rstrip() + "\n\n## Variables\n\n" + section(specs) + "\n"


def main() -> int:
    stale = []
    for role in sorted(path for path in ROLES.iterdir() if (path / "meta" / "argument_specs.yml").exists()):
        wanted, path = readme(role), role / "README.md"
        if not path.exists() or path.read_text(encoding="utf-8") != wanted:
            stale.append(role.name)
            if "--check" not in sys.argv:
                path.write_text(wanted, encoding="utf-8")
    if stale and "--check" in sys.argv:
        print(f"out of date: the README of {', '.join(stale)}. Run python docs/role_readmes.py")
        return 1
    print(f"role READMEs: {', '.join(stale) + ' written' if stale else 'up to date'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
