"""Joint checks travel together: all parts are granted or nothing is consumed, and each check hears what it would have heard alone."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import redis
from hypothesis import given, settings
from hypothesis import strategies as st

from ratethrottle import RateThrottleRule
from ratethrottle._engine.decision import Decision
from ratethrottle._engine.definitions import CompiledRule
from ratethrottle.errors import StateUnreadable, StorageUnavailable
from ratethrottle.testing import intervals
from tests.kit.clocked import JointAnswer, epoch_text
from tests.kit.processes import Check, JointCheck, Process, Set, World
from tests.kit.store import NEVER_US, Item, JointItem, Request
from tests.kit.strategies import STRATEGIES

pytestmark = pytest.mark.redis

TTL_US = 1_000_000
NEVER_STALE_US = 10**15  # with it nobody is parked, so that all leave in the order in which they came


def rule(name: str, limit: int = 5, window: float = 60, strategy: str = "fixed_window", **options: Any) -> CompiledRule:
    return RateThrottleRule(name, limit, window, strategy=strategy, **options).compiled


A, B, C = rule("a", 5), rule("b", 3), rule("c", 9)


def parts(decision: Decision) -> tuple[Decision, ...]:
    return decision.parts or (decision,)


def answer(decision: Decision) -> tuple[bool, int, int, int]:
    retry_us = decision.retry_after_us
    return (
        decision.allowed and not decision.over,
        decision.remaining,
        -1 if retry_us == NEVER_US else retry_us,
        decision.reset_after_us,
    )


def heard(check: JointCheck) -> JointAnswer:
    """In the oracle's form."""
    assert check.decision is not None
    told = []
    for of_set, decision in zip(check.sets, parts(check.decision), strict=True):
        names = [part.rule.name for part in of_set]
        told.append((names.index(decision.rule), answer(decision)))
        assert decision.key
        assert decision.cost == of_set[0].cost
        assert decision.source == check.decision.source
    return check.decision.allowed, told


def binds(decision: Decision) -> None:
    """The decision is that of the part that binds."""
    if decision.allowed:
        share, first = min((part.remaining / part.limit, i) for i, part in enumerate(decision.parts))
        bound = decision.parts[first]
        assert decision.remaining / decision.limit == share
    else:
        denied = [part for part in decision.parts if not part.allowed]
        bound = max(denied, key=lambda part: part.retry_after)
    assert (decision.rule, decision.remaining, decision.retry_after_us) == (bound.rule, bound.remaining, bound.retry_after_us)


def assign(process: Process, request: Request) -> None:
    """Find out which checks a call carries: of each key the ones that came first, in their order, single ones before joint ones."""
    if request.mode != "check":
        return
    for item in request.items:
        take(item, first_of(process, item.key, item.count))
        assert all(check.cost == item.cost and check.state_keys == [item.key] for check in item.members)
    for joint in request.joints:
        keys = [part.key for part in joint.parts]
        take(joint, first_of(process, keys[0], joint.count))
        for check in joint.members:
            assert isinstance(check, JointCheck)
            assert check.state_keys == keys
            assert [[part.cost for part in of_set] for of_set in check.sets] == [
                [part.cost for part in of_set] for of_set in joint.sets
            ]
        for key in keys[1:]:
            after = [check for check in process.queues[key] if check.item is joint or check.waits][: joint.count]
            assert after == joint.members, "nothing that came before waits"


def first_of(process: Process, key: bytes, count: int) -> list[Check]:
    waiting = [check for check in process.queues[key] if check.waits]
    assert len(waiting) >= count
    return waiting[:count]


def take(item: Item | JointItem, checks: list[Check]) -> None:
    item.members = checks
    for position, check in enumerate(checks):
        check.item, check.position = item, position


def hears_what_the_oracle_says(check: Check) -> None:
    decision, item = check.decision, check.item
    if decision is not None and decision.source == "prefilter" and isinstance(check, JointCheck):
        would_be_denied(check)
    if decision is None or decision.source != "redis":
        return
    assert item is not None
    if isinstance(check, JointCheck):
        assert isinstance(item, JointItem)
        assert heard(check) == item.answers[check.position]
        if decision.parts:
            binds(decision)
    else:
        assert answer(decision) == item.answers[check.position]


