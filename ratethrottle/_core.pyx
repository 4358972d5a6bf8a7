# cython: auto_pickle=False, autotestdict=False
"""The compiled core: key table, decisions, and the limiter's `check`.

`docs/arithmetic.md` specifies every number that is computed here; the arithmetic stands in `_arithmetic.pxd`, and reads no clock:
`now_us` always comes from the caller. Nothing in this module does I/O.
"""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from cpython.unicode cimport PyUnicode_AsUTF8String
from cpython.object cimport PyObject, PyTypeObject
from libc.stdint cimport int64_t, uint16_t, uint32_t
from libc.stdlib cimport calloc, free, malloc, realloc
from libc.string cimport memcpy, memset
from posix.time cimport CLOCK_MONOTONIC, CLOCK_REALTIME, clock_gettime, timespec

from ratethrottle._arithmetic cimport (
    answer_length, ceil_div, decide_views, judge, NEVER, NO_MEMORY, Outcome, report, same_definition, settle, take_answer, Terms, Units,
    View, view_ahead, view_audit, view_charge, view_count, view_derive, view_free, view_fullest, view_rebase, view_roll, Window,
    window_clone, window_drop, window_live, WRITE,
)
from ratethrottle._bound cimport Bound, bound_verdict, DENIED, LEASED, OPEN, STALE
from ratethrottle._table cimport (
    Account, account_free, free_pages, Hash128, KeptTerms, Pair, Place, RT_PREFETCH, Shard, shard_find, shard_full, SHARD_KEYS, shard_free,
    SHARD_ROOM_MIN, shard_place, shard_rebuild, shard_remove, siphash, Slot, slot_at, slot_fresh_at, slot_used_share, slot_views, tags_of,
    terms_met,
)

from asyncio import _get_running_loop as running_loop
from asyncio import CancelledError, InvalidStateError
from math import inf as _inf
from math import nextafter
from os import urandom
from sys import _getframe as current_frame
from types import FunctionType

from ratethrottle.errors import CostExceedsLimit, InvalidRequest, LimiterClosed, listed


cdef extern from *:
    """
    #include <pthread.h>
    /* How often this process has been forked off another one: cheaper to look at than to ask for the process's id. */
    static unsigned rt_forks = 0;
    static void rt_forked(void) { rt_forks++; }
    static int rt_count_forks(void) { return pthread_atfork(NULL, NULL, rt_forked); }
    """
    unsigned forks "rt_forks"
    int count_forks "rt_count_forks"() noexcept

if count_forks():
    raise MemoryError


cdef extern from "Python.h":
    void PyErr_Clear()
    bint PyUnicode_Check(object)
    bint PyUnicode_CheckExact(object)
    bint PyBool_Check(object)
    object PyNumber_Index(object)
    long long PyLong_AsLongLongAndOverflow(object, int* overflow) except? -1
    ctypedef enum PySendResult:
        PYGEN_RETURN
        PYGEN_ERROR
        PYGEN_NEXT
    size_t PY_VECTORCALL_ARGUMENTS_OFFSET
    object PyMethod_New(object function, object instance)
    PyTypeObject* Py_TYPE(PyObject*)
    void PyObject_GC_UnTrack(PyObject*)
    int PyContext_Enter(object) except -1
    int PyContext_Exit(object) except -1
    object PyObject_Vectorcall(PyObject*, PyObject**, size_t, PyObject*)
    Py_ssize_t PyTuple_GET_SIZE(object)
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

    /* Takes over the reference to `value`. */
    static void rt_set_stop(PyObject *value) {
    #if PY_VERSION_HEX >= 0x030C0000
        PyStopIterationObject *stop = (PyStopIterationObject *)rt_kept_stop;
        if (stop != NULL && Py_REFCNT(stop) == 1 && stop->traceback == NULL && stop->context == NULL
                && stop->cause == NULL && stop->notes == NULL) {
            Py_XSETREF(stop->value, value);
            PyErr_SetRaisedException(Py_NewRef((PyObject *)stop));
            return;
        }
        PyObject *fresh = PyObject_CallOneArg(PyExc_StopIteration, value);
        Py_DECREF(value);
        if (fresh == NULL) return;
        /* Its args would go on naming this value when `value` has become another one. */
        Py_XSETREF(((PyBaseExceptionObject *)fresh)->args, PyTuple_New(0));
        Py_XSETREF(rt_kept_stop, Py_NewRef(fresh));
        PyErr_SetRaisedException(fresh);
    #else
        PyObject *stop = PyObject_CallOneArg(PyExc_StopIteration, value);
        Py_DECREF(value);
        if (stop == NULL) return;
        PyErr_SetObject(PyExc_StopIteration, stop);
        Py_DECREF(stop);
    #endif
    }

    /* The text of most keys is its own UTF-8; NULL, with an error set, for a lone surrogate. */
    static inline const char *rt_utf8(PyObject *text, Py_ssize_t *size) {
        if (PyUnicode_IS_COMPACT_ASCII(text)) {
            *size = PyUnicode_GET_LENGTH(text);
            return (const char *)PyUnicode_DATA(text);
        }
        return PyUnicode_AsUTF8AndSize(text, size);
    }

    /* The kept exception holds on to the last value until it carries the next one. */
    static inline void rt_drop_stop_value(void) {
    #if PY_VERSION_HEX >= 0x030C0000
        PyStopIterationObject *stop = (PyStopIterationObject *)rt_kept_stop;
        if (stop != NULL && stop->value != NULL && Py_REFCNT(stop) == 1) Py_CLEAR(stop->value);
    #endif
    }

    /* Says that an exception has been set already: Cython's `raise` alone raises only one that is being handled. */
    static inline void rt_raise_set(void) {}

    /* Cython fills neither am_send nor a tp_iternext that may return NULL without a traceback entry. */
    static destructor rt_free_pending;
    static void rt_set_slots(PyTypeObject *type, sendfunc send, iternextfunc next, destructor dealloc) {
        type->tp_as_async->am_send = send;
        type->tp_iternext = next;
        rt_free_pending = type->tp_dealloc;
        type->tp_dealloc = dealloc;
    }

    /* For an object that has lost its last reference. Returns whether somebody keeps it after all: a hook for the warning. */
    static int rt_warn_unawaited(PyObject *dying) {
        PyObject *kind, *value, *traceback;
        Py_SET_REFCNT(dying, 1);
        PyErr_Fetch(&kind, &value, &traceback);
        if (PyErr_WarnEx(PyExc_RuntimeWarning, "coroutine 'RateThrottleCore.check' was never awaited", 1) < 0)
            PyErr_WriteUnraisable(dying);
        PyErr_Restore(kind, value, traceback);
        Py_SET_REFCNT(dying, Py_REFCNT(dying) - 1);
        return Py_REFCNT(dying) > 0;
    }

    /* A call of `limiter.check` reaches a descriptor of this type without a bound method in between. */
    static void rt_set_method(PyTypeObject *type, Py_ssize_t vectorcall_offset) {
        type->tp_vectorcall_offset = vectorcall_offset;
        type->tp_call = PyVectorcall_Call;
        type->tp_flags |= Py_TPFLAGS_HAVE_VECTORCALL | Py_TPFLAGS_METHOD_DESCRIPTOR;
        PyType_Modified(type);
    }

    """
    void rt_set_stop(PyObject* value) noexcept
    void rt_drop_stop_value() noexcept
    const char* rt_utf8(object text, Py_ssize_t* size) noexcept
    void rt_raise_set() except *
    Py_ssize_t Py_REFCNT(PyObject*)
    void rt_set_slots(PyTypeObject* type, PySendResult (*send)(PyObject*, PyObject*, PyObject**) noexcept,
                      PyObject* (*next)(PyObject*) noexcept, void (*dealloc)(PyObject*) noexcept)
    void rt_free_pending(PyObject*) noexcept
    bint rt_warn_unawaited(PyObject*) noexcept
    void rt_set_method(PyTypeObject* type, Py_ssize_t vectorcall_offset)


# ---------------------------------------------------------------------------------------------------------------- rules

cdef tuple POLICIES = (None, "local", "allow", "deny", "raise")


cdef Policy policy_of(object word) except *:
    return <Policy><int>POLICIES.index(word)


cdef int64_t WEEK_US = 604_800_000_000
cdef int64_t PASSED_US = 259_200_000_000     # of the week of 1970-01-01, a Thursday: aligned windows of weeks begin on a Monday, UTC
cdef uint64_t[2 * SOURCES_MAX] nobodys       # where rules count that no limiter has installed


cdef tuple shape_of(const Terms* terms):
    """What tells one definition from another one; of this, all the rest follows."""
    return (chr(terms.kind), terms.capacity, terms.window_us, terms.unit_ticks, terms.drain_ticks, terms.slot_us, terms.coarse_us)


@cython.final
cdef class Tally:
    pass


@cython.final
cdef class CompiledRule:
    """A rule as the arithmetic uses it: exact integers only. Made by `RateThrottleRule`, compared by value."""

    def __init__(self, str name not None, str strategy not None, str kind not None, int64_t limit, int64_t capacity,
                 int64_t window_us, int64_t unit_ticks, int64_t drain_ticks, int64_t slot_us, int64_t coarse_us,
                 int64_t lease_us=0, int64_t lease_units=0, str on_outage=None):
        if kind not in ("b", "s", "c", "f"):
            raise ValueError(f"kind is one of b, s, c and f, not {kind!r}")
        if capacity < 1 or window_us < 1 or limit < 0 or (kind == "b" and (unit_ticks < 1 or drain_ticks < 1)):
            raise ValueError("capacity and window are positive, and so are the ticks of a bucket; a limit is 0 or more")
        if (kind == "s" and slot_us < 1) or (kind == "c" and coarse_us < 1):
            raise ValueError("a sliding window has a slot, a sliding counter a coarse time, of at least 1 µs")
        self.name = name
        self.strategy = strategy
        self.limit = limit
        self.lease_us = lease_us
        self.lease_units = lease_units
        self.policy = policy_of(on_outage)
        self.counts = nobodys
        self.terms = Terms(<char>ord(kind), capacity, window_us, 0 if window_us % WEEK_US else PASSED_US, unit_ticks, drain_ticks,
                           slot_us, coarse_us, ceil_div(window_us, coarse_us) if coarse_us else 0,
                           window_us // 8 + (slot_us if slot_us > 1 else 0))

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

    @property
    def lead_us(self):
        """How far ahead of now units of a sliding window may be counted from."""
        return self.lease_us if self.terms.kind == c"s" else 0

    @property
    def on_outage(self):
        """What answers while the storage can't; None: what the storage is told."""
        return POLICIES[self.policy]

    def blocking(self):
        """The rule that denies everything, and leaves alone what was used under this one."""
        cdef CompiledRule rule = CompiledRule(*self.facts())
        rule.limit = 0
        return rule

    cdef tuple shape(self):
        return shape_of(&self.terms)

    cdef tuple facts(self):
        return (self.name, self.strategy, self.kind, self.limit, *self.shape()[1:], self.lease_us, self.lease_units,
                self.on_outage)

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


