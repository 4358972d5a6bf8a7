from asyncio import AbstractEventLoop
from collections.abc import Callable
from typing import final

__pyx_capi__: dict[str, object]

@final
class Waiting:
    def __init__(
        self,
        loop: AbstractEventLoop,
        resume: Callable[[], object],
        on_timer: Callable[[], object],
        most: int,
        deadline_us: int,
    ) -> None: ...
    @property
    def most(self) -> int: ...
    @property
    def callers(self) -> int: ...
