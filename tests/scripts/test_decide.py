"""The Lua scripts themselves: what they take, what they refuse, and what they leave behind."""

from __future__ import annotations

import random
from typing import Any

import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ratethrottle import RateThrottleRule
from ratethrottle._engine.definitions import CompiledRule
from ratethrottle.storage.redis.scripts import SHEBANG, script
from ratethrottle.testing.manual import KEPT_MS
from tests.kit.clocked import CLOCKED, EPOCH, EPOCH_KEY, ClockedScript, JointCheck, Lease, Part, make_call, read_state
from tests.kit.oracle import Oracle
from tests.kit.strategies import known_rules, random_step

NOW_US = 1_800_000_000_000_000
STRATEGIES = ("sliding_window", "token_bucket", "leaky_bucket", "sliding_counter", "fixed_window")


def rule(strategy: str, limit: int = 5, window: float = 60) -> CompiledRule:
    return RateThrottleRule("r", limit, window, strategy=strategy).compiled


def decide(client: redis.Redis, keys: list[Any], args: list[Any]) -> Any:
    client.set(EPOCH_KEY, EPOCH)
    return client.eval(script("decide").text.decode(), 1 + len(keys), EPOCH_KEY, *keys, *args)


def test_the_header_names_what_python_sends_and_reads() -> None:
    header = script("decide").header
    assert header["rule"] == ("kind", "capacity", "window_us", "unit_ticks", "drain_ticks", "slot_us", "coarse_us", "lead_us")
    assert header["run"] == ("key_index", "key_count", "rule_index", "cost", "count")
    assert header["lease"] == ("key_index", "rule_index", "cost", "count", "ahead", "back", "back_us")
    assert header["answer_b"] == ("granted", "level")
    assert header["answer_s"] == ("granted", "total", "first_us", "reset_us", "retry_us")
    assert header["answer_c"] == ("granted", "cur", "prev", "since_us")
    assert header["answer_f"] == ("granted", "cur", "since_us")
    assert script("decide").limits == {"keys": 128, "rules": 128, "items": 128}
    assert header["generation_pair"] == ("item_number", "generation")
    assert script("reset").header["reply"] == ("request", "server_us", "generation...")
    repair = script("repair").header
    assert repair["rule"] == header["rule"]
    assert repair["assert_item"] == ("key_index", "rule_index", "generation", "a", "b", "c", "told_us")
    assert repair["charge_item"] == ("key_index", "rule_index", "newest_us", "count", "charge...")
    assert repair["reply"] == ("request", "server_us", "applied", "refusal...")
    assert repair["refusal"] == ("item_number", "why")
    assert header["unreadable"] == ("-2",)
    assert header["unsure"] == ("-3",)
    beat = script("beat").header
    arguments = ("request", "run", "known_epoch", "process_id", "purpose", "statistics", "known_processes", "heard_us", "layout")
    assert beat["ARGV"] == arguments
    numbers = ("server_us", "epoch", "learning_began", "learning_us", "processes", "rank", "evicted_keys", "forgets", "held_us")
    assert beat["reply"] == ("request", *numbers, "slot", "whole_us")


@pytest.mark.parametrize("name", ["decide", "reset", "repair", "beat", "clear", "slots"])
def test_scripts_are_ascii_and_use_only_what_every_redis_has(name: str) -> None:
    text = script(name).text.decode("ascii")
    code = "\n".join(line.partition("--")[0] for line in text.splitlines())
    for word in ("struct", "cmsgpack", "cjson", "bit.", "tostring", "math.random", "%s"):
        assert word not in code, word
    # In format, '%d' is exact only if C's long has 64 bits: a script that prints by it looks first.
    assert "format('%d" not in code.partition("if format('%d', TICKS) ~= '4503599627370496' then")[0]


def test_the_shebang_makes_another_script() -> None:
    decide_script = script("decide")
    assert decide_script.body(True) == SHEBANG + decide_script.text
    assert decide_script.sha(True) != decide_script.sha(False)


@pytest.mark.parametrize("shebang", [True, False])
def test_the_server_calls_a_script_by_the_name_that_we_do(redis_client: redis.Redis, shebang: bool) -> None:
    loaded = script("decide")
    assert redis_client.script_load(loaded.body(shebang)).encode() == loaded.sha(shebang)


def refuses_each(client: redis.Redis, keys: list[Any], args: list[Any], bad: list[tuple[int, Any]]) -> None:
    """One argument is wrong at a time, and each time the state of "k" stays as it is."""
    before = client.get("k")
    for place, value in bad:
        wrong = ["id", *args]
        wrong[place] = value
        with pytest.raises(redis.ResponseError, match="RATETHROTTLE"):
            decide(client, keys, wrong)
        assert client.get("k") == before, (place, value)


