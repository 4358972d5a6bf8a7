"""The bound: what a process can say about the shared state of a key without asking (pre-filter, leases).

`known` is a view in this process's own time, of what the store has confirmed. Others can only have used more since. So if even that
view denies, the answer is no. A lease is units that the store has counted already, and that this process may still spend.
"""

from libc.stdint cimport int64_t, uint32_t

from ratethrottle._engine.arithmetic cimport (
    BUCKET, COUNTER, Counts, FIXED, judge, LEVEL_MAX, Outcome, report, same_definition, settle, SLIDING, Terms, View, view_free,
    view_live, view_reach, view_roll,
)
from ratethrottle._engine.pieces cimport piece_free
from ratethrottle._engine.table cimport (
    Account, Cell, cell_at, cell_views, fingerprints_of, named_fresh_at, NamedCell, Shard, terms_met,
)
from ratethrottle._engine.turns cimport BOOKED_US, Booking, booking_fits, tell_booking
from ratethrottle._engine.window cimport KEEP, NO_MEMORY, Units, Window, window_new


cdef enum:
    KNOWN_ENTRIES = 3
    LATE_US = 11_000_000                   # after an epoch began, the store may take assertions for this long
    # A bound never says more than the store would while two clocks differ by up to a 64th.
    DRIFT_SHARE = 64

cdef struct Bound:                         # a cell of a table of bounds; begins as a NamedCell does
    Cell cell                              # its view is `known`
    char* name                             # of the state's key in the store
    size_t name_size
    Account* account                       # what was admitted here while the store was away
    int64_t keep_until_us                  # for a lease, or because the key was reset
    int64_t generation_us                  # when the key was last reset, in the store's time; 0: never, as far as is known
    int64_t sent_us                        # when the call that confirmed `known` was sent: `known` ages from then
    int64_t received_us                    # and when its reply came
    int64_t server_us                      # the server's time in that reply
    int64_t epoch                          # and the epoch that it was of
    int64_t asked_us                       # when a check left to ask again; 0 once it was answered
    void* asked_by                         # the connection that it left from, the only one that takes the answer
    int64_t lease_units                    # left to spend
    int64_t lease_until_us                 # before this, in this process's time
    int64_t lease_at_us                    # the server's time of the grant; of a sliding window, from when it counts the units
    const Terms* lease_terms
    int64_t lease_epoch
    int64_t lease_size                     # units of that grant
    bint leasing                           # a call that asks for the next lease is on its way
    bint heard                             # the store has said something of the key
    int64_t returned_us                    # when units were given back: an older `known` denies nothing; 0 once answered

cdef inline int64_t bound_fresh_at(const Bound* bound) noexcept nogil:
    """When nothing of the key has to be remembered any more."""
    return named_fresh_at(<const NamedCell*>bound)


cdef enum Verdict:
    OPEN                                   # only the store can say
    DENIED
    STALE                                  # denied, but `known` was confirmed too long ago
    LEASED


cdef inline int64_t aged(const Bound* bound, int64_t now_us) noexcept nogil:
    """The latest that it may be in the store now, in the time that `known` is kept in."""
    cdef int64_t past_us = max(<int64_t>0, now_us - bound.sent_us)
    return bound.sent_us + past_us + past_us // DRIFT_SHARE + 1


cdef inline int64_t aged_late(const Bound* bound, int64_t now_us) noexcept nogil:
    """The earliest that it may be in the store now, in the time that `known` is kept in: for decisions in the store's place."""
    cdef int64_t past_us = max(<int64_t>0, now_us - bound.received_us)
    return bound.sent_us + past_us - past_us // DRIFT_SHARE


