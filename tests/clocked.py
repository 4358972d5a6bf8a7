"""The decision script with a clock of the test's own: what it is given as the last argument stands in for TIME."""

from __future__ import annotations

from typing import Any

from ratethrottle._core import CompiledRule
from ratethrottle.storage.redis.scripts import script

TIME = "redis.call('TIME')"
EXPIRY = ", 'PX', format('%.0f', ceil_div(reset, 1000) + 1))"
TEXT = script("decide").text.decode()
assert TEXT.count(TIME) == TEXT.count(EXPIRY) == 1
# The server would expire keys by its own clock, which stands still for the test's.
CLOCKED = "local test_now = table.remove(ARGV)\n" + TEXT.replace(
    TIME, "{string.sub(test_now, 1, -7), string.sub(test_now, -6)}"
).replace(EXPIRY, ")")

Check = tuple[CompiledRule, str, int]  # rule, key, cost
Answer = tuple[bool, int, int, int]  # allowed, remaining, retry_us, reset_us


def arguments(checks: list[Check], mode: str) -> tuple[list[str], list[Any]]:
    """Keys and arguments of a call, as the script's header has them, without the request id."""
    keys: list[str] = []
    rules: list[CompiledRule] = []
    numbers: list[int] = []
    for rule, key, cost in checks:
        if key not in keys:
            keys.append(key)
        if rule not in rules:
            rules.append(rule)
        numbers += (keys.index(key) + 1, rules.index(rule) + 1, cost)
    args: list[Any] = [mode, len(rules), len(checks)]
    for rule in rules:
        args += (getattr(rule, word) for word in script("decide").header["rule"])
    return keys, args + numbers


class ClockedScript:
    """Calls the script at given times on a synchronous client, of a real Redis or of fakeredis."""

    def __init__(self, client: Any) -> None:
        self.client = client
        self.sha = client.script_load(CLOCKED)

    def queue(self, target: Any, now_us: int, checks: list[Check], mode: str = "check") -> Any:
        """Call on `target`, the client or a pipeline."""
        keys, args = arguments(checks, mode)
        return target.evalsha(self.sha, len(keys), *keys, "id", *args, now_us)

    def call(self, now_us: int, checks: list[Check], mode: str = "check") -> list[Answer]:
        """Decide, and return an answer for each check."""
        return answers(self.queue(self.client, now_us, checks, mode))

    def state(self, key: str) -> bytes | None:
        """The stored state."""
        found: bytes | None = self.client.get(key)
        return found

    def forget(self, key: str) -> None:
        """Drop the stored state."""
        self.client.delete(key)


def answers(reply: list[Any]) -> list[Answer]:
    """A reply's decisions."""
    assert reply[0] == b"id"
    numbers = reply[2:]
    return [(bool(numbers[i]), *numbers[i + 1 : i + 4]) for i in range(0, len(numbers), 4)]
