"""What answers a check when the store doesn't: see `fallback.pyx`."""

from libc.stdint cimport int64_t

from ratethrottle._core cimport PendingDecision
from ratethrottle.storage._shared.context cimport StorageContext
from ratethrottle.storage._shared.known cimport KnownKeys
from ratethrottle.storage._shared.link cimport Link
from ratethrottle.storage._shared.waiting cimport Waiting


cdef class Fallback:
    cdef StorageContext context
    cdef Link link
    cdef KnownKeys known
    cdef Waiting waiting

    cdef bint applies(self, int64_t now_us) noexcept
    cdef int decide(self, PendingDecision pending, error, int64_t now_us) except -1
    cdef int decide_other(self, PendingDecision pending, error, int64_t now_us) except -1
    cdef int correct(self, PendingDecision pending, error, int64_t now_us) except -1
    cdef bint raises(self, error) except -1
    cdef int64_t retry_us(self, int64_t now_us) except -1
    cdef int overload(self, PendingDecision pending, words) except -1
    cdef int run_out(self, PendingDecision pending, int64_t now_us) except -1
    cdef int decide_waiting(self, error) except -1
    cdef int begin(self, error) except -1


cdef object repairing()