def would_be_denied(check: JointCheck) -> None:
    """The store would deny it too, now: one of its sets, by all of its parts. Of one that is allowed, only flagged ones."""
    world = check.process.world
    assert check.decision is not None
    allowed = check.decision.allowed
    would = [[world.store.peek(part.key, part.rule, part.cost, world.server_us())[0] for part in of_set] for of_set in check.sets]
    denied = {of_set[0].rule.enforce == "flag" for granted, of_set in zip(would, check.sets, strict=True) if not any(granted)}
    assert denied == {True} if allowed else False in denied


class Crowd:
    """Random steps of some processes; everything that can go wrong on the way does."""

    def __init__(self, client: redis.Redis, seed: int, **options: Any) -> None:
        self.rng = rng = random.Random(seed)
        self.world = World(client, oracle=True)
        self.world.when_sent = assign
        self.world.when_ended = hears_what_the_oracle_says
        self.rules = []
        for strategy in STRATEGIES:
            limit, window = rng.choice(((1, 0.01), (5, 0.1), (20, 0.5), (64, 1), (70, 2), (300, 3)))
            burst = rng.choice((None, 3, 2 * limit)) if strategy.endswith("bucket") else None
            enforce = "flag" if rng.random() < 0.2 else "deny"
            self.rules.append(rule(strategy, limit, window, strategy, burst=burst, enforce=enforce))
        for _ in range(2):
            Process(self.world, rate=rng.randint(990_100, 1_009_900), ttl_us=NEVER_STALE_US, **options)
        self.keys = [f"key {i}" + " long" * (40 if i == 1 else 0) for i in range(rng.randint(1, 3))]
        self.joint = self.allowed = self.denied = 0

    def sets(self) -> list[Set]:
        """Of one key or of several, with and without alternatives."""
        rng = self.rng
        while True:
            key, cost = rng.choice(self.keys), rng.choice((1, 1, 1, 2))
            free, sets = rng.sample(self.rules, rng.randint(1, len(self.rules))), []
            while free:
                many = rng.random() < 0.3 and len(free) > 1
                taken = [free.pop() for _ in range(min(len(free), rng.randint(2, 3)) if many else 1)]
                if many and any(one.enforce == "flag" for one in taken):
                    continue
                key = rng.choice(self.keys) if rng.random() < 0.2 else key
                sets.append((key, taken, min(cost, *(one.capacity for one in taken))))
            named = [(key, one.name) for key, taken, _ in sets for one in taken]
            if 1 < len(named) == len(set(named)):  # one limit alone is no joint check
                return sets

    def step(self) -> None:
        rng, world = self.rng, self.world
        process, single, key = rng.choice(world.processes), rng.choice(self.rules), rng.choice(self.keys)
        match rng.choices(range(5), (40, 15, 12, 4, 45))[0]:
            case 0:
                sets = self.sets()
                for _ in range(rng.choice((1, 1, 2, 5))):
                    self.joint += 1
                    process.check_jointly(*sets)
            case 1:
                for _ in range(rng.choice((1, 1, 2, 5))):
                    process.check(key, single, rng.randint(1, min(2, single.capacity)))
            case 2:
                world.t_us += rng.choice((1, 50, 1_000, 10_000, rng.randrange(100_000)))
            case 3:
                world.store.consume(process.state_key(key, single), single, rng.randint(1, single.capacity), world.server_us())
            case 4:
                world.disturb(process, rng)
        process.poll()


@settings(max_examples=60)
@given(seed=st.integers(0, 2**32))
def test_each_joint_check_hears_what_it_would_have_heard_alone(shared_redis_server: Any, seed: int) -> None:
    with shared_redis_server.client() as client:
        crowd = Crowd(client, seed)
        for _ in range(120):
            crowd.step()
        crowd.world.end()


def test_the_random_worlds_do_decide_joint_checks_of_every_kind(redis_client: redis.Redis) -> None:
    told = Counter[tuple[str, bool]]()
    together = 0
    for seed in range(12):
        crowd = Crowd(redis_client, seed)
        for _ in range(120):
            crowd.step()
        crowd.world.end()
        for process in crowd.world.processes:
            joint = [check for check in process.checks if isinstance(check, JointCheck) and check.decision is not None]
            told += Counter((check.decision.source, check.decision.allowed) for check in joint)
            together += sum(item.count > 1 for request in process.connection.requests for item in request.joints)
    assert min(told["redis", True], told["redis", False], together) > 200
    assert told["prefilter", False] > 30


