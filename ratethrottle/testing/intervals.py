"""The interval checker: holds every admission of a key against the rule's promise, over all intervals.

Two kinds of log. Where the clock of record is known (a test's clock, or the server's), an admission is an instant, and the check
is exact, in O(n log n). Where only the caller's clock is, an admission has a bracket: it took place somewhere between just
before the call and just after the reply. Then only what must be wrong is reported: whatever the true instants are, all
admissions whose brackets lie within [a, b] took place within [a, b], so their units must fit the promise for an interval of
that length. Counting brackets that only touch the interval could accuse a limiter that did nothing wrong; leaving them out
can only miss an excess, by at most what passes in one call's time. The caller's clock and the server's differ by an offset,
which no length depends on, and in speed, which STRETCH allows for.

The promises are those of docs/guarantees.md: no tolerance for slots, which hold a unit longer, never shorter.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

from ratethrottle.rule import RateThrottleRule

Admission = tuple[int, int]  # us, units
Bracketed = tuple[int, int, int]  # us before the call, us after the reply, units
STRETCH = Fraction(1_001, 1_000)  # an NTP daemon slews a clock by at most half as much
WEEK_US = 7 * 86_400 * 10**6
MONDAY_US = -3 * 86_400 * 10**6  # 1969-12-29
HOUR_US = 3_600 * 10**6
SHORTEST_US = {"day": 23 * HOUR_US, "week": 167 * HOUR_US, "month": (28 * 24 - 1) * HOUR_US}  # of windows by the calendar


@dataclass(frozen=True, slots=True)
class Breach:
    """More than promised: so many units in a closed interval, in µs. why: what was promised, and of which time."""

    units: Fraction | int
    most: Fraction | int
    from_us: int
    to_us: int
    why: str


class PromiseBrokenError(AssertionError):
    """More was admitted in some interval than the rule allows. `breach` says how much, and when."""

    def __init__(self, message: str, breach: Breach) -> None:
        """Say it, with the facts beside it."""
        super().__init__(message)
        self.breach = breach


def check(rule: RateThrottleRule, admissions: Iterable[Admission]) -> None:
    """Raise PromiseBrokenError unless the admissions, at their true instants, keep the rule's promise in every interval."""
    _raise(breach_at_instants(rule, admissions))


def check_bracketed(rule: RateThrottleRule, admissions: Iterable[Bracketed]) -> None:
    """Raise PromiseBrokenError if no true instants within the brackets could keep the promise in every interval."""
    _raise(breach_in_brackets(rule, admissions))


def _raise(breach: Breach | None) -> None:
    if breach is not None:
        raise PromiseBrokenError(
            f"{shown(breach.units)} units between {breach.from_us} and {breach.to_us} us: {breach.why}", breach
        )


def shown(units: Fraction | int) -> str:
    """Give a number of units as a message shows it."""
    return f"{float(units):.12g}"


def seconds(us: int) -> str:
    """Give a time as a message shows it."""
    return f"{us / 1_000_000:.14g} s"


def capacity_of(rule: RateThrottleRule) -> int:
    """Say how many units the rule promises at once. With leases a bucket grants less, and promises the same."""
    return rule.limit if rule.burst is None else rule.burst


def window_start(window_us: int, at_us: int) -> int:
    """Where the aligned window began that an instant is in; those of whole weeks begin on a Monday, UTC."""
    monday_us = 0 if window_us % WEEK_US else MONDAY_US
    return monday_us + (at_us - monday_us) // window_us * window_us


def shortest_us(rule: RateThrottleRule) -> int:
    """Give the length of a rule's window; of one by the calendar that of the shortest."""
    return SHORTEST_US[rule.window] if isinstance(rule.window, str) else rule.window_us


def window_of(rule: RateThrottleRule, at_us: int) -> int:
    """Where a rule's aligned window began that an instant is in."""
    calendar = rule.compiled.calendar
    return window_start(rule.window_us, at_us) if calendar is None else calendar.around(at_us)[1]


