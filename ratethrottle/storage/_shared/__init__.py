"""Speaks to a store that processes share, in bytes: what is asked, how it is written and read, what is known. No sockets, no redis-py."""
