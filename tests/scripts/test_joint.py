"""Joint checks: all parts of one are granted, or none is charged; as docs/arithmetic.md has them under «Joint decisions»."""

from __future__ import annotations

import random
from collections import defaultdict
from typing import Any

import fakeredis
import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ratethrottle import RateThrottleRule
from ratethrottle._engine.definitions import CompiledRule
from ratethrottle.storage.redis.scripts import script
from tests.kit.clocked import (
    BITS,
    EPOCH,
    EPOCH_KEY,
    Call,
    ClockedScript,
    ClockedServer,
    JointCheck,
    Lease,
    Part,
    PartAnswer,
    make_call,
    read_state,
)
from tests.kit.joint import check_jointly
from tests.kit.oracle import Oracle
from tests.kit.strategies import START_US, STRATEGIES, make_rule
from tests.kit.subjects import Lua
from tests.scripts.test_decide import BAD_NUMBERS, decide, refuses_each, rule

MINUTE_US = 60_000_000
NOW_US = START_US - START_US % MINUTE_US + 1_000_000
SINCE_US = NOW_US % MINUTE_US
UNREADABLE, UNSURE, DEFERRED, SKIPPED = (
    int(script("decide").header[name][0]) for name in ("unreadable", "unsure", "deferred", "skipped")
)


def fixed(limit: int) -> CompiledRule:
    return rule("fixed_window", limit)


def joint(*sets: Part | list[Part], count: int = 1) -> JointCheck:
    return JointCheck([parts if isinstance(parts, list) else [parts] for parts in sets], count)


def ask(clocked: ClockedScript, *joints: JointCheck, mode: str = "check", now_us: int = NOW_US) -> list[list[PartAnswer]]:
    """What each set of each joint check answers, in order."""
    call = make_call([], mode, joints=joints)
    return [of_set for answers in call.split(clocked.send(clocked.client, now_us, call))[1] for of_set in answers]


def used(clocked: ClockedScript, key: str) -> int:
    """Units in the fixed window of a key."""
    return 0 if (state := clocked.state(key)) is None else int(state.rstrip(b";").rpartition(b",")[2])


def test_the_header_names_what_python_sends_and_reads_of_joint_checks() -> None:
    header = script("decide").header
    assert header["joint_ARGV"] == (*header["ARGV"][:6], "part_count", *header["ARGV"][6:], "part...")
    assert header["part"] == ("key_index", "rule_index", "cost", "count", "bits")
    assert BITS == {
        "joined": 1,
        "alternative": 2,
        "flagged": 4,
        "charge": 8,
        "refund": 16,
        "book": 32,
        "evenly": 64,
        "unbook": 128,
    }
    assert header["joint_reply"] == ("request", "server_us", "answer...", "part_answer...", "generation_pair...")
    assert header["part_answer"] == ("took", "answer")
    assert header["skipped"] == ("-5",)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("count", [1, 3])
def test_of_what_is_granted_in_full_the_answers_are_those_of_items(redis_client: redis.Redis, strategy: str, count: int) -> None:
    clocked, strict = ClockedScript(redis_client), rule(strategy, 20)
    costs = {"a": 2, "b": 5, "c": 1}
    for past_us in (30_000_000, 7_000_000, 0):
        told = ask(
            clocked, joint(*(Part(strict, key, cost) for key, cost in costs.items()), count=count), now_us=NOW_US - past_us
        )
        items = [(strict, f"alone {key}", cost) for key, cost in costs.items() for _ in range(count)]
        alone = make_call(items, merge=True)
        alone_told = alone.split(clocked.send(redis_client, NOW_US - past_us, alone))[0]
        if any(numbers[0] < count for numbers in alone_told):
            break
        assert told == [[(count, numbers)] for numbers in alone_told]
        assert [clocked.state(key) for key in costs] == [clocked.state(f"alone {key}") for key in costs]
    else:
        assert count == 1, "three are more than there is room for"


