"""`acquire`: callers that wait for capacity, in lines.

A line is of one key under one rule, in one event loop. Its callers are served in the order in which they came, and only the first
of them is asked for. After a denial the line waits for the exact `retry_after`, and asks again. All lines of a loop share a timer.
"""

from __future__ import annotations

import os
import random
from asyncio import CancelledError
from collections import OrderedDict
from collections.abc import Hashable
from contextlib import suppress
from functools import partial
from itertools import islice
from math import inf
from typing import Any, Protocol, cast

from anyio.lowlevel import checkpoint

from ratethrottle._core import PendingDecision
from ratethrottle._engine.bookings import bookable, served
from ratethrottle._engine.decision import Decision
from ratethrottle._several import Timed
from ratethrottle.errors import LimiterClosed, RateLimitExceeded
from ratethrottle.storage._shared.waiting import is_queued
from ratethrottle.waiting.agenda import Agenda
from ratethrottle.waiting.bookings import BookedLine, begin, give_back, wait_of
from ratethrottle.waiting.loops import loop_here, loop_of
from ratethrottle.waiting.rivals import Rivals
from ratethrottle.waiting.tickets import (
    AWAY,
    AWAY_STEP_S,
    SOON_S,
    STEP_S,
    Heard,
    Key,
    Limiter,
    Pending,
    Ticket,
    kept,
    only_of,
    refusal,
    rules_of,
    seconds_of,
)

YIELD_EVERY = 128  # callers in a row that don't have to wait, then the loop has a turn