# One process, step by step:


@pytest.fixture
def world(redis_client: redis.Redis) -> World:
    return World(redis_client)


@pytest.fixture
def process(world: World) -> Process:
    return Process(world, ttl_us=TTL_US, deadline_us=250_000)


def sent(process: Process) -> list[tuple[list[tuple[int, int]], list[tuple[int, list[list[str]]]]]]:
    """Of each call: cost and count of its single items, and count and keys of its joint ones, without what all names have."""
    return [
        (
            [(item.cost, item.count) for item in request.items],
            [
                (joint.count, [[part.key.rpartition(b"}:")[2].decode() for part in of_set] for of_set in joint.sets])
                for joint in request.joints
            ],
        )
        for request in process.connection.requests
    ]


def left(world: World, process: Process, key: str, *rules: CompiledRule) -> list[int]:
    return [world.store.peek(process.state_key(key, one), one, 1, world.server_us())[1] for one in rules]


def allowed(checks: Sequence[Check]) -> list[bool]:
    return [check.decision is not None and check.decision.allowed for check in checks]


def sources(checks: Sequence[Check]) -> set[str]:
    return {"none" if check.decision is None else check.decision.source for check in checks}


def both(process: Process, *rules: CompiledRule, key: str = "k", cost: int = 1) -> JointCheck:
    return process.check_jointly(*((key, [one], cost) for one in rules))


def test_equal_ones_are_one_entry_for_each_part_and_all_of_it_or_nothing_is_consumed(world: World, process: Process) -> None:
    checks = [both(process, A, B) for _ in range(5)]
    world.end()
    assert sent(process) == [([], [(5, [["a:=k"], ["b:=k"]])])]
    assert allowed(checks) == [True] * 3 + [False] * 2
    assert [[part.remaining for part in parts(check.decision)] for check in checks] == [[4, 2], [3, 1], [2, 0], [2, 0], [2, 0]]
    assert [[part.allowed for part in parts(check.decision)] for check in checks[3:]] == [[True, False]] * 2
    assert left(world, process, "k", A, B) == [2, 0]


def test_other_costs_orders_alternatives_and_sizes_are_not_equal(world: World, process: Process) -> None:
    for sets in (
        [("k", [A], 1), ("k", [B], 1)],
        [("k", [B], 1), ("k", [A], 1)],
        [("k", [B], 1), ("k", [A], 2)],
        [("k", [B, A], 1)],
        [("k", [B, A], 1), ("k", [C], 1)],
        [("k", [B, A], 1), ("k", [C], 1)],
        [("k", [B, A], 1)],
    ):
        process.check_jointly(*sets)
    world.end()
    [(singles, joints)] = sent(process)
    assert not singles
    assert [(count, sum(map(len, sets))) for count, sets in joints] == [(1, 2), (1, 2), (1, 2), (1, 2), (2, 3), (1, 2)]


def test_joint_ones_are_decided_after_single_ones_and_the_order_within_a_key_is_kept(world: World, process: Process) -> None:
    process.check("k", A)
    both(process, A, B)
    process.check("other", A)
    process.check("k", C)
    process.check("k", A)
    both(process, A, B)
    world.end()
    one = [["a:=k"], ["b:=k"]]
    # The last single one came after a joint one of its key, so that it waits for the next call.
    assert sent(process) == [([(1, 1)] * 3, [(1, one)]), ([(1, 1)], [(1, one)])]


def test_a_joint_check_is_never_split_over_two_calls(world: World, process: Process) -> None:
    group = process.ask([[(f"k{i}", [one], 1) for one in (A, B, C)] for i in range(50)], "check")
    world.settle()
    assert all(decision.allowed for decision in group.decisions())
    assert [len(joints) for _, joints in sent(process)] == [42, 8]
    assert process.connection.batch.sent_items == 150
    world.end()


