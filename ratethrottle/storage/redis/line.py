"""A line to Redis: one connection, owned by one task, and a queue of calls that are answered in order.

A caller waits on a future of its own; its cancellation or deadline never touches the wire.
"""

from __future__ import annotations

import asyncio
import contextvars
import os
from collections import deque
from itertools import count
from typing import Any

import redis
from redis.asyncio.connection import AbstractConnection

from ratethrottle.errors import StorageError, StorageProtocolError, StorageTimeout, StorageUnavailable
from ratethrottle.storage.redis.failures import failure, no_connection
from ratethrottle.storage.redis.scripts import SHEBANG, Script, script
from ratethrottle.storage.redis.settings import Settings, close

CALLS_TOGETHER_MAX = 64  # calls written at once before their replies are read
SCRIPTS = ("decide", "reset")


class Call:
    """One script call: what to send, until when it matters, and the future that its caller waits on."""

    __slots__ = ("args", "deadline", "future", "keys", "request", "script", "sent")

    def __init__(self, script: Script, keys: list[bytes], args: list[bytes], deadline: float, future: asyncio.Future[list[Any]]):
        self.script = script
        self.keys = keys
        self.args = args
        self.deadline = deadline  # of the loop's clock
        self.future = future
        self.request = b""
        self.sent = False

    def fail(self, error: StorageError) -> None:
        """End the call with an error of its own, unless its caller has gone."""
        if not self.future.done():
            self.future.set_exception(error)
            self.future.exception()  # marks it as seen: a caller that is cancelled in this very moment never looks


