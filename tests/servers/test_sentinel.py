"""The master is found through its sentinels, and followed: whichever of them is away, frozen or wrong."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import inspect
import time
import warnings
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Any

import pytest
import redis
import redis.asyncio.sentinel
import redis.sentinel

from ratethrottle import RateThrottleCore, RateThrottleRule, RedisStorage, create_limiter
from ratethrottle.errors import StorageError, StorageRefused, StorageUnavailable
from ratethrottle.storage.redis import topology
from ratethrottle.storage.redis.settings import Address, Settings, close
from ratethrottle.storage.redis.topology import Master
from tests.kit.recovery import healed, sure, until
from tests.kit.sentinel import FakeSentinel
from tests.kit.servers import RedisServer, SentinelTopology, eventually, free_port

MANY = RateThrottleRule("many", 1_000_000, 60, strategy="fixed_window", on_outage="raise")


def unheard(before: str, after: str) -> None:
    """Nobody wants to know that the master has moved."""


@pytest.fixture(scope="module")
def calm() -> Iterator[SentinelTopology]:
    """For tests that leave it as they found it."""
    with SentinelTopology() as started:
        yield started


@pytest.fixture
def stormy() -> Iterator[SentinelTopology]:
    with SentinelTopology() as started:
        yield started


@pytest.fixture
def suspicious(monkeypatch: pytest.MonkeyPatch) -> None:
    """A master may be suspected at once, not only half a second after it was found."""
    monkeypatch.setattr(topology, "TRUST_S", 0.0)


def settings(addresses: list[Address], deadline_s: float = 2.0, **more: Any) -> Settings:
    return Settings(redis.asyncio.sentinel.Sentinel(addresses, **more).master_for("mymaster"), deadline_s)


def ours() -> list[str]:
    """The library's tasks that run."""
    return [task.get_name() for task in asyncio.all_tasks() if task.get_name().startswith("ratethrottle")]


@asynccontextmanager
async def following(addresses: list[Address], deadline_s: float = 2.0, **more: Any) -> AsyncIterator[Master]:
    followed = topology.master(settings(addresses, deadline_s, **more), unheard)
    try:
        yield followed
    finally:
        await followed.aclose()
    assert ours() == []


async def port_found(followed: Master) -> int:
    """Connect, and say to which port."""
    connection = await followed.connect()
    port: int = connection.port  # type: ignore[attr-defined]  # those over TCP have one
    await close(connection)
    return port


# Discovery


@pytest.mark.parametrize("kind", [redis.sentinel.Sentinel, redis.asyncio.sentinel.Sentinel])
async def test_a_sentinel_client_of_either_kind_leads_to_the_master(calm: SentinelTopology, kind: Any) -> None:
    storage = RedisStorage(kind(calm.addresses).master_for("mymaster"), deadline=2)
    async with RateThrottleCore(storage, rules=[MANY]) as limiter:
        assert (await limiter.check("user")).source == "redis"
    with calm.nodes[0].client() as client:
        assert client.keys("*:many:=user")


async def test_a_task_factory_of_the_old_shape_goes_with_sentinels(calm: SentinelTopology) -> None:
    asyncio.get_running_loop().set_task_factory(lambda loop, work: asyncio.Task(work, loop=loop))
    storage = RedisStorage(redis.asyncio.sentinel.Sentinel(calm.addresses).master_for("mymaster"), deadline=2)
    async with RateThrottleCore(storage, rules=[MANY]) as limiter:
        assert (await limiter.check("user")).source == "redis"


async def test_a_url_or_options_lead_to_the_master(calm: SentinelTopology) -> None:
    hosts = ",".join(f"127.0.0.1:{port}" for _, port in calm.addresses)
    ways: list[dict[str, Any]] = [
        {"redis_url": f"redis+sentinel://{hosts}/mymaster/3"},
        {"redis_url": "redis:///3", "sentinels": hosts.split(","), "master_name": "mymaster"},
        {"redis_url": "redis://?db=3", "sentinels": calm.addresses, "master_name": "mymaster"},
    ]
    for number, way in enumerate(ways):
        async with create_limiter("redis", rules=[MANY], deadline=2, **way) as limiter:
            assert (await limiter.check(f"way{number}")).source == "redis"
        with calm.nodes[0].client(db=3) as client:
            assert client.keys(f"*:many:=way{number}")


