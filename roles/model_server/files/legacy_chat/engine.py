# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Forward passes over batches whose rows join and leave, and the check that batching changes no answer."""

from __future__ import annotations

import inspect
import logging
import math
from dataclasses import replace
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache

from .cache import Layout, find_layout
from .compat import LoadError, lean_alibi, lean_attention

log = logging.getLogger("legacy_chat")


class Batch:
    """Rows aligned at their end: `lengths` real tokens each, behind padding up to the longest."""

    def __init__(self, past: Any, lengths: list[int], width: int) -> None:
        self.past, self.lengths, self.width = past, lengths, width


class Engine:
    def __init__(self, model: Any, *, vocabulary: int, exact: bool) -> None:
        self.model = model
        self.vocabulary = vocabulary
        self.device = model.get_input_embeddings().weight.device
        self._dtype = model.get_input_embeddings().weight.dtype
        self._takes = set(inspect.signature(model.forward).parameters)
        last = [name for name in ("logits_to_keep", "num_logits_to_keep") if name in self._takes]
        self._extra: dict[str, Any] = {last[0]: 1} if last else {}
        if "return_last_logit" in self._takes:
            self._extra["return_last_logit"] = True
        if "return_dict" in self._takes:
            self._extra["return_dict"] = True
        # cuDNN's attention makes a plan for every length of the cache that is new to it: 37 ms of a step of 60 on an H100
        torch.backends.cuda.enable_cudnn_sdp(False)
        self._tolerance = 2e-3 if exact else 0.15
        self._lean = self._ready = self._grouped = False
        self.batches = True
        self.layout = self._probe()
        self._settle()

    # ------------------------------------------------------------ forward

    @torch.inference_mode()
    def _forward(self, tokens: list[list[int]], lengths: list[int], width: int, past: Any) -> tuple[torch.Tensor, Any]:
        """tokens: the new ones of each row, padded in front; lengths and width: after this call."""
        new = len(tokens[0])
        given: dict[str, Any] = dict(self._extra)
        have = torch.tensor(lengths, device=self.device).view(-1, 1)
        if "position_ids" in self._takes:
            given["position_ids"] = (have - new + torch.arange(new, device=self.device)).clamp(min=0)
        if min(lengths) < width and "attention_mask" in self._takes:
            keys = torch.arange(width, device=self.device)
            mask = keys >= width - have
            if self._ready:
                mask = mask.view(-1, 1, 1, width) & (keys <= torch.arange(width - new, width, device=self.device).view(-1, 1))
                given["attention_mask"] = torch.zeros(mask.shape, dtype=self._dtype, device=self.device).masked_fill_(~mask, torch.finfo(self._dtype).min)
            else:
                given["attention_mask"] = mask.long().unsqueeze(1).expand(-1, new, -1) if self._lean else mask.long()
        ids = torch.tensor(tokens, device=self.device)
        out = self.model(input_ids=ids, past_key_values=past, use_cache=True, **given)
        return out.logits[:, -1, : self.vocabulary], out.past_key_values

    def prefill(self, prompts: list[list[int]]) -> tuple[torch.Tensor, Batch]:
        lengths = [len(one) for one in prompts]
        width = max(lengths)
        tokens = [[0] * (width - len(one)) + one for one in prompts]
        logits, past = self._forward(tokens, lengths, width, DynamicCache() if self.layout.native else None)
        return logits, Batch(self.layout.kept(past), lengths, width)

    def step(self, batch: Batch, tokens: list[int]) -> torch.Tensor:
        batch.lengths = [one + 1 for one in batch.lengths]
        batch.width += 1
        past, batch.past = self.layout.given(batch.past), None
        logits, past = self._forward([[one] for one in tokens], batch.lengths, batch.width, past)
        batch.past = self.layout.kept(past)
        return logits

    @torch.inference_mode()
    def join(self, first: Batch | None, second: Batch) -> Batch:
        if first is None:
            return second
        width = max(first.width, second.width)
        past = self.layout.join(first.past, second.past, width - first.width, width - second.width)
        return Batch(past, first.lengths + second.lengths, width)

    @torch.inference_mode()
    def keep(self, batch: Batch, rows: list[int]) -> Batch | None:
        if not rows:
            return None
        if rows == list(range(len(batch.lengths))):
            return batch
        lengths = [batch.lengths[row] for row in rows]
        cut = batch.width - max(lengths)
        return Batch(self.layout.keep(batch.past, rows, cut), lengths, batch.width - cut)

    # ------------------------------------------------------------ start

    def _ids(self, count: int, salt: int) -> list[int]:
        """Some tokens of the vocabulary, the same at every start."""
        return [(salt * 7919 + one * 104729) % max(self.vocabulary - 300, 50) % self.vocabulary + min(200, self.vocabulary // 4) for one in range(count)]

    def _probe(self) -> Layout:
        try:
            _unused, past = self._forward([self._ids(3, 1)], [3], 3, None)
            native = isinstance(past, Cache)
            caches = [past] if not native else []
            for rows, length in ([(1, 3)] if native else []) + [(1, 5), (2, 3)]:
                tokens = [self._ids(length, 2 + row) for row in range(rows)]
                caches.append(self._forward(tokens, [length] * rows, length, DynamicCache() if native else None)[1])
            return find_layout(*caches)
        except Exception as error:
            raise LoadError(f"{type(self.model).__name__}: a first run of the model failed; this engine cannot serve it: "
                            f"{type(error).__name__}: {error}") from error

    def _settle(self) -> None:
        """Takes the leanest way of calling the model that gives the right answers; one at a time if batching gives wrong ones."""
        undo = lean_alibi(self.model)
        self._lean = undo is not None
        if undo and not self._lean_is_right(undo):
            undo, self._lean = None, False
        self._grouped = self._grouped_is_right()
        # Models of transformers itself take a finished mask, which spares them most of a small step's time.
        self._ready = self.layout.native and self._sees_all()
        for grow, drain in ((True, True), (False, True), (False, False)):
            self.layout = replace(self.layout, grow=grow, drain=drain)
            trouble = self._wrong_batches()
            if not trouble:
                return
            self._ready = False
        if undo:
            undo()
            self._lean = False
            trouble = self._wrong_batches()
            if not trouble:
                return
        self.batches = False
        log.warning("BATCHING OFF: %s answers differently in a batch than alone (%s); requests are served one at a time",
                    type(self.model).__name__, trouble)
        try:
            self._alone(self._ids(5, 3), 3)
        except Exception as error:
            raise LoadError(f"{type(self.model).__name__}: this engine cannot decode with it: {type(error).__name__}: {error}") from error

    def _sees_all(self) -> bool:
        """Whether every layer sees the whole past; one that sees a window of it makes its own mask."""
        config = self.model.config.get_text_config()
        windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
        return not any(windows) and set(getattr(config, "layer_types", None) or ["full_attention"]) == {"full_attention"}

    def _lean_is_right(self, undo: Any) -> bool:
        """Whether our ALiBi rows give what the model's own give."""
        own = self.model.model.get_alibi_mask
        prompt = self._ids(11, 4)
        ours = self._forward([prompt], [11], 11, None)[0]
        undo()
        limit = getattr(self.model.model, "max_cache_pos", None)
        if limit is not None:
            self.model.model.max_cache_pos = 32  # its buffer is square in this
        try:
            theirs = self._forward([prompt], [11], 11, None)[0]
        finally:
            if limit is not None:
                self.model.model.max_cache_pos = limit
                self.model.model.first_run = True
                if hasattr(self.model.model, "future_mask"):
                    del self.model.model.future_mask
        if self._distance(ours, theirs) > self._tolerance:
            return False
        self.model.model.get_alibi_mask = own
        return True

    def _grouped_is_right(self) -> bool:
        """Whether attention over shared keys is ours from now on: where it gives what the model's own gives."""
        undo = lean_attention(self.model)
        if undo is None:
            return False
        prompt = self._ids(11, 7)
        try:
            ours = self._alone(prompt, 1)[0][1]
            undo()
            theirs = self._alone(prompt, 1)[0][1]
        except Exception:  # what is wrong with such a model is found, and told, below
            undo()
            return False
        return self._distance(ours, theirs) <= self._tolerance and lean_attention(self.model) is not None

    def _distance(self, one: torch.Tensor, two: torch.Tensor) -> float:
        one, two = one.float(), two.float()
        spread = (two - two.mean()).norm().item()
        distance = (one - two).norm().item() / max(spread, 1e-9)
        return float("inf") if math.isnan(distance) else distance

    def _alone(self, prompt: list[int], steps: int) -> tuple[list[torch.Tensor], list[int]]:
        logits, batch = self.prefill([prompt])
        seen, tokens = [logits[0]], [int(logits[0].argmax())]
        for _unused in range(steps):
            logits = self.step(batch, tokens[-1:])
            seen.append(logits[0])
            tokens.append(int(logits[0].argmax()))
        return seen, tokens

    def _wrong_batches(self) -> str:
        """Compares two rows that join, run and part with the same rows alone. Empty when they agree."""
        short, long = self._ids(5, 5), self._ids(23, 6)
        try:
            alone, said = self._alone(short, 6)
            other, told = self._alone(long, 5)
            logits, batch = self.prefill([short])
            pairs = [(logits[0], alone[0])]
            pairs.append((self.step(batch, said[:1])[0], alone[1]))
            late_logits, late = self.prefill([long])
            pairs.append((late_logits[0], other[0]))
            batch = self.join(batch, late)
            for at in range(3):
                logits = self.step(batch, [said[1 + at], told[at]])
                pairs += [(logits[0], alone[2 + at]), (logits[1], other[1 + at])]
            kept = self.keep(batch, [0])
            assert kept is not None
            for at in (4, 5):
                pairs.append((self.step(kept, [said[at]])[0], alone[at + 1]))
            logits, batch = self.prefill([short, long])
            pairs += [(logits[0], alone[0]), (logits[1], other[0])]
            logits = self.step(batch, [said[0], told[0]])
            pairs += [(logits[0], alone[1]), (logits[1], other[1])]
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        worst = max(self._distance(one, two) for one, two in pairs)
        return "" if worst <= self._tolerance else f"relative distance of logits {worst:.2g}, allowed {self._tolerance:g}"
