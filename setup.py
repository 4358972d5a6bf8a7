"""Builds the compiled core. Everything else stands in pyproject.toml.

RATETHROTTLE_BUILD chooses the mode: ship (default), debug (invariants and strict warnings), trace (coverage sees inside the
.pyx), sanitize (address and undefined behaviour). If the core doesn't build, the install fails: there is no slow twin.
"""

import os
import sys

from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_py import build_py

STRICT = ["-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-cast-function-type", "-Wno-missing-field-initializers"]
MODES = {
    "ship": ["-O3"],
    "debug": ["-O1", "-g", "-UNDEBUG", "-DRATETHROTTLE_DEBUG=1", *STRICT],
    "trace": ["-O1", "-DCYTHON_TRACE=1", "-DCYTHON_USE_SYS_MONITORING=0"],
    "sanitize": ["-O1", "-g", "-fsanitize=address,undefined", "-fno-wrapv", "-DRATETHROTTLE_DEBUG=1"],
}

mode = os.environ.get("RATETHROTTLE_BUILD", "ship")
if mode not in MODES:
    sys.exit(f"RATETHROTTLE_BUILD={mode!r}: choose one of {', '.join(MODES)}")


class BuildPy(build_py):
    """A wheel carries the compiled core and its stub, not what it was made from."""

    def find_data_files(self, package, src_dir):
        files = super().find_data_files(package, src_dir)
        return [file for file in files if not file.endswith((".pyx", ".c"))]


core = Extension(
    "ratethrottle._core",
    ["ratethrottle/_core.pyx"],
    extra_compile_args=MODES[mode],
    extra_link_args=[flag for flag in MODES[mode] if flag.startswith("-fsanitize")],
)

setup(
    cmdclass={"build_py": BuildPy},
    ext_modules=cythonize(
        [core],
        force=mode != "ship",
        compiler_directives={
            "language_level": 3,
            "boundscheck": False,
            "wraparound": False,
            "cdivision": True,  # operands of a division are never negative here
            "initializedcheck": False,
            "linetrace": mode == "trace",
        },
    ),
)
