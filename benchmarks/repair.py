"""`python -m benchmarks.repair --processes 12 --keys 100000`: Redis loses everything, and many processes know many keys.

Each process has asked about all keys, and a few hot ones are used up. Told are how long it takes until each process has each hot key
decided by Redis again, how many units are granted again (none may be), and for how long an event loop stood still at most.
With `--kept` Redis is restarted with all of its data instead, and times count from when it is there again.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from contextlib import suppress
from typing import Any

from ratethrottle import RateThrottleRule, Request, create_limiter
from tests.kit.servers import RedisServer

HOT_KEYS, LIMIT = 24, 100
AT_ONCE = 128  # keys of a call
EVERY_S = 0.02


async def worker(order: dict[str, Any]) -> None:
    """Fill, use up, and ask on, as standard input says; answers in lines of JSON."""
    rules = [RateThrottleRule("cold", 1_000_000, 3600), RateThrottleRule("hot", LIMIT, 3600)]
    bounds = 2 * order["keys"] + 1_000
    url, deadline_s = order["url"], order["deadline_s"]
    limiter = create_limiter("redis", redis_url=url, rules=rules, max_bounds=bounds, on_outage="deny", deadline=deadline_s)
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)

    def say(what: object) -> None:
        sys.stdout.write(json.dumps(what) + "\n")
        sys.stdout.flush()

    async with limiter:
        for first in range(0, order["keys"], AT_ONCE):
            await limiter.check_many(
                Request(f"key:{number}", rule="cold") for number in range(first, min(first + AT_ONCE, order["keys"]))
            )
        say("filled")
        await reader.readline()
        used = 0
        for number in range(HOT_KEYS):
            while (await limiter.check(f"hot:{number}", "hot")).allowed:
                used += 1
        say(used)
        decided: dict[int, float] = {}
        again, stood_s = 0, 0.0
        stop = asyncio.create_task(reader.readline())
        while not stop.done():
            checks = [limiter.check(f"hot:{number}", "hot") for number in range(HOT_KEYS)]
            again += sum(decision.allowed for decision in await asyncio.gather(*checks))
            peeks = await asyncio.gather(*(limiter.peek(f"hot:{number}", "hot") for number in range(HOT_KEYS)))
            if limiter.statistics().epoch_changes:
                for number, decision in enumerate(peeks):
                    if decision.source == "redis":
                        decided.setdefault(number, time.time())
            before_s = time.monotonic()
            await asyncio.sleep(EVERY_S)
            stood_s = max(stood_s, time.monotonic() - before_s - EVERY_S)
        say({"again": again, "decided": list(decided.values()), "stood_s": stood_s})


async def measure(processes: int, keys: int, seconds: float, deadline_s: float, *, kept: bool) -> dict[str, Any]:
    """Run them, and lose everything once, or nothing."""
    pipe = asyncio.subprocess.PIPE
    started = []
    with RedisServer("--appendonly", "yes" if kept else "no") as server, server.client() as client:
        order = json.dumps({"url": server.url, "keys": keys, "deadline_s": deadline_s})
        try:
            for _ in range(processes):
                command = (sys.executable, "-m", "benchmarks.repair", "--worker", order)
                started.append(await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe))

            async def heard() -> list[Any]:
                return [json.loads(await process.stdout.readline()) for process in started if process.stdout]

            def tell() -> None:
                for process in started:
                    assert process.stdin
                    process.stdin.write(b"\n")

            await heard()
            tell()
            used = sum(await heard())
            await asyncio.sleep(1)
            if kept:
                server.stop()
                server.start()
            lost_s = time.time()
            if not kept:
                client.flushall()
            told_s = 0.0
            while time.time() < lost_s + seconds:
                await asyncio.sleep(0.05)
                value = client.get("ratethrottle:epoch") or b""
                if not told_s and len(value) == 72 and not value.endswith(b"0" * 16):
                    told_s = time.time() - lost_s
            tell()
            results = await heard()
        finally:
            for process in started:
                with suppress(ProcessLookupError):
                    process.kill()
                await process.wait()
    times = sorted(at - lost_s for each in results for at in each["decided"])
    return {
        "used": used,
        "granted_again": sum(each["again"] for each in results),
        "decided": len(times),
        "expected": processes * HOT_KEYS,
        "first_s": times[0] if times else None,
        "last_s": times[-1] if times else None,
        "all_told_s": told_s,
        "stood_ms": 1e3 * max(each["stood_s"] for each in results),
    }


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.repair")
    parser.add_argument("--processes", type=int, default=12)
    parser.add_argument("--keys", type=int, default=100_000)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--deadline", type=float, default=0.25)
    parser.add_argument("--kept", action="store_true", help="restart Redis with its data")
    parser.add_argument("--worker")
    options = parser.parse_args()
    if options.worker:
        asyncio.run(worker(json.loads(options.worker)))
    else:
        figures = asyncio.run(measure(options.processes, options.keys, options.seconds, options.deadline, kept=options.kept))
        for name, figure in figures.items():
            print(f"{name:>14}: {figure}")


if __name__ == "__main__":
    main()
