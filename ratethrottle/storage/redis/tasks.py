"""Tasks of the library's own."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Coroutine
from typing import Any, TypeVar

from ratethrottle.errors import StorageUnavailable

T = TypeVar("T")


def own_task(loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, T], name: str) -> asyncio.Task[T]:
    """Run `work` in a task of the library.

    In an empty context: the request that happens to come first must not lend its variables to all the others. Not through the
    loop's task factory: it is made for the application's tasks, may take no name and no context, and may run the first step at once.
    """
    return asyncio.Task(work, loop=loop, name=name, context=contextvars.Context())


def result_of(task: asyncio.Task[T]) -> T:
    """Return the result of a task that is done. Raises what it raised, and StorageUnavailable if somebody else has cancelled it."""
    if task.cancelled():
        raise StorageUnavailable("an attempt to connect was cancelled by the client's own code, such as its credential provider")
    return task.result()


def succeeded(task: asyncio.Task[Any]) -> bool:
    """Whether it is done and has a result. Looking keeps its error from being reported as forgotten."""
    return task.done() and not task.cancelled() and task.exception() is None
