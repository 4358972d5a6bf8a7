from collections.abc import Callable
from typing import Any, final

from ratethrottle._engine.definitions import _OnOutage
from ratethrottle._engine.keys import KeyTable
from ratethrottle.storage._shared.keynames import KeyNames
from ratethrottle.storage._shared.link import Link
from ratethrottle.storage._shared.repair import Repair

@final
class StorageContext:
    noticed: Callable[[str, Link, Any], object] | None
    def __init__(
        self,
        names: KeyNames,
        repair: Repair,
        deadline_us: int,
        ttl_us: int,
        on_outage: _OnOutage,
        deny_overload: bool,
    ) -> None: ...
    @property
    def names(self) -> KeyNames: ...
    @property
    def bounds(self) -> KeyTable: ...
    @property
    def repair(self) -> Repair: ...
    @property
    def deadline_us(self) -> int: ...
    @property
    def by_policy(self) -> int: ...
    @property
    def overloads(self) -> int: ...
