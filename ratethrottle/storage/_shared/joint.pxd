"""What the answers to joint checks mean: see `joint.pyx`."""

from libc.stdint cimport int64_t

from ratethrottle._engine.arithmetic cimport Outcome
from ratethrottle.storage._shared.item cimport CallItem


cdef enum:
    NUMBERS_MAX = 5                          # that the script says of one key


cdef struct PartAnswer:                      # what a reply says of a part
    int64_t took                             # for how many of the joint checks it has paid
    const int64_t* numbers                   # and what the script said of its key then
    int length                               # so many numbers


cdef const int64_t* read_parts(const CallItem* parts, int size, const int64_t* at, const int64_t* end, PartAnswer* found) noexcept
cdef bint possible_parts(const CallItem* parts, int size, bint consumes, const PartAnswer* found) noexcept
cdef int64_t allowed_of(const CallItem* parts, int size, int64_t most, const PartAnswer* found) noexcept
cdef int take_payers(const CallItem* parts, int size, const PartAnswer* found, int64_t position, Outcome* outs, int* pays) noexcept
cdef int take_corrections(const CallItem* parts, int size, const PartAnswer* found, Outcome* outs, int* reported) noexcept
cdef int take_looks(const CallItem* parts, int size, const PartAnswer* found, Outcome* outs) noexcept
