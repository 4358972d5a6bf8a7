"""What goes wrong below, and the error of ours that it becomes."""

from __future__ import annotations

import asyncio
import inspect
import pickle
import socket
import ssl
import traceback
from contextlib import ExitStack
from typing import Any

import pytest
import redis
import redis.asyncio
import redis.asyncio.sentinel
import redis.exceptions
import redis.sentinel

from ratethrottle import RateThrottleCore, RateThrottleRule, RedisStorage, create_limiter
from ratethrottle.errors import (
    ConfigurationError,
    StorageError,
    StorageProtocolError,
    StorageRefused,
    StorageTimeout,
    StorageUnavailable,
)
from ratethrottle.storage.redis.failures import failure, meaning_of
from tests.kit.recovery import healed
from tests.kit.relay import Relay
from tests.kit.servers import RedisServer

MANY = RateThrottleRule("many", 1_000_000, 60, strategy="fixed_window", on_outage="raise")

# Every exception of redis-py, by what it becomes after a call was sent. A new one must be given its place here.
MAPPED: dict[type[StorageError], str] = {
    StorageTimeout: "TimeoutError",
    StorageProtocolError: "InvalidResponse DataError",
    StorageRefused: """
        AskError AuthenticationError AuthenticationWrongNumberOfArgsError AuthorizationError ClusterCrossSlotError
        ClusterError CrossSlotTransactionError IncorrectPolicyType InvalidPipelineStack MovedError
        NoPermissionError RedisClusterException SlotNotCoveredError
    """,
    StorageUnavailable: """
        BusyLoadingError ChildDeadlockedError ClusterDownError ConnectionError ExecAbortError ExternalAuthProviderError
        LockError LockNotOwnedError MasterDownError MaxConnectionsError ModuleError NoScriptError
        NoSuchFieldsetError OutOfMemoryError PubSubError ReadOnlyError RedisError ResponseError TryAgainError WatchError
    """,
}


def redis_exceptions() -> list[type[Exception]]:
    found = inspect.getmembers(redis.exceptions, lambda member: inspect.isclass(member) and issubclass(member, Exception))
    return [kind for _, kind in found if kind.__module__ == "redis.exceptions"]


def raised(kind: type[Exception]) -> Exception:
    for arguments in (("what is said of 'a secret'",), ("1234 10.0.0.1:6379",), ()):
        try:
            return kind(*arguments)
        except (TypeError, ValueError, IndexError):
            continue
    raise AssertionError(kind)


@pytest.mark.parametrize("kind", redis_exceptions(), ids=lambda kind: kind.__name__)
def test_every_exception_of_redis_py_is_mapped(kind: type[Exception]) -> None:
    expected = [ours for ours, names in MAPPED.items() if kind.__name__ in names.split()]
    assert expected, f"{kind.__name__} is new in redis-py: give it a place in MAPPED, and in FIRST_WORDS if it is an error reply"
    error = raised(kind)
    found = failure(error, 0.25, sent=True)
    assert type(found) is expected[0]
    assert found.__cause__ is error or type(error).__name__ in str(found.__cause__)  # what a server said is not repeated
    assert "secret" not in str(found)
    assert meaning_of(error) is None or "secret" not in repr(found.__cause__)
    again = pickle.loads(pickle.dumps(found))
    assert (type(again), str(again)) == (type(found), str(found))


