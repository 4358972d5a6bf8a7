"""The key table as it grows: bytes per key, ns per check by number of keys, the slowest insertion, and its adversaries."""

from __future__ import annotations

import random
import time
from itertools import product

from benchmarks.local import STRATEGIES, YEAR_S, limiter
from benchmarks.timing import progress, table
from ratethrottle import InMemoryStorage


async def bytes_per_key(keys: int) -> None:
    """Fill one table per strategy and print what it holds."""
    rows = []
    for strategy in STRATEGIES:
        progress(f"{strategy}: {keys:,} keys")
        core = limiter(strategy, 100, YEAR_S, max_keys=keys)
        slowest = 0
        for i in range(keys):
            start = time.perf_counter_ns()
            await core.check(f"user:{i}")
            slowest = max(slowest, time.perf_counter_ns() - start)
        storage: InMemoryStorage = core._storage
        rows.append((strategy, f"{storage.size_bytes / keys:.1f}", f"{slowest / 1000:,.0f}"))
    progress("")
    table(f"{keys:,} keys", ("strategy", "bytes per key", "slowest insertion, µs"), rows)


async def check_by_size(largest: int) -> None:
    """Time a check of a random known key as the table grows by tens."""
    rows, keys, filled = [], 1_000, 0
    core = limiter("token_bucket", 1_000_000, YEAR_S, max_keys=largest)
    base = 0.0
    while keys <= largest:
        progress(f"a check among {keys:,} keys")
        for i in range(filled, keys):
            await core.check(f"user:{i}")
        filled = keys
        best = []
        for _ in range(5):
            names = [f"user:{random.randrange(keys)}" for _ in range(100_000)]
            start = time.perf_counter_ns()
            for name in names:
                await core.check(name)
            best.append((time.perf_counter_ns() - start) / len(names))
        ns = sorted(best)[2]
        base = base or ns
        rows.append((f"{keys:,}", f"{ns:,.0f}", f"{ns / base:.2f}"))
        keys *= 10
    progress("")
    table("One check of a random known key", ("keys", "ns", "× 1,000 keys"), rows)


async def floods(max_keys: int) -> None:
    """Print how many flood keys a blocked victim survives, in a table of `max_keys`, of at most 10 × as many."""
    rows = []
    adversaries = (("of one unit each", 1), ("each itself exhausted", 10))
    for (name, units), strategy in product(adversaries, ("sliding_window", "token_bucket")):
        survived = []
        for attempt in range(3):
            progress(f"a flood {name}, {strategy}, {attempt + 1} of 3")
            core = limiter(strategy, 10, 3600, max_keys)
            await core.check("victim", cost=10)
            count = 10 * max_keys
            for i in range(count):
                await core.check(f"flood:{i}", cost=units)
                if i % 128 == 0 and (await core.peek("victim")).remaining > 5:
                    count = i
                    break
            survived.append(count)
        survived.sort()
        rows.append((f"{name}, {strategy}", *(f"{count:,}" for count in survived)))
    progress("")
    table(
        f"Flood keys that a blocked victim survives in a table of {max_keys:,} (10 × that were sent)",
        ("the flood", "least", "median", "most"),
        rows,
    )


async def run(quick: bool) -> None:
    """Print all tables."""
    await bytes_per_key(100_000 if quick else 1_000_000)
    await check_by_size(100_000 if quick else 10_000_000)
    await floods(10_000 if quick else 100_000)
