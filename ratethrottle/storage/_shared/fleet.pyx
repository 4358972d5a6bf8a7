# cython: auto_pickle=False, autotestdict=False
"""How many processes share the limits, and which of them this one is, as the store counts them (docs/arithmetic.md, "Counting").

No I/O and no clock. The share of each process while the store is away follows from it.
"""

cimport cython
from libc.stdint cimport int64_t

from ratethrottle.storage._shared.outage cimport Shares


cdef enum:
    FEWER_US = 1_000_000                     # for so long the store must have counted fewer
    PERIOD_US = 900_000                      # for so long at least the store takes marks, before it counts them
    SMALL_FLEET = 50                         # processes whose beats are all scripts
    MARKS_MAX = 60                           # between two scripts
    EACH_US = 100                            # between two beats, for each process there is
    ALIKE_US = 450_000                       # two beats of half a second agree
    MANY = 1_000_000_000                     # processes: more than there ever are


@cython.final
cdef class Fleet:
    """The processes that share the limits of one prefix. One for all storages of a process that share it."""

    def __init__(self, Shares shares not None):
        self.shares = shares
        self.slot = -1

    cdef int expect(self, int64_t expected) except -1:
        """Note how many processes there are by a storage's options: of several numbers the largest. 0: it doesn't say."""
        if expected > self.expected:
            self.expected = expected
            # Of a rank that isn't known: no more than what each of them may have.
            if self.processes < expected:
                self.shares.set_share(expected, expected - 1)
        return 0

    cdef int forked(self) except -1:
        """In a forked process: the count didn't include this one."""
        self.processes = self.counted_us = 0
        self.sure = False
        self.doubt()
        self.shares.set_share(self.expected, max(self.expected - 1, 0))
        return 0

    cdef int take_count(self, int64_t count, int64_t rank, bint whole, int64_t now_us) except -1:
        """Take up how many processes there are. `whole`: the store has counted for long enough to have heard of all of them."""
        cdef int64_t n
        cdef bint alike
        if count != self.last_count:
            self.last_count = count
            self.alike_since_us = now_us
        alike = now_us - self.alike_since_us >= ALIKE_US
        if count >= self.processes:
            self.sure = count == self.processes and alike
            self.processes = count
            self.fewer_since_us = 0
        else:
            self.sure = False
            if self.fewer_since_us == 0:
                # They may have been forgotten only, by a store that lost its data.
                self.fewer_since_us = now_us
            if whole and now_us - self.fewer_since_us >= FEWER_US:
                self.processes = count
                self.fewer_since_us = 0
        # A share that is too large is granted by each of them: until the count is settled, the largest number that anything says.
        n = self.processes if whole else max(self.processes, self.expected)
        # If nothing else has said how many there are, two beats must agree.
        if whole or alike or self.expected or self.shares.n:
            self.shares.set_share(n, rank if count == n and (alike or whole) and 0 <= rank < n else n - 1)
        return 0

    cdef int take_slot(self, int64_t slot) noexcept:
        """Take up which bit the script has set for this process."""
        self.slot = slot
        self.marked_us = self.counted_us
        self.marks = 0
        self.rank_of = -1                    # of which set it was, a mark finds out
        return 0

    cdef int take_mark(self, const int64_t* numbers, int64_t rank, int64_t sent_us, int64_t now_us) except -1:
        """Take up the reply to a mark that counted this process. rank: −1 if it wasn't asked for."""
        self.marked_us = sent_us
        self.marks += 1
        self.changed = numbers[4]
        if rank >= 0:
            self.rank = rank
            self.rank_of = numbers[4]
        return self.take_count(numbers[3], self.rank if self.rank_of == numbers[4] else -1, numbers[2] - numbers[5] >= WHOLE_US, now_us)

    cdef bint period_over(self, int64_t swept, int64_t sent_us) noexcept:
        """Whether the store's period is over, and no process has said so yet."""
        if swept != self.swept:
            self.swept = swept
            self.swept_seen_us = sent_us
            return False
        return sent_us - self.swept_seen_us >= self.period_us()

    cdef int64_t told_count(self) noexcept:
        """The count that beats tell the store. While it isn't settled, MANY: then learning lasts for its full time."""
        return self.processes if self.sure or self.processes == 0 else MANY

    cdef void doubt(self) noexcept:
        """Have processes counted anew: the store is another one, or wasn't reached for a while."""
        self.last_count = self.fewer_since_us = 0
        self.slot = -1

    cdef inline int64_t period_us(self) noexcept:
        return max(<int64_t>PERIOD_US, EACH_US * self.last_count)

    cdef bint may_mark(self, int64_t now_us) noexcept:
        """Whether its slot is still known to be its own, and marking it enough."""
        return (self.slot >= 0 and self.last_count > SMALL_FLEET and self.marks < MARKS_MAX
                and now_us - self.marked_us < self.period_us() + self.period_us() // 2)

    cdef int64_t pace_us(self, int64_t least_us) noexcept:
        """How long to wait between two beats: the store gets about ten thousand a second at most, of all processes together."""
        return max(least_us, EACH_US * max(self.processes, self.last_count))
