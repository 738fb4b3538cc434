# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What each host did when: the spans of a run, and a picture of them."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Iterable, Sequence
from typing import Any

# A host that waits this long between two tasks of one role does something else meanwhile, or waits for others.
GAP = 2.0


@dataclasses.dataclass
class Span:
    """A host's uninterrupted work for one role in one play, in seconds since the run began."""

    host: str
    play: str
    role: str
    start: float
    end: float
    tasks: int = 1


def _moment(text: str) -> float:
    return datetime.datetime.fromisoformat(text).replace(tzinfo=datetime.timezone.utc).timestamp()


class Timeline:
    """Fed with ansible-runner's events; a task counts once its host is done with it."""

    def __init__(self) -> None:
        self.began: float | None = None
        self._spans: list[Span] = []
        self._last: dict[str, Span] = {}

    def feed(self, event: dict[str, Any]) -> None:
        data = event.get("event_data") or {}
        if event.get("event") not in ("runner_on_ok", "runner_on_failed", "runner_on_unreachable") or not (data.get("start") and data.get("end")):
            return
        start, end = _moment(data["start"]), _moment(data["end"])
        if self.began is None:
            self.began = start
        start, end = max(0.0, start - self.began), max(0.0, end - self.began)
        host, play, role = str(data.get("host")), str(data.get("play")), str(data.get("role") or "").rpartition(".")[2]
        # what every role calls belongs to its caller
        last = self._last.get(host)
        if role in ("container", "door", "packages") and last is not None and last.play == play:
            role = last.role
        if last is not None and last.play == play and last.role == role and start - last.end <= GAP:
            last.end, last.tasks = max(last.end, end), last.tasks + 1
            return
        self._last[host] = Span(host, play, role, start, end)
        self._spans.append(self._last[host])

    def spans(self) -> list[Span]:
        return sorted(self._spans, key=lambda span: (span.start, span.host))

    def as_data(self) -> list[dict[str, Any]]:
        return [{**dataclasses.asdict(span), "start": round(span.start, 2), "end": round(span.end, 2)} for span in self.spans()]


def parallel(spans: Iterable[Span], play: str) -> dict[str, float]:
    """Of one play, the sum of what its hosts worked, the longest of them, and the time from its first task to its last."""
    mine = [span for span in spans if span.play == play]
    hosts: dict[str, float] = {}
    for span in mine:
        hosts[span.host] = hosts.get(span.host, 0.0) + span.end - span.start
    return {
        "sum": round(sum(hosts.values()), 1),
        "longest": round(max(hosts.values(), default=0.0), 1),
        "wall": round(max((span.end for span in mine), default=0.0) - min((span.start for span in mine), default=0.0), 1),
    }


def picture(spans: Sequence[Span], width: int = 72) -> list[str]:
    """One line for each host and role, a mark where it worked."""
    if not spans:
        return []
    end = max(max(span.end for span in spans), 1.0)
    rows: dict[tuple[str, str], list[Span]] = {}
    for span in spans:
        rows.setdefault((span.host, span.role or "-"), []).append(span)
    names = {key: " ".join(key) for key in rows}
    room = max(map(len, names.values()))
    lines = [f"{'':{room}}  0{f'{end:.0f} s':>{width - 1}}"]
    for key in sorted(rows):
        marks = [" "] * width
        for span in rows[key]:
            first, last = int(span.start / end * (width - 1)), int(span.end / end * (width - 1))
            for index in range(first, last + 1):
                marks[index] = "#"
        lines.append(f"{names[key]:{room}}  {''.join(marks)}".rstrip())
    return lines
