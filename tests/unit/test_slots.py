"""Slots: who holds how many, who is next, and what is left behind. In memory, on a clock that jumps."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pickle
import random
import signal
import threading
from collections.abc import Coroutine
from typing import Any
from unittest.mock import patch

import pytest
import trio
import trio.testing

from ratethrottle import (
    ConcurrencyRule,
    ConfigurationError,
    CostExceedsLimit,
    Decision,
    FirstOf,
    InMemoryStorage,
    InvalidRequest,
    LimiterClosed,
    Outcomes,
    RateLimitExceeded,
    RateThrottleCore,
    RateThrottleRule,
    StorageTimeout,
    events,
)
from ratethrottle._engine.decision import Entry
from ratethrottle._engine.held import held_entry
from ratethrottle._holding import Ask, Held, Holder
from ratethrottle.storage import held
from ratethrottle.storage.held import PATIENCE_S, HeldSlots
from ratethrottle.testing import ManualClock
from ratethrottle.waiting import slots
from ratethrottle.waiting.holders import RETRY_LEAST_S, Claim, SlotLine
from ratethrottle.waiting.slots import Slot
from tests.kit import slots as oracles
from tests.kit.counted import counted
from tests.kit.slots import SlotsOracle
from tests.kit.timeless import run, settled, timeless

RULE = ConcurrencyRule("exports", 3)
ONE = ConcurrencyRule("exports", 1)


def limiter(*rules: RateThrottleRule | ConcurrencyRule) -> RateThrottleCore:
    return RateThrottleCore(InMemoryStorage(clock_us=timeless().time_us), rules=rules)


def left_behind(core: RateThrottleCore) -> list[object]:
    """What slots hold: nothing, once nobody has one or waits for one."""
    return [len(core._lines), len(core._lines._loops), len(core._storage.slots), timeless().timers()]


NOTHING = [0, 0, 0, 0]


def start(waits: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
    return asyncio.get_running_loop().create_task(waits)


async def hold(slot: Slot, until: asyncio.Event | None = None) -> Decision:
    """Hold a slot until something happens; for ever without."""
    async with slot:
        await (until or asyncio.Event()).wait()
        return slot.decision


class Counting(InMemoryStorage):
    """Keeps what it is asked."""

    def __init__(self) -> None:
        super().__init__(clock_us=timeless().time_us)
        self.asked: list[Ask] = []

    def hold(self, holder: Holder, rule: ConcurrencyRule, ask: Ask) -> Held:
        self.asked.append(ask)
        return super().hold(holder, rule, ask)


# What a rule may be


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("", 1), "the name of a rule is letters"),
        (("a b", 1), "the name of a rule is letters"),
        (("a" * 129, 1), "at most 128 characters"),
        (("a", -1), "it is from 1 to 1,000,000,000 units, or 0 to deny everything"),
        (("a", 10**9 + 1), "it is from 1 to"),
        (("a", True), "whole number"),
        (("a", 1.5), "whole number"),
        (("a", None), "leave the rule out"),
        (("a", 1, 0.5), r"ttl is 0.5; it is seconds \(int or float\), 1 to 86,400"),
        (("a", 1, 86_401), "ttl is"),
        (("a", 1, float("nan")), "ttl is nan"),
        (("a", 1, True), "ttl is True"),
        (("a", 1, "30"), "ttl is '30'"),
    ],
)
def test_a_rule_that_cannot_be_is_refused(arguments: tuple[Any, ...], says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        ConcurrencyRule(*arguments)


def test_a_rule_is_a_value() -> None:
    rule = ConcurrencyRule("a", 3, 1.5, on_outage="deny")
    assert (rule.ttl_us, rule.compiled.on_outage) == (1_500_000, "deny")
    assert pickle.loads(pickle.dumps(rule)) == rule
    assert (
        len({rule, ConcurrencyRule("a", 3, 1.5, on_outage="deny"), ConcurrencyRule("a", 3, 1.5), ConcurrencyRule("a", 3, 2)}) == 3
    )
    assert repr(ConcurrencyRule("a", 3)) == "ConcurrencyRule(name='a', limit=3, ttl=30, on_outage=None)"
    with pytest.raises(ConfigurationError, match="on_outage is 'no'; it is local, allow, deny, raise, or None"):
        ConcurrencyRule("a", 3, on_outage="no")  # type: ignore[arg-type]
    with pytest.raises(AttributeError):
        rule.limit = 4  # type: ignore[misc]


def test_a_limiter_has_one_rule_of_a_name() -> None:
    core = RateThrottleCore(rules=[RULE])
    core.add_rule(ConcurrencyRule("exports", 3, 30.0))
    assert dict(core.rules) == {"exports": RULE}
    for other in (ONE, RateThrottleRule("exports", 1, 1)):
        with pytest.raises(ConfigurationError, match="another rule 'exports'"):
            core.add_rule(other)
    core.add_rule(RateThrottleRule("exports", 1, 1), replace=True)
    with pytest.raises(InvalidRequest, match="rule 'exports' counts what is used in a time; slots take a ConcurrencyRule"):
        core.slot("key", "exports")
    core.add_rule(ONE, replace=True)
    with pytest.raises(InvalidRequest, match=r"use limiter\.slot"):
        core.check("key", "exports")
    core.remove_rule("exports")
    assert not core.rules
    with pytest.raises(InvalidRequest, match=r"no concurrency rule yet; add one with add_rule\(ConcurrencyRule"):
        core.slot("key")
    with pytest.raises(ConfigurationError, match="add_rule takes a RateThrottleRule or a ConcurrencyRule, not a str"):
        core.add_rule("exports")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="it is an iterable of rules"):
        RateThrottleCore(rules=RULE)  # type: ignore[arg-type]


# What is refused before anything is asked


def test_bad_calls_are_refused_at_once() -> None:
    core = RateThrottleCore(rules=[RULE, RateThrottleRule("api", 1, 1)])
    assert core.slot("key").__class__ is Slot  # the only one of its kind
    core.add_rule(ConcurrencyRule("imports", 2))
    calls: list[tuple[dict[str, Any], str]] = [
        ({"key": ""}, "the key is empty"),
        ({"key": 7}, "the key is a int"),
        ({"key": ("a", 1.5)}, "a part of the key is a float"),
        ({"rule": None}, r"several concurrency rules; name one \(rule=...\): exports, imports"),
        ({"rule": "other"}, "no such concurrency rule; it has exports, imports"),
        ({"rule": 7}, r"rule is a int; slots take the name \(str\) of a ConcurrencyRule, or one"),
        ({"rule": RateThrottleRule("a", 1, 1)}, "rule is a RateThrottleRule; slots take"),
        ({"rule": "api"}, "rule 'api' counts what is used in a time"),
        ({"cost": 0}, "the cost is below 1"),
        ({"cost": True}, "the cost is True"),
        ({"cost": 1.0}, "the cost is a float"),
        ({"cost": 4}, "rule 'exports' has a capacity of 3"),
        ({"timeout": -1}, "timeout is -1"),
        ({"timeout": float("nan")}, "timeout is nan"),
        ({"timeout": "1"}, "timeout is a str"),
    ]
    for given, says in calls:
        with pytest.raises(InvalidRequest, match=says):
            core.slot(**{"key": "key", "rule": "exports", **given})
    with pytest.raises(CostExceedsLimit):
        core.slot("key", "exports", cost=4)
    with pytest.raises(TypeError, match=r"write `async with limiter.slot\(...\):` in the function \(limiter.limit decorates"):
        core.slot("key", "exports")(main_of_nothing)
    assert len(core._storage.slots) == 0


async def main_of_nothing() -> None:
    """What somebody decorates with a slot."""


def test_checks_by_such_a_rule_say_what_to_call() -> None:
    async def main() -> None:
        core = limiter(RULE)
        says = r"rule 'exports' is a ConcurrencyRule, whose slots are held.*use limiter.slot\(key, 'exports'\)"
        for named in ("exports", RULE, None, ("exports",), (RULE,), {"exports": 1}):
            with pytest.raises(InvalidRequest, match=says):
                core.check("key", named)
            for method in (core.check, core.acquire, core.peek, core.charge):
                with pytest.raises(InvalidRequest, match=says):
                    await method("key", named)
        with pytest.raises(InvalidRequest, match=says):
            await core.check_many([("key")])
        async with contextlib.AsyncExitStack() as stack:
            for guard in (core.limit("key", "exports"), core.reserve("key", "exports")):
                with pytest.raises(InvalidRequest, match=says):
                    await stack.enter_async_context(guard)
        with pytest.raises(InvalidRequest):
            FirstOf("a", RULE)  # type: ignore[arg-type]
        core.add_rule(RateThrottleRule("api", 1, 1))
        assert (await core.check("key")).rule == "api"  # the only one that checks can be by
        async with core.slot("key") as slot:
            assert slot.decision.rule == "exports"
        with pytest.raises(InvalidRequest, match=says):
            core.check("key", ("api", "exports"))
        with pytest.raises(InvalidRequest, match="the limiter has no such rule"):
            core.check("key", "other")

    run(main)


def test_a_storage_of_ones_own_need_not_have_slots() -> None:
    class Old:
        """A storage without slots."""

        def __getattr__(self, name: str) -> Any:
            if name in ("hold", "forget_slots"):
                raise AttributeError(name)
            return getattr(real, name)

    real = InMemoryStorage()
    core = RateThrottleCore(Old(), rules=[RULE])
    with pytest.raises(ConfigurationError, match="Old has no slots"):
        core.slot("key")


# Holding


def test_a_slot_is_held_as_long_as_its_block_runs() -> None:
    async def main() -> None:
        core = limiter(RULE)
        async with core.slot("key") as first, core.slot("key", cost=2) as second:
            assert (first.decision.remaining, second.decision.remaining) == (2, 0)
            with pytest.raises(RateLimitExceeded):
                async with core.slot("key"):
                    pytest.fail("it isn't free")
            async with core.slot("other"), core.slot(("key",)):
                pass
        assert left_behind(core) == NOTHING
        with contextlib.suppress(ZeroDivisionError):
            async with core.slot("key", cost=3):
                raise ZeroDivisionError
        assert left_behind(core) == NOTHING

    run(main)


def test_statistics_count_what_is_held() -> None:
    async def main() -> None:
        core = limiter(RULE)
        async with core.slot("key", cost=2), core.slot("other"):
            assert core.statistics().slots == 3
        assert core.statistics().slots == 0

    run(main)


def test_statistics_count_decisions_on_slots_as_those_of_checks() -> None:
    async def main() -> None:
        core = limiter(ONE, PER_MINUTE)
        ready = core.slot("other")
        async with core.slot("key", "exports"):
            for rule in ("exports", ("exports", "per_minute"), RULE):  # the last one is of the caller's own, and grants it
                with contextlib.suppress(RateLimitExceeded):
                    await core.slot("key", rule).__aenter__()
            late = start(core.slot("key", timeout=1).__aenter__())
            given_up = start(core.slot("key", timeout=None).__aenter__())
            await settled()
            given_up.cancel()
            await asyncio.wait([late])
            assert isinstance(late.exception(), RateLimitExceeded)
        async with core.slot("other", ("exports", "per_minute"), timeout=1):
            pass
        assert counted(core) == {"exports": {"memory": Outcomes(3, 3)}, "per_minute": {"memory": Outcomes(1, 0)}}
        decisions = core.statistics().decisions
        assert decisions["exports"].keys() == decisions["per_minute"].keys()
        another = RateThrottleCore(InMemoryStorage(clock_us=timeless().time_us), rules=[ONE])
        assert counted(another) == {}
        core.add_rule(RULE, replace=True)
        assert counted(core)["exports"] == {"memory": Outcomes(3, 3)}
        async with ready:
            assert counted(core)["exports"] == {"memory": Outcomes(4, 3)}
        core.remove_rule("exports")
        assert "exports" not in core.statistics().decisions
        core.add_rule(ConcurrencyRule("exports", 0))
        with pytest.raises(RateLimitExceeded):
            await core.slot("key").__aenter__()
        assert counted(core)["exports"] == {"memory": Outcomes(0, 1)}

    run(main)


def test_a_decision_says_what_is_left_and_knows_no_time() -> None:
    async def main() -> None:
        core = limiter(RULE)
        async with core.slot("key") as slot:
            granted = slot.decision
            assert bool(granted)
            assert (granted.rule, granted.key, granted.cost, granted.limit, granted.remaining) == ("exports", "key", 1, 3, 2)
            assert (granted.retry_after, granted.reset_after, granted.retry_after_exact, granted.source) == (0, 0, True, "memory")
            assert granted.headers() == {
                "RateLimit-Policy": '"exports";q=3;qu="concurrent-requests"',
                "RateLimit": '"exports";r=2',
            }
            with pytest.raises(RateLimitExceeded) as raised:
                await core.slot("key", cost=3).__aenter__()
            denied = raised.value.decision
            assert not denied
            assert (denied.rule, denied.cost, denied.limit, denied.remaining) == ("exports", 3, 3, 2)
            assert (denied.retry_after, denied.retry_after_exact, denied.over) == (0, False, False)
            assert str(raised.value) == (
                "rule 'exports' denied a cost of 3 with 2 of 3 left; nobody knows when a slot is given back: retry later, or wait for "
                "it with a timeout"
            )
            assert repr(denied) == "<SlotDecision denied rule='exports' cost=3 remaining=2 limit=3 source='memory'>"
            for decision in (granted, denied):
                again = pickle.loads(pickle.dumps(decision))
                assert (again, hash(again), repr(again)) == (decision, hash(decision), repr(decision))
                assert again.retry_after_exact == decision.retry_after_exact

    run(main)


def test_a_limit_of_0_denies_everything() -> None:
    async def main() -> None:
        core = limiter(ConcurrencyRule("exports", 0))
        with pytest.raises(RateLimitExceeded, match="it can never be allowed") as raised:
            async with core.slot("key", cost=5, timeout=None):
                pytest.fail("it is denied")
        assert (raised.value.decision.limit, raised.value.decision.retry_after) == (0, float("inf"))

    run(main)


def test_a_slot_is_entered_once_and_given_back_once() -> None:
    async def main() -> None:
        core = limiter(RULE)
        slot = core.slot("key", cost=2)
        assert repr(slot) == "<Slot rule='exports' cost=2 not held yet>"
        for early in (lambda: slot.decision, lambda: slot.lost):
            with pytest.raises(InvalidRequest, match="isn't held yet"):
                early()
        with pytest.raises(InvalidRequest, match="isn't held yet"):
            await slot.release()
        async with slot as entered:
            assert entered is slot
            assert repr(slot) == "<Slot rule='exports' cost=2 held>"
            with pytest.raises(InvalidRequest, match="a slot is entered once"):
                async with slot:
                    pytest.fail("it is entered")
            await slot.release()
            assert repr(slot) == "<Slot rule='exports' cost=2 given back>"
            assert left_behind(core) == NOTHING
            with pytest.raises(InvalidRequest, match="given back already; release it once"):
                await slot.release()
            assert not slot.lost.is_set()
            async with core.slot("key", cost=3) as other:
                assert other.decision.remaining == 0
        with pytest.raises(InvalidRequest, match="a slot is entered once"):
            await slot.__aenter__()
        assert left_behind(core) == NOTHING

    run(main)


async def test_a_slot_is_given_back_in_its_own_loop() -> None:
    core = RateThrottleCore(rules=[RULE])
    async with core.slot("key") as slot:
        with pytest.raises(InvalidRequest, match="taken in another event loop"):
            await asyncio.to_thread(asyncio.run, slot.release())
        assert len(core._storage.slots) == 1
    assert len(core._storage.slots) == 0


def test_rules_of_the_callers_own_share_the_slots_of_their_name() -> None:
    async def main() -> None:
        core = limiter()
        async with core.slot("key", ConcurrencyRule("exports", 2, 60)), core.slot("key", ConcurrencyRule("exports", 2)):
            for rule in (ConcurrencyRule("exports", 2, 60), ConcurrencyRule("exports", 2), ONE):
                with pytest.raises(RateLimitExceeded):
                    await core.slot("key", rule).__aenter__()
            async with core.slot("key", ConcurrencyRule("exports", 3)), core.slot("key", ConcurrencyRule("other", 1)):
                pass
        assert left_behind(core) == NOTHING

    run(main)


def test_tasks_that_never_wait_let_others_run() -> None:
    async def main() -> None:
        core = limiter(RULE)
        turns = 0

        async def other() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        task = start(other())
        for _ in range(1_280):
            async with core.slot("key"):
                pass
        assert turns >= 9
        task.cancel()

    run(main)


# Waiting


def test_callers_are_served_in_the_order_in_which_they_came() -> None:
    async def main() -> None:
        seed = random.randrange(2**32)
        rng = random.Random(seed)
        core = limiter(ConcurrencyRule("exports", 5))
        served: list[int] = []
        in_use = most = 0

        async def caller(number: int, cost: int) -> None:
            nonlocal in_use, most
            async with core.slot("key", cost=cost, timeout=None):
                served.append(number)
                in_use += cost
                most = max(most, in_use)
                await asyncio.sleep(rng.random())
                in_use -= cost

        async with core.slot("key", cost=5):
            tasks = [start(caller(number, rng.choice((1, 1, 2, 5)))) for number in range(200)]
            await settled()
        await asyncio.gather(*tasks)
        assert served == list(range(200)), seed
        assert most == 5
        assert left_behind(core) == NOTHING

    run(main)


def test_a_large_request_is_not_overtaken_by_small_ones() -> None:
    async def main() -> None:
        core = limiter(RULE)
        until = [asyncio.Event() for _ in range(3)]
        holders = [start(hold(core.slot("key"), each)) for each in until]
        await settled()
        large = start(hold(core.slot("key", cost=3, timeout=None)))
        small = start(hold(core.slot("key", timeout=None)))
        await settled()
        for each in until[:2]:
            each.set()
        await settled()
        assert len(core._lines) == 1
        with pytest.raises(RateLimitExceeded, match="denied a cost of 1 with 2 of 3 left"):
            await core.slot("key").__aenter__()  # two are free, for those that wait
        large.cancel()
        await settled()
        async with core.slot("key") as third:
            assert third.decision.remaining == 0  # with the last of the holders and the small one
        small.cancel()
        until[2].set()
        await asyncio.wait([*holders, large, small])
        assert left_behind(core) == NOTHING

    run(main)


def test_a_caller_waits_until_its_timeout() -> None:
    async def main() -> None:
        core = limiter(ONE)
        async with core.slot("key"):
            began_s = timeless().time()
            with pytest.raises(RateLimitExceeded, match="nobody knows when"):
                await core.slot("key", timeout=1.5).__aenter__()
            assert timeless().time() - began_s == pytest.approx(1.5, abs=1e-5)
            late, early = start(hold(core.slot("key", timeout=3))), start(hold(core.slot("key", timeout=1)))
            await asyncio.sleep(2)
            assert (late.done(), early.done()) == (False, True)
            assert isinstance(early.exception(), RateLimitExceeded)
        await settled()
        assert not late.done()
        late.cancel()
        await asyncio.wait([late])
        assert left_behind(core) == NOTHING

    run(main)


def test_callers_behind_one_that_is_out_of_time_go_on() -> None:
    async def main() -> None:
        core = limiter(RULE)
        async with core.slot("key"):
            large, small = start(hold(core.slot("key", cost=3, timeout=1))), start(hold(core.slot("key", timeout=None)))
            await settled()
            assert not small.done()
            assert core._storage.slots._keys[("exports", b"=key")].total == 1
            await asyncio.sleep(1)
            await settled()
            assert core._storage.slots._keys[("exports", b"=key")].total == 2
            small.cancel()
            await asyncio.wait([large, small])
        assert isinstance(large.exception(), RateLimitExceeded)
        assert left_behind(core) == NOTHING

    run(main)


def test_a_slot_goes_to_the_next_one_by_one_call() -> None:
    async def main() -> None:
        storage = Counting()
        core = RateThrottleCore(storage, rules=[ONE])
        tasks = []
        async with core.slot("key"):
            tasks = [start(hold(core.slot("key", timeout=None), asyncio.Event())) for _ in range(3)]
            await settled()
            asked = len(storage.asked)
        assert storage.asked[asked:] == [Ask(0, 1, 2)]
        await settled()
        asked = len(storage.asked)
        tasks[0].cancel()
        await settled()
        assert storage.asked[asked:] == [Ask(0, 1, 2)]
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        assert left_behind(core) == NOTHING

    run(main)


def test_a_thousand_callers_take_no_turn_of_the_loop_while_they_wait() -> None:
    async def main() -> None:
        core = limiter(ONE)
        async with core.slot("key"):
            tasks = [start(hold(core.slot("key", timeout=36_000 + i))) for i in range(1_000)]
            await settled()
            assert timeless().timers() == 1
            looks = timeless().jumping.looks
            await asyncio.sleep(3_600)
            assert timeless().jumping.looks - looks <= 3
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
        assert left_behind(core) == NOTHING

    run(main)


# Cancellation


def test_a_cancelled_caller_leaves_nothing() -> None:
    async def main() -> None:
        for place in range(3):
            core = limiter(ONE)
            until = asyncio.Event()
            holder = start(hold(core.slot("key"), until))
            await settled()
            tasks = [start(hold(core.slot("key", timeout=None), until)) for _ in range(3)]
            await settled()
            tasks[place].cancel()
            await settled()
            until.set()
            await asyncio.wait([holder, *tasks])
            assert [task.cancelled() for task in tasks] == [at == place for at in range(3)]
            assert left_behind(core) == NOTHING

    run(main)


@pytest.mark.parametrize("others", [0, 1])
def test_a_slot_that_comes_as_its_caller_is_cancelled_goes_to_the_next_one(others: int) -> None:
    async def main() -> None:
        core = limiter(ONE)
        async with core.slot("key"):
            tasks = [start(hold(core.slot("key", timeout=None))) for _ in range(1 + others)]
            await settled()
        tasks[0].cancel()  # its slot has come, but it hasn't run since
        await settled()
        assert tasks[0].cancelled()
        if others:
            assert core._storage.slots._keys[("exports", b"=key")].total == 1
            tasks[1].cancel()
            await asyncio.wait(tasks)
        assert left_behind(core) == NOTHING

    run(main)


def test_a_storm_of_cancellations_loses_no_slot_and_no_place() -> None:
    async def main() -> None:
        seed = random.randrange(2**32)
        rng = random.Random(seed)
        core = limiter(ConcurrencyRule("exports", 4))
        in_use = 0
        came: list[Claim] = []
        served: list[Claim] = []  # in the order of their grants: a task that is granted a slot goes on a turn later

        class Watched(SlotLine):
            """Keeps who came and who was served."""

            __slots__ = ()

            def enter(self, claim: Claim) -> None:
                came.append(claim)
                super().enter(claim)

            def give(self, claim: Claim, outcome: Decision | BaseException) -> None:
                super().give(claim, outcome)
                if isinstance(outcome, Decision):
                    served.append(claim)

        async def caller(cost: int) -> None:
            nonlocal in_use
            timeout = rng.choice((None, None, rng.uniform(0.1, 5)))
            async with core.slot("key", cost=cost, timeout=timeout):
                in_use += cost
                assert in_use <= 4, seed
                try:
                    await asyncio.sleep(rng.random() * 0.2)
                finally:
                    in_use -= cost

        tasks: list[asyncio.Task[Any]] = []
        with patch.object(slots, "SlotLine", Watched):
            for _ in range(400):
                tasks.append(start(caller(rng.choice((1, 1, 2, 4)))))
                for _ in range(rng.randrange(3)):
                    rng.choice(tasks).cancel()
                if rng.random() < 0.3:
                    await asyncio.sleep(rng.random() * 0.1)
            await asyncio.wait(tasks)
        places = [came.index(claim) for claim in served]
        assert places == sorted(places), seed
        assert len(places) > 30
        assert {type(task.exception()) for task in tasks if not task.cancelled()} <= {type(None), RateLimitExceeded}
        assert left_behind(core) == NOTHING, seed

    run(main)


def test_a_generator_that_is_closed_gives_its_slot_back() -> None:
    async def main() -> None:
        core = limiter(ONE)

        async def generates() -> Any:
            async with core.slot("key"):
                yield 1

        generator = generates()
        await anext(generator)
        assert len(core._storage.slots) == 1
        await generator.aclose()
        assert left_behind(core) == NOTHING

    run(main)


# Rules that change, resets, and the end


def test_callers_stand_in_one_line_whatever_the_ttl() -> None:
    async def main() -> None:
        core = limiter(ONE)
        served: list[int] = []

        async def caller(number: int) -> None:
            async with core.slot("key", timeout=None):
                served.append(number)

        async with core.slot("key"):
            tasks = [start(caller(0)), start(caller(1))]
            await settled()
            core.add_rule(ConcurrencyRule("exports", 1, ttl=5), replace=True)
            tasks += [start(caller(2)), start(caller(3))]
            await settled()
            assert len(core._lines) == 1
        await asyncio.gather(*tasks)
        assert served == [0, 1, 2, 3]
        assert left_behind(core) == NOTHING

    run(main)


def test_those_that_wait_by_a_name_go_on_by_the_rule_that_takes_its_place() -> None:
    async def main() -> None:
        core = limiter(ONE)
        async with core.slot("key"):
            named = start(hold(core.slot("key", "exports", timeout=None)))
            own = start(hold(core.slot("key", ONE, timeout=None)))
            await settled()
            core.add_rule(ConcurrencyRule("exports", 3), replace=True)
            await settled()
            assert core._storage.slots._keys[("exports", b"=key")].total == 2
            large = start(hold(core.slot("key", cost=2, timeout=None)))
            await settled()
            core.add_rule(ConcurrencyRule("exports", 1), replace=True)
            await settled()
            assert isinstance(large.exception(), CostExceedsLimit)
            last = start(hold(core.slot("key", timeout=None)))
            await settled()
            core.add_rule(ConcurrencyRule("exports", 0), replace=True)
            await settled()
            assert isinstance(last.exception(), RateLimitExceeded)
        for task in (named, own):
            task.cancel()
        await asyncio.wait([named, own])
        assert left_behind(core) == NOTHING

    run(main)


def test_a_reset_takes_slots_from_their_holders() -> None:
    async def main() -> None:
        core = limiter(ONE)
        heard: list[events.Event] = []
        core.on_event(heard.append)
        await core.reset("key", "exports")  # nobody holds any
        async with core.slot("key") as slot, core.slot("other") as other:
            waits = start(hold(core.slot("key", timeout=None)))
            await settled()
            await core.reset("key", ONE)
            await settled()
            assert slot.lost.is_set()
            assert not other.lost.is_set()
            assert core._storage.slots._keys[("exports", b"=key")].total == 1
            assert not waits.done()
        await settled()
        assert events.SlotLost("exports", 2).message.startswith("lost 2 slots of rule 'exports', which")
        assert [(event.kind, str(event).partition(":")[0]) for event in heard] == [
            ("slot_lost", "lost 1 slot of rule 'exports', which others may hold now")
        ]
        waits.cancel()
        await asyncio.wait([waits])
        assert left_behind(core) == NOTHING

    run(main)


def test_a_reset_names_rules_as_slots_do() -> None:
    async def main() -> None:
        core = limiter(ONE)
        async with core.slot("key") as slot:
            await core.reset("key")  # the only rule
            await settled()
            assert slot.lost.is_set()
        core.add_rule(PER_MINUTE)
        for named in (("exports", "per_minute"), ["per_minute", ONE], ("exports",), (ONE,)):
            used = (await core.check("key")).remaining
            async with core.slot("key") as slot:
                await core.reset("key", named)
                await settled()
                assert slot.lost.is_set()
            assert (await core.peek("key")).remaining == (5 if len(named) == 2 else used)
        await core.reset("key")  # the only one that checks are by
        assert (await core.peek("key")).remaining == 5
        async with core.slot("key") as slot:
            for wrong in (("exports", "other"), ("exports", 7), ("other",), (), "other", 7):
                with pytest.raises(InvalidRequest):
                    await core.reset("key", wrong)  # type: ignore[arg-type]
            with pytest.raises(InvalidRequest, match="the key is empty"):
                await core.reset("", ("exports", "per_minute"))
            await settled()
            assert not slot.lost.is_set()
        core.remove_rule("per_minute")
        core.add_rule(ConcurrencyRule("imports", 1))
        with pytest.raises(InvalidRequest, match="several concurrency rules; name one"):
            await core.reset("key")
        assert left_behind(core) == NOTHING

    run(main)


def test_the_end_of_a_limiter_ends_waits_and_gives_slots_back() -> None:
    async def main() -> None:
        storage = InMemoryStorage(clock_us=timeless().time_us)
        core, other = RateThrottleCore(storage, rules=[ONE]), RateThrottleCore(storage, rules=[ONE])
        heard: list[events.Event] = []
        core.on_event(heard.append)
        ready = core.slot("key")
        async with core.slot("key") as slot:
            waits = start(hold(core.slot("key", timeout=None)))
            elsewhere = start(hold(other.slot("key", timeout=None)))
            await settled()
            await core.aclose()
            await settled()
            assert isinstance(waits.exception(), LimiterClosed)
            assert slot.lost.is_set()
            assert not elsewhere.done()
            assert len(storage.slots) == 1
            with pytest.raises(LimiterClosed):
                core.slot("key")
            with pytest.raises(LimiterClosed):
                await ready.__aenter__()
        assert heard == []
        elsewhere.cancel()
        await asyncio.wait([elsewhere])
        assert left_behind(core) == left_behind(other) == NOTHING

    run(main)


# Slots together with other limits

PER_MINUTE = RateThrottleRule("per_minute", 5, 60)


def test_a_slot_may_be_taken_together_with_other_limits() -> None:
    async def main() -> None:
        core = limiter(RULE, PER_MINUTE)
        async with core.slot("key", ("exports", "per_minute"), cost=2) as slot:
            decision = slot.decision
            assert [(part.rule, part.cost, part.remaining) for part in decision.parts] == [
                ("exports", 2, 1),
                ("per_minute", 2, 3),
            ]
            assert (decision.rule, decision.remaining, decision.atomic) == ("exports", 1, False)
            assert decision.headers() == {
                "RateLimit-Policy": '"exports";q=3;qu="concurrent-requests", "per_minute";q=5;w=60',
                "RateLimit": '"exports";r=1, "per_minute";r=3;t=60',
            }
            again = pickle.loads(pickle.dumps(decision))
            assert (again, hash(again), again.parts) == (decision, hash(decision), decision.parts)
            assert repr(decision).endswith("source='memory' parts=2>")
            assert decision != decision.parts[0]
            with pytest.raises(RateLimitExceeded) as raised:
                await core.slot("key", ["per_minute", RULE], cost=2).__aenter__()
            assert raised.value.decision.rule == "exports"
            assert (await core.peek("key")).remaining == 3  # nothing of the others was consumed
        other = RateThrottleRule("other", 4, 60)
        async with core.slot("key", {RULE: 3, "per_minute": 1, other: 4}) as slot:
            assert [(part.rule, part.cost) for part in slot.decision.parts] == [("exports", 3), ("per_minute", 1), ("other", 4)]
        async with core.slot("key", (FirstOf(other, "per_minute"), "exports")) as slot:
            assert [part.rule for part in slot.decision.parts] == ["exports", "per_minute"]
        async with core.slot("key", ["exports"]) as slot:
            assert slot.decision.parts == ()

    run(main)


def test_a_slot_is_given_back_if_another_limit_denies() -> None:
    async def main() -> None:
        core = limiter(ONE, PER_MINUTE)
        assert await core.check("key", cost=5)
        with pytest.raises(RateLimitExceeded) as raised:
            await core.slot("key", ("exports", "per_minute")).__aenter__()
        assert (raised.value.decision.rule, raised.value.decision.retry_after) == ("per_minute", 60)
        assert left_behind(core) == NOTHING
        with pytest.raises(RateLimitExceeded):
            await core.slot("key", ("exports", "per_minute"), timeout=30).__aenter__()  # it can't be met: no wait
        waits = start(hold(core.slot("key", ("exports", "per_minute"), timeout=61)))
        others = start(hold(core.slot("key", timeout=None)))
        await settled()
        assert not waits.done()
        waits.cancel()
        await settled()
        assert core._storage.slots._keys[("exports", b"=key")].total == 1  # the other one's
        others.cancel()
        await asyncio.wait([waits, others])
        assert left_behind(core) == NOTHING

        async with core.slot("key", ("exports", "per_minute"), timeout=None) as slot:
            assert slot.decision.parts[1].remaining == 4
        assert left_behind(core) == NOTHING

    run(main)


def test_the_timeout_is_for_the_slot_and_the_other_limits_together() -> None:
    async def main() -> None:
        core = limiter(ONE, RateThrottleRule("api", 1, 10, strategy="token_bucket"))
        until = asyncio.Event()
        holder = start(hold(core.slot("key", ("exports", "api")), until))
        waits = start(hold(core.slot("key", ("exports", "api"), timeout=9)))
        late = start(hold(core.slot("key", ("exports", "api"), timeout=11)))
        await asyncio.sleep(5)
        began_s = timeless().time()
        until.set()
        await settled()
        assert isinstance(waits.exception(), RateLimitExceeded)
        await asyncio.sleep(6)
        late.cancel()
        await asyncio.wait([late, holder])
        assert timeless().time() - began_s == pytest.approx(6)
        assert (await core.peek("key")).remaining == 0  # it was consumed, and kept
        assert left_behind(core) == NOTHING

    run(main)


def test_a_slot_that_is_lost_while_other_limits_are_waited_for_is_taken_again() -> None:
    async def main() -> None:
        core = limiter(ONE, RateThrottleRule("api", 1, 10, strategy="token_bucket"))
        assert await core.check("key", "api")
        waits = start(core.slot("key", ("exports", "api"), timeout=11).__aenter__())
        await settled()
        await core.reset("key", "exports")
        await asyncio.sleep(10)
        slot = waits.result()
        assert not slot.lost.is_set()
        assert [(part.rule, part.remaining) for part in slot.decision.parts] == [("exports", 0), ("api", 0)]
        late = start(core.slot("key", ("exports", "api"), timeout=11).__aenter__())
        await settled()
        with pytest.raises(RateLimitExceeded):
            await core.slot("key", "exports").__aenter__()
        await slot.release()
        await settled()  # it holds the slot now, and waits for the rest
        await core.reset("key", "exports")
        until = asyncio.Event()
        other = start(hold(core.slot("key"), until))  # and others take it meanwhile
        await asyncio.sleep(10.9)
        assert not late.done()
        await asyncio.sleep(0.2)
        error = late.exception()
        assert isinstance(error, RateLimitExceeded)
        assert error.decision.rule == "exports"
        assert (await core.peek("key", "api")).remaining == 0  # what it has waited for stays consumed
        until.set()
        await other
        assert left_behind(core) == NOTHING

    run(main)


def test_a_slot_that_is_lost_before_its_task_goes_on_is_taken_again() -> None:
    async def main() -> None:
        core = limiter(ONE)
        async with core.slot("key") as first:
            waits = start(core.slot("key", timeout=None).__aenter__())
            await settled()
            [line] = core._slots._lines(core)
            await first.release()
            line.lost()
        await settled()
        slot = waits.result()
        assert not slot.lost.is_set()
        assert core.statistics().slots == 1
        await slot.release()
        assert left_behind(core) == NOTHING

    run(main)


def test_what_cannot_be_taken_together_is_refused_at_once() -> None:
    core = RateThrottleCore(rules=[RULE, ConcurrencyRule("imports", 2), PER_MINUTE])
    calls: list[tuple[Any, int, str]] = [
        ((), 1, "a slot is of one ConcurrencyRule, and this names none; limiter.limit"),
        (("per_minute",), 1, "names none"),
        (("exports", "imports"), 1, "a slot is of one ConcurrencyRule, and this names 2; nest a block for each of them"),
        (("exports", RULE), 1, "names 2"),
        (("exports", "other"), 1, "the limiter has no such rule"),
        (("exports", 7), 1, "one of several rules is a int"),
        (("exports", FirstOf("per_minute", "imports")), 1, "rule 'imports' is a ConcurrencyRule"),
        (("exports", "per_minute"), 4, "rule 'exports' has a capacity of 3"),
        ({"exports": 1, "per_minute": 6}, 1, "rule 'per_minute' has a capacity of 5"),
        ({"exports": 0, "per_minute": 1}, 1, "the cost is below 1"),
        ({"exports": 1, "per_minute": 1}, 2, "cost is given beside a mapping"),
        (FirstOf("per_minute", "other"), 1, "rule is a FirstOf; slots take"),
        ({"exports", "per_minute"}, 1, "rule is a set; slots take"),
    ]
    for rule, cost, says in calls:
        with pytest.raises(InvalidRequest, match=says):
            core.slot("key", rule, cost=cost)
    assert len(core._storage.slots) == 0


# Several loops, threads and processes


def test_event_loops_share_the_slots_of_a_storage() -> None:
    seed = random.randrange(2**32)
    core = RateThrottleCore(rules=[ConcurrencyRule("exports", 3)])
    lock, in_use, most, taken = threading.Lock(), 0, 0, 0

    async def caller(rng: random.Random) -> None:
        nonlocal in_use, most, taken
        for _ in range(30):
            cost = rng.choice((1, 1, 2, 3))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(rng.choice((None, 0.001))), core.slot("key", cost=cost, timeout=None):
                    with lock:
                        in_use += cost
                        taken += 1
                        most = max(most, in_use)
                    try:
                        await asyncio.sleep(0)
                    finally:
                        with lock:
                            in_use -= cost

    async def main(number: int) -> None:
        rng = random.Random(seed + number)
        await asyncio.wait_for(asyncio.gather(*(caller(rng) for _ in range(10))), 60)

    threads = [threading.Thread(target=asyncio.run, args=(main(number),)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads), seed
    assert (in_use, most) == (0, 3), seed
    assert taken > 100
    assert len(core._storage.slots) == 0
    assert len(core._lines) == 0


def test_slots_of_a_loop_that_was_closed_are_free() -> None:
    core = RateThrottleCore(rules=[RULE])
    loop = asyncio.new_event_loop()
    held = core.slot("key", cost=2)
    loop.run_until_complete(held.__aenter__())
    waits = core.slot("key", cost=3, timeout=None).__aenter__()
    task = loop.create_task(waits)
    loop.run_until_complete(asyncio.sleep(0))
    assert not task.done()
    loop.close()

    async def main() -> None:
        async with core.slot("key", cost=3):
            pass

    asyncio.run(main())
    assert len(core._storage.slots) == 0
    task._log_destroy_pending = False  # type: ignore[attr-defined]
    with contextlib.suppress(RuntimeError):
        waits.close()


def test_a_loop_that_does_not_run_keeps_nobody_waiting_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held, "PATIENCE_S", 0.05)
    core = RateThrottleCore(rules=[ONE])
    loop = asyncio.new_event_loop()
    served: list[str] = []

    async def take(name: str) -> None:
        async with core.slot("key", timeout=60):
            served.append(name)

    async def main() -> None:
        async with core.slot("key"):
            await asyncio.to_thread(loop.run_until_complete, begin())
            behind = start(take("second"))
            await settled()
        await behind  # the first one's loop stands still, and isn't closed

    async def begin() -> None:
        tasks.append(start(take("first")))
        await settled()

    tasks: list[asyncio.Task[Any]] = []
    asyncio.run(main())
    assert served == ["second"]
    loop.run_until_complete(tasks[0])
    loop.close()
    assert served == ["second", "first"]
    assert len(core._storage.slots) == len(core._lines) == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_process_has_slots_of_its_own() -> None:
    async def main() -> int:
        core = RateThrottleCore(rules=[RULE])
        async with core.slot("key", cost=3) as slot:
            child = os.fork()
            if child == 0:
                status = 1
                try:
                    asyncio.events._set_running_loop(None)
                    asyncio.run(in_child(core))
                    status = 0
                finally:
                    os._exit(status)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0  # noqa: ASYNC222  # nothing else is to run here
            assert not slot.lost.is_set()
            with pytest.raises(RateLimitExceeded):
                await core.slot("key").__aenter__()
        return len(core._storage.slots)

    async def in_child(core: RateThrottleCore) -> None:
        async with core.slot("key", cost=2) as slot:
            assert slot.decision.remaining == 1

    assert asyncio.run(main()) == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_process_may_be_forked_while_another_thread_takes_a_slot() -> None:
    inside, goes_on = threading.Event(), threading.Event()

    class Slow(Caller):
        """Stands still where the store looks at it."""

        @property
        def gone(self) -> bool:  # type: ignore[override]
            inside.set()
            goes_on.wait(60)
            return False

    store, woken, (first, other) = callers("first", "other")
    first.ask(0, 3, 1)
    thread = threading.Thread(target=Slow(store, woken, "slow").ask, args=(0, 1, 1))
    thread.start()
    assert inside.wait(60)
    child = os.fork()
    if child == 0:
        signal.alarm(10)  # ends it, with no status of 0
        status = 1
        try:
            store.forget(RULE, first.entry)  # the other process's holder hears nothing
            if other.ask(0, 2, 1) == Held(1, 1) and not woken:
                status = 0
        finally:
            os._exit(status)
    goes_on.set()
    thread.join(60)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert first.ask(3, 1, 1) == Held(0, 0, PATIENCE_S)


def test_it_works_under_trio() -> None:
    async def main() -> None:
        core = RateThrottleCore(rules=[ONE])
        served: list[int] = []

        async def caller(number: int) -> None:
            async with core.slot("key", timeout=60):
                served.append(number)
                await trio.sleep(1)

        async with trio.open_nursery() as nursery:
            for number in range(3):
                nursery.start_soon(caller, number)
                await trio.testing.wait_all_tasks_blocked()
        assert served == [0, 1, 2]
        async with core.slot("key"):
            with trio.move_on_after(1) as scope:
                await core.slot("key", timeout=None).__aenter__()
            assert scope.cancelled_caught
            with pytest.raises(RateLimitExceeded):
                await core.slot("key", timeout=2).__aenter__()
        assert len(core._storage.slots) == len(core._lines) == 0

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def test_slots_of_a_run_of_trio_that_has_ended_are_free() -> None:
    core = RateThrottleCore(rules=[ONE])

    async def leave() -> None:
        await core.slot("key").__aenter__()

    async def take() -> None:
        async with core.slot("key"):
            with pytest.raises(RateLimitExceeded):
                await core.slot("key").__aenter__()

    trio.run(leave)
    trio.run(take)
    trio.run(take)
    assert len(core._storage.slots) == len(core._lines) == 0


async def test_a_manual_clock_lets_waits_pass() -> None:
    clock = ManualClock()
    core = RateThrottleCore(InMemoryStorage(clock_us=clock), rules=[ONE])
    async with core.slot("key"):
        waits = start(hold(core.slot("key", timeout=30)))
        await clock.elapse(29)
        assert not waits.done()
        await clock.elapse(1)
        assert isinstance(waits.exception(), RateLimitExceeded)


# A storage that answers later, or not at all


class Later(InMemoryStorage):
    """Answers when the test says so."""

    def __init__(self) -> None:
        super().__init__(clock_us=timeless().time_us)
        self.asked: list[tuple[Holder, ConcurrencyRule, Ask, asyncio.Future[Held]]] = []
        self.forgotten: list[Entry] = []

    def hold(self, holder: Holder, rule: ConcurrencyRule, ask: Ask) -> Any:
        future: asyncio.Future[Held] = asyncio.get_running_loop().create_future()
        self.asked.append((holder, rule, ask, future))
        return future

    async def answer(self, granted: int | None = None, free: int = 0, again_s: float = 0, error: Exception | None = None) -> Ask:
        """Answer the only ask; without a number by what a real storage says."""
        [(holder, rule, ask, future)] = self.asked
        self.asked.clear()
        if error is not None:
            future.set_exception(error)
        elif granted is None:
            future.set_result(super().hold(holder, rule, ask))
        else:
            future.set_result(Held(granted, free, again_s, "redis"))
        await settled()
        return ask


def test_asks_that_come_meanwhile_go_into_the_next_one() -> None:
    async def main() -> None:
        storage = Later()
        core = RateThrottleCore(storage, rules=[RULE])
        until = asyncio.Event()
        tasks = [start(hold(core.slot("key", timeout=0), until)) for _ in range(5)]
        await settled()
        assert await storage.answer() == Ask(0, 1, 1, waits=False)
        assert await storage.answer() == Ask(1, 1, 4, waits=False)  # no more of them can be granted
        assert [task.done() for task in tasks] == [False, False, False, True, True]
        assert isinstance(tasks[4].exception(), RateLimitExceeded)
        assert not storage.asked
        until.set()
        await settled()
        assert await storage.answer() == Ask(2, 1, 0)
        assert [task.done() for task in tasks] == [True, False, False, True, True]
        assert await storage.answer() == Ask(0, 1, 0)
        assert [await task for task in tasks[:3]]
        assert left_behind(core) == NOTHING

    run(main)


def test_a_denied_line_asks_again_when_the_storage_says() -> None:
    async def main() -> None:
        storage = Later()
        core = RateThrottleCore(storage, rules=[RULE])
        task = start(hold(core.slot("key", timeout=1)))
        await settled()
        for _ in range(3):
            await storage.answer(0, 0, 0.03)
            await asyncio.sleep(0.029)
            assert not storage.asked
            await asyncio.sleep(0.002)
        await storage.answer(0, 0)
        await asyncio.sleep(0.5)
        assert not storage.asked
        await asyncio.sleep(0.5)
        assert isinstance(task.exception(), RateLimitExceeded)
        assert await storage.answer(0, 3) == Ask(0, 1, 0)
        assert left_behind(core) == NOTHING

    run(main)


def test_a_timeout_without_any_answer_is_overload() -> None:
    async def main() -> None:
        storage = Later()
        core = RateThrottleCore(storage, rules=[RULE])
        task = start(hold(core.slot("key", timeout=0.1)))
        await asyncio.sleep(0.2)
        error = task.exception()
        assert isinstance(error, RateLimitExceeded)
        assert (error.decision.source, error.decision.retry_after) == ("overload", 0.1)
        assert await storage.answer() == Ask(0, 1, 1)
        assert await storage.answer() == Ask(0, 1, 0)  # what was granted meanwhile goes back
        assert left_behind(core) == NOTHING

    run(main)


def test_an_error_goes_to_those_that_were_asked_for_and_what_was_held_is_given_back_later() -> None:
    async def main() -> None:
        storage = Later()
        core = RateThrottleCore(storage, rules=[RULE])
        first = start(hold(core.slot("key", cost=2)))
        await settled()
        tasks = [start(hold(core.slot("key", timeout=None))) for _ in range(2)]
        await settled()
        await storage.answer()
        assert await storage.answer(error=StorageTimeout(0.25)) == Ask(2, 1, 2)
        assert [type(task.exception()) for task in tasks] == [StorageTimeout] * 2
        assert tasks[0].exception() is not tasks[1].exception()
        assert not storage.asked
        await asyncio.sleep(RETRY_LEAST_S)
        assert await storage.answer() == Ask(2, 1, 0)
        first.cancel()
        await settled()
        for wait_s in (0.05, 0.1, 0.2, 0.4, 0.8, 1, 1):
            assert not storage.asked[1:]
            await storage.answer(error=StorageTimeout(0.25))
            assert first.done()
            await asyncio.sleep(wait_s - 0.001)
            assert not storage.asked
            await asyncio.sleep(0.002)
        assert await storage.answer() == Ask(0, 1, 0)
        assert left_behind(core) == NOTHING

    run(main)


def test_an_error_of_the_call_itself_is_raised() -> None:
    async def main() -> None:
        core = limiter(RULE)
        with patch.object(core._storage, "hold", side_effect=StorageTimeout(0.25)), pytest.raises(StorageTimeout):
            await core.slot("key", timeout=None).__aenter__()
        await asyncio.sleep(1)
        assert left_behind(core) == NOTHING

    run(main)


def test_slots_that_lapsed_are_lost_and_their_line_begins_anew() -> None:
    async def main() -> None:
        storage = Later()
        core = RateThrottleCore(storage, rules=[RULE])
        heard: list[events.Event] = []
        core.on_event(heard.append)
        task = start(core.slot("key", cost=2).__aenter__())
        await settled()
        holder = storage.asked[0][0]
        await storage.answer()
        slot = task.result()
        waits = start(hold(core.slot("key", cost=2, timeout=None)))
        await settled()
        holder.lost()
        assert slot.lost.is_set()
        assert [type(event) for event in heard] == [events.SlotLost]
        assert await storage.answer(1, 1) == Ask(2, 2, 1)  # void: what was asked before the loss
        assert not waits.done()
        assert await storage.answer() == Ask(0, 2, 1)
        await slot.release()  # does nothing more
        assert not storage.asked
        waits.cancel()
        await settled()
        await storage.answer()
        assert left_behind(core) == NOTHING

    run(main)


def test_a_caller_that_is_cancelled_while_it_gives_back_has_given_back() -> None:
    async def main() -> None:
        storage = Later()
        core = RateThrottleCore(storage, rules=[RULE])
        until = asyncio.Event()
        task = start(hold(core.slot("key"), until))
        await settled()
        await storage.answer()
        until.set()
        await settled()
        assert not task.done()
        task.cancel()
        await settled()
        assert task.cancelled()
        assert await storage.answer() == Ask(0, 1, 0)
        assert left_behind(core) == NOTHING

    run(main)


# What the storage in memory answers


class Caller:
    """A holder that notes when it is woken."""

    gone = False

    def __init__(self, store: HeldSlots, log: list[str], name: str, key: str = "key") -> None:
        self.entry = held_entry(RULE.compiled, key, 1)
        self.store = store
        self.log = log
        self.name = name

    def ask(self, held: int, cost: int = 1, wanted: int = 0, *, waits: bool = True, limit: int = 3) -> Held:
        return self.store.hold(self, ConcurrencyRule("exports", limit), Ask(held, cost, wanted, waits))

    def wake(self) -> None:
        if self.gone:
            raise RuntimeError("its loop is closed")
        self.log.append(self.name)

    def lost(self) -> None:
        """Nobody calls this."""


def callers(*names: str) -> tuple[HeldSlots, list[str], list[Caller]]:
    store, log = HeldSlots(), list[str]()
    return store, log, [Caller(store, log, name) for name in names]


def test_holders_are_served_in_the_order_in_which_they_began_to_wait() -> None:
    store, woken, (a, b, c) = callers("a", "b", "c")
    assert a.ask(0, 1, 5) == Held(3, 0)
    assert b.ask(0, 2, 1) == Held(0, 0, PATIENCE_S)
    assert c.ask(0, 1, 1) == Held(0, 0, PATIENCE_S)
    assert a.ask(2) == Held(0, 1)  # b comes first, and wants two
    assert c.ask(0, 1, 1) == Held(0, 1, PATIENCE_S)
    assert woken == []
    assert a.ask(1, 1, 1) == Held(0, 2, PATIENCE_S)  # behind them
    assert woken == ["b"]
    assert b.ask(0, 2, 3) == Held(1, 0, PATIENCE_S)  # one by one, as others wait
    assert b.ask(0, 2, 2) == Held(0, 2, PATIENCE_S)
    assert woken[-1] == "c"
    assert c.ask(0, 1, 1) == Held(1, 1)
    assert woken[-1] == "a"
    assert a.ask(1, 1, 1) == Held(1, 0)
    for caller in (a, b, c):
        caller.ask(0)
    assert len(store) == 0


def test_those_that_ask_once_have_no_place() -> None:
    store, woken, (a, b, c) = callers("a", "b", "c")
    assert a.ask(0, 3, 1, waits=False) == Held(1, 0)
    assert b.ask(0, 1, 1, waits=False) == Held(0, 0)
    assert c.ask(0, 1, 1) == Held(0, 0)
    assert b.ask(0, 1, 1, waits=False) == Held(0, 0)
    assert a.ask(0) == Held(0, 3)
    assert woken == ["c"]
    assert b.ask(0, 1, 1, waits=False) == Held(0, 3)  # c comes first
    assert c.ask(0, 1, 1, waits=False) == Held(1, 2)
    assert b.ask(0, 1, 4, waits=False) == Held(2, 0)
    assert (b.ask(0), c.ask(0)) == (Held(0, 2), Held(0, 3))
    assert len(store) == 0


def test_the_slots_of_loops_that_are_closed_are_free_again() -> None:
    store, woken, (a, b, c) = callers("a", "b", "c")
    assert a.ask(0, 2, 1) == Held(1, 1)
    assert b.ask(0, 2, 1) == Held(0, 1)
    assert c.ask(0, 3, 1) == Held(0, 1, PATIENCE_S)
    b.gone = True
    assert a.ask(0) == Held(0, 3)
    assert woken == ["c"]
    assert c.ask(0, 3, 1) == Held(1, 0)
    c.gone = True
    assert a.ask(0, 1, 1) == Held(1, 2)
    a.ask(0)
    assert len(store) == 0


def test_a_holder_whose_slots_were_forgotten_hears_of_it_once() -> None:
    store, woken, (a, b) = callers("a", "b")
    assert a.ask(0, 2, 1) == Held(1, 1)
    assert b.ask(0, 2, 1) == Held(0, 1)
    store.forget(ConcurrencyRule("exports", 3), a.entry)
    assert sorted(woken) == ["a", "b"]
    assert b.ask(0, 2, 1) == Held(1, 1)
    assert a.ask(2, 1, 1) == Held(1, 0, lost=True)
    assert a.ask(1) == Held(0, 0)
    store.forget(ConcurrencyRule("exports", 3), a.entry)
    a.gone = b.gone = True
    _, _, (c,) = callers("c")
    c.store = store
    assert c.ask(0, 3, 1) == Held(1, 0)
    c.ask(0)
    assert len(store) == 0


def test_a_holder_that_does_not_come_in_its_turn_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 100.0
    monkeypatch.setattr(held, "monotonic", lambda: now_s)
    store, woken, (a, b, c) = callers("a", "b", "c")
    assert a.ask(0, 3, 1) == Held(1, 0)
    assert b.ask(0, 1, 1) == Held(0, 0)
    now_s += 10  # nothing is free: it isn't its turn
    assert c.ask(0, 2, 1) == Held(0, 0, PATIENCE_S)
    assert a.ask(0) == Held(0, 3)
    assert woken == ["b"]
    now_s += 0.99
    assert c.ask(0, 2, 1) == Held(0, 3, PATIENCE_S)
    assert a.ask(0, 1, 1, waits=False) == Held(0, 3)
    now_s += 0.01
    assert c.ask(0, 2, 1) == Held(1, 1)
    assert b.ask(0, 1, 1) == Held(1, 0)  # it comes after all
    c.ask(0)
    b.ask(0)
    assert len(store) == 0


def test_what_closed_loops_left_is_bounded() -> None:
    store = HeldSlots()
    for number in range(5_000):
        gone = Caller(store, [], "gone", f"key {number}")
        assert gone.ask(0, 1, 1) == Held(1, 2)
        gone.gone = True
    assert len(store) <= 1_024


def test_it_answers_as_the_oracle_of_the_script_does() -> None:
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    names = "abcd"
    granted = waited = 0
    for _ in range(100):
        store, woken, found = callers(*names)
        oracle = SlotsOracle()
        holders = [oracles.Holder(name, joins=True) for name in names]
        units, wants, limit = dict.fromkeys(names, 0), dict[str, int](), rng.randint(1, 6)
        for number in range(60):
            which = rng.randrange(len(names))
            ask = Ask(rng.randint(0, units[names[which]]), rng.randint(1, limit), rng.randint(0, 1), rng.random() < 0.7)
            item = oracles.Item("key", 1, limit, ask.cost, ask.held, ask.wanted, number + 1, waits=ask.waits)
            woken.clear()
            answer = store.hold(found[which], ConcurrencyRule("exports", limit), ask)
            _, [expected] = oracle.hold(10**15, [holders[which]], [item])
            assert (answer.granted, answer.free) == expected[:2], (seed, number)
            units[names[which]] = ask.held + answer.granted * ask.cost
            wants[names[which]] = ask.cost
            line = [place.holder_id for place in oracle.keys["key"].line]
            first = line[0] if line and sum(units.values()) + wants[line[0]] <= limit else None
            assert woken == ([first] if first else []), (seed, number)
            granted, waited = granted + answer.granted, waited + bool(line)
        for caller in found:
            caller.ask(0)
        assert len(store) == 0, seed
    assert granted > 500
    assert waited > 500


def test_a_limit_that_was_lowered_grants_nothing_until_less_is_held() -> None:
    store, _, (a, b) = callers("a", "b")
    assert a.ask(0, 1, 3) == Held(3, 0)
    assert b.ask(0, 1, 1, limit=2) == Held(0, 0)
    assert a.ask(2, limit=2) == Held(0, 0)
    assert b.ask(0, 1, 1, limit=2) == Held(0, 0)
    assert a.ask(1, limit=2) == Held(0, 1)
    assert b.ask(0, 1, 1, limit=2) == Held(1, 0)
    a.ask(0)
    b.ask(0)
    assert len(store) == 0
