"""Charges and refunds: oracle, compiled core and script agree to the unit."""

from __future__ import annotations

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
