"""What lines need of an event loop: its time, one timer, and something to wait on. asyncio has it; trio is made to have it."""

from __future__ import annotations

import asyncio
import sys
import time
from asyncio import AbstractEventLoop
from asyncio import _get_running_loop as running_loop
from collections.abc import Callable, Generator, Hashable
from contextlib import suppress
from contextvars import Context
from math import inf
from typing import Any, Protocol

from ratethrottle.storage import Storage, Timer, Timers

LEAST_S = 0.001  # uvloop counts in whole ms, and rounds: what is due sooner would be looked for in a busy loop


class Future(Protocol):
    """As much of a future as a ticket uses."""

    def set_result(self, result: None, /) -> None:
        """Let the task go on."""

    def __await__(self) -> Generator[Any, Any, None]: ...


class Loop(Protocol):
    """An event loop, in its own thread."""

    @property
    def closed(self) -> bool:
        """Whether nothing can run on it any more."""

    def now(self) -> float:
        """Seconds of its clock."""

    def future(self, on_cancel: Callable[[], None]) -> Future:
        """Make something for a task to wait on. on_cancel: called at once when it is cancelled, if the loop can tell."""

    def soon(self, callback: Callable[[], None]) -> None:
        """Call it in the next turn."""

    def from_any_thread(self, callback: Callable[[], None]) -> None:
        """Call it in the thread of the loop. Raises RuntimeError if that has ended."""

    def set_timer(self, at: float, callback: Callable[[], None]) -> None:
        """Call it then, once, and nothing that was to be called before; inf: nothing at all."""


def loop_here() -> Hashable:
    """Find what stands for the running event loop: asyncio's loop, or trio's token."""
    loop = running_loop()
    if loop is not None:
        return loop
    with suppress(RuntimeError, KeyError):
        token: Hashable = sys.modules["trio"].lowlevel.current_trio_token()
        return token
    raise RuntimeError("acquire waits in an event loop: it needs one of asyncio, or of trio, that runs")


def loop_of(found: Any, storage: Storage) -> Loop:
    """Make what lines use of the loop that `loop_here` found. On asyncio their time is the storage's."""
    return AsyncioLoop(found, storage.timers(found)) if isinstance(found, AbstractEventLoop) else TrioLoop(found)


class AsyncioLoop:
    """Of asyncio, or uvloop."""

    def __init__(self, loop: AbstractEventLoop, timers: Timers) -> None:
        self._loop = loop
        self._timers = timers
        # The request that happens to come first must not lend its variables to the timer of all.
        self._context = Context()
        self._timer: Timer | None = None
        self._at = inf
        # uvloop's own time stands still during a turn of the loop. What is reckoned from it comes too early, by milliseconds.
        in_turns = timers is loop and type(loop).__module__.partition(".")[0] == "uvloop"
        self.now: Callable[[], float] = time.monotonic if in_turns else timers.time

    @property
    def closed(self) -> bool:
        """Whether it is closed."""
        return self._loop.is_closed()

    def future(self, on_cancel: Callable[[], None]) -> Future:
        """Make something to wait on."""
        return AsyncioFuture(self._loop, on_cancel)

    def soon(self, callback: Callable[[], None]) -> None:
        """Call it in the next turn."""
        self._loop.call_soon(callback, context=self._context)

    def from_any_thread(self, callback: Callable[[], None]) -> None:
        """Call it in the loop's thread."""
        self._loop.call_soon_threadsafe(callback, context=self._context)

    def set_timer(self, at: float, callback: Callable[[], None]) -> None:
        """Set the one timer."""
        if at == self._at:
            return
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._at = at
        if at != inf and not self.closed:
            wait_s = at - self._timers.time()
            wait_s = 0 if wait_s <= 0 else max(wait_s, LEAST_S)
            self._timer = self._timers.call_later(wait_s, self._fire, callback, context=self._context)

    def _fire(self, callback: Callable[[], None]) -> None:
        self._timer = None
        self._at = inf
        callback()


class AsyncioFuture(asyncio.Future[None]):
    """A future that tells of its cancellation at once. The task would tell a turn later, when what it waited for has been sent."""

    def __init__(self, loop: AbstractEventLoop, on_cancel: Callable[[], None]) -> None:
        super().__init__(loop=loop)
        self._on_cancel = on_cancel

    def cancel(self, msg: Any = None) -> bool:
        """Stop waiting; False if there is nothing to wait for any more."""
        cancelled = super().cancel(msg)
        if cancelled:
            self._on_cancel()
        return cancelled


class TrioLoop:
    """Of trio, which has no timer: a system task sleeps for all."""

    def __init__(self, token: Any) -> None:
        self._trio: Any = sys.modules["trio"]
        self._token = token
        self._scope: Any = None
        self._sleeps = False
        self._at = inf
        self.now: Callable[[], float] = self._trio.current_time

    @property
    def closed(self) -> bool:
        """Whether it has ended: only then it refuses."""
        try:
            self._token.run_sync_soon(_nothing, idempotent=True)
        except RuntimeError:
            return True
        return False

    def future(self, _on_cancel: Callable[[], None]) -> Future:
        """Make something to wait on."""
        return TrioFuture(self._trio.Event())

    def soon(self, callback: Callable[[], None]) -> None:
        """Call it in the next turn, from any thread."""
        self._token.run_sync_soon(callback)

    from_any_thread = soon

    def set_timer(self, at: float, callback: Callable[[], None]) -> None:
        """Tell the task when to wake; it ends when there is nothing to wake for."""
        self._at = at
        if self._scope is not None:
            self._scope.deadline = at if at != inf else -inf
        if at != inf and not self._sleeps:
            self._sleeps = True
            self._trio.lowlevel.spawn_system_task(self._sleep, callback)

    async def _sleep(self, callback: Callable[[], None]) -> None:
        """Sleep until the timer fires, again and again, and end once it is stopped."""
        while self._at != inf:
            with self._trio.CancelScope(deadline=self._at) as self._scope:
                await self._trio.sleep_forever()
            self._scope = None
            if self._at != inf:
                self._at = inf
                callback()
        self._sleeps = False


def _nothing() -> None:
    """Do nothing."""


class TrioFuture:
    """A future of trio's."""

    def __init__(self, event: Any) -> None:
        self._event = event

    def set_result(self, _result: None, /) -> None:
        """Let the task go on."""
        self._event.set()

    def __await__(self) -> Generator[Any, Any, None]:
        yield from self._event.wait().__await__()
