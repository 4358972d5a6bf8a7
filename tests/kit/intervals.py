"""The interval checker: holds every admission of a key against the rule's promise, over all intervals.

Two kinds of log. Where the clock of record is known (a fake clock, or a server's), an admission is an instant, and the check
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
from fractions import Fraction
from itertools import pairwise

from ratethrottle import RateThrottleRule
from tests.kit.oracle import window_start

Admission = tuple[int, int]  # us, units
Bracketed = tuple[int, int, int]  # us before the call, us after the reply, units
STRETCH = Fraction(1_001, 1_000)  # an NTP daemon slews a clock by at most half as much


class PromiseBrokenError(AssertionError):
    """More was admitted in some interval than the rule allows."""


def check(rule: RateThrottleRule, admissions: Iterable[Admission]) -> None:
    """Raise PromiseBrokenError unless the admissions, at their true instants, keep the rule's promise in every interval."""
    log = sorted(admissions)
    if rule.strategy.endswith("bucket"):
        check_bucket(rule, log)
    elif rule.strategy == "sliding_window":
        check_window(rule.window_us, rule.limit, log)
    else:
        check_aligned(rule, log)
        # Two aligned windows touch any interval of this length: nothing above twice the limit, and the counter stays below.
        check_window(rule.window_us, 2 * rule.limit - (rule.strategy == "sliding_counter"), log)


def check_window(window_us: int, most: int, log: list[Admission]) -> None:
    """At most `most` units in every interval [t, t + window): those that begin with an admission are the fullest."""
    first = units = 0
    for at_us, more in log:
        units += more
        while log[first][0] <= at_us - window_us:
            units -= log[first][1]
            first += 1
        if units > most:
            raise PromiseBrokenError(f"{units} units, not {most}, in the {window_us} us from {log[first][0]} to {at_us}")


def check_bucket(rule: RateThrottleRule, log: list[Admission]) -> None:
    """At most burst + rate·t units in every interval of length t, for the rule's own rate in rational numbers.

    In O(n): the worst interval that ends with an admission extends the worst one that ends with the admission before it, or
    begins anew (Kadane). Its excess is counted in 1/window of a unit.
    """
    excess, began = 0, 0
    for (before_us, _), (at_us, units) in pairwise([(0, 0), *log]):
        excess -= (at_us - before_us) * rule.limit
        if excess <= 0:
            excess, began = 0, at_us
        excess += units * rule.window_us
        if excess > rule.capacity * rule.window_us:
            over = float(Fraction(excess, rule.window_us) - rule.capacity)
            raise PromiseBrokenError(f"{over:g} units more than {rule.capacity} and the refill between {began} and {at_us}")


def check_aligned(rule: RateThrottleRule, log: list[Admission]) -> None:
    """At most `limit` in each aligned window; for a counter together with what is left of the one before."""
    windows: Counter[int] = Counter()
    for at_us, units in log:
        start_us = window_start(rule.window_us, at_us)
        windows[start_us] += units
        held = Fraction(windows[start_us])
        # A coarse counter rounds elapsed time down, so that it counts no less than this.
        if rule.strategy == "sliding_counter":
            held += min(rule.limit, windows[start_us - rule.window_us]) * (1 - Fraction(at_us - start_us, rule.window_us))
        if held > rule.limit:
            raise PromiseBrokenError(f"{float(held):g} units, not {rule.limit}, counted at {at_us} in the window from {start_us}")


def most_in(rule: RateThrottleRule, length_us: Fraction) -> Fraction | int:
    """The most units that the rule's promise allows in any interval [a, a + length]."""
    if rule.strategy.endswith("bucket"):
        return rule.capacity + length_us * Fraction(rule.limit, rule.window_us)
    whole = int(length_us // rule.window_us) + 1
    # An interval that is shorter than `whole` windows touches one aligned window more than that.
    return whole * rule.limit if rule.strategy == "sliding_window" else (whole + 1) * rule.limit


def check_bracketed(rule: RateThrottleRule, admissions: Iterable[Bracketed]) -> None:
    """Raise PromiseBrokenError if no true instants within the brackets could keep the promise in every interval.

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
            if units > rule.capacity and units > most_in(rule, (after_us - begin_us) * STRETCH):
                raise PromiseBrokenError(f"{units} units certainly between {begin_us} and {after_us}, {after_us - begin_us} us")
