"""What a user touches: calls, their errors, and the awaitable that `check` returns."""

from __future__ import annotations

import asyncio
import inspect
import pickle
import re
from collections.abc import Awaitable, Callable
from datetime import timedelta
from enum import StrEnum
from fractions import Fraction
from typing import Any, NamedTuple

import pytest
import redis
import redis.asyncio
import trio

import ratethrottle
from ratethrottle import (
    ConfigurationError,
    CostExceedsLimit,
    Decision,
    InMemoryStorage,
    InvalidRequest,
    LimiterClosed,
    PendingDecision,
    RateThrottleCore,
    RateThrottleRule,
    RedisStorage,
    Request,
    StorageError,
    create_limiter,
)
from ratethrottle.options import OPTIONS, TABLE

RULE = RateThrottleRule("api", 3, 60)
KINDS = ("sliding_window", "token_bucket", "leaky_bucket", "sliding_counter", "fixed_window")


def limiter(*rules: RateThrottleRule) -> RateThrottleCore:
    return RateThrottleCore(rules=rules or (RULE,))


BAD_CALLS: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
    ("key", {"cost": -1}, InvalidRequest, "below"),
    ("key", {"cost": -(2**70)}, InvalidRequest, "below"),
    ("key", {"cost": 1.5}, InvalidRequest, "float"),
    ("key", {"cost": True}, InvalidRequest, "True"),
    ("key", {"cost": "5"}, InvalidRequest, "str"),
    ("key", {"cost": None}, InvalidRequest, "NoneType"),
    ("key", {"cost": 4}, CostExceedsLimit, "capacity of 3"),
    ("key", {"cost": 2**63}, CostExceedsLimit, "capacity of 3"),
    ("", {}, InvalidRequest, "empty"),
    ((), {}, InvalidRequest, "empty tuple"),
    (5, {}, InvalidRequest, "int"),
    (b"key", {}, InvalidRequest, "bytes"),
    (None, {}, InvalidRequest, "NoneType"),
    (("a", 1.5), {}, InvalidRequest, "float"),
    (("a", True), {}, InvalidRequest, "bool"),
    ("\ud800", {}, InvalidRequest, "surrogate"),
    (("a", "\udfff"), {}, InvalidRequest, "surrogate"),
    ("key", {"rule": "nope"}, InvalidRequest, "it has api"),
    ("key", {"rule": 5}, InvalidRequest, "name"),
]


@pytest.mark.parametrize(
    ("key", "options", "kind", "words"), BAD_CALLS, ids=[f"{key!r:.20}-{options}" for key, options, _, _ in BAD_CALLS]
)
async def test_a_bad_call_is_refused_at_once_and_changes_nothing(
    key: Any, options: Any, kind: type[Exception], words: str
) -> None:
    core = limiter()
    await core.check("key")
    for call in (core.check, lambda *a, **k: asyncio.ensure_future(core.peek(*a, **k))):
        with pytest.raises(kind, match=words) as caught:
            await call(key, **options)
        assert type(caught.value) is kind
    with pytest.raises(kind):
        await core.check_many([Request("key"), Request(key, **options)])
    assert (await core.peek("key")).remaining == 2
    assert len(core._storage) == 1


async def test_without_a_rule_or_with_several_the_error_says_which_there_are() -> None:
    with pytest.raises(InvalidRequest, match="add one"):
        await RateThrottleCore().check("key")
    core = limiter(RULE, RateThrottleRule("other", 1, 60))
    with pytest.raises(InvalidRequest, match="api, other"):
        await core.check("key")
    assert (await core.check("key", "other")).rule == "other"
    core.remove_rule("other")
    assert (await core.check("key")).rule == "api"


