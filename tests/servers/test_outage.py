"""Redis is away, late, or has lost what it held: what checks are meanwhile, and what holds afterwards. On real servers."""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections import Counter
from typing import Any

import pytest

from ratethrottle import Decision, RateThrottleCore, RateThrottleRule, RedisStorage, create_limiter
from ratethrottle.errors import StorageError, StorageRefused, StorageUnavailable
from ratethrottle.events import Event
from ratethrottle.storage.redis import backoff
from ratethrottle.storage.redis.backoff import EVERY_S, JITTER_S
from tests.kit.recovery import served, sure, until
from tests.kit.relay import Relay
from tests.kit.servers import RedisServer, free_port
from tests.kit.strategies import STRATEGIES

# Several limiters stand for as many processes here.
pytestmark = [pytest.mark.uvloop, pytest.mark.usefixtures("apart")]

LIMIT = 40
RULE = RateThrottleRule("r", LIMIT, 60)


def limiter_of(url: str, rule: RateThrottleRule = RULE, **options: Any) -> RateThrottleCore:
    return create_limiter("redis", redis_url=url, rules=[rule], **options)


@pytest.fixture
def brisk(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that aren't about when it is tried to connect: five times as often."""
    monkeypatch.setattr(backoff, "EVERY_S", backoff.EVERY_S / 5)
    monkeypatch.setattr(backoff, "JITTER_S", backoff.JITTER_S / 5)


def admitted(decisions: list[Decision]) -> int:
    return sum(decision.allowed for decision in decisions)


# While it is away


@pytest.mark.parametrize(
    ("options", "expected"),
    [({}, 0), ({"expected_processes": 4}, 10), ({"on_outage": "deny"}, 0), ({"on_outage": "allow"}, 100)],
)
async def test_without_redis_the_policy_decides(options: dict[str, Any], expected: int) -> None:
    """By default a share of the limit, and nothing as long as it isn't known what a share is."""
    async with limiter_of(f"redis://127.0.0.1:{free_port()}", **options) as limiter:
        decisions = [await limiter.check("user") for _ in range(100)]
        assert {decision.source for decision in decisions} == {"outage"}
        assert admitted(decisions) == expected
        assert all(0 < decision.retry_after <= 60 for decision in decisions if not decision.allowed)
        assert limiter.statistics().breaker != "closed"


async def test_a_process_that_denies_for_want_of_a_number_says_so() -> None:
    for options, silent in (({}, False), ({"expected_processes": 2}, True), ({"on_outage": "deny"}, True)):
        told: list[Event] = []
        limiter = limiter_of(f"redis://127.0.0.1:{free_port()}", **options)
        limiter.on_event(told.append)
        async with limiter:
            await limiter.check("user")
        assert ("expected_processes" not in str(told[0])) == silent


async def test_a_rule_has_a_policy_of_its_own() -> None:
    async with limiter_of(f"redis://127.0.0.1:{free_port()}", on_outage="allow") as limiter:
        limiter.add_rule(RateThrottleRule("strict", LIMIT, 60, on_outage="deny"))
        limiter.add_rule(RateThrottleRule("loud", LIMIT, 60, on_outage="raise"))
        assert (await limiter.check("user", "r")).allowed
        assert not (await limiter.check("user", "strict")).allowed
        with pytest.raises(StorageUnavailable, match="can't be reached"):
            await limiter.check("user", "loud")


@pytest.mark.parametrize("strategy", STRATEGIES)
async def test_the_shares_of_all_processes_are_the_limit_once(strategy: str) -> None:
    """Three that know of each other, when Redis dies: what they admit on their own is one limit, whichever has the remainder."""
    rule = RateThrottleRule("r", LIMIT, 3600, strategy=strategy)  # 40 of three is 13, 13 and 14
    with RedisServer() as server:
        limiters = [limiter_of(server.url, rule) for _ in range(3)]
        for limiter in limiters:
            await until(lambda limiter=limiter: served(limiter))  # type: ignore[misc]  # the default binds the loop's value

        async def known() -> bool:
            for limiter in limiters:
                await limiter.peek("user")
            return all(limiter.statistics().processes == 3 for limiter in limiters)

        await until(known)
        await until(lambda: sure(*limiters), 5)
        server.stop()
        decisions = [await limiter.check("user") for _ in range(LIMIT) for limiter in limiters]
        assert {decision.source for decision in decisions} == {"outage"}
        assert LIMIT <= admitted(decisions) <= LIMIT + (2 if strategy.endswith("bucket") else 0)
        for limiter in limiters:
            await limiter.aclose()


async def test_a_share_begins_with_what_is_known_to_be_used() -> None:
    with RedisServer() as server:
        async with limiter_of(server.url, expected_processes=1) as limiter:
            assert admitted([await limiter.check("user") for _ in range(30)]) == 30
            server.stop()
            assert admitted([await limiter.check("user") for _ in range(30)]) == LIMIT - 30


@pytest.mark.usefixtures("brisk")
@pytest.mark.parametrize("strategy", STRATEGIES)
async def test_what_redis_said_after_one_outage_counts_in_the_next(strategy: str) -> None:
    """Checks that are in flight when the next outage begins are decided by what is known then, not by the former outage's account."""
    rule = RateThrottleRule("r", LIMIT, 3600, strategy=strategy)
    with RedisServer() as server:
        async with limiter_of(server.url, rule, expected_processes=1, prefilter_ttl=0) as limiter:
            assert await served(limiter)
            server.pause()
            assert [(await limiter.check("user")).source for _ in range(2)] == ["outage"] * 2
            server.resume()
            await until(lambda: served(limiter))
            left = (await limiter.peek("user")).remaining
            assert admitted([await limiter.check("user") for _ in range(left)]) == left
            await limiter.check("other")
            server.pause()
            late = await asyncio.gather(*[limiter.check("user") for _ in range(LIMIT)])
            server.resume()
    assert admitted(late) <= 1  # what a bucket has drained


async def test_decisions_cost_little_and_redis_is_asked_twice_a_second_at_most() -> None:
    with RedisServer() as server:
        async with limiter_of(server.url, expected_processes=2) as limiter:
            await limiter.check("user")
            server.stop()
            await limiter.check("user")
            before, began, calls = limiter.statistics().attempts, time.monotonic(), 0
            slowest_s = 0.0
            while time.monotonic() - began < 1.5:
                at = time.thread_time()
                await limiter.check(f"user:{calls}")
                slowest_s = max(slowest_s, time.thread_time() - at)
                calls += 1
                if calls % 100 == 0:
                    await asyncio.sleep(0)
            assert limiter.statistics().attempts - before <= 4
            assert calls > 2_000
            assert slowest_s < 0.02  # of CPU, whatever else runs here


async def test_a_redis_that_comes_late_is_taken_up() -> None:
    server = RedisServer()
    try:
        told: list[Event] = []
        limiter = limiter_of(server.url, expected_processes=1)
        limiter.on_event(told.append)
        async with limiter:
            assert (await limiter.check("user")).source == "outage"
            server.start()
            assert await until(lambda: served(limiter)) < 1.2
            # It knows by now what was admitted without it.
            assert (await limiter.check("user")).remaining == LIMIT - 2
            assert [event.kind for event in told] == ["outage_began", "outage_ended"]
    finally:
        server.close()


async def test_a_frozen_redis_is_an_outage_and_nothing_is_run_twice() -> None:
    with RedisServer() as server:
        async with limiter_of(server.url, RateThrottleRule("r", 1000, 3600)) as limiter:
            await limiter.check("user")
            server.pause()
            began = time.monotonic()
            late = await asyncio.gather(*(limiter.check("user") for _ in range(10)))
            assert 0.2 < time.monotonic() - began < 0.6
            assert {decision.source for decision in late} == {"outage"}
            server.resume()
            await until(lambda: served(limiter))
            # They were run when it went on, or not; and what was admitted here was charged.
            remaining = (await limiter.check("user")).remaining
            assert 1000 - 2 - 20 <= remaining <= 1000 - 2 - 10


async def test_all_connections_come_back_with_the_first_one() -> None:
    """Attempts are at most two a second for all of them, but once Redis answers there is nothing to wait for."""
    with RedisServer() as server:
        async with limiter_of(server.url, deadline=0.1, connections=8, expected_processes=1) as limiter:
            keys = [f"user:{number}" for number in range(50)]
            assert len(await limiter.check_many(keys)) == 50
            server.pause()
            assert {decision.source for decision in await limiter.check_many(keys)} == {"outage"}
            server.resume()

            async def all_served() -> bool:
                return {(await limiter.peek(key)).source for key in keys} == {"redis"}

            await until(all_served, 1.5)
            assert limiter.statistics().breaker == "closed"


async def test_the_breaker_is_half_open_while_an_attempt_is_made() -> None:
    with RedisServer() as server:
        async with limiter_of(server.url, deadline=0.2, expected_processes=1) as limiter:

            async def breaker() -> str:
                await limiter.check("user")
                return limiter.statistics().breaker

            assert await breaker() == "closed"
            server.pause()  # an attempt to connect succeeds, and has no answer within the deadline
            seen = [await breaker()]
            give_up_s = time.monotonic() + 3
            while seen[-3:] != ["open", "half_open", "open"] and time.monotonic() < give_up_s:
                if (now := await breaker()) != seen[-1]:
                    seen.append(now)
                await asyncio.sleep(0.005)
            assert seen[-3:] == ["open", "half_open", "open"]
            server.resume()
            await until(lambda: served(limiter), 1.5)
            assert await breaker() == "closed"


@pytest.mark.parametrize("how", ["check", "check_many", "peek"])
@pytest.mark.parametrize("options", [{"on_outage": policy} for policy in ("local", "deny", "raise")], ids=str)
async def test_a_task_that_goes_on_asking_does_not_keep_the_loop_from_its_work(options: dict[str, Any], how: str) -> None:
    """A task that spins on what policies answer at once would freeze all others, and Redis would never be reached again."""
    async with limiter_of(f"redis://127.0.0.1:{free_port()}", **options) as limiter:
        assert await turns_during(limiter, how, 12_800) >= 90


@pytest.mark.parametrize("on_overload", ["deny", "raise"])
async def test_nor_does_a_task_that_goes_on_asking_more_than_may_wait(on_overload: str) -> None:
    with RedisServer() as server:
        async with limiter_of(server.url, max_waiting=1, on_overload=on_overload, deadline=1) as limiter:
            await limiter.check("user")
            server.pause()
            waiting = []
            while not limiter.statistics().waiting:
                waiting.append(asyncio.ensure_future(limiter.check(f"user:{len(waiting)}")))
                await asyncio.sleep(0)
            assert await turns_during(limiter, "check", 1_280) >= 9
            server.resume()
            await asyncio.gather(*waiting, return_exceptions=True)


async def turns_during(limiter: RateThrottleCore, how: str, checks: int) -> int:
    """How many turns another task has while one asks so often in a row."""
    turns = 0

    async def take_turns() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    ask = {"check": limiter.check, "peek": limiter.peek, "check_many": lambda key: limiter.check_many([key])}[how]
    other = asyncio.create_task(take_turns())
    for _ in range(checks):
        with contextlib.suppress(StorageUnavailable):  # under `raise` it is the answer
            await ask("user")
    other.cancel()
    return turns


# What is none


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("how", ["gather", "check_many"])
async def test_a_crowd_is_decided_by_redis_or_denied_as_overload(how: str, warm: bool) -> None:
    with RedisServer() as server:
        async with limiter_of(server.url, on_outage="allow") as limiter:
            told: list[Event] = []
            limiter.on_event(told.append)
            if warm:
                assert await served(limiter)
            keys = [f"user:{number}" for number in range(30_000)]
            if how == "gather":
                decisions = await asyncio.gather(*(limiter.check(key) for key in keys))
            else:
                decisions = await limiter.check_many(keys)
            count = Counter((decision.source, decision.allowed) for decision in decisions)
            assert set(count) <= {("redis", True), ("overload", False)}
            assert limiter.statistics().overloads == count["overload", False]
            assert limiter.statistics().breaker == "closed"
            assert (await limiter.check("user")).source == "redis"
            assert told == []


async def test_what_the_library_asks_for_itself_takes_no_callers_place() -> None:
    """After an outage it looks at each key that was charged."""
    with RedisServer() as server:
        async with limiter_of(server.url, expected_processes=1, max_waiting=1, on_overload="raise", deadline=2) as limiter:
            await limiter.check("user")
            server.stop()
            for number in range(1_000):
                assert (await limiter.check(f"user:{number}")).source == "outage"
            server.start()
            await until(lambda: served(limiter), 4)
            for number in range(200):
                assert (await limiter.check(f"new:{number}")).source == "redis"
            assert limiter.statistics().overloads == 0


@pytest.mark.parametrize("turns", range(4))
async def test_a_loop_that_was_blocked_is_not_an_outage(turns: int) -> None:
    with RedisServer() as server:
        async with limiter_of(server.url, deadline=0.1) as limiter:
            told: list[Event] = []
            limiter.on_event(told.append)
            await limiter.check("user")
            await asyncio.sleep(0.2)
            for blocked_s in (0.1, 0.15, 0.3):
                check = asyncio.ensure_future(limiter.check("user"))
                for _ in range(turns):
                    await asyncio.sleep(0)
                time.sleep(blocked_s)  # noqa: ASYNC251  # that is what this is about
                assert (await check).source == "redis"
            assert told == []


# What it has lost


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("lost", ["flushed", "restarted"])
async def test_what_living_processes_know_is_not_lost(strategy: str, lost: str) -> None:
    """Two know overlapping parts of the past; after the loss no more than the rest is granted."""
    rule = RateThrottleRule("r", LIMIT, 3600, strategy=strategy)
    with RedisServer() as server:
        async with limiter_of(server.url, rule) as one, limiter_of(server.url, rule) as other:
            granted = admitted([await one.check("user") for _ in range(15)] + [await other.check("user") for _ in range(10)])
            assert granted == 25
            if lost == "flushed":
                with server.client() as client:
                    client.flushall()
            else:
                server.stop()
                server.start()
            for limiter in (one, other):
                await until(lambda limiter=limiter: settled(limiter))  # type: ignore[misc]  # the default binds the loop's value
            assert one.statistics().epoch_changes == 1
            granted += admitted([await limiter.check("user") for _ in range(LIMIT) for limiter in (one, other)])
            assert LIMIT <= granted <= LIMIT + (2 if strategy.endswith("bucket") else 0)


async def settled(limiter: RateThrottleCore) -> bool:
    """Whether the loss was noticed, and Redis answers again."""
    return await served(limiter) and limiter.statistics().epoch_changes > 0


async def test_an_idle_process_tells_what_it_knows_in_time() -> None:
    """Nobody asks it anything, but it looks after what it knows."""
    with RedisServer() as server:
        async with limiter_of(server.url) as idle, limiter_of(server.url, on_outage="deny") as busy:
            assert admitted([await idle.check("user") for _ in range(LIMIT)]) == LIMIT
            await busy.check("another")
            with server.client() as client:
                client.flushall()
            granted = 0
            ends = time.monotonic() + 1
            while time.monotonic() < ends:
                granted += (await busy.check("user")).allowed
                await asyncio.sleep(0.01)
            assert granted == 0
            assert idle.statistics().epoch_changes == 1


@pytest.mark.parametrize("newcomer", [False, True])
async def test_a_process_that_found_nobody_a_moment_ago_tells_in_time(newcomer: bool) -> None:
    """A server comes back between two attempts: one process is served at once, and the other one's turn is far away."""
    with RedisServer() as server, server.client() as client:
        async with Relay(server.socket) as one, Relay(server.socket) as other, limiter_of(other.url) as late:
            assert admitted([await late.check("user") for _ in range(LIMIT)]) == LIMIT
            early = limiter_of(one.url, on_outage="deny")
            if not newcomer:
                await early.check("another")
            await asyncio.sleep(-time.time() % EVERY_S + JITTER_S + 0.01)
            epoch = client.get("ratethrottle:epoch")
            client.flushall()
            if newcomer:  # only the data's age tells it that there was something before
                client.set("ratethrottle:epoch", b"0" * 40 + epoch[40:])
            other.refuses = True
            one.cut()
            other.cut()
            await until(lambda: refused_by(other))
            other.refuses = False
            granted = 0
            ends = time.monotonic() + 1.2
            while time.monotonic() < ends:
                granted += (await early.check("user")).allowed
                await asyncio.sleep(0.01)
            assert granted == 0
            assert late.statistics().epoch_changes == 1
            assert early.statistics().epoch_changes == (not newcomer)
            assert early.statistics().breaker == "closed"
            await early.aclose()


async def test_two_connections_that_count_at_once_make_nobody_sure_of_the_number() -> None:
    """Until counts of half a second agree, the beats say a number that ends nobody's learning early."""
    beat = re.compile(rb":processes\r\n(?:\$\d+\r\n[^\r]*:layout\r\n)?" + rb"\$\d+\r\n[^\r]*\r\n" * 6 + rb"\$\d+\r\n(\d+)\r\n")
    # A server of its own, for there is nobody else to be counted.
    with RedisServer() as server:
        async with Relay(server.socket) as relay, limiter_of(relay.url, connections=2) as limiter:
            heard: list[int] = []
            ends = time.monotonic() + 3
            while 1 not in heard and time.monotonic() < ends:
                await limiter.check("user")
                await asyncio.sleep(0.01)
                heard = [int(number) for number in beat.findall(relay.heard)]
    # The first beat of each connection, sent before any count or after that of the other one; then, half a second later, another one.
    assert heard.index(1) >= 3
    assert heard[0] == 0
    assert heard[2] == 10**9


async def refused_by(relay: Relay) -> bool:
    """Whether it has broken a connection that came since it was cut."""
    return relay.connections == 2


async def test_units_that_a_newcomer_was_granted_are_added() -> None:
    """It knows of no epoch before, and is served at once; what was used before the loss comes on top."""
    with RedisServer() as server:
        async with limiter_of(server.url) as old:
            assert admitted([await old.check("user") for _ in range(30)]) == 30
            with server.client() as client:
                client.flushall()
                async with limiter_of(server.url) as newcomer:
                    granted = admitted([await newcomer.check("user") for _ in range(5)])
                    await until(lambda: settled(old))
                    await until(lambda: served(newcomer))
                    granted += admitted([await newcomer.check("user") for _ in range(LIMIT)])
                    assert granted == 10


async def test_a_reset_just_before_the_loss_stays_a_reset() -> None:
    with RedisServer() as server:
        async with limiter_of(server.url) as one, limiter_of(server.url) as other:
            assert admitted([await other.check("user") for _ in range(LIMIT)]) == LIMIT
            await one.reset("user")
            with server.client() as client:
                client.flushall()
            for limiter in (other, one):
                await until(lambda limiter=limiter: settled(limiter))  # type: ignore[misc]  # the default binds the loop's value
            assert admitted([await one.check("user") for _ in range(LIMIT + 10)]) == LIMIT


async def away(limiter: RateThrottleCore) -> bool:
    return (await limiter.check("somebody else")).source == "outage"


@pytest.mark.usefixtures("brisk")
@pytest.mark.parametrize("limit", [10, 1000])
@pytest.mark.parametrize("strategy", STRATEGIES)
async def test_a_reset_ends_what_an_outage_has_used(strategy: str, limit: int) -> None:
    """In this process at once, so that the next outage begins anew."""
    rule = RateThrottleRule("r", limit, 3600, strategy=strategy)
    with RedisServer() as server:
        async with limiter_of(server.url, rule, expected_processes=1) as limiter:
            assert await limiter.check("user")
            server.stop()
            await until(lambda: away(limiter))
            assert (await limiter.check("user", cost=limit - 1)).source == "outage"
            assert not await limiter.check("user")
            server.start()
            await until(lambda: served(limiter), 5)
            await limiter.reset("user")
            assert (await limiter.peek("user")).remaining == limit
            server.stop()
            await until(lambda: away(limiter))
            decision = await limiter.check("user", cost=limit)
            assert (decision.allowed, decision.source) == (True, "outage")


@pytest.mark.usefixtures("brisk")
@pytest.mark.parametrize("limit", [10, 1000])
@pytest.mark.parametrize("strategy", STRATEGIES)
async def test_what_was_admitted_before_somebody_elses_reset_is_not_charged_after_it(
    redis_server: RedisServer, strategy: str, limit: int
) -> None:
    rule = RateThrottleRule("r", limit, 3600, strategy=strategy)
    async with (
        Relay(redis_server.socket) as relay,
        limiter_of(relay.url, rule, expected_processes=2) as cut_off,
        limiter_of(redis_server.url, rule) as other,
    ):
        assert await cut_off.check("somebody else")
        relay.refuses = True
        relay.cut()
        await until(lambda: away(cut_off))
        assert (await cut_off.check("user", cost=limit // 4)).source == "outage"
        await asyncio.sleep(0.2)  # how old it is is known but to the time that a call takes
        await other.reset("user")
        relay.refuses = False
        await until(lambda: served(cut_off), 5)
        assert cut_off.statistics().owed == 0
        assert (await other.peek("user")).remaining == limit
        # What is admitted after it counts.
        relay.refuses = True
        relay.cut()
        await until(lambda: away(cut_off))
        assert (await cut_off.check("user", cost=limit // 4)).source == "outage"
        relay.refuses = False
        await until(lambda: served(cut_off), 5)
        assert (await other.peek("user")).remaining == limit - limit // 4


async def test_a_reset_without_redis_is_an_error_under_each_policy() -> None:
    for policy in ("local", "allow", "deny", "raise"):
        async with limiter_of(f"redis://127.0.0.1:{free_port()}", on_outage=policy) as limiter:
            with pytest.raises(StorageError):
                await limiter.reset("user")


async def test_under_allow_all_is_allowed_however_many_keys_there_are_and_whatever_redis_said_before() -> None:
    rule = RateThrottleRule("r", 1, 3600)
    with RedisServer() as server:
        async with limiter_of(server.url, rule, on_outage="allow", max_bounds=50, prefilter_ttl=60.0) as limiter:
            assert await limiter.check("user")
            assert not await limiter.check("user")
            assert (await limiter.check("user")).source == "prefilter"
            server.stop()
            await until(lambda: away(limiter))

            async def told() -> bool:
                return limiter.statistics().breaker != "closed"

            await until(told)
            assert all([await limiter.check("user") for _ in range(10)])
            assert all([await limiter.check(f"user {i}") for i in range(1000)])
            statistics = limiter.statistics()
            assert statistics.evictions > 900
            assert statistics.owed <= statistics.bounds <= 50


@pytest.mark.usefixtures("brisk")
async def test_what_an_outage_admits_is_dropped_when_it_counts_no_more() -> None:
    rule = RateThrottleRule("r", 10, 0.5)
    with RedisServer() as server:
        async with limiter_of(server.url, rule, expected_processes=1) as limiter:
            assert await limiter.check("user")
            server.stop()
            await until(lambda: away(limiter))
            for i in range(5000):
                assert await limiter.check(f"user {i}")
            server.start()
            await until(lambda: served(limiter), 5)

            async def small() -> bool:
                await limiter.check("user")
                return limiter.statistics().bounds < 10 and limiter._storage.bounds.size_bytes < 100_000

            await until(small, 10)


@pytest.mark.usefixtures("brisk")
async def test_what_was_admitted_alone_is_charged_once(redis_server: RedisServer) -> None:
    """The reply to the charge is lost, so it is sent again."""
    async with Relay(redis_server.socket) as relay, limiter_of(relay.url, expected_processes=1, deadline=0.5) as limiter:
        await limiter.check("user")
        relay.tamper = lambda reply: b""  # runs, but is never heard of
        assert (await limiter.check("user")).source == "outage"
        lost = 0

        def lose_one_charge(reply: bytes) -> bytes:
            nonlocal lost
            if b"$6\r\ncharge" in relay.heard and not lost:
                lost += 1
                return b""
            return reply

        relay.heard = b""
        relay.tamper = lose_one_charge
        await until(lambda: served(limiter), 4)
        assert lost == 1
        assert relay.heard.count(b"$6\r\ncharge") == 2
        # One at first, one that was run although nobody heard of it, and one that was admitted here instead.
        assert (await limiter.peek("user")).remaining == LIMIT - 3


@pytest.mark.usefixtures("brisk")
@pytest.mark.parametrize("answer", [b"-OOM x\r\n", b"-READONLY x\r\n", b"-NOSCRIPT x\r\n"])
async def test_what_was_admitted_alone_is_charged_when_redis_refuses_it_at_first(
    redis_server: RedisServer, answer: bytes
) -> None:
    """A charge that was refused is still owed, and Redis is asked again once it has taken it."""
    async with Relay(redis_server.socket) as relay, limiter_of(relay.url, expected_processes=1, deadline=0.5) as limiter:
        await limiter.check("user")
        relay.tamper = lambda reply: b""
        assert (await limiter.check("user")).source == "outage"
        refused = 0

        def refuse_one_charge(reply: bytes) -> bytes:
            nonlocal refused
            if b"$6\r\ncharge" in relay.heard and not refused:
                refused += 1
                return answer
            return reply

        relay.heard = b""
        relay.tamper = refuse_one_charge
        await until(lambda: served(limiter), 4)
        assert refused == 1
        assert (await limiter.peek("user")).remaining == LIMIT - 3
        assert limiter.statistics().owed == 0


@pytest.mark.usefixtures("brisk")
async def test_a_charge_that_no_script_of_ours_takes_keeps_nobody_away(redis_server: RedisServer) -> None:
    async with Relay(redis_server.socket) as relay, limiter_of(relay.url, expected_processes=1, deadline=0.5) as limiter:
        told: list[Event] = []
        limiter.on_event(told.append)
        await limiter.check("user")
        relay.tamper = lambda reply: b""
        assert (await limiter.check("user")).source == "outage"

        def refuse_each_charge(reply: bytes) -> bytes:
            for call in relay.heard.split(b"EVALSHA"):
                asked = re.search(rb"[0-9a-f]{12}-\d+", call)
                if b"$6\r\ncharge" in call and asked:
                    # What else has come with it stays as it is.
                    reply = re.sub(rb"\*\d+\r\n\$\d+\r\n" + asked[0] + rb"\r\n(?::-?\d+\r\n)+", b"-RATETHROTTLE x\r\n", reply)
            return reply

        relay.heard = b""
        relay.tamper = refuse_each_charge
        await until(lambda: served(limiter))
        assert {event.kind for event in told} == {"outage_began", "repair_refused", "outage_ended"}


async def test_an_error_of_the_outage_says_nothing_of_checks_that_were_not_sent() -> None:
    with RedisServer() as server:
        async with limiter_of(server.url, on_outage="raise") as limiter:
            await limiter.check("user")
            server.pause()
            with pytest.raises(StorageError, match=r"within 0\.25 s"):
                await limiter.check("user")
            with pytest.raises(StorageUnavailable, match=r"didn't answer within 0\.25 s") as unsent:
                await limiter.check("user")
            assert "may have been counted" not in str(unsent.value)
            server.resume()


# Refusals


@pytest.mark.parametrize(("spoiled", "mended"), [("-evalsha", "+evalsha"), ("~other:*", "~*"), ("<pa55", ">pa55"), ("off", "on")])
async def test_a_refusal_is_raised_under_each_policy_until_it_is_mended(spoiled: str, mended: str) -> None:
    with RedisServer() as server, server.client() as client:
        client.execute_command("ACL", "SETUSER", "service", "on", ">pa55", "~*", "+@all")
        async with limiter_of(f"redis://service:pa55@127.0.0.1:{server.port}", on_outage="allow") as limiter:
            told: list[Event] = []
            limiter.on_event(told.append)
            assert (await limiter.check("user")).allowed
            client.execute_command("ACL", "SETUSER", "service", *(["resetkeys"] if "~" in spoiled else []), spoiled)
            client.execute_command("CLIENT", "KILL", "USER", "service")
            await asyncio.sleep(0.05)
            ends = time.monotonic() + 0.7  # there are attempts to connect meanwhile, and in between
            while time.monotonic() < ends:
                with pytest.raises(StorageRefused):
                    await limiter.check("user")
                await asyncio.sleep(0.01)
            client.execute_command("ACL", "SETUSER", "service", mended)
            await until(lambda: served(limiter))
            assert (await limiter.check("user")).source == "redis"
            assert [event.kind for event in told] == ["refused"]


@pytest.mark.usefixtures("brisk")
@pytest.mark.parametrize("key", ["user", ("user", 7)])
async def test_what_was_charged_is_known_from_then_on(key: str | tuple[str | int, ...]) -> None:
    """Nobody has asked about the key since, and Redis loses its data again."""
    with RedisServer() as server:
        async with limiter_of(server.url, expected_processes=1) as limiter:
            await limiter.check("another")
            server.stop()
            assert admitted([await limiter.check(key) for _ in range(10)]) == 10
            server.start()
            await until(lambda: settled(limiter))
            with server.client() as client:
                client.flushall()

            async def again() -> bool:
                return limiter.statistics().epoch_changes == 2 and await served(limiter)

            await until(again)
            assert (await limiter.peek(key)).remaining == LIMIT - 10


async def test_what_was_cleared_comes_back_by_nobody() -> None:
    """Nor is it taken for what a process has leased or owes; another prefix and other people's keys stay as they are."""
    rules = (RULE, RateThrottleRule("leased", 10_000, 3600, lease=True))
    with RedisServer() as server, server.client() as client:
        storages = [RedisStorage.from_url(server.url, prefix=prefix) for prefix in ("app", "app", "app:other", "ap")]
        async with contextlib.AsyncExitStack() as stack:
            mine, theirs, other, shorter = [
                await stack.enter_async_context(RateThrottleCore(storage, rules=rules)) for storage in storages
            ]
            for limiter in (mine, theirs, other, shorter):
                for _ in range(LIMIT):
                    assert (await limiter.check(f"user of {id(limiter)}", "r")).allowed
            for _ in range(200):
                await theirs.check("user", "leased")
            for key in ("app:session:1", "app:{1}:somebody", "app:{X}:r:=k", "app:charged:x"):
                client.set(key, "somebody else's")
            # Every process that lives writes its layout again.
            others = set(client.keys()) - set(client.keys("app:{*}:*:=*")) - {b"app:layout"}
            await storages[0].clear()
            assert others <= set(client.keys())
            assert not [key for key in client.keys("app:{*}:*:=*") if not key.startswith(b"app:{X}")]
            assert (await mine.check(f"user of {id(mine)}", "r")).allowed

            async def heard() -> bool:
                return theirs.statistics().epoch_changes == 1

            await until(heard)  # without a call of its own
            for limiter in (mine, theirs):
                for user in (mine, theirs):
                    decision = await limiter.peek(f"user of {id(user)}", "r")
                    assert decision.source == "redis"
                    assert decision.remaining == LIMIT - (user is mine)
            assert (await mine.peek("user", "leased")).remaining == 10_000
            assert (await theirs.peek("user", "leased")).remaining == 10_000
            for limiter in (other, shorter):
                assert (await limiter.peek(f"user of {id(limiter)}", "r")).remaining == 0


async def test_to_clear_takes_as_many_calls_as_it_needs() -> None:
    with RedisServer() as server, server.client() as client:
        storage = RedisStorage.from_url(server.url, deadline=5)
        async with RateThrottleCore(storage, rules=[RULE]) as limiter:
            for first in range(0, 3_000, 1_000):
                await limiter.check_many([f"user {number}" for number in range(first, first + 1_000)])
            assert len(client.keys("*:=user *")) == 3_000
            await storage.clear()
            assert not client.keys("*:=user *")


async def test_a_storage_takes_options_by_either_way() -> None:
    storage = RedisStorage.from_url(f"redis://127.0.0.1:{free_port()}", on_outage="allow")
    async with RateThrottleCore(storage, rules=[RULE]) as limiter:
        assert (await limiter.check("user")).allowed


# Clearing a prefix


async def test_clearing_a_prefix_leaves_others_alone_and_waits_for_nobody_for_ever() -> None:
    with RedisServer() as server, server.client() as client:
        client.set("theirs", "1")
        storage = RedisStorage.from_url(server.url, prefix="a*", deadline=0.2, connect_timeout=0.5)
        async with RateThrottleCore(storage, rules=[RULE]) as limiter:
            await limiter.check("user")
            client.set("ab:theirs", "1")
            await storage.clear()
            assert set(client.keys("[^a]*") + client.keys("ab*")) == {b"theirs", b"ab:theirs"}
            assert not client.keys("*=user")
            server.pause()
            began = time.monotonic()
            with pytest.raises(StorageUnavailable):
                await storage.clear()
            assert time.monotonic() - began < 2
            server.resume()


async def test_clearing_says_what_it_waited_for_and_how_long(redis_server: RedisServer) -> None:
    for asked, words in (
        (b"EVAL", r"no connection to Redis within 0\.5 s"),
        (b"SCAN", r"SCAN, a step of clear\(\), within 0\.2 s"),
    ):
        async with Relay(redis_server.socket) as relay:
            storage = RedisStorage.from_url(relay.url, deadline=0.2, connect_timeout=0.5)
            relay.tamper = lambda reply, relay=relay, asked=asked: b"" if asked in relay.heard else reply  # type: ignore[misc]  # the loop's values
            with pytest.raises(StorageUnavailable, match=words):
                await storage.clear()
            relay.tamper = lambda reply: reply
            await storage.clear()
            await storage.aclose()


async def test_a_closed_storage_is_not_cleared_and_says_what_to_do() -> None:
    with RedisServer() as server, server.client() as client:
        storage = RedisStorage.from_url(server.url, deadline=5)
        limiter = RateThrottleCore(storage, rules=[RULE])
        await limiter.check("user")
        await storage.aclose()
        for refused in (storage.clear(), limiter.check("user")):
            with pytest.raises(StorageUnavailable, match="is closed; make a new one"):
                await refused
        assert client.keys("*=user")
