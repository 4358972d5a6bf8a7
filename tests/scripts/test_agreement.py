"""Oracle, compiled core and script agree to the unit: clocks that step both ways, rules that change, strategies included.

`python -m tests.scripts.agree` does the same for millions of steps; here Hypothesis looks for the shortest ones. A failure prints
the blob that reproduces it.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ratethrottle import RateThrottleRule
from ratethrottle._engine.decision import read_answer
from tests.kit.strategies import START_US, STRATEGIES, known_rules, make_rule, random_step, rules
from tests.kit.subjects import Core, Lua, Oracle, Subject

# A fixture's server serves all examples of a test; each example has a key of its own.
WEEK_US = 7 * 86_400 * 10**6
FIXED = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])

# How the clock moves: by a share of the rule's window in thousandths, by a few µs, or to next to an instant that matters.
moves = st.one_of(
    st.tuples(st.just("share"), st.integers(-2_000, 3_000)),
    st.tuples(st.just("us"), st.integers(-3, 3)),
    st.tuples(st.sampled_from(("promise", "reset", "boundary", "slot", "eighth")), st.integers(-2, 1)),
)
costs = st.one_of(st.integers(1, 3), st.sampled_from(("all", "half", "third", "tenth")))
steps = st.lists(st.tuples(moves, costs, st.integers(0, 2), st.booleans() | st.just(True)), min_size=2, max_size=40)
shapes = st.builds(
    make_rule,
    st.sampled_from(STRATEGIES),
    st.sampled_from((1, 2, 5, 64, 65, 500, 10**6)),
    st.sampled_from((1_000, 64_001, 10**6, 60 * 10**6, WEEK_US)),
)


def moved(move: tuple[str, int], now_us: int, rule: RateThrottleRule, last: tuple[int, int]) -> int:
    """Where the clock goes; `last` is when the last check was promised to be allowed, and to be forgotten."""
    kind, by = move
    window_us = rule.window_us
    if kind == "share":
        return now_us + window_us * by // 1_000
    grain = window_us if kind == "boundary" else -(-window_us // 64)
    passed_us = 3 * WEEK_US // 7 if kind == "boundary" and window_us % WEEK_US == 0 else 0
    return {"us": now_us, "promise": last[0], "reset": last[1], "eighth": now_us - window_us // 8}.get(
        kind, now_us - (now_us + passed_us) % grain + grain
    ) + by


def units(cost: int | str, rule: RateThrottleRule) -> int:
    shares = {"all": 1, "half": 2, "third": 3, "tenth": 10}
    return min(rule.capacity, max(1, rule.capacity // shares[cost]) if isinstance(cost, str) else cost)


@given(versions=st.lists(rules | shapes, min_size=3, max_size=3), plan=steps, start_us=st.integers(START_US, START_US + 10**12))
@settings(FIXED, max_examples=120)
def test_all_subjects_agree_while_the_clock_steps_and_rules_change(
    redis_client: redis.Redis, versions: list[RateThrottleRule], plan: list[Any], start_us: int
) -> None:
    oracle, core, script = Oracle(), Core(), Lua(redis_client)
    now_us, last = start_us, (start_us, start_us)
    for move, cost, which, consume in plan:
        rule = versions[which]
        now_us = moved(move, now_us, rule, last)
        check = rule.compiled, now_us, units(cost, rule)
        expected = oracle.check(*check, consume=consume)
        last = now_us + expected[2], now_us + expected[3]
        assert core.check(*check, consume=consume) == expected
        assert script.check(*check, consume=consume) == expected
        assert script.state(rule.compiled) in (None, core.state(rule.compiled)), "the states differ before a decision does"


# Equal checks of one key, next to others of other costs, and now and then of another version.
groups = st.lists(st.tuples(costs, st.integers(1, 5), st.integers(0, 2)), min_size=1, max_size=4)
mixed = st.builds(lambda which, count: [(cost, count, which) for cost in (1, 2, 1)], st.integers(0, 2), st.integers(1, 5))
crowds = st.lists(st.tuples(moves, mixed | groups, st.booleans() | st.just(True)), min_size=2, max_size=15)


@given(versions=st.lists(rules | shapes, min_size=3, max_size=3), plan=crowds, start_us=st.integers(START_US, START_US + 10**12))
@settings(FIXED, max_examples=60)
def test_an_entry_of_n_is_n_entries_of_one_to_the_unit(
    redis_client: redis.Redis, versions: list[RateThrottleRule], plan: list[Any], start_us: int
) -> None:
    oracle, core, script, single = Oracle(), Core(), Lua(redis_client), Lua(redis_client)
    now_us, last = start_us, (start_us, start_us)
    for move, crowd, consume in plan:
        now_us = moved(move, now_us, versions[crowd[0][2]], last)
        checks = [(versions[which], units(cost, versions[which])) for cost, count, which in crowd for _ in range(count)]
        expected = [oracle.check(rule.compiled, now_us, cost, consume=consume) for rule, cost in checks]
        assert [core.check(rule.compiled, now_us, cost, consume=consume) for rule, cost in checks] == expected
        last = now_us + expected[-1][2], now_us + expected[-1][3]
        mode, state = "check" if consume else "peek", core.state(checks[-1][0].compiled)
        told = [(rule.compiled, script.key, cost) for rule, cost in checks]
        assert script.script.call(now_us, told, mode, merge=True) == expected
        for rule, cost in checks:
            single.check(rule.compiled, now_us, cost, consume=consume)
        assert script.state(versions[0].compiled) == single.state(versions[0].compiled)
        assert script.state(versions[0].compiled) in (None, state), "the states differ before a decision does"


@pytest.fixture(params=["oracle", "core", "redis"])
def subject(request: pytest.FixtureRequest) -> Callable[[], Subject]:
    """Makes a subject with a key of its own."""
    if request.param == "oracle":
        return Oracle
    if request.param == "core":
        return Core
    client: redis.Redis = request.getfixturevalue("redis_client")
    return lambda: Lua(client)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_denied_call_becomes_allowed_exactly_at_the_instant_it_promised_not_one_microsecond_before(
    subject: Callable[[], Subject], strategy: str
) -> None:
    for rule in known_rules():
        if rule.strategy != strategy:
            continue
        rng, now_us, decides, denials = random.Random(rule.limit), START_US, subject(), 0
        for _ in range(60):
            step = random_step(rng, rule, backwards=False)
            now_us += step.advance_us // 8
            allowed, _, retry_us, _ = decides.check(rule.compiled, now_us, step.cost)
            if allowed:
                continue
            denials += 1
            assert retry_us > 0
            assert not decides.check(rule.compiled, now_us + retry_us - 1, step.cost, consume=False)[0], rule
            assert decides.check(rule.compiled, now_us + retry_us, step.cost, consume=False)[0], rule
        assert denials, f"{rule} was never full"


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_is_reset_after_is_forgotten_then_and_not_one_microsecond_before(
    subject: Callable[[], Subject], strategy: str
) -> None:
    rng = random.Random(strategy)
    for rule in known_rules():
        if rule.strategy != strategy:
            continue
        decides, now_us, reset_us = subject(), START_US, 0
        for _ in range(5):
            now_us += rng.randrange(rule.window_us // 20)
            reset_us = decides.check(rule.compiled, now_us, max(1, rule.capacity // 7))[3]
        assert decides.check(rule.compiled, now_us + reset_us, 1, consume=False) == (True, rule.capacity, 0, 0), rule
        assert decides.check(rule.compiled, now_us + reset_us - 1, 1, consume=False)[3] == 1, rule


@pytest.mark.parametrize("before", STRATEGIES)
@pytest.mark.parametrize("after", STRATEGIES)
def test_a_change_of_strategy_carries_over_what_was_used(before: str, after: str) -> None:
    first, second, core = make_rule(before, 10, 60_000_000).compiled, make_rule(after, 10, 60_000_000).compiled, Core()
    assert core.check(first, START_US, 10)[0]
    assert not core.check(second, START_US, 1)[0]
    assert not core.check(first, START_US, 1)[0], "changing it back gave a refill"


def counted(rule: RateThrottleRule, log: list[tuple[int, str]], now_us: int) -> float:
    """A lower bound of what a rule must count of a log of single admissions, by its promise alone."""
    window_us = rule.window_us
    if rule.strategy == "sliding_window":
        return sum(at > now_us - window_us for at, _ in log)
    current = sum(at // window_us == now_us // window_us for at, _ in log)
    if rule.strategy == "fixed_window":
        return current
    before = sum(at // window_us == now_us // window_us - 1 for at, _ in log)
    return current + min(rule.limit, before) * (1 - now_us % window_us / window_us)


@pytest.mark.parametrize("old", [s for s in STRATEGIES if not s.endswith("bucket")])
@pytest.mark.parametrize("new", [s for s in STRATEGIES if not s.endswith("bucket")])
def test_while_two_versions_alternate_each_admission_keeps_its_versions_promise_over_all_of_them(old: str, new: str) -> None:
    versions = {"old": make_rule(old, 10, 10_000_000), "new": make_rule(new, 90, 21_000_000)}
    rng, now_us, core, log = random.Random(f"{old} {new}"), START_US, Core(), []
    for _ in range(2_000):
        now_us += rng.randrange(1_600_000)
        which = rng.choice(("old", "new"))
        rule = versions[which]
        if core.check(rule.compiled, now_us, 1)[0]:
            log.append((now_us, which))
            assert counted(rule, log, now_us) <= rule.limit + 1e-9
    assert len({which for _, which in log[20:]}) == 2, "one version was locked out"


def test_a_version_with_a_short_window_is_not_locked_out_by_one_with_a_long_window_that_alternates() -> None:
    """A day's use says nothing about this second's: what has left the short window stays gone."""
    core, now_us, admitted = Core(), START_US, {10: 0, 1_000: 0}
    old, new = make_rule("fixed_window", 1_000, 86_400 * 10**6), make_rule("token_bucket", 10, 10**6)
    assert core.check(old.compiled, now_us, 500)[0]
    for _ in range(40):
        now_us += 10**6
        for rule in (new, old):
            admitted[rule.limit] += core.check(rule.compiled, now_us, 1)[0]
    assert admitted == {10: 39, 1_000: 40}, "the new version's first check meets the day's use, and no later one does"


@pytest.mark.parametrize("last", STRATEGIES)
def test_a_third_version_takes_over_what_has_left_the_second(last: str) -> None:
    core, day_us = Core(), 86_400 * 10**6
    now_us = START_US - START_US % day_us + day_us // 3
    assert core.check(make_rule("fixed_window", 1_000, day_us).compiled, now_us, 1_000)[0]
    mistaken = make_rule("token_bucket", 10, 10**6).compiled
    assert not core.check(mistaken, now_us, 1)[0]
    assert core.check(mistaken, now_us + 2 * 10**6, 1)[0]
    assert not core.check(make_rule(last, 1_000, day_us // 4).compiled, now_us + 4 * 10**6, 10)[0]


@pytest.mark.parametrize("old", STRATEGIES)
@pytest.mark.parametrize("new", STRATEGIES)
def test_two_versions_that_alternate_refill_nothing_and_lock_nobody_out(old: str, new: str) -> None:
    small, large, core = make_rule(old, 10, 10_000_000).compiled, make_rule(new, 60, 20_000_000).compiled, Core()
    rng, now_us, mine = random.Random(f"{old} {new}"), START_US, {small: 0, large: 0}
    for step in range(2_000):
        now_us += rng.randrange(100_000)
        version = (small, large)[step % 2]
        mine[version] += core.check(version, now_us, 1)[0]
    seconds = (now_us - START_US) / 1e6
    # Whatever the other version admits, a version's own admissions are within its own promise.
    assert 0 < mine[small] <= seconds + 20
    assert 0 < mine[large] <= 3 * seconds + 120
    now_us += 2 * large.window_us
    assert core.check(small, now_us, 10)[0], "the smaller version is locked out after it was idle"
    assert not core.check(small, now_us, 1)[0]
    now_us += 2 * large.window_us
    assert core.check(large, now_us, 60)[0], "the larger version is locked out after it was idle"
    assert not core.check(small, now_us, 10)[0], "changing the rule gave a refill"


def test_random_walks_of_the_core_hold_against_the_oracle() -> None:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    for rule in known_rules():
        core, oracle, now_us = Core(), Oracle(), START_US
        for _ in range(80):
            step = random_step(rng, rule)
            now_us += step.advance_us
            check = rule.compiled, now_us, step.cost
            assert core.check(*check, consume=step.consume) == oracle.check(*check, consume=step.consume), f"seed {seed}, {rule}"


@pytest.mark.parametrize(
    ("strategy", "answer"), [("fixed_window", [1, 0, -5_000_000]), ("sliding_counter", [1, 0, 0, -5_000_000])]
)
def test_a_window_that_stands_ahead_of_the_clock_and_holds_nothing_is_fresh(strategy: str, answer: list[int]) -> None:
    rule = RateThrottleRule("r", 28, 60, strategy=strategy).compiled
    assert read_answer(rule, answer, 1) == (True, 28, 0, 0)


@pytest.mark.parametrize("weeks", [1, 2, 52])
@pytest.mark.parametrize("strategy", ["fixed_window", "sliding_counter"])
def test_a_window_of_weeks_begins_on_a_monday(redis_client: redis.Redis, strategy: str, weeks: int) -> None:
    rule = RateThrottleRule("r", 10, timedelta(weeks=weeks), strategy=strategy).compiled
    some_day = datetime(2026, 11, 26, 12, 0, tzinfo=UTC)
    for subject in (Core(), Lua(redis_client)):
        now_us = int(some_day.timestamp()) * 10**6
        allowed, _, _, reset_us = subject.check(rule, now_us, 10)
        assert allowed
        ends = datetime.fromtimestamp((now_us + reset_us) / 10**6, UTC)
        assert (ends.weekday(), ends.hour, ends.minute, ends.second) == (0, 0, 0, 0)
        if strategy == "fixed_window":
            assert weeks > 1 or ends == datetime(2026, 11, 30, tzinfo=UTC)
            assert not subject.check(rule, now_us + reset_us - 1, 1)[0]
            assert subject.check(rule, now_us + reset_us, 10)[0]


@pytest.mark.parametrize("strategy", ["fixed_window", "sliding_counter"])
def test_a_week_that_began_on_a_thursday_is_not_granted_again(redis_client: redis.Redis, strategy: str) -> None:
    lua, rule = Lua(redis_client), RateThrottleRule("r", 10, timedelta(weeks=1), strategy=strategy).compiled
    now_us = int(datetime(2026, 11, 27, tzinfo=UTC).timestamp()) * 10**6
    thursday_us = now_us - now_us % WEEK_US
    counts = "9;" if strategy == "fixed_window" else "9,0;"
    redis_client.set(lua.key, f"1;{rule.kind}{WEEK_US},{thursday_us},{counts}")
    day_us = WEEK_US // 7
    assert [lua.check(rule, now_us + days * day_us, 1)[0] for days in (0, 1, 3, 9)] == [True, False, False, False]
    assert lua.check(rule, now_us + 17 * day_us, 1)[0]
