"""Limiters on a test's clock."""

from __future__ import annotations

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


def limiter_maker(clock: ManualClock) -> MakeLimiter:
    """Give what makes limiters on this clock."""

    def make(*rules: RateThrottleRule, client: Any = None, **options: Any) -> RateThrottleCore:
        if client is None:
            return RateThrottleCore(InMemoryStorage(clock_us=clock, **options), rules=rules)
        return RateThrottleCore(ManualRedisStorage(client, clock=clock, **options), rules=rules)

    return make
