"""Processes that share a store, without sockets and without sleep: the test decides when anything happens.

A `Process` is a storage with a limiter on it, an event loop that the test runs, and a clock that runs a little fast
or slow. What it sends waits in its `Connection` until `serve` has the decision script run it on a real Redis, at the store's time;
replies wait there until `deliver` hands them over, whole or in pieces. The `World` hears of checks that have ended.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import random
from asyncio.events import _get_running_loop, _set_running_loop
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import redis

from ratethrottle import FirstOf
from ratethrottle._core import Limiter, PendingDecision
from ratethrottle._engine.decision import Decision
from ratethrottle._engine.definitions import CompiledRule
from ratethrottle._engine.keys import KeyTable
from ratethrottle._several import SeveralRules
from ratethrottle.errors import StorageError, StorageUnavailable
from ratethrottle.storage._shared.batch import Batch
from ratethrottle.storage._shared.keynames import KeyNames
from ratethrottle.storage._shared.repair import Repair
from ratethrottle.storage._shared.shared import SharedStorage
from ratethrottle.storage.redis.wire import written
from tests.kit.clocked import RUN
from tests.kit.store import SCRIPTS, START_US, Item, JointItem, Part, Request, Store

Set = tuple[str, Sequence[CompiledRule], int]  # key, rules, cost

prefixes = itertools.count()


class FakeLoop:
    """As much of an event loop as a batch uses. The test runs it."""

    def __init__(self, clock_us: Callable[[], int]) -> None:
        self.clock_us = clock_us
        self.ready: deque[tuple[Callable[..., Any], tuple[Any, ...]]] = deque()
        self.timers: list[tuple[int, int, Timer]] = []
        self.order = itertools.count()

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)  # type: ignore[arg-type]  # as much of a loop as a future asks for

    def get_debug(self) -> bool:
        return False

    def call_soon(self, callback: Callable[..., Any], *args: Any, context: Any = None) -> None:
        self.ready.append((callback, args))

    def call_later(self, delay_s: float, callback: Callable[..., Any], *, context: Any = None) -> Timer:
        timer = Timer(self.clock_us() + round(delay_s * 1_000_000), callback)
        heapq.heappush(self.timers, (timer.at_us, next(self.order), timer))
        return timer

    def turn(self) -> None:
        """Run what is due, once."""
        while self.timers and self.timers[0][0] <= self.clock_us():
            timer = heapq.heappop(self.timers)[2]
            if timer.callback is not None:
                self.ready.append((timer.callback, ()))
        for _ in range(len(self.ready)):
            callback, args = self.ready.popleft()
            callback(*args)


class Timer:
    def __init__(self, at_us: int, callback: Callable[..., Any]) -> None:
        self.at_us = at_us
        self.callback: Callable[..., Any] | None = callback

    def cancel(self) -> None:
        self.callback = None


@contextmanager
def running(loop: FakeLoop) -> Iterator[None]:
    before = _get_running_loop()
    _set_running_loop(loop)  # type: ignore[arg-type]  # only asked whether it is the same
    try:
        yield
    finally:
        _set_running_loop(before)


class Check:
    """A check under way, awaited as a task would await it."""

    def __init__(self, process: Process, key: str, rule: CompiledRule, cost: int) -> None:
        self.process, self.key, self.rule, self.cost = process, key, rule, cost
        self.state_key = process.state_key(key, rule)
        self.began_us = process.now_us()
        self.pending: PendingDecision | None = None
        self.future: asyncio.Future[Any] | None = None
        self.entered = False  # it had to wait
        self.closed = False
        self.decision: Decision | None = None
        self.error: BaseException | None = None
        self.ended_us = 0
        self.item: Item | JointItem | None = None  # what it was sent in, and as which one
        self.position = 0

    @property
    def state_keys(self) -> list[bytes]:
        return [self.state_key]

    @property
    def over(self) -> bool:
        return self.closed or self.decision is not None or self.error is not None

    @property
    def waits(self) -> bool:
        """Whether it may still be sent."""
        return self.item is None and not self.over and self.future is not None and not self.future.done()

    def go_on(self) -> None:
        """Step it, as its task would."""
        assert self.pending is not None
        try:
            while (future := self.pending.send(None)) is None:
                pass
        except StopIteration as stop:
            self.decision = stop.value
        except StorageError as error:
            self.error = error
        else:
            assert future._asyncio_future_blocking
            future._asyncio_future_blocking = False
            self.future, self.entered = future, True
        self.ended_us = self.process.now_us()

    def cancel(self, *, at_once: bool = True) -> None:
        """As `task.cancel()` does; `close` comes when the task runs."""
        if self.future is not None:
            self.future.cancel()
        if at_once:
            self.close()

    def close(self) -> None:
        assert self.pending is not None
        self.closed = True
        self.pending.close()


class JointCheck(Check):
    """A check of several limits: of each set a key, its rules, of which the first that allows pays, and a cost."""

    def __init__(self, process: Process, sets: Sequence[Set]) -> None:
        super().__init__(process, sets[0][0], sets[0][1][0], sets[0][2])
        self.sets = [[Part(rule, process.state_key(key, rule), cost) for rule in rules] for key, rules, cost in sets]

    @property
    def state_keys(self) -> list[bytes]:
        return [part.key for parts in self.sets for part in parts]


AnyCheck = TypeVar("AnyCheck", bound=Check)


class Connection:
    """A transport of a batch with nothing but queues behind it."""

    def __init__(self, process: Process, loop: FakeLoop) -> None:
        self.batch = Batch(process.context, self, loop, 1_000_000)  # type: ignore[arg-type]  # as much of a loop as it uses
        self.loop = loop
        self.process = process
        self.wanted = False
        self.unserved: deque[Request] = deque()
        self.unread = b""
        self.unsettled: deque[Request] = deque()
        self.requests: list[Request] = []
        self.tamper: Callable[[Request, Any], Any] = lambda request, reply: reply
        self.connect_at_us = 0  # for tests that say when
        self.mute = False  # what it would tell the store of what it knows is taken for told

    def connect(self) -> None:
        self.batch.connecting()
        self.wanted = True

    def unsent(self) -> StorageError:
        return StorageUnavailable("not sent")

    def refused(self, call: Any, text: bytes) -> None:
        raise AssertionError(call, text)

    def take_back(self) -> None:
        """What the store refused for want of the script waits again."""
        for request in [request for request in self.unsettled if request.refused][:1]:
            self.unsettled.remove(request)
            for item in (*request.items, *request.joints):
                for check in item.members:
                    check.item = None

    def broken(self, what: str) -> None:
        raise AssertionError(what)

    def late(self) -> None:
        self.lose()
        self.batch.begin_outage(StorageUnavailable("late"))

    def retry_us(self) -> int:
        return 500_000

    def answered(self) -> None:
        pass

    def _write(self, data: bytes) -> None:
        request = Request(data)
        self.unserved.append(request)
        if request.mode in {"beat", "repair", "slots"}:
            return
        self.requests.append(request)
        if request.loads:
            self.take_back()
        else:
            self.unsettled.append(request)
            self.process.world.sent(self.process, request)

    def open(self) -> None:
        self.wanted = False
        self.batch.connected(self._write, SCRIPTS, self.process.world.run.encode())

    def lose(self) -> None:
        """The connection breaks. What was sent may still be run."""
        self.process.world.adrift += self.unserved
        self.unserved.clear()
        self.unsettled.clear()
        self.unread = b""
        if self.batch.open:
            self.wanted = False  # unless it asks again
            self.batch.lost(StorageUnavailable("lost"))

    def serve(self) -> None:
        """The server runs the next call."""
        if self.unserved:
            request = self.unserved.popleft()
            world = self.process.world
            if self.mute and request.mode == "repair":
                request.say_nothing()
            self.unread += written(self.tamper(request, world.store.run(request, world.server_us())))

    def deliver(self, size: int | None = None) -> None:
        """The first bytes of what was answered come, or all."""
        data, self.unread = self.unread[:size], self.unread[len(self.unread[:size]) :]
        if data:
            with running(self.process.loop):
                self.batch.received(data)


class Process(SharedStorage):
    """A process: a storage, a loop and a limiter, with a clock that runs at `rate` millionths of the world's."""

    table = None

    def __init__(
        self,
        world: World,
        *,
        rate: int = 1_000_000,
        ttl_us: int = 1_000_000,
        deadline_us: int = 250_000,
        offset_us: int = START_US,
        max_bounds: int = 1_000,
        deny_overload: bool = False,
        expected: int = 0,
    ) -> None:
        self.world, self.rate, self.offset_us = world, rate, offset_us
        table = KeyTable(max_bounds, bounds=True, clock_us=self.now_us)
        repair = Repair(table, world.names)
        super().__init__(world.names, repair, deadline_us, ttl_us, expected=expected, deny_overload=deny_overload)
        self.loop = FakeLoop(self.now_us)
        self.connection = Connection(self, self.loop)
        self.limiter = Limiter(self)
        self.limiter._several = self.several = SeveralRules(self.limiter._rules, self)
        self.checks: list[Check] = []
        self.queues: defaultdict[bytes, list[Check]] = defaultdict(list)  # by key, in the order in which they entered
        self.blind_until_us: dict[bytes, int] = {}
        world.processes.append(self)

    def now_us(self) -> int:
        return self.offset_us + self.world.t_us * self.rate // 1_000_000

    def _batches_here(self) -> tuple[Batch, ...]:
        return (self.connection.batch,)

    def _install(self, rule: CompiledRule) -> str:
        if self.limiter._rules.get(rule.name) != rule:
            self.limiter._install(rule)
        return rule.name

    def state_key(self, key: str, rule: CompiledRule) -> bytes:
        return self.names.state_key(self.limiter._entry(key, self._install(rule), 1))

    def check(self, key: str, rule: CompiledRule, cost: int = 1) -> Check:
        """Begin a check. One that needs no answer is over when this returns."""
        return self._begin(Check(self, key, rule, cost), lambda: self.limiter.check(key, rule.name, cost=cost))

    def check_jointly(self, *sets: Set) -> JointCheck:
        """Begin a check of several limits."""
        check = JointCheck(self, sets)
        joint = self.joint_of(sets)
        return self._begin(check, lambda: self.limiter._check_joint(joint))

    def joint_of(self, sets: Sequence[Set]) -> Any:
        """What a check of several limits gives to a storage."""
        named = [[self._install(rule) for rule in rules] for _, rules, _ in sets]
        return self.several.together(
            [
                (key, names[0] if len(names) == 1 else FirstOf(*names), cost)
                for (key, _, cost), names in zip(sets, named, strict=True)
            ]
        )

    def _begin(self, check: AnyCheck, begin: Callable[[], PendingDecision]) -> AnyCheck:
        with running(self.loop):
            check.pending = begin()
            check.go_on()
        self.checks.append(check)
        if check.entered:
            for key in check.state_keys:
                self.queues[key].append(check)
        else:
            self.world.ended(check)
        return check

    def ask(self, entries: Sequence[tuple[str, CompiledRule, int] | list[Set]], mode: str) -> Any:
        """Begin a `check_many`, or a peek or reset; a list of sets is a check of several limits. Returns the group."""
        asked = [
            self.joint_of(entry) if isinstance(entry, list) else self.limiter._entry(entry[0], self._install(entry[1]), entry[2])
            for entry in entries
        ]
        with running(self.loop):
            return self._ask_together(asked, mode)

    def turn(self) -> None:
        """Let the loop run what is due."""
        with running(self.loop):
            self.loop.turn()

    def work(self, for_us: int) -> None:
        """Time passes, and the loop works: it is never late by more than a millisecond."""
        while for_us > 0:
            self.world.t_us += min(for_us, 1_000)
            for_us -= 1_000
            self.turn()

    def round_trip(self) -> None:
        """Let the loop run, and everything that it sends be answered at once."""
        self.turn()
        self.connect()
        while self.connection.unserved or self.connection.unread:
            self.connection.serve()
            self.connection.deliver()
        self.poll()

    def connect(self) -> None:
        """A connection is made, if one is wanted, and the first beat answered."""
        if self.connection.wanted and not self.connection.batch.open:
            with running(self.loop):
                self.connection.open()
            self.connection.serve()
            self.connection.deliver()

    def poll(self) -> None:
        """Let those go on whose wait is over."""
        for check in [check for queue in self.queues.values() for check in queue]:
            if check.future is not None and check.future.cancelled():
                if not check.closed:
                    check.close()
            elif check.future is not None and check.future.done() and not check.over:
                with running(self.loop):
                    check.go_on()
                self.world.ended(check)
        for key, queue in list(self.queues.items()):
            self.queues[key] = [check for check in queue if not check.over]


