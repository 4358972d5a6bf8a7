"""Views of fixed windows whose boundaries are those of a calendar: see `dated.pyx`."""

from libc.stdint cimport int64_t

from ratethrottle._engine.arithmetic cimport Terms, View


cdef bint view_align(View* view, int64_t now_us) noexcept nogil
cdef bint dated_bring(View* views, int* count, View* dropped, const Terms* terms, int64_t now_us) noexcept nogil
cdef int dated_write(View* views, int* count, const Terms* terms, int64_t now_us) noexcept nogil
