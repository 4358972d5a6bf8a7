# cython: auto_pickle=False, autotestdict=False
"""Decisions on slots. A unit that is held comes back when its holder ends, which nobody can foretell."""

cimport cython
from libc.stdint cimport int64_t

from ratethrottle._engine.decision cimport count_decision, Decision, decision_facts, decisions_counted, Entry, entry_new
from ratethrottle._engine.definitions cimport CompiledRule, Tally

from ratethrottle._engine.decision import _restore_decision


def held_entry(CompiledRule rule not None, key, cost):
    """Validate the key and the cost of a slot. Raises InvalidRequest or CostExceedsLimit."""
    return entry_new(rule, key, cost, 1)


def held_decision(Entry entry not None, str source not None, bint granted, int64_t remaining, int64_t retry_us=0):
    """The decision on a slot. `retry_us` −1 is never, and 0 that nobody knows."""
    return of_slot(entry.decided(source, granted, remaining, retry_us, 0))


def held_tally(CompiledRule rule not None):
    """Make something for a limiter to count its decisions by: the same rule, with a tally of its own."""
    cdef CompiledRule counted = CompiledRule(*rule.facts())
    counted.tally = Tally.__new__(Tally)
    counted.counts = counted.tally.counts
    return counted


def held_count(CompiledRule tally not None, Decision decision not None):
    """Count a decision."""
    count_decision(tally, decision.source_index, decision.out.allowed)


def held_counted(dict tallies not None, outcomes):
    """The decisions counted by each tally: name -> source -> outcomes(allowed, denied)."""
    return decisions_counted(tallies, outcomes)


cdef SlotDecision of_slot(Decision plain):
    cdef SlotDecision decision = SlotDecision.__new__(SlotDecision)
    decision.compiled = plain.compiled
    decision.key = plain.key
    decision.cost = plain.cost
    decision.source_index = plain.source_index
    decision.out = plain.out
    return decision


def held_with(SlotDecision slot not None, Decision rates not None):
    """The decision on a slot that was granted together with other limits."""
    cdef SlotDecision decision = of_slot(slot)
    decision.others = rates.parts or (rates,)
    return decision


@cython.final
@cython.no_gc
cdef class SlotDecision(Decision):
    """Whether a slot was granted. `retry_after` of a denial is 0.0, which is no time: nobody knows when a holder ends."""

    cdef tuple others                        # decisions on the limits that were checked after it

    @property
    def parts(self):
        """The decision on the slot, and one for each other limit, in order; empty if there is no other one."""
        return () if self.others is None else (of_slot(self), *self.others)

    @property
    def atomic(self):
        """Whether all parts were decided at one instant: the slot is taken before other limits are checked."""
        return self.others is None

    @property
    def retry_after_exact(self):
        """Whether the slot was granted: when one is free is never known."""
        return self.out.allowed

    def headers(self):
        """HTTP fields of this decision, by draft-ietf-httpapi-ratelimit-headers-11: a new dict of str to str. They name no time."""
        cdef dict fields = {
            "RateLimit-Policy": f'"{self.compiled.name}";q={self.compiled.limit};qu="concurrent-requests"',
            "RateLimit": f'"{self.compiled.name}";r={self.out.remaining}',
        }
        for part in self.others or ():
            own = part.headers()
            for name in fields:
                fields[name] += f", {own[name]}"
        return fields

    def __eq__(self, other):
        if not isinstance(other, Decision):
            return NotImplemented
        return (isinstance(other, SlotDecision) and decision_facts(self) == decision_facts(<Decision>other)
                and self.others == (<SlotDecision>other).others)

    def __hash__(self):
        return hash((decision_facts(self), self.others))

    def __reduce__(self):
        return _restore_slot, (_restore_decision(*decision_facts(self)), self.others)

    def __repr__(self):
        parts = f" parts={len(self.parts)}" if self.others else ""
        return f"<SlotDecision {'allowed' if self.allowed else 'denied'} rule={self.rule!r} cost={self.cost} " \
               f"remaining={self.remaining} limit={self.limit} source={self.source!r}{parts}>"


def _restore_slot(Decision plain not None, tuple others):
    """Make a decision on a slot from its facts (pickle)."""
    cdef SlotDecision decision = of_slot(plain)
    decision.others = others
    return decision
