"""The error tree is the one that is drawn, and every error survives a trip to another process."""

from __future__ import annotations

import copy
import pickle

import pytest

from ratethrottle import InMemoryStorage, RateThrottleCore, RateThrottleRule, errors
from ratethrottle.errors import RateThrottleError


def every_error() -> list[type[RateThrottleError]]:
    found, queue = [], [RateThrottleError]
    while queue:
        kind = queue.pop()
        found.append(kind)
        queue += kind.__subclasses__()
    return found


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    lines = [line for line in (errors.__doc__ or "").splitlines() if line.startswith("    ") and line.strip()]
    drawn: dict[str, tuple[int, str]] = {}
    parents: list[str] = []
    for line in lines:
        name, _, other = line.strip(" │├└─").partition(" ")
        depth = (len(line) - len(line.lstrip(" │├└─")) - 4) // 4
        parents[depth:] = [name]
        drawn[name] = (depth, other.strip("()"))
        kind = getattr(errors, name)
        bases = [base.__name__ for base in kind.__bases__]
        assert bases == [parents[depth - 1] if depth else "Exception", *([other.strip("()")] if other else [])]
    assert set(drawn) == {kind.__name__ for kind in every_error()}


async def one_of_each() -> list[RateThrottleError]:
    limiter = RateThrottleCore(InMemoryStorage(), rules=[RateThrottleRule("rule", 1, 60)])
    decision = await limiter.check("secret-key")
    return [
        errors.RateThrottleError("what"),
        errors.ConfigurationError("what"),
        errors.InvalidRequest("what"),
        errors.CostExceedsLimit(5, 1, "rule"),
        errors.RateLimitExceeded(decision),
        errors.LimiterClosed(),
        errors.StorageError("what"),
        errors.StorageUnavailable("what"),
        errors.StorageRefused("what"),
        errors.StorageTimeout(0.25),
        errors.StorageProtocolError("what"),
        errors.StateUnreadable("rule"),
    ]


async def test_every_error_pickles_and_copies_with_its_words_and_facts() -> None:
    made = await one_of_each()
    assert {type(error) for error in made} == set(every_error())
    for error in made:
        for twin in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
            assert type(twin) is type(error)
            assert str(twin) == str(error)
            assert vars(twin) == vars(error)
        assert "secret-key" not in str(error)
        assert "secret-key" not in repr(error)


def test_errors_are_also_what_callers_of_other_libraries_catch() -> None:
    assert issubclass(errors.InvalidRequest, ValueError)
    assert issubclass(errors.StorageUnavailable, ConnectionError)
    with pytest.raises(TimeoutError):
        raise errors.StorageTimeout(0.25)


async def test_a_denial_that_is_raised_says_by_what_and_for_how_long() -> None:
    limiter = RateThrottleCore(InMemoryStorage(clock_us=lambda: 0), rules=[RateThrottleRule("rule", 3, 60)])
    await limiter.check("key", cost=2)
    denied = errors.RateLimitExceeded(await limiter.check("key", cost=2))
    assert str(denied) == "rule 'rule' denied a cost of 2 with 1 of 3 left; retry in 60 s"
    assert denied.decision.retry_after == 60
    never = errors.RateLimitExceeded(limiter._entry("key").decided("redis", False, 0, -1, 5))
    assert str(never).endswith("; it can never be allowed: raise the limit, or ask for less")
    away = errors.RateLimitExceeded(limiter._entry("key").decided("overload", False, 0, 250_000, 250_000))
    assert str(away).endswith("; the storage didn't answer in time: retry in 0.25 s")
    no_slot = errors.RateLimitExceeded(limiter._entry("key").decided("outage", False, 0, 0, 0))
    assert str(no_slot).endswith("; the storage didn't answer in time: retry later, or wait for a slot with a timeout")


def test_errors_of_facts_word_themselves() -> None:
    too_much = errors.CostExceedsLimit(5, 3, "rule")
    assert str(too_much).startswith("a cost of 5 can never be allowed: rule 'rule' has a capacity of 3;")
    assert (too_much.cost, too_much.capacity, too_much.rule) == (5, 3, "rule")
    assert "some int that can't be shown" in str(errors.CostExceedsLimit(10**5000, 3, "rule"))
    assert str(errors.StorageTimeout(0.25)) == "no answer from the storage within 0.25 s"
    assert errors.StorageTimeout(0.25).deadline_s == 0.25
    assert "closed" in str(errors.LimiterClosed())


def test_what_a_message_shows_of_a_value_is_short_and_never_fails() -> None:
    class Strange:
        def __repr__(self) -> str:
            raise RuntimeError

    assert errors.shown("5") == "'5'"
    assert len(errors.shown("x" * 10**6)) == 60
    assert errors.shown(Strange()) == "some Strange that can't be shown"
    assert errors.shown(10**5000) == "some int that can't be shown"
