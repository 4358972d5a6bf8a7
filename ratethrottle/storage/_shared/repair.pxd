"""What a process knows of its store, and what it tells a store that has lost data: see `repair.pyx`."""

from libc.stdint cimport int64_t, uint32_t, uint64_t

from ratethrottle._core cimport PendingDecision
from ratethrottle._engine.keys cimport KeyTable
from ratethrottle.storage._shared.call cimport ControlCall
from ratethrottle.storage._shared.fleet cimport Fleet
from ratethrottle.storage._shared.keynames cimport KeyNames
from ratethrottle.storage._shared.outage cimport Shares
from ratethrottle.storage._shared.resp cimport Buffer


cdef enum:
    AGES = 720                               # classes by age, each at most a sixteenth wide: all that 2^48 µs have


cdef struct Untold:                          # a bound that the store hasn't heard of
    int64_t us                               # the store's time in what was heard; 0: of an older epoch
    uint64_t hash_lo
    uint64_t hash_hi


cdef class Assertions:
    cdef KeyTable bounds
    cdef int64_t epoch                       # the new one
    cdef int64_t before                      # the one that this process knew until then
    cdef int64_t newest_us                   # and the store's time in its last reply of that
    cdef int64_t held_us                     # in its time: the store has kept what is older
    cdef bint held_older                     # and what is of older epochs
    cdef uint32_t shard                      # the next to be looked through
    cdef Untold* found
    cdef size_t count
    cdef size_t room
    cdef Untold* items                       # by class of age, the newest first
    cdef size_t placed                       # of found
    cdef size_t[AGES + 1] ends               # where each class begins, and at last where it ends
    cdef size_t[AGES] nexts
    cdef size_t at                           # the next item
    cdef dict out                            # call -> the item that it begins with
    cdef object again                        # calls that are sent again
    cdef bint prepared
    cdef readonly bint last                  # a call has said that this is all
    cdef readonly bint over                  # and the store has heard it

    cdef int prepare(self) except -1
    cdef int collect(self) except -1
    cdef int place(self) except -1
    cdef int64_t level(self) noexcept
    cdef bint waits(self) noexcept
    cdef inline int class_at(self, int64_t us) noexcept
    cdef ControlCall next_call(self, int rows_max, int64_t ahead_us, int64_t now_us)
    cdef ControlCall build(self, Buffer* keys, Buffer* args, int rows_max, int64_t ahead_us, int64_t now_us)
    cdef int put_row(self, Buffer* args, int row, int rule, int64_t generation, const int64_t* numbers, int64_t us) except -1
    cdef int heard(self, ControlCall call) except -1


cdef class Repair:
    cdef object __weakref__
    cdef readonly KeyTable bounds
    cdef readonly Shares shares
    cdef readonly Fleet fleet
    cdef readonly int64_t epoch              # that the bounds are of; 0 before the first one
    cdef readonly int64_t epochs             # how many came after it
    cdef readonly int64_t clears             # how often all was forgotten, as it was cleared
    cdef int64_t losses                      # how many of these may have lost what is known here
    cdef readonly bytes process_id
    cdef readonly object users               # the storages of this process that share it and aren't closed, as a WeakSet
    cdef int64_t learning_until_us           # in this process's time: others may still tell the store what they know
    cdef int64_t live_until_us               # until then something that is known counts
    cdef int64_t ahead_us                    # by how much the store's clock is ahead of this process's
    cdef KeyNames names
    cdef object calls                        # to be sent before anything is asked, as a deque
    cdef set out                             # calls that were sent and have no answer yet
    cdef object charged                      # (rule, name, hash) of what was charged and not looked at since, as a deque
    cdef Assertions assertions               # what this process knows, for an epoch that may have lost it
    cdef int64_t newest_us                   # the store's time in its last answer of this epoch
    cdef int64_t told_us                     # and when it had heard all of before the epoch; 0: not yet, or there was nothing
    cdef unsigned forks

    cdef bint enter_epoch(self, int64_t epoch, int64_t learning_us, bint forgets, int64_t held_us, int64_t now_us) except -1
    cdef ControlCall beat(self, bytes purpose, bint asks, bint named, done)
    cdef ControlCall next_call(self, int64_t now_us, int rows_max, bint asserts)
    cdef int deferred(self, ControlCall call, int first) except -1
    cdef bint idle(self) noexcept
    cdef ControlCall charge(self, list owed, bytes marker, int64_t now_us)
    cdef int lose(self, ControlCall call) except -1
    cdef int take_over(self, int64_t now_us) except -1
    cdef int put_back(self, ControlCall call) except -1
    cdef int64_t knows_until(self) noexcept
    cdef Assertions assert_all(self, int64_t epoch, int64_t held_us)
    cdef ControlCall aged(self, ControlCall call, int64_t now_us)
    cdef int heard(self, ControlCall call, int64_t server_us) except -1
    cdef int note_generation(self, PendingDecision sample, int64_t generation, int64_t server_us, int64_t now_us) except -1
    cdef bint forked(self) except -1
