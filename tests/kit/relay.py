"""A relay between a storage and its Redis that misbehaves on command."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self


class Relay:
    """Listens on a free loopback port and passes bytes to and from a server's Unix socket.

    tamper: changes what the server says on its way back. refuses: breaks each new connection.
    heard: all that clients said. connections: how many came so far.
    """

    def __init__(self, target: Path) -> None:
        self.target = target
        self.tamper: Callable[[bytes], bytes] = lambda reply: reply
        self.refuses = False
        self.heard = b""
        self.connections = 0
        self.port = 0
        self._writers: set[asyncio.StreamWriter] = set()
        self._clients: list[asyncio.StreamWriter] = []  # of them, the oldest first
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        """Where clients find it."""
        return f"redis://127.0.0.1:{self.port}"

    @property
    def commands(self) -> int:
        """How many commands clients sent, but for beats, which come by time."""
        return self.heard.count(b"*") - self.heard.count(b":processes\r\n")

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._server.close()
        self.cut()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def open(self) -> int:
        """How many connections of clients there are."""
        return len(self._clients)

    def say(self, reply: bytes) -> None:
        """Say something on each connection."""
        for writer in self._clients:
            writer.write(reply)

    def cut(self) -> None:
        """Break every connection."""
        for writer in self._writers:
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        if self.refuses:
            writer.transport.abort()
            return
        upstream_reader, upstream = await asyncio.open_unix_connection(str(self.target))
        self._writers |= {writer, upstream}
        self._clients.append(writer)
        forth = asyncio.create_task(self._pass(reader, upstream, self._listen))
        back = asyncio.create_task(self._pass(upstream_reader, writer, self._answer))
        await asyncio.wait([forth, back], return_when=asyncio.FIRST_COMPLETED)
        for end in (writer, upstream):
            end.transport.abort()
        await asyncio.gather(forth, back)
        self._writers -= {writer, upstream}
        self._clients.remove(writer)

    def _answer(self, data: bytes) -> bytes:
        return self.tamper(data)

    def _listen(self, data: bytes) -> bytes:
        self.heard += data
        return data

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, change: Callable[[bytes], bytes]) -> None:
        with contextlib.suppress(OSError):  # one of the two has gone, so the other loses its connection too
            while data := await reader.read(65536):
                writer.write(change(data))
                await writer.drain()
