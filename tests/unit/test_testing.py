"""`ratethrottle.testing`: what a user's tests are promised, by themselves, in memory and on fakeredis."""

from __future__ import annotations

import asyncio
import importlib
import random
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from fractions import Fraction
from pathlib import Path
from typing import Any

import fakeredis
import pytest

import ratethrottle
from ratethrottle import (
    ConfigurationError,
    Decision,
    InMemoryStorage,
    RateLimitExceeded,
    RateThrottleCore,
    RateThrottleRule,
    RedisStorage,
    StorageError,
    StorageRefused,
    StorageUnavailable,
    events,
)
from ratethrottle.storage.redis.scripts import LATER, NAMES, script
from ratethrottle.testing import (
    Faults,
    MakeLimiter,
    ManualClock,
    ManualRedisStorage,
    PromiseBrokenError,
    assert_promise,
    assert_promise_between,
    fake_redis,
)
from ratethrottle.testing.clock import START
from ratethrottle.testing.manual import STEERED, stamped, steered
from tests.kit.strategies import STRATEGIES

RULE = RateThrottleRule("api", 3, 60)
ROOT = Path(__file__).parents[2]
every_strategy = pytest.mark.parametrize("strategy", STRATEGIES)


@pytest.fixture(params=["memory", "fakeredis"])
def limiter_of(request: pytest.FixtureRequest, ratethrottle_limiter: MakeLimiter) -> Callable[..., RateThrottleCore]:
    """Makes a limiter on the test's clock, in memory and on fakeredis."""
    if request.param == "memory":
        return ratethrottle_limiter

    def make(*rules: RateThrottleRule, **options: Any) -> RateThrottleCore:
        return ratethrottle_limiter(*rules, client=fake_redis(), **options)

    return make


async def admitted(limiter: RateThrottleCore, times: int, key: str = "ann", **options: Any) -> int:
    return sum([bool(await limiter.check(key, **options)) for _ in range(times)])


# The clock


def test_a_clock_stands_still_and_is_moved_to_the_us() -> None:
    clock = ManualClock()
    assert clock() == clock() == 1_861_920_000_000_000 == round(clock.now * 1_000_000)
    assert repr(clock) == "<ManualClock at 2029-01-01 00:00:00+00:00>"
    assert START.weekday() == 0
    began_us = clock()
    for by in (0.1, 0.000_001, 1, timedelta(microseconds=3), 0, timedelta(days=400), 0.3 - 0.1):
        clock.advance(by)
    assert clock() - began_us == 100_000 + 1 + 1_000_000 + 3 + 400 * 86_400_000_000 + 200_000


def test_what_seconds_of_any_decision_say_moves_it_to_the_us() -> None:
    rng = random.Random(5)
    for _ in range(2_000):
        us, clock = rng.randrange(10 ** rng.randrange(1, 14)), ManualClock()
        began_us = clock()
        clock.advance(us / 1_000_000)
        assert clock() - began_us == us


@pytest.mark.parametrize(
    ("by", "words"),
    [
        (-1, "only goes forward"),
        (timedelta(seconds=-1), "only goes forward"),
        (float("inf"), "never helps"),
        (float("nan"), "never helps"),
        (0.000_000_3, "whole µs"),
        ("1", "not by '1'"),
        (True, "not by True"),
        (200 * 365 * 86_400, "2112"),
    ],
)
async def test_a_clock_refuses_what_it_cannot_be_moved_by(by: Any, words: str) -> None:
    clock = ManualClock()
    with pytest.raises(ConfigurationError, match=words):
        clock.advance(by)
    with pytest.raises(ConfigurationError, match=words):
        await clock.elapse(by)
    assert clock() == ManualClock()()


def test_a_clock_begins_when_it_is_told_to() -> None:
    assert ManualClock(datetime(1970, 1, 1, 0, 0, 1, tzinfo=UTC))() == 1_000_000
    for start, words in (
        (datetime(2030, 1, 1), "time zone"),  # noqa: DTZ001  # that is what is refused
        (5, "it is a datetime"),
        (datetime(1960, 1, 1, tzinfo=UTC), "from 1970"),
        (datetime(2113, 1, 1, tzinfo=UTC), "before 2112"),
    ):
        with pytest.raises(ConfigurationError, match=words):
            ManualClock(start)  # type: ignore[arg-type]


@every_strategy
async def test_a_denied_check_passes_after_retry_after_and_not_a_us_sooner(
    strategy: str, limiter_of: Callable[..., RateThrottleCore], ratethrottle_clock: ManualClock
) -> None:
    """Also on Redis, whose scripts have the clock of the test."""
    limiter = limiter_of(RateThrottleRule("api", 3, 60, strategy=strategy))
    ratethrottle_clock.advance(12.345678)
    assert await admitted(limiter, 5) == 3
    denied = await limiter.check("ann")
    assert not denied
    ratethrottle_clock.advance(denied.retry_after - 0.000_001)
    again = await limiter.check("ann")
    assert (again.allowed, again.retry_after_us) == (False, 1)
    ratethrottle_clock.advance(0.000_001)
    assert await limiter.check("ann")


async def test_keys_outlive_any_real_time_in_which_the_clock_stands_still(ratethrottle_limiter: MakeLimiter) -> None:
    """A second of the rule's would have passed for the server long before the test has moved the clock."""
    client = fake_redis()
    limiter = ratethrottle_limiter(RateThrottleRule("api", 1, 0.001), client=client)
    assert await limiter.check("ann")
    await limiter.reset("bob")
    keys = [key async for key in client.scan_iter()]
    assert len(keys) >= 5
    assert all([await client.pttl(key) == -1 or await client.pttl(key) > 86_000_000 for key in keys])
    assert sum([await client.pttl(key) > 0 for key in keys]) >= 3
    assert not await limiter.check("ann")
    await limiter.aclose()


