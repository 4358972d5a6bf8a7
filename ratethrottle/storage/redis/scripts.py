"""The Lua scripts, one file per operation, and what their headers say of keys, arguments and reply."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from hashlib import sha1
from importlib.resources import files

from ratethrottle.errors import ConfigurationError

HEADER = re.compile(r"^--- (\w+): (.*)$", re.MULTILINE)
INCLUDED = re.compile(r"^ *-- include (\w+)\.lua$", re.MULTILINE)
CALLED = re.compile(rb"""\bp?call\(\s*(?:call,\s*)?['"](\w+)""")
SHEBANG = b"#!lua\n"
NAMES = ("beat", "decide", "repair", "reset")
LATER = ("slots",)  # not loaded by a new connection, but with the first call that needs it
INCLUDED_PARTS = ("dated", "joint", "simple")  # stand where a script says so
PARTS = ("state", "telling", "item", *INCLUDED_PARTS)  # the others stand in front of scripts
SHARED = {"beat": ("telling",), "clear": (), "decide": ("state", "item"), "repair": ("state", "telling")}


@dataclass(frozen=True, slots=True)
class Script:
    """One script as text, what it shares with others included, and its header's words by line.

    What Python sends and reads is named there and nowhere else.
    """

    name: str
    text: bytes
    header: dict[str, tuple[str, ...]]

    @property
    def limits(self) -> dict[str, int]:
        """How many keys, rules and items a call may have."""
        return {name: int(most) for name, _, most in (word.partition("=") for word in self.header["limits"])}

    def body(self, shebang: bool) -> bytes:
        """Return what to load. With `#!lua` Redis 7 refuses the script on a demoted replica before it runs."""
        return SHEBANG + self.text if shebang else self.text

    def sha(self, shebang: bool) -> bytes:
        """Return the name that EVALSHA calls it by."""
        return sha1(self.body(shebang), usedforsecurity=False).hexdigest().encode()


@cache
def script(name: str) -> Script:
    """Read `lua/<name>.lua`, behind what it shares with others. Raises ConfigurationError if the package was installed without them."""
    text = _text(name)
    shared = [_text(part) for part in SHARED.get(name, ("state",))]
    return Script(name, "\n".join([*shared, text]).encode(), {line: tuple(words.split()) for line, words in HEADER.findall(text)})


def _text(name: str) -> str:
    try:
        text = files(__package__).joinpath("lua", f"{name}.lua").read_text("ascii")
    except (OSError, UnicodeDecodeError, ImportError) as error:
        raise ConfigurationError(_missing(name)) from error
    if name not in PARTS and not HEADER.search(text):
        raise ConfigurationError(_missing(name))
    return INCLUDED.sub(lambda found: _text(found[1]), text)


def _missing(name: str) -> str:
    return (
        f"the package ratethrottle is incomplete: its file storage/redis/lua/{name}.lua is missing or damaged, and RedisStorage needs it; "
        "install it again, with its data files (PyInstaller: --collect-all ratethrottle)"
    )


@cache
def commands(names: tuple[str, ...] = (*NAMES, *LATER)) -> frozenset[str]:
    """Name the commands that these scripts run. Raises ConfigurationError as `script` does."""
    return frozenset(command.decode() for name in names for command in CALLED.findall(script(name).text))


def check_installed() -> None:
    """Read all scripts. Raises ConfigurationError if one of them isn't there."""
    for name in (*NAMES, *LATER, "clear"):
        script(name)
