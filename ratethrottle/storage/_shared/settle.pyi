from typing import final

from ratethrottle.storage._shared.context import StorageContext
from ratethrottle.storage._shared.fallback import Fallback
from ratethrottle.storage._shared.known import KnownKeys
from ratethrottle.storage._shared.link import Link
from ratethrottle.storage._shared.waiting import Waiting

@final
class Settlement:
    def __init__(
        self,
        context: StorageContext,
        link: Link,
        known: KnownKeys,
        waiting: Waiting,
        fallback: Fallback,
    ) -> None: ...
