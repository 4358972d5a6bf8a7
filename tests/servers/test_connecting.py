"""Connecting takes its own time: far servers, slow names, slow credentials, and what an attempt costs others."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
import redis.asyncio

from ratethrottle import RateThrottleCore, RateThrottleRule, RedisStorage, create_limiter
from ratethrottle.errors import ConfigurationError, StorageRefused, StorageUnavailable
from ratethrottle.events import Event
from ratethrottle.storage.redis import aside, names, settings
from ratethrottle.storage.redis.aside import THREADS_MAX, Shared
from ratethrottle.storage.redis.backoff import EVERY_MOST_S, EVERY_S, JITTER_S, Backoff
from ratethrottle.storage.redis.names import dial, literal
from ratethrottle.storage.redis.race import Pace, Progress, Race
from tests.kit.certificates import make_certificates
from tests.kit.recovery import served, until
from tests.kit.relay import Relay
from tests.kit.sentinel import FakeSentinel
from tests.kit.servers import RedisServer, free_port

RULE = RateThrottleRule("r", 1_000_000, 60)
PASSWORD = "s3cret"


class Far(Relay):
    """A relay to a server that is `round_trip_s` away, but for TCP's own round trip.

    flights: how often a client had to wait for the server before it went on, on all connections, the first words included.
    """

    def __init__(self, target: Path | int, round_trip_s: float) -> None:
        super().__init__(target if isinstance(target, Path) else Path())
        self.upstream_port = target if isinstance(target, int) else 0
        self.round_trip_s = round_trip_s
        self.flights = 0
        self.swallows = 0  # of so many connections to come, replies are lost
        self.mute = False  # replies of all are

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        lost = self.swallows >= self.connections
        if self.upstream_port:
            upstream_reader, upstream = await asyncio.open_connection("127.0.0.1", self.upstream_port)
        else:
            upstream_reader, upstream = await asyncio.open_unix_connection(str(self.target))
        self._writers |= {writer, upstream}
        spoken_to = True  # the client, which may go on

        def forth(data: bytes) -> None:
            upstream.write(self._listen(data))

        def back(data: bytes) -> None:
            nonlocal spoken_to
            spoken_to = True
            writer.write(self._answer(data))

        async def forward() -> None:
            nonlocal spoken_to
            while data := await reader.read(65536):
                self.flights += spoken_to
                spoken_to = False
                self._later(forth, data)

        async def backward() -> None:
            while data := await upstream_reader.read(65536):
                if not lost and not self.mute:
                    self._later(back, data)

        ways = [asyncio.create_task(forward()), asyncio.create_task(backward())]
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        for end in (writer, upstream):
            end.transport.abort()
        await asyncio.gather(*ways, return_exceptions=True)
        self._writers -= {writer, upstream}

    def _later(self, pass_on: Callable[[bytes], None], data: bytes) -> None:
        asyncio.get_running_loop().call_later(self.round_trip_s / 2, pass_on, data)


async def by_redis(limiter: RateThrottleCore) -> bool:
    return (await limiter.check("user")).source == "redis"


@pytest.fixture(scope="module")
def protected() -> Iterator[RedisServer]:
    with RedisServer(password=PASSWORD) as server:
        yield server


# Far away


async def test_a_redis_of_another_region_is_connected_to(protected: RedisServer) -> None:
    """Each round trip is within the deadline; all that connecting takes isn't."""
    with protected.client() as client:
        client.script_flush()
    async with Far(protected.socket, 0.3) as far:
        limiter = create_limiter("redis", redis_url=f"redis://:{PASSWORD}@127.0.0.1:{far.port}/1", rules=[RULE], deadline=0.7)
        assert (await limiter.check("user")).source == "outage"
        await until(lambda: by_redis(limiter), 5)
        assert [(await limiter.check("user")).source for _ in range(3)] == ["redis"] * 3
        assert limiter.statistics().attempts == 1
        assert far.connections == 1
        await limiter.aclose()


