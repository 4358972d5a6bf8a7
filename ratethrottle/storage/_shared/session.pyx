# cython: auto_pickle=False, autotestdict=False
"""One connection's session with the store: beats, and the control calls that must come before checks."""

cimport cython
from libc.stdint cimport int64_t

from ratethrottle.storage._shared.call cimport Call, ControlCall, MarkCall
from ratethrottle.storage._shared.context cimport StorageContext
from ratethrottle.storage._shared.exchange cimport Exchange
from ratethrottle.storage._shared.fallback cimport Fallback, repairing
from ratethrottle.storage._shared.fleet cimport WHOLE_US
from ratethrottle.storage._shared.heartbeat cimport Heartbeat
from ratethrottle.storage._shared.known cimport KnownKeys
from ratethrottle.storage._shared.link cimport AWAY, BEATING, ENDED, LEARNING, Link, REFUSED, SERVING, TELLING
from ratethrottle.storage._shared.repair cimport Repair
from ratethrottle.storage._shared.reply cimport CALL_ITEMS_MAX
from ratethrottle.storage._shared.waiting cimport Waiting


cdef enum:
    FREE_US = 10_000                         # between two shards that are freed, of those that a clear() has emptied
    ROW_US = 40                              # of the store's time, at most, for a key that is asserted
    ROWS_MIN = 4
    REFUSED_UNREADABLE = 2                   # why the store doesn't take an item of a repair: its state can't be read
    REFUSED_DEFERRED = 3                     # or the item, and those behind it, would have held the store for too long


