"""Eight processes spend from leases through a real Redis: some far busier than others, one is stopped for a while, one is killed."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from ratethrottle import RateThrottleRule
from ratethrottle.testing.intervals import Bracketed, check_bracketed
from tests.kit.forked import CONTEXT
from tests.kit.lessee import START_S, Work, read_log, run_process
from tests.kit.servers import RedisServer
from tests.kit.strategies import STRATEGIES

PROCESSES, RUN_S = 8, 2.0
LIMIT, LEASE_TTL_S = 200, 0.1
STOPPED, KILLED = 1, 2
RULES = [RateThrottleRule(strategy, LIMIT, 1, strategy=strategy) for strategy in STRATEGIES]


@pytest.mark.redis
@pytest.mark.slow
def test_eight_processes_with_leases_keep_every_promise(redis_server: RedisServer, tmp_path: Path) -> None:
    redis_server.grow_old()
    together = CONTEXT.Barrier(PROCESSES + 1)
    leasing = [replace(rule, lease=True, lease_ttl=LEASE_TTL_S) for rule in RULES]
    works = [Work(redis_server.url, leasing, number, tmp_path / f"{number}.log", together, RUN_S) for number in range(PROCESSES)]
    processes = [CONTEXT.Process(target=run_process, args=(work,), daemon=True) for work in works]
    try:
        for process in processes:
            process.start()
        together.wait(START_S)
        for _ in range(3):
            time.sleep(0.2)
            os.kill(processes[STOPPED].pid, signal.SIGSTOP)
            time.sleep(3 * LEASE_TTL_S)
            os.kill(processes[STOPPED].pid, signal.SIGCONT)
        processes[KILLED].kill()
        for process in processes:
            process.join(START_S)
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):  # it has ended already
                if process.pid:
                    os.kill(process.pid, signal.SIGCONT)
                    process.kill()
    assert [process.exitcode for process in processes] == [-signal.SIGKILL if i == KILLED else 0 for i in range(PROCESSES)]

    entries = [entry for work in works for entry in read_log(work.log)]
    leased = Counter(index for index, from_lease, *_ in entries if from_lease)
    for index, rule in enumerate(RULES):
        log: list[Bracketed] = [(before, after, units) for one, _, units, before, after in entries if one == index]
        check_bracketed(rule, log)
        assert leased[index] > 10, f"{rule.strategy} has hardly taken a lease"
        # Nor is much lost on the way: half of what the rule grants in this time, at least.
        assert sum(units for _, _, units in log) > LIMIT * RUN_S / 2
