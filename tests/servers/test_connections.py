"""How the storage reaches Redis: over what, as whom, on which connection, and what happens to calls in flight."""

from __future__ import annotations

import asyncio
import gc
import os
import re
import ssl
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import fakeredis
import pytest
import redis
import redis.asyncio
import redis.asyncio.sentinel
import redis.sentinel

from ratethrottle import Decision, LimiterClosed, RateThrottleCore, RateThrottleRule, RedisStorage, create_limiter
from ratethrottle.errors import StorageProtocolError, StorageRefused, StorageTimeout, StorageUnavailable
from ratethrottle.events import Event
from ratethrottle.storage.redis.backoff import EVERY_S, JITTER_S, Backoff
from ratethrottle.storage.redis.connection import Connection
from ratethrottle.storage.redis.scripts import script
from tests.kit.certificates import make_certificates
from tests.kit.recovery import healed, until
from tests.kit.relay import Relay
from tests.kit.servers import RedisServer, eventually, executable, free_port

pytestmark = pytest.mark.uvloop

RULE = RateThrottleRule("r", 5, 60)
MANY = RateThrottleRule("many", 1_000_000, 86_400, strategy="fixed_window", on_outage="raise")


async def admits_exactly_five(storage: RedisStorage) -> None:
    async with RateThrottleCore(storage, rules=[RULE]) as limiter:
        decisions = [await limiter.check("user") for _ in range(7)]
    assert [decision.allowed for decision in decisions] == [True] * 5 + [False] * 2
    assert [decision.source for decision in decisions] == ["redis"] * 5 + ["prefilter"] * 2


def connection_of(limiter: RateThrottleCore) -> Connection:
    """The one connection of the running loop."""
    [connection] = limiter._storage._connections_here()
    return connection


@pytest.fixture
async def relay(redis_server: RedisServer) -> AsyncIterator[Relay]:
    async with Relay(redis_server.socket) as relay:
        yield relay


@pytest.fixture
async def relayed(relay: Relay) -> AsyncIterator[RateThrottleCore]:
    async with create_limiter("redis", redis_url=relay.url, rules=[MANY], deadline=5) as limiter:
        yield limiter


# What a storage is made from


@pytest.mark.parametrize("kind", [redis.Redis, redis.asyncio.Redis])
@pytest.mark.parametrize("decode", [False, True])
async def test_a_client_of_either_kind_gives_its_settings(redis_server: RedisServer, kind: Any, decode: bool) -> None:
    client = kind(host="127.0.0.1", port=redis_server.port, db=3, decode_responses=decode, client_name="theirs", protocol=3)
    await admits_exactly_five(RedisStorage(client))
    with redis_server.client(db=3) as third:
        [key] = third.keys("ratethrottle:*:r:=user")
        assert third.pttl(key) > 0
    # Nothing of the caller's was used or closed.
    assert not client.connection_pool._available_connections
    closing = client.aclose() if kind is redis.asyncio.Redis else client.close()
    if closing is not None:
        await closing


@pytest.mark.parametrize("kind", [redis.Redis, redis.asyncio.Redis])
async def test_over_a_unix_socket(redis_server: RedisServer, kind: Any) -> None:
    await admits_exactly_five(RedisStorage(kind(unix_socket_path=str(redis_server.socket))))


async def test_by_url_of_a_unix_socket(redis_server: RedisServer) -> None:
    await admits_exactly_five(RedisStorage.from_url(f"unix://{redis_server.socket}?db=1"))


@pytest.mark.parametrize("kind", [fakeredis.FakeRedis, fakeredis.FakeAsyncRedis])
async def test_over_fakeredis_on_the_same_server(fake_server: fakeredis.FakeServer, kind: Any) -> None:
    await admits_exactly_five(RedisStorage(kind(server=fake_server)))
    assert len(fakeredis.FakeRedis(server=fake_server).keys("ratethrottle:*:r:=user")) == 1


@pytest.fixture(scope="module")
def protected() -> Iterator[RedisServer]:
    with RedisServer(password="s3cret") as server, server.client() as client:
        client.acl_setuser("service", enabled=True, passwords=["+hidden"], keys=["ratethrottle:*"], categories=["+@all"])
        yield server


