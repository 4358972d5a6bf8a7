"""Slots on Redis: what an event loop asks of Redis, hears from it, and decides without it. docs/arithmetic.md has it under "Slots"."""

from __future__ import annotations

import contextvars
import copy
import os
from asyncio import AbstractEventLoop, Future
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent import futures
from dataclasses import dataclass
from typing import Final, Protocol

from ratethrottle._engine.decision import Entry
from ratethrottle._holding import Ask, Held, Holder
from ratethrottle.errors import StateUnreadable, StorageError, StorageRefused, StorageTimeout, StorageUnavailable
from ratethrottle.rule import ConcurrencyRule
from ratethrottle.storage import Timer, Timers
from ratethrottle.storage._shared.batch import Batch
from ratethrottle.storage._shared.call import ControlCall
from ratethrottle.storage._shared.keynames import KeyNames
from ratethrottle.storage._shared.repair import Repair
from ratethrottle.storage.redis.holders import Asked, Book, Here, Identity, Record

KEYS_MAX: Final = 128  # of a call
HOLDERS_MAX: Final = 64
WANTED_MAX: Final = 1_000_000  # of an item, and held units; whatever is above is as good as that
HELD_MAX: Final = 4_000_000_000
NOTHING: Final = Ask(0, waits=False)
UNREADABLE, UNSURE, OLD, LAPSED, FORGOTTEN = -2, -3, -4, -5, -6
TOUCHED_US: Final = 45_000_000  # Redis hears again what is held, and says if its state is gone
AGAIN_S: Final = 0.05, 1.0  # at least and at most, without Redis
STOOD_STILL_US: Final = 50_000  # a timer that fires so late was kept from it by its loop


class Link(Protocol):
    """A connection, as slots need it."""

    loop: AbstractEventLoop
    batch: Batch
    slots_failed: Callable[[ControlCall, StorageError], None] | None

    def connect(self) -> None:
        """Have it connect, if there is no connection."""

    def retry_us(self) -> int:
        """Return how long until Redis is asked again, in µs."""

    def slots_answered(self) -> None:
        """Take note that a call has gone well after an error."""


@dataclass(eq=False, slots=True)
class Flight:
    """A call without a reply yet."""

    epoch: int
    sent_us: int
    holders: list[tuple[Identity, bytes, bool]]  # by what name, and whether it has told all by then
    items: list[tuple[Record, bytes, int, Asked | None]]  # by what name, and with how many units held
    call: ControlCall | None = None