@pytest.mark.usefixtures("suspicious")
async def test_with_one_sentinel_frozen_and_one_gone_it_is_found_within_300_ms(stormy: SentinelTopology) -> None:
    async with following(stormy.addresses) as followed:
        stormy.sentinels[0].pause()
        stormy.sentinels[1].stop()
        for _ in range(2):
            began_s = time.monotonic()
            assert await port_found(followed) == stormy.nodes[0].port
            assert time.monotonic() - began_s < 0.3
            followed.suspect()


async def test_with_the_first_sentinel_black_holed_it_is_found_within_300_ms(calm: SentinelTopology, black_hole: Address) -> None:
    async with FakeSentinel(None) as mute:
        for first in (black_hole, mute.address):
            for others in (calm.addresses, calm.addresses[:1]):
                async with following([first, *others]) as followed:
                    began_s = time.monotonic()
                    assert await port_found(followed) == calm.nodes[0].port
                    assert time.monotonic() - began_s < 0.3


async def test_a_sentinel_that_lies_is_not_followed(calm: SentinelTopology, black_hole: Address) -> None:
    """Each lie beside three that tell the truth, and beside one."""
    master, replica = calm.nodes[0].port, calm.nodes[1].port
    lies = {
        "replica": FakeSentinel.naming(replica),
        "sentinel": FakeSentinel.naming(calm.sentinels[0].port),
        "nobody": FakeSentinel.naming(free_port()),
        "a black hole": FakeSentinel.naming(black_hole[1]),
        "garbage": FakeSentinel.naming(99_999, "no host\r"),
        "text": FakeSentinel(b"$5\r\nhello\r\n"),
        "error": FakeSentinel(b"-ERR go away\r\n"),
        "nothing": FakeSentinel(b"*-1\r\n"),
    }

    async def found(fake: FakeSentinel, others: list[Address]) -> list[int]:
        """Where it leads to, before and after it says that the master has moved; and each move that it announces."""
        followed, moves = topology.master(settings([fake.address, *others]), unheard), []
        followed.watch(lambda: moves.append(0))
        try:
            before = await port_found(followed)
            await asyncio.sleep(0.1)
            fake.say(b"mymaster 127.0.0.1", b"%d" % master, b"127.0.0.1", b"%d" % replica)
            await asyncio.sleep(1.2)
            return [before, await port_found(followed), *moves]
        finally:
            await followed.aclose()

    async with AsyncExitStack() as stack:
        cases = {
            f"{lie}, beside {len(others)}": (await stack.enter_async_context(FakeSentinel(fake.reply)), others)
            for lie, fake in lies.items()
            for others in (calm.addresses, calm.addresses[:1])
        }
        where = dict(zip(cases, await asyncio.gather(*(found(*case) for case in cases.values())), strict=True))
    assert where == {key: [master, master] for key in cases}
    assert ours() == []


async def test_where_all_sentinels_name_a_replica_it_is_refused(calm: SentinelTopology) -> None:
    async with FakeSentinel.naming(calm.nodes[1].port) as fake, following([fake.address]) as followed:
        began_s = time.monotonic()
        with pytest.raises(StorageUnavailable, match="says that it is a replica"):
            await followed.connect()
        assert time.monotonic() - began_s < 0.5


async def test_where_two_masters_are_named_that_of_most_sentinels_is_taken(calm: SentinelTopology) -> None:
    with RedisServer() as stale:
        async with FakeSentinel.naming(stale.port) as fake:
            for _ in range(5):
                async with following([fake.address, *calm.addresses]) as followed:
                    assert await port_found(followed) == calm.nodes[0].port


