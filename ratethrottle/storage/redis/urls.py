"""From a URL to a client of redis-py. Nothing connects here.

No message repeats a part of the URL, not even a parameter's name: in a malformed one the password may stand anywhere.
"""

from __future__ import annotations

import contextlib
import difflib
import re
from collections.abc import Iterable, Sequence
from typing import Any
from urllib.parse import parse_qsl, unquote, urlencode

import redis.asyncio
from redis.asyncio.connection import parse_url
from redis.asyncio.sentinel import Sentinel

from ratethrottle.errors import ConfigurationError
from ratethrottle.storage.redis.settings import Address

SENTINEL_SCHEMES = ("redis+sentinel", "rediss+sentinel")
# Valkey's own schemes say the same; redis-py knows those of Redis.
TWINS = {"valkey": "redis", "valkeys": "rediss", "valkey+sentinel": "redis+sentinel", "valkeys+sentinel": "rediss+sentinel"}
FORMS = {
    "redis": "redis://user:password@host:port/db",
    "rediss": "rediss://user:password@host:port/db",
    "unix": "unix://user:password@/path/to/redis.sock?db=0",
    "redis+sentinel": "redis+sentinel://user:password@host:port,host:port/master-name/db",
    "rediss+sentinel": "rediss+sentinel://user:password@host:port,host:port/master-name/db",
}
# What a URL for redis-py may say after its `?`. What isn't ours to obey (timeouts, retries) is allowed: URLs are shared with others.
PARAMETERS = frozenset(
    {
        "client_name",
        "db",
        "decode_responses",
        "encoding",
        "encoding_errors",
        "health_check_interval",
        "host",
        "legacy_responses",
        "lib_name",
        "lib_version",
        "max_connections",
        "password",
        "path",
        "port",
        "protocol",
        "retry_on_timeout",
        "socket_connect_timeout",
        "socket_keepalive",
        "socket_read_size",
        "socket_timeout",
        "timeout",
        "username",
    }
)
TLS_PARAMETERS = frozenset(
    {
        "ssl_ca_certs",
        "ssl_ca_data",
        "ssl_ca_path",
        "ssl_cert_reqs",
        "ssl_certfile",
        "ssl_check_hostname",
        "ssl_ciphers",
        "ssl_exclude_verify_flags",
        "ssl_include_verify_flags",
        "ssl_keyfile",
        "ssl_min_version",
        "ssl_password",
    }
)
SENTINEL_PARAMETERS = frozenset({"sentinel_username", "sentinel_password"})
KINDS = {
    "ssl_check_hostname": "true or false",
    "ssl_min_version": "771 for TLS 1.2, or 772 for TLS 1.3",
    "ssl_include_verify_flags": "names of ssl.VerifyFlags with commas between them",
    "ssl_exclude_verify_flags": "names of ssl.VerifyFlags with commas between them",
}
# Anything else is true to redis-py, "off" too.
FLAGS = frozenset({"", "0", "1", "f", "false", "n", "no", "on", "t", "true", "y", "yes"})
PATH = re.compile(r"(/\d{0,9})?\Z", re.ASCII)
MASTER_NAME = re.compile(r"[A-Za-z0-9._-]{1,255}\Z")
SENTINEL_PATH = re.compile(r"/([A-Za-z0-9._-]{1,255})(?:/(\d{0,9}))?\Z", re.ASCII)
# A name, an IPv4 address, or an IPv6 one in brackets or not (a port after it needs the brackets), with a zone perhaps.
HOST_AND_PORT = re.compile(r"(?:\[([0-9A-Fa-f:.]+(?:%[\w.-]+)?)\]|([\w.-]+))(?::(\d{1,5}))?\Z", re.ASCII)
HOST = re.compile(r"[\w.-]+\Z|[0-9A-Fa-f.]*:[0-9A-Fa-f:.]+(?:%[\w.-]+)?\Z", re.ASCII)
SENTINEL_PORT = 26379
SENTINELS_MAX = 32


def client_of(url: object, sentinels: object = None, master_name: object = None) -> Any:
    """Make the client that `url` describes; with `sentinels`, of the master that they name. Raises ConfigurationError."""
    if sentinels is not None or master_name is not None:
        return _client_by_options(url, sentinels, master_name)
    scheme, rest = _split(url)
    if scheme in SENTINEL_SCHEMES:
        return _client_by_sentinel_url(scheme, rest)
    _, path, query = _parts(rest)
    _check_values(_parameters(scheme, query))
    client = None
    if scheme == "unix" or PATH.match(path):
        with contextlib.suppress(ValueError, TypeError):  # their messages quote the URL
            client = redis.asyncio.Redis.from_url(f"{scheme}://{rest}")
    if client is None:
        raise ConfigurationError(f"redis_url is no valid URL; write {FORMS[scheme]}, with anything odd in a password as %xx")
    return client


def _split(url: object) -> tuple[str, str]:
    scheme, found, rest = url.partition("://") if isinstance(url, str) else ("", "", "")
    scheme = TWINS.get(scheme, scheme)
    if not found or scheme not in FORMS:
        raise ConfigurationError(
            "redis_url must begin with redis://, rediss:// or unix://, or with redis+sentinel:// or rediss+sentinel:// "
            "(valkey and valkeys stand for redis and rediss)"
        )
    return scheme, rest


def _parts(rest: str) -> tuple[str, str, str]:
    """Split what stands after the scheme into authority, path and query."""
    before, _, query = rest.partition("?")
    authority, slash, path = before.partition("/")
    return authority, slash + path, query


