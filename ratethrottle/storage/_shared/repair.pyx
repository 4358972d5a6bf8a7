# cython: auto_pickle=False, autotestdict=False
"""What a process knows of its store, and what it tells a store that has lost data.

An epoch is one run of one server over one data set. If the epoch has changed, a process asserts what it knows, charges what it
admitted meanwhile, and gives the other processes time to do the same. docs/arithmetic.md ("Repair") says what the store does with
it. No I/O.
"""

cimport cython
from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memset

from ratethrottle._core cimport PendingDecision
from ratethrottle._engine.arithmetic cimport BUCKET, FIXED, SLIDING, Terms
from ratethrottle._engine.bound cimport Bound, bound_assertion
from ratethrottle._engine.definitions cimport CompiledRule
from ratethrottle._engine.keys cimport KeyTable
from ratethrottle._engine.table cimport cell_at, fingerprints_of, Hash128, Shard, shard_find
from ratethrottle.storage._shared.call cimport ControlCall, lead_us, reset_reach, rule_words
from ratethrottle.storage._shared.fleet cimport Fleet
from ratethrottle.storage._shared.keynames cimport KeyNames
from ratethrottle.storage._shared.outage cimport Shares
from ratethrottle.storage._shared.resp cimport Buffer, buffer_room, digits, put_bulk, put_number

from collections import deque
from os import urandom
from weakref import WeakSet


cdef enum:
    ROWS_MAX = 128                           # keys of a call
    RULES_MAX = 32                           # and definitions that it asserts something of
    SHARDS_MAX = 32                          # of bounds, looked through at once
    LOOKED_AT_MAX = 4096                     # bounds, of which most may have nothing to tell any more
    STALLED_US = 250_000                     # after its deadline a call is another connection's to run, if its own is stalled

cdef int64_t UNKNOWN_TICKS = <int64_t>1 << 52  # so far below zero an asserted level says nothing


cdef bint ages_on(CompiledRule rule, int64_t age_us) noexcept:
    """Whether a charge grows older while it waits. New units of a bucket don't, which is too strict by what drains meanwhile."""
    return rule.terms.kind != BUCKET or age_us > 0


cdef int put_any(Buffer* buffer, int64_t number) except -1:
    """Append a number of either sign as a bulk string."""
    cdef char[21] text
    cdef int size = 0
    if not buffer_room(buffer, 64):
        raise MemoryError
    if number < 0:
        text[0] = c"-"
        size = 1 + digits(-number, text + 1)
        put_bulk(buffer, text, size)
    else:
        put_number(buffer, number)
    return 0


cdef int class_of(int64_t age_us) noexcept nogil:
    """Which class of age: each ends at most a sixteenth later than it begins, and none is shorter than 256 µs."""
    cdef uint64_t age = <uint64_t>max(<int64_t>0, age_us) >> 8
    cdef int halved = 0
    while age >= 32:
        age >>= 1
        halved += 1
    return <int>age + 16 * halved


