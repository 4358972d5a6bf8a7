"""What redis-py, the system and Redis itself say when something is wrong, in our own errors.

A message names kinds and what to do, never what was sent, to which key, or with which password.
"""

from __future__ import annotations

import re
import ssl

import redis
from redis import exceptions as theirs

from ratethrottle.errors import StorageError, StorageProtocolError, StorageRefused, StorageTimeout, StorageUnavailable

MISUNDERSTOOD = "Redis and this process don't understand each other; is it Redis that listens there?"
# What redis-py says to any answer to AUTH but OK and an error: that refuses nobody, it is nonsense.
NOT_OK = "Invalid Username or Password"

# The first that matches decides, so what redis-py derives from something else stands before it.
WORDS: tuple[tuple[tuple[str, ...], type[StorageUnavailable | StorageProtocolError], str], ...] = (
    (
        ("AuthenticationError", "AuthenticationWrongNumberOfArgsError", "AuthorizationError"),
        StorageRefused,
        "Redis refused the user or the password; check the client's credentials",
    ),
    # Not a refusal: who gives out the credentials may be away for a while.
    (("ExternalAuthProviderError",), StorageUnavailable, "the client's credential provider failed; is its service up?"),
    (
        ("NoPermissionError",),
        StorageRefused,
        "the Redis user may not run our scripts; allow it EVAL, EVALSHA, SCRIPT LOAD, INFO and our prefix",
    ),
    (("MasterDownError",), StorageUnavailable, "Redis is a replica without its master; connect to the master"),
    (
        ("ClusterError", "AskError", "TryAgainError", "ClusterCrossSlotError", "RedisClusterException", "IncorrectPolicyType"),
        StorageRefused,
        "Redis is part of a cluster, and clusters are not supported yet; connect to a single server",
    ),
    (("ReadOnlyError",), StorageUnavailable, "Redis is a read-only replica; connect to the master, or through its sentinels"),
    (("BusyLoadingError",), StorageUnavailable, "Redis is still loading its data"),
    (("OutOfMemoryError",), StorageUnavailable, "Redis is out of memory, by its maxmemory"),
    (
        ("InvalidResponse", "DataError"),
        StorageProtocolError,
        MISUNDERSTOOD,
    ),
)
# The first word of an error reply. redis-py takes it away where it has a class for it.
CODE = re.compile(r"[A-Z]{2,20}\b")
OURS = re.compile(r"RATETHROTTLE ([a-z0-9 ,]+)")

# How a connection in the midst of TLS is lost.
LOST_IN_TLS = (ssl.SSLEOFError, ssl.SSLZeroReturnError, ssl.SSLSyscallError)
# What OpenSSL, by its version, makes of an answer in plain text.
NOT_TLS = ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "HTTP_REQUEST", "UNKNOWN_PROTOCOL")

# What redis-py makes of the first word of an error reply. The rest is a plain ResponseError.
CODES: dict[str, type[redis.RedisError]] = {
    "ASK": redis.exceptions.ClusterError,
    "CLUSTERDOWN": redis.exceptions.ClusterError,
    "CROSSSLOT": redis.exceptions.ClusterError,
    "LOADING": redis.exceptions.BusyLoadingError,
    "MASTERDOWN": redis.exceptions.MasterDownError,
    "MOVED": redis.exceptions.ClusterError,
    "NOAUTH": redis.exceptions.AuthenticationError,
    "NOPERM": redis.exceptions.NoPermissionError,
    "OOM": redis.exceptions.OutOfMemoryError,
    "READONLY": redis.exceptions.ReadOnlyError,
    "TRYAGAIN": redis.exceptions.TryAgainError,
    "WRONGPASS": redis.exceptions.AuthenticationError,
}


def refusal(text: str) -> redis.RedisError:
    """Make what redis-py would make of an error reply, without its `-`."""
    code = CODE.match(text)
    return CODES.get(code[0] if code else "", redis.ResponseError)(text)


def failure(error: BaseException, deadline_s: float, *, sent: bool) -> StorageError:
    """Make a new error of ours, with `error` as its cause, for one call that had (or had not) been sent."""
    found = _failure(error, deadline_s, sent)
    found.__cause__ = scrubbed(error)
    return found


