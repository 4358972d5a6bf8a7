"""Which callbacks hear of what, how often, and that their errors hurt nobody."""

from __future__ import annotations

import copy
import functools
import inspect
import logging
import pickle
import re
import subprocess
import sys
import time
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path
from typing import Any

import pytest

from ratethrottle import (
    ConfigurationError,
    InMemoryStorage,
    Outcomes,
    RateThrottleCore,
    RateThrottleRule,
    Statistics,
    create_limiter,
    events,
)
from ratethrottle.events import Event, Events, OutageBegan, OutageEnded
from ratethrottle.options import OPTIONS

OPERATIONS = Path(__file__).parents[2] / "docs/operations.md"
ONE_OF_EACH = [
    events.OutageBegan("Redis can't be reached (OSError)", "local"),
    events.OutageEnded(12.345, 67),
    events.MasterMoved("10.0.0.1:6379", "10.0.0.2:6379"),
    events.StateLost(5),
    events.RepairRefused("the key holds a hash"),
    events.Desync("a reply to another request"),
    events.BoundsEvicted(8),
    events.Evicted(8),
    events.Refused("Redis refused the user or the password"),
    events.UnreadableState("rule"),
    events.UnsettledReservation("app.py:42"),
    events.SlotLost("exports", 3),
]


class Told:
    """Events on a clock of the test's own, and what a subscriber hears of them."""

    def __init__(self) -> None:
        self.now_s = 1_000.0
        self.events = Events(clock_s=lambda: self.now_s)
        self.heard: list[Event] = []
        self.remove = self.events.subscribe(self.heard.append)

    def emit(self, *told: Event) -> list[Event]:
        """Emit events, and give back what went out."""
        self.heard.clear()
        for event in told:
            self.events.emit(event)
        return list(self.heard)


@pytest.fixture
def told() -> Told:
    return Told()


BEGAN, ENDED = OutageBegan("why", "deny"), OutageEnded(1.0, 2)
DESYNC = events.Desync("what")


def test_there_is_one_of_each_here() -> None:
    kinds = [kind for _, kind in inspect.getmembers(events, inspect.isclass) if issubclass(kind, Event) and kind is not Event]
    assert {type(event) for event in ONE_OF_EACH} == set(kinds)
    assert len({event.kind for event in ONE_OF_EACH}) == len(kinds)


@pytest.mark.parametrize("event", ONE_OF_EACH, ids=lambda event: event.kind)
def test_an_event_is_a_fact_in_one_line(event: Event) -> None:
    assert event.at == pytest.approx(time.time(), abs=3600)
    assert str(event) == event.message
    assert "\n" not in event.message
    with pytest.raises(FrozenInstanceError):
        event.at = 0.0  # type: ignore[misc]  # the test
    assert not hasattr(event, "__dict__")
    for twin in (pickle.loads(pickle.dumps(event)), copy.copy(event)):
        assert twin == event


@pytest.mark.parametrize(
    ("event", "words"),
    [
        (ONE_OF_EACH[0], """outage: Redis can't be reached (OSError); checks are decided by on_outage="local" until"""),
        (ONE_OF_EACH[1], "the outage ended after 12.3 s; 67 checks were decided by policy"),
        (ONE_OF_EACH[2], "failover: the master moved from 10.0.0.1:6379 to 10.0.0.2:6379"),
        (
            events.StateLost(5),
            "Redis lost state (failover, flush or restart); this process gives back what it knows of up to 5 keys",
        ),
        (events.RepairRefused("x"), "Redis didn't take back what this process knew of some keys: x"),
        (events.Desync("x", suppressed=3), "Redis sent x; the connection was dropped (is there a proxy in between?) (3 more"),
    ],
)
def test_what_a_person_reads(event: Event, words: str) -> None:
    assert str(event).startswith(words)


def test_one_of_a_kind_a_second_and_the_next_one_counts_the_others(told: Told) -> None:
    assert told.emit(DESYNC, DESYNC, DESYNC, ONE_OF_EACH[2]) == [DESYNC, ONE_OF_EACH[2]]
    told.now_s += 0.999
    assert told.emit(DESYNC) == []
    told.now_s += 0.001
    [event] = told.emit(DESYNC)
    assert event.suppressed == 3
    told.now_s += 1
    [event] = told.emit(DESYNC)
    assert event.suppressed == 0