def test_as_many_are_granted_as_the_strictest_set_grants_and_just_these_are_charged(redis_client: redis.Redis) -> None:
    clocked = ClockedScript(redis_client)
    several = joint(Part(fixed(10), "a", 2), Part(fixed(4), "b"), Part(fixed(9), "c", 3), count=5)
    assert ask(clocked, several) == [[(3, [1, 6, SINCE_US])], [(3, [1, 3, SINCE_US])], [(3, [0, 9, SINCE_US])]]
    assert [used(clocked, key) for key in "abc"] == [6, 3, 9]
    assert ask(clocked, several) == [[(0, [1, 6, SINCE_US])], [(0, [1, 3, SINCE_US])], [(0, [0, 9, SINCE_US])]]
    assert [used(clocked, key) for key in "abc"] == [6, 3, 9]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_is_denied_consumes_nothing_and_leaves_no_key(redis_client: redis.Redis, strategy: str) -> None:
    clocked, loose, strict = ClockedScript(redis_client), rule(strategy, 9), rule(strategy, 3)
    for parts in ((Part(loose, "a"), Part(strict, "b", 4)), (Part(strict, "b", 4), Part(loose, "a"))):
        told = ask(clocked, joint(*parts))
        assert [[(answer.took, answer.numbers[0]) for answer in of_set] for of_set in told] == [
            [(0, int(part.cost == 1))] for part in parts
        ]
        assert not redis_client.exists("a", "b")
    clocked.call(NOW_US, [(loose, "a", 1), (strict, "b", 1)])
    before = clocked.state("a"), clocked.state("b")
    ask(clocked, joint(Part(loose, "a"), Part(strict, "b", 3)), now_us=NOW_US + 1)
    assert (clocked.state("a"), clocked.state("b")) == before


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_is_denied_isnt_written_though_the_clock_was_set_back(redis_client: redis.Redis, strategy: str) -> None:
    """A single check that is denied writes the view as the clock has it now; a part consumes nothing, to the byte."""
    clocked, strict = ClockedScript(redis_client), rule(strategy, 5)
    clocked.call(NOW_US, [(strict, "a", 5), (strict, "b", 1), (strict, "c", 5)])
    before, then_us = [clocked.state(key) for key in "abc"], NOW_US - 10 * MINUTE_US
    ask(clocked, joint(Part(strict, "a"), Part(strict, "b")), now_us=then_us)
    assert [clocked.state(key) for key in "abc"] == before
    told = ask(clocked, joint([Part(strict, "a"), Part(strict, "b")], Part(strict, "c", flagged=True)), now_us=then_us)
    assert [[answer.took for answer in of_set] for of_set in told] == [[0, 1], [0]]
    assert [clocked.state(key) == state for key, state in zip("abc", before, strict=True)] == [True, False, True]


def test_the_first_alternative_that_allows_pays_and_one_that_isnt_needed_is_skipped(redis_client: redis.Redis) -> None:
    clocked = ClockedScript(redis_client)
    first_of = [Part(fixed(3), "included"), Part(fixed(9), "credits", 2), Part(fixed(9), "debt")]
    limit = Part(fixed(100), "limit")
    assert ask(clocked, joint(limit, first_of, count=2)) == [
        [(2, [2, 2, SINCE_US])],
        [(2, [2, 2, SINCE_US]), (0, [SKIPPED]), (0, [SKIPPED])],
    ]
    paid = [(1, [1, 3, SINCE_US]), (3, [3, 6, SINCE_US]), (0, [SKIPPED])]
    assert ask(clocked, joint(first_of, limit, count=4)) == [paid, [(4, [4, 6, SINCE_US])]]
    assert [used(clocked, part.key) for part in (*first_of, limit)] == [3, 6, 0, 6]
    # One alternative has had its share: it answers what it would grant, and nothing is charged to it.
    assert ask(clocked, joint(first_of, count=1)) == [[(0, [0, 3, SINCE_US]), (1, [1, 8, SINCE_US]), (0, [SKIPPED])]]
    # With fewer granted than were asked for, all answer what one more check would hear.
    told = ask(clocked, joint(first_of, Part(fixed(4), "strict"), count=12))
    assert told == [[(0, [0, 3, SINCE_US]), (0, [0, 8, SINCE_US]), (4, [1, 4, SINCE_US])], [(4, [0, 4, SINCE_US])]]
    told = ask(clocked, joint(first_of, count=12))
    assert told == [[(0, [0, 3, SINCE_US]), (0, [0, 8, SINCE_US]), (5, [0, 9, SINCE_US])]]


