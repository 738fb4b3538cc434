# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import json
import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[3] / "tests" / "support"))
from lab_hosts import vault  # noqa: E402 - its path was just added
from machines import host  # noqa: E402


@pytest.fixture(scope="session")
def secrets():
    return vault()


@pytest.fixture(scope="session")
def environment():
    """What a container on a host was started with."""

    def read(machine: str, container: str) -> dict[str, str]:
        found = json.loads(host(machine).check_output(f"docker inspect {container}"))[0]
        return dict(entry.split("=", 1) for entry in found["Config"]["Env"])

    return read
