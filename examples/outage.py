"""What happens when Redis can't be reached: each policy, tried against a port where nobody listens.

python examples/outage.py
"""

import asyncio

from ratethrottle import RateThrottleRule, StorageUnavailable, create_limiter
from ratethrottle.events import OutageBegan

NOBODY = "redis://127.0.0.1:1/0"


async def main() -> None:
    """Check once under each policy."""
    for policy in ("local", "allow", "deny", "raise"):
        rule = RateThrottleRule("api", 100, 60, on_outage=policy)
        # This process is one of four, so that "local" admits a quarter of the limit.
        limiter = create_limiter("redis", redis_url=NOBODY, rules=[rule], expected_processes=4)
        limiter.on_event(lambda event: print("  event:", type(event).__name__) if isinstance(event, OutageBegan) else None)
        print(policy)
        try:
            decision = await limiter.check("user:42")
            print("  decided by", decision.source + ":", "allowed," if decision else "denied,", decision.remaining, "left")
        except StorageUnavailable as error:
            print("  raised:", type(error).__name__)
        await limiter.aclose()


if __name__ == "__main__":
    asyncio.run(main())
