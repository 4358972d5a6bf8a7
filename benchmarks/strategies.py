"""What every suite measures: the strategies, and limiters of one rule in memory."""

from __future__ import annotations

from ratethrottle import InMemoryStorage, RateThrottleCore, RateThrottleRule

STRATEGIES = ("sliding_window", "token_bucket", "leaky_bucket", "sliding_counter", "fixed_window")
YEAR_S = 365 * 86_400


def limiter(strategy: str, limit: int, window: float, max_keys: int = 1_000_000) -> RateThrottleCore:
    """Make a limiter with one rule, in memory."""
    return RateThrottleCore(
        InMemoryStorage(max_keys=max_keys), rules=[RateThrottleRule("bench", limit, window, strategy=strategy)]
    )
