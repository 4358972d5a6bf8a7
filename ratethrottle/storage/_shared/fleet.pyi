from typing import final

from ratethrottle.storage._shared.outage import Shares

@final
class Fleet:
    def __init__(self, shares: Shares) -> None: ...
    @property
    def processes(self) -> int: ...
    @property
    def sure(self) -> bool: ...
