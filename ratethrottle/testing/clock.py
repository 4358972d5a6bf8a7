"""A clock that stands still until a test moves it, and what calls back by it."""

from __future__ import annotations

import asyncio
import itertools
import math
import secrets
import threading
import weakref
from collections.abc import Callable
from contextvars import Context
from datetime import UTC, datetime, timedelta
from typing import Any, Protocol

from ratethrottle.errors import ConfigurationError, shown

# A Monday, and the first day of a month and of a year: windows of whole minutes, hours, days and weeks begin there.
START = datetime(2029, 1, 1, tzinfo=UTC)
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
MICROSECOND = timedelta(microseconds=1)
MOST_US = 2**52  # a little more than 142 years: what Lua counts to the µs

# All tasks have to wait for so many turns of the loop until nothing more is expected of them.
QUIET_TURNS = 8
TURNS_MAX = 10_000  # of a task that never waits
# How often it is looked whether Redis has answered, and for how long.
LOOK_S = 0.0005
LOOKS_MAX = 10_000


def micros(by: object) -> int:
    """Give seconds or a timedelta in whole µs. Raises ConfigurationError for what a clock can't be moved by."""
    if isinstance(by, timedelta):
        by_us = by // MICROSECOND
    elif isinstance(by, bool) or not isinstance(by, (int, float)):
        raise ConfigurationError(f"a clock is moved by seconds (int or float) or a timedelta, not by {shown(by)}")
    elif not math.isfinite(by):
        raise ConfigurationError(f"a clock can't be moved by {by} s; a `retry_after` of inf says that waiting never helps")
    else:
        by_us = round(by * 1_000_000)
        if abs(by * 1_000_000 - by_us) > 0.01 and by_us / 1_000_000 != by:
            raise ConfigurationError(f"a clock is moved by whole µs, not by {shown(by)} s")
    if by_us < 0:
        raise ConfigurationError(f"a clock only goes forward, not by {shown(by)}")
    return by_us


class Asked(Protocol):
    """A storage that may wait for an answer of Redis."""

    @property
    def asked(self) -> bool:
        """Whether somebody waits for an answer."""


class ManualClock:
    """A clock that stands still until `advance` or `elapse` moves it, exact to the µs.

    start: an aware datetime; by default 2029-01-01 00:00 UTC, a Monday.
    Give it to `InMemoryStorage(clock_us=clock)` or `ManualRedisStorage(client, clock=clock)`, to any number of them. Called, it says
    what time it is, in µs since 1970, from any thread.

    Raises ConfigurationError.
    """

    def __init__(self, start: datetime = START) -> None:
        if not isinstance(start, datetime) or start.tzinfo is None:
            raise ConfigurationError(
                f"start is {shown(start)}; it is a datetime with a time zone, such as datetime(2030, 1, 1, tzinfo=UTC)"
            )
        self._now_us = self.began_us = (start - EPOCH) // MICROSECOND
        if not 0 <= self._now_us < MOST_US:
            raise ConfigurationError(f"start is {shown(start)}; it is from 1970 on, and before 2112")
        self._lock = threading.Lock()
        self._timers: dict[int, ManualTimer] = {}
        self._fired: set[ManualTimer] = set()  # they run in the next turn of their loop
        self._numbers = itertools.count()
        self._storages: weakref.WeakSet[Asked] = weakref.WeakSet()
        self.prefix = f"manual-{secrets.token_hex(6)}"

    def __call__(self) -> int:
        """Say what time it is, in µs since 1970."""
        return self._now_us

    @property
    def now(self) -> float:
        """What time it is, in seconds since 1970."""
        return self._now_us / 1_000_000

    def advance(self, by: float | timedelta) -> None:
        """Move the clock by seconds or a timedelta, at once. From any thread.

        A decision of before it is `retry_after` old after `clock.advance(decision.retry_after)`, to the µs. What waits for a time that
        has come by then goes on in the next turns of its event loop; with `elapse` it goes on at the very time that it waits for.
        Raises ConfigurationError.
        """
        self._move(self._now_us + micros(by))

    async def elapse(self, by: float | timedelta) -> None:
        """Let seconds or a timedelta pass, and whatever waits in this event loop go on at its own time.

        The clock stands still while tasks have something to do, or wait for an answer of Redis. It goes on once all of them wait, and
        stops at each time for which one of them waits in `acquire`, or for a slot, and where slots are renewed. Other waits, such as
        `asyncio.sleep`, aren't of this clock.
        Raises ConfigurationError.
        """
        until_us = self._now_us + micros(by)
        await self.settle()
        while (next_us := self._next_us(until_us, everything=False)) is not None:
            self._move(next_us)
            await self.settle()
        self._move(until_us)
        await self.settle()

    async def settle(self) -> None:
        """Let the tasks of this event loop do what they can do now: until all of them wait, and Redis has answered."""
        await self._until_all_wait()
        for _ in range(LOOKS_MAX):
            if not any(storage.asked for storage in self._storages):
                break
            await asyncio.sleep(LOOK_S)
            await self._until_all_wait()

    async def _until_all_wait(self) -> None:
        this, loop, quiet = asyncio.current_task(), asyncio.get_running_loop(), 0
        for _ in range(TURNS_MAX):
            await asyncio.sleep(0)
            runs = any(task is not this and _runs(task) for task in asyncio.all_tasks(loop))
            quiet = 0 if runs else quiet + 1
            if quiet == QUIET_TURNS:
                break

    def timers(self, loop: asyncio.AbstractEventLoop, *, background: bool = False) -> ManualTimers:
        """Make what calls back in `loop` by this clock. background: `elapse` doesn't stop there."""
        return ManualTimers(self, loop, background)

    def step(self, loop: asyncio.AbstractEventLoop) -> None:
        """Move to the next time at which anything is called back, if there is one; once all has been that was due in this loop."""
        next_us = self._next_us(MOST_US, everything=True)
        if next_us is not None and not any(timer.loop is loop for timer in list(self._fired)):
            self._move(next_us)

    def attach(self, storage: Asked) -> None:
        """Have `settle` wait for what is asked of Redis by this storage, as long as it is there."""
        self._storages.add(storage)

    def __repr__(self) -> str:
        return f"<ManualClock at {(EPOCH + self._now_us * MICROSECOND).isoformat(' ')}>"

    def _next_us(self, until_us: int, *, everything: bool) -> int | None:
        with self._lock:
            due = [
                timer.at_us for timer in self._timers.values() if timer.at_us <= until_us and (everything or not timer.background)
            ]
        return min(due, default=None)

    def _move(self, to_us: int) -> None:
        if to_us >= MOST_US:
            raise ConfigurationError("a clock goes to the year 2112 at most")
        with self._lock:
            self._now_us = max(self._now_us, to_us)
            due = sorted((timer.at_us, number) for number, timer in self._timers.items() if timer.at_us <= self._now_us)
            fired = [self._timers.pop(number) for _, number in due]
            self._fired.update(fired)
        for timer in fired:
            timer.fire()

    def _add(self, timer: ManualTimer) -> int:
        with self._lock:
            number = next(self._numbers)
            self._timers[number] = timer
        return number

    def _drop(self, number: int) -> None:
        with self._lock:
            self._timers.pop(number, None)

    def _ran(self, timer: ManualTimer) -> None:
        with self._lock:
            self._fired.discard(timer)


