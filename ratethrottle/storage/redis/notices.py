"""What the connections of a storage notice, as events."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from typing import Any, Final

from ratethrottle.events import (
    BoundsEvicted,
    Desync,
    Event,
    Events,
    Evicted,
    MasterMoved,
    OutageBegan,
    OutageEnded,
    Refused,
    RepairRefused,
    StateLost,
    UnreadableState,
)
from ratethrottle.storage._shared.link import Link

# What is no more than a fact, by its kind.
OF_A_FACT: Final[dict[str, Callable[[Any], Event]]] = {
    event.kind: event for event in (BoundsEvicted, Desync, Evicted, Refused, RepairRefused, StateLost, UnreadableState)
}


class EventSource:
    """Makes events of what the connections of a storage notice.

    An outage lasts from when the first one goes away until none is away and one is served.
    """

    def __init__(self, events: Events, policy: str) -> None:
        self.desyncs = 0
        self._events = events
        self._policy = policy
        self._away: weakref.WeakSet[Link] = weakref.WeakSet()
        self._since_s: float | None = None  # when the outage that is going on began
        self._decided = 0

    def forget(self) -> None:
        """Give up the connections and the outage of the process that forked this one."""
        self._away.clear()
        self._since_s = None
        self._events.forget()

    def moved(self, before: str, after: str) -> None:
        """Take note that the sentinels name another master."""
        self._events.emit(MasterMoved(before, after))

    def __call__(self, what: str, link: Link, fact: object) -> None:
        """Take note of what a connection has noticed."""
        match what:
            case "outage":
                if self._since_s is None:
                    self._since_s, self._decided = time.monotonic(), link.context.by_policy
                self._away.add(link)
                reason = str(fact)
                if self._policy == "local" and not link.context.repair.shares.n:
                    reason += "; how many processes share the limits isn't known (expected_processes), so that all is denied"
                self._events.emit(OutageBegan(reason, self._policy))
            case "reason":
                self._events.goes_on(str(fact))
            case "recovery":
                self._away.discard(link)
                if not self._away and self._since_s is not None:
                    took_s, decided = time.monotonic() - self._since_s, link.context.by_policy - self._decided
                    self._since_s = None
                    self._events.emit(OutageEnded(took_s, decided))
            case "end":
                self._away.discard(link)
            case _:
                self.desyncs += what == Desync.kind
                self._events.emit(OF_A_FACT[what](fact if isinstance(fact, int) else str(fact)))