@pytest.mark.parametrize("kind", [redis.Redis, redis.asyncio.Redis])
async def test_with_a_password_a_user_or_a_credential_provider(protected: RedisServer, kind: Any) -> None:
    class Provider(redis.CredentialProvider):
        def get_credentials(self) -> tuple[str, str]:
            return "service", "hidden"

    for who in ({"password": "s3cret"}, {"username": "service", "password": "hidden"}, {"credential_provider": Provider()}):
        with protected.client() as client:
            client.flushall()
        await admits_exactly_five(RedisStorage(kind(host="127.0.0.1", port=protected.port, **who)))


async def test_redis_refuses_the_password(protected: RedisServer) -> None:
    for url in (f"redis://:wr0ng@127.0.0.1:{protected.port}", f"redis://127.0.0.1:{protected.port}"):
        async with create_limiter("redis", redis_url=url, rules=[RULE]) as limiter:
            with pytest.raises(StorageRefused, match="password") as refused:
                await limiter.check("user")
        assert "wr0ng" not in "".join(map(str, (refused.value, refused.value.__cause__, limiter, limiter._storage)))


@pytest.fixture(scope="module")
def secure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with RedisServer(tls=make_certificates(tmp_path_factory.mktemp("tls"))) as server:
        yield server


@pytest.mark.parametrize("kind", [redis.Redis, redis.asyncio.Redis])
async def test_over_tls(secure: RedisServer, kind: Any) -> None:
    with secure.client() as client:
        client.flushall()
    await admits_exactly_five(
        RedisStorage(kind(host="127.0.0.1", port=secure.port, ssl=True, ssl_ca_certs=str(secure.tls[2])), deadline=2)
    )


async def test_by_tls_url(secure: RedisServer) -> None:
    with secure.client() as client:
        client.flushall()
    await admits_exactly_five(RedisStorage.from_url(f"{secure.url}?ssl_ca_certs={secure.tls[2]}", deadline=2))


async def test_a_certificate_that_nobody_vouches_for_is_refused(secure: RedisServer) -> None:
    async with create_limiter("redis", redis_url=secure.url, rules=[RULE], deadline=2) as limiter:
        with pytest.raises(StorageRefused, match="certificate of Redis is not accepted"):
            await limiter.check("user")


async def test_a_huge_reply_while_connecting_takes_no_time_of_the_loop(redis_server: RedisServer) -> None:
    """hiredis would make, and give back, a list of 10^9 elements: 2 s in which nothing else runs."""
    async with Relay(redis_server.socket) as relay:
        relay.tamper = lambda reply: b"*1000000000\r\n"
        async with create_limiter(
            "redis", redis_url=relay.url, rules=[RateThrottleRule("r", 5, 60)], on_outage="deny", deadline=0.1, connect_timeout=1
        ) as limiter:
            used_s = time.thread_time()

            async def tried_again() -> bool:
                assert (await limiter.check("user")).source == "outage"
                return relay.connections >= 2

            await until(tried_again)
    gc.collect()  # what hiredis made is given back when it pleases the collector
    assert time.thread_time() - used_s < 2


