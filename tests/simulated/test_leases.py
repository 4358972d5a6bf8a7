"""Units taken ahead: the promise holds over all intervals whichever process holds them, none is spent late, and what is left comes back."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import redis
from hypothesis import given, settings
from hypothesis import strategies as st

from ratethrottle import RateThrottleRule
from ratethrottle._engine.definitions import CompiledRule
from ratethrottle.storage.redis.wire import written
from ratethrottle.testing import intervals
from tests.kit.clocked import RUN, read_state
from tests.kit.processes import Check, Process, World, running
from tests.kit.servers import RedisServer
from tests.kit.store import Request
from tests.kit.strategies import STRATEGIES

pytestmark = pytest.mark.redis


@dataclass(frozen=True)
class Leased:
    """A rule with leases, and the same without: that is what it promises."""

    rule: CompiledRule
    promise: RateThrottleRule


def leased(strategy: str, limit: int, window: float, *, burst: int | None = None, **options: Any) -> Leased:
    burst = burst if strategy.endswith("bucket") else None
    options = {"lease": True, **options}
    return Leased(
        RateThrottleRule("r", limit, window, strategy=strategy, burst=burst, **options).compiled,
        RateThrottleRule("r", limit, window, strategy=strategy, burst=burst),
    )


SHAPES = ((30, 0.5), (64, 1), (70, 1), (500, 2), (2_000, 1), (40, 0.2))


class Busy:
    """Processes of which some are far busier, on clocks that drift; they stall, lose replies, and are killed."""

    def __init__(self, client: redis.Redis, seed: int, strategy: str) -> None:
        self.rng = rng = random.Random(seed)
        self.world = World(client)
        self.world.when_ended = self.note
        limit, window = rng.choice(SHAPES)
        burst = rng.choice((None, None, limit // 2, 3 * limit))
        ttl, most = rng.choice((0.005, 0.02, 0.1, 1)), rng.choice((True, True, 3, 50))
        self.leased = leased(strategy, limit, window, burst=burst, lease_ttl=ttl, lease=most)
        self.rule = self.leased.rule
        for _ in range(8):
            # Nobody is parked, so that the checks of a key leave in the order in which they came: `follow` depends on it.
            rate, offset_us = rng.choice((990_100, 1_009_900, 1_000_000)), rng.randrange(10**15, 10**16)
            Process(self.world, rate=rate, offset_us=offset_us, ttl_us=10**16)
        self.alive = list(self.world.processes)
        self.weights = [2.0 ** -rng.randint(0, 5) for _ in self.alive]
        self.keys = ["k", "another"][: rng.randint(1, 2)]
        self.admitted: dict[bytes, list[tuple[int, int]]] = {}
        self.sent_us: dict[tuple[Process, bytes], int] = {}  # when the newest call that asked for a lease left, by its own clock
        self.world.when_sent = self.sent
        self.leases = 0

    def sent(self, process: Process, request: Request) -> None:
        for item in request.items:
            if item.ahead:
                self.sent_us[process, item.key] = process.now_us()

    def note(self, check: Check) -> None:
        decision = check.decision
        if decision is None or not decision.allowed:
            return
        if decision.source == "lease":
            self.leases += 1
            assert check.process.now_us() < self.sent_us[check.process, check.state_key] + self.rule.lease_us
            at_us = self.world.server_us()
        else:
            assert check.item is not None
            at_us = check.item.served_us
        self.admitted.setdefault(check.state_key, []).append((at_us, check.cost))

    def step(self) -> None:
        rng, world = self.rng, self.world
        process = rng.choices(self.alive, self.weights)[0]
        match rng.choices(range(8), (60, 30, 14, 4, 4, 1, 0.5, 0.2))[0]:
            case 0:
                cost = rng.choice((1, 1, 1, 1, 1, 1, 1, 2, min(10, self.rule.capacity)))
                for _ in range(rng.choice((1, 1, 1, 3, 8))):
                    process.check(rng.choice(self.keys), self.rule, cost)
            case 1:
                process.round_trip()
            case 2:
                world.t_us += rng.choice((1, 30, 300, 1_000, rng.randrange(1 + self.rule.lease_us // 3)))
            case 3:
                process.turn()
                process.connect()
                process.connection.serve()
            case 4:
                process.connection.deliver(rng.choice((None, 30)))
            case 5:
                world.t_us += rng.randrange(2 * self.rule.lease_us)  # a stall of all: each goes on with missed timers
            case 6:
                process.connection.lose()
            case 7:
                if len(self.alive) > 2:
                    i = self.alive.index(process)
                    del self.alive[i], self.weights[i]
        if world.adrift and rng.random() < 0.5:
            world.store.run(world.adrift.pop(0), world.server_us())
        process.poll()


def follow(process: Process, request: Request) -> None:
    """Find out which checks a call carries."""
    for item in request.items if request.mode == "check" else ():
        item.members = [check for check in process.queues[item.key] if check.waits and check.cost == item.cost][: item.count]
        for check in item.members:
            check.item = item


@settings(max_examples=12)
@pytest.mark.parametrize("strategy", STRATEGIES)
@given(seed=st.integers(0, 2**32))
def test_no_interval_holds_more_than_the_promise(shared_redis_server: RedisServer, strategy: str, seed: int) -> None:
    with shared_redis_server.client() as client:
        keep_the_promise(Busy(client, seed, strategy))


def keep_the_promise(busy: Busy, steps: int = 400) -> int:
    sent = busy.sent

    def both(process: Process, request: Request) -> None:
        sent(process, request)
        follow(process, request)

    busy.world.when_sent = both
    for _ in range(steps):
        busy.step()
    for process in busy.world.processes:
        if process not in busy.alive:
            process.connection.batch.end(RuntimeError("killed"))
            process.checks.clear()
            process.loop.timers.clear()
    busy.world.processes[:] = busy.alive
    busy.world.end()
    for log in busy.admitted.values():
        intervals.check(busy.leased.promise, log)
    return busy.leases


def test_the_random_worlds_do_spend_from_leases(redis_client: redis.Redis) -> None:
    for strategy in STRATEGIES:
        assert sum(keep_the_promise(Busy(redis_client, seed, strategy)) for seed in range(5)) > 100


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_lease_of_units_that_nobody_counted_is_caught(redis_client: redis.Redis, strategy: str) -> None:
    """The worlds above would notice."""

    def generous(request: Request, reply: Any) -> Any:
        if request.mode == "check" and not request.refused:
            reply[-1] = request.items[-1].ahead  # all that was asked for, whatever was granted
        return reply

    def find() -> None:
        for seed in range(100):
            busy = Busy(redis_client, seed, strategy)
            for process in busy.world.processes:
                process.connection.tamper = generous
            keep_the_promise(busy)

    with pytest.raises(intervals.PromiseBrokenError):
        find()


# One process, step by step:


@pytest.fixture
def world(redis_client: redis.Redis) -> World:
    world = World(redis_client)
    Process(world)
    return world


def grant(world: World, what: Leased, units: int) -> Process:
    """Have the process hold a lease of so many units that it hasn't spent."""
    process = world.processes[0]
    for cost in (1, units):
        checks = [process.check("k", what.rule) for _ in range(cost)]
        world.settle()
        assert all(check.decision.allowed for check in checks)
    return process


