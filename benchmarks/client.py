"""One process of `fleet`: `python -m benchmarks.client '{"url": …}'` says "ready", waits for a line, loads, prints what it saw."""

from __future__ import annotations

import asyncio
import gc
import json
import random
import sys
from typing import Any

from benchmarks.load import drive, key_names, paced, warm
from benchmarks.server import ours


async def main(order: dict[str, Any]) -> None:
    """Obey one order: url, name (of the rule), keys, tasks, seconds, number, and per_s for a fixed load."""
    limiter = ours(order["url"], name=order["name"])
    # Every process walks the same keys in an order of its own.
    keys = random.Random(order["number"]).sample(key_names(order["keys"]), order["keys"])
    await warm(limiter.check, keys, len(keys))
    # As a service does that has started: full collections no longer go through all that was loaded.
    gc.freeze()
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    if "per_s" in order:
        result = (await paced(limiter.check, keys, order["per_s"], order["seconds"])).as_dict()
    else:
        result = (await drive(limiter.check, keys, order["tasks"], order["seconds"])).as_dict()
    print(json.dumps(result), flush=True)
    await limiter.aclose()


asyncio.run(main(json.loads(sys.argv[1])))
