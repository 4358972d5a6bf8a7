"""The bound: what a process can say about the shared state of a key without asking (DESIGN: the bound, pre-filter, leases).

`known` is a view in this process's own time, of what the store has confirmed. Others can only have consumed more, so if even that
says no, the answer is no. A lease is units that the store has counted already and that this process may still spend.
"""

from libc.stdint cimport int64_t, uint32_t

from ratethrottle._arithmetic cimport (
    Counts, judge, KEEP, NO_MEMORY, Outcome, report, same_definition, Terms, Units, View, view_free, view_reach, view_roll,
    Window, window_live, window_new,
)
from ratethrottle._pieces cimport piece_free
from ratethrottle._table cimport Account, NamedSlot, named_fresh_at, Slot


cdef enum:
    KNOWN_ENTRIES = 3
    LATE_US = 11_000_000                   # for so long after an epoch began the store may take assertions
    # Two clocks may differ by a 64th before a bound says more than the store would.
    DRIFT_SHARE = 64

cdef struct Bound:                         # a slot of a table of bounds; begins as a NamedSlot does
    Slot slot                              # whose view is `known`
    char* name                             # of the state's key
    size_t name_size
    Account* account                       # what was admitted here while the store was away
    int64_t keep_until_us                  # for a lease, or because the key was reset
    int64_t generation_us                  # when it was last reset, in the store's time; 0: not as far as is known
    int64_t sent_us                        # when the call that confirmed it was sent: it ages from then
    int64_t received_us                    # and when its reply came
    int64_t server_us                      # the server's time in that reply
    int64_t epoch                          # and of which life of its data it spoke
    int64_t asked_us                       # when a check left to ask again; 0 once it was answered
    void* asked_by                         # the gathering that it left from: no other one hears the answer
    int64_t lease_units                    # left to spend
    int64_t lease_until_us                 # before this, in this process's time
    int64_t lease_at_us                    # the server's time of the grant, or that from which a sliding window counts it
    const Terms* lease_terms
    int64_t lease_epoch
    int64_t lease_size                     # units of that grant
    bint leasing                           # a call that asks for the next one is on its way
    bint heard                             # the store has said something of it
    int64_t returned_us                    # when units were given back: `known` of before that denies nothing; 0 once answered

cdef inline int64_t bound_fresh_at(const Bound* bound) noexcept nogil:
    """When nothing has to be remembered of the key any more."""
    return named_fresh_at(<const NamedSlot*>bound)


cdef enum Verdict:
    OPEN                                   # only the store can say
    DENIED
    STALE                                  # denied, but by what was heard too long ago
    LEASED


cdef inline int64_t aged(const Bound* bound, int64_t now_us) noexcept nogil:
    """What time it may be at most in the store, in the time that `known` is kept in."""
    cdef int64_t past_us = max(<int64_t>0, now_us - bound.sent_us)
    return bound.sent_us + past_us + past_us // DRIFT_SHARE + 1


cdef inline int64_t aged_late(const Bound* bound, int64_t now_us) noexcept nogil:
    """What time it is at least in the store, in the time that `known` is kept in: for what stands in for the store itself."""
    cdef int64_t past_us = max(<int64_t>0, now_us - bound.received_us)
    return bound.sent_us + past_us - past_us // DRIFT_SHARE


cdef inline bint bound_assertion(const Bound* bound, int64_t now_us, int64_t* numbers) noexcept nogil:
    """What a store that has lost it is told of a key, as `assert` of repair.lua takes it; False if nothing of it counts any more.

    Held too long rather than too short: it ages from when the reply came, and all of a window's units leave with the last.
    """
    cdef const View* known = &bound.slot.view
    cdef const Terms* rule = known.terms
    cdef const Window* window
    cdef int64_t then_us = aged_late(bound, now_us)
    cdef int64_t past_us = then_us - known.at_us
    numbers[0] = numbers[1] = numbers[2] = 0
    if rule.kind == c"b":
        # Below zero it still says by how much, for a store that has begun to drain earlier.
        past_us = min(past_us, view_reach(rule) + LATE_US)
        numbers[0] = known.amount.level_ticks - past_us * rule.drain_ticks
        if numbers[0] <= -LATE_US * rule.drain_ticks:
            return False
        # What a double holds. A drain above 8e8 ticks a µs is taken to have gone on for 9 s at most: too strict, never too loose.
        numbers[0] = max(numbers[0], -((<int64_t>1 << 53) - 1))
        return True
    if rule.kind == c"s":
        window = known.amount.window
        if window.count == 0:
            return False
        numbers[0] = window.total
        numbers[2] = then_us - bound.sent_us   # how long ago that was heard, at least
        numbers[1] = window.entries[window.first + window.count - 1].at_us + rule.window_us - then_us
        return numbers[1] > 0
    numbers[0] = known.amount.counts.cur
    numbers[1] = past_us
    if rule.kind == c"f":
        return numbers[0] > 0 and past_us < rule.window_us
    numbers[2] = known.amount.counts.prev
    return numbers[0] > 0 and past_us < 2 * rule.window_us or numbers[2] > 0 and past_us < rule.window_us


