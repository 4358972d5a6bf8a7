"""The arithmetic, as docs/arithmetic.md specifies it: terms, views, and the decision on a state of at most two views.

Everything is inline and touches no Python object: `noexcept nogil` is the compiler's word for it. Times are integer µs; no
function reads a clock.
"""

from libc.stdint cimport int64_t, uint32_t
from libc.string cimport memmove

from ratethrottle._engine.calendar cimport Boundaries, span_at
from ratethrottle._engine.pieces cimport piece_free
from ratethrottle._engine.window cimport (
    EXACT_UNITS, KEEP, NO_MEMORY, Units, UNITS_MAX, Window, window_drop, window_live, window_new, window_push, WRITE,
)


cdef extern from *:
    """
    #define RT_LEVEL_MAX 9007199254740991LL  /* 2^53 − 1, the largest integer that Lua holds exactly: no level is above it */
    #define RT_TICKS_MAX 4503599627370496LL  /* 2^52: no capacity in ticks reaches it */
    #define RT_CHARGED INT64_MIN
    #ifdef RATETHROTTLE_DEBUG
    #include <stdio.h>
    #include <stdlib.h>
    #define RT_DEBUG 1
    #define RT_INVARIANT(what) do { if (!(what)) { fprintf(stderr, "broken invariant: %s\\n", #what); abort(); } } while (0)
    #else
    #define RT_DEBUG 0
    #define RT_INVARIANT(what) ((void)0)
    #endif
    /* Of a strategy. The letters stand in stored states and in calls of the scripts. */
    enum rt_kind { RT_BUCKET = 'b', RT_SLIDING = 's', RT_COUNTER = 'c', RT_FIXED = 'f' };
    #define RT_OVERFLOWS(a, b, product) __builtin_mul_overflow((int64_t)(a), (int64_t)(b), product)
    """
    const int64_t LEVEL_MAX "RT_LEVEL_MAX"
    const int64_t TICKS_MAX "RT_TICKS_MAX"
    const int64_t CHARGED "RT_CHARGED"     # instead of the time of a grant: nobody was asked for these units
    enum Kind "rt_kind":
        BUCKET "RT_BUCKET"
        SLIDING "RT_SLIDING"
        COUNTER "RT_COUNTER"
        FIXED "RT_FIXED"
    bint RT_DEBUG
    void RT_INVARIANT(bint what) noexcept nogil
    bint RT_OVERFLOWS(int64_t a, int64_t b, int64_t* product) noexcept nogil


cdef enum:
    NEVER = -1

cdef struct Terms:                         # what a rule compiles to; see docs/arithmetic.md
    char kind                              # a Kind
    int64_t capacity                       # units
    int64_t window_us
    int64_t passed_us                      # of the aligned window that 1970 began in
    int64_t unit_ticks
    int64_t drain_ticks                    # per µs
    int64_t slot_us                        # of a calendar its number
    int64_t coarse_us
    int64_t span                           # of a counter: the window in coarse time, ceil_div(window_us, coarse_us)
    int64_t reach_us                       # of a sliding window: units that count from further ahead of now are too far ahead
    Boundaries* calendar                   # of a fixed window that is a calendar's: see `dated.pxd`; NULL of all others
    const Terms* kept                      # of a rule with a calendar in memory: what its views refer to, see `KeyTable.intern_rule`


cdef inline bint same_definition(const Terms* a, const Terms* b) noexcept nogil:
    """Whether both read the same view: see «State» in docs/arithmetic.md."""
    if a.kind != b.kind:
        return False
    if a.kind == BUCKET:
        return a.unit_ticks == b.unit_ticks and a.drain_ticks == b.drain_ticks
    return a.window_us == b.window_us and a.slot_us == b.slot_us


cdef inline int64_t window_start(const Terms* terms, int64_t at_us) noexcept nogil:
    """Return the start of the aligned window that contains an instant."""
    return at_us - (at_us + terms.passed_us) % terms.window_us


cdef inline int64_t dated_start(const Terms* terms, int64_t at_us) noexcept nogil:
    """Return where a window of the mean length would have begun that ends with the calendar's window that contains an instant."""
    return span_at(terms.calendar, at_us).until_us - terms.window_us


