"""The peers that decide in Redis, each set up at its best: hiredis, our loop, a pool that every task finds room in.

Every one gets the same limit, more than is offered, so that each decision consumes and none is answered from memory.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, Protocol

import redis.asyncio
from limits import RateLimitItemPerMinute
from limits.aio.storage import RedisStorage
from limits.aio.strategies import FixedWindowRateLimiter, MovingWindowRateLimiter
from pyrate_limiter import Limiter, Rate, RedisBucket
from pyrate_limiter.limiter import SingleBucketFactory
from throttled.asyncio import RedisStore, Throttled, rate_limiter

from benchmarks.load import Check, Load, Paced, drive, key_names, paced, warm
from benchmarks.server import ours

LIMIT = 1_000_000
WINDOW_S = 60
POOL = 1_024  # connections a peer may open: at least one for each task
ROOT = Path(__file__).parent.parent
STRANGER = ROOT / ".venv-peer-ratethrottle" / "bin" / "python"


class Unavailable(Exception):
    """A peer can't be measured here; says why."""


class Loads(Protocol):
    """What the suite does with a peer that is set up."""

    async def drive(self, keys: int, tasks: int, seconds: float) -> Load:
        """Let tasks check as fast as they can, connections being there already."""

    async def paced(self, keys: int, per_s: float, seconds: float) -> Paced:
        """Start checks at a fixed rate."""


@dataclass(frozen=True)
class Here:
    """A limiter in this process."""

    check: Check

    async def drive(self, keys: int, tasks: int, seconds: float) -> Load:
        """Let tasks check as fast as they can."""
        await warm(self.check, key_names(keys), tasks)
        return await drive(self.check, key_names(keys), tasks, seconds)

    async def paced(self, keys: int, per_s: float, seconds: float) -> Paced:
        """Start checks at a fixed rate."""
        await warm(self.check, key_names(keys), 64)
        return await paced(self.check, key_names(keys), per_s, seconds)


@dataclass(frozen=True)
class There:
    """A limiter in a process of its own, told what to do over its standard input."""

    process: asyncio.subprocess.Process

    async def _ask(self, order: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(order).encode() + b"\n")
        answer = await self.process.stdout.readline()
        if not answer:
            raise Unavailable("its process ended")
        result: dict[str, Any] = json.loads(answer)
        return result

    async def drive(self, keys: int, tasks: int, seconds: float) -> Load:
        """Let tasks check as fast as they can."""
        return Load(**await self._ask({"drive": [keys, tasks, seconds]}))

    async def paced(self, keys: int, per_s: float, seconds: float) -> Paced:
        """Start checks at a fixed rate."""
        return Paced(**await self._ask({"paced": [keys, per_s, seconds]}))


@dataclass(frozen=True)
class Contender:
    """A peer, what it promises, and how to set it up on a Redis.

    kind: which limiters are compared with each other: "interval", "bucket" or "aligned". most_keys: what it is not meant for, left out.
    """

    name: str
    kind: str
    promise: str
    open: Callable[[str], AbstractAsyncContextManager[Loads]]
    most_keys: int = 1_000_000


@asynccontextmanager
async def open_ours(url: str, strategy: str, *, lease: bool = False) -> AsyncIterator[Loads]:
    """Make our own limiter."""
    name = f"peers-{strategy}{'-leased' if lease else ''}"
    limiter = ours(url, strategy, name=name, limit=LIMIT, window=WINDOW_S, lease=lease)
    yield Here(limiter.check)
    await limiter.aclose()


@asynccontextmanager
async def open_limits(url: str, implementation: Literal["redispy", "coredis"], strategy: type[Any]) -> AsyncIterator[Loads]:
    """Make one of limits, on redis-py or coredis. Its strategies would share their keys, so each has a prefix."""
    # coredis bounds no pool unless told to, and shares connections.
    options: dict[str, Any] = {"max_connections": POOL} if implementation == "redispy" else {}
    prefix = f"{implementation}-{strategy.__name__}"
    storage: Any = RedisStorage(f"async+{url}", implementation=implementation, key_prefix=prefix, **options)
    item, limiter = RateLimitItemPerMinute(LIMIT), strategy(storage)
    yield Here(lambda key: limiter.hit(item, key))
    client = storage.bridge.get_connection()
    if implementation == "redispy":
        await client.aclose()
    else:
        client.connection_pool.disconnect()


