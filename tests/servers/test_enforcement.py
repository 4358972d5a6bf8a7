"""Rules that only flag, and rules that are off, with a Redis that answers, denies early, leases, is late or is away."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from ratethrottle import Decision, Outcomes, RateThrottleCore, RateThrottleRule, Request, create_limiter
from ratethrottle.errors import StorageUnavailable
from tests.kit.counted import counted
from tests.kit.servers import RedisServer, free_port

pytestmark = [pytest.mark.redis, pytest.mark.uvloop]


def flagging(url: str, limit: int = 3, *, rule: dict[str, Any] | None = None, **options: Any) -> RateThrottleCore:
    made = RateThrottleRule("shadow", limit, 3600, enforce="flag", **(rule or {}))
    return create_limiter("redis", redis_url=url, rules=[made], **options)


def overs(decisions: list[Decision]) -> list[bool]:
    assert all(decision.allowed and decision for decision in decisions)
    return [decision.over for decision in decisions]


@pytest.mark.parametrize("strategy", ["sliding_window", "token_bucket", "fixed_window", "sliding_counter"])
async def test_redis_counts_alike_and_nothing_that_is_over(redis_url: str, strategy: str) -> None:
    async with flagging(redis_url, rule={"strategy": strategy}, deadline=5) as limiter:
        first = await asyncio.gather(*[limiter.check("key") for _ in range(5)])
        assert overs(first) == [False] * 3 + [True] * 2
        assert {decision.source for decision in first} == {"redis"}
        known = await limiter.check("key")
        assert (overs([known]), known.source) == ([True], "prefilter")
        assert known.retry_after > 0
        assert "Retry-After" not in known.headers()
        many = await limiter.check_many([Request("other", cost=2)] * 2)
        assert overs(many) == [False, True]
        assert (await limiter.peek("other")).over is False
        assert (await limiter.peek("other", cost=2)).over
        assert (await limiter.check("other")).over is False
        decided = counted(limiter)["shadow"]
        assert sum(found.denied for found in decided.values()) == 4
        assert sum(found.allowed for found in decided.values()) == 5
        # The rule is changed, and the state is the same one.
        limiter.add_rule(RateThrottleRule("shadow", 3, 3600, strategy=strategy), replace=True)
        assert not await limiter.check("key")


async def test_a_lease_is_spent_and_what_it_does_not_hold_is_flagged(redis_url: str) -> None:
    async with flagging(redis_url, 40, rule={"lease": True, "strategy": "fixed_window"}, deadline=5) as limiter:
        decisions = [await limiter.check("key") for _ in range(60)]
        assert overs(decisions) == [False] * 40 + [True] * 20
        assert "lease" in {decision.source for decision in decisions}


@pytest.mark.parametrize(
    ("options", "granted"), [({"on_outage": "deny"}, 0), ({"expected_processes": 2}, 2), ({"on_outage": "allow"}, 9)]
)
async def test_what_a_policy_would_deny_is_over(options: dict[str, Any], granted: int) -> None:
    async with flagging(f"redis://127.0.0.1:{free_port()}", 4, **options) as limiter:
        decisions = [await limiter.check("key") for _ in range(9)]
        assert overs(decisions) == [False] * granted + [True] * (9 - granted)
        assert {decision.source for decision in decisions} == {"outage"}
        assert counted(limiter) == {"shadow": {"outage": Outcomes(granted, 9 - granted)}}


async def test_an_error_is_no_veto_and_is_raised() -> None:
    async with flagging(f"redis://127.0.0.1:{free_port()}", on_outage="raise") as limiter:
        with pytest.raises(StorageUnavailable):
            await limiter.check("key")


async def test_overload_is_over(redis_url: str) -> None:
    async with flagging(redis_url, 1_000, max_waiting=5, deadline=5) as limiter:
        decisions = await asyncio.gather(*[limiter.check(f"key {i}") for i in range(200)])
        late = [decision for decision in decisions if decision.source == "overload"]
        assert late
        assert overs(late) == [True] * len(late)
        assert not any(overs([decision for decision in decisions if decision.source == "redis"]))


@pytest.mark.parametrize("there", [True, False])
async def test_what_is_off_asks_nobody(redis_server: RedisServer, there: bool) -> None:
    url = redis_server.url if there else f"redis://127.0.0.1:{free_port()}"
    rule = RateThrottleRule("api", 2, 3600, enforce="off")
    limiter = create_limiter("redis", redis_url=url, rules=[rule], on_outage="raise", deadline=5)
    for _ in range(3):
        for free in (await limiter.check("key", cost=2), await limiter.peek("key"), *(await limiter.check_many(["key"]))):
            assert (free.allowed, free.over, free.remaining, free.source) == (True, False, 2, "memory")
    assert (limiter.statistics().calls, limiter.statistics().attempts) == (0, 0)
    assert counted(limiter) == {"api": {"memory": Outcomes(6, 0)}}
    if there:
        await limiter.reset("key")
        assert limiter.statistics().calls > 0
    else:
        with pytest.raises(StorageUnavailable):
            await limiter.reset("key")
    await limiter.aclose()