@pytest.mark.parametrize("event", ONE_OF_EACH[6:10], ids=lambda event: event.kind)
def test_what_goes_on_for_hours_goes_out_once_a_minute(event: Event, told: Told) -> None:
    heard = 0
    for _ in range(3_600):
        heard += len(told.emit(event))
        told.now_s += 1
    assert heard == 60


def test_a_refusal_in_other_words_goes_out_at_once(told: Told) -> None:
    """Somebody mends the password, and a permission is missing: a minute is long then. But a text that always changes is no flood."""
    password, permission = events.Refused("the password"), events.Refused("a permission")
    assert told.emit(password, permission, password, permission) == [password, permission]
    told.now_s += 60
    assert [event.suppressed for event in told.emit(permission, password)] == [2, 0]
    told.now_s += 60
    assert len(told.emit(*[events.Refused(f"number {number}") for number in range(1_000)])) == 11


def test_the_end_of_an_outage_goes_out_if_its_beginning_did(told: Told) -> None:
    assert told.emit(BEGAN, ENDED) == [BEGAN, ENDED]
    told.now_s += 1
    assert told.emit(BEGAN) == [BEGAN]
    told.now_s += 0.1
    assert told.emit(ENDED) == [ENDED]


def test_outages_in_quick_succession_are_counted_both_ends(told: Told) -> None:
    assert told.emit(*[BEGAN, ENDED] * 5) == [BEGAN, ENDED]
    told.now_s += 1
    assert [event.suppressed for event in told.emit(BEGAN, ENDED)] == [4, 4]


def test_an_outage_that_was_left_out_at_first_goes_out_while_it_lasts(told: Told) -> None:
    """Otherwise an outage of an hour is silent because a short one came just before it."""
    long = OutageBegan("a long one", "deny", at=5.0)
    assert told.emit(BEGAN, ENDED, long) == [BEGAN, ENDED]
    told.now_s += 0.5
    assert told.emit(OutageBegan("an attempt that failed", "deny")) == []
    told.now_s += 0.5
    assert told.emit(OutageBegan("another one", "deny")) == [long]
    told.now_s += 5
    assert told.emit(BEGAN, BEGAN) == []
    assert told.emit(ENDED) == [ENDED]


def test_another_reason_of_an_outage_is_logged_once_a_minute(told: Told, caplog: pytest.LogCaptureFixture) -> None:
    """The first may have been that nothing came in time, and only later the name turns out to be unknown."""
    told.emit(BEGAN)
    caplog.clear()
    for _ in range(120):
        told.events.goes_on(BEGAN.reason)
        told.events.goes_on("Name or service not known")
        told.now_s += 1
    assert [record.message for record in caplog.records] == ["the outage goes on: Name or service not known"] * 2
    told.emit(ENDED)
    told.events.goes_on("Name or service not known")
    assert len(caplog.records) == 2


def test_an_end_without_a_beginning_does_not_go_out(told: Told) -> None:
    assert told.emit(ENDED) == []


def test_each_one_goes_to_the_log_at_its_level(told: Told, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "ratethrottle"):
        told.emit(*ONE_OF_EACH)
    assert [record.getMessage() for record in caplog.records] == [event.message for event in ONE_OF_EACH]
    assert {record.name for record in caplog.records} == {"ratethrottle"}
    levels = [record.levelname for record in caplog.records]
    assert levels == ["WARNING", "INFO", *["WARNING"] * 6, "ERROR", "ERROR", "WARNING", "WARNING"]


def test_nothing_is_printed_unasked() -> None:
    code = "from ratethrottle import events; e = events.Events(); e.subscribe(lambda x: 1 / 0); e.emit(events.Refused('why'))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (run.stdout, run.stderr) == ("", "")


def test_a_callback_that_raises_is_logged_and_hurts_nobody(told: Told, caplog: pytest.LogCaptureFixture) -> None:
    def broken(event: Event) -> None:
        raise RuntimeError("mine")

    told.remove()
    told.events.subscribe(broken)
    told.remove = told.events.subscribe(told.heard.append)
    assert told.emit(DESYNC) == [DESYNC]
    assert "a callback of on_event failed" in caplog.text
    assert "RuntimeError: mine" in caplog.text


def test_a_filter_of_the_log_that_raises_hurts_nobody(told: Told) -> None:
    def broken(record: logging.LogRecord) -> bool:
        raise RuntimeError

    events.LOGGER.addFilter(broken)
    try:
        assert told.emit(DESYNC) == [DESYNC]
    finally:
        events.LOGGER.removeFilter(broken)


