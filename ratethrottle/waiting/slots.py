"""`limiter.slot(...)`: units that are held for as long as a block runs.

A line is of one key, in one event loop. It holds the slots of that loop, and its callers wait in it in the order in which they came.
It asks the storage once at a time (`_holding.py`); what comes meanwhile goes into the next ask. So a slot that is given back where
others wait goes to its next holder by one call.
"""

from __future__ import annotations

import asyncio
import os
from collections import OrderedDict
from collections.abc import Hashable, Mapping
from contextlib import suppress
from copy import copy
from dataclasses import replace
from functools import partial
from itertools import islice
from math import ceil, inf
from types import TracebackType
from typing import Any, Protocol, Self, cast

from anyio.lowlevel import checkpoint

from ratethrottle._engine.decision import Decision, Entry
from ratethrottle._engine.held import held_decision, held_entry
from ratethrottle._holding import Ask, Held, HoldsSlots
from ratethrottle.errors import (
    ConfigurationError,
    CostExceedsLimit,
    InvalidRequest,
    LimiterClosed,
    RateLimitExceeded,
    StorageUnavailable,
    listed,
)
from ratethrottle.events import SlotLost
from ratethrottle.rule import ConcurrencyRule
from ratethrottle.waiting.agenda import Agenda
from ratethrottle.waiting.lines import SOON_S, STEP_S, Key, Lines, LoopLines, seconds_of
from ratethrottle.waiting.loops import Future, loop_here

YIELD_EVERY = 128  # slots that were granted at once, one after the other
UNKNOWN = -1
# When what couldn't be given back is given back again.
RETRY_LEAST_S, RETRY_MOST_S = 0.05, 1.0

BEFORE, ENTERING, WITHIN, AFTER = range(4)


class Limiter(Protocol):
    """A limiter, as far as slots need it."""

    @property
    def _closed(self) -> bool: ...

    @property
    def _storage(self) -> Any: ...

    @property
    def _lines(self) -> Lines: ...

    @property
    def rules(self) -> Mapping[str, Any]:
        """All rules by name."""


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
        ask = Ask(self.used, first.cost if first is not None else 1, wanted)
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
        self.queued = answer.granted < ask.wanted
        left = answer.granted
        while left and (first := self.first()) is not None and first.ask == self.asks:
            left -= 1
            self.held[first] = None
            self.used += first.cost
            self.give(first, held_decision(first.entry, answer.source, True, answer.free + left * ask.cost))
        self.settle(answer)

    def settle(self, answer: Held) -> None:
        """Wait for as long as an answer says, if it doesn't grant what the first claim wants."""
        first = self.first()
        # Those that this was asked for may all have left meanwhile; it says nothing of others.
        self.blocked = self.queued and first is not None and first.ask == self.asks and not self.woken
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


class Slots:
    """The concurrency rules of a limiter, and what takes slots by them."""

    __slots__ = ("_since_turn", "rules")

    def __init__(self) -> None:
        self.rules: dict[str, ConcurrencyRule] = {}
        self._since_turn = 0

    def make(self, limiter: Limiter, key: Key, rule: Any, cost: int, timeout: float | None) -> Slot:
        """Make a slot that is to be taken. Raises InvalidRequest, CostExceedsLimit, ConfigurationError or LimiterClosed."""
        if limiter._closed:
            raise LimiterClosed
        timeout_s = seconds_of(timeout)
        found = self._found(limiter, rule)
        entry = held_entry(found.compiled, key, cost)
        _holding(limiter._storage)
        return Slot(self, limiter, Claim(entry, found, timeout_s, named=found is not rule))

    async def take(self, limiter: Limiter, claim: Claim) -> SlotLine:
        """Wait in line for a slot. Returns the line."""
        if limiter._closed:
            raise LimiterClosed
        self._since_turn += 1
        if self._since_turn >= YIELD_EVERY:
            self._since_turn = 0
            await checkpoint()
        rule = self.rules.get(claim.rule.name, claim.rule) if claim.named else claim.rule
        if rule is not claim.rule:
            claim.go_by(rule)
        if not claim.entry.counted:  # the limit is 0
            raise RateLimitExceeded(never(claim.entry))
        lines = limiter._lines._here(cast(Any, limiter))
        name = (rule.name, rule.ttl_us, claim.entry.canonical)
        line = cast("SlotLine | None", lines.lines.get(name))
        if line is None:
            line = lines.lines[name] = SlotLine(lines, name, limiter._storage, claim.entry, rule)
        if claim.timeout_s:
            claim.deadline = lines.loop.now() + claim.timeout_s
        line.enter(claim)
        if claim.outcome is None:
            self._since_turn = 0
            claim.future = lines.loop.future(partial(line.abandon, claim))
            try:
                await claim.future
            except BaseException:
                line.abandon(claim)
                raise
        if isinstance(claim.outcome, BaseException):
            error, claim.outcome = claim.outcome, None
            try:
                raise error
            finally:
                del error  # its traceback holds this frame
        return line

    def add(self, limiter: Limiter, rule: ConcurrencyRule) -> None:
        """Take a rule up, also for those that wait by its name."""
        self.rules[rule.name] = rule
        for lines in list(limiter._lines._loops.values()):
            for line in list(lines.lines.values()):
                if isinstance(line, SlotLine) and line.rule.name == rule.name and lines.process == os.getpid():
                    with suppress(RuntimeError):  # that loop has ended
                        lines.loop.from_any_thread(partial(line.change, rule))

    async def reset(self, limiter: Limiter, key: Key, rule: str | ConcurrencyRule) -> None:
        """Take all slots of a key from their holders."""
        found = self._found(limiter, rule)
        entry = held_entry(found.compiled, key, 1)
        await _holding(limiter._storage).forget_slots(found, entry)

    def _found(self, limiter: Limiter, rule: Any) -> ConcurrencyRule:
        """Find the rule that a call means; None: the only one."""
        if isinstance(rule, ConcurrencyRule):
            return rule
        if rule is None:
            if len(self.rules) == 1:
                return next(iter(self.rules.values()))
            if self.rules:
                raise InvalidRequest(f"the limiter has several concurrency rules; name one (rule=...): {listed(self.rules)}")
            raise InvalidRequest("the limiter has no concurrency rule yet; add one with add_rule(ConcurrencyRule(...))")
        if not isinstance(rule, str):
            raise InvalidRequest(f"rule is a {type(rule).__name__}; slots take the name (str) of a ConcurrencyRule, or one")
        found = self.rules.get(rule)
        if found is None and rule in limiter.rules:
            raise InvalidRequest(f"rule {rule!r} counts what is used in a time; slots take a ConcurrencyRule")
        if found is None:
            # The message doesn't repeat the name: if the arguments were swapped, it is a key.
            raise InvalidRequest(
                f"the limiter has no such concurrency rule; it has {listed(self.rules, rule) or 'none yet: add_rule(ConcurrencyRule(...))'}"
            )
        return found


