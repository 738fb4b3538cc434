# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

from typing import Any, Callable

from ansible.errors import AnsibleFilterError

DOCUMENTATION = r"""
name: mongodb_version
short_description: The MongoDB release that a CPU can run
version_added: 1.0.0
author: selfhosted.fastgpt contributors (@selfhosted)
description:
  - MongoDB 5.0 and newer are compiled for CPUs with AVX (x86-64) or Armv8.2-A (arm64). On an older CPU the server dies with
    C(Illegal instruction), and Docker restarts it for ever.
  - On arm64 the releases 4.4.19 and newer need Armv8.2-A as well, so an older core gets a release of its own.
  - Often it is only the CPU type of a virtual machine that hides AVX.
positional: _input, architecture
options:
  _input:
    description: The lines C(flags) (x86-64) or C(Features) (arm64) of C(/proc/cpuinfo), or the whole file.
    type: str
    required: true
  architecture:
    description: The machine as C(uname -m) names it.
    type: str
    required: true
  modern:
    description: Release for a CPU that runs MongoDB 5.0.
    type: str
    default: 5.0.32
  legacy:
    description: Release for an x86-64 CPU without AVX.
    type: str
    default: 4.4.29
  legacy_arm:
    description: Release for an arm64 CPU older than Armv8.2-A.
    type: str
    default: 4.4.18
"""

EXAMPLES = r"""
- name: Name the image
  ansible.builtin.debug:
    msg: "mongo:{{ cpu_flags | selfhosted.fastgpt.mongodb_version(ansible_facts['architecture']) }}"
"""

RETURN = r"""
_value:
  description: A release such as C(5.0.32).
  type: str
"""

X86 = ("x86_64", "amd64")
ARM = ("aarch64", "arm64")

# The kernel names no architecture level. Each of these came with Armv8.2-A or later, and every known 8.2 core shows one.
ARM_8_2 = frozenset({"asimddp", "asimdhp", "dcpop", "fphp", "sha3", "sha512", "sm3", "sm4", "sve"})


def cpu_features(cpuinfo: str) -> set[str]:
    """All words of the flags/Features lines."""
    words: set[str] = set()
    for line in cpuinfo.splitlines():
        label, colon, rest = line.partition(":")
        if colon and label.strip() in ("flags", "Features"):
            words.update(rest.split())
    return words


def mongodb_version(
    cpuinfo: str, architecture: str, modern: str = "5.0.32", legacy: str = "4.4.29", legacy_arm: str = "4.4.18"
) -> str:
    features = cpu_features(cpuinfo)
    if architecture not in X86 + ARM:
        raise AnsibleFilterError(
            f"mongodb_version: architecture {architecture!r}: MongoDB's images exist for x86_64 and aarch64 only. Use another host."
        )
    if not features:
        raise AnsibleFilterError(
            "mongodb_version: no line 'flags' or 'Features' in what was read of /proc/cpuinfo, so the CPU is unknown. "
            "Name the image yourself in mongodb_image."
        )
    if architecture in X86:
        return modern if "avx" in features else legacy
    return modern if features & ARM_8_2 else legacy_arm


class FilterModule:
    def filters(self) -> dict[str, Callable[..., Any]]:
        return {"mongodb_version": mongodb_version}
