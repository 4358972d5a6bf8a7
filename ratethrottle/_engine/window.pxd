"""The entries of a sliding window: units, each with the instant from which they count, oldest first.

Inline and without Python objects, as the arithmetic that stands on it.
"""

from libc.stdint cimport int64_t, uint32_t
from libc.string cimport memcpy, memmove

from ratethrottle._engine.pieces cimport piece_free, piece_new


cdef extern from *:
    """
    #define RT_UNITS_MAX 4000000000LL  /* stored counts saturate here: above any limit, so that no decision changes */
    """
    const int64_t UNITS_MAX "RT_UNITS_MAX"


cdef enum:                                 # what a function returns that changes a state
    KEEP = 0
    WRITE = 1
    NO_MEMORY = 2

cdef enum:
    # A window with 1 µs slots keeps its newest 65 units. A limit of at most 64 depends on no others: with 65 it is in debt. A window
    # that holds fewer has forgotten none that would count.
    EXACT_UNITS = 65
    # 64 slots, the current one, and one more before the oldest leaves. A window has more only after its slots have changed, with
    # those up to an eighth ahead.
    WINDOW_ENTRIES_MAX = 66

cdef struct Units:
    int64_t at_us                          # the instant from which they count
    int64_t units

cdef struct Window:                        # entries[first:first + count], ascending
    int64_t total
    uint32_t first
    uint32_t count
    uint32_t room                          # entries allocated
    Units entries[1]


cdef inline Window* window_new(uint32_t room) noexcept nogil:
    cdef Window* window = <Window*>piece_new(sizeof(Window) + (room - 1) * sizeof(Units))
    if window != NULL:
        window.total = 0
        window.first = 0
        window.count = 0
        window.room = room
    return window


cdef inline Window* window_clone(const Window* window) noexcept nogil:
    cdef Window* twin = window_new(window.room)
    if twin != NULL:
        memcpy(twin, window, sizeof(Window) + (window.room - 1) * sizeof(Units))
    return twin


cdef inline void window_live(const Window* window, int64_t since_us, uint32_t* expired, int64_t* total) noexcept nogil:
    """Count the entries that have left by `since_us` (now − window), and the units of the others."""
    cdef uint32_t n = 0
    cdef int64_t held = window.total
    while n < window.count and window.entries[window.first + n].at_us <= since_us:
        held -= window.entries[window.first + n].units
        n += 1
    expired[0] = n
    total[0] = held


cdef inline void window_drop(Window* window, uint32_t expired, int64_t total) noexcept nogil:
    """Remove the entries that have left, as `window_live` counts them."""
    window.first += expired
    window.count -= expired
    window.total = total
    if window.count == 0:
        window.first = 0


cdef inline int window_push(Window** owner, bint exact, int64_t at_us, int64_t units) noexcept nogil:
    """Add units that count from `at_us`, which is not before the newest entry. Returns NO_MEMORY or KEEP."""
    cdef Window* window = owner[0]
    cdef Window* larger
    cdef Units* newest
    cdef int64_t excess
    units = min(units, UNITS_MAX)
    newest = &window.entries[window.first + window.count - 1] if window.count else NULL
    if newest != NULL and newest.at_us == at_us:
        units = min(units, UNITS_MAX - newest.units)
        newest.units += units
    else:
        if window.first + window.count == window.room:
            if window.first > 0:
                memmove(window.entries, &window.entries[window.first], window.count * sizeof(Units))
                window.first = 0
            else:
                larger = window_new(min(2 * window.room, <uint32_t>WINDOW_ENTRIES_MAX)
                                    if window.room < WINDOW_ENTRIES_MAX else 2 * window.room)
                if larger == NULL:
                    return NO_MEMORY
                larger.total = window.total
                larger.count = window.count
                memcpy(larger.entries, window.entries, window.count * sizeof(Units))
                piece_free(window)
                owner[0] = window = larger
        window.entries[window.first + window.count] = Units(at_us, units)
        window.count += 1
    window.total += units
    if exact:
        while window.total > EXACT_UNITS:
            excess = window.total - EXACT_UNITS
            if window.entries[window.first].units > excess:
                window.entries[window.first].units -= excess
                window.total -= excess
            else:
                window_drop(window, 1, window.total - window.entries[window.first].units)
    return KEEP
