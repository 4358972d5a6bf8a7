# cython: auto_pickle=False, autotestdict=False
"""What becomes of the checks in a call: they are decided by its answers, fail, or wait again."""

cimport cython
from cpython.object cimport PyObject
from libc.stdint cimport int64_t
from libc.string cimport memset

from ratethrottle._core cimport CHECK, COMPLETE, GIVE_BACK, PARKED, PendingDecision, RESET, WAITING
from ratethrottle._engine.arithmetic cimport Outcome, take_answer
from ratethrottle._engine.decision cimport decision_new, REDIS
from ratethrottle._engine.definitions cimport CompiledRule
from ratethrottle.storage._shared.call cimport (
    Answers, answers_in, Call, CallItem, CheckCall, ControlCall, DEFERRED, UNREADABLE,
)
from ratethrottle.storage._shared.context cimport StorageContext
from ratethrottle.storage._shared.fallback cimport Fallback, repairing
from ratethrottle.storage._shared.known cimport KnownKeys
from ratethrottle.storage._shared.link cimport AWAY, Link
from ratethrottle.storage._shared.queue cimport merge, push, Queue, take, take_over
from ratethrottle.storage._shared.repair cimport Repair
from ratethrottle.storage._shared.waiting cimport complete, complete_with, is_gone, NEVER_US, twin_of, Waiting

from ratethrottle.errors import StateUnreadable, StorageTimeout


