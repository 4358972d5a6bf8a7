"""The compiled hot paths whose instructions are counted."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import count, islice
from typing import Any

from benchmarks.recorded import recorded_limiter
from benchmarks.strategies import STRATEGIES, YEAR_S, limiter
from ratethrottle import RateThrottleRule

FEW, MANY = 256, 2_304  # whole calls of 1, 32 and 128 checks


@dataclass
class Prepared:
    """A limiter in the state that a path needs."""

    limiter: Any
    fresh: bool = False
    together: int = 1  # checks of distinct keys, at the same time
    _numbers: count[int] = field(default_factory=count)

    def keys(self, checks: int) -> list[str]:
        """Give the keys to check: always the same one, or ones that were never there, all of one length."""
        if self.together > 1:
            return [f"user:{number:09d}" for number in range(self.together)] * (checks // self.together)
        return [f"user:{number:09d}" for number in islice(self._numbers, checks)] if self.fresh else ["user:42"] * checks


async def hit(strategy: str) -> Prepared:
    """One key, always allowed. The window is so long that the clock plays no part."""
    return Prepared(limiter(strategy, 1_000_000_000, YEAR_S))


async def denied(strategy: str) -> Prepared:
    """One key, always denied."""
    prepared = Prepared(limiter(strategy, 1, YEAR_S))
    await prepared.limiter.check("user:42")
    return prepared


async def fresh(strategy: str) -> Prepared:
    """Keys never seen, in a table that grows."""
    return Prepared(limiter(strategy, 100, YEAR_S, 10_000_000), fresh=True)


async def evicting(strategy: str) -> Prepared:
    """Keys never seen, in a table that is full of keys that aren't fresh."""
    # Over many shards the lucky and the unlucky ones even out.
    prepared = Prepared(limiter(strategy, 100, YEAR_S, 20_000), fresh=True)
    for key in prepared.keys(22_000):
        await prepared.limiter.check(key)
    return prepared


async def called(together: int) -> Prepared:
    """So many keys at once, which Redis allows: entered, sent as one call, answered and woken."""
    rule = RateThrottleRule("rule", 1_000_000_000, YEAR_S, strategy="token_bucket")
    return Prepared(recorded_limiter(rule, granted=True), together=together)


async def prefiltered() -> Prepared:
    """One key that Redis has denied."""
    rule = RateThrottleRule("rule", 1, YEAR_S, strategy="token_bucket")
    prepared = Prepared(recorded_limiter(rule, granted=False))
    await prepared.limiter.check("user:42")
    return prepared


async def leased() -> Prepared:
    """One key with a lease that lasts for all checks."""
    rule = RateThrottleRule("rule", 1_000_000_000, YEAR_S, strategy="token_bucket", lease=True)
    prepared = Prepared(recorded_limiter(rule, granted=True))
    while (await prepared.limiter.check("user:42")).source != "lease":
        await asyncio.gather(*(prepared.limiter.check("user:42") for _ in range(20_000)))
    return prepared


PATHS: dict[str, Callable[[], Awaitable[Prepared]]] = {
    **{f"hit, {strategy}": partial(hit, strategy) for strategy in STRATEGIES},
    **{f"denied, {strategy}": partial(denied, strategy) for strategy in STRATEGIES},
    **{f"fresh key, {strategy}": partial(fresh, strategy) for strategy in ("token_bucket", "sliding_window")},
    **{f"full and evicting, {strategy}": partial(evicting, strategy) for strategy in ("token_bucket", "sliding_window")},
    **{f"redis, {together} checks a call": partial(called, together) for together in (1, 32, 128)},
    "prefiltered": prefiltered,
    "leased": leased,
}