cdef struct Counts:
    uint32_t cur
    uint32_t prev

cdef union Amount:
    int64_t level_ticks                    # BUCKET
    Counts counts                          # COUNTER, FIXED
    Window* window                         # SLIDING; owned
    void* pair                             # of a cell that holds two views

cdef struct View:                          # one definition's account of a key
    const Terms* terms
    int64_t at_us                          # BUCKET: when the level was true; COUNTER, FIXED: the window's start; SLIDING: unused
    Amount amount

cdef struct Outcome:
    bint allowed
    bint in_ticks                          # `settle` still has to divide the numbers below; most callers never need them
    int64_t remaining
    int64_t retry_us                       # 0 when allowed, NEVER when the cost exceeds the capacity; of a charge, until out of debt
    int64_t reset_us                       # until nothing that was used counts any more

cdef inline int64_t ceil_div(int64_t a, int64_t b) noexcept nogil:
    return (a + b - 1) // b


cdef inline int64_t slot_end(const Terms* terms, int64_t now_us) noexcept nogil:
    """When units admitted now count from."""
    if terms.slot_us == 1:
        return now_us
    return (now_us // terms.slot_us + 1) * terms.slot_us


cdef inline int64_t reach_end(const Terms* terms, int64_t now_us) noexcept nogil:
    """How far ahead units of a sliding window may count from: a lease, of whatever version, reaches an eighth of it at most."""
    return slot_end(terms, now_us + terms.window_us // 8)


cdef inline bint view_ahead(const View* view, int64_t now_us) noexcept nogil:
    """Whether the clock has stepped backwards since the view was written; `view_rebase` makes such a view legal."""
    cdef const Window* window
    if view.terms.kind == SLIDING:
        window = view.amount.window
        # at > reach_end(now), without its division: with slots, `at` is a multiple of them.
        return window.count > 0 and window.entries[window.first + window.count - 1].at_us - view.terms.reach_us > now_us
    # Likewise the start of an aligned window lies behind that of now's exactly if it lies behind now.
    return view.at_us > now_us


cdef inline bint view_rebase(View* view, int64_t now_us) noexcept nogil:
    """Bring a view that is ahead to where it is legal, with all that it holds. Returns whether anything changed.

    That is now, or for a sliding window the end of a lease's reach. The next aligned window stays, so that it isn't granted twice.
    """
    cdef Window* window
    cdef int64_t head_us, held = 0
    if view.terms.kind == SLIDING:
        window = view.amount.window
        head_us = reach_end(view.terms, now_us)
        while window.count and window.entries[window.first + window.count - 1].at_us >= head_us:
            held += window.entries[window.first + window.count - 1].units
            window.count -= 1
        window.entries[window.first + window.count] = Units(head_us, min(held, UNITS_MAX))
        window.count += 1
        window.total -= held - min(held, UNITS_MAX)
    elif view.terms.kind == BUCKET:
        view.at_us = now_us
    elif view.at_us - now_us <= view.terms.window_us:
        return False
    else:
        view.at_us = window_start(view.terms, now_us)
    return True


cdef inline void view_roll(View* view, int64_t now_us) noexcept nogil:
    """Bring a view that is legal, and not a sliding window, to now."""
    cdef const Terms* terms = view.terms
    cdef int64_t start_us, drained_ticks
    if terms.kind == BUCKET:
        if RT_OVERFLOWS(now_us - view.at_us, terms.drain_ticks, &drained_ticks) or drained_ticks >= view.amount.level_ticks:
            view.amount.level_ticks = 0
        else:
            view.amount.level_ticks -= drained_ticks
        view.at_us = now_us
        return
    if now_us - view.at_us < terms.window_us:
        return
    start_us = window_start(terms, now_us)
    if terms.kind == COUNTER and view.at_us == start_us - terms.window_us:
        view.amount.counts.prev = view.amount.counts.cur
    else:
        view.amount.counts.prev = 0
    view.amount.counts.cur = 0
    view.at_us = start_us


cdef inline int64_t counter_room(const Terms* terms, const View* view, int64_t now_us) noexcept nogil:
    """(limit − cur)·V − prev·(V − e): what is free, in units times V. Negative above the limit.

    After a clock has stepped back, a window may begin only later. It counts as it will at its start.
    """
    cdef int64_t past = max(<int64_t>0, now_us - view.at_us)
    cdef int64_t cur = min(<int64_t>view.amount.counts.cur, terms.capacity)
    cdef int64_t prev = min(<int64_t>view.amount.counts.prev, terms.capacity)
    if terms.coarse_us > 1:
        past //= terms.coarse_us
    return (terms.capacity - cur) * terms.span - prev * (terms.span - past)


cdef inline int64_t counter_retry(const Terms* terms, const View* view, int64_t now_us, int64_t cost) noexcept nogil:
    cdef int64_t span = terms.span
    cdef int64_t cur = min(<int64_t>view.amount.counts.cur, terms.capacity)
    cdef int64_t prev = min(<int64_t>view.amount.counts.prev, terms.capacity)
    cdef int64_t room = terms.capacity - cur - cost
    cdef int64_t steps
    if room >= 0:
        steps = span - (room * span) // prev
        return view.at_us + (steps * terms.coarse_us if steps < span else terms.window_us) - now_us
    steps = max(<int64_t>0, span - ((terms.capacity - cost) * span) // cur)
    return view.at_us + terms.window_us + min(steps * terms.coarse_us, terms.window_us) - now_us


cdef inline int64_t window_retry(const Terms* terms, const Window* window, uint32_t expired, int64_t total, int64_t now_us,
                          int64_t cost) noexcept nogil:
    cdef uint32_t i = window.first + expired
    cdef int64_t excess = total + cost - terms.capacity
    while True:
        excess -= window.entries[i].units
        if excess <= 0:
            return window.entries[i].at_us + terms.window_us - now_us
        i += 1


cdef inline void judge(const Terms* terms, const View* view, int64_t now_us, int64_t cost, uint32_t expired, int64_t total,
                       Outcome* out) noexcept nogil:
    """Decide on a rolled view; `expired` and `total` are of a sliding window."""
    cdef int64_t short_by
    if cost > terms.capacity:
        out.allowed = False
        out.retry_us = NEVER
        return
    if terms.kind == BUCKET:
        short_by = view.amount.level_ticks + cost * terms.unit_ticks - terms.capacity * terms.unit_ticks
        out.allowed = short_by <= 0
        out.retry_us = 0 if out.allowed else short_by
    elif terms.kind == SLIDING:
        out.allowed = total + cost <= terms.capacity
        out.retry_us = 0 if out.allowed else window_retry(terms, view.amount.window, expired, total, now_us, cost)
    elif terms.kind == FIXED:
        out.allowed = view.amount.counts.cur + cost <= terms.capacity
        out.retry_us = 0 if out.allowed else view.at_us + terms.window_us - now_us
    else:
        out.allowed = cost * terms.span <= counter_room(terms, view, now_us)
        # The retry time of a counter depends on all of its numbers, so it doesn't wait.
        out.retry_us = 0 if out.allowed else counter_retry(terms, view, now_us, cost)


cdef inline int64_t view_fresh_at(const View* view) noexcept nogil:
    """When nothing tells the view from a fresh one; an instant up to `now` if nothing does already."""
    cdef const Window* window
    if view.terms.kind == BUCKET:
        return view.at_us + ceil_div(view.amount.level_ticks, view.terms.drain_ticks)
    if view.terms.kind == SLIDING:
        window = view.amount.window
        return window.entries[window.first + window.count - 1].at_us + view.terms.window_us if window.count else 0
    if view.terms.kind == FIXED:
        return view.at_us + view.terms.window_us if view.amount.counts.cur else 0
    if view.amount.counts.cur:
        return view.at_us + 2 * view.terms.window_us
    return view.at_us + view.terms.window_us if view.amount.counts.prev else 0


cdef inline void report(const Terms* terms, const View* view, int64_t now_us, int64_t total, Outcome* out) noexcept nogil:
    """Fill in what is left and when all of it is back, as the view stands now; `settle` finishes it."""
    out.in_ticks = terms.kind == BUCKET or terms.kind == COUNTER
    if terms.kind == BUCKET:
        out.remaining = terms.capacity * terms.unit_ticks - view.amount.level_ticks
        out.reset_us = view.amount.level_ticks
        return
    if terms.kind == SLIDING:
        out.remaining = max(<int64_t>0, terms.capacity - total)
    elif terms.kind == FIXED:
        out.remaining = max(<int64_t>0, terms.capacity - view.amount.counts.cur)
    else:
        out.remaining = counter_room(terms, view, now_us)
    out.reset_us = max(<int64_t>0, view_fresh_at(view) - now_us)


cdef inline void view_live(View* view, int64_t now_us, uint32_t* expired, int64_t* total) noexcept nogil:
    """Bring a legal view to now. Of a sliding window, which stays as it is, say what has left and what the others hold."""
    expired[0] = 0
    total[0] = 0
    if view.terms.kind == SLIDING:
        window_live(view.amount.window, now_us - view.terms.window_us, expired, total)
    else:
        view_roll(view, now_us)


cdef inline void view_look(View* view, const Terms* terms, int64_t now_us, int64_t cost, uint32_t* expired, int64_t* total,
                           Outcome* out) noexcept nogil:
    """Look at a legal view now: roll it, judge the cost by `terms`, which are of its definition, and report what is left.

    The report is that of a denial. After a grant the caller counts the units, and reports again.
    """
    view_live(view, now_us, expired, total)
    judge(terms, view, now_us, cost, expired[0], total[0], out)
    if not out.allowed:
        report(terms, view, now_us, total[0], out)


cdef inline void settle(const Terms* terms, Outcome* out) noexcept nogil:
    """Do the divisions that `judge` and `report` left: a division costs as much as all the rest of a decision."""
    out.in_ticks = False
    if terms.kind == BUCKET:
        out.remaining = out.remaining // terms.unit_ticks if out.remaining > 0 else 0
        out.reset_us = ceil_div(out.reset_us, terms.drain_ticks)
        if out.retry_us > 0:
            out.retry_us = ceil_div(out.retry_us, terms.drain_ticks)
    else:
        out.remaining = out.remaining // terms.span if out.remaining > 0 else 0


cdef inline void view_count(View* view, int64_t cost) noexcept nogil:
    """Count units in a rolled view that is not a sliding window."""
    if view.terms.kind == BUCKET:
        view.amount.level_ticks += cost * view.terms.unit_ticks
    else:
        view.amount.counts.cur = <uint32_t>min(view.amount.counts.cur + cost, UNITS_MAX)


cdef inline int view_charge(View* view, int64_t now_us, int64_t cost) noexcept nogil:
    """Count units in a rolled view, admitted by its own definition or by another one. Returns NO_MEMORY or KEEP."""
    cdef const Window* window
    cdef int64_t at_us
    if view.terms.kind == SLIDING:
        window = view.amount.window
        at_us = window.entries[window.first + window.count - 1].at_us if window.count else 0
        if at_us <= now_us:
            at_us = slot_end(view.terms, now_us)  # else this is still the slot of the newest entry, or before it
        return window_push(&view.amount.window, view.terms.slot_us == 1, at_us, cost)
    view_count(view, cost)
    return KEEP


cdef inline int view_charge_other(View* view, int64_t now_us, int64_t cost) noexcept nogil:
    cdef int64_t most
    if view.terms.kind != BUCKET:
        return view_charge(view, now_us, cost)
    # For what another definition admitted, a bucket owes its capacity at most, so that its level can't climb without end.
    most = max(view.amount.level_ticks, view.terms.capacity * view.terms.unit_ticks)
    view.amount.level_ticks = min(most, view.amount.level_ticks + min(cost, view.terms.capacity) * view.terms.unit_ticks)
    return KEEP


cdef inline int64_t view_used(const View* view, int64_t now_us) noexcept nogil:
    """Units that a view which is not ahead holds now."""
    cdef View rolled = view[0]
    cdef uint32_t expired
    cdef int64_t total
    view_live(&rolled, now_us, &expired, &total)
    if view.terms.kind == SLIDING:
        return total
    if view.terms.kind == BUCKET:
        return ceil_div(rolled.amount.level_ticks, view.terms.unit_ticks)
    if view.terms.kind == FIXED:
        return rolled.amount.counts.cur
    return <int64_t>rolled.amount.counts.cur + rolled.amount.counts.prev


cdef inline const View* view_fullest(const View* views, int count, int64_t now_us) noexcept nogil:
    """The view that holds most now, the first of equal ones, or NULL. A new definition takes it over.

    The last writer's view may no longer hold, or never have held, what the other one counts.
    """
    if count == 2 and view_used(&views[1], now_us) > view_used(views, now_us):
        return &views[1]
    return views if count else NULL


cdef inline int view_derive(View* own, const Terms* terms, const View* source, int64_t now_us) noexcept nogil:
    """Make the view of a definition that this state meets for the first time. Returns NO_MEMORY or KEEP."""
    cdef int64_t used = view_used(source, now_us) if source != NULL else 0
    cdef int64_t head_us, at_us
    cdef const Window* entries
    cdef uint32_t i
    own.terms = terms
    if terms.kind == BUCKET:
        own.at_us = now_us
        own.amount.level_ticks = min(used, terms.capacity) * terms.unit_ticks
        return KEEP
    if terms.kind != SLIDING:
        own.at_us = window_start(terms, now_us)
        own.amount.counts = Counts(<uint32_t>min(used, UNITS_MAX), 0)
        return KEEP
    own.at_us = 0
    own.amount.window = window_new(2)
    if own.amount.window == NULL:
        return NO_MEMORY
    if source == NULL or source.terms.kind != SLIDING:
        return window_push(&own.amount.window, terms.slot_us == 1, slot_end(terms, now_us), used) if used else KEEP
    head_us = reach_end(terms, now_us)
    entries = source.amount.window
    for i in range(entries.first, entries.first + entries.count):
        at_us = entries.entries[i].at_us
        if at_us + source.terms.window_us <= now_us:
            continue
        at_us = min(ceil_div(at_us, terms.slot_us) * terms.slot_us, head_us)
        if at_us + terms.window_us > now_us:
            if window_push(&own.amount.window, terms.slot_us == 1, at_us, entries.entries[i].units) == NO_MEMORY:
                return NO_MEMORY
    return KEEP


cdef inline int64_t view_reach(const Terms* terms) noexcept nogil:
    """For how long at most something that a view of these terms holds may count."""
    if terms.kind == BUCKET:
        return ceil_div(terms.capacity * terms.unit_ticks, terms.drain_ticks)
    return terms.window_us + terms.reach_us if terms.kind == SLIDING else 2 * terms.window_us


cdef inline void view_free(const View* view) noexcept nogil:
    if view.terms.kind == SLIDING:
        piece_free(view.amount.window)


cdef inline void view_audit(const View* view, int64_t now_us) noexcept nogil:
    """Abort on a view that can't be (debug builds only)."""
    cdef const Window* window
    cdef int64_t total = 0, before_us = 0
    cdef uint32_t i
    if not RT_DEBUG:
        return
    if view.terms.kind == BUCKET:
        RT_INVARIANT(0 <= view.amount.level_ticks < (<int64_t>1 << 53))
        RT_INVARIANT(view.at_us <= now_us)
    elif view.terms.kind == SLIDING:
        window = view.amount.window
        RT_INVARIANT(window.first + window.count <= window.room)
        RT_INVARIANT(view.terms.slot_us > 1 or window.count <= EXACT_UNITS)
        for i in range(window.first, window.first + window.count):
            RT_INVARIANT(window.entries[i].at_us > before_us)
            RT_INVARIANT(0 < window.entries[i].units <= UNITS_MAX)
            before_us = window.entries[i].at_us
            total += window.entries[i].units
        RT_INVARIANT(total == window.total)
        RT_INVARIANT(before_us <= reach_end(view.terms, now_us))
    else:
        RT_INVARIANT(view.terms.calendar != NULL or view.at_us == window_start(view.terms, view.at_us))
        RT_INVARIANT(view.at_us - now_us <= view.terms.window_us)
        RT_INVARIANT(view.amount.counts.cur <= UNITS_MAX and view.amount.counts.prev <= UNITS_MAX)


cdef inline void view_charge_second(View* view, bint allowed, int64_t now_us, int64_t cost) noexcept nogil:
    """Bring the view of a state's other definition to now, and charge it what was allowed."""
    cdef uint32_t expired
    cdef int64_t total
    view_live(view, now_us, &expired, &total)
    if view.terms.kind == SLIDING:
        window_drop(view.amount.window, expired, total)
    if allowed:
        view_charge_other(view, now_us, cost)  # without memory for one more entry, the other definition isn't charged


cdef inline int decide_views(View* views, int* count, const Terms* terms, int64_t now_us, int64_t cost,
                             Outcome* out) noexcept nogil:
    """Decide on a state of at most two views, the last writer's first. `views` and `count` become the state to keep.

    WRITE: they replace the stored ones (count 0: nothing but fresh views, delete the key). KEEP: the stored state stands.
    """
    cdef View own, other
    cdef bint rebased = False, derived = False, has_other = False
    cdef int i, other_index, own_index = -1
    cdef uint32_t expired
    cdef int64_t total
    for i in range(count[0]):
        if view_ahead(&views[i], now_us) and view_rebase(&views[i], now_us):
            rebased = True
        if own_index < 0 and same_definition(views[i].terms, terms):
            own_index = i
    # The other view is kept even when it is fresh, as the account of that. Derived anew from the own view, it would lock out a
    # shorter window, and refill one that began earlier.
    other_index = 1 if own_index == 0 else 0
    if other_index < count[0]:
        other = views[other_index]
        has_other = True
    if own_index >= 0:
        own = views[own_index]
    else:
        if view_derive(&own, terms, view_fullest(views, count[0], now_us), now_us) == NO_MEMORY:
            return NO_MEMORY
        derived = view_fresh_at(&own) > now_us
    view_look(&own, terms, now_us, cost, &expired, &total, out)
    if not (out.allowed or rebased or derived):
        if own_index < 0:
            view_free(&own)
        return KEEP
    if terms.kind == SLIDING:
        window_drop(own.amount.window, expired, total)
    if out.allowed:
        own.terms = terms
        if view_charge(&own, now_us, cost) == NO_MEMORY:
            return NO_MEMORY
        report(terms, &own, now_us, own.amount.window.total if terms.kind == SLIDING else 0, out)
    if has_other:
        view_charge_second(&other, out.allowed, now_us, cost)
    for i in range(count[0]):
        # A view that isn't kept gives back its window; a kept one was moved, not copied.
        if i != own_index and i != other_index:
            view_free(&views[i])
    if view_fresh_at(&own) <= now_us and not (has_other and view_fresh_at(&other) > now_us):
        view_free(&own)
        if has_other:
            view_free(&other)
        count[0] = 0
        return WRITE
    views[0] = own
    views[1] = other
    count[0] = 2 if has_other else 1
    return WRITE


# Corrections: units that weren't used after all, and units that nobody was asked for. See «Corrections» in docs/arithmetic.md.

cdef inline int64_t view_debt_room(const Terms* terms, const View* view, int64_t total) noexcept nogil:
    """How many more units a rolled view may be charged: what is free, and a debt of one capacity."""
    cdef int64_t used = total
    if terms.kind == BUCKET:
        used = ceil_div(view.amount.level_ticks, terms.unit_ticks)
    elif terms.kind != SLIDING:
        used = view.amount.counts.cur
    return max(<int64_t>0, 2 * terms.capacity - used)


cdef inline int64_t view_debt(const Terms* terms, const View* view, int64_t now_us, uint32_t expired, int64_t total) noexcept nogil:
    """How long a rolled view is in debt: of a bucket in ticks, else µs. 0 if it isn't."""
    if terms.kind == BUCKET:
        return max(<int64_t>0, view.amount.level_ticks - terms.capacity * terms.unit_ticks)
    if terms.kind == SLIDING:
        return window_retry(terms, view.amount.window, expired, total, now_us, 0) if total > terms.capacity else 0
    if terms.kind == COUNTER and counter_room(terms, view, now_us) < 0:
        return counter_retry(terms, view, now_us, 0)
    return view.at_us + terms.window_us - now_us if view.amount.counts.cur > terms.capacity else 0


cdef inline int64_t view_debit(View* view, const Terms* terms, int64_t now_us, int64_t total, int64_t cost) noexcept nogil:
    """Charge a rolled view, which holds `total`, with units that nobody was asked for. Returns how many it took, or −1: no memory."""
    cdef int64_t units = min(cost, view_debt_room(terms, view, total))
    view.terms = terms
    return -1 if units and view_charge(view, now_us, units) == NO_MEMORY else units


cdef inline int64_t window_refund(Window* window, int64_t at_us, int64_t units) noexcept nogil:
    """Take units out of the entry at that very time, if there is one. Returns how many."""
    cdef uint32_t i = window.first, end = window.first + window.count
    while i < end and window.entries[i].at_us < at_us:
        i += 1
    if i == end or window.entries[i].at_us != at_us:
        return 0
    units = min(units, window.entries[i].units)
    window.total -= units
    window.entries[i].units -= units
    if window.entries[i].units == 0:
        memmove(&window.entries[i], &window.entries[i + 1], (end - i - 1) * sizeof(Units))
        window.count -= 1
    return units


cdef inline bint view_refund(View* view, int64_t now_us, int64_t units, int64_t at_us) noexcept nogil:
    """Give back units of a grant at `at_us` to a legal view, which it rolls unless it is a sliding window. Whether any came back."""
    cdef int64_t given, drained_ticks, start_us, total
    cdef uint32_t expired
    if view.terms.kind == SLIDING:
        at_us = slot_end(view.terms, at_us)
        window_live(view.amount.window, now_us - view.terms.window_us, &expired, &total)
        # Units that a full window has forgotten may be just these. What came with them, or after them, is others'.
        if at_us + view.terms.window_us <= now_us or view.terms.slot_us == 1 and total >= EXACT_UNITS:
            return False
        return window_refund(view.amount.window, at_us, units) > 0
    view_roll(view, now_us)
    if view.terms.kind != BUCKET:
        start_us = window_start(view.terms, at_us) if view.terms.calendar == NULL else dated_start(view.terms, at_us)
        given = min(<int64_t>view.amount.counts.cur, units) if start_us == view.at_us else 0
        view.amount.counts.cur -= <uint32_t>given
        return given > 0
    if RT_OVERFLOWS(max(<int64_t>0, now_us - at_us), view.terms.drain_ticks, &drained_ticks):
        return False
    given = min(units, TICKS_MAX // view.terms.unit_ticks) * view.terms.unit_ticks - drained_ticks
    given = min(view.amount.level_ticks, max(<int64_t>0, given))
    view.amount.level_ticks -= given
    return given > 0


cdef inline int views_count(const View* views, int count, int64_t now_us) noexcept nogil:
    """How many of the views to keep: all of them, or none if all are fresh; then they are freed."""
    if view_fresh_at(views) > now_us or count == 2 and view_fresh_at(&views[1]) > now_us:
        return count
    view_free(views)
    if count == 2:
        view_free(&views[1])
    return 0


cdef inline int correct_views(View* views, int* count, const Terms* terms, int64_t now_us, int64_t units, int64_t granted_us,
                              Outcome* out) noexcept nogil:
    """Give back units that were granted then, or, if that is CHARGED, count units that nobody was asked for.

    What becomes of `views` and `count`, and what is returned, is as in `decide_views`. The outcome is an allowed one. If nothing comes
    back, nothing is to be written; but windows that were ahead have been rebased, so that they have to be copies.
    """
    cdef View own, other
    cdef bint changed = False, has_other = False, charges = granted_us == CHARGED, given = False
    cdef int i, other_index, own_index = -1
    cdef uint32_t expired
    cdef int64_t total
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
        given = not charges and view_refund(&own, now_us, units, granted_us)
    else:                                    # it doesn't hold what was granted under the definition that it is derived from
        if view_derive(&own, terms, view_fullest(views, count[0], now_us), now_us) == NO_MEMORY:
            return NO_MEMORY
        changed |= view_fresh_at(&own) > now_us
    view_live(&own, now_us, &expired, &total)
    if not charges or view_debt_room(terms, &own, total) == 0:
        units = 0
    if not charges:
        changed = given
    if changed or units:
        if terms.kind == SLIDING:
            window_drop(own.amount.window, expired, total)
            expired = 0
        if units:
            units = view_debit(&own, terms, now_us, total, units)
            if units < 0:
                return NO_MEMORY
            total = own.amount.window.total if terms.kind == SLIDING else 0
    out.allowed = True
    report(terms, &own, now_us, total, out)
    out.retry_us = view_debt(terms, &own, now_us, expired, total)
    if not (changed or units):
        if own_index < 0:
            view_free(&own)
        return KEEP
    if has_other:
        view_charge_second(&other, units > 0, now_us, units)
    for i in range(count[0]):
        if i != own_index and i != other_index:
            view_free(&views[i])
    views[0] = own
    views[1] = other
    count[0] = views_count(views, 2 if has_other else 1, now_us)
    return WRITE


cdef inline void take_correction(const Terms* terms, const int64_t* numbers, Outcome* out) noexcept nogil:
    """Fill in what the script's answer says to a charge or a refund. It is always granted; `numbers` say 0 if the key is in debt."""
    cdef View view
    cdef int64_t now_us = terms.window_us
    out.allowed = True
    if terms.kind == SLIDING:
        out.in_ticks = False
        out.remaining = max(<int64_t>0, terms.capacity - numbers[1])
        out.retry_us = 0 if numbers[0] else max(<int64_t>1, numbers[4])
        out.reset_us = numbers[3]
        return
    view.terms = terms
    view.at_us = 0
    if terms.kind == BUCKET:
        view.amount.level_ticks = numbers[1]
    else:                                    # a window that is ahead of the clock begins at most one window after now
        view.at_us = terms.window_us
        view.amount.counts = Counts(<uint32_t>numbers[1], <uint32_t>numbers[2] if terms.kind == COUNTER else 0)
        now_us += numbers[3 if terms.kind == COUNTER else 2]
    report(terms, &view, now_us, 0, out)
    out.retry_us = view_debt(terms, &view, now_us, 0, 0)


# The script's answer to n equal checks; see «Answers» in docs/arithmetic.md.

cdef inline int answer_length(const Terms* terms, int64_t granted, int64_t count) noexcept nogil:
    """How many numbers the answer has, without the units taken ahead."""
    if granted < 0:                        # it wasn't decided, and the answer says no more
        return 1
    if terms.kind == BUCKET:
        return 2
    if terms.kind == SLIDING:
        return 5 if granted < count else 4  # the fifth is the retry time
    return 4 if terms.kind == COUNTER else 3


cdef inline void take_answer(const Terms* terms, const int64_t* numbers, int64_t ahead, int64_t cost, int64_t position,
                             Outcome* out) noexcept nogil:
    """Fill in what it says to the check at `position` of those n: what that check would have heard if they had come one by one."""
    cdef View view
    cdef int64_t now_us = 0, total = 0
    cdef bint allowed = position < numbers[0]
    # Units that were granted after this check don't count for it.
    cdef int64_t later = (numbers[0] - 1 - position) * cost + ahead if allowed else 0
    view.terms = terms
    view.at_us = 0
    if terms.kind == SLIDING:
        total = numbers[1] - later
        out.allowed = allowed
        out.in_ticks = False
        out.remaining = max(<int64_t>0, terms.capacity - total)
        out.reset_us = numbers[3]
        out.retry_us = 0 if allowed else numbers[4]
    else:
        if terms.kind == BUCKET:
            view.amount.level_ticks = numbers[1] - later * terms.unit_ticks
        elif terms.kind == FIXED:
            view.amount.counts = Counts(<uint32_t>(numbers[1] - later), 0)
            now_us = numbers[2]
        else:
            view.amount.counts = Counts(<uint32_t>(numbers[1] - later), <uint32_t>numbers[2])
            now_us = numbers[3]
        if terms.kind != BUCKET:             # a window that is ahead of the clock begins at most one window after now
            view.at_us = terms.window_us
            now_us += terms.window_us
        if not allowed:
            judge(terms, &view, now_us, cost, 0, 0, out)
        out.allowed = allowed
        if allowed:
            out.retry_us = 0
        report(terms, &view, now_us, 0, out)
    if cost > terms.capacity:
        out.retry_us = NEVER
