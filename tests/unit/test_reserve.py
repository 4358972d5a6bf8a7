"""What a user charges, reserves and settles. In memory."""

from __future__ import annotations

import asyncio
import logging
import math
import pickle
from collections.abc import Mapping
from typing import Any

import pytest
import trio

from ratethrottle import (
    CostExceedsLimit,
    FirstOf,
    InMemoryStorage,
    InvalidRequest,
    LimiterClosed,
    RateLimitExceeded,
    RateThrottleCore,
    RateThrottleRule,
)
from ratethrottle.events import Event, UnsettledReservation
from ratethrottle.testing import ManualClock

TOKENS = RateThrottleRule("tokens", 1000, 100, strategy="token_bucket")  # 10 a second
REQUESTS = RateThrottleRule("requests", 5, 60)
DAILY = RateThrottleRule("daily", 100, 3600, strategy="fixed_window")
SOFT = RateThrottleRule("soft", 10, 60, enforce="flag")
OFF = RateThrottleRule("off", 10, 60, enforce="off")
NONE = RateThrottleRule("none", 0, 60)
BOTH = {"requests": 1, "tokens": 400}


class World:
    """A limiter on a clock of the test's own."""

    def __init__(self, **options: Any) -> None:
        self.clock = ManualClock()
        rules = [TOKENS, REQUESTS, DAILY, SOFT, OFF, NONE]
        self.limiter = RateThrottleCore(InMemoryStorage(clock_us=self.clock, **options), rules=rules)
        self.heard: list[Event] = []
        self.limiter.on_event(self.heard.append)

    async def left(self, rule: str, key: str = "key") -> int:
        return (await self.limiter.peek(key, rule, cost=0)).remaining


@pytest.fixture
def world() -> World:
    return World()


# Charges:


async def test_a_charge_counts_what_is_there_and_then_a_debt(world: World) -> None:
    charge = world.limiter.charge
    first = await charge("key", "tokens", cost=700)
    assert (first.allowed, first.over, first.remaining, first.retry_after) == (True, False, 300, 0.0)
    second = await charge("key", "tokens", cost=900)
    assert (second.allowed, bool(second), second.over, second.remaining) == (True, True, True, 0)
    assert (second.retry_after, second.reset_after, second.cost) == (60.0, 160.0, 900)
    assert second.headers()["RateLimit"] == '"tokens";r=0;t=160'
    assert "Retry-After" not in second.headers()
    assert pickle.loads(pickle.dumps(second)) == second
    assert repr(second).startswith("<Decision over rule='tokens' cost=900 remaining=0 ")
    world.clock.advance(60)
    assert not await world.limiter.check("key", "tokens")
    world.clock.advance(0.1)
    assert await world.limiter.check("key", "tokens")


async def test_a_debt_is_at_most_one_capacity(world: World) -> None:
    for cost in (10**9, 5_000, 1):
        decision = await world.limiter.charge("key", "tokens", cost=cost)
        assert (decision.retry_after, decision.reset_after) == (100.0, 200.0)


@pytest.mark.parametrize("strategy", ["sliding_window", "fixed_window", "sliding_counter"])
async def test_what_a_window_is_charged_leaves_with_it(world: World, strategy: Any) -> None:
    rule = RateThrottleRule("window", 100, 60, strategy=strategy)
    decision = await world.limiter.charge("key", rule, cost=130)
    assert (decision.over, decision.remaining) == (True, 0)
    assert decision.retry_after == (60.9375 if strategy == "sliding_window" else 60.0)
    world.clock.advance(decision.retry_after)
    if strategy == "sliding_counter":  # it counts no window as more than full
        world.clock.advance(60)
    assert await world.limiter.check("key", rule, cost=100)


async def test_several_rules_are_charged_each_its_own(world: World) -> None:
    decision = await world.limiter.charge("key", {"tokens": 50, "requests": 7, "off": 3})
    assert (decision.rule, decision.over, decision.cost) == ("requests", True, 7)
    assert [(part.rule, part.over, part.remaining) for part in decision.parts] == [
        ("tokens", False, 950),
        ("requests", True, 0),
        ("off", False, 10),
    ]
    assert [part.cost for part in (await world.limiter.charge("key", ("tokens", "daily"), cost=2)).parts] == [2, 2]
    assert (await world.left("tokens"), await world.left("daily")) == (948, 98)
    full = await world.limiter.charge("key", {"daily": 98, "requests": 1})
    assert (full.rule, full.over) == ("requests", True), "of two with nothing left the one in debt binds"
    assert full.parts[0].over is False


