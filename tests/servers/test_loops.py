"""Loops and processes that come, go and stand still: what one of them leaves behind stays out of the others' way."""

from __future__ import annotations

import asyncio
import gc
import os
import time
import warnings
from collections.abc import Coroutine, Iterator
from typing import Any

import anyio
import fakeredis
import pytest

from ratethrottle import RateThrottleCore, RateThrottleRule, RedisStorage, create_limiter
from ratethrottle.events import Event
from ratethrottle.storage.redis.backoff import EVERY_S, Backoff
from tests.kit.recovery import until
from tests.kit.servers import RedisServer, free_port

RULE = RateThrottleRule("r", 1_000_000, 60)


@pytest.fixture
def loops() -> Iterator[list[asyncio.AbstractEventLoop]]:
    made = [asyncio.new_event_loop() for _ in range(2)]
    yield made
    for loop in made:
        loop.close()


def test_loops_that_were_closed_without_ending_their_tasks_leave_room(redis_server: RedisServer) -> None:
    limiter = create_limiter("redis", redis_url=redis_server.url, rules=[RULE], on_outage="raise", max_connections=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tasks and sockets that were left behind
        for _ in range(5):
            loop = asyncio.new_event_loop()
            loop.set_exception_handler(lambda _loop, _context: None)
            assert loop.run_until_complete(limiter.check("user")).source == "redis"
            loop.close()
        asyncio.run(limiter.aclose())
        del limiter
        gc.collect()


def test_a_loop_that_stands_still_with_a_control_call_keeps_nobody_away(
    redis_server: RedisServer, loops: list[asyncio.AbstractEventLoop]
) -> None:
    limiter = create_limiter("redis", redis_url=redis_server.url, rules=[RULE], expected_processes=1)
    still, other = loops

    async def some(count: int) -> list[str]:
        return [decision.source for decision in await asyncio.gather(*(limiter.check(f"user {i}") for i in range(count)))]

    async def until_redis() -> float:
        began = time.monotonic()
        while (await some(1)) != ["redis"]:  # noqa: ASYNC110  # what is waited for is an answer
            await asyncio.sleep(0.05)
        return time.monotonic() - began

    still.run_until_complete(some(3000))
    other.run_until_complete(some(1))
    redis_server.client().flushall()
    still.run_until_complete(some(1))  # it hears of the loss, begins to tell what it knows, and isn't run any more
    assert other.run_until_complete(asyncio.wait_for(until_redis(), 5)) < 2

    storage = limiter._storage
    assert isinstance(storage, RedisStorage)

    async def answered() -> bool:
        return storage._open[still][0].batch.calls_in_flight == 0

    still.run_until_complete(until(answered))
    for loop in loops:
        loop.run_until_complete(limiter._storage.aclose())
        loop.run_until_complete(asyncio.sleep(0.05))


async def test_aclose_in_a_cancelled_scope_ends_all_connections(redis_server: RedisServer) -> None:
    with anyio.move_on_after(0.1):
        async with create_limiter("redis", redis_url=redis_server.url, rules=[RULE], connections=3) as limiter:
            await limiter.check("user")
            await anyio.sleep_forever()

    async def ended() -> bool:
        return not [task for task in asyncio.all_tasks() if task.get_name().startswith("ratethrottle")]

    await until(ended)


def test_the_end_of_an_outage_is_announced_though_the_loop_that_met_it_is_gone() -> None:
    server = RedisServer()
    limiter = create_limiter(
        "redis", redis_url=f"redis://127.0.0.1:{server.port or free_port()}/0", rules=[RULE], expected_processes=1
    )
    told: list[Event] = []
    limiter.on_event(told.append)

    async def until_by(source: str) -> None:
        while (await limiter.check("user")).source != source:  # noqa: ASYNC110  # as above
            await asyncio.sleep(0.05)

    asyncio.run(until_by("outage"))
    with server:
        asyncio.run(until_by("redis"))
    assert [event.kind for event in told] == ["outage_began", "outage_ended"]


def test_a_loop_that_is_gone_keeps_no_breaker_open(loops: list[asyncio.AbstractEventLoop]) -> None:
    with RedisServer() as server:
        limiter = create_limiter("redis", redis_url=server.url, rules=[RULE], expected_processes=1)

        async def until_by(source: str) -> None:
            while (await limiter.check("user")).source != source:  # noqa: ASYNC110  # as above
                await asyncio.sleep(0.05)

        async def failed() -> bool:
            return limiter.statistics().breaker == "open"

        loops[0].run_until_complete(until_by("redis"))
        server.stop()
        loops[0].run_until_complete(until_by("outage"))
        loops[0].run_until_complete(until(failed))  # the attempt at once
        asyncio.run(until_by("outage"))
        assert limiter.statistics().breaker != "closed"
        server.start()
        loops[0].run_until_complete(until_by("redis"))
        assert limiter.statistics().breaker == "closed"
        loops[0].run_until_complete(limiter.aclose())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system can't fork")
def test_a_forked_child_has_all_connections_to_itself(redis_server: RedisServer, loops: list[asyncio.AbstractEventLoop]) -> None:
    url = redis_server.url
    limiter = create_limiter("redis", redis_url=url, rules=[RULE], on_outage="raise", connections=2, max_connections=2)
    loops[0].run_until_complete(asyncio.wait_for(limiter.check_many(["a", "b", "c", "d"]), 5))
    name = limiter._storage.repair.process_id
    child = os.fork()
    if not child:
        code = 1
        try:
            asyncio.run(limiter._storage.open())
            code = 2 if limiter._storage.repair.process_id == name else 3
            if code == 3 and asyncio.run(limiter.check_many(["a", "b", "c", "d"])):
                code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    loops[0].run_until_complete(limiter.aclose())


def test_a_clock_that_is_set_back_delays_no_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    set_back_s = 0.0
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() - set_back_s)
    turns = Backoff(8)
    turns.failed()
    first_s = turns.wait_s()
    set_back_s = 300
    second_s = turns.wait_s()
    assert first_s < second_s <= first_s + 2 * EVERY_S


