"""How to reach Redis: connections of our own, made from the settings of the client that the user gave us.

The client itself, its pool and its connections are left alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import socket
import time
from collections.abc import Awaitable, Callable, Hashable, Mapping, Sequence
from typing import Any, TypeVar

import redis
import redis.asyncio
import redis.asyncio.sentinel
from redis._parsers import _AsyncRESP2Parser
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from ratethrottle.errors import ConfigurationError, StorageRefused
from ratethrottle.storage.redis.aside import Shared
from ratethrottle.storage.redis.failures import was_reset
from ratethrottle.storage.redis.greeting import Command, Credentials, ask, greet
from ratethrottle.storage.redis.names import Names, Place, dial
from ratethrottle.storage.redis.race import Pace, Progress, Race
from ratethrottle.storage.redis.strange import check_tls, strange

# What our connections decide for themselves, or can't take from a client: its parser may be the synchronous one, its retries
# would resend what may have run, its decoding would cost time and fail on bytes.
OURS = frozenset(
    {
        "command_packer",
        "connection_pool",
        "decode_responses",
        "driver_info",
        "encoder_class",
        "encoding",
        "encoding_errors",
        "event_dispatcher",
        "health_check_interval",
        "himport_registry",
        "legacy_responses",
        "lib_name",
        "lib_version",
        "maint_notifications_config",
        "maint_notifications_pool_handler",
        "maintenance_notification_hash",
        "maintenance_state",
        "orig_host_address",
        "orig_socket_connect_timeout",
        "orig_socket_timeout",
        "oss_cluster_maint_notifications_handler",
        "parser_class",
        "protocol",
        "retry",
        "retry_on_error",
        "retry_on_timeout",
        "socket_connect_timeout",
        "socket_read_size",
        "socket_timeout",
    }
)


# How long a certificate that was replaced on disk may stay in use for new connections.
TLS_SHARED_S = 60
# How long an attempt to connect may take, if neither the option nor the client's socket_connect_timeout says more.
CONNECT_S = 5.0
CONNECT_MOST_S = 60.0
# How long a server has to say why it won't have us, before anything is said to it.
REASON_S = 0.05

Address = tuple[str, int]
HALF_SECONDS = Pace()
T = TypeVar("T")
# Asks more on a new connection: commands in one write, and the list of their replies.
Ask = Callable[[Sequence[Command]], Awaitable[list[Any]]]
Then = Callable[[AbstractConnection, list[Any], Ask], Awaitable[T]]


class Settings:
    """Makes connections to one server, or to the servers that sentinels name. Raises ConfigurationError for a strange client.

    deadline_s: of a check. connect_timeout_s: of an attempt to connect; None: 5, or the client's socket_connect_timeout if longer.
    sentinels: settings of their own for each of them, with their credentials; none for a single server. master_name: what they
    know the master by. forced_host: stands in for the host that they name, if that can't be reached from here.
    """

    def __init__(
        self, client: Any, deadline_s: float, connect_timeout_s: float | None = None, *, names: Names | None = None
    ) -> None:
        if not isinstance(client, (redis.Redis, redis.asyncio.Redis)):
            raise ConfigurationError(strange(client))
        pool: Any = client.connection_pool  # the pools of redis-py's two halves and of its sentinels have no common type
        self.deadline_s = deadline_s
        self.sentinels: tuple[Settings, ...] = ()
        self.master_name = ""
        self.forced_host: str | None = None
        self._names = names = names or Names()
        manager = getattr(pool, "sentinel_manager", None)
        if manager is not None:
            if not pool.is_master:
                raise ConfigurationError("RedisStorage writes, so it takes a Sentinel's master_for(...), not its replica")
            self.master_name = pool.service_name
            self.forced_host = getattr(manager, "_force_master_ip", None)
            self.sentinels = tuple(
                Settings(sentinel, deadline_s, connect_timeout_s, names=names) for sentinel in manager.sentinels
            )
        self._class = asyncio_twin(pool.connection_class)
        # The client's own timeouts count; redis-py's defaults don't.
        self._step_s = given_s(pool.connection_kwargs, "socket_connect_timeout")
        self._reply_s = given_s(pool.connection_kwargs, "socket_timeout")
        self._kwargs = own_kwargs(self._class, pool.connection_kwargs, self._step_s)
        self.connect_timeout_s = (
            min(max(CONNECT_S, self._step_s or 0.0), CONNECT_MOST_S) if connect_timeout_s is None else connect_timeout_s
        )
        self._dials = dials(self._class)
        self._greets = greets(self._class) and self._kwargs.get("redis_connect_func") is None
        self._credentials: Credentials | None = None
        if self._kwargs.get("credential_provider") is not None:
            self._credentials = Credentials(self._kwargs["credential_provider"], keeps=self._greets)
            self._kwargs["credential_provider"] = self._credentials
        self._secure = issubclass(self._class, redis.asyncio.SSLConnection)
        self._tls: Any = None  # what connections share
        self._tls_since_s = time.monotonic()
        self._reading = Shared(functools.partial(secured, self._class, self._kwargs), "ratethrottle certificates")
        if self._secure:
            check_tls(self._kwargs)
            self._begin_reading()

    @property
    def credentials_asked(self) -> int:
        """How often the client's credential provider was asked."""
        return self._credentials.count if self._credentials is not None else 0

    @property
    def where(self) -> Hashable:
        """Where the data is: equal for two clients of the same database, as far as their settings tell. Not as whom they connect."""
        kwargs = self._kwargs
        database = int(kwargs.get("db") or 0)
        if self.sentinels:
            return frozenset(sentinel.where for sentinel in self.sentinels), self.master_name, database
        if "fakeredis" in self._class.__module__:
            # A server without a name of its own is only where it is.
            return kwargs.get("server") or object(), database
        # Somebody's own may be a tunnel, to wherever it wants.
        theirs = None if self._class.__module__.partition(".")[0] == "redis" else self._class
        if kwargs.get("path"):
            return kwargs["path"], database, theirs
        return str(kwargs.get("host") or "localhost").lower(), int(kwargs.get("port") or 6379), database, theirs

    async def connect(self, address: Address | None = None) -> AbstractConnection:
        """Open a connection, to `address` if sentinels named it. Raises redis-py's errors and OSError; the caller bounds the time."""
        return await self.reach((), _only, address)

    async def reach(
        self,
        first: Sequence[Command],
        then: Then[T],
        address: Address | None = None,
        pace: Pace = HALF_SECONDS,
    ) -> T:
        """Open a connection, send `first` in one write with our greeting, and return what `then` makes of the replies.

        then: ends without closing the connection. pace: when a server that says nothing is tried once more.
        Raises redis-py's errors, OSError and what `then` raises; the caller bounds the time.
        """
        kwargs = dict(self._kwargs)
        if address is not None:
            kwargs["host"], kwargs["port"] = address
        await self._read_certificates()
        places = None
        if self._dials:
            places = await self._names.places(str(kwargs.get("host", "localhost")), int(kwargs.get("port", 6379)))

        async def begin(progress: Progress) -> tuple[AbstractConnection, T]:
            for patient in (False, True):
                try:
                    return await self._try(kwargs, places, first, then, progress, patient=patient)
                except Exception as error:
                    # A server that doesn't accept our certificate says so only after the handshake, and its reason is lost with the
                    # connection if we write meanwhile: then it is given the time to say it first.
                    if patient or not self._secure or not was_reset(error):
                        raise
            raise AssertionError

        return (await Race(begin, pace, _close_first).run())[1]

    async def _try(
        self,
        kwargs: dict[str, Any],
        places: list[Place] | None,
        first: Sequence[Command],
        then: Then[T],
        progress: Progress,
        *,
        patient: bool,
    ) -> tuple[AbstractConnection, T]:
        connection: Any = self._class(**kwargs)
        if self._tls is not None:
            connection.ssl_context = self._tls
        replies: list[Any] | None = None

        async def greeting(_: AbstractConnection) -> None:
            nonlocal replies
            progress.heard()
            if patient:
                await asyncio.sleep(min(REASON_S, self.deadline_s / 4))
            replies = await greet(connection, first, self._credentials, progress, self._reply_s)

        if self._greets:
            connection.redis_connect_func = greeting
            connection.on_connect = _nothing  # connections over Unix sockets call it beside that
        dialled = None
        try:
            if places is not None:
                async with asyncio.timeout(self._step_s):
                    dialled = await dial(places)
                progress.heard()
                connection._connection_arguments = functools.partial(through, connection, dialled)
            await connection.connect()
            progress.heard()
            more = functools.partial(ask, connection, progress=progress, reply_s=self._reply_s)
            if replies is None:
                replies = await more(first) if first else []
            return connection, await then(connection, replies, more)
        except BaseException:
            try:
                await close(connection)
            finally:
                if dialled is not None:
                    dialled.close()
            raise

    def _begin_reading(self) -> None:
        """Read certificates: now if no loop would stand still for it, otherwise so that the first attempt finds them read."""
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            with contextlib.suppress(Exception):  # the first attempt will say it
                self._tls = secured(self._class, self._kwargs)
        else:
            self._reading.begin()

    async def _read_certificates(self) -> None:
        """Read them, and now and then anew, off the loop: it takes tens of milliseconds. If they can't be read anew, the old ones stay.

        Raises StorageRefused.
        """
        now_s = time.monotonic()
        if not self._secure or (self._tls is not None and now_s - self._tls_since_s < TLS_SHARED_S):
            return
        try:
            self._tls = await self._reading.get()
        except Exception as error:
            if self._tls is None:  # otherwise they may just be being written
                raise StorageRefused(
                    f"the client's TLS settings can't be used ({type(error).__name__}); check those that begin with ssl_"
                ) from error
        self._tls_since_s = now_s


