"""The greeting of a new connection: it authenticates, and asks what the connection has to know, all in one write.

Each round trip counts if Redis is far. Beside TCP's own and those of TLS there is one, and a second one if the server doesn't
have our scripts yet: they are 96 kB, and Redis takes no argument of more than 16 kB from a client that it doesn't know yet.
"""

from __future__ import annotations

import asyncio
import functools
import re
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import redis
from redis.asyncio.connection import AbstractConnection

from ratethrottle.errors import StorageUnavailable
from ratethrottle.storage.redis.aside import Shared
from ratethrottle.storage.redis.race import Progress
from ratethrottle.storage.redis.scripts import LATER, NAMES, SHEBANG, script
from ratethrottle.storage.redis.wire import Receiver, Wire, is_fake, take_over
from ratethrottle.storage.redis.words import without

RUN_ID = re.compile(rb"^run_id:([0-9a-f]{1,40})\r?$", re.MULTILINE)
# Credentials of which no server has said anything yet, since the attempt that asked for them ended early, serve the next one so long.
UNUSED_S = 10.0

Command = Sequence[bytes | str | int]


@functools.cache
def first() -> tuple[Command, ...]:
    """Ask whether `#!lua` is known, which run of the server this is, and which of our scripts it has.

    At most 10 words and 16 kB each: more is refused before AUTH has been answered.
    """
    hashes = [script(name).sha(shebang) for shebang in (True, False) for name in NAMES]
    # fakeredis loads a script that begins with `#!lua`, but calls it a syntax error.
    return (b"EVAL", SHEBANG + b"return 1", b"0"), (b"INFO", b"server"), (b"SCRIPT", b"EXISTS", *hashes)


@dataclass(frozen=True, slots=True)
class Reached:
    """A connection on which our scripts are loaded. run: of the server. shebang: whether they begin with `#!lua`."""

    connection: AbstractConnection
    run: bytes
    shebang: bool

    @property
    def scripts(self) -> dict[str, tuple[bytes, bytes]]:
        """Name -> (sha, text), also of those that are loaded later."""
        return texts(self.shebang)

    def take_over(self, receiver: Receiver) -> Wire:
        """Let `receiver` hear what comes on the connection; returns what to write to."""
        return take_over(self.connection, receiver)


@functools.cache
def texts(shebang: bool) -> dict[str, tuple[bytes, bytes]]:
    """Name -> (sha, text) of all scripts."""
    return {name: (script(name).sha(shebang), script(name).body(shebang)) for name in (*NAMES, *LATER)}


async def ask(
    connection: AbstractConnection, commands: Sequence[Command], progress: Progress, reply_s: float | None
) -> list[Any]:
    """Send commands in one write; returns their replies, an error reply as the exception that it is.

    reply_s: how long each of them may take. Raises redis-py's errors, OSError and TimeoutError.
    """
    await connection.send_packed_command(connection.pack_commands(commands), check_health=False)
    progress.sent()
    return [await reply_of(connection, progress, reply_s) for _ in commands]


async def reply_of(connection: AbstractConnection, progress: Progress, reply_s: float | None) -> Any:
    """Read one reply; an error reply is returned as the exception that it is."""
    try:
        async with asyncio.timeout(reply_s):
            reply = await connection.read_response(disable_decoding=True)
    except redis.ResponseError as error:
        reply = error
    progress.replied()
    return reply


async def load(
    connection: AbstractConnection, replies: Sequence[Any], more: Callable[[Sequence[Command]], Awaitable[list[Any]]]
) -> Reached:
    """Load what is missing, by the replies to `first()`. Raises redis-py's errors."""
    probe, info, known = replies
    shebang = not isinstance(probe, redis.ResponseError)
    if not shebang and "near '#'" not in str(probe):
        raise probe
    run = b""
    if isinstance(info, redis.ResponseError):
        if not is_fake(connection):  # which has no INFO, and is always the same run
            raise info
    elif isinstance(info, bytes) and (found := RUN_ID.search(info)):
        run = found[1]
    # A user that may not ask for them may still load them.
    have = known if isinstance(known, list) and len(known) == 2 * len(NAMES) else [0] * 2 * len(NAMES)
    have = have[: len(NAMES)] if shebang else have[len(NAMES) :]
    missing = [name for name, there in zip(NAMES, have, strict=True) if there != 1]
    if missing:
        loaded = await more([(b"SCRIPT", b"LOAD", script(name).body(shebang)) for name in missing])
        for refusal in loaded:
            if isinstance(refusal, redis.ResponseError):
                raise refusal
    return Reached(connection, run.ljust(40, b"0"), shebang)