def test_a_flagged_part_never_vetoes_and_is_charged_as_far_as_it_grants(redis_client: redis.Redis) -> None:
    clocked = ClockedScript(redis_client)
    watched, limit = Part(fixed(3), "watched", flagged=True), Part(fixed(10), "limit")
    assert ask(clocked, joint(watched, limit, count=2)) == [[(2, [2, 2, SINCE_US])], [(2, [2, 2, SINCE_US])]]
    assert ask(clocked, joint(limit, watched, count=2)) == [[(2, [2, 4, SINCE_US])], [(1, [1, 3, SINCE_US])]]
    assert ask(clocked, joint(watched, limit, count=2)) == [[(0, [0, 3, SINCE_US])], [(2, [2, 6, SINCE_US])]]
    assert ask(clocked, joint(watched, count=2)) == [[(0, [0, 3, SINCE_US])]]
    # It pays for no more than are granted.
    clocked.forget("watched")
    assert ask(clocked, joint(watched, Part(fixed(8), "limit"), count=6)) == [[(2, [1, 2, SINCE_US])], [(2, [0, 8, SINCE_US])]]
    assert ask(clocked, joint(watched, Part(fixed(8), "limit"), count=6)) == [[(0, [1, 2, SINCE_US])], [(0, [0, 8, SINCE_US])]]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_until_when_is_told_where_somebody_is_refused_and_nowhere_else(redis_client: redis.Redis, strategy: str) -> None:
    clocked, strict, loose = ClockedScript(redis_client), rule(strategy, 3), rule(strategy, 50)
    lengths = len(script("decide").header[f"answer_{strict.kind}"])
    shorter = lengths - (strict.kind == "s")
    watched = Part(strict, "watched", flagged=True)
    # It has paid for three, and says when it would for a fourth.
    [[partly], [whole]] = ask(clocked, joint(watched, Part(loose, "a"), count=5))
    assert (partly.took, partly.numbers[0], len(partly.numbers)) == (3, 3, lengths)
    assert (whole.took, whole.numbers[0], len(whole.numbers)) == (5, 5, shorter)
    [[denied], [whole]] = ask(clocked, joint(watched, Part(loose, "a"), count=5))
    assert (denied.took, denied.numbers[0], len(denied.numbers)) == (0, 0, lengths)
    [[denied], [granted]] = ask(clocked, joint(Part(strict, "watched"), Part(loose, "a"), count=5))
    assert (denied.numbers[0], len(denied.numbers)) == (0, lengths)
    assert (granted.numbers[0], len(granted.numbers)) == (1, shorter)
    [[first, second]] = ask(clocked, joint([Part(strict, "c"), Part(loose, "a")], count=5))
    assert (first.took, first.numbers[0], len(first.numbers)) == (3, 3, shorter)
    assert (second.took, second.numbers[0], len(second.numbers)) == (2, 2, shorter)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_peek_writes_nothing_and_says_what_one_check_would_hear_of_each_part(redis_client: redis.Redis, strategy: str) -> None:
    clocked, strict = ClockedScript(redis_client), rule(strategy, 3)
    clocked.call(NOW_US, [(strict, "a", 2), (strict, "b", 3)])
    before = [clocked.state(key) for key in "abcd"]
    sets = joint([Part(strict, "b"), Part(strict, "c", 2)], Part(strict, "a", 2), Part(strict, "d", flagged=True), count=7)
    told = ask(clocked, sets, mode="peek")
    assert [[(answer.took, answer.numbers[0]) for answer in of_set] for of_set in told] == [[(0, 0), (0, 1)], [(0, 0)], [(0, 1)]]
    for parts, of_set in zip(sets.sets, told, strict=True):
        for part, answer in zip(parts, of_set, strict=True):
            alone = make_call([(part.rule, part.key, part.cost)], "peek")
            [numbers] = alone.split(clocked.send(redis_client, NOW_US, alone))[0]
            # One that never vetoes says until when also if one more would be granted: 0.
            assert answer.numbers == [*numbers, *([0] if part.flagged and strict.kind == "s" else [])]
    ask(clocked, sets, mode="peek", now_us=NOW_US - 10**9)
    assert [clocked.state(key) for key in "abcd"] == before


