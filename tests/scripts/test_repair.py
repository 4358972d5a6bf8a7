"""What comes back after a loss, held against a true log: never less than what was used and is known, and as little more as is promised."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ratethrottle import ConfigurationError
from ratethrottle._engine.definitions import CompiledRule
from ratethrottle.storage.redis.scripts import script
from ratethrottle.testing import intervals
from ratethrottle.testing.manual import KEPT_MS, steered
from tests.kit.clocked import EPOCH, EPOCH_KEY, RUN, ClockedServer, Lease, epoch_text, make_call
from tests.kit.oracle import window_start
from tests.kit.shares import shares_of
from tests.kit.strategies import START_US, STRATEGIES, make_rule

REPAIR_US, OTHERS_US, LEARN_US, LAPSE_US = 10_000_000, 500_000, 250_000, 3_000_000
UNKNOWN = -(2**52)
MINUTE_US = 60_000_000
NOW_US = START_US - START_US % MINUTE_US + 20_000_000
NUMBERS = [(strategy, limit) for strategy in STRATEGIES for limit in (20, 1_000)]


class Log:
    """All that was granted, in order: the truth. One account of one rule, in rational time as the promise has it."""

    def __init__(self, rule: CompiledRule, grants: list[tuple[int, int]]) -> None:
        self.rule, self.grants = rule, grants

    def level(self, now_us: int) -> int:
        """Of a bucket, in ticks; below zero by what has drained since it was empty."""
        level, seen_us = UNKNOWN, now_us
        for at_us, units in self.grants:
            level = max(0, level - self.rule.drain_ticks * (at_us - seen_us)) + units * self.rule.unit_ticks
            seen_us = at_us
        return level - self.rule.drain_ticks * (now_us - seen_us)

    def counted(self, now_us: int) -> int:
        """Of a sliding window, in units."""
        return sum(units for at_us, units in self.grants if self.slot(at_us) + self.rule.window_us > now_us)

    def slot(self, at_us: int) -> int:
        q = self.rule.slot_us
        return at_us if q == 1 else (at_us // q + 1) * q

    def window(self, start_us: int) -> int:
        """Of an aligned window, in units."""
        return sum(
            units
            for at_us, units in self.grants
            if window_start(self.rule.window_us, at_us) == window_start(self.rule.window_us, start_us)
        )

    def known(self, now_us: int) -> tuple[int, int, int]:
        """What a process says now that has heard of just these grants when the last of them was made."""
        rule = self.rule
        if rule.kind == "b":
            return max(UNKNOWN, self.level(now_us)), 0, 0
        if not self.grants:
            return 0, int(rule.kind == "s"), 0
        heard_us = self.grants[-1][0]
        if rule.kind == "s":
            leaves_us = self.slot(heard_us) + rule.window_us - now_us
            return (self.counted(heard_us), leaves_us, now_us - heard_us) if leaves_us > 0 else (0, 1, 0)
        start_us = window_start(rule.window_us, heard_us)
        before = self.window(start_us - rule.window_us) if rule.kind == "c" else 0
        return self.window(start_us), now_us - start_us, before


def scenario(seed: int, strategy: str, limit: int) -> Any:
    rng = random.Random(seed)
    rule = make_rule(strategy, limit, rng.choice((400_000, 2_000_000, MINUTE_US)))
    return rng, rule, rule.compiled


def spend(
    rng: random.Random, server: ClockedServer, rule: CompiledRule, now_us: int, step_us: int, count: int
) -> tuple[int, list[Any]]:
    """Checks of random costs at random times; what was granted, and when the last was asked."""
    grants = []
    for _ in range(count):
        now_us += rng.randrange(step_us)
        cost = rng.choice((1, 1, 2, max(1, rule.capacity // 7)))
        if server.check(now_us, rule, cost)[0]:
            grants.append((now_us, cost))
    return now_us, grants


def hold_against(strategy: str, server: ClockedServer, rule: CompiledRule, log: Log, now_us: int, told: bool) -> None:
    """Exact for buckets and aligned windows. A sliding window holds no less than the truth, and lets all of it go a window later."""
    if rule.kind == "b":
        # The store hears all from before the loss, so the level is what it would be without one.
        assert server.check(now_us, rule, mode="peek")[1] == max(0, log.level(now_us))
    elif rule.kind == "s":
        counted = log.counted(now_us)
        total = server.check(now_us, rule, mode="peek")[1]
        assert counted <= total if told else counted == total
    else:
        start_us = window_start(rule.window_us, now_us)
        held = server.check(now_us, rule, mode="peek")
        assert held[1] == log.window(start_us)
        if rule.kind == "c":
            assert held[2] == log.window(start_us - rule.window_us)


def play(client: Any, strategy: str, limit: int, seed: int, repair: Callable[..., Any] = ClockedServer.tell) -> None:
    """Lose the newest part of the writes, or all. Processes tell of it in any order, while others are granted units."""
    rng, whole, rule = scenario(seed, strategy, limit)
    server = ClockedServer(client, NOW_US - 10**9)
    step_us = max(2, rule.window_us // rng.choice((20, 60, 300)))
    before_us, grants = spend(rng, server, rule, NOW_US, step_us, 40)
    # What the replica had, and what each process had heard of: prefixes of the same history.
    lost_at = rng.choice((0, 0, len(grants), rng.randint(0, len(grants))))
    server, states = ClockedServer(client, NOW_US - 10**9), [None]
    for at_us, units in grants:
        assert server.check(at_us, rule, units)[0] == 1
        states.append(client.get("k"))
    began_us = before_us + rng.randrange(100_000)
    server = ClockedServer(client, began_us)
    if states[lost_at] is not None:
        client.set("k", states[lost_at])
    heard = [rng.randint(0, len(grants)) for _ in range(rng.randint(0, 4))]
    heard += [i for i in heard if rng.random() < 0.5]
    rng.shuffle(heard)
    now_us, since, learning = began_us, [], rng.random() < 0.5
    for upto in heard:
        if learning:
            now_us += rng.randrange(20_000)
        elif rng.random() < 0.6:
            now_us, more = spend(rng, server, rule, now_us, rng.choice((2, 5_000, 200_000)), rng.randint(1, 5))
            since += more
        assert repair(server, now_us, rule, Log(rule, grants[:upto]).known(now_us)) in (1, None)
    in_time = not since
    now_us, more = spend(rng, server, rule, now_us, 5_000, rng.randint(0, 5))
    since += more
    known = Log(rule, grants[: max([lost_at, *heard])] + since)
    if now_us - began_us < REPAIR_US:
        hold_against(strategy, server, rule, known, now_us, bool(heard))
    # And from then on. If nothing was granted before the store had heard all, the promise holds in every interval.
    for _ in range(60):
        now_us, more = spend(rng, server, rule, now_us, step_us, 1)
        known.grants += more
        total = server.check(now_us, rule, mode="peek")[1]
        assert rule.kind != "s" or total >= known.counted(now_us)
    if in_time:
        intervals.check(whole, known.grants)
    told_us = now_us + rule.window_us + rule.slot_us + 1
    assert rule.kind != "s" or server.check(told_us, rule, mode="peek")[1] <= known.counted(told_us)


@pytest.mark.parametrize(("strategy", "limit"), NUMBERS)
# Each example begins by flushing the fixture's server, which serves them all.
@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32))
def test_what_was_known_before_a_loss_and_what_was_granted_since_are_added(
    redis_client: redis.Redis, strategy: str, limit: int, seed: int
) -> None:
    play(redis_client, strategy, limit, seed)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_to_take_the_larger_of_the_two_would_not_do(redis_client: redis.Redis, strategy: str) -> None:
    """A mutant, to see that the test above finds it: what is asserted is joined without what was granted since."""
    naive = steered("repair")
    for added, alone in (
        ("units + h.granted", "units"),
        ("/ v.unit + h.granted", "/ v.unit"),
        ("units - held", "units - v.total"),
    ):
        assert added in naive
        naive = naive.replace(added, alone)

    def tell(server: ClockedServer, now_us: int, rule: CompiledRule, known: tuple[int, int, int]) -> int:
        server.scripts["repair"] = server.client.script_load(naive)
        return ClockedServer.tell(server, now_us, rule, known)

    def play_all() -> None:
        for seed in range(60):
            play(redis_client, strategy, 20, seed, tell)

    with pytest.raises(AssertionError):
        play_all()


@pytest.mark.parametrize(("strategy", "limit"), NUMBERS)
def test_what_is_asserted_does_it_in_any_order_and_once(redis_client: redis.Redis, strategy: str, limit: int) -> None:
    """Overlapping knowledge of three, generations before and after a reset, each once or more, with grants before, or none."""
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    rng, _, rule = scenario(seed, strategy, limit)
    grants = [(NOW_US + i * rule.window_us // 70, rng.randint(1, 1 + limit // 20)) for i in range(15)]
    now_us = grants[-1][0] + 1_000
    for case in range(20):
        told = [
            (Log(rule, grants[: rng.randint(0, 15)]).known(now_us), rng.choice((0, 0, now_us - 5, now_us - 9))) for _ in range(3)
        ]
        reset_us = max(generation for _, generation in told)
        ends = set()
        costs = [rng.randint(1, 1 + limit // 40) for _ in range(case % 4)]
        for _ in range(6):
            server = ClockedServer(redis_client, now_us - 100)
            for cost in costs:
                server.check(now_us, rule, cost)
            order = [*told, *rng.choices(told, k=2)]
            rng.shuffle(order)
            for known, generation in order:
                server.tell(now_us, rule, known, generation)
            before = server.state()
            for known, generation in order:
                server.tell(now_us, rule, known, generation)
            assert server.state() == before, "again, nothing changes"
            ends.add(str(before))
        assert len(ends) == 1, (case, reset_us)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_state_that_knows_of_a_reset_refuses_what_was_known_before(redis_client: redis.Redis, strategy: str) -> None:
    rule = make_rule(strategy, 100, MINUTE_US).compiled
    log = Log(rule, [(NOW_US, 60)])
    now_us = NOW_US + 1_000
    # The reset comes after the loss.
    server = ClockedServer(redis_client, NOW_US + 500)
    assert server.run("reset", ["k"], now_us, server.epoch, 0) == [now_us, now_us]
    assert server.tell(now_us, rule, log.known(now_us)) == 0
    assert server.left(now_us, rule) == 100
    assert server.check(now_us, rule, 3)[0] == 1
    assert server.tell(now_us, rule, log.known(now_us), now_us) == 1
    assert server.left(now_us + 1, rule) <= 37
    # Or before it: the process that knows of it comes first, or last. Those granted since stay in both cases.
    for first in (True, False):
        server = ClockedServer(redis_client, NOW_US + 500)
        server.check(now_us, rule, 7)
        nothing = {"b": (UNKNOWN, 0, 0), "s": (0, 1, 0)}.get(rule.kind, (0, 0, 0))
        if first:
            assert server.tell(now_us, rule, nothing, now_us - 100) == 1
        assert server.tell(now_us, rule, log.known(now_us)) == (0 if first else 1)
        if not first:
            assert server.left(now_us, rule) == 33
            assert server.tell(now_us, rule, nothing, now_us - 100) == 1
        assert server.left(now_us, rule) == 93
        assert server.tell(now_us, rule, nothing, now_us - 101) == 0


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_reset_undoes_what_a_replica_brought_back(redis_client: redis.Redis, strategy: str) -> None:
    rule = make_rule(strategy, 100, MINUTE_US).compiled
    server = ClockedServer(redis_client, NOW_US - 10**9)
    server.check(NOW_US, rule, 60)
    stale = redis_client.get("k")
    server = ClockedServer(redis_client, NOW_US + 500)
    redis_client.set("k", stale or b"")
    server.check(NOW_US + 600, rule, 5)
    known = {"b": (UNKNOWN, 0, 0), "s": (0, 1, 0)}.get(rule.kind, (0, 0, 0))
    assert server.tell(NOW_US + 700, rule, known, NOW_US + 400) == 1
    assert server.left(NOW_US + 700, rule) == 95


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("ahead_us", [-5_000_000, -300_000, 300_000, 5_000_000])
def test_a_new_clock_ahead_or_behind_loses_nothing_but_its_step(redis_client: redis.Redis, strategy: str, ahead_us: int) -> None:
    rule = make_rule(strategy, 100, MINUTE_US).compiled
    log = Log(rule, [(NOW_US + i * 1_000_000, 4) for i in range(15)])
    told_us = NOW_US + 15_000_000
    server = ClockedServer(redis_client, told_us + ahead_us)
    assert server.tell(told_us + ahead_us, rule, log.known(told_us)) == 1
    assert server.left(told_us + ahead_us, rule) <= 100 - 60 + (15_000_000 * 100 // MINUTE_US + 1) * (rule.kind == "b")
    assert server.left(told_us + ahead_us + 2 * MINUTE_US + rule.slot_us, rule) == 100


@pytest.mark.parametrize("strategy", ["fixed_window", "sliding_counter"])
def test_a_window_that_has_ended_since_is_joined_where_it_was(redis_client: redis.Redis, strategy: str) -> None:
    rule = make_rule(strategy, 100, 1_000_000).compiled
    before_us = NOW_US + 999_000
    log = Log(rule, [(before_us, 50)])
    server = ClockedServer(redis_client, before_us + 100)
    assert server.check(before_us + 200, rule, 7)[0] == 1
    now_us = NOW_US + 1_000_500
    assert server.check(now_us, rule, 3)[0] == 1
    for _ in range(2):
        assert server.tell(now_us, rule, log.known(now_us)) == 1
    assert server.check(now_us, rule, mode="peek")[1:3] == ([3, 57] if rule.kind == "c" else [3, 500])


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_was_admitted_before_a_reset_is_not_charged_after_it(redis_client: redis.Redis, strategy: str, used: bool) -> None:
    """Although nothing was known of the key when it was reset, and although a slot or a window hides when units were admitted."""
    rule = make_rule(strategy, 100, MINUTE_US).compiled
    server = ClockedServer(redis_client, NOW_US - 10**9)
    if used:
        server.check(NOW_US - 1, rule, 10)
    assert server.run("reset", ["k"], NOW_US, server.epoch, 120_000) == [NOW_US, NOW_US]

    def charge(marker: str, newest_us: int, *charges: int) -> int:
        item = (newest_us, len(charges) // 2, *charges)
        return server.repair("charge", NOW_US + 1_000, rule, *item, keys=("k", f"charged:{marker}"))

    one = (0, 5 * rule.unit_ticks) if rule.kind == "b" else (0, 5)
    assert charge("before", 1_000, *one) == 0
    assert server.left(NOW_US + 1_000, rule) == 100
    assert charge("after", 999, *one) == 1
    assert server.left(NOW_US + 1_000, rule) == 95
    if rule.kind == "s":
        assert charge("both", 0, 3_000_000, 7, 0, 2) == 1
        assert server.left(NOW_US + 1_000, rule) == 93
    # So long is it kept, also when checks have written the state since.
    assert server.check(NOW_US + 2_000, rule, 1)[0] == 1
    assert b"g%d" % NOW_US in redis_client.get("k")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_was_admitted_alone_is_charged_once(redis_client: redis.Redis, strategy: str) -> None:
    rule = make_rule(strategy, 100, MINUTE_US).compiled
    for began_us in (NOW_US - 10**9, NOW_US):
        server = ClockedServer(redis_client, began_us)
        server.check(NOW_US + 1, rule, 10)
        charges = (0, 5 * rule.unit_ticks) if rule.kind == "b" else (2_000_000, 3, 1_000_000, 2)
        assert [server.charge(NOW_US + 1, rule, marker, *charges) for marker in ("one", "one", "two")] == [1, 0, 1]
        assert server.left(NOW_US + 1, rule) == 80
        if began_us == NOW_US:
            # What others knew comes on top.
            server.tell(NOW_US + 1, rule, Log(rule, [(NOW_US - 10, 30)]).known(NOW_US + 1))
            assert server.left(NOW_US + 1, rule) == 50
        assert redis_client.pttl("charged:one") > 0
        if rule.kind == "s":
            assert server.left(NOW_US + 1 + MINUTE_US - 1_000_000 + 2 * rule.slot_us, rule) >= 90


@pytest.mark.parametrize("first", STRATEGIES)
@pytest.mark.parametrize("second", STRATEGIES)
def test_two_definitions_both_count_what_is_asserted_to_one(redis_client: redis.Redis, first: str, second: str) -> None:
    old, new = make_rule(first, 1_000, MINUTE_US).compiled, make_rule(second, 500, 50_000_000).compiled
    log = Log(old, [(NOW_US - 1_000, 200)])
    server = ClockedServer(redis_client, NOW_US - 10)
    server.check(NOW_US, old, 1)
    server.check(NOW_US, new, 1)
    for _ in range(2):
        assert server.tell(NOW_US, old, log.known(NOW_US)) == 1
        state = server.state()
    assert server.left(NOW_US, old) <= 798
    assert server.left(NOW_US, new) <= 298
    assert server.left(NOW_US, new) >= 500 - 205
    assert server.state() == state
    # And what is asserted to the other, of the same past, isn't added again.
    assert server.tell(NOW_US, new, Log(new, [(NOW_US - 1_000, 200)]).known(NOW_US)) == 1
    assert server.left(NOW_US, new) >= 500 - 205
    assert server.left(NOW_US, old) >= 1_000 - 205


def test_leases_ahead_of_now_keep_their_place(redis_client: redis.Redis) -> None:
    rule = make_rule("sliding_window", 1_000, MINUTE_US).compiled
    server = ClockedServer(redis_client, NOW_US - 10**9)
    lease = Lease(rule, "k", count=5, ahead=5)
    call = make_call([], leases=[lease])
    call.args[1], call.args[12] = server.epoch, MINUTE_US // 8
    server.decide.send(redis_client, NOW_US, call)
    ahead, inherited = server.state()[1][1], redis_client.get("k") or b""
    assert [units for _, units in ahead] == [5, 5]
    server = ClockedServer(redis_client, NOW_US + 10)
    redis_client.set("k", inherited)
    for leaves_us, units in ((MINUTE_US - 5_000_000, 40), (MINUTE_US + MINUTE_US // 8 + 10**9, 45), (MINUTE_US, 13)):
        for _ in range(2):
            assert server.tell(NOW_US + 30, rule, (units, leaves_us, 10_000)) == 1
    entries = dict(server.state()[1][1])
    # What is asserted goes as far ahead as units may be at most, and the lease's were there already.
    assert entries == {ahead[0][0]: 5, ahead[1][0]: 5 + 35}
    assert server.check(NOW_US + 40, rule)[1] == 46


def test_what_the_old_master_granted_after_the_new_one_heard_is_not_taken_for_what_has_left(
    redis_client: redis.Redis,
) -> None:
    """Two units are inherited, and one of them leaves; then the old master, which others have left, grants one more."""
    rule = make_rule("sliding_window", 3, MINUTE_US).compiled
    server = ClockedServer(redis_client, NOW_US - 10**9)
    server.check(NOW_US - MINUTE_US + 10, rule)
    server.check(NOW_US - 1_000, rule)
    inherited = redis_client.get("k") or b""
    server = ClockedServer(redis_client, NOW_US)
    redis_client.set("k", inherited)
    assert server.tell(NOW_US, rule, (2, MINUTE_US - 1_000, 1_000)) == 1
    for _ in range(2):
        # Heard at NOW_US + 20, when the first had left: of these two the store knows one.
        assert server.tell(NOW_US + 30, rule, (2, MINUTE_US - 10, 10)) == 1
        assert server.left(NOW_US + 30, rule) == 1


def test_too_late_nothing_is_asserted_and_headers_go(redis_client: redis.Redis) -> None:
    rule = make_rule("token_bucket", 100, 1000 * MINUTE_US).compiled
    server = ClockedServer(redis_client, NOW_US)
    server.check(NOW_US, rule, 3)
    assert (redis_client.get("k") or b"").startswith(b"1e%016d,%d,3;" % (NOW_US, NOW_US))
    late_us = NOW_US + REPAIR_US
    assert server.tell(late_us - 1, rule, (10 * rule.unit_ticks, 0, 0)) == 1
    assert server.left(late_us - 1, rule) == 87
    assert server.tell(late_us, rule, (50 * rule.unit_ticks, 0, 0)) == 0
    assert server.left(late_us, rule) == 87
    server.check(late_us, rule)
    assert (redis_client.get("k") or b"").startswith(b"1;b")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_keys_outlive_their_views_while_others_may_assert(redis_client: redis.Redis, strategy: str) -> None:
    """On the server's own clock."""
    rule = make_rule(strategy, 1_000, 10_000).compiled
    seconds, micros = redis_client.time()
    began_us = seconds * 10**6 + micros
    epoch = epoch_text(began_us, began_us)
    redis_client.set(EPOCH_KEY, epoch)
    call = make_call([(rule, "k", 1)])
    call.args[1] = epoch
    redis_client.eval(script("decide").text, 2, EPOCH_KEY, "k", "id", *call.args)
    assert 0 <= redis_client.pexpiretime("k") * 1_000 - began_us - REPAIR_US <= 2_003_000
    assert redis_client.eval(script("reset").text, 3, EPOCH_KEY, "k", "l", "id", epoch, 0, 0)[2] > began_us
    for key in ("k", "l"):
        assert 0 <= redis_client.pexpiretime(key) * 1_000 - began_us - REPAIR_US <= 2_003_000


