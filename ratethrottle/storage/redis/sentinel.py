"""One sentinel, and what it says of the master: asked on a connection that is kept, and heard on another one.

What it says is a candidate, no more: `topology` counts the voices and asks the server itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import re
from collections.abc import AsyncIterator, Callable
from typing import Any

from redis.asyncio.connection import AbstractConnection

from ratethrottle.errors import StorageProtocolError
from ratethrottle.storage.redis.backoff import EVERY_MOST_S, EVERY_S, every_s
from ratethrottle.storage.redis.greeting import Command
from ratethrottle.storage.redis.race import SILENT_S, Pace
from ratethrottle.storage.redis.settings import Address, Ask, Settings, close
from ratethrottle.storage.redis.tasks import own_task

# It is asked again so long after its last answer: what was missed on +switch-master is noticed then.
POLL_S = 1.0
# A sentinel that is away is tried at most twice a second, less often when it stays away, and not by all processes at once.
RETRY_S = (0.5, 0.75)
# How long a sentinel may take to answer before its connection is given up; nobody waits for it that long.
ANSWERS_S = 1.0
# A subscription that is silent for so long is asked whether it still lives.
SILENCE_S = 5.0
HOST = re.compile(rb"[0-9A-Za-z._:%-]{1,255}\Z")


class Sentinel:
    """Asks one sentinel, each second and on `ask`, and tells `heard` of every answer and failure, `switched` of +switch-master.

    Belongs to one event loop; its task begins here.
    """

    def __init__(self, settings: Settings, master_name: str, heard: Callable[[], None], switched: Callable[[], None]) -> None:
        self.named: Address | None = None  # by its last answer
        self.error: Exception | None = None  # why it can't be asked now
        self.waiting_since_s: float | None = None  # loop time of the question that it hasn't answered yet
        self._settings = settings
        self._master_name = master_name
        self._heard = heard
        self._switched = switched
        self._loop = asyncio.get_running_loop()
        self._asked = asyncio.Event()
        self._away_since_s: float | None = None
        self.ask()
        self.task = own_task(self._loop, self._run(), "ratethrottle sentinel")

    def ask(self) -> None:
        """Have it asked now, and once more if a question is on its way; not if it is away and was tried just now."""
        if self.error is None:
            self._wait()
            self._asked.set()

    def _wait(self) -> None:
        if self.waiting_since_s is None:
            self.waiting_since_s = self._loop.time()

    def silent(self, for_s: float) -> bool:
        """Whether it has left a question open for so long."""
        return self.waiting_since_s is not None and self._loop.time() - self.waiting_since_s >= for_s

    async def _run(self) -> None:
        while True:
            try:
                await self._converse()
            except Exception as error:  # noqa: BLE001  # whatever redis-py or a credential provider raises: this sentinel is away
                if self._away_since_s is None:
                    self._away_since_s = self._loop.time()
                self.named, self.error, self.waiting_since_s = None, error, None
                self._heard()
            retry_s = random.uniform(*RETRY_S) * self._every_s() / EVERY_S  # noqa: S311  # it guards nothing
            await asyncio.sleep(min(retry_s, EVERY_MOST_S))
            # A caller that it has let down before doesn't wait for it again.
            self.error, self.waiting_since_s = None, -math.inf

    def _every_s(self) -> float:
        return every_s(self._loop.time() - self._away_since_s) if self._away_since_s is not None else EVERY_S

    async def _turn(self) -> None:
        """Wait until it may be tried once more beside a try that has heard nothing."""
        await asyncio.sleep(self._every_s() - SILENT_S)

    async def _converse(self) -> None:
        """Ask for as long as it answers."""
        self._asked.clear()
        question = (b"SENTINEL", b"GET-MASTER-ADDR-BY-NAME", self._master_name)
        async with self._connection(question) as (_, first, ask):
            # Only beside a connection that answers, so that one which is away is not tried twice as often.
            listening: asyncio.Task[None] | None = None
            try:
                self._away_since_s = None
                answer = first
                while True:
                    self.named = address(answer)
                    self.waiting_since_s = None
                    self._heard()
                    if listening is None:
                        listening = own_task(self._loop, self._listen(), "ratethrottle subscription")
                    with contextlib.suppress(TimeoutError):  # nobody asked meanwhile, and it is time to look
                        async with asyncio.timeout(POLL_S):
                            await self._asked.wait()
                    self._wait()
                    self._asked.clear()
                    async with asyncio.timeout(max(ANSWERS_S, self._settings.deadline_s)):
                        [answer] = await ask([question])
            finally:
                if listening is not None:
                    listening.cancel()
                    if not self._loop.is_closed():  # by a program that leaves tasks behind: nothing can be waited for any more
                        await asyncio.wait([listening])

    async def _listen(self) -> None:
        """Hear of +switch-master, for as long as the sentinel answers at all."""
        while True:
            with contextlib.suppress(Exception):  # as above; what is missed here, the questions find out
                async with self._connection((b"SUBSCRIBE", b"+switch-master")) as (connection, _, _):
                    await self._hear(connection)
            await asyncio.sleep(random.uniform(*RETRY_S))  # noqa: S311  # it guards nothing

    async def _hear(self, connection: AbstractConnection) -> None:
        asked = False
        while True:
            said = await connection.read_response(disable_decoding=True, timeout=SILENCE_S, disconnect_on_error=False)
            if said is None:  # nothing in that time
                if asked:
                    return
                await connection.send_command("PING", check_health=False)
            elif switched(said, self._master_name.encode()):
                self._switched()
            asked = said is None

    @contextlib.asynccontextmanager
    async def _connection(self, question: Command) -> AsyncIterator[tuple[AbstractConnection, Any, Ask]]:
        """Connect and ask, all in one write; gives the connection, the answer, and what asks more."""

        async def keep(connection: AbstractConnection, replies: list[Any], ask: Ask) -> tuple[AbstractConnection, Any, Ask]:
            return connection, replies[0], ask

        async with asyncio.timeout(self._settings.connect_timeout_s):
            reached = await self._settings.reach((question,), keep, pace=Pace(self._turn))
        try:
            yield reached
        finally:
            if not self._loop.is_closed():  # by a program that leaves tasks behind: nothing can be closed any more
                await close(reached[0])


def address(said: object) -> Address | None:
    """Read the reply to GET-MASTER-ADDR-BY-NAME: None if it knows no such master.

    Raises what an error reply is, and StorageProtocolError for anything else.
    """
    match said:
        case Exception():
            raise said
        case None:
            return None
        case [bytes() as host, bytes() as port] if HOST.match(host) and port.isdigit() and 1 <= int(port[:6]) <= 65535:
            return host.decode(), int(port)
    raise StorageProtocolError("a sentinel named what is no address")


def switched(said: object, master_name: bytes) -> bool:
    """Whether a message of the subscription says that this master has another address."""
    match said:
        case [b"message", _, bytes() as text]:
            return text.split(b" ")[0] == master_name
    return False
