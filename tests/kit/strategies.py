"""Rules, clocks and costs for random tests."""

from __future__ import annotations

import random
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any, Literal

from hypothesis import strategies as st

from ratethrottle import ConfigurationError, RateThrottleRule

START_US = 1_800_000_000_000_000
STRATEGIES = ("sliding_window", "token_bucket", "leaky_bucket", "sliding_counter", "fixed_window")
SHAPES = (
    (1, 0.001),
    (3, 1),
    (5, 0.007),
    (64, 1),
    (65, 1),
    (1000, 10),
    (7, 60),
    (99_991, 3600),
    (123_457, 86_400),
    (10**9, 86_400),
    (23, 604_800),
    (5_000, 1_209_600),
)


def make_rule(
    strategy: str,
    limit: int,
    window: int | Literal["day", "week", "month"],
    burst: int | None = None,
    timezone: str = "UTC",
    anchor: int | None = None,
) -> RateThrottleRule:
    """A rule named "rule"; its window in µs or by the calendar, and `burst` counts for buckets only."""
    if isinstance(window, str):
        return RateThrottleRule("rule", limit, window, strategy=strategy, timezone=timezone, anchor=anchor)
    burst = burst if strategy.endswith("bucket") else None
    return RateThrottleRule("rule", limit, timedelta(microseconds=window), strategy=strategy, burst=burst)


@cache
def known_rules() -> list[RateThrottleRule]:
    """Every strategy in small, large, exact, slotted, coarse and rounded shapes."""
    rules = []
    for strategy in STRATEGIES:
        for limit, window in SHAPES:
            rules.append(RateThrottleRule("rule", limit, window, strategy=strategy))
            if strategy.endswith("bucket"):
                try:
                    rules.append(RateThrottleRule("rule", limit, window, strategy=strategy, burst=max(1, limit // 3)))
                    rules.append(RateThrottleRule("rule", limit, window, strategy=strategy, burst=10 * limit))
                except ConfigurationError:
                    continue  # ten times the largest limit is no burst any more
    return rules


CALENDARS: tuple[dict[str, Any], ...] = (
    {"window": "day"},
    {"window": "day", "timezone": "Europe/Berlin"},
    {"window": "day", "timezone": "America/Havana"},  # its clocks change at midnight
    {"window": "day", "timezone": "Pacific/Kiritimati"},
    {"window": "week"},
    {"window": "week", "timezone": "America/New_York", "anchor": 7},
    {"window": "week", "timezone": "Australia/Lord_Howe", "anchor": 4},
    {"window": "month"},
    {"window": "month", "anchor": 31},
    {"window": "month", "timezone": "Asia/Kathmandu", "anchor": 15},
)


@cache
def calendar_rules() -> list[RateThrottleRule]:
    """Fixed windows by the calendar."""
    return [
        RateThrottleRule("rule", limit, strategy="fixed_window", **calendar) for calendar in CALENDARS for limit in (1, 5, 1_000)
    ]


@dataclass(frozen=True)
class Step:
    """Move the clock, then check or peek."""

    advance_us: int
    cost: int
    consume: bool


def random_step(rng: random.Random, rule: RateThrottleRule, *, backwards: bool = True) -> Step:
    """A step whose time and cost are on the scale of the rule."""
    window, kind = rule.window_us, rng.random()
    if kind < 0.5:
        advance = rng.randrange(max(2, window // 50))
    elif kind < 0.65:
        advance = rng.choice((0, 0, 1, 2))
    elif kind < 0.8:
        advance = rng.randrange(window)
    elif kind < 0.88 or not backwards:
        advance = rng.randrange(3 * window)
    elif kind < 0.96:
        advance = -rng.randrange(1, window // 20 + 2)
    else:
        advance = -rng.randrange(2 * window)
    capacity = rule.capacity
    cost = min(
        capacity, rng.choice((1, 1, 1, 2, capacity, rng.randint(1, capacity), max(1, capacity // 10), max(1, capacity // 3)))
    )
    return Step(advance, cost, rng.random() > 0.1)


rules = st.sampled_from(known_rules())
seeds = st.integers(0, 2**32)
