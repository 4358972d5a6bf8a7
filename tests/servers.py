"""Real servers for the tests: started here, on free loopback ports or Unix sockets, and stopped by their process handles."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest
import redis

START_S = 10


def free_port() -> int:
    """A loopback port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def executable(name: str) -> str:
    """The path of a server's program. Without it the test is skipped on a laptop, and fails where CI=true."""
    found = shutil.which(name)
    if found is None and os.environ.get("CI") == "true":
        pytest.fail(f"{name} is not installed, and under CI=true that is a failure")
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


class RedisServer:
    """One redis-server: `start`, `stop`, `pause` and `resume` are processes and signals, never a guess about who listens.

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
                        pytest.fail(f"redis-server did not start: {(self.directory / 'log').read_text()}")
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

    def close(self) -> None:
        """Stop it and remove what it wrote."""
        self.stop()
        shutil.rmtree(self.directory, ignore_errors=True)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def eventually(true: Callable[[], object], within_s: float = 5.0) -> None:
    """Wait until `true()` is, for what happens in another process."""
    give_up = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < give_up, f"still not true after {within_s} s"
        time.sleep(0.01)
