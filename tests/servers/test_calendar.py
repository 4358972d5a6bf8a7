"""Windows by the calendar on a real Redis, in its own time: shared, kept until they end, and bounded while Redis is away."""

from __future__ import annotations

import asyncio
import datetime as dt
from typing import Any

import pytest
import redis

from ratethrottle import RateThrottleCore, RateThrottleRule, Request, create_limiter
from tests.kit.recovery import served, until
from tests.kit.servers import RedisServer
from tests.kit.strategies import CALENDARS

pytestmark = [pytest.mark.redis, pytest.mark.uvloop]

every_calendar = pytest.mark.parametrize("calendar", CALENDARS, ids=lambda calendar: "-".join(map(str, calendar.values())))


def far_from_midnight() -> str:
    """A time zone whose day doesn't end within the next minutes."""
    now = dt.datetime.now(dt.UTC)
    return "UTC" if 0 < now.hour < 23 else "Asia/Tokyo"


def limiter_of(url: str, calendar: dict[str, Any], limit: int = 20, **options: Any) -> RateThrottleCore:
    rule = RateThrottleRule("quota", limit, strategy="fixed_window", **calendar)
    return create_limiter("redis", redis_url=url, rules=[rule], **{"deadline": 5, **options})


@every_calendar
async def test_one_limit_for_all_until_the_window_ends(
    redis_server: RedisServer, redis_client: redis.Redis, calendar: dict[str, Any]
) -> None:
    limiters = [limiter_of(redis_server.url, calendar) for _ in range(3)]
    decisions = await asyncio.gather(*[limiter.check("key") for limiter in limiters for _ in range(10)])
    if len({round(decision.reset_after / 60) for decision in decisions}) > 2:
        pytest.skip("a window has ended meanwhile")
    assert sum(decision.allowed for decision in decisions) == 20
    denied = await limiters[0].check("key")
    assert (denied.allowed, denied.source) == (False, "prefilter")
    seconds, micros = redis_client.time()
    until_us = limiters[0].rules["quota"].compiled.calendar.around(int(seconds) * 10**6 + int(micros))[2]
    asked = await limiters[1].peek("key")
    [name] = redis_client.scan_iter("*:quota:*")
    assert b";d" in redis_client.get(name)
    # It counts until the window ends, and expires one to two seconds later.
    assert abs(asked.retry_after_us - (until_us - int(seconds) * 10**6 - int(micros))) < 5_000_000
    assert until_us / 1_000 + 1_000 - 50 <= redis_client.pexpiretime(name) <= until_us / 1_000 + 2_000 + 50
    await limiters[2].reset("key")
    assert (await limiters[2].check("key")).remaining == 19
    many = await limiters[2].check_many(["key", Request("key", cost=18), "key"])
    assert [bool(decision) for decision in many] == [True, True, False]
    for limiter in limiters:
        await limiter.aclose()


@pytest.mark.usefixtures("apart")
async def test_a_share_while_redis_is_away_is_charged_when_it_is_back() -> None:
    calendar = {"window": "day", "timezone": far_from_midnight()}
    with RedisServer() as server:
        one, other = (limiter_of(server.url, calendar, deadline=0.25, expected_processes=2) for _ in range(2))
        assert await one.check("key", cost=4)
        await other.peek("key")
        server.stop()
        decisions = [await one.check("key") for _ in range(20)]
        assert sum(decision.allowed for decision in decisions) == 8  # half of the limit, and half of what was used
        assert {decision.source for decision in decisions} == {"outage"}
        assert 0 < decisions[-1].retry_after <= 24 * 3600
        server.start()
        await until(lambda: served(one))
        await until(lambda: served(other))

        async def charged() -> bool:
            decision = await other.peek("key")
            return decision.source == "redis" and decision.remaining == 8

        await until(charged)
        await one.aclose()
        await other.aclose()


async def test_a_calendar_that_is_changed_keeps_what_was_used(redis_url: str) -> None:
    async with limiter_of(redis_url, {"window": "month"}, 10) as limiter:
        assert await limiter.check("key", cost=7)
        for calendar in ({"window": "month", "anchor": 15}, {"window": "week", "timezone": "Asia/Tokyo"}):
            limiter.add_rule(RateThrottleRule("quota", 10, strategy="fixed_window", **calendar), replace=True)  # type: ignore[arg-type]
            assert not await limiter.check("key", cost=4)
            assert (await limiter.peek("key")).remaining == 3
