"""What the logs of a fleet hold: how long the slowest call took, when normal decisions came back, and by how much promises were exceeded.

**In time** is judged fairly and reported raw: from a call's time is taken what its own loop was late by meanwhile (a timer of 5 ms
that came later than 2 ms after its time): on a busy machine nothing in the process ran then, and where its own CPU kept the loop, more
than 50 ms of that are a problem of their own. Both figures are kept.

**Over** is counted by brackets (ratethrottle/testing/intervals.py): only what is certainly too much, whatever the true instants.
What Redis granted must keep the promise by itself, over all intervals, those that span the fault included: what is admitted while
Redis is away is charged on return, and what an empty Redis forgot is asserted before it is asked. What `m` of `N` processes
admitted by themselves must keep m/N of it. Together that is the promise · (1 + m/N) of docs/guarantees.md, and it is stricter than
their sum. And what was admitted by policy must keep the promise together with what Redis granted after all processes had come back:
that it was charged.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

from ratethrottle import RateThrottleRule
from ratethrottle.testing.intervals import STRETCH, Bracketed, most_in
from tests.faults.records import ERRORS, Call, Held, Log
from tests.faults.uses import UNCOUNTED

GRACE_US = 50_000
STEADY_US = 1_000_000  # by so much before the end everything is normal again
BUCKETS = ("token_bucket", "leaky_bucket")
LEARN_US = 750_000  # within it of each other all charge what they owe: the first at once, others at their turn
CHUNK_US = 20_000_000  # two windows of the rules in use
GROWTH_FILES = 2  # while running; after `aclose` none at all


@dataclass
class Verdict:
    """What was measured of a row, and what is wrong with it."""

    row: str
    slowest_us: int = 0
    slowest_fair_us: int = 0
    healed_us: int | None = None
    over: float | None = None
    admitted: Counter[str] = field(default_factory=Counter)
    told: int = 0  # log lines, events, errors and reprs that were searched for secrets
    limits: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    skipped: str = ""

    @property
    def word(self) -> str:
        """PASS, FAIL or SKIP."""
        return "FAIL" if self.problems else "SKIP" if self.skipped else "PASS"

    def expect(self, true: object, otherwise: str) -> None:
        """Take note of a problem unless it is true."""
        if not true:
            self.problems.append(otherwise)


def excess(rule: RateThrottleRule, admissions: Iterable[Bracketed], share: Fraction = Fraction(1)) -> Fraction:
    """The most units by which any interval certainly exceeds `share` of the rule's promise; 0 when none does. In O(n²) then."""
    log = sorted(admissions, key=lambda admission: admission[1])
    if rule.strategy in BUCKETS and not may_exceed(rule, log, share):
        return Fraction(0)
    ends = [after_us for _, after_us, _ in log]
    most, least = Fraction(0), rule.capacity * share  # no interval's promise is below the capacity
    # Where none shorter than a window is over, no longer one is, but for calls that took that long.
    longest_us = rule.window_us if rule.strategy == "sliding_window" else ends[-1] if ends else 0
    total = sum(units for *_, units in log)
    for begin_us in sorted({before_us for before_us, _, _ in log}):
        if total <= least + most:
            break
        units = 0
        for place in range(bisect_left(ends, begin_us), len(log)):
            before_us, after_us, more = log[place]
            if after_us - begin_us > longest_us:
                break
            if before_us < begin_us:
                continue
            units += more
            if units > least + most:
                most = max(most, units - share * most_in(rule, (after_us - begin_us) * STRETCH))
    return most


def may_exceed(rule: RateThrottleRule, log: Sequence[Bracketed], share: Fraction) -> bool:
    """Whether a bucket might be exceeded: as if all that ended in an interval had begun in it. In O(n), in integers; `log` by ends.

    An interval's units are those of a run of the log at most, and it is as long as from the run's first beginning to its end at least.
    """
    unit = share.denominator * STRETCH.denominator * rule.window_us  # in parts, of which a unit is so many
    rate = share.numerator * STRETCH.numerator * rule.limit  # parts in a µs
    capacity = share.numerator * STRETCH.denominator * rule.window_us * rule.capacity
    total, least = 0, math.inf
    for before_us, after_us, more in log:
        least = min(least, total - rate * before_us)
        total += more * unit
        if total - rate * after_us - least > capacity:
            return True
    return False


