"""Where a state lives: the layout of keys that every version must keep."""

from __future__ import annotations

import re
from zlib import crc32

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ratethrottle import InMemoryStorage, RateThrottleCore, RateThrottleRule
from ratethrottle._layout import Layout

LIMITER = RateThrottleCore(InMemoryStorage(), rules=[RateThrottleRule("a", 5, 60), RateThrottleRule("b.c-d_E", 5, 60)])
LAYOUT = Layout(b"ratethrottle", 64)

text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=200)
keys = text | st.lists(text | st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=4).map(tuple)


def state_key(key: object, rule: str = "a", layout: Layout = LAYOUT) -> bytes:
    return layout.state_key(LIMITER._entry(key, rule))


def test_a_key_stands_last_and_as_it_is() -> None:
    assert state_key("user:42") == b"ratethrottle:{%d}:a:=user:42" % (crc32(b"user:42") % 64)
    assert state_key("käse", "b.c-d_E") == b"ratethrottle:{%d}:b.c-d_E:=" % (crc32("käse".encode()) % 64) + "käse".encode()


def test_all_rules_of_a_key_share_its_tag() -> None:
    tags = {(key, re.search(rb"\{\d+\}", state_key(key, rule))[0]) for key in ("u", "v", ("w", 1)) for rule in ("a", "b.c-d_E")}  # type: ignore[index]  # no match fails the test
    assert len(tags) == 3


def test_the_boundary_of_the_digest() -> None:
    assert state_key("x" * 128).endswith(b":=" + b"x" * 128)
    assert re.search(rb":#[0-9a-f]{32}\Z", state_key("x" * 129))
    # Bytes count, not characters.
    assert re.search(rb":#[0-9a-f]{32}\Z", state_key("ü" * 65))
    assert state_key("x" * 129) != state_key("x" * 130)


@pytest.mark.parametrize(
    ("one", "another"),
    [
        (("a/b", "c"), ("a", "b/c")),
        (("ab", "c"), ("a", "bc")),
        (("a", 1), ("a", "1")),
        (("a",), "a"),
        (("a", "b"), ("b", "a")),
        ("(s1:a", ("a",)),
        ("=a", "a"),
        ("#" + "0" * 32, "x" * 129),
        (("x" * 129,), "x" * 129),
    ],
)
def test_keys_that_look_alike_are_kept_apart(one: object, another: object) -> None:
    """Keys joined without escaping: ("a/b", "c") and ("a", "b/c") are one bucket (limits)."""
    assert state_key(one) != state_key(another)


@given(keys, keys, st.sampled_from(["a", "b.c-d_E"]), st.sampled_from(["a", "b.c-d_E"]))
def test_no_two_keys_collide(one: object, another: object, rule: str, other_rule: str) -> None:
    assert (state_key(one, rule) == state_key(another, other_rule)) == (one == another and rule == other_rule)


@given(keys)
def test_the_prefix_and_one_tag_come_first(key: object) -> None:
    for tags in (1, 64, 16_384):
        found = re.match(rb"p:x:\{(\d+)\}:a:[=(#]", state_key(key, layout=Layout(b"p:x", tags)))
        assert found is not None
        assert int(found[1]) < tags
