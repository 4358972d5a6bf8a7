"""Checks of several limits on a real Redis, on asyncio's loop and on uvloop: what is granted, and what holds when something fails."""

from __future__ import annotations

import asyncio
import os
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import redis

from ratethrottle import Decision, FirstOf, RateThrottleCore, RateThrottleRule, RedisStorage, Request
from ratethrottle.errors import LimiterClosed, StateUnreadable, StorageProtocolError, StorageUnavailable
from tests.kit.counted import counted
from tests.kit.recovery import until
from tests.kit.relay import Relay
from tests.kit.servers import RedisServer, free_port
from tests.kit.strategies import STRATEGIES

pytestmark = [pytest.mark.redis, pytest.mark.uvloop]

SMALL, LARGE = 25, 40
KEYS, CHECKS = 20, 800


def rule(name: str, limit: int, strategy: str = "fixed_window", **options: Any) -> RateThrottleRule:
    return RateThrottleRule(name, limit, 3600, strategy=strategy, **options)


def limiter_of(url: str, *rules: RateThrottleRule, **options: Any) -> RateThrottleCore:
    return RateThrottleCore(RedisStorage.from_url(url, **{"deadline": 10, **options}), rules=rules)


def allowed(decisions: Sequence[Decision]) -> int:
    return sum(decision.allowed for decision in decisions)


async def left(limiter: RateThrottleCore, key: str, *names: str) -> list[int]:
    """What each rule has left."""
    return [(await limiter.peek(key, name)).remaining for name in names]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("connections", [1, 3])
async def test_a_crowd_gets_the_strictest_limit_and_consumes_nothing_else(
    redis_server: RedisServer, strategy: str, connections: int
) -> None:
    rules = [rule("large", LARGE, strategy), rule("small", SMALL, strategy)]
    async with limiter_of(redis_server.url, *rules, connections=connections) as limiter:
        decisions = await asyncio.gather(*(limiter.check(f"user:{i % KEYS}", ("large", "small")) for i in range(CHECKS)))
        admitted = Counter(decision.key for decision in decisions if decision.allowed)
        assert admitted == {f"user:{i}": SMALL for i in range(KEYS)}
        for i in range(KEYS):
            assert await left(limiter, f"user:{i}", "large", "small") == [LARGE - SMALL, 0]
        assert {decision.rule for decision in decisions} == {"small"}
        assert all(decision.atomic and [part.rule for part in decision.parts] == ["large", "small"] for decision in decisions)
        denied = [decision for decision in decisions if not decision.allowed]
        assert {tuple(part.allowed for part in decision.parts) for decision in denied} == {(True, False)}
        told = counted(limiter)
        assert (
            sum(found.allowed for found in told["large"].values())
            == sum(found.allowed for found in told["small"].values())
            == KEYS * SMALL
        )
        assert sum(found.denied for found in told["large"].values()) == 0
        assert sum(found.denied for found in told["small"].values()) == len(denied)


async def test_single_checks_and_joint_ones_share_limits(redis_server: RedisServer) -> None:
    async with limiter_of(redis_server.url, rule("a", 30), rule("b", 50)) as limiter:
        rng, names = random.Random(7), ["a", "b", ("a", "b")]
        asked = [rng.choice(names) for _ in range(300)]
        decisions = await asyncio.gather(*(limiter.check("user", name) for name in asked))
        for single in ("a", "b"):
            paid = [decision for decision, name in zip(decisions, asked, strict=True) if single in name and decision.allowed]
            assert len(paid) == {"a": 30, "b": 50}[single] - (await left(limiter, "user", single))[0]
        assert await left(limiter, "user", "a", "b") == [0, 0]


async def test_the_first_that_allows_pays(redis_server: RedisServer) -> None:
    async with limiter_of(redis_server.url, rule("included", 10), rule("credits", 20), rule("burst", 1_000)) as limiter:
        asked = ("burst", FirstOf("included", "credits"))
        decisions = await asyncio.gather(*(limiter.check("user", asked) for _ in range(50)))
        paid = Counter(decision.parts[1].rule for decision in decisions if decision.allowed)
        assert paid == {"included": 10, "credits": 20}
        assert await left(limiter, "user", "included", "credits", "burst") == [0, 0, 970]
        alone = await limiter.check("other", FirstOf("included", "credits"))
        assert (alone.rule, alone.parts, alone.remaining) == ("included", (), 9)


