"""What a decision costs on each server, beside parts of it alone: `python -m benchmarks.servers [--instructions] [PROGRAM ...]`.

All servers run at once and take turns, and the least of all rounds counts: what else the machine does makes a round longer, never
shorter. Times are what the server says of itself (INFO commandstats, EVALSHA). Instructions are counted by valgrind inside of
EVALSHA: they are the same on a busy machine, and on another one.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.redis_suite import BATCH, full_batches
from benchmarks.server import Meter, own_server
from benchmarks.strategies import YEAR_S
from benchmarks.timing import machine, progress, table
from ratethrottle import RateThrottleCore, RateThrottleRule, create_limiter
from ratethrottle.cli.processes import PROGRAM, NoRedis, server_program

# Windows in which no slot ends, nor does the second change in which a state expires: then a decision takes longer.
STRATEGIES = {"sliding_window": YEAR_S, "token_bucket": 3_600, "fixed_window": YEAR_S}
KEYS, REPEATS = 8 * BATCH, 3
JOINT_KEYS = 8 * (BATCH // 3)  # each of a joint check of three rules, of which a call has so many
STATE = "1;f3600000000,1795968000000000,17;"
TEXTS = """
local text, n, match, format, sub = '1;f3600000000,1795968000000000,17;', 0, string.match, string.format, string.sub
for i = 1, 2000 do
  local start, count = match(text, '^([0-9]+),([0-9]+);$', 15)
  n = n + #format('%d,%d;', start + i, count + 1) + #sub(text, 1, 14)
end
return n
"""
# What a decision consists of: a script, and how often it does its thing.
PARTS = {
    "Lua: a round of a loop with sums": ("local x = 0 for i = 1, 20000 do x = x + i % 7 end return x", 20_000),
    "Lua: match, format and sub of a state": (TEXTS, 2_000),
    "redis.call: MGET, each key": ("return #redis.call('MGET', unpack(KEYS))", BATCH),
    "redis.call: SETRANGE": ("for i = 1, #KEYS do redis.call('SETRANGE', KEYS[i], '14', '1795968000000000,17;') end", BATCH),
    "a call of nothing, with as many keys and arguments": ("return 1", 1),
}


@dataclass(frozen=True)
class Subject:
    """Something that a server does, and how many times it does it."""

    run: Callable[[], Awaitable[object]]
    times: int


async def joint_batches(limiter: RateThrottleCore, rules: tuple[str, ...], keys: list[str]) -> None:
    """Check each key by all rules, in script calls that are as full as they can be."""
    for start in range(0, len(keys), BATCH // len(rules)):
        decisions = await asyncio.gather(*(limiter.check(key, rules) for key in keys[start : start + BATCH // len(rules)]))
        assert all(decisions), "a check was denied, so that it may not have reached the server"


async def scripted(meter: Meter, sha: str) -> None:
    """Run a script over a batch of keys, again and again."""
    for _ in range(REPEATS):
        meter.client.evalsha(sha, BATCH, *(f"part:{number}" for number in range(BATCH)), *range(BATCH))


async def subjects(meter: Meter) -> dict[str, Subject]:
    """Prepare all that is measured on one server, so that only what comes later is measured."""
    keys = [f"batch:{number}" for number in range(KEYS)]
    found = {}
    for strategy, window in STRATEGIES.items():
        rule = RateThrottleRule(f"full-{strategy}", 1_000_000, window, strategy=strategy)
        limiter = create_limiter("redis", redis_url=meter.url, rules=[rule], deadline=60)  # under valgrind it takes long
        await full_batches(meter, limiter, keys, 2)
        found[f"a decision, {strategy}"] = Subject(partial(full_batches, meter, limiter, keys, 1), KEYS)
    for strategy in ("sliding_window", "token_bucket"):
        rules = [
            RateThrottleRule(f"{strategy}-{n}", 1_000_000 + n, STRATEGIES[strategy] + n, strategy=strategy) for n in range(3)
        ]
        limiter, names = (
            create_limiter("redis", redis_url=meter.url, rules=rules, deadline=60),
            tuple(rule.name for rule in rules),
        )
        await joint_batches(limiter, names, keys[:JOINT_KEYS])
        found[f"a joint decision of three rules, {strategy}"] = Subject(
            partial(joint_batches, limiter, names, keys[:JOINT_KEYS]), JOINT_KEYS
        )
    for number in range(BATCH):
        meter.client.set(f"part:{number}", STATE)
    for name, (script, times) in PARTS.items():
        found[name] = Subject(partial(scripted, meter, meter.client.script_load(script)), REPEATS * times)
    return found


async def timed(meter: Meter, subject: Subject) -> float:
    """Measure the µs of the server for each time."""
    before = meter.read()
    await subject.run()
    return (meter.read() - before).script_us / subject.times


async def counted(meter: Meter, subject: Subject, directory: Path) -> float:
    """Count the server's instructions for each time."""
    pid = meter.client.info("server")["process_id"]
    dumped(pid, directory)
    await subject.run()
    return dumped(pid, directory) / subject.times