cdef int64_t least_age(int of_class) noexcept nogil:
    """Of any member of the class, µs."""
    cdef int halved = max(0, of_class // 16 - 1)
    return <int64_t>(of_class - 16 * halved) << (8 + halved)


cdef inline int64_t told_at(const Bound* bound, int64_t before) noexcept nogil:
    """The store's time when what is known of a key was heard, in that epoch; 0 if it was in an older one."""
    return max(bound.server_us, bound.generation_us) if bound.epoch == before else 0


@cython.final
cdef class Assertions:
    """What a process asserts to a new epoch: all that it knows of older epochs, newest first.

    The store decides a key as soon as no process can know anything newer of it than the store knows. So each process says how far
    it has come, its *level*: the store has heard all that the process knows of that server time or later. Keys are sorted by
    classes of age, which takes one pass through the bounds.
    """

    def __cinit__(self):
        self.again = deque()
        self.out = {}

    def __dealloc__(self):
        free(self.found)
        free(self.items)

    cdef int prepare(self) except -1:
        """Do a part of the sorting, about a millisecond's."""
        if self.shard < self.bounds.shard_count:
            self.collect()
        else:
            self.place()
        return 0

    cdef int collect(self) except -1:
        cdef Shard* shard
        cdef const Bound* bound
        cdef Untold* larger
        cdef int64_t us
        cdef uint32_t i, last = min(self.shard + SHARDS_MAX, self.bounds.shard_count)
        while self.shard < last:
            shard = &self.bounds.shards[self.shard]
            if self.count + shard.used > self.room:
                self.room = max(2 * self.room, self.count + shard.used)
                larger = <Untold*>realloc(self.found, self.room * sizeof(Untold))
                if larger == NULL:
                    raise MemoryError
                self.found = larger
            for i in range(shard.room):
                if not fingerprints_of(shard)[i]:
                    continue
                bound = <Bound*>cell_at(shard, i)
                # The store knows what was heard in this very epoch.
                if bound.name == NULL or bound.epoch == self.epoch:
                    continue
                us = told_at(bound, self.before)
                if us < self.held_us if us else self.held_older:
                    continue
                self.found[self.count] = Untold(us, bound.cell.hash_lo, bound.cell.hash_hi)
                self.count += 1
                self.ends[1 + self.class_at(us)] += 1
            self.shard += 1
        return 0

    cdef inline int class_at(self, int64_t us) noexcept:
        return AGES - 1 if us == 0 else min(AGES - 2, class_of(self.newest_us - us))

    cdef int place(self) except -1:
        cdef size_t last = min(self.placed + 16 * 2048, self.count)
        cdef int i
        if self.items == NULL:
            self.items = <Untold*>malloc(max(<size_t>1, self.count) * sizeof(Untold))
            if self.items == NULL:
                raise MemoryError
            for i in range(AGES):
                self.ends[i + 1] += self.ends[i]
                self.nexts[i] = self.ends[i]
        while self.placed < last:
            i = self.class_at(self.found[self.placed].us)
            self.items[self.nexts[i]] = self.found[self.placed]
            self.nexts[i] += 1
            self.placed += 1
        if self.placed == self.count:
            free(self.found)
            self.found = NULL
            self.prepared = True
        return 0

    cdef int64_t level(self) noexcept:
        """The store has confirmed all that this process knows of this server time or later. 0: of any time."""
        cdef size_t first = self.at
        cdef int i
        if not self.prepared:
            return self.newest_us + 1
        for start in self.out.values():
            first = min(first, <size_t>start)
        if first == self.count:
            return 0 if self.last else 1
        for i in range(AGES - 1):
            if first < self.ends[i + 1]:
                return max(<int64_t>1, self.newest_us - least_age(i) + 1)
        return 1

    cdef bint waits(self) noexcept:
        """Whether there is more to assert, and no reply that has to come first."""
        return not self.last and (self.at < self.count or not self.out)

    cdef ControlCall next_call(self, int rows_max, int64_t ahead_us, int64_t now_us):
        """The next call; None if sorting isn't done yet, or if a reply has to come first."""
        cdef Buffer keys, args
        cdef ControlCall call
        if self.again:
            return self.again.popleft()
        if not self.prepared:
            self.prepare()
            if not self.prepared:
                return None
        memset(&keys, 0, sizeof(Buffer))
        memset(&args, 0, sizeof(Buffer))
        self.bounds.definitions.held += 1              # it collects their addresses
        try:
            call = self.build(&keys, &args, rows_max, ahead_us, now_us)
        finally:
            self.bounds.definitions.held -= 1
            free(keys.bytes)
            free(args.bytes)
        if call is not None:
            call.assertions = self
        return call

    cdef ControlCall build(self, Buffer* keys, Buffer* args, int rows_max, int64_t ahead_us, int64_t now_us):
        cdef size_t start = self.at, last = min(self.at + LOOKED_AT_MAX, self.count)
        cdef list met = []
        cdef Shard* shard
        cdef Bound* bound
        cdef const Terms* terms
        cdef int64_t[3] numbers
        cdef int64_t found, generation
        cdef Hash128 hashed
        cdef int rows = 0
        cdef ControlCall call
        while rows < rows_max and len(met) < RULES_MAX and self.at < last:
            hashed = Hash128(self.items[self.at].hash_lo, self.items[self.at].hash_hi)
            self.at += 1
            shard = &self.bounds.shards[<uint32_t>(((hashed.hi >> 32) * self.bounds.shard_count) >> 32)]
            found = shard_find(shard, hashed)
            if found < 0:
                continue
            bound = <Bound*>cell_at(shard, <uint32_t>found)
            if bound.name == NULL or bound.epoch == self.epoch:
                continue
            terms = bound.cell.view.terms
            generation = bound.generation_us
            if now_us + ahead_us - generation >= reset_reach(terms):
                generation = 0
            if not bound_assertion(bound, now_us, numbers):
                if generation == 0:
                    continue
                # The store must hear of a reset even if nothing else is known of the key.
                numbers[0] = -UNKNOWN_TICKS if terms.kind == BUCKET else 0
                numbers[1] = 1 if terms.kind == SLIDING else 0
                numbers[2] = 0
            rows += 1
            if not buffer_room(keys, bound.name_size + 32):
                raise MemoryError
            put_bulk(keys, bound.name, bound.name_size)
            self.put_row(args, rows, place_of(met, terms), generation, numbers, told_at(bound, self.before))
        if rows == 0 and (self.at < self.count or self.out):
            return None
        self.last = rows == 0
        call = ControlCall("repair", [], [
            b"assert", b"%d" % max(1, len(met)), b"%d" % rows,
            *(word for address in met or [<size_t>&NONE] for word in rule_words(<Terms*><size_t>address, 0, now_us + ahead_us))])
        call.packed_keys, call.key_count = PyBytes_FromStringAndSize(keys.bytes, keys.used), rows
        call.packed_args, call.arg_count = PyBytes_FromStringAndSize(args.bytes, args.used), 7 * rows
        self.out[call] = start
        return call

    cdef int put_row(self, Buffer* args, int row, int rule, int64_t generation, const int64_t* numbers, int64_t us) except -1:
        put_any(args, row)
        put_any(args, rule)
        put_any(args, generation)
        put_any(args, numbers[0])
        put_any(args, numbers[1])
        put_any(args, numbers[2])
        put_any(args, us)
        return 0

    cdef int heard(self, ControlCall call) except -1:
        self.out.pop(call, None)
        self.over = self.over or (call.key_count == 0 and self.last)
        return 0


cdef Terms NONE                              # stands for a rule in a call that has none
NONE.kind = FIXED
NONE.capacity = 1
NONE.window_us = 1_000_000


cdef int place_of(list met, const Terms* terms) except -1:
    """The number of a rule among those of a call, from 1."""
    cdef int i
    for i in range(len(met) - 1, -1, -1):
        if <size_t>met[i] == <size_t>terms:
            return i + 1
    met.append(<size_t>terms)
    return len(met)


@cython.final
cdef class Repair:
    """What the storages of one process share if they keep the same keys. The server counts them as one process."""

    def __init__(self, KeyTable bounds not None, KeyNames names not None, int64_t expected=0):
        self.bounds = bounds
        self.names = names
        self.shares = Shares(bounds, names)
        self.fleet = Fleet(self.shares)
        self.fleet.expect(expected)
        self.calls = deque()
        self.charged = deque(maxlen=self.bounds.max_keys)
        self.out = set()
        self.process_id = urandom(8).hex().encode()
        self.forks = bounds.forks
        self.users = WeakSet()

    cdef bint forked(self) except -1:
        """In a forked process, give up what its parent knows and owes. True there, once."""
        self.bounds.notice_fork()
        if self.forks == self.bounds.forks:
            return False
        self.forks = self.bounds.forks
        self.process_id = urandom(8).hex().encode()
        self.fleet.forked()
        self.calls = deque()
        self.out = set()
        self.assertions = None
        self.charged = deque(maxlen=self.bounds.max_keys)
        return True

    @property
    def learning(self):
        """Whether others may still tell the store what they know, so that it grants nothing."""
        return self.bounds.now_us() < self.learning_until_us

    @property
    def owed(self):
        """How many keys × rules have something to charge, or that is being charged."""
        cdef ControlCall call
        return self.bounds.owing + sum([len(call.owed) for call in (*self.calls, *self.out) if call.owed is not None])

    def forget_all(self):
        """Know nothing of any key, and owe nothing: everything was cleared."""
        self.clears += 1
        self.bounds.empty()
        self.calls = deque()
        self.out = set()
        self.assertions = None
        self.charged = deque(maxlen=self.bounds.max_keys)
        self.live_until_us = self.newest_us = self.told_us = 0

    def watch_until(self, int64_t until_us):
        """See to it that a loss is noticed soon, until then by this process's clock: something is held that is no key of the table."""
        self.live_until_us = max(self.live_until_us, until_us)

    cdef bint enter_epoch(self, int64_t epoch, int64_t learning_us, bint forgets, int64_t held_us, int64_t now_us) except -1:
        """Take up the epoch in the reply to a beat. True if it is another one: then the store may have lost what is known here.

        forgets: the store was cleared in that epoch, or since the one known here. held_us: the store still has all that it heard
        before this time, by its clock in the epoch known here; 0: that is unknown.
        """
        cdef bint another = self.epoch and self.epoch != epoch
        if another and forgets:
            self.epochs += 1
            self.forget_all()
            another = False
        elif another:
            self.epochs += 1
            # Charges that wait go to this epoch. Assertions that wait are about the one before.
            self.assertions = self.assert_all(epoch, held_us)
            self.newest_us = self.told_us = 0
            self.shares.begin()
        if self.epoch != epoch:
            self.fleet.doubt()
        # Within an epoch it only becomes shorter, when all have come. This reply may be older than another connection's.
        if self.epoch != epoch or self.learning_until_us <= now_us:
            self.learning_until_us = now_us + learning_us
        else:
            self.learning_until_us = min(self.learning_until_us, now_us + learning_us)
        self.epoch = epoch
        return another

    cdef ControlCall beat(self, bytes purpose, bint asks, bint named, done):
        """A call that says that this process is there or leaves, or that only looks which epoch this is.

        asks: for what was evicted, too. named: say how keys are called, too.
        """
        cdef list keys = [self.names.processes_key]
        cdef list args = [b"%d" % self.epoch, self.process_id, purpose, b"1" if asks else b"0", b"%d" % self.fleet.told_count(),
                          b"%d" % self.knows_until()]
        if named:
            keys.append(self.names.layout_key)
            args.append(self.names.layout)
        return ControlCall("beat", keys, args, done)

    cdef int64_t knows_until(self) noexcept:
        """The store's time in its last reply of the known epoch; 1 if only older ones are known of, 0 if nothing is."""
        return self.newest_us if self.newest_us else 1 if self.bounds.used else 0

    cdef Assertions assert_all(self, int64_t epoch, int64_t held_us):
        cdef Assertions assertions = Assertions.__new__(Assertions)
        assertions.bounds = self.bounds
        assertions.epoch, assertions.before = epoch, self.epoch
        assertions.newest_us, assertions.held_us = self.knows_until(), held_us
        assertions.held_older = 0 < self.told_us < held_us
        return assertions

    cdef ControlCall next_call(self, int64_t now_us, int rows_max, bint asserts):
        """The next charge or, if it `asserts`, the next assertion, of at most `rows_max` keys; None if there is none."""
        cdef ControlCall call = None
        if self.calls:
            call = self.aged(self.calls.popleft(), now_us)
        while call is None and self.bounds.owing:
            owing = self.bounds.owing
            owed = self.shares.take_owed(ROWS_MAX, now_us + self.ahead_us, ROWS_MAX)
            if not owed and self.bounds.owing == owing:
                break
            if owed:
                call = self.charge(owed, self.process_id + urandom(8).hex().encode(), now_us)
        if call is None and asserts and self.assertions is not None:
            call = self.assertions.next_call(rows_max, self.ahead_us, now_us)
        if call is not None:
            if call.assertions is not None:
                call.last_args = [self.process_id, b"%d" % (<Assertions>call.assertions).level(), b"%d" % call.first]
            call.deadline_us = now_us
            self.out.add(call)
        return call

    cdef bint idle(self) noexcept:
        """Whether no charge waits to be sent."""
        return not self.calls

    cdef int lose(self, ControlCall call) except -1:
        """Its reply is lost: have it sent again, unless it is for an older epoch."""
        if call in self.out:
            self.out.discard(call)
            self.put_back(call)
        return 0

    cdef int put_back(self, ControlCall call) except -1:
        if call.assertions is None:
            self.calls.append(call)
        elif call.assertions is self.assertions:  # else another epoch has assertions of its own
            self.assertions.again.append(call)
        return 0

    cdef int take_over(self, int64_t now_us) except -1:
        """Have calls sent again whose connection hasn't looked for a reply in time: its loop stands still, or has stopped."""
        cdef ControlCall call, twin
        for call in list(self.out):
            if call.deadline_us + STALLED_US <= now_us:
                self.out.discard(call)
                # Another one, since the first is still in that connection's hands.
                twin = call.twin()
                if call.assertions is not None and call in (<Assertions>call.assertions).out:
                    (<Assertions>call.assertions).out[twin] = (<Assertions>call.assertions).out.pop(call)
                self.put_back(twin)
        return 0

    cdef int heard(self, ControlCall call, int64_t server_us) except -1:
        """The store has answered a call."""
        self.out.discard(call)
        if call.assertions is not None:
            (<Assertions>call.assertions).heard(call)
            if call.assertions is self.assertions and self.assertions.over:
                self.told_us = server_us
                self.assertions = None
        return 0

    cdef int deferred(self, ControlCall call, int first) except -1:
        """The store has taken in the items before `first`. The others would have held it for too long: another call has them."""
        self.out.discard(call)
        if call in (<Assertions>call.assertions).out:
            call.first = first
            self.put_back(call)
        return 0

    cdef ControlCall aged(self, ControlCall call, int64_t now_us):
        """Give what a call charges the age that it has by now."""
        cdef int64_t past_us = now_us - call.owed_us
        if call.owed is None or past_us <= 0:
            return call
        return self.charge([(rule, name, hashed, newest + past_us,
                             [(age + past_us if ages_on(rule, age) else age, units) for age, units in ages])
                            for rule, name, hashed, newest, ages in call.owed], call.marker, now_us)

    cdef ControlCall charge(self, list owed, bytes marker, int64_t now_us):
        """A call that charges what was admitted here while the store was away. By its marker the store charges it once only."""
        cdef ControlCall call
        cdef list names = []
        cdef list words = [rule_words(&(<CompiledRule>item[0]).terms, 0, now_us + self.ahead_us) for item in owed]
        cdef list rules = list(dict.fromkeys(words))
        cdef list args = [b"charge", b"%d" % len(rules), b"%d" % len(owed), *[word for rule in rules for word in rule]]
        cdef int place = 0
        for _, name, _, newest, units in owed:
            names.append(name)
            place += 1
            args += [b"%d" % number for number in (place, rules.index(words[place - 1]) + 1, newest, len(units))]
            args += [b"%d" % number for pair in units for number in pair]
        call = ControlCall("repair", names + [self.names.charged_key + marker], args)
        call.owed, call.owed_us, call.marker = owed, now_us, marker
        return call

    cdef int note_generation(self, PendingDecision sample, int64_t generation, int64_t server_us, int64_t now_us) except -1:
        """Forget what a key had used before its reset. Remember the reset for as long as another process may know of that use."""
        cdef Shard* shard
        cdef uint32_t index
        cdef Bound* bound = self.bounds.bound_of(sample.hashed, &shard, &index)
        cdef int64_t left_us
        if bound == NULL:
            bound = self.shares.add_bound(sample, now_us, shard)
        if generation <= bound.generation_us:
            return 0
        left_us = reset_reach(bound.cell.view.terms) - max(<int64_t>0, server_us - generation)
        bound.generation_us = generation
        bound.keep_until_us = max(bound.keep_until_us, now_us + left_us)
        bound.epoch = self.epoch
        if bound.account != NULL and bound.account.newest_us <= generation:
            self.bounds.drop_account(shard, bound)
        if bound.lease_at_us - lead_us(sample.rule) <= generation:
            bound.lease_units = 0            # no state counts them any more
        return 0
