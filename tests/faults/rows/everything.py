"""Faults while a fleet does all that a user can: joint checks, leases, waiting, reservations, slots, a calendar. See `uses.py`."""

from __future__ import annotations

from tests.faults.board import Run, row
from tests.faults.rows.network import cut_off
from tests.faults.rows.sentinel import failed_over
from tests.faults.rows.server import killed, workers_killed
from tests.faults.rows.state import flushed


@row(short=True)
def everything_server_killed(run: Run) -> None:
    """All kinds of use: kill -9, back empty after 3 s"""
    killed(run, "local", everything=True)


@row()
def everything_black_hole_of_two(run: Run) -> None:
    """All kinds of use: nothing passes from or to two of the four processes"""
    cut_off(run, processes=2, hole=True, cut=False, everything=True)


@row()
def everything_flushall(run: Run) -> None:
    """All kinds of use: FLUSHALL under load, three times"""
    flushed(run, everything=True)


@row()
def everything_failover(run: Run) -> None:
    """All kinds of use: the master is killed, and Sentinel makes a replica the master"""
    failed_over(run, everything=True)


@row()
def everything_worker_killed(run: Run) -> None:
    """All kinds of use: a process is killed in the middle of them, 50 times; no key stays for ever"""
    workers_killed(run, run.count(50, 5), everything=True)
