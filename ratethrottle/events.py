"""Events: what happened to the storage, and where that goes.

Each goes to the logger "ratethrottle" and to the callbacks of `limiter.on_event`. No event holds a password or a key.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import ClassVar, Final

from ratethrottle.errors import ConfigurationError

LOGGER: Final = logging.getLogger("ratethrottle")
# Without it Python prints the warnings of a program that has set up no logging.
LOGGER.addHandler(logging.NullHandler())


@dataclass(frozen=True, slots=True)
class Event(ABC):
    """Something that happened to the storage of this process.

    at: when, in seconds since the Unix epoch. suppressed: how many of the kind were left out before this one.
    """

    kind: ClassVar[str]
    level: ClassVar[int] = logging.WARNING
    every_s: ClassVar[float] = 1.0  # at most one of the kind goes out in so many seconds
    news_max: ClassVar[int] = 0  # and so many more of them, if their messages are new

    at: float = field(default_factory=time.time, kw_only=True)
    suppressed: int = field(default=0, kw_only=True)

    @property
    @abstractmethod
    def message(self) -> str:
        """What happened and what to look at, in one line."""

    def __str__(self) -> str:
        return f"{self.message} ({self.suppressed} more like it before)" if self.suppressed else self.message


@dataclass(frozen=True, slots=True)
class OutageBegan(Event):
    """Redis doesn't answer in time: the circuit breaker opens, and from now on policies decide.

    reason: the error, in our words. policy: the storage's `on_outage`; a rule may have its own.
    """

    kind: ClassVar[str] = "outage_began"
    reason: str
    policy: str

    @property
    def message(self) -> str:
        """What happened and what to look at, in one line."""
        return f'outage: {self.reason}; checks are decided by on_outage="{self.policy}" until Redis answers again'


@dataclass(frozen=True, slots=True)
class OutageEnded(Event):
    """Redis answers again, and this process has told it what it knew and admitted. The circuit breaker closes.

    seconds: how long the outage took. decisions: how many checks were decided by policy.
    """

    kind: ClassVar[str] = "outage_ended"
    level: ClassVar[int] = logging.INFO
    seconds: float
    decisions: int

    @property
    def message(self) -> str:
        """What happened and what to look at, in one line."""
        return f"the outage ended after {self.seconds:.3g} s; {self.decisions} checks were decided by policy"


@dataclass(frozen=True, slots=True)
class MasterMoved(Event):
    """The sentinels name another master. before, after: host:port."""

    kind: ClassVar[str] = "master_moved"
    before: str
    after: str

    @property
    def message(self) -> str:
        """What happened and what to look at, in one line."""
        return f"failover: the master moved from {self.before} to {self.after}"


@dataclass(frozen=True, slots=True)
class StateLost(Event):
    """Redis has lost state (failover, flush or restart), and this process tells it what it still knows.

    bounds: how many keys × rules this process knows of. It tells Redis of a key before Redis decides that key again.
    """

    kind: ClassVar[str] = "state_lost"
    bounds: int

    @property
    def message(self) -> str:
        """What happened and what to look at, in one line."""
        return f"Redis lost state (failover, flush or restart); this process gives back what it knows of up to {self.bounds} keys"


@dataclass(frozen=True, slots=True)
class RepairRefused(Event):
    """Redis refused some of what this process knew or admitted. That doesn't count any more. reason: the error, in our words."""

    kind: ClassVar[str] = "repair_refused"
    reason: str

    @property
    def message(self) -> str:
        """What happened and what to look at, in one line."""
        return f"Redis didn't take back what this process knew of some keys: {self.reason}"


@dataclass(frozen=True, slots=True)
class UnreadableState(Event):
    """A key holds something that isn't a state of ours: its checks raise `StateUnreadable`. rule: the rule's name."""

    kind: ClassVar[str] = "state_unreadable"
    level: ClassVar[int] = logging.ERROR
    every_s: ClassVar[float] = 60.0
    rule: str

    @property
    def message(self) -> str:
        """What happened and what to look at, in one line."""
        return (
            f"a key of rule {self.rule!r} holds something that isn't a state of this version, and its checks raise StateUnreadable; "
            "is an upgrade under way, or who else writes under the prefix?"
        )


