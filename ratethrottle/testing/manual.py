"""A storage in Redis whose time is a test's: each call says what time it is, and the scripts don't ask the server."""

from __future__ import annotations

import asyncio
import contextlib
from functools import cache
from hashlib import sha1
from typing import Any

from ratethrottle.errors import ConfigurationError, StorageError, shown
from ratethrottle.storage import Timers
from ratethrottle.storage.redis.greeting import Reached, ask
from ratethrottle.storage.redis.race import Pace, Progress
from ratethrottle.storage.redis.scripts import LATER, NAMES, SHEBANG, script
from ratethrottle.storage.redis.settings import close
from ratethrottle.storage.redis.storage import RedisStorage
from ratethrottle.storage.redis.topology import Master
from ratethrottle.storage.redis.wire import Receiver, Wire
from ratethrottle.testing.between import Between, passed
from ratethrottle.testing.clock import ManualClock

TIME = "call('TIME')"
# The server lets keys expire by its own clock. That of the test may stand still for longer than a key counts.
KEPT_MS = 86_400_000
# A busy machine is no outage, and the clock of the test doesn't see how long it takes to connect.
PATIENCE_S = 10.0
STEERED = {
    TIME: "{string.sub(test_now, 1, -7), string.sub(test_now, -6)}",
    "call('PSETEX', KEYS[k], expiry_ms, ": f"call('PSETEX', KEYS[k], string.format('%.0f', expiry_ms + {KEPT_MS}), ",
    "call('PSETEX', key, expiry_ms, ": f"call('PSETEX', key, string.format('%.0f', expiry_ms + {KEPT_MS}), ",
    "local lapse = format('%.0f', lapse_us / 1000)": f"local lapse = format('%.0f', lapse_us / 1000 + {KEPT_MS})",
}


def steer(text: str) -> str:
    """Have a script take the time from one argument more, the last: µs since 1970."""
    for theirs, ours in STEERED.items():
        text = text.replace(theirs, ours)
    return "local test_now = table.remove(ARGV)\n" + text


@cache
def steered(name: str) -> str:
    """Read a script that takes the time from its last argument."""
    return steer(script(name).text.decode())


@cache
def steered_texts(shebang: bool) -> dict[str, tuple[bytes, bytes]]:
    """Name -> (sha, text) of all scripts."""
    texts = {name: (SHEBANG if shebang else b"") + steered(name).encode() for name in (*NAMES, *LATER)}
    return {name: (sha1(text, usedforsecurity=False).hexdigest().encode(), text) for name, text in texts.items()}


def stamped(request: bytes, now_us: int) -> bytes:
    """Write commands anew, with the time as one more argument of each script call."""
    written, at = [], 0
    while at < len(request):
        first = request.index(b"\r\n", at) + 2
        words, name = int(request[at + 1 : first - 2]), b""
        end = first
        for word in range(words):
            begin = request.index(b"\r\n", end) + 2
            size = int(request[end + 1 : begin - 2])
            name = name if word else request[begin : begin + size]
            end = begin + size + 2
        if name in {b"EVALSHA", b"EVAL"}:
            now = b"%d" % now_us
            written.append(b"*%d\r\n%b$%d\r\n%b\r\n" % (words + 1, request[first:end], len(now), now))
        else:
            written.append(request[at:end])
        at = end
    return b"".join(written)


class SteeredWire:
    """Tells the scripts the time."""

    def __init__(self, behind: Wire, clock: ManualClock) -> None:
        self._behind = behind
        self._clock = clock

    def write(self, data: bytes) -> None:
        """Send bytes, without waiting."""
        self._behind.write(stamped(data, self._clock()))


class SteeredMaster(Between):
    """Opens connections on which the scripts have the clock of the test."""

    def __init__(self, behind: Master, clock: ManualClock) -> None:
        super().__init__(behind)
        self._clock = clock

    async def reach(self, pace: Pace) -> Reached:
        """Open a connection, and load our scripts. Raises what the one behind raises."""
        reached = await self.behind.reach(pace)
        texts = steered_texts(reached.shebang)
        replies: list[Any] = []
        try:
            loads = [(b"SCRIPT", b"LOAD", text) for _, text in texts.values()]
            replies = await ask(reached.connection, loads, Progress(), None)
        finally:
            refused = [reply for reply in replies if isinstance(reply, Exception)]
            if refused or not replies:
                await close(reached.connection)
        if refused:
            raise refused[0]

        def through(receiver: Receiver) -> Wire:
            return SteeredWire(reached.take_over(receiver), self._clock)

        return passed(reached, through, texts)

    async def connect(self) -> Any:
        """Open a connection for `clear()`, which sends commands of its own. Raises what the one behind raises."""
        connection: Any = await super().connect()
        send, beat = connection.send_command, script("beat").body(shebang=False)

        async def send_steered(*words: Any) -> None:
            if words[:2] == (b"EVAL", beat):
                words = (b"EVAL", steered("beat").encode(), *words[2:], self._clock())
            await send(*words)

        connection.send_command = send_steered
        return connection


class ManualRedisStorage(RedisStorage):
    """A RedisStorage whose time is that of a `ManualClock`: rules, leases, deadlines, slots and `acquire` go by it.

    Connecting takes real time.

    client: any that RedisStorage takes; one of `fakeredis` too. clock: all storages that share keys must have the same.
    prefix: by default one of the clock's own, so that tests don't meet in one Redis. The keys under it are deleted when the last
    storage of this process closes, or else expire within a day. prefilter_ttl: by default 0, so that Redis itself decides each check,
    and its `retry_after` is exact; what a process knows by itself is a lower bound. All other options are those of RedisStorage.

    Raises ConfigurationError.
    """

    _patience_s = PATIENCE_S

    def __init__(
        self, client: Any, *, clock: ManualClock, prefix: str | None = None, prefilter_ttl: float = 0, **options: Any
    ) -> None:
        if not isinstance(clock, ManualClock):
            raise ConfigurationError(f"clock is {shown(clock)}; it is a ManualClock")
        self._clock_us = self._clock = clock
        self._wipes = prefix is None
        super().__init__(client, prefix=clock.prefix if prefix is None else prefix, prefilter_ttl=prefilter_ttl, **options)
        clock.attach(self)

    @property
    def asked(self) -> bool:
        """Whether somebody waits for an answer of Redis."""
        return any(connection.batch.asked for known in list(self._open.values()) for connection in known) or any(
            slots.asked for slots in list(self._slots.values())
        )

    def timers(self, loop: asyncio.AbstractEventLoop) -> Timers:
        """Find what calls back by this storage's time: the clock."""
        return self._clock.timers(loop)

    async def aclose(self) -> None:
        """Close our connections for good, and delete the keys of a prefix that is the clock's own."""
        wipes = self._wipes and not self._closed and self.statistics().attempts > 0
        await super().aclose()
        if wipes and not self.repair.users:
            with contextlib.suppress(StorageError):  # whatever Redis is by now
                await self._wipe()

    def _batch_timers(self, loop: asyncio.AbstractEventLoop) -> Timers:
        return self._clock.timers(loop, background=True)

    def _master(self) -> Master:
        return SteeredMaster(super()._master(), self._clock)
