"""Interleaved timing: every subject runs once a round, so that a machine that drifts drifts for all of them."""

from __future__ import annotations

import asyncio
import os
import platform
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

Subject = Callable[[int], Awaitable[int]]
"""Runs n operations and returns the ns that they took."""

Figures = dict[str, Any]
"""What was measured, by name; a unit ends the name. Nested dicts and lists of numbers, ready for JSON."""


@dataclass(frozen=True)
class Options:
    """How long and how often to measure. rounds: interleaved rounds of `local`; the suites on Redis take a fifth, at least one."""

    quick: bool = False
    rounds: int = 15

    @property
    def redis_rounds(self) -> int:
        """Interleaved rounds of a suite that runs for seconds at a time."""
        return max(1, self.rounds // 5)

    def seconds(self, full: float, quick: float) -> float:
        """How long one measurement lasts."""
        return quick if self.quick else full


PEERS = ("limits", "coredis", "throttled-py", "pyrate-limiter", "aiolimiter")


def machine() -> dict[str, str]:
    """Name the machine, the versions and the date, for the head of a table."""
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), "?"
    )
    return {
        "cpu": cpu,
        "cores": f"{os.cpu_count()}",
        "system": f"{platform.system()} {platform.release()}",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "redis-py": version("redis"),
        **{name: version(name) for name in ("hiredis", *PEERS)},
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
    }


async def interleave(subjects: dict[str, tuple[Subject, int]], rounds: int) -> dict[str, float]:
    """Median ns per operation of each subject; a subject is a function and how many operations a round of it has."""
    samples: dict[str, list[float]] = {name: [] for name in subjects}
    for number in range(rounds):
        progress(f"round {number + 1} of {rounds}")
        for name, (run, operations) in subjects.items():
            samples[name].append(await run(operations) / operations)
            await asyncio.sleep(0)
    progress("")
    return {name: statistics.median(values) for name, values in samples.items()}


async def interleave_figures(
    what: str, subjects: Mapping[str, Callable[[], Awaitable[Figures]]], rounds: int
) -> dict[str, Figures]:
    """Run each subject once a round; medians of its numbers, the rounds themselves under "rounds", and the union of its errors."""
    samples: dict[str, list[Figures]] = {name: [] for name in subjects}
    for number in range(rounds):
        for name, run in subjects.items():
            progress(f"{what}: {name}, round {number + 1} of {rounds}")
            samples[name].append(await run())
    progress("")
    return {name: medians(figures) for name, figures in samples.items()}


def medians(rounds: list[Figures]) -> Figures:
    """One set of figures for several rounds of them."""
    result: Figures = {}
    for name, value in rounds[0].items():
        if isinstance(value, dict):
            result[name] = {key: count for figures in rounds for key, count in figures[name].items()}
        elif isinstance(value, (int, float)):
            result[name] = statistics.median(figures[name] for figures in rounds)
    return result | {"rounds": rounds}


def percentile(values: Sequence[float], share: float) -> float:
    """Find the value that `share` of them don't exceed; 0.0 of none."""
    ranked = sorted(values)
    return ranked[min(len(ranked) - 1, int(share * len(ranked)))] if ranked else 0.0


def progress(text: str) -> None:
    """One line that is overwritten, on a terminal only."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def table(title: str, head: tuple[str, ...], rows: Sequence[tuple[str, ...]], *, words: int = 1) -> None:
    """Print rows under a title, columns as wide as they need to be; the first `words` columns are words, the others numbers."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    print(f"\n{title}")
    for row in [head, *rows]:
        cells = [
            cell.ljust(width) if number < words else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  " + "  ".join(cells).rstrip())
    sys.stdout.flush()


async def empty() -> None:
    """Do nothing: awaiting this is the yardstick."""


async def await_empty(n: int) -> int:
    """Await an empty coroutine n times."""
    start = time.perf_counter_ns()
    for _ in range(n):
        await empty()
    return time.perf_counter_ns() - start
