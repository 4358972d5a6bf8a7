"""For tests of code that is limited: a clock that stands still, a Redis that fails on command, and a check of promises.

    clock = ManualClock()
    limiter = RateThrottleCore(InMemoryStorage(clock_us=clock), rules=[rule])

For pytest there are two fixtures, `ratethrottle_clock` and `ratethrottle_limiter`. Nothing here is imported by the package itself.
"""

from ratethrottle.testing.clock import ManualClock
from ratethrottle.testing.fake import fake_redis
from ratethrottle.testing.faults import Fault, Faults
from ratethrottle.testing.intervals import Breach, PromiseBrokenError
from ratethrottle.testing.making import MakeLimiter
from ratethrottle.testing.manual import ManualRedisStorage
from ratethrottle.testing.promise import assert_promise, assert_promise_between

__all__ = [
    "Breach",
    "Fault",
    "Faults",
    "MakeLimiter",
    "ManualClock",
    "ManualRedisStorage",
    "PromiseBrokenError",
    "assert_promise",
    "assert_promise_between",
    "fake_redis",
]
