from collections.abc import Callable
from typing import final

from ratethrottle.storage._shared.context import StorageContext
from ratethrottle.storage._shared.exchange import Exchange
from ratethrottle.storage._shared.fallback import Fallback
from ratethrottle.storage._shared.known import KnownKeys
from ratethrottle.storage._shared.link import Link
from ratethrottle.storage._shared.waiting import Waiting

@final
class Session:
    def __init__(
        self,
        context: StorageContext,
        link: Link,
        exchange: Exchange,
        waiting: Waiting,
        known: KnownKeys,
        fallback: Fallback,
        schedule: Callable[[], object],
    ) -> None: ...
    def _beaten(self, numbers: list[int]) -> None: ...
    def _advance_on(self) -> None: ...
    def _free_on(self) -> None: ...
