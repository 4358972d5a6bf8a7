"""Oracle, compiled core and script agree to the unit: Hypothesis, clocks that step both ways, rules that change."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from ratethrottle import RateThrottleRule
from tests.strategies import START_US, STRATEGIES, known_rules, random_step, rules, seeds
from tests.subjects import Core, Lua, Oracle

FIXED = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], print_blob=True)


@given(rule=rules, seed=seeds)
@settings(FIXED, max_examples=150)
def test_the_core_keeps_the_promise_that_the_oracle_reads_off_the_log(rule: RateThrottleRule, seed: int) -> None:
    rng, now, core, oracle = random.Random(seed), START_US + seed, Core(), Oracle()
    for _ in range(60):
        step = random_step(rng, rule)
        now += step.advance_us
        ours = core.check(rule.compiled, now, step.cost, consume=step.consume)
        assert ours == oracle.check(rule.compiled, now, step.cost, consume=step.consume)


@given(first=rules, second=rules, third=rules, seed=seeds)
@settings(FIXED, max_examples=80)
def test_core_and_script_agree_while_rules_change(any_redis: Any, first: RateThrottleRule, second: RateThrottleRule, third: RateThrottleRule, seed: int) -> None:
    rng, now, core, script = random.Random(seed), START_US + seed, Core(), Lua(any_redis)
    rule = first
    for _ in range(40):
        if rng.random() < 0.25:
            rule = rng.choice((first, second, third))
        step = random_step(rng, rule)
        now += step.advance_us
        ours = core.check(rule.compiled, now, step.cost, consume=step.consume)
        assert ours == script.check(rule.compiled, now, step.cost, consume=step.consume)
        stored = script.state(rule.compiled)
        assert stored is None or stored == core.state(rule.compiled)


@pytest.mark.parametrize("rule", known_rules(), ids=lambda rule: f"{rule.strategy}-{rule.limit}-{rule.window}-{rule.burst}")
def test_a_denied_call_becomes_allowed_exactly_at_the_instant_it_promised_not_one_microsecond_before(rule: RateThrottleRule) -> None:
    rng, now, core = random.Random(rule.limit), START_US, Core()
    denials = 0
    for _ in range(300):
        step = random_step(rng, rule, backwards=False)
        now += step.advance_us // 4
        allowed, _, retry_us, _ = core.check(rule.compiled, now, step.cost)
        if allowed:
            continue
        denials += 1
        assert not core.check(rule.compiled, now + retry_us - 1, step.cost, consume=False)[0]
        assert core.check(rule.compiled, now + retry_us, step.cost, consume=False)[0]
    assert denials


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_versions_of_a_rule_that_alternate_neither_refill_nor_lock_out(strategy: str) -> None:
    """Every admission is charged to both versions, so each keeps its own promise over all of them."""
    small = RateThrottleRule("rule", 10, 10, strategy=strategy).compiled
    large = RateThrottleRule("rule", 60, 20, strategy=strategy).compiled
    now, core, admitted = START_US, Core(), []
    rng = random.Random(7)
    for step in range(4000):
        now += rng.randrange(100_000)
        version = (small, large)[step % 2]
        if core.check(version, now, 1)[0]:
            admitted.append((now, version))
            if strategy == "sliding_window":
                recent = sum(at > now - version.window_us for at, _ in admitted)
                assert recent <= version.capacity
    assert len(admitted) > 300
    now += 2 * large.window_us
    assert core.check(small, now, 10)[0]
    now += 2 * large.window_us
    assert core.check(large, now, 60)[0]
    assert not core.check(small, now, 10)[0], "changing the rule gave a refill"


def test_a_change_of_strategy_carries_over_what_was_used() -> None:
    for before in STRATEGIES:
        for after in STRATEGIES:
            core = Core()
            assert core.check(RateThrottleRule("rule", 10, 60, strategy=before).compiled, START_US, 10)[0]
            assert not core.check(RateThrottleRule("rule", 10, 60, strategy=after).compiled, START_US, 1)[0]
