"""Bookings: oracle, compiled core and script agree to the unit on what is granted for later, and on whose turn it is when."""

from __future__ import annotations

from typing import Any

import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ratethrottle import RateThrottleRule
from ratethrottle._engine.bookings import read_booking
from ratethrottle.testing.manual import steered
from tests.kit.clocked import EPOCH, EPOCH_KEY, Booking, ClockedScript, ClockedServer, PartAnswer, load, make_bookings, settled
from tests.kit.strategies import START_US, calendar_rules, make_rule, rules
from tests.kit.subjects import Core, Lua, Oracle
from tests.scripts.test_agreement import costs, moved, moves, shapes, units

FIXED = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
BUCKETS = ("token_bucket", "leaky_bucket")
MINUTE_US = 60_000_000

# What is done; by how much the clock moves first; how much; under which version; how far ahead; which of the bookings it gives back.
actions = st.sampled_from(("book", "book", "book", "unbook", "unbook", "check", "peek", "charge", "refund"))
aheads = st.sampled_from((0, 1, 1_000, 10**6, MINUTE_US)) | st.integers(0, MINUTE_US)
plans = st.lists(st.tuples(actions, moves, costs, st.integers(0, 2), aheads, st.integers(0, 3)), min_size=2, max_size=40)
buckets = (rules | shapes).filter(lambda rule: rule.strategy in BUCKETS)


@given(
    versions=st.lists(buckets | buckets | rules | shapes | st.sampled_from(calendar_rules()), min_size=3, max_size=3),
    plan=plans,
    start_us=st.integers(START_US, START_US + 10**12),
)
@settings(FIXED, max_examples=200)
def test_all_subjects_agree_on_what_is_booked_and_given_back(
    redis_client: redis.Redis, versions: list[RateThrottleRule], plan: list[Any], start_us: int
) -> None:
    core, script = Core(), Lua(redis_client)
    subjects: list[Any] = [Oracle(), core, script]
    now_us, last = start_us, (start_us, start_us)
    booked: list[tuple[int, int, RateThrottleRule, int]] = []
    for action, move, cost, which, ahead_us, back in plan:
        rule = versions[which]
        now_us = moved(move, now_us, rule, last)
        amount = units(cost, rule)
        if action == "unbook" and booked:
            _, empty_us, rule, amount = booked.pop(-1 - back % len(booked))
            for each in subjects:
                each.unbook(rule.compiled, now_us, amount, empty_us)
            expected, *others = [each.check(rule.compiled, now_us, 1, consume=False) for each in subjects]
        elif action == "book" and rule.strategy in BUCKETS:
            expected, *others = [each.book(rule.compiled, now_us, amount, ahead_us) for each in subjects]
            if expected[0]:
                booked.append((now_us, now_us + expected[3], rule, amount))
        elif action == "refund" and booked:
            then_us, _, rule, most = booked[-1 - back % len(booked)]
            expected, *others = [each.refund(rule.compiled, now_us, min(amount, most), then_us) for each in subjects]
        elif action == "charge":
            expected, *others = [each.charge(rule.compiled, now_us, amount) for each in subjects]
        else:
            consume = action != "peek"
            expected, *others = [each.check(rule.compiled, now_us, amount, consume=consume) for each in subjects]
        assert others == [expected] * len(others), action
        assert script.state(rule.compiled) in (None, core.state(rule.compiled)), "the states differ before a decision does"
        last = now_us + expected[2], now_us + expected[3]


NOW_US = START_US + 10_000_000
TEN = RateThrottleRule("r", 10, 1, strategy="token_bucket", burst=3).compiled  # one in 0.1 s
EVENLY = RateThrottleRule("r", 10, 1, strategy="leaky_bucket", burst=3).compiled


def ask(clocked: ClockedScript, *bookings: Booking, now_us: int = NOW_US) -> list[PartAnswer]:
    return [settled([booking], clocked.send(clocked.client, now_us, make_bookings([booking])))[0][0] for booking in bookings]


def turns(booking: Booking, answer: PartAnswer) -> list[int | None]:
    """When it is whose turn, from now; None: denied."""
    evenly = booking.rule.strategy == "leaky_bucket"
    heard = [read_booking(booking.rule, answer.numbers, booking.units, evenly, place) for place in range(booking.count)]
    return [wait_us if allowed else None for allowed, _, wait_us, _ in heard]


@pytest.mark.parametrize(
    ("rule", "expected"),
    [(TEN, [0, 0, 0, 100_000, 200_000, 300_000, None, None]), (EVENLY, [0, 100_000, 200_000, 300_000, *[None] * 4])],
)
def test_equal_bookings_have_their_turns_one_after_the_other(redis_client: redis.Redis, rule: Any, expected: list[Any]) -> None:
    clocked = ClockedScript(redis_client)
    redis_client.delete("key")
    booking = Booking(rule, "key", 1, 300_000, 8)
    (answer,) = ask(clocked, booking)
    assert turns(booking, answer) == expected
    assert not clocked.call(NOW_US, [(rule, "key", 1)], "peek")[0][0]
    level = sum(wait_us is not None for wait_us in expected)
    assert clocked.call(NOW_US + 10**5, [(rule, "key", 1)], "peek")[0][2] == max(0, level - 3) * 10**5


