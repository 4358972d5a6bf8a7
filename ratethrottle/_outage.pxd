"""What one process admits on its own while the store is away: see `_outage.pyx`."""

from libc.stdint cimport int64_t, uint32_t

from ratethrottle._arithmetic cimport Outcome, Terms, View
from ratethrottle._core cimport CompiledRule


cdef class Share:                            # of one definition of a rule; the views of accounts point into it
    cdef int64_t n                           # what was known is divided by this
    cdef Terms terms                         # capacity 0: nothing is admitted
    cdef Terms owed                          # what is owed is counted by these


cdef class Account:                          # of one key
    cdef CompiledRule rule                   # and share: of the last decision
    cdef Share share
    cdef View held                           # by share.terms: a share of what was known, and what was admitted here
    cdef View owed                           # by share.owed: what was admitted here, and not taken yet
    cdef int64_t outage                      # the one in which it last met what was known
    cdef tuple key                           # name of the rule, mark, text
    cdef uint32_t tag
    cdef Py_ssize_t index                    # in Shares.accounts

    cdef Account twin(self)
    cdef int bring(self, CompiledRule rule, Share share, int64_t now_us) except -1
    cdef int meet(self, const View* known, int64_t known_now_us, int64_t now_us) except -1
    cdef int change(self, Share share, int64_t now_us) except -1
    cdef int charge(self, int64_t now_us, int64_t cost) except -1
    cdef bint over(self, int64_t now_us) noexcept
    cdef tuple take(self, int64_t now_us)


cdef class Shares:
    cdef readonly int64_t max_keys
    cdef readonly int64_t refused            # checks denied because no account had room
    cdef readonly Py_ssize_t owing           # accounts from which something may be owed
    cdef int64_t n
    cdef int64_t rank
    cdef int64_t outage
    cdef dict made                           # a rule's numbers -> its Share
    cdef CompiledRule last_rule              # of the last decision, and its share: no look-up for a rule that comes again
    cdef bint last_everything
    cdef Share last_share
    cdef tuple places                        # of dicts: key -> Account
    cdef list accounts                       # all of them; those that owe stand first
    cdef Py_ssize_t hand                     # the account that the next sweep begins with

    cdef int decide(self, CompiledRule rule, object text, char mark, uint32_t tag, const View* known, int64_t known_now_us,
                    int64_t now_us, int64_t cost, int64_t retry_us, bint everything, bint consume, Outcome* out) except -1
    cdef Share share_of(self, CompiledRule rule, bint everything)
    cdef dict place(self, tuple key)
    cdef bint keep(self, Account account, tuple key, uint32_t tag, int64_t now_us) except -1
    cdef int swap(self, Account account, Py_ssize_t index) except -1
    cdef int drop(self, Account account) except -1
