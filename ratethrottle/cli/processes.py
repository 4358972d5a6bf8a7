"""The processes of the demo: a redis-server and the servers that share it, each ended by its own handle."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import shutil
import socket
import sys
import tempfile
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ratethrottle.errors import StorageError, StorageUnavailable
from ratethrottle.storage.redis import RedisStorage

START_S = 10.0  # for a redis-server to answer
END_S = 3.0  # for a process to go when told to, before it is killed
PROGRAM = "RATETHROTTLE_REDIS_SERVER"  # of the environment: the program that runs a Redis here
ATTEMPTS = 3  # somebody else may take the free port between our look and the server's


class NoRedis(Exception):
    """There is no redis-server to be had here; says why."""


def server_program() -> str:
    """Find the program to start if a Redis is needed, here and in the tests. Raises NoRedis.

    It is the one that RATETHROTTLE_REDIS_SERVER names, or redis-server or valkey-server on the PATH, or the Valkey beside this Python.
    """
    named = os.environ.get(PROGRAM)
    if named:
        found = shutil.which(named)
        if found is None:
            raise NoRedis(f"{PROGRAM} names {named}, which is no program that runs here")
        return found
    # The one from PyPI is only taken if there is no other: a user who installed one wants to see that one.
    beside = str(Path(sys.executable).parent)
    found = shutil.which("redis-server") or shutil.which("valkey-server") or shutil.which("valkey-server", path=beside)
    if found is None:
        raise NoRedis("there is no redis-server on the PATH")
    return found


@asynccontextmanager
async def redis_server() -> AsyncIterator[str]:
    """Run a redis-server on a free port of loopback, without persistence; yields its URL. Raises NoRedis."""
    program = server_program()
    # Ours alone: nobody else on this machine can come in, nor can we mistake another server on that port for ours.
    password = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="ratethrottle-demo-") as directory:
        for _ in range(ATTEMPTS):
            port = free_port()
            process = await asyncio.create_subprocess_exec(program, "-", stdin=PIPE, stdout=DEVNULL, start_new_session=True)
            try:
                await configure(
                    process,
                    {
                        "port": port,
                        "bind": "127.0.0.1",
                        "dir": f'"{directory}"',
                        "save": '""',
                        "appendonly": "no",
                        "requirepass": password,
                    },
                )
                url = f"redis://:{password}@127.0.0.1:{port}/0"
                if await answers(url, process):
                    yield url
                    return
            finally:
                await end(process)
    raise NoRedis(f"{program} did not start")


async def configure(process: Process, settings: Mapping[str, object]) -> None:
    """Give a redis-server its settings by stdin, since arguments are everybody's to see."""
    if process.stdin is None:
        raise NoRedis("the redis-server has no stdin")
    process.stdin.write("".join(f"{name} {value}\n" for name, value in settings.items()).encode())
    with suppress(ConnectionError):  # it has ended already, which `answers` finds out
        await process.stdin.drain()
    process.stdin.close()


async def answers(url: str, process: Process) -> bool:
    """Wait until the server answers; False if it ended instead, or takes too long."""
    give_up = asyncio.get_running_loop().time() + START_S
    while process.returncode is None and asyncio.get_running_loop().time() < give_up:
        try:
            await probe(url)
        except StorageUnavailable:
            await asyncio.sleep(0.02)
        else:
            return True
    return False


async def probe(url: str) -> None:
    """Ask a Redis for anything, and leave nothing there. Raises StorageError, ConfigurationError."""
    storage = RedisStorage.from_url(url, prefix=demo_prefix(), deadline=5.0)
    try:
        await storage.open(required=True)
    finally:
        await storage.aclose()
    await clear(storage)


def demo_prefix() -> str:
    """Make a prefix that no demo ever had."""
    return f"ratethrottle-demo-{secrets.token_hex(4)}"


async def clear(storage: RedisStorage) -> None:
    """Leave nothing behind in a Redis that isn't ours, if it lets us."""
    with suppress(StorageError):  # what is left expires, but for a key of a few bytes
        await storage._wipe()


def free_port() -> int:
    """Find a port of loopback that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@dataclass(slots=True)
class Server:
    """A server process and what it has told so far."""

    process: Process
    name: str
    offered: int = 0
    admitted: int = 0
    done: bool = False
    ended: bool = False
    error: str = ""

    def tell(self, what: object) -> None:
        """Send it a line."""
        if self.process.stdin is not None:
            self.process.stdin.write(json.dumps(what).encode() + b"\n")

    async def hear(self) -> bool:
        """Take up its next line; False at its end."""
        line = await self.process.stdout.readline() if self.process.stdout is not None else b""
        if not line:
            self.ended = True
            self.error = self.error or ("" if self.done else "it ended before it was done")
            return False
        facts = json.loads(line)
        self.offered, self.admitted = facts.get("offered", self.offered), facts.get("admitted", self.admitted)
        self.done, self.error = facts.get("done", False), facts.get("error", "")
        return True

    async def follow(self) -> None:
        """Hear it to its end."""
        while await self.hear():
            pass


@asynccontextmanager
async def server(name: str, order: Mapping[str, object]) -> AsyncIterator[Server]:
    """Run a server process by `order`, the arguments of `ratethrottle.cli.server.serve`, and end it whatever happens."""
    # The very package that runs here, whatever lies in the working directory.
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]))
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-P",
        "-m",
        "ratethrottle.cli.server",
        stdin=PIPE,
        stdout=PIPE,
        env={**os.environ, "PYTHONPATH": path},
        start_new_session=True,  # Ctrl-C is for the demo, which then ends its servers
    )
    one = Server(process, name)
    try:
        one.tell(order)
        yield one
    finally:
        await end(process, leaving=one.ended)


async def end(process: Process, *, leaving: bool = False) -> None:
    """End a process that we started, and wait for it. One that is leaving by itself is only waited for."""
    # A signal to a process that has just ended would take its exit status away from asyncio, which complains on stderr.
    if process.returncode is None and not leaving:
        with suppress(ProcessLookupError):  # it ended just now
            process.terminate()
    try:
        async with asyncio.timeout(END_S):
            await process.wait()
    except TimeoutError:
        with suppress(ProcessLookupError):  # it ended just now
            process.kill()
        await process.wait()