def test_a_call_decides_bookings_of_a_key_in_order(redis_client: redis.Redis) -> None:
    clocked = ClockedScript(redis_client)
    redis_client.delete("key")
    bookings = [Booking(TEN, "key", units, 10**6, count) for units, count in ((3, 1), (1, 2), (2, 1))]
    told, _ = settled(bookings, clocked.send(redis_client, NOW_US, make_bookings(bookings)))
    assert [turns(booking, answer) for booking, answer in zip(bookings, told, strict=True)] == [
        [0],
        [10**5, 2 * 10**5],
        [4 * 10**5],
    ]


def test_what_nobody_has_booked_behind_comes_back(redis_client: redis.Redis) -> None:
    clocked = ClockedScript(redis_client)
    redis_client.delete("key")
    first, second = Booking(TEN, "key", 3, 10**6), Booking(TEN, "key", 1, 10**6)
    ask(clocked, first, second)
    empties_us = [NOW_US + 300_000, NOW_US + 400_000]
    for empty_us in empties_us:  # another one stands behind the first
        ask(clocked, Booking(TEN, "key", 1, empty_us=empty_us), now_us=NOW_US + 50_000)
    assert clocked.call(NOW_US + 50_000, [(TEN, "key", 1)], "peek")[0][2] == 50_000
    ask(clocked, Booking(TEN, "key", 3, empty_us=empties_us[0]), now_us=NOW_US + 60_000)
    assert redis_client.get("key") is None


def test_nothing_comes_back_of_what_was_booked_before_a_reset(redis_client: redis.Redis) -> None:
    clocked = ClockedScript(redis_client)
    redis_client.delete("key")
    ask(clocked, Booking(TEN, "key", 3, 10**6))
    redis_client.evalsha(load(redis_client, steered("reset")), 2, EPOCH_KEY, "key", "id", EPOCH, 10**6, NOW_US)
    ask(clocked, Booking(TEN, "key", 3, 10**6))
    before = clocked.state("key")
    ask(clocked, Booking(TEN, "key", 3, empty_us=NOW_US + 300_000))
    assert clocked.state("key") == before


@pytest.mark.parametrize("strategy", BUCKETS)
def test_what_does_not_fit_the_arithmetic_is_denied(redis_client: redis.Redis, strategy: str) -> None:
    rule = make_rule(strategy, 999_999_937, 3_600_000_000, 4_000_000).compiled
    subjects: list[Any] = [Oracle(), Core(), Lua(redis_client)]
    for _ in range(6):
        expected, *others = [each.book(rule, NOW_US, rule.capacity, MINUTE_US) for each in subjects]
        assert others == [expected, expected]


@pytest.mark.parametrize(
    ("number", "value", "words"),
    [
        (2, 0, "out of range"),
        (3, 0, "out of range"),
        (3, 1 << 20, "out of range"),
        (3, 1_000_001, "out of range"),
        (3, 1 + (60_000_001 << 20), "out of range"),
        (4, 0, "out of range"),
        (4, 33, "out of range"),
        (4, 96, "out of range"),
        (4, 129, "out of range"),
        (9, 1, "out of range"),
        (9, 3, "out of range"),
        (9, 9, "out of range"),
    ],
)
def test_malformed_bookings_are_refused(redis_client: redis.Redis, number: int, value: int, words: str) -> None:
    clocked = ClockedScript(redis_client)
    redis_client.delete("a", "b")
    call = make_bookings([Booking(TEN, "a", 1, 10), Booking(TEN, "b", 1, 10)])
    call.args[number - 10] = value
    with pytest.raises(redis.ResponseError, match=words):
        clocked.send(redis_client, NOW_US, call)
    assert not redis_client.exists("a", "b")


@pytest.mark.parametrize("rule", [TEN, EVENLY])
def test_what_is_booked_survives_a_loss_of_data(redis_client: redis.Redis, rule: Any) -> None:
    server = ClockedServer(redis_client, NOW_US - 1_000)
    booked = 40 * rule.unit_ticks  # more than a debt may be
    assert server.tell(NOW_US, rule, (booked, 0, 0)) == 1
    assert server.check(NOW_US, rule) == [0, booked]
    most = 2 * rule.capacity * rule.unit_ticks + MINUTE_US * rule.drain_ticks
    assert server.tell(NOW_US, rule, (most + 1, 0, 0)) == 1
    assert server.check(NOW_US, rule) == [0, most]


def test_only_buckets_are_booked(redis_client: redis.Redis) -> None:
    clocked = ClockedScript(redis_client)
    redis_client.delete("a")
    with pytest.raises(redis.ResponseError, match="only buckets"):
        ask(clocked, Booking(make_rule("fixed_window", 10, 10**6).compiled, "a", 1, 10))
    call = make_bookings([Booking(TEN, "a", 1, 10)])
    with pytest.raises(redis.ResponseError, match="does not fit"):
        clocked.send(redis_client, NOW_US, call._replace(args=["peek_joint", *call.args[1:]]))
    assert not redis_client.exists("a")


def test_an_unreadable_key_is_not_booked(redis_client: redis.Redis) -> None:
    clocked = ClockedScript(redis_client)
    redis_client.set("a", "nonsense")
    assert ask(clocked, Booking(TEN, "a", 1, 10), Booking(TEN, "a", 1, empty_us=0)) == [PartAnswer(0, [-2])] * 2
    assert redis_client.get("a") == b"nonsense"
