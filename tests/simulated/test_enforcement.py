"""Processes whose rule only flags leave the store as those whose rule denies, whatever happens between them and the store."""

from __future__ import annotations

import random

import pytest
import redis

from ratethrottle import RateThrottleRule
from tests.kit.processes import Process, World
from tests.kit.strategies import STRATEGIES

pytestmark = pytest.mark.redis


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("lease", [False, True])
def test_the_same_checks_are_granted_whether_a_rule_denies_or_flags(
    redis_client: redis.Redis, strategy: str, lease: bool
) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")  # a failure shows it
    seen = []
    for enforce in ("deny", "flag"):
        rng = random.Random(seed)
        rule = RateThrottleRule("r", 30, 2, strategy=strategy, lease=lease, enforce=enforce).compiled  # type: ignore[arg-type]
        world = World(redis_client)
        processes = [Process(world, deny_overload=True) for _ in range(2)]
        for _ in range(200):
            process = rng.choice(processes)
            match rng.randrange(4):
                case 0 | 1:
                    process.check("k", rule, rng.choice((1, 1, 3)))
                case 2:
                    world.t_us += rng.choice((1, 700, 20_000, 300_000))
                case 3:
                    process.round_trip()
        world.end()
        checks = [check for process in processes for check in process.checks]
        assert all(check.decision.allowed for check in checks) or enforce == "deny"
        seen.append([
            (check.decision.allowed and not check.decision.over, check.decision.source, check.decision.remaining,
             check.decision.retry_after_us)
            for check in checks
        ])  # fmt: skip
    assert seen[0] == seen[1]
    assert {granted for granted, *_ in seen[0]} == {True, False}