async def test_several_keys_are_one_check_on_whatever_connections(redis_server: RedisServer) -> None:
    async with limiter_of(redis_server.url, rule("user", 10), rule("org", 25), connections=4) as limiter:
        users = [f"user:{i}" for i in range(4)]
        asked = [[Request(user, "user"), Request(("org", 3), "org", 2)] for user in users for _ in range(20)]
        decisions = await asyncio.gather(*(limiter.check_all(requests) for requests in asked))
        assert allowed(decisions) == 12
        remaining = [(await limiter.peek(user, "user")).remaining for user in users]
        assert sum(remaining) == 40 - 12
        assert (await limiter.peek(("org", 3), "org")).remaining == 1


async def test_check_many_takes_joint_ones_among_others(redis_server: RedisServer) -> None:
    async with limiter_of(redis_server.url, rule("a", 3), rule("b", 5)) as limiter:
        both = Request("user", ("a", "b"))
        decisions = await limiter.check_many([both, Request("user", "a"), both, both, Request("user", "b")])
        assert [decision.allowed for decision in decisions] == [True, True, True, False, True]
        assert [len(decision.parts) for decision in decisions] == [2, 0, 2, 2, 0]
        assert await left(limiter, "user", "a", "b") == [0, 2]


async def test_peeks_and_mappings_of_costs(redis_server: RedisServer) -> None:
    async with limiter_of(redis_server.url, rule("requests", 3), rule("tokens", 5_000)) as limiter:
        costs = {"requests": 1, "tokens": 2_000}
        looked = await limiter.peek("user", costs)
        assert (looked.allowed, [part.remaining for part in looked.parts]) == (True, [3, 5_000])
        decisions = [await limiter.check("user", costs) for _ in range(3)]
        assert [decision.allowed for decision in decisions] == [True, True, False]
        assert decisions[2].rule == "tokens"
        assert [(part.allowed, part.remaining) for part in decisions[2].parts] == [(True, 1), (False, 1_000)]
        assert await left(limiter, "user", "requests", "tokens") == [1, 1_000]


async def test_flagged_limits_that_are_known_to_be_used_up_say_so(redis_server: RedisServer) -> None:
    shadows = (rule("a", 1, enforce="flag"), rule("b", 1, enforce="flag"))
    async with limiter_of(redis_server.url, *shadows) as limiter:
        decisions = [await limiter.check("user", ("a", "b")) for _ in range(3)]
    assert [(decision.allowed, decision.over, decision.source) for decision in decisions] == [
        (True, False, "redis"),
        (True, True, "prefilter"),
        (True, True, "prefilter"),
    ]
    assert not decisions[2].retry_after_exact


async def test_a_denial_that_is_known_is_not_asked_again(redis_server: RedisServer) -> None:
    async with limiter_of(redis_server.url, rule("a", 100), rule("b", 2)) as limiter:
        assert [(await limiter.check("user", ("a", "b"))).allowed for _ in range(3)] == [True, True, False]
        before = limiter.statistics()
        known = [await limiter.check("user", ("a", "b")) for _ in range(50)]
        known += await limiter.check_many([Request("user", ("a", "b"))] * 10)
        assert {(decision.source, decision.allowed, decision.rule) for decision in known} == {("prefilter", False, "b")}
        assert (limiter.statistics().calls, limiter.statistics().items) == (before.calls, before.items)
        assert await left(limiter, "user", "a") == [98]
        # A part is an entry.
        before = limiter.statistics()
        await limiter.check("other", ("a", "b"))
        assert limiter.statistics().items == before.items + 2


