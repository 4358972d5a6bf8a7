"""Slots on a real Redis: what is held stays held, and what nobody can hold any more is free, whatever happens to either."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, Literal

import pytest
import redis

from ratethrottle import (
    ConcurrencyRule,
    RateLimitExceeded,
    RateThrottleCore,
    RateThrottleRule,
    RedisStorage,
    StateUnreadable,
    StorageError,
    StorageProtocolError,
    StorageRefused,
    StorageUnavailable,
)
from ratethrottle.events import SlotLost
from ratethrottle.storage.redis import storage as storage_module
from ratethrottle.storage.redis.holders import Here
from ratethrottle.storage.redis.sharing import Sharing
from tests.kit.recovery import until
from tests.kit.relay import Relay
from tests.kit.servers import RedisServer

pytestmark = [pytest.mark.redis, pytest.mark.usefixtures("apart")]
TTL_S = 1.2
RULE = ConcurrencyRule("db", 2, TTL_S)
WITHIN_S = 5.0
Policy = Literal["local", "allow", "deny", "raise"]


def limiter_of(url: str, *rules: ConcurrencyRule | RateThrottleRule, **options: Any) -> RateThrottleCore:
    return RateThrottleCore(RedisStorage.from_url(url, **options), rules=rules or [RULE])


@asynccontextmanager
async def processes(url: str, count: int = 2, **options: Any) -> AsyncIterator[list[RateThrottleCore]]:
    """Limiters of which each is a process of its own to Redis."""
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(limiter_of(url, **options)) for _ in range(count)]


async def free(limiter: RateThrottleCore, key: str = "k", cost: int = 1, rule: str | None = None) -> bool:
    """Whether a slot can be had."""
    try:
        async with limiter.slot(key, rule, cost=cost):
            return True
    except RateLimitExceeded:
        return False


def slots_of(limiter: RateThrottleCore) -> Any:
    """What an event loop knows of slots."""
    storage = limiter._storage
    assert isinstance(storage, RedisStorage)
    return storage._slots_here()


async def becomes_free(limiter: RateThrottleCore, within_s: float = WITHIN_S, cost: int = 1) -> float:
    return await until(lambda: free(limiter, cost=cost), within_s)


async def test_processes_share_slots_which_are_renewed_for_as_long_as_they_are_held(redis_url: str) -> None:
    async with processes(redis_url) as (one, other), one.slot("k") as mine:
        assert mine.decision.source == "redis"
        assert mine.decision.remaining == 1
        async with other.slot("k") as theirs:
            assert theirs.decision.remaining == 0
            assert not await free(one)
            assert not await free(other)
            await asyncio.sleep(2 * TTL_S)
            assert not await free(one)
        assert await free(one)
        assert not mine.lost.is_set()


async def test_a_slot_goes_to_those_who_wait_in_the_order_in_which_their_processes_came(redis_url: str) -> None:
    served: list[int] = []

    async def wait(limiter: RateThrottleCore, number: int) -> None:
        async with limiter.slot("k", cost=2, timeout=10):
            served.append(number)
            await asyncio.sleep(0.01)

    async with processes(redis_url, 4) as limiters, limiters[0].slot("k", cost=2) as slot:
        tasks = []
        for number, limiter in enumerate(limiters):
            tasks.append(asyncio.create_task(wait(limiter, number)))
            # A process keeps its place however long it waits, also the one that holds all that the others wait for.
            await asyncio.sleep(0.05 if number else 1.5)
        await slot.release()
        await asyncio.gather(*tasks)
    assert served == [0, 1, 2, 3]


async def test_one_that_asks_once_leaves_no_place_behind(redis_url: str) -> None:
    async with processes(redis_url, 3) as (one, other, third):
        async with one.slot("k", cost=2):
            assert not await free(other)
        assert await free(third)
        async with one.slot("k", cost=2):
            with pytest.raises(RateLimitExceeded):
                await other.slot("k", timeout=0.1).__aenter__()
        assert await becomes_free(third) < 0.7  # a place that nobody gives up stays for a second


async def test_a_slot_may_be_taken_together_with_limits_that_count(redis_url: str) -> None:
    rules = RULE, RateThrottleRule("api", 3, 60)
    async with limiter_of(redis_url, *rules) as one, limiter_of(redis_url, *rules) as other, one.slot("k", ("db", "api")) as slot:
        assert [(part.rule, part.remaining, part.source) for part in slot.decision.parts] == [
            ("db", 1, "redis"),
            ("api", 2, "redis"),
        ]
        async with other.slot("k", {"db": 1, "api": 2}) as second:
            assert [part.remaining for part in second.decision.parts] == [0, 0]
        for limiter in (one, other):
            with pytest.raises(RateLimitExceeded) as raised:
                await limiter.slot("k", ("db", "api")).__aenter__()
            assert raised.value.decision.rule == "api"
        assert await free(other, rule="db")  # it was given back
        assert not await free(other, cost=2, rule="db")


async def test_a_process_that_closes_gives_back_what_it_holds_at_once(redis_url: str) -> None:
    async with processes(redis_url, 1) as (other,):
        leaving = limiter_of(redis_url)
        slot = leaving.slot("k", cost=2)
        await slot.__aenter__()
        assert not await free(other)
        await leaving.aclose()
        assert await free(other, cost=2)


async def test_what_a_storage_gives_back_as_it_closes_is_lost_to_all_its_limiters(redis_url: str) -> None:
    storage = RedisStorage.from_url(redis_url)
    async with processes(redis_url, 1) as (other,):
        closing, staying = [RateThrottleCore(storage, rules=[RULE]) for _ in range(2)]
        async with staying.slot("k", cost=2) as slot:
            await closing.aclose()
            assert slot.lost.is_set()
            assert await free(other, cost=2)


async def test_a_storage_that_closes_gives_back_what_its_other_event_loops_hold(redis_url: str) -> None:
    rule = ConcurrencyRule("db", 2, 30)
    async with limiter_of(redis_url, rule) as other:
        closing = limiter_of(redis_url, rule)
        held, lost = threading.Event(), threading.Event()

        async def hold() -> None:
            async with closing.slot("k") as slot:
                held.set()
                await asyncio.wait_for(slot.lost.wait(), WITHIN_S)
                lost.set()

        thread = threading.Thread(target=lambda: asyncio.run(hold()))
        thread.start()
        await asyncio.to_thread(held.wait)
        async with closing.slot("k") as slot:
            assert not await free(other)
            await closing.aclose()
            assert slot.lost.is_set()
        assert await free(other, cost=2)
        await asyncio.to_thread(thread.join)
        assert lost.is_set()


async def test_what_a_dead_process_held_is_free_after_its_ttl(redis_url: str) -> None:
    async with processes(redis_url, 1) as (other,):
        dying = limiter_of(redis_url)
        await dying.slot("k", cost=2).__aenter__()
        slots_of(dying)._closed = True  # it does nothing any more
        began_s = time.monotonic()
        assert not await free(other)
        async with other.slot("k", timeout=TTL_S + 1):
            assert TTL_S * 0.9 < time.monotonic() - began_s < TTL_S + 1
        await dying._storage.aclose()


@pytest.mark.parametrize("lose", ["flush", "restart"])
async def test_slots_stay_held_when_redis_loses_its_data(lose: str) -> None:
    rule = ConcurrencyRule("db", 300, 30)
    with RedisServer() as server:
        async with AsyncExitStack() as stack:
            one, other = [
                await stack.enter_async_context(limiter_of(server.url, rule, deadline=1, on_outage="deny")) for _ in range(2)
            ]
            slots = [await stack.enter_async_context(one.slot(f"k{n}", cost=300)) for n in range(300)]
            await until(lambda: asyncio.sleep(0, one.statistics().processes == 2))
            if lose == "flush":
                with server.client() as client:
                    client.flushall()
            else:
                server.stop()
                server.start()
            ends_s = time.monotonic() + 2
            while time.monotonic() < ends_s:
                for n in range(0, 300, 60):
                    assert not await free(other, f"k{n}")
                await asyncio.sleep(0.02)
            assert one.statistics().epoch_changes == 1
            assert await free(other, "another")
            assert not any(slot.lost.is_set() for slot in slots)
            await slots[0].release()
            assert await free(other, "k0")


async def test_slots_that_could_not_be_renewed_are_lost_before_others_have_them() -> None:
    lost: list[Any] = []
    with RedisServer() as server:
        async with processes(server.url) as (one, other):
            one.on_event(lost.append)
            async with one.slot("k", cost=2) as slot:
                granted_s = time.monotonic()
                server.pause()
                await asyncio.wait_for(slot.lost.wait(), WITHIN_S)
                assert TTL_S * 0.6 < time.monotonic() - granted_s < TTL_S + 1
                server.resume()
                assert await becomes_free(other, cost=2) < WITHIN_S
            assert await becomes_free(one, cost=2) < WITHIN_S
    assert [event.slots for event in lost if isinstance(event, SlotLost)] == [1]


async def test_a_reset_takes_slots_from_all_that_hold_them(redis_url: str) -> None:
    async with processes(redis_url, 3) as (one, other, third), one.slot("k") as mine, other.slot("k") as theirs:
        await third.reset("k", "db")
        assert await free(third, cost=2)
        await asyncio.wait_for(mine.lost.wait(), TTL_S)
        await asyncio.wait_for(theirs.lost.wait(), TTL_S)
        async with one.slot("k", cost=2) as again:
            await one.reset("k", "db")
            assert again.lost.is_set()
        assert await free(third, cost=2)


async def test_a_reset_is_heard_at_once_by_the_other_event_loops_of_its_process(redis_url: str) -> None:
    rule = ConcurrencyRule("db", 2, 30)
    held, lost = threading.Event(), threading.Event()
    async with limiter_of(redis_url, rule) as limiter:

        async def hold() -> None:
            async with limiter.slot("k") as slot, limiter.slot("other") as kept:
                held.set()
                await asyncio.wait_for(slot.lost.wait(), WITHIN_S)
                if not kept.lost.is_set():
                    lost.set()

        thread = threading.Thread(target=lambda: asyncio.run(hold()))
        thread.start()
        await asyncio.to_thread(held.wait)
        await limiter.reset("k", "db")
        await asyncio.to_thread(thread.join)
        assert lost.is_set()
        assert await free(limiter, cost=2)


async def test_clear_takes_all_slots(redis_url: str) -> None:
    async with processes(redis_url, 2) as (one, other), one.slot("k") as mine, other.slot("k") as theirs:
        storage = one._storage
        assert isinstance(storage, RedisStorage)
        await storage.clear()
        await asyncio.wait_for(mine.lost.wait(), TTL_S)
        await asyncio.wait_for(theirs.lost.wait(), TTL_S)
        assert await becomes_free(other, cost=2) < WITHIN_S


async def away(server: RedisServer, limiter: RateThrottleCore) -> None:
    """Stop the server, and wait until a storage knows."""
    server.stop()
    await until(lambda: asyncio.sleep(0, limiter.statistics().breaker != "closed"))


async def holds(stack: AsyncExitStack, limiter: RateThrottleCore) -> int:
    """Take as many slots as can be had, up to ten."""
    for held in range(10):
        try:
            await stack.enter_async_context(limiter.slot("k", "wide"))
        except RateLimitExceeded:
            return held
    return 10


@pytest.mark.parametrize(("policy", "most"), [("local", 2), ("allow", 10), ("deny", 0)])
async def test_while_redis_is_away_the_policy_decides_and_then_redis_hears_of_it(policy: Policy, most: int) -> None:
    wide = ConcurrencyRule("wide", 5, 30)
    with RedisServer() as server:
        async with AsyncExitStack() as stack:
            options: dict[str, Any] = {"on_outage": policy, "expected_processes": 2}
            one, other = [await stack.enter_async_context(limiter_of(server.url, wide, **options)) for _ in range(2)]
            assert await free(one, rule="wide")
            assert await free(other, rule="wide")
            await until(lambda: asyncio.sleep(0, {each.statistics().processes for each in (one, other)} == {2}))
            await away(server, one)
            held = await holds(stack, one)
            assert held == most or (policy == "local" and held == 3)  # of 5, one has one more
            server.start()
            await until(lambda: asyncio.sleep(0, one.statistics().breaker == other.statistics().breaker == "closed"), 5)
            async with AsyncExitStack() as others:
                await until(lambda: asyncio.sleep(0, not one._storage.repair.learning and not other._storage.repair.learning))
                await asyncio.sleep(0.3)
                assert await holds(others, other) == max(0, 5 - held)


async def test_redis_hears_of_what_was_granted_without_it_however_much_it_is() -> None:
    rule = ConcurrencyRule("wide", 10**9, 30)
    with RedisServer() as server:
        async with (
            limiter_of(server.url, rule, on_outage="allow") as one,
            limiter_of(server.url, rule, on_outage="deny") as other,
        ):
            assert await free(one)
            await away(server, one)
            async with AsyncExitStack() as stack:
                for _ in range(5):
                    await stack.enter_async_context(one.slot("k", cost=10**9))
                server.start()
                with server.client() as client:
                    await until(lambda: asyncio.sleep(0, bool(client.keys("*wide@slots:=k"))), WITHIN_S)
                assert await until(lambda: free(other, "another"), WITHIN_S) < WITHIN_S
                assert not await free(other)
            assert await becomes_free(other, cost=10**9) < WITHIN_S


async def test_with_raise_a_slot_raises_while_redis_is_away_and_can_be_given_back() -> None:
    with RedisServer() as server:
        async with processes(server.url, 1, on_outage="raise") as (one,):
            async with one.slot("k", cost=2):
                await away(server, one)
                with pytest.raises(StorageUnavailable):
                    await free(one)
            server.start()
            assert await until(lambda: served_slot(one), WITHIN_S) < WITHIN_S


async def served_slot(limiter: RateThrottleCore) -> bool:
    try:
        return await free(limiter, cost=2)
    except StorageUnavailable:
        return False


async def test_what_was_granted_in_a_reply_that_was_lost_goes_back() -> None:
    with RedisServer() as server:
        async with (
            Relay(server.socket) as relay,
            processes(server.url, 1) as (other,),
            limiter_of(relay.url, on_outage="deny") as one,
        ):
            assert await free(one)
            relay.tamper = lambda reply: b""
            assert not await free(one, cost=2)
            relay.tamper = lambda reply: reply
            assert await becomes_free(other, cost=2) < WITHIN_S
            assert await until(lambda: free(one, cost=2), WITHIN_S) < WITHIN_S


async def test_the_script_is_loaded_when_it_is_needed_and_after_it_was_forgotten(
    redis_url: str, redis_client: redis.Redis
) -> None:
    async with processes(redis_url, 1) as (one,):
        async with one.slot("k"):
            redis_client.script_flush()
            assert await free(one)
        for number in range(200):
            redis_client.eval(f"return {number}", 0)
        assert await free(one, cost=2)


async def test_a_lost_connection_loses_no_slot(redis_url: str, redis_client: redis.Redis) -> None:
    async with processes(redis_url) as (one, other), one.slot("k", cost=2) as slot:
        for _ in range(5):
            redis_client.client_kill_filter(_type="normal", skipme=True)
            await asyncio.sleep(TTL_S / 3)
            assert not await free(other)
        assert not slot.lost.is_set()
        await slot.release()
        assert await becomes_free(other, cost=2) < 1


async def test_a_state_that_cannot_be_read_raises_until_it_is_reset(redis_url: str, redis_client: redis.Redis) -> None:
    async with processes(redis_url, 1) as (one,):
        assert await free(one)
        (key,) = redis_client.keys("*db@slots:=k")
        redis_client.set(key, "something else")
        with pytest.raises(StateUnreadable, match="'db'"):
            await free(one)
        assert await free(one, "other")
        await one.reset("k", "db")
        assert await free(one, cost=2)


@pytest.mark.parametrize("policy", ["local", "allow"])
async def test_what_refuses_slots_alone_is_raised_at_once_and_leaves_rates_alone(policy: Policy) -> None:
    rules = RULE, RateThrottleRule("api", 1_000, 60)
    with RedisServer() as server, server.client() as client:
        client.execute_command("ACL", "SETUSER", "u", "on", ">pw", "~*", "&*", "+@all", "-srem")
        url = f"redis://u:pw@127.0.0.1:{server.port}"
        async with limiter_of(url, *rules, on_outage=policy, expected_processes=1, deadline=2) as limiter:
            assert (await limiter.check("k", "api")).source == "redis"
            for _ in range(3):
                began_s = time.monotonic()
                with pytest.raises(StorageRefused, match="may not run our scripts"):
                    await free(limiter)
                assert time.monotonic() - began_s < 1
                assert (await limiter.check("k", "api")).source == "redis"
            client.execute_command("ACL", "SETUSER", "u", "-del")
            with pytest.raises(StorageRefused, match="may not run our scripts"):
                await limiter.reset("k", "db")
            client.execute_command("ACL", "SETUSER", "u", "+@all")
            assert await free(limiter, cost=2)
            assert limiter.statistics().reconnections == 0


async def test_what_a_script_cannot_do_is_raised_and_a_refusal_once_it_has_come_three_times() -> None:
    with RedisServer() as server, server.client() as client:
        async with limiter_of(server.url, on_outage="allow", expected_processes=1, deadline=2) as limiter:
            async with limiter.slot("held") as slot:
                assert slot.decision.source == "redis"
                client.delete("ratethrottle:slots")
                client.set("ratethrottle:slots", "something else")
                seen: list[type[Exception]] = []
                for _ in range(4):
                    with pytest.raises(StorageError, match="written by somebody else") as raised:
                        await free(limiter)
                    seen.append(raised.type)
                assert seen[0] is StorageProtocolError
                assert seen[-1] is StorageRefused
                before = limiter.statistics().calls
                await asyncio.sleep(TTL_S)
                assert limiter.statistics().calls - before < 8  # it asks no more than once a second
                client.delete("ratethrottle:slots")
            assert await until(lambda: served_slot(limiter), WITHIN_S) < WITHIN_S


async def test_a_rate_and_slots_of_one_name_do_not_meet(redis_url: str) -> None:
    async with limiter_of(redis_url, RateThrottleRule("db", 1, 60)) as rates, processes(redis_url, 1) as (slots,):
        assert await rates.check("k")
        assert await free(slots, cost=2)
        assert not await rates.check("k")


async def test_event_loops_of_a_process_share_the_limit(redis_url: str) -> None:
    async with limiter_of(redis_url) as limiter, limiter.slot("k"):
        found: list[bool] = []

        async def elsewhere() -> None:
            async with limiter.slot("k"):
                found.append(await free(limiter))

        thread = threading.Thread(target=lambda: asyncio.run(elsewhere()))
        thread.start()
        await asyncio.to_thread(thread.join)
        assert found == [False]


def test_what_a_loop_held_that_is_gone_is_no_part_of_the_share() -> None:
    with RedisServer() as server:
        limiter = limiter_of(server.url, expected_processes=1)

        async def hold() -> None:
            await limiter.slot("k", cost=2).__aenter__()

        async def hold_alone() -> None:
            await until(lambda: free(limiter, cost=2), TTL_S + 2)
            server.stop()
            await until(lambda: asyncio.sleep(0, limiter.statistics().breaker != "closed"))
            assert await free(limiter, cost=2)
            await limiter.aclose()

        asyncio.run(hold())
        asyncio.run(hold_alone())


async def test_storages_of_a_process_grant_one_share_while_redis_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_module, "SHARING", Sharing())
    wide = ConcurrencyRule("wide", 4, 30)
    with RedisServer() as server:
        async with AsyncExitStack() as stack:
            limiters = [await stack.enter_async_context(limiter_of(server.url, wide, expected_processes=1)) for _ in range(2)]
            for limiter in limiters:
                assert await until(lambda limiter=limiter: free(limiter), WITHIN_S) < WITHIN_S
            server.stop()
            for limiter in limiters:
                await until(lambda limiter=limiter: asyncio.sleep(0, limiter.statistics().breaker != "closed"))
            assert [await holds(stack, limiter) for limiter in limiters] == [4, 0]


def test_event_loops_that_ask_at_once_keep_to_the_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them stands still between its look at what is held and its own slot."""
    here, meet = Here(), threading.Barrier(2)
    counted: list[int] = []

    class Slow(Counter[bytes]):
        def __getitem__(self, key: bytes) -> int:
            units = super().__getitem__(key)
            with contextlib.suppress(threading.BrokenBarrierError):
                meet.wait(0.2)
            return units

    monkeypatch.setattr(here, "_units", Slow())
    threads = [threading.Thread(target=lambda: counted.append(here.take(b"k", 3, 1, 2)[0])) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(counted) == [1, 2]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system can't fork")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_process_holds_nothing_and_waits_for_no_thread_of_its_parent() -> None:
    shared = Sharing()
    limiter = limiter_of("redis://localhost:1")
    repair = limiter._storage.repair  # type: ignore[union-attr]  # it is a RedisStorage
    here = shared.held(repair)
    here.add(b"k", 2)
    with here._lock:
        child = os.fork()
        if child == 0:
            signal.alarm(10)  # ends it, with no status of 0
            os._exit(0 if here.take(b"k", 3, 1, 5) == (3, 0) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert here.take(b"k", 3, 1, 5) == (1, 0)


async def test_two_limiters_of_a_storage_hold_a_key_each_for_itself(redis_url: str) -> None:
    storage = RedisStorage.from_url(redis_url)
    async with RateThrottleCore(storage, rules=[RULE]) as one:
        other = RateThrottleCore(storage, rules=[RULE])
        async with one.slot("k"):
            async with other.slot("k"):
                assert not await free(one)
            assert await free(one)
            assert await free(other)
        assert await free(one, cost=2)
        assert await free(other, cost=2)


@pytest.mark.slow
async def test_ten_thousand_slots_are_renewed_by_one_call(redis_url: str, redis_client: redis.Redis) -> None:
    rule = ConcurrencyRule("many", 1, 3)
    count, errors = 10_000, []

    async def hold(limiter: RateThrottleCore, number: int) -> None:
        async with limiter.slot(f"k{number}") as slot:
            ready.append(number)
            await asyncio.wait([lost := asyncio.create_task(slot.lost.wait()), over], return_when="FIRST_COMPLETED")
            errors.extend([number] if slot.lost.is_set() else [])
            lost.cancel()

    over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    ready: list[int] = []
    async with limiter_of(redis_url, rule, deadline=5) as limiter:
        tasks = [asyncio.create_task(hold(limiter, number)) for number in range(count)]
        await until(lambda: asyncio.sleep(0, len(ready) == count), 30)
        before = renewals(redis_client)
        await asyncio.sleep(6)
        assert renewals(redis_client) - before in (5, 6, 7)  # one a second
        over.set_result(None)
        await asyncio.gather(*tasks)
        assert not errors
        await until(lambda: asyncio.sleep(0, len(slots_of(limiter)) == 0), 10)
    assert all(redis_client.pttl(key) > 0 for key in redis_client.keys("*many@slots:*"))


def renewals(client: redis.Redis) -> int:
    """How often the script has renewed holders. No other one has this command, but for a process that is new."""
    stats = client.info("commandstats")
    return int(stats.get("cmdstat_zremrangebyscore", {"calls": 0})["calls"])


async def test_what_nobody_holds_is_not_remembered(redis_url: str) -> None:
    async with limiter_of(redis_url) as limiter:
        for number in range(500):
            assert await free(limiter, f"k{number}")
        await until(lambda: asyncio.sleep(0, len(slots_of(limiter)) == 0))


@pytest.mark.parametrize("when", ["asks", "waits", "holds"])
async def test_a_caller_that_is_cancelled_leaves_nothing(redis_url: str, when: str) -> None:
    async with processes(redis_url) as (one, other):
        entered: list[Callable[[], object]] = []

        async def hold() -> None:
            async with one.slot("k", cost=2, timeout=5) as slot:
                entered.append(slot.lost.is_set)
                await asyncio.sleep(10)

        assert await free(one)
        async with AsyncExitStack() as stack:
            if when == "waits":
                await stack.enter_async_context(other.slot("k"))
            task = asyncio.create_task(hold())
            await asyncio.sleep(0 if when == "asks" else 0.1)
            assert bool(entered) == (when == "holds")
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert await becomes_free(other, 1.5, cost=2) < 1.5


async def test_a_storm_of_cancellations_loses_no_slot(redis_url: str) -> None:
    seed = random.randrange(2**32)
    rng, inside, served = random.Random(seed), 0, 0

    async def client(limiter: RateThrottleCore, ends_s: float) -> None:
        nonlocal inside, served
        while time.monotonic() < ends_s:
            cost, timeout = rng.choice((1, 1, 2)), rng.choice((None, 0, 0.05, 1))
            with contextlib.suppress(RateLimitExceeded, TimeoutError):
                async with asyncio.timeout(rng.uniform(0.0005, 0.3)), limiter.slot("k", cost=cost, timeout=timeout):
                    inside, served = inside + cost, served + 1
                    assert inside <= RULE.limit, seed
                    try:
                        await asyncio.sleep(rng.uniform(0, 0.005))
                    finally:
                        inside -= cost
            await asyncio.sleep(rng.uniform(0, 0.01))

    async with processes(redis_url, 3, deadline=5) as limiters:
        ends_s = time.monotonic() + 3
        await asyncio.gather(*(client(limiter, ends_s) for limiter in limiters for _ in range(15)))
        print("served", served)
        assert served > 10, seed
        await becomes_free(limiters[0], cost=2)
        for limiter in limiters:
            await until(lambda limiter=limiter: asyncio.sleep(0, len(limiter._lines) == len(slots_of(limiter)) == 0), WITHIN_S)
