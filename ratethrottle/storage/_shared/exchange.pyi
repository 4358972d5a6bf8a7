from typing import final

from ratethrottle.storage._shared.context import StorageContext
from ratethrottle.storage._shared.waiting import Waiting

@final
class Exchange:
    def __init__(self, context: StorageContext, waiting: Waiting) -> None: ...
    @property
    def sent_calls(self) -> int: ...
    @property
    def sent_items(self) -> int: ...
