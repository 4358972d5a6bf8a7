"""Which server is the master: the one that a client names, or the one that sentinels agree on, followed as they do.

Two rules. No connection is handed out to a server that doesn't say itself, by ROLE, that it is a master. And what most of the
sentinels say outweighs what a server says of itself: after a planned failover the old master takes writes for seconds, and
what it counts is lost.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from redis.asyncio.connection import AbstractConnection

from ratethrottle.errors import StorageRefused, StorageUnavailable
from ratethrottle.storage.redis.candidates import Candidates, majority, open_master
from ratethrottle.storage.redis.failures import is_refusal, said_by
from ratethrottle.storage.redis.greeting import Reached, first, load
from ratethrottle.storage.redis.race import Pace
from ratethrottle.storage.redis.sentinel import Sentinel
from ratethrottle.storage.redis.settings import HALF_SECONDS, Address, Settings, abort, close
from ratethrottle.storage.redis.tasks import own_task, result_of

T = TypeVar("T")

# How long a sentinel is waited for once a candidate of another one has turned out a master.
GRACE_S = 0.05
# How long a sentinel is waited for before it has no voice in whether to leave a master that still answers.
SILENT_S = 0.5
# A part of what an attempt may take: then its error can say what was found, and not only that it took too long.
FIND_SHARE = 0.9
# A connection on which a server was found to be the master is kept for the next connection, for so long.
SPARE_S = 0.2
# A master that was found to be one isn't suspected again before, or a master without replicas would be left at each check.
TRUST_S = 0.5


class Master:
    """A single server, which never moves. Belongs to one event loop and process."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    async def connect(self) -> AbstractConnection:
        """Open a connection. Raises redis-py's errors, OSError and StorageUnavailable; the caller bounds the time."""
        return (await self.reach(HALF_SECONDS)).connection

    async def reach(self, pace: Pace) -> Reached:
        """Open a connection and load our scripts. Raises as `connect` does; the caller bounds the time.

        pace: when a server that says nothing is tried once more.
        """
        return await self._settings.reach(first(), load, pace=pace)

    @property
    def credentials_asked(self) -> int:
        """How often the client's credential provider was asked."""
        return self._settings.credentials_asked

    def watch(self, moved: Callable[[], None]) -> None:
        """Have `moved` called, in the loop, when every connection must be left: the master is elsewhere, or is suspected."""

    def suspect(self) -> None:
        """Look for the master again: its answer (READONLY, NOREPLICAS) says that it may be none any more."""

    def end(self) -> list[asyncio.Task[Any]]:
        """Have what runs here end: these tasks. Connections that were handed out stay with their owners."""
        return []

    async def aclose(self) -> None:
        """End what runs here, and wait for that."""
        tasks = self.end()
        if tasks:
            await asyncio.wait(tasks)

    def abandon(self) -> None:
        """Have its own loop close it. From any thread, and from a destructor."""


def master(settings: Settings, followed: Callable[[str, str], None]) -> Master:
    """Make what finds the master, for the running loop. Nothing connects before `connect`.

    followed: called when the sentinels name another master, with host:port before, and after.
    """
    return FollowedMaster(settings, followed) if settings.sentinels else Master(settings)


