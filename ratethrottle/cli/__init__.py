"""The command `ratethrottle`."""

from __future__ import annotations

import argparse
import asyncio
from importlib.metadata import version

from ratethrottle.cli import demo


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="ratethrottle", description="A rate limiter for asyncio services on more than one server."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {version('ratethrottle')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    shown = commands.add_parser(
        "demo",
        help="three servers, one Redis, one limit: watch it hold",
        description="Start servers that share one limit through Redis, offer them three times the limit, and count what they admit.",
    )
    shown.add_argument("--redis-url", help="use this Redis instead of starting a redis-server (redis://host:port/db)")
    shown.add_argument("--limit", type=int, default=1000, help="units per minute that the servers share (default: %(default)s)")
    shown.add_argument("--servers", type=int, default=3, help="server processes, 1 to 16 (default: %(default)s)")
    shown.add_argument("--seconds", type=float, default=4.0, help="how long to offer, 0.5 to 30 (default: %(default)s)")
    args = parser.parse_args(argv)
    if not (1 <= args.servers <= 16 and 0.5 <= args.seconds <= 30 and 1 <= args.limit <= 100_000):
        shown.error("--servers is from 1 to 16, --seconds from 0.5 to 30, --limit from 1 to 100000")
    try:
        return asyncio.run(demo.run(demo.Plan(args.redis_url, args.limit, args.servers, args.seconds)))
    except KeyboardInterrupt:
        return 130
