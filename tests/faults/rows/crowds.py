"""Too many at once: checks, keys, and checks of one key that is denied."""

from __future__ import annotations

import asyncio
import gc
import os
import time

from ratethrottle import Decision, RateThrottleRule, Request, create_limiter
from tests.faults.board import Run, row
from tests.faults.fleet import DEADLINE_S
from tests.faults.judge import GRACE_US
from tests.faults.worker import open_files, resident_bytes
from tests.kit.servers import RedisServer

MAX_CONNECTIONS = 8
WIDE = RateThrottleRule("wide", 10**9, 3600, strategy="fixed_window")
TIGHT = RateThrottleRule("tight", 100, 10)


@row(short=True)
def crowd_50_000(run: Run) -> None:
    """50,000 concurrent checks in one gather: no error, no outage, at most `max_connections` sockets, the rest denied in time"""
    count = run.count(50_000, 20_000)

    async def main(url: str) -> None:
        limiter = create_limiter("redis", redis_url=url, rules=[WIDE], deadline=DEADLINE_S, expected_processes=1)
        await limiter.peek("user")
        gc.collect()
        files, memory, most = open_files(), resident_bytes(), 0
        began_s, used = time.monotonic(), os.times()
        latest_s = 0.0

        async def one(number: int) -> Decision:
            nonlocal latest_s
            started_s = time.monotonic()
            decision = await limiter.check(f"user:{number % 1000}")
            latest_s = max(latest_s, time.monotonic() - started_s)
            return decision

        waiting = asyncio.gather(*(one(number) for number in range(count)), return_exceptions=True)
        while not waiting.done():
            most = max(most, open_files() - files)
            await asyncio.sleep(0.01)
        results = await waiting
        took_s = time.monotonic() - began_s
        grown = resident_bytes() - memory
        decisions = [result for result in results if isinstance(result, Decision)]
        run.verdict.admitted.update(decision.source for decision in decisions if decision.allowed)
        run.verdict.slowest_us = round(latest_s * 1e6)
        run.expect(
            len(decisions) == count, f"{count - len(decisions)} errors: {[r for r in results if not isinstance(r, Decision)][:1]}"
        )
        by_policy = sum(decision.source == "outage" for decision in decisions)
        run.expect(not by_policy and limiter.statistics().breaker == "closed", f"{by_policy} decisions by policy")
        run.expect(most + 1 <= MAX_CONNECTIONS, f"{most + 1} connections")
        run.expect(grown <= 200_000_000, f"memory grew by {grown / 1e6:.0f} MB")
        # All share one loop: each is late by what the others take, which is this process's own CPU time and no wait.
        run.note(f"all answered after {took_s:.2f} s; {grown / 1e6:.0f} MB more, {most} connections more")
        own_s = os.times().user - used.user + os.times().system - used.system
        run.expect(latest_s <= DEADLINE_S + GRACE_US / 1e6 + own_s, f"the slowest took {latest_s:.2f} s")
        await limiter.aclose()

    with RedisServer() as server:
        asyncio.run(main(server.url))


@row()
def cardinality_attack(run: Run) -> None:
    """Random keys, millions of them: the table stays within its bound, and keys known to be blocked stay blocked"""
    flood, bound = run.count(5_000_000, 200_000), 20_000

    async def main(url: str) -> None:
        rules = [TIGHT, RateThrottleRule("hour", 100, 3600)]
        limiter = create_limiter(
            "redis", redis_url=url, rules=rules, deadline=5, on_outage="raise", max_bounds=bound, prefilter_ttl=60
        )
        blocked = [f"blocked:{number}" for number in range(100)]
        for key in blocked:
            await limiter.check_many([Request(key, "hour")] * 101)
        flooded, most, missed = 0, 0, 0
        memory = resident_bytes()
        began_s = looked_s = time.monotonic()
        # What Redis said of a blocked key is asked anew after 60 s, wherever its bound is.
        while flooded < flood and time.monotonic() < began_s + 50:
            await limiter.check_many([Request(os.urandom(8).hex(), TIGHT.name) for _ in range(2_000)])
            flooded += 2_000
            most = max(most, limiter.statistics().bounds)
            if time.monotonic() > looked_s + 1:
                looked_s = time.monotonic()
                # Nobody else uses these keys, so that the answer is known; from memory is where it has to come from.
                missed += sum([(await limiter.check(key, "hour")).source != "prefilter" for key in blocked])
        grown = resident_bytes() - memory
        took_s = time.monotonic() - began_s
        run.note(
            f"{flooded:,} keys in {took_s:.0f} s, {most:,} bounds, {grown / 1e6:.0f} MB more; blocked keys asked for {missed} times"
        )
        run.expect(most <= bound, f"{most} bounds are kept, not {bound}")
        run.expect(grown <= 50_000_000, f"memory grew by {grown / 1e6:.0f} MB")
        run.expect(not missed, f"{missed} times a blocked key's bound was gone")
        await limiter.aclose()

    with RedisServer() as server:
        asyncio.run(main(server.url))


@row(short=True)
def hot_key(run: Run) -> None:
    """100,000 checks a second on one denied key: at most 20 script calls a second and process"""
    seconds = run.seconds(5, 2)

    async def main(url: str) -> None:
        limiter = create_limiter(
            "redis", redis_url=url, rules=[RateThrottleRule("tight", 10, 3600)], deadline=1, on_outage="raise"
        )
        await limiter.check_many(["user"] * 11)
        before, checks, began_s = limiter.statistics().calls, 0, time.monotonic()
        while time.monotonic() < began_s + seconds:
            for _ in range(500):
                assert not await limiter.check("user")
            checks += 500
            await asyncio.sleep(0)
        took_s = time.monotonic() - began_s
        calls = limiter.statistics().calls - before
        run.note(f"{checks / took_s:,.0f} checks/s, {calls / took_s:.1f} calls/s")
        run.expect(calls <= 20 * took_s, f"{calls / took_s:.0f} calls a second")
        await limiter.aclose()

    with RedisServer() as server:
        asyncio.run(main(server.url))
