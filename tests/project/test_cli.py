"""The demo, as a user runs it."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ratethrottle.cli import main
from ratethrottle.cli.processes import NoRedis, Server, server_program
from ratethrottle.cli.screen import picture, summary
from tests.kit.servers import RedisServer, eventually, executable

COMMAND = (sys.executable, "-m", "ratethrottle.cli")
ROW = re.compile(r"^(server \d|together)\s+([\d,]+)\s+([\d,]+)\s+([\d,]+)$", re.MULTILINE)


def demo(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [*COMMAND, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=os.environ | environment, check=False)


@pytest.mark.parametrize("own", [True, False], ids=["its own redis", "a given redis"])
def test_three_servers_admit_exactly_the_limit(own: bool, redis_server: RedisServer) -> None:
    executable("redis-server")
    given = [] if own else ["--redis-url", redis_server.url]
    shown = demo("demo", "--limit", "90", "--seconds", "2", *given)
    assert shown.returncode == 0, shown.stderr
    assert not shown.stderr
    assert "Exactly 90 of 327 were admitted." in shown.stdout
    rows = {name: tuple(int(count.replace(",", "")) for count in counts) for name, *counts in ROW.findall(shown.stdout)}
    assert list(rows) == ["server 1", "server 2", "server 3", "together"]
    assert rows["together"] == (327, 90, 237)
    assert all(offered == 109 and admitted > 0 for offered, admitted, _ in list(rows.values())[:3])


def test_it_tells_how_far_it_is_without_a_terminal_and_without_escapes(redis_server: RedisServer) -> None:
    shown = demo("demo", "--limit", "30", "--seconds", "1", "--redis-url", redis_server.url).stdout
    assert len(re.findall(r"^together: \d+  server 1: \d+ of \d+", shown, re.MULTILINE)) >= 2
    assert "\x1b" not in shown


def test_it_leaves_a_given_redis_as_it_was(redis_server: RedisServer) -> None:
    with redis_server.client() as client:
        client.set("theirs", "1")
        for _ in range(2):  # a second run doesn't meet the counts of the first
            arguments = ("--servers", "1", "--limit", "20", "--seconds", "0.5", "--redis-url", redis_server.url)
            assert demo("demo", *arguments).returncode == 0
        assert client.keys() == [b"theirs"]


def test_any_number_of_servers_is_offered_three_times_the_limit(redis_server: RedisServer) -> None:
    arguments = ("--limit", "40", "--seconds", "0.5", "--window", "20", "--redis-url", redis_server.url)
    for servers in ("1", "2", "5"):
        shown = demo("demo", "--servers", servers, *arguments)
        assert shown.returncode == 0, shown.stderr
        offered, admitted = re.findall(r"Exactly ([\d,]+) of ([\d,]+)", shown.stdout)[0][::-1]
        assert admitted == "40"
        assert int(offered) >= 120


def test_without_redis_it_says_so_and_fails_only_in_ci() -> None:
    laptop = demo("demo", RATETHROTTLE_REDIS_SERVER="/nowhere/redis-server", CI="")
    assert laptop.returncode == 0
    assert "No Redis: RATETHROTTLE_REDIS_SERVER names /nowhere/redis-server" in laptop.stdout
    assert "apt-get install redis-server" in laptop.stdout
    assert "Exactly 1,000 of 3,000 were admitted." in laptop.stdout
    assert demo("demo", RATETHROTTLE_REDIS_SERVER="/nowhere/redis-server", CI="true").returncode == 1


def test_the_server_is_the_one_that_is_named_or_of_the_path_or_beside_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def program(*parts: str) -> str:
        path = tmp_path.joinpath(*parts)
        path.parent.mkdir(exist_ok=True)
        path.write_text("#!/bin/sh\n")
        path.chmod(0o755)
        return str(path)

    monkeypatch.delenv("RATETHROTTLE_REDIS_SERVER", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    monkeypatch.setattr(sys, "executable", program("venv", "python"))
    with pytest.raises(NoRedis, match="there is no redis-server"):
        server_program()
    # The later one goes before.
    for parts in (("venv", "valkey-server"), ("path", "valkey-server"), ("path", "redis-server")):
        made = program(*parts)
        assert server_program() == made
    named = program("elsewhere", "redis-server")
    monkeypatch.setenv("RATETHROTTLE_REDIS_SERVER", named)
    assert server_program() == named
    monkeypatch.setenv("RATETHROTTLE_REDIS_SERVER", f"{named}-8")
    with pytest.raises(NoRedis, match=r"names .*redis-server-8, which is no program that runs here"):
        server_program()


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("redis://127.0.0.1:1/0", "can't be reached"),
        ("http://127.0.0.1", "redis://, rediss:// or unix://"),
        ("redis://:secret@{}/0", "refused the user"),
    ],
)
def test_a_given_redis_that_does_not_serve_us_is_an_error_and_no_traceback(
    url: str, words: str, redis_server: RedisServer
) -> None:
    with RedisServer(password="correct") as guarded:
        shown = demo("demo", "--redis-url", url.format(f"127.0.0.1:{guarded.port}"))
    assert shown.returncode == 1
    assert words in shown.stderr
    assert "Traceback" not in shown.stderr
    assert "secret" not in shown.stderr + shown.stdout


def test_help_helps_and_bad_numbers_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """In this process, but for one."""

    def said(status: int, *arguments: str) -> str:
        with pytest.raises(SystemExit) as ended:
            main([*arguments])
        assert ended.value.code == status
        shown = capsys.readouterr()
        return shown.err if status else shown.out

    assert "ratethrottle" in demo("--version").stdout
    assert "demo" in said(0, "--help")
    assert "--redis-url" in said(0, "demo", "--help")
    for arguments, words in (
        (("--servers", "0"), "from 1 to 16"),
        (("--limit", "0"), "from 1 to 100,000"),
        (("--seconds", "nan"), "from 0.5 to 30"),
        (("--seconds", "5", "--window", "9"), "half of --window"),
    ):
        assert words in said(2, "demo", *arguments)


@contextmanager
def running(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A demo that is under way."""
    # A shell has what it runs in the background ignore Ctrl-C, and that is inherited: by these tests, and by what they start.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen([*COMMAND, "demo", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("together: ") and not line.startswith("together: 0 "):
                break
        yield process
    finally:
        process.kill()
        process.communicate()


