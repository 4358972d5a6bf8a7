"""The compiled hot paths whose instructions are counted."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import count, islice

from benchmarks.strategies import STRATEGIES, YEAR_S, limiter
from ratethrottle import RateThrottleCore

FEW, MANY = 300, 2_300


@dataclass
class Prepared:
    """A limiter in the state that a path needs."""

    limiter: RateThrottleCore
    fresh: bool = False
    _numbers: count[int] = field(default_factory=count)

    def keys(self, checks: int) -> list[str]:
        """Give the keys to check: always the same one, or ones that were never there, all of one length."""
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


PATHS: dict[str, Callable[[], Awaitable[Prepared]]] = {
    **{f"hit, {strategy}": partial(hit, strategy) for strategy in STRATEGIES},
    **{f"denied, {strategy}": partial(denied, strategy) for strategy in STRATEGIES},
    **{f"fresh key, {strategy}": partial(fresh, strategy) for strategy in ("token_bucket", "sliding_window")},
    **{f"full and evicting, {strategy}": partial(evicting, strategy) for strategy in ("token_bucket", "sliding_window")},
}
