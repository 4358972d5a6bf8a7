"""`assert_promise`: whether what a limiter admitted keeps what its rule promises."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime, timedelta
from fractions import Fraction
from typing import Any, Literal, NamedTuple

from ratethrottle._engine.decision import Decision
from ratethrottle.errors import ConfigurationError
from ratethrottle.errors import shown as shown_value
from ratethrottle.rule import RateThrottleRule
from ratethrottle.testing.intervals import (
    Breach,
    PromiseBrokenError,
    breach_at_instants,
    breach_in_brackets,
    seconds,
    shown,
)

Time = float | timedelta | datetime
Unit = Literal["s", "us"]
MICROSECOND = timedelta(microseconds=1)
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
# Seconds after the year 5000 are µs that somebody took for seconds.
SECONDS_MOST = 10**11
SHOWN_ENTRIES = 12


class Entry(NamedTuple):
    """One entry of a log, read. times_us: its instant, or from when to when it was."""

    number: int
    times_us: tuple[int, ...]
    cost: int
    allowed: bool


def assert_promise(log: Iterable[Sequence[Any]], rule: RateThrottleRule, *, unit: Unit = "s") -> None:
    """Fail unless the log of one key keeps the rule's promise, in every interval of any length.

    log: entries in any order. Each is (time, cost), (time, cost, allowed) or (time, decision). What was denied doesn't count, nor does
    what a rule with enforce="flag" allowed over its limit. Leave out what was charged, since nobody was asked for it. Of a reservation put
    in the estimate, or what was settled if that is less, at the time at which its block began.
    time: seconds, a timedelta or an aware datetime; integer µs with unit="us". For `fixed_window` and `sliding_counter`, whose windows
    begin at certain times of day, it is Unix time, as a ManualClock says it.

    Raises PromiseBrokenError, an AssertionError, which says where the promise breaks; ConfigurationError for an entry that isn't one, and
    for a log without entries.
    """
    __tracebackhide__ = True
    _assert(_entries(log, rule, 1, unit), rule, breach_at_instants)


def assert_promise_between(log: Iterable[Sequence[Any]], rule: RateThrottleRule, *, unit: Unit = "s") -> None:
    """Fail if the log of one key can't have kept the rule's promise, whenever exactly each check was decided.

    log: as for `assert_promise`, but each entry begins with two times: just before the check, and just after. It is for a real server,
    whose clock isn't that of the test. It accuses nobody wrongly, and misses no more than what passes while a check is under way.

    Raises PromiseBrokenError, an AssertionError, and ConfigurationError.
    """
    __tracebackhide__ = True
    _assert(_entries(log, rule, 2, unit), rule, breach_in_brackets)


def _assert(
    entries: list[Entry], rule: RateThrottleRule, find: Callable[[RateThrottleRule, Iterable[Any]], Breach | None]
) -> None:
    __tracebackhide__ = True
    breach = find(rule, [(*entry.times_us, entry.cost) for entry in entries if entry.allowed])
    if breach is not None:
        raise PromiseBrokenError(_told(breach, rule, entries), breach)


def _told(breach: Breach, rule: RateThrottleRule, entries: list[Entry]) -> str:
    """Say where it breaks, and by which entries."""
    within = [
        entry for entry in entries if entry.allowed and breach.from_us <= entry.times_us[0] and entry.times_us[-1] <= breach.to_us
    ]
    burst = f", burst {rule.burst}" if rule.burst is not None else ""
    when = f"from {seconds(breach.from_us)} to {seconds(breach.to_us)}, in {seconds(breach.to_us - breach.from_us)}"
    promised = f"rule {rule.name!r} ({rule.strategy}, {rule.limit} per {seconds(rule.window_us)}{burst})"
    lines = [f"{promised} breaks its promise: {shown(breach.units)} units {when}; {breach.why}"]
    for entry in within[:SHOWN_ENTRIES]:
        when = " to ".join(map(seconds, entry.times_us))
        lines.append(f"  entry {entry.number} of the log: {entry.cost} at {when}")
    if len(within) > SHOWN_ENTRIES:
        lines.append(f"  and {len(within) - SHOWN_ENTRIES} more")
    return "\n".join(lines)


def _entries(log: Iterable[Sequence[Any]], rule: RateThrottleRule, times: int, unit: Unit) -> list[Entry]:
    if not isinstance(rule, RateThrottleRule):
        raise ConfigurationError(f"rule is {shown_value(rule)}; it is a RateThrottleRule")
    if rule.enforce == "off":
        raise ConfigurationError(f'rule {rule.name!r} has enforce="off", and promises nothing')
    if unit not in {"s", "us"}:
        raise ConfigurationError(f'unit is {shown_value(unit)}; it is "s" or "us"')
    read = []
    for number, given in enumerate(log):
        try:
            read.append(_entry(number, given, rule, times, unit))
        except ConfigurationError as error:
            raise ConfigurationError(f"entry {number} of the log is {shown_value(given)}: {error}") from None
    if not read:
        raise ConfigurationError("the log is empty, which proves nothing; was it read before, or does the test make no checks?")
    return read


def _entry(number: int, given: Sequence[Any], rule: RateThrottleRule, times: int, unit: Unit) -> Entry:
    form = "(time, " if times == 1 else "(before, after, "
    if isinstance(given, (str, bytes)) or not isinstance(given, Sequence) or not times < len(given) <= times + 2:
        raise ConfigurationError(f"it is {form}cost), {form}cost, allowed) or {form}decision)")
    times_us = tuple(_micros(time, unit) for time in given[:times])
    if times_us[0] > times_us[-1]:
        raise ConfigurationError("it ends before it begins")
    what, *allowed = given[times:]
    if isinstance(what, Decision):
        if allowed:
            raise ConfigurationError("a decision says itself whether it was allowed")
        return Entry(number, times_us, *_charged(what, rule))
    if isinstance(what, bool) or not isinstance(what, int) or what < 1:
        raise ConfigurationError(f"its cost is {shown_value(what)}; it is a whole number from 1 on, or a Decision")
    if allowed and not isinstance(allowed[0], bool):
        raise ConfigurationError(f"whether it was allowed is {shown_value(allowed[0])}; it is True or False")
    return Entry(number, times_us, what, all(allowed))


def _charged(decision: Decision, rule: RateThrottleRule) -> tuple[int, bool]:
    """Find what a decision cost under the rule, and whether it was charged: of a joint one the part with the rule's name."""
    parts = decision.parts or (decision,)
    if not decision.parts and decision.rule != rule.name:
        raise ConfigurationError(f"the decision is of rule {decision.rule!r}, not of {rule.name!r}")
    part = next((part for part in parts if part.rule == rule.name), None)  # an alternative may have paid instead
    return (part.cost, decision.allowed and not part.over) if part is not None else (0, False)


def _micros(time: Time, unit: Unit) -> int:
    """Give a time in µs."""
    if isinstance(time, datetime):
        if time.tzinfo is None:
            raise ConfigurationError("a datetime needs a time zone, such as datetime.now(UTC)")
        return (time - EPOCH) // MICROSECOND
    if isinstance(time, timedelta):
        return time // MICROSECOND
    if unit == "us":
        if isinstance(time, bool) or not isinstance(time, int):
            raise ConfigurationError(f"a time in µs is a whole number, not {shown_value(time)}")
        return time
    if isinstance(time, bool) or not isinstance(time, (int, float, Fraction)) or not math.isfinite(time):
        raise ConfigurationError(f"a time is seconds, a timedelta or a datetime, not {shown_value(time)}")
    if abs(time) > SECONDS_MOST:
        raise ConfigurationError(f'{shown_value(time)} is a time in µs, it seems; pass unit="us"')
    return round(Fraction(time) * 1_000_000)