@pytest.mark.parametrize(
    ("how", "known", "flights"), [("plain", True, 1), ("plain", False, 2), ("password", True, 1), ("tls", True, 2)]
)
async def test_how_many_round_trips_connecting_takes(tmp_path: Path, how: str, known: bool, flights: int) -> None:
    """Beside TCP's own. The table of operations.md says the same."""
    certificates = make_certificates(tmp_path) if how == "tls" else ()
    password = PASSWORD if how == "password" else None
    user = f":{PASSWORD}@" if password else ""
    with RedisServer(password=password, tls=certificates) as server:
        if known:
            async with create_limiter("redis", redis_url=f"unix://{user}{server.socket}"):
                pass
        async with Far(server.port if certificates else server.socket, 0.06) as far:
            url = f"redis://{user}127.0.0.1:{far.port}/1?client_name=us"
            if certificates:
                url = f"rediss://127.0.0.1:{far.port}/1?ssl_ca_certs={certificates[2]}"
            async with create_limiter("redis", redis_url=url):
                assert far.flights == flights + 1  # the first beat, after which checks are decided


async def test_a_start_waits_for_redis_and_the_first_check_is_decided_there(protected: RedisServer) -> None:
    async with Far(protected.socket, 0.2) as far:
        limiter = create_limiter("redis", redis_url=f"redis://:{PASSWORD}@127.0.0.1:{far.port}", rules=[RULE], deadline=0.6)
        async with limiter:
            assert (await limiter.check("user")).source == "redis"


async def test_a_start_without_redis_waits_no_longer_than_it_takes_to_know() -> None:
    began_s = time.monotonic()
    async with create_limiter("redis", redis_url=f"redis://127.0.0.1:{free_port()}", rules=[RULE]):
        assert time.monotonic() - began_s < 1


async def test_a_start_beside_a_redis_that_says_nothing_waits_for_one_attempt() -> None:
    with RedisServer() as server:
        server.pause()
        began_s = time.monotonic()
        async with create_limiter("redis", redis_url=server.url, rules=[RULE], connect_timeout=0.5):
            assert 0.4 < time.monotonic() - began_s < 1.5
        server.resume()


async def test_checks_go_by_the_policy_while_an_attempt_goes_on() -> None:
    with RedisServer() as server:
        server.pause()
        told: list[Event] = []
        limiter = create_limiter("redis", redis_url=server.url, rules=[RULE], on_outage="allow", deadline=0.2)
        limiter.on_event(told.append)
        first = asyncio.ensure_future(limiter.check("user"))
        began_s = time.monotonic()
        assert (await first).source == "outage"
        assert 0.15 < time.monotonic() - began_s < 0.5
        for _ in range(50):
            began_s = time.monotonic()
            assert (await limiter.check("user")).source == "outage"
            assert time.monotonic() - began_s < 0.1
        assert [event.kind for event in told] == ["outage_began"]
        server.resume()
        await until(lambda: by_redis(limiter), 1.5)
        assert limiter.statistics().attempts <= 2
        await limiter.aclose()


async def test_a_fresh_try_is_made_beside_one_whose_answers_were_lost(redis_server: RedisServer) -> None:
    """It would be waited for in vain, for all of the attempt's time."""
    async with Far(redis_server.socket, 0.0) as far:
        limiter = create_limiter("redis", redis_url=far.url, rules=[RULE], connect_timeout=10)
        await until(lambda: by_redis(limiter))
        far.swallows = far.connections + 2
        far.cut()
        began_s = time.monotonic()
        await until(lambda: by_redis(limiter), 4)
        assert time.monotonic() - began_s < 2.5
        await limiter.aclose()


async def test_a_refusal_from_far_away_stays_one_between_attempts(protected: RedisServer) -> None:
    """Each attempt takes longer than a deadline, and no check is allowed meanwhile."""
    async with Far(protected.socket, 0.3) as far:
        url = f"redis://:wr0ng@127.0.0.1:{far.port}"
        async with create_limiter("redis", redis_url=url, rules=[RULE], on_outage="allow", deadline=0.2) as limiter:
            ends_s = time.monotonic() + 2
            while time.monotonic() < ends_s:
                with pytest.raises(StorageRefused):
                    await limiter.check("user")
                await asyncio.sleep(0.02)
            assert far.connections >= 2


