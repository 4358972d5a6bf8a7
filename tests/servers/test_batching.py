"""Crowds on a real Redis, on asyncio's loop and on uvloop: what is granted, what is sent, and when checks without an answer give up."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from types import SimpleNamespace
from typing import Any

import pytest
import redis
import uvloop

from ratethrottle import Decision, RateThrottleCore, RateThrottleRule, RedisStorage, Request
from ratethrottle.errors import StorageError, StorageProtocolError, StorageUnavailable
from ratethrottle.storage.redis import greeting
from ratethrottle.storage.redis.wire import take_over
from tests.kit.recovery import until
from tests.kit.relay import Relay
from tests.kit.servers import RedisServer
from tests.kit.strategies import STRATEGIES

pytestmark = pytest.mark.redis

KEYS, CHECKS, LIMIT = 50, 2_000, 25
Run = Callable[[Coroutine[Any, Any, Any]], Any]


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Run:
    def run(work: Coroutine[Any, Any, Any]) -> Any:
        with asyncio.Runner(loop_factory=request.param) as runner:
            return runner.run(work)

    return run


def limiter_of(url: str, *rules: RateThrottleRule, **options: Any) -> RateThrottleCore:
    return RateThrottleCore(RedisStorage.from_url(url, **{"deadline": 10, **options}), rules=rules)


def calls(client: redis.Redis) -> Counter[str]:
    """How often the server has run each command."""
    return Counter({name.removeprefix("cmdstat_"): facts["calls"] for name, facts in client.info("commandstats").items()})


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_crowd_gets_exactly_the_limit_of_each_key(
    run: Run, redis_server: RedisServer, redis_client: redis.Redis, strategy: str
) -> None:
    rule = RateThrottleRule("r", LIMIT, 3600, strategy=strategy)

    async def crowd() -> list[Decision]:
        async with limiter_of(redis_server.url, rule) as limiter:
            await limiter.peek("somebody else")
            return await asyncio.gather(*(limiter.check(f"user:{i % KEYS}") for i in range(CHECKS)))

    before = calls(redis_client)
    decisions = run(crowd())
    ran = calls(redis_client) - before
    admitted = Counter(decision.key for decision in decisions if decision.allowed)
    assert admitted == {f"user:{i}": LIMIT for i in range(KEYS)}
    # All of it fits one call, besides the peek: each key is read once and written once. Beats, which rank us, come by time.
    assert (ran["mget"] - ran["zscore"], ran["psetex"]) == (2, KEYS)
    for i in range(KEYS):
        heard = [decision.remaining for decision in decisions if decision.key == f"user:{i}" and decision.allowed]
        assert heard == list(range(LIMIT))[::-1]


def test_when_all_replies_come_at_once_half_of_the_tasks_are_enough_to_send_again(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the server would have nothing to do until the last task had its turn, and then both calls, and so on for ever."""
    order = ""

    def heard(*args: Any) -> SimpleNamespace:
        wire = take_over(*args)

        def write(data: bytes) -> None:
            nonlocal order
            order += "" if b":processes\r\n" in data else "w"  # a beat comes by time
            wire.write(data)

        return SimpleNamespace(write=write)

    async def task(limiter: RateThrottleCore, number: int) -> None:
        nonlocal order
        await limiter.check(f"user:{number}")
        order += "t"
        await limiter.check(f"user:{number}")

    async def crowd(server: RedisServer) -> None:
        nonlocal order
        async with limiter_of(server.url, RateThrottleRule("r", LIMIT, 3600)) as limiter:
            await limiter.peek("somebody else")
            order = ""
            server.pause()
            tasks = [asyncio.create_task(task(limiter, number)) for number in range(64)]
            await asyncio.sleep(0.01)
            assert order == "ww"
            server.resume()
            await asyncio.gather(*tasks)

    monkeypatch.setattr(greeting, "take_over", heard)
    with RedisServer() as server:
        run(crowd(server))
    assert order == "ww" + 32 * "t" + "w" + 32 * "t" + "w"


