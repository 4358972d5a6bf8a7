"""What the storages of one process share: to Redis, those that keep the same keys are one process.

They share the limits as one, have one table of what is known of each key, one count of the slots that they hold, and one account of
what was admitted while Redis was away.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Hashable
from typing import Final

from ratethrottle.storage._shared.repair import Repair
from ratethrottle.storage.redis.holders import Here


class Sharing:
    """The repairs of this process, by the keys that they are of, for as long as a storage has them. For all threads."""

    def __init__(self) -> None:
        self._known: weakref.WeakValueDictionary[Hashable, Repair] = weakref.WeakValueDictionary()
        self._lock = threading.Lock()
        self._held: weakref.WeakKeyDictionary[Repair, Here] = weakref.WeakKeyDictionary()
        # Another thread may hold it while this one forks.
        os.register_at_fork(after_in_child=self._renew)

    def _renew(self) -> None:
        self._lock = threading.Lock()
        for here in list(self._held.values()):
            here.begin()

    def find(self, what: Hashable, user: object, make: Callable[[], Repair]) -> Repair:
        """Return what an open storage of this process knows of the very same keys, or else something new, as one more user of it."""
        with self._lock:
            found = self._known.get(what)
            if found is None or not found.users:
                found = self._known[what] = make()
            found.users.add(user)
            return found

    def held(self, repair: Repair) -> Here:
        """Return what this process holds of slots, by what `find` returned."""
        with self._lock:
            here = self._held.get(repair)
            if here is None:
                here = self._held[repair] = Here()
            return here


SHARING: Final = Sharing()