def breach_at_instants(rule: RateThrottleRule, admissions: Iterable[Admission]) -> Breach | None:
    """Find where admissions, at their true instants, break the rule's promise; None if they keep it in every interval."""
    log = sorted(admissions)
    if not rule.limit:
        return Breach(log[0][1], 0, log[0][0], log[0][0], "a limit of 0 admits nothing") if log else None
    if rule.strategy.endswith("bucket"):
        return _in_bucket(rule, log)
    if rule.strategy == "sliding_window":
        return _in_window(rule.window_us, rule.limit, log)
    # Two aligned windows touch any interval of this length: nothing above twice the limit, and the counter stays below.
    most = 2 * rule.limit - (rule.strategy == "sliding_counter")
    return _in_aligned(rule, log) or _in_window(shortest_us(rule), most, log)


def _in_window(window_us: int, most: int, log: list[Admission]) -> Breach | None:
    """At most `most` units in every interval [t, t + window): those that begin with an admission are the fullest."""
    first = units = 0
    for at_us, more in log:
        units += more
        while log[first][0] <= at_us - window_us:
            units -= log[first][1]
            first += 1
        if units > most:
            return Breach(units, most, log[first][0], at_us, f"at most {most} in any {seconds(window_us)}")
    return None


def _in_bucket(rule: RateThrottleRule, log: list[Admission]) -> Breach | None:
    """At most burst + rate·t units in every interval of length t, for the rule's own rate in rational numbers.

    In O(n): the worst interval that ends with an admission extends the worst one that ends with the admission before it, or
    begins anew (Kadane). Its excess is counted in 1/window of a unit.
    """
    excess, began_us = 0, 0
    for (before_us, _), (at_us, units) in pairwise([(0, 0), *log]):
        excess -= (at_us - before_us) * rule.limit
        if excess <= 0:
            excess, began_us = 0, at_us
        excess += units * rule.window_us
        if excess > capacity_of(rule) * rule.window_us:
            most = capacity_of(rule) + Fraction((at_us - began_us) * rule.limit, rule.window_us)
            used = sum(more for other_us, more in log if began_us <= other_us <= at_us)
            rate = f"{rule.limit} per {seconds(rule.window_us)}"
            return Breach(
                used, most, began_us, at_us, f"at most {shown(most)}, a burst of {capacity_of(rule)} and {rate} since then"
            )
    return None


def _in_aligned(rule: RateThrottleRule, log: list[Admission]) -> Breach | None:
    """At most `limit` in each aligned window; for a counter together with what is left of the one before."""
    windows: Counter[int] = Counter()
    for at_us, units in log:
        start_us = window_of(rule, at_us)
        windows[start_us] += units
        held, why = Fraction(windows[start_us]), f"at most {rule.limit} in the window from {seconds(start_us)}"
        # A coarse counter rounds elapsed time down, so that it counts no less than this.
        if rule.strategy == "sliding_counter":
            held += min(rule.limit, windows[start_us - rule.window_us]) * (1 - Fraction(at_us - start_us, rule.window_us))
            why += ", with what still counts of the one before"
        if held > rule.limit:
            return Breach(held, rule.limit, start_us, at_us, why)
    return None


def most_in(rule: RateThrottleRule, length_us: Fraction) -> Fraction | int:
    """Say how many units the rule's promise allows in any interval [a, a + length]."""
    if not rule.limit:
        return 0
    if rule.strategy.endswith("bucket"):
        return capacity_of(rule) + length_us * Fraction(rule.limit, rule.window_us)
    whole = int(length_us // shortest_us(rule)) + 1
    # An interval that is shorter than `whole` windows touches one aligned window more than that.
    return whole * rule.limit if rule.strategy == "sliding_window" else (whole + 1) * rule.limit


def breach_in_brackets(rule: RateThrottleRule, admissions: Iterable[Bracketed]) -> Breach | None:
    """Find where admissions break the promise, whatever their true instants within the brackets are; None if they may keep it.

    In O(n²): for each beginning, all ends at which an admission was certainly over.
    """
    log = sorted(admissions, key=lambda admission: admission[1])
    for begin_us in sorted({before_us for before_us, _, _ in log}):
        units = 0
        for before_us, after_us, more in log:
            if before_us < begin_us:
                continue
            units += more
            # Cheap first: the promise for an interval is never below the capacity.
            if units > capacity_of(rule) and units > (most := most_in(rule, (after_us - begin_us) * STRETCH)):
                return Breach(units, most, begin_us, after_us, f"at most {shown(most)} in any {seconds(after_us - begin_us)}")
    return None
