"""What comes back is not what was asked for."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

from ratethrottle import Decision, RateThrottleCore, RateThrottleRule, create_limiter
from ratethrottle.errors import StorageError
from tests.faults.board import Run, row
from tests.faults.fleet import Fleet
from tests.faults.proxy import Proxy
from tests.faults.worker import PASSWORD, open_files
from tests.kit.servers import RedisServer

HUGE = b"*1000000000\r\n"
MEMORY_BYTES = 10_000_000
SPELL = 60  # times, of 0.1 s
# Each has a limit of its own, so that a reply that reaches another caller shows.
MANY = [RateThrottleRule(f"r{limit}", limit, 3600, strategy="fixed_window") for limit in range(1_000_000, 1_000_100)]


def tampered(run: Run, modes: Callable[[int], dict[str, Any]], times: int, **expected: Any) -> None:
    """Do something to a reply ten times a second, under load. Not for long: a process that never gets through must stay counted."""
    with RedisServer(password=PASSWORD) as server, Proxy(server.socket, password=PASSWORD) as proxy:
        server.grow_old()
        with Fleet(proxy.url) as fleet:
            fleet.calm(2)
            before = [sample["bytes"] for sample in fleet.samples()]
            counted = 0
            for first in range(0, times, SPELL):
                with fleet.fault():
                    for number in range(first, min(times, first + SPELL)):
                        proxy.set(**modes(number))
                        fleet.calm(0.1)
                    counted = proxy.set()["tampered"]
                fleet.calm(2)
            grown = max(after["bytes"] - first for after, first in zip(fleet.samples(), before, strict=True))
        run.judge(fleet, admits=False, **expected)  # the few calls of one connection may all be denied
        run.note(f"{counted} replies were changed; {grown / 1e6:.1f} MB more at most")
        run.expect(counted >= times / 2, f"only {counted} of {times} replies were changed")
        run.expect(grown <= MEMORY_BYTES, f"a process grew by {grown / 1e6:.1f} MB")


@row(short=True)
def stray_reply(run: Run) -> None:
    """A stray `:1` before a reply"""
    tampered(run, lambda _: {"before": b":1\r\n"}, run.count(30, 10))


@row()
def stray_error(run: Run) -> None:
    """A stray `-NOSCRIPT` or `-ERR` before a reply"""
    errors = (b"-NOSCRIPT No matching script. Please use EVAL.\r\n", b"-ERR x\r\n", b"-BUSY x\r\n")
    tampered(run, lambda number: {"before": errors[number % 3]}, run.count(30, 10))


@row()
def repeated_reply(run: Run) -> None:
    """A reply comes twice"""
    tampered(run, lambda _: {"repeat": True}, run.count(30, 10))


@row()
def cut_reply(run: Run) -> None:
    """The connection ends after k bytes of a reply, for each k below 60, and for some further on"""
    tampered(run, lambda number: {"cut_at": number if number < 60 else 7 * number}, run.count(120, 10))


@row()
def huge_reply(run: Run) -> None:
    """A reply announces 10^9 elements"""
    tampered(run, lambda _: {"instead": HUGE}, run.count(30, 10))


@row()
def nonsense_reply(run: Run) -> None:
    """Other people's protocols, and half a number"""
    others = (b"HTTP/1.1 400 Bad Request\r\n\r\n", b"$-2\r\n", b":12x\r\n", b"*-7\r\n", b"\x00" * 100, b"*2\r\n$1\r\nx\r\n:1\r\n")
    tampered(run, lambda number: {"instead": others[number % len(others)]}, run.count(30, 12))


async def cancelling(limiter: RateThrottleCore, rng: random.Random, checks: int, *, at_once: int = 50) -> Counter[str]:
    """Check, and cancel about half at random, some twice. Returns how many ended in which way."""
    counts: Counter[str] = Counter()
    for _ in range(0, checks, at_once):
        rules = [rng.choice(MANY) for _ in range(at_once)]
        tasks = [asyncio.ensure_future(limiter.check("user", rule.name)) for rule in rules]
        cancel = rng.sample(tasks, at_once // 2 + 5)  # some are decided before that
        for task in cancel:
            if rng.random() < 0.05:
                await asyncio.sleep(rng.choice((0, 0, 0, 0.0005)))
            if not task.done():
                task.cancel()
                if rng.random() < 0.2:
                    asyncio.get_running_loop().call_soon(task.cancel)
        for rule, result in zip(rules, await asyncio.gather(*tasks, return_exceptions=True), strict=True):
            if isinstance(result, Decision):
                counts["decided"] += 1
                counts["mismatched"] += (result.rule, result.limit) != (rule.name, rule.limit)
            elif isinstance(result, StorageError):
                counts["failed"] += 1
            elif isinstance(result, asyncio.CancelledError):
                counts["cancelled"] += 1
            else:
                raise result
    return counts


def cancelled(run: Run, checks: int, **mode: Any) -> None:
    """Cancel at random behind a proxy, and count what Redis has counted."""
    noise: list[Any] = []

    connecting = "greet_s" in mode

    async def main(url: str, cut: Callable[[], object]) -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: noise.append(context))
        before = open_files()
        limiter = create_limiter("redis", redis_url=url, rules=MANY, deadline=5, on_outage="raise")
        rng, counts = random.Random(run.seed), Counter[str]()
        if not connecting:
            await limiter.peek("user", MANY[0].name)
            counts += await cancelling(limiter, rng, checks)
            run.expect(not counts["failed"], f"{counts['failed']} checks failed")
        for number in range(checks // 500 if connecting else 0):
            if number:
                cut()  # the next ones find a connection that ends, and have to wait for another
            counts += await cancelling(limiter, rng, 500)
        used = sum([rule.limit - (await limiter.peek("user", rule.name)).remaining for rule in MANY])
        run.note(f"{checks} checks, {dict(counts)}; Redis counted {used}")
        run.expect(counts["cancelled"] > checks / 4, "too few were cancelled in time: the row proves little")
        run.expect(not counts["mismatched"], f"{counts['mismatched']} answers were somebody else's")
        run.expect(counts["decided"] <= used <= checks, f"Redis counted {used} for {counts['decided']} decisions")
        await limiter.aclose()
        await asyncio.sleep(0.05)
        run.expect(open_files() <= before, f"{open_files() - before} open files left")
        run.expect(len(asyncio.all_tasks()) == 1, "a task is left")

    with RedisServer(password=PASSWORD) as server, Proxy(server.socket, password=PASSWORD) as proxy:
        server.grow_old()
        proxy.set(**mode)
        asyncio.run(main(proxy.url if mode else server.url, proxy.cut))
    run.expect(not noise, f"{len(noise)} × unretrieved: {noise[:1]}")


@row()
def cancelled_in_flight(run: Run) -> None:
    """10,000 checks behind 0 to 4 ms of delay, half of them cancelled at random, some twice"""
    cancelled(run, run.count(10_000, 2_000), delay_s=(0.0, 0.004))


@row()
def cancelled_while_connecting(run: Run) -> None:
    """The same while the proxy delays the greeting of each new connection"""
    cancelled(run, run.count(5_000, 1_000), greet_s=(0.0, 0.1))


@row(short=True)
def cancelled_200_000(run: Run) -> None:
    """410,000 checks straight to Redis, half of them cancelled: no reply reaches another"""
    cancelled(run, run.count(410_000, 10_000))