def test_runs_leases_and_joint_checks_of_one_key_are_decided_in_order(redis_client: redis.Redis) -> None:
    """Each sees what those before it have left, and a key is read once and written once."""
    clocked, limit, leased = ClockedScript(redis_client), fixed(10), RateThrottleRule("l", 60, 60, lease=True).compiled
    joints = [
        joint(Part(limit, "k", 3), Part(leased, "l", 5)),
        joint(Part(limit, "k", 4), Part(fixed(9), "m")),
        joint(Part(limit, "k", 3), Part(fixed(9), "m", 2)),
    ]
    call = make_call([(limit, "k", 2), (limit, "k", 1)], leases=[Lease(leased, "l", 1, 2, ahead=6)], joints=joints)
    redis_client.config_resetstat()
    reply = clocked.send(redis_client, NOW_US, call)
    items, answers, _ = call.split(reply)
    assert items == [[1, 2, SINCE_US], [1, 3, SINCE_US], [2, 8, 60_000_000, 60_100_000, 6]]
    assert answers == [
        [[(1, [1, 6, SINCE_US])], [(1, [1, 13, 60_000_000, 60_100_000])]],
        [[(1, [1, 10, SINCE_US])], [(1, [1, 1, SINCE_US])]],
        [[(0, [0, 10, SINCE_US])], [(0, [1, 1, SINCE_US])]],
    ]
    assert (used(clocked, "k"), used(clocked, "m")) == (10, 1)
    stats = {name.removeprefix("cmdstat_"): what["calls"] for name, what in redis_client.info("commandstats").items()}
    assert stats["mget"] == 1
    assert sum(stats.get(name, 0) for name in ("set", "psetex", "setrange", "del")) == 3


def test_what_a_run_has_charged_stays_where_a_joint_check_is_denied(redis_client: redis.Redis) -> None:
    for strategy in STRATEGIES:
        clocked, strict = ClockedScript(redis_client), rule(strategy, 5)
        checks = [(strict, "k", 1), (strict, "l", 2)]
        clocked.call(NOW_US, checks)
        denied = [joint(Part(strict, "k"), Part(strict, "l", 4)), joint(Part(strict, "l", 4), Part(strict, "k"), count=3)]
        call = make_call(checks, joints=denied)
        clocked.send(redis_client, NOW_US, call)
        for key, cost in (("twin k", 1), ("twin l", 2)):
            clocked.call(NOW_US, [(strict, key, cost)] * 1)
            clocked.call(NOW_US, [(strict, key, cost)] * 1)
        assert [clocked.state(key) for key in ("k", "l")] == [clocked.state(key) for key in ("twin k", "twin l")]
        redis_client.flushall()


def test_a_part_of_a_rule_with_leases_is_decided_like_one_without_units_ahead(redis_client: redis.Redis) -> None:
    for strategy in STRATEGIES:
        clocked = ClockedScript(redis_client)
        leased = RateThrottleRule("l", 200, 60, strategy=strategy, lease=True).compiled
        for past_us in (9_000_000, 8_000_000, 0):
            for key in ("a", "twin"):  # there are units ahead of now
                clocked.lease(NOW_US - past_us, Lease(leased, key, 1, 2, ahead=9))
            [[told]] = ask(clocked, joint(Part(leased, "a", 3), count=2), now_us=NOW_US - past_us)
            assert told == (2, clocked.lease(NOW_US - past_us, Lease(leased, "twin", 3, 2))[:-1])
            assert clocked.state("a") == clocked.state("twin")
        [[told]] = ask(clocked, joint(Part(leased, "a", 150), count=2))
        assert told == (1 if told.took else 0, clocked.lease(NOW_US, Lease(leased, "a", 150, 1), "peek")[:-1])
        redis_client.flushall()


def spoil(client: redis.Redis, key: str, how: str) -> None:
    if how == "later format":
        client.set(key, "2;whatever a later version writes")
    elif how == "another type":
        client.rpush(key, 1)
    else:  # what is noticed only where the older entries are read
        last = NOW_US // 937_500
        client.set(key, f"1;s60000000,937500,1,9,{last},1,{(last - 2) % 100:02}x{(last - 1) % 100:02}4;")


