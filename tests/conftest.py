"""Fixtures that every test may ask for: real servers, and a fake one."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable, Iterator

import fakeredis
import pytest
import redis
import uvloop
from hypothesis import HealthCheck, settings

from ratethrottle.storage._shared.repair import Repair
from ratethrottle.storage.redis import storage
from ratethrottle.storage.redis.holders import Here
from ratethrottle.storage.redis.sharing import SHARING
from tests.kit.servers import RedisServer
from tests.kit.strategies import STRATEGIES

# Ours is loaded wherever the package is installed; a checkout need not be.
pytest_plugins = ["pytest_ratethrottle", "pytester"]

# How long an example takes says how busy the machine is.
settings.register_profile("suite", deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Two for each processor: most tests wait most of the time, for a server or for another process."""
    return 2 * (os.cpu_count() or 1)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave out what differs in nothing that its test is about; and begin with the slow ones, so that none of them ends last."""
    items[:] = [item for item in items if not repeats(item)]
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_asyncio_loop_factories(item: pytest.Item) -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Asynchronous tests run on asyncio's own loop, and those that are marked `uvloop` once more on that."""
    loops: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {"asyncio": asyncio.new_event_loop}
    if item.get_closest_marker("uvloop"):
        loops["uvloop"] = uvloop.new_event_loop
    return loops


def repeats(item: pytest.Item) -> bool:
    """Whether it runs another strategy on uvloop. A loop knows nothing of strategies: one of them is enough there."""
    params = item.callspec.params.values() if isinstance(item, pytest.Function) and hasattr(item, "callspec") else ()
    return uvloop.new_event_loop in params and any(strategy in params for strategy in STRATEGIES[1:])


@pytest.fixture(scope="session")
def shared_redis_server() -> Iterator[RedisServer]:
    """One server for all tests that leave it as they found it; ask for `redis_server`, which flushes it."""
    with RedisServer() as server:
        yield server


@pytest.fixture
def redis_server(shared_redis_server: RedisServer) -> RedisServer:
    """A real server with no data and no scripts. Don't stop or reconfigure it: start a `RedisServer` of your own for that."""
    with shared_redis_server.client() as client:
        client.flushall()
        client.script_flush()
    return shared_redis_server


@pytest.fixture(autouse=True)
def of_this_test_only() -> None:
    """What a limiter of another test knows, which wasn't closed there, is of data that was flushed."""
    SHARING._known.clear()


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have each storage of the test be a process of its own to Redis, as if it were in one."""
    monkeypatch.setattr(storage, "SHARING", Apart())


class Apart:
    """Shares nothing."""

    def find(self, _what: object, user: object, make: Callable[[], Repair]) -> Repair:
        made = make()
        made.users.add(user)
        return made

    def held(self, _repair: Repair) -> Here:
        return Here()


@pytest.fixture
def redis_url(redis_server: RedisServer) -> str:
    """The URL of `redis_server`."""
    return redis_server.url


@pytest.fixture
def redis_client(redis_server: RedisServer) -> Iterator[redis.Redis]:
    """A synchronous client of `redis_server` for the test's own look at what is stored."""
    with redis_server.client() as client:
        yield client


@pytest.fixture
def fake_server() -> fakeredis.FakeServer:
    """A fake server of this test's own; give it to `fakeredis.FakeRedis(server=...)` or `FakeAsyncRedis`."""
    return fakeredis.FakeServer()


@pytest.fixture
def black_hole() -> Iterator[tuple[str, int]]:
    """An address where connecting itself never ends: a listener whose queue is full."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(3):
            client = stack.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(listener.getsockname())
        yield listener.getsockname()