def test_check_many_takes_as_many_calls_as_it_has_to(run: Run, redis_server: RedisServer, redis_client: redis.Redis) -> None:
    rule = RateThrottleRule("r", 3, 3600)

    async def many() -> list[Decision]:
        async with limiter_of(redis_server.url, rule) as limiter:
            return await limiter.check_many([f"user:{i % 300}" for i in range(900)] + ["user:7"])

    before = calls(redis_client)
    decisions = run(many())
    assert [decision.key for decision in decisions[:300]] == [f"user:{i}" for i in range(300)]
    assert [decision.remaining for decision in decisions[:900]] == [2] * 300 + [1] * 300 + [0] * 300
    assert not decisions[900].allowed
    ran = calls(redis_client) - before
    # 900 in calls of at most 128 items. Each call reads its keys at once; so does a beat, which then ranks us.
    assert ran["mget"] - ran["zscore"] <= 8


def test_a_call_of_many_rules_has_few_items(run: Run, redis_server: RedisServer, redis_client: redis.Redis) -> None:
    rules = [RateThrottleRule(f"r{i}", 3, 3600) for i in range(100)]

    async def many() -> list[Decision]:
        async with limiter_of(redis_server.url, *rules) as limiter:
            return await limiter.check_many([Request("user", rule.name) for rule in rules])

    before = calls(redis_client)
    assert all(decision.allowed and decision.remaining == 2 for decision in run(many()))
    ran = calls(redis_client) - before
    # A rule takes as long to read as three items to decide, so that a call has at most 32 of them.
    assert 4 <= ran["mget"] - ran["zscore"] <= 7


def test_what_nobody_waits_for_has_room_beside_any_number_of_rules(run: Run, redis_server: RedisServer) -> None:
    rules = [RateThrottleRule(f"r{i}", 10**6, 3600) for i in range(120)]

    async def flooded() -> None:
        leased = RateThrottleRule("leased", 1_000, 3600, lease=True)
        async with limiter_of(redis_server.url, *rules, leased) as limiter:
            used = 0
            while limiter.statistics().leases == 0:
                used += len([decision for decision in await limiter.check_many([Request("k", "leased")] * 20) if decision])
            over = asyncio.Event()

            async def flood(rule: str) -> None:
                while not over.is_set():
                    await limiter.check("user", rule)

            async def back() -> bool:
                return used + (await limiter.peek("k", "leased")).remaining == 1_000

            async with asyncio.TaskGroup() as group:
                for rule in rules:
                    group.create_task(flood(rule.name))
                try:
                    # The lease ends meanwhile, and what is left of it goes back.
                    await until(back)
                finally:
                    over.set()

    run(flooded())


