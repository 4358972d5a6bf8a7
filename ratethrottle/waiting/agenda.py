"""Things by the time when they are due."""

from __future__ import annotations

import itertools
from bisect import bisect_left, insort
from collections.abc import Hashable
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)

_order = itertools.count()


class Agenda(Generic[T]):
    """Each thing stands in it once, and leaves nothing behind when it is taken out.

    A sorted list instead of a heap: most things are put at its end and taken from its beginning, and a heap would keep what was
    cancelled until its time.
    """

    __slots__ = ("_due", "_places")

    def __init__(self) -> None:
        self._due: list[tuple[float, int, T]] = []
        self._places: dict[T, tuple[float, int, T]] = {}

    def __len__(self) -> int:
        return len(self._due)

    def put(self, thing: T, at: float) -> None:
        """Note when a thing is due, instead of when it was before."""
        known = self._places.get(thing)
        if known is not None:
            if known[0] == at:
                return
            self.take(thing)
        place = (at, next(_order), thing)
        self._places[thing] = place
        insort(self._due, place)

    def take(self, thing: T) -> None:
        """Forget a thing, if it is there."""
        place = self._places.pop(thing, None)
        if place is not None:
            del self._due[bisect_left(self._due, place)]

    def first(self) -> float:
        """When the next thing is due; inf if there is none."""
        return self._due[0][0] if self._due else float("inf")

    def before(self, at: float) -> list[T]:
        """List what is due before that time, in order."""
        return [thing for _, _, thing in self._due[: bisect_left(self._due, (at,))]]
