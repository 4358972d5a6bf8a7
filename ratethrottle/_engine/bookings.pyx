# cython: auto_pickle=False, autotestdict=False
"""Bookings: checks of a bucket that are granted for later. Each is a Joint of one part, and its decision says when it is its turn."""

from libc.stdint cimport int64_t

from ratethrottle._engine.arithmetic cimport BUCKET, ceil_div, CHARGED, Outcome, settle, Terms
from ratethrottle._engine.corrections cimport correct_place
from ratethrottle._engine.decision cimport Decision, decision_new, Entry, MEMORY, OUTAGE, settled
from ratethrottle._engine.definitions cimport CompiledRule, DENY_IT
from ratethrottle._engine.joint cimport BOOKS, Joint, joint_count, joint_decision, joint_new, JointDecision, UNBOOKS
from ratethrottle._engine.keys cimport KeyTable
from ratethrottle._engine.table cimport Place
from ratethrottle._engine.turns cimport BOOKED_US, take_booking

from ratethrottle._engine.corrections import expect_refunds


def bookable(entry not None):
    """Whether a check can be booked: one of a single bucket, which may deny it. Where units are taken ahead nobody stands in line."""
    cdef CompiledRule rule
    cdef Joint joint
    if isinstance(entry, Entry):
        rule = (<Entry>entry).rule
    else:
        joint = <Joint?>entry
        if joint.size > 1 or joint.whole is not None or joint.corrects:
            return False
        rule = <CompiledRule>joint.rules[0]
    return rule.terms.kind == BUCKET and rule.counted and rule.enforcement == DENY_IT and rule.lease_units == 0


def booking(entry not None, int64_t ahead_us):
    """The booking that stands for a check. ahead_us: how far ahead its turn may be, 0 to BOOKED_US."""
    cdef Joint joint
    if isinstance(entry, Entry):
        joint = joint_new([entry.rule], 0).with_keys((entry.key,), (entry.canonical,))
        joint.costs[0] = (<Entry>entry).cost
    else:
        joint = (<Joint?>entry).twin()
    joint.timed = True
    joint.corrects = BOOKS
    joint.booking.ahead_us = min(max(ahead_us, <int64_t>0), <int64_t>BOOKED_US)
    joint.booking.evenly = (<CompiledRule>joint.rules[0]).strategy == "leaky_bucket"
    return joint


def unbooking(JointDecision decision not None):
    """What gives a booking back that nobody needs any more; None if it was none."""
    cdef Joint joint
    if decision.joint.corrects != BOOKS or decision.source_index == OUTAGE:
        return None
    joint = decision.joint.twin()
    joint.epoch = decision.epoch
    return returning(joint, decision.at_us, decision.at_us + settled(decision).reset_us)


cdef Joint returning(Joint booked, int64_t at_us, int64_t empty_us):
    """Make a booking what gives it back. empty_us: when the bucket would have been empty after it."""
    booked.corrects = UNBOOKS
    booked.refunds = 1
    booked.granted_us = at_us
    booked.booking.returns = True
    booked.booking.empty_us = empty_us
    return booked


def served(Decision decision not None):
    """The decision as its caller gets it, now that it is its turn."""
    cdef const Terms* terms = &decision.compiled.terms
    cdef Outcome out
    if not isinstance(decision, JointDecision) or (<JointDecision>decision).joint.corrects != BOOKS:
        return decision
    out = (<JointDecision>decision).outs[0]
    if out.allowed and out.in_ticks:
        # What has drained meanwhile is left again.
        out.reset_us = max(<int64_t>0, out.reset_us - ceil_div(out.retry_us, terms.drain_ticks) * terms.drain_ticks)
        out.remaining = terms.capacity * terms.unit_ticks - out.reset_us
        out.retry_us = 0
    return decision_new(decision.compiled, decision.key, decision.cost, decision.source_index, &out)


def book(KeyTable table not None, Joint joint not None):
    """Book in memory. Returns the decision, whose `retry_after` says how long until it is its turn."""
    cdef Place place
    cdef Outcome out
    cdef int64_t now_us
    cdef int reported = 0
    if table.removals == NULL:
        expect_refunds(table)
    table.locate_joint(joint, &place)
    now_us = table.now_us()
    correct_place(table, &place, now_us, joint.costs[0], CHARGED, &joint.booking, &out)
    decision = joint_decision(joint, MEMORY, &out, &reported, 1, out.allowed)
    (<JointDecision>decision).at_us = now_us
    joint_count(decision)
    return decision


def unbook(KeyTable table not None, Joint joint not None):
    """Give a booking back, if nobody has booked behind it."""
    cdef Place place
    cdef Outcome out
    table.locate_joint(joint, &place)
    correct_place(table, &place, table.now_us(), joint.costs[0], joint.granted_us, &joint.booking, &out)


def unbook_entry(KeyTable table not None, Entry entry not None, int64_t at_us, int64_t empty_us):
    """Give back what was booked of one key at that time of the table's clock, for tests."""
    unbook(table, returning(booking(entry, 0), at_us, empty_us))


def read_booking(CompiledRule rule not None, numbers, int64_t units, bint evenly, int64_t position):
    """Read what the script answers to equal bookings, for one of them: allowed, remaining, how long until its turn, and reset_us."""
    cdef int64_t[2] raw
    cdef Outcome out
    raw[0], raw[1] = numbers
    take_booking(&rule.terms, raw, units, evenly, position, &out)
    settle(&rule.terms, &out)
    return out.allowed, out.remaining, out.retry_us, out.reset_us
