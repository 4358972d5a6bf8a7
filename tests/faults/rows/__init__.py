"""The rows, by what breaks."""

from __future__ import annotations

import importlib

MODULES = ("server", "network", "slow", "wire", "refusals", "state", "sentinel", "callers", "crowds", "requests", "everything")


def load() -> None:
    """Import all of them, which registers their rows."""
    for module in MODULES:
        importlib.import_module(f"{__name__}.{module}")
