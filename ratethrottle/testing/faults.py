"""Redis away, slow or refusing, when a test says so."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import re
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from types import TracebackType
from typing import Self

from ratethrottle.errors import ConfigurationError, StorageUnavailable, shown
from ratethrottle.limiter import RateThrottleCore
from ratethrottle.storage import Timers
from ratethrottle.storage.redis.connection import Connection
from ratethrottle.storage.redis.failures import refusal
from ratethrottle.storage.redis.greeting import Reached
from ratethrottle.storage.redis.race import Pace
from ratethrottle.storage.redis.settings import close
from ratethrottle.storage.redis.storage import RedisStorage
from ratethrottle.storage.redis.topology import Master
from ratethrottle.storage.redis.wire import Receiver, Wire
from ratethrottle.testing.between import Between, passed
from ratethrottle.testing.clock import ManualClock

WRONGPASS = "WRONGPASS invalid username-password pair or user is disabled."
REPLY = re.compile(r"[A-Z]{2,20} [^\r\n]{1,200}\Z")
SLOW_MOST_S = 3600.0
LOOK_S = 0.001
WAIT_S = 10.0  # an `async with` waits for the limiter at most so long
OTHER_LOOP_S = 5.0


class Faults:
    """Has Redis be away, slow or refusing for one limiter, on fakeredis and on a real server alike.

    limiter: one on Redis, or its RedisStorage. The server isn't touched: other limiters and clients go on using it.

    Each method gives a context manager, for `with` and `async with`. Within another one, the inner one counts. `async with` also waits:
    until the limiter has noticed, and at its end until Redis serves the limiter again. It raises StorageError if Redis doesn't.

    Raises ConfigurationError, also for a limiter in memory: nothing can fail there.
    """

    def __init__(self, limiter: RateThrottleCore | RedisStorage) -> None:
        storage: object = limiter._storage if isinstance(limiter, RateThrottleCore) else limiter
        if not isinstance(storage, RedisStorage):
            raise ConfigurationError(
                f"faults are for a limiter on Redis, or for a RedisStorage, not for {_called(limiter, storage)}; "
                "RedisStorage(fakeredis.FakeAsyncRedis()) needs no server"
            )
        self._storage = storage
        self._switch = Switch(storage)
        storage._between.append(self._switch.put_before)
        # What these say now, nothing of ours hears.
        self._untapped = weakref.WeakSet(self._connections())
        for connection in self._untapped:
            connection.master = self._switch.put_before(connection.master)

    def outage(self) -> Fault:
        """Redis is away: connections are lost, and new ones are refused. Checks go by the outage policy."""
        return Fault(self, error=lambda: ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED)))

    def refuse(self, reply: str = WRONGPASS) -> Fault:
        """Redis refuses the limiter: connections are lost, and each new one hears this error reply.

        By default the password is wrong, and checks raise StorageRefused under each policy. What other replies become is up to them:
        "LOADING Redis is loading the dataset in memory" is an outage, as ever.
        Raises ConfigurationError.
        """
        if not isinstance(reply, str) or not REPLY.match(reply):
            raise ConfigurationError(
                f"reply is {shown(reply)}; it is an error reply of Redis, in one line, such as {WRONGPASS!r}"
            )
        return Fault(self, error=lambda: refusal(reply))

    def slow(self, seconds: float | timedelta) -> Fault:
        """Each reply of Redis comes so much later. From the storage's `deadline` on that is an outage.

        With a `ManualClock` these are seconds of that clock. A check that waits for a reply moves it.
        Raises ConfigurationError.
        """
        delay_s = seconds.total_seconds() if isinstance(seconds, timedelta) else seconds
        if isinstance(delay_s, bool) or not isinstance(delay_s, (int, float)) or not 0 < delay_s <= SLOW_MOST_S:
            raise ConfigurationError(f"seconds is {shown(seconds)}; it is above 0, and {SLOW_MOST_S:g} at most")
        return Fault(self, delay_s=delay_s)

    def _begin(self, fault: Fault) -> None:
        self._switch.faults.append(fault)
        self._apply()

    def _end(self, fault: Fault) -> None:
        self._switch.faults.remove(fault)
        self._switch.release()
        self._apply()

    def _apply(self) -> None:
        """Have each connection meet what is the matter now, in its own loop, and wait for that."""
        for connection in self._connections():
            if not connection.closed and not connection.loop.is_closed():
                _in_its_loop(connection, self._apply_to)

    def _apply_to(self, connection: Connection) -> None:
        fault = self._switch.fault
        untapped = connection in self._untapped
        if connection.batch.open and (untapped if fault is None or fault.error is None else True):
            connection._lost(ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET)))
        self._untapped.discard(connection)
        # The next attempt is made at once, however the last ones did.
        connection._backoff.succeeded()
        if connection.batch.away or connection.batch.refused:
            connection.connect()

    async def _tapped(self) -> None:
        """Have replies come by us, before they are to be slow."""
        if any(connection.batch.open and connection in self._untapped for connection in self._here()):
            self._apply()
            for connection in self._here():
                connection.connect()
            await self._served()

    async def _noticed(self) -> None:
        """Wait until attempts to connect have failed. A limiter that hasn't been used makes its first one with the first check."""
        before = {connection: connection.failures for connection in self._here()}
        for connection in before:
            connection.connect()
        await self._until(lambda connection: connection.failures > before.get(connection, 0))

    async def _served(self) -> None:
        """Wait until Redis serves the limiter. Raises StorageError if it doesn't."""

        def served(connection: Connection) -> bool:
            batch = connection.batch
            return batch.serving or (batch.state == "closed" and not (batch.away or batch.refused))

        if not await self._until(served):
            reasons = [connection.batch.reason for connection in self._here()]
            raise next(filter(None, reasons), StorageUnavailable(f"Redis didn't serve the limiter within {WAIT_S:g} s"))

    def _connections(self) -> list[Connection]:
        return [each for known in list(self._storage._open.values()) for each in known if each.process == os.getpid()]

    def _here(self) -> list[Connection]:
        """Those of the running loop."""
        loop = asyncio.get_running_loop()
        return [connection for connection in self._connections() if connection.loop is loop and not connection.closed]

    async def _until(self, holds: Callable[[Connection], bool]) -> bool:
        """Wait until it holds of each connection of this loop; False if that takes too long."""
        until_s = time.monotonic() + WAIT_S
        while not all(map(holds, self._here())):
            if time.monotonic() >= until_s:
                return False
            await asyncio.sleep(LOOK_S)
        return True


