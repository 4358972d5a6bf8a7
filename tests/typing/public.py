"""The types of the public names, as a caller meets them. mypy and pyright fail on a line that isn't so."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Mapping
from typing import Any, Literal, Protocol, assert_type

from ratethrottle import (
    ConcurrencyRule,
    Decision,
    FirstOf,
    InMemoryStorage,
    RateLimitExceeded,
    RateThrottleCore,
    RateThrottleRule,
    RedisStorage,
    Request,
    Statistics,
    create_limiter,
    events,
)


async def calls(limiter: RateThrottleCore) -> None:
    """Every call and what it gives."""
    pending: Coroutine[Any, Any, Decision] = limiter.check("key")
    assert_type(await pending, Decision)
    assert_type(await limiter.check(("user", 42), "rule", cost=2), Decision)
    assert_type(await limiter.check_many(["key", ("user", 1), Request("key", cost=2)]), list[Decision])
    assert_type(await limiter.peek("key"), Decision)
    assert_type(await limiter.reset("key"), None)
    assert_type(await asyncio.create_task(limiter.check("key")), Decision)
    assert_type(await asyncio.wait_for(limiter.check("key"), 1), Decision)
    assert_type(await asyncio.gather(limiter.check("a"), limiter.check("b")), tuple[Decision, Decision])
    assert_type(limiter.rules, Mapping[str, RateThrottleRule | ConcurrencyRule])
    async with limiter as opened:
        assert_type(opened, RateThrottleCore)


async def reservations(limiter: RateThrottleCore) -> None:
    """What is counted afterwards."""
    plan = RateThrottleRule("plan", 10, 1)
    assert_type(await limiter.charge("key", cost=3), Decision)
    assert_type(await limiter.charge(("user", 42), {"requests": 1, "tokens": 5}), Decision)
    assert_type(await limiter.charge("key", ("requests", plan)), Decision)
    assert_type((await limiter.charge("key", [plan])).over, bool)
    async with limiter.reserve("key", FirstOf("included", "credits"), cost=2, timeout=1.5, on_error="refund") as reservation:
        assert_type(reservation.decision, Decision)
        assert_type(reservation.settle(5), None)
        reservation.settle({"tokens": 5, plan: 3})
        reservation.settle("five")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    async with limiter.reserve("key", {"requests": 1, "tokens": 5}, timeout=None) as reservation:
        reservation.settle({"tokens": 5})
    await limiter.charge("key", {"requests": 1}, cost=2)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue, reportArgumentType]
    limiter.reserve("key", on_error="ignore")  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue, reportArgumentType]


async def slots(limiter: RateThrottleCore) -> None:
    """What is held."""
    rule = ConcurrencyRule("exports", limit=5, ttl=1.5, on_outage="deny")
    limiter.add_rule(rule)
    RateThrottleCore(rules=[rule, RateThrottleRule("api", 1, 1)])
    async with limiter.slot(("org", 3), "exports", cost=2, timeout=1.5) as slot:
        assert_type(slot.decision, Decision)
        assert_type(slot.lost, asyncio.Event)
        assert_type(await slot.release(), None)
    async with limiter.slot("key", rule, timeout=None):
        assert_type(await limiter.reset("key", rule), None)
    async with limiter.slot("key", (rule, "per_minute", FirstOf("a", "b")), cost=2) as slot:
        assert_type(slot.decision.parts, tuple[Decision, ...])
    limiter.slot("key", {rule: 2, "per_minute": 1}, timeout=1)
    limiter.slot("key", {rule: 2}, cost=1)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue, reportArgumentType]
    limiter.slot("key", RateThrottleRule("api", 1, 1))  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue, reportArgumentType]


async def several(limiter: RateThrottleCore, names: list[str], costs: dict[str, int]) -> None:
    """Every form that names limits."""
    plan = RateThrottleRule("plan", 500, 60)
    assert_type(await limiter.check("key", plan), Decision)
    assert_type(await limiter.check("key", ("per_second", "per_day"), cost=2), Decision)
    assert_type(await limiter.check("key", ["per_second", plan, FirstOf("included", plan)]), Decision)
    assert_type(await limiter.check("key", names), Decision)
    assert_type(await limiter.check("key", {"requests": 1, "tokens": 1200}), Decision)
    assert_type(await limiter.check("key", costs), Decision)
    assert_type(await limiter.check("key", {plan: 1, "tokens": 1200, FirstOf("a", "b"): 2}), Decision)
    assert_type(await limiter.check("key", FirstOf("included", "credits")), Decision)
    assert_type(await limiter.check_all([Request("user:7", "user"), Request(("org", 3), ("org", plan), 5), "key"]), Decision)
    assert_type(await limiter.check_many([Request("key", {"requests": 1})]), list[Decision])
    assert_type(await limiter.peek("key", costs), Decision)
    assert_type(await limiter.peek("key", ("per_second", plan), cost=0), Decision)
    assert_type(await limiter.reset("key", names), None)
    assert_type((await limiter.check("key", names)).parts, tuple[Decision, ...])
    await limiter.check("key", costs, cost=2)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue, reportArgumentType]
    await limiter.check("key", {"per_second", "per_day"})  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue, reportArgumentType]
    limiter.check("key", 5)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue, reportArgumentType]
    FirstOf("included", 5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


async def waiting(limiter: RateThrottleCore, costs: dict[str, int]) -> None:
    """Waiting for capacity, and blocks that are entered once it is there."""
    assert_type(await limiter.acquire("key"), Decision)
    assert_type(await limiter.acquire(("user", 42), "rule", cost=2, timeout=1.5), Decision)
    assert_type(await limiter.acquire("key", costs, timeout=None), Decision)
    assert_type(await limiter.acquire("key", ("per_second", FirstOf("a", "b")), timeout=0), Decision)
    async with limiter.limit("key", "rule", cost=2, timeout=None) as decision:
        assert_type(decision, Decision)
    async with limiter.limit(("user", 42), costs):
        pass
    await limiter.acquire("key", timeout="5")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


LIMITER = create_limiter()


@LIMITER.limit("key", "rule", timeout=5)
async def fetched(url: str, *, tries: int = 3) -> bytes:
    """Stay what it is: its parameters and its result."""
    return url.encode() * tries


def by_size(most: int) -> str:
    """Make a key, at once."""
    return f"size:{most}"


@LIMITER.limit(by_size)
async def counted(most: int) -> AsyncIterator[int]:
    """Be a generator that is read only."""
    yield most


@LIMITER.limit(("user", 42))
async def echoed(first: str) -> AsyncGenerator[str, int]:
    """Be a generator that things are sent to."""
    sent = yield first
    yield str(sent)


async def key_of(service: Service, number: int) -> tuple[str, int]:
    """Make a key, later."""
    return service.name, number


class Service:
    """Methods of each kind."""

    name = "service"

    @LIMITER.limit(key_of, timeout=None)
    async def method(self, number: int) -> float:
        return number / 2

    @classmethod
    @LIMITER.limit("key")
    async def of_class(cls, number: int) -> str:
        return cls.name * number

    @staticmethod
    @LIMITER.limit("key")
    async def static(number: int) -> list[int]:
        return [number]

    @LIMITER.limit("key")
    async def numbers(self, most: int) -> AsyncIterator[int]:
        yield most


async def decorated(service: Service) -> None:
    """Call what was decorated as what it was."""
    assert_type(await fetched("url", tries=2), bytes)
    assert_type([number async for number in counted(3)], list[int])
    assert_type(await echoed("first").asend(5), str)
    assert_type(await service.method(5), float)
    assert_type(await Service.of_class(5), str)
    assert_type(await service.static(5), list[int])
    assert_type([number async for number in service.numbers(3)], list[int])
    await fetched(5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await service.method("5")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await Service.of_class()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


def sync(number: int) -> int:
    """Be what can't wait."""
    return number


