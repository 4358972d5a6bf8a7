"""The store that the processes of a test share: it runs what they wrote, at the test's time, and knows what they must hear."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import redis

from ratethrottle._engine.definitions import CompiledRule
from ratethrottle.storage.redis.scripts import LATER, NAMES, script
from ratethrottle.testing.manual import steered
from tests.kit.clocked import BITS, EPOCH, EPOCH_KEY, ClockedScript, JointAnswer, load
from tests.kit.joint import check_jointly
from tests.kit.oracle import Answer, Oracle
from tests.kit.strategies import calendar_rules

START_US = 1_800_000_000_000_000
NEVER_US = 2**63 - 1
SCRIPTS = {name: (script(name).sha(False), script(name).body(False)) for name in (*NAMES, *LATER)}
NAME_OF = {word: name for name, words in SCRIPTS.items() for word in words}
prefixes = itertools.count()


@cache
def rule_of(*words: bytes) -> CompiledRule:
    """The rule that a call names, whatever it is called."""
    kind, (capacity, window_us, unit, drain, slot_us, coarse_us, _) = words[0].decode(), map(int, words[1:])
    if kind == "d":
        calendars = [rule.compiled.calendar for rule in calendar_rules()]
        spec = next(calendar.spec for calendar in calendars if calendar is not None and calendar.number == slot_us)
        return CompiledRule("sent", "sent", kind, capacity, capacity, window_us, 0, 0, 0, 0, calendar=spec)
    return CompiledRule("sent", "sent", kind, capacity, capacity, window_us, unit, drain, slot_us, coarse_us)


def parse(request: bytes) -> list[bytes]:
    """The words of a request."""
    words, at = [], request.index(b"\r\n") + 2
    for _ in range(int(request[1 : at - 2])):
        assert request[at : at + 1] == b"$"
        begin = request.index(b"\r\n", at) + 2
        at = begin + int(request[at + 1 : begin - 2])
        words.append(request[begin:at])
        assert request[at : at + 2] == b"\r\n"
        at += 2
    assert at == len(request)
    return words


@dataclass
class Item:
    """An entry of a call: `count` equal checks of a key."""

    key: bytes
    rule: CompiledRule
    cost: int
    count: int
    ahead: int = 0
    back: int = 0
    leases: bool = False
    served_us: int = 0
    members: list[Any] = field(default_factory=list)  # the checks, as a test finds them out
    answers: list[Answer] = field(default_factory=list)  # by the oracle, when the store has run it


@dataclass(frozen=True)
class Part:
    """A limit that a joint check names."""

    rule: CompiledRule
    key: bytes
    cost: int
    flagged: bool = False


@dataclass
class JointItem:
    """Equal joint checks of a call: their sets of alternatives."""

    sets: list[list[Part]]
    count: int
    served_us: int = 0
    members: list[Any] = field(default_factory=list)
    answers: list[JointAnswer] = field(default_factory=list)

    @property
    def parts(self) -> list[Part]:
        return [part for parts in self.sets for part in parts]


class Request:
    """A call as it was written."""

    def __init__(self, request: bytes) -> None:
        self.words = words = parse(request)
        self.by_value = words[0] == b"EVAL"
        self.loads = words[0] == b"SCRIPT"
        self.items: list[Item] = []
        self.joints: list[JointItem] = []
        self.mode = ""
        self.refused = False
        if self.loads:
            return
        assert words[0] in {b"EVAL", b"EVALSHA"}
        self.script = NAME_OF[words[1]]
        assert words[1] == SCRIPTS[self.script][self.by_value]
        keys = words[3 : 3 + int(words[2])]
        assert 1 <= len(keys) == len(set(keys)) <= 130
        self.id, rest = words[3 + len(keys)], words[4 + len(keys) :]
        self.keys = keys = keys[1:]  # the first is the epoch's
        if self.script != "decide":
            self.mode = self.script
            return
        self.mode, _, joint = rest[0].decode().partition("_")
        rules, runs, leases, parts, *_ = map(int, rest[2:6] if joint else [*rest[2:5], b"0"])
        rest = rest[6:] if joint else rest[5:]
        known = [rule_of(*rest[8 * i : 8 * i + 8]) for i in range(rules)]
        rest = rest[8 * rules :]
        for i in range(runs):
            key, key_count, rule, cost, count = map(int, rest[5 * i : 5 * i + 5])
            self.items += [Item(keys[k - 1], known[rule - 1], cost, count) for k in range(key, key + key_count)]
        rest = rest[5 * runs :]
        for i in range(leases):
            key, rule, cost, count, ahead, back, _ = map(int, rest[7 * i : 7 * i + 7])
            self.items.append(Item(keys[key - 1], known[rule - 1], cost, count, ahead, back, leases=True))
        rest = rest[7 * leases :]
        for i in range(parts):
            key, rule, cost, count, bits = map(int, rest[5 * i : 5 * i + 5])
            part = Part(known[rule - 1], keys[key - 1], cost, bool(bits & BITS["flagged"]))
            if not bits & BITS["joined"]:
                self.joints.append(JointItem([], count))
            assert self.joints[-1].count == count
            if bits & BITS["alternative"]:
                self.joints[-1].sets[-1].append(part)
            else:
                self.joints[-1].sets.append([part])
        assert bool(joint) == bool(parts)
        assert len(rest) == 5 * parts
        assert len(self.items) + parts <= 128

    def say_nothing(self) -> None:
        """Leave out of an assertion all that it tells, but for how far the process has come."""
        words = self.words
        keys, rules = int(words[2]), int(words[6 + int(words[2])])
        first = 3 + keys  # the id, and then: mode, epoch, the counts of rules and items, rules
        if words[first + 1] == b"assert":
            self.words = [
                *words[:2],
                b"1",
                words[3],
                *words[first : first + 4],
                b"0",
                *words[first + 5 : first + 5 + 8 * rules],
                *words[-3:],
            ]


class Store:
    """The scripts on a server, in the world's time. With `oracle`, it says what each check must hear (not for leases)."""

    def __init__(self, client: redis.Redis, prefix: bytes, *, oracle: bool) -> None:
        self.client = client
        self.script = ClockedScript(client)
        self.shas = {name: load(client, steered(name)) for name in SCRIPTS}
        self.prefix = prefix
        client.set(prefix + b":epoch", EPOCH)
        self.accounts: defaultdict[bytes, Oracle] | None = defaultdict(Oracle) if oracle else None
        self.forgot_scripts = False
        self.forgave: Callable[[bytes], None] = lambda key: None  # told of a reset, or of units that came back
        self.definitions: dict[bytes, tuple[Any, ...]] = {}

    def run(self, request: Request, now_us: int) -> Any:
        """Run a call; returns the reply, as an object."""
        if request.loads:
            self.forgot_scripts = False
            return b"0" * 40
        if self.forgot_scripts and not request.by_value:
            request.refused = True
            return redis.exceptions.NoScriptError("none")
        self.forgot_scripts = False
        if request.mode == "reset":
            self.forget(request.keys)
        for item in request.items:
            item.served_us = now_us
            self.note(item)
            if self.accounts is not None:
                account = self.accounts[item.key]
                consume = request.mode == "check"
                item.answers = [account.check(item.rule, now_us, item.cost, consume=consume) for _ in range(item.count)]
        for joint in request.joints:
            joint.served_us = now_us
            for part in joint.parts:
                self.note(Item(part.key, part.rule, part.cost, joint.count))
            if self.accounts is not None:
                consume = request.mode == "check"
                joint.answers = [check_jointly(self.accounts, joint.sets, now_us, consume=consume) for _ in range(joint.count)]
        try:
            return self.client.execute_command("EVALSHA", self.shas[request.script], *request.words[2:], now_us)
        except redis.ResponseError as error:
            raise AssertionError(f"the script refused a call: {error}") from error

    def reset(self, keys: Sequence[bytes], now_us: int) -> None:
        """A reset by somebody else."""
        self.client.evalsha(self.shas["reset"], 1 + len(keys), EPOCH_KEY, *keys, "id", EPOCH, *[0] * len(keys), now_us)
        self.forget(keys)

    def forget(self, keys: Sequence[bytes]) -> None:
        for key in keys:
            self.forgave(key)
            if self.accounts is not None:
                self.accounts[key] = Oracle()

    def keep(self) -> dict[bytes, bytes]:
        """What a replica would have now."""
        keys = [key for key in self.client.keys(self.prefix + b":*") if self.client.type(key) == b"string"]
        return {key: value for key in keys if (value := self.client.get(key)) is not None}

    def lose(self, kept: dict[bytes, bytes]) -> None:
        """Hold nothing but this any more."""
        if keys := self.client.keys(self.prefix + b":*"):
            self.client.delete(*keys)
        for key, value in kept.items():
            self.client.set(key, value)

    def note(self, item: Item) -> None:
        rule = item.rule
        definition = (rule.kind, rule.unit_ticks, rule.drain_ticks, rule.window_us, rule.slot_us)
        if item.back or self.definitions.setdefault(item.key, definition) != definition:
            self.forgave(item.key)
        self.definitions[item.key] = definition

    def peek(self, key: bytes, rule: CompiledRule, cost: int, now_us: int) -> Answer:
        return self.script.call(now_us, [(rule, key.decode(), cost)], "peek")[0]

    def consume(self, key: bytes, rule: CompiledRule, cost: int, now_us: int) -> Answer:
        """A check by somebody else."""
        self.note(Item(key, rule, cost, 1))
        if self.accounts is not None:
            self.accounts[key].check(rule, now_us, cost)
        return self.script.call(now_us, [(rule, key.decode(), cost)])[0]
