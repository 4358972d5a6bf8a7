"""A line to Redis: one connection, and the task that owns it. What travels on it is gathered by the compiled `Gathering`.

A caller waits on a waiter of its own; its cancellation or deadline never touches the wire.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re

import redis
import redis.asyncio
from redis.asyncio.connection import AbstractConnection

from ratethrottle._calls import Call, Calls, Gathering
from ratethrottle._repair import Errand
from ratethrottle.errors import StorageError, StorageProtocolError, StorageRefused, StorageUnavailable
from ratethrottle.storage.redis.attempts import EVERY_S, Attempts
from ratethrottle.storage.redis.failures import failure, guess_of, lost_again, no_connection, refusal, was_reset
from ratethrottle.storage.redis.scripts import NAMES, SHEBANG, script
from ratethrottle.storage.redis.settings import abort, close
from ratethrottle.storage.redis.tasks import own_task
from ratethrottle.storage.redis.topology import Master
from ratethrottle.storage.redis.wire import Receiver, is_fake, take_over

# How long a server has to say why it won't have us, before anything is said to it.
REASON_S = 0.05
IN_FLIGHT_MAX = 2
RUN_ID = re.compile(rb"^run_id:([0-9a-f]{1,40})\r?$", re.MULTILINE)


def closed() -> StorageUnavailable:
    """Make the error of what still waits at the end."""
    return StorageUnavailable("the storage was closed")


class Line(Gathering):
    """Carries the calls of one event loop. Not for other loops or processes."""

    def __init__(self, calls: Calls, master: Master, attempts: Attempts, deadline_s: float, max_waiting: int) -> None:
        super().__init__(calls, asyncio.get_running_loop(), max_waiting)
        self.process = os.getpid()
        self.master = master  # shared by the lines of this loop
        master.watch(self._moved)
        self._stale = False  # the master has moved while this was connecting to it
        self._connected = False  # ever
        self._attempts = attempts
        self._deadline_s = deadline_s
        self._woken = asyncio.Event()  # wakes the owner
        self._hurry = asyncio.Event()  # it needn't wait for its turn to connect: there is another master, or Redis answers
        self._wanted = False  # a connection, by somebody
        self._reaching = False  # for it, at this moment
        self._connection: AbstractConnection | None = None
        self._receiver: Receiver | None = None
        self._dropped: list[AbstractConnection] = []  # not heard any more, and to be closed by the owner
        self._shebang = True
        self._sent_before_error = 0  # calls, when Redis last answered one with an error
        self._owner = own_task(self.loop, self._own(), "ratethrottle line")

    @property
    def closed(self) -> bool:
        """Whether its task has ended, with its loop's other tasks or by `aclose`."""
        return self._owner.done()

    @property
    def probing(self) -> bool:
        """Whether Redis is being connected to, asked which epoch it is in, or told what it has missed."""
        return self._reaching or self._open

    def connect(self) -> None:
        """Have the owner connect, before a check needs it."""
        self._wanted = True
        self._woken.set()

    def end(self) -> asyncio.Task[None]:
        """Fail what is waiting, and have the connection closed: that is done when the task is that it returns."""
        self._leave()
        self._end(closed())  # a task that is cancelled before it began wouldn't
        self._owner.cancel()
        return self._owner

    def abandon(self) -> None:
        """Have the line closed by its own loop. From any thread, and from a destructor."""
        try:
            self.loop.call_soon_threadsafe(self._owner.cancel)
        except RuntimeError:
            return  # the loop is closed, and has cancelled the task before that

    def _moved(self) -> None:
        """Leave a server that is not the master any more, even while it answers: what it counts is lost."""
        self._stale = True
        self._attempts.succeeded()  # how the old one did says nothing of the new one
        self._hurry.set()
        if self._open:
            self._drop(StorageUnavailable("Redis is no master any more; the check may have been counted"))
            self.connect()

    def _hurry_up(self) -> None:
        """Connect before it is this line's turn: Redis answers. From any thread."""
        if self.process == os.getpid():
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self.loop.call_soon_threadsafe(self._hurry.set)

    def _lost(self, error: Exception | None) -> None:
        """Take note that the connection is gone."""
        self._drop(failure(error or ConnectionResetError(), self._deadline_s, sent=True))

    async def _own(self) -> None:
        try:
            while True:
                await self._woken.wait()
                self._woken.clear()
                await self._tidy()
                while self._wanted and not self._open:
                    self._wanted = False
                    await self._open_connection()
        finally:
            self._end(closed())
            if not self.loop.is_closed():  # by somebody who leaves tasks behind: nothing can be closed any more
                self._let_go()
                await self._tidy()

    async def _open_connection(self) -> None:
        wait_s = self._attempts.wait_s()
        if wait_s:
            # Where the deadline leaves it the time, a check waits rather than being decided without Redis. A refusal stays one.
            if not self.away and not isinstance(self.reason, StorageRefused) and wait_s > self._deadline_s / 2:
                self._go_away(lost_again(wait_s))
            with self._attempts.waiting(self._hurry_up), contextlib.suppress(TimeoutError):  # then it is this line's turn
                async with asyncio.timeout(wait_s):
                    await self._hurry.wait()
        self._hurry.clear()
        if self._attempts.full:
            self._go_away(self._no_room())  # that is no failure of Redis, and doesn't slow the others down
            await asyncio.sleep(EVERY_S)
            return
        self._reaching = True
        try:
            async with asyncio.timeout(self._deadline_s):
                connection, run = await self._reach()
        except Exception as error:  # noqa: BLE001  # whatever redis-py or a credential provider raises, the callers get ours
            self._attempts.failed()
            found = failure(error, self._deadline_s, sent=False)
            self._go_away(self._attempts.repeated.judge("connecting", self, found, guess_of(error)))
            return
        finally:
            self._reaching = False
        self._attempts.opened(self, again=self._connected)
        self._attempts.repeated.went("connecting")
        self._connected = True
        self._connection = connection
        self._receiver = Receiver(self._received, self._lost)
        wire = take_over(connection, self._receiver)
        scripts = {name: (script(name).sha(self._shebang), script(name).body(self._shebang)) for name in NAMES}
        self._opened(wire.write, scripts, run)

    async def _reach(self) -> tuple[AbstractConnection, bytes]:
        """Connect and load the scripts; returns the connection, and which run of the server this is."""
        for patient in (False, True):
            connection = await self.master.connect()
            self._stale = False
            try:
                if patient:
                    await asyncio.sleep(min(REASON_S, self._deadline_s / 4))
                run = await self._load(connection)
                self._check_stale()
            except BaseException as error:
                await close(connection)
                # A server that doesn't accept our certificate says so only after the handshake, and its reason is lost with the
                # connection if we write meanwhile: then it is given the time to say it first.
                if patient or not isinstance(connection, redis.asyncio.SSLConnection) or not was_reset(error):
                    raise
            else:
                return connection, run
        raise AssertionError

    def _no_room(self) -> StorageUnavailable:
        return StorageUnavailable(
            f"this process has its max_connections ({self._attempts.most}) to Redis already, for its other event loops"
        )

    def _check_stale(self) -> None:
        if self._stale:
            raise StorageUnavailable("Redis is no master any more, and the new one was not reached in time")

    async def _load(self, connection: AbstractConnection) -> bytes:
        """Load the scripts, with `#!lua` where it is known: fakeredis loads such a script, but calls it a syntax error.

        Returns which run of the server this is.
        """
        probe: list[list[bytes]] = [[b"EVAL", SHEBANG + b"return 1", b"0"]]
        for self._shebang in (True, False):
            # All in one round trip: a deadline covers connecting, and a secure connection has taken several already.
            commands = [*probe, [b"INFO", b"server"]]
            commands += [[b"SCRIPT", b"LOAD", script(name).body(self._shebang)] for name in NAMES]
            await connection.send_packed_command(connection.pack_commands(commands), check_health=False)
            refusals = []
            run = b""
            for command in commands:
                try:
                    reply = await connection.read_response(disable_decoding=True)
                    if command[0] == b"INFO" and (found := RUN_ID.search(reply)):
                        run = found[1]
                except redis.ResponseError as error:
                    # fakeredis has no INFO, and is always the same run.
                    if command[0] != b"INFO" or not is_fake(connection):
                        refusals.append(error)
            if not refusals:
                return run.ljust(40, b"0")
            if not probe or "near '#'" not in str(refusals[0]):
                raise refusals[0]
            probe = []
        raise AssertionError

    # What the gathering asks for:

    def _connect(self) -> None:
        self.connect()

    def _unsent(self) -> StorageError:
        if not self._open:
            return no_connection(self._deadline_s)
        return StorageUnavailable(f"Redis is slow: the check was not sent within {self._deadline_s} s, nor counted")

    def _retry_us(self) -> int:
        return round(self._attempts.until_next_s() * 1_000_000)

    def _answered(self) -> None:
        self._attempts.succeeded()
        self._attempts.repeated.went("beat")

    def _refused(self, call: Call | Errand | None, text: bytes) -> None:
        if call is None:  # SCRIPT LOAD: the next call brings its script along anyway
            return
        if text.startswith(b"NOSCRIPT"):
            # The server has lost its scripts (SCRIPT FLUSH, restart, failover), and proves that the call wasn't run.
            self._send_again(call)
            return
        reply = refusal(text.decode("utf-8", "replace"))
        error = failure(reply, self._deadline_s, sent=True)
        beat = isinstance(call, Errand) and call.script == "beat"
        # What the script itself refuses is no outage.
        ours = isinstance(error, StorageProtocolError)
        if not ours or beat:
            if isinstance(call, Call) and self.sent_calls - self._sent_before_error > IN_FLIGHT_MAX:
                self._attempts.repeated.went("decide")  # another one between them was answered
            self._sent_before_error = self.sent_calls
            step = call.script if isinstance(call, Errand) else "decide"
            error = self._attempts.repeated.judge(step, self, error, guess_of(reply))
        if isinstance(call, Errand) and not beat and ours:
            # A key of somebody else's must not keep us away for ever.
            self._notice("repair_refused", error)
            self._give_up(call)
        else:
            self._fail(call, error, whatever=ours)
        if not ours or beat:
            # It can't serve us now (it is loading, busy, full, or no master any more): it is asked again as if it were away.
            self._attempts.failed()
            self._drop(error)
            if text.startswith((b"READONLY", b"NOREPLICAS", b"MASTERDOWN")):
                self.master.suspect()
            self._go_away(error)

    def _broken(self, what: str) -> None:
        self._notice("desync", what)
        self._drop(StorageProtocolError(f"Redis sent {what}; the connection was dropped"))

    def _late(self) -> None:
        words = f"Redis didn't answer within {self._deadline_s} s, and the connection was dropped"
        self._attempts.failed()
        self._drop(StorageUnavailable(f"{words}; the check may have been counted"))
        self._go_away(StorageUnavailable(words))

    def _drop(self, error: StorageError) -> None:
        self._attempts.lost()
        self._let_go()
        self._shut(error)

    def _let_go(self) -> None:
        receiver, self._receiver = self._receiver, None
        connection, self._connection = self._connection, None
        if receiver is not None:
            receiver.let_go()
        if connection is not None:
            self._attempts.closed(self)
            abort(connection)
            self._dropped.append(connection)
            self._woken.set()

    async def _tidy(self) -> None:
        while self._dropped:
            await close(self._dropped.pop())
