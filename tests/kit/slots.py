"""Slots: the script with a clock of the test's own, and an oracle that says what it must answer (docs/arithmetic.md, "Slots")."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ratethrottle.storage.redis.scripts import script
from ratethrottle.testing.manual import steered
from tests.kit.clocked import EPOCH, EPOCH_KEY, load

UNREADABLE, UNSURE, OLD, LAPSED, FORGOTTEN = [
    int(script("slots").header[name][0]) for name in ("unreadable", "unsure", "old", "lapsed", "forgotten")
]
BITS = {
    name: int(value)
    for line in ("holder_bits", "item_bits")
    for name, _, value in (word.partition("=") for word in script("slots").header[line])
}
HOLDERS_KEY = "test:holders"
Answer = tuple[int, int, int]  # granted, free, again_us


class Holder(NamedTuple):
    """A holder as a call names it."""

    holder_id: str
    previous_id: str = ""
    ttl_us: int = 2_000_000
    joins: bool = False
    tells: bool = False

    @property
    def words(self) -> list[Any]:
        return [self.holder_id, self.previous_id, self.ttl_us, BITS["joins"] * self.joins + BITS["tells"] * self.tells]


class Item(NamedTuple):
    """What a holder has of a key, and would like. holder: its number in the call, from 1."""

    key: str
    holder: int = 1
    limit: int = 3
    cost: int = 1
    held: int = 0
    wanted: int = 0
    sequence: int = 1
    kept: bool = False
    waits: bool = False

    @property
    def words(self) -> list[int]:
        bits = BITS["kept"] * self.kept + BITS["waits"] * self.waits
        return [self.holder, self.limit, self.cost, self.held, self.wanted, self.sequence, bits]


class ClockedSlots:
    """Calls the script at given times on a synchronous client."""

    def __init__(self, client: Any, epoch: str = EPOCH) -> None:
        self.client = client
        self.sha = load(client, steered("slots"))
        self.epoch = epoch
        client.set(EPOCH_KEY, epoch)

    def enter(self, epoch: str) -> None:
        """Another epoch begins."""
        self.epoch = epoch
        self.client.set(EPOCH_KEY, epoch)

    def run(self, now_us: int, mode: str, keys: Sequence[str], *args: Any) -> list[int]:
        """One call; its numbers, after the time."""
        reply = self.client.evalsha(self.sha, 2 + len(keys), EPOCH_KEY, HOLDERS_KEY, *keys, "id", mode, self.epoch, *args, now_us)
        assert reply[:2] == [b"id", now_us]
        numbers: list[int] = reply[2:]
        return numbers

    def hold(self, now_us: int, holders: Sequence[Holder], items: Sequence[Item] = ()) -> tuple[list[int], list[Answer]]:
        """The standing of each holder, and the answer to each item."""
        words = [word for each in (*holders, *items) for word in each.words]
        numbers = self.run(now_us, "hold", [item.key for item in items], len(holders), *words)
        answers = numbers[len(holders) :]
        assert len(answers) == 3 * len(items)
        return numbers[: len(holders)], [(answers[i], answers[i + 1], answers[i + 2]) for i in range(0, len(answers), 3)]

    def leave(self, now_us: int, *holders: Holder) -> None:
        self.run(now_us, "leave", [], len(holders), *(word for holder in holders for word in holder.words))

    def forget(self, now_us: int, *keys: str) -> None:
        self.run(now_us, "forget", keys, 0)


@dataclass
class Place:
    """A holder that waits."""

    holder_id: str
    since_us: int
    asked_us: int


@dataclass
class Key:
    """Holders of a key, and those that wait."""

    units: dict[str, int] = field(default_factory=dict)
    sequences: dict[str, int] = field(default_factory=dict)
    asked_us: dict[str, int] = field(default_factory=dict)
    line: list[Place] = field(default_factory=list)

    def drop(self, holder_id: str) -> None:
        self.units.pop(holder_id, None)
        self.sequences.pop(holder_id, None)
        self.asked_us.pop(holder_id, None)


class SlotsOracle:
    """One prefix. began_us: by when all had come that knew of an epoch before this one, 0 if nobody did."""

    def __init__(self, began_us: int = 0) -> None:
        self.began_us = began_us
        self.lapses: dict[str, int] = {}
        self.telling: dict[str, int] = {}
        self.untold: set[str] = set()  # of whom a key was forgotten
        self.keys: defaultdict[str, Key] = defaultdict(Key)

    def lives(self, holder_id: str, now_us: int) -> bool:
        if holder_id in self.lapses:
            self.lapses[holder_id] = min(self.lapses[holder_id], now_us + 86_400_000_000)
        return self.lapses.get(holder_id, 0) > now_us

    def held(self, key: str, now_us: int) -> int:
        """Units of all that live."""
        return sum(units for holder_id, units in self.keys[key].units.items() if self.lives(holder_id, now_us))

    def hold(self, now_us: int, holders: Sequence[Holder], items: Sequence[Item] = ()) -> tuple[list[int], list[Answer]]:
        standings = [self.renew(now_us, holder) for holder in holders]
        self.sweep(now_us)
        return standings, [self.ask(now_us, holders[item.holder - 1], item) for item in items]

    def renew(self, now_us: int, holder: Holder) -> int:
        if not (holder.joins or self.lives(holder.holder_id, now_us)):
            return 0
        self.lapses[holder.holder_id] = now_us + holder.ttl_us
        if holder.tells:
            self.telling[holder.holder_id] = now_us
        else:
            self.telling.pop(holder.holder_id, None)
            self.lapses.pop(holder.previous_id, None)
        if holder.holder_id in self.untold:
            self.untold.remove(holder.holder_id)
            return 2
        return 1

    def unsure_us(self, now_us: int) -> int:
        """For how long nobody is granted anything."""
        if 0 < self.began_us <= now_us + 500_000 and now_us < self.began_us + 250_000:
            return self.began_us + 250_000 - now_us
        return 25_000 if any(now_us - 3_000_000 < at_us <= now_us + 500_000 for at_us in self.telling.values()) else 0

    def ask(self, now_us: int, holder: Holder, item: Item) -> Answer:
        key, own = self.keys[item.key], holder.holder_id
        others = sum(
            units for each, units in key.units.items() if each not in (own, holder.previous_id) and self.lives(each, now_us)
        )
        there = self.lives(own, now_us)
        if not there or item.sequence < key.sequences.get(own, 0) or (item.kept and not key.units.get(own)):
            code = LAPSED if not there else OLD if item.sequence < key.sequences.get(own, 0) else FORGOTTEN
            return code, max(0, item.limit - others - (key.units[own] if code == OLD else 0)), 0
        for each in list(key.units):
            forgotten = each != own and not key.units[each] and abs(now_us - key.asked_us[each]) >= 60_000_000
            if each == holder.previous_id or not self.lives(each, now_us) or forgotten:
                key.drop(each)
        mine = next((place for place in key.line if place.holder_id in (own, holder.previous_id)), None)
        key.line = [place for place in key.line if place is mine or self.waits(place, now_us, holder)]
        ahead = key.line[: key.line.index(mine)] if mine else list(key.line)
        unsure_us = self.unsure_us(now_us)
        granted = 0
        if not ahead and not unsure_us:
            granted = max(0, min(item.wanted, (item.limit - others - item.held) // item.cost))
        key.units.pop(own, None)
        key.units[own], key.sequences[own] = item.held + granted * item.cost, item.sequence
        key.asked_us[own] = now_us
        for each in [each for each, units in key.units.items() if not units][:-512]:
            key.drop(each)
        free = max(0, item.limit - others - key.units[own])
        again_us = 0
        stays = item.waits and granted < item.wanted and item.cost <= item.limit
        if mine and (granted or not stays):
            key.line.remove(mine)
            mine, ahead = None, key.line
        if stays:
            if mine is None:
                ahead = list(key.line)
                mine = Place(own, now_us, now_us)
                key.line.append(mine)
            mine.holder_id, mine.asked_us = own, now_us
            if unsure_us:
                again_us = unsure_us
            elif others or ahead:
                waited_us = (now_us - mine.since_us) // 16
                again_us = min(500_000, (len(ahead) + 1) * min(250_000, max(25_000, waited_us)))
            else:
                again_us = 500_000
        return UNSURE if unsure_us and item.wanted else granted, free, again_us

    def waits(self, place: Place, now_us: int, asking: Holder) -> bool:
        """Whether another one still waits, as far as is known."""
        other = place.holder_id not in (asking.holder_id, asking.previous_id)
        return other and self.lives(place.holder_id, now_us) and abs(now_us - place.asked_us) < 1_000_000

    def sweep(self, now_us: int) -> None:
        self.lapses = {holder_id: until_us for holder_id, until_us in self.lapses.items() if until_us > now_us}

    def leave(self, now_us: int, *holders: Holder) -> None:
        for holder in holders:
            for each in (holder.holder_id, holder.previous_id):
                self.lapses.pop(each, None)
            self.telling.pop(holder.holder_id, None)
        self.sweep(now_us)

    def forget(self, now_us: int, *keys: str) -> None:
        for key in keys:
            self.untold |= {each for each, units in self.keys[key].units.items() if units and self.lives(each, now_us)}
            self.keys.pop(key, None)
