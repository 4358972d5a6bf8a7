"""A master, two replicas and three sentinels: the master dies, freezes, moves; sentinels are away, or lie."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterable
from itertools import pairwise

from ratethrottle import RateThrottleRule, create_limiter
from ratethrottle.errors import StorageError
from tests.faults.board import Run, row
from tests.faults.fleet import DEADLINE_S, Fleet
from tests.faults.judge import GRACE_US, between, kinds
from tests.faults.proxy import Proxy
from tests.faults.records import monotonic_us
from tests.kit.servers import RedisServer, SentinelTopology, eventually, free_port

GAP_S = 1.0
PLANNED_GAP_S = 1.5
DISCOVERY_S = 0.3
RULE = RateThrottleRule("r", 1_000_000, 3600, strategy="fixed_window")


def url(ports: Iterable[int]) -> str:
    """Where clients find sentinels."""
    return f"redis+sentinel://{','.join(f'127.0.0.1:{port}' for port in ports)}/{SentinelTopology.name}/0"


def ports(topology: SentinelTopology) -> list[int]:
    """Of its sentinels."""
    return [port for _, port in topology.addresses]


def clients(topology: SentinelTopology) -> list[str]:
    """Half of them by URL, half with the synchronous client of the reference page."""
    return [url(ports(topology)), f"page+{url(ports(topology))}"] * 2


def scripts_run(server: RedisServer) -> int:
    """How many of our calls a server has run."""
    with server.client() as client:
        stats = client.info("commandstats")
    return sum(int(stats.get(f"cmdstat_{name}", {}).get("calls", 0)) for name in ("eval", "evalsha"))


def until_switched(fleet: Fleet, topology: SentinelTopology, began_s: float) -> None:
    """Take +switch-master for the end of the fault: from then on there is a master to be found."""
    fleet.faults.append((round(began_s * 1e6), round(topology.switched(began_s) * 1e6)))


def calm(fleet: Fleet, topology: SentinelTopology, seconds: float) -> None:
    """Let them work for that long after the last +switch-master. There may be one more of them than was provoked.

    A sentinel connects at most once a second, which is also how long a master may be silent here: one that has tried the dead
    master just before it switches may take the new one for dead as well.
    """
    ((began_us, switched_us),) = fleet.faults
    while len(fleet.faults) <= 2 and (left_s := switched_us / 1e6 + seconds - time.monotonic()) > 0:
        fleet.calm(left_s)
        _, *more = (round(at_s * 1e6) for at_s in topology.moves(began_us / 1e6))
        fleet.faults[1:] = [(at_us, at_us) for at_us in more]
        switched_us = max([switched_us, *more])


def judge_moves(run: Run, fleet: Fleet) -> None:
    """The sentinels have changed the master twice at most, and the one that they left too had decided until then."""
    run.expect(len(fleet.faults) <= 2, f"the sentinels changed the master {len(fleet.faults)} times")
    for (_, switched_us), (left_us, _) in pairwise(fleet.faults):
        run.note(f"the sentinels changed the master once more, {(left_us - switched_us) / 1e6:.2f} s later")
        meanwhile = kinds(between(fleet.logs, switched_us + round(GAP_S * 1e6), left_us))
        run.expect(
            set(meanwhile) <= {"redis", "prefilter"},
            f"the master that they left had not decided all until then: {dict(meanwhile)}",
        )


def failed_over(run: Run, *, everything: bool = False) -> None:
    """Kill the master, and have a replica become the master."""
    with SentinelTopology() as topology:
        with Fleet(clients(topology), everything=everything) as fleet:
            fleet.calm(run.seconds(4, 2))
            began_s = time.monotonic()
            topology.master.stop()
            until_switched(fleet, topology, began_s)
            calm(fleet, topology, run.seconds(10, 3))
        run.judge(fleet, heals_s=GAP_S, events=("master_moved",))
        judge_moves(run, fleet)


@row(short=True)
def sentinel_master_killed(run: Run) -> None:
    """The master is killed: a normal decision within 1 s of +switch-master"""
    failed_over(run)


@row()
def sentinel_master_frozen(run: Run) -> None:
    """The master is frozen for 8 s, and comes back as a writable master: nobody asks it any more"""
    with SentinelTopology() as topology:
        with Fleet(clients(topology)) as fleet:
            fleet.calm(2)
            old, began_s = topology.master, time.monotonic()
            old.pause()
            until_switched(fleet, topology, began_s)
            fleet.calm(max(0.0, began_s + 8 - time.monotonic()))
            old.resume()
            fleet.calm(0.2)  # it runs what it had received before, and nobody hears the answers
            before = scripts_run(old)
            fleet.calm(run.seconds(8, 3))
            later = scripts_run(old) - before
        run.judge(fleet, heals_s=GAP_S, events=("master_moved",))
        run.expect(not later, f"the old master was asked {later} times more")


@row()
def sentinel_planned_failover(run: Run) -> None:
    """SENTINEL FAILOVER, five times: nothing that was admitted is forgotten"""
    with SentinelTopology() as topology:
        with Fleet(clients(topology)) as fleet:
            fleet.calm(3)
            for _ in range(run.count(5, 1)):
                old, began_s = topology.master, time.monotonic()
                switched_s = topology.failover(20)
                fleet.faults.append((round(began_s * 1e6), round(switched_s * 1e6)))
                fleet.calm(max(0.0, switched_s + 1 - time.monotonic()))
                before = scripts_run(old)
                fleet.calm(3)
                later = scripts_run(old) - before
                run.expect(not later, f"the old master was asked {later} times more than 1 s after +switch-master")
        run.judge(fleet, heals_s=PLANNED_GAP_S, bites=False, events=("master_moved",))


@row()
def sentinels_away(run: Run) -> None:
    """The first sentinel is black-holed, one is frozen, one gone: discovery takes 0.3 s at most"""
    with SentinelTopology() as topology, Proxy(topology.sentinels[0].socket) as first:
        topology.sentinels[1].pause()
        for what, mode in (("silent", {"hole": True}), ("unanswered", {"accept": "full"})):
            first.set(**mode)
            took_s = asyncio.run(discover(url([first.port, topology.sentinels[1].port, free_port(), topology.sentinels[2].port])))
            run.note(f"discovery with the first one {what}: {took_s * 1e3:.0f} ms")
            run.expect(took_s <= DISCOVERY_S, f"discovery took {took_s:.2f} s with the first one {what}")
        topology.sentinels[1].resume()
    run.verdict.limits.append(f"discovery {DISCOVERY_S:g} s")


async def discover(where: str) -> float:
    """How long the first decision takes."""
    async with create_limiter("redis", redis_url=where, rules=[RULE], deadline=5, on_outage="raise") as limiter:
        began_s = time.monotonic()
        assert (await limiter.check("user")).source == "redis"
        return time.monotonic() - began_s


@contextlib.asynccontextmanager
async def liar(port: int) -> AsyncIterator[int]:
    """A sentinel that names that port, whatever it is asked."""
    address = b"*2\r\n$9\r\n127.0.0.1\r\n$%d\r\n%d\r\n" % (len(str(port)), port)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):  # the client that asked has gone
            while True:
                words = []
                for _ in range(int((await reader.readuntil(b"\r\n"))[1:])):
                    size = int((await reader.readuntil(b"\r\n"))[1:])
                    words.append((await reader.readexactly(size + 2))[:-2])
                name = words[0].upper()
                if name in {b"SUBSCRIBE", b"PSUBSCRIBE"}:
                    for number, channel in enumerate(words[1:], 1):
                        writer.write(
                            b"*3\r\n$%d\r\n%b\r\n$%d\r\n%b\r\n:%d\r\n" % (len(name), name.lower(), len(channel), channel, number)
                        )
                else:
                    writer.write(address if name == b"SENTINEL" else b"+PONG\r\n" if name == b"PING" else b"+OK\r\n")
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


async def refused_everywhere(run: Run, where: str, what: str) -> None:
    """Ask for a while: never a decision from Redis, and always in time."""
    async with create_limiter("redis", redis_url=where, rules=[RULE], deadline=DEADLINE_S, on_outage="raise") as limiter:
        end_us = monotonic_us() + 2_000_000
        while monotonic_us() < end_us:
            began_us = monotonic_us()
            try:
                decision = await limiter.check("user")
            except StorageError:
                took_us = monotonic_us() - began_us
                run.verdict.slowest_us = max(run.verdict.slowest_us, took_us)
                run.expect(took_us <= DEADLINE_S * 1e6 + 3 * GRACE_US, f"a refusal took {took_us / 1e3:.0f} ms")
            else:
                run.expect(decision.source != "redis", f"a decision from {what}")
            await asyncio.sleep(0.02)


@row()
def sentinel_lies(run: Run) -> None:
    """A sentinel that names a replica, and a master that was made a replica by hand: ROLE refuses them"""
    with SentinelTopology() as topology:

        async def main() -> None:
            async with liar(topology.nodes[1].port) as port:
                await refused_everywhere(run, url([port]), "a replica")
                took_s = await discover(url([port, *ports(topology)]))
                run.note(f"found the master beside a liar in {took_s * 1e3:.0f} ms")
            async with liar(free_port()) as port:
                await refused_everywhere(run, url([port]), "nobody")

        asyncio.run(main())
        for sentinel in topology.sentinels:
            sentinel.pause()  # or they would make it a master again
        with topology.nodes[0].client() as client:
            client.replicaof("127.0.0.1", str(topology.nodes[1].port))
            eventually(lambda: client.role()[0] == b"slave")

        async def demoted() -> None:
            async with liar(topology.nodes[0].port) as port:
                await refused_everywhere(run, url([port]), "a demoted master")

        asyncio.run(demoted())
        for sentinel in topology.sentinels:
            sentinel.resume()
