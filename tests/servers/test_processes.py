"""How many processes share the limits: which are counted, when a count is believed, and what a fleet's heartbeats cost Redis."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import fakeredis
import pytest
import redis

from ratethrottle import RateThrottleCore, RateThrottleRule, RedisStorage, create_limiter
from ratethrottle.errors import StorageRefused
from ratethrottle.storage.redis.scripts import script
from tests.kit.processes import Process, World
from tests.kit.recovery import served, until
from tests.kit.servers import RedisServer

LIMIT = 100
LATEST_US = 2**53 - 1  # beyond the year 2255
RULE = RateThrottleRule("r", LIMIT, 3600)


def limiter_of(url: str, **options: Any) -> RateThrottleCore:
    return create_limiter("redis", redis_url=url, rules=[RULE], **options)


async def admitted_alone(limiters: list[RateThrottleCore], key: str = "user") -> int:
    """How much they admit together that can't ask Redis any more."""
    decisions = [await limiter.check(key) for _ in range(2 * LIMIT) for limiter in limiters]
    assert {decision.source for decision in decisions} == {"outage"}
    return sum(decision.allowed for decision in decisions)


def shares(limiter: RateThrottleCore) -> int:
    """Of how many processes this one takes itself for one."""
    storage = limiter._storage
    assert isinstance(storage, RedisStorage)
    return storage.repair.shares.n


# Limiters of one process


async def test_each_storage_of_a_process_tells_of_a_loss() -> None:
    with RedisServer() as server, server.client() as client:
        told: list[list[str]] = [[], []]
        async with create_limiter("redis", redis_url=server.url) as one, create_limiter("redis", redis_url=server.url) as another:
            for limiter, kinds in zip((one, another), told, strict=True):
                limiter.add_rule(RateThrottleRule("r", 10, 60))
                limiter.on_event(lambda event, kinds=kinds: kinds.append(event.kind))
                assert (await limiter.check("user")).allowed
            client.flushall()

            async def both() -> bool:
                return all("state_lost" in kinds for kinds in told)

            await until(both)
            await asyncio.sleep(0.3)
            assert [kinds.count("state_lost") for kinds in told] == [1, 1]


async def test_limiters_of_one_process_are_one_process_with_one_account() -> None:
    with RedisServer() as server:
        limiters = [limiter_of(server.url, connections=connections) for connections in (1, 1, 2, 1)]
        for limiter in limiters:
            assert await served(limiter)
        await until(lambda: settled(limiters, 1))
        assert all(limiter.statistics().processes == 1 for limiter in limiters)
        assert (await limiters[0].check("user")).allowed
        server.stop()
        assert await admitted_alone(limiters) == LIMIT - 1
        for limiter in limiters:
            await limiter.aclose()


async def settled(limiters: list[RateThrottleCore], processes: int) -> bool:
    for limiter in limiters:
        await limiter.peek("other")
    return all(shares(limiter) == processes for limiter in limiters)


async def test_a_process_leaves_with_its_last_limiter(redis_server: RedisServer, redis_client: redis.Redis) -> None:
    one, other = limiter_of(redis_server.url), limiter_of(redis_server.url)
    for limiter in (one, other):
        await limiter.check("user")
    await one.aclose()
    assert redis_client.zcard("ratethrottle:processes") == 1
    assert (await other.check("user")).allowed
    await other.aclose()
    assert redis_client.zcard("ratethrottle:processes") == 0
    # What it was doesn't outlive it.
    async with limiter_of(redis_server.url) as limiter:
        assert limiter.statistics().bounds == 0


async def test_what_one_limiter_hears_of_a_key_the_others_know(redis_url: str) -> None:
    async with limiter_of(redis_url) as one, limiter_of(redis_url) as other:
        await other.check("warm")
        assert (await one.check("user", cost=LIMIT)).allowed
        assert not await one.check("user")
        assert (await other.check("user")).source == "prefilter"
        await one.reset("user")
        assert (await other.check("user")).allowed