async def test_errors_say_that_sentinels_name_no_master_or_are_away() -> None:
    async with FakeSentinel(b"*-1\r\n") as fake:
        async with following([fake.address, ("127.0.0.1", free_port())]) as followed:
            with pytest.raises(StorageUnavailable, match="none of 2 sentinels names a master 'mymaster'"):
                await followed.connect()
        async with following([("127.0.0.1", free_port())]) as followed:
            with pytest.raises(StorageUnavailable, match="none of 1 sentinels answers"):
                await followed.connect()


@pytest.mark.skipif(
    "force_master_ip" not in inspect.signature(redis.asyncio.sentinel.Sentinel).parameters, reason="this redis-py can't"
)
async def test_the_host_can_be_forced(calm: SentinelTopology) -> None:
    fake = FakeSentinel.naming(calm.nodes[0].port, "192.0.2.1")
    async with fake, following([fake.address], force_master_ip="127.0.0.1") as followed:
        assert await port_found(followed) == calm.nodes[0].port


async def test_many_at_once_share_one_search_and_a_cancelled_one_takes_nobody_along(calm: SentinelTopology) -> None:
    async with FakeSentinel.naming(calm.nodes[0].port) as fake, following([fake.address]) as followed:
        first = asyncio.ensure_future(port_found(followed))
        others = [asyncio.ensure_future(port_found(followed)) for _ in range(20)]
        await asyncio.sleep(0)
        first.cancel()
        assert await asyncio.gather(*others) == [calm.nodes[0].port] * 20
        await asyncio.sleep(0.1)
        assert fake.connections == 2  # for questions, and to listen


async def test_a_sentinel_that_is_away_is_tried_at_most_twice_a_second() -> None:
    async with FakeSentinel(b"-ERR go away\r\n") as fake, following([fake.address]) as followed:
        until_s = time.monotonic() + 1.9
        while time.monotonic() < until_s:
            with contextlib.suppress(StorageUnavailable):  # what is counted are the connections
                await followed.connect()
            await asyncio.sleep(0.005)
        assert 2 <= fake.connections <= 4


# Credentials


def test_credentials_of_sentinels_and_nodes_are_apart() -> None:
    with SentinelTopology(password="n0de", sentinel_password="s3ntinel") as protected:
        hosts = ",".join(f"127.0.0.1:{port}" for _, port in protected.addresses)

        async def check(user: str, query: str) -> str:
            url = f"redis+sentinel://{user}@{hosts}/mymaster{query}"
            async with create_limiter("redis", redis_url=url, rules=[MANY], deadline=2) as limiter:
                return (await limiter.check("user")).source

        assert asyncio.run(check(":n0de", "?sentinel_password=s3ntinel")) == "redis"
        for user, query, words in (
            (":n0de", "", "sentinels refuse the user or the password"),
            (":n0de", "?sentinel_password=wr0ng", "sentinels refuse the user or the password"),
            (":wr0ng", "?sentinel_password=s3ntinel", "Redis refused the user or the password"),
        ):
            with pytest.raises(StorageRefused, match=words) as refused:
                asyncio.run(check(user, query))
            assert not {"wr0ng", "s3ntinel", "n0de"} & set(str(refused.value).replace(":", " ").split())


# Following


class Traffic:
    """Checks all the time, and notes when each was answered, and by which node."""

    def __init__(self, nodes: SentinelTopology, limiter: RateThrottleCore) -> None:
        self.answers: list[float] = []
        self.failures: list[float] = []
        self._nodes = nodes
        self._limiter = limiter
        self._running = True

    async def run(self) -> None:
        number = 0
        while self._running:
            number += 1
            try:
                await self._limiter.check(f"user:{number}")
            except StorageError:
                self.failures.append(time.monotonic())
            else:
                self.answers.append(time.monotonic())
            await asyncio.sleep(0.005)

    def stop(self) -> None:
        self._running = False

    async def answered_after(self, since_s: float) -> bool:
        """Whether Redis has answered since. How soon it must is for the rows of the fault board, on a machine that does nothing else."""
        return any(at_s > since_s for at_s in self.answers)


@asynccontextmanager
async def traffic(nodes: SentinelTopology) -> AsyncIterator[Traffic]:
    storage = RedisStorage.from_url(sentinels=nodes.addresses, master_name=nodes.name)
    async with RateThrottleCore(storage, rules=[MANY]) as limiter:
        checking = Traffic(nodes, limiter)
        task = asyncio.create_task(checking.run())
        try:
            await until(lambda: sure(limiter), 5)
            yield checking
        finally:
            checking.stop()
            await task