@asynccontextmanager
async def open_throttled(url: str, using: str) -> AsyncIterator[Loads]:
    """Make one of throttled-py. Its pool is a list of its class, so that all of its strategies here share one."""
    options = {"CONNECTION_POOL_KWARGS": {"max_connections": POOL}, "REUSE_CONNECTION": True}
    quota = rate_limiter.per_duration(timedelta(seconds=WINDOW_S), limit=LIMIT, burst=LIMIT)
    throttled = Throttled(using=using, quota=quota, store=RedisStore(server=url, options=options))

    async def check(key: str) -> bool:
        return not (await throttled.limit(key)).limited

    yield Here(check)


@asynccontextmanager
async def open_pyrate(url: str) -> AsyncIterator[Loads]:
    """Make one of pyrate-limiter, with a limiter for each key: within one, every key waits for the same lock."""
    client = redis.asyncio.Redis.from_url(url, max_connections=POOL)
    rates = [Rate(LIMIT, 1_000 * WINDOW_S)]
    first: Any = RedisBucket.init(rates, client, "pyrate")
    script = (await first).script_hash
    limiters: dict[str, Limiter] = {}

    async def check(key: str) -> Any:
        limiter = limiters.get(key)
        if limiter is None:
            bucket = RedisBucket(rates, client, f"pyrate:{key}", script)
            limiter = limiters[key] = Limiter(SingleBucketFactory(bucket, schedule_leak=False))
        return await limiter.try_acquire_async(key, blocking=False)

    yield Here(check)
    await client.aclose()


@asynccontextmanager
async def open_stranger(url: str, strategy: str) -> AsyncIterator[Loads]:
    """Start the unrelated `ratethrottle` of PyPI in its own environment."""
    if not STRANGER.exists():
        raise Unavailable("not installed; `make bench` does it")
    # Only what that environment has: nothing of PYTHONPATH (-E), nor of this directory (-P).
    script = str(Path(__file__).with_name("stranger.py"))
    arguments = ("-EP", script, url, strategy, str(LIMIT), str(WINDOW_S), str(POOL))
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(str(STRANGER), *arguments, stdin=pipe, stdout=pipe, stderr=sys.stderr)
    try:
        yield There(process)
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


OURS = "ratethrottle (this project)"
LOG = "in any interval, by the client's clock"
ALIGNED = "2 × across a boundary"
RATE = "burst + rate × time"
HOT_KEYS = 100  # leases are for keys that one process uses all the time


def _own(strategy: str, kind: str, promise: str) -> tuple[Contender, Contender]:
    """Our limiter with one strategy, and with leases too."""
    return (
        Contender(f"{OURS} {strategy}", kind, promise, lambda url: open_ours(url, strategy)),
        Contender(f"{OURS} {strategy}, leased", kind, promise, lambda url: open_ours(url, strategy, lease=True), HOT_KEYS),
    )


def _limits(implementation: Literal["redispy", "coredis"]) -> tuple[Contender, Contender]:
    name = "limits redis-py" if implementation == "redispy" else "limits coredis"
    return (
        Contender(
            f"{name}, moving window", "interval", LOG, lambda url: open_limits(url, implementation, MovingWindowRateLimiter)
        ),
        Contender(
            f"{name}, fixed window", "aligned", ALIGNED, lambda url: open_limits(url, implementation, FixedWindowRateLimiter)
        ),
    )


CONTENDERS = (
    *_own("sliding_window", "interval", "in any interval, by the server's clock"),
    *_own("token_bucket", "bucket", f"{RATE}, by the server's clock"),
    *_own("fixed_window", "aligned", f"{ALIGNED}, by the server's clock"),
    *_limits("redispy"),
    *_limits("coredis"),
    Contender("throttled-py, gcra", "bucket", f"{RATE}, in floats", lambda url: open_throttled(url, "gcra")),
    Contender("throttled-py, fixed_window", "aligned", ALIGNED, lambda url: open_throttled(url, "fixed_window")),
    Contender("pyrate-limiter", "interval", LOG, open_pyrate),
    Contender(
        "PyPI ratethrottle, token_bucket", "bucket", f"{RATE}, client's clock", lambda url: open_stranger(url, "token_bucket")
    ),
    Contender("PyPI ratethrottle, fixed_window", "aligned", ALIGNED, lambda url: open_stranger(url, "fixed_window")),
)
