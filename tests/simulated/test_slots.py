"""Lines of slots in several processes, over a store whose requests and replies are late, out of order, or lost. On a clock that jumps."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Hashable
from typing import Any

import pytest

from ratethrottle import ConcurrencyRule, InMemoryStorage, RateLimitExceeded, RateThrottleCore, StorageTimeout
from ratethrottle._engine.decision import Entry
from ratethrottle._holding import Ask, Held, Holder
from ratethrottle.storage.held import HeldSlots
from ratethrottle.waiting.slots import Slot
from tests.kit.timeless import run, timeless

DEADLINE_S = 0.25
LIMIT = 4
KEY = "key"


class Far:
    """A holder as a server knows it: nobody can call it."""

    gone = False

    def __init__(self, entry: Entry) -> None:
        self.entry = entry

    def lost(self) -> None:
        """It finds out when it asks."""

    wake = lost


class Server:
    """What all processes ask. An ask that is older than one that it has heard changes nothing."""

    def __init__(self) -> None:
        self.slots = HeldSlots()
        self.known: dict[Hashable, tuple[Far, int]] = {}

    def apply(self, holder: Holder, rule: ConcurrencyRule, number: int, ask: Ask) -> Held | None:
        far, heard = self.known.get(holder) or (Far(holder.entry), 0)
        if number < heard:
            return None
        self.known[holder] = far, number
        answer = self.slots.hold(far, rule, ask)
        return answer._replace(source="redis", ask_again_s=0.03 if answer.granted < ask.wanted else 0.0)


class Process(InMemoryStorage):
    """The storage of one process, at the end of a bad line."""

    def __init__(self, server: Server, rng: random.Random, bad: float) -> None:
        super().__init__(clock_us=timeless().time_us)
        self.server = server
        self.rng = rng
        self.bad = bad  # how likely a request or a reply is late or lost
        self.numbers: dict[Holder, int] = {}
        self.calls = 0
        self.busy: set[Holder] = set()

    def hold(self, holder: Holder, rule: ConcurrencyRule, ask: Ask) -> Any:
        assert holder not in self.busy  # one ask at a time
        self.busy.add(holder)
        self.calls += 1
        number = self.numbers[holder] = self.numbers.get(holder, 0) + 1
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Held] = loop.create_future()
        future.add_done_callback(lambda _: self.busy.discard(holder))

        def arrive() -> None:
            answer = self.server.apply(holder, rule, number, ask)
            if answer is not None and (way_s := self.way_s()) is not None:
                loop.call_later(way_s, reply, answer)

        def reply(answer: Held) -> None:
            if not future.done():
                future.set_result(answer)

        def give_up() -> None:
            if not future.done():
                future.set_exception(StorageTimeout(DEADLINE_S))

        way_s = self.way_s()
        if way_s is not None:
            loop.call_later(way_s, arrive)
        loop.call_later(DEADLINE_S, give_up)
        return future

    def has_lost(self, slot: Slot) -> bool:
        """Whether the server has forgotten the slot, which its holder doesn't know yet."""
        assert slot._line is not None
        far, _ = self.server.known[slot._line]
        return any(far in slots.forgotten for slots in self.server.slots._keys.values())

    def way_s(self) -> float | None:
        """How long a message takes; None for ever."""
        if self.rng.random() < self.bad:
            return self.rng.choice((None, self.rng.uniform(0.05, 0.6)))
        return self.rng.uniform(0.0002, 0.002)


class Log:
    """The blocks that run, as an observer outside sees them."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.inside: dict[object, int] = {}
        self.served = 0

    def enter(self, who: object, cost: int) -> None:
        self.inside[who] = cost
        self.served += 1
        assert sum(self.inside.values()) <= self.limit

    def leave(self, who: object) -> None:
        self.inside.pop(who, None)

    def forget(self) -> None:
        """What is held by now counts no more."""
        self.inside.clear()


async def client(core: RateThrottleCore, rng: random.Random, log: Log, rounds: int) -> None:
    for _ in range(rounds):
        cost = rng.choice((1, 1, 1, 2, LIMIT))
        timeout = rng.choice((None, 0, 0.3, 5))
        await asyncio.sleep(rng.uniform(0, 0.02))
        with contextlib.suppress(RateLimitExceeded, StorageTimeout, TimeoutError):
            async with asyncio.timeout(rng.choice((None, None, 0.1))), core.slot(KEY, cost=cost, timeout=timeout) as slot:
                if not core._storage.has_lost(slot):
                    log.enter(slot, cost)
                try:
                    await asyncio.sleep(rng.uniform(0, 0.05))
                    if rng.random() < 0.1:
                        log.leave(slot)
                        await slot.release()
                finally:
                    log.leave(slot)


@pytest.mark.parametrize("bad", [0, 0.02, 0.2, 0.5])
@pytest.mark.parametrize("forgets", [False, True])
def test_there_are_never_more_holders_than_the_limit(bad: float, forgets: bool) -> None:
    async def main() -> None:
        seed = random.randrange(2**32)
        print("seed", seed)
        rng = random.Random(seed)
        server, log, rule = Server(), Log(LIMIT), ConcurrencyRule("exports", LIMIT)
        processes = [Process(server, rng, bad) for _ in range(4)]
        cores = [RateThrottleCore(process, rules=[rule]) for process in processes]
        entry = cores[0].slot(KEY)._claim.entry

        async def forget() -> None:
            while True:
                await asyncio.sleep(rng.uniform(0.2, 2))
                log.forget()
                server.slots.forget(rule, entry)

        forgetting = asyncio.create_task(forget()) if forgets else None
        await asyncio.gather(*(client(core, rng, log, 40) for core in cores for _ in range(6)))
        if forgetting is not None:
            forgetting.cancel()
        ends_s = timeless().time() + 120
        while len(server.slots) + sum(len(core._lines) for core in cores) and timeless().time() < ends_s:  # noqa: ASYNC110  # a count
            await asyncio.sleep(1)  # what couldn't be given back at once
        assert len(server.slots) == 0
        assert [len(core._lines) for core in cores] == [0] * 4
        assert log.served > 5

    run(main)


def test_a_slot_that_is_given_back_where_others_wait_costs_one_call() -> None:
    async def main() -> None:
        store, log = Process(Server(), random.Random(1), 0), Log(1)
        core = RateThrottleCore(store, rules=[ConcurrencyRule("exports", 1)])

        async def caller() -> None:
            async with core.slot(KEY, timeout=None) as slot:
                log.enter(slot, 1)
                await asyncio.sleep(0.001)
                log.leave(slot)

        await asyncio.gather(*(caller() for _ in range(100)))
        print(store.calls, "calls for", log.served, "slots")
        assert store.calls <= log.served + 3

    run(main)
