"""The compiled core: arithmetic, key table, decisions, and the limiter's `check`.

`docs/arithmetic.md` specifies every number that is computed here. Nothing in this module does I/O, and the arithmetic
reads no clock: `now_us` always comes from the caller.
"""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from cpython.object cimport PyObject, PyTypeObject
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy, memmove, memset
from posix.time cimport CLOCK_MONOTONIC, CLOCK_REALTIME, clock_gettime, timespec

from asyncio import _get_running_loop as running_loop
from os import urandom

from ratethrottle.errors import CostExceedsLimit, InvalidRequest, LimiterClosed


cdef extern from "Python.h":
    const char* PyUnicode_AsUTF8AndSize(object text, Py_ssize_t* size) noexcept
    void PyErr_Clear()
    bint PyUnicode_Check(object)
    bint PyBool_Check(object)
    object PyNumber_Index(object)
    long long PyLong_AsLongLongAndOverflow(object, int* overflow) except? -1
    ctypedef enum PySendResult:
        PYGEN_RETURN
        PYGEN_ERROR
        PYGEN_NEXT
    PySendResult PyIter_Send(PyObject* iterator, PyObject* value, PyObject** result) noexcept
    void Py_INCREF(object)
    void Py_DECREF(PyObject*)
    void Py_XDECREF(PyObject*)

cdef extern from *:
    """
    /* A result reaches `await` as the value of a StopIteration. Since 3.12 the interpreter no longer uses am_send for that, so
       one exception object is kept and used again whenever nobody else holds it; making one costs more than the decision. */
    #if PY_VERSION_HEX >= 0x030C0000
    static PyObject *rt_kept_stop = NULL;
    #endif

    static void rt_set_stop(PyObject *value) {
    #if PY_VERSION_HEX >= 0x030C0000
        PyStopIterationObject *stop = (PyStopIterationObject *)rt_kept_stop;
        if (stop != NULL && Py_REFCNT(stop) == 1 && stop->traceback == NULL && stop->context == NULL
                && stop->cause == NULL && stop->notes == NULL) {
            PyObject *before = stop->value;
            stop->value = Py_NewRef(value);
            Py_XDECREF(before);
            PyErr_SetRaisedException(Py_NewRef((PyObject *)stop));
            return;
        }
        PyObject *fresh = PyObject_CallOneArg(PyExc_StopIteration, value);
        if (fresh == NULL) return;
        Py_XSETREF(rt_kept_stop, Py_NewRef(fresh));
        PyErr_SetRaisedException(fresh);
    #else
        PyObject *stop = PyObject_CallOneArg(PyExc_StopIteration, value);
        if (stop == NULL) return;
        PyErr_SetObject(PyExc_StopIteration, stop);
        Py_DECREF(stop);
    #endif
    }

    static void rt_set_used(void) {
        PyErr_SetString(PyExc_RuntimeError, "this check was awaited already; each `check(...)` gives one decision");
    }

    /* The kept exception holds on to the last value until it carries the next one. */
    static inline void rt_drop_stop_value(void) {
    #if PY_VERSION_HEX >= 0x030C0000
        PyStopIterationObject *stop = (PyStopIterationObject *)rt_kept_stop;
        if (stop != NULL && stop->value != NULL && Py_REFCNT(stop) == 1) Py_CLEAR(stop->value);
    #endif
    }

    /* Cython fills neither am_send nor a tp_iternext that may return NULL without a traceback entry. */
    static void rt_set_slots(PyTypeObject *type, sendfunc send, iternextfunc next) {
        type->tp_as_async->am_send = send;
        type->tp_iternext = next;
    }

    #ifdef RATETHROTTLE_DEBUG
    #define RT_DEBUG 1
    #else
    #define RT_DEBUG 0
    #endif
    #define RT_UNITS_MAX 4000000000LL  /* saturates stored counts; beyond any limit, so that no decision changes */
    #define RT_OVERFLOWS(a, b, product) __builtin_mul_overflow((int64_t)(a), (int64_t)(b), product)
    #define RT_PREFETCH(address) __builtin_prefetch(address)
    """
    void rt_set_stop(PyObject* value) noexcept
    void rt_drop_stop_value() noexcept
    void rt_set_used() noexcept
    Py_ssize_t Py_REFCNT(PyObject*)
    void rt_set_slots(PyTypeObject* type, PySendResult (*send)(PyObject*, PyObject*, PyObject**) noexcept,
                      PyObject* (*next)(PyObject*) noexcept)
    bint RT_DEBUG
    bint RT_OVERFLOWS(int64_t a, int64_t b, int64_t* product) noexcept nogil
    const int64_t UNITS_MAX "RT_UNITS_MAX"
    void RT_PREFETCH(const void* address) noexcept nogil


# ---------------------------------------------------------------------------------------------------------------- terms

cdef enum:
    EXACT_UNITS = 64                       # a window with 1 µs slots never depends on more than its newest 64 units
    ENTRIES_MAX = 66                       # 64 slots and the one under way, and one more before the oldest leaves
    NEVER = -1

cdef struct Terms:                         # what a rule compiles to; see docs/arithmetic.md
    char kind                              # b, s, c or f
    int64_t capacity                       # units
    int64_t window_us
    int64_t unit_ticks
    int64_t drain_ticks                    # per µs
    int64_t slot_us
    int64_t coarse_us
    int64_t span                           # of a counter: the window in coarse time, ceil_div(window_us, coarse_us)


