"""Where the state lives. The protocol is private so far: it will grow with outages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ratethrottle._core import Decision, Entry, KeyTable


class Storage(Protocol):
    """What a limiter asks of a storage. Every method raises `StorageError` when there is no answer within the deadline."""

    @property
    def table(self) -> KeyTable | None:
        """What decides at once, in compiled code; None where the network is needed."""

    async def decide(self, entries: Sequence[Entry]) -> list[Decision]:
        """Decide in order, in one gathering."""

    async def peek(self, entry: Entry) -> Decision:
        """Decide without consuming."""

    async def reset(self, entry: Entry) -> None:
        """Forget what the entry's key has used under its rule."""

    async def open(self) -> None:
        """Take up the storage before the first check needs it."""

    async def aclose(self) -> None:
        """Close what the storage owns, now and for good."""