@dataclass(frozen=True, slots=True)
class Desync(Event):
    """A reply didn't belong to its request. The connection was dropped, and its checks went by policy. what: what came."""

    kind: ClassVar[str] = "desync"
    what: str

    @property
    def message(self) -> str:
        """What happened and what to look at, in one line."""
        return f"Redis sent {self.what}; the connection was dropped (is there a proxy in between?)"


@dataclass(frozen=True, slots=True)
class BoundsEvicted(Event):
    """The table of bounds is full and forgets keys that weren't fresh. bounds: how many in all since the storage was made.

    What an outage admitted of such a key, and Redis hasn't heard of yet, is not charged.
    """

    kind: ClassVar[str] = "bounds_evicted"
    every_s: ClassVar[float] = 60.0
    bounds: int

    @property
    def message(self) -> str:
        """What happened and what to look at, in one line."""
        return f"the table of bounds is full and forgot {self.bounds} keys so far; raise max_bounds, or look for a flood of keys"


@dataclass(frozen=True, slots=True)
class Evicted(Event):
    """Redis evicts keys, and with them what was used: limits don't hold. keys: how many since this process has connected."""

    kind: ClassVar[str] = "evicted"
    every_s: ClassVar[float] = 60.0
    keys: int

    @property
    def message(self) -> str:
        """What happened and what to look at, in one line."""
        return (
            f"Redis evicted {self.keys} keys, perhaps ours: limits may not hold; set maxmemory-policy to noeviction, or give it more "
            "memory"
        )


@dataclass(frozen=True, slots=True)
class Refused(Event):
    """Redis refuses this process. No policy applies, and checks raise `StorageRefused`. reason: the error, in our words."""

    kind: ClassVar[str] = "refused"
    level: ClassVar[int] = logging.ERROR
    every_s: ClassVar[float] = 60.0
    news_max: ClassVar[int] = 10
    reason: str

    @property
    def message(self) -> str:
        """What happened and what to look at, in one line."""
        return f"checks fail: {self.reason}"


@dataclass(frozen=True, slots=True)
class UnsettledReservation(Event):
    """A block of `limiter.reserve(...)` ended without `settle`, so that its estimate stays counted. Once for each place.

    place: file and line that called `reserve`. closed: the block has called `settle`, or would give back what it reserved, but its
    limiter was closed before.
    """

    kind: ClassVar[str] = "unsettled_reservation"
    every_s: ClassVar[float] = 0.0
    place: str
    closed: bool = False

    @property
    def message(self) -> str:
        """What happened and what to look at, in one line."""
        if self.closed:
            return f"a reservation made at {self.place} ended after its limiter, and its estimate stays counted; close the limiter later"
        return f"a reservation made at {self.place} was never settled, and its estimate stays counted; call settle(used) in its block"


@dataclass(frozen=True, slots=True)
class SlotLost(Event):
    """This process was too slow to renew slots that it holds, or somebody has reset them. `slot.lost` is set. rule: the rule's name.

    slots: how many of one key.
    """

    kind: ClassVar[str] = "slot_lost"
    rule: str
    slots: int

    @property
    def message(self) -> str:
        """What happened and what to look at, in one line."""
        what = f"{self.slots} slots" if self.slots > 1 else "1 slot"
        return (
            f"lost {what} of rule {self.rule!r}, which others may hold now: the key was reset, or this process didn't renew in time; "
            "is the event loop blocked, Redis away, or a manual clock advanced at once?"
        )


Callback = Callable[[Event], object]