@pytest.mark.parametrize("options", [{"prefix": "app"}, {"tags": 32, "prefix": "other"}])
async def test_other_keys_are_another_account(redis_url: str, options: dict[str, Any]) -> None:
    async with limiter_of(redis_url) as one, limiter_of(redis_url, **options) as other:
        for limiter in (one, other):
            assert (await limiter.check("user", cost=LIMIT)).allowed


async def test_only_what_is_known_to_be_the_same_server_is_shared() -> None:
    def knowledge(client: Any) -> Any:
        return RedisStorage(client).repair

    one, other = fakeredis.FakeServer(), fakeredis.FakeServer()
    kept = [RedisStorage(fakeredis.FakeAsyncRedis(server=one)), RedisStorage(redis.Redis(host="LOCALHOST", db=1))]
    assert knowledge(fakeredis.FakeRedis(server=one)) is kept[0].repair
    assert knowledge(fakeredis.FakeRedis(server=other)) is not kept[0].repair
    assert knowledge(redis.asyncio.Redis(host="localhost", port=6379, db=1, username="u", password="p")) is kept[1].repair
    for elsewhere in ({"db": 2}, {"db": 1, "port": 6380}, {"db": 1, "host": "h"}, {"db": 1, "unix_socket_path": "/tmp/redis"}):
        assert knowledge(redis.Redis(**elsewhere)) is not kept[1].repair

    class Tunnel(redis.asyncio.Connection):
        pass

    class Another(redis.asyncio.Connection):
        pass

    pools = [redis.asyncio.ConnectionPool(connection_class=kind, db=1) for kind in (Tunnel, Another)]
    through = [RedisStorage(redis.asyncio.Redis(connection_pool=pool)) for pool in pools]
    assert len({id(storage.repair) for storage in (kept[1], *through)}) == 3
    assert knowledge(redis.asyncio.Redis(connection_pool=pools[0])) is through[0].repair
    sentinel = redis.asyncio.Sentinel([("a", 1), ("b", 2)])
    kept.append(RedisStorage(sentinel.master_for("m")))
    assert knowledge(redis.asyncio.Sentinel([("b", 2), ("a", 1)]).master_for("m")) is kept[2].repair
    assert knowledge(sentinel.master_for("n")) is not kept[2].repair


# When a count is believed


def test_a_count_is_not_believed_before_it_is_settled(redis_client: redis.Redis) -> None:
    """A Redis that is up for 0.4 s at a time: the first process to come isn't alone."""
    world = World(redis_client)
    fleet = [Process(world, expected=4) for _ in range(4)]
    for life in range(8):
        for process in fleet:
            process.connection.connect_at_us = world.t_us + 100_000 * (
                (process is not fleet[0]) * (1 + fleet.index(process) * life % 3)
            )
        for _ in range(8):
            turn(world, fleet)
            assert [process.repair.shares.n for process in fleet] == [4] * 4
        world.fail_over({})
        world.t_us += 600_000
        assert [process.repair.shares.n for process in fleet] == [4] * 4
    # One that lives is believed, when it says as many as before, and when it says fewer.
    for process in fleet:
        process.connection.connect_at_us = 0
    for _ in range(60):
        turn(world, fleet)
    assert [process.repair.fleet.processes for process in fleet] == [process.repair.shares.n for process in fleet] == [4] * 4
    left = fleet[1:3]
    for process in (fleet[0], fleet[3]):
        process.connection.lose()
    for _ in range(90):
        turn(world, left)
    assert [process.repair.shares.n for process in left] == [2, 2]


def turn(world: World, fleet: list[Process]) -> None:
    """50 ms, in which each of them looks whether it is time to connect, and says what there is to say."""
    for process in fleet:
        if not process.connection.batch.open and world.t_us >= process.connection.connect_at_us:
            process.connection.connect()
        process.round_trip()
    world.t_us += 50_000


def test_no_process_that_heard_nothing_takes_itself_for_alone_at_once(redis_client: redis.Redis) -> None:
    world = World(redis_client)
    process = Process(world)
    turn(world, [process])
    assert (process.repair.fleet.processes, process.repair.shares.n) == (1, 0)
    for _ in range(15):
        turn(world, [process])
    assert process.repair.shares.n == 1