async def test_through_sentinels_of_another_region(protected: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names, sentinels and the master they name are all slow; none of it fits into a deadline."""
    look = Look(monkeypatch, 0.3)
    async with Far(protected.socket, 0.3) as far, FakeSentinel.naming(far.port) as near, Far(near.address[1], 0.3) as sentinel:
        url = f"redis+sentinel://:{PASSWORD}@redis.internal:{sentinel.port}/mymaster"
        limiter = create_limiter("redis", redis_url=url, rules=[RULE], deadline=0.7)
        async with limiter:
            assert (await limiter.check("user")).source == "redis"
        assert look.most == 1


async def test_what_was_lost_with_a_network_is_asked_again_of_sentinels_too(protected: RedisServer) -> None:
    """Neither a sentinel nor the master answers what was asked while nothing came back; the connections stay open."""
    async with Far(protected.socket, 0.0) as node, FakeSentinel.naming(node.port) as near, Far(near.address[1], 0.0) as sentinel:
        url = f"redis+sentinel://:{PASSWORD}@127.0.0.1:{sentinel.port}/mymaster"
        async with create_limiter("redis", redis_url=url, rules=[RULE]) as limiter:
            await until(lambda: by_redis(limiter))
            node.mute = sentinel.mute = True
            ends_s = time.monotonic() + 2.2
            while time.monotonic() < ends_s:
                await limiter.check("user")
                await asyncio.sleep(0.01)
            assert (await limiter.check("user")).source == "outage"
            node.mute = sentinel.mute = False
            await until(lambda: by_redis(limiter), 3)


@pytest.mark.parametrize("tls", [False, True])
def test_on_uvloop_too(tmp_path: Path, tls: bool) -> None:
    uvloop = pytest.importorskip("uvloop")
    certificates = make_certificates(tmp_path) if tls else ()

    async def main(server: RedisServer, name: str) -> str:
        query = f"?ssl_ca_certs={certificates[2]}&ssl_check_hostname=false" if tls else ""
        url = f"{'rediss' if tls else 'redis'}://{name}:{server.port}/1{query}"
        async with create_limiter("redis", redis_url=url, rules=[RULE], deadline=2) as limiter:
            return (await limiter.check("user")).source

    with RedisServer(tls=certificates) as server:
        for name in ("127.0.0.1", "localhost"):
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                assert runner.run(main(server, name)) == "redis"


# Names


class Look:
    """Stands in for `socket.getaddrinfo`: takes its time for one name, and counts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, takes_s: float, answer: str = "127.0.0.1") -> None:
        self.count = 0
        self.most = 0  # at once
        self._now = 0
        self._lock = threading.Lock()
        self._real = socket.getaddrinfo
        self._takes_s, self._answer = takes_s, answer
        monkeypatch.setattr(socket, "getaddrinfo", self._look)

    def _look(self, host: Any, *args: Any, **kwargs: Any) -> Any:
        if host != "redis.internal":
            return self._real(host, *args, **kwargs)
        with self._lock:
            self.count += 1
            self._now += 1
            self.most = max(self.most, self._now)
        time.sleep(self._takes_s)
        with self._lock:
            self._now -= 1
        return self._real(self._answer, *args, **kwargs)


@pytest.mark.parametrize("takes_s", [0.4, 1.5])
async def test_a_slow_name_is_looked_up_once_off_the_loop(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch, takes_s: float
) -> None:
    look = Look(monkeypatch, takes_s)
    url = f"redis://redis.internal:{redis_server.port}"
    limiter = create_limiter("redis", redis_url=url, rules=[RULE], connect_timeout=1, connections=3)
    await limiter.check("user")
    assert look.count == 1 <= limiter.statistics().attempts
    await until(lambda: by_redis(limiter), 5)
    assert look.most == 1
    assert look.count <= limiter.statistics().attempts
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("asyncio")]
    await limiter.aclose()


async def test_a_certificate_is_held_against_the_name_and_not_the_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Look(monkeypatch, 0)
    certificates = make_certificates(tmp_path)  # for 127.0.0.1
    with RedisServer(tls=certificates) as server:
        query = f"ssl_ca_certs={certificates[2]}"
        limiter = create_limiter("redis", redis_url=f"rediss://redis.internal:{server.port}?{query}", rules=[RULE], deadline=2)
        with pytest.raises(StorageRefused, match="certificate of Redis is not accepted"):
            await limiter.check("user")
        await limiter.aclose()
        url = f"rediss://redis.internal:{server.port}?{query}&ssl_check_hostname=false"
        async with create_limiter("redis", redis_url=url, rules=[RULE], deadline=2) as limiter:
            assert (await limiter.check("user")).source == "redis"


