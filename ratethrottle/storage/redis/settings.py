"""How to reach Redis: connections of our own, made from the settings of the client that the user gave us.

The client itself, its pool and its connections are left alone.
"""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Mapping
from typing import Any

import redis
import redis.asyncio
import redis.asyncio.sentinel
from redis._parsers import _AsyncRESP2Parser
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from ratethrottle.errors import ConfigurationError

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


# How long a sentinel may take to answer before its connection is given up; nobody waits for it that long.
SENTINEL_ANSWERS_S = 1.0

Address = tuple[str, int]


class Settings:
    """Makes connections to one server, or to the servers that sentinels name. Raises ConfigurationError for a strange client.

    sentinels: settings of their own for each of them, with their credentials; none for a single server. master_name: what they
    know the master by. forced_host: stands in for the host that they name, where theirs can't be reached from here.
    """

    def __init__(self, client: Any, deadline_s: float) -> None:
        if not isinstance(client, (redis.Redis, redis.asyncio.Redis)):
            cluster = "Cluster" in type(client).__name__
            raise ConfigurationError(
                f"RedisStorage takes a client of redis-py (redis.asyncio.Redis, redis.Redis or a Sentinel's master_for), not a "
                f"{type(client).__name__}" + (": clusters are not supported yet" if cluster else "")
            )
        pool: Any = client.connection_pool  # the pools of redis-py's two halves and of its sentinels have no common type
        self.deadline_s = deadline_s
        self.sentinels: tuple[Settings, ...] = ()
        self.master_name = ""
        self.forced_host: str | None = None
        self._tls: Any = None
        self._tls_since_s = 0.0
        manager = getattr(pool, "sentinel_manager", None)
        if manager is not None:
            if not pool.is_master:
                raise ConfigurationError("RedisStorage writes, so it takes a Sentinel's master_for(...), not its replica")
            self.master_name = pool.service_name
            self.forced_host = getattr(manager, "_force_master_ip", None)
            patience_s = max(SENTINEL_ANSWERS_S, deadline_s)
            self.sentinels = tuple(Settings(sentinel, patience_s) for sentinel in manager.sentinels)
        self._class = asyncio_twin(pool.connection_class)
        self._kwargs = own_kwargs(self._class, pool.connection_kwargs, deadline_s)

    async def connect(self, address: Address | None = None) -> AbstractConnection:
        """Open a connection, to `address` where sentinels named it. Raises redis-py's errors and OSError; the caller bounds the time."""
        kwargs = dict(self._kwargs)
        if address is not None:
            kwargs["host"], kwargs["port"] = address
        connection = self._class(**kwargs)
        self._share_tls(connection)
        try:
            await connection.connect()  # type: ignore[no-untyped-call]  # redis-py leaves it untyped
        except BaseException:
            await close(connection)
            raise
        return connection

    def _share_tls(self, connection: AbstractConnection) -> None:
        """Let connections share what was read from certificate files, which stops the loop for tens of milliseconds."""
        made = getattr(connection, "ssl_context", None)
        if made is None:
            return
        now_s = time.monotonic()
        if self._tls is None or now_s - self._tls_since_s > TLS_SHARED_S:
            self._tls, self._tls_since_s = made, now_s
        else:
            connection.ssl_context = self._tls  # type: ignore[attr-defined]  # only connections over TLS have one


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


def own_kwargs(connection_class: type, theirs: Mapping[str, Any], deadline_s: float) -> dict[str, Any]:
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
        socket_connect_timeout=deadline_s,
        # Who awaits bounds the time. With one of its own, redis-py writes through asyncio.wait_for, which up to Python 3.11 can lose
        # a cancellation: the task that was told to end goes on, and who waits for its end waits for ever.
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
