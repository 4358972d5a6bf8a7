from typing import Literal

__pyx_capi__: dict[str, object]

def parse(
    kind: Literal["script", "load", "mark"], data: bytes, request: bytes = b"", integers: int = 0
) -> tuple[list[int], int] | Literal["incomplete", "broken"]: ...
