"""What a process admits on its own while Redis is away, and what it owes afterwards, held against the promises."""

from __future__ import annotations

import pickle
import random
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from math import ceil
from typing import Any

import pytest
from hypothesis import assume, example, given, note
from hypothesis import strategies as st

from ratethrottle import ConfigurationError, RateThrottleRule
from ratethrottle._engine.definitions import CompiledRule
from ratethrottle._engine.keys import KeyTable
from ratethrottle.storage._shared.keynames import KeyNames
from ratethrottle.storage._shared.outage import Shares
from ratethrottle.testing import intervals
from tests.kit.oracle import Account, Answer, Oracle, window_start
from tests.kit.shares import shares_of
from tests.kit.strategies import START_US, STRATEGIES, known_rules, make_rule, random_step, rules, seeds

Known = tuple[CompiledRule, list[int], int, int]  # rule, answer, cost, when it was asked
RETRY_US = 345_678  # what a denial says that no waiting ends
AHEAD_US = 77_123_456_789  # of the clock in which `known` is kept


def part(units: int, n: int, rank: int) -> int:
    """How many of `units` are this process's."""
    return len(range(rank, units, n))


def share_of(rule: RateThrottleRule, n: int, rank: int) -> RateThrottleRule | None:
    """The rule that one process runs; None if it has no units of it, or if it would be refused as a rule of its own."""
    limit, burst = part(rule.limit, n, rank), part(rule.capacity, n, rank)
    if limit == 0 or burst == 0:
        return None
    try:
        return make_rule(rule.strategy, limit, rule.window_us, burst)
    except ConfigurationError:
        return None


def taken(shares: Shares, now_us: int, most: int = 7) -> dict[Any, list[tuple[int, int]]]:
    """All that is owed, by what stands of a key's name behind its mark."""
    found: dict[Any, list[tuple[int, int]]] = {}
    while shares.owing:
        items = shares.take_owed(most, now_us)
        assert len(items) <= most
        found |= {name.rpartition(b"=")[2].decode(): ages for _, name, _, _, ages in items}
    return found


def answer_of(store: Oracle, rule: CompiledRule, now_us: int) -> list[int]:
    """What the script would answer to a peek of one unit, in `take_answer`'s order."""
    allowed, _, retry_us, reset_us = store.check(rule, now_us, 1, consume=False)
    account = store.accounts[0]
    if rule.kind == "b":
        return [0, int(account.held(rule)(now_us) * rule.unit_ticks)]
    counts = Counter[int]()
    for at, units in account.living(now_us):
        counts[at if rule.kind == "s" else window_start(rule.window_us, at)] += int(units)
    start = window_start(rule.window_us, now_us)
    if rule.kind == "f":
        return [0, counts[start], now_us - start]
    if rule.kind == "c":
        return [0, counts[start], counts[start - rule.window_us], now_us - start]
    first = min(counts) + rule.window_us - now_us if counts else 0
    return [int(allowed), counts.total(), first, reset_us, *([] if allowed else [retry_us])]


