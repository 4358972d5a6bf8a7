from collections.abc import Callable, Iterable
from typing import Literal, final

from typing_extensions import disjoint_base

from ratethrottle._engine.definitions import CompiledRule

__pyx_capi__: dict[str, object]

@disjoint_base
class Call: ...

@final
class CheckCall(Call): ...

@final
class ControlCall(Call):
    def __init__(
        self,
        script: str,
        keys: list[bytes],
        args: list[bytes],
        done: Callable[[list[int]], object] | None = None,
    ) -> None: ...
    @property
    def script(self) -> str: ...
    @property
    def keys(self) -> list[bytes]: ...
    @property
    def args(self) -> list[bytes]: ...
    @property
    def done(self) -> Callable[[list[int]], object] | None: ...

@final
class MarkCall(Call): ...

@final
class LoadCall(Call): ...

@final
class CallIndex: ...

def parse(
    kind: Literal["beat", "check", "peek", "reset", "check_joint", "peek_joint"],
    data: bytes,
    request: bytes,
    *,
    items: Iterable[tuple[CompiledRule, int, int, int | None]] = (),
    epoch: int = 0,
) -> tuple[list[int], int] | Literal["incomplete", "broken"]: ...