def test_what_was_charged_expires_no_earlier_than_what_counts_after_it(redis_client: redis.Redis) -> None:
    """On the server's own clock: a check that finds its key to expire in the right second leaves that as it is."""
    rule = make_rule("token_bucket", 100, 1_000_000).compiled
    redis_client.set(EPOCH_KEY, EPOCH)
    words = [getattr(rule, word) for word in script("repair").header["rule"]]
    call = make_call([(rule, "k", 3)])
    for number in range(8):
        charge = ("id", "charge", EPOCH, 1, 1, *words, 1, 1, 0, 1, 0, 20 * rule.unit_ticks)
        assert redis_client.eval(script("repair").text, 3, EPOCH_KEY, "k", f"charged:{number}", *charge)[2] == 1
        for _ in range(4):
            time.sleep(0.03)
            reply = redis_client.eval(script("decide").text, 2, EPOCH_KEY, "k", "id", *call.args)
            ((allowed, _, _, reset_us),) = call.answers(reply)
            assert allowed
            assert redis_client.pexpiretime("k") * 1_000 > reply[1] + reset_us
        redis_client.delete("k")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_generation_lives_as_long_as_what_it_undid(redis_client: redis.Redis, strategy: str) -> None:
    rule = make_rule(strategy, 1_000, MINUTE_US).compiled
    redis_client.set(EPOCH_KEY, EPOCH)
    call = make_call([(rule, "k", 500)])
    redis_client.eval(script("decide").text, 2, EPOCH_KEY, "k", "id", *call.args)
    ends_ms = redis_client.pexpiretime("k")
    _, at_us, generation = redis_client.eval(script("reset").text, 2, EPOCH_KEY, "k", "id", EPOCH, 0)
    assert generation == at_us
    assert abs(redis_client.pexpiretime("k") - ends_ms) <= 1
    assert redis_client.get("k") == b"1g%d;" % generation
    one = make_call([(rule, "k", 1)])
    reply = redis_client.eval(script("decide").text, 2, EPOCH_KEY, "k", "id", *one.args)
    assert reply[-2:] == [1, generation]
    assert redis_client.pexpiretime("k") >= ends_ms - 1
    _, _, again = redis_client.eval(script("reset").text, 2, EPOCH_KEY, "k", "id", EPOCH, 0)
    assert again > generation


