"""The scripts with a clock of the test's own: what they are given as the last argument stands in for TIME."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from ratethrottle._engine.decision import read_answer
from ratethrottle._engine.definitions import CompiledRule
from ratethrottle.storage.redis.scripts import script
from ratethrottle.testing.manual import steered

EPOCH_KEY = "test:epoch"
RUN = "0123456789" * 4


def epoch_text(name_us: int, began_us: int = 0) -> str:
    """The value of an epoch's key: which one it is, and when learning began."""
    return f"{RUN}{name_us:016}{began_us:016}"


EPOCH = epoch_text(1)  # so long ago that nothing is repaired any more


CLOCKED = steered("decide")
_loaded: WeakKeyDictionary[Any, dict[str, str]] = WeakKeyDictionary()


def load(client: Any, text: str) -> str:
    """What a client's server calls a script. A client loads each once, although a random test makes hundreds of servers out of one."""
    known = _loaded.setdefault(client, {})
    if text not in known:
        known[text] = client.script_load(text)
    return known[text]


Check = tuple[CompiledRule, str, int]  # rule, key, cost
View = tuple[str, list[tuple[int, int]]]  # what is text, and the entries of a sliding window: at_us, units
Answer = tuple[bool, int, int, int]  # allowed, remaining, retry_us, reset_us
# Whether it is allowed; of each set which of its parts it reports, and what that part says.
JointAnswer = tuple[bool, list[tuple[int, Answer]]]
NEVER_US = 2**63 - 1
BITS = {name: int(value) for name, _, value in (word.partition("=") for word in script("decide").header["bits"])}


class Lease(NamedTuple):
    """An entry that also takes units ahead, or gives some back."""

    rule: CompiledRule
    key: str
    cost: int = 1
    count: int = 1
    ahead: int = 0
    back: int = 0
    back_us: int = 0


class Part(NamedTuple):
    """One limit that a joint check names."""

    rule: CompiledRule
    key: str
    cost: int = 1
    flagged: bool = False


class JointCheck(NamedTuple):
    """`count` equal joint checks."""

    sets: list[list[Part]]
    count: int = 1


class Correction(NamedTuple):
    """Units that nobody was asked for, or, if it is known when they were granted, that are given back."""

    rule: CompiledRule
    key: str
    units: int
    granted_us: int | None = None


class Booking(NamedTuple):
    """`count` equal checks that may be granted for later; or, if `empty_us` is given, one that is given back."""

    rule: CompiledRule
    key: str
    units: int = 1
    ahead_us: int = 0
    count: int = 1
    empty_us: int | None = None

    def part(self, key_index: int, rule_index: int) -> tuple[int, ...]:
        """The script's part."""
        bits = BITS["evenly"] if self.rule.strategy == "leaky_bucket" else BITS["book"]
        if self.empty_us is not None:
            return key_index, rule_index, self.units, self.empty_us, BITS["unbook"]
        return key_index, rule_index, self.units, self.count + (self.ahead_us << 20), bits


class PartAnswer(NamedTuple):
    """How many of the equal checks a part has paid for, and the numbers of its answer: a code alone if there is none."""

    took: int
    numbers: list[int]


