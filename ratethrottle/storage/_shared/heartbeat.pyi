from typing import final

from ratethrottle.storage._shared.context import StorageContext

@final
class Heartbeat:
    def __init__(self, context: StorageContext) -> None: ...
    @property
    def epoch(self) -> int: ...
