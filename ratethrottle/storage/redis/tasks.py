"""Tasks of the library's own."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


def own_task(loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, T], name: str) -> asyncio.Task[T]:
    """Run `work` in a task of the library.

    In an empty context: the request that happens to come first must not lend its variables to all the others. Not through the
    loop's task factory: it is made for the application's tasks, may take no name and no context, and may run the first step at once.
    """
    return asyncio.Task(work, loop=loop, name=name, context=contextvars.Context())
