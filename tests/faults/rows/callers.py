"""Threads, loops, forks, and what existing tests hold already."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from pathlib import Path

from ratethrottle import RateThrottleRule, create_limiter
from tests.faults.board import Run, row
from tests.faults.worker import open_files
from tests.kit.servers import RedisServer

REPOSITORY = Path(__file__).parents[3]
THREADS = 8
CONNECTIONS = "tests/servers/test_connections.py"


def held_by(run: Run, *tests: str) -> None:
    """Run tests of the suite that hold this row."""
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    lines = ended.stdout.strip().splitlines() or ["no output"]
    run.note(f"tests of the suite: {lines[-1]}")
    # A test that was renamed ends with 4, one that was deselected with 5: neither may pass for held.
    run.expect(
        ended.returncode == 0,
        f"pytest ended with {ended.returncode}: {[line for line in lines if 'FAILED' in line][:2] or lines[-1]}",
    )


@row()
def loops_and_threads(run: Run) -> None:
    """8 threads, each running loop after loop on one limiter"""
    rule = RateThrottleRule("r", 1_000_000, 3600, strategy="fixed_window")
    turns, checks, errors = run.count(10, 2), 200, []
    with RedisServer() as server:
        limiter = create_limiter("redis", redis_url=server.url, rules=[rule], deadline=5, on_outage="raise")
        before = open_files()

        async def some(number: int) -> None:
            rules = await asyncio.gather(*(limiter.check(f"{number}:{i}") for i in range(checks)))
            assert all(decision.key == f"{number}:{i}" for i, decision in enumerate(rules)), "another's reply"

        def run_loops(number: int) -> None:
            try:
                for _ in range(turns):
                    asyncio.run(some(number))
            except BaseException as error:  # noqa: BLE001  # a thread's exception reaches nobody by itself
                errors.append(error)

        threads = [threading.Thread(target=run_loops, args=(number,), daemon=True) for number in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        run.expect(not any(thread.is_alive() for thread in threads), "a thread hangs")
        run.expect(not errors, f"{errors[:1]}")

        async def counted() -> int:
            async with limiter:
                return sum(
                    [1_000_000 - (await limiter.peek(f"{n}:{i}")).remaining for n in range(THREADS) for i in range(checks)]
                )

        total = asyncio.run(counted())
        run.note(f"{total} checks by {THREADS} threads in {turns} loops each")
        run.expect(total == THREADS * turns * checks, f"Redis counted {total}, not {THREADS * turns * checks}")
        run.expect(open_files() <= before, f"{open_files() - before} open files left")


@row()
def forked(run: Run) -> None:
    """A parent with live connections forks, and both check"""
    held_by(
        run,
        f"{CONNECTIONS}::test_a_forked_child_gets_a_connection_of_its_own",
        f"{CONNECTIONS}::test_a_forked_child_spends_nothing_of_its_parents_lease",
    )


@row()
def tls(run: Run) -> None:
    """A certificate that nobody vouches for, a password that is wrong"""
    held_by(
        run,
        f"{CONNECTIONS}::test_a_certificate_that_nobody_vouches_for_is_refused",
        f"{CONNECTIONS}::test_redis_refuses_the_password",
    )


@row()
def cancelled_unsent(run: Run) -> None:
    """A check that is cancelled before it was sent costs nothing"""
    held_by(
        run,
        f"{CONNECTIONS}::test_a_check_cancelled_before_it_was_sent_costs_nothing",
        f"{CONNECTIONS}::test_cancelled_checks_swap_no_replies",
    )


@row()
def secrets_in_errors(run: Run) -> None:
    """No error holds a key or the password, whatever the server quotes (every row with a fleet looks for both too)"""
    held_by(
        run,
        "tests/servers/test_errors.py::test_no_error_holds_the_key_or_the_password",
        "tests/servers/test_errors.py::test_a_bad_url_is_refused_without_repeating_it",
    )
