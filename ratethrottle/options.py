"""The one table of options: the storages check their arguments by it, and errors and docs quote it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from ratethrottle.errors import ConfigurationError, shown


@dataclass(frozen=True, slots=True)
class Option:
    """One option of a storage. A number has a least and a most value, a word has choices; both may also be None if it is `optional`."""

    storage: str
    default: object
    unit: str = ""
    least: float = 1
    most: float = 0  # 0: it is no number
    choices: tuple[str, ...] = ()
    optional: bool = False
    words: str = ""  # of its range: more than numbers and choices say

    @property
    def range(self) -> str:
        """What it may be."""
        if self.words:
            return self.words
        if self.choices:
            *others, last = (f'"{choice}"' for choice in self.choices)
            return f"{', '.join(others)} or {last}"
        return f"{_number(self.least)} to {_number(self.most)}{', or None' if self.optional else ''}"

    @property
    def told(self) -> tuple[str, str, str, str]:
        """Its storage, default, unit and range, as docs and errors have them."""
        default = self.default
        text = f'"{default}"' if isinstance(default, str) else f"{default:,}" if isinstance(default, int) else str(default)
        return self.storage, text, self.unit, self.range

    def check(self, name: str, value: object) -> None:
        """Raise ConfigurationError unless it may be that."""
        if self.optional and value is None:
            return
        if self.choices:
            if value not in self.choices:
                raise ConfigurationError(f"{name} is {shown(value)}; it is {self.range}")
        elif self.unit == "seconds":
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not self.least <= value <= self.most:
                raise ConfigurationError(f"{name} is {shown(value)}; it is seconds, from {self.least} to {self.most}")
        elif self.most and (isinstance(value, bool) or not isinstance(value, int) or not self.least <= value <= self.most):
            raise ConfigurationError(f"{name} is {shown(value)}; it is a whole number from {self.least} to {self.most:,}")


def _number(number: float) -> str:
    text = f"{number:,}"
    return f"10^{text.count('0')}" if text.strip("0,") == "1" and number >= 10**8 else text


TABLE: Final[Mapping[str, Option]] = MappingProxyType(
    {
        "max_keys": Option("memory", 1_000_000, "keys", most=10**9),
        "on_full": Option("memory", "evict", choices=("evict", "deny")),
        "prefix": Option("redis", "ratethrottle", words="1 to 64 characters without spaces and braces"),
        "deadline": Option("redis", 0.25, "seconds", 0.005, 60),
        "connect_timeout": Option(
            "redis",
            None,
            "seconds",
            0.005,
            60,
            optional=True,
            words="0.005 to 60; None: 5, or the client's socket_connect_timeout if longer",
        ),
        "tags": Option("redis", 64, "hash tags", most=16_384),
        "tag_parts": Option("redis", None, "parts of a tuple key that decide its tag", most=64, optional=True),
        "connections": Option("redis", 1, "connections", most=8),
        "max_waiting": Option("redis", 100_000, "checks", most=1_000_000),
        "prefilter_ttl": Option("redis", 1.0, "seconds", 0, 60),
        "max_bounds": Option("redis", 100_000, "keys", most=10**8),
        "max_connections": Option("redis", 8, "connections", most=64),
        "on_outage": Option("redis", "local", choices=("local", "allow", "deny", "raise")),
        "expected_processes": Option("redis", None, "processes", most=100_000, optional=True),
        "on_overload": Option("redis", "deny", choices=("deny", "raise")),
        "sentinels": Option("redis", None, "addresses", words='1 to 32 of (host, port) or "host:port"'),
        "master_name": Option("redis", None, words="what the sentinels call the master; with sentinels only"),
    }
)
# name -> (storage, default, unit, range)
OPTIONS: Final[Mapping[str, tuple[str, str, str, str]]] = MappingProxyType({name: option.told for name, option in TABLE.items()})


def check_options(storage: str, given: Mapping[str, object]) -> None:
    """Check all options of a storage that are given. Raises ConfigurationError."""
    for name, option in TABLE.items():
        if option.storage == storage and name in given:
            option.check(name, given[name])
