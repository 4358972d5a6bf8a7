"""The server goes, comes back, stands still; its clients are thrown out."""

from __future__ import annotations

import asyncio
import time
from collections import Counter

from ratethrottle import create_limiter
from tests.faults.board import Run, row
from tests.faults.fleet import Fleet
from tests.faults.judge import between, errors
from tests.faults.uses import RULES, WIDE
from tests.faults.worker import PASSWORD, keys
from tests.kit.servers import RedisServer


def killed(run: Run, policy: str, *, everything: bool = False) -> None:
    """Kill it, and start it empty a while later."""
    with RedisServer(password=PASSWORD) as server:
        server.grow_old()
        with Fleet(server.url, everything=everything, on_outage=policy) as fleet:
            fleet.calm(run.seconds(3, 2))
            with fleet.fault():
                server.stop()
                fleet.calm(run.seconds(3, 1.5))
                server.start()
            fleet.calm(run.seconds(11, 3))
        run.judge(fleet, policy=policy, attempts=True, events=("outage_began", "outage_ended"))


@row(short=True)
def server_killed(run: Run) -> None:
    """kill -9, back empty after 3 s, under `local`"""
    killed(run, "local")


@row()
def server_killed_deny(run: Run) -> None:
    """The same under `deny`"""
    killed(run, "deny")


@row()
def server_killed_allow(run: Run) -> None:
    """The same under `allow`"""
    killed(run, "allow")


@row()
def server_killed_raise(run: Run) -> None:
    """The same under `raise`"""
    killed(run, "raise")


@row(short=True)
def server_frozen(run: Run) -> None:
    """SIGSTOP for 10 s, then SIGCONT, under `local`"""
    with RedisServer(password=PASSWORD) as server:
        server.grow_old()
        with Fleet(server.url) as fleet:
            fleet.calm(2)
            with fleet.fault():
                server.pause()
                fleet.calm(run.seconds(10, 2))
                server.resume()
            fleet.calm(run.seconds(6, 2))
        run.judge(fleet, attempts=True)


@row()
def server_frozen_raise(run: Run) -> None:
    """SIGSTOP under `raise`, where each admission can be counted: nothing is executed twice"""
    with RedisServer(password=PASSWORD) as server:
        server.grow_old()
        with Fleet(server.url, on_outage="raise") as fleet:
            fleet.calm(2)
            with fleet.fault():
                server.pause()
                fleet.calm(run.seconds(10, 2))
                server.resume()
            fleet.calm(3)
        run.judge(fleet, policy="raise", attempts=True)
        executed_once(run, fleet, server)


def executed_once(run: Run, fleet: Fleet, server: RedisServer) -> None:
    """Of the rule that never denies, Redis has counted what was granted, and at most once each call that failed."""
    consumed = wide_units(server)
    calls = [call for call in between(fleet.logs, 0, fleet.ended_us * 2) if call.rule == WIDE]
    granted = sum(call.allowed and call.kind in {"redis", "lease"} for call in calls)
    failed = sum(errors(calls).values())
    run.note(f"Redis counted {consumed} of {granted} granted and {failed} failed checks")
    run.expect(granted <= consumed <= granted + failed, f"Redis counted {consumed}: {granted} were granted, {failed} failed")


def wide_units(server: RedisServer) -> int:
    """How many units of the rule that never denies Redis has counted."""

    async def look() -> int:
        async with create_limiter("redis", redis_url=server.url, rules=[RULES[WIDE]], deadline=5, on_outage="raise") as limiter:
            return sum([RULES[WIDE].limit - (await limiter.peek(key)).remaining for key in keys()])

    return asyncio.run(look())