def test_another_epoch_refuses_everything_and_touches_nothing(redis_client: redis.Redis) -> None:
    rule = make_rule("fixed_window", 10, MINUTE_US).compiled
    server = ClockedServer(redis_client, NOW_US)
    server.check(NOW_US, rule)
    before = redis_client.get("k")
    for stored in (epoch_text(NOW_US, NOW_US + 1), None, "x", [1]):
        redis_client.delete(EPOCH_KEY)
        if isinstance(stored, list):
            redis_client.rpush(EPOCH_KEY, *stored)
        elif stored:
            redis_client.set(EPOCH_KEY, stored)
        call = make_call([(rule, "k", 1)])
        call.args[1] = server.epoch
        assert server.decide.send(redis_client, NOW_US, call) == [b"id", -1]
        assert server.run("reset", ["k"], NOW_US, server.epoch, 0) == [-1]
        words = [getattr(rule, word) for word in script("repair").header["rule"]]
        assert server.run("repair", ["k"], NOW_US, "assert", server.epoch, 1, 1, *words, 1, 1, 0, 5, 0, 0, 0, "p", 0, 1) == [-1]
        assert server.run("repair", ["k", "m"], NOW_US, "charge", server.epoch, 1, 1, *words, 1, 1, 5, 1, 5, 1) == [-1]
        assert redis_client.get("k") == before
        assert not redis_client.exists("m")