def test_rules_are_added_once_replaced_on_request_and_removed_by_name() -> None:
    core = limiter()
    core.add_rule(RateThrottleRule("api", 3, 60.0))
    with pytest.raises(ConfigurationError, match="replace=True"):
        core.add_rule(RateThrottleRule("api", 4, 60))
    core.add_rule(RateThrottleRule("api", 4, 60), replace=True)
    assert core.rules["api"].limit == 4
    with pytest.raises(TypeError):
        core.rules["x"] = RULE  # type: ignore[index]  # that it is refused is the test
    with pytest.raises(ConfigurationError, match="there are api"):
        core.remove_rule("nope")
    with pytest.raises(ConfigurationError, match="takes a RateThrottleRule"):
        core.add_rule("api")  # type: ignore[arg-type]  # that it is refused is the test


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: create_limiter(max_kyes=5), "did you mean 'max_keys'"),
        (lambda: create_limiter(colour=5), "there are max_keys"),
        (lambda: create_limiter(clock_us=int), r"write RateThrottleCore\(InMemoryStorage\(clock_us=...\)"),
        (lambda: create_limiter(deadline=5), 'belongs to storage="redis"'),
        (lambda: create_limiter("disk"), '"memory" or "redis"'),
        (lambda: create_limiter("redis"), "needs redis_url"),
        (lambda: create_limiter(redis_url="redis://localhost"), 'pass storage="redis"'),
        (lambda: create_limiter("redis", redis_url="http://localhost"), "redis://, rediss:// or unix://"),
        (lambda: create_limiter("redis", redis_url="redis+sentinel://a:1"), "names no master"),
        (lambda: create_limiter("redis", redis_url="redis://localhost", deadline=0), "0.005 to 60"),
        (lambda: create_limiter("redis", redis_url="redis://localhost", prefix="a{b}"), "braces"),
        (lambda: InMemoryStorage(max_keys=0), "max_keys"),
        (lambda: InMemoryStorage(on_full="explode"), "evict"),  # type: ignore[arg-type]  # that it is refused is the test
        (lambda: RateThrottleCore("redis"), "pass InMemoryStorage"),  # type: ignore[arg-type]  # likewise
    ],
)
def test_a_bad_configuration_is_refused_in_words_that_say_what_would_do(make: Callable[[], object], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        make()


def test_the_table_of_options_in_the_docstring_is_the_table() -> None:
    lines = [line.strip() for line in (create_limiter.__doc__ or "").splitlines() if line.strip().startswith("| ")]
    rows = [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in lines[1:] if "---" not in line]
    assert rows == [(name, *facts) for name, facts in OPTIONS.items()]


async def test_a_decision_says_all_that_a_caller_needs() -> None:
    core = limiter(RateThrottleRule("api", 3, 60, strategy="fixed_window"))
    first = await core.check(("user", 42), cost=2)
    assert first
    assert (first.allowed, first.key, first.rule, first.cost, first.limit, first.remaining) == (
        True,
        ("user", 42),
        "api",
        2,
        3,
        1,
    )
    assert (first.retry_after, first.retry_after_us, first.source) == (0.0, 0, "memory")
    denied = await core.check(("user", 42), cost=2)
    assert not denied
    assert 0 < denied.retry_after <= 60
    assert denied.retry_after_us == round(denied.retry_after * 1e6) == denied.reset_after_us
    assert denied.headers()["RateLimit-Policy"] == '"api";q=3;w=60'
    assert denied.headers()["RateLimit"] == f'"api";r=1;t={denied.headers()["Retry-After"]}'
    assert "Retry-After" not in first.headers()
    assert pickle.loads(pickle.dumps(denied)) == denied
    assert hash(pickle.loads(pickle.dumps(denied))) == hash(denied)
    assert "42" not in repr(denied).replace(str(denied.retry_after), "").replace(str(denied.reset_after), "")
    with pytest.raises(TypeError, match="made by a limiter"):
        Decision()


async def test_no_two_keys_are_one() -> None:
    core = limiter(RateThrottleRule("api", 1, 60))
    keys: list[Any] = [
        "a",
        ("a",),
        ("a", "b"),
        ("a/b", "c"),
        ("a", "b/c"),
        ("ab",),
        ("a", 1),
        ("a", "1"),
        ("a1",),
        "s1:a",
        ("1",),
        (1,),
        ("", "a"),
        ("a", ""),
    ]
    assert all([bool(await core.check(key)) for key in keys])
    assert not any([bool(await core.check(key)) for key in keys])


async def test_many_checks_are_decided_in_order_each_on_its_own() -> None:
    core = limiter()
    decisions = await core.check_many(["a", Request("a", cost=2), "a", "b", Request(("t", 1), "api", 3)])
    assert list(map(bool, decisions)) == [True, True, False, True, True]
    assert [decision.remaining for decision in decisions] == [2, 0, 0, 2, 0]
    assert await core.check_many([]) == []
    with pytest.raises(InvalidRequest, match="iterable of keys"):
        await core.check_many("abc")


async def test_peek_consumes_nothing_and_reset_forgets() -> None:
    core = limiter()
    await core.check("key", cost=2)
    for _ in range(5):
        assert (await core.peek("key")).remaining == 1
    assert not await core.peek("key", cost=2)
    assert len(core._storage) == 1
    assert (await core.peek("other")).remaining == 3
    assert len(core._storage) == 1
    await core.reset("key")
    await core.reset("never seen")
    assert await core.check("key", cost=3)


async def test_a_closed_limiter_says_so() -> None:
    async with limiter() as core:
        assert await core.check("key")
    await core.aclose()
    for call in (
        lambda: core.check("key"),
        lambda: core.peek("key"),
        lambda: core.check_many(["key"]),
        lambda: core.reset("key"),
    ):
        with pytest.raises(LimiterClosed):
            await call()


async def test_a_forgotten_await_is_a_type_error_not_an_open_door() -> None:
    core = limiter()
    with pytest.raises(TypeError, match="await it"):
        bool(core.check("key"))  # what `if` does
    with pytest.raises(TypeError):
        not core.check("key")
    with pytest.raises(TypeError, match="await"):
        PendingDecision()


async def test_everything_that_takes_a_coroutine_takes_a_check() -> None:
    core = limiter(RateThrottleRule("api", 10, 60))
    pending = core.check("key")
    assert isinstance(pending, PendingDecision)
    assert asyncio.iscoroutine(pending)
    assert await pending
    assert await asyncio.create_task(core.check("key"))
    assert all(await asyncio.gather(core.check("key"), core.check("key")))
    assert await asyncio.wait_for(core.check("key"), 1)
    async with asyncio.TaskGroup() as group:
        task = group.create_task(core.check("key"))
    assert task.result()
    assert (await core.peek("key")).remaining == 4


async def test_each_check_gives_one_decision() -> None:
    pending = limiter().check("key")
    assert await pending
    with pytest.raises(RuntimeError, match="awaited already"):
        await pending


async def test_decisions_that_are_kept_stay_as_they_were() -> None:
    """The core uses a decision again that nobody has kept; one that is kept must never change."""
    core = limiter(RateThrottleRule("api", 1000, 60))
    kept = [await core.check(f"key:{i % 7}") for i in range(500)]
    assert [decision.key for decision in kept] == [f"key:{i % 7}" for i in range(500)]
    assert [decision.remaining for decision in kept] == [999 - i // 7 for i in range(500)]
    waiting = [core.check("other") for _ in range(300)]
    assert [(await one).remaining for one in waiting] == [999 - i for i in range(300)]


def test_the_coroutine_protocol_by_hand() -> None:
    core = limiter(RateThrottleRule("api", 10, 60))
    with pytest.raises(StopIteration) as stopped:
        core.check("key").send(None)
    assert stopped.value.value.remaining == 9
    with pytest.raises(StopIteration) as stopped:
        next(iter(core.check("key").__await__()))
    assert stopped.value.value.remaining == 8
    with pytest.raises(KeyError):
        core.check("key").throw(KeyError("mine"))
    core.check("key").close()

    def delegate() -> Any:
        return (yield from core.check("key"))

    with pytest.raises(StopIteration) as stopped:
        next(delegate())
    assert stopped.value.value.remaining == 5


async def turns_of_others(spin: Callable[[], Awaitable[object]]) -> int:
    """How often another task gets to run during 1,280 calls in a row."""
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    task = asyncio.create_task(other())
    for _ in range(128 * 10):
        await spin()
    task.cancel()
    return turns


async def test_a_task_that_spins_on_check_lets_others_run() -> None:
    core = limiter(RateThrottleRule("api", 1, 3600))
    assert await turns_of_others(lambda: core.check("key")) >= 9


def test_in_memory_checks_work_under_trio() -> None:
    async def main() -> list[bool]:
        core = limiter()
        return [bool(await core.check("key")) for _ in range(300)]

    assert sum(trio.run(main)) == 3


def test_all_public_names_are_there_and_documented() -> None:
    for name in ratethrottle.__all__:
        assert getattr(ratethrottle, name).__doc__, name


def nowhere() -> RateThrottleCore:
    """A limiter whose Redis isn't there: what raises anything but a StorageError has done no I/O."""
    return create_limiter("redis", redis_url="redis://127.0.0.1:1/0", rules=[RULE], on_outage="raise")


@pytest.mark.parametrize(("key", "options", "kind", "words"), BAD_CALLS, ids=[f"{key!r:.20}-{o}" for key, o, _, _ in BAD_CALLS])
async def test_a_bad_call_is_refused_before_any_io_and_before_it_is_awaited(
    key: Any, options: Any, kind: type[Exception], words: str
) -> None:
    for core in (limiter(), nowhere()):
        with pytest.raises(kind, match=words):
            core.check(key, **options)
        with pytest.raises(kind, match=words):
            await core.peek(key, **options)
        with pytest.raises(kind, match=words):
            await core.check_many([Request("key"), Request(key, **options)])
        await core.aclose()
        with pytest.raises(LimiterClosed):
            core.check("key")


async def test_a_storage_that_is_not_there_is_an_error_of_the_storage() -> None:
    async with nowhere() as core:
        with pytest.raises(StorageError):
            await core.check("key")


async def test_a_cost_is_whatever_python_takes_for_an_index() -> None:
    class Three:
        def __index__(self) -> int:
            return 3

    assert (await limiter().check("key", cost=Three())).cost == 3  # type: ignore[arg-type]  # an int to Python, not to mypy


SECRET = "redis://:hunter2@127.0.0.1:1/0"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: create_limiter("Redis", redis_url=SECRET), "did you mean 'redis'"),
        (lambda: create_limiter(SECRET), 'write storage="redis", redis_url='),
        (lambda: create_limiter(redis_url=SECRET), 'pass storage="redis"'),
        (lambda: create_limiter("redis", redis_url=SECRET, on_full="deny"), 'belongs to storage="memory"'),
        (lambda: create_limiter("redis", redis_url=SECRET, passwort="hunter2"), "no option 'passwort'"),
        (lambda: create_limiter(InMemoryStorage()), "goes to RateThrottleCore"),  # type: ignore[arg-type]  # the test
        (lambda: create_limiter(None), "is a NoneType"),  # type: ignore[arg-type]  # likewise
        (lambda: create_limiter(redis_ulr=SECRET), "did you mean 'redis_url'"),
        (lambda: create_limiter(rules=RULE), r"such as \[rule\]"),  # type: ignore[arg-type]  # likewise
        (lambda: create_limiter(rules=5), "rules is a int"),  # type: ignore[arg-type]  # likewise
        (
            lambda: create_limiter(rules=["10/s"]),
            r'takes a RateThrottleRule or a ConcurrencyRule, not a str; write RateThrottleRule\.parse\("name", "10/s"\)$',
        ),  # type: ignore[list-item]  # likewise
        (lambda: create_limiter(rules="10/s"), r"rules is a str; it is an iterable of rules, such as \[rule\]"),  # type: ignore[arg-type]  # likewise
        (lambda: create_limiter(rules=[RateThrottleRule.parse_many("api", "1/s;9/m")]), "not a tuple; add its rules one by one$"),  # type: ignore[list-item]  # likewise
        (lambda: RateThrottleCore().add_rule([RULE]), "not a list; add its rules one by one$"),  # type: ignore[arg-type]  # likewise
        (lambda: RateThrottleCore().add_rule(RateThrottleRule), "takes a RateThrottleRule or a ConcurrencyRule, not a type$"),  # type: ignore[arg-type]  # likewise
        (lambda: create_limiter(rules=[RULE, RateThrottleRule("api", 4, 60)]), "replace=True"),
        (lambda: create_limiter(max_keys="5"), "max_keys is '5'; it is a whole number from 1 to 1,000,000,000"),
        (lambda: create_limiter(max_keys=True), "max_keys is True"),
        (lambda: RateThrottleCore(InMemoryStorage), "storage is the class InMemoryStorage"),  # type: ignore[arg-type]  # likewise
        (lambda: RateThrottleCore(redis.Redis.from_url(SECRET)), r"a Redis; pass .* RedisStorage\(client\)"),  # type: ignore[arg-type]  # likewise
    ],
)
def test_a_mistake_is_named_and_a_password_is_not(make: Callable[[], object], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words) as caught:
        make()
    assert "hunter2" not in str(caught.value) + repr(caught.value)


