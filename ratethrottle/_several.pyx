# cython: auto_pickle=False, autotestdict=False
"""Checks by several rules, and by rules of the caller's own: what they name, and how they are decided.

A limiter asks this for every check that names rules by anything but one name (`Several`). What a tuple of rules means is remembered.
"""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from cpython.dict cimport PyDict_GetItemWithError
from cpython.long cimport PyLong_FromVoidPtr
from cpython.object cimport PyObject
from cpython.unicode cimport PyUnicode_AsUTF8AndSize
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.string cimport memcpy

from ratethrottle._core cimport Backend, CHECK, CHECK_JOINT, JOINT, MADE, Mode, NEW, Parts, PendingDecision
from ratethrottle._engine.arithmetic cimport Outcome
from ratethrottle._engine.bound cimport Bound, bound_guess, bound_look, bound_verdict, DENIED, LEASED, OPEN, STALE
from ratethrottle._engine.decision cimport (
    COST_MAX, Decision, decision_new, Entry, entry_new, is_left_out, LEASE, MEMORY, OUTAGE, PREFILTER, rule_named, Source, units_of,
)
from ratethrottle._engine.definitions cimport CompiledRule, DENY_IT
from ratethrottle._engine.joint cimport (
    BOOKS, CHARGES, Joint, joint_blank, joint_count, joint_decision, joint_fill, joint_new, joint_outcome, JointDecision, part_uncounted,
    PARTS_MAX, SETTLES, Several,
)
from ratethrottle._engine.keys cimport forks, KeyTable
from ratethrottle._engine.table cimport cell_at, Place, shard_find

from collections.abc import Mapping
from operator import index as whole_number

from ratethrottle._engine.bookings import served
from ratethrottle.errors import InvalidRequest, shown
from ratethrottle.rule import ConcurrencyRule, FirstOf, RateThrottleRule


cdef extern from "Python.h":
    Py_ssize_t Py_REFCNT(PyObject*)
    bint PyUnicode_CheckExact(object)


cdef enum:
    KNOWN_MOST = 1024                        # what was named, before all of it is forgotten; and likewise names of rules of callers

FORMS = ("the name (str) of a rule, a RateThrottleRule, a tuple or list of them, a mapping of them to their costs, or FirstOf(...)")


def no_check_by(name):
    """What to do with a rule that a check can't be by."""
    return f"rule {name!r} is a ConcurrencyRule, whose slots are held for as long as a block runs: use limiter.slot(key, {name!r})"


@cython.final
cdef class Timed:
    """Rules of a check, in any form, whose decision has to say when it was taken: it is a JointDecision, even on a single rule."""

    cdef readonly object rules

    def __init__(self, rules):
        self.rules = rules