@pytest.mark.parametrize(
    ("host", "place"),
    [
        ("127.0.0.1", (socket.AF_INET, ("127.0.0.1", 7))),
        ("::1", (socket.AF_INET6, ("::1", 7, 0, 0))),
        ("fe80::1%lo", None),
        ("localhost", None),
        ("", None),
        ("1.2.3", None),
    ],
)
def test_only_what_is_no_address_is_looked_up(host: str, place: Any) -> None:
    assert literal(host, 7) == place


async def test_all_addresses_of_a_name_are_tried(black_hole: tuple[str, int]) -> None:
    async def accept(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    async with await asyncio.start_server(accept, "127.0.0.1", 0) as server:
        good = socket.AF_INET, server.sockets[0].getsockname()
        refused = socket.AF_INET, ("127.0.0.1", free_port())
        for places in ([good], [refused, good], [(socket.AF_INET, black_hole), good], [good, refused]):
            began_s = time.monotonic()
            with await dial(places) as made:
                assert made.getpeername() == good[1]
            assert time.monotonic() - began_s < 1
        with pytest.raises(ConnectionRefusedError):
            await dial([refused, refused])
    assert len(asyncio.all_tasks()) == 1


async def test_an_address_whose_attempt_was_cancelled_by_others_leaves_the_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    real = names.connected

    async def connected(place: names.Place) -> socket.socket:
        if place[1] == ("127.0.0.1", 1):
            raise asyncio.CancelledError
        return await real(place)

    monkeypatch.setattr(names, "connected", connected)
    async with await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0) as server:
        bad, good = (socket.AF_INET, ("127.0.0.1", 1)), (socket.AF_INET, server.sockets[0].getsockname())
        with await dial([bad, good]) as made:
            assert made.getpeername() == good[1]
        with pytest.raises(StorageUnavailable, match="was cancelled by the client's own code"):
            await dial([bad, bad])


@pytest.mark.parametrize("what", ["name", "credentials"])
async def test_what_hangs_once_is_tried_again(protected: RedisServer, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    monkeypatch.setattr(aside, "HANGS_S", 0.6)
    released, real = threading.Event(), socket.getaddrinfo
    hung: list[str] = []

    def hang_once() -> None:
        if not hung:
            hung.append(what)
            released.wait(20)

    def look_up(host: Any, *args: Any, **kwargs: Any) -> Any:
        if what == "name":
            hang_once()
        return real("127.0.0.1" if host == "redis.internal" else host, *args, **kwargs)

    class Stuck(Tokens):
        def get_credentials(self) -> tuple[str, str]:
            if what == "credentials":
                hang_once()
            return "default", PASSWORD

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    client = redis.Redis(host="redis.internal", port=protected.port, credential_provider=Stuck())
    try:
        async with RateThrottleCore(RedisStorage(client, connect_timeout=0.3), rules=[RULE]) as limiter:
            await until(lambda: by_redis(limiter), 6)
        assert hung == [what]
    finally:
        released.set()


def test_what_always_hangs_takes_few_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aside, "HANGS_S", 0.0)
    released = threading.Event()
    shared = Shared(lambda: released.wait(20), "hangs")
    works = [shared.begin() for _ in range(5)]
    assert shared.count == THREADS_MAX
    assert len({id(work) for work in works}) == THREADS_MAX
    released.set()
    assert asyncio.run(works[-1].outcome())


# Credentials


class Tokens(redis.CredentialProvider):
    """Has only the synchronous method, as providers over boto3 do."""

    def __init__(self, takes_s: float = 0.4, password: str = PASSWORD) -> None:
        self.asked = 0
        self.takes_s, self.password = takes_s, password

    def get_credentials(self) -> tuple[str, str]:
        self.asked += 1
        time.sleep(self.takes_s)
        return "default", self.password


class AsyncTokens(Tokens):
    async def get_credentials_async(self) -> tuple[str, str]:
        self.asked += 1
        await asyncio.sleep(self.takes_s)
        return "default", self.password