def test_no_script_asks_the_server_what_time_it_is() -> None:
    for name in (*NAMES, *LATER):
        assert "'TIME'" in script(name).text.decode()
        assert "'TIME'" not in steered(name)
    assert not [part for part in STEERED if not any(part in script(name).text.decode() for name in NAMES)]


def test_script_calls_are_told_the_time_and_nothing_else_is() -> None:
    call = b"*3\r\n$7\r\nEVALSHA\r\n$1\r\na\r\n$1\r\n0\r\n"
    other = b"*2\r\n$3\r\nGET\r\n$7\r\nEVALSHA\r\n"
    told = b"*4\r\n$7\r\nEVALSHA\r\n$1\r\na\r\n$1\r\n0\r\n$3\r\n123\r\n"
    assert stamped(other + call + call + other, 123) == other + told + told + other
    assert stamped(call.replace(b"$7\r\nEVALSHA", b"$4\r\nEVAL"), 5).endswith(b"$1\r\n0\r\n$1\r\n5\r\n")


async def test_processes_of_one_server_and_clock_share_a_limit(ratethrottle_clock: ManualClock) -> None:
    server = fakeredis.FakeServer()
    one, other = (
        RateThrottleCore(ManualRedisStorage(fake_redis(server=server), clock=ratethrottle_clock), rules=[RULE]) for _ in range(2)
    )
    assert await admitted(one, 2) == 2
    assert await admitted(other, 3) == 1
    ratethrottle_clock.advance(60)
    assert await admitted(other, 1) == 1


async def test_tests_do_not_meet_on_one_server_and_leave_nothing_behind() -> None:
    client = fake_redis()
    for _ in range(2):
        async with RateThrottleCore(ManualRedisStorage(client, clock=ManualClock()), rules=[RULE]) as limiter:
            assert await admitted(limiter, 4) == 3
            assert await client.keys()
    assert await client.keys() == []
    async with RateThrottleCore(ManualRedisStorage(client, clock=ManualClock(), prefix="mine"), rules=[RULE]) as limiter:
        await limiter.check("ann")
    assert [key.partition(b":")[0] for key in await client.keys()] == [b"mine"] * len(await client.keys()) != []


def test_a_manual_storage_wants_a_manual_clock() -> None:
    with pytest.raises(ConfigurationError, match="it is a ManualClock"):
        ManualRedisStorage(fake_redis(), clock=lambda: 5)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="deadline"):
        ManualRedisStorage(fake_redis(), clock=ManualClock(), deadline=0)


async def test_reset_peek_clear_and_leases_go_by_the_clock(ratethrottle_clock: ManualClock) -> None:
    storage = ManualRedisStorage(fake_redis(), clock=ratethrottle_clock)
    limiter = RateThrottleCore(storage, rules=[RULE, RateThrottleRule("many", 1_000, 60, lease=True)])
    assert await admitted(limiter, 4, rule="api") == 3
    await limiter.reset("ann", "api")
    assert (await limiter.peek("ann", "api")).remaining == 3
    assert await admitted(limiter, 4, rule="api") == 3
    await storage.clear()
    ratethrottle_clock.advance(0.2)
    assert await admitted(limiter, 4, rule="api") == 3
    assert await admitted(limiter, 1_005, rule="many") == 1_000
    ratethrottle_clock.advance(70)
    assert await admitted(limiter, 1_005, rule="many") == 1_000


# What waits by it


class Callbacks:
    """What was called back, and at which time."""

    def __init__(self, clock: ManualClock) -> None:
        self.clock, self.began_us, self.heard = clock, clock(), []  # type: ignore[var-annotated]

    def at(self, seconds: float, what: str = "", *, background: bool = False) -> Any:
        loop = asyncio.get_running_loop()
        return self.clock.timers(loop, background=background).call_later(seconds, lambda: self.note(what))

    def note(self, what: str) -> None:
        self.heard.append((what, (self.clock() - self.began_us) / 1_000_000))


async def test_what_is_due_is_called_in_the_loop_once_and_in_order(ratethrottle_clock: ManualClock) -> None:
    calls = Callbacks(ratethrottle_clock)
    for seconds, what in ((2, "two"), (1, "one"), (1, "one more"), (3, "three"), (0, "now")):
        calls.at(seconds, what)
    gone = calls.at(1, "cancelled")
    gone.cancel()
    ratethrottle_clock.advance(2)
    late = calls.at(0, "cancelled once due")
    late.cancel()
    assert calls.heard == []
    await ratethrottle_clock.settle()
    assert calls.heard == [("now", 2.0), ("one", 2.0), ("one more", 2.0), ("two", 2.0)]
    ratethrottle_clock.advance(0.999_999)
    await ratethrottle_clock.settle()
    assert len(calls.heard) == 4
    ratethrottle_clock.advance(0.000_001)
    await ratethrottle_clock.settle()
    assert calls.heard[4:] == [("three", 3.0)]
    assert not ratethrottle_clock._timers


