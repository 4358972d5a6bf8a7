"""The interval checker passes what keeps the promise, and fails what breaks it: a checker that can't fail proves nothing."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from itertools import combinations_with_replacement

import pytest

from ratethrottle import InMemoryStorage, RateThrottleCore, RateThrottleRule
from ratethrottle._engine.decision import Decision, Entry
from ratethrottle._engine.definitions import CompiledRule
from ratethrottle.testing.intervals import Admission, PromiseBrokenError, check, check_bracketed
from tests.kit.oracle import window_start
from tests.kit.strategies import START_US, STRATEGIES, make_rule
from tests.kit.subjects import Core

LIMIT, WINDOW_US = 20, 1_000_000
every_strategy = pytest.mark.parametrize("strategy", STRATEGIES)


class FakeClock:
    """A clock that goes on by some µs at each look."""

    def __init__(self, by_us: int) -> None:
        self.now_us, self.by_us = START_US, by_us

    def __call__(self) -> int:
        self.now_us += self.by_us
        return self.now_us


class ReadThenWriteStorage(InMemoryStorage):
    """Looks whether there is room, and consumes later: what a limiter does that reads and writes with two commands."""

    async def decide(self, entries: Sequence[Entry]) -> list[Decision]:
        decisions = [await self.peek(entry) for entry in entries]
        await asyncio.sleep(0)  # the network
        for entry, decision in zip(entries, decisions, strict=True):
            if decision.allowed:
                self.table.decide(entry)
        return decisions


class SwappingStorage(InMemoryStorage):
    """Now and then hands a caller the decision of the one before: what a connection does after a cancelled read."""

    before: Decision | None = None

    async def decide(self, entries: Sequence[Entry]) -> list[Decision]:
        [decision] = await super().decide(entries)
        await asyncio.sleep(0)
        swapped, self.before = self.before, decision
        return [swapped or decision]


async def hammer(
    storage: InMemoryStorage, clock: FakeClock, rule: RateThrottleRule, keys: tuple[str, ...]
) -> dict[str, list[Admission]]:
    """Eight tasks check for a while through the storage's coroutines; returns the decisions of each key."""
    told: dict[str, list[Admission]] = {key: [] for key in keys}
    limiter = RateThrottleCore(InMemoryStorage(), rules=[rule])

    async def client(number: int) -> None:
        key = keys[number % len(keys)]
        for _ in range(200):
            if (await storage.decide([limiter._entry(key)]))[0].allowed:
                told[key].append((clock.now_us, 1))

    await asyncio.gather(*(client(number) for number in range(8)))
    return told


@every_strategy
async def test_it_passes_the_core_under_eight_tasks(strategy: str) -> None:
    clock, rule = FakeClock(997), make_rule(strategy, LIMIT, WINDOW_US)
    for log in (await hammer(InMemoryStorage(clock_us=clock), clock, rule, ("a", "b"))).values():
        assert len(log) >= LIMIT
        check(rule, log)
        check_bracketed(rule, [(at_us, at_us, units) for at_us, units in log])


@every_strategy
async def test_it_fails_a_storage_that_reads_and_then_writes(strategy: str) -> None:
    clock, rule = FakeClock(997), make_rule(strategy, LIMIT, WINDOW_US)
    log = (await hammer(ReadThenWriteStorage(clock_us=clock), clock, rule, ("a",)))["a"]
    with pytest.raises(PromiseBrokenError):
        check(rule, log)


@every_strategy
async def test_it_fails_a_swapped_reply(strategy: str) -> None:
    """One key is used up and the other free: a reply that reaches the wrong caller lets the first one through."""
    clock, rule = FakeClock(10), make_rule(strategy, LIMIT, WINDOW_US)
    storage = SwappingStorage(clock_us=clock)
    limiter = RateThrottleCore(InMemoryStorage(), rules=[rule])
    told: list[Admission] = []
    for number in range(4 * LIMIT):
        if (await storage.decide([limiter._entry("busy")]))[0].allowed:
            told.append((clock.now_us, 1))
        await storage.decide([limiter._entry(f"idle {number}")])
    with pytest.raises(PromiseBrokenError):
        check(rule, told)


