"""One server of the demo: a process of its own that offers checks and tells, line by line, what became of them."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading

from ratethrottle._engine.decision import Decision
from ratethrottle.errors import RateThrottleError
from ratethrottle.limiter import create_limiter
from ratethrottle.rule import RateThrottleRule

TELL_EVERY_S = 0.1
TOGETHER_MAX = 32  # checks offered at once when this process has fallen behind


async def serve(*, redis_url: str, prefix: str, key: str, limit: int, window: float, offers: int, seconds: float) -> None:
    """Set up as on the reference page, wait for a line on stdin, then offer `offers` checks evenly over `seconds`."""
    # A machine too busy to answer in a quarter of a second is no outage here: it would lose admissions from the count. Nor is any
    # other policy: what is shown is decided by Redis.
    limiter = create_limiter(storage="redis", redis_url=redis_url, prefix=prefix, deadline=10.0, on_outage="raise")
    limiter.add_rule(RateThrottleRule(name="api_limit", limit=limit, window=window))
    loop = asyncio.get_running_loop()
    async with limiter:
        await limiter.peek(key)
        tell(offered=0, admitted=0)
        if not await asyncio.to_thread(sys.stdin.readline):
            return
        threading.Thread(target=leave_with_the_demo, daemon=True).start()
        offered = admitted = 0
        start = told = loop.time()
        while offered < offers:
            due = min(offers, int((loop.time() - start) / seconds * offers) + 1)
            checks = [limiter.check(key) for _ in range(min(TOGETHER_MAX, due - offered))]
            decisions: list[Decision] = await asyncio.gather(*checks)
            offered += len(decisions)
            admitted += sum(map(bool, decisions))
            if loop.time() - told > TELL_EVERY_S:
                told = loop.time()
                tell(offered=offered, admitted=admitted)
            await asyncio.sleep(0.002)
        tell(offered=offered, admitted=admitted, done=True)


def leave_with_the_demo() -> None:
    """End this process when its stdin ends: the demo is gone, even if it was killed."""
    while sys.stdin.readline():
        pass
    os._exit(1)


def tell(**facts: object) -> None:
    """Print facts as one line of JSON."""
    print(json.dumps(facts), flush=True)


def main() -> int:
    """Do what the line on stdin orders; returns the exit status."""
    # By stdin, not as arguments: a URL can hold a password, and arguments are everybody's to see.
    order = sys.stdin.readline()
    if not order:
        return 1
    try:
        asyncio.run(serve(**json.loads(order)))
    except RateThrottleError as error:
        tell(error=str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