class Call(NamedTuple):
    """What the script is called with, without the request id and the epoch's key, and how many checks each of its items stands for."""

    keys: list[str]
    args: list[Any]
    items: list[tuple[CompiledRule, int, int]]  # rule, cost, count
    mode: str
    leases: int
    joints: Sequence[JointCheck] = ()

    def split(self, reply: list[Any]) -> tuple[list[list[int]], list[list[list[PartAnswer]]], list[tuple[int, int]]]:
        """The numbers of each item; by joint check, set and part what it answers; pairs of item and generation."""
        assert reply[0] == b"id"
        numbers, header = reply[2:], script("decide").header

        def take(rule: CompiledRule, count: int, more: int) -> list[int]:
            length = 1
            if numbers[0] >= 0:
                length = len(header[f"answer_{rule.kind}"]) + more
                length -= rule.kind == "s" and numbers[0] >= count  # no retry_us
            taken = numbers[:length]
            del numbers[:length]
            return taken

        answers = [take(rule, count, i >= len(self.items) - self.leases) for i, (rule, _, count) in enumerate(self.items)]

        def take_part(part: Part, count: int) -> PartAnswer:
            took = numbers.pop(0)
            # One that never vetoes, and hasn't paid for all, says until when it has no more.
            more = part.flagged and took < count
            return PartAnswer(took, take(part.rule, numbers[0] + 1 if more else 1, 0))

        parts = [
            [[take_part(part, joint.count) for part in alternatives] for alternatives in joint.sets] for joint in self.joints
        ]
        assert len(numbers) % 2 == 0, "what is left are pairs of item and generation"
        return answers, parts, list(zip(numbers[::2], numbers[1::2], strict=True))

    def raw(self, reply: list[Any]) -> list[list[int]]:
        """The numbers of each item."""
        return self.split(reply)[0]

    def heard(self, reply: list[Any]) -> list[list[JointAnswer]]:
        """What each of the equal checks hears, of each joint check."""
        return [
            [joint_answer(joint.sets, answers, i, self.mode == "check_joint") for i in range(joint.count)]
            for joint, answers in zip(self.joints, self.split(reply)[1], strict=True)
        ]

    def answers(self, reply: list[Any]) -> list[Answer]:
        """What each check hears."""
        heard: list[Answer] = []
        raw = self.raw(reply)
        for place, (rule, cost, count) in enumerate(self.items):
            numbers = raw[place]
            if place >= len(self.items) - self.leases:
                numbers = numbers if rule.lease_units else numbers[:-1]
            elif rule.lease_units:
                numbers = [*numbers, 0]
            # A peek charges nothing, so that each of several hears what the first does.
            consumes = self.mode in ("check", "check_joint")
            heard += (read_answer(rule, numbers, cost, i if consumes else 0, count) for i in range(count))
        return heard


def joint_answer(sets: list[list[Part]], answers: list[list[PartAnswer]], place: int, consume: bool) -> JointAnswer:
    """What the check at `place` (0: the first) of equal joint checks hears, if they were decided."""
    granted = [sum(part.took for part in of_set) for of_set, parts in zip(answers, sets, strict=True) if not parts[0].flagged]
    allowed = consume and (not granted or place < granted[0])
    assert not consume or len(set(granted)) <= 1, "each set pays for as many"
    reported = []
    for parts, of_set in zip(sets, answers, strict=True):
        before, heard = place, []
        for i, (part, (took, numbers)) in enumerate(zip(parts, of_set, strict=True)):
            if allowed and before < took:
                heard = [(i, read_answer(part.rule, padded(part.rule, [took, *numbers[1:4]]), part.cost, before, took))]
                break
            before -= took
            if numbers[0] >= 0 and (part.flagged or not allowed):
                granted = 0 if allowed else numbers[0]
                told = [granted, *numbers[1 : 4 if granted else 5]]
                heard.append((i, read_answer(part.rule, padded(part.rule, told), part.cost)))
        fine = [answer for answer in heard if answer[1][0]]
        reported.append(fine[0] if fine else min(heard, key=lambda answer: answer[1][2] % NEVER_US))
    return allowed or all(answer[0] or parts[0].flagged for (_, answer), parts in zip(reported, sets, strict=True)), reported


def padded(rule: CompiledRule, numbers: list[int]) -> list[int]:
    """As answers to leases have it, of a part of a rule with leases: nothing was taken ahead."""
    return [*numbers, 0] if rule.lease_units else numbers


def words_of(rule: CompiledRule, line: Sequence[str], now_us: int) -> list[Any]:
    """A rule as a script's header has it. A calendar's boundaries are those around now."""
    words = {word: getattr(rule, word) for word in line}
    if rule.calendar is not None:
        words |= zip(("unit_ticks", "drain_ticks", "coarse_us", "lead_us"), rule.calendar.around(now_us), strict=True)
    return list(words.values())


