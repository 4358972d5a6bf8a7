"""The code of docs/distributed.rst runs as it stands, and what it makes works."""

from __future__ import annotations

import re
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from ratethrottle import RateThrottleCore, RateThrottleRule
from tests.servers import RedisServer, eventually, executable, free_port

PAGE = Path(__file__).parent.parent / "docs" / "distributed.rst"
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


def test_the_page_has_its_two_blocks_and_running_them_connects_to_nothing() -> None:
    first, second = blocks()
    assert isinstance(run(first)["limiter"], RateThrottleCore)
    assert isinstance(run(second)["limiter"], RateThrottleCore)


async def test_clients_that_hit_different_servers_share_the_same_limit(hosts: Any, redis_server: RedisServer) -> None:
    hosts("redis-server", 6379, redis_server.port)
    servers = [run(blocks()[0])["limiter"] for _ in range(3)]
    decisions = [await servers[i % 3].check("client") for i in range(1010)]
    assert sum(map(bool, decisions)) == 1000
    assert decisions[-1].source == "redis"
    for server in servers:
        await server.aclose()


async def test_the_synchronous_sentinel_client_of_the_page_is_taken_as_it_is(hosts: Any, redis_server: RedisServer, tmp_path: Path) -> None:
    watch = f"sentinel monitor mymaster 127.0.0.1 {redis_server.port} 2"
    with ExitStack() as stack:
        for number in (1, 2, 3):
            hosts(f"sentinel-{number}", 26379, stack.enter_context(sentinel(tmp_path / str(number), watch)))
        limiter = run(blocks()[1])["limiter"]
        limiter.add_rule(RateThrottleRule("api_limit", 2, 60))
        assert [bool(await limiter.check("client")) for _ in range(3)] == [True, True, False]
        await limiter.aclose()
