"""`redis`: what a decision over Redis costs, by number of tasks, by strategy and by number of hot keys; latency at a fixed load."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from functools import partial

import redis.asyncio

from benchmarks import hot
from benchmarks.load import Check, drive, key_names, paced, wake, warm
from benchmarks.server import Meter, errors_of, ours, own_server, per_decision
from benchmarks.strategies import STRATEGIES, YEAR_S
from benchmarks.timing import Figures, Options, interleave_figures, percentile, progress, table
from ratethrottle import RateThrottleCore

KEYS = 20_000
TASKS = (1, 8, 64, 512)
HOT = (1, 10, 100, 1_000, KEYS)
BATCH = 128  # items that fill a script call
WINDOW_ENTRIES = 64
LATENCY_PER_S = 5_000


async def measure(meter: Meter, check: Check, keys: list[str], tasks: int, seconds: float) -> Figures:
    """Drive one subject once and read the server's counters around it."""
    await warm(check, keys, tasks)
    before = meter.read()
    load = await drive(check, keys, tasks, seconds)
    return per_decision(load, meter.read() - before, meter)


async def waking(seconds: float) -> Figures:
    """CPU of waking one of 512 tasks through a bare future."""
    load = await wake(TASKS[-1], seconds)
    return {"client_us": 1e6 * load.cpu_s / load.decisions, "decisions_per_s": load.decisions / load.wall_s}


async def by_tasks(meter: Meter, options: Options) -> Figures:
    """Decisions/s and CPU by number of tasks over many keys, and over 100, beside waking a task."""
    limiter, seconds = ours(meter.url), options.seconds(1.0, 0.25)
    subjects: dict[str, Callable[[], Awaitable[Figures]]] = {"wake": lambda: waking(seconds)}
    for tasks in TASKS:
        subjects[f"{tasks}, {KEYS} keys"] = partial(measure, meter, limiter.check, key_names(KEYS), tasks, seconds)
    for tasks in TASKS[2:]:
        subjects[f"{tasks}, 100 keys"] = partial(measure, meter, limiter.check, key_names(100), tasks, seconds)
    figures = await interleave_figures("redis", subjects, options.redis_rounds)
    await limiter.aclose()
    wake_us = figures["wake"]["client_us"]
    rows: list[tuple[str, ...]] = [
        ("waking a task of 512 through a bare future", "", f"{wake_us:.2f}", "1.0", "", "", "", "", "")
    ]
    for name, each in figures.items():
        if name != "wake":
            rows.append(
                cells(name.replace(",", " tasks,").replace(" 20000", " 20,000").replace("1 tasks", "1 task"), each, wake_us)
            )
    head = ("load", "decisions/s", "client µs", "× wake", "calls", "items", "script µs", "core µs", "errors")
    table("Redis, sliding_window, all allowed; per decision (script: commandstats; core: Redis's main thread)", head, rows)
    return figures


def cells(title: str, each: Figures, wake_us: float) -> tuple[str, ...]:
    """Write one row."""
    return (
        title,
        f"{each['decisions_per_s']:,.0f}",
        f"{each['client_us']:.2f}",
        f"{each['client_us'] / wake_us:.1f}",
        f"{each['script_calls']:.4f}",
        f"{each['items']:.3f}",
        f"{each['script_us']:.2f}",
        f"{each['core_us']:.2f}",
        errors_of(each),
    )


async def lone(meter: Meter, options: Options) -> Figures:
    """One check at a time, beside redis-py's own `evalsha` of `return 1`: CPU of this process and wall time per call."""
    limiter, operations = ours(meter.url), 400 if options.quick else 2_000
    pooled = redis.asyncio.Redis.from_url(meter.url)
    single = redis.asyncio.Redis.from_url(meter.url, single_connection_client=True)
    sha, keys = await pooled.script_load("return 1"), key_names(KEYS)

    async def sequence(call: Callable[[int], Awaitable[object]]) -> Figures:
        await call(0)
        wall_s, cpu_s = time.perf_counter(), time.process_time()
        for number in range(operations):
            await call(number)
        return {
            "client_us": 1e6 * (time.process_time() - cpu_s) / operations,
            "wall_us": 1e6 * (time.perf_counter() - wall_s) / operations,
        }

    subjects: dict[str, Callable[[], Awaitable[Figures]]] = {
        "check": lambda: sequence(lambda number: limiter.check(keys[number])),
        "evalsha": lambda: sequence(lambda _: pooled.evalsha(sha, 0)),
        "evalsha, single_connection_client": lambda: sequence(lambda _: single.evalsha(sha, 0)),
    }
    figures = await interleave_figures("a lone call", subjects, 2 * options.redis_rounds + 1)
    for client in (pooled, single):
        await client.aclose()
    await limiter.aclose()
    base = figures["evalsha"]["client_us"]
    rows = [(n, f"{f['client_us']:.1f}", f"{f['client_us'] / base:.2f}", f"{f['wall_us']:.1f}") for n, f in figures.items()]
    table("A lone sequential call", ("call", "client µs", "× evalsha", "wall µs"), rows)
    return figures


async def full_batches(meter: Meter, limiter: RateThrottleCore, keys: list[str], times: int) -> Figures:
    """Check all keys `times` times in script calls that are full, and give the server's µs per decision."""
    before = meter.read()
    for _ in range(times):
        for start in range(0, len(keys), BATCH):
            decisions = await limiter.check_many(keys[start : start + BATCH])
            assert all(decisions), "a check was denied, so that it may not have reached the server"
    done, decided = meter.read() - before, times * len(keys)
    return {
        "script_us": done.script_us / decided,
        "script_calls": done.script_calls / decided,
        "items": meter.items(done) / decided,
        "core_us": done.core_us / decided,
    }


