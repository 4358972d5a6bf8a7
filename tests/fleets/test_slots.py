"""Eight processes hold slots through a real Redis, while some are killed or stand still, and Redis loses its data."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from ratethrottle import ConcurrencyRule
from tests.kit.forked import CONTEXT
from tests.kit.holder import KEY, START_S, Holding, Work, monotonic_us, most_held, read_holdings, run_process
from tests.kit.servers import RedisServer, SentinelTopology

PROCESSES, LIMIT, TTL_S = 8, 5, 1.5
RULE = ConcurrencyRule("db", LIMIT, TTL_S)


class Fleet:
    """Processes that hold slots, and what happens to them."""

    def __init__(self, url: str, path: Path, run_s: float) -> None:
        seed = random.randrange(10**9)
        print(f"seed {seed}")
        self.rng = random.Random(seed)
        self.together = CONTEXT.Barrier(PROCESSES + 1)
        self.works = [Work(url, RULE, n, seed, path / f"{n}.log", self.together, run_s) for n in range(PROCESSES)]
        self.processes = [CONTEXT.Process(target=run_process, args=(work,), daemon=True) for work in self.works]
        self.killed: dict[int, int] = {}  # when
        self.frozen: dict[int, list[tuple[int, int]]] = {}

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        try:
            for process in self.processes:
                process.start()
            self.together.wait(START_S)
            yield
            for process in self.processes:
                process.join(START_S)
        finally:
            for process in self.processes:
                if process.pid:
                    process.kill()
        expected = [-signal.SIGKILL if n in self.killed else 0 for n in range(PROCESSES)]
        assert [process.exitcode for process in self.processes] == expected

    def kill(self, number: int) -> None:
        self.processes[number].kill()
        self.processes[number].join()
        self.killed[number] = monotonic_us()

    def freeze(self, number: int, for_s: float) -> None:
        """Have a process stand still."""
        pid = self.processes[number].pid
        assert pid is not None
        began_us = monotonic_us()
        os.kill(pid, signal.SIGSTOP)
        time.sleep(for_s)
        os.kill(pid, signal.SIGCONT)
        self.frozen.setdefault(number, []).append((began_us, monotonic_us()))

    def holdings(self) -> list[Holding]:
        found: list[Holding] = []
        for work in self.works:
            ended_us = self.killed.get(work.number, monotonic_us())
            found += read_holdings(work, ended_us, self.frozen.get(work.number, ()))
        return found


def check(fleet: Fleet, holdings: list[Holding]) -> None:
    """Never more than the limit was held, and all of it was used, by every process that lived to the end."""
    most, at_us = most_held(holdings)
    assert most <= LIMIT, [each for each in holdings if each.since_us <= at_us <= each.until_us]
    assert most == LIMIT
    served = {each.process for each in holdings}
    assert served >= set(range(PROCESSES)) - set(fleet.killed)
    # What dead processes held goes to others in time: after that these hold all there is. What stood still then lapses too.
    stood_us = [over_us for stood in fleet.frozen.values() for _, over_us in stood]
    free_us = max([*fleet.killed.values(), *stood_us]) + round((TTL_S + 1) * 1e6)
    after = [each for each in holdings if each.process not in fleet.killed and each.until_us > free_us]
    assert max(each.since_us for each in after) > free_us + 500_000, "the run is too short to tell"
    after = [each._replace(since_us=max(each.since_us, free_us)) for each in after]
    assert most_held(after)[0] == LIMIT, "what a dead process held is not free in time"


def check_states(client: redis.Redis) -> None:
    keys = client.keys(f"*db@slots:={KEY}") + client.keys("*:slots")
    assert keys
    assert all(client.pttl(key) > 0 for key in keys)


@pytest.mark.redis
@pytest.mark.slow
def test_never_more_than_the_limit_is_held_while_processes_die_and_stand_still(
    redis_server: RedisServer, redis_client: redis.Redis, tmp_path: Path
) -> None:
    fleet = Fleet(redis_server.url, tmp_path, 10)
    with fleet.running():
        time.sleep(0.7)
        fleet.kill(0)
        fleet.freeze(1, TTL_S / 2)
        fleet.freeze(2, TTL_S + 0.3)
        fleet.kill(3)
        fleet.freeze(4, TTL_S + 0.05)
        fleet.freeze(1, TTL_S * 2 / 3)
        time.sleep(0.2)
        fleet.kill(6)
        time.sleep(TTL_S + 1)
    check(fleet, fleet.holdings())
    check_states(redis_client)


def flush(server: RedisServer) -> None:
    with server.client() as client:
        client.flushall()


def restart(server: RedisServer) -> None:
    server.stop()
    server.start()


def stall(server: RedisServer) -> None:
    server.pause()
    time.sleep(TTL_S * 0.8)
    server.resume()


@pytest.mark.redis
@pytest.mark.slow
@pytest.mark.parametrize("lose", [flush, restart, stall])
def test_never_more_than_the_limit_is_held_when_redis_loses_its_data_or_stands_still(
    lose: Callable[[RedisServer], Any], tmp_path: Path
) -> None:
    with RedisServer() as server:
        fleet = Fleet(server.url, tmp_path, 10)
        with fleet.running():
            time.sleep(1)
            for _ in range(2):
                lose(server)
                time.sleep(0.5 + fleet.rng.random())
            fleet.kill(5)
            time.sleep(TTL_S + 1)
        check(fleet, fleet.holdings())
        with server.client() as client:
            check_states(client)


@pytest.mark.redis
@pytest.mark.slow
@pytest.mark.parametrize("planned", [True, False])
def test_never_more_than_the_limit_is_held_when_another_server_takes_over(tmp_path: Path, planned: bool) -> None:
    with SentinelTopology() as topology:
        hosts = ",".join(f"{host}:{port}" for host, port in topology.addresses)
        fleet = Fleet(f"redis+sentinel://{hosts}/{topology.name}", tmp_path, 12 if planned else 16)
        with fleet.running():
            time.sleep(1.5)
            since_s = time.monotonic()
            if planned:
                topology.failover()
            else:
                topology.nodes[0].stop()
                topology.switched(since_s)
            time.sleep(1)
            fleet.kill(5)
            time.sleep(TTL_S + 1)
        check(fleet, fleet.holdings())
        with topology.master.client() as client:
            check_states(client)