# A large fleet


class Fleet:
    """Ids of processes that are counted by the script, as by a process that sends nothing else."""

    def __init__(self, client: redis.Redis, prefix: str = "ratethrottle") -> None:
        self.client = client
        self.keys = (f"{prefix}:epoch", f"{prefix}:processes")
        self.sha = client.script_load(script("beat").body(shebang=True))
        self.run = client.info("server")["run_id"]
        self.beats = 0

    def beat(self, first: int, end: int, purpose: str = "count") -> Any:
        pipeline = self.client.pipeline(transaction=False)
        for i in range(first, end):
            pipeline.evalsha(self.sha, 2, *self.keys, "r", self.run, 0, f"{i:016x}", purpose, "0", 0)
        self.beats += end - first
        return pipeline.execute()


@pytest.mark.slow
async def test_in_a_large_fleet_a_beat_is_a_bit() -> None:
    """Counted by the commands that Redis runs: most beats are no script any more, and yet all is heard of in time."""
    with RedisServer() as server, server.client() as client:
        fleet = Fleet(client)
        size = 200
        async with limiter_of(server.url, expected_processes=1) as limiter:
            await limiter.check("user")

            async def go_on(seconds: float, until: Callable[[], bool] = lambda: False) -> bool:
                ends_s = time.monotonic() + seconds
                while time.monotonic() < ends_s:
                    await asyncio.to_thread(fleet.beat, 0, size)
                    await asyncio.sleep(0.4)
                    await limiter.check("other")
                    if until():
                        return True
                return False

            assert await go_on(5, lambda: limiter.statistics().processes == size + 1)
            await go_on(1)
            client.config_resetstat()
            calls, fleet.beats = limiter.statistics().calls, 0
            await go_on(4)
            ran = {name: told["calls"] for name, told in client.info("commandstats").items()}
            scripts = ran["cmdstat_evalsha"] - fleet.beats - (limiter.statistics().calls - calls)
            # What a script does is counted as well: a counted process sets two bits.
            marks = ran["cmdstat_setbit"] - 2 * (fleet.beats + scripts)
            assert scripts <= 2
            assert marks >= 4
            assert limiter.statistics().processes == size + 1
            # Others leave, others come, and the data is lost.
            await asyncio.to_thread(fleet.beat, 150, size, "leave")
            size = 150
            assert await go_on(5, lambda: limiter.statistics().processes == size + 1)
            assert await go_on(9, lambda: shares(limiter) == size + 1), "the smaller number is believed"
            client.flushall()
            assert await go_on(5, lambda: limiter.statistics().epoch_changes == 1)
            assert await go_on(5, lambda: limiter.statistics().processes == size + 1)
            size = 0
            assert await go_on(9, lambda: limiter.statistics().processes == 1)


# Two layouts under one prefix


@pytest.mark.parametrize("policy", ["allow", "local"])
@pytest.mark.parametrize(
    ("options", "words", "layout"),
    [
        ({"tags": 32}, "tags=64, and this storage has tags=32, so", b"tags=32,parts=0"),
        ({"tag_parts": 2}, "tags=64, and this storage has tags=64, tag_parts=2, so", b"tags=64,parts=2"),
    ],
)
async def test_two_layouts_under_one_prefix_are_refused(
    redis_url: str, redis_client: redis.Redis, policy: str, options: dict[str, int], words: str, layout: bytes
) -> None:
    async with limiter_of(redis_url) as one:
        await one.check("user")
        other = limiter_of(redis_url, **options, on_outage=policy)
        with pytest.raises(StorageRefused, match=words):
            await other.check("user")
        await other.aclose()
        assert (await one.check("user")).allowed
        # The processes that were there before write what was flushed again.
        redis_client.flushall()

        async def written() -> bool:
            await one.check("user")
            return redis_client.get("ratethrottle:layout") == b"tags=64,parts=0"

        await until(written)
    # Once nobody has it any more, it may be changed.
    redis_client.delete("ratethrottle:layout")
    async with limiter_of(redis_url, **options) as other:
        await other.check("user")
        assert redis_client.get("ratethrottle:layout") == layout


