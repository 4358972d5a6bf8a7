from typing import Any, final

__pyx_capi__: dict[str, object]

@final
class LateReplies:
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def received(self, data: bytes) -> bool: ...