def started(share: CompiledRule, known: Known | None, n: int, now_us: int, capacity: int) -> Oracle:
    """An oracle of the share that begins with a part of what an answer of just now says of the store."""
    oracle, account = Oracle(), Account(share, [], now_us)
    oracle.accounts = [account]
    if known is None:
        return oracle
    rule, answer, cost, _ = known
    log: list[tuple[int, int]] = []
    if rule.kind == "s":
        # The last unit leaves last; while a check was refused, as many as made it so stay; the others may go with the first.
        _, held, first_us, reset_us, *refused = answer
        retry_us = refused[0] if refused else 0
        last = min(1, held - 1) if held else 0
        staying = min(held - last, rule.capacity - cost + 1 - last) if retry_us > 0 else 0
        ends = ((first_us, held - staying - last), (retry_us, staying), (reset_us, last))
        log = [(now_us + end_us - rule.window_us, units) for end_us, units in ends if units]
    elif rule.kind != "b":
        log = [(now_us - answer[-1] - rule.window_us, answer[2] if rule.kind == "c" else 0), (now_us - answer[-1], answer[1])]
    if rule.kind == "b" == share.kind:
        # An nth of the room that there is, in ticks.
        room = (capacity * share.unit_ticks - ceil(Fraction(answer[1] * share.unit_ticks, rule.unit_ticks))) // n
        account.add(now_us, Fraction(max(0, share.capacity * share.unit_ticks - room), share.unit_ticks))
    elif rule.kind == share.kind == "s":
        for at, units in parts(log, n):
            account.add(-(-at // share.slot_us) * share.slot_us, units)
    else:
        for at, units in log:
            account.add(at, -(-units // n))
    return oracle


def parts(log: list[tuple[int, int]], n: int) -> list[tuple[int, int]]:
    """An nth of each entry, so that at no time less than an nth is left, rounded up."""
    lefts = [sum(units for _, units in log[i:]) for i in range(len(log) + 1)]
    return [(at, -(-lefts[i] // n) - -(-lefts[i + 1] // n)) for i, (at, _) in enumerate(log)]


def random_known(rng: random.Random, rule: CompiledRule, now_us: int) -> Known:
    """Any answer that a store might give at `now_us`, but for `granted`, which is only looked at in sliding windows."""
    used, into_us = (
        rng.choice((0, 1, rule.capacity, rng.randint(0, rule.capacity))),
        now_us - window_start(rule.window_us, now_us),
    )
    if rule.kind == "b":
        answer = [0, rng.randint(0, rule.capacity * rule.unit_ticks)]
    elif rule.kind == "f":
        answer = [0, used, into_us]
    elif rule.kind == "c":
        answer = [0, used, rng.randint(0, rule.capacity), into_us]
    else:
        slots = [rng.randrange((now_us - rule.window_us) // rule.slot_us + 1, now_us // rule.slot_us + 1) for _ in range(3)]
        first, retry, reset = (at * rule.slot_us + rule.window_us - now_us for at in sorted(slots))
        answer = [1, used, first, reset if used > 1 else first] if used else [1, 0, 0, 0]
        answer = [0, *answer[1:], retry] if used == rule.capacity else answer
    return rule, answer, 1, now_us - AHEAD_US


class Process:
    """One process's shares, with a key."""

    def __init__(self, n: int, rank: int) -> None:
        self.shares = shares_of(n, rank)

    def check(self, rule: CompiledRule, now_us: int, cost: int, *, known: Known | None = None, **options: Any) -> Answer:
        return self.shares._decide(
            rule, "key", "=", now_us, cost, known=known, known_now_us=now_us - AHEAD_US, retry_us=RETRY_US, **options
        )


def used_store(
    rng: random.Random, rule: RateThrottleRule, now_us: int, admissions: int
) -> tuple[Oracle, list[tuple[int, int]], int]:
    """A store in which a few units were used, what was admitted, and what time it is."""
    store, log = Oracle(), []
    for _ in range(admissions):
        now_us += rng.randrange(max(2, rule.window_us // 4))
        cost = rng.randint(1, rule.capacity)
        if store.check(rule.compiled, now_us, cost)[0]:
            log.append((now_us, cost))
    return store, log, now_us


def known_of(store: Oracle, rule: RateThrottleRule, now_us: int) -> Known | None:
    return (rule.compiled, answer_of(store, rule.compiled, now_us), 1, now_us - AHEAD_US) if store.accounts else None


@given(rule=rules, n=st.integers(1, 300))
def test_the_shares_of_all_ranks_come_to_exactly_the_limit(rule: RateThrottleRule, n: int) -> None:
    assume(rule.limit >= n and rule.capacity >= n)
    left = [Process(n, rank).check(rule.compiled, START_US, 1, consume=False)[1] for rank in range(n)]
    assert sum(left) == rule.capacity
    assert max(left) - min(left) <= 1
    assert left == sorted(left, reverse=True)


@given(rule=rules, n=st.sampled_from((1, 2, 3, 7, 50, 1000)), seed=seeds)
def test_a_share_decides_as_the_oracle_of_a_smaller_rule(rule: RateThrottleRule, n: int, seed: int) -> None:
    note(f"seed {seed}")
    rng = random.Random(seed)
    rank, now_us = rng.randrange(n), START_US + rng.randrange(10**12)
    share = share_of(rule, n, rank)
    assume(share is not None)
    assert share is not None
    known = random_known(rng, rule.compiled, now_us) if rng.random() < 0.8 else None
    process, oracle = Process(n, rank), started(share.compiled, known, n, now_us, rule.capacity)
    for _ in range(60):
        step = random_step(rng, share)
        now_us += step.advance_us if len(process.shares) else 0  # until it has an account, it begins from what is known
        got = process.check(rule.compiled, now_us, step.cost, known=known, consume=step.consume)
        assert got == oracle.check(share.compiled, now_us, step.cost, consume=step.consume), f"{rule} {n} {rank} {seed}"


@given(rule=rules, n=st.sampled_from((2, 3, 7, 50)), seed=seeds)
def test_a_key_meets_what_is_known_once_an_outage_and_is_charged_up_to_its_part(
    rule: RateThrottleRule, n: int, seed: int
) -> None:
    note(f"seed {seed}")
    rng = random.Random(seed)
    rank, now_us = rng.randrange(n), START_US + rng.randrange(10**12)
    share = share_of(rule, n, rank)
    assume(share is not None)
    assert share is not None
    first, second = (random_known(rng, rule.compiled, now_us) for _ in range(2))
    both, one, other = Process(n, rank), Process(n, rank), Process(n, rank)

    def free(process: Process, known: Known | None, at_us: int) -> int:
        return process.check(rule.compiled, at_us, 1, known=known, consume=False)[1]

    if not both.check(rule.compiled, now_us, 1, known=first)[0]:
        return
    one.check(rule.compiled, now_us, 1, known=first)
    assert free(both, second, now_us) == free(one, first, now_us)
    both.shares.begin()
    either = min(free(one, first, now_us), free(other, second, now_us))
    found = free(both, second, now_us)
    # A counter takes the larger of each of its two counts, which may be more than either pair is.
    assert found == either if rule.compiled.kind != "c" else found <= either
    assert free(both, None, now_us) == free(one, first, now_us)


def rulers(rule: RateThrottleRule, n: int, cut: range) -> RateThrottleRule:
    """The rule whose promise the store and the processes that are cut off keep together."""
    limit = rule.limit + sum(part(rule.limit, n, rank) for rank in cut)
    burst = rule.capacity + sum(part(rule.capacity, n, rank) for rank in cut)
    return make_rule(rule.strategy, limit, rule.window_us, burst)


SMALL = st.builds(
    make_rule,
    st.sampled_from(STRATEGIES),
    st.sampled_from((4, 10, 60, 100, 1000)),
    st.sampled_from((10_000, 1_000_000)),
    st.sampled_from((4, 30, 1000)),
)


@given(rule=SMALL, n=st.integers(1, 6), seed=seeds, data=st.data())
def test_no_interval_holds_more_than_the_limit_and_the_shares_of_those_cut_off(
    rule: RateThrottleRule, n: int, seed: int, data: st.DataObject
) -> None:
    note(f"seed {seed}")
    rng = random.Random(seed)
    cut = range(data.draw(st.integers(1, n)))
    store, log, now_us = used_store(rng, rule, START_US, 20)
    known = known_of(store, rule, now_us)
    processes = [Process(n, rank) for rank in cut]
    own: list[list[tuple[int, int]]] = [[] for _ in cut]
    for _ in range(200):
        now_us += rng.choice((0, 1, rng.randrange(max(2, rule.window_us // 20)), rng.randrange(rule.window_us)))
        rank = rng.randrange(len(cut) + 1)
        cost = rng.choice((1, 1, 2, max(1, rule.capacity // n // 2), max(1, rule.capacity // n)))
        if rank == len(cut):
            if store.check(rule.compiled, now_us, cost)[0]:
                log.append((now_us, cost))
        elif processes[rank].check(rule.compiled, now_us, cost, known=known)[0]:
            log.append((now_us, cost))
            own[rank].append((now_us, cost))
    intervals.check(rulers(rule, n, cut), log)
    for rank in cut:
        share = share_of(rule, n, rank)
        assert share is not None or not own[rank]
        if share is not None:
            intervals.check(share, own[rank])


@given(rule=SMALL, n=st.integers(1, 6), seed=seeds)
@example(rule=make_rule("token_bucket", 4, 1_000_000, 30), n=3, seed=131)  # the rate of a share is above or below a third
@example(rule=make_rule("token_bucket", 16, 10_000_000, 10), n=3, seed=1227)  # and so is its capacity
def test_all_processes_cut_off_together_admit_what_the_rule_allows_and_no_more(rule: RateThrottleRule, n: int, seed: int) -> None:
    note(f"seed {seed}")
    rng = random.Random(seed)
    store, log, now_us = used_store(rng, rule, START_US, 1 if rule.compiled.kind == "s" else 20)
    # Of one admission an answer tells all but its last unit apart; of a unit, everything.
    known = known_of(store, rule, now_us)
    processes = [Process(n, rank) for rank in range(n)]
    for _ in range(200):
        now_us += rng.choice((0, 1, rng.randrange(max(2, rule.window_us // 20)), rng.randrange(rule.window_us)))
        cost = rng.choice((1, 1, 2, max(1, rule.capacity // n // 2), max(1, rule.capacity // n)))
        if rng.choice(processes).check(rule.compiled, now_us, cost, known=known)[0]:
            log.append((now_us, cost))
    intervals.check(rule, log)


@given(rule=rules, n=st.sampled_from((1, 2, 3, 7)), seed=seeds)
def test_what_is_owed_is_what_was_admitted_and_not_taken(rule: RateThrottleRule, n: int, seed: int) -> None:
    note(f"seed {seed}")
    rng = random.Random(seed)
    rank, now_us = rng.randrange(n), START_US + rng.randrange(10**12)
    share = share_of(rule, n, rank)
    assume(share is not None)
    assert share is not None
    process = Process(n, rank)
    log: list[tuple[int, int]] = []
    before = 0, now_us  # how much of a bucket's log was taken, and when
    for _ in range(rng.randrange(200)):
        step = random_step(rng, share, backwards=False)
        now_us += step.advance_us
        if process.check(rule.compiled, now_us, step.cost, consume=step.consume)[0] and step.consume:
            log.append((now_us, step.cost))
        if rng.random() < 0.03:
            check_owed(rule, share, log, taken(process.shares, now_us).get("key", []), now_us, before)
            if rule.compiled.kind != "b":
                log.clear()
            elif len(log) > before[0]:
                before = len(log), now_us
    now_us += rng.randrange(max(2, rule.window_us // 3))
    check_owed(rule, share, log, taken(process.shares, now_us).get("key", []), now_us, before)
    assert taken(process.shares, now_us) == {}


def level_of(share: RateThrottleRule, log: list[tuple[int, int]], now_us: int) -> Fraction:
    """What a bucket holds that drains by the share's rate, in units."""
    level, before_us = Fraction(0), now_us
    for at, units in [*log, (now_us, 0)]:
        level = max(Fraction(0), level - Fraction((at - before_us) * share.limit, share.window_us)) if level else level
        level, before_us = level + units, at
    return level


def check_owed(
    rule: RateThrottleRule,
    share: RateThrottleRule,
    log: list[tuple[int, int]],
    owed: list[tuple[int, int]],
    now_us: int,
    before: tuple[int, int],
) -> None:
    """Hold what was taken against what was admitted since the last time; of a bucket, the log goes on, and some was taken `before`."""
    window, slot = rule.window_us, rule.compiled.slot_us
    assert all(age >= 0 and units > 0 for age, units in owed)
    if rule.compiled.kind == "b":
        unit, (count, taken_us) = rule.compiled.unit_ticks, before
        level = level_of(share, log, now_us)
        held = level_of(share, log[:count], taken_us)
        part = max(Fraction(0), held - Fraction((now_us - taken_us) * share.limit, window))
        least = max(Fraction(0), held - Fraction((now_us - taken_us) * rule.limit, window))
        new, again = (sum(ticks for age, ticks in owed if (age == 0) == is_new) for is_new in (True, False))
        newest_us = log[max(0, count - 1)][0] if log else 0
        assert [age for age, _ in owed] in ([], [0], [now_us - newest_us, 0])
        if len(log) > count:
            # A rate that had to be rounded down, for the ticks of the whole rule's capacity, lets a little more stand, which is taken then.
            assert (level - least) * unit <= (new + again) * (1 + Fraction(1, 10**9)) + 1, (
                "all of it together is never too little"
            )
            slack = unit * (level + held) * Fraction(1, 10**6) + unit * Fraction(1, 1000) + 1
            for ticks, exact in ((new, level - part), (again, part - least)):
                assert ticks <= rule.capacity * unit
                assert abs(ticks - exact * unit) <= slack
        return
    found, expected = Counter[int](), Counter[int]()
    for at, units in log:
        if rule.compiled.kind != "s":
            expected[window_start(window, at)] += units
        elif slot == 1:
            expected[at] += units
        else:
            expected[at // slot] += units
    for age, units in owed:
        at = now_us - age
        found[window_start(window, at) if rule.compiled.kind != "s" else at // slot if slot > 1 else at] += units
    if rule.compiled.kind == "s":
        live = {k: v for k, v in expected.items() if ((k + 1) * slot if slot > 1 else k) + window > now_us}
    else:
        live = {k: v for k, v in expected.items() if k >= window_start(window, now_us) - window}
    assert found == live


@given(seed=seeds)
def test_a_rule_or_a_share_that_changes_is_never_a_refill_and_keeps_what_is_owed(seed: int) -> None:
    note(f"seed {seed}")
    rng = random.Random(seed)
    process, oracle, now_us, admitted = Process(1, 0), Oracle(), START_US + rng.randrange(10**12), 0
    for _ in range(60):
        rule, n = rng.choice(known_rules()), rng.choice((1, 2, 3, 10))
        share = share_of(rule, n, 0)
        if share is None:
            continue
        process.shares.set_share(n, 0)
        for _ in range(rng.randrange(8)):
            step = random_step(rng, share, backwards=False)
            now_us += step.advance_us
            got = process.check(rule.compiled, now_us, step.cost, consume=step.consume)
            assert got == oracle.check(share.compiled, now_us, step.cost, consume=step.consume), f"seed {seed}"
            del oracle.accounts[1:]  # a process has one account of a key: its rules don't take turns
            admitted += got[0] and step.consume
    owed = taken(process.shares, now_us)
    assert set(owed) <= {"key"}
    assert admitted or not owed


def test_a_changed_rule_is_owed_all_that_was_admitted_before() -> None:
    process, exact = Process(2, 0), RateThrottleRule("rule", 60, 10)
    for second in range(3):
        assert process.check(exact.compiled, START_US + second * 10**6, 10)[0]
    now_us = START_US + 3 * 10**6
    slots = replace(exact, limit=1000)
    assert process.check(slots.compiled, now_us, 1)[:2] == (True, 500 - 31)
    assert sum(units for _, units in taken(process.shares, now_us)["key"]) == 31
    assert process.check(slots.compiled, now_us, 1)[:2] == (True, 500 - 32)
    bucket = replace(exact, strategy="token_bucket")
    assert process.check(bucket.compiled, now_us, 1)[:2] == (False, 0)
    assert taken(process.shares, now_us)["key"] == [(0, bucket.compiled.unit_ticks)]


def test_a_second_outage_right_after_grants_no_second_share() -> None:
    process, rule = Process(4, 1), RateThrottleRule("rule", 40, 60).compiled
    assert [process.check(rule, START_US, 5)[:2] for _ in range(3)] == [(True, 5), (True, 0), (False, 0)]
    assert taken(process.shares, START_US + 1000) == {"key": [(1000, 10)]}
    process.shares.begin()
    assert process.check(rule, START_US + 1000, 1)[:3] == (False, 0, 60 * 10**6 - 1000)
    assert taken(process.shares, START_US + 1000) == {}
    assert process.check(rule, START_US + 60 * 10**6, 10)[:2] == (True, 0)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_without_a_share_and_above_it_a_check_is_denied_until_the_next_attempt(strategy: str) -> None:
    rule = make_rule(strategy, 10, 60_000_000, 10).compiled
    denied = (False, 0, RETRY_US, RETRY_US)
    assert Process(11, 10).check(rule, START_US, 1) == denied
    process = Process(4, 2)
    assert process.check(rule, START_US, 3) == (False, 2, RETRY_US, 0)
    assert process.check(rule, START_US, 2)[:2] == (True, 0)
    allowed, remaining, retry_us, _ = process.check(rule, START_US, 1)
    assert (allowed, remaining) == (False, 0)
    assert 0 < retry_us != RETRY_US
    process.shares.set_share(0, 0)
    assert process.check(rule, START_US, 1) == denied
    assert shares_of(0)._decide(rule, "key", "=", START_US, 1, retry_us=RETRY_US) == denied


def test_a_bucket_with_a_burst_but_no_rate_to_share_is_denied() -> None:
    rule = RateThrottleRule("rule", 1, 60, strategy="token_bucket", burst=10).compiled
    assert Process(2, 1).check(rule, START_US, 1)[:2] == (False, 0)
    assert Process(2, 0).check(rule, START_US, 1)[:2] == (True, 4)


def test_a_rate_that_no_rule_of_its_own_could_have_is_rounded_down() -> None:
    rule = RateThrottleRule("rule", 10**9, 86_400, strategy="token_bucket")
    assert share_of(rule, 3, 0) is None
    process = Process(3, 0)
    allowed, remaining, _, reset_us = process.check(rule.compiled, START_US, 333_333_334)
    assert (allowed, remaining) == (True, 0)
    assert 86_400 * 10**6 <= reset_us <= 86_400 * 10**6 * (1 + Fraction(1, 10**6))
    assert sum(Process(3, rank).check(rule.compiled, START_US, 1, consume=False)[1] for rank in range(3)) == 10**9


@given(rule=rules, seed=seeds)
@example(rule=RateThrottleRule("rule", 10**9, 86_400), seed=160)  # more than can be counted, of which the oldest has left
def test_allow_admits_everything_and_owes_it_up_to_what_can_be_counted(rule: RateThrottleRule, seed: int) -> None:
    note(f"seed {seed}")
    rng, shares, now_us, log = random.Random(seed), shares_of(0), START_US, Counter[int]()
    compiled, window = rule.compiled, rule.window_us
    for _ in range(100):
        now_us += rng.randrange(max(2, window // 20))
        cost = rng.randint(1, rule.capacity)
        allowed, remaining, retry_us, _ = shares._decide(compiled, "key", "=", now_us, cost, everything=True)
        assert (allowed, retry_us) == (True, 0)
        assert 0 <= remaining <= rule.capacity - (cost if compiled.kind != "c" else 0)
        log[now_us] += cost
    owed = taken(shares, now_us)["key"]
    units = sum(units for _, units in owed)
    if compiled.kind == "b":
        assert owed == [(0, min(rule.capacity, log.total()) * compiled.unit_ticks)]
    elif compiled.kind == "s":
        live = sum(
            u for at, u in log.items() if (at // compiled.slot_us + (compiled.slot_us > 1)) * compiled.slot_us + window > now_us
        )
        assert units == min(live, 65) if compiled.slot_us == 1 else units == min(live, 4 * 10**9)
    else:
        since_us = window_start(window, now_us) - window
        counts = Counter[int]()
        for at, u in log.items():
            counts[window_start(window, at)] += u
        assert units == sum(min(4 * 10**9, counts[at]) for at in (since_us, since_us + window))


def test_what_is_admitted_under_allow_is_seen_by_the_share_that_comes_after() -> None:
    shares, rule = shares_of(2), RateThrottleRule("rule", 10, 60).compiled
    assert shares._decide(rule, "key", "=", START_US, 4, everything=True)[:2] == (True, 6)
    assert shares._decide(rule, "key", "=", START_US, 1)[:2] == (True, 0)
    assert taken(shares, START_US) == {"key": [(0, 5)]}


def test_what_is_known_counts_the_less_the_older_it_is() -> None:
    rule = RateThrottleRule("rule", 10, 10, strategy="token_bucket").compiled
    known: Known = (rule, [0, 10 * rule.unit_ticks], 1, 5_000_000)
    for age_s, left in ((0, 0), (1, 0), (2, 1), (5, 2), (10, 5), (100, 5)):
        at = 5_000_000 + age_s * 1_000_000 * 64 // 63 + 1  # a 64th of it may be how much faster this clock is
        found = shares_of(2)._decide(rule, "key", "=", START_US, 1, known=known, known_now_us=at, consume=False)
        assert found[1] == left


@pytest.mark.parametrize(("into_us", "left"), [(0, 2), (1, 2), (999_999, 2), (-1, 2), (-400_000, 2), (-600_000, 5)])
def test_a_window_known_by_a_clock_that_is_a_little_off_is_the_nearest_one(into_us: int, left: int) -> None:
    rule = RateThrottleRule("rule", 10, 1, strategy="fixed_window").compiled
    assert START_US % 10**6 == 0
    # The store said how far into its window it was; here it is a quarter of a window.
    known: Known = (rule, [0, 6, 250_000 - into_us], 1, 0)
    found = shares_of(2)._decide(rule, "key", "=", START_US + 250_000, 1, known=known, known_now_us=0, consume=False)
    assert found[1] == left


def table_of(max_keys: int, n: int = 1) -> tuple[Shares, KeyTable]:
    bounds = KeyTable(max_keys, bounds=True)
    shares = Shares(bounds, KeyNames(b"p", 64))
    shares.set_share(n, 0)
    return shares, bounds


@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_full_table_denies_nobody_for_it_and_counts_what_it_forgets(strategy: str, everything: bool) -> None:
    (shares, bounds), rule = table_of(20), make_rule(strategy, 5, 1_000_000, 5).compiled
    for key in range(1000):
        assert shares._decide(rule, f"key {key}", "=", START_US, 1, everything=everything)[0]
        assert len(shares) == len(bounds) == shares.owing == min(key + 1, 20)
    assert bounds.evictions == 980
    assert sum(units for ages in taken(shares, START_US).values() for _, units in ages) == 20 * max(1, rule.unit_ticks)
    assert (len(shares), shares.owing) == (20, 0)


def test_what_has_used_most_outlives_a_flood_of_keys() -> None:
    (shares, _), rule = table_of(100), make_rule("fixed_window", 5, 1_000_000, 5).compiled
    assert shares._decide(rule, "busy", "=", START_US, 5)[0]
    for key in range(1000):
        assert shares._decide(rule, f"key {key}", "=", START_US, 1)[0]
    assert not shares._decide(rule, "busy", "=", START_US, 1)[0]
    assert taken(shares, START_US)["busy"] == [(0, 5)]


def test_what_is_over_makes_room_before_anything_is_forgotten() -> None:
    (shares, bounds), rule = table_of(2000), RateThrottleRule("rule", 5, 1).compiled
    for second in range(5):
        for key in range(2000):
            assert shares._decide(rule, f"key {second} {key}", "=", START_US + second * 10**7, 1)[0]
    assert (len(bounds), bounds.evictions) == (2000, 0)


def test_a_larger_share_owes_a_larger_part_of_what_is_known() -> None:
    rule = RateThrottleRule("rule", 100, 60, strategy="fixed_window").compiled
    known: Known = (rule, [0, 60, 0], 1, 0)
    shares = shares_of(10)
    assert shares._decide(rule, "key", "=", START_US, 1, known=known, known_now_us=0)[:2] == (True, 3)
    shares.set_share(2, 0)
    assert shares._decide(rule, "key", "=", START_US, 1, known=known, known_now_us=0)[:2] == (True, 19)


def test_a_bucket_that_drained_owes_nothing_but_one_that_may_not_drain_does() -> None:
    rule = RateThrottleRule("rule", 5, 1, strategy="token_bucket").compiled
    shares = shares_of(1)
    shares._decide(rule, "local", "=", START_US, 5)
    shares._decide(rule, "allow", "=", START_US, 5, everything=True)
    shares.sweep(START_US + 10**7)
    assert (len(shares), shares.owing) == (1, 1)
    assert taken(shares, START_US + 10**7) == {"allow": [(0, 5 * rule.unit_ticks)]}
    shares.sweep(START_US + 10**7)
    assert len(shares) == 0


def test_peeks_and_denials_make_no_account() -> None:
    shares, rule = shares_of(1, max_keys=1), RateThrottleRule("rule", 5, 1).compiled
    assert shares._decide(rule, "key", "=", START_US, 1, consume=False) == (True, 5, 0, 0)
    assert not shares._decide(rule, "key", "=", START_US, 6)[0]
    assert (len(shares), shares.owing) == (0, 0)


def test_a_key_is_one_account_in_any_form_and_is_called_as_in_redis() -> None:
    class Text(str):
        __slots__ = ()

    shares, rule, other = shares_of(1), RateThrottleRule("rule", 5, 1).compiled, RateThrottleRule("other", 5, 1).compiled
    shares._decide(rule, "ключ", "=", START_US, 1, tag=3)
    shares._decide(rule, "=ключ".encode(), "=", START_US, 1, tag=3)
    shares._decide(rule, Text("ключ"), "=", START_US, 1, tag=3)
    shares._decide(rule, b"(i5 ", "(", START_US, 1, tag=4)
    shares._decide(rule, b"5" * 32, "#", START_US, 1, tag=5)
    shares._decide(other, "5" * 32, "=", START_US, 1, tag=5)
    assert len(shares) == 4
    found = shares.take_owed(10, START_US + 7)
    assert {(name, newest_us): ages for _, name, _, newest_us, ages in found} == {
        (b"p:{21}:rule:#" + b"5" * 32, 7): [(7, 1)],
        (b"p:{29}:rule:(i5 ", 7): [(7, 1)],
        ("p:{e8}:rule:=ключ".encode(), 7): [(7, 3)],
        (b"p:{21}:other:=" + b"5" * 32, 7): [(7, 1)],
    }
    assert {(item[0].kind, item[0].limit, item[0].window_us) for item in found} == {("s", 5, 1_000_000)}


def test_a_rule_that_was_pickled_is_the_same_to_an_account() -> None:
    shares, rule = shares_of(1), RateThrottleRule("rule", 5, 1, on_outage="local")
    twin = pickle.loads(pickle.dumps(rule))
    assert {rule.compiled: "found"}[twin.compiled] == "found"
    assert [shares._decide(each.compiled, "key", "=", START_US, 1)[1] for each in (rule, twin, rule)] == [4, 3, 2]
    assert len(shares) == 1


def test_a_child_forgets_what_its_parent_owes() -> None:
    shares, rule = shares_of(1), RateThrottleRule("rule", 5, 1).compiled
    shares._decide(rule, "key", "=", START_US, 5)
    shares.clear()
    assert (len(shares), shares.owing) == (0, 0)
    assert shares._decide(rule, "key", "=", START_US, 5)[0]


@pytest.mark.parametrize(("n", "rank"), [(0, 1), (2, 2), (-1, 0), (3, -1)])
def test_a_rank_is_one_of_those_there_are(n: int, rank: int) -> None:
    with pytest.raises(ValueError, match="rank is from 0"):
        shares_of(1).set_share(n, rank)


def test_accounts_come_and_go_in_any_order_and_none_is_lost() -> None:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    rng, rule = random.Random(seed), RateThrottleRule("rule", 3, 1).compiled
    shares, bounds = table_of(5000)
    now_us, owed = START_US, Counter[str]()
    for _ in range(30_000):
        now_us += rng.randrange(100)
        key, what = f"key {rng.randrange(4000)}", rng.random()
        if shares._decide(rule, key, "=", now_us, 1)[0]:
            owed[key] += 1
        if what < 0.001:
            shares.sweep(now_us)
        elif what < 0.02:
            for _, name, _, _, ages in shares.take_owed(rng.randrange(300), now_us):
                assert sum(units for _, units in ages) <= owed.pop(name.rpartition(b"=")[2].decode()), f"seed {seed}"
        assert shares.owing <= len(bounds) <= 4000
    late = now_us + 2 * 10**6
    shares.sweep(late)
    assert (len(shares), len(bounds), shares.owing, bounds.evictions) == (0, 0, 0, 0)
    assert bounds.size_bytes < 10_000


def test_what_is_known_of_a_slower_rule_has_drained_by_its_rate() -> None:
    slow, fast = make_rule("token_bucket", 10, 60_000_000, 100), make_rule("token_bucket", 1_000, 1_000_000, 100)
    known = (slow.compiled, [0, 100 * slow.compiled.unit_ticks], 1, START_US - AHEAD_US)
    # Half a minute later there is room for five.
    left = [Process(2, rank).check(fast.compiled, START_US + 30_000_000, 1, known=known, consume=False)[1] for rank in range(2)]
    assert left == [2, 2]