@cython.final
cdef class SeveralRules(Several):
    """What a limiter's checks name, and the decisions on several rules at once."""

    cdef KeyTable table                      # decides here
    cdef Backend backend                     # or asks a shared store; then the table holds its bounds
    # What was named: a tuple, FirstOf or rule -> its plan, or its CompiledRule. Also by the identity of just these objects: to hash a
    # rule takes as long as a few checks.
    cdef readonly dict known
    cdef dict known_by_id
    cdef list owners                         # the objects that these are the ids of
    cdef readonly int64_t renewals           # how often all that was named was forgotten
    cdef object last_named                   # the one before
    cdef object last_meant
    cdef dict own                            # name -> a rule of the caller's own, which has the tally of that name
    cdef public dict held                    # name -> ConcurrencyRule of the limiter: no rules for a check
    cdef readonly bint uncounted             # whether nothing is counted under one of the rules that are remembered
    cdef JointDecision spare                 # the last one made: used again if nobody has kept it
    # The key (a str) and the plan of the check before, and where they belong: the same key isn't hashed twice in a row.
    cdef object last_key
    cdef Joint last_plan
    cdef Place[16] last_places
    cdef uint64_t last_home

    def __init__(self, dict rules not None, storage):
        self.rules = rules
        self.backend = storage if isinstance(storage, Backend) else None
        self.table = storage.table if self.backend is None else self.backend.bounds
        self.known = {}
        self.known_by_id = {}
        self.owners = []
        self.own = {}
        self.held = {}

    # What a call names:

    cdef int count_in(self, CompiledRule rule, CompiledRule before) except -1:
        return Several.count_in(self, rule, self.own.get(rule.name) if before is None else before)

    cdef dict counted(self):
        return {**self.own, **self.rules} if self.own else self.rules

    cdef int renew(self) except -1:
        self.renewals += 1
        self.known.clear()
        self.known_by_id.clear()
        self.owners.clear()
        self.last_named = self.last_meant = None
        self.last_plan = None
        self.uncounted = False
        return 0

    cdef CompiledRule named(self, object name):
        if isinstance(name, str) and name in self.held:
            raise InvalidRequest(no_check_by(name))
        if name is None and self.held and not self.rules:
            raise InvalidRequest(no_check_by(next(iter(self.held))))
        return rule_named(self.rules, name)

    cdef object find(self, object named):
        cdef PyObject* found
        cdef object meant, _named_before, _meant_before
        if named is self.last_named:
            return self.last_meant
        found = PyDict_GetItemWithError(self.known_by_id, PyLong_FromVoidPtr(<void*>named))
        if found == NULL:
            return self.meaning(named)
        meant = <object>found
        # What is dropped here may run code that checks. By then the two that are remembered belong together.
        _named_before, _meant_before = self.last_named, self.last_meant
        self.last_meant = meant
        self.last_named = named
        return meant

    cdef object meaning(self, object named):
        """What it means, remembered by value. A list or a mapping may change, so that it isn't remembered itself."""
        cdef Joint plan
        cdef int64_t renewed = self.renewals
        if isinstance(named, dict):
            return self.priced(<dict>named)
        if isinstance(named, list):
            return self.find(tuple(named))
        if isinstance(named, Timed):
            plan = self.plan_of((<Timed>named).rules)
            plan.timed = True
            return plan
        if isinstance(named, ConcurrencyRule):
            raise InvalidRequest(no_check_by(named.name))
        if not isinstance(named, (tuple, FirstOf, RateThrottleRule)):
            if isinstance(named, Mapping):
                return self.priced(dict(named))
            advice = "; the order of several rules matters, so that a set isn't taken" if isinstance(named, (set, frozenset)) else ""
            raise InvalidRequest(f"rule is a {type(named).__name__}; it is {FORMS}{advice}")
        try:
            meant = self.known.get(named)
        except TypeError:                        # not hashable: what stands in it is no rule, which is said below
            return self.plan(named)
        if meant is not None:
            return meant
        meant = self.adopted(named) if isinstance(named, RateThrottleRule) else self.plan(named)
        if renewed == self.renewals and len(self.known) >= KNOWN_MOST:
            self.renew()
            renewed = self.renewals
        self.known[named] = meant
        self.uncounted |= (<Joint>meant).uncounted != 0 if isinstance(meant, Joint) else not (<CompiledRule>meant).counted
        if renewed != self.renewals:
            self.renew()                         # the rules changed meanwhile, in another thread
            return meant
        self.owners.append(named)                # an id means something only as long as its object lives
        self.known_by_id[PyLong_FromVoidPtr(<void*>named)] = meant
        return meant

    cdef Joint plan_of(self, object named):
        """A plan of its own of what is named, be it a single rule."""
        found = self.named(named) if named is None or isinstance(named, str) else self.find(named)
        return (<Joint>found).twin() if isinstance(found, Joint) else joint_new([found], 0)

    cdef CompiledRule adopted(self, object rule):
        """The rule of the limiter that this one equals, or one of the caller's own: it shares the tally of its name."""
        cdef CompiledRule compiled = rule.compiled
        cdef CompiledRule named = self.rules.get(compiled.name)
        if named == compiled:
            return named
        if compiled.name not in self.own and len(self.own) >= KNOWN_MOST:
            self.own.clear()
            self.renew()
        compiled = CompiledRule(*compiled.facts())   # another limiter may count under the rule's
        self.count_in(compiled, named)
        self.own.setdefault(compiled.name, compiled)
        return compiled

    cdef CompiledRule rule_of(self, object named):
        """The rule that one element of several names."""
        if isinstance(named, str):
            return self.named(named)
        if isinstance(named, (RateThrottleRule, ConcurrencyRule)):
            return self.find(named)
        raise InvalidRequest(f"one of several rules is a {type(named).__name__}; each is the name (str) of a rule, a RateThrottleRule, "
                             "or FirstOf(...)")

    cdef Joint plan(self, object named):
        """What several rules mean: a tuple, or FirstOf alone."""
        cdef list rules = []
        cdef uint32_t alternatives = 0
        cdef CompiledRule rule
        for element in named if isinstance(named, tuple) else (named,):
            first = True
            for one in element.rules if isinstance(element, FirstOf) else (element,):
                if len(rules) == PARTS_MAX:
                    raise InvalidRequest(f"the check names more than {PARTS_MAX} rules, alternatives included; split it")
                alternatives |= <uint32_t>(not first) << len(rules)
                rule = self.rule_of(one)
                if rule.enforcement != DENY_IT and isinstance(element, FirstOf):
                    raise InvalidRequest(f"rule {rule.name!r} never denies (enforce={rule.enforce!r}), so that no other rule of FirstOf "
                                         "would ever pay; leave it out of FirstOf")
                rules.append(rule)
                first = False
        if not rules:
            raise InvalidRequest(f"the check names no rule; rule is {FORMS}")
        names = set()
        for rule in rules:
            if rule.name in names:
                raise InvalidRequest(f"rule {rule.name!r} is named twice for one key; name it once, with the cost of both")
            names.add(rule.name)
        return joint_new(rules, alternatives)

    cdef Joint priced(self, dict costs):
        """What a mapping means, with the cost of each rule."""
        cdef tuple named = tuple(costs)
        cdef Joint plan = (<Joint?>self.find(named)).twin()
        cdef int p, i = 0
        plan.priced = True
        for p in range(plan.size):
            if not plan.alternatives >> p & 1:
                cost = costs[named[i]]
                i += 1
            plan.costs[p] = units_of(cost, <CompiledRule>plan.rules[p], 1)
        return plan

    cdef Joint costing(self, Joint plan, object cost):
        return plan if cost is 1 else self.costing_from(plan, cost, 1)

    cdef Joint costing_from(self, Joint plan, object cost, int64_t least):
        cdef int64_t[PARTS_MAX] costs
        cdef int p
        if plan.priced:
            if not is_left_out(cost):
                raise InvalidRequest("cost is given beside a mapping, which has the cost of each rule; leave cost out")
            return plan
        for p in range(plan.size):
            costs[p] = units_of(cost, <CompiledRule>plan.rules[p], least)
        return plan.costing_each(costs)

    def entry(self, key, rule, cost=1, int64_t least=1):
        """A validated check of one key, for a storage: an Entry, or a Joint. Raises InvalidRequest or CostExceedsLimit.

        A Joint that isn't `counted` is none for a storage: `decide_here` decides it.
        """
        named = self.named(rule) if rule is None or isinstance(rule, str) else self.find(rule)
        if not isinstance(named, Joint):
            return entry_new(<CompiledRule>named, key, cost, least)
        return for_storage(keyed(self.costing_from(<Joint>named, cost, least), key))

    def entries(self, key, rule):
        """Validated resets of a key under each rule that is named. Raises InvalidRequest."""
        cdef Joint plan = self.plan_of(rule)
        cdef int p
        found = []
        for p in range(plan.size):
            found.append(entry_new(<CompiledRule>plan.rules[p], key, 1, 1))
        return found

    def together(self, requests):
        """A validated check of several keys: (key, rule, cost) of each. Raises InvalidRequest or CostExceedsLimit."""
        cdef Joint joint, part
        cdef list rules = [], keys = [], canonicals = [], costs = []
        cdef uint32_t alternatives = 0
        cdef int p
        for key, rule, cost in requests:
            named = self.named(rule) if rule is None or isinstance(rule, str) else self.find(rule)
            if not isinstance(named, Joint):
                named = joint_new([named], 0)
            part = keyed(self.costing_from(<Joint>named, cost, 1), key)
            if len(rules) + part.size > PARTS_MAX:
                raise InvalidRequest(f"check_all got more than {PARTS_MAX} checks, counting each rule of each; split it")
            alternatives |= part.alternatives << len(rules)
            for p in range(part.size):
                rules.append(part.rules[p])
                keys.append(part.keys[p])
                canonicals.append(part.canonicals[p])
                costs.append(part.costs[p])
        if not rules:
            raise InvalidRequest("check_all got no checks; it takes an iterable of at least one key or Request")
        if len({(rule.name, canonical) for rule, canonical in zip(rules, canonicals)}) < len(rules):
            raise InvalidRequest("check_all got one key twice under one rule; ask once, with the cost of both")
        joint = joint_new(rules, alternatives).with_keys(tuple(keys), tuple(canonicals))
        for p in range(joint.size):
            joint.costs[p] = costs[p]
        return joint

    def charging(self, key, rule, cost=1):
        """A validated charge of one key: a Joint that isn't limited by capacities. Raises InvalidRequest."""
        cdef Joint plan = self.plan_of(tuple(rule) if isinstance(rule, Mapping) else rule)
        cdef int p
        if plan.alternatives:
            raise InvalidRequest("a charge counts what was used, so that there is nothing to choose from; name one rule instead of FirstOf")
        if isinstance(rule, Mapping) and not is_left_out(cost):
            raise InvalidRequest("cost is given beside a mapping, which has the cost of each rule; leave cost out")
        costs = list(rule.values()) if isinstance(rule, Mapping) else [cost] * plan.size
        for p in range(plan.size):
            plan.costs[p] = units_used("the cost", costs[p], 1, COST_MAX)
        plan.corrects = CHARGES
        return for_storage(keyed(plan, key))

    # Decisions:

    cdef object decide(self, object key, Joint joint):
        cdef Place[PARTS_MAX] places
        cdef Outcome[PARTS_MAX] outs
        cdef int[PARTS_MAX] reported
        cdef int64_t now_us
        cdef int sets
        cdef bint allowed
        if key is not None and key is self.last_key and self.is_last(joint):
            memcpy(places, self.last_places, joint.size * sizeof(Place))
        else:
            joint = self.located(key, joint, places)
        now_us = self.table.now_us()
        if self.backend is not None:
            return self.bounded(key, joint, places, now_us)
        if joint.is_joint() or joint.uncounted:
            allowed = self.table.decide_joint(joint, places, now_us, outs, reported)
        else:                                    # a plain check writes where the clock was set back to, even if it is denied
            self.table.decide_place(places, now_us, joint.costs[0], outs)
            allowed = joint_outcome(joint, outs, reported, &sets)
        return self.decided(key, joint, MEMORY, outs, reported, allowed, now_us)

    cdef inline bint is_last(self, Joint joint) noexcept:
        """Whether the check before had this plan, and `last_places` still holds."""
        return joint is self.last_plan and self.table.forks == forks and self.last_home == self.table.secret[2]

    cdef Joint located(self, object key, Joint joint, Place* places):
        """Locate the keys of all parts. Returns the joint check: a plan only if its key is a str, which is remembered."""
        cdef const char* data
        cdef Py_ssize_t length
        cdef uint64_t home
        cdef int p
        if joint.keys is not None or not PyUnicode_CheckExact(key) or not key:
            joint = joint if joint.keys is not None else keyed(joint, key)
            self.table.locate_joint(joint, places)
            return joint
        try:
            data = PyUnicode_AsUTF8AndSize(key, &length)
        except UnicodeEncodeError:
            keyed(joint, key)                    # raises what there is to say of it
            raise
        self.last_plan = None
        home = self.table.secret[2]
        for p in range(joint.size):
            self.table.locate(<CompiledRule>joint.rules[p], False, data, length, &places[p])
        if home == self.table.secret[2]:         # else the first rules are to be met anew
            memcpy(self.last_places, places, joint.size * sizeof(Place))
            self.last_home = home
            self.last_key = key
            self.last_plan = joint
        return joint

    cdef object decided(self, object key, Joint joint, Source source, const Outcome* outs, const int* reported, bint allowed,
                        int64_t at_us):
        """A decision on a joint check, counted. Up to the point at which it has its reference, no Python code runs."""
        cdef JointDecision decision
        cdef int p = reported[0]
        if joint.sets == 1 and not joint.timed:
            single = decision_new(<CompiledRule>joint.rules[p], key if joint.keys is None else joint.keys[p], joint.costs[p], source,
                                  &outs[p])
            joint_count(single)
            return single
        if Py_REFCNT(<PyObject*>self.spare) != 1 or self.spare.room < joint.sets:
            # The one that is dropped may be the last to hold a key, whose end may check, and must not be given this one.
            decision = joint_blank(joint.sets)
            self.spare = decision
        else:
            decision = self.spare
        joint_fill(decision, joint, key, source, outs, reported, allowed)
        decision.at_us = at_us
        joint_count(decision)
        return decision

    # With a shared store:

    cdef object bounded(self, object key, Joint joint, const Place* places, int64_t now_us):
        """Decide by bounds or leases, or return an awaitable that asks the store."""
        cdef Outcome[PARTS_MAX] outs
        cdef int[PARTS_MAX] reported
        cdef int[PARTS_MAX] verdicts
        cdef int sets, verdict
        cdef Source source = MEMORY
        self.look(joint, places, now_us, outs, verdicts)
        verdict = sets_verdict(joint, verdicts)
        if verdict == OPEN:
            return self.to_ask(key, joint, places, verdicts)
        self.guess(joint, places, now_us, outs, verdicts)
        if verdict == LEASED and self.spend(joint, places, now_us, outs, verdicts):
            source = LEASE
        elif not joint.denies() and denied_by_bound(joint, verdicts):
            source = PREFILTER
        joint_outcome(joint, outs, reported, &sets)
        return self.decided(key, joint, source, outs, reported, verdict == LEASED, now_us)

    cdef int look(self, Joint joint, const Place* places, int64_t now_us, Outcome* outs, int* verdicts) except -1:
        """Say of each part what its bound does, and spend nothing."""
        cdef CompiledRule rule
        cdef int p
        for p in range(joint.size):
            if joint.uncounted >> p & 1:
                outs[p] = part_uncounted(joint, p)
                verdicts[p] = LEASED if outs[p].allowed else DENIED
                continue
            rule = <CompiledRule>joint.rules[p]
            # What a lease pays for can't be given back to where it came from, so that a reservation asks.
            verdicts[p] = bound_look(bound_at(&places[p]), places[p].terms, rule.lease_units > 0 and not joint.timed, now_us,
                                     joint.costs[p], self.backend.ttl_us, self.table.away and self.backend.allows(rule), &outs[p])
        return 0

    cdef int guess(self, Joint joint, const Place* places, int64_t now_us, Outcome* outs, const int* verdicts) except -1:
        """Say of each part that its bound doesn't deny what would be left at most."""
        cdef int p
        for p in range(joint.size):
            if verdicts[p] != DENIED and not joint.uncounted >> p & 1:
                bound_guess(bound_at(&places[p]), places[p].terms, now_us, joint.costs[p], &outs[p])
        return 0

    cdef bint spend(self, Joint joint, const Place* places, int64_t now_us, Outcome* outs, const int* verdicts) except -1:
        """Spend from the leases of the parts that pay. Returns whether there are any: else nothing is counted under all rules."""
        cdef int[PARTS_MAX] reported
        cdef int s, p, sets
        cdef bint leased = False
        joint_outcome(joint, outs, reported, &sets)
        for s in range(sets):
            p = reported[s]
            if verdicts[p] == LEASED and not joint.uncounted >> p & 1:
                bound_verdict(bound_at(&places[p]), places[p].terms, True, now_us, joint.costs[p], self.backend.ttl_us, &outs[p])
                leased = True
        return leased

    cdef PendingDecision to_ask(self, object key, Joint joint, const Place* places, const int* verdicts):
        """An awaitable that asks the store about all parts that are counted."""
        cdef Place[PARTS_MAX] asked
        cdef PendingDecision pending
        cdef Joint part = (joint if joint.keys is not None else keyed(joint, key)).counted_part()
        cdef int p
        for p in range(part.size):
            asked[p] = places[part.places[p] if part.whole is not None else p]
        pending = pending_joint(part, asked, CHECK) if part.is_joint() else pending_part(part, 0, asked, CHECK)
        pending.stage = NEW
        pending.backend = self.backend
        for p in range(joint.size):
            pending.stale = pending.stale or verdicts[p] == STALE
        return pending

    def decide_here(self, entry not None, bint checks):
        """The decision on a check that isn't `counted`. Statistics count it if it `checks`."""
        return (<Entry>entry).uncounted(checks) if isinstance(entry, Entry) else self.decided_here(entry, checks)

    cdef Decision decided_here(self, Joint joint, bint checks):
        cdef Place[PARTS_MAX] places
        cdef Outcome[PARTS_MAX] outs
        cdef int[PARTS_MAX] reported
        cdef int[PARTS_MAX] verdicts
        cdef int64_t now_us
        cdef int sets
        cdef bint allowed
        self.table.locate_joint(joint, places)
        now_us = self.table.now_us()
        if self.backend is not None:
            self.look(joint, places, now_us, outs, verdicts)
            self.guess(joint, places, now_us, outs, verdicts)
        else:
            self.table.look_joint(joint, places, now_us, outs)
        allowed = joint_outcome(joint, outs, reported, &sets)
        decision = joint_decision(joint, MEMORY, outs, reported, sets, allowed)
        if checks:
            joint_count(decision)
        return decision