def dials(connection_class: type[AbstractConnection]) -> bool:
    """Whether connections connect as redis-py's own do, over TCP. Somebody's own do it themselves."""
    plain, secure = redis.asyncio.Connection, redis.asyncio.SSLConnection
    return connection_class._connect is plain._connect and all(
        getattr(connection_class, name) in (getattr(plain, name), getattr(secure, name))
        for name in ("__init__", "_connection_arguments")
    )


def greets(connection_class: type[AbstractConnection]) -> bool:
    """Whether connections begin as redis-py's own do. Somebody's own, and those to fakeredis, do it themselves."""
    return "fakeredis" not in connection_class.__module__ and all(
        getattr(connection_class, name, None) is getattr(AbstractConnection, name, None)
        for name in ("on_connect", "on_connect_check_health")
    )


async def _nothing() -> None:
    """Leave the greeting to us."""


async def _only(connection: AbstractConnection, _replies: list[Any], _ask: Ask) -> AbstractConnection:
    return connection


async def _close_first(reached: tuple[AbstractConnection, Any]) -> None:
    await close(reached[0])


def through(connection: Any, dialled: socket.socket) -> dict[str, Any]:
    """Build what redis-py connects with: a socket that is connected already, and the name that the certificate is held against."""
    arguments = dict(type(connection)._connection_arguments(connection))
    host = arguments.pop("host", None)
    arguments.pop("port", None)
    if arguments.get("ssl"):
        arguments.setdefault("server_hostname", host)
    return {**arguments, "sock": dialled}


