# Copyright: selfhosted.fastgpt contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the One-API stand-in keeps in Redis, and in its own memory where there is none: rate limits, and copies of rows.

Written from the recorded contract: Redis counts only with SYNC_FREQUENCY beside it, which is also how long a copy lives. So a
token that was switched off or a model that came is seen late, and a database that is gone is not missed at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable
from typing import Any

import redis

SECONDS = 3


class RateLimiter:
    """A sliding log of the accepted requests of each client, lost with the process."""

    def __init__(self) -> None:
        self.seen: dict[str, list[int]] = {}

    def allow(self, mark: str, address: str, limit: int, seconds: int) -> bool:
        if limit == 0:
            return True
        queue = self.seen.setdefault(mark + address, [])
        now = int(time.time())
        if len(queue) >= limit:
            if now - queue[0] < seconds:
                return False
            queue.pop(0)
        queue.append(now)
        return True


class SharedRateLimiter(RateLimiter):
    """The same in Redis: every node counts in one log. A Redis that fails raises, which becomes an empty 500."""

    def __init__(self, link: redis.Redis) -> None:
        super().__init__()
        self.link = link

    def allow(self, mark: str, address: str, limit: int, seconds: int) -> bool:
        if limit == 0:
            return True
        name, now = f"rateLimit:{mark}{address}", time.time()
        if int(self.link.llen(name)) >= limit:  # type: ignore[arg-type]
            oldest: Any = self.link.lindex(name, -1)
            if oldest is not None and now - float(oldest) < seconds:
                self.link.expire(name, seconds)
                return False
            self.link.ltrim(name, 0, limit - 2)
        self.link.lpush(name, str(now))
        self.link.expire(name, seconds)
        return True


class Copies:
    """Rows by name, for so many seconds; without Redis every read goes to the database."""

    def __init__(self, link: redis.Redis | None, seconds: int, log: Callable[[str], None]) -> None:
        self.link, self.seconds, self.log = link, seconds, log

    def get(self, name: str, read: Callable[[], Any]) -> Any:
        if self.link is None:
            return read()
        with contextlib.suppress(redis.RedisError):
            found: Any = self.link.get(name)
            if found is not None:
                return json.loads(found)
        value = read()
        if value is not None:
            self.put(name, value)
        return value

    def put(self, name: str, value: Any) -> None:
        if self.link is None:
            return
        try:
            self.link.set(name, json.dumps(value), ex=self.seconds)
        except redis.RedisError as exc:
            self.log(f"Redis set {name.partition(':')[0]} error: {exc}")


def open_redis(log: Callable[[str], None], fatal: Callable[[str], None]) -> redis.Redis | None:
    """The link, or None where it is not wanted; a Redis that does not answer at the start is fatal."""
    url = os.environ.get("REDIS_CONN_STRING") or ""
    if not url:
        log("REDIS_CONN_STRING not set, Redis is not enabled")
        return None
    if not os.environ.get("SYNC_FREQUENCY"):
        log("SYNC_FREQUENCY not set, Redis is disabled")
        return None
    log("Redis is enabled")
    try:
        link: redis.Redis = redis.Redis.from_url(url, decode_responses=True, socket_timeout=SECONDS, socket_connect_timeout=SECONDS)
        link.ping()
    except (redis.RedisError, ValueError) as exc:
        fatal(f"Redis ping test failed: {exc}" if isinstance(exc, redis.RedisError) else f"failed to parse Redis connection string: {exc}")
        raise
    return link
