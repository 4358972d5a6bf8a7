"""One server of the demo: a process of its own that offers checks and tells, line by line, what became of them."""

from __future__ import annotations

import asyncio
import json
import sys

from ratethrottle import Decision, RateThrottleRule, create_limiter

TELL_EVERY_S = 0.1


async def serve(redis_url: str, prefix: str, limit: int, window: float, seconds: float) -> None:
    """Wait for a line on stdin, then offer `limit` checks and a fifth more, evenly over `seconds`."""
    limiter = create_limiter(storage="redis", redis_url=redis_url, prefix=prefix, deadline=5.0)
    limiter.add_rule(RateThrottleRule(name="api_limit", limit=limit, window=window))
    loop = asyncio.get_running_loop()
    async with limiter:
        await limiter.peek("client")
        tell(offered=0, admitted=0)
        await asyncio.to_thread(sys.stdin.readline)
        offers, offered, admitted = limit + limit // 5 + 1, 0, 0
        start = told = loop.time()
        while offered < offers:
            due = min(offers, int((loop.time() - start) / seconds * offers) + 1)
            decisions: list[Decision] = await asyncio.gather(*(limiter.check("client") for _ in range(min(32, due - offered))))
            offered += len(decisions)
            admitted += sum(map(bool, decisions))
            if loop.time() - told > TELL_EVERY_S:
                told = loop.time()
                tell(offered=offered, admitted=admitted)
            await asyncio.sleep(0.002)
        tell(offered=offered, admitted=admitted)


def tell(**facts: int) -> None:
    """Print facts as one line of JSON."""
    print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    # The order comes by stdin, not as arguments: a URL can hold a password, and arguments are everybody's to see.
    asyncio.run(serve(**json.loads(sys.stdin.readline())))