BAD_NUMBERS = ["nan", "-nan", "inf", "-inf", "0", "-1", "1.5", "", "x", "1e30", str(2**63), "9007199254740993"]
NEVER_NUMBERS = ["nan", "-nan", "inf", "-inf", "-1", "1.5", "", "x", "1e30"]  # where 0 may stand


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_bad_arguments_are_refused_and_state_stays_byte_for_byte(redis_client: redis.Redis, strategy: str) -> None:
    compiled = rule(strategy)
    keys, args, *_ = make_call([(compiled, "k", 1)])
    decide(redis_client, keys, ["id", *args])
    before = redis_client.get("k")
    assert before is not None
    # id, mode, epoch, counts of rules, runs and leases, then the rule from 6 and the run from 14.
    bad: list[tuple[int, Any]] = [(1, "consume"), (1, ""), (0, ""), (6, "x"), (6, "")]
    bad += [(place, number) for place in (3, 4, 7, 8, *range(14, 19)) for number in BAD_NUMBERS]
    bad += [(place, number) for place in (5, *range(9, 14)) for number in NEVER_NUMBERS]
    bad += [(3, 129), (4, 129), (3, 2), (4, 2), (5, 1), (14, 2), (15, 2), (16, 2), (17, 10**9 + 1), (18, 10**6 + 1)]
    refuses_each(redis_client, keys, args, bad)
    for shorter in (args[:-1], [*args, 1], [], args[:4]):
        with pytest.raises(redis.ResponseError, match="RATETHROTTLE"):
            decide(redis_client, keys, ["id", *shorter])
    for wrong_keys in ([], [f"k{i}" for i in range(129)]):
        with pytest.raises(redis.ResponseError, match="RATETHROTTLE"):
            decide(redis_client, wrong_keys, ["id", *args])
    assert redis_client.get("k") == before


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_bad_leases_are_refused_and_state_stays_byte_for_byte(redis_client: redis.Redis, strategy: str) -> None:
    keys, args, *_ = make_call([], leases=[Lease(rule(strategy), "k", ahead=1, back=1, back_us=NOW_US)])
    decide(redis_client, keys, ["id", *args])
    before = redis_client.get("k")
    assert before is not None
    # The lease is from 14: key_index rule_index cost count ahead back back_us.
    bad: list[tuple[int, Any]] = [(place, number) for place in (14, 15, 16) for number in BAD_NUMBERS]
    bad += [(place, number) for place in range(17, 21) for number in NEVER_NUMBERS]
    bad += [
        (14, 2),
        (15, 2),
        (16, 10**9 + 1),
        (17, 10**6 + 1),
        (18, 10**9 + 1),
        (19, 10**9 + 1),
        (20, 2**53),
        (5, 0),
        (5, 2),
        (4, 1),
    ]
    refuses_each(redis_client, keys, args, bad)


def test_a_lead_is_of_sliding_windows_and_an_eighth_of_the_window_at_most(redis_client: redis.Redis) -> None:
    for strategy in STRATEGIES:
        keys, args, *_ = make_call([(rule(strategy), "k", 1)])
        for lead_us in (1, 7_500_000, 7_500_001):
            wrong = ["id", *args]
            wrong[13] = lead_us
            if strategy == "sliding_window" and lead_us <= 7_500_000:
                assert decide(redis_client, keys, wrong)[2] == 1
                continue
            with pytest.raises(redis.ResponseError, match="RATETHROTTLE"):
                decide(redis_client, keys, wrong)


def test_128_items_are_the_most_of_all_runs_and_leases(redis_client: redis.Redis) -> None:
    keys, shape = [f"k{i}" for i in range(100)], make_call([(rule("fixed_window"), "k", 1)]).args[5:13]
    for runs, leases, fits in (
        ([(1, 100, 1, 1, 1), (1, 28, 1, 1, 1)], [], True),
        ([(1, 100, 1, 1, 1), (1, 27, 1, 1, 1)], [(1, 1, 1, 1, 0, 0, 0)], True),
        ([(1, 100, 1, 1, 1), (1, 29, 1, 1, 1)], [], False),
        ([(1, 100, 1, 1, 1), (1, 28, 1, 1, 1)], [(1, 1, 1, 1, 0, 0, 0)], False),
        ([(1, 101, 1, 1, 1)], [], False),
        ([(51, 51, 1, 1, 1)], [], False),
    ):
        redis_client.flushall()
        args = ["id", "check", EPOCH, 1, len(runs), len(leases), *shape, *(number for what in runs + leases for number in what)]
        if fits:
            decide(redis_client, keys, args)
            continue
        with pytest.raises(redis.ResponseError, match="RATETHROTTLE"):
            decide(redis_client, keys, args)
        assert not redis_client.exists(*keys)


