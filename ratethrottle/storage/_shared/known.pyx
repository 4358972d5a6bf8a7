# cython: auto_pickle=False, autotestdict=False
"""What is known of keys and leased for them, as far as one connection asks about them.

The bounds stand in one table that all connections of a process share. A lease goes back on the connection that took it.
"""

cimport cython
from libc.stdint cimport int64_t, uint32_t
from libc.string cimport memset

from ratethrottle._core cimport CHECK, CHECK_JOINT, GIVE_BACK, Group, Parts, PendingDecision
from ratethrottle._engine.arithmetic cimport COUNTER, FIXED, Outcome, same_definition, Terms, view_free, view_fresh_at
from ratethrottle._engine.bound cimport (
    Bound, bound_fresh_at, bound_guess, bound_learn, bound_look, bound_verdict, DENIED, DRIFT_SHARE, LEASED, OPEN, STALE,
)
from ratethrottle._engine.decision cimport decision_new, LEASE, PREFILTER
from ratethrottle._engine.definitions cimport ALLOW, CompiledRule
from ratethrottle._engine.joint cimport Joint, joint_outcome, PARTS_MAX
from ratethrottle._engine.pieces cimport piece_free
from ratethrottle._engine.table cimport Hash128, Shard
from ratethrottle._engine.window cimport KEEP
from ratethrottle._several cimport sets_verdict
from ratethrottle.storage._shared.call cimport lead_us
from ratethrottle.storage._shared.context cimport StorageContext
from ratethrottle.storage._shared.item cimport CallItem, RETURNS
from ratethrottle.storage._shared.keynames cimport pending_for
from ratethrottle.storage._shared.waiting cimport complete_joint, complete_with, NEVER_US, Waiting

from heapq import heapify, heappop, heappush


cdef enum:
    RETURNS_MAX = 10_000                     # leases that wait for a connection to be given back on
    GIVE_BACK_US = 1_000_000                 # a bound is kept for so long after its lease, so that the rest of that goes back