@pytest.mark.parametrize("how", ["later format", "another type", "damaged entries"])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_part_that_cant_be_read_leaves_all_parts_as_they_were(redis_client: redis.Redis, how: str, place: int) -> None:
    clocked, sliding = ClockedScript(redis_client), rule("sliding_window", 100)
    keys = ["a", "b", "c"]
    clocked.call(NOW_US, [(sliding, key, 2) for key in keys])
    redis_client.delete(keys[place])
    spoil(redis_client, keys[place], how)
    stand = [redis_client.dump(key) for key in keys]
    fine = joint(Part(sliding, "d"), Part(sliding, "e"))
    for mode in ("check", "peek"):
        parts = [Part(sliding, key, 10 if how == "damaged entries" else 1) for key in keys]
        if how == "damaged entries":
            parts[place] = parts[place]._replace(cost=99)
        told = ask(clocked, fine, joint(*parts, count=2), fine, mode=mode)
        assert told[2:5] == [[(0, [UNREADABLE if i == place else SKIPPED])] for i in range(3)]
        assert [redis_client.dump(key) for key in keys] == stand
        took = 1 if mode == "check" else 0
        assert [[answer.took for answer in of_set] for of_set in (*told[:2], *told[5:])] == [[took]] * 4
        redis_client.delete("d", "e")


def test_an_alternative_that_cant_be_read_matters_only_if_it_is_needed(redis_client: redis.Redis) -> None:
    clocked = ClockedScript(redis_client)
    spoil(redis_client, "b", "later format")
    first_of, strict = [Part(fixed(5), "a"), Part(fixed(5), "b")], Part(fixed(3), "c")
    assert ask(clocked, joint(first_of, count=2)) == [[(2, [2, 2, SINCE_US]), (0, [SKIPPED])]]
    # Of the six, three would be granted by the first alternative.
    assert ask(clocked, joint(first_of, count=6)) == [[(0, [SKIPPED]), (0, [UNREADABLE])]]
    # Each part is looked at if fewer are granted than were asked for.
    assert ask(clocked, joint(first_of, strict, count=3)) == [[(3, [3, 5, SINCE_US]), (0, [SKIPPED])], [(3, [3, 3, SINCE_US])]]
    clocked.forget("a")
    clocked.forget("c")
    assert ask(clocked, joint(first_of, strict, count=4)) == [[(0, [SKIPPED]), (0, [UNREADABLE])], [(0, [SKIPPED])]]
    assert ask(clocked, joint(first_of, strict), mode="peek") == [[(0, [SKIPPED]), (0, [UNREADABLE])], [(0, [SKIPPED])]]
    assert not redis_client.exists("a", "c")


def test_a_call_is_bounded_by_its_work_and_a_joint_check_is_deferred_whole(redis_client: redis.Redis) -> None:
    old, new, other = rule("sliding_window", 64, 3_600), rule("sliding_window", 64, 3_000), fixed(5)
    clocked, keys = ClockedScript(redis_client), [f"k{i}" for i in range(40)]
    for i in range(60):
        clocked.call(NOW_US + i * 1_000, [(old, key, 1) for key in keys], merge=True)
    before = {key: clocked.state(key) for key in keys}
    for mode in ("peek", "check"):
        waiting, rounds, now_us = list(keys), 0, NOW_US + 60_000
        while waiting:
            told = ask(clocked, *(joint(Part(other, f"o{key}"), Part(new, key, 3)) for key in waiting), mode=mode, now_us=now_us)
            deferred = []
            for key, [first], [second] in zip(waiting, told[::2], told[1::2], strict=True):
                if second.numbers == [DEFERRED]:
                    deferred.append(key)
                    assert first.numbers in ([SKIPPED], [DEFERRED])
                    assert first.took == second.took == 0
                    assert clocked.state(key) == before[key], "nothing was done"
                    assert not redis_client.exists(f"o{key}")
                else:
                    assert first.took == second.took == (mode == "check")
                    assert second.numbers[:2] == [1, 63 if mode == "check" else 60]
            assert len(deferred) < len(waiting), "at least one is decided"
            waiting, rounds = deferred, rounds + 1
        assert rounds > 1
        assert [used(clocked, f"o{key}") for key in keys] == [mode == "check"] * 40


