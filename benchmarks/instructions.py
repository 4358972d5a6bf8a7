"""`python -m benchmarks.instructions`: instructions of our compiled objects per check, held against the recorded ones.

They are counted by callgrind, so that neither the machine's load nor its clock plays a part. The recorded ones belong to a
compiler, a Python and an architecture. Elsewhere nothing can be judged, and it ends with 3. Under CI=true it ends with 1 if the
compiler is known: then somebody forgot to record its figures.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zlib
from pathlib import Path

from benchmarks.paths import FEW, MANY
from benchmarks.timing import table
from ratethrottle import _core

# All of them: code that moves from one into another is not saved.
OBJECTS = {path.name for path in Path(_core.__file__).parent.rglob("*.so")}
BASELINE = Path(__file__).with_name("instructions.json")
TOLERANCE = 1.03  # nothing but the code changes these counts: two runs differ by nothing
# What an eviction costs depends on which keys it happens to sample: any change of the order moves it by a few per cent.
TOLERANCE_EVICTING = 1.10
MARKS_A_RUN, RUNS = 2, 3  # hotpaths.py: the first run of three warms the path up
FAILED, NOTHING_JUDGED = 1, 3  # exit codes


def key() -> str:
    """Name what the figures belong to: the compilers of our object, Python, and the flags that both came from."""
    built = Path(_core.__file__).read_bytes()
    compilers = sorted(
        {f"{name.decode()} {number.decode()}" for name, number in re.findall(rb"(GCC|clang)[^\0]*?(\d+\.\d+\.\d+)", built)}
    )
    flags = zlib.crc32(str(sysconfig.get_config_var("CFLAGS")).encode())
    python = f"{platform.python_implementation()} {sys.version_info.major}.{sys.version_info.minor}"
    return f"{', '.join(compilers) or '?'}; {python} (flags {flags:08x}); {platform.machine()}"


def spent(dump: Path) -> int:
    """Add up the instructions that one dump of callgrind's counts in our objects, those of other callees left out.

    The format: https://valgrind.org/docs/manual/cl-format.html. An `ob=` holds until the next; the line after a `calls=` is
    what the call cost inside, and not ours to add.
    """
    names: dict[str, str] = {}
    ours, called, total = False, False, 0
    for line in dump.read_text().splitlines():
        name, equals, value = line.partition("=")
        if equals and name in ("ob", "cob"):
            number, _, path = value.partition(" ")
            names.setdefault(number, path)
            if name == "ob":
                ours = Path(names[number]).name in OBJECTS
        elif name == "calls":
            called = True
        elif line[:1] in "+-*" or line[:1].isdigit():
            if ours and not called:
                _, _, count = line.partition(" ")
                total += int(count or 0)  # left out where it is 0
            called = False
    return total


def counted() -> dict[str, float]:
    """Run hotpaths.py under callgrind: instructions per check, by path."""
    with tempfile.TemporaryDirectory(prefix="rt-") as directory:
        out = Path(directory) / "out"
        command = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={out}", "--dump-before=getppid", "--dump-line=no"]
        environment = os.environ | {"PYTHONHASHSEED": "0"}
        done = subprocess.run(
            [*command, sys.executable, "-m", "benchmarks.hotpaths"], env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            sys.exit(f"callgrind failed:\n{done.stderr}")
        paths = done.stdout.splitlines()
        dumps = [out.with_name(f"out.{number}") for number in range(1, MARKS_A_RUN * RUNS * len(paths) + 1)]
        if not dumps[-1].exists() or out.with_name(f"out.{len(dumps) + 1}").exists():
            sys.exit("callgrind wrote another number of dumps than hotpaths.py marked")
        # Every other dump is what was counted between the two marks of a run; the others are what lies between the runs.
        runs = [spent(dump) for dump in dumps[1::MARKS_A_RUN]]
        return {path: (runs[3 * i + 2] - runs[3 * i + 1]) / (MANY - FEW) for i, path in enumerate(paths)}


def judge(figures: dict[str, float], recorded: dict[str, float]) -> int:
    """Print the figures beside the recorded ones; 1 if one needs more than it may."""
    rows, worse = [], 0
    for path, now in figures.items():
        before = recorded.get(path)
        ratio = now / before if before else 0.0
        most = TOLERANCE_EVICTING if "evicting" in path else TOLERANCE
        word = "new" if before is None else "MORE" if ratio > most else "fewer" if ratio < 1 / most else ""
        worse += word == "MORE"
        rows.append((path, f"{now:,.1f}", f"{before:,.1f}" if before else "–", f"{ratio:.3f}" if before else "–", word))
    table("Instructions of our compiled objects per check", ("path", "now", "recorded", "×", ""), rows)
    if worse:
        print(f"  {worse} need more than {TOLERANCE:g} × what is recorded (evicting: {TOLERANCE_EVICTING:g}).")
        print("  If that is meant: make instructions-record, and say in the commit why")
    return FAILED if worse else 0


def unjudged(sentence: str, *, fails: bool) -> int:
    """Say loudly what wasn't judged; returns the exit code."""
    print(f"benchmarks.instructions: {sentence}", file=sys.stderr)
    if os.environ.get("GITHUB_ACTIONS") == "true":
        print(f"::{'error' if fails else 'warning'} title=make instructions::{sentence}")
    return FAILED if fails else NOTHING_JUDGED


def missing(figures: dict[str, float], name: str, recorded: dict[str, dict[str, float]]) -> int:
    """Say which figures are missing. Under CI=true that fails, unless there are none at all of this compiler."""
    if name in recorded:
        paths = sorted(figures.keys() ^ recorded[name].keys())
        which = f"NOT JUDGED: {'; '.join(paths)}: counted and not recorded, or recorded and not counted; run `make instructions-record`"
        return unjudged(which, fails=in_ci()) if paths else 0
    compiler, _, machine = name.split("; ")
    known = any([compiler, machine] == other.split("; ")[::2] for other in recorded)
    why = f"{BASELINE.name} has no figures for {name}; there are some for {' and '.join(recorded) or 'nothing'}; "
    why += "record them with `make instructions-record`, before the change that is to be judged"
    return unjudged(f"NOTHING WAS JUDGED: {why}", fails=known and in_ci())


def in_ci() -> bool:
    """Whether a laptop's excuses don't count, as with redis-server in the tests."""
    return os.environ.get("CI") == "true"


def main() -> int:
    """Count, and judge or record."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.instructions", description=(__doc__ or "").partition("\n\n")[2])
    parser.add_argument("--record", action="store_true", help=f"write the figures to {BASELINE.name} instead of judging them")
    args = parser.parse_args()
    if shutil.which("valgrind") is None:
        return unjudged("NOTHING WAS JUDGED: there is no valgrind on the PATH", fails=args.record or in_ci())
    recorded: dict[str, dict[str, float]] = json.loads(BASELINE.read_text()) if BASELINE.exists() else {}
    figures, name = counted(), key()
    print(name)
    if args.record:
        recorded[name] = {path: round(value, 1) for path, value in figures.items()}
        BASELINE.write_text(json.dumps(dict(sorted(recorded.items())), indent=2) + "\n")
    return judge(figures, recorded.get(name, {})) or missing(figures, name, recorded)


if __name__ == "__main__":
    sys.exit(main())
