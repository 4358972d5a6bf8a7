"""Redis loses what it held, wholly or in part, and the processes put it back: simulated, with the real scripts and the compiled core."""

from __future__ import annotations

import random
from typing import Any

import pytest
import redis
from hypothesis import given, settings
from hypothesis import strategies as st

from ratethrottle import RateThrottleRule
from ratethrottle.errors import StorageUnavailable
from ratethrottle.testing.intervals import PromiseBrokenError, check
from tests.kit.clocked import RUN
from tests.kit.processes import Check, Connection, Process, World, running
from tests.kit.store import Request
from tests.kit.strategies import STRATEGIES

pytestmark = pytest.mark.redis

OTHERS_US, LEARN_US = 500_000, 250_000


class Losing:
    """Processes that ask at random, on a store that loses everything, or all since a while ago, when all of them have heard it."""

    def __init__(self, client: redis.Redis, seed: int, strategy: str) -> None:
        self.rng = rng = random.Random(seed)
        limit, window = rng.choice(((3, 1.0), (20, 2.0), (64, 4.0), (100, 4.0), (500, 8.0)))
        self.public = RateThrottleRule("r", limit, window, strategy=strategy)
        self.rule = self.public.compiled
        self.world = World(client)
        self.world.when_ended = self.note
        for _ in range(rng.randint(1, 3)):
            Process(self.world, rate=rng.randint(990_100, 1_009_900), offset_us=rng.randrange(10**15, 10**16))
        self.admitted: list[tuple[int, int]] = []
        self.allowed_again = 0
        self.lost_at_us = 0

    def note(self, ended: Check) -> None:
        if ended.decision is not None and ended.decision.allowed:
            # Nothing passes between the decision and its reply here but the steps of `turn`.
            self.admitted.append((self.world.server_us(), ended.cost))
            self.allowed_again += self.lost_at_us > 0 and self.world.t_us - self.lost_at_us > LEARN_US

    def turn(self, ask: bool) -> None:
        """Every process has its turn, and then some time passes: less than that in which a loss must be heard of."""
        for process in self.rng.sample(self.world.processes, len(self.world.processes)):
            for _ in range(self.rng.choice((0, 1, 1, 4)) if ask else 0):
                process.check("k", self.rule, self.rng.choice((1, 1, 2)))
            process.round_trip()
            process.round_trip()
        self.world.t_us += self.rng.randint(1, 60_000)

    def run(self) -> None:
        """Use it up, lose it, and ask on."""
        kept = self.world.store.keep()
        for _ in range(self.rng.randint(5, 40)):
            self.turn(ask=True)
            if self.rng.random() < 0.2:
                kept = self.world.store.keep()
        while any(process.repair.epoch == 0 for process in self.world.processes):  # it has asked for nothing yet
            self.turn(ask=True)
        if self.rng.random() < 0.5:
            self.world.store.lose({})
        else:
            self.world.fail_over(kept)
        self.lost_at_us = self.world.t_us
        if len(self.world.processes) > 1 and self.rng.random() < 0.5:
            # One finds nobody and tries again half a second later; the others may hear of the loss when it happens.
            missing = self.rng.choice(self.world.processes)
            self.world.processes.remove(missing)
            back_us = self.lost_at_us + self.rng.randint(0, 450_000)
            while self.world.t_us < back_us:
                self.turn(ask=True)
            self.world.processes.append(missing)
        for _ in range(60):
            self.turn(ask=True)
        for process in self.world.processes:
            assert process.repair.epochs == 1
            assert process.connection.batch.serving


@pytest.mark.parametrize("strategy", STRATEGIES)
@settings(max_examples=25)
@given(seed=st.integers(0, 2**32))
def test_nothing_that_a_living_process_knew_is_granted_again(shared_redis_server, strategy: str, seed: int) -> None:
    with shared_redis_server.client() as client:
        losing = Losing(client, seed, strategy)
        losing.run()
        check(losing.public, losing.admitted)


def served_after_us(client: redis.Redis, seed: int, *, stopped: bool = False, settled: bool = True) -> int:
    """Three processes know of each other, and Redis loses everything: how long until the last of them is served again.

    stopped: one of them doesn't come. settled: they have known of each other for a while.
    """
    losing = Losing(client, seed, "token_bucket")
    world = losing.world
    while len(world.processes) < 3:
        Process(world)
    while any(process.repair.fleet.processes != 3 for process in world.processes):
        losing.turn(ask=True)
    begun_us = world.t_us
    while settled and world.t_us < begun_us + 1_200_000:  # until they have been counted twice
        losing.turn(ask=True)
    world.store.lose({})
    lost_at_us = world.t_us
    if stopped:
        world.processes.pop()
    while True:
        losing.turn(ask=True)
        if all(process.repair.epochs == 1 and process.connection.batch.serving for process in world.processes):
            return world.t_us - lost_at_us


