"""A day of 10^7 keys in compressed time: every decision held against a table that forgets nothing."""

from __future__ import annotations

import random
import time
from array import array
from pathlib import Path

from benchmarks.timing import Figures, Options, progress, table
from ratethrottle import InMemoryStorage, RateThrottleCore, RateThrottleRule

DAY_US = 86_400 * 1_000_000
LIMIT, WINDOW_S = 2, 4_320  # a unit comes back in 36 minutes
WINDOW_US = WINDOW_S * 1_000_000
FULL = LIMIT * WINDOW_US  # a bucket's level in units of 1/WINDOW_US, which LIMIT of drain in each µs
RUSH = 20  # so many times the usual traffic, twice a day, until the table has to forget
START_US = 1_700_000_000 * 1_000_000


def resident_bytes() -> int:
    """Read how much memory this process has."""
    return 4096 * int(Path("/proc/self/statm").read_text().split()[1])


class Unbounded:
    """Token buckets in plain integers, one for each key of the day, none ever forgotten."""

    def __init__(self, keys: int) -> None:
        self._level = array("q", bytes(8 * keys))
        self._at_us = array("q", bytes(8 * keys))

    def check(self, key: int, now_us: int) -> tuple[bool, int, int]:
        """Decide: allowed, remaining, retry_after in µs."""
        level = max(0, self._level[key] - LIMIT * (now_us - self._at_us[key]))
        allowed = level + WINDOW_US <= FULL
        if allowed:
            level += WINDOW_US
        self._level[key], self._at_us[key] = level, now_us
        return allowed, (FULL - level) // WINDOW_US, 0 if allowed else -(-(level + WINDOW_US - FULL) // LIMIT)

    def forget(self, key: int) -> None:
        """Make a key fresh, as an eviction did in the bounded table."""
        self._level[key] = 0


class Day:
    """The traffic: each key comes once in its turn, and recent ones come back; twice there is a rush."""

    def __init__(self, keys: int, max_keys: int) -> None:
        self.recent = max_keys // 2
        self.now_us = START_US
        # Each rush brings twice as many keys as the table holds. The first belongs to the warm-up.
        size = min(keys // 10, 2 * max_keys)
        self.rushes = range(keys // 8, keys // 8 + size), range(keys * 3 // 4, keys * 3 // 4 + size)
        # Two checks a key, and in a rush RUSH times as many in the same time.
        self.step_us = DAY_US * RUSH // (2 * ((keys - 2 * size) * RUSH + 2 * size))
        self._random = random.Random(7)

    def clock_us(self) -> int:
        """Tell the limiter the time."""
        return self.now_us

    def pause(self, number: int) -> None:
        """Let the time between two checks pass."""
        rush = number in self.rushes[0] or number in self.rushes[1]
        self.now_us += self.step_us // RUSH if rush else self.step_us

    def again(self, number: int) -> int:
        """Choose a key that has been there: most often one of the last, and any of `recent`."""
        return number - int(self._random.random() ** 8 * min(number, self.recent))


async def simulate(keys: int, max_keys: int) -> Figures:
    """Run the day; asserts that every decision is that of the unbounded table, or that of a key that an eviction forgot."""
    day, unbounded = Day(keys, max_keys), Unbounded(keys)
    storage = InMemoryStorage(max_keys=max_keys, clock_us=day.clock_us)
    limiter = RateThrottleCore(storage, rules=[RateThrottleRule("day", LIMIT, WINDOW_S, strategy="token_bucket")])
    forgotten = denied = 0
    resident: list[int] = []
    began_s = time.perf_counter()
    for number in range(keys):
        if number % (keys // 100) == 0:
            progress(f"a day of {keys:,} keys: {100 * number // keys} %")
            resident.append(resident_bytes())
        for key in (number, day.again(number)):
            day.pause(number)
            decision = await limiter.check(f"user:{key}")
            got = decision.allowed, decision.remaining, decision.retry_after_us
            denied += not got[0]
            if got != unbounded.check(key, day.now_us):
                forgotten += 1
                unbounded.forget(key)
                assert got == unbounded.check(key, day.now_us), "neither the unbounded table's decision nor a fresh key's"
    progress("")
    assert forgotten <= storage.evictions, f"{forgotten} keys were forgotten, and {storage.evictions} evictions counted"
    warm_up = len(resident) // 4
    return {
        "keys": keys,
        "max_keys": max_keys,
        "decisions": 2 * keys,
        "denied": denied,
        "simulated_s": (day.now_us - START_US) / 1e6,
        "took_s": time.perf_counter() - began_s,
        "evictions": storage.evictions,
        "differing": forgotten,
        "table_bytes": storage.size_bytes,
        "warm_bytes": max(resident[:warm_up]),
        "grown_bytes": max(resident[warm_up:]) - max(resident[:warm_up]),
        "resident_bytes": resident,
    }


async def run(options: Options) -> Figures:
    """Print what the day was like."""
    keys, max_keys = (100_000, 10_000) if options.quick else (10_000_000, 500_000)
    figures = await simulate(keys, max_keys)
    rows = [
        ("simulated", f"{figures['simulated_s'] / 3600:.1f} h in {figures['took_s']:.0f} s"),
        ("decisions, of them denied", f"{figures['decisions']:,}, {figures['denied']:,}"),
        ("unlike the unbounded table's", f"{figures['differing']:,}"),
        ("evictions counted", f"{figures['evictions']:,}"),
        ("the table at the end, MB", f"{figures['table_bytes'] / 1e6:.1f}"),
        (
            "this process's most in the first quarter, and its growth after, MB",
            f"{figures['warm_bytes'] / 1e6:.1f}, {figures['grown_bytes'] / 1e6:.1f}",
        ),
    ]
    table(f"A day of {keys:,} distinct keys in a table of {max_keys:,}, token_bucket", ("measured", ""), rows)
    return figures
