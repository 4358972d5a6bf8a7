"""What can't heal by itself is raised under every policy, at once, with what the server said; the rest is an outage that says so."""

from __future__ import annotations

import asyncio
import contextlib
import re
import shutil
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest
import redis
import redis.asyncio

import ratethrottle
from ratethrottle import ConfigurationError, RateThrottleCore, RateThrottleRule, RedisStorage, create_limiter
from ratethrottle.errors import StorageError, StorageProtocolError, StorageRefused, StorageUnavailable
from ratethrottle.events import Event
from ratethrottle.storage.redis import replies
from ratethrottle.storage.redis.failures import failure
from ratethrottle.storage.redis.replies import Repeated, meaning
from ratethrottle.storage.redis.scripts import NAMES, commands, script
from ratethrottle.storage.redis.words import SAID_MAX, masked, one_line, system_words
from tests.kit.recovery import served, until
from tests.kit.servers import RedisServer

RULE = RateThrottleRule("r", 5, 60)
EVERYTHING = "on >pa55 ~ratethrottle:* resetchannels +@all"


class Filter:
    """A proxy of one upstream: `refuses` gives the error that it answers to a command itself, or None to pass it on.

    Commands wait for the reply to the one before, as a proxy that keeps the order has it.
    """

    def __init__(self, upstream: Path, refuses: Callable[[list[bytes]], bytes | None]) -> None:
        self.refuses = refuses
        self.commands: list[bytes] = []
        self.connections = 0
        self._upstream = upstream
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._server.close()
        await asyncio.sleep(0.01)  # a task that hasn't begun serves the connection that was accepted just now
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.sleep(0)  # until what was aborted is closed

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        upstream: asyncio.StreamWriter | None = None
        try:
            upstream_reader, upstream = await asyncio.open_unix_connection(str(self._upstream))
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                while head := await reader.readline():
                    raw, words = head, []
                    for _ in range(int(head[1:])):
                        size = await reader.readline()
                        word = await reader.readexactly(int(size[1:]) + 2)
                        raw += size + word
                        words.append(word[:-2])
                    self.commands.append(words[0].upper())
                    answer = self.refuses(words)
                    if answer is None:
                        upstream.write(raw)
                        answer = await reply(upstream_reader)
                    else:
                        answer = b"-" + answer + b"\r\n"
                    writer.write(answer)
        finally:
            writer.transport.abort()
            if upstream is not None:
                upstream.transport.abort()


