# cython: auto_pickle=False, autotestdict=False
"""Checks travel together: what waits for a connection leaves as one call, and each check has its answer when the reply comes.

No I/O. Its transport says when there is a connection, sends the bytes of a `Batch`, and brings what came. It belongs to one event loop. Its
transport makes the connection and has seven methods: connect, retry_us, unsent, answered, refused, broken and late.
"""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from libc.stdint cimport int64_t, uint16_t

from ratethrottle._core cimport (
    CHECK, CHECK_JOINT, GIVE_BACK, Group, Mode, Parts, PEEK, PendingDecision, RESET, SENT, Waiter, WHOLE,
)
from ratethrottle._engine.definitions cimport CompiledRule
from ratethrottle._engine.table cimport Hash128
from ratethrottle.storage._shared.call cimport (
    Call, CALL_RULES_MAX, CallIndex, CheckCall, ControlCall, LoadCall, MarkCall, was_moved,
)
from ratethrottle.storage._shared.context cimport StorageContext
from ratethrottle.storage._shared.exchange cimport Exchange
from ratethrottle.storage._shared.fallback cimport Fallback, repairing
from ratethrottle.storage._shared.heartbeat cimport BEAT_US
from ratethrottle.storage._shared.item cimport CallItem, PART
from ratethrottle.storage._shared.keynames cimport pending_for
from ratethrottle.storage._shared.known cimport KnownKeys
from ratethrottle.storage._shared.late cimport late_replies_new
from ratethrottle.storage._shared.link cimport AWAY, CLOSED, CONNECTING, ENDED, Link, REFUSED, SERVING
from ratethrottle.storage._shared.queue cimport Queue, take, take_over
from ratethrottle.storage._shared.reply cimport BROKEN, CALL_ITEMS_MAX, INCOMPLETE, REPLY_BYTES_MAX, REPLY_NUMBERS_MAX
from ratethrottle.storage._shared.resp cimport read_line
from ratethrottle.storage._shared.session cimport Session
from ratethrottle.storage._shared.settle cimport Settlement
from ratethrottle.storage._shared.waiting cimport is_gone, NEVER_US, Waiting

from asyncio import current_task

from ratethrottle.errors import StorageProtocolError, StorageUnavailable
from ratethrottle.storage._shared.link import STATES as _STATES


cdef enum:
    HALVED_MIN = 32                          # checks that wait: so many are sent in two calls
    OWN_MIN = 8                              # items of a call that what nobody waits for may take, however many others wait
    STEPS_MAX = 256                          # tasks resumed in a row, before the loop has its turn


def _raised(error):
    """Raise an exception where the loop hears it."""
    raise error


