"""How to test code that is limited: with a clock that stands still, and a Redis that fails on command. It needs fakeredis[lua].

python examples/testing.py
"""

import asyncio

from ratethrottle import InMemoryStorage, RateThrottleCore, RateThrottleRule, RedisStorage, StorageError
from ratethrottle.testing import Faults, ManualClock, fake_redis


async def handle(limiter: RateThrottleCore, user: str) -> int:
    """Answer a request: what is tested."""
    try:
        return 200 if await limiter.check(user) else 429
    except StorageError:
        return 503


async def test_the_fourth_request_of_a_minute_is_refused() -> None:
    """A minute passes on the clock of the test, and nowhere else."""
    clock = ManualClock()
    limiter = RateThrottleCore(InMemoryStorage(clock_us=clock), rules=[RateThrottleRule("api", 3, 60)])
    assert [await handle(limiter, "ann") for _ in range(4)] == [200, 200, 200, 429]
    clock.advance(60)
    assert await handle(limiter, "ann") == 200


async def test_without_redis_it_is_unavailable() -> None:
    """The handler's own fallback, which nobody sees before Redis fails."""
    limiter = RateThrottleCore(
        RedisStorage(fake_redis(), on_outage="raise", deadline=5.0), rules=[RateThrottleRule("api", 3, 60)]
    )
    async with Faults(limiter).outage():
        assert await handle(limiter, "ann") == 503
    assert await handle(limiter, "ann") == 200
    await limiter.aclose()


if __name__ == "__main__":
    for test in (test_the_fourth_request_of_a_minute_is_refused, test_without_redis_it_is_unavailable):
        asyncio.run(test())
        print("passed:", test.__name__)
