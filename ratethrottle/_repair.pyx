# cython: auto_pickle=False, autotestdict=False
"""What a storage knows of its store, and what the store has to be told when it has lost something (DESIGN: repair).

An epoch is one run of one server over one data set. A process that finds itself in another one than before asserts what it knows,
charges what it admitted meanwhile, and leaves the others time to do the same. docs/arithmetic.md («Repair») has what the store
makes of it. No I/O.
"""

cimport cython
from libc.stdint cimport int64_t, uint32_t

from ratethrottle._arithmetic cimport Terms, view_reach
from ratethrottle._bound cimport Bound, bound_assertion
from ratethrottle._core cimport CompiledRule, KeyTable, PendingDecision
from ratethrottle._layout cimport Layout
from ratethrottle._outage cimport Shares
from ratethrottle._table cimport Shard, slot_at, tags_of

from collections import deque
from os import urandom
from weakref import WeakSet


cdef enum:
    ROWS_MAX = 128                           # keys of an errand
    WHOLE_US = 3_000_000                     # for so long processes must have been counted without a gap: then all that live have come
    FEWER_US = 1_000_000                     # for so long the store must have counted fewer
    PERIOD_US = 900_000                      # for so long at least the store takes marks, before it counts them
    SMALL_FLEET = 50                         # processes whose beats are all scripts
    MARKS_MAX = 60                           # between two scripts
    EACH_US = 100                            # between two beats, for each process there is
    ALIKE_US = 450_000                       # two beats of half a second agree
    MANY = 1_000_000_000                     # processes: more than there ever are
    STALLED_US = 250_000                     # after its deadline an errand is another line's to run, if its own is stalled

cdef int64_t LEVEL_MAX = <int64_t>1 << 52


cdef tuple rule_words(const Terms* terms):
    """A rule as scripts take it, but for its leases."""
    return (chr(terms.kind).encode(), *[b"%d" % number for number in (
        terms.capacity, terms.window_us, terms.unit_ticks, terms.drain_ticks, terms.slot_us, terms.coarse_us, 0)])


cdef tuple nothing_known(const Terms* terms):
    """The numbers of an assertion that tells a generation only."""
    if terms.kind == c"b":
        return -LEVEL_MAX, 0, 0
    return 0, 1, 0


cdef int64_t reset_reach(const Terms* terms) noexcept:
    """For how long what a key had used before a reset may matter to somebody: a bucket may owe twice its capacity."""
    return 2 * view_reach(terms) if terms.kind == c"b" else view_reach(terms)


cdef bint age_counts(CompiledRule rule) noexcept:
    """A bucket is told what it holds, not since when: that stays, which is too strict by what has drained meanwhile."""
    return rule.terms.kind != c"b"


@cython.final
cdef class Errand:
    """A script call that isn't a check's: a beat, or what the store has to be told. `done` gets its reply's numbers, if they matter."""

    def __init__(self, str script not None, list keys not None, list args not None, done=None, *, bint again=False):
        self.script = script
        self.keys = keys
        self.args = args
        self.done = done
        self.again = again


