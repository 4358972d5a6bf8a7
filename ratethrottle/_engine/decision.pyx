# cython: auto_pickle=False, autotestdict=False
"""Decisions and what makes them: validated calls, outcomes, and the counts by rule and source."""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING
from cpython.object cimport PyObject, PyTypeObject
from cpython.unicode cimport PyUnicode_AsUTF8String
from libc.stdint cimport int64_t

from ratethrottle._engine.arithmetic cimport answer_length, ceil_div, Outcome, settle, take_answer, take_correction
from ratethrottle._engine.definitions cimport CompiledRule, FLAG_IT

from math import inf as _inf
from math import nextafter

from ratethrottle.errors import CostExceedsLimit, InvalidRequest, listed


cdef extern from "Python.h":
    PyTypeObject* Py_TYPE(PyObject*)
    bint PyUnicode_Check(object)
    bint PyBool_Check(object)
    object PyNumber_Index(object)
    long long PyLong_AsLongLongAndOverflow(object, int* overflow) except? -1


cdef extern from *:
    """
    static destructor rt_free_decision;
    static void rt_set_decision_dealloc(PyTypeObject *type, destructor dealloc) {
        rt_free_decision = type->tp_dealloc;
        type->tp_dealloc = dealloc;
    }
    """
    void free_decision "rt_free_decision"(PyObject*) noexcept
    void set_decision_dealloc "rt_set_decision_dealloc"(PyTypeObject* type, void (*dealloc)(PyObject*) noexcept)


cdef enum:
    SPARE_DECISIONS_MAX = 256

cdef tuple SOURCES = ("memory", "redis", "prefilter", "lease", "outage", "overload")


cdef object seconds_up(int64_t us):
    """The least float of seconds that is not below the µs, so that a task that sleeps that long doesn't wake too early."""
    seconds = us / 1e6
    numerator, denominator = seconds.as_integer_ratio()
    return seconds if numerator * 1_000_000 >= us * denominator else nextafter(seconds, _inf)