# ------------------------------------------------------------------------------------------------------------ key table

cdef enum:
    KNOWN_MOST = 1024                        # definitions of rules, before those that nothing refers to are let go
    TERMS_STEP = 64                          # of which so many are looked at for each one that is new
    EVICTION_SAMPLE = 8
    SWEEP_SLOTS = 16
    TIDY_SHARDS = 8
    ORPHANS_MAX = 1024


cdef str window_text(const Terms* terms, const Window* window):
    """What stands of a sliding window in the ASCII form of a state, with as few digits for units as do."""
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


@cython.final
cdef class KeyTable:
    """The state of at most `max_keys` keys: open addressing over C structs, in shards that are rebuilt one at a time.

    When it is full, a new key takes the place of the one closest to fresh among eight sampled (`evict`), or is denied. Every
    client can fill it, so it is keyed by a hash nobody outside can predict, and a key far from fresh outlives a flood of
    keys closer to it.
    """

    def __cinit__(self, max_keys=1_000_000, bint evict=True, clock_us=None, *, bint bounds=False):
        cdef timespec wall, monotonic
        cdef uint32_t i
        cdef bytes noise = urandom(32)
        self.max_keys = max_keys
        self.evict = evict
        self.clock = clock_us
        self.forks = forks
        self.known = {}
        self.known_most = KNOWN_MOST
        memcpy(self.secret, PyBytes_AS_STRING(noise), 24)
        memcpy(&self.random, PyBytes_AS_STRING(noise) + 24, 8)
        self.random |= 1
        self.shard_count = <uint32_t>max(1, ceil_div(self.max_keys, SHARD_KEYS))
        self.shards = <Shard*>calloc(self.shard_count, sizeof(Shard))
        if self.shards == NULL:
            raise MemoryError
        for i in range(self.shard_count):
            self.shards[i].slot_bytes = sizeof(Bound) if bounds else sizeof(Slot)
        if bounds:
            self.owing_in = <uint16_t*>calloc(self.shard_count, sizeof(uint16_t))
            self.orphans = <Orphan*>calloc(ORPHANS_MAX, sizeof(Orphan))
            if self.owing_in == NULL or self.orphans == NULL:
                raise MemoryError
        # Monotonic, but counted from the epoch, so that fixed windows start where a wall clock would have them.
        clock_gettime(CLOCK_REALTIME, &wall)
        clock_gettime(CLOCK_MONOTONIC, &monotonic)
        self.clock_offset_us = (wall.tv_sec - monotonic.tv_sec) * 1_000_000 + (wall.tv_nsec - monotonic.tv_nsec) // 1000

    def __dealloc__(self):
        cdef uint32_t i
        cdef KeptTerms* kept
        if self.shards != NULL:
            for i in range(self.shard_count):
                shard_free(&self.shards[i])
            free(self.shards)
        while self.emptied_count:
            self.free_emptied()
        free(self.emptied)
        free(self.owing_in)
        free(self.orphans)
        while self.kept != NULL:
            kept, self.kept = self.kept, self.kept.older
            free(kept)

    def __len__(self):
        return self.used

    def __sizeof__(self):
        return self.size_bytes

    @property
    def size_bytes(self):
        """Bytes held for all keys; windows, second views, and what was admitted in outages included."""
        cdef int64_t size = self.shard_count * sizeof(Shard)
        cdef View[4] views
        cdef const Bound* bound
        cdef uint32_t i, j
        cdef int k, count
        for i in range(self.shard_count):
            size += self.shards[i].room * (self.shards[i].slot_bytes + 1)
            for j in range(self.shards[i].room):
                if not tags_of(&self.shards[i])[j]:
                    continue
                if slot_at(&self.shards[i], j).view.terms == NULL:
                    size += sizeof(Pair)
                count = slot_views(slot_at(&self.shards[i], j), views)
                if self.owing_in != NULL:
                    bound = <Bound*>slot_at(&self.shards[i], j)
                    size += bound.name_size
                    if bound.account != NULL:
                        size += sizeof(Account)
                        views[count] = bound.account.held
                        views[count + 1] = bound.account.owed
                        count += 2
                for k in range(count):
                    if views[k].terms.kind == c"s":
                        size += sizeof(Window) + (views[k].amount.window.room - 1) * sizeof(Units)
        return size

    def clock_us(self):
        """The table's time, integer µs: monotonic, counted from the Unix epoch by the wall clock at its creation."""
        return self.now_us()

    cdef inline int64_t now_us(self) except -1:
        cdef timespec monotonic
        if self.clock is not None:
            return self.asked_us()
        clock_gettime(CLOCK_MONOTONIC, &monotonic)
        return monotonic.tv_sec * 1_000_000 + monotonic.tv_nsec // 1000 + self.clock_offset_us

    cdef int64_t asked_us(self) except -1:
        """The time by a clock that is Python. Other code may run meanwhile, so no terms are freed: a check may have been given them."""
        self.terms_held += 1
        try:
            return self.clock()
        finally:
            self.terms_held -= 1

    cdef void notice_fork(self) noexcept:
        """As the first look-up of a key does."""
        if self.forks != forks:
            self.forked()

    cdef void forked(self) noexcept:
        """Give up what belongs to the process that forked this one: its leases, what it owes, and the answers that it waits for."""
        cdef Shard* shard
        cdef Bound* bound
        cdef uint32_t i, j
        self.forks = forks
        self.away = 0
        self.orphan_count = 0
        if self.owing_in == NULL:
            return
        memset(self.orphans, 0, ORPHANS_MAX * sizeof(Orphan))
        for i in range(self.shard_count):
            shard = &self.shards[i]
            for j in range(shard.room):
                if tags_of(shard)[j]:
                    bound = <Bound*>slot_at(shard, j)
                    bound.lease_units = bound.lease_size = bound.asked_us = 0
                    bound.leasing = False
                    self.drop_account(shard, bound)

    cdef Bound* bound_of(self, Hash128 hashed, Shard** shard, uint32_t* index) noexcept:
        """The bound of a key, where it stands; NULL without."""
        cdef int64_t found
        shard[0] = &self.shards[<uint32_t>(((hashed.hi >> 32) * self.shard_count) >> 32)]
        found = shard_find(shard[0], hashed)
        if found < 0:
            return NULL
        index[0] = <uint32_t>found
        return <Bound*>slot_at(shard[0], <uint32_t>found)

    cdef void note_owes(self, Shard* shard, Bound* bound, bint owes) noexcept:
        """Count a bound with an account among those that owe something, or no more."""
        cdef int more = <int>owes - <int>bound.account.owes
        bound.account.owes = owes
        self.owing += more
        self.owing_in[shard - self.shards] += more

    cdef void drop_account(self, Shard* shard, Bound* bound) noexcept:
        """Forget what was admitted here, and what of it is owed."""
        if bound.account != NULL:
            self.note_owes(shard, bound, False)
            account_free(bound.account)
            bound.account = NULL

    cdef void orphan(self, Bound* bound) noexcept:
        """Keep what is left of a bound's lease for whoever gives it back, and take it from the bound."""
        cdef Orphan* orphan
        if bound.lease_units > 0:
            orphan = &self.orphans[self.orphan_count % ORPHANS_MAX]
            orphan.hashed = Hash128(bound.slot.hash_lo, bound.slot.hash_hi)
            orphan.at_us = bound.lease_at_us
            orphan.epoch = bound.lease_epoch
            orphan.units = bound.lease_units
            self.orphan_count += 1
            bound.lease_units = 0

    cdef int64_t adopt(self, Hash128 hashed, int64_t at_us, int64_t epoch, int64_t now_us) noexcept:
        """Units that are left of a lease, to be given back by the caller alone; 0 if there are none, or of another epoch."""
        cdef Shard* shard
        cdef uint32_t index
        cdef Bound* bound = self.bound_of(hashed, &shard, &index)
        cdef Orphan* orphan
        cdef int i
        cdef int64_t units
        if bound != NULL and bound.lease_units > 0 and bound.lease_at_us == at_us:
            units, bound.lease_units = bound.lease_units, 0
            bound.returned_us = now_us       # what is known from before that denies nothing
            return units if bound.lease_epoch == epoch else 0
        for i in range(<int>min(self.orphan_count, <int64_t>ORPHANS_MAX)):
            orphan = &self.orphans[i]
            if orphan.units > 0 and orphan.at_us == at_us and orphan.hashed.lo == hashed.lo and orphan.hashed.hi == hashed.hi:
                units, orphan.units = orphan.units, 0
                return units if orphan.epoch == epoch else 0
        return 0

    cdef int tidy(self, int64_t now_us) except -1:
        """Let go of what is fresh in the next few shards, and of the room that it took, so that memory comes back by itself."""
        cdef Shard* shard
        cdef uint32_t i, fresh
        cdef int _shard
        for _shard in range(<int>min(self.shard_count, <uint32_t>TIDY_SHARDS)):
            self.tidy_hand = self.tidy_hand + 1 if self.tidy_hand + 1 < self.shard_count else 0
            shard = &self.shards[self.tidy_hand]
            fresh = 0
            for i in range(shard.room):
                fresh += tags_of(shard)[i] and slot_fresh_at(shard, slot_at(shard, i)) <= now_us
            if fresh * 4 > shard.room or shard.room > SHARD_ROOM_MIN and (shard.used - fresh) * 2 < shard.room:
                self.rebuild(shard, now_us)
        return 0

    cdef int rebuild(self, Shard* shard, int64_t now_us) except -1:
        """Leave out the keys of a shard that are fresh again."""
        cdef Shard before = shard[0]
        cdef Bound* bound
        cdef uint32_t i
        if self.owing_in != NULL:
            for i in range(shard.room):
                if tags_of(shard)[i] and slot_fresh_at(shard, slot_at(shard, i)) <= now_us:
                    bound = <Bound*>slot_at(shard, i)
                    self.orphan(bound)
                    self.drop_account(shard, bound)
        self.used -= shard.used
        if shard_rebuild(shard, now_us) == NO_MEMORY:
            self.used += shard.used
            raise MemoryError
        self.used += shard.used
        if self.owing_in != NULL and shard.room < before.room:
            free_pages(before.slots, before.room * (before.slot_bytes + 1))
        else:
            free(before.slots)
        return 0

    cdef void empty(self) noexcept:
        """Let go of every key, and of what was admitted here. `free_emptied` frees them: for a million keys that takes up to a second."""
        cdef Shard* shard
        cdef Shard* room = <Shard*>realloc(self.emptied, (self.emptied_count + self.shard_count) * sizeof(Shard))
        cdef size_t before = self.emptied_count
        cdef uint32_t i
        if room != NULL:
            self.emptied = room
        for i in range(self.shard_count):
            shard = &self.shards[i]
            if room == NULL:
                shard_free(shard)
            elif shard.slots != NULL:
                self.emptied[self.emptied_count] = shard[0]
                self.emptied_count += 1
            shard.slots = NULL
            shard.room = shard.used = shard.hand = 0
            self.owing_in[i] = 0
        self.used = self.owing = 0
        self.terms_held += before == 0 and self.emptied_count > 0  # to free a key takes its terms

    cdef void free_emptied(self) noexcept:
        """Free a shard of those that were emptied, in about 1 ms."""
        if self.emptied_count:
            self.emptied_count -= 1
            shard_free(&self.emptied[self.emptied_count])
            self.terms_held -= self.emptied_count == 0

    cdef Terms* terms_of(self, CompiledRule rule) except NULL:
        while rule.home != self.secret[2]:
            self.meet(rule)
        return rule.home_terms

    cdef Hash128 hash_entry(self, Entry entry) except *:
        cdef Place place
        self.locate_entry(entry, &place)
        return place.hashed

    cdef void remove(self, Shard* shard, uint32_t index) noexcept:
        if self.owing_in != NULL:
            self.orphan(<Bound*>slot_at(shard, index))
            self.drop_account(shard, <Bound*>slot_at(shard, index))
        shard_remove(shard, index)
        self.used -= 1

    cdef Slot* insert(self, Shard* shard, const Slot* slot, int64_t now_us) except NULL:
        """Put a key that is absent where it belongs, in the place of another one if the table is full."""
        if self.used >= self.max_keys:
            self.make_place(shard, now_us)
        self.make_room(shard, now_us)
        self.used += 1
        return slot_at(shard, shard_place(shard, slot))

    cdef inline int make_room(self, Shard* shard, int64_t now_us) except -1:
        if shard_full(shard):
            self.rebuild(shard, now_us)
        return 0

    cdef int meet(self, CompiledRule rule) except -1:
        """Find or keep the rule's terms, which outlive it in the states that were written under it."""
        cdef tuple shape = rule.shape()
        cdef KeptTerms* kept
        cdef bytes name = rule.name.encode()
        if shape not in self.known:
            self.let_terms_go()
        if shape not in self.known:              # other code, which may run meanwhile, hasn't met it either
            kept = <KeptTerms*>malloc(sizeof(KeptTerms))
            if kept == NULL:
                raise MemoryError
            kept.terms = rule.terms
            kept.retired = False
            try:
                self.known[shape] = <size_t>kept
            except BaseException:
                free(kept)
                raise
            kept.older, self.kept = self.kept, kept
            self.kept_terms += 1
        kept = <KeptTerms*><size_t>self.known[shape]
        kept.met_in = self.round
        rule.home_terms = &kept.terms
        rule.home_seed = siphash(self.secret[0], self.secret[1], PyBytes_AS_STRING(name), PyBytes_GET_SIZE(name)).lo
        rule.home = self.secret[2]
        return 0

    cdef int let_terms_go(self) except -1:
        """Take a step towards letting go of terms that nothing refers to: one for each definition that is new.

        A round looks through the keys, a shard in each step, and then at all terms. It begins by having every rule met anew, so
        that terms which are given out meanwhile are noted too. What nothing referred to in a round is given out no more; it is
        freed if nothing refers to it in the next round either.
        """
        if self.letting_go:                      # the step has let other code run, which is here now
            return 0
        self.letting_go = True
        try:
            if self.round_at == NULL and len(self.known) >= self.known_most:
                self.round += 1
                self.round_shard = 0
                self.round_at = &self.kept
                self.secret[2] += 1
            if self.round_at != NULL:
                self.let_go_next()
        finally:
            self.letting_go = False
        return 0

    cdef int let_go_next(self) except -1:
        cdef KeptTerms* kept
        cdef int _step
        if self.round_shard < self.shard_count:
            self.note_terms(&self.shards[self.round_shard])
            self.round_shard += 1
            return 0
        for _step in range(TERMS_STEP):
            kept = self.round_at[0]
            if kept == NULL:
                self.round_at = NULL
                self.known_most = max(<Py_ssize_t>KNOWN_MOST, 2 * len(self.known))
                return 0
            if kept.met_in != self.round and not kept.retired:
                shape = shape_of(&kept.terms)    # other code may run here, and may meet just this definition
                if kept.met_in != self.round:
                    del self.known[shape]
                    kept.retired = True
            elif kept.met_in != self.round and self.terms_held == 0:
                self.round_at[0] = kept.older
                self.kept_terms -= 1
                free(kept)
                continue
            self.round_at = &kept.older
        return 0

    cdef void note_terms(self, Shard* shard) noexcept:
        """Note what the keys of a shard refer to."""
        cdef View[2] views
        cdef Bound* bound
        cdef uint32_t i
        cdef int k
        for i in range(shard.room):
            if not tags_of(shard)[i]:
                continue
            for k in range(slot_views(slot_at(shard, i), views)):
                terms_met(views[k].terms, self.round)
            if self.owing_in != NULL:
                bound = <Bound*>slot_at(shard, i)
                if bound.lease_units == 0:
                    bound.lease_terms = NULL     # they are read only while units are left
                elif bound.lease_terms != NULL:
                    terms_met(bound.lease_terms, self.round)

    cdef inline int locate(self, CompiledRule rule, bint joined, const char* data, Py_ssize_t length, Place* place) except -1:
        """Hash a key, its UTF-8 or a tuple's joined form, and begin to fetch the shard it belongs to."""
        if self.forks != forks:
            self.forked()
        while rule.home != self.secret[2]:
            self.meet(rule)
        # Taken now: another table may meet the same rule before this one has decided.
        place.terms = rule.home_terms
        place.hashed = siphash(rule.home_seed, self.secret[1] ^ joined, data, length)
        place.shard = &self.shards[<uint32_t>(((place.hashed.hi >> 32) * self.shard_count) >> 32)]
        RT_PREFETCH(place.shard)
        return 0

    cdef inline int decide_located(self, const Place* place, int64_t now_us, int64_t cost, Outcome* out) except -1:
        """Decide on a located key, and consume if allowed. Runs no Python code."""
        cdef Shard* shard = place.shard
        cdef int64_t found = shard_find(shard, place.hashed), total = 0
        cdef Slot* slot
        cdef View* view
        cdef View rolled
        cdef uint32_t expired = 0
        cdef bint windowed
        if found < 0:
            return self.decide_new(place.terms, shard, place.hashed, now_us, cost, out)
        slot = slot_at(shard, <uint32_t>found)
        view = &slot.view
        if view.terms != place.terms or view_ahead(view, now_us):
            return self.decide_general(place.terms, shard, <uint32_t>found, now_us, cost, out)
        # One view, of this very definition: the same steps as in decide_views, on a copy that stays in registers.
        rolled = view[0]
        windowed = rolled.terms.kind == c"s"
        if windowed:
            window_live(rolled.amount.window, now_us - rolled.terms.window_us, &expired, &total)
        else:
            view_roll(&rolled, now_us)
        judge(rolled.terms, &rolled, now_us, cost, expired, total, out)
        if out.allowed:
            if windowed:
                if expired:
                    window_drop(view.amount.window, expired, total)
                if view_charge(view, now_us, cost) == NO_MEMORY:
                    raise MemoryError
                rolled.amount = view.amount
                total = rolled.amount.window.total
            else:
                view_count(&rolled, cost)
                view.at_us = rolled.at_us
                view.amount = rolled.amount
        report(rolled.terms, &rolled, now_us, total, out)
        view_audit(view, now_us)
        return 0

    cdef int decide_general(self, const Terms* rule, Shard* shard, uint32_t index, int64_t now_us, int64_t cost,
                            Outcome* out) except -1:
        """Decide where a clock has stepped back or a definition has changed."""
        cdef View[2] views
        cdef Slot* slot = slot_at(shard, index)
        cdef int count = slot_views(slot, views)
        cdef Pair* pair = <Pair*>slot.view.amount.pair if slot.view.terms == NULL else <Pair*>malloc(sizeof(Pair))
        cdef int status, i
        if pair == NULL:
            raise MemoryError
        status = decide_views(views, &count, rule, now_us, cost, out)
        if status == NO_MEMORY:
            raise MemoryError
        if status == WRITE:
            for i in range(count):
                view_audit(&views[i], now_us)
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
                self.remove(shard, index)
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
        if cost <= rule.capacity:
            self.make_room(shard, now_us)
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
        """Forget the key closest to fresh among a few; without `evict` only if it is fresh, else say when one will be.

        Closest is the one that has used the least share of its capacity, and of those the one that is fresh first. The adversary
        is a flood of new keys: it can wash out only what has used as little as the flood itself.
        """
        cdef int64_t fresh_at_us, earliest_us = 0, used, least = 0, least_at_us = 0
        cdef uint32_t i, victim = 0
        cdef int sampled = 0
        while shard.used == 0:
            shard = self.shards if shard == &self.shards[self.shard_count - 1] else shard + 1
        if self.sweep(shard, now_us):
            return now_us
        while sampled < EVICTION_SAMPLE:
            # xorshift64 (Marsaglia, 2003): which keys are sampled need not be a secret, only not the client's choice.
            self.random ^= self.random << 13
            self.random ^= self.random >> 7
            self.random ^= self.random << 17
            i = <uint32_t>(((self.random >> 32) * shard.room) >> 32)
            while not tags_of(shard)[i]:
                i = i + 1 if i + 1 < shard.room else 0
            fresh_at_us = slot_fresh_at(shard, slot_at(shard, i))
            used = slot_used_share(shard, slot_at(shard, i), now_us) if fresh_at_us > now_us else -1
            if sampled == 0 or used < least or (used == least and fresh_at_us < least_at_us):
                least = used
                least_at_us = fresh_at_us
                victim = i
            earliest_us = fresh_at_us if sampled == 0 else min(earliest_us, fresh_at_us)
            sampled += 1
        if least >= 0:
            if not self.evict:
                return earliest_us
            self.evictions += 1
        self.remove(shard, victim)
        return now_us

    cdef bint sweep(self, Shard* shard, int64_t now_us) noexcept:
        """Let go of the fresh keys among the next few slots: what is fresh must not push out what isn't."""
        cdef int64_t before = self.used
        cdef int _scanned
        for _scanned in range(SWEEP_SLOTS):
            if shard.hand >= shard.room:
                shard.hand = 0
            if tags_of(shard)[shard.hand] and slot_fresh_at(shard, slot_at(shard, shard.hand)) <= now_us:
                self.remove(shard, shard.hand)    # what moves into this slot is looked at next
            else:
                shard.hand += 1
        return self.used < before

    cdef int locate_entry(self, Entry entry, Place* place) except -1:
        return self.locate(entry.rule, entry.joined(), PyBytes_AS_STRING(entry.canonical) + 1,
                           PyBytes_GET_SIZE(entry.canonical) - 1, place)

    cdef int find(self, Entry entry, Place* place, Slot** slot) except -1:
        """Locate the entry's key; its slot, or NULL."""
        cdef int64_t found
        self.locate_entry(entry, place)
        found = shard_find(place.shard, place.hashed)
        slot[0] = slot_at(place.shard, <uint32_t>found) if found >= 0 else NULL
        return 0

    def decide(self, Entry entry not None):
        """Decide and consume. Returns a `Decision`."""
        cdef Outcome out
        cdef Place place
        self.locate_entry(entry, &place)
        self.decide_located(&place, self.now_us(), entry.cost, &out)
        count_decision(entry.rule, MEMORY, out.allowed)
        return decision_new(entry.rule, entry.key, entry.cost, MEMORY, &out)

    def peek(self, Entry entry not None):
        """Decide without consuming or changing anything. `remaining` is what is left before the check."""
        cdef Outcome out
        cdef View[2] views
        cdef View own
        cdef int64_t now_us = self.now_us(), total = 0
        cdef uint32_t expired = 0
        cdef Place place
        cdef Slot* slot
        cdef const Terms* rule
        cdef int i, count, own_index = -1
        self.find(entry, &place, &slot)
        rule = place.terms
        count = slot_views(slot, views) if slot != NULL else 0
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
        elif view_derive(&own, rule, view_fullest(views, count, now_us), now_us) == NO_MEMORY:
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
        cdef Place place
        cdef Slot* slot
        self.find(entry, &place, &slot)
        if slot != NULL:
            self.remove(place.shard, <uint32_t>((<char*>slot - place.shard.slots) // place.shard.slot_bytes))

    def dump(self, Entry entry not None):
        """The key's state in the ASCII form of docs/arithmetic.md, or None."""
        cdef View[2] views
        cdef Place place
        cdef Slot* slot
        cdef int i, count
        cdef list parts = ["1;"]
        self.find(entry, &place, &slot)
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
                parts.append(window_text(terms, views[i].amount.window))
        return "".join(parts).encode()


# ------------------------------------------------------------------------------------------------------------ decisions

cdef tuple SOURCES = ("memory", "redis", "prefilter", "lease", "outage", "overload")


cdef object seconds_up(int64_t us):
    """The least float that is not below µs as seconds: whoever sleeps so long must not wake too early."""
    seconds = us / 1e6
    numerator, denominator = seconds.as_integer_ratio()
    return seconds if numerator * 1_000_000 >= us * denominator else nextafter(seconds, _inf)


@cython.final
@cython.freelist(256)
@cython.no_gc
cdef class Decision:
    """The outcome of a check: true when allowed. Durations are seconds from the decision, rounded up to the µs."""

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
        return self.terms.terms.capacity if self.terms.limit else 0

    @property
    def source(self):
        """Who decided: "memory", "redis", "prefilter", "lease", "outage" or "overload"."""
        return SOURCES[self.source_index]

    @property
    def retry_after_us(self):
        """Integer µs until the same check would be allowed if nobody else consumed; 0 when allowed, 2^63 − 1 for never."""
        return self.settled().retry_us if self.out.retry_us >= 0 else 0x7FFFFFFFFFFFFFFF

    @property
    def retry_after(self):
        """Seconds until the same check would be allowed if nobody else consumed; 0.0 when allowed, inf for never.

        Exact where `retry_after_exact` says so. With the source "prefilter" it is not before that, and by how much later was not
        asked. Of a rule with leases it is the latest: units that others hold unspent may come back within `lease_ttl`.
        """
        return seconds_up(self.settled().retry_us) if self.out.retry_us >= 0 else _inf

    @property
    def retry_after_exact(self):
        """Whether `retry_after` is exact: it is a bound where Redis wasn't asked, and where others may hold units of a lease."""
        return self.out.allowed or self.source_index <= REDIS and self.terms.lease_units == 0

    @property
    def reset_after(self):
        """Seconds until nothing that was used counts any more."""
        return seconds_up(self.settled().reset_us)

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


cdef Decision decision_new(CompiledRule rule, object key, int64_t cost, Source source, const Outcome* out):
    cdef Decision decision = Decision.__new__(Decision)
    decision.out = out[0]
    decision.terms = rule
    decision.key = key
    decision.cost = cost
    decision.source_index = source
    return decision


def read_answer(CompiledRule rule not None, numbers, int64_t cost, int64_t position=0, int64_t count=1):
    """What the script's answer to an entry says to the check at `position` (0: the first) of the `count` it stands for.

    Returns allowed, remaining, retry_us (−1: never) and reset_us.
    """
    cdef int64_t[6] raw
    cdef Outcome out
    cdef int i
    if not 0 <= position < count:
        raise ValueError("there is no such position among those checks")
    if not numbers or len(numbers) != answer_length(&rule.terms, numbers[0], count) + (rule.lease_units > 0):
        raise ValueError("the answer has another length than its rule's kind asks for")
    for i in range(len(numbers)):
        raw[i] = numbers[i]
    take_answer(&rule.terms, raw, raw[len(numbers) - 1] if rule.lease_units else 0, cost, position, &out)
    if out.in_ticks:
        settle(&rule.terms, &out)
    return out.allowed, out.remaining, out.retry_us, out.reset_us


def _restore_decision(CompiledRule rule not None, key, int64_t cost, int source, bint allowed, int64_t remaining,
                      int64_t retry_us, int64_t reset_us):
    """Make the decision that these facts were taken from: for pickle."""
    cdef Outcome out = Outcome(allowed, False, remaining, retry_us, reset_us)
    return decision_new(rule, key, cost, <Source>source, &out)


@cython.final
@cython.freelist(64)
cdef class PendingDecision:
    """What `check` returns: await it once for the `Decision`. It is complete already when no network is needed."""

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
            rt_raise_set()
        taken = <object>result
        Py_DECREF(result)
        if status == PYGEN_RETURN:
            raise StopIteration(taken)
        return taken

    def throw(self, kind, value=None, traceback=None):
        """Raise an exception where this waits (coroutine protocol)."""
        self.close()
        error = kind if value is None else value
        raise error

    def close(self):
        """Stop waiting (coroutine protocol). What was not sent yet is not sent any more."""
        cdef PyObject* decision = self.decision
        self.lets_others_run = False
        if self.mark == DECIDED and decision != NULL:
            self.decision = NULL
            Py_DECREF(decision)
        if self.stage != COMPLETE:
            if self.remote is not None:
                self.remote.leave(self)
            self.stage = COMPLETE
            self.waiter = None

    def __bool__(self):
        # From 3.12 on the repr of a Task asks whether its coroutine is true; that is no decision taken for one.
        if current_frame(0).f_globals.get("__name__") == "asyncio.base_tasks":
            return True
        self.lets_others_run = ASKED_FOR_TRUTH   # that nobody awaits it need not be said as well
        raise TypeError("this is not a decision yet: await it (`if await limiter.check(key):`)")

    def __getattr__(self, name):
        if hasattr(Decision, name) and not name.startswith("_"):
            raise AttributeError(f"a check has no {name!r} yet; await the check first")
        raise AttributeError(f"'PendingDecision' object has no attribute {name!r}")

    def __repr__(self):
        return f"<PendingDecision {'waiting' if self.stage != COMPLETE else 'complete'}>"

    def __dealloc__(self):
        Py_XDECREF(self.decision)


ctypedef PyObject* (*Waits)(PyObject*) noexcept
ctypedef void (*Destroys)(PyObject*) noexcept

cdef enum:
    DECIDED = 100                            # the mark of a check that was decided by the call
    ASKED_FOR_TRUTH = 2
    YIELD_EVERY = 128                        # consecutive complete checks, then the loop gets a turn


cdef object pending_wait(PendingDecision pending):
    """What the decision has to be waited for on; None once it, or what went wrong instead, is there."""
    if pending.stage == NEW:
        try:
            pending.remote.ask(pending)
        except BaseException:
            pending.stage = COMPLETE
            raise
        if pending.stage != COMPLETE:
            pending.remote.complete = 0
            return pending.waiter
        # By a policy, without a wait: a task that goes on asking must not keep the loop from reaching the store again.
        pending.remote.complete += 1
        if pending.remote.complete >= YIELD_EVERY:
            pending.remote.complete = 0
            pending.lets_others_run = True
            return None
    if pending.stage != COMPLETE:
        raise RuntimeError("this check is being awaited already, by another task; each `check(...)` gives one decision")
    if pending.error is not None:
        error, pending.error = pending.error, None
        raise error
    if pending.decision == NULL:
        raise RuntimeError("this check was awaited already; each `check(...)` gives one decision")
    return None


# NULL with an exception, where pending_wait raises.
cdef Waits wait = <Waits><void*>pending_wait


cdef PySendResult pending_send(PyObject* this, PyObject* value, PyObject** result) noexcept:
    if (<PendingDecision>this).decision == NULL:
        result[0] = wait(this)
        if result[0] == NULL:
            return PYGEN_ERROR
        if result[0] != <PyObject*>None:
            return PYGEN_NEXT
        Py_DECREF(result[0])
    if (<PendingDecision>this).lets_others_run:
        (<PendingDecision>this).lets_others_run = False
        Py_INCREF(None)
        result[0] = <PyObject*>None
        return PYGEN_NEXT
    # Handed over, not shared: a decision that nobody keeps can then serve the next check.
    result[0] = (<PendingDecision>this).decision
    (<PendingDecision>this).decision = NULL
    return PYGEN_RETURN


cdef PyObject* pending_next(PyObject* this) noexcept:
    cdef PyObject* result = NULL
    cdef PySendResult status = pending_send(this, <PyObject*>None, &result)
    if status == PYGEN_RETURN:
        rt_set_stop(result)
        return NULL
    return result


# One that was given up: it holds nothing and has no references, the collector doesn't know it, and the next check uses it again.
cdef PyObject* spare_pending = NULL


cdef void pending_given_up(PyObject* this) noexcept:
    """Warn of a check that was never awaited, as a coroutine does."""
    cdef PyObject* decision = (<PendingDecision>this).decision
    cdef bint unawaited = (<PendingDecision>this).stage == NEW or ((<PendingDecision>this).mark == DECIDED and decision != NULL)
    if unawaited:
        unawaited = (<PendingDecision>this).lets_others_run != ASKED_FOR_TRUTH
        (<PendingDecision>this).stage = COMPLETE
        (<PendingDecision>this).lets_others_run = False
        (<PendingDecision>this).decision = NULL
        Py_XDECREF(decision)
        if unawaited and rt_warn_unawaited(this):
            return                               # somebody keeps it
    rt_free_pending(this)


# Through a pointer, so that the compiler leaves the way of those who await free of it.
cdef Destroys give_up = pending_given_up


cdef void pending_dealloc(PyObject* this) noexcept:
    """Keep one for the next check that is decided at once."""
    global spare_pending
    if spare_pending == NULL and (<PendingDecision>this).mark == DECIDED and (<PendingDecision>this).decision == NULL:
        spare_pending = this
    else:
        give_up(this)


cdef int make_spare() except -1:
    cdef PendingDecision pending = PendingDecision.__new__(PendingDecision)
    pending.mark = DECIDED
    PyObject_GC_UnTrack(<PyObject*>pending)
    return 0                                 # it has lost its only reference now


rt_set_slots(<PyTypeObject*>PendingDecision, pending_send, pending_next, pending_dealloc)


@cython.final
@cython.freelist(256)
cdef class Waiter:
    """What a task waits on until a check is decided: what asyncio asks of a future (PEP 3156), and no more.

    A reply decides up to a few hundred checks. Their tasks are stepped by one callback of the loop, in the order of the checks:
    a future each would cost a callback each, which is more than all the rest of a decision.
    """

    def __init__(self):
        raise TypeError("waiters are made by a storage")

    @property
    def _asyncio_future_blocking(self):
        return self.blocking

    @_asyncio_future_blocking.setter
    def _asyncio_future_blocking(self, bint value):
        self.blocking = value

    def get_loop(self):
        """The loop of the task that waits."""
        return self.loop

    def add_done_callback(self, callback, *, context=None):
        """Call `callback(self)` when it is done. A task does this once."""
        if self.callback is not None or self.is_done:
            raise RuntimeError("a check is waited for by one task only")
        self.callback = callback
        self.context = context

    def remove_done_callback(self, callback):
        """Don't call it after all."""
        if self.callback is None or self.callback != callback:
            return 0
        self.callback = None
        return 1

    def cancel(self, msg=None):
        """Stop waiting; what was not sent yet is not sent any more. False if it was done already."""
        if self.is_done:
            return False
        self.is_done = self.is_cancelled = True
        self.message = msg
        pending, self.pending = self.pending, None
        pending.close()
        self.loop.call_soon(self.call_back)
        return True

    def call_back(self):
        """Tell whoever waits."""
        self.call()

    cdef int call(self) except -1:
        callback, self.callback = self.callback, None
        context, self.context = self.context, None
        if callback is None:
            return 0
        if context is None:
            callback(self)
            return 0
        PyContext_Enter(context)
        try:
            callback(self)
        finally:
            PyContext_Exit(context)
        return 0

    def done(self):
        """Whether there is nothing left to wait for."""
        return self.is_done

    def cancelled(self):
        """Whether somebody gave up waiting."""
        return self.is_cancelled

    def result(self):
        """None once it is done. Raises CancelledError."""
        if self.is_cancelled:
            raise CancelledError() if self.message is None else CancelledError(self.message)
        if not self.is_done:
            raise InvalidStateError("the check isn't decided yet")

    def exception(self):
        """None once it is done. Raises CancelledError."""
        return self.result()


@cython.final
cdef class Group:
    """Checks that are waited for together: `future` is done when all of them are."""

    def __init__(self):
        raise TypeError("groups are made by a storage")

    def decisions(self):
        """Their decisions in order. Raises the first error that one of them ended with."""
        cdef PendingDecision pending
        if self.error is not None:
            raise self.error
        found = []
        for pending in self.members:
            found.append(None if pending.decision == NULL else <object>pending.decision)
        return found

    def leave(self):
        """Stop waiting: what was not sent yet is not sent any more."""
        cdef PendingDecision pending
        for pending in self.members:
            if pending.stage != COMPLETE:
                pending.close()


cdef class Remote:
    def _return_leases(self, CompiledRule rule):
        """Give back what is left of leases under a rule that isn't asked about any more."""

    cdef bint allows(self, CompiledRule rule) noexcept:
        """Whether everything is admitted while the store is away, so that no bound denies then."""
        return (rule.policy if rule.policy != OF_STORAGE else self.on_outage) == ALLOW

    cdef int ask(self, PendingDecision pending) except -1:
        """Give `pending` its decision, or a waiter."""
        raise NotImplementedError

    cdef int leave(self, PendingDecision pending) except -1:
        """Forget a check that nobody waits for any more, if it hasn't been sent."""
        raise NotImplementedError


# -------------------------------------------------------------------------------------------------------------- limiter

@cython.final
cdef class Entry:
    """One validated check, on its way to a storage."""

    def __init__(self):
        raise TypeError("entries are made by a limiter")

    cdef inline bint joined(self):
        return PyBytes_AS_STRING(self.canonical)[0] == c"("

    def costing(self, int64_t units):
        """The same entry with another cost."""
        cdef Entry entry = Entry.__new__(Entry)
        entry.rule = self.rule
        entry.key = self.key
        entry.canonical = self.canonical
        entry.cost = units
        return entry

    def asked(self, Decision decision not None):
        """A decision on a cost of 1, as that on a cost of 0, which only asks: allowed."""
        cdef Outcome out = decision.settled()[0]
        out.allowed = True
        out.retry_us = 0
        return decision_new(self.rule, self.key, 0, decision.source_index, &out)

    def blocked(self, bint checks):
        """The decision of a rule with a limit of 0. It is counted if it `checks`."""
        cdef Outcome out = Outcome(self.cost == 0, False, 0, 0 if self.cost == 0 else NEVER, 0)
        if checks:
            count_decision(self.rule, MEMORY, False)
        return decision_new(self.rule, self.key, self.cost, MEMORY, &out)

    def decided(self, str source not None, bint allowed, int64_t remaining, int64_t retry_us, int64_t reset_us):
        """The decision that a storage took on this entry. `retry_us` −1 is never."""
        cdef Outcome out = Outcome(allowed, False, remaining, retry_us, reset_us)
        return decision_new(self.rule, self.key, self.cost, <Source>SOURCES.index(source), &out)


cdef enum:
    COST_MAX = 1_000_000_000                 # under a rule that denies everything


cdef bytes joined_key(object key):
    """A tuple as netstrings, so that no two tuples differ only by where their parts join."""
    cdef list parts = []
    if not key:
        raise InvalidRequest("the key is an empty tuple; a key has at least one part")
    for part in key:
        if isinstance(part, str):
            encoded = utf8(part)
            parts.append(b"s%d:%b" % (len(encoded), encoded))
        elif isinstance(part, int) and not PyBool_Check(part):
            try:
                parts.append(b"i%d " % part)
            except ValueError:
                raise InvalidRequest("a part of the key is an int with more digits than Python prints; use a str") from None
        else:
            raise InvalidRequest(f"a part of the key is a {type(part).__name__}; a tuple key holds only str and int")
    return b"".join(parts)


cdef bytes utf8(object text):
    try:
        return PyUnicode_AsUTF8String(text)  # of a subclass too, whatever its encode() does
    except UnicodeEncodeError:
        raise InvalidRequest("the key holds a lone surrogate and has no UTF-8; decode the bytes it came from strictly") from None


cdef int64_t units_of(object cost, CompiledRule rule, int64_t least=1) except -1:
    """The cost as an integer from `least` (1, or 0 for a peek) to the rule's capacity."""
    cdef int overflow = 0
    cdef long long units
    cdef int64_t most = rule.terms.capacity if rule.limit else COST_MAX
    if PyBool_Check(cost):
        raise InvalidRequest(f"the cost is {cost}; it is a whole number of units, at least {least}")
    try:
        index = PyNumber_Index(cost)
    except TypeError:
        raise InvalidRequest(f"the cost is a {type(cost).__name__}; it is a whole number (int) of units, at least {least}") from None
    units = PyLong_AsLongLongAndOverflow(index, &overflow)
    if overflow > 0 or (overflow == 0 and units > most):
        raise CostExceedsLimit(index, rule.terms.capacity if rule.limit else 0, rule.name)
    if overflow < 0 or units < least:
        hint = "; peek(key, cost=0) says what is left" if overflow == 0 and units == 0 else ""
        raise InvalidRequest(f"the cost is below {least}; it is a whole number of units, at least {least}{hint}")
    return units


cdef class Limiter:
    """The compiled part of a limiter: which rule, is the call valid, and `check`."""

    cdef readonly dict _rules                # name -> CompiledRule
    cdef CompiledRule only                   # the rule that `rule=None` means, while there is just one
    cdef KeyTable table                      # what decides here
    cdef Remote remote                       # or what asks elsewhere
    cdef readonly object _storage
    cdef public bint _closed
    cdef Decision spare_decision             # the last ones made: used again when nobody has kept them
    cdef readonly int _blocking              # rules with a limit of 0
    cdef uint32_t complete                   # complete checks since the loop last had a turn
    cdef object last_key                     # of the check before, a str, and where it belongs: who asks again isn't hashed again
    cdef CompiledRule last_terms
    cdef Place last_place
    cdef uint64_t last_home

    def __init__(self, storage):
        self._storage = storage
        self.remote = storage if isinstance(storage, Remote) else None
        self.table = storage.table if self.remote is None else self.remote.bounds
        self._rules = {}

    def _install(self, CompiledRule rule not None):
        cdef CompiledRule before = self._rules.get(rule.name)
        if rule.tally is not None and rule is not before:    # another limiter counts there, or did
            rule = CompiledRule(*rule.facts())
        rule.tally = Tally.__new__(Tally) if before is None else before.tally
        rule.counts = rule.tally.counts
        self._rules[rule.name] = rule
        self._blocking += (rule.limit == 0) - (before is not None and before.limit == 0)
        if before is not None and self.remote is not None:
            self.remote._return_leases(before)
        self.find_only()

    def _uninstall(self, name):
        cdef CompiledRule rule = self._rules.pop(name)
        self._blocking -= rule.limit == 0
        if self.remote is not None:
            self.remote._return_leases(rule)
        self.find_only()

    cdef int find_only(self) except -1:
        self.only = next(iter(self._rules.values())) if len(self._rules) == 1 and not self._blocking else None
        return 0

    def _counted(self, outcomes):
        """What was decided under each rule that there is: name -> source -> outcomes(allowed, denied)."""
        cdef CompiledRule rule
        cdef dict nothing = dict.fromkeys(SOURCES, outcomes(0, 0)), counted = {}, of_rule
        cdef int source
        for rule in list(self._rules.values()):  # `outcomes` is Python code: another thread may add a rule meanwhile
            of_rule = nothing
            for source in range(len(SOURCES)):
                if rule.counts[2 * source] or rule.counts[2 * source + 1]:
                    if of_rule is nothing:
                        of_rule = nothing.copy()
                    of_rule[SOURCES[source]] = outcomes(rule.counts[2 * source + 1], rule.counts[2 * source])
            counted[rule.name] = of_rule
        return counted

    cdef CompiledRule which(self, object name):
        if name is None:
            if self.only is not None:
                return self.only
            if len(self._rules) == 1:
                return <CompiledRule>next(iter(self._rules.values()))
            if not self._rules:
                raise InvalidRequest("the limiter has no rule yet; add one with add_rule(...)")
            raise InvalidRequest(f"the limiter has several rules; name one (rule=...): {listed(self._rules)}; "
                                 "in check_many write Request(key, rule)")
        if not isinstance(name, str):
            raise InvalidRequest(f"rule is a {type(name).__name__}; it is the name (str) of a rule")
        found = self._rules.get(name)
        if found is None:
            # Without the name: when the arguments were swapped, it is a key.
            raise InvalidRequest(f"the limiter has no such rule; it has {listed(self._rules, name) or 'none yet'}")
        return <CompiledRule>found

    def _entry(self, key, rule=None, cost=1, int64_t least=1):
        """Validate a call; `least` is the lowest cost. Raises InvalidRequest, CostExceedsLimit or LimiterClosed."""
        cdef Entry entry = Entry.__new__(Entry)
        if self._closed:
            raise LimiterClosed()
        entry.rule = self.which(rule)
        entry.cost = units_of(cost, entry.rule, least)
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
        """What `RateThrottleCore.check` does."""
        cdef CompiledRule terms
        cdef int64_t units
        if self._closed:
            raise LimiterClosed()
        terms = self.which(rule)
        units = 1 if cost is 1 else units_of(cost, terms)
        return self.checked(<PyObject*>key, terms, units) if terms.limit else self.denied(terms, key, units)

    @cython.final
    cdef PendingDecision denied(self, CompiledRule terms, object key, int64_t units):
        """The decision of a rule with a limit of 0."""
        cdef Place place
        self.located(key, terms, &place)     # raises for what is no key
        self.blank_outcome()[0] = Outcome(False, False, 0, NEVER, 0)
        return self.completed(terms, <PyObject*>key, units, MEMORY)

    @cython.final
    cdef PendingDecision checked(self, PyObject* given, CompiledRule terms, int64_t units):
        """Decide what is valid but for its key, which the caller holds."""
        cdef bytes joined = None
        cdef Place place
        cdef Outcome* out
        cdef int64_t now_us
        if (given == <PyObject*>self.last_key and terms is self.last_terms and self.table.forks == forks
                and self.last_home == self.table.secret[2]):
            place = self.last_place
        else:
            joined = self.located(<object>given, terms, &place)
        now_us = self.table.now_us()
        # From here on no Python code runs, so that no other thread can come to the spare decision before it is handed out.
        out = self.blank_outcome()
        if self.remote is not None:
            return self.bounded(&place, now_us, units, out, terms, <object>given, joined)
        self.table.decide_located(&place, now_us, units, out)
        return self.completed(terms, given, units, MEMORY)

    @cython.final
    cdef bytes located(self, object key, CompiledRule terms, Place* place):
        """Say where a key belongs. Returns the joined form of a tuple, with its mark; None for a str."""
        cdef bytes joined
        cdef Py_ssize_t length
        cdef const char* data
        if not PyUnicode_Check(key):
            joined = (<Entry>self._entry(key, terms.name)).canonical
            self.table.locate(terms, True, PyBytes_AS_STRING(joined) + 1, PyBytes_GET_SIZE(joined) - 1, place)
            return joined
        data = rt_utf8(key, &length)
        if data == NULL or length == 0:
            PyErr_Clear()
            self._entry(key, terms.name)         # words the error
            raise InvalidRequest("the key has no UTF-8")
        self.table.locate(terms, False, data, length, place)
        if PyUnicode_CheckExact(key):
            self.last_key = key
            self.last_terms = terms
            self.last_place = place[0]
            self.last_home = self.table.secret[2]
        return None

    @cython.final
    cdef PendingDecision bounded(self, const Place* place, int64_t now_us, int64_t units, Outcome* out, CompiledRule terms,
                                 object key, bytes joined):
        """The decision of a bound or a lease, or an awaitable that asks the store."""
        cdef PendingDecision pending
        cdef int64_t found = shard_find(place.shard, place.hashed)
        cdef int verdict = OPEN
        if found >= 0:
            verdict = bound_verdict(<Bound*>slot_at(place.shard, <uint32_t>found), place.terms, terms.lease_units > 0, now_us, units,
                                    self.remote.ttl_us, out)
            if verdict == DENIED and self.table.away and self.remote.allows(terms):
                verdict = OPEN
            if verdict == DENIED or verdict == LEASED:
                return self.completed(terms, <PyObject*>key, units, LEASE if verdict == LEASED else PREFILTER)
        self.complete = 0
        pending = PendingDecision.__new__(PendingDecision)
        pending.stage = NEW
        pending.remote = self.remote
        pending.stale = verdict == STALE
        pending.rule = terms
        pending.key = key
        if joined is None:
            pending.text = key
            pending.data = rt_utf8(key, &pending.size)
            pending.mark = c"="
        else:
            pending.text = joined
            pending.data = PyBytes_AS_STRING(joined) + 1
            pending.size = PyBytes_GET_SIZE(joined) - 1
            pending.mark = c"("
        pending.mode = CHECK
        pending.units = units
        pending.hashed = place.hashed
        return pending

    cdef inline Outcome* blank_outcome(self):
        """Where the next outcome goes: into the last decision made, if nobody has kept it, else into a new one."""
        rt_drop_stop_value()
        if Py_REFCNT(<PyObject*>self.spare_decision) != 1:
            self.spare_decision = Decision.__new__(Decision)
        return &self.spare_decision.out

    cdef inline PendingDecision completed(self, CompiledRule terms, PyObject* key, int64_t units, Source source):
        """The spare decision, its outcome filled in, as an awaitable that is complete."""
        global spare_pending
        cdef PyObject* pending
        cdef PyObject* decision = <PyObject*>self.spare_decision
        # The reference that is handed over, taken first: giving up the last key may run code that checks, and needs another spare.
        Py_INCREF(self.spare_decision)
        if (<Decision>decision).terms is not terms:
            (<Decision>decision).terms = terms
        if <PyObject*>(<Decision>decision).key != key:
            (<Decision>decision).key = <object>key
        (<Decision>decision).cost = units
        (<Decision>decision).source_index = source
        count_decision(terms, source, (<Decision>decision).out.allowed)
        if spare_pending == NULL:
            make_spare()
        pending = spare_pending
        spare_pending = NULL
        (<PendingDecision>pending).decision = decision
        self.complete += 1
        if self.complete >= YIELD_EVERY:
            self.complete = 0
            # Only asyncio takes a bare yield as "next, please"; another loop gives turns by its own rules.
            (<PendingDecision>pending).lets_others_run = running_loop() is not None
        return <PendingDecision>pending


cdef object general_check = Limiter.check
ctypedef PyObject* (*Vectorcall)(PyObject*, PyObject**, size_t, PyObject*) noexcept


@cython.final
cdef class CheckMethod:
    """`check` of a limiter's class. Calls compiled code; all else that it is asked for is that of the `async def` it stands for.

    So `inspect.iscoroutinefunction`, `inspect.signature`, `isinstance` and `unittest.mock` see a coroutine function.
    """

    cdef Vectorcall vectorcall
    cdef PyObject* owner                     # the class; it outlives what hangs from it
    cdef object template

    def __set_name__(self, owner, name):
        self.owner = <PyObject*>owner

    def __get__(self, instance, owner):
        return self if instance is None else PyMethod_New(self, instance)

    def __getattr__(self, name):
        return getattr(self.template, name)

    @property
    def __doc__(self):
        return self.template.__doc__

    @property
    def __module__(self):
        return self.template.__module__

    @property
    def __class__(self):
        return FunctionType                  # `unittest.mock` checks the arguments of functions only

    def __repr__(self):
        return f"<compiled method {self.template.__qualname__}>"


cdef object check_called(PyObject* method, PyObject** args, size_t counted, PyObject* names):
    """`check` as the interpreter calls it: with just a key there is nothing to parse."""
    cdef size_t count = counted & ~PY_VECTORCALL_ARGUMENTS_OFFSET
    if (count == 2 and names == NULL and <PyObject*>Py_TYPE(args[0]) == (<CheckMethod>method).owner
            and not (<Limiter>args[0])._closed and (<Limiter>args[0]).only is not None):
        return (<Limiter>args[0]).checked(args[1], (<Limiter>args[0]).only, 1)
    if count == 0 or not isinstance(<object>args[0], Limiter):
        raise TypeError("check() is a method of a limiter, and was called without one")
    return PyObject_Vectorcall(<PyObject*>general_check, args, count, names)


def compiled_check(template):
    """Stand in for an `async def check` of a subclass of `Limiter`, which is never run."""
    cdef CheckMethod method = CheckMethod.__new__(CheckMethod)
    method.vectorcall = <Vectorcall><void*>check_called
    method.template = template
    rt_set_method(<PyTypeObject*>CheckMethod, <char*>&method.vectorcall - <char*><PyObject*>method)
    return method
