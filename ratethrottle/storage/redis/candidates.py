"""Servers that may be the master: each is connected to and asked for its ROLE, all at the same time."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable
from typing import Any

import redis
from redis.asyncio.connection import AbstractConnection

from ratethrottle.errors import StorageRefused, StorageUnavailable
from ratethrottle.storage.redis.failures import said_by
from ratethrottle.storage.redis.greeting import Reached, first, load
from ratethrottle.storage.redis.settings import Address, Ask, Settings, close
from ratethrottle.storage.redis.tasks import own_task, succeeded

ROLE = (b"ROLE",)


async def open_master(settings: Settings, address: Address) -> Reached:
    """Open a connection to a server that says it is a master. Raises redis-py's errors, OSError and StorageUnavailable."""

    async def check_role(connection: AbstractConnection, replies: list[Any], ask: Ask) -> Reached:
        role = role_of(replies[0])
        if role != b"master":
            kind = {b"slave": "a replica", b"sentinel": "a sentinel"}.get(role, "something else")
            raise StorageUnavailable(f"the sentinels name {spelled(address)} as the master, but it says that it is {kind}")
        return await load(connection, replies[1:], ask)

    return await settings.reach((ROLE, *first()), check_role, address)


def role_of(reply: object) -> bytes:
    """Read what a server says it is. Raises what the reply is, if that is an error, and StorageRefused."""
    if isinstance(reply, redis.exceptions.NoPermissionError):
        raise StorageRefused(f"the Redis user may not ask a server for its role ({said_by(reply)}); allow it +role") from reply
    if isinstance(reply, Exception):
        raise reply
    return reply[0] if isinstance(reply, list) and reply and isinstance(reply[0], bytes) else b""


def majority(voices: Counter[Address], of: int) -> Address | None:
    """Find the address that more than half of so many sentinels name."""
    return next((address for address, count in voices.most_common(1) if count * 2 > of), None)


def spelled(address: Address) -> str:
    """Write an address as messages do."""
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class Candidates:
    """The servers tried in one search. `discard` it, whatever becomes of the search."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._attempts: dict[Address, asyncio.Task[Reached]] = {}

    @property
    def pending(self) -> list[asyncio.Task[Reached]]:
        """The attempts that are still on."""
        return [attempt for attempt in self._attempts.values() if not attempt.done()]

    @property
    def hopeful(self) -> bool:
        """Whether one of them may still be taken."""
        return any(not attempt.done() or succeeded(attempt) for attempt in self._attempts.values())

    def try_all(self, addresses: Iterable[Address]) -> None:
        """Begin with those that haven't been tried."""
        loop = asyncio.get_running_loop()
        for address in addresses:
            if address not in self._attempts:
                work = open_master(self._settings, address)
                self._attempts[address] = own_task(loop, work, "ratethrottle candidate")

    def choose(self, voices: Counter[Address], sentinels: int, *, more_may_speak: bool) -> tuple[Address, Reached] | None:
        """Choose the master among the servers that say they are one, by how many of the sentinels name each; None to wait."""
        masters = [address for address, attempt in self._attempts.items() if succeeded(attempt) and voices[address]]
        if not masters:
            return None
        best = max(masters, key=voices.__getitem__)
        agreed = majority(voices, sentinels)
        if agreed != best:
            if more_may_speak:
                return None
            # Nothing is taken against most of the sentinels, while the server that they name may still prove to be the master.
            if agreed is not None and not self._attempts[agreed].done():
                return None
        return best, self._attempts.pop(best).result()

    def failure(self, voices: Counter[Address]) -> Exception | None:
        """Give the reason why the server that most sentinels name wasn't taken."""
        for address, _ in voices.most_common(1):
            attempt = self._attempts[address]
            error = attempt.exception() if attempt.done() else None
            if isinstance(error, Exception):
                return error
            return StorageUnavailable(f"the sentinels name {spelled(address)} as the master, but it doesn't answer")
        return None

    async def discard(self) -> None:
        """Close what was not taken, and end what is still on."""
        attempts, self._attempts = list(self._attempts.values()), {}
        for attempt in attempts:
            attempt.cancel()
        if attempts:
            await asyncio.wait(attempts)
        for attempt in attempts:
            if succeeded(attempt):
                await close(attempt.result().connection)
