"""Load on one event loop: tasks that check as fast as they can, checks that arrive at a fixed rate, and the bare yardstick.

Imports nothing but the standard library: `stranger.py` uses it where this project isn't installed.
"""

from __future__ import annotations

import asyncio
import random
import time
from array import array
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

Check = Callable[[str], Awaitable[Any]]
"""One decision about a key; what it gives is true when allowed."""

TICK_S = 0.001  # asyncio's timers on epoll are late by up to this much
IN_FLIGHT_MAX = 1_000  # checks that `paced` has under way at once; those due wait, and their time counts
BEHIND_MAX = 50_000  # past it, it drops them and says how many


def key_names(count: int) -> list[str]:
    """Make distinct keys, in an order that is the same in every run and has nothing to do with the keys."""
    names = [f"user:{number}" for number in range(count)]
    random.Random(42).shuffle(names)
    return names


@dataclass
class Load:
    """What tasks decided in a while, and what it cost this process."""

    decisions: int = 0
    allowed: int = 0
    errors: dict[str, int] = field(default_factory=dict)
    wall_s: float = 0.0
    cpu_s: float = 0.0
    by_task: list[int] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """For another process."""
        return asdict(self)


def count_error(load: Load, error: Exception) -> None:
    """Note it by its type and the beginning of its message."""
    name = f"{type(error).__name__}: {str(error)[:60]}"
    load.errors[name] = load.errors.get(name, 0) + 1


async def drive(check: Check, keys: Sequence[str], tasks: int, seconds: float, *, yield_every: int = 0) -> Load:
    """Let `tasks` check for a while, each walking through all keys from a place of its own.

    yield_every: checks after which a task gives way to the others, besides what the check itself does (0: never).
    """
    load, running = Load(by_task=[0] * tasks), True

    async def work(number: int) -> None:
        position, done, allowed = number * len(keys) // tasks, 0, 0
        while running:
            try:
                if await check(keys[position]):
                    allowed += 1
                done += 1
            except Exception as error:  # noqa: BLE001  # a peer's errors are a result, whatever they are
                count_error(load, error)
                await asyncio.sleep(0)
            position += 1
            if position == len(keys):
                position = 0
            if yield_every and done % yield_every == 0:
                await asyncio.sleep(0)
        load.by_task[number] = done
        load.decisions += done
        load.allowed += allowed

    def stop() -> None:
        nonlocal running
        running = False

    wall_s, cpu_s = time.perf_counter(), time.process_time()
    asyncio.get_running_loop().call_later(seconds, stop)
    await asyncio.gather(*(work(number) for number in range(tasks)))
    load.wall_s, load.cpu_s = time.perf_counter() - wall_s, time.process_time() - cpu_s
    return load


async def warm(check: Check, keys: Sequence[str], tasks: int) -> None:
    """Check once in each of `tasks`, so that connections and scripts are there before anything is measured."""
    await asyncio.gather(*(check(keys[number % len(keys)]) for number in range(tasks)), return_exceptions=True)


async def wake(tasks: int, seconds: float) -> Load:
    """Drive tasks whose "check" is a bare future, all that wait woken in each turn of the loop: no limiter with a network can do less."""
    loop, waiting = asyncio.get_running_loop(), list[asyncio.Future[bool]]()
    turning: asyncio.Handle | None = None

    def check(_key: str) -> asyncio.Future[bool]:
        future: asyncio.Future[bool] = loop.create_future()
        waiting.append(future)
        return future

    def turn() -> None:
        nonlocal turning
        for future in waiting:
            future.set_result(True)
        waiting.clear()
        turning = loop.call_soon(turn)

    turning = loop.call_soon(turn)
    load = await drive(check, ["key"], tasks, seconds)
    turning.cancel()
    return load


@dataclass
class Paced:
    """Latencies under a fixed load. dropped: checks that were due while too many were under way."""

    offered_per_s: float
    latencies_s: list[float] = field(default_factory=list)
    errors: dict[str, int] = field(default_factory=dict)
    dropped: int = 0
    wall_s: float = 0.0
    cpu_s: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """For another process."""
        return asdict(self)


async def paced(check: Check, keys: Sequence[str], per_s: float, seconds: float) -> Paced:
    """Start checks at a fixed rate, however long the earlier ones take: each in a task that has no other, IN_FLIGHT_MAX at most.

    Those due in a millisecond start together at its end. A latency counts from there, so that a stall counts for all that
    fell due in it; only the millisecond that asyncio's timers may be late by doesn't count.
    """
    loop, result, load = asyncio.get_running_loop(), Paced(per_s), Load()
    # Room that has been touched: to ask for memory meanwhile, which a virtual machine may have to get from its host, takes time itself.
    latencies_s, answered = array("d", bytes(8 * (int(per_s * seconds) + 1))), 0
    # Tasks that rest between two checks, or go on at once with one that is due: waking a task costs half of starting one, and this
    # is not to measure itself.
    workers: list[asyncio.Task[None]] = []
    idle: list[asyncio.Future[tuple[str, float] | None]] = []
    behind: deque[tuple[str, float]] = deque()
    ending = False

    async def work(order: tuple[str, float] | None) -> None:
        nonlocal answered
        while order is not None:
            key, due_s = order
            try:
                await check(key)
                latencies_s[answered] = loop.time() - due_s
                answered += 1
            except Exception as error:  # noqa: BLE001  # a peer's errors are a result, whatever they are
                count_error(load, error)
            if behind:
                order = behind.popleft()
                continue
            if ending:
                return
            rest = loop.create_future()
            idle.append(rest)
            order = await rest

    cpu_s, began_s, started = time.process_time(), loop.time(), 0
    for tick in range(1, int(seconds / TICK_S) + 1):
        tick_s = began_s + tick * TICK_S
        await asyncio.sleep(max(0.0, tick_s - loop.time()))
        due_s = min(loop.time(), tick_s + TICK_S)
        for _ in range(int(tick * TICK_S * per_s) - started):
            order = keys[started % len(keys)], due_s
            if idle:
                idle.pop().set_result(order)
            elif len(workers) < IN_FLIGHT_MAX:
                workers.append(loop.create_task(work(order)))
            elif len(behind) < BEHIND_MAX:
                behind.append(order)
            else:
                result.dropped += 1
            started += 1
    ending = True
    for rest in idle:
        rest.set_result(None)
    await asyncio.gather(*workers)
    result.wall_s, result.cpu_s, result.errors = loop.time() - began_s, time.process_time() - cpu_s, load.errors
    result.latencies_s = latencies_s[:answered].tolist()
    return result