class Beats:
    def __init__(self, client: Any) -> None:
        self.server, self.client = ClockedServer(client, NOW_US), client
        client.delete(EPOCH_KEY)

    def __call__(
        self, now_us: int, known: int, run: str = RUN, process: str = "p", purpose: str = "count", processes: int = 9
    ) -> list[int]:
        reply = self.server.run("beat", ["processes"], now_us, run, known, process, purpose, 0, processes, 0)
        assert reply[0] == now_us
        assert self.client.get(EPOCH_KEY) == f"{run}{reply[1]:016}{reply[2]:016}".encode()
        # Then come evicted keys, which no server here has, whether to forget, what is held, its slot, and for how long all were counted.
        return reply[1:-5]


def test_an_epoch_is_named_by_the_first_beat_and_learnt_where_one_was_before(redis_client: redis.Redis) -> None:
    beat = Beats(redis_client)
    assert beat(NOW_US, 0) == [NOW_US, 0, 0, 1, 0]
    assert beat(NOW_US + 5, NOW_US) == [NOW_US, 0, 0, 1, 0]
    # A process that knew an older one: others are waited for.
    began_us, all_us = NOW_US + 9 + OTHERS_US, OTHERS_US + LEARN_US
    assert beat(NOW_US + 9, NOW_US - 7, process="q") == [NOW_US, began_us, all_us, 1, 0]
    assert beat(NOW_US + 10, NOW_US - 8, process="a")[:3] == [NOW_US, began_us, all_us - 1]
    assert beat(NOW_US + 9 + all_us - 1, NOW_US - 7)[2] == 1
    assert beat(NOW_US + 9 + all_us, NOW_US - 7)[2] == 0
    # Another run, of a clock that is behind.
    other, now_us = RUN[::-1], NOW_US - 50
    assert beat(now_us, NOW_US, other)[:3] == [NOW_US + 1, now_us + OTHERS_US, all_us]
    assert beat(now_us + 10, 0, other)[:3] == [NOW_US + 1, now_us + OTHERS_US, all_us - 10]
    # A flush, found by a process that knew; and one that comes back from a later epoch that this server never saw.
    redis_client.delete(EPOCH_KEY)
    assert beat(NOW_US + 100, NOW_US + 1, other)[:3] == [NOW_US + 100, NOW_US + 100 + OTHERS_US, all_us]
    assert beat(NOW_US + 200, NOW_US + 900, other)[:3] == [NOW_US + 901, NOW_US + 200 + OTHERS_US, all_us]
    # Of one that began long ago nothing is learnt any more.
    redis_client.delete(EPOCH_KEY)
    beat(NOW_US, 0)
    assert beat(NOW_US + REPAIR_US, 5)[:3] == [NOW_US, 0, 0]
    # A clock that was set back far doesn't make it last.
    epoch, _, learning_us = beat(NOW_US, 5, other)[:3]
    assert learning_us == all_us
    assert beat(NOW_US - 1, epoch, other)[2] == 0


@pytest.mark.parametrize("purpose", ["count", "look"])
def test_once_as_many_have_come_as_were_known_nobody_else_is_waited_for(redis_client: redis.Redis, purpose: str) -> None:
    beat = Beats(redis_client)
    known = NOW_US - 10**6
    epoch, began_us, _, *ranked = beat(NOW_US, known, process="b", purpose=purpose, processes=3)
    assert (epoch, began_us, ranked) == (NOW_US, NOW_US + OTHERS_US, [1, 0])
    # Newcomers have nothing to tell, and a process that came already isn't another one.
    assert beat(NOW_US + 1, 0, process="new")[1:] == [began_us, OTHERS_US + LEARN_US - 1, 0, 0]
    assert beat(NOW_US + 2, epoch, process="new", processes=1)[1:] == [began_us, OTHERS_US + LEARN_US - 2, 0, 0]
    assert beat(NOW_US + 3, epoch, process="b", processes=1)[1:] == [began_us, OTHERS_US + LEARN_US - 3, 1, 0]
    assert beat(NOW_US + 4, known, process="b", purpose=purpose, processes=3)[1] == began_us
    assert beat(NOW_US + 5, epoch, process="b", purpose="look")[1:] == [began_us, OTHERS_US + LEARN_US - 5, 0, 0]
    # Nor does it count a process that doesn't know how many there were, as one that was forked, or that leaves.
    assert beat(NOW_US + 6, known, process="a", purpose=purpose, processes=0)[1:] == [began_us, OTHERS_US + LEARN_US - 6, 0, 0]
    assert beat(NOW_US + 7, known, process="a", purpose="leave", processes=3)[1:] == [began_us, OTHERS_US + LEARN_US - 7, 0, 0]
    # A process that says too few, as it was away or has begun just now, ends nothing early.
    assert beat(NOW_US + 8, known, process="a", purpose=purpose, processes=2)[1:] == [began_us, OTHERS_US + LEARN_US - 8, 2, 1]
    # The third.
    assert beat(NOW_US + 9, known, process="c", purpose=purpose, processes=1)[1:] == [NOW_US + 9, LEARN_US, 3, 2]
    assert set(redis_client.zrange("processes", 0, -1)) == {b"a", b"b", b"c"}
    assert beat(NOW_US + 10, epoch, process="b", processes=1)[1:] == [NOW_US + 9, LEARN_US - 1, 3, 0]
    # From now on all are counted; and a process that comes later doesn't begin again.
    assert beat(NOW_US + 11, epoch, process="new")[1:] == [NOW_US + 9, LEARN_US - 2, 4, 3]
    assert beat(NOW_US + 12, known, process="d", processes=3)[1:] == [NOW_US + 9, LEARN_US - 3, 5, 4]


