"""`ratethrottle demo`: three servers, one Redis, one limit."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from contextlib import AsyncExitStack
from dataclasses import dataclass

from ratethrottle.cli.processes import NoRedis, clear, demo_prefix, probe, redis_server, server
from ratethrottle.cli.screen import Screen, say, table
from ratethrottle.errors import ConfigurationError, StorageError
from ratethrottle.limiter import create_limiter
from ratethrottle.rule import RateThrottleRule
from ratethrottle.storage.redis import RedisStorage

REDRAW_S = 0.1
LATE_S = 30.0  # a server that takes so much longer than it was given is stuck
KEY = "client"


@dataclass(frozen=True, slots=True)
class Plan:
    """What the command line asked for."""

    redis_url: str | None
    limit: int
    window: float
    servers: int
    seconds: float

    @property
    def offers(self) -> int:
        """What each server is offered: all together three times the limit, and each alone more than the limit."""
        return max(-(-3 * self.limit // self.servers), self.limit + self.limit // 5 + 1)


async def run(plan: Plan) -> int:
    """Show the demo; returns the exit status: 0 only when exactly the limit was admitted by all servers together."""
    task = asyncio.current_task()
    if task is not None:  # SIGINT does this by itself
        for number in (signal.SIGTERM, signal.SIGHUP):
            asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    try:
        async with AsyncExitStack() as stack:
            url = plan.redis_url
            if url is None:
                url = await stack.enter_async_context(redis_server())
            await probe(url)
            return await with_redis(plan, url, stack)
    except NoRedis as reason:
        return await without_redis(plan, str(reason))
    except (ConfigurationError, StorageError) as error:
        # No fallback here: a user who names a Redis wants to see that one.
        print(f"ratethrottle demo: {error}", file=sys.stderr)
        return 1


async def with_redis(plan: Plan, url: str, stack: AsyncExitStack) -> int:
    """Run the servers against a Redis, draw what they do, and print the table."""
    loop = asyncio.get_running_loop()
    order = {
        "redis_url": url,
        "prefix": demo_prefix(),  # it never meets the counts of an earlier one
        "key": KEY,
        "limit": plan.limit,
        "window": plan.window,
        "offers": plan.offers,
        "seconds": plan.seconds,
    }
    say(
        f"{plan.servers} server{'s' * (plan.servers > 1)} behind one Redis share {plan.limit:,} per {plan.window:g} s; "
        f"each is offered {plan.offers:,} in {plan.seconds:g} s.\n"
    )
    servers = [await stack.enter_async_context(server(f"server {i + 1}", order)) for i in range(plan.servers)]
    await asyncio.gather(*(one.hear() for one in servers))  # each is connected
    start_s = loop.time()
    for one in servers:
        one.tell("go")
    hearing = [loop.create_task(one.follow()) for one in servers]
    screen = Screen(plan.limit)
    while not all(task.done() for task in hearing):
        screen.draw(servers)
        await asyncio.wait(hearing, timeout=REDRAW_S)
        if loop.time() > start_s + plan.seconds + LATE_S:
            print(f"\nratethrottle demo: a server has not finished {LATE_S:g} s after its time", file=sys.stderr)
            return 1
    await asyncio.gather(*hearing)
    screen.draw(servers, last=True)
    took_s = loop.time() - start_s
    if plan.redis_url is not None:
        await clean(order)
    for one in servers:
        if one.error:
            print(f"ratethrottle demo: {one.name}: {one.error}", file=sys.stderr)
    if took_s >= plan.window:
        print(
            f"\nIt took {took_s:.0f} s, longer than the window of {plan.window:g} s, so the total says nothing; "
            "choose a lower --limit or a longer --window.",
            file=sys.stderr,
        )
        return 1
    held = verdict(plan, [(one.name, one.offered, one.admitted) for one in servers])
    return 0 if held and not any(one.error for one in servers) else 1


async def clean(order: dict[str, object]) -> None:
    """Leave nothing behind in a Redis that isn't ours."""
    storage = RedisStorage.from_url(str(order["redis_url"]), prefix=order["prefix"], deadline=5.0)
    await clear(storage)
    await storage.aclose()


async def without_redis(plan: Plan, reason: str) -> int:
    """Show the same limit in one process; a failure under CI=true, which needs a Redis."""
    say(
        f"No Redis: {reason}. Install one (Debian: apt-get install redis-server; macOS: brew install redis) or name one with\n"
        "--redis-url. Until then this is the embedded in-memory default, in one process: nothing is shared here.\n"
    )
    limiter = create_limiter(rules=[RateThrottleRule("api_limit", plan.limit, plan.window)])
    offers = 3 * plan.limit
    admitted = sum([bool(await limiter.check(KEY)) for _ in range(offers)])
    held = verdict(plan, [("this process", offers, admitted)])
    if os.environ.get("CI") == "true":
        print("\nUnder CI=true a missing Redis is a failure.", file=sys.stderr)
        return 1
    return 0 if held else 1


def verdict(plan: Plan, rows: list[tuple[str, int, int]]) -> bool:
    """Print the table, and whether exactly the limit was admitted."""
    offered, admitted = sum(row[1] for row in rows), sum(row[2] for row in rows)
    say(f"\n{table(rows)}\n")
    if admitted != plan.limit:
        print(f"The limit did not hold: {admitted:,} were admitted, not {plan.limit:,}.", file=sys.stderr)
        return False
    say(f"Exactly {admitted:,} of {offered:,} were admitted.")
    idle = [name for name, _, granted in rows if not granted]
    if idle:
        say(f"({', '.join(idle)} came too late to admit any: the others had used up the limit. More --seconds spread it better.)")
    return True
