"""Replies that come after their calls were given up: see `late.pyx`."""

from libc.stdint cimport int64_t

from ratethrottle.storage._shared.call cimport CheckCall
from ratethrottle.storage._shared.known cimport KnownKeys


cdef class LateReplies:
    cdef KnownKeys known
    cdef object in_flight                    # (a call; the first check of each item that asked for a lease, or None)
    cdef bytes rest
    cdef object returned                     # called when units have come back

    cdef int take(self, CheckCall call, list samples, const int64_t* numbers, int count) except -1


cdef LateReplies late_replies_new(KnownKeys known, object in_flight, bytes rest, object returned)
