"""State shared by all servers, in Redis. Nothing outside of this package knows redis-py."""

import warnings

from ratethrottle.errors import ConfigurationError
from ratethrottle.storage.redis.scripts import check_installed
from ratethrottle.storage.redis.storage import RedisStorage

__all__ = ["RedisStorage"]

try:
    check_installed()
except ConfigurationError as missing:
    # A warning at once, and no error: in-memory storage needs no scripts. RedisStorage raises the error.
    warnings.warn(str(missing), RuntimeWarning, stacklevel=2)
