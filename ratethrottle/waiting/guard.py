"""`limiter.limit(...)`: a block, or a function, that runs once it was granted."""

from __future__ import annotations

import inspect
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine
from functools import wraps
from types import TracebackType
from typing import Any, Protocol, TypeVar, cast

from ratethrottle._engine.decision import Decision
from ratethrottle.errors import InvalidRequest
from ratethrottle.waiting.tickets import Key, seconds_of

KeyOfCall = Callable[..., Key | Awaitable[Key]]

# What is decorated keeps its type: its parameters, its result, and whether it is a method.
Function = TypeVar(
    "Function",
    bound="Callable[..., Coroutine[Any, Any, Any]] | Callable[..., AsyncIterator[Any]]"
    " | classmethod[Any, ..., Coroutine[Any, Any, Any]] | classmethod[Any, ..., AsyncIterator[Any]]"
    " | staticmethod[..., Coroutine[Any, Any, Any]] | staticmethod[..., AsyncIterator[Any]]",
)

ADVICE = "limit decorates async functions, async methods and async generator functions"


class Acquires(Protocol):
    """A limiter."""

    async def acquire(self, key: Key, rule: Any = None, *, cost: int = 1, timeout: float | None = None) -> Decision:
        """Wait for a grant."""


class Guard:
    """What `limiter.limit(...)` returns: `async with` it, or decorate a function with it. Each use decides afresh."""

    __slots__ = ("_cost", "_key", "_limiter", "_rule", "_timeout")

    def __init__(self, limiter: Acquires, key: Key | KeyOfCall, rule: Any, cost: int, timeout: float | None) -> None:
        seconds_of(timeout)
        self._limiter = limiter
        self._key = key
        self._rule = rule
        self._cost = cost
        self._timeout = timeout

    async def __aenter__(self) -> Decision:
        if callable(self._key):
            raise InvalidRequest(
                "the key is a function, which is for decorators: a block has no arguments to call it with; pass the key itself"
            )
        return await self._limiter.acquire(self._key, self._rule, cost=self._cost, timeout=self._timeout)

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Keep what was granted, whatever the block did."""

    def __call__(self, function: Function) -> Function:
        """Decorate an async function, method or generator function. Raises TypeError for anything else."""
        decorated: Any = function
        if isinstance(decorated, (classmethod, staticmethod)):
            made: Any = type(decorated)(self(decorated.__func__))
        elif inspect.isasyncgenfunction(decorated):
            made = self._generates(decorated)
        elif inspect.iscoroutinefunction(decorated):
            made = self._runs(decorated)
        else:
            raise TypeError(_advice(decorated))
        return cast(Function, made)

    def __repr__(self) -> str:
        # Without the key, as everywhere.
        return f"<Guard rule={self._rule!r} cost={self._cost!r} timeout={self._timeout!r}>"

    def _runs(self, function: Callable[..., Coroutine[Any, Any, Any]]) -> Callable[..., Coroutine[Any, Any, Any]]:
        @wraps(function)
        async def guarded(*args: Any, **options: Any) -> Any:
            await self._decide(args, options)
            return await function(*args, **options)

        return guarded

    def _generates(self, function: Callable[..., AsyncGenerator[Any, Any]]) -> Callable[..., AsyncGenerator[Any, Any]]:
        @wraps(function)
        async def guarded(*args: Any, **options: Any) -> AsyncGenerator[Any, Any]:
            await self._decide(args, options)
            generator = function(*args, **options)
            try:
                given = await anext(generator)
                while True:
                    try:
                        sent = yield given
                    except GeneratorExit:
                        raise
                    except BaseException as error:  # noqa: BLE001  # thrown in by the caller: it is the generator's
                        given = await generator.athrow(error)
                    else:
                        given = await generator.asend(sent)
            except StopAsyncIteration:
                return
            finally:
                await generator.aclose()

        return guarded

    async def _decide(self, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        """Wait for the grant of one call."""
        key = self._key
        if callable(key):
            found = key(*args, **options)
            key = await found if inspect.isawaitable(found) else found
        await self._limiter.acquire(key, self._rule, cost=self._cost, timeout=self._timeout)


def _advice(function: object) -> str:
    """Say what to do with what can't be decorated."""
    if inspect.isclass(function):
        return f"{ADVICE}, not classes; decorate the methods that are to be limited"
    if inspect.isgeneratorfunction(function) or inspect.isfunction(function) or inspect.ismethod(function):
        return f"{ADVICE}, not sync ones, which can't wait; write `async def {function.__name__}`"
    return f"{ADVICE}, not a {type(function).__name__}; around anything else write `async with limiter.limit(...):`"
