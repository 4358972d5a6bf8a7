# cython: auto_pickle=False, autotestdict=False
"""What is sent and has a reply of its own. A call is a value: it knows how it is written and read, but no loop, clock or table."""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from cpython.object cimport PyObject
from libc.stdint cimport int64_t, uint16_t
from libc.stdlib cimport calloc, free, malloc, realloc
from libc.string cimport memset

from ratethrottle._core cimport CHECK, CHECK_JOINT, GIVE_BACK, Mode, Parts, PEEK, PEEK_JOINT, PendingDecision, RESET
from ratethrottle._engine.arithmetic cimport LEVEL_MAX, Outcome, Terms
from ratethrottle._engine.definitions cimport calendar_in, CompiledRule
from ratethrottle._engine.joint cimport BOOKS, Joint, PARTS_MAX, UNBOOKS
from ratethrottle._engine.turns cimport take_booking
from ratethrottle.storage._shared.item cimport (
    ALTERNATIVE, ASKS, BOOK, BOOKINGS, CallItem, CHARGE, DEFERRED, EVENLY, FLAGGED, JOINED, PART, possible_numbers, REFUND, RETURNS,
    UNASKED, UNBOOK, UNREADABLE, UNSURE,
)
from ratethrottle.storage._shared.joint cimport (
    allowed_of, PartAnswer, possible_parts, read_parts, take_corrections, take_looks, take_payers,
)
from ratethrottle.storage._shared.keynames cimport pending_for
from ratethrottle.storage._shared.queue cimport drain
from ratethrottle.storage._shared.reply cimport (
    MARK_NUMBERS, possible_beat, read_loaded, read_mark, read_numbers, REPLY_NUMBERS_MAX, YEAR_US,
)
from ratethrottle.storage._shared.request cimport EPOCH_BYTES, Writer
from ratethrottle.storage._shared.resp cimport BROKEN, INCOMPLETE, put_bulk, put_head


cdef class Call:
    """A request, and how its reply is read."""

    cdef int write(self, Writer writer) except -1:
        """Write it, under an id of its own."""
        raise NotImplementedError

    cdef Py_ssize_t read(self, bytes data, Py_ssize_t at, int64_t* numbers, int* count) except -3:
        """Read the reply from there; returns where the next one begins, INCOMPLETE or BROKEN. numbers: for REPLY_NUMBERS_MAX."""
        raise NotImplementedError


# ------------------------------------------------------------------------------------------------------------- checks

