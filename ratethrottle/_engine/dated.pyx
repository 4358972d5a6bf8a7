# cython: auto_pickle=False, autotestdict=False
"""Views of fixed windows whose boundaries are those of a calendar. They stand as windows of the mean length that end where they do.

So what doesn't look beyond the end of a window treats them as any other fixed window. What does stands here. It is a module of its
own, so that a compiler doesn't weigh it when it decides what it inlines into a check.
"""

from libc.stdint cimport int64_t, uint32_t

from ratethrottle._engine.arithmetic cimport (
    COUNTER, Counts, dated_start, same_definition, Terms, View, view_ahead, view_charge_second, view_free, view_fresh_at, view_rebase,
    view_used,
)
from ratethrottle._engine.calendar cimport Boundaries, Span, span_at
from ratethrottle._engine.window cimport UNITS_MAX, WRITE


cdef bint view_align(View* view, int64_t now_us) noexcept nogil:
    """Bring a view to the window of now, if the end of its own is nearest to the end of that; or it stands ahead.

    Its end is another one if others have written it meanwhile, or know the time zone in another version. Returns whether the clock
    had stepped backwards, by more than a window.
    """
    cdef Boundaries* calendar = view.terms.calendar
    cdef Span span = span_at(calendar, now_us)
    cdef Counts* counts = &view.amount.counts
    cdef int64_t end_us = view.at_us + view.terms.window_us, before_us
    cdef bint rebased = view.at_us - now_us > view.terms.window_us
    if rebased or (counts.cur == 0 and counts.prev == 0):
        end_us = span.until_us
    if end_us - span.since_us <= span.until_us - end_us:
        before_us = span_at(calendar, span.since_us - 1).since_us
        # Of what is owed, the window before is known too.
        counts.prev = counts.cur if view.terms.kind == COUNTER and end_us - before_us > span.since_us - end_us else 0
        counts.cur = 0
    elif end_us - span.until_us > span_at(calendar, span.until_us).until_us - end_us:
        return False
    view.at_us = span.until_us - view.terms.window_us
    return rebased


cdef bint view_drift(View* view, int64_t now_us) noexcept nogil:
    """Bring a view to now whose calendar the rule at hand doesn't have: by windows of the mean length, as the script has to.

    Returns whether the clock had stepped backwards, by more than a window.
    """
    cdef int64_t window_us = view.terms.window_us, past_us = (now_us - view.at_us) % window_us
    cdef bint ahead = view.at_us - now_us > window_us
    if past_us < 0:                            # C rounds to zero
        past_us += window_us
    if ahead or now_us - view.at_us >= window_us:
        if not ahead:
            view.amount.counts = Counts(0, 0)
        view.at_us = now_us - past_us
    return ahead


cdef int64_t dated_left(const View* view, int64_t since_us, int64_t now_us) noexcept nogil:
    """Units of a view that a calendar's window, which began then, takes over: of another calendar's, if the two overlap."""
    if view.terms.calendar == NULL:
        return view_used(view, now_us)
    return view.amount.counts.cur if view.at_us + view.terms.window_us > since_us else 0


cdef bint dated_bring(View* views, int* count, View* dropped, const Terms* terms, int64_t now_us) noexcept nogil:
    """Do with copies of a state's views what needs a calendar, so that `decide_views` decides on them.

    The rule's own view is made if it has a calendar, and the state has none yet; `dropped` is a view that it takes the place of, or
    has no terms. Returns whether the views are to be written, whatever is decided.
    """
    cdef int i, own_index = -1
    cdef int64_t since_us
    cdef bint changed = False
    cdef View own
    dropped.terms = NULL
    if terms.calendar == NULL and (count[0] == 0 or views.terms.calendar == NULL) and (count[0] < 2 or views[1].terms.calendar == NULL):
        return False
    for i in range(count[0]):
        if own_index < 0 and same_definition(views[i].terms, terms):
            own_index = i
        if views[i].terms.calendar != NULL and i != own_index and view_ahead(&views[i], now_us) and view_drift(&views[i], now_us):
            changed = True
    if terms.calendar != NULL and own_index >= 0:
        changed = view_align(&views[own_index], now_us) or changed
    elif terms.calendar != NULL:
        since_us = span_at(terms.calendar, now_us).since_us
        own.terms = terms
        own.at_us = dated_start(terms, now_us)
        own.amount.counts = Counts(0, 0)
        for i in range(count[0]):
            if view_ahead(&views[i], now_us) and view_rebase(&views[i], now_us):
                changed = True
            own.amount.counts.cur = max(own.amount.counts.cur, <uint32_t>min(dated_left(&views[i], since_us, now_us), UNITS_MAX))
        if count[0] == 2:
            dropped[0] = views[1]
        views[1] = views[0]
        views[0] = own
        count[0] = min(count[0] + 1, 2)
        changed = changed or own.amount.counts.cur > 0
        own_index = 0
    for i in range(count[0]):
        if views[i].terms.calendar != NULL and i != own_index:
            view_drift(&views[i], now_us)
    return changed


cdef int dated_write(View* views, int* count, const Terms* terms, int64_t now_us) noexcept nogil:
    """Have what `dated_bring` has changed written although it is denied, with the own view first. Returns WRITE."""
    cdef View own = views[0]
    cdef bint holds = False
    cdef int i
    if count[0] == 2 and not same_definition(own.terms, terms):
        views[0] = views[1]
        views[1] = own
    for i in range(count[0]):
        view_charge_second(&views[i], False, now_us, 0)
        holds = holds or view_fresh_at(&views[i]) > now_us
    if not holds:
        for i in range(count[0]):
            view_free(&views[i])
        count[0] = 0
    return WRITE
