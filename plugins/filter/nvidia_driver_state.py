# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
name: nvidia_driver_state
short_description: What stands of a driver on a host, and whether the host has to be rebooted
version_added: 1.0.0
author:
  - selfhosted.fastgpt contributors (@selfhosted)
description:
  - Compares what the role P(selfhosted.fastgpt.nvidia_driver#role) has seen on a host with what
    P(selfhosted.fastgpt.gpu_host_packages#filter) wants there.
  - A package manager that is content proves nothing. What counts is a module for the running kernel, and that this module is loaded.
positional: _input, plan
options:
  _input:
    description: What the role's look has printed.
    type: str
    required: true
  plan:
    description: The decision for the driver. It may be empty.
    type: dict
    required: true
  options:
    description:
      - C(connection), the connection plugin; C(reboot) and C(over_containers), whether a reboot is allowed and whether also while containers run;
        C(secure_boot), C(refuse), C(mok) or C(ignore); C(hold), whether packages are held.
    type: dict
    default: {}
"""

EXAMPLES = r"""
- ansible.builtin.debug:
    msg: "{{ (look.stdout | selfhosted.fastgpt.nvidia_driver_state(plan)).reboot_reasons }}"
"""

RETURN = r"""
_value:
  description: The state.
  type: dict
  contains:
    missing:
      description: Packages that are wanted and not there.
      type: list
      elements: str
    wrong:
      description: Packages of another branch.
      type: list
      elements: str
    unheld:
      description: Packages of the driver that an upgrade of the system would replace.
      type: list
      elements: str
    built:
      description: Version of the module for the running kernel, empty where there is none.
      type: str
    build_problem:
      description: Why there is none, and what helps.
      type: str
    reboot_reasons:
      description: Why the host has to be rebooted.
      type: list
      elements: str
    reboot_blocked:
      description: Why it must not be done now, and what helps.
      type: str
    secure_boot_fault:
      description: That Secure Boot would refuse the module, with the ways out.
      type: str
"""

import typing as t

from ansible_collections.selfhosted.fastgpt.plugins.plugin_utils._gpu_driver import driver_state


class FilterModule:
    def filters(self) -> dict[str, t.Callable[..., t.Any]]:
        return {"nvidia_driver_state": driver_state}
