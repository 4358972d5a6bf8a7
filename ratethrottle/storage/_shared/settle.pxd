"""What becomes of the checks in a call: see `settle.pyx`."""

from libc.stdint cimport int64_t

from ratethrottle._core cimport Parts
from ratethrottle._engine.definitions cimport CompiledRule
from ratethrottle.storage._shared.call cimport Call, CheckCall
from ratethrottle.storage._shared.context cimport StorageContext
from ratethrottle.storage._shared.fallback cimport Fallback
from ratethrottle.storage._shared.item cimport CallItem
from ratethrottle.storage._shared.joint cimport PartAnswer
from ratethrottle.storage._shared.known cimport KnownKeys
from ratethrottle.storage._shared.link cimport Link
from ratethrottle.storage._shared.waiting cimport Waiting


cdef class Settlement:
    cdef StorageContext context
    cdef Link link
    cdef KnownKeys known
    cdef Waiting waiting
    cdef Fallback fallback
    cdef int64_t took_us                     # an answer, at least, of late; 0: none has come yet

    cdef int settle(self, CheckCall call, const int64_t* numbers, int count, int64_t now_us) except -1
    cdef int settle_item(self, CheckCall call, CallItem* item, const int64_t* answer, int64_t ahead) except -1
    cdef int settle_undecided(self, CheckCall call, CallItem* item, CompiledRule rule, int64_t kind, int64_t now_us) except -1
    cdef int settle_with_parts(self, CheckCall call, const int64_t* numbers, int count, int64_t now_us) except -1
    cdef int settle_joint(self, CheckCall call, int first, int size, const PartAnswer* found, int64_t server_us) except -1
    cdef int settle_bookings(self, CheckCall call, CallItem* item, const PartAnswer* found, int64_t server_us) except -1
    cdef int settle_undecided_joint(self, CheckCall call, int first, int size, const PartAnswer* found, int64_t now_us) except -1
    cdef int learn_parts(self, CheckCall call, int first, Parts parts, const PartAnswer* found, int64_t server_us,
                         int64_t now_us) except -1
    cdef int fail_item(self, CallItem* item, error, bint whatever, int64_t now_us) except -1
    cdef int unpark(self) except -1
    cdef int fail(self, Call sent, error, bint whatever=*) except -1
    cdef int expire(self, CheckCall call, int64_t now_us, int64_t heard_us, bint late) except -1
    cdef int take_back(self, CheckCall call) except -1
    cdef int take_item_back(self, CheckCall call, CallItem* item) except -1
