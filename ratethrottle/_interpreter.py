"""Loads the core first, and says what to do if a process has several Python interpreters: only one of them can load it."""

from __future__ import annotations

try:
    import ratethrottle._core  # noqa: F401  # that it can be loaded is what is asked
except ImportError as error:
    # "Interpreter change detected" of Cython up to Python 3.11, "does not support loading in subinterpreters" of Python 3.12 on.
    if "interpreter" not in str(error).lower():
        raise
    raise ImportError(
        "ratethrottle is compiled, and only one Python interpreter of a process can load it; this is another one. "
        "mod_wsgi: set `WSGIApplicationGroup %{GLOBAL}`; uWSGI: set `single-interpreter = true`; elsewhere use a process for "
        "each application instead of a subinterpreter"
    ) from error