def given_s(kwargs: Mapping[str, Any], name: str) -> float | None:
    """Read a timeout of the client's; None if it is redis-py's default, or no limit."""
    value = kwargs.get(name)
    theirs = inspect.signature(AbstractConnection.__init__).parameters[name].default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value == theirs or not value > 0:
        return None
    return float(value)


def secured(connection_class: type[AbstractConnection], kwargs: Mapping[str, Any]) -> Any:
    """Read certificate files, and make what connections over TLS share. Raises what redis-py and the system raise."""
    made: Any = connection_class(**kwargs).ssl_context  # type: ignore[attr-defined]  # those over TLS have one
    made.get()
    return made


def abort(connection: AbstractConnection) -> None:
    """Drop a connection at once. A polite end of TLS would wait for a server that may never answer."""
    writer = getattr(connection, "_writer", None)
    if isinstance(writer, asyncio.StreamWriter):
        writer.transport.abort()


async def close(connection: AbstractConnection) -> None:
    """Drop a connection, and have redis-py know it."""
    abort(connection)
    await connection.disconnect(nowait=True)


def asyncio_twin(connection_class: type) -> type[AbstractConnection]:
    """Find the asyncio connection class that connects as `connection_class` does."""
    if issubclass(connection_class, AbstractConnection):
        if issubclass(connection_class, redis.asyncio.sentinel.SentinelManagedConnection):
            return (
                redis.asyncio.SSLConnection
                if issubclass(connection_class, redis.asyncio.SSLConnection)
                else redis.asyncio.Connection
            )
        return connection_class
    if connection_class.__module__.partition(".")[0] == "fakeredis":
        from fakeredis.aioredis import FakeAsyncRedisConnection  # noqa: PLC0415  # a test tool, that only its users have

        return FakeAsyncRedisConnection
    if issubclass(connection_class, redis.SSLConnection):
        return redis.asyncio.SSLConnection
    if issubclass(connection_class, redis.UnixDomainSocketConnection):
        return redis.asyncio.UnixDomainSocketConnection
    return redis.asyncio.Connection