async def greet(
    connection: Any, first: Sequence[Command], credentials: Credentials | None, progress: Progress, reply_s: float | None
) -> list[Any]:
    """Do what redis-py does on a new connection, in one write together with `first`; returns the replies to that.

    Raises redis-py's errors, OSError and TimeoutError, and StorageUnavailable if there are no credentials.
    """
    connection._parser.on_connect(connection)
    user: Sequence[str] = ()
    if credentials is not None:
        progress.elsewhere()
        user = await credentials.get_credentials_async()
        progress.heard()
    elif connection.username or connection.password:
        user = (connection.username, connection.password or "") if connection.username else (connection.password,)
    own: list[tuple[Command, Exception]] = []
    if user:
        own.append((("AUTH", *user), redis.AuthenticationError("Invalid Username or Password")))
    if connection.client_name:
        own.append((("CLIENT", "SETNAME", connection.client_name), redis.ConnectionError("Error setting client name")))
    if connection.db:
        own.append((("SELECT", connection.db), redis.ConnectionError("Invalid Database")))
    if not own and not first:
        return []
    await connection.send_packed_command(connection.pack_commands([*(command for command, _ in own), *first]), check_health=False)
    progress.sent()
    for command, strange in own:
        try:
            said = await reply_of(connection, progress, reply_s)
        except redis.AuthenticationError as error:  # to redis-py it is a lost connection
            said = error
        if command[0] == "AUTH" and credentials is not None:
            credentials.answered()
        if isinstance(said, redis.RedisError):
            raise _without(said, user)
        if said != b"OK":
            raise strange
    return [_without(await reply_of(connection, progress, reply_s), user) for _ in first]


def _without(reply: Any, user: Sequence[str]) -> Any:
    """Take the password out of an error reply: a proxy may repeat what it was sent, in any words."""
    if user and isinstance(reply, Exception):
        reply.args = (without(str(reply), str(user[-1])),)
    return reply


class Credentials(redis.CredentialProvider):
    """Hands over what the client's provider says. One that is synchronous is asked on a thread of our own, once at a time."""

    def __init__(self, provider: Any, *, keeps: bool) -> None:
        self._provider = provider
        self._keeps = keeps  # what no server has said anything of, and `answered` will tell
        self._count = 0
        self._aside: Shared[Any] | None = None
        if synchronous(provider):
            self._aside = Shared(provider.get_credentials, "ratethrottle credentials")
        self._unused: tuple[Sequence[str], float] | None = None

    @property
    def count(self) -> int:
        """How often the provider was asked."""
        return self._count + (self._aside.count if self._aside is not None else 0)

    def get_credentials(self) -> Any:
        """Not for us: redis-py's asyncio half asks for the other one."""
        raise NotImplementedError

    async def get_credentials_async(self) -> Any:
        """Ask the provider. Raises StorageUnavailable for whatever it raises."""
        unused = self._unused
        if unused is not None and time.monotonic() - unused[1] < UNUSED_S:
            return unused[0]
        try:
            if self._aside is not None:
                given = await self._aside.get()
            else:
                self._count += 1
                given = await self._provider.get_credentials_async()
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            # Not ours: a token library has cancelled its own work.
            raise StorageUnavailable(
                "the client's credential provider was cancelled by its own code; is its service up?"
            ) from error
        except Exception as error:
            raise StorageUnavailable(
                f"the client's credential provider failed ({type(error).__name__}); is its service up?"
            ) from error
        if not isinstance(given, (tuple, list)) or not 1 <= len(given) <= 2:
            raise StorageUnavailable("the client's credential provider gave neither (password,) nor (user, password)")
        if self._keeps:
            self._unused = tuple(given), time.monotonic()
        return tuple(given)

    def answered(self) -> None:
        """Take note that a server has said what it thinks of them."""
        self._unused = None


def synchronous(provider: Any) -> bool:
    """Whether a provider has only the synchronous method: redis-py's base class has the other one call it, on the loop."""
    method = getattr(provider, "get_credentials_async", None)
    return method is None or getattr(method, "__func__", None) is redis.CredentialProvider.get_credentials_async
