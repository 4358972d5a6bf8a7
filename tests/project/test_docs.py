"""The README and the pages of docs/: their code runs, their links lead somewhere, their sentences are short.

`make docs` builds the site, and fails for a link between its pages that leads nowhere.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ratethrottle.options import OPTIONS
from ratethrottle.rule import STRATEGIES
from tests.kit.servers import RedisServer

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [README, *DOCS]
FOR_CONTRIBUTORS = [ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", ROOT / "tests/README.md"]
# Markdown that links to the pages above, and to the files of the repository.
LINKING = [*PAGES, *FOR_CONTRIBUTORS, ROOT / "ARCHITECTURE.md", ROOT / "CHANGELOG.md"]
ARCHITECTURE = ROOT / "ARCHITECTURE.md"
WRITTEN = [*PAGES, *FOR_CONTRIBUTORS, ARCHITECTURE, ROOT / "CHANGELOG.md"]

WORDS_MAX = 30
# An example may say why it isn't run, and what it prints.
EXAMPLE = re.compile(
    r"^(?:<!-- not run: (?P<why>.+) -->\n\n?)?```python\n(?P<code>.*?)^```\n(?:\n(?:It prints:\n\n)?```text\n(?P<prints>.*?)^```\n)?",
    re.MULTILINE | re.DOTALL,
)
FENCED = re.compile(r"^( *)(```+|~~~+).*?^\1\2\n", re.MULTILINE | re.DOTALL)
# What a busy machine takes longer for than the default deadline isn't what an example shows.
PATIENCE = "import ratethrottle; ratethrottle.RedisStorage.__init__.__kwdefaults__['deadline'] = 10.0\n"
WHO = re.compile(r"(?:^|[.;:] |# |-- |\"{3}|\()Who(?:ever)? [a-z](?!.*\?)")
# Old phrases: passives that hide what acts, and "comes to" for "is".
OLD = re.compile(
    r"\b(?:(?:is|are|was|were|be|been|being) (?:told(?! apart)|let go)|let go of|(?:comes?|came) to (?:nothing|the same|an end|its end)"
    r"|whoever(?! is on call))\b"
)
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)")


def example(page: Path, found: re.Match[str]) -> object:
    line = page.read_text()[: found.start()].count("\n") + 1
    return pytest.param(found["why"], found["code"], found["prints"], id=f"{page.name}:{line}")


EXAMPLES = [example(page, found) for page in PAGES for found in EXAMPLE.finditer(page.read_text())]


@pytest.mark.redis
@pytest.mark.parametrize(("why", "code", "prints"), EXAMPLES)
def test_an_example_runs_and_prints_what_it_says(
    why: str | None, code: str, prints: str | None, request: pytest.FixtureRequest
) -> None:
    if why is not None:
        pytest.skip(why)
    if "localhost:6379" in code or 'host="localhost", port=6379' in code:
        server: RedisServer = request.getfixturevalue("redis_server")
        code = PATIENCE + code.replace("localhost:6379", f"127.0.0.1:{server.port}").replace("port=6379", f"port={server.port}")
    command = [sys.executable, "-W", "error", "-c", code]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 0, ran.stderr
    if prints is not None:
        assert ran.stdout == prints


def slug(heading: str) -> str:
    """The anchor that GitHub and MyST give to a heading."""
    text = re.sub(r"[`*]", "", heading.strip()).lower()
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


def anchors(page: Path) -> set[str]:
    return {slug(heading) for heading in re.findall(r"^#+ (.*)$", FENCED.sub("", page.read_text()), re.MULTILINE)}


@pytest.mark.parametrize("page", LINKING, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings_that_are_there(page: Path) -> None:
    lost = []
    for found in LINK.finditer(FENCED.sub("", page.read_text())):
        target = found[1] or found[2]
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            lost.append(target)
    assert not lost


def prose(text: str) -> str:
    """The text without code, tables, comments, headings and targets of links; what was code within a line is one word."""
    text = FENCED.sub("\n\n", text)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"^(\||#|\s*!\[| {4,}(?=[A-Z]{3,})).*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"``?[^`]+``?", "code", text)
    return re.sub(r"\]\([^)]*\)", "]", text)


def sentences(text: str) -> Iterator[str]:
    """Each sentence of Markdown. An item of a list ends one, a colon or a semicolon doesn't."""
    for block in re.split(r"\n\s*\n|\n(?=\s*(?:[-*]|\d+\.) )", prose(text)):
        words = " ".join(re.sub(r"^\s*(?:[-*]|\d+\.) ", "", block).split())
        words = re.sub(r"\*\*|\*(?=\w)|(?<=\w)\*|(?<=[.:])\*", "", words)
        yield from (sentence for sentence in re.split(r"(?<=[.!?])[)\"]? +(?=[\"(\[A-Z0-9c])", words) if sentence)


