# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What Prometheus reads."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        name = "legacy_chat_"
        common = {"registry": self.registry}
        self.requests = Counter(name + "requests", "Requests by how they ended", ["outcome"], **common)
        self.prompt_tokens = Counter(name + "prompt_tokens", "Tokens of accepted prompts", **common)
        self.generated_tokens = Counter(name + "generated_tokens", "Tokens of answers", **common)
        self.preemptions = Counter(name + "preemptions", "Requests set back because the cache was full", **common)
        self.failures = Counter(name + "model_failures", "Forward passes that raised", **common)
        self.first_token = Histogram(name + "time_to_first_token_seconds", "From arrival to the first token", buckets=SECONDS, **common)
        self.duration = Histogram(name + "request_seconds", "From arrival to the end", buckets=SECONDS, **common)
        self.step = Histogram(name + "step_seconds", "One decoding step of the batch", buckets=SECONDS, **common)
        self.running = Gauge(name + "running", "Requests in the batch", **common)
        self.waiting = Gauge(name + "waiting", "Requests before the batch", **common)
        self.cache_tokens = Gauge(name + "cache_tokens", "Tokens of cache in use, padding included", **common)
        self.cache_limit = Gauge(name + "cache_tokens_limit", "Tokens of cache that may be in use", **common)
        self.batch_limit = Gauge(name + "batch_limit", "Requests that may run at once", **common)
        self.batching = Gauge(name + "batching", "0 if this model answers wrongly in a batch and is served one at a time", **common)
        self.up = Gauge(name + "scheduler_up", "1 while the scheduler lives and moves", **common)

    def text(self) -> bytes:
        return generate_latest(self.registry)
