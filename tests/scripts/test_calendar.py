"""Windows by the calendar, in oracle, core and scripts: what they decide, what they take over, and what comes back after a loss."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ratethrottle import RateThrottleRule
from ratethrottle._engine.definitions import CompiledRule
from ratethrottle.testing import intervals
from ratethrottle.testing.intervals import window_start
from tests.kit.clocked import ClockedScript, ClockedServer, make_call
from tests.kit.oracle import calendar_window
from tests.kit.strategies import CALENDARS, START_US, calendar_rules, make_rule, rules
from tests.kit.subjects import Core, Lua, Oracle

pytestmark = pytest.mark.redis

DAY_US = 86_400 * 10**6
# A fixture's server serves all examples of a test; each example has a key of its own.
FIXED = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
dated = st.sampled_from(calendar_rules())
every_calendar = pytest.mark.parametrize("calendar", CALENDARS, ids=lambda calendar: "-".join(map(str, calendar.values())))

# How the clock moves: by a share of the rule's window in thousandths, by a few µs, or to next to an instant that matters.
moves = st.one_of(
    st.tuples(st.just("share"), st.integers(-2_000, 3_000)),
    st.tuples(st.just("us"), st.integers(-3, 3)),
    st.tuples(st.sampled_from(("promise", "since", "until", "back")), st.integers(-2, 1)),
)
steps = st.lists(st.tuples(moves, st.integers(1, 3), st.integers(0, 2), st.booleans() | st.just(True)), min_size=2, max_size=40)


def rule_of(calendar: dict[str, Any], limit: int = 100) -> RateThrottleRule:
    return RateThrottleRule("rule", limit, strategy="fixed_window", **calendar)


def moved(move: tuple[str, int], now_us: int, rule: RateThrottleRule, promised_us: int) -> int:
    """Where the clock goes."""
    kind, by = move
    if kind == "share":
        return now_us + rule.window_us * by // 1_000
    since_us, until_us = calendar_window(rule.compiled, now_us) if isinstance(rule.window, str) else (now_us, now_us)
    to_us = {"promise": promised_us, "since": since_us, "until": until_us, "back": now_us - rule.window_us}
    return to_us.get(kind, now_us) + by


@given(
    first=dated, others=st.lists(dated | rules, min_size=2, max_size=2), plan=steps, start_us=st.integers(START_US, 2 * START_US)
)
@settings(FIXED, max_examples=150)
def test_all_subjects_agree_while_the_clock_steps_and_calendars_change(
    redis_client: redis.Redis, first: RateThrottleRule, others: list[RateThrottleRule], plan: list[Any], start_us: int
) -> None:
    oracle, core, script = Oracle(), Core(), Lua(redis_client)
    now_us = promised_us = start_us
    for move, cost, which, consume in plan:
        rule = (first, *others)[which]
        now_us = moved(move, now_us, rule, promised_us)
        check = rule.compiled, now_us, min(cost, rule.capacity)
        expected = oracle.check(*check, consume=consume)
        promised_us = now_us + max(expected[2], expected[3])
        assert core.check(*check, consume=consume) == expected
        assert script.check(*check, consume=consume) == expected
        assert script.state(rule.compiled) in (None, core.state(rule.compiled)), "the states differ before a decision does"


@every_calendar
def test_while_two_calendars_alternate_nobody_is_refilled_or_locked_out(calendar: dict[str, Any]) -> None:
    """The limit of each is held by what both admitted, in each of its own windows; and each admits something in the end."""
    one, other = (
        rule_of(calendar, 10),
        RateThrottleRule("rule", 10, "week", strategy="fixed_window", timezone="Asia/Tokyo", anchor=3),
    )
    rng, core, now_us, log = random.Random(str(calendar)), Core(), START_US, []
    for _ in range(600):
        now_us += rng.randrange(one.window_us // 10)
        rule = rng.choice((one, other))
        if core.check(rule.compiled, now_us, 1)[0]:
            log.append((now_us, rule))
            for version in (one, other):
                since_us = calendar_window(version.compiled, now_us)[0]
                if version is rule:
                    assert sum(at_us >= since_us for at_us, _ in log) <= 10
    assert {rule for _, rule in log[len(log) // 2 :]} == {one, other}


@pytest.mark.parametrize("behind", [-400, -70, -2, 3, 70, 400])
def test_a_server_whose_clock_is_elsewhere_has_windows_of_the_mean_length(redis_client: redis.Redis, behind: int) -> None:
    """Its calls have the boundaries around another day. The limit holds in each of its windows, and they end."""
    rule = RateThrottleRule("rule", 3, "day", strategy="fixed_window", timezone="Europe/Berlin").compiled
    script, since_us = ClockedScript(redis_client), calendar_window(rule, START_US)[0]
    call = make_call([(rule, "elsewhere", 1)], now_us=START_US)

    def check(now_us: int) -> tuple[bool, int, int, int]:
        return call.answers(script.send(redis_client, now_us, call))[0]

    begins_us = since_us + behind * DAY_US
    assert [check(begins_us)[0] for _ in range(4)] == [True, True, True, False]
    assert check(begins_us + 1)[2:] == (DAY_US - 1, DAY_US - 1)
    assert check(begins_us + DAY_US - 1)[2] == 1
    assert check(begins_us + DAY_US)[:2] == (True, 2)


@pytest.mark.parametrize(
    ("place", "word"),
    [(1, 0), (2, 999), (3, -1), (3, START_US), (4, START_US // 2), (5, 0), (5, 2**53), (6, 0), (7, "x"), (7, START_US)],
)
def test_words_that_are_no_calendar_are_refused(redis_client: redis.Redis, place: int, word: Any) -> None:
    """kind capacity window_us, two boundaries, the calendar's number, and two more boundaries, all of which ascend."""
    call = make_call([(rule_of({"window": "day"}).compiled, "k", 1)], now_us=START_US)
    first = call.args.index("d")
    assert call.args[first : first + 3] == ["d", 100, DAY_US]
    call.args[first + place] = word
    with pytest.raises(redis.ResponseError, match=r"does not fit its kind|out of range"):
        ClockedScript(redis_client).send(redis_client, START_US, call)
    assert not redis_client.exists("k")


