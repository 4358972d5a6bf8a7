# cython: auto_pickle=False, autotestdict=False
"""What becomes of the checks in a call: they are decided by its answers, fail, or wait again."""

cimport cython
from cpython.object cimport PyObject
from libc.stdint cimport int64_t
from libc.string cimport memset

from ratethrottle._core cimport CHECK, CHECK_JOINT, COMPLETE, GIVE_BACK, Mode, PARKED, Parts, PendingDecision, RESET, WAITING
from ratethrottle._engine.arithmetic cimport Outcome, take_answer, Terms
from ratethrottle._engine.decision cimport decision_new, REDIS
from ratethrottle._engine.definitions cimport CompiledRule
from ratethrottle._engine.joint cimport joint_outcome, PARTS_MAX
from ratethrottle._engine.turns cimport take_booking
from ratethrottle.storage._shared.call cimport Answers, answers_in, Call, CheckCall, ControlCall
from ratethrottle.storage._shared.context cimport StorageContext
from ratethrottle.storage._shared.fallback cimport Fallback, repairing
from ratethrottle.storage._shared.item cimport BOOKINGS, CallItem, DEFERRED, EVENLY, UNASKED, UNREADABLE, UNSURE
from ratethrottle.storage._shared.joint cimport allowed_of, PartAnswer, read_parts, take_corrections, take_looks, take_payers
from ratethrottle.storage._shared.known cimport KnownKeys
from ratethrottle.storage._shared.link cimport AWAY, Link
from ratethrottle.storage._shared.queue cimport merge, push, Queue, take, take_over
from ratethrottle.storage._shared.repair cimport Repair
from ratethrottle.storage._shared.waiting cimport complete, complete_joint, complete_with, is_gone, NEVER_US, twin_of, Waiting

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
        if call.mode >= RESET:
            if call.mode != RESET:
                return self.settle_with_parts(call, numbers, count, now_us)
            for i in range(call.size):
                self.known.forget_used(&call.items[i], numbers[call.items[i].key_index], numbers[0], now_us)
                self.settle_item(call, &call.items[i], NULL, 0)
            return 0
        while call.next_answer(&answer):
            if answer.numbers[0] < 0:
                self.settle_undecided(call, answer.item, <CompiledRule>answer.item.rule, answer.numbers[0], now_us)
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

    cdef int settle_undecided(self, CheckCall call, CallItem* item, CompiledRule rule, int64_t kind, int64_t now_us) except -1:
        """Settle an item that the store has not decided, as of that rule."""
        cdef PendingDecision pending
        if kind == DEFERRED:
            return self.take_item_back(call, item)
        # Only the checks of this key get an error: its state can't be read.
        error = StateUnreadable(rule.name) if kind == UNREADABLE else None
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

    # Joint checks:

    cdef int settle_with_parts(self, CheckCall call, const int64_t* numbers, int count, int64_t now_us) except -1:
        """As `settle`, and then settle the joint checks."""
        cdef const int64_t* at = numbers + 1 + call.other_answers
        cdef const int64_t* end = numbers + count
        cdef const int64_t* generations = numbers + 1 + call.answers
        cdef PartAnswer[PARTS_MAX] found
        cdef Parts parts
        cdef int first = 0, size
        cdef int64_t p
        call.mode = <Mode>(call.mode - CHECK_JOINT)
        self.settle(call, numbers, count, now_us)
        call.mode = <Mode>(call.mode + CHECK_JOINT)
        while first < call.parts:
            size = call.joint_size(first)
            at = read_parts(call.part_at(first), size, at, end, found)
            parts = <Parts>(<PendingDecision>call.part_at(first).waiters.first).text
            if allowed_of(call.part_at(first), size, 0, found) < 0:
                self.settle_undecided_joint(call, first, size, found, now_us)
            else:
                self.settle_joint(call, first, size, found, numbers[0])
                self.learn_parts(call, first, parts, found, numbers[0], now_us)
            while generations < end and generations[0] <= call.size + first + size:
                p = generations[0] - call.size - first - 1
                if p >= 0:
                    self.context.repair.note_generation(<PendingDecision>parts.members[p], generations[1], numbers[0], now_us)
                generations += 2
            first += size
        return 0

    cdef int settle_joint(self, CheckCall call, int first, int size, const PartAnswer* found, int64_t server_us) except -1:
        """Give equal joint checks their decisions: the first ones are allowed, and the others hear what the next one would."""
        cdef CallItem* item = call.part_at(first)
        cdef PendingDecision pending
        cdef Outcome[PARTS_MAX] outs
        cdef Outcome[PARTS_MAX] looks
        cdef int[PARTS_MAX] pays
        cdef int[PARTS_MAX] reported
        cdef bint consumes = call.mode == CHECK_JOINT, allows = False
        cdef int64_t allowed = allowed_of(item, size, item.count, found) if consumes else 0, position = 0
        cdef int sets = 0
        if item.bits & BOOKINGS:
            return self.settle_bookings(call, item, found, server_us)
        if item.bits & UNASKED:
            allowed = 0                      # nobody is refused: all hear the same
            allows = True
            sets = take_corrections(item, size, found, looks, reported)
        elif not consumes or allowed < item.count:
            take_looks(item, size, found, looks)
            allows = joint_outcome((<Parts>(<PendingDecision>item.waiters.first).text).joint, looks, reported, &sets)
        while item.waiters.first != NULL:
            pending = <PendingDecision>item.waiters.first
            take(&item.waiters, pending)
            if pending.stage == COMPLETE:    # it gave up, but its place in the count is its own
                position += consumes
            elif position < allowed:
                sets = take_payers(item, size, found, position, outs, pays)
                position += 1
                complete_joint(pending, REDIS, outs, pays, sets, True, server_us, call.epoch)
            else:
                complete_joint(pending, REDIS, looks, reported, sets, allows)
        return 0

    cdef int settle_bookings(self, CheckCall call, CallItem* item, const PartAnswer* found, int64_t server_us) except -1:
        """Tell equal checks that book whether and when it is their turn."""
        cdef const Terms* terms = &(<CompiledRule>item.rule).terms
        cdef PendingDecision pending
        cdef Outcome out
        cdef int64_t position = 0
        cdef int reported = 0
        while item.waiters.first != NULL:
            pending = <PendingDecision>item.waiters.first
            take(&item.waiters, pending)
            if pending.stage != COMPLETE:    # else it gave up, but its place in the count is its own
                take_booking(terms, found.numbers, item.cost, item.bits & EVENLY, position, &out)
                complete_joint(pending, REDIS, &out, &reported, 1, out.allowed, server_us, call.epoch)
            position += 1
        return 0

    cdef int settle_undecided_joint(self, CheckCall call, int first, int size, const PartAnswer* found, int64_t now_us) except -1:
        """Settle joint checks of which the store hasn't decided some part: an error, asked anew, or by the policies, in this order."""
        cdef PyObject* waiter = call.part_at(first).waiters.first
        cdef int64_t kind = UNSURE
        cdef int p, culprit = 0
        for p in range(size):
            if kind != UNREADABLE and found[p].numbers[0] in (UNREADABLE, DEFERRED):
                kind = found[p].numbers[0]
                culprit = p
        if kind != DEFERRED:
            for p in range(1, size):
                self.known.unanswered(call.part_at(first + p))
        while kind == DEFERRED and waiter != NULL:
            (<Parts>(<PendingDecision>waiter).text).deferred = True
            waiter = (<PendingDecision>waiter).after
        return self.settle_undecided(call, call.part_at(first), <CompiledRule>call.part_at(first + culprit).rule, kind, now_us)

    cdef int learn_parts(self, CheckCall call, int first, Parts parts, const PartAnswer* found, int64_t server_us,
                         int64_t now_us) except -1:
        """Take up the answers to the parts of a joint check that is settled."""
        cdef Answers answer
        cdef CallItem* item
        cdef int p
        memset(&answer, 0, sizeof(Answers))
        for p in range(parts.joint.size):
            item = call.part_at(first + p)
            if found[p].numbers[0] < 0:      # nobody needed it
                self.known.unanswered(item)
                continue
            item.count = 1                   # that it was refused to one it says, and until when
            if item.bits & UNASKED:          # in debt, it would refuse any
                item.cost = 1
            answer.numbers = found[p].numbers
            self.known.learn(call, item, <PendingDecision>parts.members[p], &answer, server_us, now_us)
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
        cdef int64_t now_us = self.context.bounds.now_us()
        cdef int i
        if isinstance(sent, ControlCall):
            self.context.repair.lose(<ControlCall>sent)
        if not isinstance(sent, CheckCall):
            return 0
        call = <CheckCall>sent
        for i in range(call.size + call.parts):
            self.fail_item(call.item_at(i), error, whatever, now_us)
        return 0

    cdef int fail_item(self, CallItem* item, error, bint whatever, int64_t now_us) except -1:
        cdef PendingDecision pending
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
        for i in range(call.size + call.parts):
            self.take_item_back(call, call.item_at(i))
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
        for i in range(call.size + call.parts):
            waiter = call.item_at(i).waiters.first
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
