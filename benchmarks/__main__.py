"""`python -m benchmarks`: run the suites, print their tables, and keep, draw and judge what they measured."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from benchmarks import fleet, held, local, peers, redis_suite, scale
from benchmarks.timing import Figures, Options, machine

SUITES: dict[str, tuple[Callable[[Options], Awaitable[Figures]], str]] = {
    "local": (local.run, "in memory, by regime and strategy, beside an empty coroutine and the peers"),
    "redis": (redis_suite.run, "over Redis: by tasks, by strategy, by hot keys; denied, leased, alone; latency"),
    "fleet": (fleet.run, "1, 2 and 4 processes on one Redis, and when its core is full"),
    "scale": (scale.run, "the key table: bytes, time by number of keys, floods, a day of 10^7 keys"),
    "peers": (peers.run, "this project and each peer on one Redis, interleaved"),
}
EPILOG = "suites:\n" + "\n".join(f"  {name:8}{what}" for name, (_, what) in SUITES.items())


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="What a decision costs, here and at the peers. Starts a redis-server of its own; all suites take 7 to 12 minutes.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("suites", nargs="*", metavar="suite", help="which to run, in this order (default: all)")
    parser.add_argument("--quick", action="store_true", help="fewer rounds and keys: under a minute, and rougher numbers")
    parser.add_argument("--rounds", type=int, help="interleaved rounds of `local`; those on Redis take a fifth (default: 15)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write all figures there")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="draw them there, as PNG and SVG")
    parser.add_argument("--held", action="store_true", help="hold the figures against what was asked for; exit 1 if one misses")
    args = parser.parse_args()
    unknown = [name for name in args.suites if name not in SUITES]
    if unknown:
        parser.error(f"there is no suite {', '.join(unknown)}; there are {', '.join(SUITES)}")
    if args.rounds is not None and args.rounds < 1:
        parser.error("--rounds is at least 1")
    return args


async def measure(names: list[str], options: Options) -> Figures:
    """Run the suites one after the other."""
    results: Figures = {"machine": machine(), "options": {"quick": options.quick, "rounds": options.rounds}}
    print(
        ", ".join(
            f"{value}" if name in ("cpu", "system", "python", "date") else f"{name} {value}"
            for name, value in results["machine"].items()
        )
    )
    for name in names:
        began_s = time.monotonic()
        results[name] = await SUITES[name][0](options)
        server = f" on {results[name]['server']}" if "server" in results[name] else ""
        print(f"\n({name}{server} took {time.monotonic() - began_s:.0f} s)")
    return results


def main() -> int:
    """Do what the command line says; 1 if something asked for isn't held."""
    args = arguments()
    options = Options(quick=args.quick, rounds=args.rounds or (5 if args.quick else 15))
    try:
        results = asyncio.run(measure(args.suites or list(SUITES), options))
    except FileNotFoundError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(results, indent=1))
        print(f"figures: {args.json}")
    if args.plots:
        from benchmarks import plots  # noqa: PLC0415  # matplotlib takes a second to import

        for path in plots.draw(results, args.plots):
            print(f"plot: {path}")
    return held.report(results) if args.held else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