class Slots:
    """The slots of one event loop of one process. One call is in flight at a time, and what comes meanwhile goes into the next."""

    def __init__(
        self,
        names: KeyNames,
        repair: Repair,
        here: Here,
        link: Link,
        timers: Timers,
        *,
        deadline_us: int,
        on_outage: str,
    ) -> None:
        self.process = os.getpid()
        self._names = names
        self._repair = repair
        self._book = Book(here)
        self._link = link
        self._loop = link.loop
        self._timers = timers
        self._deadline_us = deadline_us
        self._on_outage = on_outage
        self._context = contextvars.Context()  # of what is called later: it belongs to no request
        self._epoch, self._clears = repair.epoch, repair.clears
        self._due: deque[Record] = deque()
        self._asked: deque[Asked] = deque()  # in the order of their deadlines
        self._flight: Flight | None = None
        self._sequence = 0
        self._scheduled = False
        self._timer: Timer | None = None
        self._timer_us = 0
        self._excused = False
        self._closed = False
        self._held_back_us = 0  # after an error nothing is renewed until then; 0: there was none since the last answer
        self._forgetting: dict[ControlCall, Future[bool]] = {}
        self._follow(link)

    def __len__(self) -> int:
        """Keys of which something is held, or that Redis has to hear of."""
        return len(self._book)

    @property
    def asked(self) -> bool:
        """Whether an answer of Redis is to come."""
        return self._flight is not None or any(asked.waits for asked in self._asked)

    def use(self, link: Link) -> None:
        """Send calls on that connection from now on."""
        if self._link is not link:
            self._link.batch.listen(None)
            self._link = link
            self._give_up_flight()
            self._follow(link)

    def _follow(self, link: Link) -> None:
        link.batch.listen(self._moved_on)
        link.slots_failed = self._failed

    # What lines ask:

    def hold(self, holder: Holder, rule: ConcurrencyRule, ask: Ask) -> Held | Future[Held]:
        """Answer an ask. Raises StorageError."""
        record, batch = self._book.find(holder, rule.ttl_us), self._link.batch
        if record is None:
            record = self._book.add(holder, rule, self._names.slots_key(holder.entry))
        record.rule = rule
        record.hold(ask.held)
        if not batch.knows_epoch:
            self._link.connect()
            if batch.away or batch.refused:
                return self._decide(record, ask)
        asked = record.asked = Asked(record, ask, self._loop.create_future(), self._now_us() + self._deadline_us)
        self._asked.append(asked)
        self._queue(record)
        self._arm(asked.deadline_us)
        return asked.answer

    def _decide(self, record: Record, ask: Ask) -> Held:
        """Answer by the outage policy. Raises StorageError. What is given back is taken in any case."""
        record.asked = None
        granted, free = 0, 0
        try:
            if ask.wanted:
                granted, free = self._granted_here(record, ask)
        finally:
            record.hold(ask.held + granted * ask.cost)
            self._settle(record)
        least_s, most_s = AGAIN_S
        again_s = min(most_s, max(least_s, self._link.retry_us() / 1e6)) if granted < ask.wanted else 0.0
        return Held(granted, free, again_s, "outage")

    def _granted_here(self, record: Record, ask: Ask) -> tuple[int, int]:
        """How many slots the policy grants, and what is left of this process's share."""
        policy = record.rule.on_outage or self._on_outage
        reason = self._link.batch.reason or StorageTimeout(self._deadline_us / 1e6)
        if policy == "raise" or isinstance(reason, StorageRefused) or self._closed:
            raise copy.copy(reason)
        limit = record.rule.limit
        if policy == "allow":
            return ask.wanted, limit
        if policy == "deny":
            return 0, 0
        shares = self._repair.shares
        share = limit // shares.n + (shares.rank < limit % shares.n) if shares.n else 0
        return record.take(share, ask.cost, ask.wanted)

    # What Redis is asked:

    def _queue(self, record: Record) -> None:
        if not record.queued:
            record.queued = True
            self._due.append(record)
        self._schedule()

    def _schedule(self) -> None:
        if not self._scheduled and not self._closed:
            self._scheduled = True
            self._loop.call_soon(self._pump, context=self._context)

    def _moved_on(self) -> None:
        """See what the connection can do now."""
        if self._flight is not None and not (self._link.batch.knows_epoch and self._flight.epoch == self._repair.epoch):
            self._give_up_flight()
        if self._link.batch.knows_epoch and (self._repair.epoch, self._repair.clears) != (self._epoch, self._clears):
            # At once: others wait only so long for what this process has to tell.
            self._pump()
        elif self._link.batch.knows_epoch:
            self._schedule()

    def _give_up_flight(self) -> None:
        """Ask again what was asked in a call that has no reply: nobody knows whether it was run."""
        flight, self._flight = self._flight, None
        if flight is not None:
            for record, _, _, _ in flight.items:
                record.kept = False
                record.stale = record.stale or record.asked is None
                self._queue(record)

    def _pump(self) -> None:
        self._scheduled = False
        if self._closed or self._flight is not None or not self._link.batch.knows_epoch:
            return
        now_us = self._now_us()
        self._enter_epoch()
        self._lapse(now_us)
        if now_us < self._held_back_us and not any(record.asked is not None for record in self._due):
            self._arm(self._held_back_us)
            return
        flight = self._fill(now_us)
        if flight is not None:
            self._flight = flight
            flight.call = self._call(flight)
            self._link.batch.send(flight.call)
            self._arm(now_us + 2 * self._deadline_us)
        else:
            self._arm_renewals()

    def _enter_epoch(self) -> None:
        """Be somebody else in a new epoch, and tell it first of all what is held; or nothing, if everything was cleared."""
        if self._clears != self._repair.clears:
            self._clears, self._epoch = self._repair.clears, self._repair.epoch
            for identity in self._book.identities:
                self._announce([record for record in identity.records if record.held])
                identity.lapse()
        elif self._epoch != self._repair.epoch:
            before, self._epoch = self._epoch, self._repair.epoch
            if before:
                for identity in self._book.identities:
                    identity.rename()
        else:
            return
        untold = self._book.untold()
        self._due = deque([*untold, *(record for record in self._due if record not in untold)])
        for record in untold:
            record.queued = True
        for identity in self._book.identities:
            self._tell(identity)

    def _fill(self, now_us: int) -> Flight | None:
        """Take what is asked, and what has to be renewed, into a call."""
        records: dict[bytes, Record] = {}
        identities: dict[Identity, None] = {}
        later: list[Record] = []
        self._touch(now_us)
        while self._due and len(records) < KEYS_MAX:
            record = self._due.popleft()
            record.queued = False
            if record.asked is not None and not record.asked.waits:
                self._settle(record, queue=False)
            if record.asked is None and not record.stale:
                self._book.tidy(record)
            elif record.key in records or (record.identity not in identities and len(identities) == HOLDERS_MAX):
                later.append(record)
            else:
                records[record.key] = record
                identities[record.identity] = None
        for record in reversed(later):
            record.queued = True
            self._due.appendleft(record)
        for identity in self._book.identities:
            if identity.records and identity.until_us and identity.renew_us <= now_us and len(identities) < HOLDERS_MAX:
                identities[identity] = None
        if not identities:
            return None
        taken = set(records.values())
        return Flight(
            self._repair.epoch,
            now_us,
            [(identity, identity.name, identity.untold <= taken) for identity in identities],
            [(record, record.identity.name, record.held, record.asked) for record in records.values()],
        )

    def _touch(self, now_us: int) -> None:
        """Say again what was held for long, a call's worth at a time: Redis keeps it, or has lost it, which this finds out."""
        for identity in self._book.identities:
            for record in [*_first(identity.records, KEYS_MAX // 2)]:
                if record.touched_us + TOUCHED_US > now_us:
                    break
                if record.known:
                    record.stale = True
                    self._queue(record)

    def _call(self, flight: Flight) -> ControlCall:
        numbers = {identity: number for number, (identity, _, _) in enumerate(flight.holders, 1)}
        words = [b"hold", b"%d" % len(flight.holders)]
        for identity, _, told in flight.holders:
            words += identity.words(told)
        for record, _, held, asked in flight.items:
            self._sequence += 1
            ask = asked.ask if asked is not None else NOTHING
            wanted, bits = min(ask.wanted, WANTED_MAX), (record.kept and held > 0) + 2 * ask.waits
            number = numbers[record.identity]
            item = (number, record.rule.limit, ask.cost, min(held, HELD_MAX), wanted, self._sequence, bits)
            words += [b"%d" % word for word in item]
            # After this, something of it may be gone there.
            record.sent, record.kept, record.stale = True, record.kept and held > 0, False
        keys = [self._names.holders_key, *(record.key for record, _, _, _ in flight.items)]
        return ControlCall("slots", keys, words, lambda numbers: self._answered(flight, numbers))

    # What Redis answers:

    def _answered(self, flight: Flight, numbers: Sequence[int]) -> None:
        if flight is not self._flight:
            return
        holders, items = flight.holders, flight.items
        if len(numbers) != 1 + len(holders) + 3 * len(items):  # it wasn't run
            self._give_up_flight()
            return
        self._flight = None
        if self._held_back_us:
            self._held_back_us = 0
            self._link.slots_answered()
        for (identity, name, told), standing in zip(holders, numbers[1:], strict=False):
            if identity.name == name:
                self._take_standing(identity, standing, flight.sent_us, told)
        at = 1 + len(holders)
        for record, name, held, asked in items:
            self._take_item(record, name, held, asked, numbers[at : at + 3])
            at += 3
        if self._due:
            self._schedule()
        self._arm_renewals()

    def _failed(self, call: ControlCall, error: StorageError) -> None:
        """Redis has answered a call with an error: it is that of all who asked. Redis hears later what is held."""
        forgotten, flight = self._forgetting.pop(call, None), self._flight
        if forgotten is not None and not forgotten.done():
            forgotten.set_exception(error)
        if flight is None or flight.call is not call:
            return
        self._flight = None
        self._held_back_us = self._now_us() + round(AGAIN_S[1] * 1e6)
        for record, _, _, asked in flight.items:
            record.kept = False
            if asked is not None and record.asked is asked and asked.waits:
                self._fail(record, copy.copy(error))
            if record.asked is None or record.asked is asked:
                self._settle(record)
        if self._due:
            self._schedule()
        self._arm_renewals()

    def _take_standing(self, identity: Identity, standing: int, sent_us: int, told: bool) -> None:
        if not standing:
            self._lapse_one(identity)
            return
        identity.renewed(sent_us, told)
        self._repair.watch_until(identity.until_us)
        if standing == 2:
            for record in identity.records:
                if record.known:
                    record.stale = True
                    self._queue(record)

    def _take_item(self, record: Record, name: bytes, held: int, asked: Asked | None, numbers: Sequence[int]) -> None:
        granted, free, again_us = numbers
        waits = asked is not None and asked.waits
        if record.identity.name != name:
            if waits or record.stale:
                self._queue(record)
            else:
                self._book.tidy(record)
        elif granted in (OLD, LAPSED):
            record.stale = True
            self._queue(record)
        elif granted == FORGOTTEN:
            record.sent = False
            self._announce([record])
        elif granted == UNREADABLE:
            record.sent = False
            record.identity.untold.discard(record)  # nobody else is granted anything there either
            self._fail(record, StateUnreadable(record.rule.name))
        else:
            cost = asked.ask.cost if asked is not None else 1
            record.confirm(held + max(0, granted) * cost, self._now_us())
            if asked is not None and waits:
                self._give(asked, granted, free, again_us)
            elif record.asked is None or record.asked is asked:
                self._settle(record)

    def _give(self, asked: Asked, granted: int, free: int, again_us: int) -> None:
        """Give the answer to an ask."""
        record, ask, source = asked.record, asked.ask, "redis"
        if granted == UNSURE:
            # Others may hold what nobody has told Redis of yet.
            granted = ask.wanted if (record.rule.on_outage or self._on_outage) == "allow" else 0
            source, again_us = "outage", max(again_us, 1_000)
        record.hold(ask.held + granted * ask.cost)
        self._settle(record)
        asked.answer.set_result(Held(granted, free, again_us / 1e6 if granted < ask.wanted else 0.0, source))

    def _announce(self, lost: Iterable[Record]) -> None:
        """Have lines know that what they hold is lost."""
        for record in lost:
            asked, record.asked = record.asked, None
            record.lose()
            try:
                record.holder.lost()
            except Exception as error:  # noqa: BLE001  # a callback of a user's; the others have to hear it too
                self._loop.call_exception_handler({"message": "a slot could not be announced as lost", "exception": error})
            if asked is not None and not asked.answer.done():
                asked.answer.set_result(Held(0, 0, AGAIN_S[0], "redis", lost=True))
            self._book.tidy(record)

    def _fail(self, record: Record, error: StorageError) -> None:
        asked, record.asked = record.asked, None
        if asked is not None and not asked.answer.done():
            asked.answer.set_exception(error)
        self._book.tidy(record)

    def _settle(self, record: Record, *, queue: bool = True) -> None:
        """No ask of it waits any more: see whether Redis has to hear what is held."""
        record.asked = None
        record.stale = record.sent or record.known != record.held
        if record.stale and queue:
            self._queue(record)
        self._book.tidy(record)

    # What comes by time:

    def _now_us(self) -> int:
        return self._repair.bounds.clock_us()

    def _arm(self, at_us: int) -> None:
        if self._timer is not None:
            if self._timer_us <= at_us:
                return
            self._timer.cancel()
        self._timer_us = at_us
        delay_s = max(0, at_us - self._now_us()) / 1e6
        self._timer = self._timers.call_later(delay_s, self._on_timer, context=self._context)

    def _arm_renewals(self) -> None:
        asks = self._flight is None and self._link.batch.knows_epoch  # else nothing can be renewed, and `_pump` comes when it can
        now_us = self._now_us()
        for identity in self._book.identities:
            if identity.records and identity.until_us:
                at_us = (
                    min(max(identity.renew_us, now_us + 1_000, self._held_back_us), now_us + TOUCHED_US // 3)
                    if asks
                    else identity.until_us
                )
                self._arm(min(identity.until_us, at_us))

    def _on_timer(self) -> None:
        now_us = self._now_us()
        late_us, self._timer = now_us - self._timer_us, None
        if self._closed:
            return
        self._lapse(now_us)
        if late_us > STOOD_STILL_US and not self._excused:
            # The loop stood still: answers may have come that nobody has read yet.
            self._excused = True
            self._arm(now_us + min(late_us, self._deadline_us))
            return
        self._excused = False
        if self._flight is not None and self._flight.sent_us + 2 * self._deadline_us <= now_us:
            self._give_up_flight()
        self._expire(now_us)
        self._pump()
        self._arm_again(now_us)

    def _lapse(self, now_us: int) -> None:
        self._book.sweep(now_us)
        for identity in self._book.identities:
            if identity.until_us and identity.until_us <= now_us:
                self._lapse_one(identity)

    def _lapse_one(self, identity: Identity) -> None:
        """Take what Redis has counted for lost. What it hasn't, as the policy granted it, goes on under another name."""
        self._announce(identity.lapse())
        self._tell(identity)

    def _tell(self, identity: Identity) -> None:
        """Say what is held under a new name."""
        for record in list(identity.records):
            if record in identity.untold or record.asked is not None:
                self._queue(record)
            else:
                self._book.tidy(record)

    def _expire(self, now_us: int) -> None:
        """Answer by the policy what has waited for too long."""
        while self._asked and (self._asked[0].deadline_us <= now_us or not self._asked[0].waits):
            asked = self._asked.popleft()
            if asked.waits:
                try:
                    held = self._decide(asked.record, asked.ask)
                except StorageError as error:
                    asked.answer.set_exception(error)
                else:
                    asked.answer.set_result(held)
            elif asked.record.asked is asked:
                self._settle(asked.record)

    def _arm_again(self, now_us: int) -> None:
        if self._asked:
            self._arm(max(self._asked[0].deadline_us, now_us + 1_000))
        if self._flight is not None:
            self._arm(max(self._flight.sent_us + 2 * self._deadline_us, now_us + 1_000))
        self._arm_renewals()

    # The end:

    def leave(self) -> Future[None] | None:
        """Give everything back, for good. Returns what tells when Redis has heard it; None if it can't, or needn't."""
        if self._closed:
            return None
        self._closed = True
        known = [identity for identity in self._book.identities if identity.joined or identity.previous]
        for record in self._book.all():
            held = record.held
            self._fail(record, StorageUnavailable("the storage was closed"))
            if held:
                self._announce([record])
        if self._timer is not None:
            self._timer.cancel()
        self._link.batch.listen(None)
        if not (known and self._link.batch.knows_epoch):
            return None
        left: Future[None] = self._loop.create_future()
        calls = -(-len(known) // HOLDERS_MAX)

        def heard(_: Sequence[int]) -> None:
            nonlocal calls
            calls -= 1
            if not calls:
                _done(left)

        for first in range(0, len(known), HOLDERS_MAX):
            some = known[first : first + HOLDERS_MAX]
            words = [b"leave", b"%d" % len(some), *(word for identity in some for word in identity.words(told=True))]
            self._link.batch.send(ControlCall("slots", [self._names.holders_key], words, heard))
        return left

    def leave_there(self) -> futures.Future[None]:
        """Have its own loop leave, from another thread. Raises RuntimeError if that loop is closed."""
        over: futures.Future[None] = futures.Future()

        def leave() -> None:
            left = self.leave()
            if left is None:
                _done(over)
            else:
                left.add_done_callback(lambda _: _done(over))

        self._loop.call_soon_threadsafe(leave, context=self._context)
        return over

    def drop(self) -> None:
        """Hold nothing any more, as the loop or the process is another one."""
        self._closed = True
        if self.process == os.getpid():  # in a forked one nothing is counted as held
            for record in self._book.all():
                record.hold(0)

    def forget(self, entry: Entry) -> Future[bool] | None:
        """Have Redis forget who holds a key. Tells whether it did; None if it can't be asked now."""
        if not self._link.batch.knows_epoch:
            self._link.connect()
            return None
        forgotten: Future[bool] = self._loop.create_future()
        key = self._names.slots_key(entry)

        def done(numbers: Sequence[int]) -> None:
            self._forgetting.pop(call, None)
            if numbers:
                self._announce(self._book.of_key(key))
            if not forgotten.done():
                forgotten.set_result(bool(numbers))

        call = ControlCall("slots", [self._names.holders_key, key], [b"forget", b"0"], done)
        self._forgetting[call] = forgotten
        forgotten.add_done_callback(lambda _: self._forgetting.pop(call, None))
        self._link.batch.send(call)
        return forgotten

    def look_again(self, entry: Entry) -> None:
        """Say again what is held of a key: Redis has forgotten who holds it."""
        for record in self._book.of_key(self._names.slots_key(entry)):
            if record.known and not self._closed:
                record.stale = True
                self._queue(record)


def _first(records: Iterable[Record], count: int) -> Iterable[Record]:
    for record, _ in zip(records, range(count), strict=False):
        yield record


def _done(future: Future[None] | futures.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