@cython.final
cdef class Session:
    """The calls of a connection besides checks. schedule: called when checks may be sent."""

    def __init__(self, StorageContext context not None, Link link not None, Exchange exchange not None, Waiting waiting not None,
                 KnownKeys known not None, Fallback fallback not None, schedule):
        self.context = context
        self.link = link
        self.exchange = exchange
        self.waiting = waiting
        self.known = known
        self.fallback = fallback
        self.schedule = schedule
        self.heartbeat = Heartbeat(context)

    cdef int begin(self) except -1:
        """There is a connection."""
        self.heartbeat.connected()
        self.link.enter(BEATING)
        return self.beat()

    cdef int end(self) except -1:
        """The connection is gone."""
        self.heartbeat.lost()
        self.known.epoch = 0
        return self.tell_moved_on()

    cdef inline bint knows_epoch(self) noexcept:
        """Whether a control call can be sent."""
        return self.link.is_open() and self.heartbeat.epoch != 0 and self.heartbeat.epoch == self.context.repair.epoch

    cdef int tell_moved_on(self) except -1:
        if self.moved_on is not None:
            self.moved_on()
        return 0

    cdef int moved(self) except -1:
        """The store didn't run a call: this is another epoch than the call expected."""
        self.link.enter(BEATING)
        return self.beat()

    cdef int beat(self, bint whole=False) except -1:
        """Say that this process is there, and ask which epoch this is. whole: by the script."""
        cdef Call call = self.heartbeat.next_call(self.context.bounds.now_us(), whole, self.link.state == SERVING, self._beaten)
        return self.exchange.send(call) if call is not None else 0

    cdef int leave(self) except -1:
        """Say that this process leaves: then the others needn't wait until it isn't counted any more."""
        # Another limiter of this process may go on.
        if self.link.is_open() and self.heartbeat.epoch and not self.context.repair.users:
            self.exchange.send(self.context.repair.beat(b"leave", False, False, None))
        return 0

    def _beaten(self, numbers):
        """Take up the reply to a beat."""
        cdef int64_t epoch = numbers[1], now_us = self.context.bounds.now_us(), evicted
        cdef Repair repair = self.context.repair
        self.heartbeat.beating = False
        self.heartbeat.beaten_us = now_us
        self.heartbeat.named = self.heartbeat.named and self.heartbeat.epoch in (0, epoch)
        self.heartbeat.epoch = self.known.epoch = epoch
        self.exchange.writer.epoch_text = b"%b%016d%016d" % (self.exchange.writer.run, epoch, numbers[2])
        self.link.why &= ~REFUSED
        self.link.transport.answered()
        if repair.enter_epoch(epoch, numbers[3], numbers[7], numbers[8], now_us):
            repair.losses += 1
        if numbers[4]:                       # else the beat only looked
            repair.fleet.take_count(numbers[4], numbers[5], numbers[10] >= WHOLE_US, now_us)
        if self.context.losses != repair.losses:
            self.context.losses = repair.losses
            self.link.notice("state_lost", len(self.context.bounds))
        if self.context.bounds.evictions != self.told_evictions:
            self.told_evictions = self.context.bounds.evictions
            self.link.notice("bounds_evicted", self.context.bounds.evictions)
        if evicted := self.heartbeat.take_evicted(numbers[6]):
            self.link.notice("evicted", evicted)
        if numbers[9] >= 0:
            repair.fleet.take_slot(numbers[9])
        self.context.bounds.tidy(now_us)
        self.free_emptied()
        self.advance()
        self.arm_beat(now_us)

    cdef int marked(self, MarkCall call, const int64_t* numbers) except -1:
        """Take up the reply to a mark."""
        cdef int64_t now_us = self.context.bounds.now_us()
        if not self.heartbeat.take_mark(call, numbers, now_us):
            return self.beat(True)
        self.link.transport.answered()
        self.advance()
        return self.arm_beat(now_us)

    cdef int advance(self) except -1:
        """Send the control calls that are due. After them, and once other processes had their time too, checks are sent again."""
        cdef ControlCall call
        cdef Repair repair = self.context.repair
        cdef int64_t now_us = self.context.bounds.now_us()
        cdef int asserting = 0
        cdef bint others = False
        if not self.link.is_open() or self.heartbeat.epoch == 0:
            return 0
        if self.heartbeat.epoch != repair.epoch:  # another connection has found a later one meanwhile
            self.link.enter(BEATING)
            return self.beat()
        repair.take_over(now_us)
        for sent in self.exchange.in_flight:
            asserting += isinstance(sent, ControlCall) and (<ControlCall>sent).assertions is not None
        while self.exchange.has_room():
            # While checks are sent, one assertion at a time: several would make each check wait longer.
            call = repair.next_call(now_us, self.rows_max(), asserting == 0 or self.link.state != SERVING)
            if call is None:
                break
            asserting += call.assertions is not None
            self.exchange.send(call)
        if asserting == 0 and repair.assertions is not None and repair.assertions.waits() and not self.advancing:
            self.advancing = True
            self.waiting.call_soon(self._advance_on, context=self.waiting.context)
        # Checks wait for charges of other connections; those of this one come before them anyway. They don't wait for assertions:
        # the store decides no key of which it may have to hear more.
        for call in repair.out:
            others = others or (call.assertions is None and call not in self.exchange.in_flight)
        if now_us < repair.learning_until_us:
            self.link.enter(LEARNING)
            self.fallback.decide_waiting(repairing())
            self.waiting.arm_timer(now_us, repair.learning_until_us)
        # And a charge that has no room yet would come after checks that count on it.
        elif not repair.idle() or others or (self.context.bounds.owing and not self.exchange.has_room()):
            self.link.enter(TELLING)
        else:
            if self.link.enter(SERVING):
                self.begin_serving(now_us)
            self.known.queue_returns()
            self.schedule()
        return self.tell_moved_on()

    cdef int begin_serving(self, int64_t now_us) except -1:
        """Send checks again."""
        # The connection is there, so checks on it take little time.
        self.waiting.end_excuses(now_us)
        self.link.reason = None
        if self.link.why & AWAY or not self.link.served:  # an outage may have outlived the loop that met it
            self.link.come_back()
            self.link.served = True
            self.link.notice("recovery", None)
        return 0

    def _advance_on(self):
        """Go on sorting, which takes longer than the loop should stand still."""
        self.advancing = False
        self.advance()

    cdef int free_emptied(self) except -1:
        """Free what a `clear()` has emptied a shard at a time, while the loop goes on."""
        if self.context.bounds.emptied_count and not self.freeing:
            self.freeing = True
            self.waiting.loop.call_later(FREE_US / 1e6, self._free_on, context=self.waiting.context)
        return 0

    def _free_on(self):
        """Free the next shard."""
        self.freeing = False
        if self.link.state != ENDED:
            self.context.bounds.free_emptied()
            self.free_emptied()

    cdef int rows_max(self) noexcept:
        """How many keys an assertion has: those of all processes must not hold the store for longer than a check can wait."""
        cdef int64_t processes = max(<int64_t>1, self.context.repair.fleet.processes)
        return <int>max(<int64_t>ROWS_MIN, min(<int64_t>CALL_ITEMS_MAX, self.context.deadline_us // (ROW_US * processes)))

    cdef inline int arm_beat(self, int64_t now_us) except -1:
        return self.waiting.arm_timer(now_us, now_us + self.heartbeat.quiet_us(now_us))

    cdef int take_control(self, ControlCall call, const int64_t* numbers, int count) except -1:
        """Take up the reply to a control call."""
        cdef Repair repair = self.context.repair
        cdef int first = 0
        if call.script == "repair":
            first = self.tell_refusals(call, numbers, count)
        if first and call.assertions is not None:
            repair.deferred(call, first)
        else:
            repair.heard(call, numbers[0] if count else 0)
        if call.done is not None:
            call.done([numbers[i] for i in range(count)])
        if call.owed is not None:
            repair.charged.extend([item[:3] for item in call.owed])
        return self.advance() if self.repairs() else 0

    cdef int tell_refusals(self, ControlCall call, const int64_t* numbers, int count) except -1:
        """Announce what the store didn't take, by pairs of an item's number and why. Returns the item to go on with, or 0."""
        cdef int i, first = 0
        cdef dict refused = {}
        for i in range(2, count - 1, 2):
            if numbers[i + 1] == REFUSED_DEFERRED and call.first < numbers[i] <= call.key_count:
                first = <int>numbers[i]
            elif call.first <= numbers[i] <= len(call.keys):
                rule = self.context.names.rule_of(call.keys[numbers[i] - 1])
                if numbers[i + 1] == REFUSED_UNREADABLE:
                    self.link.notice("state_unreadable", rule)
                else:
                    refused[rule] = refused.get(rule, 0) + 1
        for rule, keys in refused.items():
            self.link.notice("repair_refused", f"a number is out of range for {keys} keys of rule {rule!r}")
        return first

    cdef int beat_if_due(self, int64_t now_us) except -1:
        """If nothing was sent for a while, see whether the store is still there, and still the same."""
        if self.link.is_open() and self.heartbeat.epoch and not self.heartbeat.beating:
            if self.heartbeat.due(now_us):
                self.beat()
            self.arm_beat(now_us)
        return 0

    cdef inline bint repairs(self) noexcept:
        """Whether there is something to assert, or this connection doesn't serve yet."""
        return self.link.state != SERVING or self.context.repair.assertions is not None