@cython.final
cdef class CheckCall(Call):
    """Checks, peeks or resets of many keys, decided by one run of a script: in order, equal ones of a key as one item."""

    def __cinit__(self):
        self.items = <CallItem*>malloc(CALL_ITEMS_MAX * sizeof(CallItem))
        if self.items == NULL:
            raise MemoryError
        self.rules = []

    def __dealloc__(self):
        cdef int i
        for i in range(self.size):
            drain(&self.items[i].waiters)
        for i in range(self.parts):
            drain(&self.part_at(i).waiters)
        free(self.items)

    cdef inline int rule_index(self, CompiledRule rule) except -1:
        """The number of a rule in the call, from 1. Most items have the rule of the one before."""
        cdef int i
        if self.size and self.items[self.size - 1].rule == <PyObject*>rule:
            return self.items[self.size - 1].rule_index
        for i in range(len(self.rules) - 1, -1, -1):
            if self.rules[i] is rule:
                return i + 1
        self.rules.append(rule)
        return <int>len(self.rules)

    cdef CallItem* add_item(self, PendingDecision pending, int key_index) except NULL:
        """Add an item for what `pending` asks. There is room for it."""
        cdef CallItem* item = &self.items[self.size]
        memset(item, 0, sizeof(CallItem))
        item.rule_index = self.rule_index(pending.rule)
        item.hashed = pending.hashed
        item.rule = <PyObject*>pending.rule
        item.key_index = key_index
        item.cost = pending.units
        item.role = RETURNS if pending.mode == GIVE_BACK and pending.key is not None else ASKS
        self.keys = max(self.keys, key_index)
        self.size += 1
        return item

    cdef CallItem* add_part(self, PendingDecision member, int key_index, int bits) except NULL:
        """Add an item for a part of a joint check. There is room for it."""
        cdef CallItem* item
        cdef void* larger
        if self.parts == 0:
            larger = realloc(self.items, 2 * CALL_ITEMS_MAX * sizeof(CallItem))
            if larger == NULL:
                raise MemoryError
            self.items = <CallItem*>larger
        item = self.part_at(self.parts)
        memset(item, 0, sizeof(CallItem))
        item.rule_index = self.rule_index(member.rule)
        item.hashed = member.hashed
        item.rule = <PyObject*>member.rule
        item.key_index = key_index
        item.cost = member.units
        item.role = PART
        item.bits = bits
        self.keys = max(self.keys, key_index)
        self.parts += 1
        return item

    cdef bint takes(self, Mode mode) noexcept:
        """Whether it may hold a check of another mode than its own; an empty one becomes a call of that mode."""
        if self.size == 0 and self.parts == 0:
            self.mode = mode
            return True
        return self.mode == CHECK_JOINT + mode

    cdef bint has_rules_for(self, tuple rules) except -1:
        """Whether it may hold items of these rules too."""
        cdef int more = 0
        if len(self.rules) + len(rules) > CALL_RULES_MAX:
            for rule in rules:
                more += rule not in self.rules
        return len(self.rules) == 0 or len(self.rules) + more <= CALL_RULES_MAX

    # How it is written:

    cdef int write(self, Writer writer) except -1:
        """Write it; returns how many items it has."""
        cdef int i, runs = 0, leases = 0
        if self.mode >= RESET:
            return self.write_other(writer)
        for i in range(self.size):
            if (<CompiledRule>self.items[i].rule).lease_units:
                leases += 1
            else:
                runs += not self.continues(i)
        writer.begin_decide(1 + self.keys + 1 + 6 + 8 * len(self.rules) + 5 * runs + 7 * leases)
        self.write_keys(writer)
        put_bulk(&writer.buffer, "peek" if self.mode == PEEK else "check", 4 if self.mode == PEEK else 5)
        put_bulk(&writer.buffer, PyBytes_AS_STRING(writer.epoch_text), EPOCH_BYTES)
        writer.put_int(len(self.rules))
        writer.put_int(runs)
        writer.put_int(leases)
        self.write_rules(writer)
        return self.write_items(writer)

    cdef int write_other(self, Writer writer) except -1:
        """Write resets, or a call with parts."""
        cdef int i, runs = 0, leases = 0
        if self.mode == RESET:
            return self.write_reset(writer)
        for i in range(self.size):
            if (<CompiledRule>self.items[i].rule).lease_units:
                leases += 1
            else:
                runs += not self.continues(i)
        writer.begin_decide(1 + self.keys + 1 + 7 + 8 * len(self.rules) + 5 * runs + 7 * leases + 5 * self.parts)
        self.write_keys_of_all(writer)
        put_bulk(&writer.buffer, "peek_joint" if self.mode == PEEK_JOINT else "check_joint", 10 if self.mode == PEEK_JOINT else 11)
        put_bulk(&writer.buffer, PyBytes_AS_STRING(writer.epoch_text), EPOCH_BYTES)
        writer.put_int(len(self.rules))
        writer.put_int(runs)
        writer.put_int(leases)
        writer.put_int(self.parts)
        self.write_rules(writer)
        self.write_items(writer)
        return self.write_parts(writer)

    cdef int write_keys(self, Writer writer) except -1:
        cdef int i, known = 0
        self.request = writer.next_id()
        writer.put_int(self.keys + 1)
        put_bulk(&writer.buffer, PyBytes_AS_STRING(writer.names.epoch_key), PyBytes_GET_SIZE(writer.names.epoch_key))
        for i in range(self.size):
            if self.items[i].key_index > known:
                known = self.items[i].key_index
                writer.names.put_key(&writer.buffer, <PendingDecision>self.items[i].waiters.first)
        writer.room(1024)
        put_bulk(&writer.buffer, PyBytes_AS_STRING(self.request), PyBytes_GET_SIZE(self.request))
        return 0

    cdef int write_keys_of_all(self, Writer writer) except -1:
        """As `write_keys`, where parts name keys too."""
        cdef PyObject* named[CALL_ITEMS_MAX]      # of each key an addressed check
        cdef CallItem* item
        cdef list members = None
        cdef int i, p = 0
        for i in range(self.size):
            named[self.items[i].key_index - 1] = self.items[i].waiters.first
        for i in range(self.parts):
            item = self.part_at(i)
            if not item.bits & JOINED:
                members = (<Parts>(<PendingDecision>item.waiters.first).text).members
                p = 0
            named[item.key_index - 1] = <PyObject*>members[p]
            p += 1
        self.request = writer.next_id()
        writer.put_int(self.keys + 1)
        put_bulk(&writer.buffer, PyBytes_AS_STRING(writer.names.epoch_key), PyBytes_GET_SIZE(writer.names.epoch_key))
        for i in range(self.keys):
            writer.names.put_key(&writer.buffer, <PendingDecision>named[i])
        writer.room(1024)
        put_bulk(&writer.buffer, PyBytes_AS_STRING(self.request), PyBytes_GET_SIZE(self.request))
        return 0

    cdef int write_reset(self, Writer writer) except -1:
        cdef int i
        writer.begin("reset", 1 + self.keys + 1 + 2 + self.keys)
        self.write_keys(writer)
        put_bulk(&writer.buffer, PyBytes_AS_STRING(writer.epoch_text), EPOCH_BYTES)
        writer.room(32 * self.size)
        for i in range(self.size):           # each of a key of its own
            writer.put_int(reset_reach(&(<CompiledRule>self.items[i].rule).terms) // 1000 + 1)
        return self.size

    cdef int write_rules(self, Writer writer) except -1:
        cdef CompiledRule rule
        for rule in self.rules:
            if rule.packed is None:
                writer.put_packed(packed_rule(rule, self.sent_us + writer.ahead_us[0]))
            else:
                writer.put_packed(rule.packed)
        return 0

    cdef int write_items(self, Writer writer) except -1:
        """Items of rules without leases in runs of keys that follow each other, then the others one by one."""
        cdef CallItem* item
        cdef int i = 0, run
        while i < self.size:
            item = &self.items[i]
            run = 1
            if not (<CompiledRule>item.rule).lease_units:
                while i + run < self.size and self.continues(i + run):
                    run += 1
                writer.room(256)
                writer.put_int(item.key_index)
                writer.put_int(run)
                writer.put_int(item.rule_index)
                writer.put_int(item.cost)
                writer.put_int(self.count_of(item))
            i += run
        for i in range(self.size):
            item = &self.items[i]
            if (<CompiledRule>item.rule).lease_units:
                writer.room(256)
                writer.put_int(item.key_index)
                writer.put_int(item.rule_index)
                writer.put_int(item.cost)
                writer.put_int(self.count_of(item))
                writer.put_int(item.ahead)
                writer.put_int(item.back)
                writer.put_int(item.back_us)
        return self.size

    cdef int write_parts(self, Writer writer) except -1:
        cdef CallItem* item
        cdef int64_t count = 1
        cdef int i
        for i in range(self.parts):
            item = self.part_at(i)
            if not item.bits & JOINED:
                count = self.count_of(item)
            writer.room(256)
            writer.put_int(item.key_index)
            writer.put_int(item.rule_index)
            writer.put_int(item.cost)
            if item.bits & (REFUND | UNBOOK):
                writer.put_int(item.back_us)
            else:
                writer.put_int(item.back_us << 20 | count if item.bits & BOOKINGS else count)
            writer.put_int(item.bits)
        return self.size + self.parts

    # How its reply is read:

    cdef Py_ssize_t read(self, bytes data, Py_ssize_t at, int64_t* numbers, int* count) except -3:
        at = read_numbers(PyBytes_AS_STRING(data), at, PyBytes_GET_SIZE(data), self.request, numbers, count)
        if at >= 0 and not was_moved(numbers, count[0]):
            self.answers = self.fits(numbers, count[0])
            if self.answers < 0:
                return BROKEN
        return at

    cdef int fits(self, const int64_t* numbers, int count) noexcept:
        """How many numbers the answers have; −1 if the script can't have given this reply: none of it is taken in."""
        cdef Answers answers = answers_in(numbers, count)
        # No clock is a year off. What a generation says is asserted, and would outlast the reply that made it up.
        if count < 1 or not max(<int64_t>0, self.epoch - YEAR_US) <= numbers[0] <= LEVEL_MAX:
            return -1
        if self.mode >= RESET:
            if self.mode == RESET:
                return self.fits_reset(numbers, count)
            if count < 1 + 2 * self.parts:
                return -1
            answers.end -= 2 * self.parts    # so much is said of parts at least
        while self.next_answer(&answers):
            if not possible_answer(&answers, self.count_of(answers.item)):
                return -1
        if answers.item != NULL:
            return -1
        if answers.numbers < numbers + count:
            return self.fits_to_end(numbers, count, answers.numbers)
        return count - 1

    cdef int fits_reset(self, const int64_t* numbers, int count) noexcept:
        cdef int i
        for i in range(1, count):
            if not 0 <= numbers[i] <= numbers[0] + YEAR_US:
                return -1
        return self.size if count == 1 + self.size else -1

    cdef int fits_to_end(self, const int64_t* numbers, int count, const int64_t* at) noexcept:
        """As `fits`, from where all but parts are answered."""
        cdef const int64_t* end = numbers + count
        cdef const int64_t* answered
        cdef PartAnswer[PARTS_MAX] found
        cdef int first = 0, size
        self.other_answers = <int>(at - numbers - 1)
        while first < self.parts:
            size = self.joint_size(first)
            at = read_parts(self.part_at(first), size, at, end, found)
            if at == NULL or not possible_parts(self.part_at(first), size, self.mode == CHECK_JOINT, found):
                return -1
            first += size
        answered = at
        while at < end:                      # pairs of an answer's number and a generation
            if end - at < 2 or not (1 <= at[0] <= self.size + self.parts and 0 <= at[1] <= numbers[0] + YEAR_US):
                return -1
            at += 2
        return <int>(answered - numbers - 1)


cdef tuple rule_words(const Terms* terms, int64_t lead_us, int64_t at_us):
    """A rule as scripts take it, with a calendar's boundaries around an instant of the store's time."""
    if terms.calendar != NULL:
        first_us, since_us, until_us, last_us = calendar_in(terms).around(at_us)
        return (b"d", *[b"%d" % number for number in (
            terms.capacity, terms.window_us, first_us, since_us, terms.slot_us, until_us, last_us)])
    return (chr(terms.kind).encode(), *[b"%d" % number for number in (
        terms.capacity, terms.window_us, terms.unit_ticks, terms.drain_ticks, terms.slot_us, terms.coarse_us, lead_us)])


cdef bytes packed_rule(CompiledRule rule, int64_t at_us):
    """The same, in the bytes that each call with the rule has."""
    cdef bytes packed = b"".join([b"$%d\r\n%b\r\n" % (len(word), word) for word in rule_words(&rule.terms, lead_us(rule), at_us)])
    if rule.calendar is None:
        rule.packed = packed
    return packed


cdef bint possible_answer(const Answers* answers, int64_t count) noexcept:
    """Whether the script may say this of so many checks."""
    cdef const int64_t* numbers = answers.numbers
    if numbers[0] < 0:
        return numbers[0] in (UNREADABLE, UNSURE, DEFERRED)
    if numbers[0] > count or answers.leases and not 0 <= answers.ahead <= answers.item.ahead:
        return False
    return possible_numbers(&(<CompiledRule>answers.item.rule).terms, numbers, answers.length)


cdef inline int part_bits(Joint joint, int p) noexcept:
    """What a part of it is to the others."""
    if joint.corrects == BOOKS:
        return EVENLY if joint.booking.evenly else BOOK
    if joint.corrects == UNBOOKS:
        return UNBOOK
    if joint.corrects:
        return (JOINED if p else 0) | (REFUND if joint.refunds >> p & 1 else CHARGE)
    return ((JOINED if p else 0) | (ALTERNATIVE if joint.alternatives >> p & 1 else 0)
            | (FLAGGED if joint.flagged >> p & 1 else 0))


@cython.final
cdef class CallIndex:
    """Finds the newest item of a key in the call that is being filled."""

    def __cinit__(self):
        self.places = <uint16_t*>calloc(PLACES, sizeof(uint16_t))
        if self.places == NULL:
            raise MemoryError

    def __dealloc__(self):
        free(self.places)

    cdef CallItem* find_joint(self, CheckCall call, Parts parts) noexcept:
        """The first item of an equal joint check, if nothing else was asked of its keys since; else NULL."""
        cdef Joint joint = parts.joint
        cdef PendingDecision member
        cdef CallItem* item
        cdef int p, first = self.places[self.find(call, (<PendingDecision>parts.members[0]).hashed)] - 1
        if joint.corrects and joint.corrects != BOOKS:
            return NULL
        if first < CALL_ITEMS_MAX or call.joint_size(first - CALL_ITEMS_MAX) != joint.size:
            return NULL
        if joint.corrects and call.items[first].back_us != joint.booking.ahead_us:
            return NULL
        for p in range(joint.size):
            member = <PendingDecision>parts.members[p]
            item = &call.items[first + p]
            if (self.places[self.find(call, member.hashed)] != first + p + 1 or item.bits != part_bits(joint, p)
                    or item.cost != member.units or item.rule != <PyObject*>member.rule):
                return NULL
        return &call.items[first]

    cdef CallItem* add_joint(self, CheckCall call, Parts parts, int64_t epoch) except NULL:
        """Add an item for each part of a joint check, which is sent in that epoch. There is room for them."""
        cdef Joint joint = parts.joint
        cdef CallItem* item
        cdef PendingDecision member
        cdef uint16_t place
        cdef int p, key_index, first = call.parts
        for p in range(joint.size):
            member = <PendingDecision>parts.members[p]
            place = self.find(call, member.hashed)
            key_index = call.items[self.places[place] - 1].key_index if self.places[place] else call.keys + 1
            item = call.add_part(member, key_index, part_bits(joint, p))
            # What was granted in another life of the store's data may be lost there: units granted at 0 don't count any more.
            if joint.corrects == BOOKS:
                item.back_us = joint.booking.ahead_us
            elif joint.epoch == epoch:
                item.back_us = joint.booking.empty_us if joint.corrects == UNBOOKS else joint.granted_us
            self.places[place] = <uint16_t>(CALL_ITEMS_MAX + call.parts)
        return call.part_at(first)


# ------------------------------------------------------------------------------------------------------ control calls

@cython.final
cdef class ControlCall(Call):
    """A script call that decides nothing: a beat, an assertion, a charge."""

    def __init__(self, str script not None, list keys not None, list args not None, done=None):
        self.script = script
        self.key_list = keys
        self.args = args
        self.done = done
        self.first = 1

    @property
    def keys(self):
        """The keys that follow the epoch's."""
        if self.packed_keys is None:
            return self.key_list
        return unpacked(self.packed_keys)

    cdef ControlCall twin(self):
        """Another one of the same, while the first is still in some connection's hands."""
        cdef ControlCall twin = ControlCall(self.script, self.key_list, self.args)
        twin.packed_keys, twin.key_count = self.packed_keys, self.key_count
        twin.packed_args, twin.arg_count = self.packed_args, self.arg_count
        twin.assertions, twin.first = self.assertions, self.first
        twin.owed, twin.owed_us, twin.marker = self.owed, self.owed_us, self.marker
        return twin

    cdef int write(self, Writer writer) except -1:
        cdef list last = self.last_args if self.last_args is not None else []
        cdef list args
        self.request = writer.next_id()
        if self.script == "beat":
            args = [self.request, writer.run, *self.args]
        else:
            args = [self.request, self.args[0], writer.epoch_text, *self.args[1:]]
        keys = len(self.key_list) + self.key_count + 1
        writer.begin(self.script, 1 + keys + len(args) + self.arg_count + len(last))
        writer.put_int(keys)
        writer.put_word(writer.names.epoch_key)
        writer.put_words(self.key_list)
        writer.put_packed(self.packed_keys)
        writer.put_words(args)
        writer.put_packed(self.packed_args)
        return writer.put_words(last)

    cdef Py_ssize_t read(self, bytes data, Py_ssize_t at, int64_t* numbers, int* count) except -3:
        at = read_numbers(PyBytes_AS_STRING(data), at, PyBytes_GET_SIZE(data), self.request, numbers, count)
        if at >= 0 and self.script == "beat" and not was_moved(numbers, count[0]) and not possible_beat(numbers, count[0]):
            return BROKEN
        return at


cdef list unpacked(bytes packed):
    """The words of which these are the bulk strings."""
    cdef list words = []
    cdef Py_ssize_t at = 0, begin, size
    while at < len(packed):
        begin = packed.index(b"\r\n", at) + 2
        size = int(packed[at + 1:begin - 2])
        words.append(packed[begin:begin + size])
        at = begin + size + 2
    return words


@cython.final
cdef class MarkCall(Call):
    """A beat of a large fleet: commands of the server itself, a tenth of what the script costs that does the same."""

    cdef int write(self, Writer writer) except -1:
        cdef list words
        self.request = writer.epoch_text
        writer.buffer.used = 0
        for words in self.commands:
            writer.room(32)
            put_head(&writer.buffer, c"*", len(words))
            writer.put_words(words)
        return 0

    cdef Py_ssize_t read(self, bytes data, Py_ssize_t at, int64_t* numbers, int* count) except -3:
        count[0] = MARK_NUMBERS
        return read_mark(PyBytes_AS_STRING(data), at, PyBytes_GET_SIZE(data), self.integers, self.request, numbers)


@cython.final
cdef class LoadCall(Call):
    """Loads a script that was sent by value: the server may drop what is only evaluated."""

    cdef int write(self, Writer writer) except -1:
        writer.buffer.used = 0
        writer.room(32)
        put_head(&writer.buffer, c"*", 3)
        return writer.put_words([b"SCRIPT", b"LOAD", self.text])

    cdef Py_ssize_t read(self, bytes data, Py_ssize_t at, int64_t* numbers, int* count) except -3:
        count[0] = 0
        return read_loaded(PyBytes_AS_STRING(data), at, PyBytes_GET_SIZE(data))


# --------------------------------------------------------------------------------------------------------------- tests

cdef dict MODES = {"check": CHECK, "peek": PEEK, "reset": RESET, "check_joint": CHECK_JOINT, "peek_joint": PEEK_JOINT}


def parse(str kind not None, bytes data not None, bytes request not None, *, items=(), int64_t epoch=0):
    """Read the reply to one call, for tests: (its numbers, how many bytes it has), "incomplete" or "broken".

    kind: `beat`, or what a call of checks asks. items: (rule, how many checks, units to take ahead, bits of a part or None) each.
    """
    cdef int64_t[REPLY_NUMBERS_MAX] numbers
    cdef Call call = ControlCall("beat", [], []) if kind == "beat" else CheckCall.__new__(CheckCall)
    cdef CheckCall checks
    cdef CallItem* item
    cdef PendingDecision asked
    cdef Py_ssize_t at
    cdef int count = 0
    call.request = request
    if kind != "beat":
        checks = <CheckCall>call
        checks.mode = <Mode><int>MODES[kind]
        checks.epoch = epoch
        for rule, checked, ahead, bits in items:
            asked = pending_for(rule, "key", c"=", 0, CHECK)
            item = checks.add_item(asked, checks.keys + 1) if bits is None else checks.add_part(asked, checks.keys + 1, bits)
            item.count = checked
            item.ahead = ahead
    at = call.read(data, 0, numbers, &count)
    if at < 0:
        return "incomplete" if at == INCOMPLETE else "broken"
    if kind == "check_joint" and not was_moved(numbers, count):
        hear_joints(<CheckCall>call, numbers, count)
    return [numbers[i] for i in range(count)], at


cdef int hear_joints(CheckCall call, const int64_t* numbers, int count) noexcept:
    """Have some of the joint checks hear what the reply says, as in `settle`."""
    cdef const int64_t* at = numbers + 1 + call.other_answers
    cdef PartAnswer[PARTS_MAX] found
    cdef Outcome[PARTS_MAX] outs
    cdef int[PARTS_MAX] pays
    cdef CallItem* parts
    cdef int64_t allowed
    cdef int first = 0, size, position
    while first < call.parts:
        parts, size = call.part_at(first), call.joint_size(first)
        at = read_parts(parts, size, at, numbers + count, found)
        allowed = allowed_of(parts, size, parts.count, found)
        if parts.bits & BOOKINGS:
            for position in range(<int>min(max(allowed, <int64_t>0), <int64_t>9)):
                take_booking(&(<CompiledRule>parts.rule).terms, found.numbers, parts.cost, parts.bits & EVENLY, position, outs)
            first += size
            continue
        if parts.bits & UNASKED:
            if allowed >= 0:
                take_corrections(parts, size, found, outs, pays)
            first += size
            continue
        for position in range(<int>min(allowed, <int64_t>9)):
            take_payers(parts, size, found, position, outs, pays)
        if 0 <= allowed < parts.count:
            take_looks(parts, size, found, outs)
        first += size
    return 0
