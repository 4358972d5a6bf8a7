"""tests/README.md maps every test of an idea, and the pages that name tests and rows of the fault board name some that are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.faults import board
from tests.faults.rows import load

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests"
NAMING = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "ARCHITECTURE.md", ROOT / "CONTRIBUTING.md", TESTS / "README.md"]
ROWS = re.compile(r"\b[Rr]ows? ((?:`[\w-]+…?`(?:, and |, | and )?)+)")


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_map_shows_each_idea_in_each_folder_where_it_is_tested() -> None:
    lines = (TESTS / "README.md").read_text().splitlines()
    start = next(at for at, line in enumerate(lines) if line.startswith("| idea |"))
    folders = cells(lines[start])[1:]
    mapped: set[tuple[str, str]] = set()
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        idea, *marks = cells(line)
        assert len(marks) == len(folders), line
        mapped |= {(folder, idea.split("`")[1]) for folder, mark in zip(folders, marks, strict=True) if mark}
    there = {
        (path.parent.name, path.stem.removeprefix("test_")) for folder in folders for path in (TESTS / folder).glob("test_*.py")
    }
    assert mapped == there


def test_every_folder_is_explained() -> None:
    page = (TESTS / "README.md").read_text()
    folders = {path.name for path in TESTS.iterdir() if path.is_dir() and not path.name.startswith("_")}
    assert not {folder for folder in folders if f"`{folder}/`" not in page}


@pytest.mark.parametrize("page", NAMING, ids=lambda page: page.name)
def test_tests_that_a_page_names_are_there(page: Path) -> None:
    named = re.findall(r"`(tests/[\w/.]+)`", page.read_text())
    assert not [name for name in named if not (ROOT / name).exists()]


@pytest.mark.parametrize("page", [ROOT / "ARCHITECTURE.md", ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_files_and_folders_that_a_page_names_are_there(page: Path) -> None:
    """A path may begin in the repository, in the package, or in one of its rooms."""
    if not (ROOT / "ratethrottle").is_dir():
        pytest.skip("testing an installed wheel, beside which there are no sources")
    named = set(re.findall(r"`((?:[\w-]+/)+[\w.-]*|[\w-]+\.(?:pyx?|pxd|lua|md))`", page.read_text()))
    rooms = [ROOT, *(ROOT / "ratethrottle" / room for room in ("", "_engine", "storage/redis", "storage/redis/lua"))]
    assert len(named) >= 10
    assert not [name for name in named if not any((room / name).exists() for room in rooms)]


def test_rows_of_the_fault_board_that_the_guarantees_name_are_there() -> None:
    load()
    rows = set(board.rows())
    told = ROWS.findall((ROOT / "docs/guarantees.md").read_text())
    named = [name for names in told for name in re.findall(r"`([\w…-]+)`", names)]
    assert len(named) >= 30
    assert not [name for name in named if not any(row == name or (name[-1] == "…" and row.startswith(name[:-1])) for row in rows)]
