"""What blocks and isn't ours, on threads of our own: never on the loop, never in its executor, never in the way of a program's end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")

# A result that nobody waited for any more is given to the next attempt, if that comes within so long.
UNCLAIMED_S = 30.0
# What has run for so long may never end: it is begun once more beside that, though never on more than so many threads.
HANGS_S = 30.0
THREADS_MAX = 2


class Work(Generic[T]):
    """One call of `work` on a daemon thread. Any number of tasks may wait for its outcome, in any loop; one that leaves stops nothing."""

    def __init__(self, work: Callable[[], T], name: str) -> None:
        self.began_s = time.monotonic()
        self.ended_s: float | None = None  # monotonic time
        self.failed = False
        self.claimed = False  # somebody has taken the result
        self._outcome: Callable[[], T]
        self._lock = threading.Lock()
        self._waiting: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = []
        # A daemon: a program that ends doesn't wait for it. A pool's threads are waited for.
        threading.Thread(target=self._run, args=(work,), name=name, daemon=True).start()

    def _run(self, work: Callable[[], T]) -> None:
        try:
            result = work()
        except BaseException as error:  # noqa: BLE001  # SystemExit too: it is for the tasks that wait, and doesn't end their thread
            self.failed, raised = True, error
            self._outcome = lambda: _raise(raised)
        else:
            self._outcome = lambda: result
        with self._lock:
            self.ended_s = time.monotonic()
            waiting, self._waiting = self._waiting, []
        for loop, future in waiting:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(_wake, future)

    async def outcome(self) -> T:
        """Wait for the result. Raises what the work raised."""
        loop = asyncio.get_running_loop()
        with self._lock:
            future = None if self.ended_s is not None else loop.create_future()
            if future is not None:
                self._waiting.append((loop, future))
        if future is not None:
            try:
                await future
            finally:
                with self._lock:
                    if (loop, future) in self._waiting:
                        self._waiting.remove((loop, future))
        self.claimed = True
        return self._outcome()


class Shared(Generic[T]):
    """Runs `work` on a thread, once at a time unless it hangs: tasks that ask meanwhile wait for the same result.

    fresh_s: for how long a result that was taken serves others too. One that nobody waited for any more is kept for the next.
    """

    def __init__(self, work: Callable[[], T], name: str, fresh_s: float = 0.0) -> None:
        self.count = 0  # how often the work was begun
        self._work = work
        self._name = name
        self._fresh_s = fresh_s
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._last: Work[T] | None = None
        self._hanging: list[Work[T]] = []  # begun before the last one, and not ended yet

    async def get(self) -> T:
        """Wait for a result. Raises what the work raises."""
        return await self.begin().outcome()

    def begin(self) -> Work[T]:
        """Have the work begin, unless it is under way or a result is there."""
        if self._process != os.getpid():  # forked: the thread is the parent's, and so may be the holder of the lock
            self._process, self._lock, self._last, self._hanging = os.getpid(), threading.Lock(), None, []
        with self._lock:
            last = self._last
            if last is None or not self._serves(last):
                if last is not None and last.ended_s is None:
                    self._hanging.append(last)
                self.count += 1
                last = self._last = Work(self._work, self._name)
            return last

    def _serves(self, last: Work[T]) -> bool:
        if last.ended_s is None:
            self._hanging = [work for work in self._hanging if work.ended_s is None]
            return time.monotonic() - last.began_s < HANGS_S or len(self._hanging) + 1 >= THREADS_MAX
        age_s = time.monotonic() - last.ended_s
        return not last.failed and age_s < (self._fresh_s if last.claimed else UNCLAIMED_S)


def _raise(error: BaseException) -> T:  # type: ignore[type-var]  # it never returns
    if isinstance(error, Exception):
        raise error
    raise RuntimeError(type(error).__name__) from error


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
