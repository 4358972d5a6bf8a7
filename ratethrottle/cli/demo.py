"""`ratethrottle demo`: three servers, one Redis, one limit."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import shutil
import socket
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

from ratethrottle import RateThrottleRule, RedisStorage, StorageError, create_limiter
from ratethrottle.limiter import RateThrottleCore

START_S = 10.0
WINDOW_S = 60


@dataclass(frozen=True, slots=True)
class Plan:
    """What the command line asked for."""

    redis_url: str | None
    limit: int
    servers: int
    seconds: float


@dataclass(slots=True)
class Server:
    """A server process and what it has told so far."""

    process: asyncio.subprocess.Process
    offered: int = 0
    admitted: int = 0

    def tell(self, what: object) -> None:
        """Send it a line."""
        if self.process.stdin is not None:
            self.process.stdin.write(json.dumps(what).encode() + b"\n")

    async def hear(self) -> bool:
        """Take up its next line; False at its end."""
        line = await self.process.stdout.readline() if self.process.stdout is not None else b""
        if line:
            facts = json.loads(line)
            self.offered, self.admitted = facts["offered"], facts["admitted"]
        return bool(line)


async def run(plan: Plan) -> int:
    """Show the demo; returns the exit status: 0 only when exactly the limit was admitted by all servers together."""
    async with AsyncExitStack() as stack:
        url = plan.redis_url
        if url is None:
            if shutil.which("redis-server") is None:
                return await without_redis(plan)
            url = await stack.enter_async_context(redis_server())
        try:
            await probe(url)
        except StorageError as error:
            print(f"{error}", file=sys.stderr)
            return await without_redis(plan) if plan.redis_url is None else 1
        return await with_redis(plan, url, stack)


async def with_redis(plan: Plan, url: str, stack: AsyncExitStack) -> int:
    """Run the servers against a Redis, draw what they do, and print the table."""
    prefix = f"ratethrottle-demo-{secrets.token_hex(4)}"  # so that a demo never meets the counts of an earlier one
    print(
        f"{plan.servers} servers share {plan.limit} per {WINDOW_S} s through one Redis; each is offered {plan.limit * 6 // 5 + 1}.\n"
    )
    servers = [await stack.enter_async_context(server(url, prefix, plan)) for _ in range(plan.servers)]
    for one in servers:
        if not await one.hear():
            print("a server ended before it began; its error is above", file=sys.stderr)
            return 1
    for one in servers:
        one.tell("go")
    hearing = [asyncio.create_task(follow(one)) for one in servers]
    screen = Screen(plan)
    while not all(task.done() for task in hearing):
        screen.draw(servers)
        await asyncio.wait(hearing, timeout=0.15)
    await asyncio.gather(*hearing)
    screen.draw(servers, last=True)
    return verdict(plan, servers)


async def follow(one: Server) -> None:
    """Hear a server to its end."""
    while await one.hear():
        pass


class Screen:
    """Draws the servers' counts: over and over in place on a terminal, else a line every second."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._live = sys.stdout.isatty()
        self._lines = 0
        self._told = 0.0

    def draw(self, servers: list[Server], *, last: bool = False) -> None:
        """Show how things stand."""
        total = sum(one.admitted for one in servers)
        now = asyncio.get_running_loop().time()
        if not self._live:
            if last or now - self._told >= 1:
                self._told = now
                counts = "  ".join(f"server {i + 1}: {one.admitted} of {one.offered}" for i, one in enumerate(servers))
                print(f"{counts}  together: {total}", flush=True)
            return
        if self._lines:
            print(f"\x1b[{self._lines}A", end="")
        lines = self.picture(servers, total)
        self._lines = len(lines)
        print("\n".join(f"\x1b[K{line}" for line in lines), flush=True)

    def picture(self, servers: list[Server], total: int) -> list[str]:
        """Draw the architecture with its counts, as lines."""
        width, gap = 15, "   "
        middle = (len(servers) * (width + len(gap)) - len(gap)) // 2
        bar = round(40 * total / self._plan.limit)
        return [
            gap.join("┌" + "─" * (width - 2) + "┐" for _ in servers),
            gap.join("│" + f"Server {i + 1}".center(width - 2) + "│" for i in range(len(servers))),
            gap.join("│" + f"{one.admitted} of {one.offered}".center(width - 2) + "│" for one in servers),
            gap.join("└" + "─" * (width // 2 - 1) + "┬" + "─" * (width // 2 - 1) + "┘" for _ in servers),
            " " * (width // 2) + "─" * (2 * middle - width + 1),
            " " * middle + "▼",
            f"Redis: {total} of {self._plan.limit} used  [{'█' * bar}{'░' * (40 - bar)}]",
        ]


def verdict(plan: Plan, servers: list[Server]) -> int:
    """Print the table and say whether the limit held; returns the exit status."""
    offered, admitted = sum(one.offered for one in servers), sum(one.admitted for one in servers)
    rows = [(f"server {i + 1}", one.offered, one.admitted) for i, one in enumerate(servers)]
    print(f"\n{'':10}{'offered':>10}{'admitted':>10}")
    for name, offers, granted in [*rows, ("together", offered, admitted)]:
        print(f"{name:10}{offers:>10,}{granted:>10,}")
    if admitted != plan.limit:
        print(f"\nThe limit did not hold: {admitted} were admitted, not {plan.limit}.", file=sys.stderr)
        return 1
    print(f"\nExactly {admitted} of {offered} were admitted.")
    idle = [name for name, _, granted in rows if not granted]
    if idle:
        print(f"But {', '.join(idle)} admitted none; run it again with more --seconds.", file=sys.stderr)
    return 1 if idle else 0


async def without_redis(plan: Plan) -> int:
    """Show the same limit in one process; a failure under CI=true, where there has to be a Redis."""
    print("There is no redis-server here (Debian: apt-get install redis-server), and no --redis-url was given.")
    print("This is the embedded in-memory default, in one process:\n")
    limiter = create_limiter(rules=[RateThrottleRule("api_limit", plan.limit, WINDOW_S)])
    offered = 3 * plan.limit
    admitted = sum([bool(await limiter.check("client")) for _ in range(offered)])
    print(f"offered {offered:,}, admitted {admitted:,}")
    return 1 if os.environ.get("CI") == "true" or admitted != plan.limit else 0


async def probe(url: str) -> None:
    """Ask a Redis for anything. Raises StorageError."""
    limiter = RateThrottleCore(RedisStorage.from_url(url, prefix="ratethrottle-demo", deadline=5.0))
    limiter.add_rule(RateThrottleRule("probe", 1, 1))
    try:
        await limiter.peek("probe")
    finally:
        await limiter.aclose()


@asynccontextmanager
async def server(url: str, prefix: str, plan: Plan) -> AsyncIterator[Server]:
    """Start a server process, and end it whatever happens."""
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(sys.executable, "-m", "ratethrottle.cli.server", stdin=pipe, stdout=pipe)
    try:
        one = Server(process)
        one.tell({"redis_url": url, "prefix": prefix, "limit": plan.limit, "window": WINDOW_S, "seconds": plan.seconds})
        yield one
    finally:
        await end(process)


@asynccontextmanager
async def redis_server() -> AsyncIterator[str]:
    """Start a redis-server on a free port of loopback, without persistence; yields its URL."""
    with tempfile.TemporaryDirectory(prefix="ratethrottle-demo-") as directory, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        process = await asyncio.create_subprocess_exec(
            "redis-server", "--port", str(port), "--bind", "127.0.0.1", "--dir", directory, "--save", "", "--appendonly", "no",
            stdout=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
        try:
            async with asyncio.timeout(START_S):
                while True:
                    try:
                        _, writer = await asyncio.open_connection("127.0.0.1", port)
                    except OSError:
                        await asyncio.sleep(0.02)
                    else:
                        writer.close()
                        break
            yield f"redis://127.0.0.1:{port}/0"
        finally:
            await end(process)


async def end(process: asyncio.subprocess.Process) -> None:
    """End a process that we started."""
    if process.returncode is None:
        process.terminate()
    await process.wait()
