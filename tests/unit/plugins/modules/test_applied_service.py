# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""applied_service where systemd is not the first process; with systemd it is tested on the hosts of the scenarios."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(os.path.isdir("/run/systemd/system"), reason="systemd runs this machine")
SCRIPT = """#!/bin/sh
echo "$1 $2" >>{root}/calls
case $2 in
  status) [ -e {root}/running ];;
  start|restart) touch {root}/running;;
esac
"""


@pytest.fixture
def ask(tmp_path: pathlib.Path) -> Any:
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "service").write_text(SCRIPT.format(root=tmp_path))
    (tools / "service").chmod(0o755)
    (tmp_path / "daemon.json").write_text("{}\n")

    def run(check: bool = False, script: str | None = None, **more: Any) -> dict[str, Any]:
        if script is not None:
            (tools / "service").write_text(script)
        arguments = {"name": "docker", "files": [str(tmp_path / "daemon.json")], "state_dir": str(tmp_path / "applied"), "_ansible_check_mode": check, **more}
        done = subprocess.run(
            [sys.executable, "-m", "ansible_collections.selfhosted.fastgpt.plugins.modules.applied_service"],
            input=json.dumps({"ANSIBLE_MODULE_ARGS": arguments}),
            env={**os.environ, "PATH": f"{tools}:/usr/bin:/bin", "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            check=False,
        )
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer

    return run


def calls(root: pathlib.Path) -> list[str]:
    return [line for line in (root / "calls").read_text().splitlines() if not line.endswith("status")]


def test_it_is_started_and_restarted_only_on_a_change(ask: Any, tmp_path: pathlib.Path) -> None:
    assert ask(check=True)["actions"] == ["start"]
    assert not (tmp_path / "running").exists()
    assert ask()["actions"] == ["start"]
    assert ask() == {**ask(), "changed": False, "actions": []}
    (tmp_path / "daemon.json").write_text('{"live-restore": true}\n')
    assert ask(check=True)["actions"] == ["restart"]
    assert ask()["actions"] == ["restart"]
    assert ask()["changed"] is False
    assert calls(tmp_path) == ["docker start", "docker restart"]


def test_a_refused_configuration_restarts_nothing(ask: Any, tmp_path: pathlib.Path) -> None:
    ask()
    (tmp_path / "daemon.json").write_text("nonsense")
    found = ask(validate=["false"])
    assert found["failed"] and "left as it runs" in found["msg"]
    assert calls(tmp_path) == ["docker start"]
    # what a killed or refused run owes is not forgotten
    assert ask()["actions"] == ["restart"]


def test_a_service_without_a_script_is_named(ask: Any) -> None:
    missing = "#!/bin/sh\necho docker: unrecognized service >&2\nexit 1\n"
    assert "no script of the service docker" in ask(script=missing)["msg"]
    assert ask(script=missing, check=True)["changed"] is True


def test_a_start_that_fails_is_told(ask: Any) -> None:
    assert "service docker start failed: no" in ask(script="#!/bin/sh\ncase $2 in status) exit 3;; *) echo no >&2; exit 1;; esac\n")["msg"]