@pytest.mark.parametrize(
    ("error", "sent", "expected", "words"),
    [
        (TimeoutError(), True, StorageTimeout, "no answer"),
        (TimeoutError(), False, StorageUnavailable, "no connection"),
        (redis.TimeoutError(), False, StorageUnavailable, "no connection"),
        (ConnectionResetError(), True, StorageUnavailable, "may have been counted"),
        (ConnectionRefusedError(), False, StorageUnavailable, "ConnectionRefusedError"),
        (socket.gaierror(), False, StorageUnavailable, "gaierror"),
        (ssl.SSLCertVerificationError(), False, StorageRefused, "SSLCertVerificationError"),
        (asyncio.IncompleteReadError(b"", 1), True, StorageUnavailable, "lost"),
        (RuntimeError("a credential provider"), False, StorageUnavailable, "RuntimeError"),
        (redis.ResponseError("RATETHROTTLE a number of an entry is out of range"), True, StorageProtocolError, "out of range"),
        (redis.ResponseError("ERR user_script:9: attempt to compare"), True, StorageProtocolError, "failed on the server"),
        (redis.ResponseError("NOREPLICAS Not enough good replicas"), True, StorageUnavailable, "NOREPLICAS"),
        (redis.ResponseError("MISCONF Redis is configured to"), True, StorageUnavailable, "MISCONF"),
        (redis.ResponseError("BUSY Redis is busy"), True, StorageUnavailable, "BUSY"),
        (redis.exceptions.ReadOnlyError("You can't write"), True, StorageUnavailable, "read-only"),
        (StorageUnavailable("none of 2 sentinels"), False, StorageUnavailable, "none of 2 sentinels"),
    ],
)
def test_an_error_says_what_is_known(error: BaseException, sent: bool, expected: type[StorageError], words: str) -> None:
    found = failure(error, 0.25, sent=sent)
    assert type(found) is expected
    assert words in str(found)
    assert (found.__cause__ is error) == (meaning_of(error) is None)  # what a server said is not repeated
    assert found.__cause__ is error or type(error).__name__ in str(found.__cause__)


def test_redis_py_wraps_a_cause_and_the_message_names_that() -> None:
    error = redis.ConnectionError("Error 1 connecting")
    error.__context__ = ssl.SSLCertVerificationError()
    assert "SSLCertVerificationError" in str(failure(error, 0.25, sent=False))


async def test_what_redis_refuses_with_is_unavailable_and_passes(redis_server: RedisServer) -> None:
    async with (
        Relay(redis_server.socket) as relay,
        create_limiter("redis", redis_url=relay.url, rules=[MANY], deadline=5) as relayed,
    ):
        await relayed.check("user")
        for answer in (
            b"-BUSY x\r\n",
            b"-MISCONF x\r\n",
            b"-NOREPLICAS x\r\n",
            b"-OOM x\r\n",
            b"-READONLY x\r\n",
            b"-LOADING x\r\n",
            b"-MOVED 1 a:1\r\n",
            b"-CLUSTERDOWN x\r\n",
            b"-NOPERM x\r\n",
            b"-MASTERDOWN x\r\n",
            b"-TRYAGAIN x\r\n",
            b"-ERR x\r\n",
        ):
            relay.tamper = lambda reply, answer=answer: answer if reply.startswith(b"*5") else reply  # type: ignore[misc]  # the default binds the loop's value
            with pytest.raises(StorageUnavailable) as unavailable:
                await relayed.check("user")
            assert isinstance(unavailable.value.__cause__, redis.RedisError)
            relay.tamper = lambda reply: reply
            await healed(relayed)


async def test_a_script_error_is_a_protocol_error_and_the_connection_goes_on(
    redis_server: RedisServer, redis_client: redis.Redis
) -> None:
    async with create_limiter("redis", redis_url=redis_server.url, rules=[MANY], deadline=5) as limiter:
        await limiter.check("user")
        [key] = redis_client.keys("*:=user")
        redis_client.set(key, "2;of a later version")
        with pytest.raises(StorageProtocolError, match="can't be read"):
            await limiter.check("user")
        assert redis_client.get(key) == b"2;of a later version"
        assert (await limiter.check("another")).allowed


PRIVATE = "private-key"


