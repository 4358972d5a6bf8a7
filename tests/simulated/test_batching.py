"""Checks travel together, and each hears what it would have heard alone: random processes against the oracle, step by step."""

from __future__ import annotations

import random
from typing import Any

import fakeredis
import pytest
import redis
from hypothesis import given, settings
from hypothesis import strategies as st

from ratethrottle import RateThrottleRule
from ratethrottle._engine.definitions import CompiledRule
from tests.kit.processes import Check, Process, World
from tests.kit.store import NEVER_US, Request
from tests.kit.strategies import STRATEGIES

pytestmark = pytest.mark.redis

HALF_A_CROWD = 16  # items: what waits is halved from twice as many on
NEVER_STALE_US = 10**15  # with it nobody is parked, so that all leave in the order in which they came


def some_rules(rng: random.Random) -> list[CompiledRule]:
    """Of every strategy, small enough to be used up."""
    rules = []
    for strategy in STRATEGIES:
        limit, window = rng.choice(((1, 0.01), (5, 0.1), (20, 0.5), (64, 1), (70, 2), (300, 3)))
        burst = rng.choice((None, 3, 2 * limit)) if strategy.endswith("bucket") else None
        rules.append(RateThrottleRule(strategy, limit, window, strategy=strategy, burst=burst).compiled)
    return rules


def assign(process: Process, request: Request) -> None:
    """Find out which checks a call carries: of each key the ones that came first, in their order, and equal ones as one item."""
    if request.mode != "check":
        return
    for item in request.items:
        waiting = [check for check in process.queues[item.key] if check.waits]
        item.members = waiting[: item.count]
        assert [check.cost for check in item.members] == [item.cost] * item.count
        for position, check in enumerate(item.members):
            check.item, check.position = item, position
        after = waiting[item.count : item.count + 1]
        if len(request.items) < HALF_A_CROWD:  # else the call was full before it reached what would have joined
            assert not (after and after[0].cost == item.cost and after[0].rule is item.members[-1].rule)


def heard(check: Check) -> tuple[bool, int, int, int]:
    decision = check.decision
    assert decision is not None
    retry_us = decision.retry_after_us
    return decision.allowed, decision.remaining, -1 if retry_us == NEVER_US else retry_us, decision.reset_after_us


def hears_what_the_oracle_says(check: Check) -> None:
    if check.decision is not None and check.decision.source == "redis":
        assert check.item is not None
        assert heard(check) == check.item.answers[check.position]


class Crowd:
    """Random steps of some processes; everything that can go wrong on the way does."""

    def __init__(self, client: redis.Redis, seed: int, **options: Any) -> None:
        self.rng = rng = random.Random(seed)
        self.world = World(client, oracle=True)
        self.world.when_sent = assign
        self.world.when_ended = hears_what_the_oracle_says
        self.rules = some_rules(rng)
        for _ in range(2):
            Process(self.world, rate=rng.randint(990_100, 1_009_900), ttl_us=NEVER_STALE_US, **options)
        # One of them is too long to be sent as it is.
        self.keys = [f"key {i}" + " long" * (40 if i == 1 else 0) for i in range(rng.randint(1, 3))]

    def step(self) -> None:
        rng, world = self.rng, self.world
        process, rule, key = rng.choice(world.processes), rng.choice(self.rules), rng.choice(self.keys)
        match rng.choices(range(4), (40, 12, 4, 45))[0]:
            case 0:
                for _ in range(rng.choice((1, 1, 2, 5))):
                    process.check(key, rule, rng.randint(1, min(2, rule.capacity)))
            case 1:
                world.t_us += rng.choice((1, 50, 1_000, 10_000, rng.randrange(100_000)))
            case 2:
                world.store.consume(process.state_key(key, rule), rule, rng.randint(1, rule.capacity), world.server_us())
            case 3:
                world.disturb(process, rng)
        process.poll()


@settings(max_examples=60)
@given(seed=st.integers(0, 2**32))
def test_each_check_hears_what_it_would_have_heard_alone(shared_redis_server: Any, seed: int) -> None:
    with shared_redis_server.client() as client:
        crowd = Crowd(client, seed)
        for _ in range(120):
            crowd.step()
        crowd.world.end()


@pytest.mark.parametrize("seed", range(3))
def test_each_check_hears_that_on_fakeredis_too(fake_server: fakeredis.FakeServer, seed: int) -> None:
    crowd = Crowd(fakeredis.FakeRedis(server=fake_server), seed)
    for _ in range(120):
        crowd.step()
    crowd.world.end()
