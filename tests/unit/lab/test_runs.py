# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a run changed is read from ansible-runner's events."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

if sys.version_info < (3, 11):
    pytest.skip("the lab runs on Python 3.11", allow_module_level=True)
pytest.importorskip("ansible_runner")

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "lab"))

from sflab.runs import has_changed  # noqa: E402

CENSORED = {"censored": "the output has been hidden"}


@pytest.mark.parametrize(
    "result, printed, changed",
    [
        ({"changed": True}, "", True),
        ({"changed": False}, "ok: [app-1]", False),
        (CENSORED, "\x1b[0;33mchanged: [app-1]\x1b[0m", True),
        (CENSORED, "[WARNING]: Docker warning: it was so\n\x1b[0;33mchanged: [app-1]\x1b[0m", True),
        (CENSORED, "\r\nTASK [container : Run it] ***\r\n\x1b[0;33mchanged: [app-1]\x1b[0m", True),
        (CENSORED, "[WARNING]: it has changed: [x]\nok: [app-1]", False),
        (None, None, False),
    ],
)
def test_has_changed(result: Any, printed: Any, changed: bool) -> None:
    assert has_changed({"stdout": printed, "event_data": {"res": result}}) is changed
