from collections.abc import Coroutine, Sequence
from typing import Any, Literal

from typing_extensions import disjoint_base

from ratethrottle._core import Backend, Group
from ratethrottle._engine.decision import Decision, Entry
from ratethrottle._engine.definitions import _OnOutage
from ratethrottle._engine.joint import Joint
from ratethrottle.storage._shared.batch import Batch
from ratethrottle.storage._shared.context import StorageContext
from ratethrottle.storage._shared.keynames import KeyNames
from ratethrottle.storage._shared.repair import Repair

@disjoint_base
class SharedStorage(Backend):
    def __init__(
        self,
        names: KeyNames,
        repair: Repair,
        deadline_us: int,
        ttl_us: int,
        on_outage: _OnOutage = "raise",
        expected: int = 0,
        *,
        deny_overload: bool = False,
    ) -> None: ...
    @property
    def context(self) -> StorageContext: ...
    @property
    def repair(self) -> Repair: ...
    @property
    def names(self) -> KeyNames: ...
    def _batches_here(self) -> tuple[Batch, ...]: ...
    def _forked(self) -> bool: ...
    def _forget_here(self) -> None: ...
    def _settle(self, settlement: Joint) -> Group | None: ...
    def book(self, booking: Joint) -> Decision | Coroutine[Any, Any, Decision]: ...
    def _unbook(self, unbooking: Joint) -> Group | None: ...
    def _ask_together(self, entries: Sequence[Entry | Joint], mode: Literal["check", "peek", "reset"]) -> Group: ...
