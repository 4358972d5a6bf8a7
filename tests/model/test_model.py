"""Every state of small models keeps the promise, and each thing that the protocol does for it is needed."""

from __future__ import annotations

import pytest

from .protocol import Config
from .search import search

# The suite has half a minute for all of them; `make model-short`, of `make ci`, and `make model` have larger ones (__main__.py).
SOUND = {
    "a reset": Config(limit=1, resets=1, faults=1),
    "local shares": Config(local=True, faults=1),
    "two connections": Config(limit=1, connections=2, faults=1),
}
# Each in the smallest model that shows it: most of them are caught where one thing goes wrong.
MUTANTS = [
    # Only with two units can the larger be less than the sum.
    Config(mutant="max-merge", faults=1, learn=1, repair=2),
    Config(mutant="base stays", limit=1),
    Config(mutant="no learning", faults=1),
    Config(mutant="waits for nobody", limit=1),
    Config(mutant="epoch unchecked", limit=1),
    Config(mutant="generation ignored", resets=1, faults=1),
    Config(mutant="generation untold", resets=1, faults=1),
    Config(mutant="no marker", local=True, losses=0),
    Config(mutant="charge forgotten", local=True, faults=1),
    Config(mutant="late grant", limit=1, connections=2, learn=1, repair=2, faults=1),
    Config(mutant="no gate", limit=1, learn=1, repair=2, faults=1),
    Config(mutant="oldest first", limit=1),
    Config(mutant="held till failover", limit=1, learn=1, repair=2, faults=1),
]


@pytest.mark.slow
@pytest.mark.parametrize("config", SOUND.values(), ids=SOUND)
def test_every_state_keeps_the_promise_and_lets_everybody_in_again(config):
    result = search(config)
    assert not result.broken, str(result)


def test_a_store_that_lets_nothing_go_locks_everybody_out():
    """It keeps every promise, so that only the search for a way back in can find it."""
    assert search(Config(mutant="kept for ever", limit=1, faults=0)).broken == "somebody is locked out"


@pytest.mark.slow
@pytest.mark.parametrize("config", MUTANTS, ids=lambda config: config.mutant)
def test_a_protocol_without_one_of_its_parts_is_caught(config):
    result = search(config, lockouts=False)  # each breaks a promise
    assert result.broken
    assert result.trace, "a mutant that is wrong from the start shows nothing"
    print(result)
