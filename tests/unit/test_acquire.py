"""Callers that wait for capacity: in which order, until when, and what they leave behind. In memory, on a clock that jumps."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import math
import os
import random
import threading
import warnings
from collections.abc import Awaitable, Callable, Coroutine, Hashable
from contextlib import ExitStack
from typing import Any, cast
from unittest.mock import patch

import pytest
import trio
import trio.testing

from ratethrottle import (
    CostExceedsLimit,
    Decision,
    FirstOf,
    InMemoryStorage,
    InvalidRequest,
    LimiterClosed,
    RateLimitExceeded,
    RateThrottleCore,
    RateThrottleRule,
    StorageUnavailable,
)
from ratethrottle._engine.joint import Joint
from ratethrottle.testing import ManualClock, ManualRedisStorage, fake_redis
from ratethrottle.waiting.agenda import Agenda
from ratethrottle.waiting.lines import Line
from ratethrottle.waiting.tickets import AWAY_STEP_S, ask_of, rules_of
from tests.kit.counted import counted
from tests.kit.strategies import STRATEGIES
from tests.kit.timeless import limiter, run, settled, timeless

RULE = RateThrottleRule("api", 3, 60, strategy="fixed_window")
BUCKET = RateThrottleRule("api", 3, 3, strategy="token_bucket")  # a unit a second
NEAR_S = 1e-5


def left_behind(core: RateThrottleCore) -> list[object]:
    """What `acquire` holds: nothing, once nobody waits."""
    return [len(core._lines), len(core._lines._loops), timeless().timers()]


async def exhausted(*rules: RateThrottleRule, key: str = "key") -> RateThrottleCore:
    core = limiter(*rules)
    while await core.check(key, rules[0].name):
        pass
    return core


def start(waits: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
    return asyncio.get_running_loop().create_task(waits)


# Waiting


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_it_waits_for_exactly_as_long_as_it_has_to(strategy: str) -> None:
    async def main() -> None:
        core = limiter(RateThrottleRule("api", 3, 60, strategy=strategy))
        granted = await core.acquire("key", cost=3)
        assert (granted.allowed, granted.cost, granted.remaining, granted.source) == (True, 3, 0, "memory")
        found = await core.peek("key", cost=2)
        # A leaky bucket lets work out evenly: once all before it has drained.
        wait_s = found.reset_after if strategy == "leaky_bucket" else found.retry_after
        began_s = timeless().time()
        second = await core.acquire("key", cost=2)
        assert second.allowed
        assert timeless().time() - began_s == pytest.approx(wait_s, abs=NEAR_S)
        assert left_behind(core) == [0, 0, 0]

    run(main)


def test_callers_are_served_in_the_order_in_which_they_came() -> None:
    async def main() -> None:
        core = await exhausted(RateThrottleRule("api", 5, 5, strategy="token_bucket"))
        served: list[int] = []
        seed = random.randrange(2**32)
        rng = random.Random(seed)

        async def caller(number: int) -> None:
            await core.acquire("key", cost=rng.choice((1, 1, 2, 5)))
            served.append(number)

        tasks = [start(caller(number)) for number in range(50)]
        await asyncio.gather(*tasks)
        assert served == list(range(50)), seed
        assert left_behind(core) == [0, 0, 0]

    run(main)


def test_a_large_request_is_not_overtaken_by_small_ones() -> None:
    async def main() -> None:
        core = await exhausted(BUCKET)
        began_s = timeless().time()
        served: list[tuple[str, float]] = []

        async def caller(name: str, cost: int) -> None:
            await core.acquire("key", cost=cost)
            served.append((name, round(timeless().time() - began_s, 3)))

        await asyncio.gather(caller("first", 1), caller("large", 3), *(caller("small", 1) for _ in range(3)))
        assert served == [("first", 1), ("large", 4), ("small", 5), ("small", 6), ("small", 7)]

    run(main)


def test_keys_and_rules_have_lines_of_their_own() -> None:
    async def main() -> None:
        core = limiter(RULE, RateThrottleRule("other", 1, 1, strategy="token_bucket"))
        for key, rule in (("a", "api"), ("a", "other"), ("b", "other"), (("a",), "other")):
            assert await core.acquire(key, rule)
        for _ in range(2):
            assert await core.acquire("a", "api")
        waiting = start(core.acquire("a", "api"))
        began_s = timeless().time()
        await asyncio.gather(core.acquire("a", "other"), core.acquire("b", "other"), core.acquire(("a",), "other"))
        assert timeless().time() - began_s == pytest.approx(1, abs=NEAR_S)
        assert not waiting.done()
        assert len(core._lines) == 1
        await waiting

    run(main)


def test_the_only_rule_is_the_same_line_with_its_name_and_without() -> None:
    async def main() -> None:
        core = await exhausted(BUCKET)
        tasks = [start(core.acquire("key", rule)) for rule in (None, "api", None)]
        await settled()
        assert len(core._lines) == 1
        core.add_rule(RateThrottleRule("other", 1, 1))  # `None` meant what it meant when they came
        assert [(await task).rule for task in tasks] == ["api"] * 3

    run(main)


def test_a_thousand_callers_have_one_timer_and_take_no_turn_of_the_loop_while_they_wait() -> None:
    async def main() -> None:
        core = limiter(RateThrottleRule("api", 1, 3600, strategy="fixed_window"))
        before = len(asyncio.all_tasks())
        tasks = [start(core.acquire(f"key {i % 50}", timeout=36_000 + i)) for i in range(1_050)]
        await settled()
        assert sum(task.done() for task in tasks) == 50
        assert timeless().timers() == 1
        assert len(asyncio.all_tasks()) == before + 1_000
        looks = timeless().jumping.looks
        await asyncio.sleep(3599 - timeless().time() % 3600)
        assert timeless().jumping.looks - looks <= 3
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        assert left_behind(core) == [0, 0, 0]

    run(main)


def test_what_comes_free_at_once_is_handed_out_at_once() -> None:
    async def main() -> None:
        core = limiter(RateThrottleRule("api", 1_000, 60, strategy="fixed_window"))
        await core.acquire("key", cost=1_000)
        tasks = [start(core.acquire("key")) for _ in range(1_500)]
        await settled()
        await asyncio.sleep(60 - timeless().time() % 60)
        await settled(50)
        assert [task.done() for task in tasks] == [True] * 1_000 + [False] * 500
        await asyncio.gather(*tasks)

    run(main)


def test_callers_that_never_have_to_wait_let_others_run() -> None:
    async def main() -> None:
        core = limiter(RateThrottleRule("api", 10_000, 60))
        turns = 0

        async def other() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        task = start(other())
        for _ in range(1_280):
            await core.acquire("key")
        assert turns >= 9
        task.cancel()

    run(main)


def test_a_check_does_not_stand_in_line() -> None:
    async def main() -> None:
        core = limiter(RateThrottleRule("api", 3, 3))
        for _ in range(3):
            assert await core.check("key")
            await asyncio.sleep(1.01)
        waiting = start(core.acquire("key", cost=3))
        await asyncio.sleep(0.5)
        assert await core.check("key")
        assert not await core.check("key")
        began_s = timeless().time()
        await waiting
        assert timeless().time() - began_s == pytest.approx(3, abs=0.01)

    run(main)


def test_a_check_is_denied_what_is_booked() -> None:
    async def main() -> None:
        core = await exhausted(BUCKET)
        waiting = start(core.acquire("key", cost=3))
        await asyncio.sleep(1.5)
        denied = await core.check("key")
        assert (denied.allowed, denied.remaining) == (False, 0)
        assert (denied.retry_after, denied.reset_after) == (pytest.approx(2.5), pytest.approx(4.5))
        began_s = timeless().time()
        granted = await waiting
        assert timeless().time() - began_s == pytest.approx(1.5, abs=0.01)
        assert (granted.allowed, granted.over, granted.remaining, granted.retry_after) == (True, False, 0, 0)
        assert granted.reset_after == pytest.approx(3)
        assert (await core.peek("key")).retry_after == pytest.approx(1)

    run(main)


def test_callers_for_whom_a_minute_is_not_enough_wait_until_they_can_book() -> None:
    async def main() -> None:
        core = limiter(RateThrottleRule("api", 1, 10, strategy="token_bucket", burst=1))
        served: list[tuple[int, float]] = []

        async def caller(number: int, timeout: float | None) -> None:
            await core.acquire("key", timeout=timeout)
            served.append((number, round(timeless().time()) - 1000))

        tasks = [start(caller(number, None if number % 2 else 300)) for number in range(15)]
        await settled()
        assert (await core.peek("key")).retry_after <= 70, "no turn is farther ahead"
        with pytest.raises(RateLimitExceeded) as caught:
            await core.acquire("key", timeout=65)
        assert caught.value.decision.retry_after == pytest.approx(70)
        tasks[3].cancel()
        tasks[12].cancel()
        await asyncio.wait(tasks)
        numbers = [number for number in range(15) if number not in (3, 12)]
        assert served == [(number, 10 * place) for place, number in enumerate(numbers)]
        assert counted(core)["api"]["memory"].allowed <= 16
        assert left_behind(core) == [0, 0, 0]

    run(main)


def test_what_the_first_of_a_tail_heard_leaves_with_it() -> None:
    async def main() -> None:
        core = limiter(RateThrottleRule("api", 1, 10, strategy="token_bucket", burst=10))
        await core.check("key", cost=10)
        booked = start(core.acquire("key", cost=6))  # its turn is in a minute
        await settled()
        large, second = start(core.acquire("key", cost=10)), start(core.acquire("key"))  # the first not before 160 s
        await settled()
        large.cancel()
        await settled()
        small = start(core.acquire("key", timeout=100))
        await settled()
        assert not small.done()
        began_s = timeless().time()
        for waiting, turn_s in ((booked, 60), (second, 70), (small, 80)):
            await waiting
            assert timeless().time() - began_s == pytest.approx(turn_s, abs=0.01)
        assert left_behind(core) == [0, 0, 0]

    run(main)


def test_loops_are_served_in_the_order_in_which_they_booked() -> None:
    async def main() -> None:
        store = InMemoryStorage(clock_us=timeless().time_us)
        cores = [RateThrottleCore(store, rules=[BUCKET]) for _ in range(2)]
        await cores[0].acquire("key", cost=3)
        served: list[tuple[int, float]] = []

        async def caller(number: int) -> None:
            await cores[number % 2].acquire("key")
            served.append((number, round(timeless().time()) - 1000))

        await asyncio.gather(*(caller(number) for number in range(6)))
        assert served == [(number, number + 1) for number in range(6)]

    run(main)


# Timeouts


@pytest.mark.parametrize("timeout", [-1, -0.001, math.nan, -math.inf, True, False, "5", b"5", 1j, [1]])
def test_a_timeout_that_is_none_is_refused_before_anything_is_asked(timeout: Any) -> None:
    async def main() -> None:
        core = limiter(RULE)
        with pytest.raises(InvalidRequest, match="it is seconds"):
            await core.acquire("key", timeout=timeout)
        with pytest.raises(InvalidRequest, match="it is seconds"):
            core.limit("key", timeout=timeout)
        assert (await core.peek("key")).remaining == 3
        assert counted(core) == {}

    run(main)


@pytest.mark.parametrize("timeout", [None, math.inf, 10**400, 1e300, 60, 60.5])
def test_a_timeout_that_is_long_enough_changes_nothing(timeout: Any) -> None:
    async def main() -> None:
        core = await exhausted(RULE)
        assert await core.acquire("key", timeout=timeout)

    run(main)


def test_without_a_timeout_left_it_is_a_check_that_raises() -> None:
    async def main() -> None:
        core = limiter(BUCKET)
        for _ in range(3):
            assert (await core.acquire("key", timeout=0)).allowed
        began_s = timeless().time()
        with pytest.raises(RateLimitExceeded, match="rule 'api' denied a cost of 1 with 0 of 3 left; retry in 1 s") as caught:
            await core.acquire("key", timeout=0)
        assert caught.value.decision.retry_after == pytest.approx(1)
        assert timeless().time() == began_s
        waiting = start(core.acquire("key", cost=3))
        await asyncio.sleep(1.5)
        with pytest.raises(RateLimitExceeded, match=r"retry in 2\.5 s"):  # as a check does, it finds units that are booked
            await core.acquire("key", timeout=0.0)
        await waiting

    run(main)


def test_what_cannot_be_met_is_raised_at_once() -> None:
    async def main() -> None:
        core = await exhausted(BUCKET)
        began_s = timeless().time()
        with pytest.raises(RateLimitExceeded) as caught:
            await core.acquire("key", timeout=0.9)
        assert caught.value.decision.retry_after == pytest.approx(1)
        # Behind another one that waits for longer than that:
        waiting = start(core.acquire("key", cost=2, timeout=2))
        await settled()
        with pytest.raises(RateLimitExceeded, match="a cost of 1 ") as caught:
            await core.acquire("key", timeout=1.9)
        denied = caught.value.decision
        assert (denied.cost, denied.key, denied.rule, denied.source) == (1, "key", "api", "memory")
        assert denied.retry_after == pytest.approx(3)
        assert timeless().time() == began_s
        assert len(core._lines) == 1
        await asyncio.sleep(1.5)
        with pytest.raises(RateLimitExceeded) as caught:
            await core.acquire("key", timeout=0.1)
        assert caught.value.decision.retry_after == pytest.approx(1.5)  # as it is by now
        assert (await waiting).allowed
        assert left_behind(core) == [0, 0, 0]

    run(main)


def test_a_denial_gives_up_all_that_are_behind_and_out_of_time_by_then() -> None:
    async def main() -> None:
        core = limiter(RULE)
        await core.acquire("key", cost=3)
        began_s = timeless().time()
        tasks = [start(core.acquire("key", timeout=timeout)) for timeout in (None, 1, 70, 2, None)]
        await settled()
        assert [task.done() for task in tasks] == [False, True, False, True, False]
        assert timeless().time() == began_s
        assert all(isinstance(tasks[i].exception(), RateLimitExceeded) for i in (1, 3))
        for i in (0, 2, 4):
            await tasks[i]

    run(main)


def test_a_small_request_is_asked_for_once_a_large_one_in_front_has_given_up() -> None:
    async def main() -> None:
        core = limiter(RULE)
        await core.acquire("key")
        waiting = start(core.acquire("key", cost=3, timeout=100))
        await settled()
        small = start(core.acquire("key", timeout=100))
        await settled()
        assert not small.done()
        waiting.cancel()
        await settled()
        assert (await small).allowed
        assert timeless().time() == 1000
        with pytest.raises(RateLimitExceeded):
            await core.acquire("key", cost=3, timeout=1)
        assert await core.acquire("key", timeout=1)  # not judged by that one's time

    run(main)


def test_requests_that_can_never_be_granted_are_raised_at_once() -> None:
    async def main() -> None:
        core = limiter(RULE, RateThrottleRule("nothing", 0, 60))
        with pytest.raises(CostExceedsLimit):
            await core.acquire("key", "api", cost=4)
        with pytest.raises(RateLimitExceeded, match="it can never be allowed: raise the limit, or ask for less") as caught:
            await core.acquire("key", "nothing")
        assert caught.value.decision.retry_after == math.inf
        assert left_behind(core) == [0, 0, 0]

    run(main)


@pytest.mark.parametrize(
    ("key", "options", "kind"),
    [
        ("", {}, InvalidRequest),
        (5, {}, InvalidRequest),
        ("key", {"rule": "nope"}, InvalidRequest),
        ("key", {"cost": 0}, InvalidRequest),
        ("key", {"cost": True}, InvalidRequest),
        ("key", {"cost": 1.5}, InvalidRequest),
        ("key", {"cost": 4}, CostExceedsLimit),
    ],
)
def test_a_bad_call_is_refused_at_once_also_while_others_wait(key: Any, options: Any, kind: type[Exception]) -> None:
    async def main() -> None:
        core = await exhausted(RULE)
        waiting = start(core.acquire("key"))
        await settled()
        for timeout in (None, 0, 5):
            with pytest.raises(kind):
                await core.acquire(key, timeout=timeout, **options)
        assert timeless().time() == 1000
        await waiting

    run(main)


# Several limits, and limits that never deny


def test_several_limits_are_waited_for_together() -> None:
    async def main() -> None:
        core = limiter(
            RateThrottleRule("second", 2, 1, strategy="fixed_window"), RateThrottleRule("minute", 3, 60, strategy="fixed_window")
        )
        served: list[tuple[int, float]] = []

        async def caller(number: int, rule: Any) -> None:
            decision = await core.acquire("key", rule)
            assert [part.rule for part in decision.parts] == ["second", "minute"]
            served.append((number, timeless().time() - 1000))

        await asyncio.gather(*(caller(number, ["second", "minute"]) for number in range(5)))
        assert served == [(0, 0), (1, 0), (2, 1), (3, 20), (4, 20)]
        with pytest.raises(RateLimitExceeded, match="rule 'minute' denied a cost of 2") as caught:
            await core.acquire("key", {"second": 1, "minute": 2}, timeout=5)
        assert [part.rule for part in caught.value.decision.parts] == ["second", "minute"]
        waiting = start(core.acquire("key", {"second": 1, "minute": 3}, timeout=100))
        await settled()
        with pytest.raises(RateLimitExceeded, match="rule 'minute' denied a cost of 1") as caught:
            await core.acquire("key", ("minute", "second"), timeout=5)
        assert caught.value.decision.retry_after == pytest.approx(60 - timeless().time() % 60)
        with pytest.raises(RateLimitExceeded, match="rule 'minute' denied a cost of 2"):
            await core.acquire("key", {"second": 1, "minute": 2}, timeout=5)
        assert len(core._lines) == 1
        assert (await waiting).allowed

    run(main)


@pytest.mark.parametrize("rule", [["api"], {"api": 1}])
def test_rules_that_change_in_the_hands_of_their_owner_are_those_that_were_named(rule: Any) -> None:
    async def main() -> None:
        core = await exhausted(BUCKET)
        waiting = start(core.acquire("key", rule))
        await settled()
        rule.clear()
        assert (await waiting).rule == "api"

    run(main)


def test_rules_of_the_callers_own_and_first_of_are_waited_for() -> None:
    async def main() -> None:
        core = limiter(RateThrottleRule("included", 1, 60, strategy="fixed_window"), BUCKET)
        own = RateThrottleRule("own", 1, 1, strategy="token_bucket")
        for rule, payers in ((own, ["own"] * 3), (FirstOf("included", "api"), ["included", "api", "api"])):
            assert [(await core.acquire("key", rule)).rule for _ in range(3)] == payers
        assert timeless().time() == pytest.approx(1002, abs=NEAR_S)
        assert left_behind(core) == [0, 0, 0]

    run(main)


@pytest.mark.parametrize("enforce", ["flag", "off"])
def test_a_rule_that_never_denies_is_never_waited_for(enforce: Any) -> None:
    async def main() -> None:
        core = limiter(RateThrottleRule("api", 1, 60, enforce=enforce))
        assert [(await core.acquire("key")).over for _ in range(2)] == [False, enforce == "flag"]
        assert timeless().time() == 1000

    run(main)


@pytest.mark.parametrize("on_redis", [False, True])
async def test_the_clock_of_the_testing_kit_has_callers_wait_in_no_time(on_redis: bool) -> None:
    clock = ManualClock()
    storage = ManualRedisStorage(fake_redis(), clock=clock) if on_redis else InMemoryStorage(clock_us=clock)
    async with RateThrottleCore(storage, rules=[RateThrottleRule("api", 2, 3600)]) as core:
        served: list[tuple[int, float]] = []

        async def caller(number: int, timeout: float | None) -> None:
            await core.acquire("key", timeout=timeout)
            served.append((number, clock.now - began))

        began = clock.now
        tasks = [start(caller(number, timeout)) for number, timeout in enumerate((None, 5, 4000, 3000, 5000, None))]
        await clock.settle()
        assert served == [(0, 0), (1, 0)]
        assert isinstance(tasks[3].exception(), RateLimitExceeded)
        await clock.elapse(3599.9)
        assert len(served) == 2
        await clock.elapse(0.2)
        assert served[2:] == [(2, 3600), (4, 3600)]
        clock.advance(3600)
        await clock.settle()
        assert [number for number, _ in served] == [0, 1, 2, 4, 5]
        assert len(core._lines) == 0


# Rules that change, errors, the end


def test_a_rule_that_changes_counts_for_those_that_wait() -> None:
    async def main() -> None:
        core = await exhausted(RULE)
        tasks = [start(core.acquire("key", cost=cost)) for cost in (2, 1, 2, 1)]
        await settled()
        core.add_rule(RateThrottleRule("api", 1, 60, strategy="fixed_window"), replace=True)
        done = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(one) for one in done] == [CostExceedsLimit, Decision, CostExceedsLimit, Decision]
        gone = [start(core.acquire("key")) for _ in range(2)]
        await settled()
        core.remove_rule("api")
        assert [type(one) for one in await asyncio.gather(*gone, return_exceptions=True)] == [InvalidRequest] * 2
        assert left_behind(core) == [0, 0, 0]
        core.add_rule(RULE)
        await core.acquire("key", cost=3)
        waiting = start(core.acquire("key", timeout=100))
        await settled()
        core.remove_rule("api")
        core.add_rule(RateThrottleRule("other", 1, 1))
        await asyncio.sleep(1)
        line = next(iter(next(iter(core._lines._loops.values())).lines.values()))
        line.deadlines.put(next(iter(line.tickets)), timeless().time())  # it is out of time before it is asked for again
        line.plan()
        with pytest.raises(InvalidRequest):
            await waiting
        assert left_behind(core) == [0, 0, 0]

    run(main)


def late_storage(core: RateThrottleCore, answered: Callable[[], Awaitable[None]]) -> ExitStack:
    """Have each answer come only after that."""
    check, book = core.check, core._storage.book

    async def check_late(*args: Any, **options: Any) -> Decision:
        await answered()
        return await check(*args, **options)

    async def book_late(booking: Joint) -> Decision:
        await answered()
        return cast(Decision, book(booking))

    stack = ExitStack()
    stack.enter_context(patch.object(core, "check", check_late))
    stack.enter_context(patch.object(core._storage, "book", book_late))
    return stack


@pytest.mark.parametrize("rule", [BUCKET, RULE])
def test_an_error_of_the_storage_is_that_of_the_first_caller_alone(rule: RateThrottleRule) -> None:
    async def main() -> None:
        core = await exhausted(rule)
        answers: list[BaseException] = [StorageUnavailable("away"), ValueError("strange")]

        delays_s = iter((0.1, 0.2, 0.3, 0.4, *[0.1] * 9))

        async def answered() -> None:
            await asyncio.sleep(next(delays_s))
            if answers:
                raise answers.pop(0)

        with late_storage(core, answered):
            tasks = [start(core.acquire("key")) for _ in range(4)]
            done = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(one) for one in done] == [StorageUnavailable, ValueError, Decision, Decision]
        assert left_behind(core) == [0, 0, 0]

    run(main)


@pytest.mark.parametrize("source", ["outage", "overload"])
def test_denials_of_a_storage_that_is_away_make_no_busy_loop(source: str) -> None:
    async def main() -> None:
        core = limiter(RULE)
        entry = core._entry("key")
        asked = 0

        async def check(*args: Any, **options: Any) -> Decision:
            nonlocal asked
            asked += 1
            return entry.decided(source, timeless().time() >= 1001.99, 0, 1, 1)

        with patch.object(core, "check", check):
            assert (await core.acquire("key", timeout=10)).allowed
        assert asked <= 2 / AWAY_STEP_S + 2
        assert timeless().time() == pytest.approx(1002, abs=AWAY_STEP_S)

    run(main)


def test_an_answer_that_does_not_come_in_time_is_not_waited_for() -> None:
    async def main() -> None:
        core = limiter(RULE)

        async def check(*args: Any, **options: Any) -> Decision:
            await asyncio.sleep(5)
            return core._entry("key").decided("redis", True, 1, 0, 1)

        with patch.object(core, "check", check):
            alike, other = start(core.acquire("key", timeout=0.5)), start(core.acquire("key", cost=2, timeout=0.25))
            second = start(core.acquire("key", timeout=6))
            for task, after_s in ((other, 0.25), (alike, 0.5)):
                with pytest.raises(RateLimitExceeded, match="the storage didn't answer in time") as caught:
                    await task
                assert timeless().time() - 1000 == pytest.approx(after_s, abs=0.002)
                assert caught.value.decision.source == "overload"
            assert await second
            assert timeless().time() - 1000 == pytest.approx(5, abs=0.002)
        assert left_behind(core) == [0, 0, 0]

    run(main)


def test_closing_the_limiter_ends_every_wait() -> None:
    async def main() -> None:
        core = await exhausted(BUCKET)
        tasks = [start(core.acquire("key", cost=cost, timeout=timeout)) for cost in (1, 3) for timeout in (None, 100)]
        await settled()
        await core.aclose()
        done = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(one) for one in done] == [LimiterClosed] * 4
        assert left_behind(core) == [0, 0, 0]
        for timeout in (None, 0, 1):
            with pytest.raises(LimiterClosed):
                await core.acquire("key", timeout=timeout)

    run(main)


# Cancellation


def test_a_caller_that_is_cancelled_leaves_nothing_behind() -> None:
    async def main() -> None:
        core = await exhausted(RateThrottleRule("api", 3, 60))
        first, second, third = (start(core.acquire("key", cost=cost, timeout=100)) for cost in (3, 1, 1))
        await settled()
        second.cancel()
        await settled()
        line = next(iter(next(iter(core._lines._loops.values())).lines.values()))
        assert (len(line.tickets), len(line.deadlines), sum(line.wanted.values())) == (2, 2, 2)
        first.cancel()
        began_s = timeless().time()
        await third
        assert timeless().time() - began_s == pytest.approx(60, abs=NEAR_S)
        assert left_behind(core) == [0, 0, 0]
        assert (await core.peek("key")).remaining == 2

    run(main)


def test_those_behind_a_caller_that_is_cancelled_have_their_turns_sooner() -> None:
    async def main() -> None:
        core = await exhausted(BUCKET)
        tasks = [start(core.acquire("key", timeout=100)) for _ in range(5)]
        await settled()
        for task in (tasks[0], tasks[3]):
            task.cancel()
        began_s = timeless().time()
        for i, at_s in ((1, 1), (2, 2), (4, 3)):
            await tasks[i]
            assert timeless().time() - began_s == pytest.approx(at_s, abs=NEAR_S)
        assert left_behind(core) == [0, 0, 0]
        assert (await core.peek("key")).reset_after == pytest.approx(3, abs=NEAR_S), "what nobody needed came back"

    run(main)


def test_what_others_have_booked_behind_stays_used() -> None:
    async def main() -> None:
        core = await exhausted(BUCKET)
        first, second, third = (start(core.acquire("key", cost=cost)) for cost in (2, 1, 2))
        await settled()
        third.cancel()
        await settled()
        assert (await core.peek("key")).retry_after == pytest.approx(4, abs=NEAR_S)
        first.cancel()
        await settled()
        assert (await core.peek("key")).retry_after == pytest.approx(4, abs=NEAR_S)
        began_s = timeless().time()
        assert (await core.acquire("key", cost=2)).cost == 2  # it takes the turn that nobody needed
        assert timeless().time() - began_s == pytest.approx(2, abs=NEAR_S)
        assert not second.done()
        await second
        assert timeless().time() - began_s == pytest.approx(3, abs=NEAR_S)
        assert left_behind(core) == [0, 0, 0]

    run(main)


def test_a_turn_that_has_passed_is_not_used_later() -> None:
    async def main() -> None:
        core = await exhausted(BUCKET)
        first, second = start(core.acquire("key", cost=2)), start(core.acquire("key", cost=3))
        await settled()
        first.cancel()
        await asyncio.sleep(3)
        began_s = timeless().time()
        tasks = [start(core.acquire("key", cost=2)) for _ in range(2)]
        await second
        assert timeless().time() - began_s == pytest.approx(2, abs=NEAR_S)
        for i in range(2):
            await tasks[i]
            assert timeless().time() - began_s == pytest.approx(4 + 2 * i, abs=NEAR_S)
        assert left_behind(core) == [0, 0, 0]

    run(main)


@pytest.mark.parametrize("others", [0, 1, 2])
def test_a_grant_for_a_caller_that_is_cancelled_at_that_moment_goes_to_the_next(others: int) -> None:
    async def main() -> None:
        core = await exhausted(BUCKET)
        first = start(core.acquire("key"))
        rest = [start(core.acquire("key")) for _ in range(others)]
        await settled()
        assert timeless().timers() == 1
        timeless().call_at(timeless().time() + 1 + 5e-10, first.cancel)  # between the grant and the task's turn
        with pytest.raises(asyncio.CancelledError):
            await first
        assert timeless().time() == pytest.approx(1001, abs=NEAR_S)
        assert (await core.peek("key")).remaining == 0, "it was granted"
        for number, task in enumerate(rest, 1):
            await task
            assert timeless().time() == pytest.approx(1000 + number, abs=0.01)
        assert counted(core)["api"]["memory"].allowed == 4 + others
        assert left_behind(core) == [0, 0, 0]

    run(main)


def test_a_storm_of_cancellations_loses_no_unit_and_no_place() -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)

    async def main() -> None:
        core = limiter(RateThrottleRule("api", 5, 5))
        served: dict[int, list[tuple[float, int]]] = {1: [], 2: [], 5: []}
        granted = 0

        async def caller(number: int, cost: int) -> None:
            nonlocal granted
            with contextlib.suppress(RateLimitExceeded):
                await core.acquire("key", cost=cost, timeout=rng.choice((None, None, 5, 50)))
                granted += cost
                served[cost].append((timeless().time(), number))

        tasks: list[asyncio.Task[None]] = []
        for number in range(3_000):
            tasks.append(start(caller(number, rng.choice((1, 1, 1, 2, 5)))))
            if rng.random() < 0.3:
                await asyncio.sleep(rng.choice((0, 0, 0.05, 0.3, 1)))
            while rng.random() < 0.6:
                rng.choice(tasks[-50:]).cancel()
        last = [start(core.acquire("key", cost=cost)) for cost in (1, 2, 5)]
        await asyncio.wait(tasks)
        granted += sum([(await task).cost for task in last])
        for each in served.values():
            # Within an instant a task that need not wait goes on before those that were granted sooner, and have yet to be woken.
            numbers = [number for _, number in sorted(each)]
            assert numbers == sorted(numbers), "in the order in which they came"
        assert granted + lost == consumed, "each unit reached a caller, if one waited for such a grant"
        assert left_behind(core) == [0, 0, 0]

    consumed = lost = 0
    real, real_hand_out = RateThrottleCore.check, Line.hand_out

    def hand_out(line: Line, ask: Hashable, decision: Decision) -> None:
        nonlocal lost
        if not any(ticket.ask == ask for ticket in line.tickets):
            lost += decision.cost
        real_hand_out(line, ask, decision)

    def counting(core: RateThrottleCore, key: str, rule: str | None = None, *, cost: int = 1) -> Any:
        async def check() -> Decision:
            nonlocal consumed
            decision = await real(core, key, rule, cost=cost)
            consumed += cost if decision else 0
            return decision

        return check()

    with patch.object(RateThrottleCore, "check", counting), patch.object(Line, "hand_out", hand_out):
        run(main)
    assert lost < consumed / 50


def test_a_storm_of_cancellations_loses_nothing_that_was_booked() -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)

    async def main() -> None:
        core = limiter(RateThrottleRule("api", 20, 20, strategy="token_bucket", burst=5))
        began_s = timeless().time()
        served: list[tuple[float, int]] = []

        async def caller(number: int) -> None:
            with contextlib.suppress(RateLimitExceeded):
                await core.acquire("key", timeout=rng.choice((None, None, 5, 50)))
                served.append((timeless().time(), number))

        tasks: list[asyncio.Task[None]] = []
        for number in range(3_000):
            tasks.append(start(caller(number)))
            if rng.random() < 0.3:
                await asyncio.sleep(rng.choice((0, 0, 0.05, 0.3, 1)))
            while rng.random() < 0.6:
                rng.choice(tasks[-50:]).cancel()
        await settled()
        waits = sum(not task.done() for task in tasks)
        ends_s = timeless().time()
        await asyncio.wait(tasks)
        numbers = [number for _, number in sorted(served)]
        assert numbers == sorted(numbers), "in the order in which they came"
        used = 1_000_000 * len(served) - round((timeless().time() - began_s) * 1e6)
        assert (await core.peek("key")).reset_after_us == pytest.approx(max(0, used), abs=5_000_000)
        # They were served as if nobody else had ever come.
        assert waits > 10
        assert timeless().time() - ends_s == pytest.approx(waits, abs=1.01)
        assert left_behind(core) == [0, 0, 0]

    run(main)


@pytest.mark.parametrize("strategy", ["token_bucket", "sliding_window"])
def test_a_storm_of_cancellations_while_answers_are_awaited_leaves_nothing_behind(strategy: str) -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)

    async def main() -> None:
        core = limiter(RateThrottleRule("api", 50, 50, strategy=strategy))
        served: list[int] = []

        async def answered() -> None:
            await asyncio.sleep(rng.random() * 0.02)

        async def caller(number: int) -> None:
            await core.acquire("key")
            served.append(number)

        with late_storage(core, answered):
            tasks = [start(caller(number)) for number in range(300)]
            for _ in range(300):
                await asyncio.sleep(rng.choice((0, 0, 0.001, 0.01, 0.1)))
                rng.choice(tasks).cancel()
            await asyncio.wait(tasks)
        assert served == sorted(served)
        assert len(served) == sum(not task.cancelled() for task in tasks)
        assert left_behind(core) == [0, 0, 0]

    run(main)


def test_timeouts_of_asyncio_end_a_wait_too() -> None:
    async def main() -> None:
        core = await exhausted(RULE)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1):
                await core.acquire("key")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(core.acquire("key"), 1)
        assert left_behind(core) == [0, 0, 0]

    run(main)


# Loops, threads, processes


def test_loops_in_several_threads_use_one_limiter() -> None:
    core = RateThrottleCore(rules=[RateThrottleRule("api", 20, 1, strategy="token_bucket", burst=1)])
    served: list[int] = []
    loops = []

    async def main(number: int) -> None:
        loops.append(asyncio.get_running_loop())
        await asyncio.gather(*(core.acquire("key") for _ in range(5)))
        served.append(number)

    threads = [threading.Thread(target=asyncio.run, args=(main(number),)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(served) == [0, 1, 2]
    assert len(core._lines) == len(core._lines._loops) == 0


def test_closing_ends_the_waits_of_other_loops_too() -> None:
    core = RateThrottleCore(rules=[RULE])
    waits = threading.Event()
    done: list[object] = []

    async def main() -> None:
        await core.acquire("key", cost=3)
        task = start(core.acquire("key"))
        await asyncio.sleep(0)
        asyncio.get_running_loop().call_soon(waits.set)
        done.extend(await asyncio.gather(task, return_exceptions=True))

    thread = threading.Thread(target=asyncio.run, args=(main(),))
    thread.start()
    assert waits.wait(30)
    asyncio.run(core.aclose())
    thread.join(30)
    assert [type(one) for one in done] == [LimiterClosed]


def test_a_loop_that_is_closed_while_callers_wait_consumes_nothing_more() -> None:
    clock = 1_000_000_000
    core = RateThrottleCore(InMemoryStorage(clock_us=lambda: clock), rules=[RULE])
    loop = asyncio.new_event_loop()
    loop.set_exception_handler(lambda _loop, _context: None)  # of tasks that were left behind

    async def main() -> None:
        await core.acquire("key", cost=3)
        tasks.extend(start(core.acquire("key")) for _ in range(3))
        await settled()

    tasks: list[asyncio.Task[Any]] = []
    loop.run_until_complete(main())
    loop.close()
    clock += 60_000_000
    tasks.clear()

    async def elsewhere() -> int:
        await core.acquire("other", cost=3)
        with pytest.raises(RateLimitExceeded):
            await core.acquire("other", timeout=1)  # to make a line is to forget loops that are closed
        gc.collect()
        return (await core.peek("key")).remaining

    assert asyncio.run(elsewhere()) == 3
    assert len(core._lines._loops) == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system can't fork")
def test_a_forked_child_has_lines_of_its_own() -> None:
    core = RateThrottleCore(rules=[RateThrottleRule("api", 1, 0.05, strategy="token_bucket")])

    async def main() -> int:
        await core.acquire("key")
        waiting = start(core.acquire("key"))
        await asyncio.sleep(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of threads: the child uses none of them
            child = os.fork()
        if not child:
            os._exit(0 if in_child() else 1)
        await waiting
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])  # noqa: ASYNC222  # the child has ended by now, or soon

    def in_child() -> bool:
        done: list[bool] = []

        async def wait_and_close() -> None:
            await asyncio.wait_for(core.acquire("key"), 5)
            done.append(len(core._lines._loops) <= 1)
            await core.aclose()

        thread = threading.Thread(target=asyncio.run, args=(wait_and_close(),))
        thread.start()
        thread.join(10)
        return done == [True]

    assert asyncio.run(main()) == 0


@pytest.mark.uvloop
async def test_it_waits_on_real_loops_too() -> None:
    loop = asyncio.get_running_loop()
    core = RateThrottleCore(rules=[RateThrottleRule("api", 50, 1, strategy="token_bucket", burst=1)])
    began_s = loop.time()
    served: list[int] = []

    async def caller(number: int) -> None:
        await core.acquire("key", timeout=30)
        served.append(number)

    await asyncio.gather(*(caller(number) for number in range(11)))
    assert served == list(range(11))
    assert loop.time() - began_s >= 0.2 - 0.002  # the clock of uvloop has whole ms
    while await core.check("key"):
        pass
    with pytest.raises(RateLimitExceeded):
        await core.acquire("key", timeout=0.001)
    assert len(core._lines._loops) == 0


def test_it_waits_under_trio_too() -> None:
    async def main() -> None:
        def clock_us() -> int:
            return 10**9 + round(trio.current_time() * 1e6)

        core = RateThrottleCore(InMemoryStorage(clock_us=clock_us), rules=[BUCKET])
        await core.acquire("key", cost=3)
        began_s = trio.current_time()
        served: list[tuple[int, float]] = []

        async def caller(number: int) -> None:
            await core.acquire("key", timeout=20)
            served.append((number, round(trio.current_time() - began_s, 2)))

        async with trio.open_nursery() as nursery:
            for number in range(4):
                nursery.start_soon(caller, number)
                await trio.testing.wait_all_tasks_blocked()
            with trio.move_on_after(0.5) as scope:
                await core.acquire("key", cost=2)
            assert scope.cancelled_caught
            with pytest.raises(RateLimitExceeded):
                await core.acquire("key", cost=3, timeout=0.25)
            async with core.limit("other") as decision:
                assert decision.remaining == 2
        assert served == [(0, 1), (1, 2), (2, 3), (3, 4)]
        assert len(core._lines._loops) == 0
        async with trio.open_nursery() as nursery:
            nursery.start_soon(closed, core)
            await trio.testing.wait_all_tasks_blocked()
            await core.aclose()

    async def closed(core: RateThrottleCore) -> None:
        with pytest.raises(LimiterClosed):
            await core.acquire("key", cost=3)

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0.01))


def test_without_an_event_loop_it_says_so() -> None:
    core = RateThrottleCore(rules=[RULE])
    with pytest.raises(StopIteration):  # it need not wait
        core.acquire("key", cost=3).send(None)
    waits = core.acquire("key")
    with pytest.raises(RuntimeError, match="needs one of asyncio, or of trio"):
        waits.send(None)


# Parts


def test_calls_that_name_the_same_rules_stand_in_one_line() -> None:
    assert rules_of("a") == rules_of(("a",)) == rules_of(RateThrottleRule("a", 1, 1)) == rules_of({"a": 5}) == "a"
    assert rules_of(("a", "b")) == rules_of(["b", "a"]) == rules_of({"a": 1, "b": 7})
    assert rules_of(FirstOf("a", "b")) != rules_of(FirstOf("b", "a")) != rules_of(("a", "b"))
    # A decision has its parts in the order in which they were named.
    assert ask_of(("a", "b"), 2) == ask_of(("a", "b"), 2) != ask_of(("b", "a"), 2) != ask_of(("b", "a"), 1)
    assert ask_of({"a": 1, "b": 7}, 1) == ask_of({"a": 1, "b": 7}, 1) != ask_of({"a": 1, "b": 8}, 1)


def test_an_agenda_keeps_what_is_due_in_order_and_forgets_what_is_taken() -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    agenda: Agenda[int] = Agenda()
    model: dict[int, float] = {}
    for _ in range(3_000):
        thing = rng.randrange(50)
        if rng.random() < 0.6:
            model[thing] = rng.randrange(100)
            agenda.put(thing, model[thing])
        else:
            model.pop(thing, None)
            agenda.take(thing)
        at = rng.randrange(100)
        found = agenda.before(at)
        assert sorted(found) == sorted(thing for thing, due in model.items() if due < at)
        assert [model[thing] for thing in found] == sorted(model[thing] for thing in found)
        assert agenda.first() == min(model.values(), default=math.inf)
        assert len(agenda) == len(model)
