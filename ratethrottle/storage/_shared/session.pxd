"""One connection's session with the store: see `session.pyx`."""

from libc.stdint cimport int64_t

from ratethrottle.storage._shared.call cimport ControlCall, MarkCall
from ratethrottle.storage._shared.context cimport StorageContext
from ratethrottle.storage._shared.exchange cimport Exchange
from ratethrottle.storage._shared.fallback cimport Fallback
from ratethrottle.storage._shared.heartbeat cimport Heartbeat
from ratethrottle.storage._shared.known cimport KnownKeys
from ratethrottle.storage._shared.link cimport Link
from ratethrottle.storage._shared.waiting cimport Waiting


cdef class Session:
    cdef StorageContext context
    cdef Link link
    cdef Exchange exchange
    cdef Waiting waiting
    cdef KnownKeys known
    cdef Fallback fallback
    cdef Heartbeat heartbeat
    cdef object schedule
    cdef object moved_on                     # called when control calls may be sent, or not any more; or None
    cdef bint advancing                      # the loop is about to call `_advance_on`
    cdef bint freeing                        # or `_free_on`
    cdef int64_t told_evictions

    cdef int begin(self) except -1
    cdef int end(self) except -1
    cdef bint knows_epoch(self) noexcept
    cdef int tell_moved_on(self) except -1
    cdef int moved(self) except -1
    cdef int beat(self, bint whole=*) except -1
    cdef int leave(self) except -1
    cdef int marked(self, MarkCall call, const int64_t* numbers) except -1
    cdef int advance(self) except -1
    cdef int begin_serving(self, int64_t now_us) except -1
    cdef int free_emptied(self) except -1
    cdef int rows_max(self) noexcept
    cdef int arm_beat(self, int64_t now_us) except -1
    cdef int take_control(self, ControlCall call, const int64_t* numbers, int count) except -1
    cdef int tell_refusals(self, ControlCall call, const int64_t* numbers, int count) except -1
    cdef int beat_if_due(self, int64_t now_us) except -1
    cdef bint repairs(self) noexcept
