"""The calls of one connection: see `batch.pyx`."""

from libc.stdint cimport int64_t

from ratethrottle._core cimport PendingDecision
from ratethrottle.storage._shared.call cimport Call, CallIndex, CheckCall
from ratethrottle.storage._shared.context cimport StorageContext
from ratethrottle.storage._shared.exchange cimport Exchange
from ratethrottle.storage._shared.fallback cimport Fallback
from ratethrottle.storage._shared.known cimport KnownKeys
from ratethrottle.storage._shared.link cimport ENDED, Link
from ratethrottle.storage._shared.queue cimport Queue
from ratethrottle.storage._shared.session cimport Session
from ratethrottle.storage._shared.settle cimport Settlement
from ratethrottle.storage._shared.waiting cimport Waiting


cdef class Batch:
    cdef readonly StorageContext context
    cdef Link link
    cdef Waiting waiting
    cdef KnownKeys known
    cdef Exchange exchange
    cdef Fallback fallback
    cdef Settlement settlement
    cdef Session session
    cdef CallIndex index                     # of the call that is being filled
    cdef int last_size                       # how many items the last call had

    cdef int enter(self, PendingDecision pending) except -1
    cdef int connect_if_closed(self) except -1
    cdef int schedule(self) except -1
    cdef int fill(self, CheckCall call, int most) except -1
    cdef int fill_from(self, CheckCall call, Queue* queue, int most, int rules_most, int64_t now_us) except -1
    cdef bint fill_joint(self, CheckCall call, Queue* queue, PendingDecision pending, int* most, int* rules_most) except -1
    cdef int look_at_charged(self) except -1
    cdef int64_t first_deadline_us(self) except -1
    cdef int arm_again(self, int64_t now_us) except -1
    cdef bint expire_calls(self, int64_t now_us) except -1
    cdef int read(self, bytes data) except -1
    cdef Py_ssize_t read_reply(self, bytes data, Py_ssize_t at) except -3
    cdef int take_error(self, Call call, bytes text) except -1
    cdef int take_answers(self, CheckCall call, const int64_t* numbers, int count, int64_t now_us) except -1
    cdef int moved(self, Call call) except -1

    cdef inline bint has_ended(self) noexcept:
        return self.link.state == ENDED
