"""Where a state lives: the layout of keys that every version must keep."""

from __future__ import annotations

import binascii
import itertools
import re
from collections import Counter
from zlib import crc32

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ratethrottle import InMemoryStorage, RateThrottleCore, RateThrottleRule
from ratethrottle.storage._shared.keynames import KeyNames

LIMITER = RateThrottleCore(InMemoryStorage(), rules=[RateThrottleRule("a", 5, 60), RateThrottleRule("b.c-d_E", 5, 60)])
LAYOUT = KeyNames(b"ratethrottle", 64)
# One in the middle half of each 64th of a cluster's slots, for ever: states are found by them.
TAGS = (
    b"mm 6q 9i e8 29 21 7 ax 0j kv dn df f n w xw 8g d6 lc 02 g3 4c 6 4r 99 91 1d m5 g o v iu "
    b"7a k0 ce 8y 4l op 1 9 jf 1z zj b3 ik h q y bk 9w 6o ms af an 0 8 c5 dp kh 0t a i p x"
).split()
TAG = re.compile(rb"\{([0-9a-z]+)\}")
SLOTS = 16_384

text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=200)
keys = text | st.lists(text | st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=4).map(tuple)


def state_key(key: object, rule: str = "a", layout: KeyNames = LAYOUT) -> bytes:
    return layout.state_key(LIMITER._entry(key, rule))


def test_a_key_stands_last_and_as_it_is() -> None:
    assert state_key("user:42") == b"ratethrottle:{%b}:a:=user:42" % TAGS[crc32(b"user:42") % 64]
    assert state_key("käse", "b.c-d_E") == b"ratethrottle:{%b}:b.c-d_E:=" % TAGS[crc32("käse".encode()) % 64] + "käse".encode()


def test_all_rules_of_a_key_share_its_tag() -> None:
    tags = {(key, TAG.search(state_key(key, rule))[0]) for key in ("u", "v", ("w", 1)) for rule in ("a", "b.c-d_E")}  # type: ignore[index]  # no match fails the test
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
        assert re.match(rb"p:x:\{[0-9a-z]{1,4}\}:a:[=(#]", state_key(key, layout=KeyNames(b"p:x", tags)))


def slot(tag: bytes) -> int:
    """The slot that a Redis Cluster gives a hash tag."""
    return binascii.crc_hqx(tag, 0) % SLOTS


def tags_of(layout: KeyNames, tags: int) -> set[bytes]:
    """All tags that keys of a layout have."""
    found: set[bytes] = set()
    for number in itertools.count():
        found.add(TAG.search(state_key(f"user:{number}", layout=layout))[1])  # type: ignore[index]  # no match fails the test
        if len(found) == tags:
            return found
    raise AssertionError


@pytest.mark.parametrize("tags", [1, 2, 3, 64, 100, 256, 1_000])
def test_each_part_of_a_clusters_slots_has_a_tag_of_its_own(tags: int) -> None:
    slots = sorted(map(slot, tags_of(KeyNames(b"p", tags), tags)))
    assert [at * tags // SLOTS for at in slots] == list(range(tags))
    # In the middle half of its part, so that it doesn't matter much where the parts of the nodes end.
    assert all(0.25 <= at * tags / SLOTS % 1 <= 0.75 for at in slots)


@pytest.mark.parametrize(("nodes", "most"), [(3, 1.05), (6, 1.05), (12, 1.15), (32, 1.01)])
def test_the_nodes_of_a_cluster_have_about_as_many_tags_each(nodes: int, most: float) -> None:
    held = Counter(slot(tag) * nodes // SLOTS for tag in TAGS)
    assert len(held) == nodes
    assert max(held.values()) * nodes / len(TAGS) <= most


@given(st.lists(text | st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=5).map(tuple), st.integers(1, 6), keys)
def test_keys_that_begin_alike_share_a_tag(key: tuple[str | int, ...], parts: int, other: object) -> None:
    layout = KeyNames(b"p", 16_384, parts)

    def tag(of: object) -> bytes:
        return TAG.search(state_key(of, layout=layout))[1]  # type: ignore[index]  # no match fails the test

    assert tag(key) == tag(key[:parts])
    # Others begin with something else, and are elsewhere: 64 of them at one tag of 16,384 are no accident.
    assert len({tag((f"{number}", *key)) for number in range(64)}) > 1
    assert tag((*key[:parts], "x")) == tag((*key[:parts], 7, "y")) or len(key) < parts
    if isinstance(other, str):
        # A key that is no tuple has no parts.
        assert tag(other) == TAG.search(state_key(other, layout=KeyNames(b"p", 16_384)))[1]  # type: ignore[index]  # no match fails the test
