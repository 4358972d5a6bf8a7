# cython: auto_pickle=False, autotestdict=False
"""Checks travel together: what waits for a connection, and how it is written into calls and read from replies.

No I/O: a `Gathering` is told when it may write, hands out bytes, and is given what came. It belongs to one event loop.
"""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.object cimport PyObject
from libc.stdint cimport int64_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcmp, memset

from ratethrottle._core cimport (
    Backend, CHECK, COMPLETE, GIVE_BACK, Group, Mode, PARKED, PEEK, PendingDecision, RESET, SENT, Waiter, WAITING, WHOLE,
)
from ratethrottle._engine.arithmetic cimport (
    answer_length, LEVEL_MAX, NEVER, Outcome, same_definition, take_answer, Terms, view_free, view_fresh_at,
)
from ratethrottle._engine.bound cimport Bound, bound_fresh_at, bound_learn, bound_verdict, DENIED, DRIFT_SHARE, LEASED, OPEN
from ratethrottle._engine.decision cimport count_decision, Decision, decision_new, LEASE, OUTAGE, OVERLOAD, PREFILTER, REDIS
from ratethrottle._engine.definitions cimport ALLOW, CompiledRule, DENY, OF_STORAGE, Policy, policy_of, RAISE
from ratethrottle._engine.keys cimport KeyTable
from ratethrottle._engine.pieces cimport piece_free
from ratethrottle._engine.table cimport Hash128, Shard
from ratethrottle._engine.window cimport KEEP, UNITS_MAX
from ratethrottle._layout cimport Layout, pending_for, pending_of
from ratethrottle._repair cimport Errand, Knowledge, reset_reach, WHOLE_US
from ratethrottle._resp cimport (
    BROKEN, Buffer, buffer_room, INCOMPLETE, put, put_bulk, put_head, put_number, read_line, read_number,
)

from asyncio import _get_running_loop as running_loop
from asyncio import current_task
from collections import deque
from contextvars import Context
from heapq import heapify, heappop, heappush
from os import urandom

from ratethrottle.errors import StateUnreadable, StorageProtocolError, StorageRefused, StorageTimeout, StorageUnavailable


cdef extern from "Python.h":
    void Py_INCREF(PyObject*)
    void Py_DECREF(PyObject*)


cdef enum:
    ENTRIES_MAX = 128                        # of a call: the store is held for well under a millisecond
    RULES_MAX = 32                           # of which a call makes no more entries: each takes as long as three of them
    IN_FLIGHT_MAX = 2
    HALVED_MIN = 32
    PLACES = 512                             # of the map from keys to entries: a power of two, at least twice ENTRIES_MAX
    NUMBERS_MAX = 8                          # of an answer, and the generation of its key
    REPLY_BYTES_MAX = 1 << 16                # of what is kept of a reply that hasn't come whole
    EPOCH_SIZE = 72                          # what an epoch is called: the server's run id, its beginning, that of learning
    ERRAND_NUMBERS_MAX = 16
    BEAT_US = 500_000                        # between two beats of a process that is busy
    IDLE_BEAT_US = 1_000_000                 # and of one that isn't
    EVICTED_US = 5_000_000                   # between two questions whether Redis evicts keys
    FREE_US = 10_000                         # between two shards that are freed, of those that a clear() has emptied
    LOOK_US = 1_000                          # what has run out of time is judged so much later: first what has come is read
    BLOCKED_US = 10_000                      # a timer that is so late tells that the loop was kept from its work
    SPARES_MAX = 2
    SPARED_US = 40_000                       # and then a line that is connected has so long at most to catch up
    OWN_MIN = 8                              # entries of a call that what nobody waits for may take, however many others wait
    STEPS_MAX = 256                          # of tasks in a row, before the loop has its turn
    WATCH_US = 100_000                       # while what an idle one knows still counts: it must hear of a loss within LEARN
    PROCESSES_MAX = 1_000_000
    COUNT_SIZE = 66                          # digits of what is counted: beat.lua has them
    LEARNING_MAX_US = 10_000_000
    RETURNS_MAX = 10_000                     # leases that wait for a connection to be given back on
    GIVE_BACK_US = 1_000_000                 # a bound is kept for so long after its lease, so that the rest of that goes back
    MOVED = -1                               # instead of numbers: it wasn't run, this is another epoch than it expected
    REFUSED_UNREADABLE = 2                   # why an entry of a repair isn't taken
    REFUSED_DEFERRED = 3                     # nor those behind it: it would have held the store for too long
    DEFERRED = -4                            # it would have held the store for too long: it is asked anew
    UNREADABLE = -2                          # instead of an answer: the state can't be read, and stays as it is

cdef int64_t UNSURE = -3                      # instead of an answer: somebody may still tell of more that was used
cdef int64_t YEAR_US = 31_622_400_000_000    # no server's clock is set so far ahead of when an epoch began
cdef int64_t NEVER_US = 0x7FFFFFFFFFFFFFFF

cdef inline int64_t lead(CompiledRule rule) noexcept:
    """How far ahead of now units of a sliding window are counted from that are taken ahead."""
    return rule.lease_us if rule.terms.kind == c"s" else 0


# ------------------------------------------------------------------------------------------------------------- queues

cdef struct Queue:                           # of PendingDecisions, each owned by the one queue that it is in
    PyObject* first
    PyObject* last
    Py_ssize_t count


cdef inline void push(Queue* queue, PendingDecision pending) noexcept:
    Py_INCREF(<PyObject*>pending)
    pending.before = queue.last
    pending.after = NULL
    if queue.last == NULL:
        queue.first = <PyObject*>pending
    else:
        (<PendingDecision>queue.last).after = <PyObject*>pending
    queue.last = <PyObject*>pending
    queue.count += 1


cdef inline void take(Queue* queue, PendingDecision pending) noexcept:
    """Take a member out, wherever it stands. The caller holds a reference of its own."""
    if pending.before == NULL:
        queue.first = pending.after
    else:
        (<PendingDecision>pending.before).after = pending.after
    if pending.after == NULL:
        queue.last = pending.before
    else:
        (<PendingDecision>pending.after).before = pending.before
    pending.before = pending.after = NULL
    queue.count -= 1
    Py_DECREF(<PyObject*>pending)


cdef inline void take_over(Queue* source, Queue* target, PendingDecision pending) noexcept:
    Py_INCREF(<PyObject*>pending)
    take(source, pending)
    push(target, pending)
    Py_DECREF(<PyObject*>pending)


cdef inline void insert(Queue* queue, PyObject* before, PendingDecision pending) noexcept:
    """Put in front of a member, or last for NULL."""
    if before == NULL:
        push(queue, pending)
        return
    Py_INCREF(<PyObject*>pending)
    pending.after = before
    pending.before = (<PendingDecision>before).before
    if pending.before == NULL:
        queue.first = <PyObject*>pending
    else:
        (<PendingDecision>pending.before).after = <PyObject*>pending
    (<PendingDecision>before).before = <PyObject*>pending
    queue.count += 1


cdef inline void merge(Queue* source, Queue* target) noexcept:
    """Move all over, each to where it entered: among its key's in order, and among all by deadline."""
    cdef PendingDecision pending
    cdef PyObject* at = target.first
    while source.first != NULL:
        pending = <PendingDecision>source.first
        take(source, pending)
        while at != NULL and (<PendingDecision>at).turn < pending.turn:
            at = (<PendingDecision>at).after
        insert(target, at, pending)


cdef inline int complete(PendingDecision pending, object error) except -1:
    """The decision is there, or `error` instead: whoever waits is woken, together with the others."""
    cdef Group group = pending.group
    cdef Waiter waiter = pending.waiter
    pending.stage = COMPLETE
    pending.error = error
    if waiter is not None:
        pending.waiter = None
        (<Gathering>pending.place).wake(waiter)
    if group is not None:
        if error is not None and group.error is None:
            group.error = error
        group.left -= 1
        if group.left == 0 and not group.future.done():
            group.future.set_result(None)
    return 0


cdef inline int complete_with(PendingDecision pending, Decision decision) except -1:
    if pending.mode == CHECK:
        count_decision(pending.rule, decision.source_index, decision.out.allowed)
    Py_INCREF(<PyObject*>decision)
    pending.decision = <PyObject*>decision
    return complete(pending, None)


REPAIRING = "Redis has lost its data, or is another server now; it is being told what was used"


cdef object repairing():
    return StorageUnavailable(REPAIRING)


cdef object twin_of(object error):
    """Each caller raises an exception of its own: a shared one would collect all their tracebacks."""
    twin = type(error)(*error.args)
    twin.__cause__ = error.__cause__
    return twin


# -------------------------------------------------------------------------------------------------------------- calls

cdef struct CallEntry:                       # equal checks of one key, decided as one
    Hash128 hashed
    PyObject* rule                           # held by the call
    int rule_index
    int key_index
    int64_t cost
    int64_t count
    int64_t ahead
    int64_t back
    int64_t back_us
    bint returns                             # it only gives back units that no bound holds any more
    Queue waiters


@cython.final
cdef class Call:
    """One script call that is on its way."""

    cdef CallEntry* entries
    cdef int size
    cdef Mode mode
    cdef list rules
    cdef bytes request
    cdef int64_t sent_us
    cdef int64_t epoch                       # that it is sent in
    cdef int64_t deadline_us                 # of the one that waits longest; NEVER_US once nobody waits any more

    def __cinit__(self):
        self.entries = <CallEntry*>malloc(ENTRIES_MAX * sizeof(CallEntry))
        if self.entries == NULL:
            raise MemoryError
        self.rules = []

    def __dealloc__(self):
        cdef int i
        for i in range(self.size):
            while self.entries[i].waiters.first != NULL:
                take(&self.entries[i].waiters, <PendingDecision>self.entries[i].waiters.first)
        free(self.entries)

    cdef int rule_index(self, CompiledRule rule) except -1:
        cdef int i, count = len(self.rules)
        for i in range(count - 1, -1, -1):
            if self.rules[i] is rule:
                return i + 1
        self.rules.append(rule)
        return count + 1


cdef object loop_here():
    loop = running_loop()
    if loop is None:
        raise StorageUnavailable("Redis storage is for asyncio: it needs a running asyncio event loop")
    return loop


@cython.final
cdef class Tally:
    """What the gatherings of one storage have in common, and not with those of another one of this process."""

    cdef readonly int64_t by_policy          # checks that were decided here, without the store
    cdef readonly int64_t overloads          # and those that were too many for it
    cdef int64_t losses                      # of what is known here that were told as events
    cdef public object noticed               # is told what happened, for events