async def windows_of_64(meter: Meter, keys: list[str]) -> Figures:
    """Full batches on sliding windows that hold 61 to 64 entries each."""
    limiter = ours(meter.url, "sliding_window", limit=WINDOW_ENTRIES, window=YEAR_S, name="full")
    await full_batches(meter, limiter, keys, WINDOW_ENTRIES - 4)
    figures = await full_batches(meter, limiter, keys, 4)
    await limiter.aclose()
    return figures


async def coalesced(meter: Meter, strategy: str, together: int, times: int) -> Figures:
    """Let `together` checks of one key wait at once, again and again."""
    limiter = ours(meter.url, strategy, name=f"hot-{strategy}")
    await limiter.check("hot")
    before = meter.read()
    for _ in range(times):
        assert all(await asyncio.gather(*(limiter.check("hot") for _ in range(together))))
    done, decided = meter.read() - before, together * times
    await limiter.aclose()
    return {
        "script_us": done.script_us / decided,
        "script_calls": done.script_calls / decided,
        "items": meter.items(done) / decided,
        "core_us": done.core_us / decided,
    }


async def by_strategy(meter: Meter, options: Options) -> Figures:
    """Server time per decision: distinct keys in full batches, and a hot key coalesced 100-fold."""
    keys = [f"batch:{number}" for number in range(BATCH * (2 if options.quick else 8))]
    subjects: dict[str, Callable[[], Awaitable[Figures]]] = {}
    limiters = {strategy: ours(meter.url, strategy, name=f"full-{strategy}", window=3_600) for strategy in STRATEGIES}
    for strategy, limiter in limiters.items():
        # A slot of a sliding window of an hour lasts almost a minute, so that it has one entry or two.
        subjects[strategy] = partial(full_batches, meter, limiter, keys, 3)
    for strategy in ("token_bucket", "sliding_window"):
        subjects[f"hot key × 100, {strategy}"] = partial(coalesced, meter, strategy, 100, 20 if options.quick else 50)
    figures = await interleave_figures("server time", subjects, options.redis_rounds)
    progress("server time: sliding windows of 64 entries")
    figures[f"sliding_window, {WINDOW_ENTRIES} entries"] = await windows_of_64(meter, keys)
    progress("")
    for limiter in limiters.values():
        await limiter.aclose()
    rows = [
        (name, f"{f['script_us']:.2f}", f"{f['core_us']:.2f}", f"{f['script_calls']:.4f}", f"{f['items']:.3f}")
        for name, f in figures.items()
    ]
    head = ("distinct keys in batches of 128", "script µs", "core µs", "calls", "items")
    table("Server time per decision", head, rows)
    return figures


async def by_hot_keys(meter: Meter, options: Options) -> Figures:
    """Script calls, items and server µs per decision at 512 tasks by the number of keys that take the traffic."""
    limiter, seconds = ours(meter.url, name="heat"), options.seconds(0.7, 0.25)
    subjects: dict[str, Callable[[], Awaitable[Figures]]] = {
        f"{count}": partial(measure, meter, limiter.check, key_names(count), TASKS[-1], seconds) for count in HOT
    }
    figures = await interleave_figures("hot keys", subjects, options.redis_rounds)
    await limiter.aclose()
    rows = [
        (
            f"{int(name):,}",
            f"{f['script_calls']:.4f}",
            f"{f['items']:.3f}",
            f"{f['script_us']:.2f}",
            f"{f['decisions_per_s']:,.0f}",
        )
        for name, f in figures.items()
    ]
    table("512 tasks, by number of keys; per decision", ("keys", "script calls", "items", "script µs", "decisions/s"), rows)
    return figures


async def latency(meter: Meter, options: Options) -> Figures:
    """How long a check takes while they arrive at a fixed rate."""
    limiter, keys = ours(meter.url, name="paced"), key_names(KEYS)
    await warm(limiter.check, keys, 64)
    progress("latency at a fixed load")
    result = await paced(limiter.check, keys, LATENCY_PER_S, options.seconds(5.0, 1.0))
    progress("")
    await limiter.aclose()
    shares = (0.5, 0.9, 0.99, 0.999)
    figures: Figures = {f"p{100 * share:g}_ms": 1e3 * percentile(result.latencies_s, share) for share in shares}
    row = (
        f"{LATENCY_PER_S:,}/s",
        *(f"{value:.2f}" for value in figures.values()),
        f"{result.dropped:,}",
        errors_of({"errors": result.errors}),
    )
    table("Latency at a fixed load, ms", ("load", "p50", "p90", "p99", "p99.9", "dropped", "errors"), [row])
    return figures | {"offered_per_s": LATENCY_PER_S, "answered": len(result.latencies_s), "errors": result.errors}


async def run(options: Options) -> Figures:
    """Print all tables; give what they show."""
    with own_server() as meter:
        await meter.calibrate()
        return {
            "server": meter.version(),
            "by_tasks": await by_tasks(meter, options),
            "lone": await lone(meter, options),
            "denied_crowd": await hot.denied_crowd(meter, options),
            "leased": await hot.leased(meter, options),
            "by_strategy": await by_strategy(meter, options),
            "by_hot_keys": await by_hot_keys(meter, options),
            "latency": await latency(meter, options),
        }
