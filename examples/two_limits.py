"""A short and a long limit for each customer, and headers for the answer.

python examples/two_limits.py
"""

import asyncio

from ratethrottle import RateThrottleCore, RateThrottleRule, Request, create_limiter


async def handle(limiter: RateThrottleCore, customer: str) -> tuple[int, dict[str, str]]:
    """Answer a request: the status, and the headers that tell the client what is left."""
    short, long = await limiter.check_many([Request(customer, rule="api.1s"), Request(customer, rule="api.1d")])
    # Each limit is asked on its own. One that allows has counted the request, whatever the other one says.
    tightest = min(short, long, key=lambda decision: (decision.allowed, decision.remaining))
    return (200 if short and long else 429), tightest.headers()


async def main() -> None:
    """Send twelve requests of one customer."""
    limiter = create_limiter(rules=RateThrottleRule.parse_many("api", "10/second; 1000/day"))
    for number in range(1, 13):
        status, headers = await handle(limiter, "customer:7")
        print(number, status, headers)


if __name__ == "__main__":
    asyncio.run(main())
