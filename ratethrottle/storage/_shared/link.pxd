"""How a connection stands: see `link.pyx`."""

from ratethrottle.storage._shared.context cimport StorageContext


cdef enum State:
    CLOSED                                   # there is no connection, and nothing asks for one
    CONNECTING                               # the transport is making one
    BEATING                                  # there is one, and the store is asked which epoch it is in
    LEARNING                                 # it has lost data, and other processes may still tell it what they know
    TELLING                                  # charges of this process come before checks
    SERVING                                  # checks are sent
    ENDED                                    # for good


cdef enum Why:                               # why policies decide instead of the store: flags
    AWAY = 1                                 # it doesn't answer, or not in time
    REFUSED = 2                              # it says no, and that can't heal by itself


cdef class Link:
    cdef object __weakref__
    cdef readonly StorageContext context
    cdef object transport
    cdef State state
    cdef int why                             # 0: policies don't decide
    cdef object reason                       # the error that says so; None while the store serves
    cdef bint served                         # whether it ever has

    cdef bint enter(self, State state) noexcept
    cdef int notice(self, what, fact) except -1
    cdef void come_back(self) noexcept

    cdef inline bint is_open(self) noexcept:
        return BEATING <= self.state <= SERVING
