# cython: auto_pickle=False, autotestdict=False
"""The door of the compiled core: the limiter's `check`, and the awaitable that it returns.

`ratethrottle._engine` decides. This module does no I/O; a backend asks a shared store for it.
"""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from cpython.object cimport PyObject, PyTypeObject
from libc.stdint cimport int64_t, uint32_t, uint64_t

from ratethrottle._coroutine cimport (
    Py_DECREF, Py_INCREF, Py_REFCNT, Py_TYPE, Py_XDECREF, PY_VECTORCALL_ARGUMENTS_OFFSET, PyContext_Enter, PyContext_Exit,
    PyDict_GetItemWithError, PyErr_Clear, PYGEN_ERROR, PYGEN_NEXT, PYGEN_RETURN, PyObject_GC_UnTrack, PyObject_Vectorcall,
    PySendResult, PyUnicode_Check, PyUnicode_CheckExact, rt_drop_stop_value, rt_free_pending, rt_raise_set, rt_set_method,
    rt_set_slots, rt_set_stop, rt_utf8, rt_warn_unawaited,
)
from ratethrottle._engine.arithmetic cimport Outcome
from ratethrottle._engine.bound cimport Bound, bound_verdict, DENIED, LEASED, OPEN, STALE
from ratethrottle._engine.decision cimport (
    count_decision, Decision, decision_blank, decisions_counted, Entry, entry_new, LEASE, MEMORY, outcome_uncounted, PREFILTER,
    Source, units_of,
)
from ratethrottle._engine.definitions cimport ALLOW, CompiledRule, OF_STORAGE
from ratethrottle._engine.joint cimport Joint, Several
from ratethrottle._engine.keys cimport forks, KeyTable
from ratethrottle._engine.table cimport cell_at, Hash128, Place, shard_find
from ratethrottle._method cimport CheckMethod, KeyCall, ParsedCall, RuleCall

from asyncio import _get_running_loop as running_loop
from asyncio import CancelledError, InvalidStateError
from sys import _getframe as current_frame

from ratethrottle.errors import LimiterClosed


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
        """Stop waiting (coroutine protocol). A check that isn't sent yet won't be."""
        cdef PyObject* decision = self.decision
        self.lets_others_run = False
        if self.mark == DECIDED and decision != NULL:
            self.decision = NULL
            Py_DECREF(decision)
        if self.stage != COMPLETE:
            if self.backend is not None:
                self.backend.leave(self)
            self.stage = COMPLETE
            self.waiter = None

    def __bool__(self):
        # From 3.12 on, the repr of a Task asks whether its coroutine is true. That is no mistake of a caller.
        if current_frame(0).f_globals.get("__name__") == "asyncio.base_tasks":
            return True
        self.lets_others_run = ASKED_FOR_TRUTH   # no second warning that nobody awaits it
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
    """Return what to wait on; None once the decision is there. Raises what went wrong instead of one."""
    if pending.stage == NEW:
        try:
            pending.backend.ask(pending)
        except BaseException:
            pending.stage = COMPLETE
            raise
        if pending.stage != COMPLETE:
            pending.backend.complete = 0
            return pending.waiter
        # Decided by a policy, without a wait: a task that keeps asking must not keep the loop from reaching the store again.
        pending.backend.complete += 1
        if pending.backend.complete >= YIELD_EVERY:
            pending.backend.complete = 0
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
    # Handed over, not shared, so that a decision which nobody keeps can serve the next check.
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


# One without references, for the next check to use again. It holds nothing, and the garbage collector doesn't know it.
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


# Through a pointer, so that the compiler doesn't inline it into the usual path.
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
    return 0                                 # its only reference is gone now, so `pending_dealloc` has kept it


rt_set_slots(<PyTypeObject*>PendingDecision, pending_send, pending_next, pending_dealloc)


@cython.final
@cython.freelist(256)
cdef class Waiter:
    """What a task waits on until a check is decided: as much of a future (PEP 3156) as asyncio needs.

    A reply decides up to a few hundred checks. One callback of the loop steps all their tasks, in the order of the checks. With a
    future for each, each would need a callback, which costs more than all the rest of a decision.
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
        """Stop waiting; a check that isn't sent yet won't be. False if it was done already."""
        if self.is_done:
            return False
        self.is_done = self.is_cancelled = True
        self.message = msg
        pending, self.pending = self.pending, None
        pending.close()
        self.loop.call_soon(self.call_back)
        return True

    def call_back(self):
        """Call the callback of the task that waits."""
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
        """Stop waiting. Checks that aren't sent yet won't be."""
        cdef PendingDecision pending
        for pending in self.members:
            if pending.stage != COMPLETE:
                pending.close()


@cython.final
cdef class Parts:
    pass


cdef class Backend:
    def _return_leases(self, CompiledRule rule):
        """Give back what is left of the leases under a rule that is no longer in use."""

    cdef bint allows(self, CompiledRule rule) noexcept:
        """Whether every check is admitted while the store is away, so that no bound may deny."""
        return (rule.policy if rule.policy != OF_STORAGE else self.on_outage) == ALLOW

    cdef int ask(self, PendingDecision pending) except -1:
        """Give `pending` its decision, or a waiter."""
        raise NotImplementedError

    cdef int leave(self, PendingDecision pending) except -1:
        """Forget a check that nobody waits for any more, if it isn't sent yet."""
        raise NotImplementedError


