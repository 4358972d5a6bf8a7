"""Faults while a fleet does all that a user can: joint checks, leases, waiting, reservations, a calendar. See `uses.py`."""

from __future__ import annotations

import time

from tests.faults.board import Run, row
from tests.faults.fleet import Fleet
from tests.faults.judge import between
from tests.faults.proxy import Proxy
from tests.faults.rows.sentinel import GAP_S, calm, clients, until_switched
from tests.faults.rows.server import forever
from tests.faults.worker import PASSWORD
from tests.kit.servers import RedisServer, SentinelTopology


@row(short=True)
def everything_server_killed(run: Run) -> None:
    """All kinds of use: kill -9, back empty after 3 s"""
    with RedisServer(password=PASSWORD) as server:
        server.grow_old()
        with Fleet(server.url, everything=True) as fleet:
            fleet.calm(run.seconds(3, 2))
            with fleet.fault():
                server.stop()
                fleet.calm(run.seconds(3, 1.5))
                server.start()
            fleet.calm(run.seconds(11, 3))
        run.judge(fleet, attempts=True, events=("outage_began", "outage_ended"))


@row()
def everything_black_hole_of_two(run: Run) -> None:
    """All kinds of use: nothing passes from or to two of the four processes"""
    with RedisServer(password=PASSWORD) as server, Proxy(server.socket, password=PASSWORD) as proxy:
        server.grow_old()
        with Fleet([proxy.url] * 2 + [server.url] * 2, everything=True) as fleet:
            fleet.calm(run.seconds(3, 2))
            with fleet.fault():
                proxy.set(hole=True)
                fleet.calm(run.seconds(5, 2))
                proxy.set()
            fleet.calm(run.seconds(8, 2))
        run.judge(fleet, cut=2, attempts=True)


@row()
def everything_flushall(run: Run) -> None:
    """All kinds of use: FLUSHALL under load, three times"""
    with RedisServer(password=PASSWORD) as server, server.client() as client:
        server.grow_old()
        with Fleet(server.url, everything=True) as fleet:
            fleet.calm(run.seconds(4, 2.5))
            for _ in range(run.count(3, 1)):
                with fleet.fault():
                    client.flushall()
                fleet.calm(run.seconds(4, 3.5))
        run.judge(fleet, bites=False, events=("state_lost",))


@row()
def everything_failover(run: Run) -> None:
    """All kinds of use: the master is killed, and Sentinel makes a replica the master"""
    with SentinelTopology() as topology:
        with Fleet(clients(topology), everything=True) as fleet:
            fleet.calm(run.seconds(4, 2))
            began_s = time.monotonic()
            topology.master.stop()
            until_switched(fleet, topology, began_s)
            calm(fleet, topology, run.seconds(10, 3))
        run.judge(fleet, heals_s=GAP_S, events=("master_moved",))


@row()
def everything_worker_killed(run: Run) -> None:
    """All kinds of use: a process is killed in the middle of them, 50 times; no key stays for ever"""
    with RedisServer(password=PASSWORD) as server:
        server.grow_old()
        with Fleet(server.url, everything=True) as fleet:
            fleet.calm(1)
            for _ in range(run.count(50, 5)):
                victim = fleet.add(server.url)
                fleet.calm(0.1)
                fleet.kill(victim)
            fleet.calm(1)
        run.judge(fleet, bites=False, heals_s=None)
        felt = [call for call in between(fleet.logs, fleet.began_us, fleet.ended_us) if call.kind == "outage"]
        run.expect(not felt, f"{len(felt)} others were affected")
        run.expect(not (kept := forever(server)), f"keys without an expiry: {kept[:3]}")
