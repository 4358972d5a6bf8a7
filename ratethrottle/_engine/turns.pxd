"""Bookings: units that are counted now, and used when it is their turn. `docs/arithmetic.md` specifies them.

Buckets alone are booked. What is counted for later stands in the level, above the capacity.
"""

from libc.stdint cimport int64_t

from ratethrottle._engine.arithmetic cimport (
    ceil_div, LEVEL_MAX, NEVER, Outcome, report, same_definition, Terms, View, view_ahead, view_charge_second, view_derive, view_free,
    view_fresh_at, view_fullest, view_rebase, view_roll, views_count,
)
from ratethrottle._engine.window cimport KEEP, NO_MEMORY, WRITE


cdef enum:
    BOOKED_US = 60_000_000                   # no turn is farther ahead

cdef struct Booking:
    int64_t ahead_us                         # how far ahead the turn may be
    bint evenly                              # it comes once all before it has drained: of a leaky bucket
    bint returns                             # it isn't needed any more
    int64_t empty_us                         # then: when the bucket would have been empty after it


cdef inline int64_t booking_base(const Terms* terms, int64_t units, bint evenly) noexcept nogil:
    """The level, in ticks, at which it is the turn of so many units, themselves included."""
    return (units if evenly else terms.capacity) * terms.unit_ticks


cdef inline void tell_booking(const Terms* terms, int64_t level_ticks, int64_t units, bint evenly, bint allowed,
                              Outcome* out) noexcept nogil:
    """Fill in what a booking hears. Its `retry_us` says how long until its turn, in ticks; denied, until it would have been."""
    cdef View view
    view.terms = terms
    view.at_us = 0
    view.amount.level_ticks = level_ticks
    report(terms, &view, 0, 0, out)
    out.allowed = allowed
    if not allowed:
        level_ticks += units * terms.unit_ticks
    out.retry_us = max(<int64_t>0, level_ticks - booking_base(terms, units, evenly)) if units <= terms.capacity else NEVER


cdef inline bint booking_fits(const Terms* terms, int64_t level_ticks, int64_t units, const Booking* booking) noexcept nogil:
    """Whether the turn of so many units is no farther ahead than it may be."""
    cdef int64_t most_ticks = min(LEVEL_MAX, booking_base(terms, units, booking.evenly) + booking.ahead_us * terms.drain_ticks)
    return units <= terms.capacity and level_ticks + units * terms.unit_ticks <= most_ticks


cdef inline void take_booking(const Terms* terms, const int64_t* numbers, int64_t units, bint evenly, int64_t position,
                              Outcome* out) noexcept nogil:
    """Fill in what the script's answer says to the booking at `position` of equal ones."""
    cdef bint allowed = position < numbers[0]
    cdef int64_t later = (numbers[0] - 1 - position) * units if allowed else 0
    tell_booking(terms, numbers[1] - later * terms.unit_ticks, units, evenly, allowed, out)


cdef inline bint book_view(View* own, const Terms* terms, int64_t now_us, int64_t units, const Booking* booking,
                           Outcome* out) noexcept nogil:
    """Book in a rolled view, or give a booking back. Returns whether anything changed."""
    cdef int64_t level_ticks = own.amount.level_ticks
    if booking.returns:
        # Another level says that others have booked behind it: their turns stay, so that these units can't be had any earlier.
        if now_us + ceil_div(level_ticks, terms.drain_ticks) == booking.empty_us:
            own.amount.level_ticks -= min(level_ticks, units * terms.unit_ticks)
        tell_booking(terms, own.amount.level_ticks, 0, False, True, out)
        return own.amount.level_ticks < level_ticks
    if booking_fits(terms, level_ticks, units, booking):
        own.amount.level_ticks += units * terms.unit_ticks
    tell_booking(terms, own.amount.level_ticks, units, booking.evenly, own.amount.level_ticks > level_ticks, out)
    return out.allowed


cdef inline int book_views(View* views, int* count, const Terms* terms, int64_t now_us, int64_t units, const Booking* booking,
                           Outcome* out) noexcept nogil:
    """Book, or give a booking back. What becomes of `views` and `count`, and what is returned, is as in `decide_views`."""
    cdef View own, other
    cdef bint changed = False, has_other = False, booked = False
    cdef int i, other_index, own_index = -1
    for i in range(count[0]):
        if view_ahead(&views[i], now_us) and view_rebase(&views[i], now_us):
            changed = True
        if own_index < 0 and same_definition(views[i].terms, terms):
            own_index = i
    other_index = 1 if own_index == 0 else 0
    if other_index < count[0]:
        other = views[other_index]
        has_other = True
    if own_index >= 0:
        own = views[own_index]
    else:
        if view_derive(&own, terms, view_fullest(views, count[0], now_us), now_us) == NO_MEMORY:
            return NO_MEMORY
        changed |= view_fresh_at(&own) > now_us
        if booking.returns:
            units = 0                        # it doesn't hold what was booked under the definition that it is derived from
    view_roll(&own, now_us)
    booked = book_view(&own, terms, now_us, units, booking, out)
    if not booked and (booking.returns or not changed):  # if nothing comes back, nothing is written, as in `correct_views`
        return KEEP
    if booked and not booking.returns:
        own.terms = terms
    if has_other:
        view_charge_second(&other, booked and not booking.returns, now_us, units)
    for i in range(count[0]):
        if i != own_index and i != other_index:
            view_free(&views[i])
    views[0] = own
    views[1] = other
    count[0] = views_count(views, 2 if has_other else 1, now_us)
    return WRITE