def comes_back(world: World, what: Leased, strategy: str, used: int) -> None:
    """Let all leases end: no more than was used stays counted, but for what a bucket rounds."""
    world.settle()
    world.t_us += 2 * what.rule.lease_us
    world.settle()
    assert left(world, what) >= what.rule.capacity - used - strategy.endswith("bucket")
    world.end()


def left(world: World, what: Leased) -> int:
    """What the store has left, by a peek."""
    return world.store.peek(world.processes[0].state_key("k", what.rule), what.rule, 1, world.server_us())[1]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_busy_key_is_spent_from_a_lease_and_says_so(world: World, strategy: str) -> None:
    what = leased(strategy, 1_000, 10)
    process = grant(world, what, 10)
    assert left(world, what) == what.rule.capacity - 21
    decisions = [process.check("k", what.rule).decision for _ in range(10)]
    assert {decision.source for decision in decisions} == {"lease"}
    assert all(decisions[i].allowed for i in range(10))
    assert [decision.remaining for decision in decisions] == [what.rule.capacity - 12 - i for i in range(10)]
    assert process.check("k", what.rule).entered
    world.end()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_loop_that_stalls_past_the_lease_spends_nothing(world: World, strategy: str) -> None:
    what = leased(strategy, 1_000, 10)
    process = grant(world, what, 10)
    world.t_us += what.rule.lease_us * 63 // 64 - 3
    assert process.check("k", what.rule).decision.source == "lease"
    world.t_us += what.rule.lease_us // 64 + 3
    assert process.check("k", what.rule).entered
    world.end()


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("spend", [0, 4])
def test_units_that_were_not_spent_come_back(world: World, strategy: str, spend: int) -> None:
    what = leased(strategy, 1_000, 1_000)
    process = grant(world, what, 10)
    for _ in range(spend):
        assert process.check("k", what.rule).decision.source == "lease"
    world.t_us += what.rule.lease_us
    world.settle()
    back = process.connection.requests[-1].items
    assert [(item.count, item.ahead, item.back) for item in back] == [(0, 0, 10 - spend)]
    # A bucket's come back less what drained meanwhile, rounded down: a tenth of a unit here.
    lost = strategy.endswith("bucket") and spend < 10
    assert what.rule.capacity - 11 - spend - lost <= left(world, what) <= what.rule.capacity - 11 - spend
    world.end()


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("late", [1, 10, 11])
def test_a_check_that_waited_while_a_lease_came_spends_from_it(world: World, strategy: str, late: int) -> None:
    """Else calls that pass each other give back what the other one has just taken, and no lease ever grows."""
    what = leased(strategy, 1_000, 1_000)
    process = world.processes[0]
    process.check("k", what.rule)
    world.settle()
    first = [process.check("k", what.rule) for _ in range(10)]
    process.turn()
    second = process.check("k", what.rule)
    process.turn()
    third = [process.check("k", what.rule) for _ in range(late)]
    process.turn()
    assert [[(item.count, item.ahead) for item in request.items] for request in process.connection.requests[1:]] == [
        [(10, 10)],
        [(1, 0)],
    ]
    world.settle()
    assert {check.decision.source for check in (*first, second)} == {"redis"}
    assert [check.decision.source for check in third] == ["lease"] * min(late, 10) + ["redis"] * (late - 10)
    assert all(check.decision.allowed for check in (*first, second, *third))
    # What was spent whole within its time may be twice as large.
    assert [item.ahead for request in process.connection.requests[3:] for item in request.items] == [20] * (late - 10)
    comes_back(world, what, strategy, 12 + late)


