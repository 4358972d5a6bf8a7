"""What is known of the store, and what it has to be told: see `_repair.pyx`."""

from libc.stdint cimport int64_t, uint32_t, uint64_t

from ratethrottle._core cimport PendingDecision
from ratethrottle._engine.arithmetic cimport Terms
from ratethrottle._engine.keys cimport KeyTable
from ratethrottle._layout cimport Layout
from ratethrottle._outage cimport Shares
from ratethrottle._resp cimport Buffer


cdef enum:
    # Processes must have been counted without a gap for this long; then all live ones have come.
    WHOLE_US = 3_000_000
    AGES = 720                               # classes by age, each at most a sixteenth wide: all that 2^48 µs have


cdef struct Untold:                          # a bound that the store has to be told of
    int64_t us                               # the store's time in what was heard; 0: of an older epoch
    uint64_t hash_lo
    uint64_t hash_hi


cdef class Telling


cdef int64_t reset_reach(const Terms* terms) noexcept


cdef class Errand:
    cdef readonly str script
    cdef list key_list                       # that follow the epoch's; empty where they are packed
    cdef readonly list args                  # what follows the request id; of an assertion its first words
    cdef bytes packed_keys                   # of an assertion, as they are sent
    cdef int key_count
    cdef bytes packed_args
    cdef int arg_count
    cdef Telling telling                     # what it is a part of; None unless it asserts
    cdef int first                           # entry that is told, the others were already
    cdef readonly object done                # is given the numbers of the reply
    cdef list owed                           # what it charges, of ages at `owed_us`
    cdef int64_t owed_us
    cdef bytes marker
    cdef bytes request
    cdef int64_t deadline_us
    cdef int64_t sent_us                     # of a mark, which is no script: see `Gathering.mark`
    cdef int integers                        # that its reply begins with
    cdef bint counts
    cdef bint ranks

    cdef Errand twin(self)


cdef class Telling:
    cdef KeyTable bounds
    cdef bytes process_id
    cdef int64_t epoch                       # which is told, of those before it
    cdef int64_t before                      # the one that was known until then
    cdef int64_t newest_us                   # and the store's time when it was heard of last
    cdef int64_t held_us                     # in its time: what is older the store has kept
    cdef bint held_older                     # as it has what is of older epochs
    cdef uint32_t shard                      # the next to be looked through
    cdef Untold* found
    cdef size_t count
    cdef size_t room
    cdef Untold* items                       # by class of age, the newest first
    cdef size_t placed                       # of found
    cdef size_t[AGES + 1] ends               # where each class begins, and at last where it ends
    cdef size_t[AGES] nexts
    cdef size_t at                           # the next item
    cdef dict out                            # errand -> the item that it begins with
    cdef object again                        # errands that are sent again
    cdef bint prepared
    cdef readonly bint last                  # it was said that this is all
    cdef readonly bint over                  # and heard

    cdef int prepare(self) except -1
    cdef int collect(self) except -1
    cdef int place(self) except -1
    cdef int64_t level(self) noexcept
    cdef bint waits(self) noexcept
    cdef inline int class_at(self, int64_t us) noexcept
    cdef Errand next_errand(self, int rows_max, int64_t ahead_us, int64_t now_us)
    cdef Errand build(self, Buffer* keys, Buffer* args, int rows_max, int64_t ahead_us, int64_t now_us)
    cdef int put_row(self, Buffer* args, int row, int rule, int64_t generation, const int64_t* numbers, int64_t us) except -1
    cdef int heard(self, Errand errand) except -1


cdef class Knowledge:
    cdef object __weakref__
    cdef readonly KeyTable bounds
    cdef readonly Shares shares
    cdef readonly int64_t epoch              # which life of the store's data the bounds are of; 0 before the first one
    cdef readonly int64_t epochs             # how many came after it
    cdef int64_t losses                      # of these, how many may have lost what is known here
    cdef readonly int64_t processes          # that share the limits; 0: unknown
    cdef readonly bytes process_id
    cdef readonly object users               # the storages of this process that share it and aren't closed, as a WeakSet
    cdef int64_t learning_until_us           # in this process's time: others may still tell the store what they know
    cdef int64_t live_until_us               # so long does something that is known count
    cdef int64_t ahead_us                    # by how much the store's clock is ahead of this process's
    cdef bint sure                           # it was counted alike for a while: nobody has begun or ended just now
    cdef int64_t last_count                  # of the processes, and since when it is that
    cdef int64_t alike_since_us
    cdef int64_t fewer_since_us              # since when the store counts fewer processes than we do
    cdef int64_t expected                    # how many share the limits, by our options; 0: unknown
    cdef int64_t counted_us                  # when any line has had this process counted
    cdef int64_t slot                        # the bit that stands for this process; -1: none that is known
    cdef int64_t marked_us                   # when it was set last
    cdef int64_t marks                       # how often since a script was run for it
    cdef int64_t swept                       # when the period began that is going on, by the server's clock, and when that was seen first
    cdef int64_t swept_seen_us
    cdef int64_t changed                     # when the set of processes has changed last, by the server's clock
    cdef int64_t rank
    cdef int64_t rank_of                     # in the set that has changed last then
    cdef Layout layout
    cdef object errands                      # to be done before anything is asked
    cdef set out                             # errands that were sent and have no answer yet
    cdef object charged                      # (rule, name, hash) of what was charged and not looked at since, as a deque
    cdef Telling telling                     # what is known to an epoch that may have lost it
    cdef int64_t newest_us                   # the store's time in its last answer of this epoch
    cdef int64_t told_us                     # and when all of before the epoch was told; 0: not yet, or there was nothing
    cdef unsigned forks

    cdef bint meet(self, int64_t epoch, int64_t learning_us, int64_t count, int64_t rank, int64_t whole_us, bint forgets, int64_t held_us,
                   int64_t now_us) except -1
    cdef int take_count(self, int64_t count, int64_t rank, bint whole, int64_t now_us) except -1
    cdef int doubt(self) except -1
    cdef bint may_mark(self, int64_t now_us) noexcept
    cdef int64_t period_us(self) noexcept
    cdef int64_t pace_us(self, int64_t least_us) noexcept
    cdef Errand beat(self, bytes purpose, bint asks, bint named, done)
    cdef Errand next_errand(self, int64_t now_us, int rows_max, bint tells)
    cdef int deferred(self, Errand errand, int first) except -1
    cdef bint idle(self) noexcept
    cdef Errand charge(self, list owed, bytes marker, int64_t now_us)
    cdef int forget_errand(self, Errand errand) except -1
    cdef int take_over(self, int64_t now_us) except -1
    cdef int put_back(self, Errand errand) except -1
    cdef int64_t knows_until(self) noexcept
    cdef Telling tell_all(self, int64_t epoch, int64_t held_us)
    cdef Errand aged(self, Errand errand, int64_t now_us)
    cdef int heard(self, Errand errand, int64_t server_us) except -1
    cdef int note_generation(self, PendingDecision sample, int64_t generation, int64_t server_us, int64_t now_us) except -1
    cdef bint forked(self) except -1
