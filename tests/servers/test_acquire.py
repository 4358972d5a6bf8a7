"""Callers that wait for capacity on a real Redis: their order, their timeouts, what a cancellation costs, and a Redis that is away."""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
import time
from collections.abc import Hashable
from typing import Any
from unittest.mock import patch

import pytest

from ratethrottle import (
    Decision,
    LimiterClosed,
    RateLimitExceeded,
    RateThrottleCore,
    RateThrottleRule,
    StorageError,
    create_limiter,
)
from ratethrottle.testing.intervals import Bracketed, check_bracketed
from ratethrottle.waiting.lines import Line
from tests.kit.counted import counted
from tests.kit.recovery import served
from tests.kit.servers import RedisServer, free_port
from tests.kit.strategies import STRATEGIES
from tests.kit.timeless import settled

pytestmark = [pytest.mark.redis, pytest.mark.uvloop]

LONG = RateThrottleRule("r", 1_000, 3_600)  # nothing comes back while a test lasts


def limiter_of(url: str, rule: RateThrottleRule, **options: Any) -> RateThrottleCore:
    return create_limiter("redis", redis_url=url, rules=[rule], **{"deadline": 10, **options})


def monotonic_us() -> int:
    return time.monotonic_ns() // 1_000


@pytest.mark.parametrize("strategy", STRATEGIES)
async def test_callers_are_served_in_order_and_the_promise_holds(strategy: str, redis_server: RedisServer) -> None:
    rule = RateThrottleRule("r", 40, 0.4, strategy=strategy)
    async with limiter_of(redis_server.url, rule) as limiter:
        served_: list[int] = []
        log: list[Bracketed] = []

        async def caller(number: int) -> None:
            before_us = monotonic_us()
            decision = await limiter.acquire("key", cost=1 + number % 3, timeout=60)
            log.append((before_us, monotonic_us(), decision.cost))
            served_.append(number)

        calls = limiter.statistics().calls
        await asyncio.gather(*(caller(number) for number in range(90)))
        assert served_ == list(range(90))
        assert limiter.statistics().calls - calls <= 3 * 90 + 5  # each differs from the one before it, and so is asked for alone
        assert len(limiter._lines) == 0
    check_bracketed(rule, log)


async def test_equal_callers_travel_together(redis_server: RedisServer) -> None:
    async with limiter_of(redis_server.url, RateThrottleRule("r", 50, 0.2, strategy="fixed_window")) as limiter:
        calls = limiter.statistics().calls
        await asyncio.gather(*(limiter.acquire("key", timeout=30) for _ in range(500)))
        assert limiter.statistics().calls - calls < 200
        assert counted(limiter)["r"]["redis"].allowed == 500


async def test_what_cannot_be_met_is_raised_at_once(redis_server: RedisServer) -> None:
    async with limiter_of(redis_server.url, RateThrottleRule("r", 1, 60)) as limiter:
        assert await limiter.acquire("key", timeout=0)
        before_s = time.monotonic()
        for timeout in (0, 5, 50):
            with pytest.raises(RateLimitExceeded) as caught:
                await limiter.acquire("key", timeout=timeout)
            assert 50 < caught.value.decision.retry_after <= 60
        assert time.monotonic() - before_s < 4


async def test_a_timeout_ends_the_wait_for_a_redis_that_does_not_answer() -> None:
    with RedisServer() as server:
        async with limiter_of(server.url, LONG) as limiter:
            await limiter.acquire("key")
            server.pause()
            try:
                before_s = time.monotonic()
                with pytest.raises(RateLimitExceeded) as caught:
                    await limiter.acquire("key", timeout=0.2)
                assert 0.15 < time.monotonic() - before_s < 5
                assert caught.value.decision.source == "overload"
            finally:
                server.resume()
            assert await limiter.acquire("key", timeout=10)
            assert len(limiter._lines) == 0


async def test_a_caller_that_is_cancelled_before_its_check_is_sent_consumes_nothing(redis_server: RedisServer) -> None:
    async with limiter_of(redis_server.url, LONG) as limiter:
        await limiter.check("key")
        tasks = [asyncio.create_task(limiter.acquire("key")) for _ in range(10)]
        asyncio.get_running_loop().call_soon(tasks[3].cancel)
        for task in tasks[5:]:
            asyncio.get_running_loop().call_soon(task.cancel)
        await asyncio.wait(tasks)
        assert sum(not task.cancelled() for task in tasks) == 4
        assert 991 <= (await limiter.peek("key")).remaining <= 995
        task = asyncio.create_task(limiter.acquire("other"))
        await asyncio.sleep(0)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        assert len(limiter._lines) == 0