def children(process: subprocess.Popen[str]) -> list[int]:
    found = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not found.exists():
        pytest.skip("this system has no /proc to find children in")
    return [int(pid) for pid in found.read_text().split()]


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].startswith("Z")
    except OSError:
        return True


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_it_ends_its_processes_when_it_is_stopped(number: signal.Signals) -> None:
    executable("redis-server")
    with running("--seconds", "20") as process:
        started = children(process)
        assert len(started) == 4  # redis and three servers
        process.send_signal(number)
        shown, said = process.communicate(timeout=20)
        assert process.returncode in (130, 143), shown + said
        assert said == "\nStopped.\n"
    assert all(map(gone, started))


def test_its_servers_leave_when_it_is_killed(redis_server: RedisServer) -> None:
    with running("--seconds", "20", "--redis-url", redis_server.url) as process:
        started = children(process)
        assert len(started) == 3
        process.kill()
        process.wait()
        eventually(lambda: all(map(gone, started)))


def test_a_terminal_sees_the_picture_of_the_page_with_counts(redis_server: RedisServer) -> None:
    ours, theirs = pty.openpty()
    os.set_blocking(ours, False)
    command = [*COMMAND, "demo", "--limit", "30", "--seconds", "0.5", "--redis-url", redis_server.url]
    environment = os.environ | {"COLUMNS": "100", "TERM": "xterm", "PYTHONIOENCODING": "utf-8"}
    process = subprocess.Popen(command, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    seen = b""

    def ended() -> bool:
        nonlocal seen
        try:
            seen += os.read(ours, 1 << 16)
        except BlockingIOError:
            return False
        except OSError:  # the other end is closed
            return True
        return False

    eventually(ended, within_s=30)
    os.close(ours)
    assert process.wait() == 0
    last = seen.decode().replace("\r", "").rpartition("A\x1b[K")[2]
    assert "│   Server 1  │     │   Server 2  │     │   Server 3  │" in last
    assert "Redis: 30 of 30 used" in last
    assert "\x1b[9A" in seen.decode()


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_the_picture_joins_all_servers_above_one_redis(count: int) -> None:
    servers = [Server(None, f"server {i + 1}", offered=20, admitted=7) for i in range(count)]  # type: ignore[arg-type]  # not asked
    lines = picture(servers, 1000)
    assert len({len(line) for line in lines[:5]}) == 1
    arrow = lines[6].index("▼")
    assert abs(arrow - (len(lines[0]) - 1) / 2) <= 0.5
    for column in (i for i, drawn in enumerate(lines[4]) if drawn == "┬"):
        assert lines[5][column] in "└┴┘┼│"
    assert lines[5][arrow] in "┬┼│"
    assert summary(servers).startswith(f"together: {7 * count} ")