def dumped(pid: int, directory: Path) -> int:
    """Have valgrind write how many instructions it has counted since the last time, and read that."""
    control = shutil.which("callgrind_control") or "callgrind_control"
    subprocess.run([control, "--dump", str(pid)], check=True, capture_output=True)
    newest = max(directory.glob("out.*"), key=lambda path: int(path.suffix[1:]))
    found = re.search(r"^(?:summary|totals): (\d+)", newest.read_text(), re.MULTILINE)
    return int(found[1]) if found else 0


def under_valgrind(program: str, directory: Path) -> str:
    """Write a program that runs the server under valgrind."""
    counting = f"--callgrind-out-file={directory}/out --collect-atstart=no --toggle-collect=evalShaCommand"
    wrapper = directory / "server"
    wrapper.write_text(f'#!/bin/sh\nexec valgrind -q --tool=callgrind {counting} {program} "$@"\n')
    wrapper.chmod(0o755)
    return str(wrapper)


async def least(programs: list[str], rounds: int, instructions: bool) -> dict[str, dict[str, float]]:
    """Start servers, measure them in turns, and find the least of each subject, by server."""
    with ExitStack() as stack:
        servers: dict[str, dict[str, Callable[[], Awaitable[float]]]] = {}
        for program in programs:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rt-count-")))
            os.environ[PROGRAM] = under_valgrind(program, directory) if instructions else program
            meter = stack.enter_context(own_server())
            measure = partial(counted, directory=directory) if instructions else timed
            found = await subjects(meter)
            name = f"{meter.version()}, {meter.client.info('memory')['mem_allocator'].partition('-')[0]}"
            servers[name] = {what: partial(measure, meter, subject) for what, subject in found.items()}
        figures: dict[str, dict[str, float]] = {server: {} for server in servers}
        for number in range(rounds):
            for server, measures in servers.items():
                for what, measured in measures.items():
                    progress(f"{server}: {what}, round {number + 1} of {rounds}")
                    figures[server][what] = min(await measured(), figures[server].get(what, float("inf")))
        progress("")
    return figures


def run(programs: list[str], rounds: int) -> None:
    """Measure, and print the table."""
    figures = asyncio.run(least(programs, rounds, instructions=False))
    show(f"µs of the server, the least of {rounds} rounds", figures, 3)


def count(programs: list[str]) -> None:
    """Count, one server after the other, and print the table."""
    figures: dict[str, dict[str, float]] = {}
    for program in programs:
        figures |= asyncio.run(least([program], 1, instructions=True))
    show("Instructions of the server", figures, 0)


def show(title: str, figures: dict[str, dict[str, float]], digits: int) -> None:
    """Print what was measured, a column for each server."""
    names = next(iter(figures.values()))
    rows = [(what, *(f"{figures[server][what]:,.{digits}f}" for server in figures)) for what in names]
    table(title, ("", *figures), rows)


def main() -> int:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.servers", description=(__doc__ or "").partition("\n\n")[2])
    default = "servers (default: that of this machine, and those of `make servers`)"
    parser.add_argument("programs", nargs="*", metavar="PROGRAM", help=default)
    parser.add_argument("--instructions", action="store_true", help="count instead of timing; needs valgrind")
    parser.add_argument("--rounds", type=int, default=100)
    options = parser.parse_args()
    try:
        programs = options.programs or [server_program(), *map(str, sorted(Path(sys.prefix, "servers").glob("*-[0-9].[0-9]")))]
    except NoRedis as reason:
        print(f"benchmarks.servers: {reason}", file=sys.stderr)
        return 2
    print(f"{machine()['cpu']}, {machine()['date']}")
    if options.instructions:
        count(programs)
    else:
        run(programs, options.rounds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
