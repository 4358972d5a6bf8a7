"""What a URL or the options about sentinels become, and how a bad one is refused. No server is needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import redis.asyncio

from ratethrottle import RedisStorage, create_limiter
from ratethrottle.errors import ConfigurationError
from ratethrottle.storage.redis.settings import Settings
from ratethrottle.storage.redis.urls import client_of
from tests.kit.certificates import make_certificates


def settings(url: str | None, **more: Any) -> Settings:
    return Settings(client_of(url, **more), 0.25)


def where(url: str | None, **more: Any) -> list[tuple[str, int]]:
    """The addresses of the sentinels."""
    return [(one._kwargs["host"], one._kwargs["port"]) for one in settings(url, **more).sentinels]


def test_a_sentinel_url_says_it_all() -> None:
    made = settings(
        "redis+sentinel://service:p%40ss%2C@one:1,two/my.master-1/3?sentinel_username=watch&sentinel_password=w%2Fp&client_name=us"
    )
    assert made.master_name == "my.master-1"
    assert {name: made._kwargs[name] for name in ("username", "password", "db", "client_name")} == {
        "username": "service",
        "password": "p@ss,",
        "db": 3,
        "client_name": "us",
    }
    assert made._class is redis.asyncio.Connection
    assert "sentinel_password" not in made._kwargs
    assert [one._kwargs["port"] for one in made.sentinels] == [1, 26379]
    for one in made.sentinels:
        assert (one._kwargs["username"], one._kwargs["password"]) == ("watch", "w/p")
        assert one._kwargs.get("db", 0) == 0


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("valkey://service:p%40ss@one:7/3?client_name=us", "redis://service:p%40ss@one:7/3?client_name=us"),
        ("valkeys://:secret@one/2", "rediss://:secret@one/2"),
        ("valkey+sentinel://:secret@one:1,two/m/3", "redis+sentinel://:secret@one:1,two/m/3"),
        ("valkeys+sentinel://one/m", "rediss+sentinel://one/m"),
    ],
)
def test_valkeys_own_schemes_say_the_same(theirs: str, ours: str) -> None:
    for one, other in zip(
        (settings(theirs), *settings(theirs).sentinels), (settings(ours), *settings(ours).sentinels), strict=True
    ):
        assert one._class is other._class
        names = one._kwargs.keys() - {"retry"}
        assert {name: one._kwargs[name] for name in names} == {name: other._kwargs[name] for name in names}
    made = settings("redis:///0", sentinels=["one"], master_name="m")._kwargs
    assert settings("valkey:///0", sentinels=["one"], master_name="m")._kwargs.keys() == made.keys()


def test_without_credentials_of_their_own_sentinels_get_none() -> None:
    [sentinel] = settings("redis+sentinel://service:secret@one/mymaster").sentinels
    assert not sentinel._kwargs.get("username")
    assert not sentinel._kwargs.get("password")


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    return tuple(make_certificates(tmp_path_factory.mktemp("tls")))


def test_with_tls_sentinels_and_nodes_are_both_secured(certificates: tuple[Path, ...]) -> None:
    made = settings(f"rediss+sentinel://:secret@one:1/mymaster?ssl_ca_certs={certificates[2]}&ssl_check_hostname=false")
    for one in (made, *made.sentinels):
        assert one._class is redis.asyncio.SSLConnection
        assert one._kwargs["ssl_ca_certs"] == str(certificates[2])
        assert one._kwargs["ssl_check_hostname"] is False


@pytest.mark.parametrize(
    ("hosts", "addresses"),
    [
        ("one", [("one", 26379)]),
        ("10.0.0.1:7,ten.example.org:65535", [("10.0.0.1", 7), ("ten.example.org", 65535)]),
        ("[::1]:5,[fe80::1%25eth0],[::ffff:1.2.3.4]:6", None),
        ("[::1]:5,[::2]", [("::1", 5), ("::2", 26379)]),
        ("one:1,[::1]:5", [("one", 1), ("::1", 5)]),
    ],
)
def test_addresses_of_sentinels(hosts: str, addresses: list[tuple[str, int]] | None) -> None:
    found = where(f"redis+sentinel://{hosts}/mymaster")
    assert found == addresses or (addresses is None and len(found) == 3)
    assert where(None, sentinels=hosts.split(","), master_name="mymaster") == found
    assert where(None, sentinels=found, master_name="mymaster") == found


def test_with_the_options_the_url_has_no_host() -> None:
    made = settings("rediss://service:secret@/2?sentinel_password=s3", sentinels=["one:1", ("two", 2)], master_name="mymaster")
    assert (made._class, made._kwargs["db"], made._kwargs["password"]) == (redis.asyncio.SSLConnection, 2, "secret")
    assert [(one._class, one._kwargs["password"]) for one in made.sentinels] == [(redis.asyncio.SSLConnection, "s3")] * 2


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("redis+sentinel://", "names no master"),
        ("redis+sentinel://pa55word:1", "names no master"),
        ("redis+sentinel://a:1/", "names no master"),
        ("redis+sentinel://a:1/m/pa55word", "database that is no number"),
        ("redis+sentinel://a:1/pa55word!", "names no master"),
        ("redis+sentinel://:pa55word/x@a:1/m", "names no master"),
        ("redis+sentinel:///m", "IPv6 addresses in brackets"),
        ("redis+sentinel://:pa55word@/m", "IPv6 addresses in brackets"),
        ("redis+sentinel://a:1,,b:1/m", "IPv6 addresses in brackets"),
        ("redis+sentinel://a:0/m", "ports from 1 to 65535"),
        ("redis+sentinel://a:65536/m", "ports from 1 to 65535"),
        ("redis+sentinel://a:pa55word/m", "ports from 1 to 65535"),
        ("redis+sentinel://::1:5/m", "IPv6 addresses in brackets"),
        ("redis+sentinel://[pa55word/m", "IPv6 addresses in brackets"),
        ("redis+sentinel://a:1,b:1,a:1/m", "named twice"),
        ("redis+sentinel://" + ",".join(f"a{n}" for n in range(33)) + "/m", "1 to 32"),
        ("redis+sentinel://a:1/m?sentinel_pasword=pa55word", "did you mean 'sentinel_password'"),
        ("redis+sentinel://a:1/m?ssl_ca_certs=x", "belong to rediss"),
        ("redis+sentinel://a:1/m?db=pa55word", "has db with a value of the wrong kind; it is a number"),
        ("valkey+sentinel://a:1/m?socket_timeout=pa55word", "has socket_timeout with a value of the wrong kind"),
        ("rediss://a?ssl_min_version=TLSv1.2", "it is 771 for TLS 1.2, or 772 for TLS 1.3"),
        ("rediss://a?ssl_check_hostname=pa55word", "ssl_check_hostname with a value of the wrong kind; it is true or false"),
        ("rediss+sentinel://a:1/m?ssl_check_hostname=off", "it is true or false"),
        ("valkeys://a?ssl_include_verify_flags=pa55word", "names of ssl.VerifyFlags"),
        ("valkey://localhost/pa55word", "no valid URL"),
        ("valkeyss://localhost", "valkey and valkeys stand for redis and rediss"),
        ("redis+sentinel://a:1/m?host=pa55word", "doesn't exist"),
        ("rediss+sentinel://a:1/m?ssl_ca_cert=x", "did you mean 'ssl_ca_certs'"),
        ("redis+sentinels://a:1/m", "must begin with"),
        ("redis://localhost?sockettimeout=1", "did you mean 'socket_timeout'"),
        ("redis://localhost?pa55word=1", "did you mean 'password'"),
        ("redis://localhost?pa55word", "there are client_name"),
        ("redis://localhost?db=1&db=2", "twice"),
        ("redis://localhost?ssl_ca_certs=x", "belong to rediss"),
        ("redis://localhost?sentinel_password=pa55word", "belongs to redis\\+sentinel"),
        ("redis://localhost/pa55word", "no valid URL"),
        ("redis://localhost/1/2", "no valid URL"),
        ("unix:///redis.sock?dbb=1", "did you mean 'db'"),
        ("redis:localhost", "must begin with"),
    ],
)
def test_a_bad_url_is_refused_in_words_that_hold_no_part_of_it(url: str, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words) as refused:
        RedisStorage.from_url(url)
    assert "pa55word" not in str(refused.value)
    assert refused.value.__cause__ is None
    assert refused.value.__context__ is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sentinels": ["a:1"]}, "belong together"),
        ({"master_name": "m"}, "belong together"),
        ({"sentinels": "a:1", "master_name": "m"}, "is a list"),
        ({"sentinels": {"a": 1}, "master_name": "m"}, "is a list"),
        ({"sentinels": [], "master_name": "m"}, "1 to 32"),
        ({"sentinels": [("a", "1")], "master_name": "m"}, "1 to 32"),
        ({"sentinels": [("a", True)], "master_name": "m"}, "1 to 32"),
        ({"sentinels": [("a", 0)], "master_name": "m"}, "1 to 32"),
        ({"sentinels": [("a b", 1)], "master_name": "m"}, "1 to 32"),
        ({"sentinels": [("a", 1), "a:1"], "master_name": "m"}, "named twice"),
        ({"sentinels": [5], "master_name": "m"}, "1 to 32"),
        ({"sentinels": ["a:1"], "master_name": ""}, "letters, digits"),
        ({"sentinels": ["a:1"], "master_name": "a/1"}, "letters, digits"),
        ({"sentinels": ["a:1"], "master_name": 5}, "letters, digits"),
        ({"sentinels": ["a:1"], "master_name": "m", "redis_url": "redis://:pa55word@a:1/0"}, "names no host"),
        ({"sentinels": ["a:1"], "master_name": "m", "redis_url": "redis://pa55word"}, "names no host"),
        ({"sentinels": ["a:1"], "master_name": "m", "redis_url": "unix:///pa55word"}, "names no host"),
        ({"sentinels": ["a:1"], "master_name": "m", "redis_url": "redis+sentinel://pa55word/m"}, "names no host"),
        ({"sentinel": ["a:1"]}, "did you mean 'sentinels'"),
        ({}, "needs redis_url"),
    ],
)
def test_bad_options_about_sentinels(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words) as refused:
        create_limiter("redis", **options)
    assert "pa55word" not in str(refused.value)