cdef class Calls(Backend):
    """The compiled part of a storage: which gathering a check belongs to. One for all event loops of a process.

    layout: names the keys. deadline_us: how long a check may wait. ttl_us: how long a bound denies before it is asked again.
    on_outage: who decides while Redis is away, where a rule doesn't say. expected: how many processes share the limits (0: unknown)
    until the store has counted them. deny_overload: what is too much for the queue is denied, instead of an error.
    knowledge: that of another storage of this process, which has the same keys; `bounds` are of it then.
    """

    cdef readonly Layout layout
    cdef readonly Knowledge knowledge
    cdef readonly Tally tally
    cdef readonly int64_t deadline_us
    cdef unsigned forks
    cdef bint deny_overload
    cdef object here                         # the event loop that asked last, and its gatherings
    cdef tuple here_gatherings
    cdef unsigned here_forks

    def __init__(self, Layout layout not None, KeyTable bounds not None, int64_t deadline_us, int64_t ttl_us,
                 str on_outage not None="raise", int64_t expected=0, *, bint deny_overload=False, Knowledge knowledge=None):
        self.layout = layout
        self.bounds = bounds
        self.deadline_us = deadline_us
        self.ttl_us = ttl_us
        self.on_outage = policy_of(on_outage)
        self.deny_overload = deny_overload
        self.knowledge = Knowledge(bounds, layout) if knowledge is None else knowledge
        self.knowledge.expect(expected)
        self.tally = Tally()
        self.tally.losses = self.knowledge.losses
        self.forks = bounds.forks

    def _gatherings_here(self):
        """The gatherings of the running loop and this process, as a tuple."""
        raise NotImplementedError

    cdef Gathering gathering(self, Hash128 hashed):
        cdef tuple found = self.here_gatherings
        cdef Gathering picked
        loop = loop_here()
        # Every check looks its key up in the bounds first, and that notices a fork.
        if loop is self.here and self.here_forks == self.bounds.forks:
            picked = <Gathering>found[<Py_ssize_t>(hashed.lo % <uint64_t>len(found))]
            if not picked.ended:             # it ends with its loop's tasks, whoever cancelled them
                return picked
        # Kept in `found`: before this goes on, another thread may have put its own here.
        found = self._gatherings_here()
        self.here_gatherings = found
        self.here = loop
        self.here_forks = self.bounds.forks
        return <Gathering>found[<Py_ssize_t>(hashed.lo % <uint64_t>len(found))]

    def _forked(self):
        """Whether this is the first call in a process that was forked; what belonged to the other one is given up then."""
        self.knowledge.forked()              # once, for all storages that share it
        if self.forks == self.bounds.forks:
            return False
        self.forks = self.bounds.forks
        return True

    def _forget_here(self):
        """Ask for the gatherings anew."""
        self.here = None
        self.here_gatherings = ()

    cdef int ask(self, PendingDecision pending) except -1:
        self.gathering(pending.hashed).enter(pending)
        return 0

    cdef int leave(self, PendingDecision pending) except -1:
        if pending.stage == WAITING or pending.stage == PARKED:
            (<Gathering>pending.place).drop(pending)
        return 0

    def _ask_together(self, entries, str mode not None):
        """Enter checks (or peeks, or resets) one after the other; returns the Group whose future says that all are decided."""
        cdef Group group = Group.__new__(Group)
        cdef PendingDecision pending
        cdef Mode kind = PEEK if mode == "peek" else RESET if mode == "reset" else CHECK
        group.future = loop_here().create_future()
        group.deadline_us = self.bounds.now_us() + self.deadline_us
        group.members = [pending_of(entry, kind) for entry in entries]
        group.left = len(group.members) + 1
        try:
            for pending, entry in zip(group.members, entries):
                pending.backend = self
                pending.group = group
                pending.hashed = self.bounds.hash_entry(entry)
                self.gathering(pending.hashed).enter(pending)
        except BaseException:
            group.leave()
            raise
        group.left -= 1
        if group.left == 0 and not group.future.done():
            group.future.set_result(None)
        return group


def _raised(error):
    """Raise an exception where the loop hears it."""
    raise error


cdef inline int64_t count_of(Call call, const CallEntry* entry) noexcept:
    """How many checks the store is told of. A peek charges nothing, so that one tells all."""
    return entry.count if call.mode == CHECK else 1


cdef int put_words(Buffer* buffer, list words) except -1:
    cdef bytes word
    for word in words:
        if not buffer_room(buffer, PyBytes_GET_SIZE(word) + 32):
            raise MemoryError
        put_bulk(buffer, PyBytes_AS_STRING(word), PyBytes_GET_SIZE(word))
    return 0


cdef int put_packed(Buffer* buffer, bytes packed) except -1:
    if packed is not None:
        if not buffer_room(buffer, PyBytes_GET_SIZE(packed)):
            raise MemoryError
        put(buffer, PyBytes_AS_STRING(packed), PyBytes_GET_SIZE(packed))
    return 0


cdef bint possible_beat(const int64_t* numbers, int count) noexcept:
    """Whether this may be the reply to a beat: now, epoch, when learning began, what is left of it, processes, rank, evictions,
    whether to forget, what it still holds, slot, for how long processes have been counted without a gap.

    Whatever else says so (a proxy, a bug) must not spoil what is known here for as long as this process lives.
    """
    return (count == 11
            and 0 <= numbers[0] <= LEVEL_MAX
            and 1 <= numbers[1] <= numbers[0] + YEAR_US
            and 0 <= numbers[2] <= numbers[0] + YEAR_US
            and 0 <= numbers[3] <= LEARNING_MAX_US
            and 0 <= numbers[4] <= PROCESSES_MAX
            and (0 <= numbers[5] < numbers[4] or numbers[4] == numbers[5] == 0)
            and -1 <= numbers[6] <= LEVEL_MAX
            and 0 <= numbers[7] <= 1
            and 0 <= numbers[8] <= LEVEL_MAX
            and -1 <= numbers[9] < PROCESSES_MAX
            and 0 <= numbers[10] <= LEVEL_MAX)


cdef int64_t digits_at(const char* text, int size) noexcept:
    cdef int64_t value = 0
    cdef int i
    for i in range(size):
        value = value * 10 + (text[i] - c"0")
    return value


cdef Py_ssize_t read_mark(Errand errand, const char* text, Py_ssize_t at, Py_ssize_t size, int64_t* numbers, int* count) noexcept:
    """Read the replies to a mark: whether all is as it was, the rank (-1: not asked for), and the numbers of `:count` but those waited for.

    What isn't as it was, an error included, is for a script to find out.
    """
    cdef bint same = True
    cdef Py_ssize_t end
    cdef int64_t number
    cdef int i, k, place
    count[0] = 6
    memset(numbers, 0, 6 * sizeof(int64_t))
    numbers[1] = -1
    for i in range(errand.integers + 1):
        if at >= size:
            return INCOMPLETE
        if text[at] == c"-":
            end = read_line(text, at, size)
            if end < 0:
                return end
            same = False
            at = end + 2
            continue
        if i < errand.integers:
            at = read_number(text, at, size, c":", &number)
            if at < 0:
                return at
            if i == 1:
                numbers[1] = number
            continue
        at = read_number(text, at, size, c"*", &number)
        if at < 0 or number != 2:
            return at if at < 0 else BROKEN
        for k in range(2):
            at = read_number(text, at, size, c"$", &number)
            if at < 0:
                return at
            if number == -1:
                same = False
                continue
            if not 0 <= number < REPLY_BYTES_MAX:
                return BROKEN
            if at + number + 2 > size:
                return INCOMPLETE
            if text[at + number] != c"\r" or text[at + number + 1] != c"\n":
                return BROKEN
            if k == 0:
                same = same and number >= EPOCH_SIZE and memcmp(text + at, PyBytes_AS_STRING(errand.request), EPOCH_SIZE) == 0
            elif number != COUNT_SIZE:
                same = False
            else:
                for place in range(COUNT_SIZE):
                    same = same and c"0" <= text[at + place] <= c"9"
                numbers[2] = digits_at(text + at, 16)
                numbers[3] = digits_at(text + at + 16, 8)
                numbers[4] = digits_at(text + at + 24, 16)
                numbers[5] = digits_at(text + at + 50, 16)
            at += number + 2
    numbers[0] = same and 1 <= numbers[3] <= PROCESSES_MAX and numbers[1] < numbers[3]
    return at


cdef bint is_mark(object sent) noexcept:
    return isinstance(sent, Errand) and (<Errand>sent).script == "mark"


cdef Py_ssize_t read_numbers(object sent, bytes data, Py_ssize_t at, int64_t* numbers, int* count) except -3:
    """Read the reply to a call, an errand, or SCRIPT LOAD (None): returns where it ends, INCOMPLETE or BROKEN.

    numbers: has room for ENTRIES_MAX * NUMBERS_MAX + 1 of them.
    """
    cdef const char* text = PyBytes_AS_STRING(data)
    cdef Py_ssize_t size = PyBytes_GET_SIZE(data)
    cdef bytes request
    cdef int64_t number
    cdef int i
    count[0] = 0
    if is_mark(sent):
        return read_mark(<Errand>sent, text, at, size, numbers, count)
    if sent is None:
        at = read_number(text, at, size, c"$", &number)
        if at < 0 or number != 40:
            return at if at < 0 else BROKEN
        return at + 42 if at + 42 <= size else INCOMPLETE
    at = read_number(text, at, size, c"*", &number)
    if at < 0:
        return at
    request = (<Errand>sent).request if isinstance(sent, Errand) else (<Call>sent).request
    count[0] = <int>min(max(number - 1, <int64_t>0), <int64_t>(ENTRIES_MAX * NUMBERS_MAX + 1))
    if count[0] != number - 1:
        return BROKEN
    at = read_number(text, at, size, c"$", &number)
    if at < 0:
        return at
    if number != PyBytes_GET_SIZE(request):
        return BROKEN
    if at + number + 2 > size:
        return INCOMPLETE
    if memcmp(text + at, PyBytes_AS_STRING(request), number) or text[at + number] != c"\r" or text[at + number + 1] != c"\n":
        return BROKEN
    at += number + 2
    for i in range(count[0]):
        at = read_number(text, at, size, c":", &numbers[i])
        if at < 0:
            return at
    return at