@cython.final
cdef class CompiledRule:
    """A rule as the arithmetic uses it: exact integers only. Made by `RateThrottleRule`, compared by value."""

    cdef readonly str name
    cdef readonly str strategy
    cdef readonly int64_t limit
    cdef Terms terms
    # Where the table that saw this rule last keeps its terms: spares the hot path a look-up.
    cdef uint64_t home
    cdef Terms* home_terms
    cdef uint64_t home_seed

    def __init__(self, str name not None, str strategy not None, str kind not None, int64_t limit, int64_t capacity,
                 int64_t window_us, int64_t unit_ticks, int64_t drain_ticks, int64_t slot_us, int64_t coarse_us):
        if kind not in ("b", "s", "c", "f"):
            raise ValueError(f"kind is one of b, s, c and f, not {kind!r}")
        if capacity < 1 or window_us < 1 or limit < 1 or (kind == "b" and (unit_ticks < 1 or drain_ticks < 1)):
            raise ValueError("capacity, window and limit are positive, and so are the ticks of a bucket")
        if (kind == "s" and slot_us < 1) or (kind == "c" and coarse_us < 1):
            raise ValueError("a sliding window has a slot, a sliding counter a coarse time, of at least 1 µs")
        self.name = name
        self.strategy = strategy
        self.limit = limit
        self.terms = Terms(<char>ord(kind), capacity, window_us, unit_ticks, drain_ticks, slot_us, coarse_us,
                           ceil_div(window_us, coarse_us) if coarse_us else 0)

    @property
    def kind(self): return chr(self.terms.kind)

    @property
    def capacity(self): return self.terms.capacity

    @property
    def window_us(self): return self.terms.window_us

    @property
    def unit_ticks(self): return self.terms.unit_ticks

    @property
    def drain_ticks(self): return self.terms.drain_ticks

    @property
    def slot_us(self): return self.terms.slot_us

    @property
    def coarse_us(self): return self.terms.coarse_us

    cdef tuple shape(self):
        return (self.kind, self.terms.capacity, self.terms.window_us, self.terms.unit_ticks, self.terms.drain_ticks,
                self.terms.slot_us, self.terms.coarse_us)

    cdef tuple facts(self):
        return (self.name, self.strategy, self.kind, self.limit, *self.shape()[1:])

    def __eq__(self, other):
        if not isinstance(other, CompiledRule):
            return NotImplemented
        return self.facts() == (<CompiledRule>other).facts()

    def __hash__(self):
        return hash(self.facts())

    def __reduce__(self):
        return CompiledRule, self.facts()

    def __repr__(self):
        return f"CompiledRule{self.facts()!r}"


cdef inline bint same_definition(const Terms* a, const Terms* b) noexcept nogil:
    """Whether both read the same view: see «State» in docs/arithmetic.md."""
    if a.kind != b.kind:
        return False
    if a.kind == c"b":
        return a.unit_ticks == b.unit_ticks and a.drain_ticks == b.drain_ticks
    return a.window_us == b.window_us and a.slot_us == b.slot_us


# ----------------------------------------------------------------------------------------------------------- arithmetic

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


cdef Window* window_new(uint32_t room) noexcept nogil:
    cdef Window* window = <Window*>malloc(sizeof(Window) + (room - 1) * sizeof(Units))
    if window != NULL:
        window.total = 0
        window.first = 0
        window.count = 0
        window.room = room
    return window


cdef Window* window_clone(const Window* window) noexcept nogil:
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


cdef int window_push(Window** owner, bint exact, int64_t at_us, int64_t units) noexcept nogil:
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
                free(window)
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
    """Whether the state is from further ahead than is legal: the clock has stepped backwards."""
    cdef const Window* window
    if view.terms.kind == c"s":
        window = view.amount.window
        # at > slot_end(now), without its division: with slots, `at` is a multiple of them.
        return window.count > 0 and (window.entries[window.first + window.count - 1].at_us
                                     - (view.terms.slot_us if view.terms.slot_us > 1 else 0) > now_us)
    # Likewise the start of a window, a multiple of it, lies behind now's exactly if it lies behind now.
    return view.at_us > now_us


cdef void view_rebase(View* view, int64_t now_us) noexcept nogil:
    """Bring a state from ahead to now, with all that it holds."""
    cdef Window* window
    cdef int64_t head_us, held = 0
    if view.terms.kind == c"s":
        window = view.amount.window
        head_us = slot_end(view.terms, now_us)
        while window.count and window.entries[window.first + window.count - 1].at_us >= head_us:
            held += window.entries[window.first + window.count - 1].units
            window.count -= 1
        window.entries[window.first + window.count] = Units(head_us, min(held, UNITS_MAX))
        window.count += 1
        window.total -= held - min(held, UNITS_MAX)
    elif view.terms.kind == c"b":
        view.at_us = now_us
    else:
        view.at_us = now_us - now_us % view.terms.window_us


cdef inline void view_roll(View* view, int64_t now_us) noexcept nogil:
    """Bring a view that is not ahead, and not a sliding window, to now."""
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
    start_us = now_us - now_us % terms.window_us
    if terms.kind == c"c" and view.at_us == start_us - terms.window_us:
        view.amount.counts.prev = view.amount.counts.cur
    else:
        view.amount.counts.prev = 0
    view.amount.counts.cur = 0
    view.at_us = start_us


cdef inline int64_t counter_room(const Terms* rule, const View* view, int64_t now_us) noexcept nogil:
    """(limit − cur)·V − prev·(V − e): what is free, in units times V. Negative once over."""
    cdef int64_t past = now_us - view.at_us
    cdef int64_t cur = min(<int64_t>view.amount.counts.cur, rule.capacity)
    cdef int64_t prev = min(<int64_t>view.amount.counts.prev, rule.capacity)
    if rule.coarse_us > 1:
        past //= rule.coarse_us
    return (rule.capacity - cur) * rule.span - prev * (rule.span - past)


cdef int64_t counter_retry(const Terms* rule, const View* view, int64_t now_us, int64_t cost) noexcept nogil:
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