class Line:
    """The callers that wait for one key under one rule.

    Those in front that ask for the same are asked for together: they are one item of a call. Others wait until they are the first,
    so that no small request overtakes a large one. Of equal requests the first one takes the first grant, whichever check it came by.
    """

    __slots__ = (
        "asked",
        "at",
        "deadlines",
        "denial",
        "in_flight",
        "key",
        "left",
        "limiter",
        "name",
        "of",
        "rivals",
        "tickets",
        "timed",
        "together",
        "until",
        "wanted",
    )

    def __init__(self, of: LoopLines, name: Hashable, limiter: Limiter, key: Key) -> None:
        self.of = of
        self.name = name
        self.limiter = limiter
        self.key = key
        self.tickets: OrderedDict[Ticket, None] = OrderedDict()
        self.wanted: dict[Hashable, int] = {}  # how many tickets ask for the same
        self.deadlines: Agenda[Ticket] = Agenda()
        self.in_flight: dict[Pending, None] = {}  # checks without an answer yet
        self.asked: Hashable = None  # what they ask for
        self.together = 0  # how many checks were asked for together, last, of which none was denied
        self.left = 0  # how many more of them would have been granted
        self.until = inf  # until when a denial holds; inf: nothing says to wait
        self.at = inf  # when to ask again
        self.timed = False  # whether what is asked for now was waited for until then
        self.rivals = Rivals()
        self.denial: tuple[Hashable, Decision, float] | None = None  # the last one: of what, and when

    # What callers do:

    def enter(self, ticket: Ticket, begun: tuple[Pending, Any] | None = None, denial: Decision | None = None) -> None:
        """Stand at the end. begun: a check for it that is on its way, and what that waits for. denial: what such a check has come to."""
        self.tickets[ticket] = None
        self.wanted[ticket.ask] = self.wanted.get(ticket.ask, 0) + 1
        if ticket.deadline != inf:
            self.deadlines.put(ticket, ticket.deadline)
        if begun is not None:
            self.asked, self.together = ticket.ask, 1
            self.follow(ticket.ask, *begun)
        elif denial is not None:
            self.deny(ticket.ask, denial)
        elif self.in_flight and self.until == inf and ticket.ask == self.asked and len(self.tickets) == len(self.in_flight) + 1:
            # All before it are being asked for. So a crowd is decided together, as if it had called `check`.
            self.together += 1
            self.ask(ticket)
        self.advance()

    def abandon(self, ticket: Ticket) -> None:
        """Leave, as the caller was cancelled, or hand on the grant that has come meanwhile."""
        if ticket in self.tickets:
            self.remove(ticket)
            # Nothing is asked here: the loop may be about to end, and all of them with it.
            self.plan(soon=True)
        elif ticket.outcome and not isinstance(ticket.outcome, BaseException) and not self.of.loop.closed:
            line = self.of.owner.line_now(self)
            line.hand_out(ticket.ask, ticket.outcome)
            line.plan(soon=True)

    # What time and answers do:

    def hurry(self) -> None:
        """Ask at once, since units have come back."""
        if self.tickets:
            self.until = inf
            self.advance()

    def on_time(self) -> None:
        """Ask again, if it is time, and give up tickets that are out of it."""
        now = self.of.loop.now()
        if self.until != inf and self.at < now + SOON_S:
            self.until = inf
            self.timed = self.denial is not None and self.denial[1].retry_after_exact  # else it may just be too early
        self.advance()
        for ticket in self.deadlines.before(now + SOON_S):
            self.give(ticket, self.refusal(ticket, now))
        self.plan()

    def advance(self) -> None:
        """Ask for the first tickets, unless answers are on their way or say to wait."""
        while True:
            self.judge()
            first = self.first()
            if first is None or self.in_flight or self.until != inf:
                break
            if self.paused():
                break
            room = self.rivals.room(self.of.loop.now(), self.together, self.left) if self.together else 1
            self.together = 0
            self.asked = first.ask
            for ticket in list(islice(self.tickets, room)):
                if ticket.ask != first.ask or self.until != inf:
                    break
                self.together += 1
                self.ask(ticket)
        self.plan()

    def paused(self) -> bool:
        """Leave what comes back next to other processes, after a grant, if they are there and nothing is left."""
        if not self.together or self.left:
            return False
        now = self.of.loop.now()
        wait_s = self.rivals.pause(now)
        if wait_s:
            self.together = 0
            self.until, self.at = now + STEP_S, now + wait_s
        return bool(wait_s)

    def ask(self, ticket: Ticket) -> None:
        """Check once, for the first ticket that asks for the same."""
        try:
            pending = self.limiter.check(self.key, ticket.rule, cost=ticket.cost)
        except Exception as error:  # noqa: BLE001  # whatever it is, it is its caller's
            self.settle(ticket.ask, error)
        else:
            self.go_on(ticket.ask, pending)

    def go_on(self, ask: Hashable, pending: Pending) -> None:
        """Step a check as a task would that awaits it: there is no task for a line, and no caller's cancellation touches it."""
        try:
            waits_for = pending.send(None)
        except StopIteration as stop:
            self.settle(ask, stop.value)
        except (Exception, CancelledError) as error:  # noqa: BLE001  # likewise
            self.settle(ask, error)
        else:
            self.follow(ask, pending, waits_for)

    def follow(self, ask: Hashable, pending: Pending, waits_for: Any) -> None:
        """Step a check again when what it waits for is there."""
        self.in_flight[pending] = None
        resume = partial(self.resume, ask, pending)
        if waits_for is None:  # it is decided, and has the loop take a turn
            self.of.loop.soon(resume)
        else:
            waits_for._asyncio_future_blocking = False
            waits_for.add_done_callback(resume)

    def resume(self, ask: Hashable, pending: Pending, _waited_for: object = None) -> None:
        """Take the answer to a check that had to wait."""
        if pending in self.in_flight:  # or it was closed
            del self.in_flight[pending]
            self.go_on(ask, pending)
            self.advance()

    def settle(self, ask: Hashable, answer: Decision | BaseException) -> None:
        """Give an answer to the first ticket that asked for just this."""
        timed, self.timed = self.timed, False
        if isinstance(answer, BaseException):
            self.together = 0
            self.give(self.taker(ask), answer)
        elif answer:
            self.left = answer.remaining // max(answer.cost, 1)
            if timed:
                self.rivals.won()
            self.hand_out(ask, answer)
        else:
            self.deny(ask, answer, timed=timed)

    def hand_out(self, ask: Hashable, grant: Decision) -> None:
        """Give a grant away. It is lost if nobody waits for such a one any more, as when a check is cancelled."""
        self.give(self.taker(ask), grant)

    def deny(self, ask: Hashable, decision: Decision, *, timed: bool = False) -> None:
        """Wait until the time that a denial names. timed: it came when that of the last one was over."""
        now = self.of.loop.now()
        self.together = 0
        if decision.retry_after == inf:
            self.give(self.taker(ask), RateLimitExceeded(decision))
            return
        self.denial = (ask, decision, now)
        self.at = self.until = now + max(decision.retry_after, AWAY_STEP_S if decision.source in AWAY else STEP_S)
        if decision.source == "overload":
            # It says nothing of when there will be room. If all came again at that time, most would be too many again.
            self.until = now + AWAY_STEP_S
            self.at = random.uniform(self.until, self.at)  # noqa: S311  # nobody gains by guessing it
        elif decision.source == "redis":
            if timed:
                self.rivals.lost(now)
            self.at += self.rivals.delay(now, decision)

    def judge(self) -> None:
        """Give up, without waiting, those that can't be served in time: the first, or those behind one that waits for longer."""
        now = self.of.loop.now()
        while self.until != inf and (first := self.first()) is not None:
            if self.denial is None or self.denial[0] != first.ask:
                self.until = inf  # nobody has asked for this one yet
            elif first.deadline < self.until:
                self.give(first, self.refusal(first, now))
            else:
                self.at = self.until if first.deadline < self.at else self.at
                for ticket in self.deadlines.before(self.until):
                    self.give(ticket, self.refusal(ticket, now))
                return

    def refusal(self, ticket: Ticket, now: float) -> Exception:
        """Word the error of a ticket that is given up now."""
        asked, answered = self.denial, self.until != inf
        if asked is not None and answered and asked[0] == ticket.ask and asked[2] == now:
            return RateLimitExceeded(asked[1])
        heard = None if asked is None or not answered else Heard(asked[1], asked[2], self.until)
        return refusal(self.limiter, self.key, ticket, heard, now)

    # The tickets:

    def first(self) -> Ticket | None:
        """Find the first ticket."""
        return next(iter(self.tickets), None)

    def taker(self, ask: Hashable) -> Ticket | None:
        """Find the first ticket that asks for just this."""
        return next((ticket for ticket in self.tickets if ticket.ask == ask), None) if ask in self.wanted else None

    def give(self, ticket: Ticket | None, outcome: Decision | BaseException) -> None:
        """End a ticket's wait."""
        if ticket is not None:
            self.remove(ticket)
            ticket.outcome = outcome
            if ticket.future is not None:
                ticket.future.set_result(None)

    def remove(self, ticket: Ticket) -> None:
        """Take a ticket out of the line, and back what was asked for it, if that isn't sent yet."""
        del self.tickets[ticket]
        self.deadlines.take(ticket)
        left = self.wanted.pop(ticket.ask) - 1
        if left:
            self.wanted[ticket.ask] = left
        if ticket.ask == self.asked and len(self.in_flight) > left:
            # What isn't sent yet consumes nothing if it is closed. What is sent goes on, for those that come meanwhile.
            queued = [
                pending for pending in reversed(self.in_flight) if isinstance(pending, PendingDecision) and is_queued(pending)
            ]
            for pending in queued[: len(self.in_flight) - left]:
                del self.in_flight[pending]
                pending.close()

    def plan(self, *, soon: bool = False) -> None:
        """Have the loop's timer come back when there is something to do, and end the line if there never will be."""
        if self.tickets:
            self.of.plan(self, 0.0 if soon else min(inf if self.until == inf else self.at, self.deadlines.first()))
        elif self.in_flight:
            self.of.plan(self, inf)
        else:
            self.of.drop(self)

    def close(self) -> None:
        """End the line with its limiter."""
        while self.tickets:
            self.give(next(iter(self.tickets)), LimiterClosed())
        while self.in_flight:
            self.in_flight.popitem()[0].close()
        self.plan()


