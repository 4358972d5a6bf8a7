"""From a host name to a connected socket: looked up off the loop, and tried address by address."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import ipaddress
import socket
from typing import Any

from ratethrottle.storage.redis.aside import Shared
from ratethrottle.storage.redis.tasks import own_task, result_of, succeeded

# For how long an answer serves other attempts too. A failover by DNS must be seen by the next attempt but one.
FRESH_S = 1.0
# The next address is tried beside the one before after so long (RFC 8305), or as soon as that has failed.
BESIDE_S = 0.25
ADDRESSES_MAX = 8
NAMES_MAX = 64  # as many as sentinels may name in turn

Place = tuple[int, Any]  # address family, and what a socket connects to


class Names:
    """Looks up the host names of one storage: at most one look-up of each is under way, whichever attempts and loops wait for it."""

    def __init__(self) -> None:
        self._looking: dict[tuple[str, int], Shared[list[Place]]] = {}

    async def places(self, host: str, port: int) -> list[Place]:
        """Find the addresses of a host. Raises OSError."""
        place = literal(host, port)
        if place is not None:
            return [place]
        looking = self._looking.get((host, port))
        if looking is None:
            while len(self._looking) >= NAMES_MAX:
                self._looking.pop(next(iter(self._looking)), None)
            looking = self._looking[host, port] = Shared(
                functools.partial(look_up, host, port), "ratethrottle look-up", fresh_s=FRESH_S
            )
        return await looking.get()


def literal(host: str, port: int) -> Place | None:
    """Read an address that is none to be looked up. One with a zone is: the zone has a number that the system knows."""
    try:
        version = ipaddress.ip_address(host).version
    except ValueError:
        return None
    if version == 4:
        return socket.AF_INET, (host, port)
    return None if "%" in host else (socket.AF_INET6, (host, port, 0, 0))


def look_up(host: str, port: int) -> list[Place]:
    """Ask the system, which may take its time. Raises OSError."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    places = list(dict.fromkeys((int(family), address) for family, _, _, _, address in found))
    if not places:
        raise OSError(f"no address of {host}")
    return places[:ADDRESSES_MAX]


async def dial(places: list[Place]) -> socket.socket:
    """Connect to the first of the addresses that accepts; each one is begun when the one before has failed, or takes its time.

    Raises the OSError of the last one.
    """
    if len(places) == 1:
        return await connected(places[0])
    loop = asyncio.get_running_loop()
    left = list(places)
    calls: set[asyncio.Task[socket.socket]] = set()
    error: BaseException = OSError("no address")
    try:
        while left or calls:
            if left:
                calls.add(own_task(loop, connected(left.pop(0)), "ratethrottle dial"))
            done, _ = await asyncio.wait(calls, timeout=BESIDE_S if left else None, return_when=asyncio.FIRST_COMPLETED)
            for call in done:
                try:
                    found = result_of(call)
                except Exception as failed:  # noqa: BLE001  # the last one is raised
                    error = failed
                else:
                    calls.discard(call)
                    return found
            calls -= done
        raise error
    finally:
        for call in calls:
            call.cancel()
        if calls and not loop.is_closed():
            await asyncio.wait(calls)
            for call in calls:
                if succeeded(call):
                    call.result().close()


async def connected(place: Place) -> socket.socket:
    """Connect to one address. Raises OSError."""
    family, address = place
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        made.setblocking(False)
        with contextlib.suppress(OSError):
            made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await asyncio.get_running_loop().sock_connect(made, address)
    except BaseException:
        made.close()
        raise
    return made
