"""The key table: what it holds, what it forgets, what can fill it."""

from __future__ import annotations

import gc
import random

import pytest

from ratethrottle import InMemoryStorage, RateThrottleCore, RateThrottleRule
from ratethrottle.testing import ManualClock

BUCKET = RateThrottleRule("rule", 10, 3600, strategy="token_bucket")


def limiter(
    max_keys: int, rule: RateThrottleRule = BUCKET, on_full: str = "evict"
) -> tuple[RateThrottleCore, InMemoryStorage, ManualClock]:
    clock = ManualClock()
    storage = InMemoryStorage(max_keys=max_keys, on_full=on_full, clock_us=clock)
    return RateThrottleCore(storage, rules=[rule]), storage, clock


@pytest.mark.parametrize("strategy", ["sliding_window", "token_bucket", "sliding_counter", "fixed_window"])
async def test_a_table_that_grows_keeps_every_account(strategy: str) -> None:
    core, storage, _ = limiter(100_000, RateThrottleRule("rule", 10, 3600, strategy=strategy))
    costs = {f"key:{i}": 1 + i % 9 for i in range(20_000)}
    for key, cost in costs.items():
        assert await core.check(key, cost=cost)
    assert len(storage) == 20_000
    for key, cost in costs.items():
        assert (await core.peek(key)).remaining == 10 - cost


@pytest.mark.parametrize("strategy", ["sliding_window", "token_bucket", "sliding_counter", "fixed_window"])
async def test_a_flood_of_ten_times_the_keys_does_not_wash_out_a_blocked_victim(strategy: str) -> None:
    core, storage, clock = limiter(3_000, RateThrottleRule("rule", 10, 3600, strategy=strategy))
    assert await core.check("victim", cost=10)
    for i in range(30_000):
        clock.advance(0.00001)
        assert await core.check(f"flood:{i}")
    assert len(storage) == 3_000
    assert storage.evictions == 27_001
    assert not await core.check("victim")


async def test_keys_that_are_fresh_again_make_room_and_forget_nothing() -> None:
    core, storage, clock = limiter(1_000)
    for batch in range(20):
        for i in range(900):
            assert await core.check(f"{batch}:{i}")
        clock.advance(2 * 3600)
    assert storage.evictions == 0
    assert len(storage) <= 1_000


async def test_a_full_table_that_may_not_evict_denies_new_keys_until_one_is_fresh() -> None:
    core, storage, clock = limiter(100, on_full="deny")
    for i in range(100):
        assert await core.check(f"key:{i}")
    denied = await core.check("new")
    assert not denied
    assert denied.retry_after_us == 360 * 1_000_000
    assert await core.check("key:7"), "a known key goes on"
    clock.advance(denied.retry_after)
    assert await core.check("new")
    assert len(storage) <= 100
    assert storage.evictions == 0


async def test_keys_come_and_go_and_the_table_stays_right() -> None:
    """A model of the table in a dict, over resets, changes of definition and growth: removal must not break a probe."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    core, storage, _ = limiter(100_000)
    rules = [
        BUCKET,
        RateThrottleRule("rule", 10, 3600, strategy="sliding_window"),
        RateThrottleRule("rule", 10, 1800, strategy="fixed_window"),
    ]
    used: dict[str, int] = {}
    for _ in range(30_000):
        key = f"key:{rng.randrange(3_000)}"
        if rng.random() < 0.3:
            await core.reset(key)
            used.pop(key, None)
        else:
            if rng.random() < 0.01:
                core.add_rule(rng.choice(rules), replace=True)
            before = used.get(key, 0)
            assert bool(await core.check(key)) == (before < 10)
            used[key] = min(10, before + 1)
    assert len(storage) == len(used)


async def test_rules_of_one_storage_have_accounts_of_their_own() -> None:
    core = RateThrottleCore(rules=[RateThrottleRule("a", 1, 60), RateThrottleRule("b", 1, 60)])
    assert await core.check("key", "a")
    assert await core.check("key", "b")
    assert not await core.check("key", "a")


async def test_a_million_keys_take_at_most_64_bytes_each() -> None:
    core, storage, _ = limiter(1_000_000)
    for i in range(1_000_000):
        core.check(f"user:{i}").close()  # not awaited, which is as good here
    assert len(storage) == 1_000_000
    assert storage.size_bytes <= 64 * 1_000_000
    del core, storage
    gc.collect()
