"""`python -m tests.model --processes 3 --limit 3 --faults 2`: search a model of any size, with progress.

Without arguments: those that are too large for the suite; with `--short`, those of them that take seconds.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys

from .protocol import Config
from .search import search

SHORT = [
    Config(limit=1),
    Config(limit=3, lease=True, faults=1),
    Config(limit=1, processes=3, faults=1),
]
LARGER = [
    *SHORT,
    Config(),
    Config(limit=1, connections=2),
    Config(processes=3, faults=1),
    Config(resets=1, faults=1),
    Config(faults=3),
]


def main() -> int:
    """Search, and say what was found; 1 if something is wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.model")
    for field in dataclasses.fields(Config):
        name = f"--{field.name}"
        if isinstance(field.default, bool):
            parser.add_argument(name, action="store_true")
        else:
            parser.add_argument(name, type=type(field.default), default=field.default)
    known = {"": LARGER, "--short": SHORT}.get(" ".join(sys.argv[1:]))
    broken = False
    for config in known or [Config(**vars(parser.parse_args()))]:
        result = search(config, progress=show)
        sys.stdout.write(f"{config}\n{result}\n")
        broken = broken or bool(result.broken)
    return broken


def show(depth: int, new: int, states: int) -> None:
    """Print how far the search has come."""
    sys.stderr.write(f"depth {depth}: {new} new, {states} states\n")


if __name__ == "__main__":
    sys.exit(main())
