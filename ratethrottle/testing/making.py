"""Limiters on a test's clock."""

from __future__ import annotations

import asyncio
import threading
from typing import Any, Protocol

from ratethrottle.limiter import RateThrottleCore
from ratethrottle.rule import RateThrottleRule
from ratethrottle.storage.memory import InMemoryStorage
from ratethrottle.testing.clock import ManualClock
from ratethrottle.testing.manual import ManualRedisStorage


class MakeLimiter(Protocol):
    """What the fixture `ratethrottle_limiter` is."""

    def __call__(self, *rules: RateThrottleRule, client: Any = None, **options: Any) -> RateThrottleCore:
        """Make a limiter with these rules, in memory, or with a client on Redis. options: those of the storage."""


class LimiterMaker:
    """Makes limiters on a clock, and closes them in the end."""

    def __init__(self, clock: ManualClock) -> None:
        self._clock = clock
        self._made: list[RateThrottleCore] = []

    def __call__(self, *rules: RateThrottleRule, client: Any = None, **options: Any) -> RateThrottleCore:
        """Make one."""
        clock = self._clock
        storage = (
            InMemoryStorage(clock_us=clock, **options) if client is None else ManualRedisStorage(client, clock=clock, **options)
        )
        limiter = RateThrottleCore(storage, rules=rules)
        self._made.append(limiter)
        return limiter

    def close(self) -> None:
        """Close those that are open still, and delete their keys. The event loop of their test may be gone."""
        made, self._made = [limiter for limiter in self._made if not limiter._closed], []
        if made:
            closing = threading.Thread(target=lambda: asyncio.run(_close(made)))  # since a loop may be current in this one
            closing.start()
            closing.join()


async def _close(limiters: list[RateThrottleCore]) -> None:
    for limiter in limiters:
        await limiter.aclose()
