"""What a joint check must hear: the promise, over one oracle for each key."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Any, Protocol

from tests.kit.clocked import NEVER_US, JointAnswer, Part
from tests.kit.oracle import Answer


class Decides(Protocol):
    """One key."""

    def check(self, rule: Any, now_us: int, cost: int, *, consume: bool = True) -> Answer: ...


def check_jointly(keys: Mapping[str, Decides], sets: list[list[Part]], now_us: int, *, consume: bool = True) -> JointAnswer:
    """Decide: look at all parts, then charge the first of each set that would be allowed, if there is one in each."""
    looks = [[keys[part.key].check(part.rule, now_us, part.cost, consume=False) for part in parts] for parts in sets]
    told: list[tuple[int, Answer]] = []
    for heard in looks:
        payers = [i for i, answer in enumerate(heard) if answer[0]]
        which = payers[0] if payers else min(range(len(heard)), key=lambda i: heard[i][2] % NEVER_US)
        told.append((which, heard[which]))
    allowed = all(answer[0] or parts[0].flagged for (_, answer), parts in zip(told, sets, strict=True))
    if allowed and consume:
        for s, (which, answer) in enumerate(told):
            if answer[0]:
                part = sets[s][which]
                told[s] = which, keys[part.key].check(part.rule, now_us, part.cost)
    return allowed, told


def binding(sets: list[list[Part]], heard: JointAnswer) -> int:
    """Which set the decision itself reports: allowed, the one with the least share left; denied, the one with the longest wait."""
    allowed, told = heard
    parts = [parts[which] for (which, _), parts in zip(told, sets, strict=True)]
    if allowed:
        return min(range(len(told)), key=lambda s: Fraction(told[s][1][1], parts[s].rule.capacity))
    denying = [s for s, (_, answer) in enumerate(told) if not (answer[0] or parts[s].flagged)]
    return max(denying, key=lambda s: told[s][1][2] % NEVER_US)
