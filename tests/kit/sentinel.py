"""A sentinel that says what a test tells it to."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Self

from ratethrottle.storage.redis.settings import Address


class FakeSentinel:
    """Says `reply` to every question; nothing if that is None."""

    def __init__(self, reply: bytes | None) -> None:
        self.reply = reply
        self.connections = 0
        self._writers: set[asyncio.StreamWriter] = set()

    @classmethod
    def naming(cls, port: int, host: str = "127.0.0.1") -> FakeSentinel:
        return cls(b"*2\r\n$%d\r\n%b\r\n$%d\r\n%d\r\n" % (len(host), host.encode(), len(str(port)), port))

    @property
    def address(self) -> Address:
        return "127.0.0.1", self._server.sockets[0].getsockname()[1]

    def say(self, *words: bytes) -> None:
        """Publish +switch-master."""
        text = b" ".join(words)
        for writer in self._writers:
            writer.write(b"*3\r\n$7\r\nmessage\r\n$14\r\n+switch-master\r\n$%d\r\n%b\r\n" % (len(text), text))

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for writer in self._writers:
            writer.transport.abort()
        await asyncio.sleep(0.01)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._writers.add(writer)
        with contextlib.suppress(OSError):  # the client that asked has gone
            while asked := await reader.read(65536):
                if self.reply is not None:
                    writer.write(b"+OK\r\n" if b"AUTH" in asked else b"")
                    writer.write(
                        b"*3\r\n$9\r\nsubscribe\r\n$14\r\n+switch-master\r\n:1\r\n" if b"SUBSCRIBE" in asked else self.reply
                    )
        writer.transport.abort()
