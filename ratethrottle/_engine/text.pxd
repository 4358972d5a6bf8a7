"""The ASCII form of states: see docs/arithmetic.md."""

from libc.stdint cimport uint32_t

from ratethrottle._engine.arithmetic cimport BUCKET, FIXED, SLIDING, Terms, View
from ratethrottle._engine.window cimport Window


cdef inline str window_text(const Terms* terms, const Window* window):
    """A sliding window, with as few digits for units as possible."""
    cdef uint32_t i, newest = window.first + window.count - 1
    if window.count == 0:
        return f"s{terms.window_us},{terms.slot_us},0,0,0,1,;"
    digits = len(str((terms.window_us + terms.window_us // 8) // terms.slot_us + 1))
    width = max([1] + [len(str(window.entries[i].units)) for i in range(window.first, newest)])
    older = "".join([
        f"{window.entries[i].at_us // terms.slot_us % 10**digits:0{digits}}{window.entries[i].units:0{width}}"
        for i in range(window.first, newest)
    ])
    units = window.entries[newest].units
    last = window.entries[newest].at_us // terms.slot_us
    return f"s{terms.window_us},{terms.slot_us},{units},{window.total - units},{last},{width},{older};"


cdef inline str view_text(const View* view):
    cdef const Terms* terms = view.terms
    if terms.kind == BUCKET:
        return f"b{terms.unit_ticks},{terms.drain_ticks},{terms.capacity},{view.amount.level_ticks},{view.at_us};"
    if terms.kind == SLIDING:
        return window_text(terms, view.amount.window)
    if terms.kind == FIXED:
        name = "f" if terms.calendar == NULL else f"d{terms.slot_us},"
        return f"{name}{terms.window_us},{view.at_us},{view.amount.counts.cur};"
    return f"c{terms.window_us},{view.at_us},{view.amount.counts.cur},{view.amount.counts.prev};"
