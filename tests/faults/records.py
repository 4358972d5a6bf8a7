"""What a worker process writes down, at once, so that a kill loses nothing: calls, slots, late turns of its loop, attempts to connect."""

from __future__ import annotations

import struct
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

SOURCES = ("redis", "prefilter", "lease", "outage", "memory", "overload")
ERRORS = ("StorageUnavailable", "StorageTimeout", "StorageProtocolError", "StorageRefused", "other error", "cancelled")
KINDS = (*SOURCES, *ERRORS, "loop was late", "connects", "held", "held by policy", "holds", "holds by policy")
LATE, CONNECTS, HELD, HELD_BY_POLICY, HOLDS, HOLDS_BY_POLICY = range(len(KINDS) - 6, len(KINDS))
RECORD = struct.Struct("=BBBHQQ")  # kind, allowed, rule, key, µs before, µs after, all of the monotonic clock


class Call(NamedTuple):
    """One check, from just before it to just after it."""

    process: int
    kind: str
    allowed: bool
    rule: int
    key: int
    before_us: int
    after_us: int


class Held(NamedTuple):
    """A slot, from when it was surely held to when it may have been given back. by_policy: as Redis was away."""

    process: int
    by_policy: bool
    key: int
    began_us: int
    ended_us: int


@dataclass(frozen=True)
class Log:
    """What one process wrote."""

    process: int
    calls: list[Call]
    late: list[tuple[int, int]]  # µs when its loop should have woken a timer, and did
    connects: list[tuple[int, int]]  # µs, port
    held: list[Held] = field(default_factory=list)


def monotonic_us() -> int:
    """Read the clock that all processes of a machine share."""
    return time.monotonic_ns() // 1_000


def read_log(process: int, path: Path, killed_us: int = 0) -> Log:
    """Read what a process wrote, up to where it was killed. killed_us: when; until then it held what it hadn't given back."""
    data = path.read_bytes()
    log = Log(process, [], [], [])
    begun: Counter[tuple[bool, int, int]] = Counter()
    for kind, allowed, rule, key, before_us, after_us in RECORD.iter_unpack(data[: len(data) - len(data) % RECORD.size]):
        if kind == LATE:
            log.late.append((before_us, after_us))
        elif kind in {HELD, HELD_BY_POLICY}:
            log.held.append(Held(process, kind == HELD_BY_POLICY, key, before_us, after_us))
            begun[kind == HELD_BY_POLICY, key, before_us] -= 1
        elif kind in {HOLDS, HOLDS_BY_POLICY}:
            begun[kind == HOLDS_BY_POLICY, key, before_us] += 1
        elif kind == CONNECTS:
            log.connects.append((before_us, key))
        else:
            log.calls.append(Call(process, KINDS[kind], bool(allowed), rule, key, before_us, after_us))
    if killed_us:
        log.held.extend(Held(process, *how, killed_us) for how in begun.elements())
    return log
