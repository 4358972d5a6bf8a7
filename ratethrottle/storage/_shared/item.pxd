"""What a call asks of one key, and what a script may say of that."""

from cpython.object cimport PyObject
from libc.stdint cimport int64_t

from ratethrottle._engine.arithmetic cimport BUCKET, COUNTER, LEVEL_MAX, NEVER, SLIDING, Terms
from ratethrottle._engine.table cimport Hash128
from ratethrottle._engine.window cimport UNITS_MAX
from ratethrottle.storage._shared.queue cimport Queue


cdef enum AnswerKind:                        # instead of how many checks were granted
    UNREADABLE = -2                          # the state can't be read, and stays as it is
    UNSURE = -3                              # somebody may still tell of more that was used
    DEFERRED = -4                            # it would have held the store for too long: it is asked anew
    SKIPPED = -5                             # of a part: nobody needs it, or another part of its joint check wasn't decided


cdef enum Role:
    ASKS
    RETURNS                                  # it only gives back units that no bound holds any more
    PART                                     # of a joint check


cdef enum:                                   # what a part is to others, as the script takes it: flags
    JOINED = 1                               # it belongs to the same joint check as the part before
    ALTERNATIVE = 2                          # it may pay where the part before doesn't
    FLAGGED = 4                              # it never vetoes
    CHARGE = 8                               # it is no check: units are counted that nobody was asked for
    REFUND = 16                              # nor this: units are given back
    BOOK = 32                                # a check by itself, which may be granted for later
    EVENLY = 64                              # likewise, once all before it has drained
    UNBOOK = 128                             # such a grant is given back
    BOOKINGS = BOOK | EVENLY
    UNASKED = CHARGE | REFUND | UNBOOK


cdef struct CallItem:                        # equal checks of one key, decided as one; or a part of equal joint checks
    Hash128 hashed
    PyObject* rule                           # held by the call
    int rule_index
    int key_index
    int64_t cost
    int64_t count                            # of a joint check, that of its first part
    int64_t ahead                            # units to take in advance, for a lease
    int64_t back                             # units of a lease to give back, and when the store counted them
    int64_t back_us                          # or those of a part that gives back; of one that books, how far ahead
    Role role
    int bits                                 # of a part
    Queue waiters                            # of a joint check, those of its first part


cdef inline bint possible_numbers(const Terms* terms, const int64_t* numbers, int length) noexcept:
    """Whether the script may say this of a key that it has decided on: what follows how many checks were granted."""
    if numbers[1] < 0:
        return False
    if terms.kind == BUCKET:
        return numbers[1] <= LEVEL_MAX       # ticks of a level
    return possible_window(terms, numbers, length)


cdef inline bint possible_window(const Terms* terms, const int64_t* numbers, int length) noexcept:
    """Whether the script may say this of a rule that has windows: units counted, and µs that end with two windows and an eighth."""
    cdef bint counted = terms.kind != SLIDING
    cdef int64_t least, most = max(<int64_t>UNITS_MAX, 3 * terms.window_us)
    cdef int j, last = length - 1
    if numbers[1] > (UNITS_MAX if counted else LEVEL_MAX):
        return False
    for j in range(2, length):
        least = 0
        if not counted and j == 4:
            least = NEVER
        elif counted and j == last:
            least = -terms.window_us         # it begins only then, by a clock that has stepped back
        if not least <= numbers[j] <= most:
            return False
    return not (terms.kind == COUNTER and numbers[2] > UNITS_MAX or counted and numbers[last] >= terms.window_us)