def test_cancelled_checks_change_nobody_else(run: Run, redis_server: RedisServer) -> None:
    rule = RateThrottleRule("r", LIMIT, 3600)
    rng = random.Random(5)

    async def crowd() -> list[tuple[str, Decision | None]]:
        async with limiter_of(redis_server.url, rule) as limiter:
            tasks = [asyncio.create_task(limiter.check(f"user:{i % KEYS}")) for i in range(CHECKS)]
            doomed = rng.sample(tasks, CHECKS // 2)
            for wave in range(5):
                await asyncio.sleep(0 if wave < 3 else 0.001)
                for task in doomed[wave::5]:
                    task.cancel()
            await asyncio.wait(tasks)
            return [(f"user:{i % KEYS}", None if task.cancelled() else task.result()) for i, task in enumerate(tasks)]

    results = run(crowd())
    for key in {key for key, _ in results}:
        told = [decision for other, decision in results if other == key and decision is not None]
        # Those that are left hear of ever less, as in a queue; no place is given twice.
        left = [decision.remaining for decision in told if decision.allowed]
        assert left == sorted(set(left), reverse=True)
        assert len(left) <= LIMIT
        assert [decision.allowed for decision in told] == [True] * len(left) + [False] * (len(told) - len(left))


def test_each_check_gives_up_at_its_own_deadline(run: Run, redis_server: RedisServer) -> None:
    rule = RateThrottleRule("r", 1_000, 3600, on_outage="raise")
    deadline_s = 0.2

    async def one(limiter: RateThrottleCore, after_s: float) -> float:
        await asyncio.sleep(after_s)
        began = time.perf_counter()
        with pytest.raises(StorageError):
            await limiter.check("user")
        return time.perf_counter() - began

    async def worst_lag() -> float:
        """How late the loop runs a timer, whatever keeps this machine busy."""
        lag_s = 0.0
        for _ in range(60):
            began = time.perf_counter()
            await asyncio.sleep(0.01)
            lag_s = max(lag_s, time.perf_counter() - began - 0.01)
        return lag_s

    async def withheld() -> tuple[float, float]:
        async with Relay(redis_server.socket) as relay, limiter_of(relay.url, rule, deadline=deadline_s) as limiter:
            await limiter.check("user")
            relay.tamper = lambda reply: b""
            lag_s, *waited_s = await asyncio.gather(worst_lag(), *(one(limiter, 0.01 * i) for i in range(30)))
            return max(waited_s), lag_s

    waited_s, lag_s = run(withheld())
    assert waited_s < deadline_s + 0.05 + lag_s


def test_a_reset_is_felt_by_others_within_the_ttl_and_at_once_where_it_was_made(run: Run, redis_server: RedisServer) -> None:
    rule = RateThrottleRule("r", 5, 3600)

    async def reset() -> None:
        one, other = (limiter_of(redis_server.url, rule, prefilter_ttl=0.2) for _ in range(2))
        async with one, other:
            assert [(await other.check("user")).allowed for _ in range(6)] == [True] * 5 + [False]
            assert not await one.check("user")
            assert [(await limiter.check("user")).source for limiter in (one, other)] == ["prefilter"] * 2
            await one.reset("user")
            began = time.perf_counter()
            assert (await one.check("user")).source == "redis"
            while not await other.check("user"):
                assert time.perf_counter() - began < 2  # 0.2 and a machine that may be busy
                await asyncio.sleep(0.005)

    run(reset())


def test_a_hot_key_costs_one_call_in_a_ttl(run: Run, redis_server: RedisServer) -> None:
    rule = RateThrottleRule("r", 5, 3600)

    async def hammer() -> tuple[int, Counter[str]]:
        async with limiter_of(redis_server.url, rule, prefilter_ttl=0.1) as limiter:
            [mine] = limiter._storage._connections_here()
            await asyncio.gather(*(limiter.check("user") for _ in range(6)))
            before, ends = mine.batch.sent_items, time.perf_counter() + 0.35
            sources: Counter[str] = Counter()
            while time.perf_counter() < ends:
                decisions = await asyncio.gather(*(limiter.check("user") for _ in range(50)))
                sources += Counter(decision.source for decision in decisions)
                assert not any(decision.allowed for decision in decisions)
                await asyncio.sleep(0)
            return mine.batch.sent_items - before, sources

    asked, sources = run(hammer())
    assert 2 <= asked <= 4
    assert sources["prefilter"] > 1_000
    assert set(sources) == {"redis", "prefilter"}


def test_several_loops_of_one_storage_wait_for_nobody_elses_answers(run: Run, redis_server: RedisServer) -> None:
    """In two threads, on one key that is used up: each asks for itself."""
    rule = RateThrottleRule("r", 5, 3600)
    limiter = limiter_of(redis_server.url, rule, deadline=0.5, prefilter_ttl=0.001)

    async def hammer() -> int:
        ends, denied = time.perf_counter() + 0.3, 0
        while time.perf_counter() < ends:
            denied += sum(not decision.allowed for decision in await asyncio.gather(*(limiter.check("user") for _ in range(5))))
            await asyncio.sleep(0.001)
        return denied

    async def both() -> list[int]:
        return await asyncio.gather(asyncio.to_thread(asyncio.run, hammer()), hammer())

    assert min(run(both())) > 20


async def test_it_goes_on_after_somebody_has_cancelled_every_task(redis_server: RedisServer) -> None:
    async with limiter_of(redis_server.url, RateThrottleRule("r", 100, 60), connections=3) as limiter:
        await limiter.check_many([f"k{i}" for i in range(20)])
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        assert all(await limiter.check_many([f"k{i}" for i in range(20)]))


@pytest.mark.parametrize("call", ["check", "peek", "reset"])
def test_without_a_loop_of_asyncio_it_says_so(call: str) -> None:
    limiter = limiter_of("redis://127.0.0.1:1", RateThrottleRule("r", 100, 60))
    with pytest.raises(StorageUnavailable, match="asyncio"):
        getattr(limiter, call)("user").send(None)


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt])
def test_what_ends_the_program_after_a_check_ends_it(run: Run, redis_server: RedisServer, error: type[BaseException]) -> None:
    limiter = limiter_of(redis_server.url, RateThrottleRule("r", 100, 60))

    async def ends() -> None:
        await limiter.check("user")
        raise error

    async def main() -> None:
        task = asyncio.create_task(ends())
        await asyncio.sleep(5)
        await task

    started = time.monotonic()
    with pytest.raises(error):
        run(main())
    assert time.monotonic() - started < 4