@pytest.mark.parametrize("seed", range(5))
def test_once_all_have_come_nobody_waits_for_others(redis_client: redis.Redis, seed: int) -> None:
    # A turn lasts for up to 60 ms: all come in one, learning ends before another, and clocks differ by up to 1 %.
    assert LEARN_US < served_after_us(redis_client, seed) <= LEARN_US + 3 * 60_000 + LEARN_US // 50
    assert served_after_us(redis_client, seed, stopped=True) > OTHERS_US + LEARN_US
    assert served_after_us(redis_client, seed, settled=False) > OTHERS_US + LEARN_US, "there may be more of them"


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_nobody_is_locked_out_by_it(redis_client: redis.Redis, strategy: str) -> None:
    """However much was known, something is granted again once it has left."""
    allowed = 0
    for seed in range(8):
        losing = Losing(redis_client, seed, strategy)
        losing.run()
        losing.world.t_us += 3 * losing.rule.window_us
        for _ in range(5):
            losing.turn(ask=True)
        allowed += losing.allowed_again
    assert allowed > 0


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_without_telling_it_the_promise_is_broken(
    redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch, strategy: str
) -> None:
    """What the test above would find."""

    def mute(world: World) -> None:
        for process in world.processes:
            process.connection.mute = True

    broken = 0
    for seed in range(12):
        losing = Losing(redis_client, seed, strategy)
        mute(losing.world)
        losing.run()
        try:
            check(losing.public, losing.admitted)
        except PromiseBrokenError:
            broken += 1
    assert broken > 0


def test_what_was_admitted_before_a_clear_is_charged_by_nobody(redis_client: redis.Redis) -> None:
    """One process is cut off when all is cleared, and owes what it has admitted alone."""
    world = World(redis_client)
    rule = RateThrottleRule("r", 10, 60, on_outage="local").compiled
    near, far = Process(world), Process(world)
    for process in (near, far):
        process.check("k", rule)
    for _ in range(60):
        for process in (near, far):
            process.round_trip()
        world.t_us += 20_000
    far.connection.lose()
    with running(far.loop):
        far.connection.batch.begin_outage(StorageUnavailable("cut off"))
    alone = far.check("k", rule).decision
    assert alone is not None
    assert alone.allowed
    assert far.repair.owed == 1
    words = (RUN, near.repair.epoch, "clearing", "clear", 0, 0, 0, world.server_us())
    keys = (world.names.epoch_key, world.names.processes_key)
    redis_client.evalsha(world.store.shas["beat"], 2, *keys, "id", *words)
    # It isn't counted any more, nor is anybody waited for.
    check = near.check("k", rule)
    near.round_trip()
    assert check.decision is not None
    assert (check.decision.source, check.decision.remaining) == ("redis", 9)
    far.connection.wanted = True
    far.round_trip()
    assert far.repair.owed == len(far.bounds) == 0
    check = far.check("k", rule)
    far.round_trip()
    assert check.decision is not None
    assert (check.decision.source, check.decision.remaining) == ("redis", 8)


def test_what_a_broken_connection_had_to_charge_comes_before_the_checks_of_another(redis_client: redis.Redis) -> None:
    world = World(redis_client)
    rule = RateThrottleRule("r", 10, 60, on_outage="local").compiled
    process = Process(world, expected=1)
    process.check("k", rule)
    for _ in range(60):
        process.round_trip()
        world.t_us += 20_000
    first, second = process.connection, Connection(process, process.loop)
    process.connection = second
    second.wanted = True
    process.round_trip()
    first.lose()
    with running(process.loop):
        first.batch.begin_outage(StorageUnavailable("cut off"))
    process.connection = first
    process._forget_here()
    alone = process.check("k", rule).decision
    assert alone is not None
    assert alone.source == "outage"
    first.wanted = True
    process.connect()
    assert [request.mode for request in first.unserved] == ["repair"]
    first.lose()
    assert process.repair.owed == 1
    process.connection = second
    process._forget_here()
    check = process.check("k", rule)
    world.settle()
    assert check.decision is not None
    assert (check.decision.source, check.decision.remaining) == ("redis", 7)


def test_what_would_hold_the_store_for_too_long_goes_out_in_several_calls(redis_client: redis.Redis) -> None:
    world = World(redis_client)
    rule = RateThrottleRule("r", 64, 60, on_outage="local").compiled
    process = Process(world, expected=1)
    keys = [f"key:{number}" for number in range(100)]
    for key in keys:
        process.check(key, rule, 30)
    world.settle()
    process.connection.lose()
    with running(process.loop):
        process.connection.batch.begin_outage(StorageUnavailable("cut off"))
    alone = []
    for _ in range(24):
        world.t_us += 300
        alone += [process.check(key, rule).decision for key in keys]
    assert all(decision is not None and decision.source == "outage" and decision.allowed for decision in alone)
    world.store.lose({})
    told: list[int] = []

    def note(request: Request, reply: Any) -> Any:
        if b"assert" in request.words:
            told.append(int(request.words[-1]))
        return reply

    process.connection.tamper = note
    process.connection.wanted = True
    process.connect()
    for _ in range(60):
        process.round_trip()
        world.t_us += 20_000
    begun = [first for first in told if first > 1]
    assert begun == sorted(set(begun)), "it goes on where it was, and begins anew nowhere"
    assert len(begun) > 2
    checks = [process.check(key, rule, 10) for key in keys]
    world.settle()
    assert all(check.decision is not None and check.decision.source == "redis" for check in checks)
    again = [process.check(key, rule) for key in keys]
    world.settle()
    assert all(check.decision is not None and not check.decision.allowed for check in again), "30, 24 and 10 of 64"
