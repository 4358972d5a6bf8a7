"""An asyncio rate limiter for services on more than one server: atomic, fast, and bounded when Redis fails."""

from ratethrottle import _interpreter, events  # noqa: F401  # the former first
from ratethrottle._core import PendingDecision
from ratethrottle._engine.decision import Decision
from ratethrottle.errors import (
    ConfigurationError,
    CostExceedsLimit,
    InvalidRequest,
    LimiterClosed,
    RateLimitExceeded,
    RateThrottleError,
    StateUnreadable,
    StorageError,
    StorageProtocolError,
    StorageRefused,
    StorageTimeout,
    StorageUnavailable,
)
from ratethrottle.limiter import RateThrottleCore, Request, create_limiter
from ratethrottle.rule import ConcurrencyRule, FirstOf, RateThrottleRule
from ratethrottle.storage import Outcomes, Statistics
from ratethrottle.storage.memory import InMemoryStorage
from ratethrottle.storage.redis import RedisStorage

__all__ = [
    "ConcurrencyRule",
    "ConfigurationError",
    "CostExceedsLimit",
    "Decision",
    "FirstOf",
    "InMemoryStorage",
    "InvalidRequest",
    "LimiterClosed",
    "Outcomes",
    "PendingDecision",
    "RateLimitExceeded",
    "RateThrottleCore",
    "RateThrottleError",
    "RateThrottleRule",
    "RedisStorage",
    "Request",
    "StateUnreadable",
    "Statistics",
    "StorageError",
    "StorageProtocolError",
    "StorageRefused",
    "StorageTimeout",
    "StorageUnavailable",
    "create_limiter",
    "events",
]
