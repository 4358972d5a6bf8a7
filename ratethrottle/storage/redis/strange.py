"""What can't be used, said at construction: clients of other libraries, and TLS settings that can't work.

No message repeats a value of the client's: a path or a password may stand where another was meant.
"""

from __future__ import annotations

import functools
import ssl
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ratethrottle.errors import ConfigurationError

WANTED = "RedisStorage takes a client of redis-py (redis.asyncio.Redis, redis.Redis or a Sentinel's master_for)"
OTHERS = {
    "valkey": "valkey-py",
    "coredis": "coredis",
    "aioredis": "aioredis",
    "glide": "valkey-glide",
    "glide_shared": "valkey-glide",
}
REQUIREMENTS = ("none", "optional", "required")


def strange(client: Any) -> str:
    """Say what was passed instead of a client of redis-py, and what to pass."""
    is_class = isinstance(client, type)
    kind: type = client if is_class else type(client)
    name = kind.__name__
    library = kind.__module__.partition(".")[0]
    if isinstance(client, str):
        return f"{WANTED}, not a str; for a URL there is RedisStorage.from_url(url)"
    if library in OTHERS:
        what = "the class" if is_class else "a pool," if "Pool" in name else "a"
        return (
            f"{WANTED}, not {what} {name} of {OTHERS[library]}; redis-py speaks to Valkey and Redis alike: pass "
            "RedisStorage.from_url(url), which takes valkey:// and valkeys:// too, or redis.asyncio.Redis with the same host and port"
        )
    hint = ""
    if "Cluster" in name:
        hint = ": clusters are not supported yet"
    elif library == "redis" and name.endswith("Pool"):
        hint = "; pass redis.asyncio.Redis(connection_pool=pool)"
    elif library == "redis" and name == "Sentinel":
        hint = '; pass sentinel.master_for("name of the master")'
    elif library == "redis" and is_class:
        hint = f": call it, as in {name}(host=...)"
    return f"{WANTED}, not {'the class' if is_class else 'a'} {name}{hint}"


def check_tls(settings: Mapping[str, Any]) -> None:
    """Try each of the TLS settings on its own. Raises ConfigurationError that names the one that can't work."""
    _check_requirement(settings.get("ssl_cert_reqs", "required"))
    if not isinstance(settings.get("ssl_check_hostname", True), (bool, int, type(None))):
        raise ConfigurationError("ssl_check_hostname is True or False")
    for name in ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile"):
        if settings.get(name) is not None:
            _readable(name, settings[name])
    if settings.get("ssl_ca_path") is not None and not Path(settings["ssl_ca_path"]).is_dir():
        raise ConfigurationError("ssl_ca_path is no directory; it is one of certificates, named by their hashes")
    certificate, key = settings.get("ssl_certfile"), settings.get("ssl_keyfile")
    if key is not None and certificate is None:
        raise ConfigurationError("ssl_keyfile is given without ssl_certfile; pass the certificate that the key is of")
    scratch = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if certificate is not None:
        _tried(
            # An empty password: with none, OpenSSL would ask for it at the terminal.
            lambda: scratch.load_cert_chain(certificate, key, settings.get("ssl_password") or ""),
            "ssl_certfile and ssl_keyfile can't be used together",
            "they are a certificate and its own key in PEM form, and ssl_password is the key's if it is encrypted",
        )
    for name, (use, hint) in USES.items():
        value = settings.get(name)
        if value is not None:
            _tried(functools.partial(use, scratch, value), f"{name} can't be used", hint)


def _check_requirement(required: object) -> None:
    words = 'ssl_cert_reqs is "none", "optional" or "required"'
    if isinstance(required, str) and required not in REQUIREMENTS:
        near = required.lower().removeprefix("cert_")
        hint = f'; write "{near}"' if near in REQUIREMENTS else ""
        raise ConfigurationError(words + hint)
    if required is not None and not isinstance(required, (str, ssl.VerifyMode)):
        raise ConfigurationError(f"{words}, or one of ssl.VerifyMode")


def _check_flags(_: ssl.SSLContext, flags: Any) -> None:
    for flag in flags:
        ssl.VerifyFlags(flag)


def _limit_versions(context: ssl.SSLContext, version: Any) -> None:
    context.minimum_version = version


# How each setting is used, and what it is.
USES: Mapping[str, tuple[Callable[[ssl.SSLContext, Any], object], str]] = {
    "ssl_ca_certs": (
        lambda context, value: context.load_verify_locations(cafile=value),
        "it is a file of certificates in PEM form",
    ),
    "ssl_ca_data": (
        lambda context, value: context.load_verify_locations(cadata=value),
        "it is certificates in PEM form, as text",
    ),
    "ssl_ciphers": (ssl.SSLContext.set_ciphers, "it is a list in OpenSSL's form"),
    "ssl_include_verify_flags": (_check_flags, "it is a list of ssl.VerifyFlags"),
    "ssl_exclude_verify_flags": (_check_flags, "it is a list of ssl.VerifyFlags"),
    "ssl_min_version": (
        _limit_versions,
        "it is one of ssl.TLSVersion, such as TLSv1_2; in a URL 771 is TLS 1.2, and 772 is TLS 1.3",
    ),
}


def _readable(name: str, path: Any) -> None:
    why = ""
    try:
        with Path(path).open("rb"):
            pass
    except (OSError, TypeError, ValueError) as error:
        why = (error.strerror if isinstance(error, OSError) else None) or type(error).__name__
    if why:
        raise ConfigurationError(f"{name} can't be read ({why}); check the path, as this process sees it")


def _tried(use: Callable[[], object], what: str, hint: str) -> None:
    why = ""
    try:
        use()
    except (OSError, TypeError, ValueError) as error:  # ssl.SSLError is an OSError
        why = getattr(error, "reason", None) or getattr(error, "strerror", None) or type(error).__name__
    if why:
        raise ConfigurationError(f"{what} ({why}); {hint}")
