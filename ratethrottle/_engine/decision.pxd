"""Decisions, and the validated calls that they answer: see `decision.pyx`."""

cimport cython
from libc.stdint cimport int64_t

from ratethrottle._engine.arithmetic cimport NEVER, Outcome, settle
from ratethrottle._engine.definitions cimport CompiledRule, OFF


cdef enum:
    COST_MAX = 1_000_000_000                 # of a charge, or under a rule that counts nothing

cdef enum Source:
    MEMORY
    REDIS
    PREFILTER
    LEASE
    OUTAGE
    OVERLOAD


@cython.no_gc
cdef class Decision:
    cdef CompiledRule compiled
    cdef readonly object key
    cdef readonly int64_t cost
    cdef Source source_index
    cdef Outcome out


# Functions, not methods: of a class with subclasses, a method would be found through a table that each decision points to.

cdef inline Outcome* settled(Decision decision) noexcept:
    """The outcome with its divisions done."""
    if decision.out.in_ticks:
        settle(&decision.compiled.terms, &decision.out)
    return &decision.out


cdef tuple decision_facts(Decision decision)


cdef inline void count_decision(CompiledRule rule, Source source, bint allowed) noexcept:
    rule.counts[2 * source + allowed] += 1


cdef inline Outcome outcome_uncounted(CompiledRule rule, int64_t cost) noexcept:
    """What a rule says that counts nothing: it is off, or its limit is 0. A cost of 0 only asks."""
    if rule.enforcement == OFF:
        return Outcome(True, False, rule.terms.capacity if rule.limit else 0, 0, 0)
    return Outcome(cost == 0, False, 0, 0 if cost == 0 else NEVER, 0)


cdef Decision decision_blank()
cdef Decision decision_new(CompiledRule rule, object key, int64_t cost, Source source, const Outcome* out)
cdef dict decisions_counted(dict rules, object outcomes)


@cython.final
cdef class Entry:
    cdef readonly CompiledRule rule
    cdef readonly object key
    cdef readonly bytes canonical            # "=" and the key's UTF-8, or "(" and a tuple's joined form
    cdef readonly int64_t cost

    cdef bint joined(self)


cdef CompiledRule rule_named(dict rules, object name)
cdef Entry entry_new(CompiledRule rule, object key, object cost, int64_t least)
cdef int64_t units_of(object cost, CompiledRule rule, int64_t least) except -1
cdef bint is_left_out(object cost) except -1
