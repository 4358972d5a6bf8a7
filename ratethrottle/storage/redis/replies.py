"""Error replies: what each says of Redis, whether that can heal by itself, and what to do.

Three kinds. What heals is an outage. What doesn't is a refusal. Of the rest nobody knows, until it has come back a few times.
"""

from __future__ import annotations

import re
import time
from typing import NamedTuple

from ratethrottle.errors import StorageError, StorageProtocolError, StorageRefused, StorageUnavailable
from ratethrottle.storage.redis.words import IN_SCRIPT, READ_MAX, masked

# What an ACL gives our user, beside a password and the keys of our prefix. docs/operations.md has the whole line.
RIGHTS = "-@all +@read +@write -@dangerous -@scripting +eval +evalsha +script|load +script|exists +info +role +time +select +client|setname"
NEEDED = "AUTH (with a password), SELECT (with a database), CLIENT (with a client_name), INFO, SCRIPT LOAD, EVAL and EVALSHA"

# How often the same words are an outage before they are a refusal.
SAME_MAX = 3
# What several connections hear in the same moment is one answer.
SAME_MOMENT_S = 0.25

LAYOUT = re.compile(r"RATETHROTTLE layout tags=(\d+),parts=(\d+) is in use, not tags=(\d+),parts=(\d+)")
OURS = re.compile(r"RATETHROTTLE ([a-z0-9 ,]+)")
# The first word of an error reply. redis-py takes it away if it has a class for it.
CODE = re.compile(r"[A-Z]{2,20}\b")
NO_ROOM = re.compile(
    r"""
    max(?:imum)?\.?\ (?:number\ of\ )?(?:\w+\ )?(?:clients|connections)
    | too\ many\ (?:open\ )?(?:\w+\ )?(?:clients|connections)
    | (?:clients?|connections?)\b.{0,40}\b(?:limit|quota|max\w*|exceed\w*|exhaust\w*) | (?:limit|quota)\b.{0,40}\b(?:clients|connections)
    """,
    re.IGNORECASE | re.VERBOSE,
)
UNWELCOME = r"""
    ^(?:NOAUTH|WRONGPASS)\b
    | (?i: authentication\ (?:failed|required|error) | invalid\ (?:user\s?name|password|credentials?) | wrong\ pass\w*
    | \bAUTH\b.{0,40}\b(?:no|without\ any)\ password )
"""
NOT_SERVED = r"""(?i:
    un(?:supported|implemented|recogni[sz]ed|authori[sz]ed) | unknown\ (?:\w+\ )?(?:sub)?command | unknown\ operation
    | not\ (?:been\ )?(?:supported|implemented|recogni[sz]ed|allowed|permitted|enabled|authori[sz]ed|a\ (?:valid|known)\ command)
    | (?:is|are)n't\ (?:supported|implemented|allowed|permitted|enabled|known)
    | forbidden | disallowed | disabled | prohibited | blacklisted | blocklisted
    | no\ (?:such|permissions?|support|rights?)\b | permission | privilege | denied
    | (?:invalid|illegal|bad|undefined|undeclared|nonexistent)\ (?:\w+\ )?(?:sub)?command
    | \b(?:(?:sub)?command|AUTH|CLIENT|EVAL|EVALSHA|INFO|ROLE|SCRIPT|SELECT)\b.{0,60}\b(?:not\ (?:found|available|known|exist\w*)
      | unavailable|unknown|invalid|illegal|undefined|blocked|restricted|rejected|refused|removed|renamed)\b
    | (?:can't|cannot|can\ not|may\ not|must\ not|not\ able\ to)\ (?:run|execute|call|use|access|serve)\b
    | do(?:es)?(?:n't|\ not)\ (?:know|support|exist|implement|allow|recogni[sz]e|understand)
)"""
# A proxy says so while what is behind it is away.
PASSING = r"""(?i:
    problem\ with\ ldap\ service | closed\ the\ connection | connection\ (?:was\ )?(?:refused|reset|closed|lost|failed)
    | \b(?: upstream | backend | temporar\w+ | (?:try|retry)\ (?:it\ )?(?:again|later) | unavailable | overload\w* | busy | loading
    | time[sd]?[\ -]?out | starting | start\ up | shutting\ down | shutdown | failover | not\ (?:yet\ )?(?:ready|available|connected)
    | (?:can't|cannot|unable\ to)\ connect | too\ many | throttl\w+ | quota | rate\ limit\w* | no\ (?:healthy|available|alive|live)
    | down )\b
)"""


