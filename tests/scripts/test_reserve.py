"""Charges and refunds: oracle, compiled core and script agree to the unit."""

from __future__ import annotations

import random
import re
from typing import Any

import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ratethrottle import RateThrottleRule
from ratethrottle.testing.manual import steered
from tests.kit.clocked import (
    BITS,
    EPOCH,
    EPOCH_KEY,
    ClockedScript,
    Correction,
    JointCheck,
    Part,
    PartAnswer,
    epoch_text,
    load,
    make_call,
    make_settlement,
    settled,
)
from tests.kit.strategies import START_US, STRATEGIES, calendar_rules, make_rule, rules
from tests.kit.subjects import Core, Lua, Oracle
from tests.scripts.test_agreement import costs, moved, moves, shapes, units

FIXED = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])

# What is done; by how much the clock moves first; how much; under which version; and which of the grants so far it gives back.
actions = st.sampled_from(("check", "check", "peek", "charge", "refund", "refund"))
plans = st.lists(st.tuples(actions, moves, costs, st.integers(0, 2), st.integers(0, 5)), min_size=2, max_size=40)


@given(
    versions=st.lists(rules | shapes | st.sampled_from(calendar_rules()), min_size=3, max_size=3),
    plan=plans,
    start_us=st.integers(START_US, START_US + 10**12),
)
@settings(FIXED, max_examples=200)
def test_all_subjects_agree_on_what_is_charged_and_given_back(
    redis_client: redis.Redis, versions: list[RateThrottleRule], plan: list[Any], start_us: int
) -> None:
    core, script = Core(), Lua(redis_client)
    subjects: list[Any] = [Oracle(), core, script]
    now_us, last = start_us, (start_us, start_us)
    granted: list[tuple[int, RateThrottleRule, int]] = []
    for action, move, cost, which, back in plan:
        rule = versions[which]
        now_us = moved(move, now_us, rule, last)
        amount = units(cost, rule)
        if action == "refund" and granted:
            then_us, rule, most = granted[-1 - back % len(granted)]
            expected, *others = [each.refund(rule.compiled, now_us, min(amount, most), then_us) for each in subjects]
        elif action == "charge":
            expected, *others = [each.charge(rule.compiled, now_us, min(10**9, amount * (1 + back))) for each in subjects]
        else:
            consume = action != "peek"
            expected, *others = [each.check(rule.compiled, now_us, amount, consume=consume) for each in subjects]
            if consume and expected[0]:
                granted.append((now_us, rule, amount))
        assert others == [expected] * len(others), action
        assert script.state(rule.compiled) in (None, core.state(rule.compiled)), "the states differ before a decision does"
        last = now_us + expected[2], now_us + expected[3]


SUBJECTS = ("oracle", "core", "script")


def subject(name: str, client: redis.Redis) -> Any:
    return {"oracle": Oracle, "core": Core, "script": lambda: Lua(client)}[name]()


@pytest.mark.parametrize("name", SUBJECTS)
def test_what_comes_back_after_more_than_a_window_remembers_is_nobody_elses(redis_client: redis.Redis, name: str) -> None:
    decides, rule = subject(name, redis_client), make_rule("sliding_window", 64, 10**6).compiled
    assert [decides.check(rule, START_US, 10)[:2] for _ in range(2)] == [(True, 54), (True, 44)]
    # Of 70 units, 60 are others'. The window has forgotten some of all that came in this µs.
    assert decides.charge(rule, START_US, 50)[:3] == (True, 0, 10**6)
    assert decides.refund(rule, START_US, 10, START_US)[1] <= 4
    assert not decides.check(rule, START_US, 5)[0]
    # Once that has left, it is as any other.
    later = START_US + 10**6
    assert decides.check(rule, later, 64)[:2] == (True, 0)
    assert decides.refund(rule, later, 30, later)[1] == 30


