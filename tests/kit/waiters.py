"""A process whose tasks wait for capacity, for tests that start several: it imports little, since each of them has to."""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import dataclass
from multiprocessing.synchronize import Barrier

from ratethrottle import Decision, RateLimitExceeded, RateThrottleCore, RateThrottleRule, RedisStorage
from ratethrottle._engine.joint import JointDecision
from ratethrottle.testing.intervals import Bracketed
from ratethrottle.waiting import lines

WATCH_S = 0.005
START_S = 60  # for processes to come up on a busy machine

_together: Barrier


def join(together: Barrier) -> None:
    """Begin a process: it waits for capacity when all have come."""
    global _together  # noqa: PLW0603 (a barrier reaches a process only when it starts)
    _together = together


@dataclass(frozen=True)
class Work:
    """What one process does: so many tasks acquire again and again, for some seconds."""

    url: str
    rule: RateThrottleRule
    tasks: int
    run_s: float


@dataclass(frozen=True)
class Done:
    """What came of it: each grant, between the time when its task began to wait and when it went on, and script calls."""

    granted: list[Bracketed]
    calls: int
    booked: list[
        tuple[int, int]
    ]  # of grants that were booked: when the bucket would be empty after it, and when its task went on
    stalled_us: int  # by how much its event loop was late, at most: on a busy machine that is a lot
    late_s: float  # by how much a task came back after its timeout, at most
    in_order: bool  # whether grants came in the order in which tasks began to wait


def monotonic_us() -> int:
    return time.monotonic_ns() // 1_000


def run_process(work: Work) -> Done:
    """Acquire as often as it goes."""
    return asyncio.run(_run(work))


async def _run(work: Work) -> Done:
    granted: list[Bracketed] = []
    booked: list[tuple[int, int]] = []
    late_s, began, served = 0.0, 0, list[int]()

    async def client() -> None:
        nonlocal late_s, began
        while (left_s := (ends_us - monotonic_us()) / 1e6) > 0:
            before_us, number, began = monotonic_us(), began, began + 1
            with contextlib.suppress(RateLimitExceeded):
                await limiter.acquire("user:42", timeout=left_s)
                granted.append((before_us, monotonic_us(), 1))
                served.append(number)
            late_s = max(late_s, (monotonic_us() - ends_us) / 1e6)

    stalled_us = 0

    async def watch() -> None:
        nonlocal stalled_us
        while True:
            before_us = monotonic_us()
            await asyncio.sleep(WATCH_S)
            stalled_us = max(stalled_us, monotonic_us() - before_us - round(WATCH_S * 1e6))

    def served_now(decision: Decision) -> Decision:
        # Each booking has the bucket be empty later, so that this tells in which order Redis has seen them.
        if isinstance(decision, JointDecision):
            booked.append((decision.at_us + decision.reset_after_us, monotonic_us()))
        return real(decision)

    real, lines.served = lines.served, served_now
    async with RateThrottleCore(RedisStorage.from_url(work.url, deadline=30), rules=[work.rule]) as limiter:
        await limiter.peek("somebody else")  # connects
        await asyncio.to_thread(_together.wait, START_S)
        before = limiter.statistics().calls
        ends_us = monotonic_us() + round(work.run_s * 1e6)
        watching = asyncio.create_task(watch())
        await asyncio.gather(*(client() for _ in range(work.tasks)))
        watching.cancel()
        lines.served = real
        return Done(granted, limiter.statistics().calls - before, booked, stalled_us, late_s, served == sorted(served))
