"""The rows by name, how each of them is judged, and the table."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from fractions import Fraction

import pytest

from ratethrottle import ConcurrencyRule
from tests.faults.fleet import DEADLINE_S, Fleet
from tests.faults.judge import (
    GRACE_US,
    GROWTH_FILES,
    STEADY_US,
    Verdict,
    attempts_over,
    between,
    errors,
    healed_us,
    kinds,
    most_held,
    over,
    slowest,
)
from tests.faults.records import SOURCES
from tests.faults.worker import BUSY_MS

HEALS_S = 1.0
_rows: dict[str, Row] = {}


@dataclass(frozen=True)
class Row:
    """A fault and the function that provokes it; `short`: part of the short form."""

    name: str
    what: str
    provoke: Callable[[Run], None]
    short: bool


@dataclass
class Run:
    """One run of a row: what the row asks about itself, and where it puts what it finds."""

    row: Row
    short: bool = False
    seed: int = 1
    verdict: Verdict = field(init=False)

    def __post_init__(self) -> None:
        self.verdict = Verdict(self.row.name)

    def seconds(self, full_s: float, short_s: float) -> float:
        """How long something takes, in the one form or the other."""
        return short_s if self.short else full_s

    def count(self, full: int, short: int) -> int:
        """How many, in the one form or the other."""
        return short if self.short else full

    def note(self, what: str) -> None:
        """Say something else that was measured."""
        self.verdict.notes.append(what)

    def expect(self, true: object, otherwise: str) -> None:
        """Take note of a problem unless it is true."""
        self.verdict.expect(true, otherwise)

    def judge(
        self,
        fleet: Fleet,
        *,
        policy: str = "local",
        heals_s: float | None = HEALS_S,
        cut: int | None = None,
        bites: bool = True,
        admits: bool = True,
        allowed_errors: Collection[str] = (),
        attempts: bool = False,
        over_limit: float = 0,
        forget_killed: bool = False,
        events: Collection[str] = (),
    ) -> None:
        """Hold what a fleet logged against the board.

        cut: how many processes were cut off (default: all). bites: whether somebody has to have noticed the fault; a row in which
        nobody does proves nothing. admits: whether its policy has to have admitted something, where it may. attempts: hold
        attempts to connect to two a second. forget_killed: leave out what processes that were killed admitted, since nobody else
        knew of it. events: those that each process had.
        """
        verdict, processes = self.verdict, len(fleet.urls)
        share = Fraction(processes if cut is None else cut, processes)
        calls = between(fleet.logs, fleet.began_us, fleet.ended_us)
        living = [log for log, member in zip(fleet.logs, fleet.members, strict=True) if not member.killed]
        counted = between(living, fleet.began_us, fleet.ended_us) if forget_killed else calls
        self.judge_time(fleet)
        if heals_s is not None:
            verdict.limits.append(f"heals {heals_s:g} s")
            killed = {log.process for log, member in zip(fleet.logs, fleet.members, strict=True) if member.killed}
            for healed in healed_us(fleet.logs, fleet.faults, killed, round(heals_s * 1e6)):
                verdict.healed_us = max(verdict.healed_us or 0, healed) if healed is not None else verdict.healed_us
                late = healed is None or healed > heals_s * 1e6
                verdict.expect(not late, f"healed after {'the run' if healed is None else f'{healed / 1e6:.2f} s'}")
            last = kinds(between(living, fleet.ended_us - STEADY_US, fleet.ended_us))
            verdict.expect(set(last) <= {"redis", "prefilter", "lease"}, f"not back to normal at the end: {dict(last)}")
            # A check that never ends is in no log.
            heard = {call.process for call in between(living, fleet.ended_us - STEADY_US, fleet.ended_us)}
            silent = [log.process for log in living if log.process not in heard]
            verdict.expect(not silent, f"nothing was decided at the end in {silent}")
        if over_limit != float("inf"):
            verdict.limits.append(f"over {over_limit:g}")
        verdict.over = max(verdict.over or 0.0, over(fleet.rules, counted, share, local=policy == "local"))
        verdict.expect(verdict.over <= over_limit, f"{verdict.over:g} units over")
        verdict.admitted.update(call.kind for call in calls if call.allowed)
        self.judge_slots(fleet, processes if cut is None else cut)
        if policy == "deny":
            verdict.expect(not any(call.allowed and call.kind == "outage" for call in calls), "deny admitted something")
        if policy == "allow":
            verdict.expect(all(call.allowed for call in calls if call.kind == "outage"), "allow denied something")
        ours = errors(calls)
        expected = {*allowed_errors, *(("StorageUnavailable", "StorageTimeout") if policy == "raise" else ())}
        verdict.expect(set(ours) <= expected, f"errors instead of decisions: {dict(ours)}")
        if bites:
            during = [call for began_us, ended_us in fleet.faults for call in between(fleet.logs, began_us, ended_us)]
            felt = sum(call.kind not in SOURCES or call.kind == "outage" for call in during)
            verdict.expect(felt, "nobody noticed the fault: the row proves nothing")
            if felt and admits and policy in {"local", "allow"}:
                by_policy = any(call.allowed and call.kind == "outage" for call in during)
                verdict.expect(by_policy, f"{policy} admitted nothing while Redis was away")
        if attempts:
            verdict.limits.append("2 attempts/s")
            worst = max((attempts_over(log, *fault) for log in living for fault in fleet.faults), default=0.0)
            made = sum(began <= at <= end for log in living for began, end in fleet.faults for at, _ in log.connects)
            self.note(f"{made / max(1, len(living)) / max(0.001, fault_s(fleet)):.1f} attempts/s and process")
            verdict.expect(worst <= 0, f"{worst:g} attempts to connect more than two a second and process")
        self.judge_busy(fleet)
        self.judge_ends(fleet, events, heals=heals_s is not None)

    def judge_time(self, fleet: Fleet) -> None:
        """Every call returned in time."""
        verdict = self.verdict
        raw_us, fair_us = slowest(fleet.logs)
        verdict.slowest_us = max(verdict.slowest_us, raw_us)
        verdict.slowest_fair_us = max(verdict.slowest_fair_us, fair_us)
        limit_us = round(fleet.options["deadline"] * 1e6) + GRACE_US
        verdict.limits.append(f"calls {limit_us / 1e3:g} ms")
        verdict.expect(fair_us <= limit_us, f"a call took {raw_us / 1e3:.0f} ms, {fair_us / 1e3:.0f} ms without its loop's lag")

    def judge_slots(self, fleet: Fleet, cut: int) -> None:
        """Never more holders of a key than slots; of those that took one while Redis was away, never more than their shares."""
        for rule in fleet.rules:
            if isinstance(rule, ConcurrencyRule):
                share = -(-rule.limit // len(fleet.urls))
                for by_policy, limit in ((False, rule.limit), (True, share * cut)):
                    slots = [slot for log in fleet.logs for slot in log.held if slot.by_policy == by_policy]
                    held = most_held(slots)
                    self.note(f"{len(slots)} slots{' by policy' if by_policy else ''}, at most {held} of a key at once")
                    self.expect(held <= limit, f"{held} slots of {limit} were held at once{' by policy' if by_policy else ''}")

    def judge_busy(self, fleet: Fleet) -> None:
        """No loop was kept busy by what runs in it.

        A virtual machine counts what its host takes from it as the thread's own time. So one stretch in a whole run is noted, unless
        it is twice too long: what the library does happens in each process, and again.
        """
        stretches = [(busy_ms, garbage_ms) for member in fleet.living for busy_ms, garbage_ms in member.report["busy"]]
        words = [f"{busy_ms:.0f} ms, {garbage_ms:.0f} of them by collecting garbage" for busy_ms, garbage_ms in stretches[:3]]
        if len(stretches) == 1 and stretches[0][0] <= 2 * BUSY_MS:
            self.note(f"one loop was once kept busy for {words[0]}")
        else:
            self.expect(not stretches, f"loops were kept busy {len(stretches)} times: {words}")

    def judge_ends(self, fleet: Fleet, events: Collection[str], *, heals: bool) -> None:
        """Nothing hung, leaked or was left for nobody to see."""
        for member in fleet.living:
            report, who, verdict = member.report, f"process {member.work.number}", self.verdict
            verdict.told += report["told"]
            verdict.expect(not report["hangs"], f"{who}: {report['hangs']} calls hung")
            verdict.expect(not report["noise"], f"{who}: {len(report['noise'])} × {report['noise'][:2]}")
            verdict.expect(not report["secrets"], f"{who} told a secret: {report['secrets'][:1]}")
            grown = report["last"]["files"] - member.ready["files"]
            verdict.expect(grown <= GROWTH_FILES, f"{who}: {grown} open files more than at the beginning")
            for what in ("files", "tasks"):
                left = report["after"][what] - report["before"][what]
                verdict.expect(left <= 0, f"{who}: {left} {what} left after aclose")
            held = report["last"]["statistics"]
            if heals:
                well = held["breaker"] == "closed" and not held["owed"]
                verdict.expect(well, f"{who} is {held['breaker']} and owes what it admitted of {held['owed']} keys at the end")
            missing = set(events) - {event["kind"] for event in report["last"]["events"]}
            verdict.expect(not missing, f"{who} had no event {', '.join(sorted(missing))}")


def fault_s(fleet: Fleet) -> float:
    """For how long something was wrong."""
    return sum(ended_us - began_us for began_us, ended_us in fleet.faults) / 1e6


def row(*, short: bool = False) -> Callable[[Callable[[Run], None]], Callable[[Run], None]]:
    """Make a function a row of the board: its name is the row's, the first line of its docstring says what happens."""

    def register(provoke: Callable[[Run], None]) -> Callable[[Run], None]:
        name = provoke.__name__.replace("_", "-")
        _rows[name] = Row(name, (provoke.__doc__ or "").strip().split("\n")[0], provoke, short)
        return provoke

    return register