@pytest.mark.parametrize("first", ["tokens", "requests", "none"])
async def test_of_several_debts_the_longest_binds(world: World, first: str) -> None:
    costs = {"tokens": 1100, "requests": 7, "daily": 1}  # in debt for 10 s, and for 60
    decision = await world.limiter.charge("key", {first: costs.get(first, 1)} | costs)
    debts = {part.rule: part.retry_after for part in decision.parts if part.over}
    assert {name: debts[name] for name in ("tokens", "requests")} == {"tokens": 10.0, "requests": 60.0}
    assert (decision.rule, decision.retry_after) == (("none", math.inf) if first == "none" else ("requests", 60.0))


async def test_rules_that_only_flag_are_charged_and_others_say_what_they_can(world: World) -> None:
    assert not (await world.limiter.charge("key", "soft", cost=10)).over
    assert (await world.limiter.charge("key", "soft", cost=1)).over
    assert (await world.limiter.check("key", "soft")).over
    off = await world.limiter.charge("key", "off", cost=10**6)
    assert (off.allowed, off.over, off.remaining) == (True, False, 10)
    none = await world.limiter.charge("key", "none", cost=3)
    assert (none.allowed, none.over, none.remaining, none.retry_after) == (True, True, 0, float("inf"))


async def test_charges_are_counted_as_allowed(world: World) -> None:
    await world.limiter.charge("key", "tokens", cost=3000)
    await world.limiter.charge("key", {"tokens": 1, "daily": 1})
    counted = world.limiter.statistics().decisions
    assert [counted[name]["memory"].allowed for name in ("tokens", "daily")] == [2, 1]
    assert counted["tokens"]["memory"].denied == 0