cdef class Limiter:
    """The compiled part of a limiter: it finds the rule, validates the call, and checks."""

    cdef readonly dict _rules                # name -> CompiledRule
    cdef CompiledRule only                   # the one that `rule=None` means, while there is only one
    cdef KeyTable table                      # decides here
    cdef Backend backend                     # or asks a shared store; then the table holds its bounds
    cdef public Several _several             # finds rules that are no names, and decides by several of them
    cdef readonly object _storage
    cdef public bint _closed
    cdef Decision spare_decision             # the last one made: used again if nobody has kept it
    cdef readonly int _uncounted             # rules that count nothing
    cdef uint32_t complete                   # complete checks since the loop last had a turn
    # The key (a str) and rule of the check before, and where they belong: the same key isn't hashed twice in a row.
    cdef object last_key
    cdef CompiledRule last_rule
    cdef Place last_place
    cdef uint64_t last_home

    def __init__(self, storage):
        self._storage = storage
        self.backend = storage if isinstance(storage, Backend) else None
        self.table = storage.table if self.backend is None else self.backend.bounds
        self._rules = {}
        self._several = Several(self._rules)

    def _install(self, CompiledRule rule not None):
        cdef CompiledRule before = self._rules.get(rule.name)
        if rule.tally is not None and rule is not before:    # another limiter counts there, or did
            rule = CompiledRule(*rule.facts())
        self._several.count_in(rule, before)
        self._rules[rule.name] = rule
        self._uncounted += (not rule.counted) - (before is not None and not before.counted)
        if before is not None and self.backend is not None:
            self.backend._return_leases(before)
        self.find_only()

    def _uninstall(self, name):
        cdef CompiledRule rule = self._rules.pop(name)
        self._uncounted -= not rule.counted
        if self.backend is not None:
            self.backend._return_leases(rule)
        self.find_only()

    cdef int find_only(self) except -1:
        self.only = next(iter(self._rules.values())) if len(self._rules) == 1 and not self._uncounted else None
        return self._several.renew()

    def _counted(self, outcomes):
        """The decisions under each rule of now: name -> source -> outcomes(allowed, denied)."""
        return decisions_counted(self._several.counted(), outcomes)

    cdef CompiledRule which(self, object name):
        return self.only if name is None and self.only is not None else self._several.named(name)

    def _entry(self, key, rule=None, cost=1, int64_t least=1):
        """Validate a call; `least` is the lowest cost. Raises InvalidRequest, CostExceedsLimit or LimiterClosed."""
        if self._closed:
            raise LimiterClosed()
        return entry_new(self.which(rule), key, cost, least)

    def check(self, key, rule=None, *, cost=1):
        """Check a call, as `RateThrottleCore.check` says."""
        if rule is not None or self.only is None or self._closed:
            return check_by(self, <PyObject*>key, <PyObject*>rule, <PyObject*>cost)
        return self.checked(<PyObject*>key, self.only, 1 if cost is 1 else units_of(cost, self.only, 1))

    def _check_joint(self, Joint joint not None):
        """Check several keys together. The limiter isn't closed."""
        return self.joined(None, joint)

    @cython.final
    cdef PendingDecision joined(self, object key, Joint joint):
        """Decide on several limits, or return an awaitable that asks the store; `key` is that of a plan."""
        rt_drop_stop_value()
        decision = self._several.decide(key, joint)
        if isinstance(decision, PendingDecision):
            self.complete = 0
            return <PendingDecision>decision
        Py_INCREF(decision)
        return self.wrapped(<PyObject*>decision)

    @cython.final
    cdef PendingDecision at_once(self, CompiledRule rule, object key, int64_t units):
        """The decision of a rule that counts nothing."""
        cdef Place place
        self.located(<PyObject*>key, rule, &place)  # raises if it isn't a key
        rt_drop_stop_value()
        self.blank_outcome()[0] = outcome_uncounted(rule, units)
        return self.completed(rule, <PyObject*>key, units, MEMORY)

    @cython.final
    cdef PendingDecision checked(self, PyObject* given, CompiledRule rule, int64_t units):
        """Decide on a key, which isn't validated yet and which the caller holds."""
        cdef Place place
        cdef Outcome* out
        cdef int64_t now_us
        if self.backend is not None:
            return self.bounded(given, rule, units)
        if self.is_last(given, <PyObject*>rule):
            place = self.last_place
        else:
            self.located(given, rule, &place)
        now_us = self.table.now_us()
        rt_drop_stop_value()
        # From here on no Python code runs, so no other thread can take the spare decision before this check hands it out.
        out = self.blank_outcome()
        self.table.decide_place(&place, now_us, units, out)
        return self.completed(rule, given, units, MEMORY)

    cdef inline bint is_last(self, PyObject* given, PyObject* rule) noexcept:
        """Whether the check before had this very key and rule, and `last_place` still holds."""
        return (given == <PyObject*>self.last_key and rule == <PyObject*>self.last_rule and self.table.forks == forks
                and self.last_home == self.table.secret[2])

    @cython.final
    cdef bint is_noted(self, PyObject* given, CompiledRule rule) noexcept:
        """Make a str the last key, if no Python code has to run for that. Returns whether it is."""
        cdef const char* data
        cdef Py_ssize_t length
        if self.table.forks != forks or rule.home != self.table.secret[2] or not PyUnicode_CheckExact(<object>given):
            return False
        data = rt_utf8(<object>given, &length)
        if data == NULL or length == 0:
            PyErr_Clear()
            return False                         # `located` raises the error
        self.table.hash_key(rule, False, data, length, &self.last_place)
        self.last_key = <object>given
        if rule is not self.last_rule:
            self.last_rule = rule
        self.last_home = rule.home
        return True

    @cython.final
    cdef bytes located(self, PyObject* given, CompiledRule rule, Place* place):
        """Locate a key. Returns the joined form of a tuple, with its mark; None for a str."""
        cdef Entry entry
        self.table.notice_fork()
        self.table.terms_of(rule)
        if self.is_noted(given, rule):
            place[0] = self.last_place
            return None
        entry = entry_new(rule, <object>given, 1, 1)  # raises if it isn't a key
        self.table.locate_entry(entry, place)
        return entry.canonical if entry.joined() else None

    @cython.final
    cdef PendingDecision bounded(self, PyObject* given, CompiledRule rule, int64_t units):
        """Decide by a bound or a lease, or return an awaitable that asks the store."""
        cdef bytes joined = None
        cdef Place place
        cdef Outcome* out
        cdef int64_t now_us, found
        cdef int verdict = OPEN
        if self.is_last(given, <PyObject*>rule):
            place = self.last_place
        else:
            joined = self.located(given, rule, &place)
        now_us = self.table.now_us()
        rt_drop_stop_value()
        out = self.blank_outcome()               # as in `checked`, no Python code runs from here on
        found = shard_find(place.shard, place.hashed)
        if found >= 0:
            verdict = bound_verdict(<Bound*>cell_at(place.shard, <uint32_t>found), place.terms, rule.lease_units > 0, now_us, units,
                                    self.backend.ttl_us, out)
            if verdict == DENIED and self.table.away and self.backend.allows(rule):
                verdict = OPEN
            if verdict == DENIED or verdict == LEASED:
                return self.completed(rule, given, units, LEASE if verdict == LEASED else PREFILTER)
        return self.to_ask(<object>given, joined, rule, units, place.hashed, verdict == STALE)

    @cython.final
    cdef PendingDecision to_ask(self, object key, bytes joined, CompiledRule rule, int64_t units, Hash128 hashed, bint stale):
        """An awaitable that asks the store; `joined`: the joined form of a tuple, with its mark."""
        cdef PendingDecision pending
        self.complete = 0
        pending = PendingDecision.__new__(PendingDecision)
        pending.stage = NEW
        pending.backend = self.backend
        pending.stale = stale
        pending.rule = rule
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
        pending.hashed = hashed
        return pending

    cdef inline Outcome* blank_outcome(self) except NULL:
        """The outcome to fill in next: of the last decision made if nobody has kept it, else of a new one."""
        if Py_REFCNT(<PyObject*>self.spare_decision) != 1:
            self.spare_decision = decision_blank()
        return &self.spare_decision.out

    cdef inline PendingDecision completed(self, CompiledRule rule, PyObject* key, int64_t units, Source source):
        """Wrap the spare decision, whose outcome is filled in, in an awaitable that is complete."""
        cdef PyObject* decision = <PyObject*>self.spare_decision
        # The reference to hand over is taken first: dropping the last key may run code that checks, and needs another spare.
        Py_INCREF(self.spare_decision)
        if (<Decision>decision).compiled is not rule:
            (<Decision>decision).compiled = rule
        if <PyObject*>(<Decision>decision).key != key:
            (<Decision>decision).key = <object>key
        (<Decision>decision).cost = units
        (<Decision>decision).source_index = source
        count_decision(rule, source, (<Decision>decision).out.allowed)
        return self.wrapped(decision)

    cdef inline PendingDecision wrapped(self, PyObject* decision):
        """Put a decision, whose reference this takes over, into an awaitable that is complete."""
        global spare_pending
        cdef PyObject* pending
        if spare_pending == NULL:
            make_spare()
        pending = spare_pending
        spare_pending = NULL
        (<PendingDecision>pending).decision = decision
        self.complete += 1
        if self.complete >= YIELD_EVERY:
            self.complete = 0
            # Only asyncio takes a bare yield as a request for a turn; another loop gives turns by its own rules.
            (<PendingDecision>pending).lets_others_run = running_loop() is not None
        return <PendingDecision>pending


