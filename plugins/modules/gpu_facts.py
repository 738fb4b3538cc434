#!/usr/bin/python
# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

DOCUMENTATION = r"""
module: gpu_facts
short_description: NVIDIA GPUs of a host, also where the driver is missing or broken
version_added: 1.0.0
description:
  - Finds GPUs on the PCI bus, which needs no driver, and asks C(nvidia-smi) for what only the driver knows.
  - A missing, broken or half updated driver is a fact, not a failure. It stands in RV(problem) with what helps.
  - Where the driver is too old to say the compute capability, it is looked up by the PCI device id.
author:
  - selfhosted.fastgpt contributors (@selfhosted)
extends_documentation_fragment:
  - selfhosted.fastgpt._attributes
attributes:
  check_mode:
    support: full
  diff_mode:
    support: N/A
    details: It changes nothing.
  idempotent:
    support: full
options:
  own_services:
    description:
      - Systemd units, with V(*) as a wildcard, and ids of containers whose processes are nobody else's. What they use of a GPU is left out of
        RV(gpus[].memory_foreign_mb).
    type: list
    elements: str
    default: []
  sysfs_path:
    description: Where the kernel's sysfs is mounted.
    type: path
    default: /sys
  timeout:
    description: How long C(nvidia-smi) may take, in seconds. Without the persistence daemon it starts every GPU first.
    type: int
    default: 60
"""

EXAMPLES = r"""
- name: Look at the GPUs
  selfhosted.fastgpt.gpu_facts:
  register: host

- name: Refuse a host whose driver does not work
  ansible.builtin.assert:
    that: host.problem == ''
    fail_msg: "{{ host.problem }}"
"""

RETURN = r"""
gpus:
  description: GPUs in the order of their index. Empty where the host has none of NVIDIA.
  returned: always
  type: list
  elements: dict
  contains:
    index:
      description: Number of the GPU. Without a driver it is the place on the bus.
      type: int
    name:
      description: Name as the driver gives it, without a driver a short one.
      type: str
    uuid:
      description: UUID, null without a driver.
      type: str
    pci_bus:
      description: Address on the PCI bus as the kernel writes it.
      type: str
    device_id:
      description: PCI device id as four hexadecimal digits, null where the bus does not show the GPU.
      type: str
    kernel_driver:
      description: Name of the kernel's driver that has the GPU, such as C(nvidia), C(nouveau) or C(vfio-pci); null where none has.
      type: str
    memory_mb:
      description: Memory in MiB, null where the driver does not say it.
      type: int
    memory_used_mb:
      description: Memory in use in MiB, null where the driver does not say it.
      type: int
    memory_foreign_mb:
      description:
        - Memory in use in MiB by others than O(own_services). Null where the driver does not say it, also where it does not say it of one of those.
      type: int
    compute_capability:
      description: Compute capability, null for a GPU that neither the driver nor the table knows.
      type: str
    driver_version:
      description: Version of the driver, null without one.
      type: str
    mig:
      description: Whether MIG is on, null where the GPU has none or the driver does not say.
      type: bool
    problem:
      description: Why this GPU cannot be used, and what helps. Empty for one that can.
      type: str
  sample:
    - {index: 0, name: NVIDIA L20, uuid: GPU-11111111-2222-3333-4444-555555555555, pci_bus: "0000:3b:00.0", device_id: 26ba, kernel_driver: nvidia,
       memory_mb: 46068, memory_used_mb: 1, memory_foreign_mb: 1, compute_capability: "8.9", driver_version: 580.173.02, mig: null, problem: ""}
driver_version:
  description: Version of the driver, empty without one.
  returned: always
  type: str
  sample: 580.173.02
loaded_version:
  description: Version of the kernel module in memory, empty where none is. After an update it differs from the driver on disk until the host is rebooted.
  returned: always
  type: str
  sample: 580.173.02
cuda_version:
  description: Newest CUDA that the driver runs, empty without a driver that says it.
  returned: always
  type: str
  sample: "13.0"
nvswitches:
  description: NVSwitches on the PCI bus. GPUs behind them work only with the fabric manager.
  returned: always
  type: int
  sample: 0
problem:
  description: What is wrong with the host's GPUs or their driver, and what helps. Empty where nothing is.
  returned: always
  type: str
ansible_facts:
  description: The same values, in the fact C(nvidia).
  returned: always
  type: dict
  contains:
    nvidia:
      description: Dictionary with gpus, driver_version, loaded_version, cuda_version, nvswitches and problem.
      type: dict
"""

from typing import List, Tuple

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.selfhosted.fastgpt.plugins.module_utils._gpus import count_nvswitches, gather, loaded_driver, scan_bus, subtract_own


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "own_services": {"type": "list", "elements": "str", "default": []},
            "sysfs_path": {"type": "path", "default": "/sys"},
            "timeout": {"type": "int", "default": 60},
        },
        supports_check_mode=True,
    )
    root = module.params["sysfs_path"]
    smi = module.get_bin_path("nvidia-smi")
    # a GPU in a bad state makes it wait for ever
    limit = module.get_bin_path("timeout")
    prefix = [limit, "-k", "5", str(module.params["timeout"])] if limit else []

    def run(args: List[str]) -> Tuple[int, str]:
        rc, out, err = module.run_command([*prefix, str(smi), *args], environ_update={"LC_ALL": "C"}, handle_exceptions=False)
        return rc, out if out.strip() else err

    try:
        facts = gather(scan_bus(root), loaded_driver(root), run if smi else None, count_nvswitches(root))
        if module.params["own_services"] and any(gpu["memory_foreign_mb"] for gpu in facts["gpus"]):
            subtract_own(facts, run, module.params["own_services"])
    except OSError as exc:
        # the file is there and cannot be run, such as one for another architecture
        reason = "%s cannot be run: %s" % (smi, exc)
        facts = gather(scan_bus(root), loaded_driver(root), lambda args: (126, reason), count_nvswitches(root))
    module.exit_json(changed=False, ansible_facts={"nvidia": facts}, **facts)


if __name__ == "__main__":
    main()