def test_the_defaults_of_the_table_of_options_are_those_of_the_storages() -> None:
    def default(storage: type, name: str) -> str:
        parameters = {**inspect.signature(RedisStorage.from_url).parameters, **inspect.signature(storage).parameters}
        value = parameters[name].default
        return f'"{value}"' if isinstance(value, str) else "None" if value is None else f"{value:,}"

    storages = {"memory": InMemoryStorage, "redis": RedisStorage}
    for name, (storage, told, _, _) in OPTIONS.items():
        assert told == default(storages[storage], name), name
    taken = {name for storage in storages.values() for name in inspect.signature(storage).parameters}
    taken |= set(inspect.signature(RedisStorage.from_url).parameters) - {"url", "options"}
    assert taken - set(OPTIONS) == {"client", "clock_us"}  # an argument of its own, and a clock for tests


def test_docstrings_give_the_ranges_of_the_table() -> None:
    docs = {"redis": RedisStorage.__doc__ or "", "memory": InMemoryStorage.__doc__ or ""}
    numbers = {name: option for name, option in TABLE.items() if option.most}
    assert len(numbers) >= 10
    for name, option in numbers.items():
        most = re.findall(r"to ([\d.,^]*\d)", option.range)[0]
        assert re.search(rf"\b{name}: [^:]*? to {re.escape(most)}(?!\d)", docs[option.storage]), name


