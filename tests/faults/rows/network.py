"""Redis runs, and can't be reached: nothing passes, nobody listens, connections are reset."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.faults.board import Run, row
from tests.faults.fleet import PROCESSES, Fleet
from tests.faults.proxy import Proxy
from tests.faults.worker import PASSWORD
from tests.kit.servers import RedisServer


def cut_off(
    run: Run,
    *,
    processes: int = PROCESSES,
    policy: str = "local",
    cut: bool = True,
    everything: bool = False,
    **mode: Any,
) -> None:
    """Some of the processes reach Redis through a proxy that stops passing; the others go on."""
    with RedisServer(password=PASSWORD) as server, Proxy(server.socket, password=PASSWORD) as proxy:
        server.grow_old()
        urls = [proxy.url] * processes + [server.url] * (PROCESSES - processes)
        with Fleet(urls, everything=everything, on_outage=policy) as fleet:
            fleet.calm(run.seconds(3, 2))
            with fleet.fault():
                accepted = proxy.set(**mode)["accepted"]
                if cut:
                    proxy.cut()
                fleet.calm(run.seconds(5, 2))
                accepted = proxy.set()["accepted"] - accepted
            fleet.calm(run.seconds(8, 2))
        run.judge(fleet, cut=processes, policy=policy, attempts=True)
        run.note(f"{accepted} connections reached the proxy meanwhile")


@row(short=True)
def black_hole(run: Run) -> None:
    """Connections stay open and nothing passes; new ones are accepted and hear nothing"""
    cut_off(run, hole=True, cut=False)


@row()
def black_hole_of_two(run: Run) -> None:
    """The same for two of the four processes: at most limit · (1 + 2/4) in any interval"""
    cut_off(run, processes=2, hole=True, cut=False)


@row()
def unanswered_connects(run: Run) -> None:
    """Connections break, and the SYN of a new one goes unanswered"""
    cut_off(run, accept="full")


@row(short=True)
def refused(run: Run) -> None:
    """Connections break, and the port is closed"""
    cut_off(run, accept="no")


@row()
def refused_deny(run: Run) -> None:
    """The same under `deny`"""
    cut_off(run, accept="no", policy="deny")


@row()
def reset(run: Run) -> None:
    """Connections are reset by RST, and so are new ones"""
    cut_off(run, accept="reset")


@row()
def lost_replies(run: Run) -> None:
    """Requests are executed, and their replies lost"""
    cut_off(run, mute=True, cut=False)


@row()
def iptables_drop(run: Run) -> None:
    """iptables DROP: packets vanish, those of living connections included"""
    firewalled(run, "DROP")


@row()
def iptables_reject(run: Run) -> None:
    """iptables REJECT with a TCP reset"""
    firewalled(run, "REJECT", "--reject-with", "tcp-reset")


@contextmanager
def firewall(port: int, *target: str) -> Iterator[None]:
    """Treat all packets to that loopback port so. Skips, and says why, where that can't be done."""
    program = shutil.which("iptables")
    if program is None:
        pytest.skip("iptables is not installed (the proxy's rows cover black hole, refused and reset)")
    if os.geteuid():
        pytest.skip("iptables needs root (the proxy's rows cover black hole, refused and reset)")
    rule = ["INPUT", "-i", "lo", "-p", "tcp", "--dport", str(port), "-j", *target]
    made = subprocess.run([program, "-w", "5", "-I", *rule], capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"iptables refuses here: {made.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run([program, "-w", "5", "-D", *rule], capture_output=True, check=True)


def firewalled(run: Run, *target: str) -> None:
    """Let the kernel do it."""
    with RedisServer(password=PASSWORD) as server:
        server.grow_old()
        with firewall(server.port, *target):
            pass  # a skip before anything else is started
        with Fleet(server.url) as fleet:
            fleet.calm(2)
            with fleet.fault(), firewall(server.port, *target):
                fleet.calm(run.seconds(5, 2))
            fleet.calm(run.seconds(5, 2))
        run.judge(fleet, attempts=True)