@cython.final
cdef class Knowledge:
    """What the storages of one process share that keep their keys under one prefix on the same server: to it, they are one process."""

    def __init__(self, KeyTable bounds not None, Layout layout not None, int64_t expected=0):
        self.bounds = bounds
        self.layout = layout
        self.shares = Shares(bounds, layout)
        self.expect(expected)
        self.errands = deque()
        self.charged = []
        self.out = set()
        self.process_id = urandom(8).hex().encode()
        self.forks = bounds.forks
        self.users = WeakSet()
        self.slot = -1

    cdef bint forked(self) except -1:
        """In a process that was forked give up what belongs to the other: what it has to tell, and what it owes. True there, once."""
        self.bounds.notice_fork()
        if self.forks == self.bounds.forks:
            return False
        self.forks = self.bounds.forks
        self.process_id = urandom(8).hex().encode()
        # As they were counted, this one wasn't among them.
        self.processes = self.counted_us = 0
        self.sure = False
        self.doubt()
        self.shares.set_share(self.expected, max(self.expected - 1, 0))
        self.errands = deque()
        self.out = set()
        self.asserting = None
        self.charged = []
        return True

    @property
    def learning(self):
        """Whether others may still tell the store what they know, so that it grants nothing."""
        return self.bounds.now_us() < self.learning_until_us

    @property
    def owed(self):
        """For how many keys × rules something is left to charge, or being charged."""
        cdef Errand errand
        return self.bounds.owing + sum([len(errand.owed) for errand in (*self.errands, *self.out) if errand.owed is not None])

    def forget_all(self):
        """Know nothing of any key, and owe nothing: everything was cleared."""
        self.shares.clear()
        self.bounds.empty()
        self.errands = deque()
        self.out = set()
        self.asserting = None
        self.charged = []
        self.live_until_us = 0

    def expect(self, int64_t expected):
        """Note how many processes share the limits by a storage's options: of several numbers the largest. 0: it doesn't say."""
        if expected > self.expected:
            self.expected = expected
            # Of a rank that isn't known: no more than what each of them may have.
            if self.processes < expected:
                self.shares.set_share(expected, expected - 1)

    cdef bint meet(self, int64_t epoch, int64_t learning_us, int64_t count, int64_t rank, int64_t whole_us, bint forgets,
                   int64_t now_us) except -1:
        """Take up what a beat has told. True in another epoch: the store may have lost what is known here, and is told it.

        forgets: the store was cleared in that epoch, or since the one known here.
        """
        cdef bint another = self.epoch and self.epoch != epoch
        if another and forgets:
            self.epochs += 1
            self.forget_all()
            another = False
        elif another:
            self.epochs += 1
            # What is still to be charged is charged here. An assertion that waits speaks of the epoch before.
            self.errands = deque([errand for errand in self.errands if (<Errand>errand).args[0] == b"charge"])
            self.asserting = self.assertions()
            self.shares.begin()
        if self.epoch != epoch:
            self.doubt()
        # Of one epoch it only becomes shorter, when all have come: a reply may be older than another line's.
        if self.epoch != epoch or self.learning_until_us <= now_us:
            self.learning_until_us = now_us + learning_us
        else:
            self.learning_until_us = min(self.learning_until_us, now_us + learning_us)
        self.epoch = epoch
        if count:                            # else it was only looked at
            self.take_count(count, rank, whole_us >= WHOLE_US, now_us)
        return another

    cdef int take_count(self, int64_t count, int64_t rank, bint whole, int64_t now_us) except -1:
        """Take up how many processes there are. `whole`: the store has counted for long enough to have heard of all of them."""
        cdef int64_t n
        cdef bint alike
        if count != self.last_count:
            self.last_count = count
            self.alike_since_us = now_us
        alike = now_us - self.alike_since_us >= ALIKE_US
        if count >= self.processes:
            self.sure = count == self.processes and alike
            self.processes = count
            self.fewer_since_us = 0
        else:
            self.sure = False
            if self.fewer_since_us == 0:
                # They may have been forgotten only, by a store that lost its data.
                self.fewer_since_us = now_us
            if whole and now_us - self.fewer_since_us >= FEWER_US:
                self.processes = count
                self.fewer_since_us = 0
        # A share that is too large is granted by each of them: until the count is settled, the largest number that anything says.
        n = self.processes if whole else max(self.processes, self.expected)
        # Where nothing else has said how many there are, two beats must agree.
        if whole or alike or self.expected or self.shares.n:
            self.shares.set_share(n, rank if count == n and (alike or whole) and 0 <= rank < n else n - 1)
        return 0

    cdef int doubt(self) except -1:
        """Who was counted must be counted anew: the store is another one, or wasn't reached for a while."""
        self.last_count = self.fewer_since_us = 0
        self.slot = -1
        return 0

    cdef int64_t period_us(self) noexcept:
        return max(<int64_t>PERIOD_US, EACH_US * self.last_count)

    cdef bint may_mark(self, int64_t now_us) noexcept:
        """Whether its slot is known to be its own still, and marking it enough."""
        return (self.slot >= 0 and self.last_count > SMALL_FLEET and self.marks < MARKS_MAX
                and now_us - self.marked_us < self.period_us() + self.period_us() // 2)

    cdef int64_t pace_us(self, int64_t least_us) noexcept:
        """How long to wait between two beats: the store has about ten thousand a second at most, of all processes together."""
        return max(least_us, EACH_US * max(self.processes, self.last_count))

    cdef Errand beat(self, bytes purpose, bint asks, bint named, done):
        """Say that this process is there or leaves, or look which epoch this is, and what was evicted if it `asks`.

        named: say how keys are called, too.
        """
        # Who isn't sure how many there are has everybody wait for as long as may be.
        number = self.processes if self.sure or self.processes == 0 else MANY
        cdef list keys = [self.layout.processes_key]
        cdef list args = [self.process_id, purpose, b"1" if asks else b"0", b"%d" % number]
        if named:
            keys.append(self.layout.layout_key)
            args.append(self.layout.layout)
        return Errand("beat", keys, args, done)

    cdef Errand next_errand(self, int64_t now_us):
        """What the store has to be told next, or None."""
        cdef Errand errand = None
        if self.errands:
            errand = self.aged(self.errands.popleft(), now_us)
        elif self.asserting is not None:
            errand = next(self.asserting, None)
            if errand is None:
                self.asserting = None
        while errand is None and self.bounds.owing:
            owing = self.bounds.owing
            owed = self.shares.take_owed(ROWS_MAX, now_us + self.ahead_us)
            if not owed and self.bounds.owing == owing:
                break
            if owed:
                errand = self.charge(owed, self.process_id + urandom(8).hex().encode(), now_us)
        if errand is not None:
            errand.deadline_us = now_us
            self.out.add(errand)
        return errand

    cdef bint idle(self) noexcept:
        """Whether there is nothing left to be told."""
        return self.asserting is None and not self.errands

    cdef int forget_errand(self, Errand errand) except -1:
        """Its reply is lost: it is told again, if that does no harm."""
        if errand in self.out:
            self.out.discard(errand)
            self.errands.append(errand)
        return 0

    cdef int take_over(self, int64_t now_us) except -1:
        """Have errands run again whose line hasn't looked for an answer in time: its loop stands still, or isn't run any more."""
        cdef Errand errand, twin
        for errand in list(self.out):
            if errand.deadline_us + STALLED_US <= now_us:
                self.out.discard(errand)
                # Another one, since the first is still in the line's hands.
                twin = Errand(errand.script, errand.keys, errand.args, again=True)
                twin.owed, twin.owed_us, twin.marker = errand.owed, errand.owed_us, errand.marker
                self.errands.append(twin)
        return 0

    cdef int heard(self, Errand errand) except -1:
        """The store has answered an errand."""
        self.out.discard(errand)
        return 0

    cdef Errand aged(self, Errand errand, int64_t now_us):
        """What is charged is as old as it is by now, however late it is told again."""
        cdef int64_t past_us = now_us - errand.owed_us
        if errand.owed is None or past_us <= 0:
            return errand
        return self.charge([(rule, name, hashed, newest + past_us,
                             [(age + past_us if age_counts(rule) else age, units) for age, units in ages])
                            for rule, name, hashed, newest, ages in errand.owed], errand.marker, now_us)

    def assertions(self):
        """Errands that assert what is known, shard by shard."""
        cdef uint32_t i
        cdef list rows = []
        for i in range(self.bounds.shard_count):
            rows += self.known_in(i, self.bounds.now_us())
            while len(rows) >= ROWS_MAX:
                yield self.assertion(rows[:ROWS_MAX])
                del rows[:ROWS_MAX]
        while rows:
            yield self.assertion(rows[:ROWS_MAX])
            del rows[:ROWS_MAX]

    cdef list known_in(self, uint32_t index, int64_t now_us):
        """What a shard of the bounds knows: rows of name, rule, generation, and the three numbers of an assertion."""
        cdef Shard* shard = &self.bounds.shards[index]
        cdef const Bound* bound
        cdef int64_t[3] numbers
        cdef uint32_t i
        cdef list rows = []
        for i in range(shard.room):
            if not tags_of(shard)[i]:
                continue
            bound = <Bound*>slot_at(shard, i)
            # What was heard in this very epoch, the store knows.
            if bound.name == NULL or bound.epoch == self.epoch:
                continue
            generation = bound.generation_us
            if now_us + self.ahead_us - generation >= reset_reach(bound.slot.view.terms):
                generation = 0
            if bound_assertion(bound, now_us, numbers):
                rows.append((bound.name[:bound.name_size], rule_words(bound.slot.view.terms), generation,
                             numbers[0], numbers[1], numbers[2]))
            elif generation:
                # That a key was reset has to be told even if nothing else is known of it.
                rows.append((bound.name[:bound.name_size], rule_words(bound.slot.view.terms), generation,
                             *nothing_known(bound.slot.view.terms)))
        return rows

    cdef Errand assertion(self, list rows):
        cdef list rules = list(dict.fromkeys([row[1] for row in rows]))
        cdef list args = [b"assert", b"%d" % len(rules), b"%d" % len(rows), *[word for rule in rules for word in rule]]
        cdef int place = 0
        for row in rows:
            place += 1
            args += [b"%d" % number for number in (place, rules.index(row[1]) + 1, *row[2:])]
        return Errand("repair", [row[0] for row in rows], args, again=True)

    cdef Errand charge(self, list owed, bytes marker, int64_t now_us):
        """Charge what was admitted here while the store was away. The marker has it charged once, however often it is told."""
        cdef Errand errand
        cdef list names = []
        cdef list words = [rule_words(self.bounds.terms_of(item[0])) for item in owed]
        cdef list rules = list(dict.fromkeys(words))
        cdef list args = [b"charge", b"%d" % len(rules), b"%d" % len(owed), *[word for rule in rules for word in rule]]
        cdef int place = 0
        for _, name, _, newest, units in owed:
            names.append(name)
            place += 1
            args += [b"%d" % number for number in (place, rules.index(words[place - 1]) + 1, newest, len(units))]
            args += [b"%d" % number for pair in units for number in pair]
        errand = Errand("repair", names + [self.layout.charged_key + marker], args, again=True)
        errand.owed, errand.owed_us, errand.marker = owed, now_us, marker
        return errand

    cdef int note_generation(self, PendingDecision sample, int64_t generation, int64_t server_us, int64_t now_us) except -1:
        """Remember that a key was reset, for as long as somebody may know what it had used before, and forget that here."""
        cdef Shard* shard
        cdef uint32_t index
        cdef Bound* bound = self.bounds.bound_of(sample.hashed, &shard, &index)
        cdef int64_t left_us
        if bound == NULL:
            bound = self.shares.add_bound(sample, now_us, shard)
        if generation <= bound.generation_us:
            return 0
        left_us = reset_reach(bound.slot.view.terms) - max(<int64_t>0, server_us - generation)
        bound.generation_us = generation
        bound.keep_until_us = max(bound.keep_until_us, now_us + left_us)
        bound.epoch = self.epoch
        if bound.account != NULL and bound.account.newest_us <= generation:
            self.bounds.drop_account(shard, bound)
        if bound.lease_at_us - (sample.rule.lease_us if sample.rule.terms.kind == c"s" else 0) <= generation:
            bound.lease_units = 0            # nobody counts them any more
        return 0