LIMITER.limit("key")(sync)  # type: ignore[type-var]  # pyright: ignore[reportArgumentType]


class Checks(Protocol):
    """What an application's own code may ask of a limiter, so that a test can pass something else."""

    async def check(self, key: str, rule: str | None = None, *, cost: int = 1) -> Decision: ...


class Asks(Protocol):
    """A part of it."""

    async def check(self, key: str) -> Decision: ...

    async def peek(self, key: str, rule: str | None = None, *, cost: int = 1) -> Decision: ...


async def guarded(limiter: Checks, other: Asks) -> Decision:
    """Know nothing but the protocols."""
    assert_type(await other.peek("key"), Decision)
    return await limiter.check("key", cost=2)


async def protocols(limiter: RateThrottleCore) -> None:
    """A limiter is what a protocol with an `async def check` asks for."""
    checks: Checks = create_limiter()
    assert_type(await guarded(limiter, limiter), Decision)
    assert_type(await guarded(checks, limiter), Decision)


def facts(decision: Decision) -> None:
    """Every attribute of a decision."""
    assert_type(decision.allowed, bool)
    assert_type(decision.key, str | tuple[str | int, ...])
    assert_type(decision.rule, str)
    assert_type(decision.remaining, int)
    assert_type(decision.retry_after, float)
    assert_type(decision.retry_after_us, int)
    assert_type(decision.headers(), dict[str, str])
    assert_type(RateLimitExceeded(decision).decision, Decision)


def makers(client: object) -> None:
    """Everything that makes a limiter."""
    assert_type(create_limiter(rules=[RateThrottleRule.parse("rule", "10/s")], max_keys=5), RateThrottleCore)
    assert_type(RateThrottleCore(RedisStorage(client)), RateThrottleCore)
    assert_type(RateThrottleCore(InMemoryStorage(on_full="deny")), RateThrottleCore)


def watched(limiter: RateThrottleCore) -> None:
    """What an operator reads."""

    def heard(event: events.Event) -> None:
        assert_type(event.kind, str)
        assert_type(event.at, float)
        assert_type(event.message, str)
        if isinstance(event, events.OutageEnded):
            assert_type(event.seconds, float)

    assert_type(limiter.on_event(heard), Callable[[], None])
    limiter.on_event(print)
    assert_type(limiter.statistics(), Statistics)
    assert_type(limiter.statistics().decisions["rule"]["redis"].allowed, int)
    assert_type(limiter.statistics().breaker, Literal["closed", "open", "half_open"])
    create_limiter("redis", redis_url="redis://a", require_storage=True, on_outage="deny")


def outages() -> None:
    """What a rule does while its storage can't answer is one of four words, or left to the storage."""
    rule = RateThrottleRule("rule", 10, 1, on_outage="deny")
    assert_type(rule.on_outage, Literal["local", "allow", "deny", "raise"] | None)
    assert_type(RateThrottleRule.parse_many("rule", "10/s;1000/d"), tuple[RateThrottleRule, ...])
    RateThrottleRule("rule", 10, 1, on_outage="ignore")  # type: ignore[arg-type]  # none of the four
