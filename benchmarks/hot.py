"""Hot keys over Redis: one that is denied to a crowd, and one that is leased."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

from benchmarks.load import drive
from benchmarks.server import Meter, ours, per_decision
from benchmarks.strategies import YEAR_S
from benchmarks.timing import Figures, Options, percentile, progress, table

CROWD = 200
YIELD_EVERY = 100
SAMPLE_S = 0.005

# More than one process can ask for, so that everything is allowed; and a limit that one process reaches.
AMPLE = {"limit": 100_000_000, "window": 10}
TIGHT = {"limit": 100_000, "window": 1, "burst": 25_000}


async def sample(every_s: float, take: Callable[[float], None]) -> None:
    """Call `take` with how late it is, again and again, until cancelled."""
    loop = asyncio.get_running_loop()
    while True:
        due_s = loop.time() + every_s
        await asyncio.sleep(every_s)
        take(max(0.0, loop.time() - due_s))


async def stopped(task: asyncio.Task[None]) -> None:
    """Cancel a task and wait for its end."""
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def denied_crowd(meter: Meter, options: Options) -> Figures:
    """200 tasks ask for a key that has nothing left, and each yields to the others every 100 checks."""
    seconds = options.seconds(6.0, 3.0)
    limiter = ours(meter.url, "sliding_window", name="denied", limit=1, window=YEAR_S)
    await limiter.check("denied")
    assert not await limiter.check("denied")
    progress("a denied key under a crowd")
    lags: list[float] = []
    before, ticker = meter.read(), asyncio.create_task(sample(0.01, lags.append))
    asked = limiter.statistics().items
    load = await drive(limiter.check, ["denied"], CROWD, seconds, yield_every=YIELD_EVERY)
    done, asked = meter.read() - before, limiter.statistics().items - asked
    await stopped(ticker)
    await limiter.aclose()
    progress("")
    share = load.decisions / CROWD
    figures = per_decision(load, done, meter) | {
        "seconds": load.wall_s,
        "script_calls_per_s": done.script_calls / load.wall_s,
        "asked_again_per_s": asked / load.wall_s,
        "median_share": percentile(load.by_task, 0.5) / max(1.0, share),
        "least_share": min(load.by_task) / max(1.0, share),
        "lag_p50_ms": 1e3 * percentile(lags, 0.5),
        "lag_max_ms": 1e3 * max(lags, default=0.0),
    }
    rows = [
        ("decisions/s", f"{figures['decisions_per_s']:,.0f}"),
        ("admitted", f"{load.allowed}"),
        ("script calls a second, beats included", f"{figures['script_calls_per_s']:,.2f}"),
        ("the key asked again, a second", f"{figures['asked_again_per_s']:,.2f}"),
        ("client µs per decision", f"{figures['client_us']:.2f}"),
        ("the median task's part of its share", f"{figures['median_share']:.2f}"),
        ("the least served task's", f"{figures['least_share']:.2f}"),
        ("loop lag, median and worst, ms", f"{figures['lag_p50_ms']:.1f}, {figures['lag_max_ms']:.1f}"),
    ]
    table(f"A denied key, {CROWD} tasks that yield every {YIELD_EVERY} checks, {seconds:g} s", ("measured", ""), rows)
    return figures


class Account:
    """Counts admissions over time, to hold them against what a bucket may admit in any interval."""

    def __init__(self, check: Callable[[str], Any]) -> None:
        self._check = check
        self.admitted = 0
        self.samples: list[tuple[float, int]] = []

    async def check(self, key: str) -> bool:
        """Decide and count."""
        allowed = bool(await self._check(key))
        self.admitted += allowed
        return allowed

    def take(self, _late_s: float) -> None:
        """Note what has been admitted until now."""
        self.samples.append((time.perf_counter(), self.admitted))

    def most_beyond_rate(self, per_s: float) -> float:
        """Give the most units admitted in any interval between two samples, less what the rate gives back in it."""
        least, most = float("inf"), 0.0
        for at_s, admitted in self.samples:
            least = min(least, admitted - per_s * at_s)
            most = max(most, admitted - per_s * at_s - least)
        return most


async def leased_key(meter: Meter, name: str, seconds: float, rule: dict[str, Any]) -> Figures:
    """Let tasks all ask for one leased key."""
    limiter = ours(meter.url, "token_bucket", name=name, lease=True, **rule)
    account = Account(limiter.check)
    check = account.check if "burst" in rule else limiter.check
    await drive(check, ["hot"], CROWD, 0.2, yield_every=YIELD_EVERY)
    before = meter.read()
    account.samples.clear()
    account.take(0)
    ticker = asyncio.create_task(sample(SAMPLE_S, account.take))
    load = await drive(check, ["hot"], CROWD, seconds, yield_every=YIELD_EVERY)
    account.take(0)
    await stopped(ticker)
    figures = per_decision(load, meter.read() - before, meter)
    await limiter.aclose()
    if "burst" in rule:
        figures["beyond_rate_units"] = account.most_beyond_rate(rule["limit"] / rule["window"])
        figures["burst_units"] = rule["burst"]
    return figures


async def leased(meter: Meter, options: Options) -> Figures:
    """Ask for a leased hot key: with more than enough, and with a limit that the process reaches, held against its promise."""
    seconds = options.seconds(3.0, 1.0)
    figures: Figures = {}
    for name, rule in (("ample", AMPLE), ("tight", TIGHT)):
        progress(f"a leased hot key, {name}")
        figures[name] = await leased_key(meter, name, seconds, rule)
    progress("")
    rows = []
    for name, each in figures.items():
        promise = f"{each['beyond_rate_units']:,.0f} of {each['burst_units']:,}" if "burst_units" in each else ""
        rows.append(
            (
                f"{name}, {100 * each['allowed'] / max(1, each['decisions']):.0f} % allowed",
                f"{each['decisions_per_s']:,.0f}",
                f"{each['client_us']:.2f}",
                f"{each['script_calls']:.5f}",
                f"{each['script_us']:.3f}",
                promise,
            )
        )
    head = ("limit", "decisions/s", "client µs", "script calls", "script µs", "most beyond rate")
    table(f"A leased hot key, {CROWD} tasks; per decision", head, rows)
    return figures
