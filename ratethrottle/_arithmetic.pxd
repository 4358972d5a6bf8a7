"""The arithmetic, as docs/arithmetic.md specifies it: terms, views, and the decision on a state of at most two views.

Everything is inline and touches no Python object: `noexcept nogil` is the compiler's word for it. Times are integer µs; no
function reads a clock.
"""

from libc.stdint cimport int64_t, uint32_t
from libc.string cimport memcpy, memmove

from ratethrottle._pieces cimport piece_free, piece_new


cdef extern from *:
    """
    #define RT_UNITS_MAX 4000000000LL  /* saturates stored counts; beyond any limit, so that no decision changes */
    #ifdef RATETHROTTLE_DEBUG
    #include <stdio.h>
    #include <stdlib.h>
    #define RT_DEBUG 1
    #define RT_INVARIANT(what) do { if (!(what)) { fprintf(stderr, "broken invariant: %s\\n", #what); abort(); } } while (0)
    #else
    #define RT_DEBUG 0
    #define RT_INVARIANT(what) ((void)0)
    #endif
    #define RT_OVERFLOWS(a, b, product) __builtin_mul_overflow((int64_t)(a), (int64_t)(b), product)
    """
    const int64_t UNITS_MAX "RT_UNITS_MAX"
    bint RT_DEBUG
    void RT_INVARIANT(bint what) noexcept nogil
    bint RT_OVERFLOWS(int64_t a, int64_t b, int64_t* product) noexcept nogil


cdef enum:
    EXACT_UNITS = 64                       # a window with 1 µs slots never depends on more than its newest 64 units
    # 64 slots and the one under way, and one more before the oldest leaves. Few windows have more: what another one's slots
    # became, up to an eighth ahead.
    ENTRIES_MAX = 66
    NEVER = -1

cdef struct Terms:                         # what a rule compiles to; see docs/arithmetic.md
    char kind                              # b, s, c or f
    int64_t capacity                       # units
    int64_t window_us
    int64_t passed_us                      # of the aligned window that 1970 began in
    int64_t unit_ticks
    int64_t drain_ticks                    # per µs
    int64_t slot_us
    int64_t coarse_us
    int64_t span                           # of a counter: the window in coarse time, ceil_div(window_us, coarse_us)
    int64_t reach_us                       # of a sliding window: units from further ahead of now than this are too far ahead


cdef inline bint same_definition(const Terms* a, const Terms* b) noexcept nogil:
    """Whether both read the same view: see «State» in docs/arithmetic.md."""
    if a.kind != b.kind:
        return False
    if a.kind == c"b":
        return a.unit_ticks == b.unit_ticks and a.drain_ticks == b.drain_ticks
    return a.window_us == b.window_us and a.slot_us == b.slot_us


cdef inline int64_t window_start(const Terms* terms, int64_t at_us) noexcept nogil:
    """Where the aligned window begins that an instant is in."""
    return at_us - (at_us + terms.passed_us) % terms.window_us


cdef struct Units:
    int64_t at_us                          # the instant from which they count
    int64_t units

cdef struct Window:                        # of a sliding window: entries[first:first + count], ascending
    int64_t total
    uint32_t first
    uint32_t count
    uint32_t room                          # entries allocated
    Units entries[1]

cdef struct Counts:
    uint32_t cur
    uint32_t prev

cdef union Amount:
    int64_t level_ticks                    # b
    Counts counts                          # c, f
    Window* window                         # s
    void* pair                             # of a slot that holds two views

cdef struct View:                          # one definition's account of a key
    const Terms* terms
    int64_t at_us                          # b: when the level was true; c, f: start of the window; s: unused
    Amount amount

cdef struct Outcome:
    bint allowed
    bint in_ticks                          # the numbers below still wait for their divisions, which most callers never need
    int64_t remaining
    int64_t retry_us                       # 0 when allowed, NEVER when the cost exceeds the capacity
    int64_t reset_us

cdef enum:
    KEEP = 0
    WRITE = 1
    NO_MEMORY = 2


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
    """How many entries from the oldest on have left by `since_us` (now − window), and what the others hold."""
    cdef uint32_t n = 0
    cdef int64_t held = window.total
    while n < window.count and window.entries[window.first + n].at_us <= since_us:
        held -= window.entries[window.first + n].units
        n += 1
    expired[0] = n
    total[0] = held