def excess_of_long(rule: RateThrottleRule, admissions: Iterable[Bracketed], share: Fraction = Fraction(1)) -> Fraction:
    """The same for a log of any length: intervals of up to CHUNK_US each, longer ones where both ends are multiples of it."""
    log = sorted(admissions)
    if not log or log[-1][1] - log[0][0] <= 2 * CHUNK_US:
        return excess(rule, log, share)
    most = Fraction(0)
    # Each chunk overlaps half of the next, so that no short interval is cut.
    grid = range(log[0][0], log[-1][1], CHUNK_US)
    units = [0] * len(grid)
    for number, start_us in enumerate(grid):
        low, high = (bisect_left(log, (at_us,)) for at_us in (start_us, start_us + 2 * CHUNK_US))
        most = max(most, excess(rule, log[low:high], share))
        units[number] = sum(more for _, after_us, more in log[low:high] if after_us <= start_us + CHUNK_US)
    if rule.strategy != "sliding_window":
        for first in range(len(grid)):
            total = 0
            for last in range(first, len(grid)):
                total += units[last]
                most = max(most, total - share * most_in(rule, (last + 1 - first) * CHUNK_US * STRETCH))
    return most


def over(rules: Sequence[RateThrottleRule], calls: Iterable[Call], cut: Fraction, *, local: bool) -> float:
    """The most by which any key went over what docs/guarantees.md allows, where `cut` of the processes were cut off."""
    granted: defaultdict[tuple[int, int, bool], list[Bracketed]] = defaultdict(list)
    calls = list(calls)
    for call in calls:
        if call.allowed and rules[call.rule].name not in UNCOUNTED:
            granted[call.rule, call.key, call.kind == "outage"].append((call.before_us, call.after_us, 1))
    most = Fraction(0)
    for number, log, spread_us in charged(rules, calls) if local else ():
        rule = rules[number]
        # What the first one has charged drains by the whole rate, while others still admit by their share of it.
        drained = spread_us * Fraction(rule.limit, rule.window_us) if rule.strategy in BUCKETS else 0
        most = max(most, excess(rule, log) - drained)
    for (rule, _, by_policy), log in granted.items():
        if by_policy and not local:
            continue  # what `allow` admits is not limited, and what `deny` admits is a problem of its own
        most = max(most, excess_of_long(rules[rule], log, cut if by_policy else Fraction(1)))
    return float(most)


def charged(rules: Sequence[RateThrottleRule], calls: Iterable[Call]) -> Iterator[tuple[int, list[Bracketed], int]]:
    """For each outage and key: what policies admitted, and what Redis granted from when all were back until anybody was away again.

    With the rule's number before it, and behind it for how long at most some had charged what they owed and others not yet. A process
    is back once it has asked Redis again and had an answer: it does so when everything that it owed has been charged.
    """
    away: dict[int, int] = {}  # when each process that isn't back had its last decision by policy
    admitted: defaultdict[tuple[int, int], list[Bracketed]] = defaultdict(list)
    returned_us: int | None = None
    first_us: int | None = None
    spread_us = 0
    for call in sorted(calls, key=lambda call: call.after_us):
        counts = call.allowed and rules[call.rule].name not in UNCOUNTED
        if call.kind == "outage":
            if returned_us is not None:  # another outage
                for (rule, _), log in admitted.items():
                    yield rule, log, spread_us
                admitted.clear()
                returned_us = first_us = None
            away[call.process] = call.after_us
            if counts:
                admitted[call.rule, call.key].append((call.before_us, call.after_us, 1))
        elif call.kind == "redis":
            if away and call.before_us >= away.get(call.process, call.before_us + 1):
                del away[call.process]
                first_us = first_us or call.after_us
                returned_us = None if away else call.after_us
                spread_us = call.after_us - first_us + LEARN_US
            elif counts and returned_us is not None and call.before_us >= returned_us and (call.rule, call.key) in admitted:
                admitted[call.rule, call.key].append((call.before_us, call.after_us, 1))
    if returned_us is not None:
        for (rule, _), log in admitted.items():
            yield rule, log, spread_us


