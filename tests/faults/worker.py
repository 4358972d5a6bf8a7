"""A worker process: 50 tasks that check at a steady pace, told what to do through a pipe. It imports little: many are started."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import random
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import redis.sentinel

from ratethrottle import ConcurrencyRule, Decision, RateThrottleCore, RateThrottleRule, RedisStorage, create_limiter
from ratethrottle.errors import RateThrottleError
from tests.faults.records import CONNECTS, HELD, HELD_BY_POLICY, HOLDS, HOLDS_BY_POLICY, KINDS, LATE, RECORD, monotonic_us
from tests.faults.uses import WIDE, Ask, Use, checks, everything

KEYS = 32
SECRET = "raw-k3y"  # no log, repr or exception may show it
PASSWORD = "pa55word"  # nor this
LATE_US, BEAT_S = 2_000, 0.005
BUSY_MS = 50.0  # of its own CPU, harness included: more at a stretch isn't forgiven as lag of a busy machine
UNREADY_S = 5.0


def keys() -> list[str]:
    """The keys that all workers share; the first are the busiest."""
    return [f"{SECRET}:{number}" for number in range(KEYS)]


@dataclass(frozen=True)
class Work:
    """What one process does. every_s: how often each task asks, on average. everything: it does all that a user can."""

    number: int
    url: str
    rules: tuple[RateThrottleRule | ConcurrencyRule, ...]
    log: Path
    options: dict[str, Any] = field(default_factory=dict)
    tasks: int = 50
    every_s: float = 0.05
    processes: int = 4
    seed: int = 1
    everything: bool = False


class Noise:
    """Collects what nobody else hears: exceptions that no one retrieved, unraisable ones, warnings, log lines."""

    def __init__(self) -> None:
        self.noise: list[str] = []
        self.told: list[str] = []  # whatever a log, an event, an error or a repr said

    def listen(self) -> None:
        """From here on, in this process."""
        asyncio.get_running_loop().set_exception_handler(self._unretrieved)
        sys.unraisablehook = lambda what: self.noise.append(f"unraisable {what.exc_value!r} in {what.object!r}")
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, *_: self.noise.append(f"{type(message).__name__}: {message}")
        handler = logging.Handler()
        handler.emit = lambda record: self.tell(handler.format(record))  # type: ignore[method-assign]  # for one use
        logging.getLogger().addHandler(handler)
        logging.getLogger().setLevel(logging.DEBUG)

    def _unretrieved(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        places = traceback.extract_tb(error.__traceback__)[-3:] if error else []
        where = " < ".join(f"{place.name}:{place.lineno}" for place in reversed(places))
        self.noise.append(f"{context.get('message')}: {error!r} {where}".rstrip())

    def tell(self, what: str) -> None:
        """Keep what was said, each thing once."""
        if len(self.told) < 10_000 and what not in self.told[-100:]:
            self.told.append(what)


def open_files() -> int:
    """How many descriptors this process has."""
    return len(list(Path("/proc/self/fd").iterdir()))


def resident_bytes() -> int:
    """How much memory it takes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Worker:
    """The tasks, and what they write."""

    def __init__(self, work: Work, pipe: Connection) -> None:
        self.work, self.pipe, self.noise = work, pipe, Noise()
        self.told: asyncio.Queue[Any] = asyncio.Queue()
        self.log = os.open(work.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self.random = random.Random(f"{work.seed} {work.number}")
        self.keys = keys()
        self.weights = list(accumulate(1 / (1 + number) for number in range(KEYS)))
        self.events: list[dict[str, Any]] = []
        self.running = asyncio.Event()
        self.garbage_ns = 0  # spent on collecting it
        self.busy: list[tuple[float, float]] = []  # how long the loop was kept busy at a stretch, and by garbage, in ms
        self.ended = False

    def write(self, kind: int, before_us: int, after_us: int, *, allowed: bool = False, rule: int = 0, key: int = 0) -> None:
        os.write(self.log, RECORD.pack(kind, allowed, rule, key, before_us, after_us))

    def limiter(self) -> RateThrottleCore:
        """By a URL; or as the second block of the reference page does it, with the synchronous client, where that says `page+`."""
        _, _, where = self.work.url.rpartition("page+redis+sentinel://")
        if where == self.work.url:
            return create_limiter("redis", redis_url=where, rules=self.work.rules, **self.work.options)
        hosts, name, _ = where.split("/")
        addresses = [(host, int(port)) for host, _, port in (one.partition(":") for one in hosts.split(","))]
        client = redis.sentinel.Sentinel(addresses).master_for(name)
        return RateThrottleCore(RedisStorage(client, **self.work.options), rules=self.work.rules)

    async def client(self, limiter: RateThrottleCore) -> None:
        """One task."""
        use: Use = everything if self.work.everything else checks
        ask = Ask(limiter, self.keys, self.random, self.write_held, self.write_holds, self.random.randrange(100))
        while not self.ended:
            await asyncio.sleep(self.random.uniform(0, 2 * self.work.every_s))
            await self.running.wait()
            ask.turn += 1
            key, other = self.random.choices(range(KEYS), cum_weights=self.weights, k=2)
            before_us = monotonic_us()
            try:
                async with use(ask, key, other) as decision:
                    # Here and not behind it, for what is reserved is settled there.
                    for limit in ask.charged(decision):
                        self.write_call(decision.source, before_us, limit, allowed=decision.allowed)
            except RateThrottleError as error:
                self.noise.tell(f"{error!r} {error} {error.__cause__!r}")
                self.write_call(type(error).__name__, before_us, ask.limits[0])
            except Exception as error:  # noqa: BLE001  # an error that isn't ours is what this looks for
                self.noise.noise.append(f"a use raised {error!r}")
                self.write_call("other error", before_us, ask.limits[0])

    def write_call(self, kind: str, before_us: int, limit: tuple[int, int], *, allowed: bool = False) -> None:
        rule, key = limit
        known = KINDS.index(kind if kind in KINDS else "other error")
        self.write(known, before_us, monotonic_us(), allowed=allowed, rule=rule, key=key)

    def write_held(self, decision: Decision, limit: tuple[int, int], began_us: int, ended_us: int) -> None:
        self.write(HELD_BY_POLICY if decision.source == "outage" else HELD, began_us, ended_us, rule=limit[0], key=limit[1])

    def write_holds(self, decision: Decision, limit: tuple[int, int], began_us: int) -> None:
        self.write(HOLDS_BY_POLICY if decision.source == "outage" else HOLDS, began_us, 0, rule=limit[0], key=limit[1])

    async def watch_loop(self) -> None:
        """Write down when a timer was late by more than 2 ms: what a call took beyond that is not the loop's fault."""
        while True:
            due_us = monotonic_us() + round(BEAT_S * 1e6)
            used_ns, garbage_ns = time.thread_time_ns(), self.garbage_ns
            await asyncio.sleep(BEAT_S)
            now_us = monotonic_us()
            if now_us > due_us + LATE_US:
                self.write(LATE, due_us, now_us)
            # A busy machine is no fault of ours, but what this very thread did is.
            if (busy_ms := (time.thread_time_ns() - used_ns) / 1e6) > BUSY_MS:
                self.busy.append((busy_ms, (self.garbage_ns - garbage_ns) / 1e6))

    def _collect(self, phase: str, _: dict[str, int]) -> None:
        self.garbage_ns += time.thread_time_ns() * (1 if phase == "stop" else -1)

    def sample(self, limiter: RateThrottleCore) -> dict[str, Any]:
        """What may not grow, and what the limiter says of itself."""
        statistics = asdict(limiter.statistics())
        self.noise.tell(f"{statistics} {limiter!r}")
        return {
            "files": open_files(),
            "bytes": resident_bytes(),
            "tasks": len(asyncio.all_tasks()),
            "statistics": statistics,
            "events": list(self.events),
        }

    def take_note(self, event: Any) -> None:
        self.noise.tell(repr(event))
        self.events.append({"kind": event.kind, "at_us": monotonic_us()})

    async def ready(self, limiter: RateThrottleCore) -> None:
        """Until it is connected and knows of all the others."""
        give_up_us = monotonic_us() + round(UNREADY_S * 1e6)
        while limiter.statistics().processes < self.work.processes and monotonic_us() < give_up_us:
            with contextlib.suppress(RateThrottleError):  # under `raise` it may not be there yet
                await limiter.peek("warm", self.work.rules[WIDE].name)
            await asyncio.sleep(0.02)

    async def run(self) -> None:
        """Serve the pipe until that says to end."""
        loop = asyncio.get_running_loop()
        self.noise.listen()
        loop.add_reader(self.pipe.fileno(), self._hear)
        before = {"files": open_files(), "tasks": len(asyncio.all_tasks())}
        sys.addaudithook(self._audit)
        limiter = self.limiter()
        forget: Callable[[], None] = limiter.on_event(self.take_note)
        await self.ready(limiter)
        self.running.set()
        gc.callbacks.append(self._collect)
        watch = asyncio.create_task(self.watch_loop())
        self.pipe.send({"ready": self.sample(limiter)})
        clients: list[asyncio.Task[None]] = []
        while (word := await self.told.get()) != "end":
            if word == "go":
                clients = [asyncio.create_task(self.client(limiter)) for _ in range(self.work.tasks)]
            elif word == "rest":
                self.running.clear()
            elif word == "resume":
                self.running.set()
            elif word == "sample":
                self.pipe.send(self.sample(limiter))
        self.ended = True
        self.running.set()
        # A call that hangs is what the deadline forbids: give each a multiple of it, and say so.
        pending = (await asyncio.wait(clients, timeout=5))[1] if clients else set()
        hangs = len(pending)
        for task in pending:
            task.cancel()
        await asyncio.gather(*clients, return_exceptions=True)
        last = self.sample(limiter)
        forget()
        await limiter.aclose()
        watch.cancel()
        await asyncio.gather(watch, return_exceptions=True)
        del limiter, clients, watch, pending
        for _ in range(3):
            await asyncio.sleep(0.01)
            gc.collect()
        after = {"files": open_files(), "tasks": len(asyncio.all_tasks())}
        secrets = [told for told in self.noise.told if SECRET in told or PASSWORD in told]
        lines = {"noise": self.noise.noise, "busy": self.busy, "secrets": secrets, "told": len(self.noise.told)}
        self.pipe.send({"before": before, "last": last, "after": after, "hangs": hangs, **lines})

    def _hear(self) -> None:
        try:
            self.told.put_nowait(self.pipe.recv())
        except EOFError:  # the process that started this one has gone
            os._exit(1)

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "socket.connect":
            now_us = monotonic_us()
            address = arguments[1]
            port = address[1] if isinstance(address, tuple) else 0
            self.write(CONNECTS, now_us, now_us, key=port)


def run_worker(work: Work, pipe: Connection) -> None:
    """Be a worker process."""

    async def main() -> None:
        await Worker(work, pipe).run()

    # As the gc module's page has it for forked processes: else each full collection goes through all that the tests imported, and
    # copies it, which is no work of ours but counts as the loop's.
    gc.freeze()
    asyncio.run(main())