@pytest.mark.parametrize("size", [2, 16])
async def test_cancelled_checks_change_nobody_else(redis_server: RedisServer, size: int) -> None:
    rules = [rule(f"r{i}", LARGE if i else SMALL) for i in range(size)]
    names = tuple(one.name for one in rules)
    rng = random.Random(5)
    async with limiter_of(redis_server.url, *rules) as limiter:
        tasks = [asyncio.create_task(limiter.check(f"user:{i % KEYS}", names)) for i in range(CHECKS)]
        doomed = rng.sample(tasks, CHECKS // 2)
        for wave in range(5):
            await asyncio.sleep(0 if wave < 3 else 0.001)
            for task in doomed[wave::5]:
                task.cancel()
        await asyncio.wait(tasks)
        for i in range(KEYS):
            mine = [task for j, task in enumerate(tasks) if j % KEYS == i]
            heard = [task.result() for task in mine if not task.cancelled()]
            granted = [decision.parts[0].remaining for decision in heard if decision.allowed]
            # Those that are left hear of ever less, as in a queue; no place is given twice.
            assert granted == sorted(set(granted), reverse=True)
            remaining = await left(limiter, f"user:{i}", *names)
            # All parts have paid for the same checks, those included that were cancelled too late.
            assert len({one.limit - rest for one, rest in zip(rules, remaining, strict=True)}) == 1
            assert allowed(heard) <= SMALL - remaining[0] <= allowed(heard) + sum(task.cancelled() for task in mine)


async def test_a_server_that_lost_its_scripts_is_asked_again(redis_server: RedisServer, redis_client: redis.Redis) -> None:
    async with limiter_of(redis_server.url, rule("a", 1_000), rule("b", 1_000)) as limiter:
        used = 0
        for _ in range(5):
            redis_client.script_flush()
            decisions = await asyncio.gather(*(limiter.check("user", name) for name in [("a", "b"), "a", ("b", "a")] * 10))
            assert allowed(decisions) == 30
            used += 30
        assert await left(limiter, "user", "a", "b") == [1_000 - used, 1_000 - used * 2 // 3]


async def test_a_state_that_cannot_be_read_is_an_error_and_nothing_is_consumed(
    redis_server: RedisServer, redis_client: redis.Redis
) -> None:
    async with limiter_of(redis_server.url, rule("fine", 10), rule("broken", 10)) as limiter:
        await limiter.check("user", ("fine", "broken"))
        [state] = list(redis_client.keys("*:broken:*"))
        redis_client.set(state, "no state")
        with pytest.raises(StateUnreadable, match="broken"):
            await limiter.check("user", ("fine", "broken"))
        several = await asyncio.gather(
            *(limiter.check("user", names) for names in ("fine", ("fine", "broken"))), return_exceptions=True
        )
        assert [type(one) for one in several] == [type(await limiter.peek("user", "fine")), StateUnreadable]
        assert await left(limiter, "user", "fine") == [8]


@pytest.mark.parametrize("policy", ["raise", "local"])
async def test_what_would_hold_redis_for_too_long_is_asked_anew_as_a_whole(redis_server: RedisServer, policy: str) -> None:
    """Also of joint checks that alone take longer than a call may, beside single ones that do."""
    old = [RateThrottleRule(f"r{i}", 64, 3_600, on_outage=policy) for i in range(16)]
    new = [RateThrottleRule(f"r{i}", 64, 3_000, on_outage=policy) for i in range(16)]
    names: Any = tuple(one.name for one in old)
    async with limiter_of(redis_server.url, *old) as limiter:
        keys = [f"k{i}" for i in range(8)]
        for _ in range(20):
            assert all(await asyncio.gather(*(limiter.check(key, names) for key in keys)))
        for one in new:
            limiter.add_rule(one, replace=True)
        before = limiter.statistics().calls
        asked = [limiter.check(key, name) for key in keys for name in (names, "r3", names, "r5")]
        decisions = await asyncio.gather(*asked)
        assert limiter.statistics().calls - before > 4
        assert {decision.source for decision in decisions} == {"redis"}
        assert all(decisions)
        for key in keys:
            assert await left(limiter, key, "r0", "r3", "r5") == [42, 41, 41]


# While Redis is away:


async def test_without_redis_the_policies_of_all_parts_decide() -> None:
    rules = [
        rule("local", 8),
        rule("other", 20),
        rule("allow", 1, on_outage="allow"),
        rule("deny", 100, on_outage="deny"),
        rule("loud", 100, on_outage="raise"),
        rule("shadow", 2, enforce="flag"),
    ]
    async with limiter_of(f"redis://127.0.0.1:{free_port()}", *rules, expected_processes=2) as limiter:
        both = [await limiter.check("user", ("other", "local")) for _ in range(6)]
        assert [decision.allowed for decision in both] == [True] * 4 + [False] * 2
        assert {decision.source for decision in both} == {"outage"}
        assert (both[4].rule, [part.allowed for part in both[4].parts]) == ("local", [True, False])
        # What was denied has consumed nothing of the other's share, which is 10.
        assert allowed([await limiter.check("user", "other") for _ in range(10)]) == 6
        assert all([await limiter.check("somebody", ("allow", "other")) for _ in range(3)])
        denied = await limiter.check("somebody", ("deny", "other"))
        assert (denied.allowed, denied.rule) == (False, "deny")
        assert allowed([await limiter.check("somebody", "other") for _ in range(10)]) == 7
        with pytest.raises(StorageUnavailable):
            await limiter.check("somebody", ("other", "loud", "deny"))
        with pytest.raises(StorageUnavailable):
            await limiter.check("somebody", FirstOf("allow", "loud"))
        paid = [await limiter.check("third", ("allow", FirstOf("local", "other"))) for _ in range(15)]
        assert Counter(decision.parts[1].rule for decision in paid if decision.allowed) == {"local": 4, "other": 10}
        watched = [await limiter.check("fourth", ("local", "shadow")) for _ in range(3)]
        assert [(decision.allowed, decision.parts[1].over) for decision in watched] == [(True, False), (True, True), (True, True)]
        assert (await limiter.peek("fifth", ("local", "other"))).allowed


@pytest.mark.parametrize("on_overload", ["deny", "raise"])
async def test_what_waits_is_counted_by_checks_and_not_by_limits(on_overload: str) -> None:
    with RedisServer() as server:
        rules = [rule("a", 100), rule("b", 100), rule("shadow", 100, enforce="flag")]
        async with limiter_of(server.url, *rules, max_waiting=5, on_overload=on_overload) as limiter:
            await limiter.check("user", ("a", "b", "shadow"))
            server.pause()
            sent = [asyncio.create_task(limiter.check(f"user:{i}", ("a", "b", "shadow"))) for i in range(2)]
            for _ in sent:
                await asyncio.sleep(0)
            while limiter.statistics().in_flight < 2:
                sent.append(asyncio.create_task(limiter.check("more", "a")))
                await asyncio.sleep(0)
            room = 5 - limiter.statistics().waiting
            assert room > 2
            tasks = [asyncio.create_task(limiter.check("user", ("a", "b", "shadow"))) for _ in range(8)]
            done, waits = await asyncio.wait(tasks, timeout=0.2)
            assert (len(done), len(waits)) == (8 - room, room)
            if on_overload == "raise":
                assert {type(task.exception()) for task in done} == {StorageUnavailable}
            else:
                decisions = [task.result() for task in done]
                assert {(decision.allowed, decision.source, decision.rule) for decision in decisions} == {
                    (False, "overload", "a")
                }
                assert [[(part.rule, part.allowed) for part in decision.parts] for decision in decisions] == [
                    [("a", False), ("b", False), ("shadow", True)]
                ] * (8 - room)
                told = counted(limiter)
                assert [told[name]["overload"].denied for name in ("a", "b")] == [8 - room] * 2
            server.resume()
            await asyncio.gather(*sent, *waits)
            assert await left(limiter, "user", "a", "b", "shadow") == [99 - room] * 3


async def test_a_limiter_that_closes_leaves_nobody_waiting_and_consumes_nothing_else() -> None:
    with RedisServer() as server:
        limiter = limiter_of(server.url, rule("a", 100), rule("b", 100))
        await limiter.check("user", ("a", "b"))
        server.pause()
        tasks = [asyncio.create_task(limiter.check(f"user:{i % 3}", ("a", "b"))) for i in range(200)]
        await asyncio.sleep(0)
        closing = asyncio.create_task(limiter.aclose())
        done, waits = await asyncio.wait(tasks, timeout=5)
        assert (len(done), len(waits)) == (200, 0)
        assert {type(task.exception()) for task in done} <= {StorageUnavailable, LimiterClosed}
        server.resume()
        await closing
        async with limiter_of(server.url, rule("a", 100), rule("b", 100)) as other:
            for i in range(3):
                a, b = await left(other, f"user:{i}", "a", "b")
                assert a == b


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system can't fork")
def test_a_forked_child_asks_for_itself(redis_server: RedisServer) -> None:
    limiter = limiter_of(redis_server.url, rule("a", 10), rule("b", 10))

    async def use() -> list[bool]:
        return [bool(decision) for decision in await asyncio.gather(*(limiter.check("user", ("a", "b")) for _ in range(4)))]

    loop = asyncio.new_event_loop()
    assert loop.run_until_complete(use()) == [True] * 4
    child = os.fork()
    if child == 0:
        fine = False
        try:
            fine = asyncio.run(use()) == [True] * 4
        finally:
            os._exit(0 if fine else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert loop.run_until_complete(use()) == [True, True, False, False]
    loop.run_until_complete(limiter.aclose())
    loop.close()


async def test_what_was_admitted_alone_is_charged_for_each_payer() -> None:
    with RedisServer() as server:
        rules = [rule("a", 100), rule("b", 50), rule("c", 50)]
        async with limiter_of(server.url, *rules, expected_processes=1, deadline=0.25) as limiter:
            assert await until(lambda: _served(limiter)) < 2
            await limiter.check("user", ("a", FirstOf("b", "c")))
            server.pause()
            late = await asyncio.gather(*(limiter.check("user", ("a", FirstOf("b", "c"))) for _ in range(10)))
            assert {decision.source for decision in late} == {"outage"}
            server.resume()
            await until(lambda: _served(limiter))
            # Those that had been sent were run, or not; what was admitted here was charged.
            a, b, c = await left(limiter, "user", "a", "b", "c")
            assert 100 - 1 - 20 <= a <= 100 - 1 - 10
            assert (50 - b, 50 - c) == (100 - a, 0)


async def _served(limiter: RateThrottleCore) -> bool:
    return (await limiter.peek("somebody else", "a")).source == "redis"


async def test_a_lost_reply_is_decided_by_the_policy_for_all_parts(redis_server: RedisServer) -> None:
    rules, options = [rule("a", 10), rule("b", 10)], {"expected_processes": 1, "deadline": 0.2}
    async with Relay(redis_server.socket) as relay, limiter_of(relay.url, *rules, **options) as limiter:
        await limiter.check("user", ("a", "b"))
        relay.tamper = lambda reply: b""
        decisions = await asyncio.gather(*(limiter.check("user", ("a", "b")) for _ in range(12)))
        assert {decision.source for decision in decisions} == {"outage"}
        assert allowed(decisions) == 9
        relay.tamper = lambda reply: reply
        await until(lambda: _served(limiter))
        assert await left(limiter, "user", "a", "b") == [0, 0]


@pytest.mark.parametrize(
    "numbers",
    [
        (),
        (1, 1, 1, 0),  # an answer is missing
        (1, 1, 1, 0, 1, 1, 1, 0, 1),  # and one number is too many
        (1, 1, 1, 0, 0, 0, 100, 0),  # one part has paid, the other has not
        (2, 2, 2, 0, 2, 2, 2, 0),  # for more than were asked for
        (-1, 0, 1, 0, -1, 0, 1, 0),
        (1, 1, 1, 0, 1, 0, 1, 0),  # paid for all, and denied
        (0, 1, 1, 0, 0, 1, 1, 0),  # nobody denies
        (1, -5, 1, 1, 1, 0),  # skipped, and no alternative
        (1, -2, 1, 1, 1, 0),  # not decided, and paid
        (0, -2, 0, 1, 1, 0),
        (1, 1, 1, 0, 1, 1, 1, 60_000_000_000),
        (1, 1, 1, 0, 1, 1, 1, 0, 3, 5),  # there is no third answer
    ],
)
async def test_numbers_that_no_script_gives_are_a_protocol_error(redis_server: RedisServer, numbers: tuple[int, ...]) -> None:
    rules = [rule(name, 100, on_outage="raise") for name in ("a", "b")]
    async with Relay(redis_server.socket) as relay:
        limiter = limiter_of(relay.url, *rules)
        await limiter.check("user", "a")
        told = [b":%d" % number for number in numbers]

        def tamper(reply: bytes) -> bytes:
            _length, *lines = reply.split(b"\r\n")
            if len(lines[3]) == 17:  # to a beat: an epoch
                return reply
            return b"\r\n".join([b"*%d" % (2 + len(told)), *lines[:3], *told, b""])

        relay.tamper = tamper
        with pytest.raises(StorageProtocolError):
            await limiter.check("user", ("a", "b"))
        relay.tamper = lambda reply: reply
        assert (await limiter.check("user", ("a", "b"))).allowed
        await limiter.aclose()
