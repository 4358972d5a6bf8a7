"""Several limits in one check, in memory: what may be named, what is decided, and what a decision says of its parts."""

from __future__ import annotations

import asyncio
import gc
import math
import pickle
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from enum import StrEnum
from types import MappingProxyType
from typing import Any, cast

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from ratethrottle import (
    ConfigurationError,
    CostExceedsLimit,
    Decision,
    FirstOf,
    InMemoryStorage,
    InvalidRequest,
    LimiterClosed,
    Outcomes,
    RateThrottleCore,
    RateThrottleRule,
    Request,
    create_limiter,
)
from tests.kit.clocked import Part
from tests.kit.joint import binding, check_jointly
from tests.kit.oracle import Answer, Oracle
from tests.kit.strategies import START_US, STRATEGIES, make_rule, rules

NEVER_US = 2**63 - 1
BURST = RateThrottleRule("burst", 3, 60, strategy="token_bucket")
DAY = RateThrottleRule("day", 10, 86_400)
OTHER = RateThrottleRule("other", 5, 60, strategy="fixed_window")
CLOSED = RateThrottleRule("closed", 0, 60)


def limiter(*more: RateThrottleRule, now: list[int] | None = None, **options: Any) -> RateThrottleCore:
    clock = (lambda: now[0]) if now else (lambda: START_US)
    return RateThrottleCore(InMemoryStorage(clock_us=clock, **options), rules=[BURST, DAY, OTHER, *more])


def told(decision: Decision) -> Answer:
    retry_us = decision.retry_after_us
    return decision.allowed, decision.remaining, -1 if retry_us == NEVER_US else retry_us, decision.reset_after_us


def counted(core: RateThrottleCore, rule: str) -> Outcomes:
    return core.statistics().decisions[rule]["memory"]


def left(decision: Decision) -> dict[str, int]:
    return {part.rule: part.remaining for part in decision.parts}


# Against the oracle:

KEYS = ("a", "b", ("t", 1))
moves = st.one_of(
    st.tuples(st.just("share"), st.integers(-2_000, 3_000)),
    st.tuples(st.just("us"), st.integers(-3, 3)),
    st.tuples(st.sampled_from(("retry", "reset")), st.integers(-1, 1)),
)
picks = st.tuples(st.integers(0, 4), st.integers(0, 2))
sets = st.lists(
    st.tuples(st.lists(picks, min_size=1, max_size=3), st.sampled_from((1, 1, 2, "all", "half"))), min_size=1, max_size=4
)
steps = st.lists(st.tuples(moves, sets, st.sampled_from(("check", "check_many", "peek", "all"))), min_size=2, max_size=25)
shapes = st.builds(
    make_rule, st.sampled_from(STRATEGIES), st.sampled_from((1, 2, 3, 5, 65)), st.sampled_from((1_000, 64_001, 10**6))
)


