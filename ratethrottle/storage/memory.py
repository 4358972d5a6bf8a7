"""State of this process only, in the compiled key table."""

from __future__ import annotations

from asyncio import AbstractEventLoop
from collections.abc import Callable, Sequence
from typing import Any, Literal

from anyio.lowlevel import checkpoint

from ratethrottle._engine.bookings import book, unbook
from ratethrottle._engine.corrections import correct, expect_refunds
from ratethrottle._engine.decision import Decision, Entry
from ratethrottle._engine.joint import Joint
from ratethrottle._engine.keys import KeyTable
from ratethrottle._holding import Ask, Held, Holder
from ratethrottle.events import Events
from ratethrottle.options import check_options
from ratethrottle.rule import ConcurrencyRule
from ratethrottle.storage import Statistics, Timers
from ratethrottle.storage.held import HeldSlots

YIELD_EVERY = 128


class InMemoryStorage:
    """Keep the state of at most `max_keys` keys in this process.

    max_keys: 1 to 10^9 (keys × rules). on_full: what a new key does when they are all in use: "evict" forgets the key
    closest to fresh among a few (`evictions` counts those that were not fresh yet), "deny" denies the new one. A charge of it isn't
    counted then: its decision is over, and `statistics().charges_lost` counts it.
    clock_us: a monotonic clock in integer µs, for tests; by default the system's, counted from the Unix epoch.

    Raises ConfigurationError.
    """

    slots_lapse = False

    def __init__(
        self,
        *,
        max_keys: int = 1_000_000,
        on_full: Literal["evict", "deny"] = "evict",
        clock_us: Callable[[], int] | None = None,
    ) -> None:
        check_options("memory", {"max_keys": max_keys, "on_full": on_full})
        self._since_turn = 0
        self._clock_us = clock_us
        self.events = Events()
        self.slots = HeldSlots()
        self.table = KeyTable(max_keys, on_full == "evict", clock_us)

    def __len__(self) -> int:
        """Keys held, fresh ones that have not been swept included."""
        return len(self.table)

    @property
    def evictions(self) -> int:
        """How many keys were forgotten before they were fresh."""
        return self.table.evictions

    @property
    def size_bytes(self) -> int:
        """Bytes held for all keys."""
        return self.table.size_bytes

    def statistics(self) -> Statistics:
        """Count what there is to count."""
        return Statistics(keys=len(self.table), evictions=self.table.evictions, charges_lost=self.table.charges_lost)

    def timers(self, loop: AbstractEventLoop) -> Timers:
        """Find what calls back by this storage's time: `loop`, unless the clock was `ratethrottle.testing.ManualClock`."""
        clock: Any = self._clock_us
        timers: Timers = clock.timers(loop) if hasattr(clock, "timers") else loop
        return timers

    async def decide(self, entries: Sequence[Entry]) -> list[Decision]:
        """Decide in order."""
        await self._let_others_run(len(entries))
        return [self.table.decide(entry) for entry in entries]

    async def peek(self, entry: Entry) -> Decision:
        """Decide without consuming."""
        await self._let_others_run(1)
        return self.table.peek(entry)

    async def reset(self, entry: Entry) -> None:
        """Forget what the key has used under the rule."""
        self.table.reset(entry)

    async def charge(self, charge: Joint) -> Decision:
        """Count what was used without asking."""
        await self._let_others_run(1)
        return correct(self.table, charge)

    def expect_refunds(self) -> None:
        """Remember from now on which keys are forgotten: what was granted before that must not come back."""
        expect_refunds(self.table)

    def settle(self, settlement: Joint, came_back: Callable[[], None]) -> None:
        """Count what was used beyond a reservation, and take back what was not used of it."""
        correct(self.table, settlement)
        came_back()

    def hold(self, holder: Holder, rule: ConcurrencyRule, ask: Ask) -> Held:
        """Take what a holder of slots gives back, and grant what it may have."""
        return self.slots.hold(holder, rule, ask)

    async def forget_slots(self, rule: ConcurrencyRule, entry: Entry) -> None:
        """Have nobody hold slots of a key."""
        self.slots.forget(rule, entry)

    def book(self, booking: Joint) -> Decision:
        """Decide on a booking."""
        return book(self.table, booking)

    def unbook(self, unbooking: Joint) -> None:
        """Give a booking back."""
        unbook(self.table, unbooking)

    async def _let_others_run(self, decisions: int) -> None:
        """Give the loop a turn at least every 128 decisions, before anything is decided: a loop of calls must not freeze it."""
        self._since_turn += decisions
        if self._since_turn >= YIELD_EVERY:
            self._since_turn = 0
            await checkpoint()

    async def open(self, required: bool = False) -> None:
        """Nothing to take up, and always there."""

    async def aclose(self) -> None:
        """Nothing to close."""