@pytest.mark.parametrize("kind", [redis.Redis, redis.asyncio.Redis])
@pytest.mark.parametrize("provider", [Tokens, AsyncTokens])
async def test_slow_credentials_are_asked_for_once_off_the_loop(
    protected: RedisServer, kind: Any, provider: type[Tokens]
) -> None:
    tokens = provider()
    storage = RedisStorage(kind(port=protected.port, credential_provider=tokens))
    limiter = RateThrottleCore(storage, rules=[RULE])
    ends_s = time.monotonic() + 5
    slowest_s = 0.0
    while not await by_redis(limiter):
        assert time.monotonic() < ends_s
        began_s = time.monotonic()
        await asyncio.sleep(0.005)
        slowest_s = max(slowest_s, time.monotonic() - began_s)
    assert tokens.asked == limiter.statistics().attempts == 1
    assert slowest_s < 0.3  # the token's 0.4 s, on a busy machine
    await limiter.aclose()


async def test_a_token_that_came_too_late_is_for_the_next_attempt(protected: RedisServer) -> None:
    tokens = Tokens(0.5)
    storage = RedisStorage(redis.Redis(port=protected.port, credential_provider=tokens), connect_timeout=0.3)
    limiter = RateThrottleCore(storage, rules=[RULE])
    await until(lambda: by_redis(limiter), 4)
    assert tokens.asked == 1
    assert limiter.statistics().attempts >= 2
    await limiter.aclose()


@pytest.mark.parametrize("provider", [Tokens, AsyncTokens])
async def test_credentials_that_are_refused_are_asked_for_ever_more_seldom(
    protected: RedisServer, provider: type[Tokens]
) -> None:
    tokens = provider(0, "wr0ng")
    storage = RedisStorage(redis.asyncio.Redis(port=protected.port, credential_provider=tokens), deadline=2)
    limiter = RateThrottleCore(storage, rules=[RULE])
    ends_s = time.monotonic() + 3.5
    while time.monotonic() < ends_s:
        with pytest.raises(StorageRefused, match="password"):
            await limiter.check("user")
        await asyncio.sleep(0.01)
    assert 2 <= tokens.asked <= 5
    await limiter.aclose()


async def test_a_provider_that_fails_says_so() -> None:
    class Broken(Tokens):
        def get_credentials(self) -> tuple[str, str]:
            raise SystemExit("s3cret")

    class Strange(Tokens):
        def get_credentials(self) -> Any:
            return None

    with RedisServer() as server:
        for provider, words in ((Broken(), r"provider failed \(RuntimeError\)"), (Strange(), "gave neither")):
            client = redis.asyncio.Redis(port=server.port, credential_provider=provider)
            async with RateThrottleCore(RedisStorage(client, on_outage="raise"), rules=[RULE]) as limiter:
                with pytest.raises(StorageUnavailable, match=words) as raised:
                    await limiter.check("user")
                assert "s3cret" not in str(raised.value)


class Cancelled(Tokens):
    """A token library that cancels itself, or the task that it is called in, the first `times`."""

    def __init__(self, how: str, times: int = 1) -> None:
        super().__init__()
        self.how, self.times = how, times

    async def get_credentials_async(self) -> tuple[str, str]:
        self.asked += 1
        if self.asked <= self.times:
            if self.how == "itself":
                raise asyncio.CancelledError
            task = asyncio.current_task()
            assert task is not None
            task.cancel()
            await asyncio.sleep(1)
        return "default", PASSWORD


@pytest.mark.parametrize("how", ["itself", "its task"])
@pytest.mark.parametrize("whose", ["server", "master", "sentinel"])
async def test_a_provider_that_is_cancelled_has_failed_and_is_asked_again(protected: RedisServer, whose: str, how: str) -> None:
    tokens = Cancelled(how)
    async with FakeSentinel.naming(protected.port) as sentinel:
        client: Any = redis.asyncio.Redis(port=protected.port, credential_provider=tokens)
        if whose != "server":
            theirs: dict[str, Any] = {"credential_provider": tokens}
            manager: Any = redis.asyncio.sentinel.Sentinel(
                [sentinel.address], sentinel_kwargs=theirs if whose == "sentinel" else {}
            )
            client = manager.master_for("mymaster", **(theirs if whose == "master" else {"password": PASSWORD}))
        limiter = RateThrottleCore(RedisStorage(client, on_outage="raise", deadline=2), rules=[RULE])
        with (
            contextlib.suppress(StorageUnavailable)
            if whose == "sentinel"
            else pytest.raises(StorageUnavailable, match="cancelled by")
        ):
            await limiter.check("user")
        await until(lambda: served(limiter), 5)
        assert tokens.asked >= 2
        await limiter.aclose()


