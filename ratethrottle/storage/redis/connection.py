"""A connection to Redis, and the task that owns it. What travels on it is the affair of its compiled `Batch`.

A caller waits on a waiter of its own; its cancellation or deadline never touches the wire.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import math
import os
import time
from collections.abc import Callable

from redis.asyncio.connection import AbstractConnection

from ratethrottle.errors import StorageError, StorageProtocolError, StorageRefused, StorageUnavailable
from ratethrottle.storage import Timers
from ratethrottle.storage._shared.batch import Batch
from ratethrottle.storage._shared.call import Call, CheckCall, ControlCall
from ratethrottle.storage._shared.context import StorageContext
from ratethrottle.storage.redis.backoff import EVERY_S, Backoff
from ratethrottle.storage.redis.failures import failure, guess_of, lost_again, no_connection, refusal
from ratethrottle.storage.redis.overdue import Overdue
from ratethrottle.storage.redis.race import Pace
from ratethrottle.storage.redis.replies import Meaning
from ratethrottle.storage.redis.settings import abort, close
from ratethrottle.storage.redis.tasks import own_task
from ratethrottle.storage.redis.topology import Master
from ratethrottle.storage.redis.wire import Receiver

IN_FLIGHT_MAX = 2
# How much longer than usual a server may be silent that this process has never heard.
FAR_S = 0.8
# And at the end of a loop, which nobody wants to wait for.
ENDS_S = 0.15
# A timer that fires so late was kept from it by its loop.
STOOD_STILL_S = 0.02


def closed() -> StorageUnavailable:
    """Make the error of what still waits at the end."""
    return StorageUnavailable("the storage was closed")


class Connection:
    """Carries the calls of one event loop. Not for other loops or processes.

    Its batch calls `connect`, and the methods from `unsent` on. timers: call back by the storage's time; None: the loop does.
    patience_s: how long checks wait for a connection that is being made; None: deadline_s.
    """

    def __init__(
        self,
        context: StorageContext,
        master: Master,
        backoff: Backoff,
        *,
        deadline_s: float,
        connect_timeout_s: float,
        max_waiting: int,
        timers: Timers | None = None,
        patience_s: float | None = None,
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.batch = Batch(context, self, self.loop, max_waiting, timers)
        self.process = os.getpid()
        self.master = master  # shared by the connections of this loop
        master.watch(self._moved)
        self._stale = False  # the master has moved while this was connecting to it
        self._connected = False  # ever
        self._backoff = backoff
        self._deadline_s = deadline_s
        self._patience_s = deadline_s if patience_s is None else patience_s
        self._connect_timeout_s = connect_timeout_s
        self._woken = asyncio.Event()  # wakes the owner
        self._retry_at_once = (
            asyncio.Event()
        )  # it needn't wait for its turn to connect: there is another master, or Redis answers
        self.failures = 0  # attempts to connect that failed
        self._tried_s = -math.inf  # when the newest try was begun, by the loop's clock
        self._begun_s = 0.0  # when the attempt was begun that the try belongs to
        self._patience: asyncio.Timeout | None = None  # of the attempt that is under way
        self._impatience: asyncio.TimerHandle | None = None  # of checks, with that attempt
        self._resigning = False
        self._connected_to: AbstractConnection | None = None
        self._receiver: Receiver | None = None
        self._dropped: list[AbstractConnection] = []  # not heard any more, and to be closed by the owner
        self._returning: asyncio.Future[None] | None = None  # leases, at the end
        self._closing = False  # because the storage was closed or dropped; not because the loop ends
        self._sent_before_error = 0  # calls, when Redis last answered one with an error
        self.slots_failed: Callable[[ControlCall, StorageError], None] | None = None  # what hears of an error to a call of slots
        self._context = contextvars.Context()  # of what is called later: it belongs to no request
        self._overdue = Overdue(self._context, self._discard)
        self._owner = own_task(self.loop, self._run(), "ratethrottle connection")

    @property
    def closed(self) -> bool:
        """Whether its task has ended, with its loop's other tasks or by `aclose`."""
        return self._owner.done()

    @property
    def probing(self) -> bool:
        """Whether this is connecting to Redis, asking it for its epoch, or telling it what it has missed.

        An attempt that hasn't heard anything in a deadline's time goes on, but nobody expects much of it.
        """
        return self.batch.open or (self._patience is not None and self.loop.time() - self._tried_s < self._deadline_s)

    def connect(self) -> None:
        """Have the owner connect, if there is no connection."""
        self.batch.connecting()
        self._woken.set()

    def end(self) -> asyncio.Task[None]:
        """Fail what is waiting, and have the connection closed: that is done when the task is that it returns.

        Where leases have to be given back first, it takes up to the deadline, unless `end_now` is called.
        """
        if not (self.batch.serving and self.batch.has_leases):
            self.batch.leave()
            self.batch.end(closed())  # a task that is cancelled before it began wouldn't
        self._closing = True
        self._owner.cancel()
        return self._owner

    def end_now(self) -> None:
        """Wait for nothing any more."""
        if self._returning is not None:
            self._returning.cancel()

    def abandon(self) -> None:
        """Have it closed by its own loop. From any thread, and from a destructor."""
        self._closing = True
        try:
            self.loop.call_soon_threadsafe(self._owner.cancel)
        except RuntimeError:
            return  # the loop is closed, and has cancelled the task before that

    def _moved(self) -> None:
        """Leave a server that is not the master any more, even while it answers: what it counts is lost."""
        self._stale = True
        self._backoff.succeeded()  # how the old one did says nothing of the new one
        self._retry_at_once.set()
        if self._patience is not None and not self._patience.expired():
            self._patience.reschedule(self.loop.time())  # the attempt to reach the old one ends here
        self._overdue.forget()
        if self.batch.open:
            self._drop(StorageUnavailable("Redis is no master any more; the check may have been counted"))
            self.connect()

    def _retry_now(self) -> None:
        """Connect before it is this connection's turn: Redis answers. From any thread."""
        if self.process == os.getpid():
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self.loop.call_soon_threadsafe(self._retry_at_once.set)

    def _lost(self, error: Exception | None) -> None:
        """Take note that the connection is gone."""
        self._drop(failure(error or ConnectionResetError(), self._deadline_s, sent=True))

    async def _run(self) -> None:
        try:
            while True:
                await self._woken.wait()
                self._woken.clear()
                await self._tidy()
                while self.batch.state == "connecting":
                    await self._open_connection()
        finally:
            try:
                await self._give_all_back()
            finally:
                self.batch.end(closed())
                if not self.loop.is_closed():  # by a program that leaves tasks behind: nothing can be closed any more
                    self._detach()
                    self._overdue.forget()
                    await self._tidy()

    async def _give_all_back(self) -> None:
        """Give back what is left of leases, as far as the store answers in time: nobody will spend it any more."""
        batch = self.batch
        if not (batch.serving and batch.has_leases) or self.loop.is_closed() or self.process != os.getpid():
            return
        self._returning = batch.return_leases()
        batch.leave()
        if self._returning is not None:
            # `asyncio.run` cancels every task, and then waits for each of them.
            patience_s = self._deadline_s if self._closing else min(self._deadline_s, ENDS_S)
            await asyncio.wait([self._returning], timeout=patience_s)
            self._returning.cancel()

    async def _open_connection(self) -> None:
        wait_s = self._backoff.wait_s()
        if wait_s:
            # If its deadline leaves it the time, a check waits instead of going by the policy. A refusal stays one.
            if not self.batch.away and not isinstance(self.batch.reason, StorageRefused) and wait_s > self._deadline_s / 2:
                self.batch.begin_outage(lost_again(wait_s))
            await self._wait(wait_s)
        self._retry_at_once.clear()
        if self._backoff.full:
            self.failures += 1
            self.batch.not_connected(self._no_room())  # that is no failure of Redis, and doesn't slow the others down
            await asyncio.sleep(EVERY_S)
            return
        self._stale = False
        self._began()
        self._begun_s = self._tried_s
        asked = self.master.credentials_asked
        # An attempt is patient; checks aren't. Without a check that waits, there is no outage to announce yet.
        self._allow(self._patience_s)
        try:
            async with asyncio.timeout(self._connect_timeout_s) as self._patience:
                reached = await self.master.reach(Pace(self._turn, self._began))
        except Exception as error:  # noqa: BLE001  # whatever redis-py or a credential provider raises, the callers get ours
            if self._stale:  # then to the new one
                return
            self._backoff.failed(costly=self.master.credentials_asked > asked)
            self.failures += 1
            found = failure(error, self._connect_timeout_s, sent=False)
            self.batch.not_connected(self._backoff.repeated.judge("connecting", self, found, guess_of(error)))
            return
        finally:
            self._patience = None
            self._allow(None)
        if self._stale:
            await close(reached.connection)
            return
        self._backoff.opened(self, again=self._connected)
        self._backoff.repeated.went("connecting")
        self._connected = True
        self._connected_to = reached.connection
        self._receiver = Receiver(self.batch.received, self._lost)
        wire = reached.take_over(self._receiver)
        self.batch.connected(wire.write, reached.scripts, reached.run)

    def _began(self) -> None:
        """Count a try to connect."""
        self._backoff.began()
        self._tried_s = self.loop.time()

    async def _turn(self) -> None:
        """Wait for the turn to try once more what is silent."""
        if not self._connected:
            # A server that has never been heard yet may just be far away. One that has been may be back at any moment.
            await asyncio.sleep(FAR_S)
        self._backoff.failed()
        wait_s = self._backoff.wait_s()
        turn_s = time.monotonic() + wait_s
        if not self._retry_at_once.is_set():
            try:
                await self._wait(wait_s)
            except asyncio.CancelledError:
                self._give_back(turn_s)
                raise
        if self._patience is None or self._stale:
            return
        self._retry_at_once.clear()
        self._give_back(turn_s)
        if not self._patience.expired():
            # A try that begins as the whole attempt ends has some time all the same: Redis may be back just now.
            most_s = max(self._patience.when() or 0.0, self.loop.time() + EVERY_S / 2)
            self._patience.reschedule(min(most_s, self._begun_s + self._connect_timeout_s + EVERY_S / 2))

    def _give_back(self, turn_s: float) -> None:
        """Leave a turn to the next attempt, if this one has taken too long to use it."""
        if self._patience is not None and self._patience.expired() and not self._stale:
            self._backoff.give_back(turn_s)

    async def _wait(self, wait_s: float) -> None:
        """Wait for a turn, or until there is another master or Redis answers somebody else."""
        with self._backoff.waiting(self._retry_now), contextlib.suppress(TimeoutError):  # then it is this connection's turn
            async with asyncio.timeout(wait_s):
                await self._retry_at_once.wait()

    def _allow(self, for_s: float | None) -> None:
        """Give the attempt so long until checks go on without it; None to take that back."""
        if self._impatience is not None:
            self._impatience.cancel()
            self._impatience = None
        if for_s is not None:
            due_s = self.loop.time() + for_s
            self._impatience = self.loop.call_later(for_s, self._go_on_without, due_s, context=self._context)

    def _go_on_without(self, due_s: float) -> None:
        """Leave decisions to the policies if the attempt has had its time. The attempt goes on."""
        late_s = self.loop.time() - due_s
        if late_s > STOOD_STILL_S:
            # The loop stood still: what came meanwhile hasn't been looked at yet.
            self._allow(min(late_s, self._deadline_s))
        elif self._connected or self.batch.callers:
            self._resign()

    def _resign(self) -> None:
        self._resigning = False
        # A refusal stays one: a server that is far away is slow to repeat it.
        batch = self.batch
        if not batch.open and not batch.away and not batch.refused and not batch.ended:
            batch.begin_outage(no_connection(self._patience_s))

    def _no_room(self) -> StorageUnavailable:
        return StorageUnavailable(
            f"this process has its max_connections ({self._backoff.most}) to Redis already, for its other event loops"
        )

    # What the batch asks for, besides `connect`:

    def unsent(self) -> StorageError:
        """Make the error of a check that ran out of time before it could be sent."""
        if not self.batch.open:
            # A check that comes later needn't wait as long to hear the same.
            if not self._resigning:
                self._resigning = True
                self.loop.call_soon(self._resign, context=self._context)
            return no_connection(self._deadline_s)
        return StorageUnavailable(f"Redis is slow: the check was not sent within {self._deadline_s} s, nor counted")

    def retry_us(self) -> int:
        """Return how long until Redis is asked again, in µs."""
        return round(self._backoff.until_next_s() * 1_000_000)

    def answered(self) -> None:
        """Take note that Redis has answered a beat."""
        self._backoff.succeeded()
        self._backoff.repeated.went("beat")

    def refused(self, call: Call, text: bytes) -> None:
        """Give an error to a call that the server has answered with one; if it can't serve us, drop the connection."""
        reply = refusal(text.decode("utf-8", "replace"))
        error = failure(reply, self._deadline_s, sent=True)
        beat = isinstance(call, ControlCall) and call.script == "beat"
        # What the script itself refuses is no outage.
        ours = isinstance(error, StorageProtocolError)
        if isinstance(call, ControlCall) and call.script == "slots" and (ours or isinstance(error, StorageRefused)):
            self._refuse_slots(call, error, guess_of(reply))
            return
        if not ours or beat:
            if isinstance(call, CheckCall) and self.batch.sent_calls - self._sent_before_error > IN_FLIGHT_MAX:
                self._backoff.repeated.went("decide")  # another one between them was answered
            self._sent_before_error = self.batch.sent_calls
            step = call.script if isinstance(call, ControlCall) else "decide"
            error = self._backoff.repeated.judge(step, self, error, guess_of(reply))
        if isinstance(call, ControlCall) and not beat and ours:
            # A key of somebody else's must not keep us away for ever.
            self.batch.notice("repair_refused", error)
            self.batch.give_up(call)
        else:
            self.batch.fail(call, error, whatever=ours)
        if not ours or beat:
            # It can't serve us now (it is loading, busy, full, or no master any more): it is asked again as if it were away.
            self._backoff.failed()
            self._drop(error)
            if text.startswith((b"READONLY", b"NOREPLICAS", b"MASTERDOWN")):
                self.master.suspect()
            self.batch.begin_outage(error)

    def _refuse_slots(self, call: ControlCall, error: StorageError, guess: Meaning | None) -> None:
        """Give an error to those that ask for slots. Checks may be served all the same, by another script."""
        if guess is not None:
            error = self._backoff.repeated.judge("slots", self, error, guess)
        self.batch.give_up(call)
        if self.slots_failed is not None:
            self.slots_failed(call, error)

    def slots_answered(self) -> None:
        """Take note that a call of slots has gone well after all."""
        self._backoff.repeated.went("slots")

    def broken(self, what: str) -> None:
        """Drop the connection, on which `what` came instead of a reply."""
        self.batch.notice("desync", what)
        self._drop(StorageProtocolError(f"Redis sent {what}; the connection was dropped"))

    def late(self) -> None:
        """Drop the connection, on which nothing came in time."""
        words = f"Redis didn't answer within {self._deadline_s} s, and the connection was dropped"
        self._backoff.failed()
        self._hear_late()
        self._drop(StorageUnavailable(f"{words}; the check may have been counted"))
        self.batch.begin_outage(StorageUnavailable(words))

    def _hear_late(self) -> None:
        """Go on hearing a connection that is about to be dropped, if replies may come on it to what asked for leases."""
        late = self.batch.late_replies()
        if late is None or self._receiver is None or self._connected_to is None:
            return
        self._receiver.let_go()
        self._receiver = None
        connection, self._connected_to = self._connected_to, None
        self._backoff.closed(self)
        self._overdue.hear(connection, late)

    def _discard(self, connection: AbstractConnection) -> None:
        """Have the owner close it."""
        self._dropped.append(connection)
        self._woken.set()

    def _drop(self, error: StorageError) -> None:
        self.failures += not self.batch.serving
        self._backoff.lost()
        self._detach()
        self.batch.lost(error)

    def _detach(self) -> None:
        receiver, self._receiver = self._receiver, None
        connection, self._connected_to = self._connected_to, None
        if receiver is not None:
            receiver.let_go()
        if connection is not None:
            self._backoff.closed(self)
            abort(connection)
            self._discard(connection)

    async def _tidy(self) -> None:
        while self._dropped:
            await close(self._dropped.pop())
