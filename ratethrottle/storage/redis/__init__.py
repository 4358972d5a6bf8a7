"""State shared by all servers, in Redis. Nothing outside of this package knows redis-py."""

import warnings

from ratethrottle.errors import ConfigurationError
from ratethrottle.storage.redis.scripts import check_installed
from ratethrottle.storage.redis.storage import RedisStorage

__all__ = ["RedisStorage"]

try:
    check_installed()
except ConfigurationError as missing:
    # Said at once, but only said: whoever keeps the state in memory needs no scripts. RedisStorage raises it.
    warnings.warn(str(missing), RuntimeWarning, stacklevel=2)