async def test_a_client_with_a_connect_function_of_its_own_still_connects(protected: RedisServer) -> None:
    called: list[str] = []

    async def theirs(connection: Any) -> None:
        await connection.on_connect()
        called.append(connection.host)

    client = redis.asyncio.Redis(port=protected.port, credential_provider=Tokens(0), redis_connect_func=theirs, db=1)
    async with RateThrottleCore(RedisStorage(client), rules=[RULE]) as limiter:
        assert (await limiter.check("user")).source == "redis"
    assert called == ["localhost"]


# Its end


HANGING = """
import asyncio, socket, sys, time, redis
from redis.credentials import CredentialProvider
from ratethrottle import RateThrottleCore, RateThrottleRule, RedisStorage, create_limiter
what, port, closes = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "closes"
def hang(host, *args, **kwargs):
    time.sleep(30)
class Tokens(CredentialProvider):
    def get_credentials(self):
        time.sleep(30)
if what == "name":
    socket.getaddrinfo = hang
    client = redis.Redis(host="redis.internal", port=port)
elif what == "credentials":
    client = redis.Redis(port=port, credential_provider=Tokens())
else:
    client = redis.Redis(port=port)
async def main():
    limiter = RateThrottleCore(RedisStorage(client), rules=[RateThrottleRule("r", 5, 60)])
    print((await limiter.check("user")).source)
    if closes:
        await limiter.aclose()
    return time.monotonic()
ended_s = asyncio.run(main())
print(time.monotonic() - ended_s < 2)  # 0.2 on a machine that has nothing else to do
sys.stdout.flush()
"""


@pytest.mark.parametrize("closes", ["closes", "doesn't"])
@pytest.mark.parametrize("what", ["name", "credentials", "server"])
def test_what_hangs_keeps_no_program_from_ending(what: str, closes: str) -> None:
    with RedisServer() as server:
        if what == "server":
            server.pause()
        began_s = time.monotonic()
        ended = subprocess.run(
            [sys.executable, "-X", "dev", "-W", "error", "-c", HANGING, what, str(server.port), closes],
            capture_output=True,
            text=True,
            timeout=25,
            check=False,
        )
        assert (ended.returncode, ended.stdout.split()) == (0, ["outage", "True"])
        noise = [line for line in ended.stderr.splitlines() if "outage" not in line and "Executing" not in line]
        assert noise == []
        assert time.monotonic() - began_s < 20


async def test_it_ends_at_any_moment_of_connecting(protected: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    Look(monkeypatch, 0.02)
    async with Far(protected.socket, 0.02) as far:
        for step in range(25):
            client = redis.Redis(host="redis.internal", port=far.port, credential_provider=Tokens(0.02))
            limiter = RateThrottleCore(RedisStorage(client), rules=[RULE])
            waiting = asyncio.ensure_future(limiter.check("user"))
            await asyncio.sleep(step * 0.005)
            async with asyncio.timeout(1):
                await limiter.aclose()
            await asyncio.gather(waiting, return_exceptions=True)
            names = [task.get_name() for task in asyncio.all_tasks()]
            assert [name for name in names if name.startswith("ratethrottle")] == []


async def test_a_winner_that_nobody_takes_any_more_is_closed() -> None:
    """Cancelled while the losers end, the race has a connection that nobody knows of."""
    discarded: list[str] = []
    begun, ending, may_end = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def begin(progress: Progress) -> str:
        if begun.is_set():
            return "winner"
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            ending.set()
            await may_end.wait()
        raise AssertionError(progress)

    async def now() -> None:
        return

    async def discard(result: str) -> None:
        discarded.append(result)

    for cancels in (False, True):
        for event in (begun, ending, may_end):
            event.clear()
        race = asyncio.ensure_future(Race(begin, Pace(now), discard).run())
        await ending.wait()  # the loser takes its time
        if cancels:
            race.cancel()
            with pytest.raises(asyncio.CancelledError):
                await race
        may_end.set()
        if not cancels:
            assert await race == "winner"
        assert discarded == ["winner"] * cancels
        await asyncio.gather(*(asyncio.all_tasks() - {asyncio.current_task(), race}), return_exceptions=True)


async def test_a_socket_is_closed_though_closing_its_connection_is_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[socket.socket] = []

    async def dial_one(places: list[names.Place]) -> socket.socket:
        made.append(await dial(places))
        return made[0]

    async def cancelled(_: object) -> None:
        raise asyncio.CancelledError

    monkeypatch.setattr(settings, "dial", dial_one)
    monkeypatch.setattr(settings, "close", cancelled)
    monkeypatch.setattr(settings, "through", lambda *_: {}["no connection is made"])
    async with await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0) as server:
        client = redis.asyncio.Redis(port=server.sockets[0].getsockname()[1], host="127.0.0.1")
        with pytest.raises(StorageUnavailable, match="cancelled"):
            await settings.Settings(client, 0.25).connect()
    assert made[0].fileno() == -1


