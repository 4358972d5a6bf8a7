"""In-memory decisions by regime and strategy, beside awaiting an empty coroutine and the peers, in one interleaved run."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from benchmarks.timing import Subject, await_empty, interleave, table
from ratethrottle import InMemoryStorage, RateThrottleCore, RateThrottleRule

STRATEGIES = ("sliding_window", "token_bucket", "leaky_bucket", "sliding_counter", "fixed_window")
YEAR_S = 365 * 86_400


def limiter(strategy: str, limit: int, window: float, max_keys: int = 1_000_000) -> RateThrottleCore:
    """A limiter with one rule, in memory."""
    return RateThrottleCore(
        InMemoryStorage(max_keys=max_keys), rules=[RateThrottleRule("bench", limit, window, strategy=strategy)]
    )


def hit(strategy: str) -> Subject:
    """One key that is there and always allowed."""
    core = limiter(strategy, 1_000_000_000, 1)

    async def run(n: int) -> int:
        start = time.perf_counter_ns()
        for _ in range(n):
            await core.check("user:42")
        return time.perf_counter_ns() - start

    return run


def denied(strategy: str) -> Subject:
    """One key that is there and always denied."""
    core = limiter(strategy, 1, YEAR_S)

    async def run(n: int) -> int:
        await core.check("user:42")
        start = time.perf_counter_ns()
        for _ in range(n):
            await core.check("user:42")
        return time.perf_counter_ns() - start

    return run


def fresh(strategy: str, max_keys: int) -> Subject:
    """A key never seen before each time; the table grows, or is full and evicts when `max_keys` is small."""
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
    """The peers that are installed, each on one keyed decision in memory (aiolimiter has one bucket for all keys)."""
    found: dict[str, tuple[Subject, int]] = {}

    def add(name: str, decide: Callable[[], Any]) -> None:
        async def run(n: int) -> int:
            start = time.perf_counter_ns()
            for _ in range(n):
                await decide()
            return time.perf_counter_ns() - start

        found[name] = (run, 2_000)

    try:
        from limits import RateLimitItemPerSecond
        from limits.aio.storage import MemoryStorage
        from limits.aio.strategies import FixedWindowRateLimiter, MovingWindowRateLimiter, SlidingWindowCounterRateLimiter
    except ImportError:
        pass
    else:
        item = RateLimitItemPerSecond(1_000_000_000)
        for kind in (FixedWindowRateLimiter, SlidingWindowCounterRateLimiter):
            add(f"limits {kind.__name__.removesuffix('RateLimiter')}", lambda one=kind(MemoryStorage()): one.hit(item, "user:42"))
        few = RateLimitItemPerSecond(100)
        add("limits MovingWindow", lambda one=MovingWindowRateLimiter(MemoryStorage()): one.hit(few, "user:42"))
    try:
        from throttled.asyncio import RateLimiterType, Throttled, rate_limiter
    except ImportError:
        pass
    else:
        for using in (RateLimiterType.FIXED_WINDOW, RateLimiterType.TOKEN_BUCKET, RateLimiterType.GCRA):
            one = Throttled(using=using.value, quota=rate_limiter.per_sec(1_000_000_000, burst=1_000_000_000))
            add(f"throttled-py {using.value}", lambda one=one: one.limit("user:42"))
    try:
        from aiolimiter import AsyncLimiter
    except ImportError:
        pass
    else:
        add("aiolimiter (one key only)", AsyncLimiter(1_000_000_000, 1).acquire)
    return found


async def run(rounds: int) -> None:
    """Print the table."""
    subjects: dict[str, tuple[Subject, int]] = {"an empty coroutine, awaited": (await_empty, 50_000)}
    for strategy in STRATEGIES:
        subjects[f"hit, {strategy}"] = (hit(strategy), 50_000)
    for strategy in STRATEGIES:
        subjects[f"denied, {strategy}"] = (denied(strategy), 50_000)
    for strategy in ("token_bucket", "sliding_window"):
        subjects[f"fresh key, {strategy}"] = (fresh(strategy, 100_000_000), 20_000)
        subjects[f"full and evicting, {strategy}"] = (fresh(strategy, 10_000), 20_000)
    ours = list(subjects)[1:]
    subjects |= peers()
    medians = await interleave(subjects, rounds)
    base = medians["an empty coroutine, awaited"]
    rows = [(name, f"{ns:,.0f}", f"{ns / base:.2f}") for name, ns in medians.items()]
    table("One decision in memory (median of interleaved rounds)", ("regime", "ns", "× empty"), rows)
    keyed = [ns for name, ns in medians.items() if name not in ours and "one key" not in name and ns != base]
    if keyed:
        worst = max(medians[name] for name in ours if name.startswith(("hit", "denied")))
        print(f"  the fastest keyed peer takes {min(keyed) / worst:.1f} × as long as our slowest hit or denial")
