"""Units taken ahead and given back, as docs/arithmetic.md has them under «Leases»."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import redis

from ratethrottle import RateThrottleRule
from ratethrottle._engine.definitions import CompiledRule
from tests.kit.clocked import ClockedScript, Lease, View, make_call, read_state
from tests.kit.strategies import START_US, STRATEGIES, make_rule

MINUTE_US = 60_000_000
NOW_US = START_US - START_US % MINUTE_US + 1_000_000


def leased(strategy: str, limit: int = 100, window: float = 60) -> CompiledRule:
    return RateThrottleRule("r", limit, window, strategy=strategy, lease=True).compiled


def entries(state: bytes | None, view: int = 0) -> dict[int, int]:
    """Units by where they count from, in the view at that place."""
    return dict((read_state(state) or [])[view + 1][1])


class Model:
    """One view of one rule, step by step as the page says it, in plain lists and integers."""

    def __init__(self, rule: CompiledRule) -> None:
        self.rule = rule
        self.seen_us = 0  # of a bucket; of the others the start of the window
        self.cur = self.prev = 0  # of a bucket: its level
        self.entries: list[list[int]] = []

    def slot(self, at_us: int) -> int:
        q = self.rule.slot_us
        return at_us if q <= 1 else (at_us // q + 1) * q

    def roll(self, now_us: int) -> bool:
        """Bring it to now; say whether the clock had stepped back."""
        rule, window_us = self.rule, self.rule.window_us
        if rule.kind == "s":
            head_us = self.slot(now_us + window_us // 8)
            ahead = sum(units for at, units in self.entries if at > head_us)
            held = sum(units for at, units in self.entries if at >= head_us)
            if ahead:
                self.entries = [entry for entry in self.entries if entry[0] < head_us] + [[head_us, held]]
            self.entries = [entry for entry in self.entries if entry[0] + window_us > now_us]
            return ahead > 0
        new_us = now_us if rule.kind == "b" else now_us - now_us % window_us
        if rule.kind != "b" and self.seen_us == new_us + window_us:
            return False  # the next window stands
        rebased, past_us, self.seen_us = self.seen_us > new_us, new_us - self.seen_us, new_us
        if rule.kind == "b":
            self.cur = max(0, self.cur - rule.drain_ticks * max(0, past_us))
        elif past_us > 0:
            self.cur, self.prev = 0, self.cur if past_us == window_us and rule.kind == "c" else 0
        return rebased

    def free(self, now_us: int) -> int:
        rule, cap = self.rule, self.rule.capacity
        if rule.kind == "b":
            return max(0, cap * rule.unit_ticks - self.cur) // rule.unit_ticks
        if rule.kind == "s":
            return cap - sum(units for _, units in self.entries)
        if rule.kind == "f":
            return cap - self.cur
        steps = -(-rule.window_us // rule.coarse_us)
        return max(0, (cap - self.cur) * steps - self.prev * (steps - max(0, now_us - self.seen_us) // rule.coarse_us)) // steps

    def charge(self, at_us: int, units: int) -> None:
        if self.rule.kind != "s":
            self.cur += units * (self.rule.unit_ticks or 1)
        elif self.entries and self.entries[-1][0] == at_us:
            self.entries[-1][1] += units
        elif units:
            self.entries.append([at_us, units])

    def back(self, now_us: int, units: int, back_us: int) -> bool:
        rule, before = self.rule, copy.deepcopy((self.cur, self.entries))
        if rule.kind == "b":
            self.cur -= min(self.cur, max(0, units * rule.unit_ticks - rule.drain_ticks * max(0, now_us - back_us)))
        elif rule.kind == "s":
            for entry in self.entries:
                if entry[0] == self.slot(back_us + rule.lead_us):
                    entry[1] -= min(entry[1], units)
            self.entries = [entry for entry in self.entries if entry[1]]
        elif back_us // rule.window_us == self.seen_us // rule.window_us:
            self.cur -= min(self.cur, units)
        return before != (self.cur, self.entries)

    def decide(self, now_us: int, lease: Lease) -> list[int]:
        """Answer in the script's numbers."""
        before, rule = copy.deepcopy(self), self.rule
        written = self.roll(now_us)
        written |= self.back(now_us, lease.back, lease.back_us)
        granted = min(lease.count, max(0, self.free(now_us)) // lease.cost)
        newest_us = self.entries[-1][0] if self.entries else 0
        self.charge(newest_us if newest_us > now_us else self.slot(now_us), granted * lease.cost)
        newest_us = self.entries[-1][0] if self.entries else 0
        ahead = min(lease.ahead, max(0, self.free(now_us)) // 8) if granted == lease.count else 0
        self.charge(max(newest_us, self.slot(now_us + rule.lead_us)), ahead)
        numbers = self.numbers(now_us, lease, granted)
        if not (written or granted or ahead):
            self.__dict__ = before.__dict__
        elif rule.kind in "cf" and not self.cur and not self.prev:
            self.seen_us = 0  # nothing is left of it
        return [granted, *numbers, ahead]

    def numbers(self, now_us: int, lease: Lease, granted: int) -> list[int]:
        rule = self.rule
        if rule.kind != "s":
            return {"b": [self.cur], "f": [self.cur, now_us - self.seen_us]}.get(
                rule.kind, [self.cur, self.prev, now_us - self.seen_us]
            )
        total = sum(units for _, units in self.entries)
        leaves = [at + rule.window_us - now_us for at, _ in self.entries] or [0]
        excess = total + lease.cost - rule.capacity
        if granted == lease.count:
            return [total, leaves[0], leaves[-1]]
        retry_us = (
            -1
            if lease.cost > rule.capacity
            else next(left for i, left in enumerate(leaves) if sum(units for _, units in self.entries[: i + 1]) >= excess)
        )
        return [total, leaves[0], leaves[-1], retry_us]

    def state(self) -> list[View] | None:
        """What the state holds, None if it is fresh."""
        rule = self.rule
        if rule.kind == "s":
            total = sum(units for _, units in self.entries)
            entries = [(at, units) for at, units in self.entries]
            return [("1", []), (f"s{rule.window_us},{rule.slot_us},{total}", entries)] if total else None
        if not self.cur and not self.prev:
            return None
        text = {
            "b": f"1;b{rule.unit_ticks},{rule.drain_ticks},{rule.capacity},{self.cur},{self.seen_us};",
            "f": f"1;f{rule.window_us},{self.seen_us},{self.cur};",
            "c": f"1;c{rule.window_us},{self.seen_us},{self.cur},{self.prev};",
        }[rule.kind]
        return read_state(text.encode())


@pytest.mark.parametrize("limit", [20, 64, 65, 5_000])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_random_leases_do_what_the_page_says(redis_client: redis.Redis, strategy: str, limit: int) -> None:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    rng, clocked, compiled = random.Random(seed), ClockedScript(redis_client), leased(strategy, limit, 2)
    model, now_us, taken = Model(compiled), NOW_US, [NOW_US]
    for _ in range(400):
        now_us += rng.choice(
            (0, 0, 1, 7, rng.randrange(100_000), rng.randrange(100_000), rng.randrange(500_000), -rng.randrange(250_000))
        )
        lease = Lease(
            compiled,
            "k",
            rng.choice((1, 1, 2, limit // 10, limit + 1)),
            rng.choice((0, 1, 1, 3, limit // 10)),
            rng.choice((0, 1, limit, limit // 12)),
            rng.choice((0, 1, 2, limit // 12, limit)),
            rng.choice((*taken[-5:], now_us, rng.randrange(2**53))),
        )
        numbers = clocked.lease(now_us, lease)
        assert numbers == model.decide(now_us, lease), (now_us, lease)
        assert read_state(clocked.state("k")) == model.state(), (now_us, lease)
        if numbers[-1]:
            taken.append(now_us)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_eighth_of_what_is_free_is_taken_ahead_at_most_and_nothing_once_one_was_refused(
    redis_client: redis.Redis, strategy: str
) -> None:
    clocked, compiled = ClockedScript(redis_client), leased(strategy)
    capacity = compiled.capacity
    assert clocked.lease(NOW_US, Lease(compiled, "k", count=4, ahead=3))[-1] == 3
    assert clocked.lease(NOW_US, Lease(compiled, "k", count=0, ahead=10**9))[-1] == (capacity - 7) // 8
    left = capacity - 7 - (capacity - 7) // 8
    assert clocked.call(NOW_US, [(compiled, "k", 1)], "peek")[0][1] == left
    before = clocked.state("k")
    numbers = clocked.lease(NOW_US, Lease(compiled, "k", cost=left + 1, count=1, ahead=5))
    assert (numbers[0], numbers[-1]) == (0, 0)
    assert clocked.state("k") == before
    numbers = clocked.lease(NOW_US, Lease(compiled, "k", count=left + 2, ahead=5))
    assert (numbers[0], numbers[-1]) == (left, 0)
    assert clocked.lease(NOW_US, Lease(compiled, "k", count=0, ahead=5))[-1] == 0


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_checks_granted_with_units_ahead_hear_what_was_left_before_them(redis_client: redis.Redis, strategy: str) -> None:
    clocked, compiled = ClockedScript(redis_client), leased(strategy)
    call = make_call([], leases=[Lease(compiled, "k", count=3, ahead=8)])
    heard = call.answers(clocked.send(redis_client, NOW_US, call))
    assert [answer[:3] for answer in heard] == [(True, compiled.capacity - i, 0) for i in (1, 2, 3)]
    assert clocked.call(NOW_US, [(compiled, "k", 1)], "peek")[0][1] == compiled.capacity - 11


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_peek_takes_nothing_ahead_and_gives_nothing_back(redis_client: redis.Redis, strategy: str) -> None:
    clocked, compiled = ClockedScript(redis_client), leased(strategy)
    clocked.lease(NOW_US, Lease(compiled, "k", count=5, ahead=5))
    before = clocked.state("k")
    numbers = clocked.lease(NOW_US, Lease(compiled, "k", count=5, ahead=5, back=5, back_us=NOW_US), "peek")
    assert (numbers[0], numbers[-1]) == (1, 0)
    assert clocked.state("k") == before


def test_a_bucket_gets_back_what_has_not_drained_since(redis_client: redis.Redis) -> None:
    clocked, compiled = ClockedScript(redis_client), RateThrottleRule("r", 60, 60, strategy="token_bucket", lease=True).compiled
    assert (compiled.unit_ticks, compiled.drain_ticks) == (1_000_000, 1)
    for later_us, left in (
        (2_000_000, 10_000_000),
        (0, 10_000_000),
        (-1_000_000, 10_000_000),
        (7_000_000, 8_000_000),
        (60_000_000, 0),
    ):
        clocked.forget("k")
        assert clocked.lease(NOW_US, Lease(compiled, "k", count=10, ahead=5)) == [10, 15_000_000, 5]
        before = clocked.state("k")
        assert clocked.lease(NOW_US + later_us, Lease(compiled, "k", count=0, back=5, back_us=NOW_US)) == [0, left, 0]
        assert (clocked.state("k") == before) == (later_us >= 7_000_000), "what gave nothing back was written"
    clocked.forget("k")
    assert clocked.lease(NOW_US, Lease(compiled, "k", count=0, back=10**9, back_us=NOW_US)) == [0, 0, 0]
    assert clocked.state("k") is None


def test_nothing_comes_back_of_what_has_long_drained_from_a_bucket_however_much_it_is(redis_client: redis.Redis) -> None:
    clocked = ClockedScript(redis_client)
    compiled = RateThrottleRule("r", 7, 366 * 86_400, strategy="token_bucket", burst=50, lease=True).compiled
    numbers = clocked.lease(NOW_US, Lease(compiled, "k", count=5))
    assert numbers[1] == 5 * compiled.unit_ticks
    assert clocked.lease(NOW_US, Lease(compiled, "k", count=0, back=10**9, back_us=0))[1] == numbers[1]


def test_a_sliding_window_gets_back_from_the_very_entry(redis_client: redis.Redis) -> None:
    clocked, compiled = ClockedScript(redis_client), leased("sliding_window")
    lead_us, entry_us = compiled.lead_us, (NOW_US + compiled.lead_us) // compiled.slot_us * compiled.slot_us + compiled.slot_us
    assert lead_us == 100_000
    clocked.lease(NOW_US, Lease(compiled, "k", count=4, ahead=6))
    clocked.lease(NOW_US + 5_000_000, Lease(compiled, "k", count=2))
    before = clocked.state("k")
    gone = Lease(compiled, "k", count=0, back=3, back_us=NOW_US + 10_000_000)
    assert clocked.lease(NOW_US + 5_000_000, gone)[:2] == [0, 12]
    assert clocked.state("k") == before, "there is no such entry"
    given = Lease(compiled, "k", count=0, back=3, back_us=NOW_US)
    assert clocked.lease(NOW_US + 5_000_000, given)[:2] == [0, 9]
    assert entry_us in entries(clocked.state("k"))
    assert clocked.lease(NOW_US + 5_000_000, given._replace(back=100))[:2] == [0, 2]
    assert entry_us not in entries(clocked.state("k"))
    assert clocked.lease(NOW_US + 5_000_000, given)[:2] == [0, 2]


@pytest.mark.parametrize("strategy", ["fixed_window", "sliding_counter"])
def test_a_count_gets_back_within_its_window(redis_client: redis.Redis, strategy: str) -> None:
    clocked, compiled = ClockedScript(redis_client), leased(strategy)
    clocked.lease(NOW_US, Lease(compiled, "k", count=4, ahead=6))
    given = Lease(compiled, "k", count=0, back=3, back_us=NOW_US)
    assert clocked.lease(NOW_US + 1, given)[1] == 7
    assert clocked.lease(NOW_US - 1, given)[1] == 4, "the clock may step back within the window"
    before = clocked.state("k")
    assert clocked.lease(NOW_US + MINUTE_US, given)[1] == 0
    assert clocked.state("k") == before, "the window has turned"
    assert clocked.lease(NOW_US + 1, given._replace(back=100))[1] == 0
    assert clocked.state("k") is None


@pytest.mark.parametrize("lease", [True, False])
def test_entries_up_to_an_eighth_of_the_window_ahead_are_legal_whatever_rule_reads_them(
    redis_client: redis.Redis, lease: bool
) -> None:
    """The process that took them ahead, with whatever lead, may still spend them."""
    clocked, compiled = ClockedScript(redis_client), leased("sliding_window", 10, 60)
    reader = RateThrottleRule("r", 10, 60, lease=lease).compiled
    clocked.lease(NOW_US, Lease(compiled, "k", count=1, ahead=1))
    before = clocked.state("k")
    assert entries(before) == {NOW_US: 1, NOW_US + 100_000: 1}
    for now_us in (NOW_US, NOW_US - 7_400_000):
        assert clocked.call(now_us, [(reader, "k", 10)])[0][0] is False
        assert clocked.state("k") == before
    assert clocked.call(NOW_US - 7_400_001, [(reader, "k", 10)])[0][0] is False
    assert entries(clocked.state("k")) == {NOW_US: 1, NOW_US + 99_999: 1}
    assert clocked.call(NOW_US - 7_500_001, [(reader, "k", 10)])[0][0] is False
    assert entries(clocked.state("k")) == {NOW_US - 1: 2}


def test_a_lease_shorter_than_another_one_joins_its_entry_and_takes_back_none_of_it(redis_client: redis.Redis) -> None:
    """What the shorter one gives back is not found, or found in an entry that leaves no later than its own units."""
    clocked, long = ClockedScript(redis_client), leased("sliding_window", 60, 60)
    short = RateThrottleRule("r", 60, 60, lease=True, lease_ttl=0.005).compiled
    clocked.lease(NOW_US, Lease(long, "k", ahead=3))
    clocked.lease(NOW_US + 10, Lease(short, "k", ahead=2))
    before = clocked.state("k")
    assert entries(before) == {NOW_US: 1, NOW_US + 100_000: 6}
    assert clocked.lease(NOW_US + 20, Lease(short, "k", count=0, back=2, back_us=NOW_US + 10))[1] == 7
    assert clocked.state("k") == before
    assert clocked.lease(NOW_US + 20, Lease(long, "k", count=0, back=3, back_us=NOW_US))[1] == 4


def test_units_ahead_stay_in_order_after_the_clock_stepped_back(redis_client: redis.Redis) -> None:
    clocked, compiled = ClockedScript(redis_client), leased("sliding_window", 60, 60)
    clocked.lease(NOW_US, Lease(compiled, "k", ahead=3))
    clocked.lease(NOW_US - 50_000, Lease(compiled, "k", ahead=3))
    assert entries(clocked.state("k")) == {NOW_US: 1, NOW_US + 100_000: 7}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("limit", [64, 65])
def test_a_step_back_locks_nobody_out_for_longer_than_a_window_an_eighth_and_a_slot(
    redis_client: redis.Redis, strategy: str, limit: int
) -> None:
    clocked, longest = ClockedScript(redis_client), leased("sliding_window", limit, 8)
    most_us = longest.window_us * 9 // 8 + (longest.slot_us if limit > 64 else 0)
    for back_us in (1, 10_000, 1_000_000, 1_000_001, 5_000_000, 100_000_000):
        for rule in (longest, RateThrottleRule("r", limit, 8).compiled):
            clocked.forget("k")
            assert clocked.lease(NOW_US, Lease(longest, "k", count=limit // 2, ahead=3))[0] == limit // 2
            if strategy != "sliding_window":  # while another view stands beside it
                clocked.call(NOW_US, [(make_rule(strategy, 1_000, 60_000_000).compiled, "k", 1)])
            assert clocked.call(NOW_US - back_us, [(rule, "k", 1)])[0][0]
            _, _, retry_us, reset_us = clocked.call(NOW_US - back_us, [(rule, "k", limit)])[0]
            assert 8_000_000 <= retry_us <= reset_us <= most_us
            assert clocked.call(NOW_US - back_us + most_us, [(rule, "k", limit)])[0][0]


def test_a_view_that_is_derived_now_gets_nothing_back(redis_client: redis.Redis) -> None:
    """It holds what another definition counted, capped, so that units given back could be others'."""
    clocked, old, new = ClockedScript(redis_client), leased("fixed_window"), leased("token_bucket")
    clocked.lease(NOW_US, Lease(old, "k", count=50, ahead=5))
    level = clocked.lease(NOW_US, Lease(new, "k", count=0, back=5, back_us=NOW_US))[1]
    assert level == 55 * new.unit_ticks
    assert clocked.lease(NOW_US, Lease(new, "k", count=0, back=5, back_us=NOW_US))[1] == 50 * new.unit_ticks


def test_units_ahead_are_charged_to_the_other_view_too(redis_client: redis.Redis) -> None:
    clocked, old, new = ClockedScript(redis_client), leased("fixed_window"), leased("sliding_window", 200, 0.1)
    clocked.lease(NOW_US, Lease(old, "k"))
    clocked.lease(NOW_US, Lease(new, "k"))
    assert clocked.lease(NOW_US, Lease(old, "k", count=2, ahead=3)) == [2, 7, 1_000_000, 3]
    assert clocked.call(NOW_US, [(new, "k", 1)], "peek")[0][1] == 193
    bucket = leased("token_bucket")
    assert clocked.call(NOW_US, [(bucket, "l", 1)])[0][0]
    clocked.lease(NOW_US, Lease(old, "l", count=2, ahead=3))
    assert clocked.call(NOW_US, [(bucket, "l", 1)], "peek")[0][1] == bucket.capacity - 6


def test_runs_come_before_leases(redis_client: redis.Redis) -> None:
    clocked, compiled = ClockedScript(redis_client), leased("fixed_window", 10)
    call = make_call(
        [(compiled, "k", 2), (compiled, "l", 1)], leases=[Lease(compiled, "k", count=9), Lease(compiled, "l", ahead=4)]
    )
    reply: Any = clocked.send(redis_client, NOW_US, call)
    assert call.raw(reply) == [[1, 2, 1_000_000], [1, 1, 1_000_000], [8, 10, 1_000_000, 0], [1, 3, 1_000_000, 1]]


def test_another_view_reaches_an_eighth_of_its_own_window_ahead(redis_client: redis.Redis) -> None:
    """Else a window of a millisecond, once changed to a longer one with leases, would gather entries by the thousand."""
    clocked, old, new = ClockedScript(redis_client), leased("sliding_window", 200, 0.1), leased("sliding_window", 10_000, 60)
    assert (old.lead_us, new.lead_us) == (12_500, 100_000)
    clocked.lease(NOW_US, Lease(old, "k"))
    for now_us in range(NOW_US, NOW_US + 400_000, 1_000):
        clocked.lease(now_us, Lease(new, "k", count=0, ahead=1))
        held = entries(clocked.state("k"), 1)
        entry_us = (now_us + 12_500) // old.slot_us * old.slot_us + old.slot_us
        assert entry_us in held
        assert len(held) <= 74


def test_what_was_taken_ahead_stays_ahead_when_the_window_changes(redis_client: redis.Redis) -> None:
    clocked, old, new = ClockedScript(redis_client), leased("sliding_window", 10, 60), leased("sliding_window", 10, 50)
    clocked.lease(NOW_US, Lease(old, "k", ahead=1))
    assert clocked.lease(NOW_US + 10, Lease(new, "k", cost=10))[0] == 0
    assert (clocked.state("k") or b"").startswith(b"1;s50000000,1,1,1,")
    assert entries(clocked.state("k")) == {NOW_US: 1, NOW_US + 100_000: 1}
