"""Redis answers, with an error: it is busy, loading, full, failing to save, without replicas, or doesn't know us any more."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable

import redis

from tests.faults.board import Run, row
from tests.faults.fleet import Fleet
from tests.faults.judge import between, kinds
from tests.faults.worker import PASSWORD
from tests.kit.servers import RedisServer, eventually

FOREVER = "while true do end"


def refusing(
    run: Run,
    begin: Callable[[RedisServer, redis.Redis], object],
    end: Callable[[RedisServer, redis.Redis], object],
) -> None:
    """Have it refuse for a while."""
    with RedisServer(password=PASSWORD) as server, server.client() as client:
        server.grow_old()
        with Fleet(server.url) as fleet:
            fleet.calm(2)
            with fleet.fault():
                begin(server, client)
                fleet.calm(run.seconds(4, 2))
                end(server, client)
            fleet.calm(run.seconds(8, 2.5))
        run.judge(fleet, attempts=True, events=("outage_began", "outage_ended"))


@row()
def busy(run: Run) -> None:
    """BUSY: somebody's script never ends, until SCRIPT KILL"""
    loops: list[threading.Thread] = []

    def loop_for_ever(server: RedisServer) -> None:
        with server.client() as client, contextlib.suppress(redis.ResponseError):  # it is killed, which is how it ends
            client.eval(FOREVER, 0)

    def begin(server: RedisServer, client: redis.Redis) -> None:
        client.config_set("busy-reply-threshold", "200")
        loops.append(threading.Thread(target=loop_for_ever, args=(server,)))
        loops[0].start()

    def end(server: RedisServer, client: redis.Redis) -> None:
        client.script_kill()
        loops[0].join()

    refusing(run, begin, end)


@row()
def loading(run: Run) -> None:
    """LOADING: restarted with data that takes seconds to load"""
    with RedisServer("--dbfilename", "dump.rdb", password=PASSWORD) as server, server.client() as client:
        with Fleet(server.url) as fleet:
            fleet.calm(2)
            fill(client)
            client.save()
            with fleet.fault():
                server.stop()
                # A millisecond for each key, and time to answer LOADING after each kilobyte.
                server._arguments += ("--key-load-delay", "1000", "--loading-process-events-interval-bytes", "1024")
                server.start()
            fleet.calm(run.seconds(8, 3))
        run.judge(fleet, attempts=True, events=("outage_began", "outage_ended"))


def fill(client: redis.Redis) -> None:
    """Store some thousand keys."""
    with client.pipeline(transaction=False) as pipeline:
        for number in range(3000):
            pipeline.set(f"filler:{number}", "x" * 10, ex=600)
        pipeline.execute()


@row()
def misconf(run: Run) -> None:
    """MISCONF: saving fails, so that Redis takes no writes"""

    def begin(server: RedisServer, client: redis.Redis) -> None:
        (server.directory / "dump.rdb").mkdir()  # a snapshot can't take the place of a directory
        client.config_set("save", "3600 1")
        with contextlib.suppress(redis.ResponseError):  # some versions say at once that it can't be
            client.bgsave()
        eventually(lambda: client.info("persistence")["rdb_last_bgsave_status"] == "err")

    def end(server: RedisServer, client: redis.Redis) -> None:
        client.config_set("save", "")
        client.config_set("stop-writes-on-bgsave-error", "no")

    refusing(run, begin, end)


@row(short=True)
def out_of_memory(run: Run) -> None:
    """OOM: maxmemory is reached under noeviction"""
    refusing(
        run,
        lambda _, client: client.config_set("maxmemory", "1mb"),
        lambda _, client: client.config_set("maxmemory", "0"),
    )


@row()
def no_replicas(run: Run) -> None:
    """NOREPLICAS: min-replicas-to-write without a replica"""
    refusing(
        run,
        lambda _, client: client.config_set("min-replicas-to-write", "1"),
        lambda _, client: client.config_set("min-replicas-to-write", "0"),
    )


@row()
def read_only(run: Run) -> None:
    """READONLY: the server becomes somebody's replica for a while"""
    with RedisServer(password=PASSWORD) as other:
        refusing(
            run,
            lambda _, client: (client.config_set("masterauth", PASSWORD), client.replicaof("127.0.0.1", str(other.port))),
            lambda _, client: client.replicaof("NO", "ONE"),
        )


def unwelcome(run: Run, begin: Callable[[redis.Redis], object], end: Callable[[redis.Redis], object]) -> None:
    """Refuse the user for a while: a typed error at once under each policy, no hammering, and healed when it ends."""
    with RedisServer(password=PASSWORD) as server, server.client() as client:
        server.grow_old()
        client.acl_setuser("service", enabled=True, passwords=[f"+{PASSWORD}"], keys=["*"], categories=["+@all"], channels=["*"])
        with Fleet(f"redis://service:{PASSWORD}@127.0.0.1:{server.port}/0") as fleet:
            fleet.calm(2)
            with fleet.fault():
                begin(client)
                fleet.calm(run.seconds(4, 2))
                end(client)
            fleet.calm(4)
        run.judge(fleet, allowed_errors=("StorageRefused",), attempts=True, admits=False)
        during = kinds(call for began_us, ended_us in fleet.faults for call in between(fleet.logs, began_us, ended_us))
        run.note(f"meanwhile: {dict(during)}")
        run.expect(during["StorageRefused"], "no check raised StorageRefused")


@row()
def password_changed(run: Run) -> None:
    """The user's password changes, and its connections are killed"""

    def begin(client: redis.Redis) -> None:
        client.acl_setuser("service", enabled=True, reset_passwords=True, passwords=["+another"])
        client.execute_command("CLIENT", "KILL", "USER", "service")

    unwelcome(
        run, begin, lambda client: client.acl_setuser("service", enabled=True, passwords=[f"+{PASSWORD}"], reset_passwords=True)
    )


@row()
def user_revoked(run: Run) -> None:
    """The user is deleted, which ends its connections"""
    unwelcome(
        run,
        lambda client: client.acl_deluser("service"),
        lambda client: client.acl_setuser(
            "service", enabled=True, passwords=[f"+{PASSWORD}"], keys=["*"], categories=["+@all"], channels=["*"]
        ),
    )


@row(short=True)
def permission_missing(run: Run) -> None:
    """The user may not run scripts any more: NOPERM on connections that live"""
    unwelcome(
        run,
        lambda client: client.execute_command("ACL", "SETUSER", "service", "-evalsha", "-eval"),
        lambda client: client.execute_command("ACL", "SETUSER", "service", "+evalsha", "+eval"),
    )
