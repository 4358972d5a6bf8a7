"""What people do around a limiter: mocks, inspection, a forgotten `await`, thousands of rules, a limit of 0, counts of decisions."""

from __future__ import annotations

import asyncio
import gc
import inspect
import json
import os
import pickle
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock, MagicMock, Mock, create_autospec, patch

import pytest

from ratethrottle import (
    ConfigurationError,
    Decision,
    InMemoryStorage,
    InvalidRequest,
    Outcomes,
    RateThrottleCore,
    RateThrottleRule,
    Request,
    create_limiter,
)
from tests.kit.counted import counted

RULE = RateThrottleRule("api", 3, 60)
NOTHING = RateThrottleRule("nothing", 0, 60)


def limiter(*rules: RateThrottleRule) -> RateThrottleCore:
    return RateThrottleCore(rules=rules or (RULE,))


# Inspection and mocks


def test_check_is_a_coroutine_function_however_it_is_asked() -> None:
    core = limiter()
    for check in (core.check, RateThrottleCore.check):
        assert inspect.iscoroutinefunction(check)
        assert asyncio.iscoroutinefunction(check)
        assert callable(check)
    assert inspect.ismethod(core.check)
    assert list(inspect.signature(core.check).parameters) == ["key", "rule", "cost"]
    assert inspect.signature(core.check).parameters["cost"].kind is inspect.Parameter.KEYWORD_ONLY
    assert core.check.__name__ == "check"
    assert core.check.__qualname__ == "RateThrottleCore.check"
    assert "consume them if so" in (core.check.__doc__ or "")


async def test_a_bound_check_and_one_of_a_subclass_decide_like_any_other() -> None:
    class Mine(RateThrottleCore):
        pass

    for core in (limiter(), Mine(rules=[RULE])):
        check = core.check
        assert [bool(await check("key")) for _ in range(4)] == [True, True, True, False]
        assert await type(core).check(core, "other", "api", cost=3)
        assert (await core.check(key="third", rule="api", cost=2)).remaining == 1
    for arguments in ((), ("key", "api", 1), (1, 2, 3, 4, 5, 6, 7, 8)):
        with pytest.raises(TypeError):
            limiter().check(*arguments)  # type: ignore[call-arg,arg-type]  # that it is refused is the test
    with pytest.raises(TypeError):
        RateThrottleCore.check("no limiter", "key")  # type: ignore[arg-type]  # likewise


async def answer(core: RateThrottleCore) -> str:
    return "ok" if await core.check("user:1", cost=2) else "429"


@pytest.mark.parametrize(
    "double",
    [
        lambda: AsyncMock(spec=RateThrottleCore),
        lambda: MagicMock(spec=RateThrottleCore),
        lambda: MagicMock(spec=limiter()),
        lambda: Mock(spec_set=RateThrottleCore),
        lambda: create_autospec(limiter(), instance=True),
        lambda: create_autospec(RateThrottleCore, instance=True),
        create_autospec(RateThrottleCore),
    ],
)
async def test_a_double_of_a_limiter_is_awaited_like_one(double: Callable[[], Any]) -> None:
    stands_in = double()
    assert await answer(stands_in) == "ok"
    assert await stands_in.peek("user:1")
    stands_in.check.assert_awaited_once_with("user:1", cost=2)
    stands_in.check.return_value = False
    assert await answer(stands_in) == "429"


async def test_every_method_can_be_replaced_on_one_limiter_and_comes_back() -> None:
    core, other = limiter(), limiter()
    with patch.object(core, "check", AsyncMock(return_value=False)), patch.object(core, "peek", AsyncMock(return_value=1)):
        assert await answer(core) == "429"
        assert await core.peek("user:1") == 1
        assert await answer(other) == "ok"
        assert isinstance(core, RateThrottleCore)
        core.add_rule(RateThrottleRule("other", 1, 60))
        with patch.object(core, "check", AsyncMock(return_value=True)):
            assert await answer(core) == "ok"
        assert await answer(core) == "429"
    with patch.object(core, "check", autospec=True, return_value=False) as check:
        assert await answer(core) == "429"
        check.assert_awaited_once_with("user:1", cost=2)
    assert type(core) is RateThrottleCore
    assert isinstance(await core.check("user:1", "api"), Decision)
    core.reset = AsyncMock()  # type: ignore[method-assign]  # what a test may do
    await core.reset("user:1")
    core.reset.assert_awaited_once()
    del core.reset
    await core.reset("user:1", "api")
    assert (await core.peek("user:1", "api")).remaining == 3


async def test_a_method_can_be_replaced_on_the_class_and_comes_back() -> None:
    core = limiter()
    for options in ({"new": AsyncMock(return_value=False)}, {"return_value": False}, {"autospec": True, "return_value": False}):
        with patch.object(RateThrottleCore, "check", **options):
            assert await answer(core) == "429"
    assert await answer(core) == "ok"


