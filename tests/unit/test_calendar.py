"""Windows by the calendar: what a rule may say, where windows begin, and how they end. In memory, by a clock of the test's own."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import random
import zoneinfo
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any

import pytest

from ratethrottle import ConfigurationError, CostExceedsLimit, InMemoryStorage, RateThrottleCore, RateThrottleRule, rule
from ratethrottle._engine.dates import MEAN_US, boundaries, number_of
from ratethrottle.testing.intervals import check
from tests.kit.oracle import calendar_window
from tests.kit.shares import shares_of
from tests.kit.strategies import CALENDARS, START_US
from tests.kit.subjects import Core

HOUR_US = 3_600 * 10**6
DAY_US = 24 * HOUR_US
every_calendar = pytest.mark.parametrize("calendar", CALENDARS, ids=lambda calendar: "-".join(map(str, calendar.values())))


def rule_of(calendar: dict[str, Any], limit: int = 10, **options: Any) -> RateThrottleRule:
    return RateThrottleRule("rule", limit, strategy="fixed_window", **calendar, **options)


def us(text: str) -> int:
    return round(datetime.fromisoformat(text).timestamp()) * 10**6


# What a rule may say


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (
            {"window": "hour"},
            r'window is \'hour\'; it is seconds \(int or float\), a timedelta, or by the calendar "day", "week" or',
        ),
        ({"window": ""}, "by the calendar"),
        ({"window": "day", "strategy": "sliding_window"}, 'takes strategy="fixed_window"; a sliding_window has a length'),
        ({"window": "day", "strategy": "token_bucket"}, "takes strategy="),
        ({"window": "day", "lease": True}, "takes no leases"),
        ({"window": "day", "lease": 5}, "takes no leases"),
        ({"window": "day", "anchor": 1}, "a day begins at midnight"),
        ({"window": "week", "anchor": 8}, r"anchor is 8; of a week it is 1 \(Monday\) to 7 \(Sunday\)"),
        ({"window": "week", "anchor": "monday"}, "anchor is 'monday'"),
        ({"window": "month", "anchor": 0}, "of a month it is 1 to 31, in a shorter month its last day"),
        ({"window": "month", "anchor": True}, "anchor is True"),
        ({"window": "month", "timezone": "Europe/Berln"}, "no time zone 'Europe/Berln'; did you mean 'Europe/Berlin'"),
        ({"window": "month", "timezone": "Europe"}, "there is no time zone 'Europe'"),
        ({"window": "month", "timezone": "../../etc/passwd"}, "there is no time zone"),
        ({"window": "month", "timezone": ""}, 'it is an IANA name, such as "Europe/Berlin"'),
        ({"window": "month", "timezone": None}, "timezone is None; it is an IANA name"),
        ({"window": 60, "timezone": "Europe/Berlin"}, 'timezone and anchor belong to window="day", "week" or "month"'),
        ({"window": 60, "anchor": 1}, "timezone and anchor belong to window="),
    ],
)
def test_what_is_no_window_by_the_calendar_is_refused(bad: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        RateThrottleRule(**{"name": "rule", "limit": 5, "strategy": "fixed_window", **bad})


def test_a_machine_without_time_zones_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rule, "available_timezones", set)

    def zone_of(name: str) -> None:
        raise zoneinfo.ZoneInfoNotFoundError(name)

    monkeypatch.setattr(rule, "zone_of", lambda name: UTC if name == "UTC" else zone_of(name))
    assert rule_of({"window": "day"}).timezone == "UTC"
    with pytest.raises(ConfigurationError, match="pip install tzdata"):
        rule_of({"window": "day", "timezone": "Europe/Berlin"})


@every_calendar
def test_a_calendar_is_part_of_a_rule_and_survives_copies(calendar: dict[str, Any]) -> None:
    made = rule_of(calendar)
    for twin in (copy.copy(made), copy.deepcopy(made), pickle.loads(pickle.dumps(made)), dataclasses.replace(made)):
        assert (twin, hash(twin), twin.window, twin.timezone, twin.anchor) == (
            made,
            hash(made),
            made.window,
            made.timezone,
            made.anchor,
        )
    compiled = pickle.loads(pickle.dumps(made.compiled))
    assert (compiled, hash(compiled), compiled.calendar.spec) == (made.compiled, hash(made.compiled), made.compiled.calendar.spec)
    assert made.window_us == made.compiled.window_us == MEAN_US[calendar["window"]]
    assert dataclasses.replace(made, limit=0).capacity == 0
    others = [rule_of(other) for other in CALENDARS if other is not calendar]
    assert made not in others
    assert made != RateThrottleRule("rule", 10, MEAN_US[calendar["window"]] / 1e6, strategy="fixed_window")


def test_the_number_of_a_calendar_in_stored_states_is_for_good() -> None:
    assert number_of(("day", "UTC", 0)) == 3_833_236_142_529_600
    assert number_of(("month", "Europe/Berlin", 31)) == 466_745_113_232_809
    assert rule_of({"window": "week"}).compiled == rule_of({"window": "week", "anchor": 1}).compiled


# Where windows begin


def test_windows_begin_where_the_wall_says_in_every_time_zone() -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    for timezone in [*rng.sample(sorted(zoneinfo.available_timezones()), 25), "Africa/Cairo", "Asia/Beirut", "America/Havana"]:
        spec = rng.choice((("day", timezone, 0), ("week", timezone, rng.randint(1, 7)), ("month", timezone, rng.randint(1, 31))))
        from_us = us("2001-01-01T00:00Z") + rng.randrange(30 * 365) * DAY_US
        found = boundaries(spec, from_us, from_us + 300 * DAY_US)
        assert found[0] <= from_us < found[1]
        assert found[-2] <= from_us + 300 * DAY_US < found[-1]
        compiled = rule_of({"window": spec[0], "timezone": timezone, "anchor": spec[2] or None}).compiled
        for since_us, until_us in pairwise(found):
            assert calendar_window(compiled, since_us) == (since_us, until_us), spec


@pytest.mark.parametrize(
    ("spec", "instants"),
    [
        (("day", "Europe/Berlin", 0), ["2027-03-27T23:00Z", "2027-03-28T22:00Z", "2027-03-29T22:00Z"]),
        (("day", "Africa/Cairo", 0), ["2027-04-28T22:00Z", "2027-04-29T22:00Z", "2027-04-30T21:00Z"]),  # it skips midnight
        (("day", "America/Havana", 0), ["2026-10-31T04:00Z", "2026-11-01T04:00Z", "2026-11-02T05:00Z"]),  # it has 00:30 twice
        (("day", "Pacific/Apia", 0), ["2011-12-29T10:00Z", "2011-12-30T10:00Z", "2011-12-31T10:00Z"]),  # there was no 30th
        (("week", "UTC", 3), ["2027-01-13T00:00Z", "2027-01-20T00:00Z", "2027-01-27T00:00Z"]),
        (("month", "UTC", 31), ["2028-01-31T00:00Z", "2028-02-29T00:00Z", "2028-03-31T00:00Z", "2028-04-30T00:00Z"]),
        (("month", "UTC", 1), ["2026-12-01T00:00Z", "2027-01-01T00:00Z", "2027-02-01T00:00Z"]),
    ],
)
def test_windows_begin_at_these_instants(spec: tuple[str, str, int], instants: list[str]) -> None:
    known = [us(text) for text in instants]
    assert boundaries(spec, known[0], known[-2]) == known
    assert boundaries(spec, known[0] + 1, known[-2] - 1)[: len(known) - 1] == known[:-1]


def test_beyond_what_is_known_windows_have_the_mean_length_until_more_is_looked_up() -> None:
    """Ten years are known. More is looked up when Redis is asked, or when the rule is made again."""
    compiled = rule_of({"window": "day", "timezone": "Asia/Amman", "anchor": None}).compiled
    far_us = us("2061-05-05T12:00Z")
    core = Core()
    core.now_us = far_us
    decisions = [core.table.decide(core.entry(compiled, 5)) for _ in range(3)]
    assert [decision.allowed for decision in decisions] == [True, True, False]
    assert 0 < decisions[-1].retry_after_us <= DAY_US
    core.now_us += decisions[-1].retry_after_us - 1
    assert not core.table.decide(core.entry(compiled, 5)).allowed
    core.now_us += 1
    assert core.table.decide(core.entry(compiled, 5)).reset_after_us == DAY_US
    assert compiled.calendar is not None
    assert compiled.calendar.around(far_us)[1:3] == calendar_window(compiled, far_us)


# How they end


@every_calendar
async def test_each_window_has_the_limit_once(calendar: dict[str, Any]) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng, now, made, log = random.Random(seed), [START_US], rule_of(calendar), []
    limiter = RateThrottleCore(InMemoryStorage(clock_us=lambda: now[0]), rules=[made])
    for _ in range(400):
        decision = await limiter.check("key", cost=rng.randint(1, 4))
        since_us, until_us = calendar_window(made.compiled, now[0])
        assert decision.reset_after_us == until_us - now[0]
        assert decision.retry_after_us == (0 if decision.allowed else until_us - now[0])
        if decision.allowed:
            log.append((now[0], decision.cost))
        assert decision.remaining == 10 - sum(units for at_us, units in log if at_us >= since_us)
        now[0] += rng.choice((rng.randrange(made.window_us // 8), decision.retry_after_us, decision.reset_after_us - 1, 1))
    check(made, log)
    with pytest.raises(CostExceedsLimit):
        limiter.check("key", cost=11)


async def test_a_rule_that_is_replaced_by_another_calendar_keeps_what_was_used() -> None:
    now = [us("2027-03-10T12:00Z")]
    limiter = RateThrottleCore(InMemoryStorage(clock_us=lambda: now[0]), rules=[rule_of({"window": "month"})])
    assert await limiter.check("key", cost=7)
    for calendar in ({"window": "month", "anchor": 15}, {"window": "week"}, {"window": "day", "timezone": "Asia/Tokyo"}):
        limiter.add_rule(rule_of(calendar), replace=True)
        assert (await limiter.peek("key")).remaining == 3
        assert not await limiter.check("key", cost=4)
    limiter.add_rule(RateThrottleRule("rule", 10, 60), replace=True)
    assert not await limiter.check("key", cost=4)
    await limiter.reset("key")
    assert await limiter.check("key", cost=10)


async def test_a_calendar_goes_with_joint_decisions_and_enforcement() -> None:
    now = [us("2027-03-31T23:59:59Z")]
    day, month = rule_of({"window": "day"}, 2, enforce="flag"), RateThrottleRule("month", 5, "month", strategy="fixed_window")
    limiter = RateThrottleCore(InMemoryStorage(clock_us=lambda: now[0]), rules=[day, month])
    assert [(await limiter.check("key", "rule")).over for _ in range(3)] == [False, False, True]
    assert [bool(await limiter.check("key", "month")) for _ in range(6)] == [True] * 5 + [False]
    now[0] += 10**6
    assert not (await limiter.check("key", "rule")).over
    assert (await limiter.check("key", "month")).reset_after == 30 * 86_400


# One process's share of them


@every_calendar
def test_the_shares_of_all_processes_are_the_limit_once_in_each_window(calendar: dict[str, Any]) -> None:
    made = rule_of(calendar, 11).compiled
    since_us, until_us = calendar_window(made, START_US)
    for now_us in (START_US, until_us - 1, until_us, calendar_window(made, until_us)[1] + 5):
        admitted = 0
        for rank in range(3):
            shares = shares_of(3, rank)
            for at_us in (since_us, now_us):
                decisions = [shares._decide(made, "key", "=", at_us, 1) for _ in range(6)]
            admitted += sum(decision[0] for decision in decisions)
            end_us = calendar_window(made, now_us)[1]
            assert decisions[-1][0] or decisions[-1][2] == end_us - now_us
        assert admitted == (0 if since_us <= now_us < until_us else 11)


@every_calendar
@pytest.mark.parametrize(("off_us", "left"), [(0, 2), (300_000, 2), (-300_000, 2)])
def test_a_share_begins_with_its_part_of_what_is_known(calendar: dict[str, Any], off_us: int, left: int) -> None:
    """By clocks that are a little apart, also next to a boundary."""
    made = rule_of(calendar).compiled
    since_us, until_us = calendar_window(made, START_US)
    for now_us in (START_US, since_us + 100_000, until_us - 100_000):
        answer = [0, 6, now_us + off_us - until_us + made.window_us]
        found = shares_of(2)._decide(made, "key", "=", now_us, 1, known=(made, answer, 1, 0), known_now_us=0, consume=False)
        assert found[1] == left


@every_calendar
def test_what_is_owed_is_of_the_window_that_it_was_admitted_in(calendar: dict[str, Any]) -> None:
    made, shares = rule_of(calendar).compiled, shares_of(1)
    since_us, until_us = calendar_window(made, START_US)
    shares._decide(made, "key", "=", since_us, 2)
    shares._decide(made, "key", "=", until_us - 1, 3)
    shares._decide(made, "key", "=", until_us, 4)
    now_us = until_us + 200_000
    [(_, _, _, _, ages)] = shares.take_owed(9, now_us)
    owed = {calendar_window(made, now_us - age_us)[0]: units for age_us, units in ages}
    assert owed == {since_us: 5, until_us: 4}
    assert not shares.take_owed(9, now_us)
    assert shares._decide(made, "key", "=", now_us, 7)[:2] == (False, 6)


async def test_limits_of_one_calendar_stay_apart() -> None:
    now = [START_US]
    small, large = (RateThrottleRule(name, limit, "day", strategy="fixed_window") for name, limit in (("small", 2), ("large", 5)))
    limiter = RateThrottleCore(InMemoryStorage(clock_us=lambda: now[0]), rules=[small, large])
    assert [(await limiter.peek("key", rule)).remaining for rule in ("small", "large", "small")] == [2, 5, 2]
    assert [sum([bool(await limiter.check("key", rule)) for _ in range(7)]) for rule in ("large", "small")] == [5, 2]
    both = await limiter.check("other", ("small", "large"))
    assert [part.remaining for part in both.parts] == [1, 4]
