"""One process, no server: five requests a second for each user.

python examples/quickstart.py
"""

import asyncio

from ratethrottle import RateThrottleRule, create_limiter


async def main() -> None:
    """Ask seven times at once, and once more when the first unit comes back."""
    limiter = create_limiter(rules=[RateThrottleRule.parse("api", "5/second")])

    for number in range(1, 8):
        decision = await limiter.check("user:42")
        print(f"request {number}:", "allowed," if decision else "denied,", decision.remaining, "left")

    decision = await limiter.peek("user:42")
    print(f"the next one is allowed in {decision.retry_after:.3f} s")
    await asyncio.sleep(decision.retry_after)
    print("waited:", "allowed" if await limiter.check("user:42") else "denied")


if __name__ == "__main__":
    asyncio.run(main())