@pytest.mark.parametrize(("arguments", "options"), [((), {}), (("user:1", "api", 2), {}), (("user:1",), {"costs": 2})])
async def test_a_double_made_from_the_class_refuses_arguments_that_check_has_not(arguments: Any, options: Any) -> None:
    core = limiter()
    for double in (create_autospec(RateThrottleCore), create_autospec(RateThrottleCore, instance=True), create_autospec(core)):
        with pytest.raises(TypeError):
            await double.check(*arguments, **options)
        assert await double.check("user:1", "api", cost=2)
    with patch.object(RateThrottleCore, "check", autospec=True, return_value=False) as check:
        with pytest.raises(TypeError):
            await core.check(*arguments, **options)
        assert await answer(core) == "429"
        check.assert_awaited_once_with(core, "user:1", cost=2)
    assert await answer(core) == "ok"


def test_only_methods_can_be_set_on_a_limiter() -> None:
    core = limiter()
    for name in ("checks", "rules", "colour"):
        with pytest.raises(AttributeError):
            setattr(core, name, 1)
    with pytest.raises(AttributeError):
        del core.check


# A forgotten await


async def test_a_warning_that_is_an_error_ends_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    import sys

    unraisable: list[Any] = []
    before, sys.unraisablehook = sys.unraisablehook, unraisable.append
    try:
        core = limiter(RateThrottleRule("api", 1000, 60))
        for _ in range(5):
            core.check("key")
        kept = [hook.object for hook in unraisable]
        assert [repr(one) for one in kept] == ["<PendingDecision complete>"] * 5
        with pytest.raises(RuntimeError, match="awaited already"):
            await kept[0]
        del kept, unraisable[:]
        gc.collect()
        assert (await core.check("key")).remaining == 994
    finally:
        sys.unraisablehook = before


def test_a_check_that_was_not_awaited_has_nothing_of_a_decision() -> None:
    pending = limiter().check("key")
    for name in (name for name in dir(Decision) if not name.startswith("_")):
        with pytest.raises(AttributeError, match=f"a check has no '{name}' yet; await the check first"):
            getattr(pending, name)
    with pytest.raises(AttributeError, match="'PendingDecision' object has no attribute 'colour'"):
        pending.colour  # type: ignore[attr-defined]  # noqa: B018  # the test
    assert not hasattr(pending, "cr_code")
    pending.close()


# Many rules


async def test_with_100_000_rules_errors_and_reprs_are_short_quick_and_name_the_nearest() -> None:
    core = RateThrottleCore()
    for i in range(100_000):
        core._by_name[f"tenant-{i}"] = RULE
        core._rules[f"tenant-{i}"] = RULE.compiled
    calls: list[tuple[Callable[[], object], str]] = [
        (lambda: core.check("key", "tenant_54321"), "it has tenant-54321, "),
        (lambda: core.check("key", "tenant-543210"), "it has tenant-54321, "),
        (lambda: core.check("key", "Tenant-77"), "it has tenant-77, "),
        (lambda: core.check("key", "k" * 100_000), "it has tenant-0, "),
        (lambda: core.remove_rule("tennat-99999"), "there are tenant-99999, "),
        (lambda: core.remove_rule("nobody"), "there are tenant-0, "),
    ]
    for call, words in calls:
        began = time.thread_time()
        with pytest.raises(ValueError, match=words) as caught:
            call()
        assert time.thread_time() - began < 0.1
        assert str(caught.value).endswith(" and 99,995 more")
        assert str(caught.value).count("tenant-") <= 6
        assert len(str(caught.value)) < 250
    with pytest.raises(InvalidRequest, match=r"name one \(rule=\.\.\.\): tenant-0, .* and 99,995 more; "):
        core.check("key")
    assert len(repr(core)) < 150


async def test_with_several_rules_both_ways_to_name_one_are_said() -> None:
    core = limiter(RULE, NOTHING)
    words = r"^the limiter has several rules; name one \(rule=\.\.\.\): api, nothing; in check_many write Request\(key, rule\)$"
    with pytest.raises(InvalidRequest, match=words):
        core.check("key")
    with pytest.raises(InvalidRequest, match=words):
        await core.check_many(["key"])
    assert await core.check_many([Request("key", "api")])


def test_with_few_rules_all_are_named_the_nearest_first() -> None:
    core = limiter(*(RateThrottleRule(name, 1, 1) for name in ("search", "api", "login", "burst")))
    with pytest.raises(ConfigurationError, match=r"there are login, api, burst, search$"):
        core.remove_rule("logn")
    assert "rules=['api', 'burst', 'login', 'search']" in repr(core)


# A limit of 0


