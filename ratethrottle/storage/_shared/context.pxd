"""What the connections of one storage share: see `context.pyx`."""

from libc.stdint cimport int64_t

from ratethrottle._engine.definitions cimport CompiledRule, OF_STORAGE, Policy
from ratethrottle._engine.keys cimport KeyTable
from ratethrottle.storage._shared.keynames cimport KeyNames
from ratethrottle.storage._shared.repair cimport Repair


cdef class StorageContext:
    cdef readonly KeyNames names
    cdef readonly KeyTable bounds
    cdef readonly Repair repair
    cdef readonly int64_t deadline_us
    cdef int64_t ttl_us                      # how long a bound denies before it is asked again
    cdef Policy on_outage
    cdef bint deny_overload                  # instead of raising an error
    cdef readonly int64_t by_policy          # how many checks were decided by an outage policy
    cdef readonly int64_t overloads          # and how many were too many for the queue
    cdef int64_t losses                      # of the store's data that events have announced
    cdef public object noticed               # called with what happened, the link and a fact

    cdef inline Policy policy_for(self, CompiledRule rule) noexcept:
        return rule.policy if rule.policy != OF_STORAGE else self.on_outage
