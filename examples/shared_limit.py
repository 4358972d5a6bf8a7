"""Several limiters, one limit in Redis. Start it twice at the same time: both processes share the 20 requests.

python examples/shared_limit.py redis://localhost:6379/0
"""

import asyncio
import sys

from ratethrottle import RateThrottleRule, create_limiter


async def main(url: str) -> None:
    """Ask thirty times at once. All checks travel to Redis in a few calls."""
    rule = RateThrottleRule("shared", 20, 60)
    async with create_limiter("redis", redis_url=url, rules=[rule]) as limiter:
        decisions = await asyncio.gather(*(limiter.check("tenant:acme") for _ in range(30)))
        allowed = sum(map(bool, decisions))
        print(allowed, "allowed,", len(decisions) - allowed, "denied")
        # The next denial needs no network: Redis has just said the same.
        decision = await limiter.check("tenant:acme")
        print("decided by", decision.source + ",", "again in", round(decision.retry_after), "s")


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else "redis://localhost:6379/0"))
