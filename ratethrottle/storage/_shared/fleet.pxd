"""How many processes share the limits: see `fleet.pyx`."""

from libc.stdint cimport int64_t

from ratethrottle.storage._shared.outage cimport Shares


cdef enum:
    WHOLE_US = 3_000_000                     # for so long processes must have been counted without a gap: then all that live are counted


cdef class Fleet:
    cdef Shares shares
    cdef readonly int64_t processes          # that share the limits; 0: unknown
    cdef int64_t expected                    # how many do, by options; 0: they don't say
    cdef readonly bint sure                  # they were counted alike for a while: none has begun or ended just now
    cdef int64_t last_count                  # of them, and since when it is that
    cdef int64_t alike_since_us
    cdef int64_t fewer_since_us              # since when the store counts fewer than we do
    cdef int64_t counted_us                  # when any connection has had this process counted
    # What only large fleets use:
    cdef int64_t slot                        # the bit that stands for this process; -1: none that is known
    cdef int64_t marked_us                   # when it was set last
    cdef int64_t marks                       # how often since a script was run for it
    cdef int64_t swept                       # when the period began that is going on, by the server's clock, and when that was seen first
    cdef int64_t swept_seen_us
    cdef int64_t changed                     # when the set of processes has changed last, by the server's clock
    cdef int64_t rank
    cdef int64_t rank_of                     # in the set that has changed last then

    cdef int expect(self, int64_t expected) except -1
    cdef int forked(self) except -1
    cdef int take_count(self, int64_t count, int64_t rank, bint whole, int64_t now_us) except -1
    cdef int take_slot(self, int64_t slot) noexcept
    cdef int take_mark(self, const int64_t* numbers, int64_t rank, int64_t sent_us, int64_t now_us) except -1
    cdef bint period_over(self, int64_t swept, int64_t sent_us) noexcept
    cdef int64_t told_count(self) noexcept
    cdef void doubt(self) noexcept
    cdef int64_t period_us(self) noexcept
    cdef bint may_mark(self, int64_t now_us) noexcept
    cdef int64_t pace_us(self, int64_t least_us) noexcept
