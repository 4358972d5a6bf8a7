"""A process whose checks name several limits, for tests that start several: it imports little, since each of them has to."""

from __future__ import annotations

import asyncio
import os
import random
import struct
import time
from dataclasses import dataclass
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import uvloop

from ratethrottle import Decision, FirstOf, RateThrottleCore, RateThrottleRule, RedisStorage

ENTRY = struct.Struct("=BBBQQ")  # rule, key, units, us before the call, us after the reply
KEYS = ("user:42", "user:43")
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


def asked(names: list[str], rng: random.Random) -> Any:
    """Two rules, or one and the first of two, or the first of two, or one: in any order."""
    first, second, third = rng.sample(names, 3)
    return rng.choice(((first, second), (first, FirstOf(second, third)), FirstOf(first, second), first))


async def _run(work: Work) -> None:
    # Written at once, so that a kill loses nothing.
    log = os.open(work.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    names = [rule.name for rule in work.rules]

    async def client(number: int) -> None:
        rng = random.Random(f"{work.seed} {work.number} {number}")
        while monotonic_us() < ends_us:
            key, cost = rng.choice(KEYS), rng.choice((1, 1, 2))
            before_us = monotonic_us()
            decision: Decision = await limiter.check(key, asked(names, rng), cost=cost)
            after_us = monotonic_us()
            if decision.allowed:
                for part in decision.parts or (decision,):
                    os.write(log, ENTRY.pack(names.index(part.rule), KEYS.index(key), part.cost, before_us, after_us))
            await asyncio.sleep(rng.uniform(0, 0.004))

    async with RateThrottleCore(RedisStorage.from_url(work.url, deadline=30), rules=work.rules) as limiter:
        await limiter.peek("somebody else", names[0])  # connects
        await asyncio.to_thread(work.together.wait, START_S)
        ends_us = monotonic_us() + round(work.run_s * 1e6)
        await asyncio.gather(*(client(number) for number in range(6)))
    os.close(log)


def read_log(path: Path) -> list[tuple[int, int, int, int, int]]:
    """What a process was granted, up to where it was killed."""
    data = path.read_bytes()
    return list(ENTRY.iter_unpack(data[: len(data) - len(data) % ENTRY.size]))
