"""Callers that book on a real Redis: how many calls that takes, what a cancellation gives back, and a Redis that goes away."""

from __future__ import annotations

import asyncio
import random
import time
from typing import Any

import pytest

from ratethrottle import RateLimitExceeded, RateThrottleCore, RateThrottleRule, create_limiter
from ratethrottle.testing.intervals import Bracketed, check_bracketed
from tests.kit.counted import counted
from tests.kit.recovery import served
from tests.kit.servers import RedisServer

pytestmark = [pytest.mark.redis, pytest.mark.uvloop]

SLOW = RateThrottleRule("r", 1, 5, strategy="token_bucket", burst=1)


def limiter_of(url: str, rule: RateThrottleRule, **options: Any) -> RateThrottleCore:
    return create_limiter("redis", redis_url=url, rules=[rule], **{"deadline": 10, **options})


def monotonic_us() -> int:
    return time.monotonic_ns() // 1_000


async def booked(limiter: RateThrottleCore, *tasks: asyncio.Task[Any]) -> float:
    """Wait until those tasks have their turns. Returns when a check would be granted."""
    lines = [line for loop in limiter._lines._loops.values() for line in loop.lines.values()]
    while any(line.is_asking() for line in lines):  # noqa: ASYNC110  # answers on several connections
        await asyncio.sleep(0.001)
    assert not any(task.done() for task in tasks)
    return (await limiter.peek("key")).retry_after


async def start(limiter: RateThrottleCore, count: int, **options: Any) -> list[asyncio.Task[Any]]:
    tasks = [asyncio.create_task(limiter.acquire("key", **options)) for _ in range(count)]
    await asyncio.sleep(0)
    return tasks


@pytest.mark.parametrize("strategy", ["token_bucket", "leaky_bucket"])
async def test_a_crowd_books_together_and_is_served_in_order_at_the_rate(strategy: str, redis_server: RedisServer) -> None:
    rule = RateThrottleRule("r", 200, 1, strategy=strategy, burst=20)
    async with limiter_of(redis_server.url, rule) as limiter:
        log: list[Bracketed] = []
        order: list[int] = []

        async def caller(number: int) -> None:
            before_us = monotonic_us()
            decision = await limiter.acquire("key", cost=1 + (number % 50 == 0), timeout=30)
            assert (decision.allowed, decision.retry_after, decision.source) == (True, 0, "redis")
            log.append((before_us, monotonic_us(), decision.cost))
            order.append(number)

        calls, began_us = limiter.statistics().calls, monotonic_us()
        await asyncio.gather(*(caller(number) for number in range(300)))
        assert order == list(range(300))
        assert limiter.statistics().calls - calls < 30
        assert monotonic_us() - began_us >= (306 - 20) * 5_000
        assert counted(limiter)["r"]["redis"].allowed == 300
        assert len(limiter._lines) == 0
        check_bracketed(rule, log)


async def test_a_storm_of_cancellations_loses_no_unit_and_no_place(redis_server: RedisServer) -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    async with limiter_of(redis_server.url, RateThrottleRule("r", 100, 1, strategy="token_bucket", burst=1)) as limiter:
        tasks = await start(limiter, 1_000)
        ends_us = monotonic_us()
        await booked(limiter)
        for number in rng.sample(range(1_000), 900):
            tasks[number].cancel()
            if rng.random() < 0.05:
                await asyncio.sleep(rng.choice((0, 0.001)))
        done = await asyncio.gather(*tasks, return_exceptions=True)
        granted = sum(not isinstance(one, BaseException) for one in done)
        assert granted >= 100
        assert monotonic_us() - ends_us < granted * 10_000 + 2_000_000, "they were served as if the others had never come"
        assert (await limiter.peek("key")).reset_after <= 1
        assert len(limiter._lines) == 0


async def test_what_is_cancelled_comes_back_unless_others_have_booked_behind(redis_server: RedisServer) -> None:
    async with limiter_of(redis_server.url, SLOW) as limiter, limiter_of(redis_server.url, SLOW) as other:
        await limiter.acquire("key")
        first = await start(limiter, 2)
        assert 14 < await booked(limiter, *first) <= 15
        (behind,) = await start(other, 1)
        assert 19 < await booked(other, behind) <= 20
        first[0].cancel()
        await asyncio.wait(first[:1])
        await asyncio.sleep(0.05)
        assert 19 < (await other.peek("key")).retry_after <= 20, "the other one's turn stays, and so does what stands before it"
        behind.cancel()
        first[1].cancel()
        await asyncio.wait([behind, *first])
        before_s = time.monotonic()
        while (await other.peek("key")).retry_after > 15:
            assert time.monotonic() < before_s + 5
            await asyncio.sleep(0.01)


async def test_closing_gives_back_what_is_booked(redis_server: RedisServer) -> None:
    async with limiter_of(redis_server.url, SLOW) as other:
        limiter = limiter_of(redis_server.url, SLOW)
        await limiter.acquire("key")
        tasks = await start(limiter, 5)
        assert await booked(limiter, *tasks) > 29
        await limiter.aclose()
        await asyncio.wait(tasks)
        assert (await other.peek("key")).retry_after <= 5


async def test_a_turn_that_is_too_far_ahead_is_refused_and_takes_no_call(redis_server: RedisServer) -> None:
    async with limiter_of(redis_server.url, SLOW) as limiter:
        await limiter.acquire("key")
        tasks = await start(limiter, 2, timeout=60)
        assert await booked(limiter, *tasks) > 14
        calls = limiter.statistics().calls
        for _ in range(50):
            with pytest.raises(RateLimitExceeded, match=r"retry in 1[45]"):
                await limiter.acquire("key", timeout=10)
        assert limiter.statistics().calls - calls <= 5
        assert counted(limiter)["r"]["prefilter"].denied >= 45
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def test_callers_that_wait_cost_no_time(redis_server: RedisServer) -> None:
    async with limiter_of(redis_server.url, RateThrottleRule("r", 20, 1, strategy="token_bucket", burst=1)) as limiter:
        tasks = await start(limiter, 1_000)
        await booked(limiter)
        used_s, began_s = time.process_time(), time.monotonic()
        await asyncio.gather(*tasks[:60])
        waited_s = time.monotonic() - began_s
        assert time.process_time() - used_s < 0.1 * waited_s
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def test_turns_that_are_booked_come_also_while_redis_is_away() -> None:
    rule = RateThrottleRule("r", 10, 1, strategy="token_bucket", burst=1)
    with RedisServer() as server:
        async with limiter_of(server.url, rule, on_outage="deny", deadline=0.25) as limiter:
            await served(limiter)
            tasks = await start(limiter, 11)
            await booked(limiter)
            server.stop()
            late = await start(limiter, 5, timeout=60)
            assert {(await task).source for task in tasks} == {"redis"}
            assert not any(task.done() for task in late)
            server.start()
            assert {(await task).source for task in late} == {"redis"}
            assert len(limiter._lines) == 0