def distinct(asked: list[Any], versions: list[RateThrottleRule], one_key: bool) -> list[tuple[list[tuple[int, int]], int]]:
    """Sets without a rule and key that an earlier one has, and a cost that each alternative's rule can grant."""
    seen: set[tuple[int, int]] = set()
    found = []
    for picked, cost in asked:
        alternatives = []
        for which, key in [(which, 0 if one_key else key) for which, key in picked]:
            if (which, key) not in seen and all(key == other for _, other in alternatives):  # a FirstOf is of one key
                seen.add((which, key))
                alternatives.append((which, key))
        if alternatives:
            most = min(versions[which].capacity for which, _ in alternatives)
            found.append((alternatives, min(most, {"all": most, "half": max(1, most // 2)}.get(cost, cost))))
    return found


async def ask(core: RateThrottleCore, how: str, asked: list[tuple[list[tuple[int, int]], int]]) -> Decision:
    named = [FirstOf(*(f"r{which}" for which, _ in parts)) if len(parts) > 1 else f"r{parts[0][0]}" for parts, _ in asked]
    if how == "all":
        return await core.check_all(
            [Request(KEYS[parts[0][1]], rule, cost) for rule, (parts, cost) in zip(named, asked, strict=True)]
        )
    costs = {rule: cost for rule, (_, cost) in zip(named, asked, strict=True)}
    if how == "check_many":
        return (await core.check_many([Request(KEYS[0], costs)]))[0]
    return await (core.check if how == "check" else core.peek)(KEYS[0], costs)


@settings(max_examples=150, deadline=None)
@given(versions=st.lists(rules | shapes, min_size=5, max_size=5), plan=steps)
async def test_the_core_decides_as_the_oracle_does(versions: list[RateThrottleRule], plan: list[Any]) -> None:
    versions = [replace(rule, name=f"r{i}") for i, rule in enumerate(versions)]
    now = [START_US]
    core = RateThrottleCore(InMemoryStorage(clock_us=lambda: now[0]), rules=versions)
    oracles: defaultdict[str, Oracle] = defaultdict(Oracle)
    last = (START_US, START_US)
    for (kind, by), picked, how in plan:
        now[0] = (
            {"retry": last[0], "reset": last[1]}.get(kind, now[0])
            + (versions[0].window_us * by // 1_000 if kind == "share" else by)
        )  # fmt: skip
        asked = distinct(picked, versions, how != "all")
        parts = [
            [Part(versions[which].compiled, f"{which} {key}", cost) for which, key in alternatives]
            for alternatives, cost in asked
        ]
        expected = check_jointly(oracles, parts, now[0], consume=how != "peek")
        if len(parts) == len(parts[0]) == 1 and not expected[0]:  # a single check writes where the clock was set back to
            oracles[parts[0][0].key].check(parts[0][0].rule, now[0], parts[0][0].cost, consume=how != "peek")
        decision = await ask(core, how, asked)
        assert decision.allowed == expected[0]
        heard = decision.parts or (decision,)
        assert [told(part) for part in heard] == [answer for _, answer in expected[1]]
        payers = [asked[s][0][which] for s, (which, _) in enumerate(expected[1])]
        assert [(part.rule, part.key) for part in heard] == [(f"r{which}", KEYS[key]) for which, key in payers]
        assert [part.cost for part in heard] == [cost for _, cost in asked]
        assert len(decision.parts) == (len(asked) if len(asked) > 1 else 0)
        binds = heard[binding(parts, expected)]
        assert (decision.rule, decision.key, decision.cost, told(decision)) == (binds.rule, binds.key, binds.cost, told(binds))
        assert decision.atomic
        last = now[0] + max(0, told(decision)[2]), now[0] + decision.reset_after_us


# What may be named:


async def test_every_form_names_the_same_limits() -> None:
    class Name(StrEnum):
        BURST = "burst"

    forms: list[Any] = [
        ("burst", "day"),
        ["burst", "day"],
        {"burst": 1, "day": 1},
        MappingProxyType({"burst": 1, "day": 1}),
        (BURST, DAY),
        {BURST: 1, "day": 1},
        [Name.BURST, RateThrottleRule("day", 10, 86_400)],
    ]
    for form in forms:
        core = limiter()
        for remaining in (2, 1, 0):
            decision = await core.check("key", form)
            assert decision
            assert left(decision) == {"burst": remaining, "day": remaining + 7}
        denied = await core.check("key", form)
        assert not denied
        assert (denied.rule, left(denied)) == ("burst", {"burst": 0, "day": 7})
    core = limiter()
    for form in (("burst",), ["burst"], {"burst": 1}, (BURST,), BURST, Name.BURST):
        core = limiter()
        decision = await core.check("key", form)
        assert (decision.rule, decision.remaining, decision.parts) == ("burst", 2, ())


async def test_each_rule_of_a_mapping_has_its_own_cost() -> None:
    core = limiter()
    decision = await core.check("key", {"burst": 2, FirstOf("day", "other"): 4})
    assert [(part.rule, part.cost, part.remaining) for part in decision.parts] == [("burst", 2, 1), ("day", 4, 6)]
    decision = await core.check("other", ("burst", "day"), cost=3)
    assert [(part.cost, part.remaining) for part in decision.parts] == [(3, 0), (3, 7)]
    assert (await core.check("third", {"burst": 3})).remaining == 0


BAD: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
    ((), {}, InvalidRequest, "names no rule"),
    ([], {}, InvalidRequest, "names no rule"),
    ({}, {}, InvalidRequest, "names no rule"),
    (("burst", "burst"), {}, InvalidRequest, "'burst' is named twice"),
    (("burst", BURST), {}, InvalidRequest, "'burst' is named twice"),
    (("day", FirstOf("burst", "day")), {}, InvalidRequest, "'day' is named twice"),
    (FirstOf("burst", "burst"), {}, InvalidRequest, "'burst' is named twice"),
    pytest.param({"burst", "day"}, {}, InvalidRequest, "order of several rules matters", id="a set"),
    (frozenset({"burst"}), {}, InvalidRequest, "order of several rules matters"),
    ({"burst": 1}.keys(), {}, InvalidRequest, "rule is a dict_keys"),
    ((name for name in ("burst", "day")), {}, InvalidRequest, "rule is a generator"),
    (5, {}, InvalidRequest, "rule is a int; it is the name"),
    (b"burst", {}, InvalidRequest, "rule is a bytes"),
    (("burst", 5), {}, InvalidRequest, "one of several rules is a int"),
    (("burst", None), {}, InvalidRequest, "one of several rules is a NoneType"),
    (("burst", ("day",)), {}, InvalidRequest, "one of several rules is a tuple"),
    (("burst", ["day"]), {}, InvalidRequest, "one of several rules is a list"),
    (("burst", {"day": 1}), {}, InvalidRequest, "one of several rules is a dict"),
    (("burst", "nope"), {}, InvalidRequest, "no such rule; it has burst, day, flagged"),
    (FirstOf("burst", "nope"), {}, InvalidRequest, "no such rule"),
    ({"burst": 0}, {}, InvalidRequest, "below 1"),
    ({"burst": 1, "day": 0}, {}, InvalidRequest, "below 1"),
    ({"burst": 1, "day": -1}, {}, InvalidRequest, "below 1"),
    ({"burst": 1, "day": 1.0}, {}, InvalidRequest, "float"),
    ({"burst": 1, "day": True}, {}, InvalidRequest, "True"),
    ({"burst": 1, "day": None}, {}, InvalidRequest, "NoneType"),
    ({"burst": 1}, {"cost": 2}, InvalidRequest, "beside a mapping"),
    ({"burst": 1, "day": 1}, {"cost": 2}, InvalidRequest, "beside a mapping"),
    (("burst", "day"), {"cost": -1}, InvalidRequest, "below"),
    (("burst", "day"), {"cost": "1"}, InvalidRequest, "str"),
    (("burst", "day"), {"cost": 4}, CostExceedsLimit, "'burst' has a capacity of 3"),
    (("day", "burst"), {"cost": 4}, CostExceedsLimit, "'burst' has a capacity of 3"),
    ({"day": 10, "burst": 4}, {}, CostExceedsLimit, "'burst' has a capacity of 3"),
    (FirstOf("day", "burst"), {"cost": 4}, CostExceedsLimit, "'burst' has a capacity of 3"),
    (tuple(RateThrottleRule(f"r{i}", 1, 1) for i in range(17)), {}, InvalidRequest, "more than 16 rules"),
    (
        (FirstOf(*(RateThrottleRule(f"r{i}", 1, 1) for i in range(15))), "burst", "day"),
        {},
        InvalidRequest,
        "more than 16 rules, alternatives included",
    ),
    (FirstOf("burst", "flagged"), {}, InvalidRequest, "'flagged' never denies"),
    (FirstOf("off", "burst"), {}, InvalidRequest, r"'off' never denies \(enforce='off'\)"),
]


@pytest.mark.parametrize(("rule", "options", "kind", "words"), BAD, ids=[f"{rule!r:.30}-{options}" for rule, options, *_ in BAD])
async def test_a_bad_check_is_refused_before_any_io_and_consumes_nothing(
    rule: Any, options: Any, kind: type[Exception], words: str
) -> None:
    more = (RateThrottleRule("flagged", 5, 60, enforce="flag"), RateThrottleRule("off", 5, 60, enforce="off"))
    nowhere = create_limiter("redis", redis_url="redis://127.0.0.1:1/0", rules=[BURST, DAY, OTHER, *more], on_outage="raise")
    for core in (limiter(*more), nowhere):
        with pytest.raises(kind, match=words) as caught:
            core.check("key", rule, **options)
        assert type(caught.value) is kind
        with pytest.raises(kind):
            await core.check_many([Request("key", "day"), Request("key", rule, **options)])
        if "below" not in words:  # a peek may have a cost of 0
            with pytest.raises(kind, match=words):
                await core.peek("key", rule, **options)
        with pytest.raises(kind):
            await core.check_all([Request("other", "day"), Request("key", rule, **options)])
        if core is not nowhere:
            assert len(core._storage) == 0
        await core.aclose()
        with pytest.raises(LimiterClosed):
            core.check("key", rule, **options)


@pytest.mark.parametrize("key", ["", (), 5, None, ("a", 1.5), "\ud800", ("\ud800",), b"key"])
async def test_a_bad_key_is_refused(key: Any) -> None:
    core = limiter()
    for rule in (("burst", "day"), FirstOf("burst", "day"), {"burst": 1, "day": 2}):
        with pytest.raises(InvalidRequest, match="key"):
            core.check(key, rule)
    with pytest.raises(InvalidRequest, match="key"):
        await core.check_all([Request("key", "day"), Request(key, "burst")])
    assert len(core._storage) == 0


def test_first_of_is_a_value() -> None:
    assert FirstOf("a", "b") == FirstOf("a", "b") != FirstOf("b", "a")
    assert len({FirstOf("burst", BURST), FirstOf("burst", RateThrottleRule("burst", 3, 60, strategy="token_bucket"))}) == 1
    assert repr(FirstOf("a", BURST)) == "FirstOf('a', 'burst')"
    assert pickle.loads(pickle.dumps(FirstOf("a", BURST))) == FirstOf("a", BURST)
    with pytest.raises(AttributeError):
        FirstOf("a", "b").rules = ()  # type: ignore[misc]  # that it is refused is the test
    bad: list[tuple[tuple[Any, ...], str]] = [
        ((), "got 0 rules"),
        (("a",), "got 1 rules; it takes at least 2"),
        (("a", FirstOf("b", "c")), "FirstOf stands within FirstOf"),
        ((["a", "b"],), "got a list; it takes names of rules"),
        (("a", 5), "got a int"),
    ]
    for given_rules, words in bad:
        with pytest.raises(InvalidRequest, match=words):
            FirstOf(*given_rules)


# What is decided:


async def test_the_first_that_allows_pays_alone() -> None:
    core = limiter()
    paid = [await core.check("key", FirstOf("burst", "other")) for _ in range(9)]
    assert [decision.rule for decision in paid] == ["burst"] * 3 + ["other"] * 5 + ["burst"]
    assert [decision.allowed for decision in paid] == [True] * 8 + [False]
    assert not any(decision.parts for decision in paid)
    assert paid[-1].retry_after == 20.0, "the alternative that could be retried first"
    assert (await core.peek("key", "day")).remaining == 10
    decision = await core.check("new", ("day", FirstOf("burst", "other")))
    assert left(decision) == {"day": 9, "burst": 2}


async def test_several_keys_are_all_granted_or_none() -> None:
    core = limiter()
    both = [Request("user:7", "burst"), Request(("org", 3), "day", 5)]
    for _ in range(2):
        decision = await core.check_all(both)
        assert decision
    assert [(part.key, part.rule, part.cost, part.remaining) for part in decision.parts] == [
        ("user:7", "burst", 1, 1),
        (("org", 3), "day", 5, 0),
    ]
    denied = await core.check_all(both)
    assert (denied.allowed, denied.key, denied.rule) == (False, ("org", 3), "day")
    assert [(part.allowed, part.remaining) for part in denied.parts] == [(True, 1), (False, 0)]
    many = await core.check_all(
        [Request("a", ("burst", "day")), Request("b", {"burst": 2}), Request("c", FirstOf("burst", "day"))]
    )
    assert [(part.key, part.rule) for part in many.parts] == [("a", "burst"), ("a", "day"), ("b", "burst"), ("c", "burst")]
    assert (await core.check_all([Request("d", "burst")])).parts == ()
    only = RateThrottleCore(rules=[BURST])
    assert len((await only.check_all(["a", ("b", 1)])).parts) == 2


@pytest.mark.parametrize(
    ("requests", "words"),
    [
        ([], "got no checks"),
        ("key", "takes an iterable of keys or Requests"),
        (Request("key", "day"), "takes an iterable of keys or Requests"),
        (5, "takes an iterable"),
        (["key"], "several rules"),
        ([Request("key", "day"), Request("key", "day")], "one key twice under one rule"),
        ([Request("key", "day"), Request("key", ("burst", "day"))], "one key twice under one rule"),
        ([Request(("a",), "day"), Request(("a",), FirstOf("burst", "day"))], "one key twice under one rule"),
        ([Request(f"key:{i}", "day") for i in range(17)], "more than 16"),
        ([Request(f"key:{i}", ("burst", "day")) for i in range(9)], "more than 16"),
        ([Request("key", "day", 11)], "capacity of 10"),
        ([Request("a", "burst", 3), Request("key", {"day": 1}, 2)], "beside a mapping"),
    ],
)
async def test_bad_checks_of_several_keys_are_refused(requests: Any, words: str) -> None:
    core = limiter()
    with pytest.raises(InvalidRequest, match=words):
        await core.check_all(requests)
    assert len(core._storage) == 0
    await core.aclose()
    with pytest.raises(LimiterClosed):
        await core.check_all(requests)


async def test_checks_of_several_rules_stand_among_others_in_check_many() -> None:
    core = limiter(CLOSED)
    decisions = await core.check_many(
        [
            Request("key", ("burst", "day")),
            Request("key", "burst"),
            Request("key", ("burst", "closed")),
            Request("key", {"burst": 2, "day": 1}),
            Request("key", FirstOf("closed", "burst")),
            Request("key", "closed"),
            Request("key", BURST),
        ]
    )
    assert [decision.allowed for decision in decisions] == [True, True, False, False, True, False, False]
    assert [decision.rule for decision in decisions] == ["burst", "burst", "closed", "burst", "burst", "closed", "burst"]
    assert (await core.peek("key", "day")).remaining == 9


async def test_peek_consumes_nothing_and_a_cost_of_0_only_asks() -> None:
    core = limiter()
    await core.check("key", {"burst": 3, "day": 4})
    for _ in range(3):
        decision = await core.peek("key", ("burst", "day"))
        assert (decision.allowed, decision.rule, left(decision)) == (False, "burst", {"burst": 0, "day": 6})
        assert [(part.allowed, part.cost) for part in decision.parts] == [(False, 1), (True, 1)]
        asked = await core.peek("key", ("burst", "day"), cost=0)
        assert (asked.allowed, asked.rule, left(asked), asked.retry_after) == (True, "burst", {"burst": 0, "day": 6}, 0.0)
        assert [(part.allowed, part.cost, part.retry_after) for part in asked.parts] == [(True, 0, 0.0)] * 2
        first = await core.peek("key", FirstOf("burst", "day"), cost=0)
        assert (first.allowed, first.rule, first.cost, first.remaining) == (True, "day", 0, 6)
    assert (await core.peek("key", {"day": 6, "other": 1})).allowed
    assert len(core._storage) == 2
    assert not counted(core, "burst").denied, "peeks aren't counted"


async def test_reset_forgets_what_was_used_under_each_rule() -> None:
    core = limiter()
    await core.check("key", {"burst": 3, "day": 4, "other": 2})
    await core.reset("key", ("burst", "day"))
    assert left(await core.peek("key", ("burst", "day", "other"))) == {"burst": 3, "day": 10, "other": 3}
    await core.check("key", FirstOf("burst", "day"))
    await core.reset("key", FirstOf("day", "burst"))
    await core.reset("key", BURST)
    assert left(await core.peek("key", ("burst", "day", "other"))) == {"burst": 3, "day": 10, "other": 3}
    with pytest.raises(InvalidRequest, match="named twice"):
        await core.reset("key", ("other", "other"))
    with pytest.raises(InvalidRequest, match="empty"):
        await core.reset("", ("other", "day"))
    await core.aclose()
    with pytest.raises(LimiterClosed):
        await core.reset("key", ("other", "day"))


async def test_a_limit_of_0_denies_all_and_takes_no_place_of_an_alternative() -> None:
    core = limiter(CLOSED)
    denied = await core.check("key", ("burst", "closed", "day"))
    assert (denied.allowed, denied.rule, denied.limit, denied.retry_after) == (False, "closed", 0, math.inf)
    assert [(part.rule, part.allowed, part.remaining) for part in denied.parts] == [
        ("burst", True, 3),
        ("closed", False, 0),
        ("day", True, 10),
    ]
    for check in (core.check, core.peek):
        assert (await check("key", ("day", FirstOf("closed", "burst")))).allowed
    assert not (await core.check("key", FirstOf("closed", RateThrottleRule("none", 0, 1)))).allowed
    assert not await core.check_all([Request("a", "day"), Request("b", "closed")])
    assert (await core.peek("key", ("burst", "closed"), cost=0)).allowed
    assert left(await core.peek("key", ("burst", "day"))) == {"burst": 2, "day": 9}
    assert "Retry-After" not in denied.headers()


async def test_a_rule_that_flags_never_vetoes_and_one_that_is_off_counts_nothing() -> None:
    flagged, off = RateThrottleRule("flagged", 2, 60, enforce="flag"), RateThrottleRule("off", 2, 60, enforce="off")
    core = limiter(flagged, off)
    for remaining in (2, 1, 0):
        decision = await core.check("key", ("flagged", "burst", "off"))
        assert decision
        assert [part.rule for part in decision.parts] == ["flagged", "burst", "off"]
        assert left(decision) == {"flagged": max(0, remaining - 1), "burst": remaining, "off": 2}
    assert [(part.allowed, part.over) for part in decision.parts] == [(True, True), (True, False), (True, False)]
    assert (decision.rule, decision.allowed, decision.over) == ("flagged", True, True), "it has the least share left"
    denied = await core.check("key", ("off", "flagged", "burst"))
    assert (denied.allowed, denied.rule, denied.over) == (False, "burst", False)
    assert [(part.allowed, part.over) for part in denied.parts] == [(True, False), (True, True), (False, False)]
    assert (await core.check("key", ("off", "flagged"))).over
    assert (await core.check_many([Request("key", ("off", "flagged"))]))[0].allowed
    only_off = await core.check("key", ("off", RateThrottleRule("also", 1, 1, enforce="off")))
    assert (only_off.allowed, len(only_off.parts)) == (True, 2)
    assert (await core.check_many([Request("key", ("off", RateThrottleRule("also", 1, 1, enforce="off")))]))[0].allowed
    assert counted(core, "burst") == Outcomes(3, 1)
    assert counted(core, "flagged") == Outcomes(2, 3)
    assert counted(core, "off").denied == 0
    assert len(core._storage) == 2, "nothing is held of what isn't counted"
    none = limiter(RateThrottleRule("none", 0, 60, enforce="flag"))
    decision = await none.check("key", ("burst", "none"))
    assert [(part.allowed, part.over) for part in decision.parts] == [(True, False), (True, True)]


async def test_statistics_count_each_that_paid_or_each_that_denied() -> None:
    core = limiter()
    for _ in range(5):
        await core.check("key", ("burst", "day"))
    for _ in range(4):
        await core.check("other", FirstOf("burst", "other"))
    await core.check_many([Request("key", ("burst", "day")), Request("third", ("burst", "day"))])
    assert counted(core, "burst") == Outcomes(3 + 3 + 1, 2 + 1)
    assert counted(core, "day") == Outcomes(3 + 1, 0)
    assert counted(core, "other") == Outcomes(1, 0)


@pytest.mark.parametrize("on_full", ["evict", "deny"])
async def test_a_full_table_grants_all_or_nothing(on_full: Any) -> None:
    now = [START_US]
    core = limiter(max_keys=3, on_full=on_full, now=now)
    assert await core.check("a", ("burst", "day"))
    decision = await core.check("b", ("burst", "day"))
    assert decision.allowed == (on_full == "evict")
    assert len(core._storage) == (3 if on_full == "evict" else 2)
    if on_full == "deny":
        denied = [part for part in decision.parts if not part.allowed]
        assert [part.remaining for part in denied] == [0]
        assert decision.retry_after_us == denied[0].retry_after_us > 0
        assert await core.check("b", "burst"), "there is room for one"
        assert await core.check("a", ("burst", "day")), "these are there"
        assert (await core.check("c", FirstOf("other", "day"))).allowed is False
        assert (await core.check("a", FirstOf("other", "day"))).rule == "day", "the first has no room, the second is there"
        now[0] += 86_400 * 10**6 + 1
        assert await core.check("b", ("burst", "day", "other")), "what is fresh makes room"


# What a decision says:


async def test_a_joint_decision_is_a_value_like_any_other() -> None:
    core = limiter()
    for _ in range(4):
        decision = await core.check(("user", 42), ("day", "burst"))
    assert isinstance(decision, Decision)
    same = pickle.loads(pickle.dumps(decision))
    assert same == decision
    assert hash(same) == hash(decision)
    assert (same.parts, same.headers(), same.atomic, repr(same)) == (
        decision.parts,
        decision.headers(),
        True,
        repr(decision),
    )
    assert decision.parts is decision.parts
    assert decision != decision.parts[1]
    assert decision.parts[1] != decision
    assert decision.parts[1].parts == ()
    assert repr(decision).endswith(" source='memory' parts=2>")
    assert "42" not in repr(decision)
    assert decision.headers() == {
        "RateLimit-Policy": '"burst";q=3;w=60, "day";q=10;w=86400',
        "RateLimit": '"burst";r=0;t=20, "day";r=7;t=86400',
        "Retry-After": "20",
    }
    with pytest.raises(TypeError, match="made by a limiter"):
        type(decision)()


async def test_no_decision_is_work_for_the_collector() -> None:
    core = limiter()
    kept = [await core.check("key", named) for named in ("burst", ("burst", "day"), ("day",))]
    assert [len(decision.parts) for decision in kept] == [0, 2, 0]
    assert not any(map(gc.is_tracked, kept))


async def test_headers_name_a_rule_once_however_many_keys_it_limits() -> None:
    core = limiter()
    decision = await core.check_all([Request("a", "day", 2), Request("b", "day", 5), Request("a", "burst")])
    assert decision.headers()["RateLimit"] == '"day";r=5;t=86400, "burst";r=2;t=20'
    assert "Retry-After" not in decision.headers()


async def test_allowed_it_reports_the_least_share_left_and_denied_the_longest_wait() -> None:
    core = limiter()
    assert (await core.check("key", ("day", "burst"))).rule == "burst"  # 9/10 and 2/3
    assert (await core.check("key", {"day": 7, "burst": 1})).rule == "day"  # 2/10 and 1/3
    assert (await core.check("equal", {"other": 1, "day": 2})).rule == "other"  # 4/5 and 8/10: the first
    denied = await core.check("key", {"day": 3, "burst": 2, "other": 1})
    assert [part.allowed for part in denied.parts] == [False, False, True]
    assert (denied.rule, denied.retry_after_us) == ("day", denied.parts[0].retry_after_us)


async def test_decisions_that_are_kept_stay_as_they_were() -> None:
    core = limiter(RateThrottleRule("many", 1_000, 60), RateThrottleRule("more", 2_000, 60))
    kept = []
    for i in range(300):
        kept.append(await core.check(f"key:{i % 7}", ("many", "more") if i % 2 else ("more", "many", "day")[:2]))
        await core.check("nobody keeps it", {"many": 1, "more": 2})
    assert [decision.key for decision in kept] == [f"key:{i % 7}" for i in range(300)]
    for i, decision in enumerate(kept):
        assert left(decision) == {"many": 999 - i // 7, "more": 1_999 - i // 7}
    waiting = [core.check("other", ("many", "more")) for _ in range(50)]
    assert [left(await one)["many"] for one in waiting] == [999 - i for i in range(50)]
    assert len({id(decision) for decision in kept}) == 300


async def test_a_key_whose_end_runs_a_check_spoils_no_decision() -> None:
    core = limiter(RateThrottleRule("many", 10_000, 60), RateThrottleRule("more", 20_000, 60))
    heard: list[Decision] = []

    class Key(str):
        __slots__ = ()

        def __del__(self) -> None:
            pending = core.check("from the end of a key", ("many", "more"))
            with pytest.raises(StopIteration) as stopped:
                pending.send(None)
            heard.append(stopped.value.value)

    kept = [await core.check(Key(f"key:{i}"), ("many", "more")) for i in range(20)]
    for i in range(20):
        decision = await core.check(Key(f"gone:{i}"), ("many", "more"))
        assert (decision.key, left(decision)["many"]) == (f"gone:{i}", 9_999)
    assert [decision.key for decision in kept] == [f"key:{i}" for i in range(20)]
    del decision, kept
    assert heard
    assert [left(decision)["more"] for decision in heard] == [19_999 - i for i in range(len(heard))]


async def test_a_key_whose_end_checks_more_limits_than_before_spoils_no_decision() -> None:
    names = ("a", "b", "c")
    core = limiter(*(RateThrottleRule(name, 10_000, 60) for name in names))
    heard: list[Decision] = []

    class Key(str):
        __slots__ = ()

        def __del__(self) -> None:
            with pytest.raises(StopIteration) as stopped:
                core.check("from the end of a key", names).send(None)
            heard.append(stopped.value.value)

    await core.check(Key("gone"), names[:2])  # now only the limiter holds it, until a decision on three has to be made
    decision = await core.check("key", names)
    assert [(one.key, len(one.parts)) for one in heard] == [("from the end of a key", 3)]
    assert (decision.key, left(decision)["a"]) == ("key", 9_999)


# Rules of the caller's own:


async def test_a_rule_of_the_callers_own_is_added_nowhere_and_counts_under_its_name() -> None:
    core = limiter()
    plan = RateThrottleRule("plan", 2, 60)
    assert [bool(await core.check("key", plan)) for _ in range(3)] == [True, True, False]
    assert "plan" not in core.rules
    equal = RateThrottleRule("plan", 2, 60)
    assert not await core.check("key", equal)
    assert await core.check("key", RateThrottleRule("plan", 3, 60)), (
        "another limit of the same name: what was used is carried over"
    )
    assert (await core.check("key", (plan, "day"))).rule == "plan"
    assert counted(core, "plan") == Outcomes(3, 3)
    with pytest.raises(InvalidRequest, match="no such rule; it has burst"):
        core.check("key", "plan")
    core.add_rule(RateThrottleRule("plan", 5, 60))
    assert (await core.check("key", "plan")).remaining == 1
    assert counted(core, "plan") == Outcomes(4, 3), "it goes on counting there"
    assert (await core.check("key", RateThrottleRule("plan", 5, 60))).remaining == 0
    core.remove_rule("plan")
    assert not await core.check("key", plan)
    assert counted(core, "plan") == Outcomes(5, 4)
    with pytest.raises(CostExceedsLimit, match="capacity of 2"):
        core.check("key", plan, cost=3)


async def test_a_rule_that_was_added_is_the_same_as_its_equal_of_the_callers_own() -> None:
    core = limiter()
    await core.check("key", RateThrottleRule("burst", 3, 60, strategy="token_bucket"), cost=2)
    assert (await core.check("key", "burst")).remaining == 0
    assert counted(core, "burst") == Outcomes(2, 0)
    assert set(core.statistics().decisions) == {"burst", "day", "other"}


async def test_one_rule_object_in_two_limiters_counts_in_each() -> None:
    plan, cores = RateThrottleRule("plan", 2, 60), [limiter(), limiter(RateThrottleRule("plan", 9, 60)), limiter()]
    for i, core in enumerate(cores):
        for _ in range(i + 1):
            await core.check("key", plan)
            await core.check("key", (plan, "day"))
    cores[2].add_rule(plan)
    assert [counted(core, "plan") for core in cores] == [Outcomes(2, 0), Outcomes(2, 2), Outcomes(2, 4)]


async def test_what_was_named_is_remembered_within_bounds() -> None:
    core = limiter()
    for i in range(3_000):
        assert await core.check(f"key:{i}", (RateThrottleRule(f"own:{i}".replace(":", "."), 5, 60), "day"))
        assert await core.check(f"key:{i}", RateThrottleRule("plan", 5, 60 + i))
    assert len(core._by_several.known) <= 1024
    assert len(core.statistics().decisions) <= 1024 + 4
    assert counted(core, "day").allowed == 3_000
    assert counted(core, "plan").allowed <= 3_000


async def test_a_rule_that_counts_nothing_is_forgotten_with_all_that_was_named() -> None:
    core, off = limiter(), RateThrottleRule("soft", 5, 60, enforce="off")
    assert [decision.allowed for decision in await core.check_many([Request("key", off), Request("key", "burst")])] == [
        True,
        True,
    ]
    assert core._by_several.uncounted
    core.add_rule(CLOSED)
    core.remove_rule("closed")
    assert not core._by_several.uncounted
    for named in (off, ("burst", off), FirstOf("day", CLOSED)):
        await core.check_many([Request("key", named)])
        assert core._by_several.uncounted
        core.add_rule(RateThrottleRule("more", 5, 60))
        core.remove_rule("more")


async def test_check_many_asks_no_store_about_rules_that_count_nothing_though_all_is_forgotten_meanwhile() -> None:
    core, off = limiter(), RateThrottleRule("soft", 5, 60, enforce="off")
    requests = [Request("key", off), *(Request("key", RateThrottleRule("plan", 5, 60 + i)) for i in range(1_100))]
    decisions = await core.check_many(requests)
    assert not core._by_several.uncounted, "it has been forgotten"
    assert (decisions[0].allowed, decisions[0].remaining) == (True, 5)
    assert len(core._storage) == 1, "only the other rule has counted"


async def test_rules_that_change_are_felt_at_once() -> None:
    core, both = limiter(), ("burst", "day")
    assert left(await core.check("key", both)) == {"burst": 2, "day": 9}
    core.add_rule(RateThrottleRule("burst", 9, 60, strategy="token_bucket"), replace=True)
    assert left(await core.check("key", both)) == {"burst": 7, "day": 8}
    core.remove_rule("day")
    with pytest.raises(InvalidRequest, match="no such rule"):
        core.check("key", both)
    core.add_rule(RateThrottleRule("day", 0, 60))
    assert (await core.check("key", both)).rule == "day"
    core.add_rule(DAY, replace=True)
    assert left(await core.check("key", both)) == {"burst": 6, "day": 7}
    with pytest.raises(ConfigurationError, match="takes a RateThrottleRule"):
        core.add_rule(both)  # type: ignore[arg-type]  # that it is refused is the test


async def test_a_list_or_a_mapping_that_changes_means_what_it_holds_now() -> None:
    core = limiter()
    named, costs = ["burst", "day"], {"burst": 1, "day": 1}
    assert set(left(await core.check("key", named))) == {"burst", "day"}
    named.append("other")
    costs["day"] = 4
    assert set(left(await core.check("key", named))) == {"burst", "day", "other"}
    assert left(await core.check("key", costs)) == {"burst": 0, "day": 4}


class Units:
    """A whole number of another type, as numpy has them."""

    def __init__(self, units: int) -> None:
        self.units = units

    def __index__(self) -> int:
        return self.units


async def test_beside_a_mapping_a_cost_of_1_is_left_out_whatever_its_type() -> None:
    core, one, two = limiter(), cast(int, Units(1)), cast(int, Units(2))
    requests = [Request("key", {"burst": 1, "day": 2}, one)]
    assert await core.check("key", {"burst": 1, "day": 2}, cost=one)  # type: ignore[call-overload]
    assert await core.check_many(requests)
    assert await core.check_all(requests)
    assert (await core.charge("key", {"day": 2}, cost=one)).remaining == 2  # type: ignore[call-overload]
    for wrong in (two, True, 1.0, "1"):
        with pytest.raises(InvalidRequest, match="beside a mapping"):
            core.check("key", {"burst": 1, "day": 2}, cost=wrong)  # type: ignore[call-overload]
        with pytest.raises(InvalidRequest, match="beside a mapping"):
            await core.charge("key", {"day": 2}, cost=wrong)  # type: ignore[call-overload]


async def test_a_clock_that_asks_another_limiter_in_the_middle_of_a_check_spoils_nothing() -> None:
    other: list[RateThrottleCore] = []

    def clock_us() -> int:
        if other:
            other.pop().check("key", ("burst", "day")).close()
            core.check("inner", ("day", "burst")).close()
        return START_US

    core = RateThrottleCore(InMemoryStorage(clock_us=clock_us), rules=[BURST, replace(DAY, limit=1_000)])
    for number in range(50):
        other.append(limiter())
        decision = await core.check(f"key:{number}", ("burst", "day"))
        assert (decision.key, left(decision)) == (f"key:{number}", {"burst": 2, "day": 999})
    assert (await core.peek("inner", "day")).remaining == 997


# Around the call:


def test_everything_in_memory_works_under_trio() -> None:
    async def main() -> list[bool]:
        core = limiter()
        assert await core.check_all([Request("a", "burst"), Request("b", "day")])
        assert await core.peek("key", ("burst", "day"))
        await core.reset("key", ("burst", "day"))
        return [bool(await core.check("key", ("burst", "day"))) for _ in range(300)]

    assert sum(trio.run(main)) == 3


async def test_everything_that_takes_a_coroutine_takes_a_joint_check() -> None:
    core, both = limiter(), ("day", "other")
    assert await asyncio.create_task(core.check("key", both))
    assert all(await asyncio.gather(core.check("key", rule=both), core.check("key", both, cost=2)))
    assert await asyncio.wait_for(core.check("key", {"day": 1}), 1)
    with pytest.raises(TypeError, match="await it"):
        bool(core.check("key", both))
    with pytest.warns(RuntimeWarning, match="never awaited"):
        core.check("key", both)


async def turns_of_others(spin: Callable[[], Any]) -> int:
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    task = asyncio.create_task(other())
    for _ in range(1_280):
        await spin()
    task.cancel()
    return turns


async def test_a_task_that_spins_on_joint_checks_lets_others_run() -> None:
    core = limiter()
    assert await turns_of_others(lambda: core.check("key", ("burst", "day"))) >= 9
    assert await turns_of_others(lambda: core.peek("key", ("burst", "day"))) >= 9