def test_a_subscriber_may_go_and_come_at_any_time(told: Told) -> None:
    again = told.events.subscribe(told.heard.append)
    once: list[Any] = []

    def leave(event: Event) -> None:
        once.append(event)
        remove()

    remove = told.events.subscribe(leave)
    assert told.emit(DESYNC, ONE_OF_EACH[2]) == [DESYNC, DESYNC, ONE_OF_EACH[2], ONE_OF_EACH[2]]
    assert once == [DESYNC]
    again()
    again()
    told.now_s += 1
    assert told.emit(DESYNC) == [DESYNC]
    told.remove()
    told.now_s += 1
    assert told.emit(DESYNC) == []


async def forgotten(event: Event) -> None: ...


class Forgotten:
    async def __call__(self, event: Event) -> None: ...

    async def method(self, event: Event) -> None: ...


@pytest.mark.parametrize("callback", [forgotten, Forgotten(), Forgotten().method, functools.partial(forgotten)])
def test_an_async_callback_is_refused(callback: Any) -> None:
    with pytest.raises(ConfigurationError, match="takes a plain function, and this one is async"):
        create_limiter().on_event(callback)


@pytest.mark.parametrize("callback", [None, "print", 5])
def test_what_is_no_callback_is_refused(callback: Any) -> None:
    with pytest.raises(ConfigurationError, match="takes a function of one event"):
        create_limiter().on_event(callback)


async def test_a_limiter_passes_on_the_events_of_its_storage() -> None:
    storage = InMemoryStorage()
    limiter = RateThrottleCore(storage)
    heard: list[Event] = []
    remove = limiter.on_event(heard.append)
    storage.events.emit(DESYNC)
    remove()
    storage.events.emit(ONE_OF_EACH[2])
    assert heard == [DESYNC]


async def test_the_statistics_of_a_storage_in_memory() -> None:
    limiter = create_limiter(rules=[RateThrottleRule("r", 5, 60)], max_keys=2)
    assert replace(limiter.statistics(), decisions={}) == Statistics()
    for number in range(5):
        await limiter.check(f"user:{number}")
    assert replace(limiter.statistics(), decisions={}) == Statistics(keys=2, evictions=3)
    assert limiter.statistics().decisions["r"]["memory"] == Outcomes(allowed=5)
    await limiter.aclose()
    assert limiter.statistics().keys == 2


async def test_memory_is_a_storage_that_is_always_there() -> None:
    async with create_limiter(require_storage=True, rules=[RateThrottleRule("r", 5, 60)]) as limiter:
        assert await limiter.check("user")
    with pytest.raises(ConfigurationError, match="require_storage is 'yes'; it is True or False"):
        create_limiter(require_storage="yes")  # type: ignore[arg-type]  # the test


def names_in(heading: str) -> set[str]:
    """What stands in backticks in the first column of the tables below a heading of the page."""
    section = OPERATIONS.read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    cells = [line.split("|")[1] for line in section.splitlines() if line.startswith("|")]
    return {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}


def test_the_page_for_operators_names_what_there_is() -> None:
    if not OPERATIONS.exists():
        pytest.skip("testing an installed wheel, which holds no docs")
    assert names_in("Statistics") == {field.name for field in fields(Statistics)}
    assert names_in("Events") == {type(event).__name__ for event in ONE_OF_EACH}
    page = OPERATIONS.read_text()
    for event in ONE_OF_EACH:
        name = logging.getLevelName(event.level).lower()
        assert f"| `{type(event).__name__}` | `{event.kind}` | {name} |" in page
    assert all(f"`{name}" in page for name in ("on_outage", "expected_processes", "on_overload", "max_connections"))
    assert all(f'`"{policy}"`' in page for policy in re.findall(r'"(\w+)"', OPTIONS["on_outage"][3]))
    for field in fields(Statistics):
        assert f"{field.name}:" in (Statistics.__doc__ or "")


def test_the_example_of_the_page_for_operators_runs() -> None:
    if not OPERATIONS.exists():
        pytest.skip("testing an installed wheel, which holds no docs")
    code = OPERATIONS.read_text().split("```python\n")[1].split("```")[0]
    code += "limiter._storage.events.emit(events.OutageBegan('why', 'local'))\n"
    code += "limiter._storage.events.emit(events.OutageEnded(12.3, 4))\n"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "without Redis for 12.3 s\n"
    assert run.stderr.splitlines()[1].startswith("INFO:ratethrottle:the outage ended after 12.3 s; 4 checks")
