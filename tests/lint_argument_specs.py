# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Argument specifications that lie are worse than none: compare them with the defaults in names, types and values."""

from __future__ import annotations

import pathlib
import sys
from typing import Any

import yaml

ROOT = pathlib.Path(__file__).resolve().parents[1]
# The defaults of this role are derived values, no options.
DERIVED = {"plan"}
# Nothing to set, so nothing to check: a specification would only be one task more for every host and play.
WITHOUT = {("container", "main"), ("model_cards", "main"), ("plan", "main")}
TYPES: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "path": (str,),
    "raw": (object,),
    "int": (int,),
    "float": (int, float),
    "bool": (bool,),
    "list": (list,),
    "dict": (dict,),
}


def load(path: pathlib.Path) -> Any:
    return (yaml.safe_load(path.read_text(encoding="utf-8")) or {}) if path.exists() else {}


def templated(value: Any) -> bool:
    text = str(value)
    return "{{" in text or "{%" in text


def faults_of(role: pathlib.Path) -> list[str]:
    name = role.name
    found = []
    specs = load(role / "meta" / "argument_specs.yml").get("argument_specs", {})
    defaults = load(role / "defaults" / "main.yml")
    for task_file in sorted((role / "tasks").glob("*.yml")):
        entry = task_file.stem in ("main", "preflight", "preflight_host", "verify", "uninstall") and (name, task_file.stem) not in WITHOUT
        if entry and task_file.stem not in specs:
            found.append(f"{name}: the entry point {task_file.stem} has no specification")
    options: dict[str, Any] = {}
    for entry in specs.values():
        options.update(entry.get("options") or {})
    for variable in sorted(set(defaults) - set(options)) if name not in DERIVED else []:
        found.append(f"{name}: {variable} has a default but no option")
    for variable, option in sorted(options.items()):
        if not option.get("description"):
            found.append(f"{name}: {variable} has no description")
        if variable not in defaults:
            if "default" in option:
                found.append(f"{name}: {variable} has a default in the specification only")
            continue
        default, kind = defaults[variable], option.get("type", "str")
        if templated(default):
            if "default" in option:
                found.append(f"{name}: {variable} derives from other variables, so its specification cannot name a default")
            continue
        if "default" not in option:
            if default is not None:
                found.append(f"{name}: {variable} is {default!r} in the defaults, and the specification names none")
            continue
        if option["default"] != default or isinstance(option["default"], bool) != isinstance(default, bool):
            found.append(f"{name}: {variable} is {default!r} in the defaults and {option['default']!r} in the specification")
        if not isinstance(default, TYPES[kind]) or (kind in ("int", "float") and isinstance(default, bool)):
            found.append(f"{name}: {variable} is {default!r}, which is no {kind}")
    return found


def main() -> int:
    roles = sorted(path for path in (ROOT / "roles").iterdir() if path.is_dir())
    found = [fault for role in roles for fault in faults_of(role)]
    for role in roles:
        if not (role / "README.md").exists():
            found.append(f"{role.name}: no README.md")
    print("\n".join(found) if found else f"argument specifications of {len(roles)} roles agree with their defaults")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
