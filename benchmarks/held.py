"""What was asked for, line by line, held against what was measured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.local import EMPTY
from benchmarks.peers import times_best_peers
from benchmarks.strategies import STRATEGIES
from benchmarks.timing import Figures, table

COUNTERS = ("token_bucket", "leaky_bucket", "sliding_counter", "fixed_window")
WAKE_TASKS = "512, 20000 keys"


@dataclass(frozen=True)
class Line:
    """One figure that was asked for: at least `least`, at most `most`."""

    what: str
    measured: float
    least: float | None = None
    most: float | None = None
    unit: str = ""

    @property
    def holds(self) -> bool:
        """Whether it is what was asked for."""
        return (self.least is None or self.measured >= self.least) and (self.most is None or self.measured <= self.most)

    def row(self) -> tuple[str, ...]:
        """Write it for the table."""
        unit = f" {self.unit}" if self.unit else ""
        asked = [f"≥ {self.least:,g}"] if self.least is not None else []
        asked += [f"≤ {self.most:,g}"] if self.most is not None else []
        return (
            self.what,
            f"{self.measured:,.4g}{unit}" if self.measured < 1e4 else f"{self.measured:,.0f}{unit}",
            (", ".join(asked) + unit),
            "holds" if self.holds else "MISSES",
        )


def of_local(figures: Figures) -> Iterator[Line]:
    """Take the lines of the earlier issue, in memory."""
    ns = figures["ns"]
    hits, denials = ([ns[f"{regime}, {strategy}"] for strategy in STRATEGIES] for regime in ("hit", "denied"))
    yield Line("a check in memory, slowest strategy", max(hits) / ns[EMPTY], most=1.3, unit="× an empty coroutine")
    # Two medians of the same thing differ by a few per cent, so that "no dearer" can't mean less than that.
    dearest = max(denied / hit for hit, denied in zip(hits, denials, strict=True))
    yield Line("a denied check, beside an allowed one", dearest, most=1.05, unit="×")
    yield Line("the fastest keyed peer in memory", figures["times_keyed_peer"], least=8, unit="× ours")


def of_redis(figures: Figures) -> Iterator[Line]:
    """Look at one process on one Redis."""
    tasks = figures["by_tasks"]
    wake_us = tasks["wake"]["client_us"]
    yield Line("client CPU per decision at 512 tasks", tasks[WAKE_TASKS]["client_us"] / wake_us, most=2, unit="× waking a task")
    lone = figures["lone"]
    yield Line(
        "client CPU of a lone check", lone["check"]["client_us"] / lone["evalsha"]["client_us"], most=0.8, unit="× evalsha"
    )
    server = {name: each["script_us"] for name, each in figures["by_strategy"].items()}
    yield Line("server time, buckets and counters", max(server[name] for name in COUNTERS), most=10, unit="µs")
    yield Line("server time, sliding window of ≤ 3 entries", server["sliding_window"], most=10, unit="µs")
    yield Line("server time, sliding window of 64 entries", server["sliding_window, 64 entries"], most=20, unit="µs")
    coalesced = max(value for name, value in server.items() if name.startswith("hot key"))
    yield Line("server time, a hot key coalesced 100-fold", coalesced, most=0.5, unit="µs")
    yield from of_hot_keys(figures)


def of_hot_keys(figures: Figures) -> Iterator[Line]:
    """Look at a key denied to a crowd, and one that is leased."""
    denied = figures["denied_crowd"]
    yield Line("denied key: script calls", denied["script_calls_per_s"], most=20, unit="/s")
    # Once a second, so that in a measured while the last time may be missing. The other calls are beats.
    least = (denied["seconds"] // 1 - 1) / denied["seconds"]
    yield Line("denied key: asked again", denied["asked_again_per_s"], least=round(least, 2), unit="/s")
    yield Line("denied key: decisions", denied["decisions_per_s"], least=300_000, unit="/s")
    yield Line("denied key: admitted", denied["allowed"], most=0)
    yield Line("denied key: the median task", denied["median_share"], least=0.5, unit="of its share")
    ample, tight = figures["leased"]["ample"], figures["leased"]["tight"]
    yield Line("leased key: decisions", ample["decisions_per_s"], least=300_000, unit="/s")
    yield Line("leased key: script calls", max(ample["script_calls"], tight["script_calls"]), most=0.02, unit="per decision")
    yield Line("leased key: units beyond rate × time", tight["beyond_rate_units"], most=tight["burst_units"])


def of_fleet(figures: Figures) -> Iterator[Line]:
    """Look at several processes on one Redis."""
    half = figures["half_load"]
    yield Line("p99 at half of what fills Redis's core", half["p99_ms"], most=5, unit="ms")
    yield Line("… of that load answered", half["answered_per_s"] / half["offered_per_s"], least=0.95, unit="of it")


def of_scale(figures: Figures) -> Iterator[Line]:
    """Look at the key table."""
    per_key = figures["bytes_per_key"]
    yield Line("bytes per key, buckets and counters", max(per_key[name]["bytes"] for name in COUNTERS), most=64, unit="B")
    slowest_us = max(each["slowest_us"] for each in per_key.values())
    yield Line("the slowest insertion", slowest_us / 1e3, most=1, unit="ms")
    ns = figures["by_size"]["ns"]
    largest = max(ns, key=int)
    yield Line(f"a check among {int(largest):,} keys", ns[largest] / ns["1000"], most=3, unit="× among 1,000")
    huge = figures["by_size"]["huge_pages_ns"]
    yield Line("… with huge pages", huge[largest] / huge["1000"], most=3, unit="× among 1,000")
    day = figures["day"]
    yield Line(f"a day of {day['keys']:,} keys: unlike, not evicted", max(0, day["differing"] - day["evictions"]), most=0)
    yield Line("… growth after the warm-up", day["grown_bytes"] / day["warm_bytes"], most=0.01, unit="of the memory")


def of_peers(figures: Figures) -> Iterator[Line]:
    """Compare decisions/s with those of the best peer of each promise."""
    for load, least in (
        ("64 tasks, 20000 keys", 15),
        ("512 tasks, 20000 keys", 20),
        ("64 tasks, 100 keys", 40),
        ("512 tasks, 100 keys", 40),
    ):
        if load in figures["loads"]:
            yield Line(f"decisions/s, {load}, each promise", times_best_peers(figures["loads"][load]), least=least, unit="×")


ASKED = {"local": of_local, "redis": of_redis, "fleet": of_fleet, "scale": of_scale, "peers": of_peers}


def report(results: Figures) -> int:
    """Print every line that was measured; 1 if one misses."""
    lines = [line for suite, of in ASKED.items() if suite in results for line in of(results[suite])]
    table("Held to", ("line", "measured", "asked", ""), [line.row() for line in lines])
    missed = sum(not line.holds for line in lines)
    print(f"  {len(lines) - missed} of {len(lines)} hold")
    return 1 if missed else 0
