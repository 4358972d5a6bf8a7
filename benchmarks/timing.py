"""Interleaved timing: every subject runs once a round, so that a machine that drifts drifts for all of them."""

from __future__ import annotations

import asyncio
import platform
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

Subject = Callable[[int], Awaitable[int]]
"""Runs n operations and returns the ns that they took."""


def machine() -> str:
    """Name the machine, the versions and the date, for the head of a table."""
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), "?"
    )
    return f"{cpu}, {platform.system()} {platform.release()}, CPython {platform.python_version()}, {datetime.now(UTC):%Y-%m-%d}"


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


def progress(text: str) -> None:
    """One line that is overwritten, on a terminal only."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def table(title: str, head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    """Print rows under a title, columns as wide as they need to be."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    print(f"\n{title}")
    for row in [head, *rows]:
        print(
            "  "
            + row[0].ljust(widths[0])
            + "".join(cell.rjust(width + 2) for cell, width in zip(row[1:], widths[1:], strict=True))
        )


async def empty() -> None:
    """Do nothing: awaiting this is the yardstick."""


async def await_empty(n: int) -> int:
    """Await an empty coroutine n times."""
    start = time.perf_counter_ns()
    for _ in range(n):
        await empty()
    return time.perf_counter_ns() - start