def test_of_a_part_that_was_reset_the_reply_tells_when_once_by_its_number(redis_client: redis.Redis) -> None:
    server, strict = ClockedServer(redis_client, NOW_US - 10**9), fixed(3)
    clocked = server.decide
    server.run("reset", ["a", "c", "r"], NOW_US - 5, server.epoch, 60_000, 60_000, 60_000)
    at_us = NOW_US - 5
    sets = joint(Part(strict, "a"), [Part(strict, "b"), Part(strict, "c")], count=2)
    for mode, count, pairs in (
        ("peek", 2, [(2, at_us), (3, at_us), (5, at_us)]),
        ("check", 2, [(2, at_us), (3, at_us)]),
        ("check", 2, [(2, at_us), (3, at_us), (5, at_us)]),
        ("check", 2, [(2, at_us), (3, at_us), (5, at_us)]),
    ):
        call = make_call([(strict, key, 1) for key in ("q", "r")], mode, joints=[sets._replace(count=count)])
        call.args[1] = server.epoch
        assert call.split(clocked.send(redis_client, NOW_US, call))[2] == pairs
    spoil(redis_client, "b", "later format")
    call = make_call([(strict, "r", 1)], joints=[sets])
    call.args[1] = server.epoch
    assert call.split(clocked.send(redis_client, NOW_US, call))[2] == [(1, at_us)], "nothing is said of what isn't decided"


def repaired(client: redis.Redis, strategy: str) -> tuple[ClockedServer, CompiledRule, CompiledRule]:
    """A server that began an epoch a second ago."""
    return ClockedServer(client, NOW_US - 1_000_000), rule(strategy, 5), fixed(3)


def told_in(server: ClockedServer, *joints: JointCheck, mode: str = "check", now_us: int = NOW_US) -> list[list[PartAnswer]]:
    call = make_call([], mode, joints=joints)
    call.args[1] = server.epoch
    return [of_set for answers in call.split(server.decide.send(server.client, now_us, call))[1] for of_set in answers]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_while_states_are_repaired_parts_note_what_was_granted_since_as_items_do(
    redis_client: redis.Redis, strategy: str
) -> None:
    server, strict, limit = repaired(redis_client, strategy)
    before: list[bytes | None] = []
    for i in range(4):
        now_us = NOW_US + i * 1_000
        told = told_in(server, joint(Part(strict, "k", 2), Part(limit, "l")), now_us=now_us)
        states = [server.decide.state(key) for key in "kl"]
        if i < 2:
            assert [of_set[0].took for of_set in told] == [1, 1]
            twin = ClockedServer(redis_client, NOW_US - 1_000_000)  # it forgets all
            for past in range(i + 1):
                call = make_call([(strict, "k", 2), (limit, "l", 1)])
                call.args[1] = twin.epoch
                twin.decide.send(redis_client, NOW_US + past * 1_000, call)
            assert states == [twin.decide.state(key) for key in "kl"]
        else:
            assert [of_set[0].took for of_set in told] == [0, 0]
            assert states == before
        before = states
    assert all(state and state.startswith(b"1e") for state in before)


def test_a_part_of_which_somebody_may_still_tell_leaves_all_as_it_was(redis_client: redis.Redis) -> None:
    server, strict, limit = repaired(redis_client, "token_bucket")
    told_in(server, joint(Part(strict, "k", 2)))
    server.level_us = 77
    server.tell(NOW_US, limit, (0, 0, 0))
    redis_client.set(EPOCH_KEY, server.epoch + "0" + "0" * 14 + "77")
    before = server.decide.state("k")
    for mode in ("check", "peek"):
        told = told_in(server, joint(Part(strict, "k"), Part(limit, "l")), mode=mode)
        assert all(answer == (0, [UNSURE]) for of_set in told for answer in of_set)
        assert server.decide.state("k") == before
        assert not redis_client.exists("l")


def test_in_another_epoch_nothing_is_done(redis_client: redis.Redis) -> None:
    server, strict, limit = repaired(redis_client, "token_bucket")
    call = make_call([], joints=[joint(Part(strict, "k"), Part(limit, "l"))])
    assert server.decide.send(redis_client, NOW_US, call) == [b"id", -1]
    assert not redis_client.exists("k", "l")


def bad_parts(call: Call) -> list[tuple[int, Any]]:
    """Places in a call of two keys, two rules and three parts, with what may not stand there."""
    first = 7 + 16
    bad: list[tuple[int, Any]] = [(1, "check"), (1, "joint"), (1, ""), (0, "")]
    numbers = (3, 6, *range(first, first + 4), *range(first + 5, first + 9), *range(first + 10, first + 14))
    bad += [(place, number) for place in numbers for number in BAD_NUMBERS]
    bad += [(6, 129), (6, 2), (6, 4), (first, 4), (first + 1, 3), (first + 2, 10**9 + 1), (first + 3, 10**6 + 1)]
    # Equal joint checks are as many for each part, written alike.
    bad += [(place, count) for place in (first + 8, first + 13) for count in (2, "1.0", "01")]
    bad += [(first + 4, bits) for bits in (1, 2, 3, 5, 6, 7, 8, -1, "", "x", "0.0", "nan")]
    bad += [(first + 9, bits) for bits in (2, 6, 7, 8, -1, "", "x")]
    bad += [(first + 4, 4)]  # an alternative to what never vetoes
    return bad


