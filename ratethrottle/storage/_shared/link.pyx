# cython: auto_pickle=False, autotestdict=False
"""How a connection stands, and why policies decide meanwhile: two facts that everything else asks for.

CLOSED → CONNECTING → BEATING → LEARNING or TELLING → SERVING. A lost connection is CLOSED, and everything may be ENDED.
An open connection that meets another epoch is BEATING again. One that serves is LEARNING or TELLING again if it has more to tell.
"""

cimport cython

from ratethrottle.storage._shared.context cimport StorageContext


STATES = ("closed", "connecting", "beating", "learning", "telling", "serving", "ended")


@cython.final
cdef class Link:
    """The state of one connection."""

    def __init__(self, StorageContext context not None, transport):
        self.context = context
        self.transport = transport

    cdef bint enter(self, State state) noexcept:
        """Go to another state; whether it is another one. Nothing leads out of the end."""
        if self.state == ENDED or state == self.state:
            return False
        self.state = state
        return True

    cdef int notice(self, what, fact) except -1:
        """Announce what happened."""
        if self.context.noticed is not None:
            self.context.noticed(what, self, fact)
        return 0

    cdef void come_back(self) noexcept:
        """The store isn't away any more."""
        if self.why & AWAY:
            self.why &= ~AWAY
            self.context.bounds.away = max(0, self.context.bounds.away - 1)  # a fork may have begun to count anew
