"""The types of `ratethrottle.testing`, as a test meets them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import assert_type

from ratethrottle import Decision, InMemoryStorage, RateThrottleCore, RateThrottleRule, RedisStorage
from ratethrottle.testing import (
    Fault,
    Faults,
    MakeLimiter,
    ManualClock,
    ManualRedisStorage,
    PromiseBrokenError,
    assert_promise,
    assert_promise_between,
    fake_redis,
)

RULE = RateThrottleRule("api", 3, 60)


async def clocks() -> None:
    """A clock is what a storage in memory takes."""
    clock = ManualClock(datetime(2030, 1, 1, tzinfo=UTC))
    assert_type(clock(), int)
    assert_type(clock.now, float)
    assert_type(clock.advance(1), None)
    assert_type(await clock.elapse(timedelta(seconds=1.5)), None)
    clock.advance("1")  # type: ignore[arg-type]  # no time
    storage = ManualRedisStorage(fake_redis(), clock=clock, deadline=1.0)
    redis_storage: RedisStorage = storage
    limiters = [RateThrottleCore(InMemoryStorage(clock_us=clock), rules=[RULE]), RateThrottleCore(redis_storage)]
    assert_type(await limiters[0].check("key"), Decision)
    assert_type(ManualRedisStorage.from_url("redis://a", clock=clock), ManualRedisStorage)


async def faults(limiter: RateThrottleCore, storage: RedisStorage) -> None:
    """Both kinds of `with`."""
    made = Faults(limiter)
    with Faults(storage).outage() as fault:
        assert_type(fault, Fault)
    async with made.slow(0.5), made.slow(timedelta(seconds=1)) as inner, made.refuse("OOM no room"):
        assert_type(inner, Fault)


def promises(decision: Decision) -> None:
    """What a log may hold."""
    assert_promise([(1, 1), (1.5, 2, True), [2, 1], (timedelta(seconds=3), decision)], RULE)
    assert_promise([(1, 1)], RULE, unit="us")
    assert_promise_between([(1, 2, decision), (datetime.now(UTC), datetime.now(UTC), 1)], RULE)
    assert_promise([(1, 1)], RULE, unit="ms")  # type: ignore[arg-type]  # neither of the two
    try:
        assert_promise([(1, 5)], RULE)
    except PromiseBrokenError as error:
        assert_type(error.breach.from_us, int)


def test_fixtures(ratethrottle_limiter: MakeLimiter, ratethrottle_clock: ManualClock) -> None:
    """The plugin's."""
    assert_type(ratethrottle_limiter(RULE), RateThrottleCore)
    assert_type(ratethrottle_limiter(RULE, RULE, client=fake_redis(), on_outage="deny"), RateThrottleCore)
    ratethrottle_clock.advance(1)
