from typing import final

from ratethrottle._engine.definitions import CompiledRule
from ratethrottle.storage._shared.context import StorageContext
from ratethrottle.storage._shared.waiting import Waiting

@final
class KnownKeys:
    def __init__(self, context: StorageContext, waiting: Waiting) -> None: ...
    def return_leases(self, rule: CompiledRule | None, now_us: int) -> None: ...
    def count_leases(self) -> int: ...
