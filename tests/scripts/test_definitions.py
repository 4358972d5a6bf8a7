"""A rule that is replaced all the time. A definition is kept for as long as something refers to it, and no longer."""

from __future__ import annotations

import asyncio
import gc
import random
import tracemalloc

import pytest

from ratethrottle import Decision, RateThrottleCore, RateThrottleRule, create_limiter
from ratethrottle._engine.keys import KeyTable
from ratethrottle.storage._shared.keynames import KeyNames
from ratethrottle.storage._shared.outage import Shares
from ratethrottle.storage._shared.repair import Repair
from tests.kit.strategies import START_US, STRATEGIES

pytestmark = pytest.mark.redis

HOUR_S = 3600


def traced_bytes() -> int:
    gc.collect()
    return tracemalloc.get_traced_memory()[0]


def changing(limit: int) -> RateThrottleRule:
    return RateThrottleRule("changing", limit, 60, strategy="token_bucket")


async def change(limiter: RateThrottleCore, first: int, last: int, key: str = "changing") -> None:
    for limit in range(first, last):
        limiter.add_rule(changing(limit), replace=True)
        await limiter.check(key, "changing")


async def test_a_rule_that_changes_all_the_time_leaves_nothing_behind(redis_url: str) -> None:
    async with create_limiter("redis", redis_url=redis_url) as limiter:
        tracemalloc.start()
        try:
            await change(limiter, 1_000_000, 1_002_500)
            before = traced_bytes()
            await change(limiter, 2_000_000, 2_005_000)
            assert traced_bytes() - before < 5_000 * 50
        finally:
            tracemalloc.stop()


@pytest.mark.parametrize("strategy", STRATEGIES)
async def test_what_redis_said_outlives_any_number_of_definitions(redis_url: str, strategy: str) -> None:
    """A lease and checks that are on their way outlive them too."""
    rule = RateThrottleRule("rule", 10, HOUR_S, strategy=strategy)
    hot = RateThrottleRule("hot", 100_000, HOUR_S, strategy=strategy, lease=True, lease_ttl=1.0)
    async with create_limiter("redis", redis_url=redis_url, rules=[rule, hot], prefilter_ttl=60, deadline=5) as limiter:
        assert await limiter.check("key", "rule", cost=10)
        assert not await limiter.check("key", "rule")
        for _ in range(7):
            await asyncio.gather(*[limiter.check("key", "hot") for _ in range(20)])
        for round_ in range(3):
            # Their definitions are replaced before they are sent.
            waiting: list[asyncio.Task[Decision]] = []
            for limit in range(3_000):
                limiter.add_rule(changing(10_000 * (round_ + 1) + limit), replace=True)
                waiting.append(asyncio.ensure_future(limiter.check(f"key {limit % 7}", "changing")))
                if limit % 500 == 499:
                    assert all(await asyncio.gather(*waiting))
                    waiting.clear()
            denied, leased = await limiter.check("key", "rule"), await limiter.check("key", "hot")
            assert (denied.allowed, denied.source, denied.limit) == (False, "prefilter", 10)
            assert leased.allowed
            assert leased.source in {"lease", "redis"}  # a lease ends after a second


def shares_of(max_keys: int) -> tuple[KeyTable, Shares]:
    table = KeyTable(max_keys, clock_us=lambda: START_US, bounds=True)
    shares = Shares(table, KeyNames(b"p", 64))
    shares.set_share(1, 0)
    return table, shares


def test_terms_are_kept_for_what_refers_to_them() -> None:
    """Definitions that leave nothing behind change no decision of the others."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    (table, shares), (few, twin) = shares_of(1_000), shares_of(1_000)
    definitions = [
        RateThrottleRule("rule", rng.randrange(10, 10**6), rng.choice((1, 60, HOUR_S)), strategy=strategy).compiled
        for strategy in STRATEGIES
        for _ in range(40)
    ]
    buckets = [rule for rule in definitions if rule.kind == "b"]
    now_us, made = START_US, 0
    for _ in range(6_000):
        now_us += rng.choice((0, 1, 1_000, 100_000))
        key, rule = f"key {rng.randrange(100)}", rng.choice(definitions)
        known, cost = None, rng.randint(1, rule.capacity)
        if rng.random() < 0.5:
            heard = rng.choice(buckets)
            known = (heard, [0, heard.unit_ticks * rng.randrange(heard.capacity)], 1, now_us)
        decided = shares._decide(rule, key, "=", now_us, cost, known=known)
        assert decided == twin._decide(rule, key, "=", now_us, cost, known=known)
        for _ in range(rng.randrange(6)):
            made += 1
            shares._decide(changing(10**6 + made).compiled, "nobody", "=", now_us, 1, consume=False)
    assert few.kept_terms <= len(definitions)
    assert table.kept_terms < 2_300 + len(definitions) < made


@pytest.mark.parametrize("max_keys", [1, 100_000, 1_000_000])
def test_terms_of_keys_that_go_are_freed(max_keys: int) -> None:
    """A round takes a step for each new definition. What it finds is freed by the next one."""
    table, shares = shares_of(max_keys)
    most = 0
    for limit in range(1, 10_001):
        shares._decide(changing(limit).compiled, f"key {limit % 7}", "=", START_US + limit, 1)
        most = max(most, table.kept_terms)
    assert 1_024 <= most < 2 * (1_024 + max_keys // 2_048 + 64)


def test_terms_are_kept_for_keys_that_are_still_to_be_freed() -> None:
    """A clear() leaves keys behind, which are freed a shard at a time, each as its definition asks for."""
    table = KeyTable(1_000, clock_us=lambda: START_US, bounds=True)
    knowledge = Repair(table, KeyNames(b"p", 64), 1)
    for limit in range(1_000):
        rule = RateThrottleRule("rule", 10 + limit, HOUR_S, strategy=STRATEGIES[limit % len(STRATEGIES)]).compiled
        knowledge.shares._decide(rule, f"key {limit}", "=", START_US, 1)
    knowledge.forget_all()
    assert (len(table), knowledge.shares.owing) == (0, 0)
    assert table.emptied_count == 1
    for limit in range(5_000):
        knowledge.shares._decide(changing(10**6 + limit).compiled, "nobody", "=", START_US, 1, consume=False)
    assert table.kept_terms >= 6_000


def test_a_clear_of_nothing_keeps_no_terms() -> None:
    table = KeyTable(1_000, clock_us=lambda: START_US, bounds=True)
    knowledge = Repair(table, KeyNames(b"p", 64), 1)
    knowledge.forget_all()
    for limit in range(5_000):
        knowledge.shares._decide(changing(10**6 + limit).compiled, "nobody", "=", START_US, 1, consume=False)
    assert table.kept_terms < 2_300