def scrubbed(error: BaseException) -> BaseException:
    """Give back the error, or for what a server said a stand-in of its class's name and code: Redis quotes our arguments."""
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, redis.ResponseError):
            code = CODE.match(str(inner))
            return redis.ResponseError(f"{type(inner).__name__}{f' {code[0]}' if code else ''}")
        inner = inner.__cause__ or inner.__context__
    return error


def _failure(error: BaseException, deadline_s: float, sent: bool) -> StorageError:
    if isinstance(error, StorageError):
        return type(error)(*error.args)
    if isinstance(error, (TimeoutError, redis.TimeoutError)):
        return StorageTimeout(deadline_s) if sent else no_connection(deadline_s)
    if isinstance(error, theirs.AuthenticationError) and str(error) == NOT_OK:
        return StorageProtocolError(MISUNDERSTOOD)
    for names, ours, words in WORDS:
        # By name, since some are younger than the oldest redis-py that we run on.
        if any(kind.__name__ in names and kind.__module__ == theirs.__name__ for kind in type(error).__mro__):
            return ours(words)
    if isinstance(error, redis.ResponseError):
        return _refused(error)
    return _lost(_cause(error), sent)


def _lost(cause: BaseException, sent: bool) -> StorageUnavailable:
    kind = type(cause).__name__
    # What ends a connection that was in use is a loss, whatever TLS calls it.
    if sent:
        return StorageUnavailable(f"the connection to Redis was lost ({kind}); the check may have been counted")
    if isinstance(cause, ssl.SSLError) and not isinstance(cause, LOST_IN_TLS):
        return StorageRefused(_tls_words(cause))
    # A server that is just going down does the same as one that hears a client without TLS, so this is no refusal.
    if isinstance(cause, ConnectionResetError):
        return StorageUnavailable(
            f"Redis can't be reached ({kind}); is it up, is the address right, and does its port want TLS (rediss://)?"
        )
    return StorageUnavailable(f"Redis can't be reached ({kind}); is it up, and is the address right?")


def lost_again(wait_s: float) -> StorageUnavailable:
    """Make the error of a call that can't wait until connections are tried again."""
    return StorageUnavailable(f"the connection to Redis was lost twice in a second; it is tried again in {wait_s:.2g} s")


def no_connection(deadline_s: float) -> StorageUnavailable:
    """Make the error of a call whose deadline passed before there was a connection."""
    return StorageUnavailable(f"no connection to Redis within {deadline_s} s; is it up, and is the address right?")


def was_reset(error: BaseException) -> bool:
    """Whether the other side has dropped a connection without a word."""
    return isinstance(_cause(error), (ConnectionResetError, BrokenPipeError))


def _refused(error: redis.ResponseError) -> StorageError:
    text = str(error)
    own = OURS.search(text)
    if own:
        return StorageProtocolError(f"the script refused the call: {own[1].strip()}")
    if "user_script" in text or "running script" in text:
        return StorageProtocolError("the script failed on the server; is a key of ours written by somebody else?")
    if "unknown command" in text:
        return StorageRefused(
            "Redis doesn't know a command that we need; were AUTH, EVAL, EVALSHA or SCRIPT renamed or disabled?"
        )
    if "DB index" in text:
        return StorageRefused("Redis has no database of this number; check the end of the URL, or the client's db")
    code = CODE.match(text)
    return StorageUnavailable(f"Redis refuses to serve us ({code[0] if code else type(error).__name__})")


def _cause(error: BaseException) -> BaseException:
    """Find the first cause that the system knows: redis-py calls a bad certificate and a closed port by the same name."""
    found = error
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, OSError):
            found = inner
        inner = inner.__cause__ or inner.__context__
    return found


def _tls_words(error: ssl.SSLError) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        why = getattr(error, "verify_message", "") or type(error).__name__
        return f"the certificate of Redis is not accepted ({why}); check it, and the client's ssl_ca_certs and host name"
    if error.reason in NOT_TLS:
        return "what listens there doesn't speak TLS; connect to the TLS port, or without TLS (redis://)"
    why = error.reason or type(error).__name__
    return f"Redis and this process can't agree on TLS ({why}); check versions, and whether Redis asks for a client certificate"