class Planned(Protocol):
    """A line of any kind, as far as its loop needs it."""

    @property
    def name(self) -> Hashable:
        """What it is found by."""

    def on_time(self) -> None:
        """Do what is due."""

    def close(self) -> None:
        """End with the limiter."""

    def __hash__(self) -> int: ...


class LoopLines:
    """The lines of one event loop, and its timer. Those of slots too: see `slots.py`."""

    def __init__(self, owner: Lines, found: Hashable, storage: Any) -> None:
        self.owner = owner
        self.found = found
        self.process = os.getpid()
        self.loop = loop_of(found, storage)
        self.lines: dict[Hashable, Planned] = {}
        self.of_keys: dict[Key, dict[Line | BookedLine, None]] = {}  # those of `acquire`
        self.agenda: Agenda[Planned] = Agenda()

    def line(self, name: Hashable, limiter: Limiter, key: Key, *, books: bool) -> Line | BookedLine:
        """Find or make a line."""
        found = self.lines.get(name)
        if found is None:
            found = self.lines[name] = (BookedLine if books else Line)(self, name, limiter, key)
            self.of_keys.setdefault(key, {})[found] = None
        return cast("Line | BookedLine", found)

    def plan(self, line: Planned, at: float) -> None:
        """Have a line's `on_time` called then; inf: not by time."""
        if at == inf:
            self.agenda.take(line)
        else:
            self.agenda.put(line, at)
        self.loop.set_timer(self.agenda.first(), self.on_time)

    def drop(self, line: Planned) -> None:
        """Forget a line, and the loop with its last one."""
        if self.lines.get(line.name) is line:
            del self.lines[line.name]
            if isinstance(line, (Line, BookedLine)):
                of_key = self.of_keys[line.key]
                del of_key[line]
                if not of_key:
                    del self.of_keys[line.key]
        self.plan(line, inf)
        if not self.lines:
            self.owner.drop(self)

    def on_time(self) -> None:
        """Have each line that is due go on."""
        if self.process == os.getpid():  # else it is that of the process that forked this one
            try:
                for line in self.agenda.before(self.loop.now() + SOON_S):
                    line.on_time()
            finally:
                self.loop.set_timer(self.agenda.first(), self.on_time)

    def came_back(self, key: Key) -> None:
        """Have the lines of a key ask at once, since units of it have come back."""
        for line in list(self.of_keys.get(key, ())):
            line.hurry()

    def close(self) -> None:
        """End all lines with their limiter."""
        for line in list(self.lines.values()):
            line.close()


