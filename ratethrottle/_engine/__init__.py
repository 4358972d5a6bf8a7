"""What decides: the arithmetic, the table of keys, and decisions. No I/O, no asyncio; only a table reads a clock, its own."""
