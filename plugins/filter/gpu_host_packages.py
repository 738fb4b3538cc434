# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
name: gpu_host_packages
short_description: Repositories, keys, packages and pins of what a GPU host needs
version_added: 1.0.0
author:
  - selfhosted.fastgpt contributors (@selfhosted)
description:
  - Decides by one table where NVIDIA's driver, container toolkit and CUDA, or Docker, come from on a distribution, under which names, and how a driver
    branch is kept. It looks at nothing but its arguments.
  - What cannot work is no failure but a RV(_value.fault) with what would, so that a caller can collect the faults of several hosts.
positional: _input, what
options:
  _input:
    description:
      - The host, with C(distribution), C(version) and C(architecture) as Ansible's facts name them, C(kernel) as C(uname -r) says it, and C(python), the
        version of the interpreter, where that is to be checked.
    type: dict
    required: true
  what:
    description: What is asked for.
    type: str
    required: true
    choices: [driver, toolkit, cuda, docker]
  device_ids:
    description:
      - PCI device ids of the host's GPUs, as M(selfhosted.fastgpt.gpu_facts) returns them. They decide between the open and the proprietary kernel module.
    type: list
    elements: str
    default: []
  options:
    description:
      - The variables of the role that asks, without its prefix. C(source), C(branch), C(module), C(variant), C(repository), C(repository_key), C(region),
        C(runfile), C(runfile_sha256), C(debian_mirror) and C(nvswitch) for the driver; C(version), C(repository), C(repository_key) and C(region) for
        toolkit and CUDA; C(source), C(repository), C(repository_key) and C(region) for Docker.
    type: dict
    default: {}
"""

EXAMPLES = r"""
- name: What would be installed on a Debian 12 with a Tesla T4
  ansible.builtin.debug:
    msg: "{{ {'distribution': 'Debian', 'version': '12.11', 'architecture': 'x86_64'} | selfhosted.fastgpt.gpu_host_packages('driver', ['1eb8']) }}"
"""

RETURN = r"""
_value:
  description: The decision.
  type: dict
  contains:
    fault:
      description: Why there is none, with what would work; empty where there is one. All else is missing then.
      type: str
    platform:
      description: Row of the table.
      type: str
    repositories:
      description: Repositories with their keys, and what of older ones is in their way.
      type: list
      elements: dict
    packages:
      description: Names of packages, never empty.
      type: list
      elements: str
    flavour:
      description: Kernel module of the driver, C(open) or C(proprietary).
      type: str
    pin:
      description: How the branch is kept.
      type: dict
"""

import typing as t
from collections.abc import Mapping, Sequence

from ansible.errors import AnsibleFilterError
from ansible_collections.selfhosted.fastgpt.plugins.plugin_utils._gpu_hosts import PLANS, Refusal


def _number(device_id: t.Any) -> int:
    return device_id if isinstance(device_id, int) else int(str(device_id), 16)


def gpu_host_packages(host: Mapping[str, t.Any], what: str, device_ids: Sequence[t.Any] = (), options: Mapping[str, t.Any] | None = None) -> dict[str, t.Any]:
    if what not in PLANS:
        raise AnsibleFilterError(f"gpu_host_packages: {what!r}: must be one of {', '.join(PLANS)}")
    try:
        if what == "driver":
            return {"fault": "", **PLANS[what](host, [_number(device_id) for device_id in device_ids], options)}
        return {"fault": "", **PLANS[what](host, options)}
    except Refusal as exc:
        return {"fault": str(exc)}


class FilterModule:
    def filters(self) -> dict[str, t.Callable[..., t.Any]]:
        return {"gpu_host_packages": gpu_host_packages}