def hold_the_rest(world: World, what: Leased, units: int) -> Process:
    """Have the process hold so many units of a lease, and know that the store has none left: two calls passed each other."""
    process = world.processes[0]
    process.check("k", what.rule)
    world.settle()
    for _ in range(units):
        process.check("k", what.rule)
    process.turn()
    process.connection.serve()
    rest = process.check("k", what.rule, left(world, what))
    world.settle()
    assert rest.decision.allowed
    assert left(world, what) == 0
    return process


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_nobody_is_denied_what_is_on_its_way_back(world: World, strategy: str) -> None:
    what = leased(strategy, 100, 1_000)
    process = hold_the_rest(world, what, 10)
    world.t_us += what.rule.lease_us
    process.turn()
    process.turn()
    assert [item.back for item in process.connection.requests[-1].items] == [10]
    check = process.check("k", what.rule)
    world.settle()
    assert check.decision.allowed
    assert check.decision.source == "redis"
    world.end()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_nobody_is_denied_what_the_call_before_gives_back(world: World, strategy: str) -> None:
    """Two calls leave at once after a stall: what one gives back is there for the checks in the other."""
    what = leased(strategy, 100, 1_000)
    process = hold_the_rest(world, what, 10)
    world.t_us += 2 * what.rule.lease_us
    keys = ["k", *(f"other{number}" for number in range(40)), "k"]
    checks = [process.check(key, what.rule) for key in keys]
    process.turn()
    assert [sum(item.back for item in request.items) for request in process.connection.requests[-2:]] == [10, 0]
    world.settle()
    assert all(check.decision.allowed for check in checks)
    world.end()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_was_given_back_denies_again_once_that_is_answered(world: World, strategy: str) -> None:
    what = leased(strategy, 100, 1_000)
    process = hold_the_rest(world, what, 10)
    world.t_us += what.rule.lease_us
    world.settle()
    last = process.check("k", what.rule, max(1, left(world, what)))
    world.settle()
    assert last.decision.allowed
    check = process.check("k", what.rule)
    assert check.decision.source == "prefilter"
    assert not check.decision.allowed
    world.end()


