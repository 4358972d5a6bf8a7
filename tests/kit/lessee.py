"""A process that spends from leases, for tests that start several: it imports little, since each of them has to."""

from __future__ import annotations

import asyncio
import os
import struct
import time
from dataclasses import dataclass
from multiprocessing.synchronize import Barrier
from pathlib import Path

import uvloop

from ratethrottle import Decision, RateThrottleCore, RateThrottleRule, RedisStorage

ENTRY = struct.Struct("=BBBQQ")  # rule, from a lease, units, us before the call, us after the reply
START_S = 60  # for processes to come up on a busy machine


@dataclass(frozen=True)
class Work:
    """What one process does; the first ones are the busiest, and every other one runs on uvloop."""

    url: str
    rules: list[RateThrottleRule]
    number: int
    log: Path
    together: Barrier
    run_s: float


def monotonic_us() -> int:
    return time.monotonic_ns() // 1_000


def run_process(work: Work) -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop if work.number % 2 else asyncio.new_event_loop) as runner:
        runner.run(_run(work))


async def _run(work: Work) -> None:
    # Written at once, so that a kill loses nothing.
    log = os.open(work.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    async def client(index: int, cost: int) -> None:
        while monotonic_us() < ends_us:
            before_us = monotonic_us()
            decision: Decision = await limiter.check("user:42", work.rules[index].name, cost=cost)
            after_us = monotonic_us()
            if decision.allowed:
                os.write(log, ENTRY.pack(index, decision.source == "lease", cost, before_us, after_us))
                await asyncio.sleep(0.0005 * 2**work.number)
            else:
                await asyncio.sleep(min(0.02, decision.retry_after))

    async with RateThrottleCore(RedisStorage.from_url(work.url, deadline=30), rules=work.rules) as limiter:
        await limiter.peek("somebody else", work.rules[0].name)  # connects
        await asyncio.to_thread(work.together.wait, START_S)
        ends_us = monotonic_us() + round(work.run_s * 1e6)
        await asyncio.gather(*(client(index, cost) for index in range(len(work.rules)) for cost in (1, 1, 2)))
    os.close(log)


def read_log(path: Path) -> list[tuple[int, int, int, int, int]]:
    """What a process was granted, up to where it was killed."""
    data = path.read_bytes()
    return list(ENTRY.iter_unpack(data[: len(data) - len(data) % ENTRY.size]))
