"""The bytes of a connection: taken over from redis-py once that has made and secured it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Protocol

import redis
from redis.asyncio.connection import AbstractConnection

from ratethrottle.storage.redis.tasks import own_task


class Wire(Protocol):
    """What a connection writes to: an asyncio transport, or what stands in for one."""

    def write(self, data: bytes) -> None:
        """Send bytes, without waiting."""


class Receiver(asyncio.Protocol):
    """Hears what comes on a connection, until `let_go`."""

    def __init__(self, received: Callable[[bytes], None], lost: Callable[[Exception | None], None]) -> None:
        self.data_received = received  # type: ignore[assignment,method-assign]  # not by way of a method: it runs for each reply
        self._lost = lost

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell the `Connection`, unless it has let go."""
        self._lost(exc)

    def let_go(self) -> None:
        """Hear nothing any more."""
        self.data_received = self._lost = _ignore  # type: ignore[assignment,method-assign]  # as above


def _ignore(what: object) -> None:
    """Take what still comes on a connection that has been dropped."""


def take_over(connection: AbstractConnection, receiver: Receiver) -> Wire:
    """Let `receiver` hear what comes on a connection; returns what to write to."""
    writer = getattr(connection, "_writer", None)
    if isinstance(writer, asyncio.StreamWriter):
        writer.transport.set_protocol(receiver)
        return writer.transport
    return FakeWire(connection, receiver)


def is_fake(connection: AbstractConnection) -> bool:
    """Whether this is a connection of fakeredis."""
    return type(connection).__module__.partition(".")[0] == "fakeredis"


class FakeWire:
    """A wire to fakeredis, which has no transport and answers in objects: they are written out as a server would."""

    def __init__(self, connection: Any, receiver: Receiver) -> None:
        self._connection = connection
        self._receiver = receiver
        self._reading: asyncio.Task[None] | None = None

    def write(self, data: bytes) -> None:
        """Have the fake server run what was sent; its replies come in a later turn of the loop."""
        self._connection._sock.sendall(data)
        if self._reading is None or self._reading.done():
            self._reading = own_task(asyncio.get_running_loop(), self._read(), "ratethrottle fake wire")

    async def _read(self) -> None:
        """Pass on the replies that are there."""
        try:
            # Asked once it is closed, it would connect again.
            while self._connection.is_connected and await self._connection.can_read(0):
                try:
                    reply = await self._connection.read_response(disable_decoding=True)
                except redis.ResponseError as error:
                    reply = error
                self._receiver.data_received(written(reply))
        except (redis.ConnectionError, AttributeError) as error:  # the fake server is away, or the connection was dropped
            self._receiver.connection_lost(redis.ConnectionError(str(error)))


def written(reply: object) -> bytes:
    """Write a reply as a server does. Raises TypeError for one that no script of ours gives."""
    if isinstance(reply, list):
        return b"*%d\r\n" % len(reply) + b"".join(map(written, reply))
    if isinstance(reply, int):
        return b":%d\r\n" % reply
    if isinstance(reply, bytes):
        return b"$%d\r\n%b\r\n" % (len(reply), reply)
    if isinstance(reply, redis.exceptions.NoScriptError):
        return b"-NOSCRIPT No matching script\r\n"  # redis-py has taken the first word away
    if isinstance(reply, redis.ResponseError):
        return b"-%b\r\n" % str(reply).encode()
    raise TypeError(f"fakeredis answered with a {type(reply).__name__}")
