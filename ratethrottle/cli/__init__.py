"""The command `ratethrottle`."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from importlib.metadata import version

from ratethrottle.cli import demo

DEMO = """\
Start servers, each a process of its own, that share one limit through Redis as in docs/distributed.rst. Offer them more than
three times the limit, show what they do, and count what they admitted. Ends with status 0 only if that is exactly the limit."""
AFTER = """\
Without --redis-url it starts a redis-server of its own on a free port of loopback, without persistence, and stops it at the
end. Where there is none, it says so and runs in memory, in one process; under CI=true that is a failure."""


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0 well, 1 not, 2 wrong usage, 130 Ctrl-C, 143 told to end."""
    args = arguments(argv)
    try:
        return asyncio.run(demo.run(demo.Plan(args.redis_url, args.limit, args.window, args.servers, args.seconds)))
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        return 130
    except asyncio.CancelledError:
        print("\nStopped.", file=sys.stderr)
        return 143
    except BrokenPipeError:
        # The reader has gone. The interpreter writes out what is left when it ends, so that goes nowhere instead.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line. Leaves with status 2, and a word on why, when it is wrong."""
    parser = argparse.ArgumentParser(
        prog="ratethrottle", description="A rate limiter for asyncio services on more than one server."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {version('ratethrottle')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    shown = commands.add_parser(
        "demo",
        help="three servers, one Redis, one limit: watch it hold",
        description=DEMO,
        epilog=AFTER,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    shown.add_argument("--redis-url", metavar="URL", help="use this Redis (redis://, rediss:// or unix://); it is left clean")
    shown.add_argument(
        "--limit", type=int, default=1000, help="units that the servers share, 1 to 100,000 (default: %(default)s)"
    )
    shown.add_argument("--window", type=float, default=60, help="seconds the limit is for, 1 to 3600 (default: %(default)s)")
    shown.add_argument("--servers", type=int, default=3, help="server processes, 1 to 16 (default: %(default)s)")
    shown.add_argument("--seconds", type=float, default=3, help="how long to offer, 0.5 to 30 (default: %(default)s)")
    args = parser.parse_args(argv)
    for name, low, high in (("limit", 1, 100_000), ("window", 1, 3600), ("servers", 1, 16), ("seconds", 0.5, 30)):
        if not low <= getattr(args, name) <= high:
            shown.error(f"--{name} is from {low:,} to {high:,}")
    if args.seconds > args.window / 2:
        shown.error("--seconds is at most half of --window, so that every check falls into one window")
    return args
