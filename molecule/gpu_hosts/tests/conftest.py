# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import os
import pathlib
import sys
from typing import Any

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT / "tests" / "support"), str(ROOT / "lab")]
from machines import host  # noqa: E402 - its path was just added
from sflab.runs import Run, run_playbook  # noqa: E402

PLAY = """
- hosts: gpu-13
  become: true
  gather_facts: false
  tasks:
    - ansible.builtin.include_role: {{name: selfhosted.fastgpt.{role}, tasks_from: {entry}}}
    - ansible.builtin.debug: {{var: told}}
      vars:
        told:
          pending: "{{{{ nvidia_driver_reboot_pending | default('unset') }}}}"
          checks: "{{{{ nvidia_driver__verified | default([]) + nvidia_container_toolkit__verified | default([]) }}}}"
"""


@pytest.fixture
def machine() -> Any:
    """The host that the tests below spoil and mend."""
    return host("gpu-13")


@pytest.fixture
def run(tmp_path: pathlib.Path) -> Any:
    """One role on that host, as a playbook of somebody else would run it."""

    def play(role: str, entry: str = "main", **variables: Any) -> Run:
        playbook = tmp_path / "play.yml"
        playbook.write_text(PLAY.format(role=role, entry=entry))
        environment = {name: os.environ[name] for name in ("LAB_NET", "LAB_HOME")}
        return run_playbook(
            playbook,
            [str(ROOT / "molecule" / "gpu_hosts" / "inventory" / "hosts.yml")],
            tmp_path / "run",
            extravars=variables,
            environment=environment,
            quiet=True,
        )

    return play