cdef Joint keyed(Joint plan, object key):
    """The joint check that a plan is of a key, which is validated. Raises InvalidRequest."""
    cdef Entry entry = entry_new(<CompiledRule>plan.rules[0], key, 1, 0)
    return plan.with_keys((key,) * plan.size, (entry.canonical,) * plan.size)


cdef int64_t units_used(str what, object units, int64_t least, int64_t most) except -1:
    """Validate how many units were used. Raises InvalidRequest."""
    try:
        found = whole_number(units)
    except TypeError:
        found = None
    if found is None or isinstance(units, bool):
        raise InvalidRequest(f"{what} is {units if isinstance(units, bool) else 'a ' + type(units).__name__}; "
                             "it is a whole number (int) of units")
    if not least <= found <= most:
        raise InvalidRequest(f"{what} is {shown(found)}; it is from {least} to {most:,} units")
    return found


cdef int64_t used_most(CompiledRule rule) noexcept:
    """What may have been used of a reservation: the capacity, and as much debt."""
    return 2 * rule.terms.capacity if rule.counted else COST_MAX


def reserved(JointDecision decision not None):
    """Of each limit of a granted reservation: which rules may pay, which one does, its units, and the most that may have been used."""
    cdef Joint joint = decision.joint
    cdef CompiledRule rule
    cdef list found = [], names = []
    cdef int p, s = 0
    for p in range(joint.size):
        names.append((<CompiledRule>joint.rules[p]).name)
        if not joint.alternatives >> p + 1 & 1:
            rule = <CompiledRule>joint.rules[decision.reported[s]]
            found.append((tuple(names), rule.name, joint.costs[decision.reported[s]], used_most(rule)))
            names, s = [], s + 1
    return tuple(found)