async def reply(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readline()
    if head.startswith(b"$") and not head.startswith(b"$-"):
        return head + await reader.readexactly(int(head[1:]) + 2)
    if head.startswith(b"*"):
        return head + b"".join([await reply(reader) for _ in range(int(head[1:]))])
    return head


def never(words: list[bytes]) -> None:
    """Pass everything on."""


async def refused_at_once(url: str, *, within_s: float = 2.0, **options: Any) -> tuple[str, list[Event]]:
    """Check three times under the policy that would hide it; returns what the error says, and the events."""
    told: list[Event] = []
    limiter = create_limiter("redis", redis_url=url, rules=[RULE], deadline=2, on_outage="allow", **options)
    limiter.on_event(told.append)  # before anything connects
    async with limiter:
        began_s = time.monotonic()
        for _ in range(3):
            with pytest.raises(StorageRefused) as refused:
                await limiter.check("private-key")
        assert time.monotonic() - began_s < within_s
    text = str(refused.value)
    assert [event.kind for event in told] == ["refused"]
    for secret in ("pa55", "private", "ratethrottle:{"):
        assert secret not in text + told[0].message
    return text, told


# Inside of scripts


@pytest.mark.parametrize("command", ["time", "mget", "set"])
async def test_a_command_that_only_a_script_runs_and_the_user_may_not(command: str) -> None:
    with RedisServer() as server, server.client() as client:
        client.execute_command("ACL", "SETUSER", "service", *EVERYTHING.split(), f"-{command}")
        said, _ = await refused_at_once(f"redis://service:pa55@127.0.0.1:{server.port}")
    assert "may not run our scripts" in said
    assert "can't run this command" in said or f"'{command}' command" in said  # Redis 7.0, and the others
    assert f"+{command}" in said or replies.RIGHTS in said


# Only run when something was lost, left or is of another type.
SELDOM = {"DEL", "HGET", "HSET", "HSETNX", "PTTL", "TYPE", "ZREM", "ZREVRANGE"}


async def test_no_command_of_a_script_can_be_missing_now_and_then() -> None:
    """What a script wrote before it reached the missing one must not send the next call another way: each check is refused."""

    async def without(command: str) -> set[str]:
        seen = set()
        url = f"redis://{command}:pa55@127.0.0.1:{server.port}"
        async with create_limiter("redis", redis_url=url, prefix=command, rules=[RULE], deadline=5, on_outage="allow") as limiter:
            ends_s = time.monotonic() + 1.6
            while time.monotonic() < ends_s:
                try:
                    seen.add((await limiter.check("user")).source)
                except StorageRefused:
                    seen.add("refused")
                await asyncio.sleep(0.05)
        return seen

    names = sorted(commands(NAMES))
    with RedisServer() as server, server.client() as client:
        for name in names:
            rights = [*EVERYTHING.replace("ratethrottle", name).split(), f"-{name.lower()}"]
            client.execute_command("ACL", "SETUSER", name, *rights)
        found = dict(zip(names, await asyncio.gather(*map(without, names)), strict=True))
    assert {name for name, seen in found.items() if seen != {"refused"}} <= SELDOM
    assert all(seen in ({"refused"}, {"redis", "prefilter"}) for seen in found.values())


@pytest.mark.parametrize("command", ["TIME", "MGET", "ZADD"])
async def test_a_command_that_only_a_script_runs_and_the_server_has_renamed(command: str) -> None:
    with RedisServer("--rename-command", command, "") as server:
        said, _ = await refused_at_once(server.url)
    assert re.search(r"Unknown (Redis )?command called from script", said)


@pytest.mark.parametrize(
    ("text", "ours", "words"),
    [
        # Redis 7.0
        (
            "ERR The user executing the script can't run this command or subcommand script: {sha}, on @user_script:1.",
            "R",
            "allow it",
        ),
        (
            "ERR The user executing the script can't access at least one of the keys mentioned in the command arguments",
            "R",
            "~prefix:*",
        ),
        ("ERR Unknown Redis command called from script script: {sha}, on @user_script:9.", "R", "renamed or disabled"),
        ("NOPERM this user has no permissions to run the 'info' command", "R", "allow it +info"),
        # Redis 8.2, Valkey 8.1 and 9.1
        (
            "ERR ACL failure in script: User u has no permissions to run the 'time' command script: {sha}, on @user_script:1.",
            "R",
            "+time",
        ),
        ("ERR ACL failure in script: No permissions to access a key script: on @user_script:1.", "R", "~prefix:*"),
        ("ERR Unknown command called from script script: on @user_script:1.", "R", "renamed or disabled"),
        ("NOPERM User u has no permissions to run the 'script|load' command", "R", "allow it +script|load"),
        ("DENIED Redis is running in protected mode because protected mode is enabled and no password", "R", "protected mode"),
        ("ERR user_script:1: attempt to compare number with string script: on @user_script:1.", "P", "attempt to compare number"),
        (
            "WRONGTYPE Operation against a key holding the wrong kind of value script: {sha}, on @user_script:1.",
            "P",
            "wrong kind of value",
        ),
        # What heals, in a script too.
        ("OOM command not allowed when used memory > 'maxmemory'. script: {sha}, on @user_script:1.", "U", "out of memory"),
        (
            "MISCONF Redis is configured to save RDB snapshots, but it's currently unable to persist to disk.",
            "U",
            "unable to persist",
        ),
        ("READONLY You can't write against a read only replica. script: {sha}, on @user_script:1.", "U", "connect to the master"),
        ("NOREPLICAS Not enough good replicas to write.", "U", "Not enough good replicas"),
        ("MASTERDOWN Link with MASTER is down and replica-serve-stale-data is set to 'no'.", "U", "set to 'no'"),
        ("CLUSTERDOWN Hash slot not served", "U", "Hash slot not served"),
        ("TRYAGAIN Multiple keys request during rehashing of slot", "U", "rehashing"),
        ("BUSY Redis is busy running a script. You can only call SCRIPT KILL or SHUTDOWN NOSAVE.", "U", "busy running a script"),
        ("LOADING Redis is loading the dataset in memory", "U", "loading the dataset"),
        ("ERR max number of clients reached", "U", "no room for another client"),
        ("ERR max number of clients + cluster connections reached", "U", "no room for another client"),
        ("ERR connection limit exceeded for this database", "U", "no room for another client"),
        # Proxies
        ("no upstream host", "U", "no upstream host"),
        ("ERR backend server timed out", "U", "timed out"),
        ("unsupported command", "R", "unsupported command"),
        ("ERR 'EVALSHA' command rejected", "R", "EVALSHA"),
        ("ERR proxy: SCRIPT blocked", "R", "SCRIPT blocked"),
        ("ERR I don't know INFO", "R", "INFO"),
        ("ERR Client sent AUTH, but no password is set", "R", "the user or the password"),
    ],
)
def test_what_servers_say(text: str, ours: str, words: str) -> None:
    found = meaning(text.replace("{sha}", "0" * 40))
    assert found.ours is {"R": StorageRefused, "U": StorageUnavailable, "P": StorageProtocolError}[ours]
    assert words in found.words
    assert "0000" not in found.words


# Proxies


@pytest.mark.parametrize("command", [b"INFO", b"SCRIPT", b"EVALSHA", b"EVAL", b"CLIENT", b"SELECT"])
@pytest.mark.parametrize(
    "words",
    [
        "ERR unknown command '{}', with args beginning with: 'private-key' 'pa55'",
        "ERR unsupported command",
        "ERR invalid command",
        "ERR command not allowed",
        "ERR {} is not supported by this proxy",
        "ERR this command is disabled",
    ],
)
async def test_a_proxy_that_does_not_know_a_command(redis_server: RedisServer, command: bytes, words: str) -> None:
    error = words.format(command.decode()).encode()
    async with Filter(redis_server.socket, lambda said: error if said[0].upper() == command else None) as proxy:
        said, _ = await refused_at_once(f"{proxy.url}/1?client_name=app")
    assert masked(error.decode()).removeprefix("ERR ") in said
    assert "we need AUTH" in said


@pytest.mark.parametrize("command", ["INFO", "SCRIPT", "EVALSHA", "EVAL"])
async def test_a_command_of_ours_that_the_server_has_renamed(command: str) -> None:
    with RedisServer("--rename-command", command, "") as server:
        said, _ = await refused_at_once(server.url)
    assert f"unknown command '{command}'" in said


@pytest.mark.parametrize("command", [b"EVAL", b"EVALSHA"])
async def test_an_error_that_nobody_knows_is_a_refusal_once_it_has_come_three_times(
    redis_server: RedisServer, command: bytes
) -> None:
    """Until then it may be anything, and the policy decides; another answer ends it."""
    async with Filter(redis_server.socket, lambda said: "ERR zwölf".encode() if said[0] == command else None) as proxy:
        limiter = create_limiter("redis", redis_url=proxy.url, rules=[RULE], deadline=1, on_outage="allow")
        told: list[Event] = []
        limiter.on_event(told.append)
        assert (await limiter.check("user")).source == "outage"
        raised = ""
        ends_s = time.monotonic() + 4
        while not raised and time.monotonic() < ends_s:
            try:
                assert (await limiter.check("user")).source == "outage"
            except StorageRefused as refused:
                raised = str(refused)
            await asyncio.sleep(0.01)
        assert '("zwölf")' in raised
        assert proxy.connections in {3, 4}
        with pytest.raises(StorageRefused):
            await limiter.check("user")
        proxy.refuses = never
        await until(lambda: served(limiter))
        assert (await limiter.check("another")).source == "redis"
        assert [event.kind for event in told] == ["outage_began", "refused", "outage_ended"]
        await limiter.aclose()


async def test_a_call_that_is_answered_with_the_same_error_again_and_again_is_refused(redis_server: RedisServer) -> None:
    """The beats between are answered, and still nobody is decided."""
    decide = script("decide").sha(True)
    async with (
        Filter(redis_server.socket, lambda said: b"ERR zwolf" if said[0] == b"EVALSHA" and said[1] == decide else None) as proxy,
        create_limiter("redis", redis_url=proxy.url, rules=[RULE], deadline=1, on_outage="allow") as limiter,
    ):
        seen: list[str] = []
        ends_s = time.monotonic() + 5
        while "refused" not in seen and time.monotonic() < ends_s:
            try:
                seen.append((await limiter.check("user")).source)
            except StorageRefused:
                seen.append("refused")
            await asyncio.sleep(0.01)
        assert seen[0] == "outage"
        assert seen[-1] == "refused"


@pytest.mark.parametrize("words", [b"LOADING x", b"TRYAGAIN x", b"ERR max number of clients reached"])
async def test_what_heals_stays_an_outage_however_often_it_comes(redis_server: RedisServer, words: bytes) -> None:
    async with (
        Filter(redis_server.socket, lambda said: words) as proxy,
        create_limiter("redis", redis_url=proxy.url, rules=[RULE], deadline=1, on_outage="allow") as limiter,
    ):
        ends_s = time.monotonic() + 2.4
        while time.monotonic() < ends_s:
            assert (await limiter.check("user")).source == "outage"
            await asyncio.sleep(0.02)
        assert proxy.connections >= 4
        proxy.refuses = never
        await until(lambda: served(limiter))


def test_only_what_comes_back_unchanged_and_from_an_attempt_of_its_own_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 100.0
    monkeypatch.setattr(replies.time, "monotonic", lambda: now_s)
    connection, other, repeated = object(), object(), Repeated()

    def judge(words: str, heard_by: object = connection, step: str = "beat") -> type[StorageError]:
        guess = meaning(words)
        return type(repeated.judge(step, heard_by, guess.error, guess if guess.guessed else None))

    assert [judge("ERR a") for _ in range(4)] == [StorageUnavailable, StorageUnavailable, StorageRefused, StorageRefused]
    assert judge("ERR b") is StorageUnavailable  # other words
    assert judge("ERR b", step="decide") is StorageUnavailable  # to another question
    assert judge("ERR b", step="decide") is StorageUnavailable
    assert judge("LOADING x") is StorageUnavailable  # and this is known to heal
    assert [judge("ERR b") for _ in range(2)] == [StorageUnavailable] * 2
    repeated.went("decide")
    assert judge("ERR b") is StorageRefused
    repeated.went("connecting", "beat")
    assert judge("ERR b") is StorageUnavailable
    for _ in range(8):  # many connections, in one moment
        assert judge("ERR b", other) is StorageUnavailable
    now_s += 0.5
    assert judge("ERR b", other) is StorageUnavailable
    now_s += 0.5
    assert judge("ERR b", object()) is StorageRefused


# No room


@pytest.mark.parametrize("password", [None, "pa55word"])
async def test_a_server_without_room_for_another_client_says_so_and_heals(password: str | None) -> None:
    with RedisServer("--maxclients", "20", password=password) as server:
        with contextlib.ExitStack() as held:
            clients = [held.enter_context(socket.create_connection(("127.0.0.1", server.port))) for _ in range(25)]
            # It has accepted those before the one that it refuses.
            assert await asyncio.to_thread(clients[-1].recv, 100) == b"-ERR max number of clients reached\r\n"
            limiter = create_limiter("redis", redis_url=server.url, rules=[RULE], deadline=1, on_outage="raise")
            told: list[Event] = []
            limiter.on_event(told.append)
            with pytest.raises(StorageUnavailable, match=r"no room for another client .*max number of clients") as full:
                await limiter.check("user")
            assert type(full.value) is StorageUnavailable
            assert [event.kind for event in told] == ["outage_began"]
            assert "max number of clients" in told[0].message
        await until(lambda: served(limiter), 4)
        await limiter.aclose()


# What the system says


@pytest.mark.parametrize("password", ["hunter", "a b", "12345", "correct"])
async def test_a_proxy_that_repeats_what_it_was_sent_does_not_spread_the_password(
    redis_server: RedisServer, password: str
) -> None:
    def repeats(words: list[bytes]) -> bytes | None:
        return b"ERR cannot serve: " + b" ".join(words) + b" for " + words[-1] if words[0] == b"AUTH" else None

    async with Filter(redis_server.socket, repeats) as proxy:
        client = redis.asyncio.Redis.from_url(proxy.url, username="bob", password=password)
        storage = RedisStorage(client, deadline=2, on_outage="raise")
        async with RateThrottleCore(storage, rules=[RULE]) as limiter:
            with pytest.raises(StorageError) as raised:
                await limiter.check("user")
        await client.aclose()
    told = "".join(traceback.format_exception(raised.value))
    assert "cannot serve: AUTH" in str(raised.value)
    assert not re.search(rf"\b{password}\b", told)


async def test_sentinels_that_are_away_or_are_none_say_what_was_said(redis_server: RedisServer) -> None:
    for port, kind, words in (
        (1, StorageUnavailable, r"none of 1 sentinels answers \(ConnectionRefusedError: \[Errno 111\] Connection refused\)"),
        (redis_server.port, StorageRefused, r"are no sentinels .*unknown command 'SENTINEL'"),
    ):
        url = f"redis+sentinel://127.0.0.1:{port}/mymaster"
        async with create_limiter("redis", redis_url=url, rules=[RULE], deadline=2, on_outage="raise") as limiter:
            with pytest.raises(StorageUnavailable, match=words) as raised:
                await limiter.check("user")
        assert type(raised.value) is kind


async def test_what_is_no_redis_at_all_says_what_it_said() -> None:
    async def web(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(b"HTTP/1.1 400 Bad Request\r\nServer: secret\r\n\r\n")
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(web, "127.0.0.1", 0) as server:
        url = f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with create_limiter("redis", redis_url=url, rules=[RULE], deadline=2, on_outage="raise") as limiter:
            with pytest.raises(StorageProtocolError, match=r'each other \("HTTP/1\.1 400 Bad Request"\)'):
                await limiter.check("user")


async def test_an_outage_says_what_the_system_said() -> None:
    async def outage_of(url: str) -> str:
        told: list[Event] = []
        limiter = create_limiter("redis", redis_url=url, rules=[RULE], deadline=2, on_outage="raise")
        limiter.on_event(told.append)
        async with limiter:
            with pytest.raises(StorageUnavailable) as away:
                await limiter.check("user")
        assert str(away.value) in told[0].message
        return str(away.value)

    assert "ConnectionRefusedError: [Errno 111] Connection refused" in await outage_of("redis://127.0.0.1:1")
    assert "FileNotFoundError: [Errno 2] No such file or directory" in await outage_of("unix:///nowhere/redis.sock")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (socket.gaierror(-2, "Name or service not known"), "gaierror: Name or service not known"),
        (
            OSError("Multiple exceptions: [Errno 111] Connect call failed ('::1', 1), [Errno 101] x"),
            "refused, [Errno 101] Network is unr",
        ),
        (ConnectionRefusedError(111, "Connect call failed ('127.0.0.1', 1)"), "[Errno 111] Connection refused"),
        (redis.ConnectionError("Connection closed by server."), "Connection closed by server."),
    ],
)
def test_words_of_the_system(error: BaseException, words: str) -> None:
    assert words in system_words(error)
    assert words in str(failure(error, 0.25, sent=False))
    assert words in str(failure(error, 0.25, sent=True))


