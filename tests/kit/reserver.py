"""A process that reserves and settles, for tests that start several: it imports little, since each of them has to."""

from __future__ import annotations

import asyncio
import os
import random
import struct
import time
from dataclasses import dataclass
from multiprocessing.synchronize import Barrier
from pathlib import Path

import uvloop

from ratethrottle import RateLimitExceeded, RateThrottleCore, RateThrottleRule, RedisStorage

# What happened, its number, the rule, units, us before the call, us after the reply. A charge is granted and settled at once.
ENTRY = struct.Struct("=BIBQQQ")
GRANTED, SETTLES, CHARGES, CHARGED = range(4)
KEY = "user:42"
ESTIMATE_MOST = 8
START_S = 60  # for processes to come up on a busy machine


@dataclass(frozen=True)
class Work:
    """What one process does; every other one runs on uvloop."""

    url: str
    rules: list[RateThrottleRule]
    number: int
    seed: int
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
    numbers = iter(range(2**32))

    def note(what: int, number: int, rule: int, units: int, before_us: int = 0, after_us: int = 0) -> None:
        os.write(log, ENTRY.pack(what, number, rule, units, before_us, after_us))

    async def client(number: int) -> None:
        rng = random.Random(f"{work.seed} {work.number} {number}")
        while monotonic_us() < ends_us:
            index = rng.randrange(len(work.rules))
            rule, estimate, this = work.rules[index].name, rng.randint(1, ESTIMATE_MOST), next(numbers)
            before_us = monotonic_us()
            if rng.random() < 0.1:
                note(CHARGES, this, index, 1)
                await limiter.charge(KEY, rule)
                note(CHARGED, this, index, 1, before_us, monotonic_us())
                continue
            try:
                async with limiter.reserve(KEY, rule, cost=estimate) as reservation:
                    note(GRANTED, this, index, estimate, before_us, monotonic_us())
                    await asyncio.sleep(rng.uniform(0, 0.03))
                    if rng.random() < 0.9:
                        used = rng.randint(0, estimate)
                        note(SETTLES, this, index, used)
                        reservation.settle(used)
            except RateLimitExceeded:
                await asyncio.sleep(rng.uniform(0, 0.005))

    async with RateThrottleCore(RedisStorage.from_url(work.url, deadline=30), rules=work.rules) as limiter:
        await limiter.peek("somebody else", work.rules[0].name)  # connects
        await asyncio.to_thread(work.together.wait, START_S)
        ends_us = monotonic_us() + round(work.run_s * 1e6)
        await asyncio.gather(*(client(number) for number in range(6)))
    os.close(log)


def read_log(path: Path) -> list[tuple[int, int, int, int, int, int]]:
    """What a process did, up to where it was killed."""
    data = path.read_bytes()
    return list(ENTRY.iter_unpack(data[: len(data) - len(data) % ENTRY.size]))
