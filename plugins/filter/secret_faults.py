# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
name: secret_faults
short_description: What is wrong with a set of secrets, without showing one
version_added: 1.0.0
author:
  - selfhosted.fastgpt contributors (@selfhosted)
description:
  - Finds secrets that are missing, publicly known, too short or too long, of a form that their consumer does not bear, or used under two names.
  - No value and no part of one is ever in the answer.
  - Names that end in C(_previous) hold what a rotation replaces. They may be unset, and a known default is no fault there.
positional: rules
options:
  _input:
    description: Names of variables as keys, their values as values.
    type: dict
    required: true
  rules:
    description:
      - Names of variables as keys. Each rule may have V(min) and V(max), the length in characters; V(pattern), a regular expression for the whole value;
        V(hint), the pattern in words; V(whitespace=true) for a value that may have several lines; V(required=false) for one that may be unset.
      - A variable that only stands in O(rules) is missing.
    type: dict
    default: {}
"""

EXAMPLES = r"""
- name: Refuse weak secrets
  ansible.builtin.assert:
    that: faults == []
    fail_msg: "{{ faults | join('\n') }}"
  vars:
    faults: >-
      {{ {'oneapi_root_password': oneapi_root_password}
         | selfhosted.fastgpt.secret_faults({'oneapi_root_password': {'min': 8, 'max': 20}}) }}
"""

RETURN = r"""
_value:
  description: One sentence for each fault, in the form C(variable), C((hidden)), rule, remedy.
  type: list
  elements: str
"""

import re
import typing as t
from collections.abc import Mapping

from ansible.errors import AnsibleFilterError
from ansible_collections.selfhosted.fastgpt.plugins.plugin_utils._models import fault, is_int, shown

_HIDDEN = "(hidden)"
_GENERATE = "Let playbooks/secrets.yml generate it, or set a value of your own in the vault file"
# Passwords and keys of the seed, of upstream compose files and of their documentation, in lower case.
# fmt: off
_KNOWN = frozenset((
    "123456", "1234", "12345", "12345678", "123456789", "1234567890", "0000", "00000000", "11111111", "88888888", "666666", "888888",
    "password", "passw0rd", "password1", "p@ssw0rd", "admin", "administrator", "root", "rootpassword", "user", "username", "guest",
    "default", "test", "testtest", "none", "null", "any", "secret", "secretkey", "token", "changeme", "change_me", "changeit", "example",
    "qwerty", "letmein", "root_key", "rootkey", "file_token_key", "filetoken", "token_key", "tokenkey", "fastgpt", "fastgpt_root",
    "fastgptroot", "fastgptkey", "fastgpt_key", "access_token", "accesstoken", "sk_key", "sk-key", "skkey", "api_key", "apikey", "empty",
    "myname", "mypassword", "myusername", "mypass", "oneapi", "oneapikey", "oneapimmysql", "one-api", "random_string", "initial_root_token",
    "aiproxy", "aiproxykey", "minioadmin", "postgres", "pgvector", "mongo", "mongodb", "redis", "mysql",
))
# fmt: on
# sk-abc..., sk-xxxx, sk-aaabbbcccdddeee..., sk-123..., sk-your-key, sk-fastgpt and their like.
_KNOWN_KEY = re.compile(r"(?:sk|fastgpt)-(?:x+|a+b+c+.*|0+|1+2+3*.*|(?:your|my|test|key|fastgpt|example|none|empty).*|\.+)", re.IGNORECASE | re.DOTALL)
# One-API reads this very value as "unchanged".
_ONEAPI_UNCHANGED = "$I_LOVE_U"


def _text(value: t.Any) -> str | None:
    """The text of a secret, also of a vaulted one on ansible-core 2.18; None for anything else."""
    if isinstance(value, str):
        return str(value)
    return str(value) if type(value).__name__ in ("AnsibleVaultEncryptedUnicode", "EncryptedString") else None


def _kind(value: t.Any) -> str:
    """In words: Ansible's own types have names that say nothing to a user."""
    kinds = ((bool, "true or false"), ((int, float), "a number"), (Mapping, "a dictionary"), ((list, tuple), "a list"))
    return next((words for kind, words in kinds if isinstance(value, kind)), f"of the type {type(value).__name__}")