class World:
    """Time, the store, and the processes. `broken` raises what a test is about."""

    def __init__(self, client: redis.Redis, *, oracle: bool = False) -> None:
        self.t_us = 0
        self.run = RUN  # of the server
        self.step_us = 0  # by which the server's clock has been set
        prefix = b"w%d" % next(prefixes)
        self.names = KeyNames(prefix, 4)
        self.store = Store(client, prefix, oracle=oracle)
        self.processes: list[Process] = []
        self.adrift: list[Request] = []
        self.when_ended: Callable[[Check], None] = lambda check: None
        self.when_sent: Callable[[Process, Request], None] = lambda process, request: None

    def fail_over(self, kept: dict[bytes, bytes]) -> None:
        """Another server is the master from now on, which has only this; connections end."""
        self.store.lose(kept)
        self.run = self.run[::-1]
        for process in self.processes:
            process.connection.lose()

    def server_us(self) -> int:
        return START_US + self.t_us + self.step_us

    def ended(self, check: Check) -> None:
        if not check.closed:
            self.when_ended(check)

    def sent(self, process: Process, request: Request) -> None:
        self.when_sent(process, request)

    def disturb(self, process: Process, rng: random.Random) -> None:
        """Something happens between a process and the store: bytes move or are lost, a check is given up, scripts are forgotten."""
        connection = process.connection
        match rng.choices(range(6), (12, 12, 12, 6, 1, 1))[0]:
            case 0:
                process.turn()
                process.connect()
            case 1:
                connection.serve()
            case 2:
                connection.deliver(rng.choice((None, None, rng.randint(1, 60))))
            case 3:
                if waiting := [check for queue in process.queues.values() for check in queue]:
                    rng.choice(waiting).cancel(at_once=rng.random() < 0.5)
            case 4:
                connection.lose()
            case 5:
                self.store.forgot_scripts = True
        if self.adrift and rng.random() < 0.5:
            self.store.run(self.adrift.pop(0), self.server_us())

    def settle(self, rounds: int = 20) -> None:
        """Let everybody do what there is to do, with no time passing."""
        for _ in range(rounds):
            for process in self.processes:
                process.round_trip()
            if not any(
                process.loop.ready or process.connection.unserved or process.connection.wanted for process in self.processes
            ):
                return

    def end(self) -> None:
        """Let everything end, and see that nothing is left behind."""
        for _ in range(12):
            self.settle()
            self.t_us += 150_000
        for process in self.processes:
            assert process.connection.batch.callers == process.connection.batch.calls_in_flight == 0
            assert (process.connection.batch.state == "connecting") == process.connection.wanted
            for check in process.checks:
                assert check.over, "a check never ended"
                if check.entered:
                    assert check.future is None or check.future.done() or check.closed
