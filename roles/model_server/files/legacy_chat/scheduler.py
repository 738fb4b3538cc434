# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The one thread that uses model and tokenizer: takes requests in, keeps the batch running, lets finished ones go at once."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from .cache import roomy
from .engine import Batch, Engine
from .metrics import Metrics
from .prompts import PromptError, PromptFormat
from .requests import ChatRequest, Refusal
from .sampling import Chooser, choose
from .text import Detokenizer, StopStrings

log = logging.getLogger("legacy_chat")

# Padded tokens of one prefill: what a running stream at most waits for a newcomer.
PREFILL_TOKENS = 2048
# A sticky fault of the device fails every pass; then it is better to be restarted.
HOPELESS = 3
# Steps after which one request more is tried again where memory ran out.
CALM = 2000

Event = tuple[str, Any]


@dataclass
class Limits:
    context: int
    response: int
    batch: int
    queue: int
    cache_tokens: int
    stall: float = 120.0


@dataclass(eq=False)
class Job:
    """One request. The event loop reads `events` and may set `cancelled`; everything else belongs to the scheduler."""

    request: ChatRequest
    loop: asyncio.AbstractEventLoop
    events: asyncio.Queue[Event] = field(default_factory=asyncio.Queue)
    arrived: float = field(default_factory=time.monotonic)
    cancelled: bool = False
    tokens: list[int] = field(default_factory=list)  # prompt and answer
    prompt: int = 0
    limit: int = 0
    chooser: Chooser | None = None
    detokenizer: Detokenizer | None = None
    stops: StopStrings | None = None

    @property
    def said(self) -> int:
        return len(self.tokens) - self.prompt