@pytest.mark.parametrize(
    "state",
    ["1;d1,86400000000,5;", "1;d0,86400000000,5,6;", "1;d1,999,5,6;", "1;d1,86400000000,5,4000000001;", "1;d1,86400000000,x,1;",
     "1;d1,86400000000,5,6,7;", "1;d1,31622400000001,5,6;"],
)  # fmt: skip
def test_states_that_are_no_calendar_window_are_unreadable(redis_client: redis.Redis, state: str) -> None:
    server = ClockedServer(redis_client, START_US - 10**9)
    redis_client.set("k", state)
    for rule in (rule_of({"window": "day"}), make_rule("token_bucket", 5, 10**6)):
        assert server.check(START_US, rule.compiled) == [-2]
    assert redis_client.get("k") == state.encode()


# After a loss


def known(rule: CompiledRule, grants: list[tuple[int, int]], now_us: int) -> tuple[int, int, int]:
    """What a process says now that has heard of just these grants when the last of them was made."""
    if not grants:
        return 0, 0, 0
    since_us, until_us = calendar_window(rule, grants[-1][0])
    return sum(units for at_us, units in grants if at_us >= since_us), now_us - until_us + rule.window_us, 0


def spend(
    rng: random.Random, server: ClockedServer, rule: CompiledRule, now_us: int, most_us: int, count: int
) -> tuple[int, Any]:
    grants = []
    for _ in range(count):
        now_us += rng.randrange(most_us)
        cost = rng.choice((1, 1, 2, 14))
        if server.check(now_us, rule, cost)[0]:
            grants.append((now_us, cost))
    return now_us, grants


