"""Faults at random on a fleet that works for minutes: nothing may grow, hang, go unseen or exceed what is stated."""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from tests.faults.board import Row, Run, print_table
from tests.faults.fleet import PROCESSES, Fleet
from tests.faults.proxy import Proxy
from tests.faults.worker import PASSWORD
from tests.kit.servers import RedisServer

CALM_S = (3.0, 8.0)  # between two faults: each has healed before the next one
SAMPLE_S = 30.0
GROWTH_BYTES = 15_000_000  # from the first quarter on: bounds and pools have been filled by then
GROWTH_OTHER = 2


class Soak:
    """One server, two proxies, four processes, and what can go wrong between them."""

    def __init__(self, server: RedisServer, proxies: list[Proxy], fleet: Fleet, rng: random.Random) -> None:
        self.server, self.proxies, self.fleet, self.rng = server, proxies, fleet, rng
        self.client = server.client()

    def wait(self, low_s: float, high_s: float) -> None:
        """Let the fleet work for a while that is drawn."""
        self.fleet.calm(self.rng.uniform(low_s, high_s))

    def server_killed(self) -> None:
        self.server.stop()
        self.wait(0, 3)
        self.server.start()

    def server_frozen(self) -> None:
        self.server.pause()
        self.wait(0.05, 3)
        self.server.resume()

    def flushed(self) -> None:
        self.client.flushall()

    def scripts_flushed(self) -> None:
        self.client.script_flush()

    def thrown_out(self) -> None:
        self.client.client_kill_filter(_type="normal", skipme=True)

    def full(self) -> None:
        self.client.config_set("maxmemory", "1mb")
        self.wait(0.1, 2)
        self.client.config_set("maxmemory", "0")

    def misled(self) -> None:
        """One of the proxies, or both, misbehave."""
        mode: dict[str, Any] = self.rng.choice(
            (
                {"hole": True}, {"mute": True}, {"accept": "no"}, {"accept": "reset"}, {"accept": "full"},
                {"delay_s": (0.0, 0.1)}, {"delay_s": (0.1, 0.5)}, {"delay_s": (1.0, 1.0)}, {"trickle_s": 0.05},
                {"before": b":1\r\n"}, {"repeat": True}, {"cut_at": self.rng.randrange(60)}, {"instead": b"*1000000000\r\n"},
            )
        )  # fmt: skip  # a list to be read at a glance
        for proxy in self.rng.choice((self.proxies, self.proxies[:1], self.proxies[1:])):
            proxy.set(**mode)
            if "accept" in mode or self.rng.random() < 0.3:
                proxy.cut()
        self.wait(0.1, 3)
        for proxy in self.proxies:
            proxy.set()

    def worker_killed(self) -> None:
        victim = self.rng.choice(self.fleet.living)
        self.fleet.kill(victim)
        self.fleet.add(victim.work.url)

    def worker_stopped(self) -> None:
        """For less than `learn`: longer, and what it knows may come too late, as docs/guarantees.md says."""
        self.fleet.stop(self.rng.choice(self.fleet.living), self.rng.uniform(0.01, 0.15))

    @property
    def faults(self) -> list[Callable[[], None]]:
        """What is drawn from; a proxy can do most."""
        return [
            self.server_killed, self.server_frozen, self.flushed, self.scripts_flushed, self.thrown_out, self.full,
            self.misled, self.misled, self.misled, self.misled, self.worker_killed, self.worker_stopped,
        ]  # fmt: skip  # a list to be read at a glance


def grown(run: Run, first: list[dict[str, Any]], last: list[dict[str, Any]], numbers: list[int]) -> None:
    """Compare what each process held early with what it held at the end."""
    for number, before, after in zip(numbers, first, last, strict=True):
        for what, most in (("bytes", GROWTH_BYTES), ("files", GROWTH_OTHER), ("tasks", GROWTH_OTHER)):
            more = after[what] - before[what]
            run.expect(more <= most, f"process {number}: {more:,} {what} more than after the first quarter")


def soak(run: Run, minutes: float) -> None:
    """Work for that long."""
    rng = random.Random(run.seed)
    with RedisServer(password=PASSWORD) as server, ExitStack() as stack:
        proxies = [stack.enter_context(Proxy(server.socket, password=PASSWORD)) for _ in range(2)]
        with Fleet([proxies[number % 2].url for number in range(PROCESSES)]) as fleet:
            work(run, Soak(server, proxies, fleet, rng), minutes)
    run.judge(fleet, bites=False, forget_killed=True)


def work(run: Run, soaking: Soak, minutes: float) -> None:
    """Draw a fault, let it heal, and again."""
    fleet, drawn = soaking.fleet, Counter[str]()
    began_s = sampled_s = time.monotonic()
    end_s = began_s + 60 * minutes
    early: dict[int, dict[str, Any]] = {}
    while time.monotonic() < end_s:
        fleet.calm(soaking.rng.uniform(*CALM_S))
        fault = soaking.rng.choice(soaking.faults)
        drawn[fault.__name__] += 1
        print(f"{time.monotonic() - began_s:6.0f} s  {fault.__name__}", flush=True)
        with fleet.fault():
            fault()
        if time.monotonic() > sampled_s + SAMPLE_S:
            sampled_s = time.monotonic()
            samples = fleet.samples()
            held = ", ".join(f"{s['bytes'] / 1e6:.0f} MB {s['files']} files {s['tasks']} tasks" for s in samples)
            print(f"{sampled_s - began_s:6.0f} s  {held}", flush=True)
            for member, sample in zip(fleet.living, samples, strict=True):
                if sampled_s > began_s + 15 * minutes or member.work.number >= PROCESSES:
                    early.setdefault(member.work.number, sample)
    fleet.calm(CALM_S[0])
    last = dict(zip([member.work.number for member in fleet.living], fleet.samples(), strict=True))
    both = [number for number in last if number in early]
    grown(run, [early[number] for number in both], [last[number] for number in both], both)
    run.note(f"{sum(drawn.values())} faults: {dict(drawn)}")


def main() -> int:
    """Parse, work, print."""
    parser = argparse.ArgumentParser(prog="make soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6), help="which faults, when and for how long (printed)")
    options = parser.parse_args()
    print(f"{options.minutes:g} minutes, seed {options.seed}", flush=True)
    run = Run(Row("soak", "faults at random", lambda run: soak(run, options.minutes), short=False), seed=options.seed)
    try:
        run.row.provoke(run)
    except RuntimeError as error:  # a process that ended by itself, or says nothing any more
        run.expect(False, f"{error}")
    print_table([run.verdict])
    print(f"{run.verdict.word}, seed {options.seed}")
    return bool(run.verdict.problems)


if __name__ == "__main__":
    sys.exit(main())