@pytest.mark.parametrize("name", SUBJECTS)
@pytest.mark.parametrize("limit", [32, 33, 40, 63, 64])
def test_no_window_grants_what_charges_and_other_checks_have_used(redis_client: redis.Redis, name: str, limit: int) -> None:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    rng, window_us = random.Random(seed), 1_000
    rule, other = (make_rule("sliding_window", each, window_us).compiled for each in (limit, 500))
    for _ in range(8 if name == "script" else 60):
        decides, now_us = subject(name, redis_client), START_US
        used: list[list[int]] = []  # instant, units that certainly count as used, and as many as may
        granted: list[list[int]] = []
        for _ in range(40):
            now_us += rng.choice((0, 0, 0, 0, 1, 1, 2, 100, 400))
            counts = sum(units for at_us, units, _ in used if at_us + window_us > now_us)
            units = rng.choice((1, 2, 5, rng.randint(1, limit)))
            match rng.choice(("check", "check", "charge", "refund", "refund", "other")):
                case "check":
                    if decides.check(rule, now_us, units)[0]:
                        assert counts + units <= limit, (now_us - START_US, used)
                        used.append([now_us, units, units])
                        granted.append(used[-1])
                case "charge":
                    # So many fit into a debt of one capacity, whatever hasn't come back. Another version may hold units a slot longer.
                    held = min(65, sum(most for at_us, _, most in used if at_us + window_us + 16 > now_us))
                    used.append([now_us, min(units, max(0, 2 * limit - held)), units])
                    decides.charge(rule, now_us, units)
                case "refund" if left := [grant for grant in granted if grant[1]]:
                    grant = rng.choice(left)
                    back = rng.randint(1, grant[1])
                    decides.refund(rule, now_us, back, grant[0])
                    grant[1] -= back
                case "other" if rng.random() < 0.1:  # another version of the service
                    if decides.check(other, now_us, 3 * units)[0]:
                        used.append([now_us, 3 * units, 3 * units])


@pytest.mark.parametrize("name", ["core", "script"])
@pytest.mark.parametrize("strategy", [*STRATEGIES, "calendar"])
def test_a_refund_of_which_nothing_comes_back_writes_nothing(redis_client: redis.Redis, strategy: str, name: str) -> None:
    windows: tuple[Any, ...] = ("day", "week", "month") if strategy == "calendar" else (10**8, 10**7, 10**9)
    rule, writer, new = (
        make_rule("fixed_window" if strategy == "calendar" else strategy, 100, window).compiled for window in windows
    )
    decides, day_us = subject(name, redis_client), 86_400 * 10**6
    assert decides.check(rule, START_US, 60)[0]
    assert decides.check(writer, START_US + 1, 5)[0]
    before = decides.state(rule)
    now_us, long_ago_us = START_US + 2, START_US - 100 * day_us
    # Of a grant that has left; after the clock was set back; and under a definition that the state doesn't know.
    for refunded, at_us, granted_us in (
        (rule, now_us, long_ago_us),
        (rule, now_us - 40 * day_us, long_ago_us),
        (new, now_us, START_US),
    ):
        assert decides.refund(refunded, at_us, 5, granted_us)[0]
        assert decides.state(rule) == before
    # What does come back is written, with its own view first.
    decides.refund(rule, now_us, 5, START_US)
    assert decides.state(rule) != before


NOW_US = START_US + 10_000_000


def ask(clocked: ClockedScript, *corrections: Correction, now_us: int = NOW_US) -> list[PartAnswer]:
    return settled(corrections, clocked.send(clocked.client, now_us, make_settlement(corrections, now_us)))[0]


def test_what_belongs_together_is_corrected_in_one_call(redis_client: redis.Redis) -> None:
    clocked = ClockedScript(redis_client)
    bucket, window = make_rule("token_bucket", 100, 10**8).compiled, make_rule("fixed_window", 10, 10**9).compiled
    clocked.call(NOW_US - 10**6, [(bucket, "a", 50), (window, "b", 5)])
    told = ask(clocked, Correction(bucket, "a", 30, NOW_US - 10**6), Correction(window, "b", 12), Correction(window, "c", 1))
    unit = bucket.unit_ticks
    assert [answer.took for answer in told] == [1, 1, 1]
    assert told[0].numbers == [1, 50 * unit - bucket.drain_ticks * 10**6 - (30 * unit - bucket.drain_ticks * 10**6)]
    assert [answer.numbers[:2] for answer in told[1:]] == [[0, 17], [1, 1]]


