"""The key table as structs: hash, cells, and shards of open addressing, each rebuilt on its own.

Like the arithmetic, everything is inline and touches no Python object. `KeyTable` in `keys.pyx` says which key leaves a full table.
"""

from cpython.object cimport PyObject
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset

from ratethrottle._engine.arithmetic cimport BUCKET, Terms, View, view_free, view_fresh_at, view_used
from ratethrottle._engine.pieces cimport piece_free
from ratethrottle._engine.window cimport KEEP, NO_MEMORY


cdef extern from *:
    """
    #define RT_PREFETCH(address) __builtin_prefetch(address)
    /* The caller holds the GIL. The object is a Share, whose deallocation runs no Python code. */
    static inline void rt_drop(PyObject *held) { Py_XDECREF(held); }

    /* Frees a block that isn't needed again soon. Its pages go back to the system, wherever the block is; free() alone gives back
       only the heap's end. malloc_trim() would lock the heap for about 0.1 ms per MB, for every thread. */
    #include <stdint.h>
    #include <stdlib.h>
    #include <sys/mman.h>
    #include <unistd.h>
    static __attribute__((noinline, cold)) void rt_free_pages(void *block, size_t size) {
    #ifdef __linux__
        uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE), first = ((uintptr_t)block + page - 1) / page * page;
        uintptr_t last = ((uintptr_t)block + size) / page * page;
        if (block != NULL && last > first) madvise((void *)first, last - first, MADV_DONTNEED);
    #endif
        free(block);
    }
    """
    void free_pages "rt_free_pages"(void* block, size_t size) noexcept nogil
    void RT_PREFETCH(const void* address) noexcept nogil
    void rt_drop(PyObject* held) noexcept nogil


cdef enum:
    SHARD_KEYS = 2048                      # keys of a full shard: rebuilding one takes well under a millisecond
    SHARD_ROOM_MIN = 8

cdef struct KeptTerms:                     # of a definition that a table has met; see `Definitions`
    Terms terms                            # first: a view's pointer to its terms points here
    KeptTerms* older
    int64_t met_in                         # the last round in which anything referred to them
    bint retired                           # nothing did in a whole round: they aren't given out any more

cdef struct Pair:                          # the views of two definitions of one rule that are both in use
    View own
    View other

cdef struct Cell:
    uint64_t hash_lo
    uint64_t hash_hi
    View view                              # terms == NULL: amount.pair points to two views

cdef struct Account:                       # what a process admits of a key while the store is away: see `_outage.pyx`
    View held                              # by the share's terms: a share of the known use, and the units admitted here
    View owed                              # by the share's `owed`: units admitted here and not taken yet; a bucket keeps those too
    int64_t taken_ticks                    # of a bucket: all that was owed when it was last taken
    int64_t taken_us                       # when that was, in the store's time
    int64_t taken_newest_us                # and when the newest of it was admitted
    PyObject* share                        # owned: the Share that both views point into
    int64_t outage                         # the outage in which it last took in the known use
    int64_t met_us                         # and when that had been heard: a bound's received_us
    int64_t ahead_us                       # both views are in the store's time, which is so far ahead of the table's
    int64_t newest_us                      # when units were last admitted, in the store's time
    bint owes                              # `owing_in` counts it

cdef struct NamedCell:                     # of a table of bounds: a `Bound` begins as this does
    Cell cell
    char* name                             # owned: the key's name in the store
    size_t name_size
    Account* account                       # owned; NULL if nothing was admitted here
    int64_t keep_until_us                  # even if the view is fresh: for a lease, or because the key was reset

cdef struct Shard:                         # small, so that the shards of a large table stay in the cache
    uint16_t room                          # up to about a third more than SHARD_KEYS; chance spreads the keys unevenly
    uint16_t used
    uint16_t hand                          # the cell that the next sweep of a full table begins with
    uint16_t cell_bytes                    # of a Cell, or of a Bound in a table of bounds
    char* cells                            # followed by their fingerprints

cdef struct Hash128:
    uint64_t lo
    uint64_t hi


cdef struct Place:                         # where a key of a rule belongs in one table
    Shard* shard
    Hash128 hashed
    const Terms* terms


cdef inline Cell* cell_at(const Shard* shard, uint32_t i) noexcept nogil:
    return <Cell*>(shard.cells + <size_t>i * shard.cell_bytes)


cdef inline uint8_t* fingerprints_of(const Shard* shard) noexcept nogil:
    """One byte of the hash for each cell, 0 if the cell is empty: a probe reads these first."""
    return <uint8_t*>cell_at(shard, shard.room)


cdef inline void cell_copy(const Shard* shard, Cell* target, const Cell* source) noexcept nogil:
    if shard.cell_bytes == sizeof(Cell):   # the compiler knows this size
        target[0] = source[0]
    else:
        memcpy(target, source, shard.cell_bytes)


cdef inline void terms_met(const Terms* terms, int64_t round_) noexcept nogil:
    """Note that something refers to these terms, which a table keeps."""
    (<KeptTerms*>terms).met_in = round_


cdef inline uint64_t rotl(uint64_t x, int by) noexcept nogil:
    return (x << by) | (x >> (64 - by))