async def test_an_outage_reads_the_certificates_once(secure: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading them takes tens of milliseconds, in which a loop does nothing else."""
    made: list[Any] = []
    create = ssl.create_default_context
    monkeypatch.setattr(ssl, "create_default_context", lambda *args, **kwargs: made.append(1) or create(*args, **kwargs))
    url = f"rediss://127.0.0.1:{free_port()}?ssl_ca_certs={secure.tls[2]}"
    async with create_limiter("redis", redis_url=url, rules=[RULE], deadline=2) as limiter:

        async def tried() -> bool:
            assert (await limiter.check("user")).source == "outage"
            return limiter.statistics().attempts >= 3

        await until(tried)
    assert len(made) == 1


class Sentinels:
    """Sentinels that know one master, as redis-server runs them."""

    def __init__(self, master: RedisServer, count: int) -> None:
        self.servers = []
        for _ in range(count):
            server = RedisServer()
            (server.directory / "sentinel.conf").write_text(f"sentinel monitor mymaster 127.0.0.1 {master.port} 1\n")
            self.servers.append(server)

    def __enter__(self) -> list[tuple[str, int]]:
        self.processes = [
            subprocess.Popen(
                [
                    executable("redis-server"),
                    str(server.directory / "sentinel.conf"),
                    "--sentinel",
                    "--bind",
                    "127.0.0.1",
                    "--port",
                    str(server.port),
                ],
                stdout=subprocess.DEVNULL,
            )
            for server in self.servers
        ]
        for server in self.servers:
            with redis.Redis(port=server.port) as client:
                eventually(lambda client=client: answers(client))
        return [("127.0.0.1", server.port) for server in self.servers]

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
        for server in self.servers:
            server.close()


def answers(client: redis.Redis) -> bool:
    try:
        return bool(client.sentinel_get_master_addr_by_name("mymaster"))
    except redis.ConnectionError:
        return False


@pytest.mark.parametrize("kind", [redis.sentinel.Sentinel, redis.asyncio.sentinel.Sentinel])
async def test_through_sentinels_of_which_the_first_is_away(redis_server: RedisServer, kind: Any) -> None:
    with Sentinels(redis_server, 1) as addresses:
        sentinel = kind([("127.0.0.1", free_port()), *addresses])
        await admits_exactly_five(RedisStorage(sentinel.master_for("mymaster"), deadline=2))
        other = RedisStorage(sentinel.master_for("other"), deadline=2, on_outage="raise")
        async with RateThrottleCore(other, rules=[RULE]) as limiter:
            with pytest.raises(StorageUnavailable, match="none of 2 sentinels names a master 'other'"):
                await limiter.check("user")


# One connection, and what waits on it


async def test_calls_share_one_connection_of_our_own_without_chatter(relay: Relay, relayed: RateThrottleCore) -> None:
    await asyncio.gather(*(relayed.check(f"user:{i}") for i in range(300)))
    assert relay.connections == 1
    for word in (b"CLIENT", b"HELLO", b"PING", b"MAINT"):
        assert word not in relay.heard


async def test_more_than_a_hundred_at_once_all_get_a_decision(redis_url: str) -> None:
    """Above 100 concurrent calls redis-py 8's pool raises: 300 of 400 decisions fail (limits, throttled-py and others)."""
    async with create_limiter("redis", redis_url=redis_url, rules=[MANY], deadline=5) as limiter:
        decisions = await asyncio.gather(*(limiter.check("user") for _ in range(400)))
    assert sorted(decision.remaining for decision in decisions) == list(range(1_000_000 - 400, 1_000_000))


async def test_a_decision_costs_one_command(relay: Relay, relayed: RateThrottleCore) -> None:
    """Nine commands for three limits with headers (slowapi); two for one decision (limits on coredis)."""
    await relayed.check("user")
    relay.heard = b""
    await relayed.check("user")
    assert relay.commands == 1
    assert len(await relayed.check_many([f"user:{i}" for i in range(128)])) == 128
    assert relay.commands == 2
    assert b"EVALSHA" in relay.heard


async def test_check_many_of_more_than_a_call_takes(redis_url: str) -> None:
    async with create_limiter("redis", redis_url=redis_url, rules=[MANY], deadline=5) as limiter:
        decisions = await limiter.check_many(["user"] * 300)
    assert [decision.remaining for decision in decisions] == list(range(999_999, 999_699, -1))


async def test_after_script_flush_calls_are_sent_once_more_by_value(
    relay: Relay, relayed: RateThrottleCore, redis_client: redis.Redis
) -> None:
    """NOSCRIPT after SCRIPT FLUSH, restart or failover, for ever (pyrate-limiter)."""
    await relayed.check("user")
    redis_client.script_flush()
    relay.heard = b""
    decisions = await asyncio.gather(*(relayed.check("user") for _ in range(10)))
    assert sorted(decision.remaining for decision in decisions) == list(range(999_989, 999_999))
    by_value = b"$4\r\nEVAL\r\n$%d\r\n" % len(script("decide").body(shebang=True))
    assert relay.heard.count(by_value) == 1
    assert relay.heard.count(b"LOAD") == 1
    relay.heard = b""
    await relayed.check("user")
    assert by_value not in relay.heard
    assert relay.connections == 1
    redis_client.script_flush()
    await relayed.reset("user")
    assert (await relayed.peek("user")).remaining == 1_000_000


async def test_a_reply_to_another_request_kills_the_connection_and_fails_its_calls(
    relay: Relay, relayed: RateThrottleCore
) -> None:
    await relayed.check("user")
    session = connection_of(relayed).batch.session_id
    relay.tamper = lambda reply: reply.replace(session, session[::-1])
    results = await asyncio.gather(*(relayed.check("user") for _ in range(3)), return_exceptions=True)
    assert all(isinstance(result, StorageProtocolError) for result in results)
    relay.tamper = lambda reply: reply
    assert (await relayed.check("user")).allowed
    assert relay.connections == 2


@pytest.mark.parametrize(
    "answer", [b"+OK\r\n", b"*0\r\n", b":1\r\n", b"$-1\r\n", b"*-1\r\n", b"HTTP/1.1 400 Bad Request\r\n\r\n"]
)
async def test_a_reply_that_is_none_of_ours_is_a_protocol_error(relay: Relay, relayed: RateThrottleCore, answer: bytes) -> None:
    told: list[Event] = []
    relayed.on_event(told.append)
    await relayed.check("user")
    relay.tamper = lambda reply: answer
    with pytest.raises(StorageProtocolError):
        await relayed.check("user")
    assert [event.message.partition(" (")[0] for event in told] == [
        "Redis sent something else than was asked for; the connection was dropped"
    ]


async def test_a_reply_with_too_few_or_odd_decisions_is_a_protocol_error(relay: Relay, relayed: RateThrottleCore) -> None:
    await relayed.check("user")
    relay.tamper = lambda reply: reply.replace(b"*5\r\n", b"*4\r\n", 1).rpartition(b":")[0]
    with pytest.raises(StorageProtocolError):
        await relayed.check("user")
    relay.tamper = lambda reply: reply
    await relayed.check("user")
    relay.tamper = lambda reply: reply.rpartition(b":")[0] + b"$1\r\nx\r\n"
    with pytest.raises(StorageProtocolError):
        await relayed.check("user")


async def test_cancelled_checks_swap_no_replies(redis_url: str) -> None:
    rules = [RateThrottleRule(f"r{limit}", limit, 60, strategy="fixed_window") for limit in range(1000, 1100)]
    async with create_limiter("redis", redis_url=redis_url, rules=rules, deadline=5) as limiter:
        await limiter.check("user", "r1000")
        for turn in range(20):
            tasks = [asyncio.ensure_future(limiter.check("user", f"r{limit}")) for limit in range(1000, 1100)]
            for _ in range(turn % 5):
                await asyncio.sleep(0)
            for task in tasks[turn % 3 :: 3]:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            decided = [result for result in results if isinstance(result, Decision)]
            assert len(decided) >= 60
            for limit, result in zip(range(1000, 1100), results, strict=True):
                if isinstance(result, Decision):
                    assert (result.rule, result.limit) == (f"r{limit}", limit)
                    assert limit - 22 <= result.remaining < limit
                else:
                    assert isinstance(result, asyncio.CancelledError)


async def test_a_check_cancelled_before_it_was_sent_costs_nothing(redis_server: RedisServer) -> None:
    limiter = create_limiter("redis", redis_url=redis_server.url, rules=[MANY], deadline=5)
    task = asyncio.ensure_future(limiter.check("user"))
    await asyncio.sleep(0)
    assert not connection_of(limiter).batch.open
    assert connection_of(limiter).batch.callers == 1
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert connection_of(limiter).batch.callers == 0
    assert (await limiter.peek("user")).remaining == 1_000_000
    await limiter.aclose()


async def test_past_the_bound_of_the_queue_a_call_fails_at_once(redis_url: str) -> None:
    async with create_limiter("redis", redis_url=redis_url, rules=[MANY], max_waiting=10, on_overload="raise") as limiter:
        results = await asyncio.gather(*(limiter.check("user") for _ in range(50)), return_exceptions=True)
        assert sum(isinstance(result, Decision) for result in results) == 10
        assert all("waiting" in str(result) for result in results if not isinstance(result, Decision))
        assert (await limiter.check("user")).allowed


async def test_by_default_it_is_denied_there_and_that_is_no_outage(redis_url: str) -> None:
    """Whatever the policy for outages: this one would raise."""
    async with create_limiter("redis", redis_url=redis_url, rules=[MANY], max_waiting=10) as limiter:
        decisions = await asyncio.gather(*(limiter.check("user") for _ in range(50)))
        assert [decision.source for decision in decisions] == ["redis"] * 10 + ["overload"] * 40
        assert limiter.statistics().overloads == 40
        assert all(decision.allowed == (decision.source == "redis") for decision in decisions)
        assert all(decision.retry_after > 0 for decision in decisions if not decision.allowed)
        assert limiter.statistics().breaker == "closed"
        assert (await limiter.check("user")).remaining == 1_000_000 - 11


# When Redis is away


async def test_redis_absent_is_unavailable_within_the_deadline() -> None:
    url = f"redis://127.0.0.1:{free_port()}"
    async with create_limiter("redis", redis_url=url, rules=[RULE], deadline=0.2, on_outage="raise") as limiter:
        for _ in range(3):
            started = time.monotonic()
            with pytest.raises(StorageUnavailable, match="can't be reached"):
                await limiter.check("user")
            assert time.monotonic() - started < 1


async def test_a_port_that_accepts_and_says_nothing_is_unavailable_within_the_deadline() -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    url = f"redis://127.0.0.1:{port}"
    async with create_limiter(
        "redis", redis_url=url, rules=[RULE], deadline=0.1, connect_timeout=0.5, on_outage="raise"
    ) as limiter:
        started = time.monotonic()
        with pytest.raises(StorageUnavailable, match="no connection to Redis within"):
            await limiter.check("user")
        assert time.monotonic() - started < 1
    server.close()
    await server.wait_closed()


async def test_a_paused_redis_times_out_without_stalling_the_loop() -> None:
    """Synchronous Redis on the event loop: a 0.7 s pause of Redis stalls the whole service (slowapi)."""
    with RedisServer() as server:
        async with create_limiter("redis", redis_url=server.url, rules=[MANY], deadline=0.6) as limiter:
            await limiter.check("user")
            server.pause()
            checks = asyncio.gather(*(limiter.check("user") for _ in range(20)), return_exceptions=True)
            slowest = 0.0
            while not checks.done():
                before = time.monotonic()
                await asyncio.sleep(0.005)
                slowest = max(slowest, time.monotonic() - before)
            assert slowest < 0.4
            assert all(isinstance(result, StorageTimeout) for result in await checks)
            server.resume()
            # Each was sent once, none again.
            assert 1_000_000 - 22 <= (await healed(limiter)).remaining < 1_000_000


async def test_a_restarted_redis_is_found_again() -> None:
    with RedisServer() as server:
        async with create_limiter("redis", redis_url=server.url, rules=[MANY], deadline=2) as limiter:
            await limiter.check("user")
            server.stop()
            with pytest.raises(StorageUnavailable):
                await limiter.check("user")
            server.start()
            await healed(limiter)
            # The new one has heard of the check that the old one had counted.
            assert (await limiter.check("user")).remaining == 999_998
            # While nothing was asked: the first check after it must not pay for a connection that died long ago.
            server.stop()
            server.start()
            await healed(limiter)
            assert (await limiter.check("user")).remaining == 999_997


async def test_a_connection_lost_in_flight_fails_its_calls_and_resends_nothing(relay: Relay, relayed: RateThrottleCore) -> None:
    await relayed.check("user")
    relay.heard = b""
    relay.tamper = lambda reply: relay.cut() or b""  # type: ignore[func-returns-value]  # cut, then answer nothing
    with pytest.raises(StorageUnavailable, match="may have been counted"):
        await relayed.check("user")
    relay.tamper = lambda reply: reply
    assert (await relayed.peek("user")).remaining == 1_000_000 - 2
    assert relay.heard.count(b"$5\r\ncheck\r\n") == 1


# Loops, processes, and the end


def test_each_event_loop_has_a_connection_of_its_own(redis_url: str) -> None:
    limiter = create_limiter("redis", redis_url=redis_url, rules=[MANY], deadline=5)

    async def some() -> None:
        await asyncio.gather(*(limiter.check("user") for _ in range(50)))

    asyncio.run(some())
    asyncio.run(some())
    threads = [threading.Thread(target=asyncio.run, args=(some(),)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    async def left() -> int:
        async with limiter:
            return (await limiter.peek("user")).remaining

    assert asyncio.run(left()) == 1_000_000 - 300


def test_aclose_closes_the_connections_of_other_loops(redis_server: RedisServer, redis_client: redis.Redis) -> None:
    limiter = create_limiter("redis", redis_url=redis_server.url, rules=[MANY], deadline=5)
    connected, finish = threading.Event(), threading.Event()

    async def other() -> None:
        await limiter.check("user")
        connected.set()
        await asyncio.to_thread(finish.wait, 5)

    def clients() -> int:
        return int(redis_client.info("clients")["connected_clients"])

    before = clients()
    thread = threading.Thread(target=asyncio.run, args=(other(),))
    thread.start()
    assert connected.wait(5)
    assert clients() == before + 1
    asyncio.run(limiter.aclose())
    eventually(lambda: clients() == before)
    finish.set()
    thread.join()


async def test_a_storage_that_nobody_holds_any_more_closes_its_connection(
    redis_server: RedisServer, redis_client: redis.Redis
) -> None:
    before = redis_client.info("clients")["connected_clients"]
    limiter = create_limiter("redis", redis_url=redis_server.url, rules=[MANY], deadline=5)
    await limiter.check("user")
    assert redis_client.info("clients")["connected_clients"] == before + 1
    noise: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: noise.append(context))
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        del limiter
        gc.collect()
        for _ in range(5):
            await asyncio.sleep(0.01)
        gc.collect()
    assert (noise, warned) == ([], [])
    assert redis_client.info("clients")["connected_clients"] == before


async def test_closing_a_limiter_leaves_the_callers_client_alone(redis_url: str) -> None:
    client = redis.asyncio.Redis.from_url(redis_url)
    async with RateThrottleCore(RedisStorage(client), rules=[RULE]) as core:
        assert await core.check("key")
        assert await client.ping()
    assert await client.ping()
    with pytest.raises(LimiterClosed):
        await core.check("key")
    await client.aclose()


async def test_a_closed_storage_says_so(redis_url: str) -> None:
    storage = RedisStorage.from_url(redis_url)
    limiter = RateThrottleCore(storage, rules=[RULE])
    await limiter.check("user")
    await storage.aclose()
    await storage.aclose()
    with pytest.raises(StorageUnavailable, match="closed"):
        await limiter.check("user")


async def test_calls_in_flight_when_it_closes_fail(redis_url: str) -> None:
    storage = RedisStorage.from_url(redis_url)
    limiter = RateThrottleCore(storage, rules=[RULE])
    checks = [asyncio.ensure_future(limiter.check("user")) for _ in range(200)]
    await asyncio.sleep(0)
    await storage.aclose()
    results = await asyncio.gather(*checks, return_exceptions=True)
    assert all(isinstance(result, StorageUnavailable) for result in results)


async def test_replies_that_come_while_it_closes_are_none_that_nobody_asked_for(redis_url: str) -> None:
    told: list[str] = []
    for _ in range(40):
        limiter = create_limiter("redis", redis_url=redis_url, rules=[RULE])
        limiter.on_event(lambda event: told.append(event.kind))
        await limiter.check("user")
        checks = [asyncio.ensure_future(limiter.check(f"user:{number}")) for number in range(50)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        await limiter.aclose()
        await asyncio.gather(*checks, return_exceptions=True)
    assert told == []


def run_python(code: str, *arguments: str) -> str:
    """Run code as a user would, with every warning an error. Returns what it printed; fails on any noise."""
    ended = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    # In its debug mode asyncio also says what took long, and on a busy machine that is anything.
    noise = [line for line in ended.stderr.splitlines() if not re.fullmatch(r"Executing <.*> took [\d.]+ seconds", line)]
    assert (ended.returncode, noise) == (0, [])
    return ended.stdout


CARELESS = """
import asyncio, sys
from ratethrottle import create_limiter, RateThrottleRule
limiter = create_limiter("redis", redis_url=sys.argv[1], rules=[RateThrottleRule("r", 5, 60)], deadline=5)
async def main():
    print([bool(d) for d in await asyncio.gather(*(limiter.check("user") for _ in range(7)))].count(True))
asyncio.run(main())
"""


def test_a_program_that_never_closes_leaves_no_noise(redis_url: str) -> None:
    """Tests that end in "Event loop is closed"."""
    assert run_python(CARELESS, redis_url) == "5\n"


def test_a_program_that_never_closes_tls_leaves_no_noise(secure: RedisServer) -> None:
    with secure.client() as client:
        client.flushall()
    assert run_python(CARELESS, f"{secure.url}?ssl_ca_certs={secure.tls[2]}") == "5\n"


@pytest.mark.parametrize("tls", [False, True])
def test_a_program_whose_redis_is_paused_when_it_ends_leaves_no_noise(tmp_path: Path, tls: bool) -> None:
    code = CARELESS.replace(
        "asyncio.run(main())",
        """
import os, signal
async def paused():
    await main()
    os.kill(int(sys.argv[2]), signal.SIGSTOP)
    limiter2 = asyncio.ensure_future(limiter.check("user"))
    await asyncio.sleep(0.02)
asyncio.run(paused())
""",
    )
    with RedisServer(tls=make_certificates(tmp_path) if tls else ()) as server:
        assert server._process is not None
        url = f"{server.url}?ssl_ca_certs={server.tls[2]}" if tls else server.url
        assert run_python(code, url, str(server._process.pid)) == "5\n"


FORKED = """
import asyncio, os, sys
from ratethrottle import create_limiter, RateThrottleRule
limiter = create_limiter("redis", redis_url=sys.argv[1], rules=[RateThrottleRule("r", 1000, 60)], deadline=5)
async def some(count):
    return [(await limiter.check("user")).remaining for _ in range(count)]
async def main():
    await some(10)
    child = os.fork()
    if not child:
        # As multiprocessing does it: a loop of the child's own, and no cleaning up of what it inherited.
        try:
            asyncio._set_running_loop(None)
            asyncio.run(some(10))
            import gc
            gc.collect()
        finally:
            sys.stderr.flush()
            os._exit(0)
    mine = await some(50)
    os.waitpid(child, 0)
    mine += await some(10)
    print(mine == sorted(mine, reverse=True), 1000 - mine[-1])
asyncio.run(main())
"""


LEASED = """
import asyncio, os, sys
from ratethrottle import create_limiter, RateThrottleRule
rule = RateThrottleRule("r", 1000, 60, lease=True, lease_ttl=1.0)
limiter = create_limiter("redis", redis_url=sys.argv[1], rules=[rule], deadline=5)
async def until(source):
    admitted = 0
    while True:
        decision = await limiter.check("user")
        admitted += decision.allowed
        if decision.source == source:
            return admitted
async def main():
    admitted = await until("lease")
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            asyncio._set_running_loop(None)
            os.write(writing, b"%d" % asyncio.run(until("prefilter")))
        finally:
            os._exit(0)
    admitted += await until("prefilter")
    os.waitpid(child, 0)
    print(admitted + int(os.read(reading, 99)))
asyncio.run(main())
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system can't fork")
def test_a_forked_child_spends_nothing_of_its_parents_lease(redis_url: str) -> None:
    assert int(run_python(LEASED, redis_url)) <= 1000


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system can't fork")
def test_a_forked_child_gets_a_connection_of_its_own(redis_url: str) -> None:
    assert run_python(FORKED, redis_url) == "True 80\n"


def timers() -> int:
    """How many timers the running loop still has to fire."""
    return sum(not timer.cancelled() for timer in asyncio.get_running_loop()._scheduled)  # type: ignore[attr-defined]  # asyncio's own heap


def test_no_timer_or_task_is_left(redis_url: str) -> None:
    async def main() -> None:
        limiter = create_limiter("redis", redis_url=redis_url, rules=[MANY], deadline=50)
        await asyncio.gather(*(limiter.check("user") for _ in range(100)))
        task = asyncio.ensure_future(limiter.check("user"))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert len(asyncio.all_tasks()) == 2  # this one and the connection's
        assert timers() == 1  # for all checks together
        await limiter.aclose()
        assert timers() == 0
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(main())


def test_a_turn_that_was_given_back_is_taken_once_and_not_after_a_success() -> None:
    attempts = Backoff(1)
    attempts.failed()
    turn_s = time.monotonic() + attempts.wait_s()
    attempts.give_back(turn_s)
    assert attempts.wait_s() == pytest.approx(turn_s - time.monotonic(), abs=0.05)
    assert attempts.wait_s() > turn_s - time.monotonic() + 0.1, "it was taken"
    # One of a long outage is far ahead. Once Redis has answered, nobody waits for it.
    attempts.give_back(time.monotonic() + 10)
    attempts.succeeded()
    attempts.failed()
    assert attempts.wait_s() <= EVERY_S + JITTER_S
