"""What an operator has: refusals that say what to do, statistics, a start that waits for Redis, and a user of few rights."""

from __future__ import annotations

import asyncio
import re
import ssl
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import redis

from ratethrottle import (
    ConfigurationError,
    Decision,
    RateThrottleCore,
    RateThrottleRule,
    RedisStorage,
    Statistics,
    StorageRefused,
    StorageUnavailable,
    create_limiter,
    events,
)
from ratethrottle.storage.redis.failures import failure
from tests.kit.certificates import make_certificates
from tests.kit.recovery import healed, until
from tests.kit.relay import Relay
from tests.kit.servers import RedisServer

RULE = RateThrottleRule("r", 5, 60)
OPERATIONS = Path(__file__).parents[2] / "docs/operations.md"


async def refused_words(url: str) -> str:
    """Check once at a server that refuses us, and give what the error says."""
    async with create_limiter("redis", redis_url=url, rules=[RULE], deadline=5) as limiter:
        with pytest.raises(StorageRefused) as refused:
            await limiter.check("user")
    assert "pa55" not in str(refused.value)
    return str(refused.value)


# Refusals


@pytest.mark.parametrize("who", ["", ":pa55@", "nobody:pa55@"])
async def test_a_wrong_password_is_refused(who: str) -> None:
    with RedisServer(password="right") as server:
        assert "refused the user or the password" in await refused_words(f"redis://{who}127.0.0.1:{server.port}")


async def test_a_user_without_our_commands_or_without_our_keys_is_refused() -> None:
    with RedisServer() as server, server.client() as client:
        client.acl_setuser("few", enabled=True, passwords=["+pa55"], keys=["*"], commands=["+ping"])
        client.acl_setuser("other", enabled=True, passwords=["+pa55"], keys=["other:*"], categories=["+@all"])
        for name in ("few", "other"):
            assert "may not run our scripts" in await refused_words(f"redis://{name}:pa55@127.0.0.1:{server.port}")


async def test_a_database_that_is_not_there_is_refused(redis_server: RedisServer) -> None:
    assert "no database of this number" in await refused_words(f"redis://127.0.0.1:{redis_server.port}/99")


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    return make_certificates(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def secure(certificates: tuple[Path, ...]) -> Iterator[RedisServer]:
    with RedisServer(tls=certificates) as server:
        yield server


async def test_a_certificate_that_is_not_accepted_is_refused(secure: RedisServer) -> None:
    assert "not accepted (self-signed certificate in certificate chain)" in await refused_words(secure.url)
    elsewhere = secure.url.replace("127.0.0.1", "localhost")
    assert "not accepted (Hostname mismatch" in await refused_words(f"{elsewhere}?ssl_ca_certs={secure.tls[2]}")


async def test_a_server_that_asks_for_a_certificate_of_ours_refuses(certificates: tuple[Path, ...]) -> None:
    with RedisServer("--tls-auth-clients", "yes", tls=certificates) as server:
        words = await refused_words(f"rediss://127.0.0.1:{server.port}?ssl_ca_certs={server.tls[2]}")
    assert "whether Redis asks for a client certificate" in words


async def test_tls_to_a_server_that_answers_in_plain_text_is_refused() -> None:
    async def web(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        await reader.read()
        writer.close()

    async with await asyncio.start_server(web, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        assert "doesn't speak TLS" in await refused_words(f"rediss://127.0.0.1:{port}")


async def test_no_tls_to_a_port_that_wants_it_looks_like_an_outage_and_hints_at_it(secure: RedisServer) -> None:
    async with create_limiter(
        "redis", redis_url=f"redis://127.0.0.1:{secure.port}", rules=[RULE], deadline=5, on_outage="raise"
    ) as limiter:
        with pytest.raises(StorageUnavailable, match=r"want TLS \(rediss://\)") as unavailable:
            await limiter.check("user")
    assert type(unavailable.value) is StorageUnavailable


async def test_tls_to_a_port_without_it_looks_like_an_outage_and_hints_at_it(redis_server: RedisServer) -> None:
    url = f"rediss://127.0.0.1:{redis_server.port}"
    async with create_limiter("redis", redis_url=url, rules=[RULE], connect_timeout=0.5, on_outage="raise") as limiter:
        with pytest.raises(StorageUnavailable, match=r"no connection .* TLS \(rediss://\) or none \(redis://\)"):
            await limiter.check("user")


@pytest.mark.parametrize("kind", [ssl.SSLEOFError, ssl.SSLZeroReturnError, ssl.SSLSyscallError])
def test_a_connection_that_dies_in_the_midst_of_tls_is_no_refusal(kind: type[ssl.SSLError]) -> None:
    error = redis.ConnectionError("Error 8 connecting")
    error.__context__ = kind(8, "EOF occurred in violation of protocol")
    assert type(failure(error, 0.25, sent=False)) is StorageUnavailable


def test_what_ends_a_connection_in_use_is_no_refusal() -> None:
    assert type(failure(ssl.SSLError(1, "bad record mac"), 0.25, sent=True)) is StorageUnavailable


# Options


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("on_outage", "open", 'on_outage is \'open\'; it is "local", "allow", "deny" or "raise"'),
        ("on_outage", None, "on_outage is None"),
        ("on_outage", ["local"], "on_outage is "),
        ("on_overload", "local", 'on_overload is \'local\'; it is "deny" or "raise"'),
        ("expected_processes", 0, "whole number from 1 to 100,000"),
        ("expected_processes", 100_001, "whole number from 1 to 100,000"),
        ("expected_processes", True, "whole number from 1 to 100,000"),
        ("max_connections", 0, "whole number from 1 to 64"),
        ("max_connections", 65, "whole number from 1 to 64"),
    ],
)
def test_an_option_for_outages_out_of_range(option: str, value: Any, words: str) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(words)):
        create_limiter("redis", redis_url="redis://127.0.0.1", **{option: value})


