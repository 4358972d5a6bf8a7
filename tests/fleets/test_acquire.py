"""Four processes, with fifty callers each that wait for one limit, through a real Redis, for ten windows."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import pytest

from ratethrottle import RateThrottleRule
from ratethrottle.testing.intervals import check_bracketed
from tests.kit.forked import CONTEXT
from tests.kit.servers import RedisServer
from tests.kit.waiters import Work, join, run_process

PROCESSES, TASKS, WINDOWS = 4, 50, 10
LIMIT, WINDOW_S = 100, 1.0
LATE_US = 50_000  # besides what event loops are late on a busy machine


@pytest.fixture(scope="module")
def processes() -> Iterator[ProcessPoolExecutor]:
    """Four processes for all tests of this module."""
    together = CONTEXT.Barrier(PROCESSES)
    with ProcessPoolExecutor(PROCESSES, mp_context=CONTEXT, initializer=join, initargs=(together,)) as pool:
        yield pool


@pytest.mark.redis
@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["sliding_window", "sliding_counter", "fixed_window"])
def test_processes_that_wait_for_one_window_share_it_and_seldom_ask_in_vain(
    strategy: str, processes: ProcessPoolExecutor, redis_server: RedisServer
) -> None:
    redis_server.grow_old()
    rule = RateThrottleRule("api", LIMIT, WINDOW_S, strategy=strategy)
    work = Work(redis_server.url, rule, TASKS, WINDOWS * WINDOW_S)
    done = list(processes.map(run_process, [work] * PROCESSES))

    grants = [len(each.granted) for each in done]
    calls = sum(each.calls for each in done)
    print(grants, f"{calls / sum(grants):.2f} calls a grant; {max(each.late_s for each in done):.3f} s late")
    check_bracketed(rule, [admission for each in done for admission in each.granted])
    assert all(each.in_order for each in done), "each process served its callers in the order in which they came"
    assert calls <= 2 * sum(grants)
    assert min(grants) >= sum(grants) / PROCESSES / 2
    # What comes back one by one is left for a moment by all of them, and for longer by event loops that are late.
    stalled_s = max(each.stalled_us for each in done) / 1e6
    assert sum(grants) >= 0.8 * (1 - min(0.5, 2 * stalled_s)) * LIMIT * WINDOWS


@pytest.mark.redis
@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["token_bucket", "leaky_bucket"])
def test_processes_that_wait_for_one_bucket_are_served_in_the_order_in_which_redis_saw_them(
    strategy: str, processes: ProcessPoolExecutor, redis_server: RedisServer
) -> None:
    redis_server.grow_old()
    burst = LIMIT // 2
    rule = RateThrottleRule("api", LIMIT, WINDOW_S, strategy=strategy, burst=burst)
    work = Work(redis_server.url, rule, TASKS, WINDOWS * WINDOW_S)
    done = list(processes.map(run_process, [work] * PROCESSES))

    grants = sum(len(each.granted) for each in done)
    calls = sum(each.calls for each in done)
    late_s = max(each.late_s for each in done)
    print(grants, f"grants, {calls / grants:.2f} calls each; {late_s:.3f} s late")
    check_bracketed(rule, [admission for each in done for admission in each.granted])
    assert all(each.in_order for each in done), "each process served its callers in the order in which they came"
    assert calls <= 1.1 * grants
    # A leaky bucket lets the first ones out evenly, too.
    expected = LIMIT * WINDOWS + (burst if strategy == "token_bucket" else 1)
    assert grants == pytest.approx(expected, rel=0.01)
    booked = sorted(one for each in done for one in each.booked)
    assert len(booked) == grants
    latest_us, stalled_us = 0, max(each.stalled_us for each in done)
    print(f"an event loop was {stalled_us / 1e6:.3f} s late")
    for _, served_us in booked:
        assert served_us > latest_us - LATE_US - 2 * stalled_us, "nobody was served before those that Redis saw earlier"
        latest_us = max(latest_us, served_us)