@cython.final
cdef class Batch:
    """What waits for one connection of one event loop, and what is on its way there.

    The checks that wait when the connection has room for a call leave together, and equal ones of one key as one item: their
    order matters only among those of the same key.
    """

    def __init__(self, StorageContext context not None, transport, loop, Py_ssize_t max_waiting, timers=None):
        # Not the storage itself: that closes its connections when nobody holds it any more.
        self.context = context
        self.link = Link(context, transport)
        self.waiting = Waiting(loop, self._resume_tasks, self._on_timer, max_waiting, context.deadline_us, timers)
        self.known = KnownKeys(context, self.waiting)
        self.exchange = Exchange(context, self.waiting)
        self.fallback = Fallback(context, self.link, self.known, self.waiting)
        self.settlement = Settlement(context, self.link, self.known, self.waiting, self.fallback)
        self.session = Session(context, self.link, self.exchange, self.waiting, self.known, self.fallback, self._schedule)
        self.index = CallIndex()

    # How it stands, for its transport and for statistics:

    @property
    def state(self): return _STATES[self.link.state]

    @property
    def open(self): return self.link.is_open()

    @property
    def serving(self): return self.link.state == SERVING

    @property
    def ended(self): return self.link.state == ENDED

    @property
    def away(self): return bool(self.link.why & AWAY)

    @property
    def refused(self): return bool(self.link.why & REFUSED)

    @property
    def reason(self): return self.link.reason

    @property
    def session_id(self): return self.exchange.writer.session

    @property
    def callers(self): return self.waiting.callers

    @property
    def calls_in_flight(self): return len(self.exchange.in_flight)

    @property
    def asked(self):
        """Whether somebody waits for an answer of the store."""
        return self.waiting.callers > 0 or any(isinstance(call, CheckCall) for call in self.exchange.in_flight)

    @property
    def sent_calls(self): return self.exchange.sent_calls

    @property
    def sent_items(self): return self.exchange.sent_items

    @property
    def has_leases(self): return bool(self.known.leases)

    @property
    def lease_count(self): return self.known.count_leases()

    # What its transport tells:

    def connecting(self):
        """A connection is being made."""
        if self.link.state == CLOSED:
            self.link.enter(CONNECTING)

    def connected(self, write, dict scripts not None, bytes run not None):
        """There is a connection now, to that run of a server: `write` sends bytes on it.

        scripts: what is loaded there, name -> (SHA-1, text).
        """
        self.exchange.begin(write, scripts, run)
        self.settlement.took_us = 0
        self.session.begin()

    def not_connected(self, error):
        """An attempt to connect has failed, or can't be made."""
        self.link.enter(CLOSED)
        self.begin_outage(error)

    def begin_outage(self, error):
        """The store doesn't answer, or not in time, or refuses us: from now on policies decide, until it serves.

        A connection that serves is lost before. What is learned of the store then comes with its next beat.
        """
        self.fallback.begin(error)
        self.context.bounds.tidy(self.context.bounds.now_us())
        self.connect_if_closed()

    def lost(self, error):
        """The connection is gone. What was on its way may have been run, and gets `error`; what waits goes on waiting."""
        self.link.enter(CLOSED)
        self.session.end()
        for sent in self.exchange.end():
            self.settlement.fail(sent, error)
        self.settlement.unpark()
        self.waiting.scheduled = False
        self.schedule()
        if self.link.why & AWAY or self.context.bounds.now_us() < self.context.repair.live_until_us:
            # The store may have lost what is known here: then this process must tell it in time.
            self.connect_if_closed()

    def leave(self):
        """Say that this process goes, so that the shares of the others needn't wait for that."""
        self.session.leave()

    def end(self, error):
        """Give `error` to everybody, and leave nothing behind."""
        cdef bint was_open = self.link.is_open()
        self.link.come_back()
        self.link.notice("end", None)
        self.link.enter(ENDED)
        self.fallback.decide_waiting(error)
        if was_open:
            self.lost(error)
        self.waiting.end()

    def notice(self, what, fact):
        """Tell of something that happened."""
        self.link.notice(what, fact)

    def fail(self, Call sent not None, error, *, bint whatever=False):
        """Give everybody in a call what the outage policy says, or an error, `whatever` that is. A control call is sent again later."""
        self.settlement.fail(sent, error, whatever)

    cdef inline int connect_if_closed(self) except -1:
        if self.link.state == CLOSED:
            self.link.transport.connect()
        return 0

    # Control calls of others:

    def listen(self, moved_on):
        """Have `moved_on` called when control calls may be sent, in another epoch perhaps, and when they can't be any more."""
        self.session.moved_on = moved_on

    @property
    def knows_epoch(self): return self.session.knows_epoch()

    def send(self, ControlCall call not None):
        """Send a control call, as `knows_epoch`. It is done when its reply comes, unless that is lost or says that it wasn't run."""
        self.exchange.send(call)

    # Entering:

    cdef int enter(self, PendingDecision pending) except -1:
        """Queue a check whose answer has to be waited for, unless it can be given here and now after all."""
        cdef int64_t now_us = self.context.bounds.now_us()
        cdef bint asked = False
        if (pending.stale or pending.group is not None) and self.known.decide(pending, now_us, self.link.why & AWAY, &asked):
            return 0
        self.context.names.address(pending)
        pending.place = self.waiting
        if self.link.state != SERVING and self.fallback.applies(now_us):
            self.fallback.decide(pending, self.link.reason or repairing(), now_us)
            return self.connect_if_closed()
        if self.waiting.asking.count + self.waiting.parked.count >= self.waiting.most:
            self.fallback.overload(pending, f"{self.waiting.most} checks are waiting for Redis already")
            if pending.error is not None and pending.group is not None:
                raise pending.error          # nothing of the group that hasn't been sent is sent any more
            return 0
        if self.waiting.spares and self.waiting.asking.count == 0 and not self.exchange.in_flight:
            self.waiting.spares = 0          # that was for others
        self.waiting.enter(pending, now_us, asked)
        return self.schedule()

    def _resume_tasks(self):
        """Resume the tasks of all checks that were decided, in order, and send what they ask next."""
        cdef list woken = self.waiting.woken
        cdef Py_ssize_t i = 0, count = min(len(woken), <Py_ssize_t>STEPS_MAX), middle = count // 2 if count >= HALVED_MIN else 0
        self.waiting.woken = woken[count:]
        self.waiting.scheduled = True                # what they ask is sent below, so none of them need see to that
        try:
            while i < count:
                i += 1
                (<Waiter>woken[i - 1]).call()
                # When all replies came at once, the store would wait for the last of these tasks; not for a few hot keys, of which
                # two calls would hold what fits one.
                if i == middle and not self.exchange.in_flight and self.last_size >= HALVED_MIN // 2:
                    self._flush(whole=True)
                    self.waiting.scheduled = True
        finally:
            if i < count:                    # KeyboardInterrupt or SystemExit, which a task lets through, or no memory
                self.waiting.woken[:0] = woken[i:count]
            if i < len(woken):
                self.waiting.call_soon(self._resume_tasks, context=self.waiting.context)
            self._flush()
            self.schedule()                  # if there is no connection, or there was none left to send on

    # Sending what waits:

    def _schedule(self):
        self.schedule()

    cdef int schedule(self) except -1:
        """See that what waits is sent in this very tick of the loop: a lone check at once, and all that come with it together."""
        if self.waiting.scheduled or (self.waiting.asking.count == 0 and self.waiting.own.count == 0 and not self.context.repair.charged):
            return 0
        if not self.link.is_open():
            if self.waiting.asking.count or self.waiting.own.count:
                self.waiting.scheduled = True
                self.connect_if_closed()
        elif self.link.state == SERVING and self.exchange.has_room():
            self.waiting.scheduled = True
            if self.waiting.asking.count:
                self.waiting.begin_turn()
            self.waiting.call_soon(self._flush, context=self.waiting.context)
        return 0

    def _flush(self, bint whole=False):
        """Send what waits, as far as there is room. whole: not in two halves, as more is to come."""
        cdef CheckCall call
        cdef Waiting waiting = self.waiting
        self.waiting.scheduled = False
        if waiting.turn_due:
            waiting.count_from_now(self.context.bounds.now_us())
        if self.context.bounds.owing or self.context.repair.calls:  # the latter of another connection that has broken
            self.session.advance()
        while self.link.state == SERVING and self.exchange.has_room():
            if waiting.asking.count == 0 and waiting.own.count == 0:
                # The other place in flight stays free for what comes meanwhile.
                if self.exchange.in_flight or not self.context.repair.charged:
                    break
                self.look_at_charged()
            # Two calls of half the size keep both sides busy: one is decided while the other's checks are woken and asked anew.
            halved = (not whole and not self.exchange.in_flight and waiting.asking.count >= HALVED_MIN
                      and (<PendingDecision>waiting.asking.first).group is None)
            call = CheckCall.__new__(CheckCall)
            try:
                self.fill(call, min(<Py_ssize_t>CALL_ITEMS_MAX, (waiting.asking.count + 1) // 2) if halved else CALL_ITEMS_MAX)
                if call.size or call.parts:
                    self.last_size = self.exchange.send(call)
                    if call.sent_us - self.session.heartbeat.beaten_us >= self.context.repair.fleet.pace_us(BEAT_US):
                        self.session.beat()
            except BaseException:
                self.settlement.fail(call, StorageUnavailable("the check could not be sent"))
                raise

    cdef int fill(self, CheckCall call, int most) except -1:
        """Take what waits into a call, equal checks of a key as one of at most `most` items; none if nobody waits any more."""
        cdef int64_t now_us = self.context.bounds.now_us()
        cdef Py_ssize_t own = self.waiting.own.count
        self.index.clear()
        if self.waiting.timer is not None:   # it fires after this
            self.waiting.excuse(now_us, self.link.state == SERVING)
        self.fill_from(call, &self.waiting.asking, most - min(<int>min(own, <Py_ssize_t>OWN_MIN), most // 4), CALL_RULES_MAX, now_us)
        if own and (call.size == 0 or not call.mode & PEEK and call.mode != RESET):
            self.fill_from(call, &self.waiting.own, min(most, CALL_ITEMS_MAX - call.parts), CALL_RULES_MAX + OWN_MIN, now_us)
        if call.size or call.parts:
            call.sent_us = now_us
            call.epoch = self.session.heartbeat.epoch
            self.known.plan_leases(call)
        return 0

    cdef int fill_from(self, CheckCall call, Queue* queue, int most, int rules_most, int64_t now_us) except -1:
        """Take from a queue what goes with the call as it is."""
        cdef PendingDecision pending
        cdef CallItem* item
        cdef int64_t deadline_us = self.context.deadline_us
        cdef int64_t soon_us = now_us + min(self.settlement.took_us + self.settlement.took_us // 2, deadline_us // 4 * 3)
        cdef Mode mode
        cdef uint16_t place
        cdef bint asked = False
        while queue.first != NULL:
            pending = <PendingDecision>queue.first
            if is_gone(pending):
                self.waiting.drop(pending)
                continue
            # Nor what would be answered too late: it would be counted for nothing.
            if pending.deadline_us <= soon_us and self.waiting.excused_until_us <= now_us:
                take(queue, pending)
                self.fallback.run_out(pending, now_us)
                continue
            mode = pending.mode
            if mode >= GIVE_BACK:
                if mode != GIVE_BACK:
                    if not self.fill_joint(call, queue, pending, &most, &rules_most):
                        break
                    continue
                mode = CHECK
            if mode != call.mode and not call.takes(mode):
                break
            place = self.index.find(call, pending.hashed)
            item = &call.items[self.index.places[place] - 1] if self.index.places[place] else NULL
            # Units that this process holds by now go first: a call would give them back.
            if pending.rule.lease_units and item == NULL and self.known.decide(pending, now_us, self.link.why & AWAY, &asked):
                take(queue, pending)
                continue
            # Of a key's items the newest decides whether this one is equal to it: their order is kept. Parts are decided last.
            if item == NULL or not call.joins(item, pending):
                if call.size >= most or len(call.rules) >= rules_most or (item != NULL and item.role == PART):
                    break
                item = call.add_item(pending, item.key_index if item != NULL else call.keys + 1)
                self.index.places[place] = <uint16_t>call.size
            take_over(queue, &item.waiters, pending)
            item.count += 1 if pending.mode == CHECK else 0
            pending.stage = SENT
            if call.deadline_us == 0:
                call.deadline_us = pending.deadline_us
        return 0

    cdef bint fill_joint(self, CheckCall call, Queue* queue, PendingDecision pending, int* most, int* rules_most) except -1:
        """Take the first of a queue, a joint check, with the call; False if it has to wait for the next one.

        most: items that aren't parts. Of half the checks that wait, each joint one is one, however many parts it has.
        """
        cdef Parts parts = <Parts>pending.text
        cdef int size = parts.joint.size, room = CALL_ITEMS_MAX - (OWN_MIN if self.waiting.own.count else 0)
        cdef CallItem* item = NULL
        if (call.size or call.parts) and call.mode != pending.mode and call.mode != pending.mode - CHECK_JOINT:
            return False
        if call.parts:
            item = self.index.find_joint(call, parts)
        if item == NULL:
            # What was deferred is not decided behind others again.
            if (call.size >= most[0] or call.size + call.parts + size > room or parts.deferred and call.size
                    or not call.has_rules_for(parts.joint.rules)):
                return False
            call.mode = pending.mode
            item = self.index.add_joint(call, parts, self.session.heartbeat.epoch)
            most[0] = min(most[0] - 1, room - call.parts)
            if parts.deferred:
                rules_most[0] = 0
        take_over(queue, &item.waiters, pending)
        item.count += pending.mode == CHECK_JOINT
        pending.stage = SENT
        if call.deadline_us == 0:
            call.deadline_us = pending.deadline_us
        return True

    cdef int look_at_charged(self) except -1:
        """Ask what the store says of some keys that were charged, so that this too is known if it loses them."""
        cdef PendingDecision pending
        cdef CompiledRule rule
        cdef int _row
        charged = self.context.repair.charged
        for _row in range(min(<Py_ssize_t>CALL_ITEMS_MAX, len(charged))):
            rule, name, hashed = charged.popleft()
            pending = pending_for(rule, name, WHOLE, 0, PEEK)
            pending.hashed = Hash128(hashed[0], hashed[1])
            self.waiting.enter_own(pending)
        return 0

    # Deadlines:

    def _on_timer(self):
        """Judge what has waited too long, and see to what comes by time."""
        cdef PendingDecision pending
        cdef int64_t now_us = self.context.bounds.now_us()
        self.waiting.timer = None
        try:
            if not self.waiting.spared(now_us, self.first_deadline_us(), self.link.state == SERVING):
                if self.expire_calls(now_us):
                    self.link.transport.late()
                while (pending := self.waiting.take_late(now_us)) is not None:
                    self.fallback.run_out(pending, now_us)
            self.known.give_back(now_us, self.link.state == SERVING)
            self.schedule()
            if self.session.repairs() or self.context.bounds.owing:
                self.session.advance()
            self.session.beat_if_due(now_us)
        finally:                             # whatever it was, nobody may be left waiting
            self.arm_again(now_us)

    cdef int64_t first_deadline_us(self) except -1:
        """When the next one of all that waits has waited too long; NEVER_US if nothing does."""
        return min(self.waiting.first_deadline_us(), self.exchange.first_deadline_us())

    cdef int arm_again(self, int64_t now_us) except -1:
        """Have the timer fire when the next one of all that waits has waited too long, or the next lease ends."""
        cdef int64_t next_us = self.first_deadline_us()
        if next_us < NEVER_US:
            next_us = max(next_us, self.waiting.spared_until_us) if self.waiting.spares else next_us
            next_us = min(next_us, self.waiting.tick_us(now_us))
        next_us = min(next_us, self.known.first_lease_us())
        return self.waiting.arm_timer(now_us, next_us) if next_us < NEVER_US else 0

    cdef bint expire_calls(self, int64_t now_us) except -1:
        """Answer checks that have waited too long for a reply; True if one is late, counted from when it was asked for."""
        cdef bint late = False
        cdef Call call
        for call in list(self.exchange.in_flight):
            if isinstance(call, CheckCall):
                late = late or call.sent_us + self.context.deadline_us <= now_us
                if call.deadline_us <= now_us:
                    self.settlement.expire(<CheckCall>call, now_us, self.session.heartbeat.heard_us, late)
            else:
                late = late or call.deadline_us <= now_us
        return late

    # Reading replies:

    def received(self, bytes data not None):
        """Take what came: settle the calls whose replies are whole, send what has gathered meanwhile, and wake who waited."""
        cdef bint whole = False
        cdef Waiting waiting = self.waiting
        if not self.link.is_open():  # to a call that was given up at the end, on a connection that is closed in a moment
            return
        waiting.resumes_itself = True
        try:
            self.read(data)
            whole = True
        finally:
            waiting.resumes_itself = False
            if waiting.woken and (not whole or current_task(self.waiting.loop) is not None):
                self.waiting.call_soon(self._resume_tasks, context=waiting.context)
        self.settlement.unpark()
        # First what waits already: it is decided while those are resumed that have their answer, and that may ask for as much again.
        self._flush(whole=2 * len(waiting.woken) >= waiting.asking.count)
        if waiting.woken and current_task(self.waiting.loop) is None:
            try:
                self._resume_tasks()
            except (KeyboardInterrupt, SystemExit) as error:
                # Not from here: uvloop would take it for the connection's error, drop that and go on.
                self.waiting.call_soon(_raised, error)

    cdef int read(self, bytes data) except -1:
        cdef Py_ssize_t at = 0, after
        if self.exchange.rest:
            data = self.exchange.rest + data
            self.exchange.rest = b""
        while at < PyBytes_GET_SIZE(data):
            if not self.exchange.in_flight:
                self.link.transport.broken("a reply that nobody waits for")
                return 0
            after = self.read_reply(data, at)
            if after == INCOMPLETE:
                break
            if after == BROKEN:
                self.link.transport.broken("something else than was asked for")
                return 0
            if not self.link.is_open():  # dropped because of what was read
                return 0
            at = after
        if PyBytes_GET_SIZE(data) - at > REPLY_BYTES_MAX:
            self.link.transport.broken("a reply without an end")
        elif at < PyBytes_GET_SIZE(data):
            self.exchange.rest = data[at:]
        return 0

    cdef Py_ssize_t read_reply(self, bytes data, Py_ssize_t at) except -3:
        """Read the reply to the oldest call; returns where the next one begins, INCOMPLETE or BROKEN."""
        cdef const char* text = PyBytes_AS_STRING(data)
        cdef Py_ssize_t size = PyBytes_GET_SIZE(data), end
        cdef Call call = <Call>self.exchange.in_flight[0]
        cdef int64_t[REPLY_NUMBERS_MAX] numbers
        cdef int count = 0
        if text[at] == c"-" and not isinstance(call, MarkCall):
            end = read_line(text, at, size)
            if end < 0:
                return end
            self.exchange.in_flight.popleft()
            self.take_error(call, data[at + 1:end])
            return end + 2
        at = call.read(data, at, numbers, &count)
        if at < 0:
            return at
        self.exchange.in_flight.popleft()
        if isinstance(call, LoadCall):
            return at
        self.session.heartbeat.heard_us = self.context.bounds.now_us()
        if isinstance(call, MarkCall):
            self.session.marked(<MarkCall>call, numbers)
        elif was_moved(numbers, count):
            self.moved(call)
        elif isinstance(call, CheckCall):
            self.take_answers(<CheckCall>call, numbers, count, self.session.heartbeat.heard_us)
        else:
            self.session.take_control(<ControlCall>call, numbers, count)
        return at

    cdef int take_error(self, Call call, bytes text) except -1:
        """The server has answered a call with an error."""
        if isinstance(call, LoadCall):
            return 0                         # the next call brings its script along anyway
        if text.startswith(b"NOSCRIPT"):
            # The server has lost its scripts (SCRIPT FLUSH, restart, failover), and proves that the call wasn't run.
            self.send_again(call)
        else:
            self.link.transport.refused(call, text)
        if isinstance(call, ControlCall) and self.session.repairs():
            self.session.advance()
        return 0

    cdef int take_answers(self, CheckCall call, const int64_t* numbers, int count, int64_t now_us) except -1:
        """Settle the checks of a call."""
        if self.session.heartbeat.epoch != self.context.repair.epoch:
            # Another connection has met a later epoch: what this one counts is lost, and was not asserted there.
            self.settlement.fail(call, StorageUnavailable("this Redis was replaced by another one meanwhile"))
            return 0
        try:
            self.settlement.settle(call, numbers, count, now_us)
        except BaseException:
            # Whatever it was, nobody may be left waiting.
            self.settlement.fail(call, StorageProtocolError("the reply could not be taken in; the check may have been counted"))
            raise
        return 0

    cdef int moved(self, Call call) except -1:
        """The call wasn't run, since this is another epoch than it expected: it waits, and the epoch is looked at."""
        if isinstance(call, CheckCall):
            self.settlement.take_back(<CheckCall>call)
        else:
            self.context.repair.lose(<ControlCall>call)
            if (<ControlCall>call).script == "slots":
                (<ControlCall>call).done([])  # it isn't, and is asked again
            self.session.heartbeat.beating = self.session.heartbeat.beating and (<ControlCall>call).script != "beat"
        return self.session.moved()

    # What is lost or not run:

    def give_up(self, ControlCall call not None):
        """The store will never take it: nothing waits for it any more."""
        self.context.repair.heard(call, 0)

    def send_again(self, Call call not None):
        """A reply has proved that it wasn't run, because the server has lost its script: send it, script and all."""
        cdef LoadCall load
        if isinstance(call, ControlCall):
            self.exchange.writer.by_value = True
            self.exchange.send(call)
            return
        self.settlement.take_back(<CheckCall?>call)
        # By value, since nothing can be flushed in between; and loaded too, since the server may drop what is only evaluated.
        load = LoadCall.__new__(LoadCall)
        load.text = self.exchange.writer.scripts["reset" if (<CheckCall>call).mode == RESET else "decide"][1]
        self.exchange.send(load)
        self.exchange.writer.by_value = True

    # Leases, at the end:

    def return_leases(self, CompiledRule rule=None):
        """Give back at once what is left of the leases under a rule, or of all. Returns a future that tells when it is done, or None."""
        cdef Group group = Group.__new__(Group)
        self.known.return_leases(rule, self.context.bounds.now_us())
        group.future = self.waiting.loop.create_future()
        group.members = []
        group.left = 0
        if self.link.state == SERVING:
            self.known.queue_returns(group)
        self._flush()
        return group.future if group.left else None

    def late_replies(self):
        """What reads the replies that are late, if a lease may be among them; None if there is nothing to hear."""
        return late_replies_new(self.known, self.exchange.in_flight, self.exchange.rest, self._schedule_returns)

    def _schedule_returns(self):
        """Units have come back that no bound holds."""
        if self.link.state == SERVING:
            self.known.queue_returns()
            self.schedule()
