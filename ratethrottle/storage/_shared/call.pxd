"""What is sent and has a reply of its own: see `call.pyx`."""

from cpython.object cimport PyObject
from libc.stdint cimport int64_t, uint16_t
from libc.string cimport memset

from ratethrottle._core cimport GIVE_BACK, Mode, Parts, PEEK, PendingDecision, RESET
from ratethrottle._engine.arithmetic cimport answer_length, BUCKET, SLIDING, Terms, view_reach
from ratethrottle._engine.definitions cimport CompiledRule
from ratethrottle._engine.table cimport Hash128
from ratethrottle._engine.turns cimport BOOKED_US
from ratethrottle.storage._shared.item cimport ASKS, CallItem, JOINED
from ratethrottle.storage._shared.reply cimport CALL_ITEMS_MAX
from ratethrottle.storage._shared.request cimport Writer


cdef enum:
    CALL_RULES_MAX = 32                      # of which a call makes no more items: each takes as long as three of them
    PLACES = 512                             # of a CallIndex: a power of two, at least twice CALL_ITEMS_MAX
    MOVED = -1                               # instead of numbers: nothing was run, this is another epoch than was expected


cdef struct Answers:                         # where a reading of a call's answers is
    const int64_t* numbers                   # the answer's
    const int64_t* end
    CallItem* item                           # that it answers
    int length                               # of its numbers, but for `ahead`
    int64_t ahead                            # units that were taken in advance
    int number                               # of the answer, from 1
    int index                                # of the next item to look at
    bint leases                              # those of rules with leases come after all others


cdef class Call:
    cdef bytes request                       # its id
    cdef int64_t sent_us
    cdef int64_t deadline_us                 # of the reply; of checks, when the one that waits longest gives up, or NEVER_US

    cdef int write(self, Writer writer) except -1
    cdef Py_ssize_t read(self, bytes data, Py_ssize_t at, int64_t* numbers, int* count) except -3


cdef class CheckCall(Call):
    cdef CallItem* items                     # those of parts stand from CALL_ITEMS_MAX on: they are decided last
    cdef int size                            # how many there are, without parts
    cdef int parts
    cdef int keys
    cdef Mode mode                           # with parts CHECK_JOINT or PEEK_JOINT
    cdef list rules
    cdef int64_t epoch                       # that it is sent in
    cdef int answers                         # how many numbers the answers have in the reply that was read
    cdef int other_answers                   # and those of them that aren't to parts

    cdef int rule_index(self, CompiledRule rule) except -1
    cdef CallItem* add_item(self, PendingDecision pending, int key_index) except NULL
    cdef CallItem* add_part(self, PendingDecision member, int key_index, int bits) except NULL
    cdef bint takes(self, Mode mode) noexcept
    cdef bint has_rules_for(self, tuple rules) except -1
    cdef int fits(self, const int64_t* numbers, int count) noexcept
    cdef int fits_reset(self, const int64_t* numbers, int count) noexcept
    cdef int fits_to_end(self, const int64_t* numbers, int count, const int64_t* at) noexcept
    cdef int write_other(self, Writer writer) except -1
    cdef int write_keys(self, Writer writer) except -1
    cdef int write_keys_of_all(self, Writer writer) except -1
    cdef int write_reset(self, Writer writer) except -1
    cdef int write_rules(self, Writer writer) except -1
    cdef int write_items(self, Writer writer) except -1
    cdef int write_parts(self, Writer writer) except -1

    cdef inline CallItem* item_at(self, int i) noexcept:
        """One of all items, those of parts last, by its number from 0."""
        return &self.items[i if i < self.size else CALL_ITEMS_MAX + i - self.size]

    cdef inline CallItem* part_at(self, int i) noexcept:
        return &self.items[CALL_ITEMS_MAX + i]

    cdef inline int joint_size(self, int first) noexcept:
        """How many parts the joint check has that begins with part `first`."""
        cdef int size = 1
        while first + size < self.parts and self.part_at(first + size).bits & JOINED:
            size += 1
        return size

    cdef inline bint joins(self, const CallItem* item, PendingDecision pending) noexcept:
        """Whether it asks the same as an item of its key."""
        if self.mode == RESET or pending.mode == GIVE_BACK and pending.key is None and item.role == ASKS:
            return True
        if pending.mode == GIVE_BACK or item.role != ASKS:
            return False
        return item.cost == pending.units and item.rule == <PyObject*>pending.rule

    cdef inline int64_t count_of(self, const CallItem* item) noexcept:
        """How many checks the store hears of. A peek charges nothing, so that one stands for all."""
        return 1 if self.mode & PEEK else item.count

    cdef inline bint next_answer(self, Answers* answers) noexcept:
        """Go to the next answer; False after the last, or if there are fewer numbers than it has (`item` isn't NULL then)."""
        cdef CallItem* item
        answers.numbers += answers.length + (answers.leases and answers.item != NULL and answers.numbers[0] >= 0)
        while True:
            if answers.index == self.size:
                if answers.leases:
                    answers.item = NULL
                    return False
                answers.leases = True
                answers.index = 0
                answers.item = NULL
            if answers.index < self.size:
                item = &self.items[answers.index]
                answers.index += 1
                if ((<CompiledRule>item.rule).lease_units > 0) == answers.leases:
                    break
        answers.item = item
        answers.number += 1
        answers.ahead = 0
        if answers.numbers >= answers.end:
            return False
        answers.length = answer_length(&(<CompiledRule>item.rule).terms, answers.numbers[0], self.count_of(item))
        if answers.numbers[0] >= 0:
            if answers.numbers + answers.length + answers.leases > answers.end:
                return False
            if answers.leases:
                answers.ahead = answers.numbers[answers.length]
        return True

    cdef inline bint continues(self, int i) noexcept:
        """Whether an item goes on where the run of the one before it ends."""
        cdef CallItem* item = &self.items[i]
        cdef CallItem* before = item - 1
        return (i > 0 and before.rule == item.rule and before.key_index + 1 == item.key_index and before.cost == item.cost
                and before.count == item.count)


