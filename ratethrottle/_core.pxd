"""What the compiled modules of this package share: see `_core.pyx`."""

from cpython.object cimport PyObject
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from ratethrottle._arithmetic cimport Outcome, Terms, View
from ratethrottle._bound cimport Bound
from ratethrottle._table cimport Hash128, KeptTerms, Place, Shard, Slot


cdef enum Policy:                            # what answers while the storage can't
    OF_STORAGE                               # what the storage is told
    LOCAL
    ALLOW
    DENY
    RAISE


cdef Policy policy_of(object word) except *


cdef enum:
    SOURCES_MAX = 8


cdef class Tally:
    """What a limiter has decided under a rule of a name: twice the source, plus whether it was allowed -> how often."""

    cdef uint64_t[2 * SOURCES_MAX] counts


cdef class CompiledRule:
    cdef readonly str name
    cdef readonly str strategy
    cdef readonly int64_t limit              # 0: everything is denied, and the terms are those of a limit of 1
    cdef readonly int64_t lease_us           # for how long units taken ahead may be spent
    cdef readonly int64_t lease_units        # the most that are taken ahead at once; 0: none ever
    cdef Policy policy
    cdef Terms terms
    # Where the table that saw this rule last keeps its terms: spares the hot path a look-up.
    cdef uint64_t home
    cdef Terms* home_terms
    cdef uint64_t home_seed
    cdef uint64_t* counts                    # of the tally of the limiter that it is installed in
    cdef Tally tally

    cdef tuple shape(self)
    cdef tuple facts(self)


cdef struct Orphan:                          # what is left of a lease whose bound was let go
    Hash128 hashed
    int64_t at_us
    int64_t epoch
    int64_t units


cdef class KeyTable:
    cdef Shard* shards
    cdef uint32_t shard_count
    cdef readonly int64_t max_keys
    cdef readonly bint evict
    cdef readonly int64_t evictions          # that forgot something
    cdef int64_t used
    cdef uint64_t[3] secret                  # two words key the hash, the third names this table to the rules it has met
    cdef uint64_t random
    cdef int64_t clock_offset_us
    cdef object clock
    cdef unsigned forks                      # of this process, when the table was last looked at
    cdef dict known                          # shape of a rule -> address of its terms
    cdef KeptTerms* kept                     # all terms, the newest first, and how many
    cdef readonly Py_ssize_t kept_terms
    cdef Py_ssize_t known_most               # so many begin a round, which finds those that nothing refers to
    cdef int64_t round                       # its number
    cdef uint32_t round_shard                # the shard that it looks through next
    cdef KeptTerms** round_at                # what points to the terms that it looks at next; NULL between two rounds
    cdef bint letting_go                     # a step of it is being taken
    cdef int terms_held                      # callers that hold terms while other code may run; with any, none are freed

    # Of a table of bounds:
    cdef uint16_t* owing_in                  # of each shard, how many of its keys owe something; NULL in another table
    cdef readonly int64_t owing              # all of them
    cdef uint32_t tidy_hand                  # the shard that is tidied next
    cdef Shard* emptied                      # those that are still to be freed, and how many
    cdef readonly size_t emptied_count
    cdef int away                            # gatherings whose store is away
    cdef Orphan* orphans                     # a ring of ORPHANS_MAX
    cdef int64_t orphan_count                # how many there ever were

    cdef Bound* bound_of(self, Hash128 hashed, Shard** shard, uint32_t* index) noexcept
    cdef void note_owes(self, Shard* shard, Bound* bound, bint owes) noexcept
    cdef void drop_account(self, Shard* shard, Bound* bound) noexcept
    cdef void orphan(self, Bound* bound) noexcept
    cdef int64_t adopt(self, Hash128 hashed, int64_t at_us, int64_t epoch, int64_t now_us) noexcept
    cdef int tidy(self, int64_t now_us) except -1
    cdef int rebuild(self, Shard* shard, int64_t now_us) except -1
    cdef int64_t now_us(self) except -1
    cdef void forked(self) noexcept
    cdef void notice_fork(self) noexcept
    cdef void empty(self) noexcept
    cdef void free_emptied(self) noexcept
    cdef int locate(self, CompiledRule rule, bint joined, const char* data, Py_ssize_t length, Place* place) except -1
    cdef int meet(self, CompiledRule rule) except -1
    cdef int64_t asked_us(self) except -1
    cdef int let_terms_go(self) except -1
    cdef int let_go_next(self) except -1
    cdef void note_terms(self, Shard* shard) noexcept
    cdef void remove(self, Shard* shard, uint32_t index) noexcept
    cdef int make_room(self, Shard* shard, int64_t now_us) except -1
    cdef Slot* insert(self, Shard* shard, const Slot* slot, int64_t now_us) except NULL
    cdef int decide_located(self, const Place* place, int64_t now_us, int64_t cost, Outcome* out) except -1
    cdef int decide_general(self, const Terms* rule, Shard* shard, uint32_t index, int64_t now_us, int64_t cost,
                            Outcome* out) except -1
    cdef int decide_new(self, const Terms* rule, Shard* shard, Hash128 hashed, int64_t now_us, int64_t cost,
                        Outcome* out) except -1
    cdef int64_t make_place(self, Shard* shard, int64_t now_us) noexcept
    cdef bint sweep(self, Shard* shard, int64_t now_us) noexcept
    cdef int locate_entry(self, Entry entry, Place* place) except -1
    cdef int find(self, Entry entry, Place* place, Slot** slot) except -1
    cdef Terms* terms_of(self, CompiledRule rule) except NULL
    cdef Hash128 hash_entry(self, Entry entry) except *


