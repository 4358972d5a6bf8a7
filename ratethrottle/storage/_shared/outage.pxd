"""What one process admits on its own while the store is away: see `outage.pyx`."""

from libc.stdint cimport int64_t, uint32_t

from ratethrottle._core cimport Parts, PendingDecision
from ratethrottle._engine.arithmetic cimport Outcome, Terms
from ratethrottle._engine.bound cimport Bound
from ratethrottle._engine.definitions cimport CompiledRule, Policy
from ratethrottle._engine.keys cimport KeyTable
from ratethrottle._engine.table cimport Account, Shard
from ratethrottle.storage._shared.keynames cimport KeyNames


cdef class Share:                            # of one definition of a rule; the views of accounts point into it
    cdef CompiledRule rule                   # that definition
    cdef int64_t n                           # what was known is divided by this
    cdef Terms terms                         # capacity 0: nothing is admitted
    cdef Terms owed                          # what is owed is counted by these


cdef class Shares:
    cdef KeyTable bounds
    cdef KeyNames names
    cdef readonly int64_t n                  # of how many processes this is the share of one; 0: nobody knows
    cdef readonly int64_t rank               # which of them, from 0
    cdef int64_t outage
    cdef dict made                           # a rule's numbers -> its Share
    cdef CompiledRule last_rule              # of the last decision, and its share: no look-up for a rule that comes again
    cdef bint last_everything
    cdef Share last_share
    cdef uint32_t hand                       # the shard that is looked through next for what is owed

    cdef int decide(self, PendingDecision pending, Share share, int64_t table_us, int64_t now_us, int64_t retry_us, int everything,
                    Outcome* out) except -1
    cdef int charge(self, PendingDecision member, Policy policy, int64_t table_us, int64_t now_us, int64_t retry_us, Outcome* out) except -1
    cdef int give_back(self, PendingDecision member, int64_t now_us, int64_t granted_us) except -1
    cdef bint decide_joint(self, Parts parts, const Policy* policies, bint consumes, int64_t table_us, int64_t now_us, int64_t retry_us,
                           Outcome* outs, int* reported, int* sets) except -1
    cdef Share bring(self, Account* account, Share share, const Bound* bound, bint lasting, int64_t table_us, int64_t now_us)
    cdef Account* keep(self, const Account* fresh, PendingDecision pending, int64_t table_us, Bound** bound,
                       Shard** shard) except NULL
    cdef Bound* add_bound(self, PendingDecision pending, int64_t now_us, Shard* shard) except NULL
    cdef tuple take(self, Shard* shard, uint32_t index, int64_t now_us)
    cdef Share share_of(self, CompiledRule rule, bint everything)
