"""State shared by all servers, in Redis. Nothing outside of this package knows redis-py."""

from ratethrottle.storage.redis.storage import RedisStorage

__all__ = ["RedisStorage"]
