# cython: auto_pickle=False, autotestdict=False
"""The table of keys: which keys it holds, which one leaves when it is full, and the decisions on them.

`docs/arithmetic.md` specifies every number that is computed here. The hot path is inline, in `keys.pxd`.
"""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from cpython.unicode cimport PyUnicode_AsUTF8AndSize
from libc.stdint cimport int64_t, uint16_t, uint32_t
from libc.stdlib cimport calloc, free, malloc, realloc
from libc.string cimport memcpy, memset
from posix.time cimport CLOCK_MONOTONIC, CLOCK_REALTIME, clock_gettime, timespec

from ratethrottle._engine.arithmetic cimport (
    ceil_div, Counts, dated_start, decide_views, NEVER, Outcome, report, same_definition, SLIDING, Terms, View, view_ahead, view_derive,
    view_free, view_fullest, view_look, view_rebase,
)
from ratethrottle._engine.bound cimport Bound
from ratethrottle._engine.dated cimport dated_bring, dated_write
from ratethrottle._engine.decision cimport count_decision, decision_new, Entry, MEMORY
from ratethrottle._engine.definitions cimport CompiledRule, Definitions
from ratethrottle._engine.joint cimport Joint, joint_count, joint_decision, joint_outcome, part_uncounted, PARTS_MAX
from ratethrottle._engine.table cimport (
    Account, account_free, Cell, cell_at, cell_fresh_at, cell_used_share, cell_views, fingerprints_of, free_pages, Hash128, Pair,
    Place, Shard, shard_find, shard_free, SHARD_KEYS, shard_place, shard_rebuild, shard_remove, SHARD_ROOM_MIN, siphash,
)
from ratethrottle._engine.text cimport view_text
from ratethrottle._engine.window cimport KEEP, NO_MEMORY, Units, Window, window_clone, WRITE

from os import urandom


cdef extern from *:
    """
    #include <pthread.h>
    /* How often this process is a fork of another one: cheaper to read than the process's id. */
    static unsigned *rt_forks;
    static void rt_forked(void) { ++*rt_forks; }
    static int rt_count_forks(unsigned *forks) { rt_forks = forks; return pthread_atfork(NULL, NULL, rt_forked); }
    """
    int count_forks "rt_count_forks"(unsigned* forks) noexcept

if count_forks(&forks):
    raise MemoryError


cdef enum:
    EVICTION_SAMPLE = 8
    SWEEP_CELLS = 16
    TIDY_SHARDS = 8
    ORPHANS_MAX = 1024


