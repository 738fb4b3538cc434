# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
name: variable_faults
short_description: Variables that cannot be read, that nobody reads, or that mean something else than they say
version_added: 1.0.0
author:
  - selfhosted.fastgpt contributors (@selfhosted)
description:
  - Finds what no argument specification can, since it would not come to it, lets it through, or does not see it.
  - Options whose templates cannot be resolved, with the reason, be it a variable that is not defined, an error of syntax, a loop, or a vault's
    password that does not fit.
  - Names that are nearly those of an option and would be ignored.
  - Values that YAML has read as another type than their author meant, such as C(no), C(08000), C(1.10) or a date where text is wanted, digits of
    another script, and keys without a value.
  - Everything else about types and choices is left to the argument specifications.
positional: _input, specifications
options:
  _input:
    description: Names of hosts as keys, as values dictionaries of their variables, such as those of C(hostvars).
    type: dict
    required: true
  specifications:
    description: Contents of files C(meta/argument_specs.yml), as text, or as data, which takes longer to make.
    type: list
    elements: raw
    required: true
"""

EXAMPLES = r"""
- name: Show the variables of app-1 that nobody reads
  ansible.builtin.debug:
    msg: "{{ ({'app-1': hostvars['app-1']} | selfhosted.fastgpt.variable_faults([lookup('file', 'meta/argument_specs.yml')]))['app-1'].faults }}"
"""

RETURN = r"""
_value:
  description:
    - For each host a dictionary with RV(ignore:faults), one sentence for each in the form variable, value, rule, remedy; and RV(ignore:unusable), the
      names of the options whose values cannot be read.
  type: dict
"""

import datetime
import difflib
import re
import typing as t
from collections.abc import Mapping

import yaml
from ansible.errors import AnsibleFilterError
from ansible_collections.selfhosted.fastgpt.plugins.plugin_utils._models import fault, is_list, shown

# Ansible's own, and what roles set.
_FOREIGN = re.compile(r"ansible_.*|.*__.*|groups|group_names|hostvars|inventory_.*|omit|play_hosts|playbook_dir|role_.*|environment|vars|plan_.*")

# Our own files; in C where PyYAML has that.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

_BOOLEANS = ("true", "false", "yes", "no", "on", "off", "1", "0", "y", "n", "t", "f")


def _misspelt(name: str, options: t.Collection[str]) -> str | None:
    """The option that was probably meant. A longer name with an option in it is somebody's own variable."""
    if name.replace("-", "_") in options:
        return name.replace("-", "_")
    near = [option for option in difflib.get_close_matches(name, options, n=3, cutoff=0.9) if abs(len(option) - len(name)) <= 2]
    return near[0] if near else None


def _number_fault(value: t.Any, whole: bool) -> tuple[str, str] | None:
    if isinstance(value, bool):
        return "is a boolean, as which YAML reads yes, no, on and off", "Write a number"
    if isinstance(value, float) and whole:
        return "has a decimal point or an exponent", "Write a whole number"
    if not isinstance(value, str):
        return None
    if value.isdigit() and not value.isascii():
        return "has digits of another script", "Write it with the digits 0 to 9"
    if re.fullmatch(r"[+-]?0[0-9_]+", value.strip()):
        return "has a leading zero, for which YAML reads it as octal or as text", "Write it without"
    return None


def _text_fault(value: t.Any) -> tuple[str, str] | None:
    if isinstance(value, bool):
        return "is a boolean, as which YAML reads yes, no, on and off", "Quote it if it is meant, else write the text that is wanted"
    if isinstance(value, float):
        return "is a number to YAML, which drops zeros at its end", "Quote it"
    if isinstance(value, datetime.date):
        return "is a date to YAML", "Quote it"
    return None


def _value_fault(value: t.Any, option: Mapping[str, t.Any]) -> tuple[str, str] | None:
    kind = option.get("type", "str")
    if value is None:
        return "has no value", "Give it one, or remove the line"
    if kind in ("int", "float"):
        return _number_fault(value, kind == "int")
    if kind in ("str", "path"):
        return _text_fault(value)
    if kind == "bool" and isinstance(value, str) and value.strip().casefold() not in _BOOLEANS:
        return "is neither true nor false", "Write one of them"
    if kind == "list" and option.get("elements", "str") in ("str", "path", "int", "float") and is_list(value):
        return next((broken for item in value if (broken := _value_fault(item, {"type": option.get("elements", "str")}))), None)
    return None