def test_decisions_alone_may_not_need_more_connections_than_there_may_be() -> None:
    with pytest.raises(ConfigurationError, match="max_connections is 2; it is at least connections, which is 3"):
        RedisStorage.from_url("redis://127.0.0.1", connections=3, max_connections=2)


@pytest.mark.parametrize(("on_outage", "admitted"), [("local", 2), ("allow", 7), ("deny", 0), ("raise", None)])
async def test_each_policy_is_taken(on_outage: Any, admitted: int | None) -> None:
    storage = RedisStorage.from_url("redis://127.0.0.1:1", on_outage=on_outage, expected_processes=2, on_overload="raise")
    async with RateThrottleCore(storage, rules=[RULE]) as limiter:
        decided = await asyncio.gather(*(limiter.check("user") for _ in range(7)), return_exceptions=True)
    if admitted is None:
        assert {type(error) for error in decided} == {StorageUnavailable}
    else:
        assert sum(isinstance(decision, Decision) and decision.allowed for decision in decided) == admitted
        assert {isinstance(decision, Decision) and decision.source for decision in decided} == {"outage"}


def test_connections_are_opened_up_to_their_bound_and_no_further(redis_server: RedisServer) -> None:
    """A second loop, where the first has all that this process may have: what goes there is decided by policy."""
    limiter = create_limiter("redis", redis_url=redis_server.url, rules=[RULE], deadline=5, max_connections=1, on_outage="raise")

    async def first() -> None:
        await limiter.check("user")
        with pytest.raises(StorageUnavailable, match=r"its max_connections \(1\) to Redis already"):
            await asyncio.to_thread(asyncio.run, another())
        assert limiter.statistics().connections == 1

    async def another() -> None:
        await limiter.check("user")

    async def later() -> None:
        await healed(limiter)

    asyncio.run(first())
    asyncio.run(later())  # the first loop's has been closed with it
    asyncio.run(limiter.aclose())


# A start that waits


async def test_a_required_storage_that_is_not_there_is_an_error_at_the_start_and_can_be_tried_again() -> None:
    server = RedisServer()
    limiter = create_limiter(
        "redis", redis_url=f"redis://127.0.0.1:{server.port}", rules=[RULE], deadline=2, require_storage=True
    )
    try:
        with pytest.raises(StorageUnavailable, match="can't be reached"):
            async with limiter:
                pytest.fail("it was entered")
        server.start()
        async with limiter:
            assert limiter.statistics().connections == 1
            assert (await limiter.check("user")).remaining == 4
            with server.client() as client:
                assert [key.rpartition(b":")[2] for key in client.keys("*=*")] == [b"=user"]
    finally:
        server.close()


async def test_a_required_storage_that_says_nothing_is_an_error_once_an_attempt_has_had_its_time() -> None:
    with RedisServer() as server:
        server.pause()
        limiter = create_limiter("redis", redis_url=server.url, deadline=0.2, connect_timeout=0.7, require_storage=True)
        began_s = time.monotonic()
        async with asyncio.timeout(2):
            with pytest.raises(StorageUnavailable, match=r"within 0\.7 s"):
                await limiter.__aenter__()
        assert time.monotonic() - began_s >= 0.69
        server.resume()
        await limiter.aclose()


