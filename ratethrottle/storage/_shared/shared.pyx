# cython: auto_pickle=False, autotestdict=False
"""The compiled part of a storage that processes share: which connection's batch a check belongs to."""

from libc.stdint cimport int64_t, uint32_t, uint64_t

from ratethrottle._core cimport Backend, CHECK, Group, Mode, NEW, PARKED, Parts, PEEK, PendingDecision, RESET, WAITING
from ratethrottle._engine.arithmetic cimport Outcome
from ratethrottle._engine.bound cimport Bound, bound_books, DENIED, OPEN
from ratethrottle._engine.decision cimport Entry, PREFILTER
from ratethrottle._engine.definitions cimport CompiledRule
from ratethrottle._engine.joint cimport Joint, joint_count, joint_decision, PARTS_MAX
from ratethrottle._engine.table cimport cell_at, Hash128, Place, shard_find
from ratethrottle._several cimport pending_joint
from ratethrottle.storage._shared.batch cimport Batch
from ratethrottle.storage._shared.context cimport StorageContext
from ratethrottle.storage._shared.keynames cimport KeyNames, pending_of
from ratethrottle.storage._shared.repair cimport Repair
from ratethrottle.storage._shared.waiting cimport Waiting

from asyncio import _get_running_loop as running_loop

from ratethrottle.errors import StorageUnavailable


cdef object loop_here():
    loop = running_loop()
    if loop is None:
        raise StorageUnavailable("Redis storage is for asyncio: it needs a running asyncio event loop")
    return loop


