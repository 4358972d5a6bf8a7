"""Run by benchmarks/contenders.py in an environment that has the unrelated `ratethrottle` of PyPI, and not ours.

usage: python -P stranger.py URL STRATEGY LIMIT WINDOW_S POOL; then an order in JSON on each line of its standard input.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import logging
import sys
from pathlib import Path
from typing import Any

# Last, so that `ratethrottle` is the one of that environment and `benchmarks` is ours.
sys.path.append(str(Path(__file__).parent.parent))

from benchmarks.load import drive, key_names, paced, warm


async def main() -> None:
    """Set it up, then obey until the input ends."""
    url, strategy, limit, window_s, pool = sys.argv[1:]
    stranger: Any = importlib.import_module("ratethrottle")
    assert hasattr(stranger, "create_async_limiter"), "this environment has another ratethrottle"
    logging.disable()
    limiter = await stranger.create_async_limiter("redis", url, max_connections=int(pool), health_check_interval=0)
    limiter.add_rule(stranger.RateThrottleRule(name="bench", limit=int(limit), window=int(window_s), strategy=strategy))

    async def check(key: str) -> bool:
        allowed: bool = (await limiter.check_rate_limit(key, "bench")).allowed
        return allowed

    while line := await asyncio.to_thread(sys.stdin.readline):
        ((order, (keys, amount, seconds)),) = json.loads(line).items()
        await warm(check, key_names(keys), amount if order == "drive" else 64)
        result = await (drive if order == "drive" else paced)(check, key_names(keys), amount, seconds)
        print(json.dumps(result.as_dict()), flush=True)


asyncio.run(main())
