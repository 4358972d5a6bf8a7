"""A line to Redis: one connection, and the task that owns it. What travels on it is gathered by the compiled `Gathering`.

A caller waits on a waiter of its own; its cancellation or deadline never touches the wire.
"""

from __future__ import annotations

import asyncio
import contextvars
import os

import redis
from redis.asyncio.connection import AbstractConnection

from ratethrottle._calls import Call, Calls, Gathering
from ratethrottle.errors import StorageError, StorageProtocolError, StorageUnavailable
from ratethrottle.storage.redis.failures import failure, no_connection, refusal
from ratethrottle.storage.redis.scripts import SHEBANG, script
from ratethrottle.storage.redis.settings import Settings, abort, close
from ratethrottle.storage.redis.wire import Receiver, take_over

SCRIPTS = ("decide", "reset")


class Line(Gathering):
    """Carries the calls of one event loop. Not for other loops or processes."""

    def __init__(self, calls: Calls, settings: Settings, deadline_s: float, max_waiting: int) -> None:
        super().__init__(calls, asyncio.get_running_loop(), max_waiting)
        self.process = os.getpid()
        self._settings = settings
        self._deadline_s = deadline_s
        self._woken = asyncio.Event()  # wakes the owner
        self._wanted = False  # a connection, by somebody
        self._connection: AbstractConnection | None = None
        self._receiver: Receiver | None = None
        self._dropped: list[AbstractConnection] = []  # not heard any more, and to be closed by the owner
        self._shebang = True
        # In an empty context: the request that happens to come first must not lend its variables to all the others.
        self._owner = self.loop.create_task(self._own(), name="ratethrottle line", context=contextvars.Context())

    @property
    def closed(self) -> bool:
        """Whether its task has ended, with its loop's other tasks or by `aclose`."""
        return self._owner.done()

    def connect(self) -> None:
        """Have the owner connect, before a check needs it."""
        self._wanted = True
        self._woken.set()

    async def aclose(self) -> None:
        """Close the connection and fail what is waiting."""
        self._owner.cancel()
        await asyncio.wait([self._owner])

    def abandon(self) -> None:
        """Have the line closed by its own loop. From any thread, and from a destructor."""
        try:
            self.loop.call_soon_threadsafe(self._owner.cancel)
        except RuntimeError:
            return  # the loop is closed, and has cancelled the task before that

    def _lost(self, error: Exception | None) -> None:
        """Take note that the connection is gone."""
        self._drop(failure(error or ConnectionResetError(), self._deadline_s, sent=True))

    async def _own(self) -> None:
        try:
            while True:
                await self._woken.wait()
                self._woken.clear()
                await self._tidy()
                if self._wanted and not self._open:
                    self._wanted = False
                    await self._open_connection()
        finally:
            self._end(StorageUnavailable("the storage was closed"))
            if not self.loop.is_closed():  # by somebody who leaves tasks behind: nothing can be closed any more
                self._let_go()
                await self._tidy()

    async def _open_connection(self) -> None:
        try:
            async with asyncio.timeout(self._deadline_s):
                connection = await self._settings.connect()
                try:
                    await self._load(connection)
                except BaseException:
                    await close(connection)
                    raise
        except Exception as error:  # noqa: BLE001  # whatever redis-py or a credential provider raises, the callers get ours
            self._fail_waiting(failure(error, self._deadline_s, sent=False))
            return
        self._connection = connection
        self._receiver = Receiver(self._received, self._lost)
        wire = take_over(connection, self._receiver)
        decide, reset = (script(name) for name in SCRIPTS)
        self._opened(
            wire.write,
            (decide.sha(self._shebang), decide.body(self._shebang), reset.sha(self._shebang), reset.body(self._shebang)),
        )

    async def _load(self, connection: AbstractConnection) -> None:
        """Load the scripts, with `#!lua` where it is known: fakeredis loads such a script, but calls it a syntax error."""
        probe: list[list[bytes]] = [[b"EVAL", SHEBANG + b"return 1", b"0"]]
        for self._shebang in (True, False):
            # All in one round trip: a deadline covers connecting, and a secure connection has taken several already.
            commands = probe + [[b"SCRIPT", b"LOAD", script(name).body(self._shebang)] for name in SCRIPTS]
            await connection.send_packed_command(connection.pack_commands(commands), check_health=False)
            refusals = []
            for _ in commands:
                try:
                    await connection.read_response(disable_decoding=True)
                except redis.ResponseError as error:
                    refusals.append(error)
            if not refusals:
                return
            if not probe or "near '#'" not in str(refusals[0]):
                raise refusals[0]
            probe = []

    # What the gathering asks for:

    def _connect(self) -> None:
        self.connect()

    def _unsent(self) -> StorageError:
        if not self._open:
            return no_connection(self._deadline_s)
        return StorageUnavailable(f"Redis is slow: the check was not sent within {self._deadline_s} s, nor counted")

    def _refused(self, call: Call | None, text: bytes) -> None:
        if call is None:  # SCRIPT LOAD: the next call brings its script along anyway
            return
        if text.startswith(b"NOSCRIPT"):
            # The server has lost its scripts (SCRIPT FLUSH, restart, failover), and proves that the call wasn't run.
            self._send_again(call)
            return
        error = refusal(text.decode("utf-8", "replace"))
        self._fail(call, failure(error, self._deadline_s, sent=True))
        if isinstance(error, redis.exceptions.ReadOnlyError):
            self._drop(StorageUnavailable("Redis is no master any more; the check may have been counted"))

    def _broken(self, what: str) -> None:
        self._drop(StorageProtocolError(f"Redis sent {what}; the connection was dropped"))

    def _late(self) -> None:
        self._drop(
            StorageUnavailable("Redis didn't answer in time, and the connection was dropped; the check may have been counted")
        )

    def _drop(self, error: StorageError) -> None:
        self._let_go()
        self._shut(error)

    def _let_go(self) -> None:
        receiver, self._receiver = self._receiver, None
        connection, self._connection = self._connection, None
        if receiver is not None:
            receiver.let_go()
        if connection is not None:
            abort(connection)
            self._dropped.append(connection)
            self._woken.set()

    async def _tidy(self) -> None:
        while self._dropped:
            await close(self._dropped.pop())