cdef inline void window_drop(Window* window, uint32_t expired, int64_t total) noexcept nogil:
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
                larger = window_new(min(2 * window.room, <uint32_t>ENTRIES_MAX) if window.room < ENTRIES_MAX
                                    else 2 * window.room)
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


cdef inline bint view_ahead(const View* view, int64_t now_us) noexcept nogil:
    """Whether the clock has stepped backwards since the view was written: then it is `view_rebase` that knows what stands."""
    cdef const Window* window
    if view.terms.kind == c"s":
        window = view.amount.window
        # at > reach_end(now), without its division: with slots, `at` is a multiple of them.
        return window.count > 0 and window.entries[window.first + window.count - 1].at_us - view.terms.reach_us > now_us
    # Likewise the start of an aligned window lies behind that of now's exactly if it lies behind now.
    return view.at_us > now_us


cdef inline bint view_rebase(View* view, int64_t now_us) noexcept nogil:
    """Bring a view that is ahead to where it is legal, with all that it holds; whether that changes anything.

    To now, or what a lease may have taken to where that may reach. The next aligned window stands, so that it isn't granted twice.
    """
    cdef Window* window
    cdef int64_t head_us, held = 0
    if view.terms.kind == c"s":
        window = view.amount.window
        head_us = reach_end(view.terms, now_us)
        while window.count and window.entries[window.first + window.count - 1].at_us >= head_us:
            held += window.entries[window.first + window.count - 1].units
            window.count -= 1
        window.entries[window.first + window.count] = Units(head_us, min(held, UNITS_MAX))
        window.count += 1
        window.total -= held - min(held, UNITS_MAX)
    elif view.terms.kind == c"b":
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
    if terms.kind == c"b":
        if RT_OVERFLOWS(now_us - view.at_us, terms.drain_ticks, &drained_ticks) or drained_ticks >= view.amount.level_ticks:
            view.amount.level_ticks = 0
        else:
            view.amount.level_ticks -= drained_ticks
        view.at_us = now_us
        return
    if now_us - view.at_us < terms.window_us:
        return
    start_us = window_start(terms, now_us)
    if terms.kind == c"c" and view.at_us == start_us - terms.window_us:
        view.amount.counts.prev = view.amount.counts.cur
    else:
        view.amount.counts.prev = 0
    view.amount.counts.cur = 0
    view.at_us = start_us


cdef inline int64_t counter_room(const Terms* rule, const View* view, int64_t now_us) noexcept nogil:
    """(limit − cur)·V − prev·(V − e): what is free, in units times V. Negative once over.

    A window that begins only after now, by a clock that has stepped back, counts as it will when it begins.
    """
    cdef int64_t past = max(<int64_t>0, now_us - view.at_us)
    cdef int64_t cur = min(<int64_t>view.amount.counts.cur, rule.capacity)
    cdef int64_t prev = min(<int64_t>view.amount.counts.prev, rule.capacity)
    if rule.coarse_us > 1:
        past //= rule.coarse_us
    return (rule.capacity - cur) * rule.span - prev * (rule.span - past)


