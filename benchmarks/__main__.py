"""`python -m benchmarks`: run the suites and print their tables."""

from __future__ import annotations

import argparse
import asyncio

from benchmarks import local, scale
from benchmarks.timing import machine


async def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="What a decision costs, here and at the peers.")
    parser.add_argument(
        "suites", nargs="*", metavar="suite", help="local (by regime, with the peers) or scale (the key table); default: both"
    )
    parser.add_argument("--rounds", type=int, default=15, help="interleaved rounds of `local` (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="smaller tables and fewer rounds: seconds instead of minutes")
    args = parser.parse_args()
    unknown = set(args.suites) - {"local", "scale"}
    if unknown:
        parser.error(f"there is no suite {', '.join(sorted(unknown))}; there are local and scale")
    print(machine())
    if not args.suites or "local" in args.suites:
        await local.run(3 if args.quick else args.rounds)
    if not args.suites or "scale" in args.suites:
        await scale.run(args.quick)


asyncio.run(main())