def _is_known(text: str) -> bool:
    plain = text.strip()
    return plain.casefold() in _KNOWN or _KNOWN_KEY.fullmatch(plain) is not None or plain == _ONEAPI_UNCHANGED


def _number(name: str, rule: Mapping[str, t.Any], key: str) -> int | None:
    value = rule.get(key)
    if value is not None and not is_int(value):
        raise AnsibleFilterError(f"secret_faults: rules: {name}: {key}: {shown(value)}: must be a number.")
    return value


def _value_faults(name: str, text: str, rule: Mapping[str, t.Any], previous: bool) -> list[str]:
    found: list[str] = []

    def add(broken: str, remedy: str = _GENERATE) -> None:
        found.append(fault(name, _HIDDEN, broken, remedy))

    if rule.get("whitespace"):
        odd = [char for char in text if not char.isprintable() and char not in "\n\r\t "]
    else:
        if text != text.strip():
            add("begins or ends with white space", "Remove it; in YAML write a block as |- instead of |")
        elif any(char.isspace() for char in text):
            add("has white space in it", "Remove it")
        odd = [char for char in text if not char.isprintable() and not char.isspace()]
    if odd:
        add("has control characters in it", "Remove them, or generate a new value")
    if previous:
        return found
    if _is_known(text):
        add("is a publicly known default")
        return found
    if len(text) >= 4 and len(set(text.casefold())) < 4:
        add("repeats too few characters")
    least, most = _number(name, rule, "min"), _number(name, rule, "max")
    if least is not None and len(text) < least:
        add(f"is shorter than {least} characters")
    if most is not None and len(text) > most:
        add(f"is longer than {most} characters")
    pattern = rule.get("pattern")
    if pattern is not None:
        try:
            matches = re.fullmatch(str(pattern), text.rstrip("\r\n") if rule.get("whitespace") else text)
        except re.error as exc:
            raise AnsibleFilterError(f"secret_faults: rules: {name}: pattern: {shown(pattern)}: {exc}.") from exc
        if not matches:
            add(str(rule.get("hint") or f"does not match the pattern {pattern}").rstrip("."))
    return found


def secret_faults(secrets: t.Any, rules: t.Any = None) -> list[str]:
    if not isinstance(secrets, Mapping):
        raise AnsibleFilterError("secret_faults: the input must be a dictionary of variable names and values.")
    rules = {} if rules is None else rules
    if not isinstance(rules, Mapping) or not all(isinstance(rule, Mapping) for rule in rules.values()):
        raise AnsibleFilterError("secret_faults: rules: must be a dictionary of variable names and rules.")
    found: list[str] = []
    names_by_text: dict[str, list[str]] = {}
    for name in dict.fromkeys([*map(str, rules), *map(str, secrets)]):
        rule, value, previous = rules.get(name) or {}, secrets.get(name), name.endswith("_previous")
        items = list(value) if previous and isinstance(value, (list, tuple)) else [value]
        for item in items:
            text = _text(item)
            if item is None or text == "":
                if not previous and rule.get("required", True):
                    found.append(fault(name, "(unset)", "is required", _GENERATE))
            elif text is None:
                found.append(fault(name, _HIDDEN, f"is {_kind(item)}, not text", "Quote it in YAML"))
            else:
                found += _value_faults(name, text, rule, previous)
                names_by_text.setdefault(text.strip(), []).append(name.removesuffix("_previous"))
    for names in names_by_text.values():
        distinct = list(dict.fromkeys(names))
        if len(distinct) > 1:
            found.append(fault(" and ".join(distinct), _HIDDEN, "hold the same value", f"Give each its own. {_GENERATE}"))
    return found


class FilterModule:
    """Filter of the same name."""

    def filters(self) -> dict[str, t.Callable[..., t.Any]]:
        return {"secret_faults": secret_faults}