class Events:
    """Sends events to the logger and the subscribers: of each kind at most one in its `every_s` seconds.

    clock_s: a monotonic clock in seconds, for tests. Any thread may call it. There is no lock: if two threads emit at the same
    moment, one event too many may go out.
    """

    def __init__(self, *, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._clock_s = clock_s
        self._subscribers: dict[object, Callback] = {}
        self._sent_s: dict[str, float] = {}  # kind -> when one went out last
        self._left_out: dict[str, int] = {}
        self._news_s: dict[str, float] = {}  # text -> when it went out, for events whose news goes out at once
        self._outage: OutageBegan | None = None  # the one that is going on
        self._outage_sent = False

    def subscribe(self, callback: Callback) -> Callable[[], None]:
        """Call `callback` with each event, after the logger. Returns a function that ends this.

        It is called in the thread of the event loop that noticed the event. It must be quick, as that loop waits for it. What it
        raises is logged. Raises ConfigurationError if it isn't callable, or is asynchronous.
        """
        if not callable(callback):
            raise ConfigurationError(f"on_event takes a function of one event, not a {type(callback).__name__}")
        if inspect.iscoroutinefunction(callback) or inspect.iscoroutinefunction(type(callback).__call__):
            raise ConfigurationError(
                "on_event takes a plain function, and this one is async: nobody would await it; let a plain one start a task"
            )
        token = object()
        self._subscribers[token] = callback

        def remove() -> None:
            self._subscribers.pop(token, None)

        return remove

    def emit(self, event: Event) -> None:
        """Send an event out, or count it for the next one of its kind. Never raises.

        OutageBegan may be emitted at each attempt that fails. It goes out once for each outage; if it was left out at first, it
        goes out later, so that no outage stays silent for long. OutageEnded goes out exactly if its OutageBegan did.
        """
        kind, now_s = event.kind, self._clock_s()
        due = (
            self._is_news(event.message, event.every_s, event.news_max, now_s)
            if event.news_max
            else now_s - self._sent_s.get(kind, float("-inf")) >= event.every_s
        )
        if isinstance(event, OutageBegan):
            if self._outage is not None:
                if self._outage_sent or not due:
                    return
                self._left_out[kind] -= 1  # it was counted when it was left out at first
                event = self._outage
            self._outage, self._outage_sent = event, due
        elif isinstance(event, OutageEnded):
            due, self._outage, self._outage_sent = self._outage_sent, None, False
        if not due:
            self._left_out[kind] = self._left_out.get(kind, 0) + 1
            return
        self._sent_s[kind] = now_s
        self._announce(replace(event, suppressed=self._left_out.pop(kind, 0)))

    def goes_on(self, reason: str) -> None:
        """Log another reason of the outage that is going on, as the first one may say little. Never raises.

        The same reason is logged once in a minute, and at most eleven reasons are.
        """
        text = f"the outage goes on: {reason}"
        if self._outage_sent and reason not in str(self._outage) and self._is_news(text, 60.0, 10, self._clock_s()):
            _log(logging.WARNING, text)

    def _is_news(self, text: str, every_s: float, others: int, now_s: float) -> bool:
        """Whether this text hasn't gone out in so many seconds, nor too many others."""
        sent = self._news_s
        for old in [old for old, sent_s in list(sent.items()) if now_s - sent_s >= every_s]:
            sent.pop(old, None)
        if text in sent or len(sent) > others:
            return False
        sent[text] = now_s
        return True

    def forget(self) -> None:
        """Know of no outage: the storage of a forked process finds out for itself."""
        self._outage, self._outage_sent = None, False

    def _announce(self, event: Event) -> None:
        _log(event.level, str(event))
        for callback in tuple(self._subscribers.values()):
            try:
                callback(event)
            except Exception as error:  # noqa: BLE001  # whatever it raises, the check that is under way doesn't fail for it
                _log(logging.ERROR, "a callback of on_event failed", error)


def _log(level: int, text: str, error: Exception | None = None) -> None:
    # Somebody else's filters and handlers may raise.
    with contextlib.suppress(Exception):
        LOGGER.log(level, "%s", text, exc_info=error)