def told(Decision decision not None):
    """The decision as the caller of a check would have got it."""
    if not isinstance(decision, JointDecision) or (<JointDecision>decision).sets > 1:
        return decision
    if (<JointDecision>decision).joint.corrects == BOOKS:
        return served(decision)
    return decision_new(decision.compiled, decision.key, decision.cost, decision.source_index, &decision.out)


def settlement(JointDecision decision not None, tuple used not None):
    """What to charge and to give back, if these units were used of each limit; None if that is nothing. Raises InvalidRequest."""
    cdef Joint joint = decision.joint, part
    cdef list parts = []
    cdef int64_t units, waited = 0
    cdef int s, p, i
    if joint.corrects == BOOKS and decision.outs[0].in_ticks:
        # What comes back is less by what drained since it was counted. Until its turn that was what had been booked before it.
        waited = decision.outs[0].retry_us // decision.compiled.terms.unit_ticks
    for s in range(decision.sets):
        p = decision.reported[s]
        units = units_used(f"what was used under rule {joint.rules[p].name!r}", used[s], 0, used_most(joint.rules[p]))
        # Nothing was taken under a rule that is off, or by which the check was over.
        if units != joint.costs[p] and decision.outs[s].allowed and not joint.uncounted >> p & 1:
            parts.append((p, units - joint.costs[p]))
    if not parts:
        return None
    if joint.keys is None:
        joint = keyed(joint, decision.key)
    part = joint_new([joint.rules[<int>one] for one, _ in parts], 0).with_keys(
        tuple([joint.keys[<int>one] for one, _ in parts]), tuple([joint.canonicals[<int>one] for one, _ in parts]))
    for i in range(part.size):
        units = parts[i][1]
        part.costs[i] = units if units >= 0 else min(-units + waited, COST_MAX)
        part.refunds |= <uint32_t>(units < 0) << i
    part.timed = True
    part.corrects = SETTLES
    part.granted_us = decision.at_us
    part.epoch = decision.epoch
    part.granted_here = decision.source_index == OUTAGE
    return part


