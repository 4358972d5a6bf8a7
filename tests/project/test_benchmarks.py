"""The benchmarks measure what they say: what they count, and what they read from the server and from callgrind."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from benchmarks import instructions
from benchmarks.hot import Account
from benchmarks.load import drive, key_names, paced, wake
from benchmarks.server import Meter, ours, per_decision
from tests.kit.servers import RedisServer


@pytest.mark.redis
async def test_script_calls_and_items_are_told_apart() -> None:
    with RedisServer() as server:
        meter = Meter(server)
        await meter.calibrate()
        limiter = ours(server.url, "token_bucket")
        for key in ("first", "alone"):
            await limiter.check(key)
        await limiter.check_many([f"key:{number}" for number in range(128)])
        before = meter.read()
        await limiter.check_many([f"key:{number}" for number in range(128)])
        await limiter.check("alone")
        done = meter.read() - before
        await limiter.aclose()
        meter.client.close()
    assert done.script_calls == 2
    assert meter.items(done) == 129
    assert done.script_us > 0
    assert done.core_us > 0


async def test_every_decision_error_and_task_is_counted() -> None:
    async def check(key: str) -> bool:
        await asyncio.sleep(0)
        if key == "user:3":
            raise ValueError("no")
        return key == "user:1"

    load = await drive(check, key_names(4), 8, 0.05)
    assert load.decisions == sum(load.by_task) > 0
    assert 0 < load.allowed < load.decisions
    assert list(load.errors) == ["ValueError: no"]
    assert load.errors["ValueError: no"] > 0
    assert min(load.by_task) > 0


async def test_a_stall_counts_for_every_check_that_fell_due_in_it() -> None:
    started = 0

    async def check(_key: str) -> bool:
        nonlocal started
        started += 1
        if started == 50:
            until = asyncio.get_running_loop().time() + 0.1
            while asyncio.get_running_loop().time() < until:
                pass
        return True

    result = await paced(check, ["key"], 1_000, 0.3)
    assert len(result.latencies_s) == started == 300
    assert sum(latency > 0.01 for latency in result.latencies_s) >= 80


async def test_waking_wakes_every_task_that_waits() -> None:
    load = await wake(16, 0.02)
    assert min(load.by_task) > 0


def test_what_a_bucket_admitted_beyond_its_rate_is_found_in_any_interval() -> None:
    account = Account(lambda _key: asyncio.sleep(0))
    account.samples = [(0.0, 0), (1.0, 10), (2.0, 10), (2.5, 40), (3.0, 45)]
    assert account.most_beyond_rate(10) == 25  # 30 in half a second, of which 5 came back


def test_only_our_own_instructions_are_added_up(tmp_path: Path) -> None:
    dump = tmp_path / "out.1"
    own = next(iter(instructions.OBJECTS))
    dump.write_text(
        f"events: Ir\nsummary: 1000\n\nob=(1) /lib/python\nfn=(1) eval\n0 500\ncob=(2) /here/{own}\ncfn=(2) check\ncalls=1 0\n0 77\n"
        "\nob=(2)\nfn=(2)\n0 60\n+3 5\n0\ncob=(1)\ncfn=(3) dict\ncalls=2 0\n0 10\n* 2\n"
    )
    assert instructions.spent(dump) == 67


@pytest.mark.redis
async def test_a_denied_load_is_no_admission() -> None:
    with RedisServer() as server:
        meter, limiter = Meter(server), ours(server.url, limit=1, window=3_600)
        await limiter.check("key")
        before = meter.read()
        load = await drive(limiter.check, ["key"], 4, 0.05)
        figures = per_decision(load, meter.read() - before, meter)
        await limiter.aclose()
        meter.client.close()
    assert figures["allowed"] == 0
    assert figures["errors"] == {}
