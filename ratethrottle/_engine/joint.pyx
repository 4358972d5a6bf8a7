# cython: auto_pickle=False, autotestdict=False
"""Joint decisions: one check of several limits, of which all are granted or nothing is consumed.

A joint check is a sequence of sets. A set is one part, or several alternatives, of which the first that would be allowed pays. A
part is a rule, a key and a cost. `docs/several.md` says what it means.
"""

cimport cython
from cpython.tuple cimport PyTuple_GET_ITEM
from libc.stdint cimport int64_t, uint32_t
from libc.stdlib cimport free, malloc

from ratethrottle._engine.arithmetic cimport NEVER, Outcome
from ratethrottle._engine.decision cimport count_decision, Decision, decision_facts, decision_new, outcome_uncounted, rule_named, Source
from ratethrottle._engine.definitions cimport CompiledRule, FLAG_IT, Tally

from ratethrottle._engine.decision import _restore_decision


@cython.final
@cython.freelist(16)
@cython.no_gc
cdef class Joint:
    """What a joint check names, validated. A plan has no keys yet: it is what a tuple of rules means, for any key."""

    def __init__(self):
        raise TypeError("joint checks are made by a limiter")

    @property
    def costs(self):
        """The cost of each part, units."""
        return tuple([self.costs[p] for p in range(self.size)])

    @property
    def cost(self):
        """The least of these: 0 only if it asks, and checks nothing."""
        return min([self.costs[p] for p in range(self.size)])

    @property
    def counted(self):
        """Whether what was used decides. If not, a limit of 0 denies it, or it names only rules under which nothing is counted."""
        return self.uncounted != <uint32_t>((1 << self.size) - 1) and not self.denies()

    def costing(self, int64_t units):
        """The same with another cost of every part."""
        cdef int64_t[PARTS_MAX] costs
        cdef int p
        for p in range(self.size):
            costs[p] = units
        return self.costing_each(costs)

    def asked(self, Decision decision not None):
        """Turn a decision on a cost of 1 into that on a cost of 0, which only asks: allowed."""
        cdef Outcome[PARTS_MAX] outs
        cdef int[PARTS_MAX] reported
        cdef JointDecision joint
        cdef Outcome out
        cdef int s
        if not isinstance(decision, JointDecision):
            out = decision.out
            out.allowed, out.retry_us = True, 0
            return decision_new(decision.compiled, decision.key, 0, decision.source_index, &out)
        joint = <JointDecision>decision
        for s in range(joint.sets):
            reported[s] = joint.reported[s]
            outs[reported[s]] = joint.outs[s]
            outs[reported[s]].allowed, outs[reported[s]].retry_us = True, 0
        return of_sets(joint.joint.costing(0), joint.source_index, outs, reported, joint.sets, True)

    cdef Joint twin(self):
        cdef Joint twin = Joint.__new__(Joint)
        cdef int p
        twin.rules = self.rules
        twin.keys = self.keys
        twin.canonicals = self.canonicals
        twin.size = self.size
        twin.sets = self.sets
        twin.priced = self.priced
        twin.alternatives = self.alternatives
        twin.uncounted = self.uncounted
        twin.flagged = self.flagged
        twin.whole = self.whole
        twin.timed = self.timed
        twin.corrects = self.corrects
        twin.refunds = self.refunds
        twin.granted_us = self.granted_us
        twin.epoch = self.epoch
        twin.booking = self.booking
        twin.granted_here = self.granted_here
        for p in range(self.size):
            twin.costs[p] = self.costs[p]
            twin.terms[p] = self.terms[p]
            twin.places[p] = self.places[p]
        return twin

    cdef Joint costing_each(self, const int64_t* costs):
        """The same with other costs; of a part of a whole, that too."""
        cdef Joint twin = self.twin()
        cdef int64_t[PARTS_MAX] of_whole
        cdef int p
        for p in range(self.size):
            twin.costs[p] = costs[p]
        if self.whole is not None:
            for p in range(self.whole.size):
                of_whole[p] = self.whole.costs[p]
            for p in range(self.size):
                of_whole[self.places[p]] = costs[p]
            twin.whole = self.whole.costing_each(of_whole)
        return twin

    cdef Joint with_keys(self, tuple keys, tuple canonicals):
        """The joint check that a plan is of these keys."""
        cdef Joint twin = self.twin()
        twin.keys = keys
        twin.canonicals = canonicals
        return twin

    cdef bint denies(self) noexcept:
        """Whether a limit of 0 denies it, whatever was used."""
        cdef int p = 0
        cdef bint denied
        while p < self.size:
            denied = True
            while True:
                denied &= self.uncounted >> p & 1 and not (self.flagged >> p & 1 or part_uncounted(self, p).allowed)
                p += 1
                if not self.alternatives >> p & 1:
                    break
            if denied:
                return True
        return False

    cdef bint is_joint(self) noexcept:
        """Whether it is more than a plain check of its only part."""
        return self.size > 1 or self.whole is not None or self.timed or self.corrects

    cdef Joint counted_part(self):
        """What a storage is asked: the check without the parts that are decided without their state. There is one that isn't."""
        cdef Joint part
        cdef list kept = [], rules = []
        cdef uint32_t alternatives = 0
        cdef bint joins = False
        cdef int p
        if self.uncounted == 0:
            return self
        for p in range(self.size):
            joins = joins and self.alternatives >> p & 1
            if not self.uncounted >> p & 1:
                alternatives |= <uint32_t>joins << len(kept)
                kept.append(p)
                rules.append(self.rules[p])
                joins = True
        part = joint_new(rules, alternatives)
        for i, p in enumerate(kept):
            part.costs[<int>i] = self.costs[p]
            part.places[<int>i] = p
        part.priced = self.priced
        part.timed = self.timed
        part.corrects = self.corrects        # whose parts are all charged: what is given back was counted
        part.keys = tuple([self.keys[p] for p in kept])
        part.canonicals = tuple([self.canonicals[p] for p in kept])
        part.whole = self
        return part

    cdef Joint charges_alone(self):
        """A settlement without what it gives back; None if that is all."""
        cdef Joint part
        cdef list kept = [p for p in range(self.size) if not self.refunds >> <int>p & 1]
        if not kept:
            return None
        part = joint_new([self.rules[p] for p in kept], 0).with_keys(
            tuple([self.keys[p] for p in kept]), tuple([self.canonicals[p] for p in kept]))
        for i, p in enumerate(kept):
            part.costs[<int>i] = self.costs[<int>p]
        part.timed = True
        part.corrects = self.corrects
        return part