def test_nothing_is_corrected_if_one_of_it_is_unreadable(redis_client: redis.Redis) -> None:
    clocked = ClockedScript(redis_client)
    window = make_rule("fixed_window", 10, 10**9).compiled
    redis_client.set("b", "nonsense")
    told = ask(clocked, Correction(window, "a", 3), Correction(window, "b", 3), Correction(window, "c", 3))
    assert told == [PartAnswer(0, [-5]), PartAnswer(0, [-2]), PartAnswer(0, [-5])]
    assert [redis_client.get(key) for key in "abc"] == [None, b"nonsense", None]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_nothing_comes_back_of_what_was_granted_before_a_reset(redis_client: redis.Redis, strategy: str) -> None:
    clocked = ClockedScript(redis_client)
    rule = make_rule(strategy, 100, 10**8).compiled
    clocked.call(NOW_US, [(rule, "key", 60)])
    redis_client.evalsha(load(redis_client, steered("reset")), 2, EPOCH_KEY, "key", "id", EPOCH, 10**6, NOW_US + 1)
    clocked.call(NOW_US + 2, [(rule, "key", 60)])
    before = clocked.state("key")
    ((took, numbers),) = ask(clocked, Correction(rule, "key", 60, NOW_US), now_us=NOW_US + 2)
    assert (took, numbers[0], clocked.state("key")) == (1, 1, before)
    ask(clocked, Correction(rule, "key", 60, NOW_US + 2), now_us=NOW_US + 2)
    assert clocked.call(NOW_US + 2, [(rule, "key", 100)])[0][0]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_while_states_are_repaired_a_charge_counts_as_granted_since(redis_client: redis.Redis, strategy: str) -> None:
    clocked, rule = ClockedScript(redis_client), make_rule(strategy, 100, 10**8).compiled
    epoch = epoch_text(NOW_US - 10**6)
    redis_client.set(EPOCH_KEY, epoch)
    call = make_settlement([Correction(rule, "key", 300)])
    call.args[1] = epoch
    assert clocked.send(redis_client, NOW_US, call)[2] == 1
    state = clocked.state("key")
    redis_client.set(EPOCH_KEY, EPOCH)
    assert state is not None
    # Only what is counted, up to a debt of one capacity.
    assert re.match(rb"1e\d{16},\d+,200(?!\d)", state)


def corrected(number: int, value: object) -> list[Any]:
    """The arguments of two charges of a key each, of which one number is replaced."""
    window = make_rule("fixed_window", 10, 10**9).compiled
    call = make_settlement([Correction(window, "a", 3), Correction(window, "b", 3)])
    call.args[number - 10] = value
    return call.args


@pytest.mark.parametrize(
    ("number", "value", "words"),
    [
        (2, 0, "out of range"),
        (3, 0, "out of range"),
        (3, 2, "out of range"),
        (4, 2, "does not fit"),
        (4, 9, "does not fit"),
        (4, 24, "does not fit"),
        (4, 0, "does not fit"),
        (9, 1, "does not fit"),
        (9, 13, "does not fit"),
        (9, 11, "does not fit"),
        (8, 5, "out of range"),
    ],
)
def test_malformed_corrections_are_refused(redis_client: redis.Redis, number: int, value: object, words: str) -> None:
    clocked = ClockedScript(redis_client)
    call = make_settlement([])._replace(keys=["a", "b"], args=corrected(number, value))
    with pytest.raises(redis.ResponseError, match=words):
        clocked.send(redis_client, NOW_US, call)
    assert not redis_client.exists("a", "b")


def test_a_peek_corrects_nothing(redis_client: redis.Redis) -> None:
    clocked = ClockedScript(redis_client)
    call = make_settlement([])._replace(keys=["a", "b"], args=["peek_joint", *corrected(2, 3)[1:]])
    with pytest.raises(redis.ResponseError, match="does not fit"):
        clocked.send(redis_client, NOW_US, call)


def test_corrections_stand_behind_joint_checks_of_their_keys(redis_client: redis.Redis) -> None:
    clocked, window = ClockedScript(redis_client), make_rule("fixed_window", 10, 10**9).compiled
    check = JointCheck([[Part(window, "a", 4)], [Part(window, "b", 4)]])
    call = make_call([], joints=[check, check, check])
    place = len(call.args) - 10
    call.args[place : place + 5] = [1, 1, 3, 1, BITS["charge"]]
    call.args[place + 5 : place + 10] = [2, 1, 2, NOW_US, BITS["refund"] + BITS["joined"]]
    reply = clocked.send(redis_client, NOW_US, call)
    told, _ = settled([Correction(window, key, 0) for key in "ababab"], reply)
    assert [answer.took for answer in told] == [1, 1, 1, 1, 1, 1]
    assert [answer.numbers[1] for answer in told] == [4, 4, 8, 8, 11, 6]
