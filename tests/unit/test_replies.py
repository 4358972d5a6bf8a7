"""Replies are read by pure functions: any bytes are numbers, incomplete or broken, and never anything else."""

from __future__ import annotations

import random
from collections import Counter
from functools import partial
from typing import Literal

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ratethrottle.storage._shared.reply import parse
from tests.kit.replies import COUNT, EPOCH, REQUEST, check_reading, mark_reply, script_reply, some_reply, spoilt
from tests.kit.strategies import seeds


@given(st.lists(st.integers(-(10**17), 10**17), max_size=20))
def test_what_a_script_answers_is_read_as_it_was_written(numbers: list[int]) -> None:
    reply = script_reply(numbers)
    assert parse("script", reply, REQUEST) == (numbers, len(reply))
    check_reading(reply, partial(parse, "script", request=REQUEST))


@given(seeds)
def test_a_spoilt_reply_is_read_whole_or_not_at_all(seed: int) -> None:
    rng = random.Random(seed)
    reply = some_reply(rng)
    check_reading(reply.data, reply.read)
    for _ in range(20):
        check_reading(spoilt(reply.data, rng), reply.read)


def test_most_replies_that_are_not_spoilt_are_read_and_many_that_are_a_little_wrong_are_not() -> None:
    """Of each kind: so that the tests above have something to say."""
    rng, whole, broken = random.Random(1), Counter[str](), Counter[str]()
    for _ in range(6_000):
        reply = some_reply(rng)
        counts = whole if check_reading(reply.data, reply.read) else broken
        counts[reply.kind] += 1
    assert {"script", "load", "mark"} <= set(whole) - set(broken)
    for kind in ("beat", "check", "peek", "check_joint", "peek_joint"):
        assert whole[kind] > 50 < broken[kind], kind


@given(st.binary(max_size=200), st.sampled_from(["script", "load", "mark"]))
@example(b"*1\r\n$-1\r\n", "script")
@example(b"*-1\r\n", "script")
@example(b"$9999999999\r\n", "load")
@example(b"*2\r\n$-1\r\n$-1\r\n", "mark")
def test_any_bytes_are_read_without_harm(data: bytes, kind: Literal["script", "load", "mark"]) -> None:
    check_reading(data, partial(parse, kind, request=EPOCH if kind == "mark" else REQUEST))


@pytest.mark.parametrize(
    "reply",
    [
        script_reply([1, 2], request=REQUEST[:-1] + b"2"),  # another request's
        script_reply([1, 2], request=REQUEST + b"0"),
        script_reply([]).replace(b"*1", b"*0"),
        script_reply([0] * 1026),  # more numbers than any call has
        script_reply([1]).replace(b":1", b"$1"),
        script_reply([1]).replace(b":1", b":"),
        script_reply([1]).replace(b":1", b":1234567890123456789"),  # nor has a number more than 18 digits
        script_reply([1]).replace(b":1", b":+1"),
        b"+OK\r\n",
    ],
)
def test_what_is_no_reply_to_this_request_is_broken(reply: bytes) -> None:
    assert parse("script", reply, REQUEST) == "broken"


def test_a_mark_says_what_is_the_same_and_what_is_not() -> None:
    since = [1_800_000_000_000_000, 70, 1_799_999_000_000_000, 1_790_000_000_000_000]
    same = mark_reply([0, 5])
    assert parse("mark", same, EPOCH, 2) == ([1, 5, *since], len(same))
    for other in (
        mark_reply([0, 5], epoch=EPOCH[::-1]),
        mark_reply([0, 5], count=COUNT[:-1]),
        mark_reply([0, 5], count=b"x" + COUNT[1:]),
        mark_reply([0, 70]),  # a rank of 70 among 70
        b"-WRONGTYPE no bits\r\n" + mark_reply([0, 5])[4:],
    ):
        found = parse("mark", other, EPOCH, 2)
        assert not isinstance(found, str)
        assert found[0][0] == 0
