"""A process that holds slots, for tests that start several: it imports little, since each of them has to."""

from __future__ import annotations

import asyncio
import os
import random
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import NamedTuple

import uvloop

from ratethrottle import ConcurrencyRule, RateLimitExceeded, RateThrottleCore, RedisStorage

# What happened, its number, units, us before the call (of what was granted), us now.
ENTRY = struct.Struct("=BIBQQ")
GRANTED, RELEASES, LOST = range(3)
KEY = "tenant:42"
LATE_US = 250_000
START_S = 60  # for processes to come up on a busy machine


@dataclass(frozen=True)
class Work:
    """What one process does; every other one runs on uvloop."""

    url: str
    rule: ConcurrencyRule
    number: int
    seed: int
    log: Path
    together: Barrier
    run_s: float
    tasks: int = 4


def monotonic_us() -> int:
    return time.monotonic_ns() // 1_000


def run_process(work: Work) -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop if work.number % 2 else asyncio.new_event_loop) as runner:
        runner.run(_run(work))


async def _run(work: Work) -> None:
    # Written at once, so that a kill loses nothing.
    log = os.open(work.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    numbers = iter(range(2**32))

    def note(what: int, number: int, units: int, before_us: int = 0) -> None:
        os.write(log, ENTRY.pack(what, number, units, before_us, monotonic_us()))

    async def client(number: int) -> None:
        rng = random.Random(f"{work.seed} {work.number} {number}")
        while monotonic_us() < ends_us:
            cost, this = rng.choice((1, 1, 2)), next(numbers)
            before_us = monotonic_us()
            try:
                async with limiter.slot(KEY, cost=cost, timeout=rng.choice((0, 0.05, 1, 1))) as slot:
                    note(GRANTED, this, cost, before_us)
                    lasts_s = rng.uniform(0, 0.2) if rng.random() < 0.97 else 1.5 * work.rule.ttl
                    try:
                        await asyncio.wait_for(slot.lost.wait(), lasts_s)
                    except TimeoutError:
                        note(RELEASES, this, cost)
                    else:
                        note(LOST, this, cost)
            except RateLimitExceeded:
                await asyncio.sleep(rng.uniform(0.005, 0.02))

    async with RateThrottleCore(RedisStorage.from_url(work.url, on_outage="deny"), rules=[work.rule]) as limiter:
        await asyncio.to_thread(work.together.wait, START_S)
        ends_us = monotonic_us() + round(work.run_s * 1e6)
        await asyncio.gather(*(client(number) for number in range(work.tasks)))
    os.close(log)


class Holding(NamedTuple):
    """For how long a process held units, for all that it knows."""

    process: int
    units: int
    since_us: int
    until_us: int


def read_holdings(work: Work, ended_us: int, frozen: Sequence[tuple[int, int]] = ()) -> list[Holding]:
    """What a process held, up to when it ended. frozen: from when to when it stood still.

    What was held by a process that was killed or stood still lasted until it lapsed. That was no sooner than a ttl after it was granted,
    nor while the process was well. What was lost lasted until the process said so, but for how late its loop may be on a busy machine.
    """
    data = work.log.read_bytes()
    ttl_us = round(0.99 * work.rule.ttl * 1e6)
    begun: dict[int, tuple[int, int, int]] = {}  # units, since when, until when at least
    holdings = []
    for what, number, units, before_us, now_us in ENTRY.iter_unpack(data[: len(data) - len(data) % ENTRY.size]):
        if what == GRANTED:
            begun[number] = (units, now_us, max(before_us, now_us - 500_000) + ttl_us)
            continue
        _, since_us, least_us = begun.pop(number)
        stood_us = [began_us for began_us, over_us in frozen if since_us < over_us and began_us < now_us]
        until_us = min(now_us, max(least_us, stood_us[0])) if stood_us else now_us
        if what == LOST and not stood_us:
            until_us = max(min(now_us, least_us), now_us - LATE_US)
        holdings.append(Holding(work.number, units, since_us, until_us))
    for units, since_us, least_us in begun.values():
        holdings.append(Holding(work.number, units, since_us, max(ended_us, least_us)))
    return holdings


def most_held(holdings: Sequence[Holding]) -> tuple[int, int]:
    """How many units were held at once at most, and when first."""
    steps = sorted([(each.until_us, -each.units) for each in holdings] + [(each.since_us, each.units) for each in holdings])
    held, most, at_us = 0, 0, 0
    for step_us, units in steps:
        held += units
        if held > most:
            most, at_us = held, step_us
    return most, at_us
