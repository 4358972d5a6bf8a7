"""An asyncio loop whose clock stands still while anything runs, and jumps to the next timer when everything waits."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from ratethrottle import InMemoryStorage, RateThrottleCore, RateThrottleRule

T = TypeVar("T")


class Jumping(selectors.SelectSelector):
    """Waits for no time, and counts how often the loop looks."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 1000.0
        self.looks = 0

    def select(self, timeout: float | None = None) -> Any:
        self.looks += 1
        ready = super().select(0)
        if not ready and timeout is None:
            raise RuntimeError("everything waits, and nothing will ever happen")
        if not ready:
            self.now_s += timeout or 0.0
        return ready


class TimelessLoop(asyncio.SelectorEventLoop):
    """The loop. An hour of it passes in no time."""

    def __init__(self) -> None:
        self.jumping = Jumping()
        super().__init__(self.jumping)

    def time(self) -> float:
        return self.jumping.now_s

    def time_us(self) -> int:
        """The same in whole µs, for a storage."""
        return round(self.jumping.now_s * 1e6)

    def timers(self) -> int:
        """How many timers are set."""
        return sum(not timer.cancelled() for timer in self._scheduled)  # type: ignore[attr-defined]  # asyncio's own list


def timeless() -> TimelessLoop:
    """The running one."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, TimelessLoop)
    return loop


def run(main: Callable[..., Coroutine[Any, Any, T]], *args: Any) -> T:
    """Run a coroutine function on a loop of this kind."""
    with asyncio.Runner(loop_factory=TimelessLoop) as runner:
        return runner.run(main(*args))


def limiter(*rules: RateThrottleRule) -> RateThrottleCore:
    """A limiter in memory by the clock of the running loop."""
    return RateThrottleCore(InMemoryStorage(clock_us=timeless().time_us), rules=rules)


async def settled(turns: int = 10) -> None:
    """Let every task run until it waits."""
    for _ in range(turns):
        await asyncio.sleep(0)