cdef int64_t window_retry(const Terms* rule, const Window* window, uint32_t expired, int64_t total, int64_t now_us,
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


cdef void settle(const Terms* rule, Outcome* out) noexcept nogil:
    """Do the divisions that `judge` and `report` left: a division costs as much as all the rest of a decision."""
    out.in_ticks = False
    if rule.kind == c"b":
        out.remaining = out.remaining // rule.unit_ticks if out.remaining > 0 else 0
        out.reset_us = ceil_div(out.reset_us, rule.drain_ticks)
        if out.retry_us > 0:
            out.retry_us = ceil_div(out.retry_us, rule.drain_ticks)
    else:
        out.remaining = out.remaining // rule.span if out.remaining > 0 else 0


cdef inline int view_charge(View* view, int64_t now_us, int64_t cost) noexcept nogil:
    """Count units in a rolled view: of its own definition, or admitted by another one. Returns NO_MEMORY or KEEP."""
    cdef const Window* window
    cdef int64_t at_us
    if view.terms.kind == c"s":
        window = view.amount.window
        at_us = window.entries[window.first + window.count - 1].at_us if window.count else 0
        if at_us <= now_us:
            at_us = slot_end(view.terms, now_us)  # else this is still the slot of the newest entry
        return window_push(&view.amount.window, view.terms.slot_us == 1, at_us, cost)
    if view.terms.kind == c"b":
        view.amount.level_ticks += cost * view.terms.unit_ticks
    else:
        view.amount.counts.cur = <uint32_t>min(view.amount.counts.cur + cost, UNITS_MAX)
    return KEEP


cdef int view_charge_other(View* view, int64_t now_us, int64_t cost) noexcept nogil:
    cdef int64_t most
    if view.terms.kind != c"b":
        return view_charge(view, now_us, cost)
    # A definition never owes more than its capacity for what another one admitted: no ratchet into a lockout.
    most = max(view.amount.level_ticks, view.terms.capacity * view.terms.unit_ticks)
    view.amount.level_ticks = min(most, view.amount.level_ticks + min(cost, view.terms.capacity) * view.terms.unit_ticks)
    return KEEP


cdef int64_t view_used(const View* view, int64_t now_us) noexcept nogil:
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


cdef int view_derive(View* own, const Terms* rule, const View* source, int64_t now_us) noexcept nogil:
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
        own.at_us = now_us - now_us % rule.window_us
        own.amount.counts = Counts(<uint32_t>min(used, UNITS_MAX), 0)
        return KEEP
    own.at_us = 0
    own.amount.window = window_new(2)
    if own.amount.window == NULL:
        return NO_MEMORY
    head_us = slot_end(rule, now_us)
    if source == NULL or source.terms.kind != c"s":
        return window_push(&own.amount.window, rule.slot_us == 1, head_us, used) if used else KEEP
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


cdef inline void view_free(View* view) noexcept nogil:
    if view.terms.kind == c"s":
        free(view.amount.window)


cdef int decide_views(View* views, int* count, const Terms* rule, int64_t now_us, int64_t cost,
                      Outcome* out) noexcept nogil:
    """Decide on a state of at most two views, the last writer's first. `views` and `count` become the state to keep.

    WRITE: they replace the stored ones (count 0: nothing but fresh views, delete the key). KEEP: the stored state stands.
    """
    cdef View own, other
    cdef bint rebased = False, derived = False, has_other = False
    cdef int i, own_index = -1, status
    cdef uint32_t expired = 0
    cdef int64_t total = 0
    for i in range(count[0]):
        if view_ahead(&views[i], now_us):
            view_rebase(&views[i], now_us)
            rebased = True
        if own_index < 0 and same_definition(views[i].terms, rule):
            own_index = i
    for i in range(count[0]):
        if not has_other and i != own_index and view_fresh_at(&views[i]) > now_us:
            other = views[i]
            has_other = True
    if own_index >= 0:
        own = views[own_index]
    else:
        if view_derive(&own, rule, &views[0] if count[0] else NULL, now_us) == NO_MEMORY:
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
        if i != own_index and not (has_other and same_definition(views[i].terms, other.terms)):
            view_free(&views[i])
    if not has_other and view_fresh_at(&own) <= now_us:
        view_free(&own)
        count[0] = 0
        return WRITE
    views[0] = own
    views[1] = other
    count[0] = 2 if has_other else 1
    return WRITE


# ------------------------------------------------------------------------------------------------------------ key table

cdef enum:
    SHARD_KEYS = 2048                      # keys of a full shard: rebuilding one takes well under a millisecond
    SHARD_ROOM_MIN = 8
    EVICTION_SAMPLE = 8

cdef struct Pair:                          # two definitions of one rule in use, so that each has its own account
    View own
    View other

cdef struct Slot:
    uint64_t hash_lo
    uint64_t hash_hi
    View view                              # terms == NULL: amount.pair holds two views

cdef struct Shard:
    uint32_t room
    uint32_t used
    Slot* slots
    uint8_t* tags                          # a byte of the hash for each slot, 0 when empty: a probe reads these first

cdef struct Hash128:
    uint64_t lo
    uint64_t hi


cdef inline uint64_t rotl(uint64_t x, int by) noexcept nogil:
    return (x << by) | (x >> (64 - by))


cdef inline void sip_round(uint64_t* v) noexcept nogil:
    v[0] += v[1]; v[2] += v[3]
    v[1] = rotl(v[1], 13) ^ v[0]; v[3] = rotl(v[3], 16) ^ v[2]
    v[0] = rotl(v[0], 32)
    v[2] += v[1]; v[0] += v[3]
    v[1] = rotl(v[1], 17) ^ v[2]; v[3] = rotl(v[3], 21) ^ v[0]
    v[2] = rotl(v[2], 32)


cdef inline Hash128 siphash(uint64_t k0, uint64_t k1, const char* data, Py_ssize_t length) noexcept nogil:
    """SipHash-1-3 with a 128-bit result (Aumasson and Bernstein, «SipHash: a fast short-input PRF», 2012).

    Keyed per process, so that nobody outside can choose keys that collide or share a shard.
    """
    cdef uint64_t[4] v
    cdef uint64_t word
    cdef Hash128 result
    cdef Py_ssize_t left = length
    v[0] = k0 ^ 0x736f6d6570736575ULL
    v[1] = k1 ^ 0x646f72616e646f6dULL ^ 0xee
    v[2] = k0 ^ 0x6c7967656e657261ULL
    v[3] = k1 ^ 0x7465646279746573ULL
    while left >= 8:
        memcpy(&word, data, 8)
        v[3] ^= word
        sip_round(v)
        v[0] ^= word
        data += 8
        left -= 8
    word = 0
    memcpy(&word, data, left)
    word |= (<uint64_t>length & 0xff) << 56
    v[3] ^= word
    sip_round(v)
    v[0] ^= word
    v[2] ^= 0xee
    sip_round(v); sip_round(v); sip_round(v)
    result.lo = v[0] ^ v[1] ^ v[2] ^ v[3]
    v[1] ^= 0xdd
    sip_round(v); sip_round(v); sip_round(v)
    result.hi = v[0] ^ v[1] ^ v[2] ^ v[3]
    return result


cdef inline uint8_t tag_of(uint64_t hash_lo) noexcept nogil:
    cdef uint8_t tag = <uint8_t>hash_lo
    return tag if tag else 1


cdef inline uint32_t home_of(uint64_t hash_lo, uint32_t room) noexcept nogil:
    return <uint32_t>(((hash_lo >> 32) * room) >> 32)


cdef inline int slot_views(const Slot* slot, View* views) noexcept nogil:
    if slot.view.terms != NULL:
        views[0] = slot.view
        return 1
    views[0] = (<Pair*>slot.view.amount.pair).own
    views[1] = (<Pair*>slot.view.amount.pair).other
    return 2


cdef int64_t slot_fresh_at(const Slot* slot) noexcept nogil:
    cdef View[2] views
    if slot_views(slot, views) == 1:
        return view_fresh_at(views)
    return max(view_fresh_at(views), view_fresh_at(&views[1]))


cdef void slot_free(Slot* slot) noexcept nogil:
    """Give back what hangs from a slot; the slot itself stays as it is."""
    cdef View[2] views
    cdef int i, count = slot_views(slot, views)
    for i in range(count):
        view_free(&views[i])
    if slot.view.terms == NULL:
        free(slot.view.amount.pair)


cdef int64_t shard_find(const Shard* shard, Hash128 hashed) noexcept nogil:
    """The index of the key's slot; −1 − (index of the empty one it would take) when it is absent."""
    cdef uint32_t i
    cdef uint8_t tag
    if shard.room == 0:
        return -1
    i = home_of(hashed.lo, shard.room)
    tag = tag_of(hashed.lo)
    RT_PREFETCH(&shard.slots[i])
    while shard.tags[i]:
        if shard.tags[i] == tag and shard.slots[i].hash_lo == hashed.lo and shard.slots[i].hash_hi == hashed.hi:
            return i
        i += 1
        if i == shard.room:
            i = 0
    return -1 - <int64_t>i


cdef void shard_place(Shard* shard, const Slot* slot) noexcept nogil:
    """Put a key that is absent into a shard with room."""
    cdef uint32_t i = home_of(slot.hash_lo, shard.room)
    while shard.tags[i]:
        i += 1
        if i == shard.room:
            i = 0
    shard.tags[i] = tag_of(slot.hash_lo)
    shard.slots[i] = slot[0]
    shard.used += 1


cdef void shard_remove(Shard* shard, uint32_t hole) noexcept nogil:
    """Take a slot out and close the gap, so that no probe needs tombstones."""
    cdef uint32_t i = hole, home
    slot_free(&shard.slots[hole])
    while True:
        i += 1
        if i == shard.room:
            i = 0
        if not shard.tags[i]:
            break
        home = home_of(shard.slots[i].hash_lo, shard.room)
        # A slot may move back into the hole unless its home lies behind the hole, up to where it stands (cyclically).
        if (hole < home <= i) if hole < i else (home > hole or home <= i):
            continue
        shard.slots[hole] = shard.slots[i]
        shard.tags[hole] = shard.tags[i]
        hole = i
    shard.tags[hole] = 0
    shard.used -= 1


cdef int shard_rebuild(Shard* shard, int64_t now_us) noexcept nogil:
    """Leave out the keys that are fresh again and make room for a third more than the rest. Returns NO_MEMORY or KEEP."""
    cdef Shard rebuilt
    cdef uint32_t i, kept = 0
    for i in range(shard.room):
        if shard.tags[i] and slot_fresh_at(&shard.slots[i]) > now_us:
            kept += 1
    rebuilt.used = 0
    rebuilt.room = max(<uint32_t>SHARD_ROOM_MIN, kept + kept // 3)
    rebuilt.slots = <Slot*>malloc(rebuilt.room * (sizeof(Slot) + 1))
    if rebuilt.slots == NULL:
        return NO_MEMORY
    rebuilt.tags = <uint8_t*>&rebuilt.slots[rebuilt.room]
    memset(rebuilt.tags, 0, rebuilt.room)
    for i in range(shard.room):
        if not shard.tags[i]:
            continue
        if slot_fresh_at(&shard.slots[i]) > now_us:
            shard_place(&rebuilt, &shard.slots[i])
        else:
            slot_free(&shard.slots[i])
    free(shard.slots)
    shard[0] = rebuilt
    return KEEP


cdef inline bint shard_full(const Shard* shard) noexcept nogil:
    return shard.used >= shard.room - shard.room // 8


@cython.final
cdef class KeyTable:
    """The state of at most `max_keys` keys: open addressing over C structs, in shards that are rebuilt one at a time.

    When it is full, a new key takes the place of the one closest to fresh among eight sampled (`evict`), or is denied. Every
    client can fill it, so it is keyed by a hash nobody outside can predict, and a key far from fresh outlives a flood of
    keys closer to it.
    """

    cdef Shard* shards
    cdef uint32_t shard_count
    cdef readonly int64_t max_keys
    cdef readonly bint evict
    cdef readonly int64_t evictions          # that forgot something
    cdef int64_t used
    cdef uint64_t[3] secret                  # two words key the hash, the third names this table to the rules it has met
    cdef uint64_t random
    cdef int64_t clock_offset_us
    cdef object clock
    cdef dict known                          # shape of a rule -> address of its terms; freed with the table

    def __cinit__(self, max_keys=1_000_000, bint evict=True, clock_us=None):
        cdef timespec wall, monotonic
        cdef bytes noise = urandom(32)
        self.max_keys = max_keys
        self.evict = evict
        self.clock = clock_us
        self.known = {}
        memcpy(self.secret, PyBytes_AS_STRING(noise), 24)
        memcpy(&self.random, PyBytes_AS_STRING(noise) + 24, 8)
        self.random |= 1
        self.shard_count = <uint32_t>max(1, ceil_div(self.max_keys, SHARD_KEYS))
        self.shards = <Shard*>calloc(self.shard_count, sizeof(Shard))
        if self.shards == NULL:
            raise MemoryError
        # Monotonic, but counted from the epoch, so that fixed windows start where a wall clock would have them.
        clock_gettime(CLOCK_REALTIME, &wall)
        clock_gettime(CLOCK_MONOTONIC, &monotonic)
        self.clock_offset_us = (wall.tv_sec - monotonic.tv_sec) * 1_000_000 + (wall.tv_nsec - monotonic.tv_nsec) // 1000

    def __dealloc__(self):
        cdef uint32_t i, j
        if self.shards != NULL:
            for i in range(self.shard_count):
                for j in range(self.shards[i].room):
                    if self.shards[i].tags[j]:
                        slot_free(&self.shards[i].slots[j])
                free(self.shards[i].slots)
            free(self.shards)
        if self.known is not None:
            for address in self.known.values():
                free(<void*><size_t>address)

    def __len__(self):
        return self.used

    def __sizeof__(self):
        return self.size_bytes

    @property
    def size_bytes(self):
        """Bytes held for all keys, windows and second views included."""
        cdef int64_t size = self.shard_count * sizeof(Shard)
        cdef View[2] views
        cdef uint32_t i, j
        cdef int k
        for i in range(self.shard_count):
            size += self.shards[i].room * (sizeof(Slot) + 1)
            for j in range(self.shards[i].room):
                if not self.shards[i].tags[j]:
                    continue
                if self.shards[i].slots[j].view.terms == NULL:
                    size += sizeof(Pair)
                for k in range(slot_views(&self.shards[i].slots[j], views)):
                    if views[k].terms.kind == c"s":
                        size += sizeof(Window) + (views[k].amount.window.room - 1) * sizeof(Units)
        return size

    def clock_us(self):
        """The table's time, integer µs: monotonic, counted from the Unix epoch by the wall clock at its creation."""
        return self.now_us()

    cdef inline int64_t now_us(self) except -1:
        cdef timespec monotonic
        if self.clock is not None:
            return self.clock()
        clock_gettime(CLOCK_MONOTONIC, &monotonic)
        return monotonic.tv_sec * 1_000_000 + monotonic.tv_nsec // 1000 + self.clock_offset_us

    cdef int meet(self, CompiledRule rule) except -1:
        """Find or keep the rule's terms, which outlive it in the states that were written under it."""
        cdef tuple shape = rule.shape()
        cdef Terms* terms
        cdef bytes name = rule.name.encode()
        if shape not in self.known:
            terms = <Terms*>malloc(sizeof(Terms))
            if terms == NULL:
                raise MemoryError
            terms[0] = rule.terms
            self.known[shape] = <size_t>terms
        rule.home_terms = <Terms*><size_t>self.known[shape]
        rule.home_seed = siphash(self.secret[0], self.secret[1], PyBytes_AS_STRING(name), PyBytes_GET_SIZE(name)).lo
        rule.home = self.secret[2]
        return 0

    cdef inline int decide_key(self, CompiledRule rule, bint joined, const char* data, Py_ssize_t length, int64_t cost,
                               Outcome* out) except -1:
        """Decide on the key with this UTF-8, or on a tuple's joined form, and consume if allowed."""
        cdef int64_t now_us = self.now_us(), found
        cdef Hash128 hashed
        cdef Shard* shard
        cdef Slot* slot
        cdef View* view
        cdef uint32_t expired
        cdef int64_t total
        if rule.home != self.secret[2]:
            self.meet(rule)
        hashed = siphash(rule.home_seed, self.secret[1] ^ joined, data, length)
        shard = &self.shards[<uint32_t>(((hashed.hi >> 32) * self.shard_count) >> 32)]
        found = shard_find(shard, hashed)
        if found < 0:
            return self.decide_new(rule.home_terms, shard, hashed, now_us, cost, out)
        slot = &shard.slots[found]
        view = &slot.view
        if view.terms != rule.home_terms or view_ahead(view, now_us):
            return self.decide_general(rule.home_terms, shard, <uint32_t>found, now_us, cost, out)
        # One view, of this very definition: the same steps as in decide_views, without a copy.
        if view.terms.kind == c"s":
            window_live(view.amount.window, now_us - view.terms.window_us, &expired, &total)
            judge(view.terms, view, now_us, cost, expired, total, out)
            if out.allowed:
                if expired:
                    window_drop(view.amount.window, expired, total)
                if view_charge(view, now_us, cost) == NO_MEMORY:
                    raise MemoryError
                total = view.amount.window.total
            report(view.terms, view, now_us, total, out)
            return 0
        return self.decide_scalar(view, now_us, cost, out)

    cdef inline int decide_scalar(self, View* stored, int64_t now_us, int64_t cost, Outcome* out) noexcept:
        cdef View view = stored[0]
        view_roll(&view, now_us)
        judge(view.terms, &view, now_us, cost, 0, 0, out)
        if out.allowed:
            view_charge(&view, now_us, cost)
            stored[0] = view
        report(view.terms, &view, now_us, 0, out)
        return 0

    cdef int decide_general(self, const Terms* rule, Shard* shard, uint32_t index, int64_t now_us, int64_t cost,
                            Outcome* out) except -1:
        """Decide where a clock has stepped back or a definition has changed."""
        cdef View[2] views
        cdef Slot* slot = &shard.slots[index]
        cdef int count = slot_views(slot, views)
        cdef Pair* pair = <Pair*>slot.view.amount.pair if slot.view.terms == NULL else <Pair*>malloc(sizeof(Pair))
        cdef int status
        if pair == NULL:
            raise MemoryError
        status = decide_views(views, &count, rule, now_us, cost, out)
        if status == NO_MEMORY:
            raise MemoryError
        if status == WRITE and count == 2:
            pair.own = views[0]
            pair.other = views[1]
            slot.view.terms = NULL
            slot.view.amount.pair = pair
            return 0
        if status == WRITE:
            free(pair)
            if count == 1:
                slot.view = views[0]
            else:
                slot.view.terms = rule        # what hung from the slot has been given back
                slot.view.amount.window = NULL
                shard_remove(shard, index)
                self.used -= 1
        elif slot.view.terms != NULL:
            free(pair)
        return 0

    cdef int decide_new(self, const Terms* rule, Shard* shard, Hash128 hashed, int64_t now_us, int64_t cost,
                        Outcome* out) except -1:
        cdef View[2] views
        cdef Slot slot
        cdef int64_t free_at_us
        cdef int count = 0
        if cost <= rule.capacity and self.used >= self.max_keys:
            free_at_us = self.make_place(shard, now_us)
            if free_at_us > now_us:
                out.allowed = False
                out.in_ticks = False
                out.remaining = 0
                out.retry_us = out.reset_us = free_at_us - now_us
                return 0
        if cost <= rule.capacity and shard_full(shard):
            self.used -= shard.used
            if shard_rebuild(shard, now_us) == NO_MEMORY:
                self.used += shard.used
                raise MemoryError
            self.used += shard.used
        if decide_views(views, &count, rule, now_us, cost, out) == NO_MEMORY:
            raise MemoryError
        if count:
            slot.hash_lo = hashed.lo
            slot.hash_hi = hashed.hi
            slot.view = views[0]
            shard_place(shard, &slot)
            self.used += 1
        return 0

    cdef int64_t make_place(self, Shard* shard, int64_t now_us) noexcept:
        """Forget the key closest to fresh among a few; without `evict` only if it is fresh, else say when it will be.

        The adversary is a flood of new keys: it can wash out only what is as close to fresh as the flood itself.
        """
        cdef int64_t fresh_at_us, earliest_us = 0
        cdef uint32_t i, victim = 0
        cdef int sampled = 0
        while shard.used == 0:
            shard = self.shards if shard == &self.shards[self.shard_count - 1] else shard + 1
        while sampled < EVICTION_SAMPLE:
            # xorshift64 (Marsaglia, 2003): which keys are sampled need not be a secret, only not the client's choice.
            self.random ^= self.random << 13
            self.random ^= self.random >> 7
            self.random ^= self.random << 17
            i = <uint32_t>(((self.random >> 32) * shard.room) >> 32)
            while not shard.tags[i]:
                i = i + 1 if i + 1 < shard.room else 0
            fresh_at_us = slot_fresh_at(&shard.slots[i])
            if sampled == 0 or fresh_at_us < earliest_us:
                earliest_us = fresh_at_us
                victim = i
            sampled += 1
        if earliest_us > now_us:
            if not self.evict:
                return earliest_us
            self.evictions += 1
        shard_remove(shard, victim)
        self.used -= 1
        return now_us

    cdef Slot* find(self, Entry entry):
        cdef Hash128 hashed
        cdef Shard* shard
        cdef int64_t found
        if entry.rule.home != self.secret[2]:
            self.meet(entry.rule)
        hashed = siphash(entry.rule.home_seed, self.secret[1] ^ entry.joined(), PyBytes_AS_STRING(entry.canonical) + 1,
                         PyBytes_GET_SIZE(entry.canonical) - 1)
        shard = &self.shards[<uint32_t>(((hashed.hi >> 32) * self.shard_count) >> 32)]
        found = shard_find(shard, hashed)
        return &shard.slots[found] if found >= 0 else NULL

    def decide(self, Entry entry not None):
        """Decide and consume. Returns a `Decision`."""
        cdef Outcome out
        self.decide_key(entry.rule, entry.joined(), PyBytes_AS_STRING(entry.canonical) + 1,
                        PyBytes_GET_SIZE(entry.canonical) - 1, entry.cost, &out)
        return decision_new(entry.rule, entry.key, entry.cost, MEMORY, &out)

    def peek(self, Entry entry not None):
        """Decide without consuming or changing anything. `remaining` is what is left before the check."""
        cdef Outcome out
        cdef View[2] views
        cdef View own
        cdef int64_t now_us = self.now_us(), total = 0
        cdef uint32_t expired = 0
        cdef Slot* slot = self.find(entry)
        cdef int i, count = slot_views(slot, views) if slot != NULL else 0
        cdef const Terms* rule = entry.rule.home_terms
        cdef int own_index = -1
        for i in range(count):
            if views[i].terms.kind == c"s":
                views[i].amount.window = window_clone(views[i].amount.window)
                if views[i].amount.window == NULL:
                    raise MemoryError
            if view_ahead(&views[i], now_us):
                view_rebase(&views[i], now_us)
            if own_index < 0 and same_definition(views[i].terms, rule):
                own_index = i
        if own_index >= 0:
            own = views[own_index]
        elif view_derive(&own, rule, views if count else NULL, now_us) == NO_MEMORY:
            raise MemoryError
        if rule.kind == c"s":
            window_live(own.amount.window, now_us - rule.window_us, &expired, &total)
        else:
            view_roll(&own, now_us)
        judge(rule, &own, now_us, entry.cost, expired, total, &out)
        report(rule, &own, now_us, total, &out)
        for i in range(count):
            view_free(&views[i])
        if own_index < 0:
            view_free(&own)
        return decision_new(entry.rule, entry.key, entry.cost, MEMORY, &out)

    def reset(self, Entry entry not None):
        """Forget what the key has used under the rule."""
        cdef Slot* slot = self.find(entry)
        cdef uint32_t i
        if slot == NULL:
            return
        for i in range(self.shard_count):
            if self.shards[i].room and &self.shards[i].slots[0] <= slot < &self.shards[i].slots[0] + self.shards[i].room:
                shard_remove(&self.shards[i], <uint32_t>(slot - self.shards[i].slots))
                self.used -= 1
                return

    def dump(self, Entry entry not None):
        """The key's state in the ASCII form of docs/arithmetic.md, or None."""
        cdef View[2] views
        cdef Slot* slot = self.find(entry)
        cdef int i, count
        cdef list parts = ["1;"]
        cdef Window* window
        cdef uint32_t j
        if slot == NULL:
            return None
        count = slot_views(slot, views)
        for i in range(count):
            terms = views[i].terms
            if terms.kind == c"b":
                parts.append(f"b{terms.unit_ticks},{terms.drain_ticks},{terms.capacity},{views[i].amount.level_ticks},"
                             f"{views[i].at_us};")
            elif terms.kind == c"f":
                parts.append(f"f{terms.window_us},{views[i].at_us},{views[i].amount.counts.cur};")
            elif terms.kind == c"c":
                parts.append(f"c{terms.window_us},{views[i].at_us},{views[i].amount.counts.cur},"
                             f"{views[i].amount.counts.prev};")
            else:
                window = views[i].amount.window
                parts.append(f"s{terms.window_us},{terms.slot_us},{window.total},{window.count},")
                for j in range(window.first, window.first + window.count):
                    parts.append(f"{window.entries[j].at_us:016d}{window.entries[j].units:010d}")
                parts.append(";")
        return "".join(parts).encode()


# ------------------------------------------------------------------------------------------------------------ decisions

cdef enum Source:
    MEMORY
    REDIS
    PREFILTER
    LEASE
    OUTAGE

cdef tuple SOURCES = ("memory", "redis", "prefilter", "lease", "outage")


@cython.final
@cython.freelist(256)
@cython.no_gc
cdef class Decision:
    """The outcome of a check: true when allowed. Durations are seconds from the decision, rounded up to the µs."""

    cdef CompiledRule terms
    cdef readonly object key
    cdef readonly int64_t cost
    cdef Source source_index
    cdef Outcome out

    def __init__(self):
        raise TypeError("decisions are made by a limiter: `await limiter.check(key)`")

    cdef inline Outcome* settled(self) noexcept:
        if self.out.in_ticks:
            settle(&self.terms.terms, &self.out)
        return &self.out

    @property
    def allowed(self):
        """Whether the units were granted."""
        return self.out.allowed

    @property
    def remaining(self):
        """Units left, after what was granted."""
        return self.settled().remaining

    @property
    def reset_after_us(self):
        """Integer µs until nothing that was used counts any more."""
        return self.settled().reset_us

    @property
    def rule(self):
        """Name of the rule that decided."""
        return self.terms.name

    @property
    def limit(self):
        """The rule's capacity: the most units that can be used at once."""
        return self.terms.terms.capacity

    @property
    def source(self):
        """Who decided: "memory", "redis", "prefilter", "lease" or "outage"."""
        return SOURCES[self.source_index]

    @property
    def retry_after_us(self):
        """Integer µs until the same check would be allowed if nobody else consumed; 0 when allowed, 2^63 − 1 for never."""
        return self.settled().retry_us if self.out.retry_us >= 0 else 0x7FFFFFFFFFFFFFFF

    @property
    def retry_after(self):
        """Seconds until the same check would be allowed if nobody else consumed; 0.0 when allowed, inf for never."""
        return self.settled().retry_us / 1e6 if self.out.retry_us >= 0 else float("inf")

    @property
    def reset_after(self):
        """Seconds until nothing that was used counts any more."""
        return self.settled().reset_us / 1e6

    def headers(self):
        """HTTP fields of this decision, by draft-ietf-httpapi-ratelimit-headers-11: a new dict of str to str.

        Times are whole seconds rounded up, at least 1 when denied. `Retry-After` comes only with a denial that ends.
        """
        cdef int64_t wait_us = self.settled().reset_us if self.out.allowed else self.settled().retry_us
        cdef int64_t wait_s = ceil_div(wait_us, 1_000_000) if wait_us > 0 else 0
        cdef dict fields = {
            "RateLimit-Policy": f'"{self.terms.name}";q={self.terms.limit};w={ceil_div(self.terms.terms.window_us, 1_000_000)}',
            "RateLimit": f'"{self.terms.name}";r={self.out.remaining};t={wait_s}' if wait_us >= 0
                         else f'"{self.terms.name}";r={self.out.remaining}',
        }
        if wait_us >= 0 and not self.out.allowed:
            fields["Retry-After"] = str(wait_s)
        return fields

    cdef tuple facts(self):
        cdef Outcome* out = self.settled()
        return (self.terms, self.key, self.cost, <int>self.source_index, out.allowed, out.remaining, out.retry_us, out.reset_us)

    def __bool__(self):
        return self.out.allowed

    def __eq__(self, other):
        if not isinstance(other, Decision):
            return NotImplemented
        return self.facts() == (<Decision>other).facts()

    def __hash__(self):
        return hash(self.facts())

    def __reduce__(self):
        return _restore_decision, self.facts()

    def __repr__(self):
        # Without the key: a decision ends up in logs, and keys are addresses and accounts.
        return (f"<Decision {'allowed' if self.allowed else 'denied'} rule={self.rule!r} cost={self.cost} "
                f"remaining={self.remaining} limit={self.limit} retry_after={self.retry_after} "
                f"reset_after={self.reset_after} source={self.source!r}>")


cdef inline Decision decision_new(CompiledRule rule, object key, int64_t cost, Source source, const Outcome* out):
    cdef Decision decision = Decision.__new__(Decision)
    decision_fill(decision, rule, key, cost, source, out)
    return decision


cdef inline void decision_fill(Decision decision, CompiledRule rule, object key, int64_t cost, Source source,
                               const Outcome* out):
    decision.terms = rule
    decision.key = key
    decision.cost = cost
    decision.source_index = source
    decision.out = out[0]


def _restore_decision(CompiledRule rule not None, key, int64_t cost, int source, bint allowed, int64_t remaining,
                      int64_t retry_us, int64_t reset_us):
    """Make the decision that these facts were taken from: for pickle."""
    cdef Outcome out = Outcome(allowed, False, remaining, retry_us, reset_us)
    return decision_new(rule, key, cost, <Source>source, &out)


@cython.final
@cython.freelist(64)
cdef class PendingDecision:
    """What `check` returns: await it once for the `Decision`. It is complete already when no network is needed."""

    cdef PyObject* decision                  # owned until it is handed over; NULL before and after
    cdef object inner                        # the coroutine that decides, where the network is needed
    cdef bint lets_others_run                # yield to the loop once, although the decision is here

    def __init__(self):
        raise TypeError("await limiter.check(key)")

    def __await__(self):
        return self

    def __iter__(self):
        return self

    def __next__(self):
        return self.send(None)

    def send(self, value):
        """Go on until the decision is there (coroutine protocol)."""
        cdef PyObject* result = NULL
        cdef PySendResult status = pending_send(<PyObject*>self, <PyObject*>value, &result)
        if status == PYGEN_ERROR:
            raise
        taken = <object>result
        Py_DECREF(result)
        if status == PYGEN_RETURN:
            raise StopIteration(taken)
        return taken

    def throw(self, kind, value=None, traceback=None):
        """Raise an exception where this waits (coroutine protocol)."""
        if self.inner is not None:
            if value is None and traceback is None:
                return self.inner.throw(kind)
            return self.inner.throw(kind, value, traceback)
        self.lets_others_run = False
        error = kind if value is None else value
        raise error

    def close(self):
        """Stop waiting (coroutine protocol)."""
        self.lets_others_run = False
        if self.inner is not None:
            self.inner.close()

    def __bool__(self):
        raise TypeError("this is not a decision yet: await it (`if await limiter.check(key):`)")

    def __repr__(self):
        return f"<PendingDecision {'waiting' if self.decision == NULL else 'complete'}>"

    def __dealloc__(self):
        Py_XDECREF(self.decision)


cdef PySendResult pending_send(PyObject* this, PyObject* value, PyObject** result) noexcept:
    cdef PendingDecision pending = <PendingDecision>this
    if pending.decision == NULL:
        if pending.inner is None:
            rt_set_used()
            return PYGEN_ERROR
        return PyIter_Send(<PyObject*>pending.inner, value, result)
    if pending.lets_others_run:
        pending.lets_others_run = False
        Py_INCREF(None)
        result[0] = <PyObject*>None
        return PYGEN_NEXT
    # Handed over, not shared: a decision that nobody keeps can then serve the next check.
    result[0] = pending.decision
    pending.decision = NULL
    return PYGEN_RETURN


cdef PyObject* pending_next(PyObject* this) noexcept:
    cdef PyObject* result = NULL
    cdef PySendResult status = pending_send(this, <PyObject*>None, &result)
    if status == PYGEN_RETURN:
        rt_set_stop(result)
        Py_DECREF(result)
        return NULL
    return result


rt_set_slots(<PyTypeObject*>PendingDecision, pending_send, pending_next)


# -------------------------------------------------------------------------------------------------------------- limiter

cdef enum:
    YIELD_EVERY = 128                        # consecutive complete checks, then the loop gets a turn


@cython.final
cdef class Entry:
    """One validated check, on its way to a storage."""

    cdef readonly CompiledRule rule
    cdef readonly object key
    cdef readonly bytes canonical            # "=" and the key's UTF-8, or "(" and a tuple's joined form
    cdef readonly int64_t cost

    def __init__(self):
        raise TypeError("entries are made by a limiter")

    cdef inline bint joined(self):
        return PyBytes_AS_STRING(self.canonical)[0] == c"("

    def decided(self, str source not None, bint allowed, int64_t remaining, int64_t retry_us, int64_t reset_us):
        """The decision that a storage took on this entry. `retry_us` −1 is never."""
        cdef Outcome out = Outcome(allowed, False, remaining, retry_us, reset_us)
        return decision_new(self.rule, self.key, self.cost, <Source>SOURCES.index(source), &out)


cdef bytes joined_key(tuple key):
    """A tuple as netstrings, so that no two tuples differ only by where their parts join."""
    cdef list parts = []
    if not key:
        raise InvalidRequest("the key is an empty tuple; a key has at least one part")
    for part in key:
        if isinstance(part, str):
            encoded = utf8(part)
            parts.append(b"s%d:%b" % (len(encoded), encoded))
        elif isinstance(part, int) and not PyBool_Check(part):
            parts.append(b"i%d " % part)
        else:
            raise InvalidRequest(f"a part of the key is a {type(part).__name__}; a tuple key holds only str and int")
    return b"".join(parts)


cdef bytes utf8(str text):
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise InvalidRequest("the key holds a lone surrogate and has no UTF-8; decode the bytes it came from strictly") from None


cdef int64_t units_of(object cost, CompiledRule rule) except -1:
    """The cost as an integer from 1 to the rule's capacity."""
    cdef int overflow = 0
    cdef long long units
    if PyBool_Check(cost):
        raise InvalidRequest(f"the cost is {cost}; it is a whole number of units, at least 1")
    try:
        index = PyNumber_Index(cost)
    except TypeError:
        raise InvalidRequest(f"the cost is a {type(cost).__name__}; it is a whole number (int) of units, at least 1") from None
    units = PyLong_AsLongLongAndOverflow(index, &overflow)
    if overflow > 0 or (overflow == 0 and units > rule.terms.capacity):
        raise CostExceedsLimit(index, rule.terms.capacity, rule.name)
    if overflow < 0 or units < 1:
        raise InvalidRequest("the cost is below 1; it is a whole number of units, at least 1")
    return units


cdef class Limiter:
    """The compiled part of a limiter: which rule, is the call valid, and `check`."""

    cdef readonly dict _rules                # name -> CompiledRule
    cdef CompiledRule only                   # the rule that `rule=None` means, while there is just one
    cdef KeyTable table
    cdef readonly object _storage
    cdef public bint _closed
    cdef Decision spare_decision             # the last ones made: used again when nobody has kept them
    cdef PendingDecision spare_pending
    cdef uint32_t complete                   # complete checks since the loop last had a turn

    def __init__(self, storage):
        self._storage = storage
        self.table = storage.table
        self._rules = {}

    def _install(self, CompiledRule rule not None):
        self._rules[rule.name] = rule
        self.only = rule if len(self._rules) == 1 else None

    def _uninstall(self, str name not None):
        del self._rules[name]
        self.only = next(iter(self._rules.values())) if len(self._rules) == 1 else None

    cdef CompiledRule which(self, object name):
        if name is None:
            if self.only is not None:
                return self.only
            if not self._rules:
                raise InvalidRequest("the limiter has no rule yet; add one with add_rule(...)")
            raise InvalidRequest(f"the limiter has several rules; name one of {', '.join(sorted(self._rules))} (rule=...)")
        if not isinstance(name, str):
            raise InvalidRequest(f"rule is a {type(name).__name__}; it is the name (str) of a rule")
        found = self._rules.get(name)
        if found is None:
            raise InvalidRequest(f"the limiter has no rule {name!r}; it has {', '.join(sorted(self._rules)) or 'none yet'}")
        return <CompiledRule>found

    def _entry(self, key, rule=None, cost=1):
        """Validate a call. Raises InvalidRequest, CostExceedsLimit or LimiterClosed."""
        cdef Entry entry = Entry.__new__(Entry)
        if self._closed:
            raise LimiterClosed()
        entry.rule = self.which(rule)
        entry.cost = units_of(cost, entry.rule)
        entry.key = key
        if PyUnicode_Check(key):
            if not key:
                raise InvalidRequest("the key is empty; a key names who is limited")
            entry.canonical = b"=" + utf8(key)
        elif isinstance(key, tuple):
            entry.canonical = b"(" + joined_key(key)
        else:
            raise InvalidRequest(f"the key is a {type(key).__name__}; a key is a str, or a tuple of str and int")
        return entry

    def check(self, key, rule=None, *, cost=1):
        """Decide whether `key` may use `cost` units under `rule` now, and consume them if so. Await the result.

        Never waits for capacity: a denial is a `Decision` that is false. Cancelled before it was sent, it consumes nothing;
        after that it may have.

        Raises `InvalidRequest` at once for a bad key, rule or cost (`CostExceedsLimit` above the rule's capacity),
        `LimiterClosed` after `aclose`; when awaited, a `StorageError` if the storage can't answer within its deadline.
        """
        cdef CompiledRule terms
        cdef Outcome out
        cdef PendingDecision pending
        cdef int64_t units
        cdef Py_ssize_t length
        cdef const char* data
        if self.table is None:
            pending = PendingDecision.__new__(PendingDecision)
            pending.inner = self._storage.decide_one(self._entry(key, rule, cost))
            self.complete = 0
            return pending
        if self._closed:
            raise LimiterClosed()
        terms = self.only
        if rule is not None or terms is None:
            terms = self.which(rule)
        units = 1 if cost is 1 else units_of(cost, terms)
        if PyUnicode_Check(key):
            data = PyUnicode_AsUTF8AndSize(key, &length)
            if data == NULL or length == 0:
                PyErr_Clear()
                self._entry(key, rule, cost)  # words the error
                raise InvalidRequest("the key has no UTF-8")
            self.table.decide_key(terms, False, data, length, units, &out)
        else:
            entry = <Entry>self._entry(key, rule, cost)
            self.table.decide_key(terms, True, PyBytes_AS_STRING((<Entry>entry).canonical) + 1,
                                  PyBytes_GET_SIZE((<Entry>entry).canonical) - 1, units, &out)
        pending = self.complete_pending(terms, key, units, &out)
        self.complete += 1
        if self.complete >= YIELD_EVERY:
            self.complete = 0
            # Only asyncio takes a bare yield as "next, please"; another loop gives turns by its own rules.
            pending.lets_others_run = running_loop() is not None
        return pending

    cdef inline PendingDecision complete_pending(self, CompiledRule terms, object key, int64_t units, const Outcome* out):
        cdef PendingDecision pending
        rt_drop_stop_value()
        if Py_REFCNT(<PyObject*>self.spare_pending) != 1:
            self.spare_pending = PendingDecision.__new__(PendingDecision)
        pending = self.spare_pending
        if pending.decision != NULL:
            Py_DECREF(pending.decision)          # it was never awaited
            pending.decision = NULL
        if Py_REFCNT(<PyObject*>self.spare_decision) != 1:
            self.spare_decision = Decision.__new__(Decision)
        decision_fill(self.spare_decision, terms, key, units, MEMORY, out)
        Py_INCREF(self.spare_decision)
        pending.decision = <PyObject*>self.spare_decision
        pending.lets_others_run = False
        return pending
