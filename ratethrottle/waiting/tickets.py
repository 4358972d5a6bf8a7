"""Callers that wait in a line: what each asks for, and until when."""

from __future__ import annotations

from collections.abc import Coroutine, Hashable, Mapping
from math import ceil, inf
from typing import Any, NamedTuple, Protocol, cast

from ratethrottle._engine.decision import Decision, Entry
from ratethrottle._engine.joint import Joint
from ratethrottle._several import SeveralRules, Timed
from ratethrottle.errors import InvalidRequest, RateLimitExceeded, shown
from ratethrottle.rule import FirstOf, RateThrottleRule

Key = str | tuple[str | int, ...]
Pending = Coroutine[Any, Any, Decision]


class Limiter(Protocol):
    """A limiter, as far as lines need it."""

    @property
    def _storage(self) -> Any: ...

    @property
    def _by_several(self) -> SeveralRules: ...

    def check(self, key: Key, rule: Any = None, *, cost: int = 1) -> Pending:
        """Decide."""

    def _entry_of(self, key: Key, rule: Any = None, cost: int = 1) -> Entry | Joint: ...


FOREVER_S = 10**9
# What is due within this time is due.
SOON_S = 1e-6
# A denied line asks again no sooner. What a policy or an overload denied was never a question of capacity.
STEP_S = 0.001
AWAY_STEP_S = 0.05
AWAY = ("outage", "overload")


def seconds_of(timeout: object) -> float:
    """Validate a timeout; None is inf. Raises InvalidRequest."""
    if timeout is None:
        return inf
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)):
        raise InvalidRequest(
            f"timeout is a {type(timeout).__name__}; it is seconds (int or float) from 0, or None to wait as long as needed"
        )
    if not timeout >= 0:
        raise InvalidRequest(f"timeout is {shown(timeout)}; it is seconds from 0, or None to wait as long as needed")
    return float(timeout) if timeout < FOREVER_S else inf


def rules_of(rule: Any) -> Hashable:
    """Name the rules of a call, whatever it costs under each: calls that name the same stand in one line."""
    if isinstance(rule, Timed):
        return rules_of(rule.rules)
    if isinstance(rule, FirstOf):
        return tuple(map(rules_of, rule.rules))
    if isinstance(rule, (Mapping, tuple, list)):
        names = frozenset(map(rules_of, rule))
        return names if len(names) > 1 else next(iter(names))
    return rule.name if isinstance(rule, RateThrottleRule) else rule


def only_of(entry: Entry | Joint) -> str:
    """Name the only rule of a limiter, which the entry is under."""
    rule = cast(Joint, entry).rules[0] if isinstance(entry, Joint) else cast(Entry, entry).rule
    return rule.name


def kept(rule: Any) -> Any:
    """Copy what its owner may change meanwhile."""
    if isinstance(rule, Timed):
        return Timed(kept(rule.rules))
    return dict(rule) if isinstance(rule, Mapping) else tuple(rule) if isinstance(rule, list) else rule


def ask_of(rule: Any, cost: int) -> Hashable:
    """Name what a call asks for: of equal ones, each may take the other's grant."""
    if isinstance(rule, Timed):
        return (Timed, ask_of(rule.rules, cost))
    return tuple(rule.items()) if isinstance(rule, Mapping) else (rule, cost)


class Ticket:
    """One caller in a line."""

    __slots__ = ("ahead_s", "ask", "cost", "deadline", "future", "number", "outcome", "rule", "timeout_s")

    def __init__(self, rule: Any, cost: int, timeout_s: float, deadline: float) -> None:
        self.rule = rule
        self.cost = cost
        self.ask = ask_of(rule, cost)
        self.timeout_s = timeout_s
        self.ahead_s = 0.0  # how far ahead its turn might have been when it was asked for last
        self.number = 0  # in its line
        self.deadline = deadline
        self.future: Any = None  # what the caller's task waits on, once it has to
        self.outcome: Any = None  # a decision, or an error to raise


class Heard(NamedTuple):
    """A denial, of a ticket or of one in front of it: when it came, and before when it isn't the ticket's turn."""

    denial: Decision
    at: float
    until: float


def refusal(limiter: Limiter, key: Key, ticket: Ticket, heard: Heard | None, now: float) -> Exception:
    """Word the error of a ticket that is given up now. heard: the last denial; None: nothing was heard in time."""
    try:
        entry = limiter._entry_of(key, ticket.rule, ticket.cost)
        entries = limiter._by_several.entries(key, ticket.rule)
    except InvalidRequest as error:  # its rule was changed, or removed, meanwhile
        return error
    costs: tuple[int, ...] = getattr(entry, "costs", (entry.cost,))  # of several limits each has its own
    found = [each.costing(cost) for each, cost in zip(entries, costs, strict=True)]
    if heard is None:
        wait_us = ceil(max(ticket.timeout_s, STEP_S) * 1e6)
        return RateLimitExceeded(found[0].decided("overload", False, 0, wait_us, wait_us))
    decision = heard.denial
    retry_us = max(1, ceil((heard.until - now) * 1e6))
    reset_us = max(retry_us, decision.reset_after_us - int((now - heard.at) * 1e6))
    binding = next((each for each in found if each.rule.name == decision.rule), found[0])
    return RateLimitExceeded(binding.decided(decision.source, False, decision.remaining, retry_us, reset_us))