cdef Joint joint_new(list rules, uint32_t alternatives):
    """A plan of the rules of all parts, at most PARTS_MAX, at a cost of 1 each."""
    cdef Joint joint = Joint.__new__(Joint)
    cdef CompiledRule rule
    cdef int p
    joint.rules = tuple(rules)
    joint.size = len(rules)
    joint.alternatives = alternatives
    for p in range(joint.size):
        rule = <CompiledRule>joint.rules[p]
        joint.costs[p] = 1
        joint.terms[p] = &rule.terms
        joint.uncounted |= <uint32_t>(not rule.counted) << p
        joint.flagged |= <uint32_t>(rule.enforcement == FLAG_IT) << p
        joint.sets += not alternatives >> p & 1
    return joint


def joint_of(entries, uint32_t alternatives=0):
    """The joint check of validated checks, at most PARTS_MAX; bit i of `alternatives`: that one is an alternative to the one before."""
    cdef Joint joint = joint_new([entry.rule for entry in entries], alternatives)
    cdef int p = 0
    joint.keys = tuple([entry.key for entry in entries])
    joint.canonicals = tuple([entry.canonical for entry in entries])
    for entry in entries:
        joint.costs[p] = entry.cost
        p += 1
    return joint


cdef Outcome part_uncounted(Joint joint, int p) noexcept:
    """What a part says under whose rule nothing is counted. All that is charged under a limit of 0 is over it, for ever."""
    cdef Outcome out = outcome_uncounted(<CompiledRule>PyTuple_GET_ITEM(joint.rules, p), joint.costs[p])
    if joint.corrects and not out.allowed:
        out = Outcome(True, False, 0, NEVER, 0)
    return out


