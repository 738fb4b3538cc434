# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Token ids to text that can be sent: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

HALF = "\ufffd"
# A character has at most four bytes; what does not become one after this many tokens never will.
PATIENCE = 6
# Tokens that are decoded together at most, where no token ends with a character.
WINDOW = 64


class Detokenizer:
    """Decodes a short window, because the text of a token depends on its neighbours."""

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._start = 0  # where the window begins
        self._done = 0  # tokens whose text is out to the end
        self._moved = 0  # tokens when text last came out
        self._out = ""  # text of the window that is out

    def add(self, token: int) -> str:
        self._ids.append(token)
        text = self._decode(self._ids[self._start :])
        count = len(self._ids)
        whole = not text.endswith(HALF) or count - self._moved >= PATIENCE or count - self._start > WINDOW
        if not whole:
            text = text.rstrip(HALF)
        fresh = text[len(self._out) :]
        if fresh:
            self._moved = count
        if whole and (fresh or count - self._start > WINDOW):
            self._start, self._done = self._done, count
            self._out = self._decode(self._ids[self._start :])
        elif fresh:
            self._out = text
        return fresh

    def rest(self) -> str:
        return self._decode(self._ids[self._start :])[len(self._out) :].rstrip(HALF)


class StopStrings:
    """Holds back what may be the beginning of a stop string."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def add(self, text: str) -> tuple[str, bool]:
        """What may be sent, and whether a stop string was reached."""
        if not self._stops:
            return text, False
        self._held += text
        ends = [at for at in (self._held.find(stop) for stop in self._stops) if at >= 0]
        if ends:
            return self._held[: min(ends)], True
        keep = max((size for stop in self._stops for size in range(min(len(stop) - 1, len(self._held)), 0, -1)
                    if self._held.endswith(stop[:size])), default=0)
        out, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return out, False

    def rest(self) -> str:
        held, self._held = self._held, ""
        return held