async def test_a_limit_of_0_for_a_while_is_no_refill() -> None:
    core = limiter(RULE, RateThrottleRule("other", 5, 60))
    await core.check("key", "api", cost=2)
    core.add_rule(RateThrottleRule("api", 0, 60), replace=True)
    decisions = await core.check_many([Request("key", "api"), Request("key", "other"), Request("key", "api")])
    assert [(decision.rule, decision.allowed, decision.remaining) for decision in decisions] == [
        ("api", False, 0),
        ("other", True, 4),
        ("api", False, 0),
    ]
    core.add_rule(RULE, replace=True)
    assert (await core.peek("key", "api")).remaining == 1
    core.add_rule(RateThrottleRule("api", 0, 60), replace=True)
    await core.reset("key", "api")
    core.add_rule(RULE, replace=True)
    assert (await core.peek("key", "api")).remaining == 3
    core.remove_rule("other")
    assert (await core.check("key")).allowed


def test_a_rule_with_a_limit_of_0_is_a_value_and_has_no_burst() -> None:
    for strategy in ("sliding_window", "token_bucket", "leaky_bucket", "sliding_counter", "fixed_window"):
        rule = RateThrottleRule("rule", 0, 60, strategy=strategy)
        assert (rule.limit, rule.capacity) == (0, 0)
        assert rule == RateThrottleRule.parse("rule", "0/minute", strategy=strategy)
        assert rule != RateThrottleRule("rule", 1, 60, strategy=strategy)
    with pytest.raises(ConfigurationError, match="denies everything, and has no burst"):
        RateThrottleRule("rule", 0, 60, strategy="token_bucket", burst=5)


# Counts of decisions


async def test_a_rule_has_counts_of_every_source_also_of_those_that_decided_nothing() -> None:
    core = limiter(RULE, NOTHING)
    await core.check("key", "api")
    for rule in ("api", "nothing"):
        sources = core.statistics().decisions[rule]
        assert list(sources) == ["memory", "redis", "prefilter", "lease", "outage", "overload"]
        assert [sources[source] for source in sources] == [Outcomes(rule == "api", 0), *[Outcomes(0, 0)] * 5]
    with pytest.raises(KeyError):
        core.statistics().decisions["ap"]
    with pytest.raises(KeyError):
        core.statistics().decisions["api"]["cache"]
    before = core.statistics()
    await core.check("key", "api")
    assert before.decisions["api"]["memory"] == Outcomes(1, 0)  # a snapshot
    assert pickle.loads(pickle.dumps(before)) == before
    assert json.loads(json.dumps(asdict(before)))["decisions"]["nothing"]["redis"] == {"allowed": 0, "denied": 0}


async def test_limiters_that_share_a_rule_count_on_their_own_and_a_changed_rule_goes_on_counting() -> None:
    one, other = limiter(), limiter()
    for _ in range(5):
        await one.check("key")
    await other.check_many(["key", "key"])
    assert counted(one) == {"api": {"memory": Outcomes(allowed=3, denied=2)}}
    assert counted(other) == {"api": {"memory": Outcomes(2, 0)}}
    one.add_rule(RateThrottleRule("api", 4, 60), replace=True)
    await one.check("key")
    assert one.statistics().decisions["api"]["memory"] == Outcomes(4, 2)
    one.remove_rule("api")
    assert counted(one) == {}
    one.add_rule(RULE)
    await one.check("another")
    assert one.statistics().decisions["api"]["memory"] == Outcomes(1, 0)
    assert counted(other) == {"api": {"memory": Outcomes(2, 0)}}
    assert InMemoryStorage().statistics().decisions == {}


async def test_what_policies_decide_is_counted_as_an_outage() -> None:
    core = create_limiter("redis", redis_url="redis://127.0.0.1:1", rules=[RULE], on_outage="deny", deadline=0.05)
    await core.check("key")
    assert counted(core) == {"api": {"outage": Outcomes(0, 1)}}
    await core.aclose()


# Rules that change


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="/proc is where Linux says what a process holds")
async def test_a_rule_that_changes_all_the_time_leaves_nothing_behind() -> None:
    core = limiter()

    async def change(first: int, last: int) -> None:
        for limit in range(first, last):
            core.add_rule(RateThrottleRule("api", limit, 60, strategy="token_bucket"), replace=True)
            await core.check("key" if limit % 3 else ("a tuple", 1))

    await change(1_000_000, 1_010_000)
    before = resident_bytes()
    await change(2_000_000, 2_030_000)
    assert resident_bytes() - before < 30_000 * 50


async def test_what_was_used_is_counted_under_any_number_of_definitions() -> None:
    now_us = 10**15
    storage = InMemoryStorage(clock_us=lambda: now_us)
    one, other = (RateThrottleCore(storage, rules=[RateThrottleRule("api", 10**6, 3600)]) for _ in range(2))
    for i in range(5_000):
        now_us += 1_000
        one.add_rule(RateThrottleRule("api", 10**6 + i, 3600 + i, strategy=("token_bucket", "fixed_window")[i % 2]), replace=True)
        assert await one.check(f"key {i}", cost=7)
        assert await other.check("key")
        assert (await one.peek(f"key {i}")).remaining == 10**6 + i - 7
    assert (await other.peek("key")).remaining == 10**6 - 5_000
