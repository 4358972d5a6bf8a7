"""When a process says that it is there, and what: see `heartbeat.pyx`."""

from libc.stdint cimport int64_t

from ratethrottle.storage._shared.call cimport Call, MarkCall
from ratethrottle.storage._shared.context cimport StorageContext
from ratethrottle.storage._shared.fleet cimport Fleet
from ratethrottle.storage._shared.repair cimport Repair


cdef enum:
    BEAT_US = 500_000                        # between two beats of a process that is busy


cdef class Heartbeat:
    cdef StorageContext context
    cdef Repair repair
    cdef Fleet fleet
    cdef readonly int64_t epoch              # that of the last beat on this connection; 0 before it
    cdef bint beating                        # a beat is on its way
    cdef bint named                          # this connection has said how keys are called, and that is known in this epoch
    cdef int64_t beaten_us                   # when the last beat was answered
    cdef int64_t heard_us                    # when any call was
    cdef int64_t evicted                     # keys that this run of the server has evicted; −1 before the first beat
    cdef int64_t evicted_before
    cdef int64_t asked_evicted_us            # when that was asked last

    cdef void connected(self) noexcept
    cdef void lost(self) noexcept
    cdef Call next_call(self, int64_t now_us, bint whole, bint serving, done)
    cdef MarkCall mark(self, bint counts, int64_t now_us)
    cdef int64_t take_evicted(self, int64_t evicted) noexcept
    cdef bint take_mark(self, MarkCall call, const int64_t* numbers, int64_t now_us) except -1
    cdef int64_t quiet_us(self, int64_t now_us) noexcept
    cdef bint due(self, int64_t now_us) noexcept
