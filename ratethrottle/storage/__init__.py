"""Where the state lives. The protocol is private so far."""

from __future__ import annotations

from asyncio import AbstractEventLoop
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from contextvars import Context
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from ratethrottle._engine.decision import Decision, Entry
from ratethrottle._engine.joint import Joint
from ratethrottle._engine.keys import KeyTable
from ratethrottle.events import Events


@dataclass(frozen=True, slots=True)
class Outcomes:
    """How many checks were allowed, and how many denied. Under a rule that only flags, `denied` are those that were over."""

    allowed: int = 0
    denied: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistics:
    """What a storage counts in this process. What a storage doesn't have stays 0.

    How it is now:
    keys: keys × rules held in memory. bounds: keys × rules of which the process remembers what Redis said. leases: those of them that
    hold units taken ahead, which may be spent now. connections: that are open for decisions. waiting: checks that are queued for a
    connection. in_flight: script calls without a reply yet. breaker: "closed" while Redis is asked, "open" while it isn't, as it
    doesn't answer or refuses us, "half_open" while an attempt is made meanwhile. processes: how many share the limits, by their
    heartbeats, this one included. owed: keys × rules with units that policies admitted and Redis hasn't counted yet. slots: units of
    slots that are held by this limiter; 0 if a storage is asked.

    How often since the storage was made:
    calls: script calls sent. items: items sent in them, equal checks of a key being one. reconnections: connections that
    took the place of a lost one. attempts: to connect. desyncs: replies that didn't belong to their request. evictions: keys
    that were forgotten before they were fresh. charges_lost: charges of new keys that a full table had no place for
    (`on_full="deny"`). epoch_changes: losses of state in Redis. overloads: checks that were decided by `on_overload`.

    decisions: what this limiter decided since a rule of that name was added: name of the rule -> `source` of the decisions ->
    Outcomes, for each rule that the limiter has and each source. Peeks, errors and checks that were cancelled don't count. Under a
    rule with `enforce="flag"` those that were over are denied; a rule that is off allows all, under "memory". Slots count too, also
    those that were given back as another limit denied. Empty if a storage is asked instead of a limiter. Only to be read: rules that
    decided nothing share one mapping.
    """

    keys: int = 0
    bounds: int = 0
    leases: int = 0
    connections: int = 0
    waiting: int = 0
    in_flight: int = 0
    breaker: Literal["closed", "open", "half_open"] = "closed"
    processes: int = 0
    owed: int = 0
    slots: int = 0
    calls: int = 0
    items: int = 0
    reconnections: int = 0
    attempts: int = 0
    desyncs: int = 0
    evictions: int = 0
    charges_lost: int = 0
    epoch_changes: int = 0
    overloads: int = 0
    decisions: Mapping[str, Mapping[str, Outcomes]] = field(default_factory=dict)


class Timer(Protocol):
    """What is called later, unless it is cancelled before."""

    def cancel(self) -> object:
        """Don't call it."""


class Timers(Protocol):
    """Calls back after some time: an event loop, or a test's clock."""

    def call_later(self, delay: float, callback: Callable[..., object], /, *args: Any, context: Context | None = None) -> Timer:
        """Call `callback` in `delay` seconds, in the event loop."""

    def time(self) -> float:
        """Say what time it is, in seconds from some time on."""


class Storage(Protocol):
    """What a limiter asks of a storage. Every method raises `StorageError` if there is no answer within the deadline."""

    @property
    def table(self) -> KeyTable | None:
        """What decides at once, in compiled code; None if the network is needed."""

    @property
    def events(self) -> Events:
        """Where the events of the storage go."""

    def statistics(self) -> Statistics:
        """Count what there is to count, without I/O."""

    def timers(self, loop: AbstractEventLoop) -> Timers:
        """Find what calls back by the storage's own time: `loop`, or the test's clock that the storage was made with."""

    async def decide(self, entries: Sequence[Entry]) -> list[Decision]:
        """Decide in order, as one batch."""

    async def peek(self, entry: Entry) -> Decision:
        """Decide without consuming."""

    async def reset(self, entry: Entry) -> None:
        """Forget what the entry's key has used under its rule."""

    async def charge(self, charge: Joint, /) -> Decision:
        """Count what was used without asking."""

    def expect_refunds(self) -> None:
        """Prepare for settlements of what is granted from now on."""

    def settle(self, settlement: Joint, came_back: Callable[[], None], /) -> Awaitable[object] | None:
        """Begin to settle a reservation, which goes on whether or not somebody awaits what this returns. None: it is done.

        came_back: called in the same thread when it is settled.
        Raises StorageError if the storage is closed.
        """

    def book(self, booking: Joint, /) -> Decision | Coroutine[Any, Any, Decision]:
        """Decide on a check that may be granted for later. It begins when it is awaited, if it has to be."""

    def unbook(self, unbooking: Joint, /) -> None:
        """Begin to give back what was granted for later, unless others were since."""

    async def open(self, required: bool = False) -> None:
        """Take up the storage before the first check needs it; if it is required, wait for it, and raise if it isn't there."""

    async def aclose(self) -> None:
        """Close what the storage owns, now and for good."""