cdef object general_check = Limiter.check, ONE = 1


cdef PendingDecision check_only(Limiter limiter, PyObject* given):
    """Check a key by the only rule, at a cost of 1."""
    cdef PyObject* rule
    cdef Outcome* out
    if limiter.backend is not None:
        return limiter.bounded(given, limiter.only, 1)
    if limiter.table.clock is None:
        rt_drop_stop_value()                     # may run a finalizer of a key; from here on no Python code runs
        rule = <PyObject*>limiter.only           # so this needs no reference
        if rule != <PyObject*>None and (limiter.is_last(given, rule) or limiter.is_noted(given, <CompiledRule>rule)):
            out = limiter.blank_outcome()
            limiter.table.decide_located(&limiter.last_place, limiter.table.now_us(), 1, out)
            return limiter.completed(<CompiledRule>rule, given, 1, MEMORY)
    return limiter.checked(given, limiter.only if limiter.only is not None else limiter.which(None), 1)


cdef PendingDecision check_by(Limiter limiter, PyObject* given, PyObject* named, PyObject* cost):
    """Check by a rule's name, by the only rule (None), or by whatever else names rules."""
    cdef PyObject* found = NULL
    cdef CompiledRule rule
    cdef int64_t units
    if limiter._closed:
        raise LimiterClosed()
    if PyUnicode_Check(<object>named):
        found = PyDict_GetItemWithError(limiter._rules, <object>named)
    elif named != <PyObject*>None:
        meant = limiter._several.find(<object>named)
        if isinstance(meant, Joint):
            return limiter.joined(<object>given, limiter._several.costing(<Joint>meant, <object>cost))
        found = <PyObject*>meant
    rule = <CompiledRule>found if found != NULL else limiter.which(<object>named)
    units = 1 if <object>cost is 1 else units_of(<object>cost, rule, 1)
    return limiter.checked(given, rule, units) if rule.counted else limiter.at_once(rule, <object>given, units)