cdef inline bint bound_assertion(const Bound* bound, int64_t now_us, int64_t* numbers) noexcept nogil:
    """The numbers that repair.lua's `assert` takes to restore a key that the store has lost; False if none of them counts any more.

    They hold too long rather than too short: `known` ages from when the reply came, and a window's units all leave with the last.
    """
    cdef const View* known = &bound.cell.view
    cdef const Terms* terms = known.terms
    cdef const Window* window
    cdef int64_t then_us = aged_late(bound, now_us)
    cdef int64_t past_us = then_us - known.at_us
    numbers[0] = numbers[1] = numbers[2] = 0
    if terms.kind == BUCKET:
        # A level below zero still says by how much: the store may have begun to drain earlier.
        past_us = min(past_us, 2 * view_reach(terms) + BOOKED_US + LATE_US)  # a debt counts for twice as long
        numbers[0] = known.amount.level_ticks - past_us * terms.drain_ticks
        if numbers[0] <= -LATE_US * terms.drain_ticks:
            return False
        # Lua is exact up to this. A drain above 8e8 ticks a µs is cut off after about 9 s: too strict, never too loose.
        numbers[0] = max(numbers[0], -LEVEL_MAX)
        return True
    if terms.kind == SLIDING:
        window = known.amount.window
        if window.count == 0:
            return False
        numbers[0] = window.total
        numbers[2] = then_us - bound.sent_us   # so long ago at least it was heard
        numbers[1] = window.entries[window.first + window.count - 1].at_us + terms.window_us - then_us
        return numbers[1] > 0
    numbers[0] = known.amount.counts.cur
    numbers[1] = past_us
    if terms.kind == FIXED:
        return numbers[0] > 0 and past_us < terms.window_us
    numbers[2] = known.amount.counts.prev
    return numbers[0] > 0 and past_us < 2 * terms.window_us or numbers[2] > 0 and past_us < terms.window_us


cdef inline int bound_verdict(Bound* bound, const Terms* terms, bint leases, int64_t now_us, int64_t units, int64_t ttl_us,
                              Outcome* out) noexcept nogil:
    """Decide if this process can. A lease is spent from while the rule still has the terms that it was taken under."""
    cdef View view = bound.cell.view
    cdef int64_t then_us = aged(bound, now_us), total, left
    cdef uint32_t expired
    if view.terms != terms and not same_definition(view.terms, terms):
        return OPEN
    view_live(&view, then_us, &expired, &total)
    if leases and bound.lease_terms == terms and bound.lease_units >= units and now_us < bound.lease_until_us:
        bound.lease_units -= units
        out.allowed = True
        out.retry_us = 0
        report(terms, &view, then_us, total, out)
        # The rest of the lease has been counted by the store, but this process may still grant it.
        left = bound.lease_units
        out.remaining += left * (terms.unit_ticks if terms.kind == BUCKET else terms.span if terms.kind == COUNTER else 1)
        return LEASED
    judge(terms, &view, then_us, units, expired, total, out)
    # The rest of a lease goes back with the next call, or is on its way, and may be just what this check needs.
    if out.allowed or bound.lease_units or bound.sent_us <= bound.returned_us:
        return OPEN
    report(terms, &view, then_us, total, out)
    return DENIED if now_us - bound.sent_us <= ttl_us else STALE


cdef inline int bound_look(const Bound* bound, const Terms* terms, bint leases, int64_t now_us, int64_t units, int64_t ttl_us,
                           bint admits, Outcome* out) noexcept nogil:
    """Say what `bound_verdict` would, and spend nothing. `out` is filled in if that is DENIED.

    bound: NULL where nothing is known. admits: the store is away, and every check is admitted meanwhile, so that no bound may deny.
    """
    cdef int verdict
    if bound == NULL:
        return OPEN
    if leases and bound_covers(bound, terms, now_us, units):
        return LEASED
    verdict = bound_verdict(<Bound*>bound, terms, False, now_us, units, ttl_us, out)
    return OPEN if admits and verdict == DENIED else verdict


cdef inline int bound_books(const Bound* bound, const Terms* terms, int64_t now_us, int64_t units, const Booking* booking, int64_t ttl_us,
                            Outcome* out) noexcept nogil:
    """Say what `bound_verdict` would of a booking: DENIED if even by what is known its turn is too far ahead. bound: or NULL."""
    cdef View view
    if bound == NULL or bound.cell.view.terms != terms and not same_definition(bound.cell.view.terms, terms):
        return OPEN
    view = bound.cell.view
    view_roll(&view, aged(bound, now_us))
    tell_booking(terms, view.amount.level_ticks, units, booking.evenly, booking_fits(terms, view.amount.level_ticks, units, booking), out)
    if out.allowed or bound.lease_units or bound.sent_us <= bound.returned_us:
        return OPEN
    return DENIED if now_us - bound.sent_us <= ttl_us else STALE


cdef inline bint bound_covers(const Bound* bound, const Terms* terms, int64_t now_us, int64_t units) noexcept nogil:
    """Whether a lease has the units: whether `bound_verdict` would spend them."""
    if bound.cell.view.terms != terms and not same_definition(bound.cell.view.terms, terms):
        return False
    return bound.lease_terms == terms and bound.lease_units >= units and now_us < bound.lease_until_us


