"""What is known of keys and leased for them: see `known.pyx`."""

from libc.stdint cimport int64_t, uint32_t, uint64_t

from ratethrottle._core cimport Group, PendingDecision
from ratethrottle._engine.arithmetic cimport Terms
from ratethrottle._engine.bound cimport Bound
from ratethrottle._engine.definitions cimport CompiledRule
from ratethrottle._engine.joint cimport Joint
from ratethrottle._engine.keys cimport KeyTable
from ratethrottle._engine.table cimport Hash128, Shard
from ratethrottle.storage._shared.call cimport Answers, CheckCall
from ratethrottle.storage._shared.context cimport StorageContext
from ratethrottle.storage._shared.item cimport CallItem
from ratethrottle.storage._shared.repair cimport Repair
from ratethrottle.storage._shared.waiting cimport Waiting


cdef class KnownKeys:
    cdef StorageContext context
    cdef KeyTable bounds                     # shared by all connections, as the repair is
    cdef Repair repair
    cdef Waiting waiting                     # where it queues what gives units back
    cdef int64_t epoch                       # that the connection serves in; 0: none
    cdef list leases                         # a heap of (until_us, turn, PendingDecision, at_us): what may have to be given back
    cdef uint64_t turns                      # so that no two of these are equal
    cdef list returns                        # (PendingDecision, units, server_us, epoch): what has to be, and no bound holds any more

    cdef Bound* bound_of(self, Hash128 hashed, Shard** shard, uint32_t* index) noexcept
    cdef bint decide(self, PendingDecision pending, int64_t now_us, bint away, bint* asked) except -1
    cdef bint decide_joint(self, PendingDecision pending, int64_t now_us, bint away, bint* asked) except -1
    cdef bint is_asked(self, Joint joint, Bound** bounds, const int* verdicts, int64_t now_us) noexcept
    cdef int learn(self, CheckCall call, CallItem* item, PendingDecision sample, const Answers* answers, int64_t server_us,
                   int64_t now_us) except -1
    cdef int unanswered(self, const CallItem* item) noexcept
    cdef int forget(self, Hash128 hashed) except -1
    cdef int forget_used(self, CallItem* item, int64_t generation, int64_t server_us, int64_t now_us) except -1
    cdef int plan_leases(self, CheckCall call) except -1
    cdef int note_asked(self, CheckCall call, const CallItem* part) noexcept
    cdef int plan_lease(self, CheckCall call, CallItem* item, CompiledRule rule) except -1
    cdef int take_lease(self, Bound* bound, const Terms* terms, CheckCall call, PendingDecision sample, CompiledRule rule,
                        const Answers* answers, int64_t server_us) except -1
    cdef int note_lease(self, PendingDecision sample, const Bound* bound) except -1
    cdef int take_back(self, const CallItem* item, PendingDecision sample, int64_t epoch) except -1
    cdef int give_back(self, int64_t now_us, bint serving) except -1
    cdef int return_lease(self, PendingDecision sample, int64_t at_us, int64_t now_us) except -1
    cdef int put_back(self, PendingDecision sample, int64_t units, int64_t server_us, int64_t epoch) except -1
    cdef int return_later(self, PendingDecision pending, int64_t now_us) except -1
    cdef int queue_returns(self, Group group=*) except -1
    cdef int64_t first_lease_us(self) except -1
