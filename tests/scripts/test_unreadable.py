"""Keys whose state can't be read: only their own checks fail, whatever stands there, and a reset mends them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import redis

from ratethrottle import RateThrottleRule, Request, StateUnreadable, create_limiter, events
from ratethrottle._engine.definitions import CompiledRule
from ratethrottle.storage.redis.scripts import script
from ratethrottle.testing.manual import steer
from tests.kit.clocked import EPOCH, EPOCH_KEY, ClockedScript, ClockedServer, Lease, make_call, words_of
from tests.kit.strategies import START_US, STRATEGIES, make_rule

MINUTE_US = 60_000_000
NOW_US = START_US + 20_000_000
UNREADABLE = -2
# What today's code wrote, with what it read of it later. A later version reads them alike.
FORMAT_1 = [json.loads(line) for line in (Path(__file__).parents[1] / "states/format_1.jsonl").read_text("utf-8").splitlines()]
LARGEST_S = 32 * 366 * 86_400


def rule(strategy: str, limit: int = 100) -> CompiledRule:
    return make_rule(strategy, limit, MINUTE_US).compiled


@pytest.mark.parametrize("written", FORMAT_1, ids=lambda written: written["name"])
def test_states_of_this_format_are_read_for_ever(redis_client: redis.Redis, written: dict[str, Any]) -> None:
    clocked = ClockedScript(redis_client)
    rules = {letter: make_rule(*facts).compiled for letter, facts in written["rules"].items()}
    redis_client.set(EPOCH_KEY, written["epoch"])
    for since_us, letter, cost, *expected in written["reads"]:
        redis_client.set("k", written["state"])
        for mode in ("peek", "check"):
            call = make_call([(rules[letter], "k", cost)], mode, now_us=written["start_us"] + since_us)
            call.args[1] = written["epoch"]
            answer = call.answers(clocked.send(redis_client, written["start_us"] + since_us, call))[0]
            assert mode == "check" or list(answer) == expected, (since_us, letter, cost)
            assert answer[0] == expected[0]


def next_format(name: str) -> str:
    """The script as a version would have it that writes format 2, and reads that and the one before."""
    text = script(name).text.decode()
    for today, later in (
        ("'1', '^[1]([^;]*;)()'", "'2', '^[12]([^;]*;)()'"),
        ("'1;'", "'2;'"),
        ("'^[1](", "'^[12]("),
        ("'1' ..", "'2' .."),
    ):
        text = text.replace(today, later)
    return text


@pytest.mark.parametrize("written", FORMAT_1, ids=lambda written: written["name"])
def test_the_next_format_has_a_reader_for_this_one(redis_client: redis.Redis, written: dict[str, Any]) -> None:
    later, today = ClockedScript(redis_client, steer(next_format("decide"))), ClockedScript(redis_client)
    redis_client.set(EPOCH_KEY, written["epoch"])
    rules = {letter: make_rule(*facts).compiled for letter, facts in written["rules"].items()}
    for since_us, letter, cost, *expected in written["reads"]:
        redis_client.set("k", written["state"])
        now_us = written["start_us"] + since_us
        call = make_call([(rules[letter], "k", cost)], "check", now_us=now_us)
        call.args[1] = written["epoch"]
        assert call.answers(later.send(redis_client, now_us, call))[0][0] == expected[0]
        if not expected[0]:
            continue
        state = redis_client.get("k") or b""
        assert state.startswith(b"2"), "what is written is of the format that is written"
        assert call.answers(later.send(redis_client, now_us, call)), "and is read again"
        redis_client.set("k", state)
        assert today.send(redis_client, now_us, call)[2:] == [UNREADABLE], "but not by a version that doesn't know it"
        assert redis_client.get("k") == state


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", ["list", "hash", "set", "zset", "stream", "later", "empty"])
def test_a_key_that_isnt_ours_fails_its_own_checks_alone_and_a_reset_mends_it(
    redis_client: redis.Redis, strategy: str, kind: str
) -> None:
    make = {
        "list": lambda: redis_client.rpush("b", 1),
        "hash": lambda: redis_client.hset("b", "a", 1),
        "set": lambda: redis_client.sadd("b", 1),
        "zset": lambda: redis_client.zadd("b", {"a": 1}),
        "stream": lambda: redis_client.xadd("b", {"a": 1}),
        "later": lambda: redis_client.set("b", "2;whatever a later version writes"),
        "empty": lambda: redis_client.set("b", ""),
    }[kind]
    make()
    before, clocked, own = redis_client.type("b"), ClockedScript(redis_client), rule(strategy)
    for mode in ("check", "peek"):
        call = make_call([(own, key, 3) for key in ("a", "b", "c", "b")], mode)
        reply = clocked.send(redis_client, NOW_US, call)
        assert reply.count(UNREADABLE) == 2
        healthy = make_call([(own, key, 3) for key in ("a", "c")], mode)
        assert [n for n in reply if n != UNREADABLE] == [*healthy_reply(redis_client, healthy, mode)]
        redis_client.delete("a", "c")
    assert redis_client.type("b") == before
    leased = make_call([], leases=[Lease(own, key, 1, 1, 5) for key in ("a", "b", "c")])
    assert clocked.send(redis_client, NOW_US, leased).count(UNREADABLE) == 1
    server = ClockedServer(redis_client, NOW_US)
    make()
    known = {"b": (own.unit_ticks, 0, 0), "s": (3, 5, 0), "f": (3, 5, 0), "c": (3, 5, 2)}[own.kind]
    words = [getattr(own, word) for word in script("repair").header["rule"]]
    items = [number for place in (1, 2, 3) for number in (place, 1, 0, *known, 0)]
    told = server.run("repair", ["a", "b", "c"], NOW_US, "assert", server.epoch, 1, 3, *words, *items, "p", 0, 1)
    assert told == [NOW_US, 2, 2, 2]
    charges = [number for place in (1, 2, 3) for number in (place, 1, 0, 1, 0, 5)]
    told = server.run("repair", ["a", "b", "c", "m"], NOW_US, "charge", server.epoch, 1, 3, *words, *charges)
    assert told == [NOW_US, 2, 2, 2]
    assert redis_client.type("b") == before
    server.run("reset", ["b"], NOW_US, server.epoch, 0)
    call = make_call([(own, "b", 3)])
    call.args[1] = server.epoch
    assert server.decide.send(redis_client, NOW_US, call)[2] == 1


def healthy_reply(client: redis.Redis, call: Any, mode: str) -> list[Any]:
    """What the others hear in a call without the bad one."""
    for key in call.keys:
        client.delete(key)
    reply: list[Any] = ClockedScript(client).send(client, NOW_US, call)
    return reply


def damaged(rng: random.Random, state: bytes) -> bytes:
    """A state with something wrong, as bit flips, half writes and strangers make it."""
    text, kind, at = state.decode(), rng.randrange(8), rng.randrange(len(state))
    if kind == 0:
        text = text[:at]
    elif kind == 1:
        text += text[at:]
    elif kind == 2:
        text = text[:at] + rng.choice("0123456789;,bfcsx-e. ") + text[at + 1 :]
    elif kind == 3:
        text = text[:at] + text[at + 1 + rng.randrange(4) :]
    elif kind == 4:
        text = text[:at] + rng.choice(("9" * 20, "9" * 400, "0", "-1", "nan", "inf", "1e9", "00", "1;")) + text[at:]
    elif kind in (5, 6):
        fields = text.split(",")
        fields[rng.randrange(len(fields))] = rng.choice(
            ("9" * 15, "9" * 17, "9" * 400, "0", "1", "-1", "nan", "", "4000000001", "07")
        )
        text = ",".join(fields)
    else:
        text = rng.choice((text * 2, text[::-1], "1;" + text, text.replace(";", ";;"), text.replace("1", "2"), "1" + text))
    return text.encode()


def in_range(compiled: CompiledRule, numbers: list[int]) -> bool:
    """What a process takes for an answer."""
    granted, held, *rest = numbers
    window_us = compiled.window_us
    return 0 <= granted <= 3 and 0 <= held < 2**53 and all(-window_us <= n <= max(4 * 10**9, 3 * window_us) for n in rest)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_whatever_is_damaged_the_other_entries_are_right_and_all_numbers_are_in_range(
    redis_client: redis.Redis, strategy: str
) -> None:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    rng, clocked = random.Random(seed), ClockedScript(redis_client)
    states = [written for written in FORMAT_1 if "e18" not in written["state"]]
    alone = make_call([(rule(strategy), "good", 2)])
    redis_client.delete("good")
    expected = clocked.send(redis_client, NOW_US, alone)[2:]
    for case in range(400):
        written = rng.choice(states)
        state = damaged(rng, written["state"].encode())
        own = make_rule(*rng.choice(list(written["rules"].values()))).compiled if rng.random() < 0.7 else rule(strategy)
        now_us = written["start_us"] + rng.choice((0, 1_000, 10**6, 30 * 10**6, 90 * 10**6, -(10**6), -(10**9)))
        redis_client.set("bad", state)
        redis_client.delete("good")
        mode = rng.choice(("check", "check", "peek"))
        leases = [Lease(own, "bad", 1, 1, 5, 3, now_us - 1_000)] if rng.random() < 0.3 else []
        items = [(own, "bad", rng.choice((1, own.capacity))), (rule(strategy), "good", 2)]
        call = make_call(items, "check", leases=leases, now_us=now_us)
        call.args[0] = mode
        redis_client.set(EPOCH_KEY, EPOCH)
        reply = clocked.send(redis_client, now_us, call)[2:]
        bad = 1 if reply[0] == UNREADABLE else answer_size(own, reply, 1)
        assert bad == 1 or in_range(own, reply[:bad]), (seed, case, state, reply)
        rest = reply[bad:]
        if mode == "check" and now_us == NOW_US:
            assert rest[: len(expected)] == expected
        good = answer_size(rule(strategy), rest, 1)
        assert rest[0] == 1, "the other one is granted"
        assert rest[1] > 0 or mode == "peek"
        assert in_range(rule(strategy), rest[:good]), (seed, case, state, reply)
        # A repair isn't refused for it either.
        server_state(redis_client, own, state, rng)


def answer_size(compiled: CompiledRule, numbers: list[int], count: int) -> int:
    length = len(script("decide").header[f"answer_{compiled.kind}"])
    return length - (compiled.kind == "s" and numbers[0] >= count)


def server_state(client: redis.Redis, own: CompiledRule, state: bytes, rng: random.Random) -> None:
    """Assert, charge and reset with a damaged state beside a good one."""
    server = ClockedServer(client, NOW_US)
    client.set("bad", state)
    words = words_of(own, script("repair").header["rule"], NOW_US)
    known = {"b": (own.unit_ticks, 0, 0), "s": (3, 5, 0), "f": (3, 5, 0), "d": (3, 5, 0), "c": (3, 5, 2)}[own.kind]
    items = [number for place in (1, 2) for number in (place, 1, rng.choice((0, NOW_US)), *known, 0)]
    told = server.run("repair", ["bad", "good"], NOW_US, "assert", server.epoch, 1, 2, *words, *items, "p", 0, 1)
    at_us, applied, *_ = told
    assert (at_us, applied >= 1) == (NOW_US, True)
    client.set("bad", state)
    charges = [number for place in (1, 2) for number in (place, 1, 0, 1, 0, 1)]
    _, applied, *_ = server.run("repair", ["bad", "good", "m"], NOW_US + 1, "charge", server.epoch, 1, 2, *words, *charges)
    assert applied >= 1
    client.set("bad", state)
    server.run("reset", ["bad"], NOW_US, server.epoch, 0)
    call = make_call([(own, "bad", 1)], now_us=NOW_US)
    call.args[1] = server.epoch
    assert server.decide.send(client, NOW_US, call)[2] == 1, "a reset mends whatever stands there"


@pytest.mark.parametrize("policy", ["local", "allow", "deny", "raise"])
async def test_one_key_that_cant_be_read_fails_nobody_else(redis_server: Any, redis_client: redis.Redis, policy: str) -> None:
    """Under every policy: of a crowd that travels together only the checks of that key raise, and an event names the rule."""
    heard: list[events.Event] = []
    async with create_limiter(
        "redis", redis_url=redis_server.url, rules=[RateThrottleRule("plan", 1_000, 60)], on_outage=policy, deadline=5.0
    ) as limiter:
        limiter.on_event(heard.append)
        assert await limiter.check("victim")
        [key] = redis_client.keys("*victim*")
        redis_client.delete(key)
        redis_client.rpush(key, "of somebody else")
        import asyncio

        checks = [limiter.check("victim"), *(limiter.check(f"k{i}") for i in range(100)), limiter.peek("victim")]
        first, *others, last = await asyncio.gather(*checks, return_exceptions=True)
        assert all(not isinstance(other, BaseException) and other.source == "redis" for other in others)
        for error in (first, last):
            assert isinstance(error, StateUnreadable)
            assert error.rule == "plan"
            assert "victim" not in str(error)
        with pytest.raises(StateUnreadable):
            await limiter.check_many([Request("k1", "plan"), Request("victim", "plan"), Request("k1", "plan")])
        assert (await limiter.peek("k1")).remaining == 997  # what was decided beside it stays consumed
        told = [event for event in heard if isinstance(event, events.UnreadableState)]
        assert [event.rule for event in told] == ["plan"], "once, however often it is met"
        assert redis_client.lrange(key, 0, -1) == [b"of somebody else"]
        assert limiter.statistics().breaker == "closed"
        await limiter.reset("victim")
        decision = await limiter.check("victim")
        assert decision.source == "redis"
        assert decision.remaining == 999
    redis_client.delete(key)