cdef class SharedStorage(Backend):
    """Finds the batch of a check. One for all event loops of a process.

    names: of the keys. repair: what is known of the store, which other storages of this process that have the same keys share.
    deadline_us: how long a check may wait. ttl_us: how long a bound denies without asking again. on_outage: what decides while the
    store is away, if a rule doesn't say. expected: how many processes share the limits (0: unknown) until the store has counted
    them. deny_overload: what is too much for the queue is denied, instead of an error.
    """

    cdef readonly StorageContext context
    cdef unsigned forks
    cdef object here                         # the event loop that asked last, and its batches
    cdef tuple here_batches
    cdef unsigned here_forks

    def __init__(self, KeyNames names not None, Repair repair not None, int64_t deadline_us, int64_t ttl_us,
                 str on_outage not None="raise", int64_t expected=0, *, bint deny_overload=False):
        self.context = StorageContext(names, repair, deadline_us, ttl_us, on_outage, deny_overload)
        self.bounds = repair.bounds
        self.ttl_us = ttl_us
        self.on_outage = self.context.on_outage
        repair.fleet.expect(expected)
        self.forks = repair.bounds.forks

    @property
    def repair(self): return self.context.repair

    @property
    def names(self): return self.context.names

    def _batches_here(self):
        """The batches of the running loop and this process, as a tuple."""
        raise NotImplementedError

    cdef Batch batch_of(self, Hash128 hashed):
        cdef tuple found = self.here_batches
        cdef Batch picked
        loop = loop_here()
        # Every check looks its key up in the bounds first, and that notices a fork.
        if loop is self.here and self.here_forks == self.bounds.forks:
            picked = <Batch>found[<Py_ssize_t>(hashed.lo % <uint64_t>len(found))]
            if not picked.has_ended():             # it ends with its loop's tasks, whatever cancelled them
                return picked
        # Kept in `found`: before this goes on, another thread may have put its own here.
        found = self._batches_here()
        self.here_batches = found
        self.here = loop
        self.here_forks = self.bounds.forks
        return <Batch?>found[<Py_ssize_t>(hashed.lo % <uint64_t>len(found))]

    def _forked(self):
        """Whether this is the first call in a forked process. It gives up what belongs to the parent then."""
        self.context.repair.forked()         # once, for all storages that share it
        if self.forks == self.bounds.forks:
            return False
        self.forks = self.bounds.forks
        return True

    def _forget_here(self):
        """Ask for the batches anew."""
        self.here = None
        self.here_batches = ()

    cdef int ask(self, PendingDecision pending) except -1:
        self.batch_of(pending.hashed).enter(pending)
        return 0

    cdef int leave(self, PendingDecision pending) except -1:
        if pending.stage == WAITING or pending.stage == PARKED:
            (<Waiting>pending.place).drop(pending)
        return 0

    cdef PendingDecision entered(self, entry, Mode mode):
        """What an Entry asks, or a Joint."""
        cdef PendingDecision pending
        cdef Place[PARTS_MAX] places
        if not isinstance(entry, Entry):
            self.bounds.locate_joint(<Joint?>entry, places)
            return pending_joint(<Joint>entry, places, mode)
        pending = pending_of(<Entry>entry, mode)
        pending.hashed = self.bounds.hash_entry(<Entry>entry)
        return pending

    def _settle(self, Joint settlement not None):
        """Begin to settle a reservation. Returns the Group whose future says that it is settled, or None if it is."""
        cdef Place[PARTS_MAX] places
        cdef int64_t now_us
        cdef int p
        if settlement.granted_here:
            self.bounds.locate_joint(settlement, places)
            members = (<Parts>pending_joint(settlement, places, CHECK).text).members
            now_us = self.bounds.now_us() + self.context.repair.ahead_us
            for p in range(settlement.size):
                if settlement.refunds >> p & 1:
                    self.context.repair.shares.give_back(<PendingDecision>members[p], now_us, settlement.granted_us)
            settlement = settlement.charges_alone()
            if settlement is None:
                return None
        return self._ask_together([settlement], "check")

    def book(self, Joint booking not None):
        """The decision on a booking, if what is known denies it; else an awaitable that asks for it. That doesn't wait for its turn."""
        cdef CompiledRule rule = <CompiledRule>booking.rules[0]
        cdef PendingDecision pending
        cdef Place[PARTS_MAX] places
        cdef Outcome out
        cdef int64_t now_us, found
        cdef int verdict = OPEN, reported = 0
        self.bounds.locate_joint(booking, places)
        now_us = self.bounds.now_us()
        found = shard_find(places[0].shard, places[0].hashed)
        if found >= 0:
            verdict = bound_books(<Bound*>cell_at(places[0].shard, <uint32_t>found), places[0].terms, now_us, booking.costs[0],
                                  &booking.booking, self.ttl_us, &out)
        if verdict == DENIED and not (self.bounds.away and self.allows(rule)):
            decision = joint_decision(booking, PREFILTER, &out, &reported, 1, False)
            joint_count(decision)
            return decision
        pending = pending_joint(booking, places, CHECK)
        pending.stage = NEW
        pending.backend = self
        return pending

    def _unbook(self, Joint unbooking not None):
        """Begin to give a booking back, unless that would take a new connection. Returns the Group that does it, or None."""
        cdef tuple found = self.here_batches
        if running_loop() is not self.here or not found or self.here_forks != self.bounds.forks:
            return None
        for batch in found:
            if not batch.serving:
                return None
        return self._ask_together([unbooking], "check")

    def _ask_together(self, entries, str mode not None):
        """Enter checks (or peeks, or resets) one after the other; returns the Group whose future says that all are decided."""
        cdef Group group = Group.__new__(Group)
        cdef PendingDecision pending
        cdef Mode kind = PEEK if mode == "peek" else RESET if mode == "reset" else CHECK
        group.future = loop_here().create_future()
        group.deadline_us = self.bounds.now_us() + self.context.deadline_us
        group.members = [self.entered(entry, kind) for entry in entries]
        group.left = len(group.members) + 1
        try:
            for pending in group.members:
                pending.backend = self
                pending.group = group
                self.batch_of(pending.hashed).enter(pending)
        except BaseException:
            group.leave()
            raise
        group.left -= 1
        if group.left == 0 and not group.future.done():
            group.future.set_result(None)
        return group
