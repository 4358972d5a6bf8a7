"""When to connect: at once after a loss, while Redis is away at most twice a second in this process, and less often when it stays away.

For the first seconds of an outage nothing is gained by waiting longer: an attempt that is refused costs next to nothing, and Redis is
taken up within half a second. Later, and from the start if an attempt costs a token, attempts get rarer, up to EVERY_MOST_S.
Those of all processes fall together all the same: a rarer turn is one of the more frequent ones.
"""

from __future__ import annotations

import os
import random
import time
import weakref
from asyncio import AbstractEventLoop
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from ratethrottle.storage.redis.replies import Repeated

# Between two attempts while Redis is away. Those of all processes fall together, each up to JITTER_S later: so they come back within
# the time that the store leaves them to tell what they know, and yet don't knock at the very same moment.
EVERY_S = 0.5
JITTER_S = 0.1
# Seconds that an outage has lasted, and how many there are between two attempts from then on.
RARER: tuple[tuple[float, float], ...] = ((45.0, 10.0), (25.0, 2.0), (15.0, 1.0))
EVERY_MOST_S = 10.0
ROUNDING_S = 0.005


def every_s(lasts_s: float) -> float:
    """Say how many seconds there are between two attempts, in an outage that has lasted so long."""
    return next((every_s for from_s, every_s in RARER if lasts_s >= from_s), EVERY_S)


class Connected(Protocol):
    """A connection, as far as it is counted."""

    process: int

    @property
    def loop(self) -> AbstractEventLoop:
        """The loop that it is of."""


class Backoff:
    """Paces and counts the connections of a storage, of which there are `most` at once. The connections of all its loops share it."""

    def __init__(self, most: int) -> None:
        self.count = 0  # how many connections were tried
        self.reconnections = 0
        self.most = most
        self.repeated = Repeated()  # error replies that come back
        self._open: weakref.WeakSet[Connected] = weakref.WeakSet()
        self._jitter_s = random.random() * JITTER_S  # noqa: S311  # no secret
        self._failing_since_s: float | None = None
        self._costly = 0  # attempts in a row that failed and had asked for credentials
        self._every_s = EVERY_S  # between two turns
        self._next_s = 0.0  # the turn that was taken last, by the monotonic clock
        self._given_back_s: float | None = None  # a turn that was taken and not used
        self._waiting: set[Callable[[], None]] = set()
        self._losses: deque[float] = deque(maxlen=2)

    def began(self) -> None:
        """Count an attempt."""
        self.count += 1

    def wait_s(self) -> float:
        """Take the next turn; returns how many seconds away it is."""
        if self._failing_since_s is None:
            return 0.0
        now_s = time.monotonic()
        given_back_s, self._given_back_s = self._given_back_s, None
        if given_back_s is not None and given_back_s > now_s - EVERY_S / 4:
            return max(0.0, given_back_s - now_s)
        last_s = max(now_s, self._next_s)  # another connection's turn, if that is still to come
        self._every_s = every_s(now_s - self._failing_since_s)
        # By the wall clock, which processes share; but what is kept isn't, or a clock that is set back would make us wait as long.
        phase_s = time.time() - now_s - self._jitter_s
        # The last turn is itself such an instant, but for rounding.
        slot = int((last_s + phase_s + ROUNDING_S) / self._every_s) + 1
        self._next_s = slot * self._every_s - phase_s
        if self._costly > 1:
            # Spare the service that gives out credentials: all processes must not ask it at the same moment.
            most_s = min(EVERY_S * 2.0 ** min(self._costly - 1, 10), EVERY_MOST_S)
            self._next_s = max(self._next_s, last_s + most_s * random.uniform(0.5, 1.0))  # noqa: S311  # no secret
            self._every_s = max(self._every_s, most_s)
        return self._next_s - now_s

    def give_back(self, turn_s: float) -> None:
        """Leave a turn that was taken, by the monotonic clock, to the connection that asks next."""
        self._given_back_s = turn_s

    def until_next_s(self) -> float:
        """How many seconds it is until the next turn: before that it isn't worth asking again."""
        now_s = time.monotonic()
        if self._failing_since_s is None or self._next_s <= now_s:
            return EVERY_S
        return min(self._next_s - now_s, self._every_s)

    @property
    def full(self) -> bool:
        """Whether there are as many connections as there may be: those of a forked parent and of loops that are gone don't count."""
        return sum(each.process == os.getpid() and not each.loop.is_closed() for each in list(self._open)) >= self.most

    def opened(self, connection: Connected, again: bool) -> None:
        """Take note that it is connected; `again` if it was before."""
        self._open.add(connection)
        self.reconnections += again

    def closed(self, connection: Connected) -> None:
        """Take note that it has none any more."""
        self._open.discard(connection)

    def failed(self, *, costly: bool = False) -> None:
        """There is no connection, or Redis doesn't serve us on it. costly: credentials were asked for."""
        if self._failing_since_s is None:
            self._failing_since_s = time.monotonic()
        self._costly += costly

    def lost(self) -> None:
        """Take note that a connection was lost. That may happen; twice in a second it is no better than no connection."""
        now_s = time.monotonic()
        self._losses.append(now_s)
        if len(self._losses) == 2 and now_s - self._losses[0] < 2 * EVERY_S:
            self.failed()

    def succeeded(self) -> None:
        """Redis has answered: connections that wait for a turn needn't."""
        self._costly = 0
        if self._failing_since_s is not None:
            self._failing_since_s = None
            self._next_s = 0.0
            self._given_back_s = None
            for retry_now in list(self._waiting):
                retry_now()

    @contextmanager
    def waiting(self, retry_now: Callable[[], None]) -> Iterator[None]:
        """Have `retry_now` called if Redis answers somebody else meanwhile, from any thread."""
        self._waiting.add(retry_now)
        try:
            yield
        finally:
            self._waiting.discard(retry_now)