def test_of_many_that_wait_half_are_sent_at_a_time(world: World, process: Process) -> None:
    for i in range(40):
        both(process, A, B, C, key=f"k{i}")
    process.turn()
    process.connect()
    assert [len(joints) for _, joints in sent(process)] == [20, 20]
    world.end()


def test_what_nobody_waits_for_has_room_beside_any_number_of_parts(world: World, process: Process) -> None:
    leased = RateThrottleRule("leased", 1_000, 10, strategy="fixed_window", lease=True).compiled
    process.check("k", leased)
    world.settle()
    for _ in range(10):
        process.check("k", leased)
    world.settle()
    world.t_us += 2 * leased.lease_us
    for i in range(200):
        both(process, A, B, C, key=f"k{i}")
    process.turn()  # two calls leave, and then the lease is over
    world.settle()
    assert [(len(request.items), len(request.joints)) for request in process.connection.requests[2:5]] == [
        (0, 42),
        (0, 42),
        (1, 40),
    ]
    assert process.connection.requests[4].items[0].back == 10
    world.end()


def test_a_call_of_many_rules_has_few_parts_but_one_joint_check_always_fits(world: World, process: Process) -> None:
    rules = [rule(f"r{i}", 10) for i in range(64)]
    for i in range(4):
        both(process, *rules[16 * i : 16 * i + 16])
    both(process, *rules[:16], key="other")
    world.end()
    assert [len(joints) for _, joints in sent(process)] == [2, 2, 1]


# What fails:


def test_one_that_was_not_sent_consumes_nothing_and_one_that_was_all_of_it(world: World, process: Process) -> None:
    checks = [both(process, A, B) for _ in range(3)]
    checks[0].cancel()
    process.turn()
    process.connect()
    checks[1].cancel()
    world.end()
    assert sent(process) == [([], [(2, [["a:=k"], ["b:=k"]])])]
    assert allowed(checks) == [False, False, True]
    assert [part.remaining for part in parts(checks[2].decision)] == [3, 1]
    assert left(world, process, "k", A, B) == [3, 1]


def test_all_of_a_group_can_be_given_up_together(world: World, process: Process) -> None:
    group = process.ask([[("k", [A], 1), ("k", [B], 1)], ("k", C, 1)], "check")
    other = both(process, A, C)
    group.future.cancel()
    group.leave()
    world.end()
    assert sent(process) == [([], [(1, [["a:=k"], ["c:=k"]])])]
    assert allowed([other]) == [True]


def test_a_server_that_lost_its_scripts_is_asked_again(world: World, process: Process) -> None:
    both(process, A, B)
    world.settle()
    world.store.forgot_scripts = True
    checks = [both(process, A, B), process.check("k", A), both(process, B, C)]
    world.settle()
    assert allowed(checks) == [True] * 3
    assert left(world, process, "k", A, B, C) == [2, 0, 8]
    world.end()


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_lost_connection_gives_the_error_once_for_all_parts(world: World, process: Process, when: str) -> None:
    checks = [both(process, A, B) for _ in range(2)]
    process.turn()
    process.connect()
    if when == "after":
        process.connection.serve()
    process.connection.lose()
    process.poll()
    assert all(isinstance(check.error, StorageUnavailable) for check in checks)
    world.adrift.clear()
    world.settle()
    assert left(world, process, "k", A, B) == ([3, 1] if when == "after" else [5, 3])
    assert both(process, A, B).entered
    world.end()


def test_a_state_that_cannot_be_read_is_an_error_that_names_its_rule(world: World, process: Process) -> None:
    world.store.client.set(process.state_key("k", B), "no state")
    checks = [both(process, A, B), both(process, A, C), process.check_jointly(("k", [A, B], 1))]
    world.settle()
    assert isinstance(checks[0].error, StateUnreadable)
    assert checks[0].error.rule == "b"
    assert allowed(checks)[1]
    assert isinstance(checks[2].error, StateUnreadable) or allowed(checks)[2]
    assert left(world, process, "k", C) == [8]
    world.end()


