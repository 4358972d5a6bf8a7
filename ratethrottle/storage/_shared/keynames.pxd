"""What keys are called in Redis: see `keynames.pyx`."""

from libc.stdint cimport uint32_t

from ratethrottle._core cimport Mode, Parts, PendingDecision
from ratethrottle._engine.decision cimport Entry
from ratethrottle._engine.definitions cimport CompiledRule
from ratethrottle.storage._shared.resp cimport Buffer


cdef class KeyNames:
    cdef bytes opening                       # of every key, up to its tag
    cdef uint32_t tags
    cdef int tag_parts                       # of a tuple, that decide its tag; 0: all
    cdef bytes tag_names                       # of the tags
    cdef readonly bytes epoch_key
    cdef readonly bytes processes_key
    cdef readonly bytes charged_key          # and what was charged
    cdef readonly bytes holders_key          # and who holds slots
    cdef readonly bytes layout_key           # says by which layout its keys are called
    cdef readonly bytes layout

    cdef int address(self, PendingDecision pending) except -1
    cdef int address_parts(self, Parts parts) except -1
    cdef int put_key(self, Buffer* buffer, PendingDecision pending) except -1
    cdef str rule_of(self, bytes name)
    cdef bytes name(self, PendingDecision pending)
    cdef char* name_new(self, PendingDecision pending, size_t* size) except NULL


cdef PendingDecision pending_of(Entry entry, Mode mode)
cdef PendingDecision pending_for(CompiledRule rule, object text, char mark, uint32_t tag, Mode mode)