class Fault:
    """What is the matter with Redis for as long as a `with` block lasts. Made by `Faults`.

    error: makes what an attempt to connect raises. delay_s: how much later replies come.
    """

    def __init__(self, faults: Faults, *, error: Callable[[], Exception] | None = None, delay_s: float = 0.0) -> None:
        self.error = error
        self.delay_s = delay_s
        self._faults = faults

    def __enter__(self) -> Self:
        self._faults._begin(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._faults._end(self)

    async def __aenter__(self) -> Self:
        if self.error is None:
            await self._faults._tapped()
        self._faults._begin(self)
        if self.error is not None:
            await self._faults._noticed()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._faults._end(self)
        if error is None and self._faults._switch.fault is None:
            await self._faults._served()


class Switch:
    """What the connections of a storage meet now."""

    def __init__(self, storage: RedisStorage) -> None:
        self.faults: list[Fault] = []
        self._storage = weakref.ref(storage)
        clock = storage._clock_us
        self._clock = clock if isinstance(clock, ManualClock) else None
        self._taps: weakref.WeakSet[Tap] = weakref.WeakSet()
        self._ticking: weakref.WeakSet[asyncio.AbstractEventLoop] = weakref.WeakSet()

    @property
    def fault(self) -> Fault | None:
        """The innermost."""
        return self.faults[-1] if self.faults else None

    @property
    def delay_s(self) -> float:
        """How much later replies come."""
        return self.fault.delay_s if self.fault is not None else 0.0

    def put_before(self, master: Master) -> Master:
        """Have connections meet what is the matter."""
        return FaultyMaster(master, self)

    def hinder(self) -> None:
        """Raise what an attempt to connect meets."""
        if self.fault is not None and self.fault.error is not None:
            raise self.fault.error()

    def tap(self, receiver: Receiver) -> Tap:
        """Let `receiver` hear late what comes late."""
        tap = Tap(self, receiver)
        self._taps.add(tap)
        return tap

    def release(self) -> None:
        """Have all that is held back come now."""
        for tap in list(self._taps):
            with contextlib.suppress(RuntimeError):  # its loop is closed
                tap.loop.call_soon_threadsafe(tap.release)

    def timers(self, loop: asyncio.AbstractEventLoop) -> Timers:
        """Find what calls back once a reply may come. A test's clock moves meanwhile, while a check waits."""
        if self._clock is None:
            return loop
        if loop not in self._ticking:
            self._ticking.add(loop)
            loop.call_soon(self._tick, loop)
        return self._clock.timers(loop, background=True)

    def _tick(self, loop: asyncio.AbstractEventLoop) -> None:
        storage = self._storage()
        if storage is None or self._clock is None or not self.delay_s:
            self._ticking.discard(loop)
            return
        slots = storage._slots.get(loop)
        if any(connection.batch.asked for connection in storage._open.get(loop, ())) or (slots is not None and slots.asked):
            self._clock.step(loop)
        loop.call_later(LOOK_S, self._tick, loop)


class FaultyMaster(Between):
    """Opens connections, unless there are none to be had."""

    def __init__(self, behind: Master, switch: Switch) -> None:
        super().__init__(behind)
        self._switch = switch

    async def reach(self, pace: Pace) -> Reached:
        """Open a connection. Raises what the fault is, and what the one behind raises."""
        self._switch.hinder()
        reached = await self.behind.reach(pace)
        try:
            self._switch.hinder()  # it has begun meanwhile
        except Exception:
            await close(reached.connection)
            raise

        def through(receiver: Receiver) -> Wire:
            return reached.take_over(self._switch.tap(receiver).receiver)

        return passed(reached, through)


class Tap:
    """Holds back what comes on a connection, for as long as the fault says. It lives as long as its receiver is heard."""

    def __init__(self, switch: Switch, receiver: Receiver) -> None:
        self.loop = asyncio.get_running_loop()
        self.receiver = Receiver(self._heard, receiver.connection_lost)
        self._switch = switch
        self._theirs = receiver
        self._held: deque[bytes] = deque()
        self._released = 0

    def release(self, most: int | None = None) -> None:
        """Pass on what was held back; most: up to that one of all that ever were."""
        while self._held and (most is None or self._released < most):
            self._released += 1
            self._theirs.data_received(self._held.popleft())

    def _heard(self, data: bytes) -> None:
        delay_s = self._switch.delay_s
        if not self._held and not delay_s:
            self._theirs.data_received(data)
            return
        self._held.append(data)
        number = self._released + len(self._held)
        self._switch.timers(self.loop).call_later(delay_s, lambda: self.release(number))


def _called(limiter: object, storage: object) -> str:
    if isinstance(storage, type):
        return f"the class {storage.__name__}"
    return f"one with {type(storage).__name__}" if limiter is not storage else f"a {type(limiter).__name__}"


def _in_its_loop(connection: Connection, work: Callable[[Connection], None]) -> None:
    """Do something with a connection in its loop, and wait for that if the loop runs in another thread."""
    try:
        here = asyncio.get_running_loop()
    except RuntimeError:
        here = None
    if connection.loop is here or not connection.loop.is_running():
        work(connection)
        return
    done = threading.Event()

    def run() -> None:
        try:
            work(connection)
        finally:
            done.set()

    connection.loop.call_soon_threadsafe(run)
    if not done.wait(OTHER_LOOP_S):
        raise StorageUnavailable(f"the event loop of the limiter was busy for {OTHER_LOOP_S:g} s")