class FollowedMaster(Master):
    """The master that sentinels name, found by the first `connect` and followed from then on."""

    def __init__(self, settings: Settings, followed: Callable[[str, str], None]) -> None:
        super().__init__(settings)
        self._followed = followed
        self._loop = asyncio.get_running_loop()
        self._sentinels: list[Sentinel] = []
        self._watchers: list[Callable[[], None]] = []
        self._current: Address | None = None  # the newest master: what connections are open to
        self._trusted = False  # whether the next connection goes there without a search
        self._verified_at_s = -TRUST_S
        self._spare: Reached | None = None
        self._spare_ends: asyncio.TimerHandle | None = None
        self._dropped: list[AbstractConnection] = []  # to be closed by the task that follows
        self._news = self._loop.create_future()  # done, and replaced, with every answer of a sentinel
        self._finding: asyncio.Task[Address] | None = None
        self._following: asyncio.Task[None] | None = None
        self._closed = False

    def watch(self, moved: Callable[[], None]) -> None:
        """Have `moved` called, in the loop, when every connection must be left: the master is elsewhere, or is suspected."""
        self._watchers.append(moved)

    async def reach(self, pace: Pace) -> Reached:  # noqa: ARG002  # what is tried again within has a pace of its own
        """Open a connection to the master. Raises redis-py's errors, OSError and StorageUnavailable; the caller bounds the time."""
        self._begin()
        for last in (False, True):
            address = self._current if self._trusted else None
            if address is None:
                address = await self._find_together()
            try:
                reached = self._take_spare() or await open_master(self._settings, address)
            except BaseException as error:
                # A deadline that passed says as much as a refusal: the next attempt looks among all that the sentinels name.
                self._distrust(address)
                if last or not isinstance(error, Exception):
                    raise
                continue
            if address == self._current:
                return reached
            await close(reached.connection)  # it has moved meanwhile
        raise StorageUnavailable("the master is moving from one server to another")

    def suspect(self) -> None:
        """Look for the master again: its answer (READONLY, NOREPLICAS) says that it may be none any more."""
        if self._trusted and self._loop.time() - self._verified_at_s >= TRUST_S:
            self._distrust(self._current)
            self._ask()
            self._loop.call_soon(self._announce)  # not from within the reply that led here

    def abandon(self) -> None:
        """Have its own loop close it. From any thread, and from a destructor."""
        with contextlib.suppress(RuntimeError):  # the loop is closed, and has cancelled the tasks before that
            self._loop.call_soon_threadsafe(self.end)

    def end(self) -> list[asyncio.Task[Any]]:
        """Have what runs here end: these tasks. Connections that were handed out stay with their owners."""
        self._closed = True
        self._drop_spare()
        owned: list[asyncio.Task[Any] | None] = [self._finding, self._following, *(sentinel.task for sentinel in self._sentinels)]
        tasks = [task for task in owned if task is not None and not task.done()]
        for task in tasks:
            task.cancel()
        return tasks

    def _begin(self) -> None:
        if self._closed:
            raise StorageUnavailable("the storage was closed")
        if not self._sentinels:
            self._sentinels = [
                Sentinel(settings, self._settings.master_name, self._heard, self._ask) for settings in self._settings.sentinels
            ]
            self._following = self._task(self._follow(), "ratethrottle master")

    def _task(self, work: Coroutine[Any, Any, T], name: str) -> asyncio.Task[T]:
        return own_task(self._loop, work, name)

    # What sentinels say

    def _heard(self) -> None:
        news, self._news = self._news, self._loop.create_future()
        news.set_result(None)

    def _ask(self) -> None:
        for sentinel in self._sentinels:
            sentinel.ask()

    def _awaited(self, for_s: float) -> bool:
        """Whether a sentinel that was asked at most so long ago may still answer."""
        return any(sentinel.waiting_since_s is not None and not sentinel.silent(for_s) for sentinel in self._sentinels)

    def _voices(self) -> Counter[Address]:
        """Count the sentinels that name each address in their newest answer; those that owe one are not counted."""
        return Counter(
            (self._settings.forced_host or sentinel.named[0], sentinel.named[1])
            for sentinel in self._sentinels
            if sentinel.named is not None and sentinel.waiting_since_s is None
        )

    # What is done about it

    def _take(self, address: Address, reached: Reached) -> None:
        """Take a server that was found to be the master, and leave the one before."""
        before = self._current
        self._current, self._trusted, self._verified_at_s = address, True, self._loop.time()
        self._drop_spare()
        self._spare = reached
        self._spare_ends = self._loop.call_later(SPARE_S, self._drop_spare)
        if before not in (None, address):
            self._followed(f"{before[0]}:{before[1]}", f"{address[0]}:{address[1]}")
            self._announce()

    def _announce(self) -> None:
        for moved in self._watchers:
            moved()

    def _distrust(self, address: Address | None) -> None:
        if address == self._current:
            self._trusted = False
            self._drop_spare()

    def _take_spare(self) -> Reached | None:
        spare, self._spare = self._spare, None
        if self._spare_ends is not None:
            self._spare_ends.cancel()
            self._spare_ends = None
        return spare

    def _drop_spare(self) -> None:
        spare = self._take_spare()
        if spare is not None:
            abort(spare.connection)
            self._dropped.append(spare.connection)
            self._heard()

    async def _follow(self) -> None:
        """Leave the master when the sentinels agree on another one, and that is one."""
        settled: Counter[Address] | None = None  # the voices that were found not to agree
        try:
            news = self._news
            while True:
                await asyncio.wait([news])
                news = self._news  # what comes from here on is looked at in the next turn
                await self._tidy()
                voices = self._voices()
                if self._current is None or voices == settled or voices.keys() <= {self._current}:
                    continue
                settled = await self._settle()
        finally:
            if not self._loop.is_closed():  # by a program that leaves tasks behind: nothing can be closed any more
                self._drop_spare()
                await self._tidy()

    async def _settle(self) -> Counter[Address] | None:
        """Ask all sentinels, and do as most of those say that answer. Returns their voices if there is nothing to be done."""
        self._ask()
        while self._awaited(SILENT_S) and majority(self._voices(), len(self._sentinels)) is None:
            await asyncio.wait([self._news], timeout=GRACE_S)
        voices = self._voices()
        agreed = majority(voices, voices.total())
        if agreed in (None, self._current):
            return voices
        try:
            async with asyncio.timeout(self._settings.connect_timeout_s):
                reached = await open_master(self._settings, agreed)
        except Exception:  # noqa: BLE001  # whatever it is: a sentinel may lie, or be too early; it will be asked again
            return None
        self._take(agreed, reached)
        return None

    async def _tidy(self) -> None:
        while self._dropped:
            await close(self._dropped.pop())

    async def _find_together(self) -> Address:
        """Wait for the search that is on, or a new one. A caller that is cancelled leaves it to the others."""
        finding = self._finding
        if finding is None or finding.done():
            finding = self._finding = self._task(self._find(), "ratethrottle search for the master")
            finding.add_done_callback(lambda found: found.cancelled() or found.exception())  # nobody may be there to see it
        await asyncio.wait([finding])
        if finding.cancelled() and self._closed:
            raise StorageUnavailable("the storage was closed")
        return result_of(finding)

    async def _find(self) -> Address:
        """Try the addresses that sentinels name, as they come in, until one is found that may be taken."""
        until_s = self._loop.time() + self._settings.connect_timeout_s * FIND_SHARE
        candidates = Candidates(self._settings)
        self._ask()
        try:
            while True:
                voices = self._voices()
                candidates.try_all(voices)
                chosen = candidates.choose(voices, len(self._sentinels), more_may_speak=self._awaited(GRACE_S))
                if chosen is not None:
                    self._take(*chosen)
                    return chosen[0]
                left_s = until_s - self._loop.time()
                if left_s <= 0 or not (candidates.hopeful or self._awaited(self._settings.connect_timeout_s)):
                    raise candidates.failure(voices) or self._nobody()
                await asyncio.wait(
                    [self._news, *candidates.pending], timeout=min(left_s, GRACE_S / 4), return_when=asyncio.FIRST_COMPLETED
                )
        finally:
            await candidates.discard()

    def _nobody(self) -> StorageUnavailable:
        """Word that no sentinel named an address."""
        count, name = len(self._sentinels), self._settings.master_name
        errors = [sentinel.error for sentinel in self._sentinels if sentinel.error is not None]
        if any(sentinel.error is None and sentinel.waiting_since_s is None for sentinel in self._sentinels):
            return StorageUnavailable(f"none of {count} sentinels names a master {name!r}")
        said = f" ({said_by(errors[0])})" if errors else ""
        refusals = [error for error in errors if is_refusal(error)]
        if refusals:
            # What most of them say nobody else will mend; otherwise those that are away may have us when they are back.
            kind = StorageRefused if len(refusals) * 2 > count else StorageUnavailable
            return kind(
                f"the sentinels refuse the user or the password, or are no sentinels ({said_by(refusals[0])}); their user and password "
                "are sentinel_username and sentinel_password in a URL, sentinel_kwargs of a Sentinel"
            )
        return StorageUnavailable(f"none of {count} sentinels answers{said}; are they up, and are the addresses right?")
