"""The key table as structs: hash, slots, and shards of open addressing, each rebuilt on its own.

Like the arithmetic, everything is inline and touches no Python object. Which key is let go when a table is full, and when one is
decided on, stands with `KeyTable` in `_core.pyx`.
"""

from cpython.object cimport PyObject
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset

from ratethrottle._arithmetic cimport KEEP, NO_MEMORY, Terms, View, view_free, view_fresh_at, view_used
from ratethrottle._pieces cimport piece_free


cdef extern from *:
    """
    #define RT_PREFETCH(address) __builtin_prefetch(address)
    /* Its caller holds the GIL; what is dropped is a Share, which runs no Python code when it goes. */
    static inline void rt_drop(PyObject *held) { Py_XDECREF(held); }

    /* Frees a block that isn't needed again soon. Its pages go back to the system, wherever it lies in the heap; free() alone gives
       back only the heap's end. malloc_trim() would lock the heap for about 0.1 ms per MB, on whatever thread it runs. */
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

cdef struct KeptTerms:
    Terms terms                            # first: what a view points to is one of these
    KeptTerms* older
    int64_t met_in                         # the last round in which anything referred to them
    bint retired                           # nothing did in a whole round: they aren't given out any more

cdef struct Pair:                          # two definitions of one rule in use, so that each has its own account
    View own
    View other

cdef struct Slot:
    uint64_t hash_lo
    uint64_t hash_hi
    View view                              # terms == NULL: amount.pair holds two views

cdef struct Account:                       # what a process admits of a key while the store is away: see `_outage.pyx`
    View held                              # by the share's terms: a share of what was known, and what was admitted here
    View owed                              # by its `owed`: what was admitted here, and not taken yet; of a bucket, also what was
    int64_t taken_ticks                    # of a bucket: what was owed in all when it was taken last
    int64_t taken_us                       # when that was, in the store's time
    int64_t taken_newest_us                # and when the newest of it was admitted
    PyObject* share                        # owned: the Share that both views point into
    int64_t outage                         # the one in which it last met what was known
    int64_t met_us                         # and when that had been heard: a bound's received_us
    int64_t ahead_us                       # both views are kept in the store's time, which is so much ahead of the table's
    int64_t newest_us                      # when units were last admitted, in the store's time
    bint owes                              # it is among those that `owing_in` counts

cdef struct NamedSlot:                     # of a table of bounds: a `Bound` begins as this does
    Slot slot
    char* name                             # owned: what the key is called in the store
    size_t name_size
    Account* account                       # owned; NULL where nothing was admitted here
    int64_t keep_until_us                  # whatever the view holds: for a lease, or because the key was reset

cdef struct Shard:                         # small, as those of a large table must stay in the cache
    uint16_t room                          # a third more than SHARD_KEYS, give or take what chance gives
    uint16_t used
    uint16_t hand                          # the slot that the next sweep of a full table begins with
    uint16_t slot_bytes                    # a Slot, and what a table keeps behind each
    char* slots                            # and behind them their tags

cdef struct Hash128:
    uint64_t lo
    uint64_t hi


cdef struct Place:                         # where a key of a rule belongs in one table
    Shard* shard
    Hash128 hashed
    const Terms* terms


cdef inline Slot* slot_at(const Shard* shard, uint32_t i) noexcept nogil:
    return <Slot*>(shard.slots + <size_t>i * shard.slot_bytes)


cdef inline uint8_t* tags_of(const Shard* shard) noexcept nogil:
    """A byte of the hash for each slot, 0 when empty: a probe reads these first."""
    return <uint8_t*>slot_at(shard, shard.room)


cdef inline void slot_copy(const Shard* shard, Slot* target, const Slot* source) noexcept nogil:
    if shard.slot_bytes == sizeof(Slot):   # of a size that the compiler knows
        target[0] = source[0]
    else:
        memcpy(target, source, shard.slot_bytes)


cdef inline void terms_met(const Terms* terms, int64_t round_) noexcept nogil:
    """Note that something refers to terms that a table keeps."""
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


cdef inline uint8_t tag_of(uint64_t hash_lo) noexcept nogil:
    cdef uint8_t tag = <uint8_t>hash_lo
    return tag if tag else 1


cdef inline uint32_t home_of(uint64_t hash_lo, uint32_t room) noexcept nogil:
    return <uint32_t>(((hash_lo >> 32) * room) >> 32)


cdef inline int slot_views(const Slot* slot, View* views) noexcept nogil:
    if slot.view.terms != NULL:
        views[0] = slot.view
        return 1
    views[0] = (<Pair*>slot.view.amount.pair).own
    views[1] = (<Pair*>slot.view.amount.pair).other
    return 2


cdef inline int64_t account_fresh_at(const Account* account) noexcept nogil:
    """When nothing tells it from a new account, in the table's time."""
    cdef const View* owed = &account.owed
    cdef int64_t fresh_at_us = view_fresh_at(&account.held)
    if owed.terms.kind != c"b" or owed.terms.drain_ticks:
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


cdef inline int64_t named_fresh_at(const NamedSlot* named) noexcept nogil:
    cdef int64_t fresh_at_us = max(view_fresh_at(&named.slot.view), named.keep_until_us)
    return fresh_at_us if named.account == NULL else max(fresh_at_us, account_fresh_at(named.account))


cdef inline int64_t slot_fresh_at(const Shard* shard, const Slot* slot) noexcept nogil:
    cdef View[2] views
    if shard.slot_bytes != sizeof(Slot):
        return named_fresh_at(<NamedSlot*>slot)
    if slot_views(slot, views) == 1:
        return view_fresh_at(views)
    return max(view_fresh_at(views), view_fresh_at(&views[1]))