cdef class Several:
    def __init__(self, dict rules not None):
        self.rules = rules

    cdef int count_in(self, CompiledRule rule, CompiledRule before) except -1:
        """Have what is decided under it counted with the rule `before` it, or with those of the caller's own, of its name."""
        rule.tally = Tally.__new__(Tally) if before is None else before.tally
        rule.counts = rule.tally.counts
        return 0

    cdef dict counted(self):
        """The rules that statistics tell of, by name."""
        return self.rules

    cdef int renew(self) except -1:
        """The limiter has another rule, or one less."""
        return 0

    cdef CompiledRule named(self, object name):
        """The rule of that name; None: the only one. Raises InvalidRequest."""
        return rule_named(self.rules, name)

    cdef object find(self, object named):
        """What a call names that isn't one name: a CompiledRule, or a Joint without keys. Raises InvalidRequest."""
        return rule_named(self.rules, named)

    cdef Joint costing(self, Joint plan, object cost):
        """The plan at this cost. Raises InvalidRequest or CostExceedsLimit."""
        raise NotImplementedError

    cdef object decide(self, object key, Joint joint):
        """A decision, or an awaitable that asks the store; `key` is that of a plan. Raises InvalidRequest."""
        raise NotImplementedError


@cython.final
@cython.no_gc
cdef class JointDecision(Decision):
    """A decision on several sets. Those of its parts are made when somebody asks for them."""

    def __dealloc__(self):
        free(self.outs)

    @property
    def parts(self):
        """A decision for each limit, in the order in which the check named them; empty if it named only one.

        Of alternatives it is that of the one that pays, or of the one that could be retried first.
        """
        cdef Joint joint = self.joint
        cdef int s, p
        if self.made is None:
            found = []
            for s in range(self.sets if self.sets > 1 else 0):
                p = self.reported[s]
                key = self.key if joint.keys is None else joint.keys[p]
                found.append(decision_new(<CompiledRule>joint.rules[p], key, joint.costs[p], self.source_index, &self.outs[s]))
            self.made = tuple(found)
        return self.made

    @property
    def atomic(self):
        """Whether all parts were decided at one instant."""
        return not self.divided

    def headers(self):
        """HTTP fields of all parts, the one that binds first; of several keys of one rule, only of the first one."""
        cdef dict fields = Decision.headers(self)
        cdef set seen = {self.compiled.name}
        for part in self.parts:
            if part.rule not in seen:
                seen.add(part.rule)
                own = part.headers()
                for name in ("RateLimit-Policy", "RateLimit"):
                    fields[name] += f", {own[name]}"
        return fields

    def __eq__(self, other):
        if not isinstance(other, Decision):
            return NotImplemented
        return (isinstance(other, JointDecision) and decision_facts(self) == decision_facts(<Decision>other)
                and self.parts == other.parts and self.atomic == other.atomic)

    def __hash__(self):
        return hash((decision_facts(self), self.parts))

    def __reduce__(self):
        return _restore_joint, (_restore_decision(*decision_facts(self)), self.parts, self.atomic)

    def __repr__(self):
        return f"{Decision.__repr__(self).removesuffix('>')} parts={len(self.parts)}>"


cdef JointDecision joint_blank(int sets):
    """A decision on so many sets, to be filled in."""
    cdef JointDecision decision = JointDecision.__new__(JointDecision)
    decision.outs = <Outcome*>malloc(max(sets, 1) * sizeof(Outcome))
    if decision.outs == NULL:
        raise MemoryError
    decision.room = sets
    return decision


