# cython: auto_pickle=False, autotestdict=False
"""What waits for an answer: queues, deadlines, and one timer for all. Knows nothing of Redis, and belongs to one event loop.

All callers have the same deadline. So they run out of time in the order in which they entered.
"""

cimport cython
from cpython.object cimport PyObject
from libc.stdint cimport int64_t

from ratethrottle._core cimport CHECK_JOINT, COMPLETE, PARKED, Parts, PendingDecision, WAITING
from ratethrottle._engine.arithmetic cimport Outcome
from ratethrottle._engine.decision cimport Decision, Source
from ratethrottle._engine.joint cimport Joint, joint_count, joint_decision, JointDecision
from ratethrottle.storage._shared.queue cimport drain, merge, push, Queue, take

from contextvars import Context


cdef enum:
    LOOK_US = 1_000                          # checks that are out of time are judged so much later: replies are read first
    BLOCKED_US = 10_000                      # a timer that is so late shows that something blocked the loop
    SPARES_MAX = 2
    SPARED_US = 40_000                       # and a store that serves has so long at most to catch up


cdef object twin_of(object error):
    """Each caller raises an exception of its own: a shared one would collect all their tracebacks."""
    twin = type(error)(*error.args)
    twin.__cause__ = error.__cause__
    return twin


def is_queued(PendingDecision pending not None):
    """Whether a check waits to be sent: if it is closed now, it consumes nothing."""
    return pending.stage == WAITING or pending.stage == PARKED


cdef int complete_joint(PendingDecision pending, Source source, const Outcome* outs, const int* reported, int sets,
                        bint allowed, int64_t at_us=0, int64_t epoch=0) except -1:
    """Complete a joint check. outs: of each part; reported: the part that each set reports. at_us, epoch: when the store granted it."""
    cdef Joint joint = (<Parts>pending.text).joint
    cdef Decision decision = joint_decision(joint, source, outs, reported, sets, allowed)
    if isinstance(decision, JointDecision):
        (<JointDecision>decision).at_us = at_us
        (<JointDecision>decision).epoch = epoch
    if pending.mode == CHECK_JOINT:
        joint_count(decision)
    return complete_with(pending, decision)


