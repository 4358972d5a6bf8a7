"""Gives the functions that read replies random and spoilt bytes for a while: `python -m tests.fuzz --seconds 30`."""

from __future__ import annotations

import argparse
import random
import time
from collections import Counter

from tests.kit.replies import check_reading, some_reply, spoilt


def main() -> None:
    """Run until the time is over. A failure prints the seed."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=30, help="how long (30)")
    parser.add_argument("--seed", type=int, default=random.randrange(10**9), help="begin with this one (a random one)")
    options = parser.parse_args()
    ends_s, seed, replies, whole = time.monotonic() + options.seconds, options.seed, 0, Counter[str]()
    while time.monotonic() < ends_s:
        rng = random.Random(seed)
        reply = some_reply(rng)
        data = reply.data
        try:
            for _ in range(200 if rng.random() < 0.2 else 5):  # what is spoilt for long is seldom read to its end
                data = rng.randbytes(rng.randrange(80)) if rng.random() < 0.05 else data
                whole[reply.kind] += check_reading(data, reply.read)
                data, replies = spoilt(data, rng)[:4000], replies + 1
        except BaseException:
            print(f"failed: --seed {seed}")
            raise
        seed += 1
    print(f"{replies:,} replies, seeds {options.seed} to {seed - 1}: none was read wrongly")
    print(f"whole: {', '.join(f'{kind} {count:,}' for kind, count in whole.most_common())}")


if __name__ == "__main__":
    main()
