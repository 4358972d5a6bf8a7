"""The errors, all of them under `RateThrottleError`.

    RateThrottleError
    ├── ConfigurationError (ValueError)
    ├── InvalidRequest (ValueError)
    │   └── CostExceedsLimit
    ├── RateLimitExceeded
    ├── LimiterClosed
    └── StorageError
        ├── StorageUnavailable (ConnectionError)
        │   └── StorageRefused
        ├── StorageTimeout (TimeoutError)
        └── StorageProtocolError
            └── StateUnreadable

Being denied is a value, not an error, but for `acquire`, `limit`, `reserve` and `slot`. No message holds a password or a key.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection
from itertools import islice
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ratethrottle._engine.decision import Decision


def shown(value: object) -> str:
    """Give a value as a message may show it: its repr, of at most 60 characters. Never raises; not for keys and URLs."""
    try:
        text = repr(value)
    except Exception:  # noqa: BLE001  # somebody else's __repr__, or an int of more digits than Python prints
        return f"some {type(value).__name__} that can't be shown"
    return text if len(text) <= 60 else f"{text[:57]}..."


SHOWN_NAMES = 5
COMPARED_NAMES = 100  # an error must come at once, also with 100,000 names
SLIPPED_LETTERS = 40  # a longer name isn't looked for with one letter changed
NAME_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-"


def few(names: Collection[str], wrong: str = "") -> list[str]:
    """Pick at most five names to show, those nearest to `wrong` first.

    The time is bounded, whatever the number of names: one that differs in one letter is found among any number, other near ones
    among the first 100.
    """
    compared = list(islice(names, COMPARED_NAMES))
    near = []
    if 0 < len(wrong) <= SLIPPED_LETTERS:
        found = [*(slip for slip in slips(wrong) if slip in names), *difflib.get_close_matches(wrong, compared, SHOWN_NAMES)]
        near = difflib.get_close_matches(wrong, list(dict.fromkeys(found)), SHOWN_NAMES)
    others = [name for name in compared if name not in near]
    return [*near, *(sorted(others) if len(names) <= COMPARED_NAMES else others)][:SHOWN_NAMES]


def listed(names: Collection[str], wrong: str = "") -> str:
    """Name at most five of them, those nearest to `wrong` first, and say how many more there are; "" for none."""
    return ", ".join(few(names, wrong)) + more(names)


def more(names: Collection[str]) -> str:
    """Say how many names `few` leaves out; "" for none."""
    return f" and {len(names) - SHOWN_NAMES:,} more" if len(names) > SHOWN_NAMES else ""


def slips(name: str) -> set[str]:
    """Everything that becomes `name` by one slip: a letter too many, too few or wrong, two swapped, or the case."""
    found = {name.lower(), name.upper()}
    for i in range(len(name) + 1):
        head, tail = name[:i], name[i:]
        found |= {head + tail[1:], head + tail[1:2] + tail[:1] + tail[2:]}
        found |= {head + letter + rest for letter in NAME_LETTERS for rest in (tail, tail[1:])}
    return found


class RateThrottleError(Exception):
    """Any error of this library."""


class ConfigurationError(RateThrottleError, ValueError):
    """A rule, an option or a storage can't be what was asked for. Says what would be accepted."""


class InvalidRequest(RateThrottleError, ValueError):
    """A call has a bad key, rule, cost or timeout. Raised before any I/O; nothing was consumed."""


class CostExceedsLimit(InvalidRequest):
    """The cost is above the rule's capacity, so that waiting would never help."""

    def __init__(self, cost: int, capacity: int, rule: str) -> None:
        """Word it from the cost and the capacity (units) and the rule's name."""
        super().__init__(cost, capacity, rule)
        self.cost = cost
        self.capacity = capacity
        self.rule = rule

    def __str__(self) -> str:
        return (
            f"a cost of {shown(self.cost)} can never be allowed: rule {self.rule!r} has a capacity of {self.capacity}; "
            "split the request or raise the limit"
        )


class RateLimitExceeded(RateThrottleError):
    """`acquire`, `limit`, `reserve` or `slot` could not grant a request in time. `.decision` says for how long it is denied."""

    def __init__(self, decision: Decision) -> None:
        """Word it from the decision, which stays available as `.decision`."""
        super().__init__(decision)
        self.decision = decision

    def __str__(self) -> str:
        denied = self.decision
        if denied.retry_after == float("inf"):
            when = "it can never be allowed: raise the limit, or ask for less"
        elif denied.retry_after == 0 and denied.source == "outage":
            when = "the storage didn't answer in time: retry later, or wait for a slot with a timeout"
        elif denied.retry_after == 0:
            when = "nobody knows when a slot is given back: retry later, or wait for it with a timeout"
        elif denied.source in ("outage", "overload"):
            when = f"the storage didn't answer in time: retry in {denied.retry_after:.6g} s"
        else:
            when = f"retry in {denied.retry_after:.6g} s"
        return f"rule {denied.rule!r} denied a cost of {denied.cost} with {denied.remaining} of {denied.limit} left; {when}"


class LimiterClosed(RateThrottleError):
    """The limiter was used after `aclose`."""

    def __str__(self) -> str:
        return "the limiter is closed; make a new one"


class StorageError(RateThrottleError):
    """The shared state couldn't be asked."""


class StorageUnavailable(StorageError, ConnectionError):
    """The storage can't be reached, or can't serve us now."""


class StorageRefused(StorageUnavailable):
    """Redis refuses us, or we its certificate: password, permission, TLS or a wrong setting. Waiting doesn't help.

    Raised under every outage policy, since none of them is meant for it.
    """


class StorageTimeout(StorageError, TimeoutError):
    """No answer came within the deadline. The check may have been counted."""

    def __init__(self, deadline_s: float) -> None:
        """Word it from the deadline in seconds."""
        super().__init__(deadline_s)
        self.deadline_s = deadline_s

    def __str__(self) -> str:
        return f"no answer from the storage within {self.deadline_s} s"


class StorageProtocolError(StorageError):
    """The storage answered with something that isn't a reply of ours."""


class StateUnreadable(StorageProtocolError):
    """What the storage holds of this key under this rule isn't a state that this version reads.

    Another version wrote it, somebody else did, or it was damaged. Raised under every outage policy, for the checks of this key
    alone. Nothing was consumed or changed; `reset` mends it.
    """

    def __init__(self, rule: str) -> None:
        """Word it from the rule's name."""
        super().__init__(rule)
        self.rule = rule

    def __str__(self) -> str:
        return (
            f"the state of a key of rule {self.rule!r} can't be read: another version of ratethrottle wrote it, or something else; "
            "reset the key, or finish the upgrade"
        )
