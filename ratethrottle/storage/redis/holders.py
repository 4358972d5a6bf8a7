"""What one event loop holds of slots: who it is to Redis, and what it has of each key. No I/O."""

from __future__ import annotations

import os
import threading
from asyncio import Future
from collections import Counter
from dataclasses import dataclass
from os import urandom
from typing import Final

from ratethrottle._holding import Ask, Held, Holder
from ratethrottle.rule import ConcurrencyRule

# A slot is taken for lost here a thousandth of its ttl before Redis gives it to others: two clocks may run so differently.
EARLY: Final = 1_000
RENEWALS: Final = 3  # in a ttl
IDLE_MAX: Final = 64  # holders of nothing; one that comes again soon is nobody new to Redis


class Here:
    """How many units of each key this process holds, in all of its event loops and in all storages of these keys."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Hold nothing, in a process that has just been forked: another thread may have had the lock then."""
        self.process = os.getpid()
        self._units: Counter[bytes] = Counter()
        self._lock = threading.Lock()

    def add(self, key: bytes, units: int) -> None:
        """Count so many more."""
        with self._lock:
            self._units[key] += units
            if not self._units[key]:
                del self._units[key]

    def take(self, key: bytes, share: int, cost: int, wanted: int) -> tuple[int, int]:
        """Count so many times `cost` as a share has room for, `wanted` at most. Returns how many, and the units that are left."""
        with self._lock:
            room = max(0, share - self._units[key])
            granted = min(wanted, room // cost)
            if granted:
                self._units[key] += granted * cost
        return granted, room - granted * cost


class Identity:
    """A holder, as Redis knows it: this event loop under one ttl. Times are µs, by the process's clock."""

    def __init__(self, ttl_us: int, number: int = 0) -> None:
        self.ttl_us = ttl_us
        self.number = number  # among those of its ttl, as lines of one key have different ones
        self.name = urandom(8).hex().encode()
        self.previous = b""  # the name that it had, of which Redis may still have something
        self.joined = False  # Redis knows the name
        self.renewed_us = 0  # when the last call was sent that renewed it
        self.until_us = 0  # when it lapses; 0: nothing of it can
        self.records: dict[Record, None] = {}  # that which Redis has heard of for the longest time first
        self.keys: set[bytes] = set()  # of these
        self.untold: set[Record] = set()  # held, and not told under this name

    def add(self, record: Record) -> None:
        """Have another key."""
        self.records[record] = None
        self.keys.add(record.key)

    def remove(self, record: Record) -> None:
        """Have nothing of a key any more."""
        self.records.pop(record, None)
        self.keys.discard(record.key)
        self.untold.discard(record)

    def rename(self) -> None:
        """Take another name, of which Redis has heard nothing."""
        if self.joined or not self.previous:
            self.previous = self.name
        self.name, self.joined = urandom(8).hex().encode(), False
        self.untold = {record for record in self.records if record.held}
        for record in self.records:
            # What was sent was about the name before. All of that is gone when Redis has heard everything under this one.
            record.kept = record.sent = False
            record.stale = record.held > 0
            record.known = record.known if record.held else 0

    def lapse(self) -> list[Record]:
        """Take what Redis has counted for lost; returns that."""
        lost = [record for record in self.records if record.known]
        for record in lost:
            record.lose()
        self.rename()
        self.until_us = 0
        return lost

    def renewed(self, sent_us: int, told: bool) -> None:
        """Take note that Redis has renewed it by a call that was sent then."""
        self.joined = True
        self.renewed_us = max(self.renewed_us, sent_us)
        self.until_us = max(self.until_us, sent_us + self.ttl_us - self.ttl_us // EARLY)
        if told:
            self.previous = b""

    @property
    def renew_us(self) -> int:
        """When it has to be renewed."""
        return self.renewed_us + self.ttl_us // RENEWALS

    def words(self, told: bool) -> list[bytes]:
        """Return what the script takes. told: no call that follows tells more of what is held."""
        return [self.name, self.previous, b"%d" % self.ttl_us, b"%d" % ((not self.joined) + 2 * (not told))]


@dataclass(eq=False, slots=True)
class Asked:
    """An ask that waits for its answer."""

    record: Record
    ask: Ask
    answer: Future[Held]
    deadline_us: int

    @property
    def waits(self) -> bool:
        """Whether somebody waits for the answer."""
        return self.record.asked is self and not self.answer.done()


class Record:
    """What a line has of its key."""

    def __init__(self, holder: Holder, rule: ConcurrencyRule, key: bytes, identity: Identity, here: Here) -> None:
        self.holder = holder
        self.rule = rule  # of the last ask
        self.key = key
        self.identity = identity
        self._here = here
        self.held = 0  # units that the line has
        self.known = 0  # units that Redis has confirmed
        self.kept = False  # Redis has some of these, for all that is known
        self.stale = False  # Redis has to hear what is held
        self.sent = False  # an item that Redis hasn't confirmed
        self.queued = False
        self.touched_us = 0
        self.asked: Asked | None = None

    @property
    def over(self) -> bool:
        """Whether nothing is to be remembered of it."""
        return not (self.held or self.known or self.stale or self.sent or self.asked)

    def hold(self, units: int) -> None:
        """Note how many units the line has."""
        if units != self.held:
            self._here.add(self.key, units - self.held)
            self.held = units

    def take(self, share: int, cost: int, wanted: int) -> tuple[int, int]:
        """Have as many slots more as this process's share allows. Returns how many, and the units that are left."""
        granted, left = self._here.take(self.key, share, cost, wanted)
        self.held += granted * cost
        return granted, left

    def confirm(self, units: int, now_us: int) -> None:
        """Note that Redis has taken down so many units."""
        self.known, self.kept, self.sent, self.touched_us = units, units > 0, False, now_us
        self.identity.untold.discard(self)
        if self in self.identity.records:
            del self.identity.records[self]
            self.identity.records[self] = None

    def lose(self) -> None:
        """Hold nothing any more."""
        self.hold(0)
        self.known, self.kept, self.stale = 0, False, False
        self.identity.untold.discard(self)


class Book:
    """All that an event loop holds."""

    def __init__(self, here: Here) -> None:
        self._here = here
        self._records: dict[tuple[Holder, int], Record] = {}
        self._identities: dict[tuple[int, int], Identity] = {}  # by ttl and number
        self._idle: dict[Identity, None] = {}  # that which has had nothing for the longest time first

    def __len__(self) -> int:
        """Keys of which something is held, or that Redis has to hear of."""
        return len(self._records)

    @property
    def identities(self) -> list[Identity]:
        """All that Redis may know."""
        return list(self._identities.values())

    def find(self, holder: Holder, ttl_us: int) -> Record | None:
        """Find what a line has under a ttl."""
        return self._records.get((holder, ttl_us))

    def add(self, holder: Holder, rule: ConcurrencyRule, key: bytes) -> Record:
        """Begin to remember what a line has."""
        number = 0
        while (identity := self._identities.get((rule.ttl_us, number))) and key in identity.keys:
            number += 1
        if identity is None:
            identity = self._identities[rule.ttl_us, number] = Identity(rule.ttl_us, number)
        self._idle.pop(identity, None)
        record = self._records[holder, rule.ttl_us] = Record(holder, rule, key, identity, self._here)
        identity.add(record)
        return record

    def tidy(self, record: Record) -> None:
        """Forget a record that says nothing any more."""
        name = record.holder, record.identity.ttl_us
        if record.over and self._records.get(name) is record:
            del self._records[name]
            record.identity.remove(record)
            if not record.identity.records:
                self._idle[record.identity] = None
                if len(self._idle) > IDLE_MAX:
                    self._drop(next(iter(self._idle)))

    def sweep(self, now_us: int) -> None:
        """Forget holders of nothing that have lapsed."""
        for identity in [identity for identity in self._idle if identity.until_us <= now_us]:
            self._drop(identity)

    def _drop(self, identity: Identity) -> None:
        """Forget a holder of nothing. What Redis still counts of a name that it had before lapses by itself."""
        del self._idle[identity]
        del self._identities[identity.ttl_us, identity.number]

    def of_key(self, key: bytes) -> list[Record]:
        """Find what is held of a key."""
        return [record for record in self._records.values() if record.key == key and record.held]

    def all(self) -> list[Record]:
        """Return all that is remembered."""
        return list(self._records.values())

    def untold(self) -> dict[Record, None]:
        """Find what is held and Redis hasn't heard of under the names of now."""
        return {record: None for identity in self.identities for record in identity.untold}
