"""What redis-py, the system and Redis itself say when something is wrong, in our own errors.

A message names kinds and what to do, never what was sent, to which key, or with which password.
"""

from __future__ import annotations

import re
import ssl

import redis
from redis import exceptions as theirs

from ratethrottle.errors import StorageError, StorageProtocolError, StorageRefused, StorageTimeout, StorageUnavailable
from ratethrottle.storage.redis.replies import CODE, NO_ROOM, Meaning, meaning
from ratethrottle.storage.redis.words import READ_MAX, masked, one_line, system_words

MISUNDERSTOOD = "Redis and this process don't understand each other{}; is it Redis that listens there?"
# What came instead of a reply, as redis-py quotes it.
CAME = re.compile(r"""b(?:'(.*)|"(.*))""")
# What redis-py says to any answer to AUTH but OK and an error: that refuses nobody, it is nonsense.
NOT_OK = "Invalid Username or Password"

# What redis-py has a class for is an error reply of this first word, which it takes away. By name, since some are younger than the oldest
# redis-py that we run on. The first that matches decides, so what it derives from something else stands before that.
FIRST_WORDS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("AuthenticationError", "AuthenticationWrongNumberOfArgsError", "AuthorizationError"), "NOAUTH"),
    (("NoPermissionError",), "NOPERM"),
    (("MasterDownError",), "MASTERDOWN"),
    (("ClusterDownError",), "CLUSTERDOWN"),
    (("TryAgainError",), "TRYAGAIN"),
    (("ClusterError", "AskError", "ClusterCrossSlotError", "RedisClusterException", "IncorrectPolicyType"), "MOVED"),
    (("ReadOnlyError",), "READONLY"),
    (("BusyLoadingError",), "LOADING"),
    (("OutOfMemoryError",), "OOM"),
)
REPLIES = {"ResponseError", "ExternalAuthProviderError"}  # any other
# A module of these may raise while a connection is made. What comes from elsewhere is from the client's own callbacks.
CONNECTING = {"asyncio", "builtins", "fakeredis", "ratethrottle", "redis", "socket", "ssl", "uvloop"}

# How a connection in the midst of TLS is lost.
LOST_IN_TLS = (ssl.SSLEOFError, ssl.SSLZeroReturnError, ssl.SSLSyscallError)
# What OpenSSL, by its version, makes of an answer in plain text.
NOT_TLS = ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "HTTP_REQUEST", "UNKNOWN_PROTOCOL")


def refusal(text: str) -> redis.ResponseError:
    """Make an error of redis-py of an error reply, without its `-`."""
    return redis.ResponseError(text)


def meaning_of(error: BaseException) -> Meaning | None:
    """Say what the error reply means that an error of redis-py stands for; None if it stands for none."""
    names = {kind.__name__ for kind in type(error).__mro__ if kind.__module__ == theirs.__name__}
    text = str(error)
    for classes, code in FIRST_WORDS:
        if not names.isdisjoint(classes):
            return meaning(text, code)
    if not names.isdisjoint(REPLIES) or (names and NO_ROOM.search(text)):
        return meaning(text)
    return None


def guess_of(error: BaseException) -> Meaning | None:
    """Give what an error reply may mean, if nobody knows whether that can heal."""
    found = meaning_of(error)
    return found if found is not None and found.guessed else None


def is_refusal(error: BaseException) -> bool:
    """Whether it is an error reply that time won't mend."""
    reply = meaning_of(error)
    return reply is not None and reply.ours is StorageRefused


def failure(error: BaseException, deadline_s: float, *, sent: bool) -> StorageError:
    """Make a new error of ours, with `error` as its cause, for one call that had (or had not) been sent."""
    found = _failure(error, deadline_s, sent)
    found.__cause__ = scrubbed(error)
    return found


def said_by(error: BaseException) -> str:
    """Say in short what an error says, as a message of ours may repeat it."""
    if isinstance(error, StorageError):
        return one_line(str(error))
    if isinstance(error, (TimeoutError, redis.TimeoutError)):
        return "no answer in time"
    reply = meaning_of(error)
    return f'"{masked(str(error))}"' if reply is not None else system_words(_cause(error))


def scrubbed(error: BaseException) -> BaseException:
    """Give back the error, or for what a server said a stand-in of its class's name and code: Redis quotes our arguments."""
    inner: BaseException | None = error
    while inner is not None:
        if meaning_of(inner) is not None:
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
        return StorageProtocolError(MISUNDERSTOOD.format(""))
    if any(kind.__name__ in {"InvalidResponse", "DataError"} for kind in type(error).__mro__):
        came = CAME.search(str(error)[:READ_MAX])
        shown = masked((came[1] or came[2])[:-1].partition("\\r\\n")[0]) if came else ""
        return StorageProtocolError(MISUNDERSTOOD.format(f' ("{shown}")' if shown else ""))
    reply = meaning_of(error)
    if reply is not None:
        return reply.error
    return _lost(error, sent)


def _lost(error: BaseException, sent: bool) -> StorageUnavailable:
    cause = _cause(error)
    # What ends a connection that was in use is a loss, whatever TLS calls it.
    if sent:
        return StorageUnavailable(f"the connection to Redis was lost ({system_words(cause)}); the check may have been counted")
    if type(error).__module__.partition(".")[0] not in CONNECTING or not isinstance(error, (OSError, redis.RedisError, EOFError)):
        # Its own words may hold a token or a URL with one. They stand in the cause.
        return StorageUnavailable(
            "connecting to Redis failed: redis-py, or a callback of the client such as its credential provider, raised "
            f"{type(error).__name__}"
        )
    if isinstance(cause, ssl.SSLError) and not isinstance(cause, LOST_IN_TLS):
        return StorageRefused(_tls_words(cause))
    why = system_words(cause)
    # A server that is just going down does the same as one that hears a client without TLS, so this is no refusal.
    if isinstance(cause, ConnectionResetError):
        return StorageUnavailable(
            f"Redis can't be reached ({why}); is it up, is the address right, and does its port want TLS (rediss://)?"
        )
    if cause is error and isinstance(error, redis.ConnectionError):
        # By the other side, which said nothing of why.
        return StorageUnavailable(
            f"Redis can't be reached ({why}); is it up, and is there a proxy before it, which may close at a command that it doesn't know?"
        )
    return StorageUnavailable(f"Redis can't be reached ({why}); is it up, and is the address right?")


def lost_again(wait_s: float) -> StorageUnavailable:
    """Make the error of a call that can't wait until connections are tried again."""
    return StorageUnavailable(f"the connection to Redis was lost twice in a second; it is tried again in {wait_s:.2g} s")


def no_connection(deadline_s: float) -> StorageUnavailable:
    """Make the error of a call whose deadline passed before there was a connection."""
    # A Redis without TLS says nothing to a client with it.
    return StorageUnavailable(
        f"no connection to Redis within {deadline_s} s; is it up, is the address right, and do client and port agree on TLS "
        "(rediss://) or none (redis://)?"
    )


def was_reset(error: BaseException) -> bool:
    """Whether the other side has dropped a connection without a word."""
    return isinstance(_cause(error), (ConnectionResetError, BrokenPipeError))


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
        why = one_line(getattr(error, "verify_message", "")) or type(error).__name__
        return f"the certificate of Redis is not accepted ({why}); check it, and the client's ssl_ca_certs and host name"
    if error.reason in NOT_TLS:
        return "what listens there doesn't speak TLS; connect to the TLS port, or without TLS (redis://)"
    why = error.reason or type(error).__name__
    return f"Redis and this process can't agree on TLS ({why}); check versions, and whether Redis asks for a client certificate"
