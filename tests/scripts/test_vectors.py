"""Named vectors, on every subject. The name is what the vector shows; a bug adds one (`tests.scripts.agree` prints it ready-made)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import fakeredis
import pytest
import redis

from ratethrottle import CostExceedsLimit
from tests.kit.strategies import make_rule
from tests.kit.subjects import Core, Lua, Oracle, Subject

# {"name", "start_us", "rules": {letter: [strategy, limit, window_us, burst or null]}, or [strategy, limit, "day", null, timezone, anchor],
#  "steps": [[us since start, rule, "check" or "peek", cost, allowed, remaining, retry_us (-1: never), reset_us], ...]}
VECTORS = [
    json.loads(line)
    for path in sorted((Path(__file__).parents[1] / "vectors").glob("*.jsonl"))
    for line in path.read_text("utf-8").splitlines()
]

# That users can test with fakeredis is enough to know of it: it takes fifty times as long.
SMOKE = list({tuple(facts[0] for facts in vector["rules"].values()): vector for vector in VECTORS}.values())

every_vector = pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector["name"])


def run(subject: Subject, vector: dict[str, Any]) -> None:
    rules = {letter: make_rule(*facts).compiled for letter, facts in vector["rules"].items()}
    for since_us, letter, mode, cost, *expected in vector["steps"]:
        try:
            answer = subject.check(rules[letter], vector["start_us"] + since_us, cost, consume=mode == "check")
        except CostExceedsLimit:
            # The limiter refuses what can never be granted before it decides; for a storage it is a denial without an end.
            assert expected[2] == -1
            continue
        assert list(answer) == expected, f"{mode} of {cost} at {since_us}"


def test_a_name_is_a_sentence_and_no_two_vectors_share_one() -> None:
    names = [vector["name"] for vector in VECTORS]
    assert len(set(names)) == len(names) >= 40
    assert all(len(name.split()) > 3 for name in names)


@every_vector
def test_oracle(vector: dict[str, Any]) -> None:
    run(Oracle(), vector)


@every_vector
def test_core(vector: dict[str, Any]) -> None:
    run(Core(), vector)


@every_vector
def test_script(vector: dict[str, Any], redis_client: redis.Redis) -> None:
    run(Lua(redis_client), vector)


@pytest.mark.parametrize("vector", SMOKE, ids=lambda vector: vector["name"])
def test_script_on_fakeredis(vector: dict[str, Any], fake_server: fakeredis.FakeServer) -> None:
    run(Lua(fakeredis.FakeRedis(server=fake_server)), vector)