cdef inline void sip_round(uint64_t* v) noexcept nogil:
    v[0] += v[1]
    v[2] += v[3]
    v[1] = rotl(v[1], 13) ^ v[0]
    v[3] = rotl(v[3], 16) ^ v[2]
    v[0] = rotl(v[0], 32)
    v[2] += v[1]
    v[0] += v[3]
    v[1] = rotl(v[1], 17) ^ v[2]
    v[3] = rotl(v[3], 21) ^ v[0]
    v[2] = rotl(v[2], 32)


cdef inline uint64_t sip_finish(uint64_t* v) noexcept nogil:
    cdef int _round
    for _round in range(3):
        sip_round(v)
    return v[0] ^ v[1] ^ v[2] ^ v[3]


cdef inline Hash128 siphash(uint64_t k0, uint64_t k1, const char* data, Py_ssize_t length) noexcept nogil:
    """SipHash-1-3 with a 128-bit result (Aumasson and Bernstein, «SipHash: a fast short-input PRF», 2012).

    Keyed per process, so that nobody outside can choose keys that collide or share a shard.
    """
    cdef uint64_t[4] v
    cdef uint64_t word
    cdef uint32_t low, high
    cdef Hash128 result
    cdef Py_ssize_t left = length
    v[0] = k0 ^ 0x736f6d6570736575ULL
    v[1] = k1 ^ 0x646f72616e646f6dULL ^ 0xee
    v[2] = k0 ^ 0x6c7967656e657261ULL
    v[3] = k1 ^ 0x7465646279746573ULL
    while left >= 8:
        memcpy(&word, data, 8)
        v[3] ^= word
        sip_round(v)
        v[0] ^= word
        data += 8
        left -= 8
    # The last 0 to 7 bytes by at most three loads: a memcpy of a length known only now would be a call.
    word = <uint64_t>length << 56
    if left >= 4:
        memcpy(&low, data, 4)
        memcpy(&high, data + left - 4, 4)
        word |= low | <uint64_t>high << (left - 4) * 8
    elif left > 0:
        word |= (<uint8_t>data[0] | <uint64_t><uint8_t>data[left >> 1] << (left >> 1) * 8
                 | <uint64_t><uint8_t>data[left - 1] << (left - 1) * 8)
    v[3] ^= word
    sip_round(v)
    v[0] ^= word
    v[2] ^= 0xee
    result.lo = sip_finish(v)
    v[1] ^= 0xdd
    result.hi = sip_finish(v)
    return result


cdef inline uint8_t fingerprint_of(uint64_t hash_lo) noexcept nogil:
    cdef uint8_t fingerprint = <uint8_t>hash_lo
    return fingerprint if fingerprint else 1


cdef inline uint32_t home_of(uint64_t hash_lo, uint32_t room) noexcept nogil:
    return <uint32_t>(((hash_lo >> 32) * room) >> 32)


cdef inline int cell_views(const Cell* cell, View* views) noexcept nogil:
    if cell.view.terms != NULL:
        views[0] = cell.view
        return 1
    views[0] = (<Pair*>cell.view.amount.pair).own
    views[1] = (<Pair*>cell.view.amount.pair).other
    return 2


cdef inline int64_t account_fresh_at(const Account* account) noexcept nogil:
    """When nothing tells the account from a new one, in the table's time."""
    cdef const View* owed = &account.owed
    cdef int64_t fresh_at_us = view_fresh_at(&account.held)
    if owed.terms.kind != BUCKET or owed.terms.drain_ticks:
        fresh_at_us = max(fresh_at_us, view_fresh_at(owed))
    elif owed.amount.level_ticks:
        return <int64_t>1 << 62             # until it is taken
    return fresh_at_us - account.ahead_us


cdef inline void account_free(Account* account) noexcept nogil:
    if account == NULL:
        return
    view_free(&account.held)
    view_free(&account.owed)
    rt_drop(account.share)
    piece_free(account)


cdef inline int64_t named_fresh_at(const NamedCell* named) noexcept nogil:
    cdef int64_t fresh_at_us = max(view_fresh_at(&named.cell.view), named.keep_until_us)
    return fresh_at_us if named.account == NULL else max(fresh_at_us, account_fresh_at(named.account))


cdef inline int64_t cell_fresh_at(const Shard* shard, const Cell* cell) noexcept nogil:
    cdef View[2] views
    if shard.cell_bytes != sizeof(Cell):
        return named_fresh_at(<NamedCell*>cell)
    if cell_views(cell, views) == 1:
        return view_fresh_at(views)
    return max(view_fresh_at(views), view_fresh_at(&views[1]))


cdef inline int64_t view_used_share(const View* view, int64_t now_us) noexcept nogil:
    return (min(view_used(view, now_us), view.terms.capacity) << 20) // view.terms.capacity


