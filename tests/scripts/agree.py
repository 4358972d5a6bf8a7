"""Oracle, core and script over random steps, to the unit: `python -m tests.scripts.agree --steps 1000000 [--seed N] [--no-redis]`.

Worlds of a few keys share a clock that steps both ways and stops at the very instants that denials have promised. The script
decides a world's checks of one instant in one call, mostly with equal ones as one item, and often joint checks with them. Some keys are
charged then, or given back to, and some buckets are booked. Ends at the first difference, with a vector for tests/vectors, and 1.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import fakeredis
import redis

from ratethrottle import ConfigurationError, RateThrottleRule
from ratethrottle._engine.bookings import read_booking
from ratethrottle._engine.decision import read_correction
from ratethrottle._engine.definitions import CompiledRule
from ratethrottle.cli.processes import NoRedis, server_program
from tests.kit.clocked import (
    Booking,
    Call,
    ClockedScript,
    Correction,
    JointAnswer,
    JointCheck,
    Part,
    make_bookings,
    make_call,
    make_settlement,
    settled,
)
from tests.kit.joint import check_jointly
from tests.kit.oracle import Answer
from tests.kit.servers import RedisServer
from tests.kit.strategies import START_US, STRATEGIES, calendar_rules, known_rules, make_rule
from tests.kit.subjects import Core, Oracle

CHUNK_STEPS = 12_000
KEYS, CHECKS, INSTANTS = 6, 10, 40
JOINTS = 3  # at most, in every other call
CORRECTED = 0.2  # of the keys, after every call
BOOKED = 0.2  # likewise, and again
AHEAD_MOST_US = 60_000_000
CALENDARS_SHARE = 0.1  # of rules
FAKE_STEPS = 1_500  # fakeredis runs Lua, but takes about fifty times as long
EARLIEST_US, LATEST_US = START_US // 2, START_US * 2  # a state has 16 digits for an instant

Step = tuple[int, RateThrottleRule, int, bool]  # now_us, rule, cost, consume


class DifferenceError(Exception):
    """Two subjects decided differently."""


@dataclass
class Key:
    """A key, the rules that take turns on it, and what happened to it."""

    name: str
    rules: list[RateThrottleRule]
    current: int = 0
    oracle: Oracle = field(default_factory=Oracle)
    history: list[Step] = field(default_factory=list)
    corrected: bool = False  # what happened is not all in its history
    booked: list[tuple[RateThrottleRule, int, int]] = field(default_factory=list)  # rule, units, when it would be empty after it

    def turn(self, rng: random.Random, turns: float) -> RateThrottleRule:
        """The rule of a check that comes now."""
        if rng.random() < turns:
            self.current = rng.randrange(len(self.rules))
        return self.rules[self.current]

    def check(self, rule: CompiledRule, now_us: int, cost: int, *, consume: bool = True) -> Answer:
        """Decide on a part of a joint check, by the oracle. What is only looked at is no part of the key's history."""
        if consume:
            self.history.append((now_us, self.rules[self.current], cost, True))
        return self.oracle.check(rule, now_us, cost, consume=consume)


def random_rule(rng: random.Random) -> RateThrottleRule:
    """A rule of any size, mostly such that a test has time to fill it."""
    while True:
        if rng.random() < CALENDARS_SHARE:
            return rng.choice(calendar_rules())
        if rng.random() < 0.4:
            return rng.choice(known_rules())
        window_us = int(1_000 * 10 ** rng.choice((rng.uniform(0, 10.5), 10.4)))
        limit = int(10 ** rng.choice((rng.uniform(0, 2.5), rng.uniform(0, 9), 8.9)))
        burst = int(10 ** rng.uniform(0, 9)) if rng.random() < 0.3 else None
        try:
            return make_rule(rng.choice(STRATEGIES), limit, window_us, burst)
        except ConfigurationError:
            continue


def changed(rng: random.Random, rule: RateThrottleRule) -> RateThrottleRule:
    """The rule as a later version of a service might have it."""
    while True:
        strategy, limit, window_us = rule.strategy, rule.limit, rule.window_us
        if rule.compiled.calendar is not None and rng.random() < 0.7:
            return rng.choice(calendar_rules())
        what = rng.randrange(4)
        if what == 0:
            strategy = rng.choice(STRATEGIES)
        elif what == 1:
            limit = max(1, min(10**9, int(limit * rng.choice((0.1, 0.5, 2, 10))) + rng.randrange(2)))
        elif what == 2:
            window_us = max(1_000, int(window_us * rng.choice((0.1, 0.5, 1.01, 2, 7))))
        else:
            return random_rule(rng)
        try:
            return make_rule(strategy, limit, window_us, None)
        except ConfigurationError:
            continue


