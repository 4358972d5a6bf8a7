"""Real servers for the tests: started here, on free loopback ports or Unix sockets, and stopped by their process handles."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Never, Self

import pytest
import redis

from ratethrottle.cli.processes import PROGRAM, NoRedis, server_program

START_S = 30  # under valgrind it takes several
SWITCH = re.compile(r"^\d+:X (\d+ \w+ \d{4} [\d:.]+) # \+switch-master \S+ \S+ \d+ \S+ (\d+)$", re.MULTILINE)


# Below those that Linux gives to outgoing connections, or one of these may have it before the server that it is for, or while that
# is down. Each process that imports this begins elsewhere, and gives each one once; one that is forked off later must not ask.
PORTS = range(10_000, 32_768)
_numbers = itertools.count(os.getpid() * 1_009)


def free_port() -> int:
    """A loopback port that nobody listens on."""
    for number in itertools.islice(_numbers, len(PORTS)):
        port = PORTS[number % len(PORTS)]
        with socket.socket() as listener, contextlib.suppress(OSError):  # somebody has it
            listener.bind(("127.0.0.1", port))
            return port
    raise OSError("no port is free")


def executable(name: str) -> str:
    """The path of a server's program. Without it the test is skipped on a laptop, and fails where CI=true.

    For redis-server it is the one that the demo would take: RATETHROTTLE_REDIS_SERVER names another one.
    """
    found = shutil.which(name)
    if name == "redis-server":
        try:
            found = server_program()
        except NoRedis as reason:
            if os.environ.get(PROGRAM):
                pytest.fail(str(reason))
            found = None
    if found is None and os.environ.get("CI") == "true":
        pytest.fail(f"{name} is not installed, and under CI=true that is a failure")
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def lacking(what: str) -> Never:
    """End a test that needs what the server at hand was built without: only one that was chosen may lack it under CI=true."""
    if os.environ.get("CI") == "true" and not os.environ.get(PROGRAM):
        pytest.fail(f"{executable('redis-server')} has no {what}, and under CI=true that is a failure")
    pytest.skip(f"{executable('redis-server')} has no {what}")


class RedisServer:
    """One redis-server: `start`, `stop`, `pause` and `resume` are processes and signals, never a guess about what listens.

    arguments: more of the command line, such as ("--requirepass", "secret"). unix: listen on a socket file only.
    tls: (certificate, key, CA certificate) files; then `port` speaks TLS only.
    """

    def __init__(self, *arguments: str, unix: bool = False, tls: Sequence[Path] = (), password: str | None = None) -> None:
        # A socket's path has at most 107 bytes, and pytest's own temporary directories can be longer than that.
        self.directory = Path(tempfile.mkdtemp(prefix="rt-"))
        self.port = 0 if unix else free_port()
        self.socket = self.directory / "redis.sock"
        self.password = password
        self.tls = tuple(tls)
        self._unix = unix
        self._arguments = arguments
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Where clients find it, with the password if there is one."""
        secret = f":{self.password}@" if self.password else ""
        if self._unix:
            return f"unix://{secret}{self.socket}"
        return f"{'rediss' if self.tls else 'redis'}://{secret}127.0.0.1:{self.port}/0"

    def command(self) -> list[str]:
        """The command line, without the ports."""
        line = [executable("redis-server"), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--daemonize", "no"]
        line += ["--dir", str(self.directory), "--unixsocket", str(self.socket)]
        if self.password:
            line += ["--requirepass", self.password]
        if self.tls:
            certificate, key, authority = map(str, self.tls)
            line += [
                "--tls-cert-file",
                certificate,
                "--tls-key-file",
                key,
                "--tls-ca-cert-file",
                authority,
                "--tls-auth-clients",
                "no",
            ]
        return line + list(self._arguments)

    def start(self) -> Self:
        """Start it, on the same port after a `stop`, and wait until it answers."""
        ports = ["--port", "0", "--tls-port", str(self.port)] if self.tls else ["--port", str(self.port)]
        log = (self.directory / "log").open("ab")
        with log:
            self._process = subprocess.Popen([*self.command(), *ports], stdout=log, stderr=subprocess.STDOUT)
        give_up = time.monotonic() + START_S
        with redis.Redis(unix_socket_path=str(self.socket), password=self.password, socket_timeout=START_S) as client:
            while True:
                try:
                    client.ping()
                except (redis.ConnectionError, redis.exceptions.BusyLoadingError):
                    if self._process.poll() is not None or time.monotonic() > give_up:
                        self.stop()
                        said = (self.directory / "log").read_text()
                        if "Failed finding TLS support" in said:
                            lacking("TLS")
                        pytest.fail(f"redis-server did not start: {said}")
                    time.sleep(0.01)
                else:
                    return self

    def stop(self) -> None:
        """Kill it, even while it is paused. What it held is lost."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def pause(self) -> None:
        """Stop its process where it stands: connections stay open, nothing answers."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let a paused process go on."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def client(self, **settings: Any) -> redis.Redis:
        """A synchronous client of its own for the test's own look at the server."""
        return redis.Redis(unix_socket_path=str(self.socket), password=self.password, **settings)

    def grow_old(self) -> None:
        """Be as if it had been in use for a while: in the first ten seconds of an epoch states carry what a repair would need.

        Then nothing is decided in the way that is short, and it takes the server longer.
        """
        with self.client(decode_responses=True) as client:
            began_us = (int(client.time()[0]) - 60) * 1_000_000
            client.set("ratethrottle:epoch", f"{client.info('server')['run_id']}{began_us:016}{0:016}")

    def close(self) -> None:
        """Stop it and remove what it wrote."""
        self.stop()
        shutil.rmtree(self.directory, ignore_errors=True)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class SentinelServer(RedisServer):
    """One sentinel, whose configuration names the master, its replicas and the other sentinels, so that it need not find them."""

    def __init__(self, number: int, *arguments: str, password: str | None = None) -> None:
        super().__init__(*arguments, password=password)
        self.run_id = f"{number:040x}"

    def configure(self, lines: Sequence[str]) -> None:
        """Write the configuration; the sentinel itself writes to it from then on."""
        own = [f"dir {self.directory}", f"sentinel myid {self.run_id}", *lines]
        if self.password:
            own += [f"requirepass {self.password}", f"sentinel sentinel-pass {self.password}"]
        (self.directory / "sentinel.conf").write_text("\n".join(own) + "\n")

    def command(self) -> list[str]:
        """The command line, without the port. In UTC, for the times in its log."""
        line = ["env", "TZ=UTC", executable("redis-server"), str(self.directory / "sentinel.conf"), "--sentinel"]
        return [*line, "--bind", "127.0.0.1", "--unixsocket", str(self.socket), *self._arguments]

    def switches(self) -> list[tuple[float, int]]:
        """When it said +switch-master, in the time of `time.monotonic()`, to the millisecond, and the port of the new master."""
        behind_s = time.time() - time.monotonic()
        said = SWITCH.findall((self.directory / "log").read_text())
        return [
            (datetime.strptime(f"{at} +0000", "%d %b %Y %H:%M:%S.%f %z").timestamp() - behind_s, int(port)) for at, port in said
        ]


class SentinelTopology:
    """A master, two replicas and three sentinels (quorum 2, a master is down after a second), in under three seconds.

    Each member is a handle with `start`, `stop`, `pause` and `resume`: `nodes`, of which `nodes[0]` is the first master, and
    `sentinels`. A node that was stopped comes back empty, as a master, until the sentinels make it a replica.
    password: of the nodes. sentinel_password: of the sentinels.
    """

    name = "mymaster"

    def __init__(self, *, password: str | None = None, sentinel_password: str | None = None) -> None:
        self.password = password
        trust = ("--masterauth", password) if password else ()
        first = RedisServer("--repl-diskless-sync-delay", "0", *trust, password=password)
        follow = ("--replicaof", f"127.0.0.1 {first.port}", "--repl-diskless-sync-delay", "0", *trust)
        self.nodes = [first, RedisServer(*follow, password=password), RedisServer(*follow, password=password)]
        self.sentinels = [SentinelServer(number, password=sentinel_password) for number in (1, 2, 3)]

    @property
    def addresses(self) -> list[tuple[str, int]]:
        """Of the sentinels."""
        return [("127.0.0.1", sentinel.port) for sentinel in self.sentinels]

    @property
    def master(self) -> RedisServer:
        """The node that the first sentinel names that answers."""
        for sentinel in self.sentinels:
            # One that is stopped or paused: the next one is asked.
            with sentinel.client(socket_timeout=1) as client, contextlib.suppress(redis.ConnectionError, redis.TimeoutError):
                _, port = client.sentinel_get_master_addr_by_name(self.name)
                return next(node for node in self.nodes if node.port == int(port))
        raise AssertionError("no sentinel answers")

    def start(self) -> Self:
        """Start all of it, and wait until a failover is possible."""
        for node in self.nodes:
            node.start()
        with self.nodes[0].client() as client:
            eventually(lambda: [replica["state"] for replica in replicas(client)] == ["online"] * 2)
        for sentinel in self.sentinels:
            sentinel.configure(self._told(sentinel))
            sentinel.start()
        for sentinel in self.sentinels:
            with sentinel.client(decode_responses=True) as client:
                eventually(lambda client=client: self._ready(client))  # type: ignore[misc]  # the default binds the loop's value
        return self

    def failover(self, within_s: float = 10.0) -> float:
        """Have the sentinels change the master as planned; returns when they said +switch-master, in monotonic time."""
        since_s = time.monotonic()
        eventually(self._begin_failover, within_s)
        return self.switched(since_s, within_s)

    def switched(self, since_s: float, within_s: float = 15.0) -> float:
        """Wait for the first +switch-master after a monotonic time; returns when it was said."""
        eventually(lambda: self.moves(since_s), within_s)
        return self.moves(since_s)[0]

    def moves(self, since_s: float) -> list[float]:
        """When the first sentinel said +switch-master of each change of the master since a monotonic time."""
        said = sorted(switch for sentinel in self.sentinels for switch in sentinel.switches() if switch[0] > since_s)
        return [at_s for place, (at_s, port) in enumerate(said) if place == 0 or port != said[place - 1][1]]

    def close(self) -> None:
        """Stop all of it and remove what it wrote."""
        for member in (*self.sentinels, *self.nodes):
            member.close()

    def _told(self, sentinel: SentinelServer) -> list[str]:
        first, *others = self.nodes
        return [
            f"sentinel monitor {self.name} 127.0.0.1 {first.port} 2",
            f"sentinel down-after-milliseconds {self.name} 1000",
            f"sentinel failover-timeout {self.name} 3000",
            *([f"sentinel auth-pass {self.name} {self.password}"] if self.password else []),
            *(f"sentinel known-replica {self.name} 127.0.0.1 {node.port}" for node in others),
            *(
                f"sentinel known-sentinel {self.name} 127.0.0.1 {other.port} {other.run_id}"
                for other in self.sentinels
                if other is not sentinel
            ),
        ]

    def _ready(self, client: redis.Redis) -> bool:
        known: list[Any] = [client.sentinel_master(self.name)]
        for others in (client.sentinel_slaves(self.name), client.sentinel_sentinels(self.name)):
            known += others  # type: ignore[arg-type]  # redis-py's types allow for its asyncio half too
        return len(known) == 5 and not any("down" in str(one["flags"]) or "disconnected" in str(one["flags"]) for one in known)

    def _begin_failover(self) -> bool:
        """Ask one sentinel for it, once all that answer are through with the last one; refused while no replica is good."""
        named = set()
        for sentinel in self.sentinels:
            away = contextlib.suppress(redis.ConnectionError, redis.TimeoutError)  # one that is stopped or paused has no say
            with sentinel.client(socket_timeout=1, decode_responses=True) as client, away:
                state = client.sentinel_master(self.name)
                named.add(state["port"])
                if "failover" in str(state["flags"]):
                    return False
        for sentinel in self.sentinels:
            # As above.
            with sentinel.client(socket_timeout=1) as client, contextlib.suppress(redis.ConnectionError, redis.TimeoutError):
                try:
                    return len(named) == 1 and bool(client.execute_command("SENTINEL", "FAILOVER", self.name))
                except redis.ResponseError:
                    return False
        return False

    def __enter__(self) -> Self:
        try:
            return self.start()
        except BaseException:
            self.close()
            raise

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def replicas(client: redis.Redis) -> list[dict[str, Any]]:
    """What a master says of its replicas."""
    told = client.info("replication")
    return [told[f"slave{number}"] for number in range(told["connected_slaves"])]


def eventually(true: Callable[[], object], within_s: float = 5.0) -> None:
    """Wait until `true()` is, for what happens in another process."""
    give_up = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < give_up, f"still not true after {within_s} s"
        time.sleep(0.01)