cdef object for_storage(Joint joint):
    """What a storage is asked of it, if anything is counted; an Entry if that is a single check."""
    cdef Joint part = joint.counted_part() if joint.counted else joint
    return part if part.is_joint() else entry_new(<CompiledRule>part.rules[0], part.keys[0], part.costs[0], 0)


cdef inline Bound* bound_at(const Place* place) noexcept:
    """The bound of a located key, or NULL."""
    cdef int64_t found = shard_find(place.shard, place.hashed)
    return <Bound*>cell_at(place.shard, <uint32_t>found) if found >= 0 else NULL


cdef int sets_verdict(Joint joint, const int* verdicts) noexcept:
    """DENIED if a set is; LEASED if each has a part that a lease covers, and that pays; else OPEN."""
    cdef int p = 0
    cdef bint covered = True, denied, pays, is_open
    while p < joint.size:
        denied, pays, is_open = True, False, False
        while True:
            denied &= verdicts[p] == DENIED
            pays |= denied and joint.flagged >> p & 1    # it is over, and takes nothing
            pays |= verdicts[p] == LEASED and not is_open
            is_open |= verdicts[p] != DENIED and verdicts[p] != LEASED
            p += 1
            if not joint.alternatives >> p & 1:
                break
        if denied and not pays:
            return DENIED
        covered &= pays
    return LEASED if covered else OPEN


