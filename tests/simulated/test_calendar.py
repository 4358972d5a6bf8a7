"""Processes that share limits by the calendar: what they deny without asking around boundaries, and what they put back after a loss."""

from __future__ import annotations

import random

import pytest
import redis
from hypothesis import given, settings
from hypothesis import strategies as st

from ratethrottle import RateThrottleRule
from ratethrottle.testing.intervals import PromiseBrokenError, check
from tests.kit.oracle import calendar_window
from tests.kit.processes import Check, Process, World
from tests.kit.servers import RedisServer
from tests.kit.strategies import CALENDARS, START_US

pytestmark = pytest.mark.redis

TTL_US = 100_000
HOUR_US = 3_600 * 10**6


def rule_of(rng: random.Random, limit: int) -> RateThrottleRule:
    return RateThrottleRule("r", limit, strategy="fixed_window", **rng.choice(CALENDARS))


class Days:
    """Random steps of three processes and others around boundaries; each denial that wasn't asked for is held against the store.

    The processes' clocks are right to within a second, and drift.
    """

    def __init__(self, client: redis.Redis, seed: int, *, changes: bool) -> None:
        self.rng = rng = random.Random(seed)
        self.world = World(client)
        self.world.when_ended = self.judge
        self.world.store.forgave = self.forgave
        limit, self.changes = rng.choice((1, 5, 30)), changes
        self.rules = [rule_of(rng, limit) for _ in range(3 if changes else 1)]
        self.current = self.rules[0]
        self.denials = 0
        self.log: list[tuple[int, int]] = []
        for _ in range(3):
            offset_us = START_US + rng.randrange(-(10**6), 10**6)
            Process(self.world, rate=rng.randint(999_000, 1_001_000), ttl_us=TTL_US, offset_us=offset_us)

    def forgave(self, key: bytes) -> None:
        for process in self.world.processes:
            process.blind_until_us[key] = process.now_us() + TTL_US

    def judge(self, ended: Check) -> None:
        decision, process = ended.decision, ended.process
        if decision is None:
            return
        if decision.allowed:
            assert ended.item is not None or decision.source == "redis"
            self.log.append((ended.item.served_us if ended.item is not None else self.world.server_us(), ended.cost))
        if decision.source != "prefilter" or process.now_us() <= process.blind_until_us.get(ended.state_key, 0):
            return
        self.denials += 1
        would, _, retry_us, _ = self.world.store.peek(ended.state_key, ended.rule, ended.cost, self.world.server_us())
        assert not would, f"{ended.rule} would have been granted {ended.cost}"
        assert retry_us >= decision.retry_after_us

    def step(self) -> None:
        rng, world, rule = self.rng, self.world, self.current.compiled
        process = rng.choice(world.processes)
        match rng.choices(range(7), (50, 20, 30, 6, 20, 1, 1))[0]:
            case 0:
                for _ in range(rng.choice((1, 1, 3))):
                    process.check("k", rule, rng.randint(1, rule.capacity))
            case 1:
                until_us = calendar_window(rule, world.server_us())[1]
                left_us = until_us - world.server_us()
                later_us = max(1, rng.choice((1, 700, 20_000, HOUR_US, left_us, left_us - 1, left_us // 2)))
                if later_us > HOUR_US:  # no call takes days: it names the boundaries around now, and tells how late the clock is
                    for one in world.processes:
                        one.round_trip()
                world.t_us += later_us
            case 2:
                world.disturb(process, rng)
            case 3:
                world.store.consume(process.state_key("k", rule), rule, rng.randint(1, rule.capacity), world.server_us())
            case 4:
                process.round_trip()
            case 5 if self.changes:
                self.current = rng.choice(self.rules)
            case 6 if self.changes:
                world.step_us += rng.choice((-rng.randrange(2 * rule.window_us), rng.randrange(rule.window_us)))
                for one in list(world.store.definitions):
                    self.forgave(one)
        process.poll()

    def run(self, steps: int = 150) -> int:
        for _ in range(steps):
            self.step()
        self.world.end()
        return self.denials


@settings(max_examples=60)
@given(seed=st.integers(0, 2**32), changes=st.booleans())
def test_nothing_is_denied_that_the_store_would_have_granted(shared_redis_server: RedisServer, seed: int, changes: bool) -> None:
    with shared_redis_server.client() as client:
        Days(client, seed, changes=changes).run()


def test_the_random_worlds_do_deny_without_asking(redis_client: redis.Redis) -> None:
    assert sum(Days(redis_client, seed, changes=False).run() for seed in range(8)) > 20


def test_a_process_whose_clock_is_days_off_asks_by_the_servers_clock_from_its_second_call_on(redis_client: redis.Redis) -> None:
    """Its first call names boundaries around another day: there windows have the mean length."""
    rule = RateThrottleRule("r", 5, "day", strategy="fixed_window", timezone="Europe/Berlin")
    world = World(redis_client)
    process = Process(world, offset_us=START_US + 200 * 24 * HOUR_US)  # in summer time
    told = []
    for _ in range(2):
        checked = process.check("k", rule.compiled)
        world.settle()
        told.append(checked.decision.reset_after_us)
    until_us = calendar_window(rule.compiled, START_US)[1]
    assert told == [until_us - START_US - HOUR_US, until_us - START_US]
    assert process.check("k", rule.compiled, 4).decision.source == "prefilter"


class Losing:
    """Processes that ask at random around a boundary, on a store that loses everything, or all since a while ago."""

    def __init__(self, client: redis.Redis, seed: int) -> None:
        self.rng = rng = random.Random(seed)
        self.public = rule_of(rng, rng.choice((3, 20, 100)))
        self.rule = self.public.compiled
        self.world = World(client)
        self.world.when_ended = self.note
        self.world.t_us = calendar_window(self.rule, START_US)[1] - START_US - rng.randrange(1, 6_000_000)
        for _ in range(rng.randint(1, 3)):
            Process(self.world, rate=rng.randint(999_900, 1_000_100), offset_us=START_US + rng.randrange(-(10**6), 10**6))
        self.admitted: list[tuple[int, int]] = []

    def note(self, ended: Check) -> None:
        if ended.decision is not None and ended.decision.allowed:
            self.admitted.append((self.world.server_us(), ended.cost))

    def turn(self) -> None:
        for process in self.rng.sample(self.world.processes, len(self.world.processes)):
            for _ in range(self.rng.choice((0, 1, 1, 4))):
                process.check("k", self.rule, self.rng.choice((1, 1, 2)))
            process.round_trip()
            process.round_trip()
        self.world.t_us += self.rng.randint(1, 60_000)

    def run(self) -> None:
        kept = self.world.store.keep()
        for _ in range(self.rng.randint(5, 40)):
            self.turn()
            if self.rng.random() < 0.2:
                kept = self.world.store.keep()
        while any(process.repair.epoch == 0 for process in self.world.processes):
            self.turn()
        if self.rng.random() < 0.5:
            self.world.store.lose({})
        else:
            self.world.fail_over(kept)
        for _ in range(60):
            self.turn()
        assert all(process.repair.epochs == 1 and process.connection.batch.serving for process in self.world.processes)


@settings(max_examples=40)
@given(seed=st.integers(0, 2**32))
def test_nothing_that_a_living_process_knew_is_granted_again(shared_redis_server: RedisServer, seed: int) -> None:
    with shared_redis_server.client() as client:
        losing = Losing(client, seed)
        losing.run()
        check(losing.public, losing.admitted)


def test_without_telling_it_the_promise_is_broken(redis_client: redis.Redis) -> None:
    """What the test above would find."""

    def run_all() -> None:
        for seed in range(20):
            losing = Losing(redis_client, seed)
            for process in losing.world.processes:
                process.connection.mute = True
            losing.run()
            check(losing.public, losing.admitted)

    with pytest.raises(PromiseBrokenError):
        run_all()