def test_bad_parts_are_refused_and_state_stays_byte_for_byte(redis_client: redis.Redis) -> None:
    checks = [joint([Part(fixed(9), "k"), Part(fixed(9), "l")], Part(fixed(8), "m"))]
    call = make_call([], joints=checks)
    keys, args = call.keys, call.args
    assert decide(redis_client, keys, ["id", *args])[2:4] == [1, 1]
    refuses_each(redis_client, keys, args, bad_parts(call))
    for wrong in ([*args, 1], args[:-1], [*args, 1, 1, 1, 1, 0], args[:6]):
        with pytest.raises(redis.ResponseError, match="RATETHROTTLE"):
            decide(redis_client, keys, ["id", *wrong])


def test_a_key_may_stand_in_several_joint_checks(redis_client: redis.Redis) -> None:
    clocked, strict = ClockedScript(redis_client), fixed(9)
    assert ask(clocked, joint(Part(strict, "k")), joint(Part(strict, "k")))[1] == [(1, [1, 2, SINCE_US])]


def test_128_items_are_the_most_parts_included(redis_client: redis.Redis) -> None:
    clocked, strict = ClockedScript(redis_client), fixed(10**6)
    many = [Part(strict, f"k{i}") for i in range(128)]
    assert [of_set[0].took for of_set in ask(clocked, joint(*many))] == [1] * 128
    assert len(ask(clocked, *(joint(*many[i : i + 3]) for i in range(0, 126, 3)), joint(many[0], many[1]))) == 128
    before = clocked.state("k0")
    for checks, parts, fits in ((1, 127, True), (1, 128, False), (128, 1, False), (127, 1, True)):
        call = make_call([(strict, f"k{i}", 1) for i in range(checks)], merge=True, joints=[joint(*many[:parts])])
        if fits:
            clocked.send(redis_client, NOW_US, call)
            before = clocked.state("k0")
            continue
        with pytest.raises(redis.ResponseError, match="RATETHROTTLE there are more than 128 items"):
            clocked.send(redis_client, NOW_US, call)
        assert clocked.state("k0") == before


def test_fakeredis_runs_joint_checks_too(redis_client: redis.Redis, fake_server: fakeredis.FakeServer) -> None:
    told = []
    for client in (redis_client, fakeredis.FakeRedis(server=fake_server)):
        clocked, rules = ClockedScript(client), [rule(strategy, 5) for strategy in STRATEGIES]
        sets = joint([Part(rules[0], "a", 2), Part(rules[1], "b")], *(Part(each, each.strategy) for each in rules[2:]), count=3)
        flagged = joint(Part(rules[0], "a", flagged=True), Part(rules[3], "c"))
        told.append([ask(clocked, sets, flagged, mode=mode, now_us=NOW_US + i) for i in range(4) for mode in ("check", "peek")])
        told[-1].append([clocked.state(key) for key in ("a", "b", "c", *STRATEGIES[2:])])
    assert told[0] == told[1]


def test_every_counting_key_expires(redis_client: redis.Redis) -> None:
    """With the server's own clock: granted, put back and charged anew, looked at, reset, and of several definitions."""
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    rng, text = random.Random(seed), script("decide").text
    redis_client.set(EPOCH_KEY, EPOCH)
    sha, keys = redis_client.script_load(text), [f"k{i}" for i in range(6)]
    rules = [rule(strategy, limit, window) for strategy in STRATEGIES for limit in (2, 9, 100) for window in (0.02, 3)]
    for _ in range(300):
        joints = []
        for _ in range(rng.randint(1, 4)):
            named = [Part(rng.choice(rules), key, rng.randint(1, 3)) for key in rng.sample(keys, rng.randint(1, 4))]
            flagged = [part._replace(flagged=rng.random() < 0.2) for part in named[1:]]
            joints.append(joint([named[0]], *flagged, count=rng.randint(1, 5)))
        call = make_call([], rng.choice(("check", "check", "peek")), joints=joints)
        redis_client.evalsha(sha, 1 + len(call.keys), EPOCH_KEY, *call.keys, "id", *call.args)
        for key in keys:
            assert redis_client.pttl(key) != -1, f"{key} has no expiry"


