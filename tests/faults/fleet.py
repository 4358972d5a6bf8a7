"""Worker processes that share a Redis while something happens to it. Each is ended by its own handle."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.faults.records import Log, monotonic_us, read_log
from tests.faults.uses import ALL_RULES, RULES
from tests.faults.worker import Work, run_worker
from tests.kit.forked import CONTEXT

PROCESSES = 4
DEADLINE_S = 0.25
START_S, END_S = 60.0, 20.0  # for a process to come up or go on a busy machine


@dataclass
class Member:
    """One worker process and the pipe to it."""

    work: Work
    process: ForkServerProcess
    pipe: Connection
    ready: dict[str, Any] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)
    killed_us: int = 0

    @property
    def killed(self) -> bool:
        """Whether somebody has killed it."""
        return self.killed_us > 0

    def hear(self, within_s: float) -> Any:
        """What it says next. Raises RuntimeError when it says nothing, or has gone."""
        try:
            if self.pipe.poll(within_s):
                return self.pipe.recv()
        except EOFError:
            self.process.join(within_s)
            raise RuntimeError(f"worker {self.work.number} has ended (exit code {self.process.exitcode})") from None
        raise RuntimeError(f"worker {self.work.number} said nothing for {within_s} s")


class Fleet:
    """Processes with 50 tasks each, from `start` to `end`. Afterwards `logs`, `members` and `faults` say what happened.

    url: where they find Redis, or one URL for each. everything: they do all that a user can. options: for `create_limiter`.
    """

    def __init__(
        self,
        url: str | list[str],
        *,
        processes: int = PROCESSES,
        tasks: int = 50,
        every_s: float = 0.05,
        everything: bool = False,
        **options: Any,
    ) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="rt-"))
        self.urls = [url] * processes if isinstance(url, str) else url
        self.options: Mapping[str, Any] = {"deadline": DEADLINE_S, "expected_processes": processes, **options}
        self.tasks, self.every_s, self.everything = tasks, every_s, everything
        self.rules = ALL_RULES if everything else RULES
        self.members: list[Member] = []
        self.faults: list[tuple[int, int]] = []
        self.logs: list[Log] = []
        self.began_us = self.ended_us = 0

    def add(self, url: str, *, go: bool = True) -> Member:
        """Start one more process, and let it go to work."""
        number = len(self.members)
        work = Work(
            number,
            url,
            self.rules,
            self.directory / f"{number}.log",
            dict(self.options),
            self.tasks,
            self.every_s,
            len(self.urls),
            everything=self.everything,
        )
        ours, theirs = CONTEXT.Pipe()
        process = CONTEXT.Process(target=run_worker, args=(work, theirs), daemon=True)
        member = Member(work, process, ours)
        self.members.append(member)
        process.start()
        theirs.close()
        if go:
            member.ready = member.hear(START_S)["ready"]
            member.pipe.send("go")
        return member

    def __enter__(self) -> Self:
        try:
            for url in self.urls:
                self.add(url, go=False)
            for member in self.members:
                member.ready = member.hear(START_S)["ready"]
            self.began_us = monotonic_us()
            self.tell("go")
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if error is None:
                self.end()
        finally:
            self.close()

    @property
    def living(self) -> list[Member]:
        """The processes that nobody has killed."""
        return [member for member in self.members if not member.killed]

    def tell(self, word: str) -> None:
        """Tell all of them."""
        for member in self.living:
            member.pipe.send(word)

    def samples(self) -> list[dict[str, Any]]:
        """What each of them holds now."""
        self.tell("sample")
        return [member.hear(END_S) for member in self.living]

    def calm(self, seconds: float) -> None:
        """Let them work. Fails at once if one of them ends."""
        gone = wait([member.process.sentinel for member in self.living], seconds)
        if gone:
            raise RuntimeError("a worker process has ended by itself")

    @contextmanager
    def fault(self) -> Iterator[None]:
        """Remember from when to when something is wrong."""
        began_us = monotonic_us()
        try:
            yield
        finally:
            self.faults.append((began_us, monotonic_us()))

    def kill(self, member: Member) -> None:
        """Kill one, with whatever it is in the middle of."""
        member.killed_us = monotonic_us()
        member.process.kill()
        member.process.join()

    def stop(self, member: Member, seconds: float) -> None:
        """Stop one where it stands for a while."""
        assert member.process.pid is not None
        os.kill(member.process.pid, signal.SIGSTOP)
        try:
            time.sleep(seconds)
        finally:
            os.kill(member.process.pid, signal.SIGCONT)

    def end(self) -> None:
        """End the work, and collect what was logged and reported."""
        self.ended_us = monotonic_us()
        self.tell("end")
        for member in self.living:
            member.report = member.hear(END_S)
            member.process.join(END_S)
        self.logs = [read_log(member.work.number, member.work.log, member.killed_us) for member in self.members]

    def close(self) -> None:
        """End what still runs, and remove the logs."""
        for member in self.members:
            if member.process.pid is not None and member.process.is_alive():
                member.process.kill()
                member.process.join()
            member.pipe.close()
        shutil.rmtree(self.directory, ignore_errors=True)
