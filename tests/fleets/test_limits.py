"""Eight processes share one limit through a real Redis: 50 tasks × 40 checks each on one key, at 500 per 40 s."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any, Literal

import pytest
import redis

from ratethrottle import RateThrottleCore, RateThrottleRule, RedisStorage
from ratethrottle.testing.intervals import check_bracketed
from tests.kit.crowd import CHECKS, TASKS, Work, join, monotonic_us, run_process
from tests.kit.forked import CONTEXT
from tests.kit.servers import RedisServer
from tests.kit.strategies import STRATEGIES, make_rule

PROCESSES = 8
LIMIT, WINDOW_US = 500, 40_000_000


@pytest.fixture(scope="module")
def processes() -> Iterator[ProcessPoolExecutor]:
    """Eight processes for all tests of this module."""
    together = CONTEXT.Barrier(PROCESSES)
    with ProcessPoolExecutor(PROCESSES, mp_context=CONTEXT, initializer=join, initargs=(together,)) as pool:
        yield pool


def server_us(client: redis.Redis) -> int:
    seconds, micros = client.time()
    return int(seconds) * 1_000_000 + int(micros)


def window_that_begins(after_us: int, within_us: int) -> tuple[int, int]:
    """A window length of 40 s and a little, such that one begins soon after an instant, and that beginning: nobody waits 40 s."""
    for window_us in range(WINDOW_US, WINDOW_US + 10_000):
        begins_us = after_us - after_us % window_us + window_us
        if begins_us < after_us + within_us:
            return window_us, begins_us
    raise AssertionError("no window of this length begins soon")


@pytest.mark.redis
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("old", [True, False])
def test_eight_processes_share_one_limit(
    strategy: str, old: bool, processes: ProcessPoolExecutor, redis_server: RedisServer, redis_client: redis.Redis
) -> None:
    if old:
        redis_server.grow_old()
    before_us, asked_us = server_us(redis_client), monotonic_us()
    window_us, begins_us = window_that_begins(before_us + 200_000, 100_000)
    rule = make_rule(strategy, LIMIT, window_us)
    start_us = asked_us + begins_us - before_us + 2_000  # the two clocks were read up to a call's time apart
    work = Work(redis_server.url, rule, start_us)
    results: list[Any] = list(processes.map(run_process, [work] * PROCESSES))
    after_us = server_us(redis_client)

    log = [admission for admitted, _ in results for admission in admitted]
    assert len(log) + sum(denied for _, denied in results) == PROCESSES * TASKS * CHECKS
    assert after_us < begins_us + window_us, "this machine is too slow for the test: the window was over"
    if strategy.endswith("bucket"):
        assert LIMIT <= len(log) <= LIMIT + (after_us - begins_us) * LIMIT // window_us
    else:
        assert len(log) == LIMIT
    check_bracketed(rule, log)
    assert_every_key_expires(redis_client, rule)


@pytest.mark.redis
@pytest.mark.parametrize("unit", ["day", "week", "month"])
def test_eight_processes_share_a_window_by_the_calendar(
    unit: Literal["day", "week", "month"], processes: ProcessPoolExecutor, redis_server: RedisServer, redis_client: redis.Redis
) -> None:
    now_us = server_us(redis_client)
    # A time zone in which no window ends meanwhile.
    rules = [make_rule("fixed_window", LIMIT, unit, None, timezone) for timezone in ("UTC", "Asia/Tokyo")]
    ends_us = [rule.compiled.calendar.around(now_us)[2] for rule in rules if rule.compiled.calendar is not None]
    rule = rules[ends_us.index(max(ends_us))]
    results: list[Any] = list(processes.map(run_process, [Work(redis_server.url, rule, monotonic_us() + 300_000)] * PROCESSES))
    log = [admission for admitted, _ in results for admission in admitted]
    assert len(log) == LIMIT
    assert sum(denied for _, denied in results) == PROCESSES * TASKS * CHECKS - LIMIT
    check_bracketed(rule, log)
    assert_every_key_expires(redis_client, rule)


def assert_every_key_expires(client: redis.Redis, rule: RateThrottleRule) -> None:
    """No counting key outlives what it counts by more than two seconds: two windows, and a slot, at most."""
    keys = list(client.scan_iter("*:{*"))
    assert len(keys) == 1, "one key was counted, and a peek leaves none"
    for key in keys:
        assert 0 < client.pttl(key) <= (2 * rule.window_us + rule.window_us // 64) // 1_000 + 2_000


@pytest.mark.redis
@pytest.mark.parametrize("strategy", STRATEGIES)
async def test_several_limiters_with_storages_of_their_own_share_one_limit(strategy: str, redis_server: RedisServer) -> None:
    """In one process, with a connection each and all checks in flight together."""
    rule = make_rule(strategy, 30, 3_600_000_000)
    limiters = [RateThrottleCore(RedisStorage.from_url(redis_server.url, deadline=30), rules=[rule]) for _ in range(4)]
    decisions = await asyncio.gather(
        *(limiter.check(("user", 42), cost=cost) for limiter in limiters for cost in (1, 2, 1, 3) * 3)
    )
    for limiter in limiters:
        await limiter.aclose()
    assert sum(decision.cost for decision in decisions if decision.allowed) == 30
    assert all(decision.cost > 0 and decision.retry_after > 0 for decision in decisions if not decision.allowed)
