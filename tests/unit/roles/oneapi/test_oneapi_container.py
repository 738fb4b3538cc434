# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""How the role oneapi runs its container: a healthcheck that needs only what an image has."""

from __future__ import annotations

import http.server
import shutil
import subprocess
import threading
from pathlib import Path

import pytest
import yaml

CONTAINER = Path(__file__).resolve().parents[4] / "roles" / "oneapi" / "tasks" / "container.yml"
RUN = next(task for task in yaml.safe_load(CONTAINER.read_text(encoding="utf-8")) if task["name"] == "Start One-API")["vars"]
YES, NO = b'{"data":{"version":"v0.6.10"},"message":"","success":true}', b'{"message":"no","success":false}'


class Status(http.server.BaseHTTPRequestHandler):
    body = YES

    def do_GET(self):  # noqa: N802
        self.send_response(200 if self.path == "/api/status" else 404)
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, *unused):
        pass


@pytest.fixture
def port():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Status)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()
    server.server_close()


def healthy(tmp_path, port, *tools):
    """The check as Docker runs it, in an image that has these tools only."""
    for name in tools:
        found = shutil.which(name)
        if found is None:
            pytest.skip(f"this machine has no {name}")
        (tmp_path / name).symlink_to(found)
    kind, text = RUN["container_healthcheck"]["test"]
    assert kind == "CMD-SHELL"
    return subprocess.run(["/bin/sh", "-c", text.replace("3000", str(port))], env={"PATH": str(tmp_path)}, check=False, timeout=20).returncode == 0


@pytest.mark.parametrize("tools", [("wget",), ("curl",), ("bash", "cat")])
def test_any_of_three_tools_does(tmp_path, port, tools):
    Status.body = YES
    assert healthy(tmp_path, port, *tools)


@pytest.mark.parametrize("tools", [("wget",), ("curl",), ("bash", "cat")])
def test_an_answer_that_says_no_is_no_health(tmp_path, port, tools):
    Status.body = NO
    assert not healthy(tmp_path, port, *tools)


@pytest.mark.parametrize("tools", [("wget",), ("curl",), ("bash", "cat"), ()])
def test_nobody_there_is_no_health(tmp_path, tools):
    assert not healthy(tmp_path, 9, *tools)
