from typing import final

from ratethrottle.storage._shared.context import StorageContext
from ratethrottle.storage._shared.known import KnownKeys
from ratethrottle.storage._shared.link import Link
from ratethrottle.storage._shared.waiting import Waiting

__pyx_capi__: dict[str, object]

REPAIRING: str

@final
class Fallback:
    def __init__(self, context: StorageContext, link: Link, known: KnownKeys, waiting: Waiting) -> None: ...
