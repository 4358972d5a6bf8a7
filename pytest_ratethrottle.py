"""The pytest plugin of ratethrottle: two fixtures, with names that no project has by accident.

pytest loads this wherever ratethrottle is installed. So it isn't in the package, and imports that only for a test that asks for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ratethrottle.testing import MakeLimiter, ManualClock


@pytest.fixture
def ratethrottle_clock() -> ManualClock:
    """Make a clock that stands still: `ratethrottle_clock.advance(60)`."""
    from ratethrottle.testing import ManualClock  # noqa: PLC0415  # see above

    return ManualClock()


@pytest.fixture
def ratethrottle_limiter(ratethrottle_clock: ManualClock) -> Iterator[MakeLimiter]:
    """Make limiters on that clock: `ratethrottle_limiter(rule, ...)`; with `client=` on Redis or fakeredis. They are closed in the end."""
    from ratethrottle.testing.making import LimiterMaker  # noqa: PLC0415  # see above

    maker = LimiterMaker(ratethrottle_clock)
    yield maker
    maker.close()