def test_another_epoch_is_told_what_is_known_of_every_part(world: World, process: Process) -> None:
    checks = [both(process, A, B) for _ in range(2)]
    world.settle()
    assert all(allowed(checks))
    in_flight = both(process, A, B)
    process.turn()
    world.fail_over({})
    process.poll()
    assert isinstance(in_flight.error, StorageUnavailable)
    for _ in range(10):
        world.t_us += 100_000
        world.settle()
    assert left(world, process, "k", A, B) == [3, 1]
    later = [both(process, A, B) for _ in range(2)]
    world.settle()
    assert allowed(later) == [True, False]
    world.end()


def test_one_that_finds_another_epoch_waits_and_is_asked_there(world: World, process: Process) -> None:
    both(process, A, B)
    world.settle()
    kept = world.store.keep()
    check = both(process, A, B)
    process.turn()
    epoch = next(key for key in kept if key.endswith(b":epoch"))
    world.store.client.set(epoch, epoch_text(2).encode())
    world.settle()
    for _ in range(10):
        world.t_us += 100_000
        world.settle()
    process.poll()
    assert check.over
    assert left(world, process, "k", A, B) == [3, 1]
    world.end()


# What is known without asking:


def test_a_hot_key_is_asked_once_in_a_ttl_while_the_others_wait_for_the_answer(world: World, process: Process) -> None:
    for _ in range(4):
        both(process, A, B)
    world.settle()
    assert sources([both(process, A, B)]) == {"prefilter"}
    for _ in range(3):
        world.t_us += TTL_US + 1
        before = process.connection.batch.sent_items
        asker = both(process, A, B)
        process.turn()
        waiting = [
            both(process, A, B),
            both(process, B, C),
            process.check("k", B),
            process.check_jointly(("k", [B], 1), ("other", [A], 1)),
        ]
        process.turn()
        assert asker.entered
        assert sources(waiting) == {"none"}
        world.settle()
        assert process.connection.batch.sent_items == before + 2
        assert sources([asker]) == {"redis"}
        assert sources(waiting) == {"prefilter"}
        assert allowed(waiting) == [False] * 4
    world.end()


def test_alternatives_are_asked_as_long_as_one_of_them_may_allow(world: World, process: Process) -> None:
    for _ in range(4):
        process.check("k", B)
    world.settle()
    assert process.check("k", B).decision.source == "prefilter"
    check = process.check_jointly(("k", [B, A], 1))
    world.settle()
    assert (check.decision.source, check.decision.rule) == ("redis", "a")
    for _ in range(5):
        process.check("k", A)
    world.settle()
    check = process.check_jointly(("k", [B, A], 1), ("k", [C], 1))
    assert (check.decision.source, check.decision.rule) == ("prefilter", check.decision.parts[0].rule)
    assert [part.remaining for part in check.decision.parts] == [0, 9]
    world.end()


# Leases:


def grant(world: World, process: Process, *rules: CompiledRule) -> None:
    """Have the process hold a lease of ten units under each rule."""
    for one in rules:
        for count in (1, 10):
            for _ in range(count):
                process.check("k", one)
            world.settle()


def test_leases_pay_for_all_parts_or_for_none(world: World, process: Process) -> None:
    rules = [RateThrottleRule(name, 1_000, 1_000, strategy="fixed_window", lease=True).compiled for name in ("x", "y")]
    grant(world, process, *rules)
    checks = [both(process, *rules) for _ in range(10)]
    assert sources(checks) == {"lease"}
    assert [[part.remaining for part in parts(check.decision)] for check in checks] == [[988 - i] * 2 for i in range(10)]
    assert both(process, *rules).entered
    world.settle()
    process.check("k", rules[0])
    grant(world, process, rules[0])
    # One part isn't leased: then the store is asked, and what is leased stays so.
    asked = both(process, rules[0], A)
    world.settle()
    assert sources([asked]) == {"redis"}
    assert process.check("k", rules[0]).decision.source == "lease"
    world.end()


def test_what_is_leased_stays_so_while_a_joint_check_asks(world: World, process: Process) -> None:
    one = RateThrottleRule("x", 1_000, 1_000, strategy="fixed_window", lease=True).compiled
    grant(world, process, one)
    both(process, one, A)
    process.turn()
    assert sources([process.check("k", one) for _ in range(10)]) == {"lease"}
    world.settle()
    assert left(world, process, "k", one) == [1_000 - 1 - 10 - 10 - 1]
    world.end()


