"""A server that gives recorded replies: what the compiled path to Redis costs, without a socket or a script.

Its clock stands still, so that no timer fires, no lease ends and every run does the same.
"""

from __future__ import annotations

import asyncio
from typing import Any

from ratethrottle import RateThrottleRule
from ratethrottle._core import Limiter
from ratethrottle._engine.keys import KeyTable
from ratethrottle._several import SeveralRules
from ratethrottle.errors import StorageError, StorageUnavailable
from ratethrottle.storage._shared.batch import Batch
from ratethrottle.storage._shared.keynames import KeyNames
from ratethrottle.storage._shared.repair import Repair
from ratethrottle.storage._shared.shared import SharedStorage
from ratethrottle.storage.redis.scripts import script
from ratethrottle.storage.redis.wire import written

RUN, NOW_US = "0123456789" * 4, 1_800_000_000_000_000
EPOCH_US = NOW_US - 3_600_000_000
SCRIPTS = {name: (script(name).sha(False), script(name).body(False)) for name in ("beat", "decide", "repair", "reset")}


class Connection:
    """A connection that answers each request in a later turn of the loop."""

    def __init__(self, storage: RecordedStorage, loop: asyncio.AbstractEventLoop) -> None:
        self.batch = Batch(storage.context, self, loop, 1_000_000)
        self.replies = loop
        self.answer: list[int] = []  # to each check of a call

    def connect(self) -> None:
        """Connect in a later turn of the loop."""
        self.batch.connecting()
        self.replies.call_soon(self.batch.connected, self._write, SCRIPTS, RUN.encode())

    def _write(self, data: bytes) -> None:
        # EVALSHA, sha, the number of keys, keys; request, mode, epoch, how many rules, runs and leases.
        words = data.split(b"\r\n")[2::2]
        keys = int(words[2])
        request, mode = words[3 + keys], words[4 + keys]
        reply: list[Any] = [request, NOW_US]
        if mode in (b"check", b"peek"):
            # Each key has an item of its own; the first key is the epoch's.
            # A lease comes last: key, rule, cost, count, the units that it asks for, and what is given back.
            leases = [int(words[-3])] if words[8 + keys] == b"1" else []
            reply += (keys - 1) * [*self.answer, *leases]
        elif mode == b"check_joint":
            # Parts of joint checks that are all different: each has paid for as many as it has granted.
            reply += int(words[9 + keys]) * [self.answer[0], *self.answer]
        else:
            reply += [EPOCH_US, 0, 0, 1, 0, 0, 0, 0, 0, 10_000_000]
        self.replies.call_soon(self.batch.received, written(reply))

    def unsent(self) -> StorageError:
        """Never called."""
        return StorageUnavailable("it is always there")

    def refused(self, call: Any, text: bytes) -> None:
        """Never called."""
        raise AssertionError(call, text)

    def broken(self, what: str) -> None:
        """Never called."""
        raise AssertionError(what)

    def late(self) -> None:
        """Never called."""
        raise AssertionError("the clock stands still")

    def retry_us(self) -> int:
        """Never called."""
        raise AssertionError("it is always there")

    def answered(self) -> None:
        """Take no note of it."""


class RecordedStorage(SharedStorage):
    """A storage of one connection to it."""

    def __init__(self) -> None:
        table = KeyTable(100_000, bounds=True, clock_us=lambda: NOW_US)
        names = KeyNames(b"ratethrottle", 64)
        super().__init__(names, Repair(table, names), 10_000_000, 10_000_000)
        self.table = None
        self.connection = Connection(self, asyncio.get_running_loop())

    def _batches_here(self) -> tuple[Batch, ...]:
        return (self.connection.batch,)


def recorded_limiter(*rules: RateThrottleRule, granted: bool) -> Limiter:
    """Make a limiter whose checks of token buckets are all granted, or all denied. A lease is granted as it was asked for.

    rules: of equal limits.
    """
    storage = RecordedStorage()
    compiled = rules[0].compiled
    level = compiled.unit_ticks if granted else compiled.capacity * compiled.unit_ticks
    storage.connection.answer = [int(granted), level]
    limiter = Limiter(storage)
    limiter._several = SeveralRules(limiter._rules, storage)
    for rule in rules:
        limiter._install(rule.compiled)
    return limiter
