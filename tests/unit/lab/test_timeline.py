# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

from sflab.timeline import Timeline, parallel, picture


def event(host, role, start, end, play="services", kind="runner_on_ok"):
    at = "2026-01-01T00:00:{:09.6f}"
    data = {"host": host, "play": play, "role": role, "start": at.format(start), "end": at.format(end)}
    return {"event": kind, "event_data": data}


def test_tasks_of_one_role_are_one_span():
    line = Timeline()
    for one in (
        event("a", "selfhosted.fastgpt.mongodb", 10, 12),
        event("b", "selfhosted.fastgpt.oneapi", 10.5, 20),
        event("a", "selfhosted.fastgpt.container", 12.1, 15),
        event("a", "selfhosted.fastgpt.mongodb", 15, 16),
        # ten seconds later it is another piece of work, as is another play
        event("a", "selfhosted.fastgpt.mongodb", 26, 27),
        event("a", "selfhosted.fastgpt.mongodb", 27, 28, play="wire"),
        event("a", "selfhosted.fastgpt.mongodb", 28, 29, play="wire", kind="runner_on_failed"),
        event("a", "selfhosted.fastgpt.mongodb", 40, 41, kind="runner_on_skipped"),
        {"event": "playbook_on_stats", "event_data": {}},
    ):
        line.feed(one)
    found = [(span["host"], span["play"], span["role"], span["start"], span["end"], span["tasks"]) for span in line.as_data()]
    assert found == [
        ("a", "services", "mongodb", 0, 6, 3),
        ("b", "services", "oneapi", 0.5, 10, 1),
        ("a", "services", "mongodb", 16, 17, 1),
        ("a", "wire", "mongodb", 17, 19, 2),
    ]
    assert parallel(line.spans(), "services") == {"sum": 16.5, "longest": 9.5, "wall": 17.0}


def test_the_picture():
    line = Timeline()
    line.feed(event("a", "x.y.mongodb", 0, 10))
    line.feed(event("b", "", 5, 10))
    lines = picture(line.spans(), width=11)
    assert lines == ["           0      10 s", "a mongodb  ###########", "b -             ######"]
    assert picture([]) == []
