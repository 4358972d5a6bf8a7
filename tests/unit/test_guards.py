"""Blocks and functions behind `limiter.limit(...)`: when they run, when they raise, and what they stay to those that inspect them."""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any
from unittest.mock import AsyncMock, patch

import pytest

from ratethrottle import InvalidRequest, RateLimitExceeded, RateThrottleCore, RateThrottleRule
from tests.kit.timeless import limiter, run, timeless

RULE = RateThrottleRule("api", 2, 60, strategy="fixed_window")
BUCKET = RateThrottleRule("api", 2, 2, strategy="token_bucket")


async def left(core: RateThrottleCore, key: Any = "key") -> int:
    return (await core.peek(key, "api")).remaining


# Blocks


async def test_a_block_runs_if_it_is_granted_and_gets_the_decision() -> None:
    core = RateThrottleCore(rules=[RULE])
    async with core.limit("key", "api", cost=2) as decision:
        assert (decision.allowed, decision.cost, decision.remaining) == (True, 2, 0)
    with pytest.raises(RateLimitExceeded) as caught:
        async with core.limit("key"):
            pytest.fail("it was not granted")
    assert caught.value.decision.rule == "api"


def test_each_use_of_a_guard_decides_afresh_also_at_the_same_time() -> None:
    async def main() -> None:
        core = limiter(BUCKET)
        guard = core.limit("key", timeout=10)
        inside = most = 0

        async def use() -> float:
            nonlocal inside, most
            async with guard as decision:
                inside += 1
                most = max(most, inside)
                await asyncio.sleep(5)
                inside -= 1
                assert decision.key == "key"
                return timeless().time() - 1000

        ended = await asyncio.gather(*(use() for _ in range(4)))
        assert ended == pytest.approx([5, 5, 6, 7], abs=0.01)
        assert most == 4
        async with guard, guard:
            pass

    run(main)


async def test_what_a_block_raises_passes_and_what_was_granted_stays_used() -> None:
    core = RateThrottleCore(rules=[RULE])
    with pytest.raises(KeyError):
        async with core.limit("key"):
            raise KeyError
    assert await left(core) == 1


async def test_a_block_has_no_arguments_for_a_key_that_is_a_function() -> None:
    core = RateThrottleCore(rules=[RULE])
    with pytest.raises(InvalidRequest, match="pass the key itself"):
        async with core.limit(lambda: "key"):
            pass
    with pytest.raises(InvalidRequest, match="a key is a str"):
        async with core.limit(5):  # type: ignore[arg-type]  # the test
            pass


async def test_a_guard_shows_no_key() -> None:
    guard = RateThrottleCore(rules=[RULE]).limit("secret", "api", cost=2, timeout=None)
    assert repr(guard) == "<Guard rule='api' cost=2 timeout=None>"


# Functions


async def test_each_call_of_a_function_decides_and_a_denied_one_does_not_run() -> None:
    core = RateThrottleCore(rules=[RULE])
    ran: list[int] = []

    @core.limit("key")
    async def work(number: int, *, double: bool = False) -> int:
        """Do it."""
        ran.append(number)
        return number * (2 if double else 1)

    assert await work(1) == 1
    assert await work(2, double=True) == 4
    denied = work(3)
    with pytest.raises(RateLimitExceeded):
        await denied
    assert ran == [1, 2]


async def test_a_function_stays_what_it_was_to_those_that_inspect_it() -> None:
    core = RateThrottleCore(rules=[RULE])

    async def work(number: int, *, double: bool = False) -> int:
        """Do it."""
        return number

    async def numbers(most: int) -> AsyncIterator[int]:
        """Count."""
        yield most

    guarded, generates = core.limit("key")(work), core.limit("key")(numbers)
    assert inspect.iscoroutinefunction(guarded)
    assert asyncio.iscoroutinefunction(guarded)
    assert inspect.isasyncgenfunction(generates)
    for one, other in ((guarded, work), (generates, numbers)):
        assert inspect.signature(one) == inspect.signature(other)
        assert (one.__name__, one.__qualname__, one.__doc__) == (other.__name__, other.__qualname__, other.__doc__)
        assert one.__wrapped__ is other  # type: ignore[attr-defined]  # `wraps` sets it
    with pytest.raises(TypeError, match="number"):
        await guarded()  # type: ignore[call-arg]  # the test


