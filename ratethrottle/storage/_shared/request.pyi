from typing import final

from ratethrottle.storage._shared.keynames import KeyNames

@final
class Writer:
    def __new__(cls, names: KeyNames) -> Writer: ...
    @property
    def session(self) -> bytes: ...
