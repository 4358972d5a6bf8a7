"""Run under callgrind by benchmarks/instructions.py: each compiled hot path, twice, with different numbers of checks.

Each run stands between two calls of `os.getppid`, at which callgrind writes down what it counted since the last: the
difference of two runs of a path is that of their checks, and all that surrounds them cancels. Prints the paths in order.
"""

from __future__ import annotations

import asyncio
import os

# The hash of the key table is keyed by random bytes: fixed ones, so that the same keys collide in every run.
os.urandom = lambda count: bytes(number * 37 % 251 for number in range(count))

from benchmarks.paths import FEW, MANY, PATHS, Prepared  # noqa: E402  # what it imports takes urandom along


async def count(prepared: Prepared, checks: int) -> None:
    """Run some checks between two marks."""
    keys = prepared.keys(checks)
    check = prepared.limiter.check
    together = prepared.together
    os.getppid()
    if together == 1:
        for key in keys:
            await check(key)
    else:
        for first in range(0, checks, together):
            await asyncio.gather(*map(check, keys[first : first + together]))
    os.getppid()


async def main() -> None:
    """Run all paths, each warm."""
    for name, prepare in PATHS.items():
        prepared = await prepare()
        await count(prepared, FEW)
        for checks in (FEW, MANY):
            await count(prepared, checks)
        print(name, flush=True)


asyncio.run(main())
