"""Eight processes check several limits at once through a real Redis, and one of them is killed: each rule keeps its own promise."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import pytest

from ratethrottle import RateThrottleRule
from ratethrottle.testing.intervals import Bracketed, check_bracketed
from tests.kit.forked import CONTEXT
from tests.kit.payer import KEYS, START_S, Work, read_log, run_process
from tests.kit.servers import RedisServer
from tests.kit.strategies import STRATEGIES

PROCESSES, RUN_S, KILLED = 8, 2.0, 2
LIMIT = 60
RULES = [RateThrottleRule(strategy, LIMIT + 20 * i, 1, strategy=strategy) for i, strategy in enumerate(STRATEGIES)]


@pytest.mark.redis
@pytest.mark.slow
def test_eight_processes_keep_the_promise_of_every_rule_that_they_name(redis_server: RedisServer, tmp_path: Path) -> None:
    redis_server.grow_old()
    seed = random.randrange(10**9)
    print(f"seed {seed}")
    together = CONTEXT.Barrier(PROCESSES + 1)
    works = [
        Work(redis_server.url, RULES, number, seed, tmp_path / f"{number}.log", together, RUN_S) for number in range(PROCESSES)
    ]
    processes = [CONTEXT.Process(target=run_process, args=(work,), daemon=True) for work in works]
    try:
        for process in processes:
            process.start()
        together.wait(START_S)
        time.sleep(RUN_S / 2)
        processes[KILLED].kill()
        for process in processes:
            process.join(START_S)
    finally:
        for process in processes:
            if process.pid:
                process.kill()
    assert [process.exitcode for process in processes] == [-signal.SIGKILL if i == KILLED else 0 for i in range(PROCESSES)]

    entries = [entry for work in works for entry in read_log(work.log)]
    for index, rule in enumerate(RULES):
        for place, key in enumerate(KEYS):
            log: list[Bracketed] = [
                (before, after, units) for one, at, units, before, after in entries if (one, at) == (index, place)
            ]
            check_bracketed(rule, log)
            # Nor is much lost on the way, though others veto: as much as one window grants, at least.
            assert sum(units for _, _, units in log) >= rule.limit, f"{rule.name} of {key} was hardly used"