def test_the_largest_number_of_processes_that_anybody_knew_counts(redis_client: redis.Redis) -> None:
    beat = Beats(redis_client)
    known = NOW_US - 10**6
    for i, processes in enumerate((2, 12, 3)):
        heard = beat(NOW_US + i, known, process=f"p{i}", processes=processes)
        assert heard[1:] == [NOW_US + OTHERS_US, OTHERS_US + LEARN_US - i, i + 1, i]
    assert redis_client.get("processes:count")[40:50] == b"%010d" % 12
    # Nobody else comes; from then on nobody is waited for.
    assert beat(NOW_US + OTHERS_US, NOW_US, process="new", processes=3)[1:] == [NOW_US + OTHERS_US, LEARN_US, 4, 3]
    assert redis_client.get("processes:count")[40:50] == b"%010d" % 0
    assert set(redis_client.zrange("processes", 0, -1)) == {b"p0", b"p1", b"p2", b"new"}


def test_a_process_that_was_alone_waits_for_nobody(redis_client: redis.Redis) -> None:
    beat = Beats(redis_client)
    assert beat(NOW_US, NOW_US - 7, processes=1) == [NOW_US, NOW_US, LEARN_US, 1, 0]
    # Whom another server counted comes with it, and hasn't come.
    redis_client.zadd("processes", {"x": NOW_US, "y": NOW_US})
    assert beat(NOW_US + 1, NOW_US, RUN[::-1], processes=2)[1:] == [NOW_US + 1 + OTHERS_US, OTHERS_US + LEARN_US, 1, 0]


def test_processes_lapse_leave_and_have_a_rank(redis_client: redis.Redis) -> None:
    beat = Beats(redis_client)
    assert [beat(NOW_US + i, 0, process=name)[3:] for i, name in enumerate("cab")] == [[1, 0], [2, 1], [3, 2]]
    assert beat(NOW_US + 10, 0, process="c")[3:] == [3, 0]
    assert beat(NOW_US + 15, 0, process="c", purpose="look")[3:] == [0, 0]
    assert beat(NOW_US + 20, 0, process="a", purpose="leave")[3:] == [0, 0]
    assert beat(NOW_US + 21, 0, process="b")[3:] == [2, 1]
    assert beat(NOW_US + 22, 0, process="d")[3:] == [3, 1], "it has the place that was left"
    # A period is over at the first beat 0.9 s after it began. A process that hasn't come in two whole ones isn't counted.
    heard = [beat(NOW_US + 22 + i * 500_000, 0, process="d")[3:] for i in range(1, 7)]
    assert heard == [[3, 1]] * 5 + [[1, 0]]
    assert beat(NOW_US + 3_100_000, 0, process="b")[3:] == [2, 1], "b is back, in its own place"
    # All of it is long ago, or the clock was set back.
    assert beat(NOW_US + 3 * LAPSE_US, 0, process="e")[3:] == [1, 0]
    assert beat(NOW_US - 10**9, 0, process="f")[3:] == [2, 1]
    assert beat(NOW_US - 10**9 + LAPSE_US, 0, process="f")[3:] == [1, 0]
    for key in redis_client.keys("processes*"):
        assert 0 < redis_client.pttl(key) - KEPT_MS <= 3_600


def test_a_process_is_counted_at_the_same_cost_in_a_fleet_of_any_size(shared_redis_server) -> None:
    """In commands, of which none reads all members: times aren't the same twice."""
    costs = []
    with shared_redis_server.client() as client:
        for fleet in (10, 2_000):
            beat = Beats(client)
            for i in range(fleet):
                reply = beat(NOW_US + i, 0, process=f"{i:016x}")
            assert reply[3:] == [fleet, fleet - 1]
            for name, at_us in (("goes on", NOW_US + fleet), ("a period is over", NOW_US + 1_000_000)):
                client.config_resetstat()
                assert beat(at_us, 0, process=f"{7:016x}")[3:] == [fleet, 7]
                stats = client.info("commandstats")
                costs.append((name, {command: told["calls"] for command, told in stats.items() if "info" not in command}))
    assert costs[:2] == costs[2:]
    used = {command.removeprefix("cmdstat_") for _, commands in costs for command in commands}
    # The bits of 10,000 processes are 1,250 bytes.
    assert used <= {
        "evalsha",
        "time",
        "mget",
        "get",
        "zscore",
        "setbit",
        "bitcount",
        "bitop",
        "del",
        "setrange",
        "set",
        "pexpire",
        "config|resetstat",
    }


def test_two_processes_never_have_one_slot(redis_client: redis.Redis) -> None:
    """Also when one is back after it was taken for gone, and its slot is another one's."""
    beat = Beats(redis_client)
    rng, at_us, slots = random.Random(7), NOW_US, {}
    for _ in range(400):
        at_us += rng.randrange(400_000)
        name = f"p{rng.randrange(12)}"
        purpose = "leave" if rng.random() < 0.1 else "count"
        slot = beat.server.run("beat", ["processes"], at_us, RUN, 0, name, purpose, 0, 9, 0)[-2]
        slots.pop(name, None)
        if purpose == "count":
            assert slot >= 0
            for other in [other for other, theirs in slots.items() if theirs == slot]:
                del slots[other]
            slots[name] = slot
        stored = {member.decode(): int(score) for member, score in redis_client.zrange("processes", 0, -1, withscores=True)}
        assert slots.items() <= stored.items()
        assert len(set(stored.values())) == len(stored) <= 12


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_was_cleared_counts_no_more_before_it_is_deleted(redis_client: redis.Redis, strategy: str) -> None:
    """Nor does it come back, whichever process may still know of it."""
    rule = make_rule(strategy, 100, MINUTE_US).compiled
    server = ClockedServer(redis_client, NOW_US)
    server.check(NOW_US, rule, 60)
    old = redis_client.get("k")
    now_us = NOW_US + 1_000
    clear = ("processes",), now_us, RUN, NOW_US, "p", "clear", 0, 0, 0
    at_us, epoch, began_us, *_ = server.run("beat", list(clear[0]), *clear[1:])
    assert (at_us, epoch, began_us) == (now_us, now_us, 0)
    before, server.epoch = server.epoch, epoch_text(epoch, 0)
    assert redis_client.get(EPOCH_KEY) == server.epoch.encode() + b"1" + b"0" * 16
    # A call of before isn't run, and one of now finds nothing.
    call = make_call([(rule, "k", 1)])
    call.args[1] = before
    assert server.decide.send(redis_client, now_us, call) == [b"id", -1]
    assert server.left(now_us + 1, rule) == 100
    assert redis_client.get("k") == old
    assert server.charge(now_us + 1, rule, "m", *((0, 5 * rule.unit_ticks) if rule.kind == "b" else (0, 5))) == 1
    assert server.left(now_us + 1, rule) == 95
    assert redis_client.get("k") != old
    # What is deleted is what is older.
    text = script("clear").text.decode()
    redis_client.set("l", "damaged")
    redis_client.rpush("m", 1)
    mine = (4, EPOCH_KEY, "k", "l", "m", "id")
    assert redis_client.eval(text, *mine, before) == [b"id", -1]
    assert redis_client.eval(text, *mine, server.epoch) == [b"id", 2]
    assert redis_client.exists("k", "l", "m") == 1
    # A process that comes from before has to forget. Others needn't, and nobody learns from anybody.
    for known, forgets in ((NOW_US, 1), (0, 0), (epoch, 0), (NOW_US - 5, 1)):
        reply = server.run("beat", ["processes"], now_us + 2, RUN, known, f"p{known}", "count", 0, 1, 0)
        assert reply[1:4] == [epoch, 0, 0]
        assert reply[-4] == forgets
    # Later the calls are named by the epoch alone again, and a failover changes nothing of it.
    late_us = now_us + REPAIR_US
    server.run("beat", ["processes"], late_us, RUN, epoch, "p", "count", 0, 1, 0)
    assert redis_client.get(EPOCH_KEY) == server.epoch.encode()
    for known, forgets in ((NOW_US, 1), (epoch, 0)):
        assert server.run("beat", ["processes"], late_us, RUN[::-1], known, "p", "count", 0, 1, 0)[-4] == forgets