# Its keys point into its definitions, so a collection must not clear those first.
@cython.final
@cython.no_gc_clear
cdef class KeyTable:
    """The state of at most `max_keys` keys: open addressing over C structs, in shards that are rebuilt one at a time.

    In a full table a new key takes the place of the one closest to fresh among eight sampled (`evict`), or is denied. Every client
    can fill a table. So its hash is one that nobody outside can predict, and a key far from fresh outlives a flood of keys closer
    to it.
    """

    def __cinit__(self, max_keys=1_000_000, bint evict=True, clock_us=None, *, bint bounds=False):
        cdef timespec wall, monotonic
        cdef uint32_t i
        cdef bytes noise = urandom(32)
        self.max_keys = max_keys
        self.evict = evict
        self.clock = clock_us
        self.forks = forks
        self.definitions = Definitions.__new__(Definitions)
        memcpy(self.secret, PyBytes_AS_STRING(noise), 24)
        memcpy(&self.random, PyBytes_AS_STRING(noise) + 24, 8)
        self.random |= 1
        self.shard_count = <uint32_t>max(1, ceil_div(self.max_keys, SHARD_KEYS))
        self.shards = <Shard*>calloc(self.shard_count, sizeof(Shard))
        if self.shards == NULL:
            raise MemoryError
        for i in range(self.shard_count):
            self.shards[i].cell_bytes = sizeof(Bound) if bounds else sizeof(Cell)
        if bounds:
            self.owing_in = <uint16_t*>calloc(self.shard_count, sizeof(uint16_t))
            self.orphans = <Orphan*>calloc(ORPHANS_MAX, sizeof(Orphan))
            if self.owing_in == NULL or self.orphans == NULL:
                raise MemoryError
        # Monotonic, but counted from the epoch, so that fixed windows start where a wall clock would have them.
        clock_gettime(CLOCK_REALTIME, &wall)
        clock_gettime(CLOCK_MONOTONIC, &monotonic)
        self.clock_offset_us = (wall.tv_sec - monotonic.tv_sec) * 1_000_000 + (wall.tv_nsec - monotonic.tv_nsec) // 1000

    def __dealloc__(self):
        cdef uint32_t i
        if self.shards != NULL:
            for i in range(self.shard_count):
                shard_free(&self.shards[i])
            free(self.shards)
        while self.emptied_count:
            self.free_emptied()
        free(self.emptied)
        free(self.owing_in)
        free(self.orphans)
        free(self.removals)

    def __len__(self):
        return self.used

    def __sizeof__(self):
        return self.size_bytes

    @property
    def size_bytes(self):
        """Bytes held for all keys; windows, second views, and what was admitted in outages included."""
        cdef int64_t size = self.shard_count * sizeof(Shard)
        cdef View[4] views
        cdef const Bound* bound
        cdef uint32_t i, j
        cdef int k, count
        for i in range(self.shard_count):
            size += self.shards[i].room * (self.shards[i].cell_bytes + 1)
            for j in range(self.shards[i].room):
                if not fingerprints_of(&self.shards[i])[j]:
                    continue
                if cell_at(&self.shards[i], j).view.terms == NULL:
                    size += sizeof(Pair)
                count = cell_views(cell_at(&self.shards[i], j), views)
                if self.owing_in != NULL:
                    bound = <Bound*>cell_at(&self.shards[i], j)
                    size += bound.name_size
                    if bound.account != NULL:
                        size += sizeof(Account)
                        views[count] = bound.account.held
                        views[count + 1] = bound.account.owed
                        count += 2
                for k in range(count):
                    if views[k].terms.kind == SLIDING:
                        size += sizeof(Window) + (views[k].amount.window.room - 1) * sizeof(Units)
        return size

    @property
    def kept_terms(self):
        """How many definitions the table keeps the terms of."""
        return self.definitions.count

    def clock_us(self):
        """The table's time, integer µs: monotonic, counted from the Unix epoch by the wall clock at its creation."""
        return self.now_us()

    cdef int64_t asked_us(self) except -1:
        """The time by a clock in Python. Other code may run meanwhile, so no terms are freed that a check already holds."""
        self.definitions.held += 1
        try:
            return self.clock()
        finally:
            self.definitions.held -= 1

    cdef void forked(self) noexcept:
        """Drop what belongs to the parent process: its leases, what it owes, and the answers that it waits for."""
        cdef Shard* shard
        cdef Bound* bound
        cdef uint32_t i, j
        self.forks = forks
        self.away = 0
        self.orphan_count = 0
        if self.owing_in == NULL:
            return
        memset(self.orphans, 0, ORPHANS_MAX * sizeof(Orphan))
        for i in range(self.shard_count):
            shard = &self.shards[i]
            for j in range(shard.room):
                if fingerprints_of(shard)[j]:
                    bound = <Bound*>cell_at(shard, j)
                    bound.lease_units = bound.lease_size = bound.asked_us = 0
                    bound.leasing = False
                    self.drop_account(shard, bound)

    cdef Bound* bound_of(self, Hash128 hashed, Shard** shard, uint32_t* index) noexcept:
        """The bound of a key, with its shard and index; NULL if there is none."""
        cdef int64_t found
        shard[0] = &self.shards[<uint32_t>(((hashed.hi >> 32) * self.shard_count) >> 32)]
        found = shard_find(shard[0], hashed)
        if found < 0:
            return NULL
        index[0] = <uint32_t>found
        return <Bound*>cell_at(shard[0], <uint32_t>found)

    cdef void note_owes(self, Shard* shard, Bound* bound, bint owes) noexcept:
        """Count a bound with an account among those that owe something, or stop counting it."""
        cdef int more = <int>owes - <int>bound.account.owes
        bound.account.owes = owes
        self.owing += more
        self.owing_in[shard - self.shards] += more

    cdef void drop_account(self, Shard* shard, Bound* bound) noexcept:
        """Forget the units admitted here, and those of them that are owed."""
        if bound.account != NULL:
            self.note_owes(shard, bound, False)
            account_free(bound.account)
            bound.account = NULL

    cdef void orphan(self, Bound* bound) noexcept:
        """Move what is left of a bound's lease to the orphans, from where a call gives it back."""
        cdef Orphan* orphan
        if bound.lease_units > 0:
            orphan = &self.orphans[self.orphan_count % ORPHANS_MAX]
            orphan.hashed = Hash128(bound.cell.hash_lo, bound.cell.hash_hi)
            orphan.at_us = bound.lease_at_us
            orphan.epoch = bound.lease_epoch
            orphan.units = bound.lease_units
            self.orphan_count += 1
            bound.lease_units = 0

    cdef int64_t adopt(self, Hash128 hashed, int64_t at_us, int64_t epoch, int64_t now_us) noexcept:
        """Take the rest of a lease, which the caller gives back; 0 if nothing is left, or if it is of another epoch."""
        cdef Shard* shard
        cdef uint32_t index
        cdef Bound* bound = self.bound_of(hashed, &shard, &index)
        cdef Orphan* orphan
        cdef int i
        cdef int64_t units
        if bound != NULL and bound.lease_units > 0 and bound.lease_at_us == at_us:
            units, bound.lease_units = bound.lease_units, 0
            bound.returned_us = now_us       # an older `known` denies nothing
            return units if bound.lease_epoch == epoch else 0
        for i in range(<int>min(self.orphan_count, <int64_t>ORPHANS_MAX)):
            orphan = &self.orphans[i]
            if orphan.units > 0 and orphan.at_us == at_us and orphan.hashed.lo == hashed.lo and orphan.hashed.hi == hashed.hi:
                units, orphan.units = orphan.units, 0
                return units if orphan.epoch == epoch else 0
        return 0

    cdef int tidy(self, int64_t now_us) except -1:
        """Remove what is fresh from the next few shards, and shrink them, so that memory goes back to the system."""
        cdef Shard* shard
        cdef uint32_t i, fresh
        cdef int _shard
        for _shard in range(<int>min(self.shard_count, <uint32_t>TIDY_SHARDS)):
            self.tidy_hand = self.tidy_hand + 1 if self.tidy_hand + 1 < self.shard_count else 0
            shard = &self.shards[self.tidy_hand]
            fresh = 0
            for i in range(shard.room):
                fresh += fingerprints_of(shard)[i] and cell_fresh_at(shard, cell_at(shard, i)) <= now_us
            if fresh * 4 > shard.room or shard.room > SHARD_ROOM_MIN and (shard.used - fresh) * 2 < shard.room:
                self.rebuild(shard, now_us)
        return 0

    cdef int rebuild(self, Shard* shard, int64_t now_us) except -1:
        """Remove the keys of a shard that are fresh again."""
        cdef Shard before = shard[0]
        cdef Bound* bound
        cdef uint32_t i
        if self.owing_in != NULL:
            for i in range(shard.room):
                if fingerprints_of(shard)[i] and cell_fresh_at(shard, cell_at(shard, i)) <= now_us:
                    bound = <Bound*>cell_at(shard, i)
                    self.orphan(bound)
                    self.drop_account(shard, bound)
        self.used -= shard.used
        if shard_rebuild(shard, now_us) == NO_MEMORY:
            self.used += shard.used
            raise MemoryError
        self.used += shard.used
        if self.owing_in != NULL and shard.room < before.room:
            free_pages(before.cells, before.room * (before.cell_bytes + 1))
        else:
            free(before.cells)
        return 0

    cdef void empty(self) noexcept:
        """Remove every key and account. `free_emptied` frees them later: for a million keys that takes up to a second."""
        cdef Shard* shard
        cdef Shard* room = <Shard*>realloc(self.emptied, (self.emptied_count + self.shard_count) * sizeof(Shard))
        cdef size_t before = self.emptied_count
        cdef uint32_t i
        if room != NULL:
            self.emptied = room
        for i in range(self.shard_count):
            shard = &self.shards[i]
            if room == NULL:
                shard_free(shard)
            elif shard.cells != NULL:
                self.emptied[self.emptied_count] = shard[0]
                self.emptied_count += 1
            shard.cells = NULL
            shard.room = shard.used = shard.hand = 0
            self.owing_in[i] = 0
        self.used = self.owing = 0
        self.definitions.held += before == 0 and self.emptied_count > 0  # freeing a key reads its terms

    cdef void free_emptied(self) noexcept:
        """Free one of the emptied shards, in about 1 ms."""
        if self.emptied_count:
            self.emptied_count -= 1
            shard_free(&self.emptied[self.emptied_count])
            self.definitions.held -= self.emptied_count == 0

    cdef Hash128 hash_entry(self, Entry entry) except *:
        cdef Place place
        self.locate_entry(entry, &place)
        return place.hashed

    cdef void remove(self, Shard* shard, uint32_t index) noexcept:
        if self.owing_in != NULL:
            self.orphan(<Bound*>cell_at(shard, index))
            self.drop_account(shard, <Bound*>cell_at(shard, index))
        shard_remove(shard, index)
        self.used -= 1

    cdef Cell* insert(self, Shard* shard, const Cell* cell, int64_t now_us) except NULL:
        """Insert an absent key; in a full table it takes the place of another one."""
        if self.used >= self.max_keys:
            self.make_place(shard, now_us)
        self.make_room(shard, now_us)
        self.used += 1
        return cell_at(shard, shard_place(shard, cell))

    cdef int intern_rule(self, CompiledRule rule) except -1:
        """Find or keep the rule's terms, so that the hot path needs no look-up."""
        cdef tuple shape = rule.shape()
        cdef bytes name = rule.name.encode()
        if shape not in self.definitions.known and self.definitions.step(self.shards, self.shard_count, self.owing_in != NULL):
            self.secret[2] += 1
        rule.home_terms = self.definitions.keep(shape, &rule.terms)
        if rule.calendar is not None and self.owing_in == NULL:
            rule.home_terms = self.definitions.keep_gate(rule.home_terms)
        rule.home_seed = siphash(self.secret[0], self.secret[1], PyBytes_AS_STRING(name), PyBytes_GET_SIZE(name)).lo
        rule.home = self.secret[2]
        return 0

    cdef int decide_place(self, const Place* place, int64_t now_us, int64_t cost, Outcome* out) except -1:
        """Call `decide_located`. The compiler inlines that only if a module has a single call of it."""
        return self.decide_located(place, now_us, cost, out)

    cdef int decide_general(self, const Terms* terms, Shard* shard, uint32_t index, int64_t now_us, int64_t cost,
                            Outcome* out) except -1:
        """Decide after a clock has stepped back or a definition has changed, and with a calendar."""
        cdef View[2] views
        cdef View dropped
        cdef Cell* cell = cell_at(shard, index)
        cdef int count = cell_views(cell, views)
        cdef Pair* pair = <Pair*>cell.view.amount.pair if cell.view.terms == NULL else <Pair*>malloc(sizeof(Pair))
        cdef int status
        cdef bint changed
        if pair == NULL:
            raise MemoryError
        if terms.kept != NULL:
            terms = terms.kept
        changed = dated_bring(views, &count, &dropped, terms, now_us)
        status = decide_views(views, &count, terms, now_us, cost, out)
        if changed and status == KEEP:
            status = dated_write(views, &count, terms, now_us)
        if status == WRITE and dropped.terms != NULL:
            view_free(&dropped)
        if status == NO_MEMORY:
            raise MemoryError
        if status == WRITE:
            self.write_back(shard, index, terms, views, count, pair, now_us)
        elif cell.view.terms != NULL:
            free(pair)
        return 0

    cdef int decide_new(self, const Terms* terms, Shard* shard, Hash128 hashed, int64_t now_us, int64_t cost,
                        Outcome* out) except -1:
        cdef View[2] views
        cdef Cell cell
        cdef int64_t free_at_us
        cdef int count = 0
        if cost <= terms.capacity and self.used >= self.max_keys:
            free_at_us = self.make_place(shard, now_us)
            if free_at_us > now_us:
                out.allowed = False
                out.in_ticks = False
                out.remaining = 0
                out.retry_us = out.reset_us = free_at_us - now_us
                return 0
        if cost <= terms.capacity:
            self.make_room(shard, now_us)
        elif terms.kept != NULL:
            return self.decide_dated(terms.kept, shard, hashed, now_us, cost, out)
        if decide_views(views, &count, terms, now_us, cost, out) == NO_MEMORY:
            raise MemoryError
        if count:
            cell.hash_lo = hashed.lo
            cell.hash_hi = hashed.hi
            cell.view = views[0]
            shard_place(shard, &cell)
            self.used += 1
        return 0

    cdef int decide_dated(self, const Terms* terms, Shard* shard, Hash128 hashed, int64_t now_us, int64_t cost,
                          Outcome* out) except -1:
        """Decide on a new key under a rule with a calendar."""
        cdef Cell cell
        cdef int64_t free_at_us = now_us
        if cost > terms.capacity:
            out[0] = Outcome(False, False, terms.capacity, NEVER, 0)
            return 0
        if self.used >= self.max_keys:
            free_at_us = self.make_place(shard, now_us)
        out[0] = Outcome(free_at_us <= now_us, False, 0, free_at_us - now_us, free_at_us - now_us)
        if out.allowed:
            self.make_room(shard, now_us)
            cell.hash_lo = hashed.lo
            cell.hash_hi = hashed.hi
            cell.view.terms = terms
            cell.view.at_us = dated_start(terms, now_us)
            cell.view.amount.counts = Counts(<uint32_t>cost, 0)
            report(terms, &cell.view, now_us, 0, out)
            shard_place(shard, &cell)
            self.used += 1
        return 0

    cdef int64_t make_place(self, Shard* shard, int64_t now_us) noexcept:
        """Remove the key closest to fresh among a few. Without `evict`, remove only a fresh one, else return when one will be fresh.

        Closest is the key that has used the least share of its capacity, and among equal ones the first to be fresh. The adversary
        is a flood of new keys: it can displace only keys that have used as little as its own.
        """
        cdef int64_t fresh_at_us, earliest_us = 0, used, least = 0, least_at_us = 0
        cdef uint32_t i, victim = 0
        cdef int sampled = 0
        while shard.used == 0:
            shard = self.shards if shard == &self.shards[self.shard_count - 1] else shard + 1
        if self.sweep(shard, now_us):
            return now_us
        while sampled < EVICTION_SAMPLE:
            # xorshift64 (Marsaglia, 2003): the sample need not be secret, but no client may choose it.
            self.random ^= self.random << 13
            self.random ^= self.random >> 7
            self.random ^= self.random << 17
            i = <uint32_t>(((self.random >> 32) * shard.room) >> 32)
            while not fingerprints_of(shard)[i]:
                i = i + 1 if i + 1 < shard.room else 0
            fresh_at_us = cell_fresh_at(shard, cell_at(shard, i))
            used = cell_used_share(shard, cell_at(shard, i), now_us) if fresh_at_us > now_us else -1
            if sampled == 0 or used < least or (used == least and fresh_at_us < least_at_us):
                least = used
                least_at_us = fresh_at_us
                victim = i
            earliest_us = fresh_at_us if sampled == 0 else min(earliest_us, fresh_at_us)
            sampled += 1
        if least >= 0:
            if not self.evict:
                return earliest_us
            self.evictions += 1
            self.note_removal(cell_at(shard, victim), now_us)
        self.remove(shard, victim)
        return now_us

    cdef bint sweep(self, Shard* shard, int64_t now_us) noexcept:
        """Remove the fresh keys among the next few cells: a fresh key must not displace one that isn't."""
        cdef int64_t before = self.used
        cdef int _scanned
        for _scanned in range(SWEEP_CELLS):
            if shard.hand >= shard.room:
                shard.hand = 0
            if fingerprints_of(shard)[shard.hand] and cell_fresh_at(shard, cell_at(shard, shard.hand)) <= now_us:
                self.remove(shard, shard.hand)    # the cell that moves here is looked at next
            else:
                shard.hand += 1
        return self.used < before

    cdef int locate_entry(self, Entry entry, Place* place) except -1:
        return self.locate(entry.rule, entry.joined(), PyBytes_AS_STRING(entry.canonical) + 1,
                           PyBytes_GET_SIZE(entry.canonical) - 1, place)

    cdef int find(self, Entry entry, Place* place, Cell** cell) except -1:
        """Locate the entry's key, and find its cell, or NULL."""
        cdef int64_t found
        self.locate_entry(entry, place)
        found = shard_find(place.shard, place.hashed)
        cell[0] = cell_at(place.shard, <uint32_t>found) if found >= 0 else NULL
        return 0

    cdef int locate_joint(self, Joint joint, Place* places) except -1:
        """Locate the keys of all parts."""
        cdef const char* data
        cdef Py_ssize_t length
        cdef int p
        for p in range(joint.size):
            canonical = joint.canonicals[p]
            if canonical is None:
                data = PyUnicode_AsUTF8AndSize(joint.keys[p], &length)
                self.locate(<CompiledRule>joint.rules[p], False, data, length, &places[p])
            else:
                data = PyBytes_AS_STRING(canonical)
                length = PyBytes_GET_SIZE(canonical)
                self.locate(<CompiledRule>joint.rules[p], data[0] == c"(", data + 1, length - 1, &places[p])
        return 0

    cdef int look(self, const Place* place, int64_t now_us, int64_t cost, Outcome* out) except -1:
        """Say what `decide_place` would, and change nothing: `remaining` is what is left before the check. Runs no Python code."""
        cdef int64_t found = shard_find(place.shard, place.hashed), total
        cdef const Cell* cell
        cdef uint32_t expired
        cdef View own
        cdef const Terms* terms = place.terms if place.terms.kept == NULL else place.terms.kept
        if found < 0:
            out[0] = Outcome(cost <= terms.capacity, False, terms.capacity, 0 if cost <= terms.capacity else NEVER, 0)
            return 0
        cell = cell_at(place.shard, <uint32_t>found)
        if cell.view.terms != place.terms or view_ahead(&cell.view, now_us):
            return self.look_general(place, cell, now_us, cost, out)
        own = cell.view
        view_look(&own, own.terms, now_us, cost, &expired, &total, out)
        if out.allowed:
            report(own.terms, &own, now_us, total, out)
        return 0

    cdef int look_general(self, const Place* place, const Cell* cell, int64_t now_us, int64_t cost, Outcome* out) except -1:
        """Look after a clock has stepped back or a definition has changed, and with a calendar."""
        cdef const Terms* terms = place.terms if place.terms.kept == NULL else place.terms.kept
        cdef View[2] views
        cdef View own, dropped
        cdef uint32_t expired
        cdef int64_t total
        cdef int i, count = cell_views(cell, views), own_index = -1
        for i in range(count):
            if views[i].terms.kind == SLIDING:
                views[i].amount.window = window_clone(views[i].amount.window)
                if views[i].amount.window == NULL:
                    raise MemoryError
        dated_bring(views, &count, &dropped, terms, now_us)
        for i in range(count):
            if view_ahead(&views[i], now_us):
                view_rebase(&views[i], now_us)
            if own_index < 0 and same_definition(views[i].terms, terms):
                own_index = i
        if own_index >= 0:
            own = views[own_index]
        elif view_derive(&own, terms, view_fullest(views, count, now_us), now_us) == NO_MEMORY:
            raise MemoryError
        view_look(&own, terms, now_us, cost, &expired, &total, out)
        if out.allowed:
            report(terms, &own, now_us, total, out)
        for i in range(count):
            view_free(&views[i])
        if dropped.terms != NULL:
            view_free(&dropped)
        if own_index < 0:
            view_free(&own)
        return 0

    cdef int look_joint(self, Joint joint, const Place* places, int64_t now_us, Outcome* outs) except -1:
        """Say of each part what it would hear alone. Runs no Python code."""
        cdef int p
        for p in range(joint.size):
            if joint.uncounted >> p & 1:
                outs[p] = part_uncounted(joint, p)
            else:
                self.look(&places[p], now_us, joint.costs[p], &outs[p])
        return 0

    cdef int decide_joint(self, Joint joint, const Place* places, int64_t now_us, Outcome* outs, int* reported) except -1:
        """Whether all sets are granted: then the parts that pay are charged, else nothing is changed. Runs no Python code."""
        cdef int s, p, sets
        self.look_joint(joint, places, now_us, outs)
        while joint_outcome(joint, outs, reported, &sets):
            if not self.evict and not self.has_room(joint, places, now_us, outs, reported):
                continue                         # another alternative may have its key here already
            for s in range(sets):
                p = reported[s]
                if outs[p].allowed and not joint.uncounted >> p & 1:
                    self.decide_place(&places[p], now_us, joint.costs[p], &outs[p])
            return True
        return False

    cdef bint has_room(self, Joint joint, const Place* places, int64_t now_us, Outcome* outs, const int* payers) noexcept:
        """Make room for the keys that pay and aren't here. If there is none, the outcome of one of them becomes a denial."""
        cdef int64_t free_at_us
        cdef int s, p, absent, last = 0
        while True:
            absent = 0
            for s in range(joint.sets):
                p = payers[s]
                if outs[p].allowed and not joint.uncounted >> p & 1 and shard_find(places[p].shard, places[p].hashed) < 0:
                    absent, last = absent + 1, p
            if self.used + absent <= self.max_keys:
                return True
            free_at_us = self.make_place(places[last].shard, now_us)  # which may remove one of these, if it is fresh
            if free_at_us > now_us:
                outs[last] = Outcome(False, False, 0, free_at_us - now_us, free_at_us - now_us)
                return False

    cdef object decided_jointly(self, Joint joint, bint consume):
        cdef Place[PARTS_MAX] places
        cdef Outcome[PARTS_MAX] outs
        cdef int[PARTS_MAX] reported
        cdef int64_t now_us
        cdef int sets
        cdef bint allowed
        self.locate_joint(joint, places)
        now_us = self.now_us()
        if consume:
            allowed = self.decide_joint(joint, places, now_us, outs, reported)
        else:
            self.look_joint(joint, places, now_us, outs)
            allowed = joint_outcome(joint, outs, reported, &sets)
        decision = joint_decision(joint, MEMORY, outs, reported, joint.sets, allowed)
        if consume:
            joint_count(decision)
        return decision

    def decide(self, entry not None):
        """Decide on an Entry or a Joint, and consume. Returns a `Decision`."""
        cdef Outcome out
        cdef Place place
        cdef Entry single
        if isinstance(entry, Joint):
            return self.decided_jointly(<Joint>entry, True)
        single = entry
        self.locate_entry(single, &place)
        self.decide_place(&place, self.now_us(), single.cost, &out)
        count_decision(single.rule, MEMORY, out.allowed)
        return decision_new(single.rule, single.key, single.cost, MEMORY, &out)

    def peek(self, entry not None):
        """Decide without consuming or changing anything. `remaining` is what is left before the check."""
        cdef Outcome out
        cdef Place place
        cdef Entry single
        if isinstance(entry, Joint):
            return self.decided_jointly(<Joint>entry, False)
        single = entry
        self.locate_entry(single, &place)
        self.look(&place, self.now_us(), single.cost, &out)
        return decision_new(single.rule, single.key, single.cost, MEMORY, &out)

    def reset(self, Entry entry not None):
        """Forget what the key has used under the rule."""
        cdef Place place
        cdef Cell* cell
        cdef int64_t now_us = self.now_us()
        self.find(entry, &place, &cell)
        if cell != NULL:
            self.note_removal(cell, now_us)
            self.remove(place.shard, <uint32_t>((<char*>cell - place.shard.cells) // place.shard.cell_bytes))

    def dump(self, Entry entry not None):
        """The key's state in the ASCII form of docs/arithmetic.md, or None."""
        cdef View[2] views
        cdef Place place
        cdef Cell* cell
        cdef int i
        self.find(entry, &place, &cell)
        if cell == NULL:
            return None
        return "".join(["1;"] + [view_text(&views[i]) for i in range(cell_views(cell, views))]).encode()
