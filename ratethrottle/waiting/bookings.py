"""`acquire` on a bucket: callers that have booked.

A bucket can count what is used later. So each caller asks once, when it comes, and hears when it is its turn: over all processes in
the order in which the storage saw them. No turn is farther ahead than a minute. Callers for whom that isn't enough stand in a tail, of
which the first ones are asked for again once there is room.
"""

from __future__ import annotations

import random
from asyncio import CancelledError
from bisect import bisect_left, insort
from collections.abc import Hashable
from functools import partial
from itertools import count
from math import inf
from operator import attrgetter
from typing import Any, NamedTuple, Protocol

from ratethrottle._core import PendingDecision
from ratethrottle._engine.bookings import bookable, booking, served, unbooking
from ratethrottle._engine.decision import Decision, Entry
from ratethrottle._engine.joint import Joint, JointDecision
from ratethrottle.errors import LimiterClosed, RateLimitExceeded
from ratethrottle.storage._shared.waiting import is_queued
from ratethrottle.waiting.agenda import Agenda
from ratethrottle.waiting.tickets import AWAY, AWAY_STEP_S, SOON_S, STEP_S, Heard, Key, Limiter, Pending, Ticket, refusal

AHEAD_S = 60.0  # no turn is farther ahead
ROOM_MOST = 1_000  # of a tail, so many are asked for at once at most

_number = attrgetter("number")


class Turn(NamedTuple):
    """When something that was booked may be used."""

    at: float
    number: int  # of equal ones the first that was heard comes first
    decision: Any


def place_of(ticket: Ticket, tickets: list[Ticket]) -> int:
    """Find a ticket among some in the order in which they came; -1: it isn't there."""
    place = bisect_left(tickets, ticket.number, key=_number)
    return place if place < len(tickets) and tickets[place] is ticket else -1


class Asked:
    """The callers of a line that ask for the same: the first one takes the first turn.

    There are as many turns as callers, but for those that are being asked for.
    """

    __slots__ = ("asking", "tickets", "turns")

    def __init__(self) -> None:
        self.tickets: list[Ticket] = []  # in the order in which they came
        self.turns: list[Turn] = []  # in order
        self.asking: dict[Pending, Ticket] = {}


class Lines(Protocol):
    """The lines of all loops."""

    def line_now(self, line: Any) -> Any:
        """Find the line that others stand in by now."""


class LinesHere(Protocol):
    """The lines of one loop, as far as a line needs them."""

    @property
    def owner(self) -> Lines:
        """Those of all loops."""

    @property
    def loop(self) -> Any:
        """The loop."""

    def plan(self, line: Any, at: float) -> None:
        """Have the line's `on_time` called then."""

    def drop(self, line: Any) -> None:
        """Forget a line."""


def begin(limiter: Limiter, entry: Entry | Joint, ahead_s: float) -> Decision | Pending:
    """Book, or begin to: a turn within `ahead_s` from now."""
    answer: Decision | Pending = limiter._storage.book(booking(entry, round(min(ahead_s, AHEAD_S) * 1e6)))
    return answer


def wait_of(grant: Decision) -> float:
    """Say how long it is until the turn that was granted."""
    return grant.retry_after if isinstance(grant, JointDecision) else 0.0


def give_back(limiter: Limiter, grant: Decision) -> None:
    """Give a turn back that nobody needs. It stays used if somebody has booked behind it."""
    returned = unbooking(grant) if isinstance(grant, JointDecision) else None
    if returned is not None:
        limiter._storage.unbook(returned)


