# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Asks FastGPT all the time, as somebody does who knows all its doors, and keeps what came of every question.

A door that cannot be connected to is left for the next one, as browsers do with a name of several addresses. Once a question
is sent, whatever goes wrong is a failure: nobody asks it again.
"""

from __future__ import annotations

import dataclasses
import http.client
import itertools
import json
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

CONNECT_SECONDS = 3.0
ANSWER_SECONDS = 40.0


class Failed(Exception):
    """A question without its answer."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One question; times are of time.monotonic()."""

    started: float
    ended: float
    fault: str = ""
    # doors that could not be connected to
    left: int = 0


@dataclasses.dataclass(frozen=True)
class Summary:
    """All questions that were under way in a span of time, and are over."""

    asked: int
    failed: int
    moved: int
    slowest: float
    last_failure: float | None
    faults: dict[str, int]


def summary(outcomes: Sequence[Outcome], begin: float, end: float) -> Summary:
    """A question counts where any moment of it lies in the span, so one that was in flight at a fault counts as hit by it."""
    inside = [outcome for outcome in outcomes if outcome.ended >= begin and outcome.started <= end]
    failed = [outcome for outcome in inside if outcome.fault]
    faults: dict[str, int] = {}
    for outcome in failed:
        faults[outcome.fault] = faults.get(outcome.fault, 0) + 1
    return Summary(
        asked=len(inside), failed=len(failed), moved=sum(1 for outcome in inside if outcome.left and not outcome.fault),
        slowest=round(max((outcome.ended - outcome.started for outcome in inside), default=0.0), 1),
        last_failure=max((outcome.ended for outcome in failed), default=None), faults=faults,
    )  # fmt: skip


def post(door: tuple[str, int], path: str, body: Any, headers: dict[str, str], timeout: float = ANSWER_SECONDS) -> tuple[int, bytes]:
    """One request to one door. ConnectionRefusedError and the like before anything was sent come out as ConnectionError of connect."""
    link = http.client.HTTPConnection(*door, timeout=CONNECT_SECONDS)
    link.connect()
    try:
        link.sock.settimeout(timeout)
        link.request("POST", path, json.dumps(body), {"Content-Type": "application/json", **headers})
        answer = link.getresponse()
        return answer.status, answer.read()
    except (OSError, http.client.HTTPException) as exc:
        raise Failed(f"no answer: {type(exc).__name__}") from exc
    finally:
        link.close()


class Probe:
    """One question every so many seconds, whatever became of those before: a client that waits for an answer does not keep others from asking."""

    def __init__(self, doors: Sequence[tuple[str, int]], ask: Callable[[tuple[str, int]], None], every: float = 1.5) -> None:
        self.doors, self.ask, self.every = list(doors), ask, every
        self.outcomes: list[Outcome] = []
        self.stop = threading.Event()
        self.turn = itertools.count()
        self.clock = threading.Thread(target=self.tick, daemon=True)
        self.threads: list[threading.Thread] = []

    def __enter__(self) -> Probe:
        self.clock.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.stop.set()
        self.clock.join()
        for thread in self.threads:
            thread.join(ANSWER_SECONDS + 10)

    def tick(self) -> None:
        while not self.stop.is_set():
            self.threads = [thread for thread in self.threads if thread.is_alive()]
            thread = threading.Thread(target=self.keep, daemon=True)
            thread.start()
            self.threads.append(thread)
            self.stop.wait(self.every)

    def keep(self) -> None:
        self.outcomes.append(self.once())

    def once(self) -> Outcome:
        first, started, fault, left = next(self.turn), time.monotonic(), "no door can be connected to", 0
        for number in range(len(self.doors)):
            try:
                self.ask(self.doors[(first + number) % len(self.doors)])
                fault = ""
                break
            except Failed as exc:
                fault = str(exc)
                break
            except OSError:
                left += 1
            except (LookupError, TypeError, ValueError) as exc:
                fault = f"an answer of another form: {type(exc).__name__}"
                break
        return Outcome(started, time.monotonic(), fault, left)

    def settle(self) -> None:
        """Until every question that is out now has come to its end."""
        for thread in list(self.threads):
            thread.join(ANSWER_SECONDS + 10)

    def since(self, begin: float, end: float | None = None) -> Summary:
        return summary(list(self.outcomes), begin, time.monotonic() if end is None else end)
