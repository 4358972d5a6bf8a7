"""The specification: what each strategy promises, read from a log of admissions in rational time.

`Account.held` says what one definition of a rule counts at an instant, and all that a decision reports follows from it: a
check is allowed if held + cost ≤ capacity, retry is the first instant at which it would be, reset the first at which nothing
is held. The instants are searched for, not calculated: the core and the script have formulas, this file has the promise.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from calendar import monthrange
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from datetime import UTC, date, datetime, timedelta
from fractions import Fraction
from functools import cache
from math import ceil, floor
from zoneinfo import ZoneInfo

from ratethrottle._engine.definitions import CompiledRule
from ratethrottle.testing.intervals import window_start

Answer = tuple[bool, int, int, int]  # allowed, remaining, retry_us (-1: never), reset_us
EXACT = 65  # units that a window without slots remembers: its limit is smaller
DRAIN_US_MAX = 2**50  # no bucket takes longer, with as much debt as it may have, and as much that is booked
LEVEL_MAX = 2**53 - 1  # ticks: no more can be counted


def definition(rule: CompiledRule) -> tuple[str, int, int]:
    """What an account depends on: a rule whose limit or burst alone has changed reads the very same one."""
    return (rule.kind, *((rule.unit_ticks, rule.drain_ticks) if rule.kind == "b" else (rule.window_us, rule.slot_us)))


@cache
def day_of(spec: tuple[str, str, int], seconds: int) -> date:
    """The first day of the calendar's window that a clock on the wall shows at an instant."""
    unit, timezone, anchor = spec
    day = datetime.fromtimestamp(seconds, UTC).astimezone(ZoneInfo(timezone)).date()
    if unit == "week":
        return day - timedelta(days=(day.isoweekday() - anchor) % 7)
    if unit == "month":
        before = date(day.year - (day.month == 1), day.month - 1 or 12, 1)
        months = [
            first.replace(day=min(anchor, monthrange(first.year, first.month)[1])) for first in (before, day.replace(day=1))
        ]
        return months[months[1] <= day]
    return day


@cache
def next_window(spec: tuple[str, str, int], since: int) -> int:
    """When the wall shows another window for the first time, after this one's beginning. In seconds."""
    until = since
    while day_of(spec, until) == day_of(spec, since):
        until += 3_600
    return bisect_left(range(until), True, until - 3_600, key=lambda at: day_of(spec, at) > day_of(spec, since))


WINDOWS: defaultdict[tuple[str, str, int], list[int]] = defaultdict(list)  # what is known of each calendar, in order


def calendar_window(rule: CompiledRule, at: int) -> tuple[int, int]:
    """The window of a calendar that an instant is in, looked for on the wall: from when to when."""
    assert rule.calendar is not None
    spec, second = rule.calendar.spec, at // 10**6
    known = WINDOWS[spec]
    if not known or not known[0] <= second < known[-1]:
        # From a window before on, so that this one's beginning is found too.
        known[:] = [next_window(spec, second - 40 * 86_400)]
        while known[-1] <= second + 100 * 86_400:
            known.append(next_window(spec, known[-1]))
    i = bisect_right(known, second)
    if i == len(known):
        known.append(next_window(spec, known[-1]))
    return known[i - 1] * 10**6, known[i] * 10**6


