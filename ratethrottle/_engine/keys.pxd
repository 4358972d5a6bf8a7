"""The table of keys, and the inline path of a decision in memory: see `keys.pyx`."""

cimport cython
from libc.stdint cimport int64_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport free
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec

from ratethrottle._engine.arithmetic cimport (
    Outcome, report, SLIDING, Terms, View, view_ahead, view_audit, view_charge, view_count, view_look,
)
from ratethrottle._engine.bound cimport Bound
from ratethrottle._engine.decision cimport Entry
from ratethrottle._engine.definitions cimport CompiledRule, Definitions
from ratethrottle._engine.joint cimport Joint
from ratethrottle._engine.table cimport Cell, cell_at, Hash128, Pair, Place, RT_PREFETCH, Shard, shard_find, shard_full, siphash
from ratethrottle._engine.window cimport NO_MEMORY, window_drop


cdef unsigned forks                          # how often this process is a fork of another one


cdef struct Orphan:                          # what is left of a lease whose bound was removed
    Hash128 hashed
    int64_t at_us
    int64_t epoch
    int64_t units


cdef enum:
    REMOVALS_MAX = 1024

cdef struct Removal:                         # of a key that wasn't fresh
    Hash128 hashed
    int64_t at_us

cdef struct Removals:
    Removal[REMOVALS_MAX] ring
    int64_t count                            # how many there ever were
    int64_t forgotten_us                     # the newest of those that aren't in the ring any more


