# cython: auto_pickle=False, autotestdict=False
"""What answers a check when the store doesn't: the outage policy, or that this process asks for too much."""

cimport cython
from libc.stdint cimport int64_t

from ratethrottle._core cimport CHECK_JOINT, GIVE_BACK, Parts, PEEK, PendingDecision, RESET, WAITING
from ratethrottle._engine.arithmetic cimport Outcome
from ratethrottle._engine.decision cimport decision_new, OUTAGE, OVERLOAD
from ratethrottle._engine.definitions cimport ALLOW, CompiledRule, DENY, Policy, RAISE
from ratethrottle._engine.joint cimport BOOKS, CHARGES, Joint, joint_outcome, NONE, PARTS_MAX
from ratethrottle.storage._shared.context cimport StorageContext
from ratethrottle.storage._shared.known cimport KnownKeys
from ratethrottle.storage._shared.link cimport AWAY, ENDED, Link, REFUSED, SERVING
from ratethrottle.storage._shared.repair cimport Repair
from ratethrottle.storage._shared.waiting cimport complete, complete_joint, complete_with, twin_of, Waiting

from ratethrottle.errors import StorageRefused, StorageUnavailable


REPAIRING = "Redis has lost its data, or is another server now; the processes are telling it what was used"


cdef object repairing():
    return StorageUnavailable(REPAIRING)