@pytest.mark.parametrize(
    ("key", "rule", "options", "words"),
    [
        ("key", "tokens", {"cost": 0}, "from 1 to"),
        ("key", "tokens", {"cost": -1}, "from 1 to"),
        ("key", "tokens", {"cost": 10**9 + 1}, "from 1 to 1,000,000,000"),
        ("key", "tokens", {"cost": 1.5}, "float"),
        ("key", "tokens", {"cost": True}, "True"),
        ("key", {"tokens": 1, "daily": 0}, {}, "from 1 to"),
        ("key", {"tokens": 1}, {"cost": 2}, "leave cost out"),
        ("key", {}, {}, "names no rule"),
        ("key", ("tokens", "tokens"), {}, "named twice"),
        ("key", FirstOf("tokens", "daily"), {}, "FirstOf"),
        ("key", ("requests", FirstOf("tokens", "daily")), {}, "FirstOf"),
        ("key", "unknown", {}, "no such rule"),
        ("key", None, {}, "several rules"),
        ("key", {"tokens", "daily"}, {}, "set"),
        ("", "tokens", {}, "empty"),
        (5, ("tokens", "daily"), {}, "int"),
    ],
)
async def test_a_bad_charge_consumes_nothing(world: World, key: Any, rule: Any, options: Any, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        await world.limiter.charge(key, rule, **options)
    assert [await world.left(name) for name in ("tokens", "daily", "requests")] == [1000, 100, 5]


async def test_a_full_table_that_keeps_its_keys_counts_no_charge_of_a_new_one() -> None:
    world = World(max_keys=1, on_full="deny")
    assert await world.limiter.check("one", "tokens", cost=1000)
    decision = await world.limiter.charge("other", "tokens")
    assert (decision.allowed, decision.over, decision.retry_after) == (True, True, 100.0)
    assert world.limiter.statistics().charges_lost == 1
    world.clock.advance(100)
    assert (await world.limiter.charge("other", "tokens")).remaining == 999
    assert world.limiter.statistics().charges_lost == 1


# Reservations:


async def test_what_was_not_used_comes_back(world: World) -> None:
    async with world.limiter.reserve("key", BOTH) as reservation:
        assert reservation.decision.allowed
        assert [part.rule for part in reservation.decision.parts] == ["requests", "tokens"]
        assert await world.left("tokens") == 600
        reservation.settle({"tokens": 150})
        assert await world.left("tokens") == 600, "it is sent when the block ends"
    assert (await world.left("tokens"), await world.left("requests")) == (850, 4)
    assert not world.heard


async def test_what_was_used_beyond_is_charged(world: World) -> None:
    async with world.limiter.reserve("key", "tokens", cost=900) as reservation:
        assert reservation.decision.parts == ()
        assert reservation.decision.remaining == 100
        reservation.settle(1500)
    assert (await world.limiter.peek("key", "tokens")).retry_after == 50.1


async def test_what_comes_back_is_less_the_older_it_is(world: World) -> None:
    async with world.limiter.reserve("key", "tokens", cost=400) as reservation:
        world.clock.advance(15)
        assert await world.left("tokens") == 750
        reservation.settle(0)
    assert await world.left("tokens") == 1000
    # What the limit has let go meanwhile doesn't come back a second time.
    async with world.limiter.reserve("key", "tokens", cost=400) as reservation:
        world.clock.advance(40)
        assert await world.limiter.check("key", "tokens", cost=1000)
        reservation.settle(0)
    assert await world.left("tokens") == 0


@pytest.mark.parametrize("strategy", ["sliding_window", "fixed_window", "sliding_counter"])
async def test_to_a_window_it_comes_back_while_that_counts_it(world: World, strategy: Any) -> None:
    world.limiter.add_rule(RateThrottleRule("window", 10, 60, strategy=strategy))
    for passed_s, left in ((59, 10), (63 if strategy == "sliding_window" else 60, 3)):
        async with world.limiter.reserve("key", "window", cost=8) as reservation:
            world.clock.advance(passed_s)
            if passed_s != 59:  # what counts now is another's
                await world.limiter.charge("key", "window", cost=7)
            reservation.settle(0)
        # A counter still has a 60th of the 8 units in the window before.
        assert await world.left("window") == (2 if strategy == "sliding_counter" and left == 3 else left)
        world.clock.advance(120)


async def test_a_reservation_waits_in_line(world: World) -> None:
    order: list[str] = []

    async def reserve(name: str, rule: Any, cost: int, timeout: float | None) -> None:
        async with world.limiter.reserve("key", rule, cost=cost, timeout=timeout) as reservation:
            order.append(name)
            reservation.settle(cost)

    async def acquire(name: str, cost: int) -> None:
        await world.limiter.acquire("key", "tokens", cost=cost)
        order.append(name)

    await world.limiter.charge("key", "tokens", cost=1000)
    tasks = [
        asyncio.create_task(reserve("large", "tokens", 500, None)),
        asyncio.create_task(acquire("small", 1)),
        asyncio.create_task(reserve("one", "tokens", 20, 60)),
        asyncio.create_task(reserve("other", ("tokens",), 20, 60)),
    ]
    await world.clock.elapse(49.9)
    assert order == []
    await world.clock.elapse(4.2)
    assert order == ["large", "small", "one", "other"]
    await asyncio.gather(*tasks)
    world.limiter.add_rule(RateThrottleRule("tokens", 1000, 500, strategy="token_bucket"), replace=True)
    with pytest.raises(RateLimitExceeded) as caught:
        await reserve("late", "tokens", 1000, 0.5)
    assert caught.value.decision.rule == "tokens"
    assert len(order) == 4


async def test_the_only_rule_has_one_line(world: World) -> None:
    limiter = RateThrottleCore(InMemoryStorage(clock_us=world.clock), rules=[TOKENS])
    await limiter.charge("key", cost=1000)
    first = asyncio.create_task(limiter.acquire("key", cost=10))
    await world.clock.settle()

    async def work() -> None:
        async with limiter.reserve("key", cost=10, timeout=None) as reservation:
            assert first.done()
            reservation.settle(10)

    second = asyncio.create_task(work())
    await world.clock.elapse(2)
    await asyncio.gather(first, second)


@pytest.mark.parametrize("ends", ["granted", "cancelled", "late"])
async def test_two_tasks_do_not_enter_one_reservation(world: World, ends: str) -> None:
    await world.limiter.charge("key", "tokens", cost=1000)
    # Of several limits nothing is booked, so that somebody else may still be quicker.
    limits = {"tokens": 400, "requests": 1} if ends == "late" else {"tokens": 400}
    reservation = world.limiter.reserve("key", limits, timeout=50)

    async def work() -> None:
        async with reservation:
            reservation.settle({"tokens": 300})

    first = asyncio.create_task(work())
    await world.clock.settle()
    with pytest.raises(InvalidRequest, match="entered once"):
        await work()
    assert repr(reservation) == "<Reservation waiting>"
    if ends == "granted":
        await world.clock.elapse(40)
        await first
        assert await world.left("tokens") == 100
        return
    if ends == "late":
        await world.clock.elapse(30)
        await world.limiter.charge("key", "tokens", cost=1000)
        await world.clock.elapse(20)
    else:
        first.cancel()
    with pytest.raises((asyncio.CancelledError, RateLimitExceeded)):
        await first
    # Nothing is reserved, so that it may be entered again.
    await world.limiter.reset("key", "tokens")
    world.clock.advance(1)
    await work()
    assert await world.left("tokens") == 700


async def test_a_denied_reservation_runs_no_block(world: World) -> None:
    async with world.limiter.reserve("key", "tokens", cost=1000) as reservation:
        reservation.settle(1000)
    with pytest.raises(RateLimitExceeded) as caught:
        async with world.limiter.reserve("key", BOTH):
            pytest.fail("the block ran")
    assert (caught.value.decision.rule, len(caught.value.decision.parts)) == ("tokens", 2)
    with pytest.raises(RateLimitExceeded) as caught:
        async with world.limiter.reserve("key", "tokens"):
            pytest.fail("the block ran")
    assert caught.value.decision.parts == ()
    assert await world.left("requests") == 5


async def test_what_pays_of_alternatives_is_settled(world: World) -> None:
    either = FirstOf("tokens", "daily")
    await world.limiter.charge("key", "tokens", cost=950)
    for name in (either, "daily", "tokens"):
        async with world.limiter.reserve("key", (either, "requests"), cost=3) as reservation:
            assert reservation.decision.parts[0].rule == "tokens"
            reservation.settle({name: 1, "requests": 0})
    assert (await world.left("tokens"), await world.left("daily"), await world.left("requests")) == (47, 100, 5)
    async with world.limiter.reserve("key", either, cost=50) as reservation:
        assert reservation.decision.rule == "daily"
        reservation.settle(2)
    assert (await world.left("tokens"), await world.left("daily")) == (47, 98)


async def test_nothing_comes_back_of_what_was_not_taken(world: World) -> None:
    await world.limiter.charge("key", "soft", cost=8)
    async with world.limiter.reserve("key", ("soft", "off"), cost=5) as reservation:
        assert reservation.decision.parts[0].over
        reservation.settle(0)
    async with world.limiter.reserve("key", "soft", cost=5) as reservation:
        assert reservation.decision.over
        reservation.settle(9)
    assert await world.left("soft") == 2


async def test_to_settle_again_does_nothing_and_otherwise_raises(world: World) -> None:
    async with world.limiter.reserve("key", BOTH) as reservation:
        reservation.settle({"tokens": 150})
        reservation.settle({"tokens": 150, "requests": 1})
        with pytest.raises(InvalidRequest, match="other units"):
            reservation.settle({"tokens": 151})
    with pytest.raises(InvalidRequest, match="after the block"):
        reservation.settle({"tokens": 150})
    assert await world.left("tokens") == 850


BAD_UNITS: list[tuple[Any, str]] = [
    (5, "costs of their own"),
    ({"tokens": -1}, "from 0 to 2,000"),
    ({"tokens": 2001}, "from 0 to 2,000"),
    ({"tokens": 1.5}, "float"),
    ({"tokens": True}, "True"),
    ({"daily": 1}, "settle names 'daily', of which nothing is reserved; reserved are requests, tokens"),
    ({"token": 1}, "settle names 'token', of which nothing is reserved; reserved are tokens, requests"),
    ({"tokens": 1, "unknown": 1}, "reserved are"),
]


@pytest.mark.parametrize("on_error", ["keep", "refund"])
@pytest.mark.parametrize(("units", "words"), BAD_UNITS)
async def test_bad_units_are_refused_and_the_estimate_stays(world: World, units: Any, words: str, on_error: Any) -> None:
    with pytest.raises(InvalidRequest, match=words):
        async with world.limiter.reserve("key", BOTH, on_error=on_error) as reservation:
            reservation.settle(units)
    assert await world.left("tokens") == 600


@pytest.mark.parametrize(
    "other", [FirstOf("tokens", "requests"), FirstOf("tokens", "daily", "requests"), FirstOf("requests", "tokens")]
)
async def test_another_choice_than_the_one_reserved_is_refused(world: World, other: FirstOf) -> None:
    with pytest.raises(InvalidRequest, match="a FirstOf that nothing is reserved of; reserved are daily, requests, tokens"):
        async with world.limiter.reserve("key", (FirstOf("tokens", "daily"), "requests"), cost=3) as reservation:
            reservation.settle({other: 1})
    async with world.limiter.reserve("key", FirstOf("tokens", DAILY), cost=3) as reservation:
        reservation.settle({FirstOf("tokens", "daily"): 1})
    assert await world.left("tokens") == 996


async def test_two_rules_of_one_choice_are_not_both_settled(world: World) -> None:
    with pytest.raises(InvalidRequest, match="two rules of one FirstOf"):
        async with world.limiter.reserve("key", FirstOf("tokens", "daily")) as reservation:
            reservation.settle({"tokens": 1, "daily": 1})


async def test_bad_reservations_are_refused_and_consume_nothing(world: World) -> None:
    wrong: Any = "keep it"
    with pytest.raises(InvalidRequest, match="timeout"):
        world.limiter.reserve("key", "tokens", timeout=-1)
    with pytest.raises(InvalidRequest, match="timeout"):
        world.limiter.reserve("key", "tokens", timeout=float("nan"))
    with pytest.raises(InvalidRequest, match='"keep" or "refund"'):
        world.limiter.reserve("key", "tokens", on_error=wrong)
    for rule, cost in (("tokens", -1), ("tokens", 0), ("unknown", 1), ((), 1), (("tokens", "tokens"), 1)):
        with pytest.raises(InvalidRequest):
            async with world.limiter.reserve("key", rule, cost=cost):
                pytest.fail("the block ran")
    with pytest.raises(CostExceedsLimit):
        async with world.limiter.reserve("key", "tokens", cost=1001):
            pytest.fail("the block ran")
    reservation = world.limiter.reserve("key", "tokens")
    with pytest.raises(InvalidRequest, match="before the block"):
        reservation.settle(1)
    with pytest.raises(InvalidRequest, match="nothing is reserved yet"):
        _ = reservation.decision
    async with reservation:
        reservation.settle(1)
    with pytest.raises(InvalidRequest, match="entered once"):
        async with reservation:
            pytest.fail("the block ran")
    assert await world.left("tokens") == 999
    await world.limiter.aclose()
    with pytest.raises(LimiterClosed):
        async with world.limiter.reserve("key", "tokens"):
            pytest.fail("the block ran")
    with pytest.raises(LimiterClosed):
        await world.limiter.charge("key", "tokens")


@pytest.mark.parametrize(("on_error", "settles", "left"), [("keep", False, 600), ("refund", False, 1000), ("refund", True, 800)])
async def test_an_exception_keeps_or_gives_back(world: World, on_error: Any, settles: bool, left: int) -> None:
    async def work() -> None:
        async with world.limiter.reserve("key", "tokens", cost=400, on_error=on_error) as reservation:
            if settles:
                reservation.settle(200)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await work()
    assert await world.left("tokens") == left
    assert not world.heard


async def test_a_block_that_is_cancelled_still_settles(world: World) -> None:
    entered = asyncio.Event()

    async def work(units: int | None) -> None:
        async with world.limiter.reserve("key", "tokens", cost=400, on_error="refund") as reservation:
            if units is not None:
                reservation.settle(units)
            entered.set()
            await asyncio.Event().wait()

    for units, left in ((100, 900), (None, 900)):
        task = asyncio.create_task(work(units))
        await entered.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        entered.clear()
        assert await world.left("tokens") == left


async def test_a_generator_that_is_closed_in_its_block_still_settles(world: World) -> None:
    async def words() -> Any:
        async with world.limiter.reserve("key", "tokens", cost=400) as reservation:
            reservation.settle(10)
            yield "word"

    generator = words()
    assert await anext(generator) == "word"
    await generator.aclose()
    assert await world.left("tokens") == 990


async def test_what_is_never_settled_is_warned_of_once_for_each_place(world: World, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "ratethrottle")
    for _ in range(3):
        async with world.limiter.reserve("secret", "tokens"):
            pass
    async with world.limiter.reserve("secret", "tokens"):
        pass
    assert await world.left("tokens", "secret") == 996
    places = [event.place for event in world.heard if isinstance(event, UnsettledReservation)]
    assert [place.rpartition(":")[0] for place in places] == [__file__] * 2
    assert len(set(places)) == len(places) == len(world.heard)
    assert len(caplog.messages) == 2
    assert "never settled" in caplog.text
    assert "secret" not in caplog.text


async def test_in_memory_a_block_settles_also_after_its_limiter(world: World) -> None:
    other = RateThrottleCore(world.limiter._storage, rules=[TOKENS])
    for early in (True, False):
        limiter = RateThrottleCore(world.limiter._storage, rules=[TOKENS])
        async with limiter.reserve("key", cost=400) as reservation:
            if early:
                reservation.settle(100)
            await limiter.aclose()
            assert (await other.peek("key", cost=0)).remaining == (900 if early else 500)
            reservation.settle(100)
        assert (await other.peek("key", cost=0)).remaining == (900 if early else 800)
    assert not world.heard


async def test_nothing_comes_back_after_a_reset(world: World) -> None:
    async with (
        world.limiter.reserve("key", "tokens", cost=400) as reservation,
        world.limiter.reserve("other", "tokens", cost=400) as other,
    ):
        world.clock.advance(1)
        await world.limiter.reset("key", "tokens")
        assert await world.limiter.check("key", "tokens", cost=1000)
        reservation.settle(0)
        other.settle(0)
    assert (await world.left("tokens"), await world.left("tokens", "other")) == (0, 1000)


async def test_nothing_comes_back_to_a_key_that_was_evicted_or_may_have_been() -> None:
    world = World(max_keys=8)
    async with world.limiter.reserve("key", "tokens", cost=1) as reservation:
        world.clock.advance(0.01)
        for i in range(2_000):  # more than the table remembers
            await world.limiter.check(f"key {i}", "tokens", cost=1000)
        world.clock.advance(0.01)
        await world.limiter.reset("key 1999", "tokens")
        await world.limiter.charge("key", "tokens", cost=1000)
        reservation.settle(0)
    assert await world.left("tokens") == 0


async def test_a_rule_that_was_replaced_takes_nothing_back_for_the_old_one(world: World) -> None:
    async with world.limiter.reserve("key", "tokens", cost=400) as reservation:
        world.limiter.add_rule(RateThrottleRule("tokens", 1000, 500, strategy="token_bucket"), replace=True)
        assert await world.limiter.check("key", "tokens", cost=600)
        reservation.settle(0)
    assert await world.left("tokens") == 0


def test_it_works_under_trio() -> None:
    async def main() -> None:
        world = World()
        async with world.limiter.reserve("key", BOTH) as reservation:
            reservation.settle({"tokens": 1})
        await world.limiter.charge("key", "tokens", cost=2)
        assert await world.left("tokens") == 997

    trio.run(main)


async def test_settlements_are_no_decisions(world: World) -> None:
    for used in (0, 800):
        async with world.limiter.reserve("key", "tokens", cost=400) as reservation:
            reservation.settle(used)
    counted: Mapping[str, Any] = world.limiter.statistics().decisions["tokens"]
    assert (counted["memory"].allowed, counted["memory"].denied) == (2, 0)


@pytest.mark.parametrize("limits", ["daily", ("daily", "tokens")])
async def test_those_who_wait_for_what_comes_back_need_not_wait_longer(world: World, limits: Any) -> None:
    order: list[str] = []

    async def acquire(name: str, cost: int) -> None:
        await world.limiter.acquire("key", limits, cost=cost)
        order.append(name)

    async with world.limiter.reserve("key", "daily", cost=100) as reservation:
        tasks = [asyncio.create_task(acquire(name, cost)) for name, cost in (("first", 50), ("second", 20), ("third", 20))]
        elsewhere = asyncio.create_task(world.limiter.acquire("other", "daily", cost=1))
        await world.clock.settle()
        assert order == []
        reservation.settle(30)
    await world.clock.settle()
    assert order == ["first", "second"]
    assert await elsewhere
    # A reset lets them go on as well.
    await world.limiter.reset("key", "daily")
    await world.clock.settle()
    assert order == ["first", "second", "third"]
    await asyncio.gather(*tasks)
    assert len(world.limiter._lines) == 0
