"""Charges and refunds: oracle, compiled core and script agree to the unit."""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ratethrottle import RateThrottleRule
from tests.kit.strategies import START_US, rules
from tests.kit.subjects import Core, Oracle
from tests.scripts.test_agreement import costs, moved, moves, shapes, units

FIXED = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])

# What is done; by how much the clock moves first; how much; under which version; and which of the grants so far it gives back.
actions = st.sampled_from(("check", "check", "peek", "charge", "refund", "refund"))
plans = st.lists(st.tuples(actions, moves, costs, st.integers(0, 2), st.integers(0, 5)), min_size=2, max_size=40)


@given(versions=st.lists(rules | shapes, min_size=3, max_size=3), plan=plans, start_us=st.integers(START_US, START_US + 10**12))
@settings(FIXED, max_examples=200)
def test_all_subjects_agree_on_what_is_charged_and_given_back(
    versions: list[RateThrottleRule], plan: list[Any], start_us: int
) -> None:
    subjects: list[Any] = [Oracle(), Core()]
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
            expected, *others = [each.charge(rule.compiled, now_us, amount * (1 + back)) for each in subjects]
        else:
            consume = action != "peek"
            expected, *others = [each.check(rule.compiled, now_us, amount, consume=consume) for each in subjects]
            if consume and expected[0]:
                granted.append((now_us, rule, amount))
        assert others == [expected] * len(others), action
        last = now_us + expected[2], now_us + expected[3]