def own_kwargs(connection_class: type, theirs: Mapping[str, Any], step_s: float | None) -> dict[str, Any]:
    """Build the arguments of a connection of ours: where and as whom from theirs, how from us."""
    fake = "fakeredis" in connection_class.__module__
    accepted = {
        name
        for ancestor in connection_class.__mro__
        for name in inspect.signature(ancestor.__init__).parameters  # type: ignore[misc]  # read, not called
    }
    asked = {name: value for name, value in theirs.items() if name not in OURS}
    kwargs = {name: value for name, value in asked.items() if fake or name in accepted}
    # To leave one of these out would connect with less security than was asked for.
    lost = [name for name, value in asked.items() if name not in kwargs and name.startswith("ssl_") and value]
    connect = kwargs.get("redis_connect_func")
    if connect is not None and not inspect.iscoroutinefunction(connect):
        lost.append("redis_connect_func")
    if lost:
        raise ConfigurationError(
            f"redis-py's asyncio connections can't take {', '.join(lost)} from this client; make an asyncio client and pass that"
        )
    kwargs.update(
        protocol=2,
        retry=Retry(NoBackoff(), 0),
        # The caller bounds the time. With one of its own, redis-py writes through asyncio.wait_for, which up to Python 3.11 can lose
        # a cancellation: the cancelled task goes on, and a task that waits for its end waits for ever.
        socket_connect_timeout=step_s,
        socket_timeout=None,
    )
    if not fake:
        # For connecting; redis-py has no public name for it. hiredis makes a list of as many elements as a reply announces, before one
        # has come: to collect one of 10^9 takes seconds of the loop's time.
        kwargs["parser_class"] = _AsyncRESP2Parser
    for name in ("driver_info", "lib_name", "lib_version", "maint_notifications_config"):
        if name in accepted:
            kwargs[name] = None
    if "driver_info" in accepted:
        # Given beside driver_info, these only earn a deprecation warning.
        kwargs.pop("lib_name", None)
        kwargs.pop("lib_version", None)
    return kwargs