def off_by_one(rule: RateThrottleRule) -> CompiledRule:
    """The rule with a capacity of one more, under the same slots and ticks: a comparison with the wrong sign."""
    ours = rule.compiled
    return CompiledRule(
        ours.name, ours.strategy, ours.kind, ours.limit + 1, ours.capacity + 1, ours.window_us, ours.unit_ticks, ours.drain_ticks,
        ours.slot_us, ours.coarse_us,
    )  # fmt: skip  # ten lines of a name each say less


@every_strategy
@pytest.mark.parametrize("limit", [1, 7, 64, 65, 1_000])
def test_it_fails_an_off_by_one_core(strategy: str, limit: int) -> None:
    rule = make_rule(strategy, limit, WINDOW_US)
    logs = [played(rule, compiled) for compiled in (rule.compiled, off_by_one(rule))]
    check(rule, logs[0])
    with pytest.raises(PromiseBrokenError):
        check(rule, logs[1])


def played(rule: RateThrottleRule, decided_by: CompiledRule) -> list[Admission]:
    """What an adversary gets that comes at random instants and at promised ones, and takes all that is left now and then."""
    rng, core, now_us, left, log = random.Random(rule.limit), Core(), START_US, 0, []
    for _ in range(500):
        cost = rng.choice((1, 1 + rule.limit // 3, left or 1))
        allowed, left, retry_us, _ = core.check(decided_by, now_us, cost)
        if allowed:
            log.append((now_us, cost))
        now_us += retry_us if rng.random() < 0.7 else rng.randrange(WINDOW_US // 30)
    return log


@every_strategy
def test_it_agrees_with_every_interval_tried_one_by_one(strategy: str) -> None:
    rule, verdicts = make_rule(strategy, 3, 1_000), set()
    for seed in range(400):
        rng = random.Random(seed)
        log = sorted((START_US + rng.randrange(3_000), rng.choice((1, 1, 2))) for _ in range(rng.randint(2, 7)))
        try:
            check(rule, log)
            passed = True
        except PromiseBrokenError:
            passed = False
        assert passed == one_by_one(rule, log), log
        verdicts.add(passed)
    assert verdicts == {True, False}


def one_by_one(rule: RateThrottleRule, log: list[Admission]) -> bool:
    """The promise of the strategies that have one over intervals, tried on each pair of instants; windows by their numbers."""
    window_us, limit = rule.window_us, rule.limit

    def units(holds: Callable[[int], bool]) -> int:
        return sum(more for at_us, more in log if holds(at_us))

    instants = [at_us for at_us, _ in log]
    if rule.strategy.endswith("bucket"):
        return all(
            units(lambda at_us, a=a, b=b: a <= at_us <= b) * window_us <= rule.capacity * window_us + limit * (b - a)
            for a, b in combinations_with_replacement(instants, 2)
        )
    if rule.strategy == "sliding_window":
        return all(units(lambda at_us, a=a: a <= at_us < a + window_us) <= limit for a in instants)
    for number, (at_us, _) in enumerate(log):
        start_us = window_start(window_us, at_us)
        current = sum(more for other, more in log[: number + 1] if window_start(window_us, other) == start_us)
        before = (
            units(lambda other, start_us=start_us: window_start(window_us, other) == start_us - window_us)
            if rule.compiled.kind == "c"
            else 0
        )
        if min(limit, before) * (start_us + window_us - at_us) > (limit - current) * window_us:
            return False
    return True


@every_strategy
def test_brackets_accuse_nobody_whose_instants_keep_the_promise(strategy: str) -> None:
    rule, rng = make_rule(strategy, 10, WINDOW_US), random.Random(strategy)
    log = played(rule, rule.compiled)
    assert len(log) > 50
    check_bracketed(rule, [(at_us - rng.randrange(200_000), at_us + rng.randrange(200_000), units) for at_us, units in log])


@every_strategy
def test_brackets_still_show_what_is_certainly_too_much(strategy: str) -> None:
    rule = make_rule(strategy, 10, WINDOW_US)
    # Ten seconds' worth at four times the rate, each known to within 2 ms.
    brackets = [(START_US + i * 25_000, START_US + i * 25_000 + 2_000, 1) for i in range(400)]
    with pytest.raises(PromiseBrokenError):
        check_bracketed(rule, brackets)
