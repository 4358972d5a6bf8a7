"""One interface over everything that decides: oracle, compiled core, and the script on any Redis."""

from __future__ import annotations

from functools import cache
from itertools import accumulate
from typing import Any, Protocol

from ratethrottle._core import Limiter
from ratethrottle._engine import bookings, corrections
from ratethrottle._engine.bookings import read_booking
from ratethrottle._engine.decision import Decision, Entry, read_correction
from ratethrottle._engine.definitions import CompiledRule
from ratethrottle._engine.joint import joint_of
from ratethrottle._engine.keys import KeyTable
from tests.kit.clocked import (
    Booking,
    ClockedScript,
    Correction,
    JointAnswer,
    Part,
    View,
    make_bookings,
    make_settlement,
    read_state,
    settled,
)
from tests.kit.joint import binding
from tests.kit.oracle import Answer, Oracle

NEVER_US = 2**63 - 1


class Subject(Protocol):
    """Decides on one key, at the times that the test names."""

    def check(self, rule: CompiledRule, now_us: int, cost: int, *, consume: bool = True) -> Answer:
        """Allowed, remaining, retry_us (−1: never), reset_us."""


class _Storage:
    def __init__(self, table: KeyTable) -> None:
        self.table = table


def answer_of(decision: Decision) -> Answer:
    """What it says, as the oracle says it."""
    retry_us = decision.retry_after_us
    return decision.allowed, decision.remaining, -1 if retry_us == NEVER_US else retry_us, decision.reset_after_us


@cache
def flagging(rule: CompiledRule) -> CompiledRule:
    """The same rule, which only flags."""
    *facts, _, calendar = rule.__reduce__()[1]
    return CompiledRule(*facts, enforce="flag", calendar=calendar)


class Core:
    """The compiled core with a clock of the test's own."""

    def __init__(self) -> None:
        self.now_us = 0
        self.table = KeyTable(clock_us=lambda: self.now_us)
        self.limiter = Limiter(_Storage(self.table))

    def entry(self, rule: CompiledRule, cost: int, key: str = "key") -> Entry:
        """A validated check."""
        if rule.calendar is not None:
            rule.calendar.around(self.now_us)  # no process runs for as long as a test's clock goes
        self.limiter._install(rule)
        return self.limiter._entry(key, rule.name, cost)

    def check(self, rule: CompiledRule, now_us: int, cost: int, *, consume: bool = True, key: str = "key") -> Answer:
        """Decide. Raises CostExceedsLimit, where the others deny for ever."""
        self.now_us = now_us
        entry = self.entry(rule, cost, key)
        return answer_of(self.table.decide(entry) if consume else self.table.peek(entry))

    def check_jointly(self, sets: list[list[Part]], now_us: int, *, consume: bool = True) -> JointAnswer:
        """Decide on a joint check."""
        self.now_us = now_us
        parts = [part for alternatives in sets for part in alternatives]
        entries = [self.entry(flagging(part.rule) if part.flagged else part.rule, part.cost, part.key) for part in parts]
        firsts = list(accumulate((len(alternatives) for alternatives in sets), initial=0))
        joint = joint_of(entries, sum(1 << i for i in range(len(parts)) if i not in firsts))
        decision = self.table.decide(joint) if consume else self.table.peek(joint)
        told = [
            (
                [part.key for part in alternatives].index(str(heard.key)),
                (heard.allowed and not heard.over, *answer_of(heard)[1:]),
            )
            for heard, alternatives in zip(decision.parts or (decision,), sets, strict=True)
        ]
        which = binding(sets, (decision.allowed, told))
        assert (decision.parts or (decision,))[which].key == decision.key
        return decision.allowed, told

    def charge(self, rule: CompiledRule, now_us: int, cost: int, *, key: str = "key") -> Answer:
        """Count units that nobody was asked for."""
        self.now_us = now_us
        return self.corrected(corrections.charge(self.table, self.entry(rule, 1, key).costing(cost)))

    def refund(self, rule: CompiledRule, now_us: int, units: int, granted_us: int, *, key: str = "key") -> Answer:
        """Give back units that were granted then."""
        self.now_us = now_us
        return self.corrected(corrections.refund(self.table, self.entry(rule, 1, key).costing(units), granted_us))

    def book(self, rule: CompiledRule, now_us: int, cost: int, ahead_us: int, *, key: str = "key") -> Answer:
        """Grant for later. The third number says when it is its turn."""
        self.now_us = now_us
        return answer_of(bookings.book(self.table, bookings.booking(self.entry(rule, cost, key), ahead_us)))

    def unbook(self, rule: CompiledRule, now_us: int, units: int, empty_us: int, *, key: str = "key") -> None:
        """Give a booking back."""
        self.now_us = now_us
        bookings.unbook_entry(self.table, self.entry(rule, units, key), now_us, empty_us)

    def corrected(self, decision: Decision) -> Answer:
        assert decision.allowed
        assert decision.over == (decision.retry_after_us > 0)
        return True, decision.remaining, decision.retry_after_us, decision.reset_after_us

    def state(self, rule: CompiledRule) -> list[View] | None:
        """What the key's state holds."""
        return read_state(self.table.dump(self.entry(rule, 1)))


class Lua:
    """The script on a synchronous client, each instance with a key of its own."""

    keys = 0

    def __init__(self, client: Any) -> None:
        Lua.keys += 1
        self.key = f"subject:{Lua.keys}"
        self.script = ClockedScript(client)
        self.script.forget(self.key)

    def check(self, rule: CompiledRule, now_us: int, cost: int, *, consume: bool = True) -> Answer:
        """Decide."""
        return self.script.call(now_us, [(rule, self.key, cost)], "check" if consume else "peek")[0]

    def charge(self, rule: CompiledRule, now_us: int, cost: int) -> Answer:
        """Count units that nobody was asked for."""
        return self.correct(now_us, Correction(rule, self.key, cost))

    def refund(self, rule: CompiledRule, now_us: int, units: int, granted_us: int) -> Answer:
        """Give back units that were granted then."""
        return self.correct(now_us, Correction(rule, self.key, units, granted_us))

    def correct(self, now_us: int, correction: Correction) -> Answer:
        (answer,), _ = settled([correction], self.script.send(self.script.client, now_us, make_settlement([correction], now_us)))
        assert answer.took == 1
        return read_correction(correction.rule, answer.numbers)

    def book(self, rule: CompiledRule, now_us: int, cost: int, ahead_us: int) -> Answer:
        """Grant for later."""
        booking = Booking(rule, self.key, cost, ahead_us)
        (answer,), _ = settled([booking], self.script.send(self.script.client, now_us, make_bookings([booking])))
        assert answer.took == answer.numbers[0]
        return read_booking(rule, answer.numbers, cost, rule.strategy == "leaky_bucket", 0)

    def unbook(self, rule: CompiledRule, now_us: int, units: int, empty_us: int) -> None:
        """Give a booking back."""
        booking = Booking(rule, self.key, units, empty_us=empty_us)
        (answer,), _ = settled([booking], self.script.send(self.script.client, now_us, make_bookings([booking])))
        assert answer.took == 1

    def state(self, rule: CompiledRule) -> list[View] | None:
        """What the key's state holds."""
        return read_state(self.script.state(self.key))


__all__ = ["Core", "Lua", "Oracle", "Subject"]