def most_held(slots: Iterable[Held]) -> int:
    """The most slots of one key that were surely held at one instant."""
    held: Counter[int] = Counter()
    most = 0
    ends = [(at_us, change, slot.key) for slot in slots for at_us, change in ((slot.began_us, 1), (slot.ended_us, -1))]
    for _, change, key in sorted(ends):  # at one instant the one that ends comes first
        held[key] += change
        most = max(most, held[key])
    return most


def late_us(log: Log, before_us: int, after_us: int) -> int:
    """For how long the loop was late between two instants."""
    return sum(max(0, min(after_us, woke) - max(before_us, due)) for due, woke in log.late)


def slowest(logs: Iterable[Log]) -> tuple[int, int]:
    """The longest call as it was, and the longest after taking away what its loop was late by."""
    raw = fair = 0
    for log in logs:
        for call in sorted(log.calls, key=lambda call: call.before_us - call.after_us):
            took_us = call.after_us - call.before_us
            raw = max(raw, took_us)
            if took_us <= fair:
                break
            fair = max(fair, took_us - late_us(log, call.before_us, call.after_us))
    return raw, fair


def healed_us(
    logs: Iterable[Log], faults: Iterable[tuple[int, int]], killed: Container[int] = (), within_us: int = 0
) -> list[int | None]:
    """How long after the end of each fault the last process had a normal decision again; None if one never had.

    killed: processes that were. Each is asked of faults that ended while it lived, if it lived for `within_us` more.
    """
    processes = []  # when each one began, for how long it can be asked, and when it had its normal decisions
    for log in logs:
        normal = sorted(call.after_us for call in log.calls if call.kind == "redis")
        times = [call.before_us for call in log.calls]
        until_us = max(times, default=0) - within_us if log.process in killed else math.inf
        processes.append((min(times, default=0), until_us, normal))
    healed: list[int | None] = []
    for _, ended_us in faults:
        after = [normal[bisect_left(normal, ended_us) :][:1] for began, until, normal in processes if began <= ended_us <= until]
        healed.append(max((first[0] - ended_us for first in after), default=None) if all(after) else None)
    return healed


def attempts_over(log: Log, began_us: int, ended_us: int) -> float:
    """By how many the attempts to connect between two instants exceed two a second, the one at once after the loss apart."""
    times = [at_us for at_us, _ in sorted(log.connects) if began_us <= at_us < ended_us]
    worst = 0.0
    for place, at_us in enumerate(times):
        for end in range(place + 2, len(times)):  # what came in any interval of a second or more
            length_s = (times[end] - at_us) / 1e6
            if length_s >= 1 or end == len(times) - 1:
                worst = max(worst, end - place + 1 - 2 - 2 * max(1.0, length_s))
    return worst


def share_slower(calls: Sequence[Call], logs: Sequence[Log], limit_us: int) -> float:
    """The share of calls that took longer than that, what their loops were late by taken away."""
    by_process = {log.process: log for log in logs}
    slow = sum(
        call.after_us - call.before_us - late_us(by_process[call.process], call.before_us, call.after_us) > limit_us
        for call in calls
        if call.after_us - call.before_us > limit_us
    )
    return slow / max(1, len(calls))


def between(logs: Iterable[Log], began_us: int, ended_us: int) -> list[Call]:
    """The calls that began between two instants, in the order in which they ended."""
    calls = [call for log in logs for call in log.calls if began_us <= call.before_us < ended_us]
    return sorted(calls, key=lambda call: call.after_us)


def kinds(calls: Iterable[Call]) -> Counter[str]:
    """How many calls ended how."""
    return Counter(call.kind for call in calls)


def errors(calls: Iterable[Call]) -> Counter[str]:
    """How many calls ended with which error."""
    return Counter(call.kind for call in calls if call.kind in ERRORS)


def first_at_us(calls: Sequence[Call], kind: str, began_us: int) -> int | None:
    """When after an instant a call ended so for the first time. `calls` as `between` gives them."""
    place = bisect_left(calls, began_us, key=lambda call: call.after_us)
    return next((call.after_us - began_us for call in calls[place:] if call.kind == kind), None)
