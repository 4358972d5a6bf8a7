"""The types of the public names, as a caller meets them. mypy fails on a line that isn't so."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, Literal, assert_type

from ratethrottle import (
    Decision,
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
    pending = limiter.check("key")
    _ = assert_type(pending, Coroutine[Any, Any, Decision])
    assert_type(await pending, Decision)
    assert_type(await limiter.check(("user", 42), "rule", cost=2), Decision)
    assert_type(await limiter.check_many(["key", ("user", 1), Request("key", cost=2)]), list[Decision])
    assert_type(await limiter.peek("key"), Decision)
    assert_type(await limiter.reset("key"), None)
    assert_type(await asyncio.create_task(limiter.check("key")), Decision)
    assert_type(await asyncio.wait_for(limiter.check("key"), 1), Decision)
    assert_type(await asyncio.gather(limiter.check("a"), limiter.check("b")), tuple[Decision, Decision])
    assert_type(limiter.rules, Mapping[str, RateThrottleRule])
    async with limiter as opened:
        assert_type(opened, RateThrottleCore)


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
    assert_type(limiter.statistics().breaker, Literal["closed", "open", "half_open"])
    create_limiter("redis", redis_url="redis://a", require_storage=True, on_outage="deny")


def outages() -> None:
    """What a rule does while its storage can't answer is one of four words, or left to the storage."""
    rule = RateThrottleRule("rule", 10, 1, on_outage="deny")
    assert_type(rule.on_outage, Literal["local", "allow", "deny", "raise"] | None)
    RateThrottleRule("rule", 10, 1, on_outage="ignore")  # type: ignore[arg-type]  # none of the four
