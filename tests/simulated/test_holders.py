"""Processes hold slots in a store whose requests and replies are lost and late, while they stand still and it loses its data."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest
import redis

from ratethrottle import ConcurrencyRule
from ratethrottle._engine.held import held_entry
from ratethrottle._holding import Ask, Held
from ratethrottle.errors import StorageError
from ratethrottle.storage.redis.holders import IDLE_MAX, Here
from ratethrottle.storage.redis.slots import Slots
from tests.kit.processes import Process, World, running

S = 1_000_000
LIMIT, TTL_S = 5, 2
RULE = ConcurrencyRule("db", LIMIT, TTL_S, on_outage="deny")


class Line:
    """The slots of one key in a process, as `waiting/slots.py` asks for them."""

    gone = False

    def __init__(self, process: Process, slots: Slots, key: str = "k", rule: ConcurrencyRule = RULE) -> None:
        self.process, self.slots, self.rule = process, slots, rule
        self.entry = held_entry(rule.compiled, key, 1)
        self.held = self.losses = self.granted = 0
        self.future: asyncio.Future[Held] | None = None
        self.last: tuple[Ask, int] | None = None

    def lost(self) -> None:
        self.held = 0
        self.losses += 1

    def wake(self) -> None:
        raise AssertionError("nobody wakes it")

    def ask(self, released: int, cost: int = 1, wanted: int = 0) -> None:
        """Ask once, unless an answer is on its way."""
        self.hear()
        if self.future is None:
            self.held -= released
            ask = Ask(self.held, cost, wanted)
            self.last = ask, self.losses
            with running(self.process.loop):
                answer = self.slots.hold(self, self.rule, ask)
            if isinstance(answer, Held):
                self.take(answer)
            else:
                self.future = answer

    def hear(self) -> None:
        if self.future is not None and self.future.done():
            future, self.future = self.future, None
            if not future.cancelled() and not isinstance(future.exception(), StorageError):
                self.take(future.result())

    def take(self, answer: Held) -> None:
        assert self.last is not None
        ask, losses = self.last
        if losses == self.losses:
            self.held = (0 if answer.lost else ask.held) + answer.granted * ask.cost
            self.granted += answer.granted

    @property
    def holds(self) -> int:
        """What it holds, for all that it could know by now."""
        self.hear()
        record = self.slots._book.find(self, RULE.ttl_us)
        if record is None:
            assert not self.held
            return 0
        lapsed = record.identity.until_us <= self.process.now_us()
        return 0 if lapsed and record.known else self.held


def slots_of(process: Process, on_outage: str = "deny") -> Slots:
    return Slots(
        process.names,
        process.repair,
        Here(),
        process.connection,  # type: ignore[arg-type]  # as much of a loop as it uses
        process.loop,
        deadline_us=250_000,
        on_outage=on_outage,
    )


class Scene:
    """A world with processes that hold slots of one key."""

    def __init__(self, client: redis.Redis, seed: int, count: int = 4) -> None:
        self.rng = rng = random.Random(seed)
        self.world = World(client)
        self.processes = [Process(self.world, rate=1_000_000 + rng.randint(-300, 300)) for _ in range(count)]
        self.lines = [Line(process, slots_of(process)) for process in self.processes]
        self.still_until_us = [0] * count
        self.most = 0

    def check(self) -> None:
        held = [line.holds for line in self.lines]
        assert sum(held) <= LIMIT, (held, self.world.t_us)
        self.most = max(self.most, sum(held))

    def step(self, gentle: bool = False) -> None:
        rng = self.rng
        self.world.t_us += rng.choice((0, 100, 1_000, 3_000, 10_000))
        if not gentle and rng.random() < 0.01:
            self.world.t_us += 60_000
        self.check()
        number = rng.randrange(len(self.lines))
        process, line = self.processes[number], self.lines[number]
        if not gentle and rng.random() < 0.003:
            self.still_until_us[number] = self.world.t_us + rng.choice((S // 2, 3 * S))
        if self.still_until_us[number] > self.world.t_us:
            return
        if gentle or rng.random() < 0.3:
            process.round_trip()
        else:
            self.world.disturb(process, rng)
        process.turn()
        if rng.random() < 0.3:
            line.ask(rng.randint(0, line.held), rng.choice((1, 1, 2)), rng.choice((0, 1, 1, 3)))
        self.check()

    def recover(self, for_us: int = 2 * S) -> None:
        """All that is on its way arrives, and everybody is well for a while."""
        self.still_until_us = [0] * len(self.lines)
        ends_us = self.world.t_us + for_us
        while self.world.t_us < ends_us:
            self.world.t_us += 5_000
            for process in self.processes:
                process.round_trip()
            self.check()

    def end(self) -> None:
        """Nothing that nobody holds is counted: one process can have all."""
        self.recover()
        for line in self.lines:
            line.ask(line.held)
        self.recover(S)
        assert not any(line.held or len(line.slots) for line in self.lines)
        self.lines[0].ask(0, 1, LIMIT)
        self.recover(S)
        assert self.lines[0].held == LIMIT
        client: Any = self.world.store.client
        assert all(
            client.pttl(key) > 0 for key in client.keys(self.world.names.holders_key.removesuffix(b":slots") + b":*slots*")
        )


@pytest.mark.redis
@pytest.mark.parametrize("round_number", range(6))
def test_never_more_than_the_limit_is_held_whatever_is_lost_late_or_still(redis_client: redis.Redis, round_number: int) -> None:
    seed = random.randrange(10**9)
    print(f"seed {seed}")
    scene = Scene(redis_client, seed)
    for _ in range(6_000):
        scene.step()
    assert scene.most >= LIMIT - 1
    assert sum(line.granted for line in scene.lines) > 50
    scene.end()


@pytest.mark.redis
@pytest.mark.parametrize("round_number", range(6))
def test_what_is_held_stays_held_when_the_store_loses_its_data(redis_client: redis.Redis, round_number: int) -> None:
    """All of it, or what came last: a process tells the store what it holds, before others are granted anything."""
    seed = random.randrange(10**9)
    print(f"seed {seed}")
    scene = Scene(redis_client, seed)
    rng = scene.rng
    kept: dict[bytes, bytes] = {}
    for _ in range(8):
        for _ in range(rng.randint(50, 300)):
            scene.step(gentle=True)
        scene.recover(S // 10)
        losses, held = [line.losses for line in scene.lines], [line.holds for line in scene.lines]
        scene.world.adrift.clear()
        if rng.random() < 0.5:
            kept = {}
        lose(scene.world, kept)
        kept = dumped(scene.world)
        scene.recover(S // 2 + rng.randrange(S))
        assert [line.losses for line in scene.lines] == losses
        assert all(line.holds >= before for line, before in zip(scene.lines, held, strict=True))
        kept = dumped(scene.world) if rng.random() < 0.7 else kept
    assert scene.most == LIMIT
    scene.end()


@pytest.mark.redis
@pytest.mark.parametrize("unreadable", [False, True])
def test_what_was_given_back_before_the_store_heard_of_it_keeps_nobody_waiting(
    redis_client: redis.Redis, unreadable: bool
) -> None:
    rule = ConcurrencyRule("db", LIMIT, TTL_S)
    world = World(redis_client)
    processes = [Process(world, expected=1), Process(world, expected=1)]
    slots = slots_of(processes[0], "local")
    known, granted_here = [Line(processes[0], slots, key, rule) for key in ("known", "here")]
    other = Line(processes[1], slots_of(processes[1]), "other")

    def pass_time(for_us: int, who: list[Process]) -> None:
        ends_us = world.t_us + for_us
        while world.t_us < ends_us:
            world.t_us += 5_000
            for process in who:
                process.round_trip()

    known.ask(0, 1, 1)
    pass_time(S, processes)
    processes[0].connection.late()  # nothing is heard for longer than a ttl
    granted_here.ask(0, 1, 1)
    assert (known.holds, granted_here.holds) == (1, 1)
    for _ in range(3 * TTL_S):
        world.t_us += S // 2
        processes[0].turn()
    assert (known.holds, granted_here.holds, known.losses) == (0, 1, 1)
    if unreadable:
        redis_client.set(processes[0].names.slots_key(granted_here.entry), "something else")
    else:
        granted_here.ask(1)
    pass_time(S // 2, processes)
    for line in (known, other):
        line.ask(0, 1, LIMIT)
        pass_time(S // 10, processes)
        assert line.holds == LIMIT


@pytest.mark.redis
def test_while_nothing_can_be_renewed_no_timer_turns_round(redis_client: redis.Redis) -> None:
    world = World(redis_client)
    process = Process(world, expected=1)
    slots = slots_of(process)
    line = Line(process, slots)
    line.ask(0, 1, 1)
    process.round_trip()
    assert line.holds == 1
    process.connection.late()  # nothing is heard from now on
    fired = 0
    on_timer = slots._on_timer

    def count() -> None:
        nonlocal fired
        fired += 1
        on_timer()

    slots._on_timer = count  # type: ignore[method-assign]
    for _ in range(TTL_S * 1_000 + 500):
        world.t_us += 1_000
        process.turn()
    assert (line.losses, line.holds) == (1, 0)
    assert fired < 10
    # And when all is well again, what is held is renewed as before.
    process.round_trip()
    line.ask(0, 1, 1)
    for _ in range(3 * TTL_S * 20):
        world.t_us += 50_000
        process.round_trip()
    assert (line.losses, line.holds) == (1, 1)


@pytest.mark.redis
def test_what_is_held_is_renewed_after_an_outage_that_ends_before_its_time(redis_client: redis.Redis) -> None:
    world = World(redis_client)
    process = Process(world, expected=1)
    line = Line(process, slots_of(process))
    line.ask(0, 1, 1)
    process.round_trip()
    for _ in range(4):
        process.connection.late()
        for _ in range(8):
            world.t_us += 100_000
            process.turn()
        process.connection.connect()
        for _ in range(2 * TTL_S * 20):
            world.t_us += 50_000
            process.round_trip()
    assert (line.losses, line.holds) == (0, 1)


@pytest.mark.redis
@pytest.mark.parametrize("ttl_s", [1, 3_600])
def test_holders_of_nothing_are_forgotten(redis_client: redis.Redis, ttl_s: int) -> None:
    """A caller may make up a rule, and a ttl, for each slot."""
    world = World(redis_client)
    process = Process(world, expected=1)
    slots = slots_of(process)
    for number in range(500):
        line = Line(process, slots, rule=ConcurrencyRule("db", LIMIT, ttl_s + number / 1_000))
        line.ask(0, 1, 1)
        process.round_trip()
        line.hear()
        assert line.held == 1
        line.ask(1)
        process.round_trip()
    assert len(slots) == 0
    assert len(slots._book.identities) <= IDLE_MAX
    kept = Line(process, slots)
    kept.ask(0, 1, 1)
    process.round_trip()
    if ttl_s == 1:
        for _ in range(40):
            world.t_us += 50_000
            process.round_trip()
        assert kept.holds == len(slots._book.identities) == 1


@pytest.mark.redis
def test_that_the_store_has_dropped_a_state_is_noticed_within_a_minute(redis_client: redis.Redis) -> None:
    """It says nothing when it evicts a key."""
    world = World(redis_client)
    process = Process(world, expected=1)
    rule = ConcurrencyRule("db", LIMIT, 3_600)
    slots = slots_of(process)
    lines = [Line(process, slots, key, rule) for key in ("kept", "dropped")]
    for line in lines:
        line.ask(0, 1, 1)
    process.round_trip()
    for line in lines:
        line.hear()
        assert line.held == 1
    redis_client.delete(process.names.slots_key(lines[1].entry))
    for _ in range(600):
        world.t_us += 100_000
        process.round_trip()
    assert [(line.losses, line.held) for line in lines] == [(0, 1), (1, 0)]


def dumped(world: World) -> dict[bytes, bytes]:
    """What a replica would have now."""
    client: Any = world.store.client
    return {key: client.dump(key) for key in client.keys(world.store.prefix + b":*")}


def lose(world: World, kept: dict[bytes, bytes]) -> None:
    """Another server has taken over, which has only this."""
    client: Any = world.store.client
    world.fail_over({})
    for key, value in kept.items():
        client.restore(key, 10**9 if b"slots" in key else 0, value, replace=True)