@cython.no_gc
cdef class Decision:
    """The outcome of a check: true when allowed. Durations are seconds from the decision, rounded up to the µs.

    Of a check of several limits it reports the one that binds: denied, the one with the longest `retry_after`; allowed, the one with
    the least share of its capacity left.
    """

    def __init__(self):
        raise TypeError("decisions are made by a limiter: `await limiter.check(key)`")

    @property
    def allowed(self):
        """Whether the units were granted, or their rule only flags (`enforce="flag"`)."""
        return self.out.allowed or self.compiled.enforcement == FLAG_IT

    @property
    def over(self):
        """Whether this would have been denied, but for a rule with `enforce="flag"`; nothing was consumed then. Of a charge: whether the
        key is in debt now.
        """
        return self.out.retry_us != 0 if self.out.allowed else self.compiled.enforcement == FLAG_IT

    @property
    def remaining(self):
        """Units left, after what was granted."""
        return settled(self).remaining

    @property
    def reset_after_us(self):
        """Integer µs until nothing that was used counts any more."""
        return settled(self).reset_us

    @property
    def rule(self):
        """Name of the rule that decided."""
        return self.compiled.name

    @property
    def limit(self):
        """The rule's capacity: the most units that can be used at once."""
        return self.compiled.terms.capacity if self.compiled.limit else 0

    @property
    def source(self):
        """What decided: "memory", "redis", "prefilter", "lease", "outage" or "overload"."""
        return SOURCES[self.source_index]

    @property
    def retry_after_us(self):
        """Integer µs until the same check would be granted if nobody else consumed; 0 when granted, 2^63 − 1 for never."""
        return settled(self).retry_us if self.out.retry_us >= 0 else 0x7FFFFFFFFFFFFFFF

    @property
    def retry_after(self):
        """Seconds until the same check would be granted if nobody else consumed; 0.0 when granted, inf for never.

        Of a decision that is `over` it says when the next one isn't any more; of a charge, when the debt is paid.
        Exact if `retry_after_exact` says so. With the source "prefilter" it is the earliest time: Redis wasn't asked. Of a rule with
        leases it is the latest: units that others hold unspent may come back within `lease_ttl`.
        """
        return seconds_up(settled(self).retry_us) if self.out.retry_us >= 0 else _inf

    @property
    def retry_after_exact(self):
        """Whether `retry_after` is exact. It is a bound if Redis wasn't asked, or if others may hold units of a lease."""
        return self.out.allowed and not self.out.retry_us or self.source_index <= REDIS and self.compiled.lease_units == 0

    @property
    def reset_after(self):
        """Seconds until nothing that was used counts any more."""
        return seconds_up(settled(self).reset_us)

    @property
    def parts(self):
        """A decision for each limit of a check that named several, in order; empty if it named only one."""
        return ()

    @property
    def atomic(self):
        """Whether all parts were decided at one instant. If not, another check may have been denied for what this one gave back."""
        return True

    def headers(self):
        """HTTP fields of this decision, by draft-ietf-httpapi-ratelimit-headers-11: a new dict of str to str.

        Times are whole seconds rounded up, at least 1 when denied. `Retry-After` comes only with a denial that ends. Those of a
        decision that is `over` are those of an allowed one.
        """
        cdef bint denied = not self.out.allowed and self.compiled.enforcement != FLAG_IT
        cdef int64_t wait_us = settled(self).retry_us if denied else settled(self).reset_us
        cdef int64_t wait_s = ceil_div(wait_us, 1_000_000) if wait_us > 0 else 0
        cdef dict fields = {
            "RateLimit-Policy": f'"{self.compiled.name}";q={self.compiled.limit};w={ceil_div(self.compiled.terms.window_us, 1_000_000)}',
            "RateLimit": f'"{self.compiled.name}";r={self.out.remaining};t={wait_s}' if wait_us >= 0
                         else f'"{self.compiled.name}";r={self.out.remaining}',
        }
        if wait_us >= 0 and denied:
            fields["Retry-After"] = str(wait_s)
        return fields

    def __bool__(self):
        return self.out.allowed or self.compiled.enforcement == FLAG_IT

    def __eq__(self, other):
        if not isinstance(other, Decision):
            return NotImplemented
        return decision_facts(self) == decision_facts(<Decision>other)

    def __hash__(self):
        return hash(decision_facts(self))

    def __reduce__(self):
        return _restore_decision, decision_facts(self)

    def __repr__(self):
        # Without the key: a decision ends up in logs, and keys are addresses and accounts.
        return (f"<Decision {'over' if self.over else 'allowed' if self.allowed else 'denied'} rule={self.rule!r} cost={self.cost} "
                f"remaining={self.remaining} limit={self.limit} retry_after={self.retry_after} "
                f"reset_after={self.reset_after} source={self.source!r}>")


# Those without references, for the next ones. Cython would keep them too, but asks more about a type that has subclasses.
cdef PyObject* spares[SPARE_DECISIONS_MAX]
cdef int spare_count = 0


cdef void decision_dealloc(PyObject* this) noexcept:
    global spare_count
    if Py_TYPE(this) == <PyTypeObject*>Decision:
        (<Decision>this).compiled = None
        (<Decision>this).key = None          # may run code, and that may drop decisions
        if spare_count < SPARE_DECISIONS_MAX:
            spares[spare_count] = this
            spare_count += 1
            return
    free_decision(this)


set_decision_dealloc(<PyTypeObject*>Decision, decision_dealloc)


cdef Decision decision_blank():
    """A decision that is to be filled in."""
    global spare_count
    if spare_count == 0:
        return Decision.__new__(Decision)
    spare_count -= 1
    return <Decision>spares[spare_count]     # this is its only reference


cdef Decision decision_new(CompiledRule rule, object key, int64_t cost, Source source, const Outcome* out):
    cdef Decision decision = decision_blank()
    decision.out = out[0]
    decision.compiled = rule
    decision.key = key
    decision.cost = cost
    decision.source_index = source
    return decision


cdef tuple decision_facts(Decision decision):
    """All that a decision on one limit says."""
    cdef Outcome* out = settled(decision)
    return (decision.compiled, decision.key, decision.cost, <int>decision.source_index, out.allowed, out.remaining, out.retry_us,
            out.reset_us)


