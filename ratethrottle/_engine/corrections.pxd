"""What is charged without being asked for, and what is given back: see `corrections.pyx`."""

from libc.stdint cimport int64_t

from ratethrottle._engine.arithmetic cimport Outcome
from ratethrottle._engine.turns cimport Booking
from ratethrottle._engine.keys cimport KeyTable
from ratethrottle._engine.table cimport Place


cdef int correct_place(KeyTable table, const Place* place, int64_t now_us, int64_t units, int64_t granted_us, const Booking* booking,
                       Outcome* out) except -1