async def test_nothing_that_is_shown_shows_a_key() -> None:
    core = limiter()
    key = "user:hunter2"
    request, pending = Request(key, cost=2), core.check(key)
    shown = [request, [request], core, core._storage, pending, await pending, core._entry(key), core.rules]
    assert not [one for one in shown if "hunter2" in f"{one!r} {one}"]
    for call in (lambda: core.check(key, cost=9), lambda: core.check(key, "nope"), lambda: core.check((key, 1.5))):  # type: ignore[arg-type]  # the test
        with pytest.raises(InvalidRequest) as caught:
            call()
        assert "hunter2" not in f"{caught.value!r} {caught.value}"


async def test_rules_can_be_read_live_but_not_written() -> None:
    core = limiter()
    rules = core.rules
    core.add_rule(RateThrottleRule("other", 1, 1))
    assert list(rules) == ["api", "other"]
    assert rules["api"] is RULE


async def test_a_rule_that_is_replaced_keeps_what_was_used() -> None:
    core = limiter()
    await core.check("key", cost=3)
    core.add_rule(RateThrottleRule("api", 5, 60), replace=True)
    assert (await core.peek("key")).remaining == 2
    core.add_rule(RULE, replace=True)
    assert not await core.check("key")


@pytest.mark.parametrize("requests", ["abc", Request("key"), 5, None])
async def test_what_is_no_list_of_checks_is_refused(requests: Any) -> None:
    with pytest.raises(InvalidRequest, match="takes an iterable of keys or Requests"):
        await limiter().check_many(requests)


