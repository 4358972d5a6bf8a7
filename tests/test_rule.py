"""Rules: what is accepted, what is refused and how that is worded, and the integers they compile to."""

from __future__ import annotations

import pickle
from datetime import timedelta
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ratethrottle import ConfigurationError, RateThrottleRule
from ratethrottle.rule import TICKS, largest_fraction

BAD: list[tuple[dict[str, Any], str]] = [
    ({"strategy": "sliding_windw"}, "did you mean 'sliding_window'"),
    ({"strategy": "nonsense"}, "there are sliding_window, token_bucket"),
    ({"limit": 0}, "from 1 to"),
    ({"limit": -1}, "from 1 to"),
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
    ({"burst": 10**9, "limit": 1, "window": 86400, "strategy": "token_bucket"}, "years"),
]


@pytest.mark.parametrize(("bad", "words"), BAD, ids=[str(bad) for bad, _ in BAD])
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
    ],
)
def test_rates_are_read_as_people_write_them(rate: str, limit: int, window_us: int) -> None:
    rule = RateThrottleRule.parse("rule", rate)
    assert (rule.limit, rule.window_us) == (limit, window_us)


@pytest.mark.parametrize("rate", ["", "10", "ten/s", "10/fortnight", "-1/s", "10//s", "10/0s", None])
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
