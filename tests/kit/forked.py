"""Where processes of tests come from: one that has imported everything already, so that none of them pays for it again."""

from __future__ import annotations

import multiprocessing

CONTEXT = multiprocessing.get_context("forkserver")
# Named at once: a process of tests has one server to fork from, which reads this when it starts.
CONTEXT.set_forkserver_preload(
    [
        "tests.kit.crowd",
        "tests.kit.holder",
        "tests.kit.lessee",
        "tests.kit.payer",
        "tests.kit.reserver",
        "tests.kit.waiters",
        "tests.faults.worker",
        "tests.faults.proxy",
    ]
)