def play(client: Any, calendar: dict[str, Any], seed: int, repair: Callable[..., Any] = ClockedServer.tell) -> None:
    """Around a boundary, lose the newest part of the writes, or all. Processes tell of it in any order, while others are granted units."""
    rng, whole = random.Random(seed), rule_of(calendar)
    rule = whole.compiled
    until_us = calendar_window(rule, START_US + rng.randrange(400 * DAY_US))[1]
    start_us = until_us - rng.randrange(1, 12_000_000)
    server = ClockedServer(client, start_us - 10**9)
    before_us, grants = spend(rng, server, rule, start_us, rng.choice((20_000, 300_000)), 40)
    lost_at = rng.choice((0, 0, len(grants), rng.randint(0, len(grants))))
    server, states = ClockedServer(client, start_us - 10**9), [None]
    for at_us, units in grants:
        assert server.check(at_us, rule, units)[0] == 1
        states.append(client.get("k"))
    began_us = before_us + rng.randrange(100_000)
    server = ClockedServer(client, began_us)
    if states[lost_at] is not None:
        client.set("k", states[lost_at])
    heard = [rng.randint(0, len(grants)) for _ in range(rng.randint(0, 4))]
    now_us, since, learning = began_us, [], rng.random() < 0.5
    for upto in rng.sample(heard * 2, len(heard) * 2):
        if learning:
            now_us += rng.randrange(20_000)
        else:
            now_us, more = spend(rng, server, rule, now_us, rng.choice((2, 5_000, 200_000)), rng.randint(0, 5))
            since += more
        assert repair(server, now_us, rule, known(rule, grants[:upto], now_us)) in (0, 1, None)
    in_time = not since
    log = grants[: max([lost_at, *heard])] + since
    if now_us - began_us < 10_000_000:
        since_us = calendar_window(rule, now_us)[0]
        assert server.check(now_us, rule, mode="peek")[1] == sum(units for at_us, units in log if at_us >= since_us)
    for _ in range(20):
        now_us, more = spend(rng, server, rule, now_us, rng.choice((100_000, rule.window_us // 3)), 1)
        log += more
    if in_time:
        intervals.check(whole, log)


@every_calendar
@settings(FIXED, max_examples=15)
@given(seed=st.integers(0, 2**32))
def test_what_was_known_before_a_loss_and_what_was_granted_since_are_added(
    redis_client: redis.Redis, calendar: dict[str, Any], seed: int
) -> None:
    play(redis_client, calendar, seed)


def test_without_telling_it_the_promise_is_broken(redis_client: redis.Redis) -> None:
    def play_all() -> None:
        for seed in range(40):
            play(redis_client, CALENDARS[1], seed, repair=lambda *_: None)

    with pytest.raises(AssertionError):
        play_all()


@every_calendar
def test_what_was_admitted_alone_is_charged_to_the_window_that_it_is_of(
    redis_client: redis.Redis, calendar: dict[str, Any]
) -> None:
    rule = rule_of(calendar).compiled
    since_us, until_us = calendar_window(rule, START_US)
    now_us = since_us + 3_000_000
    server = ClockedServer(redis_client, now_us)
    # Of before, of this window twice, and again by a call whose reply was lost.
    for _ in range(2):
        assert server.charge(now_us, rule, "one", 4_000_000, 7, 2_000_000, 5, 0, 3) == 1 or _
    assert server.left(now_us, rule) == 92
    assert server.check(now_us, rule, 92)[0] == 1
    # Of a window that stands ahead of the clock.
    now_us = since_us - 1_000_000
    assert server.charge(now_us, rule, "two", 0, 4) == 1
    assert server.check(now_us, rule, mode="peek")[1] == 104
    assert server.left(until_us, rule) == 100


@every_calendar
def test_a_reset_undoes_what_a_replica_brought_back(redis_client: redis.Redis, calendar: dict[str, Any]) -> None:
    rule = rule_of(calendar).compiled
    since_us, _ = calendar_window(rule, START_US)
    for now_us in (START_US, since_us - 400):  # the last one steps over the boundary meanwhile
        server = ClockedServer(redis_client, now_us - 10**9)
        server.check(now_us, rule, 60)
        stale = redis_client.get("k")
        server = ClockedServer(redis_client, now_us + 300)
        redis_client.set("k", stale or b"")
        server.check(now_us + 350, rule, 5)
        assert server.tell(now_us + 380, rule, (0, 0, 0), now_us + 200) == 1
        assert server.left(now_us + 380, rule) == 95


@pytest.mark.parametrize("ahead_us", [-5_000_000, -300_000, 300_000, 5_000_000])
@every_calendar
def test_a_new_clock_ahead_or_behind_loses_nothing(redis_client: redis.Redis, calendar: dict[str, Any], ahead_us: int) -> None:
    """Neither in the middle of a window, nor where the other server's clock says that the next one has begun."""
    rule = rule_of(calendar).compiled
    since_us, until_us = calendar_window(rule, START_US)
    for told_us in (START_US, since_us + 100_000, until_us - 100_000):
        grants = [(max(since_us, told_us - 50_000), 60)]
        server = ClockedServer(redis_client, told_us + ahead_us)
        assert server.tell(told_us + ahead_us, rule, known(rule, grants, told_us)) == 1
        at_us = told_us + ahead_us
        assert server.left(at_us, rule) == (100 if at_us >= until_us else 40), told_us
        assert server.left(max(at_us, until_us), rule) == 100
        assert server.left(until_us + rule.window_us, rule) == 100


@pytest.mark.parametrize("strategy", ["sliding_window", "token_bucket", "fixed_window", "sliding_counter", "month"])
def test_two_definitions_both_count_what_is_asserted_and_charged_to_one(redis_client: redis.Redis, strategy: str) -> None:
    first = rule_of({"window": "day", "timezone": "Europe/Berlin"}).compiled
    second = (
        rule_of({"window": "month", "anchor": 15}) if strategy == "month" else make_rule(strategy, 100, 7 * DAY_US)
    ).compiled  # fmt: skip
    for one, other in ((first, second), (second, first)):
        server = ClockedServer(redis_client, START_US)
        assert server.check(START_US + 1, one, 2)[0] == 1
        assert server.check(START_US + 2, other, 3)[0] == 1
        now_us = START_US + 1_000
        told = {"b": (20 * one.unit_ticks, 0, 0), "s": (20, one.window_us - 1_000, 1_000)}.get(one.kind)
        if told is None and one.calendar is not None:
            told = known(one, [(START_US - 1_000, 20)], now_us)
        elif told is None:
            told = 20, now_us - window_start(one.window_us, now_us), 0
        assert server.tell(now_us, one, told) == 1
        assert server.charge(now_us, one, "m", 0, 7 * (one.unit_ticks or 1)) == 1
        assert server.left(now_us, one) in (68, 67)  # a bucket's part of a unit
        assert server.left(now_us, other) in (68, 67)
