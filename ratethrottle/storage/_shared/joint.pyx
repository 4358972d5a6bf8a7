# cython: auto_pickle=False, autotestdict=False
"""What the answers to joint checks mean. Pure: no object is kept and nothing is decided here.

Of n equal joint checks the first k are allowed. In each set the first part pays for as many of them as it can, and the next one for
as many of the rest; a set that never vetoes may leave some unpaid. What a reply says of a part is for how many it has paid, and then
what the script says of its key: after that, or, unless all n were allowed, what one more check would hear.
"""

from libc.stdint cimport int64_t
from libc.string cimport memcpy

from ratethrottle._engine.arithmetic cimport answer_length, LEVEL_MAX, Outcome, take_answer, take_correction, Terms
from ratethrottle._engine.definitions cimport CompiledRule
from ratethrottle.storage._shared.item cimport (
    ALTERNATIVE, BOOKINGS, CallItem, DEFERRED, FLAGGED, possible_numbers, SKIPPED, UNASKED, UNREADABLE, UNSURE,
)


cdef inline const Terms* terms_of(const CallItem* part) noexcept:
    return &(<CompiledRule>part.rule).terms


cdef const int64_t* read_parts(const CallItem* parts, int size, const int64_t* at, const int64_t* end, PartAnswer* found) noexcept:
    """Find what is said of a joint check's parts; returns where that ends, or NULL if there are fewer numbers."""
    cdef bint more
    cdef int p
    for p in range(size):
        if end - at < 2:
            return NULL
        found[p].took = at[0]
        found[p].numbers = at + 1
        # Only a part that has nothing to grant says until when; and one that never vetoes, if it hasn't paid for all.
        more = parts[p].bits & FLAGGED and at[0] < max(parts.count, <int64_t>1)
        found[p].length = answer_length(terms_of(&parts[p]), at[1], LEVEL_MAX if more else 1)
        at += 1
        if end - at < found[p].length:
            return NULL
        at += found[p].length
    return at


cdef bint possible_parts(const CallItem* parts, int size, bint consumes, const PartAnswer* found) noexcept:
    """Whether the script may say this of a joint check."""
    cdef int64_t most = parts.count if consumes else 0, allowed, paid = 0
    cdef bint whole, refused = False, refuses = True
    cdef int p
    for p in range(size):
        if not 0 <= found[p].took <= most:
            return False
    allowed = allowed_of(parts, size, most, found)
    if allowed < 0:
        return all_undecided(size, found)
    if parts.bits & BOOKINGS:
        return consumes and found.numbers[0] == found.took and possible_numbers(terms_of(parts), found.numbers, found.length)
    if parts.bits & UNASKED:
        return possible_corrections(parts, size, consumes, found)
    whole = consumes and allowed == most
    for p in range(size):
        if not possible_part(&parts[p], &found[p], whole):
            return False
        if not parts[p].bits & ALTERNATIVE:
            paid = 0
            refuses = True
        paid += found[p].took
        refuses = refuses and found[p].numbers[0] <= 0
        # At the end of a set: each that may veto has paid for as many; if those aren't all, one has no more to grant.
        if p + 1 == size or not parts[p + 1].bits & ALTERNATIVE:
            if paid > allowed or paid < allowed and not parts[p].bits & FLAGGED:
                return False
            refused = refused or refuses and not parts[p].bits & FLAGGED
    return whole or refused or not consumes


cdef bint possible_corrections(const CallItem* parts, int size, bint consumes, const PartAnswer* found) noexcept:
    """Whether the script may say this of charges and refunds: it has taken each, and whether the key is in debt."""
    cdef int p
    for p in range(size):
        if found[p].took != consumes or found[p].numbers[0] > 1:
            return False
        if not possible_numbers(terms_of(&parts[p]), found[p].numbers, found[p].length):
            return False
    return True


cdef bint possible_part(const CallItem* part, const PartAnswer* found, bint whole) noexcept:
    """Whether the script may say this of a part. whole: all of the joint checks were allowed."""
    cdef int64_t granted = found.numbers[0]
    if granted == SKIPPED:
        return whole and part.bits & ALTERNATIVE and found.took == 0
    if granted != found.took if whole else not 0 <= granted <= 1:
        return False
    return possible_numbers(terms_of(part), found.numbers, found.length)


cdef bint all_undecided(int size, const PartAnswer* found) noexcept:
    """Whether none of the parts was decided, nor paid for anything."""
    cdef int p
    for p in range(size):
        if found[p].took or found[p].numbers[0] not in (UNREADABLE, UNSURE, DEFERRED, SKIPPED):
            return False
    return True


cdef int64_t allowed_of(const CallItem* parts, int size, int64_t most, const PartAnswer* found) noexcept:
    """How many of `most` joint checks are allowed: the first set that may veto has paid for so many. −1: the store couldn't decide."""
    cdef int64_t paid = 0
    cdef int p
    for p in range(size):
        if found[p].numbers[0] < 0 and found[p].numbers[0] != SKIPPED:
            return -1
    p = 0
    while p < size and parts[p].bits & (FLAGGED | UNASKED):
        p += 1
    if p == size:
        return most
    while True:
        paid += found[p].took
        p += 1
        if p == size or not parts[p].bits & ALTERNATIVE:
            return paid


cdef int take_payers(const CallItem* parts, int size, const PartAnswer* found, int64_t position, Outcome* outs, int* pays) noexcept:
    """Which part of each set pays for the joint check at `position` of those that are allowed, and what it hears. Returns how many sets.

    A part that never vetoes may not have paid, and is over.
    """
    cdef int64_t within
    cdef int p = 0, sets = 0
    while p < size:
        within = position
        while within >= found[p].took and not parts[p].bits & FLAGGED:
            within -= found[p].took
            p += 1
        take_paid(&parts[p], &found[p], within, &outs[p])
        pays[sets] = p
        sets += 1
        p += 1
        while p < size and parts[p].bits & ALTERNATIVE:
            p += 1
    return sets


cdef int take_paid(const CallItem* part, const PartAnswer* found, int64_t within, Outcome* out) noexcept:
    """What a part hears of the joint check at `within` of those that it was asked to pay for."""
    cdef const Terms* terms = terms_of(part)
    cdef int64_t[NUMBERS_MAX] alone
    cdef const int64_t* numbers = found.numbers
    if numbers[0] != found.took:             # as if it had been asked about those alone that it has paid for
        memcpy(alone, numbers, found.length * sizeof(int64_t))
        alone[0] = found.took
        numbers = alone
    take_answer(terms, numbers, 0, part.cost, within, out)
    return 0


cdef int take_corrections(const CallItem* parts, int size, const PartAnswer* found, Outcome* outs, int* reported) noexcept:
    """What is said of charges and refunds. Each is a set of its own."""
    cdef int p
    for p in range(size):
        take_correction(terms_of(&parts[p]), found[p].numbers, &outs[p])
        reported[p] = p
    return size


cdef int take_looks(const CallItem* parts, int size, const PartAnswer* found, Outcome* outs) noexcept:
    """What each part would say to one more check."""
    cdef int p
    for p in range(size):
        take_answer(terms_of(&parts[p]), found[p].numbers, 0, parts[p].cost, 0, &outs[p])
    return 0