# What a server can't have said


@pytest.mark.parametrize(
    ("place", "number"),
    [
        (0, 2**53),
        (1, 9_999_999_999_999_998),
        (1, 2**53 - 1),
        (1, 0),
        (2, 9_999_999_999_999_999),
        (3, 10**9),
        (4, 10**9),
        (5, 1),
        (5, 10**6),
        (6, 2**60),
        (7, 10**6),
        (8, 2**60),
    ],
)
def test_a_number_that_no_server_can_say_is_not_taken_up(redis_client: redis.Redis, place: int, number: int) -> None:
    world = World(redis_client)
    process = Process(world, expected=2)
    lies: list[int] = [number]
    broken: list[str] = []

    def tamper(request: Any, reply: Any) -> Any:
        if request.mode == "beat" and lies:
            reply[1 + place] = lies.pop()
        return reply

    process.connection.tamper = tamper
    process.connection.broken = lambda what: (broken.append(what), process.connection.lose())  # type: ignore[method-assign]  # the test hears of it
    for _ in range(20):
        turn(world, [process])
    assert broken
    assert process.connection.batch.serving
    assert process.repair.epoch <= world.server_us()
    assert process.repair.fleet.processes == 1


@pytest.mark.parametrize(("mode", "place"), [("check", 1), ("reset", 1), ("reset", 2), ("check", -1)])
@pytest.mark.parametrize("number", [2**53 - 1, 10**17])
def test_a_time_that_no_clock_says_is_not_taken_up(redis_client: redis.Redis, mode: str, place: int, number: int) -> None:
    """Neither the time of a reply nor a key's generation."""
    world = World(redis_client)
    process, rule = Process(world), RULE.compiled
    for _ in range(3):
        turn(world, [process])
    process.ask([("k", rule, 1)], "reset")  # from then on a check hears the key's generation
    turn(world, [process])
    broken: list[str] = []
    lies = [number] if place != 1 or number > LATEST_US else []

    def tamper(request: Any, reply: Any) -> Any:
        if request.mode == mode and lies:
            reply[place] = lies.pop()
        return reply

    process.connection.tamper = tamper
    process.connection.broken = lambda what: (broken.append(what), process.connection.lose())  # type: ignore[method-assign]  # the test hears of it
    process.ask([("k", rule, 1)], mode)
    turn(world, [process])
    assert len(broken) == (place != 1 or number > LATEST_US)
    for _ in range(8):
        turn(world, [process])
    process.ask([("k", rule, 1)], mode)
    turn(world, [process])
    assert process.connection.batch.serving
    assert process.connection.batch.calls_in_flight == process.connection.batch.callers == 0


async def test_a_process_that_met_a_corrupt_epoch_goes_on(redis_url: str, redis_client: redis.Redis) -> None:
    async with limiter_of(redis_url) as limiter:
        await limiter.check("user")
        for number in (9_999_999_999_999_998, 9_999_999_999_999_999, 2**53):
            value = redis_client.get("ratethrottle:epoch")
            assert isinstance(value, bytes)
            redis_client.set("ratethrottle:epoch", value[:40] + b"%016d" % number + value[56:])
            await until(lambda: is_served(limiter))


async def is_served(limiter: RateThrottleCore) -> bool:
    await asyncio.sleep(0.01)
    return (await limiter.check("other")).source == "redis"


async def test_a_reset_waits_while_processes_tell_redis_what_it_has_lost(redis_url: str, redis_client: redis.Redis) -> None:
    async with limiter_of(redis_url) as one, limiter_of(redis_url) as other:
        for limiter in (one, other):
            assert (await limiter.check("user", cost=LIMIT // 2)).allowed
        redis_client.flushall()
        await until(lambda: noticed(one))
        await other.reset("user")
        assert (await other.peek("user")).remaining == LIMIT


async def noticed(limiter: RateThrottleCore) -> bool:
    await limiter.check("other")
    return limiter.statistics().epoch_changes == 1