@cython.final
cdef class Settlement:
    """Settles the calls of one connection."""

    def __init__(self, StorageContext context not None, Link link not None, KnownKeys known not None, Waiting waiting not None,
                 Fallback fallback not None):
        self.context = context
        self.link = link
        self.known = known
        self.waiting = waiting
        self.fallback = fallback

    cdef int settle(self, CheckCall call, const int64_t* numbers, int count, int64_t now_us) except -1:
        """Give everybody in a call its decision, and remember what the store has said."""
        cdef int64_t took_us = max(now_us - call.sent_us, <int64_t>1)
        cdef const int64_t* generations = numbers + 1 + call.answers
        cdef Answers answer = answers_in(numbers, count)
        cdef Repair repair = self.context.repair
        cdef PendingDecision sample
        cdef int i
        # The least of late, so that one that stalled says nothing of the next.
        self.took_us = min(took_us, self.took_us + self.took_us // 8 + 100) if self.took_us else took_us
        if not self.context.bounds.owing:    # what was admitted here is as old as this process's clock says
            repair.ahead_us = numbers[0] - now_us
        repair.newest_us = max(repair.newest_us, numbers[0])
        if call.mode == RESET:
            for i in range(call.size):
                self.known.forget_used(&call.items[i], numbers[call.items[i].key_index], numbers[0], now_us)
                self.settle_item(call, &call.items[i], NULL, 0)
            return 0
        while call.next_answer(&answer):
            if answer.numbers[0] < 0:
                self.settle_undecided(call, answer.item, answer.numbers[0], now_us)
                continue
            sample = <PendingDecision>answer.item.waiters.first
            self.settle_item(call, answer.item, answer.numbers, answer.ahead)
            self.known.learn(call, answer.item, sample, &answer, numbers[0], now_us)
            if generations < answer.end and generations[0] == answer.number:
                repair.note_generation(sample, generations[1], numbers[0], now_us)
                generations += 2
        if self.known.leases:
            self.waiting.arm_timer(now_us, self.known.first_lease_us())
        return 0

    cdef int settle_item(self, CheckCall call, CallItem* item, const int64_t* answer, int64_t ahead) except -1:
        cdef PendingDecision pending
        cdef CompiledRule rule = <CompiledRule>item.rule
        cdef Outcome out
        cdef int64_t position = 0
        while item.waiters.first != NULL:
            pending = <PendingDecision>item.waiters.first
            take(&item.waiters, pending)
            if pending.stage == COMPLETE:    # it gave up, but its place in the count is its own
                position += pending.mode == CHECK
            elif answer == NULL or pending.mode == GIVE_BACK:
                complete(pending, None)
            else:
                take_answer(&rule.terms, answer, ahead, pending.units, position, &out)
                position += pending.mode == CHECK
                complete_with(pending, decision_new(rule, pending.key, pending.units, REDIS, &out))
        return 0

    cdef int settle_undecided(self, CheckCall call, CallItem* item, int64_t kind, int64_t now_us) except -1:
        """Settle an item that the store has not decided."""
        cdef PendingDecision pending
        if kind == DEFERRED:
            return self.take_item_back(call, item)
        # Only the checks of this key get an error: its state can't be read.
        error = StateUnreadable((<CompiledRule>item.rule).name) if kind == UNREADABLE else None
        self.known.unanswered(item)          # only now: to make an error runs other code, which may move the bound
        while item.waiters.first != NULL:
            pending = <PendingDecision>item.waiters.first
            take(&item.waiters, pending)
            if pending.stage == COMPLETE:
                continue
            if error is None:                # others may still tell of more that was used
                self.fallback.decide(pending, repairing(), now_us)
            else:
                complete(pending, None if pending.mode == GIVE_BACK else twin_of(error))
        if error is not None:
            self.link.notice("state_unreadable", error.rule)
        return 0

    cdef int unpark(self) except -1:
        """What waited for another check's answer: most of it is answered by that."""
        cdef Waiting waiting = self.waiting
        cdef Queue parked = waiting.parked, freed
        cdef PendingDecision pending
        cdef int64_t now_us
        cdef bint asked = False
        if parked.count == 0:
            return 0
        now_us = self.context.bounds.now_us()
        memset(&waiting.parked, 0, sizeof(Queue))
        memset(&freed, 0, sizeof(Queue))
        while parked.first != NULL:
            pending = <PendingDecision>parked.first
            take(&parked, pending)
            if is_gone(pending):
                pending.stage = COMPLETE
            elif not self.known.decide(pending, now_us, self.link.why & AWAY, &asked):
                pending.stage = PARKED if asked else WAITING
                push(&waiting.parked if asked else &freed, pending)
        merge(&freed, &waiting.asking)
        return 0

    cdef int fail(self, Call sent, error, bint whatever=False) except -1:
        """Give everybody in a call what the outage policy says, or an error, `whatever` that is. A control call is sent again later."""
        cdef CheckCall call
        cdef CallItem* item
        cdef PendingDecision pending
        cdef int64_t now_us = self.context.bounds.now_us()
        cdef int i
        if isinstance(sent, ControlCall):
            self.context.repair.lose(<ControlCall>sent)
        if not isinstance(sent, CheckCall):
            return 0
        call = <CheckCall>sent
        for i in range(call.size):
            item = &call.items[i]
            self.known.unanswered(item)
            while item.waiters.first != NULL:
                pending = <PendingDecision>item.waiters.first
                take(&item.waiters, pending)
                if pending.stage == COMPLETE:
                    continue
                if whatever:
                    complete(pending, twin_of(error))
                else:
                    self.fallback.decide(pending, error, now_us)
        return 0

    cdef int take_back(self, CheckCall call) except -1:
        """What was not run waits again, each where it was."""
        cdef int i
        for i in range(call.size):
            self.take_item_back(call, &call.items[i])
        return 0

    cdef int take_item_back(self, CheckCall call, CallItem* item) except -1:
        """What an item asked waits again, each where it was."""
        cdef PendingDecision pending, sample = <PendingDecision>item.waiters.first if item.waiters.count else None
        cdef Queue again, own
        memset(&again, 0, sizeof(Queue))
        memset(&own, 0, sizeof(Queue))
        while item.waiters.first != NULL:
            pending = <PendingDecision>item.waiters.first
            if pending.stage == COMPLETE:
                take(&item.waiters, pending)
                continue
            pending.stage = WAITING
            take_over(&item.waiters, &own if pending.deadline_us == NEVER_US else &again, pending)
        self.waiting.put_again(&again, &own)
        return self.known.take_back(item, sample, call.epoch)

    cdef int expire(self, CheckCall call, int64_t now_us, int64_t heard_us, bint late) except -1:
        """Answer checks that have waited too long. heard_us: when anything was answered last.

        late: this or an earlier reply has been waited for longer than the deadline.
        """
        cdef int i
        cdef PyObject* waiter
        cdef PendingDecision pending
        cdef int64_t deadline_us = self.context.deadline_us
        cdef bint answered = heard_us > call.sent_us and 2 * (now_us - heard_us) < deadline_us
        call.deadline_us = NEVER_US
        for i in range(call.size):
            waiter = call.items[i].waiters.first
            while waiter != NULL:
                pending = <PendingDecision>waiter
                waiter = pending.after
                if pending.stage == COMPLETE:
                    continue
                if pending.deadline_us > now_us:
                    call.deadline_us = min(call.deadline_us, pending.deadline_us)
                # The store is slow only if it was what held this up: nothing else was answered, and it didn't wait here for longer.
                elif not late and (answered or 2 * (pending.deadline_us - call.sent_us) < deadline_us):
                    self.fallback.overload(pending, f"the check was not answered within {deadline_us / 1e6} s; it may have been counted")
                else:
                    self.fallback.decide(pending, StorageTimeout(deadline_us / 1e6), now_us)
        return 0
