from collections.abc import Sequence
from typing import TypeAlias, final

from ratethrottle._engine.definitions import CompiledRule
from ratethrottle._engine.keys import KeyTable
from ratethrottle.storage._shared.keynames import KeyNames

_Owed: TypeAlias = tuple[CompiledRule, bytes, tuple[int, int], int, list[tuple[int, int]]]

@final
class Share: ...

@final
class Shares:
    def __new__(cls, bounds: KeyTable, names: KeyNames) -> Shares: ...
    @property
    def n(self) -> int: ...
    @property
    def rank(self) -> int: ...
    @property
    def owing(self) -> int: ...
    def __len__(self) -> int: ...
    def set_share(self, n: int, rank: int) -> None: ...
    def begin(self) -> None: ...
    def take_owed(self, most: int, now_us: int, work: int = 0) -> list[_Owed]: ...
    def sweep(self, now_us: int) -> None: ...
    def clear(self) -> None: ...
    def _decide(
        self,
        rule: CompiledRule,
        text: str | bytes,
        mark: str,
        now_us: int,
        cost: int,
        *,
        known: tuple[CompiledRule, Sequence[int], int, int] | None = None,
        known_now_us: int | None = None,
        retry_us: int = 0,
        everything: bool = False,
        consume: bool = True,
        tag: int = 0,
    ) -> tuple[bool, int, int, int]: ...