cdef inline int bound_verdict(Bound* bound, const Terms* rule, bint leases, int64_t now_us, int64_t units, int64_t ttl_us,
                              Outcome* out) noexcept nogil:
    """Decide if this process can, and spend from the lease if there is one, and the rule is still the one it was taken under."""
    cdef View view = bound.slot.view
    cdef int64_t then_us = aged(bound, now_us), total = 0, left
    cdef uint32_t expired = 0
    if view.terms != rule and not same_definition(view.terms, rule):
        return OPEN
    if rule.kind == c"s":
        window_live(view.amount.window, then_us - rule.window_us, &expired, &total)
    else:
        view_roll(&view, then_us)
    if leases and bound.lease_terms == rule and bound.lease_units >= units and now_us < bound.lease_until_us:
        bound.lease_units -= units
        out.allowed = True
        out.retry_us = 0
        report(rule, &view, then_us, total, out)
        # What is left of the lease has been counted, and is still this process's to grant.
        left = bound.lease_units
        out.remaining += left * (rule.unit_ticks if rule.kind == c"b" else rule.span if rule.kind == c"c" else 1)
        return LEASED
    judge(rule, &view, then_us, units, expired, total, out)
    # What is left of a lease goes back with the next call, or is on its way, and may be just what this check needs.
    if out.allowed or bound.lease_units or bound.sent_us <= bound.returned_us:
        return OPEN
    report(rule, &view, then_us, total, out)
    return DENIED if now_us - bound.sent_us <= ttl_us else STALE


cdef inline void known_entry(Window* window, int64_t at_us, int64_t units) noexcept nogil:
    if units <= 0:
        return
    if window.count and window.entries[window.count - 1].at_us >= at_us:
        window.entries[window.count - 1].units += units
    else:
        window.entries[window.count] = Units(at_us, units)
        window.count += 1
    window.total += units


cdef inline int know_window(View* known, const Terms* rule, const int64_t* answer, bint refused, int64_t cost,
                            int64_t sent_us) noexcept nogil:
    """Of a window the answer says when the first units leave, when the last one does, and when enough have left for a refused `cost`."""
    cdef Window* window = known.amount.window
    cdef int64_t left_us = sent_us - rule.window_us, held = answer[1], staying = 0, last = 1 if held > 1 else 0
    if window == NULL or window.room < KNOWN_ENTRIES:
        window = window_new(KNOWN_ENTRIES)
        if window == NULL:
            return NO_MEMORY
        piece_free(known.amount.window)
        known.amount.window = window
    window.first = window.count = 0
    window.total = 0
    if refused and answer[4] > 0:          # until then more than `capacity − cost` units stay
        staying = min(held - last, rule.capacity - cost + 1 - last)
    known_entry(window, left_us + answer[2], held - staying - last)
    if staying > 0:
        known_entry(window, left_us + answer[4], staying)
    known_entry(window, left_us + answer[3], last)
    return KEEP


cdef inline int bound_learn(Bound* bound, const Terms* rule, const int64_t* answer, bint refused, int64_t cost, int64_t sent_us,
                            int64_t received_us, int64_t server_us) noexcept nogil:
    """Take up what the store says of a key after a decision. Returns NO_MEMORY or KEEP."""
    cdef View* known = &bound.slot.view
    if known.terms != NULL and (server_us < bound.server_us and sent_us < bound.received_us):
        return KEEP                        # overtaken by a newer one
    if known.terms != NULL and known.terms.kind == c"s" and rule.kind != c"s":
        view_free(known)
    if known.terms == NULL or (known.terms.kind == c"s") != (rule.kind == c"s"):
        known.amount.window = NULL
    if rule.kind == c"s":
        if know_window(known, rule, answer, refused, cost, sent_us) == NO_MEMORY:
            return NO_MEMORY
        known.at_us = 0
    elif rule.kind == c"b":
        known.amount.level_ticks = answer[1]
        known.at_us = sent_us
    elif rule.kind == c"c":
        known.amount.counts = Counts(<uint32_t>answer[1], <uint32_t>answer[2])
        known.at_us = sent_us - answer[3]
    else:
        known.amount.counts = Counts(<uint32_t>answer[1], 0)
        known.at_us = sent_us - answer[2]
    known.terms = rule
    bound.heard = True
    bound.sent_us = sent_us
    bound.received_us = received_us
    bound.server_us = server_us
    return KEEP
