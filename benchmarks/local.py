"""In-memory decisions by regime and strategy, beside awaiting an empty coroutine and the peers, in one interleaved run."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

from aiolimiter import AsyncLimiter
from limits import RateLimitItemPerSecond
from limits.aio.storage import MemoryStorage
from limits.aio.strategies import FixedWindowRateLimiter, MovingWindowRateLimiter, SlidingWindowCounterRateLimiter
from pyrate_limiter import InMemoryBucket, Limiter, Rate
from throttled.asyncio import RateLimiterType, Throttled, rate_limiter

from benchmarks.strategies import STRATEGIES, YEAR_S, limiter
from benchmarks.timing import Figures, Options, Subject, await_empty, interleave, table

EMPTY = "an empty coroutine, awaited"


def hit(strategy: str) -> Subject:
    """Check one key that is there and always allowed."""
    core = limiter(strategy, 1_000_000_000, 1)

    async def run(n: int) -> int:
        start = time.perf_counter_ns()
        for _ in range(n):
            await core.check("user:42")
        return time.perf_counter_ns() - start

    return run


def denied(strategy: str) -> Subject:
    """Check one key that is there and always denied."""
    core = limiter(strategy, 1, YEAR_S)

    async def run(n: int) -> int:
        await core.check("user:42")
        start = time.perf_counter_ns()
        for _ in range(n):
            await core.check("user:42")
        return time.perf_counter_ns() - start

    return run


def fresh(strategy: str, max_keys: int) -> Subject:
    """Check a key never seen before each time; the table grows, or is full and evicts when `max_keys` is small."""
    core = limiter(strategy, 100, YEAR_S, max_keys)
    seen = 0

    async def run(n: int) -> int:
        nonlocal seen
        keys = [f"user:{i}" for i in range(seen, seen + n)]
        seen += n
        start = time.perf_counter_ns()
        for key in keys:
            await core.check(key)
        return time.perf_counter_ns() - start

    return run


def peers() -> dict[str, tuple[Subject, int]]:
    """Set up the peers, each on one keyed decision in memory (aiolimiter has one bucket for all keys)."""
    found: dict[str, tuple[Subject, int]] = {}

    def add(name: str, decide: Callable[[], Any]) -> None:
        async def run(n: int) -> int:
            start = time.perf_counter_ns()
            for _ in range(n):
                await decide()
            return time.perf_counter_ns() - start

        found[name] = (run, 2_000)

    per_second = RateLimitItemPerSecond(1_000_000_000)
    fixed, counter = FixedWindowRateLimiter(MemoryStorage()), SlidingWindowCounterRateLimiter(MemoryStorage())
    add("limits FixedWindow", lambda: fixed.hit(per_second, "user:42"))
    add("limits SlidingWindowCounter", lambda: counter.hit(per_second, "user:42"))
    # Its log costs more the more it holds, so it gets a limit that it reaches.
    few, log = RateLimitItemPerSecond(100), MovingWindowRateLimiter(MemoryStorage())
    add("limits MovingWindow", lambda: log.hit(few, "user:42"))
    for using in (RateLimiterType.FIXED_WINDOW, RateLimiterType.TOKEN_BUCKET, RateLimiterType.GCRA):
        one = Throttled(using=using.value, quota=rate_limiter.per_sec(1_000_000_000, burst=1_000_000_000))
        add(f"throttled-py {using.value}", partial(one.limit, "user:42"))
    bucket = Limiter(InMemoryBucket([Rate(100, 1_000)]))
    add("pyrate-limiter (one key only)", lambda: bucket.try_acquire_async("user:42", blocking=False))
    add("aiolimiter (one key only)", AsyncLimiter(1_000_000_000, 1).acquire)
    return found


async def run(options: Options) -> Figures:
    """Print the table."""
    subjects: dict[str, tuple[Subject, int]] = {EMPTY: (await_empty, 50_000)}
    for strategy in STRATEGIES:
        subjects[f"hit, {strategy}"] = (hit(strategy), 50_000)
    for strategy in STRATEGIES:
        subjects[f"denied, {strategy}"] = (denied(strategy), 50_000)
    for strategy in ("token_bucket", "sliding_window"):
        subjects[f"fresh key, {strategy}"] = (fresh(strategy, 100_000_000), 20_000)
        subjects[f"full and evicting, {strategy}"] = (fresh(strategy, 10_000), 20_000)
    others = peers()
    medians = await interleave(subjects | others, options.rounds)
    base = medians[EMPTY]
    rows = [(name, f"{ns:,.0f}", f"{ns / base:.2f}") for name, ns in medians.items()]
    table("One decision in memory (median of interleaved rounds)", ("regime", "ns", "× empty"), rows)
    slowest = max(ns for name, ns in medians.items() if name.startswith(("hit", "denied")))
    fastest_peer = min(medians[name] for name in others if "one key" not in name)
    print(f"  the fastest keyed peer takes {fastest_peer / slowest:.1f} × as long as our slowest hit or denial")
    return {"ns": medians, "times_keyed_peer": fastest_peer / slowest}
