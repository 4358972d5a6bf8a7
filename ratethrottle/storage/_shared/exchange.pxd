"""What is on its way to the store: see `exchange.pyx`."""

from libc.stdint cimport int64_t

from ratethrottle.storage._shared.call cimport Call
from ratethrottle.storage._shared.context cimport StorageContext
from ratethrottle.storage._shared.request cimport Writer
from ratethrottle.storage._shared.waiting cimport Waiting


cdef enum:
    IN_FLIGHT_MAX = 2


cdef class Exchange:
    cdef StorageContext context
    cdef Waiting waiting                     # whose timer looks after what is in flight
    cdef Writer writer
    cdef object write                        # sends bytes; None without a connection
    cdef object in_flight                    # calls in the order of their replies
    cdef bytes rest                          # of a reply that hasn't come whole
    cdef readonly int64_t sent_calls         # of checks, and the items of these
    cdef readonly int64_t sent_items

    cdef int begin(self, write, dict scripts, bytes run) except -1
    cdef object end(self)
    cdef int send(self, Call call) except -1
    cdef int64_t first_deadline_us(self) except -1

    cdef inline bint has_room(self) except -1:
        return len(self.in_flight) < IN_FLIGHT_MAX