class TokenServiceError(OSError):
    """As requests has them, of another module than the system's."""


@pytest.mark.parametrize("error", [RuntimeError("token eyJhbGciOi"), TokenServiceError("https://user:eyJhbGciOi@auth")])
def test_the_words_of_a_credential_provider_are_not_repeated(error: Exception) -> None:
    """They may hold the token. Its class is named, and the error itself is the cause."""
    found = failure(error, 0.25, sent=False)
    assert type(found) is StorageUnavailable
    assert f"credential provider, raised {type(error).__name__}" in str(found)
    assert "eyJ" not in str(found)
    assert found.__cause__ is error


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("ERR unknown command 'EVALSHA', with args beginning with: 'abc' 'app:{1}:r:=key'", "ERR unknown command 'EVALSHA'"),
        ("ERR unknown command `EVALSHA`, with args beginning with: `abc`", "ERR unknown command 'EVALSHA'"),
        ("ERR unknown command EVALSHA ratethrottle:{1}:api:=John Smith", "ERR unknown command EVALSHA …"),
        ("ERR invalid command: AUTH user hunter", "ERR invalid command: AUTH user …"),
        ("ERR HELLO 2 AUTH bob hunter", "ERR HELLO … AUTH …"),
        ("ERR invalid password hunter", "ERR invalid password …"),
        ("ERR invalid password: hunter", "ERR invalid password: …"),
        ("ERR wrong key 'it's' secret' indeed", "ERR wrong key …"),
        ("ERR wrong key 'app:{3}:r:=John' Smith' indeed", "ERR wrong key …"),
        ('ERR near "secret"', "ERR near …"),
        ("ERR near 'secret", "ERR near …"),
        (
            "NOPERM User bob has no permissions to run the 'info' command",
            "NOPERM User … has no permissions to run the 'info' command",
        ),
        ("ERR pa55word and more", "ERR … and more"),
        ("ERR a\r\nINFO:root:forged \x1b[31m\u202e", "ERR a …"),
        ("OOM command not allowed when used memory > 'maxmemory'.", "OOM command not allowed when used memory > 'maxmemory'."),
        ("", ""),
    ],
)
def test_what_a_server_said_is_shown_without_what_may_be_an_argument(said: str, shown: str) -> None:
    assert masked(said) == shown


