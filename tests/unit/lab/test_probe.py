# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The probe counts a failure as one, a door that is down not, and stops."""

from __future__ import annotations

import socket
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

if sys.version_info < (3, 11):
    pytest.skip("the lab runs on Python 3.11", allow_module_level=True)

from ports import free_port  # noqa: E402
from probe import Failed, Outcome, Probe, post, summary  # noqa: E402


class Door(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/cut":
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        self.send_response(502 if self.path == "/bad" else 200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"ok")


@pytest.fixture
def door():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Door)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield "127.0.0.1", server.server_port
    server.shutdown()


def closed():
    return "127.0.0.1", free_port()


def asking(path):
    def ask(door):
        status, _body = post(door, path, {}, {})
        if status != 200:
            raise Failed(f"HTTP {status}")

    return ask


@pytest.mark.parametrize("path, fault", [("/", ""), ("/bad", "HTTP 502"), ("/cut", "no answer: RemoteDisconnected")])
def test_what_comes_of_a_question(door, path, fault):
    outcome = Probe([door], asking(path)).once()
    assert (outcome.fault, outcome.left) == (fault, 0) and outcome.ended >= outcome.started


def test_a_door_that_is_down_is_left_for_the_next(door):
    probe = Probe([closed(), door], asking("/"))
    found = [probe.once() for _time in range(4)]
    assert [outcome.left for outcome in found] == [1, 0, 1, 0] and not any(outcome.fault for outcome in found)
    # a question that was sent is not asked again elsewhere
    assert Probe([door, door], asking("/cut")).once().left == 0


def test_no_door_at_all():
    outcome = Probe([closed(), closed()], asking("/")).once()
    assert (outcome.fault, outcome.left) == ("no door can be connected to", 2)


def test_it_asks_until_it_is_left(door):
    with Probe([door], asking("/"), every=0.01) as probe:
        begin = time.monotonic()
        time.sleep(0.3)
    asked = len(probe.outcomes)
    assert probe.since(begin).asked > 4 and probe.since(begin).failed == 0
    time.sleep(0.05)
    assert len(probe.outcomes) == asked


def test_a_question_that_hangs_keeps_no_other_from_being_asked():
    hung = threading.Event()

    def ask(_door):
        if not hung.is_set():
            hung.set()
            time.sleep(0.6)

    with Probe([("127.0.0.1", 1)], ask, every=0.02) as probe:
        begin = time.monotonic()
        time.sleep(0.3)
        assert len(probe.outcomes) > 4
        probe.settle()
        assert probe.since(begin).slowest >= 0.6
    assert not any(outcome.fault for outcome in probe.outcomes)


def test_summary_counts_what_was_under_way():
    outcomes = [Outcome(0, 1), Outcome(0, 2.5, "HTTP 502"), Outcome(3, 4, "", 1), Outcome(3.5, 5, "HTTP 502"), Outcome(9, 10, "late")]
    found = summary(outcomes, 2, 6)
    assert (found.asked, found.failed, found.moved, found.slowest, found.last_failure) == (3, 2, 1, 2.5, 5)
    assert found.faults == {"HTTP 502": 2}
    assert summary(outcomes, 6, 8) == summary([], 0, 1)
