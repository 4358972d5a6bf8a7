"""A part of what is known: the arithmetic of one process's share of a view (docs/arithmetic.md, "Shares").

All rounding is against the caller: N processes that begin from the same knowledge admit no more together than the rule would.
"""

from libc.stdint cimport int64_t, uint32_t

from ratethrottle._engine.arithmetic cimport (
    BUCKET, ceil_div, Counts, dated_start, LEVEL_MAX, same_definition, SLIDING, Terms, View, view_ahead, view_derive, view_free,
    view_rebase, view_roll, window_start,
)
from ratethrottle._engine.dated cimport view_align
from ratethrottle._engine.pieces cimport piece_free
from ratethrottle._engine.window cimport KEEP, NO_MEMORY, Units, Window, window_drop, window_live, window_new, window_push


cdef extern from *:
    """
    /* ceil(level * to / from), at most `most`: a level in ticks of one size, in ticks of another. The factors fill 53, 52 and 52 bits. */
    static inline int64_t rt_scaled_up(int64_t level, int64_t to, int64_t from, int64_t most) {
        unsigned __int128 scaled = ((unsigned __int128)level * to + from - 1) / from;
        return scaled > (unsigned __int128)most ? most : (int64_t)scaled;
    }

    /* The level that leaves of a part's capacity an nth of the room in a whole bucket, rounded down; 0 to `most`. In ticks of which a
       unit has `to`, the whole one's level in such of which it has `from`. */
    static inline int64_t rt_level_of_part(int64_t level, int64_t to, int64_t from, int64_t whole, int64_t part, int64_t n, int64_t most) {
        __int128 room = (__int128)whole * to - ((__int128)level * to + from - 1) / from, left;
        room = room >= 0 ? room / n : -((-room + n - 1) / n);
        left = (__int128)part * to - room;
        return left < 0 ? 0 : left > most ? most : (int64_t)left;
    }
    """
    int64_t scaled_up "rt_scaled_up"(int64_t level, int64_t to, int64_t ticks, int64_t most) noexcept nogil
    int64_t level_of_part "rt_level_of_part"(int64_t level, int64_t to, int64_t ticks, int64_t whole, int64_t part, int64_t n,
                                             int64_t most) noexcept nogil


cdef inline void rebase(View* view, int64_t now_us) noexcept nogil:
    """Bring a view that is from too far ahead of now to where it may be; one of a calendar's windows to now."""
    if view.terms.calendar != NULL:
        view_align(view, now_us)
    elif view_ahead(view, now_us):
        view_rebase(view, now_us)


cdef inline int derive(View* view, const Terms* terms, const View* source, int64_t now_us) noexcept nogil:
    """Make a view of a source's; of nothing, if that is NULL."""
    cdef int status = view_derive(view, terms, source, now_us)
    if terms.calendar != NULL:
        view.at_us = dated_start(terms, now_us)
    return status


cdef inline void roll(View* view, int64_t now_us) noexcept nogil:
    """Bring any view to now, for good."""
    cdef uint32_t expired
    cdef int64_t total
    rebase(view, now_us)
    if view.terms.kind == SLIDING:
        window_live(view.amount.window, now_us - view.terms.window_us, &expired, &total)
        window_drop(view.amount.window, expired, total)
    else:
        view_roll(view, now_us)


cdef inline int read_as(const View* view, View* read, const Terms* terms, int64_t now_us) noexcept nogil:
    """The view, or a new one if `terms` are of another definition: as a rule that has changed reads it."""
    if not same_definition(view.terms, terms):
        return derive(read, terms, view, now_us)
    read[0] = view[0]
    read.terms = terms
    return KEEP


cdef inline Window* window_part(const View* known, int64_t known_now_us, int64_t ahead_us, int64_t n) noexcept nogil:
    """An nth of its units, each with what leaves after it rounded up: n parts never hold less than the whole, at no time."""
    cdef const Window* whole = known.amount.window
    cdef Window* part = window_new(whole.count + 1)
    cdef const Units* entry
    cdef uint32_t i, expired
    cdef int64_t left, units
    if part == NULL:
        return NULL
    window_live(whole, known_now_us - known.terms.window_us, &expired, &left)
    for i in range(whole.first + expired, whole.first + whole.count):
        entry = &whole.entries[i]
        units = ceil_div(left, n) - ceil_div(left - entry.units, n)
        left -= entry.units
        if units:
            part.entries[part.count] = Units(entry.at_us + ahead_us, units)
            part.count += 1
            part.total += units
    return part