async def test_a_required_storage_that_refuses_says_so_at_the_start() -> None:
    with RedisServer(password="right") as server:
        limiter = create_limiter("redis", redis_url=f"redis://127.0.0.1:{server.port}", deadline=5, require_storage=True)
        with pytest.raises(StorageRefused):
            await limiter.__aenter__()
        await limiter.aclose()


async def test_without_that_a_service_starts_while_redis_is_away() -> None:
    async with create_limiter("redis", redis_url="redis://127.0.0.1:1"):
        pass


# Statistics


async def test_the_statistics_of_a_process(redis_server: RedisServer) -> None:
    async with Relay(redis_server.socket) as relay:
        limiter = create_limiter("redis", redis_url=relay.url, rules=[RULE], deadline=5, max_bounds=1_000)
        assert replace(limiter.statistics(), decisions={}) == Statistics()
        await limiter.check("user:0")
        first = limiter.statistics()
        assert (first.connections, first.calls, first.items, first.bounds) == (1, 1, 1, 1)
        relay.tamper = lambda reply: b""
        checks = [asyncio.ensure_future(limiter.check(f"user:{number % 20}")) for number in range(100)]
        await asyncio.sleep(0.05)
        busy = limiter.statistics()
        assert 1 <= busy.in_flight <= 2
        relay.cut()
        await asyncio.gather(*checks, return_exceptions=True)
        lost = limiter.statistics()
        assert (lost.connections, lost.waiting, lost.in_flight) == (0, 0, 0)
        assert lost.items > 1
        await limiter.aclose()


