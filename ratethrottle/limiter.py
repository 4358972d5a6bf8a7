"""The limiter: `RateThrottleCore`, and `create_limiter`, which makes one with its storage.

`check` itself is compiled; it stands in `_core.pyx`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType, TracebackType
from typing import Any, Final, Self, overload

from anyio.lowlevel import checkpoint

from ratethrottle._core import Limiter, compiled_check
from ratethrottle._engine.decision import Decision, Entry
from ratethrottle._engine.joint import Joint
from ratethrottle._patching import Patchable
from ratethrottle._several import SeveralRules
from ratethrottle.errors import ConfigurationError, InvalidRequest, LimiterClosed, few, listed, more, shown
from ratethrottle.events import Callback
from ratethrottle.options import OPTIONS
from ratethrottle.rule import ConcurrencyRule, Costs, OneRule, RateThrottleRule, Rules
from ratethrottle.storage import Outcomes, Statistics, Storage
from ratethrottle.storage.memory import InMemoryStorage
from ratethrottle.storage.redis import RedisStorage
from ratethrottle.waiting.guard import Guard, KeyOfCall
from ratethrottle.waiting.lines import Lines
from ratethrottle.waiting.reservations import OnError, Reservation, Reservations
from ratethrottle.waiting.slots import Slot, Slots

Key = str | tuple[str | int, ...]
AnyRule = RateThrottleRule | ConcurrencyRule
SlotRules = str | ConcurrencyRule | Sequence[OneRule | ConcurrencyRule]

STORAGES: Final = ("memory", "redis")


@dataclass(frozen=True, slots=True)
class Request:
    """One check of `check_many` or `check_all`: a key, and the rule and the cost in units, as `check` takes them."""

    key: Key = field(repr=False)  # keys are addresses and accounts, and a repr ends up in logs
    rule: Rules | Costs | None = None
    cost: int = 1


class RateThrottleCore(Patchable, Limiter):
    """Decides who may do what now. Keeps its state in `storage` (default: `InMemoryStorage`).

    Use it from any number of tasks. `async with` is optional: it connects, waits for that up to `connect_timeout`, and closes the
    limiter at its end. Without it, nothing connects before the first check.
    A storage that was passed in is closed too, but never the Redis client that the storage was made from.

    require_storage: with True `async with` raises StorageError when the storage doesn't answer, under each outage policy; the
    limiter isn't closed by that, so that it can be entered again.

    Raises ConfigurationError.
    """

    # Without an instance dict the interpreter finds `check` without looking there first; see `Patchable`.
    __slots__ = ("__weakref__", "_by_name", "_by_several", "_lines", "_require_storage", "_reservations", "_slots")

    def __init__(self, storage: Storage | None = None, *, rules: Iterable[AnyRule] = (), require_storage: bool = False) -> None:
        if storage is None:
            storage = InMemoryStorage()
        elif isinstance(storage, type) or not hasattr(storage, "decide"):
            # Never its repr: a URL or a client shows its password there.
            what = f"the class {storage.__name__}" if isinstance(storage, type) else f"a {type(storage).__name__}"
            raise ConfigurationError(f"storage is {what}; pass InMemoryStorage(...) or RedisStorage(client)")
        if not isinstance(require_storage, bool):
            raise ConfigurationError(f"require_storage is {shown(require_storage)}; it is True or False")
        super().__init__(storage)
        self._several = self._by_several = SeveralRules(self._rules, storage)
        self._require_storage = require_storage
        self._reservations = Reservations()
        self._slots = Slots()
        self._by_several.held = self._slots.rules
        self._by_name: dict[str, AnyRule] = {}
        self._lines = Lines()
        if isinstance(rules, (RateThrottleRule, ConcurrencyRule, str)) or not isinstance(rules, Iterable):
            raise ConfigurationError(f"rules is a {type(rules).__name__}; it is an iterable of rules, such as [rule]")
        for rule in rules:
            self.add_rule(rule)

    @property
    def rules(self) -> Mapping[str, AnyRule]:
        """The rules by name; a live view that can't be written to."""
        return MappingProxyType(self._by_name)

    def add_rule(self, rule: AnyRule, *, replace: bool = False) -> None:
        """Take a rule up from the next check on. Adding an equal rule again does nothing.

        replace: let it take the place of another rule of its name; what was used is carried over.
        Raises ConfigurationError if another rule of this name is there and `replace` is not given.
        """
        if not isinstance(rule, (RateThrottleRule, ConcurrencyRule)):
            raise ConfigurationError(
                f"add_rule takes a RateThrottleRule or a ConcurrencyRule, not a {type(rule).__name__}{_rule_advice(rule)}"
            )
        known = self._by_name.get(rule.name)
        if known == rule:
            return
        if known is not None and not replace:
            raise ConfigurationError(f"there is another rule {rule.name!r} already; pass replace=True to change it")
        if known is not None and isinstance(known, ConcurrencyRule) != isinstance(rule, ConcurrencyRule):
            self.remove_rule(known.name)
        self._by_name[rule.name] = rule
        if isinstance(rule, ConcurrencyRule):
            self._slots.add(self, rule)
        else:
            self._install(rule.compiled)

    def remove_rule(self, name: str) -> None:
        """Drop a rule. What was used under it stays in the storage until it expires.

        Raises ConfigurationError if there is no rule of this name.
        """
        if not isinstance(name, str):
            raise ConfigurationError(f"remove_rule takes the name (str) of a rule, not a {type(name).__name__}")
        if name not in self._by_name:
            raise ConfigurationError(f"there is no rule {shown(name)}; there are {listed(self._by_name, name) or 'none'}")
        if isinstance(self._by_name.pop(name), ConcurrencyRule):
            self._slots.drop(name)
        else:
            self._uninstall(name)

    @overload
    async def check(self, key: Key, rule: Rules | None = None, *, cost: int = 1) -> Decision: ...
    @overload
    async def check(self, key: Key, rule: Costs) -> Decision: ...
    @compiled_check
    async def check(self, key: Key, rule: Rules | Costs | None = None, *, cost: int = 1) -> Decision:
        """Decide whether `key` may use `cost` units under `rule` now, and consume them if so. Await the result.

        rule: the name of one, or a `RateThrottleRule`, which need not have been added; None: the only one. Several make a joint
        decision: all of them grant it, or nothing is consumed. They are a tuple or list, or a mapping of each to its own cost.
        `FirstOf(...)` stands for several of which the first that allows pays. At most 16 in all. `decision.parts` has a decision for
        each limit, and the decision itself reports the one that binds.

        It never waits for capacity: a denial is a `Decision` that is false. In memory the call itself decides and consumes, as it
        does by a lease or by what Redis said last. Redis decides once the check is awaited. A check that is cancelled before it
        was sent consumes nothing; after that it may have consumed.

        On Redis it is decided within the storage's `deadline`; a crowd of checks that start together shares one. What a process asks
        faster than it is answered is overload: `max_waiting` checks wait already, or Redis answers others but not this one in time.
        It is denied with `source="overload"`, which says nothing of the limit; with `on_overload="raise"` it raises.

        Raises `InvalidRequest` at once for a bad key, rule or cost (`CostExceedsLimit` above the rule's capacity),
        `LimiterClosed` after `aclose`; when awaited, a `StorageError` if the storage can't answer within its deadline.
        """
        raise NotImplementedError  # never run: `_core.pyx` holds what is called

    async def check_all(self, requests: Iterable[Key | Request]) -> Decision:
        """Decide on several keys at once: all of them are granted, or nothing is consumed. At most 16, counting each rule of each.

        `decision.parts` has a decision for each, and the decision itself reports the one that binds. Raises what `check` raises, also
        for the same key under the same rule twice.
        """
        return await self._check_joint(self._by_several.together(map(_asked, self._requests("check_all", requests))))

    async def check_many(self, requests: Iterable[Key | Request]) -> list[Decision]:
        """Decide several checks in order; each consumes on its own. Returns their decisions in order.

        All of them are validated before the first is decided, and all share one deadline: of a crowd that is too large for it the
        rest is denied with `source="overload"`, as `check` says.

        Raises what `check` raises, the first error in place of all decisions. With `StateUnreadable` only the checks of such keys
        consumed nothing; the others were decided and stay consumed. With `StorageUnavailable` and other errors of the storage, what
        was decided before stays consumed, and what was sent may have been.
        """
        renewals = self._by_several.renewals
        entries = [self._entry_of(*_asked(request)) for request in self._requests("check_many", requests)]
        # If rules changed meanwhile, these don't say what stands in the first entries.
        if not (self._uncounted or self._by_several.uncounted) and renewals == self._by_several.renewals:
            return await self._storage.decide(entries) if entries else []
        asked = [entry for entry in entries if entry.counted]
        if not asked:
            await checkpoint()
        decided = iter(await self._storage.decide(asked) if asked else [])
        return [next(decided) if entry.counted else self._by_several.decide_here(entry, checks=True) for entry in entries]

    @overload
    async def peek(self, key: Key, rule: Rules | None = None, *, cost: int = 1) -> Decision: ...
    @overload
    async def peek(self, key: Key, rule: Costs) -> Decision: ...
    async def peek(self, key: Key, rule: Rules | Costs | None = None, *, cost: int = 1) -> Decision:
        """Say what `check` would decide now, and consume nothing. `remaining` is what is left now. Raises what `check` raises.

        With a cost of 0 it only asks, and is always allowed. Of a FirstOf it then reports the rule that would pay for one unit.
        """
        entry = self._entry_of(key, rule, cost, 0)
        if not entry.counted:
            await checkpoint()
            return self._by_several.decide_here(entry, checks=False)
        decision: Decision = await self._storage.peek(entry if entry.cost else entry.costing(1))
        return decision if entry.cost else entry.asked(decision)

    async def reset(self, key: Key, rule: Rules | SlotRules | None = None) -> None:
        """Forget what the key has used under the rule, or under each of several, one after the other. Raises what `check` raises.

        Of a ConcurrencyRule it takes all slots of the key from their holders: `slot.lost` is set for them. Such rules may stand among
        several. rule: None is the only one that counts, or the only ConcurrencyRule if there are no others.
        """
        if self._closed:
            raise LimiterClosed
        slots, others = self._slots.resets(self, key, rule)
        entries = self._by_several.entries(key, others) if others or not slots else ()
        for slot_rule, entry in slots:
            await self._slots.reset(self, slot_rule, entry)
        for entry in entries:
            await self._storage.reset(entry)
        if entries:
            self._lines.came_back(key)

    @overload
    async def charge(self, key: Key, rule: Rules | None = None, *, cost: int = 1) -> Decision: ...
    @overload
    async def charge(self, key: Key, rule: Costs) -> Decision: ...
    async def charge(self, key: Key, rule: Rules | Costs | None = None, *, cost: int = 1) -> Decision:
        """Count `cost` units that were used without asking. It is never refused, and may take the key into debt.

        A debt is at most one capacity; what goes beyond that isn't counted. The decision is allowed: `over` says whether the key is
        in debt now, and `retry_after` for how long. rule: also several, or a mapping of rules to costs, but no FirstOf. A rule that
        only flags is charged like any other.

        Raises what `check` raises, but costs may be above the capacity.
        """
        if self._closed:
            raise LimiterClosed
        charge = self._by_several.charging(key, rule, cost)
        if charge.counted:
            decision: Decision = await self._storage.charge(charge)
            return decision
        await checkpoint()
        return self._by_several.decide_here(charge, checks=True)

    @overload
    def reserve(
        self, key: Key, rule: Rules | None = None, *, cost: int = 1, timeout: float | None = 0, on_error: OnError = "keep"
    ) -> Reservation: ...
    @overload
    def reserve(self, key: Key, rule: Costs, *, timeout: float | None = 0, on_error: OnError = "keep") -> Reservation: ...
    def reserve(
        self,
        key: Key,
        rule: Rules | Costs | None = None,
        *,
        cost: int = 1,
        timeout: float | None = 0,
        on_error: OnError = "keep",
    ) -> Reservation:
        """Take an estimate before a block, and settle by what was used: `async with limiter.reserve(...) as r: ...; r.settle(used)`.

        It acquires as `acquire` does, with the same arguments; `r.decision` is the decision. `r.settle(used)` says how many units
        were used, at most twice the capacity. When the block ends, the difference is charged or given back. What comes back is less
        the older it is, as the limit would have let it go by then.

        Without `settle` the estimate stays counted, which is warned of once for each place that calls `reserve`. So it does after a
        crash. on_error: what an exception does with an estimate that isn't settled: "keep" or "refund".

        Raises `InvalidRequest` at once for a bad timeout or `on_error`; in `async with` what `acquire` raises.
        """
        return self._reservations.make(self, (key, rule, cost, timeout), on_error)

    async def acquire(
        self, key: Key, rule: Rules | Costs | None = None, *, cost: int = 1, timeout: float | None = None
    ) -> Decision:
        """Wait until `key` may use `cost` units under `rule`, and consume them. Returns the decision, which is allowed.

        It takes a key, a rule or several, and a cost as `check` does.
        timeout: seconds to wait at most, from 0; None waits as long as needed. 0 asks once, as `check` does.

        In each event loop the callers of a key and rule are served in the order in which they came, large requests too; on a bucket
        those of all processes are. A `check` doesn't stand in line: on a window it may be served before them, and on a bucket it is
        denied what they have booked. A caller that is cancelled, or out of time, leaves the line; a grant that has come at that very
        moment goes to the next one that asks for the same. If there is none, it stays consumed on a window, and on a bucket if
        others have booked behind it.

        Raises `RateLimitExceeded` as soon as it is known that the time is too short, and if the request can never be granted; its
        decision has the source "overload" if no answer came within the timeout. Raises `InvalidRequest` at once for a bad key, rule,
        cost or timeout, `LimiterClosed` also if the limiter is closed meanwhile, and what `check` raises when it is awaited.
        """
        return await self._lines.acquire(self, key, rule, cost, timeout)

    def limit(
        self, key: Key | KeyOfCall, rule: Rules | Costs | None = None, *, cost: int = 1, timeout: float | None = 0
    ) -> Guard:
        """Guard a block, or each call of a function: `async with limiter.limit(...) as decision:`, or `@limiter.limit(...)`.

        It acquires as `acquire` does, with the same arguments, each time that the block is entered or the function is called. It
        decorates async functions, async methods, and async generator functions, which acquire when iteration begins.
        key: for a decorator also a function, sync or async, that makes the key from the arguments of the call.

        Raises `InvalidRequest` for a bad timeout, TypeError when it decorates anything else, and otherwise what `acquire` raises.
        """
        return Guard(self, key, rule, cost, timeout)

    @overload
    def slot(self, key: Key, rule: SlotRules | None = None, *, cost: int = 1, timeout: float | None = 0) -> Slot: ...
    @overload
    def slot(self, key: Key, rule: Costs, *, timeout: float | None = 0) -> Slot: ...
    def slot(self, key: Key, rule: SlotRules | Costs | None = None, *, cost: int = 1, timeout: float | None = 0) -> Slot:
        """Hold a slot for as long as a block runs: `async with limiter.slot(...) as slot:`.

        rule: the name of a ConcurrencyRule, or one that need not have been added; None: the only one that was. cost: how many of its
        units the slot holds. timeout: seconds to wait for it at most, from 0; None waits as long as needed, and 0 asks once.

        In each event loop the callers of a key and rule are served in the order in which they came, large ones too; so are those of
        several loops, and processes. A caller that is cancelled, or out of time, leaves the line, and holds nothing.

        With other rules beside it, as a tuple or list, or a mapping of each to its own cost, the slot is taken first. Then the others
        are checked, or waited for within the timeout. If they deny, the slot is given back, and nothing of them is consumed. If it is
        lost meanwhile, another one is taken within the timeout; what the others have granted stays consumed if there is none.

        `slot.decision` says how many units were left. `await slot.release()` gives the slot back before the block ends. `slot.lost` is
        an asyncio.Event: it is set when the slot isn't held any more although its block runs, since this process was too slow to
        renew it, and others may hold it by then.

        Raises `InvalidRequest` at once for a bad key, rule, cost or timeout (`CostExceedsLimit` above the rule's limit),
        `ConfigurationError` if the storage has no slots, and `LimiterClosed` after `aclose`. In `async with` it raises
        `RateLimitExceeded` if no slot was free in time: its decision has no `retry_after`, as nobody knows when a holder ends. If it
        was another rule that denied, it is the decision of that one. It raises a `StorageError` there as `check` does.
        """
        return self._slots.make(self, key, rule, cost, timeout)

    def on_event(self, callback: Callback) -> Callable[[], None]:
        """Call `callback(event)` for each of `ratethrottle.events` from now on; returns a function that ends that.

        It is called in the thread of the event loop, after the fact, and must be quick. What it raises is logged. Of each kind
        it gets at most one a second (of some kinds fewer); `event.suppressed` counts those left out.
        Raises ConfigurationError for what can't be called, or is async.
        """
        remove: Callable[[], None] = self._storage.events.subscribe(callback)
        return remove

    def statistics(self) -> Statistics:
        """Count what the storage did and holds in this process, and what this limiter decided. Costs no I/O; also after `aclose`."""
        counted: Statistics = self._storage.statistics()
        decisions = {**self._counted(Outcomes), **self._slots.counted()}
        return replace(counted, slots=self._slots.held(self), decisions=decisions)

    async def aclose(self) -> None:
        """Close the limiter and its storage. Later calls raise LimiterClosed; closing again does nothing.

        What blocks of `reserve` have settled by then is counted, also if they still run.
        """
        if not self._closed:
            self._reservations.close()
            self._closed = True
            self._lines.close()
            await self._storage.aclose()

    async def __aenter__(self) -> Self:
        if self._closed:
            raise LimiterClosed
        await self._storage.open(self._require_storage)
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.aclose()

    def __repr__(self) -> str:
        rules = f"rules={few(self._by_name)}{more(self._by_name)}"
        return f"<RateThrottleCore {type(self._storage).__name__} {rules}{' closed' if self._closed else ''}>"

    def _requests(self, method: str, requests: Iterable[Key | Request]) -> Iterable[Key | Request]:
        if self._closed:
            raise LimiterClosed
        if isinstance(requests, (str, Request)) or not isinstance(requests, Iterable):
            raise InvalidRequest(
                f"{method} takes an iterable of keys or Requests, not a {type(requests).__name__}; for one there is check(key)"
            )
        return requests

    def _entry_of(self, key: Key, rule: Rules | Costs | None = None, cost: int = 1, least: int = 1) -> Entry | Joint:
        """Validate a check; `least` is the lowest cost. Raises InvalidRequest, CostExceedsLimit or LimiterClosed."""
        if rule is None or isinstance(rule, str):
            return self._entry(key, rule, cost, least)
        if self._closed:
            raise LimiterClosed
        return self._by_several.entry(key, rule, cost, least)