@cython.final
cdef class KeyTable:
    cdef Shard* shards
    cdef uint32_t shard_count
    cdef readonly int64_t max_keys
    cdef readonly bint evict
    cdef readonly int64_t evictions          # that forgot something
    cdef int64_t used
    cdef uint64_t[3] secret                  # two words key the hash; the third names this table to the rules that it has interned
    cdef uint64_t random
    cdef int64_t clock_offset_us
    cdef object clock
    cdef unsigned forks                      # of this process, when the table was last used
    cdef Definitions definitions
    cdef Removals* removals                  # keys that were reset or evicted, for units that come back; NULL if none ever may

    # Of a table of bounds:
    cdef uint16_t* owing_in                  # of each shard, how many of its keys owe something; NULL in another table
    cdef readonly int64_t owing              # all of them
    cdef uint32_t tidy_hand                  # the shard that is tidied next
    cdef Shard* emptied                      # those that are still to be freed, and how many
    cdef readonly size_t emptied_count
    cdef int away                            # connections whose store is away
    cdef Orphan* orphans                     # a ring of ORPHANS_MAX
    cdef int64_t orphan_count                # how many there ever were

    cdef readonly int64_t charges_lost       # of new keys, which a full table had no place for

    cdef Bound* bound_of(self, Hash128 hashed, Shard** shard, uint32_t* index) noexcept
    cdef void note_owes(self, Shard* shard, Bound* bound, bint owes) noexcept
    cdef void drop_account(self, Shard* shard, Bound* bound) noexcept
    cdef void orphan(self, Bound* bound) noexcept
    cdef int64_t adopt(self, Hash128 hashed, int64_t at_us, int64_t epoch, int64_t now_us) noexcept
    cdef int tidy(self, int64_t now_us) except -1
    cdef int rebuild(self, Shard* shard, int64_t now_us) except -1
    cdef void forked(self) noexcept
    cdef void empty(self) noexcept
    cdef void free_emptied(self) noexcept
    cdef int intern_rule(self, CompiledRule rule) except -1
    cdef int64_t asked_us(self) except -1
    cdef void remove(self, Shard* shard, uint32_t index) noexcept
    cdef Cell* insert(self, Shard* shard, const Cell* cell, int64_t now_us) except NULL
    cdef int decide_place(self, const Place* place, int64_t now_us, int64_t cost, Outcome* out) except -1
    cdef int decide_general(self, const Terms* terms, Shard* shard, uint32_t index, int64_t now_us, int64_t cost,
                            Outcome* out) except -1
    cdef int decide_new(self, const Terms* terms, Shard* shard, Hash128 hashed, int64_t now_us, int64_t cost,
                        Outcome* out) except -1
    cdef int decide_dated(self, const Terms* terms, Shard* shard, Hash128 hashed, int64_t now_us, int64_t cost,
                          Outcome* out) except -1
    cdef int64_t make_place(self, Shard* shard, int64_t now_us) noexcept
    cdef bint sweep(self, Shard* shard, int64_t now_us) noexcept
    cdef int locate_entry(self, Entry entry, Place* place) except -1
    cdef int locate_joint(self, Joint joint, Place* places) except -1
    cdef int look(self, const Place* place, int64_t now_us, int64_t cost, Outcome* out) except -1
    cdef int look_general(self, const Place* place, const Cell* cell, int64_t now_us, int64_t cost, Outcome* out) except -1
    cdef int look_joint(self, Joint joint, const Place* places, int64_t now_us, Outcome* outs) except -1
    cdef int decide_joint(self, Joint joint, const Place* places, int64_t now_us, Outcome* outs, int* reported) except -1
    cdef bint has_room(self, Joint joint, const Place* places, int64_t now_us, Outcome* outs, const int* payers) noexcept
    cdef object decided_jointly(self, Joint joint, bint consume)
    cdef int find(self, Entry entry, Place* place, Cell** cell) except -1
    cdef Hash128 hash_entry(self, Entry entry) except *

    cdef inline int64_t now_us(self) except -1:
        cdef timespec monotonic
        if self.clock is not None:
            return self.asked_us()
        clock_gettime(CLOCK_MONOTONIC, &monotonic)
        return monotonic.tv_sec * 1_000_000 + monotonic.tv_nsec // 1000 + self.clock_offset_us

    cdef inline Terms* terms_of(self, CompiledRule rule) except NULL:
        while rule.home != self.secret[2]:
            self.intern_rule(rule)
        return rule.home_terms

    cdef inline void notice_fork(self) noexcept:
        if self.forks != forks:
            self.forked()

    cdef inline int locate(self, CompiledRule rule, bint joined, const char* data, Py_ssize_t length, Place* place) except -1:
        """Hash a key, its UTF-8 or a tuple's joined form, and begin to fetch its shard."""
        self.notice_fork()
        self.terms_of(rule)
        self.hash_key(rule, joined, data, length, place)
        return 0

    cdef inline void hash_key(self, CompiledRule rule, bint joined, const char* data, Py_ssize_t length, Place* place) noexcept:
        """Do so for a rule that is interned here, in a table that has noticed a fork."""
        # Read now: another table may intern the same rule before this one has decided.
        place.terms = rule.home_terms
        place.hashed = siphash(rule.home_seed, self.secret[1] ^ joined, data, length)
        place.shard = &self.shards[<uint32_t>(((place.hashed.hi >> 32) * self.shard_count) >> 32)]
        RT_PREFETCH(place.shard)

    cdef inline int decide_located(self, const Place* place, int64_t now_us, int64_t cost, Outcome* out) except -1:
        """Decide on a located key, and consume if allowed. Runs no Python code."""
        cdef Shard* shard = place.shard
        cdef int64_t found = shard_find(shard, place.hashed), total
        cdef View* view
        cdef View rolled
        cdef Outcome outcome                 # in registers too, so that to store it changes nothing that is read
        cdef uint32_t expired
        if found < 0:
            return self.decide_new(place.terms, shard, place.hashed, now_us, cost, out)
        view = &cell_at(shard, <uint32_t>found).view
        if view.terms != place.terms or view_ahead(view, now_us):
            return self.decide_general(place.terms, shard, <uint32_t>found, now_us, cost, out)
        # One view, of this very definition: the same steps as in decide_views, on a copy that stays in registers.
        rolled = view[0]
        view_look(&rolled, rolled.terms, now_us, cost, &expired, &total, &outcome)
        if not outcome.allowed:
            out[0] = outcome
            return 0
        if rolled.terms.kind == SLIDING:
            if expired:
                window_drop(view.amount.window, expired, total)
            if view_charge(view, now_us, cost) == NO_MEMORY:
                raise MemoryError
            rolled.amount = view.amount
            total = rolled.amount.window.total
        else:
            view_count(&rolled, cost)
            view.at_us = rolled.at_us
            view.amount = rolled.amount
        report(rolled.terms, &rolled, now_us, total, &outcome)
        out[0] = outcome
        view_audit(view, now_us)
        return 0

    cdef inline void write_back(self, Shard* shard, uint32_t index, const Terms* terms, const View* views, int count, Pair* pair,
                                int64_t now_us) noexcept:
        """Replace the views of a key by those that a decision has left, or remove it if there are none. `pair` holds two."""
        cdef Cell* cell = cell_at(shard, index)
        cdef int i
        for i in range(count):
            view_audit(&views[i], now_us)
        if count == 2:
            pair.own = views[0]
            pair.other = views[1]
            cell.view.terms = NULL
            cell.view.amount.pair = pair
            return
        free(pair)
        if count == 1:
            cell.view = views[0]
        else:
            cell.view.terms = terms              # its windows have been freed
            cell.view.amount.window = NULL
            self.remove(shard, index)

    cdef inline void note_removal(self, const Cell* cell, int64_t now_us) noexcept:
        """Remember that a key is forgotten which wasn't fresh: nothing of it comes back."""
        cdef Removal* removal
        if self.removals != NULL:
            removal = &self.removals.ring[self.removals.count % REMOVALS_MAX]
            self.removals.forgotten_us = max(self.removals.forgotten_us, removal.at_us)
            removal[0] = Removal(Hash128(cell.hash_lo, cell.hash_hi), now_us)
            self.removals.count += 1

    cdef inline int make_room(self, Shard* shard, int64_t now_us) except -1:
        if shard_full(shard):
            self.rebuild(shard, now_us)
        return 0
