"""The slots of a key in one event loop, and the callers that wait for some.

A line asks the storage once at a time (`_holding.py`); what comes meanwhile goes into the next ask. So a slot that is given back where
others wait goes to its next holder by one call.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Hashable
from copy import copy
from dataclasses import replace
from functools import partial
from itertools import islice
from math import ceil, inf
from typing import Any, cast

from ratethrottle._engine.decision import Decision, Entry
from ratethrottle._engine.held import held_decision, held_entry
from ratethrottle._holding import Ask, Held, HoldsSlots
from ratethrottle.errors import CostExceedsLimit, LimiterClosed, RateLimitExceeded, StorageUnavailable
from ratethrottle.events import SlotLost
from ratethrottle.rule import ConcurrencyRule
from ratethrottle.waiting.agenda import Agenda
from ratethrottle.waiting.lines import LoopLines
from ratethrottle.waiting.loops import Future
from ratethrottle.waiting.tickets import SOON_S, STEP_S

UNKNOWN = -1
# When what couldn't be given back is given back again.
RETRY_LEAST_S, RETRY_MOST_S = 0.05, 1.0


class Claim:
    """One caller of a line. It waits for a slot, and then it has one."""

    __slots__ = ("ask", "cost", "deadline", "entry", "future", "lost", "named", "outcome", "rule", "since", "timeout_s")

    def __init__(self, entry: Entry, rule: ConcurrencyRule, timeout_s: float, *, named: bool) -> None:
        self.entry = entry
        self.named = named  # whether the rule was named, so that what takes its place in the limiter is meant too
        self.rule = rule
        self.cost = entry.cost
        self.timeout_s = timeout_s
        self.deadline = inf
        self.ask = 0  # the number of the last ask that was also for this one
        self.since = 0  # how many answers had come before
        self.future: Future | None = None  # what the caller's task waits on, once it has to
        self.outcome: Decision | BaseException | None = None
        self.lost = asyncio.Event()

    def left_s(self, now: float) -> float:
        """Seconds that are left of its timeout; 0 asks once."""
        return max(self.deadline - now, 0.0) if self.timeout_s else 0.0

    def again(self, now: float) -> Claim:
        """Make one for the time that is left, in the place of one whose slot was lost."""
        return Claim(self.entry, self.rule, self.left_s(now), named=self.named)

    def go_by(self, rule: ConcurrencyRule) -> None:
        """Go on by another rule of its name. Raises CostExceedsLimit."""
        self.entry = held_entry(rule.compiled, self.entry.key, self.cost)
        self.rule = rule


class SlotLine:
    """The slots of a key in one event loop, and the callers that wait for some: a `Holder`.

    Those in front that want the same are asked for together. Others wait until they are the first, so that no small request overtakes
    a large one, here or in another process.
    """

    __slots__ = (
        "answers",
        "asks",
        "at",
        "blocked",
        "closed",
        "deadlines",
        "entry",
        "held",
        "in_flight",
        "last",
        "leaving",
        "leaving_next",
        "losses",
        "name",
        "of",
        "once",
        "queued",
        "retry_at",
        "retry_s",
        "rule",
        "storage",
        "stored",
        "used",
        "waiting",
        "woken",
    )

    def __init__(self, of: LoopLines, name: Hashable, storage: HoldsSlots, entry: Entry, rule: ConcurrencyRule) -> None:
        self.of = of
        self.name = name
        self.storage = storage
        self.entry = entry
        self.rule = rule  # the one that was used last: each claim has its own
        self.waiting: OrderedDict[Claim, None] = OrderedDict()
        self.once: dict[Claim, None] = {}  # those of them that don't wait for a slot, but for an answer
        self.deadlines: Agenda[Claim] = Agenda()
        self.held: dict[Claim, None] = {}
        self.used = 0  # units of these
        self.stored = 0  # units that the storage holds for this line, by its last answer; UNKNOWN after an error
        self.queued = False  # whether this line may stand in the queue of the storage
        self.asks = 0
        self.answers = 0
        self.in_flight = False
        self.blocked = False  # whether the first has been refused, and nothing says that this has changed
        self.woken = False  # whether something has said so since the ask that is in flight
        self.at = inf  # when to ask again for it
        self.last: Held | None = None
        self.losses = 0
        self.retry_s = 0.0
        self.retry_at = 0.0
        self.leaving: list[Future] = []  # of tasks that wait until the storage has what they gave back
        self.leaving_next: list[Future] = []  # likewise, by the next ask
        self.closed = False

    # What callers do:

    def enter(self, claim: Claim) -> None:
        """Stand at the end. Its `outcome` may be there at once."""
        if claim.timeout_s == 0 and self.blocked and not self.in_flight:
            claim.outcome = RateLimitExceeded(self.denial(claim))  # others wait, and nothing is free for them
            return
        claim.since = self.answers
        self.waiting[claim] = None
        if claim.timeout_s == 0:
            self.once[claim] = None
        if claim.deadline != inf:
            self.deadlines.put(claim, claim.deadline)
        self.advance()

    def abandon(self, claim: Claim) -> None:
        """Leave, as the caller was cancelled, or give back the slot that has come meanwhile."""
        if claim in self.held:
            self.leave(claim)
        elif claim in self.waiting:
            self.remove(claim)
            if self.waiting:
                # Nothing is asked for others here: the loop may be about to end, and all of them with it.
                self.plan(soon=True)
            else:
                self.advance()

    def leave(self, claim: Claim) -> Future | None:
        """Give a slot back. Returns what to wait on until the storage has it, if it hasn't yet."""
        if claim not in self.held:  # it was lost, or the limiter is closed
            return None
        del self.held[claim]
        self.used -= claim.cost
        carried = self.leaving_next if self.in_flight else self.leaving
        self.advance()
        if not self.in_flight:
            return None
        waits = self.of.loop.future(_nothing)
        carried.append(waits)
        return waits

    # What the storage does:

    @property
    def gone(self) -> bool:
        """Whether the event loop is closed."""
        return self.of.loop.closed

    def wake(self) -> None:
        """Ask again in the next turn, from any thread."""
        self.of.loop.from_any_thread(self.ask_again)

    def ask_again(self) -> None:
        """Ask again, whatever the last answer said."""
        if self.held or self.waiting or self.queued:
            self.woken = self.in_flight
            self.blocked = False
            self.stored = UNKNOWN
            self.retry_at = 0.0
            self.advance()

    def change(self, rule: ConcurrencyRule) -> None:
        """Have those that wait by its name go on by another rule. A holder has one `ttl`, which stays."""
        rule = replace(rule, ttl=self.rule.ttl)
        for claim in [each for each in self.waiting if each.named]:
            try:
                claim.go_by(rule)
            except CostExceedsLimit as error:
                self.give(claim, error)
            else:
                if not claim.entry.counted:
                    self.give(claim, RateLimitExceeded(never(claim.entry)))
        self.ask_again()

    def lost(self) -> None:
        """Count all that is held as lost."""
        self.losses += 1
        self.lose()
        self.stored = UNKNOWN
        self.queued = True
        self.blocked = False
        self.retry_at = 0.0
        self.plan(soon=True)

    def lose(self) -> None:
        """Tell the holders that they hold nothing any more."""
        count, self.used = len(self.held), 0
        while self.held:
            self.held.popitem()[0].lost.set()
        if count and not self.closed:
            cast(Any, self.storage).events.emit(SlotLost(self.rule.name, count))

    # What time and answers do:

    def on_time(self) -> None:
        """Give up claims that are out of time, and ask again, if it is time."""
        now = self.of.loop.now()
        for claim in self.deadlines.before(now + SOON_S):
            self.give(claim, self.refusal(claim))
        if self.at < now + SOON_S:
            self.blocked = False
        self.advance()

    def advance(self) -> None:
        """Ask, if there is something to ask for or to give back, and no answer is on its way."""
        while self.is_due():
            self.ask()
        self.plan()

    def is_due(self) -> bool:
        """Whether to ask now."""
        if self.in_flight:
            return False
        changed = self.used != self.stored
        if self.waiting:
            return changed or not self.blocked
        return (changed or self.queued) and self.of.loop.now() + SOON_S > self.retry_at

    def ask(self) -> None:
        """Ask once: give back what isn't used, and ask for the first claims that want the same."""
        self.asks += 1
        first, wanted = self.first(), 0
        if first is not None:
            self.rule = first.rule
            # Of more than there are none can be granted, but for one more the line keeps its place in the storage's queue.
            for claim in islice(self.waiting, first.rule.limit // first.cost + 1):
                if claim.cost != first.cost or (claim.rule is not first.rule and claim.rule != first.rule):
                    break
                claim.ask = self.asks
                wanted += 1
        # For those that ask once it doesn't stand in the queue: others would wait for nobody.
        waits = wanted == 0 or len(self.once) < len(self.waiting)
        ask = Ask(self.used, first.cost if first is not None else 1, wanted, waits)
        losses, self.at, self.queued = self.losses, inf, True
        try:
            answer = self.storage.hold(self, self.rule, ask)
        except Exception as error:  # noqa: BLE001  # whatever it is, it is its callers'
            self.fail(error)
            return
        if isinstance(answer, Held):
            self.take(ask, losses, answer)
        else:
            self.in_flight = True
            answer.add_done_callback(partial(self.answered, ask, losses))

    def answered(self, ask: Ask, losses: int, answer: asyncio.Future[Held]) -> None:
        """Take an answer that had to be waited for."""
        self.in_flight = False
        error = StorageUnavailable("the storage has given up the request") if answer.cancelled() else answer.exception()
        if error is not None:
            self.fail(error)
        else:
            self.take(ask, losses, answer.result())
        heard, self.leaving, self.leaving_next = self.leaving, self.leaving_next, []
        self.advance()
        if not self.in_flight:
            heard += self.leaving
            self.leaving = []
        for waits in heard:
            _done(waits)

    def take(self, ask: Ask, losses: int, answer: Held) -> None:
        """Take an answer: hand out what is granted, in order. What nobody takes goes back by the next ask."""
        self.retry_s = 0.0
        if losses != self.losses:
            self.stored = UNKNOWN
            return
        if answer.lost:
            self.lose()
        self.last = answer
        self.answers += 1
        self.stored = (0 if answer.lost else ask.held) + answer.granted * ask.cost
        short = answer.granted < ask.wanted
        self.queued = short and ask.waits
        left = answer.granted
        while left and (first := self.first()) is not None and first.ask == self.asks:
            left -= 1
            self.held[first] = None
            self.used += first.cost
            self.give(first, held_decision(first.entry, answer.source, True, answer.free + left * ask.cost))
        self.settle(answer, short)

    def settle(self, answer: Held, short: bool) -> None:
        """Wait for as long as an answer says, if it doesn't grant what the first claim wants."""
        first = self.first()
        # Those that this was asked for may all have left meanwhile; it says nothing of others.
        self.blocked = short and first is not None and first.ask == self.asks and not self.woken
        self.woken = False
        if self.blocked:
            self.at = self.of.loop.now() + max(answer.ask_again_s, STEP_S) if answer.ask_again_s else inf
            for claim in list(self.once):
                self.give(claim, RateLimitExceeded(self.denial(claim)))
            self.blocked = self.first() is first

    def fail(self, error: BaseException) -> None:
        """Hand on an error to those that were asked for, and give back later what isn't used."""
        self.stored = UNKNOWN
        self.blocked = self.woken = False
        asked = [claim for claim in self.waiting if claim.ask == self.asks]
        for i, claim in enumerate(asked):
            self.give(claim, copy(error) if i else error)
        self.retry_s = min(max(2 * self.retry_s, RETRY_LEAST_S), RETRY_MOST_S)
        self.retry_at = self.of.loop.now() + self.retry_s
        if self.closed:  # the storage is closed too, and has given back what it held
            self.stored, self.queued = self.used, False

    def denial(self, claim: Claim) -> Decision:
        """Make the decision that the last answer is for a claim."""
        last = self.last
        return held_decision(claim.entry, last.source if last else "memory", False, last.free if last else 0)

    def refusal(self, claim: Claim) -> Exception:
        """Word the error of a claim that is out of time."""
        if claim.since != self.answers or self.blocked:
            return RateLimitExceeded(self.denial(claim))
        wait_us = ceil(max(claim.timeout_s, STEP_S) * 1e6)
        return RateLimitExceeded(held_decision(claim.entry, "overload", False, 0, wait_us))

    # The claims:

    def first(self) -> Claim | None:
        """Find the first claim that waits."""
        return next(iter(self.waiting), None)

    def give(self, claim: Claim, outcome: Decision | BaseException) -> None:
        """End a claim's wait."""
        self.remove(claim)
        claim.outcome = outcome
        if claim.future is not None:
            _done(claim.future)

    def remove(self, claim: Claim) -> None:
        """Take a claim out of the line. If it was the first, what was refused says nothing of the next one."""
        if claim is self.first():
            self.blocked = False
        del self.waiting[claim]
        self.once.pop(claim, None)
        self.deadlines.take(claim)

    def plan(self, *, soon: bool = False) -> None:
        """Have the loop's timer come back when there is something to do, and end the line if there never will be."""
        at = inf
        if self.in_flight:
            pass
        elif self.waiting:
            at = self.at if self.blocked and not soon else 0.0
        elif self.used != self.stored or self.queued:
            at = self.retry_at
        elif not self.held:
            self.of.drop(self)
            return
        self.of.plan(self, min(at, self.deadlines.first()))

    def close(self) -> None:
        """End the line with its limiter. What is held is given back, although its block may still run."""
        self.closed = True
        while self.waiting:
            self.give(next(iter(self.waiting)), LimiterClosed())
        self.lose()
        self.retry_at = 0.0
        self.advance()


def never(entry: Entry) -> Decision:
    """Make the decision of a rule whose limit is 0."""
    return held_decision(entry, "memory", False, 0, -1)


def _nothing() -> None:
    """Do nothing when a task is cancelled that waits until the storage has what it gave back."""


def _done(future: Future) -> None:
    """Let a task go on, unless it was cancelled."""
    if not getattr(future, "cancelled", bool)():
        future.set_result(None)
