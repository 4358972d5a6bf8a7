from typing import Any, final

from ratethrottle._engine.decision import Decision, Entry, _Key
from ratethrottle._engine.definitions import CompiledRule

@final
class SlotDecision(Decision):
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

def held_entry(rule: CompiledRule, key: _Key, cost: int) -> Entry: ...
def held_decision(entry: Entry, source: str, granted: bool, remaining: int, retry_us: int = 0) -> Decision: ...
