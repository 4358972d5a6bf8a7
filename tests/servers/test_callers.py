"""What people do around a limiter is the same in memory and on Redis: a forgotten `await`, limits and costs of 0, counts of decisions."""

from __future__ import annotations

import asyncio
import gc
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from ratethrottle import (
    CostExceedsLimit,
    InMemoryStorage,
    InvalidRequest,
    Outcomes,
    RateThrottleCore,
    RateThrottleRule,
    Request,
    create_limiter,
)
from tests.kit.counted import counted
from tests.kit.servers import RedisServer

RULE = RateThrottleRule("api", 3, 60)
NOTHING = RateThrottleRule("nothing", 0, 60)


def limiter(*rules: RateThrottleRule) -> RateThrottleCore:
    return RateThrottleCore(rules=rules or (RULE,))


# A forgotten await


@contextmanager
def heard() -> Iterator[list[str]]:
    said: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield said
    said += [f"{warning.category.__name__}: {warning.message}" for warning in caught]


NEVER_AWAITED = "RuntimeWarning: coroutine 'RateThrottleCore.check' was never awaited"


async def test_a_forgotten_await_is_warned_of_at_once(redis_server: RedisServer) -> None:
    async with create_limiter("redis", redis_url=redis_server.url, rules=[RULE], deadline=5) as shared:
        for core in (limiter(), limiter(NOTHING), shared):
            with heard() as said:
                core.check("key")
            assert said == [NEVER_AWAITED]
            with heard() as said:
                kept = [core.check("key"), core.check("key")]
                assert not said
                del kept
            assert said == [NEVER_AWAITED] * 2
        assert (await shared.peek("key")).remaining == 3


async def test_no_task_that_awaits_or_gives_up_is_warned(redis_server: RedisServer) -> None:
    async with create_limiter(
        "redis", redis_url=redis_server.url, rules=[RateThrottleRule("api", 100, 60)], deadline=5
    ) as shared:
        for core in (limiter(RateThrottleRule("api", 100, 60)), shared):
            with heard() as said:
                await core.check("key")
                core.check("key").close()
                with pytest.raises(KeyError):
                    core.check("key").throw(KeyError("mine"))
                await asyncio.gather(core.check("key"), core.check("key"))
                await core.check_many(["key", "other"])
                asyncio.get_running_loop().create_task(core.check("key")).cancel()  # before its first step
                started = asyncio.create_task(core.check("key"))
                await asyncio.sleep(0)
                started.cancel()
                with pytest.raises(TypeError):
                    bool(core.check("key"))  # that it must be awaited was said
                for i in range(300):
                    await core.check(f"key:{i}")
                await asyncio.sleep(0.01)
                gc.collect()
            assert not said


# A limit of 0, and a cost of 0


async def test_a_limit_of_0_denies_everything_without_asking_anybody(redis_server: RedisServer) -> None:
    away = create_limiter("redis", redis_url="redis://127.0.0.1:1", rules=[NOTHING], on_outage="allow")
    there = create_limiter("redis", redis_url=redis_server.url, rules=[NOTHING], deadline=5)
    for core in (limiter(NOTHING), away, there):
        for cost in (1, 5, 1_000_000_000):
            for denied in (
                await core.check("key", cost=cost),
                await core.check(("user", 1), "nothing", cost=cost),
                await core.peek("key", cost=cost),
                *(await core.check_many([Request("key", cost=cost)])),
            ):
                assert not denied
                assert (denied.cost, denied.limit, denied.remaining, denied.retry_after) == (cost, 0, 0, math.inf)
                assert (denied.reset_after, denied.source) == (0.0, "memory")
                assert "Retry-After" not in denied.headers()
        assert counted(core) == {"nothing": {"memory": Outcomes(0, 9)}}
        with pytest.raises(CostExceedsLimit, match="capacity of 0"):
            core.check("key", cost=1_000_000_001)
        with pytest.raises(InvalidRequest):
            core.check("")
        assert core.statistics().calls == 0
        await core.aclose()


@pytest.mark.parametrize("strategy", ["sliding_window", "token_bucket", "leaky_bucket", "sliding_counter", "fixed_window"])
async def test_a_peek_with_a_cost_of_0_says_what_is_left(strategy: str, redis_server: RedisServer) -> None:
    rule = RateThrottleRule("api", 2, 3600, strategy=strategy)
    shared = create_limiter("redis", redis_url=redis_server.url, rules=[rule], deadline=5, prefilter_ttl=0)
    for core in (RateThrottleCore(InMemoryStorage(), rules=[rule]), shared):
        for left in (2, 1, 0):
            asked = await core.peek("key", cost=0)
            assert (asked.allowed, asked.cost, asked.remaining, asked.retry_after) == (True, 0, left, 0.0)
            assert (await core.peek("key")).reset_after - asked.reset_after < 1
            if left:
                await core.check("key")
        assert not await core.check("key")
        with pytest.raises(InvalidRequest, match=r"peek\(key, cost=0\) says what is left"):
            core.check("key", cost=0)
        for cost in (-1, False, 0.0):
            with pytest.raises(InvalidRequest, match=r"at least 0"):
                await core.peek("key", cost=cost)  # type: ignore[arg-type]  # that it is refused is the test
        await core.aclose()


# Counts of decisions


async def test_decisions_are_counted_by_rule_and_source(redis_server: RedisServer) -> None:
    rules = [RULE, RateThrottleRule("other", 1, 3600, strategy="fixed_window")]
    async with create_limiter("redis", redis_url=redis_server.url, rules=rules, deadline=5) as core:
        assert counted(core) == {}
        for _ in range(2):
            await core.check("key", "other")
        await core.check("key", "other")
        await core.check_many([Request(f"key {i}", "api", cost=2) for i in range(5)])
        await core.peek("key", "api")
        assert counted(core) == {
            "api": {"redis": Outcomes(5, 0)},
            "other": {"redis": Outcomes(1, 0), "prefilter": Outcomes(0, 2)},
        }
    assert core.statistics().decisions["other"]["redis"].allowed == 1
