from asyncio import AbstractEventLoop
from collections.abc import Callable
from contextvars import Context
from typing import Protocol, final

from ratethrottle._core import PendingDecision

__pyx_capi__: dict[str, object]

def is_queued(pending: PendingDecision) -> bool: ...

class _Timers(Protocol):
    def call_later(self, delay: float, callback: Callable[[], object], /, *, context: Context | None = None) -> _Timer: ...

class _Timer(Protocol):
    def cancel(self) -> object: ...

@final
class Waiting:
    def __init__(
        self,
        loop: AbstractEventLoop,
        resume: Callable[[], object],
        on_timer: Callable[[], object],
        most: int,
        deadline_us: int,
        timers: _Timers | None = None,
    ) -> None: ...
    @property
    def most(self) -> int: ...
    @property
    def callers(self) -> int: ...
