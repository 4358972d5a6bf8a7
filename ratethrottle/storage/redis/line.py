"""A line to Redis: one connection, owned by one task, and a queue of calls that are answered in order.

A caller waits on a future of its own; its cancellation or deadline never touches the wire.
"""

from __future__ import annotations

import asyncio
import os
from collections import deque
from itertools import count
from typing import Any

import redis
from redis.asyncio.connection import AbstractConnection

from ratethrottle.errors import StorageError, StorageProtocolError, StorageTimeout, StorageUnavailable
from ratethrottle.storage.redis.scripts import SHEBANG, Script, script
from ratethrottle.storage.redis.settings import Settings

CALLS_TOGETHER_MAX = 64  # calls written at once before their replies are read


class Call:
    """One script call: what to send, until when it matters, and the future that its caller waits on."""

    __slots__ = ("args", "deadline", "future", "keys", "request", "script")

    def __init__(self, script: Script, keys: list[bytes], args: list[bytes], deadline: float, future: asyncio.Future[list[Any]]):
        self.script = script
        self.keys = keys
        self.args = args
        self.deadline = deadline  # of the loop's clock
        self.future = future
        self.request = b""

    def fail(self, error: StorageError) -> None:
        """End the call with an error of its own, unless its caller has gone."""
        if not self.future.done():
            self.future.set_exception(error)