def late_reply(process: Process, what: Leased, keys: str) -> Callable[..., Any]:
    """Have a process ask for leases of these keys, and lose the connection; returns what takes the reply's numbers when it comes late."""
    for count in (1, 10):
        for key in keys:
            for _ in range(count):
                process.check(key, what.rule)
        if count == 1:
            process.world.settle()
    process.turn()
    assert [item.ahead for item in process.connection.requests[-1].items] == [10] * len(keys)
    late = process.connection.batch.late_replies()
    process.connection.lose()
    process.connection.wanted = True
    request = process.connection.requests[-1].id

    def received(*numbers: int) -> None:
        with running(process.loop):
            late.received(written([request, process.world.server_us(), *numbers]))

    return received


def backs(process: Process, since: int) -> list[tuple[bytes, int]]:
    return [(item.key, item.back) for request in process.connection.requests[since:] for item in request.items if item.back]


@pytest.mark.parametrize("undecided", [-2, -3, -4])
def test_a_late_reply_that_leaves_keys_undecided_gives_back_what_it_took_and_no_more(world: World, undecided: int) -> None:
    what = leased("fixed_window", 1_000, 1_000)
    process = world.processes[0]
    late = late_reply(process, what, "abc")
    world.settle()
    since = len(process.connection.requests)
    late(undecided, 10, 20, 5, 4, undecided)
    world.settle()
    assert backs(process, since) == [(process.state_key("b", what.rule), 4)]


def test_a_lease_that_ends_while_units_of_a_late_reply_go_back_is_given_back_too(world: World) -> None:
    what = leased("fixed_window", 1_000, 1_000)
    process = world.processes[0]
    late = late_reply(process, what, "k")
    world.settle()
    world.t_us += what.rule.lease_us // 2
    for count in (1, 10):
        for _ in range(count):
            process.check("k", what.rule)
        world.settle()
    held = process.connection.requests[-1].items[0].ahead
    assert held > 0
    for key in ("busy", "busier"):  # as many calls as may be in flight
        process.check(key, what.rule)
        process.turn()
    since = len(process.connection.requests)
    late(10, 20, 5, 4)
    world.t_us += what.rule.lease_us
    process.turn()
    world.settle()
    assert sorted(units for _, units in backs(process, since)) == sorted([4, held])


def clear(world: World, client: redis.Redis) -> None:
    """Begin an epoch as `RedisStorage.clear` does."""
    words = (RUN, world.processes[0].repair.epoch, "clearing", "clear", 0, 0, 0, world.server_us())
    client.evalsha(world.store.shas["beat"], 2, world.names.epoch_key, world.names.processes_key, "id", *words)


