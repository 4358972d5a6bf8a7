"""Where the board's processes come from: one that has imported everything already, so that none of them pays for it again."""

from __future__ import annotations

import multiprocessing

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.faults.worker", "tests.faults.proxy"])
