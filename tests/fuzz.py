"""Gives the functions that read replies random and spoilt bytes for a while: `python -m tests.fuzz --seconds 30`."""

from __future__ import annotations

import argparse
import random
import time

from tests.kit.replies import check_reading, some_reply, spoilt


def main() -> None:
    """Run until the time is over. A failure prints the seed."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=30, help="how long (30)")
    parser.add_argument("--seed", type=int, default=random.randrange(10**9), help="begin with this one (a random one)")
    options = parser.parse_args()
    ends_s, seed, replies = time.monotonic() + options.seconds, options.seed, 0
    while time.monotonic() < ends_s:
        rng = random.Random(seed)
        kind, data, request, integers = some_reply(rng)
        try:
            for _ in range(200):
                data = rng.randbytes(rng.randrange(80)) if rng.random() < 0.05 else data
                check_reading(data, kind, request, integers)
                data, replies = spoilt(data, rng)[:4000], replies + 1
        except BaseException:
            print(f"failed: --seed {seed}")
            raise
        seed += 1
    print(f"{replies:,} replies, seeds {options.seed} to {seed - 1}: none was read wrongly")


if __name__ == "__main__":
    main()
