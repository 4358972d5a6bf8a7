"""`RedisStorage`: one limit for every server that shares a Redis."""

from __future__ import annotations

import asyncio
import contextlib
import os
import weakref
from collections.abc import Sequence
from operator import attrgetter
from typing import Any, Self

import redis.asyncio

from ratethrottle._core import CompiledRule, Decision, Entry, read_answer
from ratethrottle.errors import ConfigurationError, StorageProtocolError, StorageUnavailable
from ratethrottle.storage.redis.keys import KeyLayout
from ratethrottle.storage.redis.line import Line
from ratethrottle.storage.redis.scripts import script
from ratethrottle.storage.redis.settings import Settings

SCHEMES = ("redis", "rediss", "unix")
SENTINEL_SCHEMES = ("redis+sentinel", "rediss+sentinel")
# What a forked child holds of its parent's lines, kept for ever: to collect a transport is to close it, and that takes the
# descriptor out of the selector, which the two processes share, so that the parent would never hear from Redis again.
_INHERITED: list[Line] = []


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
        self._decide_script = script("decide")
        self._reset_script = script("reset")
        # The script's header says what it takes of a rule, in its order, and how many entries.
        self._shape_of = attrgetter(*self._decide_script.header["rule"])
        self._entries_max = self._decide_script.limits["entries"]
        self._answer_lengths = {kind: len(self._decide_script.header[f"answer_{kind}"]) for kind in "bscf"}
        self._lines: dict[asyncio.AbstractEventLoop, Line] = {}
        self._closed = False
        # Also what keeps a line's task alive as long as the storage: a loop holds its tasks weakly.
        weakref.finalize(self, abandon, self._lines).atexit = False

    @classmethod
    def from_url(cls, url: str, **options: Any) -> Self:
        """Make a storage from redis://, rediss:// (TLS) or unix://. Raises ConfigurationError, without the URL's password."""
        # No message repeats a part of the URL: in a malformed one the password may stand anywhere.
        client = None
        scheme = url.partition("://")[0] if isinstance(url, str) else ""
        if scheme in SENTINEL_SCHEMES:
            raise ConfigurationError(f"{scheme}:// comes in a later version; pass a Sentinel's master_for(...) to RedisStorage")
        if scheme not in SCHEMES:
            raise ConfigurationError("redis_url must begin with redis://, rediss:// or unix://")
        with contextlib.suppress(ValueError, TypeError):
            client = redis.asyncio.Redis.from_url(url)
        if client is None:
            raise ConfigurationError(
                "redis_url is no valid URL; write redis://user:password@host:port/db, with anything odd in a password as %xx"
            )
        return cls(client, **options)

    async def decide_one(self, entry: Entry) -> Decision:
        """Decide and consume."""
        return (await self._decide(b"check", [entry], self._deadline()))[0]

    async def decide(self, entries: Sequence[Entry]) -> list[Decision]:
        """Decide in order, in one script call for each 128 entries, all within one deadline.

        When one of several calls fails, what the others granted stays granted.
        """
        deadline, most = self._deadline(), self._entries_max
        if len(entries) <= most:
            return await self._decide(b"check", entries, deadline)
        calls = (self._decide(b"check", entries[start : start + most], deadline) for start in range(0, len(entries), most))
        return [decision for decisions in await asyncio.gather(*calls) for decision in decisions]

    async def peek(self, entry: Entry) -> Decision:
        """Decide without consuming."""
        return (await self._decide(b"peek", [entry], self._deadline()))[0]

    async def reset(self, entry: Entry) -> None:
        """Forget what the key has used under the rule, for every server."""
        await self._line().call(self._reset_script, [self._keys.state_key(entry)], [], self._deadline())

    async def open(self) -> None:
        """Start this loop's line; it connects with the first call."""
        self._line()

    async def aclose(self) -> None:
        """Close our connections for good, those of other loops too. The client that was passed in stays as it is."""
        self._closed = True
        line = self._lines.pop(asyncio.get_running_loop(), None)
        abandon(self._lines)
        if line is not None and line.process == os.getpid():
            await line.aclose()

    def _deadline(self) -> float:
        return asyncio.get_running_loop().time() + self._deadline_s

    async def _decide(self, mode: bytes, entries: Sequence[Entry], deadline: float) -> list[Decision]:
        keys: dict[bytes, int] = {}
        rules: dict[CompiledRule, int] = {}
        runs: list[int] = []
        for entry in entries:
            key = keys.setdefault(self._keys.state_key(entry), len(keys) + 1)
            runs += (key, 1, rules.setdefault(entry.rule, len(rules) + 1), entry.cost, 1)
        args = [mode, b"%d" % len(rules), b"%d" % len(entries), b"0"]
        for rule in rules:
            kind, *shape = self._shape_of(rule)
            args += (kind.encode(), *(b"%d" % number for number in shape))
        args += (b"%d" % number for number in runs)
        _, *numbers = await self._line().call(self._decide_script, list(keys), args, deadline) or [0]
        lengths = [self._answer_lengths[entry.rule.kind] for entry in entries]
        if len(numbers) != sum(lengths) or not all(type(number) is int for number in numbers):
            raise StorageProtocolError("the reply has not as many decisions as there were checks")
        decisions, start = [], 0
        for entry, length in zip(entries, lengths, strict=True):
            answer = numbers[start : start + length] + [0] * (entry.rule.lease_units > 0)
            decisions.append(entry.decided("redis", *read_answer(entry.rule, answer, entry.cost)))
            start += length
        return decisions

    def _line(self) -> Line:
        """Find or make the line of this process and this loop."""
        if self._closed:
            raise StorageUnavailable("the storage is closed")
        loop = asyncio.get_running_loop()
        line = self._lines.get(loop)
        if line is None or line.closed or line.process != os.getpid():
            # Loops that are gone left their lines behind: this is where they are swept.
            for known, old in list(self._lines.items()):
                if old.process != os.getpid():
                    _INHERITED.append(old)
                if known is loop or known.is_closed() or old.process != os.getpid():
                    self._lines.pop(known, None)
            line = self._lines[loop] = Line(self._settings, self._deadline_s, self._max_waiting)
        return line


def abandon(lines: dict[asyncio.AbstractEventLoop, Line]) -> None:
    """Let go of every line: its own loop closes it, unless it belongs to the process that forked this one."""
    while lines:
        _, line = lines.popitem()
        if line.process == os.getpid():
            line.abandon()
        else:
            _INHERITED.append(line)