async def elsewhere(work: Callable[[], Any]) -> Any:
    """Let what blocks run beside the loop."""
    return await asyncio.get_running_loop().run_in_executor(None, work)


def decided(node: RedisServer) -> int:
    """How many script calls a node has run."""
    with node.client() as client:
        return int(client.info("commandstats").get("cmdstat_evalsha", {}).get("calls", 0))


@pytest.mark.slow
async def test_a_killed_master_is_left_and_its_heir_answers(stormy: SentinelTopology) -> None:
    async with traffic(stormy) as checking:
        killed_s = time.monotonic()
        stormy.nodes[0].stop()
        switched_s = await elsewhere(lambda: stormy.switched(killed_s))
        await until(partial(checking.answered_after, switched_s), 10)


@pytest.mark.slow
async def test_a_frozen_master_is_left_for_good(stormy: SentinelTopology) -> None:
    async with traffic(stormy) as checking:
        frozen_s = time.monotonic()
        stormy.nodes[0].pause()
        switched_s = await elsewhere(lambda: stormy.switched(frozen_s))
        await until(partial(checking.answered_after, switched_s), 10)
        stormy.nodes[0].resume()
        await asyncio.sleep(0.3)
        before = decided(stormy.nodes[0])
        await asyncio.sleep(0.5)
        assert decided(stormy.nodes[0]) == before
        assert decided(stormy.master) > 0


@pytest.mark.slow
async def test_after_a_planned_failover_the_old_master_is_left_while_it_still_answers(stormy: SentinelTopology) -> None:
    async with traffic(stormy) as checking:
        for _ in range(2):
            old = stormy.master
            switched_s = await elsewhere(stormy.failover)
            await asyncio.sleep(max(0.0, switched_s + 0.5 - time.monotonic()))
            before = decided(old)
            await asyncio.sleep(1)
            assert decided(old) == before
            await until(partial(checking.answered_after, switched_s), 10)
        assert checking.answers[-1] > switched_s


async def test_a_failover_is_followed_while_one_sentinel_lies_and_by_the_poll_alone(stormy: SentinelTopology) -> None:
    async with FakeSentinel.naming(stormy.nodes[0].port) as stale, FakeSentinel.naming(stormy.nodes[0].port) as silent:
        fresh = asyncio.Event()
        async with following([stormy.addresses[0], silent.address, stale.address]) as followed:
            followed.watch(fresh.set)
            assert await port_found(followed) == stormy.nodes[0].port
            await elsewhere(stormy.failover)
            await elsewhere(lambda: eventually(lambda: stormy.master is not stormy.nodes[0]))
            # One of three: not yet. Its fellow says nothing of its own accord, but the next question brings it out.
            await asyncio.sleep(1.5)
            assert not fresh.is_set()
            silent.reply = FakeSentinel.naming(stormy.master.port).reply
            await asyncio.wait_for(fresh.wait(), 1.5)
            assert await port_found(followed) == stormy.master.port


@pytest.mark.usefixtures("suspicious")
async def test_a_master_that_was_made_a_replica_by_hand_is_never_handed_out(stormy: SentinelTopology) -> None:
    async with following(stormy.addresses, 0.5) as followed:
        moves: list[float] = []
        followed.watch(lambda: moves.append(time.monotonic()))
        assert await port_found(followed) == stormy.nodes[0].port
        with stormy.nodes[0].client() as client:
            client.replicaof("127.0.0.1", stormy.nodes[1].port)
        with pytest.raises(StorageUnavailable, match="says that it is a replica"):
            await followed.connect()
        followed.suspect()
        followed.suspect()
        assert moves == []  # not from within
        await asyncio.sleep(0)
        assert len(moves) <= 1