cdef inline int64_t view_used_share(const View* view, int64_t now_us) noexcept nogil:
    return (min(view_used(view, now_us), view.terms.capacity) << 20) // view.terms.capacity


cdef inline int64_t slot_used_share(const Shard* shard, const Slot* slot, int64_t now_us) noexcept nogil:
    """How much of its capacity a key has used, in 2^20ths; of two definitions the larger share, and of what was admitted here too."""
    cdef View[2] views
    cdef const Account* account
    cdef int64_t share = 0
    cdef int i, count = slot_views(slot, views)
    for i in range(count):
        share = max(share, view_used_share(&views[i], now_us))
    account = (<NamedSlot*>slot).account if shard.slot_bytes != sizeof(Slot) else NULL
    if account != NULL:
        now_us = max(now_us + account.ahead_us, account.newest_us)
        share = max(share, max(view_used_share(&account.held, now_us), view_used_share(&account.owed, now_us)))
    return share


cdef inline void slot_free(const Shard* shard, Slot* slot) noexcept nogil:
    """Give back what hangs from a slot; the slot itself stays as it is."""
    cdef View[2] views
    cdef int i, count = slot_views(slot, views)
    if shard.slot_bytes != sizeof(Slot):
        piece_free((<NamedSlot*>slot).name)
        account_free((<NamedSlot*>slot).account)
    for i in range(count):
        view_free(&views[i])
    if slot.view.terms == NULL:
        free(slot.view.amount.pair)


cdef inline void shard_free(Shard* shard) noexcept nogil:
    """Give back all that a shard has; the shard itself stays as it is."""
    cdef uint32_t i
    for i in range(shard.room):
        if tags_of(shard)[i]:
            slot_free(shard, slot_at(shard, i))
    free_pages(shard.slots, shard.room * (shard.slot_bytes + 1))


cdef inline int64_t shard_find(const Shard* shard, Hash128 hashed) noexcept nogil:
    """The index of the key's slot; −1 − (index of the empty one it would take) when it is absent."""
    cdef uint32_t i
    cdef uint8_t tag
    cdef const uint8_t* tags
    if shard.room == 0:
        return -1
    tags = tags_of(shard)
    i = home_of(hashed.lo, shard.room)
    tag = tag_of(hashed.lo)
    RT_PREFETCH(slot_at(shard, i))                # while the tags are on their way too
    RT_PREFETCH(<char*>slot_at(shard, i) + 63)
    while tags[i]:
        if tags[i] == tag and slot_at(shard, i).hash_lo == hashed.lo and slot_at(shard, i).hash_hi == hashed.hi:
            return i
        i += 1
        if i == shard.room:
            i = 0
    return -1 - <int64_t>i


cdef inline uint32_t shard_place(Shard* shard, const Slot* slot) noexcept nogil:
    """Put a key that is absent into a shard with room; returns where."""
    cdef uint32_t i = home_of(slot.hash_lo, shard.room)
    cdef uint8_t* tags = tags_of(shard)
    while tags[i]:
        i += 1
        if i == shard.room:
            i = 0
    tags[i] = tag_of(slot.hash_lo)
    slot_copy(shard, slot_at(shard, i), slot)
    shard.used += 1
    return i


cdef inline void shard_remove(Shard* shard, uint32_t hole) noexcept nogil:
    """Take a slot out and close the gap, so that no probe needs tombstones."""
    cdef uint32_t i = hole, home
    slot_free(shard, slot_at(shard, hole))
    while True:
        i += 1
        if i == shard.room:
            i = 0
        if not tags_of(shard)[i]:
            break
        home = home_of(slot_at(shard, i).hash_lo, shard.room)
        # A slot may move back into the hole unless its home lies behind the hole, up to where it stands (cyclically).
        if (hole < home <= i) if hole < i else (home > hole or home <= i):
            continue
        slot_copy(shard, slot_at(shard, hole), slot_at(shard, i))
        tags_of(shard)[hole] = tags_of(shard)[i]
        hole = i
    tags_of(shard)[hole] = 0
    shard.used -= 1


cdef inline int shard_rebuild(Shard* shard, int64_t now_us) noexcept nogil:
    """Leave out the keys that are fresh again and make room for a third more than the rest. Returns NO_MEMORY or KEEP.

    The slots of before are the caller's to free, once it has the new ones.
    """
    cdef Shard rebuilt
    cdef uint32_t i, kept = 0
    for i in range(shard.room):
        if tags_of(shard)[i] and slot_fresh_at(shard, slot_at(shard, i)) > now_us:
            kept += 1
    rebuilt.used = rebuilt.hand = 0
    rebuilt.room = <uint16_t>max(<uint32_t>SHARD_ROOM_MIN, kept + kept // 3)
    rebuilt.slot_bytes = shard.slot_bytes
    rebuilt.slots = <char*>malloc(rebuilt.room * (shard.slot_bytes + 1))
    if rebuilt.slots == NULL:
        return NO_MEMORY
    memset(tags_of(&rebuilt), 0, rebuilt.room)
    for i in range(shard.room):
        if not tags_of(shard)[i]:
            continue
        if slot_fresh_at(shard, slot_at(shard, i)) > now_us:
            shard_place(&rebuilt, slot_at(shard, i))
        else:
            slot_free(shard, slot_at(shard, i))
    shard[0] = rebuilt
    return KEEP


cdef inline bint shard_full(const Shard* shard) noexcept nogil:
    return shard.used >= shard.room - shard.room // 8