class Line:
    """Carries script calls of one event loop. Not for other loops or processes."""

    def __init__(self, settings: Settings, deadline_s: float, max_waiting: int) -> None:
        self._settings = settings
        self._deadline_s = deadline_s
        self._max_waiting = max_waiting
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[Call] = deque()
        self._wake = asyncio.Event()
        self._connection: AbstractConnection | None = None
        self._shebang = True
        self._session = os.urandom(6).hex()
        self._requests = count()
        self._owner = self._loop.create_task(self._own(), name="ratethrottle line")

    @property
    def closed(self) -> bool:
        """Whether its task has ended, with its loop's other tasks or by `aclose`."""
        return self._owner.done()

    async def call(self, script: Script, keys: list[bytes], args: list[bytes]) -> list[Any]:
        """Run a script; returns its reply without the request id. Raises a StorageError within the deadline."""
        if len(self._waiting) >= self._max_waiting:
            raise StorageUnavailable(
                f"{self._max_waiting} calls are waiting for Redis already; that is this process's load, not an outage"
            )
        deadline = self._loop.time() + self._deadline_s
        call = Call(script, keys, args, deadline, self._loop.create_future())
        self._waiting.append(call)
        self._wake.set()
        timer = self._loop.call_at(deadline, call.fail, StorageTimeout(self._deadline_s))
        try:
            return await call.future
        finally:
            timer.cancel()

    async def aclose(self) -> None:
        """Close the connection and fail what is waiting."""
        self._owner.cancel()
        await asyncio.wait([self._owner])

    async def _own(self) -> None:
        try:
            while True:
                if not self._waiting:
                    self._wake.clear()
                    await self._wake.wait()
                calls = [self._waiting.popleft() for _ in range(min(len(self._waiting), CALLS_TOGETHER_MAX))]
                calls = [call for call in calls if not call.future.done()]
                if calls:
                    await self._serve(calls)
        finally:
            await self._drop()
            for call in self._waiting:
                call.fail(StorageUnavailable("the line to Redis was closed"))
            self._waiting.clear()

    async def _serve(self, calls: list[Call]) -> None:
        """Send calls together and settle each by its own reply, or all that are left by what went wrong."""
        try:
            async with asyncio.timeout_at(max(call.deadline for call in calls)):
                connection = await self._connected()
                await connection.send_packed_command(
                    connection.pack_commands([self._command(call) for call in calls]), check_health=False
                )
                unknown = []
                for call in calls:
                    try:
                        self._settle(call, await connection.read_response(disable_decoding=True))
                    except redis.exceptions.NoScriptError:
                        unknown.append(call)  # proof that it wasn't run: the only reply after which we send again
                    except redis.ResponseError as error:
                        call.fail(refused(error))
                for call in unknown:
                    await connection.send_packed_command(
                        connection.pack_command(*self._command(call, by_value=True)), check_health=False
                    )
                    try:
                        self._settle(call, await connection.read_response(disable_decoding=True))
                    except redis.ResponseError as error:
                        call.fail(refused(error))
        except (StorageError, redis.RedisError, OSError, TimeoutError) as error:
            await self._drop()
            for call in calls:
                call.fail(self._failure(error))
        except BaseException:
            for call in calls:
                call.fail(StorageUnavailable("the line to Redis was closed"))
            raise

    def _command(self, call: Call, by_value: bool = False) -> list[bytes]:
        call.request = f"{self._session}-{next(self._requests)}".encode()
        name, body = (b"EVAL", call.script.body) if by_value else (b"EVALSHA", call.script.sha)
        return [name, body(self._shebang), b"%d" % len(call.keys), *call.keys, call.request, *call.args]

    def _settle(self, call: Call, reply: Any) -> None:
        if not isinstance(reply, list) or not reply or reply[0] != call.request:
            raise StorageProtocolError("Redis answered something else than was asked; the connection was dropped")
        if not call.future.done():
            call.future.set_result(reply[1:])

    async def _connected(self) -> AbstractConnection:
        if self._connection is None:
            connection = await self._settings.connect()
            self._connection = connection
            await self._load(connection)
        return self._connection

    async def _load(self, connection: AbstractConnection) -> None:
        self._shebang = await self._knows_shebang(connection)
        for loaded in (script("decide"), script("reset")):
            await connection.send_command("SCRIPT", "LOAD", loaded.body(self._shebang))
            await connection.read_response()

    async def _knows_shebang(self, connection: AbstractConnection) -> bool:
        """Whether scripts may begin with `#!lua`: fakeredis loads such a script, but calls it a syntax error when it runs."""
        try:
            await connection.send_command("EVAL", SHEBANG + b"return 1", 0)
            return bool(await connection.read_response() == 1)
        except redis.ResponseError as error:
            if "near '#'" not in str(error):
                raise
            return False

    async def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.disconnect(nowait=True)

    def _failure(self, error: BaseException) -> StorageError:
        failure: StorageError
        if isinstance(error, StorageError):
            failure = type(error)(*error.args)
        elif isinstance(error, (TimeoutError, redis.TimeoutError)):
            failure = StorageTimeout(self._deadline_s)
        else:
            failure = refused(error)
        failure.__cause__ = error
        return failure


def refused(error: BaseException) -> StorageError:
    """Make the error of ours for what redis-py or the system says. Names kinds, never what was sent or who asked."""
    failure: StorageError
    if isinstance(error, (redis.AuthenticationError, redis.exceptions.AuthorizationError)):
        failure = StorageUnavailable("Redis refused the user or the password; check the client's credentials")
    elif isinstance(error, redis.exceptions.NoPermissionError):
        failure = StorageUnavailable("the Redis user may not run our scripts; allow it EVAL, EVALSHA, SCRIPT LOAD and our prefix")
    elif isinstance(error, redis.exceptions.InvalidResponse):
        failure = StorageProtocolError("Redis answered something that is no reply")
    elif isinstance(error, redis.ResponseError):
        text = str(error)
        if "RATETHROTTLE" in text:
            failure = StorageProtocolError(
                f"the script refused the call: {text.partition('RATETHROTTLE ')[2].partition(' script:')[0]}"
            )
        else:
            kind = text.split(" ", 1)[0]
            failure = StorageUnavailable(f"Redis refuses to serve us: {kind if kind.isupper() else type(error).__name__}")
    else:
        failure = StorageUnavailable(f"Redis can't be reached ({type(error).__name__}); is it up, and is the address right?")
    failure.__cause__ = error
    return failure