@pytest.mark.parametrize("how", ["at once", "at its end"])
def test_what_was_leased_before_a_clear_is_not_given_back_after_it(world: World, redis_client: redis.Redis, how: str) -> None:
    """It would be others' units. The clear is heard of only when the call that gives it back was sent."""
    what = leased("fixed_window", 1_000, 1_000)
    process = grant(world, what, 60)
    other = Process(world)
    clear(world, redis_client)
    checks = [other.check("k", what.rule) for _ in range(60)]
    other.round_trip()
    other.round_trip()
    assert all(check.decision is not None and check.decision.allowed for check in checks)
    if how == "at once":
        with running(process.loop):
            process.connection.batch.return_leases()
    else:
        world.t_us += 2 * what.rule.lease_us
        process.turn()
        process.turn()
    assert [item.back for item in process.connection.requests[-1].items] == [60]
    while process.connection.unserved:
        process.connection.serve()
    process.connection.deliver()
    world.settle()
    check = other.check("k", what.rule)
    world.settle()
    assert check.decision is not None
    assert check.decision.remaining == 1_000 - 61


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_alone_a_process_gets_exactly_its_limit(world: World, strategy: str) -> None:
    what = leased(strategy, 200, 10)
    process = world.processes[0]
    got = 0
    while True:
        check = process.check("k", what.rule)
        world.settle()
        if not check.decision.allowed:
            break
        got += 1
        assert check.decision.remaining == what.rule.capacity - got
    assert got == what.rule.capacity
    assert check.decision.retry_after_us > 0
    world.end()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_a_decision_says_is_left_can_be_used_at_once(world: World, strategy: str) -> None:
    what = leased(strategy, 100, 100)
    process = grant(world, what, 10)
    last = process.check("k", what.rule).decision
    assert last.source == "lease"
    check = process.check("k", what.rule, last.remaining)
    world.settle()
    assert check.decision.allowed
    world.end()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_leases_of_two_calls_in_flight_lose_no_units(world: World, strategy: str) -> None:
    what = leased(strategy, 1_000, 1_000)
    process = grant(world, what, 1)
    process.check("k", what.rule)
    used = 3
    for cost in (4, 5):
        for _ in range(cost):
            process.check("k", what.rule)
        process.turn()
        used += cost
    assert len(process.connection.unserved) == 2
    comes_back(world, what, strategy, used)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_leases_of_two_costs_in_one_call_lose_no_units(world: World, strategy: str) -> None:
    what = leased(strategy, 1_000, 1_000)
    process = grant(world, what, 1)
    process.check("k", what.rule)
    used = 3
    for cost in (5, 6, 5):
        process.check("k", what.rule, cost)
        used += cost
    comes_back(world, what, strategy, used)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_units_on_their_way_back_survive_a_lost_script(world: World, strategy: str) -> None:
    what = leased(strategy, 1_000, 1_000)
    grant(world, what, 10)
    world.t_us += what.rule.lease_us
    world.store.forgot_scripts = True
    world.settle()
    assert left(world, what) >= what.rule.capacity - 11 - strategy.endswith("bucket")
    world.end()


def test_a_rule_that_was_changed_spends_nothing_that_was_taken_under_the_old_one(world: World) -> None:
    before, after = leased("fixed_window", 1_000, 60), leased("fixed_window", 10, 60, lease=False)
    process = grant(world, before, 10)
    check = process.check("k", after.rule)
    world.settle()
    assert check.decision.source == "redis"
    assert not check.decision.allowed
    world.end()


@pytest.mark.parametrize("peeked", [False, True])
def test_a_rule_with_leases_spends_nothing_that_was_taken_under_another_one(world: World, peeked: bool) -> None:
    before, after = leased("fixed_window", 1_000, 60), leased("fixed_window", 10, 60)
    process = grant(world, before, 10)
    if peeked:
        process.ask([("k", after.rule, 1)], "peek")
        world.settle()
    check = process.check("k", after.rule)
    world.settle()
    assert check.decision.source == "redis"
    assert not check.decision.allowed
    world.end()


def test_checks_under_a_rule_and_under_what_takes_its_place_are_decided_apart(world: World) -> None:
    before, after = leased("fixed_window", 10, 60, lease=False), leased("fixed_window", 1, 60, lease=False)
    process = world.processes[0]
    checks = [process.check("k", what.rule) for what in (before, after, before)]
    world.settle()
    assert [(check.decision.allowed, check.decision.limit) for check in checks] == [(True, 10), (False, 1), (True, 10)]
    world.end()


