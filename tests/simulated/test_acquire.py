"""Processes that wait for one limit on one store: what they get of it, and how often they ask. On a clock that jumps."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Coroutine, Iterator
from contextlib import ExitStack, contextmanager
from statistics import fmean
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest

from ratethrottle import Decision, InMemoryStorage, RateLimitExceeded, RateThrottleCore, RateThrottleRule
from ratethrottle.waiting import rivals
from tests.kit.timeless import run, timeless

TASKS, WINDOWS = 50, 10
WINDOW_S = 1


class Got(NamedTuple):
    """What came of a run."""

    grants: list[int]  # of each process
    calls: int
    used: float  # of what the rule would have granted

    @property
    def calls_each(self) -> float:
        return self.calls / sum(self.grants)

    @property
    def least_share(self) -> float:
        """Of a fair share, what the process has that got least."""
        return min(self.grants) * len(self.grants) / sum(self.grants)


class Process:
    """A limiter whose checks travel to the store and back, those of a turn together. Some processes are farther away than others."""

    def __init__(self, store: InMemoryStorage, rule: RateThrottleRule, rng: random.Random) -> None:
        self.core = RateThrottleCore(store, rules=[rule])
        self.way_s = rng.uniform(0.0002, 0.0005)
        self.late_s = 0.001  # how late a timer of an event loop is, at most
        self.rng = rng
        self.call: asyncio.Future[None] | None = None
        self.calls = 0

    @contextmanager
    def travelling(self) -> Iterator[None]:
        real = self.core.check

        async def check(key: str, rule: str | None = None, *, cost: int = 1) -> Decision:
            if self.call is None:
                self.call = asyncio.get_running_loop().create_future()
                asyncio.get_running_loop().call_later(self.way_s + self.rng.random() * self.late_s, self.serve)
            await self.call
            found = await real(key, rule, cost=cost)
            answer = found.allowed, found.remaining, found.retry_after_us, found.reset_after_us
            await asyncio.sleep(self.way_s)
            return self.core._entry(key, rule, cost).decided("redis", *answer)

        with patch.object(self.core, "check", check):
            yield

    def serve(self) -> None:
        self.calls += 1
        call, self.call = self.call, None
        assert call is not None
        call.set_result(None)


def compete(rule: RateThrottleRule, processes: int, seed: int, *, spread: bool = False, busy: bool = False) -> Got:
    """So many processes acquire for ten windows. spread: what was used before comes back bit by bit. busy: so is the machine."""

    async def main() -> Got:
        rng = random.Random(seed)
        store = InMemoryStorage(clock_us=timeless().time_us)
        each = [Process(store, rule, rng) for _ in range(processes)]
        for process in each if busy else ():
            process.way_s, process.late_s = rng.uniform(0.015, 0.03), 0.1
        if spread:
            for _ in range(rule.limit):
                assert await each[0].core.check("key")
                await asyncio.sleep(WINDOW_S / rule.limit * rng.uniform(0.7, 1.3))
        ends_s = timeless().time() + WINDOWS * WINDOW_S
        grants = [0] * processes

        async def caller(number: int) -> None:
            while (left_s := ends_s - timeless().time()) > 0:
                try:
                    await each[number].core.acquire("key", timeout=left_s)
                except RateLimitExceeded:
                    return
                grants[number] += 1

        callers: list[Coroutine[Any, Any, None]] = [caller(number) for number in range(processes) for _ in range(TASKS)]
        with ExitStack() as stack:
            stack.enter_context(patch.object(rivals, "random", rng))
            for process in each:
                stack.enter_context(process.travelling())
            await asyncio.gather(*callers)
        return Got(grants, sum(process.calls for process in each), sum(grants) / rule.limit / WINDOWS)

    return run(main)


def several(rule: RateThrottleRule, processes: int, *, spread: bool) -> list[Got]:
    """A run for each of three seeds: nothing else is left to chance."""
    found = [compete(rule, processes, seed, spread=spread) for seed in range(3)]
    for got in found:
        print(got, f"{got.calls_each:.2f} calls a grant, the least share is {got.least_share:.2f} of a fair one")
    return found


WINDOWED = ("sliding_window", "sliding_counter", "fixed_window")


@pytest.mark.parametrize("spread", [False, True])
@pytest.mark.parametrize("limit", [20, 40, 150])
@pytest.mark.parametrize("strategy", WINDOWED)
def test_four_processes_share_a_window_for_two_calls_a_grant(strategy: str, limit: int, spread: bool) -> None:
    found = several(RateThrottleRule("api", limit, WINDOW_S, strategy=strategy), 4, spread=spread)
    # Of few units each is asked for more often.
    assert fmean(got.calls_each for got in found) <= (2 if limit > 20 else 2.25)
    assert fmean(got.least_share for got in found) >= 0.5
    assert min(got.used for got in found) >= 0.9


@pytest.mark.parametrize("spread", [False, True])
@pytest.mark.parametrize("strategy", WINDOWED)
def test_on_a_busy_machine_they_still_share_a_window_and_use_most_of_it(strategy: str, spread: bool) -> None:
    for seed in range(3):
        got = compete(RateThrottleRule("api", 100, WINDOW_S, strategy=strategy), 4, seed, spread=spread, busy=True)
        print(got)
        assert got.calls_each <= 1
        assert got.least_share >= 0.5
        assert got.used >= 0.8


@pytest.mark.parametrize("spread", [False, True])
@pytest.mark.parametrize("strategy", WINDOWED)
def test_a_process_alone_asks_at_the_exact_time_and_leaves_nothing_unused(strategy: str, spread: bool) -> None:
    for got in several(RateThrottleRule("api", 40, WINDOW_S, strategy=strategy), 1, spread=spread):
        assert got.calls_each <= 2.05
        assert got.used >= 0.97


def test_a_process_alone_takes_what_comes_back_together_in_few_calls() -> None:
    for got in several(RateThrottleRule("api", 1_000, WINDOW_S), 1, spread=False):
        assert got.calls_each < 0.1
        assert got.used >= 0.99