@row()
def idle_connections_closed(run: Run) -> None:
    """CONFIG SET timeout 1 while nobody checks, and CLIENT KILL: callers see nothing"""
    with RedisServer(password=PASSWORD) as server, server.client() as client:
        server.grow_old()
        with Fleet(server.url) as fleet:
            fleet.calm(1)
            client.config_set("timeout", "1")
            for turn in range(run.count(4, 2)):
                fleet.tell("rest")
                time.sleep(0.5)  # what is in flight is answered
                with fleet.fault():
                    killed_before = client.info("stats")["total_connections_received"]
                    if turn % 2:
                        client.client_kill_filter(_type="normal", skipme=True)
                    fleet.calm(0.2 if turn % 2 else 2.5)  # the server looks for idle ones once a second
                fleet.tell("resume")
                fleet.calm(1.5)
                run.note(f"{client.info('stats')['total_connections_received'] - killed_before} connections were made anew")
        run.judge(fleet, bites=False)
        felt = [call for call in between(fleet.logs, fleet.began_us, fleet.ended_us) if call.kind == "outage"]
        run.expect(not felt, f"{len(felt)} callers heard of it")


@row()
def maxclients(run: Run) -> None:
    """CONFIG SET maxclients below what is needed, and everybody thrown out"""
    with RedisServer(password=PASSWORD) as server, server.client() as client:
        server.grow_old()
        with Fleet(server.url) as fleet:
            fleet.calm(2)
            with fleet.fault():
                client.config_set("maxclients", "1")
                client.client_kill_filter(_type="normal", skipme=True)
                fleet.calm(run.seconds(4, 2))
                client.config_set("maxclients", "1000")
            fleet.calm(run.seconds(6, 2))
        run.judge(fleet, attempts=True)


def workers_killed(run: Run, times: int, *, everything: bool = False) -> None:
    """Start one process after the other, and kill it. Nobody else notices, and no key stays for ever."""
    with RedisServer(password=PASSWORD) as server:
        server.grow_old()
        with Fleet(server.url, everything=everything) as fleet:
            fleet.calm(1)
            for _ in range(times):
                victim = fleet.add(server.url)
                fleet.calm(0.1)
                fleet.kill(victim)
            fleet.calm(1)
        run.judge(fleet, bites=False, heals_s=None)
        felt = [call for call in between(fleet.logs, fleet.began_us, fleet.ended_us) if call.kind == "outage"]
        run.expect(not felt, f"{len(felt)} others were affected")
        run.expect(not (kept := forever(server)), f"keys without an expiry: {kept[:3]}")


@row(short=True)
def worker_killed(run: Run) -> None:
    """A worker process is killed in mid-batch, 100 times: nobody else is affected, no key stays for ever"""
    workers_killed(run, run.count(100, 5))


def forever(server: RedisServer) -> list[bytes]:
    """The keys that never expire, but for those that say what a prefix is in."""
    kept = (b":epoch", b":epoch:written", b":epoch:cleared", b":layout")
    with server.client() as client:
        return [key for key in client.scan_iter("*", count=1000) if client.ttl(key) == -1 and not key.endswith(kept)]


@row()
def worker_stopped(run: Run) -> None:
    """A worker process stands still for 3 s while the server is restarted empty: its bounds may come too late, the others' don't"""
    with RedisServer(password=PASSWORD) as server:
        server.grow_old()
        with Fleet(server.url) as fleet:
            fleet.calm(3)
            with fleet.fault():
                server.stop()
                server.start()
            fleet.stop(fleet.members[0], 3)
            fleet.calm(3)
        # What only the stopped one knew may be granted again: what Redis had granted it of a key just before, at most. Of what came
        # earlier than the second before, another process has heard it, which asked for the same key since.
        lost_us = fleet.faults[0][0]
        own = Counter(
            (call.rule, call.key)
            for call in fleet.logs[0].calls
            if call.allowed and call.kind == "redis" and call.rule != WIDE and lost_us - 1_000_000 <= call.after_us <= lost_us
        )
        run.judge(fleet, bites=False, heals_s=None, over_limit=max(own.values(), default=0))