def read_answer(CompiledRule rule not None, numbers, int64_t cost, int64_t position=0, int64_t count=1):
    """Read what the script's answer to `count` equal checks says to the check at `position` (0: the first).

    Returns allowed, remaining, retry_us (−1: never) and reset_us.
    """
    cdef int64_t[6] raw
    cdef Outcome out
    cdef int i
    if not 0 <= position < count:
        raise ValueError("there is no such position among those checks")
    if not numbers or len(numbers) != answer_length(&rule.terms, numbers[0], count) + (rule.lease_units > 0):
        raise ValueError("the answer has another length than its rule's kind asks for")
    for i in range(len(numbers)):
        raw[i] = numbers[i]
    take_answer(&rule.terms, raw, raw[len(numbers) - 1] if rule.lease_units else 0, cost, position, &out)
    if out.in_ticks:
        settle(&rule.terms, &out)
    return out.allowed, out.remaining, out.retry_us, out.reset_us


def read_correction(CompiledRule rule not None, numbers):
    """Read what the script answers to a charge or a refund: True, remaining, how long the key is in debt in µs, and reset_us."""
    cdef int64_t[6] raw
    cdef Outcome out
    cdef int i
    if not numbers or len(numbers) != answer_length(&rule.terms, numbers[0], 1):
        raise ValueError("the answer has another length than its rule's kind asks for")
    for i in range(len(numbers)):
        raw[i] = numbers[i]
    take_correction(&rule.terms, raw, &out)
    if out.in_ticks:
        settle(&rule.terms, &out)
    return out.allowed, out.remaining, out.retry_us, out.reset_us


def _restore_decision(CompiledRule rule not None, key, int64_t cost, int source, bint allowed, int64_t remaining,
                      int64_t retry_us, int64_t reset_us):
    """Make a decision from its facts (pickle)."""
    cdef Outcome out = Outcome(allowed, False, remaining, retry_us, reset_us)
    return decision_new(rule, key, cost, <Source>source, &out)


cdef dict decisions_counted(dict rules, object outcomes):
    """The decisions under each of these rules: name -> source -> outcomes(allowed, denied)."""
    cdef CompiledRule rule
    cdef dict nothing = dict.fromkeys(SOURCES, outcomes(0, 0)), counted = {}, of_rule
    cdef int source
    for rule in list(rules.values()):            # `outcomes` is Python code: another thread may add a rule meanwhile
        of_rule = nothing
        for source in range(len(SOURCES)):
            if rule.counts[2 * source] or rule.counts[2 * source + 1]:
                if of_rule is nothing:
                    of_rule = nothing.copy()
                of_rule[SOURCES[source]] = outcomes(rule.counts[2 * source + 1], rule.counts[2 * source])
        counted[rule.name] = of_rule
    return counted


@cython.final
cdef class Entry:
    """One validated check, on its way to a storage."""

    def __init__(self):
        raise TypeError("entries are made by a limiter")

    @property
    def counted(self):
        """Whether what was used decides."""
        return self.rule.counted

    cdef inline bint joined(self):
        return PyBytes_AS_STRING(self.canonical)[0] == c"("

    def costing(self, int64_t units):
        """The same entry with another cost."""
        cdef Entry entry = Entry.__new__(Entry)
        entry.rule = self.rule
        entry.key = self.key
        entry.canonical = self.canonical
        entry.cost = units
        return entry

    def asked(self, Decision decision not None):
        """Turn a decision on a cost of 1 into that on a cost of 0, which only asks: allowed."""
        cdef Outcome out = settled(decision)[0]
        out.allowed = True
        out.retry_us = 0
        return decision_new(self.rule, self.key, 0, decision.source_index, &out)

    def uncounted(self, bint checks):
        """The decision under a rule that counts nothing. Statistics count it if it `checks`."""
        cdef Outcome out = outcome_uncounted(self.rule, self.cost)
        if checks:
            count_decision(self.rule, MEMORY, out.allowed)
        return decision_new(self.rule, self.key, self.cost, MEMORY, &out)

    def decided(self, str source not None, bint allowed, int64_t remaining, int64_t retry_us, int64_t reset_us):
        """The decision that a storage took on this entry. `retry_us` −1 is never."""
        cdef Outcome out = Outcome(allowed, False, remaining, retry_us, reset_us)
        return decision_new(self.rule, self.key, self.cost, <Source>SOURCES.index(source), &out)