cdef int joint_fill(JointDecision decision, Joint joint, object key, Source source, const Outcome* outs, const int* reported,
                    bint allowed) except -1:
    """Make it the decision on `joint`; `key` is that of a plan. No other code runs before all of it is filled in."""
    cdef int s, p, binds = -1
    for s in range(joint.sets):
        p = reported[s]
        decision.outs[s] = outs[p]
        decision.reported[s] = p
        if allowed:
            # remaining / capacity is least; none is above 10^9, so that the products fit.
            if binds < 0 or (units_left(joint.terms[p], &outs[p]) * joint.terms[binds].capacity
                             < units_left(joint.terms[binds], &outs[binds]) * joint.terms[p].capacity):
                binds = p
            elif joint.corrects and wait_us(joint.terms[p], &outs[p]) > wait_us(joint.terms[binds], &outs[binds]):
                binds = p                    # in debt, so that nothing is left of it either, and for longer
        elif not (outs[p].allowed or joint.flagged >> p & 1) and (
                binds < 0 or wait_us(joint.terms[p], &outs[p]) > wait_us(joint.terms[binds], &outs[binds])):
            binds = p
    decision.sets = joint.sets
    decision.source_index = source
    decision.granted = allowed
    decision.divided = False
    decision.at_us = decision.epoch = 0
    decision.out = outs[binds]
    decision.cost = joint.costs[binds]
    # What is dropped here may be the last reference to a key, and run code. By then the numbers of this decision belong together.
    decision.joint = joint
    decision.compiled = <CompiledRule>joint.rules[binds]
    decision.key = key if joint.keys is None else joint.keys[binds]
    decision.made = None
    return 0


cdef Decision of_sets(Joint joint, Source source, const Outcome* outs, const int* reported, int sets, bint allowed):
    cdef JointDecision decision
    cdef int p = reported[0]
    if sets == 1 and not joint.timed:
        return decision_new(<CompiledRule>joint.rules[p], joint.keys[p], joint.costs[p], source, &outs[p])
    decision = joint_blank(sets)
    joint_fill(decision, joint, None, source, outs, reported, allowed)
    return decision


cdef Decision joint_decision(Joint joint, Source source, const Outcome* outs, const int* reported, int sets, bint allowed):
    """The decision on a joint check with keys. outs: of each part. reported: the part that each set reports.

    Of the counted part of a check it is the decision on the whole.
    """
    cdef Joint whole = joint.whole
    cdef Outcome[PARTS_MAX] of_whole
    cdef int[PARTS_MAX] reported_of_whole
    cdef int p = 0, first, s = 0, counted_sets = 0
    cdef bint counted
    if whole is None:
        return of_sets(joint, source, outs, reported, sets, allowed)
    for p in range(joint.size):
        of_whole[joint.places[p]] = outs[p]
    p = 0
    while p < whole.size:
        first, counted = p, False
        while True:
            if whole.uncounted >> p & 1:
                of_whole[p] = part_uncounted(whole, p)
            else:
                counted = True
            p += 1
            if not whole.alternatives >> p & 1:
                break
        reported_of_whole[s] = joint.places[reported[counted_sets]] if counted else first
        counted_sets += counted
        s += 1
    return of_sets(whole, source, of_whole, reported_of_whole, s, allowed)


cdef void joint_count(Decision decision) noexcept:
    """Count a decision on one or more sets: if it was allowed, one for each set, else one for each that denied."""
    cdef JointDecision joint
    cdef CompiledRule rule
    cdef int s
    if not isinstance(decision, JointDecision):
        count_decision(decision.compiled, decision.source_index, decision.out.allowed)
        return
    joint = <JointDecision>decision
    for s in range(joint.sets if joint.joint.corrects not in (SETTLES, UNBOOKS) else 0):
        if joint.granted or not (joint.outs[s].allowed or joint.joint.flagged >> joint.reported[s] & 1):
            rule = <CompiledRule>PyTuple_GET_ITEM(joint.joint.rules, joint.reported[s])
            count_decision(rule, joint.source_index, joint.outs[s].allowed)


def _restore_joint(Decision binding not None, tuple parts not None, bint atomic):
    """Make a joint decision from the one that binds and those of its parts (pickle)."""
    cdef JointDecision decision = joint_blank(0)
    decision.out = binding.out
    decision.cost = binding.cost
    decision.source_index = binding.source_index
    decision.compiled = binding.compiled
    decision.key = binding.key
    decision.made = parts
    decision.divided = not atomic
    return decision
