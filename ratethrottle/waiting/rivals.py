"""How a line asks for units that lines of other processes are after, too.

If all of them asked whenever a unit comes back, most would ask in vain, and the quickest would have all. So a line that has lost a
unit lets some pass. It lets fewer pass the longer it has had none.
"""

from __future__ import annotations

import random

from ratethrottle._engine.decision import Decision

# A line that waits for longer than this from one unit to the next asks for each: so few calls cost nothing.
GAP_MOST_S = 0.1
# Others are taken to be there for so long after the last sign of them.
THERE_S = 4.0
# How many units a line lets pass at most; and from so many times in vain on, each one more halves that.
PASS, IN_VAIN = 10.0, 2
# With others there, a line asks for no more of what is left at once.
PART = 4


class Rivals:
    """What a line knows of the others. Everything here is about the answers of Redis."""

    __slots__ = ("_gap_s", "_in_vain", "_left", "_there_until")

    def __init__(self) -> None:
        self._there_until = 0.0
        self._gap_s = 0.0  # from one unit to the next; 0: they come back together
        self._in_vain = 0  # how often the line asked since its last grant
        self._left: int | None = None  # how many requests would have been granted after the last answer

    def won(self) -> None:
        """Take note of a grant at the time that was waited for."""
        self._in_vain = 0

    def lost(self, now: float) -> None:
        """Take note of a denial at the time that was waited for: somebody was quicker."""
        self._in_vain += 1
        self._there_until = now + THERE_S

    def room(self, now: float, asked: int, left: int) -> int:
        """How many to ask for next, after so many were granted together. left: how many more would have been."""
        if self._left is not None and left < self._left - asked:
            self._there_until = now + THERE_S
        self._left = left
        if now < self._there_until:
            return max(1, min(asked + 1, left // PART))
        return max(1, min(2 * asked, left))

    def pause(self, now: float) -> float:
        """How long to wait with nothing left, where it is known that units come back one by one; 0: to ask when the next one does."""
        if self._gap_s == 0 or now >= self._there_until:
            return 0.0
        self._left = None
        return random.uniform(0.5, 0.5 + self._lets_pass()) * self._gap_s  # noqa: S311  # nobody gains by guessing it

    def delay(self, now: float, denial: Decision) -> float:
        """How long to wait after the time that a denial names."""
        self._left = None
        apart = denial.retry_after < min(GAP_MOST_S, denial.reset_after / PART)
        self._gap_s = denial.retry_after if apart and now < self._there_until else 0.0
        return random.uniform(0, self._lets_pass()) * self._gap_s  # noqa: S311  # likewise

    def _lets_pass(self) -> float:
        return float(PASS / 2 ** max(0, self._in_vain - IN_VAIN))
