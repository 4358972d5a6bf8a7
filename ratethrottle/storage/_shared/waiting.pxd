"""What waits, for how long, and the one timer of it all: see `waiting.pyx`."""

from cpython.object cimport PyObject
from libc.stdint cimport int64_t, uint64_t

from ratethrottle._core cimport CHECK, COMPLETE, Group, PARKED, PendingDecision, Waiter, WAITING
from ratethrottle._engine.arithmetic cimport Outcome
from ratethrottle._engine.decision cimport count_decision, Decision, Source
from ratethrottle.storage._shared.queue cimport push, Py_INCREF, Queue


cdef extern from "<stdint.h>":
    const int64_t NEVER_US "INT64_MAX"


cdef class Waiting:
    cdef Queue asking                        # for an answer, in the order in which they entered
    cdef Queue parked                        # they ask what another check is asking already
    cdef Queue own                           # nobody waits for these: they take no caller's place, and have no deadline
    cdef readonly Py_ssize_t most            # of callers'
    cdef int64_t deadline_us                 # how long each may wait
    cdef uint64_t turns                      # how many have entered
    cdef bint scheduled                      # somebody is about to send what is queued
    cdef object loop
    cdef object call_soon                    # of the loop
    cdef object context                      # an empty one: what the loop calls belongs to no request
    # Those that are decided, and whose tasks haven't been resumed yet:
    cdef list woken
    cdef object resume                       # resumes them
    cdef bint resumes_itself                 # a caller of `wake` does so in a moment
    # The timer:
    cdef object on_timer
    cdef object call_later                   # of the loop, or of a test's clock
    cdef object timer
    cdef int64_t timer_at_us
    cdef int spares                          # how often in a row nothing was judged yet, for one more look
    cdef int64_t spared_until_us             # when that is
    cdef int64_t excused_until_us            # until then, checks that a blocked loop held up may still be sent
    # A turn of the loop in which callers enter:
    cdef bint turn_due                       # it is going on
    cdef uint64_t turn_from                  # the first that entered in it
    cdef int64_t turn_deadline_us            # and its deadline

    cdef int enter_own(self, PendingDecision pending) except -1
    cdef int drop(self, PendingDecision pending) except -1
    cdef PendingDecision take_any(self)
    cdef PendingDecision take_late(self, int64_t now_us)
    cdef int put_again(self, Queue* again, Queue* own) except -1
    cdef int begin_turn(self) except -1
    cdef int count_from_now(self, int64_t now_us) except -1
    cdef int64_t first_deadline_us(self) noexcept
    cdef int set_timer(self, int64_t now_us, int64_t at_us) except -1
    cdef bint spared(self, int64_t now_us, int64_t first_us, bint serving) except -1
    cdef int excuse(self, int64_t now_us, bint serving) except -1
    cdef int end_excuses(self, int64_t now_us) except -1
    cdef int end(self) except -1

    cdef inline int wake(self, Waiter waiter) except -1:
        waiter.is_done = True
        waiter.pending = None
        self.woken.append(waiter)
        if len(self.woken) == 1 and not self.resumes_itself:
            self.call_soon(self.resume, context=self.context)
        return 0

    cdef inline int enter(self, PendingDecision pending, int64_t now_us, bint parks) except -1:
        """Queue a caller's check; parked if another check is asking the same."""
        cdef Waiter waiter
        # A group has one deadline, however long it takes to enter all of it.
        pending.deadline_us = now_us + self.deadline_us if pending.group is None else pending.group.deadline_us
        pending.turn = self.turns
        self.turns += 1
        if pending.group is None:
            waiter = Waiter.__new__(Waiter)
            waiter.pending = pending
            waiter.loop = self.loop
            waiter.blocking = True
            pending.waiter = waiter
        pending.stage = PARKED if parks else WAITING
        push(&self.parked if parks else &self.asking, pending)
        return self.arm_timer(now_us, self.tick_us(now_us))

    cdef inline int arm_timer(self, int64_t now_us, int64_t at_us) except -1:
        """Have the timer fire by then at the latest."""
        return 0 if self.timer is not None and at_us >= self.timer_at_us else self.set_timer(now_us, at_us)

    cdef inline int64_t tick_us(self, int64_t now_us) noexcept:
        """When to look at what waits: several times before its deadline, to see whether the loop works meanwhile."""
        return now_us + self.deadline_us // 8


cdef inline int complete(PendingDecision pending, object error) except -1:
    """The decision is there, or `error` instead. Wakes the task that waits, together with the others."""
    cdef Group group = pending.group
    cdef Waiter waiter = pending.waiter
    pending.stage = COMPLETE
    pending.error = error
    if waiter is not None:
        pending.waiter = None
        (<Waiting>pending.place).wake(waiter)
    if group is not None:
        if error is not None and group.error is None:
            group.error = error
        group.left -= 1
        if group.left == 0 and not group.future.done():
            group.future.set_result(None)
    return 0


cdef inline int complete_with(PendingDecision pending, Decision decision) except -1:
    if pending.mode == CHECK:
        count_decision(pending.rule, decision.source_index, decision.out.allowed)
    Py_INCREF(<PyObject*>decision)
    pending.decision = <PyObject*>decision
    return complete(pending, None)


cdef inline bint is_gone(PendingDecision pending) except -1:
    """Whether nobody waits for it any more, or waking failed after it was decided."""
    return pending.stage == COMPLETE or pending.group is not None and pending.group.future.cancelled()


cdef object twin_of(object error)


cdef int complete_joint(PendingDecision pending, Source source, const Outcome* outs, const int* reported, int sets,
                        bint allowed, int64_t at_us=*, int64_t epoch=*) except -1