@cython.final
cdef class Waiting:
    """The queues of one connection, the tasks that it has to resume, and its timer.

    resume: called by the loop when decided checks have to be resumed. on_timer: called when the timer fires.
    timers: what arms the timer; None: the loop.
    """

    def __init__(self, loop, resume, on_timer, Py_ssize_t most, int64_t deadline_us, timers=None):
        self.loop = loop
        self.call_soon = loop.call_soon
        self.call_later = (loop if timers is None else timers).call_later
        self.resume = resume
        self.on_timer = on_timer
        self.most = most
        self.deadline_us = deadline_us
        self.context = Context()
        self.woken = []

    def __dealloc__(self):
        drain(&self.asking)
        drain(&self.own)
        drain(&self.parked)

    @property
    def callers(self):
        """How many callers' checks are queued."""
        return self.asking.count + self.parked.count

    cdef int enter_own(self, PendingDecision pending) except -1:
        """Queue what nobody waits for."""
        pending.stage = WAITING
        pending.place = self
        pending.deadline_us = NEVER_US
        pending.turn = self.turns
        self.turns += 1
        push(&self.own, pending)
        return 0

    cdef int drop(self, PendingDecision pending) except -1:
        """Forget one that is queued."""
        if pending.stage == PARKED:
            take(&self.parked, pending)
        else:
            take(&self.own if pending.deadline_us == NEVER_US else &self.asking, pending)
        pending.stage = COMPLETE
        return 0

    cdef PendingDecision take_any(self):
        """Take the next one of all that are queued, or None."""
        cdef PendingDecision pending
        cdef Queue* queue = &self.asking
        if queue.first == NULL:
            queue = &self.parked
        if queue.first == NULL:
            queue = &self.own
        if queue.first == NULL:
            return None
        pending = <PendingDecision>queue.first
        take(queue, pending)
        return pending

    cdef PendingDecision take_late(self, int64_t now_us):
        """Take the next one that has waited for too long, or None."""
        cdef PendingDecision pending
        cdef Queue* queue = &self.asking
        if queue.first == NULL or (<PendingDecision>queue.first).deadline_us > now_us:
            queue = &self.parked
        if queue.first == NULL or (<PendingDecision>queue.first).deadline_us > now_us:
            return None
        pending = <PendingDecision>queue.first
        take(queue, pending)
        return pending

    cdef int put_again(self, Queue* again, Queue* own) except -1:
        """Queue what was sent and not run, each where it was."""
        merge(again, &self.asking)
        merge(own, &self.own)
        return 0

    # Turns of the loop:

    cdef int begin_turn(self) except -1:
        """The newest caller is the first of a turn: what enters until its end is sent then."""
        self.turn_due = True
        self.turn_from = (<PendingDecision>self.asking.last).turn
        self.turn_deadline_us = (<PendingDecision>self.asking.last).deadline_us
        return 0

    cdef int count_from_now(self, int64_t now_us) except -1:
        """Count deadlines from the end of a long turn of the loop, for checks that entered in it: nothing could be sent before.

        Otherwise most of a large crowd would be out of time while the store was idle.
        """
        cdef int64_t deadline_us = now_us + self.deadline_us
        cdef PyObject* entered = self.asking.last
        self.turn_due = False
        if deadline_us - self.turn_deadline_us <= BLOCKED_US:
            return 0
        while entered != NULL and (<PendingDecision>entered).turn >= self.turn_from:
            (<PendingDecision>entered).deadline_us = deadline_us
            entered = (<PendingDecision>entered).before
        return 0

    # The timer:

    cdef int64_t first_deadline_us(self) noexcept:
        """When the next one that is queued has waited for too long; NEVER_US if there is none."""
        cdef int64_t first_us = NEVER_US
        if self.asking.first != NULL:
            first_us = (<PendingDecision>self.asking.first).deadline_us
        if self.parked.first != NULL:
            first_us = min(first_us, (<PendingDecision>self.parked.first).deadline_us)
        return first_us

    cdef int set_timer(self, int64_t now_us, int64_t at_us) except -1:
        """Have the timer fire then."""
        if self.timer is not None:
            self.timer.cancel()
        self.timer_at_us = max(at_us, now_us)
        self.timer = self.call_later(max(at_us - now_us, <int64_t>0) / 1e6, self.on_timer, context=self.context)
        return 0

    cdef bint spared(self, int64_t now_us, int64_t first_us, bint serving) except -1:
        """Whether to look once more, later, before anything is judged: a reply may have come that isn't read yet.

        If something blocked the loop, checks that it couldn't send, and a connection that it couldn't make, have more time too.
        first_us: the first deadline of all, those of calls included. serving: the store answers.
        """
        cdef int64_t late_us = now_us - self.timer_at_us
        if first_us == NEVER_US:
            self.spares = 0
            return True                      # there is nothing to judge
        # Twice for long blocks, but not for ever: a loop that is always late must not keep anybody waiting.
        if self.spares and (now_us < self.spared_until_us or self.spares == SPARES_MAX or late_us <= self.deadline_us // 4):
            self.spares = self.spares if now_us < self.spared_until_us else 0
            return self.spares > 0
        if late_us > BLOCKED_US:
            self.excuse(now_us, serving)
            late_us = self.excused_until_us - now_us
        elif first_us <= now_us:
            late_us = LOOK_US
        else:
            return True
        self.spares += 1
        self.spared_until_us = now_us + late_us
        return True

    cdef int excuse(self, int64_t now_us, bint serving) except -1:
        """Give what waits more time if the timer is late: something blocked the loop."""
        cdef int64_t late_us = now_us - self.timer_at_us
        if late_us > BLOCKED_US:
            self.excused_until_us = now_us + min(late_us, <int64_t>SPARED_US if serving else self.deadline_us)
        return 0

    cdef int end_excuses(self, int64_t now_us) except -1:
        """A connection serves now, so that checks take little time."""
        self.spared_until_us = min(self.spared_until_us, now_us + SPARED_US)
        self.excused_until_us = min(self.excused_until_us, now_us + SPARED_US)
        return 0

    cdef int end(self) except -1:
        """Wait for nothing any more."""
        timer, self.timer = self.timer, None
        if timer is not None:
            timer.cancel()
        return 0
