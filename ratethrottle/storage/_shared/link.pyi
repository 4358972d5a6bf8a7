from typing import final

from ratethrottle.storage._shared.context import StorageContext

STATES: tuple[str, ...]

@final
class Link:
    def __init__(self, context: StorageContext, transport: object) -> None: ...
    @property
    def context(self) -> StorageContext: ...