async def test_while_time_elapses_each_is_called_at_its_own_time(ratethrottle_clock: ManualClock) -> None:
    calls = Callbacks(ratethrottle_clock)

    async def waits(seconds: float, what: str) -> None:
        for _ in range(3):
            future = asyncio.get_running_loop().create_future()
            ratethrottle_clock.timers(asyncio.get_running_loop()).call_later(
                seconds, lambda future=future: future.set_result(None)
            )
            await future
            for _ in range(20):  # a while in a loop that has other things to do
                await asyncio.sleep(0)
            calls.note(what)

    tasks = [asyncio.create_task(waits(seconds, what)) for seconds, what in ((1, "a"), (2.5, "b"))]
    calls.at(1.7, "background", background=True)
    await ratethrottle_clock.elapse(5)
    assert calls.heard == [("a", 1.0), ("background", 2.0), ("a", 2.0), ("b", 2.5), ("a", 3.0), ("b", 5.0)]
    assert ratethrottle_clock() - calls.began_us == 5_000_000
    await ratethrottle_clock.elapse(timedelta(seconds=2.5))
    assert all(task.done() for task in tasks)
    assert calls.heard[-1] == ("b", 7.5)


@pytest.mark.parametrize(
    ("strategy", "seconds"), [("sliding_window", (60, 60, 120)), ("token_bucket", (30, 60, 90)), ("fixed_window", (60, 60, 120))]
)
async def test_callers_wait_for_the_very_time_of_the_clock(
    strategy: str, seconds: tuple[int, ...], limiter_of: Callable[..., RateThrottleCore], ratethrottle_clock: ManualClock
) -> None:
    clock, limiter = ratethrottle_clock, limiter_of(RateThrottleRule("api", 2, 60, strategy=strategy))
    began_us, granted = clock(), []

    async def block(number: int) -> None:
        async with limiter.limit("ann", timeout=None):
            granted.append((number, clock() - began_us))

    @limiter.limit("ann", timeout=None)
    async def function(number: int) -> None:
        granted.append((number, clock() - began_us))

    async def reserve(number: int) -> None:
        async with limiter.reserve("ann", timeout=None) as reservation:
            reservation.settle(1)
            granted.append((number, clock() - began_us))

    tasks = [asyncio.create_task(waits(number)) for number, waits in enumerate((block, function, function, block, reserve))]
    await clock.settle()
    assert granted == [(0, 0), (1, 0)]
    await clock.elapse(seconds[0] - 0.000_001)
    assert len(granted) == 2
    await clock.elapse(200)
    assert [at_us for _, at_us in granted[2:]] == [at_s * 1_000_000 for at_s in seconds]
    assert [number for number, _ in granted] == list(range(5))
    assert clock() - began_us == (seconds[0] + 200) * 1_000_000 - 1
    await asyncio.gather(*tasks)


async def test_a_timeout_of_a_caller_goes_by_the_clock(
    limiter_of: Callable[..., RateThrottleCore], ratethrottle_clock: ManualClock
) -> None:
    clock, limiter = ratethrottle_clock, limiter_of(RateThrottleRule("api", 2, 60))
    await limiter.check("ann", cost=2)
    began_us = clock()
    with pytest.raises(RateLimitExceeded):
        await limiter.acquire("ann", timeout=59)
    assert clock() == began_us, "it is known that the time is too short"
    first = asyncio.create_task(limiter.acquire("ann", cost=2, timeout=70))
    second = asyncio.create_task(limiter.acquire("ann", timeout=100))
    third = asyncio.create_task(limiter.acquire("ann", timeout=59))
    await clock.elapse(59)
    assert [task.done() for task in (first, second, third)] == [False, False, True]
    await clock.elapse(1)
    assert first.result().allowed
    for task in (second, third):
        with pytest.raises(RateLimitExceeded):
            await task
    waits = asyncio.create_task(limiter.acquire("ann"))
    await clock.settle()
    clock.advance(60)  # at once, and the caller goes on in the next turns of the loop
    assert not waits.done()
    assert await waits


async def test_time_elapses_only_once_redis_has_answered(ratethrottle_clock: ManualClock) -> None:
    limiter = RateThrottleCore(ManualRedisStorage(fake_redis(), clock=ratethrottle_clock), rules=[RULE])
    began_us, decided = ratethrottle_clock(), []

    async def handler() -> None:
        for _ in range(3):
            await limiter.check("ann")
            decided.append(ratethrottle_clock())

    task = asyncio.create_task(handler())
    await ratethrottle_clock.elapse(5)
    assert decided == [began_us] * 3
    await task


async def test_a_clock_moves_for_loops_of_other_threads_and_forgets_those_that_have_ended() -> None:
    clock, fired, ready = ManualClock(), threading.Event(), threading.Event()

    async def serve() -> None:
        rung = asyncio.Event()
        clock.timers(asyncio.get_running_loop()).call_later(60, rung.set)
        ready.set()
        await rung.wait()
        fired.set()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    ready.wait(10)
    clock.advance(60)
    thread.join(10)
    assert fired.is_set()

    async def leave() -> None:
        clock.timers(asyncio.get_running_loop()).call_later(60, fired.clear)

    await asyncio.to_thread(lambda: asyncio.run(leave()))
    clock.advance(60)
    assert fired.is_set()
    assert not clock._timers


# Faults


@pytest.fixture(params=["manual clock", "real time"])
def redis_limiter(request: pytest.FixtureRequest, ratethrottle_clock: ManualClock) -> Callable[..., RateThrottleCore]:
    """Makes a limiter on fakeredis."""

    def make(rule: RateThrottleRule = RULE, **options: Any) -> RateThrottleCore:
        options = {"deadline": 5.0} | options
        if request.param == "real time":
            return RateThrottleCore(RedisStorage(fake_redis(), **options), rules=[rule])
        return RateThrottleCore(ManualRedisStorage(fake_redis(), clock=ratethrottle_clock, **options), rules=[rule])

    return make