FIXED, SLIDING = "fixed_window", "sliding_window"
IMPOSSIBLE = [
    *(
        (FIXED, numbers)
        for numbers in ((), (4, 4, 0), (-1, 0, 0), (1, -1, 0), (1, 2**32 + 1, 0), (1, 1, -60_000_001), (1, 1, 60_000_000))
    ),
    *((FIXED, numbers) for numbers in ((1, 10**17, 0), (1, 1), (1, 1, 0, 1), (1, 1, 0, 2, 5), (1, 1, 0, 0, 5))),
    # Refused, but not until when; granted, and until when.
    *((SLIDING, numbers) for numbers in ((0, 100, 1, 1), (1, 5, 1, 1, 1))),
    # Longer than any window; in the past; never, but for the one number that may say so.
    *((SLIDING, numbers) for numbers in ((0, 9, 1, 1, 10**10), (0, 9, 1, 1, -2), (1, 5, -1, 1), (1, 5, 1, -1), (0, 9, 1, -1, 1))),
]


async def hears(
    redis_server: RedisServer, strategy: str, numbers: tuple[int, ...], ask: Callable[[RateThrottleCore], Awaitable[Any]]
) -> None:
    """A storage that hears these numbers, and then what Redis says."""
    rule = RateThrottleRule("r", 100, 60, strategy=strategy, on_outage="raise")
    async with Relay(redis_server.socket) as relay:
        limiter = limiter_of(relay.url, rule)
        await limiter.check("user")
        told = [b":%d" % number for number in numbers]

        def tamper(reply: bytes) -> bytes:
            _length, *lines = reply.split(b"\r\n")
            if len(lines[3]) == 17:  # to a beat: an epoch
                return reply
            return b"\r\n".join([b"*%d" % (2 + len(told)), *lines[:3], *told, b""])

        relay.tamper = tamper
        try:
            await ask(limiter)
        finally:
            relay.tamper = lambda reply: reply
            assert (await limiter.check("user")).allowed
            await limiter.aclose()


@pytest.mark.parametrize(("strategy", "numbers"), IMPOSSIBLE)
async def test_numbers_that_no_script_gives_are_a_protocol_error(
    redis_server: RedisServer, strategy: str, numbers: tuple[int, ...]
) -> None:
    with pytest.raises(StorageProtocolError):
        await hears(redis_server, strategy, numbers, lambda limiter: limiter.check("user"))


async def test_a_peek_is_granted_once_at_most(redis_server: RedisServer) -> None:
    with pytest.raises(StorageProtocolError):
        await hears(redis_server, FIXED, (2, 1, 0), lambda limiter: limiter.peek("user"))


@pytest.mark.parametrize("numbers", [(0, 100, 1, 1, 1, 1, 1, 1), (1, 1, 1, 1, 0, 100, 1, 1), (1, 1, 1, 1, 1, 1, 1, 1, 1)])
async def test_answers_that_do_not_end_where_they_must_are_a_protocol_error(
    redis_server: RedisServer, numbers: tuple[int, ...]
) -> None:
    heard: list[Any] = []

    async def both(limiter: RateThrottleCore) -> None:
        heard.extend(await asyncio.gather(limiter.check("one"), limiter.check("two"), return_exceptions=True))

    await hears(redis_server, SLIDING, numbers, both)
    assert [type(decision) for decision in heard] == [StorageProtocolError] * 2


@pytest.mark.parametrize("policy", ["raise", "local"])
async def test_what_would_hold_redis_for_too_long_is_asked_in_several_calls(redis_server: RedisServer, policy: str) -> None:
    """All are decided by Redis, each once, and nobody notices but by the number of calls."""
    old, new = RateThrottleRule("r", 64, 3_600, on_outage=policy), RateThrottleRule("r", 64, 3_000, on_outage=policy)
    limiter = limiter_of(redis_server.url, old)
    keys = [f"k{i}" for i in range(60)]
    for _ in range(20):
        assert all(await asyncio.gather(*(limiter.check(key) for key in keys)))
    limiter.add_rule(new, replace=True)
    before = limiter.statistics().calls
    asked = [(key, cost) for key in keys for cost in (1, 2, 1)]
    decisions = await asyncio.gather(*(limiter.check(key, cost=cost) for key, cost in asked))
    assert limiter.statistics().calls - before > 4
    assert {decision.source for decision in decisions} == {"redis"}
    for i in range(0, len(asked), 3):
        assert min(decision.remaining for decision in decisions[i : i + 3]) == 40
        assert all(decisions[i : i + 3])
    await limiter.aclose()