@pytest.mark.usefixtures("suspicious")
async def test_readonly_makes_every_connection_look_again(stormy: SentinelTopology) -> None:
    storage = RedisStorage.from_url(sentinels=stormy.addresses, master_name=stormy.name, deadline=2)
    async with RateThrottleCore(storage, rules=[MANY]) as limiter:
        assert (await limiter.check("user")).allowed
        with stormy.nodes[0].client() as client:
            client.replicaof("127.0.0.1", stormy.nodes[1].port)
            with pytest.raises(StorageUnavailable, match="replica"):
                await limiter.check("user")
            with pytest.raises(StorageUnavailable, match="replica"):
                await limiter.check("user")
            client.replicaof("NO", "ONE")
            await healed(limiter)
            assert (await limiter.check("user")).allowed


# Endings


async def test_nothing_is_left_when_it_is_closed_or_forgotten(calm: SentinelTopology) -> None:
    noise: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: noise.append(context))
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for closed in (True, False):
            storage = RedisStorage.from_url(sentinels=calm.addresses, master_name="mymaster", deadline=2)
            limiter = RateThrottleCore(storage, rules=[MANY])
            assert (await limiter.check("user")).allowed
            if closed:
                await limiter.aclose()
                assert ours() == []
            del limiter, storage
            gc.collect()
            for _ in range(10):
                await asyncio.sleep(0.01)
        gc.collect()
    assert (noise, warned) == ([], [])
    assert ours() == []


@pytest.mark.parametrize("frozen", [False, True])
def test_a_loop_that_ends_leaves_no_noise(calm: SentinelTopology, frozen: bool) -> None:
    noise: list[Any] = []

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: noise.append(context))
        storage = RedisStorage.from_url(sentinels=calm.addresses, master_name="mymaster", deadline=2)
        limiter = RateThrottleCore(storage, rules=[MANY])
        if frozen:
            asyncio.ensure_future(limiter.check("user"))  # noqa: RUF006  # left behind: that is the test
            await asyncio.sleep(0.001)
        else:
            await limiter.check("user")

    asyncio.run(main())
    gc.collect()
    assert noise == []


def test_it_ends_when_it_is_closed_at_any_moment_of_connecting(calm: SentinelTopology) -> None:
    """Until Python 3.12 asyncio.wait_for can lose a cancellation, and redis-py writes through it where it may."""

    async def main(after_s: float) -> None:
        followed = topology.master(settings(calm.addresses), unheard)
        connecting = asyncio.ensure_future(followed.connect())
        await asyncio.sleep(after_s)
        connecting.cancel()
        await asyncio.wait_for(followed.aclose(), 10)
        assert ours() == []
        await asyncio.wait([connecting])
        if not connecting.cancelled() and not connecting.exception():
            await close(connecting.result())

    for step in range(100):
        asyncio.run(main(step * 0.00004))


async def test_a_connect_that_waits_when_it_is_closed_raises(black_hole: Address) -> None:
    followed = topology.master(settings([black_hole]), unheard)
    waiting = asyncio.ensure_future(followed.connect())
    await asyncio.sleep(0.05)
    await followed.aclose()
    with pytest.raises(StorageUnavailable, match="closed"):
        await waiting
    with pytest.raises(StorageUnavailable, match="closed"):
        await followed.connect()
    assert ours() == []


async def test_a_single_server_never_moves(redis_server: RedisServer) -> None:
    single = topology.master(Settings(redis.asyncio.Redis(port=redis_server.port), 2), unheard)
    single.watch(lambda: pytest.fail("it moved"))
    assert await port_found(single) == redis_server.port
    single.suspect()
    single.abandon()
    await single.aclose()


async def test_a_prefix_is_cleared_on_the_master_that_sentinels_name(calm: SentinelTopology) -> None:
    """And not on whatever listens on the usual port."""
    storage = RedisStorage.from_url(sentinels=calm.addresses, master_name="mymaster", prefix="cleared", deadline=2)
    async with RateThrottleCore(storage, rules=[RateThrottleRule("r", 5, 60)]) as limiter:
        assert (await limiter.check("user")).source == "redis"
        with calm.master.client() as client:
            assert client.keys("cleared:*=user")
            await storage.clear()
            assert not client.keys("cleared:*=user")
    assert not ours()
