"""A process whose tasks check one key as fast as it goes, together with other processes: it imports little, since each of them has to."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from multiprocessing.synchronize import Barrier

from ratethrottle import RateThrottleCore, RateThrottleRule, RedisStorage
from ratethrottle.testing.intervals import Bracketed

TASKS, CHECKS = 50, 40
START_S = 60  # for processes to come up on a busy machine

_together: Barrier


def join(together: Barrier) -> None:
    """Begin a process: it checks when all have come."""
    global _together  # noqa: PLW0603 (a barrier reaches a process only when it starts)
    _together = together


@dataclass(frozen=True)
class Work:
    """What one process does."""

    url: str
    rule: RateThrottleRule
    start_us: int  # of the monotonic clock, which all processes of a machine share


def monotonic_us() -> int:
    return time.monotonic_ns() // 1_000


def run_process(work: Work) -> tuple[list[Bracketed], int]:
    """Check as fast as it goes. Returns each admission, between before and after its call, and the number of denials."""
    return asyncio.run(_run(work))


async def _run(work: Work) -> tuple[list[Bracketed], int]:
    admitted: list[Bracketed] = []
    denied = 0

    async def client() -> None:
        nonlocal denied
        for _ in range(CHECKS):
            before_us = monotonic_us()
            if await limiter.check("user:42"):
                admitted.append((before_us, monotonic_us(), 1))
            else:
                denied += 1

    async with RateThrottleCore(RedisStorage.from_url(work.url, deadline=30), rules=[work.rule]) as limiter:
        await limiter.peek("somebody else")  # connects
        await asyncio.to_thread(_together.wait, START_S)
        await asyncio.sleep(max(0, work.start_us - monotonic_us()) / 1e6)
        await asyncio.gather(*(client() for _ in range(TASKS)))
    return admitted, denied