# What is heard, and how often is tried


async def test_how_long_an_attempt_may_take_is_an_option_and_the_clients_own_timeouts_are_heard(
    black_hole: tuple[str, int],
) -> None:
    def took(**options: Any) -> float:
        return RedisStorage(redis.Redis(**options))._settings.connect_timeout_s

    assert (took(), took(socket_connect_timeout=8), took(socket_connect_timeout=0.1)) == (5, 8, 5)
    assert RedisStorage(redis.Redis(socket_connect_timeout=8), connect_timeout=2)._settings.connect_timeout_s == 2
    for wrong in (0, -1, 61, "1", True, float("nan")):
        with pytest.raises(ConfigurationError, match="connect_timeout is"):
            create_limiter("redis", redis_url="redis://localhost", connect_timeout=wrong)
    with RedisServer() as server:
        server.pause()
        for client, least_s in (
            (redis.asyncio.Redis(host=black_hole[0], port=black_hole[1], socket_connect_timeout=0.3), 0.25),
            (redis.asyncio.Redis(port=server.port, socket_timeout=0.3), 0.25),
            (redis.asyncio.Redis(unix_socket_path=str(server.socket), socket_timeout=0.3), 0.25),
        ):
            began_s = time.monotonic()
            async with RateThrottleCore(RedisStorage(client), rules=[RULE]):  # it waits for one attempt
                assert least_s < time.monotonic() - began_s < 1.5
        server.resume()