async def test_checks_can_come_from_any_iterable() -> None:
    decisions = await limiter().check_many(("user", i) for i in range(500))
    assert [decision.key for decision in decisions] == [("user", i) for i in range(500)]


async def test_a_limiter_is_not_opened_again_after_it_was_closed() -> None:
    core = limiter()
    await core.aclose()
    await core.aclose()
    with pytest.raises(LimiterClosed):
        async with core:
            pass
    with pytest.raises(LimiterClosed):
        await core.check_many([])
    assert repr(core) == "<RateThrottleCore InMemoryStorage rules=['api'] closed>"


def test_everything_in_memory_works_under_trio() -> None:
    async def main() -> None:
        async with limiter() as core:
            assert list(map(bool, await core.check_many(["a", Request("a", cost=2), "a"]))) == [True, True, False]
            assert not await core.peek("a")
            await core.reset("a")
            async with trio.open_nursery() as nursery:
                for _ in range(3):
                    nursery.start_soon(core.check, "a")
            assert not await core.check("a")

    trio.run(main)


def test_a_check_can_be_run_by_itself() -> None:
    assert asyncio.run(limiter().check("key"))


async def test_an_exception_group_of_tasks_gets_each_ones_error() -> None:
    core = nowhere()
    with pytest.raises(ExceptionGroup) as caught:
        async with asyncio.TaskGroup() as group:
            group.create_task(core.check("key"))
    assert [isinstance(error, StorageError) for error in caught.value.exceptions] == [True]
    await core.aclose()


