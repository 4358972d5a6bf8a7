"""The Lua scripts, one file per operation, and what their headers say of keys, arguments and reply."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from hashlib import sha1
from importlib.resources import files

HEADER = re.compile(r"^--- (\w+): (.*)$", re.MULTILINE)
SHEBANG = b"#!lua\n"
ALONE = {"beat"}  # reads no states


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
        """How many keys, rules and entries a call may have."""
        return {name: int(most) for name, _, most in (word.partition("=") for word in self.header["limits"])}

    def body(self, shebang: bool) -> bytes:
        """Return what to load. With `#!lua` Redis 7 refuses the script on a demoted replica before it runs."""
        return SHEBANG + self.text if shebang else self.text

    def sha(self, shebang: bool) -> bytes:
        """Return the name that EVALSHA calls it by."""
        return sha1(self.body(shebang), usedforsecurity=False).hexdigest().encode()


@cache
def script(name: str) -> Script:
    """Read `lua/<name>.lua`, behind `lua/state.lua`. Raises FileNotFoundError if the package was installed without them."""
    folder = files(__package__).joinpath("lua")
    text = folder.joinpath(f"{name}.lua").read_text("ascii")
    shared = "" if name in ALONE else folder.joinpath("state.lua").read_text("ascii") + "\n"
    return Script(name, (shared + text).encode(), {line: tuple(words.split()) for line, words in HEADER.findall(text)})