def _parameters(scheme: str, query: str) -> dict[str, str]:
    """Read the query. Raises ConfigurationError for a parameter that would otherwise be left out in silence."""
    tls, sentinel = scheme.startswith("rediss"), scheme in SENTINEL_SCHEMES
    known = PARAMETERS | (TLS_PARAMETERS if tls else frozenset()) | (SENTINEL_PARAMETERS if sentinel else frozenset())
    if sentinel:
        known -= {"host", "path", "port"}
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=True) if query else []
    except ValueError:
        pairs = [("", "")]
    for name, _ in pairs:
        if name in known:
            continue
        if name in TLS_PARAMETERS:
            raise ConfigurationError("redis_url has a parameter ssl_...; those belong to rediss:// and rediss+sentinel://")
        if name in SENTINEL_PARAMETERS:
            raise ConfigurationError(f"redis_url has {name}, which belongs to redis+sentinel:// and rediss+sentinel://")
        near = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(sorted(known))}"
        raise ConfigurationError(f"redis_url has a parameter after its ? that doesn't exist; {hint}")
    if len({name for name, _ in pairs}) < len(pairs):
        raise ConfigurationError("redis_url has a parameter twice")
    return dict(pairs)


def _check_values(parameters: dict[str, str]) -> None:
    """Raise ConfigurationError for a value that redis-py can't read; it names the parameter."""
    for name, value in parameters.items():
        read = False
        with contextlib.suppress(ValueError):  # its message may quote the value
            parse_url(f"redis://localhost?{urlencode({name: value})}")
            read = name != "ssl_check_hostname" or value.lower() in FLAGS
        if not read:
            raise ConfigurationError(f"redis_url has {name} with a value of the wrong kind; it is {KINDS.get(name, 'a number')}")


def _client_by_sentinel_url(scheme: str, rest: str) -> Any:
    authority, path, query = _parts(rest)
    user, _, hosts = authority.rpartition("@")
    named = SENTINEL_PATH.match(unquote(path))
    if not named:
        raise ConfigurationError(
            f"redis_url names no master, or a database that is no number; write {FORMS[scheme]}, "
            "with anything odd in a password as %xx"
        )
    addresses = addresses_of(hosts.split(","))
    return _sentinel_client(scheme, user, query, named[2] or "", sentinels=addresses, master_name=named[1])


def _client_by_options(url: object, sentinels: object, master_name: object) -> Any:
    """Make a client of what the sentinels name; `url` may say how to reach it, without a host."""
    if sentinels is None or master_name is None:
        raise ConfigurationError("sentinels and master_name belong together; pass both")
    if isinstance(sentinels, str) or not isinstance(sentinels, Sequence):
        raise ConfigurationError('sentinels is a list of (host, port) or "host:port"')
    if not isinstance(master_name, str) or not MASTER_NAME.match(master_name):
        raise ConfigurationError("master_name is the name that the sentinels know the master by, of letters, digits and . _ -")
    addresses = addresses_of(sentinels)
    scheme, user, path, query = "redis", "", "", ""
    if url is not None:
        scheme, rest = _split(url)
        authority, path, query = _parts(rest)
        user, _, host = authority.rpartition("@")
        if scheme not in {"redis", "rediss"} or host or not PATH.match(path):
            raise ConfigurationError(
                "with sentinels, redis_url names no host: leave it out, or write redis://user:password@/db (rediss:// for TLS)"
            )
    return _sentinel_client(f"{scheme}+sentinel", user, query, path[1:], sentinels=addresses, master_name=master_name)


def _sentinel_client(scheme: str, user: str, query: str, db: str, *, sentinels: list[Address], master_name: str) -> Any:
    own = _parameters(scheme, query)
    _check_values(own)
    plain = scheme.partition("+")[0]
    try:
        # redis-py knows which of the parameters are numbers.
        theirs: dict[str, Any] = dict(parse_url(f"{plain}://localhost/{db}?{query}"))
    except ValueError:  # its message quotes the value
        theirs = {}
    if not theirs:
        raise ConfigurationError("redis_url has a parameter whose value is of the wrong kind")
    for name in ("connection_class", "host", *SENTINEL_PARAMETERS):
        theirs.pop(name, None)
    name, _, password = user.partition(":")
    theirs |= {key: unquote(value) for key, value in (("username", name), ("password", password)) if value}
    shared = {key: value for key, value in theirs.items() if key in TLS_PARAMETERS or key in {"socket_keepalive", "client_name"}}
    if plain == "rediss":
        shared["ssl"] = theirs["ssl"] = True
    for key in ("username", "password"):
        if own.get(f"sentinel_{key}"):
            shared[key] = own[f"sentinel_{key}"]
    manager = Sentinel(sentinels, sentinel_kwargs=shared, **theirs)  # type: ignore[no-untyped-call]  # redis-py leaves it untyped
    return manager.master_for(master_name)


def addresses_of(sentinels: Iterable[object]) -> list[Address]:
    """Read addresses of sentinels, (host, port) or "host:port". Raises ConfigurationError."""
    addresses = [address for address in map(_address, sentinels) if address is not None]
    if not addresses or len(addresses) < len(list(sentinels)) or len(addresses) > SENTINELS_MAX:
        raise ConfigurationError(
            f'sentinels are 1 to {SENTINELS_MAX} of "host:port" (or (host, port) as an option), with ports from 1 to 65535 and '
            "IPv6 addresses in brackets; in a URL they stand between @ and /, with commas between them"
        )
    if len(set(addresses)) < len(addresses):
        raise ConfigurationError("a sentinel is named twice; each has one voice")
    return addresses


def _address(given: object) -> Address | None:
    match given:
        case str():
            found = HOST_AND_PORT.match(given)
            if found is None:
                return None
            host, port = found[1] or found[2], int(found[3] or SENTINEL_PORT)
        case (str() as host, int() as port) if HOST.match(host) and not isinstance(port, bool):
            pass
        case _:
            return None
    return (host, port) if 1 <= port <= 65535 else None
