# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The key/value cache of a running batch: rows of different length, aligned at their end, that join and leave.

A model keeps it either in a Cache object of transformers or in a tuple of (key, value) per layer. Which dimension is the batch and
which the sequence is found by looking at what the model returns for two sizes of input.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

Pairs = list[tuple[torch.Tensor, torch.Tensor]]


class Draining(list[Any]):
    """Gives a layer's cache away for good when the next layer's is asked for: a step then needs one layer's room twice, not every layer's."""

    def __getitem__(self, index: Any) -> Any:
        found = list.__getitem__(self, index)
        if isinstance(index, int) and index > 0:
            list.__setitem__(self, index - 1, None)
        return found

    def __iter__(self) -> Iterator[Any]:
        return (self[index] for index in range(len(self)))


@dataclass(frozen=True)
class Layout:
    native: bool  # a Cache object
    batch: int
    sequence: int
    token_bytes: int
    drain: bool = True

    def pairs(self, past: Any) -> Pairs:
        return pairs_of(past)

    def past(self, pairs: Pairs) -> Any:
        if not self.native:
            return pairs
        cache = DynamicCache()
        for key, value in pairs:
            layer = DynamicLayer()
            layer.lazy_initialization(key)
            layer.keys, layer.values = key, value
            cache.layers.append(layer)
        return cache

    def given(self, past: Any) -> Any:
        """What the model's forward gets."""
        if self.native:
            return past
        return Draining(past) if self.drain else tuple(past)

    def kept(self, past: Any) -> Any:
        """What is kept of what forward returned."""
        return past if self.native else pairs_of(past)

    def _front(self, tensor: torch.Tensor, more: int) -> torch.Tensor:
        if not more:
            return tensor
        shape = list(tensor.shape)
        shape[self.sequence] = more
        return torch.cat([tensor.new_zeros(shape), tensor], dim=self.sequence)

    def join(self, first: Any, second: Any, pad_first: int, pad_second: int) -> Any:
        one, two, out = self.pairs(first), self.pairs(second), []
        if self.native:
            first.layers.clear()
            second.layers.clear()
        for layer in range(len(one)):
            both = zip(one[layer], two[layer], strict=True)
            key, value = (torch.cat([self._front(a, pad_first), self._front(b, pad_second)], dim=self.batch) for a, b in both)
            out.append((key, value))
            one[layer] = two[layer] = None  # type: ignore[call-overload]
        return self.past(out)

    def keep(self, past: Any, rows: list[int], cut: int) -> Any:
        pairs, out = self.pairs(past), []
        if self.native:
            past.layers.clear()
        for layer in range(len(pairs)):
            key, value = (
                one.index_select(self.batch, torch.tensor(rows, device=one.device)).narrow(self.sequence, cut, one.shape[self.sequence] - cut)
                for one in pairs[layer])
            out.append((key, value))
            pairs[layer] = None  # type: ignore[call-overload]
        return self.past(out)


def pairs_of(past: Any) -> Pairs:
    if isinstance(past, Cache):
        return [(layer.keys, layer.values) for layer in past.layers]
    # tuple or list of layers, or one tensor that holds all of them
    return [(layer[0], layer[1]) for layer in past]


def find_layout(small: Any, longer: Any, wider: Any) -> Layout:
    """From the caches of inputs of 1 x 3, 1 x 5 and 2 x 3 tokens. ValueError if this is no cache that can be batched."""
    shapes = [[tuple(one.shape) for pair in pairs_of(past) for one in pair] for past in (small, longer, wider)]
    if not shapes[0]:
        raise ValueError("the model returned no cache")
    sequence = {at for a, b in zip(shapes[0], shapes[1], strict=True) for at, (x, y) in enumerate(zip(a, b, strict=True)) if x != y}
    batch = {at for a, b in zip(shapes[0], shapes[2], strict=True) for at, (x, y) in enumerate(zip(a, b, strict=True)) if x != y}
    if len(sequence) != 1 or len(batch) != 1 or sequence == batch:
        raise ValueError(f"cache of shapes {shapes[0][:2]}, {shapes[1][:2]} and {shapes[2][:2]}")
    at = sequence.pop()
    if any(shape[at] != 3 for shape in shapes[0]):
        raise ValueError(f"cache of shapes {shapes[0][:2]} for 3 tokens")
    size = sum(one.numel() * one.element_size() for pair in pairs_of(small) for one in pair) // 3
    return Layout(isinstance(small, Cache), batch.pop(), at, size)