class ManualTimers:
    """As much of an event loop as calls back later."""

    def __init__(self, clock: ManualClock, loop: asyncio.AbstractEventLoop, background: bool) -> None:
        self._clock = clock
        self._loop = loop
        self._background = background

    def time(self) -> float:
        """Say how many seconds have passed on the clock: so few that a float has them to the µs."""
        return (self._clock() - self._clock.began_us) / 1_000_000

    def call_later(
        self, delay: float, callback: Callable[..., object], /, *args: Any, context: Context | None = None
    ) -> ManualTimer:
        """Have `callback(*args)` called in the loop when the clock has been moved by `delay` seconds."""
        at_us = self._clock() + max(0, round(delay * 1_000_000))
        timer = ManualTimer(self._clock, self._loop, at_us, lambda: callback(*args), context, background=self._background)
        if at_us <= self._clock():
            self._clock._move(at_us)  # it is due
        return timer


class ManualTimer:
    """Something that is called back once."""

    def __init__(
        self,
        clock: ManualClock,
        loop: asyncio.AbstractEventLoop,
        at_us: int,
        callback: Callable[[], object],
        context: Context | None,
        *,
        background: bool,
    ) -> None:
        self.at_us = at_us
        self.background = background
        self._clock = clock
        self.loop = loop
        self._callback: Callable[[], object] | None = callback
        self._context = context
        self._number = clock._add(self)

    def fire(self) -> None:
        """Have it called in the next turn of its loop."""
        try:
            self.loop.call_soon_threadsafe(self._run, context=self._context)
        except RuntimeError:  # the loop is closed
            self._callback = None
            self._clock._ran(self)

    def cancel(self) -> None:
        """Don't call it."""
        self._callback = None
        self._clock._drop(self._number)

    def _run(self) -> None:
        self._clock._ran(self)
        callback, self._callback = self._callback, None
        if callback is not None:
            callback()


def _runs(task: asyncio.Task[Any]) -> bool:
    """Whether a task has something to do before it waits."""
    waits_for: Any = getattr(task, "_fut_waiter", task)  # a task without it is none of asyncio's, and isn't done
    return waits_for is None or waits_for.done()
