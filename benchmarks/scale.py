"""`scale`: the key table as it grows: bytes per key, ns per check by number of keys, the slowest insertion, its adversaries, a day."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import random
import sys
import time
from itertools import product

from benchmarks import day
from benchmarks.strategies import STRATEGIES, YEAR_S, limiter
from benchmarks.timing import Figures, Options, progress, table
from ratethrottle import InMemoryStorage

HUGE_PAGES = "glibc.malloc.hugetlb=1"


async def bytes_per_key(keys: int) -> Figures:
    """Fill one table per strategy and print what it holds, and how long the slowest insertion took of this process's time."""
    figures: Figures = {}
    for strategy in STRATEGIES:
        progress(f"{strategy}: {keys:,} keys")
        core = limiter(strategy, 100, YEAR_S, max_keys=keys)
        slowest = 0
        gc.disable()  # a collection isn't the table's
        for i in range(keys):
            # CPU time: what the machine gave to others meanwhile isn't an insertion's.
            start = time.thread_time_ns()
            await core.check(f"user:{i}")
            slowest = max(slowest, time.thread_time_ns() - start)
        gc.enable()
        storage: InMemoryStorage = core._storage
        figures[strategy] = {"bytes": storage.size_bytes / keys, "slowest_us": slowest / 1000}
    progress("")
    rows = [(strategy, f"{each['bytes']:.1f}", f"{each['slowest_us']:,.0f}") for strategy, each in figures.items()]
    table(f"{keys:,} keys", ("strategy", "bytes per key", "slowest insertion, µs of CPU"), rows)
    return figures


async def check_by_size(largest: int) -> dict[str, float]:
    """Time a check of a random known key as the table grows by tens: ns by number of keys."""
    figures, keys, filled = {}, 1_000, 0
    core = limiter("token_bucket", 1_000_000, YEAR_S, max_keys=largest)
    while keys <= largest:
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
        figures[f"{keys}"] = sorted(best)[2]
        keys *= 10
    return figures


async def in_a_child(largest: int, huge_pages: bool) -> dict[str, float]:
    """Run `check_by_size` in a process of its own: whether malloc takes huge pages is settled when a process starts."""
    environment = dict(os.environ)
    if huge_pages:
        environment["GLIBC_TUNABLES"] = HUGE_PAGES
    command = (sys.executable, "-m", "benchmarks.scale", f"{largest}")
    child = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, env=environment)
    output, _ = await child.communicate()
    if child.returncode:
        raise RuntimeError("the process that times checks by number of keys failed")
    figures: dict[str, float] = json.loads(output)
    return figures


async def by_size(largest: int) -> Figures:
    """Print what a check costs by number of keys, without and with huge pages."""
    figures: Figures = {}
    for name, huge_pages in (("ns", False), ("huge_pages_ns", True)):
        progress(f"a check among up to {largest:,} keys{', huge pages' if huge_pages else ''}")
        figures[name] = await in_a_child(largest, huge_pages)
    progress("")
    plain, huge = figures["ns"], figures["huge_pages_ns"]
    rows = [
        (f"{int(keys):,}", f"{ns:,.0f}", f"{ns / plain['1000']:.2f}", f"{huge[keys]:,.0f}", f"{huge[keys] / huge['1000']:.2f}")
        for keys, ns in plain.items()
    ]
    head = ("keys", "ns", "× 1,000 keys", "ns, huge pages", "× 1,000 keys")
    table(f"One check of a random known key (huge pages: GLIBC_TUNABLES={HUGE_PAGES})", head, rows)
    return figures


async def floods(max_keys: int) -> Figures:
    """Print how many flood keys a blocked victim survives, in a table of `max_keys`, of at most 10 × as many."""
    figures: Figures = {}
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
        figures[f"{name}, {strategy}"] = sorted(survived)
    progress("")
    table(
        f"Flood keys that a blocked victim survives in a table of {max_keys:,} (10 × that were sent)",
        ("the flood", "least", "median", "most"),
        [(name, *(f"{count:,}" for count in counts)) for name, counts in figures.items()],
    )
    return figures


async def run(options: Options) -> Figures:
    """Print all tables."""
    return {
        "bytes_per_key": await bytes_per_key(100_000 if options.quick else 1_000_000),
        "by_size": await by_size(100_000 if options.quick else 10_000_000),
        "floods": await floods(3_000 if options.quick else 100_000),
        "day": await day.run(options),
    }


if __name__ == "__main__":
    print(json.dumps(asyncio.run(check_by_size(int(sys.argv[1])))))
