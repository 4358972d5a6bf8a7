"""A type checker flags what a user must not forget."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import ratethrottle

# What mypy says to it, and what pyright says.
FORGOTTEN = {
    "async def f(core: RateThrottleCore) -> None:\n    core.check('key')\n": ("unused-coroutine", "reportUnusedCoroutine"),
    "def f(core: RateThrottleCore) -> None:\n    core.check('key').remaining\n": ("attr-defined", "reportAttributeAccessIssue"),
    "async def f(core: RateThrottleCore) -> None:\n    await core.check(5)\n": ("call-overload", "reportArgumentType"),
    "def f() -> None:\n    RateThrottleRule('a', 1, 60, 'token_bucket')\n": ("call-arg|misc", "reportCallIssue"),
}


def write_cases(directory: Path) -> None:
    for number, (code, _) in enumerate(FORGOTTEN.items()):
        (directory / f"case{number}.py").write_text(f"from ratethrottle import RateThrottleCore, RateThrottleRule\n{code}")


@pytest.mark.slow
def test_pyright_flags_them_too(tmp_path: Path) -> None:
    write_cases(tmp_path)
    home = str(Path(ratethrottle.__file__).parents[1])
    (tmp_path / "pyrightconfig.json").write_text(json.dumps({"typeCheckingMode": "standard", "extraPaths": [home]}))
    command = [sys.executable, "-m", "basedpyright", "--outputjson", "--pythonpath", sys.executable, "--project", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, check=False, cwd=tmp_path)
    said = [(Path(one["file"]).stem, one["rule"]) for one in json.loads(done.stdout)["generalDiagnostics"]]
    assert sorted(said) == [(f"case{number}", rule) for number, (_, rule) in enumerate(FORGOTTEN.values())]


@pytest.mark.slow
def test_mypy_flags_a_forgotten_await_and_bad_arguments(tmp_path: Path) -> None:
    write_cases(tmp_path)
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--strict",
        "--no-error-summary",
        "--cache-dir",
        str(tmp_path / "cache"),
        str(tmp_path),
    ]
    # mypy finds an installed wheel by itself, and refuses a path into site-packages; a checkout needs one.
    home = Path(ratethrottle.__file__).parents[1]
    env = os.environ | ({} if home.name == "site-packages" else {"MYPYPATH": str(home)})
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, check=False, cwd=tmp_path, env=env)
    said = done.stdout + done.stderr
    for number, (kinds, _) in enumerate(FORGOTTEN.values()):
        lines = [line for line in said.splitlines() if f"case{number}.py" in line]
        assert any(f"[{kind}]" in line for kind in kinds.split("|") for line in lines), said
