"""The specification: what each strategy promises, read from a log of admissions in rational time.

`Account.held` says what one definition of a rule counts at an instant, and all that a decision reports follows from it: a
check is allowed if held + cost ≤ capacity, retry is the first instant at which it would be, reset the first at which nothing
is held. The instants are searched for, not calculated: the core and the script have formulas, this file has the promise.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction
from math import ceil, floor

from ratethrottle._engine.definitions import CompiledRule
from ratethrottle.testing.intervals import window_start

Answer = tuple[bool, int, int, int]  # allowed, remaining, retry_us (-1: never), reset_us
EXACT = 64  # units that a window without slots remembers: its limit is no larger
DRAIN_US_MAX = 2**48  # no bucket takes longer


def definition(rule: CompiledRule) -> tuple[str, int, int]:
    """What an account depends on: a rule whose limit or burst alone has changed reads the very same one."""
    return (rule.kind, *((rule.unit_ticks, rule.drain_ticks) if rule.kind == "b" else (rule.window_us, rule.slot_us)))


class Account:
    """A log of (the instant it counts from, units), oldest first, as one definition of a rule reads it."""

    def __init__(self, rule: CompiledRule, log: list[tuple[int, int | Fraction]], seen: int) -> None:
        self.rule, self.log, self.seen = rule, log, seen  # seen: the newest instant that the log knows of

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

    def rebase(self, now: int) -> bool:
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

    def used(self, now: int) -> int:
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
        """Put units in the log; a window without slots remembers only its newest 64."""
        self.log = [*self.log, (at, units)] if units else self.log
        if self.rule.slot_us == 1:
            newest: list[tuple[int, int | Fraction]] = []
            left: int | Fraction = EXACT
            for instant, held in reversed(self.log):
                newest += [(instant, min(held, left))] if left else []
                left -= min(held, left)
            self.log = newest[::-1]


def derive(rule: CompiledRule, source: Account | None, now: int) -> Account:
    """The account of a definition that meets this key for the first time: it takes over what the fullest one holds."""
    own = Account(rule, [], now)
    if source is None:
        return own
    if rule.kind == source.rule.kind == "s":
        for at, units in source.living(now):
            own.add(min(-(-at // rule.slot_us) * rule.slot_us, own.slot_end(now + own.reach)), units)
        own.write(now)
    else:
        used = source.used(now)
        own.add(own.counts_from(now), min(used, rule.capacity) if rule.kind == "b" else used)
    return own


class Oracle:
    """One key: the account of the definition that wrote last, and of one other that is still in use."""

    def __init__(self) -> None:
        self.accounts: list[Account] = []

    def look(self, rule: CompiledRule, now: int) -> tuple[Account, list[Account], bool, bool]:
        """The account of the rule's definition at `now`, the other one, whether they changed by that, and whether the own is derived."""
        accounts = [Account(account.rule, account.log, account.seen) for account in self.accounts]
        changed = [account.rebase(now) for account in accounts]
        own = next((account for account in accounts if definition(account.rule) == definition(rule)), None)
        others = [account for account in accounts if account is not own][:1]
        if own is not None:
            return own, others, any(changed), False
        own = derive(rule, max(accounts, key=lambda account: account.used(now), default=None), now)
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
        own, others, changed, derived = self.look(rule, now)
        if (not derived and own.give_back(now, units, granted)) or changed:
            self.count(own, others, rule, now, 0)
            if not any(account.used(now) for account in self.accounts):
                self.accounts = []  # nobody can tell it from a key that was never used
        return self.corrected(own, rule, now)

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
