"""A connection whose replies were late: it is heard for what its leases took, and decides nothing any more."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable

from redis.asyncio.connection import AbstractConnection

from ratethrottle.storage._shared.late import LateReplies
from ratethrottle.storage.redis.settings import abort
from ratethrottle.storage.redis.wire import Receiver, take_over

# How long such a connection is heard.
LATE_S = 10.0


class Overdue:
    """At most one such connection. `discard` closes it once there is nothing more to hear on it, or it has taken too long."""

    def __init__(self, context: contextvars.Context, discard: Callable[[AbstractConnection], None]) -> None:
        self._context = context
        self._discard = discard
        self._heard: tuple[AbstractConnection, Receiver, asyncio.TimerHandle] | None = None

    def hear(self, connection: AbstractConnection, late: LateReplies) -> None:
        """Go on hearing a connection that a `Connection` has given up."""
        self.forget()

        def received(data: bytes) -> None:
            if not late.received(data):
                self.forget()

        receiver = Receiver(received, lambda _: self.forget())
        take_over(connection, receiver)  # a new one, as uvloop calls what it was given at first
        timer = asyncio.get_running_loop().call_later(LATE_S, self.forget, context=self._context)
        self._heard = connection, receiver, timer

    def forget(self) -> None:
        """Hear nothing more on it."""
        if self._heard is not None:
            connection, receiver, timer = self._heard
            self._heard = None
            timer.cancel()
            receiver.let_go()
            abort(connection)
            self._discard(connection)
