"""A denial that wasn't asked for: never one that the store would have granted, asked again in time, and by one check for all."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import redis
from hypothesis import given, settings
from hypothesis import strategies as st

from ratethrottle import RateThrottleRule
from ratethrottle._engine.definitions import CompiledRule
from tests.kit.processes import Check, Process, World
from tests.kit.servers import RedisServer
from tests.kit.store import NEVER_US, Request
from tests.kit.strategies import STRATEGIES

pytestmark = pytest.mark.redis

TTL_US = 100_000
SHAPES = ((1, 0.01), (5, 0.1), (20, 0.5), (64, 1), (70, 2), (300, 3), (1_000, 60))
Tamper = Callable[[Request, Any], Any]


class UnsoundError(AssertionError):
    """A check was denied without asking, and the store would have granted it."""


class Doubted:
    """Random steps of three processes and others; every denial that wasn't asked for is held against the store at that instant.

    What moves a state back makes a process blind for a key for at most TTL_US: what it says of it then isn't judged.
    """

    def __init__(self, client: redis.Redis, seed: int, *, drift: int = 9_900, strategies: tuple[str, ...] = STRATEGIES) -> None:
        self.rng = rng = random.Random(seed)
        self.world = World(client)
        self.world.when_ended = self.judge
        self.world.store.forgave = self.forgave
        self.denials = 0
        self.rules: dict[str, list[CompiledRule]] = {}
        for strategy in rng.sample(strategies, min(len(strategies), 2)):
            limit, window = rng.choice(SHAPES)
            # A rule and what it may be changed to: another limit, or another window.
            lease = rng.random() < 0.3 and window >= 0.2
            self.rules[strategy] = [
                RateThrottleRule(strategy, *shape, strategy=strategy, **options).compiled
                for shape, options in (
                    ((limit, window), {"lease": lease}),
                    ((max(1, limit - 1), window), {"lease": lease}),
                    ((limit, 2 * window), {"lease": lease}),
                )
            ]
        self.current = {strategy: rules[0] for strategy, rules in self.rules.items()}
        for _ in range(3):
            # Readings that begin anywhere, and drift both ways against the store's clock.
            rate = rng.choice((1_000_000 - drift, 1_000_000 + drift, rng.randint(1_000_000 - drift, 1_000_000 + drift)))
            # Some remember fewer keys than there are.
            room = {"max_bounds": rng.choice((1, 2, 1_000)), "offset_us": rng.randrange(10**15, 2 * 10**15)}
            Process(self.world, rate=rate, ttl_us=TTL_US, **room)
        self.keys = [f"key {i}" for i in range(rng.randint(1, 2))]

    def forgave(self, key: bytes) -> None:
        for process in self.world.processes:
            process.blind_until_us[key] = process.now_us() + TTL_US

    def judge(self, check: Check) -> None:
        decision, process = check.decision, check.process
        if decision is None or decision.source != "prefilter":
            return
        assert not decision.allowed
        assert 0 < decision.retry_after_us < NEVER_US
        if process.now_us() <= process.blind_until_us.get(check.state_key, 0):
            return
        self.denials += 1
        would, _, retry_us, _ = self.world.store.peek(check.state_key, check.rule, check.cost, self.world.server_us())
        if would:
            raise UnsoundError(f"{check.rule} would have been granted {check.cost}")
        if retry_us < decision.retry_after_us:
            raise UnsoundError(f"{check.rule}: granted in {retry_us} us, not only in {decision.retry_after_us}")

    def step(self) -> None:
        rng, world = self.rng, self.world
        process, key, strategy = rng.choice(world.processes), rng.choice(self.keys), rng.choice(list(self.rules))
        rule = self.current[strategy]
        match rng.choices(range(8), (50, 15, 35, 6, 20, 0.5, 0.5, 0.5))[0]:
            case 0:
                cost = rng.choice((1, 1, 2, rule.capacity, rng.randint(1, rule.capacity)))
                for _ in range(rng.choice((1, 1, 3))):
                    process.check(key, rule, min(cost, rule.capacity))
            case 1:
                world.t_us += rng.choice((1, 20, 700, 10_000, rng.randrange(rule.window_us)))
            case 2:
                world.disturb(process, rng)
            case 3:
                cost = rng.randint(1, rule.capacity)
                for _ in range(rng.choice((1, 3))):
                    world.store.consume(process.state_key(key, rule), rule, cost, world.server_us())
            case 4:
                process.round_trip()
            case 5:
                process.ask([(key, rule, 1)], rng.choice(("reset", "peek")))
            case 6:
                self.current[strategy] = rng.choice(self.rules[strategy])
            case 7:
                # The server's clock is set: backwards nothing drains, forwards it forgives.
                world.step_us += rng.choice((-rng.randrange(2 * rule.window_us), rng.randrange(rule.window_us)))
                for one in list(world.store.definitions):
                    self.forgave(one)
        process.poll()


def run(doubted: Doubted, steps: int = 150) -> int:
    for _ in range(steps):
        doubted.step()
    doubted.world.end()
    return doubted.denials


@settings(max_examples=80)
@given(seed=st.integers(0, 2**32))
def test_nothing_is_denied_that_the_store_would_have_granted(shared_redis_server: RedisServer, seed: int) -> None:
    with shared_redis_server.client() as client:
        run(Doubted(client, seed))


def test_the_random_worlds_do_deny_without_asking(redis_client: redis.Redis) -> None:
    for strategy in STRATEGIES:
        assert sum(run(Doubted(redis_client, seed, strategies=(strategy,))) for seed in range(8)) > 20


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_it_says_of_the_wait_is_close_to_what_the_store_says(redis_client: redis.Redis, strategy: str) -> None:
    """Alone, it falls short by what the clocks may differ by, and by the time that the call took to get there."""
    rule = RateThrottleRule("r", 50, 10, strategy=strategy).compiled
    world = World(redis_client)
    process = Process(world)
    for cost in (40, 20):
        process.check("k", rule, cost)
        process.turn()
        process.connect()
        world.t_us += 300
        world.settle()
    for age_us in (0, 1, 64, 5_000, 200_000):
        world.t_us += age_us
        check = process.check("k", rule, 20)
        retry_us = world.store.peek(check.state_key, rule, 20, world.server_us())[2]
        assert check.decision.source == "prefilter"
        assert 0 <= retry_us - check.decision.retry_after_us <= (world.t_us + 64) // 64 + 300
    world.end()


# That the worlds above would notice:


def overstated(request: Request, reply: Any) -> Any:
    """Say that one unit more is used than is."""
    if request.mode != "check" or request.refused:
        return reply
    numbers, at = list(reply), 2
    for item in request.items:
        kind, leases = item.rule.kind, item.leases
        numbers[at + 1] += item.rule.unit_ticks if kind == "b" else 1
        if kind == "s" and numbers[at + 2] == 0:  # the unit has to leave some time
            numbers[at + 2] = numbers[at + 3] = item.rule.window_us
        at += {"b": 2, "s": 4 + (numbers[at] < item.count), "c": 4, "f": 3}[kind] + leases
    assert at == len(numbers)
    return numbers


def forever(request: Request, reply: Any) -> Any:
    """Say of a sliding window that its units leave a little later than they do."""
    if request.mode != "check" or request.refused:
        return reply
    numbers, at = list(reply), 2
    for item in request.items:
        length = 4 + (numbers[at] < item.count)
        for one in range(2, length):
            numbers[at + one] += numbers[at + one] // 50 if numbers[at + one] > 0 else 0
        at += length + item.leases
    assert at == len(numbers)
    return numbers


def caught(client: redis.Redis, strategy: str, tamper: Tamper | None = None, **options: Any) -> bool:
    """Whether one of a few worlds finds a denial that was wrong."""
    for seed in range(40):
        doubted = Doubted(client, seed, strategies=(strategy,), **options)
        if tamper is not None:
            for process in doubted.world.processes:
                process.connection.tamper = tamper
        try:
            run(doubted)
        except UnsoundError:
            return True
    return False


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_bound_of_one_unit_too_much_is_caught(redis_client: redis.Redis, strategy: str) -> None:
    assert caught(redis_client, strategy, overstated)


def test_a_bound_that_holds_a_little_too_long_is_caught(redis_client: redis.Redis) -> None:
    assert caught(redis_client, "sliding_window", forever)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_clocks_that_differ_by_more_than_a_bound_allows_for_are_caught(redis_client: redis.Redis, strategy: str) -> None:
    assert caught(redis_client, strategy, drift=30_000)
