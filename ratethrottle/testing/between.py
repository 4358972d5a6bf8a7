"""What tests put between a storage and Redis."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ratethrottle.storage.redis.greeting import Reached
from ratethrottle.storage.redis.race import Pace
from ratethrottle.storage.redis.topology import Master
from ratethrottle.storage.redis.wire import Receiver, Wire


class Between(Master):
    """Stands before what finds the master, and does as that does."""

    def __init__(self, behind: Master) -> None:
        self.behind = behind

    async def reach(self, pace: Pace) -> Reached:
        """Open a connection. Raises what the one behind raises."""
        return await self.behind.reach(pace)

    @property
    def credentials_asked(self) -> int:
        """How often the client's credential provider was asked."""
        return self.behind.credentials_asked

    def watch(self, moved: Callable[[], None]) -> None:
        """Have `moved` called when the master is elsewhere."""
        self.behind.watch(moved)

    def suspect(self) -> None:
        """Look for the master again."""
        self.behind.suspect()

    def end(self) -> list[asyncio.Task[Any]]:
        """Have what runs there end: these tasks."""
        return self.behind.end()

    def abandon(self) -> None:
        """Have its own loop close it."""
        self.behind.abandon()


@dataclass(frozen=True, slots=True)
class Passed(Reached):
    """A connection whose bytes pass something of the test's. through: takes the place of `take_over`. loaded: of `scripts`."""

    through: Callable[[Receiver], Wire]
    loaded: dict[str, tuple[bytes, bytes]]

    @property
    def scripts(self) -> dict[str, tuple[bytes, bytes]]:
        """Name -> (sha, text)."""
        return self.loaded

    def take_over(self, receiver: Receiver) -> Wire:
        """Let `receiver` hear what comes on the connection; returns what to write to."""
        return self.through(receiver)


def passed(behind: Reached, through: Callable[[Receiver], Wire], loaded: dict[str, tuple[bytes, bytes]] | None = None) -> Passed:
    """Have what is said on a connection pass `through`."""
    return Passed(behind.connection, behind.run, behind.shebang, through, behind.scripts if loaded is None else loaded)
