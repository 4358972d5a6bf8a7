# cython: auto_pickle=False, autotestdict=False
"""When a process says that it is there, and what it hears: which epoch this is, and how many share the limits. No I/O.

A beat is a call of beat.lua. In a large fleet most beats are marks: a few commands of the server, a tenth of what the script costs.
"""

cimport cython
from libc.stdint cimport int64_t

from ratethrottle.storage._shared.call cimport Call, MarkCall
from ratethrottle.storage._shared.context cimport StorageContext


cdef enum:
    IDLE_BEAT_US = 1_000_000                 # between two beats of a process that isn't busy
    WATCH_US = 100_000                       # while what an idle one knows still counts: it must hear of a loss within LEARN
    EVICTED_US = 5_000_000                   # between two questions whether Redis evicts keys
    SLACK_US = 1_000                         # by which a timer may be early


@cython.final
cdef class Heartbeat:
    """The beats of one connection."""

    def __init__(self, StorageContext context not None):
        self.context = context
        self.repair = context.repair
        self.fleet = context.repair.fleet

    cdef void connected(self) noexcept:
        """There is a connection, which may be to another store."""
        self.evicted = -1
        self.asked_evicted_us = 0
        self.named = False

    cdef void lost(self) noexcept:
        """There is none any more."""
        self.beating = False
        self.epoch = 0
        self.fleet.doubt()

    cdef Call next_call(self, int64_t now_us, bint whole, bint serving, done):
        """What is to be sent; None while a beat is on its way. whole: the script. serving: checks are sent, so that
        a mark is enough. done: is given the numbers of its reply.
        """
        cdef bint counts, asks, named
        if self.beating:
            return None
        self.beating = True
        # A process is counted once, however many connections it has; a new connection may be to another store.
        counts = self.epoch == 0 or now_us - self.fleet.counted_us >= self.fleet.pace_us(BEAT_US) - SLACK_US
        asks = now_us - self.asked_evicted_us >= max(<int64_t>EVICTED_US, 1000 * self.fleet.pace_us(0))
        if counts:
            self.fleet.counted_us = now_us
        if not (whole or asks) and self.named and serving and self.fleet.may_mark(now_us):
            return self.mark(counts, now_us)
        if asks:
            self.asked_evicted_us = now_us
        named, self.named = self.named, True
        return self.repair.beat(b"count" if counts else b"look", asks, not named, done)

    cdef MarkCall mark(self, bint counts, int64_t now_us):
        """Set the bit of this process, and look whether the epoch is the same, and how many are counted."""
        cdef MarkCall call = MarkCall.__new__(MarkCall)
        cdef bytes place = self.context.names.processes_key
        call.counts = counts
        call.ranks = counts and self.fleet.rank_of != self.fleet.changed
        call.commands = []
        if counts:
            call.commands.append([b"SETBIT", place + b":marks", b"%d" % self.fleet.slot, b"1"])
        if call.ranks and self.fleet.slot:
            call.commands.append([b"BITCOUNT", place + b":alive", b"0", b"%d" % (self.fleet.slot - 1), b"BIT"])
        call.integers = len(call.commands)
        call.commands.append([b"MGET", self.context.names.epoch_key, place + b":count"])
        return call

    cdef bint take_mark(self, MarkCall call, const int64_t* numbers, int64_t now_us) except -1:
        """Take up the reply to a mark. False if a beat by the script has to find out more."""
        cdef int64_t rank = -1
        self.beating = False
        if not numbers[0] or self.fleet.slot < 0:
            self.fleet.counted_us = 0
            return False
        self.beaten_us = now_us
        if call.counts:
            if call.ranks:
                rank = numbers[1] if call.integers == 2 else 0
            self.fleet.take_mark(numbers, rank, call.sent_us, now_us)
        if self.fleet.period_over(numbers[2], call.sent_us):
            self.fleet.counted_us = 0
            return False
        return True

    cdef int64_t take_evicted(self, int64_t evicted) noexcept:
        """How many keys the server has evicted since this connection knows of it, if there are more by now; else 0."""
        if self.evicted < 0:
            self.evicted_before = self.evicted = evicted
        if evicted <= self.evicted:
            return 0
        self.evicted = evicted
        return evicted - self.evicted_before

    cdef int64_t quiet_us(self, int64_t now_us) noexcept:
        """For how long nothing need be said: not for long if a loss must be noticed, or that learning is over."""
        if now_us < max(self.repair.live_until_us, self.repair.learning_until_us):
            return self.fleet.pace_us(WATCH_US)
        return self.fleet.pace_us(BEAT_US if self.repair.shares.n == 0 else IDLE_BEAT_US)

    cdef bint due(self, int64_t now_us) noexcept:
        """Whether nothing has been said for so long that the store may be gone, or another one."""
        return now_us - max(self.heard_us, self.beaten_us) >= self.quiet_us(now_us) - SLACK_US