cdef class Gathering:
    """What waits for one connection of one event loop, and what is on its way there. The base of `Line`, which has the connection.

    The checks that wait when the connection has room for a call leave together, and equal ones of one key as one entry: their
    order matters only among those of the same key.
    """

    cdef Layout layout
    cdef KeyTable bounds
    cdef readonly Knowledge knowledge
    cdef readonly Tally tally
    cdef int64_t deadline_us
    cdef int64_t ttl_us
    cdef Policy on_outage
    cdef bint deny_overload
    cdef readonly object loop
    cdef object call_soon
    cdef object context                      # an empty one: what is called by the loop belongs to no request
    cdef list woken                          # decided, but not stepped yet
    cdef bint receiving
    cdef Queue waiting
    cdef Queue own                           # what nobody waits for: it takes no caller's place, and has no deadline
    cdef Queue parked                        # they ask what is being asked already
    cdef object in_flight                    # Calls and Errands in the order of their replies, and None for that to SCRIPT LOAD
    cdef readonly bint _open                 # there is a connection
    cdef readonly bint ended
    cdef object write
    cdef bint scheduled
    cdef bint turn_due                       # it was scheduled by a check, for the end of this turn of the loop
    cdef uint64_t turn_from                  # and this is the first that entered since
    cdef int64_t turn_deadline_us            # its deadline
    cdef object timer
    cdef int64_t timer_at_us
    cdef int spares                          # how often in a row what has run out of time is looked at once more; it is judged at
    cdef int64_t spared_until_us
    cdef int64_t excused_until_us            # what was held up by a loop that was blocked may still be sent
    cdef int64_t took_us                     # an answer, at least, of late
    cdef Py_ssize_t max_waiting
    cdef bytes rest                          # of a reply that hasn't come whole
    cdef readonly bytes _session
    cdef uint64_t requests
    cdef uint64_t turns                      # how many have entered
    cdef bint by_value                       # the server has lost the scripts: the next call brings its own
    cdef dict scripts                        # name -> (sha, text)
    cdef bytes decide_sha, decide_text, reset_sha, reset_text
    cdef readonly bint ready                 # checks may be sent: the epoch is the one that we know, and was told what it must be
    cdef readonly bint away                  # Redis doesn't answer in time: policies decide
    cdef bint served                         # has it ever been ready
    cdef readonly object reason              # the error that says why, or how it refuses us; None while it serves us
    cdef readonly bint refused               # whatever the policies, until it doesn't any more
    cdef bytes run                           # the server's
    cdef bytes epoch_text                    # what calls expect the epoch to be called
    cdef int64_t epoch                       # that of the last beat on this connection; 0 before it
    cdef bint beating
    cdef bint named                          # how keys are called was said on this connection, and is that in this epoch
    cdef bint telling_soon                   # the loop is about to call `_tell_on`
    cdef bint freeing_soon                   # or `_free_on`
    cdef int64_t beaten_us                   # when the last beat was answered
    cdef int64_t heard_us                    # when anything was
    cdef int64_t evicted                     # keys that this run of the server has evicted; −1 before the first beat
    cdef int64_t evicted_before
    cdef int64_t asked_evicted_us
    cdef int last_size                       # how many entries the call had that was sent last
    cdef int64_t told_evictions
    cdef Buffer buffer
    cdef uint16_t* places
    cdef list leases                         # a heap of (until_us, turn, PendingDecision, at_us): what may have to be given back
    cdef list returns                        # (PendingDecision, units, server_us, epoch): what has to be, and no bound holds any more
    cdef readonly int64_t sent_calls
    cdef readonly int64_t sent_entries

    def __cinit__(self, *_args, **_kwargs):
        self.places = <uint16_t*>calloc(PLACES, sizeof(uint16_t))
        if self.places == NULL:
            raise MemoryError

    def __init__(self, Calls calls not None, loop, Py_ssize_t max_waiting):
        # Not the storage itself: that closes its gatherings when nobody holds it any more.
        self.layout = calls.layout
        self.bounds = calls.bounds
        self.knowledge = calls.knowledge
        self.tally = calls.tally
        self.deadline_us = calls.deadline_us
        self.ttl_us = calls.ttl_us
        self.on_outage = calls.on_outage
        self.deny_overload = calls.deny_overload
        self.loop = loop
        self.call_soon = loop.call_soon
        self.context = Context()
        self.woken = []
        self.max_waiting = max_waiting
        self.in_flight = deque()
        self.leases = []
        self.returns = []
        self.rest = b""
        self._session = urandom(6).hex().encode() + b"-"

    def __dealloc__(self):
        while self.waiting.first != NULL:
            take(&self.waiting, <PendingDecision>self.waiting.first)
        while self.own.first != NULL:
            take(&self.own, <PendingDecision>self.own.first)
        while self.parked.first != NULL:
            take(&self.parked, <PendingDecision>self.parked.first)
        free(self.buffer.bytes)
        free(self.places)

    # What a Line does:

    def _connect(self):
        """There is something to send and no connection. Calls `_opened` or `_go_away`, later."""
        raise NotImplementedError

    def _refused(self, call, bytes text):
        """Give the error to a call that the server answered with the error `text`; may drop the connection."""
        raise NotImplementedError

    def _broken(self, what):
        """Drop the connection, on which `what` came instead of a reply."""
        raise NotImplementedError

    def _late(self):
        """Drop the connection, on which nothing came in time."""
        raise NotImplementedError

    def _retry_us(self):
        """How long until Redis is asked again, while it is away."""
        raise NotImplementedError

    def _answered(self):
        """Redis has answered a beat."""
        raise NotImplementedError

    @property
    def _waiting_count(self): return self.waiting.count + self.parked.count

    @property
    def _in_flight_count(self): return len(self.in_flight)

    @property
    def _has_leases(self): return bool(self.leases)

    @property
    def _lease_count(self):
        """How many keys × rules have units ahead that may be spent now."""
        cdef PendingDecision sample
        cdef Shard* shard
        cdef uint32_t index
        cdef Bound* bound
        cdef int64_t until_us, at_us, now_us = self.bounds.now_us()
        cdef set found = set()
        for until_us, _, sample, at_us in self.leases:
            bound = self.bound_of(sample.hashed, &shard, &index)
            # Of a lease that was renewed, spent or given back, the item stays until it would have ended.
            if until_us > now_us and bound != NULL and bound.lease_units and bound.lease_at_us == at_us:
                found.add((sample.hashed.lo, sample.hashed.hi))
        return len(found)

    # Entering and leaving:

    cdef inline Bound* bound_of(self, Hash128 hashed, Shard** shard, uint32_t* index) noexcept:
        return self.bounds.bound_of(hashed, shard, index)

    cdef bint decided_here(self, PendingDecision pending, int64_t now_us, bint* asked) except -1:
        """Whether the bound or a lease has decided; `asked` tells that another check is asking just that."""
        cdef Shard* shard
        cdef uint32_t index
        cdef Outcome out
        cdef const Terms* terms = self.bounds.terms_of(pending.rule)
        cdef Bound* bound = self.bound_of(pending.hashed, &shard, &index)
        cdef int verdict
        asked[0] = False
        if bound == NULL or pending.mode != CHECK:
            return False
        verdict = bound_verdict(bound, terms, pending.rule.lease_units > 0, now_us, pending.units, self.ttl_us, &out)
        if verdict == DENIED and self.away and self.policy_for(pending.rule) == ALLOW:
            return False
        if verdict == DENIED or verdict == LEASED:
            complete_with(pending, decision_new(pending.rule, pending.key, pending.units,
                                                LEASE if verdict == LEASED else PREFILTER, &out))
            return True
        asked[0] = verdict != OPEN and bound.asked_by == <void*>self and now_us - bound.asked_us < self.deadline_us
        return False

    cdef int enter(self, PendingDecision pending) except -1:
        """Queue a check whose answer has to be waited for, unless it can be given here and now after all."""
        cdef int64_t now_us = self.bounds.now_us()
        cdef bint asked = False
        cdef Waiter waiter
        if (pending.stale or pending.group is not None) and self.decided_here(pending, now_us, &asked):
            return 0
        self.layout.address(pending)
        pending.place = self
        if not self.ready and (self.refused or self.by_policies(now_us)):
            self.fall_back(pending, self.reason or repairing(), now_us)
            self.schedule_connection()
            return 0
        if self.waiting.count + self.parked.count >= self.max_waiting:
            self.overload(pending, f"{self.max_waiting} checks are waiting for Redis already")
            if pending.error is not None and pending.group is not None:
                raise pending.error          # nothing of the group that hasn't been sent is sent any more
            return 0
        if self.spares and self.waiting.count == 0 and not self.in_flight:
            self.spares = 0                  # that was for others
        # All of a group within one deadline, however long it takes to enter them.
        pending.deadline_us = now_us + self.deadline_us if pending.group is None else pending.group.deadline_us
        pending.turn = self.turns
        self.turns += 1
        if pending.group is None:
            waiter = Waiter.__new__(Waiter)
            waiter.pending = pending
            waiter.loop = self.loop
            waiter.blocking = True
            pending.waiter = waiter
        pending.stage = PARKED if asked else WAITING
        push(&self.parked if asked else &self.waiting, pending)
        self.wind(now_us, self.tick_us(now_us))
        self.schedule()
        return 0

    cdef int queue(self, PendingDecision pending) except -1:
        """Queue what nobody waits for."""
        pending.stage = WAITING
        pending.place = self
        pending.deadline_us = NEVER_US
        pending.turn = self.turns
        self.turns += 1
        push(&self.own, pending)
        return 0

    cdef inline Queue* queue_of(self, PendingDecision pending) noexcept:
        """Where it is queued."""
        if pending.stage == PARKED:
            return &self.parked
        return &self.own if pending.deadline_us == NEVER_US else &self.waiting

    cdef inline int wake(self, Waiter waiter) except -1:
        waiter.is_done = True
        waiter.pending = None
        self.woken.append(waiter)
        if len(self.woken) == 1 and not self.receiving:
            self.call_soon(self._step, context=self.context)
        return 0

    def _step(self):
        """Step the tasks of all checks that were decided, in order, and send what they ask next."""
        cdef list woken = self.woken
        cdef Py_ssize_t i = 0, count = min(len(woken), <Py_ssize_t>STEPS_MAX), middle = count // 2 if count >= HALVED_MIN else 0
        self.woken = woken[count:]
        self.scheduled = True                # what they ask is sent below, so none of them need see to that
        try:
            while i < count:
                i += 1
                (<Waiter>woken[i - 1]).call()
                # When all replies came at once, the store would wait for the last of these tasks; not for a few hot keys, of which
                # two calls would hold what fits one.
                if i == middle and not self.in_flight and self.last_size >= HALVED_MIN // 2:
                    self._flush(whole=True)
                    self.scheduled = True
        finally:
            if i < count:                    # KeyboardInterrupt or SystemExit, which a task lets through, or no memory
                self.woken[:0] = woken[i:count]
            if i < len(woken):
                self.call_soon(self._step, context=self.context)
            self._flush()
            self.schedule()                  # where there is no connection, or there was none left to send on

    # While Redis is away, or has lost something and is still being told what:

    cdef inline bint by_policies(self, int64_t now_us) noexcept:
        return self.away or now_us < self.knowledge.learning_until_us

    cdef inline Policy policy_for(self, CompiledRule rule) noexcept:
        return rule.policy if rule.policy != OF_STORAGE else self.on_outage

    cdef int fall_back(self, PendingDecision pending, error, int64_t now_us) except -1:
        """Decide by the outage policy what Redis has not; an error for what is no check, and where the policy is to raise."""
        cdef Policy policy = self.policy_for(pending.rule)
        cdef Outcome out
        cdef int64_t retry_us
        if pending.mode == PEEK and pending.group is None:
            return complete(pending, error)  # our own look at what was charged
        if pending.mode == GIVE_BACK and pending.stage == WAITING and not self.ended:
            self.return_later(pending, now_us)
        if policy == RAISE or (pending.mode != CHECK and pending.mode != PEEK) or self.ended or isinstance(error, StorageRefused):
            return complete(pending, twin_of(error))
        retry_us = max(self._retry_us(), self.knowledge.learning_until_us - now_us, 1)
        if policy == DENY:
            out = Outcome(False, False, 0, retry_us, retry_us)
        else:
            self.knowledge.shares.decide(pending, now_us, now_us + self.knowledge.ahead_us, retry_us, policy == ALLOW, &out)
        self.tally.by_policy += 1
        return complete_with(pending, decision_new(pending.rule, pending.key, pending.units, OUTAGE, &out))

    cdef int overload(self, PendingDecision pending, words) except -1:
        """Decide what this process asks faster than it is answered: that is its own load, and no outage of Redis."""
        cdef Outcome out
        self.tally.overloads += 1
        if not self.deny_overload or (pending.mode != CHECK and pending.mode != PEEK):
            return complete(pending, StorageUnavailable(
                f"{words}; that is this process's load, not an outage: raise `connections`, use leases for busy keys, set a longer "
                "`deadline`, or check fewer at once"
            ))
        out = Outcome(False, False, 0, self.deadline_us, self.deadline_us)
        return complete_with(pending, decision_new(pending.rule, pending.key, pending.units, OVERLOAD, &out))

    cdef int run_out(self, PendingDecision pending, int64_t now_us) except -1:
        """Decide what wasn't sent in time: the line was too busy, if there is one."""
        if self._open and self.ready:
            return self.overload(pending, f"the check was not sent within {self.deadline_us / 1e6} s, nor counted")
        return self.fall_back(pending, self._unsent(), now_us)

    def _go_away(self, error):
        """Redis doesn't answer, or not in time: from now on policies decide, until it does."""
        changed = self.reason is None or str(self.reason) != str(error)
        self.reason = error
        self.refused = isinstance(error, StorageRefused)
        if self.refused:
            self._notice("refused", error)
        elif not self.away:
            self.away = True
            self.bounds.away += 1
            self.knowledge.shares.begin()
            self._notice("outage", error)
        elif changed:
            self._notice("reason", error)
        self._answer_waiting(error)
        self.bounds.tidy(self.bounds.now_us())
        self.schedule_connection()

    cdef void come_back(self) noexcept:
        if self.away:
            self.away = False
            self.bounds.away = max(0, self.bounds.away - 1)  # a fork may have begun to count anew

    def _answer_waiting(self, error):
        """Decide by policy, or give an error to, everything that hasn't been sent."""
        cdef PendingDecision pending
        cdef Queue* queue
        cdef int which
        cdef int64_t now_us = self.bounds.now_us()
        self.scheduled = False
        for which in range(3):
            queue = &self.waiting if which == 0 else &self.parked if which == 1 else &self.own
            while queue.first != NULL:
                pending = <PendingDecision>queue.first
                take(queue, pending)
                self.fall_back(pending, error, now_us)

    def _notice(self, what, fact):
        """Tell of something that happened."""
        if self.tally.noticed is not None:
            self.tally.noticed(what, self, fact)

    cdef inline int schedule_connection(self) except -1:
        if not self._open and not self.ended:
            self._connect()
        return 0

    # Beats, and what the store is told before it is asked again:

    cdef int run_errand(self, Errand errand) except -1:
        """Send an errand."""
        cdef Buffer* buffer = &self.buffer
        cdef bytes text
        cdef list words, rest, last
        cdef int64_t now_us = self.bounds.now_us()
        errand.request = self._session + b"%d" % self.requests
        self.requests += 1
        errand.deadline_us = now_us + self.deadline_us
        name, text = self.scripts[errand.script]
        # By value, where the server may have lost the scripts: what is run is cached by it too.
        words = [b"EVAL", text] if self.by_value else [b"EVALSHA", name]
        self.by_value = False
        words += [b"%d" % (len(errand.key_list) + errand.key_count + 1), self.layout.epoch_key, *errand.key_list]
        if errand.script == "beat":
            rest = [errand.request, self.run, b"%d" % self.knowledge.epoch, *errand.args]
        else:
            rest = [errand.request, errand.args[0], self.epoch_text, *errand.args[1:]]
        last = [self.knowledge.process_id, b"%d" % errand.telling.level(), b"%d" % errand.first] if errand.telling is not None else []
        buffer.used = 0
        if not buffer_room(buffer, 32):
            raise MemoryError
        put_head(buffer, c"*", len(words) + errand.key_count + len(rest) + errand.arg_count + len(last))
        put_words(buffer, words)
        put_packed(buffer, errand.packed_keys)
        put_words(buffer, rest)
        put_packed(buffer, errand.packed_args)
        put_words(buffer, last)
        self.write(PyBytes_FromStringAndSize(buffer.bytes, buffer.used))
        self.in_flight.append(errand)
        self.wind(now_us, self.tick_us(now_us))
        return 0

    cdef int beat(self, bint whole=False) except -1:
        """Say that this process is there, and hear which epoch this is. whole: by the script."""
        cdef int64_t now_us = self.bounds.now_us()
        cdef Knowledge knowledge = self.knowledge
        if not self.beating:
            self.beating = True
            # A process is counted once, however many connections it has; a new connection may be to another store.
            counts = self.epoch == 0 or now_us - knowledge.counted_us >= knowledge.pace_us(BEAT_US) - 1000
            asks = now_us - self.asked_evicted_us >= max(<int64_t>EVICTED_US, 1000 * knowledge.pace_us(0))
            knowledge.counted_us = now_us if counts else knowledge.counted_us
            if not (whole or asks) and self.named and self.ready and knowledge.may_mark(now_us):
                self.mark(counts, now_us)
                return 0
            self.asked_evicted_us = now_us if asks else self.asked_evicted_us
            self.run_errand(knowledge.beat(b"count" if counts else b"look", asks, not self.named, self._beaten))
            self.named = True
        return 0

    cdef int mark(self, bint counts, int64_t now_us) except -1:
        """Set the bit of this process, and look whether the epoch is the same, and how many are counted.

        In a large fleet these are commands of Redis itself, a tenth of what the script costs, which does the same.
        """
        cdef Errand errand = Errand("mark", [], [])
        cdef Knowledge knowledge = self.knowledge
        cdef bytes place = self.layout.processes_key, data = b"", word
        errand.request = self.epoch_text
        errand.sent_us = now_us
        errand.deadline_us = now_us + self.deadline_us
        errand.counts = counts
        errand.ranks = counts and knowledge.rank_of != knowledge.changed
        commands = []
        if counts:
            commands.append((b"SETBIT", place + b":marks", b"%d" % knowledge.slot, b"1"))
        if errand.ranks and knowledge.slot:
            commands.append((b"BITCOUNT", place + b":alive", b"0", b"%d" % (knowledge.slot - 1), b"BIT"))
        errand.integers = len(commands)
        commands.append((b"MGET", self.layout.epoch_key, place + b":count"))
        for words in commands:
            data += b"*%d\r\n" % len(words)
            for word in words:
                data += b"$%d\r\n%b\r\n" % (len(word), word)
        self.write(data)
        self.in_flight.append(errand)
        self.wind(now_us, errand.deadline_us)
        return 0

    cdef int marked(self, Errand errand, const int64_t* numbers) except -1:
        """Take up the reply to a mark."""
        cdef Knowledge knowledge = self.knowledge
        cdef int64_t now_us = self.bounds.now_us(), rank
        self.beating = False
        if not numbers[0] or knowledge.slot < 0:
            knowledge.counted_us = 0
            return self.beat(True)
        self.beaten_us = now_us
        self._answered()
        if errand.counts:
            knowledge.marked_us = errand.sent_us
            knowledge.marks += 1
            knowledge.changed = numbers[4]
            if errand.ranks:
                knowledge.rank = numbers[1] if errand.integers == 2 else 0
                knowledge.rank_of = numbers[4]
            rank = knowledge.rank if knowledge.rank_of == numbers[4] else -1
            knowledge.take_count(numbers[3], rank, numbers[2] - numbers[5] >= WHOLE_US, now_us)
        if numbers[2] != knowledge.swept:
            knowledge.swept = numbers[2]
            knowledge.swept_seen_us = errand.sent_us
        elif errand.sent_us - knowledge.swept_seen_us >= knowledge.period_us():
            # A period is over, and nobody has said so yet.
            knowledge.counted_us = 0
            return self.beat(True)
        self.tell()
        self.wind_beat(now_us)
        return 0

    def _leave(self):
        """Say that this process goes, so that the shares of the others needn't wait for that."""
        # Another limiter of this process may go on.
        if self._open and self.epoch and not self.knowledge.users:
            self.run_errand(self.knowledge.beat(b"leave", False, False, None))

    def _beaten(self, numbers):
        """Take up the reply to a beat."""
        cdef int64_t epoch = numbers[1], learning_from_us = numbers[2], now_us = self.bounds.now_us()
        self.beating = False
        self.beaten_us = now_us
        self.named = self.named and self.epoch in (0, epoch)
        self.epoch = epoch
        self.epoch_text = b"%b%016d%016d" % (self.run, epoch, learning_from_us)
        self.refused = False
        self._answered()
        if self.knowledge.meet(epoch, numbers[3], numbers[4], numbers[5], numbers[10], numbers[7], numbers[8], now_us):
            self.knowledge.losses += 1
        if self.tally.losses != self.knowledge.losses:
            self.tally.losses = self.knowledge.losses
            self._notice("state_lost", len(self.bounds))
        if self.bounds.evictions != self.told_evictions:
            self.told_evictions = self.bounds.evictions
            self._notice("bounds_evicted", self.bounds.evictions)
        if self.evicted < 0:
            self.evicted_before = self.evicted = numbers[6]
        elif numbers[6] > self.evicted:
            self.evicted = numbers[6]
            self._notice("evicted", self.evicted - self.evicted_before)
        if numbers[len(numbers) - 2] >= 0:
            self.knowledge.slot = numbers[len(numbers) - 2]
            self.knowledge.marked_us = self.knowledge.counted_us
            self.knowledge.marks = 0
            self.knowledge.rank_of = -1      # of which set it was, a mark finds out
        self.bounds.tidy(now_us)
        self.free_emptied()
        self.tell()
        self.wind_beat(now_us)

    cdef int tell(self) except -1:
        """Tell the store what it has to be told; once that is done, and others had their time too, it is asked again."""
        cdef Errand errand
        cdef Knowledge knowledge = self.knowledge
        cdef int64_t now_us = self.bounds.now_us()
        cdef int telling = 0
        cdef bint others = False
        if not self._open or self.epoch == 0:
            return 0
        if self.epoch != knowledge.epoch:    # another line has met a later one meanwhile
            self.ready = False
            return self.beat()
        knowledge.take_over(now_us)
        for sent in self.in_flight:
            telling += isinstance(sent, Errand) and (<Errand>sent).telling is not None
        while len(self.in_flight) < IN_FLIGHT_MAX:
            # Beside checks one at a time, or these would have to wait for each other's answer.
            errand = knowledge.next_errand(now_us, self.rows_max(), telling == 0 or not self.ready)
            if errand is None:
                break
            telling += errand.telling is not None
            self.run_errand(errand)
        if telling == 0 and knowledge.telling is not None and knowledge.telling.waits() and not self.telling_soon:
            self.telling_soon = True
            self.call_soon(self._tell_on, context=self.context)
        # What was charged on this very connection comes before the checks that follow it. What is known is told while they are sent: the
        # store decides no key of which it may have to hear more.
        for errand in knowledge.out:
            others = others or (errand.telling is None and errand not in self.in_flight)
        # And what has no room yet would come after checks that count on it.
        self.ready = knowledge.idle() and not others and not (self.bounds.owing and len(self.in_flight) >= IN_FLIGHT_MAX)
        if now_us < knowledge.learning_until_us:
            self.ready = False
            self._answer_waiting(repairing())
            self.wind(now_us, knowledge.learning_until_us)
        if self.ready:
            # Now that there is a connection, what it is for takes little time.
            self.spared_until_us = min(self.spared_until_us, now_us + SPARED_US)
            self.excused_until_us = min(self.excused_until_us, now_us + SPARED_US)
            self.reason = None
            if self.away or not self.served:  # an outage may have outlived the loop that met it
                self.come_back()
                self.served = True
                self._notice("recovery", None)
            self.queue_returns(now_us)
            self.schedule()
        return 0

    def _tell_on(self):
        """Go on with what takes longer than the loop should stand still."""
        self.telling_soon = False
        self.tell()

    cdef int free_emptied(self) except -1:
        """Free what a `clear()` has emptied a shard at a time, while the loop goes on."""
        if self.bounds.emptied_count and not self.freeing_soon:
            self.freeing_soon = True
            self.loop.call_later(FREE_US / 1e6, self._free_on, context=self.context)
        return 0

    def _free_on(self):
        """Free the next shard."""
        self.freeing_soon = False
        if not self.ended:
            self.bounds.free_emptied()
            self.free_emptied()

    cdef int rows_max(self) noexcept:
        """How many keys an assertion has, so that those of all processes together take the store no longer than a check can wait."""
        return <int>max(<int64_t>4, min(<int64_t>ENTRIES_MAX, self.deadline_us // (40 * max(<int64_t>1, self.knowledge.processes))))

    cdef int look_at_charged(self) except -1:
        """Ask what the store says of some keys that were charged, so that this too is known if it loses them."""
        cdef PendingDecision pending
        cdef CompiledRule rule
        cdef int _row
        for _row in range(min(<Py_ssize_t>ENTRIES_MAX, len(self.knowledge.charged))):
            rule, name, hashed = self.knowledge.charged.popleft()
            pending = pending_for(rule, name, WHOLE, 0, PEEK)
            pending.hashed = Hash128(hashed[0], hashed[1])
            self.queue(pending)
        return 0

    cdef int64_t quiet_us(self, int64_t now_us) noexcept:
        """For how long nothing need be said: not for long where a loss must be noticed, or that learning is over."""
        if now_us < max(self.knowledge.live_until_us, self.knowledge.learning_until_us):
            return self.knowledge.pace_us(WATCH_US)
        return self.knowledge.pace_us(BEAT_US if self.knowledge.shares.n == 0 else IDLE_BEAT_US)

    cdef int wind_beat(self, int64_t now_us) except -1:
        return self.wind(now_us, now_us + self.quiet_us(now_us))

    cdef int beat_if_due(self, int64_t now_us) except -1:
        """Nothing else has been said for a while: see that the store is still there, and still the same."""
        if not self._open or self.epoch == 0 or self.beating:
            return 0
        if now_us - max(self.heard_us, self.beaten_us) >= self.quiet_us(now_us) - 1000:
            self.beat()
        self.wind_beat(now_us)
        return 0

    cdef int drop(self, PendingDecision pending) except -1:
        take(self.queue_of(pending), pending)
        pending.stage = COMPLETE
        return 0

    cdef inline int schedule(self) except -1:
        """See that what waits is sent in this very tick of the loop: a lone check at once, and all that come with it together."""
        if self.scheduled or (self.waiting.count == 0 and self.own.count == 0 and not self.knowledge.charged):
            return 0
        if not self._open:
            if self.waiting.count or self.own.count:
                self.scheduled = True
                self._connect()
        elif self.ready and len(self.in_flight) < IN_FLIGHT_MAX:
            self.scheduled = True
            if self.waiting.count:
                self.turn_due = True
                self.turn_from = (<PendingDecision>self.waiting.last).turn
                self.turn_deadline_us = (<PendingDecision>self.waiting.last).deadline_us
            self.call_soon(self._flush, context=self.context)
        return 0

    def _flush(self, bint whole=False):
        """Send what waits, as far as there is room. whole: not in two halves, as more is to come."""
        cdef Call call
        self.scheduled = False
        if self.turn_due:
            self.count_from_now()
        if self.bounds.owing or self.knowledge.errands:  # the latter of another line that has broken
            self.tell()
        while self.ready and len(self.in_flight) < IN_FLIGHT_MAX:
            if self.waiting.count == 0 and self.own.count == 0:
                # The other place in flight stays free for who comes meanwhile.
                if self.in_flight or not self.knowledge.charged:
                    break
                self.look_at_charged()
            # Two calls of half the size keep both sides busy: one is decided while the other's checks are woken and asked anew.
            halved = (not whole and not self.in_flight and self.waiting.count >= HALVED_MIN
                      and (<PendingDecision>self.waiting.first).group is None)
            call = Call.__new__(Call)
            try:
                self.gather(call, min(<Py_ssize_t>ENTRIES_MAX, (self.waiting.count + 1) // 2) if halved else ENTRIES_MAX)
                if call.size:
                    self.last_size = call.size
                    self.send(call)
                    if call.sent_us - self.beaten_us >= self.knowledge.pace_us(BEAT_US):
                        self.beat()
            except BaseException:
                self._fail(call, StorageUnavailable("the check could not be sent"))
                raise

    cdef int count_from_now(self) except -1:
        """Count the deadlines of those who entered in a long turn of the loop from its end: nothing could be sent before.

        Else most of a crowd that takes as long to enter would have run out of time while Redis was idle.
        """
        cdef int64_t deadline_us = self.bounds.now_us() + self.deadline_us
        cdef PyObject* entered = self.waiting.last
        self.turn_due = False
        if deadline_us - self.turn_deadline_us <= BLOCKED_US:
            return 0
        while entered != NULL and (<PendingDecision>entered).turn >= self.turn_from:
            (<PendingDecision>entered).deadline_us = deadline_us
            entered = (<PendingDecision>entered).before
        return 0

    # Deadlines: one timer for all, since all wait equally long and so run out in the order in which they came.

    cdef inline int wind(self, int64_t now_us, int64_t at_us) except -1:
        if self.timer is not None:
            if at_us >= self.timer_at_us:
                return 0
            self.timer.cancel()
        self.timer_at_us = max(at_us, now_us)
        self.timer = self.loop.call_later(max(at_us - now_us, <int64_t>0) / 1e6, self._ring, context=self.context)
        return 0

    cdef inline int64_t tick_us(self, int64_t now_us) noexcept:
        """When to look after those who wait: several times before their deadline, which tells whether the loop works meanwhile."""
        return now_us + self.deadline_us // 8

    def _ring(self):
        """Judge what has waited too long, and see to what comes by time."""
        cdef int64_t now_us = self.bounds.now_us()
        self.timer = None
        try:
            if not self.spared(now_us):
                if self.expire_calls(now_us):
                    self._late()
                self.expire(&self.waiting, now_us)
                self.expire(&self.parked, now_us)
            self.give_back(now_us)
            if not self.ready or self.bounds.owing or self.knowledge.telling is not None:
                self.tell()
            self.beat_if_due(now_us)
        finally:                             # whatever it was, nobody may be left waiting
            self.wind_again(now_us)

    cdef bint spared(self, int64_t now_us) except -1:
        """Whether to look once more, later, before anything is judged: an answer may have come that hasn't been read yet.

        Where the loop was kept from its work, what it could not send, or the connection that it could not make, has some time too.
        """
        cdef int64_t late_us = now_us - self.timer_at_us, first_us = self.first_deadline_us()
        if first_us == NEVER_US:
            self.spares = 0
            return True                      # there is nothing to judge
        # Twice for long blocks, but not for ever: a loop that is always late must not keep anybody waiting.
        if self.spares and (now_us < self.spared_until_us or self.spares == SPARES_MAX or late_us <= self.deadline_us // 4):
            self.spares = self.spares if now_us < self.spared_until_us else 0
            return self.spares > 0
        if late_us > BLOCKED_US:
            self.excuse(now_us)
            late_us = self.excused_until_us - now_us
        elif first_us <= now_us:
            late_us = LOOK_US
        else:
            return True
        self.spares += 1
        self.spared_until_us = now_us + late_us
        return True

    cdef inline int excuse(self, int64_t now_us) noexcept:
        """Give what waits more time where the timer is late: the loop was kept from its work."""
        cdef int64_t late_us = now_us - self.timer_at_us
        if late_us > BLOCKED_US:
            self.excused_until_us = now_us + min(late_us, <int64_t>SPARED_US if self.ready else self.deadline_us)
        return 0

    cdef int64_t first_deadline_us(self) except -1:
        """When the next one of all that waits has waited too long."""
        cdef int64_t first_us = NEVER_US
        for sent in self.in_flight:
            if isinstance(sent, Errand):
                first_us = min(first_us, (<Errand>sent).deadline_us)
            elif sent is not None:
                first_us = min(first_us, min((<Call>sent).deadline_us, (<Call>sent).sent_us + self.deadline_us))
        if self.waiting.first != NULL:
            first_us = min(first_us, (<PendingDecision>self.waiting.first).deadline_us)
        if self.parked.first != NULL:
            first_us = min(first_us, (<PendingDecision>self.parked.first).deadline_us)
        return first_us

    cdef int wind_again(self, int64_t now_us) except -1:
        """Ring when the next one of all that waits has waited too long, or the next lease ends."""
        cdef int64_t next_us = self.first_deadline_us()
        if next_us < NEVER_US:
            next_us = min(max(next_us, self.spared_until_us) if self.spares else next_us, self.tick_us(now_us))
        if self.leases:
            next_us = min(next_us, self.leases[0][0])
        if next_us < NEVER_US:
            self.wind(now_us, next_us)
        return 0

    cdef int expire(self, Queue* queue, int64_t now_us) except -1:
        cdef PendingDecision pending
        while queue.first != NULL and (<PendingDecision>queue.first).deadline_us <= now_us:
            pending = <PendingDecision>queue.first
            take(queue, pending)
            self.run_out(pending, now_us)
        return 0

    def _unsent(self):
        """The error of a check that ran out of time before there was a connection that it could be sent on."""
        raise NotImplementedError

    cdef bint expire_calls(self, int64_t now_us) except -1:
        """Answer those who have waited too long for a reply; True when one is late, counted from when it was asked for."""
        cdef bint late = False
        for sent in list(self.in_flight):
            if isinstance(sent, Errand):
                late = late or (<Errand>sent).deadline_us <= now_us
            elif sent is not None:
                late = late or (<Call>sent).sent_us + self.deadline_us <= now_us
                if (<Call>sent).deadline_us <= now_us:
                    self.expire_call(<Call>sent, now_us, late)
        return late

    cdef int expire_call(self, Call call, int64_t now_us, bint late) except -1:
        cdef int i
        cdef PyObject* waiter
        cdef PendingDecision pending
        cdef bint answered = self.heard_us > call.sent_us and 2 * (now_us - self.heard_us) < self.deadline_us
        call.deadline_us = NEVER_US
        for i in range(call.size):
            waiter = call.entries[i].waiters.first
            while waiter != NULL:
                pending = <PendingDecision>waiter
                waiter = pending.after
                if pending.stage == COMPLETE:
                    continue
                if pending.deadline_us > now_us:
                    call.deadline_us = min(call.deadline_us, pending.deadline_us)
                # Redis is slow only where it was what held this up: nothing else was answered meanwhile, nor did it wait here for longer.
                elif not late and (answered or 2 * (pending.deadline_us - call.sent_us) < self.deadline_us):
                    self.overload(pending, f"the check was not answered within {self.deadline_us / 1e6} s; it may have been counted")
                else:
                    self.fall_back(pending, StorageTimeout(self.deadline_us / 1e6), now_us)
        return 0

    # Building a call:

    cdef int gather(self, Call call, int most) except -1:
        """Take what waits into a call, equal checks of a key as one of at most `most` entries; none if all of it has gone."""
        cdef int64_t now_us = self.bounds.now_us()
        cdef int keys = 0
        memset(self.places, 0, PLACES * sizeof(uint16_t))
        if self.timer is not None:           # it rings after this
            self.excuse(now_us)
        keys = self.fill(call, &self.waiting, most - min(<int>min(self.own.count, <Py_ssize_t>OWN_MIN), most // 4), RULES_MAX, keys, now_us)
        if self.own.count and (call.size == 0 or call.mode == CHECK):
            keys = self.fill(call, &self.own, most, RULES_MAX + OWN_MIN, keys, now_us)
        if call.size:
            call.sent_us = now_us
            call.epoch = self.epoch
            self.write_call(call, keys)
        return 0

    cdef int fill(self, Call call, Queue* queue, int most, int rules_most, int keys, int64_t now_us) except -1:
        """Take from a queue what goes with the call as it is; returns how many keys that has."""
        cdef PendingDecision pending
        cdef CallEntry* entry
        cdef int64_t soon_us = now_us + min(self.took_us + self.took_us // 2, self.deadline_us // 4 * 3)
        cdef Mode mode
        cdef uint16_t place
        cdef bint asked = False
        while queue.first != NULL:
            pending = <PendingDecision>queue.first
            mode = CHECK if pending.mode == GIVE_BACK else pending.mode
            if call.size and mode != call.mode:
                break
            if self.gone(pending):
                self.drop(pending)
                continue
            # Nor what would be answered too late: it would be counted for nothing.
            if pending.deadline_us <= soon_us and self.excused_until_us <= now_us:
                take(queue, pending)
                self.run_out(pending, now_us)
                continue
            place = self.place_of(call, pending.hashed)
            # Units that this process holds by now go first: a call would give them back.
            if pending.rule.lease_units and self.places[place] == 0 and self.decided_here(pending, now_us, &asked):
                take(queue, pending)
                continue
            call.mode = mode
            entry = &call.entries[self.places[place] - 1] if self.places[place] else NULL
            # Of a key's entries the newest decides whether this one is equal to it: their order is kept.
            if entry == NULL or not self.joins(call, entry, pending):
                if call.size == most or len(<list>call.rules) >= rules_most:
                    break
                entry = self.add_entry(call, pending, entry.key_index if entry != NULL else keys + 1)
                keys += 1 if entry.key_index > keys else 0
                self.places[place] = <uint16_t>call.size
            take_over(queue, &entry.waiters, pending)
            entry.count += 1 if pending.mode == CHECK else 0
            pending.stage = SENT
            if call.deadline_us == 0:
                call.deadline_us = pending.deadline_us
        return keys

    cdef inline bint gone(self, PendingDecision pending) except -1:
        # Complete where waking it failed after it was decided.
        return pending.stage == COMPLETE or pending.group is not None and pending.group.future.cancelled()

    cdef inline uint16_t place_of(self, Call call, Hash128 hashed) noexcept:
        """Where the map has the newest entry of a key, or would have it."""
        cdef uint16_t place = <uint16_t>(hashed.lo >> 16) & (PLACES - 1)
        cdef CallEntry* entry
        while self.places[place]:
            entry = &call.entries[self.places[place] - 1]
            if entry.hashed.lo == hashed.lo and entry.hashed.hi == hashed.hi:
                break
            place = (place + 1) & (PLACES - 1)
        return place

    cdef inline bint joins(self, Call call, const CallEntry* entry, PendingDecision pending) noexcept:
        if call.mode == RESET or pending.mode == GIVE_BACK and pending.key is None and not entry.returns:
            return True
        if pending.mode == GIVE_BACK or entry.returns:
            return False
        return entry.cost == pending.units and entry.rule == <PyObject*>pending.rule

    cdef CallEntry* add_entry(self, Call call, PendingDecision pending, int key_index) except NULL:
        cdef CallEntry* entry = &call.entries[call.size]
        memset(entry, 0, sizeof(CallEntry))
        entry.hashed = pending.hashed
        entry.rule_index = call.rule_index(pending.rule)
        entry.rule = <PyObject*>pending.rule
        entry.key_index = key_index
        entry.cost = pending.units
        entry.returns = pending.mode == GIVE_BACK and pending.key is not None
        call.size += 1
        return entry

    cdef int write_call(self, Call call, int keys) except -1:
        """Write the call into the buffer, under a request id of its own."""
        cdef Buffer* buffer = &self.buffer
        cdef CallEntry* entry
        cdef CompiledRule rule
        cdef int i, runs = 0, leases = 0, known = 0
        call.request = self._session + b"%d" % self.requests
        self.requests += 1
        buffer.used = 0
        for i in range(call.size):
            entry = &call.entries[i]
            rule = <CompiledRule>entry.rule
            self.take_stock(call, entry, rule)
            if rule.lease_units:
                leases += 1
            else:
                runs += not self.continues(call, i)
        if not buffer_room(buffer, 4096 + self.script_size(call)):
            raise MemoryError
        if call.mode == RESET:
            put_head(buffer, c"*", 3 + keys + 1 + 2 + keys)
        else:
            put_head(buffer, c"*", 3 + keys + 1 + 6 + 8 * len(call.rules) + 5 * runs + 7 * leases)
        self.put_script(call)
        put_number(buffer, keys + 1)
        put_bulk(buffer, PyBytes_AS_STRING(self.layout.epoch_key), PyBytes_GET_SIZE(self.layout.epoch_key))
        for i in range(call.size):
            entry = &call.entries[i]
            if entry.key_index > known:
                known = entry.key_index
                self.layout.put_key(buffer, <PendingDecision>entry.waiters.first)
        if not buffer_room(buffer, 1024):
            raise MemoryError
        put_bulk(buffer, PyBytes_AS_STRING(call.request), PyBytes_GET_SIZE(call.request))
        if call.mode == RESET:
            put_bulk(buffer, PyBytes_AS_STRING(self.epoch_text), EPOCH_SIZE)
            if not buffer_room(buffer, 32 * call.size):
                raise MemoryError
            for i in range(call.size):       # each of a key of its own
                put_number(buffer, reset_reach(&(<CompiledRule>call.entries[i].rule).terms) // 1000 + 1)
        else:
            put_bulk(buffer, "peek" if call.mode == PEEK else "check", 4 if call.mode == PEEK else 5)
            put_bulk(buffer, PyBytes_AS_STRING(self.epoch_text), EPOCH_SIZE)
            put_number(buffer, len(call.rules))
            put_number(buffer, runs)
            put_number(buffer, leases)
            self.put_rules(call)
            self.put_entries(call)
        return 0

    cdef inline bint continues(self, Call call, int i) noexcept:
        """Whether an entry goes on where the run of the one before it ends."""
        cdef CallEntry* entry = &call.entries[i]
        cdef CallEntry* before = entry - 1
        return (i > 0 and before.rule == entry.rule and before.key_index + 1 == entry.key_index and before.cost == entry.cost
                and before.count == entry.count)

    cdef size_t script_size(self, Call call):
        return PyBytes_GET_SIZE(self.reset_text if call.mode == RESET else self.decide_text)

    cdef int put_script(self, Call call) except -1:
        cdef Buffer* buffer = &self.buffer
        cdef bytes what
        if self.by_value:
            what = self.reset_text if call.mode == RESET else self.decide_text
            put_bulk(buffer, "EVAL", 4)
            self.by_value = False
        else:
            what = self.reset_sha if call.mode == RESET else self.decide_sha
            put_bulk(buffer, "EVALSHA", 7)
        put_bulk(buffer, PyBytes_AS_STRING(what), PyBytes_GET_SIZE(what))
        return 0

    cdef int put_rules(self, Call call) except -1:
        cdef CompiledRule rule
        cdef char kind
        for rule in call.rules:
            if not buffer_room(&self.buffer, 512):
                raise MemoryError
            kind = rule.terms.kind
            put_bulk(&self.buffer, &kind, 1)
            put_number(&self.buffer, rule.terms.capacity)
            put_number(&self.buffer, rule.terms.window_us)
            put_number(&self.buffer, rule.terms.unit_ticks)
            put_number(&self.buffer, rule.terms.drain_ticks)
            put_number(&self.buffer, rule.terms.slot_us)
            put_number(&self.buffer, rule.terms.coarse_us)
            put_number(&self.buffer, lead(rule))
        return 0

    cdef int put_entries(self, Call call) except -1:
        cdef Buffer* buffer = &self.buffer
        cdef CallEntry* entry
        cdef int i = 0, run
        while i < call.size:
            entry = &call.entries[i]
            run = 1
            if not (<CompiledRule>entry.rule).lease_units:
                while i + run < call.size and self.continues(call, i + run):
                    run += 1
                if not buffer_room(buffer, 256):
                    raise MemoryError
                put_number(buffer, entry.key_index)
                put_number(buffer, run)
                put_number(buffer, entry.rule_index)
                put_number(buffer, entry.cost)
                put_number(buffer, count_of(call, entry))
            i += run
        for i in range(call.size):
            entry = &call.entries[i]
            if (<CompiledRule>entry.rule).lease_units:
                if not buffer_room(buffer, 256):
                    raise MemoryError
                put_number(buffer, entry.key_index)
                put_number(buffer, entry.rule_index)
                put_number(buffer, entry.cost)
                put_number(buffer, count_of(call, entry))
                put_number(buffer, entry.ahead)
                put_number(buffer, entry.back)
                put_number(buffer, entry.back_us)
        return 0

    cdef int send(self, Call call) except -1:
        # First: a call that could not be written must not stand in the way of the next one's reply.
        self.write(PyBytes_FromStringAndSize(self.buffer.bytes, self.buffer.used))
        self.in_flight.append(call)
        self.sent_calls += 1
        self.sent_entries += call.size
        return 0

    # Reading replies:

    def _received(self, bytes data not None):
        """Take what came: settle the calls whose replies are whole, send what has gathered meanwhile, and wake who waited."""
        cdef bint whole = False
        if not self._open:                   # to a call that was given up at the end, on a connection that is closed in a moment
            return
        self.receiving = True
        try:
            self.read(data)
            whole = True
        finally:
            self.receiving = False
            if self.woken and (not whole or current_task(self.loop) is not None):
                self.call_soon(self._step, context=self.context)
        self.unpark()
        # First what waits already: it is decided while those are stepped that have their answer, and that may ask for as much again.
        self._flush(whole=2 * len(self.woken) >= self.waiting.count)
        if self.woken and current_task(self.loop) is None:
            try:
                self._step()
            except (KeyboardInterrupt, SystemExit) as error:
                # Not from here: uvloop would take it for the connection's error, drop that and go on.
                self.call_soon(_raised, error)

    cdef int read(self, bytes data) except -1:
        cdef Py_ssize_t at = 0, after
        if self.rest:
            data = self.rest + data
            self.rest = b""
        while at < PyBytes_GET_SIZE(data):
            if not self.in_flight:
                self._broken("a reply that nobody waits for")
                return 0
            after = self.read_reply(data, at)
            if after == INCOMPLETE:
                break
            if after == BROKEN:
                self._broken("something else than was asked for")
                return 0
            if not self._open:                # dropped because of what was read
                return 0
            at = after
        if PyBytes_GET_SIZE(data) - at > REPLY_BYTES_MAX:
            self._broken("a reply without an end")
        elif at < PyBytes_GET_SIZE(data):
            self.rest = data[at:]
        return 0

    cdef Py_ssize_t read_reply(self, bytes data, Py_ssize_t at) except -3:
        """Read the reply to the oldest call; returns where the next one begins, INCOMPLETE or BROKEN."""
        cdef const char* text = PyBytes_AS_STRING(data)
        cdef Py_ssize_t size = PyBytes_GET_SIZE(data), end
        cdef Call call
        cdef Errand errand = None
        cdef int64_t[ENTRIES_MAX * NUMBERS_MAX + 1] numbers
        cdef int i, count, answers, first
        oldest = self.in_flight[0]
        call = <Call>oldest if isinstance(oldest, Call) else None
        errand = <Errand>oldest if isinstance(oldest, Errand) else None
        if text[at] == c"-" and not is_mark(oldest):
            end = read_line(text, at, size)
            if end < 0:
                return end
            self.in_flight.popleft()
            self._refused(oldest, data[at + 1:end])
            if errand is not None and (not self.ready or self.knowledge.telling is not None):
                self.tell()
            return end + 2
        at = read_numbers(oldest, data, at, numbers, &count)
        if at < 0:
            return at
        if oldest is None:                   # the reply to SCRIPT LOAD
            self.in_flight.popleft()
            return at
        if is_mark(oldest):
            self.in_flight.popleft()
            self.heard_us = self.bounds.now_us()
            self.marked(<Errand>oldest, numbers)
            return at
        if count == 1 and numbers[0] == MOVED:
            self.in_flight.popleft()
            self.moved(oldest)
            return at
        if errand is not None:
            if errand.script == "beat" and not possible_beat(numbers, count):
                return BROKEN
            self.in_flight.popleft()
            self.heard_us = self.bounds.now_us()
            first = self.tell_refusals(errand, numbers, count) if errand.script == "repair" else 0
            if first and errand.telling is not None:
                self.knowledge.deferred(errand, first)
            else:
                self.knowledge.heard(errand, numbers[0] if count else 0)
            if errand.done is not None:
                errand.done([numbers[i] for i in range(count)])
            if errand.owed is not None:
                self.knowledge.charged.extend([item[:3] for item in errand.owed])
            if not self.ready or self.knowledge.telling is not None:
                self.tell()
            return at
        answers = self.measure(call, numbers, count)
        if answers < 0:
            return BROKEN
        self.in_flight.popleft()
        if self.epoch != self.knowledge.epoch:
            # Another line has met a later epoch: what this one counts is lost, and was not asserted there.
            self._fail(call, StorageUnavailable("this Redis was replaced by another one meanwhile"))
            return at
        try:
            self.settle(call, numbers, answers, count)
        except BaseException:
            # Whatever it was, nobody may be left waiting.
            self._fail(call, StorageProtocolError("the reply could not be taken in; the check may have been counted"))
            raise
        return at

    cdef int moved(self, oldest) except -1:
        """The call wasn't run, since this is another epoch than it expected: it waits, and the epoch is looked at."""
        self.ready = False
        if isinstance(oldest, Call):
            self.take_back(<Call>oldest)
        else:
            self.knowledge.forget_errand(<Errand>oldest)
            self.beating = self.beating and (<Errand>oldest).script != "beat"
        return self.beat()

    cdef int measure(self, Call call, const int64_t* numbers, int count) noexcept:
        """How many numbers the answers have; -1 if the script can't have given this reply: it isn't taken in, whoever wrote it."""
        cdef const int64_t* answer = numbers + 1
        cdef const int64_t* end = numbers + count
        cdef const Terms* terms
        cdef CallEntry* entry
        cdef int i, j, leases, length
        cdef int64_t least, most, latest_us
        # No clock is a year off. What a generation says is asserted, and would outlast the reply that made it up.
        if count < 1 or not max(<int64_t>0, self.epoch - YEAR_US) <= numbers[0] <= LEVEL_MAX:
            return -1
        latest_us = numbers[0] + YEAR_US
        if call.mode == RESET:
            if count != 1 + call.size:
                return -1
            for i in range(1, count):
                if not 0 <= numbers[i] <= latest_us:
                    return -1
            return call.size
        for leases in range(2):
            for i in range(call.size):
                entry = &call.entries[i]
                if ((<CompiledRule>entry.rule).lease_units > 0) != leases:
                    continue
                terms = &(<CompiledRule>entry.rule).terms
                if answer >= end or answer[0] > count_of(call, entry):
                    return -1
                if answer[0] < 0 and answer[0] not in (UNREADABLE, UNSURE, DEFERRED):
                    return -1
                length = answer_length(terms, answer[0], count_of(call, entry))
                if answer[0] < 0:
                    answer += length
                    continue
                if answer + length + leases > end or answer[1] < 0:
                    return -1
                # Ticks of a level, or units counted; of the rest, units counted and µs that end with two windows and an eighth.
                if answer[1] > (LEVEL_MAX if terms.kind == c"b" or terms.kind == c"s" else UNITS_MAX):
                    return -1
                most = max(<int64_t>UNITS_MAX, 3 * terms.window_us)
                for j in range(2, length):
                    least = 0
                    if terms.kind == c"s" and j == 4:
                        least = NEVER
                    elif terms.kind in (c"c", c"f") and j == length - 1:
                        least = -terms.window_us  # it begins only then, by a clock that has stepped back
                    if not least <= answer[j] <= most:
                        return -1
                if terms.kind == c"c" and answer[2] > UNITS_MAX:
                    return -1
                if terms.kind in (c"c", c"f") and answer[length - 1] >= terms.window_us:
                    return -1
                if leases and not 0 <= answer[length] <= entry.ahead:
                    return -1
                answer += length + leases
        length = <int>(answer - numbers - 1)
        if (end - answer) % 2:
            return -1
        while answer < end:                  # pairs of an answer's number and a generation
            if not (1 <= answer[0] <= call.size and 0 <= answer[1] <= latest_us):
                return -1
            answer += 2
        return length

    cdef int settle(self, Call call, const int64_t* numbers, int answers, int count) except -1:
        """Give everybody in a call its decision, and remember what the store has said."""
        cdef int64_t now_us = self.bounds.now_us(), took_us
        cdef const int64_t* answer = numbers + 1
        cdef const int64_t* generations = numbers + 1 + answers
        cdef const int64_t* end = numbers + count
        cdef CallEntry* entry
        cdef CompiledRule rule
        cdef PendingDecision sample
        cdef int64_t ahead
        cdef int i, leases, length, place = 0
        self.heard_us = now_us
        # The least of late, so that one that stalled says nothing of the next.
        took_us = max(now_us - call.sent_us, <int64_t>1)
        self.took_us = min(took_us, self.took_us + self.took_us // 8 + 100) if self.took_us else took_us
        if not self.bounds.owing:  # what was admitted here is as old as this process's clock says
            self.knowledge.ahead_us = numbers[0] - now_us
        self.knowledge.newest_us = max(self.knowledge.newest_us, numbers[0])
        if call.mode == RESET:
            for i in range(call.size):
                entry = &call.entries[i]
                self.forget_used(call, entry, answer[entry.key_index - 1], numbers[0], now_us)
                self.settle_entry(call, entry, NULL, 0)
            return 0
        for leases in range(2):              # as the call has them: first those of rules without leases
            for i in range(call.size):
                entry = &call.entries[i]
                rule = <CompiledRule>entry.rule
                if (rule.lease_units > 0) != leases:
                    continue
                place += 1
                if answer[0] < 0:
                    if answer[0] == DEFERRED:
                        self.take_entry_back(entry, call.epoch)
                    elif answer[0] == UNSURE:
                        self.settle_unsure(entry, now_us)
                    else:
                        self.settle_unreadable(entry)
                    answer += 1
                    continue
                sample = <PendingDecision>entry.waiters.first
                length = answer_length(&rule.terms, answer[0], count_of(call, entry))
                ahead = answer[length] if leases else 0
                self.settle_entry(call, entry, answer, ahead)
                self.learn(call, entry, sample, answer, ahead, numbers[0], now_us)
                answer += length + leases
                if generations < end and generations[0] == place:
                    self.knowledge.note_generation(sample, generations[1], numbers[0], now_us)
                    generations += 2
        return 0

    cdef int forget_used(self, Call call, CallEntry* entry, int64_t generation, int64_t server_us, int64_t now_us) except -1:
        """The key was reset: nothing that is known of it, leased or admitted here counts any more, but that it was."""
        cdef PendingDecision sample = <PendingDecision>entry.waiters.first
        cdef Shard* shard
        cdef uint32_t index
        cdef Bound* bound = self.bound_of(entry.hashed, &shard, &index)
        if bound != NULL:
            bound.lease_units = 0
            self.bounds.remove(shard, index)
        self.knowledge.note_generation(sample, generation, server_us, now_us)
        bound = self.bound_of(entry.hashed, &shard, &index)
        if bound != NULL:                    # what was said before that comes too late
            bound.received_us, bound.server_us = now_us, server_us
        return 0

    cdef int settle_unreadable(self, CallEntry* entry) except -1:
        """Only those who ask about this key get an error: its state can't be read."""
        cdef PendingDecision pending
        cdef Shard* shard
        cdef uint32_t index
        cdef Bound* bound
        error = StateUnreadable((<CompiledRule>entry.rule).name)
        bound = self.bound_of(entry.hashed, &shard, &index)  # only now: to make the error runs other code, which may move it
        if bound != NULL:
            bound.asked_us = 0
            bound.leasing = bound.leasing and entry.ahead == 0
        while entry.waiters.first != NULL:
            pending = <PendingDecision>entry.waiters.first
            take(&entry.waiters, pending)
            if pending.stage != COMPLETE:
                complete(pending, None if pending.mode == GIVE_BACK else twin_of(error))
        self._notice("state_unreadable", error.rule)
        return 0

    cdef int tell_refusals(self, Errand errand, const int64_t* numbers, int count) except -1:
        """Tell what of an errand the store didn't take, by pairs of an entry's number and why. Returns where it goes on, or 0."""
        cdef int i, first = 0
        cdef dict refused = {}
        for i in range(2, count - 1, 2):
            if numbers[i + 1] == REFUSED_DEFERRED and errand.first < numbers[i] <= errand.key_count:
                first = <int>numbers[i]
            elif errand.first <= numbers[i] <= len(errand.keys):
                rule = self.layout.rule_of(errand.keys[numbers[i] - 1])
                if numbers[i + 1] == REFUSED_UNREADABLE:
                    self._notice("state_unreadable", rule)
                else:
                    refused[rule] = refused.get(rule, 0) + 1
        for rule, keys in refused.items():
            self._notice("repair_refused", f"a number is out of range for {keys} keys of rule {rule!r}")
        return first

    cdef int settle_unsure(self, CallEntry* entry, int64_t now_us) except -1:
        """Others may still tell of more that was used: the outage policy decides."""
        cdef PendingDecision pending
        cdef Shard* shard
        cdef uint32_t index
        cdef Bound* bound = self.bound_of(entry.hashed, &shard, &index)
        if bound != NULL:
            bound.asked_us = 0
            bound.leasing = bound.leasing and entry.ahead == 0
        while entry.waiters.first != NULL:
            pending = <PendingDecision>entry.waiters.first
            take(&entry.waiters, pending)
            if pending.stage != COMPLETE:
                self.fall_back(pending, repairing(), now_us)
        return 0

    cdef int settle_entry(self, Call call, CallEntry* entry, const int64_t* answer, int64_t ahead) except -1:
        cdef PendingDecision pending
        cdef CompiledRule rule = <CompiledRule>entry.rule
        cdef Outcome out
        cdef int64_t position = 0
        while entry.waiters.first != NULL:
            pending = <PendingDecision>entry.waiters.first
            take(&entry.waiters, pending)
            if pending.stage == COMPLETE:    # it gave up, but its place in the count is its own
                position += pending.mode == CHECK
            elif answer == NULL or pending.mode == GIVE_BACK:
                complete(pending, None)
            else:
                take_answer(&rule.terms, answer, ahead, pending.units, position, &out)
                position += pending.mode == CHECK
                complete_with(pending, decision_new(rule, pending.key, pending.units, REDIS, &out))
        return 0

    # What is known:

    cdef int learn(self, Call call, CallEntry* entry, PendingDecision sample, const int64_t* answer, int64_t ahead,
                   int64_t server_us, int64_t now_us) except -1:
        cdef CompiledRule rule = <CompiledRule>entry.rule
        cdef bint refused = answer[0] < count_of(call, entry)
        cdef Shard* shard
        cdef uint32_t index
        cdef Bound fresh
        # The terms first: to meet a rule may run other code, and that may move the bound.
        cdef const Terms* terms = self.bounds.terms_of(rule)
        cdef Bound* bound = self.bound_of(entry.hashed, &shard, &index)
        if bound == NULL:
            memset(&fresh, 0, sizeof(Bound))
            fresh.cell.hash_lo = entry.hashed.lo
            fresh.cell.hash_hi = entry.hashed.hi
            if bound_learn(&fresh, terms, answer, refused, entry.cost, call.sent_us, now_us, server_us) != KEEP:
                raise MemoryError
            # A key with leases is remembered even when nothing of it counts: that it was asked about says whether it is busy.
            if view_fresh_at(&fresh.cell.view) <= now_us and rule.lease_units == 0:
                view_free(&fresh.cell.view)
                return 0
            try:
                fresh.name = self.layout.name_new(sample, &fresh.name_size)
                bound = <Bound*>self.bounds.insert(shard, &fresh.cell, now_us)
            except BaseException:
                piece_free(fresh.name)
                view_free(&fresh.cell.view)
                raise
        else:
            if bound_learn(bound, terms, answer, refused, entry.cost, call.sent_us, now_us, server_us) != KEEP:
                raise MemoryError
            bound.asked_us = 0
            bound.leasing = bound.leasing and entry.ahead == 0
            if entry.back:
                bound.returned_us = 0
        self.knowledge.live_until_us = max(self.knowledge.live_until_us, view_fresh_at(&bound.cell.view))
        bound.epoch = self.epoch
        if ahead > 0:
            self.take_lease(bound, sample, rule, terms, answer, ahead, call.sent_us, server_us, now_us)
        elif rule.lease_units == 0 and bound_fresh_at(bound) <= now_us:
            self.forget(entry.hashed)
        return 0

    cdef int forget(self, Hash128 hashed) except -1:
        cdef Shard* shard
        cdef uint32_t index
        if self.bound_of(hashed, &shard, &index) != NULL:
            self.bounds.remove(shard, index)
        return 0

    cdef int unpark(self) except -1:
        """What waited for another check's answer: most of it is answered by that."""
        cdef Queue parked = self.parked, freed
        cdef PendingDecision pending
        cdef int64_t now_us
        cdef bint asked = False
        if parked.count == 0:
            return 0
        now_us = self.bounds.now_us()
        memset(&self.parked, 0, sizeof(Queue))
        memset(&freed, 0, sizeof(Queue))
        while parked.first != NULL:
            pending = <PendingDecision>parked.first
            take(&parked, pending)
            if self.gone(pending):
                pending.stage = COMPLETE
            elif not self.decided_here(pending, now_us, &asked):
                pending.stage = PARKED if asked else WAITING
                push(&self.parked if asked else &freed, pending)
        merge(&freed, &self.waiting)
        return 0

    # Leases:

    cdef int take_stock(self, Call call, CallEntry* entry, CompiledRule rule) except -1:
        """Note that the key is asked about; for a rule with leases, what to give back and what to take."""
        cdef Shard* shard
        cdef uint32_t index
        cdef Bound* bound
        cdef int64_t size, spent, epoch, wanted = entry.count * entry.cost
        if call.mode != CHECK:
            return 0
        if entry.returns:
            _, entry.back, entry.back_us, epoch = (<PendingDecision>entry.waiters.first).key
            if epoch != self.epoch:          # it was lost there, which is known only since it was queued
                entry.back = 0
        bound = self.bound_of(entry.hashed, &shard, &index)
        if entry.returns:
            if bound != NULL and entry.back:
                bound.returned_us = call.sent_us
            return 0
        if bound == NULL:
            return 0
        if entry.count:
            bound.asked_us = call.sent_us
            bound.asked_by = <void*>self
        # Only one call at a time takes units ahead, and only one entry of it: a second lease would take the place of the first.
        if rule.lease_units == 0 or bound.leasing:
            return 0
        # Another definition's account knows nothing of it; under another lead it is still the same units that must go back.
        # And what was taken in another life of the store's data may be lost there: what goes back would be others' units.
        size = bound.lease_size
        spent = size - bound.lease_units
        if bound.lease_units and bound.lease_epoch == self.epoch and same_definition(bound.lease_terms, &rule.terms):
            entry.back = bound.lease_units
            entry.back_us = bound.lease_at_us - lead(rule)
            bound.returned_us = call.sent_us
        else:
            self.bounds.orphan(bound)        # it goes back under the rule that it was taken under
        bound.lease_units = bound.lease_size = 0
        if entry.count == 0:
            return 0
        if call.sent_us - bound.sent_us <= rule.lease_us:
            # Asked about twice within the life of a lease: it is busy. What was used up in time may be twice as large.
            entry.ahead = max(spent, wanted)
            if size and spent == size and call.sent_us < bound.lease_until_us:
                entry.ahead = max(entry.ahead, 2 * size)
        elif size and call.sent_us < bound.lease_until_us + rule.lease_us:
            entry.ahead = spent
        entry.ahead = min(rule.lease_units, entry.ahead)
        bound.leasing = entry.ahead > 0
        return 0

    cdef int take_lease(self, Bound* bound, PendingDecision sample, CompiledRule rule, const Terms* terms, const int64_t* answer,
                        int64_t ahead, int64_t sent_us, int64_t server_us, int64_t now_us) except -1:
        cdef int64_t for_us = rule.lease_us, ends_us
        if rule.terms.kind == c"f" or rule.terms.kind == c"c":  # it ends with the window
            for_us = min(for_us, rule.terms.window_us - answer[2 if rule.terms.kind == c"f" else 3])
        self.bounds.orphan(bound)            # of another bound that this one has replaced meanwhile
        bound.lease_units = bound.lease_size = ahead
        # From before the request was sent, and a 64th and the rounding of two clocks less: the store's may be the faster one.
        bound.lease_until_us = sent_us + for_us - for_us // DRIFT_SHARE - 2
        bound.keep_until_us = max(bound.keep_until_us, bound.lease_until_us + GIVE_BACK_US)
        bound.lease_at_us = server_us + lead(rule)
        bound.lease_terms = terms
        bound.lease_epoch = self.epoch
        ends_us = bound.lease_until_us
        heappush(self.leases, (ends_us, self.turns, sample, bound.lease_at_us))
        self.turns += 1                      # so that no two are equal
        self.wind(now_us, ends_us)
        return 0

    cdef int give_back(self, int64_t now_us) except -1:
        """Queue what has been left over of leases that have ended."""
        cdef PendingDecision sample, pending
        cdef Shard* shard
        cdef uint32_t index
        cdef Bound* bound
        cdef int64_t at_us
        while self.leases and self.leases[0][0] <= now_us:
            _, _, sample, at_us = heappop(self.leases)
            bound = self.bound_of(sample.hashed, &shard, &index)
            if not self.ready or bound == NULL or bound.lease_units == 0 or bound.lease_at_us != at_us:
                self.return_lease(sample, at_us, now_us)
                continue
            pending = pending_for(sample.rule, sample.text, sample.mark, sample.tag, GIVE_BACK)
            pending.hashed = sample.hashed
            self.queue(pending)
        self.queue_returns(now_us)
        self.schedule()
        return 0

    cdef int return_lease(self, PendingDecision sample, int64_t at_us, int64_t now_us) except -1:
        """Take what is left of a lease from wherever it is, and give it back as soon as that can be."""
        cdef int64_t units = self.bounds.adopt(sample.hashed, at_us, self.knowledge.epoch, now_us)
        if units:
            self.put_back(sample, units, at_us - lead(sample.rule), self.knowledge.epoch)
        return 0

    cdef int put_back(self, PendingDecision sample, int64_t units, int64_t server_us, int64_t epoch) except -1:
        """Give back units that were granted to `sample` ahead, at that time, and that nobody here may spend."""
        if len(self.returns) < RETURNS_MAX:
            self.returns.append((sample, units, server_us, epoch))
        return 0

    cdef int return_later(self, PendingDecision pending, int64_t now_us) except -1:
        """It wasn't sent in time. What gives back the lease of a bound is looked for there."""
        cdef Shard* shard
        cdef uint32_t index
        cdef Bound* bound
        if pending.key is not None:
            self.returns.append(pending.key)
            return 0
        bound = self.bound_of(pending.hashed, &shard, &index)
        if bound != NULL and bound.lease_units and bound.lease_until_us <= now_us:
            self.return_lease(pending, bound.lease_at_us, now_us)
        return 0

    cdef int queue_returns(self, int64_t now_us, Group group=None) except -1:
        cdef PendingDecision sample, pending
        if not self.ready or not self.returns:
            return 0
        returns, self.returns = self.returns, []
        for item in returns:
            sample, units, _, epoch = item
            if epoch != self.epoch:          # it was lost there
                continue
            pending = pending_for(sample.rule, sample.text, sample.mark, sample.tag, GIVE_BACK)
            pending.hashed = sample.hashed
            pending.units = units
            pending.key = item
            if group is not None:
                pending.group = group
                group.members.append(pending)
                group.left += 1
            self.queue(pending)
        self.schedule()
        return 0

    def _return_leases(self, CompiledRule rule=None):
        """Give back at once what is left of the leases under a rule, or of all. Returns a future that tells when it is done, or None."""
        cdef Group group = Group.__new__(Group)
        cdef PendingDecision sample
        cdef int64_t at_us, now_us = self.bounds.now_us()
        leases, self.leases = self.leases, []
        for item in leases:
            _, _, sample, at_us = item
            if rule is None or sample.rule == rule:
                self.return_lease(sample, at_us, now_us)
            else:
                self.leases.append(item)
        heapify(self.leases)
        group.future = self.loop.create_future()
        group.members = []
        group.left = 0
        self.queue_returns(now_us, group)
        self._flush()
        return group.future if group.left else None

    def _late_replies(self):
        """What reads the replies that are late, if a lease may be among them; None if there is nothing to hear."""
        cdef Late late = Late.__new__(Late)
        cdef Call call
        cdef int i
        cdef bint leases = False, asks
        late.gathering = self
        late.epoch = self.epoch
        late.rest = self.rest
        late.in_flight = deque()
        for sent in self.in_flight:
            samples = None
            if isinstance(sent, Call):
                call = <Call>sent
                asks = False
                samples = []
                for i in range(call.size):
                    if call.entries[i].ahead and call.entries[i].waiters.count:
                        samples.append(<object>call.entries[i].waiters.first)
                        leases = asks = True
                    else:
                        samples.append(None)
                samples = samples if asks else None
            late.in_flight.append((sent, samples))
        return late if leases else None

    # The end of a connection, and of everything:

    def _opened(self, write, dict scripts not None, bytes run not None):
        """There is a connection now, to that run of a server: `write` sends bytes on it.

        scripts: what is loaded there, name -> (sha, text).
        """
        self.write = write
        self.scripts = scripts
        self.decide_sha, self.decide_text = scripts["decide"]
        self.reset_sha, self.reset_text = scripts["reset"]
        self.run = run
        self.rest = b""
        self.evicted = -1
        self.took_us = 0
        self.asked_evicted_us = 0
        self.named = False
        self._open = True
        self.beat()

    def _shut(self, error):
        """The connection is gone. What was on its way may have been run, and gets `error`; what waits goes on waiting."""
        self._open = self.ready = self.beating = False
        self.epoch = 0
        self.knowledge.doubt()
        self.write = None
        self.rest = b""
        self.by_value = False
        in_flight, self.in_flight = self.in_flight, deque()
        for sent in in_flight:
            if sent is not None:
                self._fail(sent, error)
        self.unpark()
        self.scheduled = False
        self.schedule()
        if self.away or self.bounds.now_us() < self.knowledge.live_until_us:
            # What is known here may be lost there: then it has to be told in time.
            self.schedule_connection()

    def _fail(self, sent not None, error, *, bint whatever=False):
        """Give everybody in a call what their outage policy says, or an error, `whatever` that is. An errand is run again later."""
        cdef Call call
        cdef int i
        cdef CallEntry* entry
        cdef PendingDecision pending
        cdef Shard* shard
        cdef uint32_t index
        cdef Bound* bound
        cdef int64_t now_us = self.bounds.now_us()
        if isinstance(sent, Errand):
            self.knowledge.forget_errand(<Errand>sent)
            return
        call = <Call?>sent
        for i in range(call.size):
            entry = &call.entries[i]
            bound = self.bound_of(entry.hashed, &shard, &index)
            if bound != NULL:
                bound.asked_us = 0
                bound.leasing = bound.leasing and entry.ahead == 0
            while entry.waiters.first != NULL:
                pending = <PendingDecision>entry.waiters.first
                take(&entry.waiters, pending)
                if pending.stage == COMPLETE:
                    continue
                if whatever:
                    complete(pending, twin_of(error))
                else:
                    self.fall_back(pending, error, now_us)

    def _give_up(self, Errand errand not None):
        """The store will never take it: nothing waits for it any more."""
        self.knowledge.heard(errand, 0)

    def _send_again(self, oldest):
        """A reply has proved that it wasn't run, because the server has lost its script: send it, script and all."""
        cdef bytes text
        if isinstance(oldest, Errand):
            self.by_value = True
            self.run_errand(oldest)
            return
        self.take_back(oldest)
        # By value, since nothing can be flushed in between; and loaded too, since what is only evaluated may be let go.
        text = self.reset_text if (<Call>oldest).mode == RESET else self.decide_text
        self.in_flight.append(None)
        self.write(b"*3\r\n$6\r\nSCRIPT\r\n$4\r\nLOAD\r\n$%d\r\n%b\r\n" % (len(text), text))
        self.by_value = True

    cdef int take_back(self, Call call) except -1:
        """What was not run waits again, each where it was."""
        cdef int i
        for i in range(call.size):
            self.take_entry_back(&call.entries[i], call.epoch)
        return 0

    cdef int take_entry_back(self, CallEntry* entry, int64_t epoch) except -1:
        """What an entry asked waits again, each where it was."""
        cdef PendingDecision pending, sample
        cdef Queue again, own
        cdef const Terms* terms
        cdef Shard* shard
        cdef uint32_t index
        cdef Bound* bound
        sample = <PendingDecision>entry.waiters.first if entry.waiters.count else None
        memset(&again, 0, sizeof(Queue))
        memset(&own, 0, sizeof(Queue))
        while entry.waiters.first != NULL:
            pending = <PendingDecision>entry.waiters.first
            if pending.stage == COMPLETE:
                take(&entry.waiters, pending)
                continue
            pending.stage = WAITING
            take_over(&entry.waiters, &own if pending.deadline_us == NEVER_US else &again, pending)
        merge(&again, &self.waiting)
        merge(&own, &self.own)
        # Nor was anything given back.
        terms = self.bounds.terms_of(<CompiledRule>entry.rule)
        bound = self.bound_of(entry.hashed, &shard, &index)
        if bound != NULL:
            bound.leasing = bound.leasing and entry.ahead == 0
        if entry.back == 0 or entry.returns:
            return 0
        if bound == NULL or bound.lease_units:
            if sample is not None:
                self.put_back(sample, entry.back, entry.back_us, epoch)
        else:
            bound.lease_units = bound.lease_size = entry.back
            bound.lease_epoch = epoch
            bound.lease_at_us = entry.back_us + lead(<CompiledRule>entry.rule)
            bound.lease_terms = terms
            if sample is not None:       # the entry of before may have been looked at meanwhile
                heappush(self.leases, (bound.lease_until_us, self.turns, sample, bound.lease_at_us))
                self.turns += 1
        return 0

    def _end(self, error):
        """Give `error` to everybody, and leave nothing behind."""
        self.ended = True
        self.come_back()
        self._notice("end", None)
        self._answer_waiting(error)
        self._shut(error)
        timer, self.timer = self.timer, None
        if timer is not None:
            timer.cancel()


@cython.final
cdef class Late:
    """Hears the replies to calls that were given up, for what their leases took: that goes back, and nothing else of them is believed."""

    cdef Gathering gathering
    cdef object in_flight                    # (Call, Errand or None; the first check of each entry that asked for a lease)
    cdef bytes rest
    cdef int64_t epoch

    def __init__(self):
        raise TypeError("what is late is heard by a gathering's `_late_replies`")

    def received(self, bytes data not None):
        """Take what came. False once there is nothing more to hear, or it isn't what was asked for."""
        cdef int64_t[ENTRIES_MAX * NUMBERS_MAX + 1] numbers
        cdef Py_ssize_t at = 0, after
        cdef int count = 0
        data = self.rest + data
        while self.in_flight and at < PyBytes_GET_SIZE(data):
            sent, samples = self.in_flight[0]
            if PyBytes_AS_STRING(data)[at] == c"-" and not is_mark(sent):
                after = read_line(PyBytes_AS_STRING(data), at, PyBytes_GET_SIZE(data))
                after = after + 2 if after >= 0 else after
            else:
                after = read_numbers(sent, data, at, numbers, &count)
            if after == BROKEN or after == INCOMPLETE and PyBytes_GET_SIZE(data) - at > REPLY_BYTES_MAX:
                self.in_flight.clear()
                return False
            if after == INCOMPLETE:
                break
            self.in_flight.popleft()
            if PyBytes_AS_STRING(data)[at] != c"-" and samples is not None and not (count == 1 and numbers[0] == MOVED):
                self.take(<Call>sent, samples, numbers, count)
            at = after
        self.rest = data[at:]
        return bool(self.in_flight)

    cdef int take(self, Call call, list samples, const int64_t* numbers, int count) except -1:
        cdef const int64_t* answer = numbers + 1
        cdef CallEntry* entry
        cdef CompiledRule rule
        cdef int i, leases, length
        if self.gathering.measure(call, numbers, count) < 0:
            self.in_flight.clear()
            return 0
        for leases in range(2):
            for i in range(call.size):
                entry = &call.entries[i]
                rule = <CompiledRule>entry.rule
                if (rule.lease_units > 0) != leases:
                    continue
                if answer[0] < 0:            # it wasn't decided, and that is all
                    answer += 1
                    continue
                length = answer_length(&rule.terms, answer[0], count_of(call, entry))
                if leases and answer[length] > 0 and samples[i] is not None:
                    self.gathering.put_back(samples[i], answer[length], numbers[0], self.epoch)
                answer += length + leases
        self.gathering.queue_returns(self.gathering.bounds.now_us())
        return 0
