"""The fault board can fail: each thing that it asks for is broken once, in a made-up log or in a real process."""

from __future__ import annotations

import asyncio
import multiprocessing
import socket
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ratethrottle import RateThrottleRule, create_limiter
from ratethrottle.testing.intervals import PromiseBrokenError, check_bracketed
from tests.faults import board, judge
from tests.faults.board import Row, Run, rows
from tests.faults.fleet import Fleet
from tests.faults.proxy import Proxy
from tests.faults.records import KINDS, LATE, RECORD, Call, Held, Log, monotonic_us, read_log
from tests.faults.rows import load
from tests.faults.uses import ALL_RULES, BUCKET, RULES, WIDE, WINDOW
from tests.faults.worker import SECRET, Noise, Work, Worker
from tests.kit.servers import RedisServer

S = 1_000_000
LAST = {"files": 11, "events": [], "statistics": {"breaker": "closed", "owed": 0}}
CLEAN = {"files": 10, "tasks": 3}


def call(
    at_us: int, kind: str = "redis", *, took_us: int = 1_000, process: int = 0, rule: int = WINDOW, allowed: bool = True
) -> Call:
    return Call(process, kind, allowed, rule, 0, at_us, at_us + took_us)


def steady(process: int, until_s: int = 10, besides: tuple[Call, ...] = (), **change: Any) -> Log:
    """A process that has an answer from Redis every tenth of a second."""
    calls = [call(at * S // 10, process=process, rule=WIDE) for at in range(until_s * 10)]
    return Log(
        process, sorted([*calls, *besides], key=lambda one: one.before_us), change.get("late", []), change.get("connects", [])
    )


def fleet(logs: list[Log], *, faults: tuple[tuple[int, int], ...] = ((3 * S, 4 * S),), **report: Any) -> Any:
    """A fleet that has ended, without the processes."""
    told = {"told": 1, "hangs": 0, "noise": [], "busy": [], "secrets": [], "before": CLEAN, "after": CLEAN}
    member = SimpleNamespace(
        killed=False,
        work=SimpleNamespace(number=0),
        ready={"files": 11},
        report={**told, "last": LAST, **report},
    )
    return SimpleNamespace(
        logs=logs, members=[member] * len(logs), living=[member], urls=[""] * len(logs), faults=list(faults), began_us=0,
        ended_us=10 * S, options={"deadline": 0.25}, rules=RULES,
    )  # fmt: skip  # a line for each word would be a page


def judged(given: Any, **how: Any) -> list[str]:
    run = Run(Row("made-up", "", lambda _: None, short=False))
    run.judge(given, **{"bites": False, **how})
    return run.verdict.problems


def test_it_passes_a_fleet_that_did_nothing_wrong() -> None:
    assert judged(fleet([steady(number) for number in range(4)])) == []


@pytest.mark.parametrize("strategy", [BUCKET, WINDOW])
def test_it_fails_an_excess_of_what_redis_granted(strategy: int) -> None:
    spread = tuple(call(2 * S + number * 10_000, rule=strategy, process=number % 4) for number in range(115))
    [problem] = judged(fleet([steady(number, besides=tuple(c for c in spread if c.process == number)) for number in range(4)]))
    assert problem.endswith("units over")


def test_it_fails_an_excess_that_spans_the_fault_and_allows_what_the_policy_states() -> None:
    """60 before and 60 after are over by 20; 60 and 60 by policy aren't, but 120 by policy are."""
    granted = tuple(call(2 * S + number * 10_000) for number in range(60))
    again = tuple(call(5 * S + number * 10_000) for number in range(60))
    by_policy = tuple(call(one.before_us, "outage") for one in again)
    assert judged(fleet([steady(0, besides=granted + again)])) == ["20 units over"]
    assert judged(fleet([steady(0, besides=granted + by_policy)])) == []
    assert judged(fleet([steady(0, besides=by_policy + by_policy)])) == ["20 units over"]
    # Of two processes one was cut off: half of the promise is what it may admit.
    assert judged(fleet([steady(0, besides=granted + by_policy), steady(1)]), cut=1) == ["10 units over"]


def test_it_fails_what_was_admitted_by_policy_and_never_charged() -> None:
    """70 by policy and 60 from Redis after that are over by 30, once both processes are back; while one is away they aren't."""
    by_policy = [call(3 * S + number * 10_000, "outage", process=number % 2) for number in range(70)]
    back = [call(4 * S, rule=WIDE, process=number) for number in range(2)]
    after = [call(5 * S + number * 10_000, process=number % 2) for number in range(60)]
    assert judge.over(RULES, [*by_policy, *back, *after], Fraction(1), local=True) == 30
    assert judge.over(RULES, [*by_policy, *back, *after], Fraction(1), local=False) == 0
    assert judge.over(RULES, [*by_policy, *back, *after[:30]], Fraction(1), local=True) == 0
    still_away = [call(number * S // 10, "outage", process=2, rule=WIDE) for number in range(29, 70)]
    assert judge.over(RULES, [*by_policy, *back, *after, *still_away], Fraction(1), local=True) == 0
    # Another outage ends what is held together, and what is charged of it is held together with what comes then.
    again = [call(5 * S + number * 10_000, "outage") for number in range(30)]
    assert judge.over(RULES, [*by_policy, *back, *again, *after[:70]], Fraction(1), local=True) == 0
    later = [call(7 * S + number * 10_000) for number in range(80)]
    assert judge.over(RULES, [*by_policy, *back, *again, call(6 * S, rule=WIDE), *later], Fraction(1), local=True) == 10


def test_it_fails_more_slots_than_there_are() -> None:
    """Of 4 slots a fifth is held while the others are, or by policy one more than the shares of all."""
    held = [Held(number % 4, False, 1, number * S, 10 * S) for number in range(4)]
    after = Held(0, False, 1, 10 * S, 11 * S)
    elsewhere = Held(0, False, 2, 5 * S, 6 * S)
    assert judge.most_held([*held, after, elsewhere]) == 4
    assert judge.most_held([*held, Held(0, False, 1, 10 * S - 1, 11 * S)]) == 5
    ended = fleet([steady(0), steady(1)])
    ended.rules = ALL_RULES
    ended.logs[0].held.extend(held)
    assert judged(ended) == []
    ended.logs[1].held.append(held[0])
    assert judged(ended) == ["5 slots of 4 were held at once"]
    ended.logs[1].held[:] = [one._replace(by_policy=True) for one in [*held, *held]][:5]
    assert judged(ended) == ["5 slots of 4 were held at once by policy"]


def test_a_long_log_is_held_against_the_promise_too() -> None:
    """A bucket that is over by a tenth for minutes, and a window that is over once."""
    slow = [(number * S // 11, number * S // 11 + 1_000, 1) for number in range(3_300)]
    assert judge.excess_of_long(RULES[BUCKET], slow) > 100
    assert judge.excess_of_long(RULES[BUCKET], slow[: 11 * 60]) == 0
    once = [(number * S, number * S + 1_000, 1) for number in range(300)] + [
        (133 * S + i * 90_000, 133 * S + i * 90_000, 1) for i in range(95)
    ]
    assert judge.excess_of_long(RULES[WINDOW], once) == 5
    assert judge.excess_of_long(RULES[WINDOW], once[:300]) == 0


def test_the_excess_agrees_with_the_interval_checker() -> None:
    log = [(number * 20_000, number * 20_000 + 2_000, 1) for number in range(150)]
    for rule in (RULES[WINDOW], RULES[BUCKET]):
        assert 19 < judge.excess(rule, log) <= 50
        with pytest.raises(PromiseBrokenError):
            check_bracketed(rule, log)
        assert judge.excess(rule, log[:100]) == 0
        check_bracketed(rule, log[:100])
        assert judge.excess(rule, log[:60], Fraction(1, 2)) > 0


@given(
    st.sampled_from([RULES[WINDOW], RULES[BUCKET], RateThrottleRule("small", 3, 1, strategy="leaky_bucket", burst=5)]),
    st.lists(st.tuples(st.integers(0, 12 * S), st.integers(1, S), st.integers(1, 60)), max_size=12),
)
def test_the_excess_agrees_with_the_interval_checker_on_any_log(
    rule: RateThrottleRule, calls: list[tuple[int, int, int]]
) -> None:
    log = [(at_us, at_us + took_us, units) for at_us, took_us, units in calls]
    try:
        check_bracketed(rule, log)
    except PromiseBrokenError:
        assert judge.excess(rule, log) > 0
    else:
        assert judge.excess(rule, log) == 0


def test_it_fails_a_call_that_takes_too_long_and_forgives_a_late_loop() -> None:
    slow = call(3 * S, took_us=400_000, rule=WIDE)
    [problem] = judged(fleet([steady(0, besides=(slow,))]))
    assert problem == "a call took 400 ms, 400 ms without its loop's lag"
    assert judged(fleet([steady(0, besides=(slow,), late=[(3 * S + 100_000, 3 * S + 250_000)])])) == []
    # Lag at another time is no excuse, nor is less lag than that.
    assert judged(fleet([steady(0, besides=(slow,), late=[(4 * S, 5 * S), (3 * S, 3 * S + 90_000)])]))


def test_it_fails_a_fleet_that_heals_late_or_never() -> None:
    gap = steady(0)
    gap.calls[:] = [one for one in gap.calls if not 3 * S < one.before_us < 5_200_000]
    assert judged(fleet([gap, steady(1)])) == ["healed after 1.20 s"]
    never = steady(0)
    never.calls[:] = [one._replace(kind="outage", allowed=False) if one.before_us > 3 * S else one for one in never.calls]
    assert judged(fleet([never])) == ["healed after the run", "not back to normal at the end: {'outage': 10}"]


def test_a_killed_process_answers_for_the_faults_that_it_outlived() -> None:
    """All that lived through a fault may have been killed later, one by one; it has healed for them, or not."""
    ended_us, within_us = 3 * S, S
    whole, later = steady(0), steady(1)
    whole.calls[:] = [one for one in whole.calls if one.before_us < 6 * S]  # killed then
    later.calls[:] = [one for one in later.calls if one.before_us > 5 * S]  # in its place
    [healed] = judge.healed_us([whole, later], [(2 * S, ended_us)], {0}, within_us)
    assert healed is not None
    assert healed <= S // 10
    never = steady(0)
    never.calls[:] = [one._replace(kind="outage") if one.before_us >= ended_us else one for one in whole.calls]
    assert judge.healed_us([never, later], [(2 * S, ended_us)], {0}, within_us) == [None]
    # It was killed before it had its time.
    never.calls[:] = [one for one in never.calls if one.before_us < ended_us + within_us // 2]
    assert judge.healed_us([never, steady(1)], [(2 * S, ended_us)], {0}, within_us) != [None]


def test_it_fails_a_process_that_has_nothing_decided_at_the_end() -> None:
    hung = steady(1)
    hung.calls[:] = [one for one in hung.calls if one.before_us < 8 * S]
    assert judged(fleet([steady(0), hung])) == ["nothing was decided at the end in [1]"]


@pytest.mark.parametrize("kind", ["StorageTimeout", "StorageRefused", "other error"])
def test_it_fails_an_error_where_a_decision_is_due(kind: str) -> None:
    given = fleet([steady(0, besides=(call(3 * S + 5, kind, allowed=False),))])
    assert judged(given) == [f"errors instead of decisions: {{'{kind}': 1}}"]
    assert bool(judged(given, policy="raise")) is (kind != "StorageTimeout")


def test_it_fails_what_a_policy_forbids() -> None:
    assert judged(fleet([steady(0, besides=(call(3 * S, "outage"),))]), policy="deny") == ["deny admitted something"]
    denied = call(3 * S, "outage", allowed=False)
    assert judged(fleet([steady(0, besides=(denied,))]), policy="allow") == ["allow denied something"]


def test_it_fails_a_fault_that_nobody_noticed() -> None:
    assert judged(fleet([steady(0)]), bites=True) == ["nobody noticed the fault: the row proves nothing"]
    denied = fleet([steady(0, besides=(call(3 * S + 5, "outage", allowed=False),))])
    assert judged(denied, bites=True) == ["local admitted nothing while Redis was away"]
    assert judged(denied, bites=True, policy="deny") == []
    assert judged(fleet([steady(0, besides=(call(3 * S + 5, "outage"),))]), bites=True) == []


def test_it_fails_a_storm_of_connections() -> None:
    def attempts(every_us: int) -> list[tuple[int, int]]:
        return [(at_us, 1) for at_us in range(3 * S, 6 * S, every_us)]

    assert judged(fleet([steady(0, connects=attempts(500_000))], faults=((3 * S, 6 * S),)), attempts=True) == []
    [problem] = judged(fleet([steady(0, connects=attempts(300_000))], faults=((3 * S, 6 * S),)), attempts=True)
    assert "attempts to connect" in problem


@pytest.mark.parametrize(
    ("report", "word"),
    [
        ({"hangs": 2}, "hung"),
        ({"noise": ["Task exception was never retrieved"]}, "never retrieved"),
        ({"secrets": [SECRET]}, "told a secret"),
        ({"after": {"files": 11, "tasks": 3}}, "1 files left"),
        ({"after": {"files": 10, "tasks": 4}}, "1 tasks left"),
        ({"last": {**LAST, "statistics": {"breaker": "closed", "owed": 3}}}, "owes what it admitted of 3 keys"),
        ({"last": {**LAST, "statistics": {"breaker": "open", "owed": 0}}}, "is open"),
        ({"last": {**LAST, "files": 20}}, "9 open files more"),
    ],
)
def test_it_fails_what_a_process_leaves_behind(report: dict[str, Any], word: str) -> None:
    [problem] = judged(fleet([steady(0)], **report))
    assert word in problem


@pytest.mark.parametrize(("busy", "times"), [([], 0), ([(53.0, 0.0)], 0), ([(101.0, 0.0)], 1), ([(53.0, 0.0), (51.0, 2.0)], 2)])
def test_it_fails_loops_that_are_kept_busy_more_than_once_or_for_long(busy: list[tuple[float, float]], times: int) -> None:
    problems = judged(fleet([steady(0)], busy=busy))
    assert [problem.partition(":")[0] for problem in problems] == [f"loops were kept busy {times} times"] * bool(times)


def test_it_fails_a_missing_event() -> None:
    assert judged(fleet([steady(0)]), events=("outage",)) == ["process 0 had no event outage"]


def test_an_exception_of_the_harness_fails_the_row_and_a_skip_skips_it() -> None:
    def breaks(run: Run) -> None:
        raise OSError("no more of these")

    assert board.run_row(Row("breaks", "", breaks, short=False)).word == "FAIL"
    skipped = board.run_row(Row("skips", "", lambda _: pytest.skip("no iptables"), short=False))
    assert (skipped.word, skipped.skipped) == ("SKIP", "no iptables")


def test_a_log_is_read_up_to_where_its_process_was_killed(tmp_path: Path) -> None:
    path = tmp_path / "log"
    whole = RECORD.pack(KINDS.index("outage"), 1, 2, 3, 10, 20) + RECORD.pack(LATE, 0, 0, 0, 5, 9)
    path.write_bytes(whole + whole[:7])
    assert read_log(4, path) == Log(4, [Call(4, "outage", True, 2, 3, 10, 20)], [(5, 9)], [])


def test_a_slot_counts_until_the_kill_of_its_process(tmp_path: Path) -> None:
    path = tmp_path / "log"
    holds, held = KINDS.index("holds"), KINDS.index("held")
    begun = [RECORD.pack(holds, 0, 0, 1, at_us, 0) for at_us in (10, 10, 11)] + [RECORD.pack(holds + 1, 0, 0, 2, 12, 0)]
    path.write_bytes(b"".join(begun) + RECORD.pack(held, 0, 0, 1, 10, 20))
    assert read_log(4, path).held == [Held(4, False, 1, 10, 20)]
    assert read_log(4, path, 30).held == [
        Held(4, False, 1, 10, 20), Held(4, False, 1, 10, 30), Held(4, False, 1, 11, 30), Held(4, True, 2, 12, 30),
    ]  # fmt: skip  # in order


async def test_a_loop_that_is_kept_busy_is_written_down(tmp_path: Path) -> None:
    """By the library's own doing: that is not to be forgiven as lag of a busy machine."""
    worker = Worker(Work(0, "", RULES, tmp_path / "log"), multiprocessing.Pipe()[0])
    watch = asyncio.create_task(worker.watch_loop())
    await asyncio.sleep(0.02)
    assert worker.busy == []
    end_ns = time.thread_time_ns() + 80_000_000
    while time.thread_time_ns() < end_ns:
        pass
    await asyncio.sleep(0.02)
    watch.cancel()
    [(busy_ms, _)] = worker.busy
    assert busy_ms >= 80
    await asyncio.gather(watch, return_exceptions=True)
    # The machine may have kept it waiting too, for moments of its own.
    assert len([began_us for began_us, ended_us in read_log(0, tmp_path / "log").late if ended_us - began_us >= 50_000]) == 1


async def test_an_exception_that_nobody_retrieves_is_noise() -> None:
    noise = Noise()
    asyncio.get_running_loop().set_exception_handler(noise._unretrieved)
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    future.set_exception(ValueError("lost"))
    del future
    assert len(noise.noise) == 1
    assert "ValueError('lost')" in noise.noise[0]


# The tools, against real processes


@pytest.mark.redis
def test_a_real_fleet_is_judged_and_a_leak_in_it_found(redis_server: RedisServer) -> None:
    with Fleet(redis_server.url, processes=2, tasks=5) as two:
        two.calm(0.3)
        [first, _] = two.samples()
        two.calm(0.3)
    assert {one.kind for log in two.logs for one in log.calls} <= {"redis", "prefilter"}
    assert first["files"] > 3
    run = Run(Row("real", "", lambda _: None, short=False))
    run.judge(two, heals_s=None, bites=False)
    assert run.verdict.problems == []
    two.members[0].report["after"]["files"] += 1
    run.judge(two, heals_s=None, bites=False)
    assert run.verdict.problems == ["process 0: 1 files left after aclose"]


@pytest.mark.redis
@pytest.mark.parametrize("forgotten", [False, True])
async def test_a_real_charge_is_judged_and_one_that_redis_forgets_found(forgotten: bool) -> None:
    calls: list[Call] = []
    with RedisServer() as server, server.client() as client:
        async with create_limiter("redis", redis_url=server.url, rules=RULES, expected_processes=1) as limiter:

            async def ask(rule: int) -> None:
                before_us = monotonic_us()
                decision = await limiter.check("user", RULES[rule].name)
                calls.append(Call(0, decision.source, decision.allowed, rule, 0, before_us, monotonic_us()))

            await ask(WIDE)
            server.pause()
            for _ in range(60):
                await ask(WINDOW)
            server.resume()
            while calls[-1].kind != "redis":
                await ask(WIDE)
                await asyncio.sleep(0.01)
            if forgotten:  # as if nothing had been charged
                client.delete(*client.keys("*window*"))
            for _ in range(60):
                await ask(WINDOW)
    assert judge.over(RULES, calls, Fraction(1), local=True) == (20 if forgotten else 0)


def test_a_fleet_whose_process_ends_by_itself_fails_at_once(redis_server: RedisServer) -> None:
    one = Fleet(redis_server.url, processes=1, tasks=1)
    try:
        one.add(redis_server.url).process.kill()
        with pytest.raises(RuntimeError, match="ended by itself"):
            one.calm(30)
    finally:
        one.close()


def heard(port: int, answer: Callable[[socket.socket], bytes]) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=5) as client:
        client.settimeout(0.3)
        return answer(client)


def ping(client: socket.socket) -> bytes:
    client.sendall(b"PING\r\n")
    try:
        return client.recv(100)
    except TimeoutError:
        return b"nothing"


@pytest.mark.redis
def test_the_proxy_does_what_its_mode_says(redis_server: RedisServer) -> None:
    with Proxy(redis_server.socket) as proxy:
        for mode, answer in (
            ({}, b"+PONG\r\n"),
            ({"hole": True}, b"nothing"),
            ({"mute": True}, b"nothing"),
            ({"before": b":1\r\n"}, b":1\r\n+PONG\r\n"),
            ({"repeat": True}, b"+PONG\r\n+PONG\r\n"),
            ({"cut_at": 3}, b"+PO"),
            ({"instead": b"*1000000000\r\n"}, b"*1000000000\r\n"),
            ({"trickle_s": 0.05}, b"+"),
        ):
            proxy.set(**mode)
            assert heard(proxy.port, ping) == answer, mode
        proxy.set(accept="no")
        with pytest.raises(ConnectionRefusedError):
            heard(proxy.port, ping)
        proxy.set(accept="reset")
        with pytest.raises(ConnectionResetError):
            heard(proxy.port, ping)
        proxy.set(accept="full")
        with pytest.raises(TimeoutError), socket.create_connection(("127.0.0.1", proxy.port), timeout=0.3):
            pass
        assert proxy.set()["tampered"] == 4
        assert heard(proxy.port, ping) == b"+PONG\r\n"


def test_every_row_has_a_name_of_its_own_and_says_what_happens() -> None:
    load()
    assert len(rows()) > 50
    assert all(each.what for each in rows().values())
    assert 10 <= sum(each.short for each in rows().values()) <= 20
