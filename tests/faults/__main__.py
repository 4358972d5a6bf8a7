"""Run the fault board, or a part of it, and print a table. Ends with 1 if a row failed."""

from __future__ import annotations

import argparse
import random
import sys
import time

from tests.faults.board import print_table, rows, timed
from tests.faults.rows import load


def main(arguments: list[str] | None = None) -> int:
    """Parse, run, print."""
    load()
    parser = argparse.ArgumentParser(prog="make faults FAULTS_ARGS=...", description=__doc__)
    parser.add_argument(
        "--row", action="append", metavar="NAME", help="only this row, or those whose names begin so; may be repeated"
    )
    parser.add_argument("--short", action="store_true", help="shorter runs; without --row, only the rows of the short form")
    parser.add_argument("--list", action="store_true", help="print the rows and end")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6), help="for what is drawn at random (printed)")
    options = parser.parse_args(arguments)
    chosen = [
        each
        for name, each in rows().items()
        if (any(name.startswith(wanted) for wanted in options.row) if options.row else each.short or not options.short)
    ]
    if not chosen:
        parser.error("there is no such row; --list names them")
    if options.list:
        for each in chosen:
            print(f"{'*' if each.short else ' '} {each.name:28} {each.what}")
        print("* also in the short form")
        return 0
    started = time.monotonic()
    print(f"{len(chosen)} rows, seed {options.seed}", flush=True)
    verdicts = []
    for number, each in enumerate(chosen, 1):
        print(f"[{number}/{len(chosen)}] {each.name}: {each.what}", end=" ", flush=True)
        verdict, took_s = timed(each, short=options.short, seed=options.seed)
        print(f"{verdict.word} ({took_s:.0f} s)", flush=True)
        verdicts.append(verdict)
    print_table(verdicts)
    failed = [verdict.row for verdict in verdicts if verdict.problems]
    skipped = sum(verdict.word == "SKIP" for verdict in verdicts)
    left_out = f", {skipped} left out" if skipped else ""
    names = f": {', '.join(failed)}" if failed else ""
    print(f"\n{time.monotonic() - started:.0f} s, {len(failed)} of {len(verdicts)} rows failed{left_out}{names}")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