@pytest.mark.parametrize("is_async", [False, True])
async def test_the_key_can_be_made_from_the_arguments(is_async: bool) -> None:
    core = RateThrottleCore(rules=[RULE])

    def by_user(user: str, amount: int = 0) -> tuple[str, str]:
        return ("user", user)

    async def by_user_later(user: str, amount: int = 0) -> tuple[str, str]:
        await asyncio.sleep(0)
        return ("user", user)

    @core.limit(by_user_later if is_async else by_user, cost=2)
    async def pay(user: str, amount: int = 0) -> str:
        return user

    assert await pay("u1", amount=5) == "u1"
    assert await pay("u2") == "u2"
    with pytest.raises(RateLimitExceeded) as caught:
        await pay(user="u1")
    assert caught.value.decision.key == ("user", "u1")


async def test_a_key_function_that_fails_consumes_nothing() -> None:
    core = RateThrottleCore(rules=[RULE])

    def broken(user: str) -> str:
        if not user:
            raise KeyError(user)
        return ""

    @core.limit(broken)
    async def pay(user: str) -> None:
        pytest.fail("it was not granted")

    with pytest.raises(KeyError):
        await pay("")
    with pytest.raises(InvalidRequest, match="the key is empty"):
        await pay("u1")
    assert len(core._storage) == 0


class Service:
    """Methods of each kind, decorated in each order."""

    core = RateThrottleCore(rules=[RULE])

    def __init__(self, name: str) -> None:
        self.name = name

    @core.limit(lambda self, number: ("method", self.name))
    async def method(self, number: int) -> tuple[str, int]:
        return self.name, number

    @classmethod
    @core.limit("inner class")
    async def inner_class(cls, number: int) -> tuple[str, int]:
        return cls.__name__, number

    @core.limit(lambda cls, number: ("outer class", cls.__name__))
    @classmethod
    async def outer_class(cls, number: int) -> tuple[str, int]:
        return cls.__name__, number

    @staticmethod
    @core.limit("inner static")
    async def inner_static(number: int) -> tuple[str, int]:
        return "", number

    @core.limit(lambda number: "outer static")
    @staticmethod
    async def outer_static(number: int) -> tuple[str, int]:
        return "", number

    @core.limit(lambda self, most: ("numbers", self.name))
    async def numbers(self, most: int) -> AsyncIterator[int]:
        for number in range(most):
            yield number

    @property
    @core.limit("property")
    async def value(self) -> str:
        return self.name


async def test_methods_of_each_kind_work_in_each_order() -> None:
    Service.core.rules  # noqa: B018  # one limiter for all of them, with a key for each
    one, other = Service("one"), Service("other")
    assert inspect.iscoroutinefunction(one.method)
    for _ in range(2):
        assert await one.method(5) == ("one", 5)
        assert await one.inner_class(1) == await one.outer_class(1) == ("Service", 1)
        assert await Service.inner_static(2) == await one.outer_static(2) == ("", 2)
        assert [number async for number in one.numbers(3)] == [0, 1, 2]
        assert await one.value == "one"
    calls: list[Callable[[], Any]] = [
        lambda: one.method(5),
        lambda: Service.inner_class(1),
        lambda: Service.outer_class(1),
        lambda: Service.inner_static(1),
        lambda: Service.outer_static(1),
        lambda: anext(one.numbers(1)),
        lambda: one.value,
    ]
    for call in calls:
        with pytest.raises(RateLimitExceeded):
            await call()
    assert await other.method(5) == ("other", 5)