cdef KeyCall check_fast = <KeyCall><void*>check_only     # NULL with an exception, if they raise
cdef RuleCall check_named = <RuleCall><void*>check_by


cdef object check_parsed(PyObject** args, size_t count, PyObject* names):
    if count == 0 or not isinstance(<object>args[0], Limiter):
        raise TypeError("check() is a method of a limiter, and was called without one")
    return PyObject_Vectorcall(<PyObject*>general_check, args, count, names)


cdef ParsedCall check_slowly = <ParsedCall><void*>check_parsed


cdef PyObject* check_called(PyObject* method, PyObject** args, size_t counted, PyObject* names) noexcept:
    """`check` as the interpreter calls it. A call with a key, or with a key and a rule, needs no parsing."""
    cdef size_t count = counted & ~PY_VECTORCALL_ARGUMENTS_OFFSET
    if (count == 2 and names == NULL and <PyObject*>Py_TYPE(args[0]) == (<CheckMethod>method).owner
            and not (<Limiter>args[0])._closed and (<Limiter>args[0]).only is not None):
        return check_fast(args[0], args[1])
    if count == 3 and names == NULL and <PyObject*>Py_TYPE(args[0]) == (<CheckMethod>method).owner:
        return check_named(args[0], args[1], args[2], <PyObject*>ONE)
    return check_slowly(args, count, names)


def compiled_check(template):
    """Stand in for an `async def check` of a subclass of `Limiter`, which is never run."""
    cdef CheckMethod method = CheckMethod.__new__(CheckMethod)
    method.vectorcall = check_called
    method.template = template
    rt_set_method(<PyTypeObject*>CheckMethod, <char*>&method.vectorcall - <char*><PyObject*>method)
    return method