cdef class ControlCall(Call):
    cdef readonly str script
    cdef list key_list                       # the keys that follow the epoch's; empty if they are packed
    cdef readonly list args                  # what follows the id
    cdef bytes packed_keys                   # of an assertion, as they are sent, and how many
    cdef int key_count
    cdef bytes packed_args
    cdef int arg_count
    cdef list last_args                      # of an assertion: which process tells it, and how far it has come
    cdef object assertions                   # the Assertions that it is a part of; None unless it asserts
    cdef int first                           # item to begin with; the store has taken those before it
    cdef readonly object done                # called with the numbers of the reply, unless it is None
    cdef list owed                           # what it charges, of ages at `owed_us`
    cdef int64_t owed_us
    cdef bytes marker

    cdef ControlCall twin(self)


cdef class MarkCall(Call):
    cdef list commands
    cdef int integers                        # that its replies begin with
    cdef bint counts
    cdef bint ranks


cdef class LoadCall(Call):
    cdef bytes text


cdef class CallIndex:
    cdef uint16_t* places

    cdef CallItem* find_joint(self, CheckCall call, Parts parts) noexcept
    cdef CallItem* add_joint(self, CheckCall call, Parts parts, int64_t epoch) except NULL

    cdef inline void clear(self) noexcept:
        memset(self.places, 0, PLACES * sizeof(uint16_t))

    cdef inline uint16_t find(self, CheckCall call, Hash128 hashed) noexcept:
        """The place of the item's number, from 1, or of a 0 where it would be."""
        cdef uint16_t place = <uint16_t>(hashed.lo >> 16) & (PLACES - 1)
        cdef CallItem* item
        while self.places[place]:
            item = &call.items[self.places[place] - 1]
            if item.hashed.lo == hashed.lo and item.hashed.hi == hashed.hi:
                break
            place = (place + 1) & (PLACES - 1)
        return place


cdef inline int64_t reset_reach(const Terms* terms) noexcept:
    """For how long what a key had used before a reset may matter to somebody: a bucket may owe twice its capacity, and what is booked."""
    return 2 * view_reach(terms) + BOOKED_US if terms.kind == BUCKET else view_reach(terms)


cdef inline int64_t lead_us(CompiledRule rule) noexcept:
    """How far ahead of now units of a sliding window are counted from that are taken in advance."""
    return rule.lease_us if rule.terms.kind == SLIDING else 0


cdef tuple rule_words(const Terms* terms, int64_t lead_us, int64_t at_us)


cdef inline bint was_moved(const int64_t* numbers, int count) noexcept:
    """Whether the reply says that nothing was run, as this is another epoch than the call expected."""
    return count == 1 and numbers[0] == MOVED


cdef inline Answers answers_in(const int64_t* numbers, int count) noexcept:
    """Before the first answer of a reply of so many numbers."""
    return Answers(numbers + 1, numbers + count, NULL, 0, 0, 0, 0, False)
