"""What a denial does is up to the rule: it denies, it only flags, or nothing is counted at all. In memory."""

from __future__ import annotations

import math
import pickle
import random

import pytest
from hypothesis import given, settings

from ratethrottle import (
    CostExceedsLimit,
    Decision,
    InMemoryStorage,
    InvalidRequest,
    Outcomes,
    RateThrottleCore,
    RateThrottleRule,
    Request,
)
from tests.kit.counted import counted
from tests.kit.strategies import START_US, random_step, rules, seeds


def numbers(decision: Decision) -> tuple[object, ...]:
    return decision.remaining, decision.retry_after_us, decision.reset_after_us, decision.source, decision.limit


@settings(max_examples=60)
@given(rule=rules, seed=seeds)
async def test_a_rule_that_flags_says_what_one_that_denies_would(rule: RateThrottleRule, seed: int) -> None:
    rng, now = random.Random(seed), [START_US]
    strict, lax = (
        RateThrottleCore(
            InMemoryStorage(clock_us=lambda: now[0]),
            rules=[RateThrottleRule("rule", rule.limit, rule.window, strategy=rule.strategy, burst=rule.burst, enforce=enforce)],
        )
        for enforce in ("deny", "flag")
    )
    for _ in range(40):
        step = random_step(rng, rule)
        now[0] += step.advance_us
        one, other = [
            await (core.check if step.consume else core.peek)("key", cost=step.cost) for core in (strict, lax)
        ]  # fmt: skip
        assert (one.allowed, one.over, bool(one)) == (not other.over, False, one.allowed)
        assert (other.allowed, bool(other)) == (True, True)
        assert numbers(one) == numbers(other)
        assert one.retry_after_exact == other.retry_after_exact
    assert strict.statistics().decisions == lax.statistics().decisions


async def test_a_decision_that_is_over_says_so_wherever_it_goes() -> None:
    core = RateThrottleCore(rules=[RateThrottleRule("api", 1, 60, enforce="flag")])
    granted, over = await core.check("key"), await core.check("key")
    assert (granted.over, over.over, granted.retry_after) == (False, True, 0.0)
    assert 59 < over.retry_after <= 60
    assert repr(granted).startswith("<Decision allowed rule='api' cost=1 remaining=0 ")
    assert repr(over).startswith("<Decision over rule='api' cost=1 remaining=0 ")
    assert over != granted
    twin = pickle.loads(pickle.dumps(over))
    assert (twin, twin.over, twin.allowed, hash(twin)) == (over, True, True, hash(over))
    assert over.headers() == {"RateLimit-Policy": '"api";q=1;w=60', "RateLimit": '"api";r=0;t=60'} == granted.headers()
    assert counted(core) == {"api": {"memory": Outcomes(1, 1)}}
    with pytest.raises(CostExceedsLimit):
        core.check("key", cost=2)


async def test_a_limit_of_0_that_flags_has_all_over() -> None:
    core = RateThrottleCore(rules=[RateThrottleRule("api", 0, 60, enforce="flag")])
    for over in (await core.check("key"), await core.peek("key", cost=5), *(await core.check_many(["key"]))):
        assert (over.allowed, over.over, over.remaining, over.retry_after) == (True, True, 0, math.inf)
        assert "Retry-After" not in over.headers()
    assert not (await core.peek("key", cost=0)).over
    assert counted(core) == {"api": {"memory": Outcomes(0, 2)}}


@pytest.mark.parametrize("strategy", ["sliding_window", "token_bucket", "leaky_bucket", "sliding_counter", "fixed_window"])
async def test_what_is_off_counts_nothing_and_keeps_what_was_used(strategy: str) -> None:
    on = RateThrottleRule("api", 3, 3600, strategy=strategy)
    off = RateThrottleRule("api", 3, 3600, strategy=strategy, enforce="off")
    core = RateThrottleCore(rules=[on, RateThrottleRule("other", 5, 60)])
    await core.check("key", "api", cost=2)
    core.add_rule(off, replace=True)
    for _ in range(5):
        for cost in (1, 3, 1_000_000_000):
            free = await core.check("key", "api", cost=cost)
            assert (free.allowed, free.over, free.remaining, free.limit, free.cost) == (True, False, 3, 3, cost)
            assert (free.retry_after, free.reset_after, free.source) == (0.0, 0.0, "memory")
        assert (await core.peek("key", "api", cost=0)).remaining == (await core.peek("key", "api", cost=4)).remaining == 3
    many = await core.check_many([Request("key", "api"), Request("key", "other"), Request("key", "api", 7)])
    assert [(decision.rule, decision.remaining) for decision in many] == [("api", 3), ("other", 4), ("api", 3)]
    assert counted(core) == {"api": {"memory": Outcomes(18, 0)}, "other": {"memory": Outcomes(1, 0)}}
    with pytest.raises(CostExceedsLimit, match="capacity of 1000000000"):
        core.check("key", "api", cost=1_000_000_001)
    for bad in ("", 5, ()):
        with pytest.raises(InvalidRequest):
            core.check(bad, "api")  # type: ignore[arg-type]  # that it is refused is the test
    core.add_rule(on, replace=True)
    assert (await core.peek("key", "api")).remaining == 1
    core.add_rule(off, replace=True)
    await core.reset("key", "api")
    core.add_rule(on, replace=True)
    assert (await core.peek("key", "api")).remaining == 3


async def test_alone_it_is_off_too_also_with_a_limit_of_0_and_can_be_turned_on() -> None:
    core = RateThrottleCore(rules=[RateThrottleRule("api", 0, 60, enforce="off")])
    assert [bool(await core.check("key")) for _ in range(3)] == [True] * 3
    assert (await core.check("key")).remaining == 0
    core.add_rule(RateThrottleRule("api", 1, 60), replace=True)
    assert [bool(await core.check("key")) for _ in range(2)] == [True, False]
    core.remove_rule("api")
    core.add_rule(RateThrottleRule("new", 1, 60))
    assert [bool(await core.check("key")) for _ in range(2)] == [True, False]


async def test_a_full_table_that_denies_flags_too() -> None:
    core = RateThrottleCore(InMemoryStorage(max_keys=1, on_full="deny"), rules=[RateThrottleRule("api", 1, 60, enforce="flag")])
    assert not (await core.check("one")).over
    assert (await core.check("other")).over