async def tried(limiter: RateThrottleCore, key: str = "ann") -> Any:
    """The source of a decision, or the type of the error."""
    try:
        return (await limiter.check(key)).source
    except StorageError as error:
        return type(error)


@pytest.mark.parametrize("used", [False, True])
async def test_in_an_outage_the_policy_decides(used: bool, redis_limiter: Callable[..., RateThrottleCore]) -> None:
    for policy, expected in (("allow", True), ("deny", False), ("local", True)):
        limiter = redis_limiter(on_outage=policy, expected_processes=1)
        faults = Faults(limiter)
        if used:
            assert (await limiter.check("ann")).source == "redis"
        async with faults.outage():
            decision = await limiter.check("ann")
            assert (decision.source, decision.allowed) == ("outage", expected)
        assert (await limiter.check("bob")).source == "redis"
        await limiter.aclose()


@pytest.mark.parametrize("used", [False, True])
async def test_an_outage_raises_what_the_real_one_does(used: bool, redis_limiter: Callable[..., RateThrottleCore]) -> None:
    limiter = redis_limiter(on_outage="raise")
    if used:
        await limiter.check("ann")
    with Faults(limiter).outage(), pytest.raises(StorageUnavailable, match=r"can't be reached|was lost"):
        await limiter.check("ann")
    await limiter.aclose()


async def test_an_outage_is_told_and_ends_at_once(redis_limiter: Callable[..., RateThrottleCore]) -> None:
    limiter, told = redis_limiter(RateThrottleRule("api", 100, 60), on_outage="deny"), []
    limiter.on_event(lambda event: told.append(type(event)))
    await limiter.check("ann")
    faults = Faults(limiter)
    for _ in range(3):
        async with faults.outage():
            assert await tried(limiter) == "outage"
        assert await tried(limiter) == "redis"
    assert told[:2] == [events.OutageBegan, events.OutageEnded]
    await limiter.aclose()


async def test_what_was_used_in_an_outage_is_charged_after_it(redis_limiter: Callable[..., RateThrottleCore]) -> None:
    limiter = redis_limiter(expected_processes=1)
    assert await admitted(limiter, 1) == 1
    async with Faults(limiter).outage():
        assert await admitted(limiter, 5) == 2
    assert not await limiter.check("ann")
    await limiter.aclose()


@pytest.mark.parametrize("used", [False, True])
async def test_a_refusal_is_one_under_each_policy(used: bool, redis_limiter: Callable[..., RateThrottleCore]) -> None:
    for policy in ("allow", "deny", "local", "raise"):
        limiter = redis_limiter(on_outage=policy, expected_processes=1)
        if used:
            await limiter.check("ann")
        faults = Faults(limiter)
        async with faults.refuse():
            with pytest.raises(StorageRefused, match="password"):
                await limiter.check("ann")
        assert await tried(limiter) == "redis"
        async with faults.refuse("NOPERM this user has no permissions to run the 'evalsha' command"):
            with pytest.raises(StorageRefused, match="evalsha"):
                await limiter.check("ann")
        await limiter.aclose()


async def test_other_error_replies_are_what_they_are(redis_limiter: Callable[..., RateThrottleCore]) -> None:
    limiter = redis_limiter(on_outage="raise")
    faults = Faults(limiter)
    with (
        faults.refuse("LOADING Redis is loading the dataset in memory"),
        pytest.raises(StorageUnavailable, match="loading its data"),
    ):
        await limiter.check("ann")
    for reply in ("", "no", "OK\r\n", 5):
        with pytest.raises(ConfigurationError, match="error reply of Redis"):
            faults.refuse(reply)  # type: ignore[arg-type]
    await limiter.aclose()


@pytest.mark.parametrize("used", [False, True])
async def test_a_slow_redis_is_one_that_is_away(used: bool, redis_limiter: Callable[..., RateThrottleCore]) -> None:
    limiter = redis_limiter(on_outage="raise", deadline=0.25)
    while used and await tried(limiter) != "redis":
        pass
    faults = Faults(limiter)
    async with faults.slow(60):
        assert issubclass(await tried(limiter), StorageError)
        assert issubclass(await tried(limiter), StorageError)
    while await tried(limiter) != "redis":
        pass
    await limiter.aclose()


async def test_a_redis_that_is_slow_within_the_deadline_answers(redis_limiter: Callable[..., RateThrottleCore]) -> None:
    limiter = redis_limiter(on_outage="raise", deadline=5)
    loop = asyncio.get_running_loop()
    faults = Faults(limiter)
    await limiter.check("bob")
    storage = limiter._storage
    began_s = storage._clock.now if isinstance(storage, ManualRedisStorage) else loop.time()
    async with faults.slow(timedelta(milliseconds=30)):
        decisions = await asyncio.gather(*(limiter.check(key) for key in ("ann", "bob", "ann")))
        assert {decision.source for decision in decisions} == {"redis"}
    took_s = (storage._clock.now if isinstance(storage, ManualRedisStorage) else loop.time()) - began_s
    assert 0.029 <= took_s < (0.2 if isinstance(storage, ManualRedisStorage) else 3)
    await limiter.aclose()


