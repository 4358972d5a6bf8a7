"""Promises about the repository and the package that no other test would notice broken."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import ratethrottle

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
TEXTS = [
    path
    for pattern in ("*.md", "*.rst", "*.toml", "*.txt", "*.py", "*.pyi", "*.pyx", "*.lua", "Makefile")
    for path in ROOT.rglob(pattern)
    if not {"build", "dist"} & set(path.relative_to(ROOT).parts)
    and not any(part.startswith(".") or part.endswith(".egg-info") for part in path.relative_to(ROOT).parts)
]


def test_setup_py_stays_short() -> None:
    assert len((ROOT / "setup.py").read_text().splitlines()) < 70


def test_nothing_tells_a_reader_to_install_a_strangers_package() -> None:
    # The name on PyPI is somebody else's. The pattern is split so that this file doesn't hold it.
    told = re.compile(r"(pip3?|uv|poetry|pdm)\s+(pip\s+)?(install|add)\s+(-\S+\s+)*[\"']?" + "rate" + r"throttle\b")
    assert not [path for path in TEXTS if told.search(path.read_text())]


def test_the_package_is_typed() -> None:
    package = Path(ratethrottle.__file__).parent
    assert (package / "py.typed").exists()
    assert (package / "_core.pyi").exists()


def test_every_package_is_listed() -> None:
    package = Path(ratethrottle.__file__).parent
    found = {".".join(path.parent.relative_to(package.parent).parts) for path in package.rglob("__init__.py")}
    assert found == set(PYPROJECT["tool"]["setuptools"]["packages"])


def test_the_oldest_dependencies_are_the_lower_ends_of_the_ranges() -> None:
    def pins(text: str, separator: str) -> dict[str, tuple[int, ...]]:
        found = re.findall(rf"^([\w-]+)(?:\[\w+\])?{separator}([\d.]+)", text, re.MULTILINE)
        return {name: tuple(map(int, (version + ".0.0").split(".")[:3])) for name, version in found}

    ranges = pins("\n".join(PYPROJECT["project"]["dependencies"]), ">=")
    assert pins((ROOT / "requirements/floor.txt").read_text(), "==") == ranges


def test_the_wheel_check_finds_what_is_missing_and_what_is_too_much(tmp_path: Path) -> None:
    wheel = tmp_path / "ratethrottle-0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("ratethrottle/__init__.py", "")
        archive.writestr("ratethrottle/_core.pyx", "")
    run = subprocess.run([sys.executable, ROOT / "tools/check_wheel.py", wheel], capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert "a source: ratethrottle/_core.pyx" in run.stdout
    if (ROOT / "ratethrottle").is_dir():  # not where an installed wheel is tested: what it should hold is found in the sources
        assert "missing: the compiled ratethrottle/_core" in run.stdout
        assert "missing: the compiled ratethrottle/storage/_shared/batch" in run.stdout
    assert "missing: ratethrottle/py.typed" in run.stdout
    assert "missing: pytest_ratethrottle.py" in run.stdout
    assert "missing: the entry point of the pytest plugin" in run.stdout


@pytest.mark.parametrize("mode", ["shipp", "Debug", ""])
def test_an_unknown_build_mode_is_an_error_that_lists_the_modes(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RATETHROTTLE_BUILD", mode)
    run = subprocess.run([sys.executable, "setup.py", "--version"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode != 0
    assert "ship, debug, trace, sanitize" in run.stderr


OTHER_INTERPRETER = """
import sys
try:
    import _interpreters as interpreters
except ImportError:
    import _xxsubinterpreters as interpreters
if sys.argv[1] == "in the main one":
    import ratethrottle
code = '''
try:
    import ratethrottle
    print("loaded", repr(ratethrottle.create_limiter()), flush=True)
except ImportError as error:
    print("refused", error, flush=True)
'''
for _ in range(2):
    interpreters.run_string(interpreters.create(), code)
"""


@pytest.mark.parametrize("first", ["in the main one", "in another one"])
def test_an_error_tells_a_second_interpreter_of_a_process_what_to_do(first: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", OTHER_INTERPRETER, first],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=os.environ | {"PYTHONPATH": str(Path(ratethrottle.__file__).parents[1])},
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 2, done.stderr
    refused = [line for line in lines if line.startswith("refused ratethrottle is compiled, and only one Python interpreter")]
    assert all("WSGIApplicationGroup %{GLOBAL}" in line and "single-interpreter = true" in line for line in refused)
    assert len(refused) >= 1  # the second at least; from Python 3.12 on no other than the main one
    assert all(line in refused or line.startswith("loaded <RateThrottleCore") for line in lines)