async def test_a_storm_of_cancellations_loses_no_unit_while_somebody_waits(redis_server: RedisServer) -> None:
    """Each unit that Redis has counted reaches a caller. What it counts never comes back, so that the sums can be compared."""
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    lost = 0
    real = Line.hand_out

    def hand_out(line: Line, ask: Hashable, decision: Decision) -> None:
        nonlocal lost
        lost += all(ticket.ask != ask for ticket in line.tickets)
        real(line, ask, decision)

    async with limiter_of(redis_server.url, LONG) as limiter:
        granted: list[int] = []
        tasks: list[asyncio.Task[None]] = []

        async def caller(number: int) -> None:
            await limiter.acquire("key")
            granted.append(number)

        with patch.object(Line, "hand_out", hand_out):
            for number in range(4_000):
                tasks.append(asyncio.create_task(caller(number)))
                while rng.random() < 0.75:
                    rng.choice(tasks[-40:]).cancel()
                if rng.random() < 0.2:
                    await asyncio.sleep(rng.choice((0, 0, 0.001)))
            await asyncio.wait([*tasks], timeout=1)
            used = LONG.limit - (await limiter.peek("key")).remaining
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        print(len(granted), "granted,", lost, "lost,", used, "used")
        assert len(granted) + lost == used
        # Each was granted when nobody stood in line any more. How many that are depends on how busy the machine is.
        assert lost < used / 2
        assert len(limiter._lines) == 0


async def test_callers_wait_through_an_outage() -> None:
    with RedisServer() as server:
        async with limiter_of(server.url, LONG, on_outage="deny", deadline=0.25) as limiter:
            await limiter.acquire("key")
            server.stop()
            tasks = [asyncio.create_task(limiter.acquire("key", timeout=60)) for _ in range(20)]
            await asyncio.sleep(0.5)
            assert not any(task.done() for task in tasks)
            asked = counted(limiter)["r"]["outage"].denied
            assert asked < 60, "no busy loop"
            server.start()
            assert {(await task).source for task in tasks} == {"redis"}


async def test_an_outage_that_is_to_raise_does() -> None:
    async with limiter_of(f"redis://127.0.0.1:{free_port()}", LONG, on_outage="raise", deadline=0.25) as limiter:
        done = await asyncio.gather(*(limiter.acquire("key") for _ in range(10)), return_exceptions=True)
        assert all(isinstance(one, StorageError) for one in done)
        assert len(limiter._lines) == 0


async def test_callers_wait_until_an_overload_is_over(redis_server: RedisServer) -> None:
    async with limiter_of(redis_server.url, LONG, max_waiting=5, deadline=1) as limiter:
        await served(limiter)
        keys = [f"key {number}" for number in range(100)]
        done = await asyncio.gather(*(limiter.acquire(key, timeout=60) for key in keys))
        assert {decision.source for decision in done} == {"redis"}
        assert counted(limiter)["r"]["overload"].denied > 0


async def test_closing_ends_every_wait(redis_server: RedisServer) -> None:
    limiter = limiter_of(redis_server.url, RateThrottleRule("r", 1, 60))
    await limiter.acquire("key")
    tasks = [asyncio.create_task(limiter.acquire(key, timeout=timeout)) for key in ("key", "other") for timeout in (None, 100)]
    await asyncio.sleep(0.1)
    await limiter.aclose()
    done = await asyncio.gather(*tasks, return_exceptions=True)
    assert sum(isinstance(one, LimiterClosed) for one in done) == 3
    assert len(limiter._lines) == 0


async def test_closing_ends_a_wait_for_an_answer_too(redis_server: RedisServer) -> None:
    limiter = limiter_of(redis_server.url, LONG)
    task = asyncio.create_task(limiter.acquire("key"))
    await asyncio.sleep(0)
    await limiter.aclose()
    with pytest.raises(LimiterClosed):
        await task


def test_loops_in_several_threads_use_one_limiter(redis_server: RedisServer) -> None:
    limiter = limiter_of(redis_server.url, RateThrottleRule("r", 20, 0.2, strategy="sliding_window"))
    done: list[int] = []

    async def main(number: int) -> None:
        await asyncio.gather(*(limiter.acquire("key", timeout=60) for _ in range(40)))
        done.append(number)

    threads = [threading.Thread(target=asyncio.run, args=(main(number),)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(done) == [0, 1, 2]
    assert len(limiter._lines._loops) == 0
    asyncio.run(limiter.aclose())


async def test_a_rule_with_leases_is_waited_for_too(redis_server: RedisServer) -> None:
    rule = RateThrottleRule("r", 200, 1, lease=True)
    async with limiter_of(redis_server.url, rule) as limiter:
        log: list[Bracketed] = []

        async def caller() -> None:
            before_us = monotonic_us()
            await limiter.acquire("key", timeout=60)
            log.append((before_us, monotonic_us(), 1))

        await asyncio.gather(*(caller() for _ in range(500)))
        check_bracketed(rule, log)
        await settled()