class World:
    """A few keys under one clock."""

    def __init__(self, rng: random.Random, name: str) -> None:
        self.rng, self.core = rng, Core()
        self.now_us = START_US + rng.randrange(10**9)
        self.promised: list[int] = []
        base = random_rule(rng)
        self.keys = [
            Key(f"{name}:{i}", [base, *(changed(rng, base) for _ in range(rng.choice((0, 1, 1, 2))))]) for i in range(KEYS)
        ]
        self.turns = rng.choice((0.05, 0.2, 0.5))  # how often a key's rule changes

    def advance(self) -> None:
        """Move the clock by little, by much, to where something ends, or back."""
        rng, window_us, kind = self.rng, self.rng.choice(self.rng.choice(self.keys).rules).window_us, self.rng.random()
        if kind < 0.25 and self.promised:
            self.now_us = rng.choice(self.promised) + rng.choice((-1, -1, 0, 0, 1))
        elif kind < 0.5:
            self.now_us += rng.randrange(max(2, window_us // rng.choice((40, 300))))
        elif kind < 0.55:
            self.now_us += rng.randrange(3)
        elif kind < 0.7:
            grain = rng.choice((window_us, -(-window_us // 64)))
            self.now_us += grain - self.now_us % grain + rng.choice((-1, 0, 0, 1))
        elif kind < 0.85:
            self.now_us += rng.randrange(window_us)
        elif kind < 0.9:
            self.now_us += rng.randrange(3 * window_us)
        elif kind < 0.94:
            self.now_us -= rng.randrange(1, window_us // 20 + 2)
        elif kind < 0.97:  # as far as a sliding window may be ahead, and no further
            self.now_us -= window_us // 8 + rng.choice((-1, 0, 1, 2))
        else:
            self.now_us -= rng.randrange(2 * window_us)
        if not EARLIEST_US < self.now_us < LATEST_US:
            self.now_us = START_US
        self.promised = [at_us for at_us in self.promised if at_us > self.now_us][-KEYS:]

    def cost(self, rule: RateThrottleRule) -> int:
        """A cost that fills the rule soon, but not at once."""
        capacity = rule.capacity
        return self.rng.choice((1, 1, 1, 2, capacity // 3, capacity // 10, self.rng.randint(1, capacity))) or 1

    def step(self) -> tuple[bool, list[tuple[Key, RateThrottleRule, int]], list[Answer]]:
        """Decide on an instant's checks with oracle and core, for the script to repeat: every third as those before it."""
        self.advance()
        consume = self.rng.random() > 0.1
        checks: list[tuple[Key, RateThrottleRule, int]] = []
        expected: list[Answer] = []
        for i in range(CHECKS):
            if i == 0 or self.rng.random() > 0.3:
                key = self.rng.choice(self.keys)
                rule = key.turn(self.rng, self.turns)
                cost = min(self.cost(rule), rule.capacity)
            key.history.append((self.now_us, rule, cost, consume))
            answer = key.oracle.check(rule.compiled, self.now_us, cost, consume=consume)
            core = self.core.check(rule.compiled, self.now_us, cost, consume=consume, key=key.name)
            if core != answer:
                raise DifferenceError(difference("core", key, len(key.history), answer, core))
            if answer[2] > 0:
                self.promised.append(self.now_us + answer[2])
            elif self.rng.random() < 0.2:  # when it is forgotten, by this version and by another
                self.promised += (self.now_us + answer[3], self.now_us + self.rng.choice(key.rules).window_us)
            checks.append((key, rule, cost))
            expected.append(answer)
        return consume, checks, expected

    def joint_checks(self, consume: bool) -> Iterator[tuple[JointCheck, list[JointAnswer]]]:
        """Decide on joint checks of this instant, likewise. Each comes with what its equal checks hear."""
        rng = self.rng
        keys = {key.name: key for key in self.keys}
        for _ in range(rng.choice((0, rng.randint(1, JOINTS)))):
            sets: list[list[Part]] = []
            for key in rng.sample(self.keys, rng.randint(1, KEYS - 1)):
                rule = key.turn(rng, self.turns)
                part = Part(rule.compiled, key.name, min(self.cost(rule), rule.capacity), flagged=rng.random() < 0.15)
                if sets and not part.flagged and not sets[-1][0].flagged and rng.random() < 0.3:
                    sets[-1].append(part)
                else:
                    sets.append([part])
            told = []
            for _ in range(count := rng.randint(1, 4)):
                told.append(check_jointly(keys, sets, self.now_us, consume=consume))
                by_core = self.core.check_jointly(sets, self.now_us, consume=consume)
                if by_core != told[-1]:
                    raise DifferenceError(joint_difference("core", self.now_us, sets, told[-1], by_core))
            yield JointCheck(sets, count), told

    def settlement(self) -> tuple[list[Correction], list[Answer]]:
        """Charge some keys now, and give back to others, likewise. What comes back was granted, or asked for in vain."""
        rng = self.rng
        settlement: list[Correction] = []
        expected: list[Answer] = []
        for key in self.keys:
            if rng.random() >= CORRECTED:
                continue
            at_us, rule, cost, _ = rng.choice(key.history[-12:] or [(self.now_us, key.rules[key.current], 1, True)])
            backs, facts = rng.random() < 0.6, (rule.compiled, self.now_us)
            units = rng.randint(1, cost) if backs else min(10**9, cost * rng.choice((1, 1, 1, 2, 30)))
            key.corrected = True
            if backs:
                answer, core = key.oracle.refund(*facts, units, at_us), self.core.refund(*facts, units, at_us, key=key.name)
            else:
                answer, core = key.oracle.charge(*facts, units), self.core.charge(*facts, units, key=key.name)
            settlement.append(Correction(rule.compiled, key.name, units, at_us if backs else None))
            expected.append(answer)
            if core != answer:
                raise DifferenceError(correction_difference("core", self.now_us, settlement[-1], answer, core))
            if answer[2] > 0:
                self.promised.append(self.now_us + answer[2])
        return settlement, expected

    def bookings(self) -> tuple[list[Booking], list[list[Answer]]]:
        """Book for some keys, likewise, or give back what was booked. Each comes with what its equal ones hear."""
        rng = self.rng
        bookings: list[Booking] = []
        expected: list[list[Answer]] = []
        for key in [*self.keys, *self.keys]:
            if rng.random() >= BOOKED:
                continue
            if key.booked and rng.random() < 0.4:
                rule, units, empty_us = key.booked.pop(rng.choice((-1, -1, rng.randrange(len(key.booked)))))
                key.oracle.unbook(rule.compiled, self.now_us, units, empty_us)
                self.core.unbook(rule.compiled, self.now_us, units, empty_us, key=key.name)
                bookings.append(Booking(rule.compiled, key.name, units, empty_us=empty_us))
                expected.append([])
            elif (rule := key.turn(rng, self.turns)).compiled.kind == "b":
                units, ahead_us = min(self.cost(rule), rule.capacity), rng.choice((0, rng.randrange(10**6), AHEAD_MOST_US))
                told = []
                for _ in range(rng.randint(1, 3)):
                    told.append(key.oracle.book(rule.compiled, self.now_us, units, ahead_us))
                    core = self.core.book(rule.compiled, self.now_us, units, ahead_us, key=key.name)
                    if core != told[-1]:
                        one = Booking(rule.compiled, key.name, units, ahead_us)
                        raise DifferenceError(booking_difference("core", self.now_us, one, told[-1], core))
                    if told[-1][0]:
                        key.booked.append((rule, units, self.now_us + told[-1][3]))
                        self.promised.append(self.now_us + told[-1][2])
                bookings.append(Booking(rule.compiled, key.name, units, ahead_us, len(told)))
                expected.append(told)
            key.corrected = True
        return bookings, expected


def booking_difference(who: str, now_us: int, booking: Booking, oracle: Answer, theirs: Answer) -> str:
    """What there is to say of a booking: the seed repeats it."""
    return f"the oracle says {oracle}, the {who} {theirs}, at {now_us} of {booking}"


def correction_difference(who: str, now_us: int, correction: Correction, oracle: Answer, theirs: Answer) -> str:
    """What there is to say of a charge or a refund: the seed repeats it."""
    return f"the oracle says {oracle}, the {who} {theirs}, at {now_us} of {correction}"


def joint_difference(who: str, now_us: int, sets: list[list[Part]], oracle: JointAnswer, theirs: JointAnswer) -> str:
    """What there is to say of a joint check: the seed repeats it."""
    shown = [[(part.key, part.rule.kind, part.rule.capacity, part.cost, part.flagged) for part in parts] for parts in sets]
    return f"the oracle says {oracle}, the {who} {theirs}, at {now_us} of {shown}"


def facts_of(rule: RateThrottleRule) -> list[Any]:
    """What a vector says of a rule."""
    if rule.compiled.calendar is None:
        return [rule.strategy, rule.limit, rule.window_us, rule.burst]
    return [rule.strategy, rule.limit, rule.window, None, rule.timezone, rule.anchor]


def difference(who: str, key: Key, length: int, oracle: Answer, theirs: Answer) -> str:
    """A vector of the key's steps up to the difference, replayed on an oracle for what each should give."""
    if key.corrected:
        return f"the oracle says {oracle}, the {who} {theirs}, to {key.history[length - 1]}, of a key that was corrected before"
    steps = key.history[:length]
    rules = list(dict.fromkeys(rule for _, rule, _, _ in steps))
    replay = Oracle()
    rows: list[list[Any]] = []
    for now_us, rule, cost, consume in steps:
        answer = replay.check(rule.compiled, now_us, cost, consume=consume)
        rows.append([now_us - steps[0][0], str(rules.index(rule)), "check" if consume else "peek", cost, *answer])
    vector = {
        "name": f"{who} differed",
        "start_us": steps[0][0],
        "rules": {str(i): facts_of(rule) for i, rule in enumerate(rules)},
        "steps": rows,
    }
    return f"the oracle says {oracle}, the {who} {theirs}, after\n{json.dumps(vector)}"


class Scripts:
    """The script on a client: queues the calls of a world, and compares their answers later."""

    def __init__(self, who: str, client: Any) -> None:
        self.who, self.client = who, client
        self.script = ClockedScript(client)
        self.queued: list[tuple[Call, list[tuple[Key, int]], list[Answer], int, list[list[JointAnswer]]]] = []
        self.corrections: list[tuple[int, list[Correction], list[Answer]]] = []
        self.bookings: list[tuple[int, list[Booking], list[list[Answer]]]] = []
        self.pipeline = client.pipeline(transaction=False)

    def queue(
        self,
        now_us: int,
        call: Call,
        marks: list[tuple[Key, int]],
        expected: list[Answer],
        jointly: list[list[JointAnswer]],
    ) -> None:
        """Take up a call. marks: the key of each of its checks, and how long its history was with that."""
        self.script.send(self.pipeline, now_us, call)
        self.queued.append((call, marks, expected, now_us, jointly))

    def queue_settlement(self, now_us: int, settlement: list[Correction], expected: list[Answer]) -> None:
        """Take up the corrections that come after a call, if there are any."""
        if settlement:
            self.script.send(self.pipeline, now_us, make_settlement(settlement, now_us))
        self.corrections.append((now_us, settlement, expected))

    def queue_bookings(self, now_us: int, bookings: list[Booking], expected: list[list[Answer]]) -> None:
        """Take up the bookings that come after that, if there are any."""
        if bookings:
            self.script.send(self.pipeline, now_us, make_bookings(bookings))
        self.bookings.append((now_us, bookings, expected))

    def compare(self) -> None:
        """Send what is queued and hold the answers against the oracle's."""
        replies = iter(self.pipeline.execute())
        for queued, corrections, bookings in zip(self.queued, self.corrections, self.bookings, strict=True):
            self.compare_checks(*queued, next(replies))
            if corrections[1]:
                self.compare_corrections(*corrections, next(replies))
            if bookings[1]:
                self.compare_bookings(*bookings, next(replies))
        assert not list(replies)
        self.queued.clear()
        self.corrections.clear()
        self.bookings.clear()

    def compare_bookings(self, now_us: int, bookings: list[Booking], expected: list[list[Answer]], reply: list[Any]) -> None:
        """Hold what the script answers to bookings against what the oracle says to each of the equal ones."""
        for booking, oracles, told in zip(bookings, expected, settled(bookings, reply)[0], strict=True):
            evenly = booking.rule.strategy == "leaky_bucket"
            for place, ours in enumerate(oracles):
                theirs = read_booking(booking.rule, told.numbers, booking.units, evenly, place)
                if ours != theirs or told.took != sum(answer[0] for answer in oracles):
                    raise DifferenceError(booking_difference(self.who, now_us, booking, ours, theirs))

    def compare_corrections(self, now_us: int, settlement: list[Correction], expected: list[Answer], reply: list[Any]) -> None:
        """Hold what the script answers to corrections against the oracle's answers."""
        for correction, ours, told in zip(settlement, expected, settled(settlement, reply)[0], strict=True):
            theirs = read_correction(correction.rule, told.numbers)
            if ours != theirs or told.took != 1:
                raise DifferenceError(correction_difference(self.who, now_us, correction, ours, theirs))

    def compare_checks(
        self,
        call: Call,
        marks: list[tuple[Key, int]],
        expected: list[Answer],
        now_us: int,
        jointly: list[list[JointAnswer]],
        reply: list[Any],
    ) -> None:
        """Hold the answers to checks against the oracle's."""
        for (key, length), ours, theirs in zip(marks, expected, call.answers(reply), strict=True):
            if ours != theirs:
                raise DifferenceError(difference(self.who, key, length, ours, theirs))
        for joint, oracles, scripts in zip(call.joints, jointly, call.heard(reply), strict=True):
            for one, other in zip(oracles, scripts, strict=True):
                if one != other:
                    raise DifferenceError(joint_difference(self.who, now_us, joint.sets, one, other))


def marks_of(checks: list[tuple[Key, RateThrottleRule, int]]) -> list[tuple[Key, int]]:
    """The key of each check that was decided just now, and how long its history was with that."""
    later: dict[str, int] = {}
    marks = []
    for key, _, _ in reversed(checks):
        marks.append((key, len(key.history) - later.get(key.name, 0)))
        later[key.name] = later.get(key.name, 0) + 1
    return marks[::-1]


def run(seed: int, chunk: int, steps: int, url: str | None) -> tuple[int, int]:
    """Decide `steps` times in worlds that depend on seed and chunk alone. Returns how many were decided, and how many allowed."""
    rng = random.Random(f"{seed}/{chunk}")
    client: Any = redis.Redis.from_url(url) if url else None
    scripts = [Scripts("script on Redis", client)] if client else []
    fake = Scripts("script on fakeredis", fakeredis.FakeRedis(server=fakeredis.FakeServer())) if chunk == 0 else None
    done = allowed = 0
    while done < steps:
        world = World(rng, f"agree:{chunk}:{done}")
        subjects = [*scripts, fake] if fake and done < FAKE_STEPS else scripts
        for _ in range(INSTANTS):
            consume, checks, expected = world.step()
            merge, marks = rng.random() < 0.7, marks_of(checks)
            decided = list(world.joint_checks(consume))
            joints, jointly = [joint for joint, _ in decided], [told for _, told in decided]
            settlement, corrected = world.settlement()
            bookings, booked = world.bookings()
            done += CHECKS + sum(map(len, jointly)) + len(settlement) + sum(map(len, booked))
            allowed += sum(answer[0] for answer in expected) + sum(told[0] for each in jointly for told in each)
            told = [(rule.compiled, key.name, cost) for key, rule, cost in checks]
            call = make_call(told, "check" if consume else "peek", merge=merge, joints=joints, now_us=world.now_us)
            for subject in subjects:
                subject.queue(world.now_us, call, marks, expected, jointly)
                subject.queue_settlement(world.now_us, settlement, corrected)
                subject.queue_bookings(world.now_us, bookings, booked)
        for subject in subjects:
            subject.compare()
            subject.client.delete(*(key.name for key in world.keys))
    if client:
        client.close()
    return done, allowed


def chunks(seed: int, steps: int, url: str | None, workers: int) -> Iterator[tuple[int, int]]:
    """Run all chunks on all cores, and yield each one's counts as it ends."""
    with ProcessPoolExecutor(workers) as pool:
        sizes = [min(CHUNK_STEPS, steps - start) for start in range(0, steps, CHUNK_STEPS)]
        running = [pool.submit(run, seed, chunk, size, url) for chunk, size in enumerate(sizes)]
        try:
            for future in as_completed(running):
                yield future.result()
        finally:
            for future in running:
                future.cancel()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.scripts.agree", description=__doc__)
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--no-redis", action="store_true", help="without the script on a real Redis")
    options = parser.parse_args()
    if not options.no_redis:
        try:
            server_program()
        except NoRedis as reason:
            print(f"{reason}; pass --no-redis to go without the script on a real Redis", file=sys.stderr)
            return 2
    print(f"oracle, core and script over {options.steps:,} steps, seed {options.seed}", flush=True)
    began, done, allowed = time.monotonic(), 0, 0
    with nullcontext() if options.no_redis else RedisServer() as server:
        try:
            for steps, granted in chunks(options.seed, options.steps, server and f"unix://{server.socket}", options.workers):
                done, allowed = done + steps, allowed + granted
                if sys.stderr.isatty() or done >= options.steps or done % 100_000 < steps:
                    rate = done / (time.monotonic() - began)
                    print(f"{done:>11,} steps  {allowed:>11,} allowed  {rate:>7,.0f} steps/s", file=sys.stderr, flush=True)
        except DifferenceError as found:
            print(f"DIFFERENT (seed {options.seed}): {found}")
            return 1
    print(f"no difference in {done:,} steps ({allowed:,} allowed), {done / (time.monotonic() - began):,.0f} steps/s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
