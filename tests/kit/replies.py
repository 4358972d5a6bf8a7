"""Replies as a server writes them, whole or spoilt: what the functions that read them are given."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple, TypeAlias

from ratethrottle import RateThrottleRule
from ratethrottle._engine.definitions import CompiledRule
from ratethrottle.storage._shared.call import parse as read_call
from ratethrottle.storage._shared.reply import parse
from tests.kit.strategies import known_rules

Read: TypeAlias = Callable[[bytes], tuple[list[int], int] | Literal["incomplete", "broken"]]
ItemAsked: TypeAlias = tuple[CompiledRule, int, int, int | None]  # rule, checks, units to take ahead, bits of a part


class Reply(NamedTuple):
    """Bytes, and what reads them."""

    kind: str
    data: bytes
    read: Read


REQUEST = b"0123456789ab-1"
EPOCH = b"0123456789" * 4 + b"%016d%016d" % (1_800_000_000_000_000, 0)
COUNT = b"%016d%08d%016d%010d%016d" % (1_800_000_000_000_000, 70, 1_799_999_000_000_000, 0, 1_790_000_000_000_000)
NOW_US = 1_800_000_000_000_000
CODES, SKIPPED = (-2, -3, -4), -5
RULES = [
    *(rule.compiled for rule in known_rules()),
    *(
        RateThrottleRule("leased", 1_000, 10, strategy=strategy, lease=True).compiled
        for strategy in ("sliding_window", "fixed_window")
    ),
]
BYTES = (b"", b"\r", b"\n", b"\r\n", b"*", b":", b"$", b"-", b"0", b"9", b"-1", b"999999999999999999", b"\x00", b"\xff")


def script_reply(numbers: list[int], request: bytes = REQUEST) -> bytes:
    """The reply of a script: the request's id, and numbers."""
    head = b"*%d\r\n$%d\r\n%b\r\n" % (1 + len(numbers), len(request), request)
    return head + b"".join(b":%d\r\n" % number for number in numbers)


def mark_reply(integers: list[int], epoch: bytes = EPOCH, count: bytes = COUNT) -> bytes:
    """The replies to a mark."""
    head = b"".join(b":%d\r\n" % number for number in integers)
    return head + b"*2\r\n$%d\r\n%b\r\n$%d\r\n%b\r\n" % (len(epoch), epoch, len(count), count)


def some_reply(rng: random.Random) -> Reply:
    """A whole reply to a call of any kind."""
    match rng.randrange(6):
        case 0:
            numbers = [rng.choice((0, 1, -1, -4, 128, 10**15, rng.randrange(10**18))) for _ in range(rng.randrange(12))]
            return Reply("script", script_reply(numbers), partial(parse, "script", request=REQUEST))
        case 1:
            return Reply("load", b"$40\r\n" + b"a" * 40 + b"\r\n", partial(parse, "load"))
        case 2:
            integers = [rng.randrange(70) for _ in range(rng.randrange(3))]
            return Reply("mark", mark_reply(integers), partial(parse, "mark", request=EPOCH, integers=len(integers)))
        case 3:
            numbers = [
                NOW_US,
                NOW_US - rng.randrange(10**9),
                0,
                rng.choice((0, 250_000)),
                70,
                rng.randrange(70),
                -1,
                0,
                0,
                -1,
                10**7,
            ]
            return Reply("beat", script_reply(changed(numbers, rng)), partial(read_call, "beat", request=REQUEST))
        case _:
            return checks_reply(rng)


def checks_reply(rng: random.Random) -> Reply:
    """The reply to a call of checks, or of resets: what the script would say, and mostly a number that it would not."""
    mode = rng.choice(("check", "peek", "reset", "check_joint", "check_joint", "check_joint", "peek_joint"))
    items: list[ItemAsked] = []
    answers: list[list[int]] = []
    for _ in range(rng.randrange(5) + (not mode.endswith("_joint"))):
        rule, count = rng.choice(RULES), rng.choice((1, 1, 2, 9))
        ahead = rng.randrange(5) if rule.lease_units else 0
        items.append((rule, count, ahead, None))
        granted = rng.randint(0, count if mode.startswith("check") else 1)
        more = [rng.randint(0, ahead)] if rule.lease_units else []
        answers.append([rng.choice(CODES)] if rng.random() < 0.1 else numbers_of(rule, granted, count, rng) + more)
    # Those of rules with leases come after the others.
    answers = [answer for _, answer in sorted(enumerate(answers), key=lambda pair: bool(items[pair[0]][0].lease_units))]
    if mode == "reset":
        answers = [[NOW_US] for _ in items]
    for _ in range(rng.randint(1, 4) if mode.endswith("_joint") else 0):
        corrects = mode == "check_joint" and rng.random() < 0.3
        asked, told = settlement_reply(rng) if corrects else joint_reply(rng, consumes=mode == "check_joint")
        items += asked
        answers += told
    numbers = [NOW_US, *(number for answer in answers for number in answer)]
    if mode != "reset" and rng.random() < 0.3:
        numbers += [rng.randint(1, len(items)), NOW_US - rng.randrange(10**6)]
    read = partial(read_call, mode, request=REQUEST, items=items, epoch=NOW_US - 10**9)
    return Reply(mode, script_reply(changed(numbers, rng)), read)