def running() -> Hashable:
    """Find what stands for the running event loop; None if there is none."""
    with suppress(RuntimeError):
        return loop_here()
    return None


class Lines:
    """The lines of a limiter, in all event loops of this process."""

    __slots__ = ("_in_a_row", "_loops")

    def __init__(self) -> None:
        self._in_a_row = 0
        self._loops: dict[Hashable, LoopLines] = {}

    def __len__(self) -> int:
        """Lines in which somebody waits, or holds a slot."""
        return sum(len(each.lines) for each in list(self._loops.values()))

    async def acquire(self, limiter: Limiter, key: Key, rule: Any, cost: int, timeout: float | None) -> Decision:
        """Wait in line for a grant, as `RateThrottleCore.acquire` says."""
        timeout_s = seconds_of(timeout)
        if timeout_s == 0:
            decision = await limiter.check(key, rule, cost=cost)
            if not decision:
                raise RateLimitExceeded(decision)
            return decision
        entry = limiter._entry_of(key, rule, cost)  # each mistake is refused here, also while others wait
        books = bookable(entry)
        rule = only_of(entry) if rule is None else kept(rule)
        if isinstance(rule, Timed) and rule.rules is None:
            rule = Timed(only_of(entry))
        name = (key, rules_of(rule), books)
        begun = answer = None
        if not self._waits(name):
            asks = begin(limiter, entry, timeout_s) if books else limiter.check(key, rule, cost=cost)
            begun, answer = self._step(asks)
            if answer and (not books or wait_of(answer) == 0):
                if books:
                    await self._let_others_run(limiter, answer)
                return answer if isinstance(rule, Timed) else served(answer)  # most are granted here and now, and need no line
        here = self._here(limiter)
        ticket = Ticket(rule, cost, timeout_s, here.loop.now() + timeout_s)
        line = here.line(name, limiter, key, books=books)
        line.enter(ticket, begun, answer)
        if ticket.outcome is None:
            ticket.future = here.loop.future(partial(line.abandon, ticket))
            try:
                await ticket.future
            except BaseException:
                line.abandon(ticket)
                raise
        elif books:
            await self._let_others_run(limiter, ticket.outcome)
        outcome, ticket.outcome = ticket.outcome, None
        if isinstance(outcome, BaseException):
            try:
                raise outcome
            finally:
                del outcome  # its traceback holds this frame
        return cast(Decision, outcome) if isinstance(rule, Timed) else served(cast(Decision, outcome))

    def _step(self, asks: Decision | Pending) -> tuple[tuple[Pending, Any] | None, Decision | None]:
        """Begin to await what asks. Returns it and what that waits for, or the answer."""
        if isinstance(asks, Decision):
            return None, asks
        try:
            return (asks, asks.send(None)), None
        except StopIteration as stop:
            return None, stop.value

    async def _let_others_run(self, limiter: Limiter, outcome: Decision | BaseException) -> None:
        """Keep a task that goes on acquiring, and never has to wait, from freezing the loop. To refuse takes a hundred times as long."""
        self._in_a_row += 1
        if self._in_a_row >= YIELD_EVERY or isinstance(outcome, BaseException):
            self._in_a_row = 0
            try:
                await checkpoint()
            except BaseException:
                if isinstance(outcome, Decision):
                    give_back(limiter, outcome)
                raise

    def _waits(self, name: Hashable) -> bool:
        """Whether somebody waits in that line of the running loop."""
        lines = self._loops.get(loop_here()) if self._loops else None
        return lines is not None and name in lines.lines and lines.process == os.getpid()

    def _here(self, limiter: Limiter) -> LoopLines:
        """Find or make the lines of the running loop."""
        found = loop_here()
        lines = self._loops.get(found)
        if lines is None or lines.process != os.getpid():
            for known, other in list(self._loops.items()):
                if other.loop.closed or other.process != os.getpid():
                    self._loops.pop(known, None)
            lines = self._loops[found] = LoopLines(self, found, limiter._storage)
        return lines

    def line_now(self, line: Any) -> Any:
        """Find the line that others stand in by now, if this one has ended since."""
        return self._loops.get(line.of.found, line.of).lines.get(line.name, line)

    def drop(self, lines: LoopLines) -> None:
        """Forget a loop in which nobody waits."""
        if self._loops.get(lines.found) is lines:
            del self._loops[lines.found]

    def came_back(self, key: Key) -> None:
        """Have callers of a key ask at once, in each loop, since units of it have come back."""
        for found, lines in list(self._loops.items()):
            if key in lines.of_keys and lines.process == os.getpid():
                if found is running():
                    lines.came_back(key)
                else:
                    with suppress(RuntimeError):  # that loop has ended
                        lines.loop.from_any_thread(partial(lines.came_back, key))

    def close(self) -> None:
        """Have every caller that waits raise LimiterClosed, in its own loop."""
        here = running()
        for found, lines in list(self._loops.items()):
            if lines.process != os.getpid():
                continue
            if found is here:
                lines.close()
            else:
                with suppress(RuntimeError):  # that loop has ended
                    lines.loop.from_any_thread(lines.close)
