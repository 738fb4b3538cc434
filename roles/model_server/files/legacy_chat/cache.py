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

# Tokens that a cache has room for beyond those in it, at most: once in so many steps it is copied.
ROOM = 32


def roomy(width: int) -> int:
    """Tokens that a row of so many takes."""
    return -(-width // ROOM) * ROOM


class Grown:
    """A tensor of the cache that grows at its end: in place as long as its buffer has room."""

    def __init__(self, tensor: torch.Tensor, sequence: int) -> None:
        self._buffer, self.sequence, self.length = tensor, sequence, tensor.shape[sequence]

    def append(self, new: torch.Tensor) -> torch.Tensor:
        at, had = self.sequence, self.length
        more = new.shape[at]
        if had + more > self._buffer.shape[at]:
            shape = list(self._buffer.shape)
            shape[at] = roomy(had + more)
            wider = self._buffer.new_empty(shape)
            wider.narrow(at, 0, had).copy_(self._buffer.narrow(at, 0, had))
            self._buffer = wider
        self._buffer.narrow(at, had, more).copy_(new)
        self.length += more
        return self._buffer.narrow(at, 0, self.length)


class GrownLayer(DynamicLayer):
    """A layer of a Cache that appends in place."""

    def __init__(self, key: torch.Tensor, value: torch.Tensor, sequence: int) -> None:
        super().__init__()
        self.lazy_initialization(key)
        self.keys, self.values = key, value
        self._grown = Grown(key, sequence), Grown(value, sequence)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, cache_kwargs: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
        self.keys, self.values = self._grown[0].append(key_states), self._grown[1].append(value_states)
        return self.keys, self.values


class Tail(torch.Tensor):
    """What a model that keeps a tuple gets as its past: where its code concatenates the new token to it, that is appended in place."""

    grown: Grown

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        parts = args[0] if func is torch.cat and args else ()
        if len(parts) == 2 and isinstance(parts[0], Tail) and not isinstance(parts[1], Tail) and set(kwargs) <= {"dim"}:
            grown, (_unused, new) = parts[0].grown, parts
            dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
            if dim % new.dim() == grown.sequence and new.dtype == parts[0].dtype and grown.length == parts[0].shape[dim]:
                longer = grown.append(new)
                longer.grown = grown  # type: ignore[attr-defined]
                return longer
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)


def tail(tensor: torch.Tensor, sequence: int) -> torch.Tensor:
    """Goes on in the buffer that the last step has appended to."""
    grown = getattr(tensor, "grown", None)
    made = tensor.as_subclass(Tail)
    made.grown = grown if grown is not None and grown.length == tensor.shape[sequence] else Grown(tensor, sequence)
    return made


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
    grow: bool = True
    drain: bool = True

    def pairs(self, past: Any) -> Pairs:
        return pairs_of(past)

    def past(self, pairs: Pairs) -> Any:
        if not self.native:
            return pairs
        cache = DynamicCache()
        for key, value in pairs:
            if self.grow:
                layer: DynamicLayer = GrownLayer(key, value, self.sequence)
            else:
                layer = DynamicLayer()
                layer.lazy_initialization(key)
                layer.keys, layer.values = key, value
            cache.layers.append(layer)
        return cache

    def given(self, past: Any) -> Any:
        """What the model's forward gets."""
        if self.native:
            return past
        if self.grow:
            # each pair is let go as it is replaced, so that Draining holds the last reference
            for at, (key, value) in enumerate(past):
                past[at] = tail(key, self.sequence), tail(value, self.sequence)
        return Draining(past) if self.drain else tuple(past)

    def kept(self, past: Any) -> Any:
        """What is kept of what forward returned."""
        if not self.native:
            return pairs_of(past)
        if self.grow and not isinstance(past.layers[0], GrownLayer):
            pairs = pairs_of(past)
            past.layers.clear()
            return self.past(pairs)
        return past

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
        wanted = torch.tensor(rows, device=pairs[0][0].device)
        for layer in range(len(pairs)):
            key, value = (
                one.index_select(self.batch, wanted.to(one.device)).narrow(self.sequence, cut, one.shape[self.sequence] - cut)
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