def test_a_bad_last_entry_leaves_the_first_key_unwritten(redis_client: redis.Redis) -> None:
    keys, args, *_ = make_call([(rule("fixed_window"), f"k{i}", 1) for i in range(3)])
    args[-1] = "nan"
    with pytest.raises(redis.ResponseError, match="RATETHROTTLE"):
        decide(redis_client, keys, ["id", *args])
    assert not redis_client.exists(*keys)


def test_rules_that_would_leave_exact_integers_are_refused(redis_client: redis.Redis) -> None:
    for shape in (
        ("b", 10**9, 10**6, 2**51, 1, 0, 0, 0),  # capacity x ticks reaches 2^52
        ("b", 1, 10**6, 0, 1, 0, 0, 0),
        ("b", 1, 10**6, 1, 0, 0, 0, 0),
        ("s", 65, 10**6, 0, 0, 1, 0, 0),  # above 64 units, µs would need an entry for each
        ("s", 5, 10**6, 0, 0, 2, 0, 0),
        ("c", 10**9, 31_622_400_000_000, 0, 0, 0, 1, 0),
        ("c", 5, 10**6, 0, 0, 0, 0, 0),
        ("f", 5, 999, 0, 0, 0, 0, 0),
    ):
        with pytest.raises(redis.ResponseError, match="RATETHROTTLE"):
            decide(redis_client, ["k"], ["id", "check", EPOCH, 1, 1, 0, *shape, 1, 1, 1, 1, 1])
    assert not redis_client.exists("k")


@pytest.mark.parametrize(
    "state",
    [
        b"",
        b"2;f60000000,1800000000000000,1;",
        b"junk",
        b"1",
        b"1;x;",
        b"1;f60000000,1800000000000000,1",
        b"1;f0,1800000000000000,1;",
        b"1;f60000000,1800000000000000,1,1;",
        b"1;c60000000,1800000000000000,1;",
        b"1;b0,1,1,1,1;",
        b"1;b1,1,-1,1,1;",
        b"1;s60000000,1,2,2,00018000000000000000000000010001800000000100000000000001;",
        b"1;s60000000,1,1,0,1800000000000000,1;",
        b"1;s60000000,1,1,0,1800000000000000,1,",
        b"1;s60000000,1,x,0,1800000000000000,1,;",
        b"1;s60000000,1,1,0,180000000000000x,1,;",
        b"1;s60000000,1,1,1,1800000000000000,1,0000001;",
        b"1;s60000000,1,1,1,1800000000000000,1,00000001x;",
        b"1;s60000000,1,1,0,1800000000000000,1,;;",
        b"1;f60000000,1,1;f60000001,1,1;f60000002,1,1;",
    ],
)
def test_a_state_of_another_format_is_answered_as_such_and_kept(redis_client: redis.Redis, state: bytes) -> None:
    redis_client.set("k", state)
    keys, args, *_ = make_call([(rule("sliding_window"), "k", 1)])
    reply = decide(redis_client, keys, ["id", *args])
    assert [reply[0], *reply[2:]] == [b"id", -2]
    assert redis_client.get("k") == state


def test_header_fields_of_later_versions_are_written_back(redis_client: redis.Redis) -> None:
    clocked = ClockedScript(redis_client)
    for ours in (b"", b"g1799999999999999"):
        redis_client.set("k", b"1%sh7f3a,g=12;f60000000,1800000000000000,1;" % ours)
        assert clocked.call(NOW_US, [(rule("fixed_window"), "k", 2)]) == [(True, 2, 0, 60_000_000)]
        assert redis_client.get("k") == b"1%sh7f3a,g=12;f60000000,1800000000000000,3;" % ours


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_refusal_consumes_nothing(redis_client: redis.Redis, strategy: str) -> None:
    """Limits' fixed window and several others count a denied request."""
    clocked = ClockedScript(redis_client)
    compiled = rule(strategy)
    assert clocked.call(NOW_US, [(compiled, "k", 3)])[0][0]
    before = redis_client.get("k")
    for later_us in range(0, 5_000_000, 1_000_000):
        assert not clocked.call(NOW_US + later_us, [(compiled, "k", 5)])[0][0]
        assert not clocked.call(NOW_US + later_us, [(compiled, "k", 6)])[0][0]
        assert redis_client.get("k") == before


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_peek_writes_nothing(redis_client: redis.Redis, strategy: str) -> None:
    clocked = ClockedScript(redis_client)
    assert clocked.call(NOW_US, [(rule(strategy), "k", 1)], "peek")[0][:2] == (True, 5)
    assert not redis_client.exists("k")
    clocked.call(NOW_US, [(rule(strategy), "k", 1)])
    before = redis_client.get("k")
    clocked.call(NOW_US - 10**9, [(rule(strategy), "k", 1)], "peek")
    assert redis_client.get("k") == before


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_items_of_one_call_are_decided_in_order(redis_client: redis.Redis, strategy: str) -> None:
    clocked = ClockedScript(redis_client)
    compiled = rule(strategy)
    together = clocked.call(NOW_US, [(compiled, "k", cost) for cost in (2, 4, 2, 2, 1, 1)])
    assert [answer[0] for answer in together] == [True, False, True, False, True, False]
    alone = [clocked.call(NOW_US, [(compiled, "l", cost)])[0] for cost in (2, 4, 2, 2, 1, 1)]
    assert together == alone
    assert redis_client.get("k") == redis_client.get("l")