# Several keys with a past, each with a rule of its own, at one instant after another.
costs = st.one_of(st.integers(1, 3), st.sampled_from(("all", "half", "tenth")))
limits = st.tuples(
    st.sampled_from(STRATEGIES), st.sampled_from((1, 3, 5, 64, 65, 500, 10**6)), st.sampled_from((64_001, 10**6, MINUTE_US))
)
moves = st.one_of(
    st.tuples(st.just("share"), st.integers(-600, 1_500)),
    st.tuples(st.just("us"), st.integers(-3, 3)),
    st.tuples(st.just("promise"), st.integers(-1, 1)),
)
KEYS = "abcde"
shapes = st.lists(
    st.tuples(st.sampled_from(KEYS), costs, st.sampled_from(("set", "set", "alternative", "flagged"))),
    min_size=1,
    max_size=5,
    unique_by=lambda part: part[0],
)
steps = st.lists(
    st.tuples(
        moves,
        st.lists(st.tuples(st.sampled_from(KEYS), costs, st.integers(1, 3)), max_size=2),
        st.lists(st.tuples(shapes, st.integers(1, 4)), min_size=1, max_size=3),
        st.booleans() | st.just(True),
    ),
    min_size=2,
    max_size=12,
)


def units(cost: int | str, of: CompiledRule) -> int:
    return min(of.capacity, cost if isinstance(cost, int) else max(1, of.capacity // {"all": 1, "half": 2, "tenth": 10}[cost]))


def sets_of(shape: list[tuple[str, Any, str]], rules: dict[str, CompiledRule], prefix: str) -> list[list[Part]]:
    sets: list[list[Part]] = []
    for key, cost, place in shape:
        part = Part(rules[key], prefix + key, units(cost, rules[key]), flagged=place == "flagged")
        if place == "alternative" and sets and not sets[-1][0].flagged:
            sets[-1].append(part)
        else:
            sets.append([part])
    return sets


@given(versions=st.lists(limits, min_size=5, max_size=8), plan=steps, turns=st.integers(0, 2**32))
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_joint_checks_agree_with_the_oracle_while_the_clock_steps_and_rules_change(
    redis_client: redis.Redis, versions: list[Any], plan: list[Any], turns: int
) -> None:
    rng, compiled = random.Random(turns), [make_rule(*facts).compiled for facts in versions]
    Lua.keys += 1
    prefix, clocked = f"joint:{Lua.keys}:", ClockedScript(redis_client)
    oracles: defaultdict[str, Oracle] = defaultdict(Oracle)
    twins: dict[str, Lua] = {prefix + key: Lua(redis_client) for key in KEYS}
    rules = dict(zip(KEYS, compiled, strict=False))
    now_us, promised = START_US, START_US
    for (kind, by), checks, shaped, consume in plan:
        window_us = rules["a"].window_us
        now_us = {"share": now_us + window_us * by // 1_000, "us": now_us + by, "promise": promised + by}[kind]
        if rng.random() < 0.1:
            rules[rng.choice(KEYS)] = rng.choice(compiled)
        singles = [(rules[key], prefix + key, units(cost, rules[key])) for key, cost, count in checks for _ in range(count)]
        joints = [JointCheck(sets_of(shape, rules, prefix), count) for shape, count in shaped]
        call = make_call(singles, "check" if consume else "peek", merge=True, joints=joints)
        reply = clocked.send(redis_client, now_us, call)

        for keys in (oracles, twins):
            expected = [keys[key].check(one, now_us, cost, consume=consume) for one, key, cost in singles]
            assert call.answers(reply) == expected
        for one, told in zip(joints, call.heard(reply), strict=True):
            for heard in told:
                answer = check_jointly(oracles, one.sets, now_us, consume=consume)
                assert heard == answer
                assert check_jointly(twins, one.sets, now_us, consume=consume) == answer
                promised = now_us + max(0, *(part[2] for _, part in answer[1]))
        for key in KEYS:
            stands = read_state(clocked.state(prefix + key))
            assert stands == twins[prefix + key].state(rules[key]), "the states differ before a decision does"
