"""`limiter.slot(...)`: units that are held for as long as a block runs. Its callers stand in lines: see `holders.py`."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from math import inf
from types import TracebackType
from typing import Any, NamedTuple, NoReturn, Protocol, Self, cast

from anyio.lowlevel import checkpoint

from ratethrottle._engine.decision import Decision, Entry
from ratethrottle._engine.definitions import CompiledRule
from ratethrottle._engine.held import SlotDecision, held_count, held_counted, held_entry, held_tally, held_with
from ratethrottle._engine.joint import Joint
from ratethrottle._holding import HoldsSlots
from ratethrottle.errors import ConfigurationError, InvalidRequest, LimiterClosed, RateLimitExceeded, listed
from ratethrottle.rule import ConcurrencyRule
from ratethrottle.storage import Outcomes
from ratethrottle.waiting.holders import Claim, SlotLine, never
from ratethrottle.waiting.lines import Lines
from ratethrottle.waiting.loops import Future, loop_here
from ratethrottle.waiting.tickets import Key, seconds_of

YIELD_EVERY = 128  # slots that were granted at once, one after the other

BEFORE, ENTERING, WITHIN, AFTER = range(4)


class Limiter(Protocol):
    """A limiter, as far as slots need it."""

    @property
    def _closed(self) -> bool: ...

    @property
    def _storage(self) -> Any: ...

    @property
    def _lines(self) -> Lines: ...

    @property
    def rules(self) -> Mapping[str, Any]:
        """All rules by name."""

    def _entry_of(self, key: Key, rule: Any = None, cost: int = 1) -> Entry | Joint: ...


class Rates(NamedTuple):
    """The other limits of a slot, which are checked once it is held."""

    rules: Any
    cost: int


class Slots:
    """The concurrency rules of a limiter, and what takes slots by them."""

    __slots__ = ("_since_turn", "_tallies", "rules")

    def __init__(self) -> None:
        self.rules: dict[str, ConcurrencyRule] = {}
        self._tallies: dict[str, CompiledRule] = {}  # what decisions are counted by
        self._since_turn = 0

    def make(self, limiter: Limiter, key: Key, rule: Any, cost: int, timeout: float | None) -> Slot:
        """Make a slot that is to be taken. Raises InvalidRequest, CostExceedsLimit, ConfigurationError or LimiterClosed."""
        if limiter._closed:
            raise LimiterClosed
        timeout_s = seconds_of(timeout)
        named, units, rates = self._parts(rule, cost)
        found = self._found(limiter, named)
        entry = held_entry(found.compiled, key, units)
        if rates is not None:
            limiter._entry_of(key, *rates)
        _holding(limiter._storage)
        return Slot(self, limiter, Claim(entry, found, timeout_s, named=found is not named), rates)

    async def take(self, limiter: Limiter, claim: Claim) -> SlotLine:
        """Wait in line for a slot, and count what becomes of it. Returns the line."""
        try:
            line = await self._take(limiter, claim)
        except RateLimitExceeded as denied:
            self._count(claim, denied.decision)
            raise
        self._count(claim, cast(Decision, claim.outcome))
        return line

    async def _take(self, limiter: Limiter, claim: Claim) -> SlotLine:
        if limiter._closed:
            raise LimiterClosed
        self._since_turn += 1
        if self._since_turn >= YIELD_EVERY:
            self._since_turn = 0
            await checkpoint()
        rule = self.rules.get(claim.rule.name, claim.rule) if claim.named else claim.rule
        if rule is not claim.rule:
            claim.go_by(rule)
        if not claim.entry.counted:  # the limit is 0
            raise RateLimitExceeded(never(claim.entry))
        lines = limiter._lines._here(cast(Any, limiter))
        # Where nothing lapses, callers stand in one line whatever the ttl.
        ttl_us = rule.ttl_us if getattr(limiter._storage, "slots_lapse", True) else 0
        name = (rule.name, ttl_us, claim.entry.canonical)
        line = cast("SlotLine | None", lines.lines.get(name))
        if line is None:
            line = lines.lines[name] = SlotLine(lines, name, limiter._storage, claim.entry, rule)
        if claim.timeout_s:
            claim.deadline = lines.loop.now() + claim.timeout_s
        line.enter(claim)
        if claim.outcome is None:
            self._since_turn = 0
            claim.future = lines.loop.future(partial(line.abandon, claim))
            try:
                await claim.future
            except BaseException:
                line.abandon(claim)
                raise
            finally:
                claim.future = None  # it refers to the claim
        if isinstance(claim.outcome, BaseException):
            error, claim.outcome = claim.outcome, None
            try:
                raise error
            finally:
                del error  # its traceback holds this frame
        return line

    def add(self, limiter: Limiter, rule: ConcurrencyRule) -> None:
        """Take a rule up, also for those that wait by its name."""
        self.rules[rule.name] = rule
        if rule.name not in self._tallies:
            self._tallies[rule.name] = held_tally(rule.compiled)
        for line in self._lines(limiter):
            if line.rule.name == rule.name:
                with suppress(RuntimeError):  # that loop has ended
                    line.of.loop.from_any_thread(partial(line.change, rule))

    def _count(self, claim: Claim, decision: Decision) -> None:
        """Count it under the limiter's rule of that name, also for one of the caller's own."""
        tally = self._tallies.get(claim.rule.name)
        if tally is not None:
            held_count(tally, decision)

    def drop(self, name: str) -> None:
        """Forget a rule, and what was counted under it."""
        del self.rules[name], self._tallies[name]

    def counted(self) -> dict[str, dict[str, Outcomes]]:
        """Say how many slots were granted and denied under each rule of the limiter, by each source."""
        return held_counted(self._tallies, Outcomes)

    def held(self, limiter: Limiter) -> int:
        """Units that are held, in all event loops."""
        return sum(line.used for line in self._lines(limiter))

    def _lines(self, limiter: Limiter) -> list[SlotLine]:
        """All lines of this process."""
        loops = [lines for lines in list(limiter._lines._loops.values()) if lines.process == os.getpid()]
        return [line for lines in loops for line in list(lines.lines.values()) if isinstance(line, SlotLine)]

    def resets(self, limiter: Limiter, key: Key, rule: Any) -> tuple[list[tuple[ConcurrencyRule, Entry]], Any]:
        """Find what a reset means: the rules of slots with their validated entries, and the other rules. Raises InvalidRequest."""
        several = isinstance(rule, (tuple, list, Mapping))
        if rule is None:
            held = [None] if self.rules and len(self.rules) == len(limiter.rules) else []
        else:
            held = [each for each in (rule if several else [rule]) if self._holds(each)]
        others = [each for each in rule if not self._holds(each)] if held and several else () if held else rule
        found = [self._found(limiter, each) for each in held]
        return [(each, held_entry(each.compiled, key, 1)) for each in found], others

    async def reset(self, limiter: Limiter, rule: ConcurrencyRule, entry: Entry) -> None:
        """Take all slots of a key from their holders."""
        await _holding(limiter._storage).forget_slots(rule, entry)

    def _holds(self, rule: Any) -> bool:
        return isinstance(rule, ConcurrencyRule) or (isinstance(rule, str) and rule in self.rules)

    def _parts(self, rule: Any, cost: int) -> tuple[Any, int, Rates | None]:
        """Find what the slot is of, and its cost, among several limits."""
        if not isinstance(rule, (tuple, list, Mapping)):
            return rule, cost, None
        held = [each for each in rule if self._holds(each)]
        if len(held) != 1:
            raise InvalidRequest(
                f"a slot is of one ConcurrencyRule, and this names {len(held) or 'none'}; "
                f"{'nest a block for each of them' if held else 'limiter.limit(...) guards a block by other rules'}"
            )
        others = [each for each in rule if each is not held[0]]
        if isinstance(rule, Mapping):
            if cost != 1:
                raise InvalidRequest("cost is given beside a mapping, which has the cost of each rule; leave cost out")
            return held[0], rule[held[0]], Rates({each: rule[each] for each in others}, 1) if others else None
        return held[0], cost, Rates(tuple(others), cost) if others else None

    def _found(self, limiter: Limiter, rule: Any) -> ConcurrencyRule:
        """Find the rule that a call means; None: the only one."""
        if isinstance(rule, ConcurrencyRule):
            return rule
        if rule is None:
            if len(self.rules) == 1:
                return next(iter(self.rules.values()))
            if self.rules:
                raise InvalidRequest(f"the limiter has several concurrency rules; name one (rule=...): {listed(self.rules)}")
            raise InvalidRequest("the limiter has no concurrency rule yet; add one with add_rule(ConcurrencyRule(...))")
        if not isinstance(rule, str):
            raise InvalidRequest(f"rule is a {type(rule).__name__}; slots take the name (str) of a ConcurrencyRule, or one")
        found = self.rules.get(rule)
        if found is None and rule in limiter.rules:
            raise InvalidRequest(f"rule {rule!r} counts what is used in a time; slots take a ConcurrencyRule")
        if found is None:
            # The message doesn't repeat the name: if the arguments were swapped, it is a key.
            raise InvalidRequest(
                f"the limiter has no such concurrency rule; it has {listed(self.rules, rule) or 'none yet: add_rule(ConcurrencyRule(...))'}"
            )
        return found


class Slot:
    """What `limiter.slot(...)` returns: `async with` it, once.

    decision: what granted it. lost: an `asyncio.Event`, set when the slot isn't held any more although its block runs: this process
    was too slow to renew it, somebody has reset the key, or the limiter was closed. Others may hold it then.
    """

    __slots__ = ("_claim", "_decision", "_limiter", "_line", "_of", "_rates", "_stage")

    def __init__(self, of: Slots, limiter: Limiter, claim: Claim, rates: Rates | None) -> None:
        self._of = of
        self._limiter = limiter
        self._claim = claim
        self._rates = rates
        self._decision: Decision | None = None
        self._stage = BEFORE
        self._line: SlotLine | None = None

    @property
    def decision(self) -> Decision:
        """The decision that granted it. `remaining` is how many units were free after that.

        With other limits `parts` has one for each, that on the slot first.
        """
        self._taken()
        return cast(Decision, self._decision)

    @property
    def lost(self) -> asyncio.Event:
        """Set when the slot isn't held any more although its block runs."""
        return self._taken().lost

    async def release(self) -> None:
        """Give the slot back before the block ends. On Redis it waits until Redis has it, the storage's deadline at most.

        Raises InvalidRequest before the block, if it was given back already, and in another event loop than the one that took it.
        """
        self._taken()
        if self._stage == AFTER:
            raise InvalidRequest("the slot was given back already; release it once")
        waits = self._leave()
        if waits is not None:
            await waits

    def __call__(self, *_: object) -> NoReturn:
        """Refuse to decorate. Raises TypeError, which says what to write."""
        raise TypeError(
            "a slot decorates nothing: write `async with limiter.slot(...):` in the function (limiter.limit decorates, for rates)"
        )

    async def __aenter__(self) -> Self:
        if self._stage != BEFORE:
            raise InvalidRequest("a slot is entered once; call limiter.slot(...) for each block")
        self._stage = ENTERING
        line = await self._of.take(self._limiter, self._claim)
        rates = None if self._rates is None else await self._acquire(line, *self._rates)
        # It may be lost before its block begins, as other limits were waited for, or this task for its turn. Another one is taken then,
        # within what is left of the timeout. What the other limits have granted is for that one. It stays consumed if none is free.
        while self._claim.lost.is_set():
            self._claim = self._claim.again(line.of.loop.now())
            line = await self._of.take(self._limiter, self._claim)
        slot = cast(SlotDecision, self._claim.outcome)
        self._decision = slot if rates is None else held_with(slot, rates)
        self._line = line
        self._stage = WITHIN
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._stage == WITHIN:
            waits = self._leave()
            # A coroutine that is closed can't wait any more. What was begun goes on.
            if waits is not None and not isinstance(error, GeneratorExit):
                await waits

    def __repr__(self) -> str:
        # Without the key, as everywhere.
        stage = ("not held yet", "not held yet", "held", "given back")[self._stage]
        return f"<Slot rule={self._claim.rule.name!r} cost={self._claim.cost} {stage}>"

    async def _acquire(self, line: SlotLine, rules: Any, cost: int) -> Decision:
        """Check the other limits, within what is left of the timeout. The slot is given back if they deny."""
        claim = self._claim
        left_s = claim.left_s(line.of.loop.now())
        try:
            return await self._limiter._lines.acquire(
                cast(Any, self._limiter), claim.entry.key, rules, cost, None if left_s == inf else left_s
            )
        except RateLimitExceeded:
            waits = line.leave(claim)
            if waits is not None:
                await waits
            raise
        except BaseException:
            line.leave(claim)
            raise

    def _taken(self) -> Claim:
        if self._line is None:
            raise InvalidRequest("the slot isn't held yet: write `async with limiter.slot(...) as slot:`")
        return self._claim

    def _leave(self) -> Future | None:
        """Give it back. Returns what to wait on."""
        line = cast(SlotLine, self._line)
        if line.of.process != os.getpid():  # the process that forked this one holds it
            self._stage = AFTER
            return None
        with suppress(RuntimeError):  # none runs: somebody closes the coroutine
            if loop_here() is not line.of.found:
                raise InvalidRequest("the slot was taken in another event loop; give it back in that one")
        self._stage = AFTER
        return line.leave(self._claim)


def _holding(storage: Any) -> HoldsSlots:
    """Find out whether a storage has slots. Raises ConfigurationError."""
    if not hasattr(storage, "hold"):
        raise ConfigurationError(f"{type(storage).__name__} has no slots; hold them in memory, by a limiter with InMemoryStorage")
    return cast(HoldsSlots, storage)