@pytest.mark.parametrize("count", [1, 2, 128])
def test_a_call_decides_up_to_128_keys(redis_client: redis.Redis, count: int) -> None:
    clocked = ClockedScript(redis_client)
    compiled = rule("fixed_window", 2)
    checks = [(compiled, f"k{i}", 1) for i in range(count)]
    assert [
        clocked.call(NOW_US, checks) == [(left >= 0, max(0, left), 0 if left >= 0 else 60_000_000, 60_000_000)] * count
        for left in (1, 0, -1)
    ] == [True, True, True]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_run_decides_each_of_its_keys_like_a_call_of_its_own(redis_client: redis.Redis, strategy: str) -> None:
    clocked, compiled = ClockedScript(redis_client), rule(strategy, 20)
    for i in (i for i in range(30) if i % 3):  # each key has a past of its own, some none
        for past_us in range(0, 40_000_000, 7_000_000 * (1 + i % 4)):
            for name in ("run", "alone"):
                clocked.call(NOW_US - past_us * (i % 2), [(compiled, f"{name}{i}", i % 5 + 1)] * (i % 3))
    checks = [(compiled, f"run{i}", cost) for cost in (1, 2, 1) for i in range(30) for _ in range(4)]
    call = make_call(checks, merge=True)
    assert call.args[3] == 3
    alone = [clocked.call(NOW_US, [(compiled, key.replace("run", "alone"), cost)])[0] for _, key, cost in checks]
    assert call.answers(clocked.send(redis_client, NOW_US, call)) == alone
    for i in range(30):
        assert redis_client.get(f"run{i}") == redis_client.get(f"alone{i}")


def replaced(text: str, old: str, new: str) -> str:
    assert text.count(old) == 1
    return text.replace(old, new)


# With a set of its own for when keys expire, by the test's clock.
WRITES = f"call('PSETEX', KEYS[k], string.format('%.0f', expiry_ms + {KEPT_MS}), states[k])"
NOTING = replaced(CLOCKED, WRITES, f"{WRITES} call('ZADD', 'ends', second, KEYS[k])")
ALL_THE_SAME_WAY = replaced(
    replaced(NOTING, "local simple, skip, window = consumes and", "local simple, skip, window = false and"),
    "false, filled + 1, together and not repairing",
    "false, filled + 1, false",
)


