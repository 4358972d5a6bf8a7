"""The benchmark's own redis-server, and what it counted: script calls, items, and its time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, Self

from benchmarks.load import Load
from benchmarks.timing import Figures
from ratethrottle import RateThrottleCore, RateThrottleRule, create_limiter
from ratethrottle.cli.processes import NoRedis, server_program
from tests.kit.servers import RedisServer

SCRIPTS = ("evalsha", "eval", "evalsha_ro", "eval_ro", "fcall")
WRITES = ("set", "setrange", "psetex", "setex", "del", "unlink", "getset", "incrby", "expire", "pexpire")


@dataclass(frozen=True)
class Counters:
    """What the server has done since it started. Times in µs; the script's includes the commands that it called."""

    script_calls: float = 0
    script_us: float = 0
    keys_read: float = 0
    keys_written: float = 0
    core_us: float = 0  # of its main thread: scripts, commands, parsing and the network

    def __sub__(self, other: Self) -> Counters:
        return Counters(*(getattr(self, each.name) - getattr(other, each.name) for each in fields(self)))


class Meter:
    """Reads the counters of one server, and knows what a call of ours reads besides the keys of its items."""

    def __init__(self, server: RedisServer) -> None:
        self.client = server.client(decode_responses=True)
        self.url = server.url
        self.extra_reads = 0

    def version(self) -> str:
        """Name the server and its version."""
        info: dict[str, Any] = self.client.info("server")
        return f"Valkey {info['valkey_version']}" if "valkey_version" in info else f"Redis {info['redis_version']}"

    def read(self) -> Counters:
        """INFO, as it is now."""
        commands: dict[str, Any] = self.client.info("commandstats")
        stats: dict[str, Any] = self.client.info("stats")
        cpu: dict[str, Any] = self.client.info("cpu")
        scripts = [commands.get(f"cmdstat_{name}", {}) for name in SCRIPTS]
        seconds = [float(cpu.get(f"used_cpu_{kind}_main_thread", cpu[f"used_cpu_{kind}"])) for kind in ("user", "sys")]
        return Counters(
            script_calls=sum(each.get("calls", 0) for each in scripts),
            script_us=sum(each.get("usec", 0) for each in scripts),
            # MGET is one call however many keys it reads; each of them is a hit or a miss.
            keys_read=stats["keyspace_hits"] + stats["keyspace_misses"],
            keys_written=sum(commands.get(f"cmdstat_{name}", {}).get("calls", 0) for name in WRITES),
            core_us=1e6 * sum(seconds),
        )

    async def calibrate(self) -> None:
        """Learn what one of our calls reads besides the keys of its items, from checks that each travel alone."""
        limiter = ours(self.url, "token_bucket", name="calibrate")
        keys = [f"key:{number}" for number in range(20)]
        await limiter.check_many(keys)  # so that they exist
        before = self.read()
        for key in keys:
            await limiter.check(key)
        done = self.read() - before
        self.extra_reads = max(0, round(done.keys_read / max(1, done.script_calls)) - 1)
        await limiter.aclose()

    def items(self, done: Counters) -> float:
        """How many items the script calls carried, of keys that exist: for one that doesn't, Redis is asked a second time."""
        return max(0.0, done.keys_read - self.extra_reads * done.script_calls)


@contextmanager
def own_server() -> Iterator[Meter]:
    """Run a redis-server on a free loopback port, without persistence. Raises FileNotFoundError where there is none."""
    try:
        server_program()
    except NoRedis as reason:
        raise FileNotFoundError(f"{reason}; `make redis` gets one") from reason
    with RedisServer() as server:
        meter = Meter(server)
        server.grow_old()
        try:
            yield meter
        finally:
            meter.client.close()


def ours(url: str, strategy: str = "sliding_window", *, name: str = "bench", **rule: Any) -> RateThrottleCore:
    """Make a limiter with one rule on that Redis; unless the rule says otherwise, all that the benchmarks offer is allowed.

    The deadline is long, so that a machine that hangs for a moment is measured and not taken for an outage.
    """
    shape: dict[str, Any] = {"limit": 1_000_000, "window": 60} | rule
    rules = [RateThrottleRule(name, strategy=strategy, **shape)]
    return create_limiter(storage="redis", redis_url=url, rules=rules, deadline=5)


def per_decision(load: Load, done: Counters, meter: Meter) -> Figures:
    """Put what the tasks did and what the server did side by side, per decision."""
    each = max(1, load.decisions)
    return {
        "decisions_per_s": load.decisions / load.wall_s,
        "allowed": load.allowed,
        "decisions": load.decisions,
        "client_us": 1e6 * load.cpu_s / each,
        "script_calls": done.script_calls / each,
        "items": meter.items(done) / each,
        "script_us": done.script_us / each,
        "core_us": done.core_us / each,
        "errors": load.errors,
    }


def errors_of(figures: Figures) -> str:
    """Show what went wrong, for a table's last column."""
    return "; ".join(f"{count:,} × {name}" for name, count in figures.get("errors", {}).items()) or "–"
