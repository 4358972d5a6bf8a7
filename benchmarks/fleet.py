"""`fleet`: several client processes on one Redis: what a decision costs each, when Redis's core is full, latency at half of that."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from typing import Any

from benchmarks.server import Meter, errors_of, own_server
from benchmarks.timing import Figures, Options, percentile, progress, table

PROCESSES = (1, 2, 4)
TASKS = 512
KEYS = 20_000
ROUNDS = 5  # of half the load: what the machine's host takes away for some milliseconds falls into few of them


async def clients(count: int, order: dict[str, Any], meter: Meter) -> tuple[list[dict[str, Any]], Figures]:
    """Let `count` processes load the server together; what each saw, and what the server did meanwhile."""
    pipe = asyncio.subprocess.PIPE
    processes = []
    try:
        for number in range(count):
            command = (sys.executable, "-m", "benchmarks.client", json.dumps(order | {"number": number}))
            # What a paced client prints is one long line.
            process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, limit=2**26)
            processes.append((process, process.stdin, process.stdout))
        for _, _, reader in processes:
            assert reader is not None
            if await reader.readline() != b"ready\n":
                raise RuntimeError("a client process of the fleet ended before it began")
        before = meter.read()
        for _, writer, _ in processes:
            assert writer is not None
            writer.write(b"\n")
        results = [json.loads(await reader.readline()) for _, _, reader in processes if reader is not None]
        done = meter.read() - before
        await asyncio.gather(*(process.wait() for process, _, _ in processes))
    finally:
        for process, _, _ in processes:
            if process.returncode is None:
                process.kill()
                await process.wait()
    return results, {"script_us": done.script_us, "core_us": done.core_us, "script_calls": done.script_calls}


async def saturated(count: int, meter: Meter, seconds: float) -> Figures:
    """Let `count` processes decide as fast as they can."""
    order = {"url": meter.url, "name": f"fleet-{count}", "keys": KEYS, "tasks": TASKS, "seconds": seconds}
    results, server = await clients(count, order, meter)
    decisions = max(1, sum(each["decisions"] for each in results))
    client_us = 1e6 * sum(each["cpu_s"] for each in results) / decisions
    core_us = server["core_us"] / decisions
    return {
        "decisions_per_s": decisions / max(each["wall_s"] for each in results),
        "client_us": client_us,
        "script_us": server["script_us"] / decisions,
        "core_us": core_us,
        "script_calls": server["script_calls"] / decisions,
        # A process with a core to itself decides once in client_us, and each of those takes core_us of Redis's.
        "processes_for_a_full_core": client_us / core_us,
        "errors": {name: number for each in results for name, number in each["errors"].items()},
    }


async def half_loaded(per_s: float, meter: Meter, seconds: float) -> Figures:
    """Offer a fixed load from as many processes as leave Redis a core of its own, and put their latencies together."""
    count = max(1, min(PROCESSES[-1], (os.cpu_count() or 1) - 1))
    # Keys of its own: windows that the saturated runs have filled would cost more.
    order = {"url": meter.url, "name": "fleet-half", "keys": KEYS, "tasks": 64, "seconds": seconds, "per_s": per_s / count}
    results, server = await clients(count, order, meter)
    latencies = [latency for each in results for latency in each["latencies_s"]]
    dropped = sum(each["dropped"] for each in results)
    figures: Figures = {f"p{100 * share:g}_ms": 1e3 * percentile(latencies, share) for share in (0.5, 0.9, 0.99, 0.999)}
    return figures | {
        "offered_per_s": per_s,
        "processes": count,
        "answered_per_s": len(latencies) / max(each["wall_s"] for each in results),
        "dropped": dropped,
        "client_us": 1e6 * sum(each["cpu_s"] for each in results) / max(1, len(latencies)),
        "core_us": server["core_us"] / max(1, len(latencies)),
        "errors": {name: number for each in results for name, number in each["errors"].items()},
    }


async def run(options: Options) -> Figures:
    """Print what a decision costs by number of processes, and latency at half of what fills Redis's core."""
    figures: Figures = {"processes": {}}
    with own_server() as meter:
        for count in PROCESSES:
            progress(f"fleet: {count} processes")
            figures["processes"][f"{count}"] = await saturated(count, meter, options.seconds(4.0, 0.7))
        progress("fleet: half load")
        # One process is the one that had a core to itself on a machine of two. What a decision costs Redis depends on how they travel
        # together, so that it is learned at about that load.
        per_s = 0.5e6 / figures["processes"]["1"]["core_us"]
        near = await half_loaded(per_s, meter, options.seconds(2.0, 0.5))
        rounds = [await half_loaded(0.5e6 / near["core_us"], meter, options.seconds(1.5, 0.5)) for _ in range(ROUNDS)]
        rounds.sort(key=lambda each: each["p99_ms"])
        half = figures["half_load"] = rounds[ROUNDS // 2] | {"rounds": rounds}
        figures["server"] = meter.version()
    progress("")
    rows = [
        (
            name,
            f"{each['decisions_per_s']:,.0f}",
            f"{each['client_us']:.2f}",
            f"{each['script_us']:.2f}",
            f"{each['core_us']:.2f}",
            f"{each['script_calls']:.4f}",
            f"{each['processes_for_a_full_core']:.1f}",
            errors_of(each),
        )
        for name, each in figures["processes"].items()
    ]
    head = ("processes", "decisions/s", "client µs", "script µs", "core µs", "script calls", "fill a Redis core", "errors")
    table(f"One Redis, {TASKS} tasks a process, {KEYS:,} keys, {os.cpu_count()} cores; per decision", head, rows)
    print(
        f"  a process with a core to itself takes 1/{figures['processes']['1']['processes_for_a_full_core']:.1f} of Redis's core"
    )
    row = (
        f"{half['offered_per_s']:,.0f}/s from {half['processes']}",
        *(f"{half[f'p{share}_ms']:.2f}" for share in ("50", "90", "99", "99.9")),
        f"{half['answered_per_s']:,.0f}/s",
        f"{half['dropped']:,}",
        errors_of(half),
    )
    head = ("load", "p50", "p90", "p99", "p99.9", "answered", "dropped", "errors")
    table(f"Latency at the load that half fills Redis's core ({half['core_us']:.2f} µs per decision), ms", head, [row])
    all_ms = ", ".join(f"{each['p99_ms']:.1f}" for each in rounds)
    print(f"  that is the median of {ROUNDS} rounds, whose p99 are {all_ms} ms")
    return figures
