"""The awaitable that `check` returns, and what asks a shared store: see `_core.pyx`."""

cimport cython
from cpython.object cimport PyObject
from libc.stdint cimport int64_t, uint32_t, uint64_t

from ratethrottle._engine.definitions cimport CompiledRule, Policy
from ratethrottle._engine.joint cimport Joint
from ratethrottle._engine.keys cimport KeyTable
from ratethrottle._engine.table cimport Hash128


cdef enum Stage:
    COMPLETE                                 # the decision is here, or an error instead, or it was handed over
    NEW                                      # nobody has awaited it yet
    MADE                                     # by the library for itself: nobody will
    WAITING                                  # in the queue of a batch
    PARKED                                   # until another check has asked the same
    SENT

cdef enum Mode:
    CHECK
    PEEK
    RESET
    GIVE_BACK                                # units of a lease, with no check
    CHECK_JOINT                              # several limits at once; also of a call with such checks
    PEEK_JOINT


cdef enum:                                   # marks, beside those that keys have in Redis
    WHOLE = 0                                # the text is all of the key's name in Redis
    JOINT = 38                               # "&": the text is the Parts of a joint check


@cython.final
cdef class PendingDecision:
    cdef PyObject* decision                  # owned until it is handed over; NULL before and after
    cdef int lets_others_run                 # yield to the loop once, although the decision is here; or ASKED_FOR_TRUTH
    cdef Stage stage
    # Of a check that has to ask:
    cdef Backend backend
    cdef CompiledRule rule
    cdef object key
    cdef object text                         # holds `data`: the key itself, or its joined or digested form
    cdef const char* data
    cdef Py_ssize_t size
    cdef char mark                           # "=", "(" or "#", which precedes it in Redis; WHOLE; JOINT; or DECIDED if nothing is asked
    cdef uint32_t tag
    cdef Mode mode
    cdef int64_t units
    cdef Hash128 hashed
    cdef int64_t deadline_us
    cdef uint64_t turn                       # its number among those that entered its queue
    cdef bint stale                          # a bound that should be asked again denied it
    cdef object place                        # the Waiting that it is queued in
    cdef Waiter waiter                       # what its task waits on
    cdef Group group                         # or the group that waits on it
    cdef object error
    cdef PyObject* before                    # neighbours in a queue, or in an entry
    cdef PyObject* after


@cython.final
cdef class Waiter:
    cdef PendingDecision pending
    cdef object loop
    cdef object callback
    cdef object context
    cdef object message
    cdef bint blocking
    cdef bint is_done
    cdef bint is_cancelled

    cdef int call(self) except -1


@cython.final
cdef class Group:
    cdef readonly list members
    cdef readonly object future
    cdef object error
    cdef Py_ssize_t left
    cdef int64_t deadline_us


@cython.final
cdef class Parts:
    """What a joint check that has to ask consists of. The check's own rule, key, units and hash are those of its first part."""

    cdef readonly Joint joint
    cdef list members                        # a PendingDecision for each part, which nobody awaits
    cdef bint deferred                       # the store has put it off once, since it was busy with others


cdef class Backend:
    """What asks a store that is shared: the base of `SharedStorage`."""

    cdef readonly KeyTable bounds
    cdef int64_t ttl_us                      # a bound denies for this long before it is asked again
    cdef int complete                        # consecutive checks that had to ask, and were answered without a wait
    cdef Policy on_outage

    cdef bint allows(self, CompiledRule rule) noexcept
    cdef int ask(self, PendingDecision pending) except -1
    cdef int leave(self, PendingDecision pending) except -1
