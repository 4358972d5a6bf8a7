"""Rules: what is accepted, what is refused and how that is worded, and the integers they compile to."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import re
from datetime import timedelta
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ratethrottle import ConfigurationError, RateThrottleRule
from ratethrottle._engine.terms import TICKS, largest_fraction
from ratethrottle.errors import shown
from ratethrottle.rule import MAX_DRAIN_US, fitting_rate

BAD: list[tuple[dict[str, Any], str]] = [
    ({"strategy": "sliding_windw"}, "did you mean 'sliding_window'"),
    ({"strategy": "nonsense"}, "there are sliding_window, token_bucket"),
    ({"limit": None}, "for no limit leave the rule out"),
    ({"limit": float("inf")}, "for no limit leave the rule out"),
    ({"limit": -1}, "from 1 to"),
    ({"name": "n" * 129}, "at most 128 characters .* has 129$"),
    ({"limit": True}, "whole number"),
    ({"limit": 1.5}, "whole number"),
    ({"limit": "5"}, "whole number"),
    ({"limit": 10**30}, "from 1 to"),
    ({"window": float("nan")}, "finite"),
    ({"window": float("inf")}, "finite"),
    ({"window": 0}, "1 ms"),
    ({"window": -1}, "1 ms"),
    ({"window": 0.0005}, "1 ms"),
    ({"window": 1.0000005}, "whole number of µs"),
    ({"window": 10**30}, "366 days"),
    ({"window": True}, "seconds"),
    ({"window": "60"}, "seconds"),
    ({"name": "with space"}, "letters, digits"),
    ({"name": ""}, "letters, digits"),
    ({"name": "a\n"}, "letters, digits"),
    ({"name": 5}, "letters, digits"),
    ({"burst": 5}, "burst belongs to"),
    ({"burst": 0, "strategy": "token_bucket"}, "from 1 to"),
    ({"burst": True, "strategy": "token_bucket"}, "whole number"),
    ({"burst": 10**9, "limit": 1, "window": 86400, "strategy": "token_bucket"}, "the largest burst at this rate is 3257$"),
    ({"limit": 10**5000}, "some int that can't be shown"),
    ({"window": 10**5000}, "some int that can't be shown"),
    ({"window": timedelta(days=367)}, "366 days"),
    ({"window": timedelta(0)}, "1 ms"),
    ({"window": Fraction(1, 3)}, "seconds"),
    ({"name": "n" * 1000 + " "}, r"not 'n{56}\.\.\.$"),
    ({"strategy": ["token_bucket"]}, "there are sliding_window"),
    ({"strategy": None}, "there are sliding_window"),
    ({"on_outage": "ignore"}, "'ignore'; it is local, allow, deny, raise, or None for the storage's"),
    ({"on_outage": ["deny"]}, "it is local, allow"),
    ({"on_outage": False}, "it is local, allow"),
    ({"enforce": "warn"}, "enforce is 'warn'; it is deny, flag or off"),
    ({"enforce": None}, "it is deny, flag or off"),
    ({"enforce": ["flag"]}, "it is deny, flag or off"),
]


@pytest.mark.parametrize(("bad", "words"), BAD, ids=[shown(bad) for bad, _ in BAD])
def test_a_bad_rule_is_refused_in_words_that_say_what_would_do(bad: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        RateThrottleRule(**{"name": "rule", "limit": 10, "window": 60, **bad})


@pytest.mark.parametrize(
    ("rate", "limit", "window_us"),
    [
        ("1000/minute", 1000, 60_000_000),
        ("10/s", 10, 1_000_000),
        ("100 per 5 minutes", 100, 300_000_000),
        ("5/15m", 5, 900_000_000),
        ("10 / 500ms", 10, 500_000),
        ("1_000 per hour", 1000, 3_600_000_000),
        ("3/day", 3, 86_400_000_000),
        ("7 per 1.5 hours", 7, 5_400_000_000),
        ("1/0.001s", 1, 1_000),
        ("5 per hr", 5, 3_600_000_000),
        ("2/366days", 2, 366 * 86_400 * 10**6),
        (" 9/SEC ", 9, 1_000_000),
        ("10/week", 10, 604_800_000_000),
        ("10 per 2 weeks", 10, 1_209_600_000_000),
        ("3/1w", 3, 604_800_000_000),
        ("0/s", 0, 1_000_000),
    ],
)
def test_rates_are_read_as_people_write_them(rate: str, limit: int, window_us: int) -> None:
    rule = RateThrottleRule.parse("rule", rate)
    assert (rule.limit, rule.window_us) == (limit, window_us)


@pytest.mark.parametrize(
    "rate",
    [
        "",
        "10",
        "ten/s",
        "10/fortnight",
        "-1/s",
        "10//s",
        "10/0s",
        None,
        10,
        "9" * 5000 + "/s",
        "1/999999999999999d",
        "1/" + "9" * 5000 + "s",
        "1/0.0001ms",
        "1/1.0000005s",
        "10/ss",
        "10/mss",
        "10/hs",
        "10/ws",
        "10/secondss",
    ],
)
def test_what_is_no_rate_is_refused(rate: Any) -> None:
    with pytest.raises(ConfigurationError):
        RateThrottleRule.parse("rule", rate)


def test_rules_are_values() -> None:
    rule = RateThrottleRule("rule", 10, 60, strategy="token_bucket", burst=20)
    assert rule == RateThrottleRule("rule", 10, timedelta(minutes=1), strategy="token_bucket", burst=20)
    assert pickle.loads(pickle.dumps(rule)) == rule
    assert len({rule, pickle.loads(pickle.dumps(rule))}) == 1
    assert rule != RateThrottleRule("rule", 11, 60, strategy="token_bucket", burst=20)
    with pytest.raises(AttributeError):
        rule.limit = 5  # type: ignore[misc]  # that it is refused is the test


@given(limit=st.integers(1, 10**9), window_us=st.integers(1_000, 366 * 86_400 * 10**6), burst=st.integers(1, 10**9))
def test_no_product_of_a_bucket_reaches_what_a_double_can_not_hold(limit: int, window_us: int, burst: int) -> None:
    window = timedelta(microseconds=window_us)
    try:
        rule = RateThrottleRule("rule", limit, window, strategy="token_bucket", burst=burst).compiled
    except ConfigurationError:
        return
    assert rule.capacity * rule.unit_ticks < TICKS
    exact, used = Fraction(limit, window_us), Fraction(rule.drain_ticks, rule.unit_ticks)
    assert 0 <= (exact - used) / exact < Fraction(1, 10**9)


@given(limit=st.integers(1, 10**9), window_us=st.integers(1_000, 366 * 86_400 * 10**6))
def test_no_product_of_a_counter_reaches_what_a_double_can_not_hold(limit: int, window_us: int) -> None:
    rule = RateThrottleRule("rule", limit, timedelta(microseconds=window_us), strategy="sliding_counter").compiled
    assert limit * -(-window_us // rule.coarse_us) < TICKS


@given(numerator=st.integers(1, 400), denominator=st.integers(1, 400), most=st.integers(1, 60))
def test_the_rounded_rate_is_the_largest_fraction_that_fits(numerator: int, denominator: int, most: int) -> None:
    rate = Fraction(numerator, denominator)
    best = max(Fraction(int(rate * d), d) for d in range(1, most + 1))
    assert largest_fraction(rate, most) == best


def test_a_rate_read_from_text_is_the_rule_written_out_and_takes_its_options() -> None:
    assert RateThrottleRule.parse("rule", "1000/minute") == RateThrottleRule("rule", 1000, 60)
    rule = RateThrottleRule.parse("rule", "5/15m", strategy="token_bucket", burst=9)
    assert rule == RateThrottleRule("rule", 5, 900, strategy="token_bucket", burst=9)
    assert repr(RateThrottleRule.parse("rule", "5/15m")) == repr(RateThrottleRule("rule", 5, 900))
    with pytest.raises(ConfigurationError, match="did you mean 'token_bucket'"):
        RateThrottleRule.parse("rule", "5/s", strategy="tokenbucket")


@given(window_us=st.integers(1_000, 366 * 86_400 * 10**6))
def test_a_window_in_float_seconds_is_the_microseconds_it_was_written_in(window_us: int) -> None:
    assert RateThrottleRule("rule", 1, window_us / 1_000_000).window_us == window_us
    assert RateThrottleRule("rule", 1, float(f"{window_us // 10**6}.{window_us % 10**6:06}")).window_us == window_us


def test_a_window_that_is_a_sum_of_floats_is_what_was_meant() -> None:
    assert RateThrottleRule("rule", 1, 0.1 + 0.2).window_us == 300_000


def test_what_a_rule_compiles_to_is_no_part_of_what_it_shows_and_survives_copies() -> None:
    rule = RateThrottleRule("rule", 100, 1, strategy="sliding_counter")
    assert repr(rule) == (
        "RateThrottleRule(name='rule', limit=100, window=1, strategy='sliding_counter', burst=None, lease=False, lease_ttl=0.1, "
        "on_outage=None, enforce='deny', timezone='UTC', anchor=None)"
    )
    for twin in (copy.copy(rule), copy.deepcopy(rule), pickle.loads(pickle.dumps(rule))):
        assert twin == rule
        assert hash(twin) == hash(rule)
        assert twin.compiled == rule.compiled
        assert twin.window == rule.window
    assert rule != RateThrottleRule("rule", 100, 1)
    assert rule != RateThrottleRule("other", 100, 1, strategy="sliding_counter")
    assert rule != "rule"


def test_what_a_rule_does_on_an_outage_is_part_of_it_and_survives_copies() -> None:
    rules = [RateThrottleRule("rule", 100, 1, on_outage=policy) for policy in (None, "local", "allow", "deny", "raise")]
    assert len(set(rules)) == 5 == len({rule.compiled for rule in rules})
    for rule in rules:
        twin = pickle.loads(pickle.dumps(rule))
        assert twin == rule
        assert (twin.on_outage, twin.compiled.on_outage) == (rule.on_outage, rule.on_outage)
        compiled = pickle.loads(pickle.dumps(rule.compiled))
        assert (compiled, hash(compiled)) == (rule.compiled, hash(rule.compiled))
        assert f"on_outage={rule.on_outage!r}, " in repr(rule)
        assert dataclasses.replace(rule, limit=5).on_outage == rule.on_outage


def test_what_a_denial_does_is_part_of_a_rule_but_of_no_state_and_survives_copies() -> None:
    rules = [RateThrottleRule("rule", 100, 1, enforce=enforce) for enforce in ("deny", "flag", "off")]
    assert len(set(rules)) == 3 == len({rule.compiled for rule in rules})
    for rule in rules:
        for twin in (copy.copy(rule), pickle.loads(pickle.dumps(rule)), dataclasses.replace(rule)):
            assert (twin, twin.enforce, twin.compiled.enforce) == (rule, rule.enforce, rule.enforce)
        compiled = pickle.loads(pickle.dumps(rule.compiled))
        assert (compiled, hash(compiled), compiled.counted) == (rule.compiled, hash(rule.compiled), rule.enforce != "off")
        nothing = dataclasses.replace(rule, limit=0)
        assert (nothing.compiled.enforce, nothing.compiled.counted) == (rule.enforce, False)


def test_a_lease_costs_a_bucket_what_drains_meanwhile_and_lasts_a_share_of_the_window() -> None:
    bucket = RateThrottleRule("rule", 1000, 60, strategy="token_bucket", lease=True)
    assert (bucket.capacity, bucket.compiled.lease_us, bucket.compiled.lease_units) == (998, 100_000, 1000)
    window = RateThrottleRule("rule", 1000, 0.4, lease=50)
    assert (window.capacity, window.compiled.lease_us, window.compiled.lease_units) == (1000, 50_000, 50)
    assert (window.compiled.lead_us, bucket.compiled.lead_us) == (50_000, 0)
    assert RateThrottleRule("rule", 1000, 60).compiled.lease_us == 0
    assert pickle.loads(pickle.dumps(window)) == window != RateThrottleRule("rule", 1000, 0.4)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"lease": 0}, "from 1 to"),
        ({"lease": 1.5}, "whole number"),
        ({"lease_ttl": 0.001}, "from 0.005 to 1"),
        ({"lease_ttl": float("nan")}, "from 0.005 to 1"),
        ({"lease": True, "window": 0.03}, "leave lease out"),
        ({"lease": True, "strategy": "token_bucket", "limit": 1}, "nothing to grant"),
    ],
)
def test_a_lease_that_can_not_be_is_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        RateThrottleRule(**{"name": "rule", "limit": 10, "window": 60, **options})


def test_capacity_is_the_burst_of_a_bucket_and_the_limit_otherwise() -> None:
    assert RateThrottleRule("rule", 10, 1).capacity == 10
    assert RateThrottleRule("rule", 10, 1, strategy="leaky_bucket").capacity == 10
    assert RateThrottleRule("rule", 10, 1, strategy="leaky_bucket", burst=3).capacity == 3


@pytest.mark.parametrize(
    ("limit", "window_us", "unit_ticks", "drain_ticks"),
    [(3, 1_000_000, 1_000_000, 3), (1000, 60_000_000, 60_000, 1), (1, 1_000, 1_000, 1), (10**9, 1_000, 1, 10**6)],
)
def test_a_rate_that_fits_is_exact_and_in_lowest_terms(limit: int, window_us: int, unit_ticks: int, drain_ticks: int) -> None:
    rule = RateThrottleRule("rule", limit, timedelta(microseconds=window_us), strategy="token_bucket").compiled
    assert (rule.unit_ticks, rule.drain_ticks) == (unit_ticks, drain_ticks)


@given(limit=st.integers(1, 10**9), window_us=st.integers(1_000, 366 * 86_400 * 10**6))
def test_a_sliding_window_keeps_every_admission_up_to_64_and_64_slots_above(limit: int, window_us: int) -> None:
    slot_us = RateThrottleRule("rule", limit, timedelta(microseconds=window_us)).compiled.slot_us
    assert slot_us == (1 if limit <= 64 else -(-window_us // 64))


@given(limit=st.integers(1, 10**9), window_us=st.integers(1_000, 366 * 86_400 * 10**6), burst=st.integers(1, 10**9))
def test_no_bucket_takes_longer_to_drain_than_can_be_counted(limit: int, window_us: int, burst: int) -> None:
    def rule(burst: int) -> RateThrottleRule:
        return RateThrottleRule("rule", limit, timedelta(microseconds=window_us), strategy="token_bucket", burst=burst)

    try:
        compiled = rule(burst).compiled
    except ConfigurationError as error:
        if named := re.search(r"the largest burst at this rate is (\d+)$", str(error)):
            assert int(named[1]) < burst
            assert int(named[1]) * window_us <= MAX_DRAIN_US * limit < (int(named[1]) + 1) * window_us
        return
    assert burst * window_us <= MAX_DRAIN_US * limit
    assert burst * compiled.unit_ticks // compiled.drain_ticks <= MAX_DRAIN_US * (1 + Fraction(1, 10**9))


REFUSED = [(44, 62_976_558, 168_686_685), (704, 844_411_096, 153_800_874), (23_475_572, 2_781_040_042_657, 333_018_838)]


@pytest.mark.parametrize(("limit", "window_us", "burst"), REFUSED)
def test_an_error_names_the_largest_burst_that_leaves_room_for_the_rate(limit: int, window_us: int, burst: int) -> None:
    window = timedelta(microseconds=window_us)
    with pytest.raises(ConfigurationError, match="within a billionth") as caught:
        RateThrottleRule("rule", limit, window, strategy="token_bucket", burst=burst)
    nearest = int(str(caught.value).rpartition("the nearest burst that can is ")[2])
    assert RateThrottleRule("rule", limit, window, strategy="token_bucket", burst=nearest).capacity == nearest < burst
    with pytest.raises(ConfigurationError, match="within a billionth"):
        RateThrottleRule("rule", limit, window, strategy="token_bucket", burst=nearest + 1)


@pytest.mark.parametrize("limit", [791_908_973, 906_624_972, 549_763_688])
def test_an_error_names_the_nearest_limit_that_leaves_room_for_its_rate(limit: int) -> None:
    windows = {791_908_973: 25_222_301_714_275, 906_624_972: 20_581_007_188_621, 549_763_688: 14_905_318_962_203}
    window_us = next(w for w in range(windows[limit], windows[limit] + 10_000) if fitting_rate(limit, w, limit) is None)
    window = timedelta(microseconds=window_us)
    with pytest.raises(ConfigurationError, match="within a billionth") as caught:
        RateThrottleRule("rule", limit, window, strategy="leaky_bucket")
    nearest = int(str(caught.value).rpartition("the nearest limit that can is ")[2])
    assert RateThrottleRule("rule", nearest, window, strategy="leaky_bucket").limit == nearest
    between = range(min(nearest, 2 * limit - nearest) + 1, max(nearest, 2 * limit - nearest))
    assert all(fitting_rate(near, window_us, near) is None for near in between)


def test_a_changed_copy_is_a_rule_of_its_own() -> None:
    rule = RateThrottleRule("rule", 10, 60, strategy="token_bucket", burst=20)
    changed = dataclasses.replace(rule, limit=30)
    assert (changed.limit, changed.burst, changed.compiled.limit) == (30, 20, 30)
    with pytest.raises(ConfigurationError, match="has no burst"):
        dataclasses.replace(rule, limit=0)


@pytest.mark.parametrize(
    ("rate", "advice"),
    [
        ("10/fortnight", r"h, hr\(s\), hour\(s\), d, day\(s\), w, week\(s\)$"),
        ("2000/month", "a month has no fixed length: write it in days, such as 30d"),
        ("5 per 2 years", "a year has no fixed length: write it in days, such as 365d"),
        ("unlimited", "for no limit leave the rule out"),
        ("100/day;10/minute", "for several rates there is parse_many"),
        ("1,000/minute", "a number has no commas: write 1000/s or 1_000/s$"),
        ("1,000,000 per day", "a number has no commas: write 1000/s or 1_000/s$"),
        (None, "a rate is written as"),
    ],
)
def test_an_error_for_what_is_no_rate_says_what_is_one(rate: Any, advice: str) -> None:
    with pytest.raises(ConfigurationError, match=advice):
        RateThrottleRule.parse("rule", rate)


@pytest.mark.parametrize(
    ("rates", "rules"),
    [
        ("10/second;1000/day", [("api.1s", 10, 1), ("api.1d", 1000, 86_400)]),
        ("10/s, 100 per 5 minutes ,1000/week", [("api.1s", 10, 1), ("api.5m", 100, 300), ("api.1w", 1000, 604_800)]),
        ("60/60s", [("api.1m", 60, 60)]),
        ("10/s;", [("api.1s", 10, 1)]),
        ("10/s, 100/m ; ", [("api.1s", 10, 1), ("api.1m", 100, 60)]),
        ("10/s,", [("api.1s", 10, 1)]),
        ("10/s,1_000/m", [("api.1s", 10, 1), ("api.1m", 1000, 60)]),
        ("5/1.5s;7/90s;2/8 days", [("api.1500ms", 5, 1.5), ("api.90s", 7, 90), ("api.8d", 2, 691_200)]),
    ],
)
def test_several_rates_are_several_rules_named_by_their_windows(rates: str, rules: list[tuple[str, int, float]]) -> None:
    parsed = RateThrottleRule.parse_many("api", rates, strategy="fixed_window")
    assert parsed == tuple(RateThrottleRule(*rule, strategy="fixed_window") for rule in rules)


@pytest.mark.parametrize(
    ("rates", "words"),
    [
        ("10/s;20/second", "two rates with a window of 1 s"),
        ("10/s;;5/m", "'10/s;;5/m' has an empty part; write a rate before each ; or ,$"),
        (";10/s", "has an empty part"),
        ("10/s, ;5/m", "has an empty part"),
        ("10/s;;", "has an empty part"),
        (";", "'' is not a rate"),
        ("", "'' is not a rate"),
        (" ", "' ' is not a rate"),
        ("10/s;1,000/day", "'1,000/day' is not a rate; a number has no commas: write 1000/s or 1_000/s$"),
        ("10/s;often", "'often' is not a rate"),
        (["10/s"], "not a str of rates"),
        ("10/s;5/month", "no fixed length"),
    ],
)
def test_several_rates_that_can_not_be_are_refused(rates: Any, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        RateThrottleRule.parse_many("api", rates)
    with pytest.raises(ConfigurationError, match="at most 128 characters"):
        RateThrottleRule.parse_many("n" * 126, "10/s")