class Gate:
    """Processes that enter an epoch with something to tell, each by a beat."""

    def __init__(self, client: Any, rule: CompiledRule) -> None:
        self.client, self.rule, self.server = client, rule, ClockedServer(client, NOW_US)
        client.delete(EPOCH_KEY)

    def comes(self, now_us: int, process: str, heard_us: int, known: int = NOW_US - 10**6, run: str = RUN) -> int:
        """Returns until when the store has kept what it heard."""
        reply = self.server.run("beat", ["processes"], now_us, run, known, process, "count", 0, 2, heard_us)
        self.server.epoch = f"{run}{reply[1]:016}{reply[2]:016}"
        return int(reply[-3])

    def tells(self, now_us: int, process: str, level_us: int, told_us: int = 0, units: int = 5) -> None:
        words = [getattr(self.rule, word) for word in script("repair").header["rule"]]
        known = {"b": (units * self.rule.unit_ticks, 0, 0), "s": (units, MINUTE_US, 1)}.get(self.rule.kind, (units, 0, 0))
        item = (1, 1, 0, *known, told_us) if told_us else ()
        keys = ["k"] if told_us else []
        self.server.run("repair", keys, now_us, "assert", self.server.epoch, 1, len(keys), *words, *item, process, level_us, 1)

    def asks(self, now_us: int) -> int:
        """How many are granted, of one; -3 while somebody may tell of more."""
        call = make_call([(self.rule, "k", 1)])
        call.args[1] = self.server.epoch
        return int(self.server.decide.send(self.client, now_us, call)[2])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_key_is_decided_once_nobody_can_know_anything_newer_of_it(redis_client: redis.Redis, strategy: str) -> None:
    gate, t = Gate(redis_client, make_rule(strategy, 10, 1000 * MINUTE_US).compiled), NOW_US - 5_000
    gate.comes(NOW_US, "a", t + 100)
    gate.comes(NOW_US + 1, "b", t + 70)
    assert gate.asks(NOW_US + 2) == -3
    # One has told it, of whenever; the other may have heard of it later.
    gate.tells(NOW_US + 3, "a", t + 60, told_us=t + 60, units=9)
    assert gate.asks(NOW_US + 4) == -3
    gate.tells(NOW_US + 5, "b", t + 61)
    assert gate.asks(NOW_US + 6) == -3
    gate.tells(NOW_US + 7, "b", t + 60)
    assert gate.asks(NOW_US + 8) == 1
    assert gate.asks(NOW_US + 9) == 0, "nine and one are ten"
    # A process that comes late may know it of later, if it has heard anything later.
    gate.comes(NOW_US + 10, "c", t + 59)
    assert gate.asks(NOW_US + 11) == 0
    gate.comes(NOW_US + 12, "d", t + 65)
    assert gate.asks(NOW_US + 13) == -3
    gate.comes(NOW_US + 14, "d", t + 65)
    gate.tells(NOW_US + 15, "d", 0)
    assert gate.asks(NOW_US + 16) == 0
    # A beat of another connection of the same process comes after it.
    gate.comes(NOW_US + 17, "d", t + 65)
    assert gate.asks(NOW_US + 18) == 0
    for process in "abc":
        gate.tells(NOW_US + 20, process, 0)
    assert redis_client.get(EPOCH_KEY) == gate.server.epoch.encode()


def test_what_is_known_of_another_key_says_nothing_of_one_that_nobody_told(redis_client: redis.Redis) -> None:
    gate = Gate(redis_client, make_rule("fixed_window", 10, MINUTE_US).compiled)
    gate.comes(NOW_US, "a", NOW_US - 50)
    gate.tells(NOW_US + 1, "a", 1)
    assert gate.asks(NOW_US + 2) == -3
    # A reset needs nobody's word.
    gate.server.run("reset", ["k"], NOW_US + 3, gate.server.epoch, 0)
    assert gate.asks(NOW_US + 4) == 1
    # Nor does anybody wait for a process that knows nothing, or ends, or stands still for three seconds.
    gate.comes(NOW_US + 5, "b", 0)
    redis_client.delete("k")
    gate.tells(NOW_US + 6, "a", 0)
    assert gate.asks(NOW_US + 7) == 1
    for process in "cd":
        gate.comes(NOW_US + 8, process, NOW_US - 50)
    redis_client.delete("k")
    gate.tells(NOW_US + LAPSE_US, "d", NOW_US - 60)
    assert gate.asks(NOW_US + LAPSE_US) == -3
    gate.tells(NOW_US + 8 + LAPSE_US, "d", 0)
    assert gate.asks(NOW_US + 9 + LAPSE_US) == 1


def test_states_are_repaired_until_processes_have_told_all(redis_client: redis.Redis) -> None:
    gate = Gate(redis_client, make_rule("fixed_window", 10, 1000 * MINUTE_US).compiled)
    gate.comes(NOW_US, "a", NOW_US - 50)
    for second in range(1, 20):
        gate.tells(NOW_US + second * 10**6, "a", NOW_US - 100 - second)
    assert gate.asks(NOW_US + 19 * 10**6) == -3
    gate.tells(NOW_US + 20 * 10**6, "a", NOW_US - 200, told_us=NOW_US - 200, units=9)
    assert [gate.asks(NOW_US + 20 * 10**6 + i) for i in (1, 2)] == [1, 0]
    # One that comes by then has come too late.
    gate.comes(NOW_US + 20 * 10**6 + 3, "b", NOW_US - 5)
    assert gate.asks(NOW_US + 20 * 10**6 + 4) == 0


def test_the_times_of_two_servers_are_not_compared(redis_client: redis.Redis) -> None:
    gate = Gate(redis_client, make_rule("fixed_window", 10, MINUTE_US).compiled)
    gate.comes(NOW_US, "a", NOW_US - 50)
    gate.comes(NOW_US + 1, "b", NOW_US - 900, known=NOW_US - 5)
    gate.tells(NOW_US + 2, "a", NOW_US - 60, told_us=NOW_US - 60)
    assert gate.asks(NOW_US + 3) == -3
    gate.tells(NOW_US + 4, "a", 0)
    assert gate.asks(NOW_US + 5) == -3
    gate.tells(NOW_US + 6, "b", 0)
    assert gate.asks(NOW_US + 7) == 1


def test_a_process_needs_not_tell_what_a_replica_has_kept(redis_client: redis.Redis) -> None:
    gate, t = Gate(redis_client, make_rule("fixed_window", 10, MINUTE_US).compiled), NOW_US
    assert gate.comes(t, "a", 0, known=0) == 0
    epoch = int(gate.server.epoch[40:56])
    for past_us in (10_000, 60_000, 100_000):
        gate.comes(t + past_us, "a", 0, known=epoch)
    # Every 50 ms it is written down until when that is.
    other = RUN[::-1]
    assert gate.comes(t + 500_000, "a", t + 90_000, known=epoch, run=other) == t + 60_000
    assert gate.comes(t + 500_001, "b", t + 90_000, known=epoch - 1, run=other) == 0
    assert gate.comes(t + 500_002, "c", t + 90_000, known=epoch, run=other) == t + 60_000
    # Of an epoch that was flushed nothing is.
    redis_client.flushall()
    assert gate.comes(t + 600_000, "a", t + 90_000, known=epoch, run=other) == 0


def test_a_beat_that_is_none_is_refused_and_nothing_is_written(redis_client: redis.Redis) -> None:
    beat = Beats(redis_client)
    good: list[Any] = [RUN, 7, "p", "count", 0, 3, 5]
    for place, wrong in ((0, RUN[1:]), (0, RUN[1:] + "-"), (2, ""), (3, "leaves"), (3, "")):
        with pytest.raises(redis.ResponseError, match="RATETHROTTLE"):
            beat.server.run("beat", ["processes"], NOW_US, *good[:place], wrong, *good[place + 1 :])
    for place in (1, 5, 6):
        for number in (-1, 0.5, "x", "nan", ""):
            with pytest.raises(redis.ResponseError, match="RATETHROTTLE"):
                beat.server.run("beat", ["processes"], NOW_US, *good[:place], number, *good[place + 1 :])
    assert redis_client.keys() == []
    beat.server.run("beat", ["processes"], NOW_US, *good)