async def test_a_slow_redis_takes_no_time_but_the_clocks(ratethrottle_clock: ManualClock) -> None:
    """A deadline of a minute passes on the clock, and in a moment of real time; the clock stops there."""
    storage = ManualRedisStorage(fake_redis(), clock=ratethrottle_clock, deadline=60.0, on_outage="deny")
    limiter, loop = RateThrottleCore(storage, rules=[RULE]), asyncio.get_running_loop()
    faults = Faults(limiter)
    await limiter.check("ann")
    began_us, began_s = ratethrottle_clock(), loop.time()
    async with faults.slow(3600):
        assert await tried(limiter) == "outage"
        passed_us = ratethrottle_clock() - began_us
        assert 60_000_000 <= passed_us < 75_000_000
        assert loop.time() - began_s < 5
        assert await tried(limiter) == "outage"
    await limiter.aclose()


async def test_the_inner_fault_counts(redis_limiter: Callable[..., RateThrottleCore]) -> None:
    limiter = redis_limiter(on_outage="deny")
    faults = Faults(limiter)
    async with faults.outage():
        async with faults.refuse():
            assert await tried(limiter) is StorageRefused
        async with faults.outage():
            assert await tried(limiter) == "outage"
        assert await tried(limiter) == "outage"
    assert await tried(limiter) == "redis"
    await limiter.aclose()


async def test_a_fault_ends_with_its_block_whatever_was_raised(redis_limiter: Callable[..., RateThrottleCore]) -> None:
    limiter = redis_limiter(on_outage="deny")
    faults = Faults(limiter)
    for fault in (faults.outage, faults.refuse, lambda: faults.slow(1)):
        with pytest.raises(KeyError):
            async with fault():
                raise KeyError
        async with faults.outage():  # and waits until that is over
            pass
        assert await tried(limiter) == "redis"
    await limiter.aclose()


async def test_a_plain_with_ends_too(redis_limiter: Callable[..., RateThrottleCore]) -> None:
    limiter = redis_limiter(on_outage="deny")
    await limiter.check("ann")
    faults = Faults(limiter)
    with faults.outage():
        assert await tried(limiter) == "outage"
    while await tried(limiter) != "redis":
        pass
    await limiter.aclose()


