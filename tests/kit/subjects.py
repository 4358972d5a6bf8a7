"""One interface over everything that decides: oracle, compiled core, and the script on any Redis."""

from __future__ import annotations

from typing import Any, Protocol

from ratethrottle._core import Limiter
from ratethrottle._engine import corrections
from ratethrottle._engine.decision import Decision, Entry
from ratethrottle._engine.definitions import CompiledRule
from ratethrottle._engine.keys import KeyTable
from tests.kit.clocked import ClockedScript, View, read_state
from tests.kit.oracle import Answer, Oracle

NEVER_US = 2**63 - 1


class Subject(Protocol):
    """Decides on one key, at the times that the test names."""

    def check(self, rule: CompiledRule, now_us: int, cost: int, *, consume: bool = True) -> Answer:
        """Allowed, remaining, retry_us (−1: never), reset_us."""


class _Storage:
    def __init__(self, table: KeyTable) -> None:
        self.table = table


class Core:
    """The compiled core with a clock of the test's own."""

    def __init__(self) -> None:
        self.now_us = 0
        self.table = KeyTable(clock_us=lambda: self.now_us)
        self.limiter = Limiter(_Storage(self.table))

    def entry(self, rule: CompiledRule, cost: int, key: str = "key") -> Entry:
        """A validated check."""
        self.limiter._install(rule)
        return self.limiter._entry(key, rule.name, cost)

    def check(self, rule: CompiledRule, now_us: int, cost: int, *, consume: bool = True, key: str = "key") -> Answer:
        """Decide. Raises CostExceedsLimit, where the others deny for ever."""
        self.now_us = now_us
        entry = self.entry(rule, cost, key)
        decision = self.table.decide(entry) if consume else self.table.peek(entry)
        retry_us = decision.retry_after_us
        return decision.allowed, decision.remaining, -1 if retry_us == NEVER_US else retry_us, decision.reset_after_us

    def charge(self, rule: CompiledRule, now_us: int, cost: int) -> Answer:
        """Count units that nobody was asked for."""
        self.now_us = now_us
        return self.corrected(corrections.charge(self.table, self.entry(rule, 1).costing(cost)))

    def refund(self, rule: CompiledRule, now_us: int, units: int, granted_us: int) -> Answer:
        """Give back units that were granted then."""
        self.now_us = now_us
        return self.corrected(corrections.refund(self.table, self.entry(rule, 1).costing(units), granted_us))

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

    def state(self, rule: CompiledRule) -> list[View] | None:
        """What the key's state holds."""
        return read_state(self.script.state(self.key))


__all__ = ["Core", "Lua", "Oracle", "Subject"]