@cython.final
cdef class Fallback:
    """Decides for one connection what its store has not."""

    def __init__(self, StorageContext context not None, Link link not None, KnownKeys known not None, Waiting waiting not None):
        self.context = context
        self.link = link
        self.known = known
        self.waiting = waiting

    cdef bint applies(self, int64_t now_us) noexcept:
        """Whether checks are decided here at once, while the connection doesn't serve."""
        return self.link.why or now_us < self.context.repair.learning_until_us

    cdef int decide(self, PendingDecision pending, error, int64_t now_us) except -1:
        """Decide by the outage policy; an error for what is no check, and if the policy is to raise."""
        cdef Policy policy = self.context.policy_for(pending.rule)
        cdef bint everything = policy == ALLOW
        cdef Repair repair = self.context.repair
        cdef Outcome out
        cdef int64_t retry_us
        if pending.mode > PEEK:
            return self.decide_other(pending, error, now_us)
        if pending.mode == PEEK and pending.group is None:
            return complete(pending, error)  # our own look at what was charged
        if policy == RAISE or self.raises(error):
            return complete(pending, twin_of(error))
        retry_us = self.retry_us(now_us)
        if policy == DENY:
            out = Outcome(False, False, 0, retry_us, retry_us)
        else:
            repair.shares.decide(pending, repair.shares.share_of(pending.rule, everything), now_us, now_us + repair.ahead_us,
                                 retry_us, everything, &out)
        self.context.by_policy += 1
        return complete_with(pending, decision_new(pending.rule, pending.key, pending.units, OUTAGE, &out))

    cdef inline bint raises(self, error) except -1:
        """Whether no policy decides."""
        return self.link.state == ENDED or isinstance(error, StorageRefused)

    cdef inline int64_t retry_us(self, int64_t now_us) except -1:
        """When the store may serve again."""
        return max(self.link.transport.retry_us(), self.context.repair.learning_until_us - now_us, 1)

    cdef int decide_other(self, PendingDecision pending, error, int64_t now_us) except -1:
        """Decide what isn't about one key: a joint check. What is no check at all gets the error."""
        cdef Parts parts
        cdef Policy[PARTS_MAX] policies
        cdef Outcome[PARTS_MAX] outs
        cdef int[PARTS_MAX] reported
        cdef Repair repair = self.context.repair
        cdef bint raises = pending.mode < CHECK_JOINT or self.raises(error), allowed
        cdef int p, sets = 0
        if pending.mode == GIVE_BACK and pending.stage == WAITING and self.link.state != ENDED:
            self.known.return_later(pending, now_us)
        if pending.mode == CHECK_JOINT and (<Parts>pending.text).joint.corrects not in (NONE, BOOKS):
            return self.correct(pending, error, now_us)
        if not raises:
            parts = <Parts>pending.text
            for p in range(parts.joint.size):
                policies[p] = self.context.policy_for(<CompiledRule>parts.joint.rules[p])
                raises = raises or policies[p] == RAISE
        if raises:
            return complete(pending, twin_of(error))
        allowed = repair.shares.decide_joint(parts, policies, pending.mode == CHECK_JOINT, now_us, now_us + repair.ahead_us,
                                             self.retry_us(now_us), outs, reported, &sets)
        self.context.by_policy += 1
        return complete_joint(pending, OUTAGE, outs, reported, sets, allowed, now_us + repair.ahead_us)

    cdef int correct(self, PendingDecision pending, error, int64_t now_us) except -1:
        """Count what is charged, to be owed to the store, whatever the share. What comes back stays counted.

        By the policy `raise` it is an error, and not counted, unless it settles a reservation: nobody would hear of that.
        """
        cdef Joint joint = (<Parts>pending.text).joint
        cdef Policy[PARTS_MAX] policies
        cdef Outcome[PARTS_MAX] outs
        cdef int[PARTS_MAX] reported
        cdef Repair repair = self.context.repair
        cdef bint raises = self.raises(error)
        cdef int p
        for p in range(joint.size):
            policies[p] = self.context.policy_for(<CompiledRule>joint.rules[p])
            raises = raises or policies[p] == RAISE and joint.corrects == CHARGES
        if raises:
            return complete(pending, twin_of(error))
        for p in range(joint.size):
            reported[p] = p
            outs[p] = Outcome(True, False, 0, 0, 0)
            if not joint.refunds >> p & 1:
                repair.shares.charge(<PendingDecision>(<Parts>pending.text).members[p], policies[p], now_us, now_us + repair.ahead_us,
                                     self.retry_us(now_us), &outs[p])
        self.context.by_policy += 1
        return complete_joint(pending, OUTAGE, outs, reported, joint.size, True)

    cdef int overload(self, PendingDecision pending, words) except -1:
        """Decide what this process asks faster than it is answered: that is its own load, and no outage."""
        cdef Outcome out = Outcome(False, False, 0, self.context.deadline_us, self.context.deadline_us)
        cdef Outcome[PARTS_MAX] outs
        cdef int[PARTS_MAX] reported
        cdef int p, sets = 0
        cdef bint allowed
        self.context.overloads += 1
        if pending.mode == CHECK_JOINT and (<Parts>pending.text).joint.corrects not in (NONE, BOOKS):
            return self.correct(pending, StorageUnavailable(words), self.context.bounds.now_us())
        if not self.context.deny_overload or pending.mode == RESET or pending.mode == GIVE_BACK:
            return complete(pending, StorageUnavailable(
                f"{words}; that is this process's load, not an outage: raise `connections`, use leases for busy keys, set a longer "
                "`deadline`, or check fewer at once"
            ))
        if pending.mode < CHECK_JOINT:
            return complete_with(pending, decision_new(pending.rule, pending.key, pending.units, OVERLOAD, &out))
        for p in range(PARTS_MAX):
            outs[p] = out
        allowed = joint_outcome((<Parts>pending.text).joint, outs, reported, &sets)  # as all of its rules may only flag
        return complete_joint(pending, OVERLOAD, outs, reported, sets, allowed)

    cdef int run_out(self, PendingDecision pending, int64_t now_us) except -1:
        """Decide what wasn't sent in time: the connection was too busy, if there is one."""
        if self.link.state == SERVING:
            return self.overload(pending, f"the check was not sent within {self.context.deadline_us / 1e6} s, nor counted")
        return self.decide(pending, self.link.transport.unsent(), now_us)

    cdef int decide_waiting(self, error) except -1:
        """Decide everything that hasn't been sent."""
        cdef PendingDecision pending
        cdef int64_t now_us = self.context.bounds.now_us()
        self.waiting.scheduled = False
        while (pending := self.waiting.take_any()) is not None:
            self.decide(pending, error, now_us)
        return 0

    cdef int begin(self, error) except -1:
        """The store doesn't answer, or not in time, or refuses us: from now on policies decide, until it serves."""
        cdef Link link = self.link
        changed = link.reason is None or str(link.reason) != str(error)
        link.reason = error
        if isinstance(error, StorageRefused):
            link.why |= REFUSED
            link.notice("refused", error)
        else:
            link.why &= ~REFUSED
            if not link.why & AWAY:
                link.why |= AWAY
                self.context.bounds.away += 1
                self.context.repair.shares.begin()
                link.notice("outage", error)
            elif changed:
                link.notice("reason", error)
        return self.decide_waiting(error)
