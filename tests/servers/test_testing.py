"""`ratethrottle.testing` on a real server, which notices nothing of it: the clock, the faults, and what waits."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import pytest
import redis.asyncio

from ratethrottle import (
    ConcurrencyRule,
    RateLimitExceeded,
    RateThrottleCore,
    RateThrottleRule,
    RedisStorage,
    StorageError,
    StorageRefused,
    StorageTimeout,
    events,
)
from ratethrottle.testing import Faults, ManualClock, ManualRedisStorage, assert_promise, assert_promise_between
from tests.kit.servers import RedisServer, SentinelTopology
from tests.kit.strategies import STRATEGIES

pytestmark = [pytest.mark.redis, pytest.mark.uvloop]

RULE = RateThrottleRule("api", 3, 60)


async def admitted(limiter: RateThrottleCore, times: int, key: str = "ann", **options: Any) -> int:
    return sum([bool(await limiter.check(key, **options)) for _ in range(times)])


async def tried(limiter: RateThrottleCore, key: str = "ann") -> Any:
    """The source of a decision, or the type of the error."""
    try:
        return (await limiter.check(key)).source
    except StorageError as error:
        return type(error)


@pytest.fixture(params=["manual clock", "real time"])
def limiter_of(
    request: pytest.FixtureRequest, redis_url: str, ratethrottle_clock: ManualClock
) -> Callable[..., RateThrottleCore]:
    """Makes a limiter on the server."""

    def make(rule: RateThrottleRule = RULE, **options: Any) -> RateThrottleCore:
        options = {"deadline": 5.0} | options
        if request.param == "real time":
            return RateThrottleCore(RedisStorage.from_url(redis_url, prefilter_ttl=0, **options), rules=[rule])
        return RateThrottleCore(ManualRedisStorage.from_url(redis_url, clock=ratethrottle_clock, **options), rules=[rule])

    return make


@pytest.mark.parametrize("strategy", STRATEGIES)
async def test_a_denied_check_passes_after_retry_after_and_not_a_us_sooner(
    strategy: str, redis_url: str, ratethrottle_clock: ManualClock
) -> None:
    storage = ManualRedisStorage.from_url(redis_url, clock=ratethrottle_clock, deadline=5.0)
    async with RateThrottleCore(storage, rules=[RateThrottleRule("api", 3, 60, strategy=strategy)]) as limiter:
        log = []
        ratethrottle_clock.advance(12.345678)
        for _ in range(40):
            decision = await limiter.check("ann")
            log.append((ratethrottle_clock.now, decision))
            if not decision:
                ratethrottle_clock.advance(decision.retry_after - 0.000_001)
                assert (await limiter.check("ann")).retry_after_us == 1
                ratethrottle_clock.advance(0.000_001)
        assert_promise(log, limiter.rules["api"])
        assert sum(decision.allowed for _, decision in log) > 20


async def test_a_server_has_nothing_left_of_it(redis_server: RedisServer, ratethrottle_clock: ManualClock) -> None:
    with redis_server.client() as client:
        for _ in range(2):
            storages = [ManualRedisStorage.from_url(redis_server.url, clock=ratethrottle_clock, deadline=5.0) for _ in range(2)]
            one, other = (RateThrottleCore(storage, rules=[RULE]) for storage in storages)
            assert await admitted(one, 2) == 2
            assert await admitted(other, 2) == 1
            await one.aclose()
            assert client.keys()
            await other.aclose()
            assert client.keys() == []


async def test_a_jump_of_any_length_is_no_outage(redis_url: str, ratethrottle_clock: ManualClock) -> None:
    """Deadlines and heartbeats go by the clock, but what was asked before it moved is answered in time."""
    told: list[events.Event] = []
    storage = ManualRedisStorage.from_url(redis_url, clock=ratethrottle_clock, on_outage="raise")
    async with RateThrottleCore(storage, rules=[RULE]) as limiter:
        limiter.on_event(told.append)
        for jump_s in (0.2, 1, 60, 86_400, 400 * 86_400):
            asking = asyncio.create_task(limiter.check("ann"))
            await asyncio.sleep(0)
            ratethrottle_clock.advance(jump_s)
            assert (await asking).source == "redis"
            assert await limiter.check(f"after {jump_s}")
    assert told == []


@pytest.mark.parametrize("used", [False, True])
async def test_each_fault_is_what_it_is_in_production(used: bool, limiter_of: Callable[..., RateThrottleCore]) -> None:
    limiter, told = limiter_of(on_outage="deny"), []
    limiter.on_event(lambda event: told.append(type(event)))
    if used:
        assert await tried(limiter) == "redis"
    faults = Faults(limiter)
    async with faults.outage():
        assert await tried(limiter) == "outage"
    async with faults.refuse():
        assert await tried(limiter) is StorageRefused
    assert await tried(limiter, "bob") == "redis"
    assert told[0] is events.OutageBegan
    await limiter.aclose()


async def test_a_slow_server_is_a_timeout_on_a_connection_in_use(limiter_of: Callable[..., RateThrottleCore]) -> None:
    limiter = limiter_of(on_outage="raise", deadline=0.25)
    while await tried(limiter) != "redis":
        pass
    faults, began_s = Faults(limiter), time.monotonic()
    async with faults.slow(60):
        assert await tried(limiter, "bob") is StorageTimeout
    assert time.monotonic() - began_s < 30
    while await tried(limiter, "carol") != "redis":
        pass
    await limiter.aclose()


async def test_what_is_slow_comes_in_order(redis_url: str) -> None:
    """Two calls are in flight at once, and the second fault is shorter than the first one."""
    rule = RateThrottleRule("api", 1_000, 60)
    async with RateThrottleCore(RedisStorage.from_url(redis_url, deadline=10.0, on_outage="raise"), rules=[rule]) as limiter:
        faults = Faults(limiter)
        async with faults.slow(0.05):
            first = asyncio.gather(*(limiter.check("ann") for _ in range(100)))
            await asyncio.sleep(0)
            async with faults.slow(0.01):
                second = await asyncio.gather(*(limiter.check("ann") for _ in range(100)))
        lefts = [decision.remaining for decision in [*await first, *second]]
        assert lefts == list(range(999, 799, -1))
        assert limiter.statistics().desyncs == 0


async def test_fifty_faults_in_a_row_leave_one_connection(redis_server: RedisServer, redis_url: str) -> None:
    limiter = RateThrottleCore(RedisStorage.from_url(redis_url, on_outage="deny", deadline=5.0), rules=[RULE])
    faults = Faults(limiter)
    await limiter.check("ann")
    began_s = time.monotonic()
    for number in range(50):
        async with faults.outage() if number % 2 else faults.refuse():
            await tried(limiter, f"{number}")
        assert await tried(limiter, f"{number}") == "redis"
    assert time.monotonic() - began_s < 15  # half a second each, if attempts waited for their turn
    with redis_server.client() as client:
        assert limiter.statistics().connections == 1
        names = [
            each["cmd"] for each in client.client_list() if each["cmd"] in {"evalsha", "eval", "script|load", "script|exists"}
        ]
        assert len(names) <= 1
    await limiter.aclose()


async def test_all_connections_of_a_storage_fail_together(limiter_of: Callable[..., RateThrottleCore]) -> None:
    limiter = limiter_of(RateThrottleRule("api", 100, 60), on_outage="raise", connections=4)
    keys = [f"key {number}" for number in range(40)]
    assert {await tried(limiter, key) for key in keys} == {"redis"}
    faults = Faults(limiter)
    async with faults.refuse():
        assert {await tried(limiter, key) for key in keys} == {StorageRefused}
    async with faults.outage():
        assert all([issubclass(await tried(limiter, key), StorageError) for key in keys])
    assert {await tried(limiter, key) for key in keys} == {"redis"}
    await limiter.aclose()


async def test_checks_in_flight_get_what_a_lost_connection_means(redis_url: str) -> None:
    """None is lost, and none is decided twice."""
    limiter = RateThrottleCore(RedisStorage.from_url(redis_url, on_outage="allow", deadline=5.0), rules=[RULE])
    await limiter.check("ann")
    faults = Faults(limiter)
    checks = [asyncio.create_task(limiter.check(f"{number}")) for number in range(500)]
    await asyncio.sleep(0)
    async with faults.outage():
        assert {decision.source for decision in await asyncio.gather(*checks)} <= {"redis", "outage"}
    await limiter.aclose()


async def test_behind_sentinels_it_is_the_same(ratethrottle_clock: ManualClock) -> None:
    with SentinelTopology() as topology:
        where: dict[str, Any] = {
            "sentinels": topology.addresses,
            "master_name": topology.name,
            "on_outage": "deny",
            "deadline": 5.0,
        }
        for storage in (RedisStorage.from_url(**where), ManualRedisStorage.from_url(**where, clock=ratethrottle_clock)):
            async with RateThrottleCore(storage, rules=[RULE]) as limiter:
                assert await tried(limiter) == "redis"
                async with Faults(limiter).outage():
                    assert await tried(limiter) == "outage"
                assert await tried(limiter) == "redis"


async def test_a_real_load_keeps_its_promise_within_brackets(redis_url: str) -> None:
    rule, log = RateThrottleRule("api", 50, 0.2), []
    async with RateThrottleCore(RedisStorage(redis.asyncio.Redis.from_url(redis_url), deadline=5.0), rules=[rule]) as limiter:
        until_s = time.monotonic() + 0.7

        async def client() -> None:
            while time.monotonic() < until_s:
                before_s = time.monotonic()
                decision = await limiter.check("ann")
                log.append((before_s, time.monotonic(), decision))
                await asyncio.sleep(0.001)

        await asyncio.gather(*(client() for _ in range(8)))
    assert sum(bool(decision) for *_, decision in log) >= 50
    assert_promise_between(log, rule)
    with pytest.raises(AssertionError, match="breaks its promise"):
        assert_promise_between([*log, *(entry for entry in log if entry[2])], rule)


async def test_a_fault_that_begins_while_a_connection_is_made_counts(redis_url: str) -> None:
    limiter = RateThrottleCore(RedisStorage.from_url(redis_url, on_outage="deny", deadline=5.0), rules=[RULE])
    faults = Faults(limiter)
    asking = asyncio.create_task(limiter.check("ann"))
    while not limiter.statistics().attempts:  # noqa: ASYNC110  # a count has no event
        await asyncio.sleep(0)
    with faults.outage():
        assert (await asking).source == "outage"
    await limiter.aclose()


async def test_what_was_slow_comes_at_the_end_of_it(redis_url: str) -> None:
    limiter = RateThrottleCore(RedisStorage.from_url(redis_url, on_outage="raise", deadline=50.0), rules=[RULE])
    await limiter.check("ann")
    faults, began_s = Faults(limiter), time.monotonic()
    async with faults.slow(40):
        asking = asyncio.create_task(limiter.check("bob"))
        while not limiter.statistics().in_flight:  # noqa: ASYNC110  # likewise
            await asyncio.sleep(0)
        await asyncio.sleep(0.05)  # until the reply is held back; if it comes later, it isn't held at all
    assert (await asking).source == "redis"
    assert time.monotonic() - began_s < 20
    await limiter.aclose()


async def test_time_elapses_only_once_the_server_has_answered(redis_url: str, ratethrottle_clock: ManualClock) -> None:
    limiter = RateThrottleCore(ManualRedisStorage.from_url(redis_url, clock=ratethrottle_clock, deadline=60.0), rules=[RULE])
    began_us, decided = ratethrottle_clock(), []

    async def handler() -> None:
        for number in range(20):
            await limiter.check(f"{number}")
            decided.append(ratethrottle_clock())

    task = asyncio.create_task(handler())
    await ratethrottle_clock.elapse(5)
    assert decided == [began_us] * 20
    await task
    await limiter.aclose()


async def test_slots_go_by_the_clock_of_the_test(redis_url: str, ratethrottle_clock: ManualClock) -> None:
    rule = ConcurrencyRule("exports", 1, ttl=1)
    one, other = (
        RateThrottleCore(ManualRedisStorage.from_url(redis_url, clock=ratethrottle_clock, deadline=5.0), rules=[rule])
        for _ in range(2)
    )

    async def export(limiter: RateThrottleCore, timeout: float) -> str:
        async with limiter.slot("ann", timeout=timeout) as slot:
            return slot.decision.source

    async with one, other:
        async with one.slot("ann") as slot:
            late, early = asyncio.create_task(export(other, 60)), asyncio.create_task(export(other, 3))
            await ratethrottle_clock.elapse(2)
            assert not early.done()
            await ratethrottle_clock.elapse(1)
            assert isinstance(early.exception(), RateLimitExceeded)
            await ratethrottle_clock.elapse(10)
            assert not late.done()
            assert not slot.lost.is_set()
        await ratethrottle_clock.elapse(1)
        assert late.result() == "redis"
        async with one.slot("ann") as slot:
            ratethrottle_clock.advance(2)  # as if the loop had stood still
            await ratethrottle_clock.settle()
            assert slot.lost.is_set()


async def test_faults_are_for_slots_too(redis_url: str, ratethrottle_clock: ManualClock) -> None:
    storage = ManualRedisStorage.from_url(redis_url, clock=ratethrottle_clock, on_outage="raise", deadline=0.25)
    limiter, began_s = RateThrottleCore(storage, rules=[ConcurrencyRule("exports", 1, ttl=10)]), time.monotonic()
    faults = Faults(limiter)

    async def tried() -> str:
        try:
            async with limiter.slot("ann") as slot:
                return slot.decision.source
        except StorageError as error:
            return type(error).__name__

    async with limiter:
        assert await tried() == "redis"
        async with faults.slow(60):
            assert await tried() == "StorageTimeout"
        async with faults.outage():
            assert await tried() in {"StorageUnavailable", "StorageTimeout"}
        while await tried() != "redis":
            ratethrottle_clock.advance(0.1)
        async with faults.refuse():
            assert await tried() == "StorageRefused"
    assert time.monotonic() - began_s < 30
