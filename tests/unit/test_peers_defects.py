"""What other limiters get wrong (measured; the list is the project's), each defect a test of its name.

Those of arithmetic and of state in memory. What needs a Redis to go wrong stands in tests/servers.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from datetime import timedelta

import pytest

from ratethrottle import RateThrottleCore, RateThrottleRule
from ratethrottle._engine.decision import Decision
from ratethrottle.testing import MakeLimiter, ManualClock
from ratethrottle.testing.intervals import check
from tests.kit.strategies import START_US, STRATEGIES, make_rule
from tests.kit.subjects import Core

SECOND_US = 1_000_000
every_strategy = pytest.mark.parametrize("strategy", STRATEGIES)


@pytest.fixture
def clock(ratethrottle_clock: ManualClock) -> ManualClock:
    return ratethrottle_clock


@pytest.fixture
def limiter(ratethrottle_limiter: MakeLimiter) -> MakeLimiter:
    return ratethrottle_limiter


async def admitted(limiter: RateThrottleCore, key: str, times: int) -> int:
    return sum([bool(await limiter.check(key)) for _ in range(times)])


@every_strategy
async def test_not_atomic_so_that_235_of_100_pass(strategy: str, limiter: MakeLimiter) -> None:
    """Read, then write: with a turn of another task in between, both see room for themselves."""
    shared = limiter(make_rule(strategy, 100, 3_600 * SECOND_US))

    async def client() -> int:
        count = 0
        for _ in range(100):
            count += bool(await shared.check("key"))
            await asyncio.sleep(0)
        return count

    assert sum(await asyncio.gather(*(client() for _ in range(8)))) == 100


@every_strategy
def test_not_atomic_between_threads(strategy: str, limiter: MakeLimiter) -> None:
    """Each thread runs a loop of its own; the table is one."""
    shared, counts = limiter(make_rule(strategy, 1_000, 3_600 * SECOND_US)), []
    start = threading.Barrier(4)

    def client() -> None:
        start.wait()
        counts.append(asyncio.run(admitted(shared, "key", 2_000)))

    threads = [threading.Thread(target=client) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(counts) == 1_000


async def test_a_ttl_rounded_down_to_nothing_lets_5000_of_5000_through(clock: ManualClock, limiter: MakeLimiter) -> None:
    """1000/s with a burst of 400: the state lives for 0.4 s, which is 0 whole seconds."""
    bucket = limiter(RateThrottleRule("api", 1_000, 1, strategy="token_bucket", burst=400))
    assert await admitted(bucket, "key", 5_000) == 400
    clock.advance(0.001)
    assert await admitted(bucket, "key", 5_000) == 1


@every_strategy
async def test_a_denied_request_consumes(strategy: str, clock: ManualClock, limiter: MakeLimiter) -> None:
    """A client that goes on knocking gets in at the instant it was promised, and with as much as one that waited."""
    waiting = limiter(make_rule(strategy, 10, 60 * SECOND_US))
    for key in ("waits", "knocks"):
        assert await admitted(waiting, key, 10) == 10
    promised = [await waiting.check(key) for key in ("waits", "knocks")]
    until_us = clock() + promised[0].retry_after_us
    while clock() < until_us - 100_000:
        clock.advance(0.1)
        assert not await waiting.check("knocks")
    clock.advance((until_us - clock()) / SECOND_US)
    facts = [
        (bool(decision), decision.remaining, decision.reset_after_us)
        for decision in [await waiting.check(k) for k in ("waits", "knocks")]
    ]
    assert facts[0] == facts[1]
    assert facts[0][0]


@every_strategy
async def test_whole_second_clocks_admit_a_third_too_few_at_50_a_minute(
    strategy: str, clock: ManualClock, limiter: MakeLimiter
) -> None:
    """A client that comes as soon as it may gets the full rate over ten minutes, not 33 a minute."""
    rule = make_rule(strategy, 50, 60 * SECOND_US)
    eager, count, began_us = limiter(rule), 0, clock()
    while clock() < began_us + 600 * SECOND_US:
        decision = await eager.check("key")
        count += bool(decision)
        clock.advance(decision.retry_after)
    # What was full at the beginning comes on top; a counter spends its second window on what it estimates of the first.
    assert 50 * 10 <= count + (25 if strategy == "sliding_counter" else 0) <= 50 * 11


def test_floating_point_admits_one_fewer_than_burst_in_a_third_of_simple_cases() -> None:
    wrong = []
    for limit in range(1, 101):
        for window_us in (1_000, SECOND_US, 7 * SECOND_US, 60 * SECOND_US, 86_400 * SECOND_US):
            for burst in (1, 3, 10, limit):
                rule, core = make_rule("token_bucket", limit, window_us, burst).compiled, Core()
                granted = sum(core.check(rule, START_US, 1)[0] for _ in range(burst + 2))
                if granted != burst:
                    wrong.append((limit, window_us, burst, granted))
    assert not wrong


def test_floating_point_drifts_over_a_day_of_thirds() -> None:
    """At three per second a unit takes 333,333.3 µs. Added up as floats, or as whole µs, a day of them is off by some."""
    rule, core, now_us, count = make_rule("token_bucket", 3, SECOND_US).compiled, Core(), START_US, 0
    while now_us < START_US + 86_400 * SECOND_US:
        allowed, _, retry_us, _ = core.check(rule, now_us, 1)
        count += allowed
        now_us += retry_us
    assert count == 3 + 3 * 86_400 - 1  # the burst, and each unit of the day but the one that comes at its very end


@pytest.mark.parametrize("limit", [100, 50])
def test_the_two_counter_window_admits_199_of_100_against_an_adversary(limit: int) -> None:
    """The default doesn't: whatever the adversary's phase, no second holds more than the limit. The counter does, and says so."""
    log: dict[str, list[tuple[int, int]]] = {}
    for strategy in ("sliding_window", "sliding_counter"):
        rule, core, most = make_rule(strategy, limit, SECOND_US), Core(), 0
        log[strategy] = []
        for now_us in (START_US + SECOND_US - 1, START_US + 2 * SECOND_US - 2):
            units = sum(core.check(rule.compiled, now_us, 1)[0] for _ in range(2 * limit))
            log[strategy].append((now_us, units))
            most += units
        check(rule, log[strategy])
        assert most == (2 * limit - 1 if strategy == "sliding_counter" else limit)


@every_strategy
async def test_a_bounded_table_forgets_a_blocked_key_when_1100_others_arrive(strategy: str, limiter: MakeLimiter) -> None:
    shared = limiter(make_rule(strategy, 10, 60 * SECOND_US))
    assert await admitted(shared, "blocked", 20) == 10
    for number in range(1_100):
        assert await shared.check(f"passer-by {number}")
    assert await admitted(shared, "blocked", 20) == 0


async def test_a_full_table_forgets_a_blocked_bucket_when_11000_others_arrive(limiter: MakeLimiter) -> None:
    """Those that have used less make way first."""
    full = limiter(make_rule("token_bucket", 10, 60 * SECOND_US), max_keys=1_000)
    assert await admitted(full, "blocked", 20) == 10
    for number in range(11_000):
        assert await full.check(f"passer-by {number}")
    assert await admitted(full, "blocked", 20) == 0


@every_strategy
async def test_one_clients_requests_block_everybody(strategy: str, limiter: MakeLimiter) -> None:
    shared = limiter(make_rule(strategy, 5, 60 * SECOND_US))
    assert await admitted(shared, "greedy", 1_000) == 5
    assert [await admitted(shared, f"modest {number}", 5) for number in range(100)] == [5] * 100


async def test_a_free_key_waits_behind_another_keys_lock() -> None:
    """Nobody sleeps inside a check: a denied key costs the free one next to it no time."""
    shared = RateThrottleCore(rules=[RateThrottleRule("api", 1, 3_600)])
    assert await shared.check("busy")
    busy = asyncio.create_task(admitted(shared, "busy", 20_000))
    slowest_s = 0.0
    for number in range(100):
        began_s = time.perf_counter()
        assert await shared.check(f"free {number}")
        slowest_s = max(slowest_s, time.perf_counter() - began_s)
        await asyncio.sleep(0)
    assert await busy == 0
    assert slowest_s < 0.1


@every_strategy
async def test_small_requests_starve_a_large_one(strategy: str, clock: ManualClock, limiter: MakeLimiter) -> None:
    """A denial of a large cost says when it fits, and at that instant it fits, if nobody else has come."""
    shared = limiter(make_rule(strategy, 10, 10 * SECOND_US))
    assert await admitted(shared, "key", 4) == 4
    large = await shared.check("key", cost=10)
    assert not large
    clock.advance(large.retry_after)
    assert await shared.check("key", cost=10)


async def test_keys_joined_without_escaping_are_one_bucket(limiter: MakeLimiter) -> None:
    keys = [
        ("a/b", "c"), ("a", "b/c"), ("a/b/c",), "a/b/c", ("a", "b", "c"), ("ab", "c"), ("a", "bc"), ("", "abc"), ("abc", ""),
        (1, 23), (12, 3), ("1", "23"), ("1", 23), (1, "23"), (-1, 23), ("s1:a",), "s1:a", ("a:s1:b",), ("a", "s1:b"),
        ("a\0b",), ("a", "\0b"),
    ]  # fmt: skip  # a table, one family of keys a line
    one_each = limiter(make_rule("fixed_window", 1, 3_600 * SECOND_US))
    assert [bool(await one_each.check(key)) for key in keys] == [True] * len(keys)
    assert [bool(await one_each.check(key)) for key in keys] == [False] * len(keys)


@every_strategy
async def test_retry_after_1_when_the_block_lasts_300_seconds(strategy: str, clock: ManualClock, limiter: MakeLimiter) -> None:
    """What the headers say is when the call will pass: no sooner, and less than a second later."""
    shared = limiter(RateThrottleRule("api", 1, timedelta(seconds=300), strategy=strategy))
    assert await shared.check("key")
    denied = await shared.check("key")
    wait_s = int(denied.headers()["Retry-After"])
    assert wait_s == math.ceil(denied.retry_after) > 100
    clock.advance(wait_s - 1)
    assert not await shared.check("key")
    clock.advance(1)
    assert await shared.check("key")


@every_strategy
async def test_a_timed_block_that_never_ends(strategy: str, clock: ManualClock, limiter: MakeLimiter) -> None:
    """However long a client has been knocking, after an idle reset it is as good as new."""
    shared = limiter(make_rule(strategy, 3, 10 * SECOND_US))
    last: Decision | None = None
    for _ in range(5_000):
        last = await shared.check("key")
        clock.advance(0.001)
    assert last is not None
    clock.advance(last.reset_after)
    fresh = await shared.peek("key")
    assert fresh
    assert (fresh.remaining, fresh.reset_after_us) == (3, 0)


@every_strategy
@pytest.mark.parametrize("step_us", [-2 * SECOND_US, 2 * SECOND_US])
async def test_clock_skew_doubles_admission(strategy: str, step_us: int, clock: ManualClock, limiter: MakeLimiter) -> None:
    """A clock that jumps back and forth: two seconds ahead forgive at most two seconds' refill, back forgives nothing."""
    shared = limiter(make_rule(strategy, 100, 60 * SECOND_US))
    clock.advance(30)  # off the boundary of an aligned window, beyond which a step would be a new window
    count = await admitted(shared, "key", 200)
    for _ in range(20):
        clock._now_us += step_us  # back and forth, which no test of a user's needs
        count += await admitted(shared, "key", 200)
        clock._now_us -= step_us
        count += await admitted(shared, "key", 200)
    refill = 100 * 2 * 21 // 60 if strategy.endswith("bucket") else 0
    assert count <= 100 + refill
