"""Checked by mypy, never run: the types that callers see."""