cdef enum Source:
    MEMORY
    REDIS
    PREFILTER
    LEASE
    OUTAGE
    OVERLOAD


cdef class Decision:
    cdef CompiledRule terms
    cdef readonly object key
    cdef readonly int64_t cost
    cdef Source source_index
    cdef Outcome out

    cdef Outcome* settled(self) noexcept
    cdef tuple facts(self)


cdef inline void count_decision(CompiledRule rule, Source source, bint allowed) noexcept:
    rule.counts[2 * source + allowed] += 1


cdef Decision decision_new(CompiledRule rule, object key, int64_t cost, Source source, const Outcome* out)


cdef enum Stage:
    COMPLETE                                 # the decision is here, or what went wrong, or it was handed over
    NEW                                      # nobody has awaited it yet
    MADE                                     # by the library for itself: nobody will
    WAITING                                  # in the queue of a gathering
    PARKED                                   # until another check has asked the same
    SENT

cdef enum Mode:
    CHECK
    PEEK
    RESET
    GIVE_BACK                                # units of a lease, with no check


cdef enum:
    WHOLE = 0                                # a mark: the text is all that the key is called in Redis


cdef class PendingDecision:
    cdef PyObject* decision                  # owned until it is handed over; NULL before and after
    cdef int lets_others_run                 # yield to the loop once, although the decision is here; or ASKED_FOR_TRUTH
    cdef Stage stage
    # Of a check that has to ask:
    cdef Remote remote
    cdef CompiledRule rule
    cdef object key
    cdef object text                         # what `data` points into: the key itself, or its joined or digested form
    cdef const char* data
    cdef Py_ssize_t size
    cdef char mark                           # "=", "(" or "#": what stands before it in Redis; WHOLE; or DECIDED if nothing is asked
    cdef uint32_t tag
    cdef Mode mode
    cdef int64_t units
    cdef Hash128 hashed
    cdef int64_t deadline_us
    cdef uint64_t turn                       # of those that entered its gathering, the how manieth
    cdef bint stale                          # a bound that should be asked again denied it
    cdef object place                        # the gathering that it waits in
    cdef Waiter waiter                       # what its task waits on
    cdef Group group                         # or the group that waits on it
    cdef object error
    cdef PyObject* before                    # neighbours in a queue, or in an entry
    cdef PyObject* after


cdef class Waiter:
    """What a task waits on: a future as far as a task needs one, woken together with the others of a reply."""

    cdef PendingDecision pending
    cdef object loop
    cdef object callback
    cdef object context
    cdef object message
    cdef bint blocking
    cdef bint is_done
    cdef bint is_cancelled

    cdef int call(self) except -1


cdef class Group:
    """Checks that are waited for together."""

    cdef readonly list members
    cdef readonly object future
    cdef object error
    cdef Py_ssize_t left
    cdef int64_t deadline_us


cdef class Remote:
    """What asks a store that is shared: the base of `ratethrottle._calls.Calls`."""

    cdef readonly KeyTable bounds
    cdef int64_t ttl_us                      # how long a bound denies before it is asked again
    cdef int complete                        # consecutive checks that had to ask, and were answered without a wait
    cdef Policy on_outage

    cdef bint allows(self, CompiledRule rule) noexcept
    cdef int ask(self, PendingDecision pending) except -1
    cdef int leave(self, PendingDecision pending) except -1


cdef class Entry:
    cdef readonly CompiledRule rule
    cdef readonly object key
    cdef readonly bytes canonical            # "=" and the key's UTF-8, or "(" and a tuple's joined form
    cdef readonly int64_t cost

    cdef bint joined(self)
