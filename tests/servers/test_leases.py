"""Units taken ahead that nobody will spend: they go back when a process closes, a rule goes, a bound is dropped, an answer is late."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
import redis

from ratethrottle import RateThrottleCore, RateThrottleRule, create_limiter
from tests.kit.recovery import until
from tests.kit.relay import Relay
from tests.kit.servers import RedisServer, eventually
from tests.kit.strategies import STRATEGIES

pytestmark = [pytest.mark.redis, pytest.mark.uvloop]

LIMIT = 100_000


def leasing(strategy: str = "fixed_window", name: str = "hot", **options: Any) -> RateThrottleRule:
    return RateThrottleRule(name, LIMIT, 86_400, strategy=strategy, **{"lease": True, "lease_ttl": 1.0, **options})


async def spend(limiter: RateThrottleCore, rounds: int = 7, key: str = "k", rule: str = "hot") -> int:
    """Have a lease of 80 units, all of which are left (after 3 rounds, one that is spent); returns how many checks were allowed."""
    admitted = 0
    for _ in range(rounds):
        admitted += sum([d.allowed for d in await asyncio.gather(*[limiter.check(key, rule) for _ in range(20)])])
    assert limiter.statistics().decisions[rule]["lease"].allowed > 0
    return admitted


async def counted(url: str, rule: RateThrottleRule, key: str = "k") -> int:
    """What Redis says is used, rounded up."""
    async with create_limiter("redis", redis_url=url, rules=[rule], deadline=5) as limiter:
        decision = await limiter.peek(key)
        return decision.limit - decision.remaining


async def test_statistics_count_the_keys_that_hold_a_lease_now(redis_url: str) -> None:
    long, short = leasing(), leasing(name="short", lease_ttl=0.2)
    limiter = create_limiter("redis", redis_url=redis_url, rules=[long, short], deadline=5)
    await spend(limiter)
    assert limiter.statistics().leases == 1  # which was renewed
    await spend(limiter, key="other")
    assert limiter.statistics().leases == 2
    await spend(limiter, rule="short")
    assert limiter.statistics().leases == 3
    eventually(lambda: limiter.statistics().leases == 2)  # it blocks the loop, so that no timer sees to what has ended
    while limiter.statistics().leases == 2:
        assert (await limiter.check("k", "hot")).source == "lease"  # until all of it is spent
    limiter.remove_rule("hot")

    async def gone() -> bool:
        return limiter.statistics().leases == 0

    await until(gone)
    await limiter.aclose()


@pytest.mark.parametrize("strategy", STRATEGIES)
async def test_closing_gives_back_what_is_left(redis_url: str, strategy: str) -> None:
    rule = leasing(strategy)
    limiter = create_limiter("redis", redis_url=redis_url, rules=[rule], deadline=5)
    admitted = await spend(limiter)
    await limiter.aclose()
    assert admitted - 2 <= await counted(redis_url, rule) <= admitted  # a bucket drains


def test_the_end_of_a_loop_gives_back_what_nobody_closed(redis_url: str) -> None:
    rule = leasing()
    limiter = create_limiter("redis", redis_url=redis_url, rules=[rule], deadline=5)
    admitted = asyncio.run(spend(limiter))
    assert asyncio.run(counted(redis_url, rule)) == admitted


def test_the_end_of_a_loop_waits_for_no_redis_that_is_silent() -> None:
    with RedisServer() as server:
        limiter = create_limiter("redis", redis_url=server.url, rules=[leasing()], deadline=10)

        async def main() -> float:
            await spend(limiter)
            server.pause()
            return time.monotonic()

        began_s = asyncio.run(main())
        assert time.monotonic() - began_s < 2
        server.resume()


async def test_closing_in_one_loop_gives_back_what_another_one_holds(redis_url: str) -> None:
    rule = leasing()
    limiter = create_limiter("redis", redis_url=redis_url, rules=[rule], deadline=5)
    held, closed = asyncio.Event(), asyncio.Event()
    here = asyncio.get_running_loop()
    admitted: list[int] = []

    async def elsewhere() -> None:
        admitted.append(await spend(limiter))
        here.call_soon_threadsafe(held.set)
        for _ in range(300):
            await asyncio.sleep(0.01)
            if closed.is_set():
                return

    other = asyncio.create_task(asyncio.to_thread(asyncio.run, elsewhere()))
    await held.wait()
    await limiter.aclose()

    async def back() -> bool:
        return await counted(redis_url, rule) == admitted[0]

    await until(back)
    closed.set()
    await other


async def test_closing_waits_for_a_redis_that_does_not_answer_no_longer_than_the_deadline(redis_server: RedisServer) -> None:
    async with Relay(redis_server.socket) as relay:
        limiter = create_limiter("redis", redis_url=relay.url, rules=[leasing()])
        await spend(limiter)
        relay.tamper = lambda _: b""
        began = time.monotonic()
        await limiter.aclose()
        assert time.monotonic() - began < 0.25 + 0.3


async def test_a_close_that_is_cancelled_leaves_nothing_behind(redis_server: RedisServer) -> None:
    async with Relay(redis_server.socket) as relay:
        limiter = create_limiter("redis", redis_url=relay.url, rules=[leasing()], deadline=30.0)
        await spend(limiter)
        relay.tamper = lambda _: b""
        closing = asyncio.create_task(limiter.aclose())
        await asyncio.sleep(0.05)
        closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closing

        async def gone() -> bool:
            return not any("ratethrottle" in task.get_name() for task in asyncio.all_tasks())

        await until(gone)


@pytest.mark.parametrize("how", ["removed", "replaced", "replaced by one without leases"])
async def test_a_rule_that_goes_gives_back_what_is_left_at_once(redis_url: str, how: str) -> None:
    rule = leasing()
    async with create_limiter("redis", redis_url=redis_url, rules=[rule], deadline=5) as limiter:
        admitted = await spend(limiter)
        if how == "removed":
            limiter.remove_rule("hot")
        else:
            limiter.add_rule(leasing(lease=how == "replaced", lease_ttl=0.9), replace=True)

        async def back() -> bool:
            return await counted(redis_url, rule) == admitted

        await until(back)


async def test_a_bound_that_is_forgotten_for_want_of_room_does_not_take_its_lease_along(redis_url: str) -> None:
    rule = leasing(lease_ttl=0.5)
    flood = RateThrottleRule("flood", 10, 86_400, strategy="fixed_window")
    async with create_limiter("redis", redis_url=redis_url, rules=[rule, flood], max_bounds=50, deadline=5) as limiter:
        admitted = 0
        for i in range(20):
            admitted += sum([d.allowed for d in await asyncio.gather(*[limiter.check("k", "hot") for _ in range(20)])])
            await asyncio.gather(*[limiter.check(f"{i}.{j}", "flood", cost=5) for j in range(100)])
        assert limiter.statistics().evictions > 1000

        async def back() -> bool:
            return await counted(redis_url, rule) == admitted

        await until(back, 5.0)


@pytest.mark.parametrize("strategy", STRATEGIES)
async def test_what_a_late_answer_took_ahead_goes_back_and_is_spent_by_nobody(
    redis_server: RedisServer, redis_client: redis.Redis, strategy: str
) -> None:
    rule = leasing(strategy)
    async with create_limiter("redis", redis_url=redis_server.url, rules=[rule], deadline=0.1, on_outage="deny") as limiter:
        admitted = await spend(limiter, 6)  # all of it
        redis_client.client_pause(400)
        late = await asyncio.gather(*[limiter.check("k") for _ in range(20)])
        assert {d.source for d in late} == {"outage"}
        assert not any(late)

        async def back() -> bool:
            return admitted + 18 <= await counted(redis_server.url, rule) <= admitted + 20

        await until(lambda: _answered(limiter), 5.0)
        await until(back, 0.9)  # and not only when the bucket has drained
        assert limiter.statistics().connections == 1


async def test_a_connection_that_is_heard_although_it_was_late_is_one_at_most_and_ends_with_its_line(
    redis_server: RedisServer,
) -> None:
    async with Relay(redis_server.socket) as relay:
        limiter = create_limiter("redis", redis_url=relay.url, rules=[leasing()], deadline=0.1, on_outage="deny")
        for _ in range(3):
            relay.tamper = lambda reply: reply
            await until(lambda: _answered(limiter))
            await spend(limiter, 3)
            relay.tamper = lambda _: b""
            await asyncio.gather(*[limiter.check("k") for _ in range(20)])
            assert relay.open <= 2
        await limiter.aclose()

        async def closed() -> bool:
            return relay.open == 0

        await until(closed)


async def test_a_lease_of_before_a_loss_is_not_given_back_after_it(redis_url: str, redis_client: redis.Redis) -> None:
    """It may be lost there: what goes back would be others' units."""
    rule = leasing()
    async with create_limiter("redis", redis_url=redis_url, rules=[rule], deadline=5) as limiter:
        admitted = await spend(limiter)
        used = LIMIT - (await limiter.peek("k")).remaining
        assert used > admitted
        redis_client.flushall()
        # Some of the lease is still to be spent, while others tell Redis what they know.
        await until(lambda: _answered(limiter), 5.0)
        await asyncio.sleep(1.1)
        assert await limiter.check("k")
        assert LIMIT - (await limiter.peek("k")).remaining >= used + 1


async def _answered(limiter: RateThrottleCore) -> bool:
    return (await limiter.peek("somebody")).source == "redis"