class Line:
    """Carries script calls of one event loop. Not for other loops or processes."""

    def __init__(self, settings: Settings, deadline_s: float, max_waiting: int) -> None:
        self.process = os.getpid()
        self.loop = asyncio.get_running_loop()
        self._settings = settings
        self._deadline_s = deadline_s
        self._max_waiting = max_waiting
        self._waiting: deque[Call] = deque()
        self._wake = asyncio.Event()
        self._connection: AbstractConnection | None = None
        self._shebang = True
        self._session = os.urandom(6).hex()
        self._requests = count()
        # In an empty context: the request that happens to come first must not lend its variables to all the others.
        self._owner = self.loop.create_task(self._own(), name="ratethrottle line", context=contextvars.Context())

    @property
    def closed(self) -> bool:
        """Whether its task has ended, with its loop's other tasks or by `aclose`."""
        return self._owner.done()

    async def call(self, script: Script, keys: list[bytes], args: list[bytes], deadline: float) -> list[Any]:
        """Run a script; returns its reply without the request id. Raises a StorageError by `deadline`, of the loop's clock."""
        if len(self._waiting) >= self._max_waiting:
            raise StorageUnavailable(
                f"{self._max_waiting} calls are waiting for Redis already; that is this process's load, not an outage"
            )
        call = Call(script, keys, args, deadline, self.loop.create_future())
        self._waiting.append(call)
        self._wake.set()
        timer = self.loop.call_at(deadline, self._expire, call)
        try:
            return await call.future
        finally:
            timer.cancel()

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

    def _expire(self, call: Call) -> None:
        if call.sent:
            call.fail(StorageTimeout(self._deadline_s))
        elif self._connection is None:
            call.fail(no_connection(self._deadline_s))
        else:
            call.fail(StorageUnavailable(f"Redis is slow: the check was not sent within {self._deadline_s} s, nor counted"))

    async def _own(self) -> None:
        try:
            while True:
                if not self._waiting:
                    self._wake.clear()
                    await self._wake.wait()
                calls = [self._waiting.popleft() for _ in range(min(len(self._waiting), CALLS_TOGETHER_MAX))]
                calls = wanted(calls)
                if calls:
                    await self._serve(calls)
        finally:
            for call in self._waiting:
                call.fail(StorageUnavailable("the storage was closed"))
            self._waiting.clear()
            if not self.loop.is_closed():  # by somebody who leaves tasks behind: nothing can be closed any more
                await self._drop()

    async def _serve(self, calls: list[Call]) -> None:
        """Send calls together and settle each by its own reply, or all that are left by what went wrong."""
        try:
            async with asyncio.timeout_at(max(call.deadline for call in calls)):
                connection = await self._connected()
                # Connecting takes time, and whoever has gone by then is not charged.
                if calls := wanted(calls):
                    await self._exchange(connection, calls)
        except Exception as error:  # noqa: BLE001  # whatever redis-py or a credential provider raises, the callers get ours
            await self._drop()
            for call in calls:
                call.fail(failure(error, self._deadline_s, sent=call.sent))
        except BaseException:
            for call in calls:
                call.fail(StorageUnavailable("the storage was closed"))
            raise

    async def _exchange(self, connection: AbstractConnection, calls: list[Call]) -> None:
        await self._send(connection, [self._command(call) for call in calls])
        unknown, stale = await self._read(connection, calls)
        if unknown := wanted(unknown):
            # The server has lost its scripts (SCRIPT FLUSH, restart, failover). NOSCRIPT proves that the calls weren't run,
            # so they are sent once more, by value: nothing can be flushed in between. What is only evaluated may be evicted
            # from the server's cache (since Redis 7.4), so the scripts are loaded again too.
            names = {call.script.name for call in unknown}
            loads = [[b"SCRIPT", b"LOAD", script(name).body(self._shebang)] for name in names]
            await self._send(connection, loads + [self._command(call, by_value=True) for call in unknown])
            for _ in loads:
                await connection.read_response(disable_decoding=True)
            _, stale = await self._read(connection, unknown, resent=True)
        if stale:
            await self._drop()

    async def _send(self, connection: AbstractConnection, commands: list[list[bytes]]) -> None:
        await connection.send_packed_command(connection.pack_commands(commands), check_health=False)

    async def _read(self, connection: AbstractConnection, calls: list[Call], resent: bool = False) -> tuple[list[Call], bool]:
        """Settle calls by their replies; returns those whose script was unknown, and whether the server is no master now."""
        unknown, stale = [], False
        for call in calls:
            try:
                reply = await connection.read_response(disable_decoding=True)
            except redis.exceptions.NoScriptError as error:
                if resent:
                    call.fail(failure(error, self._deadline_s, sent=True))
                else:
                    unknown.append(call)
            except redis.ResponseError as error:
                stale = stale or isinstance(error, redis.exceptions.ReadOnlyError)
                call.fail(failure(error, self._deadline_s, sent=True))
            else:
                self._settle(call, reply)
        return unknown, stale

    def _command(self, call: Call, by_value: bool = False) -> list[bytes]:
        call.request = f"{self._session}-{next(self._requests)}".encode()
        call.sent = True
        name, body = (b"EVAL", call.script.body) if by_value else (b"EVALSHA", call.script.sha)
        return [name, body(self._shebang), b"%d" % len(call.keys), *call.keys, call.request, *call.args]

    def _settle(self, call: Call, reply: Any) -> None:
        if not isinstance(reply, list) or not reply or reply[0] != call.request:
            raise StorageProtocolError("Redis answered something else than was asked; the connection was dropped")
        if not call.future.done():
            call.future.set_result(reply[1:])

    async def _connected(self) -> AbstractConnection:
        # A server that restarted while nothing was asked has closed the connection: that is found out before a call is sent.
        reader = getattr(self._connection, "_reader", None)
        if isinstance(reader, asyncio.StreamReader) and (reader.at_eof() or reader.exception() is not None):
            await self._drop()
        if self._connection is None:
            connection = await self._settings.connect()
            try:
                await self._load(connection)
            except BaseException:
                await close(connection)
                raise
            self._connection = connection
        return self._connection

    async def _load(self, connection: AbstractConnection) -> None:
        """Load the scripts, with `#!lua` where it is known: fakeredis loads such a script, but calls it a syntax error."""
        probe: list[list[bytes]] = [[b"EVAL", SHEBANG + b"return 1", b"0"]]
        for self._shebang in (True, False):
            # All in one round trip: a deadline covers connecting, and a secure connection has taken several already.
            await self._send(connection, probe + [[b"SCRIPT", b"LOAD", script(name).body(self._shebang)] for name in SCRIPTS])
            refusals = []
            for _ in range(len(probe) + len(SCRIPTS)):
                try:
                    await connection.read_response(disable_decoding=True)
                except redis.ResponseError as error:
                    refusals.append(error)
            if not refusals:
                return
            if not probe or "near '#'" not in str(refusals[0]):
                raise refusals[0]
            probe = []

    async def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            await close(connection)


def wanted(calls: list[Call]) -> list[Call]:
    """Leave out the calls whose callers have gone: what was not sent costs nothing."""
    return [call for call in calls if not call.future.done()]
