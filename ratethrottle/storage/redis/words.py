"""What a server or the system said, as a message may repeat it: one line of bounded length, without a key, a password or an argument.

Redis quotes arguments in some errors; a proxy may repeat them without any marks. So words are kept by what they look like, and
what may be an argument becomes `…`.
"""

from __future__ import annotations

import errno
import os
import re
import socket
import ssl

from ratethrottle.storage.redis.scripts import commands

SAID_MAX = 200  # characters
READ_MAX = 1_000  # of a longer text no more is looked at
WORD_MAX = 40
HIDDEN = "…"
KEY = "…{"  # the same, while one of our keys may go on behind it

# What our connections run. In quotes too, these and what our scripts run are no arguments.
COMMANDS = frozenset(
    """
    AUTH CLIENT DEL ECHO EVAL EVALSHA GET-MASTER-ADDR-BY-NAME HELLO INFO LOAD PING ROLE SCAN SCRIPT SELECT SENTINEL SETINFO SETNAME
    SUBSCRIBE UNLINK
    """.split()  # noqa: SIM905  # a list would be four pages long
)
# Settings and their values, which Redis quotes as well.
SETTINGS = frozenset({"maxmemory", "no", "yes"})
# Behind one of these a secret or a name may follow; only these others don't look like one.
TELLING = frozenset(
    "auth credential credentials hello key login name pass passphrase passwd password secret token user username".split()  # noqa: SIM905  # one line of words, not twenty of strings
)
ORDINARY = frozenset(
    """
    a access after all allowed an and any are as at authenticate authentication before been but by called can can't cannot client command
    commands configuration configured connection contains correct could default denied disabled does doesn't don't error executing exists
    expired failed first for forbidden found given has have haven't here holding i in incorrect instead invalid is isn't know known may
    missing must needed no noauth noperm not of on only or pair password permissions permitted please provided proxy rejected required
    server set subcommand supported sure than that the this to too unknown unsupported user username used was were when with without
    wrong wrongpass you your
    """.split()  # noqa: SIM905  # as above
)

# Where Redis says in which script it was, and what it was given.
IN_SCRIPT = re.compile(r"\s*,?\s*script: (?:[0-9a-f]{40}, )?on @?\w+:\d+\.?\s*$")
ARGUMENTS = re.compile(r",?\s*\bwith args\b.*", re.IGNORECASE)
# Marks open before a word and close behind one, so that the apostrophe in "can't" is none of them.
QUOTED = re.compile(
    r"""(?<![^\s(\[{=:,])(?:'(.*?)(?:'(?=[\s)\]}.,;:!?]|$)|$)|"(.*?)(?:"|$)|`(.*?)(?:[`']|$)|‘(.*?)(?:’|$)|“(.*?)(?:”|$))"""
)
PLAIN = re.compile(r"HTTP/\d\.\d|[^\W\d_]+(?:['’/_-][^\W\d_]+)*|\d{1,10}(?:\.\d{1,6})?%?|@?user_script:\d+|<[a-z]+>|[^\w\s]{1,3}")
# Our keys are `prefix:{tag}:rule:=key`, and a user's key may hold anything, spaces too.
IN_KEY = re.compile(r"[:{=]")
# What asyncio raises without a number.
BARE = {
    BrokenPipeError: errno.EPIPE,
    ConnectionAbortedError: errno.ECONNABORTED,
    ConnectionRefusedError: errno.ECONNREFUSED,
    ConnectionResetError: errno.ECONNRESET,
}
ERRNO = re.compile(r"\[Errno (\d{1,5})\]")


def one_line(text: str) -> str:
    """Make one line of a text, without control characters (they could forge a line of a log) and of bounded length."""
    line = " ".join("".join(letter if letter.isprintable() else " " for letter in text[:READ_MAX]).split())
    return line if len(line) <= SAID_MAX else line[: SAID_MAX - 1] + HIDDEN


def masked(text: str) -> str:
    """Give back what a server said, with `…` for what may be an argument: a key, a password, or a script's text."""
    line = " ".join("".join(letter if letter.isprintable() else " " for letter in text[:READ_MAX]).split())
    line = ARGUMENTS.sub("", IN_SCRIPT.sub("", line))
    line = QUOTED.sub(_quoted, line)
    kept: list[str] = []
    telling = False
    for token in line.split():
        word = token.strip("()[]{},.;:!?'\"")
        if token.startswith(KEY) or (token[-1] in "'\"" and not _names_command(word) and word not in SETTINGS):
            kept.append(HIDDEN)  # nothing tells where a key ends, or what was in marks that are inside others
            break
        plain = word in ("", HIDDEN) or (len(word) <= WORD_MAX and PLAIN.fullmatch(word)) or _names_command(word)
        if telling and word.lower() not in ORDINARY | TELLING and word != "" and not word.startswith("<"):
            plain = False
        else:
            telling = word.lower() in TELLING or (telling and word == "")
        kept.append(token if plain else HIDDEN)
        if not plain and IN_KEY.search(word):
            break
    found = re.sub(rf"{HIDDEN}(?: {HIDDEN})+", HIDDEN, " ".join(kept))
    return found if len(found) <= SAID_MAX else found[: SAID_MAX - 1] + HIDDEN


def without(text: str, secret: str) -> str:
    """Give back a text without a secret that is known. Within a word it is left, or a short one would make a riddle of the text."""
    return re.sub(rf"(?<!\w){re.escape(secret)}(?!\w)", HIDDEN, text) if secret else text


def _quoted(found: re.Match[str]) -> str:
    inner = next((group for group in found.groups() if group is not None), "")
    return f"'{inner}'" if _names_command(inner) or inner in SETTINGS else KEY if "{" in inner else HIDDEN


def _names_command(word: str) -> bool:
    return bool(word) and all(part.upper() in COMMANDS or part.upper() in commands() for part in re.split(r"[|\s]", word))


def system_words(error: BaseException) -> str:
    """Say what the system said, with its kind: `ConnectionRefusedError: [Errno 111] Connection refused`."""
    kind = type(error).__name__
    if isinstance(error, ssl.SSLError):
        why = getattr(error, "verify_message", "") or getattr(error, "reason", None) or ""
    elif isinstance(error, (socket.gaierror, socket.herror)):
        why = str(error.args[1]) if len(error.args) > 1 else ""
    elif isinstance(error, OSError):
        why = _errno_words(error)
    else:
        why = masked(str(error))
    return one_line(f"{kind}: {why}" if why else kind)


def _errno_words(error: OSError) -> str:
    """Word it from its numbers: the text may name a path, and that of several attempts at once is long."""
    numbers = [error.errno] if error.errno else [int(number) for number in ERRNO.findall(str(error)[:READ_MAX])]
    if not numbers and not error.args:
        numbers = [number for kind, number in BARE.items() if isinstance(error, kind)]
    if numbers:
        return ", ".join(f"[Errno {number}] {os.strerror(number)}" for number in dict.fromkeys(numbers))
    return masked(str(error))
