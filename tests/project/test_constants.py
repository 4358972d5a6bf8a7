"""Numbers that stand in more than one language: one name has one value, and what has two names is compared here."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

import pytest

from ratethrottle import rule
from ratethrottle._engine import terms
from ratethrottle.storage.redis.scripts import script

PACKAGE = Path(__file__).parents[2] / "ratethrottle"
LUA = Path(script.__wrapped__.__code__.co_filename).parent / "lua"
# How much a call may do before it defers the rest: each script counts another kind of work.
OF_ONE_SCRIPT = {"WORK_MAX"}

ENUM = re.compile(r"^    ([A-Z][A-Z\d_]+) = ([-\d_]+|1 << \d+)(?=\s|$)", re.MULTILINE)
VARIABLE = re.compile(r"^cdef int64_t ([A-Z][A-Z\d_]+) = ([^#\n]+)", re.MULTILINE)
DEFINE = re.compile(r"^ *#define (?:RT_)?([A-Z][A-Z\d_]+) (\d+)(?:LL)?(?=\s|$)", re.MULTILINE)
LOCALS = re.compile(r"^ *local ([A-Z][\w, ]*) = (.+)$", re.MULTILINE)

Constants = dict[str, dict[str, int]]  # name -> where -> value


def compiled() -> Constants:
    found: Constants = defaultdict(dict)
    sources = [path for pattern in ("*.pyx", "*.pxd") for path in PACKAGE.rglob(pattern)]
    if not sources:
        pytest.skip("testing an installed wheel, which holds no .pyx")
    for path in sources:
        text = path.read_text()
        for pattern in (ENUM, VARIABLE, DEFINE):
            for name, value in pattern.findall(text):
                number = re.sub(r"<\w+>", "", value)
                if re.fullmatch(r"[-\d_xA-F()<+ ]+", number):
                    found[name][path.name] = eval(number)
    return found


def scripted() -> Constants:
    found: Constants = defaultdict(dict)
    for path in LUA.glob("*.lua"):
        for names, values in LOCALS.findall(path.read_text()):
            for name, value in zip(names.split(", "), values.split(", "), strict=False):
                if re.fullmatch(r"\d+", value):
                    found[name][path.name] = int(value)
    return found


def named(text: str, name: str) -> list[str]:
    """What a script calls by a name, as text."""
    return [
        value
        for names, values in LOCALS.findall(text)
        for each, value in zip(names.split(", "), values.split(", "), strict=False)
        if each == name
    ]


def value(constants: Constants, name: str) -> int:
    values = set(constants[name].values())
    assert len(values) == 1, (name, constants[name])
    return values.pop()


def test_a_name_has_one_value_in_all_compiled_modules_and_scripts() -> None:
    both = compiled()
    for name, places in scripted().items():
        both[name] |= places
    assert {"UNITS_MAX", "PERIOD_US", "EACH_US", "YEAR_US"} <= {name for name, at in both.items() if len(at) > 1}
    assert not {name: at for name, at in both.items() if len(set(at.values())) > 1 and name not in OF_ONE_SCRIPT}


def test_what_the_scripts_call_otherwise_is_the_same_number() -> None:
    core, lua = compiled(), scripted()
    assert value(lua, "TICKS") == terms.TICKS == value(core, "UNKNOWN_TICKS")
    assert value(lua, "EXACT_MAX") == value(lua, "UNTOLD") == value(core, "LEVEL_MAX")
    assert value(lua, "WEEK") == value(core, "WEEK_US")
    assert value(lua, "PASSED") == value(core, "PASSED_US")
    assert value(lua, "WINDOW_MAX") == rule.MAX_WINDOW_US == value(core, "YEAR_US")
    assert value(lua, "REPAIR_US") < value(core, "LATE_US")


def test_a_sliding_window_is_exact_up_to_the_same_limit() -> None:
    text = (LUA / "state.lua").read_text()
    [limit] = re.findall(r"\bcap <= (\d+)", text)
    assert int(limit) == terms.EXACT_LIMIT
    # One unit more than the limit says that it is in debt.
    [repaired] = re.findall(r"\bv\.q == 1 and (\d+) or", (LUA / "repair.lua").read_text())
    assert value(compiled(), "EXACT_UNITS") == value(scripted(), "EXACT_UNITS") == int(repaired) == terms.EXACT_LIMIT + 1
    slots = re.findall(r"floor\(\(window \+ (\d+)\) / (\d+)\)", text)
    assert {(int(more), int(of)) for more, of in slots} == {(terms.SLOTS - 1, terms.SLOTS)}


def test_a_call_holds_as_many_items_as_the_scripts_take() -> None:
    core = compiled()
    assert script("decide").limits["items"] == script("decide").limits["keys"] == value(core, "CALL_ITEMS_MAX")
    assert script("repair").limits["items"] == script("repair").limits["keys"] == value(core, "ROWS_MAX")


def test_the_keys_of_an_epoch_and_of_a_count_have_the_sizes_that_are_read() -> None:
    core, texts = compiled(), [path.read_text() for path in LUA.glob("*.lua")]
    sizes = {int(size) for text in texts for size in re.findall(r"#(?:value|expected) [~=]= (\d+)", text)}
    assert sizes == {value(core, "EPOCH_BYTES"), value(core, "EPOCH_BYTES") + 17}  # the longer one while states are repaired
    [count] = re.findall(r"#text == (\d+)", (LUA / "beat.lua").read_text())
    [printed] = re.findall(r"call\('SET', head, format\('((?:%0\d+\.0f)+)'", (LUA / "beat.lua").read_text())
    assert value(core, "COUNT_DIGITS") == int(count) == sum(map(int, re.findall(r"%0(\d+)", printed)))


def test_what_stands_instead_of_an_answer_is_what_the_header_says() -> None:
    core, header = compiled(), script("decide").header
    codes = {name: value(core, name) for name in ("UNREADABLE", "UNSURE", "DEFERRED", "SKIPPED")}
    assert {name: int(header[name.lower()][0]) for name in codes} == codes
    bits = dict(word.split("=") for word in header["bits"])
    assert bits == {
        name.lower(): str(value(core, name))
        for name in ("JOINED", "ALTERNATIVE", "FLAGGED", "CHARGE", "REFUND", "BOOK", "EVENLY", "UNBOOK")
    }
    texts = {path.name: path.read_text() for path in LUA.glob("*.lua")}
    for name, code in codes.items():
        assert {int(number) for text in texts.values() for number in named(text, name)} == {code}, name
    why = dict(word.split("=") for word in script("repair").header["why"])
    assert {name: int(why[name]) for name in ("unreadable", "deferred")} == {
        name: value(core, f"REFUSED_{name.upper()}") for name in ("unreadable", "deferred")
    }


def test_the_letters_of_strategies_are_those_of_the_scripts() -> None:
    if not (source := PACKAGE / "_engine" / "arithmetic.pxd").exists():
        pytest.skip("testing an installed wheel, which holds no .pxd")
    letters = dict(re.findall(r"RT_([A-Z]+) = '(\w)'", source.read_text()))
    assert letters == {"BUCKET": "b", "SLIDING": "s", "COUNTER": "c", "FIXED": "f"}
    # A calendar's windows are fixed ones to the core, and have a letter in what is stored and sent.
    assert {name.removeprefix("answer_") for name in script("decide").header if name.startswith("answer_")} == {
        "d",
        *letters.values(),
    }
    kinds = {strategy: rule.RateThrottleRule("r", 1, 1, strategy=strategy).compiled.kind for strategy in rule.STRATEGIES}
    assert kinds == {
        "sliding_window": "s",
        "token_bucket": "b",
        "leaky_bucket": "b",
        "sliding_counter": "c",
        "fixed_window": "f",
    }
