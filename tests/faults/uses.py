"""What the tasks of a worker do in turn: checks alone, or all that a user can."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta

from ratethrottle import ConcurrencyRule, Decision, RateLimitExceeded, RateThrottleCore, RateThrottleRule, Request
from tests.faults.records import monotonic_us

LIMIT, WINDOW_S = 100, 10
BUCKET, WINDOW, WIDE, LEASED, BOOKED, QUOTA, DAY, SLOTS = range(8)
RULES = (
    RateThrottleRule("bucket", LIMIT, WINDOW_S, strategy="token_bucket"),
    RateThrottleRule("window", LIMIT, WINDOW_S, strategy="sliding_window"),
    # It never denies, so that something always has to be asked.
    RateThrottleRule("wide", 10**9, timedelta(days=365), strategy="fixed_window"),
)
ALL_RULES = (
    *RULES,
    RateThrottleRule("leased", LIMIT, WINDOW_S, strategy="sliding_window", lease=True),
    RateThrottleRule("booked", LIMIT, WINDOW_S, strategy="token_bucket", burst=20),
    RateThrottleRule("quota", LIMIT, WINDOW_S, strategy="sliding_window"),
    RateThrottleRule("day", 2 * LIMIT, "day", strategy="fixed_window", timezone="Europe/Berlin"),
    ConcurrencyRule("slots", 4, ttl=2),
)
UNCOUNTED = ("wide", "slots")  # rules by which no interval holds too many units
WAIT_S, HOLD_S = 0.1, 0.1
# So many slots are held for so long, in seconds: they have to be renewed.
LONG, LONG_S = 0.05, 3.0
LATE_US = 250_000
ESTIMATE = 3


Limits = list[tuple[int, int]]  # rules and keys, by number


@dataclass
class Ask:
    """A limiter, and what one task asks of it.

    held: is given a decision, the limit, and from when to when a slot was held, in us. holds: likewise, when that begins. turn: how many
    asks there were before this one. limits: what it asks for.
    """

    limiter: RateThrottleCore
    keys: Sequence[str]
    random: random.Random
    held: Callable[[Decision, tuple[int, int], int, int], None]
    holds: Callable[[Decision, tuple[int, int], int], None]
    turn: int = 0
    limits: Limits = field(default_factory=list)

    def one(self, rule: int, key: int) -> tuple[str, str]:
        """Ask for a unit of one limit: its key and rule."""
        self.limits = [(rule, key)]
        return self.keys[key], ALL_RULES[rule].name

    def charged(self, decision: Decision) -> Limits:
        """Tell which limits a decision has charged, or which one has denied it."""
        if decision.allowed:
            return self.limits
        if self.limits[0][0] in {BOOKED, SLOTS} and decision.source == "overload":
            return []  # it has waited for as long as it may, behind others: nobody has decided
        return [one for one in self.limits if ALL_RULES[one[0]].name == decision.rule][:1]


Used = AsyncIterator[Decision]
Use = Callable[[Ask, int, int], AbstractAsyncContextManager[Decision]]


@asynccontextmanager
async def checks(ask: Ask, key: int, other: int) -> Used:
    """Check. Of four, one is under the rule that never denies, and one under both of the others at once."""
    if ask.turn % 4 == 2:
        ask.limits = [(BUCKET, key), (WINDOW, key)]
        yield await ask.limiter.check(ask.keys[key], ("bucket", "window"))
    else:
        yield await ask.limiter.check(*ask.one(WIDE if ask.turn % 4 == 0 else ask.random.randrange(WIDE), key))


@asynccontextmanager
async def everything(ask: Ask, key: int, other: int) -> Used:
    """Do all that a user can: joint checks of two keys, leases, waiting, reservations, slots, a calendar, and plain checks."""
    try:
        match ask.turn % 8:
            case 0:
                ask.limits = [(BUCKET, key), (QUOTA, other)]
                yield await ask.limiter.check_all([Request(ask.keys[key], "bucket"), Request(ask.keys[other], "quota")])
            case 1 | 2:
                yield await ask.limiter.check(*ask.one(LEASED, key))
            case 3:
                yield await ask.limiter.acquire(*ask.one(BOOKED, key), timeout=WAIT_S)
            case 4:
                async with ask.limiter.reserve(*ask.one(QUOTA, key), cost=ESTIMATE) as reservation:
                    reservation.settle(1)
                    yield reservation.decision
            case 5 if ask.turn % 16 == 5:
                async with ask.limiter.slot(*ask.one(SLOTS, key % 4), timeout=WAIT_S) as slot:
                    began_us, limit = monotonic_us(), (SLOTS, key % 4)
                    ask.holds(slot.decision, limit, began_us)
                    yield slot.decision
                    with suppress(TimeoutError):
                        lasts_s = LONG_S if ask.random.random() < LONG else ask.random.uniform(0, HOLD_S)
                        await asyncio.wait_for(slot.lost.wait(), lasts_s)
                    # It was lost before this task heard of it, by as much as the loop is late.
                    ended_us = max(began_us, monotonic_us() - LATE_US * slot.lost.is_set())
                    ask.held(slot.decision, limit, began_us, ended_us)
            case 5:
                yield await ask.limiter.check(*ask.one(DAY, key))
            case _:
                async with checks(ask, key, other) as decision:
                    yield decision
    except RateLimitExceeded as denied:
        yield denied.decision
