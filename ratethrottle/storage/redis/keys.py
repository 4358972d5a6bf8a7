"""Where a state lives in Redis: `prefix:{tag}:rule:=key` (DESIGN: key layout).

The tag is of the key alone, so that all rules of a key share a slot of a cluster. The key comes last and is marked `=` (as it
is), `(` (a tuple, joined as netstrings) or `#` (a digest of a long one), so that no two keys collide.
"""

from __future__ import annotations

import hashlib
import re
from zlib import crc32

from ratethrottle._core import Entry
from ratethrottle.errors import ConfigurationError

KEY_BYTES_MAX = 128
TAGS_MAX = 16_384  # the slots of a cluster
PREFIX = re.compile(r"[^{}\s\ud800-\udfff]{1,64}\Z")


class KeyLayout:
    """Names the state keys of one storage. Raises ConfigurationError for a bad prefix or number of tags."""

    def __init__(self, prefix: str, tags: int) -> None:
        if not isinstance(prefix, str) or not PREFIX.match(prefix):
            raise ConfigurationError(f"prefix is {prefix!r}; it is 1 to 64 characters without spaces and braces")
        if isinstance(tags, bool) or not isinstance(tags, int) or not 1 <= tags <= TAGS_MAX:
            raise ConfigurationError(f"tags is {tags!r}; it is a whole number from 1 to {TAGS_MAX}")
        self._prefix = prefix.encode()
        self._tags = tags

    def state_key(self, entry: Entry) -> bytes:
        """Name the key of the entry's state."""
        canonical = entry.canonical
        tag = crc32(canonical[1:]) % self._tags
        if len(canonical) > KEY_BYTES_MAX + 1:
            canonical = b"#" + hashlib.blake2b(canonical, digest_size=16).hexdigest().encode()
        return b"%b:{%d}:%b:%b" % (self._prefix, tag, entry.rule.name.encode(), canonical)