cdef inline void bound_guess(const Bound* bound, const Terms* terms, int64_t now_us, int64_t units, Outcome* out) noexcept nogil:
    """Of units that the bound doesn't deny: say that they would be granted, and what would be left at most. bound: or NULL."""
    cdef View view
    cdef int64_t then_us, total
    cdef uint32_t expired
    out[0] = Outcome(True, False, terms.capacity, 0, 0)
    if bound == NULL or bound.cell.view.terms != terms and not same_definition(bound.cell.view.terms, terms):
        return
    view = bound.cell.view
    then_us = aged(bound, now_us)
    view_live(&view, then_us, &expired, &total)
    report(terms, &view, then_us, total, out)
    if out.in_ticks:
        settle(terms, out)
    if bound.lease_terms == terms:
        out.remaining += bound.lease_units
    out.remaining = max(out.remaining, units)  # what it says may be too old to deny


cdef inline void known_entry(Window* window, int64_t at_us, int64_t units) noexcept nogil:
    """Append units to a known window. An instant that isn't later than the last entry's joins that entry."""
    if units <= 0:
        return
    if window.count and window.entries[window.count - 1].at_us >= at_us:
        window.entries[window.count - 1].units += units
    else:
        window.entries[window.count] = Units(at_us, units)
        window.count += 1
    window.total += units


cdef inline int know_window(View* known, const Terms* terms, const int64_t* answer, bint refused, int64_t cost,
                            int64_t sent_us) noexcept nogil:
    """Make a window of an answer, which says when the first units leave, when the last one does, and when a refused `cost` fits."""
    cdef Window* window = known.amount.window
    cdef int64_t left_us = sent_us - terms.window_us, held = answer[1], staying = 0, last = 1 if held > 1 else 0
    if window == NULL or window.room < KNOWN_ENTRIES:
        window = window_new(KNOWN_ENTRIES)
        if window == NULL:
            return NO_MEMORY
        piece_free(known.amount.window)
        known.amount.window = window
    window.first = window.count = 0
    window.total = 0
    if refused and answer[4] > 0:          # until then more than `capacity − cost` units stay
        staying = min(held - last, terms.capacity - cost + 1 - last)
    known_entry(window, left_us + answer[2], held - staying - last)
    if staying > 0:
        known_entry(window, left_us + answer[4], staying)
    known_entry(window, left_us + answer[3], last)
    return KEEP


cdef inline int bound_learn(Bound* bound, const Terms* terms, const int64_t* answer, bint refused, int64_t cost, int64_t sent_us,
                            int64_t received_us, int64_t server_us) noexcept nogil:
    """Take in what the store says of a key after a decision. Returns NO_MEMORY or KEEP."""
    cdef View* known = &bound.cell.view
    if known.terms != NULL and (server_us < bound.server_us and sent_us < bound.received_us):
        return KEEP                        # a newer answer has overtaken it
    if known.terms != NULL and known.terms.kind == SLIDING and terms.kind != SLIDING:
        view_free(known)
    if known.terms == NULL or (known.terms.kind == SLIDING) != (terms.kind == SLIDING):
        known.amount.window = NULL
    if terms.kind == SLIDING:
        if know_window(known, terms, answer, refused, cost, sent_us) == NO_MEMORY:
            return NO_MEMORY
        known.at_us = 0
    elif terms.kind == BUCKET:
        known.amount.level_ticks = answer[1]
        known.at_us = sent_us
    elif terms.kind == COUNTER:
        known.amount.counts = Counts(<uint32_t>answer[1], <uint32_t>answer[2])
        known.at_us = sent_us - answer[3]
    else:
        known.amount.counts = Counts(<uint32_t>answer[1], 0)
        known.at_us = sent_us - answer[2]
    known.terms = terms
    bound.heard = True
    bound.sent_us = sent_us
    bound.received_us = received_us
    bound.server_us = server_us
    return KEEP


cdef inline void bounds_note_terms(const Shard* shard, bint bounds, int64_t round_) noexcept nogil:
    """Note the terms that the keys of a shard refer to; `bounds`: whether its cells are bounds."""
    cdef View[2] views
    cdef Bound* bound
    cdef uint32_t i
    cdef int k
    for i in range(shard.room):
        if not fingerprints_of(shard)[i]:
            continue
        for k in range(cell_views(cell_at(shard, i), views)):
            terms_met(views[k].terms, round_)
        if bounds:
            bound = <Bound*>cell_at(shard, i)
            if bound.lease_units == 0:
                bound.lease_terms = NULL       # they are read only while units are left
            elif bound.lease_terms != NULL:
                terms_met(bound.lease_terms, round_)
