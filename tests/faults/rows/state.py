"""Redis runs, and has forgotten: scripts, everything, or a part."""

from __future__ import annotations

import threading

from tests.faults.board import Run, row
from tests.faults.fleet import Fleet
from tests.faults.judge import between
from tests.faults.rows.server import executed_once
from tests.faults.worker import PASSWORD
from tests.kit.servers import RedisServer


@row(short=True)
def script_flush(run: Run) -> None:
    """SCRIPT FLUSH every 50 ms under load: no error for callers, each entry executed exactly once"""
    with RedisServer(password=PASSWORD) as server, server.client() as client:
        server.grow_old()
        with Fleet(server.url, on_outage="raise") as fleet:
            fleet.calm(1)
            with fleet.fault():
                for _ in range(run.count(100, 30)):
                    client.script_flush()
                    fleet.calm(0.05)
            fleet.calm(1)
        run.judge(fleet, bites=False)
        failed = [call for call in between(fleet.logs, 0, 2 * fleet.ended_us) if call.kind not in {"redis", "prefilter"}]
        run.expect(not failed, f"{len(failed)} callers noticed: {failed[:1]}")
        executed_once(run, fleet, server)
        stats = client.info("commandstats")
        run.expect(stats.get("cmdstat_eval", {}).get("calls", 0), "no call had to be sent by value: the row proves nothing")


def flushed(run: Run, *, everything: bool = False) -> None:
    """Empty it under load, three times."""
    with RedisServer(password=PASSWORD) as server, server.client() as client:
        server.grow_old()
        with Fleet(server.url, everything=everything) as fleet:
            fleet.calm(run.seconds(4, 2.5))
            for _ in range(run.count(3, 1)):
                with fleet.fault():
                    client.flushall()
                fleet.calm(run.seconds(4, 3.5))
        run.judge(fleet, bites=False, events=("state_lost",))


@row(short=True)
def flushall(run: Run) -> None:
    """FLUSHALL under load, three times: noticed, repaired, nothing over that a living process knew"""
    flushed(run)


@row()
def flushall_deny(run: Run) -> None:
    """The same under `deny`"""
    with RedisServer(password=PASSWORD) as server, server.client() as client:
        server.grow_old()
        with Fleet(server.url, on_outage="deny") as fleet:
            fleet.calm(4)
            with fleet.fault():
                client.flushall()
            fleet.calm(8)
        run.judge(fleet, policy="deny", bites=False, events=("state_lost",))


@row()
def restarted_empty(run: Run) -> None:
    """Killed and started again at once, empty"""
    with RedisServer(password=PASSWORD) as server:
        server.grow_old()
        with Fleet(server.url) as fleet:
            fleet.calm(4)
            for _ in range(run.count(2, 1)):
                with fleet.fault():
                    server.stop()
                    server.start()
                fleet.calm(run.seconds(5, 3))
        run.judge(fleet, bites=False, attempts=True, events=("state_lost",))


@row()
def eviction(run: Run) -> None:
    """allkeys-lru and a flood of other keys: an event when ours are evicted"""
    with RedisServer("--maxmemory-policy", "allkeys-lru", password=PASSWORD) as server, server.client() as client:
        with Fleet(server.url) as fleet:
            fleet.calm(2)
            with fleet.fault():
                client.config_set("maxmemory", str(client.info("memory")["used_memory"] + 2_000_000))
                flood = threading.Thread(target=fill, args=(server, run.count(30_000, 10_000)))
                flood.start()
                fleet.calm(run.seconds(6, 4))
                flood.join()
            client.config_set("maxmemory", "0")
            fleet.calm(2)
        evicted = client.info("stats")["evicted_keys"]
        run.note(f"{evicted} keys were evicted")
        run.expect(evicted, "nothing was evicted: the row proves nothing")
        # What was evicted is forgotten, and nobody can tell which: only that it happened.
        run.judge(fleet, bites=False, heals_s=None, over_limit=float("inf"), events=("evicted",))


def fill(server: RedisServer, keys: int) -> None:
    """Store keys of a kilobyte."""
    with server.client() as client:
        for first in range(0, keys, 500):
            with client.pipeline(transaction=False) as pipeline:
                for number in range(first, first + 500):
                    pipeline.set(f"flood:{number}", "x" * 1000)
                pipeline.execute()
