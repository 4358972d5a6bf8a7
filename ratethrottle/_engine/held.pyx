# cython: auto_pickle=False, autotestdict=False
"""Decisions on slots. A unit that is held comes back when its holder ends, which nobody can foretell."""

cimport cython
from libc.stdint cimport int64_t

from ratethrottle._engine.decision cimport Decision, decision_facts, Entry, entry_new
from ratethrottle._engine.definitions cimport CompiledRule

from ratethrottle._engine.decision import _restore_decision


def held_entry(CompiledRule rule not None, key, cost):
    """Validate the key and the cost of a slot. Raises InvalidRequest or CostExceedsLimit."""
    return entry_new(rule, key, cost, 1)


def held_decision(Entry entry not None, str source not None, bint granted, int64_t remaining, int64_t retry_us=0):
    """The decision on a slot. `retry_us` −1 is never, and 0 that nobody knows."""
    return of_slot(entry.decided(source, granted, remaining, retry_us, 0))


cdef SlotDecision of_slot(Decision plain):
    cdef SlotDecision decision = SlotDecision.__new__(SlotDecision)
    decision.compiled = plain.compiled
    decision.key = plain.key
    decision.cost = plain.cost
    decision.source_index = plain.source_index
    decision.out = plain.out
    return decision


@cython.final
@cython.no_gc
cdef class SlotDecision(Decision):
    """Whether a slot was granted. `retry_after` of a denial is 0.0, which is no time: nobody knows when a holder ends."""

    @property
    def retry_after_exact(self):
        """Whether the slot was granted: when one is free is never known."""
        return self.out.allowed

    def headers(self):
        """HTTP fields of this decision, by draft-ietf-httpapi-ratelimit-headers-11: a new dict of str to str. They name no time."""
        return {
            "RateLimit-Policy": f'"{self.compiled.name}";q={self.compiled.limit};qu="concurrent-requests"',
            "RateLimit": f'"{self.compiled.name}";r={self.out.remaining}',
        }

    def __reduce__(self):
        return _restore_slot, (_restore_decision(*decision_facts(self)),)

    def __repr__(self):
        return f"<SlotDecision {'allowed' if self.allowed else 'denied'} rule={self.rule!r} cost={self.cost} " \
               f"remaining={self.remaining} limit={self.limit} source={self.source!r}>"


def _restore_slot(Decision plain not None):
    """Make a decision on a slot from its facts (pickle)."""
    return of_slot(plain)
