# cython: auto_pickle=False, autotestdict=False
"""What the connections of one storage share, and those of another storage don't."""

cimport cython
from libc.stdint cimport int64_t

from ratethrottle._engine.definitions cimport policy_of
from ratethrottle.storage._shared.keynames cimport KeyNames
from ratethrottle.storage._shared.repair cimport Repair


@cython.final
cdef class StorageContext:
    """The options and counters of a storage, and what it knows."""

    def __init__(self, KeyNames names not None, Repair repair not None, int64_t deadline_us, int64_t ttl_us, str on_outage not None,
                 bint deny_overload):
        self.names = names
        self.repair = repair
        self.bounds = repair.bounds
        self.deadline_us = deadline_us
        self.ttl_us = ttl_us
        self.on_outage = policy_of(on_outage)
        self.deny_overload = deny_overload
        self.losses = repair.losses
