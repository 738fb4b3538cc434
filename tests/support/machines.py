# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A lab host as testinfra sees it, and what the tests ask it."""

from __future__ import annotations

import os
from typing import Any

import testinfra


def host(name: str) -> Any:
    return testinfra.get_host(f"ansible://{name}?ansible_inventory={os.environ['MOLECULE_INVENTORY_FILE']}&sudo=true")


def listening(machine: Any) -> set[tuple[str, ...]]:
    """(address, port) of every TCP listener."""
    return {tuple(line.split()[3].rsplit(":", 1)) for line in machine.check_output("ss -Hltn").splitlines()}


def status(machine: Any, url: str, *options: str) -> tuple[int, str]:
    """HTTP status of a request, and the body."""
    words = " ".join(f"'{option}'" for option in options)
    out = machine.check_output(f"curl -s -m 20 -w '\\n%{{http_code}}' {words} {url}")
    body, _newline, code = out.rpartition("\n")
    return int(code), body