def test_a_fault_can_be_made_from_another_thread() -> None:
    """As a synchronous test does, whose application runs in a loop of its own."""
    limiter = RateThrottleCore(RedisStorage(fake_redis(), on_outage="deny", deadline=5.0), rules=[RULE])
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    def ask() -> Any:
        return asyncio.run_coroutine_threadsafe(tried(limiter), loop).result(10)

    try:
        assert ask() == "redis"
        faults = Faults(limiter)
        with faults.outage():
            assert ask() == "outage"
        while ask() != "redis":
            pass
    finally:
        asyncio.run_coroutine_threadsafe(limiter.aclose(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


async def test_other_limiters_on_the_server_notice_nothing() -> None:
    server = fakeredis.FakeServer()
    one, other = (
        RateThrottleCore(RedisStorage(fake_redis(server=server), prefix=prefix, on_outage="deny", deadline=5.0), rules=[RULE])
        for prefix in ("one", "other")
    )
    async with Faults(one).outage():
        assert [await tried(limiter) for limiter in (one, other)] == ["outage", "redis"]
    for limiter in (one, other):
        await limiter.aclose()


def test_faults_are_for_redis_and_within_reason() -> None:
    for what, words in (
        (RateThrottleCore(), "not for one with InMemoryStorage"),
        (InMemoryStorage(), "not for a InMemoryStorage"),
        (5, "not for a int"),
        (RedisStorage, "not for the class RedisStorage"),
    ):
        with pytest.raises(ConfigurationError, match=words):
            Faults(what)  # type: ignore[arg-type]
    faults = Faults(RedisStorage(fake_redis()))
    for seconds in (0, -1, float("nan"), float("inf"), True, "1", timedelta(0), 3601):
        with pytest.raises(ConfigurationError, match=r"seconds is .*; it is above 0, and 3600 at most"):
            faults.slow(seconds)  # type: ignore[arg-type]


# The promise


def kept(rule: RateThrottleRule, limiter: RateThrottleCore, clock: ManualClock) -> Any:
    """What a greedy client gets: all that there is, at each promised instant and at some others."""

    async def play() -> list[tuple[float, Decision]]:
        rng, log = random.Random(rule.strategy), []
        for _ in range(200):
            decision = await limiter.check("ann", cost=rng.randint(1, min(3, rule.capacity)))
            log.append((clock.now, decision))
            if not decision:
                clock.advance(decision.retry_after if rng.random() < 0.7 else decision.retry_after / 2 // 1e-6 * 1e-6)
        return log

    return play()


@every_strategy
async def test_a_log_of_reservations_and_charges_keeps_the_promise_as_the_page_says(
    strategy: str, ratethrottle_limiter: MakeLimiter, ratethrottle_clock: ManualClock
) -> None:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    rng, rule = random.Random(seed), RateThrottleRule("api", 7, 10, strategy=strategy)
    limiter, log, refused = ratethrottle_limiter(rule), [], 0
    for _ in range(300):
        ratethrottle_clock.advance(rng.choice((0, 0, 0.1, 0.5, 3)))
        began, estimate, used = ratethrottle_clock.now, rng.randint(1, 7), rng.randint(0, 9)
        try:
            async with limiter.reserve("ann", cost=estimate) as reservation:
                ratethrottle_clock.advance(rng.choice((0, 0, 0.2, 6)))
                reservation.settle(used)
        except RateLimitExceeded:
            refused += 1
        else:
            log += [(began, min(estimate, used))] if used else []
        if rng.random() < 0.05:
            await limiter.charge("ann", cost=rng.randint(1, 14))
        if check := await limiter.check("ann"):
            log.append((ratethrottle_clock.now, check.cost))
    assert refused
    assert_promise(log, rule)
    # With the estimate of what came back, and with a charge, it doesn't.
    ratethrottle_clock.advance(100)
    began = ratethrottle_clock.now
    async with limiter.reserve("ann", cost=7) as reservation:
        reservation.settle(1)
    again = await limiter.check("ann", cost=6)
    assert_promise([(began, 1), (began, again)], rule)
    for wrong in ([(began, 7), (began, again)], [(began, 1), (began, again), (began, await limiter.charge("bob", cost=7))]):
        with pytest.raises(PromiseBrokenError):
            assert_promise(wrong, rule)


@every_strategy
async def test_the_promise_holds_of_a_limiter_and_breaks_with_one_unit_more(
    strategy: str, ratethrottle_limiter: MakeLimiter, ratethrottle_clock: ManualClock
) -> None:
    rule = RateThrottleRule("api", 7, 10, strategy=strategy)
    log = await kept(rule, ratethrottle_limiter(rule), ratethrottle_clock)
    assert_promise(log, rule)
    assert_promise_between([(at, at, decision) for at, decision in log], rule)
    assert any(not decision for _, decision in log)
    # One unit more, just where the next one was denied.
    number = next(number for number, (_, decision) in enumerate(log) if not decision and decision.remaining == 0)
    broken = [*log, (log[number][0], 1)]
    with pytest.raises(PromiseBrokenError) as raised:
        assert_promise(broken, rule)
    said = str(raised.value)
    assert said.startswith(f"rule 'api' ({strategy}, 7 per 10 s) breaks its promise: ")
    assert f"entry {len(broken) - 1} of the log: 1 at " in said
    assert isinstance(raised.value, AssertionError)
    assert raised.value.breach.units > raised.value.breach.most


async def test_a_decision_counts_for_what_it_was_charged(
    ratethrottle_limiter: MakeLimiter, ratethrottle_clock: ManualClock
) -> None:
    """Of a joint decision the part of the rule counts, and nothing of one that was denied; nor what was only flagged."""
    short, long = RateThrottleRule("short", 2, 10), RateThrottleRule("long", 3, 60)
    flagged = RateThrottleRule("flagged", 2, 10, enforce="flag")
    limiter, log = ratethrottle_limiter(short, long, flagged), []
    for _ in range(4):
        log.append((ratethrottle_clock.now, await limiter.check("ann", {"short": 2, "long": 1})))
        ratethrottle_clock.advance(10)
    assert [decision.allowed for _, decision in log] == [True, True, True, False]
    assert_promise(log, short)
    assert_promise(log, long)
    with pytest.raises(PromiseBrokenError, match=r"4 units from"):
        assert_promise([(log[0][0], decision) for _, decision in log[:2]], short)
    with pytest.raises(PromiseBrokenError, match=r"3 units from"):
        assert_promise([(at, decision) for at, decision in log if decision], RateThrottleRule("long", 2, 60))
    over = [(ratethrottle_clock.now, await limiter.check("bob", "flagged")) for _ in range(3)]
    assert [(decision.allowed, decision.over) for _, decision in over] == [(True, False), (True, False), (True, True)]
    assert_promise(over, flagged)
    with pytest.raises(PromiseBrokenError):
        assert_promise([over[0], *over], flagged)
    with pytest.raises(ConfigurationError, match="the decision is of rule 'flagged', not of 'short'"):
        assert_promise(over, short)
    with pytest.raises(ConfigurationError, match="promises nothing"):
        assert_promise([], RateThrottleRule("api", 2, 10, enforce="off"))


@every_strategy
def test_a_broken_log_breaks_and_says_where(strategy: str) -> None:
    """Three where two are promised, in the first second: each strategy says what it promised, and by which entries it was broken."""
    rule = RateThrottleRule("api", 2, 10, strategy=strategy)
    began_s = START.timestamp()
    log = [(began_s + at, 1) for at in (0.25, 0.5, 0.75)]
    words = {
        "sliding_window": r"3 units from .*0\.25 s to .*0\.75 s, in 0\.5 s; at most 2 in any 10 s",
        "token_bucket": r"3 units from .*0\.25 s to .*0\.75 s, in 0\.5 s; at most 2\.1, a burst of 2 and 2 per 10 s since then",
        "sliding_counter": r"3 units from .*0 s to .*0\.75 s, in 0\.75 s; at most 2 in the window from .* with what still counts",
        "fixed_window": r"3 units from .*0 s to .*0\.75 s, in 0\.75 s; at most 2 in the window from",
    }
    words["leaky_bucket"] = words["token_bucket"]
    with pytest.raises(PromiseBrokenError, match=words[strategy]) as raised:
        assert_promise(log, rule)
    for number in range(3):
        assert f"entry {number} of the log: 1 at " in str(raised.value)
    assert_promise(log[:2], rule)


@every_strategy
def test_what_was_denied_does_not_count(strategy: str) -> None:
    rule = RateThrottleRule("api", 2, 10, strategy=strategy)
    began_s = START.timestamp()
    assert_promise([(began_s, 1, True), (began_s, 1, True), (began_s, 1, False), (began_s + 1, 2, False)], rule)
    with pytest.raises(PromiseBrokenError):
        assert_promise([(began_s, 1, True), (began_s, 1, True), (began_s, 1, True)], rule)


@every_strategy
def test_brackets_break_only_for_what_is_certain(strategy: str) -> None:
    rule = RateThrottleRule("api", 2, 10, strategy=strategy)
    assert_promise_between([(0, 100, 1)] * 3, rule)
    with pytest.raises(PromiseBrokenError, match=r"[3-7] units from 1 s to 2 s, in 1 s; at most [\d.]+ in any 1 s\n  entry 0 "):
        assert_promise_between([(1, 2, 1)] * 7, rule)


def test_a_log_may_come_in_any_order_and_in_several_units() -> None:
    rule = RateThrottleRule("api", 2, 10)
    same: list[list[Any]] = [
        [(20, 1), (1.5, 1), (2, 1)],
        [(timedelta(seconds=20), 1), (timedelta(seconds=1.5), 1), (timedelta(seconds=2), 1)],
        [(datetime(1970, 1, 1, 0, 0, 20, tzinfo=UTC), 1), (Fraction(3, 2), 1), [2, 1]],
    ]
    for log in same:
        assert_promise(log, rule)
        with pytest.raises(PromiseBrokenError, match=r"3 units from 1.5 s to 3 s, in 1.5 s"):
            assert_promise([*log, (3, 1)], rule)
    assert_promise([(20_000_000, 1), (1_500_000, 1), (2_000_000, 1)], rule, unit="us")
    with pytest.raises(PromiseBrokenError):
        assert_promise([(0, 2), (9_999_999, 1)], rule, unit="us")
    assert_promise([(0, 2), (10_000_000, 1)], rule, unit="us")


def test_a_log_without_entries_proves_nothing() -> None:
    log = iter([(1, 1), (2, 1)])
    assert_promise(log, RULE)
    for check in (assert_promise, assert_promise_between):
        for empty in ([], (), log):
            with pytest.raises(ConfigurationError, match="the log is empty"):
                check(empty, RULE)
    # That nothing was granted is something.
    assert_promise([(1, 1, False)], RULE)


def test_a_long_breach_is_told_in_short() -> None:
    with pytest.raises(PromiseBrokenError) as raised:
        assert_promise([(i / 1000, 1) for i in range(101)], RateThrottleRule("api", 100, 10))
    assert str(raised.value).count("\n") == 13
    assert str(raised.value).endswith("and 89 more")


def test_a_limit_of_0_and_leases_promise_what_they_say() -> None:
    for check in (assert_promise, lambda log, rule: assert_promise_between([(at, at, cost) for at, cost in log], rule)):
        with pytest.raises(PromiseBrokenError):
            check([(5, 1)], RateThrottleRule("api", 0, 60))
        leased = RateThrottleRule("api", 1_000, 1, strategy="token_bucket", lease=True)
        assert leased.capacity < 1_000
        check([(5, 1_000)], leased)
        with pytest.raises(PromiseBrokenError):
            check([(5, 1_001)], leased)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (5, r"it is \(time, cost\)"),
        ("ab", r"it is \(time, cost\)"),
        ((1,), r"it is \(time, cost\)"),
        ((1, 1, True, 1), r"it is \(time, cost\)"),
        ((1, 0), "its cost is 0"),
        ((1, 1.0), "its cost is 1.0"),
        ((1, True), "its cost is True"),
        ((1, 1, 1), "whether it was allowed is 1"),
        (("now", 1), "not 'now'"),
        ((float("nan"), 1), "not nan"),
        ((1_800_000_000_000_000, 1), 'pass unit="us"'),
        ((datetime(2030, 1, 1), 1), "time zone"),  # noqa: DTZ001  # that is what is refused
    ],
)
def test_what_is_no_entry_is_named(entry: Any, words: str) -> None:
    with pytest.raises(ConfigurationError, match=f"entry 1 of the log is .*{words}"):
        assert_promise([(1, 1), entry], RULE)


def test_wrong_arguments_of_a_promise_are_named() -> None:
    with pytest.raises(ConfigurationError, match="it is a RateThrottleRule"):
        assert_promise([(1, 1)], "api")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match='it is "s" or "us"'):
        assert_promise([(1, 1)], RULE, unit="ms")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="ends before it begins"):
        assert_promise_between([(2, 1, 1)], RULE)
    with pytest.raises(ConfigurationError, match=r"a whole number, not 1\.5"):
        assert_promise([(1.5, 1)], RULE, unit="us")