def in_cells(text: str) -> Iterator[str]:
    """Each sentence in the tables of Markdown. A cell ends one."""
    for line in FENCED.sub("", text).splitlines():
        if line.lstrip().startswith("|"):
            for cell in re.sub(r"`[^`]+`", "code", line).split("|"):
                yield from sentences(cell)


def too_long(text: str) -> list[str]:
    counted = ((len(re.findall(r"[^\W_][\w'’./^-]*", sentence)), sentence) for sentence in [*sentences(text), *in_cells(text)])
    return [f"{count} words: {sentence}" for count, sentence in counted if count > WORDS_MAX]


def riddles(text: str) -> list[str]:
    """Sentences whose subject is a "Who ..." clause, and those with an old phrase."""
    return [
        sentence
        for sentence in [*sentences(text), *in_cells(text)]
        if re.match(r"Who\b(?!.*\?)", sentence) or OLD.search(sentence)
    ]


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.name)
def test_no_sentence_is_longer_than_thirty_words(page: Path) -> None:
    assert not too_long(page.read_text())


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.name)
def test_no_sentence_is_a_riddle(page: Path) -> None:
    assert not riddles(page.read_text())


def test_no_comment_docstring_or_message_is_a_riddle() -> None:
    found = []
    for folder in ("ratethrottle", "tests", "benchmarks", "examples", "tools"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in {".py", ".pyx", ".pxd", ".pyi", ".lua"} and path != Path(__file__):
                for at, line in enumerate(path.read_text().splitlines(), 1):
                    if WHO.search(line) or OLD.search(line):
                        found.append(f"{path.name}:{at}: {line.strip()}")
    assert not found


def test_long_sentences_and_riddles_are_found() -> None:
    thirty = " ".join(["word"] * 30)
    assert not too_long(f"# A heading\n\n{thirty}.\n\n- {thirty}. {thirty[5:].title()}: `code of more words`.\n")
    assert len(too_long(f"{thirty} word.\n\n- {thirty}; word.\n")) == 2
    assert not too_long(f"```python\n{thirty} {thirty}\n```\n\n| {thirty} | {thirty}. {thirty.title()} |\n")
    assert len(too_long(f"| a | {thirty} word |\n")) == 1
    assert len(riddles("It is so. Who comes late\nwaits.\n\n| Who waits |\n")) == 2
    assert WHO.search("x = 1  # It is so. Who comes late waits.")
    assert not WHO.search("# Who waits, and for how long?")
    old = "It is told what was used. It has let go of it. It comes to the same. It is for whoever asks.\n\n| It was told |\n"
    assert len(riddles(old)) == 5
    assert not riddles("They are told apart. It has told all. It comes to a connection, for whoever is on call. It can let go.\n")
    assert not riddles("A process that comes late waits. Nobody knows who waits. Who waits?\n")


def test_the_readme_is_short() -> None:
    lines = README.read_text().splitlines()
    assert len(lines) <= 110
    assert not [line for line in lines if len(line) > 100]


def test_the_architecture_is_short_and_names_each_room() -> None:
    text = ARCHITECTURE.read_text()
    assert len(text.splitlines()) <= 120
    named = set(re.findall(r"[\w.]+", " ".join(re.findall(r"`[^`]+`", text))))
    package = ROOT / "ratethrottle"
    files = [path for part in ("_engine", "storage/_shared", "storage/redis") for path in (package / part).glob("*.p*")]
    rooms = {path.stem for path in files if path.suffix in {".py", ".pyx", ".pxd"} and not path.stem.startswith("__")}
    assert not sorted(room for room in rooms if not named & {room, f"{room}.pyx", f"{room}.pxd", f"{room}.py"})


def rows(page: Path) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in page.read_text().splitlines() if line[:1] == "|"]


def test_the_table_of_options_is_that_of_the_code() -> None:
    table = {row[0].strip("`"): tuple(row[1:5]) for row in rows(ROOT / "docs/storage.md") if len(row) == 6}
    del table["option"], table["---"]
    assert table == dict(OPTIONS)


@pytest.mark.parametrize("page", [README, ROOT / "docs/strategies.md"], ids=lambda page: page.name)
def test_each_strategy_has_its_row(page: Path) -> None:
    named = {name for row in rows(page) for name in re.findall(r"`(\w+)`", row[0])}
    assert set(STRATEGIES) <= named
