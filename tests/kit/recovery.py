"""Waiting for a Redis that was away to answer again: attempts to connect are paced, so that takes up to a second."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from ratethrottle import Decision, RateThrottleCore, RedisStorage
from ratethrottle.errors import StorageUnavailable


async def until(true: Callable[[], Awaitable[bool]], within_s: float = 2.0) -> float:
    """Ask again and again; returns how long it took."""
    began = time.monotonic()
    while not await true():
        assert time.monotonic() - began < within_s, "it never came"
        await asyncio.sleep(0.005)
    return time.monotonic() - began


async def served(limiter: RateThrottleCore) -> bool:
    """Whether Redis itself answers."""
    try:
        return (await limiter.peek("somebody else")).source == "redis"
    except StorageUnavailable:
        return False


async def sure(*limiters: RateThrottleCore) -> bool:
    """Whether two beats of each have agreed how many processes share the limits: before that, one learns for 0.75 s after a loss."""
    storages = [limiter._storage for limiter in limiters]
    return all(isinstance(storage, RedisStorage) and storage.repair.fleet.sure for storage in storages)


async def healed(limiter: RateThrottleCore, key: str = "user") -> Decision:
    """Wait until Redis itself answers, and peek at a key."""
    await until(lambda: served(limiter))
    return await limiter.peek(key)