def test_what_is_no_epoch_or_no_set_is_replaced(redis_client: redis.Redis) -> None:
    beat = Beats(redis_client)
    for junk in ("", "x", RUN, epoch_text(5, 5) + "0", epoch_text(5, 5)[:-1] + "x"):
        redis_client.set(EPOCH_KEY, junk)
        assert beat(NOW_US, 7)[:3] == [NOW_US, NOW_US + OTHERS_US, OTHERS_US + LEARN_US]
    redis_client.delete(EPOCH_KEY, "processes")
    redis_client.rpush(EPOCH_KEY, 1)
    redis_client.rpush("processes", 1)
    assert beat(NOW_US, 0) == [NOW_US, 0, 0, 1, 0]
    # A number that no clock has said keeps nobody out, whether it stands there or a process has heard it.
    for far_us in (NOW_US + 2 * 366 * 86_400 * 10**6, 9_999_999_999_999_998, 9_999_999_999_999_999):
        redis_client.set(EPOCH_KEY, epoch_text(far_us))
        assert beat(NOW_US, 0)[:3] == [NOW_US, 0, 0]
        assert beat(NOW_US, far_us)[:3] == [NOW_US, NOW_US + OTHERS_US, OTHERS_US + LEARN_US]
    for suffix in ("", ":marks", ":last", ":before", ":alive", ":count"):
        redis_client.delete("processes" + suffix)
        redis_client.rpush("processes" + suffix, 1)
        assert beat(NOW_US + 10**6, 0)[3:] == [1, 0], suffix
    redis_client.set("processes:count", "9" * 66)
    assert beat(NOW_US + 10**6, 0)[3:] == [1, 0]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_bad_arguments_of_a_repair_are_refused_and_nothing_is_written(redis_client: redis.Redis, strategy: str) -> None:
    rule = make_rule(strategy, 10, MINUTE_US).compiled
    server = ClockedServer(redis_client, NOW_US)
    server.check(NOW_US, rule, 2)
    before = redis_client.get("k")
    words = [getattr(rule, word) for word in script("repair").header["rule"]]
    own = {"b": (9, 0, 0), "s": (3, 5, 0), "f": (3, 5, 0), "c": (3, 5, 2)}[rule.kind]
    for mode, item, keys in (("assert", (1, 1, 0, *own, 0, "p", 0, 1), ["k"]), ("charge", (1, 1, 0, 1, 0, 3), ["k", "m"])):
        good = [mode, server.epoch, 1, 1, *words, *item]
        for place in (0, 2, 3, *(i for i in range(12, len(good)) if good[i] != "p")):
            for value in ("nan", "-inf", "1.5", "", "x", "1e30"):
                wrong = list(good)
                wrong[place] = value
                if place >= 12 and place not in ((15,) if mode == "charge" else (len(good) - 2, len(good) - 1)):
                    # One that is wrong is refused alone.
                    assert server.run("repair", keys, NOW_US, *wrong) == [NOW_US, 0, 1, 1]
                    redis_client.delete("m")
                    continue
                with pytest.raises(redis.ResponseError, match="RATETHROTTLE"):
                    server.run("repair", keys, NOW_US, *wrong)
        for wrong in (good[:-1], [*good, 1]):
            with pytest.raises(redis.ResponseError, match="RATETHROTTLE"):
                server.run("repair", keys, NOW_US, *wrong)
        assert redis_client.get("k") == before
        assert not redis_client.exists("m")
        assert server.run("repair", keys, NOW_US, *good) == [NOW_US, 1]
        redis_client.set("k", before or b"")


def test_a_key_of_another_version_does_not_stand_in_the_way_of_others(redis_client: redis.Redis) -> None:
    rule = make_rule("fixed_window", 10, MINUTE_US).compiled
    server = ClockedServer(redis_client, NOW_US)
    redis_client.set("k", "2;whatever")
    words = [getattr(rule, word) for word in script("repair").header["rule"]]
    items = (1, 1, 0, 4, 0, 0, 0, 2, 1, 0, 4, 0, 0, 0, "p", 0, 1)
    assert server.run("repair", ["k", "l"], NOW_US, "assert", server.epoch, 1, 2, *words, *items) == [NOW_US, 1, 1, 2]
    assert redis_client.get("k") == b"2;whatever"
    assert redis_client.exists("l")