class Scheduler:
    def __init__(self, engine: Engine, form: PromptFormat, decode: Callable[[list[int]], str], ends: set[int],
                 defaults: dict[str, Any], limits: Limits, metrics: Metrics) -> None:
        self.engine, self.form, self.decode, self.ends = engine, form, decode, ends
        self.defaults, self.limits, self.metrics = defaults, limits, metrics
        self.inbox: deque[Job] = deque()
        self.waiting: deque[Job] = deque()
        self.running: list[Job] = []
        self.batch: Batch | None = None
        self.budget, self.most = limits.cache_tokens, limits.batch
        self.calm = 0  # steps since memory ran out
        self.beat = time.monotonic()
        self.failed: str | None = None
        self.deadline: float | None = None
        self._changed = threading.Condition()
        self._events: list[tuple[Job, Event]] = []
        self._mishaps = 0
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)
        metrics.running.set_function(lambda: len(self.running))
        metrics.waiting.set_function(lambda: len(self.inbox) + len(self.waiting))
        metrics.cache_tokens.set_function(self._in_use)
        metrics.cache_limit.set_function(lambda: self.budget)
        metrics.batch_limit.set(limits.batch)
        metrics.batching.set(1 if engine.batches else 0)
        metrics.up.set_function(lambda: 0 if self.trouble() else 1)

    # ------------------------------------------------------------ from the event loop

    def _in_use(self) -> int:
        batch = self.batch  # the thread may take it away meanwhile
        return len(self.running) * roomy(batch.width) if batch else 0

    def start(self) -> None:
        self._thread.start()

    def trouble(self) -> str:
        """Why this server is not healthy; empty when it is."""
        if self.failed or not self._thread.is_alive():
            return f"the scheduler ended: {self.failed or 'no reason known'}"
        still = time.monotonic() - self.beat
        if (self.running or self.waiting or self.inbox) and still > self.limits.stall:
            return f"the scheduler has not moved for {still:.0f} s"
        return ""

    def submit(self, job: Job) -> None:
        with self._changed:
            if self.deadline is not None:
                raise Refusal(503, "this server is being stopped; send the request again", code="stopping", retry_after=10)
            if self.failed or not self._thread.is_alive():
                raise Refusal(503, "this server's scheduler has ended; it will be restarted", code="unavailable", retry_after=30)
            if len(self.inbox) + len(self.waiting) >= self.limits.queue:
                self.metrics.requests.labels("refused").inc()
                raise Refusal(429, f"{self.limits.queue} requests wait already; send it again later", code="queue_full", retry_after=5)
            self.inbox.append(job)
            self._changed.notify()

    def drain(self, grace: float) -> None:
        """No new requests; what still runs after the grace ends with an error. Safe in a signal handler's thread."""
        self.deadline = time.monotonic() + grace

    def join(self, timeout: float) -> None:
        self._thread.join(timeout)

    # ------------------------------------------------------------ the thread

    def _run(self) -> None:
        try:
            while self._turn():
                pass
            self.failed = "stopped"
        except BaseException as error:
            self.failed = f"{type(error).__name__}: {error}"
            log.exception("the scheduler ends; every request from now on is refused")
        finally:
            with self._changed:
                left = [*self.running, *self.waiting, *self.inbox]
                self.running, self.batch = [], None
                self.waiting.clear()
                self.inbox.clear()
            for job in left:
                self._fail(job, Refusal(503, "this server ended before the answer was complete; send the request again", code="unavailable"))
            self._flush()

    def _turn(self) -> bool:
        with self._changed:
            if not (self.inbox or self.waiting or self.running):
                if self.deadline is not None:
                    return False
                self._changed.wait(0.5)
            new = list(self.inbox)
            self.inbox.clear()
        self.beat = time.monotonic()
        if self.deadline is not None and self.beat > self.deadline:
            self.waiting.extend(new)
            return False
        for job in new:
            self._accept(job)
        self._drop_cancelled()
        self._admit()
        # a first token does not wait for the second
        self._flush()
        if self.running:
            self._step()
        self._flush()
        return True

    def _accept(self, job: Job) -> None:
        request, limits = job.request, self.limits
        if job.cancelled:
            return self._count(job, "cancelled")
        try:
            job.tokens = self.form.chat(request.messages) if request.prompt is None else self.form.plain(request.prompt)
        except PromptError as error:
            return self._fail(job, Refusal(400, str(error), param="messages", code="invalid_value"))
        except Exception as error:
            log.exception("a prompt could not be built")
            return self._fail(job, Refusal(500, f"the prompt could not be built: {type(error).__name__}", code="prompt_failed"))
        job.prompt = len(job.tokens)
        if not job.tokens:
            return self._fail(job, Refusal(400, "the prompt is empty", param="messages", code="invalid_value"))
        if job.prompt >= limits.context:
            return self._fail(job, Refusal(
                400, f"This model's maximum context length is {limits.context} tokens; the messages have {job.prompt}, and the answer needs room."
                " Shorten them.", param="messages", code="context_length_exceeded"))
        wanted, own = request.params, self.defaults
        job.limit = min(wanted.max_tokens or limits.response, limits.response, limits.context - job.prompt)

        def pick(name: str, otherwise: Any) -> Any:
            value = getattr(wanted, name)
            return own.get(name, otherwise) if value is None else value

        job.chooser = Chooser(pick("temperature", 1.0), pick("top_p", 1.0), pick("top_k", 0), pick("repetition_penalty", 1.0),
                              wanted.presence_penalty, wanted.frequency_penalty, wanted.seed)
        job.chooser.prepare(job.tokens, self.engine.vocabulary, self.engine.device)
        job.detokenizer, job.stops = Detokenizer(self.decode), StopStrings(wanted.stop)
        self.metrics.prompt_tokens.inc(job.prompt)
        self._emit(job, ("start", job.prompt))
        self.waiting.append(job)
        return None

    def _drop_cancelled(self) -> None:
        for job in [one for one in self.waiting if one.cancelled]:
            self.waiting.remove(job)
            self._count(job, "cancelled")
        if any(one.cancelled for one in self.running):
            for job in self.running:
                if job.cancelled:
                    self._count(job, "cancelled")
            self._keep([row for row, job in enumerate(self.running) if not job.cancelled])

    def _keep(self, rows: list[int]) -> None:
        if self.batch is not None:
            self.batch = self.engine.keep(self.batch, rows)
        self.running = [self.running[row] for row in rows]

    def _admit(self) -> None:
        group: list[Job] = []
        width = self.batch.width if self.batch else 0
        while self.waiting and len(self.running) + len(group) < self.most:
            size = len(self.waiting[0].tokens)
            longest = max([size, *(len(one.tokens) for one in group)])
            if group and longest * (len(group) + 1) > PREFILL_TOKENS:
                break
            count = len(self.running) + len(group) + 1
            # some room to grow, so that it is not set back at once
            if count > 1 and count * roomy(max(width, longest) + 32) > self.budget:
                break
            group.append(self.waiting.popleft())
        if not group:
            return None
        try:
            logits, fresh = self.engine.prefill([one.tokens for one in group])
        except Exception as error:
            return self._mishap(error, group)
        rows = self._take(group, logits)
        kept = self.engine.keep(fresh, rows)
        if kept is None:
            return None
        before, self.batch = self.batch, None
        self.running += [group[row] for row in rows]
        try:
            self.batch = self.engine.join(before, kept)
        except Exception as error:
            everyone, self.running = self.running, []
            self._mishap(error, everyone)
        return None

    def _step(self) -> None:
        batch = self.batch
        assert batch is not None
        while len(self.running) > 1 and len(self.running) * roomy(batch.width + 1) > self.budget:
            self.metrics.preemptions.inc()
            self.waiting.appendleft(self.running[-1])
            self._keep(list(range(len(self.running) - 1)))
            assert self.batch is not None
            batch = self.batch
        began = time.monotonic()
        try:
            logits = self.engine.step(batch, [one.tokens[-1] for one in self.running])
        except Exception as error:
            everyone, self.running, self.batch = self.running, [], None
            return self._mishap(error, everyone)
        rows = self._take(self.running, logits)
        self._mishaps = 0
        self.calm += 1
        if self.most < self.limits.batch and self.calm > CALM:
            self.most, self.calm = self.most + 1, 0
        self.metrics.step.observe(time.monotonic() - began)
        if len(rows) < len(self.running):
            self._keep(rows)
        return None

    def _take(self, jobs: list[Job], logits: torch.Tensor) -> list[int]:
        """Gives each row its token; the rows that go on."""
        choosers = [one.chooser for one in jobs if one.chooser]
        rows = []
        for row, (job, token) in enumerate(zip(jobs, choose(logits, choosers), strict=True)):
            if token is None:
                self._fail(job, Refusal(500, "the model's numbers overflowed on this input; try another --dtype", code="not_a_number"))
            elif not self._grow(job, token):
                rows.append(row)
        return rows

    def _grow(self, job: Job, token: int) -> bool:
        """Whether the answer is complete with this token."""
        assert job.detokenizer and job.stops
        job.tokens.append(token)
        if job.said == 1:
            self.metrics.first_token.observe(time.monotonic() - job.arrived)
        if token in self.ends:
            return self._finish(job, "stop")
        text, stopped = job.stops.add(job.detokenizer.add(token))
        if text:
            self._emit(job, ("text", text))
        if stopped:
            return self._finish(job, "stop", flush=False)
        return self._finish(job, "length") if job.said >= job.limit else False

    def _finish(self, job: Job, reason: str, flush: bool = True) -> bool:
        if flush:
            assert job.detokenizer and job.stops
            text, stopped = job.stops.add(job.detokenizer.rest())
            text += "" if stopped else job.stops.rest()
            if text:
                self._emit(job, ("text", text))
            reason = "stop" if stopped else reason
        self.metrics.generated_tokens.inc(job.said)
        self._count(job, reason)
        self._emit(job, ("end", (reason, job.said)))
        return True

    # ------------------------------------------------------------ what goes wrong

    def _mishap(self, error: Exception, jobs: list[Job]) -> None:
        self.metrics.failures.inc()
        if isinstance(error, torch.OutOfMemoryError) and len(jobs) + len(self.running) > 1:
            # They start again from their tokens, fewer at a time.
            count = len(jobs) + len(self.running)
            self.most, self.calm = count - 1, 0
            log.warning("out of memory with %d requests: at most %d at once for some time; lower --cache-gb or --max-batch", count, self.most)
            self.waiting.extendleft(reversed(jobs))
            # its frames still hold what the pass had in memory
            error.with_traceback(None)
            torch.cuda.empty_cache()
            return
        log.error("a forward pass failed", exc_info=error)
        for job in jobs:
            self._fail(job, Refusal(500, f"the model failed on this request: {type(error).__name__}", code="model_failed"))
        self._mishaps += 1
        if self._mishaps >= HOPELESS:
            raise RuntimeError(f"{HOPELESS} forward passes in a row failed") from error

    def _fail(self, job: Job, refusal: Refusal) -> None:
        self._count(job, "refused" if refusal.status < 500 else "failed")
        self._emit(job, ("fail", refusal))

    def _count(self, job: Job, outcome: str) -> None:
        self.metrics.requests.labels(outcome).inc()
        self.metrics.duration.observe(time.monotonic() - job.arrived)

    # ------------------------------------------------------------ to the event loop

    def _emit(self, job: Job, event: Event) -> None:
        self._events.append((job, event))

    def _flush(self) -> None:
        if not self._events:
            return
        events, self._events = self._events, []

        def deliver() -> None:
            for job, event in events:
                job.events.put_nowait(event)

        try:
            events[0][0].loop.call_soon_threadsafe(deliver)
        except RuntimeError:  # the loop is closed: nobody listens any more
            pass