def _asked(request: Key | Request) -> tuple[Key, Rules | Costs | None, int]:
    return (request.key, request.rule, request.cost) if isinstance(request, Request) else (request, None, 1)


def create_limiter(
    storage: str = "memory",
    *,
    redis_url: str | None = None,
    rules: Iterable[AnyRule] = (),
    require_storage: bool = False,
    **options: Any,
) -> RateThrottleCore:
    """Make a limiter with a storage of its own: "memory" (this process) or "redis" (all servers, at `redis_url`).

    | option | of | default | unit | range |
    |---|---|---|---|---|
    | max_keys | memory | 1,000,000 | keys | 1 to 10^9 |
    | on_full | memory | "evict" | | "evict" or "deny" |
    | prefix | redis | "ratethrottle" | | 1 to 64 characters without spaces and braces |
    | deadline | redis | 0.25 | seconds | 0.005 to 60 |
    | connect_timeout | redis | None | seconds | 0.005 to 60; None: 5, or the client's socket_connect_timeout if longer |
    | tags | redis | 64 | hash tags | 1 to 16,384 |
    | tag_parts | redis | None | parts of a tuple key that decide its tag | 1 to 64, or None |
    | connections | redis | 1 | connections | 1 to 8 |
    | max_waiting | redis | 100,000 | checks | 1 to 1,000,000 |
    | prefilter_ttl | redis | 1.0 | seconds | 0 to 60 |
    | max_bounds | redis | 100,000 | keys | 1 to 10^8 |
    | max_connections | redis | 8 | connections | 1 to 64 |
    | on_outage | redis | "local" | | "local", "allow", "deny" or "raise" |
    | expected_processes | redis | None | processes | 1 to 100,000, or None |
    | on_overload | redis | "deny" | | "deny" or "raise" |
    | sentinels | redis | None | addresses | 1 to 32 of (host, port) or "host:port" |
    | master_name | redis | None | | what the sentinels call the master; with sentinels only |

    With `sentinels` a `redis_url` may be left out, or says how to reach the data nodes: redis://user:password@/db, without a host.
    require_storage: as in RateThrottleCore. Nothing connects here. Raises ConfigurationError, for an unknown option too.
    """
    if storage not in STORAGES:
        raise ConfigurationError(_wrong_storage(storage))
    for name in options:
        if name == "clock_us":
            raise ConfigurationError(
                "clock_us is no option here; write RateThrottleCore(InMemoryStorage(clock_us=...), rules=...)"
            )
        if name not in OPTIONS:
            near = difflib.get_close_matches(name, [*OPTIONS, "redis_url", "rules", "require_storage"], 1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(OPTIONS)}"
            raise ConfigurationError(f"there is no option {shown(name)}; {hint}")
        if OPTIONS[name][0] != storage:
            raise ConfigurationError(f'option {name!r} belongs to storage="{OPTIONS[name][0]}", not to "{storage}"')
    if storage == "memory":
        if redis_url is not None:
            raise ConfigurationError('redis_url was given, but the storage is "memory"; pass storage="redis" too')
        return RateThrottleCore(InMemoryStorage(**options), rules=rules, require_storage=require_storage)
    if redis_url is None and "sentinels" not in options and "master_name" not in options:
        raise ConfigurationError(
            'storage="redis" needs redis_url, such as "redis://localhost:6379/0", or sentinels and master_name'
        )
    return RateThrottleCore(RedisStorage.from_url(redis_url, **options), rules=rules, require_storage=require_storage)


def _rule_advice(given: object) -> str:
    """Say what to do with what isn't a rule."""
    if isinstance(given, str):
        return '; write RateThrottleRule.parse("name", "10/s")'
    return "; add its rules one by one" if isinstance(given, Iterable) else ""


def _wrong_storage(storage: object) -> str:
    choice = '"memory" or "redis"'
    if not isinstance(storage, str):
        return f"storage is a {type(storage).__name__}; it is {choice} (a storage of your own goes to RateThrottleCore)"
    if "://" in storage:  # not shown: it may hold a password
        return f'storage is a URL; it is {choice}: write storage="redis", redis_url=...'
    near = difflib.get_close_matches(storage.lower(), STORAGES, 1)
    return f"storage is {shown(storage)}; {f'did you mean {near[0]!r}? ' if near else ''}it is {choice}"
