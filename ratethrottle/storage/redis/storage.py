"""`RedisStorage`: one limit for every server that shares a Redis."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from typing import Any, Self
from urllib.parse import urlsplit

import redis.asyncio

from ratethrottle._core import CompiledRule, Decision, Entry
from ratethrottle.errors import ConfigurationError, StorageProtocolError, StorageUnavailable
from ratethrottle.storage.redis.keys import KeyLayout
from ratethrottle.storage.redis.line import Line
from ratethrottle.storage.redis.scripts import script
from ratethrottle.storage.redis.settings import Settings

ENTRIES_MAX = 128  # a call holds Redis for about a millisecond at most
SCHEMES = ("redis", "rediss", "unix")


class RedisStorage:
    """Keep the state in Redis (≥ 7, or Valkey ≥ 7.2), decided there by one script call in the server's own time.

    client: a redis-py client, asyncio or synchronous, or a Sentinel's `master_for`. Only its settings are used: the storage
    makes connections of its own, and leaves the client alone. prefix: begins every key, without braces.
    deadline: seconds until a check has its answer or a StorageError, 0.005 to 60. tags: hash tags over which keys spread,
    1 to 16,384. max_waiting: calls that may wait for the connection, 1 to 1,000,000.

    Raises ConfigurationError. Nothing connects before the first check, or `async with`.
    """

    table = None

    def __init__(
        self, client: Any, *, prefix: str = "ratethrottle", deadline: float = 0.25, tags: int = 64, max_waiting: int = 10_000
    ) -> None:
        if isinstance(deadline, bool) or not isinstance(deadline, (int, float)) or not 0.005 <= deadline <= 60:
            raise ConfigurationError(f"deadline is {deadline!r}; it is seconds, from 0.005 to 60")
        if isinstance(max_waiting, bool) or not isinstance(max_waiting, int) or not 1 <= max_waiting <= 1_000_000:
            raise ConfigurationError(f"max_waiting is {max_waiting!r}; it is a whole number from 1 to 1,000,000")
        self._keys = KeyLayout(prefix, tags)
        self._settings = Settings(client, deadline)
        self._deadline_s = deadline
        self._max_waiting = max_waiting
        self._lines: dict[asyncio.AbstractEventLoop, Line] = {}
        self._process = os.getpid()
        self._inherited: list[Any] = []
        self._closed = False

    @classmethod
    def from_url(cls, url: str, **options: Any) -> Self:
        """Make a storage from redis://, rediss:// (TLS) or unix://. Raises ConfigurationError, without the URL's password."""
        scheme = urlsplit(url).scheme if isinstance(url, str) else ""
        if scheme in ("redis+sentinel", "rediss+sentinel"):
            raise ConfigurationError(f"{scheme}:// comes in a later version; pass a Sentinel's master_for(...) to RedisStorage")
        if scheme not in SCHEMES:
            raise ConfigurationError(
                f"redis_url begins with {scheme + '://' if scheme else 'no scheme'!r}; use redis://, rediss:// or unix://"
            )
        try:
            client = redis.asyncio.Redis.from_url(url)
        except ValueError as error:
            raise ConfigurationError(f"redis_url is no valid URL: {error}") from None
        return cls(client, **options)

    async def decide_one(self, entry: Entry) -> Decision:
        """Decide and consume."""
        return (await self._decide("check", [entry]))[0]

    async def decide(self, entries: Sequence[Entry]) -> list[Decision]:
        """Decide in order: one script call for up to 128 entries."""
        decisions: list[Decision] = []
        for start in range(0, len(entries), ENTRIES_MAX):
            decisions += await self._decide("check", entries[start : start + ENTRIES_MAX])
        return decisions

    async def peek(self, entry: Entry) -> Decision:
        """Decide without consuming."""
        return (await self._decide("peek", [entry]))[0]

    async def reset(self, entry: Entry) -> None:
        """Forget what the key has used under the rule, for every server."""
        await self._line().call(script("reset"), [self._keys.state_key(entry)], [])

    async def open(self) -> None:
        """Start this loop's line; it connects with the first call."""
        self._line()

    async def aclose(self) -> None:
        """Close this loop's connection for good. The client that was passed in stays as it is."""
        self._closed = True
        line = self._lines.pop(asyncio.get_running_loop(), None)
        if line is not None and self._process == os.getpid():
            await line.aclose()

    async def _decide(self, mode: str, entries: Sequence[Entry]) -> list[Decision]:
        keys: dict[bytes, int] = {}
        rules: dict[CompiledRule, int] = {}
        numbers: list[int] = []
        for entry in entries:
            key = keys.setdefault(self._keys.state_key(entry), len(keys) + 1)
            numbers += (key, rules.setdefault(entry.rule, len(rules) + 1), entry.cost)
        args = [mode.encode(), b"%d" % len(rules), b"%d" % len(entries)]
        for rule in rules:
            shape = (rule.capacity, rule.window_us, rule.unit_ticks, rule.drain_ticks, rule.slot_us, rule.coarse_us)
            args += (rule.kind.encode(), *(b"%d" % number for number in shape))
        args += (b"%d" % number for number in numbers)
        reply = await self._line().call(script("decide"), list(keys), args)
        if len(reply) != 1 + 4 * len(entries):
            raise StorageProtocolError("the reply has not as many decisions as there were checks")
        answers = iter(reply[1:])
        return [
            entry.decided("redis", bool(next(answers)), int(next(answers)), int(next(answers)), int(next(answers)))
            for entry in entries
        ]

    def _line(self) -> Line:
        """Return this loop's line. A forked child gets its own: what it inherited is the parent's, so it is kept unclosed and unused."""
        if self._closed:
            raise StorageUnavailable("the storage is closed")
        if self._process != os.getpid():
            self._inherited += self._lines.values()
            self._lines = {}
            self._process = os.getpid()
        loop = asyncio.get_running_loop()
        line = self._lines.get(loop)
        if line is None or line.closed:
            # Loops that are gone left their lines behind: this is where they are swept.
            self._lines = {known: line for known, line in self._lines.items() if not known.is_closed()}
            line = self._lines[loop] = Line(self._settings, self._deadline_s, self._max_waiting)
        return line