async def test_a_task_that_runs_a_check_can_be_shown() -> None:
    """From Python 3.12 on the repr of a task asks for the truth of its coroutine."""
    task = asyncio.create_task(limiter().check("key"))
    assert "Task" in repr(task)
    assert await task
    assert "PendingDecision" in repr(task)


class Tenant(StrEnum):
    """A key that is a str of its own kind."""

    FREE = "free"


class Client(NamedTuple):
    """A key that is a tuple of its own kind."""

    host: str
    port: int


async def test_keys_of_a_subclass_are_what_they_say_on_every_path() -> None:
    core = limiter(RateThrottleRule(Tenant.FREE, 10, 60))
    for key, plain in ((Tenant.FREE, "free"), (Client("a", 1), ("a", 1)), ((Tenant.FREE,), ("free",))):
        assert await core.check(key)
        assert await core.check_many([key, Request(plain)])
        assert (await core.peek(plain)).remaining == 7
        await core.reset(key)
        assert (await core.peek(key, Tenant.FREE)).remaining == 10
    with pytest.raises(InvalidRequest, match="digits"):
        await core.check(("a", 10**5000))


async def test_two_tables_that_meet_one_rule_in_the_middle_of_a_check_stay_apart() -> None:
    """The clock of one limiter asks another one with the same rule, which is then gone: nothing of it may be left behind."""
    other: list[RateThrottleCore] = []

    def clock_us() -> int:
        if other:
            other[0].check("key").close()
            other.clear()
        return 1_800_000_000_000_000

    core = RateThrottleCore(InMemoryStorage(clock_us=clock_us), rules=[RULE])
    for number in range(50):
        other.append(limiter(RULE))
        assert await core.check(f"key:{number}")
    assert [(await core.peek(f"key:{number}")).remaining for number in range(50)] == [2] * 50


async def test_peeking_in_a_loop_lets_others_run() -> None:
    core = limiter()
    assert await turns_of_others(lambda: core.peek("key")) >= 9


async def test_no_task_that_sleeps_for_retry_after_wakes_too_early() -> None:
    for window_us in range(1_000_001, 1_000_301):
        core = RateThrottleCore(InMemoryStorage(clock_us=lambda: 1_800_000_000_000_000))
        core.add_rule(RateThrottleRule("api", 1, timedelta(microseconds=window_us)))
        await core.check("key")
        denied = await core.check("key")
        assert Fraction(denied.retry_after) * 1_000_000 >= denied.retry_after_us == window_us
