"""What one of several processes may admit on its own."""

from __future__ import annotations

from ratethrottle._engine.keys import KeyTable
from ratethrottle.storage._shared.keynames import KeyNames
from ratethrottle.storage._shared.outage import Shares
from tests.kit.strategies import START_US


def shares_of(n: int, rank: int = 0, max_keys: int = 100) -> Shares:
    shares = Shares(KeyTable(max_keys, clock_us=lambda: START_US, bounds=True), KeyNames(b"p", 64))
    shares.set_share(n, rank)
    return shares
