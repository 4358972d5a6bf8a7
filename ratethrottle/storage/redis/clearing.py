"""Deletes what a prefix has in Redis, in a way that no process brings back."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable
from typing import Any, Final

import redis
from redis.asyncio.connection import AbstractConnection

from ratethrottle.errors import StorageUnavailable
from ratethrottle.storage._shared.keynames import KeyNames
from ratethrottle.storage.redis.greeting import RUN_ID
from ratethrottle.storage.redis.scripts import script

KEYS_MAX: Final = 500  # of a call
RENEWED_S: Final = 5.0  # states of before it are taken for absent for ten seconds after an epoch began
ROUNDS: Final = 3


class Clearing:
    """One `clear()` on a connection of its own."""

    def __init__(self, connection: AbstractConnection, names: KeyNames, deadline_s: float) -> None:
        self._connection = connection
        self._names = names
        self._deadline_s = deadline_s
        prefix = names.epoch_key.removesuffix(b":epoch")
        self._all = re.sub(rb"([*?\[\]\\^-])", rb"\\\1", prefix) + b":*"
        self._pattern = self._all.removesuffix(b"*") + b"{*"
        self._ours = re.compile(re.escape(prefix) + rb":\{[0-9a-z]{1,5}\}:[^:]+:[=(#].*\Z", re.DOTALL)

    async def _ask(self, command: bytes, *words: bytes | int) -> Any:
        try:
            async with asyncio.timeout(self._deadline_s):
                await self._connection.send_command(command, *words)
                return await self._connection.read_response(disable_decoding=True)
        except TimeoutError:
            raise StorageUnavailable(
                f"Redis didn't answer {command.decode()}, a step of clear(), within {self._deadline_s} s; it may be half done: call it "
                "again, perhaps with a longer `deadline`"
            ) from None

    async def _run_id(self) -> bytes:
        try:
            found = RUN_ID.search(await self._ask(b"INFO", b"server"))
        except redis.ResponseError as error:
            if "unknown command" not in str(error).lower():
                raise
            found = None
        return (found[1] if found else b"").ljust(40, b"0")

    async def _begin(self, known_epoch: int) -> bytes:
        """Begin an epoch without a past; returns what its key holds. From now on nothing of before it counts."""
        run = await self._run_id()
        beat = script("beat")
        # Written here, since a ControlCall is written for a batch, and this connection has none. Nor is it the beat of a process:
        # it counts none (known_processes) and has nothing to tell (heard_us).
        words: dict[str, bytes | int] = {
            "request": b"clear",
            "run": run,
            "known_epoch": known_epoch,
            "process_id": b"clear",
            "purpose": b"clear",
            "statistics": 0,
            "known_processes": 0,
            "heard_us": 0,
        }
        keys = (self._names.epoch_key, self._names.processes_key)
        ordered = [words[name] for name in beat.header["ARGV"] if name != "layout"]
        reply = await self._ask(b"EVAL", beat.body(shebang=False), len(keys), *keys, *ordered)
        numbers = dict(zip(beat.header["reply"], reply, strict=True))
        return b"%b%016d%016d" % (run, numbers["epoch"], numbers["learning_began"])

    async def _delete(self, epoch: bytes, keys: list[bytes]) -> bool:
        """Delete what isn't of this epoch; False if there is another one by now."""
        text = script("clear").body(shebang=False)
        reply = await self._ask(b"EVAL", text, 1 + len(keys), self._names.epoch_key, *keys, b"clear", epoch)
        return int(reply[1]) >= 0

    async def wipe(self) -> None:
        """Delete all that begins with the prefix, also what other programs wrote. No process may use it any more, or it would come back."""
        cursor = b"0"
        while True:
            cursor, found = await self._ask(b"SCAN", cursor, b"MATCH", self._all, b"COUNT", 1000)
            for first in range(0, len(found), KEYS_MAX):
                await self._ask(b"DEL", *found[first : first + KEYS_MAX])
            if cursor == b"0":
                return

    async def run(self, known_epoch: int, begun: Callable[[], object]) -> None:
        """Clear. begun: called once nothing of before counts any more, before it is deleted."""
        # Every process that lives writes its layout again in the epoch that begins.
        await self._ask(b"DEL", self._names.layout_key)
        for _ in range(ROUNDS):
            epoch, since_s = await self._begin(known_epoch), time.monotonic()
            begun()
            cursor, same = b"0", True
            while same:
                cursor, found = await self._ask(b"SCAN", cursor, b"MATCH", self._pattern, b"COUNT", 1000)
                ours = [key for key in found if self._ours.match(key)]
                for first in range(0, len(ours), KEYS_MAX):
                    if time.monotonic() - since_s > RENEWED_S:
                        epoch, since_s = await self._begin(known_epoch), time.monotonic()
                    same = same and await self._delete(epoch, ours[first : first + KEYS_MAX])
                if same and cursor == b"0":
                    return
        raise StorageUnavailable("Redis was replaced, or lost its data, each time its keys were being deleted")