cdef inline int64_t cell_used_share(const Shard* shard, const Cell* cell, int64_t now_us) noexcept nogil:
    """How much of its capacity a key has used, in 2^20ths: the largest share among its definitions and its account."""
    cdef View[2] views
    cdef const Account* account
    cdef int64_t share = 0
    cdef int i, count = cell_views(cell, views)
    for i in range(count):
        share = max(share, view_used_share(&views[i], now_us))
    account = (<NamedCell*>cell).account if shard.cell_bytes != sizeof(Cell) else NULL
    if account != NULL:
        now_us = max(now_us + account.ahead_us, account.newest_us)
        share = max(share, max(view_used_share(&account.held, now_us), view_used_share(&account.owed, now_us)))
    return share


cdef inline void cell_free(const Shard* shard, Cell* cell) noexcept nogil:
    """Free what a cell points to; the cell itself stays as it is."""
    cdef View[2] views
    cdef int i, count = cell_views(cell, views)
    if shard.cell_bytes != sizeof(Cell):
        piece_free((<NamedCell*>cell).name)
        account_free((<NamedCell*>cell).account)
    for i in range(count):
        view_free(&views[i])
    if cell.view.terms == NULL:
        free(cell.view.amount.pair)


cdef inline void shard_free(Shard* shard) noexcept nogil:
    """Free all that a shard points to; the shard itself stays as it is."""
    cdef uint32_t i
    for i in range(shard.room):
        if fingerprints_of(shard)[i]:
            cell_free(shard, cell_at(shard, i))
    free_pages(shard.cells, shard.room * (shard.cell_bytes + 1))


cdef inline int64_t shard_find(const Shard* shard, Hash128 hashed) noexcept nogil:
    """The index of the key's cell; if the key is absent, −1 − (the index of the empty cell that it would take)."""
    cdef uint32_t i
    cdef uint8_t fingerprint
    cdef const uint8_t* fingerprints
    if shard.room == 0:
        return -1
    fingerprints = fingerprints_of(shard)
    i = home_of(hashed.lo, shard.room)
    fingerprint = fingerprint_of(hashed.lo)
    RT_PREFETCH(cell_at(shard, i))                # while the fingerprints are being fetched
    RT_PREFETCH(<char*>cell_at(shard, i) + 63)
    while fingerprints[i]:
        if fingerprints[i] == fingerprint and cell_at(shard, i).hash_lo == hashed.lo and cell_at(shard, i).hash_hi == hashed.hi:
            return i
        i += 1
        if i == shard.room:
            i = 0
    return -1 - <int64_t>i


cdef inline uint32_t shard_place(Shard* shard, const Cell* cell) noexcept nogil:
    """Put an absent key into a shard with room. Returns its index."""
    cdef uint32_t i = home_of(cell.hash_lo, shard.room)
    cdef uint8_t* fingerprints = fingerprints_of(shard)
    while fingerprints[i]:
        i += 1
        if i == shard.room:
            i = 0
    fingerprints[i] = fingerprint_of(cell.hash_lo)
    cell_copy(shard, cell_at(shard, i), cell)
    shard.used += 1
    return i


cdef inline void shard_remove(Shard* shard, uint32_t hole) noexcept nogil:
    """Empty a cell and close the gap, so that probes need no tombstones."""
    cdef uint32_t i = hole, home
    cell_free(shard, cell_at(shard, hole))
    while True:
        i += 1
        if i == shard.room:
            i = 0
        if not fingerprints_of(shard)[i]:
            break
        home = home_of(cell_at(shard, i).hash_lo, shard.room)
        # A cell may move back into the hole unless its home lies behind the hole, up to where it stands (cyclically).
        if (hole < home <= i) if hole < i else (home > hole or home <= i):
            continue
        cell_copy(shard, cell_at(shard, hole), cell_at(shard, i))
        fingerprints_of(shard)[hole] = fingerprints_of(shard)[i]
        hole = i
    fingerprints_of(shard)[hole] = 0
    shard.used -= 1


cdef inline int shard_rebuild(Shard* shard, int64_t now_us) noexcept nogil:
    """Remove the keys that are fresh again, and make room for a third more than the others. Returns NO_MEMORY or KEEP.

    The caller then frees the former cells.
    """
    cdef Shard rebuilt
    cdef uint32_t i, kept = 0
    for i in range(shard.room):
        if fingerprints_of(shard)[i] and cell_fresh_at(shard, cell_at(shard, i)) > now_us:
            kept += 1
    rebuilt.used = rebuilt.hand = 0
    rebuilt.room = <uint16_t>max(<uint32_t>SHARD_ROOM_MIN, kept + kept // 3)
    rebuilt.cell_bytes = shard.cell_bytes
    rebuilt.cells = <char*>malloc(rebuilt.room * (shard.cell_bytes + 1))
    if rebuilt.cells == NULL:
        return NO_MEMORY
    memset(fingerprints_of(&rebuilt), 0, rebuilt.room)
    for i in range(shard.room):
        if not fingerprints_of(shard)[i]:
            continue
        if cell_fresh_at(shard, cell_at(shard, i)) > now_us:
            shard_place(&rebuilt, cell_at(shard, i))
        else:
            cell_free(shard, cell_at(shard, i))
    shard[0] = rebuilt
    return KEEP


cdef inline bint shard_full(const Shard* shard) noexcept nogil:
    return shard.used >= shard.room - shard.room // 8
