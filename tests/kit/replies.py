"""Replies as a server writes them, whole or spoilt: what the functions that read them are given."""

from __future__ import annotations

import random
from typing import Literal, TypeAlias

from ratethrottle.storage._shared.reply import parse

Kind: TypeAlias = Literal["script", "load", "mark"]

REQUEST = b"0123456789ab-1"
EPOCH = b"0123456789" * 4 + b"%016d%016d" % (1_800_000_000_000_000, 0)
COUNT = b"%016d%08d%016d%010d%016d" % (1_800_000_000_000_000, 70, 1_799_999_000_000_000, 0, 1_790_000_000_000_000)
BYTES = (b"", b"\r", b"\n", b"\r\n", b"*", b":", b"$", b"-", b"0", b"9", b"-1", b"999999999999999999", b"\x00", b"\xff")


def script_reply(numbers: list[int], request: bytes = REQUEST) -> bytes:
    """The reply of a script: the request's id, and numbers."""
    head = b"*%d\r\n$%d\r\n%b\r\n" % (1 + len(numbers), len(request), request)
    return head + b"".join(b":%d\r\n" % number for number in numbers)


def mark_reply(integers: list[int], epoch: bytes = EPOCH, count: bytes = COUNT) -> bytes:
    """The replies to a mark."""
    head = b"".join(b":%d\r\n" % number for number in integers)
    return head + b"*2\r\n$%d\r\n%b\r\n$%d\r\n%b\r\n" % (len(epoch), epoch, len(count), count)


def some_reply(rng: random.Random) -> tuple[Kind, bytes, bytes, int]:
    """What is asked for, a whole reply to it, the request and how many integers it begins with."""
    match rng.randrange(3):
        case 0:
            numbers = [rng.choice((0, 1, -1, -4, 128, 10**15, rng.randrange(10**18))) for _ in range(rng.randrange(12))]
            return "script", script_reply(numbers), REQUEST, 0
        case 1:
            return "load", b"$40\r\n" + b"a" * 40 + b"\r\n", b"", 0
        case _:
            integers = [rng.randrange(70) for _ in range(rng.randrange(3))]
            return "mark", mark_reply(integers), EPOCH, len(integers)


def spoilt(data: bytes, rng: random.Random) -> bytes:
    """The same with a few bytes changed, left out or put in."""
    for _ in range(rng.randrange(1, 4)):
        at = rng.randrange(len(data) + 1)
        data = data[:at] + rng.choice(BYTES) + data[at + rng.randrange(3) :]
    return data


def check_reading(data: bytes, kind: Kind, request: bytes, integers: int) -> None:
    """Assert what holds of any bytes: what is read doesn't depend on what follows, and a part of it is never taken for the whole."""
    found = parse(kind, data, request, integers)
    if isinstance(found, str):
        if found == "incomplete":
            assert len(data) <= 70_000
        return
    numbers, size = found
    assert 0 < size <= len(data)
    assert parse(kind, data[:size] + b"*9\r\n", request, integers) == (numbers, size)
    for cut in {0, 1, size // 2, size - 1}:
        assert parse(kind, data[:cut], request, integers) == "incomplete", (kind, data[:cut])