def test_a_reset_takes_a_lease_with_it(world: World) -> None:
    what = leased("fixed_window", 1_000, 60)
    process = grant(world, what, 10)
    process.ask([("k", what.rule, 1)], "reset")
    world.settle()
    assert process.check("k", what.rule).entered
    world.settle()
    assert left(world, what) == 999
    world.end()


def test_a_lease_of_a_window_ends_with_it_however_short(world: World) -> None:
    for strategy in ("fixed_window", "sliding_counter"):
        what = leased(strategy, 1_000, 1)
        for to_its_end_us in (1, 10, 63, 64, 65, 1_000):
            world.t_us += 3_000_000 - world.server_us() % 1_000_000 - to_its_end_us
            process = grant(world, what, 10)
            while process.check("k", what.rule).decision is not None:
                assert world.server_us() % 1_000_000 >= 1_000_000 - to_its_end_us
                world.t_us += 1
            with running(process.loop):
                world.settle()


def test_a_short_lease_comes_back_in_time_although_a_longer_one_was_taken_before(world: World) -> None:
    process = world.processes[0]
    long = RateThrottleRule("long", 1_000, 100, strategy="fixed_window", lease=True, lease_ttl=1).compiled
    short = RateThrottleRule("short", 1_000, 100, strategy="fixed_window", lease=True, lease_ttl=0.01).compiled
    for rule in (long, short):
        for count in (1, 10):
            for _ in range(count):
                process.check("k", rule)
            world.settle()
    world.t_us += 10_000
    world.settle()
    assert world.store.peek(process.state_key("k", short), short, 1, world.server_us())[1] == 1_000 - 11
    assert world.store.peek(process.state_key("k", long), long, 1, world.server_us())[1] == 1_000 - 21
    world.end()


def fill(world: World, process: Process, rule: CompiledRule) -> int:
    """Check until one is refused, and say how many were not."""
    got = 0
    while True:
        check = process.check("k", rule)
        world.settle()
        if not check.decision.allowed:
            return got
        got += 1


@pytest.mark.parametrize("back_us", [0, 1, 62_499, 62_500, 62_502, 100_000, 10_000_000])
@pytest.mark.parametrize("beside", ["none", "shorter", "the same"])
def test_versions_with_other_leases_or_none_let_nothing_go_early_even_if_the_clock_is_set_back(
    world: World, beside: str, back_us: int
) -> None:
    """A rolling deploy that turns leases on or off, or changes their length: both versions count in the same window."""
    what = leased("sliding_window", 50, 0.5)
    lease_ttl = {"none": {"lease": False}, "shorter": {"lease_ttl": 0.005}, "the same": {}}[beside]
    plain = leased("sliding_window", 50, 0.5, **lease_ttl)
    process, other = grant(world, what, 5), Process(world)
    admitted = [(world.t_us, 6)]
    world.t_us += 1
    world.step_us -= back_us
    assert other.check("k", plain.rule).entered
    world.settle()
    admitted.append((world.t_us, 1))
    world.t_us += what.rule.lease_us - 2_000
    for _ in range(5):
        assert process.check("k", what.rule).decision.source == "lease"
        admitted.append((world.t_us, 1))
    admitted.append((world.t_us, fill(world, other, plain.rule)))
    world.t_us += 500_000 - what.rule.lease_us + 2_001
    admitted.append((world.t_us, fill(world, other, plain.rule)))
    intervals.check(plain.promise, admitted)
    world.t_us += 2 * 62_500
    admitted.append((world.t_us, fill(world, other, plain.rule)))
    assert admitted[-2][1] + admitted[-1][1] == 50, "somebody is locked out for longer than a window and an eighth"
    intervals.check(plain.promise, admitted)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("knows", [True, False])
