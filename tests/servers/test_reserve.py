"""Charges and reservations on a real Redis, on asyncio's loop and on uvloop: what is counted, and what holds when something fails."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

import pytest
import redis

from ratethrottle import (
    FirstOf,
    LimiterClosed,
    RateLimitExceeded,
    RateThrottleCore,
    RateThrottleRule,
    RedisStorage,
    StateUnreadable,
    StorageUnavailable,
)
from ratethrottle.events import Event, UnsettledReservation
from tests.kit.counted import counted
from tests.kit.recovery import until
from tests.kit.relay import Relay
from tests.kit.servers import RedisServer
from tests.kit.strategies import STRATEGIES

pytestmark = [pytest.mark.redis, pytest.mark.uvloop]


async def served(limiter: RateThrottleCore, rule: str) -> bool:
    """Whether Redis itself answers."""
    try:
        return (await limiter.peek("somebody else", rule)).source == "redis"
    except StorageUnavailable:
        return False


def rule(name: str, limit: int, strategy: str = "fixed_window", **options: Any) -> RateThrottleRule:
    return RateThrottleRule(name, limit, 86_400, strategy=strategy, **options)


TOKENS, REQUESTS = rule("tokens", 1_000), rule("requests", 20)


def limiter_of(url: str, *rules: RateThrottleRule, **options: Any) -> RateThrottleCore:
    return RateThrottleCore(RedisStorage.from_url(url, **{"deadline": 10, **options}), rules=rules or (TOKENS, REQUESTS))


async def left(limiter: RateThrottleCore, *names: str, key: str = "key") -> list[int]:
    return [(await limiter.peek(key, name, cost=0)).remaining for name in names]


@pytest.mark.parametrize("strategy", STRATEGIES)
async def test_what_is_charged_and_given_back_is_felt_by_another_process(redis_server: RedisServer, strategy: str) -> None:
    tokens = rule("tokens", 1_000, strategy)
    async with limiter_of(redis_server.url, tokens) as limiter, limiter_of(redis_server.url, tokens, prefilter_ttl=0) as other:
        async with limiter.reserve("key", cost=400) as reservation:
            assert reservation.decision.source == "redis"
            assert (await left(other, "tokens")) == [600]
            reservation.settle(150)
        assert (await left(other, "tokens")) == [850]
        assert (await other.charge("key", cost=800)).remaining == 50
        charged = await limiter.charge("key", cost=1_000)
        assert (charged.allowed, charged.over, charged.remaining, charged.source) == (True, True, 0, "redis")
        assert 0 < charged.retry_after <= 2 * 86_400 + 1_350
        assert not await other.check("key")
        assert not await limiter.check("key")


async def test_each_limit_of_a_reservation_is_settled(redis_server: RedisServer) -> None:
    async with limiter_of(redis_server.url) as limiter:
        async with limiter.reserve("key", {"requests": 1, "tokens": 400}) as reservation:
            assert [part.rule for part in reservation.decision.parts] == ["requests", "tokens"]
            reservation.settle({"tokens": 1_500})
        assert await left(limiter, "requests", "tokens") == [19, 0]
        assert (await limiter.charge("key", "tokens", cost=1)).over
        async with limiter.reserve("other", ("requests", "tokens"), cost=9) as reservation:
            reservation.settle({"tokens": 4, "requests": 11})
        assert await left(limiter, "requests", "tokens", key="other") == [9, 996]
        async with limiter.reserve("other", FirstOf("requests", "tokens"), cost=10) as reservation:
            assert (reservation.decision.rule, reservation.decision.parts) == ("tokens", ())
            reservation.settle(0)
        assert await left(limiter, "requests", "tokens", key="other") == [9, 996]
        told = counted(limiter)
        assert (told["tokens"]["redis"].allowed, told["requests"]["redis"].allowed) == (4, 2), "settlements are no decisions"


async def test_a_denied_reservation_takes_nothing(redis_server: RedisServer) -> None:
    async with limiter_of(redis_server.url) as limiter:
        await limiter.charge("key", "requests", cost=20)
        with pytest.raises(RateLimitExceeded) as caught:
            async with limiter.reserve("key", {"tokens": 5, "requests": 1}):
                pytest.fail("the block ran")
        assert (caught.value.decision.rule, caught.value.decision.allowed) == ("requests", False)
        assert await left(limiter, "tokens") == [1_000]


async def test_a_crowd_reserves_no_more_than_there_is_and_gives_all_of_it_back(redis_server: RedisServer) -> None:
    async with limiter_of(redis_server.url, connections=2) as limiter:
        inside, most, refused = 0, 0, 0

        async def work(i: int) -> None:
            nonlocal inside, most, refused
            try:
                async with limiter.reserve("key", {"tokens": 30, "requests": 1}) as reservation:
                    inside += 1
                    most = max(most, inside)
                    await asyncio.sleep(0)
                    inside -= 1
                    reservation.settle({"tokens": i % 2, "requests": 0})
            except RateLimitExceeded:
                refused += 1

        await asyncio.gather(*(work(i) for i in range(200)))
        assert 0 < most <= 20
        assert refused
        assert (await left(limiter, "requests")) == [20]
        assert (await left(limiter, "tokens"))[0] >= 1_000 - (200 - refused)


async def test_checks_and_charges_of_a_key_keep_their_order(redis_server: RedisServer) -> None:
    async with limiter_of(redis_server.url) as limiter:
        first = [limiter.check("key", "requests") for _ in range(3)]
        told = await asyncio.gather(
            *first, limiter.charge("key", "requests", cost=5), *(limiter.check("key", "requests") for _ in range(3))
        )
        assert [decision.remaining for decision in told] == [19, 18, 17, 12, 11, 10, 9]


async def test_a_reservation_asks_even_if_a_lease_could_pay(redis_server: RedisServer) -> None:
    leased = RateThrottleRule("leased", 100_000, 60, strategy="token_bucket", lease=True)
    async with limiter_of(redis_server.url, leased) as limiter:
        for _ in range(50):
            await limiter.check("key")
        async with limiter.reserve("key", cost=500) as reservation:
            assert reservation.decision.source == "redis"
            reservation.settle(0)
        assert await limiter.check("key")


async def test_a_block_that_is_cancelled_settles_all_the_same(redis_server: RedisServer) -> None:
    async with limiter_of(redis_server.url) as other:
        entered = asyncio.Event()

        async def work() -> None:
            async with limiter_of(redis_server.url) as limiter, limiter.reserve("key", "tokens", cost=400) as reservation:
                reservation.settle(100)
                entered.set()
                await asyncio.Event().wait()

        task = asyncio.create_task(work())
        await entered.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await left(other, "tokens") == [900]


async def test_an_end_that_is_cancelled_settles_all_the_same(redis_server: RedisServer) -> None:
    async with limiter_of(redis_server.url) as limiter:
        leaving = asyncio.Event()

        async def work() -> None:
            async with limiter.reserve("key", "tokens", cost=400) as reservation:
                reservation.settle(100)
                leaving.set()

        task = asyncio.create_task(work())
        await leaving.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await limiter.check("key", "requests")  # behind it on the connection
        assert await left(limiter, "tokens") == [900]


@pytest.mark.parametrize(("says", "tokens"), [("before", 900), ("after", 600), ("error", 600), ("nothing", 600)])
async def test_a_limiter_that_closes_within_a_block_settles_what_was_said(
    redis_server: RedisServer, says: str, tokens: int
) -> None:
    heard: list[Event] = []

    async def work(limiter: RateThrottleCore) -> None:
        async with limiter.reserve("key", "tokens", cost=400, on_error="refund") as reservation:
            if says == "before":
                reservation.settle(100)
            await limiter.aclose()
            if says == "error":
                raise ZeroDivisionError
            if says != "nothing":
                reservation.settle(100)

    async with limiter_of(redis_server.url) as other:
        for _ in range(2):
            limiter = limiter_of(redis_server.url)
            limiter.on_event(heard.append)
            await other.reset("key", "tokens")
            with suppress(ZeroDivisionError):
                await work(limiter)
            with pytest.raises(LimiterClosed):
                await limiter.charge("key", "tokens")
            assert await left(other, "tokens") == [tokens]
    told = [event.closed for event in heard if isinstance(event, UnsettledReservation)]
    assert told == {"before": [], "after": [True, True], "error": [True, True], "nothing": [False, False]}[says]


async def test_of_many_blocks_that_still_run_all_are_settled_when_the_limiter_closes(redis_server: RedisServer) -> None:
    async with limiter_of(redis_server.url) as other:
        limiter = limiter_of(redis_server.url, connections=2)
        settled, end = asyncio.Barrier(51), asyncio.Event()

        async def work(i: int) -> None:
            async with limiter.reserve(f"key {i % 7}", "tokens", cost=10) as reservation:
                reservation.settle(1)
                await settled.wait()
                await end.wait()

        tasks = [asyncio.create_task(work(i)) for i in range(50)]
        await settled.wait()
        await limiter.aclose()
        assert sum([(await left(other, "tokens", key=f"key {i}"))[0] for i in range(7)]) == 7 * 1_000 - 50
        end.set()
        await asyncio.gather(*tasks)
        assert sum([(await left(other, "tokens", key=f"key {i}"))[0] for i in range(7)]) == 7 * 1_000 - 50


async def test_nothing_comes_back_after_a_reset_or_a_loss(redis_server: RedisServer) -> None:
    async with limiter_of(redis_server.url) as limiter:
        async with limiter.reserve("key", "tokens", cost=400) as reservation:
            await limiter.reset("key", "tokens")
            assert await limiter.check("key", "tokens", cost=400)
            reservation.settle(0)
        assert await left(limiter, "tokens") == [600]


async def test_an_unreadable_key_fails_its_charge_alone(redis_server: RedisServer, redis_client: redis.Redis) -> None:
    async with limiter_of(redis_server.url) as limiter:
        await limiter.charge("key", "tokens")
        [name] = redis_client.keys("*:tokens:*")
        redis_client.set(name, "nonsense")
        told = await asyncio.gather(limiter.charge("key", "tokens"), limiter.charge("other", "tokens"), return_exceptions=True)
        assert isinstance(told[0], StateUnreadable)
        assert not isinstance(told[1], BaseException)
        assert told[1].remaining == 999


# Outages:


def away(relay: Relay) -> None:
    relay.refuses = True
    relay.cut()


async def back(relay: Relay, limiter: RateThrottleCore) -> None:
    """Wait until Redis answers, and has heard what was counted meanwhile."""

    async def told() -> bool:
        return await served(limiter, "tokens") and not limiter.statistics().owed

    relay.refuses = False
    await until(told, 5)


@pytest.mark.parametrize("policy", ["local", "allow", "deny"])
async def test_what_is_charged_while_redis_is_away_is_told_to_it_later(redis_server: RedisServer, policy: Any) -> None:
    async with (
        Relay(redis_server.socket) as relay,
        limiter_of(relay.url, on_outage=policy, expected_processes=1, deadline=1) as limiter,
    ):
        await limiter.charge("key", "tokens", cost=100)
        away(relay)
        charged = await limiter.charge("key", "tokens", cost=200)
        assert (charged.allowed, charged.source) == (True, "outage")
        assert (await limiter.charge("key", {"tokens": 50, "requests": 3})).source == "outage"
        over = await limiter.charge("key", "requests", cost=30)
        assert (over.allowed, over.remaining) == (True, 0)
        await back(relay, limiter)
        assert await left(limiter, "tokens", "requests") == [650, 0]


async def test_by_the_policy_raise_a_charge_raises_and_is_not_counted(redis_server: RedisServer) -> None:
    async with Relay(redis_server.socket) as relay, limiter_of(relay.url, on_outage="raise", deadline=1) as limiter:
        async with limiter.reserve("key", "tokens", cost=400) as reservation:
            away(relay)
            with pytest.raises(StorageUnavailable):
                await limiter.charge("key", "requests")
            reservation.settle(500)
        await back(relay, limiter)
        assert await left(limiter, "requests", "tokens") == [20, 500], "what a block has used is counted all the same"


async def test_a_refund_that_redis_does_not_hear_leaves_the_estimate(redis_server: RedisServer) -> None:
    async with (
        Relay(redis_server.socket) as relay,
        limiter_of(relay.url, expected_processes=1, deadline=1) as limiter,
    ):
        async with limiter.reserve("key", {"tokens": 400, "requests": 2}) as reservation:
            away(relay)
            reservation.settle({"tokens": 100, "requests": 5})
        await back(relay, limiter)
        assert await left(limiter, "tokens", "requests") == [600, 15]


async def test_what_was_reserved_in_an_outage_is_owed_only_as_far_as_it_was_used(redis_server: RedisServer) -> None:
    async with (
        Relay(redis_server.socket) as relay,
        limiter_of(relay.url, expected_processes=1, deadline=1) as limiter,
    ):
        await limiter.check("key", "tokens")
        away(relay)
        async with limiter.reserve("key", {"tokens": 400, "requests": 2}) as reservation:
            assert reservation.decision.source == "outage"
            reservation.settle({"tokens": 100, "requests": 5})
        with pytest.raises(RateLimitExceeded):  # what is held of the share stays so
            async with limiter.reserve("key", "tokens", cost=700):
                pytest.fail("the block ran")
        await back(relay, limiter)
        assert await left(limiter, "tokens", "requests") == [899, 15]


async def test_what_was_reserved_in_an_outage_and_told_since_stays_counted(redis_server: RedisServer) -> None:
    async with (
        Relay(redis_server.socket) as relay,
        limiter_of(relay.url, expected_processes=1, deadline=1) as limiter,
    ):
        await limiter.check("key", "tokens")
        away(relay)
        async with limiter.reserve("key", {"tokens": 400}) as reservation:
            await back(relay, limiter)
            assert await left(limiter, "tokens") == [599]
            reservation.settle(0)
        assert await left(limiter, "tokens") == [599]


async def test_what_is_never_sent_for_want_of_room_is_counted_here(redis_server: RedisServer) -> None:
    with RedisServer() as server:
        async with limiter_of(server.url, max_waiting=1, deadline=2) as limiter:
            await limiter.check("key", "tokens")
            server.pause()
            sent = [asyncio.create_task(limiter.charge(f"user:{i}", "tokens")) for i in range(8)]
            await asyncio.sleep(0)
            server.resume()
            told = await asyncio.gather(*sent)
            assert all(told)
            assert {decision.source for decision in told} == {"redis", "outage"}

            async def owed() -> bool:
                return not limiter.statistics().owed

            await until(owed)
            assert [await left(limiter, "tokens", key=f"user:{i}") for i in range(8)] == [[999]] * 8


async def test_after_a_loss_of_state_nothing_comes_back_of_what_was_granted_before(redis_server: RedisServer) -> None:
    with RedisServer() as server:
        async with limiter_of(server.url, deadline=2) as limiter:
            async with limiter.reserve("key", "tokens", cost=400) as reservation:
                server.stop()
                server.start()

                async def answers() -> bool:
                    return await served(limiter, "tokens")

                await until(answers, 10)
                assert await left(limiter, "tokens") == [600], "this process has told it"
                reservation.settle(0)
            assert await left(limiter, "tokens") == [600]


@pytest.mark.parametrize("ends", ["settled", "cancelled"])
async def test_those_who_wait_for_what_comes_back_need_not_wait_longer(redis_server: RedisServer, ends: str) -> None:
    """Nor if the task that gives it back is cancelled meanwhile."""
    async with limiter_of(redis_server.url) as limiter:
        began, ending = asyncio.Event(), asyncio.Event()

        async def work() -> None:
            async with limiter.reserve("key", "requests", cost=20) as reservation:
                began.set()
                await ending.wait()
                reservation.settle(5)

        first = asyncio.create_task(work())
        await began.wait()
        waiting = [asyncio.create_task(limiter.acquire("key", "requests", cost=cost)) for cost in (10, 5)]
        await limiter.peek("key", "requests")
        assert not any(task.done() for task in waiting)
        ending.set()
        await asyncio.sleep(0)
        if ends == "cancelled":
            first.cancel()
        with suppress(asyncio.CancelledError):
            await first
        async with asyncio.timeout(10):
            assert [(await task).cost for task in waiting] == [10, 5]
        assert await left(limiter, "requests") == [0]