# Each example sets the keys of the fixture's server, which serves them all, before it looks at them.
@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32))
def test_simple_items_are_decided_as_the_way_for_all_would(redis_client: redis.Redis, seed: int) -> None:
    """To the byte: what is answered, what is left behind, and until when."""
    rng = random.Random(seed)
    scripts = [ClockedScript(redis_client, text) for text in (NOTING, ALL_THE_SAME_WAY)]
    strategy, window = rng.choice(STRATEGIES), rng.choice((0.001, 0.7, 60))
    rules = [rule(strategy, rng.choice((3, 64, 65, 1_000)), window) for _ in range(2)]
    rules.append(rule(rng.choice(STRATEGIES), 100, rng.choice((1, window))))
    leased = RateThrottleRule("r", 1_000, max(window, 0.7), strategy=strategy, lease=True).compiled
    now_us = NOW_US
    states: list[Any] = [(None, None, 0, 0)]
    for _ in range(40):
        one, window_us = rng.choice(rules[:2] * 4 + rules), round(window * 10**6)
        now_us += rng.choice(
            (0, 1, window_us // 200, window_us // 64, window_us // 4, window_us // 2, window_us, -window_us // 5)
        )
        costs = [rng.choice((1, 1, 2, 9, 150, 2_000)) for _ in range(rng.randint(1, 3))]
        leases = [Lease(leased, "k", ahead=50)] * (rng.random() < 0.1)
        checks = [(one, key, cost) for cost in costs for key in "kl" for _ in range(rng.randint(1, 3))]
        parts = [Part(one, key, rng.choice(costs), flagged=rng.random() < 0.2) for key in rng.sample("kl", 2)]
        joints = [
            JointCheck([[part] for part in parts[: rng.randint(1, 2)]], rng.randint(1, 3)) for _ in range(rng.randint(0, 2))
        ]
        call = make_call(
            checks[: rng.choice((0, len(checks))) if joints else len(checks)], merge=True, leases=leases, joints=joints
        )
        replies, after = [], []
        for clocked in scripts:
            for key, state, ends_us in zip("kl", states[0][:2], states[0][2:], strict=True):
                redis_client.delete(key) if state is None else redis_client.set(key, state)
                redis_client.zadd("ends", {key: ends_us})
            replies.append(clocked.send(redis_client, now_us, call))
            after.append((*map(clocked.state, "kl"), *(redis_client.zscore("ends", key) for key in "kl")))
        assert replies[0] == replies[1]
        assert after[0] == after[1]
        states = after


def test_of_a_window_whose_older_entries_stay_only_the_numbers_are_written(redis_client: redis.Redis) -> None:
    compiled = rule("sliding_window", 1_000, 3_600)
    call = make_call([(compiled, "k", 1)])
    sha = redis_client.script_load(script("decide").text)
    redis_client.set(EPOCH_KEY, EPOCH)
    for _ in range(3):
        redis_client.evalsha(sha, 2, EPOCH_KEY, "k", "id", *call.args)
    before, expires_ms = redis_client.get("k") or b"", redis_client.pexpiretime("k")
    assert expires_ms > 0
    redis_client.config_resetstat()
    for _ in range(4):
        redis_client.evalsha(sha, 2, EPOCH_KEY, "k", "id", *call.args)
    stats = {name.removeprefix("cmdstat_"): what["calls"] for name, what in redis_client.info("commandstats").items()}
    assert stats["setrange"] >= 3, "a slot of almost a minute may have ended meanwhile, but once"
    if stats["setrange"] == 4:
        assert redis_client.pexpiretime("k") == expires_ms
        assert redis_client.get("k") == before.replace(b",3,", b",7,")


@pytest.mark.parametrize("strategy", ["token_bucket", "fixed_window", "sliding_counter"])
def test_what_expires_in_the_same_second_isnt_set_again(redis_client: redis.Redis, strategy: str) -> None:
    compiled = rule(strategy, 10**6, 3_600)
    redis_client.set(EPOCH_KEY, EPOCH)
    sha = redis_client.script_load(script("decide").text)
    first, one = make_call([(compiled, "k", 500_000)]), make_call([(compiled, "k", 1)])
    redis_client.evalsha(sha, 2, EPOCH_KEY, "k", "id", *first.args)
    redis_client.config_resetstat()
    for _ in range(8):
        redis_client.evalsha(sha, 2, EPOCH_KEY, "k", "id", *one.args)
    written = redis_client.info("commandstats")["cmdstat_setrange"]["calls"]
    assert written >= 6, "a second may have ended meanwhile, and a window, but once"


def test_a_key_is_read_once_and_written_at_most_once(redis_client: redis.Redis) -> None:
    checks = [(rule(strategy, 6), key, cost) for strategy in STRATEGIES for cost in (1, 2, 1) for key in ("k", "l", "m")]
    call = make_call([*checks, (rule("fixed_window", 1), "n", 2)], merge=True)
    alone = make_call([(rule(strategy, 10**6), strategy, cost) for strategy in STRATEGIES for cost in (1, 2, 1)], merge=True)
    sha = redis_client.script_load(script("decide").text)
    redis_client.set(EPOCH_KEY, EPOCH)
    for now, keys, fresh in ((call, 3, True), (call, 3, False), (alone, 5, True), (alone, 5, False), (alone, 5, False)):
        redis_client.config_resetstat()
        redis_client.evalsha(sha, 1 + len(now.keys), EPOCH_KEY, *now.keys, "id", *now.args)
        stats = {name.removeprefix("cmdstat_"): what["calls"] for name, what in redis_client.info("commandstats").items()}
        assert stats.pop("config|resetstat", 1) == 1
        written = sum(stats.pop(name, 0) for name in ("psetex", "set", "setrange", "del"))
        # Of what isn't there MGET doesn't tell whether it is something else than text.
        assert stats.pop("exists", 0) == fresh or now is call
        assert stats == {"evalsha": 1, "time": 1, "mget": 1}
        assert written <= keys
        assert written == keys or now is call, "only what is denied isn't written"


def test_a_million_checks_are_granted_by_one_division(redis_client: redis.Redis) -> None:
    for strategy in STRATEGIES:
        keys, args, *_ = make_call([(rule(strategy, 10**9), strategy, 1_001)])
        assert decide(redis_client, keys, ["id", *args[:-1], 10**6])[2] == 999_000


def test_without_64_bits_in_a_long_the_script_prints_the_same(redis_client: redis.Redis) -> None:
    assert CLOCKED.count("~= '4503599627370496'") == 1
    here, there = ClockedScript(redis_client), ClockedScript(redis_client, CLOCKED.replace("~= '4503599627370496'", "~= ''"))
    rng, now_us, oracle = random.Random(1), NOW_US, Oracle()
    for _ in range(300):
        shape = rng.choice(known_rules())
        step = random_step(rng, shape)
        now_us += step.advance_us % 10**12
        expected = oracle.check(shape.compiled, now_us, step.cost)
        assert here.call(now_us, [(shape.compiled, "here", step.cost)]) == [expected]
        assert there.call(now_us, [(shape.compiled, "there", step.cost)]) == [expected]
        assert here.state("here") == there.state("there")


def test_integers_come_back_exactly(redis_client: redis.Redis) -> None:
    clocked = ClockedScript(redis_client)
    compiled = RateThrottleRule("r", 1, 366 * 86_400, strategy="token_bucket").compiled
    year_us = 366 * 86_400 * 10**6
    assert clocked.call(NOW_US, [(compiled, "k", 1)]) == [(True, 0, 0, year_us)]
    assert clocked.call(NOW_US + 1, [(compiled, "k", 1)]) == [(False, 0, year_us - 1, year_us - 1)]
    shape = RateThrottleRule("r", 999_999_937, 86_399.999999, strategy="sliding_counter").compiled
    assert clocked.call(NOW_US, [(shape, "c", 999_999_937)])[0][:2] == (True, 0)


def test_the_reply_tells_the_server_time(redis_client: redis.Redis) -> None:
    keys, args, *_ = make_call([(rule("fixed_window"), "k", 1)])
    before_s, before_us = redis_client.time()
    reply = decide(redis_client, keys, ["id", *args])
    after_s, after_us = redis_client.time()
    assert before_s * 10**6 + before_us <= reply[1] <= after_s * 10**6 + after_us


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_ttl_is_never_rounded_down_to_nothing(redis_client: redis.Redis, strategy: str) -> None:
    """A TTL of 0 deletes the state and lets everything through (throttled-py: 1000/s with burst 400, 5,000 of 5,000)."""
    compiled = RateThrottleRule("r", 1000, 0.001, strategy=strategy).compiled
    keys, args, *_ = make_call([(compiled, "k", 1)])
    for _ in range(200):
        reply = decide(redis_client, keys, ["id", *args])
        ends_us = redis_client.pexpiretime("k") * 1_000
        assert reply[1] + 1_000_000 - 3_000 < ends_us <= reply[1] + 2_000_000 + 2 * compiled.window_us


def assert_expires(client: redis.Redis, key: str, fresh_us: int) -> None:
    """One to two seconds after it counts for the last time; Redis takes the milliseconds from when the call began."""
    assert fresh_us + 1_000_000 - 3_000 < client.pexpiretime(key) * 1_000 <= fresh_us + 2_000_000


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_counting_key_expires_when_it_is_fresh_and_not_before(redis_client: redis.Redis, strategy: str) -> None:
    """A lost EXPIRE, as a second command, blocks a key for ever (limits on coredis)."""
    call = make_call([(rule(strategy), "k", 2)])
    for _ in range(4):
        reply = decide(redis_client, call.keys, ["id", *call.args])
        fresh_us = reply[1] + call.answers(reply)[0][3]
        assert_expires(redis_client, "k", fresh_us)


def test_each_key_of_a_call_has_an_expiry_of_its_own(redis_client: redis.Redis) -> None:
    costs = (1, 5, 2, 2)
    call = make_call([(rule("token_bucket"), f"k{cost}{i}", cost) for i, cost in enumerate(costs)])
    reply = decide(redis_client, call.keys, ["id", *call.args])
    for key, answer in zip(call.keys, call.answers(reply), strict=True):
        assert_expires(redis_client, key, reply[1] + answer[3])


def test_a_smaller_limit_takes_over_the_newest_64_units_of_many_slots(redis_client: redis.Redis) -> None:
    clocked, oracle = ClockedScript(redis_client), Oracle()
    large, small = rule("sliding_window", 1_000), rule("sliding_window", 10, 55)
    for i in range(20):
        check = (NOW_US + i * 1_000_000, 7 + i % 3)
        assert clocked.call(check[0], [(large, "k", check[1])]) == [oracle.check(large, *check)]
    for later_us in range(20_000_000, 80_000_000, 500_000):
        assert clocked.call(NOW_US + later_us, [(small, "k", 3)]) == [oracle.check(small, NOW_US + later_us, 3)]


def test_fresh_state_is_deleted(redis_client: redis.Redis) -> None:
    """What is written back fresh is dropped: a clock that steps back over a fresh view leaves no key without an end."""
    clocked = ClockedScript(redis_client)
    redis_client.set("k", b"1;b60000000,5,5,0,1800000001000000;")
    clocked.call(NOW_US, [(rule("token_bucket"), "k", 6)])
    assert not redis_client.exists("k")


@pytest.mark.parametrize("strategy", ["token_bucket", "leaky_bucket"])
@pytest.mark.parametrize(("limit", "window"), [(3, 1), (7, 60), (10, 0.003), (49, 1), (9973, 86_400)])
def test_a_burst_is_admitted_to_the_last_unit(redis_client: redis.Redis, strategy: str, limit: int, window: float) -> None:
    """Floating-point GCRA admits one fewer than the burst in a third of simple cases (redis_rate)."""
    clocked = ClockedScript(redis_client)
    compiled = rule(strategy, limit, window)
    answers = clocked.call(NOW_US, [(compiled, "k", 1)] * 100)
    more = [clocked.call(NOW_US, [(compiled, "k", max(1, limit - 100))])] if limit > 100 else []
    assert sum(answer[0] for answer in answers) == min(limit, 100)
    assert all(answer[0][0] for answer in more)
    assert not clocked.call(NOW_US, [(compiled, "k", 1)])[0][0]


def test_reset_forgets_and_repeats_the_request(redis_client: redis.Redis) -> None:
    redis_client.mset({"a": "1;", "b": "1;", "c": "1;", EPOCH_KEY: EPOCH})
    text = script("reset").text.decode()
    request, now_us, *generations = redis_client.eval(text, 3, EPOCH_KEY, "a", "b", "id", EPOCH, 0, 0)
    assert (request, generations) == (b"id", [now_us, now_us])
    assert sorted(redis_client.keys()) == [b"c", EPOCH_KEY.encode()]
    for keys, args in (
        ([], ["id", EPOCH]),
        (["c"], ["", EPOCH, 0]),
        (["c"], ["id"]),
        (["c"], ["id", EPOCH]),
        (["c"], ["id", EPOCH, -1]),
        (["c", "c"], ["id", EPOCH, 0, 0]),
    ):
        with pytest.raises(redis.ResponseError, match="RATETHROTTLE"):
            redis_client.eval(text, 1 + len(keys), EPOCH_KEY, *keys, *args)
    assert redis_client.exists("c")


def test_a_replica_refuses_the_script_before_it_runs(redis_server: Any, redis_client: redis.Redis) -> None:
    loaded = redis_client.script_load(script("decide").body(True))
    keys, args, *_ = make_call([(rule("fixed_window"), "k", 9)])  # denied, so it would write nothing
    redis_client.replicaof("127.0.0.1", "1")
    try:
        with pytest.raises(redis.exceptions.ReadOnlyError):
            redis_client.evalsha(loaded, 2, EPOCH_KEY, *keys, "id", *args)
    finally:
        redis_client.replicaof("NO", "ONE")


def entries(state: bytes | None) -> list[tuple[int, int]]:
    return (read_state(state) or [])[1][1]


def test_counts_of_a_sliding_window_get_as_many_digits_as_they_need(redis_client: redis.Redis) -> None:
    clocked, oracle = ClockedScript(redis_client), Oracle()
    large = rule("sliding_window", 10**9)
    slot_us, start_us, sizes = large.slot_us, NOW_US - NOW_US % large.slot_us, []
    for i, units in enumerate((1, 9, 10, 3, 12_345, 1, 99_999_999, 1, 1)):
        check = (start_us + i * slot_us, units)
        assert clocked.call(check[0], [(large, "k", units)]) == [oracle.check(large, *check)]
        sizes.append(len((clocked.state("k") or b"").rpartition(b",")[2]) - 1)
    assert sizes == [0, 3, 6, 3 * 4, 4 * 4, 5 * 7, 6 * 7, 7 * 10, 8 * 10]
    assert [units for _, units in entries(clocked.state("k"))] == [1, 9, 10, 3, 12_345, 1, 99_999_999, 1, 1]
    for now_us in range(start_us, start_us + large.window_us + 10 * slot_us, slot_us // 2):
        assert clocked.call(now_us, [(large, "k", 10**9)], "peek") == [oracle.check(large, now_us, 10**9, consume=False)]
    clocked.call(start_us + 10**9, [(large, "k", 5)])
    clocked.call(start_us + 10**9 + slot_us, [(large, "k", 5)])
    assert (clocked.state("k") or b"").endswith(b",1,%02d5;" % (((start_us + 10**9) // slot_us + 1) % 100)), "it has begun again"


def test_a_count_of_a_sliding_window_that_is_saturated_fits(redis_client: redis.Redis) -> None:
    """What another definition admits counts too, however full the window is."""
    clocked, large, other = ClockedScript(redis_client), rule("sliding_window", 10**9), rule("fixed_window", 10**9)
    slot = NOW_US // large.slot_us + 1
    state = b"s60000000,937500,3999999999,9,%d,1,%02d9;" % (slot, (slot - 1) % 100)
    redis_client.set("k", b"1;f60000000,%d,1;%s" % (NOW_US - NOW_US % 60_000_000, state))
    for i in range(3):
        assert clocked.call(NOW_US + i * large.slot_us, [(other, "k", 2)])[0][0]
    (*_, (_, held)) = read_state(clocked.state("k")) or []
    assert held == [((slot + i) * large.slot_us, units) for i, units in ((-1, 9), (0, 4_000_000_000), (1, 2), (2, 2))]
    assert clocked.call(NOW_US, [(large, "k", 1)], "peek")[0][:3] == (False, 0, 60_937_500)


@pytest.mark.parametrize("limit", [64, 1_000])
def test_digits_of_slots_come_round_for_many_windows(redis_client: redis.Redis, limit: int) -> None:
    """Steps back by many windows, and states that are read thousands of slots after they were written."""
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    rng, clocked, oracle = random.Random(seed), ClockedScript(redis_client), Oracle()
    shape = rule("sliding_window", limit, 0.064)
    now_us = NOW_US
    for _ in range(1_500):
        kind = rng.random()
        if kind < 0.9:
            now_us += rng.randrange(2_500)
        elif kind < 0.94:
            now_us += rng.choice((63_999, 64_000, 100_000, 1_000_000, 100_000_000, rng.randrange(10**9)))
        elif kind < 0.97:
            now_us -= rng.randrange(9_500)
        else:
            now_us -= rng.choice((99_000, 100_000, 1_000_000, 100_000_000, rng.randrange(10**8)))
        check = now_us, rng.choice((1, 1, 2, limit // 10, limit // 3))
        consume = rng.random() < 0.9
        expected = oracle.check(shape, *check, consume=consume)
        assert clocked.call(now_us, [(shape, "k", check[1])], "check" if consume else "peek") == [expected], now_us
        if clocked.state("k"):
            assert sum(units for _, units in entries(clocked.state("k"))) <= limit
            assert len(clocked.state("k") or b"") < 640


@pytest.mark.parametrize("back_us", [50_000, 64_000, 1_000_000, 100_000_000])
def test_entries_are_kept_by_a_clock_that_steps_back_by_many_windows(redis_client: redis.Redis, back_us: int) -> None:
    clocked, oracle, shape = ClockedScript(redis_client), Oracle(), rule("sliding_window", 1_000, 0.064)
    for i in range(60):
        assert clocked.call(NOW_US + 1_000 * i, [(shape, "k", 3)]) == [oracle.check(shape, NOW_US + 1_000 * i, 3)]
    before = clocked.state("k")
    for mode in ("peek", "check"):
        now_us = NOW_US + 59_000 - back_us
        answer = oracle.check(shape, now_us, 5, consume=mode == "check")
        assert clocked.call(now_us, [(shape, "k", 5)], mode) == [answer]
        assert (clocked.state("k") == before) == (mode == "peek")
    head_us = now_us + 8_000 + 1_000
    head_us -= head_us % 1_000
    assert entries(clocked.state("k"))[-1][0] == head_us
    assert sum(units for _, units in entries(clocked.state("k"))) == 185
    for later_us in range(0, 80_000, 500):
        assert clocked.call(now_us + later_us, [(shape, "k", 7)]) == [oracle.check(shape, now_us + later_us, 7)]


def test_a_call_is_bounded_by_its_work_and_what_is_deferred_was_not_touched(redis_client: redis.Redis) -> None:
    """To read 64 entries as another definition does takes as long as to decide a hundred simple ones."""
    old, new = rule("sliding_window", 64, 3_600), rule("sliding_window", 64, 3_000)
    clocked, keys = ClockedScript(redis_client), [f"k{i}" for i in range(40)]
    for i in range(60):
        clocked.call(NOW_US + i * 1_000, [(old, key, 1) for key in keys], merge=True)
    before = {key: clocked.state(key) for key in keys}
    waiting, rounds, now_us = list(keys), 0, NOW_US + 60_000
    while waiting:
        call = make_call([(new, key, 3) for key in waiting], merge=True)
        numbers, deferred = clocked.send(redis_client, now_us, call)[2:], []
        for key in waiting:
            if numbers[0] == -4:
                deferred.append(key)
                assert clocked.state(key) == before[key], "nothing was done"
                numbers = numbers[1:]
            else:
                assert numbers[:2] == [1, 63], "what was used counts, and each was decided once"
                numbers = numbers[4:]
        assert not numbers
        assert len(deferred) < len(waiting), "at least one is decided"
        assert len(waiting) - len(deferred) < 10
        waiting, rounds = deferred, rounds + 1
    assert rounds > 1
    # Simple ones go through as ever.
    simple = make_call([(old, f"s{i}", 1) for i in range(128)], merge=True)
    assert -4 not in clocked.send(redis_client, now_us, simple)