class BookedLine:
    """The callers that wait for one key under one rule of a bucket."""

    __slots__ = ("asked", "deadlines", "heard", "key", "limiter", "name", "numbers", "of", "room", "tail", "until")

    def __init__(self, of: LinesHere, name: Hashable, limiter: Limiter, key: Key) -> None:
        self.of = of
        self.name = name
        self.limiter = limiter
        self.key = key
        self.numbers = count()
        self.asked: dict[Hashable, Asked] = {}
        self.deadlines: Agenda[Ticket] = Agenda()
        self.tail: list[Ticket] = []  # in the order in which they came
        self.until = -inf  # when the first of them is asked for again
        self.heard: Heard | None = None  # what it heard last
        self.room = 1  # so many are asked for then

    # What callers do:

    def enter(self, ticket: Ticket, begun: tuple[Pending, Any] | None = None, answer: Decision | None = None) -> None:
        """Stand at the end. begun: what asks for it already, and what that waits for. answer: what that has come to."""
        ticket.number = next(self.numbers)
        if ticket.deadline != inf:
            self.deadlines.put(ticket, ticket.deadline)
        if begun is None and answer is None and self.tail:
            insort(self.tail, ticket, key=_number)
            if self.until > self.of.loop.now():
                self.judge()
        else:
            ticket.ahead_s = min(ticket.timeout_s, AHEAD_S)
            asked = self.stand(ticket)
            if begun is not None:
                self.follow(asked, ticket, *begun)
            elif answer is not None:
                self.settle(asked, ticket, answer)
            else:
                self.ask(asked, ticket)
        self.plan()

    def abandon(self, ticket: Ticket) -> None:
        """Leave, as the caller was cancelled. What was booked for it, or was granted at that very moment, goes to those behind it."""
        if self.remove(ticket):
            # Nothing is given back here: the loop may be about to end, and all of them with it.
            self.plan(soon=True)
        elif ticket.outcome and not isinstance(ticket.outcome, BaseException) and not self.of.loop.closed:
            line: BookedLine = self.of.owner.line_now(self)
            turns = line.asked.setdefault(ticket.ask, Asked()).turns
            insort(turns, Turn(line.of.loop.now(), next(line.numbers), ticket.outcome))
            line.plan(soon=True)

    # What time and answers do:

    def hurry(self) -> None:
        """Ask for those without a turn at once, since units have come back. Turns stay as they are."""
        self.until = -inf
        self.advance()
        self.trim()
        self.plan()

    def on_time(self) -> None:
        """Serve those whose turn it is, and give up those that are out of time."""
        now = self.of.loop.now()
        self.serve(now)
        self.advance()
        last = self.heard
        for ticket in self.deadlines.before(now + SOON_S):
            heard = last if place_of(ticket, self.tail) >= 0 else None
            self.give(ticket, refusal(self.limiter, self.key, ticket, heard, now))
        self.trim()
        self.plan()

    def serve(self, now: float) -> None:
        """Let those go on whose turn it is, in order."""
        while due := [
            asked for asked in self.asked.values() if asked.tickets and asked.turns and asked.turns[0].at <= now + SOON_S
        ]:
            asked = min(due, key=lambda each: each.turns[0])
            self.give(asked.tickets[0], asked.turns.pop(0).decision)

    def advance(self) -> None:
        """Ask for the first of the tail again, if it is time and no answer is on its way."""
        while self.tail and self.until <= self.of.loop.now() + SOON_S and not self.is_asking():
            first = self.tail[: self.room]
            del self.tail[: self.room]
            self.room = min(2 * self.room, ROOM_MOST)
            while first and self.until <= self.of.loop.now() + SOON_S:
                ticket = first.pop(0)
                # In whole ms, so that they ask for the same.
                ticket.ahead_s = max(0, int(min(ticket.deadline - self.of.loop.now(), AHEAD_S) * 1e3)) / 1e3
                self.ask(self.stand(ticket), ticket)
            for ticket in first:
                insort(self.tail, ticket, key=_number)

    def ask(self, asked: Asked, ticket: Ticket) -> None:
        """Ask for a ticket, unless it takes a turn that somebody else didn't need."""
        now = self.of.loop.now()
        while len(asked.tickets) == 1 and asked.turns and asked.turns[0].at < now - SOON_S:
            asked.turns.pop(0)  # nobody needed it at that time, and nobody may use it later
        if len(asked.turns) >= len(asked.tickets):
            self.serve(now)
            self.refuse_late(asked, ticket)
            return
        try:
            entry = self.limiter._entry_of(self.key, ticket.rule, ticket.cost)
            if bookable(entry):
                answer = begin(self.limiter, entry, ticket.ahead_s)
            else:  # its rule was changed meanwhile
                answer = self.limiter.check(self.key, ticket.rule, cost=ticket.cost)
        except Exception as error:  # noqa: BLE001  # whatever it is, it is its caller's
            self.settle(asked, ticket, error)
        else:
            if isinstance(answer, Decision):
                self.settle(asked, ticket, answer)
            else:
                self.go_on(asked, ticket, answer)

    def go_on(self, asked: Asked, ticket: Ticket, pending: Pending) -> None:
        """Step what asks as a task would that awaits it."""
        try:
            waits_for = pending.send(None)
        except StopIteration as stop:
            self.settle(asked, ticket, stop.value)
        except (Exception, CancelledError) as error:  # noqa: BLE001  # likewise
            self.settle(asked, ticket, error)
        else:
            self.follow(asked, ticket, pending, waits_for)

    def follow(self, asked: Asked, ticket: Ticket, pending: Pending, waits_for: Any) -> None:
        """Step it again when what it waits for is there."""
        asked.asking[pending] = ticket
        resume = partial(self.resume, asked, pending)
        if waits_for is None:  # it is decided, and has the loop take a turn
            self.of.loop.soon(resume)
        else:
            waits_for._asyncio_future_blocking = False
            waits_for.add_done_callback(resume)

    def resume(self, asked: Asked, pending: Pending, _waited_for: object = None) -> None:
        """Take an answer that had to be waited for."""
        ticket = asked.asking.pop(pending, None)
        if ticket is not None:  # or it was closed
            self.go_on(asked, ticket, pending)
            self.advance()
            self.trim()
            self.plan()

    def settle(self, asked: Asked, ticket: Ticket, answer: Decision | BaseException) -> None:
        """Take the answer to what was asked for a ticket, which may have left since."""
        if isinstance(answer, BaseException):
            self.give(ticket, answer)
        elif answer:
            now = self.of.loop.now()
            # Not before those that were booked before it, however long their answers took.
            last = max((each.turns[-1].at for each in self.asked.values() if each.turns), default=-inf)
            turn = Turn(max(now + wait_of(answer), last), next(self.numbers), answer)
            insort(asked.turns, turn)
            self.serve(now)
            if turn.at > ticket.deadline + SOON_S:
                self.refuse_late(asked, ticket)
        else:
            # The last one that has no turn and isn't asked for. That is another one, if turns came out of their order.
            being = set(asked.asking.values())
            left = next((each for each in reversed(asked.tickets[len(asked.turns) :]) if each not in being), None)
            if left is not None:
                self.deny(left, answer, ticket.ahead_s)

    def deny(self, ticket: Ticket, decision: Decision, ahead_s: float) -> None:
        """Have a ticket wait for which there is no turn, if it still has time for one. ahead_s: how far ahead that might have been."""
        now = self.of.loop.now()
        away = decision.source in AWAY
        turn = now + decision.retry_after
        at = max(turn - (0 if away else ahead_s), now + (AWAY_STEP_S if away else STEP_S))
        if decision.source == "overload":  # if all came again at the same time, most would be too many again
            at = random.uniform(now + AWAY_STEP_S, at)  # noqa: S311  # nobody gains by guessing it
        turn = at if away else turn
        if turn == inf or ticket.deadline < turn:
            self.give(ticket, RateLimitExceeded(served(decision)))
            return
        del self.asked[ticket.ask].tickets[place_of(ticket, self.asked[ticket.ask].tickets)]
        insort(self.tail, ticket, key=_number)
        if self.tail[0] is ticket:
            self.until, self.heard, self.room = at, Heard(decision, now, turn), 1
            self.judge()

    def judge(self) -> None:
        """Give up, without waiting, those of the tail that have no time until the turn of the first one."""
        now, heard = self.of.loop.now(), self.heard
        for ticket in [each for each in self.tail if heard is not None and each.deadline < heard.until]:
            self.give(ticket, refusal(self.limiter, self.key, ticket, heard, now))

    def refuse_late(self, asked: Asked, ticket: Ticket) -> None:
        """Give a ticket up whose turn comes after its time."""
        if 0 <= (place := place_of(ticket, asked.tickets)) < len(asked.turns):
            turn, now = asked.turns[place], self.of.loop.now()
            if turn.at > ticket.deadline + SOON_S:
                self.give(ticket, refusal(self.limiter, self.key, ticket, Heard(turn.decision, now, turn.at), now))

    def trim(self) -> None:
        """Give back the turns that nobody needs, the last ones first, once no answer is on its way that may be behind them.

        What stands before others of this line can't be given back. It stays for those who ask for the same before that turn.
        """
        for asked in self.asked.values():
            orphans = asked.asking if len(asked.turns) + len(asked.asking) > len(asked.tickets) else {}
            for pending in [each for each, ticket in orphans.items() if place_of(ticket, asked.tickets) < 0]:
                if isinstance(pending, PendingDecision) and is_queued(pending):
                    del asked.asking[pending]  # what isn't sent yet consumes nothing if it is closed
                    pending.close()
        if self.is_asking():
            return
        for ask, asked in list(self.asked.items()):
            while len(asked.turns) > len(asked.tickets) and (
                follower := next((each for each in self.tail if each.ask == ask), None)
            ):
                self.tail.remove(follower)
                self.ask(self.stand(follower), follower)
        now = self.of.loop.now()
        needed = [each.turns[: len(each.tickets)][-1] for each in self.asked.values() if each.turns and each.tickets]
        last = max(needed, default=Turn(now, 0, None))
        spare: list[Turn] = []
        for ask, asked in list(self.asked.items()):
            while len(asked.turns) > len(asked.tickets) and (
                asked.turns[-1] > last or (not asked.tickets and asked.turns[-1].at <= now)
            ):
                spare.append(asked.turns.pop())
            if not asked.tickets and not asked.turns:
                del self.asked[ask]
        for turn in sorted(spare, reverse=True):
            give_back(self.limiter, turn.decision)

    # The tickets:

    def stand(self, ticket: Ticket) -> Asked:
        """Have a ticket stand among those that ask for the same."""
        asked = self.asked.setdefault(ticket.ask, Asked())
        insort(asked.tickets, ticket, key=_number)
        return asked

    def is_asking(self) -> bool:
        """Whether an answer is on its way."""
        return any(asked.asking for asked in self.asked.values())

    def give(self, ticket: Ticket, outcome: Decision | BaseException) -> None:
        """End a ticket's wait, if it still waits."""
        if self.remove(ticket):
            ticket.outcome = outcome
            if ticket.future is not None:
                ticket.future.set_result(None)

    def remove(self, ticket: Ticket) -> bool:
        """Take a ticket out of the line. Returns whether it was there."""
        for tickets in (self.asked[ticket.ask].tickets if ticket.ask in self.asked else [], self.tail):
            if (place := place_of(ticket, tickets)) >= 0:
                del tickets[place]
                self.deadlines.take(ticket)
                if tickets is self.tail and place == 0 and (self.heard is None or self.heard.denial.source not in AWAY):
                    self.until, self.heard, self.room = -inf, None, 1  # that was for this one alone
                return True
        return False

    def plan(self, *, soon: bool = False) -> None:
        """Have the loop's timer come back when there is something to do, and end the line if there never will be."""
        at, waits = inf, bool(self.tail)
        for asked in self.asked.values():
            waits = waits or bool(asked.tickets)
            if asked.turns and asked.tickets:
                at = min(at, asked.turns[0].at)
        if self.tail and not self.is_asking():
            at = min(at, self.until)
        if soon:
            self.of.plan(self, 0.0)
        elif waits or self.is_asking():
            self.of.plan(self, min(at, self.deadlines.first()))
        else:
            self.trim()
            self.of.drop(self)

    def close(self) -> None:
        """End the line with its limiter."""
        for ticket in [*self.tail, *(ticket for asked in self.asked.values() for ticket in asked.tickets)]:
            self.give(ticket, LimiterClosed())
        for asked in self.asked.values():
            while asked.asking:
                asked.asking.popitem()[0].close()
        self.plan()
