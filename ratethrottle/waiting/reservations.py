"""`limiter.reserve(...)`: units that are taken before a block, and settled by what it has really used."""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Iterable, Mapping
from functools import partial
from types import TracebackType
from typing import Any, Literal, Protocol, Self, cast
from weakref import WeakSet

from ratethrottle._engine.decision import Decision
from ratethrottle._engine.joint import JointDecision
from ratethrottle._several import Timed, reserved, settlement, told
from ratethrottle.errors import InvalidRequest, RateLimitExceeded, StorageError, listed, shown
from ratethrottle.events import UnsettledReservation
from ratethrottle.rule import FirstOf, RateThrottleRule
from ratethrottle.waiting.lines import Lines
from ratethrottle.waiting.tickets import seconds_of

Key = str | tuple[str | int, ...]
Ask = tuple[Key, Any, int, float | None]  # key, rule, cost, timeout
OnError = Literal["keep", "refund"]

PLACES_MAX = 1000  # that are warned of

BEFORE, ENTERING, WITHIN, AFTER = range(4)


class Reserves(Protocol):
    """A limiter, as far as reservations need it."""

    @property
    def _storage(self) -> Any: ...

    @property
    def _lines(self) -> Lines: ...


class Reservations:
    """The reservations of one limiter."""

    __slots__ = ("_warned", "open")

    def __init__(self) -> None:
        self._warned: set[tuple[str, int, bool]] = set()
        self.open = WeakSet[Reservation]()  # whose block runs

    def make(self, limiter: Reserves, ask: Ask, on_error: OnError) -> Reservation:
        """Make one for the caller of the caller. Raises InvalidRequest."""
        frame = sys._getframe(2)
        seconds_of(ask[3])
        if on_error not in ("keep", "refund"):
            raise InvalidRequest(f'on_error is {shown(on_error)}; it is "keep" or "refund"')
        limiter._storage.expect_refunds()
        return Reservation(self, limiter, ask, on_error, (frame.f_code.co_filename, frame.f_lineno))

    def close(self) -> None:
        """Settle what blocks that still run have said so far: their limiter closes."""
        for reservation in list(self.open):
            reservation._settle_so_far()

    def warn(self, limiter: Reserves, place: tuple[str, int], *, closed: bool = False) -> None:
        """Say once for each place that its reservations aren't settled, or that their limiter is closed by then."""
        if (*place, closed) not in self._warned and len(self._warned) < PLACES_MAX:
            self._warned.add((*place, closed))
            limiter._storage.events.emit(UnsettledReservation(f"{place[0]}:{place[1]}", closed))


