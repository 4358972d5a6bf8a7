"""Compiled rules, and the definitions that a table of keys has met: see `definitions.pyx`."""

cimport cython
from libc.stdint cimport int64_t, uint32_t, uint64_t

from ratethrottle._engine.arithmetic cimport Terms
from ratethrottle._engine.calendar cimport Boundaries
from ratethrottle._engine.table cimport KeptTerms, Shard


cdef enum Policy:                            # decides while the storage can't
    OF_STORAGE                               # the policy that the storage was given
    LOCAL
    ALLOW
    DENY
    RAISE


cdef Policy policy_of(object word) except *


cdef enum Enforcement:                       # what a denial under a rule does
    DENY_IT
    FLAG_IT                                  # it is allowed, and the decision says that it was over
    OFF                                      # nothing is counted, and everything is allowed


cdef enum:
    SOURCES_MAX = 8


@cython.final
cdef class Tally:
    """How often a limiter decided under a rule of one name: at twice the source, plus 1 if it was allowed."""

    cdef uint64_t[2 * SOURCES_MAX] counts


@cython.final
cdef class Calendar:
    """Days, weeks or months of a time zone, which begin on some day: there is one object for each, for good."""

    cdef readonly tuple spec                 # see `dates.py`
    cdef readonly int64_t number             # in stored states
    cdef Boundaries known

    cdef int cover(self, int64_t at_us) except -1


cdef Calendar calendar_of(tuple spec)
cdef Calendar calendar_in(const Terms* terms)


@cython.final
cdef class CompiledRule:
    cdef readonly str name
    cdef readonly str strategy
    cdef readonly Calendar calendar          # None, if its windows aren't those of one
    cdef readonly int64_t limit              # 0: everything is denied, and the terms are those of a limit of 1
    cdef readonly int64_t lease_us           # units taken ahead may be spent for this long
    cdef readonly int64_t lease_units        # so many are taken ahead at once at most; 0: none ever
    cdef Policy policy
    cdef Enforcement enforcement
    cdef readonly bint counted               # False: it is off, or its limit is 0, so that nothing is counted or asked
    cdef Terms terms
    # Where the table that interned this rule last keeps its terms; the hot path needs no look-up.
    cdef uint64_t home
    cdef Terms* home_terms
    cdef uint64_t home_seed
    cdef uint64_t* counts                    # of the tally of the limiter that it is installed in
    cdef Tally tally
    cdef bytes packed                        # as calls to a shared store name it; None until one does, and with a calendar

    cdef tuple shape(self)
    cdef tuple facts(self)


@cython.final
cdef class Definitions:
    cdef dict known                          # shape of a rule -> address of its KeptTerms
    cdef KeptTerms* kept                     # all of them, the newest first
    cdef Py_ssize_t count                    # and how many
    cdef Py_ssize_t known_most               # a round begins at this many known ones
    cdef int64_t round                       # its number
    cdef uint32_t round_shard                # the shard that it looks through next
    cdef KeptTerms** round_at                # points to the terms that it looks at next; NULL between two rounds
    cdef bint stepping                       # a step is being taken
    cdef int held                            # callers that hold terms while other code may run; with any, none are freed

    cdef Terms* keep(self, tuple shape, const Terms* terms) except NULL
    cdef Terms* keep_gate(self, Terms* kept) except NULL
    cdef int step(self, const Shard* shards, uint32_t shard_count, bint bounds) except -1
    cdef int step_in_round(self, const Shard* shards, uint32_t shard_count, bint bounds) except -1
