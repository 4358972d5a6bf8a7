"""Joint decisions: what one check of several limits names, and what becomes of it. See `joint.pyx`."""

cimport cython
from libc.stdint cimport int64_t, uint8_t, uint32_t

from ratethrottle._engine.arithmetic cimport BUCKET, ceil_div, NEVER, Outcome, Terms
from ratethrottle._engine.turns cimport Booking
from ratethrottle._engine.decision cimport Decision, Source
from ratethrottle._engine.definitions cimport CompiledRule


cdef extern from "<stdint.h>":
    const int64_t LONGEST_US "INT64_MAX"


cdef enum:
    PARTS_MAX = 16

cdef enum Correction:                        # what a Joint is, if it is no check
    NONE
    CHARGES                                  # units that nobody was asked for are counted
    SETTLES                                  # so are those used beyond a reservation, and what it didn't use is given back
    BOOKS                                    # a check that may be granted for later, of one part
    UNBOOKS                                  # such a grant isn't needed any more


@cython.final
@cython.no_gc
cdef class Joint:
    cdef readonly tuple rules                # CompiledRule of each part
    cdef readonly tuple keys                 # key of each part; None of a plan, whose parts all get one key, which isn't known yet
    cdef readonly tuple canonicals           # Entry.canonical of each part: bytes; None where the key is a str that is used as it is
    cdef readonly int size
    cdef readonly int sets
    cdef int64_t[16] costs
    cdef bint priced                         # the caller gave each part a cost of its own
    cdef readonly uint32_t alternatives      # bit i: part i is an alternative to part i - 1
    cdef uint32_t uncounted                  # bit i: part i is decided without its state: nothing is counted under its rule
    cdef uint32_t flagged                    # bit i: part i never vetoes
    cdef Terms* terms[16]                    # of the rules, which hold them
    cdef Joint whole                         # the check that this is the counted part of; None if all of it is
    cdef uint8_t[16] places                  # and which of its parts each part is
    cdef bint timed                          # its decision says when it was taken, so that units can be given back
    cdef Correction corrects
    cdef uint32_t refunds                    # bit i: part i gives units back
    cdef readonly int64_t granted_us         # when these were granted, in the time of the store that did
    cdef readonly int64_t epoch              # and in which epoch of it
    cdef Booking booking                     # of what books, or unbooks
    cdef bint granted_here                   # or by this process, while the store was away

    cdef Joint twin(self)
    cdef Joint costing_each(self, const int64_t* costs)
    cdef Joint with_keys(self, tuple keys, tuple canonicals)
    cdef Joint counted_part(self)
    cdef Joint charges_alone(self)
    cdef bint denies(self) noexcept
    cdef bint is_joint(self) noexcept


cdef Joint joint_new(list rules, uint32_t alternatives)
cdef Outcome part_uncounted(Joint joint, int p) noexcept


cdef class Several:
    """What a limiter asks about checks that name rules by anything but one name. It knows no such form: its subclass does."""

    cdef dict rules                          # of the limiter: name -> CompiledRule

    cdef int count_in(self, CompiledRule rule, CompiledRule before) except -1
    cdef dict counted(self)
    cdef int renew(self) except -1
    cdef CompiledRule named(self, object name)
    cdef object find(self, object named)
    cdef Joint costing(self, Joint plan, object cost)
    cdef object decide(self, object key, Joint joint)


@cython.final
@cython.no_gc
cdef class JointDecision(Decision):
    cdef Joint joint
    cdef int sets
    cdef int room                            # for so many outcomes there is memory
    cdef Outcome* outs                       # of the part that each set reports
    cdef uint8_t[16] reported                # and which part that is
    cdef tuple made                          # the decisions of the parts, once somebody has asked for them
    cdef bint granted                        # all sets were, but for flagged ones
    cdef bint divided                        # not decided at one instant
    cdef readonly int64_t at_us              # when it was taken, in the time of the store that did
    cdef readonly int64_t epoch              # and in which epoch of it


cdef Decision joint_decision(Joint joint, Source source, const Outcome* outs, const int* reported, int sets, bint allowed)
cdef JointDecision joint_blank(int sets)
cdef int joint_fill(JointDecision decision, Joint joint, object key, Source source, const Outcome* outs, const int* reported,
                    bint allowed) except -1
cdef void joint_count(Decision decision) noexcept


cdef inline int64_t wait_us(const Terms* terms, const Outcome* out) noexcept nogil:
    """When the part would be allowed, µs; LONGEST_US for never. `settle` need not have been called."""
    if out.retry_us < 0:
        return LONGEST_US
    return ceil_div(out.retry_us, terms.drain_ticks) if out.in_ticks and terms.kind == BUCKET else out.retry_us


cdef inline int64_t units_left(const Terms* terms, const Outcome* out) noexcept nogil:
    """What `settle` would say remains."""
    if not out.in_ticks:
        return out.remaining
    if out.remaining <= 0:
        return 0
    return out.remaining // (terms.unit_ticks if terms.kind == BUCKET else terms.span)


cdef inline bint joint_outcome(Joint joint, const Outcome* outs, int* reported, int* sets) noexcept:
    """Whether all sets are granted, by what each part would say alone, and which part each set reports.

    That is the one that pays, the first that would be allowed. Of a denied set it is the one that could be retried first.
    """
    cdef bint granted = True, pays
    cdef int p = 0, s = 0
    while p < joint.size:
        reported[s] = p
        pays = outs[p].allowed
        p += 1
        while joint.alternatives >> p & 1:       # no bit is set from `size` on
            if not pays and (outs[p].allowed or wait_us(joint.terms[p], &outs[p])
                             < wait_us(joint.terms[reported[s]], &outs[reported[s]])):
                reported[s] = p
                pays = outs[p].allowed
            p += 1
        granted &= pays or joint.flagged >> reported[s] & 1  # a flagged part has no alternatives
        s += 1
    sets[0] = s
    return granted
