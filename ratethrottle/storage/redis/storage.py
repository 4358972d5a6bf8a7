"""`RedisStorage`: one limit for every server that shares a Redis."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, Self

import redis

from ratethrottle._core import Group, Limiter
from ratethrottle._engine.decision import Decision, Entry
from ratethrottle._engine.definitions import CompiledRule
from ratethrottle._engine.joint import Joint
from ratethrottle._engine.keys import KeyTable
from ratethrottle._holding import Ask, Held, Holder
from ratethrottle.errors import ConfigurationError, StorageError, StorageUnavailable
from ratethrottle.events import Events
from ratethrottle.options import check_options
from ratethrottle.rule import ConcurrencyRule, RateThrottleRule
from ratethrottle.storage import Statistics, Timers
from ratethrottle.storage._shared.batch import Batch
from ratethrottle.storage._shared.fallback import REPAIRING
from ratethrottle.storage._shared.keynames import KeyNames
from ratethrottle.storage._shared.repair import Repair
from ratethrottle.storage._shared.shared import SharedStorage
from ratethrottle.storage.redis import topology
from ratethrottle.storage.redis.backoff import Backoff
from ratethrottle.storage.redis.clearing import Clearing
from ratethrottle.storage.redis.connection import Connection
from ratethrottle.storage.redis.failures import failure
from ratethrottle.storage.redis.notices import EventSource
from ratethrottle.storage.redis.scripts import check_installed
from ratethrottle.storage.redis.settings import Settings, close
from ratethrottle.storage.redis.sharing import SHARING
from ratethrottle.storage.redis.slots import Slots
from ratethrottle.storage.redis.urls import client_of

OnOutage = Literal["local", "allow", "deny", "raise"]
OnOverload = Literal["deny", "raise"]

ASK_AGAIN_S = 0.01
CLOSED = "the storage is closed; make a new one"
LEARNS_S = 1.0  # at most, with a beat before and after
ANSWERS_MAX = 128  # without a wait, one after the other; then the loop gets a turn
PREFIX = re.compile(r"[^{}\s\ud800-\udfff]{1,64}\Z")
# What a forked child holds of its parent's connections, kept for ever: to collect a transport is to close it, and that takes the
# descriptor out of the selector, which the two processes share, so that the parent would never hear from Redis again.
_INHERITED: list[Connection] = []


def breaker_of(connections: Iterable[Connection]) -> Literal["closed", "open", "half_open"]:
    """Say how the circuit breaker of these connections stands: it is closed if each of them asks Redis."""
    apart = [
        connection for connection in connections if not connection.closed and (connection.batch.away or connection.batch.refused)
    ]
    if not apart:
        return "closed"
    return "half_open" if any(connection.probing for connection in apart) else "open"


class RedisStorage(SharedStorage):
    """Keep the state in Redis (≥ 7, or Valkey ≥ 7.2), decided there by script calls in the server's own time.

    client: a redis-py client, asyncio or synchronous, or a Sentinel's `master_for`. Only its settings are used. The storage makes
    connections of its own, and leaves the client alone.
    prefix: begins every key; it has no braces. tags: hash tags over which keys spread, 1 to 16,384. tag_parts: how many of the
    first parts of a tuple key decide its tag, 1 to 64, so that keys that begin alike stand together. None: all of them. All
    processes of a prefix must have the same tags and tag_parts.

    deadline: seconds until a check has its answer or a StorageError, 0.005 to 60. connect_timeout: seconds that an attempt to
    connect may take, 0.005 to 60. Checks are decided by the policy meanwhile. None is 5, or the client's socket_connect_timeout if
    that is longer.
    connections: to Redis, for each event loop, 1 to 8. A key always takes the same one. max_connections: of all event loops of
    this process together, `connections` to 64. Sentinels are asked on connections beside them.
    max_waiting: checks that may wait for each connection, 1 to 1,000,000.
    prefilter_ttl: for how many seconds a denial may be repeated without asking Redis, 0 to 60. Another process's `reset` takes
    effect here within that time. max_bounds: keys of which this process remembers what Redis said last, 1 to 10^8.

    on_outage: what decides a check that Redis doesn't answer within the deadline: "local" (this process's share of the limit),
    "allow", "deny", or "raise", which raises the StorageError. expected_processes: how many share the limits, 1 to 100,000, until
    heartbeats have settled it. With None, "local" denies until two heartbeats agree.
    on_overload: what a check is if `max_waiting` wait already, or if so many wait that it can't be answered in time: "deny" denies
    it, "raise" raises StorageUnavailable.

    Storages of one process with the same server, database, prefix, tags and tag_parts share what is known, and count as one process. The
    `max_bounds` of the first one counts; those of the others are ignored.

    Raises ConfigurationError, also if the package was installed without its Lua scripts. Nothing connects before the first check, or
    `async with`.
    """

    table = None
    # Of a storage of `ratethrottle.testing`, whose deadlines go by a test's clock:
    _clock_us: Callable[[], int] | None = None
    _patience_s: float | None = None  # how long checks wait for a connection, which takes real time

    def __init__(
        self,
        client: Any,
        *,
        prefix: str = "ratethrottle",
        deadline: float = 0.25,
        connect_timeout: float | None = None,
        tags: int = 64,
        tag_parts: int | None = None,
        connections: int = 1,
        max_waiting: int = 100_000,
        prefilter_ttl: float = 1.0,
        max_bounds: int = 100_000,
        max_connections: int = 8,
        on_outage: OnOutage = "local",
        expected_processes: int | None = None,
        on_overload: OnOverload = "deny",
    ) -> None:
        given = dict(locals())
        if not isinstance(prefix, str) or not PREFIX.match(prefix):
            raise ConfigurationError(f"prefix is {prefix!r}; it is 1 to 64 characters without spaces and braces")
        check_options("redis", given)
        if max_connections < connections:
            raise ConfigurationError(f"max_connections is {max_connections}; it is at least connections, which is {connections}")
        self._settings = Settings(client, deadline, connect_timeout)
        check_installed()
        names = KeyNames(prefix.encode(), tags, tag_parts or 0)
        shared = SHARING.find(
            (self._settings.where, prefix, names.layout, self._clock_us),
            self,
            lambda: Repair(KeyTable(max_bounds, bounds=True, clock_us=self._clock_us), names),
        )
        super().__init__(
            names,
            shared,
            round(deadline * 1_000_000),
            round(prefilter_ttl * 1_000_000) or -1,  # for 0 not even in the same µs, in which a test's clock may stand
            on_outage,
            expected_processes or 0,
            deny_overload=on_overload == "deny",
        )
        self._backoff = Backoff(max_connections)
        self._deadline_s = deadline
        self._connections = connections
        self._max_waiting = max_waiting
        self._settling: set[asyncio.Future[None]] = set()
        self._policy = on_outage
        self._held_here = SHARING.held(shared)
        self._slots: dict[asyncio.AbstractEventLoop, Slots] = {}
        self.events = Events()
        self.context.noticed = self._notices = EventSource(self.events, on_outage)
        self._sent_before = (0, 0)  # script calls and their items, by connections that are gone
        self._without_wait = 0
        self._open: dict[asyncio.AbstractEventLoop, tuple[Connection, ...]] = {}
        self._between: list[Callable[[topology.Master], topology.Master]] = []  # what tests put between this storage and Redis
        self._closed = False
        # Also what keeps a connection's task alive as long as the storage: a loop holds its tasks weakly.
        weakref.finalize(self, abandon, self._open).atexit = False

    @classmethod
    def from_url(
        cls,
        url: str | None = None,
        *,
        sentinels: Sequence[tuple[str, int] | str] | None = None,
        master_name: str | None = None,
        **options: Any,
    ) -> Self:
        """Make a storage from redis://, rediss:// (TLS), unix://, redis+sentinel:// or rediss+sentinel://.

        valkey and valkeys stand for redis and rediss.
        sentinels, master_name: find the master through these; then `url` has no host, and may be left out. In a URL the user and
        the password are those of the data nodes; for sentinels there are the parameters sentinel_username and sentinel_password.

        Raises ConfigurationError, without the URL's password.
        """
        return cls(client_of(url, sentinels, master_name), **options)

    def statistics(self) -> Statistics:
        """Count what there is to count in this process, in all of its loops."""
        connections = [each for known in list(self._open.values()) for each in known if each.process == os.getpid()]
        calls, items = self._sent_before
        return Statistics(
            bounds=len(self.bounds),
            leases=sum(connection.batch.lease_count for connection in connections),
            connections=sum(connection.batch.open for connection in connections),
            waiting=sum(connection.batch.callers for connection in connections),
            in_flight=sum(connection.batch.calls_in_flight for connection in connections),
            breaker=breaker_of(connections),
            processes=self.repair.fleet.processes,
            owed=self.repair.owed,
            calls=calls + sum(connection.batch.sent_calls for connection in connections),
            items=items + sum(connection.batch.sent_items for connection in connections),
            reconnections=self._backoff.reconnections,
            attempts=self._backoff.count,
            desyncs=self._notices.desyncs,
            evictions=self.bounds.evictions,
            epoch_changes=self.repair.epochs,
            overloads=self.context.overloads,
        )

    @property
    def knowledge(self) -> Repair:
        """What this process knows of Redis, and what it owes. Shared with the process's other storages of the same keys."""
        return self.repair

    async def decide(self, entries: Sequence[Entry | Joint]) -> list[Decision]:
        """Decide in order, all within one deadline. When one of several calls fails, what the others granted stays granted."""
        return await self._together(entries, "check")

    async def peek(self, entry: Entry | Joint) -> Decision:
        """Decide without consuming."""
        return (await self._together([entry], "peek"))[0]

    async def reset(self, entry: Entry) -> None:
        """Forget what the key has used under the rule, for every server.

        If Redis has just lost data, it waits until the processes have told it what was used, a second at most.
        """
        give_up_s = time.monotonic() + LEARNS_S
        while True:
            try:
                await self._together([entry], "reset")
            except StorageUnavailable:
                # No policy can reset a key. To reset it twice does no harm.
                if self._closed or not self.repair.learning or time.monotonic() >= give_up_s:
                    raise
                await asyncio.sleep(ASK_AGAIN_S)
            else:
                return

    async def charge(self, charge: Joint) -> Decision:
        """Count what was used without asking. While Redis is away it is counted here, and Redis hears of it later."""
        return (await self._together([charge], "check"))[0]

    def expect_refunds(self) -> None:
        """Nothing to prepare: a state says when it was reset."""

    def settle(self, settlement: Joint, came_back: Callable[[], None]) -> asyncio.Future[None] | None:
        """Begin to settle a reservation; it goes on if the caller is cancelled. The future is done within the deadline.

        Raises StorageUnavailable if the storage is closed: the estimate stays.
        """
        group = self._settle(settlement)
        settled = self._follow(group)
        if settled is None:
            came_back()
            return None
        settled.add_done_callback(lambda _: came_back())
        return asyncio.shield(settled)

    def unbook(self, unbooking: Joint) -> None:
        """Begin to give a booking back, which goes on if nobody waits for it. While Redis is away it stays counted."""
        with contextlib.suppress(StorageError):
            self._follow(self._unbook(unbooking))

    def _follow(self, group: Group | None) -> asyncio.Future[None] | None:
        """Have `aclose` wait for a settlement that has begun. Returns its future, or None if it is done."""
        if group is None or group.future.done():
            return None
        settled: asyncio.Future[None] = group.future
        self._settling.add(settled)
        settled.add_done_callback(self._settling.discard)
        return settled

    def hold(self, holder: Holder, rule: ConcurrencyRule, ask: Ask) -> Held | asyncio.Future[Held]:
        """Take what a holder of slots gives back, and grant what it may have. Raises StorageError, here or by the future."""
        return self._slots_here().hold(holder, rule, ask)

    async def forget_slots(self, rule: ConcurrencyRule, entry: Entry) -> None:  # noqa: ARG002  # memory needs it
        """Have nobody hold slots of a key. A process finds out within a third of its ttl, and this one in all of its loops at once.

        Raises StorageError.
        """
        give_up_s = time.monotonic() + LEARNS_S
        while True:
            forgotten = self._slots_here().forget(entry)
            if forgotten is not None:
                try:
                    await asyncio.wait([forgotten], timeout=self._deadline_s)
                finally:
                    forgotten.cancel()
                if not forgotten.cancelled() and forgotten.result():
                    self._look_again(entry)
                    return
            if time.monotonic() >= give_up_s:
                raise self._connections_here()[0].unsent()
            await asyncio.sleep(ASK_AGAIN_S)

    def _look_again(self, entry: Entry) -> None:
        """Have this process's other loops ask what they still hold of a key."""
        here = asyncio.get_running_loop()
        for loop, slots in list(self._slots.items()):
            if loop is not here and slots.process == os.getpid():
                with contextlib.suppress(RuntimeError):  # the loop is closed
                    loop.call_soon_threadsafe(slots.look_again, entry)

    def _slots_here(self) -> Slots:
        """Find or make the slots of this process and this loop."""
        connections, loop = self._connections_here(), asyncio.get_running_loop()
        slots = self._slots.get(loop)
        if slots is None or slots.process != os.getpid():
            for known, old in list(self._slots.items()):
                if known.is_closed() or old.process != os.getpid():
                    self._slots.pop(known).drop()
            slots = self._slots[loop] = Slots(
                self.names,
                self.repair,
                self._held_here,
                connections[0],
                self.timers(loop),  # a clock of a test stops at renewals
                deadline_us=self.context.deadline_us,
                on_outage=self._policy,
            )
        slots.use(connections[0])
        return slots

    async def _together(self, entries: Sequence[Entry | Joint], mode: Literal["check", "peek", "reset"]) -> list[Decision]:
        try:
            group = self._ask_together(entries, mode)
        except StorageUnavailable:  # more waits already than may
            await self._let_others_run(len(entries))
            raise
        try:
            if group.future.done():
                await self._let_others_run(len(entries))
            await group.future
        finally:
            group.leave()
        return group.decisions()

    async def _let_others_run(self, answers: int) -> None:
        """Keep a task that goes on asking, and is answered without a wait, from keeping the loop from Redis."""
        self._without_wait += answers
        if self._without_wait >= ANSWERS_MAX:
            self._without_wait = 0
            await asyncio.sleep(0)

    async def clear(self) -> None:
        """Reset every key of exactly this prefix, for all limiters that share it, and delete their states: for tests and demos.

        Other processes forget what they know of before it as soon as they hear of it: at the next call, or within 0.1 s. A denial
        that one of them has just heard may be repeated until then. Keys of other prefixes, as `app:other` beside `app`, and those
        that others keep under `app:` stay. So do the few by which processes know of each other and of this.

        Connecting may take `connect_timeout`, and each step after that the deadline. Raises StorageError; cancelled or failed, it may
        be half done.
        """
        if self._closed:
            raise StorageUnavailable(CLOSED)
        await self._clear(whole=False)

    async def _wipe(self) -> None:
        """Delete every key that begins with this prefix, those by which processes know of each other too: once no process uses it."""
        await self._clear(whole=True)

    async def _clear(self, *, whole: bool) -> None:
        found = self._master()  # not that of the connections, which may be of another loop
        connect_s = self._settings.connect_timeout_s
        try:
            async with asyncio.timeout(connect_s):
                connection = await found.connect()
            try:
                clearing = Clearing(connection, self.names, self._deadline_s)
                await (clearing.wipe() if whole else clearing.run(self.repair.epoch, self.repair.forget_all))
            finally:
                await close(connection)
        except (redis.RedisError, OSError) as error:
            raise failure(error, connect_s, sent=False) from None
        finally:
            await found.aclose()

    async def open(self, required: bool = False) -> None:
        """Connect, and wait until Redis serves us or an attempt has failed; if it is required, raise StorageError then.

        It takes `connect_timeout` at most.
        """
        connections = self._connections_here()
        give_up_s = time.monotonic() + self._settings.connect_timeout_s
        before = [connection.failures for connection in connections]
        for connection in connections:
            connection.connect()
        while time.monotonic() < give_up_s and not all(  # noqa: ASYNC110  # an answer on each of several connections
            connection.batch.serving or connection.closed or connection.failures > failures
            for connection, failures in zip(connections, before, strict=True)
        ):
            await asyncio.sleep(ASK_AGAIN_S)
        if required:
            # To read a key that nobody writes takes all that a check does: a connection, our scripts and the right to run them.
            probe = Limiter(self)
            probe._install(RateThrottleRule("probe", 1, 1, on_outage="raise").compiled)
            while True:
                try:
                    await self.peek(probe._entry("probe"))
                except StorageError as error:
                    repairing = str(error) == REPAIRING
                    # Redis answers. Only of single keys, such as the probe's, somebody may still tell it more.
                    if repairing and all(connection.batch.serving for connection in connections):
                        return
                    # One that has just lost something decides again within a second.
                    if not (repairing or self.repair.learning) or time.monotonic() >= give_up_s + LEARNS_S:
                        raise
                    await asyncio.sleep(ASK_AGAIN_S)
                else:
                    return

    async def aclose(self) -> None:
        """Close our connections for good, those of other loops too. The client that was passed in stays as it is.

        Slots that are held are given back, and their holders hear that they are lost. What is being settled in this loop is waited
        for, the deadline at most.
        """
        self._closed = True
        loop = asyncio.get_running_loop()
        settling = [settled for settled in self._settling if settled.get_loop() is loop and not settled.done()]
        try:
            if settling:
                await asyncio.wait(settling, timeout=self._deadline_s)
            left = self._leave_slots(loop)
            if left:
                await asyncio.wait(left, timeout=self._deadline_s)
        finally:
            await self._end()

    def _leave_slots(self, here: asyncio.AbstractEventLoop) -> list[asyncio.Future[None]]:
        """Have all loops give back the slots that they hold. Returns what to wait for."""
        left: list[asyncio.Future[None] | None] = []
        for loop in list(self._slots):
            slots = self._slots.pop(loop)
            if slots.process != os.getpid():
                continue
            if loop is here:
                left.append(slots.leave())
                continue
            try:
                over = slots.leave_there()
            except RuntimeError:  # it is closed
                slots.drop()
            else:
                left.append(asyncio.wrap_future(over) if loop.is_running() else None)
        return [each for each in left if each is not None]

    async def _end(self) -> None:
        self.repair.users.discard(self)
        self._forget_here()
        for known in list(self._open.values()):
            self._remember_sent(known)
        connections = self._open.pop(asyncio.get_running_loop(), ())
        abandon(self._open)
        if connections and connections[0].process == os.getpid():
            # All of it before the first await: a caller that is cancelled here leaves nothing that runs on.
            ends = [*[connection.end() for connection in connections], *connections[0].master.end()]
            try:
                await asyncio.wait(ends)
            except asyncio.CancelledError:
                for connection in connections:
                    connection.end_now()
                raise

    def _return_leases(self, rule: CompiledRule) -> None:
        """Have every connection give back what is left of leases under a rule that isn't asked about any more. From any thread."""
        if rule.lease_units:
            for loop, connections in list(self._open.items()):
                for connection in connections:
                    if connection.process == os.getpid():
                        with contextlib.suppress(RuntimeError):  # the loop is closed
                            loop.call_soon_threadsafe(connection.batch.return_leases, rule)

    def timers(self, loop: asyncio.AbstractEventLoop) -> Timers:
        """Find what calls back by this storage's time."""
        return loop

    def _batch_timers(self, loop: asyncio.AbstractEventLoop) -> Timers:
        return loop

    def _master(self) -> topology.Master:
        """Make what finds the master, for the running loop."""
        found = topology.master(self._settings, self._notices.moved)
        for put_before in self._between:
            found = put_before(found)
        return found

    def _connections_here(self) -> tuple[Connection, ...]:
        """Find or make the connections of this process and this loop."""
        if self._closed:
            raise StorageUnavailable(CLOSED)
        if self._forked():
            self._backoff = Backoff(self._backoff.most)  # the other one's connections aren't this one's, nor its turns
            self._notices.forget()
        loop = asyncio.get_running_loop()
        connections = self._open.get(loop)
        if connections is None or any(connection.closed for connection in connections) or connections[0].process != os.getpid():
            # Loops that are gone left their connections behind: this is where they are swept.
            for known, old in list(self._open.items()):
                if old[0].process != os.getpid():
                    _INHERITED.extend(old)
                elif known is loop:  # what is left of them
                    abandon({known: old})
                if known is loop or known.is_closed() or old[0].process != os.getpid():
                    self._remember_sent(old)
                    self._open.pop(known, None)
            found = self._master()
            connections = self._open[loop] = tuple(
                Connection(
                    self.context,
                    found,
                    self._backoff,
                    deadline_s=self._deadline_s,
                    connect_timeout_s=self._settings.connect_timeout_s,
                    max_waiting=self._max_waiting,
                    timers=self._batch_timers(loop),
                    patience_s=self._patience_s,
                )
                for _ in range(self._connections)
            )
        return connections

    def _batches_here(self) -> tuple[Batch, ...]:
        return tuple(connection.batch for connection in self._connections_here())

    def _remember_sent(self, connections: tuple[Connection, ...]) -> None:
        """Keep the counts of connections that are about to go: to a monitor, a count that falls looks like a restart."""
        ours = [connection for connection in connections if connection.process == os.getpid()]
        calls, items = self._sent_before
        calls += sum(connection.batch.sent_calls for connection in ours)
        self._sent_before = (calls, items + sum(connection.batch.sent_items for connection in ours))


def abandon(connections: dict[asyncio.AbstractEventLoop, tuple[Connection, ...]]) -> None:
    """Give up every connection: its own loop closes it, unless it belongs to the process that forked this one."""
    while connections:
        for connection in connections.popitem()[1]:
            if connection.process == os.getpid():
                connection.abandon()
                connection.master.abandon()
            else:
                _INHERITED.append(connection)