@cython.final
cdef class KnownKeys:
    """The bounds, and the leases of one connection."""

    def __init__(self, StorageContext context not None, Waiting waiting not None):
        self.context = context
        self.bounds = context.bounds
        self.repair = context.repair
        self.waiting = waiting
        self.leases = []
        self.returns = []

    cdef inline Bound* bound_of(self, Hash128 hashed, Shard** shard, uint32_t* index) noexcept:
        return self.bounds.bound_of(hashed, shard, index)

    cdef bint decide(self, PendingDecision pending, int64_t now_us, bint away, bint* asked) except -1:
        """Whether the bound or a lease has decided; `asked` tells that another check is asking just that. away: the store is."""
        cdef Shard* shard
        cdef uint32_t index
        cdef Outcome out
        cdef const Terms* terms = self.bounds.terms_of(pending.rule)
        cdef Bound* bound = self.bound_of(pending.hashed, &shard, &index)
        cdef int verdict
        asked[0] = False
        if pending.mode != CHECK:
            return pending.mode == CHECK_JOINT and self.decide_joint(pending, now_us, away, asked)
        if bound == NULL:
            return False
        verdict = bound_verdict(bound, terms, pending.rule.lease_units > 0, now_us, pending.units, self.context.ttl_us, &out)
        if verdict == DENIED and away and self.context.policy_for(pending.rule) == ALLOW:
            return False
        if verdict == DENIED or verdict == LEASED:
            complete_with(pending, decision_new(pending.rule, pending.key, pending.units,
                                                LEASE if verdict == LEASED else PREFILTER, &out))
            return True
        asked[0] = verdict != OPEN and bound.asked_by == <void*>self and now_us - bound.asked_us < self.context.deadline_us
        return False

    cdef bint decide_joint(self, PendingDecision pending, int64_t now_us, bint away, bint* asked) except -1:
        """As `decide`: denied if the bounds of all parts of a set deny, and spent from leases if each set has one that covers it."""
        cdef Parts parts = <Parts>pending.text
        cdef Joint joint = parts.joint
        cdef Bound* bounds[PARTS_MAX]
        cdef const Terms* terms[PARTS_MAX]
        cdef Outcome[PARTS_MAX] outs
        cdef int[PARTS_MAX] verdicts
        cdef int[PARTS_MAX] reported
        cdef CompiledRule rule
        cdef Shard* shard
        cdef uint32_t index
        cdef int p, s, verdict, sets = 0
        if joint.corrects:                   # nothing is denied
            return False
        for p in range(joint.size):
            self.bounds.terms_of(<CompiledRule>joint.rules[p])  # it may run other code, which must not come later
        for p in range(joint.size):
            rule = <CompiledRule>joint.rules[p]
            terms[p] = self.bounds.terms_of(rule)
            bounds[p] = self.bound_of((<PendingDecision>parts.members[p]).hashed, &shard, &index)
            verdicts[p] = bound_look(bounds[p], terms[p], rule.lease_units > 0 and not joint.timed, now_us,
                                     joint.costs[p], self.context.ttl_us,
                                     away and self.context.policy_for(rule) == ALLOW, &outs[p])
        verdict = sets_verdict(joint, verdicts)
        if verdict == OPEN:
            asked[0] = self.is_asked(joint, bounds, verdicts, now_us)
            return False
        for p in range(joint.size):
            if verdicts[p] != DENIED:
                bound_guess(bounds[p], terms[p], now_us, joint.costs[p], &outs[p])
        joint_outcome(joint, outs, reported, &sets)
        for s in range(sets if verdict == LEASED else 0):
            p = reported[s]
            if verdicts[p] == LEASED:        # else it only flags, and is over
                bound_verdict(bounds[p], terms[p], True, now_us, joint.costs[p], self.context.ttl_us, &outs[p])
        complete_joint(pending, LEASE if verdict == LEASED else PREFILTER, outs, reported, sets, verdict == LEASED)
        return True

    cdef bint is_asked(self, Joint joint, Bound** bounds, const int* verdicts, int64_t now_us) noexcept:
        """Whether all parts of a set deny by their bounds, and others are asking again about those that are too old."""
        cdef int p = 0
        cdef bint asked
        while p < joint.size:
            asked = not joint.flagged >> p & 1
            while True:
                asked &= (verdicts[p] == DENIED or verdicts[p] == STALE and bounds[p].asked_by == <void*>self
                          and now_us - bounds[p].asked_us < self.context.deadline_us)
                p += 1
                if not joint.alternatives >> p & 1:
                    break
            if asked:
                return True
        return False

    # What the store says:

    cdef int learn(self, CheckCall call, CallItem* item, PendingDecision sample, const Answers* answers, int64_t server_us,
                   int64_t now_us) except -1:
        """Take up the answer to an item, and the lease that came with it."""
        cdef CompiledRule rule = <CompiledRule>item.rule
        cdef const int64_t* numbers = answers.numbers
        cdef bint refused = numbers[0] < call.count_of(item)
        cdef Shard* shard
        cdef uint32_t index
        cdef Bound fresh
        # The terms first: to meet a rule may run other code, and that may move the bound.
        cdef const Terms* terms = self.bounds.terms_of(rule)
        cdef Bound* bound = self.bound_of(item.hashed, &shard, &index)
        if bound == NULL:
            memset(&fresh, 0, sizeof(Bound))
            fresh.cell.hash_lo = item.hashed.lo
            fresh.cell.hash_hi = item.hashed.hi
            if bound_learn(&fresh, terms, numbers, refused, item.cost, call.sent_us, now_us, server_us) != KEEP:
                raise MemoryError
            # A key with leases is remembered even when nothing of it counts: that it was asked about says whether it is busy.
            if view_fresh_at(&fresh.cell.view) <= now_us and rule.lease_units == 0:
                view_free(&fresh.cell.view)
                return 0
            try:
                fresh.name = self.context.names.name_new(sample, &fresh.name_size)
                bound = <Bound*>self.bounds.insert(shard, &fresh.cell, now_us)
            except BaseException:
                piece_free(fresh.name)
                view_free(&fresh.cell.view)
                raise
        else:
            if bound_learn(bound, terms, numbers, refused, item.cost, call.sent_us, now_us, server_us) != KEEP:
                raise MemoryError
            bound.asked_us = 0
            bound.leasing = bound.leasing and item.ahead == 0
            if item.back:
                bound.returned_us = 0
        self.repair.live_until_us = max(self.repair.live_until_us, view_fresh_at(&bound.cell.view))
        bound.epoch = self.epoch
        if answers.ahead > 0:
            self.take_lease(bound, terms, call, sample, rule, answers, server_us)
        elif rule.lease_units == 0 and bound_fresh_at(bound) <= now_us:
            self.forget(item.hashed)
        return 0

    cdef int unanswered(self, const CallItem* item) noexcept:
        """The item has no answer that says anything: nobody is asking about its key any more."""
        cdef Shard* shard
        cdef uint32_t index
        cdef Bound* bound = self.bound_of(item.hashed, &shard, &index)
        if bound != NULL:
            bound.asked_us = 0
            bound.leasing = bound.leasing and item.ahead == 0
        return 0

    cdef int forget(self, Hash128 hashed) except -1:
        cdef Shard* shard
        cdef uint32_t index
        if self.bound_of(hashed, &shard, &index) != NULL:
            self.bounds.remove(shard, index)
        return 0

    cdef int forget_used(self, CallItem* item, int64_t generation, int64_t server_us, int64_t now_us) except -1:
        """The key was reset: nothing that is known of it, leased or admitted here counts any more, but that it was."""
        cdef PendingDecision sample = <PendingDecision>item.waiters.first
        cdef Shard* shard
        cdef uint32_t index
        cdef Bound* bound = self.bound_of(item.hashed, &shard, &index)
        if bound != NULL:
            bound.lease_units = 0
            self.bounds.remove(shard, index)
        self.repair.note_generation(sample, generation, server_us, now_us)
        bound = self.bound_of(item.hashed, &shard, &index)
        if bound != NULL:                    # what was said before that comes too late
            bound.received_us, bound.server_us = now_us, server_us
        return 0

    # Leases:

    cdef int plan_leases(self, CheckCall call) except -1:
        """Note of each item that its key is asked about, and what it takes in advance or gives back."""
        cdef int i
        if call.mode == CHECK:
            for i in range(call.size):
                self.plan_lease(call, &call.items[i], <CompiledRule>call.items[i].rule)
        elif call.mode == CHECK_JOINT:
            call.mode = CHECK
            self.plan_leases(call)
            call.mode = CHECK_JOINT
            for i in range(call.parts):
                self.note_asked(call, call.part_at(i))
        return 0

    cdef int note_asked(self, CheckCall call, const CallItem* part) noexcept:
        """Note that the key of a part is asked about. What is leased of it stays so."""
        cdef Shard* shard
        cdef uint32_t index
        cdef Bound* bound = self.bound_of(part.hashed, &shard, &index)
        if bound != NULL:
            bound.asked_us = call.sent_us
            bound.asked_by = <void*>self
        return 0

    cdef int plan_lease(self, CheckCall call, CallItem* item, CompiledRule rule) except -1:
        cdef Shard* shard
        cdef uint32_t index
        cdef Bound* bound
        cdef int64_t size, spent, epoch, wanted = item.count * item.cost
        if item.role == RETURNS:
            _, item.back, item.back_us, epoch = (<PendingDecision>item.waiters.first).key
            if epoch != self.epoch:          # it was lost there, which is known only since it was queued
                item.back = 0
        bound = self.bound_of(item.hashed, &shard, &index)
        if item.role == RETURNS:
            if bound != NULL and item.back:
                bound.returned_us = call.sent_us
            return 0
        if bound == NULL:
            return 0
        if item.count:
            bound.asked_us = call.sent_us
            bound.asked_by = <void*>self
        # Only one call at a time takes units ahead, and only one item of it: a second lease would take the place of the first.
        if rule.lease_units == 0 or bound.leasing:
            return 0
        # Another definition's account knows nothing of it; under another lead it is still the same units that must go back.
        # And what was taken in another life of the store's data may be lost there: what goes back would be others' units.
        size = bound.lease_size
        spent = size - bound.lease_units
        if bound.lease_units and bound.lease_epoch == self.epoch and same_definition(bound.lease_terms, &rule.terms):
            item.back = bound.lease_units
            item.back_us = bound.lease_at_us - lead_us(rule)
            bound.returned_us = call.sent_us
        else:
            self.bounds.orphan(bound)        # it goes back under the rule that it was taken under
        bound.lease_units = bound.lease_size = 0
        if item.count == 0:
            return 0
        if call.sent_us - bound.sent_us <= rule.lease_us:
            # Asked about twice within the life of a lease: it is busy. What was used up in time may be twice as large.
            item.ahead = max(spent, wanted)
            if size and spent == size and call.sent_us < bound.lease_until_us:
                item.ahead = max(item.ahead, 2 * size)
        elif size and call.sent_us < bound.lease_until_us + rule.lease_us:
            item.ahead = spent
        item.ahead = min(rule.lease_units, item.ahead)
        bound.leasing = item.ahead > 0
        return 0

    cdef int take_lease(self, Bound* bound, const Terms* terms, CheckCall call, PendingDecision sample, CompiledRule rule,
                        const Answers* answers, int64_t server_us) except -1:
        """The store has granted units in advance."""
        cdef int64_t for_us = rule.lease_us
        if rule.terms.kind == FIXED or rule.terms.kind == COUNTER:  # it ends with the window
            for_us = min(for_us, rule.terms.window_us - answers.numbers[2 if rule.terms.kind == FIXED else 3])
        self.bounds.orphan(bound)            # of another bound that this one has replaced meanwhile
        bound.lease_units = bound.lease_size = answers.ahead
        # From before the request was sent, and a 64th and the rounding of two clocks less: the store's may be the faster one.
        bound.lease_until_us = call.sent_us + for_us - for_us // DRIFT_SHARE - 2
        bound.keep_until_us = max(bound.keep_until_us, bound.lease_until_us + GIVE_BACK_US)
        bound.lease_at_us = server_us + lead_us(rule)
        bound.lease_terms = terms
        bound.lease_epoch = self.epoch
        return self.note_lease(sample, bound)

    cdef int note_lease(self, PendingDecision sample, const Bound* bound) except -1:
        """Remember when the lease of a bound ends."""
        cdef int64_t until_us = bound.lease_until_us, at_us = bound.lease_at_us
        heappush(self.leases, (until_us, self.turns, sample, at_us))
        self.turns += 1
        return 0

    cdef int take_back(self, const CallItem* item, PendingDecision sample, int64_t epoch) except -1:
        """The call wasn't run, so that nothing was given back either."""
        cdef Shard* shard
        cdef uint32_t index
        cdef const Terms* terms = self.bounds.terms_of(<CompiledRule>item.rule)
        cdef Bound* bound = self.bound_of(item.hashed, &shard, &index)
        if bound != NULL:
            bound.leasing = bound.leasing and item.ahead == 0
        if item.back == 0 or item.role == RETURNS:
            return 0
        if bound == NULL or bound.lease_units:
            if sample is not None:
                self.put_back(sample, item.back, item.back_us, epoch)
            return 0
        bound.lease_units = bound.lease_size = item.back
        bound.lease_epoch = epoch
        bound.lease_at_us = item.back_us + lead_us(<CompiledRule>item.rule)
        bound.lease_terms = terms
        # What was noted before may have been looked at meanwhile.
        return self.note_lease(sample, bound) if sample is not None else 0

    cdef int give_back(self, int64_t now_us, bint serving) except -1:
        """Queue what is left of leases that have ended."""
        cdef PendingDecision sample, pending
        cdef Shard* shard
        cdef uint32_t index
        cdef Bound* bound
        cdef int64_t at_us
        while self.leases and self.leases[0][0] <= now_us:
            _, _, sample, at_us = heappop(self.leases)
            bound = self.bound_of(sample.hashed, &shard, &index)
            if not serving or bound == NULL or bound.lease_units == 0 or bound.lease_at_us != at_us:
                self.return_lease(sample, at_us, now_us)
                continue
            pending = pending_for(sample.rule, sample.text, sample.mark, sample.tag, GIVE_BACK)
            pending.hashed = sample.hashed
            self.waiting.enter_own(pending)
        return self.queue_returns() if serving else 0

    cdef int return_lease(self, PendingDecision sample, int64_t at_us, int64_t now_us) except -1:
        """Take what is left of a lease from wherever it is, and give it back as soon as that can be."""
        cdef int64_t units = self.bounds.adopt(sample.hashed, at_us, self.repair.epoch, now_us)
        if units:
            self.put_back(sample, units, at_us - lead_us(sample.rule), self.repair.epoch)
        return 0

    cdef int put_back(self, PendingDecision sample, int64_t units, int64_t server_us, int64_t epoch) except -1:
        """Give back units that were granted to `sample` in advance, at that time, and that nobody here may spend."""
        if len(self.returns) < RETURNS_MAX:
            self.returns.append((sample, units, server_us, epoch))
        return 0

    cdef int return_later(self, PendingDecision pending, int64_t now_us) except -1:
        """It wasn't sent in time. What gives back the lease of a bound is looked for there."""
        cdef Shard* shard
        cdef uint32_t index
        cdef Bound* bound
        if pending.key is not None:
            self.returns.append(pending.key)
            return 0
        bound = self.bound_of(pending.hashed, &shard, &index)
        if bound != NULL and bound.lease_units and bound.lease_until_us <= now_us:
            self.return_lease(pending, bound.lease_at_us, now_us)
        return 0

    cdef int queue_returns(self, Group group=None) except -1:
        """Queue what no bound holds any more; of a group, if that hears when it is done. The connection serves."""
        cdef PendingDecision sample, pending
        if not self.returns:
            return 0
        returns, self.returns = self.returns, []
        for item in returns:
            sample, units, _, epoch = item
            if epoch != self.epoch:          # it was lost there
                continue
            pending = pending_for(sample.rule, sample.text, sample.mark, sample.tag, GIVE_BACK)
            pending.hashed = sample.hashed
            pending.units = units
            pending.key = item
            if group is not None:
                pending.group = group
                group.members.append(pending)
                group.left += 1
            self.waiting.enter_own(pending)
        return 0

    def return_leases(self, CompiledRule rule, int64_t now_us):
        """Take back at once what is left of the leases under a rule, or of all for None."""
        cdef PendingDecision sample
        cdef int64_t at_us
        leases, self.leases = self.leases, []
        for item in leases:
            _, _, sample, at_us = item
            if rule is None or sample.rule == rule:
                self.return_lease(sample, at_us, now_us)
            else:
                self.leases.append(item)
        heapify(self.leases)

    cdef int64_t first_lease_us(self) except -1:
        """When the next lease ends; NEVER_US if there is none."""
        return self.leases[0][0] if self.leases else NEVER_US

    def count_leases(self):
        """How many keys × rules have units ahead that may be spent now."""
        cdef PendingDecision sample
        cdef Shard* shard
        cdef uint32_t index
        cdef Bound* bound
        cdef int64_t until_us, at_us, now_us = self.bounds.now_us()
        cdef set found = set()
        for until_us, _, sample, at_us in self.leases:
            bound = self.bound_of(sample.hashed, &shard, &index)
            # Of a lease that was renewed, spent or given back, the item stays until it would have ended.
            if until_us > now_us and bound != NULL and bound.lease_units and bound.lease_at_us == at_us:
                found.add((sample.hashed.lo, sample.hashed.hi))
        return len(found)