cdef bint denied_by_bound(Joint joint, const int* verdicts) noexcept:
    """Whether a bound denies one of the parts, be it one that never vetoes."""
    cdef int p
    for p in range(joint.size):
        if verdicts[p] == DENIED and not joint.uncounted >> p & 1:
            return True
    return False


cdef PendingDecision pending_part(Joint joint, int p, const Place* place, Mode mode):
    """What one part of a joint check asks."""
    cdef PendingDecision pending = PendingDecision.__new__(PendingDecision)
    canonical = joint.canonicals[p]
    pending.stage = MADE
    pending.mode = mode
    pending.rule = joint.rules[p]
    pending.key = joint.keys[p]
    pending.units = joint.costs[p]
    pending.hashed = place.hashed
    if canonical is None:
        pending.text = pending.key
        pending.data = PyUnicode_AsUTF8AndSize(pending.key, &pending.size)
        pending.mark = c"="
    else:
        pending.text = canonical
        pending.data = PyBytes_AS_STRING(canonical) + 1
        pending.size = PyBytes_GET_SIZE(canonical) - 1
        pending.mark = PyBytes_AS_STRING(canonical)[0]
    return pending


cdef PendingDecision pending_joint(Joint joint, const Place* places, Mode mode):
    """A joint check that has to ask, with a member for each part; `places` are those of its keys in the table of bounds."""
    cdef PendingDecision pending = pending_part(joint, 0, places, mode)
    cdef Parts parts = Parts.__new__(Parts)
    cdef int p
    parts.joint = joint
    parts.members = []
    for p in range(joint.size):
        parts.members.append(pending_part(joint, p, &places[p], mode))
    pending.text = parts
    pending.mark = JOINT
    pending.data = NULL
    pending.size = -1                        # it is the members that are addressed
    pending.mode = <Mode>(CHECK_JOINT + mode)
    return pending