async def test_decorators_above_and_below_go_with_it() -> None:
    core = RateThrottleCore(rules=[RULE])

    def shout(function: Callable[[str], Any]) -> Callable[[str], Any]:
        @functools.wraps(function)
        async def shouted(word: str) -> str:
            return (await function(word)).upper()  # type: ignore[no-any-return]  # it is a str

        return shouted

    @shout
    @core.limit("outer")
    @core.limit("inner", cost=2)
    async def say(word: str) -> str:
        return word

    assert await say("hello") == "HELLO"
    with pytest.raises(RateLimitExceeded) as caught:
        await say("again")
    assert caught.value.decision.key == "inner"
    assert await left(core, "outer") == 0, "each decides on its own"
    assert await core.limit("partial")(functools.partial(say.__wrapped__.__wrapped__.__wrapped__, "part"))() == "part"


# Generators


async def test_a_generator_decides_when_iteration_begins() -> None:
    core = RateThrottleCore(rules=[RULE])

    @core.limit("key", cost=2)
    async def numbers(most: int) -> AsyncIterator[int]:
        for number in range(most):
            yield number

    first, second = numbers(3), numbers(3)
    assert await left(core) == 2
    assert await anext(first) == 0
    assert await left(core) == 0
    with pytest.raises(RateLimitExceeded):
        await anext(second)
    assert [number async for number in first] == [1, 2]


async def test_a_generator_gets_what_is_sent_and_thrown_and_is_closed() -> None:
    core = RateThrottleCore(rules=[RULE])
    seen: list[object] = []

    @core.limit("key")
    async def echo() -> AsyncGenerator[object, object]:
        sent: object = "ready"
        try:
            while True:
                try:
                    sent = yield sent
                except KeyError as error:
                    sent = error.args[0]
                if sent == "end":
                    return
        finally:
            seen.append("closed")

    talk = echo()
    assert await anext(talk) == "ready"
    assert await talk.asend(5) == 5
    assert await talk.athrow(KeyError("thrown")) == "thrown"
    with pytest.raises(StopAsyncIteration):
        await talk.asend("end")
    assert seen == ["closed"]
    talk = echo()
    await anext(talk)
    await talk.aclose()
    assert seen == ["closed"] * 2


async def test_an_error_of_a_generator_passes() -> None:
    core = RateThrottleCore(rules=[RULE])

    @core.limit("key")
    async def broken() -> AsyncIterator[int]:
        yield 1
        raise KeyError("own")

    numbers = broken()
    assert await anext(numbers) == 1
    with pytest.raises(KeyError, match="own"):
        await anext(numbers)


# What can't be decorated


def a_sync_function() -> None: ...


def a_generator() -> Any:
    yield


class AClass: ...


@pytest.mark.parametrize(
    ("what", "words"),
    [
        (a_sync_function, "not sync ones, which can't wait; write `async def a_sync_function`"),
        (a_generator, "not sync ones, which can't wait; write `async def a_generator`"),
        (lambda: None, "not sync ones"),
        (AClass, "not classes; decorate the methods"),
        (AClass().__repr__, "not a method-wrapper; around anything else write `async with"),
        (5, "not a int; around anything else"),
        ("key", "not a str; around anything else"),
        (staticmethod(a_sync_function), "not sync ones"),
        (property(a_sync_function), "not a property"),
    ],
)
def test_anything_else_is_refused_with_advice(what: Any, words: str) -> None:
    core = RateThrottleCore(rules=[RULE])
    with pytest.raises(TypeError, match="limit decorates async functions") as caught:
        core.limit("key")(what)
    assert words in str(caught.value)


async def test_a_guard_asks_by_the_public_method_of_its_limiter() -> None:
    core = RateThrottleCore(rules=[RULE])

    @core.limit("key", "api", cost=2, timeout=5)
    async def work() -> str:
        return "done"

    with patch.object(core, "acquire", AsyncMock()) as acquire:
        assert await work() == "done"
    acquire.assert_awaited_once_with("key", "api", cost=2, timeout=5)
