"""What the script of slots answers: against an oracle at random, and against the promise itself."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import pytest
import redis

from ratethrottle.storage.redis.scripts import script
from tests.kit.clocked import EPOCH, EPOCH_KEY, epoch_text
from tests.kit.slots import (
    FORGOTTEN,
    HOLDERS_KEY,
    LAPSED,
    OLD,
    UNREADABLE,
    UNSURE,
    ClockedSlots,
    Holder,
    Item,
    SlotsOracle,
)
from tests.kit.strategies import START_US

S = 1_000_000
TTL_US = 2 * S
A, B, C = (Holder(each * 16, joins=True) for each in "abc")


@pytest.fixture
def slots(redis_client: redis.Redis) -> ClockedSlots:
    redis_client.flushall()
    return ClockedSlots(redis_client)


def hold(slots: ClockedSlots, at_us: int, holder: Holder, *, key: str = "k", **item: Any) -> Any:
    """Ask for one key; returns the answer."""
    return slots.hold(START_US + at_us, [holder], [Item(key, **item)])[1][0]


def state(slots: ClockedSlots, key: str = "k") -> str:
    found = slots.client.get(key)
    assert found.startswith(b"1e" + EPOCH[40:56].encode() + b";")
    return str(found[19:].decode())


def test_the_header_names_what_python_sends_and_reads() -> None:
    header = script("slots").header
    assert header["ARGV"] == ("request", "mode", "epoch", "holder_count", "holder...", "item...")
    assert header["holder"] == ("holder_id", "previous_id", "ttl_us", "holder_bits")
    assert header["item"] == ("holder_number", "limit", "cost", "held", "wanted", "sequence", "item_bits")
    assert header["reply"] == ("request", "server_us", "holder_answer...", "item_answer...")
    assert header["item_answer"] == ("granted", "free", "again_us")
    assert script("slots").limits == {"keys": 128, "holders": 64}


def test_slots_are_granted_up_to_the_limit_and_given_back(slots: ClockedSlots) -> None:
    assert hold(slots, 0, A, wanted=2, sequence=1) == (2, 1, 0)
    assert hold(slots, 1, B, wanted=2, sequence=1) == (1, 0, 0)
    assert hold(slots, 2, B, held=1, wanted=1, sequence=2) == (0, 0, 0)
    assert hold(slots, 3, A, held=1, sequence=2) == (0, 1, 0)
    assert hold(slots, 4, B, held=1, wanted=1, sequence=3) == (1, 0, 0)
    assert slots.client.pttl("k") > 0
    assert slots.client.pttl(HOLDERS_KEY) > 0


def test_what_is_asked_again_changes_nothing_and_what_comes_late_even_less(slots: ClockedSlots) -> None:
    assert hold(slots, 0, A, wanted=2, sequence=5) == (2, 1, 0)
    assert hold(slots, 1, A, wanted=2, sequence=5) == (2, 1, 0)
    assert hold(slots, 2, A, held=1, sequence=6) == (0, 2, 0)
    assert hold(slots, 3, A, wanted=3, sequence=5) == (OLD, 2, 0)
    assert hold(slots, 4, A, held=0, sequence=7) == (0, 3, 0)
    # Nothing is held any more, and yet it is known that this was asked before.
    assert hold(slots, 5, A, wanted=3, sequence=6) == (OLD, 3, 0)
    assert slots.client.pttl("k") <= 60_000 + 2 * 86_400_000  # which a clock of the test's keeps for longer


def test_a_holder_that_lapsed_hears_it_and_its_slots_go_to_others(slots: ClockedSlots) -> None:
    assert hold(slots, 0, A, wanted=3) == (3, 0, 0)
    renewed = A._replace(joins=False)
    assert slots.hold(START_US + TTL_US - 1, [renewed]) == ([1], [])
    assert hold(slots, TTL_US, B, wanted=1) == (0, 0, 0)
    assert hold(slots, 2 * TTL_US - 2, B, wanted=1) == (0, 0, 0)
    assert hold(slots, 2 * TTL_US - 1, B, wanted=1) == (1, 2, 0)
    assert slots.hold(START_US + 2 * TTL_US, [renewed], [Item("k", held=3, sequence=9)]) == ([0], [(LAPSED, 2, 0)])
    assert state(slots) == f"h{B.holder_id},1,1;"


def test_processes_are_served_in_the_order_in_which_they_came(slots: ClockedSlots) -> None:
    hold(slots, 0, A, wanted=3)
    assert hold(slots, 1, B, wanted=1, waits=True) == (0, 0, 25_000)
    assert hold(slots, 2, C, wanted=1, waits=True) == (0, 0, 50_000)
    # One that comes now, and one that holds something already, come behind them.
    assert hold(slots, 3, A, held=2, wanted=1, waits=True, sequence=2) == (0, 1, 75_000)
    assert hold(slots, 4, C, wanted=1, waits=True, sequence=2) == (0, 1, 50_000)
    assert hold(slots, 5, B, wanted=1, waits=True, sequence=2) == (1, 0, 0)
    assert hold(slots, 6, A, held=1, wanted=1, waits=True, sequence=3) == (0, 1, 50_000)
    assert hold(slots, 7, C, wanted=1, waits=True, sequence=3) == (1, 0, 0)


def test_a_big_one_is_not_starved_by_small_ones(slots: ClockedSlots) -> None:
    hold(slots, 0, A, wanted=2)
    assert hold(slots, 1, B, cost=3, wanted=1, waits=True)[0] == 0
    assert hold(slots, 2, C, wanted=1) == (0, 1, 0)
    hold(slots, 3, A, held=0, sequence=2)
    assert hold(slots, 4, C, wanted=1, sequence=2) == (0, 3, 0)
    assert hold(slots, 5, B, cost=3, wanted=1, waits=True, sequence=2) == (1, 0, 0)


def test_processes_that_want_many_take_turns(slots: ClockedSlots) -> None:
    hold(slots, 0, C, wanted=3)
    hold(slots, 1, A, wanted=5, waits=True)
    hold(slots, 2, B, wanted=5, waits=True)
    hold(slots, 3, C, held=2, sequence=2)
    assert hold(slots, 4, A, wanted=5, waits=True, sequence=2)[0] == 1
    hold(slots, 5, C, held=1, sequence=3)
    assert hold(slots, 6, A, held=1, wanted=4, waits=True, sequence=3)[0] == 0
    assert hold(slots, 7, B, wanted=5, waits=True, sequence=2)[0] == 1


def test_a_place_is_kept_for_a_second_and_given_up_by_one_that_wants_no_more(slots: ClockedSlots) -> None:
    hold(slots, 0, A, wanted=3)
    hold(slots, 1, B, wanted=1, waits=True)
    hold(slots, 2, A, held=2, sequence=2)
    assert hold(slots, S, C, wanted=1, waits=True)[0] == 0
    assert hold(slots, S + 1, C, wanted=1, waits=True, sequence=2)[0] == 1
    hold(slots, S + 2, B, wanted=1, waits=True, sequence=2)
    hold(slots, S + 3, A, held=1, sequence=3)
    hold(slots, S + 4, B, sequence=3)
    assert hold(slots, S + 5, C, held=1, wanted=1, sequence=3)[0] == 1
    # Nor does one that doesn't wait take a place.
    assert hold(slots, S + 6, B, wanted=1, sequence=4)[0] == 0
    hold(slots, S + 7, A, sequence=4)
    assert hold(slots, S + 8, C, held=2, wanted=1, sequence=4)[0] == 1


def test_one_that_waits_for_long_is_asked_to_come_less_often(slots: ClockedSlots) -> None:
    hold(slots, 0, A, wanted=3)
    asked = [(0, 25_000), (S // 2, 31_250), (S, 62_500), (3 * S // 2, 93_750)]
    for sequence, (at_us, again_us) in enumerate(asked, 1):
        assert hold(slots, 10 + at_us, B, wanted=1, waits=True, sequence=sequence) == (0, 0, again_us)
    # There is nobody else to give anything back: it comes only to keep its place.
    assert hold(slots, 20 + 2 * S, A, held=3, wanted=1, waits=True, sequence=2)[2] > 0
    assert hold(slots, 20, A, key="other", wanted=4, waits=True) == (3, 0, S // 2)
    assert hold(slots, S // 2, A, key="other", held=3, wanted=1, waits=True, sequence=2) == (0, 0, S // 2)
    assert hold(slots, S, B, key="other", wanted=1, waits=True)[:2] == (0, 0)
    assert hold(slots, S + 1, A, key="other", held=2, wanted=1, waits=True, sequence=3) == (1, 0, 0)


def test_one_that_died_as_it_told_keeps_nobody_waiting_for_longer_after_the_clock_was_set_back(slots: ClockedSlots) -> None:
    slots.hold(START_US, [A._replace(tells=True)])
    for back_us, source in ((500_000, UNSURE), (500_001, 1), (3_600 * S, 1)):
        holder = Holder(f"{back_us:016}", joins=True)
        assert hold(slots, -back_us, holder, key=f"k{back_us}", wanted=1)[0] == source


def test_holders_of_nothing_leave_the_state_after_a_minute(slots: ClockedSlots) -> None:
    holders = [Holder(f"{number:016}", ttl_us=3_600 * S, joins=True) for number in range(50)]
    for number, holder in enumerate(holders):
        hold(slots, number * S, holder, wanted=1)
        hold(slots, number * S, holder, sequence=2)
    last = holders[-1]
    assert len(state(slots)) > 49 * 20
    # What comes late, but within a minute, isn't new.
    assert hold(slots, 59 * S, holders[0], wanted=1, sequence=1) == (OLD, 3, 0)
    hold(slots, 80 * S, last, wanted=1, sequence=3)
    assert state(slots).count("h") == 29
    hold(slots, 3_000 * S, last, held=1, sequence=4)
    assert state(slots) == f"h{last.holder_id},1,4;"
    # Nor does a clock that is set back keep them.
    hold(slots, 3_001 * S, last, sequence=5)
    slots.hold(START_US, [A], [Item("k", wanted=1)])
    assert state(slots) == f"h{A.holder_id},1,1;"


def test_what_is_held_is_taken_down_whatever_the_limit(slots: ClockedSlots) -> None:
    assert hold(slots, 0, A, held=5) == (0, 0, 0)
    assert hold(slots, 1, B, held=2, wanted=1) == (0, 0, 0)
    assert hold(slots, 2, A, held=2, sequence=2) == (0, 0, 0)
    assert hold(slots, 3, B, held=1, wanted=1, sequence=2) == (0, 0, 0)
    assert hold(slots, 4, B, held=0, wanted=1, sequence=3) == (1, 0, 0)


def test_a_limit_of_zero_grants_nothing_and_keeps_no_place(slots: ClockedSlots) -> None:
    assert hold(slots, 0, A, limit=0, wanted=1, waits=True) == (0, 0, 0)
    assert "q" not in state(slots)


def test_nobody_is_granted_anything_until_those_of_before_have_had_their_time(slots: ClockedSlots) -> None:
    began_us = START_US + S // 2
    slots.enter(epoch_text(START_US, began_us))
    assert hold(slots, 0, A, held=1, wanted=1, waits=True) == (UNSURE, 2, 750_000)
    assert hold(slots, 1, B, held=1) == (0, 1, 0)
    assert hold(slots, S // 2 + 249_999, B, held=1, wanted=1, sequence=2) == (UNSURE, 1, 0)
    assert hold(slots, S // 2 + 250_000, A, held=1, wanted=1, waits=True, sequence=2) == (1, 0, 0)
    # A clock that was set back behind all that learns nothing from it.
    assert slots.hold(START_US - 10 * S, [C], [Item("other", wanted=1)])[1] == [(1, 2, 0)]


def test_nobody_is_granted_anything_while_one_tells_what_it_holds(slots: ClockedSlots) -> None:
    telling = A._replace(tells=True)
    assert hold(slots, 0, telling, key="other", held=3) == (0, 0, 0)
    assert hold(slots, 1, B, wanted=1, waits=True) == (UNSURE, 3, 25_000)
    assert hold(slots, S, telling, held=2, sequence=2) == (0, 1, 0)
    assert hold(slots, 3 * S, B, wanted=1, waits=True, sequence=2)[0] == UNSURE
    assert slots.hold(START_US + 3 * S, [A]) == ([1], [])
    assert hold(slots, 3 * S, B, wanted=1, waits=True, sequence=3) == (1, 2, 0)  # A has lapsed
    # For one that stands still they wait for three seconds.
    slots.hold(START_US + 3 * S, [Holder("d" * 16, joins=True, tells=True)])
    assert hold(slots, 6 * S - 1, B, held=1, wanted=1, sequence=4)[0] == UNSURE
    assert hold(slots, 6 * S, B._replace(joins=True), held=1, wanted=1, sequence=5)[0] == 1


def test_a_holder_takes_over_what_it_was_before(slots: ClockedSlots) -> None:
    hold(slots, 0, A, wanted=2)
    hold(slots, 1, A, key="other", wanted=3)
    hold(slots, 2, B, wanted=2, waits=True)
    hold(slots, 3, C, wanted=1, waits=True)
    again = Holder("d" * 16, A.holder_id, joins=True, tells=True)
    # What it doesn't tell of yet stays counted.
    assert hold(slots, 4, again, held=2) == (0, 0, 0)
    assert hold(slots, 5, C, key="other", wanted=1) == (UNSURE, 0, 0)
    # Then it has told all. Of the other key it holds nothing any more.
    assert slots.hold(START_US + 6, [again._replace(tells=False)]) == ([1], [])
    assert hold(slots, 7, C, key="other", wanted=1) == (1, 2, 0)
    held = f"h{B.holder_id},1,1;h{C.holder_id},0,1,{START_US + 3};h{'d' * 16},2,1;"
    places = [f"q{each.holder_id},1,{START_US + at_us},{START_US + at_us};" for each, at_us in ((B, 2), (C, 3))]
    assert state(slots) == held + "".join(places)
    assert hold(slots, 8, B._replace(holder_id="e" * 16, previous_id=B.holder_id), held=1, wanted=1, waits=True)[0] == 0
    assert state(slots).endswith(f"q{'e' * 16},1,{START_US + 2},{START_US + 8};q{C.holder_id},1,{START_US + 3},{START_US + 3};")


def test_a_holder_that_leaves_gives_everything_back_by_one_call(slots: ClockedSlots) -> None:
    for key in ("k", "other"):
        hold(slots, 0, A, key=key, wanted=3)
        hold(slots, 1, B, key=key, wanted=3, waits=True)
    slots.leave(START_US + 2, A, B)
    assert hold(slots, 3, C, wanted=3) == (3, 0, 0)
    assert hold(slots, 3, C, key="other", wanted=3) == (3, 0, 0)
    assert slots.client.zrange(HOLDERS_KEY, 0, -1) == [C.holder_id.encode()]


def test_a_key_that_is_forgotten_is_held_by_nobody_and_its_holders_hear_of_it(slots: ClockedSlots) -> None:
    hold(slots, 0, A, wanted=2)
    slots.forget(START_US + 1, "k", "nothing")
    assert slots.hold(START_US + 2, [B], [Item("k", wanted=3)]) == ([1], [(3, 0, 0)])
    assert slots.hold(START_US + 3, [A]) == ([2], [])
    assert slots.hold(START_US + 4, [A]) == ([1], [])
    assert hold(slots, 5, A, held=2, wanted=1, kept=True, sequence=2) == (FORGOTTEN, 0, 0)
    assert state(slots) == f"h{B.holder_id},3,1;"


@pytest.mark.parametrize(
    "damage", [b"", b"1;", b"1e1;", b"2e" + EPOCH[40:56].encode() + b";", b"1e" + EPOCH[40:56].encode() + b";habc,1;", "list"]
)
def test_a_state_that_cannot_be_read_stays_as_it_is(slots: ClockedSlots, damage: bytes | str) -> None:
    if damage == "list":
        slots.client.rpush("k", "x")
    else:
        slots.client.set("k", damage)
    before = slots.client.dump("k")
    answers = slots.hold(START_US, [A], [Item("k", wanted=1), Item("other", wanted=1)])[1]
    assert answers == [(UNREADABLE, 0, 0), (1, 2, 0)]
    assert slots.client.dump("k") == before
    slots.forget(START_US, "k")
    assert hold(slots, 0, A, wanted=1) == (1, 2, 0)


def test_in_another_epoch_nothing_is_done(slots: ClockedSlots) -> None:
    slots.epoch = epoch_text(2)
    text = script("slots").text.decode()
    args = ["id", "hold", slots.epoch, 1, *A.words, *Item("k", wanted=1).words]
    assert slots.client.eval(text, 3, EPOCH_KEY, HOLDERS_KEY, "k", *args) == [b"id", -1]
    assert slots.client.keys() == [EPOCH_KEY.encode()]


def test_what_was_cleared_is_held_by_nobody(slots: ClockedSlots) -> None:
    hold(slots, 0, A, wanted=3)
    epoch = epoch_text(START_US)
    slots.client.set(EPOCH_KEY, f"{epoch}1{0:016}")
    slots.epoch = epoch
    assert hold(slots, 1, B, wanted=3) == (3, 0, 0)


@pytest.mark.parametrize(
    ("holder", "item"),
    [
        ((0, "xyz"), None), ((0, ""), None), ((0, "a" * 33), None), ((1, "xyz"), None),
        ((2, 999_999), None), ((2, 86_400_000_001), None), ((2, "x"), None), ((3, 4), None), ((3, -1), None),
        (None, (0, 0)), (None, (0, 2)), (None, (1, -1)), (None, (1, 10**9 + 1)), (None, (2, 0)), (None, (2, 10**9 + 1)),
        (None, (3, -1)), (None, (3, 4 * 10**9 + 1)), (None, (4, -1)), (None, (4, 10**6 + 1)), (None, (5, 0)),
        (None, (5, 2**53)), (None, (6, 4)), (None, (6, "x")), (None, (1, "1.5")),
    ],
)  # fmt: skip
def test_bad_numbers_are_refused_and_nothing_is_written(
    slots: ClockedSlots, holder: tuple[int, Any] | None, item: tuple[int, Any] | None
) -> None:
    words, rest = A.words, Item("k", wanted=1).words
    for place, bad in ((words, holder), (rest, item)):
        if bad is not None:
            place[bad[0]] = bad[1]
    with pytest.raises(redis.ResponseError, match="RATETHROTTLE"):
        slots.run(START_US, "hold", ["k"], 1, *words, *rest)
    assert slots.client.keys() == [EPOCH_KEY.encode()]


@pytest.mark.parametrize(
    ("mode", "keys", "args"),
    [
        ("take", [], [1, *A.words]),
        ("hold", [], [0]),
        ("hold", [], [65]),
        ("hold", ["k"], [1, *A.words]),
        ("hold", ["k", "k"], [1, *A.words, *Item("k").words, *Item("k").words]),
        ("leave", ["k"], [1, *A.words]),
        ("forget", ["k"], [1, *A.words]),
        ("forget", ["k"], [0, 1]),
    ],
)
def test_bad_calls_are_refused(slots: ClockedSlots, mode: str, keys: list[str], args: list[Any]) -> None:
    with pytest.raises(redis.ResponseError, match="RATETHROTTLE"):
        slots.run(START_US, mode, keys, *args)


def test_a_state_has_a_bounded_number_of_holders_of_nothing(slots: ClockedSlots) -> None:
    oracle = SlotsOracle()
    for number in range(600):
        holder = Holder(f"{number:016}", joins=True)
        for sequence, wanted in ((1, 1), (2, 0)):
            item = Item("k", wanted=wanted, sequence=sequence, held=0)
            assert slots.hold(START_US + number, [holder], [item]) == oracle.hold(START_US + number, [holder], [item])
    assert state(slots).count("h") == len(oracle.keys["k"].units) == 512
    assert hold(slots, 600, Holder(f"{88:016}"), wanted=1, sequence=1) == (OLD, 3, 0)
    assert f"h{87:016}," not in state(slots)


def random_holder(rng: random.Random) -> Holder:
    name, previous = rng.choice("abcd"), rng.choice(("", "", "", *"abcd"))
    return Holder(
        name * 16,
        "" if previous == name else previous * 16,
        rng.choice((TTL_US, TTL_US, 200 * S)),
        joins=rng.random() < 0.3,
        tells=rng.random() < 0.05,
    )


def random_item(rng: random.Random, key: str, holders: int) -> Item:
    return Item(
        key,
        rng.randint(1, holders),
        limit=rng.choice((0, 3, 3, 3, 5)),
        cost=rng.choice((1, 1, 1, 2, 4)),
        held=rng.choice((0, 0, 1, 1, 2, 5)),
        wanted=rng.choice((0, 0, 1, 1, 2, 7)),
        sequence=rng.randint(1, 6),
        kept=rng.random() < 0.2,
        waits=rng.random() < 0.6,
    )


@pytest.mark.parametrize("round_number", range(8))
def test_the_script_answers_as_the_oracle_does(slots: ClockedSlots, round_number: int) -> None:
    seed = random.randrange(10**9)
    print(f"seed {seed}")
    rng = random.Random(seed)
    began_us = START_US + rng.choice((-10 * S, S))
    slots.enter(epoch_text(START_US - 20 * S, began_us))
    oracle, now_us = SlotsOracle(began_us), START_US
    for _ in range(600):
        now_us += rng.choice((1, 1, 5_000, 50_000, 300_000, S, TTL_US, 40 * S, -1, -100_000, -3 * S)) + rng.randrange(3)
        match rng.random():
            case chance if chance < 0.03:
                holder = random_holder(rng)
                slots.leave(now_us, holder)
                oracle.leave(now_us, holder)
            case chance if chance < 0.06:
                slots.forget(now_us, "x")
                oracle.forget(now_us, "x")
            case _:
                holders = [random_holder(rng) for _ in range(rng.randint(1, 3))]
                items = [random_item(rng, key, len(holders)) for key in rng.sample("xyz", rng.randint(0, 3))]
                assert slots.hold(now_us, holders, items) == oracle.hold(now_us, holders, items)


@dataclass
class Client:
    """A process that keeps to the rules. Replies to it may be lost, and what it asks may come late."""

    rng: random.Random
    name: str
    incarnation: int = 0
    held: int = 0
    until_us: int = 0
    sequence: int = 0
    joined: bool = False
    late: list[tuple[Holder, Item]] = field(default_factory=list)

    @property
    def holder(self) -> Holder:
        return Holder(f"{self.name}{self.incarnation:015x}", ttl_us=TTL_US, joins=not self.joined)

    def lapse(self) -> None:
        self.incarnation += 1
        self.held, self.joined, self.until_us = 0, False, 0

    def holds(self, now_us: int) -> int:
        """What it believes to hold."""
        if self.held and now_us >= self.until_us:
            self.lapse()
        return self.held

    def act(self, slots: ClockedSlots, now_us: int) -> None:
        self.holds(now_us)
        if self.late and self.rng.random() < 0.3:
            holder, item = self.late.pop(self.rng.randrange(len(self.late)))
            slots.hold(now_us, [holder], [item])
        self.held -= self.rng.randint(0, self.held)
        self.sequence += 1
        wanted = self.rng.choice((0, 1, 1, 2))
        item = Item("k", 1, held=self.held, wanted=wanted, sequence=self.sequence, waits=self.rng.random() < 0.7)
        if self.rng.random() < 0.1:
            self.late.append((self.holder, item))
            return
        (standing,), ((granted, _, _),) = slots.hold(now_us, [self.holder], [item])
        if self.rng.random() < 0.1:  # the reply is lost
            return
        if not standing:
            self.lapse()
            return
        assert granted >= 0
        self.joined, self.until_us, self.held = True, now_us + TTL_US, self.held + granted


@pytest.mark.parametrize("round_number", range(8))
def test_never_more_than_the_limit_is_held_whatever_is_lost_or_late(slots: ClockedSlots, round_number: int) -> None:
    seed = random.randrange(10**9)
    print(f"seed {seed}")
    rng = random.Random(seed)
    clients, now_us, full, lapsed = [Client(rng, name) for name in "abcdef"], START_US, 0, 0
    for _ in range(800):
        now_us += rng.choice((0, 1, 1_000, 100_000, S)) + (rng.random() < 0.02) * 2 * TTL_US
        held = sum(client.holds(now_us) for client in clients)
        assert held <= 3
        full += held == 3
        # Some are slow to renew.
        rng.choice(clients if rng.random() < 0.2 else clients[:4]).act(slots, now_us)
    lapsed = sum(client.incarnation for client in clients)
    assert full > 40
    assert lapsed > 3