def make_call(
    checks: Sequence[Check],
    mode: str = "check",
    *,
    merge: bool = False,
    leases: Sequence[Lease] = (),
    joints: Sequence[JointCheck] = (),
    now_us: int = 0,
) -> Call:
    """A call as the script's header has it: a run for each check, or with `merge` as few runs as there can be."""
    parts = [part for joint in joints for alternatives in joint.sets for part in alternatives]
    named: list[tuple[CompiledRule, str]] = [(rule, key) for rule, key, _ in checks]
    named += [(one.rule, one.key) for one in [*leases, *parts]]
    keys = list(dict.fromkeys(key for _, key in named))
    rules = list(dict.fromkeys(rule for rule, _ in named))
    items: list[list[int]] = []
    for rule, key, cost in checks:
        item = [keys.index(key) + 1, rules.index(rule) + 1, cost, 1]
        if merge and items and items[-1][:3] == item[:3]:
            items[-1][3] += 1
        else:
            items.append(item)
    runs: list[list[int]] = []  # key_index, key_count, rule_index, cost, count
    for key_index, *what in items:
        if merge and runs and runs[-1][2:] == what and sum(runs[-1][:2]) == key_index:
            runs[-1][1] += 1
        else:
            runs.append([key_index, 1, *what])
    mode = f"{mode}_joint" if joints else mode
    args: list[Any] = [mode, EPOCH, len(rules), len(runs), len(leases), *([len(parts)] if joints else [])]
    for rule in rules:
        args += words_of(rule, script("decide").header["rule"], now_us)
    for run in runs:
        args += run
    for lease in leases:
        args += (keys.index(lease.key) + 1, rules.index(lease.rule) + 1, *lease[2:])
    for joint in joints:
        for s, alternatives in enumerate(joint.sets):
            for i, part in enumerate(alternatives):
                bits = BITS["joined"] * (s + i > 0) + BITS["alternative"] * (i > 0) + BITS["flagged"] * part.flagged
                args += (keys.index(part.key) + 1, rules.index(part.rule) + 1, part.cost, joint.count, bits)
    told = [(rules[rule_index - 1], cost, count) for _, rule_index, cost, count in items]
    told += [(lease.rule, lease.cost, lease.count) for lease in leases]
    return Call(keys, args, told, mode, len(leases), joints)


def make_settlement(corrections: Sequence[Correction], now_us: int = 0) -> Call:
    """A call with corrections that belong together."""
    keys, rules = [list(dict.fromkeys(each)) for each in ([one.key for one in corrections], [one.rule for one in corrections])]
    args: list[Any] = ["check_joint", EPOCH, len(rules), 0, 0, len(corrections)]
    for rule in rules:
        args += words_of(rule, script("decide").header["rule"], now_us)
    for i, (rule, key, units, granted_us) in enumerate(corrections):
        bits = BITS["joined"] * (i > 0) + BITS["charge" if granted_us is None else "refund"]
        args += (keys.index(key) + 1, rules.index(rule) + 1, units, 1 if granted_us is None else granted_us, bits)
    return Call(keys, args, [], "check_joint", 0)


def make_bookings(bookings: Sequence[Booking], now_us: int = 0) -> Call:
    """A call with bookings, which are decided one after the other."""
    keys, rules = [list(dict.fromkeys(each)) for each in ([one.key for one in bookings], [one.rule for one in bookings])]
    args: list[Any] = ["check_joint", EPOCH, len(rules), 0, 0, len(bookings)]
    for rule in rules:
        args += words_of(rule, script("decide").header["rule"], now_us)
    for booking in bookings:
        args += booking.part(keys.index(booking.key) + 1, rules.index(booking.rule) + 1)
    return Call(keys, args, [], "check_joint", 0)


def settled(corrections: Sequence[Correction | Booking], reply: list[Any]) -> tuple[list[PartAnswer], list[tuple[int, int]]]:
    """What each correction of such a call answers, and pairs of item and generation."""
    joint = JointCheck([[Part(one.rule, one.key, one.units)] for one in corrections])
    _, ((*answers,),), generations = Call([], [], [], "check_joint", 0, [joint]).split(reply)
    return [answer for (answer,) in answers], generations


def read_state(state: bytes | None) -> list[View] | None:
    """A state's header and views. How many digits the units of a sliding window have depends on its past, so they aren't in it."""
    if state is None:
        return None
    assert state.endswith(b";")
    return [read_view(text) for text in state.decode()[:-1].split(";")]


