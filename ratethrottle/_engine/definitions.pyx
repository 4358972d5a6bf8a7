# cython: auto_pickle=False, autotestdict=False
"""Compiled rules, and the definitions that a table of keys has met.

A definition is what tells how a state is read; `docs/arithmetic.md` says which numbers of a rule belong to it.
"""

cimport cython
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc

from ratethrottle._engine.arithmetic cimport ceil_div, SLIDING, Terms
from ratethrottle._engine.bound cimport bounds_note_terms
from ratethrottle._engine.calendar cimport Boundaries, Span, span_at
from ratethrottle._engine.table cimport KeptTerms, Shard

from time import time_ns

from ratethrottle._engine.dates import MEAN_US as _mean_us
from ratethrottle._engine.dates import boundaries, number_of


cdef enum:
    KNOWN_MOST = 1024                        # definitions, before those that nothing refers to are removed
    TERMS_STEP = 64                          # of which so many are looked at for each new one


cdef tuple POLICIES = (None, "local", "allow", "deny", "raise")


cdef Policy policy_of(object word) except *:
    return <Policy><int>POLICIES.index(word)


cdef tuple ENFORCEMENTS = ("deny", "flag", "off")


cdef Enforcement enforcement_of(object word) except *:
    return <Enforcement><int>ENFORCEMENTS.index(word)


cdef int64_t WEEK_US = 604_800_000_000
cdef int64_t PASSED_US = 259_200_000_000     # of the week of 1970-01-01, a Thursday: aligned windows of weeks begin on a Monday, UTC
cdef uint64_t[2 * SOURCES_MAX] nobodys       # rules that no limiter has installed count here


cdef dict CALENDARS = {}                     # by spec and by number
cdef int64_t DAY_US = 86_400_000_000
cdef int64_t KNOWN_BEFORE_US = 62 * DAY_US
cdef int64_t KNOWN_LEAST_US = 366 * DAY_US   # ahead, before more is looked up
cdef int64_t KNOWN_AHEAD_US = 10 * 366 * DAY_US


@cython.final
cdef class Calendar:
    def __init__(self):
        raise TypeError("calendars are made by a rule")

    cdef int cover(self, int64_t at_us) except -1:
        """Know the windows around an instant, and those of the next years."""
        cdef int64_t* found
        cdef Py_ssize_t i
        cdef int64_t first_us = max(<int64_t>0, at_us - KNOWN_BEFORE_US), until_us = at_us + KNOWN_AHEAD_US
        if self.known.count:
            if self.known.at_us[0] <= first_us and at_us + KNOWN_LEAST_US < self.known.at_us[self.known.count - 1]:
                return 0
            first_us = min(first_us, self.known.at_us[0])
            until_us = max(until_us, self.known.at_us[self.known.count - 1])
        instants = boundaries(self.spec, first_us, until_us)
        found = <int64_t*>malloc(len(instants) * sizeof(int64_t))
        if found == NULL:
            raise MemoryError
        for i in range(len(instants)):
            found[i] = instants[i]
        # What was known before stays where it is: somebody may be reading it.
        self.known.hint = 0
        if self.known.count <= <uint32_t>len(instants):
            self.known.at_us = found
            self.known.count = <uint32_t>len(instants)
        return 0

    def around(self, int64_t at_us):
        """Where the window before that of an instant begins, this one, the next one and the one after it, µs."""
        cdef Span span
        self.cover(at_us)
        span = span_at(&self.known, at_us)
        return (span_at(&self.known, span.since_us - 1).since_us, span.since_us, span.until_us,
                span_at(&self.known, span.until_us).until_us)