# What isn't installed


@pytest.mark.parametrize("missing", ["fakeredis", "lupa"])
def test_without_fakeredis_the_error_names_the_extra(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(
        ModuleNotFoundError, match=rf"{missing}.*, which isn't installed; the extra ratethrottle\[testing\] has it"
    ):
        fake_redis()


def test_the_kit_imports_neither_fakeredis_nor_pytest() -> None:
    code = "import sys, ratethrottle.testing; print({'fakeredis', 'lupa', 'pytest'} & set(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "set()\n"


def test_the_package_does_not_import_the_kit() -> None:
    code = "import sys, ratethrottle, ratethrottle.cli; print([name for name in sys.modules if 'ratethrottle.testing' in name])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "[]\n"


def test_every_name_of_the_kit_is_on_the_page() -> None:
    page, api = ((ROOT / "docs" / name).read_text() for name in ("testing.md", "api.md"))
    for name in importlib.import_module("ratethrottle.testing").__all__:
        assert name in page or name == "Fault", name
        assert re.search(rf":: (ratethrottle\.testing\.)?{name}$", api, re.MULTILINE), name


# The plugin

PLUGIN = ("-p", "pytest_ratethrottle", "-p", "no:randomly", "-p", "no:cacheprovider", "-p", "no:xdist")


Run = Callable[..., pytest.RunResult]


@pytest.fixture
def run(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs pytest on what was written there, in a process of its own that knows where we are."""
    monkeypatch.setenv("PYTHONPATH", str(Path(ratethrottle.__file__).parents[1]))
    return lambda *arguments: pytester.runpytest_subprocess(*PLUGIN, *arguments)


def test_fixtures_make_limiters_on_one_clock(pytester: pytest.Pytester, run: Run) -> None:
    pytester.makepyfile(
        """
        import asyncio
        from ratethrottle import RateThrottleRule
        from ratethrottle.testing import fake_redis

        RULE = RateThrottleRule("api", 2, 60)

        def test_memory(ratethrottle_clock, ratethrottle_limiter):
            async def scenario():
                limiter = ratethrottle_limiter(RULE, max_keys=5)
                assert [bool(await limiter.check("ann")) for _ in range(3)] == [True, True, False]
                ratethrottle_clock.advance(60)
                assert await limiter.check("ann")
            asyncio.run(scenario())

        def test_redis(ratethrottle_clock, ratethrottle_limiter):
            async def scenario():
                limiter = ratethrottle_limiter(RULE, client=fake_redis())
                assert [bool(await limiter.check("ann")) for _ in range(3)] == [True, True, False]
                ratethrottle_clock.advance(60)
                assert await limiter.check("ann")
            asyncio.run(scenario())

        def test_each_test_has_a_clock_of_its_own(ratethrottle_clock):
            from ratethrottle.testing import ManualClock
            assert ratethrottle_clock() == ManualClock()()
        """
    )
    run("-W", "error", "-p", "no:asyncio").assert_outcomes(passed=3)


def test_limiters_of_the_fixture_are_closed_when_the_test_ends(pytester: pytest.Pytester, run: Run) -> None:
    """In the loop of the test or after it, and also if the test fails or has closed them itself. Their keys go."""
    pytester.makeconftest(
        """
        import fakeredis
        import pytest
        from ratethrottle import LimiterClosed, RateThrottleRule
        from ratethrottle.testing import fake_redis

        SERVER, MADE = fakeredis.FakeServer(), []

        @pytest.fixture
        def limiters(ratethrottle_limiter):
            rule = RateThrottleRule("api", 2, 60)
            made = [ratethrottle_limiter(rule), ratethrottle_limiter(rule, client=fake_redis(server=SERVER))]
            MADE.extend(made)
            return made

        def pytest_sessionfinish():
            assert len(MADE) == 8
            for limiter in MADE:
                with pytest.raises(LimiterClosed):
                    limiter.check("ann")
            assert not fakeredis.FakeRedis(server=SERVER).keys("manual-*")
            print("all of them are closed")
        """
    )
    pytester.makepyfile(
        """
        import asyncio
        import pytest

        async def use(limiters):
            assert [bool(await limiter.check("ann")) for limiter in limiters] == [True, True]

        def test_own_loop(limiters):
            asyncio.run(use(limiters))

        async def test_loop_of_a_plugin(limiters):
            await use(limiters)

        async def test_fails(limiters):
            await use(limiters)
            assert False

        async def test_closed(limiters):
            await use(limiters)
            for limiter in limiters:
                await limiter.aclose()
        """
    )
    result = run("-W", "error", "-s", "-o", "asyncio_mode=auto", "-o", "asyncio_default_fixture_loop_scope=function")
    result.assert_outcomes(passed=3, failed=1)
    assert "all of them are closed" in result.stdout.str()


def test_the_page_says_how_it_looks_and_it_does(pytester: pytest.Pytester, run: Run) -> None:
    """The examples of docs/testing.md that are test files."""
    page = (ROOT / "docs/testing.md").read_text()
    files = re.findall(r"<!-- not run: a test file.*? -->\n\n```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert len(files) >= 2
    for number, code in enumerate(files):
        pytester.makepyfile(**{f"test_page_{number}": code})
    result = run("-W", "error", "-o", "asyncio_mode=auto", "-o", "asyncio_default_fixture_loop_scope=function")
    outcomes = result.parseoutcomes()
    assert set(outcomes) == {"passed"}, result.stdout.str()
    assert outcomes["passed"] >= 3


def test_a_projects_own_fixtures_go_before_ours(pytester: pytest.Pytester, run: Run) -> None:
    pytester.makeconftest(
        """
        import pytest

        @pytest.fixture
        def ratethrottle_clock():
            return "mine"
        """
    )
    pytester.makepyfile("def test_it(ratethrottle_clock):\n    assert ratethrottle_clock == 'mine'\n")
    run().assert_outcomes(passed=1)


def test_the_plugin_costs_nothing_who_does_not_use_it(pytester: pytest.Pytester, run: Run) -> None:
    """It imports neither the package nor what that needs, and adds nothing but two fixtures."""
    pytester.makepyfile(
        """
        import sys

        def test_it(request):
            assert "pytest_ratethrottle" in sys.modules
            assert not {"ratethrottle", "redis", "fakeredis"} & set(sys.modules)
        """
    )
    run().assert_outcomes(passed=1)
    said = run("--fixtures").stdout.str()
    assert re.findall(r"^(ratethrottle\w*)", said, re.MULTILINE) == ["ratethrottle_clock", "ratethrottle_limiter"]
