"""What a worker process writes down, at once, so that a kill loses nothing: calls, late turns of its loop, attempts to connect."""

from __future__ import annotations

import struct
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

SOURCES = ("redis", "prefilter", "lease", "outage", "memory", "overload")
ERRORS = ("StorageUnavailable", "StorageTimeout", "StorageProtocolError", "StorageRefused", "other error", "cancelled")
KINDS = (*SOURCES, *ERRORS, "loop was late", "connects")
LATE, CONNECTS = KINDS.index("loop was late"), KINDS.index("connects")
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


@dataclass(frozen=True)
class Log:
    """What one process wrote."""

    process: int
    calls: list[Call]
    late: list[tuple[int, int]]  # µs when its loop should have woken a timer, and did
    connects: list[tuple[int, int]]  # µs, port


def monotonic_us() -> int:
    """Read the clock that all processes of a machine share."""
    return time.monotonic_ns() // 1_000


def read_log(process: int, path: Path) -> Log:
    """Read what a process wrote, up to where it was killed."""
    data = path.read_bytes()
    log = Log(process, [], [], [])
    for kind, allowed, rule, key, before_us, after_us in RECORD.iter_unpack(data[: len(data) - len(data) % RECORD.size]):
        if kind == LATE:
            log.late.append((before_us, after_us))
        elif kind == CONNECTS:
            log.connects.append((before_us, key))
        else:
            log.calls.append(Call(process, KINDS[kind], bool(allowed), rule, key, before_us, after_us))
    return log
