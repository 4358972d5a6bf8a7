"""The code of docs/distributed.rst runs as it stands, and what it makes works."""

from __future__ import annotations

import asyncio
import hashlib
import re
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from ratethrottle import RateThrottleCore, RateThrottleRule, StorageError
from tests.kit.servers import RedisServer, eventually, executable, free_port

PAGE = Path(__file__).parents[2] / "docs" / "distributed.rst"
BLOCK = re.compile(r"^\.\. code-block:: python\n\n((?:    .*\n|\n)+)", re.MULTILINE)


def blocks() -> list[str]:
    return ["\n".join(line[4:] for line in block.splitlines()) for block in BLOCK.findall(PAGE.read_text())]


def run(block: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(compile(block, str(PAGE), "exec"), names)
    return names


@pytest.fixture
def hosts(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, int, int], None]]:
    """Let the page's host names lead to servers of the test."""
    known: dict[tuple[str, int], int] = {}
    resolve = socket.getaddrinfo

    def getaddrinfo(host: Any, port: Any, *args: Any, **kwargs: Any) -> Any:
        name = host.decode() if isinstance(host, bytes) else host
        if (name, int(port or 0)) in known:
            return resolve("127.0.0.1", known[name, int(port)], *args, **kwargs)
        return resolve(host, port, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)

    def lead(host: str, port: int, real: int) -> None:
        known[host, port] = real

    return lead


@contextmanager
def sentinel(directory: Path, watch: str) -> Iterator[int]:
    """A sentinel process; yields its port."""
    directory.mkdir()
    port = free_port()
    config = directory / "sentinel.conf"
    config.write_text(f"port {port}\nbind 127.0.0.1\ndir {directory}\n{watch}\n")
    process = subprocess.Popen([executable("redis-server"), str(config), "--sentinel"], stdout=subprocess.DEVNULL)
    try:
        eventually(lambda: answers(port))
        yield port
    finally:
        process.kill()
        process.wait()


def answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 0.5).close()
    except OSError:
        return False
    return True


async def connected(limiter: RateThrottleCore) -> None:
    """Wait for the first answer: on a busy machine a first connection can take longer than the page's default deadline."""
    give_up = asyncio.get_running_loop().time() + 20
    while True:
        try:
            await limiter.peek("somebody else")
        except StorageError:
            assert asyncio.get_running_loop().time() < give_up
            await asyncio.sleep(0.05)
        else:
            return


def test_the_page_is_the_one_that_was_asked_for() -> None:
    # Where it and we disagree, we are wrong.
    assert hashlib.sha256(PAGE.read_bytes()).hexdigest() == "02af263cde09f492dcd08604248fd3ca8643bf3dcde53301483db5c029d76085"


def test_the_page_has_its_two_blocks_and_running_them_connects_to_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_io(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the page's code does I/O")

    monkeypatch.setattr(socket, "getaddrinfo", no_io)
    monkeypatch.setattr(socket, "socket", no_io)
    first, second = blocks()
    made = run(first)
    assert isinstance(made["limiter"], RateThrottleCore)
    assert list(made["limiter"].rules.values()) == [made["rule"]]
    assert (made["rule"].name, made["rule"].limit, made["rule"].window_us) == ("api_limit", 1000, 60_000_000)
    assert isinstance(run(second)["limiter"], RateThrottleCore)


async def test_clients_that_hit_different_servers_share_the_same_limit(hosts: Any, redis_server: RedisServer) -> None:
    hosts("redis-server", 6379, redis_server.port)
    servers: list[RateThrottleCore] = [run(blocks()[0])["limiter"] for _ in range(3)]

    async def clients(server: RateThrottleCore) -> int:
        return sum([bool(await server.check("client")) for _ in range(400)])

    for server in servers:
        await connected(server)
    admitted = await asyncio.gather(*map(clients, servers))
    assert sum(admitted) == 1000
    assert all(admitted)
    assert (await servers[0].peek("client")).source == "redis"
    for server in servers:
        await server.aclose()


async def test_the_synchronous_sentinel_client_of_the_page_is_taken_as_it_is(
    hosts: Any, redis_server: RedisServer, tmp_path: Path
) -> None:
    watch = f"sentinel monitor mymaster 127.0.0.1 {redis_server.port} 2"
    with ExitStack() as stack:
        for number in (1, 2, 3):
            hosts(f"sentinel-{number}", 26379, stack.enter_context(sentinel(tmp_path / str(number), watch)))
        limiter = run(blocks()[1])["limiter"]
        limiter.add_rule(RateThrottleRule("api_limit", 2, 60))
        await connected(limiter)
        assert [bool(await limiter.check("client")) for _ in range(3)] == [True, True, False]
        await limiter.aclose()
