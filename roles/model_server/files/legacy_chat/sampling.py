# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Logits of a batch to one token per row."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch


@dataclass
class Chooser:
    """How one request chooses, and what it has seen so far."""

    temperature: float
    top_p: float
    top_k: int
    repetition: float
    presence: float
    frequency: float
    seed: int | None = None
    seen: torch.Tensor | None = None  # which tokens stand in prompt or answer
    counts: torch.Tensor | None = None  # how often in the answer
    noise: torch.Generator | None = None

    @property
    def greedy(self) -> bool:
        return self.temperature < 1e-3 or self.top_k == 1 or self.top_p == 0

    @property
    def plain(self) -> bool:
        return self.greedy and self.repetition == 1 and not self.presence and not self.frequency

    def prepare(self, prompt: list[int], size: int, device: torch.device) -> None:
        if self.repetition != 1:
            self.seen = torch.zeros(size, dtype=torch.bool, device=device)
            self.seen[torch.tensor([one for one in prompt if one < size], device=device, dtype=torch.long)] = True
        if self.presence or self.frequency:
            self.counts = torch.zeros(size, device=device)
        if not self.greedy:
            self.noise = torch.Generator(device=device)
            self.noise.manual_seed(int.from_bytes(os.urandom(8), "big") >> 1 if self.seed is None else self.seed & (2**63 - 1))

    def record(self, token: int) -> None:
        if self.seen is not None:
            self.seen[token] = True
        if self.counts is not None:
            self.counts[token] += 1

    def penalised(self, row: torch.Tensor) -> torch.Tensor:
        if self.seen is not None:
            row = torch.where(self.seen, torch.where(row > 0, row / self.repetition, row * self.repetition), row)
        if self.counts is not None:
            row = row - self.counts * self.frequency - (self.counts > 0) * self.presence
        return row


@torch.inference_mode()
def choose(logits: torch.Tensor, choosers: list[Chooser]) -> list[int | None]:
    """None where the model gave no usable numbers."""
    sound = torch.isfinite(logits.amax(-1)).tolist()
    if all(one.plain for one in choosers):
        picked = logits.argmax(-1).tolist()
    else:
        rows = torch.stack([one.penalised(row) for one, row in zip(choosers, logits.float(), strict=True)])
        picked = rows.argmax(-1).tolist()
        drawn = [at for at, one in enumerate(choosers) if not one.greedy and sound[at]]
        if drawn:
            for at, token in zip(drawn, _draw(rows[drawn], [choosers[at] for at in drawn]).tolist(), strict=True):
                picked[at] = token
    for chooser, token, good in zip(choosers, picked, sound, strict=True):
        if good:
            chooser.record(token)
    return [token if good else None for token, good in zip(picked, sound, strict=True)]


def _draw(rows: torch.Tensor, choosers: list[Chooser]) -> torch.Tensor:
    rows = rows / torch.tensor([one.temperature for one in choosers], device=rows.device).view(-1, 1)
    if any(one.top_k or one.top_p < 1 for one in choosers):
        rows, order = rows.sort(-1, descending=True)
        size = rows.shape[-1]
        most = torch.tensor([one.top_k or size for one in choosers], device=rows.device).view(-1, 1)
        rows = rows.masked_fill(torch.arange(size, device=rows.device) >= most, float("-inf"))
        share = rows.softmax(-1)
        # a token stays if those before it do not yet reach top_p
        over = share.cumsum(-1) - share > torch.tensor([one.top_p for one in choosers], device=rows.device).view(-1, 1)
        rows = rows.masked_fill(over, float("-inf"))
    else:
        order = None
    share = rows.softmax(-1)
    # The largest of share/exponential noise is a draw by share, with each row's own generator.
    noise = torch.stack([torch.empty_like(share[at]).exponential_(generator=one.noise) for at, one in enumerate(choosers)])
    picked = (share / noise.clamp(min=1e-30)).argmax(-1, keepdim=True)
    return (picked if order is None else order.gather(-1, picked)).view(-1)