def rows() -> dict[str, Row]:
    """All rows, in the order in which they stand in their modules."""
    return _rows


def run_row(each: Row, *, short: bool = False, seed: int = 1) -> Verdict:
    """Provoke a fault and judge what came of it. An exception of the harness is a failure of the row, and a skip says why."""
    run = Run(each, short, seed)
    try:
        each.provoke(run)
    except pytest.skip.Exception as skip:
        run.verdict.skipped = str(skip)
    except Exception as error:  # noqa: BLE001  # one broken row must not hide the results of the others
        place = traceback.extract_tb(error.__traceback__)[-1]
        run.verdict.problems.append(f"{type(error).__name__}: {error} ({place.name}:{place.lineno})")
    except pytest.fail.Exception as error:
        run.verdict.problems.append(str(error))
    return run.verdict


HEAD = ("row", "slowest call (less lag), ms", "healed, s", "over", "admitted", "limit", "")


def cells(verdict: Verdict) -> tuple[str, ...]:
    """A row of the table."""
    fair = f" ({verdict.slowest_fair_us / 1e3:.0f})" if verdict.slowest_fair_us else ""
    slow = f"{verdict.slowest_us / 1e3:.0f}{fair}" if verdict.slowest_us else "-"
    healed = f"{verdict.healed_us / 1e6:.2f}" if verdict.healed_us is not None else "-"
    exceeded = f"{verdict.over:g}" if verdict.over is not None else "-"
    admitted = ", ".join(f"{source} {count}" for source, count in verdict.admitted.most_common()) or "-"
    return (verdict.row, slow, healed, exceeded, admitted, ", ".join(dict.fromkeys(verdict.limits)) or "-", verdict.word)


def print_table(verdicts: Collection[Verdict]) -> None:
    """Print what was measured of each row, and below it what else there is to say."""
    table = [HEAD, *map(cells, verdicts)]
    widths = [max(len(line[column]) for line in table) for column in range(len(HEAD))]
    print()
    for number, line in enumerate(table):
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
        if number:
            verdict = list(verdicts)[number - 1]
            for what, texts in (("", verdict.notes), ("problem: ", verdict.problems), ("skipped: ", [verdict.skipped])):
                for text in filter(None, texts):
                    print(f"    {what}{text}")


def timed(each: Row, *, short: bool, seed: int) -> tuple[Verdict, float]:
    """Run a row, and say how long that took in seconds."""
    started = time.monotonic()
    verdict = run_row(each, short=short, seed=seed)
    return verdict, time.monotonic() - started


__all__ = ["DEADLINE_S", "HEALS_S", "Run", "print_table", "row", "rows", "run_row", "timed"]