cdef CompiledRule rule_named(dict rules, object name):
    """The rule that a call means; None: the only one. Raises InvalidRequest."""
    if name is None:
        if len(rules) == 1:
            return <CompiledRule>next(iter(rules.values()))
        if not rules:
            raise InvalidRequest("the limiter has no rule yet; add one with add_rule(...)")
        raise InvalidRequest(f"the limiter has several rules; name one (rule=...): {listed(rules)}; "
                             "in check_many write Request(key, rule)")
    if not isinstance(name, str):
        raise InvalidRequest(f"rule is a {type(name).__name__}; it is the name (str) of a rule")
    found = rules.get(name)
    if found is None:
        # The message doesn't repeat the name: if the arguments were swapped, it is a key.
        raise InvalidRequest(f"the limiter has no such rule; it has {listed(rules, name) or 'none yet'}")
    return <CompiledRule>found


cdef Entry entry_new(CompiledRule rule, object key, object cost, int64_t least):
    """Validate the cost and the key of a call. Raises InvalidRequest or CostExceedsLimit."""
    cdef Entry entry = Entry.__new__(Entry)
    entry.rule = rule
    entry.cost = units_of(cost, rule, least)
    entry.key = key
    if PyUnicode_Check(key):
        if not key:
            raise InvalidRequest("the key is empty; a key names who is limited")
        entry.canonical = b"=" + utf8(key)
    elif isinstance(key, tuple):
        entry.canonical = b"(" + joined_key(key)
    else:
        raise InvalidRequest(f"the key is a {type(key).__name__}; a key is a str, or a tuple of str and int")
    return entry


cdef bytes joined_key(object key):
    """A tuple as netstrings, so that no two tuples differ only by where their parts join."""
    cdef list parts = []
    if not key:
        raise InvalidRequest("the key is an empty tuple; a key has at least one part")
    for part in key:
        if isinstance(part, str):
            encoded = utf8(part)
            parts.append(b"s%d:%b" % (len(encoded), encoded))
        elif isinstance(part, int) and not PyBool_Check(part):
            try:
                parts.append(b"i%d " % part)
            except ValueError:
                raise InvalidRequest("a part of the key is an int with more digits than Python prints; use a str") from None
        else:
            raise InvalidRequest(f"a part of the key is a {type(part).__name__}; a tuple key holds only str and int")
    return b"".join(parts)


cdef bytes utf8(object text):
    try:
        return PyUnicode_AsUTF8String(text)  # of a subclass too, whatever its encode() does
    except UnicodeEncodeError:
        raise InvalidRequest("the key holds a lone surrogate and has no UTF-8; decode the bytes it came from strictly") from None


cdef int64_t units_of(object cost, CompiledRule rule, int64_t least) except -1:
    """The cost as an integer from `least` (1, or 0 for a peek) to the rule's capacity."""
    cdef int overflow = 0
    cdef long long units
    cdef int64_t most = rule.terms.capacity if rule.counted else COST_MAX
    if PyBool_Check(cost):
        raise InvalidRequest(f"the cost is {cost}; it is a whole number of units, at least {least}")
    try:
        index = PyNumber_Index(cost)
    except TypeError:
        raise InvalidRequest(f"the cost is a {type(cost).__name__}; it is a whole number (int) of units, at least {least}") from None
    units = PyLong_AsLongLongAndOverflow(index, &overflow)
    if overflow > 0 or (overflow == 0 and units > most):
        raise CostExceedsLimit(index, most if rule.limit else 0, rule.name)
    if overflow < 0 or units < least:
        hint = "; peek(key, cost=0) says what is left" if overflow == 0 and units == 0 else ""
        raise InvalidRequest(f"the cost is below {least}; it is a whole number of units, at least {least}{hint}")
    return units


cdef bint is_left_out(object cost) except -1:
    """Whether a cost beside a mapping is the 1 that stands for none, of whatever type."""
    if cost is 1:
        return True
    try:
        return not PyBool_Check(cost) and PyNumber_Index(cost) == 1
    except TypeError:
        return False