class Reservation:
    """What `limiter.reserve(...)` returns: `async with` it, once.

    decision: what the check at its beginning said. settle: say how many units were really used.
    """

    __slots__ = (
        "__weakref__",
        "_ask",
        "_decision",
        "_limiter",
        "_limits",
        "_of",
        "_on_error",
        "_place",
        "_sent",
        "_stage",
        "_used",
    )

    def __init__(
        self,
        of: Reservations,
        limiter: Reserves,
        ask: Ask,
        on_error: OnError,
        place: tuple[str, int],
    ) -> None:
        self._of = of
        self._limiter = limiter
        self._ask = ask
        self._on_error = on_error
        self._place = place  # that made it
        self._stage = BEFORE
        self._decision: JointDecision | None = None
        self._limits: tuple[tuple[tuple[str, ...], str, int, int], ...] = ()
        self._used: tuple[int, ...] | None = None
        self._sent = False  # what was used: the storage has heard of it

    @property
    def decision(self) -> Decision:
        """The decision that granted it."""
        if self._decision is None:
            raise InvalidRequest("nothing is reserved yet: write `async with limiter.reserve(...) as reservation:`")
        return told(self._decision)

    def settle(self, used: int | Mapping[Any, int]) -> None:
        """Say how many units were really used, once it is known. That is sent when the block ends.

        used: units of each limit, or a mapping of rules to units; limits that it doesn't name keep their estimate. A FirstOf stands for
        the rule that has paid. At most twice the capacity can have been used.

        To say the same again does nothing. Raises InvalidRequest for other numbers than before, for numbers that can't be, and
        outside the block. After numbers that can't be, the estimate stays counted, whatever `on_error` says.
        """
        if self._stage != WITHIN or self._decision is None:
            raise InvalidRequest(
                f"settle is called {'after' if self._stage == AFTER else 'before'} the block; call it within `async with`"
            )
        # Something was used, whatever is wrong with the numbers: an exception that this raises doesn't give all of it back.
        self._on_error = "keep"
        units = tuple(self._named(used) if isinstance(used, Mapping) else self._single(used))
        settlement(self._decision, units)  # raises what is wrong with them
        if self._used is not None and self._used != units:
            raise InvalidRequest("the reservation was settled with other units before; settle it once, with all that was used")
        self._used = units

    async def __aenter__(self) -> Self:
        if self._stage != BEFORE:
            raise InvalidRequest("a reservation is entered once; call limiter.reserve(...) for each block")
        self._stage = ENTERING  # from before it asks: another task must not reserve the same meanwhile
        key, rule, cost, timeout = self._ask
        try:
            granted = await self._limiter._lines.acquire(cast(Any, self._limiter), key, Timed(rule), cost, timeout)
        except BaseException as denied:
            self._stage = BEFORE
            if isinstance(denied, RateLimitExceeded):
                raise RateLimitExceeded(told(denied.decision)) from None
            raise
        decision = cast(JointDecision, granted)
        self._decision = decision
        self._limits = reserved(decision)
        self._stage = WITHIN
        self._of.open.add(self)
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        used, self._stage = self._used, AFTER
        self._of.open.discard(self)
        if used is None and error is None:
            self._of.warn(self._limiter, self._place)
        if used is None and error is not None and self._on_error == "refund":
            used = (0,) * len(self._limits)
        if used is None or self._sent:
            return
        waits = self._send(used)
        # A coroutine that is closed can't wait any more. What was begun goes on.
        if waits is not None and not isinstance(error, GeneratorExit):
            await waits

    def _send(self, used: tuple[int, ...]) -> Awaitable[object] | None:
        """Begin to settle, and return what to wait for."""
        self._sent = True
        difference = settlement(self._decision, used) if self._decision is not None else None
        if difference is None:
            return None
        try:
            # Those who wait for just these units need not wait for the time that their denial named.
            came_back = partial(self._limiter._lines.came_back, self._ask[0])
            waits: Awaitable[object] | None = self._limiter._storage.settle(difference, came_back)
        except StorageError:
            self._of.warn(self._limiter, self._place, closed=True)
            return None
        return waits

    def _settle_so_far(self) -> None:
        if self._used is not None and not self._sent:
            self._send(self._used)

    def __repr__(self) -> str:
        # Without the key, as everywhere.
        stage = ("not entered yet", "waiting", "open", "ended")[self._stage]
        return f"<Reservation {stage}{'' if self._used is None else ' settled'}>"

    def _single(self, used: object) -> Iterable[Any]:
        if isinstance(self._ask[1], Mapping) and len(self._limits) > 1:
            raise InvalidRequest(
                f"settle got one number for {len(self._limits)} limits that have costs of their own; pass a mapping of "
                f"{listed([payer for _, payer, _, _ in self._limits])} to units"
            )
        return [used] * len(self._limits)

    def _named(self, used: Mapping[Any, int]) -> Iterable[Any]:
        places = {name: i for i, (names, _, _, _) in enumerate(self._limits) for name in names}
        units: list[Any] = [estimate for _, _, estimate, _ in self._limits]
        named: set[int] = set()
        for rule, count in used.items():
            names = [_name(one) for one in (rule.rules if isinstance(rule, FirstOf) else (rule,))]
            name = names[0]
            if name not in places:
                raise InvalidRequest(
                    f"settle names {shown(name)}, of which nothing is reserved; reserved are {listed(places, str(name))}"
                )
            if isinstance(rule, FirstOf) and set(names) != set(self._limits[places[name]][0]):
                raise InvalidRequest(f"settle names a FirstOf that nothing is reserved of; reserved are {listed(places)}")
            if places[name] in named:
                raise InvalidRequest("settle names two rules of one FirstOf; name the one that has paid, or the FirstOf")
            named.add(places[name])
            units[places[name]] = count
        return units


def _name(rule: object) -> object:
    """Name a rule."""
    return rule.name if isinstance(rule, RateThrottleRule) else rule