def test_attempts_get_rarer_and_fall_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice a second for the first 15 s, then more seldom; all processes at the same moments, within their jitter."""
    now_s = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now_s)
    monkeypatch.setattr(time, "time", lambda: 1_700_000_000.2 + now_s)
    two = Backoff(8), Backoff(8)
    turns: list[list[float]] = [[], []]
    for each, at in zip(two, turns, strict=True):
        now_s = 1000.0
        assert each.wait_s() == 0
        while now_s < 1200:
            each.failed()
            now_s += each.wait_s()
            at.append(now_s)
    for one, other in zip(*turns, strict=False):
        assert abs(one - other) <= JITTER_S
    gaps = [(at, after - at) for at, after in zip(turns[0], turns[0][1:], strict=False)]
    assert all(gap == pytest.approx(EVERY_S) for at, gap in gaps if at < 1014)
    assert all(gap == pytest.approx(EVERY_MOST_S) for at, gap in gaps if at > 1060)
    assert [round(gap, 1) for _, gap in gaps if round(gap, 1) in {1, 2}].count(2) >= 8
    two[0].succeeded()
    assert two[0].wait_s() == 0


def test_attempts_that_cost_a_token_get_rarer_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now_s)
    each = Backoff(8)
    waits = []
    for _ in range(10):
        each.failed(costly=True)
        waits.append(each.wait_s())
        now_s += waits[-1]
    assert waits[0] <= EVERY_S + JITTER_S
    assert all(EVERY_MOST_S / 2 <= wait_s <= EVERY_MOST_S for wait_s in waits[-3:])
    assert len({round(wait_s, 3) for wait_s in waits[-3:]}) == 3
    assert sum(waits[:4]) > 3 * EVERY_S


# TLS settings


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    return tuple(make_certificates(tmp_path_factory.mktemp("tls")))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"ssl_cert_reqs": "CERT_NONE"}, 'ssl_cert_reqs is "none", "optional" or "required"; write "none"'),
        ({"ssl_cert_reqs": "s3cret"}, 'ssl_cert_reqs is "none", "optional" or "required"'),
        ({"ssl_cert_reqs": 7}, "ssl_cert_reqs is"),
        ({"ssl_check_hostname": "s3cret"}, "ssl_check_hostname is True or False"),
        ({"ssl_ca_certs": "/s3cret/ca.pem"}, r"ssl_ca_certs can't be read \(No such file or directory\)"),
        ({"ssl_ca_certs": "{ca.key}"}, "ssl_ca_certs can't be used"),
        ({"ssl_ca_path": "/s3cret"}, "ssl_ca_path is no directory"),
        ({"ssl_ca_data": "s3cret"}, "ssl_ca_data can't be used"),
        ({"ssl_certfile": "/s3cret/c.pem", "ssl_keyfile": "/s3cret/k.pem"}, "ssl_certfile can't be read"),
        ({"ssl_certfile": "{server.crt}", "ssl_keyfile": "{ca.key}"}, "ssl_certfile and ssl_keyfile can't be used together"),
        ({"ssl_keyfile": "{ca.key}"}, "ssl_keyfile is given without ssl_certfile"),
        ({"ssl_ciphers": "s3cret"}, "ssl_ciphers can't be used"),
        ({"ssl_include_verify_flags": ["s3cret"]}, "ssl_include_verify_flags can't be used"),
        ({"ssl_min_version": "s3cret"}, "ssl_min_version can't be used"),
    ],
)
@pytest.mark.parametrize("kind", [redis.Redis, redis.asyncio.Redis])
def test_tls_settings_that_can_not_work_are_refused_before_any_connection(
    certificates: tuple[Path, ...], kind: Any, settings: dict[str, Any], words: str
) -> None:
    if not settings.keys() <= inspect.signature(redis.asyncio.connection.SSLConnection.__init__).parameters.keys():
        pytest.skip("this redis-py doesn't know the setting")
    folder = certificates[0].parent
    given = {
        name: str(folder / value[1:-1]) if isinstance(value, str) and value.startswith("{") else value
        for name, value in settings.items()
    }
    with pytest.raises(ConfigurationError, match=words) as refused:
        RedisStorage(kind(ssl=True, **given))
    assert "s3cret" not in str(refused.value)
    assert refused.value.__context__ is None
    manager: Any = redis.asyncio.sentinel.Sentinel([("a", 1)], sentinel_kwargs={"ssl": True, **given})
    with pytest.raises(ConfigurationError, match=words):
        RedisStorage(manager.master_for("m"))


# Clients of others


@pytest.mark.parametrize(
    ("module", "name", "words"),
    [
        ("valkey.asyncio.client", "Valkey", "not a Valkey of valkey-py; redis-py speaks to Valkey and Redis alike"),
        ("valkey.client", "Valkey", "pass RedisStorage.from_url"),
        ("valkey.asyncio.connection", "ConnectionPool", "not a pool, ConnectionPool of valkey-py"),
        ("coredis.client.basic", "Redis", "not a Redis of coredis"),
        ("coredis.pool.basic", "ConnectionPool", "of coredis"),
        ("redis.asyncio.connection", "ConnectionPool", r"pass redis.asyncio.Redis\(connection_pool=pool\)"),
        ("redis.cluster", "RedisCluster", "clusters are not supported yet"),
        ("redis.sentinel", "Sentinel", "pass sentinel.master_for"),
        ("elsewhere", "Thing", "takes a client of redis-py .*, not a Thing$"),
    ],
)
def test_what_is_no_client_of_ours_is_named_with_what_to_pass(module: str, name: str, words: str) -> None:
    kind = type(name, (), {"__module__": module})
    with pytest.raises(ConfigurationError, match=words):
        RedisStorage(kind())
    with pytest.raises(ConfigurationError, match="the class"):
        RedisStorage(kind)


def test_a_url_in_the_place_of_a_client_is_not_repeated() -> None:
    with pytest.raises(ConfigurationError, match="from_url") as refused:
        RedisStorage("redis://:s3cret@localhost")
    assert "s3cret" not in str(refused.value)