class Shared:
    """Busy processes whose checks name two rules with leases, or one of them; they stall, lose replies, and pay from leases or not."""

    def __init__(self, client: redis.Redis, seed: int, strategy: str) -> None:
        self.rng = rng = random.Random(seed)
        self.world = World(client)
        self.world.when_ended = self.note
        self.world.when_sent = follow
        shapes, most = [(30, 0.5), (64, 1), (500, 2), (2_000, 1)], rng.choice((True, 3, 50))
        names = {name: rng.choice(shapes) for name in ("x", "y")}
        self.rules = [rule(name, *shape, strategy, lease=most) for name, shape in names.items()]
        self.promises = {name: RateThrottleRule(name, *shape, strategy=strategy) for name, shape in names.items()}
        for _ in range(4):
            rate, offset_us = rng.choice((990_100, 1_009_900, 1_000_000)), rng.randrange(10**15, 10**16)
            Process(self.world, rate=rate, offset_us=offset_us, ttl_us=NEVER_STALE_US)
        self.admitted: dict[str, list[tuple[int, int]]] = {name: [] for name in names}
        self.leased = self.asked = 0

    def note(self, check: Check) -> None:
        decision = check.decision
        if decision is None or not decision.allowed:
            return
        joint = isinstance(check, JointCheck)
        self.leased += joint and decision.source == "lease"
        self.asked += joint and decision.source == "redis"
        assert decision.source == "lease" or check.item is not None
        at_us = self.world.server_us() if decision.source == "lease" else check.item.served_us  # type: ignore[union-attr]  # as asserted
        for part in parts(decision):
            self.admitted[part.rule].append((at_us, part.cost))

    def step(self) -> None:
        rng, world = self.rng, self.world
        process = rng.choices(world.processes, (8, 4, 2, 1))[0]
        match rng.choices(range(6), (60, 30, 14, 4, 2, 1))[0]:
            case 0:
                for _ in range(rng.choice((1, 1, 3, 8))):
                    if rng.random() < 0.5:
                        both(process, *rng.sample(self.rules, 2), cost=rng.choice((1, 1, 2)))
                    else:
                        process.check("k", rng.choice(self.rules), rng.choice((1, 1, 2)))
            case 1:
                process.round_trip()
            case 2:
                world.t_us += rng.choice((1, 30, 300, 1_000, rng.randrange(1 + self.rules[0].lease_us // 3)))
            case 3:
                process.turn()
                process.connect()
                process.connection.serve()
            case 4:
                process.connection.deliver(rng.choice((None, 30)))
            case 5:
                process.connection.lose()
        if world.adrift and rng.random() < 0.5:
            world.store.run(world.adrift.pop(0), world.server_us())
        process.poll()


def follow(process: Process, request: Request) -> None:
    """Find out which checks a call carries, whatever their order."""
    for item in (*request.items, *request.joints) if request.mode == "check" else ():
        joint = isinstance(item, JointItem)
        keys = [part.key for part in item.parts] if isinstance(item, JointItem) else [item.key]
        cost = item.parts[0].cost if isinstance(item, JointItem) else item.cost
        same = [
            check
            for check in process.queues[keys[0]]
            if check.waits and isinstance(check, JointCheck) == joint and check.state_keys == keys and check.cost == cost
        ]
        take(item, same[: item.count])


@settings(max_examples=12)
@pytest.mark.parametrize("strategy", STRATEGIES)
@given(seed=st.integers(0, 2**32))
def test_no_interval_holds_more_than_the_promise_of_any_rule(shared_redis_server: Any, strategy: str, seed: int) -> None:
    with shared_redis_server.client() as client:
        keep_the_promises(Shared(client, seed, strategy))


def keep_the_promises(shared: Shared, steps: int = 300) -> Shared:
    for _ in range(steps):
        shared.step()
    shared.world.end()
    for name, log in shared.admitted.items():
        intervals.check(shared.promises[name], log)
    return shared


def test_the_random_worlds_do_pay_from_leases_and_without(redis_client: redis.Redis) -> None:
    worlds = [keep_the_promises(Shared(redis_client, seed, "fixed_window")) for seed in range(8)]
    assert sum(shared.leased for shared in worlds) > 30 < sum(shared.asked for shared in worlds)