cdef Calendar calendar_of(tuple spec):
    cdef Calendar calendar
    if spec not in CALENDARS:
        calendar = Calendar.__new__(Calendar)
        calendar.spec = spec
        calendar.number = number_of(spec)
        calendar.known.window_us = _mean_us[spec[0]]
        calendar.cover(time_ns() // 1000)
        CALENDARS[calendar.number] = CALENDARS.setdefault(spec, calendar)
    return <Calendar>CALENDARS[spec]


cdef Calendar calendar_in(const Terms* terms):
    """The calendar that terms are of."""
    return <Calendar>CALENDARS[terms.slot_us]


cdef tuple shape_of(const Terms* terms):
    """The numbers that tell one definition from another one; all others follow from them."""
    return (chr(terms.kind), terms.capacity, terms.window_us, terms.unit_ticks, terms.drain_ticks, terms.slot_us, terms.coarse_us)


@cython.final
cdef class Tally:
    pass


@cython.final
cdef class CompiledRule:
    """A rule as the arithmetic uses it: exact integers only. Made by `RateThrottleRule`, compared by value."""

    def __init__(self, str name not None, str strategy not None, str kind not None, int64_t limit, int64_t capacity,
                 int64_t window_us, int64_t unit_ticks, int64_t drain_ticks, int64_t slot_us, int64_t coarse_us,
                 int64_t lease_us=0, int64_t lease_units=0, str on_outage=None, str enforce="deny",
                 tuple calendar=None):
        if kind not in ("b", "s", "c", "f", "d") or (kind == "d") != (calendar is not None):
            raise ValueError(f"kind is one of b, s, c and f, or d with a calendar, not {kind!r}")
        cdef Boundaries* known = NULL
        if calendar is not None:
            self.calendar = calendar_of(calendar)
            known = &self.calendar.known
            kind, window_us, slot_us = "f", self.calendar.known.window_us, self.calendar.number
        if capacity < 1 or window_us < 1 or limit < 0 or (kind == "b" and (unit_ticks < 1 or drain_ticks < 1)):
            raise ValueError("capacity and window are positive, and so are the ticks of a bucket; a limit is 0 or more")
        if (kind == "s" and slot_us < 1) or (kind == "c" and coarse_us < 1):
            raise ValueError("a sliding window has a slot, a sliding counter a coarse time, of at least 1 µs")
        self.name = name
        self.strategy = strategy
        self.limit = limit
        self.lease_us = lease_us
        self.lease_units = lease_units
        self.policy = policy_of(on_outage)
        self.enforcement = enforcement_of(enforce)
        self.counted = limit > 0 and self.enforcement != OFF
        self.counts = nobodys
        self.terms = Terms(<char>ord(kind), capacity, window_us, 0 if window_us % WEEK_US else PASSED_US, unit_ticks, drain_ticks,
                           slot_us, coarse_us, ceil_div(window_us, coarse_us) if coarse_us else 0,
                           window_us // 8 + (slot_us if slot_us > 1 else 0),
                           known, NULL)

    @property
    def kind(self): return chr(self.terms.kind) if self.calendar is None else "d"

    @property
    def capacity(self): return self.terms.capacity

    @property
    def window_us(self): return self.terms.window_us

    @property
    def unit_ticks(self): return self.terms.unit_ticks

    @property
    def drain_ticks(self): return self.terms.drain_ticks

    @property
    def slot_us(self): return self.terms.slot_us

    @property
    def coarse_us(self): return self.terms.coarse_us

    @property
    def lead_us(self):
        """How far ahead of now units of a sliding window may count from, µs."""
        return self.lease_us if self.terms.kind == SLIDING else 0

    @property
    def on_outage(self):
        """What decides while the storage can't; None: the policy that the storage was given."""
        return POLICIES[self.policy]

    @property
    def enforce(self):
        """What a denial does: "deny", "flag" or "off"."""
        return ENFORCEMENTS[self.enforcement]

    def blocking(self):
        """The rule that denies everything, and doesn't touch what was used under this one."""
        cdef CompiledRule rule = CompiledRule(*self.facts())
        rule.limit = 0
        rule.counted = False
        return rule

    cdef tuple shape(self):
        return shape_of(&self.terms)

    cdef tuple facts(self):
        return (self.name, self.strategy, self.kind, self.limit, *self.shape()[1:], self.lease_us, self.lease_units,
                self.on_outage, self.enforce, None if self.calendar is None else self.calendar.spec)

    def __eq__(self, other):
        if not isinstance(other, CompiledRule):
            return NotImplemented
        return self.facts() == (<CompiledRule>other).facts()

    def __hash__(self):
        return hash(self.facts())

    def __reduce__(self):
        return CompiledRule, self.facts()

    def __repr__(self):
        return f"CompiledRule{self.facts()!r}"


@cython.final
cdef class Definitions:
    """The terms of each definition that a table has met. They outlive the rules in the states that were written under them.

    Terms that nothing refers to any more are removed in rounds. A round takes one step for each definition that is new: it looks
    through the keys, a shard in each step, and then at all terms. Terms without a reference in one round aren't given out any
    more; they are freed if nothing refers to them in the next round either.
    """

    def __cinit__(self):
        self.known = {}
        self.known_most = KNOWN_MOST

    def __dealloc__(self):
        cdef KeptTerms* kept
        while self.kept != NULL:
            kept, self.kept = self.kept, self.kept.older
            free(kept)

    cdef Terms* keep(self, tuple shape, const Terms* terms) except NULL:
        """The kept terms of a definition, which are made if it is new."""
        cdef KeptTerms* kept
        if shape not in self.known:
            kept = <KeptTerms*>malloc(sizeof(KeptTerms))
            if kept == NULL:
                raise MemoryError
            kept.terms = terms[0]
            kept.retired = False
            try:
                self.known[shape] = <size_t>kept
            except BaseException:
                free(kept)
                raise
            kept.older, self.kept = self.kept, kept
            self.count += 1
        kept = <KeptTerms*><size_t>self.known[shape]
        kept.met_in = self.round
        return &kept.terms

    cdef Terms* keep_gate(self, Terms* kept) except NULL:
        """Terms that a rule with a calendar is located by, and that no view has: a decision by them takes the long way, which knows it.

        Nothing is granted by these themselves.
        """
        cdef Terms gate = kept[0]
        cdef Terms* found
        gate.capacity = -kept.capacity
        found = self.keep(shape_of(&gate), &gate)
        found.kept = kept
        return found

    cdef int step(self, const Shard* shards, uint32_t shard_count, bint bounds) except -1:
        """Take a step of a round. Returns whether one has begun: then the table interns every rule anew, which notes its terms."""
        cdef bint begins = False
        if self.stepping:                        # a step has let other code run, which has come here
            return False
        self.stepping = True
        try:
            if self.round_at == NULL and len(self.known) >= self.known_most:
                begins = True
                self.round += 1
                self.round_shard = 0
                self.round_at = &self.kept
            if self.round_at != NULL:
                self.step_in_round(shards, shard_count, bounds)
        finally:
            self.stepping = False
        return begins

    cdef int step_in_round(self, const Shard* shards, uint32_t shard_count, bint bounds) except -1:
        cdef KeptTerms* kept
        cdef int _step
        if self.round_shard < shard_count:
            bounds_note_terms(&shards[self.round_shard], bounds, self.round)
            self.round_shard += 1
            return 0
        for _step in range(TERMS_STEP):
            kept = self.round_at[0]
            if kept == NULL:
                self.round_at = NULL
                self.known_most = max(<Py_ssize_t>KNOWN_MOST, 2 * len(self.known))
                return 0
            if kept.met_in != self.round and not kept.retired:
                shape = shape_of(&kept.terms)    # other code may run here, and may meet just this definition
                if kept.met_in != self.round:
                    del self.known[shape]
                    kept.retired = True
            elif kept.met_in != self.round and self.held == 0:
                self.round_at[0] = kept.older
                self.count -= 1
                free(kept)
                continue
            self.round_at = &kept.older
        return 0