def read_view(text: str) -> View:
    """One view, and what docs/arithmetic.md promises of it."""
    if not text.startswith("s"):
        return text, []
    window_us, slot_us, units, past, last, width = map(int, text[1:].split(",")[:-1])
    older = text.rpartition(",")[2]
    digits = len(str((window_us + window_us // 8) // slot_us + 1))
    assert slot_us == 1 or digits == 2
    step, entries = digits + width, []
    assert len(older) % step == 0
    for i in range(0, len(older), step):
        slot, held = int(older[i : i + digits]), int(older[i + digits : i + step])
        entries.append(((last - (last - slot) % 10**digits) * slot_us, held))
    assert sum(held for _, held in entries) == past
    entries += [(last * slot_us, units)] if units else []
    assert entries == sorted(set(entries)), "they ascend"
    assert all(held > 0 for _, held in entries)
    return f"s{window_us},{slot_us},{units + past}", entries


class ClockedScript:
    """Calls the script at given times on a synchronous client, of a real Redis or of fakeredis."""

    def __init__(self, client: Any, text: str = CLOCKED, epoch: str = EPOCH) -> None:
        self.client = client
        self.sha = load(client, text)
        client.set(EPOCH_KEY, epoch)

    def send(self, target: Any, now_us: int, call: Call) -> Any:
        """Call on `target`, the client or a pipeline."""
        return target.evalsha(self.sha, 1 + len(call.keys), EPOCH_KEY, *call.keys, "id", *call.args, now_us)

    def call(self, now_us: int, checks: Sequence[Check], mode: str = "check", *, merge: bool = False) -> list[Answer]:
        """Decide, and return an answer for each check."""
        call = make_call(checks, mode, merge=merge, now_us=now_us)
        return call.answers(self.send(self.client, now_us, call))

    def lease(self, now_us: int, lease: Lease, mode: str = "check") -> list[int]:
        """Decide a lease alone, and return its numbers."""
        call = make_call([], mode, leases=[lease], now_us=now_us)
        return call.raw(self.send(self.client, now_us, call))[0]

    def state(self, key: str) -> bytes | None:
        """The stored state."""
        found: bytes | None = self.client.get(key)
        return found

    def forget(self, key: str) -> None:
        """Drop the stored state."""
        self.client.delete(key)


class ClockedServer:
    """All scripts of a server that forgets, at times of the test's choice, on the key "k"."""

    def __init__(self, client: Any, began_us: int) -> None:
        self.client, self.epoch = client, epoch_text(began_us, began_us)
        self.level_us = 0  # of the process that tells: it has told all
        client.flushall()
        self.decide = ClockedScript(client, epoch=self.epoch)
        self.scripts = {name: load(client, steered(name)) for name in ("repair", "reset", "beat")}

    def run(self, name: str, keys: list[str], now_us: int, *args: Any) -> list[Any]:
        reply: list[Any] = self.client.evalsha(self.scripts[name], 1 + len(keys), EPOCH_KEY, *keys, "id", *args, now_us)
        assert reply[0] == b"id"
        return reply[1:]

    def repair(self, mode: str, now_us: int, rule: CompiledRule, *item: int, keys: tuple[str, ...] = ("k",)) -> int:
        """How many items were taken in."""
        words = words_of(rule, script("repair").header["rule"], now_us)
        teller = ("p", self.level_us, 1) if mode == "assert" else ()
        at_us, applied = self.run("repair", list(keys), now_us, mode, self.epoch, 1, 1, *words, 1, 1, *item, *teller)
        assert at_us == now_us
        return int(applied)

    def tell(self, now_us: int, rule: CompiledRule, known: tuple[int, int, int], generation: int = 0, told_us: int = 0) -> int:
        return self.repair("assert", now_us, rule, generation, *known, told_us)

    def charge(self, now_us: int, rule: CompiledRule, marker: str, *charges: int) -> int:
        return self.repair(
            "charge", now_us, rule, min(charges[::2]), len(charges) // 2, *charges, keys=("k", f"charged:{marker}")
        )

    def check(self, now_us: int, rule: CompiledRule, cost: int = 1, mode: str = "check") -> list[int]:
        call = make_call([(rule, "k", cost)], mode, now_us=now_us)
        call.args[1] = self.epoch
        reply = self.decide.send(self.client, now_us, call)
        return call.raw(reply)[0]

    def left(self, now_us: int, rule: CompiledRule) -> int:
        call = make_call([(rule, "k", 1)], "peek", now_us=now_us)
        call.args[1] = self.epoch
        return call.answers(self.decide.send(self.client, now_us, call))[0][1]

    def state(self) -> Any:
        return read_state(self.decide.state("k"))