def joint_reply(rng: random.Random, *, consumes: bool) -> tuple[list[ItemAsked], list[list[int]]]:
    """The parts of a joint check, and what is said of each."""
    count, sizes = rng.choice((1, 2, 5)), [rng.choice((1, 1, 2, 3)) for _ in range(rng.randint(1, 4))]
    allowed = rng.randint(0, count) if consumes else 0
    refuses = rng.randrange(len(sizes))
    items: list[ItemAsked] = []
    told: list[list[int]] = []
    for s, size in enumerate(sizes):
        flagged, left = size == 1 and s != refuses and rng.random() < 0.2, allowed
        for i in range(size):
            rule = rng.choice(RULES)
            items.append((rule, count, 0, 1 * (s + i > 0) | 2 * (i > 0) | 4 * flagged))
            took = left if i + 1 == size and not flagged else rng.randint(0, left)
            granted = took if consumes and allowed == count else 0 if s == refuses else rng.randint(0, 1)
            if consumes and allowed == count and i and not left:
                told.append([0, SKIPPED])
            else:
                told.append([took, *numbers_of(rule, granted, granted + 1 if flagged and took < count else 1, rng)])
            left -= took
    if rng.random() < 0.1:
        told = [[0, rng.choice((*CODES, SKIPPED))] for _ in told]
    return items, told


def settlement_reply(rng: random.Random) -> tuple[list[ItemAsked], list[list[int]]]:
    """Charges and refunds that belong together, and what is said of each."""
    items: list[ItemAsked] = []
    told: list[list[int]] = []
    for i in range(rng.randint(1, 4)):
        rule = rng.choice(RULES)
        items.append((rule, 1, 0, 1 * (i > 0) | rng.choice((8, 16))))
        told.append([1, *numbers_of(rule, rng.randint(0, 1), 1, rng)])
    if rng.random() < 0.1:
        told = [[0, rng.choice((*CODES, SKIPPED))] for _ in told]
    return items, told


def numbers_of(rule: CompiledRule, granted: int, count: int, rng: random.Random) -> list[int]:
    """What the script says of a key; it says until when only if not all of `count` were granted."""
    match rule.kind:
        case "b":
            return [granted, rng.randrange(rule.capacity * rule.unit_ticks + 1)]
        case "s":
            reset_us = rng.randrange(1, rule.window_us)
            return [
                granted,
                rng.randint(1, rule.capacity),
                rng.randint(0, reset_us),
                reset_us,
                *([reset_us] if granted < count else []),
            ]
        case "c":
            return [granted, rng.randint(0, rule.capacity), rng.randint(0, rule.capacity), rng.randrange(rule.window_us)]
        case _:
            return [granted, rng.randint(0, rule.capacity), rng.randrange(rule.window_us)]


def changed(numbers: list[int], rng: random.Random) -> list[int]:
    """The same, and mostly with a number that is another one, is missing or is too many."""
    if rng.random() < 0.4:
        return numbers
    at = rng.randrange(len(numbers))
    number = rng.choice((-5, -4, -3, -2, -1, 0, 1, 2, 9, 10**9, 2**32 + 1, 10**17, numbers[at] + 1, numbers[at] - 1))
    return numbers[:at] + rng.choice(([number], [number], [number], [], [numbers[at], number])) + numbers[at + 1 :]


def spoilt(data: bytes, rng: random.Random) -> bytes:
    """The same with a few bytes changed, left out or put in."""
    for _ in range(rng.randrange(1, 4)):
        at = rng.randrange(len(data) + 1)
        data = data[:at] + rng.choice(BYTES) + data[at + rng.randrange(3) :]
    return data


def check_reading(data: bytes, read: Read) -> bool:
    """Assert what holds of any bytes: what is read doesn't depend on what follows, and a part of it is never taken for the whole.

    Returns whether it is a whole reply.
    """
    found = read(data)
    if isinstance(found, str):
        if found == "incomplete":
            assert len(data) <= 70_000
        return False
    numbers, size = found
    assert 0 < size <= len(data)
    assert read(data[:size] + b"*9\r\n") == (numbers, size)
    for cut in {0, 1, size // 2, size - 1}:
        assert read(data[:cut]) == "incomplete", data[:cut]
    return True