class Account:
    """A log of (the instant it counts from, units), oldest first, as one definition of a rule reads it."""

    def __init__(self, rule: CompiledRule, log: list[tuple[int, int | Fraction]], seen: int) -> None:
        self.rule, self.log, self.seen = rule, log, seen  # seen: the newest instant that the log knows of

    def copy(self) -> Account:
        """Another one of the same."""
        return Account(self.rule, self.log, self.seen)

    def bring(self, now: int) -> None:
        """Bring it to now, for its own definition."""

    def held(self, rule: CompiledRule) -> Callable[[int], Fraction | int]:
        """What counts at an instant from `seen` on, in units, for a rule that reads this account."""
        window, capacity = rule.window_us, rule.capacity
        if rule.kind == "b":
            # In every interval that begins with an admission at s and ends at t: units ≤ capacity + rate·(t − s). What is held
            # is the most that one of them owes, units − rate·(t − s). (In ticks, 1/unit_ticks of a unit, to stay in integers.)
            units, most = 0, 0
            for at, more in reversed(self.log):
                units += more
                most = max(most, units * rule.unit_ticks + at * rule.drain_ticks)
            return lambda t: Fraction(max(0, most - t * rule.drain_ticks), rule.unit_ticks)
        if rule.kind == "s":
            return lambda t: sum(units for at, units in self.log if at + window > t)
        # The latest window stands, also for a clock that has stepped back out of it: what comes before it counts in it.
        by_window, stands = Counter[int](), self.stands
        for at, units in self.log:
            by_window[window_start(window, at)] += units
        if rule.kind == "f":
            return lambda t: by_window[window_start(window, max(t, stands))]
        # The units of the window before are taken to have come evenly; time within the window is read in steps of coarse_us.
        steps = ceil(Fraction(window, rule.coarse_us))

        def estimate(t: int) -> Fraction:
            t = max(t, stands)
            start = window_start(window, t)
            return min(capacity, by_window[start]) + Fraction(
                min(capacity, by_window[start - window]) * (steps - (t - start) // rule.coarse_us), steps
            )

        return estimate

    def instants(self, now: int) -> Sequence[int]:
        """Where what is held can change, from now on, in order."""
        window = self.rule.window_us
        if self.rule.kind == "s":
            return [now, *(at + window for at, _ in self.log if at + window > now)]
        if self.rule.kind == "f":
            then = max(now, self.stands)
            return [now, window_start(self.rule.window_us, then) + window]
        return range(now, now + (DRAIN_US_MAX if self.rule.kind == "b" else 3 * window) + 1)

    @property
    def stands(self) -> int:
        """Where the latest aligned window begins that this account has met."""
        return window_start(self.rule.window_us, self.seen)

    def slot_end(self, now: int) -> int:
        """The slot rule: a unit of slot k counts from (k + 1)·q to (k + 1)·q + window. Without slots, from now."""
        slot = self.rule.slot_us
        return (now // slot + 1) * slot if slot > 1 else now

    @property
    def reach(self) -> int:
        """How far ahead of now units may be: a process that took them ahead may still spend them then."""
        return self.rule.window_us // 8

    def counts_from(self, now: int) -> int:
        """Where units admitted now count from: none before those that came before it."""
        if self.rule.kind in ("c", "f"):
            return max(now, self.stands)
        return max(self.slot_end(now), self.log[-1][0] if self.log and self.rule.kind == "s" else 0)

    def rebase(self, now: int, own: bool) -> bool:
        """Bring back what lies too far ahead: the clock has stepped back, nothing has drained, and nobody is locked out."""
        if self.rule.kind == "s":
            head = self.slot_end(now + self.reach)
            moved = any(at > head for at, _ in self.log)
            self.log = [(min(at, head), units) for at, units in self.log]
            return moved
        # A bucket's log moves as a whole, that of aligned windows by whole windows; the next one may stand.
        grain = 1 if self.rule.kind == "b" else self.rule.window_us
        step = max(0, self.seen - now if self.rule.kind == "b" else self.stands - window_start(self.rule.window_us, now))
        if self.rule.kind in ("c", "f") and step == grain:
            return False
        self.log = [(at - step, units) for at, units in self.log]
        self.seen -= step
        return step > 0

    def living(self, now: int) -> list[tuple[int, int | Fraction]]:
        """What of the log still counts."""
        kind, window = self.rule.kind, self.rule.window_us
        if kind == "s":
            return [(at, units) for at, units in self.log if at + window > now]
        if kind == "b":
            return self.log if self.held(self.rule)(now) else []
        since = window_start(self.rule.window_us, max(now, self.stands)) - (kind == "c") * window
        return [(at, units) for at, units in self.log if at >= since]

    def used(self, now: int, taker: CompiledRule) -> int:
        """Units that another definition takes over."""
        return ceil(self.held(self.rule)(now)) if self.rule.kind == "b" else int(sum(units for _, units in self.living(now)))

    def in_window(self, now: int) -> int:
        """Units in the aligned window that stands, however many."""
        window, start = self.rule.window_us, window_start(self.rule.window_us, max(now, self.stands))
        return int(sum(units for at, units in self.log if window_start(window, at) == start))

    def give_back(self, now: int, units: int, granted: int) -> bool:
        """Take units out that were granted at that instant, as far as they count as such; whether there were any."""
        kind, window = self.rule.kind, self.rule.window_us
        if kind == "b":
            held = self.held(self.rule)(now)
            drained = Fraction(self.rule.drain_ticks * max(0, now - granted), self.rule.unit_ticks)
            left = held - min(held, max(0, units - drained))
            if left < held:
                self.log = [(now, left)] if left else []
            return left < held
        if kind == "s":
            if self.rule.slot_us == 1 and self.held(self.rule)(now) >= EXACT:
                return False  # these may be just those that it has forgotten
            these = [self.slot_end(granted) == at > now - window for at, _ in self.log]
        else:
            stands = window_start(window, max(now, self.stands))
            these = [window_start(window, granted) == window_start(window, at) == stands for at, _ in self.log]
        log: list[tuple[int, int | Fraction]] = []
        left = units
        for (at, held), is_one in zip(self.log, these, strict=True):
            log.append((at, held - min(held, left) if is_one else held))
            left -= min(held, left) if is_one else 0
        self.log = [(at, held) for at, held in log if held]
        return left < units

    def write(self, now: int) -> None:
        """Drop what no longer counts, for good: a clock that steps back later doesn't bring it back."""
        self.log, self.seen = self.living(now), max(now, self.stands) if self.rule.kind in ("c", "f") else now

    def add(self, at: int, units: int | Fraction) -> None:
        """Put units in the log; a window without slots remembers only its newest 65."""
        self.log = [*self.log, (at, units)] if units else self.log
        if self.rule.slot_us == 1:
            newest: list[tuple[int, int | Fraction]] = []
            left: int | Fraction = EXACT
            for instant, held in reversed(self.log):
                newest += [(instant, min(held, left))] if left else []
                left -= min(held, left)
            self.log = newest[::-1]


class Dated(Account):
    """The account of windows by a calendar. Others know only their mean length: as long as only they write, windows end by that."""

    def __init__(self, rule: CompiledRule, log: list[tuple[int, int | Fraction]], seen: int, ends: int | None = None) -> None:
        super().__init__(rule, log, seen)
        self.ends = calendar_window(rule, seen)[1] if ends is None else ends  # when the window ends that the log is of

    def copy(self) -> Account:
        return Dated(self.rule, self.log, self.seen, self.ends)

    def held(self, rule: CompiledRule) -> Callable[[int], Fraction | int]:
        units = sum(units for _, units in self.log)
        return lambda t: units if t < self.ends else 0

    def instants(self, now: int) -> Sequence[int]:
        return [now, self.ends]

    def counts_from(self, now: int) -> int:
        return now

    def rebase(self, now: int, own: bool) -> bool:
        mean = self.rule.window_us
        if self.ends - mean <= now + mean:
            return False
        self.ends = calendar_window(self.rule, now)[1] if own else now + mean - (now - self.ends) % mean
        return True

    def bring(self, now: int) -> None:
        since, until = calendar_window(self.rule, now)
        after = calendar_window(self.rule, until)[1]
        nearest = min((since, until, after), key=lambda at: (abs(at - self.ends), at))
        if nearest == since or not self.log:
            self.log, self.ends = [], until
        elif nearest == until:
            self.ends = until

    def give_back(self, now: int, units: int, granted: int) -> bool:
        left: int | Fraction = units if calendar_window(self.rule, granted)[1] == self.ends else 0
        before = sum(held for _, held in self.log)
        log = []
        for at, held in self.log:
            log.append((at, held - min(held, left)))
            left -= min(held, left)
        self.log = [(at, held) for at, held in log if held]
        return sum(held for _, held in self.log) < before

    def living(self, now: int) -> list[tuple[int, int | Fraction]]:
        return self.log if self.ends > now else []

    def used(self, now: int, taker: CompiledRule) -> int:
        since = calendar_window(taker, now)[0] if taker.kind == "d" else now
        return int(sum(units for _, units in self.log)) if self.ends > since else 0

    def write(self, now: int) -> None:
        self.log, self.seen = self.living(now), now
        if self.ends <= now:
            self.ends = now + self.rule.window_us - (now - self.ends) % self.rule.window_us


def account_of(rule: CompiledRule, now: int) -> Account:
    """An account of which nothing is used."""
    return Dated(rule, [], now) if rule.kind == "d" else Account(rule, [], now)


def derive(rule: CompiledRule, source: Account | None, now: int) -> Account:
    """The account of a definition that meets this key for the first time: it takes over what the fullest one holds."""
    own = account_of(rule, now)
    if source is None:
        return own
    if rule.kind == source.rule.kind == "s":
        for at, units in source.living(now):
            own.add(min(-(-at // rule.slot_us) * rule.slot_us, own.slot_end(now + own.reach)), units)
        own.write(now)
    else:
        used = source.used(now, rule)
        own.add(own.counts_from(now), min(used, rule.capacity) if rule.kind == "b" else used)
    return own


class Oracle:
    """One key: the account of the definition that wrote last, and of one other that is still in use."""

    def __init__(self) -> None:
        self.accounts: list[Account] = []

    def look(self, rule: CompiledRule, now: int) -> tuple[Account, list[Account], bool, bool]:
        """The account of the rule's definition at `now`, the other one, whether they changed by that, and whether the own is derived."""
        accounts = [account.copy() for account in self.accounts]
        own = next((account for account in accounts if definition(account.rule) == definition(rule)), None)
        changed = [account.rebase(now, account is own) for account in accounts]
        others = [account for account in accounts if account is not own][:1]
        if own is not None:
            own.bring(now)
            return own, others, any(changed), False
        own = derive(rule, max(accounts, key=lambda account: account.used(now, rule), default=None), now)
        return own, others, any(changed) or own.held(rule)(now) > 0, True

    def count(self, own: Account, others: list[Account], rule: CompiledRule, now: int, units: int) -> None:
        """Write what has changed, and count units."""
        self.accounts = [own, *others]
        for account in self.accounts:
            account.write(now)
        if units:
            own.rule = rule
            own.add(own.counts_from(now), units)
            for account in others:
                account.add(account.counts_from(now), from_other(account, now, units))

    def check(self, rule: CompiledRule, now: int, cost: int, *, consume: bool = True) -> Answer:
        """Decide at `now`; consume if allowed."""
        own, others, changed, _ = self.look(rule, now)
        held, room, instants = own.held(rule), rule.capacity - cost, own.instants(now)
        allowed, retry = held(now) <= room, -1
        if room >= 0:
            retry = instants[bisect_left(instants, True, key=lambda t: held(t) <= room)] - now
        if consume and (allowed or changed):
            self.count(own, others, rule, now, cost if allowed else 0)
            held, instants = own.held(rule), own.instants(now)
        reset = instants[bisect_left(instants, True, key=lambda t: held(t) == 0)] - now
        return allowed, max(0, floor(rule.capacity - held(now))), retry, reset

    def charge(self, rule: CompiledRule, now: int, cost: int) -> Answer:
        """Count units that nobody was asked for, up to a debt of one capacity. The third number says how long the key is in debt."""
        own, others, changed, _ = self.look(rule, now)
        used = own.in_window(now) if rule.kind in ("c", "f") else ceil(own.held(rule)(now))
        units = min(cost, max(0, 2 * rule.capacity - used))
        if changed or units:
            self.count(own, others, rule, now, units)
        return self.corrected(own, rule, now)

    def refund(self, rule: CompiledRule, now: int, units: int, granted: int) -> Answer:
        """Give back units that were granted at that instant."""
        own, others, _, derived = self.look(rule, now)
        if not derived and own.give_back(now, units, granted):
            self.count(own, others, rule, now, 0)
            if not any(account.used(now, account.rule) for account in self.accounts):
                self.accounts = []  # nobody can tell it from a key that was never used
        return self.corrected(own, rule, now)

    def book(self, rule: CompiledRule, now: int, cost: int, ahead: int) -> Answer:
        """Grant for later, if the turn is at most so far ahead. The third number says when it is, or would have been."""
        own, others, changed, _ = self.look(rule, now)
        held, instants, evenly = own.held(rule), own.instants(now), rule.strategy == "leaky_bucket"
        room = 0 if evenly else rule.capacity - cost  # at its turn all before it has drained, or so much that it has room
        wait = instants[bisect_left(instants, True, key=lambda t: held(t) <= room)] - now if cost <= rule.capacity else -1
        allowed = 0 <= wait <= ahead and (held(now) + cost) * rule.unit_ticks <= LEVEL_MAX
        if allowed or changed:
            self.count(own, others, rule, now, cost if allowed else 0)
            held, instants = own.held(rule), own.instants(now)
        reset = instants[bisect_left(instants, True, key=lambda t: held(t) == 0)] - now
        return allowed, max(0, floor(rule.capacity - held(now))), wait, reset

    def unbook(self, rule: CompiledRule, now: int, units: int, empty: int) -> None:
        """Give a booking back, unless the bucket isn't empty at that time any more: somebody has booked behind it."""
        own, others, _, derived = self.look(rule, now)
        held, instants = own.held(rule), own.instants(now)
        left = held(now)
        if not derived and instants[bisect_left(instants, True, key=lambda t: held(t) == 0)] == empty:
            left -= min(left, units)
        if left < held(now):
            own.log = [(now, left)] if left else []
            self.count(own, others, rule, now, 0)
            if not any(account.used(now, account.rule) for account in self.accounts):
                self.accounts = []

    def corrected(self, own: Account, rule: CompiledRule, now: int) -> Answer:
        held, instants = own.held(rule), own.instants(now)

        def in_debt(t: int) -> bool:
            # A counter counts no window as more than full; its debt is what that leaves out.
            return held(t) > rule.capacity or (rule.kind == "c" and own.in_window(t) > rule.capacity)

        debt = instants[bisect_left(instants, True, key=lambda t: not in_debt(t))] - now
        reset = instants[bisect_left(instants, True, key=lambda t: held(t) == 0)] - now
        return True, max(0, floor(rule.capacity - held(now))), debt, reset


def from_other(account: Account, now: int, cost: int) -> int | Fraction:
    """What an account takes on for an admission by another definition: a bucket never owes more than its own capacity for it."""
    if account.rule.kind != "b":
        return cost
    return min(cost, max(0, account.rule.capacity - account.held(account.rule)(now)))