cdef inline int64_t counter_retry(const Terms* rule, const View* view, int64_t now_us, int64_t cost) noexcept nogil:
    cdef int64_t span = rule.span
    cdef int64_t cur = min(<int64_t>view.amount.counts.cur, rule.capacity)
    cdef int64_t prev = min(<int64_t>view.amount.counts.prev, rule.capacity)
    cdef int64_t room = rule.capacity - cur - cost
    cdef int64_t steps
    if room >= 0:
        steps = span - (room * span) // prev
        return view.at_us + (steps * rule.coarse_us if steps < span else rule.window_us) - now_us
    steps = max(<int64_t>0, span - ((rule.capacity - cost) * span) // cur)
    return view.at_us + rule.window_us + min(steps * rule.coarse_us, rule.window_us) - now_us


cdef inline int64_t window_retry(const Terms* rule, const Window* window, uint32_t expired, int64_t total, int64_t now_us,
                          int64_t cost) noexcept nogil:
    cdef uint32_t i = window.first + expired
    cdef int64_t excess = total + cost - rule.capacity
    while True:
        excess -= window.entries[i].units
        if excess <= 0:
            return window.entries[i].at_us + rule.window_us - now_us
        i += 1


cdef inline void judge(const Terms* rule, const View* view, int64_t now_us, int64_t cost, uint32_t expired, int64_t total,
                       Outcome* out) noexcept nogil:
    """Decide on a rolled view; `expired` and `total` are of a sliding window."""
    cdef int64_t short_by
    if cost > rule.capacity:
        out.allowed = False
        out.retry_us = NEVER
        return
    if rule.kind == c"b":
        short_by = view.amount.level_ticks + cost * rule.unit_ticks - rule.capacity * rule.unit_ticks
        out.allowed = short_by <= 0
        out.retry_us = 0 if out.allowed else short_by
    elif rule.kind == c"s":
        out.allowed = total + cost <= rule.capacity
        out.retry_us = 0 if out.allowed else window_retry(rule, view.amount.window, expired, total, now_us, cost)
    elif rule.kind == c"f":
        out.allowed = view.amount.counts.cur + cost <= rule.capacity
        out.retry_us = 0 if out.allowed else view.at_us + rule.window_us - now_us
    else:
        out.allowed = cost * rule.span <= counter_room(rule, view, now_us)
        # The retry time of a counter depends on all of its numbers, so it doesn't wait.
        out.retry_us = 0 if out.allowed else counter_retry(rule, view, now_us, cost)


cdef inline int64_t view_fresh_at(const View* view) noexcept nogil:
    """When nothing of the view is left to tell it from a fresh one; at most `now` if that has come."""
    cdef const Window* window
    if view.terms.kind == c"b":
        return view.at_us + ceil_div(view.amount.level_ticks, view.terms.drain_ticks)
    if view.terms.kind == c"s":
        window = view.amount.window
        return window.entries[window.first + window.count - 1].at_us + view.terms.window_us if window.count else 0
    if view.terms.kind == c"f":
        return view.at_us + view.terms.window_us if view.amount.counts.cur else 0
    if view.amount.counts.cur:
        return view.at_us + 2 * view.terms.window_us
    return view.at_us + view.terms.window_us if view.amount.counts.prev else 0


cdef inline void report(const Terms* rule, const View* view, int64_t now_us, int64_t total, Outcome* out) noexcept nogil:
    """Fill in what is left and when all of it is back, as the view stands now; `settle` finishes it."""
    out.in_ticks = rule.kind == c"b" or rule.kind == c"c"
    if rule.kind == c"b":
        out.remaining = rule.capacity * rule.unit_ticks - view.amount.level_ticks
        out.reset_us = view.amount.level_ticks
        return
    if rule.kind == c"s":
        out.remaining = max(<int64_t>0, rule.capacity - total)
    elif rule.kind == c"f":
        out.remaining = max(<int64_t>0, rule.capacity - view.amount.counts.cur)
    else:
        out.remaining = counter_room(rule, view, now_us)
    out.reset_us = max(<int64_t>0, view_fresh_at(view) - now_us)


cdef inline void settle(const Terms* rule, Outcome* out) noexcept nogil:
    """Do the divisions that `judge` and `report` left: a division costs as much as all the rest of a decision."""
    out.in_ticks = False
    if rule.kind == c"b":
        out.remaining = out.remaining // rule.unit_ticks if out.remaining > 0 else 0
        out.reset_us = ceil_div(out.reset_us, rule.drain_ticks)
        if out.retry_us > 0:
            out.retry_us = ceil_div(out.retry_us, rule.drain_ticks)
    else:
        out.remaining = out.remaining // rule.span if out.remaining > 0 else 0


cdef inline void view_count(View* view, int64_t cost) noexcept nogil:
    """Count units in a rolled view that is not a sliding window."""
    if view.terms.kind == c"b":
        view.amount.level_ticks += cost * view.terms.unit_ticks
    else:
        view.amount.counts.cur = <uint32_t>min(view.amount.counts.cur + cost, UNITS_MAX)


cdef inline int view_charge(View* view, int64_t now_us, int64_t cost) noexcept nogil:
    """Count units in a rolled view: of its own definition, or admitted by another one. Returns NO_MEMORY or KEEP."""
    cdef const Window* window
    cdef int64_t at_us
    if view.terms.kind == c"s":
        window = view.amount.window
        at_us = window.entries[window.first + window.count - 1].at_us if window.count else 0
        if at_us <= now_us:
            at_us = slot_end(view.terms, now_us)  # else this is still the slot of the newest entry, or before it
        return window_push(&view.amount.window, view.terms.slot_us == 1, at_us, cost)
    view_count(view, cost)
    return KEEP


cdef inline int view_charge_other(View* view, int64_t now_us, int64_t cost) noexcept nogil:
    cdef int64_t most
    if view.terms.kind != c"b":
        return view_charge(view, now_us, cost)
    # A definition never owes more than its capacity for what another one admitted: no ratchet into a lockout.
    most = max(view.amount.level_ticks, view.terms.capacity * view.terms.unit_ticks)
    view.amount.level_ticks = min(most, view.amount.level_ticks + min(cost, view.terms.capacity) * view.terms.unit_ticks)
    return KEEP


cdef inline int64_t view_used(const View* view, int64_t now_us) noexcept nogil:
    """Units that a view which is not ahead holds now."""
    cdef View rolled = view[0]
    cdef uint32_t expired
    cdef int64_t total
    if view.terms.kind == c"s":
        window_live(view.amount.window, now_us - view.terms.window_us, &expired, &total)
        return total
    view_roll(&rolled, now_us)
    if view.terms.kind == c"b":
        return ceil_div(rolled.amount.level_ticks, view.terms.unit_ticks)
    if view.terms.kind == c"f":
        return rolled.amount.counts.cur
    return <int64_t>rolled.amount.counts.cur + rolled.amount.counts.prev


cdef inline const View* view_fullest(const View* views, int count, int64_t now_us) noexcept nogil:
    """The view that holds most now, the first of equal ones, or NULL: what a new definition takes over.

    The last writer's may have let go, or never have known, what the other one counts.
    """
    if count == 2 and view_used(&views[1], now_us) > view_used(views, now_us):
        return &views[1]
    return views if count else NULL


cdef inline int view_derive(View* own, const Terms* rule, const View* source, int64_t now_us) noexcept nogil:
    """Make the view of a definition that this state meets for the first time. Returns NO_MEMORY or KEEP."""
    cdef int64_t used = view_used(source, now_us) if source != NULL else 0
    cdef int64_t head_us, at_us
    cdef const Window* entries
    cdef uint32_t i
    own.terms = rule
    if rule.kind == c"b":
        own.at_us = now_us
        own.amount.level_ticks = min(used, rule.capacity) * rule.unit_ticks
        return KEEP
    if rule.kind != c"s":
        own.at_us = window_start(rule, now_us)
        own.amount.counts = Counts(<uint32_t>min(used, UNITS_MAX), 0)
        return KEEP
    own.at_us = 0
    own.amount.window = window_new(2)
    if own.amount.window == NULL:
        return NO_MEMORY
    if source == NULL or source.terms.kind != c"s":
        return window_push(&own.amount.window, rule.slot_us == 1, slot_end(rule, now_us), used) if used else KEEP
    head_us = reach_end(rule, now_us)
    entries = source.amount.window
    for i in range(entries.first, entries.first + entries.count):
        at_us = entries.entries[i].at_us
        if at_us + source.terms.window_us <= now_us:
            continue
        at_us = min(ceil_div(at_us, rule.slot_us) * rule.slot_us, head_us)
        if at_us + rule.window_us > now_us:
            if window_push(&own.amount.window, rule.slot_us == 1, at_us, entries.entries[i].units) == NO_MEMORY:
                return NO_MEMORY
    return KEEP


cdef inline int64_t view_reach(const Terms* terms) noexcept nogil:
    """For how long at most something that a view of these terms holds may count."""
    if terms.kind == c"b":
        return ceil_div(terms.capacity * terms.unit_ticks, terms.drain_ticks)
    return terms.window_us + terms.reach_us if terms.kind == c"s" else 2 * terms.window_us


cdef inline void view_free(View* view) noexcept nogil:
    if view.terms.kind == c"s":
        piece_free(view.amount.window)


cdef inline void view_audit(const View* view, int64_t now_us) noexcept nogil:
    """Abort on a view that can't be (debug builds only)."""
    cdef const Window* window
    cdef int64_t total = 0, before_us = 0
    cdef uint32_t i
    if not RT_DEBUG:
        return
    if view.terms.kind == c"b":
        RT_INVARIANT(0 <= view.amount.level_ticks < (<int64_t>1 << 53))
        RT_INVARIANT(view.at_us <= now_us)
    elif view.terms.kind == c"s":
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
        RT_INVARIANT(view.at_us == window_start(view.terms, view.at_us))
        RT_INVARIANT(view.at_us - now_us <= view.terms.window_us)
        RT_INVARIANT(view.amount.counts.cur <= UNITS_MAX and view.amount.counts.prev <= UNITS_MAX)


cdef inline int decide_views(View* views, int* count, const Terms* rule, int64_t now_us, int64_t cost,
                      Outcome* out) noexcept nogil:
    """Decide on a state of at most two views, the last writer's first. `views` and `count` become the state to keep.

    WRITE: they replace the stored ones (count 0: nothing but fresh views, delete the key). KEEP: the stored state stands.
    """
    cdef View own, other
    cdef bint rebased = False, derived = False, has_other = False
    cdef int i, other_index, own_index = -1
    cdef uint32_t expired = 0
    cdef int64_t total = 0
    for i in range(count[0]):
        if view_ahead(&views[i], now_us) and view_rebase(&views[i], now_us):
            rebased = True
        if own_index < 0 and same_definition(views[i].terms, rule):
            own_index = i
    # Kept even when it is fresh: that it is, is known only as long as there is an account of it. Derived anew from the own
    # view, it would lock out a shorter window and refill one that began earlier.
    other_index = 1 if own_index == 0 else 0
    if other_index < count[0]:
        other = views[other_index]
        has_other = True
    if own_index >= 0:
        own = views[own_index]
    else:
        if view_derive(&own, rule, view_fullest(views, count[0], now_us), now_us) == NO_MEMORY:
            return NO_MEMORY
        derived = view_fresh_at(&own) > now_us
    if rule.kind == c"s":
        window_live(own.amount.window, now_us - rule.window_us, &expired, &total)
    else:
        view_roll(&own, now_us)
    judge(rule, &own, now_us, cost, expired, total, out)
    if not (out.allowed or rebased or derived):
        report(rule, &own, now_us, total, out)
        if own_index < 0:
            view_free(&own)
        return KEEP

    if rule.kind == c"s":
        window_drop(own.amount.window, expired, total)
    if out.allowed:
        own.terms = rule
        if view_charge(&own, now_us, cost) == NO_MEMORY:
            return NO_MEMORY
    report(rule, &own, now_us, own.amount.window.total if rule.kind == c"s" else 0, out)
    if has_other:
        if other.terms.kind == c"s":
            window_live(other.amount.window, now_us - other.terms.window_us, &expired, &total)
            window_drop(other.amount.window, expired, total)
        else:
            view_roll(&other, now_us)
        if out.allowed:
            view_charge_other(&other, now_us, cost)  # without memory for one more entry, the other definition goes uncharged
    for i in range(count[0]):
        # Any view that isn't kept gives back its window; a kept one was moved, not copied.
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


# What the script answers to an entry of n equal checks; see «Answers» in docs/arithmetic.md.

cdef inline int answer_length(const Terms* rule, int64_t granted, int64_t count) noexcept nogil:
    """How many numbers, without the units taken ahead."""
    if granted < 0:                        # it wasn't decided, and that is all
        return 1
    if rule.kind == c"b":
        return 2
    if rule.kind == c"s":
        return 5 if granted < count else 4  # the fifth: when what was refused may come again
    return 4 if rule.kind == c"c" else 3


cdef inline void take_answer(const Terms* rule, const int64_t* numbers, int64_t ahead, int64_t cost, int64_t position,
                             Outcome* out) noexcept nogil:
    """What it says to the check at `position` of those n: just what it would have heard had they come one by one."""
    cdef View view
    cdef int64_t now_us = 0, total = 0
    cdef bint allowed = position < numbers[0]
    # What was granted after this check wasn't there yet.
    cdef int64_t later = (numbers[0] - 1 - position) * cost + ahead if allowed else 0
    view.terms = rule
    view.at_us = 0
    if rule.kind == c"s":
        total = numbers[1] - later
        out.allowed = allowed
        out.in_ticks = False
        out.remaining = max(<int64_t>0, rule.capacity - total)
        out.reset_us = numbers[3]
        out.retry_us = 0 if allowed else numbers[4]
    else:
        if rule.kind == c"b":
            view.amount.level_ticks = numbers[1] - later * rule.unit_ticks
        elif rule.kind == c"f":
            view.amount.counts = Counts(<uint32_t>(numbers[1] - later), 0)
            now_us = numbers[2]
        else:
            view.amount.counts = Counts(<uint32_t>(numbers[1] - later), <uint32_t>numbers[2])
            now_us = numbers[3]
        if rule.kind != c"b":                # a window that stands ahead of the clock begins at most one window after now
            view.at_us = rule.window_us
            now_us += rule.window_us
        if not allowed:
            judge(rule, &view, now_us, cost, 0, 0, out)
        out.allowed = allowed
        if allowed:
            out.retry_us = 0
        report(rule, &view, now_us, 0, out)
    if cost > rule.capacity:
        out.retry_us = NEVER
