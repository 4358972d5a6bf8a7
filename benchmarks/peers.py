"""`peers`: this project and each peer, each on a Redis of its own, in one interleaved run.

On one for all, Redis would be busy in the turn of one with the keys of the others, as they expire.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from functools import partial

from benchmarks.contenders import CONTENDERS, HOT_KEYS, OURS, Contender, Loads, Unavailable
from benchmarks.load import Load, Paced
from benchmarks.server import Meter, errors_of, own_server, per_decision
from benchmarks.timing import Figures, Options, interleave_figures, percentile, progress, table

# (tasks, keys), of which the table shows the last four; the first are for the plot by concurrency.
LOADS = ((1, 20_000), (8, 20_000), (64, 20_000), (512, 20_000), (64, 100), (512, 100))
QUICK = LOADS[2:]
LATENCY_PER_S = 500  # what the slowest of them can answer


async def measure(meter: Meter, loads: Loads, load: tuple[int, int], seconds: float) -> Figures:
    """Drive one peer once. A peer that gives up is shown with its error."""
    tasks, keys = load
    before = meter.read()
    try:
        result = await loads.drive(keys, tasks, seconds)
    except Unavailable as error:
        result = Load(errors={str(error): 1}, wall_s=seconds)
    return per_decision(result, meter.read() - before, meter)


async def latencies(loads: Loads, seconds: float) -> Figures:
    """Offer one peer a fixed load."""
    try:
        result = await loads.paced(20_000, LATENCY_PER_S, seconds)
    except Unavailable as error:
        result = Paced(LATENCY_PER_S, errors={str(error): 1})
    figures: Figures = {f"p{100 * share:g}_ms": 1e3 * percentile(result.latencies_s, share) for share in (0.5, 0.9, 0.99, 0.999)}
    return figures | {"errors": result.errors, "answered": len(result.latencies_s)}


def print_load(load: tuple[int, int], figures: dict[str, Figures], promises: dict[str, str]) -> None:
    """Print one table, and how many times as fast as the best peer we are."""
    rows = [
        (
            name,
            promises[name],
            f"{each['decisions_per_s']:,.0f}",
            f"{each['client_us']:.1f}",
            f"{each['core_us']:.1f}",
            errors_of(each),
        )
        for name, each in figures.items()
    ]
    head = ("limiter", "promise", "decisions/s", "client µs", "core µs", "errors")
    table(f"Redis, {load[0]} tasks, {load[1]:,} keys; per decision (core: Redis's main thread)", head, rows, words=2)
    for kind, (own, peer, times) in beside_best_peers(figures).items():
        print(f"  {own}: {times:.1f} × the fastest peer that promises the like ({peer}; {kind})")


def beside_best_peers(figures: dict[str, Figures]) -> dict[str, tuple[str, str, float]]:
    """Name, for each kind of promise, our fastest, the fastest peer, and how many times as much ours decides."""
    kinds = {each.name: each.kind for each in CONTENDERS}
    found: dict[str, tuple[str, str, float]] = {}
    for kind in dict.fromkeys(kinds.values()):
        speeds = {name: each["decisions_per_s"] for name, each in figures.items() if kinds[name] == kind and each["decisions"]}
        own = max((name for name in speeds if name.startswith(OURS)), key=speeds.__getitem__, default=None)
        peer = max((name for name in speeds if not name.startswith(OURS)), key=speeds.__getitem__, default=None)
        if own and peer:
            found[kind] = (own, peer, speeds[own] / speeds[peer])
    return found


def times_best_peers(figures: dict[str, Figures]) -> float:
    """Say how many times as fast as the fastest peer of its promise ours decides, for that promise of which it is the least."""
    return min((times for _, _, times in beside_best_peers(figures).values()), default=0.0)


async def open_all(stack: AsyncExitStack) -> tuple[dict[str, tuple[Meter, Loads]], dict[str, str]]:
    """Set up every peer; those that can't be had, and why."""
    ready: dict[str, tuple[Meter, Loads]] = {}
    missing: dict[str, str] = {}
    each: Contender
    for each in CONTENDERS:
        try:
            meter = stack.enter_context(own_server())
            ready[each.name] = meter, await stack.enter_async_context(each.open(meter.url))
        except Unavailable as error:
            missing[each.name] = str(error)
    return ready, missing


async def run(options: Options) -> Figures:
    """Print a table for each load, and one of latencies."""
    # A round begins with new slots for all of our sliding windows, as others had their turns before it: in use, one comes a second.
    seconds = options.seconds(1.0, 0.2)
    promises = {each.name: each.promise for each in CONTENDERS}
    most_keys = {each.name: each.most_keys for each in CONTENDERS}
    results: Figures = {"loads": {}, "latency": {}, "promises": promises}
    async with AsyncExitStack() as stack:
        ready, missing = await open_all(stack)
        for load in QUICK if options.quick else LOADS:
            what = f"{load[0]} tasks, {load[1]} keys"
            subjects: dict[str, Callable[[], Awaitable[Figures]]] = {
                name: partial(measure, meter, loads, load, seconds)
                for name, (meter, loads) in ready.items()
                if load[1] <= most_keys[name]
            }
            figures = await interleave_figures(what, subjects, options.redis_rounds)
            print_load(load, figures, promises)
            results["loads"][what] = figures
        for name, (_, loads) in ready.items():
            if most_keys[name] == HOT_KEYS:
                continue
            progress(f"latency: {name}")
            results["latency"][name] = await latencies(loads, options.seconds(2.0, 0.5))
        progress("")
        version = next(iter(ready.values()))[0].version()
    rows = [
        (name, *(f"{value:.2f}" for key, value in each.items() if key.endswith("_ms")), errors_of(each))
        for name, each in results["latency"].items()
    ]
    table(f"Latency at {LATENCY_PER_S} checks a second, ms", ("limiter", "p50", "p90", "p99", "p99.9", "errors"), rows)
    for name, why in missing.items():
        print(f"  {name}: {why}")
    return results | {"server": version, "missing": missing}
