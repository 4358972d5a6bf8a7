"""The demo, as a user runs it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.servers import RedisServer, executable


def demo(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ratethrottle.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=os.environ | environment, check=False)


@pytest.mark.parametrize("own", [True, False], ids=["its own redis", "a given redis"])
def test_three_servers_admit_exactly_the_limit(own: bool, redis_server: RedisServer) -> None:
    executable("redis-server")
    given = [] if own else ["--redis-url", redis_server.url]
    shown = demo("demo", "--limit", "90", "--seconds", "1", *given)
    assert shown.returncode == 0, shown.stderr
    assert not shown.stderr
    assert "Exactly 90 of 327 were admitted." in shown.stdout


def test_without_redis_it_says_so_and_fails_only_in_ci() -> None:
    laptop = demo("demo", PATH="", CI="")
    assert laptop.returncode == 0
    assert "no redis-server" in laptop.stdout
    assert "admitted 1,000" in laptop.stdout
    assert demo("demo", PATH="", CI="true").returncode == 1


def test_a_redis_that_is_not_there_is_an_error() -> None:
    shown = demo("demo", "--redis-url", "redis://127.0.0.1:1/0")
    assert shown.returncode == 1
    assert "can't be reached" in shown.stderr


def test_help_helps_and_bad_numbers_are_refused() -> None:
    assert "demo" in demo("--help").stdout
    assert "--redis-url" in demo("demo", "--help").stdout
    assert demo("demo", "--servers", "0").returncode == 2
    assert "ratethrottle" in demo("--version").stdout
