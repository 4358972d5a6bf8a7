"""Reads replies: pure functions from bytes to numbers, INCOMPLETE or BROKEN. See `reply.pyx`."""

from libc.stdint cimport int64_t

from ratethrottle.storage._shared.resp cimport BROKEN, INCOMPLETE


cdef enum:
    CALL_ITEMS_MAX = 128                     # of a call: the store is held for well under a millisecond
    ANSWER_NUMBERS_MAX = 8                   # of the answer to an item, and the generation of its key
    REPLY_NUMBERS_MAX = CALL_ITEMS_MAX * ANSWER_NUMBERS_MAX + 1
    REPLY_BYTES_MAX = 1 << 16                # of what is kept of a reply that hasn't come whole
    PROCESSES_MAX = 1_000_000
    MARK_NUMBERS = 6                         # of the replies to a mark


cdef extern from *:
    """
    #define RT_YEAR_US 31622400000000LL
    """
    const int64_t YEAR_US "RT_YEAR_US"       # no server's clock is so far ahead of when an epoch began


cdef Py_ssize_t read_numbers(const char* text, Py_ssize_t at, Py_ssize_t size, bytes request, int64_t* numbers, int* count) noexcept
cdef Py_ssize_t read_loaded(const char* text, Py_ssize_t at, Py_ssize_t size) noexcept
cdef Py_ssize_t read_mark(const char* text, Py_ssize_t at, Py_ssize_t size, int integers, bytes epoch_text, int64_t* numbers) noexcept
cdef bint possible_beat(const int64_t* numbers, int count) noexcept
