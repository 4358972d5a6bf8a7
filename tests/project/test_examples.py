"""Each example runs as its first lines say, and shows what it says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kit.servers import RedisServer

EXAMPLES = Path(__file__).parents[2] / "examples"
SHOWN = {
    "quickstart": (r"request 5: allowed, 0 left", r"request 6: denied, 0 left", r"waited: allowed"),
    "two_limits": (r"^1 200 .*q=10", r"^11 429 ", r"Retry-After"),
    "outage": (
        r"local\n  event: OutageBegan\n  decided by outage: allowed, 24 left",
        r"deny\n.*\n  decided by outage: denied",
        r"raised: Storage",
    ),
    "testing": (r"passed: test_the_fourth.*\npassed: test_without_redis",),
    "shared_limit": (r"20 allowed, 10 denied", r"decided by prefilter, again in (59|60) s"),
}


def test_all_examples_are_tried() -> None:
    assert set(SHOWN) == {path.stem for path in EXAMPLES.glob("*.py")}


@pytest.mark.redis
@pytest.mark.parametrize("name", SHOWN)
def test_an_example_shows_what_it_says(name: str, redis_server: RedisServer) -> None:
    arguments = [redis_server.url] if name == "shared_limit" else []
    command = [sys.executable, "-W", "error", str(EXAMPLES / f"{name}.py"), *arguments]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 0, ran.stderr
    for pattern in SHOWN[name]:
        assert re.search(pattern, ran.stdout, re.MULTILINE), f"{pattern}\n{ran.stdout}"
