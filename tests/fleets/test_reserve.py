"""Six processes reserve, settle and charge through a real Redis, and two are killed in the middle of reservations."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections import defaultdict
from pathlib import Path

import pytest
import redis

from ratethrottle import RateThrottleCore, RateThrottleRule, RedisStorage
from ratethrottle.testing.intervals import Bracketed, check_bracketed
from tests.kit.forked import CONTEXT
from tests.kit.reserver import CHARGED, CHARGES, ESTIMATE_MOST, GRANTED, KEY, SETTLES, START_S, Work, read_log, run_process
from tests.kit.servers import RedisServer
from tests.kit.strategies import STRATEGIES

PROCESSES, RUN_S, KILLED, CLIENTS = 6, 2.5, (1, 4), 6
SHORT = [RateThrottleRule(strategy, 60 + 20 * i, 1, strategy=strategy) for i, strategy in enumerate(STRATEGIES)]
# Nothing leaves these while the test runs, so that they tell all that was ever counted.
LONG = [
    RateThrottleRule(f"long_{strategy}", 10**6, 10 * 86_400, strategy=strategy) for strategy in ("sliding_window", "fixed_window")
]
RULES = [*SHORT, *LONG]


class Tally:
    """What processes were granted, by rule."""

    def __init__(self) -> None:
        self.used: defaultdict[int, list[Bracketed]] = defaultdict(list)
        self.least: defaultdict[int, int] = defaultdict(int)  # units that must be counted
        self.most: defaultdict[int, int] = defaultdict(int)  # and that may be
        self.unsettled = 0  # reservations of killed processes

    def add(self, log: Path, killed: bool) -> None:
        """Take up what a process did, up to where it was killed."""
        done = read_log(log)
        settles = {one: units for what, one, _, units, _, _ in done if what == SETTLES}
        for what, one, index, units, before_us, after_us in done:
            if what == CHARGES:
                self.most[index] += units
            elif what == CHARGED:
                self.least[index] += units
            elif what == GRANTED:
                kept = settles.get(one, units)
                self.used[index].append((before_us, after_us, kept))
                self.least[index] += kept
                self.most[index] += units if killed else kept  # it may be killed before it has told Redis
                self.unsettled += killed and one not in settles
        if killed:  # what it was granted, and had no time to note
            for index in range(len(RULES)):
                self.most[index] += CLIENTS * ESTIMATE_MOST


def run(works: list[Work]) -> None:
    """Run processes, and kill some of them."""
    processes = [CONTEXT.Process(target=run_process, args=(work,), daemon=True) for work in works]
    try:
        for process in processes:
            process.start()
        works[0].together.wait(START_S)
        for killed in KILLED:
            time.sleep(RUN_S / 3)
            processes[killed].kill()
        for process in processes:
            process.join(START_S)
    finally:
        for process in processes:
            if process.pid:
                process.kill()
    assert [process.exitcode for process in processes] == [-signal.SIGKILL if i in KILLED else 0 for i in range(PROCESSES)]


@pytest.mark.redis
@pytest.mark.slow
def test_what_processes_have_used_keeps_every_promise_and_nothing_is_lost_or_counted_twice(
    redis_server: RedisServer, redis_client: redis.Redis, tmp_path: Path
) -> None:
    redis_server.grow_old()
    seed = random.randrange(10**9)
    print(f"seed {seed}")
    together = CONTEXT.Barrier(PROCESSES + 1)
    run([Work(redis_server.url, RULES, n, seed, tmp_path / f"{n}.log", together, RUN_S) for n in range(PROCESSES)])

    tally = Tally()
    for number in range(PROCESSES):
        tally.add(tmp_path / f"{number}.log", number in KILLED)
    assert tally.unsettled, "nobody was killed within a reservation"
    for index, rule in enumerate(SHORT):
        check_bracketed(rule, [entry for entry in tally.used[index] if entry[2]])
        assert sum(units for _, _, units in tally.used[index]) >= rule.limit // 2, f"{rule.name} was hardly used"
    for index in range(len(SHORT), len(RULES)):
        assert tally.least[index] <= counted(redis_server.url, RULES[index]) <= tally.most[index]
    assert all(redis_client.pttl(key) > 0 for key in redis_client.keys("ratethrottle:*=*")), "a state has no expiry"


def counted(url: str, rule: RateThrottleRule) -> int:
    """Units that Redis has counted under a rule that nothing has left yet."""

    async def ask() -> int:
        async with RateThrottleCore(RedisStorage.from_url(url, deadline=10), rules=[rule]) as limiter:
            return rule.limit - (await limiter.peek(KEY, cost=0)).remaining

    return asyncio.run(ask())