class Kind(NamedTuple):
    """One kind of error reply. pattern: in the reply as it is shown, behind its first word. words: {said} stands for the reply."""

    pattern: re.Pattern[str]
    ours: type[StorageUnavailable | StorageProtocolError]
    words: str
    guessed: bool = False  # nobody knows whether that heals


def _kind(pattern: str, ours: type[StorageUnavailable | StorageProtocolError], words: str, *, guessed: bool = False) -> Kind:
    return Kind(re.compile(pattern, re.VERBOSE), ours, words, guessed)


# The first that matches decides. Those that begin with a code of Redis come first: its texts hold words of the others.
KINDS = (
    _kind(r"^(?:BUSY|UNKILLABLE)\b", StorageUnavailable, "Redis is busy with somebody's script{said}"),
    _kind(r"^CLUSTERDOWN\b", StorageUnavailable, "Redis is part of a cluster that is down{said}"),  # a proxy may hide the cluster
    _kind(r"^LOADING\b", StorageUnavailable, "Redis is still loading its data{said}"),
    _kind(
        r"^(?:MASTERDOWN|NOMASTERLINK)\b",
        StorageUnavailable,
        "Redis is a replica without its master{said}; connect to the master",
    ),
    _kind(r"^MISCONF\b", StorageUnavailable, "Redis can't save its data, and takes no writes until it can{said}"),
    _kind(r"^NOREPLICAS\b", StorageUnavailable, "Redis has fewer replicas than its min-replicas-to-write{said}"),
    _kind(r"^OOM\b", StorageUnavailable, "Redis is out of memory, by its maxmemory{said}"),
    _kind(
        r"^READONLY\b",
        StorageUnavailable,
        "Redis is a read-only replica{said}; connect to the master, or through its sentinels",
    ),
    _kind(r"^TRYAGAIN\b", StorageUnavailable, "Redis is moving keys, and asks to be tried again{said}"),
    _kind(
        r"^(?:ASK|CROSSSLOT|MOVED)\b | not\ allowed\ in\ cluster\ mode",
        StorageRefused,
        "Redis is part of a cluster{said}, and clusters are not supported yet; connect to a single server",
    ),
    _kind(
        r"^DENIED\b | (?i:protected\ mode)",
        StorageRefused,
        "Redis is in protected mode{said}, and serves only its own machine; set a password or a user there, and give it to the client",
    ),
    _kind(UNWELCOME, StorageRefused, "Redis refused the user or the password{said}; check the client's credentials"),
    _kind(
        NO_ROOM.pattern.join(("(?i:", ")")),
        StorageUnavailable,
        "Redis has no room for another client{said}; raise its maxclients, or find who holds so many connections",
    ),
    _kind(
        r"^NOPERM\b | (?i: acl\ failure\ in\ script | the\ user\ executing\ the\ script )",
        StorageRefused,
        "the Redis user may not run our scripts{said}; {permit}",
    ),
    _kind(
        r"(?i: unknown\ (?:\w+\ )?command\ called\ from\ script )",
        StorageRefused,
        "Redis doesn't know a command that our scripts need{said}; was it renamed or disabled, or is this a Redis older than 7?",
    ),
    _kind(
        r"(?i: db\ index )",
        StorageRefused,
        "Redis has no database of this number{said}; check the end of the URL, or the client's db",
    ),
    _kind(
        r"user_script | running\ script | ^WRONGTYPE\b | @script$",
        StorageProtocolError,
        "the script failed on the server{said}; is a key of ours written by somebody else?",
        guessed=True,
    ),
    _kind(
        NOT_SERVED,
        StorageRefused,
        "Redis, or a proxy before it, doesn't serve a command that we need{said}; we need {needed}: were they renamed or disabled?",
    ),
    _kind(PASSING, StorageUnavailable, "Redis, or a proxy before it, can't serve us now{said}"),
    _kind("", StorageUnavailable, "Redis refuses to serve us{said}", guessed=True),
)


