"""What a rule's numbers compile to, whether it runs as it is or as one process's share of it (docs/arithmetic.md)."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Final

TICKS: Final = 2**52  # Lua's doubles are exact below 2^53; sums of two ticks stay there
EXACT_LIMIT: Final = 64  # a sliding window keeps every admission up to this limit, slots above it
SLOTS: Final = 64


def steps(kind: str, limit: int, window_us: int) -> tuple[int, int]:
    """Find the slot of a sliding window ("s") and the coarse time of a counter ("c"), in µs; 0 elsewhere."""
    slot_us = coarse_us = 0
    if kind == "s":
        slot_us = 1 if limit <= EXACT_LIMIT else -(-window_us // SLOTS)
    elif kind == "c":
        coarse_us = -(-window_us // ((TICKS - 1) // limit))
    return slot_us, coarse_us


def drain_rate(limit: int, window_us: int, capacity: int) -> Fraction:
    """Find the units per µs that a bucket drains by: `limit` / `window_us`, or the nearest below it with `capacity` ticks < 2^52.

    The denominator is the ticks of a unit.
    """
    rate, most = Fraction(limit, window_us), (TICKS - 1) // capacity
    return rate if rate.denominator <= most else largest_fraction(rate, most)


def largest_fraction(rate: Fraction, most: int) -> Fraction:
    """Find the largest fraction ≤ `rate` (positive) with a denominator of at most `most`.

    Source: the Stern–Brocot tree (Graham, Knuth and Patashnik, «Concrete Mathematics», 4.5), runs taken in one step.
    """
    low_n, low_d, high_n, high_d = 0, 1, 1, 0  # low ≤ rate < high, neighbours in the tree
    while True:
        below, above = rate * low_d - low_n, high_n - rate * high_d
        steps = math.floor(below / above)
        if high_d:
            steps = min(steps, (most - low_d) // high_d)
        low_n, low_d = low_n + steps * high_n, low_d + steps * high_d
        below = rate * low_d - low_n
        if below == 0 or low_d + high_d > most:
            return Fraction(low_n, low_d)
        steps = min(math.ceil(above / below) - 1, (most - high_d) // low_d)
        high_n, high_d = high_n + steps * low_n, high_d + steps * low_d
        if low_d + high_d > most:
            return Fraction(low_n, low_d)
