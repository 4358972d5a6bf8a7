"""Redis answers, but late."""

from __future__ import annotations

from typing import Any

from tests.faults.board import HEALS_S, Run, row
from tests.faults.fleet import Fleet
from tests.faults.judge import between, first_at_us, share_slower
from tests.faults.proxy import Proxy
from tests.faults.worker import PASSWORD
from tests.kit.servers import RedisServer

OPENS_S = 1.0
QUICK_US = 1_000


def slowed(run: Run, *, normal: bool, **mode: Any) -> None:
    """Answers pass as slowly as that for a while."""
    with RedisServer(password=PASSWORD) as server, Proxy(server.socket, password=PASSWORD) as proxy:
        server.grow_old()
        with Fleet(proxy.url) as fleet:
            fleet.calm(2)
            with fleet.fault():
                proxy.set(**mode)
                fleet.calm(run.seconds(5, 3))
                proxy.set()
            fleet.calm(run.seconds(6, 3))
        run.judge(fleet, bites=not normal, heals_s=HEALS_S, attempts=not normal)
        [(began_us, ended_us)] = fleet.faults
        during = between(fleet.logs, began_us, ended_us)
        if normal:
            policy = sum(call.kind == "outage" for call in during)
            run.expect(not policy, f"{policy} decisions by policy, although Redis answers in time")
            return
        opened = 0
        for log in fleet.logs:
            own = [call for call in during if call.process == log.process]
            opened = max(opened, first_at_us(own, "outage", began_us) or 10**9)
        run.note(f"the breaker was open everywhere after {opened / 1e6:.2f} s")
        run.expect(opened <= OPENS_S * 1e6, f"the breaker opened after {opened / 1e6:.2f} s")
        open_calls = between(fleet.logs, began_us + round(OPENS_S * 1e6), ended_us)
        slow = share_slower(open_calls, fleet.logs, QUICK_US)
        run.note(f"{slow:.2%} of {len(open_calls)} decisions took more than 1 ms while it was open")
        # Processes take turns on a machine with fewer cores than processes, which a timer of 5 ms doesn't always see.
        run.expect(slow <= 0.02, f"{slow:.1%} of the decisions took more than 1 ms while the breaker was open")


@row()
def slow_50_ms(run: Run) -> None:
    """Each answer comes 50 ms late: normal"""
    slowed(run, normal=True, delay_s=(0.05, 0.05))


@row(short=True)
def slow_300_ms(run: Run) -> None:
    """Each answer comes 300 ms late: an outage"""
    slowed(run, normal=False, delay_s=(0.3, 0.3))


@row()
def slow_2000_ms(run: Run) -> None:
    """Each answer comes 2 s late: an outage"""
    slowed(run, normal=False, delay_s=(2.0, 2.0))


@row()
def slow_trickle(run: Run) -> None:
    """One byte every 50 ms"""
    slowed(run, normal=False, trickle_s=0.05)


@row()
def slow_wobbling(run: Run) -> None:
    """Each answer comes 100 to 400 ms late: about the deadline, the worst place to be"""
    with RedisServer(password=PASSWORD) as server, Proxy(server.socket, password=PASSWORD) as proxy:
        server.grow_old()
        with Fleet(proxy.url) as fleet:
            fleet.calm(2)
            with fleet.fault():
                proxy.set(delay_s=(0.1, 0.4))
                fleet.calm(run.seconds(8, 3))
                proxy.set()
            fleet.calm(run.seconds(6, 3))
        run.judge(fleet)