BOOKED_US = 60_000_000  # a turn that is booked is no farther ahead
REACHES = {
    "sliding_window": lambda rule: rule.window_us + rule.window_us // 8 + rule.slot_us,
    "token_bucket": lambda rule: 2 * rule.capacity * rule.unit_ticks // rule.drain_ticks + 1 + BOOKED_US,
    "leaky_bucket": lambda rule: 2 * rule.capacity * rule.unit_ticks // rule.drain_ticks + 1 + BOOKED_US,
    "sliding_counter": lambda rule: 2 * rule.window_us,
    "fixed_window": lambda rule: 2 * rule.window_us,
}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("longer", STRATEGIES)
def test_answers_tell_a_generation_for_as_long_as_either_definition_reaches(
    redis_client: redis.Redis, strategy: str, longer: str
) -> None:
    """Not a µs less: until then somebody may still know what had been used before the reset."""
    rule, other = make_rule(strategy, 7, MINUTE_US).compiled, make_rule(longer, 1_000, 3 * MINUTE_US).compiled
    for rules in ((rule,), (rule, other), (other, rule)):
        reach_us = max(REACHES[name](which) for name, which in ((strategy, rule), (longer, other)) if which in rules)
        server = ClockedServer(redis_client, NOW_US - 10**9)
        server.check(NOW_US, rule, 5)
        server.run("reset", ["k"], NOW_US, server.epoch, 0)
        for which in rules:
            server.check(NOW_US + 1, which, 1)
        for later_us, told in ((reach_us // 2 + 1, True), (reach_us - 1, True), (reach_us, False)):
            call = make_call([(rules[-1], "k", 1)])
            call.args[1] = server.epoch
            reply = server.decide.send(redis_client, NOW_US + later_us, call)
            assert (reply[-2:] == [1, NOW_US]) == told, (later_us, reply)
            assert ((b"g%d" % NOW_US) in (redis_client.get("k") or b"")) == told


@pytest.mark.parametrize("first", STRATEGIES)
@pytest.mark.parametrize("second", STRATEGIES)
def test_two_definitions_both_count_what_is_charged_to_one(redis_client: redis.Redis, first: str, second: str) -> None:
    rules = [make_rule(first, 100, MINUTE_US).compiled, make_rule(second, 60, 2 * MINUTE_US).compiled]
    for charged in (0, 1):
        server = ClockedServer(redis_client, NOW_US - 10**9)
        for rule in rules:
            assert server.check(NOW_US, rule, 2)[0] == 1
        rule = rules[charged]
        units = 11 * rule.unit_ticks if rule.kind == "b" else 11
        before = [server.left(NOW_US + 1, which) for which in rules]
        assert server.charge(NOW_US + 1, rule, f"m{charged}", 0, units) == 1
        after = [server.left(NOW_US + 1, which) for which in rules]
        assert [was - now for was, now in zip(before, after, strict=True)] == [11, 11]


def corners() -> list[CompiledRule]:
    """Rules at the ends of all ranges, as far as Python builds them."""
    rules = []
    for strategy in STRATEGIES:
        for limit in (1, 65, 10**9):
            for window_us in (1_000, 1_000_000, 366 * 86_400 * 10**6):
                for burst in (None, 1, 10**9) if strategy.endswith("bucket") else (None,):
                    with contextlib.suppress(ConfigurationError):
                        rules.append(make_rule(strategy, limit, window_us, burst).compiled)
    return rules


def test_what_python_builds_the_scripts_take(redis_client: redis.Redis) -> None:
    """Every number that a process may say of a rule, at the ends of its range: decided, asserted, charged and reset."""
    rules = corners()
    assert len(rules) > 50
    for rule in rules:
        full = rule.capacity * rule.unit_ticks
        known = {
            "b": [(level, 0, 0) for level in (2 * full - 1, full, 1, 0, -1, -(2**52), -(2**53 - 1))],
            "s": [(4 * 10**9, 1, 0), (1, rule.window_us + rule.window_us // 8 + rule.slot_us, 2**53 - 1), (rule.capacity, 1, 0)],
            "f": [(4 * 10**9, 0, 0), (1, rule.window_us - 1, 0), (1, 2**53 - 1, 0), (1, -rule.window_us, 0)],
            "c": [(4 * 10**9, 0, 4 * 10**9), (1, 2 * rule.window_us - 1, 1), (0, 2**53 - 1, 1), (1, -rule.window_us, 1)],
        }[rule.kind]
        ages = [(0, units) for units in (1, full)] if rule.kind == "b" else [(0, 4 * 10**9), (2**53 - 1, 1), (rule.window_us, 1)]
        server = ClockedServer(redis_client, NOW_US)
        for costs in ((1, rule.capacity), (rule.capacity,)):
            for place, numbers in enumerate(known):
                granted = [server.check(NOW_US + place, rule, cost)[0] for cost in costs]
                assert sum(granted) <= 1 + (rule.capacity > 1)
                assert server.tell(NOW_US + place, rule, numbers) == 1, (rule, numbers)
            for place, charge in enumerate(ages):
                assert server.charge(NOW_US + 9, rule, f"{costs}{place}", *charge) == 1, (rule, charge)
            answer = server.check(NOW_US + 10, rule, 1, mode="peek")
            assert answer[0] in (0, 1)
            assert all(-rule.window_us <= number < 2**53 for number in answer)
            server.run("reset", ["k"], NOW_US + 10, server.epoch, 0)
            assert server.check(NOW_US + 11, rule, rule.capacity)[0] == 1
            redis_client.delete("k")


def test_each_item_of_an_assertion_is_refused_alone(redis_client: redis.Redis) -> None:
    rule = make_rule("token_bucket", 10, MINUTE_US).compiled
    server = ClockedServer(redis_client, NOW_US)
    words = [getattr(rule, word) for word in script("repair").header["rule"]]
    strange = [*words[:1], 0, *words[2:]]
    known = 4 * rule.unit_ticks
    items = [
        number
        for place, which, ticks in ((1, 1, known), (2, 1, 2**53), (3, 2, known), (4, 1, known))
        for number in (place, which, 0, ticks, 0, 0, 0)
    ]
    told = server.run("repair", ["a", "b", "c", "d"], NOW_US, "assert", server.epoch, 2, 4, *words, *strange, *items, "p", 0, 1)
    assert told == [NOW_US, 2, 2, 1, 3, 1]
    assert [bool(redis_client.exists(key)) for key in "abcd"] == [True, False, False, True]
    charges = (1, 1, 0, 1, 0, known, 2, 1, 0, 1, 0, 2**52 + 1, 3, 2, 0, 1, 0, known, 4, 1, 0, 3, 0, 1, 0, 1, 0, 1)
    told = server.run("repair", ["a", "b", "c", "d", "m"], NOW_US, "charge", server.epoch, 2, 4, *words, *strange, *charges)
    assert told == [NOW_US, 1, 2, 1, 3, 1, 4, 1]


def test_an_assertion_ends_where_it_has_worked_enough_and_goes_on_from_there(redis_client: redis.Redis) -> None:
    rule = make_rule("sliding_window", 64, MINUTE_US).compiled
    server = ClockedServer(redis_client, NOW_US)
    words = [getattr(rule, word) for word in script("repair").header["rule"]]
    keys, aged = [f"key:{number}" for number in range(120)], [(1_000 * age, 1) for age in range(40, 0, -1)]
    told = [word for row in range(len(keys)) for word in (row + 1, 1, 0, 50, 30_000_000, 0, 0)]

    def tell(first: int) -> list[int]:
        items = (*words, *told, "p", 0, first)
        return server.run("repair", keys, NOW_US, "assert", server.epoch, 1, len(keys), *items)[1:]

    assert tell(1) == [120], "nothing is stored: all are taken in at once"
    assert tell(121) == [0]
    redis_client.delete(*keys)
    for key in keys:
        charges = [number for charge in aged for number in charge]
        charge = ("charge", server.epoch, 1, 1, *words, 1, 1, 1_000, len(aged), *charges)
        assert server.run("repair", [key, f"charged:{key}"], NOW_US, *charge) == [NOW_US, 1]
    first, rounds, applied = 1, 0, 0
    while first:
        count, *deferred = tell(first)
        assert count == (deferred[0] if deferred else len(keys) + 1) - first
        assert deferred == [] or (first < deferred[0], *deferred[1:]) == (True, 3)
        first, rounds, applied = deferred[0] if deferred else 0, rounds + 1, applied + count
    assert (applied, rounds > 5) == (120, True)
    for key in keys:
        call = make_call([(rule, key, 1)], "peek")
        call.args[1] = server.epoch
        assert call.answers(server.decide.send(redis_client, NOW_US, call))[0][1] == 0


@pytest.mark.parametrize("strategy", ["token_bucket", "leaky_bucket"])
@pytest.mark.parametrize("processes", [1, 3, 4])
def test_what_a_bucket_is_charged_in_parts_is_no_less_than_what_was_admitted(
    redis_client: redis.Redis, strategy: str, processes: int
) -> None:
    for seed in range(12):
        rng = random.Random(f"{seed} {strategy} {processes}")
        rule = make_rule(strategy, 40, 8_000_000, rng.choice((20, 40, 80))).compiled
        server, now_us, calls = ClockedServer(redis_client, NOW_US), NOW_US, 0
        shares, admitted = [shares_of(processes, rank) for rank in range(processes)], []
        eager = [rng.choice((0.05, 0.5, 1.0)) for _ in shares]
        for turn in range(80):
            now_us += rng.randrange(400_000)
            for number, share in enumerate(shares):
                asked = rng.randrange(8) if rng.random() < eager[number] else 0
                admitted += [now_us for _ in range(asked) if share._decide(rule, "k", "=", now_us, 1)[0]]
                # Redis is there for a moment, time and again, and at last for good.
                if rng.random() < 0.1 or turn == 79:
                    for *_, ages in share.take_owed(1, now_us):
                        calls += 1
                        server.charge(now_us, rule, str(calls), *(number for charge in ages for number in charge))
        rate = Fraction(rule.limit, rule.window_us)
        owed = max((len(admitted) - place - rate * (now_us - at_us) for place, at_us in enumerate(admitted)), default=0)
        assert server.left(now_us, rule) <= max(0, rule.capacity - owed), f"seed {seed}"


def test_a_bucket_is_charged_for_what_came_after_the_clock_stepped_back() -> None:
    shares, rule = shares_of(2), make_rule("token_bucket", 100, 10_000_000, 100).compiled
    taken = 0
    for at_us in (NOW_US, NOW_US - 3_000_000, NOW_US - 2_500_000):
        admitted = sum(shares._decide(rule, "k", "=", at_us, 1)[0] for _ in range(20))
        [(*_, ages)] = shares.take_owed(1, at_us)
        new = sum(ticks for age, ticks in ages if age == 0)
        assert new >= admitted * rule.unit_ticks
        taken += new
    assert taken >= 45 * rule.unit_ticks