@pytest.mark.parametrize("unknown", ["AUTH", "EVALSHA", None])
async def test_no_error_holds_the_key_or_the_password(redis_server: RedisServer, unknown: str | None) -> None:
    """A server that doesn't know a command quotes its arguments: those of AUTH are the password, those of EVALSHA the keys."""
    with ExitStack() as stack:
        if unknown is None:
            urls = ["redis://:pa55word@127.0.0.1:1", f"redis://:pa55word@127.0.0.1:{redis_server.port}"]
        else:
            port = stack.enter_context(RedisServer("--rename-command", unknown, "")).port
            urls = [f"redis://user:pa55word@127.0.0.1:{port}" if unknown == "AUTH" else f"redis://127.0.0.1:{port}"]
        for url in urls:
            await refused_without_secrets(url)


async def refused_without_secrets(url: str) -> None:
    async with create_limiter("redis", redis_url=url, rules=[MANY], deadline=1) as limiter:
        with pytest.raises(StorageError) as raised:
            await limiter.check(PRIVATE)  # by name: a traceback shows this line
    told = "".join(traceback.format_exception(raised.value))
    assert "pa55word" not in told
    assert PRIVATE not in told


# Configurations


class Nobody:
    """Not a client."""


@pytest.mark.parametrize("client", [None, "redis://localhost", Nobody(), Nobody, 5])
def test_a_client_of_the_wrong_type(client: Any) -> None:
    with pytest.raises(ConfigurationError, match="client of redis-py"):
        RedisStorage(client)


async def test_a_cluster_is_not_supported_yet() -> None:
    with pytest.raises(ConfigurationError, match="not supported yet"):
        RedisStorage(redis.asyncio.RedisCluster(host="127.0.0.1", port=1))


@pytest.mark.parametrize("kind", [redis.sentinel.Sentinel, redis.asyncio.sentinel.Sentinel])
def test_a_replica_of_a_sentinel_is_refused(kind: Any) -> None:
    with pytest.raises(ConfigurationError, match="master_for"):
        RedisStorage(kind([("127.0.0.1", 1)]).slave_for("mymaster"))
    with pytest.raises(ConfigurationError, match="client of redis-py"):
        RedisStorage(kind([("127.0.0.1", 1)]))


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("deadline", (0, -1, 0.001, 61, float("nan"), float("inf"), True, "0.25", None)),
        ("prefix", ("", "a b", "a{b", "a}b", "x" * 65, 5, None, b"bytes", "\ud800", "tail\n")),
        ("tags", (0, -1, 16_385, 1.5, True, "64")),
        ("max_waiting", (0, -1, 1_000_001, 1.5, True, "1")),
    ],
)
def test_an_option_out_of_range(option: str, values: tuple[Any, ...]) -> None:
    for value in values:
        with pytest.raises(ConfigurationError, match=option):
            RedisStorage(redis.Redis(), **{option: value})


@pytest.mark.parametrize(
    "url",
    [
        "",
        "localhost:6379",
        "http://:pa55word@localhost",
        "pa55word",
        "redis://:pa55word/x@localhost:6379",
        "redis://:pa55word@localhost:pa55word",
        "redis://[pa55word",
        "redis://localhost?socket_timeout=pa55word",
        None,
        b"redis://localhost",
        5,
    ],
)
def test_a_bad_url_is_refused_without_repeating_it(url: Any) -> None:
    with pytest.raises(ConfigurationError, match="redis_url") as refused:
        RedisStorage.from_url(url)
    assert "pa55word" not in str(refused.value)
    assert refused.value.__cause__ is None
    assert refused.value.__context__ is None


async def test_what_only_synchronous_connections_can_do_is_not_silently_left_out() -> None:
    with pytest.raises(ConfigurationError, match="redis_connect_func"):
        RedisStorage(redis.Redis(redis_connect_func=print))
    client = redis.Redis(ssl=True)
    client.connection_pool.connection_kwargs["ssl_validate_ocsp"] = True
    with pytest.raises(ConfigurationError, match="ssl_validate_ocsp"):
        RedisStorage(client)


def test_nothing_connects_before_the_first_check() -> None:
    limiter = RateThrottleCore(RedisStorage(redis.Redis(port=1)), rules=[MANY])
    assert "RedisStorage" in repr(limiter)