def of_the_old_shape(loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
    """What many tracing tools set: it takes neither a name nor a context."""
    return asyncio.Task(work, loop=loop)


def factories() -> list[Any]:
    eager = getattr(asyncio, "eager_task_factory", None)  # from 3.12
    return [of_the_old_shape, *([eager] if eager else [])]


@pytest.mark.parametrize("factory", factories())
async def test_any_task_factory_goes_with_the_library(
    factory: Any, redis_server: RedisServer, fake_server: fakeredis.FakeServer
) -> None:
    asyncio.get_running_loop().set_task_factory(factory)
    fake = fakeredis.FakeAsyncRedis(server=fake_server)
    async with (
        create_limiter("redis", redis_url=redis_server.url, rules=[RULE], deadline=5, require_storage=True) as limiter,
        RateThrottleCore(RedisStorage(fake, deadline=5), rules=[RULE]) as faked,
    ):
        one = asyncio.get_running_loop().create_task(limiter.check("user"))
        several = await asyncio.gather(*(limiter.check("user", cost=2) for _ in range(3)), limiter.peek("user"))
        assert {decision.source for decision in [await one, await faked.check("user"), *several]} == {"redis"}
    await fake.aclose()


async def test_a_task_factory_isnt_asked_for_the_librarys_own_tasks(redis_server: RedisServer) -> None:
    asked: list[str] = []

    def counting(loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        asked.append(getattr(work, "__qualname__", type(work).__name__))
        return asyncio.Task(work, loop=loop)

    asyncio.get_running_loop().set_task_factory(counting)
    async with create_limiter("redis", redis_url=redis_server.url, rules=[RULE], deadline=5) as limiter:
        await asyncio.get_running_loop().create_task(limiter.check("user"))
    assert [name for name in asked if name.startswith(("Connection", "PendingDecision"))] == ["PendingDecision"]
