"""No compiled module, class or function, and no function of a script, outgrows what one can hold in mind at once."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from ratethrottle.storage.redis.scripts import script

PACKAGE = Path(__file__).parents[2] / "ratethrottle"
LUA = Path(script.__wrapped__.__code__.co_filename).parent / "lua"
LINES_MAX, FIELDS_MAX, FUNCTION_LINES_MAX = 650, 25, 60

FUNCTION = re.compile(r"( *)(?:cdef|def|async def) (?!class\b).*?\b(\w+)\(")
CLASS = re.compile(r"cdef class (\w+)")


def functions(text: str) -> Iterator[tuple[str, int]]:
    """Each function of Cython source by name, with how many lines it has; blank ones behind it don't count."""
    lines = text.splitlines()
    for first, line in enumerate(lines):
        if (found := FUNCTION.match(line)) is None:
            continue
        indent, last, opened = len(found[1]), first, line.count("(") - line.count(")")
        for at in range(first + 1, len(lines)):
            if opened <= 0 and lines[at].strip() and len(lines[at]) - len(lines[at].lstrip()) <= indent:
                break
            opened += (lines[at].count("(") - lines[at].count(")")) if opened > 0 else 0
            last = at if lines[at].strip() else last
        if last > first:  # else it is only declared
            yield found[2], last - first + 1


def fields(text: str) -> Iterator[tuple[str, int]]:
    """Each extension type that Cython source declares, with how many attributes it has."""
    for part in re.split(r"^(?=cdef class \w)", text, flags=re.MULTILINE)[1:]:
        body = re.split(r"^(?=\S)", part.partition("\n")[2], maxsplit=1, flags=re.MULTILINE)[0]
        declared = [line.partition("#")[0] for line in body.splitlines() if re.match(r"    cdef (?!inline)[^(#]*(#|$)", line)]
        yield CLASS.match(part)[1], sum(line.count(",") + 1 for line in declared)  # type: ignore[index]  # it begins so


def lua_functions(text: str) -> Iterator[tuple[str, int]]:
    """Each function of a script by name, with how many lines it has; functions in it, with their comments, count for themselves alone."""
    opened: list[tuple[str, str, list[str]]] = []  # how its last line begins, its name, its lines
    for line in text.splitlines():
        found = re.match(r"( *)(?!--)(?:\S.*)?\bfunction\b *(\w*) *\(", line)
        if found and not re.search(r"\bend\b", line):
            while opened and re.match(r" *(--|$)", opened[-1][2][-1]):
                opened[-1][2].pop()
            opened.append((f"{found[1]}end", found[2], [line]))
        elif opened:
            opened[-1][2].append(line)
            if re.match(rf"{opened[-1][0]}\b", line):
                _, name, lines = opened.pop()
                yield name, len(lines)
    assert not opened, f"{opened[-1][1]} has no end"


def sources(*suffixes: str) -> list[Path]:
    found = [path for path in sorted(PACKAGE.rglob("*")) if path.suffix in suffixes]
    return found or [pytest.skip("testing an installed wheel, which holds no sources")]


def test_compiled_modules_are_short() -> None:
    assert not {path.name: lines for path in sources(".pyx") if (lines := len(path.read_text().splitlines())) > LINES_MAX}


def test_compiled_classes_have_few_fields() -> None:
    found = [(name, count) for path in sources(".pyx", ".pxd") for name, count in fields(path.read_text())]
    assert max(count for name, count in found if name == "CheckCall") >= 5
    assert not [(name, count) for name, count in found if count > FIELDS_MAX]


def test_compiled_functions_are_short() -> None:
    found = [(name, lines) for path in sources(".pyx", ".pxd") for name, lines in functions(path.read_text())]
    assert len(found) > 400
    assert not [(name, lines) for name, lines in found if lines > FUNCTION_LINES_MAX]


def test_functions_of_scripts_are_short() -> None:
    """But for the fast path, which is one piece, in a file of its own."""
    scripts = sorted(LUA.glob("*.lua"))
    found = [(path.name, name, lines) for path in scripts for name, lines in lua_functions(path.read_text())]
    assert len(found) > 60
    assert {"decide", "read_rules", "count", "roll"} <= {name for _, name, _ in found}
    assert not [each for each in found if each[2] > FUNCTION_LINES_MAX]
    assert not re.search(r"\bfunction\b", "".join(re.findall(r"^(?! *--).*", (LUA / "simple.lua").read_text(), re.MULTILINE)))


def test_what_is_too_long_is_found() -> None:
    inner = "\n  -- What it does.\n  local function inner()\n" + "    -- x\n" * 70 + "  end\n"
    lua = "local function outer()\n" + inner + "  return inner\nend\n"
    assert dict(lua_functions(lua + "-- a function (of none)\nsort(x, function(a, b) return a < b end)\n")) == {
        "inner": 72,
        "outer": 3,
    }
    long = (
        "cdef int long(int a,\n              int b) except -1:\n"
        + "    a += b\n" * 60
        + "\n\ncdef int short() noexcept:\n    return 0\n"
    )
    assert dict(functions(long)) == {"long": 62, "short": 2}
    assert dict(functions("cdef class A:\n    cdef int declared(self) except -1\n")) == {}
    wide = (
        "cdef class Wide:\n    cdef int a, b\n    cdef readonly object c   # of (some) kind\n\n    cdef int run(self) except -1\n"
    )
    assert dict(fields(wide)) == {"Wide": 3}
