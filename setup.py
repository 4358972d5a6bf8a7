"""Build the compiled modules. RATETHROTTLE_BUILD picks the mode: ship (default), debug, trace or sanitize.

There is no slower twin to fall back to: if the extension doesn't build, neither does the package.
"""

import os
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup

CORES = os.cpu_count() or 1
SOURCES = sorted(Path("ratethrottle").rglob("*.pyx"))

STRICT = ["-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter", "-Wno-missing-field-initializers"]
INVARIANTS = {"define_macros": [("RATETHROTTLE_DEBUG", "1")], "undef_macros": ["NDEBUG"]}
# Python builds with -fwrapv, under which no signed overflow is an error for the sanitizer to report.
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]

UNCHECKED = {"boundscheck": False, "wraparound": False, "initializedcheck": False, "cdivision": True}
# cdivision everywhere: the arithmetic promises operands that are never negative, and debug must run the same division as ship.
CHECKED = {"boundscheck": True, "wraparound": False, "initializedcheck": True, "cdivision": True}
TRACED = UNCHECKED | {"linetrace": True, "profile": True}

# GCC stops inlining when all that Cython wrote has grown by 40 %, before it reaches the arithmetic of a check. Clang knows no such bound.
# Nor does it inline the decision on a new key, of which a second caller exists since rules know calendars.
INLINE = ["--param=inline-unit-growth=100", "--param=max-inline-insns-single=600"]

# Strict flags stay out of ship: a compiler we have never met must be free to warn without failing somebody's install.
MODES = {
    "ship": ({"extra_compile_args": ["-O3", "-g0", "-fno-plt", *INLINE]}, UNCHECKED),
    "debug": ({"extra_compile_args": ["-O1", "-g", *STRICT], **INVARIANTS}, CHECKED),
    "trace": (
        {
            "extra_compile_args": ["-O1", "-g"],
            # The arithmetic is nogil, which CYTHON_TRACE alone passes by; coverage.py's plugin speaks settrace only, not sys.monitoring.
            "define_macros": [("CYTHON_TRACE", "1"), ("CYTHON_TRACE_NOGIL", "1"), ("CYTHON_USE_SYS_MONITORING", "0")],
        },
        TRACED,
    ),
    "sanitize": (
        {"extra_compile_args": ["-O1", "-g", *SANITIZE, "-fno-wrapv"], "extra_link_args": SANITIZE, **INVARIANTS},
        CHECKED,
    ),
}

mode = os.environ.get("RATETHROTTLE_BUILD", "ship")
if mode not in MODES:
    raise SystemExit(f"RATETHROTTLE_BUILD={mode!r} is no build mode; use one of: {', '.join(MODES)}")
options, directives = MODES[mode]

setup(
    ext_modules=cythonize(
        [Extension(".".join(path.with_suffix("").parts), [str(path)], **options) for path in SOURCES],
        # Coverage finds the generated C only beside its source; everywhere else it would be mistaken for ours.
        build_dir=None if mode == "trace" else f"build/cython-{mode}",
        compiler_directives={"language_level": 3, "embedsignature": False, **directives},
        force=True,
    ),
    # What was built in another mode looks up to date by its time stamp.
    options={"build_ext": {"force": True, "parallel": CORES}},
)
