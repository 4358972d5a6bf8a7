"""What a line of slots asks of a storage, and what it hears. Lines stand in `waiting/slots.py`."""

from __future__ import annotations

from asyncio import Future
from typing import NamedTuple, Protocol

from ratethrottle._engine.decision import Entry
from ratethrottle.rule import ConcurrencyRule


class Ask(NamedTuple):
    """What a holder keeps, and what it would like. It is absolute, so that it may be asked again after a lost or late reply.

    held: units that it keeps from now on, in all; what it held beyond that is given back. wanted: how many more slots it would like,
    from 0, of `cost` units each. waits: whether somebody goes on waiting if not all of them are granted. Then the holder stands in the
    storage's queue until it has them, or wants none.
    """

    held: int
    cost: int = 1
    wanted: int = 0
    waits: bool = True


class Held(NamedTuple):
    """The answer to an Ask.

    granted: how many of `wanted` the holder has now. free: units that are left after that. ask_again_s: when to ask again for the
    rest, in seconds; 0: only after a release here, or after `Holder.wake`. source: that of the decisions. lost: what was held before
    this ask had lapsed, so that nothing of `Ask.held` is held; what is granted is.
    """

    granted: int
    free: int
    ask_again_s: float = 0.0
    source: str = "memory"
    lost: bool = False


class Holder(Protocol):
    """A line of slots: of one limiter and event loop, of one key, and of all rules with one name and `ttl`."""

    @property
    def entry(self) -> Entry:
        """The key, validated. Its cost says nothing."""

    @property
    def gone(self) -> bool:
        """Whether its event loop is closed, so that nobody holds anything any more."""

    def lost(self) -> None:
        """Count what is held as lost, at once. Called in the holder's event loop. The answer to an ask that is in flight is void."""

    def wake(self) -> None:
        """Ask again in the next turn of its event loop, from any thread. Raises RuntimeError if that loop has ended."""


class HoldsSlots(Protocol):
    """A storage that has slots. If they don't lapse it has `slots_lapse = False`, and holders with another `ttl` are the same."""

    def hold(self, holder: Holder, rule: ConcurrencyRule, ask: Ask) -> Held | Future[Held]:
        """Answer an ask: at once, or by a future of the holder's event loop. A holder has one ask in flight.

        Raises StorageError, here or by the future.
        """

    async def forget_slots(self, rule: ConcurrencyRule, entry: Entry) -> None:
        """Have nobody hold anything of a key. The holders lose what they hold. Raises StorageError."""
