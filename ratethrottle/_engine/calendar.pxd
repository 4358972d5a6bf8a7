"""Windows of a calendar, as instants that are known ahead. Inline and without Python objects, as the arithmetic that stands on it."""

from libc.stdint cimport int64_t, uint32_t


cdef struct Boundaries:                    # of one calendar: where its windows begin. Never freed, since terms point here
    int64_t window_us                      # the mean length of a window
    const int64_t* at_us                   # ascending, at least two
    uint32_t count
    uint32_t hint                          # where an instant was found last

cdef struct Span:
    int64_t since_us
    int64_t until_us


cdef inline Span span_at(Boundaries* known, int64_t at_us) noexcept nogil:
    """Return the window that contains an instant. Beyond what is known, windows have the mean length."""
    cdef uint32_t low = 0, high = known.count - 1, middle = known.hint
    cdef int64_t past_us
    if at_us < known.at_us[0] or at_us >= known.at_us[high]:
        past_us = (at_us - known.at_us[0 if at_us < known.at_us[0] else high]) % known.window_us
        if past_us < 0:                    # C rounds to zero
            past_us += known.window_us
        return Span(at_us - past_us, at_us - past_us + known.window_us)
    while high - low > 1:
        if known.at_us[middle] <= at_us:
            low = middle
        else:
            high = middle
        # What was found last, and the one after it, before halves.
        middle = middle + 1 if middle == low and middle == known.hint and middle + 1 < high else low + (high - low) // 2
    known.hint = low
    return Span(known.at_us[low], known.at_us[low + 1])