def _options(specifications: t.Iterable[t.Any]) -> dict[str, Mapping[str, t.Any]]:
    found: dict[str, Mapping[str, t.Any]] = {}
    for text_or_data in specifications:
        document = yaml.load(text_or_data, Loader=_LOADER) if isinstance(text_or_data, str) else text_or_data
        for entry in document["argument_specs"].values():
            found.update(entry.get("options") or {})
    return found


def _resolve(value: t.Any) -> t.Any:
    """Templates in lists and dictionaries are resolved when they are looked at."""
    if isinstance(value, Mapping):
        for item in value.values():
            _resolve(item)
    elif is_list(value):
        for item in value:
            _resolve(item)
    else:
        str(value)
    return value


def _unreadable(exc: BaseException) -> tuple[str, str, str]:
    """What is shown for the value, rule and remedy. Messages are not passed on: they can hold the value."""
    kinds: set[str] = set()
    texts = ""
    cause: BaseException | None = exc
    while cause is not None and len(kinds) < 50:
        kinds |= {kind.__name__ for kind in type(cause).__mro__}
        texts += str(cause)
        cause = cause.__cause__ or cause.__context__
    if "AnsibleVaultError" in kinds or "decrypt" in texts:
        remedy = "Give the right one with --vault-password-file or ANSIBLE_VAULT_PASSWORD_FILE"
        return "(vault)", "cannot be decrypted with the vault passwords that were given", remedy
    if "RecursionError" in kinds or "ecursi" in texts:
        return "(template)", "its template needs its own value", "Write the value, or give the other variable another name"
    if "TemplateSyntaxError" in kinds or "AnsibleTemplateSyntaxError" in kinds or "yntax error in template" in texts:
        remedy = "Look for a brace, bracket or quote that is missing; text with braces that is no template takes !unsafe"
        return "(template)", "has an error of syntax in its template", remedy
    if "UndefinedError" in kinds or "AnsibleUndefinedVariable" in kinds:
        return "(undefined)", "uses a variable that is not defined", "Define that one, or give the vault file that holds it"
    return "(template)", "its template cannot be resolved", "Correct it; ansible-inventory --host shows the value as it is written"


def _host_faults(values: Mapping[str, t.Any], options: Mapping[str, Mapping[str, t.Any]]) -> dict[str, list[str]]:
    found: list[str] = []
    unusable: list[str] = []
    for name in map(str, values):
        option = options.get(name)
        if option is None:
            meant = None if _FOREIGN.fullmatch(name) else _misspelt(name, options)
            if meant and meant not in values:
                # its value may be a secret
                rule = "is no variable of this collection, so nothing reads it"
                found.append(fault(name, "(not shown)", rule, f"Write {meant} if that is meant, else rename it"))
            continue
        try:
            value = _resolve(values[name])
        except Exception as exc:  # whatever a template of the user's can raise
            found.append(fault(name, *_unreadable(exc)))
            unusable.append(name)
            continue
        # secret_faults tells a secret of another type
        broken = None if option.get("no_log") else _value_fault(value, option)
        if broken:
            found.append(fault(name, shown(value), *broken))
    return {"faults": found, "unusable": unusable}


def variable_faults(hosts: t.Any, specifications: t.Any) -> dict[str, dict[str, list[str]]]:
    if not isinstance(hosts, Mapping) or not is_list(specifications):
        raise AnsibleFilterError("variable_faults: wants a dictionary of hosts, and a list of argument specifications.")
    options = _options(specifications)
    return {str(host): _host_faults(values, options) for host, values in hosts.items()}


class FilterModule:
    """Filter of the same name."""

    def filters(self) -> dict[str, t.Callable[..., t.Any]]:
        return {"variable_faults": variable_faults}