async def test_a_check_that_waits_for_a_connection_is_counted() -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    async with await asyncio.start_server(silent, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        limiter = create_limiter("redis", redis_url=f"redis://127.0.0.1:{port}", rules=[RULE], deadline=0.2)
        checks = [asyncio.ensure_future(limiter.check(f"user:{number}")) for number in range(7)]
        await asyncio.sleep(0.01)
        assert limiter.statistics().waiting == 7
        await asyncio.gather(*checks, return_exceptions=True)
        assert limiter.statistics().waiting == 0
        await limiter.aclose()


def test_counts_go_on_when_loops_come_and_go(redis_server: RedisServer) -> None:
    limiter = create_limiter("redis", redis_url=redis_server.url, rules=[RULE], deadline=5)

    async def checks(keys: str) -> None:
        for key in keys:
            await limiter.check(key)

    asyncio.run(checks("abc"))
    assert limiter.statistics().calls == 3
    asyncio.run(checks("de"))
    assert (limiter.statistics().calls, limiter.statistics().items) == (5, 5)
    asyncio.run(limiter.aclose())
    assert (limiter.statistics().calls, limiter.statistics().items) == (5, 5)


async def test_a_storage_that_is_required_may_have_lost_something_just_now(
    redis_server: RedisServer, redis_client: redis.Redis
) -> None:
    """Others may still tell it what they know, and until then it decides nothing; but it is there."""
    seconds, micros = redis_client.time()
    now_us = seconds * 10**6 + micros
    redis_client.set("ratethrottle:epoch", f"{redis_client.info('server')['run_id']}{now_us:016}{now_us + 400_000:016}")
    began_s = time.monotonic()
    async with create_limiter("redis", redis_url=redis_server.url, rules=[RULE], deadline=0.2, require_storage=True) as limiter:
        assert time.monotonic() - began_s > 0.5
        assert (await limiter.check("user")).source == "redis"


async def test_a_required_storage_is_there_while_others_tell_it_what_they_know(
    redis_server: RedisServer, redis_client: redis.Redis
) -> None:
    """A big repair takes as long as it takes, and keeps nobody from starting."""
    seconds, micros = redis_client.time()
    now_us = seconds * 10**6 + micros
    redis_client.set(
        "ratethrottle:epoch", f"{redis_client.info('server')['run_id']}{now_us:016}{now_us - 2_000_000:016}0{now_us - 100:016}"
    )
    redis_client.zadd("ratethrottle:epoch:telling", {"somebody": now_us - 100})
    redis_client.hset("ratethrottle:epoch:heard", "somebody", str(now_us + 2_900_000))  # for all of the test
    began_s = time.monotonic()
    async with create_limiter(
        "redis", redis_url=redis_server.url, rules=[RULE], connect_timeout=0.5, on_outage="raise", require_storage=True
    ) as limiter:
        assert time.monotonic() - began_s < 1
        with pytest.raises(StorageUnavailable, match="are telling it"):
            await limiter.check("user")


async def test_evictions_of_bounds_are_counted(redis_server: RedisServer) -> None:
    async with create_limiter("redis", redis_url=redis_server.url, rules=[RULE], deadline=5, max_bounds=2) as limiter:
        for number in range(5):
            await limiter.check(f"user:{number}")
        assert (limiter.statistics().bounds, limiter.statistics().evictions) == (2, 3)


# What the page for operators says


def proposed_user() -> list[str]:
    """What the page gives to ACL SETUSER."""
    if not OPERATIONS.exists():
        pytest.skip("testing an installed wheel, which holds no docs")
    [line] = re.findall(r"ACL SETUSER (limiter .*)", OPERATIONS.read_text())
    return line.split()


async def test_the_user_that_the_page_proposes_can_do_all_that_is_needed() -> None:
    rules = [
        RULE,
        RateThrottleRule("exact", 5, 60, strategy="sliding_window"),
        RateThrottleRule("counter", 5, 60, strategy="sliding_counter"),
        RateThrottleRule("bucket", 5, 60, strategy="token_bucket"),
        RateThrottleRule("leased", 10_000, 60, strategy="fixed_window", lease=100),
    ]
    # Named on the command line, the user survives a restart.
    with RedisServer("--user", *proposed_user()) as server, server.client() as client:
        server.grow_old()  # then the script changes states in place
        told: list[events.Event] = []

        async def told_of(kind: str) -> bool:
            return any(event.kind == kind for event in told)

        url = f"redis://limiter:password@127.0.0.1:{server.port}/0?client_name=app"
        storage = RedisStorage.from_url(url, deadline=2, expected_processes=1)
        async with RateThrottleCore(storage, rules=rules, require_storage=True) as limiter:
            limiter.on_event(told.append)
            await use(limiter, rules)
            await storage.clear()
            await until(lambda: asked(limiter))
            await use(limiter, rules)
            for loses in (client.script_flush, client.flushall, server.stop):
                for rule in rules:
                    await limiter.check("user", rule=rule.name)
                loses()
                if loses == server.stop:
                    assert (await limiter.check("another", rule="r")).source == "outage"
                    await until(lambda: told_of("outage_began"))
                    server.start()
                await until(lambda: asked(limiter))
                await use(limiter, rules)
        kinds = {event.kind for event in told}
        assert {"state_lost", "outage_began", "outage_ended"} <= kinds
        assert not {"refused", "repair_refused"} & kinds


async def use(limiter: RateThrottleCore, rules: list[RateThrottleRule]) -> None:
    """Do all that a limiter does with each rule."""
    for rule in rules:
        await limiter.reset("user", rule=rule.name)
        for cost in (1, 2):
            assert (await limiter.check("user", rule=rule.name, cost=cost)).source in {"redis", "lease"}
        assert (await limiter.peek("user", rule=rule.name)).allowed
    await asyncio.gather(*(limiter.check("busy", rule="leased") for _ in range(300)))
    await limiter.check("busy", rule="leased")


async def asked(limiter: RateThrottleCore) -> bool:
    """Whether Redis is asked."""
    return (await limiter.peek("user", rule="r")).source == "redis"


def test_the_user_that_the_page_proposes_can_do_nothing_else() -> None:
    with (
        RedisServer("--user", *proposed_user()) as server,
        redis.Redis(port=server.port, username="limiter", password="password") as own,
    ):
        own.execute_command("ROLE")  # asked under Sentinel only
        for forbidden in (
            "SCRIPT FLUSH",
            "SCRIPT KILL",
            "FUNCTION FLUSH",
            "FUNCTION DELETE some",
            "FUNCTION LOAD some",
            "FCALL some 0",
            "FLUSHALL",
            "FLUSHDB",
            "SWAPDB 0 1",
            "KEYS *",
            "CONFIG GET *",
            "ACL LIST",
            "CLIENT LIST",
            "CLIENT KILL ID 1",
            "MONITOR",
            "SHUTDOWN",
            "REPLICAOF NO ONE",
            "PUBLISH some message",
            "GET else",
            "DEL else",
            "RENAME ratethrottle:a else",
        ):
            with pytest.raises(redis.exceptions.NoPermissionError):
                own.execute_command(*forbidden.split())
