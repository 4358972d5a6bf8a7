"""The benchmarks measure what they say: what they count, and what they read from the server and from callgrind."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
from collections.abc import Callable
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


HERE, RECORDED = "GCC 12.2.0; CPython 3.11 (flags 1); x86_64", {"hit": 300.0}


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., int]:
    """Runs the instruction gate, without a count: what it ends with, by the key of this machine and what is counted for a hit."""
    for name in ("CI", "GITHUB_ACTIONS"):
        monkeypatch.delenv(name, raising=False)
    baseline = tmp_path / "instructions.json"
    baseline.write_text(json.dumps({HERE: RECORDED}))
    monkeypatch.setattr(instructions, "BASELINE", baseline)
    monkeypatch.setattr(instructions.shutil, "which", lambda _name: "/usr/bin/valgrind")

    def run(key: str, hit: float, *arguments: str) -> int:
        monkeypatch.setattr(instructions, "key", lambda: key)
        monkeypatch.setattr(instructions, "counted", lambda: {"hit": hit})
        monkeypatch.setattr(sys, "argv", ["instructions", *arguments])
        return instructions.main()

    return run


def test_the_instruction_gate_judges_what_is_recorded(gate: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert gate(HERE, 308) == 0
    assert gate(HERE, 310) == instructions.FAILED
    assert "NOTHING WAS JUDGED" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("key", "fails"),
    [
        (HERE.replace("12.2.0", "13.3.0"), False),  # another compiler, as a contributor has one
        (HERE.replace("x86_64", "aarch64"), False),
        (HERE.replace("3.11", "3.13"), True),  # the same compiler: nobody has recorded its figures for this Python
        (HERE.replace("flags 1", "flags 2"), True),
    ],
)
def test_the_instruction_gate_says_that_it_judged_nothing(
    gate: Callable[..., int], key: str, fails: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gate(key, 1_000_000) == instructions.NOTHING_JUDGED
    assert f"NOTHING WAS JUDGED: instructions.json has no figures for {key}" in capsys.readouterr().err
    monkeypatch.setenv("CI", "true")
    assert gate(key, 300) == (instructions.FAILED if fails else instructions.NOTHING_JUDGED)
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    gate(key, 300)
    assert f"::{'error' if fails else 'warning'} title=make instructions::NOTHING WAS JUDGED" in capsys.readouterr().out
    assert gate(key, 300, "--record") == 0
    assert gate(key, 310) == instructions.FAILED


def test_the_instruction_gate_says_which_path_it_did_not_judge(
    gate: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    instructions.BASELINE.write_text(json.dumps({HERE: RECORDED | {"gone": 5.0}}))
    assert gate(HERE, 300) == instructions.NOTHING_JUDGED
    assert "NOT JUDGED: gone: counted and not recorded, or recorded and not counted" in capsys.readouterr().err
    monkeypatch.setenv("CI", "true")
    assert gate(HERE, 300) == instructions.FAILED


def test_the_instruction_gate_without_valgrind_judges_nothing(gate: Callable[..., int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instructions.shutil, "which", lambda _name: None)
    assert gate(HERE, 300) == instructions.NOTHING_JUDGED
    assert gate(HERE, 300, "--record") == instructions.FAILED
    monkeypatch.setenv("CI", "true")
    assert gate(HERE, 300) == instructions.FAILED


def test_make_ci_takes_no_other_failure_of_the_gate_for_that() -> None:
    [command] = re.findall(r"^instructions-ci:.*\n\t(.+)$", (Path(__file__).parents[2] / "Makefile").read_text(), re.MULTILINE)
    command = command.replace("$(PY) -m benchmarks.instructions", 'sh -c "exit $CODE"').replace("$$", "$")
    ended = [subprocess.run(["sh", "-c", command], env={"CODE": str(code)}, check=False).returncode for code in range(4)]
    assert ended == [0, 1, 1, 0]


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