cdef inline int view_part(View* part, const Terms* terms, const View* known, int64_t known_now_us, int64_t now_us,
                   int64_t n, const Terms* whole) noexcept nogil:
    """An nth of what is known, rounded up, as `terms` read it now; of a bucket, of the room that it leaves in the rule's, `whole`.
    `known` is kept in another clock, in which it is now `known_now_us`."""
    cdef View source = known[0]
    cdef int64_t ahead_us = now_us - known_now_us, window_us = known.terms.window_us
    cdef int status
    if known.terms.kind == SLIDING:
        source.amount.window = window_part(known, known_now_us, ahead_us, n)
        if source.amount.window == NULL:
            return NO_MEMORY
    elif known.terms.kind == BUCKET:
        source.at_us = min(known.at_us, known_now_us)
        if not same_definition(known.terms, whole):
            view_roll(&source, known_now_us)     # as the store would: by the rate that it was kept by
        if terms.kind == BUCKET:
            # All parts together have the room of the whole, and gain it by no more than its rate: each by its own, from then on.
            part.terms = terms
            part.at_us = source.at_us + ahead_us
            part.amount.level_ticks = level_of_part(source.amount.level_ticks, terms.unit_ticks, known.terms.unit_ticks,
                                                    whole.capacity, terms.capacity, n, LEVEL_MAX)
            view_roll(part, now_us)
            return KEEP
        source.at_us = now_us
        source.amount.level_ticks = ceil_div(source.amount.level_ticks, n)
    else:
        # The clocks agree but roughly: it is the window whose beginning is nearest, also if that comes only now.
        source.at_us = max(<int64_t>0, known.at_us + ahead_us + window_us // 2)
        source.at_us = min(source.at_us, now_us + window_us)
        source.at_us = window_start(known.terms, source.at_us)
        source.amount.counts = Counts(<uint32_t>ceil_div(known.amount.counts.cur, n), <uint32_t>ceil_div(known.amount.counts.prev, n))
        if known.terms.calendar != NULL:
            source.at_us = known.at_us + ahead_us
            view_align(&source, now_us)
        view_roll(&source, now_us)
        if same_definition(known.terms, terms):
            part[0] = source
            part.terms = terms
            return KEEP
    status = derive(part, terms, &source, now_us)
    view_free(&source)
    return status


cdef inline int window_join(Window** own, const Window* other, bint exact) noexcept nogil:
    """At every instant as much as the one that holds more then."""
    cdef Window* joined = window_new(own[0].count + other.count + 1)
    cdef int64_t a_left = own[0].total, b_left = other.total, before, at_us
    cdef const Units* a = &own[0].entries[own[0].first]
    cdef const Units* b = &other.entries[other.first]
    if joined == NULL:
        return NO_MEMORY
    while a_left or b_left:
        before = max(a_left, b_left)
        at_us = a.at_us if a_left and (b_left == 0 or a.at_us <= b.at_us) else b.at_us
        if a_left and a.at_us == at_us:
            a_left -= a.units
            a += 1
        if b_left and b.at_us == at_us:
            b_left -= b.units
            b += 1
        if max(a_left, b_left) < before:
            window_push(&joined, exact, at_us, before - max(a_left, b_left))  # it has room
    piece_free(own[0])
    own[0] = joined
    return KEEP


cdef inline int view_join(View* own, const View* other) noexcept nogil:
    """Charge a view up to another one of its definition, both rolled to the same instant."""
    if own.terms.kind == SLIDING:
        return window_join(&own.amount.window, other.amount.window, own.terms.slot_us == 1)
    if own.terms.kind == BUCKET:
        own.amount.level_ticks = max(own.amount.level_ticks, other.amount.level_ticks)
    else:
        own.amount.counts.cur = max(own.amount.counts.cur, other.amount.counts.cur)
        own.amount.counts.prev = max(own.amount.counts.prev, other.amount.counts.prev)
    return KEEP
