"""Slots of this process: who holds how many units of a key, and who waits for some."""

from __future__ import annotations

import os
import threading
from time import monotonic

from ratethrottle._engine.decision import Entry
from ratethrottle._holding import Ask, Held, Holder
from ratethrottle.rule import ConcurrencyRule

Key = tuple[str, bytes]  # name of the rule, canonical key
SWEEP_LEAST = 1_024
PATIENCE_S = 1.0  # for so long a place in line is kept for an event loop that doesn't react


class KeySlots:
    """The slots of one key."""

    __slots__ = ("forgotten", "total", "turn", "turn_s", "units", "waiting")

    def __init__(self) -> None:
        self.units: dict[Holder, int] = {}
        self.total = 0
        self.waiting: dict[Holder, tuple[int, int]] = {}  # cost and limit, in the order in which they have come
        self.forgotten: set[Holder] = set()  # they don't know yet that they hold nothing any more
        self.turn: Holder | None = None  # the first that waits, if there is room for it
        self.turn_s = 0.0  # since when

    def __bool__(self) -> bool:
        return bool(self.units or self.waiting or self.forgotten)

    def set_units(self, holder: Holder, units: int) -> None:
        """Note what a holder holds."""
        self.total += units - self.units.pop(holder, 0)
        if units:
            self.units[holder] = units

    def remove(self, holder: Holder) -> None:
        """Forget all about a holder."""
        self.set_units(holder, 0)
        self.waiting.pop(holder, None)
        self.forgotten.discard(holder)

    def sweep(self) -> None:
        """Forget the holders whose event loop is closed, and the place of one whose loop doesn't run: it may have been left for good."""
        for holder in [*self.units, *self.waiting, *self.forgotten]:
            if holder.gone:
                self.remove(holder)
        if self.turn is not None and monotonic() >= self.turn_s + PATIENCE_S:
            self.waiting.pop(self.turn, None)
            self.turn = None

    def first(self) -> Holder | None:
        """Find the one that has waited for longest."""
        return next(iter(self.waiting), None)

    def answer(self, holder: Holder, limit: int, ask: Ask) -> Held:
        """Take what a holder gives back, and grant what it may have."""
        lost = holder in self.forgotten
        self.forgotten.discard(holder)
        self.set_units(holder, 0 if lost else ask.held)
        granted = 0
        if ask.wanted:
            self.waiting[holder] = (ask.cost, limit)  # it keeps its place, if it has one
            if self.turn is holder:
                self.turn = None
            if self.forgotten or self.first() is not holder or self.total + ask.cost > limit:
                self.sweep()
            if self.first() is holder:
                granted = max(0, min(ask.wanted, (limit - self.total) // ask.cost))
                if len(self.waiting) > 1:
                    granted = min(granted, 1)  # others are next, one by one
        if granted:
            self.set_units(holder, self.units.get(holder, 0) + granted * ask.cost)
        if granted or not (ask.wanted and ask.waits):
            self.waiting.pop(holder, None)
        if granted < ask.wanted and ask.waits:
            self.waiting[holder] = (ask.cost, limit)  # behind all others, if it was granted something
        # The first is woken. Those behind it look whether it still comes.
        behind = holder in self.waiting and self.first() is not holder
        return Held(granted, max(0, limit - self.total), PATIENCE_S if behind else 0.0, lost=lost)

    def next_served(self) -> Holder | None:
        """Find the first that waits, if there is room for it."""
        first = self.first()
        if first is not None:
            cost, limit = self.waiting[first]
            if self.total + cost <= limit:
                if self.turn is not first:
                    self.turn, self.turn_s = first, monotonic()
                return first
        self.turn = None
        return None


class HeldSlots:
    """The slots of one storage, for any number of limiters, event loops and threads. What nobody holds or waits for isn't there."""

    def __init__(self) -> None:
        self._locks: dict[int, threading.Lock] = {}  # process -> its lock
        self._keys: dict[Key, KeySlots] = {}
        self._sweep_at = SWEEP_LEAST
        self._process = os.getpid()

    def __len__(self) -> int:
        """Keys of which somebody holds slots, or waits for some."""
        return len(self._keys)

    def hold(self, holder: Holder, rule: ConcurrencyRule, ask: Ask) -> Held:
        """Answer an ask, and wake the holder that comes next. Holders are served in the order in which they began to wait."""
        name = (rule.name, holder.entry.canonical)
        with self._lock():
            self._forget_parent()
            slots = self._keys.get(name)
            if slots is None:
                self._sweep()
                slots = self._keys[name] = KeySlots()
            answer = slots.answer(holder, rule.limit, ask)
            woken = self._settled(name)
        self._wake(name, woken)
        return answer

    def forget(self, rule: ConcurrencyRule, entry: Entry) -> None:
        """Have nobody hold anything of a key. Each holder finds out when it asks, which it does at once."""
        name = (rule.name, entry.canonical)
        with self._lock():
            self._forget_parent()
            slots = self._keys.get(name)
            if slots is None:
                return
            holders = list(slots.units)
            for holder in holders:
                slots.set_units(holder, 0)
                slots.forgotten.add(holder)
            holders += filter(None, [self._settled(name)])
        for holder in holders:
            self._wake(name, holder)

    def _lock(self) -> threading.Lock:
        """Find this process's lock. That of the process which forked this one may have been held just then: nobody here releases it."""
        process = os.getpid()
        return self._locks.get(process) or self._locks.setdefault(process, threading.Lock())

    def _forget_parent(self) -> None:
        """Forget what the process holds that forked this one."""
        if self._process != os.getpid():
            self._process = os.getpid()
            self._keys.clear()

    def _sweep(self) -> None:
        """Forget what event loops left that are closed, each time that there are twice as many keys."""
        if len(self._keys) >= self._sweep_at:
            for name, slots in list(self._keys.items()):
                slots.sweep()
                if not slots:
                    del self._keys[name]
            self._sweep_at = max(SWEEP_LEAST, 2 * len(self._keys))

    def _wake(self, name: Key, holder: Holder | None) -> None:
        """Wake a holder, or the next one if its loop has ended."""
        while holder is not None:
            try:
                holder.wake()
            except RuntimeError:
                with self._lock():
                    slots = self._keys.get(name)
                    if slots is None:
                        return
                    slots.remove(holder)
                    holder = self._settled(name)
            else:
                return

    def _settled(self, name: Key) -> Holder | None:
        """Forget a key of which nobody holds anything, and find the holder that can be served next."""
        slots = self._keys[name]
        if not slots:
            del self._keys[name]
        return slots.next_served()
