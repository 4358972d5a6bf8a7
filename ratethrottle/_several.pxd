"""Checks by several rules, and by rules of the caller's own: see `_several.pyx`."""

from ratethrottle._core cimport Mode, PendingDecision
from ratethrottle._engine.joint cimport Joint
from ratethrottle._engine.table cimport Place


cdef int sets_verdict(Joint joint, const int* verdicts) noexcept
cdef PendingDecision pending_joint(Joint joint, const Place* places, Mode mode)