def test_what_a_server_said_is_one_short_line() -> None:
    for text in ("ERR " + "word " * 1_000, "ERR " + "x" * 10_000, "'" * 10_000, "ERR " + "a'b\n" * 5_000):
        for shown in (masked(text), one_line(text)):
            assert len(shown) <= SAID_MAX
            assert shown.isprintable()


def test_the_commands_of_our_scripts_are_no_arguments() -> None:
    assert {"TIME", "MGET", "SET", "ZADD", "INFO"} < commands()
    for command in commands():
        said = f"User … has no permissions to run the '{command.lower()}' command"
        assert masked(said.replace("…", "bob")) == said
        assert f"allow it +{command.lower()}" in meaning(f"NOPERM {said}").words


# Scripts that aren't there

WITHOUT = """
import asyncio, sys, ratethrottle
limiter = ratethrottle.create_limiter("memory", rules=[ratethrottle.RateThrottleRule("r", 5, 60)])
print("memory:", asyncio.run(limiter.check("user")).allowed)
ratethrottle.create_limiter("redis", redis_url="redis://127.0.0.1:1")
"""


@pytest.mark.parametrize("missing", ["*.lua", "state.lua", "repair.lua"])
def test_a_package_without_its_scripts_says_so_at_once(tmp_path: Path, missing: str) -> None:
    """As PyInstaller leaves it: a warning at import, an error if Redis is wanted, and no harm without Redis."""
    shutil.copytree(Path(ratethrottle.__file__).parent, tmp_path / "ratethrottle")
    for file in (tmp_path / "ratethrottle/storage/redis/lua").glob(missing):
        file.unlink()
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT],
        check=False,
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "memory: True\n"
    assert "RuntimeWarning: the package ratethrottle is incomplete" in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ratethrottle.errors.ConfigurationError")
    assert "PyInstaller: --collect-all ratethrottle" in last


def test_a_script_that_is_damaged_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    client = redis.Redis()  # it reads its own version, from a file too
    script.cache_clear()
    monkeypatch.setattr("pathlib.Path.read_text", lambda *_args, **_options: "return 1")
    with pytest.raises(ConfigurationError, match="missing or damaged"):
        RedisStorage(client)
    monkeypatch.undo()
    RedisStorage(redis.Redis())
