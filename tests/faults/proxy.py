"""A process between the workers and Redis that misbehaves on command. It knows nothing of the limiter.

What it does to bytes is a `Mode`; a test commands it by a `Proxy`. Connections that can't be made need no
privileges: a closed port refuses, a reset is SO_LINGER 0, and a listener whose backlog is full lets a SYN go unanswered.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import socket
import struct
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.kit.forked import CONTEXT
from tests.kit.servers import free_port

RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close with RST
START_S = 30.0


@dataclass(frozen=True)
class Mode:
    """What happens on the way. Fields that act on a reply act on the next one after a change, or on each with `always`."""

    delay_s: tuple[float, float] = (0.0, 0.0)  # each piece from the server, in order
    greet_s: tuple[float, float] = (0.0, 0.0)  # between accepting and anything else
    hole: bool = False  # nothing passes in either direction
    mute: bool = False  # requests pass, and are executed; replies don't
    trickle_s: float = 0.0  # between any two bytes from the server
    before: bytes = b""  # comes before a reply
    instead: bytes = b""  # comes in its place
    repeat: bool = False  # the reply comes twice
    cut_at: int = -1  # the connection ends after so many bytes of the reply
    always: bool = False
    accept: str = "yes"  # "no": the port is closed; "reset": RST; "full": a SYN is not answered

    @property
    def tampers(self) -> bool:
        """Whether a reply is due to be changed."""
        return bool(self.before or self.instead or self.repeat or self.cut_at >= 0)


class Between:
    """The proxy, in its own process."""

    def __init__(self, target: Path, pipe: Connection, port: int) -> None:
        self.target, self.pipe, self.port = target, pipe, port
        self.mode = Mode()
        self.changed = asyncio.Event()
        self.tampered = 0
        self.accepted = 0
        self.listener: socket.socket | None = None
        self.fillers: list[socket.socket] = []
        self.accepting: asyncio.Task[None] | None = None
        self.pairs: set[asyncio.Task[None]] = set()
        self.random = random.Random(1)
        self.ended = asyncio.Event()

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        self.listen()
        loop.add_reader(self.pipe.fileno(), self.hear)
        self.pipe.send("ready")
        await self.ended.wait()

    def hear(self) -> None:
        try:
            word = self.pipe.recv()
        except EOFError:
            os._exit(1)
        if word == "end":
            self.ended.set()
        elif word == "cut":
            self.cut()
        elif isinstance(word, Mode):
            before, self.mode = self.mode, word
            self.changed.set()
            self.changed = asyncio.Event()
            if before.accept != word.accept:
                self.unlisten()
                self.listen()
        self.pipe.send({"accepted": self.accepted, "tampered": self.tampered, "open": len(self.pairs)})

    def listen(self) -> None:
        if self.mode.accept == "no":
            return
        self.listener = socket.socket()
        self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.listener.bind(("127.0.0.1", self.port))
        self.listener.setblocking(False)
        if self.mode.accept == "full":
            self.listener.listen(0)
            for _ in range(4):  # the kernel takes one or two more than it was asked to
                filler = socket.socket()
                filler.setblocking(False)
                with contextlib.suppress(BlockingIOError):  # it is under way, which is all that it is for
                    filler.connect(("127.0.0.1", self.port))
                self.fillers.append(filler)
            return
        self.listener.listen(100)
        self.accepting = asyncio.create_task(self.accept(self.listener))

    def unlisten(self) -> None:
        if self.accepting is not None:
            self.accepting.cancel()
            self.accepting = None
        for each in (self.listener, *self.fillers):
            if each is not None:
                each.close()
        self.listener, self.fillers = None, []

    async def accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            client, _ = await loop.sock_accept(listener)
            self.accepted += 1
            if self.mode.accept == "reset":
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                client.close()
                continue
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            pair = asyncio.create_task(self.serve(client))
            self.pairs.add(pair)
            pair.add_done_callback(self.pairs.discard)

    def cut(self) -> None:
        """End every connection."""
        for pair in self.pairs:
            pair.cancel()

    async def serve(self, client: socket.socket) -> None:
        with client, socket.socket(socket.AF_UNIX) as server:
            server.setblocking(False)
            loop = asyncio.get_running_loop()
            try:
                await asyncio.sleep(self.random.uniform(*self.mode.greet_s))
                await self.passable()
                await loop.sock_connect(server, str(self.target))
                async with asyncio.TaskGroup() as group:
                    group.create_task(self.forth(client, server))
                    group.create_task(self.back(server, client))
            except* (OSError, EOFError):
                pass  # one of the two has gone, which is what closing tells the other
            finally:
                if self.mode.accept == "reset":
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)

    async def passable(self) -> None:
        while self.mode.hole:
            await self.changed.wait()

    async def forth(self, client: socket.socket, server: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while data := await loop.sock_recv(client, 65536):
            await self.passable()
            await loop.sock_sendall(server, data)
        raise EOFError

    async def back(self, server: socket.socket, client: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while data := await loop.sock_recv(server, 65536):
            low, high = self.mode.delay_s
            if high:
                await asyncio.sleep(self.random.uniform(low, high))
            await self.passable()
            mode = self.mode
            if mode.mute:
                continue
            for piece in self.pieces(mode, self.tamper(mode, data) if mode.tampers else data):
                await asyncio.sleep(mode.trickle_s)
                await loop.sock_sendall(client, piece)
            if mode.cut_at >= 0:
                break
        raise EOFError

    @staticmethod
    def pieces(mode: Mode, data: bytes) -> list[bytes]:
        return [bytes((byte,)) for byte in data] if mode.trickle_s else [data]

    def tamper(self, mode: Mode, data: bytes) -> bytes:
        self.tampered += 1
        if not mode.always:
            self.mode = Mode(delay_s=mode.delay_s)
        if mode.cut_at >= 0:
            return data[: mode.cut_at]
        return mode.before + (mode.instead or data * (2 if mode.repeat else 1))


def run_proxy(target: Path, pipe: Connection, port: int) -> None:
    """Be the proxy's process."""

    async def main() -> None:
        await Between(target, pipe, port).run()

    asyncio.run(main())


class Proxy:
    """The handle of a proxy in front of a server's Unix socket."""

    def __init__(self, target: Path, *, password: str = "") -> None:
        self.target, self.port = target, free_port()
        self.password = password

    @property
    def url(self) -> str:
        """Where clients find it."""
        return f"redis://{f':{self.password}@' if self.password else ''}127.0.0.1:{self.port}/0"

    def __enter__(self) -> Self:
        self.pipe, theirs = CONTEXT.Pipe()
        self.process = CONTEXT.Process(target=run_proxy, args=(self.target, theirs, self.port), daemon=True)
        self.process.start()
        theirs.close()
        self._hear()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()

    def _hear(self) -> Any:
        if not self.pipe.poll(START_S):
            raise RuntimeError("the proxy said nothing")
        return self.pipe.recv()

    def set(self, **mode: Any) -> dict[str, int]:
        """Behave so from now on; what isn't named is normal. Returns what it counted: `accepted`, `tampered`, `open`."""
        return self.tell(Mode(**mode))

    def cut(self) -> dict[str, int]:
        """End every connection."""
        return self.tell("cut")

    def counts(self) -> dict[str, int]:
        """What it counted so far."""
        return self.tell("counts")

    def tell(self, word: object) -> dict[str, int]:
        """Tell it something, and wait until that is done."""
        self.pipe.send(word)
        counts: dict[str, int] = self._hear()
        return counts