def test_a_version_with_another_window_lets_nothing_go_before_it_is_spent(world: World, strategy: str, knows: bool) -> None:
    if strategy != "sliding_window" and not knows:
        pytest.skip("a count doesn't tell which of its units were taken ahead")
    what, plain = leased(strategy, 50, 1, lease_ttl=0.05), leased("sliding_window", 50, 0.4, lease=False)
    process, other = world.processes[0], Process(world)
    admitted = []
    world.t_us += 1_000_000 - world.server_us() % 1_000_000
    if knows:
        for who, version in ((process, what), (other, plain)):
            who.check("k", version.rule)
            world.settle()
            admitted.append((world.t_us, 1))
        world.t_us += 4 * what.rule.lease_us
        world.settle()
    grant(world, what, 5)
    admitted.append((world.t_us, 6))
    world.t_us += 1
    other.check("k", plain.rule)
    world.settle()
    admitted.append((world.t_us, 1))
    world.t_us += what.rule.lease_us - 2_000
    for _ in range(5):
        assert process.check("k", what.rule).decision.source == "lease"
        admitted.append((world.t_us, 1))
    admitted.append((world.t_us, fill(world, other, plain.rule)))
    world.t_us += 400_000 - what.rule.lease_us + 2_001
    admitted.append((world.t_us, fill(world, other, plain.rule)))
    intervals.check(plain.promise, admitted)
    world.end()


@pytest.mark.parametrize(("before", "after"), [(0.005, 0.1), (0.1, 0.005)])
def test_units_go_back_to_where_they_came_from_although_their_rule_has_another_lease_by_then(
    world: World, before: float, after: float
) -> None:
    old, new = (leased("sliding_window", 60, 10, lease_ttl=ttl) for ttl in (before, after))
    process, other = grant(world, old, 5), Process(world)
    granted_us = world.server_us()

    def entries() -> dict[int, int]:
        state = read_state(world.store.script.state(process.state_key("k", new.rule).decode())) or []
        return dict(state[-1][1])

    # Somebody else takes units ahead, where the old lease would end if it were a new one, or later.
    for count in (1, 5):
        for _ in range(count):
            other.check("k", new.rule)
        world.settle()
    was = entries()
    world.t_us += 1
    process.check("k", new.rule, 6)
    world.settle()
    (item,) = process.connection.requests[-1].items
    assert (item.count, item.back) == (1, 5)
    now = entries()
    used = sum(was.values()) - 5 + 6
    assert sum(now.values()) == used + (new.rule.capacity - used) // 8
    if before < after:
        assert was[granted_us + 5_000] - now.get(granted_us + 5_000, 0) == 5
    world.end()


def test_units_taken_under_another_definition_do_not_go_back_to_what_it_has_counted_since(world: World) -> None:
    old, new = leased("fixed_window", 1_000, 60), leased("token_bucket", 1_000, 60)
    other = Process(world)
    for version in (old, new):
        other.check("k", version.rule)
        world.settle()
    process = grant(world, old, 10)
    process.check("k", new.rule)
    world.settle()
    assert process.connection.requests[-1].items[0].back == 0
    world.end()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_units_of_before_a_reset_are_not_given_back_after_it(world: World, strategy: str) -> None:
    what = leased(strategy, 1_000, 1_000)
    process = grant(world, what, 10)
    world.store.reset([process.state_key("k", what.rule)], world.server_us())
    for _ in range(20):
        world.store.consume(process.state_key("k", what.rule), what.rule, 1, world.server_us())
    world.t_us += what.rule.lease_us
    world.settle()
    assert [item.back for item in process.connection.requests[-1].items] == [10]
    assert left(world, what) <= what.rule.capacity - 20
    world.end()


def test_a_denial_under_a_rule_with_leases_says_that_its_time_is_the_latest(world: World) -> None:
    what, plain = leased("fixed_window", 10, 60), RateThrottleRule("p", 10, 60, strategy="fixed_window").compiled
    process = world.processes[0]
    found = []
    for rule in (what.rule, plain):
        checks = [process.check("k", rule, 10), process.check("k", rule, 10)]
        world.settle()
        found.append([(check.decision.allowed, check.decision.retry_after_exact) for check in checks])
    assert found == [[(True, True), (False, False)], [(True, True), (False, True)]]
    world.end()
