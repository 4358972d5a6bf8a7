"""What the kit takes from other packages, which only tests need."""

from __future__ import annotations

import importlib
from typing import Any

EXTRA = "the extra ratethrottle[testing] has it"


def fake_redis(**options: Any) -> Any:
    """Make an asyncio client of fakeredis, for `RedisStorage` or `ManualRedisStorage`. Each has a server of its own.

    options: those of `fakeredis.FakeAsyncRedis`, as `server=`, by which clients share one.
    Raises ModuleNotFoundError if fakeredis isn't installed, or lupa, with which it runs scripts.
    """
    fakeredis = _imported("fakeredis", "fake_redis needs fakeredis")
    _imported("lupa", "fakeredis runs our scripts with lupa")
    return fakeredis.FakeAsyncRedis(**options)


def _imported(name: str, why: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise ModuleNotFoundError(f"{why}, which isn't installed; {EXTRA}", name=name) from None
