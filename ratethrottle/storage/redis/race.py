"""One attempt to connect, and what is tried again beside it while nothing is heard.

An attempt is patient: what it has achieved isn't thrown away. But what was lost on the way never comes, however long it is waited for:
the packet of a network that was away, the answer of a server that was replaced. So a silent one gets a fresh one beside it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from ratethrottle.storage.redis.tasks import own_task, result_of, succeeded

T = TypeVar("T")

# A server that has said nothing for so long gets another try, at the next turn. Less than half a turn takes: one that answers a byte at a
# time gets a try at each turn all the same, though each try hears something. More than a round trip of 200 ms.
SILENT_S = 0.22


class Progress:
    """Since when a try has been waiting for the server; not while it waits for something else."""

    def __init__(self) -> None:
        self._since_s: float | None = None
        self._answered = False  # what was sent last
        self.heard()

    def heard(self) -> None:
        """Take note that the server has said something."""
        self._since_s = time.monotonic()

    def sent(self) -> None:
        """Take note that commands were sent, in one write."""
        self._answered = False

    def replied(self) -> None:
        """Take note of a reply to them. They all are due when the first one is: of a server that trickles nothing is heard after that."""
        if not self._answered:
            self._answered = True
            self.heard()

    def elsewhere(self) -> None:
        """Take note that something else is waited for, until the next `heard`."""
        self._since_s = None

    def silent_in_s(self) -> float:
        """How long it is until the server has been silent for too long."""
        return SILENT_S if self._since_s is None else self._since_s + SILENT_S - time.monotonic()


async def half_second() -> None:
    """Wait for the next turn of an attempt that shares its turns with no other."""
    await asyncio.sleep(0.5 - SILENT_S)


def uncounted() -> None:
    """Count nothing."""


@dataclass(frozen=True, slots=True)
class Pace:
    """When a server that is silent may be tried once more. turn: comes then. again: told of each try but the first one."""

    turn: Callable[[], Coroutine[Any, Any, None]] = half_second
    again: Callable[[], None] = uncounted


class Race(Generic[T]):
    """Runs `begin`, and again whenever the newest try is silent and its turn has come.

    At most two run at a time: the oldest, which may have achieved the most, and the newest. discard: closes what comes too late.
    """

    def __init__(
        self, begin: Callable[[Progress], Coroutine[Any, Any, T]], pace: Pace, discard: Callable[[T], Awaitable[None]]
    ) -> None:
        self._begin = begin
        self._pace = pace
        self._discard = discard
        self._loop = asyncio.get_running_loop()
        self._tries: dict[asyncio.Task[T], Progress] = {}  # in the order in which they began
        self._dropped: set[asyncio.Task[T]] = set()
        self._turning: asyncio.Task[None] | None = None

    async def run(self) -> T:
        """Return what the first try returns. Raises what a try raises, unless another one still makes progress."""
        self._start()
        try:
            result = await self._first()
        except BaseException:
            await self._end()
            raise
        try:
            await self._end()
        except BaseException:  # cancelled: nobody else will close it
            await self._discard(result)
            raise
        return result

    async def _first(self) -> T:
        while True:
            await self._wait()
            for task in [task for task in self._tries if task.done()]:
                del self._tries[task]
                if succeeded(task) or all(other.silent_in_s() <= 0 for other in self._tries.values()):
                    return result_of(task)
            self._renew()

    @property
    def _silent_in_s(self) -> float:
        return list(self._tries.values())[-1].silent_in_s()

    def _start(self) -> None:
        for middle in list(self._tries)[1:]:
            middle.cancel()
            self._dropped.add(middle)
            del self._tries[middle]
        progress = Progress()
        self._tries[own_task(self._loop, self._begin(progress), "ratethrottle try")] = progress

    async def _wait(self) -> None:
        """Wait until a try has ended, is silent, or its turn has come."""
        waits: set[asyncio.Task[Any]] = {*self._tries}
        timeout_s = None
        if self._turning is not None:
            waits.add(self._turning)
        else:
            timeout_s = max(self._silent_in_s, 0.001)
        await asyncio.wait(waits, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)

    def _renew(self) -> None:
        """Begin another try if the newest one is silent and it is its turn."""
        silent = self._silent_in_s <= 0
        if self._turning is None and silent:
            self._turning = own_task(self._loop, self._pace.turn(), "ratethrottle turn")
        elif self._turning is not None and self._turning.done():
            result_of(self._turning)
            self._turning = None
            if silent:
                self._start()
                self._pace.again()

    async def _end(self) -> None:
        left: set[asyncio.Task[Any]] = {*self._tries, *self._dropped}
        if self._turning is not None:
            left.add(self._turning)
        for task in left:
            task.cancel()
        if left and not self._loop.is_closed():  # by a program that leaves tasks behind: nothing can be waited for any more
            try:
                await asyncio.wait(left)
            finally:
                for task in left - {self._turning}:
                    if succeeded(task):
                        await self._discard(task.result())