class Slot:
    """What `limiter.slot(...)` returns: `async with` it, once.

    decision: what granted it. lost: an `asyncio.Event`, set when the slot isn't held any more although its block runs: this process
    was too slow to renew it, somebody has reset the key, or the limiter was closed. Others may hold it then.
    """

    __slots__ = ("_claim", "_limiter", "_line", "_of", "_stage")

    def __init__(self, of: Slots, limiter: Limiter, claim: Claim) -> None:
        self._of = of
        self._limiter = limiter
        self._claim = claim
        self._stage = BEFORE
        self._line: SlotLine | None = None

    @property
    def decision(self) -> Decision:
        """The decision that granted it. `remaining` is how many units were free after that."""
        return cast(Decision, self._taken().outcome)

    @property
    def lost(self) -> asyncio.Event:
        """Set when the slot isn't held any more although its block runs."""
        return self._taken().lost

    async def release(self) -> None:
        """Give the slot back before the block ends. On Redis it waits until Redis has it, the storage's deadline at most.

        Raises InvalidRequest before the block, if it was given back already, and in another event loop than the one that took it.
        """
        self._taken()
        if self._stage == AFTER:
            raise InvalidRequest("the slot was given back already; release it once")
        waits = self._leave()
        if waits is not None:
            await waits

    async def __aenter__(self) -> Self:
        if self._stage != BEFORE:
            raise InvalidRequest("a slot is entered once; call limiter.slot(...) for each block")
        self._stage = ENTERING
        self._line = await self._of.take(self._limiter, self._claim)
        self._stage = WITHIN
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._stage == WITHIN:
            waits = self._leave()
            # A coroutine that is closed can't wait any more. What was begun goes on.
            if waits is not None and not isinstance(error, GeneratorExit):
                await waits

    def __repr__(self) -> str:
        # Without the key, as everywhere.
        stage = ("not held yet", "not held yet", "held", "given back")[self._stage]
        return f"<Slot rule={self._claim.rule.name!r} cost={self._claim.cost} {stage}>"

    def _taken(self) -> Claim:
        if self._line is None:
            raise InvalidRequest("the slot isn't held yet: write `async with limiter.slot(...) as slot:`")
        return self._claim

    def _leave(self) -> Future | None:
        """Give it back. Returns what to wait on."""
        line = cast(SlotLine, self._line)
        if line.of.process != os.getpid():  # the process that forked this one holds it
            self._stage = AFTER
            return None
        with suppress(RuntimeError):  # none runs: somebody closes the coroutine
            if loop_here() is not line.of.found:
                raise InvalidRequest("the slot was taken in another event loop; give it back in that one")
        self._stage = AFTER
        return line.leave(self._claim)


def never(entry: Entry) -> Decision:
    """Make the decision of a rule whose limit is 0."""
    return held_decision(entry, "memory", False, 0, -1)


def _holding(storage: Any) -> HoldsSlots:
    """Find out whether a storage has slots. Raises ConfigurationError."""
    if not hasattr(storage, "hold"):
        raise ConfigurationError(f"{type(storage).__name__} has no slots; hold them in memory, by a limiter with InMemoryStorage")
    return cast(HoldsSlots, storage)


def _nothing() -> None:
    """Do nothing when a task is cancelled that waits until the storage has what it gave back."""


def _done(future: Future) -> None:
    """Let a task go on, unless it was cancelled."""
    if not getattr(future, "cancelled", bool)():
        future.set_result(None)