class Meaning(NamedTuple):
    """What an error reply is: the error of ours, its words, and whether that was only a guess."""

    ours: type[StorageUnavailable | StorageProtocolError]
    words: str
    guessed: bool = False

    @property
    def error(self) -> StorageError:
        """Make a new one."""
        return self.ours(self.words)


def _layout(tags: str, parts: str) -> str:
    """Write what names keys as the options of a storage."""
    return f"tags={tags}" + (f", tag_parts={parts}" if parts != "0" else "")


def meaning(text: str, code: str = "") -> Meaning:
    """Say what an error reply means: its text without the `-`. code: its first word, if that was taken away."""
    layout = LAYOUT.search(text)
    if layout:
        return Meaning(
            StorageRefused,
            f"Redis has keys under this prefix that are called by {_layout(layout[1], layout[2])}, and this storage has "
            f"{_layout(layout[3], layout[4])}, so that they would share nothing; give all processes the same, or delete the prefix's "
            "key `layout` once none is left that has the former",
        )
    own = OURS.search(text)
    if own:
        return Meaning(StorageProtocolError, f"the script refused the call: {own[1].strip()}")
    shown = masked(text.removeprefix("ERR "))
    looked_at = f"{code} {shown}{' @script' if IN_SCRIPT.search(text[-READ_MAX:]) else ''}".strip()
    kind = next(kind for kind in KINDS if kind.pattern.search(looked_at))
    said = f' ("{shown}")' if shown else ""
    return Meaning(kind.ours, kind.words.format(said=said, permit=_permit(shown), needed=NEEDED), kind.guessed)


def _permit(shown: str) -> str:
    """Say what to allow."""
    named = re.search(r"the '([a-z|-]{1,40})' command", shown)
    if re.search(r"\bkeys?\b", shown):
        return "allow it the keys of our prefix (~prefix:*)"
    return f"allow it +{named[1]}; all that we need is {RIGHTS}" if named else f"allow it {RIGHTS}"


class Repeated:
    """Tells a refusal by its coming back: the same words, `SAME_MAX` times, without another outcome in between.

    The connections of a storage share it.
    """

    def __init__(self) -> None:
        self._step = ""  # what was answered: "connecting", or the name of a script
        self._words = ""
        self._count = 0
        self._connection = 0
        self._at_s = 0.0

    def judge(self, step: str, connection: object, found: StorageError, guess: Meaning | None) -> StorageError:
        """Give back what was found, or the refusal that it has become. guess: what the reply means, if that was guessed."""
        if guess is None:
            self._count = 0
            return found
        now_s = time.monotonic()
        if not self._count or (step, guess.words) != (self._step, self._words):
            self._count, self._step, self._words = 0, step, guess.words
        elif id(connection) != self._connection and now_s - self._at_s < SAME_MOMENT_S:
            return self._judged(found)
        self._count += 1
        self._connection, self._at_s = id(connection), now_s
        return self._judged(found)

    def _judged(self, found: StorageError) -> StorageError:
        if self._count < SAME_MAX:
            return found
        refused = StorageRefused(
            f"{self._words}; the same came {SAME_MAX} times, so it is taken for a refusal until another answer comes"
        )
        refused.__cause__ = found.__cause__
        return refused

    def went(self, *steps: str) -> None:
        """Take note that one of these has gone well."""
        if self._step in steps:
            self._count = 0
